/* cascade_bytes.h: what the copy and the checksum share; not part of the interface. */
#ifndef CASCADE_BYTES_H
#define CASCADE_BYTES_H

#include "cascade.h"

#include <stdbool.h>

/* Below this a copy stays in the cache (memcpy): the caller probably reads it again soon. */
#define CASCADE_STREAM_MIN_BYTES (32u << 10)

/* Whether cascade_copy of `n` bytes uses non-temporal stores now. */
bool cascade_copy_streams(size_t n);

#endif

/* cascade.h: the whole interface of the native part.
 *
 * Ring mechanics, streaming copies and an eventfd notify: what Python cannot do. No policy, no
 * Python call, no allocation besides the ring itself. Every function returns a count >= 0 or
 * -errno unless its comment says otherwise. cffi_build/build.py reads the declarations between the
 * two cffi markers; keep them plain C (no macros, no conditionals).
 */
#ifndef CASCADE_H
#define CASCADE_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* opcodes of struct cascade_op */
enum {
    CASCADE_OP_NOP = 0,
    CASCADE_OP_READ = 1,       /* addr = buffer, length = bytes */
    CASCADE_OP_WRITE = 2,
    CASCADE_OP_READV = 3,      /* addr = struct iovec array, length = its count; array lives until completion */
    CASCADE_OP_WRITEV = 4,
    CASCADE_OP_READ_FIXED = 5, /* addr inside registered buffer buffer_index */
    CASCADE_OP_WRITE_FIXED = 6,
    CASCADE_OP_FDATASYNC = 7,
    CASCADE_OP_CANCEL = 8      /* addr = user_data of the request to cancel */
};

enum {
    CASCADE_OPF_FIXED_FILE = 1 /* fd is an index into the registered files */
};

enum {
    CASCADE_FEATURE_REGISTER_SPARSE = 1, /* sparse buffer and file tables (kernel >= 5.19) */
    CASCADE_FEATURE_EXT_ARG = 2,
    CASCADE_FEATURE_NODROP = 4
};

struct cascade_op { /* 40 bytes */
    uint64_t user_data;
    uint64_t addr;
    uint64_t offset;
    uint32_t length;
    int32_t fd;
    uint8_t opcode;
    uint8_t flags;
    uint16_t buffer_index;
    uint32_t reserved; /* must be 0 */
};

struct cascade_completion { /* 16 bytes */
    uint64_t user_data;
    int32_t result; /* bytes, or -errno */
    uint32_t flags;
};

typedef struct cascade_ring cascade_ring;

/* Open a ring of `entries` submission slots whose completions raise `event_fd`.
 * Fails with -ENOSYS / -EPERM / -ENOMEM as the kernel does; -ENOTSUP when an opcode above is missing. */
int cascade_ring_open(uint32_t entries, int event_fd, cascade_ring **out);
/* Bit set of CASCADE_FEATURE_*. */
uint32_t cascade_ring_features(const cascade_ring *ring);
/* Queue and submit up to `count` operations with one system call. Returns how many of them were
 * taken (fewer when the submission queue is full: call again after reaping), or -errno and none. */
int cascade_ring_submit(cascade_ring *ring, const struct cascade_op *ops, uint32_t count);
/* Take up to `capacity` completions without blocking; flushes the kernel's overflow list. */
int cascade_ring_reap(cascade_ring *ring, struct cascade_completion *out, uint32_t capacity);
/* Block until at least one completion is there, `timeout_ms` passed (-ETIME) or a signal came (-EINTR).
 * For shutdown only. */
int cascade_ring_wait(cascade_ring *ring, uint32_t timeout_ms);
/* Sparse table of `slots` fixed buffers, filled one by one; one buffer may have at most 1 GiB (-EINVAL).
 * Registering may run in another thread than submit and reap. */
int cascade_ring_register_buffer_table(cascade_ring *ring, uint32_t slots);
int cascade_ring_register_buffer(cascade_ring *ring, uint32_t slot, void *addr, uint64_t length);
int cascade_ring_unregister_buffers(cascade_ring *ring);
/* Sparse table of `slots` fixed files; fd -1 clears a slot. */
int cascade_ring_register_file_table(cascade_ring *ring, uint32_t slots);
int cascade_ring_register_file(cascade_ring *ring, uint32_t slot, int fd);
/* The caller has drained the ring; unregisters all and frees it. NULL is allowed. */
void cascade_ring_close(cascade_ring *ring);
/* Version of liburing it was built with, as major * 100 + minor. */
int cascade_uring_version(void);

/* Name of the copy chosen at run time: "avx512", "avx2", "sse2" or "memcpy". */
const char *cascade_copy_variant(void);
/* Override the choice for tests and benchmarks (-EINVAL if unknown, -ENOTSUP if not on this CPU). */
int cascade_copy_select(const char *variant);
/* Copy with non-temporal stores (memcpy below a cut-off); fenced before return. Any alignment. */
void cascade_copy(void *dst, const void *src, size_t n);
/* The same, returning crc32c(crc, src[0:n]) (Castagnoli, init and final inversion as in zlib's crc32). */
uint32_t cascade_copy_crc32c(void *dst, const void *src, size_t n, uint32_t crc);
/* crc32c alone; table-driven where the CPU has no instruction. */
uint32_t cascade_crc32c(const void *src, size_t n, uint32_t crc);
/* crc32c(0, chunk) of each chunk_bytes of src, the last chunk shorter, into crcs. */
void cascade_crc32c_chunks(const void *src, size_t n, size_t chunk_bytes, uint32_t *crcs);
/* Whether OpenSSL's SHA-256 was found (once, at the first call). */
int cascade_sha256_available(void);
/* Copy key to payload[0:] and value to payload[value_offset:], zero what lies between and behind, and
 * compute the SHA-256 of key and value (32 bytes into digest) and the crc32c of each chunk_bytes of the
 * payload (into crcs, the last chunk shorter). A part that is where it belongs already is not copied.
 * -ENOSYS without OpenSSL, -EINVAL for parts that do not fit, -EIO and -ENOMEM from OpenSSL. */
int cascade_ingest_sha256(void *payload, size_t payload_bytes, const void *key, size_t key_bytes, const void *value,
                          size_t value_bytes, size_t value_offset, size_t chunk_bytes, uint32_t *crcs, uint8_t *digest);
/* Map `nbytes` of the file `fd` shared, readable and writable, at an address that is a multiple of
 * `alignment` (a power of two, at least a page). */
int cascade_map_shared(int fd, uint64_t nbytes, uint64_t alignment, void **out);
int cascade_unmap(void *addr, uint64_t nbytes);
/* Put [addr, addr + n) into huge pages, present and writable, bytes unchanged (MADV_COLLAPSE, Linux 6.1;
 * it does not ask how transparent huge pages are configured). addr and n are multiples of the huge page.
 * -EINVAL: this kernel or mapping cannot; -EAGAIN, -ENOMEM, -EBUSY: not now, part may be done. */
int cascade_collapse(void *addr, size_t n);
/* Make every page of [addr, addr + n) present and writable (MADV_POPULATE_WRITE, else touch without
 * changing bytes; the caller must then be the only writer). addr is page-aligned. */
int cascade_prefault(void *addr, size_t n);
/* Give memory that was freed but is kept by the C library back to the system (glibc; elsewhere nothing).
 * Takes milliseconds per 100 MB: not for the event loop. */
void cascade_trim_heap(void);
/* Add 1 to the eventfd whose number is `event_fd` cast to a pointer: callable from CUDA host
 * functions and any thread; never blocks on a semaphore overflow. */
void cascade_notify(void *event_fd);

/* cffi: end */

#endif

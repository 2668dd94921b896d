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
/* The same for `count` ranges one after the other: ranges[2 i] is an address, ranges[2 i + 1] its length. */
void cascade_crc32c_ranges(const uint64_t *ranges, size_t count, size_t chunk_bytes, uint32_t *crcs);
/* Whether OpenSSL's SHA-256 was found (once, at the first call). */
int cascade_sha256_available(void);
/* Copy key to payload[0:] and value to payload[value_offset:], zero what lies between and behind, and
 * compute the SHA-256 of key and value (32 bytes into digest) and the crc32c of each chunk_bytes of the
 * payload (into crcs, the last chunk shorter). A part that is where it belongs already is not copied.
 * -ENOSYS without OpenSSL, -EINVAL for parts that do not fit, -EIO and -ENOMEM from OpenSSL. */
int cascade_ingest_sha256(void *payload, size_t payload_bytes, const void *key, size_t key_bytes, const void *value,
                          size_t value_bytes, size_t value_offset, size_t chunk_bytes, uint32_t *crcs, uint8_t *digest);
/* Map `nbytes` of the file `fd` from `offset` (whole pages) shared, readable and if `writable` also writable,
 * at an address that is a multiple of `alignment` (a power of two, at least a page) plus what `offset` is over one:
 * huge pages of the file, if `alignment` is their size, are then mapped as such. */
int cascade_map_shared(int fd, uint64_t offset, uint64_t nbytes, uint64_t alignment, int writable, void **out);
int cascade_unmap(void *addr, uint64_t nbytes);
/* Put [addr, addr + n) into huge pages, present and writable, bytes unchanged (MADV_COLLAPSE, Linux 6.1;
 * it does not ask how transparent huge pages are configured). addr and n are multiples of the huge page.
 * -EINVAL: this kernel or mapping cannot; -EAGAIN, -ENOMEM, -EBUSY: not now, part may be done. */
int cascade_collapse(void *addr, size_t n);
/* Make every page of [addr, addr + n) present and writable (MADV_POPULATE_WRITE, else touch) without
 * changing bytes, also of what others write meanwhile. addr is page-aligned. */
int cascade_prefault(void *addr, size_t n);
/* Map in every page of [addr, addr + n), which exist already (MADV_POPULATE_READ, else touch): a third of what
 * cascade_prefault costs there, and as good for writing to memory that is shared. addr is page-aligned. */
int cascade_map_in(const void *addr, size_t n);
/* Give memory that was freed but is kept by the C library back to the system (glibc; elsewhere nothing).
 * Takes milliseconds per 100 MB: not for the event loop. */
void cascade_trim_heap(void);
/* Add 1 to the eventfd whose number is `event_fd` cast to a pointer: callable from CUDA host
 * functions and any thread; never blocks on a semaphore overflow. */
void cascade_notify(void *event_fd);

/* ---- device memory shown to others ---- */

/* A DLManagedTensor of DLPack (dlpack.h, unversioned: every consumer takes it) of bytes in one dimension, and behind
 * it what the release needs. `data` to `deleter` have the layout that DLPack prescribes. */
struct cascade_dlpack {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
    void *manager_ctx;
    void (*deleter)(struct cascade_dlpack *);
    int64_t length;   /* what shape points to */
    int32_t event_fd; /* told of the release; -1: nobody */
    int32_t released; /* set by the release */
};
/* Describe `length` bytes at `data`. The struct is the caller's, who keeps it until `released`. */
void cascade_dlpack_init(struct cascade_dlpack *managed, uint64_t data, int64_t length, int32_t device_type,
                         int32_t device_id, int event_fd);
/* The deleter: from any thread, with or without an interpreter. */
void cascade_dlpack_release(struct cascade_dlpack *managed);
/* Whether it was called. What the consumer did with the memory happened before. */
int cascade_dlpack_released(struct cascade_dlpack *managed);

/* ---- the arena's directory and pins on it: cascade_aio/tiers/DIRECTORY.md ---- */

enum { /* states of a slot: the low byte of its word, whose other bytes are its generation */
    CASCADE_SLOT_FREE = 0,
    CASCADE_SLOT_BUSY = 1,     /* being written */
    CASCADE_SLOT_SEALED = 2,   /* may be pinned */
    CASCADE_SLOT_EVICTING = 3, /* being withdrawn, or sealed again if somebody has a pin */
    CASCADE_SLOT_RETIRED = 4,  /* dropped, but pins are left: nothing may take its extent */
    CASCADE_SLOT_FILLING = 5,  /* an extent that a client writes */
    CASCADE_SLOT_DORMANT = 6   /* sealed by a former owner, not verified by this one */
};

enum {
    CASCADE_SLOT_BY_MESSAGE = 1 /* flag: metadata does not fit, a pin is refused */
};

struct cascade_directory { /* one mapping of a directory, with the geometry that this process computed */
    void *cells; /* buckets of 8 cells of 8 bytes, 64-byte aligned */
    void *slots; /* 256 bytes each */
    uint32_t slot_count;
    uint32_t buckets; /* a power of two */
};

struct cascade_pins { /* one mapping of a pin table */
    void *touches; /* uint64_t: how often a touched byte was set */
    void *counts;  /* uint32_t per slot */
    void *touched; /* uint8_t per slot, 8-byte aligned */
    uint32_t slot_count;
    uint32_t reserved;
};

struct cascade_entry { /* what a slot says: 176 bytes */
    uint64_t word;
    uint64_t offset; /* of the extent in the arena */
    uint64_t key_bytes;
    uint64_t value_bytes;
    uint64_t value_offset; /* in the payload, which begins header_bytes behind offset */
    uint32_t slot;
    uint32_t header_bytes;
    uint32_t meta_bytes;
    uint32_t flags;
    uint8_t digest[32];
    uint8_t meta[88];
};

/* Readers. A name is 16 bytes. None of these blocks or writes the directory. */
/* The slot of a sealed block, or -ENOENT: true at some moment during the call. */
int64_t cascade_directory_find(const struct cascade_directory *directory, const uint8_t *name);
/* How many of `count` names, leading ones, are those of sealed blocks. */
uint32_t cascade_directory_lookup(const struct cascade_directory *directory, const uint8_t *names, uint32_t count);
/* Pin the block and tell what its slot says, which stays so until cascade_pins_drop; -ENOENT. */
int cascade_directory_pin(const struct cascade_directory *directory, const struct cascade_pins *pins, const uint8_t *name,
                          struct cascade_entry *out);
/* One more pin on a slot that cannot be withdrawn now: the owner's call, for a client. -EINVAL: no such slot. */
int cascade_pins_add(const struct cascade_pins *pins, uint32_t slot);
/* One pin less; -EINVAL if there was none. */
int cascade_pins_drop(const struct cascade_pins *pins, uint32_t slot);

/* The owner, one thread. `tables` are the counts of all pin tables. -EINVAL for a slot that does not exist. */
/* Fill a free slot (-EBUSY if it is not) and give it a state; SEALED: findable by its id (-ENOSPC: still free). */
int cascade_directory_publish(const struct cascade_directory *directory, const struct cascade_entry *entry, uint32_t state);
/* A further name of a sealed slot; -ENOSPC when the slot or the table has no room. */
int cascade_directory_bind(const struct cascade_directory *directory, uint32_t slot, const uint8_t *name);
int cascade_directory_unbind(const struct cascade_directory *directory, uint32_t slot, const uint8_t *name);
/* 1: nobody has a pin, the slot is free. 0: somebody has, nothing has changed. */
int cascade_directory_withdraw(const struct cascade_directory *directory, uint32_t slot, uint32_t *const *tables,
                               uint32_t table_count);
/* 1 if somebody has a pin on the slot now, else 0. */
int cascade_directory_is_pinned(const struct cascade_directory *directory, uint32_t slot, uint32_t *const *tables,
                                uint32_t table_count);
/* No new pins from now on. 1: the slot is free. 0: pins are left, call again. */
int cascade_directory_retire(const struct cascade_directory *directory, uint32_t slot, uint32_t *const *tables,
                             uint32_t table_count);
/* What a slot of any state says, and its state; -EBADMSG if its checksum is wrong. */
int cascade_directory_inspect(const struct cascade_directory *directory, uint32_t slot, struct cascade_entry *out);
/* Change the state of a slot; SEALED: findable by its id, without names (-ENOSPC: unchanged); FREE: of a new generation. */
int cascade_directory_mark(const struct cascade_directory *directory, uint32_t slot, uint32_t state);
/* Empty the table of names. */
void cascade_directory_clear_names(const struct cascade_directory *directory);
/* Slots from `start` on that were touched since they were last asked for, up to `capacity`; the search ended before *next. */
uint32_t cascade_pins_harvest(const struct cascade_pins *pins, uint32_t start, uint32_t *out, uint32_t capacity, uint32_t *next);
/* The same for slots that have a pin. */
uint32_t cascade_pins_held(const struct cascade_pins *pins, uint32_t start, uint32_t *out, uint32_t capacity, uint32_t *next);
/* An aligned 64-bit word shared with another process: acquire and release. */
uint64_t cascade_word_load(const void *address);
void cascade_word_store(void *address, uint64_t value);

/* cffi: end */

#endif

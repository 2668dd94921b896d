/* smoke.c: a stand-alone test of everything in cascade.h, meant to run under ASan and UBSan.
 *
 * Prints one line per part: "ok NAME", or "skip NAME: reason" where the kernel forbids io_uring.
 * Exits 1 at the first failed check, with file and line. It includes cascade_crc.c to reach each of
 * the checksum's paths, whatever this CPU would choose.
 */
#include "cascade_crc.c"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);   \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)

#define PAGE 4096u
#define ROOM (96u << 10)

static uint8_t *source, *target, *wanted;

static void fill(void)
{
    uint32_t state = 12345;
    source = aligned_alloc(PAGE, ROOM);
    target = aligned_alloc(PAGE, ROOM);
    wanted = aligned_alloc(PAGE, ROOM);
    CHECK(source && target && wanted);
    for (size_t i = 0; i < ROOM; i++) {
        state = state * 1664525u + 1013904223u;
        source[i] = (uint8_t)(state >> 24);
    }
}

static uint32_t crc_bitwise(const uint8_t *src, size_t n, uint32_t crc)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= src[i];
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (POLYNOMIAL & (0u - (crc & 1u)));
    }
    return ~crc;
}

/* Sizes and alignments around every boundary of the code: words, lines, folds, pieces, the cut-off. */
static const size_t sizes[] = {0, 1, 3, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1023, 4095, 4096, 4097,
                               PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, CASCADE_STREAM_MIN_BYTES - 1,
                               CASCADE_STREAM_MIN_BYTES, CASCADE_STREAM_MIN_BYTES + 1, 65537, 90001};
static const size_t offsets[] = {0, 1, 8, 15, 16, 33, 63};
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static void check_copy(void)
{
    for (size_t s = 0; s < COUNT(sizes); s++)
        for (size_t d = 0; d < COUNT(offsets); d++)
            for (size_t o = 0; o < COUNT(offsets); o++) {
                size_t n = sizes[s];
                uint32_t crc = crc_bitwise(source + offsets[o], n, 7);
                for (int fused = 0; fused < 2; fused++) {
                    memset(target, 0xA5, ROOM);
                    memset(wanted, 0xA5, ROOM);
                    memcpy(wanted + offsets[d], source + offsets[o], n);
                    if (fused)
                        CHECK(cascade_copy_crc32c(target + offsets[d], source + offsets[o], n, 7) == crc);
                    else
                        cascade_copy(target + offsets[d], source + offsets[o], n);
                    CHECK(memcmp(target, wanted, ROOM) == 0); /* and not a byte outside */
                }
                CHECK(cascade_crc32c(source + offsets[o], n, 7) == crc);
            }
}

static void check_crc_vectors(void)
{
    CHECK(cascade_crc32c("123456789", 9, 0) == 0xE3069283u);
    CHECK(cascade_crc32c("", 0, 0) == 0);
    CHECK(cascade_copy_crc32c(NULL, NULL, 0, 5) == 5);
    uint8_t bytes[32] = {0}; /* RFC 3720, appendix B.4 */
    CHECK(cascade_crc32c(bytes, sizeof bytes, 0) == 0x8A9136AAu);
    memset(bytes, 0xFF, sizeof bytes);
    CHECK(cascade_crc32c(bytes, sizeof bytes, 0) == 0x62A8AB43u);
    for (uint8_t i = 0; i < 32; i++)
        bytes[i] = i;
    CHECK(cascade_crc32c(bytes, sizeof bytes, 0) == 0x46DD794Eu);
    uint32_t head = cascade_crc32c(source, 1000, 0);
    CHECK(cascade_crc32c(source + 1000, 20000, head) == cascade_crc32c(source, 21000, 0));
}

static void check_bytes_with(const char *path)
{
    static const char *const names[] = {"avx512", "avx2", "sse2", "memcpy"};
    check_crc_vectors();
    for (size_t i = 0; i < COUNT(names); i++) {
        int rc = cascade_copy_select(names[i]);
        if (rc == -ENOTSUP) {
            printf("skip copy %s, checksum %s: not on this CPU\n", names[i], path);
            continue;
        }
        CHECK(rc == 0 && strcmp(cascade_copy_variant(), names[i]) == 0);
        check_copy();
        printf("ok copy %s, checksum %s\n", names[i], path);
    }
}

static void check_bytes(void)
{
    CHECK(cascade_copy_select("mmx") == -EINVAL);
    check_bytes_with("chosen");
    run = run_serial;
    check_bytes_with("table");
#if defined(__x86_64__)
    if (fold_crc != NULL) {
        run = run_fold;
        fold_crc = crc_128;
        fold_copy_crc = copy_crc_128;
        fold_bytes = FOLD_BYTES_128;
        check_bytes_with("128-bit fold");
    }
#endif
}

static void check_memory(void)
{
    size_t n = 64 * PAGE;
    uint8_t *memory = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    memory[PAGE] = 77;
    CHECK(cascade_prefault(memory, n) == 0);
    unsigned char resident[64];
    CHECK(mincore(memory, n, resident) == 0);
    for (size_t i = 0; i < COUNT(resident); i++)
        CHECK(resident[i] & 1);
    CHECK(memory[PAGE] == 77 && memory[0] == 0);
    CHECK(cascade_prefault(memory, 0) == 0);
    CHECK(cascade_prefault(memory + 1, PAGE) == -EINVAL);
    CHECK(munmap(memory, n) == 0);
    CHECK(cascade_prefault(memory, n) == -ENOMEM);
    CHECK(cascade_map_in(memory, n) == -ENOMEM);
    CHECK(cascade_map_in(memory + 1, PAGE) == -EINVAL);
    CHECK(cascade_map_in(memory, 0) == 0);

    int shared_fd = memfd_create("smoke", MFD_CLOEXEC);
    CHECK(shared_fd >= 0 && ftruncate(shared_fd, 4 << 20) == 0);
    void *shared = NULL;
    CHECK(cascade_map_shared(shared_fd, 0, 4 << 20, 2 << 20, 1, &shared) == 0);
    CHECK((uintptr_t)shared % (2 << 20) == 0);
    memset(shared, 5, 4 << 20);
    int collapsed = cascade_collapse(shared, 4 << 20); /* not every kernel can: then the bytes must not care */
    CHECK(collapsed == 0 || collapsed == -EINVAL || collapsed == -ENOMEM || collapsed == -EAGAIN || collapsed == -EBUSY);
    for (size_t i = 0; i < (4 << 20); i += PAGE)
        CHECK(((unsigned char *)shared)[i] == 5);
    CHECK(cascade_unmap(shared, 4 << 20) == 0);
    CHECK(cascade_map_shared(shared_fd, 3 * PAGE, 2 << 20, 2 << 20, 1, &shared) == 0);
    CHECK((uintptr_t)shared % (2 << 20) == 3 * PAGE);
    CHECK(cascade_map_in(shared, 2 << 20) == 0 && ((unsigned char *)shared)[(2 << 20) - 1] == 5);
    CHECK(cascade_unmap(shared, 2 << 20) == 0);
    CHECK(cascade_map_shared(shared_fd, 0, 4 << 20, 3000, 1, &shared) == -EINVAL);
    CHECK(cascade_map_shared(shared_fd, 0, PAGE, (uint64_t)1 << 63, 1, &shared) == -EINVAL);
    close(shared_fd);
    CHECK(cascade_map_shared(-1, 0, PAGE, PAGE, 1, &shared) == -EBADF);

    int event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(event_fd >= 0);
    uint64_t count;
    cascade_notify((void *)(intptr_t)event_fd);
    cascade_notify((void *)(intptr_t)event_fd);
    CHECK(read(event_fd, &count, sizeof count) == sizeof count && count == 2);
    count = UINT64_MAX - 1; /* full: the notify must neither block nor disturb errno */
    CHECK(write(event_fd, &count, sizeof count) == sizeof count);
    errno = 0;
    cascade_notify((void *)(intptr_t)event_fd);
    CHECK(errno == 0);
    CHECK(read(event_fd, &count, sizeof count) == sizeof count);
    struct cascade_dlpack managed;
    CHECK(offsetof(struct cascade_dlpack, shape) == 24 && offsetof(struct cascade_dlpack, deleter) == 56);
    cascade_dlpack_init(&managed, 4096, 77, 2, 3, event_fd);
    CHECK(managed.data == (void *)4096 && managed.ndim == 1 && managed.shape[0] == 77 && managed.device_id == 3);
    CHECK(!cascade_dlpack_released(&managed));
    managed.deleter(&managed);
    CHECK(cascade_dlpack_released(&managed));
    CHECK(read(event_fd, &count, sizeof count) == sizeof count && count == 1);
    close(event_fd);
    printf("ok prefault and notify\n");
}

static void check_ingest(void)
{
    if (!cascade_sha256_available()) {
        printf("skipped ingest: no libcrypto here\n");
        return;
    }
    static const uint8_t abc[32] = {0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde, 0x5d, 0xae, 0x22, 0x23,
                                    0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17, 0x7a, 0x9c, 0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad};
    uint8_t digest[32];
    uint32_t crcs[64];
    memset(target, 9, ROOM);
    CHECK(cascade_ingest_sha256(target, PAGE, "ab", 2, "c", 1, 64, PAGE, crcs, digest) == 0);
    CHECK(memcmp(digest, abc, 32) == 0 && target[0] == 'a' && target[2] == 0 && target[64] == 'c' && target[65] == 0);
    CHECK(crcs[0] == crc_bitwise(target, PAGE, 0));
    size_t key_n = 4097, value_n = 70001, offset = 4160, total = 77824, chunk = 12288;
    CHECK(cascade_ingest_sha256(target, total, source + 1, key_n, source + 3, value_n, offset, chunk, crcs, digest) == 0);
    CHECK(memcmp(target, source + 1, key_n) == 0 && memcmp(target + offset, source + 3, value_n) == 0);
    for (size_t i = 0; i * chunk < total; i++)
        CHECK(crcs[i] == crc_bitwise(target + i * chunk, total - i * chunk < chunk ? total - i * chunk : chunk, 0));
    uint8_t again[32];
    CHECK(cascade_ingest_sha256(target, total, target, key_n, target + offset, value_n, offset, chunk, crcs, again) == 0);
    CHECK(memcmp(digest, again, 32) == 0);
    CHECK(cascade_ingest_sha256(target, PAGE, source, 100, source, 1, 64, PAGE, crcs, digest) == -EINVAL);
    CHECK(cascade_ingest_sha256(target, PAGE, source, 1, source, PAGE, 64, PAGE, crcs, digest) == -EINVAL);
    CHECK(cascade_ingest_sha256(target, PAGE, source, 1, source, 1, 64, 0, crcs, digest) == -EINVAL);
    printf("ok ingest\n");
}

/* ---- directory: one owner evicts and reuses, clients pin and compare every byte ---- */

enum { SLOTS = 8, BUCKETS = 8, CLIENTS = 3, BLOCKS = 12, EXTENT = 512, ROUNDS = 50000 };

static struct {
    _Alignas(64) uint8_t cells[BUCKETS * 64];
    _Alignas(64) uint8_t slots[SLOTS * 256];
    uint32_t counts[CLIENTS][SLOTS];
    _Alignas(8) uint8_t touched[CLIENTS][SLOTS];
    uint64_t touches[CLIENTS];
    uint64_t arena[SLOTS][EXTENT / 8];
    _Atomic int stop;
    _Atomic uint32_t pinned, missed;
} shared;

static const struct cascade_directory directory = {shared.cells, shared.slots, SLOTS, BUCKETS};

static void name_block(uint32_t block, uint8_t *name)
{
    uint64_t words[2] = {block * 0x9E3779B97F4A7C15u, block * 0xC2B2AE3D27D4EB4Fu + 1};
    memcpy(name, words, sizeof words);
}

static void *client(void *argument)
{
    uint32_t number = (uint32_t)(uintptr_t)argument, state = number + 1;
    struct cascade_pins pins = {&shared.touches[number], shared.counts[number], shared.touched[number], SLOTS, 0};
    struct cascade_entry entry;
    uint8_t name[16];
    while (!atomic_load(&shared.stop)) {
        state = state * 1664525u + 1013904223u;
        uint32_t block = (state >> 16) % BLOCKS;
        name_block(block, name);
        int rc = cascade_directory_pin(&directory, &pins, name, &entry);
        if (rc == -ENOENT) {
            atomic_fetch_add(&shared.missed, 1);
            continue;
        }
        CHECK(rc == 0 && memcmp(entry.digest, name, 16) == 0 && entry.offset == (uint64_t)entry.slot * EXTENT);
        for (int look = 0; look < 3; look++) {
            for (uint32_t i = 0; i < EXTENT / 8; i++)
                CHECK(__atomic_load_n(&shared.arena[entry.slot][i], __ATOMIC_RELAXED) == block);
            if (state >> 28 == 0)
                sched_yield(); /* the owner gets to meet a pin, also on one core */
        }
        CHECK(cascade_pins_drop(&pins, entry.slot) == 0);
        atomic_fetch_add(&shared.pinned, 1);
    }
    return NULL;
}

static void check_directory(void)
{
    pthread_t threads[CLIENTS];
    uint32_t *tables[CLIENTS], block_of[SLOTS], slot_of[BLOCKS], state = 99, vetoes = 0, reused = 0, next;
    for (uint32_t c = 0; c < CLIENTS; c++)
        tables[c] = shared.counts[c];
    memset(slot_of, 0xff, sizeof slot_of);
    memset(block_of, 0xff, sizeof block_of);
    for (uint32_t c = 0; c < CLIENTS; c++)
        CHECK(pthread_create(&threads[c], NULL, client, (void *)(uintptr_t)c) == 0);
    for (uint32_t round = 0; round < ROUNDS || ((shared.pinned < 1000 || vetoes < 10) && round < 100 * ROUNDS); round++) {
        state = state * 1664525u + 1013904223u;
        uint32_t slot = (state >> 16) % SLOTS, block = (state >> 8) % BLOCKS;
        if (block_of[slot] != UINT32_MAX) {
            int withdrawn = round % 4 == 0 ? cascade_directory_retire(&directory, slot, tables, CLIENTS)
                                           : cascade_directory_withdraw(&directory, slot, tables, CLIENTS);
            if (round % 4 == 0)
                while (!withdrawn) {
                    sched_yield();
                    withdrawn = cascade_directory_retire(&directory, slot, tables, CLIENTS);
                }
            if (!withdrawn) {
                vetoes++;
                continue;
            }
            slot_of[block_of[slot]] = UINT32_MAX;
            block_of[slot] = UINT32_MAX;
        }
        if (slot_of[block] != UINT32_MAX)
            continue;
        for (uint32_t i = 0; i < EXTENT / 8; i++)
            __atomic_store_n(&shared.arena[slot][i], block, __ATOMIC_RELAXED);
        struct cascade_entry entry = {.slot = slot, .offset = (uint64_t)slot * EXTENT, .key_bytes = EXTENT};
        name_block(block, entry.digest);
        int rc = cascade_directory_publish(&directory, &entry, CASCADE_SLOT_SEALED);
        CHECK(rc == 0 || rc == -ENOSPC);
        if (rc == 0) {
            block_of[slot] = block;
            slot_of[block] = slot;
            reused++;
        }
    }
    atomic_store(&shared.stop, 1);
    for (uint32_t c = 0; c < CLIENTS; c++)
        CHECK(pthread_join(threads[c], NULL) == 0);
    CHECK(reused > 1000 && shared.pinned > 0 && vetoes > 0);

    struct cascade_pins pins = {&shared.touches[0], shared.counts[0], shared.touched[0], SLOTS, 0};
    uint32_t found[SLOTS];
    CHECK(cascade_pins_held(&pins, 0, found, SLOTS, &next) == 0 && next == SLOTS); /* all were given back */
    CHECK(cascade_pins_drop(&pins, 3) == -EINVAL && shared.counts[0][3] == 0);
    CHECK(cascade_pins_add(&pins, SLOTS) == -EINVAL && cascade_pins_drop(&pins, SLOTS) == -EINVAL);
    CHECK(cascade_pins_add(&pins, 3) == 0 && cascade_pins_held(&pins, 0, found, SLOTS, &next) == 1 && found[0] == 3);
    CHECK(cascade_pins_drop(&pins, 3) == 0);
    cascade_pins_harvest(&pins, 0, found, SLOTS, &next);
    CHECK(cascade_pins_harvest(&pins, 0, found, SLOTS, &next) == 0);
    struct cascade_entry entry;
    CHECK(cascade_directory_inspect(&directory, SLOTS, &entry) == -EINVAL);
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if (block_of[slot] != UINT32_MAX) {
            CHECK(cascade_directory_inspect(&directory, slot, &entry) == CASCADE_SLOT_SEALED);
            shared.slots[slot * 256 + 8] ^= 1; /* one bit of an offset */
            CHECK(cascade_directory_inspect(&directory, slot, &entry) == -EBADMSG);
        }
    printf("ok directory: %u blocks, %u pins, %u misses, %u evictions refused\n", reused, shared.pinned, shared.missed, vetoes);
}

/* Submit one operation, wait for its completion, return its result. */
static int32_t complete(cascade_ring *ring, struct cascade_op op)
{
    struct cascade_completion completion;
    op.user_data = 42;
    CHECK(cascade_ring_submit(ring, &op, 1) == 1);
    CHECK(cascade_ring_wait(ring, 10000) == 0);
    CHECK(cascade_ring_reap(ring, &completion, 1) == 1 && completion.user_data == 42);
    return completion.result;
}

static void check_ring_files(cascade_ring *ring)
{
    char path[] = "/tmp/cascade_smoke_XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0 && unlink(path) == 0);
    uint64_t from = (uint64_t)(uintptr_t)source, to = (uint64_t)(uintptr_t)target;

    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_WRITE, .fd = fd, .addr = from, .length = 8 * PAGE}) == 8 * PAGE);
    memset(target, 0, ROOM);
    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_READ, .fd = fd, .addr = to, .length = 4 * PAGE, .offset = PAGE}) == 4 * PAGE);
    CHECK(memcmp(target, source + PAGE, 4 * PAGE) == 0);
    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_FDATASYNC, .fd = fd}) == 0);

    struct iovec parts[2] = {{source + PAGE, PAGE}, {source, 100}};
    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_WRITEV, .fd = fd, .addr = (uint64_t)(uintptr_t)parts, .length = 2}) == PAGE + 100);
    parts[0] = (struct iovec){target, 100};
    parts[1] = (struct iovec){target + PAGE, PAGE};
    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_READV, .fd = fd, .addr = (uint64_t)(uintptr_t)parts, .length = 2}) == PAGE + 100);
    CHECK(memcmp(target, source + PAGE, 100) == 0 && memcmp(target + 2 * PAGE - 100, source, 100) == 0);

    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_READ, .fd = -1, .addr = to, .length = PAGE}) == -EBADF);
    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_READ, .fd = fd, .addr = to, .length = PAGE, .offset = 1 << 20}) == 0);

    if (cascade_ring_features(ring) & CASCADE_FEATURE_REGISTER_SPARSE) {
        int rc = cascade_ring_register_buffer_table(ring, 4);
        if (rc == -ENOMEM) {
            printf("skip fixed buffers: memlock limit\n");
        } else {
            CHECK(rc == 0);
            CHECK(cascade_ring_register_buffer(ring, 1, target, (1ull << 30) + 1) == -EINVAL);
            CHECK(cascade_ring_register_buffer(ring, 9, target, PAGE) == -EINVAL);
            CHECK(cascade_ring_register_buffer(ring, 1, target, ROOM) == 0);
            memset(target, 0, ROOM);
            struct cascade_op fixed = {.opcode = CASCADE_OP_READ_FIXED, .fd = fd, .addr = to + PAGE, .length = PAGE, .buffer_index = 1};
            CHECK(complete(ring, fixed) == PAGE && memcmp(target + PAGE, source + PAGE, PAGE) == 0);
            fixed.opcode = CASCADE_OP_WRITE_FIXED;
            fixed.offset = 16 * PAGE;
            CHECK(complete(ring, fixed) == PAGE);
            fixed.addr = to + ROOM;
            CHECK(complete(ring, fixed) == -EFAULT); /* outside of the registered buffer */
            CHECK(cascade_ring_unregister_buffers(ring) == 0);
            CHECK(cascade_ring_unregister_buffers(ring) == -ENXIO);
        }
        CHECK(cascade_ring_register_file_table(ring, 4) == 0);
        CHECK(cascade_ring_register_file(ring, 2, fd) == 0);
        struct cascade_op indexed = {.opcode = CASCADE_OP_READ, .flags = CASCADE_OPF_FIXED_FILE, .fd = 2, .addr = to, .length = 64};
        CHECK(complete(ring, indexed) == 64);
        CHECK(cascade_ring_register_file(ring, 2, -1) == 0);
        CHECK(complete(ring, indexed) == -EBADF);
    }
    close(fd);
    printf("ok ring: files\n");
}

static void check_ring_limits(cascade_ring *ring, uint32_t entries)
{
    struct cascade_op ops[32] = {0};
    struct cascade_completion done[32];
    uint32_t seen = 0;
    for (uint32_t i = 0; i < COUNT(ops); i++)
        ops[i].user_data = 1 + i;
    CHECK(cascade_ring_submit(ring, ops, COUNT(ops)) == (int)entries); /* a full queue takes what fits */
    CHECK(cascade_ring_wait(ring, 10000) == 0);
    CHECK(cascade_ring_reap(ring, done, COUNT(done)) == (int)entries);
    for (uint32_t i = 0; i < entries; i++)
        seen |= 1u << (done[i].user_data - 1);
    CHECK(seen == (1u << entries) - 1);
    CHECK(cascade_ring_wait(ring, 1) == -ETIME && cascade_ring_reap(ring, done, 1) == 0);

    ops[1].opcode = 99; /* one malformed operation: none is taken */
    CHECK(cascade_ring_submit(ring, ops, 2) == -EINVAL);
    ops[1].opcode = CASCADE_OP_NOP;
    ops[1].reserved = 1;
    CHECK(cascade_ring_submit(ring, ops, 2) == -EINVAL);
    ops[1].reserved = 0;
    ops[1].flags = 2;
    CHECK(cascade_ring_submit(ring, ops, 2) == -EINVAL);
    CHECK(cascade_ring_reap(ring, done, 1) == 0);

    /* More completions than the completion queue holds: none is lost. */
    uint32_t submitted = 0, reaped = 0;
    ops[1].flags = 0;
    while (submitted < 40 * entries) {
        int rc = cascade_ring_submit(ring, ops, entries);
        CHECK(rc == (int)entries || rc == -EBUSY);
        if (rc == -EBUSY) /* older kernels want the overflow reaped first */
            break;
        submitted += (uint32_t)rc;
    }
    for (int rc = 1; rc > 0; reaped += (uint32_t)rc)
        rc = cascade_ring_reap(ring, done, COUNT(done));
    CHECK(reaped == submitted);
    printf("ok ring: limits\n");
}

static void check_ring_cancel(cascade_ring *ring, int event_fd)
{
    int ends[2];
    uint64_t count;
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    while (read(event_fd, &count, sizeof count) > 0)
        ;
    struct cascade_op ops[2] = {
        {.user_data = 1, .opcode = CASCADE_OP_READ, .fd = ends[0], .addr = (uint64_t)(uintptr_t)target, .length = 1, .offset = UINT64_MAX},
        {.user_data = 2, .opcode = CASCADE_OP_CANCEL, .addr = 1},
    };
    CHECK(cascade_ring_submit(ring, ops, 1) == 1);
    CHECK(cascade_ring_wait(ring, 1) == -ETIME); /* the pipe is empty */
    CHECK(cascade_ring_submit(ring, ops + 1, 1) == 1);
    int32_t results[3] = {0};
    for (int reaped = 0; reaped < 2;) {
        struct cascade_completion done[2];
        CHECK(cascade_ring_wait(ring, 10000) == 0);
        int rc = cascade_ring_reap(ring, done, COUNT(done));
        for (int i = 0; i < rc; i++)
            results[done[i].user_data] = done[i].result;
        reaped += rc;
    }
    CHECK(results[1] == -ECANCELED && results[2] == 0);
    struct pollfd readable = {.fd = event_fd, .events = POLLIN};
    CHECK(poll(&readable, 1, 10000) == 1); /* completions raised the eventfd */
    CHECK(complete(ring, (struct cascade_op){.opcode = CASCADE_OP_CANCEL, .addr = 1}) == -ENOENT);
    close(ends[0]);
    close(ends[1]);
    printf("ok ring: cancel and eventfd\n");
}

static void check_ring(void)
{
    cascade_ring *ring;
    enum { ENTRIES = 8 };
    CHECK(cascade_uring_version() >= 203);
    cascade_ring_close(NULL);
    CHECK(cascade_ring_open(0, 0, &ring) == -EINVAL && ring == NULL);
    CHECK(cascade_ring_open(1u << 20, 0, &ring) == -EINVAL && ring == NULL);
    int event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(event_fd >= 0);
    int rc = cascade_ring_open(ENTRIES, event_fd, &ring);
    if (rc < 0) {
        printf("skip ring: io_uring cannot be opened: %s\n", strerror(-rc));
        close(event_fd);
        return;
    }
    cascade_ring *other;
    CHECK(cascade_ring_open(ENTRIES, -1, &other) < 0 && other == NULL);
    check_ring_files(ring);
    check_ring_limits(ring, ENTRIES);
    check_ring_cancel(ring, event_fd);
    cascade_ring_close(ring);
    close(event_fd);
}

int main(void)
{
    fill();
    check_bytes();
    check_memory();
    check_ingest();
    check_directory();
    check_ring();
    free(source);
    free(target);
    free(wanted);
    return 0;
}

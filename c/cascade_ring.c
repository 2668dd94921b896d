/* cascade_ring.c: submission and completion on top of liburing. No policy, no allocation but the ring.
 *
 * Threads: one thread (the event loop's) submits, reaps and waits. Registration may come from any
 * other thread at the same time: it touches neither queue, only the kernel's tables. That is why
 * IORING_SETUP_SINGLE_ISSUER, and DEFER_TASKRUN which needs it, are not used: with them the kernel
 * refuses registration from a second thread (-EEXIST). COOP_TASKRUN is safe: completion work still
 * wakes the loop thread out of epoll_wait, and a running loop meets it in its next system call, one
 * turn later at most; in exchange running Python code is not interrupted per completion.
 */
#include "cascade.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#if defined(__has_include)
#if __has_include(<liburing/io_uring_version.h>)
#include <liburing/io_uring_version.h>
#endif
#endif

/* Completion slots per submission slot: requests outlive their submission slot, so the completion
 * queue, not the submission queue, must hold what is in flight. Beyond it the kernel's overflow list
 * (NODROP) still loses nothing, it only costs a system call. */
#define CQ_PER_SQ 4u
#define ENTRIES_MAX 32768u            /* the kernel's own limit; CLAMP would shrink silently */
#define REAP_CHUNK 64u                /* completions taken per pass, on the stack */
#define FIXED_BUFFER_MAX (1ull << 30) /* the kernel pins no larger iovec */

_Static_assert(sizeof(struct cascade_op) == 40, "the Python struct format depends on it");
_Static_assert(sizeof(struct cascade_completion) == 16, "the Python struct format depends on it");

struct cascade_ring {
    struct io_uring uring;
    uint32_t features;
};

static const uint8_t kernel_opcode[] = {
    [CASCADE_OP_NOP] = IORING_OP_NOP,
    [CASCADE_OP_READ] = IORING_OP_READ,
    [CASCADE_OP_WRITE] = IORING_OP_WRITE,
    [CASCADE_OP_READV] = IORING_OP_READV,
    [CASCADE_OP_WRITEV] = IORING_OP_WRITEV,
    [CASCADE_OP_READ_FIXED] = IORING_OP_READ_FIXED,
    [CASCADE_OP_WRITE_FIXED] = IORING_OP_WRITE_FIXED,
    [CASCADE_OP_FDATASYNC] = IORING_OP_FSYNC,
    [CASCADE_OP_CANCEL] = IORING_OP_ASYNC_CANCEL,
};
#define OPCODES (sizeof kernel_opcode / sizeof kernel_opcode[0])

static int setup(uint32_t entries, struct io_uring *uring)
{
    /* SUBMIT_ALL: one refused request completes with its error and does not hold back the rest. */
    unsigned wanted = IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    for (;;) {
        struct io_uring_params params;
        memset(&params, 0, sizeof params);
        params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | wanted;
        params.cq_entries = entries * CQ_PER_SQ;
        int rc = io_uring_queue_init_params(entries, uring, &params);
        if (rc != -EINVAL || wanted == 0)
            return rc;
        wanted = 0; /* kernel < 5.19 */
    }
}

static int probe_features(struct cascade_ring *ring)
{
    struct io_uring_probe *probe = io_uring_get_probe_ring(&ring->uring);
    if (probe == NULL)
        return -ENOTSUP;
    int rc = 0;
    for (size_t i = 0; i < OPCODES; i++)
        if (!io_uring_opcode_supported(probe, kernel_opcode[i]))
            rc = -ENOTSUP;
    /* IORING_OP_SOCKET came with the same release (5.19) as sparse tables, which have no probe. */
    if (io_uring_opcode_supported(probe, IORING_OP_SOCKET))
        ring->features |= CASCADE_FEATURE_REGISTER_SPARSE;
    if (ring->uring.features & IORING_FEAT_EXT_ARG)
        ring->features |= CASCADE_FEATURE_EXT_ARG;
    if (ring->uring.features & IORING_FEAT_NODROP)
        ring->features |= CASCADE_FEATURE_NODROP;
    io_uring_free_probe(probe);
    return rc;
}

int cascade_ring_open(uint32_t entries, int event_fd, cascade_ring **out)
{
    *out = NULL;
    if (entries == 0 || entries > ENTRIES_MAX)
        return -EINVAL;
    struct cascade_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        return -ENOMEM;
    int rc = setup(entries, &ring->uring);
    if (rc < 0) {
        free(ring);
        return rc;
    }
    rc = probe_features(ring);
    if (rc == 0)
        rc = io_uring_register_eventfd(&ring->uring, event_fd);
    if (rc < 0) {
        io_uring_queue_exit(&ring->uring);
        free(ring);
        return rc;
    }
    *out = ring;
    return 0;
}

uint32_t cascade_ring_features(const cascade_ring *ring)
{
    return ring->features;
}

static int valid(const struct cascade_op *op)
{
    return op->opcode < OPCODES && (op->flags & ~CASCADE_OPF_FIXED_FILE) == 0 && op->reserved == 0;
}

static void prepare(struct io_uring_sqe *sqe, const struct cascade_op *op)
{
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = kernel_opcode[op->opcode];
    sqe->fd = op->fd;
    sqe->user_data = op->user_data;
    if (op->flags & CASCADE_OPF_FIXED_FILE)
        sqe->flags = IOSQE_FIXED_FILE;
    switch (op->opcode) {
    case CASCADE_OP_NOP:
        break;
    case CASCADE_OP_FDATASYNC:
        sqe->fsync_flags = IORING_FSYNC_DATASYNC; /* offset and length stay 0: the whole file */
        break;
    case CASCADE_OP_CANCEL:
        sqe->fd = -1;
        sqe->addr = op->addr;
        break;
    case CASCADE_OP_READ_FIXED:
    case CASCADE_OP_WRITE_FIXED:
        sqe->buf_index = op->buffer_index;
        /* fall through */
    default:
        sqe->addr = op->addr;
        sqe->len = op->length;
        sqe->off = op->offset;
    }
}

/* Take back what the kernel did not consume, so that an untaken request never runs behind the
 * caller's back. Without SQPOLL the kernel reads the queue only inside io_uring_enter. */
static void drop_unsubmitted(struct io_uring_sq *sq)
{
    unsigned head = io_uring_smp_load_acquire(sq->khead);
    sq->sqe_head = sq->sqe_tail = head;
    io_uring_smp_store_release(sq->ktail, head);
}

int cascade_ring_submit(cascade_ring *ring, const struct cascade_op *ops, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (!valid(&ops[i]))
            return -EINVAL;
    uint32_t queued = 0;
    while (queued < count) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
        if (sqe == NULL)
            break;
        prepare(sqe, &ops[queued++]);
    }
    uint32_t taken = 0;
    int rc = 0;
    /* Without SUBMIT_ALL the kernel stops after a refused request; that one counts as consumed. */
    while (taken < queued) {
        rc = io_uring_submit(&ring->uring);
        if (rc <= 0)
            break;
        taken += (uint32_t)rc;
    }
    if (taken < queued)
        drop_unsubmitted(&ring->uring.sq);
    return taken == 0 && rc < 0 ? rc : (int)taken;
}

int cascade_ring_reap(cascade_ring *ring, struct cascade_completion *out, uint32_t capacity)
{
    uint32_t reaped = 0;
    while (reaped < capacity) {
        struct io_uring_cqe *cqes[REAP_CHUNK];
        uint32_t room = capacity - reaped < REAP_CHUNK ? capacity - reaped : REAP_CHUNK;
        uint32_t ready = io_uring_peek_batch_cqe(&ring->uring, cqes, room);
        if (ready == 0)
            break;
        for (uint32_t i = 0; i < ready; i++)
            out[reaped++] = (struct cascade_completion){cqes[i]->user_data, cqes[i]->res, cqes[i]->flags};
        io_uring_cq_advance(&ring->uring, ready);
    }
    return (int)reaped;
}

int cascade_ring_wait(cascade_ring *ring, uint32_t timeout_ms)
{
    if (io_uring_cq_ready(&ring->uring) > 0)
        return 0;
    /* The ring's own descriptor, not the eventfd: its counter may have been read already. */
    struct pollfd readable = {.fd = ring->uring.ring_fd, .events = POLLIN};
    int rc = poll(&readable, 1, timeout_ms > INT32_MAX ? INT32_MAX : (int)timeout_ms);
    if (rc < 0)
        return -errno;
    return rc == 0 ? -ETIME : 0;
}

int cascade_ring_register_buffer_table(cascade_ring *ring, uint32_t slots)
{
    return io_uring_register_buffers_sparse(&ring->uring, slots);
}

int cascade_ring_register_buffer(cascade_ring *ring, uint32_t slot, void *addr, uint64_t length)
{
    if (length == 0 || length > FIXED_BUFFER_MAX)
        return -EINVAL;
    struct iovec iov = {.iov_base = addr, .iov_len = (size_t)length};
    int rc = io_uring_register_buffers_update_tag(&ring->uring, slot, &iov, NULL, 1);
    return rc < 0 ? rc : 0;
}

int cascade_ring_unregister_buffers(cascade_ring *ring)
{
    return io_uring_unregister_buffers(&ring->uring);
}

int cascade_ring_register_file_table(cascade_ring *ring, uint32_t slots)
{
    return io_uring_register_files_sparse(&ring->uring, slots);
}

int cascade_ring_register_file(cascade_ring *ring, uint32_t slot, int fd)
{
    int rc = io_uring_register_files_update(&ring->uring, slot, &fd, 1);
    return rc < 0 ? rc : 0;
}

void cascade_ring_close(cascade_ring *ring)
{
    if (ring == NULL)
        return;
    /* Closing alone would unpin the buffers later, in kernel worker context; -ENXIO: none are registered. */
    (void)io_uring_unregister_buffers(&ring->uring);
    io_uring_queue_exit(&ring->uring);
    free(ring);
}

int cascade_uring_version(void)
{
#if defined(IO_URING_VERSION_MAJOR)
    return IO_URING_VERSION_MAJOR * 100 + IO_URING_VERSION_MINOR;
#else
    return CASCADE_URING_VERSION;
#endif
}

/* cascade_memory.c: prefault of fresh memory, and what foreign threads call: notify, release of a DLPack tensor. */
#include "cascade.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; older C libraries lack the name */
#endif

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

int cascade_map_shared(int fd, uint64_t offset, uint64_t nbytes, uint64_t alignment, int writable, void **out)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (nbytes == 0 || alignment < page || (alignment & (alignment - 1)) != 0 || nbytes > SIZE_MAX / 2 ||
        alignment > SIZE_MAX / 8 || offset > INT64_MAX)
        return -EINVAL;
    size_t length = (size_t)((nbytes + page - 1) / page * page);
    size_t within = (size_t)(offset & (alignment - 1)); /* a huge page is mapped as one where both are aligned alike */
    size_t reserved = within + length + (size_t)alignment;
    /* Address space first, the file over its aligned part; then the ends go back. */
    uint8_t *base = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return -errno;
    uint8_t *start = (uint8_t *)((((uintptr_t)base + alignment - 1) & ~(uintptr_t)(alignment - 1)) + within);
    int access = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    if (mmap(start, length, access, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED) {
        int saved = errno;
        munmap(base, reserved);
        return -saved;
    }
    if (start > base)
        munmap(base, (size_t)(start - base));
    if (start + length < base + reserved)
        munmap(start + length, (size_t)(base + reserved - start - length));
    /* A core dump of an inference server must not carry gigabytes of other people's prompts. */
    madvise(start, length, MADV_DONTDUMP);
    *out = start;
    return 0;
}

int cascade_unmap(void *addr, uint64_t nbytes)
{
    return munmap(addr, (size_t)nbytes) == 0 ? 0 : -errno;
}

int cascade_collapse(void *addr, size_t n)
{
    int rc;
    do {
        rc = madvise(addr, n, MADV_COLLAPSE);
    } while (rc < 0 && errno == EINTR);
    return rc == 0 ? 0 : -errno;
}

/* 0 or -errno (ENOMEM: not mapped; EFAULT: the file behind it is too short or full); 1: this kernel cannot. */
static int populate(void *addr, size_t n, size_t page, int advice)
{
    if ((uintptr_t)addr % page != 0)
        return -EINVAL;
    int rc;
    do {
        rc = madvise(addr, n, advice);
    } while (rc < 0 && (errno == EINTR || errno == EAGAIN));
    if (rc == 0)
        return 0;
    return errno == EINVAL ? 1 : -errno;
}

int cascade_map_in(const void *addr, size_t n)
{
    if (n == 0)
        return 0;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    int rc = populate((void *)(uintptr_t)addr, n, page, MADV_POPULATE_READ);
    if (rc <= 0)
        return rc;
    for (size_t i = 0; i < n; i += page)
        (void)__atomic_load_n((const uint8_t *)addr + i, __ATOMIC_RELAXED);
    return 0;
}

int cascade_prefault(void *addr, size_t n)
{
    if (n == 0)
        return 0;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    int rc = populate(addr, n, page, MADV_POPULATE_WRITE);
    if (rc <= 0)
        return rc;
    for (size_t i = 0; i < n; i += page) {
        /* A write fault that leaves the byte, whatever others write meanwhile. */
        uint8_t *byte = (uint8_t *)addr + i, old = __atomic_load_n(byte, __ATOMIC_RELAXED);
        __atomic_compare_exchange_n(byte, &old, old, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
    return 0;
}

void cascade_trim_heap(void)
{
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

void cascade_notify(void *event_fd)
{
    /* Saves errno: a host function must not disturb the thread it runs on. A full counter of a
     * non-blocking eventfd (EAGAIN) means the reader has been told already. */
    int saved = errno;
    uint64_t one = 1;
    ssize_t rc;
    do {
        rc = write((int)(intptr_t)event_fd, &one, sizeof one);
    } while (rc < 0 && errno == EINTR);
    errno = saved;
}

void cascade_dlpack_init(struct cascade_dlpack *managed, uint64_t data, int64_t length, int32_t device_type,
                         int32_t device_id, int event_fd)
{
    memset(managed, 0, sizeof *managed);
    managed->data = (void *)(uintptr_t)data;
    managed->device_type = device_type;
    managed->device_id = device_id;
    managed->ndim = 1;
    managed->code = 1; /* kDLUInt */
    managed->bits = 8;
    managed->lanes = 1;
    managed->length = length;
    managed->shape = &managed->length;
    managed->deleter = cascade_dlpack_release;
    managed->event_fd = event_fd;
}

void cascade_dlpack_release(struct cascade_dlpack *managed)
{
    int event_fd = managed->event_fd; /* once it is released, its owner may free it */
    __atomic_store_n(&managed->released, 1, __ATOMIC_RELEASE);
    if (event_fd >= 0)
        cascade_notify((void *)(intptr_t)event_fd);
}

int cascade_dlpack_released(struct cascade_dlpack *managed)
{
    return __atomic_load_n(&managed->released, __ATOMIC_ACQUIRE);
}

/* cascade_memory.c: prefault of fresh memory, and the notify that foreign threads call. */
#include "cascade.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; older C libraries lack the name */
#endif

int cascade_prefault(void *addr, size_t n)
{
    if (n == 0)
        return 0;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if ((uintptr_t)addr % page != 0)
        return -EINVAL;
    int rc;
    do {
        rc = madvise(addr, n, MADV_POPULATE_WRITE);
    } while (rc < 0 && (errno == EINTR || errno == EAGAIN));
    if (rc == 0)
        return 0;
    if (errno != EINVAL)
        return -errno; /* ENOMEM: not mapped; EFAULT: the file behind it is too short or full */
    for (size_t i = 0; i < n; i += page) {
        volatile uint8_t *byte = (volatile uint8_t *)addr + i;
        *byte = *byte; /* a write fault, the byte stays */
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

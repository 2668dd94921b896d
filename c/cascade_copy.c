/* cascade_copy.c: streaming copy with non-temporal stores, the variant chosen once per process.
 *
 * Non-temporal stores do not read the destination's lines first and do not evict the caller's
 * working set: a block is far larger than the caches and is not read back by this core.
 */
#include "cascade_bytes.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#define LINE_BYTES 64u
#define PREFETCH_BYTES 512u /* distance of the software prefetch; measured, flat between 256 and 1024 */

struct variant {
    const char *name;
    bool (*supported)(void);
    void (*lines)(uint8_t *dst, const uint8_t *src, size_t lines); /* dst is LINE_BYTES-aligned */
};

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f"))) static void lines_avx512(uint8_t *dst, const uint8_t *src, size_t lines)
{
    for (; lines; lines--, dst += LINE_BYTES, src += LINE_BYTES) {
        _mm_prefetch((const char *)src + PREFETCH_BYTES, _MM_HINT_T0);
        _mm512_stream_si512((__m512i *)dst, _mm512_loadu_si512(src));
    }
    _mm_sfence();
}

__attribute__((target("avx2"))) static void lines_avx2(uint8_t *dst, const uint8_t *src, size_t lines)
{
    for (; lines; lines--, dst += LINE_BYTES, src += LINE_BYTES) {
        _mm_prefetch((const char *)src + PREFETCH_BYTES, _MM_HINT_T0);
        __m256i low = _mm256_loadu_si256((const __m256i *)src);
        __m256i high = _mm256_loadu_si256((const __m256i *)src + 1);
        _mm256_stream_si256((__m256i *)dst, low);
        _mm256_stream_si256((__m256i *)dst + 1, high);
    }
    _mm_sfence();
}

static void lines_sse2(uint8_t *dst, const uint8_t *src, size_t lines)
{
    for (; lines; lines--, dst += LINE_BYTES, src += LINE_BYTES) {
        _mm_prefetch((const char *)src + PREFETCH_BYTES, _MM_HINT_T0);
        for (int i = 0; i < 4; i++)
            _mm_stream_si128((__m128i *)dst + i, _mm_loadu_si128((const __m128i *)src + i));
    }
    _mm_sfence();
}

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f");
}
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}
static bool has_sse2(void)
{
    return true; /* part of x86-64 */
}
#endif

static bool has_memcpy(void)
{
    return true;
}

static void lines_memcpy(uint8_t *dst, const uint8_t *src, size_t lines)
{
    memcpy(dst, src, lines * LINE_BYTES);
}

static const struct variant variants[] = { /* best first */
#if defined(__x86_64__)
    {"avx512", has_avx512, lines_avx512},
    {"avx2", has_avx2, lines_avx2},
    {"sse2", has_sse2, lines_sse2},
#endif
    {"memcpy", has_memcpy, lines_memcpy},
};
#define VARIANTS (sizeof variants / sizeof variants[0])

static const struct variant *_Atomic chosen = &variants[VARIANTS - 1];

__attribute__((constructor)) static void choose(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    size_t i = 0;
    while (!variants[i].supported())
        i++;
    atomic_store_explicit(&chosen, &variants[i], memory_order_relaxed);
}

static const struct variant *current(void)
{
    return atomic_load_explicit(&chosen, memory_order_relaxed);
}

const char *cascade_copy_variant(void)
{
    return current()->name;
}

int cascade_copy_select(const char *name)
{
    static const char *const known[] = {"avx512", "avx2", "sse2", "memcpy"};
    for (size_t i = 0; i < VARIANTS; i++) {
        if (strcmp(name, variants[i].name) != 0)
            continue;
        if (!variants[i].supported())
            return -ENOTSUP;
        atomic_store_explicit(&chosen, &variants[i], memory_order_relaxed);
        return 0;
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(name, known[i]) == 0)
            return -ENOTSUP; /* of another architecture */
    return -EINVAL;
}

bool cascade_copy_streams(size_t n)
{
    return n >= CASCADE_STREAM_MIN_BYTES && current()->lines != lines_memcpy;
}

void cascade_copy(void *dst, const void *src, size_t n)
{
    if (n == 0)
        return;
    if (!cascade_copy_streams(n)) {
        memcpy(dst, src, n);
        return;
    }
    uint8_t *to = dst;
    const uint8_t *from = src;
    size_t head = -(uintptr_t)to % LINE_BYTES;
    memcpy(to, from, head);
    size_t lines = (n - head) / LINE_BYTES;
    current()->lines(to + head, from + head, lines);
    size_t done = head + lines * LINE_BYTES;
    memcpy(to + done, from + done, n - done);
}

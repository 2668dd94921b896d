/* cascade_crc.c: CRC-32C (Castagnoli), alone and fused with the streaming copy.
 *
 * The fast path folds: a CRC is the message, as a polynomial over GF(2), modulo P. A register of
 * message bits that lie D bits ahead of the next ones may be replaced by its product with x^D mod P
 * added to them (carry-less multiply, exclusive or). Several registers walk side by side; at the
 * end they hold a short message with the same remainder, which the crc32 instruction finishes.
 * The bytes pass through registers anyway, so the fused copy stores them from there: each byte is
 * loaded once. Method: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
 * Instruction", Intel, 2009. Constants are computed at load, not typed in.
 *
 * "raw" is a CRC without the initial and final inversion. Bits are reflected: bit 31 of a raw
 * CRC is the coefficient of x^0, bit 0 that of x^31.
 */
#include "cascade_bytes.h"

#include <string.h>

#define POLYNOMIAL 0x82F63B78u /* x^32 is implied */
#define LINE_BYTES 64u
#define PIECE_BYTES (16u << 10) /* stays in the L1 cache between copy and sum */
#define PREFETCH_BYTES 512u

typedef uint32_t (*run_function)(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw);

#if defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>

static void build_tables(void)
{
}

static uint32_t crc_serial(const uint8_t *src, size_t n, uint32_t raw)
{
    for (; n >= 8; n -= 8, src += 8) {
        uint64_t word;
        memcpy(&word, src, 8);
        raw = __crc32cd(raw, word);
    }
    for (; n; n--, src++)
        raw = __crc32cb(raw, *src);
    return raw;
}
#else
static uint32_t tables[8][256]; /* tables[k][b]: byte b followed by k zero bytes */

static void build_tables(void)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t raw = b;
        for (int bit = 0; bit < 8; bit++)
            raw = (raw >> 1) ^ (POLYNOMIAL & -(raw & 1u));
        tables[0][b] = raw;
    }
    for (uint32_t b = 0; b < 256; b++)
        for (int k = 1; k < 8; k++)
            tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFF];
}

/* Eight bytes per step by eight table look-ups; any CPU, any byte order. */
static uint32_t crc_serial(const uint8_t *src, size_t n, uint32_t raw)
{
    for (; n >= 8; n -= 8, src += 8) {
        raw ^= (uint32_t)src[0] | (uint32_t)src[1] << 8 | (uint32_t)src[2] << 16 | (uint32_t)src[3] << 24;
        raw = tables[7][raw & 0xFF] ^ tables[6][(raw >> 8) & 0xFF] ^ tables[5][(raw >> 16) & 0xFF] ^
              tables[4][raw >> 24] ^ tables[3][src[4]] ^ tables[2][src[5]] ^ tables[1][src[6]] ^ tables[0][src[7]];
    }
    for (; n; n--, src++)
        raw = (raw >> 8) ^ tables[0][(raw ^ *src) & 0xFF];
    return raw;
}
#endif

static uint32_t run_serial(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw);
static run_function run = run_serial;

/* Copy a piece, then sum it while it is in the cache. */
static uint32_t run_pieces(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    while (n) {
        size_t piece = n < PIECE_BYTES ? n : PIECE_BYTES;
        memcpy(dst, src, piece);
        raw = run(NULL, src, piece, raw);
        dst += piece, src += piece, n -= piece;
    }
    return raw;
}

static uint32_t run_serial(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    return dst == NULL ? crc_serial(src, n, raw) : run_pieces(dst, src, n, raw);
}

#if defined(__x86_64__)
#include <immintrin.h>

#define FOLD_BYTES_128 128u /* eight registers of 16 bytes */
#define FOLD_BYTES_512 256u /* four registers of 64 bytes */
#if defined(__clang__)
#define TARGETS "crc32,sse4.2,pclmul" /* clang counts the crc32 instruction apart; older gcc does not know the name */
#else
#define TARGETS "sse4.2,pclmul"
#endif
#define TARGET_128 __attribute__((target(TARGETS)))
#define TARGET_512 __attribute__((target(TARGETS ",avx512f,vpclmulqdq")))

/* Multipliers that carry a 128-bit register over a distance: for its low and its high half. */
static uint64_t fold_128[2], fold_512[2];

/* x^exponent mod P as the 64-bit operand of a carry-less multiply. */
static uint64_t power_of_x(uint32_t exponent)
{
    uint32_t raw = 1u << 31;
    while (exponent--)
        raw = (raw >> 1) ^ (POLYNOMIAL & -(raw & 1u));
    return (uint64_t)raw << 32;
}

/* The low half holds the higher powers, 64 bits further ahead. The -1: the product of two reflected
 * operands comes out multiplied by x once more. */
static void build_fold(uint64_t fold[2], uint32_t distance_bytes)
{
    fold[0] = power_of_x(8 * distance_bytes + 64 - 1);
    fold[1] = power_of_x(8 * distance_bytes - 1);
}

TARGET_128 static uint32_t crc_sse42(const uint8_t *src, size_t n, uint32_t raw)
{
    uint64_t wide = raw;
    for (; n >= 8; n -= 8, src += 8) {
        uint64_t word;
        memcpy(&word, src, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    raw = (uint32_t)wide;
    for (; n; n--, src++)
        raw = _mm_crc32_u8(raw, *src);
    return raw;
}

/* Whole folds only (n is a positive multiple of FOLD_BYTES_128); dst is 16-byte aligned or NULL. */
TARGET_128 static inline __attribute__((always_inline)) uint32_t
fold_run_128(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw, const bool store)
{
    enum { REGISTERS = FOLD_BYTES_128 / 16 };
    const __m128i by = _mm_set_epi64x((long long)fold_128[1], (long long)fold_128[0]);
    __m128i sum[REGISTERS];
    for (int i = 0; i < REGISTERS; i++)
        sum[i] = _mm_setzero_si128();
    /* Folding zeros gives zeros: the first pass needs no case of its own; the CRC so far joins there. */
    __m128i begin = _mm_cvtsi32_si128((int)raw);
    for (; n; n -= FOLD_BYTES_128, src += FOLD_BYTES_128) {
        for (int i = 0; i < REGISTERS; i++) {
            __m128i data = _mm_loadu_si128((const __m128i *)src + i);
            if (store)
                _mm_stream_si128((__m128i *)dst + i, data);
            __m128i carried = _mm_xor_si128(_mm_clmulepi64_si128(sum[i], by, 0x00), _mm_clmulepi64_si128(sum[i], by, 0x11));
            sum[i] = _mm_xor_si128(carried, data);
        }
        sum[0] = _mm_xor_si128(sum[0], begin);
        begin = _mm_setzero_si128();
        if (store)
            dst += FOLD_BYTES_128;
    }
    uint8_t rest[FOLD_BYTES_128];
    for (int i = 0; i < REGISTERS; i++)
        _mm_storeu_si128((__m128i *)rest + i, sum[i]);
    return crc_sse42(rest, sizeof rest, 0);
}

/* The same with 512-bit registers; dst is 64-byte aligned or NULL. */
TARGET_512 static inline __attribute__((always_inline)) uint32_t
fold_run_512(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw, const bool store)
{
    enum { REGISTERS = FOLD_BYTES_512 / 64, XOR3 = 0x96 };
    const __m512i by = _mm512_broadcast_i32x4(_mm_set_epi64x((long long)fold_512[1], (long long)fold_512[0]));
    __m512i sum[REGISTERS];
    for (int i = 0; i < REGISTERS; i++)
        sum[i] = _mm512_setzero_si512();
    __m512i begin = _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)raw));
    for (; n; n -= FOLD_BYTES_512, src += FOLD_BYTES_512) {
        for (int i = 0; i < REGISTERS; i++) {
            __m512i data = _mm512_loadu_si512((const __m512i *)src + i);
            if (store) { /* prefetch: measured, it helps beside streaming stores and hurts without them */
                _mm_prefetch((const char *)src + PREFETCH_BYTES + 64 * i, _MM_HINT_T0);
                _mm512_stream_si512((__m512i *)dst + i, data);
            }
            sum[i] = _mm512_ternarylogic_epi64(
                _mm512_clmulepi64_epi128(sum[i], by, 0x00), _mm512_clmulepi64_epi128(sum[i], by, 0x11), data, XOR3);
        }
        sum[0] = _mm512_xor_si512(sum[0], begin);
        begin = _mm512_setzero_si512();
        if (store)
            dst += FOLD_BYTES_512;
    }
    uint8_t rest[FOLD_BYTES_512];
    for (int i = 0; i < REGISTERS; i++)
        _mm512_storeu_si512((__m512i *)rest + i, sum[i]);
    return crc_sse42(rest, sizeof rest, 0);
}

TARGET_128 static uint32_t crc_128(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    (void)dst;
    return fold_run_128(NULL, src, n, raw, false);
}
TARGET_128 static uint32_t copy_crc_128(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    return fold_run_128(dst, src, n, raw, true);
}
TARGET_512 static uint32_t crc_512(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    (void)dst;
    return fold_run_512(NULL, src, n, raw, false);
}
TARGET_512 static uint32_t copy_crc_512(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    return fold_run_512(dst, src, n, raw, true);
}

static run_function fold_crc, fold_copy_crc; /* NULL: this CPU cannot fold */
static size_t fold_bytes;

static uint32_t run_fold(uint8_t *dst, const uint8_t *src, size_t n, uint32_t raw)
{
    if (dst == NULL) {
        size_t folded = n / fold_bytes * fold_bytes;
        if (folded)
            raw = fold_crc(NULL, src, folded, raw);
        return crc_sse42(src + folded, n - folded, raw);
    }
    if (!cascade_copy_streams(n))
        return run_pieces(dst, src, n, raw);
    /* n is many folds long here. */
    size_t head = -(uintptr_t)dst % LINE_BYTES;
    memcpy(dst, src, head);
    raw = crc_sse42(src, head, raw);
    size_t folded = (n - head) / fold_bytes * fold_bytes;
    raw = fold_copy_crc(dst + head, src + head, folded, raw);
    _mm_sfence();
    size_t done = head + folded;
    memcpy(dst + done, src + done, n - done);
    return crc_sse42(src + done, n - done, raw);
}
#endif

__attribute__((constructor)) static void choose(void)
{
    build_tables();
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("pclmul"))
        return;
    build_fold(fold_128, FOLD_BYTES_128);
    build_fold(fold_512, FOLD_BYTES_512);
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
    fold_crc = wide ? crc_512 : crc_128;
    fold_copy_crc = wide ? copy_crc_512 : copy_crc_128;
    fold_bytes = wide ? FOLD_BYTES_512 : FOLD_BYTES_128;
    run = run_fold;
#endif
}

uint32_t cascade_crc32c(const void *src, size_t n, uint32_t crc)
{
    return ~run(NULL, src, n, ~crc);
}

uint32_t cascade_copy_crc32c(void *dst, const void *src, size_t n, uint32_t crc)
{
    if (n == 0)
        return crc;
    return ~run(dst, src, n, ~crc);
}

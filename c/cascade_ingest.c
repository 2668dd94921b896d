/* cascade_ingest.c: a block into an extent in one call: SHA-256, copy, CRC-32C per chunk.
 *
 * Why in C: done piece by piece from Python, every piece takes the GIL twice, and an event loop and
 * its workers then spend more time handing the GIL over than the bytes cost. SHA-256 is OpenSSL's,
 * found at run time in the library that Python's own hashlib uses; where there is none, Python does
 * the same with hashlib.
 */
#include "cascade.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

/* Hashed, then copied out of the second-level cache. */
#define PIECE_BYTES ((size_t)256 << 10)
#define SHA256_BYTES 32

static struct {
    void *(*ctx_new)(void);
    void (*ctx_free)(void *);
    const void *(*sha256)(void);
    int (*init)(void *, const void *, void *);
    int (*update)(void *, const void *, size_t);
    int (*final)(void *, unsigned char *, unsigned int *);
} evp;
static int evp_found;
static pthread_once_t evp_once = PTHREAD_ONCE_INIT;

static int find(void *library, const char *name, void *function)
{
    /* ISO C has no conversion from an object to a function pointer; POSIX promises the representation. */
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static void find_evp(void)
{
    static const char *const names[] = {"libcrypto.so.3", "libcrypto.so.1.1"};
    for (size_t i = 0; i < sizeof names / sizeof *names && !evp_found; i++) {
        void *library = dlopen(names[i], RTLD_LAZY | RTLD_LOCAL);
        if (library == NULL)
            continue;
        evp_found = find(library, "EVP_MD_CTX_new", &evp.ctx_new) && find(library, "EVP_MD_CTX_free", &evp.ctx_free) &&
                    find(library, "EVP_sha256", &evp.sha256) && find(library, "EVP_DigestInit_ex", &evp.init) &&
                    find(library, "EVP_DigestUpdate", &evp.update) && find(library, "EVP_DigestFinal_ex", &evp.final);
        if (!evp_found)
            dlclose(library);
    }
}

int cascade_sha256_available(void)
{
    pthread_once(&evp_once, find_evp);
    return evp_found;
}

struct progress {
    uint8_t *payload;
    size_t at;
    size_t chunk_bytes;
    uint32_t crc;
    uint32_t *crcs;
};

/* The next n bytes of the payload are there and have been added to crc. */
static void advance(struct progress *to, size_t n)
{
    to->at += n;
    if (to->at % to->chunk_bytes == 0) {
        *to->crcs++ = to->crc;
        to->crc = 0;
    }
}

static size_t piece_of(const struct progress *to, size_t left)
{
    size_t room = to->chunk_bytes - to->at % to->chunk_bytes;
    if (room > PIECE_BYTES)
        room = PIECE_BYTES;
    return left < room ? left : room;
}

static int take(struct progress *to, void *ctx, const uint8_t *source, size_t n)
{
    while (n > 0) {
        size_t piece = piece_of(to, n);
        uint8_t *target = to->payload + to->at;
        if (evp.update(ctx, source, piece) != 1)
            return -EIO;
        to->crc = source == target ? cascade_crc32c(source, piece, to->crc)
                                   : cascade_copy_crc32c(target, source, piece, to->crc);
        advance(to, piece);
        source += piece;
        n -= piece;
    }
    return 0;
}

static void zero_until(struct progress *to, size_t end)
{
    while (to->at < end) {
        size_t piece = piece_of(to, end - to->at);
        memset(to->payload + to->at, 0, piece);
        to->crc = cascade_crc32c(to->payload + to->at, piece, to->crc);
        advance(to, piece);
    }
}

void cascade_crc32c_chunks(const void *src, size_t n, size_t chunk_bytes, uint32_t *crcs)
{
    const uint8_t *from = src;
    for (; n > 0; crcs++) {
        size_t chunk = n < chunk_bytes ? n : chunk_bytes;
        *crcs = cascade_crc32c(from, chunk, 0);
        from += chunk;
        n -= chunk;
    }
}

void cascade_crc32c_ranges(const uint64_t *ranges, size_t count, size_t chunk_bytes, uint32_t *crcs)
{
    for (const uint64_t *range = ranges; range < ranges + 2 * count; range += 2) {
        cascade_crc32c_chunks((const void *)(uintptr_t)range[0], range[1], chunk_bytes, crcs);
        crcs += (range[1] + chunk_bytes - 1) / chunk_bytes;
    }
}

int cascade_ingest_sha256(void *payload, size_t payload_bytes, const void *key, size_t key_bytes, const void *value,
                          size_t value_bytes, size_t value_offset, size_t chunk_bytes, uint32_t *crcs, uint8_t *digest)
{
    if (!cascade_sha256_available())
        return -ENOSYS;
    if (chunk_bytes == 0 || key_bytes > value_offset || value_offset > payload_bytes ||
        value_bytes > payload_bytes - value_offset)
        return -EINVAL;
    void *ctx = evp.ctx_new();
    if (ctx == NULL)
        return -ENOMEM;
    struct progress to = {.payload = payload, .chunk_bytes = chunk_bytes, .crcs = crcs};
    int rc = evp.init(ctx, evp.sha256(), NULL) == 1 ? 0 : -EIO;
    if (rc == 0)
        rc = take(&to, ctx, key, key_bytes);
    if (rc == 0) {
        zero_until(&to, value_offset);
        rc = take(&to, ctx, value, value_bytes);
    }
    if (rc == 0) {
        zero_until(&to, payload_bytes);
        if (to.at % chunk_bytes != 0)
            *to.crcs = to.crc;
        if (evp.final(ctx, digest, NULL) != 1)
            rc = -EIO;
    }
    evp.ctx_free(ctx);
    return rc;
}

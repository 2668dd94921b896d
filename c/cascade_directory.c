/* cascade_directory.c: the index of sealed blocks in shared memory, and pins on them.
 *
 * One process, the owner, writes the directory; any number of clients map it read-only and each has a
 * pin table of its own, which it shares with the owner alone. Bytes, states and the argument why no
 * reader ever sees a reused extent are in cascade_aio/tiers/DIRECTORY.md; what follows relies on it:
 *
 *   pin:       pins[slot] += 1 (seq_cst);   read word (seq_cst): must still be (generation, SEALED)
 *   withdraw:  word = EVICTING (seq_cst);   read every pins[slot] (seq_cst): must be 0
 *
 * Whichever of the two reads comes second in the single order of seq_cst operations sees the write of
 * the other side: so either the pin is refused or the withdrawal is. Everything a reader sees before it
 * has a pin is a hint and is read again under the pin.
 *
 * Slot numbers found in shared memory are checked against the caller's geometry, never trusted.
 */
#include "cascade.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#define NAME_BYTES 16u
#define NAMES_MAX 4u
#define BUCKET_CELLS 8u
#define STATE_MASK 0xffu
#define GENERATION_ONE 0x100u
#define META_WORDS 11u

_Static_assert(META_WORDS * 8 == sizeof((struct cascade_entry *)0)->meta, "metadata fills whole words");

typedef _Atomic uint64_t word_t;

struct slot { /* 256 bytes: four cache lines; a look-up reads the first three */
    word_t word; /* generation << 8 | state */
    word_t offset;
    word_t key_bytes;
    word_t value_bytes;
    word_t value_offset;
    word_t header_and_meta; /* header_bytes | meta_bytes << 32 */
    word_t flags_and_crc;   /* flags | crc << 32 */
    word_t reserved;
    word_t digest[4];
    word_t names[NAMES_MAX][2];
    word_t meta[META_WORDS];
    word_t reserved_too;
};

_Static_assert(sizeof(struct slot) == 256, "a slot has the size that DIRECTORY.md says");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics must work between processes");

struct name {
    uint64_t low, high;
};

static struct slot *slot_at(const struct cascade_directory *directory, uint32_t slot)
{
    return (struct slot *)directory->slots + slot;
}

static struct name name_of(const uint8_t *bytes)
{
    struct name name;
    memcpy(&name, bytes, sizeof name);
    return name;
}

static uint64_t load(const word_t *word)
{
    return atomic_load_explicit(word, memory_order_relaxed);
}

static void store(word_t *word, uint64_t value)
{
    atomic_store_explicit(word, value, memory_order_relaxed);
}

/* ---- table of names: two buckets of one cache line each per name, cells (tag << 32 | slot + 1) ---- */

static word_t *bucket_of(const struct cascade_directory *directory, uint64_t hash)
{
    return (word_t *)directory->cells + (hash & (directory->buckets - 1)) * BUCKET_CELLS;
}

static uint64_t cell_of(struct name name, uint32_t slot)
{
    return (name.high >> 32 << 32) | (slot + 1);
}

static int insert(const struct cascade_directory *directory, struct name name, uint32_t slot)
{
    word_t *buckets[2] = {bucket_of(directory, name.low), bucket_of(directory, name.high)};
    word_t *chosen = NULL;
    uint32_t best = 0;
    for (uint32_t b = 0; b < 2; b++) {
        uint32_t free_cells = 0;
        word_t *first = NULL;
        for (uint32_t i = 0; i < BUCKET_CELLS; i++)
            if (load(&buckets[b][i]) == 0) {
                free_cells++;
                first = first == NULL ? &buckets[b][i] : first;
            }
        if (free_cells > best) {
            best = free_cells;
            chosen = first;
        }
    }
    if (chosen == NULL)
        return -ENOSPC;
    atomic_store_explicit(chosen, cell_of(name, slot), memory_order_release);
    return 0;
}

static void remove_name(const struct cascade_directory *directory, struct name name, uint32_t slot)
{
    word_t *buckets[2] = {bucket_of(directory, name.low), bucket_of(directory, name.high)};
    uint64_t cell = cell_of(name, slot);
    for (uint32_t b = 0; b < 2; b++)
        for (uint32_t i = 0; i < BUCKET_CELLS; i++)
            if (load(&buckets[b][i]) == cell) {
                store(&buckets[b][i], 0);
                return;
            }
}

static int is_called(struct slot *slot, struct name name)
{
    if (load(&slot->digest[0]) == name.low && load(&slot->digest[1]) == name.high)
        return 1;
    for (uint32_t i = 0; i < NAMES_MAX; i++)
        if (load(&slot->names[i][0]) == name.low && load(&slot->names[i][1]) == name.high)
            return 1;
    return 0;
}

/* The sealed slot that `name` names, and its word when it did; -ENOENT. A hint, unless pinned. */
static int64_t find(const struct cascade_directory *directory, struct name name, uint64_t *word_out)
{
    word_t *buckets[2] = {bucket_of(directory, name.low), bucket_of(directory, name.high)};
    for (uint32_t b = 0; b < 2; b++)
        for (uint32_t i = 0; i < BUCKET_CELLS; i++) {
            uint64_t cell = atomic_load_explicit(&buckets[b][i], memory_order_acquire);
            uint32_t number = (uint32_t)cell - 1;
            if (cell == 0 || (cell ^ name.high) >> 32 != 0 || number >= directory->slot_count)
                continue;
            struct slot *slot = slot_at(directory, number);
            uint64_t word = atomic_load_explicit(&slot->word, memory_order_acquire);
            if ((word & STATE_MASK) != CASCADE_SLOT_SEALED || !is_called(slot, name))
                continue;
            /* The loads above happen before the second look at the word: an unchanged one vouches for them. */
            atomic_thread_fence(memory_order_acquire);
            if (load(&slot->word) != word)
                continue;
            *word_out = word;
            return number;
        }
    return -ENOENT;
}

/* ---- entries ---- */

static uint32_t entry_crc(const struct cascade_entry *entry)
{
    /* Word and slot number change while an entry stays, crc itself cannot count. */
    uint32_t crc = cascade_crc32c(&entry->offset, sizeof entry->offset * 4, 0);
    crc = cascade_crc32c(&entry->header_bytes, sizeof entry->header_bytes * 3, crc);
    return cascade_crc32c(entry->digest, sizeof entry->digest + sizeof entry->meta, crc);
}

static uint32_t read_entry(const struct cascade_directory *directory, uint32_t number, struct cascade_entry *out)
{
    struct slot *slot = slot_at(directory, number);
    uint64_t pair = load(&slot->header_and_meta), meta[META_WORDS], digest[4];
    out->word = load(&slot->word);
    out->slot = number;
    out->offset = load(&slot->offset);
    out->key_bytes = load(&slot->key_bytes);
    out->value_bytes = load(&slot->value_bytes);
    out->value_offset = load(&slot->value_offset);
    out->header_bytes = (uint32_t)pair;
    out->meta_bytes = (uint32_t)(pair >> 32);
    pair = load(&slot->flags_and_crc);
    out->flags = (uint32_t)pair;
    for (uint32_t i = 0; i < 4; i++)
        digest[i] = load(&slot->digest[i]);
    for (uint32_t i = 0; i < META_WORDS; i++)
        meta[i] = load(&slot->meta[i]);
    memcpy(out->digest, digest, sizeof digest);
    memcpy(out->meta, meta, sizeof meta);
    return (uint32_t)(pair >> 32);
}

static void write_entry(struct slot *slot, const struct cascade_entry *entry)
{
    uint64_t meta[META_WORDS], digest[4];
    memcpy(meta, entry->meta, sizeof meta);
    memcpy(digest, entry->digest, sizeof digest);
    store(&slot->offset, entry->offset);
    store(&slot->key_bytes, entry->key_bytes);
    store(&slot->value_bytes, entry->value_bytes);
    store(&slot->value_offset, entry->value_offset);
    store(&slot->header_and_meta, entry->header_bytes | (uint64_t)entry->meta_bytes << 32);
    store(&slot->flags_and_crc, entry->flags | (uint64_t)entry_crc(entry) << 32);
    for (uint32_t i = 0; i < 4; i++)
        store(&slot->digest[i], digest[i]);
    for (uint32_t i = 0; i < META_WORDS; i++)
        store(&slot->meta[i], meta[i]);
}

static void forget_names(struct slot *slot)
{
    for (uint32_t i = 0; i < NAMES_MAX; i++) {
        store(&slot->names[i][0], 0);
        store(&slot->names[i][1], 0);
    }
}

static void remove_cells(const struct cascade_directory *directory, struct slot *slot, uint32_t number)
{
    remove_name(directory, (struct name){load(&slot->digest[0]), load(&slot->digest[1])}, number);
    for (uint32_t i = 0; i < NAMES_MAX; i++) {
        struct name name = {load(&slot->names[i][0]), load(&slot->names[i][1])};
        if (name.low | name.high)
            remove_name(directory, name, number);
    }
}

static int is_pinned(uint32_t number, uint32_t *const *tables, uint32_t table_count)
{
    for (uint32_t t = 0; t < table_count; t++)
        if (atomic_load_explicit((_Atomic uint32_t *)tables[t] + number, memory_order_seq_cst) != 0)
            return 1;
    return 0;
}

static void free_slot(struct slot *slot, uint64_t word)
{
    atomic_store_explicit(&slot->word, ((word & ~(uint64_t)STATE_MASK) + GENERATION_ONE) | CASCADE_SLOT_FREE, memory_order_release);
}

/* ---- readers ---- */

int64_t cascade_directory_find(const struct cascade_directory *directory, const uint8_t *name)
{
    uint64_t word;
    return find(directory, name_of(name), &word);
}

uint32_t cascade_directory_lookup(const struct cascade_directory *directory, const uint8_t *names, uint32_t count)
{
    uint64_t word;
    for (uint32_t i = 0; i < count; i++)
        if (find(directory, name_of(names + (size_t)i * NAME_BYTES), &word) < 0)
            return i;
    return count;
}

int cascade_directory_pin(const struct cascade_directory *directory, const struct cascade_pins *pins, const uint8_t *name, struct cascade_entry *out)
{
    struct name wanted = name_of(name);
    uint64_t word;
    int64_t found = find(directory, wanted, &word);
    if (found < 0)
        return -ENOENT;
    uint32_t number = (uint32_t)found;
    struct slot *slot = slot_at(directory, number);
    _Atomic uint32_t *count = (_Atomic uint32_t *)pins->counts + number;
    atomic_fetch_add_explicit(count, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&slot->word, memory_order_seq_cst) == word) {
        read_entry(directory, number, out);
        if (is_called(slot, wanted) && !(out->flags & CASCADE_SLOT_BY_MESSAGE)) {
            _Atomic uint8_t *touched = (_Atomic uint8_t *)pins->touched + number;
            if (atomic_load_explicit(touched, memory_order_relaxed) == 0) {
                atomic_store_explicit(touched, 1, memory_order_relaxed);
                atomic_fetch_add_explicit((_Atomic uint64_t *)pins->touches, 1, memory_order_release);
            }
            return 0;
        }
    }
    atomic_fetch_sub_explicit(count, 1, memory_order_release);
    return -ENOENT;
}

int cascade_pins_add(const struct cascade_pins *pins, uint32_t slot)
{
    if (slot >= pins->slot_count)
        return -EINVAL;
    atomic_fetch_add_explicit((_Atomic uint32_t *)pins->counts + slot, 1, memory_order_seq_cst);
    return 0;
}

int cascade_pins_drop(const struct cascade_pins *pins, uint32_t slot)
{
    if (slot >= pins->slot_count)
        return -EINVAL;
    _Atomic uint32_t *count = (_Atomic uint32_t *)pins->counts + slot;
    /* release: what was read under the pin was read before the owner sees it gone */
    if (atomic_fetch_sub_explicit(count, 1, memory_order_release) == 0) {
        atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
        return -EINVAL;
    }
    return 0;
}

/* ---- the owner ---- */

int cascade_directory_publish(const struct cascade_directory *directory, const struct cascade_entry *entry, uint32_t state)
{
    if (entry->slot >= directory->slot_count || entry->meta_bytes > sizeof entry->meta)
        return -EINVAL;
    struct slot *slot = slot_at(directory, entry->slot);
    uint64_t word = load(&slot->word);
    if ((word & STATE_MASK) != CASCADE_SLOT_FREE)
        return -EBUSY;
    store(&slot->word, (word & ~(uint64_t)STATE_MASK) | CASCADE_SLOT_BUSY);
    /* Whoever sees a field below sees a word that is not SEALED of this generation, or the last store. */
    atomic_thread_fence(memory_order_release);
    write_entry(slot, entry);
    forget_names(slot);
    if (state == CASCADE_SLOT_SEALED && insert(directory, name_of(entry->digest), entry->slot) < 0) {
        free_slot(slot, word);
        return -ENOSPC;
    }
    atomic_store_explicit(&slot->word, (word & ~(uint64_t)STATE_MASK) | state, memory_order_seq_cst);
    return 0;
}

int cascade_directory_bind(const struct cascade_directory *directory, uint32_t number, const uint8_t *bytes)
{
    if (number >= directory->slot_count)
        return -EINVAL;
    struct slot *slot = slot_at(directory, number);
    struct name name = name_of(bytes);
    if (is_called(slot, name))
        return 0;
    for (uint32_t i = 0; i < NAMES_MAX; i++)
        if ((load(&slot->names[i][0]) | load(&slot->names[i][1])) == 0) {
            /* The name before its cell (released in insert): who comes by the cell finds all of it. Who comes
             * by another cell may find half, which is equal to no name but the whole. */
            store(&slot->names[i][0], name.low);
            store(&slot->names[i][1], name.high);
            if (insert(directory, name, number) == 0)
                return 0;
            store(&slot->names[i][0], 0);
            store(&slot->names[i][1], 0);
            return -ENOSPC;
        }
    return -ENOSPC;
}

int cascade_directory_unbind(const struct cascade_directory *directory, uint32_t number, const uint8_t *bytes)
{
    if (number >= directory->slot_count)
        return -EINVAL;
    struct slot *slot = slot_at(directory, number);
    struct name name = name_of(bytes);
    for (uint32_t i = 0; i < NAMES_MAX; i++)
        if (load(&slot->names[i][0]) == name.low && load(&slot->names[i][1]) == name.high) {
            remove_name(directory, name, number);
            store(&slot->names[i][0], 0);
            store(&slot->names[i][1], 0);
            return 0;
        }
    return -ENOENT;
}

int cascade_directory_withdraw(const struct cascade_directory *directory, uint32_t number, uint32_t *const *tables, uint32_t table_count)
{
    if (number >= directory->slot_count)
        return -EINVAL;
    struct slot *slot = slot_at(directory, number);
    uint64_t word = load(&slot->word);
    atomic_store_explicit(&slot->word, (word & ~(uint64_t)STATE_MASK) | CASCADE_SLOT_EVICTING, memory_order_seq_cst);
    if (is_pinned(number, tables, table_count)) {
        atomic_store_explicit(&slot->word, word, memory_order_release); /* same generation, same block */
        return 0;
    }
    remove_cells(directory, slot, number);
    free_slot(slot, word);
    return 1;
}

int cascade_directory_is_pinned(const struct cascade_directory *directory, uint32_t number, uint32_t *const *tables, uint32_t table_count)
{
    return number >= directory->slot_count ? -EINVAL : is_pinned(number, tables, table_count);
}

int cascade_directory_retire(const struct cascade_directory *directory, uint32_t number, uint32_t *const *tables, uint32_t table_count)
{
    if (number >= directory->slot_count)
        return -EINVAL;
    struct slot *slot = slot_at(directory, number);
    uint64_t word = load(&slot->word);
    if ((word & STATE_MASK) != CASCADE_SLOT_RETIRED) {
        atomic_store_explicit(&slot->word, (word & ~(uint64_t)STATE_MASK) | CASCADE_SLOT_RETIRED, memory_order_seq_cst);
        remove_cells(directory, slot, number);
    }
    if (is_pinned(number, tables, table_count))
        return 0;
    free_slot(slot, word);
    return 1;
}

int cascade_directory_inspect(const struct cascade_directory *directory, uint32_t number, struct cascade_entry *out)
{
    if (number >= directory->slot_count)
        return -EINVAL;
    memset(out, 0, sizeof *out);
    uint32_t crc = read_entry(directory, number, out);
    uint32_t state = (uint32_t)(out->word & STATE_MASK);
    if (state == CASCADE_SLOT_FREE || state == CASCADE_SLOT_BUSY)
        return (int)state;
    if (crc != entry_crc(out) || out->meta_bytes > sizeof out->meta)
        return -EBADMSG;
    return (int)state;
}

int cascade_directory_mark(const struct cascade_directory *directory, uint32_t number, uint32_t state)
{
    if (number >= directory->slot_count)
        return -EINVAL;
    struct slot *slot = slot_at(directory, number);
    uint64_t word = load(&slot->word);
    if (state == CASCADE_SLOT_FREE) {
        free_slot(slot, word);
        return 0;
    }
    if (state == CASCADE_SLOT_SEALED) {
        forget_names(slot);
        if (insert(directory, (struct name){load(&slot->digest[0]), load(&slot->digest[1])}, number) < 0)
            return -ENOSPC;
    }
    atomic_store_explicit(&slot->word, (word & ~(uint64_t)STATE_MASK) | state, memory_order_seq_cst);
    return 0;
}

void cascade_directory_clear_names(const struct cascade_directory *directory)
{
    for (uint64_t i = 0; i < (uint64_t)directory->buckets * BUCKET_CELLS; i++)
        store((word_t *)directory->cells + i, 0);
}

uint32_t cascade_pins_harvest(const struct cascade_pins *pins, uint32_t start, uint32_t *out, uint32_t capacity, uint32_t *next)
{
    _Atomic uint8_t *touched = pins->touched;
    uint32_t found = 0, i = start;
    while (i < pins->slot_count && found < capacity) {
        uint64_t eight;
        if (i % 8 == 0 && pins->slot_count - i >= 8 && (memcpy(&eight, (const uint8_t *)pins->touched + i, 8), eight == 0)) {
            i += 8; /* a touch that is missed here is seen the next time: it was counted in `touches` */
            continue;
        }
        if (atomic_load_explicit(&touched[i], memory_order_relaxed) != 0) {
            atomic_store_explicit(&touched[i], 0, memory_order_relaxed);
            out[found++] = i;
        }
        i++;
    }
    *next = i;
    return found;
}

uint32_t cascade_pins_held(const struct cascade_pins *pins, uint32_t start, uint32_t *out, uint32_t capacity, uint32_t *next)
{
    uint32_t found = 0, i = start;
    for (; i < pins->slot_count && found < capacity; i++)
        if (atomic_load_explicit((_Atomic uint32_t *)pins->counts + i, memory_order_relaxed) != 0)
            out[found++] = i;
    *next = i;
    return found;
}

uint64_t cascade_word_load(const void *address)
{
    return atomic_load_explicit((const word_t *)address, memory_order_acquire);
}

void cascade_word_store(void *address, uint64_t value)
{
    atomic_store_explicit((word_t *)address, value, memory_order_release);
}

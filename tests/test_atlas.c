/* test_atlas.c - the bug atlas: classes of KV-reuse faults that engines have shipped, one named
   test each. tests/mutate.py --planted puts every one of them back into a copy of the headers and
   expects the test of that name to fail.
   test_atlas [NAME...]   all of them without a name
   cc -std=c11 -O2 -I. -Itests tests/test_atlas.c -o test_atlas -lm

   What a token's K and V hold is a hash of its namespace and of all tokens up to it, so reading
   anybody else's row, or an old one, changes bits. The oracle is the same attention computed afresh
   from memory of its own: by the contract on bits both agree in every bit. */
#define _GNU_SOURCE
#include "test.h"

static uint32_t hash_and = 0xffffffffu, hash_or; // and 0: all hashes collide
#define ATTNI_HASH(parent, key) ((attni_tree_hash(parent, key) & hash_and) | hash_or)
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

#if SIZE_MAX > 0xffffffffu && !defined(_WIN32)
#include <sys/mman.h>
#define HAS_SPARSE 1
#endif

enum { MAX_LEN = 768, MAX_LIVE = 16, HEADS = 4, KV_HEADS = 2, DIM = 16 };

#ifdef TEST_SANITIZED
enum { SLOW = 1 };
#else
enum { SLOW = 0 };
#endif

static int32_t isas[ATTN_CPU_ISA_COUNT], n_isas;

static void *memory(size_t bytes, int fill) {
    void *m = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!m) abort();
    memset(m, fill, (bytes + 127) & ~(size_t)63);
    return m;
}

// ---- contents

typedef struct line { // a sequence, by what it says
    uint64_t ns;
    int32_t n, token[MAX_LEN];
} line;

static uint64_t mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0xd6e8feb86659fd93u;
    return h ^ (h >> 31);
}

enum { ROW_K, ROW_V, ROW_Q };

// Rows of positions [from, to) into out (to - from, width).
static void content(const line *l, int kind, int32_t from, int32_t to, int32_t width, float *out) {
    uint64_t h = mix(77, l->ns);
    int32_t i, e;
    test_rng r;
    for (i = 0; i < to; i++) {
        h = mix(h, (uint64_t)(uint32_t)l->token[i] + 5u);
        if (i < from) continue;
        r.state = h + (uint64_t)kind * 0x123456789u;
        for (e = 0; e < width; e++) *out++ = (float)test_uniform(&r, -2, 2);
    }
}

static line say(uint64_t ns, int32_t n, uint64_t seed, int32_t alphabet) {
    line l;
    int32_t i;
    test_rng r;
    r.state = seed;
    memset(&l, 0, sizeof l);
    l.ns = ns;
    l.n = n;
    for (i = 0; i < n; i++) l.token[i] = test_below(&r, alphabet);
    return l;
}

// The first n tokens of l, then others.
static line branch(const line *l, int32_t n, int32_t more, uint64_t seed) {
    line b = say(l->ns, n + more, seed, 1000000), c = *l;
    memcpy(b.token, c.token, 4 * (size_t)n);
    if (more && n < l->n && b.token[n] == l->token[n]) b.token[n]++;
    return b;
}

// ---- computing

// f32 Q and O, heads and dims fixed; what differs is set by the caller.
static attn_desc shape(attn_dtype kv, attn_layout layout, attn_numerics numerics) {
    attn_desc d;
    memset(&d, 0, sizeof d);
    d.n_heads = HEADS;
    d.n_kv_heads = KV_HEADS;
    d.head_dim = DIM;
    d.q.dtype = d.o.dtype = ATTN_F32;
    d.kv.k.dtype = d.kv.v.dtype = kv;
    d.kv.layout = layout;
    d.numerics = numerics;
    return d;
}

static attn_result run(const attn_desc *d, int32_t workers) {
    size_t bytes = attn_cpu_forward_bytes(d, workers);
    void *mem;
    attn_result r;
    if (!bytes) {
        r = attn_validate(d);
        return r == ATTN_OK ? ATTN_ERR_ARGUMENT : r; // a test that computes nothing must not pass
    }
    mem = memory(bytes, 0xff);
    r = attn_cpu_forward(d, mem, bytes, workers);
    free(mem);
    return r;
}

// Writes rows [from, to) of l through slots.
static attn_result store(const attn_desc *d, const line *l, int32_t from, int32_t to,
                         const int64_t *slots) {
    size_t n = (size_t)(to - from);
    int32_t kw = d->n_kv_heads * d->head_dim, vw = d->n_kv_heads * attni_v_dim(d);
    attn_tensor k, v;
    attn_result r;
    memset(&k, 0, sizeof k);
    v = k;
    k.dtype = v.dtype = ATTN_F32;
    k.data = malloc(4 * n * (size_t)kw + 4);
    v.data = malloc(4 * n * (size_t)vw + 4);
    content(l, ROW_K, from, to, kw, (float *)k.data);
    content(l, ROW_V, from, to, vw, (float *)v.data);
    r = attn_cpu_store(d, &k, &v, slots, 0, to - from);
    free(k.data);
    free(v.data);
    return r;
}

static void queries(const attn_desc *d, const line *l, int32_t from, int32_t to, void *q) {
    int32_t n = (to - from) * d->n_heads * d->head_dim, i;
    float *x = (float *)malloc(4 * (size_t)n + 4);
    content(l, ROW_Q, from, to, d->n_heads * d->head_dim, x);
    for (i = 0; i < n; i++) attni_put(q, d->q.dtype, i, x[i]);
    free(x);
}

static size_t row_bytes(const attn_desc *d) { // of O, all heads
    return (size_t)d->n_heads * (size_t)attni_v_dim(d) * (size_t)attni_bits_of(d->o.dtype) / 8;
}

// Rows of the queries [from, to) of l, all of whose tokens below `held` are held: contiguous, alone
// and in memory of its own. o (to - from, row), lse (to - from, heads). ref: by the fp64 reference
// instead, into doubles.
static void fresh_at(const attn_desc *like, const line *l, int32_t from, int32_t to, int32_t held,
                     void *o, float *lse, double *ref) {
    attn_desc d = *like;
    int32_t start[2] = {0, 0}, i;
    int64_t slots[MAX_LEN];
    start[1] = to - from;
    d.n_seq = 1;
    d.q_start = start;
    d.q_pos0 = to == held ? NULL : &from; // the default: the last tokens held
    d.seq_order = NULL;
    d.kv.kv_pos0 = NULL;
    d.kv.kv_len = &held;
    d.kv.page_table = NULL;
    d.kv.n_pages = 1;
    d.kv.page_tokens = (held + 16) / 16 * 16;
    d.kv.k.page_bytes = d.kv.v.page_bytes = 0;
    d.kv.k.data = memory(attn_kv_page_bytes(&d, 0), 0xff);
    d.kv.v.data = memory(attn_kv_page_bytes(&d, 1), 0xff);
    d.q.data = memory(4 * (size_t)((to - from) * d.n_heads * d.head_dim), 0);
    d.o.data = o ? o : d.q.data;
    d.lse = lse;
    for (i = 0; i < held; i++) slots[i] = i;
    CHECK_EQ(store(&d, l, 0, held, slots), ATTN_OK);
    queries(&d, l, from, to, d.q.data);
    if (ref) CHECK_EQ(attn_ref_forward(&d, ref, NULL), ATTN_OK);
    else CHECK_EQ(run(&d, 1), ATTN_OK);
    free(d.kv.k.data);
    free(d.kv.v.data);
    free(d.q.data);
}

static void fresh(const attn_desc *like, const line *l, int32_t q_len, void *o, float *lse) {
    fresh_at(like, l, l->n - q_len, l->n, l->n, o, lse, NULL);
}

static int near_ref(const float *o, const double *ref, int32_t n, double tolerance) {
    int32_t i;
    for (i = 0; i < n; i++)
        if (!(fabs((double)o[i] - ref[i]) <= tolerance)) return 0;
    return 1;
}

// ---- an engine: tree, pages and the sequences that live in them

typedef struct engine {
    attn_desc d;
    attn_tree *t;
    void *tree_mem;
    int32_t n_pages, pt;
    int used[MAX_LIVE];
    line live[MAX_LIVE]; // by handle
} engine;

// The caller's part of freeing: what nobody holds is NaN, and so is what lies behind a page's end.
static void poison(engine *e) {
    int32_t p, side;
    uint8_t nan[8192];
    memset(nan, 0xff, sizeof nan);
    for (p = 0; p < e->n_pages; p++) {
        int32_t from = e->t->pool.ref[p] == 0 ? 0 : e->t->fill[p];
        for (side = 0; side < 2; side++)
            if (attn_kv_rows_bytes(&e->d, side, e->pt - from) <= sizeof nan)
                CHECK_EQ(attn_kv_write_rows(&e->d, side, p, from, e->pt - from, nan), ATTN_OK);
    }
}

static void engine_make(engine *e, const attn_desc *like, int32_t n_pages, int32_t pt) {
    attn_tree_desc td;
    memset(e, 0, sizeof *e);
    memset(&td, 0, sizeof td);
    td.n_pages = e->n_pages = n_pages;
    td.page_tokens = e->pt = pt;
    td.max_seq = MAX_LIVE;
    e->d = *like;
    e->d.kv.n_pages = n_pages;
    e->d.kv.page_tokens = pt;
    e->d.kv.k.data = memory(attn_kv_page_bytes(&e->d, 0) * (size_t)n_pages, 0xff);
    e->d.kv.v.data = memory(attn_kv_page_bytes(&e->d, 1) * (size_t)n_pages, 0xff);
    e->d.n_seq = 1; // for store, which reads no tables when given slots
    e->d.q_start = e->d.kv.kv_len = isas;
    e->tree_mem = memory(attn_tree_bytes(&td), 0xff);
    CHECK_EQ(attn_tree_init(&td, e->tree_mem, attn_tree_bytes(&td), &e->t), ATTN_OK);
}

static void engine_free(engine *e) {
    free(e->d.kv.k.data);
    free(e->d.kv.v.data);
    free(e->tree_mem);
}

// Stores tokens [from, live.n) of sequence s where its pages say.
static void engine_store(engine *e, int32_t s, int32_t from) {
    const line *l = e->live + s;
    int32_t page[MAX_LEN], i;
    int64_t slots[MAX_LEN];
    if (!CHECK(attn_tree_pages(e->t, s, page, MAX_LEN) == (l->n + e->pt - 1) / e->pt)) return;
    for (i = from; i < l->n; i++)
        slots[i - from] = (int64_t)page[i / e->pt] * e->pt + i % e->pt;
    CHECK_EQ(store(&e->d, l, from, l->n, slots), ATTN_OK);
}

static void engine_copy(engine *e, const attn_page_copy *c, int32_t n) {
    CHECK_EQ(attn_cpu_copy_pages(&e->d, c, n), ATTN_OK);
    CHECK_EQ(attn_tree_ack(e->t, c, n), ATTN_OK);
}

static int32_t engine_insert(engine *e, const line *l, int32_t *n_cached) {
    int32_t s = -1, hit = 0, n = 0;
    attn_page_copy c;
    attn_result r = attn_tree_insert(e->t, l->ns, l->token, l->n, &s, &hit, &c, 1, &n);
    if (n_cached) *n_cached = hit;
    if (r != ATTN_OK) return -1;
    e->used[s] = 1;
    e->live[s] = *l;
    engine_copy(e, &c, n);
    engine_store(e, s, hit);
    poison(e);
    CHECK_EQ(attn_tree_check(e->t), ATTN_OK);
    return s;
}

static int engine_append(engine *e, int32_t s, const int32_t *token, int32_t n) {
    int32_t hit = 0, nc = 0;
    attn_page_copy c;
    line *l = e->live + s;
    if (attn_tree_append(e->t, s, token, n, &hit, &c, 1, &nc) != ATTN_OK) return 0;
    memcpy(l->token + l->n, token, 4 * (size_t)n);
    l->n += n;
    engine_copy(e, &c, nc);
    engine_store(e, s, l->n - n + hit);
    poison(e);
    CHECK_EQ(attn_tree_check(e->t), ATTN_OK);
    return 1;
}

static void engine_release(engine *e, int32_t s, int keep) {
    CHECK_EQ(attn_tree_release(e->t, s, keep), ATTN_OK);
    e->used[s] = 0;
    poison(e);
    CHECK_EQ(attn_tree_check(e->t), ATTN_OK);
}

// One step of these sequences in one batch, the last q_len tokens of each (at most): every row must
// have the bits of a fresh computation.
static int engine_step(engine *e, const int32_t *seq, int32_t n, int32_t q_len, int32_t workers) {
    attn_desc d = e->d;
    int32_t start[MAX_LIVE + 1], len[MAX_LIVE], table[MAX_LIVE * MAX_LEN], i, s, ok = 1;
    size_t row = row_bytes(&d), lse_row = 4 * (size_t)d.n_heads;
    uint8_t *o, *want;
    float *lse, *want_lse;
    start[0] = 0;
    for (i = 0; i < n; i++) {
        len[i] = e->live[seq[i]].n;
        start[i + 1] = start[i] + (len[i] < q_len ? len[i] : q_len);
        memset(table + i * MAX_LEN, 0xff, 4 * MAX_LEN);
        CHECK(attn_tree_pages(e->t, seq[i], table + i * MAX_LEN, MAX_LEN) >= 0);
    }
    o = (uint8_t *)memory(row * (size_t)start[n], 0xff);
    want = (uint8_t *)memory(row * (size_t)start[n], 0xff);
    lse = (float *)memory(lse_row * (size_t)start[n], 0xff);
    want_lse = (float *)memory(lse_row * (size_t)start[n], 0xff);
    d.q.data = memory(4 * (size_t)(start[n] * d.n_heads * d.head_dim), 0);
    d.o.data = o;
    d.lse = lse;
    d.n_seq = n;
    d.q_start = start;
    d.kv.kv_len = len;
    d.kv.page_table = table;
    d.kv.page_table_stride = MAX_LEN;
    for (i = 0; i < n; i++) {
        s = seq[i];
        queries(&d, e->live + s, len[i] - (start[i + 1] - start[i]), len[i],
                (float *)d.q.data + (int64_t)start[i] * d.n_heads * d.head_dim);
        fresh(&e->d, e->live + s, start[i + 1] - start[i], want + row * (size_t)start[i],
              want_lse + (size_t)start[i] * (size_t)d.n_heads);
    }
    ok &= CHECK_EQ(run(&d, workers), ATTN_OK);
    ok &= CHECK(memcmp(o, want, row * (size_t)start[n]) == 0);
    ok &= CHECK(memcmp(lse, want_lse, lse_row * (size_t)start[n]) == 0);
    free(o), free(want), free(lse), free(want_lse), free(d.q.data);
    return ok;
}

static int engine_step_all(engine *e, int32_t q_len) {
    int32_t seq[MAX_LIVE], n = 0, s;
    for (s = 0; s < MAX_LIVE; s++)
        if (e->used[s]) seq[n++] = s;
    return n == 0 || engine_step(e, seq, n, q_len, 2);
}

// Free pages are exactly those that no live sequence has in its table (nothing else is cached),
// each with as many references as nodes list it; afterwards nothing is lost when all let go.
static void check_pages(engine *e) {
    int32_t s, i, n, page[MAX_LEN], seen = 0;
    attn_tree_stats st;
    char *used = (char *)calloc((size_t)e->n_pages, 1);
    for (s = 0; s < MAX_LIVE; s++) {
        if (!e->used[s]) continue;
        n = attn_tree_pages(e->t, s, page, MAX_LEN);
        for (i = 0; i < n; i++) {
            CHECK(e->t->pool.ref[page[i]] > 0);
            seen += !used[page[i]];
            used[page[i]] = 1;
        }
    }
    memset(&st, 0, sizeof st);
    attn_tree_get_stats(e->t, &st);
    CHECK(st.n_free <= e->n_pages - seen); // a border page may be there twice
    CHECK(st.n_free >= e->n_pages - seen - MAX_LIVE);
    free(used);
}

static int32_t lcp(const line *a, const line *b) {
    int32_t i = 0;
    if (a->ns != b->ns) return 0;
    while (i < a->n && i < b->n && a->token[i] == b->token[i]) i++;
    return i;
}

// ==== the atlas

// Every lookup collides; still only equal tokens of the same namespace may hit.
static void hash_collision(void) {
    static const uint32_t modes[][2] = {{0, 0}, {0, 0xffffffffu}, {3, 0}, {0xffffffffu, 0}};
    int mode;
    for (mode = 0; mode < 4; mode++) {
        attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, ATTN_NUMERICS_FAST);
        engine e;
        line l, kept[48];
        int32_t n_kept = 0, step, i, at, want, hit, s;
        test_rng r = {11};
        hash_and = modes[mode][0], hash_or = modes[mode][1];
        engine_make(&e, &like, 200, 4);
        for (step = 0; step < 48; step++) {
            if (step && test_below(&r, 4)) { // most share a prefix with an earlier one ...
                l = kept[test_below(&r, n_kept)];
                at = test_below(&r, l.n + 1);
                l = branch(&l, at, test_below(&r, 9), (uint64_t)step);
            } else {
                l = say(0, 1 + test_below(&r, 14), (uint64_t)step, 3);
            }
            l.ns = (uint64_t)test_below(&r, 3) << (step % 3 ? 32 : 0); // ... or its tokens
            if (l.n == 0) l.n = 1;
            for (want = i = 0; i < n_kept; i++)
                if (lcp(&l, kept + i) > want) want = lcp(&l, kept + i);
            CHECK_EQ(attn_tree_match(e.t, l.ns, l.token, l.n), want);
            s = engine_insert(&e, &l, &hit);
            if (!CHECK(s >= 0)) break;
            CHECK_EQ(hit, want);
            kept[n_kept++] = l;
            if (step % 8 == 7) engine_step_all(&e, 2);
            if (step % 3) engine_release(&e, s, 1);
            for (i = 0; step % 16 == 15 && i < MAX_LIVE; i++)
                if (e.used[i]) engine_release(&e, i, 1);
        }
        // out of the index again, in an order that leaves holes between colliding entries
        while (e.t->pool.n_free < e.n_pages) {
            CHECK_EQ(attn_tree_evict(e.t, 3, &hit), ATTN_OK);
            if (!CHECK_EQ(attn_tree_check(e.t), ATTN_OK) || !CHECK(hit > 0)) break;
        }
        for (i = 0; i < n_kept; i++)
            CHECK_EQ(attn_tree_match(e.t, kept[i].ns, kept[i].token, kept[i].n), 0);
        engine_free(&e);
    }
    hash_and = 0xffffffffu, hash_or = 0;
}

// A run is cut at every place, first by one and then by a third; let go in every order.
static void refcount_under_split(void) {
    static const int order[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                    {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    int32_t cut, other, i, j, s[3], n_free;
    for (cut = 1; cut < 13; cut++)
        for (j = 0; j < 6; j++) {
            attn_desc like = shape(ATTN_BF16, (attn_layout)(cut % 2), ATTN_NUMERICS_FAST);
            engine e;
            line l[3];
            engine_make(&e, &like, 24, 4);
            other = 1 + (cut * 5 + j) % 12;
            l[0] = say(9, 13, 21, 1000);
            l[1] = branch(l, cut, 6, 22);
            l[2] = branch(l, other, 5, 23);
            for (i = 0; i < 3; i++) {
                s[i] = engine_insert(&e, l + i, NULL);
                CHECK(s[i] >= 0);
                check_pages(&e);
            }
            CHECK(engine_step(&e, s, 3, 2, 1));
            for (i = 0; i < 3; i++) {
                engine_release(&e, s[order[j][i]], 0);
                check_pages(&e);
                engine_step_all(&e, 1);
                if (i == 1) { // what fell free may be given out: not the survivor's
                    line fill = say(5, 4 * e.t->pool.n_free, 99, 1000);
                    int32_t f = fill.n ? engine_insert(&e, &fill, NULL) : -1;
                    CHECK(f >= 0);
                    CHECK_EQ(e.t->pool.n_free, 0);
                    engine_step_all(&e, 1);
                    if (f >= 0) engine_release(&e, f, 0);
                }
            }
            n_free = e.t->pool.n_free;
            CHECK_EQ(n_free, e.n_pages);
            for (i = 0; i < e.n_pages; i++) CHECK_EQ(e.t->pool.ref[i], 0);
            engine_free(&e);
        }
}

// The pool is full to the last page; all of it is given up and taken again, some while others
// live on.
static void stale_kv_after_eviction(void) {
    attn_desc like = shape(ATTN_F16, ATTN_HEAD_MAJOR, ATTN_NUMERICS_FAST);
    engine e;
    line l[4], again;
    int32_t round, i, s, hit, freed, alive = -1;
    test_rng r = {31};
    engine_make(&e, &like, 12, 16);
    for (i = 0; i < 4; i++) l[i] = say(1, 48, 40 + (uint64_t)i, 1000);
    for (round = 0; round < 3; round++) {
        for (i = 0; i < 4; i++) {
            s = engine_insert(&e, l + i, &hit);
            if (!CHECK(s >= 0)) return;
            CHECK_EQ(hit, 0);
            engine_release(&e, s, 1);
        }
        CHECK_EQ(e.t->pool.n_free, 0);
        if (round == 0) { // everything at once
            CHECK_EQ(attn_tree_evict(e.t, -1, &freed), ATTN_OK);
            CHECK_EQ(freed, 12);
            poison(&e);
            for (i = 0; i < 4; i++) CHECK_EQ(attn_tree_match(e.t, 1, l[i].token, 48), 0);
            continue;
        }
        // page by page: a prefix hits exactly as far as its pages are still there
        for (i = 1; i <= 12; i++) {
            int32_t j, held = 0;
            CHECK_EQ(attn_tree_evict(e.t, 1, &freed), ATTN_OK);
            CHECK_EQ(freed, 1);
            CHECK_EQ(attn_tree_check(e.t), ATTN_OK);
            poison(&e);
            for (j = 0; j < 4; j++) held += attn_tree_match(e.t, 1, l[j].token, 48);
            CHECK_EQ(held, 16 * (12 - i));
            j = i % 4;
            if (attn_tree_match(e.t, 1, l[j].token, 48) >= 16 && round == 2) {
                again = l[j];
                again.n = attn_tree_match(e.t, 1, l[j].token, 48);
                s = engine_insert(&e, &again, &hit);
                CHECK_EQ(hit, again.n);
                if (s >= 0) CHECK(engine_step(&e, &s, 1, 3, 1)), engine_release(&e, s, 1);
            }
        }
    }
    for (round = 0; round < 60; round++) { // evicted inside append, at 100 %, beside a living one
        again = l[test_below(&r, 4)];
        i = 1 + test_below(&r, 47);
        if (round % 3) again = branch(&again, i, 1 + test_below(&r, 90), 600 + (uint64_t)round);
        s = engine_insert(&e, &again, &hit);
        if (s < 0) {
            if (!CHECK(alive >= 0)) break;
            engine_release(&e, alive, 1);
            alive = -1;
            continue;
        }
        engine_step_all(&e, 4);
        if (alive >= 0) engine_release(&e, alive, round % 2);
        alive = s;
    }
    engine_free(&e);
}

// Sequences of the same length in one batch, with the same tokens up to a place inside a page.
static void equal_positions(void) {
    int32_t cut, i, j, s[4], numerics;
    for (cut = 0; cut < 34; cut += 1 + 4 * SLOW)
        for (numerics = 0; numerics < 2; numerics++) {
            attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, (attn_numerics)numerics);
            engine e;
            line l[4];
            engine_make(&e, &like, 40, 16);
            l[0] = say(3, 37, 61, 1000);
            l[1] = branch(l, cut, 37 - cut, 62);
            l[2] = branch(l, cut, 37 - cut, 63);
            l[3] = l[0];
            l[3].ns = 4;
            for (i = 0; i < 4; i++) CHECK((s[i] = engine_insert(&e, l + i, NULL)) >= 0);
            for (i = 0; i < 3; i++) {
                CHECK(engine_step(&e, s, 4, i == 1 ? 37 : 1, 1 + i)); // decode, prefill, decode
                for (j = 0; j < 4; j++) CHECK(engine_append(&e, s[j], &i, 1)); // the same token
            }
            engine_free(&e);
        }
    // forks stand at the same place and part inside a page, in one step
    for (cut = 1; cut < 18; cut++) {
        attn_desc like = shape(ATTN_I8, ATTN_K16, ATTN_NUMERICS_FAST);
        engine e;
        line l = say(3, cut, 64, 1000);
        int32_t tokens[3] = {1, 2, 1};
        engine_make(&e, &like, 12, 16);
        s[0] = engine_insert(&e, &l, NULL);
        for (i = 1; i < 3; i++) {
            CHECK_EQ(attn_tree_fork(e.t, s[0], &s[i]), ATTN_OK);
            e.used[s[i]] = 1;
            e.live[s[i]] = l;
        }
        for (i = 0; i < 3; i++) CHECK(engine_append(&e, s[i], tokens + i, 1));
        CHECK(engine_step(&e, s, 3, 2, 1));
        engine_free(&e);
    }
}

// One desc over given tables with random rows in every slot of the pool; f32 Q and O.
typedef struct table {
    attn_desc d;
    int32_t q_start[4], kv_len[3], q_pos0[3], kv_pos0[3], page[3 * 48];
    line text[3];
    float *o, *lse;
    int32_t n_tokens;
} table;

enum { T_PAGES = 120, T_PT = 16, T_ROOM = 120 };

static void table_make(table *t, const attn_desc *like, int32_t n_seq, int32_t kv_len,
                       int32_t q_len) {
    int32_t s, j;
    int64_t slots[MAX_LEN];
    memset(t, 0, sizeof *t);
    t->d = *like;
    t->d.n_seq = n_seq;
    t->d.q_start = t->q_start;
    t->d.q_pos0 = t->q_pos0;
    t->d.kv.kv_len = t->kv_len;
    t->d.kv.kv_pos0 = t->kv_pos0;
    t->d.kv.page_table = t->page;
    t->d.kv.page_table_stride = 48;
    t->d.kv.page_tokens = T_PT;
    t->d.kv.n_pages = T_PAGES;
    t->d.kv.k.data = memory(attn_kv_page_bytes(&t->d, 0) * T_PAGES, 0xff);
    t->d.kv.v.data = memory(attn_kv_page_bytes(&t->d, 1) * T_PAGES, 0xff);
    t->d.q.data = memory(3 * T_ROOM * HEADS * DIM * 4, 0);
    t->o = (float *)memory(3 * T_ROOM * HEADS * DIM * 4, 0xff);
    t->lse = (float *)memory(3 * T_ROOM * HEADS * 4, 0xff);
    t->d.o.data = t->o;
    t->d.lse = t->lse;
    for (s = 0; s < n_seq; s++) {
        t->text[s] = say(1, kv_len > q_len ? kv_len : q_len, 70 + (uint64_t)s, 1000);
        t->kv_len[s] = kv_len;
        t->q_pos0[s] = kv_len > q_len ? kv_len - q_len : 0;
        t->q_start[s + 1] = t->q_start[s] + q_len;
        for (j = 0; j < 48; j++) t->page[s * 48 + j] = (s + j * 3) % T_PAGES; // page 0 first
        for (j = 0; j < kv_len; j++)
            slots[j] = (int64_t)t->page[s * 48 + j / T_PT] * T_PT + j % T_PT;
        CHECK_EQ(store(&t->d, t->text + s, 0, kv_len, slots), ATTN_OK);
        queries(&t->d, t->text + s, t->q_pos0[s], t->q_pos0[s] + q_len,
                (float *)t->d.q.data + (int64_t)t->q_start[s] * HEADS * DIM);
    }
    t->n_tokens = t->q_start[n_seq];
}

static void table_free(table *t) {
    free(t->d.kv.k.data), free(t->d.kv.v.data), free(t->d.q.data), free(t->o), free(t->lse);
}

static uint64_t table_hash(const table *t, int32_t token0, int32_t n) {
    uint64_t h = 1;
    int32_t i;
    for (i = token0 * HEADS * DIM; i < (token0 + n) * HEADS * DIM; i++)
        h = mix(h, attni_bits32(t->o[i]));
    for (i = token0 * HEADS; i < (token0 + n) * HEADS; i++) h = mix(h, attni_bits32(t->lse[i]));
    return h;
}

static attn_result table_run(table *t, int32_t workers) {
    memset(t->o, 0xff, 3 * T_ROOM * HEADS * DIM * 4);
    memset(t->lse, 0xff, 3 * T_ROOM * HEADS * 4);
    return run(&t->d, workers);
}

static int untouched(const table *t) {
    int32_t i;
    for (i = 0; i < 3 * T_ROOM * HEADS * DIM; i++)
        if (attni_bits32(t->o[i]) != 0xffffffffu) return 0;
    return 1;
}

// Page 0 is a page like any other, also as the source and the target of a copy; -1 is none.
static void page_zero_is_real(void) {
    attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, ATTN_NUMERICS_FAST);
    table t;
    engine e;
    line l[2];
    int32_t s[2], i, freed = 0, page = -1;
    uint64_t want;
    int64_t slots[8];
    uint8_t rows[8192];
    attn_page_copy c;
    attn_pool pool;
    void *mem = memory(attn_pool_bytes(3), 0);
    for (i = 0; i < 3; i++) { // first, in the middle, last of the table
        table_make(&t, &like, 2, 40, 2);
        CHECK_EQ(table_run(&t, 1), ATTN_OK);
        want = table_hash(&t, 0, 4);
        CHECK_EQ(t.page[0], 0);
        if (i) { // exchange page 0 with the i-th of sequence 0
            int32_t other = t.page[i];
            attn_page_copy swap[3] = {{0, 119, 16}, {0, 0, 16}, {119, 0, 16}};
            swap[1].src = other, swap[2].src = 119, swap[2].dst = other;
            CHECK_EQ(attn_cpu_copy_pages(&t.d, swap, 3), ATTN_OK);
            t.page[0] = other, t.page[i] = 0;
            CHECK_EQ(table_run(&t, 1), ATTN_OK);
            CHECK(table_hash(&t, 0, 4) == want);
        }
        t.page[i] = -1;
        CHECK_EQ(attn_validate(&t.d), ATTN_ERR_PAGE);
        CHECK_EQ(table_run(&t, 1), ATTN_ERR_PAGE);
        CHECK(untouched(&t));
        table_free(&t);
    }
    table_make(&t, &like, 1, 5, 5);
    CHECK_EQ(attn_kv_slots(&t.d, slots), ATTN_OK);
    for (i = 0; i < 5; i++) CHECK_EQ(slots[i], i); // page 0
    CHECK_EQ(attn_kv_read_rows(&t.d, 0, 0, 0, 5, rows), ATTN_OK);
    CHECK_EQ(attn_kv_write_rows(&t.d, 1, 0, 0, 0, rows), ATTN_OK);
    CHECK_EQ(attn_kv_read_rows(&t.d, 0, -1, 0, 5, rows), ATTN_ERR_PAGE);
    CHECK_EQ(attn_kv_write_rows(&t.d, 1, -1, 0, 5, rows), ATTN_ERR_PAGE);
    t.page[0] = -1;
    CHECK_EQ(attn_kv_slots(&t.d, slots), ATTN_ERR_PAGE);
    CHECK_EQ(store(&t.d, t.text, 0, 5, NULL), ATTN_ERR_PAGE);
    table_free(&t);
    // the pool hands it out, counts it and takes it back
    CHECK_EQ(attn_pool_init(&pool, 3, mem, attn_pool_bytes(3)), ATTN_OK);
    CHECK_EQ(attn_pool_alloc(&pool, &page), ATTN_OK);
    CHECK_EQ(page, 0);
    CHECK_EQ(attn_pool_retain(&pool, 0), ATTN_OK);
    CHECK_EQ(attn_pool_release(&pool, 0), ATTN_OK);
    CHECK_EQ(pool.n_free, 2);
    CHECK_EQ(attn_pool_release(&pool, 0), ATTN_OK);
    CHECK_EQ(pool.n_free, 3);
    CHECK_EQ(attn_pool_retain(&pool, -1), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_release(&pool, -1), ATTN_ERR_PAGE);
    free(mem);
    // the tree: two sequences part in page 0, then the copy is made into page 0
    engine_make(&e, &like, 4, 16);
    l[0] = say(1, 9, 81, 1000);
    l[1] = branch(l, 5, 3, 82);
    s[0] = engine_insert(&e, l, NULL);
    CHECK_EQ(attn_tree_pages(e.t, s[0], &page, 1), 1);
    CHECK_EQ(page, 0);
    s[1] = engine_insert(&e, l + 1, NULL);
    CHECK(s[1] >= 0 && engine_step(&e, s, 2, 3, 1));
    engine_release(&e, s[0], 0);
    CHECK_EQ(e.t->pool.n_free, 3);
    CHECK(engine_step_all(&e, 3));
    s[0] = engine_insert(&e, l, NULL); // parts from the copy, into page 0 again
    CHECK(s[0] >= 0 && engine_step(&e, s, 2, 3, 1));
    CHECK_EQ(attn_tree_pages(e.t, s[0], &page, 1), 1);
    CHECK_EQ(page, 0);
    c.src = -1, c.dst = 0, c.n_tokens = 1;
    CHECK_EQ(attn_cpu_copy_pages(&e.d, &c, 1), ATTN_ERR_PAGE);
    CHECK_EQ(attn_tree_ack(e.t, &c, 1), ATTN_ERR_ARGUMENT);
    c.src = 0, c.dst = -1;
    CHECK_EQ(attn_cpu_copy_pages(&e.d, &c, 1), ATTN_ERR_PAGE);
    CHECK_EQ(attn_tree_ack(e.t, &c, 1), ATTN_ERR_ARGUMENT);
    engine_release(&e, s[0], 1);
    engine_release(&e, s[1], 1);
    CHECK_EQ(attn_tree_evict(e.t, -1, &freed), ATTN_OK);
    CHECK_EQ(freed, 2);
    engine_free(&e);
}

// Rows that see nothing, by lists, by window and by a bias of -inf, alone and beside others; first,
// in the middle and last. The others keep the bits they have where every row sees something.
static void fully_masked_case(attn_numerics numerics, int how, int with_sink, int32_t q_len) {
    static const float sink[HEADS] = {1.25f, -7.5f, 0.0f, 30.0f};
    static const int32_t all[20] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,
                                    10, 11, 12, 13, 14, 15, 16, 17, 18, 19};
    enum { LEN = 300 };
    attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, numerics);
    int64_t *start = (int64_t *)calloc(LEN + 1, 8);
    float *bias = (float *)calloc((size_t)q_len * LEN, 4);
    int32_t i, j, h, c, empty, who, row0 = q_len - LEN;
    table t;
    uint64_t want[T_ROOM];
    table_make(&t, &like, 1, LEN, q_len);
    if (with_sink) t.d.logits.sink = sink;
    if (how == 0) {
        attn_block_list *b = &t.d.mask.blocks;
        b->row_block = 1, b->kv_block = 16, b->n_lists = 1, b->n_rows = q_len;
        b->row_start = start, b->block = all, b->seq_row = &row0;
    } else {
        t.d.logits.bias.data = bias;
        t.d.logits.bias.dtype = ATTN_F32;
        t.d.logits.bias.stride_token = LEN;
    }
    for (who = -1; who < 4; who++) { // nobody; first; middle; last; all three and more
        for (i = 0; i < q_len; i++) {
            empty = who == 0   ? i == 0
                    : who == 1 ? i == q_len / 2
                    : who == 2 ? i == q_len - 1
                    : who == 3 ? i % 3 == 0 || i == q_len - 1
                               : 0;
            start[i + 1] = empty ? 0 : 19;
            for (j = 0; j < LEN; j++) bias[i * LEN + j] = empty ? -HUGE_VALF : 0;
        }
        // CSR rows are consecutive: empty rows repeat the offset, and all others share one list
        if (how == 0) {
            static int32_t ids[T_ROOM * 19];
            int64_t at = 0;
            for (i = 0; i < q_len; i++) {
                int64_t n = start[i + 1];
                start[i] = at;
                for (j = 0; j < n; j++) ids[at++] = all[j];
            }
            start[q_len] = at;
            t.d.mask.blocks.block = ids;
        }
        CHECK_EQ(table_run(&t, who == 1 ? 4 : 1), ATTN_OK);
        for (i = 0; i < q_len; i++) {
            empty = how == 0 ? start[i + 1] == start[i] : bias[i * LEN] != 0;
            if (who < 0) want[i] = table_hash(&t, i, 1);
            else if (!empty) CHECK(table_hash(&t, i, 1) == want[i]);
            for (h = 0; h < HEADS && empty; h++) {
                for (c = 0; c < DIM; c++) CHECK(t.o[(i * HEADS + h) * DIM + c] == 0);
                CHECK(t.lse[i * HEADS + h] == (with_sink ? sink[h] : -HUGE_VALF));
            }
        }
    }
    table_free(&t);
    free(start);
    free(bias);
}

// All visible logits are -2.5e5: a softmax of equal numbers, not a masked row.
static void huge_negative_logits(attn_numerics numerics, int by_bias, int32_t q_len) {
    enum { LEN = 270 };
    attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, numerics);
    float *x = (float *)calloc(LEN * KV_HEADS * DIM, 4), *q;
    int64_t slots[LEN];
    int32_t i, h, c, j;
    attn_tensor k;
    table t;
    double *ref, lse;
    table_make(&t, &like, 1, LEN, q_len);
    q = (float *)t.d.q.data;
    t.d.logits.scale = 0.25f;
    memset(&k, 0, sizeof k);
    k.data = x;
    k.dtype = ATTN_F32;
    memset(q, 0, (size_t)q_len * HEADS * DIM * 4);
    for (i = 0; i < q_len * HEADS; i++) q[i * DIM] = by_bias ? 0.0f : 5000.0f;
    for (i = 0; i < LEN * KV_HEADS; i++) x[i * DIM] = -200;
    for (i = 0; i < LEN; i++) slots[i] = (int64_t)t.page[i / T_PT] * T_PT + i % T_PT;
    CHECK_EQ(attn_cpu_store(&t.d, &k, NULL, slots, 0, LEN), ATTN_OK);
    if (by_bias) { // strides of 0: one row of it serves all heads and tokens
        t.d.logits.bias.data = x;
        t.d.logits.bias.dtype = ATTN_F32;
        for (i = 0; i < LEN; i++) x[i] = -2.5e5f;
    }
    ref = (double *)memory(8 * (size_t)q_len * HEADS * DIM, 0);
    CHECK_EQ(attn_ref_forward(&t.d, ref, NULL), ATTN_OK);
    CHECK_EQ(table_run(&t, 1), ATTN_OK);
    for (i = 0; i < q_len; i++)
        for (h = 0; h < HEADS; h++) {
            int ok = 1;
            j = t.q_pos0[0] + i + 1;
            lse = -2.5e5 + log((double)j);
            CHECK(fabs((double)t.lse[i * HEADS + h] - lse) <= 0.02); // half an ulp of 2.5e5
            for (c = 0; c < DIM; c++)
                ok &= fabs((double)t.o[(i * HEADS + h) * DIM + c] -
                           ref[(i * HEADS + h) * DIM + c]) <= 2e-6;
            CHECK(ok);
        }
    free(ref);
    free(x);
    table_free(&t);
}

static void fully_masked_rows(void) {
    int i, n, k;
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 3; n++) {
            for (k = 0; k < 4; k++) {
                fully_masked_case((attn_numerics)n, k & 1, k & 2, 1);
                fully_masked_case((attn_numerics)n, k & 1, k & 2, SLOW ? 20 : 40);
            }
            huge_negative_logits((attn_numerics)n, 0, 1);
            huge_negative_logits((attn_numerics)n, 1, 1);
            huge_negative_logits((attn_numerics)n, 0, 9);
            huge_negative_logits((attn_numerics)n, 1, 9);
        }
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

// More queries than keys: refused where nobody said where they stand, exact where somebody did.
static void more_queries_than_keys(void) {
    static const int32_t first[] = {0, 3, 5, 7, 8, 11};
    static const int32_t parents[9] = {-1, 0, 1, 2, 3, 4, 5, 6, 7};
    double ref[9 * HEADS * DIM], ref_lse[9 * HEADS];
    int i, n, k, full;
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 2; n++)
            for (full = 0; full < 2; full++)
                for (k = 0; k < 12; k++) {
                    attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, (attn_numerics)n);
                    table t;
                    int32_t j, h, held = k % 2 ? 3 : 0;
                    table_make(&t, &like, 1, 3, 9);
                    t.kv_pos0[0] = 5; // keys at 5, 6, 7; none at all in every other case
                    t.kv_len[0] = held;
                    t.q_pos0[0] = first[k / 2];
                    t.d.mask.kind = full ? ATTN_MASK_FULL : ATTN_MASK_CAUSAL;
                    CHECK_EQ(attn_ref_forward(&t.d, ref, ref_lse), ATTN_OK);
                    CHECK_EQ(table_run(&t, 1), ATTN_OK);
                    CHECK(near_ref(t.o, ref, 9 * HEADS * DIM, 2e-6));
                    for (j = 0; j < 9; j++) {
                        int none = !held || (!full && first[k / 2] + j < 5);
                        for (h = 0; h < HEADS; h++) {
                            CHECK((t.lse[j * HEADS + h] == -HUGE_VALF) == none);
                            CHECK(none == (ref_lse[j * HEADS + h] < -1e300));
                            if (none) CHECK(t.o[(j * HEADS + h) * DIM] == 0);
                        }
                    }
                    t.kv_pos0[0] = 0; // by default the queries are the last tokens held: 9 of 3
                    t.d.q_pos0 = NULL;
                    CHECK_EQ(attn_validate(&t.d), ATTN_ERR_SHAPE);
                    CHECK_EQ(table_run(&t, 1), ATTN_ERR_SHAPE);
                    CHECK(untouched(&t));
                    t.d.q_pos0 = t.q_pos0; // token trees lie in the cache themselves
                    t.kv_pos0[0] = 20;
                    t.q_pos0[0] = 20 + held - 9;
                    t.d.mask.kind = ATTN_MASK_TREE;
                    t.d.mask.tree_parent = parents;
                    CHECK_EQ(attn_validate(&t.d), ATTN_ERR_MASK);
                    CHECK_EQ(table_run(&t, 1), ATTN_ERR_MASK);
                    CHECK(untouched(&t));
                    table_free(&t);
                }
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

// ---- offsets above 2^31: sparse memory of the size of a large server's

#ifdef HAS_SPARSE

static void *sparse(uint64_t bytes) { // zero pages that cost nothing until they are written
    int flags = MAP_SHARED | MAP_ANONYMOUS;
    void *m;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    m = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (m == MAP_FAILED) {
        printf("  %.0f GiB of address space needed\n", (double)bytes / 1073741824.0);
        CHECK(m != MAP_FAILED);
        return NULL;
    }
    return m;
}

typedef struct place { // where 300 tokens of one sequence and 20 queries lie
    const char *name;
    attn_dtype kv;
    attn_layout layout;
    int32_t n_pages, page_tokens, id[20]; // n_pages 0: contiguous
    int32_t heads, kv_heads, dim;
    int64_t stride_token, stride_head, page_bytes;             // of K and V
    int64_t q_token, q_head, o_token, o_head, b_token, b_head; // of Q, O and the bias
} place;

// Ids and strides are such that two places meet when an offset in elements or bytes is cut to 31
// or 32 bits.
#define FAR_IDS                                                                                    \
    {0, 8388608, 1, 2097153, 4194305, 8388609, 2, 1048578, 8388610, 4194306,                       \
     3, 4194303, 4194307, 8388607, 8388611, 4, 2097156, 4194308, 8388612, 6291460}
#define SLOT_IDS {16777217, 33554433, 1}
static const place places[] = {
    {"page ids, token-major f32", ATTN_F32, ATTN_TOKEN_MAJOR, 8388616, 16, FAR_IDS, 4, 2, 16, 0, 0,
     0, 0, 0, 0, 0, 0, 0},
    {"page ids, head-major bf16", ATTN_BF16, ATTN_HEAD_MAJOR, 8388616, 16, FAR_IDS, 4, 2, 16, 0, 0,
     0, 0, 0, 0, 0, 0, 0},
    {"page ids, k16 i8", ATTN_I8, ATTN_K16, 8388616, 16, FAR_IDS, 4, 2, 16, 0, 0, 0, 0, 0, 0, 0, 0,
     0},
    {"slots", ATTN_I4, ATTN_TOKEN_MAJOR, 33554440, 128, SLOT_IDS, 1, 1, 8, 0, 0, 0, 0, 0, 0, 0, 0,
     0},
    {"page bytes", ATTN_F16, ATTN_HEAD_MAJOR, 20, 16,
     {7, 3, 19, 0, 11, 5, 13, 1, 17, 2, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18}, 4, 2, 16, 0, 0,
     1073741824, 0, 0, 0, 0, 0, 0},
    {"token stride", ATTN_F32, ATTN_TOKEN_MAJOR, 0, 300, {0}, 4, 2, 16, 16777216, 0, 0, 0, 0, 0, 0,
     0, 0},
    {"token stride, scales", ATTN_F8E4M3, ATTN_TOKEN_MAJOR, 0, 300, {0}, 4, 2, 16, 16777216, 0, 0,
     0, 0, 0, 0, 0, 0},
    {"head stride", ATTN_F16, ATTN_HEAD_MAJOR, 0, 300, {0}, 6, 3, 16, 0, 2147483648, 0, 0, 0, 0, 0,
     0, 0},
    {"long page, head-major", ATTN_BF16, ATTN_HEAD_MAJOR, 0, 134217728, {0}, 6, 3, 16, 0, 0, 0, 0,
     0, 0, 0, 0, 0},
    {"long page, k16", ATTN_F32, ATTN_K16, 0, 134217728, {0}, 6, 3, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {"long page, k16 scales", ATTN_I8, ATTN_K16, 0, 134217728, {0}, 6, 3, 16, 0, 0, 0, 0, 0, 0, 0,
     0, 0},
    {"q and o tokens", ATTN_F32, ATTN_TOKEN_MAJOR, 0, 300, {0}, 4, 2, 16, 0, 0, 0, 268435456, 0,
     268435456, 0, 268435456, 0},
    {"q and o heads", ATTN_F32, ATTN_TOKEN_MAJOR, 0, 300, {0}, 4, 2, 16, 0, 0, 0, 0, 2147483648, 0,
     2147483648, 0, 2147483648}};

enum { FAR_KV = 300, FAR_Q = 20 };

static uint64_t far_bytes(int64_t token, int64_t head, int64_t heads, int64_t dim) {
    if (!token) token = heads * dim;
    if (!head) head = dim;
    return 4 * (uint64_t)(token * (FAR_Q - 1) + head * (heads - 1) + FAR_KV) + 4096;
}

// Runs the problem on every ISA into out (n_isas, FAR_Q, heads, dim), the reference into ref.
static void far_run(const place *p, int near_by, float *out, double *ref) {
    attn_desc d = shape(p->kv, p->layout, ATTN_NUMERICS_FAST);
    int32_t start[2] = {0, FAR_Q}, len = FAR_KV, i, t, h, e;
    int64_t slots[FAR_KV], qt, qh, ot, oh, bt, bh;
    uint64_t size[5];
    line l = say(8, FAR_KV, 91, 1000);
    void *m[5];
    float *rows;
    test_rng r = {92};
    d.n_seq = 1;
    d.q_start = start;
    d.kv.kv_len = &len;
    d.n_heads = p->heads;
    d.n_kv_heads = p->kv_heads;
    d.head_dim = p->dim;
    d.kv.n_pages = p->n_pages && !near_by ? p->n_pages : 1;
    d.kv.page_tokens = near_by ? 304 : p->page_tokens;
    if (p->n_pages && !near_by) d.kv.page_table = p->id, d.kv.page_table_stride = 20;
    if (!near_by) {
        d.kv.k.stride_token = d.kv.v.stride_token = p->stride_token;
        d.kv.k.stride_head = d.kv.v.stride_head = p->stride_head;
        d.kv.k.page_bytes = d.kv.v.page_bytes = p->page_bytes;
        d.q.stride_token = p->q_token, d.q.stride_head = p->q_head;
        d.o.stride_token = p->o_token, d.o.stride_head = p->o_head;
    }
    d.logits.bias.dtype = ATTN_F32;
    d.logits.bias.stride_token = !near_by && p->b_token ? p->b_token : FAR_KV;
    d.logits.bias.stride_head = near_by || !p->b_head ? FAR_KV * FAR_Q : p->b_head;
    qt = d.q.stride_token ? d.q.stride_token : p->heads * p->dim;
    qh = d.q.stride_head ? d.q.stride_head : p->dim;
    ot = d.o.stride_token ? d.o.stride_token : p->heads * p->dim;
    oh = d.o.stride_head ? d.o.stride_head : p->dim;
    bt = d.logits.bias.stride_token, bh = d.logits.bias.stride_head;
    for (i = 0; i < 2; i++) {
        uint64_t page = p->page_bytes && !near_by ? (uint64_t)p->page_bytes
                                                  : (uint64_t)attn_kv_page_bytes(&d, i);
        size[i] = page * (uint64_t)d.kv.n_pages;
    }
    size[2] = far_bytes(d.q.stride_token, d.q.stride_head, p->heads, p->dim);
    size[3] = far_bytes(d.o.stride_token, d.o.stride_head, p->heads, p->dim);
    size[4] = far_bytes(bt, bh, p->heads, FAR_KV);
    for (i = 0; i < 5; i++)
        if (!(m[i] = sparse(size[i]))) return;
    d.kv.k.data = m[0], d.kv.v.data = m[1], d.q.data = m[2], d.o.data = m[3];
    d.logits.bias.data = m[4];
    for (i = 0; i < FAR_KV; i++) {
        int32_t pt = d.kv.page_tokens;
        slots[i] = (d.kv.page_table ? (int64_t)p->id[i / pt] : 0) * pt + i % pt;
    }
    CHECK_EQ(attn_validate(&d), ATTN_OK);
    CHECK_EQ(store(&d, &l, 0, FAR_KV, slots), ATTN_OK);
    rows = (float *)memory(4 * (size_t)(FAR_Q * p->heads * p->dim), 0);
    content(&l, ROW_Q, FAR_KV - FAR_Q, FAR_KV, p->heads * p->dim, rows);
    for (t = 0; t < FAR_Q; t++)
        for (h = 0; h < p->heads; h++) {
            for (e = 0; e < p->dim; e++)
                ((float *)m[2])[t * qt + h * qh + e] = rows[(t * p->heads + h) * p->dim + e];
            for (e = 0; e < FAR_KV; e++)
                ((float *)m[4])[t * bt + h * bh + e] = (float)test_uniform(&r, -1, 1);
        }
    CHECK_EQ(attn_ref_forward(&d, ref, NULL), ATTN_OK);
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        CHECK_EQ(run(&d, 1), ATTN_OK);
        for (t = 0; t < FAR_Q; t++)
            for (h = 0; h < p->heads; h++)
                for (e = 0; e < p->dim; e++) *out++ = ((float *)m[3])[t * ot + h * oh + e];
    }
    free(rows);
    if (d.kv.page_table) { // copies and saved rows go as far
        size_t bytes = attn_kv_rows_bytes(&d, 0, 3);
        attn_page_copy c[2] = {{0, 0, 3}, {0, 0, 3}};
        uint8_t a[4096], b[4096];
        int32_t last = (FAR_KV - 1) / p->page_tokens;
        c[0].src = p->id[0], c[0].dst = p->id[last], c[1].src = p->id[last], c[1].dst = p->id[1];
        for (i = 0; i < 2; i++) {
            CHECK_EQ(attn_kv_read_rows(&d, i, p->id[0], 0, 3, a), ATTN_OK);
            if (!i) CHECK_EQ(attn_cpu_copy_pages(&d, c, 2), ATTN_OK);
            CHECK_EQ(attn_kv_read_rows(&d, i, p->id[1], 0, 3, b), ATTN_OK);
            CHECK(memcmp(a, b, bytes) == 0);
        }
    }
    for (i = 0; i < 5; i++) munmap(m[i], (size_t)size[i]);
}

static void offsets_above_2_31(void) {
    size_t i, n, far = sizeof places / sizeof places[0];
    for (i = 0; i < far; i++) {
        const place *p = &places[i];
        size_t row = (size_t)(FAR_Q * p->heads * p->dim);
        float *out[2];
        double *ref[2];
        for (n = 0; n < 2; n++) {
            out[n] = (float *)memory(4 * row * (size_t)n_isas, 0);
            ref[n] = (double *)memory(8 * row, 0);
            far_run(p, (int)n, out[n], ref[n]);
        }
        if (!CHECK(memcmp(out[0], out[1], 4 * row * (size_t)n_isas) == 0))
            printf("  %s\n", p->name);
        if (!CHECK(memcmp(ref[0], ref[1], 8 * row) == 0)) printf("  %s, reference\n", p->name);
        for (n = 0; n < 2; n++) free(out[n]), free(ref[n]);
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

#else
static void offsets_above_2_31(void) { CHECK(sizeof(int64_t) == 8); } // needs 64-bit addresses
#endif

// Ids that are no pages: found wherever they stand below kv_len, of no matter behind it.
static void page_table_out_of_bounds(void) {
    static const int32_t bad[] = {T_PAGES, -1, INT32_MIN, INT32_MAX, T_PAGES + 1000};
    enum { LEN = 276 }; // 18 pages in use
    int32_t layout, i, s, j, was;
    int64_t slots[8];
    for (layout = 0; layout < 3; layout++) {
        attn_desc like = shape(ATTN_BF16, (attn_layout)layout, ATTN_NUMERICS_FAST);
        attn_plan_params params;
        attn_plan *plan = NULL;
        table t;
        uint64_t want;
        size_t bytes;
        void *mem, *scratch, *partials;
        table_make(&t, &like, 3, LEN, 2);
        CHECK_EQ(table_run(&t, 1), ATTN_OK);
        want = table_hash(&t, 0, t.n_tokens);
        attn_cpu_plan_params(&t.d, 1, &params);
        bytes = attn_plan_bytes(&t.d, &params);
        mem = memory(bytes, 0);
        CHECK_EQ(attn_plan_build(&t.d, &params, mem, bytes, &plan), ATTN_OK);
        scratch = memory(attn_cpu_scratch_bytes(&t.d, plan), 0);
        partials = memory(params.partial_bytes, 0);
        for (i = 0; i < 5; i++)
            for (s = 0; s < 3; s++) {
                for (j = 18; j < 48; j++) t.page[s * 48 + j] = bad[i]; // behind kv_len
                CHECK_EQ(table_run(&t, 1), ATTN_OK);
                CHECK(table_hash(&t, 0, t.n_tokens) == want);
                for (j = 0; j < 18; j++) {
                    was = t.page[s * 48 + j];
                    t.page[s * 48 + j] = bad[i];
                    CHECK_EQ(attn_validate(&t.d), ATTN_ERR_PAGE);
                    if (j == 0 || j == 9 || j == 17) {
                        attn_result r = ATTN_OK;
                        int32_t k;
                        CHECK_EQ(table_run(&t, 1), ATTN_ERR_PAGE);
                        CHECK(untouched(&t));
                        CHECK_EQ(attn_ref_forward(&t.d, (double *)scratch, NULL), ATTN_ERR_PAGE);
                        CHECK_EQ(attn_plan_update(plan, &t.d, NULL), ATTN_ERR_PAGE);
                        // spoiled after planning, as another thread or a device might
                        for (k = 0; k < plan->n_tasks && r == ATTN_OK; k++)
                            r = attn_cpu_run(&t.d, plan, k, 1, partials, scratch);
                        CHECK_EQ(r, ATTN_ERR_PAGE);
                    }
                    if (j == 17) {
                        CHECK_EQ(attn_kv_slots(&t.d, slots), ATTN_ERR_PAGE);
                        CHECK_EQ(store(&t.d, t.text + s, 0, 6, NULL), ATTN_ERR_PAGE);
                    }
                    t.page[s * 48 + j] = was;
                }
            }
        slots[0] = (int64_t)T_PAGES * T_PT; // slots, rows and copies are held to the same bound
        CHECK_EQ(store(&t.d, t.text, 0, 1, slots), ATTN_ERR_PAGE);
        CHECK_EQ(attn_kv_read_rows(&t.d, 0, T_PAGES, 0, 1, scratch), ATTN_ERR_PAGE);
        CHECK_EQ(attn_kv_write_rows(&t.d, 1, T_PAGES, 0, 1, scratch), ATTN_ERR_PAGE);
        CHECK_EQ(table_run(&t, 1), ATTN_OK);
        CHECK(table_hash(&t, 0, t.n_tokens) == want); // nothing was written by any of it
        t.d.kv.page_table = NULL; // contiguous: sequence s is page s
        t.d.kv.n_pages = 2;
        CHECK_EQ(attn_validate(&t.d), ATTN_ERR_PAGE);
        free(mem), free(scratch), free(partials);
        table_free(&t);
    }
}

static const attn_dtype kv_types[7] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                       ATTN_F8E5M2, ATTN_I8,  ATTN_I4};

// One token decoded with n held has the bits of row n - 1 of a prefill at once.
static void decode_case(attn_dtype kv, attn_layout layout, attn_numerics numerics,
                        attn_dtype q_type) {
    static const int32_t at[] = {1, 2, 15, 16, 17, 33, 100, 255, 256, 257, 270};
    enum { LEN = 270 };
    attn_desc d = shape(kv, layout, numerics);
    line l = say(6, LEN, 101, 1000), part = l;
    uint8_t *all, *one;
    float *lse, one_lse[HEADS];
    size_t row, i, n = sizeof at / sizeof at[0];
    d.q.dtype = d.o.dtype = q_type;
    d.head_dim = 32;
    row = row_bytes(&d);
    all = (uint8_t *)memory(row * LEN, 0);
    one = (uint8_t *)memory(row, 0);
    lse = (float *)memory(4 * LEN * HEADS, 0);
    fresh(&d, &l, LEN, all, lse);
    for (i = 0; i < n; i++) {
        size_t last = (size_t)at[i] - 1;
        part.n = at[i];
        fresh(&d, &part, 1, one, one_lse);
        if (!CHECK(memcmp(one, all + row * last, row) == 0 &&
                   memcmp(one_lse, lse + HEADS * last, 4 * HEADS) == 0))
            printf("  %s, %s, layout %d, row %d, %s\n", attn_cpu_isa_name(attn_cpu_get_isa()),
                   attn_dtype_name(kv), (int)layout, at[i], attn_cpu_executor(&d));
    }
    free(all), free(one), free(lse);
}

static void decode_is_last_prefill_row(void) {
    int i, n, k, layout;
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 3; n++)
            for (k = 0; k < 7; k++)
                for (layout = 0; layout < 3; layout++) {
                    if (SLOW && (i + n + k + layout) % 3) continue;
                    decode_case(kv_types[k], (attn_layout)layout, (attn_numerics)n, ATTN_F32);
                    if (kv_types[k] == ATTN_BF16) // the bf16 dot product, where there is one
                        decode_case(kv_types[k], (attn_layout)layout, (attn_numerics)n, ATTN_BF16);
                }
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

// ---- windows, sinks, evicted fronts and rings under chunked prefill

// Queries [from, to) of l, keys [kv_pos0, held) in pages of pt dealt backwards, compared with rows
// from .. of all. Pages before the front are not there.
static int chunk_agrees(const attn_desc *like, const line *l, int32_t from, int32_t to,
                        int32_t kv_pos0, int32_t held, int32_t pt, const uint8_t *all) {
    attn_desc d = *like;
    int32_t start[2] = {0, 0}, len = held - kv_pos0, n, i, page[MAX_LEN], ok;
    int64_t slots[MAX_LEN];
    size_t row = row_bytes(&d);
    start[1] = to - from;
    n = (len + pt - 1) / pt;
    for (i = 0; i < n; i++) page[i] = n - i;
    d.n_seq = 1;
    d.q_start = start;
    d.q_pos0 = &from;
    d.kv.kv_len = &len;
    d.kv.kv_pos0 = &kv_pos0;
    d.kv.page_table = page;
    d.kv.page_table_stride = n + 1;
    d.kv.page_tokens = pt;
    d.kv.n_pages = n + 1;
    d.kv.k.data = memory(attn_kv_page_bytes(&d, 0) * (size_t)(n + 1), 0xff);
    d.kv.v.data = memory(attn_kv_page_bytes(&d, 1) * (size_t)(n + 1), 0xff);
    d.q.data = memory(4 * (size_t)((to - from) * d.n_heads * d.head_dim), 0);
    d.o.data = memory(row * (size_t)(to - from), 0xff);
    for (i = 0; i < len; i++) slots[i] = (int64_t)page[i / pt] * pt + i % pt;
    CHECK_EQ(store(&d, l, kv_pos0, held, slots), ATTN_OK);
    queries(&d, l, from, to, d.q.data);
    CHECK_EQ(run(&d, 1 + from % 3), ATTN_OK);
    ok = CHECK(memcmp(d.o.data, all + row * (size_t)from, row * (size_t)(to - from)) == 0);
    if (!ok)
        printf("  queries %d..%d of keys %d..%d, left %d right %d sinks %d\n", from, to, kv_pos0,
               held, d.mask.window_left, d.mask.window_right, d.mask.n_sink);
    free(d.kv.k.data), free(d.kv.v.data), free(d.q.data), free(d.o.data);
    return ok;
}

// A ring of pages: the tokens of a chunk overwrite the oldest page that no window reaches.
static void ring_case(const attn_desc *like, const line *l, int32_t chunk, int32_t pt,
                      const uint8_t *all) {
    attn_desc d = *like;
    int32_t window = d.mask.window_left, n = (window + chunk + pt - 1) / pt + 1, from, to, i;
    int32_t start[2] = {0, 0}, len, kv_pos0 = 0, page[64];
    int64_t slots[MAX_LEN];
    size_t row = row_bytes(&d);
    d.n_seq = 1;
    d.q_start = start;
    d.q_pos0 = &from;
    d.kv.kv_len = &len;
    d.kv.kv_pos0 = &kv_pos0;
    d.kv.page_table = page;
    d.kv.page_table_stride = 64;
    d.kv.page_tokens = pt;
    d.kv.n_pages = n;
    d.kv.k.data = memory(attn_kv_page_bytes(&d, 0) * (size_t)n, 0xff);
    d.kv.v.data = memory(attn_kv_page_bytes(&d, 1) * (size_t)n, 0xff);
    d.q.data = memory(4 * (size_t)(chunk * d.n_heads * d.head_dim), 0);
    d.o.data = memory(row * (size_t)chunk, 0xff);
    for (from = 0; from < l->n; from = to) {
        to = from + chunk < l->n ? from + chunk : l->n;
        kv_pos0 = from - (window - 1) > 0 ? (from - (window - 1)) / pt * pt : 0;
        len = to - kv_pos0;
        for (i = 0; i < 64; i++) page[i] = (kv_pos0 / pt + i) % n;
        if (!CHECK((len + pt - 1) / pt <= n)) break;
        start[1] = to - from;
        for (i = from; i < to; i++) slots[i - from] = (int64_t)(i / pt % n) * pt + i % pt;
        CHECK_EQ(store(&d, l, from, to, slots), ATTN_OK);
        queries(&d, l, from, to, d.q.data);
        CHECK_EQ(run(&d, 1), ATTN_OK);
        if (!CHECK(memcmp(d.o.data, all + row * (size_t)from, row * (size_t)(to - from)) == 0)) {
            printf("  ring of %d pages, window %d, chunk %d from %d\n", n, window, chunk, from);
            break;
        }
    }
    free(d.kv.k.data), free(d.kv.v.data), free(d.q.data), free(d.o.data);
}

// left, right: fields of the mask (n + 1). dense: chunk borders at every offset round the edges.
static void window_case(const attn_desc *like, int32_t left, int32_t right, int32_t sinks,
                        int dense) {
    attn_desc d = *like;
    enum { LEN = 290 };
    line l = say(2, LEN, 111, 1000);
    int32_t c, front, lo;
    uint8_t *all;
    double *ref;
    d.mask.window_left = left;
    d.mask.window_right = right;
    d.mask.n_sink = sinks;
    if (right) d.mask.kind = ATTN_MASK_FULL; // queries in chunks, the keys are all there
    all = (uint8_t *)memory(row_bytes(&d) * LEN, 0);
    ref = (double *)memory(8 * LEN * HEADS * DIM, 0);
    fresh_at(&d, &l, 0, LEN, LEN, all, NULL, NULL);
    if ((dense || right) && d.kv.k.dtype == ATTN_F32) {
        fresh_at(&d, &l, 0, LEN, LEN, NULL, NULL, ref);
        CHECK(near_ref((const float *)(const void *)all, ref, LEN * HEADS * DIM, 4e-6));
    }
    for (c = 1; c < LEN; c++) {
        int edge = c % 16 <= 1 || c % 16 == 15 || (c >= 250 && c <= 262);
        if (!(edge && (dense || c % 7 == 0)) && c != 256) continue;
        if (SLOW && c % 5 && c != 256 && c != 255) continue;
        if (!chunk_agrees(&d, &l, c, LEN, 0, LEN, 16, all)) break;
        if (c % 3 && !chunk_agrees(&d, &l, 0, c, 0, right ? LEN : c, 7, all)) break;
        lo = left && !sinks ? c - (left - 1) : 0; // what no query from c on sees
        for (front = lo - 1; front <= lo && dense; front++)
            if (front > 0 && !chunk_agrees(&d, &l, c, LEN, front, LEN, 16, all)) break;
        if (lo >= 16 && !chunk_agrees(&d, &l, c, LEN, lo / 16 * 16, LEN, 16, all)) break;
    }
    free(all);
    free(ref);
}

static void window_edges_chunked(void) {
    static const int32_t lefts[] = {0, 1, 2, 16, 17, 33, 100, 255, 256, 257, 289};
    static const int32_t sinks[] = {0, 1, 4, 16, 20, 256};
    int i, n;
    size_t w, s;
    for (i = 0; i < n_isas; i++) {
        int best = isas[i] == (int)isas[n_isas - 1];
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 2; n++) {
            attn_desc d = shape(n || best ? ATTN_F32 : ATTN_I8, ATTN_TOKEN_MAJOR, (attn_numerics)n);
            for (w = 0; w < sizeof lefts / sizeof lefts[0]; w++)
                for (s = 0; s < sizeof sinks / sizeof sinks[0]; s++) {
                    if ((!best || n || SLOW) && (w * 5 + s + (size_t)i) % 9) continue;
                    window_case(&d, lefts[w], 0, sinks[s], best && !n && (w + s) % 2 == 0);
                    if ((w + s) % 4) continue;
                    window_case(&d, lefts[w], 1 + 16 * (int32_t)(w % 3), sinks[s], 0);
                }
        }
        if (SLOW && !best) continue;
        for (w = 1; w < 7; w++) { // long after the ring went round
            attn_desc d = shape(w % 2 ? ATTN_F16 : ATTN_I8, ATTN_HEAD_MAJOR,
                                (attn_numerics)(w % 2));
            line l = say(2, 600, 112, 1000);
            uint8_t *all = (uint8_t *)memory(row_bytes(&d) * 600, 0);
            d.mask.window_left = lefts[w];
            fresh(&d, &l, 600, all, NULL);
            ring_case(&d, &l, 1 + 36 * (int32_t)(w % 3), 16, all);
            ring_case(&d, &l, 48, 16, all);
            ring_case(&d, &l, 7, 5, all);
            free(all);
        }
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

// ---- namespaces

static int row_bytes_moved(void *user, int32_t page, int32_t place, int32_t n, void *rows,
                           int writing) {
    const attn_desc *d = &((engine *)user)->d;
    uint8_t *v = (uint8_t *)rows + attn_kv_rows_bytes(d, 0, 1) * (size_t)n;
    if (writing)
        return attn_kv_write_rows(d, 0, page, place, n, rows) ||
               attn_kv_write_rows(d, 1, page, place, n, v);
    return attn_kv_read_rows(d, 0, page, place, n, rows) ||
           attn_kv_read_rows(d, 1, page, place, n, v);
}
static int read_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    return row_bytes_moved(user, page, place, n, rows, 0);
}
static int write_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    return row_bytes_moved(user, page, place, n, rows, 1);
}
static int copy_page(void *user, const attn_page_copy *c) {
    return attn_cpu_copy_pages(&((engine *)user)->d, c, 1);
}

static int32_t common_pages(engine *e, int32_t a, int32_t b) {
    int32_t x[MAX_LEN], y[MAX_LEN], i, j, n = 0;
    int32_t nx = attn_tree_pages(e->t, a, x, MAX_LEN), ny = attn_tree_pages(e->t, b, y, MAX_LEN);
    for (i = 0; i < nx; i++)
        for (j = 0; j < ny; j++) n += x[i] == y[j];
    return n;
}

// The same tokens under another namespace: no hit, no common page, not even through a blob.
static void namespaces_case(void) {
    static const uint64_t spaces[] = {0, 1, 0xffffffffu, (uint64_t)1 << 32, (uint64_t)7 << 40,
                                      0xffffffffffffffffu};
    enum { N = 6 };
    attn_desc like = shape(ATTN_F8E4M3, ATTN_TOKEN_MAJOR, ATTN_NUMERICS_FAST);
    engine e;
    line l[N], other;
    int32_t s[N], i, j, hit, n;
    size_t token_bytes, bytes;
    void *blob;
    engine_make(&e, &like, 40, 8);
    for (i = 0; i < N; i++) {
        l[i] = say(spaces[i], 21, 121, 4);
        l[i].token[0] = 0; // like the namespace that a narrow key would confuse with it
        CHECK_EQ(attn_tree_match(e.t, l[i].ns, l[i].token, 21), 0);
        s[i] = engine_insert(&e, l + i, &hit);
        if (!CHECK(s[i] >= 0)) return;
        CHECK_EQ(hit, 0);
        for (j = 0; j < i; j++) CHECK_EQ(common_pages(&e, s[i], s[j]), 0);
    }
    CHECK(engine_step(&e, s, N, 2, 1));
    for (i = 0; i < N; i++) { // letting one go leaves the others' hits alone, and only its own
        engine_release(&e, s[i], 0);
        for (j = 0; j < N; j++)
            CHECK_EQ(attn_tree_match(e.t, l[j].ns, l[j].token, 21), j <= i ? 0 : 21);
    }
    CHECK_EQ(e.t->pool.n_free, 40);
    // a blob of namespace 1 in namespace 2, beside the same tokens of namespace 1 and a part of
    // them in 2
    l[0] = say(1, 21, 122, 4);
    l[1] = l[0];
    l[1].ns = 2;
    other = branch(&l[1], 11, 6, 123);
    s[0] = engine_insert(&e, l, NULL);
    token_bytes = attn_kv_rows_bytes(&e.d, 0, 1) + attn_kv_rows_bytes(&e.d, 1, 1);
    bytes = attn_tree_save_bytes(e.t, s[0], token_bytes);
    blob = malloc(bytes);
    CHECK_EQ(attn_tree_save(e.t, s[0], token_bytes, read_rows, &e, blob, bytes), ATTN_OK);
    CHECK_EQ(attn_tree_load(e.t, 2, token_bytes, write_rows, copy_page, &e, blob, bytes, &s[1]),
             ATTN_OK);
    CHECK_EQ(common_pages(&e, s[0], s[1]), 0);
    CHECK_EQ(e.t->pool.n_free, 40 - 6);
    CHECK_EQ(attn_tree_match(e.t, 2, l[0].token, 21), 21);
    CHECK_EQ(attn_tree_match(e.t, 3, l[0].token, 21), 0);
    CHECK(engine_step(&e, s, 1, 3, 1));
    { // what was loaded are the rows of namespace 1, in pages of its own
        int32_t a[3], b[3];
        uint8_t ra[8192], rb[8192];
        CHECK_EQ(attn_tree_pages(e.t, s[0], a, 3), 3);
        CHECK_EQ(attn_tree_pages(e.t, s[1], b, 3), 3);
        for (i = 0; i < 3; i++)
            for (j = 0; j < 2; j++) {
                n = i < 2 ? 8 : 5;
                CHECK_EQ(attn_kv_read_rows(&e.d, j, a[i], 0, n, ra), ATTN_OK);
                CHECK_EQ(attn_kv_read_rows(&e.d, j, b[i], 0, n, rb), ATTN_OK);
                CHECK(memcmp(ra, rb, attn_kv_rows_bytes(&e.d, j, n)) == 0);
            }
    }
    CHECK_EQ(attn_tree_release(e.t, s[1], 0), ATTN_OK);
    s[1] = engine_insert(&e, &other, &hit); // namespace 2 has none of it any more
    CHECK_EQ(hit, 0);
    CHECK(engine_step(&e, s, 2, 3, 1));
    CHECK_EQ(attn_tree_pin(e.t, 3, l[0].token, 21, 1), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_pin(e.t, 1, l[0].token, 21, 1), ATTN_OK);
    CHECK_EQ(attn_tree_pin(e.t, 2, l[0].token, 21, -1), ATTN_ERR_NOT_FOUND);
    engine_release(&e, s[1], 1);
    CHECK_EQ(attn_tree_evict(e.t, -1, &n), ATTN_OK); // the pin of 1 does not hold 2
    CHECK_EQ(attn_tree_match(e.t, 2, other.token, other.n), 0);
    CHECK_EQ(attn_tree_match(e.t, 1, l[0].token, 21), 21);
    free(blob);
    engine_free(&e);
}

static void namespace_separation(void) {
    namespaces_case();
    hash_and = 0; // where all keys are looked at
    namespaces_case();
    hash_and = 0xffffffffu;
}

// ==== further classes, from the reference systems

// An engine that keeps a running maximum for fp8 decodes old tokens with new scales: whatever is
// stored later, a stored token's bytes and the rows that see only it stay as they were.
static void scales_of_stored_tokens(void) {
    int k, layout, i;
    for (k = 0; k < 7; k++)
        for (layout = 0; layout < 3; layout++) {
            attn_desc like = shape(kv_types[k], (attn_layout)layout, ATTN_NUMERICS_FAST);
            uint8_t before[2][4096], after[4096];
            table t;
            uint64_t want;
            float big[KV_HEADS * DIM];
            attn_tensor x;
            int64_t slot;
            memset(&x, 0, sizeof x);
            x.data = big;
            x.dtype = ATTN_F32;
            table_make(&t, &like, 1, 9, 9); // 9 of 16 slots of page 0
            CHECK_EQ(table_run(&t, 1), ATTN_OK);
            want = table_hash(&t, 0, 9);
            for (i = 0; i < 2; i++)
                CHECK_EQ(attn_kv_read_rows(&t.d, i, 0, 0, 9, before[i]), ATTN_OK);
            for (i = 0; i < KV_HEADS * DIM; i++) big[i] = 30000.0f;
            for (slot = 9; slot < 16; slot++)
                CHECK_EQ(attn_cpu_store(&t.d, &x, &x, &slot, 0, 1), ATTN_OK);
            for (i = 0; i < 2; i++) {
                CHECK_EQ(attn_kv_read_rows(&t.d, i, 0, 0, 9, after), ATTN_OK);
                CHECK(memcmp(before[i], after, attn_kv_rows_bytes(&t.d, i, 9)) == 0);
            }
            CHECK_EQ(table_run(&t, 1), ATTN_OK);
            CHECK(table_hash(&t, 0, 9) == want);
            table_free(&t);
        }
}

// A tile of rows that holds three sequences and more: each must get its own keys and its own rows
// of the mask, although all stand at the same positions.
static void short_sequences_in_a_tile(void) {
    static const int32_t ids[] = {0, 1, 2, 3, 0, 2, 1, 3};
    static const int64_t starts[] = {0, 4, 6, 8};
    static const int32_t rows[3] = {0, 1, 2};
    int i, n, lists;
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 2; n++)
            for (lists = 0; lists < 2; lists++) {
                attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, (attn_numerics)n);
                double ref[9 * HEADS * DIM];
                attn_plan_params params;
                attn_plan *plan = NULL;
                table t;
                int share;
                table_make(&t, &like, 3, 300, 3);
                if (lists) { // another list row for each sequence
                    attn_block_list *b = &t.d.mask.blocks;
                    b->row_block = 512, b->kv_block = 64, b->n_lists = 1, b->n_rows = 3;
                    b->row_start = starts, b->block = ids, b->seq_row = rows;
                    memcpy(t.page + 48, t.page, 4 * 17); // 272 tokens in common: one shared span
                    memcpy(t.page + 96, t.page, 4 * 17);
                }
                CHECK_EQ(attn_ref_forward(&t.d, ref, NULL), ATTN_OK);
                for (share = 0; share < 3; share++) {
                    size_t bytes;
                    void *mem, *scratch, *partials;
                    int32_t k;
                    attn_cpu_plan_params(&t.d, 1, &params);
                    params.share = share;
                    bytes = attn_plan_bytes(&t.d, &params);
                    mem = memory(bytes, 0);
                    memset(t.o, 0xff, 9 * HEADS * DIM * 4);
                    CHECK_EQ(attn_plan_build(&t.d, &params, mem, bytes, &plan), ATTN_OK);
                    if (lists && share == 2) CHECK(plan->n_shared > 0);
                    scratch = memory(attn_cpu_scratch_bytes(&t.d, plan), 0xff);
                    partials = memory(params.partial_bytes, 0xff);
                    for (k = 0; k < plan->n_tasks; k++)
                        CHECK_EQ(attn_cpu_run(&t.d, plan, k, 1, partials, scratch), ATTN_OK);
                    CHECK_EQ(attn_cpu_merge(&t.d, plan, 0, plan->n_merges, partials), ATTN_OK);
                    CHECK(near_ref(t.o, ref, 9 * HEADS * DIM, 4e-6));
                    free(mem), free(scratch), free(partials);
                }
                table_free(&t);
            }
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

// Lists per query head inside a GQA group: not all heads follow the first one's.
static void per_head_lists_in_a_group(void) {
    enum { LEN = 290 };
    static const int64_t starts[HEADS * 2] = {0, 2, 2, 3, 3, 7, 7, 7};
    static const int32_t ids[] = {0, 4, 2, 0, 1, 3, 4};
    int i, n, q_len;
    double ref[9 * HEADS * DIM];
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 2; n++)
            for (q_len = 1; q_len < 10; q_len += 8) {
                attn_desc like = shape(ATTN_F16, ATTN_HEAD_MAJOR, (attn_numerics)n);
                attn_block_list *b;
                int32_t j;
                table t;
                table_make(&t, &like, 1, LEN, q_len);
                b = &t.d.mask.blocks;
                b->row_block = 512, b->kv_block = 64, b->n_lists = HEADS, b->n_rows = 1;
                b->row_start = starts, b->block = ids;
                CHECK_EQ(attn_ref_forward(&t.d, ref, NULL), ATTN_OK);
                CHECK_EQ(table_run(&t, 1), ATTN_OK);
                CHECK(near_ref(t.o, ref, q_len * HEADS * DIM, 4e-6));
                for (j = 0; j < q_len; j++) { // the last head's list is empty
                    CHECK(t.lse[j * HEADS + 3] == -HUGE_VALF);
                    CHECK(t.lse[j * HEADS] != t.lse[j * HEADS + 1]);
                }
                table_free(&t);
            }
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
}

// A draft is rolled back and others take its slots, across page borders and beside a fork that
// keeps it.
static void rollback_of_drafts(void) {
    int32_t base, draft, back, fork, s[2], i, token[24], more[2];
    for (base = 1; base < 18; base += 3)
        for (draft = 1; draft < 20; draft += 4)
            for (fork = 0; fork < 2; fork++) {
                attn_desc like = shape(ATTN_F32, ATTN_TOKEN_MAJOR, ATTN_NUMERICS_FAST);
                engine e;
                line l = say(1, base, 131, 1000);
                int32_t n = 1;
                engine_make(&e, &like, 16, 8);
                s[0] = engine_insert(&e, &l, NULL);
                for (i = 0; i < draft; i++) token[i] = 2000 + i;
                CHECK(engine_append(&e, s[0], token, draft));
                if (fork) {
                    CHECK_EQ(attn_tree_fork(e.t, s[0], &s[1]), ATTN_OK);
                    e.used[s[1]] = 1;
                    e.live[s[1]] = e.live[s[0]];
                    n = 2;
                }
                for (i = 0; i < 2; i++) { // accept some, twice
                    back = e.live[s[0]].n - 1 - (draft - 1) / (i + 1);
                    if (back < 0) back = 0;
                    CHECK_EQ(attn_tree_truncate(e.t, s[0], back), ATTN_OK);
                    e.live[s[0]].n = back;
                    poison(&e);
                    CHECK_EQ(attn_tree_check(e.t), ATTN_OK);
                    if (back) CHECK(engine_step(&e, s, n, 2, 1));
                    more[0] = 3000 + i, more[1] = 4000;
                    CHECK(engine_append(&e, s[0], more, 2));
                    CHECK(engine_step(&e, s, n, 3, 1));
                }
                for (i = 0; i < n; i++) engine_release(&e, s[i], 0);
                CHECK_EQ(e.t->pool.n_free, 16);
                engine_free(&e);
            }
}

// Page copies are carried out late: until they are acknowledged neither page may be given away,
// nor the slots that they read, whatever is released, evicted, truncated or appended meanwhile.
static void copies_carried_out_late(void) {
    int32_t round, i, hit, s[3], n_copies, page[4], token[16];
    test_rng r = {141};
    for (round = 0; round < 200; round++) {
        attn_desc like = shape(ATTN_BF16, (attn_layout)(round % 2), ATTN_NUMERICS_FAST);
        engine e;
        line l[3], fill;
        attn_page_copy c[4];
        int32_t cut = 1 + round % 15, n = cut + 1 + test_below(&r, 16 - cut);
        engine_make(&e, &like, 5, 16);
        l[0] = say(1, n, 142 + (uint64_t)round, 1000);
        l[1] = branch(l, cut, 3, 500);
        s[0] = engine_insert(&e, l, NULL);
        n_copies = 0;
        CHECK_EQ(attn_tree_insert(e.t, 1, l[1].token, l[1].n, &s[1], &hit, c, 4, &n_copies),
                 ATTN_OK);
        CHECK_EQ(n_copies, 1);
        e.used[s[1]] = 1;
        e.live[s[1]] = l[1];
        // the source loses its owner; others want its place and its slots
        if (round % 3 == 0) {
            CHECK_EQ(attn_tree_release(e.t, s[0], round & 1), ATTN_OK);
            e.used[s[0]] = 0;
        } else {
            CHECK_EQ(attn_tree_truncate(e.t, s[0], test_below(&r, cut + 1)), ATTN_OK);
            e.live[s[0]].n = attn_tree_length(e.t, s[0]);
            for (i = 0; i < 16; i++) token[i] = 7000 + i;
            if (attn_tree_append(e.t, s[0], token, 3, &hit, c, 4, &n_copies) == ATTN_OK) {
                memcpy(e.live[s[0]].token + e.live[s[0]].n, token, 12);
                e.live[s[0]].n += 3;
                engine_store(&e, s[0], e.live[s[0]].n - 3 + hit);
            }
        }
        CHECK_EQ(attn_tree_evict(e.t, -1, NULL), ATTN_OK);
        fill = say(9, 16 * e.t->pool.n_free, 143, 1000);
        s[2] = -1;
        if (fill.n && CHECK_EQ(attn_tree_insert(e.t, 9, fill.token, fill.n, &s[2], &hit, c, 4,
                                                &n_copies), ATTN_OK)) {
            e.used[s[2]] = 1;
            e.live[s[2]] = fill;
            engine_store(&e, s[2], 0);
            CHECK(attn_tree_pages(e.t, s[2], page, 4) > 0);
            for (i = 0; i < fill.n / 16; i++) CHECK(page[i] != c[0].src && page[i] != c[0].dst);
        }
        engine_store(&e, s[1], cut);
        CHECK_EQ(attn_tree_check(e.t), ATTN_OK);
        engine_copy(&e, c, n_copies);
        poison(&e);
        engine_step_all(&e, 4);
        for (i = 0; i < MAX_LIVE; i++)
            if (e.used[i]) engine_release(&e, i, 0);
        CHECK_EQ(attn_tree_evict(e.t, -1, NULL), ATTN_OK);
        CHECK_EQ(e.t->pool.n_free, 5);
        engine_free(&e);
    }
}

// A plan kept in place while sequences take each other's slots, with the same lengths: what was
// common to two neighbours may be so no more.
enum { SWAP_LINES = 6, SWAP_SEQS = 4, SWAP_LEN = 560, SWAP_PAGES = 35 };

static void swap_run(const attn_desc *d, const attn_plan *plan, float *o) {
    void *scratch = memory(attn_cpu_scratch_bytes(d, plan), 0xff);
    void *partials = memory(attn_plan_partial_bytes(plan), 0xff);
    attn_desc to = *d;
    to.o.data = o;
    CHECK_EQ(attn_cpu_run(&to, plan, 0, plan->n_tasks, partials, scratch), ATTN_OK);
    CHECK_EQ(attn_cpu_merge(&to, plan, 0, plan->n_merges, partials), ATTN_OK);
    free(scratch), free(partials);
}

static void swap_case(attn_layout layout, int32_t q_len, uint64_t seed) {
    // lines 0 and 1 have two spans in common, 2 and 3 as well; 4: none; 5: one span with 0 and 1
    static const int32_t from[SWAP_LINES] = {0, 0, 2, 2, 4, 0};
    static const int32_t common[SWAP_LINES] = {0, 512, 0, 512, 0, 256};
    static const int32_t first[6][SWAP_SEQS] = {{0, 1, 2, 3}, {2, 3, 0, 1}, {2, 3, 0, 4},
                                                {0, 1, 2, 3}, {0, 5, 2, 3}, {4, 1, 2, 3}};
    // in the fourth no neighbours lose anything; that 2 and 3 could share now is not looked for
    static const int is_rebuilt[6] = {0, 0, 1, 0, 1, 1};
    int32_t page[SWAP_LINES][SWAP_PAGES], table[SWAP_SEQS][SWAP_PAGES], q_start[SWAP_SEQS + 1];
    int32_t kv_len[SWAP_SEQS], now[SWAP_SEQS], n_pages = 0, i, j, s, step;
    size_t row = (size_t)q_len * HEADS * DIM, bytes;
    float *want = (float *)memory(4 * row * SWAP_LINES, 0);
    float *o = (float *)memory(4 * row * SWAP_SEQS, 0);
    float *o2 = (float *)memory(4 * row * SWAP_SEQS, 0);
    int64_t slots[SWAP_LEN];
    attn_desc d = shape(ATTN_F32, layout, ATTN_NUMERICS_FAST);
    attn_plan_params params;
    attn_plan *plan = NULL, *anew;
    void *mem, *mem2;
    line l[SWAP_LINES];
    test_rng r;
    int rebuilt;
    r.state = seed;
    for (i = 0; i < SWAP_LINES; i++) {
        l[i] = common[i] ? branch(&l[from[i]], common[i], SWAP_LEN - common[i], seed + (uint64_t)i)
                         : say(1, SWAP_LEN, seed + (uint64_t)i, 1000);
        for (j = 0; j < SWAP_PAGES; j++)
            page[i][j] = j < common[i] / T_PT ? page[from[i]][j] : n_pages++;
    }
    d.n_seq = SWAP_SEQS;
    d.q_start = q_start;
    d.kv.kv_len = kv_len;
    d.kv.page_table = &table[0][0];
    d.kv.page_table_stride = SWAP_PAGES;
    d.kv.page_tokens = T_PT;
    d.kv.n_pages = n_pages;
    d.kv.k.data = memory(attn_kv_page_bytes(&d, 0) * (size_t)n_pages, 0xff);
    d.kv.v.data = memory(attn_kv_page_bytes(&d, 1) * (size_t)n_pages, 0xff);
    d.q.data = memory(4 * row * SWAP_SEQS, 0);
    d.o.data = o;
    for (q_start[0] = s = 0; s < SWAP_SEQS; s++) {
        q_start[s + 1] = q_start[s] + q_len;
        kv_len[s] = SWAP_LEN;
        memcpy(table[s], page[s], sizeof table[s]);
    }
    for (i = 0; i < SWAP_LINES; i++) {
        for (j = 0; j < SWAP_LEN; j++) slots[j] = (int64_t)page[i][j / T_PT] * T_PT + j % T_PT;
        CHECK_EQ(store(&d, &l[i], 0, SWAP_LEN, slots), ATTN_OK);
        fresh(&d, &l[i], q_len, want + row * (size_t)i, NULL);
    }
    attn_cpu_plan_params(&d, 1, &params);
    params.share = 2;
    bytes = attn_plan_bytes(&d, &params);
    mem = memory(bytes, 0), mem2 = memory(bytes, 0);
    CHECK_EQ(attn_plan_build(&d, &params, mem, bytes, &plan), ATTN_OK);
    for (step = 0; step < 30; step++) {
        for (s = 0; s < SWAP_SEQS; s++) {
            now[s] = step < 6 ? first[step][s] : test_below(&r, SWAP_LINES);
            memcpy(table[s], page[now[s]], sizeof table[s]);
            queries(&d, &l[now[s]], SWAP_LEN - q_len, SWAP_LEN,
                    (float *)d.q.data + row * (size_t)s);
        }
        CHECK_EQ(attn_plan_update(plan, &d, &rebuilt), ATTN_OK);
        if (step < 6) CHECK_EQ(rebuilt, is_rebuilt[step]);
        CHECK_EQ(attn_plan_build(&d, &params, mem2, bytes, &anew), ATTN_OK);
        if (rebuilt) CHECK_EQ(plan->n_shared, anew->n_shared);
        swap_run(&d, plan, o);
        swap_run(&d, anew, o2);
        CHECK(memcmp(o, o2, 4 * row * SWAP_SEQS) == 0);
        for (s = 0; s < SWAP_SEQS; s++)
            CHECK(memcmp(o + row * (size_t)s, want + row * (size_t)now[s], 4 * row) == 0);
    }
    free(mem), free(mem2), free(want), free(o), free(o2);
    free(d.kv.k.data), free(d.kv.v.data), free(d.q.data);
}

static void plan_kept_over_a_swap(void) {
    int layout;
    for (layout = 0; layout < 3; layout++) {
        swap_case((attn_layout)layout, 1, 900);
        swap_case((attn_layout)layout, 5, 950);
    }
}

static const struct {
    const char *name;
    void (*run)(void);
} atlas[] = {{"hash_collision", hash_collision},
             {"refcount_under_split", refcount_under_split},
             {"stale_kv_after_eviction", stale_kv_after_eviction},
             {"equal_positions", equal_positions},
             {"page_zero_is_real", page_zero_is_real},
             {"fully_masked_rows", fully_masked_rows},
             {"more_queries_than_keys", more_queries_than_keys},
             {"offsets_above_2_31", offsets_above_2_31},
             {"page_table_out_of_bounds", page_table_out_of_bounds},
             {"decode_is_last_prefill_row", decode_is_last_prefill_row},
             {"window_edges_chunked", window_edges_chunked},
             {"namespace_separation", namespace_separation},
             {"scales_of_stored_tokens", scales_of_stored_tokens},
             {"short_sequences_in_a_tile", short_sequences_in_a_tile},
             {"per_head_lists_in_a_group", per_head_lists_in_a_group},
             {"rollback_of_drafts", rollback_of_drafts},
             {"copies_carried_out_late", copies_carried_out_late},
             {"plan_kept_over_a_swap", plan_kept_over_a_swap}};

int main(int argc, char **argv) {
    size_t i, n = sizeof atlas / sizeof atlas[0];
    int k, wanted, found = argc - 1;
    CHECK_EQ(attn_cpu_open(), ATTN_OK);
    for (k = ATTN_CPU_SCALAR; k < ATTN_CPU_ISA_COUNT; k++)
        if (attn_cpu_has((attn_cpu_isa)k)) isas[n_isas++] = k;
    for (i = 0; i < n; i++) {
        long long failed = test_failed, passed = test_passed;
        for (wanted = argc < 2, k = 1; k < argc; k++)
            if (strcmp(argv[k], atlas[i].name) == 0) wanted = 1, found--;
        if (!wanted) continue;
        printf("%s: ", atlas[i].name);
        fflush(stdout); // a crash is then this one's
        atlas[i].run();
        if (test_failed > failed)
            printf("BUG %s: %lld checks failed\n", atlas[i].name, test_failed - failed);
        else printf("%lld checks\n", test_passed - passed);
    }
    CHECK_EQ(found, 0); // a name that is none of these
    return TEST_END();
}

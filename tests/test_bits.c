/* The contract on bits: a row's result does not depend on threads, row tiles, workspace, the rest
   of the batch, page size, layout, placement, sharing, chunking, eviction of what nobody sees, nor
   under PORTABLE on the ISA; what a plan says it visits; and what NaN, Inf and empty rows may do.
   test_bits [SEED [COUNT]]   COUNT: worlds (default 42)
   cc -std=c11 -O2 -pthread -I. -Itests tests/test_bits.c -o test_bits -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"
#include <pthread.h>

#define MAX_SEQ 64
#define N_FOCUS 6 // sequences whose rows are hashed; the others only keep them company

// ---- a world: sequences, their contents and one mask, said without any placement

enum feature {
    F_CAUSAL, F_WINDOW, F_WINDOW_SINK, F_LOGITS, F_BLOCKS, F_BITS_HEADS, F_STRIDE, F_VSLASH, F_FULL,
    F_TREE, F_LISTS, F_LISTS_HEADS, F_LISTS_WINDOW, N_FEATURES
};
static const char *const feature_names[N_FEATURES] = {
    "causal",    "window",      "window+sink", "alibi+cap+sink", "blocks",
    "bits/head", "stride+keep", "vslash",      "full",           "tree",
    "lists",     "lists/head",  "lists+window"};

typedef struct world {
    uint64_t seed;
    int feature;
    int32_t n_heads, n_kv_heads, head_dim, v_head_dim;
    attn_dtype k, v, q, o;
    attn_numerics numerics;
    int32_t len[MAX_SEQ], q0[MAX_SEQ],
        shared; // sequences 0, 1, 2, 5 and every third one share a prefix
    attn_mask mask;
    attn_logits logits;
    int32_t seq_row[MAX_SEQ], parent[MAX_SEQ][64];
    void *mem[12];
    int n_mem;
} world;

static void *take(world *w, size_t bytes) {
    void *m = calloc(1, bytes + 64);
    if (!m || w->n_mem == 12) abort();
    return w->mem[w->n_mem++] = m;
}

static int shares(int32_t s) { return s < 3 || s == 5 || s % 3 == 0; }

// Values in [-2, 2), a function of what they are for only.
static void fill_row(const world *w, int kind, int32_t s, int32_t pos, float gain, float *x,
                     int32_t n) {
    test_rng r;
    int32_t i;
    int64_t who = kind < 2 && shares(s) && pos < w->shared ? 1000 : s;
    r.state = w->seed ^ ((uint64_t)(who * 4 + kind) << 40) ^ ((uint64_t)(uint32_t)pos << 8);
    for (i = 0; i < n; i++) x[i] = gain * (float)((int32_t)(test_u64(&r) >> 48) - 32768) / 16384.0f;
}

// Lists of small blocks, about half of the keys, as spans are gathered from.
static void world_lists(world *w, test_rng *r, int32_t n_lists) {
    static const int32_t rows[] = {8, 20, 32, 64};
    attn_block_list *b = &w->mask.blocks;
    int32_t l, i, j, s, n_blocks;
    int64_t n = 0, at, *start, *end = NULL;
    int32_t *ids;
    b->row_block = rows[test_below(r, 4)];
    b->kv_block = test_below(r, 4) ? 1 + test_below(r, 15) : 16 << test_below(r, 3);
    b->n_lists = n_lists;
    b->n_rows = 1280 / b->row_block + MAX_SEQ;
    n_blocks = 1280 / b->kv_block;
    start = (int64_t *)take(w, 8 * (size_t)n_lists * (size_t)(b->n_rows + 1));
    ids = (int32_t *)take(w, 4 * (size_t)n_lists * (size_t)b->n_rows * (size_t)n_blocks);
    if (test_below(r, 2)) end = (int64_t *)take(w, 8 * (size_t)n_lists * (size_t)(b->n_rows + 1));
    for (l = 0; l < n_lists; l++)
        for (i = 0; i <= b->n_rows; i++) {
            at = l * (b->n_rows + 1) + i;
            if (end && i < b->n_rows) n = ((int64_t)l * b->n_rows + i) * n_blocks; // gaps behind
            start[at] = n;
            for (j = 0; i < b->n_rows && i % 11 != 3 && j < n_blocks; j++) // some are empty
                if (test_below(r, 2)) ids[n++] = j;
            if (end) end[at] = n;
        }
    b->row_end = end;
    for (s = 0; s < MAX_SEQ; s++) w->seq_row[s] = s;
    b->row_start = start;
    b->block = ids;
    w->mask.keep_sink = test_below(r, 2) * test_below(r, 40);
    w->mask.keep_recent = test_below(r, 2) * test_below(r, 300);
}

static void world_blocks(world *w, test_rng *r, int32_t n_lists, int bits) {
    attn_block_list *b = &w->mask.blocks;
    int32_t l, i, j, s;
    int64_t n = 0, *start;
    int32_t *ids;
    uint64_t *words;
    b->row_block = 32;
    b->kv_block = 48;
    b->n_lists = n_lists;
    b->n_rows = 40 + MAX_SEQ;
    start = (int64_t *)take(w, 8 * (size_t)n_lists * (size_t)(b->n_rows + 1));
    ids = (int32_t *)take(w, 4 * (size_t)n_lists * (size_t)b->n_rows * 24);
    for (l = 0; l < n_lists; l++)
        for (i = 0; i <= b->n_rows; i++) {
            start[l * (b->n_rows + 1) + i] = n;
            for (j = 0; i < b->n_rows && j < 24; j++)
                if (test_below(r, 3) == 0) ids[n++] = j;
        }
    for (s = 0; s < MAX_SEQ; s++) w->seq_row[s] = s;
    b->row_start = start;
    b->block = ids;
    if (!bits) return;
    b->bits_rows = 4;
    b->bits_cols = 12;
    words = (uint64_t *)take(w, 8 * (size_t)(n + 1));
    for (i = 0; i < n; i++) words[i] = test_u64(r);
    b->bits = words;
}

static void world_vslash(world *w, test_rng *r) {
    attn_vertical_slash *v = &w->mask.vslash;
    int64_t *c = (int64_t *)take(w, 16), *g = (int64_t *)take(w, 16);
    int32_t *col = (int32_t *)take(w, 4 * 200), *diag = (int32_t *)take(w, 4 * 200), j;
    v->block = 8;
    v->n_lists = 1;
    for (j = 0; j < 160; j++) {
        if (test_below(r, 8) == 0) col[c[1]++] = j;
        if (test_below(r, 8) == 0) diag[g[1]++] = j;
    }
    v->col_start = c, v->col = col, v->diag_start = g, v->diag = diag;
}

static void world_mask(world *w, test_rng *r) {
    attn_mask *m = &w->mask;
    float *f = (float *)take(w, 8 * (size_t)w->n_heads);
    int32_t i, s;
    int t = w->feature;
    for (i = 0; i < 2 * w->n_heads; i++) f[i] = (float)test_uniform(r, 0, i < w->n_heads ? 0.1 : 2);
    if (t == F_LISTS) world_lists(w, r, test_below(r, 2) ? 1 : w->n_kv_heads);
    if (t == F_LISTS_HEADS || t == F_LISTS_WINDOW) world_lists(w, r, w->n_heads);
    if (t == F_LISTS && test_below(r, 2)) w->logits.alibi = f;
    if (t == F_WINDOW || t == F_WINDOW_SINK || t == F_LISTS_WINDOW)
        m->window_left = 1 + 60 + test_below(r, 200);
    if (t == F_WINDOW_SINK) m->n_sink = 1 + test_below(r, 20);
    if (t == F_LOGITS || t == F_WINDOW_SINK || t == F_TREE) w->logits.alibi = f;
    if (t == F_LOGITS || t == F_BLOCKS) w->logits.softcap = 5, w->logits.sink = f + w->n_heads;
    if (t == F_BLOCKS) world_blocks(w, r, 1, 0), m->keep_recent = test_below(r, 2) * 10;
    if (t == F_BITS_HEADS) world_blocks(w, r, w->n_heads, 1);
    if (t == F_VSLASH) world_vslash(w, r);
    if (t == F_FULL) m->kind = ATTN_MASK_FULL, m->window_right = 1 + test_below(r, 90);
    if (t == F_STRIDE) {
        m->stride.block = 16;
        m->stride.local = 3;
        m->stride.stride = 4;
        m->keep_sink = 5;
        m->keep_recent = 20;
    }
    if (t != F_TREE) return;
    m->kind = ATTN_MASK_TREE;
    if (test_below(r, 2)) m->window_left = 100, m->n_sink = 3;
    for (s = 0; s < MAX_SEQ; s++)
        for (i = 0; i < 64; i++) w->parent[s][i] = s % 4 == 3 ? i - 1 : test_below(r, i + 1) - 1;
}

static void world_make(world *w, uint64_t seed, int index) {
    static const attn_dtype types[][4] = { // K, V, Q, O
        {ATTN_F32, ATTN_F32, ATTN_F32, ATTN_F32},    {ATTN_BF16, ATTN_BF16, ATTN_BF16, ATTN_BF16},
        {ATTN_F16, ATTN_F16, ATTN_F16, ATTN_F16},    {ATTN_I8, ATTN_I8, ATTN_F32, ATTN_F32},
        {ATTN_I4, ATTN_I4, ATTN_F32, ATTN_F32},      {ATTN_F8E4M3, ATTN_F8E4M3, ATTN_F32, ATTN_F32},
        {ATTN_F8E5M2, ATTN_BF16, ATTN_F32, ATTN_BF16}};
    static const int32_t dims[][2] = {{32, 32}, {64, 64}, {16, 40}, {64, 64}, {72, 24}};
    test_rng r;
    int32_t s;
    memset(w, 0, sizeof *w);
    r.state = w->seed = seed + (uint64_t)index * 77777u;
    w->k = types[index % 7][0];
    w->v = types[index % 7][1];
    w->q = types[index % 7][2];
    w->o = types[index % 7][3];
    w->feature = (index + index / 7) % N_FEATURES;
    w->numerics = index / 7 % 2 ? ATTN_NUMERICS_PORTABLE : ATTN_NUMERICS_FAST;
    if (w->k == ATTN_I8 && index / 7 % 4 == 2) w->numerics = ATTN_NUMERICS_APPROX;
    w->n_kv_heads = 1 + index % 2;
    w->n_heads = w->n_kv_heads * (1 + test_below(&r, 4));
    w->head_dim = dims[index % 5][0];
    w->v_head_dim = dims[index % 5][1];
    w->shared = 256 + 48 * test_below(&r, 8);
    for (s = 0; s < MAX_SEQ; s++) {
        w->len[s] = s < N_FOCUS ? 300 + test_below(&r, 450) : 10 + test_below(&r, 500);
        if (shares(s) && w->len[s] <= w->shared) w->len[s] = w->shared + 1 + test_below(&r, 60);
        w->q0[s] = w->len[s] - 1; // decode
    }
    w->q0[0] = 0; // prefill; chunk; verify; prefill; two decodes
    w->q0[1] = w->shared;
    w->q0[2] = w->len[2] - 5;
    w->q0[3] = 0;
    w->len[3] = 40 + test_below(&r, 300);
    if (shares(3) && w->len[3] < w->shared) w->len[3] = w->shared + 7;
    for (s = 0; w->feature == F_TREE && s < MAX_SEQ; s++)
        w->q0[s] = w->len[s] - 1 - (s < N_FOCUS ? test_below(&r, 40) : test_below(&r, 3));
    world_mask(w, &r);
}

static void world_free(world *w) {
    while (w->n_mem) free(w->mem[--w->n_mem]);
}

// ---- a variant: one way to place and compute it

typedef struct variant {
    const char *name;
    int32_t page_tokens, layout, contiguous, own; // own: no page is shared (a miss everywhere)
    int32_t share, threads, workers, row_tile;
    int32_t partials; // 0: the default, 1: room for few rows, 2: none
    int32_t chunk;    // queries of a sequence per step (0: all at once)
    int32_t order;    // batch order: 0 as numbered, 1 reversed, 2 shuffled
    int32_t batch;    // 0: the focus, 1: each of it alone, 2: among 64
    int32_t evict;    // 1: fronts no query sees are gone, 2: the same front for all
    int32_t poison;   // byte that fills what is not stored
    int32_t by_order; // give seq_order
} variant;

static const variant variants[] = {
    {"base", 16, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"2 threads", 16, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"7 threads", 16, 0, 0, 0, 0, 7, 7, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"7 workers, 1 thread, small tiles", 16, 0, 0, 0, 0, 1, 7, 16, 0, 0, 0, 0, 0, 0xff, 0},
    {"never shared compute", 16, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"always shared compute", 16, 0, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"shared, 7 workers, few partials", 16, 0, 0, 0, 2, 2, 7, 0, 1, 0, 0, 0, 0, 0xff, 0},
    {"no partials", 16, 0, 0, 0, 2, 2, 7, 64, 2, 0, 0, 0, 0, 0xff, 0},
    {"tile 16", 16, 0, 0, 0, 2, 1, 3, 16, 0, 0, 0, 0, 0, 0xff, 0},
    {"tile 96", 16, 0, 0, 0, 1, 1, 1, 96, 0, 0, 0, 0, 0, 0xff, 0},
    {"pages of 1", 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"pages of 64", 64, 0, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"pages of 256", 256, 0, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"pages of 37", 37, 1, 0, 0, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"head-major", 16, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"k16", 16, 2, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"k16, pages of 48", 48, 2, 0, 0, 2, 1, 4, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"contiguous", 16, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"contiguous k16", 16, 2, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"own copies", 16, 0, 0, 1, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0xff, 0},
    {"zeros behind", 64, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0x00, 0},
    {"Inf behind", 64, 2, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0x7c, 0},
    {"chunks of 1", 16, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0xff, 0},
    {"chunks of 7", 16, 2, 0, 0, 2, 1, 3, 0, 0, 7, 2, 0, 0, 0xff, 0},
    {"chunks of 512", 64, 1, 0, 1, 0, 1, 1, 0, 0, 512, 0, 0, 0, 0xff, 0},
    {"reversed", 16, 0, 0, 0, 2, 1, 1, 0, 0, 0, 1, 0, 0, 0xff, 0},
    {"shuffled", 16, 0, 0, 0, 2, 1, 5, 0, 0, 0, 2, 0, 0, 0xff, 1},
    {"alone", 16, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0xff, 0},
    {"alone, 7 workers", 256, 2, 0, 0, 0, 2, 7, 0, 0, 0, 0, 1, 0, 0xff, 0},
    {"among 64", 16, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 0, 0xff, 0},
    {"among 64, shared, 7 workers", 16, 2, 0, 0, 2, 2, 7, 0, 0, 0, 2, 2, 0, 0xff, 1},
    {"fronts evicted", 16, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0xff, 0},
    {"fronts evicted, k16", 16, 2, 0, 1, 0, 1, 3, 0, 0, 0, 0, 0, 1, 0xff, 0},
    {"a common front evicted", 16, 0, 0, 0, 2, 1, 3, 0, 0, 0, 0, 0, 2, 0xff, 0}};
#define N_VARIANTS ((int)(sizeof variants / sizeof variants[0]))

// A batch of sequences placed in pages.
typedef struct batch {
    const world *w;
    variant v;
    attn_desc d;
    int32_t n, id[MAX_SEQ]; // logical sequence at each batch index
    int32_t q_start[MAX_SEQ + 1], kv_len[MAX_SEQ], q_pos0[MAX_SEQ], kv_pos0[MAX_SEQ],
        seq_row[MAX_SEQ];
    int32_t seq_order[MAX_SEQ], *table, *parent;
    int64_t row_bytes;
    float *k_rows, *v_rows, *q_rows, *lse;
    int32_t max_tokens;
    test_rng r;
} batch;

static void *aligned(size_t bytes, int fill) {
    void *m = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!m) abort();
    memset(m, fill, (bytes + 127) & ~(size_t)63);
    return m;
}

// The first position any query of the sequence may see under a plain window.
static int32_t first_seen(const world *w, int32_t s) {
    int32_t lo = w->mask.window_left ? w->q0[s] - (w->mask.window_left - 1) : 0;
    return lo > 0 && !w->mask.n_sink ? lo : 0;
}

// Positions [from, to) of batch sequence i into pages.
static void batch_store(batch *b, int32_t i, int32_t from, int32_t to) {
    const world *w = b->w;
    int32_t j, n = to - from, s = b->id[i], pt = b->d.kv.page_tokens;
    int64_t *slot = (int64_t *)malloc(8 * (size_t)(n > 0 ? n : 1));
    attn_tensor k, v;
    if (n > 0) {
        memset(&k, 0, sizeof k);
        memset(&v, 0, sizeof v);
        k.data = b->k_rows, v.data = b->v_rows;
        k.dtype = v.dtype = ATTN_F32;
        for (j = 0; j < n; j++) {
            int32_t held = from + j - b->kv_pos0[i], page;
            page = b->d.kv.page_table ? b->table[i * b->d.kv.page_table_stride + held / pt] : i;
            slot[j] = (int64_t)page * pt + held % pt;
            fill_row(w, 0, s, from + j, 1, b->k_rows + (int64_t)j * w->n_kv_heads * w->head_dim,
                     w->n_kv_heads * w->head_dim);
            fill_row(w, 1, s, from + j, 1, b->v_rows + (int64_t)j * w->n_kv_heads * w->v_head_dim,
                     w->n_kv_heads * w->v_head_dim);
        }
        CHECK_EQ(attn_cpu_store(&b->d, &k, &v, slot, 0, n), ATTN_OK);
    }
    free(slot);
}

static void batch_tables(batch *b) {
    const world *w = b->w;
    attn_kv *kv = &b->d.kv;
    int32_t i, j, pt = b->v.page_tokens, most = 0, n_pages = 0, *deck, at = 0, common;
    for (i = 0; i < b->n; i++) {
        int32_t held = w->len[b->id[i]] - b->kv_pos0[i];
        if (b->v.contiguous) pt = pt > (held + 15) / 16 * 16 ? pt : (held + 15) / 16 * 16;
        if (held > most) most = held;
    }
    kv->page_tokens = pt;
    most = (most + pt - 1) / pt + 1;
    kv->n_pages = b->v.contiguous ? b->n : b->n * most;
    b->table = (int32_t *)calloc((size_t)(b->n * most), 4);
    deck = (int32_t *)calloc((size_t)(b->n * most), 4);
    for (i = 0; i < b->n * most; i++) deck[i] = i;
    for (i = b->n * most - 1; i > 0; i--) {
        int32_t o = test_below(&b->r, i + 1), t = deck[i];
        deck[i] = deck[o], deck[o] = t;
    }
    for (i = 0; i < b->n; i++) {
        int32_t leader = -1; // an earlier sequence with the same prefix and the same front
        for (j = 0; j < i && leader < 0 && !b->v.own; j++)
            if (shares(b->id[i]) && shares(b->id[j]) && b->kv_pos0[i] == b->kv_pos0[j]) leader = j;
        common = leader < 0 ? 0 : (w->shared - b->kv_pos0[i]) / pt;
        for (j = 0; j < most; j++)
            b->table[i * most + j] = j < common ? b->table[leader * most + j] : deck[at++];
    }
    n_pages = kv->n_pages;
    free(deck);
    if (!b->v.contiguous) kv->page_table = b->table;
    kv->page_table_stride = most;
    kv->k.data = aligned(attn_kv_page_bytes(&b->d, 0) * (size_t)n_pages, b->v.poison);
    kv->v.data = aligned(attn_kv_page_bytes(&b->d, 1) * (size_t)n_pages, b->v.poison);
}

static void batch_make(batch *b, const world *w, const variant *v, const int32_t *ids, int32_t n) {
    attn_desc *d = &b->d;
    int32_t i, t = 0;
    size_t heads = (size_t)w->n_heads;
    memset(b, 0, sizeof *b);
    b->w = w;
    b->v = *v;
    b->n = n;
    b->r.state = w->seed + (uint64_t)(v - variants) * 31u + (uint64_t)ids[0];
    d->n_seq = n;
    d->n_heads = w->n_heads;
    d->n_kv_heads = w->n_kv_heads;
    d->head_dim = w->head_dim;
    d->v_head_dim = w->v_head_dim;
    d->q_start = b->q_start;
    d->q_pos0 = b->q_pos0;
    d->kv.kv_len = b->kv_len;
    d->kv.kv_pos0 = b->kv_pos0;
    d->kv.layout = (attn_layout)v->layout;
    d->kv.k.dtype = w->k;
    d->kv.v.dtype = w->v;
    d->q.dtype = w->q;
    d->o.dtype = w->o;
    d->mask = w->mask;
    d->logits = w->logits;
    d->numerics = w->numerics;
    for (i = 0; i < n; i++) {
        b->id[i] = ids[i];
        b->seq_row[i] = w->seq_row[ids[i]];
        b->kv_pos0[i] = v->evict == 1 ? first_seen(w, ids[i]) - test_below(&b->r, 20) : 0;
        if (b->kv_pos0[i] < 0) b->kv_pos0[i] = 0;
        t += w->len[ids[i]] - w->q0[ids[i]];
    }
    if (v->evict == 2) {
        int32_t lo = 1 << 30;
        for (i = 0; i < n; i++) lo = first_seen(w, ids[i]) < lo ? first_seen(w, ids[i]) : lo;
        for (i = 0; i < n; i++) b->kv_pos0[i] = lo;
    }
    if (w->mask.blocks.row_start) d->mask.blocks.seq_row = b->seq_row;
    b->max_tokens = t;
    b->k_rows = (float *)calloc((size_t)w->n_kv_heads * (size_t)w->head_dim * 1024, 4);
    b->v_rows = (float *)calloc((size_t)w->n_kv_heads * (size_t)w->v_head_dim * 1024, 4);
    b->q_rows = (float *)calloc(heads * (size_t)w->head_dim, 4);
    b->lse = (float *)calloc((size_t)t * heads + 1, 4);
    b->parent = (int32_t *)calloc((size_t)t + 1, 4);
    d->q.data = aligned((size_t)t * heads * (size_t)w->head_dim * 4, 0);
    d->o.data = aligned((size_t)t * heads * (size_t)w->v_head_dim * 4, 0xff);
    d->lse = b->lse;
    if (d->mask.kind == ATTN_MASK_TREE) d->mask.tree_parent = b->parent;
    batch_tables(b);
}

static void batch_free(batch *b) {
    free(b->d.kv.k.data), free(b->d.kv.v.data), free(b->d.q.data), free(b->d.o.data);
    free(b->table), free(b->parent), free(b->lse), free(b->k_rows), free(b->v_rows),
        free(b->q_rows);
}

// ---- what every plan must be: each span of each row exactly once

static void check_plan(const attn_desc *d, const attn_plan *p) {
    int32_t s, i, g, t, h, ok = 1;
    uint8_t *seen;
    size_t end = 0;
    for (s = 0; s < d->n_seq && ok; s++) { // its segments tile its spans
        const attn_plan_seq *q = &p->seq[s];
        int32_t at = q->span0;
        if (q->q_len == 0) continue;
        for (i = 0; i < q->n_chain; i++) {
            const attn_segment *x = &p->segment[p->chain[q->chain + i]];
            ok &= x->seq0 <= q->place && q->place < x->seq0 + x->n_seq;
            // rows behind a window may begin after what others share
            ok &= i == 0 ? x->span0 <= at : x->span0 == attni_max32(at, q->span0);
            ok &= (x->n_slots == 0) == (q->n_chain == 1 && x->n_slots == 0) && x->span0 <= x->span1;
            at = x->span1;
        }
        ok &= q->n_chain > 0 && at >= q->span1;
    }
    CHECK(ok);
    for (g = 0; g < p->n_segments; g++) { // its tasks tile its tokens, once for each KV head
        const attn_segment *x = &p->segment[g];
        seen = (uint8_t *)calloc((size_t)x->n_tokens * (size_t)p->n_kv_heads + 1, 1);
        for (t = 0; t < p->n_tasks; t++)
            for (i = 0; p->task[t].segment == g && i < p->task[t].n_tokens; i++)
                if (p->task[t].first_token + i < x->n_tokens)
                    seen[p->task[t].kv_head * x->n_tokens + p->task[t].first_token + i]++;
                else ok = 0;
        for (h = 0; h < x->n_tokens * p->n_kv_heads; h++) ok &= seen[h] == 1;
        free(seen);
        ok &= x->partial == (int64_t)end; // workspaces lie side by side
        end += (size_t)x->n_slots * (size_t)x->n_tokens * (size_t)p->n_heads;
    }
    CHECK(ok);
    CHECK(end == p->partial_rows && attn_plan_partial_bytes(p) <= p->params.partial_bytes);
    for (t = 1; t < p->n_tasks; t++) ok &= p->task[t - 1].cost >= p->task[t].cost;
    CHECK(ok);
}

// ---- running a plan on threads

typedef struct team {
    const attn_desc *d;
    const attn_plan *p;
    void *partials;
    int32_t *todo, n, next, merging;
    int bad;
} team;

typedef struct member {
    team *t;
    void *scratch;
} member;

static void *work(void *arg) {
    member *m = (member *)arg;
    team *t = m->t;
    for (;;) {
        int32_t i = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        attn_result r;
        if (i >= t->n) return NULL;
        r = t->merging ? attn_cpu_merge(t->d, t->p, t->todo[i], 1, t->partials)
                       : attn_cpu_run(t->d, t->p, t->todo[i], 1, t->partials, m->scratch);
        if (r != ATTN_OK) __atomic_store_n(&t->bad, (int)r, __ATOMIC_RELAXED);
    }
}

static void team_run(team *t, int32_t n, int merging, int32_t threads, member *m, test_rng *r) {
    pthread_t id[8];
    int32_t i;
    t->n = n;
    t->next = 0;
    t->merging = merging;
    t->todo = (int32_t *)malloc(4 * (size_t)n + 4);
    for (i = 0; i < n; i++) t->todo[i] = i;
    for (i = n - 1; i > 0; i--) {
        int32_t j = test_below(r, i + 1), x = t->todo[i];
        t->todo[i] = t->todo[j], t->todo[j] = x;
    }
    for (i = 1; i < threads; i++)
        if (pthread_create(&id[i], NULL, work, &m[i])) abort();
    work(&m[0]);
    for (i = 1; i < threads; i++) pthread_join(id[i], NULL);
    free(t->todo);
}

static void run_plan(const attn_desc *d, const attn_plan *p, int32_t threads, test_rng *r) {
    team t;
    member m[8];
    int32_t i;
    size_t bytes = attn_cpu_scratch_bytes(d, p);
    memset(&t, 0, sizeof t);
    t.d = d;
    t.p = p;
    t.partials = aligned(attn_plan_partial_bytes(p), 0xff);
    for (i = 0; i < threads; i++) {
        m[i].t = &t;
        m[i].scratch = aligned(bytes, 0xff);
    }
    team_run(&t, p->n_tasks, 0, threads, m, r);
    team_run(&t, p->n_merges, 1, threads, m, r);
    CHECK_EQ(t.bad, ATTN_OK);
    for (i = 0; i < threads; i++) free(m[i].scratch);
    free(t.partials);
}

static void variant_params(const batch *b, attn_plan_params *p) {
    attn_cpu_plan_params(&b->d, b->v.workers, p);
    p->share = b->v.share;
    if (b->v.row_tile) p->row_tile = b->v.row_tile;
    if (b->v.partials == 1)
        p->partial_bytes = (size_t)(40 * b->w->n_heads * (b->w->v_head_dim + 2) * 4);
    if (b->v.partials == 2) p->partial_bytes = 0;
}

// ---- one variant of a world: hashes of the focus sequences' rows

typedef struct rows {
    float *x[N_FOCUS]; // (queries, heads, v_head_dim + 1), the LSE last
} rows;

static void rows_make(rows *o, const world *w) {
    int32_t s;
    for (s = 0; s < N_FOCUS; s++)
        o->x[s] = (float *)calloc(
            (size_t)(w->len[s] - w->q0[s]) * (size_t)(w->n_heads * (w->v_head_dim + 1)), 4);
}

static uint64_t rows_hash(const rows *o, const world *w, int32_t s) {
    return problem_hash(o->x[s], (size_t)(w->len[s] - w->q0[s]) *
                                     (size_t)(w->n_heads * (w->v_head_dim + 1)));
}

static void rows_free(rows *o) {
    int32_t s;
    for (s = 0; s < N_FOCUS; s++) free(o->x[s]);
}

// Sets the queries of one step: from done[i] on, at most chunk of each sequence; returns their
// number.
static int32_t batch_step(batch *b, const int32_t *done) {
    const world *w = b->w;
    attn_desc *d = &b->d;
    int32_t i, j, t = 0, e, n = w->n_heads * w->head_dim;
    for (i = 0; i < b->n; i++) {
        int32_t s = b->id[i], left = w->len[s] - done[i];
        if (b->v.chunk && left > b->v.chunk) left = b->v.chunk;
        b->q_start[i] = t;
        b->q_pos0[i] = done[i];
        b->kv_len[i] = done[i] + left - b->kv_pos0[i];
        for (j = 0; j < left; j++, t++) {
            fill_row(w, 2, s, done[i] + j, 2.5f, b->q_rows, n);
            for (e = 0; e < n; e++) attni_put(d->q.data, w->q, (int64_t)t * n + e, b->q_rows[e]);
            if (d->mask.kind == ATTN_MASK_TREE) b->parent[t] = w->parent[s][j];
        }
    }
    b->q_start[b->n] = t;
    return t;
}

static void batch_collect(const batch *b, int32_t *done, rows *out) {
    const world *w = b->w;
    int32_t i, t, h, e, vd = w->v_head_dim;
    for (i = 0; i < b->n; i++) {
        for (t = b->q_start[i]; t < b->q_start[i + 1]; t++)
            for (h = 0; h < w->n_heads && b->id[i] < N_FOCUS; h++) {
                int64_t row = (int64_t)t * w->n_heads + h;
                float *x =
                    out->x[b->id[i]] +
                    ((int64_t)(done[i] + t - b->q_start[i] - w->q0[b->id[i]]) * w->n_heads + h) *
                        (vd + 1);
                for (e = 0; e < vd; e++) x[e] = attni_get(b->d.o.data, w->o, row * vd + e);
                x[vd] = b->lse[row];
            }
        done[i] += b->q_start[i + 1] - b->q_start[i];
    }
}

static void run_batch(const world *w, const variant *v, const int32_t *ids, int32_t n, rows *out) {
    static batch b; // large
    int32_t done[MAX_SEQ], i;
    attn_plan_params params;
    attn_plan *plan;
    batch_make(&b, w, v, ids, n);
    for (i = 0; i < n; i++) { // what the cache held before
        done[i] = w->q0[ids[i]];
        batch_store(&b, i, b.kv_pos0[i], v->chunk ? done[i] : w->len[ids[i]]);
    }
    for (i = 0; i < n; i++) b.seq_order[i] = n - 1 - i;
    if (v->by_order) b.d.seq_order = b.seq_order;
    while (batch_step(&b, done) > 0) {
        size_t bytes;
        void *mem;
        for (i = 0; i < n && v->chunk; i++)
            batch_store(&b, i, done[i], done[i] + b.q_start[i + 1] - b.q_start[i]);
        variant_params(&b, &params);
        bytes = attn_plan_bytes(&b.d, &params);
        mem = aligned(bytes, 0xff);
        plan = NULL;
        if (CHECK_EQ(attn_plan_build(&b.d, &params, mem, bytes, &plan), ATTN_OK)) {
            check_plan(&b.d, plan);
            run_plan(&b.d, plan, v->threads, &b.r);
        }
        free(mem);
        if (!plan) break;
        batch_collect(&b, done, out);
    }
    batch_free(&b);
}

static void run_variant(const world *w, const variant *v, rows *out) {
    int32_t ids[MAX_SEQ], i, n = v->batch == 2 ? MAX_SEQ : N_FOCUS;
    test_rng r;
    r.state = w->seed * 3 + (uint64_t)(v - variants);
    for (i = 0; i < n; i++) ids[i] = v->order == 1 ? n - 1 - i : i;
    for (i = n - 1; i > 0 && v->order == 2; i--) {
        int32_t j = test_below(&r, i + 1), x = ids[i];
        ids[i] = ids[j], ids[j] = x;
    }
    if (v->batch == 1)
        for (i = 0; i < N_FOCUS; i++) run_batch(w, v, &ids[i], 1, out);
    else run_batch(w, v, ids, n, out);
}

static int applies(const world *w, const variant *v) {
    if (v->chunk && (w->mask.kind != ATTN_MASK_CAUSAL)) return 0; // sees what is not yet there
    if (v->evict && w->feature != F_WINDOW && w->feature != F_LISTS_WINDOW) return 0;
    return 1;
}

static int32_t isas[ATTN_CPU_ISA_COUNT], n_isas;

static void one_world(uint64_t seed, int index) {
    static world w;
    rows base, out;
    uint64_t want[N_FOCUS];
    int i, s, first = index % 3 ? n_isas - 1 : index / 3 % n_isas, isa;
    world_make(&w, seed, index);
    rows_make(&base, &w);
    CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[first]), ATTN_OK);
    run_variant(&w, &variants[0], &base);
    for (s = 0; s < N_FOCUS; s++) want[s] = rows_hash(&base, &w, s);
    for (i = 1; i < N_VARIANTS + n_isas; i++) {
        const variant *v = &variants[i < N_VARIANTS ? i : 0];
        int portable = w.numerics == ATTN_NUMERICS_PORTABLE;
        if (!applies(&w, v) || (i >= N_VARIANTS && !portable)) continue;
        isa = i >= N_VARIANTS ? i - N_VARIANTS : first;
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[isa]), ATTN_OK);
        rows_make(&out, &w);
        run_variant(&w, v, &out);
        for (s = 0; s < N_FOCUS; s++) {
            int32_t n = (w.len[s] - w.q0[s]) * w.n_heads * (w.v_head_dim + 1), e;
            if (CHECK(rows_hash(&out, &w, s) == want[s])) continue;
            for (e = 0; attni_bits32(out.x[s][e]) == attni_bits32(base.x[s][e]) && e < n - 1;) e++;
            printf("  seed %llu world %d (k %s v %s q %s o %s, %s, numerics %d, heads %d/%d, d "
                   "%d/%d) %s on %s: "
                   "sequence %d, query %d head %d element %d: %.9g against %.9g\n",
                   (unsigned long long)seed, index, attn_dtype_name(w.k), attn_dtype_name(w.v),
                   attn_dtype_name(w.q), attn_dtype_name(w.o), feature_names[w.feature],
                   (int)w.numerics, w.n_heads, w.n_kv_heads, w.head_dim, w.v_head_dim, v->name,
                   attn_cpu_isa_name((attn_cpu_isa)isas[isa]), s,
                   e / (w.v_head_dim + 1) / w.n_heads, e / (w.v_head_dim + 1) % w.n_heads,
                   e % (w.v_head_dim + 1), (double)out.x[s][e], (double)base.x[s][e]);
        }
        rows_free(&out);
    }
    rows_free(&base);
    world_free(&w);
}

// ---- plan_update: 300 decode steps in one plan's memory, against a fresh plan each step

static uint64_t step_hash(batch *b, const attn_plan *p) {
    size_t n = (size_t)b->q_start[b->n] * (size_t)b->w->n_heads, i;
    size_t vd = (size_t)b->w->v_head_dim;
    float *x = (float *)malloc(4 * n * (vd + 1) + 4);
    uint64_t h;
    memset(b->d.o.data, 0xff, n * vd * (size_t)attn_dtype_bits(b->w->o) / 8);
    memset(b->lse, 0xff, 4 * n);
    run_plan(&b->d, p, b->v.threads, &b->r);
    for (i = 0; i < n * vd; i++) x[i] = attni_get(b->d.o.data, b->w->o, (int64_t)i);
    memcpy(x + n * vd, b->lse, 4 * n);
    h = problem_hash(x, n * (vd + 1));
    free(x);
    return h;
}

static void decode_updates(uint64_t seed, int index) {
    static world w;
    static batch b;
    variant v = variants[0];
    int32_t i, step, ids[N_FOCUS], done[N_FOCUS], first[N_FOCUS], n_rebuilt = 0, n_patched = 0;
    attn_plan_params params, grown;
    attn_plan *plan = NULL, *fresh;
    void *mem, *mem2;
    size_t bytes;
    int rebuilt, ok = 1;
    world_make(&w, seed, index);
    world_free(&w); // another mask, set below
    memset(&w.mask, 0, sizeof w.mask);
    memset(&w.logits, 0, sizeof w.logits);
    if (index % 3 == 1) w.mask.window_left = 130;
    if (index % 3 == 2) w.mask.window_left = 300, w.mask.n_sink = 4;
    w.shared = index % 2 ? 272 : 512;
    for (i = 0; i < N_FOCUS; i++) {
        w.len[i] = (shares(i) ? w.shared : 200) + 1 + 40 * i;
        first[i] = w.len[i];
        w.q0[i] = 0; // tables for the whole run
        w.len[i] += 300;
        ids[i] = i;
    }
    v.layout = index % 3;
    v.share = index % 2 ? 2 : 0;
    v.workers = 1 + index % 4;
    v.by_order = 0;
    batch_make(&b, &w, &v, ids, N_FOCUS);
    for (i = 0; i < N_FOCUS; i++) {
        done[i] = first[i] - 1;
        batch_store(&b, i, 0, w.len[i]);
    }
    b.v.chunk = 1;
    batch_step(&b, done);
    variant_params(&b, &params);
    params.max_kv_len = 1200;
    params.partial_bytes = 1 << 20; // bytes for longer sequences than the first step's
    bytes = attn_plan_bytes(&b.d, &params);
    mem = aligned(bytes, 0xff);
    mem2 = aligned(bytes, 0xff);
    CHECK_EQ(attn_plan_build(&b.d, &params, mem, bytes, &plan), ATTN_OK);
    grown = params;
    for (step = 0; step < 300 && ok && plan; step++) {
        batch_step(&b, done);
        ok &= CHECK_EQ(attn_plan_update(plan, &b.d, &rebuilt), ATTN_OK);
        ok &= CHECK(rebuilt == 0 || rebuilt == 1);
        if (rebuilt) n_rebuilt++;
        else n_patched++;
        check_plan(&b.d, plan);
        fresh = NULL;
        ok &= CHECK_EQ(attn_plan_build(&b.d, &grown, mem2, bytes, &fresh), ATTN_OK);
        if (!ok) break;
        ok &= CHECK(step_hash(&b, plan) == step_hash(&b, fresh));
        if (!ok)
            printf("  seed %llu index %d step %d rebuilt %d\n", (unsigned long long)seed, index,
                   step, rebuilt);
        for (i = 0; i < N_FOCUS; i++) done[i]++;
    }
    CHECK(n_rebuilt > 0 && n_patched > 10 * n_rebuilt); // most steps cross no border
    // a plan that was not updated is stale, and says so before it touches the output
    if (plan) {
        void *scratch = aligned(attn_cpu_scratch_bytes(&b.d, plan), 0);
        void *partials = aligned(attn_plan_partial_bytes(plan), 0);
        size_t n =
            (size_t)b.q_start[b.n] * (size_t)(w.n_heads * w.v_head_dim * attn_dtype_bits(w.o) / 8);
        for (i = 0; i < N_FOCUS; i++) b.kv_len[i]--;
        memset(b.d.o.data, 0x5a, n);
        for (i = 0; i < plan->n_tasks; i++)
            CHECK_EQ(attn_cpu_run(&b.d, plan, i, 1, partials, scratch), ATTN_ERR_STALE);
        while (n > 0 && ((uint8_t *)b.d.o.data)[n - 1] == 0x5a) n--;
        CHECK_EQ(n, 0);
        free(scratch);
        free(partials);
    }
    free(mem);
    free(mem2);
    batch_free(&b);
}

// ---- visits: a prefix shared by 32 rows is read once a step

static void visits(void) {
    enum { N = 32, PREFIX = 4096, PT = 16, OWN = 3 };
    static int32_t table[N][(PREFIX + 512) / PT], q_start[N + 1], kv_len[N];
    int32_t i, j, t, share, own, page = 0;
    attn_desc d;
    uint8_t dummy[64];
    memset(&d, 0, sizeof d);
    d.n_seq = N;
    d.n_heads = 8;
    d.n_kv_heads = 2;
    d.head_dim = 64;
    d.q_start = q_start;
    d.q.data = d.o.data = d.kv.k.data = d.kv.v.data = dummy;
    d.q.dtype = d.o.dtype = ATTN_F32;
    d.kv.k.dtype = d.kv.v.dtype = ATTN_I8;
    d.kv.page_tokens = PT;
    d.kv.kv_len = kv_len;
    d.kv.page_table = &table[0][0];
    d.kv.page_table_stride = (PREFIX + 512) / PT;
    for (j = 0; j < PREFIX / PT; j++, page++)
        for (i = 0; i < N; i++) table[i][j] = page;
    for (i = 0; i < N; i++) {
        q_start[i + 1] = i + 1;
        kv_len[i] = PREFIX + OWN + 7 * i; // some of the private parts cross a span
        for (j = PREFIX / PT; j < (PREFIX + 512) / PT; j++) table[i][j] = page++;
    }
    d.kv.n_pages = page;
    for (own = i = 0; i < N; i++) own += kv_len[i] - PREFIX;
    for (share = 0; share < 3; share++) {
        attn_plan_params params;
        attn_plan *p = NULL;
        size_t bytes;
        void *mem;
        int32_t reads[(PREFIX + 512) / ATTN_SPAN + 1][2];
        attn_cpu_plan_params(&d, 2, &params);
        params.share = share;
        bytes = attn_plan_bytes(&d, &params);
        mem = aligned(bytes, 0);
        if (CHECK_EQ(attn_plan_build(&d, &params, mem, bytes, &p), ATTN_OK)) {
            int64_t alone = 2 * ((int64_t)N * PREFIX + own);
            check_plan(&d, p);
            CHECK_EQ(p->kv_tokens_seen, alone);
            CHECK_EQ(p->kv_tokens_read, share == 1 ? alone : 2 * ((int64_t)PREFIX + own));
            CHECK(share == 1 ? p->n_shared == 0 : p->n_shared >= 1);
            // counted again from the tasks: how often is each span of the prefix visited per head?
            memset(reads, 0, sizeof reads);
            for (t = 0; t < p->n_tasks; t++) {
                const attn_segment *g = &p->segment[p->task[t].segment];
                for (j = g->span0; j < g->span1; j++) reads[j][p->task[t].kv_head]++;
            }
            for (j = 0; j < PREFIX / ATTN_SPAN; j++) // 32 rows x 4 heads fit in one row tile
                for (i = 0; i < 2; i++) CHECK_EQ(reads[j][i], share == 1 ? N : 1);
        }
        free(mem);
    }
}

// ---- NaN, Inf, empty rows, huge scores: small problems by hand, f32 unless said

typedef struct tiny {
    attn_desc d;
    int32_t q_start[4], kv_len[3], q_pos0[3], table[3 * 64];
    float *q, *k, *v, *o, lse[256];
} tiny;

enum { T_HEADS = 2, T_DIM = 16, T_PAGES = 96, T_PT = 16 };

// Three sequences of up to 1024 tokens; pages dealt in order, `common` first ones shared by 0
// and 1.
static void tiny_make(tiny *t, attn_dtype type, int32_t common) {
    int32_t s, j, page = 0;
    attn_desc *d = &t->d;
    size_t rows = (size_t)T_PAGES * T_PT * T_DIM;
    test_rng r = {5};
    memset(t, 0, sizeof *t);
    t->q = (float *)calloc(128 * T_HEADS * T_DIM, 4);
    t->o = (float *)calloc(128 * T_HEADS * T_DIM, 4);
    t->k = (float *)calloc(rows, 4);
    t->v = (float *)calloc(rows, 4);
    d->n_seq = 3;
    d->n_heads = T_HEADS;
    d->n_kv_heads = 1;
    d->head_dim = T_DIM;
    d->q_start = t->q_start;
    d->q_pos0 = t->q_pos0;
    d->q.data = t->q, d->o.data = t->o;
    d->q.dtype = d->o.dtype = ATTN_F32;
    d->lse = t->lse;
    d->kv.kv_len = t->kv_len;
    d->kv.page_table = t->table;
    d->kv.page_table_stride = 64;
    d->kv.page_tokens = T_PT;
    d->kv.n_pages = T_PAGES;
    d->kv.k.dtype = d->kv.v.dtype = type;
    d->kv.k.data = aligned(attn_kv_page_bytes(d, 0) * T_PAGES, 0xff);
    d->kv.v.data = aligned(attn_kv_page_bytes(d, 1) * T_PAGES, 0xff);
    for (s = 0; s < 3; s++)
        for (j = 0; j < 32; j++) t->table[64 * s + j] = s == 1 && j < common ? j : page++;
    test_fill_normal(&r, t->k, rows, 1);
    test_fill_normal(&r, t->v, rows, 1);
    test_fill_normal(&r, t->q, 128 * T_HEADS * T_DIM, 2);
}

static void tiny_free(tiny *t) {
    free(t->q), free(t->k), free(t->v), free(t->o), free(t->d.kv.k.data), free(t->d.kv.v.data);
}

// Row (page * T_PT + place) of k and v into its place, all that have a value.
static void tiny_store(tiny *t) {
    attn_tensor k, v;
    int64_t slot[T_PAGES * T_PT];
    int32_t i;
    memset(&k, 0, sizeof k);
    memset(&v, 0, sizeof v);
    k.data = t->k, v.data = t->v;
    k.dtype = v.dtype = ATTN_F32;
    for (i = 0; i < T_PAGES * T_PT; i++) slot[i] = i;
    CHECK_EQ(attn_cpu_store(&t->d, &k, &v, slot, 0, T_PAGES * T_PT), ATTN_OK);
}

static void tiny_run(tiny *t, int32_t share, int32_t workers) {
    attn_plan_params params;
    attn_plan *p = NULL;
    test_rng r = {9};
    size_t bytes;
    void *mem;
    attn_cpu_plan_params(&t->d, workers, &params);
    params.share = share;
    bytes = attn_plan_bytes(&t->d, &params);
    mem = aligned(bytes, 0);
    memset(t->o, 0xff, 128 * T_HEADS * T_DIM * 4);
    memset(t->lse, 0xff, sizeof t->lse);
    if (CHECK_EQ(attn_plan_build(&t->d, &params, mem, bytes, &p), ATTN_OK))
        run_plan(&t->d, p, 1, &r);
    free(mem);
}

static int any_nan(const float *x, int32_t n) {
    while (n-- > 0)
        if (attni_isnan(x[n])) return 1;
    return 0;
}

static uint64_t tiny_hash(const tiny *t, int32_t token0, int32_t n) {
    return problem_hash(t->o + token0 * T_HEADS * T_DIM, (size_t)(n * T_HEADS * T_DIM)) ^
           problem_hash(t->lse + token0 * T_HEADS, (size_t)(n * T_HEADS)) * 3;
}

// Sequence 0 is short and sees position 250 through its window, 1 is long, holds the same pages and
// does not. in_k: the poison lies in K, else in V.
static void nan_across(attn_dtype type, attn_numerics numerics, int in_k, float bad, int32_t share,
                       int sink) {
    tiny t;
    uint64_t clean0, clean1;
    int32_t e;
    tiny_make(&t, type, 20);
    t.d.numerics = numerics;
    t.d.n_seq = 2;
    t.kv_len[0] = 320 - 7, t.kv_len[1] = 500;
    t.q_start[1] = 1, t.q_start[2] = 4; // one decode row; three rows of the other
    t.q_pos0[0] = 312, t.q_pos0[1] = 497;
    t.d.mask.window_left = 101;
    t.d.mask.n_sink = sink ? 4 : 0; // with sinks the spans in front are visited by both
    tiny_store(&t);
    tiny_run(&t, share, 1);
    clean0 = tiny_hash(&t, 0, 1);
    clean1 = tiny_hash(&t, 1, 3);
    CHECK(!any_nan(t.o, 4 * T_HEADS * T_DIM));
    for (e = 0; e < T_DIM; e += 3) (in_k ? t.k : t.v)[250 * T_DIM + e] = bad;
    tiny_store(&t);
    tiny_run(&t, share, 1);
    CHECK(tiny_hash(&t, 0, 1) != clean0); // it was there to be seen
    if (attni_isnan(bad)) CHECK(any_nan(t.o, T_HEADS * T_DIM));
    if (!CHECK(tiny_hash(&t, 1, 3) == clean1))
        printf("  NaN across: %s numerics %d in %s share %d sink %d %s\n", attn_dtype_name(type),
               (int)numerics, in_k ? "K" : "V", share, sink, attn_cpu_executor(&t.d));
    tiny_free(&t);
}

// NaN in K reaches only rows that see it, within one sequence as well.
static void nan_k_rows(attn_dtype type, attn_numerics numerics) {
    tiny t;
    uint64_t clean[40];
    int32_t i;
    tiny_make(&t, type, 0);
    t.d.numerics = numerics;
    t.d.n_seq = 1;
    t.kv_len[0] = 300;
    t.q_start[1] = 40;
    t.q_pos0[0] = 260;
    t.d.mask.window_left = 21;
    tiny_store(&t);
    tiny_run(&t, 0, 1);
    for (i = 0; i < 40; i++) clean[i] = tiny_hash(&t, i, 1);
    t.k[265 * T_DIM + 3] = attni_float(0x7fc00000u);
    tiny_store(&t);
    tiny_run(&t, 0, 1);
    for (i = 0; i < 40; i++) {
        int sees = 260 + i >= 265 && 260 + i - 20 <= 265;
        if (sees) CHECK(any_nan(t.o + i * T_HEADS * T_DIM, T_HEADS * T_DIM));
        else CHECK(tiny_hash(&t, i, 1) == clean[i]);
    }
    tiny_free(&t);
}

// Rows that see nothing, first, middle and last, with and without a sink logit, split or not.
static void empty_rows(attn_dtype o_type, attn_numerics numerics, int with_sink, int32_t workers) {
    static const float sink[T_HEADS] = {1.25f, -7.5f};
    static const int32_t block[5] = {0, 1, 2, 3, 17};
    int64_t start[41];
    tiny t;
    int32_t i, h, e;
    tiny_make(&t, ATTN_F32, 0);
    tiny_store(&t);
    t.d.numerics = numerics;
    t.d.n_seq = 1;
    t.d.o.dtype = o_type;
    t.kv_len[0] = 300;
    t.q_start[1] = 40;
    t.q_pos0[0] = 260;
    t.d.mask.blocks.row_block = 1;
    t.d.mask.blocks.kv_block = 16;
    t.d.mask.blocks.n_lists = 1;
    t.d.mask.blocks.n_rows = 300;
    t.d.mask.blocks.row_start = start;
    t.d.mask.blocks.block = block;
    t.d.mask.blocks.n_rows = 40;
    { // list row 0 is position 260
        int32_t row0 = -260;
        t.d.mask.blocks.seq_row = &row0;
        for (i = 0; i <= 40; i++)
            start[i] = i <= 1 ? 0 : i <= 20 ? 3 : i <= 23 ? 3 : i <= 39 ? 5 : 5;
        // rows 1 and 23 see something, every other one nothing: 0, the middle ones and 39
        if (with_sink) t.d.logits.sink = sink;
        tiny_run(&t, 0, workers);
    }
    for (i = 0; i < 40; i++)
        for (h = 0; h < T_HEADS; h++) {
            int sees = i == 1 || i == 23, zero = 1;
            float lse = t.lse[i * T_HEADS + h];
            for (e = 0; e < T_DIM; e++)
                zero &= attni_get(t.o, o_type, (i * T_HEADS + h) * T_DIM + e) == 0.0f;
            CHECK(zero == !sees);
            if (sees) CHECK(attni_finite(lse));
            else CHECK(with_sink ? lse == sink[h] : lse == -HUGE_VALF);
        }
    tiny_free(&t);
}

// Scores of +-2.5e5, exact in f32: q = (5000, 0...), k = (+-200, ...) with scale 1/4.
static void huge_scores(attn_numerics numerics) {
    tiny t;
    int32_t i, kind, e, h;
    double ref[3 * T_HEADS * T_DIM], ref_lse[3 * T_HEADS];
    for (kind = 0; kind < 3; kind++) { // all -2.5e5; all +2.5e5; one of each and small ones
        tiny_make(&t, ATTN_F32, 0);
        t.d.numerics = numerics;
        t.d.n_seq = 1;
        t.kv_len[0] = 290;
        t.q_start[1] = 3;
        t.q_pos0[0] = 287;
        t.d.logits.scale = 0.25f;
        memset(t.k, 0, (size_t)T_PAGES * T_PT * T_DIM * 4);
        memset(t.q, 0, 3 * T_HEADS * T_DIM * 4);
        for (i = 0; i < 3 * T_HEADS; i++) t.q[i * T_DIM] = 5000;
        for (i = 0; i < 290; i++)
            t.k[i * T_DIM] = kind == 0   ? -200.0f
                             : kind == 1 ? 200.0f
                             : i == 7    ? 200.0f
                             : i % 2     ? -200.0f
                                         : 0.001f;
        tiny_store(&t);
        tiny_run(&t, 0, 1);
        CHECK_EQ(attn_ref_forward(&t.d, ref, ref_lse), ATTN_OK);
        for (i = 0; i < 3; i++)
            for (h = 0; h < T_HEADS; h++) {
                int32_t row = i * T_HEADS + h;
                CHECK(fabs((double)t.lse[row] - ref_lse[row]) <= 0.02); // half an ulp of 2.5e5
                for (e = 0; e < T_DIM; e++)
                    CHECK(fabs((double)t.o[row * T_DIM + e] - ref[row * T_DIM + e]) <= 2e-6);
                if (kind == 2) CHECK(t.o[row * T_DIM + 5] == t.v[7 * T_DIM + 5]);
            }
        tiny_free(&t);
    }
}

// More queries than keys: q_pos0 says where they stand; the first ones see nothing.
static void more_queries(attn_numerics numerics, int full) {
    tiny t;
    int32_t i;
    double ref[9 * T_HEADS * T_DIM], ref_lse[9 * T_HEADS];
    int32_t pos0 = 5;
    tiny_make(&t, ATTN_F32, 0);
    tiny_store(&t);
    t.d.numerics = numerics;
    t.d.n_seq = 1;
    t.kv_len[0] = 3; // positions 5, 6, 7
    t.d.kv.kv_pos0 = &pos0;
    t.q_start[1] = 9; // positions 3 .. 11
    t.q_pos0[0] = 3;
    t.d.mask.kind = full ? ATTN_MASK_FULL : ATTN_MASK_CAUSAL;
    tiny_run(&t, 0, 1);
    CHECK_EQ(attn_ref_forward(&t.d, ref, ref_lse), ATTN_OK);
    for (i = 0; i < 9 * T_HEADS * T_DIM; i++) CHECK(fabs((double)t.o[i] - ref[i]) <= 2e-6);
    for (i = 0; i < 2 * T_HEADS && !full; i++) CHECK(t.lse[i] == -HUGE_VALF && t.o[i * T_DIM] == 0);
    // causal rows from the last key on all see the same three keys, but their own Q differs
    CHECK(t.lse[8 * T_HEADS] != t.lse[7 * T_HEADS]);
    tiny_free(&t);
}

static void corners(void) {
    static const attn_dtype types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                       ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    int i, n, type, share, sink, k;
    for (i = 0; i < n_isas; i++) {
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isas[i]), ATTN_OK);
        for (n = 0; n < 3; n++) {
            attn_numerics num = (attn_numerics)n;
            for (type = 0; type < 7; type++) {
                for (share = 0; share < 3; share++)
                    for (sink = 0; sink < 2; sink++)
                        for (k = 0; k < 2; k++) {
                            nan_across(types[type], num, k, attni_float(0x7fc00000u), share, sink);
                            nan_across(types[type], num, k, attni_float(0x7f800000u), share, sink);
                        }
                nan_k_rows(types[type], num);
            }
            for (k = 0; k < 4; k++) {
                empty_rows(ATTN_F32, num, k & 1, k & 2 ? 7 : 1);
                empty_rows(ATTN_BF16, num, k & 1, k & 2 ? 7 : 1);
            }
            huge_scores(num);
            more_queries(num, 0);
            more_queries(num, 1);
        }
    }
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 42), i;
    int k;
    CHECK_EQ(attn_cpu_open(), ATTN_OK);
    for (k = ATTN_CPU_SCALAR; k < ATTN_CPU_ISA_COUNT; k++)
        if (attn_cpu_has((attn_cpu_isa)k)) isas[n_isas++] = k;
    corners();
    visits();
    for (i = 0; i < count; i++) one_world(seed, (int)i);
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
    for (i = 0; i < 6; i++) decode_updates(seed, (int)i);
    return TEST_END();
}

/* problem.h - random attention problems for the tests: every mask, layout, phase and dtype the
   descriptor can say, over pages in random order whose unused parts are poisoned. */
#ifndef PROBLEM_H
#define PROBLEM_H

#include "test.h"
#include "attn.h"
#include "attn_cpu.h"

enum problem_phase { PREFILL, CHUNKED, DECODE, VERIFY, RAGGED, N_PHASES };
enum problem_mask {
    M_CAUSAL, M_FULL, M_WINDOW, M_WINDOW_SINK, M_STRIDE, M_STRIDE_BIDI, M_BLOCKS, M_BLOCKS_HEADS,
    M_BITS, M_DENSE, M_VSLASH, M_KEEP, M_ALL, M_TREE, M_TREE_ALL, N_MASKS
};
static const char *const problem_phases[N_PHASES] = {"prefill", "chunked", "decode", "verify",
                                                     "ragged"};
static const char *const problem_masks[N_MASKS] = {
    "causal", "full", "window", "window+sink", "stride", "stride-bidi", "blocks", "blocks/head",
    "bits", "dense-matrix", "vslash", "keep", "all-terms", "tree", "tree+all"};

typedef struct problem_opts {
    int phase, mask;
    attn_layout layout;
    int contiguous;          // no page table
    int32_t page_tokens, n_seq, max_kv, n_heads, n_kv_heads, head_dim, v_head_dim;
    attn_dtype k, v, q, o;
    int softcap, alibi, sink, bias, head_scale, lse, evicted;
    int alias;               // V is the first v_head_dim elements of K (MLA); not with K16
    int32_t shared;          // tokens of common prefix (rounded down to pages)
    int32_t min_block;       // of block lists: long sequences need coarse ones
    attn_numerics numerics;
    double sharp;            // standard deviation of scores
} problem_opts;

typedef struct problem {
    attn_desc d;
    problem_opts opt;
    void *mem[48];
    int n_mem;
    int32_t n_tokens;
    double *ref, *ref_lse;   // (n_tokens, n_heads, vd)
    float *k_rows, *v_rows;  // what was stored, f32, (total kv tokens, heads, d)
    int64_t n_rows, *slots;
} problem;

// Everything that a problem may have besides its shape, each now and then.
TEST_FN void problem_terms(problem_opts *o, test_rng *r) {
    o->softcap = test_below(r, 5) == 0;
    o->alibi = test_below(r, 5) == 0;
    o->sink = test_below(r, 5) == 0;
    o->bias = test_below(r, 6) == 0;
    o->head_scale = test_below(r, 6) == 0;
    o->lse = test_below(r, 2);
    o->evicted = test_below(r, 5) == 0;
    o->shared = test_below(r, 3) == 0 ? 16 * (1 + test_below(r, 40)) : 0;
}

// A problem of any kind: what the backends' differential tests run.
TEST_FN void problem_random(test_rng *r, problem_opts *o) {
    static const attn_dtype kv_types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                          ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    static const int32_t dims[] = {8, 16, 24, 40, 64, 64, 80, 96, 128, 128, 192, 256, 576};
    static const int32_t pages[] = {1, 3, 16, 16, 48, 64, 256, 1000};
    static const attn_dtype qo[] = {ATTN_F32, ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_BF16};
    memset(o, 0, sizeof *o);
    o->phase = test_below(r, N_PHASES);
    o->mask = test_below(r, N_MASKS);
    o->layout = (attn_layout)test_below(r, 3);
    o->contiguous = test_below(r, 5) == 0;
    o->page_tokens = pages[test_below(r, 8)];
    if (o->layout == ATTN_K16) o->page_tokens = (o->page_tokens + 15) / 16 * 16;
    o->n_seq = 1 + test_below(r, 5);
    o->max_kv = test_below(r, 4) ? 1 + test_below(r, 150) : 1 + test_below(r, 900);
    o->n_kv_heads = 1 + test_below(r, 3);
    o->n_heads = o->n_kv_heads * (1 + test_below(r, 5));
    o->head_dim = dims[test_below(r, 13)];
    o->v_head_dim = test_below(r, 3) ? o->head_dim : dims[test_below(r, 12)];
    o->k = kv_types[test_below(r, 7)];
    o->v = kv_types[test_below(r, 7)];
    o->q = qo[test_below(r, 5)];
    o->o = qo[test_below(r, 5)];
    if (test_below(r, 6) == 0) o->k = o->v = o->q = o->o = ATTN_BF16;
    problem_terms(o, r);
    o->numerics = (attn_numerics)test_below(r, 2);
    o->sharp = 3;
}

TEST_FN void *problem_alloc(problem *p, size_t bytes) {
    void *m = NULL;
    bytes = (bytes + 127) & ~(size_t)63;
    m = aligned_alloc(64, bytes);
    if (!m || p->n_mem == 48) abort();
    memset(m, 0, bytes);
    p->mem[p->n_mem++] = m;
    return m;
}

TEST_FN void problem_free(problem *p) {
    while (p->n_mem) free(p->mem[--p->n_mem]);
}

// ---- masks

TEST_FN int32_t problem_positions(const problem *p) { // one past the last position held
    int32_t s, n = 0;
    for (s = 0; s < p->d.n_seq; s++)
        if (p->d.kv.kv_pos0[s] + p->d.kv.kv_len[s] > n) n = p->d.kv.kv_pos0[s] + p->d.kv.kv_len[s];
    return n;
}

TEST_FN void problem_blocks(problem *p, test_rng *r, int32_t n_lists, int bits) {
    static const int32_t sizes[] = {1, 8, 16, 32, 48, 64, 128};
    attn_block_list *b = &p->d.mask.blocks;
    int32_t rows_per = 0, s, i, j, l, n_blocks, max_pos = 0, *seq_row;
    int64_t n = 0, *start;
    int32_t *ids;
    uint64_t *w;
    b->row_block = test_below(r, 3) ? sizes[test_below(r, 7)] : 1 + test_below(r, 70);
    b->kv_block = test_below(r, 2) ? sizes[test_below(r, 7)] : 1 + test_below(r, 15);
    b->row_block = attni_max32(b->row_block, p->opt.min_block);
    b->kv_block = attni_max32(b->kv_block, p->opt.min_block);
    b->n_lists = n_lists;
    max_pos = problem_positions(p);
    rows_per = max_pos / b->row_block + 2;
    n_blocks = max_pos / b->kv_block + 2;
    b->n_rows = rows_per * p->d.n_seq;
    seq_row = (int32_t *)problem_alloc(p, 4 * (size_t)p->d.n_seq);
    for (s = 0; s < p->d.n_seq; s++) seq_row[s] = s * rows_per;
    b->seq_row = seq_row;
    start = (int64_t *)problem_alloc(p, 8 * (size_t)n_lists * ((size_t)b->n_rows + 1));
    ids = (int32_t *)problem_alloc(p, 4 * (size_t)n_lists * (size_t)b->n_rows * (size_t)n_blocks);
    for (l = 0; l < n_lists; l++)
        for (i = 0; i <= b->n_rows; i++) {
            start[l * ((int64_t)b->n_rows + 1) + i] = n;
            if (i == b->n_rows) break;
            for (j = 0; j < n_blocks; j++)
                if (test_below(r, 3) == 0) ids[n++] = j;
        }
    b->row_start = start;
    b->block = ids;
    if (!bits) return;
    b->bits_rows = b->row_block % 8 ? b->row_block : 8;
    b->bits_cols = b->kv_block % 16 ? b->kv_block : 16;
    w = (uint64_t *)problem_alloc(p, 8 * (size_t)(n + 1) *
                                         (size_t)((b->bits_rows * b->bits_cols + 63) / 64));
    for (i = 0; i < n * ((b->bits_rows * b->bits_cols + 63) / 64); i++) w[i] = test_u64(r);
    b->bits = w;
}

TEST_FN void problem_dense(problem *p, test_rng *r) { // one boolean matrix for all sequences
    int32_t n, i;
    uint8_t *m;
    int64_t *start, count = 0;
    int32_t *ids, rb = 1 + test_below(r, 40), kb = 1 + test_below(r, 64);
    uint64_t *w;
    n = problem_positions(p) + 2;
    m = (uint8_t *)problem_alloc(p, (size_t)n * (size_t)n);
    for (i = 0; i < n * n; i++) m[i] = test_below(r, 5) < 2;
    for (i = 0; i < n; i += 7)
        memset(m + (size_t)i * (size_t)n, 0, (size_t)n); // rows that see nothing
    start = (int64_t *)problem_alloc(p, 8 * (size_t)(n / rb + 2));
    CHECK(attn_mask_from_dense(m, n, n, rb, kb, start, NULL, NULL, 0, &count, &p->d.mask.blocks) ==
          ATTN_OK);
    ids = (int32_t *)problem_alloc(p, 4 * (size_t)count + 4);
    w = (uint64_t *)problem_alloc(p, 8 * (size_t)count * (size_t)((rb * kb + 63) / 64) + 8);
    CHECK(attn_mask_from_dense(m, n, n, rb, kb, start, ids, w, count, &count, &p->d.mask.blocks) ==
          ATTN_OK);
}

TEST_FN void problem_vslash(problem *p, test_rng *r, int32_t n_lists) {
    attn_vertical_slash *v = &p->d.mask.vslash;
    static const int32_t sizes[] = {1, 16, 32, 64};
    int32_t n = p->opt.max_kv * 3, l, j;
    int64_t *cs = (int64_t *)problem_alloc(p, 8 * (size_t)(n_lists + 1));
    int64_t *ds = (int64_t *)problem_alloc(p, 8 * (size_t)(n_lists + 1)), c = 0, g = 0;
    int32_t *col, *diag;
    v->block = sizes[test_below(r, 4)];
    n = n / v->block + 2;
    col = (int32_t *)problem_alloc(p, 4 * (size_t)n * (size_t)n_lists);
    diag = (int32_t *)problem_alloc(p, 4 * (size_t)n * (size_t)n_lists);
    for (l = 0; l < n_lists; l++) {
        cs[l] = c;
        ds[l] = g;
        for (j = 0; j < n; j++) {
            if (test_below(r, 6) == 0) col[c++] = j;
            if (test_below(r, 6) == 0) diag[g++] = j - (p->d.mask.kind == ATTN_MASK_FULL ? 3 : 0);
        }
    }
    cs[l] = c;
    ds[l] = g;
    v->n_lists = n_lists;
    v->col_start = cs;
    v->col = col;
    v->diag_start = ds;
    v->diag = diag;
}

TEST_FN void problem_stride(problem *p, test_rng *r, int bidi) {
    attn_local_stride *s = &p->d.mask.stride;
    static const int32_t sizes[] = {1, 16, 24, 64};
    s->block = sizes[test_below(r, 4)];
    s->local = 1 + test_below(r, 3);
    s->stride = 1 + test_below(r, 5);
    s->offset = test_below(r, 2);
    s->head_step = test_below(r, 3);
    s->bidirectional = bidi;
    s->local_right = test_below(r, 3);
    if (test_below(r, 3) == 0) s->n_dense = p->d.n_kv_heads > 1 ? 1 : 0;
    else if (test_below(r, 3) == 0) s->homogeneous = 1;
    if (test_below(r, 3) == 0) s->head0 = 2, s->n_heads_total = p->d.n_kv_heads + 3;
}

TEST_FN void problem_tree(problem *p, test_rng *r) {
    int32_t s, t, *parent = (int32_t *)problem_alloc(p, 4 * (size_t)p->n_tokens + 4);
    p->d.mask.kind = ATTN_MASK_TREE;
    for (s = 0; s < p->d.n_seq; s++)
        for (t = 0; t < p->d.q_start[s + 1] - p->d.q_start[s];
             t++) // one in three sequences: a chain
            parent[p->d.q_start[s] + t] = s % 3 == 2 ? t - 1 : test_below(r, t + 1) - 1;
    p->d.mask.tree_parent = parent;
}

TEST_FN void problem_set_mask(problem *p, test_rng *r) {
    attn_mask *m = &p->d.mask;
    int kind = p->opt.mask, all = kind == M_ALL || kind == M_TREE_ALL;
    int lists = kind == M_BLOCKS || kind == M_BLOCKS_HEADS;
    if (kind == M_FULL || kind == M_STRIDE_BIDI) m->kind = ATTN_MASK_FULL;
    if (lists && test_below(r, 6) == 0) m->kind = ATTN_MASK_FULL;
    if (lists && test_below(r, 4) == 0) {
        m->window_left = 1 + test_below(r, p->opt.max_kv);
        m->n_sink = test_below(r, 2) * test_below(r, 20);
        if (m->kind == ATTN_MASK_FULL) m->window_right = test_below(r, 40);
    }
    if (lists && test_below(r, 2)) m->keep_sink = test_below(r, 30);
    if (lists && test_below(r, 2)) m->keep_recent = test_below(r, 90);
    if (kind == M_TREE || kind == M_TREE_ALL) problem_tree(p, r);
    if (kind == M_WINDOW || kind == M_WINDOW_SINK || all) {
        m->window_left = 1 + test_below(r, p->opt.max_kv);
        if (m->kind == ATTN_MASK_FULL || test_below(r, 2)) m->window_right = 1 + test_below(r, 40);
    }
    if (kind == M_FULL && test_below(r, 2)) m->window_right = 1 + test_below(r, 100);
    if (kind == M_WINDOW_SINK || all) m->n_sink = 1 + test_below(r, 20);
    if (kind == M_STRIDE || kind == M_STRIDE_BIDI || all)
        problem_stride(p, r, kind == M_STRIDE_BIDI);
    if (kind == M_BLOCKS || all) problem_blocks(p, r, test_below(r, 2) ? 1 : p->d.n_kv_heads, 0);
    if (kind == M_BLOCKS_HEADS) problem_blocks(p, r, p->d.n_heads, test_below(r, 2));
    if (kind == M_BITS) problem_blocks(p, r, test_below(r, 2) ? 1 : p->d.n_heads, 1);
    if (kind == M_DENSE) problem_dense(p, r);
    if (kind == M_VSLASH || all) problem_vslash(p, r, test_below(r, 2) ? p->d.n_heads : 1);
    if (kind == M_KEEP || all)
        m->keep_sink = 1 + test_below(r, 30), m->keep_recent = test_below(r, 90);
}

// ---- lengths, pages, tensors

TEST_FN void problem_lengths(problem *p, test_rng *r) {
    int32_t n = p->opt.n_seq, s, *q_start, *kv_len, *q_pos0, *kv_pos0, t = 0;
    int tree = p->opt.mask == M_TREE || p->opt.mask == M_TREE_ALL;
    q_start = (int32_t *)problem_alloc(p, 4 * (size_t)(n + 1));
    kv_len = (int32_t *)problem_alloc(p, 4 * (size_t)n);
    q_pos0 = (int32_t *)problem_alloc(p, 4 * (size_t)n);
    kv_pos0 = (int32_t *)problem_alloc(p, 4 * (size_t)n);
    for (s = 0; s < n; s++) {
        int32_t len = 1 + test_below(r, p->opt.max_kv), q = 1;
        int phase = p->opt.phase == RAGGED ? test_below(r, 5) : p->opt.phase;
        if (p->opt.shared && len <= p->opt.shared) len = p->opt.shared + 1 + test_below(r, 50);
        if (phase == PREFILL) q = len;
        if (phase == CHUNKED) q = 1 + test_below(r, len < 100 ? len : 100);
        if (phase == VERIFY || (tree && phase != PREFILL))
            q = 1 + test_below(r, len < 17 ? len : 17);
        if (tree && q > 60) q = 60;
        if (phase == 4) q = 0;
        kv_len[s] = len;
        kv_pos0[s] =
            p->opt.evicted ? 16 * test_below(r, 40) + test_below(r, 2) * test_below(r, 9) : 0;
        if (p->opt.evicted && p->opt.shared) kv_pos0[s] = 48;
        q_pos0[s] = kv_pos0[s] + len - q;
        q_start[s] = t;
        t += q;
    }
    q_start[n] = p->n_tokens = t;
    p->d.q_start = q_start;
    p->d.kv.kv_len = kv_len;
    p->d.q_pos0 = q_pos0;
    p->d.kv.kv_pos0 = kv_pos0;
}

// Stores random K and V of all tokens into pages dealt in random order; the rest is poison.
TEST_FN void problem_pages(problem *p, test_rng *r) {
    attn_kv *kv = &p->d.kv;
    int32_t n = p->d.n_seq, s, j, pt = p->opt.page_tokens, need = 0, most = 0, *table, *deck,
            at = 0;
    int32_t common = p->opt.shared / pt;
    float *rows[2];
    attn_tensor k, v;
    int is_v;
    if (p->opt.contiguous) {
        for (s = 0; s < n; s++) if (kv->kv_len[s] > most) most = kv->kv_len[s];
        pt = p->opt.layout == ATTN_K16 ? (most + 15) / 16 * 16 : most;
        common = 0;
    }
    kv->page_tokens = pt;
    for (s = 0; s < n; s++) {
        int32_t c = (kv->kv_len[s] + pt - 1) / pt;
        need += c;
        if (c > most || p->opt.contiguous) most = c;
    }
    kv->n_pages = p->opt.contiguous ? n : need + 3;
    table = (int32_t *)problem_alloc(p, 4 * (size_t)n * (size_t)(most + 1));
    deck = (int32_t *)problem_alloc(p, 4 * (size_t)kv->n_pages);
    for (j = 0; j < kv->n_pages; j++) deck[j] = j;
    for (j = kv->n_pages - 1; j > 0 && !p->opt.contiguous; j--) {
        int32_t i = test_below(r, j + 1), t = deck[i];
        deck[i] = deck[j];
        deck[j] = t;
    }
    for (s = 0; s < n; s++)
        for (j = 0; j < (kv->kv_len[s] + pt - 1) / pt; j++)
            table[s * (most + 1) + j] = s > 0 && j < common ? table[j] : deck[at++];
    kv->page_table = p->opt.contiguous ? NULL : table;
    kv->page_table_stride = most + 1;
    kv->layout = p->opt.layout;
    kv->k.dtype = p->opt.k;
    kv->v.dtype = p->opt.v;
    if (p->opt.head_scale) {
        float *f = (float *)problem_alloc(p, 8 * (size_t)p->d.n_kv_heads);
        for (j = 0; j < 2 * p->d.n_kv_heads; j++)
            f[j] = (float)test_uniform(r, 0.5, 1) * (p->opt.k == ATTN_I4 ? 0.6f : 0.03f);
        kv->k.head_scale = f;
        kv->v.head_scale = f + p->d.n_kv_heads;
    }
    if (p->opt.alias) { // the same strides for both, so that the scales coincide as well
        int head_major = p->opt.layout != ATTN_TOKEN_MAJOR;
        kv->k.stride_token = (head_major ? 1 : p->d.n_kv_heads) * (int64_t)p->d.head_dim;
        kv->k.stride_head = (head_major ? pt : 1) * (int64_t)p->d.head_dim;
        kv->v = kv->k;
    }
    for (is_v = 0; is_v < 2; is_v++) {
        size_t bytes = attn_kv_page_bytes(&p->d, is_v) * (size_t)kv->n_pages;
        void *m;
        if (is_v && p->opt.alias) {
            kv->v.data = kv->k.data;
            break;
        }
        m = problem_alloc(p, bytes + 64);
        CHECK(bytes > 0);
        memset(m, 0xff, bytes); // NaN in every float type and in the scales
        if (is_v) kv->v.data = m;
        else kv->k.data = m;
    }
    for (s = 0; s < n; s++) p->n_rows += kv->kv_len[s];
    p->slots = (int64_t *)problem_alloc(p, 8 * (size_t)p->n_rows + 8);
    for (is_v = 0; is_v < 2; is_v++) {
        int32_t dim = is_v ? p->d.v_head_dim : p->d.head_dim;
        size_t count = (size_t)p->n_rows * (size_t)p->d.n_kv_heads * (size_t)dim;
        rows[is_v] = (float *)problem_alloc(p, 4 * count + 64);
        test_fill_normal(r, rows[is_v], count, 1);
    }
    p->k_rows = rows[0];
    p->v_rows = rows[1];
    for (at = 0, s = 0; s < n; s++)
        for (j = 0; j < kv->kv_len[s]; j++, at++) {
            int32_t page = p->opt.contiguous ? s : table[s * (most + 1) + j / pt];
            p->slots[at] = s > 0 && j / pt < common ? -1 : (int64_t)page * pt + j % pt;
        }
    memset(&k, 0, sizeof k);
    memset(&v, 0, sizeof v);
    k.data = rows[0];
    v.data = rows[1];
    k.dtype = v.dtype = ATTN_F32;
    CHECK_EQ(attn_cpu_store(&p->d, &k, p->opt.alias ? NULL : &v, p->slots, 0, p->n_rows), ATTN_OK);
}

TEST_FN void problem_queries(problem *p, test_rng *r) {
    attn_desc *d = &p->d;
    size_t n = (size_t)p->n_tokens * (size_t)d->n_heads * (size_t)d->head_dim, i;
    float *f;
    d->q.dtype = p->opt.q;
    d->o.dtype = p->opt.o;
    d->q.data = problem_alloc(p, 4 * n + 64);
    // K is standard normal: scores q.k / sqrt(d) have the standard deviation of q's elements
    for (i = 0; i < n; i++)
        attni_put(d->q.data, d->q.dtype, (int64_t)i, (float)(p->opt.sharp * test_normal(r)));
    n = (size_t)p->n_tokens * (size_t)d->n_heads * (size_t)d->v_head_dim;
    d->o.data = problem_alloc(p, 4 * n + 64);
    memset(d->o.data, 0xff, 4 * n);
    if (p->opt.lse)
        d->lse = (float *)problem_alloc(p, 4 * (size_t)p->n_tokens * (size_t)d->n_heads + 4);
    if (p->opt.softcap) d->logits.softcap = 4.0f;
    f = (float *)problem_alloc(p, 8 * (size_t)d->n_heads);
    for (i = 0; i < 2 * (size_t)d->n_heads; i++)
        f[i] = (float)test_uniform(r, 0, i < (size_t)d->n_heads ? 0.2 : 3);
    if (p->opt.alibi) d->logits.alibi = f;
    if (p->opt.sink) d->logits.sink = f + d->n_heads;
    if (p->opt.bias) {
        int64_t cols = p->opt.max_kv + p->opt.shared + 60, k;
        int per_head = test_below(r, 2);
        d->logits.bias.dtype = test_below(r, 2) ? ATTN_F32 : ATTN_F16;
        d->logits.bias.stride_token = cols;
        d->logits.bias.stride_head = per_head ? cols * p->n_tokens : 0;
        d->logits.bias.data = problem_alloc(
            p, 4 * (size_t)cols * (size_t)(p->n_tokens * (per_head ? d->n_heads : 1)) + 64);
        for (k = 0; k < cols * p->n_tokens * (per_head ? d->n_heads : 1); k++)
            attni_put(d->logits.bias.data, d->logits.bias.dtype, k,
                      test_below(r, 9) ? (float)test_normal(r) : attni_float(0xff800000u));
    }
}

TEST_FN void problem_make(problem *p, const problem_opts *opt, test_rng *r) {
    size_t n;
    memset(p, 0, sizeof *p);
    p->opt = *opt;
    p->d.n_seq = opt->n_seq;
    p->d.n_heads = opt->n_heads;
    p->d.n_kv_heads = opt->n_kv_heads;
    p->d.head_dim = opt->head_dim;
    p->d.v_head_dim = opt->v_head_dim;
    p->d.numerics = opt->numerics;
    problem_lengths(p, r);
    problem_pages(p, r);
    problem_queries(p, r);
    problem_set_mask(p, r);
    n = (size_t)p->n_tokens * (size_t)opt->n_heads;
    p->ref = (double *)problem_alloc(p, 8 * n * (size_t)opt->v_head_dim + 64);
    p->ref_lse = (double *)problem_alloc(p, 8 * n + 64);
}

// ---- results: O as floats, in (token, head, d) order

TEST_FN void problem_output(const problem *p, float *out) {
    size_t n = (size_t)p->n_tokens * (size_t)p->d.n_heads * (size_t)p->d.v_head_dim, i;
    for (i = 0; i < n; i++) out[i] = attni_get(p->d.o.data, p->d.o.dtype, (int64_t)i);
}

TEST_FN uint64_t problem_hash(const float *x, size_t n) { // FNV-1a; every NaN counts as the same
    uint64_t h = 1469598103934665603u;
    size_t i;
    for (i = 0; i < n; i++) {
        uint32_t u = attni_isnan(x[i]) ? 0x7fc00000u : attni_bits32(x[i]);
        h = (h ^ u) * 1099511628211u;
    }
    return h;
}

// Plain fp32: the same dequantised inputs from left to right, two passes, output rounded.
TEST_FN void problem_plain(const problem *p, float *out) {
    const attn_desc *d = &p->d;
    attni_side k, v;
    int32_t s, t, h, j, e, group = d->n_heads / d->n_kv_heads, vd = d->v_head_dim, most = 1;
    float *sc;
    attni_side_init(d, 0, &k);
    attni_side_init(d, 1, &v);
    for (s = 0; s < d->n_seq; s++) if (d->kv.kv_len[s] > most) most = d->kv.kv_len[s];
    sc = (float *)malloc(4 * (size_t)most);
    for (s = 0; s < d->n_seq; s++)
        for (t = d->q_start[s]; t < d->q_start[s + 1]; t++)
            for (h = 0; h < d->n_heads; h++) {
                float m = -HUGE_VALF, l = 0, *o = out + ((int64_t)t * d->n_heads + h) * vd;
                double row[ATTN_MAX_HEAD_DIM], q[ATTN_MAX_HEAD_DIM];
                for (e = 0; e < d->head_dim; e++) q[e] = 0;
                for (e = 0; e < vd; e++) o[e] = 0;
                for (j = 0; j < d->kv.kv_len[s]; j++) {
                    float sum = 0;
                    sc[j] = -HUGE_VALF;
                    if (!attn_ref_visible(d, s, t, h, j)) continue;
                    attni_ref_row(d, &k, s, h / group, j, row);
                    for (e = 0; e < d->head_dim; e++)
                        sum += attni_get(d->q.data, d->q.dtype,
                                         ((int64_t)t * d->n_heads + h) * d->head_dim + e) *
                               (float)row[e];
                    sum *= attni_scale(d);
                    if (d->logits.softcap > 0)
                        sum = d->logits.softcap * tanhf(sum / d->logits.softcap);
                    { // ALiBi and bias: exact terms through the reference's score of a zero query
                        double extra = 0;
                        attn_desc c = *d;
                        c.logits.softcap = 0;
                        extra = attni_ref_score(&c, q, row, s, t, h, j);
                        sc[j] = sum + (float)extra;
                    }
                    if (sc[j] > m) m = sc[j];
                }
                if (d->logits.sink && d->logits.sink[h] > m) m = d->logits.sink[h];
                for (j = 0; j < d->kv.kv_len[s]; j++) {
                    float w;
                    if (sc[j] == -HUGE_VALF) continue;
                    w = expf(sc[j] - m);
                    l += w;
                    attni_ref_row(d, &v, s, h / group, j, row);
                    for (e = 0; e < vd; e++) o[e] += w * (float)row[e];
                }
                if (d->logits.sink) l += expf(d->logits.sink[h] - m);
                for (e = 0; e < vd; e++) {
                    uint8_t b[4];
                    attni_put(b, d->o.dtype, 0, l > 0 ? o[e] / l : 0);
                    o[e] = attni_get(b, d->o.dtype, 0);
                }
            }
    free(sc);
}

// Rows that the error really comes from: (sum e^2)^2 / sum e^4 over rows' errors e.
TEST_FN double problem_error_rows(const problem *p, const float *o) {
    size_t vd = (size_t)p->d.v_head_dim, n = (size_t)p->n_tokens * (size_t)p->d.n_heads, r, e;
    double s2 = 0, s4 = 0;
    for (r = 0; r < n; r++) {
        double x = 0;
        for (e = r * vd; e < (r + 1) * vd; e++)
            x += ((double)o[e] - p->ref[e]) * ((double)o[e] - p->ref[e]);
        s2 += x;
        s4 += x * x;
    }
    return s4 > 0 ? s2 * s2 / s4 : 0;
}

// The accuracy contract: RMS and maximum against those of plain fp32, with a floor of one ulp.
// plain NULL: against the floor alone, which is stricter and spares computing plain.
TEST_FN int problem_accurate(const problem *p, const float *o, const float *plain,
                             double rms_factor, double max_factor, double *ratio) {
    size_t n = (size_t)p->n_tokens * (size_t)p->d.n_heads * (size_t)p->d.v_head_dim, i;
    double max, pmax, rms = test_error_floats(o, p->ref, n, &max), top = 0, sum = 0, ulp;
    double prms = 0;
    pmax = 0;
    if (plain) prms = test_error_floats(plain, p->ref, n, &pmax);
    ulp = p->d.o.dtype == ATTN_F32 ? 1.2e-7 : p->d.o.dtype == ATTN_F16 ? 9.8e-4 : 7.9e-3;
    for (i = 0; i < n; i++) {
        sum += p->ref[i] * p->ref[i];
        if (fabs(p->ref[i]) > top) top = fabs(p->ref[i]);
    }
    if (prms < ulp * sqrt(sum / (double)(n ? n : 1))) prms = ulp * sqrt(sum / (double)(n ? n : 1));
    if (pmax < ulp * top) pmax = ulp * top;
    if (ratio) *ratio = prms > 0 ? rms / prms : 0;
    // one or two rows' rounding is luck on either side: of a row's scores, one decides
    if (problem_error_rows(p, o) < 3) rms_factor *= 2;
    return rms <= rms_factor * prms + 1e-30 && max <= max_factor * pmax + 1e-30;
}

#endif // PROBLEM_H

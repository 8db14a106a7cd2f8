/* Masks and the reference: attn_ref_visible against a second, independent reading of attn.h's
   comments, dkernel's published patterns, attn_mask_from_dense, and attn_ref_forward against naive
   doubles. test_mask [SEED [COUNT]]   COUNT: random problems (default 1500) cc -std=c11 -O2 -I.
   -Itests tests/test_mask.c -o test_mask -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"

// ---- visibility, written from the comments of attn.h alone (no attni_ helper)

static int64_t position_of(const attn_desc *d, int32_t s, int32_t i) { // of query i of sequence s
    int32_t q_len = d->q_start[s + 1] - d->q_start[s], up;
    int64_t pos0 = d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0;
    int64_t q0 = d->q_pos0 ? d->q_pos0[s] : pos0 + d->kv.kv_len[s] - q_len, depth = 0;
    if (d->mask.kind != ATTN_MASK_TREE) return q0 + i;
    for (up = d->mask.tree_parent[d->q_start[s] + i]; up != -1;
         up = d->mask.tree_parent[d->q_start[s] + up])
        depth++;
    return q0 + depth;
}

static int listed(const int32_t *ids, int64_t from, int64_t to, int64_t id) { // the plainest search
    for (; from < to; from++)
        if (ids[from] == id) return 1;
    return 0;
}

static int list_index(const attn_desc *d, int32_t n_lists, int32_t h) {
    if (n_lists == 1) return 0;
    if (n_lists == d->n_heads) return h;
    return h * d->n_kv_heads / d->n_heads;
}

static int in_blocks(const attn_desc *d, int32_t s, int32_t h, int64_t p, int64_t k) {
    const attn_block_list *b = &d->mask.blocks;
    int64_t row = (b->seq_row ? b->seq_row[s] : 0) + p / b->row_block, e, words, sub, col;
    const int64_t *start = b->row_start + (int64_t)list_index(d, b->n_lists, h) * (b->n_rows + 1);
    const int64_t *end;
    end = b->row_end ? b->row_end + (start - b->row_start) : start + 1;
    for (e = start[row]; e < end[row]; e++) {
        if (b->block[e] != k / b->kv_block) continue;
        if (!b->bits) return 1;
        words = (b->bits_rows * b->bits_cols + 63) / 64;
        sub = (p % b->row_block) / (b->row_block / b->bits_rows);
        col = (k % b->kv_block) / (b->kv_block / b->bits_cols);
        return (int)(b->bits[e * words + (sub * b->bits_cols + col) / 64] >>
                     ((sub * b->bits_cols + col) % 64) & 1);
    }
    return 0;
}

static int in_stride(const attn_desc *d, int32_t h, int64_t p, int64_t k) {
    const attn_local_stride *r = &d->mask.stride;
    int64_t i = p / r->block, j = k / r->block;
    int64_t total = r->n_heads_total > 0 ? r->n_heads_total : d->n_kv_heads;
    int64_t head = h * d->n_kv_heads / d->n_heads + r->head0;
    int64_t step = r->head_step ? r->head_step : r->stride / total > 1 ? r->stride / total : 1;
    if (r->homogeneous) head = 0;
    if (r->bidirectional) {
        int64_t left = r->local, right = r->local_right ? r->local_right : r->local, a = 0;
        if (head >= total - r->n_dense && r->n_dense) return 1;
        if (i - j - left + 1 > 0) a += i - j - left + 1;
        if (j - i - right + 1 > 0) a += j - i - right + 1;
        return a % r->stride == 0;
    }
    if (j > i) return 0;
    if (head >= total - r->n_dense && r->n_dense) return 1;
    return i - j < r->local || (j + head * step + r->offset) % r->stride == 0;
}

static int visible(const attn_desc *d, int32_t s, int32_t t, int32_t h, int32_t j) {
    const attn_mask *m = &d->mask;
    int32_t q_len = d->q_start[s + 1] - d->q_start[s], i = t - d->q_start[s], a, sparse = 0;
    int64_t p = position_of(d, s, i), k = (d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0) + (int64_t)j;
    if (m->kind == ATTN_MASK_CAUSAL && k > p) return 0;
    if (m->kind == ATTN_MASK_TREE && j >= d->kv.kv_len[s] - q_len) { // a query's own key
        int32_t node = j - (d->kv.kv_len[s] - q_len);
        for (a = i; a != -1 && a != node;) a = m->tree_parent[d->q_start[s] + a];
        if (a == -1) return 0;
        k = position_of(d, s, node);
    }
    if (k >= m->n_sink) {
        if (m->window_left > 0 && k < p - (m->window_left - 1)) return 0;
        if (m->window_right > 0 && k > p + (m->window_right - 1)) return 0;
    }
    if (m->blocks.row_start) sparse = 1 + (sparse || in_blocks(d, s, h, p, k));
    if (m->stride.block) sparse = 1 + (sparse == 2 || in_stride(d, h, p, k));
    if (m->vslash.block) {
        const attn_vertical_slash *v = &m->vslash;
        int l = list_index(d, v->n_lists, h);
        int in =
            listed(v->col, v->col_start[l], v->col_start[l + 1], k / v->block) ||
            listed(v->diag, v->diag_start[l], v->diag_start[l + 1], p / v->block - k / v->block);
        sparse = 1 + (sparse == 2 || in);
    }
    if (m->keep_sink > 0) sparse = 1 + (sparse == 2 || k < m->keep_sink);
    if (m->keep_recent > 0) sparse = 1 + (sparse == 2 || p - k < m->keep_recent);
    return sparse != 1; // 0: no term given; 1: none of them kept it; 2: one did
}

// ---- the reference from libm doubles, two passes, rows read through the public calls

static double small_float(uint32_t h, int e, int m, int ieee) {
    int top = (1 << e) - 1, bias = (1 << (e - 1)) - 1;
    int ex = (int)(h >> m) & top, man = (int)h & ((1 << m) - 1);
    double x;
    if (ex == top && ieee) x = man ? NAN : (double)INFINITY;
    else if (!ieee && ex == top && man == (1 << m) - 1) x = NAN;
    else if (ex == 0) x = ldexp(man, 1 - bias - m);
    else x = ldexp(man + (1 << m), ex - bias - m);
    return (h >> (e + m)) & 1 ? -x : x;
}

static double element(const uint8_t *p, attn_dtype t, int32_t i) {
    uint16_t h = 0;
    float f = 0;
    int c;
    if (t == ATTN_F16 || t == ATTN_BF16) memcpy(&h, p + 2 * i, 2);
    switch (t) {
    case ATTN_F32: memcpy(&f, p + 4 * i, 4); return (double)f;
    case ATTN_F16: return small_float(h, 5, 10, 1);
    case ATTN_BF16: return small_float(h, 8, 7, 1);
    case ATTN_F8E4M3: return small_float(p[i], 4, 3, 0);
    case ATTN_F8E5M2: return small_float(p[i], 5, 2, 1);
    case ATTN_I8: return (double)(int8_t)p[i];
    default:
        c = p[i / 2] >> (i % 2 * 4) & 15;
        return c >= 8 ? c - 16 : c;
    }
}

// Little-endian units of a row, in place, as this host has them.
static void native(uint8_t *p, size_t bytes, int width) {
    uint8_t *end = p + bytes;
    for (; p < end; p += width) {
        uint32_t low = p[0] | (uint32_t)(width > 1 ? p[1] : 0) << 8;
        uint16_t half = (uint16_t)low;
        if (width == 2) memcpy(p, &half, 2);
        if (width != 4) continue;
        low |= (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        memcpy(p, &low, 4);
    }
}

// (kv_len, n_kv_heads, dim) doubles of a sequence's K or V. kv layout: through attn_kv_read_rows.
static double *rows_of(const attn_desc *d, int is_v, int32_t s) {
    const attn_kv_array *a = is_v ? &d->kv.v : &d->kv.k;
    int32_t dim = is_v && d->v_head_dim ? d->v_head_dim : d->head_dim, heads = d->n_kv_heads, j, h,
            e;
    int32_t n = d->kv.kv_len[s], pt = d->kv.page_tokens;
    double *out = (double *)calloc((size_t)n * (size_t)(heads * dim) + 1, 8);
    size_t bytes = attn_kv_rows_bytes(d, is_v, 1),
           raw = (size_t)(heads * dim * attn_dtype_bits(a->dtype) / 8);
    uint8_t *row = (uint8_t *)calloc(bytes, 1);
    for (j = 0; j < n; j++) {
        int32_t page =
            d->kv.page_table ? d->kv.page_table[s * d->kv.page_table_stride + j / pt] : s;
        CHECK_EQ(attn_kv_read_rows(d, is_v, page, j % pt, 1, row), ATTN_OK);
        native(row, raw, (attn_dtype_bits(a->dtype) + 7) / 8);
        native(row + raw, bytes - raw, 4);
        for (h = 0; h < heads; h++)
            for (e = 0; e < dim; e++) {
                float scale = 1;
                if (attn_dtype_scaled(a->dtype)) {
                    if (a->head_scale) scale = a->head_scale[h];
                    else memcpy(&scale, row + raw + 4 * h, 4);
                }
                out[((int64_t)j * heads + h) * dim + e] =
                    element(row, a->dtype, h * dim + e) * (double)scale;
            }
    }
    free(row);
    return out;
}

static void naive(const attn_desc *d, double *o, double *lse) {
    int32_t s, t, h, j, e, vd = d->v_head_dim ? d->v_head_dim : d->head_dim,
                           g = d->n_heads / d->n_kv_heads;
    double scale =
        d->logits.scale != 0 ? (double)d->logits.scale : (double)(float)(1 / sqrt(d->head_dim));
    for (s = 0; s < d->n_seq; s++) {
        int32_t n = d->kv.kv_len[s], q_len = d->q_start[s + 1] - d->q_start[s];
        double *k = rows_of(d, 0, s), *v = rows_of(d, 1, s),
               *x = (double *)calloc((size_t)n + 1, 8);
        for (t = d->q_start[s]; t < d->q_start[s + 1]; t++)
            for (h = 0; h < d->n_heads; h++) {
                const uint8_t *q = (const uint8_t *)d->q.data;
                double m = -(double)INFINITY, l = 0, *out = o + ((int64_t)t * d->n_heads + h) * vd;
                for (j = 0; j < n; j++) {
                    double sum = 0, kp = (d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0) + j;
                    x[j] = -(double)INFINITY;
                    if (!visible(d, s, t, h, j)) continue;
                    for (e = 0; e < d->head_dim; e++)
                        sum += element(q, d->q.dtype, (t * d->n_heads + h) * d->head_dim + e) *
                               k[((int64_t)j * d->n_kv_heads + h / g) * d->head_dim + e];
                    sum *= scale;
                    if (d->logits.softcap > 0)
                        sum = (double)d->logits.softcap * tanh(sum / (double)d->logits.softcap);
                    if (d->mask.kind == ATTN_MASK_TREE && j >= n - q_len)
                        kp = (double)position_of(d, s, j - (n - q_len));
                    if (d->logits.alibi)
                        sum += (double)d->logits.alibi[h] *
                               (kp - (double)position_of(d, s, t - d->q_start[s]));
                    if (d->logits.bias.data)
                        sum += element((const uint8_t *)d->logits.bias.data, d->logits.bias.dtype,
                                       (int32_t)(h * d->logits.bias.stride_head +
                                                 t * d->logits.bias.stride_token + j));
                    x[j] = sum;
                    if (sum > m) m = sum;
                }
                if (d->logits.sink && (double)d->logits.sink[h] > m) m = (double)d->logits.sink[h];
                for (e = 0; e < vd; e++) out[e] = 0;
                for (j = 0; j < n; j++) {
                    double w = x[j] > -(double)INFINITY ? exp(x[j] - m) : 0;
                    l += w;
                    for (e = 0; e < vd && w > 0; e++)
                        out[e] += w * v[((int64_t)j * d->n_kv_heads + h / g) * vd + e];
                }
                if (d->logits.sink) l += exp((double)d->logits.sink[h] - m);
                for (e = 0; e < vd; e++) out[e] = l > 0 ? out[e] / l : 0;
                lse[(int64_t)t * d->n_heads + h] = l > 0 ? m + log(l) : -(double)INFINITY;
            }
        free(k), free(v), free(x);
    }
}

// Every code of the small types, also those that no store writes.
static void codes(void) {
    static const attn_dtype types[] = {ATTN_F8E4M3, ATTN_F8E5M2, ATTN_I8, ATTN_I4};
    int t, c, i;
    for (t = 0; t < 4; t++)
        for (c = 0; c < 256; c++)
            for (i = 0; i < (types[t] == ATTN_I4 ? 2 : 1); i++) {
                uint8_t byte = (uint8_t)c;
                double want = element(&byte, types[t], i);
                double got = (double)attni_get(&byte, types[t], i);
                if (!CHECK(want == got || (want != want && got != got)))
                    printf("  %s code %d: %g, not %g\n", attn_dtype_name(types[t]), c, got, want);
            }
}

// ---- lists of a mask, transposed lists, what may be evicted

static int same_pairs(const attn_desc *a, const attn_desc *b, int32_t s) {
    int32_t t, h, j;
    for (t = a->q_start[s]; t < a->q_start[s + 1]; t++)
        for (h = 0; h < a->n_heads; h++)
            for (j = 0; j < a->kv.kv_len[s]; j++)
                if (visible(a, s, t, h, j) != visible(b, s, t, h, j)) return 0;
    return 1;
}

static void transposed(const attn_block_list *a, int64_t n, int32_t n_cols) {
    int64_t *start = (int64_t *)malloc(8 * (size_t)(a->n_lists * (n_cols + 1)));
    int32_t *row = (int32_t *)malloc(4 * (size_t)(n + 1)), l, c;
    int64_t *entry = (int64_t *)malloc(8 * (size_t)(n + 1)), at = 0, e;
    int ok = 1;
    row[n] = 77;
    CHECK_EQ(attn_mask_transpose(a, n_cols, start, row, entry), ATTN_OK);
    for (l = 0; l < a->n_lists; l++)
        for (c = 0; c < n_cols; c++) {
            const int64_t *s = start + l * (n_cols + 1) + c;
            ok &= s[0] == at && s[1] >= s[0];
            for (e = s[0]; e < s[1]; e++, at++) {
                const int64_t *rs = a->row_start + l * (a->n_rows + 1) + row[e];
                ok &= entry[e] >= rs[0] && entry[e] < (a->row_end ? a->row_end[rs - a->row_start]
                                                                  : rs[1]);
                ok &= a->block[entry[e]] == c && (e == s[0] || row[e] > row[e - 1]);
            }
        }
    CHECK(ok && at == n && row[n] == 77);
    if (n) CHECK_EQ(attn_mask_transpose(a, a->block[0], start, row, entry), ATTN_ERR_MASK);
    free(start), free(row), free(entry);
}

// d's sparse terms as lists: of single tokens, which is always exact; of coarser sub-blocks and
// fewer lists, exact or refused.
static void as_lists(const attn_desc *d, test_rng *r) {
    const int32_t s = test_below(r, d->n_seq), q_len = d->q_start[s + 1] - d->q_start[s];
    const int32_t lists[3] = {d->n_heads, d->n_kv_heads, 1};
    const int32_t rb = 1 << test_below(r, 6), kb = 1 << test_below(r, 6);
    const int32_t cols = (d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0) + d->kv.kv_len[s];
    int32_t rows = (d->q_pos0 ? d->q_pos0[s] : cols - q_len) + q_len, i;
    for (i = 0; i < 4 && rows > 0 && cols > 0 && q_len > 0; i++) {
        const int32_t br = i ? 1 << test_below(r, 6) : rb, bc = i ? 1 << test_below(r, 6) : kb;
        const int32_t n_lists = lists[i ? test_below(r, 3) : 0];
        const int64_t n_rows = (rows - 1) / rb + 1;
        int64_t *start, n = -1, m = -1, words = ((int64_t)br * bc + 63) / 64;
        int32_t *block;
        uint64_t *bits, one;
        attn_block_list list;
        attn_desc e = *d;
        attn_result got;
        if (rb % br || kb % bc) continue;
        start = (int64_t *)malloc(8 * (size_t)(n_lists * (n_rows + 1)));
        got = attn_mask_lists(d, s, n_lists, rows, cols, rb, kb, br, bc, start, NULL, &one, 0, &n,
                              &list);
        if (got != ATTN_OK) { // a list without rows for all positions, or too coarse
            CHECK_EQ(got, ATTN_ERR_MASK);
            CHECK(i || d->mask.blocks.row_start);
            free(start);
            continue;
        }
        block = (int32_t *)malloc(4 * (size_t)(n + 1));
        bits = (uint64_t *)malloc(8 * (size_t)((n + 1) * words));
        block[n] = 77, bits[n * words] = 77;
        CHECK_EQ(attn_mask_lists(d, s, n_lists, rows, cols, rb, kb, br, bc, start, block, bits, n,
                                 &m, &list), ATTN_OK);
        CHECK(m == n && block[n] == 77 && bits[n * words] == 77);
        if (n > 1)
            CHECK_EQ(attn_mask_lists(d, s, n_lists, rows, cols, rb, kb, br, bc, start, block, bits,
                                     n - 1, &m, &list), ATTN_ERR_FULL);
        e.mask.blocks = list;
        e.mask.stride.block = e.mask.vslash.block = e.mask.keep_sink = e.mask.keep_recent = 0;
        CHECK(same_pairs(d, &e, s));
        transposed(&list, n, (cols - 1) / kb + 1);
        free(start), free(block), free(bits);
    }
}

// What no later query sees, against all queries of a while.
static void evictable(const attn_desc *d, test_rng *r) {
    const int32_t s = test_below(r, d->n_seq), group = d->n_heads / d->n_kv_heads;
    const int32_t pos0 = d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0, len = d->kv.kv_len[s];
    const int32_t pt = d->kv.page_tokens, n_pages = (len + pt - 1) / pt;
    int32_t from[1], start[2] = {0, 500}, held[1], first[1], h, j, t, q;
    uint8_t *out = (uint8_t *)calloc((size_t)(d->n_kv_heads * n_pages + 1), 1);
    attn_desc e = *d;
    from[0] = pos0 + test_below(r, len + 3);
    held[0] = len, first[0] = pos0;
    e.n_seq = 1, e.q_start = start, e.q_pos0 = from, e.kv.kv_len = held, e.kv.kv_pos0 = first;
    out[d->n_kv_heads * n_pages] = 77;
    CHECK_EQ(attn_mask_evictable(d, s, from[0], out), ATTN_OK);
    CHECK_EQ(out[d->n_kv_heads * n_pages], 77);
    for (h = 0; h < d->n_kv_heads; h++)
        for (j = 0; j < n_pages; j++) {
            int seen = d->mask.kind != ATTN_MASK_CAUSAL || d->mask.blocks.row_start ||
                       pos0 + (j + 1) * pt > from[0];
            if (d->mask.blocks.row_start && d->mask.window_left) continue; // by the window, or not
            for (t = j * pt; t < (j + 1) * pt && t < len && !seen; t++)
                for (q = 0; q < 500 && !seen; q++)
                    seen = visible(&e, 0, q, h * group, t) ||
                           visible(&e, 0, q, h * group + test_below(r, group), t) ||
                           visible(&e, 0, q, h * group + group - 1, t);
            if (group < 3) CHECK_EQ(out[h * n_pages + j], !seen);
            else CHECK(!out[h * n_pages + j] || !seen);
        }
    free(out);
}

// ---- random problems

static void random_problem(uint64_t seed, int kind) {
    static const attn_dtype types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                       ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    problem_opts o;
    problem p;
    test_rng r;
    int32_t s, t, h, j, n_vis = 0, n_all = 0;
    size_t n, i;
    double *x, *lse, top = 0;
    r.state = seed;
    memset(&o, 0, sizeof o);
    o.mask = kind;
    o.phase = test_below(&r, N_PHASES);
    o.layout = (attn_layout)test_below(&r, 3);
    o.contiguous = test_below(&r, 4) == 0;
    o.page_tokens = o.layout == ATTN_K16 ? 16 : 1 + test_below(&r, 20);
    o.n_seq = 1 + test_below(&r, 4);
    o.max_kv = 1 + test_below(&r, 90);
    o.n_kv_heads = 1 + test_below(&r, 3);
    o.n_heads = o.n_kv_heads * (1 + test_below(&r, 3));
    o.head_dim = 8 + 8 * test_below(&r, 3);
    o.v_head_dim = 8 + 8 * test_below(&r, 3);
    o.k = types[test_below(&r, 7)];
    o.v = types[test_below(&r, 7)];
    o.q = types[test_below(&r, 3)];
    o.o = ATTN_F32;
    o.softcap = test_below(&r, 3) == 0;
    o.alibi = test_below(&r, 3) == 0;
    o.sink = test_below(&r, 3) == 0;
    o.bias = test_below(&r, 3) == 0;
    o.head_scale = test_below(&r, 4) == 0;
    o.evicted = test_below(&r, 2);
    o.shared = test_below(&r, 3) == 0 ? 16 : 0;
    o.sharp = 3;
    problem_make(&p, &o, &r);
    if (!o.evicted && test_below(&r, 2)) p.d.kv.kv_pos0 = NULL; // the defaults
    if (test_below(&r, 2)) p.d.q_pos0 = NULL;
    if (test_below(&r, 4) == 0) p.d.logits.scale = 0.3f;
    // terms of a sparse mask alone, and without the causal one that hides much
    if (test_below(&r, 8) == 0 && p.d.mask.keep_sink) {
        p.d.mask.blocks.row_start = NULL, p.d.mask.vslash.block = 0, p.d.mask.stride.block = 0;
        p.d.mask.keep_recent = 0;
    }
    if (test_below(&r, 3) == 0 && p.d.mask.kind == ATTN_MASK_CAUSAL)
        p.d.mask.kind = ATTN_MASK_FULL;
    CHECK_EQ(attn_validate(&p.d), ATTN_OK);
    for (s = 0; s < p.d.n_seq; s++)
        for (t = p.d.q_start[s]; t < p.d.q_start[s + 1]; t++)
            for (h = 0; h < p.d.n_heads; h++)
                for (j = 0; j < p.d.kv.kv_len[s]; j++) {
                    int mine = visible(&p.d, s, t, h, j), its = attn_ref_visible(&p.d, s, t, h, j);
                    n_all++;
                    n_vis += mine;
                    if (mine == its) continue;
                    CHECK(mine == its);
                    printf("  seed %llu %s: sequence %d query %d head %d key %d: %d, by the "
                           "comments %d\n",
                           (unsigned long long)seed, problem_masks[kind], s, t, h, j, its, mine);
                    goto done;
                }
    CHECK(n_all >= n_vis); // counts the problem
    if (attni_has_sparse(&p.d.mask) && p.d.mask.kind != ATTN_MASK_TREE) as_lists(&p.d, &r);
    evictable(&p.d, &r);
    n = (size_t)p.n_tokens * (size_t)o.n_heads;
    x = (double *)calloc(n * (size_t)o.v_head_dim + 1, 8);
    lse = (double *)calloc(n + 1, 8);
    CHECK_EQ(attn_ref_forward(&p.d, p.ref, p.ref_lse), ATTN_OK);
    naive(&p.d, x, lse);
    for (i = 0; i < n * (size_t)o.v_head_dim; i++)
        if (fabs(x[i]) > top) top = fabs(x[i]);
    for (i = 0; i < n * (size_t)o.v_head_dim; i++)
        if (!(fabs(x[i] - p.ref[i]) <= 1e-12 * (1 + top))) break;
    if (!CHECK(i == n * (size_t)o.v_head_dim))
        printf("  seed %llu %s: o[%d] %.17g against naive %.17g\n", (unsigned long long)seed,
               problem_masks[kind], (int)i, p.ref[i], x[i]);
    for (i = 0; i < n; i++)
        if (!(lse[i] == p.ref_lse[i] || fabs(lse[i] - p.ref_lse[i]) <= 1e-12 * (1 + fabs(lse[i]))))
            break;
    if (!CHECK(i == n))
        printf("  seed %llu %s: lse %.17g against naive %.17g\n", (unsigned long long)seed,
               problem_masks[kind], p.ref_lse[i], lse[i]);
    free(x), free(lse);
done:
    problem_free(&p);
}

// ---- dkernel's published patterns: 8 blocks, local 2, stride 3, head 0

static void golden(void) {
    static const char *const causal[8] = {"0", "01", "012", "023", "034", "0345", "0356", "0367"};
    static const char *const both[8] = {"0147", "0125", "1236", "2347",
                                        "0345", "1456", "2567", "0367"};
    static const int32_t q_start[2] = {0, 128}, kv_len[1] = {128};
    int bidi, i, j;
    attn_desc d;
    float x[8];
    memset(&d, 0, sizeof d);
    d.n_seq = d.n_heads = d.n_kv_heads = 1;
    d.head_dim = 8;
    d.q_start = q_start;
    d.q.data = d.o.data = d.kv.k.data = d.kv.v.data = x;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.kv_len = kv_len;
    d.kv.n_pages = 1;
    d.kv.page_tokens = 128;
    d.mask.stride.block = 16;
    d.mask.stride.local = 2;
    d.mask.stride.stride = 3;
    for (bidi = 0; bidi < 2; bidi++) {
        d.mask.kind = bidi ? ATTN_MASK_FULL : ATTN_MASK_CAUSAL;
        d.mask.stride.bidirectional = bidi;
        CHECK_EQ(attn_validate(&d), ATTN_OK);
        for (i = 0; i < 128; i++)
            for (j = 0; j < 128; j++) {
                const char *row = bidi ? both[i / 16] : causal[i / 16];
                int want = strchr(row, '0' + j / 16) != NULL && (bidi || j <= i);
                CHECK(attn_ref_visible(&d, 0, i, 0, j) == want);
            }
    }
}

// ---- a boolean matrix and back

static void dense_round_trip(uint64_t seed) {
    test_rng r;
    int32_t rows, cols, rb, kb, i, j, q_start[2] = {0, 0}, kv_len[1], q_pos0[1] = {0};
    int64_t n = -1, m = -1, words, *start, guard = 0x5a5a5a5a5a5a5a5a, e;
    uint8_t *matrix;
    int32_t *block;
    uint64_t *bits;
    attn_block_list list;
    attn_desc d;
    float x[8];
    int ok = 1;
    r.state = seed;
    rows = 1 + test_below(&r, 70);
    cols = 1 + test_below(&r, 70);
    rb = 1 + test_below(&r, 40);
    kb = 1 + test_below(&r, 90);
    matrix = (uint8_t *)calloc((size_t)(rows * cols), 1);
    for (i = 0; i < rows * cols; i++)
        matrix[i] = (uint8_t)(test_below(&r, 8) ? 0 : 1 + test_below(&r, 255));
    start = (int64_t *)malloc(8 * (size_t)(rows + 2));
    start[(rows + rb - 1) / rb + 1] = guard;
    CHECK_EQ(attn_mask_from_dense(matrix, rows, cols, rb, kb, start, NULL, NULL, 0, &n, &list),
             ATTN_OK);
    words = (rb * kb + 63) / 64;
    block = (int32_t *)malloc(4 * (size_t)(n + 1));
    bits = (uint64_t *)malloc(8 * (size_t)((n + 1) * words));
    memset(block, 0x5a, 4 * (size_t)(n + 1));
    memset(bits, 0x5a, 8 * (size_t)((n + 1) * words));
    if (n > 1) { // one too few: an error, and nothing behind the capacity
        CHECK_EQ(
            attn_mask_from_dense(matrix, rows, cols, rb, kb, start, block, bits, n - 1, &m, &list),
            ATTN_ERR_FULL);
        CHECK_EQ(m, n);
        CHECK(block[n - 1] == 0x5a5a5a5a && bits[(n - 1) * words] == 0x5a5a5a5a5a5a5a5au);
    }
    CHECK_EQ(attn_mask_from_dense(matrix, rows, cols, rb, kb, start, block, bits, n, &m, &list),
             ATTN_OK);
    CHECK_EQ(m, n);
    CHECK(block[n] == 0x5a5a5a5a && bits[n * words] == 0x5a5a5a5a5a5a5a5au);
    CHECK(start[(rows + rb - 1) / rb + 1] == guard);
    CHECK(list.row_start == start && list.block == block && list.bits == bits && list.n_lists == 1);
    for (e = 0; e < n; e++) { // no entry without a pair
        uint64_t any = 0;
        for (i = 0; i < words; i++) any |= bits[e * words + i];
        ok &= any != 0;
    }
    CHECK(ok);
    memset(&d, 0, sizeof d);
    d.n_seq = d.n_heads = d.n_kv_heads = 1;
    d.head_dim = 8;
    q_start[1] = rows;
    kv_len[0] = cols;
    d.q_start = q_start;
    d.q_pos0 = q_pos0;
    d.q.data = d.o.data = d.kv.k.data = d.kv.v.data = x;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.kv_len = kv_len;
    d.kv.n_pages = 1;
    d.kv.page_tokens = cols;
    d.mask.kind = ATTN_MASK_FULL;
    d.mask.blocks = list;
    CHECK_EQ(attn_validate(&d), ATTN_OK);
    for (i = 0; i < rows; i++)
        for (j = 0; j < cols; j++) {
            ok &= visible(&d, 0, i, 0, j) == (matrix[i * cols + j] != 0);
            ok &= attn_ref_visible(&d, 0, i, 0, j) == (matrix[i * cols + j] != 0);
        }
    if (!CHECK(ok)) printf("  dense seed %llu\n", (unsigned long long)seed);
    free(matrix), free(start), free(block), free(bits);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 1500), i;
    golden();
    codes();
    for (i = 0; i < count; i++) random_problem(seed + i, (int)(i % N_MASKS));
    for (i = 0; i < count; i++) dense_round_trip(seed + i);
    return TEST_END();
}

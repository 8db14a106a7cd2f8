/* fuzz_mask.c - masks: the bad are refused, the good show every query exactly the keys that a
   literal reading of attn.h's definitions shows it.
   cc -DFUZZ_MAIN -I. -Itests tests/fuzz/fuzz_mask.c -o fuzz_mask -lm && ./fuzz_mask CORPUS

   Shapes are valid by construction, mask fields are not; so attn_validate must say OK exactly when
   the rules written out below hold. A good mask is compared pair by pair with attn_ref_visible and
   with the 256-key bit sets that backends run on; then Q = 0 makes the executor average V over the
   visible keys, which is the same comparison once more through planner, tasks and merge. */
#include "fuzz.h"

#include <math.h>

#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

enum { MAX_SEQ = 2, MAX_Q = 6, MAX_KV = 330, DIM = 8, MAX_IDS = 300, PT = 16 };

typedef struct model {
    fuzz_in in;
    attn_desc d;
    int32_t q_start[MAX_SEQ + 1], q_pos0[MAX_SEQ], kv_len[MAX_SEQ], kv_pos0[MAX_SEQ];
    int32_t *parent, *seq_row, *ids[3]; // ids of blocks, columns, diagonals
    int64_t *start[3];
    uint64_t *bits;
    int64_t n_ids; // of the CSR made last
} model;

// ---- a mask from bytes

static int lists_ok(const attn_desc *d, int32_t n) {
    return n == 1 || n == d->n_kv_heads || n == d->n_heads;
}

static int32_t mostly(fuzz_in *in, int32_t lo, int32_t hi) { // in [lo, hi], seldom anything
    uint32_t k = fuzz_u8(in);
    if (k >= 250) return fuzz_edge32(in);
    return lo + (int32_t)(k % (uint32_t)(hi - lo + 1));
}

static int32_t block_size(fuzz_in *in) {
    static const int32_t sizes[] = {1, 2, 3, 8, 16, 24, 64, 100, 256, 300, 1000, INT32_MAX};
    uint32_t k = fuzz_u8(in);
    return k >= 250 ? fuzz_edge32(in) : sizes[k % 12];
}

static int32_t n_lists(model *m) {
    switch (fuzz_below(&m->in, 8)) {
    case 0: return fuzz_edge32(&m->in);
    case 1: case 2: return m->d.n_heads;
    case 3: case 4: return m->d.n_kv_heads;
    default: return 1;
    }
}

// CSR of n rows in each of n_lists lists, mostly in order. Exactly the memory that the offsets ask
// for, so that reading past a list is seen.
static void make_csr(model *m, int which, int32_t lists, int32_t rows, int negative) {
    int32_t id[MAX_IDS], n = 0, next, l, i, more, least = negative ? -8 : 0;
    int64_t n_start, at = 0;
    if (lists < 1 || lists > m->d.n_heads) lists = 1;
    n_start = (int64_t)lists * (rows + 1);
    m->start[which] = (int64_t *)fuzz_alloc((size_t)n_start * sizeof(int64_t));
    for (l = 0; l < lists; l++)
        for (i = 0; i <= rows; i++) {
            m->start[which][at++] = n;
            if (i == rows) break;
            more = fuzz_below(&m->in, 6);
            for (next = least; more > 0 && n < MAX_IDS; more--) {
                uint32_t k = fuzz_u8(&m->in);
                id[n++] = k >= 253 ? fuzz_edge32(&m->in) : next;
                next += (int32_t)(k % 7) + (k < 250); // seldom the same again
            }
        }
    if (fuzz_u8(&m->in) >= 245) { // offsets that descend or are negative
        at = fuzz_below(&m->in, (int32_t)n_start);
        m->start[which][at] = fuzz_below(&m->in, n + 3) - 2;
        if (m->start[which][at] > n) m->start[which][at] = n;
    }
    m->ids[which] = (int32_t *)fuzz_copy(id, (size_t)n * sizeof *id);
    m->n_ids = n;
}

static void make_blocks(model *m) {
    attn_block_list *b = &m->d.mask.blocks;
    int32_t s, i, rows = 1 + fuzz_below(&m->in, 12);
    int64_t words;
    b->row_block = block_size(&m->in);
    b->kv_block = block_size(&m->in);
    b->n_lists = n_lists(m);
    b->n_rows = fuzz_u8(&m->in) >= 250 ? -fuzz_below(&m->in, 3) : rows;
    make_csr(m, 0, b->n_lists, rows, 0);
    b->row_start = m->start[0];
    b->block = m->ids[0];
    m->seq_row = (int32_t *)fuzz_alloc((size_t)m->d.n_seq * sizeof(int32_t));
    for (s = 0; s < m->d.n_seq; s++) { // mostly where its rows fall inside the list
        int64_t p = m->q_pos0[s] / (b->row_block > 0 ? b->row_block : 1);
        m->seq_row[s] = (int32_t)(uint32_t)(uint64_t)(mostly(&m->in, 0, 8) - p); // may wrap
    }
    b->seq_row = fuzz_below(&m->in, 4) ? m->seq_row : NULL;
    if (fuzz_below(&m->in, 2)) return;
    b->bits_rows = mostly(&m->in, 1, 8);
    b->bits_cols = mostly(&m->in, 1, 8);
    if (b->row_block > 0 && b->bits_rows <= 64 && fuzz_below(&m->in, 2))
        while (b->bits_rows > 1 && b->row_block % b->bits_rows) b->bits_rows--;
    if (b->kv_block > 0 && b->bits_cols <= 64 && fuzz_below(&m->in, 2))
        while (b->bits_cols > 1 && b->kv_block % b->bits_cols) b->bits_cols--;
    words = ((int64_t)b->bits_rows * b->bits_cols + 63) / 64;
    if (b->bits_rows < 1 || b->bits_cols < 1 || words > 64) {
        if (words > 64) b->bits_rows = b->bits_cols = 1;
        words = 1;
    }
    m->bits = (uint64_t *)fuzz_alloc((size_t)(m->n_ids * words) * 8);
    for (i = 0; i < m->n_ids * words; i++)
        m->bits[i] = ((uint64_t)fuzz_u8(&m->in) * 0x0101010101010101u) ^ (uint64_t)i * 0x9e3779b9u;
    b->bits = m->bits;
}

static void make_vslash(model *m) {
    attn_vertical_slash *v = &m->d.mask.vslash;
    int32_t rows;
    v->block = block_size(&m->in);
    v->n_lists = n_lists(m);
    rows = lists_ok(&m->d, v->n_lists) ? v->n_lists : 1; // here a list is a row of the CSR
    make_csr(m, 1, 1, rows, 0);
    make_csr(m, 2, 1, rows, 1);
    v->col_start = m->start[1];
    v->col = m->ids[1];
    v->diag_start = m->start[2];
    v->diag = m->ids[2];
}

static void make_stride(model *m) {
    attn_local_stride *r = &m->d.mask.stride;
    r->block = block_size(&m->in);
    r->local = mostly(&m->in, 1, 6);
    r->stride = mostly(&m->in, 1, 9);
    r->head_step = mostly(&m->in, 0, 3);
    r->offset = mostly(&m->in, 0, 4);
    r->homogeneous = fuzz_below(&m->in, 4) == 0;
    r->n_dense = fuzz_below(&m->in, 4) ? 0 : mostly(&m->in, 0, 3);
    if (fuzz_below(&m->in, 3) == 0) {
        r->head0 = mostly(&m->in, 0, 3);
        r->n_heads_total = mostly(&m->in, m->d.n_kv_heads, 8);
    }
    r->bidirectional = fuzz_below(&m->in, 3) == 0;
    r->local_right = mostly(&m->in, 0, 4);
}

static void make_mask(model *m) {
    attn_mask *k = &m->d.mask;
    uint32_t terms = fuzz_u8(&m->in);
    int32_t t, s;
    k->kind = (attn_mask_kind)fuzz_below(&m->in, 3);
    if (k->kind == ATTN_MASK_TREE && fuzz_u8(&m->in) < 250) {
        m->parent = (int32_t *)fuzz_alloc((size_t)m->q_start[m->d.n_seq] * sizeof(int32_t));
        for (s = 0; s < m->d.n_seq; s++)
            for (t = 0; t < m->q_start[s + 1] - m->q_start[s]; t++)
                m->parent[m->q_start[s] + t] = (int32_t)((uint32_t)mostly(&m->in, 0, t) - 1u);
        k->tree_parent = m->parent;
    }
    if (terms & 1) k->window_left = mostly(&m->in, 1, 200);
    if (terms & 2) k->window_right = mostly(&m->in, 1, 60);
    if (terms & 4) k->n_sink = mostly(&m->in, 1, 40);
    if (terms & 8) k->keep_sink = mostly(&m->in, 1, 40);
    if (terms & 16) k->keep_recent = mostly(&m->in, 1, 90);
    if (terms & 32) make_stride(m);
    if (terms & 64) make_vslash(m);
    if (terms & 128) make_blocks(m);
}

static void make_shape(model *m) {
    attn_desc *d = &m->d;
    int32_t s, len, q, far;
    d->n_seq = 1 + fuzz_below(&m->in, MAX_SEQ);
    d->n_kv_heads = 1 + fuzz_below(&m->in, 2);
    d->n_heads = d->n_kv_heads * (1 + fuzz_below(&m->in, 3));
    d->head_dim = DIM;
    for (s = 0; s < d->n_seq; s++) {
        len = fuzz_below(&m->in, 4) ? fuzz_below(&m->in, 40) : fuzz_below(&m->in, MAX_KV);
        q = fuzz_below(&m->in, MAX_Q + 1);
        far = fuzz_below(&m->in, 8);
        m->kv_len[s] = len;
        m->kv_pos0[s] = far < 4 ? 0 : far < 6 ? fuzz_below(&m->in, 600)
                        : far < 7 ? INT32_MAX - 2 * MAX_KV : 256 * fuzz_below(&m->in, 9000);
        if (q > len && fuzz_u8(&m->in) < 200) q = len;
        m->q_pos0[s] = m->kv_pos0[s] + len - q;
        if (fuzz_u8(&m->in) >= 200) m->q_pos0[s] += fuzz_below(&m->in, 256) - 128;
        if (m->q_pos0[s] < 0) m->q_pos0[s] = 0;
        m->q_start[s + 1] = m->q_start[s] + q;
    }
    d->q_start = m->q_start;
    d->q_pos0 = m->q_pos0;
    d->kv.kv_len = m->kv_len;
    d->kv.kv_pos0 = m->kv_pos0;
}

// ---- the rules of attn.h, read literally

static int csr_ok(const int64_t *start, const int32_t *id, int64_t n, int negative) {
    int64_t i, e;
    for (i = 0; i <= n; i++)
        if (start[i] < 0 || (i > 0 && start[i] < start[i - 1])) return 0;
    for (i = 0; i < n; i++)
        for (e = start[i]; e < start[i + 1]; e++)
            if ((id[e] < 0 && !negative) || (e > start[i] && id[e - 1] >= id[e])) return 0;
    return 1;
}

static int blocks_ok(const model *m) {
    const attn_block_list *b = &m->d.mask.blocks;
    int32_t s, l, t;
    if (b->row_block < 1 || b->kv_block < 1 || b->n_rows < 1 || !lists_ok(&m->d, b->n_lists))
        return 0;
    if (b->bits && (b->bits_rows < 1 || b->bits_cols < 1)) return 0;
    if (b->bits && (b->row_block % b->bits_rows || b->kv_block % b->bits_cols)) return 0;
    for (l = 0; l < b->n_lists; l++)
        if (!csr_ok(b->row_start + (size_t)l * (size_t)(b->n_rows + 1), b->block, b->n_rows, 0))
            return 0;
    for (s = 0; s < m->d.n_seq; s++)
        for (t = 0; t < m->q_start[s + 1] - m->q_start[s]; t++) {
            int64_t row = ((int64_t)m->q_pos0[s] + t) / b->row_block;
            if (b->seq_row) row += b->seq_row[s];
            if (row < 0 || row >= b->n_rows) return 0;
        }
    return 1;
}

static int tree_ok(const model *m) {
    int32_t s, t;
    if (!m->parent) return 0;
    for (s = 0; s < m->d.n_seq; s++) {
        int32_t q = m->q_start[s + 1] - m->q_start[s];
        if (q > 0 && (q > m->kv_len[s] ||
                      (int64_t)m->q_pos0[s] + q != (int64_t)m->kv_pos0[s] + m->kv_len[s]))
            return 0;
        for (t = 0; t < q; t++)
            if (m->parent[m->q_start[s] + t] < -1 || m->parent[m->q_start[s] + t] >= t) return 0;
    }
    return 1;
}

static int mask_ok(const model *m) {
    const attn_mask *k = &m->d.mask;
    const attn_local_stride *r = &k->stride;
    const attn_vertical_slash *v = &k->vslash;
    int64_t total = r->n_heads_total ? r->n_heads_total : m->d.n_kv_heads;
    if (k->window_left < 0 || k->window_right < 0 || k->n_sink < 0) return 0;
    if (k->keep_sink < 0 || k->keep_recent < 0 || r->block < 0 || v->block < 0) return 0;
    if (r->block > 0) {
        if (r->local < 1 || r->stride < 1 || r->head_step < 0 || r->offset < 0) return 0;
        if (r->local_right < 0 || r->n_dense < 0 || r->n_dense > total || r->head0 < 0) return 0;
        if ((r->homogeneous && r->n_dense) || (int64_t)r->head0 + m->d.n_kv_heads > total) return 0;
    }
    if (v->block > 0) {
        if (!lists_ok(&m->d, v->n_lists)) return 0;
        if (!csr_ok(v->col_start, v->col, v->n_lists, 0)) return 0;
        if (!csr_ok(v->diag_start, v->diag, v->n_lists, 1)) return 0;
    }
    if (k->kind == ATTN_MASK_TREE && !tree_ok(m)) return 0;
    return !k->blocks.row_start || blocks_ok(m);
}

static int32_t list_of(const model *m, int32_t lists, int32_t head) {
    if (lists == m->d.n_heads) return head;
    return lists == m->d.n_kv_heads ? head / (m->d.n_heads / m->d.n_kv_heads) : 0;
}

static int listed(const int64_t *start, const int32_t *id, int64_t x, int64_t *entry) {
    int64_t e;
    for (e = start[0]; e < start[1]; e++)
        if (id[e] == x) {
            *entry = e;
            return 1;
        }
    return 0;
}

static int stride_keeps(const model *m, int32_t head, int64_t p, int64_t k) {
    const attn_local_stride *r = &m->d.mask.stride;
    int64_t total = r->n_heads_total ? r->n_heads_total : m->d.n_kv_heads, i = p / r->block;
    int64_t j = k / r->block, h = head / (m->d.n_heads / m->d.n_kv_heads) + r->head0, step, a, b;
    int dense = !r->homogeneous && h >= total - r->n_dense;
    if (r->homogeneous) h = 0;
    step = r->head_step ? r->head_step : r->stride / total > 1 ? r->stride / total : 1;
    if (!r->bidirectional)
        return j <= i && (dense || i - j < r->local || (j + h * step + r->offset) % r->stride == 0);
    a = i - j - r->local + 1;
    b = j - i - (r->local_right ? r->local_right : r->local) + 1;
    return dense || ((a > 0 ? a : 0) + (b > 0 ? b : 0)) % r->stride == 0;
}

static int blocks_keep(const model *m, int32_t s, int32_t head, int64_t p, int64_t k) {
    const attn_block_list *b = &m->d.mask.blocks;
    int64_t row = p / b->row_block + (b->seq_row ? b->seq_row[s] : 0), e, bit, words;
    const int64_t *start = b->row_start + list_of(m, b->n_lists, head) * (b->n_rows + (int64_t)1);
    if (!listed(start + row, b->block, k / b->kv_block, &e)) return 0;
    if (!b->bits) return 1;
    words = ((int64_t)b->bits_rows * b->bits_cols + 63) / 64;
    bit = p % b->row_block / (b->row_block / b->bits_rows) * b->bits_cols +
          k % b->kv_block / (b->kv_block / b->bits_cols);
    return (int)(b->bits[e * words + bit / 64] >> (bit % 64) & 1);
}

static int sparse_keeps(const model *m, int32_t s, int32_t head, int64_t p, int64_t k) {
    const attn_mask *a = &m->d.mask;
    const attn_vertical_slash *v = &a->vslash;
    int64_t e;
    int any = a->blocks.row_start || a->stride.block || v->block || a->keep_sink || a->keep_recent;
    if (!any || k < a->keep_sink || (a->keep_recent && p - k < a->keep_recent)) return 1;
    if (a->stride.block && stride_keeps(m, head, p, k)) return 1;
    if (v->block) {
        int32_t l = list_of(m, v->n_lists, head);
        if (listed(v->col_start + l, v->col, k / v->block, &e)) return 1;
        if (listed(v->diag_start + l, v->diag, p / v->block - k / v->block, &e)) return 1;
    }
    return a->blocks.row_start && blocks_keep(m, s, head, p, k);
}

static int32_t depth_of(const model *m, int32_t s, int32_t t) {
    int32_t n = 0;
    while ((t = m->parent[m->q_start[s] + t]) >= 0) n++;
    return n;
}

// Query t of sequence s, held token j.
static int visible(const model *m, int32_t s, int32_t t, int32_t head, int32_t j) {
    const attn_mask *a = &m->d.mask;
    int64_t p = (int64_t)m->q_pos0[s] + t, k = (int64_t)m->kv_pos0[s] + j;
    if (a->kind == ATTN_MASK_TREE) {
        p = (int64_t)m->q_pos0[s] + depth_of(m, s, t);
        if (k >= m->q_pos0[s]) {
            int32_t node = (int32_t)(k - m->q_pos0[s]), up = t;
            while (up >= 0 && up != node) up = m->parent[m->q_start[s] + up];
            if (up < 0) return 0;
            k = (int64_t)m->q_pos0[s] + depth_of(m, s, node);
        }
    } else if (a->kind == ATTN_MASK_CAUSAL && k > p) {
        return 0;
    }
    if (k >= a->n_sink) {
        if (a->window_left && k < p - (a->window_left - 1)) return 0;
        if (a->window_right && k > p + (a->window_right - 1)) return 0;
    }
    return sparse_keeps(m, s, head, p, k);
}

// ---- comparisons

// One row against both of the library's functions; sum and number of the V it should average.
static void check_row(const model *m, attni_masker *w, int32_t s, int32_t t, int32_t h, double *sum,
                      int32_t *n) {
    static const attn_plan_params no_rules;
    const attn_desc *d = &m->d;
    attn_plan_seq q;
    uint64_t bits[4] = {0, 0, 0, 0};
    int64_t p = (int64_t)m->q_pos0[s] + t, span = -1, k;
    int32_t j;
    attni_seq_spans(d, &no_rules, s, &q);
    if (d->mask.kind == ATTN_MASK_TREE) p = (int64_t)m->q_pos0[s] + depth_of(m, s, t);
    *sum = 0;
    *n = 0;
    for (j = 0; j < m->kv_len[s]; j++) {
        int want = visible(m, s, t, h, j), inside;
        FUZZ_CHECK(attn_ref_visible(d, s, m->q_start[s] + t, h, j) == want);
        k = (int64_t)m->kv_pos0[s] + j;
        inside = k / ATTN_SPAN >= q.span0 && k / ATTN_SPAN < q.span1;
        FUZZ_CHECK(inside || !want); // no task would look there
        if (inside && k / ATTN_SPAN != span) {
            span = k / ATTN_SPAN;
            attni_span_bits(w, &q, s, t, p, h, (int32_t)span, bits);
        }
        FUZZ_CHECK(!inside || (int)(bits[k % ATTN_SPAN / 64] >> (k % 64) & 1) == want);
        if (want) *sum += j % 31, ++*n;
    }
}

static void check_output(model *m) {
    attn_desc *d = &m->d;
    int32_t n_tokens = m->q_start[d->n_seq], s, t, h, j, e, n, pages = 0, threads;
    int32_t table[MAX_SEQ * (MAX_KV / PT + 1)];
    size_t rows = (size_t)(n_tokens * d->n_heads), page, bytes;
    float *kv, *q, *o;
    void *mem;
    attni_masker w;
    double sum;
    for (s = 0; s < d->n_seq; s++)
        for (j = 0; j < MAX_KV / PT + 1; j++) table[s * (MAX_KV / PT + 1) + j] = pages++;
    page = (size_t)(PT * d->n_kv_heads * DIM);
    kv = (float *)fuzz_alloc((size_t)pages * page * 4);
    memset(kv, 0xff, (size_t)pages * page * 4); // NaN where nothing is held
    for (s = 0; s < d->n_seq; s++)
        for (j = 0; j < m->kv_len[s]; j++)
            for (e = 0; e < d->n_kv_heads * DIM; e++)
                kv[(size_t)table[s * (MAX_KV / PT + 1) + j / PT] * page +
                   (size_t)(j % PT * d->n_kv_heads * DIM + e)] = (float)(j % 31);
    q = (float *)fuzz_alloc(rows * DIM * 4);
    memset(q, 0, rows * DIM * 4);
    o = (float *)fuzz_alloc(rows * DIM * 4);
    memset(o, 0xff, rows * DIM * 4);
    d->q.data = q;
    d->o.data = o;
    d->kv.k.data = d->kv.v.data = kv;
    d->kv.n_pages = pages;
    d->kv.page_table = table;
    d->kv.page_table_stride = MAX_KV / PT + 1;
    FUZZ_CHECK(attn_validate(d) == ATTN_OK);
    threads = 1 + fuzz_below(&m->in, 4);
    bytes = attn_cpu_forward_bytes(d, threads);
    mem = fuzz_alloc(bytes);
    memset(mem, 0xff, bytes);
    FUZZ_CHECK(bytes > 0 && attn_cpu_forward(d, mem, bytes, threads) == ATTN_OK);
    attni_masker_init(&w, d);
    for (s = 0; s < d->n_seq; s++)
        for (t = 0; t < m->q_start[s + 1] - m->q_start[s]; t++)
            for (h = 0; h < d->n_heads; h++) {
                const float *row = o + ((m->q_start[s] + t) * d->n_heads + h) * DIM;
                check_row(m, &w, s, t, h, &sum, &n);
                sum = n ? sum / n : 0;
                for (e = 0; e < DIM; e++) FUZZ_CHECK(fabs((double)row[e] - sum) <= 1e-4);
            }
    free(mem);
    free(o);
    free(q);
    free(kv);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char untouched[16]; // attn_validate reads tables, never tensors
    model m;
    attn_result r;
    int i;
    memset(&m, 0, sizeof m);
    m.in.p = data;
    m.in.n = size;
    make_shape(&m);
    make_mask(&m);
    m.d.q.data = m.d.o.data = m.d.kv.k.data = m.d.kv.v.data = untouched;
    m.d.q.dtype = m.d.o.dtype = m.d.kv.k.dtype = m.d.kv.v.dtype = ATTN_F32;
    m.d.kv.n_pages = m.d.n_seq;
    m.d.kv.page_tokens = MAX_KV + PT; // contiguous
    r = attn_validate(&m.d);
    FUZZ_CHECK((r == ATTN_OK) == mask_ok(&m));
    m.d.kv.page_tokens = PT;
    if (r == ATTN_OK) check_output(&m);
    for (i = 0; i < 3; i++) {
        free(m.start[i]);
        free(m.ids[i]);
    }
    free(m.parent);
    free(m.seq_row);
    free(m.bits);
    return 0;
}

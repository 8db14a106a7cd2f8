/* fuzz_desc.c - descriptors with hostile values in every field: validate, plan, store, run, merge
   and update never touch memory that a valid descriptor does not own, and what they accept agrees
   with the reference.
   cc -DFUZZ_MAIN -I. -Itests tests/fuzz/fuzz_desc.c -o fuzz_desc -lm && ./fuzz_desc CORPUS

   The input describes a sound problem, which must be accepted, then spoils up to four of its
   fields. While attn_validate looks, tensors point at memory that may not be touched at all; what
   it lets through gets exactly the bytes that its strides and counts ask for (problems that ask for
   more than a few MiB are planned, not run). Plans come from hostile parameters as well. */
#include "fuzz.h"

#include <math.h>
#include <sys/mman.h>

#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

enum { MAX_SEQ = 3, MAX_HEADS = 12, MAX_TABLE = 4096, MAX_TOKENS = 4096, MAX_KEEP = 64 };
#define MAX_BYTES ((int64_t)8 << 20)
#define MAX_WORK 400000 /* multiply-adds of the reference */

typedef struct model {
    fuzz_in in;
    attn_desc d;
    uint64_t rng;
    int spoiled, alias, wild; // wild: values, not only shapes, are out of the ordinary
    int deep; // the sequences share a whole span
    void *keep[MAX_KEEP];
    int n_keep;
    int32_t *q_start, *q_pos0, *kv_len, *kv_pos0, *order, *parent, *table, n_parents;
    float *alibi, *sink, *scale;
    int64_t n_table;
    char *forbidden;
} model;

static void *keep(model *m, void *p) {
    FUZZ_CHECK(m->n_keep < MAX_KEEP);
    return m->keep[m->n_keep++] = p;
}

static void *give(model *m, int64_t bytes) { return keep(m, fuzz_alloc((size_t)bytes)); }

static int32_t pick(fuzz_in *in, const int32_t *from, int32_t n) { return from[fuzz_below(in, n)]; }

// ---- a sound problem

static void make_lengths(model *m, int tree) {
    attn_desc *d = &m->d;
    int32_t n = d->n_seq, s, len, q, how = (int32_t)fuzz_u8(&m->in);
    m->deep = how >= 192;
    m->q_start = (int32_t *)give(m, 4 * (n + 1));
    m->kv_len = (int32_t *)give(m, 4 * n);
    m->q_pos0 = (int32_t *)give(m, 4 * n);
    m->kv_pos0 = (int32_t *)give(m, 4 * n);
    for (m->q_start[0] = s = 0; s < n; s++) {
        len = fuzz_below(&m->in, 6) ? fuzz_below(&m->in, 40) : fuzz_below(&m->in, 600);
        q = fuzz_below(&m->in, 7);
        if (m->deep) len = ATTN_SPAN + len % 90, q /= 2;
        if (q > len) q = len;
        m->kv_len[s] = len;
        m->kv_pos0[s] = how & 1 ? fuzz_below(&m->in, 700) : 0;
        if (m->deep) m->kv_pos0[s] = m->kv_pos0[0] / 256 * 256;
        m->q_pos0[s] = m->kv_pos0[s] + len - q;
        if ((how & 6) == 2 && !tree) m->q_pos0[s] = fuzz_below(&m->in, 60); // queries anywhere
        m->q_start[s + 1] = m->q_start[s] + q;
    }
    d->q_start = m->q_start;
    d->kv.kv_len = m->kv_len;
    if (how & 2) d->q_pos0 = m->q_pos0;
    if (how & 1) d->kv.kv_pos0 = m->kv_pos0;
}

static void make_mask(model *m, int tree) {
    attn_mask *k = &m->d.mask;
    uint32_t terms = fuzz_u8(&m->in);
    int32_t s, t;
    k->kind = tree ? ATTN_MASK_TREE : (attn_mask_kind)(fuzz_below(&m->in, 4) == 0);
    if (tree) {
        m->n_parents = m->q_start[m->d.n_seq];
        m->parent = (int32_t *)give(m, 4 * m->n_parents);
        for (s = 0; s < m->d.n_seq; s++)
            for (t = 0; t < m->q_start[s + 1] - m->q_start[s]; t++)
                m->parent[m->q_start[s] + t] = fuzz_below(&m->in, t + 1) - 1;
        k->tree_parent = m->parent;
    }
    if (terms % 4 == 1) k->window_left = 1 + fuzz_below(&m->in, 200);
    if (terms % 8 == 1) k->window_right = 1 + fuzz_below(&m->in, 50);
    if (terms % 3 == 1) k->n_sink = fuzz_below(&m->in, 20);
    if (terms % 7 == 1) k->keep_sink = fuzz_below(&m->in, 30);
    if (terms % 7 == 1) k->keep_recent = fuzz_below(&m->in, 60);
    if (terms % 5 != 1) return;
    k->stride.block = 1 + fuzz_below(&m->in, 70);
    k->stride.local = 1 + fuzz_below(&m->in, 4);
    k->stride.stride = 1 + fuzz_below(&m->in, 6);
}

static void make_logits(model *m) {
    attn_desc *d = &m->d;
    uint32_t terms = fuzz_u8(&m->in);
    int32_t h, n = d->n_heads;
    if (terms & 1) d->logits.softcap = 4;
    if (terms & 2) {
        d->logits.alibi = m->alibi = (float *)give(m, 4 * n);
        for (h = 0; h < n; h++) m->alibi[h] = 0.1f * fuzz_unit(&m->rng);
    }
    if (terms & 4) {
        d->logits.sink = m->sink = (float *)give(m, 4 * n);
        for (h = 0; h < n; h++) m->sink[h] = 3 * fuzz_unit(&m->rng);
    }
    if (terms & 8) { // a bias: data comes when the extent is known
        d->logits.bias.data = m->forbidden;
        d->logits.bias.dtype = (attn_dtype)(1 + fuzz_below(&m->in, 3));
        d->logits.bias.stride_token = fuzz_below(&m->in, 2) ? 600 : 0;
        d->logits.bias.stride_head = fuzz_below(&m->in, 2) ? 600 * 20 : 0;
    }
    if (terms & 16) d->logits.scale = 0.3f * fuzz_unit(&m->rng);
}

static int32_t pages_of(const model *m, int32_t s) {
    int32_t pt = m->d.kv.page_tokens, len = m->kv_len[s];
    return len > 0 && pt > 0 ? len / pt + (len % pt != 0) : 0;
}

static void make_pages(model *m) {
    static const int32_t sizes[] = {16, 1, 3, 32, 64, 5, 48, 256};
    attn_kv *kv = &m->d.kv;
    int32_t s, j, most = 0, need = 0, n = m->d.n_seq, shared, a, at = 0;
    kv->layout = (attn_layout)fuzz_below(&m->in, 3);
    kv->page_tokens = pick(&m->in, sizes, 8);
    if (kv->layout == ATTN_K16) kv->page_tokens = (kv->page_tokens + 15) / 16 * 16;
    if (!m->deep && fuzz_below(&m->in, 4) == 0) { // contiguous
        for (s = 0; s < n; s++) most = m->kv_len[s] > most ? m->kv_len[s] : most;
        kv->page_tokens = kv->layout == ATTN_K16 ? (most + 16) / 16 * 16 : most + 1;
        kv->n_pages = n;
        return;
    }
    for (s = 0; s < n; s++) {
        a = pages_of(m, s);
        most = a > most ? a : most;
        need += a;
    }
    kv->n_pages = need + 1 + fuzz_below(&m->in, 3);
    kv->page_table_stride = most + fuzz_below(&m->in, 2);
    m->n_table = (n - 1) * kv->page_table_stride + pages_of(m, n - 1);
    m->table = (int32_t *)give(m, 4 * m->n_table);
    shared = fuzz_below(&m->in, 3) ? 0 : fuzz_below(&m->in, 40);
    if (m->deep) shared += ATTN_SPAN / kv->page_tokens;
    for (s = 0; s < n; s++)
        for (j = 0; j < pages_of(m, s); j++, at++) // dealt backwards, so that order means something
            m->table[s * kv->page_table_stride + j] =
                s > 0 && j < shared && j < pages_of(m, 0) ? m->table[j] : kv->n_pages - 1 - at;
    kv->page_table = m->table;
}

static int64_t slack(fuzz_in *in) { return 8 * fuzz_below(in, 3); }

static void make_types(model *m) {
    static const uint8_t qo[] = {1, 1, 2, 3, 3};
    attn_desc *d = &m->d;
    attn_kv *kv = &d->kv;
    int head_major = kv->layout != ATTN_TOKEN_MAJOR;
    int64_t heads = d->n_kv_heads, pt = kv->page_tokens;
    kv->k.dtype = (attn_dtype)(1 + fuzz_below(&m->in, 7));
    kv->v.dtype = (attn_dtype)(1 + fuzz_below(&m->in, 7));
    d->q.dtype = (attn_dtype)qo[fuzz_below(&m->in, 5)];
    d->o.dtype = (attn_dtype)qo[fuzz_below(&m->in, 5)];
    if (fuzz_below(&m->in, 6) == 0) kv->k.dtype = kv->v.dtype = d->q.dtype = d->o.dtype = ATTN_BF16;
    d->numerics = (attn_numerics)fuzz_below(&m->in, 3);
    if (fuzz_below(&m->in, 5) == 0) { // strides with gaps
        d->q.stride_head = d->head_dim + slack(&m->in);
        d->q.stride_token = d->n_heads * d->q.stride_head + slack(&m->in);
        d->o.stride_head = attni_v_dim(d) + slack(&m->in);
        d->o.stride_token = d->n_heads * d->o.stride_head + slack(&m->in);
    }
    if (fuzz_below(&m->in, 5) == 0) {
        m->scale = (float *)give(m, 8 * heads);
        for (int32_t h = 0; h < heads; h++) {
            m->scale[h] = 1.0f / attni_code_max(kv->k.dtype);
            m->scale[heads + h] = 1.0f / attni_code_max(kv->v.dtype);
        }
        kv->k.head_scale = m->scale;
        kv->v.head_scale = m->scale + heads;
    }
    if (kv->layout != ATTN_K16 && attni_v_dim(d) <= d->head_dim && fuzz_below(&m->in, 8) == 0) {
        kv->k.stride_token = (head_major ? 1 : heads) * (int64_t)d->head_dim; // MLA
        kv->k.stride_head = (head_major ? pt : 1) * (int64_t)d->head_dim;
        kv->v = kv->k;
        m->alias = 1;
    }
    if (fuzz_below(&m->in, 6) == 0) {
        kv->k.page_bytes = (int64_t)attn_kv_page_bytes(d, 0) + 64;
        kv->v.page_bytes = m->alias ? kv->k.page_bytes : (int64_t)attn_kv_page_bytes(d, 1) + 4;
    }
}

static void make_problem(model *m) {
    static const int32_t dims[] = {8, 16, 24, 8, 40, 64, 128, 576};
    attn_desc *d = &m->d;
    int tree = fuzz_below(&m->in, 6) == 0, s;
    m->rng = fuzz_u8(&m->in);
    d->n_seq = 1 + fuzz_below(&m->in, MAX_SEQ);
    d->n_kv_heads = 1 + fuzz_below(&m->in, 3);
    d->n_heads = d->n_kv_heads * (1 + fuzz_below(&m->in, MAX_HEADS / 3));
    d->head_dim = pick(&m->in, dims, 8);
    d->v_head_dim = fuzz_below(&m->in, 3) ? 0 : pick(&m->in, dims, 8);
    make_lengths(m, tree);
    make_mask(m, tree);
    make_logits(m);
    make_pages(m);
    make_types(m);
    if (fuzz_below(&m->in, 6) == 0) {
        m->order = (int32_t *)give(m, 4 * d->n_seq);
        for (s = 0; s < d->n_seq; s++) m->order[s] = d->n_seq - 1 - s;
        d->seq_order = m->order;
    }
    d->q.data = d->o.data = d->kv.k.data = d->kv.v.data = m->forbidden;
    if (fuzz_below(&m->in, 2)) d->lse = (float *)(void *)m->forbidden;
}

// ---- spoiling it

static void spoil_shape(model *m) {
    attn_desc *d = &m->d;
    int32_t x = fuzz_edge32(&m->in), s = fuzz_below(&m->in, d->n_seq > 0 ? d->n_seq : 1);
    switch (fuzz_below(&m->in, 22)) {
    case 0: d->n_seq = x < d->n_seq ? x : d->n_seq; break; // tables are no longer than they were
    case 1: d->n_heads = x; break;
    case 2: d->n_kv_heads = x; break;
    case 3: d->head_dim = x; break;
    case 4: d->v_head_dim = x; break;
    case 5: m->q_start[s] = x; break;
    case 6: m->q_start[s + 1] = x; break;
    case 7: m->kv_len[s] = x; break;
    case 8: m->q_pos0[s] = x; d->q_pos0 = m->q_pos0; break;
    case 9: m->kv_pos0[s] = x; d->kv.kv_pos0 = m->kv_pos0; break;
    case 10: d->kv.page_tokens = x; break;
    case 11: d->kv.n_pages = x; break;
    case 12: d->kv.layout = (attn_layout)x; break;
    case 13: d->kv.page_table_stride = fuzz_edge(&m->in); break;
    case 14: if (m->n_table > 0) m->table[0] = x; break;
    case 15: d->numerics = (attn_numerics)x; break;
    case 16: if (m->order) m->order[s] = x; break;
    case 17: d->q_start = NULL; break;
    case 18: d->kv.kv_len = NULL; break;
    case 19: d->kv.page_table = NULL; break;
    case 20: d->kv.kv_pos0 = NULL; break;
    default: d->q_pos0 = NULL;
    }
}

static void spoil_tensor(model *m) {
    attn_desc *d = &m->d;
    attn_kv_array *a = fuzz_below(&m->in, 2) ? &d->kv.k : &d->kv.v;
    attn_tensor *t = fuzz_below(&m->in, 2) ? &d->q : &d->o;
    int64_t x = fuzz_edge(&m->in);
    switch (fuzz_below(&m->in, 16)) {
    case 0: case 1: a->stride_token = x; break;
    case 2: case 3: a->stride_head = x; break;
    case 4: case 5: a->page_bytes = x; break;
    case 6: a->dtype = (attn_dtype)(int32_t)x; break;
    case 7: t->stride_token = x; break;
    case 8: t->stride_head = x; break;
    case 9: t->dtype = (attn_dtype)(int32_t)x; break;
    case 10: t->data = NULL; break;
    case 11: a->data = NULL; break;
    case 12: d->logits.bias.stride_token = x; break;
    case 13: d->logits.bias.stride_head = x; break;
    case 14: d->logits.bias.dtype = (attn_dtype)(int32_t)x; break;
    default: d->logits.bias.data = d->logits.bias.data ? NULL : m->forbidden;
    }
}

static void spoil_values(model *m) {
    attn_desc *d = &m->d;
    attn_local_stride *r = &d->mask.stride;
    int32_t x = fuzz_edge32(&m->in), *field[] = {
        &d->mask.window_left, &d->mask.window_right, &d->mask.n_sink, &d->mask.keep_sink,
        &d->mask.keep_recent, &r->block, &r->local, &r->stride, &r->head_step, &r->offset,
        &r->homogeneous, &r->n_dense, &r->head0, &r->n_heads_total, &r->bidirectional,
        &r->local_right};
    int32_t k = fuzz_below(&m->in, 24);
    float f = fuzz_float(&m->in);
    if (k < 16) {
        *field[k] = x;
        return;
    }
    if (k > 17) m->wild = 1;
    if (k == 16) d->mask.kind = (attn_mask_kind)x;
    else if (k == 17 && m->n_parents > 0) m->parent[0] = x;
    else if (k == 18) d->logits.scale = f;
    else if (k == 19) d->logits.softcap = f;
    else if (k == 20 && m->alibi) m->alibi[0] = f;
    else if (k == 21 && m->sink) m->sink[0] = f;
    else if (k == 22 && m->scale) m->scale[0] = f;
}

// ---- the memory that a problem demands, in 64 bits and without the library's help; < 0: too much

static int64_t mul(int64_t a, int64_t b) {
    return a < 0 || b < 0 || (b > 0 && a > ((int64_t)1 << 50) / b) ? (int64_t)1 << 50 : a * b;
}

static int64_t tensor_elements(const attn_tensor *t, int64_t tokens, int64_t heads, int64_t dim) {
    int64_t st = t->stride_token ? t->stride_token : heads * dim;
    int64_t sh = t->stride_head ? t->stride_head : dim;
    return tokens > 0 ? mul(tokens - 1, st) + mul(heads - 1, sh) + dim : 0;
}

static int32_t tokens_of(const model *m) { return m->q_start[m->d.n_seq]; }

// An array of one float per head, for another number of heads.
static float *fit_heads(model *m, const float *old, int64_t was, int64_t n) {
    float *f = (float *)give(m, 4 * n);
    int64_t i;
    for (i = 0; i < n; i++) f[i] = old[i < was ? i : 0];
    return f;
}

static void fit_per_head(model *m, int32_t heads, int32_t kv_heads) { // what they were
    attn_desc *d = &m->d;
    if (d->n_heads < 1 || d->n_kv_heads < 1 || d->n_heads > 65536 || d->n_kv_heads > 65536) return;
    if (m->alibi) d->logits.alibi = fit_heads(m, m->alibi, heads, d->n_heads);
    if (m->sink) d->logits.sink = fit_heads(m, m->sink, heads, d->n_heads);
    if (!m->scale) return;
    d->kv.k.head_scale = fit_heads(m, d->kv.k.head_scale, kv_heads, d->n_kv_heads);
    d->kv.v.head_scale = fit_heads(m, d->kv.v.head_scale, kv_heads, d->n_kv_heads);
}

// The tables must be there before anyone may look: made anew, as long as the fields now say.
static void fit_tables(model *m) {
    attn_desc *d = &m->d;
    int64_t need = 0, stride = d->kv.page_table_stride, e;
    int32_t s, j, *table;
    const int32_t *old = d->kv.page_table;
    if (d->n_seq > 0 && d->mask.kind == ATTN_MASK_TREE && m->parent && m->spoiled) {
        int32_t n = tokens_of(m), t;
        if (n < 0 || n > MAX_TOKENS) n = 0;
        table = (int32_t *)give(m, 4 * (int64_t)n);
        for (t = 0; t < n; t++) table[t] = t ? (int32_t)(fuzz_random(&m->rng) % 2) - 1 : -1;
        d->mask.tree_parent = n ? table : NULL;
    }
    if (!old || d->n_seq < 1 || d->kv.page_tokens < 1 || !m->spoiled) return;
    for (s = 0; s < d->n_seq; s++) {
        e = (stride > 0 ? mul(s, stride) : 0) + pages_of(m, s);
        need = e > need ? e : need;
    }
    d->kv.page_table = NULL;
    if (need > MAX_TABLE) return;
    table = (int32_t *)give(m, 4 * need);
    for (j = 0; j < need; j++)
        table[j] = (int32_t)(fuzz_random(&m->rng) %
                             (uint32_t)(d->kv.n_pages > 0 ? d->kv.n_pages : 1));
    if (need > 0 && m->n_table > 0) table[0] = old[0]; // perhaps spoiled
    d->kv.page_table = table;
}

// Gives every tensor its bytes; 0 when that is too much to run.
static int give_memory(model *m) {
    attn_desc *d = &m->d;
    int64_t n = tokens_of(m), vd = attni_v_dim(d), q, o, k, v, b = 0, work = 0, pairs;
    int32_t s;
    q = tensor_elements(&d->q, n, d->n_heads, d->head_dim);
    o = tensor_elements(&d->o, n, d->n_heads, vd);
    k = mul(d->kv.k.page_bytes ? d->kv.k.page_bytes : (int64_t)attn_kv_page_bytes(d, 0),
            d->kv.n_pages);
    v = mul(d->kv.v.page_bytes ? d->kv.v.page_bytes : (int64_t)attn_kv_page_bytes(d, 1),
            d->kv.n_pages);
    for (s = 0; s < d->n_seq; s++) {
        int64_t t = m->q_start[s + 1], e;
        pairs = mul(t - m->q_start[s], mul(m->kv_len[s], d->n_heads));
        work += mul(pairs, d->head_dim + vd) + mul(t - m->q_start[s], d->n_heads);
        if (t == m->q_start[s]) continue;
        e = mul(t - 1, d->logits.bias.stride_token) +
            mul(d->n_heads - 1, d->logits.bias.stride_head) + m->kv_len[s];
        b = e > b ? e : b;
    }
    if (q > MAX_BYTES / 4 || o > MAX_BYTES / 4 || k > MAX_BYTES || v > MAX_BYTES || work > MAX_WORK)
        return 0;
    if (d->logits.bias.data && b > MAX_BYTES / 4) return 0;
    if (n > 0) d->q.data = give(m, q * attn_dtype_bits(d->q.dtype) / 8);
    if (n > 0) d->o.data = give(m, o * attn_dtype_bits(d->o.dtype) / 8);
    d->kv.k.data = give(m, m->alias && v > k ? v : k);
    memset(d->kv.k.data, 0xff, (size_t)(m->alias && v > k ? v : k));
    d->kv.v.data = m->alias ? d->kv.k.data : give(m, v);
    if (!m->alias) memset(d->kv.v.data, 0xff, (size_t)v);
    if (d->lse) d->lse = (float *)give(m, 4 * n * d->n_heads);
    if (d->logits.bias.data) {
        d->logits.bias.data = give(m, b * attn_dtype_bits(d->logits.bias.dtype) / 8);
        for (; b > 0; b--)
            attni_put(d->logits.bias.data, d->logits.bias.dtype, b - 1, fuzz_unit(&m->rng));
    }
    return 1;
}

// ---- running it

static void fill_queries(model *m) {
    const attn_desc *d = &m->d;
    int64_t st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim, i;
    int64_t sh = d->q.stride_head ? d->q.stride_head : d->head_dim;
    int32_t t, h;
    for (t = 0; t < tokens_of(m); t++)
        for (h = 0; h < d->n_heads; h++)
            for (i = 0; i < d->head_dim; i++)
                attni_put(d->q.data, d->q.dtype, t * st + h * sh + i, 2 * fuzz_unit(&m->rng));
}

// Every held token's rows, from tensors of exactly their size.
static void store(model *m) {
    attn_desc *d = &m->d;
    int32_t s, j, pt = d->kv.page_tokens, n = 0, at = 0, is_v;
    int64_t *slots, rows, e;
    attn_tensor t[2];
    for (s = 0; s < d->n_seq; s++) n += m->kv_len[s];
    slots = (int64_t *)give(m, 8 * (int64_t)n);
    for (s = 0; s < d->n_seq; s++)
        for (j = 0; j < m->kv_len[s]; j++) {
            int64_t page = d->kv.page_table
                               ? d->kv.page_table[s * d->kv.page_table_stride + j / pt] : s;
            slots[at++] = page * pt + j % pt;
        }
    memset(t, 0, sizeof t);
    for (is_v = 0; is_v < 2; is_v++) {
        t[is_v].dtype = (attn_dtype)(1 + fuzz_random(&m->rng) % 3);
        rows = (int64_t)n * d->n_kv_heads * (is_v ? attni_v_dim(d) : d->head_dim);
        t[is_v].data = give(m, rows * attn_dtype_bits(t[is_v].dtype) / 8);
        for (e = 0; e < rows; e++) attni_put(t[is_v].data, t[is_v].dtype, e, fuzz_unit(&m->rng));
    }
    FUZZ_CHECK(attn_cpu_store(d, &t[0], m->alias ? NULL : &t[1], slots, 0, n) == ATTN_OK);
    if (n == 0) return;
    slots[n - 1] = (int64_t)d->kv.n_pages * pt; // outside: refused
    FUZZ_CHECK(attn_cpu_store(d, &t[0], NULL, slots, 0, n) == ATTN_ERR_PAGE);
}

// How far a score may be from the exact one, worst case, and what follows for the output.
static double tolerance(const model *m) {
    const attn_desc *d = &m->d;
    const char *how = attn_cpu_executor(d);
    double scale = fabs((double)attni_scale(d)), top = scale * 2 * d->head_dim, err, far = 0, tol;
    int32_t s;
    for (s = 0; s < d->n_seq; s++) {
        int64_t q0 = attni_q_pos0(d, s), k0 = attni_kv_pos0(d, s);
        double a = fabs((double)(q0 + m->q_start[s + 1] - m->q_start[s] - k0));
        double b = fabs((double)(k0 + m->kv_len[s] - q0));
        far = a > far ? a : far;
        far = b > far ? b : far;
    }
    err = top * d->head_dim * 6e-8 + (d->logits.alibi ? 0.1 * far * 4e-7 : 0) + 1e-6;
    if (d->numerics == ATTN_NUMERICS_APPROX) err += top / 254;
    tol = 4 * err + 2e-5;
    if (d->o.dtype == ATTN_F16) tol += 1e-3;
    if (d->o.dtype == ATTN_BF16) tol += 8e-3;
    if (strstr(how, "bdot") || strstr(how, "amx")) tol += 1.6e-2;
    return tol;
}

// O against the reference, gaps between rows untouched; O is as before afterwards.
static void check_output(model *m, const double *ref, const double *ref_lse, double tol) {
    const attn_desc *d = &m->d;
    int64_t vd = attni_v_dim(d), st = d->o.stride_token, sh = d->o.stride_head, i, n, bytes;
    int32_t t, h, size = attn_dtype_bits(d->o.dtype) / 8;
    if (!st) st = d->n_heads * vd;
    if (!sh) sh = vd;
    for (t = 0; t < tokens_of(m); t++)
        for (h = 0; h < d->n_heads; h++) {
            int64_t row = (int64_t)t * d->n_heads + h, at = t * st + h * sh;
            for (i = 0; i < vd && tol < 0.3; i++) {
                double x = (double)attni_get(d->o.data, d->o.dtype, at + i);
                FUZZ_CHECK(fabs(x - ref[row * vd + i]) <= tol);
            }
            if (d->lse && tol < 0.3) {
                double l = (double)d->lse[row], e = ref_lse[row];
                FUZZ_CHECK(e < -1e300 ? l < -1e30 : fabs(l - e) <= tol + 1e-5 * fabs(e));
            }
            memset((uint8_t *)d->o.data + at * size, 0xa5, (size_t)(vd * size));
        }
    n = tensor_elements(&d->o, tokens_of(m), d->n_heads, vd);
    for (bytes = n * size, i = 0; i < bytes; i++)
        FUZZ_CHECK(((const uint8_t *)d->o.data)[i] == 0xa5);
}

static int coprime(int32_t a, int32_t b) {
    while (b != 0) {
        int32_t t = a % b;
        a = b;
        b = t;
    }
    return a == 1;
}

static void run_plan(model *m, attn_plan *p, const double *ref, const double *ref_lse) {
    const attn_desc *d = &m->d;
    size_t bytes = attn_plan_partial_bytes(p), scratch = attn_cpu_scratch_bytes(d, p);
    void *partials, *work;
    int32_t i, n = p->n_tasks, step = 1 + fuzz_below(&m->in, 7);
    FUZZ_CHECK(bytes <= p->params.partial_bytes);
    if (bytes > (size_t)MAX_BYTES || scratch > (size_t)4 * MAX_BYTES) return;
    FUZZ_CHECK(posix_memalign(&partials, 64, bytes ? bytes : 1) == 0);
    FUZZ_CHECK(posix_memalign(&work, 64, scratch) == 0);
    memset(partials, 0xff, bytes);
    memset(work, 0xff, scratch);
    while (n > 0 && !coprime(step, n)) step++; // every task once, in some other order
    for (i = 0; i < n; i++)
        FUZZ_CHECK(attn_cpu_run(d, p, (int32_t)((int64_t)i * step % n), 1, partials, work) ==
                   ATTN_OK);
    FUZZ_CHECK(attn_cpu_run(d, p, n, 1, partials, work) == ATTN_ERR_ARGUMENT);
    FUZZ_CHECK(attn_cpu_merge(d, p, 0, p->n_merges, partials) == ATTN_OK);
    check_output(m, ref, ref_lse, m->wild || (m->spoiled && m->alias) ? 1 : tolerance(m));
    free(partials);
    free(work);
}

static void make_params(model *m, attn_plan_params *p) {
    static const int32_t tiles[] = {0, 1, 7, 32, 256, 1000};
    uint32_t how = fuzz_u8(&m->in);
    attn_cpu_plan_params(&m->d, 1 + (int32_t)(how % 5), p);
    p->row_tile = pick(&m->in, tiles, 6);
    p->share = fuzz_below(&m->in, 3);
    if (how & 32) p->partial_bytes = fuzz_bits(&m->in, 2);
    if (!(how & 64)) return;
    switch (fuzz_below(&m->in, 10)) {
    case 0: p->row_tile = fuzz_edge32(&m->in); break;
    case 1: p->workers = fuzz_edge32(&m->in); break;
    case 2: p->share = fuzz_edge32(&m->in); break;
    case 3: p->max_seq = fuzz_edge32(&m->in); break;
    case 4: p->max_tokens = fuzz_edge32(&m->in); break;
    case 5: p->max_kv_len = fuzz_edge32(&m->in); break;
    case 6: p->partial_bytes = (size_t)fuzz_edge(&m->in); break;
    case 7: p->cost_kv_token = fuzz_float(&m->in); break;
    case 8: p->cost_row_token = fuzz_float(&m->in); break;
    default: p->cost_partial = fuzz_float(&m->in);
    }
}

// The next step of some engine: a token less or more, or the same problem once more.
static void change_lengths(model *m) {
    int32_t s = fuzz_below(&m->in, m->d.n_seq), how = fuzz_below(&m->in, 4);
    if (how == 0 && m->kv_len[s] > 0) m->kv_len[s]--;
    if (how == 1 && m->d.kv.page_tokens > 1 && m->kv_len[s] % m->d.kv.page_tokens > 1)
        m->kv_len[s]--, m->q_pos0[s] -= m->q_pos0[s] > 0;
}

static void plan_and_run(model *m, int can_run) {
    attn_desc *d = &m->d;
    attn_plan_params params;
    attn_plan *p = NULL;
    attn_result r;
    size_t bytes, rows = can_run ? (size_t)tokens_of(m) * (size_t)d->n_heads : 0;
    size_t vd = (size_t)attni_v_dim(d);
    void *mem;
    double *ref = NULL, *ref_lse = NULL;
    make_params(m, &params);
    bytes = attn_plan_bytes(d, &params);
    (void)attn_cpu_forward_bytes(d, 1 + fuzz_below(&m->in, 3));
    if (bytes == 0 || bytes > (size_t)MAX_BYTES) return;
    FUZZ_CHECK(posix_memalign(&mem, 64, bytes) == 0);
    memset(mem, 0xff, bytes);
    FUZZ_CHECK(attn_plan_build(d, &params, mem, bytes - 1, &p) < 0 && !p);
    r = attn_plan_build(d, &params, mem, bytes, &p);
    FUZZ_CHECK(r == ATTN_OK || r == ATTN_ERR_ARGUMENT);
    if (can_run && r == ATTN_OK) {
        ref = (double *)give(m, 8 * (int64_t)(rows * vd));
        ref_lse = (double *)give(m, 8 * (int64_t)rows);
        FUZZ_CHECK(attn_ref_forward(d, ref, ref_lse) == ATTN_OK);
        run_plan(m, p, ref, ref_lse);
        change_lengths(m);
        r = attn_plan_update(p, d, NULL);
        if (attn_validate(d) != ATTN_OK) FUZZ_CHECK(r < 0);
        if (r == ATTN_OK) {
            FUZZ_CHECK(attn_ref_forward(d, ref, ref_lse) == ATTN_OK);
            run_plan(m, p, ref, ref_lse);
        }
    }
    free(mem);
}

static void choose_isa(model *m) {
    int k = fuzz_below(&m->in, ATTN_CPU_ISA_COUNT);
    if (attn_cpu_set_isa((attn_cpu_isa)k) != ATTN_OK) (void)attn_cpu_set_isa(ATTN_CPU_AUTO);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char *forbidden;
    model m;
    attn_result r;
    int32_t n, heads, kv_heads;
    if (!forbidden) {
        forbidden = (char *)mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        FUZZ_CHECK(forbidden != (char *)MAP_FAILED);
    }
    memset(&m, 0, sizeof m);
    m.forbidden = forbidden;
    m.in.p = data;
    m.in.n = size;
    make_problem(&m);
    choose_isa(&m);
    heads = m.d.n_heads;
    kv_heads = m.d.n_kv_heads;
    FUZZ_CHECK(attn_validate(&m.d) == ATTN_OK);
    for (n = fuzz_below(&m.in, 5); n > 0; n--, m.spoiled = 1)
        switch (fuzz_below(&m.in, 3)) {
        case 0: spoil_shape(&m); break;
        case 1: spoil_tensor(&m); break;
        default: spoil_values(&m);
        }
    fit_per_head(&m, heads, kv_heads);
    fit_tables(&m);
    r = attn_validate(&m.d);
    FUZZ_CHECK(m.spoiled || r == ATTN_OK);
    if (r != ATTN_OK) {
        FUZZ_CHECK(attn_cpu_forward(&m.d, NULL, 0, 1) == r);
        FUZZ_CHECK(attn_cpu_forward_bytes(&m.d, 1) == 0);
    } else {
        n = give_memory(&m);
        if (n && tokens_of(&m) > 0) {
            memset(m.d.o.data, 0xa5,
                   (size_t)tensor_elements(&m.d.o, tokens_of(&m), m.d.n_heads, attni_v_dim(&m.d)) *
                       (size_t)attn_dtype_bits(m.d.o.dtype) / 8);
            fill_queries(&m);
            store(&m);
        }
        plan_and_run(&m, n && tokens_of(&m) > 0);
    }
    while (m.n_keep > 0) free(m.keep[--m.n_keep]);
    return 0;
}

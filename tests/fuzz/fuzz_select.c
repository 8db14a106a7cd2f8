/* fuzz_select.c - selectors with hostile parameters over hostile values of Q and K: what
   attn_select_check lets through writes sound lists into the memory it asked for and nowhere else,
   in one piece as in many.
   cc -DFUZZ_MAIN -I. -Itests tests/fuzz/fuzz_select.c -o fuzz_select -lm && ./fuzz_select CORPUS

   The shape is sound and small, every parameter of the selector is mostly sensible and seldom
   anything. Selections and scratch lie between guards and start out as garbage; tensors have
   exactly the bytes that the descriptor asks for. Steps follow each other in the same memory, so
   that what HiP remembers meets other lengths. */
#include "fuzz.h"

#include <math.h>

#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

enum { MAX_SEQ = 3, MAX_KV = 220, GUARD = 128, MAX_ROPE = 4096 };
#define MAX_BYTES ((size_t)16 << 20)

typedef struct model {
    fuzz_in in;
    attn_desc d;
    attn_select s;
    uint64_t rng;
    int32_t q_start[MAX_SEQ + 1], q_pos0[MAX_SEQ], kv_len[MAX_SEQ], kv_pos0[MAX_SEQ];
    int32_t *table;
    float *scales, *landmark, *rope;
    void *q, *k;
} model;

// Mostly in [lo, hi], seldom anything.
static int32_t mostly(fuzz_in *in, int32_t lo, int32_t hi) {
    uint32_t k = fuzz_u8(in);
    if (k >= 250) return fuzz_edge32(in);
    return lo + (int32_t)(k % (uint32_t)(hi - lo + 1));
}

// Mostly 0: the default.
static int32_t seldom(fuzz_in *in, int32_t lo, int32_t hi) {
    return fuzz_below(in, 3) ? 0 : mostly(in, lo, hi);
}

static float ratio(fuzz_in *in) {
    uint32_t k = fuzz_u8(in);
    return k >= 245 ? fuzz_float(in) : k < 80 ? 0 : (float)(k % 101) / 100;
}

// ---- a sound problem

static void make_shape(model *m) {
    static const int32_t pages[] = {16, 1, 3, 64, 5, 100}, dims[] = {8, 16, 24, 40};
    attn_desc *d = &m->d;
    attn_kv *kv = &d->kv;
    int32_t s, j, len, q, most = 0, how = (int32_t)fuzz_u8(&m->in);
    d->n_seq = 1 + fuzz_below(&m->in, MAX_SEQ);
    d->n_kv_heads = 1 + fuzz_below(&m->in, 2);
    d->n_heads = d->n_kv_heads * (1 + fuzz_below(&m->in, 3));
    d->head_dim = dims[fuzz_below(&m->in, 4)];
    for (s = 0; s < d->n_seq; s++) {
        len = fuzz_below(&m->in, MAX_KV);
        q = fuzz_below(&m->in, 4) ? len % 3 : fuzz_below(&m->in, MAX_KV);
        if (q > len) q = len;
        m->kv_len[s] = len;
        m->kv_pos0[s] = how & 1 ? fuzz_below(&m->in, 300) : 0;
        m->q_pos0[s] = m->kv_pos0[s] + len - q;
        if ((how & 6) == 2) m->q_pos0[s] = fuzz_below(&m->in, 600); // queries anywhere
        m->q_start[s + 1] = m->q_start[s] + q;
        if (len > most) most = len;
    }
    d->q_start = m->q_start;
    if (how & 2) d->q_pos0 = m->q_pos0;
    kv->kv_len = m->kv_len;
    if (how & 1) kv->kv_pos0 = m->kv_pos0;
    kv->layout = (attn_layout)fuzz_below(&m->in, 3);
    kv->page_tokens = pages[fuzz_below(&m->in, 6)];
    if (kv->layout == ATTN_K16) kv->page_tokens = (kv->page_tokens + 15) / 16 * 16;
    kv->page_table_stride = most / kv->page_tokens + 1;
    kv->n_pages = (int32_t)kv->page_table_stride * d->n_seq;
    m->table = (int32_t *)fuzz_alloc(4 * (size_t)kv->n_pages);
    for (j = 0; j < kv->n_pages; j++) m->table[j] = kv->n_pages - 1 - j;
    kv->page_table = m->table;
}

// One value of dtype t; wild ones are any bits, the others ordinary numbers.
static void put_value(model *m, int wild, attn_dtype t, void *to, int64_t i) {
    uint64_t bits = fuzz_random(&m->rng);
    if (wild && bits % 16 == 0)
        memcpy((uint8_t *)to + i * attn_dtype_bits(t) / 8, &bits,
               (size_t)((attn_dtype_bits(t) + 7) / 8));
    else
        attni_put(to, t, i, t >= ATTN_I8 ? (float)((int)(bits % 15) - 7) : fuzz_unit(&m->rng));
}

static void make_values(model *m) {
    attn_desc *d = &m->d;
    const int wild = fuzz_below(&m->in, 3) == 0;
    int64_t n = (int64_t)m->q_start[d->n_seq] * d->n_heads * d->head_dim, i;
    size_t bytes;
    m->rng = fuzz_bits(&m->in, 2);
    d->q.dtype = d->o.dtype = (attn_dtype)(1 + fuzz_below(&m->in, 3));
    d->kv.k.dtype = (attn_dtype)(1 + fuzz_below(&m->in, 7));
    d->kv.v.dtype = ATTN_F32;
    if (attn_dtype_scaled(d->kv.k.dtype)) {
        m->scales = (float *)fuzz_alloc(4 * (size_t)d->n_kv_heads);
        for (i = 0; i < d->n_kv_heads; i++) m->scales[i] = wild ? fuzz_float(&m->in) : 0.125f;
        d->kv.k.head_scale = m->scales;
    }
    m->q = fuzz_alloc((size_t)n * (size_t)attn_dtype_bits(d->q.dtype) / 8);
    for (i = 0; i < n; i++) put_value(m, wild, d->q.dtype, m->q, i);
    d->q.data = d->o.data = m->q;
    d->kv.k.data = d->kv.v.data = m->table; // nobody looks
    bytes = attn_kv_page_bytes(d, 0) * (size_t)d->kv.n_pages;
    m->k = fuzz_alloc(bytes);
    memset(m->k, 0xff, bytes);
    n = (int64_t)bytes * 8 / attn_dtype_bits(d->kv.k.dtype);
    for (i = 0; i < n; i++) put_value(m, wild, d->kv.k.dtype, m->k, i);
    d->kv.k.data = m->k;
    if (wild) d->logits.scale = fuzz_float(&m->in);
    if (fuzz_below(&m->in, 4) == 0) d->logits.softcap = wild ? fuzz_float(&m->in) : 3;
}

// ---- a selector

static void make_stages(model *m) {
    attn_hip *x = &m->s.hip;
    int32_t chunk = m->s.kv_block ? m->s.kv_block : 8, i;
    int32_t q_block = m->s.row_block ? m->s.row_block : 64;
    int64_t n = (int64_t)m->d.kv.n_pages * m->d.n_kv_heads * m->d.kv.page_tokens, j;
    x->n_stages = mostly(&m->in, 0, ATTN_HIP_STAGES);
    for (i = x->n_stages <= ATTN_HIP_STAGES ? x->n_stages - 1 : -1; i >= 0; i--) {
        attn_hip_stage *t = x->stage + i;
        uint32_t odd = fuzz_u8(&m->in);
        t->chunk = odd == 1 ? fuzz_edge32(&m->in) : chunk;
        t->q_block = odd == 2 ? fuzz_edge32(&m->in) : q_block;
        t->q_stride = seldom(&m->in, 1, 70);
        t->refresh = seldom(&m->in, 1, 5);
        t->terminate = seldom(&m->in, 0, 20);
        t->flags = seldom(&m->in, 0, 15);
        t->style = (attn_rope_style)(fuzz_below(&m->in, 4) ? 0 : mostly(&m->in, 0, 5));
        if (chunk < 1 << 20 && chunk > 0) chunk *= 1 + fuzz_below(&m->in, 5);
        if (q_block < 1 << 20 && q_block > 0) q_block *= 1 + fuzz_below(&m->in, 3);
        if (i) t->keep = odd == 3 ? fuzz_edge32(&m->in) : chunk * (1 + fuzz_below(&m->in, 6));
    }
    if (fuzz_below(&m->in, 2)) {
        x->landmark = m->landmark = (float *)fuzz_alloc(4 * (size_t)n);
        for (j = 0; j < n; j++) m->landmark[j] = j % 31 ? fuzz_unit(&m->rng) : NAN;
    }
    x->rope_len = mostly(&m->in, 0, 400);
    x->rope_dim = mostly(&m->in, 0, 10);
    x->context = mostly(&m->in, 0, 200);
    n = (int64_t)x->rope_len * x->rope_dim;
    if (x->rope_len > 0 && x->rope_dim > 0 && n <= MAX_ROPE) {
        x->rope = m->rope = (float *)fuzz_alloc(4 * (size_t)n);
        for (j = 0; j < n; j++) m->rope[j] = fuzz_unit(&m->rng);
    }
}

static void make_hip(model *m) {
    attn_hip *x = &m->s.hip;
    const int32_t b = m->s.kv_block > 0 && m->s.kv_block < 1000 ? m->s.kv_block : 8;
    x->keep = fuzz_below(&m->in, 16) ? b * fuzz_below(&m->in, 12) : fuzz_edge32(&m->in);
    x->sink = fuzz_below(&m->in, 16) ? b * fuzz_below(&m->in, 5) : fuzz_edge32(&m->in);
    x->window = mostly(&m->in, -1, 60);
    x->block = seldom(&m->in, 1, b);
    x->q_group = seldom(&m->in, 1, 4);
    x->q_stride = seldom(&m->in, 1, 70);
    x->k_stride = seldom(&m->in, 1, 9);
    x->low_dim = seldom(&m->in, 1, 50);
    x->refresh = seldom(&m->in, 1, 9);
    x->near = seldom(&m->in, 0, 9);
    x->near_window = seldom(&m->in, 0, 9);
    x->vertical = seldom(&m->in, 0, 9);
    x->diagonal = seldom(&m->in, 0, 9);
    x->random = seldom(&m->in, 0, 9);
    x->sample = (attn_hip_sample)mostly(&m->in, 0, 5);
    x->head_group = seldom(&m->in, 1, 3);
    x->seed = fuzz_bits(&m->in, 3);
    x->patches = seldom(&m->in, 0, 40);
    if (m->s.kind == ATTN_SELECT_HIP3) make_stages(m);
}

static void make_select(model *m) {
    static const int32_t sizes[] = {8, 2, 16, 4, 32, 1, 3, 64, 0, 128};
    attn_select *s = &m->s;
    s->kind = (attn_select_kind)mostly(&m->in, 1, 5);
    s->heads = (attn_select_heads)seldom(&m->in, 0, 3);
    s->kv_block = fuzz_below(&m->in, 32) ? sizes[fuzz_below(&m->in, 10)] : fuzz_edge32(&m->in);
    s->row_block = fuzz_below(&m->in, 32) ? sizes[fuzz_below(&m->in, 10)] : fuzz_edge32(&m->in);
    if (s->kind == ATTN_SELECT_FLEX && fuzz_below(&m->in, 8)) s->row_block = 0;
    s->dense_below = seldom(&m->in, 0, 100);
    s->n_slots = seldom(&m->in, 0, 6);
    s->max_rows = seldom(&m->in, 0, 200);
    s->max_kv_len = seldom(&m->in, 0, 800);
    s->flex.compatible = fuzz_below(&m->in, 2);
    s->flex.gamma = ratio(&m->in);
    s->flex.tau = ratio(&m->in);
    s->flex.min_budget = seldom(&m->in, 0, 60);
    s->flex.max_budget = seldom(&m->in, 0, 60);
    s->exact.keep = seldom(&m->in, 0, 200);
    s->exact.share = ratio(&m->in);
    s->exact.epsilon = ratio(&m->in);
    s->exact.recent = seldom(&m->in, 0, 100);
    make_hip(m);
}

// ---- what must hold

static uint8_t *guarded(size_t bytes, uint8_t **base) {
    *base = (uint8_t *)fuzz_alloc(bytes + 2 * GUARD + 64);
    memset(*base, 0xa5, bytes + 2 * GUARD + 64);
    return *base + GUARD + (64 - (uintptr_t)(*base + GUARD) % 64) % 64;
}

static void check_guards(const uint8_t *mem, size_t bytes) {
    size_t i;
    for (i = 1; i <= GUARD; i++)
        FUZZ_CHECK(mem[-(ptrdiff_t)i] == 0xa5 && mem[bytes + i - 1] == 0xa5);
}

static void check_rows(const model *m, const attn_selection *x) {
    const attn_desc *d = &m->d;
    int32_t s, l, p;
    for (s = 0; s < d->n_seq; s++)
        for (l = 0; l < x->n_lists; l++)
            for (p = 0; p < m->q_start[s + 1] - m->q_start[s]; p++) {
                int64_t position = attni_q_pos0(d, s) + (int64_t)p, e;
                int64_t row = x->seq_row[s] + position / x->list.row_block;
                int64_t at = l * ((int64_t)x->list.n_rows + 1) + row, last = -1;
                FUZZ_CHECK(row >= 0 && row < x->list.n_rows);
                FUZZ_CHECK(x->row_end[at] >= x->row_start[at]);
                FUZZ_CHECK(x->row_end[at] - x->row_start[at] <= x->row_capacity);
                FUZZ_CHECK(x->row_end[at] == x->row_start[at] ||
                           x->row_start[at] ==
                               (l * (int64_t)x->list.n_rows + row) * x->row_capacity);
                for (e = x->row_start[at]; e < x->row_end[at]; last = x->block[e++])
                    FUZZ_CHECK(x->block[e] > last &&
                               (int64_t)x->block[e] * x->list.kv_block <= INT32_MAX);
            }
}

static void select_once(model *m, const attn_selection *x, const attn_summary *y, int pieces) {
    int64_t units = attn_cpu_select_units(&m->d, &m->s), u;
    size_t bytes = attn_cpu_select_scratch_bytes(&m->d, &m->s);
    uint8_t *base, *scratch;
    if (bytes > MAX_BYTES || units > 100000) return;
    FUZZ_CHECK(bytes > 0 && units >= 0);
    scratch = guarded(bytes, &base);
    memset(scratch, 0x7f, bytes);
    if (!pieces) FUZZ_CHECK(attn_cpu_select(&m->d, &m->s, y, x, 0, units, scratch) == ATTN_OK);
    for (u = units - 1; pieces && u >= 0; u--) {
        memset(scratch, 0xff, bytes);
        FUZZ_CHECK(attn_cpu_select(&m->d, &m->s, y, x, u, 1, scratch) == ATTN_OK);
    }
    check_guards(scratch, bytes);
    free(base);
    check_rows(m, x);
}

// Two selections of the same problem agree, entry by entry.
static void check_same(const model *m, const attn_selection *x, const attn_selection *y) {
    const int64_t n = x->n_lists * ((int64_t)x->list.n_rows + 1);
    int64_t i;
    (void)m;
    FUZZ_CHECK(memcmp(x->row_end, y->row_end, 8 * (size_t)n) == 0);
    for (i = 0; i < n; i++)
        FUZZ_CHECK(x->row_end[i] <= x->row_start[i] ||
                   memcmp(x->block + x->row_start[i], y->block + x->row_start[i],
                          4 * (size_t)(x->row_end[i] - x->row_start[i])) == 0);
}

// The next step: a token more for some sequences, their queries the first of Q's.
static int step(model *m) {
    const attn_desc *d = &m->d;
    int32_t s, most = m->q_start[d->n_seq], n = 0;
    for (s = 0; s < d->n_seq; s++) {
        int32_t room = (int32_t)d->kv.page_table_stride * d->kv.page_tokens;
        int more = m->kv_len[s] < room && n < most && fuzz_below(&m->in, 4);
        m->q_pos0[s] = m->kv_pos0[s] + m->kv_len[s];
        m->kv_len[s] += more;
        n += more;
        m->q_start[s + 1] = n;
    }
    return n > 0;
}

static void run(model *m) {
    uint8_t *base[2], *mem[2], *sums = NULL, *summary = NULL;
    size_t bytes = attn_select_bytes(&m->d, &m->s), n = attn_summary_bytes(&m->d);
    attn_selection x[2];
    attn_summary y = {NULL};
    int32_t seq_row[2][MAX_SEQ], i;
    int64_t u;
    if (!bytes || bytes > MAX_BYTES || n > MAX_BYTES) return;
    for (i = 0; i < 2; i++) {
        attn_result r;
        mem[i] = guarded(bytes, &base[i]);
        r = attn_selection_init(&m->d, &m->s, mem[i], bytes, seq_row[i], 0, &x[i]);
        check_guards(mem[i], bytes);
        if (r == ATTN_OK) continue;
        FUZZ_CHECK(r == ATTN_ERR_BUFFER && m->s.n_slots > 0 && m->s.n_slots < m->d.n_seq);
        free(base[i]); // a sequence that decodes has no slot
        return;
    }
    if (m->s.kind == ATTN_SELECT_EXACT && n) {
        summary = guarded(n, &sums);
        y.data = (uint16_t *)(void *)summary;
        memset(summary, 0, n);
        for (u = attn_cpu_summarize_units(&m->d) - 1; u >= 0; u--)
            FUZZ_CHECK(attn_cpu_summarize(&m->d, &y, u, 1) == ATTN_OK);
        check_guards(summary, n);
        y.data = NULL; // it holds the query tokens' cells only: no bounds of the others
    }
    select_once(m, &x[0], &y, 0);
    select_once(m, &x[1], NULL, 1);
    check_same(m, &x[0], &x[1]);
    m->d.q_pos0 = m->q_pos0;
    m->d.kv.kv_pos0 = m->kv_pos0;
    for (i = 0; i < 5 && step(m); i++) {
        if (attn_selection_follow(&m->d, &m->s, NULL, &x[0]) != ATTN_OK) break;
        if (m->s.n_slots > 0 && fuzz_below(&m->in, 4) == 0)
            attn_cpu_select_forget(&x[0],
                                   fuzz_below(&m->in, m->s.n_slots < 256 ? m->s.n_slots : 256));
        select_once(m, &x[0], NULL, i % 2);
    }
    for (i = 0; i < 2; i++) {
        check_guards(mem[i], bytes);
        free(base[i]);
    }
    free(sums);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    model m;
    memset(&m, 0, sizeof m);
    m.in.p = data;
    m.in.n = size;
    make_shape(&m);
    make_values(&m);
    make_select(&m);
    if (attn_select_check(&m.d, &m.s) == ATTN_OK) {
        run(&m);
    } else {
        FUZZ_CHECK(attn_select_bytes(&m.d, &m.s) == 0 && attn_select_rows(&m.d, &m.s) == 0);
        FUZZ_CHECK(attn_cpu_select_units(&m.d, &m.s) == 0);
        FUZZ_CHECK(attn_cpu_select_scratch_bytes(&m.d, &m.s) == 0);
    }
    free(m.table);
    free(m.scales);
    free(m.landmark);
    free(m.rope);
    free(m.q);
    free(m.k);
    return 0;
}

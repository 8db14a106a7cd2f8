/* Selectors against the oracle: block lists of random, exact and adversarial problems, in one piece
   and in many, on every executor; errors; the attention over the lists; steps of decoding.
   test_select [SEED [COUNT]]
   cc -std=c11 -I. -Itests tests/test_select.c -o test_select -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"
#include "select_oracle.h"

enum family {
    F_NORMAL,
    F_SHARP,
    F_NEEDLE,
    F_HEAVY,
    F_SLASH, // masses differ: a close decision is rare
    F_INTS,
    F_UNIFORM,
    F_ALTERNATE,
    F_ZEROS,
    F_HUGE,
    N_FAMILIES
};
static const char *const families[N_FAMILIES] = {"normal", "sharp",   "needle",    "heavy", "slash",
                                                 "ints",   "uniform", "alternate", "zeros", "huge"};
static const char *const kinds[] = {"none", "flex", "hip1", "hip2", "hip3", "exact"};

// Entries compared, and those that differ where the decision was close.
static struct {
    long long n, excused, rows, queries;
    double recall, least; // mass kept, summed and the least
} tally[6][N_FAMILIES];

static uint64_t now; // the seed at work, for messages

// ---- inputs

// Queries and keys of one head at one position: a wave each, so that scores depend on distances.
static void put_wave(float *x, int32_t dim, int32_t position, double size) {
    int32_t e;
    for (e = 0; e < dim; e++) {
        double w = pow(100.0, -2.0 * (e / 2) / dim) * position;
        x[e] = (float)(size * (e % 2 ? sin(w) : cos(w)));
    }
}

// Element e of the key at place j of a sequence.
static double key_element(test_rng *r, int family, int32_t j, const float *base, int32_t e) {
    switch (family) {
    case F_INTS:
        return test_below(r, 7) - 3;
    case F_UNIFORM:
        return (double)base[e];
    case F_ALTERNATE:
        return (double)(j % 2 ? -base[e] : base[e]);
    case F_ZEROS:
        return 0;
    case F_NEEDLE:
        return 0.2 * test_normal(r);
    default:
        return test_normal(r);
    }
}

static void fill_keys(problem *p, test_rng *r, int family) {
    const attn_desc *d = &p->d;
    const int32_t dim = d->head_dim;
    float *base = (float *)oracle_alloc((size_t)dim, 4);
    int32_t s, j, h, e;
    int64_t at = 0;
    attn_tensor k;
    test_fill_normal(r, base, (size_t)dim, 1);
    for (s = 0; s < d->n_seq; s++) {
        int32_t distance = test_below(r, 1 + d->kv.kv_len[s]),
                special = test_below(r, 1 + distance);
        for (j = 0; j < d->kv.kv_len[s]; j++)
            for (h = 0; h < d->n_kv_heads; h++, at += dim) {
                float *x = p->k_rows + at;
                for (e = 0; e < dim; e++) x[e] = (float)key_element(r, family, j, base, e);
                if (family == F_SLASH) put_wave(x, dim, j + distance, 1);
                if ((family == F_NEEDLE && j == special) || (family == F_HEAVY && j % 37 == 5))
                    for (e = 0; e < dim; e++) x[e] = base[e] * 1.5f;
            }
    }
    memset(&k, 0, sizeof k);
    k.data = p->k_rows;
    k.dtype = ATTN_F32;
    CHECK_EQ(attn_cpu_store(d, &k, NULL, p->slots, 0, p->n_rows), ATTN_OK);
    at = (int64_t)p->n_tokens * d->n_heads;
    for (s = 0; s < d->n_seq; s++)
        for (j = d->q_start[s]; j < d->q_start[s + 1]; j++)
            for (h = 0; h < d->n_heads; h++) {
                float x[ATTN_MAX_HEAD_DIM];
                double size = family == F_SHARP   ? 6
                              : family == F_HUGE  ? 5e3
                              : family == F_SLASH ? 4
                                                  : 2;
                put_wave(x, dim, d->q_pos0[s] - d->kv.kv_pos0[s] + j - d->q_start[s], size);
                for (e = 0; e < dim; e++) {
                    if (family == F_INTS)
                        x[e] = 12.0f * (float)(test_below(r, 7) - 3);
                    else if (family != F_SLASH)
                        x[e] = (float)(size * test_normal(r));
                    if (family == F_NEEDLE || family == F_HEAVY) x[e] = 0.5f * x[e] + base[e];
                    attni_put(d->q.data, d->q.dtype, ((int64_t)j * d->n_heads + h) * dim + e, x[e]);
                }
            }
    free(base);
}

// A problem that selectors take. family INTS: all arithmetic up to the scores is exact.
static void make_problem(problem *p, test_rng *r, int kind, int family, int prefill) {
    static const attn_dtype types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                       ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    static const int32_t dims[] = {8, 16, 24, 32, 40, 64, 64, 128},
                         pages[] = {1, 3, 7, 16, 48, 64, 99};
    static const int phases[] = {PREFILL, CHUNKED, DECODE, VERIFY, RAGGED};
    problem_opts o;
    int32_t h;
    memset(&o, 0, sizeof o);
    o.phase =
        prefill ? PREFILL : phases[kind == ATTN_SELECT_FLEX ? test_below(r, 2) : test_below(r, 5)];
    o.layout = (attn_layout)test_below(r, 3);
    o.contiguous = test_below(r, 5) == 0;
    o.page_tokens = pages[test_below(r, 7)];
    if (o.layout == ATTN_K16) o.page_tokens = (o.page_tokens + 15) / 16 * 16;
    o.n_seq = 1 + test_below(r, 3);
    o.max_kv = 20 + test_below(r, test_below(r, 4) ? 220 : 500);
    o.n_kv_heads = 1 + test_below(r, 2);
    o.n_heads = o.n_kv_heads * (test_below(r, 6) ? 1 + test_below(r, 3) : 1 + test_below(r, 8));
    o.head_dim = o.v_head_dim = dims[test_below(r, 8)];
    o.k = o.v = types[test_below(r, 7)];
    o.q = (attn_dtype)(1 + test_below(r, 3));
    if (o.k == ATTN_BF16 || test_below(r, 6) == 0) o.k = o.v = o.q = ATTN_BF16; // for its dot
    o.o = ATTN_F32;
    o.softcap = test_below(r, 6) == 0;
    o.sink = test_below(r, 6) == 0;
    o.head_scale = family == F_INTS || test_below(r, 6) == 0;
    o.evicted = test_below(r, 5) == 0;
    o.shared = test_below(r, 4) == 0 ? 16 * (1 + test_below(r, 6)) : 0;
    o.numerics = (attn_numerics)test_below(r, 3);
    o.sharp = 1;
    problem_make(p, &o, r);
    p->d.logits.scale = family == F_INTS ? 1.0f / 64 : test_below(r, 3) ? 0 : 0.2f;
    if (family == F_INTS && p->d.kv.k.head_scale)
        for (h = 0; h < o.n_kv_heads; h++) ((float *)(uintptr_t)p->d.kv.k.head_scale)[h] = 0.5f;
    fill_keys(p, r, family);
}

// ---- parameters

static int32_t pick(test_rng *r, int32_t a, int32_t b, int32_t c, int32_t d) {
    int32_t x[4] = {0, 0, 0, 0};
    x[0] = a, x[1] = b, x[2] = c, x[3] = d;
    return x[test_below(r, 4)];
}

static void flex_params(test_rng *r, const attn_desc *d, attn_select *s) {
    static const float gammas[] = {0, 0.5f, 0.8f, 0.9f, 0.95f, 0.99f, 1};
    static const float taus[] = {0, 0, 0.05f, 0.1f, 0.2f, 0.3f, 1};
    int32_t i;
    s->kv_block = pick(r, 8, 16, 32, test_below(r, 3) ? 24 : 0);
    s->heads = (attn_select_heads)test_below(r, 3);
    s->flex.gamma = gammas[test_below(r, 7)];
    s->flex.tau = taus[test_below(r, 7)];
    s->flex.min_budget = pick(r, 0, 0, 3 * s->kv_block, 50);
    s->flex.max_budget = pick(r, 0, 0, 4 * s->kv_block, 70);
    s->flex.compatible = test_below(r, 2);
    for (i = 0; i < d->n_seq; i++) // the reference knows whole prompts
        if (d->q_pos0[i] || d->q_start[i + 1] - d->q_start[i] != d->kv.kv_len[i])
            s->flex.compatible = 0;
}

static void exact_params(test_rng *r, attn_select *s) {
    static const float shares[] = {0, 0, 0.1f, 0.25f, 0.5f, 1}, eps[] = {0, 0, 0.01f, 0.1f, 0.3f};
    s->kv_block = pick(r, 8, 16, 32, test_below(r, 3) ? 20 : 0);
    s->row_block = pick(r, 16, 32, 48, 0);
    s->heads = (attn_select_heads)test_below(r, 4);
    s->exact.keep = pick(r, 0, 40, 100, 64);
    s->exact.share = shares[test_below(r, 6)];
    s->exact.epsilon = eps[test_below(r, 5)];
    s->exact.recent = pick(r, 0, 0, 1, 60);
}

static void hip_params(test_rng *r, const attn_desc *d, attn_select *s) {
    attn_hip *x = &s->hip;
    int32_t group = d->n_heads / d->n_kv_heads;
    s->kv_block = pick(r, 0, 4, 8, 16);
    x->block = pick(r, 0, 0, s->kv_block ? s->kv_block / 2 : 1, s->kv_block ? s->kv_block / 4 : 2);
    s->row_block = pick(r, 0, 16, 32, 8);
    s->heads = (attn_select_heads)test_below(r, 4);
    x->keep = 16 * (1 + test_below(r, 4));
    x->sink = pick(r, -1, 0, 16, 32);
    x->window = pick(r, -1, 1 + test_below(r, 20), 24, 40);
    x->q_group = test_below(r, 3);
    x->q_stride = test_below(r, 5);
    x->k_stride = test_below(r, 3);
    x->low_dim = test_below(r, 3) ? 0 : 1 + test_below(r, d->head_dim);
    x->refresh = 1 + test_below(r, 4);
    x->near = test_below(r, 3) ? 0 : test_below(r, 5);
    x->near_window = test_below(r, 4);
    x->vertical = test_below(r, 3) ? 0 : test_below(r, 5);
    x->diagonal = test_below(r, 3) ? 0 : test_below(r, 4);
    x->random = test_below(r, 3) ? 0 : test_below(r, 9);
    x->seed = test_u64(r);
    x->patches = test_below(r, 2) ? 0 : 1 + test_below(r, x->keep);
    if (s->kind != ATTN_SELECT_HIP2) return;
    x->sample = (attn_hip_sample)test_below(r, 6);
    if (s->heads == ATTN_SELECT_GROUP || s->heads == ATTN_SELECT_ALL) return;
    do x->head_group = 1 + test_below(r, group);
    while (group % x->head_group);
}

static void hip3_params(test_rng *r, problem *p, attn_select *s, int exact) {
    attn_hip *x = &s->hip;
    int32_t chunk, i, q_block;
    s->kv_block = pick(r, 2, 4, 8, 16);
    s->row_block = pick(r, 8, 16, 32, 0);
    s->heads = (attn_select_heads)test_below(r, 4);
    x->keep = 16 * (1 + test_below(r, 4));
    x->sink = pick(r, -1, 16, 32, 48);
    x->window = pick(r, -1, 1 + test_below(r, 20), 32, 64);
    x->n_stages = 1 + test_below(r, 4);
    chunk = s->kv_block;
    q_block = (s->row_block ? s->row_block : 64) * (1 + test_below(r, 2));
    for (i = x->n_stages - 1; i >= 0; i--) {
        attn_hip_stage *t = x->stage + i;
        t->chunk = chunk;
        t->q_block = q_block;
        t->q_stride = exact ? test_below(r, 5) : test_below(r, 9);
        t->refresh = 1 + test_below(r, 5);
        t->terminate = test_below(r, 3) ? 0 : test_below(r, 8);
        t->flags = test_below(r, 2) ? 0 : test_below(r, 16);
        if (!i) t->flags &= 3;
        chunk *= 1 + test_below(r, 4);
        q_block *= test_below(r, 3) ? 1 : 2;
        if (i) t->keep = chunk * (1 + test_below(r, 8));
        if (t->flags & ATTN_HIP_LANDMARK) x->landmark = (const float *)p; // to be made
    }
    if (x->landmark) {
        int64_t n = (int64_t)p->d.kv.n_pages * p->d.n_kv_heads * p->d.kv.page_tokens;
        float *mark = (float *)problem_alloc(p, 4 * (size_t)n);
        while (n-- > 0) mark[n] = (float)(test_below(r, 9) - 4);
        x->landmark = mark;
    }
}

static void make_select(test_rng *r, problem *p, int kind, int exact, attn_select *s) {
    memset(s, 0, sizeof *s);
    s->kind = (attn_select_kind)kind;
    if (kind == ATTN_SELECT_FLEX)
        flex_params(r, &p->d, s);
    else if (kind == ATTN_SELECT_EXACT)
        exact_params(r, s);
    else if (kind == ATTN_SELECT_HIP3)
        hip3_params(r, p, s, exact);
    else
        hip_params(r, &p->d, s);
    if (test_below(r, 6) == 0) s->dense_below = test_below(r, 200);
    if (test_below(r, 6) == 0) s->max_rows = 50;
    if (test_below(r, 6) == 0) s->max_kv_len = 700;
}

// ---- running one

enum { GUARD = 256 };

typedef struct memory { // of a selection, between two guards
    uint8_t *base;
    size_t bytes;
    int32_t *seq_row;
    attn_selection x;
} memory;

static uint8_t *guarded(size_t bytes) {
    uint8_t *m = (uint8_t *)aligned_alloc(64, ((bytes + 63) & ~(size_t)63) + 2 * GUARD);
    if (!m) abort();
    memset(m, 0xa5, ((bytes + 63) & ~(size_t)63) + 2 * GUARD);
    return m;
}

static int guards_hold(const uint8_t *m, size_t bytes) {
    size_t i;
    for (i = 0; i < GUARD; i++)
        if (m[i] != 0xa5 || m[GUARD + bytes + i] != 0xa5) return 0;
    return 1;
}

static void memory_open(memory *m, const attn_desc *d, const attn_select *s) {
    m->bytes = attn_select_bytes(d, s);
    CHECK(m->bytes > 0);
    m->base = guarded(m->bytes);
    m->seq_row = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    CHECK_EQ(attn_selection_init(d, s, m->base + GUARD, m->bytes, m->seq_row, 0, &m->x), ATTN_OK);
    m->x.keeps_all = 0; // lists all the same
}

static void memory_close(memory *m) {
    CHECK(guards_hold(m->base, m->bytes));
    free(m->base);
    free(m->seq_row);
}

// All units at once, or the last one first, each on scratch full of what another left.
static attn_result run(const attn_desc *d, const attn_select *s, const attn_summary *y,
                       const attn_selection *x, int pieces) {
    int64_t units = attn_cpu_select_units(d, s), u;
    size_t bytes = attn_cpu_select_scratch_bytes(d, s);
    uint8_t *scratch = guarded(bytes);
    attn_result e = ATTN_OK;
    CHECK(bytes > 0 && (units > 0 || d->q_start[d->n_seq] == 0));
    if (!pieces) e = attn_cpu_select(d, s, y, x, 0, units, scratch + GUARD);
    for (u = units - 1; pieces && u >= 0 && e == ATTN_OK; u--) {
        memset(scratch + GUARD, u % 2 ? 0xff : 0x7f, bytes);
        e = attn_cpu_select(d, s, y, x, u, 1, scratch + GUARD);
    }
    CHECK(guards_hold(scratch, bytes));
    free(scratch);
    return e;
}

// ---- comparing

static void tell(const attn_desc *d, const attn_select *s, int family, const char *what) {
    if (test_failed > 20) return;
    printf(
        "  seed %llu %s %s on %s: %s; heads %d/%d dim %d seqs %d k %s q %s blocks %d %d lists %d\n",
        (unsigned long long)now, kinds[s->kind], families[family],
        attn_cpu_isa_name(attn_cpu_get_isa()), what, d->n_heads, d->n_kv_heads, d->head_dim,
        d->n_seq, attn_dtype_name(d->kv.k.dtype), attn_dtype_name(d->q.dtype), s->row_block,
        s->kv_block, (int)s->heads);
    if (s->kind == ATTN_SELECT_FLEX)
        printf("    compatible %d gamma %g tau %g budgets %d %d\n", s->flex.compatible,
               (double)s->flex.gamma, (double)s->flex.tau, s->flex.min_budget, s->flex.max_budget);
    if (s->kind == ATTN_SELECT_EXACT)
        printf("    keep %d share %g epsilon %g recent %d\n", s->exact.keep, (double)s->exact.share,
               (double)s->exact.epsilon, s->exact.recent);
}

// Row `row` of list l as bytes, one a block; 0 when it is not a row: order, bounds, place.
static int read_row(const attn_selection *x, int32_t l, int64_t row, uint8_t *out, int32_t nb) {
    const int64_t at = l * ((int64_t)x->list.n_rows + 1) + row;
    const int64_t first = x->list.row_start[at], end = x->list.row_end[at];
    int64_t e;
    memset(out, 0, (size_t)nb);
    if (row < 0 || row >= x->list.n_rows) return 0;
    if (first != (l * (int64_t)x->list.n_rows + row) * x->row_capacity) return 0;
    if (end < first || end - first > x->row_capacity) return 0;
    for (e = first; e < end; e++) {
        if (x->list.block[e] < 0 || x->list.block[e] >= nb) return 0;
        if (e > first && x->list.block[e] <= x->list.block[e - 1]) return 0;
        out[x->list.block[e]] = 1;
    }
    return 1;
}

static void compare(const oracle *o, const attn_selection *x, int family) {
    const attn_desc *d = o->d;
    const int kind = o->f.kind;
    int32_t s, l, r, j, first;
    char what[160];
    for (s = 0; s < d->n_seq; s++)
        for (l = 0; l < o->n_lists; l++)
            for (r = 0; r < o->n_rows[s]; r++) {
                const int32_t nb = o->n_blocks[s];
                const int64_t at = ((int64_t)l * o->n_rows[s] + r) * nb;
                uint8_t *got = (uint8_t *)oracle_alloc((size_t)nb, 1);
                int wrong = 0, excused = 0, n = 0;
                snprintf(what, sizeof what, "sequence %d row %d list %d", s, o->row0[s] + r, l);
                if (!CHECK(read_row(x, l, (int64_t)x->seq_row[s] + o->row0[s] + r, got, nb)))
                    tell(d, &o->f, family, what);
                first = d->kv.kv_pos0[s] / o->f.kv_block; // what holds nothing does no harm
                for (j = first; j < nb; j++) {
                    int differs = got[j] != o->keep[s][at + j], near = o->near[s][at + j];
                    n += got[j] || o->keep[s][at + j];
                    excused += differs && near;
                    wrong += differs && !near;
                    if (differs && !near && wrong == 1)
                        snprintf(what, sizeof what,
                                 "sequence %d row %d of %d list %d: block %d of %d is %s", s,
                                 o->row0[s] + r, o->n_rows[s], l, j, nb,
                                 got[j] ? "listed" : "missing");
                }
                if (!CHECK_EQ(wrong, 0)) tell(d, &o->f, family, what);
                CHECK(x->visited[l * ((int64_t)x->list.n_rows + 1) + x->seq_row[s] + o->row0[s] +
                                 r] >= 0);
                tally[kind][family].n += n;
                tally[kind][family].excused += excused;
                tally[kind][family].rows++;
                free(got);
            }
}

// The rows in use of two selections are the same to the byte.
static int same(const oracle *o, const attn_selection *x, const attn_selection *y) {
    int32_t s, l, r;
    int64_t i;
    for (s = 0; s < o->n_seq; s++)
        for (l = 0; l < o->n_lists; l++)
            for (r = 0; r < o->n_rows[s]; r++) {
                i = l * ((int64_t)x->list.n_rows + 1) + x->seq_row[s] + o->row0[s] + r;
                if (x->row_start[i] != y->row_start[i] || x->row_end[i] != y->row_end[i]) return 0;
                if (memcmp(x->block + x->row_start[i], y->block + x->row_start[i],
                           4 * (size_t)(x->row_end[i] - x->row_start[i])))
                    return 0;
            }
    return 1;
}

// ---- what the lists are worth

// Recall of a list's heads over some queries; corrected FlexPrefill: that of the last block is
// gamma at least. EXACT: no query misses more than the bound.
static void worth(const oracle *o, const attn_selection *x, int family) {
    const attn_desc *d = o->d;
    const int kind = o->f.kind, hip = kind >= ATTN_SELECT_HIP1 && kind <= ATTN_SELECT_HIP3;
    int32_t s, h, i, per = d->n_heads / o->n_lists;
    attn_select true_scores = o->f;
    true_scores.flex.compatible = 0;
    for (s = 0; s < d->n_seq; s++)
        for (h = 0; h < d->n_heads && o->n_rows[s]; h++) {
            oracle_view v = oracle_open(d, &true_scores, s, h);
            uint8_t *got = (uint8_t *)oracle_alloc((size_t)o->n_blocks[s], 1);
            int32_t n = oracle_least(o->f.kv_block, v.q_len),
                    step = kind == ATTN_SELECT_EXACT ? 1 : 7;
            double last = 0, mass;
            for (i = v.q_len - 1; i >= 0; i -= i > v.q_len - n ? 1 : step) {
                int64_t row = x->seq_row[s] + (v.p0 + i) / o->f.row_block;
                read_row(x, h / per, row, got, o->n_blocks[s]);
                mass = recall_of(&v, i, got, hip ? o->f.hip.sink : 0, hip ? o->f.hip.window : 0);
                if (i >= v.q_len - n) last += mass / n;
                tally[kind][family].recall += mass;
                if (!tally[kind][family].queries++ || mass < tally[kind][family].least)
                    tally[kind][family].least = mass;
                if (kind == ATTN_SELECT_EXACT) {
                    double bound = (double)x->missed[h / per * ((int64_t)x->list.n_rows + 1) + row];
                    if (!CHECK(1 - mass <= bound + 1e-9)) {
                        tell(d, &o->f, family, "missed bound");
                        if (test_failed <= 20) printf("    %g against %g\n", 1 - mass, bound);
                    }
                }
            }
            if (kind == ATTN_SELECT_FLEX && !o->f.flex.compatible &&
                o->f.flex.max_budget == INT32_MAX)
                if (!CHECK(last >= (double)o->f.flex.gamma - 1e-4 * oracle_larger(1, v.size)))
                    tell(d, &o->f, family, "recall of the last block below gamma");
            free(got);
            oracle_done(&v);
        }
}

// Attention over the lists is what the reference makes of the same mask, and its bits do not change
// when all that the rows in use leave free is spoilt.
static void attend(problem *p, const oracle *o, memory *m, int family) {
    attn_desc d = p->d;
    const size_t n = (size_t)p->n_tokens * (size_t)d.n_heads * (size_t)p->opt.v_head_dim;
    float *out = (float *)malloc(4 * n + 4), *plain = (float *)malloc(4 * n + 4);
    problem q = *p;
    size_t bytes;
    void *mem;
    int32_t s, t, h, j;
    int64_t kept = 0, base = 0, want = 0, i;
    attn_selection_mask(&m->x, &q.d.mask);
    CHECK_EQ(attn_validate(&q.d), ATTN_OK);
    CHECK_EQ(attn_ref_forward(&q.d, p->ref, p->ref_lse), ATTN_OK);
    problem_plain(&q, plain);
    bytes = attn_cpu_forward_bytes(&q.d, 2);
    mem = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    CHECK_EQ(attn_cpu_forward(&q.d, mem, bytes, 2), ATTN_OK);
    problem_output(p, out);
    if (family != F_HUGE && d.numerics != ATTN_NUMERICS_APPROX)
        if (!CHECK(problem_accurate(p, out, plain, 1.5, 3, NULL)))
            tell(&d, &o->f, family, "attention over the lists");
    CHECK_EQ(attn_mask_kept(&q.d, &kept, &base), ATTN_OK);
    for (s = 0; s < d.n_seq; s++)
        for (t = d.q_start[s]; t < d.q_start[s + 1]; t++)
            for (h = 0; h < d.n_heads; h++)
                for (j = 0; j < d.kv.kv_len[s]; j++) want += attn_ref_visible(&q.d, s, t, h, j);
    CHECK_EQ(kept, want);
    CHECK(base >= kept);
    for (i = 0; i < m->x.n_lists * ((int64_t)m->x.list.n_rows + 1); i++)
        for (j = 0; i % (m->x.list.n_rows + 1) < m->x.list.n_rows && j < m->x.row_capacity; j++) {
            int64_t e = m->x.row_start[i] + j;
            if (e >= m->x.row_end[i] && m->x.row_end[i] > m->x.row_start[i]) m->x.block[e] = -1;
        }
    for (s = 0; s < p->n_tokens * 4; s++) ((uint8_t *)d.o.data)[s] = 0xff;
    CHECK_EQ(attn_cpu_forward(&q.d, mem, bytes, 2), ATTN_OK);
    problem_output(p, plain);
    CHECK(memcmp(out, plain, 4 * n) == 0);
    free(mem);
    free(out);
    free(plain);
}

// ---- summaries of K

static attn_summary summarized(problem *p) {
    attn_desc all = p->d; // every token held is one of its queries
    attn_summary y;
    size_t bytes = attn_summary_bytes(&all);
    int32_t s, *start = (int32_t *)problem_alloc(p, 4 * (size_t)all.n_seq + 4);
    int64_t units, u;
    y.data = (uint16_t *)problem_alloc(p, bytes);
    memset(y.data, 0xff, bytes);
    for (s = 0; s < all.n_seq; s++) start[s + 1] = start[s] + all.kv.kv_len[s];
    all.q_start = start;
    all.q_pos0 = all.kv.kv_pos0;
    units = attn_cpu_summarize_units(&all);
    CHECK(units > 0 && bytes > 0);
    for (u = units - 1; u >= 0; u--) CHECK_EQ(attn_cpu_summarize(&all, &y, u, 1), ATTN_OK);
    return y;
}

// ---- one problem

static void one(uint64_t seed, int kind, int family) {
    static const attn_cpu_isa isas[] = {ATTN_CPU_SCALAR, ATTN_CPU_AVX2, ATTN_CPU_AVX512,
                                        ATTN_CPU_AVX512_BF16, ATTN_CPU_AMX, ATTN_CPU_NEON,
                                        ATTN_CPU_NEON_BF16, ATTN_CPU_WASM};
    int dots;
    test_rng r;
    problem p;
    attn_select s;
    memory a, b;
    attn_summary y = {NULL};
    oracle *o;
    size_t i;
    now = seed;
    r.state = seed * 64 + (uint64_t)(kind * 10 + family);
    make_problem(&p, &r, kind, family, kind == ATTN_SELECT_FLEX && test_below(&r, 2));
    make_select(&r, &p, kind, family == F_INTS, &s);
    if (!CHECK_EQ(attn_select_check(&p.d, &s), ATTN_OK)) tell(&p.d, &s, family, "refused");
    o = oracle_select(&p.d, &s, NULL, NULL);
    dots = p.d.q.dtype == ATTN_BF16 && p.d.kv.k.dtype == ATTN_BF16; // else they add nothing
    if (kind == ATTN_SELECT_EXACT) y = summarized(&p);
    memory_open(&a, &p.d, &s);
    memory_open(&b, &p.d, &s);
    for (i = 0; i < sizeof isas / sizeof *isas; i++) {
        const int dot = isas[i] == ATTN_CPU_AVX512_BF16 || isas[i] == ATTN_CPU_AMX ||
                        isas[i] == ATTN_CPU_NEON_BF16;
        if (!attn_cpu_has(isas[i]) || (dot && !dots)) continue;
        attn_cpu_set_isa(isas[i]);
        if (!CHECK_EQ(run(&p.d, &s, y.data ? &y : NULL, &a.x, 0), ATTN_OK)) break;
        compare(o, &a.x, family);
        CHECK_EQ(run(&p.d, &s, test_below(&r, 2) ? NULL : &y, &b.x, 1), ATTN_OK);
        if (!CHECK(same(o, &a.x, &b.x))) tell(&p.d, &s, family, "in pieces");
    }
    attn_cpu_set_isa(ATTN_CPU_AUTO);
    if (i == sizeof isas / sizeof *isas) worth(o, &a.x, family);
    if (i == sizeof isas / sizeof *isas && p.n_tokens < 150 && test_below(&r, 4) == 0)
        attend(&p, o, &a, family);
    memory_close(&a);
    memory_close(&b);
    oracle_free(o);
    problem_free(&p);
}

// ---- decoding in slots

// A step of p's sequences: `ahead` more positions each (0: it rests), the queries taken from p's.
typedef struct step {
    attn_desc d;
    int32_t q_start[8], q_pos0[8], kv_len[8];
} step;

static void step_make(step *t, const problem *p, const int32_t *ahead) {
    const attn_desc *d = &p->d;
    size_t row = (size_t)d->n_heads * (size_t)d->head_dim * (size_t)attn_dtype_bits(d->q.dtype) / 8;
    int32_t s;
    t->d = *d;
    t->d.q.data = oracle_alloc((size_t)p->n_tokens, row);
    for (t->q_start[0] = s = 0; s < d->n_seq; s++) {
        int32_t first = t->kv_len[s];
        t->kv_len[s] += ahead[s];
        t->q_start[s + 1] = t->q_start[s] + ahead[s];
        t->q_pos0[s] = d->kv.kv_pos0[s] + first;
        memcpy((uint8_t *)t->d.q.data + row * (size_t)t->q_start[s],
               (const uint8_t *)d->q.data + row * (size_t)(d->q_start[s] + first),
               row * (size_t)ahead[s]);
    }
    t->d.q_start = t->q_start;
    t->d.q_pos0 = t->q_pos0;
    t->d.kv.kv_len = t->kv_len;
}

// Step n of p's sequences: a chunk of every prompt, then one token, now and then none or several.
// 0: no queries.
static int step_next(step *t, const problem *p, test_rng *r, int32_t n, int32_t *ahead) {
    int32_t i;
    for (i = 0; i < p->d.n_seq; i++) {
        int32_t left = p->d.kv.kv_len[i] - t->kv_len[i];
        ahead[i] = n == 0 ? oracle_most(1, left - 16) : test_below(r, 12) ? 1 : test_below(r, 3);
        ahead[i] = oracle_least(ahead[i], left);
    }
    step_make(t, p, ahead);
    return t->q_start[p->d.n_seq] > 0;
}

// A slot that is forgotten now and then, by the oracle already; -1: none.
static int32_t step_forgets(test_rng *r, oracle_slot *slots, int32_t n_slots, int32_t lists) {
    int32_t f, i;
    if (test_below(r, 8)) return -1;
    f = test_below(r, n_slots);
    for (i = 0; i < lists; i++) slots[f * lists + i].next = -1;
    return f;
}

// Steps with slots in an order of their own.
static void decode(uint64_t seed, int kind, int family) {
    test_rng r;
    problem p;
    attn_select s;
    memory m;
    oracle_slot *slots;
    step t;
    int32_t slot[8], ahead[8], i, n, lists;
    now = seed;
    r.state = seed * 64 + (uint64_t)(640 + kind * 10 + family);
    make_problem(&p, &r, kind, family, 1);
    make_select(&r, &p, kind, family == F_INTS, &s);
    s.n_slots = p.d.n_seq + test_below(&r, 3);
    memory_open(&m, &p.d, &s);
    lists = m.x.n_lists;
    slots = oracle_slots_new(s.n_slots * lists);
    for (i = 0; i < s.n_slots; i++) slot[i] = i;
    for (i = s.n_slots - 1; i > 0; i--) {
        int32_t j = test_below(&r, i + 1), k = slot[i];
        slot[i] = slot[j];
        slot[j] = k;
    }
    memset(&t, 0, sizeof t);
    for (n = 0; n < 14; n++) {
        oracle *o;
        if (step_next(&t, &p, &r, n, ahead)) {
            int32_t f = step_forgets(&r, slots, s.n_slots, lists);
            if (f >= 0) CHECK_EQ(attn_cpu_select_forget(&m.x, f), ATTN_OK);
            CHECK_EQ(attn_selection_follow(&t.d, &s, slot, &m.x), ATTN_OK);
            m.x.keeps_all = 0;
            CHECK_EQ(run(&t.d, &s, NULL, &m.x, n % 2), ATTN_OK);
            o = oracle_select(&t.d, &s, slot, slots);
            for (i = 0; i < p.d.n_seq; i++)
                if (ahead[i] == 1) CHECK_EQ(m.x.seq_row[i] + o->row0[i], slot[i]);
            compare(o, &m.x, family);
            oracle_free(o);
        }
        free(t.d.q.data);
    }
    oracle_slots_free(slots, s.n_slots * lists);
    memory_close(&m);
    problem_free(&p);
}

// ---- errors

static attn_desc plain_desc(problem *p) {
    problem_opts o;
    test_rng r = {3};
    memset(&o, 0, sizeof o);
    o.phase = PREFILL;
    o.page_tokens = 16, o.n_seq = 2, o.max_kv = 200, o.n_heads = 4, o.n_kv_heads = 2;
    o.head_dim = o.v_head_dim = 16, o.k = o.v = o.q = o.o = ATTN_F32, o.sharp = 1;
    problem_make(p, &o, &r);
    return p->d;
}

// Every parameter out of its range, one at a time. field: of an int32_t.
#define REFUSED(kind_, statement)                                                                  \
    do {                                                                                           \
        memset(&s, 0, sizeof s);                                                                   \
        s.kind = kind_;                                                                            \
        CHECK_EQ(attn_select_check(&d, &s), ATTN_OK);                                              \
        statement;                                                                                 \
        CHECK_EQ(attn_select_check(&d, &s), ATTN_ERR_ARGUMENT);                                    \
        CHECK_EQ(attn_select_rows(&d, &s), 0);                                                     \
        CHECK_EQ(attn_select_bytes(&d, &s), 0);                                                    \
        CHECK_EQ(attn_cpu_select_units(&d, &s), 0);                                                \
        CHECK_EQ(attn_cpu_select_scratch_bytes(&d, &s), 0);                                        \
    } while (0)

static void parameter_errors(void) {
    problem p;
    attn_desc d = plain_desc(&p);
    attn_select s;
    memset(&s, 0, sizeof s);
    CHECK_EQ(attn_select_check(&d, &s), ATTN_ERR_ARGUMENT); // no kind
    CHECK_EQ(attn_select_check(&d, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_select_check(NULL, &s), ATTN_ERR_ARGUMENT);
    REFUSED(ATTN_SELECT_FLEX, s.kind = (attn_select_kind)6);
    REFUSED(ATTN_SELECT_FLEX, s.kind = (attn_select_kind)-1);
    REFUSED(ATTN_SELECT_EXACT, s.heads = (attn_select_heads)4);
    REFUSED(ATTN_SELECT_EXACT, s.heads = (attn_select_heads)-1);
    REFUSED(ATTN_SELECT_EXACT, s.row_block = -1);
    REFUSED(ATTN_SELECT_EXACT, s.kv_block = -1);
    REFUSED(ATTN_SELECT_EXACT, s.dense_below = -2);
    REFUSED(ATTN_SELECT_EXACT, s.n_slots = -1);
    REFUSED(ATTN_SELECT_EXACT, s.max_rows = -1);
    REFUSED(ATTN_SELECT_EXACT, s.max_kv_len = -1);
    REFUSED(ATTN_SELECT_FLEX, s.row_block = 64); // kv_block is 128
    REFUSED(ATTN_SELECT_FLEX, s.heads = ATTN_SELECT_ALL);
    REFUSED(ATTN_SELECT_FLEX, s.flex.gamma = -0.1f);
    REFUSED(ATTN_SELECT_FLEX, s.flex.gamma = 1.1f);
    REFUSED(ATTN_SELECT_FLEX, s.flex.gamma = attni_float(0x7fc00000u));
    REFUSED(ATTN_SELECT_FLEX, s.flex.tau = -0.1f);
    REFUSED(ATTN_SELECT_FLEX, s.flex.tau = attni_float(0x7fc00000u));
    REFUSED(ATTN_SELECT_FLEX, s.flex.min_budget = -1);
    REFUSED(ATTN_SELECT_FLEX, s.flex.max_budget = -1);
    REFUSED(ATTN_SELECT_EXACT, s.exact.keep = -1);
    REFUSED(ATTN_SELECT_EXACT, s.exact.recent = -1);
    REFUSED(ATTN_SELECT_EXACT, s.exact.share = -0.5f);
    REFUSED(ATTN_SELECT_EXACT, s.exact.share = 1.5f);
    REFUSED(ATTN_SELECT_EXACT, s.exact.epsilon = -1);
    REFUSED(ATTN_SELECT_EXACT, s.exact.epsilon = attni_float(0x7fc00000u));
    problem_free(&p);
}

static void hip_parameter_errors(void) {
    static const attn_select_kind two[] = {ATTN_SELECT_HIP1, ATTN_SELECT_HIP2};
    problem p;
    attn_desc d = plain_desc(&p);
    attn_select s;
    int i;
    for (i = 0; i < 2; i++) {
        REFUSED(two[i], s.hip.keep = -2);
        REFUSED(two[i], s.hip.keep = 7); // kv_block is 2
        REFUSED(two[i], s.hip.sink = 3);
        REFUSED(two[i], s.hip.sink = -2);
        REFUSED(two[i], s.hip.window = -2);
        REFUSED(two[i], s.hip.block = 3);
        REFUSED(two[i], s.hip.block = -1);
        REFUSED(two[i], s.hip.q_group = -1);
        REFUSED(two[i], s.hip.q_stride = -1);
        REFUSED(two[i], s.hip.k_stride = -1);
        REFUSED(two[i], s.hip.low_dim = -1);
        REFUSED(two[i], s.hip.refresh = -1);
        REFUSED(two[i], s.hip.near = 65537);
        REFUSED(two[i], s.hip.near_window = -1);
        REFUSED(two[i], s.hip.vertical = 65537);
        REFUSED(two[i], s.hip.diagonal = -1);
        REFUSED(two[i], s.hip.random = 65537);
    }
    REFUSED(ATTN_SELECT_HIP1, s.hip.patches = -1);
    REFUSED(ATTN_SELECT_HIP1, s.hip.patches = 513);
    REFUSED(ATTN_SELECT_HIP2, s.hip.sample = (attn_hip_sample)6);
    REFUSED(ATTN_SELECT_HIP2, s.hip.head_group = -1);
    REFUSED(ATTN_SELECT_HIP2, s.hip.head_group = 3); // two heads share a KV head
    REFUSED(ATTN_SELECT_HIP2, (s.hip.head_group = 2, s.heads = ATTN_SELECT_ALL));
    REFUSED(ATTN_SELECT_HIP3, s.hip.n_stages = -1);
    REFUSED(ATTN_SELECT_HIP3, s.hip.n_stages = ATTN_HIP_STAGES + 1);
    REFUSED(ATTN_SELECT_HIP3, s.hip.n_stages = 1); // of nothing
    problem_free(&p);
}

// The rules of stages, each broken in a pair that is right otherwise.
static void stage_errors(void) {
    static const attn_hip_stage good[2] = {{128, 4, 64, 0, 4, 0, 0, ATTN_ROPE_NONE},
                                           {64, 1, 8, 256, 2, 0, 0, ATTN_ROPE_NONE}};
    problem p;
    attn_desc d = plain_desc(&p);
    attn_select s;
    int i;
    for (i = 0; i < 16; i++) {
        attn_hip_stage *t = s.hip.stage;
        memset(&s, 0, sizeof s);
        s.kind = ATTN_SELECT_HIP3;
        s.hip.n_stages = 2;
        memcpy(t, good, sizeof good);
        if (i == 1) t[1].q_block = 32;                      // less than a row block
        if (i == 2) t[1].q_block = 96;                      // not a multiple of it
        if (i == 3) t[0].q_block = 64, t[1].q_block = 128;  // more than the stage before
        if (i == 4) t[0].q_block = 192, t[1].q_block = 128; // does not divide it
        if (i == 5) t[0].q_stride = -1;
        if (i == 6) t[0].chunk = 60; // 8 does not divide it
        if (i == 7) t[1].chunk = 16; // not the kv_block
        if (i == 8) t[1].keep = 100; // not a multiple of 64
        if (i == 9) t[1].keep = 0;
        if (i == 10) t[1].refresh = -1;
        if (i == 11) t[1].terminate = -1;
        if (i == 12) t[1].flags = 16;
        if (i == 13) t[0].flags = ATTN_HIP_CENTRE;
        if (i == 14) t[1].flags = ATTN_HIP_LANDMARK; // without landmarks
        if (i == 15) t[1].style = (attn_rope_style)6;
        CHECK_EQ(attn_select_check(&d, &s), i ? ATTN_ERR_ARGUMENT : ATTN_OK);
    }
    problem_free(&p);
}

// What no selector does, what memory must be, and calls in the wrong order.
static void call_errors(attn_select_kind kind) {
    static const float slopes[4] = {1, 1, 1, 1};
    problem p;
    attn_desc d = plain_desc(&p), e;
    attn_select s;
    memory m, small;
    attn_selection x;
    size_t bytes, n;
    uint8_t *scratch, *work;
    int32_t slot[2] = {0, 1}, len[2], table[64];
    memset(&s, 0, sizeof s);
    s.kind = kind;
    e = d, e.mask.kind = ATTN_MASK_FULL;
    CHECK_EQ(attn_select_check(&e, &s), ATTN_ERR_UNSUPPORTED);
    e = d, e.mask.kind = ATTN_MASK_TREE;
    CHECK_EQ(attn_select_check(&e, &s), ATTN_ERR_UNSUPPORTED);
    e = d, e.mask.window_left = 9;
    CHECK_EQ(attn_select_check(&e, &s), ATTN_ERR_UNSUPPORTED);
    e = d, e.mask.window_right = 9;
    CHECK_EQ(attn_select_check(&e, &s), ATTN_ERR_UNSUPPORTED);
    e = d, e.logits.alibi = slopes;
    CHECK_EQ(attn_select_check(&e, &s), ATTN_ERR_UNSUPPORTED);
    e = d, e.logits.bias = d.q;
    CHECK_EQ(attn_select_check(&e, &s), ATTN_ERR_UNSUPPORTED);
    bytes = attn_select_bytes(&d, &s);
    memory_open(&m, &d, &s);
    CHECK_EQ(attn_selection_init(&d, &s, NULL, bytes, m.seq_row, 0, &x), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_selection_init(&d, &s, m.base + GUARD, bytes, NULL, 0, &x), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_selection_init(&d, &s, m.base + GUARD, bytes, m.seq_row, 0, NULL),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_selection_init(&d, &s, m.base + GUARD, bytes - 1, m.seq_row, 0, &x),
             ATTN_ERR_BUFFER);
    CHECK_EQ(attn_selection_init(&d, &s, m.base + GUARD + 8, bytes, m.seq_row, 0, &x),
             ATTN_ERR_BUFFER);
    n = attn_cpu_select_scratch_bytes(&d, &s);
    scratch = guarded(n);
    CHECK_EQ(
        attn_cpu_select(&d, &s, NULL, &m.x, 0, attn_cpu_select_units(&d, &s) + 1, scratch + GUARD),
        ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, &m.x, -1, 1, scratch + GUARD), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, &m.x, 0, -1, scratch + GUARD), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, NULL, 0, 1, scratch + GUARD), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, &m.x, 0, 1, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, &m.x, 0, 1, scratch + GUARD + 4), ATTN_ERR_BUFFER);
    x = m.x, x.list.device_entries = 1;
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, &x, 0, 1, scratch + GUARD), ATTN_ERR_UNSUPPORTED);
    memcpy(table, d.kv.page_table, sizeof(int32_t) * (size_t)d.kv.page_table_stride);
    memcpy(table + d.kv.page_table_stride, d.kv.page_table + d.kv.page_table_stride,
           sizeof(int32_t) * (size_t)d.kv.page_table_stride);
    e = d, e.kv.page_table = table, table[0] = d.kv.n_pages;
    CHECK_EQ(attn_selection_follow(&e, &s, NULL, &m.x), ATTN_ERR_PAGE);
    x = m.x, x.list.kv_block *= 2; // laid out for something else
    CHECK_EQ(attn_selection_follow(&d, &s, NULL, &x), ATTN_ERR_STALE);
    CHECK_EQ(attn_cpu_select(&d, &s, NULL, &x, 0, 1, scratch + GUARD), ATTN_ERR_STALE);
    CHECK_EQ(attn_cpu_select_forget(&m.x, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select_forget(&m.x, 0),
             m.x.n_slots ? ATTN_OK : ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_select_forget(&m.x, m.x.n_slots), ATTN_ERR_ARGUMENT);
    CHECK_EQ(run(&d, &s, NULL, &m.x, 0), ATTN_OK);
    CHECK(guards_hold(scratch, n));
    // tables that changed since: a page is looked at again before it is read
    for (n = 0; n < 64; n++) table[n] = n % 2 ? -1 : d.kv.n_pages;
    s.kv_block = s.row_block = 16, s.exact.keep = s.hip.keep = s.hip.sink = s.hip.window = 16;
    if (kind == ATTN_SELECT_HIP3) {
        s.hip.n_stages = 1, s.hip.stage[0].keep = 64, s.hip.stage[0].chunk = 16;
        s.hip.stage[0].q_block = 16;
    }
    memory_open(&small, &d, &s);
    e.kv.page_table = table;
    CHECK_EQ(run(&d, &s, NULL, &small.x, 0), ATTN_OK);
    work = guarded(attn_cpu_select_scratch_bytes(&d, &s));
    CHECK_EQ(attn_cpu_select(&e, &s, NULL, &small.x, 0, attn_cpu_select_units(&d, &s),
                             work + GUARD),
             ATTN_ERR_PAGE);
    free(work);
    memory_close(&small);
    memset(&s, 0, sizeof s);
    s.kind = kind;
    // a longer sequence, more rows, a slot that is none
    len[0] = d.kv.kv_len[0] + 4096, len[1] = d.kv.kv_len[1];
    table[0] = 0;
    e = d, e.kv.kv_len = len, e.q_pos0 = NULL, e.kv.page_table = NULL, e.kv.page_tokens = 8192;
    e.kv.n_pages = 2;
    if (attn_select_bytes(&e, &s) > bytes)
        CHECK_EQ(attn_selection_follow(&e, &s, NULL, &m.x), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_selection_follow(&d, &s, NULL, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_selection_follow(NULL, &s, NULL, &m.x), ATTN_ERR_ARGUMENT);
    memory_close(&m);
    s.n_slots = 2;
    len[0] = len[1] = 1;                                  // positions
    e = d, e.q_start = slot, e.q_pos0 = len, e.n_seq = 1; // q_start: 0, 1
    memory_open(&m, &e, &s);
    len[1] = 2;
    CHECK_EQ(attn_selection_follow(&e, &s, len + 1, &m.x), ATTN_ERR_BUFFER);
    len[1] = -1;
    CHECK_EQ(attn_selection_follow(&e, &s, len + 1, &m.x), ATTN_ERR_BUFFER);
    memory_close(&m);
    free(scratch);
    problem_free(&p);
}

// ---- what dense_below counts, where the front of a sequence was evicted

static void dense_border(int kind) {
    problem_opts o;
    problem p;
    test_rng r = {5};
    int32_t i;
    memset(&o, 0, sizeof o);
    o.phase = PREFILL;
    o.page_tokens = 16, o.n_seq = 1, o.max_kv = 300, o.n_heads = 2, o.n_kv_heads = 1;
    o.head_dim = o.v_head_dim = 16, o.k = o.v = o.q = o.o = ATTN_F32, o.sharp = o.evicted = 1;
    do problem_make(&p, &o, &r);
    while ((p.d.kv.kv_len[0] < 150 || p.d.kv.kv_pos0[0] < 100) && (problem_free(&p), 1));
    fill_keys(&p, &r, F_NORMAL);
    for (i = 0; i < 4; i++) {
        attn_select s;
        memory m;
        oracle *want;
        memset(&s, 0, sizeof s);
        s.kind = (attn_select_kind)kind;
        s.kv_block = s.row_block = 8, s.flex.gamma = 0.5f, s.exact.keep = s.hip.keep = 16;
        s.hip.sink = -1, s.hip.window = 16;
        if (kind == ATTN_SELECT_HIP3) s.hip.n_stages = 1, s.hip.stage[0].chunk = 8;
        if (kind == ATTN_SELECT_HIP3) s.hip.stage[0].q_block = 8, s.hip.stage[0].keep = 8;
        s.dense_below = p.d.kv.kv_len[0] - i % 2 + (i > 1 ? p.d.kv.kv_pos0[0] : 0);
        want = oracle_select(&p.d, &s, NULL, NULL);
        memory_open(&m, &p.d, &s);
        CHECK_EQ(run(&p.d, &s, NULL, &m.x, 0), ATTN_OK);
        compare(want, &m.x, F_NORMAL);
        memory_close(&m);
        oracle_free(want);
    }
    problem_free(&p);
}

// As long as dense attention is faster there are no lists, and nothing is selected.
static void dense_whole(int kind) {
    problem p;
    attn_desc d = plain_desc(&p);
    attn_select s;
    attn_mask mask;
    memory m;
    int32_t longest = 0, i;
    memset(&s, 0, sizeof s);
    s.kind = (attn_select_kind)kind;
    for (i = 0; i < d.n_seq; i++) longest = attni_max32(longest, d.kv.kv_len[i]);
    for (i = 0; i < 3; i++) {
        const int dense = i < 2;
        s.dense_below = i == 0 ? -1 : longest - !dense;
        memory_open(&m, &d, &s);
        CHECK_EQ(attn_selection_follow(&d, &s, NULL, &m.x), ATTN_OK);
        CHECK_EQ(m.x.keeps_all, dense);
        mask = d.mask;
        mask.blocks = m.x.list, mask.keep_sink = mask.keep_recent = 7; // of a step before
        attn_selection_mask(&m.x, &mask);
        CHECK((mask.blocks.row_start == NULL) == dense);
        if (dense) CHECK(!mask.keep_sink && !mask.keep_recent && !mask.blocks.block);
        if (dense) CHECK_EQ(attn_cpu_select(&d, &s, NULL, &m.x, 0, 1, m.base), ATTN_OK);
        memory_close(&m);
    }
    problem_free(&p);
}

// ---- all

static void report(int kind) {
    long long n = 0, excused = 0;
    int f;
    for (f = 0; f < N_FAMILIES; f++) {
        if (f <= F_SLASH) n += tally[kind][f].n;
        if (f <= F_SLASH) excused += tally[kind][f].excused;
        printf("%-5s %-9s rows %7lld entries %8lld excused %5lld recall mean %.4f least %.4f\n",
               kinds[kind], families[f], tally[kind][f].rows, tally[kind][f].n,
               tally[kind][f].excused,
               tally[kind][f].recall / (double)(tally[kind][f].queries + !tally[kind][f].queries),
               tally[kind][f].least);
    }
    CHECK(excused <= n / 1000 + 50); // a close decision takes some entries along, on every ISA
    if (kind != ATTN_SELECT_FLEX && kind != ATTN_SELECT_EXACT) // nothing is added up
        CHECK_EQ(tally[kind][F_INTS].excused, 0);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 8), i;
    const char *only = getenv("TEST_SELECT"); // one kind
    int kind, f;
    attn_cpu_open();
    if (!only) parameter_errors();
    if (!only) hip_parameter_errors();
    if (!only) stage_errors();
    for (kind = ATTN_SELECT_FLEX; kind <= ATTN_SELECT_EXACT; kind++) {
        if (only && strcmp(only, kinds[kind]) != 0) continue;
        call_errors((attn_select_kind)kind);
        dense_border(kind);
        dense_whole(kind);
        for (i = 0; i < count; i++)
            for (f = 0; f < N_FAMILIES; f++) one(seed + i, kind, f);
        for (i = 0; i < count; i++)
            for (f = 0; f < N_FAMILIES; f += 5) decode(seed + i, kind, f);
        report(kind);
    }
    return TEST_END();
}

/* The exact selector against brute force in doubles: lists, ties, the bound on missed mass, its
   epsilon, with and without summaries, alone and in a batch.
   test_exact [SEED [COUNT]]   COUNT: random problems (default 10000)
   cc -std=c11 -O2 -I. -Itests tests/test_exact.c -o test_exact -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"

enum keys {
    NORMAL, NEEDLE, UNIFORM, ALTERNATING, CLUSTERED, INTEGERS, SHARP, HUGE_SCORES, BAD_K, BAD_Q,
    N_KEYS
};

static long long n_rows, n_excused, n_pruned, n_keys_seen, n_keys_all, n_certified;

typedef struct choice {
    attn_selection x;
    void *mem;
    int32_t *seq_row;
} choice;

// ---- inputs

static void set_query(problem *p, int64_t i, double v) {
    attni_put(p->d.q.data, p->d.q.dtype, i, (float)v);
}

// Replaces the problem's keys and queries.
static void refill(problem *p, test_rng *r, int kind) {
    const attn_desc *d = &p->d;
    int64_t dim = d->head_dim, heads = d->n_kv_heads, i, n = p->n_rows * heads * dim;
    int64_t nq = (int64_t)p->n_tokens * d->n_heads * dim, every = 1 + test_below(r, 200);
    double noise = exp(test_uniform(r, -7, -1));
    float *k = p->k_rows, bad[3] = {HUGE_VALF, -HUGE_VALF, 0}, common[64], mean[64];
    attn_tensor t;
    bad[2] = attni_float(0x7fc00000u);
    test_fill_normal(r, common, 64, 1);
    for (i = 0; i < n; i++) {
        int64_t token = i / (dim * heads), e = i % dim;
        if (kind == UNIFORM) k[i] = common[e % 64];
        if (kind == ALTERNATING) k[i] = (token & 1 ? 1.0f : -1.0f) * common[e % 64] * 2;
        if (kind == INTEGERS) k[i] = (float)(test_below(r, 3) - 1);
        if (kind == CLUSTERED) {
            if (e == 0 && token % every == 0) test_fill_normal(r, mean, 64, 1.5);
            k[i] = mean[e % 64] + (float)(noise * test_normal(r));
        }
        if (kind == BAD_K && test_below(r, 200) == 0) k[i] = bad[test_below(r, 3)];
    }
    if (kind == NEEDLE && p->n_rows) {
        int64_t at = test_below(r, (int32_t)p->n_rows) * heads * dim;
        for (i = 0; i < heads * dim; i++) k[at + i] *= 12;
    }
    for (i = 0; i < nq; i++) {
        if (kind == INTEGERS) set_query(p, i, (test_below(r, 3) - 1) * 2);
        if (kind == SHARP) set_query(p, i, 40 * test_normal(r));
        if (kind == HUGE_SCORES) set_query(p, i, 3000 * test_normal(r));
        if (kind == BAD_Q && test_below(r, 50) == 0) set_query(p, i, (double)bad[test_below(r, 3)]);
    }
    memset(&t, 0, sizeof t);
    t.data = k;
    t.dtype = ATTN_F32;
    CHECK_EQ(attn_cpu_store(d, &t, NULL, p->slots, 0, p->n_rows), ATTN_OK);
}

static void random_opts(test_rng *r, problem_opts *o) {
    static const attn_dtype kv_types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                          ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    static const int32_t dims[] = {8, 8, 16, 24, 64};
    static const attn_dtype qo[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    static const int phases[] = {PREFILL, CHUNKED, DECODE, DECODE, DECODE, RAGGED};
    memset(o, 0, sizeof *o);
    o->phase = phases[test_below(r, 6)];
    o->layout = (attn_layout)test_below(r, 3);
    o->contiguous = test_below(r, 5) == 0;
    o->page_tokens = 1 + test_below(r, 100);
    if (test_below(r, 3) == 0) o->page_tokens = 1 << test_below(r, 7);
    if (o->layout == ATTN_K16) o->page_tokens = (o->page_tokens + 15) / 16 * 16;
    o->n_seq = 1 + (test_below(r, 3) == 0 ? test_below(r, 3) : 0);
    o->max_kv = 1 + test_below(r, test_below(r, 9) ? 120 : o->phase == DECODE ? 2500 : 400);
    o->n_kv_heads = 1 + test_below(r, 2);
    o->n_heads = o->n_kv_heads * (1 + test_below(r, 3));
    o->head_dim = o->v_head_dim = dims[test_below(r, 5)];
    o->v_head_dim = 8;
    o->k = kv_types[test_below(r, 7)];
    o->v = ATTN_BF16;
    o->q = qo[test_below(r, 3)];
    o->o = ATTN_F32;
    o->softcap = test_below(r, 6) == 0;
    o->sink = test_below(r, 6) == 0;
    o->evicted = test_below(r, 4) == 0;
    o->shared = test_below(r, 3) == 0 ? 16 * (1 + test_below(r, 6)) : 0;
    o->numerics = (attn_numerics)test_below(r, 3);
    o->sharp = test_below(r, 2) ? 1 : 3;
}

static void random_select(test_rng *r, int few, attn_select *s) {
    static const int32_t blocks[] = {1, 4, 8, 16, 16, 20, 32, 64, 300};
    static const int32_t rows[] = {16, 64, 64, 100, 1, 5}; // the last two where queries are few
    memset(s, 0, sizeof *s);
    s->kind = ATTN_SELECT_EXACT;
    s->heads = (attn_select_heads)test_below(r, 4);
    s->kv_block = blocks[test_below(r, 9)];
    s->row_block = rows[test_below(r, few ? 6 : 4)];
    s->exact.recent = test_below(r, 3) ? 1 + test_below(r, 30) : 0;
    if (test_below(r, 4)) s->exact.keep = 1 + test_below(r, 100);
    if (test_below(r, 4) == 0) s->exact.share = (float)test_uniform(r, 0, 1);
    if (test_below(r, 3) == 0) s->exact.epsilon = (float)exp(test_uniform(r, -12, -0.5));
    if (test_below(r, 8) == 0) s->dense_below = 1 + test_below(r, 100);
}

// ---- the library's side

static void choose(const attn_desc *d, const attn_select *s, const attn_summary *y, choice *c) {
    size_t bytes = attn_select_bytes(d, s), need = attn_cpu_select_scratch_bytes(d, s);
    int64_t units = attn_cpu_select_units(d, s), i;
    void *scratch = aligned_alloc(64, (need + 127) & ~(size_t)63);
    c->mem = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    c->seq_row = (int32_t *)calloc((size_t)d->n_seq, 4);
    memset(scratch, 0xff, need);
    memset((uint8_t *)scratch + need, 0x5a, 64 - need % 64);
    CHECK(bytes > 0 && need > 0);
    CHECK_EQ(attn_selection_init(d, s, c->mem, bytes, c->seq_row, 0, &c->x), ATTN_OK);
    c->x.keeps_all = 0; // lists all the same
    for (i = units - 1; i >= 0; i--)
        CHECK_EQ(attn_cpu_select(d, s, y, &c->x, i, 1, scratch), ATTN_OK);
    for (i = 0; i < (int64_t)(64 - need % 64); i++)
        if (((uint8_t *)scratch)[need + (size_t)i] != 0x5a) CHECK(!"scratch is large enough");
    free(scratch);
}

static void forget(choice *c) {
    free(c->mem);
    free(c->seq_row);
}

// Summaries of everything held, in a random order of units and in one or two steps.
static void summarize(const problem *p, test_rng *r, const attn_summary *y, size_t bytes,
                      int step) {
    attn_desc d = p->d;
    int32_t q_start[8] = {0}, q_pos0[8], len[8], s, cut = 0;
    int64_t n, i, at;
    memset(y->data, 0, bytes); // a node that is read before it is written prunes what it must not
    d.q_start = q_start;
    d.q_pos0 = q_pos0;
    d.kv.kv_len = len;
    for (cut = step; cut >= 0; cut--) {
        for (s = 0; s < d.n_seq; s++) {
            int32_t pos0 = p->d.kv.kv_pos0[s], q_len = p->d.q_start[s + 1] - p->d.q_start[s];
            int32_t first = p->d.kv.kv_len[s] - q_len; // held before this step's queries
            len[s] = cut ? first : p->d.kv.kv_len[s];
            q_pos0[s] = step && !cut ? pos0 + first : pos0;
            q_start[s + 1] = q_start[s] + len[s] - (q_pos0[s] - pos0);
        }
        n = attn_cpu_summarize_units(&d);
        at = n ? test_below(r, (int32_t)n) : 0;
        for (i = 0; i < n; i++)
            CHECK_EQ(attn_cpu_summarize(&d, y, (at + i * (n - 1 > 0 ? n - 1 : 1)) % n, 1), ATTN_OK);
    }
}

// ---- brute force

typedef struct row_case {
    int32_t seq, list, first, always, last, n_q, token, pos, kv_head, n_kv, head, n_head, rows;
    int32_t n_blocks;      // from first on
    double *m, *z, *total; // (rows, n_blocks) logs; (rows)
    double *value;         // (n_blocks)
} row_case;

static double log_add(double a, double b) {
    double t = a > b ? a : b;
    if (a != a || b != b) return a + b;
    if (t == -HUGE_VAL || t == HUGE_VAL) return t;
    return t + log(exp(a - t) + exp(b - t));
}

// Scores of a list row by the definition in attn.h.
static void brute(const attn_desc *d, const attn_select *f, row_case *c) {
    attni_side side;
    double k[64], *q, scale = (double)attni_scale(d);
    int32_t group = d->n_heads / d->n_kv_heads, r, j, e, pos0 = d->kv.kv_pos0[c->seq], b, at;
    attni_side_init(d, 0, &side);
    c->n_blocks = c->last - c->first + 1;
    c->m = (double *)malloc(8 * (size_t)c->rows * (size_t)c->n_blocks);
    c->z = (double *)malloc(16 * (size_t)c->rows);
    c->total = c->z + c->rows;
    c->value = (double *)malloc(8 * (size_t)c->n_blocks);
    for (r = 0; r < c->rows * c->n_blocks; r++) c->m[r] = -HUGE_VAL;
    q = (double *)malloc(8 * (size_t)c->rows * (size_t)d->head_dim);
    for (r = 0; r < c->rows; r++)
        for (e = 0; e < d->head_dim; e++)
            q[r * d->head_dim + e] = (double)attni_get(
                d->q.data, d->q.dtype,
                ((int64_t)(c->token + r % c->n_q) * d->n_heads + c->head + r / c->n_q) *
                        d->head_dim + e);
    for (j = 0; j < d->kv.kv_len[c->seq]; j++) {
        b = (pos0 + j) / f->kv_block - c->first;
        if (b >= c->n_blocks) break;
        for (at = -1, r = 0; r < c->rows; r++) {
            int32_t head = (c->head + r / c->n_q) / group;
            double s = 0;
            if (pos0 + j > c->pos + r % c->n_q) continue;
            if (head != at) attni_ref_row(d, &side, c->seq, at = head, j, k);
            for (e = 0; e < d->head_dim; e++) s += k[e] * q[r * d->head_dim + e];
            s *= scale;
            if (d->logits.softcap > 0)
                s = (double)d->logits.softcap * tanh(s / (double)d->logits.softcap);
            c->m[r * c->n_blocks + b] = log_add(c->m[r * c->n_blocks + b], s);
        }
    }
    free(q);
    for (r = 0; r < c->rows; r++) {
        c->z[r] = c->total[r] = -HUGE_VAL;
        for (b = 0; b < c->n_blocks; b++) {
            double m = c->m[r * c->n_blocks + b];
            if (b == 0 || b + c->first >= c->always) c->z[r] = log_add(c->z[r], m);
            c->total[r] = log_add(c->total[r], m);
        }
    }
    for (b = 0; b < c->n_blocks; b++) {
        c->value[b] = -HUGE_VAL;
        for (r = 0; r < c->rows; r++) {
            double m = c->m[r * c->n_blocks + b], v = m - c->z[r];
            if (m != m || m == HUGE_VAL) v = HUGE_VAL;
            else if (c->z[r] != c->z[r] || c->z[r] == HUGE_VAL || m == -HUGE_VAL) continue;
            if (v > c->value[b]) c->value[b] = v;
        }
    }
}

// The largest share of mass a row misses by leaving out blocks with out[b]; NaN when unknown.
static double true_missed(const row_case *c, const uint8_t *listed) {
    double worst = 0;
    int32_t r, b;
    for (r = 0; r < c->rows; r++) {
        double gone = -HUGE_VAL, share;
        for (b = 0; b < c->n_blocks; b++)
            if (!listed[b]) gone = log_add(gone, c->m[r * c->n_blocks + b]);
        share = gone == -HUGE_VAL ? 0 : exp(gone - c->total[r]);
        if (!(share <= worst)) worst = share;
    }
    return worst;
}

static int32_t budget(const row_case *c, const attn_desc *d, const attn_select *f) {
    double share = ceil(((double)f->exact.share - 1e-6) * c->n_blocks);
    int32_t n = (f->exact.keep + f->kv_block - 1) / f->kv_block;
    if (d->kv.kv_len[c->seq] <= f->dense_below) return c->n_blocks;
    if (!f->exact.keep && !(f->exact.share > 0)) return c->n_blocks;
    return share > n ? (int32_t)share : n;
}

// Where rounding may decide: how far two values of this row may be apart and still tie.
static double slack(const row_case *c, double v) {
    double most = 0;
    int32_t i;
    for (i = 0; i < c->rows * c->n_blocks; i++)
        if (fabs(c->m[i]) < 1e300 && fabs(c->m[i]) > most) most = fabs(c->m[i]);
    return 1e-5 * (1 + most + (fabs(v) < 1e300 ? fabs(v) : 0));
}

// Checks one list row against brute force.
static void check_row(const attn_desc *d, const attn_select *f, const choice *o, row_case *c,
                      int32_t row, int kind) {
    const attn_selection *x = &o->x;
    const int64_t at = c->list * ((int64_t)x->max_rows + 1) + row;
    uint8_t *listed = (uint8_t *)calloc((size_t)c->n_blocks + 1, 1);
    int32_t b, n = 0, must = 0, want = budget(c, d, f);
    int dense = d->kv.kv_len[c->seq] <= f->dense_below;
    double worst_in = HUGE_VAL, best_out = -HUGE_VAL, miss, eps = (double)f->exact.epsilon;
    int32_t in_id = -1, out_id = -1;
    int64_t e;
    for (e = x->row_start[at]; e < x->row_end[at]; e++, n++) {
        int32_t id = x->block[e] - c->first;
        if (!CHECK(id >= 0 && id < c->n_blocks && !listed[id])) break;
        if (e > x->row_start[at]) CHECK(x->block[e] > x->block[e - 1]);
        listed[id] = 1;
    }
    for (b = 0; b < c->n_blocks; b++) {
        int always = b == 0 || b + c->first >= c->always;
        must += always;
        if (always) CHECK(listed[b]);
        else if (listed[b] && c->value[b] <= worst_in) worst_in = c->value[b], in_id = b;
        else if (!listed[b] && c->value[b] > best_out) best_out = c->value[b], out_id = b;
    }
    if (want > c->n_blocks) want = c->n_blocks;
    if (want < must) want = must;
    if (!(eps > 0) || dense) CHECK_EQ(n, want);
    else CHECK(n <= want);
    // nothing left out is worth more than what is listed; ties go to the lower block
    if (in_id >= 0 && out_id >= 0 &&
        (best_out > worst_in || (best_out == worst_in && out_id < in_id))) {
        if (CHECK(best_out - worst_in <= slack(c, best_out)) && best_out != worst_in) n_excused++;
    }
    miss = true_missed(c, listed);
    if (n == c->n_blocks) CHECK(x->missed[at] == 0);
    CHECK(x->missed[at] >= 0 && x->missed[at] <= 1);
    if (miss == miss) CHECK(miss <= (double)x->missed[at]);
    n_certified += miss < 0.5 && x->missed[at] < 1 && n < c->n_blocks;
    if (eps > 0 && !dense && kind != BAD_K && kind != BAD_Q) {
        double tol = eps * (1e-4 + 2 * slack(c, 0)) + 1e-9;
        if (n < want) CHECK(miss <= eps + tol);
        if (in_id >= 0 && n > must) { // one fewer would not have done
            for (b = 0; b < c->n_blocks; b++) if (b + c->first < c->always && b && listed[b] &&
                (c->value[b] < c->value[in_id])) in_id = b;
            listed[in_id] = 0;
            CHECK(true_missed(c, listed) >= eps - tol);
        }
    }
    free(listed);
}

static void check_all(const attn_desc *d, const attn_select *s, const choice *o, int kind) {
    attn_select f = *s;
    int32_t seq, l, i, at = 0;
    attni_select_fill(s, &f);
    for (seq = 0; seq < d->n_seq; seq++) {
        int32_t q_len = d->q_start[seq + 1] - d->q_start[seq], p0 = d->q_pos0[seq];
        int32_t end = d->kv.kv_pos0[seq] + d->kv.kv_len[seq];
        for (i = 0; q_len && i <= (p0 + q_len - 1) / f.row_block - p0 / f.row_block; i++, at++)
            for (l = 0; l < o->x.n_lists; l++) {
                row_case c;
                int32_t from = (p0 / f.row_block + i) * f.row_block, upto = from + f.row_block;
                int32_t group = d->n_heads / d->n_kv_heads;
                memset(&c, 0, sizeof c);
                c.seq = seq;
                c.list = l;
                c.pos = from > p0 ? from : p0;
                if (upto > p0 + q_len) upto = p0 + q_len;
                c.n_q = upto - c.pos;
                c.token = d->q_start[seq] + c.pos - p0;
                c.n_head = o->x.n_lists == 1 ? d->n_heads : o->x.n_lists == d->n_heads ? 1 : group;
                if (f.heads == ATTN_SELECT_GROUP) c.n_head = group;
                if (f.heads == ATTN_SELECT_EACH) c.n_head = 1;
                c.head = l * c.n_head;
                c.rows = c.n_head * c.n_q;
                c.first = d->kv.kv_pos0[seq] / f.kv_block;
                c.last = ((upto < end ? upto : end) - 1) / f.kv_block;
                c.always = from < f.exact.recent ? 0 : (from - f.exact.recent) / f.kv_block;
                brute(d, &f, &c);
                check_row(d, &f, o, &c, at, kind);
                n_rows++;
                free(c.m);
                free(c.z);
                free(c.value);
            }
    }
}

// The same lists; counts what was read.
static void check_equal(const choice *a, const choice *b, int32_t rows, int32_t row_a, int exact) {
    int32_t l, i;
    for (l = 0; l < a->x.n_lists; l++)
        for (i = 0; i < rows; i++) {
            int64_t at = l * ((int64_t)a->x.max_rows + 1) + i + row_a;
            int64_t bt = l * ((int64_t)b->x.max_rows + 1) + i;
            int64_t n = a->x.row_end[at] - a->x.row_start[at];
            if (exact) CHECK(a->x.missed[at] == b->x.missed[bt]);
            else {
                n_pruned += a->x.visited[at] < b->x.visited[bt];
                n_keys_seen += a->x.visited[at];
                n_keys_all += b->x.visited[bt];
                CHECK(a->x.visited[at] <= b->x.visited[bt]);
            }
            if (CHECK_EQ(n, b->x.row_end[bt] - b->x.row_start[bt]))
                CHECK(!memcmp(a->x.block + a->x.row_start[at], b->x.block + b->x.row_start[bt],
                              4 * (size_t)n));
        }
}

// Sequence s of a problem, alone.
static void check_alone(const problem *p, const attn_select *s, const attn_summary *y,
                        const choice *all, int32_t seq) {
    attn_desc d = p->d;
    int32_t q_start[2] = {0, 0}, rows, row = 0, i;
    choice one;
    int64_t size = d.q.dtype == ATTN_F32 ? 4 : 2;
    attn_select f;
    attni_select_fill(s, &f);
    q_start[1] = p->d.q_start[seq + 1] - p->d.q_start[seq];
    if (!q_start[1]) return;
    for (i = 0; i < seq; i++) row += attni_rows_of(&p->d, f.row_block, i);
    d.n_seq = 1;
    d.q_start = q_start;
    d.q_pos0 += seq;
    d.kv.kv_len += seq;
    d.kv.kv_pos0 += seq;
    d.kv.page_table = p->d.kv.page_table ? p->d.kv.page_table + seq * d.kv.page_table_stride : &seq;
    if (!p->d.kv.page_table) d.kv.page_table_stride = 1;
    d.q.data = (uint8_t *)p->d.q.data + p->d.q_start[seq] * (int64_t)d.n_heads * d.head_dim * size;
    rows = attn_select_rows(&d, s);
    choose(&d, s, y, &one);
    check_equal(all, &one, rows, row, 1);
    forget(&one);
}

static void one_case(test_rng *r) {
    problem p;
    problem_opts o;
    attn_select s;
    attn_summary y;
    choice with, without;
    size_t bytes;
    int32_t rows;
    int kind = test_below(r, 4) ? test_below(r, N_KEYS) : CLUSTERED; // bounds tell most there
    random_opts(r, &o);
    random_select(r, o.phase == DECODE, &s);
    problem_make(&p, &o, r);
    refill(&p, r, kind);
    if (test_below(r, 6) == 0) p.d.logits.scale = (float)test_uniform(r, -1, 1);
    bytes = attn_summary_bytes(&p.d);
    y.data = (uint16_t *)problem_alloc(&p, bytes);
    summarize(&p, r, &y, bytes, test_below(r, 2));
    if (CHECK_EQ(attn_select_check(&p.d, &s), ATTN_OK) && p.n_tokens) {
        choose(&p.d, &s, &y, &with);
        choose(&p.d, &s, NULL, &without);
        rows = attn_select_rows(&p.d, &s);
        check_all(&p.d, &s, &with, kind);
        check_equal(&with, &without, rows, 0, 0);
        if (o.n_seq > 1) check_alone(&p, &s, &y, &with, test_below(r, o.n_seq));
        forget(&with);
        forget(&without);
    }
    problem_free(&p);
}

// A run is summarised as whoever has the most of it sees it: the second sequence, whose front is
// gone, must not take the front's cells out of the first one's run.
static void fronts(void) {
    enum { PAGES = 16, GONE = 3, DIM = 16 };
    int32_t table[2 * PAGES], kv_len[2], kv_pos0[2], q_start[3], q_pos0[2], i, step, s;
    float *k = (float *)calloc(PAGES * 64 * DIM, sizeof *k);
    test_rng r = {9};
    attn_desc d;
    attn_summary y[2];
    size_t bytes;
    memset(&d, 0, sizeof d);
    for (i = 0; i < PAGES; i++) table[i] = i;
    for (i = 0; i < PAGES; i++) table[PAGES + i] = attni_min32(i + GONE, PAGES - 1);
    for (i = 0; i < PAGES * 64 * DIM; i++) k[i] = (float)test_uniform(&r, -1, 1);
    kv_pos0[0] = q_start[0] = 0, kv_pos0[1] = GONE * 64;
    d.n_heads = d.n_kv_heads = 1, d.head_dim = DIM, d.v_head_dim = 8;
    d.q_start = q_start, d.q_pos0 = q_pos0, d.kv.kv_pos0 = kv_pos0, d.kv.kv_len = kv_len;
    d.kv.page_table = table, d.kv.page_table_stride = PAGES;
    d.kv.page_tokens = 64, d.kv.n_pages = PAGES;
    d.kv.k.data = d.kv.v.data = k, d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    bytes = attn_summary_bytes(&d);
    for (i = 0; i < 2; i++) {
        y[i].data = (uint16_t *)aligned_alloc(64, (bytes + 63) & ~(size_t)63);
        memset(y[i].data, 0, bytes);
        d.n_seq = i + 1;
        for (step = 0; step < 2; step++) { // both get their new tokens from the fifth page on
            for (s = 0; s < 2; s++) {
                q_pos0[s] = step ? 5 * 64 : kv_pos0[s];
                kv_len[s] = (step ? PAGES : 5) * 64 - kv_pos0[s];
                q_start[s + 1] = q_start[s] + kv_pos0[s] + kv_len[s] - q_pos0[s];
            }
            CHECK_EQ(attn_cpu_summarize(&d, &y[i], 0, attn_cpu_summarize_units(&d)), ATTN_OK);
        }
    }
    CHECK(memcmp(y[0].data, y[1].data, bytes) == 0);
    free(y[0].data), free(y[1].data), free(k);
}

int main(int argc, char **argv) {
    test_rng r = {test_arg(argc, argv, 1, 1)};
    uint64_t n = test_arg(argc, argv, 2, 10000), i;
    fronts();
    for (i = 0; i < n; i++) {
        test_rng one = {test_u64(&r)};
        long long failed = test_failed;
        one_case(&one);
        if (test_failed > failed && test_failed < 40)
            printf("    case %llu\n", (unsigned long long)i);
    }
    printf("%llu problems, %lld list rows: %lld within rounding of the cut; %lld with a useful "
           "bound\n%lld rows pruned, %.1f %% of the keys read without summaries\n",
           (unsigned long long)n, n_rows, n_excused, n_certified, n_pruned,
           100.0 * (double)n_keys_seen / (double)(n_keys_all ? n_keys_all : 1));
    CHECK(n < 100 || (n_pruned > 0 && n_certified > 0));
    return TEST_END();
}

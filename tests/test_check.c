/* test_check.c - the checked build: right results pass, planted mistakes are ERR_CHECK.
   test_check [SEED [COUNT]]
   cc -O1 -I. -Itests tests/test_check.c -o test_check -lm */
#define ATTN_CHECK
static void spoil_results(const void *d, void *partials);
#define ATTNI_CHECK_SPOIL(d, partials) spoil_results(d, partials)
#define ATTN_IMPLEMENTATION
#include "problem.h"

// ---- a wrong kernel, played by a hook between the tasks and the check

enum spoil { NOTHING, ZEROS, SCALED, HEADS, ONE_ROW, LSE, N_SPOILS };
static int spoil;
static int32_t spoil_row; // token * n_heads + head
static double spoil_by;

static void spoil_results(const void *desc, void *partials) {
    const attn_desc *d = (const attn_desc *)desc;
    int64_t row, n_rows = (int64_t)d->q_start[d->n_seq] * d->n_heads, e, vd = attni_v_dim(d);
    (void)partials;
    if (spoil == NOTHING) return;
    for (row = 0; row < n_rows; row++) {
        if (spoil == ONE_ROW && row != spoil_row) continue;
        if (spoil == LSE && d->lse) d->lse[row] += (float)spoil_by;
        for (e = 0; e < vd && spoil != LSE; e++) {
            float x = attni_get(d->o.data, d->o.dtype, row * vd + e);
            if (spoil == ZEROS) x = 0;
            if (spoil == HEADS && row + 1 < n_rows)
                x = attni_get(d->o.data, d->o.dtype, (row + 1) * vd + e);
            if (spoil == SCALED || spoil == ONE_ROW) x *= (float)(1 + spoil_by);
            attni_put(d->o.data, d->o.dtype, row * vd + e, x);
        }
    }
}

// ---- random problems

static void random_opts(test_rng *r, problem_opts *o) {
    static const int32_t dims[] = {8, 16, 24, 64, 128};
    static const attn_dtype kv[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                    ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    memset(o, 0, sizeof *o);
    o->phase = test_below(r, N_PHASES);
    o->mask = test_below(r, N_MASKS);
    o->layout = (attn_layout)test_below(r, 3);
    o->page_tokens = 16 * (1 + test_below(r, 3));
    o->n_seq = 1 + test_below(r, 4);
    o->max_kv = test_below(r, 3) ? 1 + test_below(r, 100) : 1 + test_below(r, 700);
    o->n_kv_heads = 1 + test_below(r, 2);
    o->n_heads = o->n_kv_heads * (1 + test_below(r, 3));
    o->head_dim = dims[test_below(r, 5)];
    o->v_head_dim = dims[test_below(r, 5)];
    o->k = kv[test_below(r, 7)];
    o->v = kv[test_below(r, 7)];
    o->q = (attn_dtype)(ATTN_F32 + test_below(r, 3));
    o->o = (attn_dtype)(ATTN_F32 + test_below(r, 3));
    if (test_below(r, 5) == 0) o->k = o->v = o->q = o->o = ATTN_BF16;
    problem_terms(o, r);
    o->numerics = (attn_numerics)test_below(r, 3);
    if (o->numerics == ATTN_NUMERICS_APPROX) o->k = ATTN_I8;
    o->sharp = 3;
}

typedef struct step { // a plan, and what it runs in
    attn_plan_params params;
    attn_plan *plan;
    void *mem, *partials, *scratch;
} step;

static void *block(size_t bytes) {
    void *m = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!m) exit(2);
    memset(m, 0xff, bytes);
    return m;
}

static void step_make(step *s, const attn_desc *d, int32_t workers, int32_t share) {
    size_t bytes;
    attn_cpu_plan_params(d, workers, &s->params);
    s->params.share = share;
    bytes = attn_plan_bytes(d, &s->params);
    s->mem = block(bytes);
    if (!CHECK_EQ(attn_plan_build(d, &s->params, s->mem, bytes, &s->plan), ATTN_OK)) exit(1);
    s->partials = block(attn_plan_partial_bytes(s->plan));
    s->scratch = block(attn_cpu_scratch_bytes(d, s->plan));
}

static void step_free(step *s) {
    free(s->mem);
    free(s->partials);
    free(s->scratch);
}

static attn_result step_run(const step *s, const attn_desc *d) {
    return attn_cpu_run(d, s->plan, 0, s->plan->n_tasks, s->partials, s->scratch);
}

static attn_result step_merge(const step *s, const attn_desc *d) {
    return attn_cpu_merge(d, s->plan, 0, s->plan->n_merges, s->partials);
}

static long long n_caught[N_SPOILS], n_tried[N_SPOILS];

// Calls until a mistake is seen; 0 when it never is.
static int32_t calls_until(const step *s, const attn_desc *d, int32_t limit) {
    int32_t i;
    for (i = 1; i <= limit; i++)
        if (step_run(s, d) == ATTN_ERR_CHECK) return i;
    return 0;
}

// Do all rows write O at once, see something, and with scores that pin them down? (The documented
// bound of APPROX lets them off nearly anything.)
static int writes_rows(const problem *p, const step *s) {
    int32_t i, e, n = 0;
    if (p->n_tokens == 0 || p->d.numerics == ATTN_NUMERICS_APPROX) return 0;
    for (i = 0; i < s->plan->n_tasks; i++)
        n += s->plan->segment[s->plan->task[i].segment].n_slots == 0;
    if (n < s->plan->n_tasks) return 0;
    for (i = 0; i < p->n_tokens * p->d.n_heads; i++) {
        double top = 0;
        for (e = 0; e < p->d.v_head_dim; e++)
            if (fabs(p->ref[i * p->d.v_head_dim + e]) > top)
                top = fabs(p->ref[i * p->d.v_head_dim + e]);
        if (top < 0.05) return 0;
    }
    return 1;
}

static void spoil_problem(const problem *p, const step *s, test_rng *r) {
    const attn_desc *d = &p->d;
    int32_t rows = p->n_tokens * d->n_heads;
    if (!writes_rows(p, s)) return;
    for (spoil = 1; spoil < N_SPOILS; spoil++) {
        int32_t calls;
        if (spoil == LSE && !d->lse) continue;
        if (spoil == HEADS && rows < 2) continue;
        if (spoil == ONE_ROW && rows > 60) continue;
        // 16-bit results are allowed to be worse, and sharp scores to move in f32
        spoil_by = d->o.dtype == ATTN_F32 ? 0.01 : 0.3;
        spoil_row = test_below(r, rows);
        calls = calls_until(s, d, spoil == ONE_ROW ? 40 * rows + 40 : 4);
        n_tried[spoil]++;
        n_caught[spoil] += calls > 0;
    }
    spoil = NOTHING;
}

static void random_problem(uint64_t seed) {
    test_rng r;
    problem p;
    problem_opts o;
    step s;
    int isa, i;
    r.state = seed;
    random_opts(&r, &o);
    problem_make(&p, &o, &r);
    CHECK_EQ(attn_ref_forward(&p.d, p.ref, p.ref_lse), ATTN_OK);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        attn_result e;
        if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
        attn_cpu_set_isa((attn_cpu_isa)isa);
        step_make(&s, &p.d, 1 + test_below(&r, 4), test_below(&r, 3));
        for (i = 0; i < 8; i++) { // other rows every time
            e = step_run(&s, &p.d);
            if (e == ATTN_OK) e = step_merge(&s, &p.d);
            if (!CHECK_EQ(e, ATTN_OK))
                printf("    seed %llu %s numerics %d o %s\n", (unsigned long long)seed,
                       attn_cpu_executor(&p.d), (int)o.numerics, attn_dtype_name(o.o));
        }
        if (isa == ATTN_CPU_SCALAR || test_below(&r, 3) == 0) spoil_problem(&p, &s, &r);
        // partials that changed between run and merge
        if (s.plan->n_merges > 0 && o.numerics != ATTN_NUMERICS_APPROX) {
            float *x = (float *)s.partials;
            size_t n = attn_plan_partial_bytes(s.plan) / 4, k;
            for (k = 0; k < n; k++) x[k] = x[k] * 0.5f + 1;
            for (i = 0, e = ATTN_OK; i < 20 && e == ATTN_OK; i++) e = step_merge(&s, &p.d);
            CHECK_EQ(e, ATTN_ERR_CHECK);
        }
        step_free(&s);
    }
    attn_cpu_set_isa(ATTN_CPU_AUTO);
    problem_free(&p);
}

// Inputs at which the reference or the arithmetic ends: never a false alarm.
static void test_extremes(void) {
    static const float values[] = {1e9f, -2.5e5f, 3e38f, 0.0f, 1e-38f};
    test_rng r;
    problem p;
    problem_opts o;
    step s;
    int i, j, k;
    memset(&o, 0, sizeof o);
    o.phase = CHUNKED;
    o.page_tokens = 16;
    o.n_seq = 2;
    o.max_kv = 90;
    o.n_kv_heads = 1;
    o.n_heads = 2;
    o.head_dim = o.v_head_dim = 16;
    o.k = o.v = o.q = o.o = ATTN_F32;
    o.lse = 1;
    o.sharp = 3;
    for (i = 0; i < 5 * 3 * 3; i++) {
        r.state = (uint64_t)i + 77;
        problem_make(&p, &o, &r);
        for (j = 0; j < 40; j++) {
            float x = i % 3 == 0 ? values[i / 9]
                      : i % 3 == 1 ? attni_float(0x7fc00000u) : attni_float(0xff800000u);
            float *at = (float *)(i / 3 % 3 == 0 ? p.d.q.data
                                  : i / 3 % 3 == 1 ? p.d.kv.k.data : p.d.kv.v.data);
            k = test_below(&r, p.n_tokens * 16);
            at[k] = x;
        }
        step_make(&s, &p.d, 1, 0);
        for (j = 0; j < 60; j++) CHECK_EQ(step_run(&s, &p.d), ATTN_OK);
        step_free(&s);
        problem_free(&p);
    }
}

// ---- an engine of two layers: pages that are free, tables that changed, memory that was hit

enum { LAYERS = 2, PAGES = 8, PT = 4, DIM = 16, LEN = 10 };

typedef struct engine {
    attn_desc d[LAYERS];
    float k[LAYERS][PAGES * PT * DIM], v[LAYERS][PAGES * PT * DIM], q[LEN * DIM], o[LEN * DIM];
    int32_t q_start[2], kv_len[1], table[PAGES];
    attn_tree *tree;
    int n_freed;
    uint64_t mem[4096];
} engine;

static void freed(void *user, int32_t page) {
    engine *e = (engine *)user;
    int l;
    for (l = 0; l < LAYERS; l++) attn_check_poison(&e->d[l], page);
    e->n_freed += page >= 0;
}

static int poisoned(const engine *e, int32_t page) {
    const unsigned char *p;
    size_t i, n = 0;
    int l;
    for (l = 0; l < 2 * LAYERS; l++) {
        p = (const unsigned char *)((l & 1 ? e->k[l / 2] : e->v[l / 2]) + page * PT * DIM);
        for (i = 0; i < 4 * PT * DIM; i++) n += p[i] == 0xff;
    }
    return n == 4 * PT * DIM * 2 * LAYERS;
}

// A sequence of n tokens, its K and V stored in both layers.
static int32_t engine_add(engine *e, int32_t n, int32_t token) {
    int32_t tokens[LEN], seq = -1, i, l;
    float rows[LEN * DIM];
    int64_t slots[LEN];
    attn_tensor t;
    test_rng r;
    r.state = (uint64_t)token;
    for (i = 0; i < n; i++) tokens[i] = token + i;
    CHECK_EQ(attn_tree_insert(e->tree, 0, tokens, n, &seq, NULL, NULL, 0, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_pages(e->tree, seq, e->table, PAGES), (n + PT - 1) / PT);
    test_fill_normal(&r, rows, (size_t)(n * DIM), 1);
    for (i = 0; i < n; i++) slots[i] = (int64_t)e->table[i / PT] * PT + i % PT;
    memset(&t, 0, sizeof t);
    t.data = rows;
    t.dtype = ATTN_F32;
    for (l = 0; l < LAYERS; l++)
        CHECK_EQ(attn_cpu_store(&e->d[l], &t, &t, slots, 0, n), ATTN_OK);
    e->q_start[1] = e->kv_len[0] = n;
    return seq;
}

static void engine_make(engine *e) {
    attn_tree_desc td;
    attn_pool *pool;
    test_rng r;
    int l;
    memset(e, 0, sizeof *e);
    memset(&td, 0, sizeof td);
    td.n_pages = PAGES;
    td.page_tokens = PT;
    td.max_seq = 4;
    CHECK(attn_tree_bytes(&td) <= sizeof e->mem);
    CHECK_EQ(attn_tree_init(&td, e->mem, sizeof e->mem, &e->tree), ATTN_OK);
    pool = attn_tree_pool(e->tree);
    r.state = 5;
    test_fill_normal(&r, e->q, LEN * DIM, 2);
    for (l = 0; l < LAYERS; l++) {
        attn_desc *d = &e->d[l];
        d->n_seq = d->n_heads = d->n_kv_heads = 1;
        d->head_dim = DIM;
        d->q_start = e->q_start;
        d->q.data = e->q;
        d->o.data = e->o;
        d->kv.k.data = e->k[l];
        d->kv.v.data = e->v[l];
        d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_F32;
        d->kv.n_pages = PAGES;
        d->kv.page_tokens = PT;
        d->kv.page_table = e->table;
        d->kv.page_table_stride = PAGES;
        d->kv.kv_len = e->kv_len;
        d->kv.pool = pool;
    }
    pool->freed = freed;
    pool->freed_user = e;
    freed(e, -1);
}

static void test_free_pages(void) {
    static engine e;
    int32_t a, b, i, was[PAGES];
    attn_page_copy c;
    int64_t slot;
    attn_tensor t;
    float *hit, old;
    step s;
    engine_make(&e);
    for (i = 0; i < PAGES; i++) CHECK(poisoned(&e, i));
    b = engine_add(&e, 5, 500);
    a = engine_add(&e, LEN, 100);
    for (i = 0; i < PAGES; i++) was[i] = e.table[i];
    step_make(&s, &e.d[0], 1, 0);
    for (i = 0; i < 20; i++) CHECK_EQ(step_run(&s, &e.d[i % 2]), ATTN_OK);

    // something writes to a page that nobody has: found within n_free calls
    for (i = 0; i < PAGES && attn_tree_pool(e.tree)->ref[i] > 0; i++) {}
    hit = e.k[1] + i * PT * DIM + 3;
    memcpy(&old, hit, 4);
    *hit = 1;
    for (i = 0; i < PAGES && step_run(&s, &e.d[1]) == ATTN_OK; i++) {}
    CHECK(i < PAGES);
    memcpy(hit, &old, 4);
    for (i = 0; i < PAGES; i++) CHECK_EQ(step_run(&s, &e.d[1]), ATTN_OK);

    // a table entry that left the pool since the plan was made
    e.table[1] = PAGES;
    CHECK_EQ(step_run(&s, &e.d[0]), ATTN_ERR_PAGE);
    e.table[1] = -1;
    CHECK_EQ(step_run(&s, &e.d[0]), ATTN_ERR_PAGE);
    e.table[1] = was[1];

    // the sequence ends, and its old table is run, stored to, copied from and to
    e.n_freed = 0;
    CHECK_EQ(attn_tree_release(e.tree, a, 0), ATTN_OK);
    CHECK_EQ(e.n_freed, (LEN + PT - 1) / PT);
    for (i = 0; i < (LEN + PT - 1) / PT; i++) CHECK(poisoned(&e, was[i]));
    memset(e.o, 0, sizeof e.o);
    CHECK_EQ(step_run(&s, &e.d[0]), ATTN_ERR_CHECK);
    for (i = 0; i < LEN * DIM; i++) CHECK(e.o[i] == 0);
    memset(&t, 0, sizeof t);
    t.data = e.q;
    t.dtype = ATTN_F32;
    slot = (int64_t)was[0] * PT;
    CHECK_EQ(attn_cpu_store(&e.d[0], &t, &t, &slot, 0, 1), ATTN_ERR_CHECK);
    CHECK(poisoned(&e, was[0]));
    CHECK_EQ(attn_tree_pages(e.tree, b, e.table, PAGES), 2);
    c.src = was[0];
    c.dst = e.table[0];
    c.n_tokens = PT;
    CHECK_EQ(attn_cpu_copy_pages(&e.d[0], &c, 1), ATTN_ERR_CHECK);
    c.src = e.table[0];
    c.dst = was[0];
    CHECK_EQ(attn_cpu_copy_pages(&e.d[0], &c, 1), ATTN_ERR_CHECK);
    CHECK(poisoned(&e, was[0]));
    step_free(&s);

    // eviction frees too
    CHECK_EQ(attn_tree_release(e.tree, b, 1), ATTN_OK);
    e.n_freed = 0;
    CHECK_EQ(attn_tree_evict(e.tree, -1, NULL), ATTN_OK);
    CHECK_EQ(e.n_freed, 2);
    for (i = 0; i < PAGES; i++) CHECK(poisoned(&e, i));
}

// Poison in every layout and dtype; never a byte between the rows.
static void test_poison(void) {
    static const attn_dtype kv[] = {ATTN_F32, ATTN_F16, ATTN_F8E4M3, ATTN_I8, ATTN_I4};
    static unsigned char mem[3][40000], zero[40000];
    int i, l, x;
    for (i = 0; i < 5; i++)
        for (l = 0; l < 3; l++) {
            attn_desc d;
            size_t bytes;
            memset(&d, 0, sizeof d);
            memset(mem, 0, sizeof mem);
            d.n_heads = d.n_kv_heads = 2;
            d.head_dim = 24;
            d.v_head_dim = 16;
            d.kv.layout = (attn_layout)l;
            d.kv.n_pages = 3;
            d.kv.page_tokens = 16;
            d.kv.k.dtype = d.kv.v.dtype = kv[i];
            d.kv.k.data = mem[0];
            d.kv.v.data = mem[1];
            bytes = attn_kv_page_bytes(&d, 0);
            attn_check_poison(&d, 3); // no such page
            CHECK(memcmp(mem[0], zero, sizeof zero) == 0);
            attn_check_poison(&d, 1);
            memset(mem[2], 0xff, bytes);
            CHECK(memcmp(mem[0], zero, bytes) == 0);
            CHECK(memcmp(mem[0] + bytes, mem[2], bytes) == 0);
            CHECK(memcmp(mem[0] + 2 * bytes, zero, bytes) == 0);
            bytes = attn_kv_page_bytes(&d, 1);
            CHECK(memcmp(mem[1] + bytes, mem[2], bytes) == 0);
            CHECK(memcmp(mem[1] + 2 * bytes, zero, bytes) == 0);
            if (l != ATTN_TOKEN_MAJOR || kv[i] != ATTN_F32) continue;
            // K and V rows side by side in one array: V's last row must not reach the next K
            memset(mem, 0, sizeof mem);
            d.v_head_dim = 24;
            d.kv.k.stride_token = d.kv.v.stride_token = 96;
            d.kv.v.data = mem[0] + 192;
            attn_check_poison(&d, 0);
            for (x = 0; x < 16 * 96 * 4; x++) CHECK(mem[0][x] == 0xff);
            CHECK(memcmp(mem[0] + x, zero, sizeof zero - (size_t)x) == 0);
        }
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 40), i;
    int k;
    attn_cpu_open();
    test_poison();
    test_free_pages();
    test_extremes();
    for (i = 0; i < count; i++) random_problem(seed + i);
    for (k = 1; k < N_SPOILS; k++) {
        printf("mistake %d: found %lld of %lld\n", k, n_caught[k], n_tried[k]);
        CHECK(n_caught[k] * 50 >= n_tried[k] * 49);
        CHECK(n_tried[k] > 0 || count < 30);
    }
    return TEST_END();
}

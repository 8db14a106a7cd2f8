/* test_threads.c - what attn.h says about threads, for ThreadSanitizer to watch: the first calls of
   all race for the CPU's features, tasks and merges of one plan run side by side, stores of
   disjoint rows too, and the thread pool of the examples hands out every task once.
   cc -Itests -I. -Iexamples tests/test_threads.c -o test_threads -pthread -lm
   ./test_threads [SEED [ROUNDS]] */
#define LLAMA_IMPLEMENTATION
#include "llama.h"
#define ATTN_IMPLEMENTATION
#include "problem.h"

#include <pthread.h>

enum { THREADS = 4 };

typedef void (*body)(int thread, void *ctx);
typedef struct worker {
    pthread_t id;
    int thread;
    body fn;
    void *ctx;
    pthread_barrier_t *start;
} worker;

static void *worker_main(void *arg) {
    worker *w = (worker *)arg;
    pthread_barrier_wait(w->start);
    w->fn(w->thread, w->ctx);
    return NULL;
}

// Calls fn on all threads at once, as nearly as a barrier can.
static void together(body fn, void *ctx) {
    worker w[THREADS];
    pthread_barrier_t start;
    int i;
    pthread_barrier_init(&start, NULL, THREADS);
    for (i = 0; i < THREADS; i++) {
        w[i].thread = i;
        w[i].fn = fn;
        w[i].ctx = ctx;
        w[i].start = &start;
        if (pthread_create(&w[i].id, NULL, worker_main, &w[i])) exit(2);
    }
    for (i = 0; i < THREADS; i++) pthread_join(w[i].id, NULL);
    pthread_barrier_destroy(&start);
}

// ---- the first calls of the process

typedef struct first_use {
    attn_cpu_isa isa[THREADS];
    int has[THREADS];
} first_use;

static void first_body(int thread, void *ctx) {
    first_use *f = (first_use *)ctx;
    int isa;
    if (thread & 1) f->isa[thread] = attn_cpu_get_isa();
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++)
        f->has[thread] |= attn_cpu_has((attn_cpu_isa)isa) << isa;
    f->isa[thread] = attn_cpu_get_isa();
}

static void test_first_use(void) {
    first_use f;
    int i;
    memset(&f, 0, sizeof f);
    together(first_body, &f);
    for (i = 0; i < THREADS; i++) {
        CHECK_EQ(f.isa[i], f.isa[0]);
        CHECK_EQ(f.has[i], f.has[0]);
        CHECK(f.has[i] >> f.isa[i] & 1);
    }
}

// ---- one plan, many threads

typedef struct step {
    const attn_desc *d;
    const attn_plan *p;
    void *partials, *scratch[THREADS];
    int32_t task, merge; // atomic: the next to claim
    pthread_barrier_t ran;
    int failed;
} step;

static void step_body(int thread, void *ctx) {
    step *s = (step *)ctx;
    int32_t i;
    while ((i = __atomic_fetch_add(&s->task, 1, __ATOMIC_RELAXED)) < s->p->n_tasks)
        if (attn_cpu_run(s->d, s->p, i, 1, s->partials, s->scratch[thread]) != ATTN_OK)
            __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
    pthread_barrier_wait(&s->ran);
    while ((i = __atomic_fetch_add(&s->merge, 1, __ATOMIC_RELAXED)) < s->p->n_merges)
        if (attn_cpu_merge(s->d, s->p, i, 1, s->partials) != ATTN_OK)
            __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
}

static void *aligned(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!p) exit(2);
    return p;
}

static void test_step(const problem *p, int32_t share) {
    attn_plan_params params;
    step s;
    size_t n = (size_t)p->n_tokens * (size_t)p->d.n_heads * (size_t)p->d.v_head_dim;
    size_t bytes = n * (size_t)attn_dtype_bits(p->d.o.dtype) / 8;
    void *mem, *alone = malloc(bytes + 1);
    attn_plan *plan;
    int i;
    memset(&s, 0, sizeof s);
    attn_cpu_plan_params(&p->d, THREADS, &params);
    params.row_tile = 16;
    params.share = share;
    mem = aligned(attn_plan_bytes(&p->d, &params));
    CHECK_EQ(attn_plan_build(&p->d, &params, mem, attn_plan_bytes(&p->d, &params), &plan), ATTN_OK);
    s.d = &p->d;
    s.p = plan;
    s.partials = aligned(attn_plan_partial_bytes(plan));
    for (i = 0; i < THREADS; i++) s.scratch[i] = aligned(attn_cpu_scratch_bytes(&p->d, plan));
    CHECK_EQ(attn_cpu_run(&p->d, plan, 0, plan->n_tasks, s.partials, s.scratch[0]), ATTN_OK);
    CHECK_EQ(attn_cpu_merge(&p->d, plan, 0, plan->n_merges, s.partials), ATTN_OK);
    memcpy(alone, p->d.o.data, bytes);
    memset(p->d.o.data, 0xff, bytes);
    pthread_barrier_init(&s.ran, NULL, THREADS);
    together(step_body, &s);
    pthread_barrier_destroy(&s.ran);
    CHECK(!s.failed && memcmp(alone, p->d.o.data, bytes) == 0);
    for (i = 0; i < THREADS; i++) free(s.scratch[i]);
    free(s.partials);
    free(mem);
    free(alone);
}

// ---- stores of disjoint rows

typedef struct stores {
    const problem *p;
    int32_t next; // atomic
    int failed;
} stores;

static void store_body(int thread, void *ctx) {
    stores *s = (stores *)ctx;
    attn_tensor k, v;
    int32_t i;
    (void)thread;
    memset(&k, 0, sizeof k);
    memset(&v, 0, sizeof v);
    k.data = s->p->k_rows;
    v.data = s->p->v_rows;
    k.dtype = v.dtype = ATTN_F32;
    while ((i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED)) < s->p->n_rows)
        if (attn_cpu_store(&s->p->d, &k, &v, s->p->slots, i, 1) != ATTN_OK)
            __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
}

static void test_store(const problem *p) {
    size_t kb = attn_kv_page_bytes(&p->d, 0) * (size_t)p->d.kv.n_pages;
    size_t vb = attn_kv_page_bytes(&p->d, 1) * (size_t)p->d.kv.n_pages;
    char *was = (char *)malloc(kb + vb);
    stores s;
    memset(&s, 0, sizeof s);
    s.p = p;
    memcpy(was, p->d.kv.k.data, kb);
    memcpy(was + kb, p->d.kv.v.data, vb);
    memset(p->d.kv.k.data, 0xff, kb);
    memset(p->d.kv.v.data, 0xff, vb);
    together(store_body, &s);
    CHECK(!s.failed && memcmp(was, p->d.kv.k.data, kb) == 0);
    CHECK(memcmp(was + kb, p->d.kv.v.data, vb) == 0);
    free(was);
}

static void test_round(uint64_t seed) {
    static const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8, ATTN_I4};
    problem_opts o;
    problem p;
    test_rng r;
    r.state = seed;
    memset(&o, 0, sizeof o);
    o.phase = test_below(&r, N_PHASES);
    o.mask = test_below(&r, N_MASKS);
    o.layout = (attn_layout)test_below(&r, 3);
    o.page_tokens = 16;
    o.n_seq = 1 + test_below(&r, 4);
    o.max_kv = 1 + test_below(&r, 500);
    o.n_kv_heads = 2;
    o.n_heads = 4;
    o.head_dim = o.v_head_dim = 16;
    o.k = types[test_below(&r, 5)];
    o.v = types[test_below(&r, 5)];
    o.q = o.o = types[test_below(&r, 3)];
    o.shared = test_below(&r, 2) ? 300 : 0;
    o.lse = 1;
    o.numerics = (attn_numerics)test_below(&r, 3);
    o.sharp = 3;
    problem_make(&p, &o, &r);
    test_step(&p, test_below(&r, 3));
    test_store(&p);
    problem_free(&p);
}

// ---- the pool of the examples

typedef struct counts {
    int32_t done[1000];
} counts;

static void count_task(void *ctx, int64_t task, int32_t thread) {
    (void)thread;
    ((counts *)ctx)->done[task]++; // plain: two threads on one task would be a race
}

static void test_pool(test_rng *r, int rounds) {
    llama_pool *pool = llama_pool_create(THREADS);
    static counts c;
    int i, n, t, bad = 0;
    if (!CHECK(pool != NULL)) return;
    for (i = 0; i < rounds; i++) {
        n = test_below(r, 4) ? test_below(r, 9) : test_below(r, 1000);
        memset(&c, 0, sizeof c);
        llama_pool_run(pool, count_task, &c, n);
        for (t = 0; t < 1000; t++) bad += c.done[t] != (t < n);
        if (test_below(r, 20) == 0) { // long enough that workers go to sleep
            struct timespec nap = {0, 2000000};
            nanosleep(&nap, NULL);
        }
    }
    CHECK_EQ(bad, 0);
    llama_pool_free(pool);
}

static void test_matmul(test_rng *r) {
    llama_pool *pool = llama_pool_create(THREADS);
    enum { IN = 64, OUT = 300, N = 37 };
    float *w = (float *)malloc(4 * IN * OUT), *x = (float *)malloc(4 * IN * N);
    float *y = (float *)malloc(8 * OUT * N);
    llama_weight m;
    memset(&m, 0, sizeof m);
    test_fill_normal(r, w, IN * OUT, 1);
    test_fill_normal(r, x, IN * N, 1);
    m.data = (const uint8_t *)w;
    m.type = LLAMA_F32;
    m.n_in = IN;
    m.n_out = OUT;
    m.row_bytes = 4 * IN;
    llama_matmul(NULL, &m, x, N, y);
    llama_matmul(pool, &m, x, N, y + OUT * N);
    CHECK(memcmp(y, y + OUT * N, 4 * OUT * N) == 0);
    llama_pool_free(pool);
    free(w);
    free(x);
    free(y);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), rounds = test_arg(argc, argv, 2, 30), i;
    test_rng r;
    r.state = seed;
    test_first_use(); // before anything else asks what the CPU can do
    for (i = 0; i < rounds; i++) test_round(seed + i);
    test_pool(&r, 20 * (int)rounds);
    test_matmul(&r);
    return TEST_END();
}

/* test_tails.c - attention depends on what was stored and on nothing else: page tails, free pages,
   gaps between rows, scratch, partials and plan memory may hold anything.
   ./test_tails [SEED [ROUNDS]]

   Built normally, everything that was never stored is filled with one pattern, then with another,
   and the output's bits must not change. Under MemorySanitizer it is left uninitialised, and the
   output must be initialised all the same. */
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#include <sanitizer/msan_interface.h>
#define TEST_MSAN 1
#endif
#endif

#define ATTN_IMPLEMENTATION
#include "problem.h"

static const unsigned char patterns[3] = {0xff, 0x00, 0x5a}; // NaN, zero, plausible numbers

// Memory nobody has written to.
static void *fresh(size_t bytes, int pattern) {
    void *p = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!p) exit(2);
#ifdef TEST_MSAN
    (void)pattern;
    __msan_allocated_memory(p, bytes);
#else
    memset(p, patterns[pattern], bytes);
#endif
    return p;
}

static void check_written(const void *p, size_t bytes, int executor) {
#ifdef TEST_MSAN
    long at = (long)__msan_test_shadow(p, bytes);
    if (!CHECK_EQ(at, -1)) printf("    executor %d, byte %ld is not initialised\n", executor, at);
#else
    (void)p;
    (void)bytes;
    (void)executor;
#endif
}

// Stores the problem's rows into new pages and runs it in new memory; returns O's bytes.
static void *run(problem *p, int pattern, int32_t workers, size_t *bytes, int executor) {
    attn_desc d = p->d;
    attn_tensor k, v;
    attn_plan_params params;
    attn_plan *plan = NULL;
    size_t kb = attn_kv_page_bytes(&d, 0) * (size_t)d.kv.n_pages, plan_bytes;
    size_t vb = attn_kv_page_bytes(&d, 1) * (size_t)d.kv.n_pages, lse;
    void *mem, *partials, *scratch;
    int32_t i;
    memset(&k, 0, sizeof k);
    memset(&v, 0, sizeof v);
    k.data = p->k_rows;
    v.data = p->v_rows;
    k.dtype = v.dtype = ATTN_F32;
    d.kv.k.data = fresh(kb, pattern);
#ifdef TEST_MSAN // scores are made 16 tokens at a time and masked afterwards
    memset(d.kv.k.data, patterns[pattern], kb);
#endif
    d.kv.v.data = fresh(vb, pattern);
    *bytes = (size_t)p->n_tokens * (size_t)d.n_heads * (size_t)d.v_head_dim *
             (size_t)attn_dtype_bits(d.o.dtype) / 8;
    lse = (size_t)p->n_tokens * (size_t)d.n_heads * 4;
    d.o.data = fresh(*bytes + lse, pattern);
    d.lse = (float *)fresh(lse, pattern);
    CHECK_EQ(attn_cpu_store(&d, &k, &v, p->slots, 0, p->n_rows), ATTN_OK);
    attn_cpu_plan_params(&d, workers, &params);
    params.row_tile = 32;
    plan_bytes = attn_plan_bytes(&d, &params);
    mem = fresh(plan_bytes, pattern);
    CHECK_EQ(attn_plan_build(&d, &params, mem, plan_bytes, &plan), ATTN_OK);
    partials = fresh(attn_plan_partial_bytes(plan), pattern);
    scratch = fresh(attn_cpu_scratch_bytes(&d, plan), pattern);
#ifdef TEST_MSAN // weights are made two tiles at a time; of one that no row sees, all are dropped
    memset(scratch, patterns[pattern], attn_cpu_scratch_bytes(&d, plan));
#endif
    for (i = 0; i < plan->n_tasks; i++)
        CHECK_EQ(attn_cpu_run(&d, plan, i, 1, partials, scratch), ATTN_OK);
    CHECK_EQ(attn_cpu_merge(&d, plan, 0, plan->n_merges, partials), ATTN_OK);
    check_written(d.o.data, *bytes, executor);
    check_written(d.lse, lse, executor);
    memcpy((char *)d.o.data + *bytes, d.lse, lse);
    *bytes += lse;
    free(scratch);
    free(partials);
    free(mem);
    free(d.lse);
    free(d.kv.k.data);
    free(d.kv.v.data);
    return d.o.data;
}

static void test_round(uint64_t seed) {
    static const int32_t dims[] = {8, 16, 24, 40, 64}, pages[] = {16, 48, 32, 64};
    problem_opts o;
    problem p;
    test_rng r;
    int isa, i;
    size_t n, m;
    r.state = seed;
    memset(&o, 0, sizeof o);
    o.phase = test_below(&r, N_PHASES);
    o.mask = test_below(&r, N_MASKS);
    o.layout = (attn_layout)test_below(&r, 3);
    o.contiguous = test_below(&r, 5) == 0;
    o.page_tokens = pages[test_below(&r, 4)];
    o.n_seq = 1 + test_below(&r, 4);
    o.max_kv = 1 + test_below(&r, 400);
    o.n_kv_heads = 1 + test_below(&r, 2);
    o.n_heads = o.n_kv_heads * (1 + test_below(&r, 3));
    o.head_dim = dims[test_below(&r, 5)];
    o.v_head_dim = dims[test_below(&r, 5)];
    o.k = (attn_dtype)(1 + test_below(&r, 7));
    o.v = (attn_dtype)(1 + test_below(&r, 7));
    o.q = (attn_dtype)(1 + test_below(&r, 3));
    o.o = (attn_dtype)(1 + test_below(&r, 3));
    if (test_below(&r, 4) == 0) o.k = o.v = o.q = o.o = ATTN_BF16;
    o.shared = test_below(&r, 3) == 0 ? 288 : 0;
    o.sink = test_below(&r, 4) == 0;
    o.evicted = test_below(&r, 4) == 0;
    o.lse = 1;
    o.numerics = (attn_numerics)test_below(&r, 3);
    o.sharp = 3;
    problem_make(&p, &o, &r);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        int32_t workers = 1 + test_below(&r, 3);
        void *first;
        if (attn_cpu_set_isa((attn_cpu_isa)isa) != ATTN_OK) continue;
#ifdef TEST_MSAN // cannot follow the dot products, which also take rows that nobody uses
        if (strstr(attn_cpu_executor(&p.d), "dot")) continue;
#endif
        first = run(&p, 0, workers, &n, isa);
        for (i = 1; i < 3; i++) {
            void *again = run(&p, i, workers, &m, isa);
            if (!CHECK(n == m && memcmp(first, again, n) == 0))
                printf("    seed %llu, executor %d, pattern %d\n", (unsigned long long)seed, isa,
                       i);
            free(again);
        }
        free(first);
    }
    problem_free(&p);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), rounds = test_arg(argc, argv, 2, 40), i;
    for (i = 0; i < rounds; i++) test_round(seed + i);
    return TEST_END();
}

/* Random differential tests of attn_cpu.h against the fp64 reference.
   test_cpu [SEED [COUNT]]
   cc -std=c11 -I. -Itests tests/test_cpu.c -o test_cpu -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"

static void run(problem *p, int32_t workers) {
    size_t bytes = attn_cpu_forward_bytes(&p->d, workers);
    void *mem = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    CHECK(bytes > 0);
    memset(mem, 0xff, bytes);
    CHECK_EQ(attn_cpu_forward(&p->d, mem, bytes, workers), ATTN_OK);
    free(mem);
}

static void one(uint64_t seed) {
    test_rng r;
    problem p;
    problem_opts o;
    int isa, ok;
    double ratio = 0;
    size_t n;
    float *out, *plain;
    r.state = seed;
    problem_random(&r, &o);
    problem_make(&p, &o, &r);
    CHECK_EQ(attn_validate(&p.d), ATTN_OK);
    CHECK_EQ(attn_ref_forward(&p.d, p.ref, p.ref_lse), ATTN_OK);
    n = (size_t)p.n_tokens * (size_t)o.n_heads * (size_t)o.v_head_dim;
    out = (float *)malloc(4 * n + 4);
    plain = (float *)malloc(4 * n + 4);
    problem_plain(&p, plain);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        const char *name;
        int dot;
        size_t i;
        if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
        attn_cpu_set_isa((attn_cpu_isa)isa);
        name = attn_cpu_executor(&p.d);
        dot = strstr(name, "bdot") != NULL;
        memset(p.d.o.data, 0xff, n * 2);
        run(&p, 1 + test_below(&r, 4));
        problem_output(&p, out);
        ok = problem_accurate(&p, out, plain, dot ? 2 : 1.5, dot ? 4 : 3, &ratio);
        if (!CHECK(ok))
            printf("  seed %llu %s: %s %s layout %d page %d%s k %s v %s q %s o %s heads %d/%d d "
                   "%d/%d seq %d shared %d "
                   "num %d cap %d alibi %d sink %d bias %d evict %d hs %d ratio %.3g\n",
                   (unsigned long long)seed, name, problem_phases[o.phase], problem_masks[o.mask],
                   o.layout, o.page_tokens, o.contiguous ? "c" : "", attn_dtype_name(o.k),
                   attn_dtype_name(o.v), attn_dtype_name(o.q), attn_dtype_name(o.o), o.n_heads,
                   o.n_kv_heads, o.head_dim, o.v_head_dim, o.n_seq, o.shared, o.numerics, o.softcap,
                   o.alibi, o.sink, o.bias, o.evicted, o.head_scale, ratio);
        for (i = 0; p.d.lse && i < n / (size_t)o.v_head_dim; i++) {
            double e = fabs((double)p.d.lse[i] - p.ref_lse[i]);
            if (p.ref_lse[i] < -1e300) {
                if (!CHECK((double)p.d.lse[i] < -1e30)) break;
            } else if (!CHECK(e < 2e-5 * (1 + fabs(p.ref_lse[i])) + (dot ? 0.01 : 0))) {
                printf("  seed %llu lse %g against %g\n", (unsigned long long)seed,
                       (double)p.d.lse[i], p.ref_lse[i]);
                break;
            }
        }
    }
    free(out);
    free(plain);
    problem_free(&p);
}

// A token whose V is NaN: every row that sees it is NaN, the others are as the reference's. Wide
// heads and spans behind it, since a row that is worked out again uses memory of its own.
static void nan_values(attn_dtype type, int32_t dim, int mask) {
    static const uint16_t nan = 0x7fff; // in bf16 and f16
    problem p;
    problem_opts o;
    test_rng r = {11};
    int isa;
    size_t n, i;
    float *out;
    int64_t at;
    memset(&o, 0, sizeof o);
    o.mask = mask;
    o.phase = PREFILL, o.layout = ATTN_HEAD_MAJOR, o.page_tokens = 16;
    o.n_seq = 1, o.n_heads = 4, o.n_kv_heads = 2, o.head_dim = dim, o.v_head_dim = dim;
    o.k = o.v = o.q = o.o = type;
    o.max_kv = 420;
    for (;; problem_free(&p)) {
        problem_make(&p, &o, &r);
        if (p.d.kv.kv_len[0] <= 300) continue;
        at = (int64_t)attni_page_of(&p.d, 0, 70) * (int64_t)attn_kv_page_bytes(&p.d, 1);
        memcpy((uint8_t *)(uintptr_t)p.d.kv.v.data + at + 2 * (70 % 16) * dim, &nan, 2); // head 0
        CHECK_EQ(attn_ref_forward(&p.d, p.ref, p.ref_lse), ATTN_OK);
        n = (size_t)p.n_tokens * 4 * (size_t)dim;
        for (i = 0; i < n && p.ref[i] == p.ref[i]; i++) {}
        if (i < n) break; // some row sees it
    }
    out = (float *)malloc(4 * n);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        int n_nan = 0;
        if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
        attn_cpu_set_isa((attn_cpu_isa)isa);
        run(&p, 1);
        problem_output(&p, out);
        for (i = 0; i < n; i++) {
            int is = out[i] != out[i], want = p.ref[i] != p.ref[i];
            n_nan += is;
            if (is != want || (!is && !(fabs((double)out[i] - p.ref[i]) < 0.05))) break;
        }
        if (!CHECK(i == n && n_nan > 0))
            printf("  NaN in V, %s: o[%d] %g, not %g\n", attn_cpu_executor(&p.d), (int)i,
                   (double)out[i], p.ref[i]);
    }
    free(out);
    problem_free(&p);
}

// A list per query head: of four, two are the same and a third differs in one block only.
static void alike_lists(attn_dtype type) {
    enum { ROWS = 40, MOST = 5 };
    static int64_t start[4 * (ROWS + 1)];
    static int32_t ids[4 * ROWS * MOST];
    attn_block_list *b;
    problem p;
    problem_opts o;
    test_rng r = {12};
    int32_t h, i, j, n = 0;
    int isa;
    double ratio = 0;
    float *out, *plain;
    memset(&o, 0, sizeof o);
    o.mask = M_CAUSAL;
    o.phase = PREFILL, o.layout = ATTN_HEAD_MAJOR, o.page_tokens = 16;
    o.n_seq = 1, o.n_heads = 4, o.n_kv_heads = 1, o.head_dim = 64, o.v_head_dim = 64;
    o.k = o.v = o.q = o.o = type;
    o.max_kv = 420;
    do problem_make(&p, &o, &r);
    while (p.d.kv.kv_len[0] <= 300 && (problem_free(&p), 1));
    for (h = 0; h < 4; h++)
        for (i = 0; i <= ROWS; i++) {
            start[h * (ROWS + 1) + i] = n;
            for (j = 0; i < ROWS && j < attni_min32(i, MOST - 1); j++) ids[n++] = j;
            if (i < ROWS) ids[n++] = h == 2 && i > MOST ? i - 1 : h == 3 && i > 9 ? i - 2 : i;
        }
    b = &p.d.mask.blocks;
    b->row_block = b->kv_block = 16;
    b->n_lists = 4;
    b->n_rows = ROWS;
    b->row_start = start;
    b->block = ids;
    CHECK_EQ(attn_ref_forward(&p.d, p.ref, p.ref_lse), ATTN_OK);
    out = (float *)malloc(4 * 256 * (size_t)p.n_tokens);
    plain = (float *)malloc(4 * 256 * (size_t)p.n_tokens);
    problem_plain(&p, plain);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
        attn_cpu_set_isa((attn_cpu_isa)isa);
        run(&p, 1);
        problem_output(&p, out);
        if (!CHECK(problem_accurate(&p, out, plain, 2, 4, &ratio)))
            printf("  lists that are alike, %s: %g\n", attn_cpu_executor(&p.d), ratio);
    }
    free(out);
    free(plain);
    problem_free(&p);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 300), i;
    attn_cpu_open(); // AMX, where there is one
    nan_values(ATTN_BF16, 576, M_CAUSAL);
    nan_values(ATTN_F16, 128, M_CAUSAL);
    nan_values(ATTN_F16, 128, M_BLOCKS);
    nan_values(ATTN_BF16, 64, M_BLOCKS_HEADS);
    alike_lists(ATTN_F32);
    alike_lists(ATTN_BF16);
    for (i = 0; i < count; i++) one(seed + i);
    return TEST_END();
}

/* The full product on the CPU: mask x layout x phase x KV dtype, every cell against the fp64
   reference, on the best ISA of the machine and, in turn, on the others. No cell may be unsupported
   and none may fall back to another executor silently. test_product [SEED [COUNT]]   COUNT: passes
   over the product, each with other sizes (default 1) cc -std=c11 -O2 -I. -Itests
   tests/test_product.c -o test_product -lm */
#define _POSIX_C_SOURCE 199309L
#define ATTN_IMPLEMENTATION
#include "problem.h"
#include <time.h>

enum { N_LAYOUTS = 4, N_TYPES = 12 }; // layouts: token-major, head-major, K16, contiguous
static const char *const layout_names[N_LAYOUTS] = {"token-major", "head-major", "k16",
                                                    "contiguous"};
static const attn_dtype types[N_TYPES][2] = {
    {ATTN_F32, ATTN_F32},       {ATTN_F16, ATTN_F16},       {ATTN_BF16, ATTN_BF16},
    {ATTN_F8E4M3, ATTN_F8E4M3}, {ATTN_F8E5M2, ATTN_F8E5M2}, {ATTN_I8, ATTN_I8},
    {ATTN_I4, ATTN_I4},         {ATTN_I8, ATTN_F16},        {ATTN_BF16, ATTN_I4},
    {ATTN_F8E4M3, ATTN_BF16},   {ATTN_F32, ATTN_F8E5M2},    {ATTN_I4, ATTN_F32}};

static int cells[N_MASKS][N_PHASES], bad_cells[N_MASKS][N_PHASES];
static char executors[N_TYPES][256]; // names seen on the best ISA, comma-separated

static void note_executor(int type, const char *name) {
    char *at = executors[type];
    if (strstr(at, name)) return;
    if (strlen(at) + strlen(name) + 2 < sizeof executors[type]) {
        if (*at) strcat(at, " ");
        strcat(at, name);
    }
}

static void run(problem *p, int32_t workers) {
    size_t bytes = attn_cpu_forward_bytes(&p->d, workers);
    void *mem = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    CHECK(bytes > 0);
    memset(mem, 0xff, bytes);
    CHECK_EQ(attn_cpu_forward(&p->d, mem, bytes, workers), ATTN_OK);
    free(mem);
}

// ---- APPROX with int8 K

// How far an output element may be off, given that every score is: with weights w, w' and the true
// output o, o' - o = sum (w' - w)(v - o), and scores off by at most delta leave w' within
// [e^-2delta, e^2delta] w. delta = scale * |q|_max * |k|_1 / 254 as attn.h documents, the largest
// over the keys the row sees. Softcap only makes differences smaller; ALiBi and bias cancel.
static int approx_within_bound(const problem *p, const float *o) {
    const attn_desc *d = &p->d;
    attni_side ks, vs;
    int32_t s, t, h, j, e, vd = d->v_head_dim, group = d->n_heads / d->n_kv_heads;
    double k[ATTN_MAX_HEAD_DIM], v[ATTN_MAX_HEAD_DIM], q[ATTN_MAX_HEAD_DIM],
        spread[ATTN_MAX_HEAD_DIM];
    int ok = 1;
    attni_side_init(d, 0, &ks);
    attni_side_init(d, 1, &vs);
    for (s = 0; s < d->n_seq; s++)
        for (t = d->q_start[s]; t < d->q_start[s + 1]; t++)
            for (h = 0; h < d->n_heads && ok; h++) {
                int64_t row = (int64_t)t * d->n_heads + h;
                const double *ref = p->ref + row * vd;
                double q_max = 0, delta = 0;
                for (e = 0; e < d->head_dim; e++) {
                    q[e] = (double)attni_get(d->q.data, d->q.dtype, row * d->head_dim + e);
                    if (fabs(q[e]) > q_max) q_max = fabs(q[e]);
                }
                for (e = 0; e < vd; e++) spread[e] = 0;
                for (j = 0; j < d->kv.kv_len[s]; j++) {
                    double k1 = 0, x;
                    if (!attn_ref_visible(d, s, t, h, j)) continue;
                    attni_ref_row(d, &ks, s, h / group, j, k);
                    attni_ref_row(d, &vs, s, h / group, j, v);
                    for (e = 0; e < d->head_dim; e++) k1 += fabs(k[e]);
                    x = k1 * q_max / 254 * (double)attni_scale(d);
                    if (x > delta) delta = x;
                    x = attni_ref_score(d, q, k, s, t, h, j);
                    if (x < -1e300) continue; // masked by the bias
                    x = exp(x - p->ref_lse[row]); // its weight
                    for (e = 0; e < vd; e++) spread[e] += x * fabs(v[e] - ref[e]);
                }
                for (e = 0; e < vd && ok; e++) { // and rounding as for any other executor
                    double limit = (exp(2 * delta) - 1) * spread[e] + 1e-5 + 0.009 * fabs(ref[e]);
                    ok = fabs((double)o[row * vd + e] - ref[e]) <= limit;
                }
            }
    return ok;
}

// The reference for Q rounded the documented way: 8 bits per row, nearest. It replaces p's.
static void approx_reference(problem *p) {
    attn_desc d = p->d;
    int64_t n = (int64_t)p->n_tokens * d.n_heads, r;
    int32_t e, dim = d.head_dim;
    float *q = (float *)malloc((size_t)n * (size_t)dim * 4 + 4);
    for (r = 0; r < n; r++) {
        float top = 0;
        for (e = 0; e < dim; e++) {
            float x = q[r * dim + e] = attni_get(p->d.q.data, p->d.q.dtype, r * dim + e);
            if (fabsf(x) > top) top = fabsf(x);
        }
        top /= 127.0f;
        for (e = 0; e < dim; e++)
            q[r * dim + e] = top > 0 ? rintf(q[r * dim + e] / top) * top : 0;
    }
    d.q.data = q;
    d.q.dtype = ATTN_F32;
    CHECK_EQ(attn_ref_forward(&d, p->ref, p->ref_lse), ATTN_OK);
    free(q);
}

// ---- one cell

// Accuracy of one executor. loose > 1: wider limits, for problems so small that the two errors
// compared are a few roundings each.
static int check_isa(problem *p, attn_cpu_isa isa, int32_t workers, double loose, float **plain) {
    size_t n = (size_t)p->n_tokens * (size_t)p->d.n_heads * (size_t)p->d.v_head_dim;
    float *out = (float *)malloc(4 * n + 4);
    double ratio = 0;
    const char *name = attn_cpu_executor(&p->d), *isa_name = attn_cpu_isa_name(isa);
    int ok, bdot = strstr(name, "bdot") != NULL, idot = strstr(name, "idot") != NULL;
    // the executor is the one in force, not a quiet replacement
    ok = strncmp(name, isa_name, strlen(isa_name)) == 0 && name[strlen(isa_name)] == ':';
    if (!ok) printf("  executor %s where %s is in force\n", name, isa_name);
    memset(p->d.o.data, 0xff, n * (size_t)attn_dtype_bits(p->d.o.dtype) / 8);
    run(p, workers);
    problem_output(p, out);
    if (idot) { // the documented bound, then tightly against the reference of the rounded Q
        ok &= approx_within_bound(p, out);
        approx_reference(p);
    }
    if (!problem_accurate(p, out, NULL, 1.5, 3, NULL)) {
        if (!*plain) {
            *plain = (float *)malloc(4 * n + 4);
            problem_plain(p, *plain);
        }
        ok &= problem_accurate(p, out, *plain, loose * (bdot ? 2 : 1.5), loose * (bdot ? 4 : 3),
                               &ratio);
        if (!ok && loose > 1) printf("  %s: error over plain %.3g\n", name, ratio);
    }
    if (idot) CHECK_EQ(attn_ref_forward(&p->d, p->ref, p->ref_lse), ATTN_OK);
    free(out);
    return ok;
}

static void cell_opts(int index, test_rng *r, problem_opts *o) {
    static const int32_t dims[][2] = {{16, 16},   {32, 32},   {64, 64}, {16, 32},
                                      {8, 8},     {72, 72},   {32, 16}, {64, 64},
                                      {128, 128}, {192, 128}, {24, 40}, {576, 512}};
    static const int32_t pages[] = {1, 16, 16, 3, 64, 256, 7};
    static const attn_dtype qo[] = {ATTN_F32, ATTN_BF16, ATTN_F16, ATTN_BF16, ATTN_F32};
    int type = index % N_TYPES, layout = index / N_TYPES / N_PHASES % N_LAYOUTS, big, i;
    memset(o, 0, sizeof *o);
    o->mask = index / N_TYPES / N_PHASES / N_LAYOUTS;
    o->phase = index / N_TYPES % N_PHASES;
    o->layout = layout == 3 ? (attn_layout)test_below(r, 3) : (attn_layout)layout;
    o->contiguous = layout == 3;
    o->page_tokens = pages[test_below(r, 7)];
    if (o->layout == ATTN_K16) o->page_tokens = (o->page_tokens + 15) / 16 * 16;
    big = test_below(r, o->phase == PREFILL || o->phase == RAGGED ? 24 : 6) == 0;
    o->max_kv = big ? 300 : 40;
    o->n_seq = 1 + test_below(r, big ? 2 : 3);
    o->n_kv_heads = 1 + test_below(r, 2);
    o->n_heads = o->n_kv_heads * (1 + test_below(r, 3));
    i = test_below(r, big ? 3 : 12);
    o->head_dim = dims[i][0];
    o->v_head_dim = dims[i][1];
    o->k = types[type][0];
    o->v = types[type][1];
    o->alias = o->k == o->v && o->v_head_dim <= o->head_dim && o->layout != ATTN_K16 &&
               test_below(r, 5) == 0;
    o->q = qo[test_below(r, 5)];
    o->o = o->q == ATTN_BF16 ? ATTN_BF16 : qo[test_below(r, 5)];
    o->softcap = test_below(r, 6) == 0;
    o->alibi = test_below(r, 6) == 0;
    o->sink = test_below(r, 6) == 0;
    o->bias = test_below(r, 8) == 0;
    o->head_scale = test_below(r, 8) == 0;
    o->lse = 1;
    o->evicted = test_below(r, 6) == 0;
    o->shared = test_below(r, 4) == 0 ? (big ? 272 : 16) : 0;
    o->numerics = (attn_numerics)((index + index / N_TYPES) % 3);
    o->sharp = 3;
}

static int cell_once(const problem_opts *o, test_rng *r, const attn_cpu_isa isa[2], double loose) {
    problem p;
    float *plain = NULL;
    int i, ok;
    problem_make(&p, o, r);
    ok = attn_validate(&p.d) == ATTN_OK && attn_cpu_supports(&p.d) == ATTN_OK &&
         attn_ref_forward(&p.d, p.ref, p.ref_lse) == ATTN_OK;
    for (i = 0; i < (isa[0] == isa[1] ? 1 : 2) && ok; i++) {
        ok &= attn_cpu_set_isa(isa[i]) == ATTN_OK;
        ok = ok && check_isa(&p, isa[i], 1 + test_below(r, 3), loose, &plain);
    }
    free(plain);
    problem_free(&p);
    return ok;
}

static void cell(uint64_t seed, int index, attn_cpu_isa best, attn_cpu_isa other) {
    int type = index % N_TYPES, ok;
    attn_cpu_isa isa[2];
    problem_opts o;
    test_rng r, again;
    attn_desc d;
    isa[0] = best;
    isa[1] = other;
    r.state = seed + (uint64_t)index * 1000003u;
    cell_opts(index, &r, &o);
    memset(&d, 0, sizeof d);
    d.q.dtype = o.q, d.o.dtype = o.o, d.kv.k.dtype = o.k, d.kv.v.dtype = o.v,
    d.numerics = o.numerics;
    CHECK_EQ(attn_cpu_set_isa(best), ATTN_OK);
    note_executor(type, attn_cpu_executor(&d));
    again = r;
    ok = cell_once(&o, &r, isa, 1);
    if (!ok) {
        // A handful of rows over a handful of keys is too little to average: the same cell must
        // then hold within wider limits, and within the contract with many more rows.
        ok = cell_once(&o, &again, isa, 6);
        o.n_seq += 12;
        o.n_heads *= 2;
        ok = ok && (cell_once(&o, &again, isa, 1) || cell_once(&o, &again, isa, 1));
    }
    cells[o.mask][o.phase]++;
    if (CHECK(ok)) return;
    bad_cells[o.mask][o.phase]++;
    printf("  cell %d: %s, %s, %s, k %s v %s q %s o %s, d %d/%d%s, kv <= %d, pages of %d, numerics "
           "%d, "
           "isa %s %s\n",
           index, problem_masks[o.mask], layout_names[index / N_TYPES / N_PHASES % N_LAYOUTS],
           problem_phases[o.phase], attn_dtype_name(o.k), attn_dtype_name(o.v),
           attn_dtype_name(o.q), attn_dtype_name(o.o), o.head_dim, o.v_head_dim,
           o.alias ? " alias" : "", o.max_kv, o.page_tokens, (int)o.numerics,
           attn_cpu_isa_name(best), attn_cpu_isa_name(other));
}

// ---- the name must be true as well: SIMD executors are faster than the scalar one

static double decode_seconds(problem *p) {
    double least = 1e9;
    size_t bytes = attn_cpu_forward_bytes(&p->d, 1);
    void *mem = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    int i;
    for (i = 0; i < 5; i++) {
        struct timespec a, b;
        double s;
        clock_gettime(CLOCK_MONOTONIC, &a);
        CHECK_EQ(attn_cpu_forward(&p->d, mem, bytes, 1), ATTN_OK);
        clock_gettime(CLOCK_MONOTONIC, &b);
        s = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
        if (s < least) least = s;
    }
    free(mem);
    return least;
}

static void no_quiet_scalar(uint64_t seed, attn_cpu_isa best) {
    int type, n;
    if (best == ATTN_CPU_SCALAR) return;
    for (type = 0; type < N_TYPES; type++)
        for (n = 0; n < 2; n++) { // FAST, PORTABLE
            problem_opts o;
            problem p;
            test_rng r;
            double fast, slow;
            r.state = seed + (uint64_t)type;
            memset(&o, 0, sizeof o);
            o.phase = DECODE;
            o.n_seq = 1;
            o.max_kv = 4096;
            o.shared = 4000; // at least that long
            o.page_tokens = 64;
            o.n_heads = 4;
            o.n_kv_heads = 1;
            o.head_dim = o.v_head_dim = 128;
            o.k = types[type][0];
            o.v = types[type][1];
            o.q = o.o = o.k == ATTN_BF16 ? ATTN_BF16 : ATTN_F32;
            o.numerics = n ? ATTN_NUMERICS_PORTABLE : ATTN_NUMERICS_FAST;
            o.sharp = 1;
            problem_make(&p, &o, &r);
            CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_SCALAR), ATTN_OK);
            slow = decode_seconds(&p);
            CHECK_EQ(attn_cpu_set_isa(best), ATTN_OK);
            fast = decode_seconds(&p);
            if (!CHECK(fast * 1.3 < slow))
                printf("  k %s v %s numerics %d: scalar %.3g ms, %s %.3g ms\n",
                       attn_dtype_name(o.k), attn_dtype_name(o.v), (int)o.numerics, slow * 1e3,
                       attn_cpu_executor(&p.d), fast * 1e3);
            problem_free(&p);
        }
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 1), c;
    attn_cpu_isa best, present[ATTN_CPU_ISA_COUNT];
    int n_present = 0, i, m, f, n_cells = N_MASKS * N_LAYOUTS * N_PHASES * N_TYPES;
    CHECK_EQ(attn_cpu_open(), ATTN_OK);
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
    best = attn_cpu_get_isa();
    for (i = ATTN_CPU_SCALAR; i < ATTN_CPU_ISA_COUNT; i++)
        if (attn_cpu_has((attn_cpu_isa)i)) present[n_present++] = (attn_cpu_isa)i;
    CHECK(n_present > 0 && (n_present == 1 || best != ATTN_CPU_SCALAR));
    for (c = 0; c < count; c++)
        for (i = 0; i < n_cells; i++) // i / 7 turns through the ISAs out of step with the types
            cell(seed + c * 0x9e3779b97f4a7c15u, i, best, present[(i + i / 7) % n_present]);
    no_quiet_scalar(seed, best);
    printf("cells run (x layouts x KV dtypes), failed ones behind a /\n%-14s", "mask");
    for (f = 0; f < N_PHASES; f++) printf("%10s", problem_phases[f]);
    printf("\n");
    for (m = 0; m < N_MASKS; m++) {
        printf("%-14s", problem_masks[m]);
        for (f = 0; f < N_PHASES; f++) printf("%7d/%-2d", cells[m][f], bad_cells[m][f]);
        printf("\n");
    }
    printf("executors of the best ISA, %s (scores,sums), by K/V dtype:\n", attn_cpu_isa_name(best));
    for (i = 0; i < N_TYPES; i++)
        printf("  %6s/%-6s  %s\n", attn_dtype_name(types[i][0]), attn_dtype_name(types[i][1]),
               executors[i]);
    return TEST_END();
}

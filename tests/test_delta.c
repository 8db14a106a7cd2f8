/* Delta correction against its definition in doubles: sparse rows of the reference, plus what dense
   rows of the reference say. test_delta [SEED [COUNT]]
   cc -std=c11 -O2 -I. -Itests tests/test_delta.c -o test_delta -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"
#include "attn_cpu.h"

static void forward(const attn_desc *d) {
    size_t bytes = attn_cpu_forward_bytes(d, 1);
    void *mem = malloc(bytes);
    CHECK(bytes > 0);
    CHECK_EQ(attn_cpu_forward(d, mem, bytes, 1), ATTN_OK);
    free(mem);
}

static void one(uint64_t seed) {
    static const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    test_rng r;
    problem_opts o;
    problem p;
    attn_desc dense, rows;
    attn_tensor delta;
    int32_t s, step, n, q_len, *tables, i, j, h, e, interpolate, last;
    double *want, *full, top = 0;
    const float *got;
    size_t size, vd, row, k;
    r.state = seed;
    memset(&o, 0, sizeof o);
    o.mask = test_below(&r, N_MASKS);
    o.phase = test_below(&r, N_PHASES);
    o.contiguous = test_below(&r, 3) == 0;
    o.page_tokens = 1 + test_below(&r, 20);
    o.n_seq = 1 + test_below(&r, 4);
    o.max_kv = 1 + test_below(&r, 300);
    o.n_kv_heads = 1 + test_below(&r, 2);
    o.n_heads = o.n_kv_heads * (1 + test_below(&r, 3));
    o.head_dim = 8 + 8 * test_below(&r, 3);
    o.v_head_dim = 8 + 8 * test_below(&r, 3);
    o.k = o.v = o.q = types[test_below(&r, 3)];
    o.o = ATTN_F32;
    o.softcap = test_below(&r, 3) == 0;
    o.alibi = test_below(&r, 3) == 0;
    o.sink = test_below(&r, 3) == 0;
    o.evicted = test_below(&r, 2);
    o.sharp = 3;
    problem_make(&p, &o, &r);
    vd = (size_t)o.v_head_dim;
    row = (size_t)o.n_heads * vd;
    size = (size_t)p.n_tokens * row;
    want = (double *)calloc(size + 1, 8);
    full = (double *)calloc(size + 1, 8);
    CHECK_EQ(attn_ref_forward(&p.d, want, NULL), ATTN_OK);
    dense = p.d;
    dense.mask.blocks.row_start = NULL;
    dense.mask.stride.block = dense.mask.vslash.block = 0;
    dense.mask.keep_sink = dense.mask.keep_recent = 0;
    CHECK_EQ(attn_ref_forward(&dense, full, NULL), ATTN_OK);
    forward(&p.d);
    s = test_below(&r, p.d.n_seq);
    q_len = p.d.q_start[s + 1] - p.d.q_start[s];
    step = 1 + test_below(&r, test_below(&r, 2) ? 8 : 100);
    interpolate = test_below(&r, 2);
    n = q_len > 0 ? (q_len - 1) / step + 1 : 0;
    last = n - 1;
    tables = (int32_t *)malloc(4 * (size_t)(4 * n + 3));
    tables[4 * n + 2] = 77;
    memset(&delta, 0, sizeof delta);
    delta.dtype = ATTN_F32;
    delta.data = calloc((size_t)n * row + 1, 4);
    if (!q_len || p.d.mask.kind == ATTN_MASK_TREE) {
        CHECK_EQ(attn_delta_desc(&p.d, s, step, &delta, tables, &rows),
                 q_len ? ATTN_ERR_UNSUPPORTED : ATTN_ERR_ARGUMENT);
        goto done;
    }
    CHECK_EQ(attn_delta_desc(&p.d, s, 0, &delta, tables, &rows), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_delta_desc(&p.d, s, step, &delta, tables, &rows), ATTN_OK);
    CHECK_EQ(tables[4 * n + 2], 77);
    CHECK_EQ(rows.n_seq, n);
    forward(&rows);
    CHECK_EQ(attn_cpu_delta_take(&p.d, s, step, &delta, 0, n + 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_delta_take(&p.d, s, step, &delta, INT32_MAX, INT32_MAX), ATTN_ERR_ARGUMENT);
    for (i = n - 1; i >= 0; i--)
        CHECK_EQ(attn_cpu_delta_take(&p.d, s, step, &delta, i, 1), ATTN_OK);
    for (i = n - 1; i >= 0; i--)
        CHECK_EQ(attn_cpu_delta_add(&p.d, s, step, interpolate, &delta, i, 1), ATTN_OK);
    for (i = n - 1; i >= 0; i--) // rows of a later sample are not touched before they are read
        for (j = q_len - 1; j >= 0; j--) {
            double *to = want + (size_t)(p.d.q_start[s] + j) * row;
            const size_t a = (size_t)(p.d.q_start[s] + i * step) * row, b = a + (size_t)step * row;
            const double f = interpolate && i < last ? (double)(j % step) / step : 0;
            if (j / step != i || j % step == 0) continue;
            for (k = 0; k < row; k++) {
                to[k] += (1 - f) * (full[a + k] - want[a + k]);
                if (f > 0) to[k] += f * (full[b + k] - want[b + k]);
            }
        }
    // samples last, as the rows before a sample need its sparse row when they interpolate
    for (i = 0; i < n; i++)
        memcpy(want + (size_t)(p.d.q_start[s] + i * step) * row,
               full + (size_t)(p.d.q_start[s] + i * step) * row, 8 * row);
    got = (const float *)p.d.o.data;
    for (k = 0; k < size; k++)
        if (fabs(want[k]) > top) top = fabs(want[k]);
    for (i = 0; i < p.n_tokens; i++)
        for (h = 0; h < o.n_heads; h++)
            for (e = 0; e < o.v_head_dim; e++) {
                int64_t st = p.d.o.stride_token ? p.d.o.stride_token : (int64_t)row;
                int64_t sh = p.d.o.stride_head ? p.d.o.stride_head : (int64_t)vd;
                double x = (double)got[i * st + h * sh + e];
                double y = want[(size_t)i * row + (size_t)h * vd + (size_t)e];
                if (fabs(x - y) <= 2e-4 * (1 + top)) continue;
                CHECK(fabs(x - y) <= 2e-4 * (1 + top));
                printf("  seed %llu token %d: %g, not %g\n", (unsigned long long)seed, i, x, y);
                goto done;
            }
    CHECK(1);
done:
    free(tables), free(delta.data), free(want), free(full);
    problem_free(&p);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 400), i;
    for (i = 0; i < count; i++) one(seed + i);
    return TEST_END();
}

/* attn_cuda.cuh on a device against the fp64 reference and against attn_cpu.h's pages: random
   problems, the contracts on bits and NaN, errors, page copies, merges.
   test_cuda [SEED [COUNT [NAME]]]   COUNT: random problems of each of two kinds (default 150);
                                     NAME: one of the parts in main (default: all)
   nvcc -c tests/cuda/impl.cu (for the device at hand), this file with any C compiler; see
   `make test-cuda`. Bits and errors take a fixed number of rounds, COUNT / 10 at most. */
#define ATTN_CORE_IMPLEMENTATION
#define ATTN_CPU_IMPLEMENTATION
#include "device.h"
#include <time.h>

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- problems

// What the tensor-core kernels are for: 16-bit queries, K and V of one dtype, common head sizes,
// long sequences under few queries; kept small enough for an fp64 reference.
static void tensor_opts(test_rng *r, problem_opts *o) {
    static const int32_t dims[][2] = {{64, 64},   {64, 64},   {64, 64},   {128, 128}, {128, 128},
                                      {128, 128}, {128, 128}, {96, 96},   {192, 192}, {256, 256},
                                      {192, 128}, {576, 512}, {576, 512}, {80, 80},   {40, 40}};
    static const int32_t groups[] = {1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 16};
    static const int32_t pages[] = {1, 2, 3, 16, 16, 16, 32, 37, 64, 64, 128, 256, 1000, 1024};
    static const attn_dtype quant[] = {ATTN_F8E4M3, ATTN_F8E5M2, ATTN_I8, ATTN_I4};
    int32_t phase = test_below(r, 10), dim = test_below(r, 15), most;
    int64_t rows;
    memset(o, 0, sizeof *o);
    problem_terms(o, r);
    o->phase = phase < 4   ? DECODE
               : phase < 6 ? VERIFY
               : phase < 7 ? PREFILL
               : phase < 9 ? CHUNKED
                           : RAGGED;
    o->mask = test_below(r, 3) ? test_below(r, N_MASKS) : M_CAUSAL;
    o->layout = (attn_layout)test_below(r, 2);
    o->contiguous = test_below(r, 6) == 0;
    o->page_tokens = pages[test_below(r, 14)];
    o->q = test_below(r, 2) ? ATTN_BF16 : ATTN_F16;
    o->o = test_below(r, 6) ? o->q : test_below(r, 2) ? ATTN_BF16 : ATTN_F16;
    o->k = o->v = test_below(r, 2) ? o->q : quant[test_below(r, 4)];
    o->head_dim = dims[dim][0];
    o->v_head_dim = dims[dim][1];
    o->alias = dim == 11 || dim == 12 || (dim == 10 && test_below(r, 2));
    o->n_kv_heads = o->alias ? 1 : 1 + test_below(r, 4);
    o->n_heads = o->n_kv_heads * groups[test_below(r, 12)];
    o->n_seq = 1 + test_below(r, 12);
    o->max_kv = o->phase <= CHUNKED ? 1 + test_below(r, o->phase == PREFILL ? 400 : 900)
                                    : 1 + test_below(r, test_below(r, 2) ? 3000 : 700);
    if (o->phase == RAGGED) o->max_kv = 1 + o->max_kv / 8;
    if (o->shared && test_below(r, 3) == 0) o->shared *= 3;
    if (o->mask >= M_BLOCKS && o->mask <= M_DENSE) o->min_block = o->max_kv > 300 ? 32 : 0;
    if (o->mask == M_ALL || o->mask == M_TREE_ALL) o->min_block = 32;
    if (o->mask == M_DENSE && o->max_kv > 600) o->max_kv = 600;
    o->sharp = 3;
    for (;;) { // scores of the reference, weighted by their cost
        most = o->max_kv + o->shared;
        rows = o->phase == PREFILL   ? most / 2
               : o->phase == CHUNKED ? 50
               : o->phase == DECODE  ? 1
               : o->phase == VERIFY  ? 9
                                     : most / 6;
        if ((rows + 1) * o->n_seq * o->n_heads * most / 2 * (o->head_dim + 32) < 40000000) break;
        if (o->n_seq > 2)
            o->n_seq = o->n_seq * 2 / 3;
        else if (o->n_kv_heads > 1)
            o->n_heads /= o->n_kv_heads, o->n_kv_heads = 1;
        else if (o->shared > 200)
            o->shared /= 2;
        else
            o->max_kv = 1 + o->max_kv * 3 / 4;
    }
}

// What is large: more blocks than a tall tile looks at in one go, more query heads to a KV head
// than a tile has rows.
static void large_opts(test_rng *r, problem_opts *o) {
    static const int32_t groups[] = {17, 33, 65, 71, 96, 128};
    static const int32_t masks[] = {M_CAUSAL, M_CAUSAL, M_WINDOW, M_BLOCKS};
    tensor_opts(r, o);
    o->evicted = o->shared = o->bias = 0;
    if (test_below(r, 2)) {
        o->n_heads = o->n_kv_heads * groups[test_below(r, 6)];
        o->phase = test_below(r, 2) ? DECODE : VERIFY;
        o->mask = M_CAUSAL;
        o->n_seq = 1 + test_below(r, 2);
        o->max_kv = 1 + test_below(r, 200);
        return;
    }
    o->phase = CHUNKED;
    o->mask = masks[test_below(r, 4)];
    o->min_block = 64;
    o->softcap = o->alibi = o->alias = 0;
    o->n_heads = o->n_kv_heads = o->n_seq = 1;
    o->head_dim = o->v_head_dim = test_below(r, 2) ? 64 : 128;
    o->max_kv = 40000 + test_below(r, 40000);
}

static void describe(const problem_opts *o, uint64_t seed, const char *name) {
    if (test_failed > 40) return; // the first ones say enough
    printf(
        "  seed %llu %s: %s %s layout %d page %d%s k %s v %s q %s o %s heads %d/%d d %d/%d seq %d "
        "kv %d shared %d cap %d alibi %d sink %d bias %d evict %d hs %d alias %d lse %d\n",
        (unsigned long long)seed, name, problem_phases[o->phase], problem_masks[o->mask], o->layout,
        o->page_tokens, o->contiguous ? "c" : "", attn_dtype_name(o->k), attn_dtype_name(o->v),
        attn_dtype_name(o->q), attn_dtype_name(o->o), o->n_heads, o->n_kv_heads, o->head_dim,
        o->v_head_dim, o->n_seq, o->max_kv, o->shared, o->softcap, o->alibi, o->sink, o->bias,
        o->evicted, o->head_scale, o->alias, o->lse);
}

// Dense rows in another dtype.
static void *rows_as(const float *x, int64_t n, attn_dtype t) {
    uint8_t *m = (uint8_t *)malloc((size_t)n * element_bytes(t) + 8);
    int64_t i;
    for (i = 0; i < n; i++) attni_put(m, t, i, x[i]);
    return m;
}

// ---- differential

typedef struct sample { // one random problem with all that the host has to know about it
    problem p;
    uint64_t seed;
    int unsupported; // the generator asked for K16 or PORTABLE
    attn_dtype src;  // of the rows that are stored
    void *k, *v;
} sample;

// What problem.h always says alike: defaults left out, an order given, a scale of one's own.
static void sample_vary(problem *p, test_rng *r) {
    int32_t i, n = p->d.n_seq, *order;
    if (!p->opt.evicted && test_below(r, 2)) p->d.kv.kv_pos0 = NULL;
    if (test_below(r, 3) == 0) p->d.q_pos0 = NULL;
    if (test_below(r, 4) == 0)
        p->d.logits.scale = (float)(test_uniform(r, 0.5, 1) / sqrt(p->d.head_dim));
    if (test_below(r, 3)) return;
    p->d.seq_order = order = (int32_t *)problem_alloc(p, 4 * (size_t)n);
    for (i = 0; i < n; i++) order[i] = i;
    for (i = n - 1; i > 0; i--) {
        int32_t x = test_below(r, i + 1), y = order[x];
        order[x] = order[i], order[i] = y;
    }
}

// What selectors make: lists of blocks of any size, rows with gaps between them, beside what
// keep_sink and keep_recent keep; now and then dkernel's closed form over whole blocks.
static void lists_opts(test_rng *r, problem_opts *o) {
    tensor_opts(r, o);
    o->mask = test_below(r, 5) ? M_CAUSAL : test_below(r, 2) ? M_FULL : M_WINDOW;
    if (test_below(r, 3)) o->softcap = o->alibi = o->bias = 0;
    if (test_below(r, 6)) return;
    o->n_seq = o->n_kv_heads = 1; // so long that the keys of many queries are cut as well
    o->n_heads = 1 + test_below(r, 2);
    o->head_dim = o->v_head_dim = test_below(r, 2) ? 64 : 128;
    o->phase = CHUNKED;
    o->softcap = o->alibi = o->bias = o->alias = 0;
    o->max_kv = 5000 + test_below(r, 5000);
}

static void lists_rows(problem *p, test_rng *r, int64_t *start, int64_t *end, int32_t *ids,
                       int32_t n_blocks) {
    const attn_block_list *b = &p->d.mask.blocks;
    int64_t n = 0;
    int32_t l, i, j;
    for (l = 0; l < b->n_lists; l++)
        for (i = 0; i < b->n_rows; i++) {
            int64_t at = l * ((int64_t)b->n_rows + 1) + i;
            int32_t odds = test_below(r, 5), run = 0;
            start[at] = n;
            for (j = 0; j < n_blocks && odds < 4; j++) {
                if (run) run--;
                else if (test_below(r, odds ? 6 * odds : 2) == 0) run = test_below(r, 2 * odds + 1);
                else continue;
                ids[n++] = j;
            }
            end[at] = n;
            for (j = test_below(r, 3); j > 0; j--) ids[n++] = -99; // nobody's
        }
}

// A random list of all sequences of p.
static void lists_blocks(problem *p, test_rng *r, int32_t row_block, int32_t kv_block,
                         int32_t n_lists) {
    attn_block_list *b = &p->d.mask.blocks;
    int32_t n = problem_positions(p), s, per = n / row_block + 2, n_blocks = n / kv_block + 2;
    int32_t *seq_row = (int32_t *)problem_alloc(p, 4 * (size_t)p->d.n_seq), *ids;
    int64_t *start, *end;
    size_t offsets;
    memset(b, 0, sizeof *b);
    b->row_block = row_block;
    b->kv_block = kv_block;
    b->n_lists = n_lists;
    b->n_rows = per * p->d.n_seq;
    for (s = 0; s < p->d.n_seq; s++) seq_row[s] = s * per;
    b->seq_row = seq_row;
    offsets = (size_t)n_lists * ((size_t)b->n_rows + 1);
    start = (int64_t *)problem_alloc(p, 8 * offsets);
    end = (int64_t *)problem_alloc(p, 8 * offsets);
    ids = (int32_t *)problem_alloc(p, 4 * (size_t)n_lists * (size_t)b->n_rows *
                                          ((size_t)n_blocks + 3));
    lists_rows(p, r, start, end, ids, n_blocks);
    b->row_start = start;
    b->row_end = end;
    b->block = ids;
}

static void lists_mask(problem *p, test_rng *r) {
    static const int32_t rows[] = {1, 3, 16, 32, 64, 64, 100, 128};
    static const int32_t small[] = {1, 2, 2, 3, 8, 8, 16, 17, 32, 48, 63};
    attn_mask *m = &p->d.mask;
    int32_t row_block, kv_block, heads;
    int64_t n;
    if (test_below(r, 2)) m->keep_sink = 1 + test_below(r, test_below(r, 2) ? 20 : 300);
    if (test_below(r, 2)) m->keep_recent = 1 + test_below(r, test_below(r, 2) ? 20 : 300);
    if (test_below(r, 5) == 0) { // closed form
        problem_stride(p, r, 0);
        m->stride.block = 64 * (1 + test_below(r, 2));
        if (test_below(r, 2)) m->keep_sink = m->keep_recent = 0;
        return;
    }
    row_block = rows[test_below(r, 8)];
    kv_block = test_below(r, 3) ? small[test_below(r, 11)] : 64 * (1 + test_below(r, 3));
    heads = test_below(r, 3);
    heads = heads == 0 ? 1 : heads == 1 ? p->d.n_kv_heads : p->d.n_heads;
    n = problem_positions(p);
    while ((n / row_block + 2) * (n / kv_block + 5) * heads * p->d.n_seq > 4000000) { // memory
        if (row_block < 64) row_block *= 2;
        else if (heads > 1) heads = 1;
        else kv_block *= 2;
    }
    lists_blocks(p, r, row_block, kv_block, heads);
}

enum { ANY, TENSOR, LARGE, LISTS };

static void sample_make(sample *s, uint64_t seed, int which) {
    static const attn_dtype sources[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    problem_opts o;
    test_rng r;
    attn_tensor k, v;
    int64_t rows;
    r.state = s->seed = seed;
    if (which == TENSOR)
        tensor_opts(&r, &o);
    else if (which == LARGE)
        large_opts(&r, &o);
    else if (which == LISTS)
        lists_opts(&r, &o);
    else
        problem_random(&r, &o);
    s->unsupported =
        (o.layout == ATTN_K16 ? 1 : 0) | (o.numerics == ATTN_NUMERICS_PORTABLE ? 2 : 0);
    if (o.layout == ATTN_K16) o.layout = ATTN_HEAD_MAJOR;
    o.numerics = ATTN_NUMERICS_FAST;
    problem_make(&s->p, &o, &r);
    if (which == LISTS) lists_mask(&s->p, &r);
    sample_vary(&s->p, &r);
    CHECK_EQ(attn_validate(&s->p.d), ATTN_OK);
    s->src = sources[test_below(&r, 3)];
    rows = s->p.n_rows * o.n_kv_heads;
    s->k = rows_as(s->p.k_rows, rows * o.head_dim, s->src);
    s->v = rows_as(s->p.v_rows, rows * o.v_head_dim, s->src);
    memset(&k, 0, sizeof k);
    k.dtype = s->src;
    v = k;
    k.data = s->k, v.data = s->v;
    CHECK_EQ(attn_cpu_store(&s->p.d, &k, o.alias ? NULL : &v, s->p.slots, 0, s->p.n_rows), ATTN_OK);
    CHECK_EQ(attn_ref_forward(&s->p.d, s->p.ref, s->p.ref_lse), ATTN_OK);
}

static void sample_free(sample *s) {
    free(s->k), free(s->v);
    problem_free(&s->p);
}

// Rows from device memory into the twin's pages, in two calls.
static void sample_store(const sample *s, const twin *t, test_rng *r) {
    int mark = dev_n;
    attn_tensor k, v;
    uint8_t *base;
    size_t bytes;
    int64_t first, n = s->p.n_rows, cut = test_below(r, (int32_t)n + 1);
    const attn_desc *d = &t->d;
    int64_t *slots = (int64_t *)dev_alloc(8 * (size_t)n, s->p.slots);
    memset(&k, 0, sizeof k);
    k.dtype = s->src;
    v = k;
    twin_view(&k, n, d->n_kv_heads, d->head_dim, s->k, test_below(r, 3) ? NULL : r, &base, &bytes,
              &first);
    twin_view(&v, n, d->n_kv_heads, d->v_head_dim, s->v, test_below(r, 3) ? NULL : r, &base, &bytes,
              &first);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(attn_cuda_store(&cu, d, NULL, &k, s->p.opt.alias ? NULL : &v, slots, cut, n - cut,
                             dev_stream),
             ATTN_OK);
    CHECK_EQ(
        attn_cuda_store(&cu, d, NULL, &k, s->p.opt.alias ? NULL : &v, slots, 0, cut, dev_stream),
        ATTN_OK);
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    CHECK(dev_guards(0));
    dev_release(mark);
}

// What the backend has to refuse before it touches memory.
static void sample_refused(const twin *t, int which) {
    attn_cuda_plan g;
    attn_desc d = t->d;
    memset(&g, 0, sizeof g);
    if (which & 1 && (t->p->opt.alias || d.kv.page_tokens % 16)) which &= 2;
    if (which & 1) d.kv.layout = ATTN_K16, d.kv.k.page_bytes = d.kv.v.page_bytes = 0;
    if (which & 2) d.numerics = ATTN_NUMERICS_PORTABLE;
    if (!which) return;
    CHECK_EQ(attn_validate(&d), ATTN_OK);
    CHECK_EQ(attn_cuda_supports(&cu, &d), ATTN_ERR_UNSUPPORTED);
    CHECK_EQ(attn_cuda_run(&cu, &d, &g, NULL, 0, dev_stream), ATTN_ERR_UNSUPPORTED);
    dev_sync();
}

static void compare(const sample *s, const char *name, const uint8_t *bytes, const float *lse) {
    const problem *p = &s->p;
    int mma = strncmp(name, "mma", 3) == 0;
    size_t n = (size_t)p->n_tokens * (size_t)p->d.n_heads * (size_t)p->d.v_head_dim, i;
    float *out = (float *)malloc(4 * n + 4), *plain;
    double ratio = 0;
    int ok;
    for (i = 0; i < n; i++) out[i] = attni_get(bytes, p->d.o.dtype, (int64_t)i);
    ok = problem_accurate(p, out, NULL, mma ? 2 : 1.5, mma ? 4 : 3, &ratio);
    if (!ok) { // within the bound of the floor it is within that of plain, too
        plain = (float *)malloc(4 * n + 4);
        problem_plain(p, plain);
        ok = problem_accurate(p, out, plain, mma ? 2 : 1.5, mma ? 4 : 3, &ratio);
        free(plain);
    }
    if (!CHECK(ok)) {
        describe(&p->opt, s->seed, name);
        printf("  ratio %.3g\n", ratio);
        for (i = 0; i < n && fabs((double)out[i] - p->ref[i]) < 0.05 * (1 + fabs(p->ref[i])); i++) {
        }
        if (i < n)
            printf("  token %d head %d element %d: %g, not %g\n",
                   (int)(i / (size_t)(p->d.n_heads * p->d.v_head_dim)),
                   (int)(i / (size_t)p->d.v_head_dim % (size_t)p->d.n_heads),
                   (int)(i % (size_t)p->d.v_head_dim), (double)out[i], p->ref[i]);
    }
    for (i = 0; p->d.lse && i < n / (size_t)p->d.v_head_dim; i++) {
        double e = fabs((double)lse[i] - p->ref_lse[i]);
        int good = p->ref_lse[i] < -1e300 ? (double)lse[i] < -1e30
                                          : e < 2e-5 * (1 + fabs(p->ref_lse[i])) + (mma ? 0.01 : 0);
        if (CHECK(good)) continue;
        describe(&p->opt, s->seed, name);
        printf("  lse of token %d head %d: %g, not %g\n", (int)(i / (size_t)p->d.n_heads),
               (int)(i % (size_t)p->d.n_heads), (double)lse[i], p->ref_lse[i]);
        break;
    }
    free(out);
}

static void random_how(test_rng *r, how *h) {
    static const int32_t tiles[] = {16, 32, 64, 128};
    memset(h, 0, sizeof *h);
    h->share = test_below(r, 4) % 3;
    h->partials = test_below(r, 2);
    h->max = test_below(r, 3) == 0;
    h->device_tables = test_below(r, 4);
    if (test_below(r, 4) == 0) h->workers = 1 + test_below(r, 300);
    if (test_below(r, 5) == 0) h->tasks_per_worker = (float)(1 + test_below(r, 12));
    if (test_below(r, 6) == 0) h->row_tile = tiles[test_below(r, 4)];
}

static void sample_run(sample *s, int counts[3]) {
    const problem *p = &s->p;
    size_t n = (size_t)p->n_tokens * (size_t)p->d.n_heads;
    uint8_t *o = (uint8_t *)malloc(n * (size_t)p->d.v_head_dim * 4 + 4);
    float *lse = (float *)malloc(4 * n + 4);
    const char *name;
    test_rng r;
    twin t;
    how h;
    r.state = s->seed ^ 0x5eed;
    twin_make(&t, p, 0, &r);
    sample_refused(&t, s->unsupported);
    CHECK_EQ(attn_cuda_supports(&cu, &t.d), ATTN_OK);
    name = attn_cuda_executor(&cu, &t.d);
    counts[strncmp(name, "mma", 3) != 0 ? 0 : strstr(name, "dequant") ? 2 : 1]++;
    sample_store(s, &t, &r);
    if (!CHECK(twin_pages_equal(&t))) describe(&p->opt, s->seed, "store");
    random_how(&r, &h);
    if (twin_run(&t, &h, o, lse))
        compare(s, name, o, lse);
    else
        describe(&p->opt, s->seed, name);
    CHECK(twin_pages_equal(&t));
    dev_release(0);
    free(o), free(lse);
}

static void differential(uint64_t seed, uint64_t count, int which) {
    enum { BATCH = 32 };
    static sample s[BATCH];
    int counts[3] = {0, 0, 0};
    uint64_t at;
    double host = 0, device = 0, t0;
    for (at = 0; at < count; at += BATCH) {
        int n = (int)(count - at < BATCH ? count - at : BATCH), i;
        t0 = seconds();
#pragma omp parallel for schedule(dynamic, 1)
        for (i = 0; i < n; i++) sample_make(&s[i], seed + at + (uint64_t)i, which);
        host += seconds() - t0, t0 = seconds();
        for (i = 0; i < n; i++) sample_run(&s[i], counts), sample_free(&s[i]);
        device += seconds() - t0;
    }
    if (which == TENSOR && count >= 20) // the PTX variants have fewer kernels
        CHECK(counts[1] + counts[2] > (int)count / (cu.arch < 90 ? 10 : 5));
    printf("  %llu problems: %d simt, %d mma, %d mma with dequantisation; %.1f s of references, "
           "%.1f s of runs\n",
           (unsigned long long)count, counts[0], counts[1], counts[2], host, device);
}

static void part_differential(uint64_t seed, uint64_t count) {
    differential(seed, count, ANY);
}
static void part_tensor(uint64_t seed, uint64_t count) {
    differential(seed, count, TENSOR);
}
static void part_lists(uint64_t seed, uint64_t count) {
    differential(seed * 1000003 + 5000000, 2 * count, LISTS);
}
static void part_large(uint64_t seed, uint64_t count) {
    differential(seed, count / 4 + 1, LARGE);
}

// ---- the same sequences in another batch and other pages

typedef struct place {
    int32_t page_tokens;
    attn_layout layout;
    int contiguous, own; // own: shares no page
    int poison;          // byte that fills what is not stored
} place;

typedef struct origin { // where a problem's rows lie
    int32_t shared;     // tokens that sequence 0 holds for all
    int64_t *row;       // (n_seq) first of k_rows
} origin;

static void origin_make(origin *x, const problem *p) {
    int32_t s;
    int64_t at = 0;
    x->row = (int64_t *)malloc(8 * (size_t)p->d.n_seq);
    for (s = 0; s < p->d.n_seq; s++) x->row[s] = at, at += p->d.kv.kv_len[s];
    x->shared = p->opt.contiguous ? 0 : p->opt.shared / p->opt.page_tokens * p->opt.page_tokens;
}

static void derive_pages(problem *out, const problem *p, const int32_t *ids, const place *at,
                         test_rng *r) {
    attn_kv *kv = &out->d.kv;
    int32_t n = out->d.n_seq, i, j, pt = at->page_tokens, most = 1, need = 0, common, next = 0;
    int32_t *table, *deck;
    int64_t *slots = (int64_t *)problem_alloc(out, 8 * (size_t)p->n_rows);
    attn_tensor k, v;
    origin x;
    int is_v;
    origin_make(&x, p);
    for (i = 0; i < n; i++) most = attni_max32(most, kv->kv_len[i]);
    if (at->contiguous) pt = most;
    common = at->contiguous || at->own ? 0 : x.shared / pt;
    for (i = 0; i < n; i++) need += (kv->kv_len[i] + pt - 1) / pt;
    kv->page_tokens = out->opt.page_tokens = pt;
    kv->layout = out->opt.layout = at->layout;
    kv->n_pages = at->contiguous ? n : need + 1;
    kv->page_table_stride = (most + pt - 1) / pt + test_below(r, 3);
    table = (int32_t *)problem_alloc(out, 4 * (size_t)(n * kv->page_table_stride));
    deck = (int32_t *)problem_alloc(out, 4 * (size_t)kv->n_pages);
    for (j = 0; j < kv->n_pages; j++) deck[j] = j;
    for (j = kv->n_pages - 1; j > 0 && !at->contiguous; j--) {
        int32_t o = test_below(r, j + 1), e = deck[o];
        deck[o] = deck[j], deck[j] = e;
    }
    for (i = 0; i < n; i++)
        for (j = 0; j < (kv->kv_len[i] + pt - 1) / pt; j++)
            table[i * kv->page_table_stride + j] = i > 0 && j < common ? table[j] : deck[next++];
    kv->page_table = at->contiguous ? NULL : table;
    kv->k.page_bytes = kv->v.page_bytes = 0;
    if (p->opt.alias) {
        int head_major = at->layout != ATTN_TOKEN_MAJOR;
        kv->k.stride_token = (head_major ? 1 : out->d.n_kv_heads) * (int64_t)out->d.head_dim;
        kv->k.stride_head = (head_major ? pt : 1) * (int64_t)out->d.head_dim;
        kv->v = kv->k;
    }
    for (is_v = 0; is_v < 2; is_v++) {
        size_t bytes = attn_kv_page_bytes(&out->d, is_v) * (size_t)kv->n_pages;
        void *m = is_v && p->opt.alias ? kv->k.data : problem_alloc(out, bytes + 64);
        if (!is_v || !p->opt.alias) memset(m, at->poison, bytes);
        if (is_v)
            kv->v.data = m;
        else
            kv->k.data = m;
    }
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = p->k_rows, v.data = p->v_rows;
    for (i = 0; i < n; i++) { // its own rows, then those that sequence 0 holds for it
        int part;
        for (part = 0; part < 2; part++) {
            int32_t s = part ? 0 : ids[i], from = part ? 0 : x.shared;
            int32_t to = part ? x.shared : kv->kv_len[i];
            for (j = from; j < to; j++) {
                int32_t page = at->contiguous ? i : table[i * kv->page_table_stride + j / pt];
                slots[x.row[s] + j] = (int64_t)page * pt + j % pt;
            }
            CHECK_EQ(attn_cpu_store(&out->d, &k, p->opt.alias ? NULL : &v, slots, x.row[s] + from,
                                    attni_max32(to - from, 0)),
                     ATTN_OK);
        }
    }
    free(x.row);
}

// The sequences ids[0 .. n) of p, some maybe twice, as a problem of their own.
static void derive(problem *out, const problem *p, const int32_t *ids, int32_t n, const place *at,
                   test_rng *r) {
    attn_desc *d = &out->d;
    size_t q_row = (size_t)(p->d.n_heads * p->d.head_dim) * element_bytes(p->d.q.dtype);
    int32_t i, j, t = 0, heads = p->d.n_heads, *q_start, *kv_len, *q_pos0, *kv_pos0, *seq_row, *up;
    const attn_tensor *b = &p->d.logits.bias;
    memset(out, 0, sizeof *out);
    out->opt = p->opt;
    out->opt.n_seq = n;
    out->opt.contiguous = at->contiguous;
    *d = p->d;
    d->n_seq = n;
    for (i = 0; i < n; i++) t += p->d.q_start[ids[i] + 1] - p->d.q_start[ids[i]];
    out->n_tokens = t;
    q_start = (int32_t *)problem_alloc(out, 4 * (size_t)(n + 1));
    kv_len = (int32_t *)problem_alloc(out, 4 * (size_t)n);
    q_pos0 = (int32_t *)problem_alloc(out, 4 * (size_t)n);
    kv_pos0 = (int32_t *)problem_alloc(out, 4 * (size_t)n);
    seq_row = (int32_t *)problem_alloc(out, 4 * (size_t)n);
    up = (int32_t *)problem_alloc(out, 4 * (size_t)t + 4);
    d->q.data = problem_alloc(out, (size_t)t * q_row + 4);
    d->o.data = problem_alloc(out, 4 * (size_t)t * (size_t)(heads * d->v_head_dim) + 4);
    if (d->lse) d->lse = (float *)problem_alloc(out, 4 * (size_t)(t * heads) + 4);
    if (b->data) {
        d->logits.bias.stride_head = b->stride_head ? b->stride_token * t : 0;
        d->logits.bias.data =
            problem_alloc(out, (size_t)(b->stride_token * t * (b->stride_head ? heads : 1)) *
                                       element_bytes(b->dtype) +
                                   4);
    }
    for (t = 0, i = 0; i < n; i++) {
        int32_t s = ids[i], first = p->d.q_start[s], q = p->d.q_start[s + 1] - first;
        q_start[i] = t;
        kv_len[i] = p->d.kv.kv_len[s];
        q_pos0[i] = p->d.q_pos0[s];
        kv_pos0[i] = p->d.kv.kv_pos0[s];
        if (p->d.mask.blocks.seq_row) seq_row[i] = p->d.mask.blocks.seq_row[s];
        memcpy((uint8_t *)d->q.data + (size_t)t * q_row,
               (const uint8_t *)p->d.q.data + (size_t)first * q_row, (size_t)q * q_row);
        for (j = 0; j < q && p->d.mask.tree_parent; j++)
            up[t + j] = p->d.mask.tree_parent[first + j];
        for (j = 0; b->data && j < (b->stride_head ? heads : 1); j++) {
            size_t e = element_bytes(b->dtype), row = (size_t)b->stride_token * e;
            memcpy((uint8_t *)d->logits.bias.data + (size_t)(j * d->logits.bias.stride_head) * e +
                       (size_t)t * row,
                   (const uint8_t *)b->data + (size_t)(j * b->stride_head) * e +
                       (size_t)first * row,
                   (size_t)q * row);
        }
        t += q;
    }
    q_start[n] = t;
    d->q_start = q_start;
    d->kv.kv_len = kv_len;
    d->q_pos0 = q_pos0;
    d->kv.kv_pos0 = kv_pos0;
    if (p->d.mask.blocks.seq_row) d->mask.blocks.seq_row = seq_row;
    if (p->d.mask.tree_parent) d->mask.tree_parent = up;
    derive_pages(out, p, ids, at, r);
}

// ---- bits

typedef struct result { // of one run, on the host
    uint8_t *o;
    float *lse;
    size_t row; // bytes of O per token
} result;

static void result_make(result *x, const problem *p) {
    size_t n = (size_t)(p->n_tokens * p->d.n_heads);
    x->row = (size_t)(p->d.n_heads * p->d.v_head_dim) * element_bytes(p->d.o.dtype);
    x->o = (uint8_t *)calloc((size_t)p->n_tokens + 1, x->row);
    x->lse = (float *)calloc(n + 1, 4);
}

static void result_free(result *x) {
    free(x->o), free(x->lse);
}

// Runs p in fresh buffers.
static int result_of(result *x, const problem *p, const how *h, test_rng *gaps) {
    twin t;
    int mark = dev_n, ok;
    result_make(x, p);
    twin_make(&t, p, 1, gaps);
    ok = twin_run(&t, h, x->o, x->lse);
    dev_release(mark);
    return ok;
}

// 1 when the n tokens at a of x and at b of y are the same bits.
static int same_rows(const problem *p, const result *x, int32_t a, const result *y, int32_t b,
                     int32_t n) {
    size_t h = (size_t)p->d.n_heads;
    return memcmp(x->o + (size_t)a * x->row, y->o + (size_t)b * y->row, (size_t)n * x->row) == 0 &&
           (!p->d.lse ||
            memcmp(x->lse + (size_t)a * h, y->lse + (size_t)b * h, 4 * (size_t)n * h) == 0);
}

static void bits_opts(test_rng *r, problem_opts *o, uint64_t round) {
    if (round % 3 == 2)
        problem_random(r, o);
    else
        tensor_opts(r, o);
    if (o->layout == ATTN_K16) o->layout = ATTN_HEAD_MAJOR;
    o->numerics = ATTN_NUMERICS_FAST;
    o->n_seq = attni_max32(o->n_seq, 3);
    o->shared = test_below(r, 3) ? 64 * (1 + test_below(r, 12)) : 0;
    o->lse = 1;
    if (o->shared && o->page_tokens > 64) o->page_tokens = 64; // so that something is shared
    if (o->mask == M_ALL || o->mask == M_TREE_ALL || (o->mask >= M_BLOCKS && o->mask <= M_DENSE))
        o->min_block = 32;
    if (o->max_kv > 500 && (round & 1) == 0) o->max_kv = 500;
    if (round % 4 == 1) o->mask = M_CAUSAL; // lists_mask's turn
}

static void random_place(test_rng *r, place *at) {
    static const int32_t pages[] = {1, 5, 16, 16, 32, 64, 64, 100, 256};
    memset(at, 0, sizeof *at);
    at->page_tokens = pages[test_below(r, 9)];
    at->layout = (attn_layout)test_below(r, 2);
    at->contiguous = test_below(r, 5) == 0;
    at->own = test_below(r, 4) == 0;
    at->poison = test_below(r, 3) == 0 ? 0x7c : test_below(r, 2) ? 0xff : 0;
}

// One variant of p: a batch drawn from its sequences, elsewhere, planned otherwise.
static int bits_variant(const problem *p, const result *base, test_rng *r, int alone, char *what) {
    int32_t ids[40], n, i;
    problem v;
    place at;
    result x;
    how h;
    int ok = 1;
    n = alone ? 1 : 1 + test_below(r, test_below(r, 3) ? p->d.n_seq : 20);
    for (i = 0; i < n; i++) ids[i] = test_below(r, p->d.n_seq);
    random_place(r, &at);
    random_how(r, &h);
    h.share = test_below(r, 3);
    h.partials = test_below(r, 4);
    if (test_below(r, 4) == 0) h.max_task_cost = (float)(1000 << test_below(r, 12));
    if (h.max_task_cost > 0 && h.partials >= 2) h.partials = 0;
    sprintf(what,
            "n %d page %d layout %d contiguous %d own %d poison %02x share %d workers %d tile "
            "%d partials %d max %d tables %d cost %g",
            n, at.page_tokens, at.layout, at.contiguous, at.own, at.poison, h.share, h.workers,
            h.row_tile, h.partials, h.max, h.device_tables, (double)h.max_task_cost);
    derive(&v, p, ids, n, &at, r);
    if (result_of(&x, &v, &h, r))
        for (i = 0; i < n; i++)
            ok &= same_rows(p, base, p->d.q_start[ids[i]], &x, v.d.q_start[i],
                            v.d.q_start[i + 1] - v.d.q_start[i]);
    else
        ok = 0;
    result_free(&x);
    problem_free(&v);
    return ok;
}

static void part_bits(uint64_t seed, uint64_t count) {
    uint64_t round, rounds = attni_min64((int64_t)count / 5 + 1, 30);
    int runs = 0;
    for (round = 0; round < rounds; round++) {
        problem_opts o;
        problem p;
        result base, x;
        how h;
        test_rng r;
        twin t;
        char what[300];
        const char *name;
        int i;
        r.state = seed * 1000 + round;
        bits_opts(&r, &o, round);
        problem_make(&p, &o, &r);
        if (round % 4 == 1) lists_mask(&p, &r);
        memset(&h, 0, sizeof h);
        result_make(&base, &p);
        result_make(&x, &p);
        twin_make(&t, &p, 1, NULL);
        name = attn_cuda_executor(&cu, &t.d);
        if (!twin_run(&t, &h, base.o, base.lse)) describe(&o, r.state, name);
        for (i = 0; i < 20 && round < 6; i++) { // again and again
            twin_run(&t, &h, x.o, x.lse);
            if (!CHECK(same_rows(&p, &base, 0, &x, 0, p.n_tokens))) {
                describe(&o, seed * 1000 + round, name);
                break;
            }
        }
        dev_release(0);
        for (i = 0; i < 10; i++, runs++)
            if (!CHECK(bits_variant(&p, &base, &r, i == 0, what))) {
                describe(&o, seed * 1000 + round, name);
                printf("  as %s\n", what);
                break;
            }
        result_free(&base), result_free(&x);
        problem_free(&p);
    }
    printf("  %d variants of %d batches\n", runs, (int)rounds);
}

// ---- one upload for many layers, two plans on two streams

// Other contents in the same places: another layer of the same step.
static void next_layer(problem *p, uint64_t seed) {
    test_rng r;
    attn_tensor k, v;
    size_t i, n = (size_t)(p->n_tokens * p->d.n_heads * p->d.head_dim);
    r.state = seed;
    test_fill_normal(&r, p->k_rows, (size_t)(p->n_rows * p->d.n_kv_heads * p->d.head_dim), 1);
    test_fill_normal(&r, p->v_rows, (size_t)(p->n_rows * p->d.n_kv_heads * p->d.v_head_dim), 1);
    for (i = 0; i < n; i++)
        attni_put(p->d.q.data, p->d.q.dtype, (int64_t)i, (float)(3 * test_normal(&r)));
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = p->k_rows, v.data = p->v_rows;
    CHECK_EQ(attn_cpu_store(&p->d, &k, p->opt.alias ? NULL : &v, p->slots, 0, p->n_rows), ATTN_OK);
}

typedef struct layers { // of one step: their data, what each gives when run by itself
    problem p[3];
    twin t[3];
    result want[3], got;
    job j;
} layers;

static void layers_make(layers *l, uint64_t seed, int round) {
    problem_opts o;
    how h;
    int i;
    memset(&h, 0, sizeof h);
    h.share = round % 3;
    for (i = 0; i < 3; i++) {
        test_rng r;
        r.state = seed;
        bits_opts(&r, &o, (uint64_t)round);
        problem_make(&l->p[i], &o, &r);
        if (i) next_layer(&l->p[i], seed + (uint64_t)i);
        result_make(&l->want[i], &l->p[i]);
        twin_make(&l->t[i], &l->p[i], 1, NULL);
        twin_run(&l->t[i], &h, l->want[i].o, l->want[i].lse);
        twin_clear(&l->t[i]);
    }
    result_make(&l->got, &l->p[0]);
    job_make(&l->j, &l->t[0].d, &h);
}

static void layers_check(layers *l, uint64_t seed, const char *what) {
    int i;
    for (i = 0; i < 3; i++) {
        CHECK(twin_output(&l->t[i], l->got.o, l->got.lse));
        if (CHECK(same_rows(&l->p[i], &l->want[i], 0, &l->got, 0, l->p[i].n_tokens))) continue;
        describe(&l->p[0].opt, seed, attn_cuda_executor(&cu, &l->t[0].d));
        printf("  layer %d, %s\n", i, what);
    }
}

static void layers_free(layers *l) {
    int i;
    for (i = 0; i < 3; i++) result_free(&l->want[i]), problem_free(&l->p[i]);
    result_free(&l->got);
    job_free(&l->j);
}

static attn_result layers_run(layers *l, int i, cudaStream_t stream) {
    return attn_cuda_run(&cu, &l->t[i].d, &l->j.g, l->j.partials, l->j.partial_bytes, stream);
}

static void part_layers(uint64_t seed, uint64_t count) {
    static layers a, b;
    int round, i, n = (int)attni_min64((int64_t)count / 10 + 1, 12);
    cudaStream_t second;
    DEV(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    for (round = 0; round < n; round++) {
        uint64_t s = seed * 300 + (uint64_t)round * 2;
        layers_make(&a, s, round);
        layers_make(&b, s + 1, round + 1);
        DEV(cudaDeviceSynchronize());
        CHECK_EQ(job_upload(&a.j, &a.t[0].d), ATTN_OK);
        CHECK_EQ(attn_cuda_upload(&cu, &b.t[0].d, b.j.plan, &b.j.g, b.j.staging, b.j.bytes, second),
                 ATTN_OK);
        for (i = 0; i < 7; i++) CHECK_EQ(layers_run(&a, i % 3, dev_stream), ATTN_OK);
        dev_sync();
        layers_check(&a, s, "runs behind one another");
        for (i = 0; i < 3; i++) twin_clear(&a.t[i]);
        DEV(cudaDeviceSynchronize());
        for (i = 0; i < 15; i++) { // both at once
            CHECK_EQ(layers_run(&a, i % 3, dev_stream), ATTN_OK);
            CHECK_EQ(layers_run(&b, i % 3, second), ATTN_OK);
        }
        DEV(cudaStreamSynchronize(second));
        dev_sync();
        layers_check(&a, s, "beside another stream");
        layers_check(&b, s + 1, "beside another stream");
        CHECK_EQ(dev_error(), 0);
        CHECK(dev_guards(0));
        dev_release(0);
        layers_free(&a);
        layers_free(&b);
    }
    DEV(cudaStreamDestroy(second));
}

// ---- a captured graph, replayed over uploads of a growing batch

typedef struct grown { // the first n sequences and up to `step` more tokens of each
    attn_desc d;
    int32_t q_start[40], kv_len[40], q_pos0[40];
    int32_t n_tokens;
} grown;

// d's tables for one step: every sequence has the query tokens [a, b) of those it has in p, and the
// cache that goes with them.
static void grow(grown *g, const problem *p, const attn_desc *d, int32_t n, int32_t a, int32_t b) {
    int32_t s;
    g->d = *d;
    g->n_tokens = 0;
    for (s = 0; s < n; s++) {
        int32_t q = p->d.q_start[s + 1] - p->d.q_start[s], from = attni_min32(a, q - 1);
        int32_t to = attni_min32(attni_max32(b, from + 1), q);
        if (p->d.mask.kind == ATTN_MASK_TREE) from = 0; // a tree begins at its root
        g->q_start[s] = g->n_tokens;
        g->q_pos0[s] = p->d.q_pos0[s] + from;
        g->kv_len[s] = p->d.kv.kv_len[s] - (q - to);
        g->n_tokens += to - from;
    }
    g->q_start[n] = g->n_tokens;
    g->d.n_seq = n;
    g->d.q_start = g->q_start;
    g->d.q_pos0 = g->q_pos0;
    g->d.kv.kv_len = g->kv_len;
}

// The step's queries, packed, into the buffer that the graph reads; likewise tree parents.
static void grow_queries(const grown *g, const problem *p, void *q_device, int32_t *parent) {
    size_t row = (size_t)(p->d.n_heads * p->d.head_dim) * element_bytes(p->d.q.dtype);
    int32_t s, t;
    for (s = 0; s < g->d.n_seq; s++) {
        int32_t from = g->q_pos0[s] - p->d.q_pos0[s] + p->d.q_start[s];
        int32_t n = g->q_start[s + 1] - g->q_start[s];
        dev_write((uint8_t *)q_device + (size_t)g->q_start[s] * row,
                  (const uint8_t *)p->d.q.data + (size_t)from * row, (size_t)n * row);
        for (t = 0; t < n && p->d.mask.tree_parent; t++)
            parent[g->q_start[s] + t] = p->d.mask.tree_parent[p->d.q_start[s] + t];
    }
}

static void graph_round(uint64_t seed, int round) {
    problem_opts o;
    problem p, eager;
    test_rng r;
    twin t;
    job j;
    how h, fresh;
    result x, y;
    grown g;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int32_t step, n, most = 0, s, rebuilt, *parent;
    r.state = seed;
    tensor_opts(&r, &o);
    o.phase = round % 3 == 2 ? VERIFY : CHUNKED;
    o.n_seq = 3 + test_below(&r, 6);
    o.max_kv = 200 + test_below(&r, 900);
    o.shared = round % 2 ? 256 : 0;
    o.page_tokens = 16 << (round % 3);
    o.contiguous = o.bias = 0; // the bias goes with the tokens' numbers
    o.lse = 1, o.min_block = 32;
    problem_make(&p, &o, &r);
    parent = (int32_t *)problem_alloc(&p, 4 * (size_t)p.n_tokens + 4);
    memset(&h, 0, sizeof h), memset(&fresh, 0, sizeof fresh);
    h.share = round % 3;
    result_make(&x, &p), result_make(&y, &p);
    twin_make(&t, &p, 1, NULL);
    if (p.d.mask.tree_parent) t.d.mask.tree_parent = parent;
    for (s = 0; s < o.n_seq; s++) most = attni_max32(most, p.d.kv.kv_pos0[s] + p.d.kv.kv_len[s]);
    if (p.d.mask.tree_parent) memcpy(parent, p.d.mask.tree_parent, 4 * (size_t)p.n_tokens);
    h.max = 1;
    job_make(&j, &t.d, &h); // capacities: the whole batch at its longest
    if (o.phase == VERIFY) j.g.max_q_len = 17;
    DEV(cudaDeviceSynchronize());
    DEV(cudaStreamBeginCapture(dev_stream, cudaStreamCaptureModeGlobal));
    CHECK_EQ(attn_cuda_upload(&cu, &t.d, j.plan, &j.g, j.staging, j.bytes, dev_stream), ATTN_OK);
    DEV(cudaStreamEndCapture(dev_stream, &graph)); // thrown away: it was to ask for no sync
    DEV(cudaGraphDestroy(graph));
    CHECK_EQ(job_upload(&j, &t.d), ATTN_OK);
    dev_sync();
    DEV(cudaStreamBeginCapture(dev_stream, cudaStreamCaptureModeGlobal));
    CHECK_EQ(job_run(&j, &t.d), ATTN_OK);
    DEV(cudaStreamEndCapture(dev_stream, &graph));
    DEV(cudaGraphInstantiate(&exec, graph, 0));
    for (step = 0; step < 9; step++) {
        n = attni_min32(o.n_seq, 1 + step);
        if (step < 6)
            grow(&g, &p, &t.d, n, step, step + 1); // decode, one more sequence each
        else if (step == 6)
            grow(&g, &p, &t.d, n, 0, 64); // prefill beside it
        else if (step == 7)
            grow(&g, &p, &t.d, 1, 0, 1); // back to one
        else
            grow(&g, &p, &t.d, o.n_seq, 1, 5);
        grow_queries(&g, &p, t.d.q.data, parent);
        twin_clear(&t);
        if (j.partials) dev_fill(j.partials, 0xff, j.partial_bytes);
        DEV(cudaDeviceSynchronize());
        CHECK_EQ(attn_plan_update(j.plan, &g.d, &rebuilt), ATTN_OK);
        CHECK_EQ(job_upload(&j, &g.d), ATTN_OK);
        DEV(cudaGraphLaunch(exec, dev_stream));
        dev_sync();
        CHECK_EQ(dev_error(), 0);
        CHECK(dev_guards(0));
        twin_output(&t, x.o, x.lse);
        { // rows behind the step's are not written
            uint8_t *end = x.o + (size_t)g.n_tokens * x.row;
            size_t e, rest = (size_t)(p.n_tokens - g.n_tokens) * x.row;
            for (e = 0; e < rest && end[e] == 0xff; e++) {
            }
            CHECK(e == rest);
        }
        eager = p;
        eager.n_tokens = g.n_tokens;
        {
            twin e = t; // the same device arrays, a plan of its own
            e.p = &eager;
            e.d = g.d;
            e.d.o = t.d.o, e.d.lse = t.d.lse;
            twin_run(&e, &fresh, y.o, y.lse);
        }
        if (!CHECK(same_rows(&p, &x, 0, &y, 0, g.n_tokens))) {
            describe(&o, seed, attn_cuda_executor(&cu, &t.d));
            printf("  graph step %d: n %d tokens %d\n", step, n, g.n_tokens);
            break;
        }
    }
    DEV(cudaGraphExecDestroy(exec));
    DEV(cudaGraphDestroy(graph));
    dev_release(0);
    job_free(&j);
    result_free(&x), result_free(&y);
    problem_free(&p);
}

static void part_graph(uint64_t seed, uint64_t count) {
    int i, n = (int)attni_min64((int64_t)count / 12 + 1, 12);
    for (i = 0; i < n; i++) graph_round(seed * 100 + (uint64_t)i, i);
}

// ---- NaN and Inf

static int row_same(const problem *p, const result *x, const result *y, int32_t t, int32_t h) {
    size_t e = x->row / (size_t)p->d.n_heads, i = (size_t)(t * p->d.n_heads + h);
    return memcmp(x->o + i * e, y->o + i * e, e) == 0 && memcmp(x->lse + i, y->lse + i, 4) == 0;
}

static int row_nan(const problem *p, const result *x, int32_t t, int32_t h) {
    int64_t i = ((int64_t)t * p->d.n_heads + h) * p->d.v_head_dim, e;
    for (e = 0; e < p->d.v_head_dim; e++)
        if (attni_isnan(attni_get(x->o, p->d.o.dtype, i + e))) return 1;
    return 0;
}

// Element 3 of KV head 0 of the token at slot, held in row `from` of rows, becomes bad.
static void poke(const problem *p, int in_v, int64_t slot, const float *rows, int64_t from,
                 float bad) {
    float row[4 * ATTN_MAX_HEAD_DIM];
    int32_t n = p->d.n_kv_heads * (in_v ? p->d.v_head_dim : p->d.head_dim);
    attn_tensor x;
    memset(&x, 0, sizeof x);
    x.data = row;
    x.dtype = ATTN_F32;
    memcpy(row, rows + from * n, 4 * (size_t)n);
    row[3] = bad;
    CHECK_EQ(attn_cpu_store(&p->d, in_v ? NULL : &x, in_v ? &x : NULL, &slot, 0, 1), ATTN_OK);
}

static int64_t slot_of(const problem *p, int32_t s, int32_t j) {
    const attn_kv *kv = &p->d.kv;
    int32_t pt = kv->page_tokens;
    int64_t page = kv->page_table ? kv->page_table[s * kv->page_table_stride + j / pt] : s;
    return page * pt + j % pt;
}

// What p's rows may be after the token at slot has been spoilt. seen: rows that must be NaN.
static int nan_reach(const problem *p, const result *clean, const result *x, int in_v, int64_t slot,
                     int *seen, int *n_nan) {
    int32_t s, t, h, j, group = p->d.n_heads / p->d.n_kv_heads, ok = 1;
    for (s = 0; s < p->d.n_seq; s++) {
        int any = 0;
        int32_t len = p->d.kv.kv_len[s];
        for (j = 0; j < len && slot_of(p, s, j) != slot; j++) {
        }
        for (t = p->d.q_start[s]; t < p->d.q_start[s + 1] && j < len; t++)
            for (h = 0; h < group; h++) any |= attn_ref_visible(&p->d, s, t, h, j);
        for (t = p->d.q_start[s]; t < p->d.q_start[s + 1]; t++)
            for (h = 0; h < p->d.n_heads; h++) {
                int sees = j < len && h < group && attn_ref_visible(&p->d, s, t, h, j);
                int may = in_v ? any && h < group : sees;
                if (sees) *seen += 1, *n_nan += row_nan(p, x, t, h);
                ok &= may || row_same(p, clean, x, t, h);
                ok &= may || !row_nan(p, x, t, h);
            }
    }
    return ok;
}

static void part_nan(uint64_t seed, uint64_t count) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    uint64_t round, rounds = attni_min64((int64_t)count / 5 + 1, 40);
    int n_rows = 0;
    for (round = 0; round < rounds; round++) {
        problem_opts o;
        problem p;
        result clean, x;
        origin where;
        how h;
        test_rng r;
        int kind;
        r.state = seed * 7000 + round;
        bits_opts(&r, &o, round);
        o.head_scale = 0; // codes have no NaN there
        if (round % 2) o.mask = round % 4 == 1 ? M_WINDOW : M_WINDOW_SINK;
        if (round % 2) o.phase = round % 4 == 1 ? CHUNKED : VERIFY, o.max_kv = 400, o.n_seq = 4;
        problem_make(&p, &o, &r);
        if (p.n_tokens == 0) {
            problem_free(&p);
            continue;
        }
        memset(&h, 0, sizeof h);
        result_of(&clean, &p, &h, NULL);
        origin_make(&where, &p);
        for (kind = 0; kind < 6; kind++) {
            int32_t s = test_below(&r, o.n_seq), j = test_below(&r, p.d.kv.kv_len[s]);
            int in_v = kind & 1, seen = 0, n_nan = 0, reach_v = in_v || o.alias;
            int64_t slot;
            problem q;
            int32_t ids[40], i;
            place at = {p.opt.page_tokens, p.opt.layout, p.opt.contiguous, 0, 0xff};
            if (o.alias && in_v) continue;
            for (i = 0; i < o.n_seq; i++) ids[i] = i;
            derive(&q, &p, ids, o.n_seq, &at, &r);
            if (o.shared && test_below(&r, 2)) j %= o.shared;
            slot = slot_of(&q, s, j);
            poke(&q, in_v, slot, in_v ? p.v_rows : p.k_rows,
                 where.row[j < where.shared ? 0 : s] + j, bad[kind / 2]);
            random_how(&r, &h);
            h.device_tables = 0;
            result_of(&x, &q, &h, NULL);
            // a spoilt sequence in a batch: each row that may not know of it is as before
            if (!CHECK(nan_reach(&q, &clean, &x, reach_v, slot, &seen, &n_nan))) {
                describe(&o, seed * 7000 + round, in_v ? "V" : "K");
                printf("  bad value %g at token %d of sequence %d, share %d\n",
                       (double)bad[kind / 2], j, s, h.share);
            }
            // (bad K, softmax weight 0 of -Inf: only NaN is sure to arrive)
            if (kind < 2 && !CHECK(in_v ? seen == 0 || n_nan > 0 : n_nan == seen)) {
                describe(&o, seed * 7000 + round, in_v ? "V" : "K");
                printf("  NaN at token %d of sequence %d: %d rows see it, %d are NaN\n", j, s, seen,
                       n_nan);
            }
            n_rows += seen;
            result_free(&x);
            problem_free(&q);
        }
        result_free(&clean);
        free(where.row);
        problem_free(&p);
    }
    printf("  %d rows saw a bad value\n", n_rows);
}

// ---- lists that change

// A captured run whose lists change in device memory, as those of selectors do: what it gives is
// what a run of its own gives for these lists.
static void relist_round(uint64_t seed, uint64_t round) {
    static const int32_t blocks[] = {2, 8, 64, 128};
    problem_opts o;
    problem p;
    result want, x;
    test_rng r;
    twin t;
    job j;
    how h;
    attn_desc d;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    int step;
    r.state = seed * 9000 + round;
    tensor_opts(&r, &o);
    o.mask = M_CAUSAL, o.lse = 1;
    problem_make(&p, &o, &r);
    p.d.mask.keep_sink = 3, p.d.mask.keep_recent = 20;
    result_make(&want, &p), result_make(&x, &p);
    twin_make(&t, &p, 1, &r);
    memset(&h, 0, sizeof h);
    h.max = 1;
    for (step = 0; step < 4; step++) {
        const attn_block_list *b = &p.d.mask.blocks;
        size_t offsets;
        lists_blocks(&p, &r, 64, blocks[round % 4], p.d.n_kv_heads);
        offsets = 8 * (size_t)b->n_lists * ((size_t)b->n_rows + 1);
        t.d.mask = p.d.mask;
        if (!twin_run(&t, &h, want.o, want.lse)) describe(&o, r.state, "relist");
        if (step == 0) {
            const int64_t n = (int64_t)b->n_lists * b->n_rows * (problem_positions(&p) / 2 + 5);
            d = t.d;
            d.mask.blocks.row_start = (int64_t *)dev_alloc(offsets, b->row_start);
            d.mask.blocks.row_end = (int64_t *)dev_alloc(offsets, b->row_end);
            d.mask.blocks.block = (int32_t *)dev_alloc(4 * (size_t)n, NULL);
            d.mask.blocks.device_entries = n;
            job_make(&j, &d, &h);
            DEV(cudaDeviceSynchronize());
            CHECK_EQ(job_upload(&j, &d), ATTN_OK);
            dev_sync();
            DEV(cudaStreamBeginCapture(dev_stream, cudaStreamCaptureModeThreadLocal));
            CHECK_EQ(job_run(&j, &d), ATTN_OK);
            DEV(cudaStreamEndCapture(dev_stream, &graph));
            DEV(cudaGraphInstantiate(&run, graph, 0));
        }
        dev_write((void *)(uintptr_t)d.mask.blocks.row_start, b->row_start, offsets);
        dev_write((void *)(uintptr_t)d.mask.blocks.row_end, b->row_end, offsets);
        dev_write((void *)(uintptr_t)d.mask.blocks.block, b->block,
                  4 * (size_t)b->row_end[(int64_t)b->n_lists * (b->n_rows + 1) - 2]);
        twin_clear(&t);
        DEV(cudaDeviceSynchronize());
        DEV(cudaGraphLaunch(run, dev_stream));
        dev_sync();
        CHECK_EQ(dev_error(), 0);
        CHECK(twin_output(&t, x.o, x.lse) && dev_guards(0));
        if (!CHECK(same_rows(&p, &want, 0, &x, 0, p.n_tokens))) describe(&o, r.state, "relist");
    }
    DEV(cudaGraphExecDestroy(run));
    DEV(cudaGraphDestroy(graph));
    dev_release(0);
    job_free(&j);
    result_free(&want), result_free(&x);
    problem_free(&p);
}

static void part_relist(uint64_t seed, uint64_t count) {
    uint64_t round, rounds = attni_min64((int64_t)count / 10 + 1, 16);
    for (round = 0; round < rounds; round++) relist_round(seed, round);
}

// ---- errors

// A plain problem: 4 decoding sequences of up to 300 tokens, pages of 16.
static void plain_opts(problem_opts *o, attn_dtype type, int phase, int mask) {
    memset(o, 0, sizeof *o);
    o->phase = phase, o->mask = mask, o->layout = ATTN_HEAD_MAJOR, o->page_tokens = 16;
    o->n_seq = 4, o->max_kv = 300, o->n_heads = 4, o->n_kv_heads = 2;
    o->head_dim = o->v_head_dim = 64;
    o->k = o->v = o->q = o->o = type;
    o->lse = 1, o->sharp = 3;
}

static void errors_open(void) {
    attn_cuda c;
    int32_t *word = cu.error;
    memset(&c, 0, sizeof c);
    c.error = word;
    CHECK_EQ(attn_cuda_open(NULL, 0), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_open(&c, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_open(&c, 9999), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_open(&c, 0), ATTN_OK);
    CHECK(c.error == word && c.device == 0 && c.arch >= 75 && c.n_sm > 0);
    CHECK(c.smem_bytes >= 48 << 10);
    CHECK_EQ(cudaGetLastError(), cudaSuccess); // a refused ordinal leaves nothing behind
}

static void errors_plan(const twin *t, job *j) {
    const attn_desc *d = &t->d;
    attn_desc bad = *d;
    attn_cuda_plan g;
    attn_result r;
    CHECK_EQ(attn_cuda_supports(NULL, d), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_supports(&cu, NULL), ATTN_ERR_ARGUMENT);
    CHECK(attn_cuda_executor(&cu, NULL) && attn_cuda_executor(NULL, d));
    attn_cuda_plan_params(&cu, d, NULL);
    CHECK(attn_cuda_plan_bytes(&cu, NULL, &j->params) == 0);
    CHECK(attn_cuda_plan_bytes(&cu, d, NULL) == 0 &&
          attn_cuda_plan_bytes(NULL, d, &j->params) == 0);
    bad.n_heads = 5;
    CHECK(attn_cuda_plan_bytes(&cu, &bad, &j->params) == 0);
    CHECK_EQ(attn_cuda_plan_init(&cu, &bad, &j->params, j->image, j->bytes, &g), ATTN_ERR_SHAPE);
    CHECK_EQ(attn_cuda_plan_init(NULL, d, &j->params, j->image, j->bytes, &g), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_plan_init(&cu, NULL, &j->params, j->image, j->bytes, &g), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_plan_init(&cu, d, NULL, j->image, j->bytes, &g), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_plan_init(&cu, d, &j->params, j->image, j->bytes, NULL), ATTN_ERR_ARGUMENT);
    r = attn_cuda_plan_init(&cu, d, &j->params, NULL, j->bytes, &g);
    CHECK(r == ATTN_ERR_ARGUMENT || r == ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cuda_plan_init(&cu, d, &j->params, j->image, j->bytes - 1, &g), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cuda_plan_init(&cu, d, &j->params, (uint8_t *)j->image + 16, j->bytes, &g),
             ATTN_ERR_BUFFER);
}

static void errors_upload(const twin *t, job *j) {
    const attn_desc *d = &t->d;
    attn_desc bad = *d;
    attn_cuda_plan *g = &j->g;
    size_t n = (size_t)(d->n_seq * d->kv.page_table_stride);
    int32_t len[8], *table = (int32_t *)malloc(4 * n), s;
    attn_result r;
#define UPLOAD(c, d, plan, g, staging, bytes)                                                      \
    attn_cuda_upload(c, d, plan, g, staging, bytes, dev_stream)
    CHECK_EQ(UPLOAD(NULL, d, j->plan, g, j->staging, j->bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(UPLOAD(&cu, NULL, j->plan, g, j->staging, j->bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(UPLOAD(&cu, d, NULL, g, j->staging, j->bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(UPLOAD(&cu, d, j->plan, NULL, j->staging, j->bytes), ATTN_ERR_ARGUMENT);
    r = UPLOAD(&cu, d, j->plan, g, NULL, j->bytes);
    CHECK(r == ATTN_ERR_ARGUMENT || r == ATTN_ERR_BUFFER);
    CHECK_EQ(UPLOAD(&cu, d, j->plan, g, j->staging, 64), ATTN_ERR_BUFFER);
    for (s = 0; s < d->n_seq; s++) len[s] = d->kv.kv_len[s] - (s == 1);
    bad.kv.kv_len = len; // the plan was made for other lengths
    CHECK_EQ(UPLOAD(&cu, &bad, j->plan, g, j->staging, j->bytes), ATTN_ERR_STALE);
    bad = *d;
    bad.n_seq = 3;
    CHECK_EQ(UPLOAD(&cu, &bad, j->plan, g, j->staging, j->bytes), ATTN_ERR_STALE);
    bad = *d;
    memcpy(table, d->kv.page_table, 4 * n);
    table[d->kv.page_table_stride] = d->kv.n_pages;
    bad.kv.page_table = table;
    CHECK_EQ(UPLOAD(&cu, &bad, j->plan, g, j->staging, j->bytes), ATTN_ERR_PAGE);
    bad = *d;
    bad.o.dtype = ATTN_I8;
    CHECK_EQ(UPLOAD(&cu, &bad, j->plan, g, j->staging, j->bytes), ATTN_ERR_DTYPE);
    free(table);
}

// More sequences than the image was laid out for.
static void errors_outgrown(const twin *t, job *j) {
    attn_desc d = t->d;
    attn_plan_params p;
    attn_plan *plan;
    int32_t n = 40 * d.n_seq, s, q_start[400], len[400], *table,
            stride = (int32_t)d.kv.page_table_stride;
    void *mem;
    size_t bytes;
    table = (int32_t *)malloc(4 * (size_t)(n * stride));
    for (s = 0; s < n; s++) {
        q_start[s] = s, len[s] = d.kv.kv_len[s % d.n_seq];
        memcpy(table + s * stride, d.kv.page_table + s % d.n_seq * stride, 4 * (size_t)stride);
    }
    q_start[n] = n;
    d.n_seq = n, d.q_start = q_start, d.q_pos0 = d.kv.kv_pos0 = NULL;
    d.kv.kv_len = len, d.kv.page_table = table;
    p = j->params;
    p.max_seq = p.max_tokens = p.max_kv_len = 0;
    bytes = attn_plan_bytes(&d, &p);
    mem = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    CHECK_EQ(attn_plan_build(&d, &p, mem, bytes, &plan), ATTN_OK);
    CHECK_EQ(UPLOAD(&cu, &d, plan, &j->g, j->staging, j->bytes), ATTN_ERR_BUFFER);
    free(mem), free(table);
}

static void errors_run(const twin *t, job *j) {
    const attn_desc *d = &t->d;
    attn_desc bad;
    attn_cuda_plan *g = &j->g;
    size_t need = attn_plan_partial_bytes(j->plan);
    attn_result r;
#define RUN(c, d, g, partials, bytes) attn_cuda_run(c, d, g, partials, bytes, dev_stream)
#define BAD(change, want)                                                                          \
    bad = *d;                                                                                      \
    change;                                                                                        \
    CHECK_EQ(RUN(&cu, &bad, g, j->partials, j->partial_bytes), want)
    CHECK_EQ(RUN(NULL, d, g, j->partials, j->partial_bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(RUN(&cu, NULL, g, j->partials, j->partial_bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(RUN(&cu, d, NULL, j->partials, j->partial_bytes), ATTN_ERR_ARGUMENT);
    CHECK(need > 0); // the errors below are about it
    if (need > 0) {
        r = RUN(&cu, d, g, NULL, j->partial_bytes);
        CHECK(r == ATTN_ERR_BUFFER || r == ATTN_ERR_ARGUMENT);
        CHECK_EQ(RUN(&cu, d, g, j->partials, need - 1), ATTN_ERR_BUFFER);
        CHECK_EQ(RUN(&cu, d, g, (uint8_t *)j->partials + 16, j->partial_bytes), ATTN_ERR_BUFFER);
    }
    BAD(bad.q.data = NULL, ATTN_ERR_ARGUMENT);
    BAD(bad.o.data = NULL, ATTN_ERR_ARGUMENT);
    BAD(bad.kv.k.data = NULL, ATTN_ERR_ARGUMENT);
    BAD(bad.q.dtype = ATTN_DTYPE_NONE, ATTN_ERR_DTYPE);
    BAD(bad.kv.v.dtype = ATTN_DTYPE_NONE, ATTN_ERR_DTYPE);
    BAD(bad.o.stride_head = 8, ATTN_ERR_LAYOUT);
    BAD(bad.kv.k.page_bytes = 8, ATTN_ERR_LAYOUT);
    BAD(bad.kv.layout = ATTN_K16, ATTN_ERR_UNSUPPORTED);
    BAD(bad.numerics = ATTN_NUMERICS_PORTABLE, ATTN_ERR_UNSUPPORTED);
    BAD(bad.n_heads = 2, ATTN_ERR_STALE); // valid, but another problem than the plan's
    BAD(bad.head_dim = 32, ATTN_ERR_STALE);
    BAD(bad.v_head_dim = 32, ATTN_ERR_STALE);
    BAD(bad.n_seq = 3, ATTN_ERR_STALE);
}

static void errors_store(const twin *t, job *j) {
    const attn_desc *d = &t->d;
    attn_desc bad = *d;
    attn_tensor k, v, w;
    static const int64_t nowhere[16] = {-1};
    int64_t *slots = (int64_t *)dev_alloc(8 * 16, nowhere);
    float *rows = (float *)dev_alloc(16 * 2 * 64 * 4, NULL);
#define STORE(c, d, g, k, v, slots, first, count)                                                  \
    attn_cuda_store(c, d, g, k, v, slots, first, count, dev_stream)
    memset(&k, 0, sizeof k);
    k.data = rows, k.dtype = ATTN_F32;
    v = w = k;
    CHECK_EQ(STORE(NULL, d, &j->g, &k, &v, slots, 0, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(STORE(&cu, NULL, &j->g, &k, &v, slots, 0, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(STORE(&cu, d, NULL, &k, &v, NULL, 0, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(STORE(&cu, d, &j->g, &k, &v, slots, -1, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(STORE(&cu, d, &j->g, &k, &v, slots, 0, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(STORE(&cu, d, &j->g, &k, &v, slots, INT64_MAX, 2), ATTN_ERR_OVERFLOW);
    CHECK_EQ(STORE(&cu, d, &j->g, &k, &v, NULL, 0, t->p->n_tokens + 1), ATTN_ERR_SHAPE);
    w.dtype = ATTN_I8;
    CHECK_EQ(STORE(&cu, d, &j->g, &w, &v, slots, 0, 1), ATTN_ERR_DTYPE);
    CHECK_EQ(STORE(&cu, d, &j->g, &k, &w, slots, 0, 1), ATTN_ERR_DTYPE);
    w = k, w.data = NULL;
    CHECK_EQ(STORE(&cu, d, &j->g, &w, &v, slots, 0, 1), ATTN_ERR_ARGUMENT);
    w = k, w.stride_token = -1;
    CHECK_EQ(STORE(&cu, d, &j->g, &w, &v, slots, 0, 1), ATTN_ERR_LAYOUT);
    bad.kv.k.page_bytes = 8;
    CHECK_EQ(STORE(&cu, &bad, &j->g, &k, &v, slots, 0, 1), ATTN_ERR_LAYOUT);
    bad = *d, bad.kv.layout = ATTN_K16;
    CHECK_EQ(STORE(&cu, &bad, &j->g, &k, &v, slots, 0, 1), ATTN_ERR_UNSUPPORTED);
    CHECK_EQ(STORE(&cu, d, &j->g, &k, &v, slots, 0, 0), ATTN_OK);
    CHECK_EQ(STORE(&cu, d, &j->g, NULL, NULL, slots, 0, 1), ATTN_OK);
}

static void errors_pages(const twin *t) {
    const attn_desc *d = &t->d;
    attn_page_copy c = {0, 1, 4}, bad;
    uint8_t *host = (uint8_t *)dev_new(2 * (t->page_bytes[0] + t->page_bytes[1]), NULL, 1);
    int32_t page[2] = {0, 1};
#define COPY(c, d, list, n) attn_cuda_copy_pages(c, d, list, n, dev_stream)
#define SWAP(c, d, list, n, k, v) attn_cuda_swap_pages(c, d, list, n, k, v, 1, dev_stream)
    CHECK_EQ(COPY(NULL, d, &c, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(COPY(&cu, NULL, &c, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(COPY(&cu, d, NULL, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(COPY(&cu, d, &c, -1), ATTN_ERR_ARGUMENT);
    bad = c, bad.src = d->kv.n_pages;
    CHECK_EQ(COPY(&cu, d, &bad, 1), ATTN_ERR_PAGE);
    bad = c, bad.src = -1;
    CHECK_EQ(COPY(&cu, d, &bad, 1), ATTN_ERR_PAGE);
    bad = c, bad.dst = d->kv.n_pages;
    CHECK_EQ(COPY(&cu, d, &bad, 1), ATTN_ERR_PAGE);
    bad = c, bad.n_tokens = d->kv.page_tokens + 1;
    CHECK_EQ(COPY(&cu, d, &bad, 1), ATTN_ERR_ARGUMENT);
    bad = c, bad.n_tokens = -1;
    CHECK_EQ(COPY(&cu, d, &bad, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(SWAP(NULL, d, page, 1, host, host), ATTN_ERR_ARGUMENT);
    CHECK_EQ(SWAP(&cu, NULL, page, 1, host, host), ATTN_ERR_ARGUMENT);
    CHECK_EQ(SWAP(&cu, d, NULL, 1, host, host), ATTN_ERR_ARGUMENT);
    CHECK_EQ(SWAP(&cu, d, page, -1, host, host), ATTN_ERR_ARGUMENT);
    page[1] = d->kv.n_pages; // behind a good one: nothing is copied
    CHECK_EQ(SWAP(&cu, d, page, 2, host, host), ATTN_ERR_PAGE);
    page[1] = -1;
    CHECK_EQ(SWAP(&cu, d, page, 2, host, host), ATTN_ERR_PAGE);
    dev_sync();
    CHECK(dev_bare || (host[0] == 0xff && host[t->page_bytes[0]] == 0xff));
}

static void errors_merge(void) {
    attn_tensor o[17], out, bad;
    const float *lse[17];
    float *l = (float *)dev_alloc(4 * 8, NULL);
    int i;
    memset(&out, 0, sizeof out);
    out.data = dev_alloc(4 * 2 * 64 * 4, NULL);
    out.dtype = ATTN_F32;
    for (i = 0; i < 17; i++) o[i] = out, lse[i] = l;
#define MERGE(c, o, lse, n, tokens, heads, dim, out)                                               \
    attn_cuda_merge(c, o, lse, n, tokens, heads, dim, out, NULL, dev_stream)
    CHECK_EQ(MERGE(NULL, o, lse, 2, 4, 2, 64, &out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(MERGE(&cu, NULL, lse, 2, 4, 2, 64, &out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(MERGE(&cu, o, NULL, 2, 4, 2, 64, &out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(MERGE(&cu, o, lse, 2, 4, 2, 64, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(MERGE(&cu, o, lse, 0, 4, 2, 64, &out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(MERGE(&cu, o, lse, 17, 4, 2, 64, &out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(MERGE(&cu, o, lse, 2, -1, 2, 64, &out), ATTN_ERR_ARGUMENT);
    bad = out, bad.dtype = ATTN_I8;
    CHECK_EQ(MERGE(&cu, o, lse, 2, 4, 2, 64, &bad), ATTN_ERR_DTYPE);
    o[1].dtype = ATTN_DTYPE_NONE;
    CHECK_EQ(MERGE(&cu, o, lse, 2, 4, 2, 64, &out), ATTN_ERR_DTYPE);
    o[1] = out, lse[1] = NULL;
    CHECK_EQ(MERGE(&cu, o, lse, 2, 4, 2, 64, &out), ATTN_ERR_ARGUMENT);
}

// Everything but sequence `but` is as in base; its rows hold no NaN (poison was not read).
static void others_same(const problem *p, const result *base, const result *x, int32_t but,
                        const char *what) {
    int32_t s, t, h, ok = 1, clean = 1;
    for (s = 0; s < p->d.n_seq; s++)
        for (t = p->d.q_start[s]; t < p->d.q_start[s + 1]; t++)
            for (h = 0; h < p->d.n_heads; h++) {
                if (s != but) ok &= row_same(p, base, x, t, h);
                clean &= !row_nan(p, x, t, h);
            }
    if (!CHECK(ok && clean)) printf("  %s: others as before %d, no NaN %d\n", what, ok, clean);
}

// Bad ids in tables that lie in device memory: skipped, reported, nothing else disturbed.
static void errors_tables(attn_dtype type, int mask, int min_block) {
    static const int32_t bad_page[] = {-1, 1 << 30, INT32_MAX, INT32_MIN};
    problem_opts o;
    problem p;
    result base, x;
    test_rng r = {77};
    twin t;
    job j;
    how h;
    int i, n = mask == M_BLOCKS ? 5 : 6;
    memset(&h, 0, sizeof h);
    plain_opts(&o, type, mask == M_BLOCKS ? CHUNKED : DECODE, mask);
    o.min_block = min_block;
    do { // bad ids must fall on something that is looked at
        problem_make(&p, &o, &r);
        if (p.d.kv.kv_len[1] > 120) break;
        problem_free(&p);
    } while (1);
    result_make(&base, &p), result_make(&x, &p);
    twin_make(&t, &p, 1, NULL);
    twin_run(&t, &h, base.o, base.lse);
    h.device_tables = 1;
    for (i = 0; i < n; i++) {
        attn_desc d = t.d;
        int mark = dev_n, expected = 1;
        int32_t *error = cu.error, id = 0, e;
        twin_clear(&t);
        list_on_device(&d);
        job_make(&j, &d, &h);
        if (mask != M_BLOCKS) { // sequence 1's third page, or (last) all of its pages
            int32_t *table =
                (int32_t *)(uintptr_t)j.g.tables.page_table + j.g.tables.page_table_stride;
            id = i < 4 ? bad_page[i] : p.d.kv.n_pages;
            dev_write(table + 2, &id, 4);
            for (e = 0; i == 5 && e < (p.d.kv.kv_len[1] + 15) / 16; e++)
                dev_write(table + e, &id, 4);
        } else if (i < 2) { // an id out of range in every row's first entry
            const attn_block_list *b = &p.d.mask.blocks;
            int64_t row, rows = (int64_t)b->n_lists * (b->n_rows + 1);
            id = i == 0 ? -5 : INT32_MAX;
            expected = i == 0;
            for (row = 0; row + 1 < rows; row++)
                if (b->row_start[row] < b->row_start[row + 1])
                    dev_write((int32_t *)(uintptr_t)d.mask.blocks.block + b->row_start[row], &id,
                              4);
        } else { // offsets that lead outside
            const attn_block_list *b = &p.d.mask.blocks;
            int64_t row, rows = (int64_t)b->n_lists * (b->n_rows + 1), far;
            far = i == 2 ? d.mask.blocks.device_entries + 5 : i == 3 ? (int64_t)1 << 60 : -3;
            for (row = 0; row < rows; row++)
                dev_write((int64_t *)(uintptr_t)d.mask.blocks.row_start + row, &far, 8);
            far = i == 4 ? 0 : far + 3; // every second row not empty
            for (row = 1; row < rows; row += 2)
                dev_write((int64_t *)(uintptr_t)d.mask.blocks.row_start + row, &far, 8);
        }
        DEV(cudaDeviceSynchronize());
        CHECK_EQ(job_upload(&j, &d), ATTN_OK);
        CHECK_EQ(job_run(&j, &d), ATTN_OK);
        dev_sync();
        e = dev_error();
        if (!CHECK(e == (mask == M_BLOCKS ? ATTN_ERR_MASK : ATTN_ERR_PAGE) || (!expected && !e)))
            printf("  bad %s %d: the error word is %d\n", problem_masks[mask], i, e);
        twin_output(&t, x.o, x.lse);
        if (mask != M_BLOCKS) others_same(&p, &base, &x, 1, "a bad page");
        cu.error = NULL; // nobody listens
        CHECK_EQ(job_run(&j, &d), ATTN_OK);
        dev_sync();
        cu.error = error;
        CHECK_EQ(dev_error(), 0);
        CHECK(dev_guards(0));
        dev_release(mark);
        job_free(&j);
    }
    dev_release(0);
    result_free(&base), result_free(&x);
    problem_free(&p);
}

// Slots outside the pool are skipped and reported, negative ones only skipped.
static void errors_slots(attn_dtype type) {
    problem_opts o;
    problem p;
    test_rng r = {78};
    twin t;
    attn_tensor k, v;
    int64_t i, slots_end, *slots, *device;
    int32_t e;
    plain_opts(&o, type, DECODE, M_CAUSAL);
    o.q = o.o = ATTN_BF16;
    problem_make(&p, &o, &r);
    slots_end = (int64_t)p.d.kv.n_pages * 16;
    memset(p.d.kv.k.data, 0xff, attn_kv_page_bytes(&p.d, 0) * (size_t)p.d.kv.n_pages);
    memset(p.d.kv.v.data, 0xff, attn_kv_page_bytes(&p.d, 1) * (size_t)p.d.kv.n_pages);
    twin_make(&t, &p, 1, NULL);
    slots = (int64_t *)malloc(8 * (size_t)p.n_rows);
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32, k.data = p.k_rows;
    v = k, v.data = p.v_rows;
    memcpy(slots, p.slots, 8 * (size_t)p.n_rows);
    for (i = 0; i < p.n_rows; i += 3) slots[i] = -1;
    CHECK_EQ(attn_cpu_store(&p.d, &k, &v, slots, 0, p.n_rows), ATTN_OK);
    for (i = 0; i < p.n_rows; i += 9)
        slots[i] = i % 2 ? slots_end : i % 4 ? INT64_MAX : slots_end + (1 << 20);
    device = (int64_t *)dev_alloc(8 * (size_t)p.n_rows, slots);
    k.data = dev_alloc(4 * (size_t)(p.n_rows * 2 * 64), p.k_rows);
    v.data = dev_alloc(4 * (size_t)(p.n_rows * 2 * 64), p.v_rows);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(attn_cuda_store(&cu, &t.d, NULL, &k, &v, device, 0, p.n_rows, dev_stream), ATTN_OK);
    dev_sync();
    e = dev_error();
    CHECK_EQ(e, ATTN_ERR_PAGE);
    CHECK(twin_pages_equal(&t) && dev_guards(0));
    for (i = 0; i < p.n_rows; i++)
        if (i % 9 == 0) slots[i] = INT64_MIN + i;
    dev_write(device, slots, 8 * (size_t)p.n_rows);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(attn_cuda_store(&cu, &t.d, NULL, &k, &v, device, 0, p.n_rows, dev_stream), ATTN_OK);
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    CHECK(twin_pages_equal(&t));
    dev_release(0);
    free(slots);
    problem_free(&p);
}

static void part_errors(uint64_t seed, uint64_t count) {
    problem_opts o;
    problem p;
    test_rng r = {5};
    twin t;
    job j;
    how h;
    uint8_t *out;
    size_t i;
    (void)seed, (void)count;
    errors_open();
    plain_opts(&o, ATTN_BF16, DECODE, M_CAUSAL);
    o.max_kv = 4000, o.shared = 2048; // long enough to be cut, so that there are partials
    problem_make(&p, &o, &r);
    out = (uint8_t *)malloc((size_t)p.n_tokens * 4 * 64 * 2);
    twin_make(&t, &p, 1, NULL);
    memset(&h, 0, sizeof h);
    h.share = 2;
    job_make(&j, &t.d, &h);
    DEV(cudaDeviceSynchronize());
    errors_plan(&t, &j);
    errors_upload(&t, &j);
    errors_outgrown(&t, &j);
    CHECK_EQ(job_upload(&j, &t.d), ATTN_OK);
    errors_run(&t, &j);
    errors_store(&t, &j);
    errors_pages(&t);
    errors_merge();
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    CHECK(twin_output(&t, out, NULL)); // nothing was written
    for (i = 0; i < (size_t)p.n_tokens * 4 * 64 * 2 && out[i] == 0xff; i++) {
    }
    CHECK(i == (size_t)p.n_tokens * 4 * 64 * 2);
    CHECK(twin_pages_equal(&t) && dev_guards(0));
    CHECK_EQ(job_run(&j, &t.d), ATTN_OK); // and it is all still in order
    dev_sync();
    CHECK(twin_output(&t, out, NULL) && !(out[0] == 0xff && out[1] == 0xff));
    dev_release(0);
    free(out);
    job_free(&j);
    problem_free(&p);
    errors_slots(ATTN_BF16);
    errors_slots(ATTN_I8);
    errors_tables(ATTN_BF16, M_CAUSAL, 0);
    errors_tables(ATTN_F32, M_CAUSAL, 0);
    errors_tables(ATTN_BF16, M_BLOCKS, 0);
    errors_tables(ATTN_BF16, M_BLOCKS, 64); // whole blocks are found in another way
    errors_tables(ATTN_F32, M_BLOCKS, 0);
}

// ---- store, copy_pages, swap_pages

static const attn_dtype all_types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                       ATTN_F8E5M2, ATTN_I8,  ATTN_I4};

// Rows of every kind of value: ties, zeros, denormals, huge ones, and (wild) Inf and NaN.
static void odd_rows(float *x, int64_t rows, int32_t dim, int wild, test_rng *r) {
    int64_t i;
    int32_t e;
    for (i = 0; i < rows; i++) {
        int kind = test_below(r, wild ? 9 : 7);
        for (e = 0; e < dim; e++) {
            float *y = x + i * dim + e;
            if (kind == 1) *y = 0;
            if (kind == 2) *y *= 1e-40f;
            if (kind == 3) *y *= 1e37f;
            if (kind == 4) *y = (float)(test_below(r, 255) - 127) * 0.5f; // ties
            if (kind == 5) *y *= 6e-5f;                                   // denormal in f16
            if (kind == 6 && e % 3) *y = -0.0f;
            if (kind == 7 && test_below(r, 9) == 0) *y = test_below(r, 2) ? INFINITY : -INFINITY;
            if (kind == 8 && test_below(r, 9) == 0) *y = attni_float(0xffc01234u);
        }
    }
}

static void store_case(attn_dtype type, attn_layout layout, attn_dtype src, int wild, test_rng *r) {
    static const int32_t dims[] = {8, 40, 64, 128};
    problem_opts o;
    sample s;
    twin t;
    attn_tensor k, v;
    memset(&s, 0, sizeof s);
    plain_opts(&o, type, DECODE, M_CAUSAL);
    o.q = o.o = ATTN_F32;
    o.layout = layout, o.max_kv = 90;
    o.page_tokens = test_below(r, 2) ? 16 : 7;
    o.head_dim = dims[test_below(r, 4)], o.v_head_dim = dims[test_below(r, 4)];
    o.head_scale = test_below(r, 3) == 0;
    o.n_kv_heads = 1 + test_below(r, 3), o.n_heads = o.n_kv_heads;
    problem_make(&s.p, &o, r);
    s.src = src;
    odd_rows(s.p.k_rows, s.p.n_rows * o.n_kv_heads, o.head_dim, wild, r);
    odd_rows(s.p.v_rows, s.p.n_rows * o.n_kv_heads, o.v_head_dim, wild, r);
    s.k = rows_as(s.p.k_rows, s.p.n_rows * o.n_kv_heads * o.head_dim, src);
    s.v = rows_as(s.p.v_rows, s.p.n_rows * o.n_kv_heads * o.v_head_dim, src);
    memset(&k, 0, sizeof k);
    k.dtype = src, k.data = s.k;
    v = k, v.data = s.v;
    CHECK_EQ(attn_cpu_store(&s.p.d, &k, &v, s.p.slots, 0, s.p.n_rows), ATTN_OK);
    twin_make(&t, &s.p, 0, r);
    sample_store(&s, &t, r);
    if (!CHECK(twin_pages_equal(&t)))
        printf("  %s layout %d from %s, d %d/%d, head scales %d, Inf and NaN %d\n",
               attn_dtype_name(type), layout, attn_dtype_name(src), o.head_dim, o.v_head_dim,
               o.head_scale, wild);
    dev_release(0);
    sample_free(&s);
}

// The query tokens' own rows, by the uploaded tables; inside a captured graph.
static void store_own(attn_dtype type, test_rng *r) {
    problem_opts o;
    problem p;
    twin t;
    job j;
    how h;
    attn_tensor k, v, dk, dv;
    int32_t s, x, n_kv;
    int64_t at = 0, *slots;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float *kr, *vr;
    memset(&h, 0, sizeof h);
    plain_opts(&o, type, CHUNKED, M_CAUSAL);
    o.q = o.o = ATTN_BF16, o.evicted = 1;
    problem_make(&p, &o, r);
    n_kv = o.n_kv_heads * 64;
    slots = (int64_t *)malloc(8 * (size_t)p.n_rows);
    kr = (float *)malloc(4 * (size_t)(p.n_tokens * n_kv));
    vr = (float *)malloc(4 * (size_t)(p.n_tokens * n_kv));
    memcpy(slots, p.slots, 8 * (size_t)p.n_rows);
    for (s = 0; s < o.n_seq; s++) {
        int32_t q = p.d.q_start[s + 1] - p.d.q_start[s];
        at += p.d.kv.kv_len[s] - q;
        for (x = 0; x < q; x++, at++) {
            size_t to = (size_t)((p.d.q_start[s] + x) * n_kv), from = (size_t)(at * n_kv);
            memcpy(kr + to, p.k_rows + from, 4 * (size_t)n_kv);
            memcpy(vr + to, p.v_rows + from, 4 * (size_t)n_kv);
            slots[at] = -1;
        }
    }
    memset(p.d.kv.k.data, 0xff, attn_kv_page_bytes(&p.d, 0) * (size_t)p.d.kv.n_pages);
    memset(p.d.kv.v.data, 0xff, attn_kv_page_bytes(&p.d, 1) * (size_t)p.d.kv.n_pages);
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = dk = dv = k;
    k.data = p.k_rows, v.data = p.v_rows;
    CHECK_EQ(attn_cpu_store(&p.d, &k, &v, slots, 0, p.n_rows), ATTN_OK);
    twin_make(&t, &p, 1, r);
    k.data = kr, v.data = vr;
    dk.data = dev_alloc(4 * (size_t)(p.n_tokens * n_kv), kr);
    dv.data = dev_alloc(4 * (size_t)(p.n_tokens * n_kv), vr);
    CHECK_EQ(attn_cpu_store(&p.d, &k, NULL, NULL, 0, p.n_tokens), ATTN_OK);
    CHECK_EQ(attn_cpu_store(&p.d, NULL, &v, NULL, 1, p.n_tokens - 1), ATTN_OK);
    job_make(&j, &t.d, &h);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(job_upload(&j, &t.d), ATTN_OK);
    DEV(cudaStreamBeginCapture(dev_stream, cudaStreamCaptureModeGlobal));
    CHECK_EQ(attn_cuda_store(&cu, &t.d, &j.g, &dk, NULL, NULL, 0, p.n_tokens, dev_stream), ATTN_OK);
    CHECK_EQ(attn_cuda_store(&cu, &t.d, &j.g, NULL, &dv, NULL, 1, p.n_tokens - 1, dev_stream),
             ATTN_OK);
    DEV(cudaStreamEndCapture(dev_stream, &graph));
    DEV(cudaGraphInstantiate(&exec, graph, 0));
    DEV(cudaGraphLaunch(exec, dev_stream));
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    if (!CHECK(twin_pages_equal(&t))) printf("  own rows, %s\n", attn_dtype_name(type));
    CHECK(dev_guards(0));
    DEV(cudaGraphExecDestroy(exec));
    DEV(cudaGraphDestroy(graph));
    dev_release(0);
    job_free(&j);
    free(slots), free(kr), free(vr);
    problem_free(&p);
}

static void part_store(uint64_t seed, uint64_t count) {
    static const attn_dtype sources[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    test_rng r;
    int type, layout, src;
    (void)count;
    r.state = seed;
    for (type = 0; type < 7; type++) {
        for (layout = 0; layout < 2; layout++)
            for (src = 0; src < 6; src++)
                store_case(all_types[type], (attn_layout)layout, sources[src % 3], src / 3, &r);
        store_own(all_types[type], &r);
    }
}

// Lists in which one copy reads what another wrote, eager and captured; pages to the host and back.
static void copies_case(attn_dtype type, attn_layout layout, test_rng *r) {
    static const int32_t lengths[] = {1, 2, 9, 40, 700};
    attn_page_copy *list, *mine;
    problem_opts o;
    problem p;
    twin t;
    int32_t n = lengths[test_below(r, 5)], i, pt, *ids, n_ids;
    size_t bytes = (size_t)n * sizeof *list, e;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    uint8_t *host[2];
    int round, v, ok = 1;
    plain_opts(&o, type, DECODE, M_CAUSAL);
    o.q = o.o = ATTN_F32;
    o.layout = layout, o.max_kv = test_below(r, 2) ? 40 : 300;
    o.page_tokens = pt = test_below(r, 2) ? 16 : 5;
    o.head_dim = 40, o.v_head_dim = test_below(r, 2) ? 40 : 64;
    o.head_scale = test_below(r, 3) == 0;
    problem_make(&p, &o, r);
    twin_make(&t, &p, 1, NULL);
    list = (attn_page_copy *)malloc(bytes), mine = (attn_page_copy *)malloc(bytes);
    for (round = 0; round < 2; round++) {
        for (i = 0; i < n; i++) {
            mine[i].src = i && test_below(r, 2) ? mine[i - 1].dst : test_below(r, p.d.kv.n_pages);
            mine[i].dst = test_below(r, p.d.kv.n_pages);
            mine[i].n_tokens = test_below(r, 3) ? pt : test_below(r, pt + 1);
        }
        memcpy(list, mine, bytes);
        CHECK_EQ(attn_cpu_copy_pages(&p.d, mine, n), ATTN_OK);
        DEV(cudaDeviceSynchronize());
        if (round) DEV(cudaStreamBeginCapture(dev_stream, cudaStreamCaptureModeGlobal));
        CHECK_EQ(attn_cuda_copy_pages(&cu, &t.d, list, n, dev_stream), ATTN_OK);
        memset(list, 0xff, bytes); // the caller's again
        if (round) {
            DEV(cudaStreamEndCapture(dev_stream, &graph));
            DEV(cudaGraphInstantiate(&exec, graph, 0));
            DEV(cudaGraphLaunch(exec, dev_stream));
        }
        dev_sync();
        if (round) {
            DEV(cudaGraphExecDestroy(exec));
            DEV(cudaGraphDestroy(graph));
        }
        if (!CHECK(twin_pages_equal(&t)))
            printf("  %d copies, %s layout %d pages of %d\n", n, attn_dtype_name(type), layout, pt);
    }
    n_ids = 1 + test_below(r, p.d.kv.n_pages);
    ids = (int32_t *)malloc(4 * (size_t)p.d.kv.n_pages);
    for (i = 0; i < p.d.kv.n_pages; i++) ids[i] = i;
    for (i = p.d.kv.n_pages - 1; i > 0; i--) {
        int32_t x = test_below(r, i + 1), y = ids[x];
        ids[x] = ids[i], ids[i] = y;
    }
    for (v = 0; v < 2; v++) host[v] = (uint8_t *)dev_new((size_t)n_ids * t.page_bytes[v], NULL, 1);
    CHECK_EQ(attn_cuda_swap_pages(&cu, &t.d, ids, n_ids, host[0], host[1], 1, dev_stream), ATTN_OK);
    dev_sync();
    for (v = 0; v < 2; v++)
        for (i = 0; i < n_ids; i++) {
            size_t b = t.page_bytes[v];
            uint8_t *data = (uint8_t *)(v ? t.d.kv.v.data : t.d.kv.k.data) + (size_t)ids[i] * b;
            ok &=
                memcmp(host[v] + (size_t)i * b,
                       (uint8_t *)(v ? p.d.kv.v.data : p.d.kv.k.data) + (size_t)ids[i] * b, b) == 0;
            dev_fill(data, 0x11, b);
            for (e = 0; e < b; e++)
                host[v][(size_t)i * b + e] ^= 0x40; // what comes back is told apart
            for (e = 0; e < b; e++)
                ((uint8_t *)(v ? p.d.kv.v.data : p.d.kv.k.data))[(size_t)ids[i] * b + e] ^= 0x40;
        }
    CHECK(ok);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(attn_cuda_swap_pages(&cu, &t.d, ids, n_ids, host[0], host[1], 0, dev_stream), ATTN_OK);
    dev_sync();
    CHECK(twin_pages_equal(&t) && dev_guards(0));
    dev_release(0);
    free(list), free(mine), free(ids);
    problem_free(&p);
}

static void part_copies(uint64_t seed, uint64_t count) {
    test_rng r;
    int i, n = (int)attni_min64((int64_t)count / 3 + 7, 56);
    r.state = seed;
    for (i = 0; i < n; i++) copies_case(all_types[i % 7], (attn_layout)(i / 7 % 2), &r);
}

// ---- merge

static void merge_case(test_rng *r) {
    static const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    static const int32_t dims[] = {8, 64, 128, 512, 40};
    int32_t n = 1 + test_below(r, 16), heads = 1 + test_below(r, 9), dim = dims[test_below(r, 5)];
    int32_t tokens = 1 + test_below(r, 30), i, x, e,
            into = test_below(r, 2) ? -1 : test_below(r, n);
    int64_t rows = (int64_t)tokens * heads, at;
    attn_tensor o[16], out;
    const float *lse[16];
    uint8_t *base, *o_base = NULL, *got;
    size_t bytes, o_bytes = 0;
    int64_t first, o_first = 0;
    float *host[16], *l[16], *lse_out, *lse_got;
    double worst = 0, eps;
    int ok = 1;
    attn_dtype type = types[test_below(r, 3)];
    memset(&out, 0, sizeof out);
    out.dtype = type;
    twin_view(&out, tokens, heads, dim, NULL, test_below(r, 2) ? r : NULL, &o_base, &o_bytes,
              &o_first);
    for (i = 0; i < n; i++) {
        void *m;
        host[i] = (float *)malloc(4 * (size_t)(rows * dim));
        l[i] = (float *)malloc(4 * (size_t)rows);
        memset(&o[i], 0, sizeof o[i]);
        o[i].dtype = i == into ? type : types[test_below(r, 3)];
        test_fill_normal(r, host[i], (size_t)(rows * dim), 1);
        for (x = 0; x < rows; x++) {
            l[i][x] = (float)test_uniform(r, -30, 30);
            if (test_below(r, 4) == 0) l[i][x] = -INFINITY;
            if (test_below(r, 9) == 0) l[i][x] = (float)test_uniform(r, -3e4, 3e4);
            if (x == 0) l[i][x] = -INFINITY; // one row has seen nothing anywhere
            for (e = 0; e < dim; e++)        // what a state without keys holds does not count
                if (l[i][x] == -INFINITY) host[i][x * dim + e] = test_below(r, 2) ? NAN : INFINITY;
        }
        m = rows_as(host[i], rows * dim, o[i].dtype);
        for (at = 0; at < rows * dim; at++) host[i][at] = attni_get(m, o[i].dtype, at);
        if (i == into) {
            o[i] = out;
            base = (uint8_t *)malloc(o_bytes);
            memset(base, 0xff, o_bytes);
            for (x = 0; x < rows; x++) {
                int64_t sh = out.stride_head ? out.stride_head : dim;
                int64_t st = out.stride_token ? out.stride_token : heads * sh;
                memcpy(base + (size_t)(o_first + x / heads * st + x % heads * sh) *
                                  element_bytes(type),
                       (uint8_t *)m + (size_t)(x * dim) * element_bytes(type),
                       (size_t)dim * element_bytes(type));
            }
            dev_write(o_base, base, o_bytes);
            free(base);
        } else
            twin_view(&o[i], tokens, heads, dim, m, test_below(r, 2) ? r : NULL, &base, &bytes,
                      &first);
        lse[i] = (float *)dev_alloc(4 * (size_t)rows, l[i]);
        free(m);
    }
    lse_out =
        into >= 0 ? (float *)(uintptr_t)lse[into] : (float *)dev_alloc(4 * (size_t)rows, NULL);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(attn_cuda_merge(&cu, o, lse, n, tokens, heads, dim, &out,
                             test_below(r, 5) || into >= 0 ? lse_out : (lse_out = NULL),
                             dev_stream),
             ATTN_OK);
    dev_sync();
    got = (uint8_t *)malloc(o_bytes);
    lse_got = (float *)malloc(4 * (size_t)rows);
    dev_read(got, o_base, o_bytes);
    if (lse_out) dev_read(lse_got, lse_out, 4 * (size_t)rows);
    eps = type == ATTN_F32 ? 0 : type == ATTN_F16 ? 4.9e-4 : 3.92e-3;
    for (x = 0; x < rows; x++) {
        int64_t sh = out.stride_head ? out.stride_head : dim;
        int64_t st = out.stride_token ? out.stride_token : heads * sh;
        double top = -HUGE_VAL, sum = 0;
        for (i = 0; i < n; i++)
            if (l[i][x] > top) top = l[i][x];
        for (i = 0; i < n; i++)
            if (l[i][x] > -HUGE_VAL) sum += exp(l[i][x] - top);
        if (lse_out && sum > 0) ok &= fabs(lse_got[x] - (top + log(sum))) < 1e-5 + 2e-7 * fabs(top);
        if (lse_out && sum == 0) ok &= lse_got[x] == -INFINITY;
        for (e = 0; e < dim; e++) {
            double want = 0, size = 0, rest = sum > 0 ? 1e-5 + 3e-7 * fabs(top) : 0, d;
            float y = attni_get(got, type, o_first + x / heads * st + x % heads * sh + e);
            for (i = 0; i < n; i++)
                if (l[i][x] > -HUGE_VAL) {
                    double w = exp(l[i][x] - top) / sum;
                    want += w * host[i][x * dim + e];
                    size += w * fabs(host[i][x * dim + e]);
                }
            d = fabs(y - want);
            // a fold keeps the running log in f32, which costs weights its rounding
            if (!(d <= eps * fabs(want) + rest * size + 6e-8)) ok = 0;
            if (d > worst) worst = d;
        }
        // the row's place becomes 0xff: what is left are gaps
        memset(got + (size_t)(o_first + x / heads * st + x % heads * sh) * element_bytes(type),
               0xff, (size_t)dim * element_bytes(type));
    }
    for (at = 0; at < (int64_t)o_bytes; at++) ok &= got[at] == 0xff;
    if (!CHECK(ok))
        printf("  merge of %d states, %d x %d x %d, into %s%s: worst %g\n", n, tokens, heads, dim,
               attn_dtype_name(type), into >= 0 ? " (in place)" : "", worst);
    CHECK(dev_guards(0));
    dev_release(0);
    for (i = 0; i < n; i++) free(host[i]), free(l[i]);
    free(got), free(lse_got);
}

static void part_merge(uint64_t seed, uint64_t count) {
    test_rng r;
    int i, n = (int)attni_min64((int64_t)count, 60);
    r.state = seed;
    for (i = 0; i < n; i++) merge_case(&r);
}

// ---- Delta correction: the CPU's bits

// A plan of d and its run, to its o.
static void delta_run(const attn_desc *d) {
    const int mark = dev_n;
    how h;
    job j;
    memset(&h, 0, sizeof h);
    job_make(&j, d, &h);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(job_upload(&j, d), ATTN_OK);
    CHECK_EQ(job_run(&j, d), ATTN_OK);
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    dev_release(mark);
    job_free(&j);
}

// The dense rows in two ways: over one page table for all, as they come, and over one for each.
static void delta_rows(const attn_desc *dense, const uint8_t *base, size_t bytes) {
    const int32_t n = dense->n_seq, len = dense->kv.kv_len[0], pt = dense->kv.page_tokens;
    const int32_t pages = (len + pt - 1) / pt;
    int32_t *table = (int32_t *)malloc(4 * (size_t)n * (size_t)(pages + 1)), i;
    uint8_t *one = (uint8_t *)malloc(2 * bytes), *each = one + bytes;
    attn_desc d = *dense;
    for (i = 0; i < n; i++)
        memcpy(table + i * pages, dense->kv.page_table, 4 * (size_t)pages);
    d.kv.page_table = table;
    d.kv.page_table_stride = pages;
    delta_run(&d);
    dev_read(each, base, bytes);
    delta_run(dense);
    dev_read(one, base, bytes);
    CHECK(memcmp(one, each, bytes) == 0);
    free(table), free(one);
}

static void delta_case(uint64_t seed) {
    problem_opts o;
    problem p;
    test_rng r;
    twin t;
    result x;
    how h;
    attn_tensor delta, host_delta;
    attn_desc dense, host;
    uint8_t *base, *both[2];
    size_t bytes, i;
    int64_t first;
    int32_t s, step, q_len, n, cut, *tables, interpolate;
    r.state = seed;
    memset(&h, 0, sizeof h);
    if (seed % 2) tensor_opts(&r, &o);
    else problem_random(&r, &o);
    if (o.layout == ATTN_K16) o.layout = ATTN_HEAD_MAJOR;
    if (o.mask == M_TREE || o.mask == M_TREE_ALL) o.mask = M_STRIDE;
    if (o.phase == DECODE) o.phase = CHUNKED;
    o.numerics = ATTN_NUMERICS_FAST;
    o.bias = 0;
    problem_make(&p, &o, &r);
    twin_make(&t, &p, 1, &r);
    result_make(&x, &p);
    twin_run(&t, &h, x.o, x.lse);
    s = test_below(&r, p.d.n_seq);
    q_len = p.d.q_start[s + 1] - p.d.q_start[s];
    step = 1 + test_below(&r, test_below(&r, 2) ? 8 : 100);
    interpolate = test_below(&r, 2);
    n = q_len > 0 ? (q_len - 1) / step + 1 : 0;
    tables = (int32_t *)malloc(4 * (size_t)(4 * n + 2));
    memset(&delta, 0, sizeof delta);
    delta.dtype = test_below(&r, 2) ? ATTN_F32 : o.o;
    twin_view(&delta, n, o.n_heads, o.v_head_dim, NULL, &r, &base, &bytes, &first);
    CHECK_EQ(attn_cuda_delta_take(&cu, &t.d, s, step, &delta, 0, n + 1, dev_stream),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_delta_add(&cu, &t.d, s, 0, 0, &delta, 0, n, dev_stream), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_delta_add(&cu, &t.d, p.d.n_seq, step, 0, &delta, 0, n, dev_stream),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_delta_take(&cu, &t.d, s, step, &delta, INT32_MAX, INT32_MAX, dev_stream),
             ATTN_ERR_ARGUMENT);
    if (!n) goto done;
    CHECK_EQ(attn_delta_desc(&t.d, s, step, &delta, tables, &dense), ATTN_OK);
    delta_rows(&dense, base, bytes);
    host = p.d, host_delta = delta;
    both[0] = (uint8_t *)malloc(t.o_bytes), both[1] = (uint8_t *)malloc(bytes);
    dev_read(both[0], t.o_base, t.o_bytes), dev_read(both[1], base, bytes);
    host.o = t.d.o;
    host.o.data = both[0] + (size_t)t.o_first * element_bytes(o.o);
    host_delta.data = both[1] + (size_t)first * element_bytes(delta.dtype);
    CHECK_EQ(attn_cpu_delta_take(&host, s, step, &host_delta, 0, n), ATTN_OK);
    CHECK_EQ(attn_cpu_delta_add(&host, s, step, interpolate, &host_delta, 0, n), ATTN_OK);
    cut = test_below(&r, n + 1);
    CHECK_EQ(attn_cuda_delta_take(&cu, &t.d, s, step, &delta, cut, n - cut, dev_stream), ATTN_OK);
    CHECK_EQ(attn_cuda_delta_take(&cu, &t.d, s, step, &delta, 0, cut, dev_stream), ATTN_OK);
    cut = test_below(&r, n + 1);
    CHECK_EQ(attn_cuda_delta_add(&cu, &t.d, s, step, interpolate, &delta, cut, n - cut, dev_stream),
             ATTN_OK);
    CHECK_EQ(attn_cuda_delta_add(&cu, &t.d, s, step, interpolate, &delta, 0, cut, dev_stream),
             ATTN_OK);
    dev_sync();
    {
        uint8_t *m = (uint8_t *)malloc(t.o_bytes + bytes);
        dev_read(m, t.o_base, t.o_bytes);
        dev_read(m + t.o_bytes, base, bytes);
        for (i = 0; i < t.o_bytes && m[i] == both[0][i];) i++;
        if (!CHECK(i == t.o_bytes)) describe(&o, seed, "delta");
        for (i = 0; i < bytes && m[t.o_bytes + i] == both[1][i];) i++;
        if (!CHECK(i == bytes)) describe(&o, seed, "delta");
        free(m);
    }
    CHECK(dev_guards(0));
    free(both[0]), free(both[1]);
done:
    dev_release(0);
    free(tables);
    result_free(&x);
    problem_free(&p);
}

static void part_delta(uint64_t seed, uint64_t count) {
    uint64_t i;
    for (i = 0; i < count / 4 + 2; i++) delta_case(seed + i);
}

// ---- summaries: the CPU's bits

// All that is held, as new tokens of two steps.
static void summary_case(uint64_t seed) {
    problem_opts o;
    problem p;
    test_rng r;
    twin t;
    attn_summary host, there;
    size_t bytes;
    uint8_t *m;
    int32_t *q_start, *q_pos0, *len, s, step;
    r.state = seed;
    if (seed % 2) tensor_opts(&r, &o);
    else problem_random(&r, &o);
    if (o.layout == ATTN_K16) o.layout = ATTN_HEAD_MAJOR;
    o.mask = M_CAUSAL;
    o.numerics = ATTN_NUMERICS_FAST;
    o.phase = test_below(&r, 2) ? CHUNKED : PREFILL;
    o.bias = 0;
    problem_make(&p, &o, &r);
    twin_make(&t, &p, 1, &r);
    bytes = attn_summary_bytes(&p.d);
    host.data = (uint16_t *)problem_alloc(&p, bytes);
    m = (uint8_t *)malloc(bytes);
    memset(host.data, 0, bytes);
    there.data = (uint16_t *)dev_alloc(bytes, host.data);
    q_start = (int32_t *)problem_alloc(&p, 4 * (size_t)(p.d.n_seq + 1));
    q_pos0 = (int32_t *)problem_alloc(&p, 4 * (size_t)p.d.n_seq);
    len = (int32_t *)problem_alloc(&p, 4 * (size_t)p.d.n_seq);
    for (step = 0; step < 2; step++) {
        const int mark = dev_n;
        attn_desc a = p.d, b;
        how h;
        job j;
        memset(&h, 0, sizeof h);
        h.max = test_below(&r, 2);
        for (s = 0; s < p.d.n_seq; s++) { // the tokens before this step's queries, then these
            const int32_t q = p.d.q_start[s + 1] - p.d.q_start[s], pos0 = p.d.kv.kv_pos0[s];
            const int32_t before = p.d.kv.kv_len[s] - q;
            len[s] = step ? before + q : before;
            q_pos0[s] = step ? pos0 + before : pos0;
            q_start[s + 1] = q_start[s] + (step ? q : before);
        }
        a.q_start = q_start, a.q_pos0 = q_pos0, a.kv.kv_len = len;
        b = t.d;
        b.q_start = q_start, b.q_pos0 = q_pos0, b.kv.kv_len = len;
        b.q.stride_token = b.o.stride_token = 0, b.q.stride_head = b.o.stride_head = 0;
        CHECK_EQ(attn_cpu_summarize(&a, &host, 0, attn_cpu_summarize_units(&a)), ATTN_OK);
        job_make(&j, &b, &h);
        DEV(cudaDeviceSynchronize());
        if (j.plan && CHECK_EQ(job_upload(&j, &b), ATTN_OK)) {
            CHECK_EQ(attn_cuda_summarize(&cu, &b, &j.g, NULL, dev_stream), ATTN_ERR_ARGUMENT);
            CHECK_EQ(attn_cuda_summarize(&cu, &b, &j.g, &there, dev_stream), ATTN_OK);
        }
        dev_sync();
        CHECK_EQ(dev_error(), 0);
        dev_read(m, there.data, bytes);
        if (!CHECK(memcmp(m, host.data, bytes) == 0)) describe(&o, seed, "summary");
        CHECK(dev_guards(0));
        dev_release(mark);
        job_free(&j);
    }
    dev_release(0);
    free(m);
    problem_free(&p);
}

static void part_summary(uint64_t seed, uint64_t count) {
    uint64_t i;
    for (i = 0; i < count / 3 + 2; i++) summary_case(seed + i);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*part)(uint64_t seed, uint64_t count);
    } parts[] = {{"store", part_store},   {"copies", part_copies},
                 {"merge", part_merge},   {"delta", part_delta},
                 {"summary", part_summary},
                 {"differential", part_differential},
                 {"tensor", part_tensor}, {"large", part_large},
                 {"lists", part_lists},   {"relist", part_relist},
                 {"bits", part_bits},     {"graph", part_graph},
                 {"layers", part_layers}, {"nan", part_nan},
                 {"errors", part_errors}}; // a fault there ends it all
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 150);
    int i, found = 0, status = dev_open();
    if (status == 77) return 77;
    for (i = 0; i < (int)(sizeof parts / sizeof parts[0]) && status == 0; i++) {
        double start = seconds();
        long long failed = test_failed;
        if (argc > 3 && strcmp(argv[3], parts[i].name) != 0) continue;
        found = 1;
        parts[i].part(seed, count);
        printf("%s: %s, %.1f s\n", parts[i].name, test_failed > failed ? "failed" : "passed",
               seconds() - start);
        fflush(stdout);
    }
    CHECK(found || status);
    return TEST_END();
}

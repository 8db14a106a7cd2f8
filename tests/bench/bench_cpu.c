/* bench_cpu.c - attn_cpu.h against the ceilings of the machine it runs on, in one table.
   cc -O2 -std=gnu11 -I. -Itests tests/bench/bench_cpu.c -o bench_cpu -lm -lpthread
   bench_cpu [--quick] [--only SUBSTRING] [--threads N] [--seconds PER-ROW] [--lists [QUERIES]]
             [--crossing]

   Every row interleaves its repeats with samples of its ceiling and compares medians, so neighbours
   on the machine disturb both alike. Inputs are random normal; KV is paged (64 tokens, shuffled
   pages, head-major, for decode with K in tiles of 16 tokens, unless the row says otherwise), and
   decode walks through copies that together exceed the last cache. The first output of a row is
   checked against attn_ref_forward on sampled tokens: a wrong result is never timed. Plans are
   made once, as for the layers of a model; merging counts. Targets are those of the project's
   performance notes; a fraction of the ceiling, else as printed.

   --lists: a second table instead, of attention over block lists as selectors make them against
   dense attention, with QUERIES the last so many queries of a prefill only. --crossing: the same
   for selectors alone, from 1k to 32k tokens: from where on selecting and reading less is faster
   than reading everything. In decode select ms is a step's mean over the refresh schedule. */
#define ATTN_IMPLEMENTATION
#define ATTN_STATIC
#include "bench.h"
#include "test.h"
#include "attn.h"
#include "attn_cpu.h"

enum kind { SPEED, LATENCY, SCALING, BLOCKS, PLAN };

typedef struct row {
    const char *regime;
    enum kind kind;
    int dim, heads, kv_heads;
    int n_seq, n_q, kv,
        prefix; // per sequence: queries, KV tokens, the first `prefix` of them shared
    attn_dtype kv_type, qo_type;
    int threads; // 1, or 2: as many as --threads says
    int ceiling;
    double target, excellent; // fraction; ms; ratio
    int quick;                // also under --quick
    attn_layout layout;
    int page;         // 0: contiguous
    attn_cpu_isa isa; // AUTO: the best without AMX
    attn_numerics numerics;
    int density; // BLOCKS: % of blocks kept
} row;

#define HM ATTN_HEAD_MAJOR
#define F32 ATTN_F32
#define F16 ATTN_F16
#define BF16 ATTN_BF16
// clang-format off
#define PAGED HM, 64, ATTN_CPU_AUTO, ATTN_NUMERICS_FAST, 0
#define TILED ATTN_K16, 64, ATTN_CPU_AUTO, ATTN_NUMERICS_FAST, 0
enum { C_NONE = BENCH_NONE, C_FMA = BENCH_FMA, C_YMM = BENCH_YMM, C_BF16 = BENCH_BF16,
       C_AMX = BENCH_AMX, C_READ = BENCH_READ };
static const row rows[] = {
    // regime, kind, D, heads, kv_heads, n_seq, n_q, kv, prefix, KV, QO, threads, ceiling,
    // target, excellent, quick, layout, page, isa, numerics, density
    {"prefill", SPEED, 128, 32, 8, 1, 2048, 2048, 0, F32, F32, 1, C_FMA, .80, .85, 1, PAGED},
    {"prefill", SPEED, 128, 32, 8, 1, 2048, 2048, 0, F16, F32, 1, C_FMA, .80, .85, 1, PAGED},
    {"prefill", SPEED, 64, 32, 8, 1, 2048, 2048, 0, F32, F32, 1, C_FMA, .75, .80, 0, PAGED},
    {"prefill", SPEED, 64, 32, 8, 1, 2048, 2048, 0, F16, F32, 1, C_FMA, .75, .80, 0, PAGED},
    {"prefill", SPEED, 128, 32, 8, 1, 512, 512, 0, F32, F32, 1, C_FMA, .70, .76, 0, PAGED},
    {"prefill", SPEED, 128, 32, 8, 1, 512, 512, 0, F16, F32, 1, C_FMA, .70, .76, 0, PAGED},
    {"prefill bf16", SPEED, 128, 32, 8, 1, 2048, 2048, 0, BF16, BF16, 1, C_BF16, .72, .78, 1,
     PAGED},
    {"prefill bf16", SPEED, 64, 32, 8, 1, 2048, 2048, 0, BF16, BF16, 1, C_BF16, .65, .70, 0, PAGED},
    {"prefill bf16 by f32 FMA", SPEED, 128, 32, 8, 1, 2048, 2048, 0, BF16, BF16, 1, C_FMA, 0, 0, 0,
     HM, 64, ATTN_CPU_AVX512, 0, 0},
    {"prefill AMX", SPEED, 128, 32, 8, 1, 2048, 2048, 0, BF16, BF16, 1, C_AMX, .40, .55, 1,
     HM, 64, ATTN_CPU_AMX, 0, 0},
    {"prefill AMX", SPEED, 64, 32, 8, 1, 2048, 2048, 0, BF16, BF16, 1, C_AMX, .40, .55, 0,
     HM, 64, ATTN_CPU_AMX, 0, 0},
    {"prefill int8", SPEED, 128, 32, 8, 1, 2048, 2048, 0, ATTN_I8, BF16, 1, C_FMA, 1.0, 1.3, 1,
     PAGED},
    {"prefill int8 approx", SPEED, 128, 32, 8, 1, 2048, 2048, 0, ATTN_I8, BF16, 1,
     C_FMA, 1.0, 1.3, 0, HM, 64, 0, ATTN_NUMERICS_APPROX, 0},
    {"prefill AVX2", SPEED, 128, 32, 8, 1, 2048, 2048, 0, F32, F32, 1, C_YMM, .78, .83, 1,
     HM, 64, ATTN_CPU_AVX2, 0, 0},
    {"prefill AVX2", SPEED, 128, 32, 8, 1, 2048, 2048, 0, F16, F32, 1, C_YMM, .78, .83, 0,
     HM, 64, ATTN_CPU_AVX2, 0, 0},
    {"prefill 1 -> N cores", SCALING, 128, 32, 8, 1, 2048, 2048, 0, F32, F32, 2,
     C_FMA, 1.9, 1.97, 1, PAGED},
    {"prefill 1 -> N cores", SCALING, 128, 32, 8, 1, 2048, 2048, 0, BF16, BF16, 2,
     C_BF16, 1.9, 1.97, 0, PAGED},
    {"few queries", LATENCY, 128, 32, 8, 1, 8, 4096, 0, F16, F32, 1, C_FMA, 4, 3, 1, PAGED},
    {"few queries", LATENCY, 128, 32, 8, 1, 8, 4096, 0, BF16, BF16, 1, C_BF16, 4, 2, 1, PAGED},
    {"shared prefix, M 128", SPEED, 128, 32, 8, 32, 1, 2112, 2048, F16, F32, 1, C_FMA, .65, .78, 1,
     PAGED},
    {"shared prefix, M 128", SPEED, 128, 32, 8, 32, 1, 2112, 2048, BF16, BF16, 1,
     C_FMA, .65, .78, 0, PAGED},
    {"shared prefix, M 32", SPEED, 128, 16, 16, 32, 1, 2112, 2048, F16, F32, 1, C_FMA, .65, .78, 0,
     PAGED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, .80, .90, 1, TILED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 4096, 0, BF16, BF16, 1, C_READ, .80, .90, 1, TILED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 16384, 0, F16, F32, 1, C_READ, .80, .90, 0, TILED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 16384, 0, BF16, BF16, 1, C_READ, .80, .90, 0, TILED},
    {"decode", SPEED, 64, 32, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, .88, .95, 0, TILED},
    {"decode", SPEED, 64, 32, 8, 1, 1, 4096, 0, BF16, BF16, 1, C_READ, .88, .95, 0, TILED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 2, C_READ, .80, .90, 1, TILED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 4096, 0, BF16, BF16, 2, C_READ, .80, .90, 0, TILED},
    {"decode", SPEED, 128, 32, 8, 1, 1, 16384, 0, F16, F32, 2, C_READ, .80, .90, 0, TILED},
    {"decode GQA 8", SPEED, 128, 64, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, .65, .80, 1, TILED},
    {"decode GQA 8", SPEED, 128, 64, 8, 1, 1, 4096, 0, BF16, BF16, 1, C_READ, .65, .80, 0, TILED},
    {"decode int8", SPEED, 128, 32, 8, 1, 1, 4096, 0, ATTN_I8, BF16, 1, C_READ, .60, .75, 1, TILED},
    {"decode fp8", SPEED, 128, 32, 8, 1, 1, 4096, 0, ATTN_F8E4M3, BF16, 1, C_READ, .60, .75, 1,
     TILED},
    {"decode int4", SPEED, 128, 32, 8, 1, 1, 4096, 0, ATTN_I4, BF16, 1, C_READ, .60, .75, 1, TILED},
    {"decode head-major", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, .80, .90, 1,
     PAGED},
    {"decode head-major", SPEED, 128, 32, 8, 1, 1, 4096, 0, BF16, BF16, 1, C_READ, .80, .90, 0,
     PAGED},
    {"decode head-major", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 2, C_READ, .80, .90, 0,
     PAGED},
    {"decode head-major int8", SPEED, 128, 32, 8, 1, 1, 4096, 0, ATTN_I8, BF16, 1, C_READ, .60, .75,
     0, PAGED},
    {"decode head-major page 16", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1,
     C_READ, .80, .90, 0, HM, 16, 0, 0, 0},
    {"decode token-major", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, .80, .90, 1,
     ATTN_TOKEN_MAJOR, 64, 0, 0, 0},
    {"decode f32 (for PORTABLE)", SPEED, 128, 32, 8, 1, 1, 4096, 0, F32, F32, 1, C_READ, 0, 0,
     0, PAGED},
    {"PORTABLE decode", SPEED, 128, 32, 8, 1, 1, 4096, 0, F32, F32, 1, C_READ, 0, 0, 0, HM, 64,
     ATTN_CPU_AUTO, ATTN_NUMERICS_PORTABLE, 0},
    {"PORTABLE decode", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, 0, 0, 0, HM, 64,
     ATTN_CPU_AUTO, ATTN_NUMERICS_PORTABLE, 0},
    {"PORTABLE prefill", SPEED, 128, 32, 8, 1, 2048, 2048, 0, F32, F32, 1, C_FMA, 0, 0, 0, HM, 64,
     ATTN_CPU_AUTO, ATTN_NUMERICS_PORTABLE, 0},
    {"decode contiguous", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1, C_READ, .80, .90, 0,
     HM, 0, 0, 0, 0},
    {"decode contig. token-major", SPEED, 128, 32, 8, 1, 1, 4096, 0, F16, F32, 1,
     C_READ, .80, .90, 0, ATTN_TOKEN_MAJOR, 0, 0, 0, 0},
    {"block list 10 %", BLOCKS, 128, 8, 2, 1, 4096, 4096, 0, F16, F32, 1, C_FMA, 1.15, 1.08, 1,
     HM, 64, 0, 0, 10},
    {"block list 25 %", BLOCKS, 128, 8, 2, 1, 4096, 4096, 0, F16, F32, 1, C_FMA, 1.15, 1.08, 0,
     HM, 64, 0, 0, 25},
    {"block list 50 %", BLOCKS, 128, 8, 2, 1, 4096, 4096, 0, F16, F32, 1, C_FMA, 1.15, 1.08, 0,
     HM, 64, 0, 0, 50},
    {"plan, batch 64", PLAN, 128, 32, 8, 64, 1, 1000, 0, F16, F32, 1, C_NONE, 0, 0, 1, PAGED},
};
// clang-format on

#define DIE(...) (fprintf(stderr, "bench_cpu: " __VA_ARGS__), fputc('\n', stderr), exit(2))

static double row_seconds = 1.6;
static int opt_quick, opt_threads = 2, n_short, n_measured;
static attn_cpu_isa best_isa;
static int have[BENCH_N_CEILINGS];
static bench_probe probes[BENCH_N_CEILINGS];
static uint8_t *arena;
static size_t arena_bytes;

// ---- inputs

#define N_NORMALS (1 << 20)
static float *normals;
static test_rng rng = {20251121};

static void fill_normal(float *x, size_t n) { // pieces of a table from random places
    while (n > 0) {
        size_t part = n < 4096 ? n : 4096;
        memcpy(x, normals + test_below(&rng, N_NORMALS - 4096), 4 * part);
        x += part;
        n -= part;
    }
}

static void *need(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!p) DIE("out of memory");
    memset(p, 0, bytes);
    return p;
}

// One problem in several copies: the same lengths, other pages, other Q.
typedef struct data {
    const row *r;
    attn_desc d;
    int copies, turn;
    int64_t copy_pages, table_ints;
    int32_t *tables; // (copies, n_seq, pages per sequence)
    uint8_t *q[2], *k, *v;
    int32_t *q_start, *kv_len;
    double kv_bytes, flops; // of one copy
} data;

// Page tables of copy 0: shuffled pages, the common ones first. The other copies lie behind it.
static void make_tables(data *x, int32_t per_seq, int32_t common) {
    int32_t n = (int32_t)x->copy_pages, *deck = (int32_t *)need(4 * (size_t)n), i, s, j, c,
            at = common;
    for (i = 0; i < n; i++) deck[i] = i;
    for (i = n - 1; i > 0; i--) {
        j = test_below(&rng, i + 1);
        s = deck[i], deck[i] = deck[j], deck[j] = s;
    }
    for (c = 0; c < x->copies; c++)
        for (at = common, s = 0; s < x->d.n_seq; s++)
            for (j = 0; j < per_seq; j++)
                x->tables[c * x->table_ints + s * per_seq + j] =
                    c * n + deck[j < common ? j : at++];
    free(deck);
}

// Stores random K and V in copy 0, then repeats its pages.
static void store_copies(data *x) {
    const row *r = x->r;
    size_t rows_n = (size_t)r->kv, width = (size_t)r->kv_heads * (size_t)r->dim;
    size_t kb = (size_t)x->d.kv.k.page_bytes * (size_t)x->copy_pages;
    size_t vb = (size_t)x->d.kv.v.page_bytes * (size_t)x->copy_pages;
    float *rows_f = (float *)need(8 * rows_n * width);
    int64_t *slots = (int64_t *)need(8 * rows_n);
    int32_t s, j, pt = x->d.kv.page_tokens, c;
    attn_tensor k = {rows_f, ATTN_F32, 0, 0}, v = {rows_f + rows_n * width, ATTN_F32, 0, 0};
    attn_desc d = x->d;
    for (s = 0; s < r->n_seq; s++) {
        int32_t from = s > 0 ? r->prefix : 0;
        fill_normal(rows_f, 2 * rows_n * width);
        for (j = 0; j < r->kv; j++) {
            int64_t page = d.kv.page_table ? x->tables[s * d.kv.page_table_stride + j / pt] : s;
            slots[j] = j < from ? -1 : page * pt + j % pt;
        }
        if (attn_cpu_store(&d, &k, &v, slots, 0, r->kv) != ATTN_OK) DIE("store failed");
    }
    for (c = 1; c < x->copies; c++) {
        memcpy(x->k + kb * (size_t)c, x->k, kb);
        memcpy(x->v + vb * (size_t)c, x->v, vb);
    }
    free(rows_f);
    free(slots);
}

static void make_queries(data *x) {
    size_t n = (size_t)(x->r->n_seq * x->r->n_q) * (size_t)(x->r->heads * x->r->dim), i;
    float *f = (float *)need(4 * n);
    int c;
    for (c = 0; c < 2; c++) {
        x->q[c] = (uint8_t *)need(4 * n);
        fill_normal(f, n);
        for (i = 0; i < n; i++) attni_put(x->q[c], x->r->qo_type, (int64_t)i, f[i]);
    }
    free(f);
}

static void data_make(data *x, const row *r) {
    attn_desc *d = &x->d;
    int32_t s, per_seq, common, pt = r->page ? r->page : (r->kv + 15) / 16 * 16;
    size_t one;
    memset(x, 0, sizeof *x);
    x->r = r;
    d->n_seq = r->n_seq;
    d->n_heads = r->heads;
    d->n_kv_heads = r->kv_heads;
    d->head_dim = r->dim;
    d->numerics = r->numerics;
    d->kv.layout = r->layout;
    d->kv.page_tokens = pt;
    d->kv.k.dtype = d->kv.v.dtype = r->kv_type;
    x->q_start = (int32_t *)need(4 * (size_t)(r->n_seq + 1));
    x->kv_len = (int32_t *)need(4 * (size_t)r->n_seq);
    for (s = 0; s <= r->n_seq; s++) x->q_start[s] = s * r->n_q;
    for (s = 0; s < r->n_seq; s++) x->kv_len[s] = r->kv;
    d->q_start = x->q_start;
    d->kv.kv_len = x->kv_len;
    d->kv.k.page_bytes = (int64_t)attn_kv_page_bytes(d, 0);
    d->kv.v.page_bytes = (int64_t)attn_kv_page_bytes(d, 1);
    per_seq = (r->kv + pt - 1) / pt;
    common = r->prefix / pt;
    x->copy_pages = common + (int64_t)r->n_seq * (per_seq - common);
    one = (size_t)x->copy_pages * (size_t)(d->kv.k.page_bytes + d->kv.v.page_bytes);
    x->copies = r->n_q > 8 ? 2 : (int)((arena_bytes - 4096) / one);
    if (x->copies < 1) DIE("the arena of %zu MiB is too small for this row", arena_bytes >> 20);
    if (x->copies > 1024) x->copies = 1024;
    x->k = arena;
    x->v = arena +
           (((size_t)d->kv.k.page_bytes * (size_t)(x->copy_pages * x->copies) + 63) & ~(size_t)63);
    d->kv.k.data = x->k;
    d->kv.v.data = x->v;
    d->kv.n_pages = (int32_t)(x->copy_pages * x->copies);
    x->table_ints = (int64_t)r->n_seq * per_seq;
    x->tables = (int32_t *)need(4 * (size_t)(x->table_ints * x->copies));
    make_tables(x, per_seq, common);
    d->kv.page_table = r->page ? x->tables : NULL;
    d->kv.page_table_stride = per_seq;
    store_copies(x);
    make_queries(x);
    d->q.data = x->q[0];
    d->q.dtype = d->o.dtype = r->qo_type;
    d->o.data = need(4 * (size_t)(r->n_seq * r->n_q) * (size_t)(r->heads * r->dim));
    x->kv_bytes = (double)one / pt * (r->kv % pt ? (double)r->kv / per_seq : pt);
    x->flops =
        4.0 * r->heads * r->dim * r->n_seq * r->n_q * (r->n_q == r->kv ? 0.5 * r->kv : r->kv);
}

static void data_free(data *x) {
    free(x->q[0]);
    free(x->q[1]);
    free(x->d.o.data);
    free(x->tables);
    free(x->q_start);
    free(x->kv_len);
}

// ---- execution

typedef struct exec {
    data *x;
    attn_desc d;
    attn_cpu_isa isa;
    int threads, next, next_merge, error;
    attn_plan *plan;
    void *plan_mem, *partials, *scratch[BENCH_MAX_THREADS];
} exec;

static void exec_make(exec *e, data *x, const attn_desc *d, int threads) {
    attn_plan_params p;
    attn_result r;
    size_t bytes;
    int i;
    memset(e, 0, sizeof *e);
    e->x = x;
    e->d = *d;
    e->isa = x->r->isa != ATTN_CPU_AUTO ? x->r->isa : best_isa;
    e->threads = threads;
    attn_cpu_set_isa(e->isa);
    attn_cpu_plan_params(d, threads, &p);
    p.max_kv_len = x->r->kv + 64;
    bytes = attn_plan_bytes(d, &p);
    e->plan_mem = need(bytes);
    if ((r = attn_plan_build(d, &p, e->plan_mem, bytes, &e->plan)) != ATTN_OK)
        DIE("%s: plan: %s", x->r->regime, attn_result_string(r));
    e->partials = need(attn_plan_partial_bytes(e->plan) + 64);
    for (i = 0; i < threads; i++) e->scratch[i] = need(attn_cpu_scratch_bytes(d, e->plan));
}

static void exec_free(exec *e) {
    int i;
    for (i = 0; i < e->threads; i++) free(e->scratch[i]);
    free(e->partials);
    free(e->plan_mem);
}

static void exec_tasks(bench_team *t, int thread, void *arg) {
    exec *e = (exec *)arg;
    int i;
    while ((i = __atomic_fetch_add(&e->next, 1, __ATOMIC_RELAXED)) < e->plan->n_tasks) {
        attn_result r = attn_cpu_run(&e->d, e->plan, i, 1, e->partials, e->scratch[thread]);
        if (r != ATTN_OK) __atomic_store_n(&e->error, (int)r, __ATOMIC_RELAXED);
    }
    if (!e->plan->n_merges) return;
    bench_barrier(t);
    while ((i = __atomic_fetch_add(&e->next_merge, 1, __ATOMIC_RELAXED)) < e->plan->n_merges) {
        attn_result r = attn_cpu_merge(&e->d, e->plan, i, 1, e->partials);
        if (r != ATTN_OK) __atomic_store_n(&e->error, (int)r, __ATOMIC_RELAXED);
    }
}

static double exec_once(exec *e, double *busy) { // ms, on the next copy
    data *x = e->x;
    double sec;
    int c = x->turn++ % x->copies;
    if (e->d.kv.page_table)
        e->d.kv.page_table = x->tables + c * x->table_ints;
    else {
        e->d.kv.k.data = x->k + (size_t)c * (size_t)(x->copy_pages * e->d.kv.k.page_bytes);
        e->d.kv.v.data = x->v + (size_t)c * (size_t)(x->copy_pages * e->d.kv.v.page_bytes);
    }
    e->d.q.data = x->q[c % 2];
    e->next = e->next_merge = 0;
    attn_cpu_set_isa(e->isa);
    sec = bench_together(e->threads, exec_tasks, e, busy);
    if (e->error) DIE("%s: run: %s", x->r->regime, attn_result_string((attn_result)e->error));
    return sec * 1e3;
}

// ---- a wrong result is never timed

static double check_token(const exec *e, int32_t s, int32_t i, double *out) { // relative RMS error
    attn_desc d = e->d;
    int32_t start[2] = {0, 1}, token = d.q_start[s] + i, pos, seq_row;
    int64_t n = (int64_t)d.n_heads * d.head_dim, j;
    test_error err = {0, 0, 0, 0, 0, 0};
    attn_result r;
    pos = d.kv.kv_len[s] - (d.q_start[s + 1] - d.q_start[s]) + i;
    d.n_seq = 1;
    d.q_start = start;
    d.q_pos0 = &pos;
    d.q.data = (uint8_t *)d.q.data + token * n * attn_dtype_bits(d.q.dtype) / 8;
    if (d.kv.page_table) d.kv.page_table += s * d.kv.page_table_stride;
    d.kv.kv_len += s;
    if (d.mask.blocks.seq_row) {
        seq_row = d.mask.blocks.seq_row[s];
        d.mask.blocks.seq_row = &seq_row;
    }
    if ((r = attn_ref_forward(&d, out, NULL)) != ATTN_OK)
        DIE("%s: reference: %s", e->x->r->regime, attn_result_string(r));
    for (j = 0; j < n; j++)
        test_error_add(&err, (double)attni_get(e->d.o.data, e->d.o.dtype, token * n + j), out[j]);
    return err.n_bad ? HUGE_VAL : test_error_relative(&err);
}

static int check(exec *e) {
    const row *r = e->x->r;
    double *out = (double *)need(8 * (size_t)(r->heads * r->dim)), worst = 0, bound;
    int n = r->kv > 8192 || opt_quick ? 1 : 3, i;
    bound = r->qo_type == BF16 ? 1e-2 : 2e-5;
    if (r->numerics == ATTN_NUMERICS_APPROX) bound = 5e-2;
    memset(e->d.o.data, 0xff,
           (size_t)(r->n_seq * r->n_q * r->heads * r->dim * attn_dtype_bits(r->qo_type) / 8));
    exec_once(e, NULL);
    for (i = 0; i < n; i++) {
        int32_t s = i == 0 ? r->n_seq - 1 : test_below(&rng, r->n_seq);
        int32_t t = i == 0 ? r->n_q - 1 : test_below(&rng, r->n_q);
        double err = check_token(e, s, t, out);
        if (!(err <= worst)) worst = err;
    }
    free(out);
    if (worst <= bound) return 1;
    printf("%-27s WRONG: relative error %.2g, bound %.2g; not timed\n", r->regime, worst, bound);
    return 0;
}

// ---- interleaved repeats

#define MAX_REPEATS 200
typedef struct arm { // a ceiling or an execution
    bench_probe *probe;
    exec *e;
    int threads, n;
    double v[MAX_REPEATS], busy[MAX_REPEATS], median;
} arm;

// Repeats in which a thread was off its core for more than 3 % of the time are left out if enough
// others remain (returns 1). Else all count by the CPU time they took, which is close for short
// waits (0).
static int arm_close(arm *a) {
    double good[MAX_REPEATS];
    int i, n = 0;
    for (i = 0; i < a->n; i++)
        if (a->busy[i] > 0.97) good[n++] = a->v[i];
    if (n >= 3) {
        a->median = bench_median(good, n);
        return 1;
    }
    for (i = 0; i < a->n; i++) good[i] = a->e ? a->v[i] * a->busy[i] : a->v[i] / a->busy[i];
    a->median = bench_median(good, a->n);
    return 0;
}

static int measure(arm *a, int n, double seconds) { // returns 1 when undisturbed
    double until = bench_now() + seconds, hard = until + 1.5 * seconds;
    int rep, i, good = 0, least = opt_quick ? 3 : 5, ok = 1;
    for (rep = 0; rep < MAX_REPEATS; rep++) {
        int fine = 1;
        double now = bench_now();
        if (rep >= 3 && (now > hard || (now > until && good >= least))) break;
        for (i = 0; i < n; i++) {
            double *busy = &a[i].busy[a[i].n];
            a[i].v[a[i].n++] =
                a[i].e ? exec_once(a[i].e, busy) : bench_probe_rate(a[i].probe, a[i].threads, busy);
            fine &= *busy > 0.97;
        }
        good += fine;
    }
    for (i = 0; i < n; i++) ok &= arm_close(&a[i]);
    return ok;
}

// ---- the table

static void shape_text(const row *r, char *out, size_t n) {
    char seqs[24] = "";
    if (r->n_seq > 1) snprintf(seqs, sizeof seqs, "%d x ", r->n_seq);
    if (r->prefix)
        snprintf(out, n, "%sH%d/%d D%d %d + %d", seqs, r->heads, r->kv_heads, r->dim, r->prefix,
                 r->kv - r->prefix);
    else if (r->n_q == r->kv)
        snprintf(out, n, "%sH%d/%d D%d N %d", seqs, r->heads, r->kv_heads, r->dim, r->kv);
    else if (r->n_q == 1)
        snprintf(out, n, "%sH%d/%d D%d kv %d", seqs, r->heads, r->kv_heads, r->dim, r->kv);
    else
        snprintf(out, n, "%sH%d/%d D%d q %d kv %d", seqs, r->heads, r->kv_heads, r->dim, r->n_q,
                 r->kv);
}

static void header(void) {
    printf("\n%-27s %-22s %-12s %3s %9s %13s %9s %7s %7s %7s  %-10s %s\n", "regime", "shape",
           "KV, Q and O", "thr", "ms", "rate", "ceiling", "value", "target", "excell.", "verdict",
           "executor");
}

// value, target, excellent already printed as text; better: -1 lower is better, 1 higher, 0 no
// target.
static void line(const row *r, const exec *e, double ms, const char *rate, double ceiling,
                 const char *value, const char *target, const char *excellent, int verdict,
                 int ok) {
    static const char *const verdicts[] = {"", "short", "ok", "excellent"};
    char shape[64], types[32], ceil_text[32] = "-";
    shape_text(r, shape, sizeof shape);
    snprintf(types, sizeof types, "%s, %s", attn_dtype_name(r->kv_type),
             attn_dtype_name(r->qo_type));
    if (ceiling > 0) snprintf(ceil_text, sizeof ceil_text, "%.1f", ceiling);
    if (!ok && e->threads > 1) verdict = 0; // two threads on one core say nothing
    attn_cpu_set_isa(e->isa);
    printf("%-27s %-22s %-12s %3d %9.3f %13s %9s %7s %7s %7s  %-9s%s %s\n", r->regime, shape, types,
           e->threads, ms, rate, ceil_text, value, target, excellent, verdicts[verdict],
           ok ? " " : "~", attn_cpu_executor(&e->d));
    fflush(stdout);
    n_measured++;
    n_short += verdict == 1;
}

static int judge(double value, double target, double excellent, int lower) {
    if (target == 0) return 0;
    if (lower) return value <= excellent ? 3 : value <= target ? 2 : 1;
    return value >= excellent ? 3 : value >= target ? 2 : 1;
}

static void row_speed(const row *r, data *x, exec *e) {
    static arm a[2];
    char rate[32], value[16], target[16], excellent[16];
    int ok, is_read = r->ceiling == BENCH_READ;
    double g, part;
    memset(a, 0, sizeof a);
    a[0].probe = &probes[r->ceiling];
    a[0].threads = e->threads;
    a[1].e = e;
    ok = measure(a, 2, row_seconds);
    g = (is_read ? x->kv_bytes : x->flops) / a[1].median * 1e-6;
    part = g / a[0].median;
    snprintf(rate, sizeof rate, "%.1f %s", g, is_read ? "GB/s" : "GFLOP/s");
    snprintf(value, sizeof value, "%.0f %%", 100 * part);
    if (r->kind == LATENCY) {
        snprintf(target, sizeof target, "%.1f ms", r->target);
        snprintf(excellent, sizeof excellent, "%.1f ms", r->excellent);
        line(r, e, a[1].median, rate, a[0].median, value, target, excellent,
             judge(a[1].median, r->target, r->excellent, 1), ok);
        return;
    }
    snprintf(target, sizeof target, "%.0f %%", 100 * r->target);
    snprintf(excellent, sizeof excellent, "%.0f %%", 100 * r->excellent);
    if (r->target == 0) strcpy(target, "-"), strcpy(excellent, "-");
    line(r, e, a[1].median, rate, a[0].median, value, target, excellent,
         judge(part, r->target, r->excellent, 0), ok);
}

static void row_scaling(const row *r, data *x, exec *e) {
    static arm a[4];
    static exec one;
    char rate[32], value[16], target[16], excellent[16];
    double ratio;
    int ok;
    exec_make(&one, x, &x->d, 1);
    memset(a, 0, sizeof a);
    a[0].e = &one;
    a[1].e = e;
    a[2].probe = a[3].probe = &probes[r->ceiling];
    a[2].threads = 1;
    a[3].threads = e->threads;
    ok = measure(a, 4, row_seconds);
    ratio = 2 * a[0].median / a[1].median /
            (a[3].median / a[2].median); // cores that share a clock budget
                                         // scale by less than their number
    snprintf(rate, sizeof rate, "ceiling %.2fx", a[3].median / a[2].median);
    snprintf(value, sizeof value, "%.2fx", a[0].median / a[1].median);
    snprintf(target, sizeof target, "%.2fx", r->target * e->threads / 2);
    snprintf(excellent, sizeof excellent, "%.2fx", r->excellent * e->threads / 2);
    line(r, e, a[1].median, rate, a[3].median, value, target, excellent,
         judge(ratio, r->target, r->excellent, 0), ok);
    exec_free(&one);
}

// Random blocks of 64 x 64, the diagonal always kept. Returns the kept share of the causal pairs.
static double make_blocks(const row *r, attn_desc *d, int64_t **start, int32_t **ids) {
    int32_t n = (r->kv + 63) / 64, i, j;
    int64_t count = 0;
    double kept = 0;
    *start = (int64_t *)need(8 * (size_t)(n + 1));
    *ids = (int32_t *)need(4 * (size_t)n * (size_t)n);
    for (i = 0; i < n; i++) {
        (*start)[i] = count;
        for (j = 0; j < i; j++)
            if (test_below(&rng, 100) < r->density) (*ids)[count++] = j, kept += 1;
        (*ids)[count++] = i;
        kept += 0.5;
    }
    (*start)[n] = count;
    d->mask.blocks.row_block = d->mask.blocks.kv_block = 64;
    d->mask.blocks.n_lists = 1;
    d->mask.blocks.n_rows = n;
    d->mask.blocks.row_start = *start;
    d->mask.blocks.block = *ids;
    return kept / (0.5 * n * n);
}

static void row_blocks(const row *r, data *x, exec *dense) {
    static arm a[3];
    static exec e;
    attn_desc d = x->d;
    int64_t *start;
    int32_t *ids;
    char rate[32], value[16], target[16], excellent[16];
    double share = make_blocks(r, &d, &start, &ids), over;
    int ok;
    exec_make(&e, x, &d, 1);
    if (check(&e)) {
        memset(a, 0, sizeof a);
        a[0].probe = &probes[r->ceiling];
        a[0].threads = 1;
        a[1].e = dense;
        a[2].e = &e;
        ok = measure(a, 3, row_seconds);
        over = a[2].median / (a[1].median * share);
        snprintf(rate, sizeof rate, "%.1f GFLOP/s", x->flops * share / a[2].median * 1e-6);
        snprintf(value, sizeof value, "%.2fx", over);
        snprintf(target, sizeof target, "%.2fx", r->target);
        snprintf(excellent, sizeof excellent, "%.2fx", r->excellent);
        line(r, &e, a[2].median, rate, a[0].median, value, target, excellent,
             judge(over, r->target, r->excellent, 1), ok);
    }
    exec_free(&e);
    free(start);
    free(ids);
}

static void row_plan(const row *r, data *x, exec *e) {
    static arm a[1];
    double build[MAX_REPEATS], patch[MAX_REPEATS], again[MAX_REPEATS], t;
    attn_plan_params p = e->plan->params;
    size_t bytes = attn_plan_bytes(&e->d, &p);
    void *mem = need(bytes);
    attn_plan *plan;
    int i, s, rebuilt, n = opt_quick ? 5 : 25, n_patch = 0, n_again = 0, ok;
    memset(a, 0, sizeof a);
    a[0].e = e;
    ok = measure(a, 1, row_seconds);
    for (i = 0; i < n; i++) {
        t = bench_now();
        if (attn_plan_build(&e->d, &p, mem, bytes, &plan) != ATTN_OK) DIE("plan build failed");
        build[i] = (bench_now() - t) * 1e3;
    }
    // 24 decode steps from token 1000 on: the last page of 64 holds them all
    for (i = 0; i < 24 * (opt_quick ? 1 : 4); i++) {
        for (s = 0; s < r->n_seq; s++) x->kv_len[s] = r->kv + i % 24;
        t = bench_now();
        if (attn_plan_update(plan, &e->d, &rebuilt) != ATTN_OK) DIE("plan update failed");
        t = (bench_now() - t) * 1e3;
        if (rebuilt)
            again[n_again++] = t;
        else
            patch[n_patch++] = t;
    }
    for (s = 0; s < r->n_seq; s++) x->kv_len[s] = r->kv;
    for (i = 0; i < 3; i++) {
        static const char *const names[3] = {"plan build", "plan update, lengths only",
                                             "plan update, rebuilt"};
        double *v[3] = {build, patch, again};
        int count[3] = {n, n_patch, n_again};
        char rate[32], value[16];
        row named = *r;
        if (!count[i]) continue;
        t = bench_median(v[i], count[i]);
        named.regime = names[i];
        snprintf(rate, sizeof rate, "step %.1f ms", a[0].median);
        snprintf(value, sizeof value, "%.2f %%", 100 * t / a[0].median);
        line(&named, e, t, rate, 0, value, "-", "-", 0, ok);
    }
    free(mem);
}

static void run_row(const row *r) {
    static data x;
    static exec e;
    int threads = r->threads > 1 ? opt_threads : 1;
    if (r->ceiling != BENCH_NONE && !have[r->ceiling]) return;
    if (r->isa != ATTN_CPU_AUTO && !attn_cpu_has(r->isa)) return;
    if (r->threads > opt_threads) return;
    data_make(&x, r);
    exec_make(&e, &x, &x.d, threads);
    if (check(&e)) {
        if (r->kind == SPEED || r->kind == LATENCY) row_speed(r, &x, &e);
        if (r->kind == SCALING) row_scaling(r, &x, &e);
        if (r->kind == BLOCKS) row_blocks(r, &x, &e);
        if (r->kind == PLAN) row_plan(r, &x, &e);
    }
    exec_free(&e);
    data_free(&x);
}

// ---- block lists as selectors make them, against dense attention and the selector itself

typedef struct list_kind {
    const char *name;
    int row_block, kv_block, per_head; // per_head: 2 a list per query head, 1 per KV head, 0 one
    double share;                      // of the visible blocks, chosen at random; else
    int tokens;                        // so many tokens between sink and window
    int sink, window;
    attn_select_kind select;
} list_kind;

static const list_kind list_kinds[] = {
    {"flex 128 x 128, 5 %", 128, 128, 2, .05, 0, 0, 0, ATTN_SELECT_NONE},
    {"flex 128 x 128, 10 %", 128, 128, 2, .10, 0, 0, 0, ATTN_SELECT_FLEX},
    {"flex 128 x 128, 30 %", 128, 128, 2, .30, 0, 0, 0, ATTN_SELECT_NONE},
    {"exact 64 x 64, 5 %", 64, 64, 1, .05, 0, 0, 0, ATTN_SELECT_EXACT},
    {"exact 64 x 64, 10 %", 64, 64, 1, .10, 0, 0, 0, ATTN_SELECT_NONE},
    {"hip3 64 x 8, 2048", 64, 8, 0, 0, 2048, 256, 1024, ATTN_SELECT_HIP3},
    {"hip2 64 x 2, 512", 64, 2, 2, 0, 512, 16, 256, ATTN_SELECT_HIP2},
    {"hip2 64 x 2, 1024", 64, 2, 2, 0, 1024, 16, 256, ATTN_SELECT_NONE}};
#define N_LISTS ((int)(sizeof list_kinds / sizeof list_kinds[0]))

// n of [lo, hi), ascending, by Knuth's selection sampling.
static int64_t pick_blocks(int32_t lo, int32_t hi, int32_t n, int32_t *out) {
    int64_t at = 0;
    for (; lo < hi && at < n; lo++)
        if (test_below(&rng, hi - lo) < n - at) out[at++] = lo;
    return at;
}

typedef struct lists {
    int64_t *start;
    int32_t *ids;
    double share, select_ms;
} lists;

static void make_lists(const list_kind *k, attn_desc *d, lists *x) {
    attn_block_list *b = &d->mask.blocks;
    int32_t kv = d->kv.kv_len[0], first = attni_q_pos0(d, 0) / k->row_block, i, l, capacity;
    int64_t n = 0, kept, base;
    b->row_block = k->row_block;
    b->kv_block = k->kv_block;
    b->n_lists = k->per_head == 2 ? d->n_heads : k->per_head ? d->n_kv_heads : 1;
    b->n_rows = (kv + k->row_block - 1) / k->row_block;
    capacity = k->tokens ? k->tokens / k->kv_block : (int32_t)(k->share * kv / k->kv_block) + 4;
    x->start = (int64_t *)need(8 * (size_t)b->n_lists * (size_t)(b->n_rows + 1));
    x->ids = (int32_t *)need(4 * (size_t)b->n_lists * (size_t)b->n_rows * (size_t)capacity);
    for (l = 0; l < b->n_lists; l++)
        for (i = 0; i <= b->n_rows; i++) {
            int32_t end = i * k->row_block / k->kv_block; // the row block's own blocks begin here
            x->start[l * (b->n_rows + 1) + i] = n;
            if (i == b->n_rows || i < first) continue;
            if (k->tokens) {
                end = (i * k->row_block - k->window) / k->kv_block;
                n += pick_blocks(k->sink / k->kv_block, end, capacity, x->ids + n);
                continue;
            }
            if (end > 0) x->ids[n++] = 0;
            n += pick_blocks(1, end, (int32_t)(k->share * end), x->ids + n);
            x->ids[n++] = end;
        }
    b->row_start = x->start;
    b->block = x->ids;
    d->mask.keep_sink = k->sink;
    d->mask.keep_recent = k->window;
    if (attn_mask_kept(d, &kept, &base) != ATTN_OK) DIE("%s: bad mask", k->name);
    x->share = (double)kept / (double)base;
}

// CPU ms of a selector's call for d.
static double time_select(const attn_desc *d, const attn_select *s, const attn_summary *y,
                          attn_selection *x, const char *name) {
    void *scratch = need(attn_cpu_select_scratch_bytes(d, s));
    double c = bench_clock(CLOCK_PROCESS_CPUTIME_ID), t;
    attn_result r = ATTN_OK;
    if (y->data) r = attn_cpu_summarize(d, y, 0, attn_cpu_summarize_units(d));
    if (r == ATTN_OK)
        r = attn_cpu_select(d, s, y->data ? y : NULL, x, 0, attn_cpu_select_units(d, s), scratch);
    t = (bench_clock(CLOCK_PROCESS_CPUTIME_ID) - c) * 1e3;
    if (r != ATTN_OK) DIE("%s: select: %s", name, attn_result_string(r));
    free(scratch);
    return t;
}

// The selector of a kind alone, with budgets that keep as much on random data, the least of some
// calls; in decode the mean of 32 steps that end at d's. 0: it has none.
static double time_selector(const list_kind *k, const attn_desc *dense, double share) {
    attn_desc d = *dense;
    attn_select s;
    attn_selection x;
    attn_summary y = {NULL};
    double t = 0, sum = 0;
    size_t bytes;
    int32_t kv = d.kv.kv_len[0], len, seq_row[1], i;
    const int decodes = d.q_start[1] == 1, n = decodes ? 33 : opt_quick ? 2 : 4;
    void *mem;
    memset(&s, 0, sizeof s);
    s.kind = k->select;
    s.flex.max_budget = (int32_t)(share * kv / 2);
    s.exact.keep = (int32_t)(share * kv);
    s.hip.keep = k->tokens, s.hip.sink = k->sink, s.hip.window = k->window;
    if (decodes) s.n_slots = 1, s.max_kv_len = kv;
    if (!s.kind || !(bytes = attn_select_bytes(&d, &s))) return 0;
    mem = need(bytes);
    if (s.kind == ATTN_SELECT_EXACT && attn_summary_bytes(&d))
        y.data = (uint16_t *)need(attn_summary_bytes(&d));
    if (attn_selection_init(&d, &s, mem, bytes, seq_row, 0, &x) != ATTN_OK)
        DIE("%s: bad parameters", k->name);
    d.kv.kv_len = &len;
    for (i = 0; i < n; i++) {
        double v;
        len = decodes ? kv - n + 1 + i : kv;
        v = time_select(&d, &s, &y, &x, k->name);
        if (i) sum += v; // the first step scans all
        if (!i || v < t) t = v;
    }
    free(mem), free(y.data);
    return decodes ? sum / (n - 1) : t;
}

// total[kind]: of those with a selector, (selector + lists) / dense.
static void list_table(const row *r, const char *only, double *total) {
    static data x;
    static exec e[N_LISTS + 1];
    static arm a[N_LISTS + 1];
    lists l[N_LISTS];
    int which[N_LISTS], i, n = 0, ok;
    char shape[64];
    data_make(&x, r);
    exec_make(&e[0], &x, &x.d, 1);
    memset(a, 0, sizeof a);
    a[0].e = &e[0];
    for (i = 0; i < N_LISTS; i++) {
        attn_desc d = x.d;
        if (only && !strstr(list_kinds[i].name, only)) continue;
        if (total && !list_kinds[i].select) continue;
        make_lists(&list_kinds[i], &d, &l[n]);
        exec_make(&e[n + 1], &x, &d, 1);
        a[n + 1].e = &e[n + 1];
        if (!check(&e[n + 1])) DIE("%s is wrong", list_kinds[i].name);
        l[n].select_ms = time_selector(&list_kinds[i], &x.d, l[n].share);
        which[n++] = i;
    }
    ok = measure(a, n + 1, row_seconds);
    shape_text(r, shape, sizeof shape);
    for (i = 0; i < n; i++) {
        double over = a[i + 1].median / (a[0].median * l[i].share), sum;
        char select[32] = "-", whole[32] = "-";
        sum = (a[i + 1].median + l[i].select_ms) / a[0].median;
        if (l[i].select_ms > 0) {
            snprintf(select, sizeof select, "%.2f", l[i].select_ms);
            snprintf(whole, sizeof whole, "%.3f", sum);
        }
        if (total) total[which[i]] = sum;
        printf("%-22s %-20s %-10s %-10s %7.2f %% %9.2f %9.2f %6.2fx %s %9s %7s\n",
               list_kinds[which[i]].name, shape, attn_dtype_name(r->kv_type),
               attn_dtype_name(r->qo_type), 100 * l[i].share, a[0].median, a[i + 1].median, over,
               ok ? " " : "~", select, whole);
        exec_free(&e[i + 1]);
        free(l[i].start), free(l[i].ids);
    }
    fflush(stdout);
    exec_free(&e[0]);
    data_free(&x);
}

enum { N_TYPES = 3 };
static const attn_dtype list_types[N_TYPES][2] = {{F16, F32}, {F16, BF16}, {BF16, BF16}};

// GQA 4 on one KV head for prefill (a whole model's time is in proportion), 32/8 for decode (1:
// pages of rows, 2: of tiles); bf16 alone on the best executor, AMX included.
static row list_row(int n, int queries, int phase, int type) {
    row r = {"lists", SPEED, 128, 4, 1, 1, 0, 0, 0, F16, F32, 1, C_NONE, 0, 0, 0, PAGED};
    r.kv = n;
    r.n_q = queries && queries < n ? queries : n;
    r.kv_type = list_types[type][0], r.qo_type = list_types[type][1];
    if (r.kv_type == BF16 && attn_cpu_has(ATTN_CPU_AMX)) r.isa = ATTN_CPU_AMX;
    if (phase) r.heads = 32, r.kv_heads = 8, r.n_q = 1;
    if (phase == 2) r.layout = ATTN_K16;
    return r;
}

static void list_tables(int queries, const char *only) {
    int n, t, phase;
    for (phase = 0; phase < 3; phase++)
        for (n = 8192; n <= 32768; n *= 4)
            for (t = 0; t < (phase ? 1 : N_TYPES); t++) {
                row r = list_row(n, queries, phase, t);
                list_table(&r, only, NULL);
            }
}

static void crossing_tables(const char *only) {
    int n, t, phase, i;
    for (phase = 0; phase < 2; phase++)
        for (t = 0; t < (phase ? 1 : N_TYPES); t += 2) {
            double total[N_LISTS] = {0};
            int from[N_LISTS] = {0};
            for (n = 1024; n <= 32768; n *= 2) {
                row r = list_row(n, 0, phase, t);
                list_table(&r, only, total);
                for (i = 0; i < N_LISTS; i++)
                    if (!(total[i] < 1)) from[i] = 0;
                    else if (!from[i]) from[i] = n;
            }
            for (i = 0; i < N_LISTS; i++)
                if (total[i] > 0)
                    printf("%s, %s: faster than dense from %d tokens on (0: nowhere)\n",
                           phase ? "decode" : "prefill", list_kinds[i].name, from[i]);
        }
}

// ---- the machine

static void probe_setup(void) {
    int k;
    have[BENCH_FMA] = have[BENCH_READ] = 1;
    have[BENCH_YMM] = attn_cpu_has(ATTN_CPU_AVX2);
#ifdef __x86_64__
    have[BENCH_BF16] = attn_cpu_has(ATTN_CPU_AVX512_BF16);
    have[BENCH_AMX] = attn_cpu_has(ATTN_CPU_AMX);
#endif
    for (k = 0; k < BENCH_N_CEILINGS; k++) {
        probes[k].kind = k;
        probes[k].wide = attn_cpu_has(ATTN_CPU_AVX512);
        probes[k].n = 1000;
        probes[k].arena = arena;
        probes[k].arena_bytes = arena_bytes;
        probes[k].bytes = (size_t)64 << 20;
        if (!have[k] || k == BENCH_READ) continue;
        while (bench_together(1, bench_probe_run, &probes[k], NULL) < 0.004) probes[k].n *= 2;
    }
}

static void ceilings(void) {
    static const size_t ahead[] = {0, 1024, 4096};
    static arm a[3];
    double best = 0;
    int k, t, ok;
    memset(a, 0, sizeof a);
    for (k = 0; k < 3; k++) { // reading: the best prefetch distance is the ceiling
        double v = 0, rate[7];
        probes[BENCH_READ].ahead = ahead[k];
        for (t = 0; t < 7; t++) {
            rate[t] = bench_probe_rate(&probes[BENCH_READ], 1, &v);
            rate[t] /= v;
        }
        v = bench_median(rate, 7);
        if (v > best) best = v, a[0].n = k;
    }
    probes[BENCH_READ].ahead = ahead[a[0].n];
    printf("%-22s %12s %10s %2d %8s\n", "ceiling", "1 thread", "threads:", opt_threads, "ratio");
    for (k = 1; k < BENCH_N_CEILINGS; k++) {
        if (!have[k]) continue;
        memset(a, 0, sizeof a);
        for (t = 0; t < 2; t++) a[t].probe = &probes[k], a[t].threads = t ? opt_threads : 1;
        ok = measure(a, 2, 0.3 * row_seconds);
        printf("%-22s %12.1f %13.1f %8.2f  %s%s\n", bench_ceiling_names[k], a[0].median,
               a[1].median, a[1].median / a[0].median, k == BENCH_READ ? "GB/s" : "GFLOP/s",
               ok ? "" : " ~");
    }
}

static void machine(void) {
    char text[256], name[128] = "";
    FILE *f = fopen("/proc/cpuinfo", "r");
    double load = 0;
    while (f && fgets(text, sizeof text, f))
        if (!strncmp(text, "model name", 10) && strchr(text, ':')) {
            snprintf(name, sizeof name, "%.120s", strchr(text, ':') + 2);
            name[strcspn(name, "\n")] = 0;
            break;
        }
    if (f) fclose(f);
    if ((f = fopen("/proc/loadavg", "r")) != NULL) {
        if (fscanf(f, "%lf", &load) != 1) load = 0;
        fclose(f);
    }
    printf("%s, %ld cores, load average %.2f, last cache %zu MiB, rotating over %zu MiB, best "
           "executor %s\n",
           name, sysconf(_SC_NPROCESSORS_ONLN), load, bench_l3_bytes() >> 20, arena_bytes >> 20,
           attn_cpu_isa_name(best_isa));
}

int main(int argc, char **argv) {
    const char *only = NULL;
    double t0 = bench_now();
    int i, as_lists = 0, queries = 0, cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    size_t ram = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE), j;
    for (i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            opt_quick = 1, row_seconds = 0.4;
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            only = argv[++i];
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
            opt_threads = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--seconds") && i + 1 < argc)
            row_seconds = atof(argv[++i]); // for perf
        else if (!strcmp(argv[i], "--lists")) {
            as_lists = 1;
            if (i + 1 < argc && atoi(argv[i + 1]) > 0) queries = atoi(argv[++i]);
        } else if (!strcmp(argv[i], "--crossing"))
            as_lists = 2;
        else
            DIE("usage: bench_cpu [--quick] [--only SUBSTRING] [--threads N] [--seconds S] "
                "[--lists [QUERIES]] [--crossing]");
    }
    if (opt_threads < 1 || opt_threads > BENCH_MAX_THREADS)
        DIE("--threads: 1 to %d", BENCH_MAX_THREADS);
    if (opt_threads > cores) opt_threads = cores;
    best_isa = attn_cpu_get_isa();
    attn_cpu_open();
    arena_bytes = 3 * bench_l3_bytes();
    if (arena_bytes < (size_t)512 << 20) arena_bytes = (size_t)512 << 20;
    if (arena_bytes > ram / 4) arena_bytes = ram / 4 >> 21 << 21;
    arena = (uint8_t *)bench_alloc(arena_bytes + 65536);
    memset(arena, 1, arena_bytes);
    normals = (float *)need(4 * (size_t)N_NORMALS);
    test_fill_normal(&rng, normals, N_NORMALS, 1);
    machine();
    if (as_lists) {
        printf("%-22s %-20s %-10s %-10s %9s %9s %9s %7s %11s %7s\n", "block list", "shape", "KV",
               "Q and O", "kept", "dense ms", "lists ms", "over *", "select ms", "total *");
        if (as_lists == 1) list_tables(queries, only);
        else crossing_tables(only);
        printf("* over: time / (kept share x dense); total: (selector + lists) / dense\n");
        return 0;
    }
    probe_setup();
    ceilings();
    header();
    for (j = 0; j < sizeof rows / sizeof rows[0]; j++) {
        char shape[64], label[160];
        shape_text(&rows[j], shape, sizeof shape);
        snprintf(label, sizeof label, "%s %s %s", rows[j].regime, shape,
                 attn_dtype_name(rows[j].kv_type));
        if ((only && !strstr(label, only)) || (opt_quick && !rows[j].quick && !only)) continue;
        run_row(&rows[j]);
    }
    printf("\n%d rows, %d short of the target, %.0f s.  ~ other programs took the cores: CPU time "
           "counts\n",
           n_measured, n_short, bench_now() - t0);
    return 0;
}

/* A self-test for foreign targets: no framework, files, threads or libm, only stdio. Fixed problems
   over masks, layouts and dtypes on every ISA present, against attn_ref_forward; the PORTABLE bits
   of each as a hash, which must be the same on every machine: compare the last hash with another
   target's, as tests/ports.sh does. A second hash is that of edges: denormals, Inf and NaN, also
   with the host's floating-point unit in another mode.
   cc -std=c11 -O2 -I. tests/selftest.c -o selftest    (C++11 as well: c++ -x c++ -std=c++11 ...) */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
#include <stdio.h>

#define MAX_TOKENS 64  /* query tokens of a problem */
#define MAX_KV 640     /* tokens of both sequences, rounded up to pages */
#define MAX_ROW 256    /* heads x head_dim */
#define EXPECTED_EDGES 0x46f26937u
#define EXPECTED 0xda790d20u /* the same on every machine and under every compiler and flag */

enum kind { CAUSAL, WINDOW, SINKS, FULL, BLOCKS, BITS, STRIDE, VSLASH, KEEP, TREE };

typedef struct problem {
    const char *name;
    int kind, layout;
    attn_dtype k, v, q, o;
    int32_t n_heads, n_kv_heads, head_dim, v_head_dim, page_tokens;
    int32_t kv_len[2], q_len[2];
    int extras; // 1: softcap, 2: ALiBi, 4: sink logits
} problem;

static const problem problems[] = {
    {"causal",
     CAUSAL,
     0,
     ATTN_F32,
     ATTN_F32,
     ATTN_F32,
     ATTN_F32,
     4,
     2,
     64,
     64,
     16,
     {290, 37},
     {1, 20},
     0},
    {"causal, f16",
     CAUSAL,
     2,
     ATTN_F16,
     ATTN_F16,
     ATTN_F16,
     ATTN_F16,
     4,
     1,
     64,
     64,
     32,
     {270, 64},
     {9, 1},
     4},
    {"window",
     WINDOW,
     1,
     ATTN_BF16,
     ATTN_BF16,
     ATTN_BF16,
     ATTN_BF16,
     4,
     2,
     64,
     64,
     7,
     {300, 90},
     {5, 30},
     2},
    {"window, sinks",
     SINKS,
     2,
     ATTN_I8,
     ATTN_I8,
     ATTN_F32,
     ATTN_F32,
     6,
     2,
     32,
     32,
     48,
     {310, 20},
     {3, 20},
     1},
    {"full", FULL, 0, ATTN_I4, ATTN_I4, ATTN_F32, ATTN_F32, 2, 2, 40, 24, 1, {150, 33}, {30, 7}, 6},
    {"blocks",
     BLOCKS,
     1,
     ATTN_F8E4M3,
     ATTN_F8E4M3,
     ATTN_F32,
     ATTN_F32,
     4,
     4,
     16,
     16,
     64,
     {280, 48},
     {40, 10},
     0},
    {"bits per head",
     BITS,
     2,
     ATTN_F8E5M2,
     ATTN_F16,
     ATTN_F32,
     ATTN_F16,
     4,
     2,
     64,
     32,
     16,
     {260, 30},
     {12, 12},
     4},
    {"local-stride",
     STRIDE,
     0,
     ATTN_F32,
     ATTN_I8,
     ATTN_F32,
     ATTN_F32,
     4,
     4,
     24,
     64,
     3,
     {300, 70},
     {2, 50},
     0},
    {"vertical-slash",
     VSLASH,
     1,
     ATTN_I8,
     ATTN_BF16,
     ATTN_BF16,
     ATTN_BF16,
     3,
     1,
     64,
     64,
     16,
     {255, 17},
     {8, 17},
     1},
    {"keep",
     KEEP,
     2,
     ATTN_BF16,
     ATTN_I4,
     ATTN_F32,
     ATTN_F32,
     2,
     1,
     128,
     128,
     16,
     {257, 256},
     {1, 1},
     2},
    {"tree",
     TREE,
     0,
     ATTN_F16,
     ATTN_F8E4M3,
     ATTN_F32,
     ATTN_F32,
     4,
     2,
     32,
     32,
     16,
     {265, 40},
     {12, 9},
     2},
    {"tree, f32",
     TREE,
     1,
     ATTN_F32,
     ATTN_F32,
     ATTN_F32,
     ATTN_F32,
     2,
     2,
     8,
     8,
     5,
     {30, 512},
     {16, 6},
     5}};

static uint64_t rng;

static uint32_t next32(void) { // splitmix64
    uint64_t z = rng += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

// A multiple of 2^-9 in (-4, 4), small values likelier (the sum of two dice): exact in f32 and,
// being of at most 11 bits, in f16.
static float next_float(void) {
    int32_t a = (int32_t)(next32() >> 22), b = (int32_t)(next32() >> 22);
    return (float)(a + b - 1023) * (1.0f / 512);
}

// ---- memory, all static

static float k_rows[MAX_KV * MAX_ROW], v_rows[MAX_KV * MAX_ROW], q_rows[MAX_TOKENS * MAX_ROW];
static float o_rows[MAX_TOKENS * MAX_ROW + 64], lse[MAX_TOKENS * 8];
static double ref[MAX_TOKENS * MAX_ROW], ref_lse[MAX_TOKENS * 8];
static uint16_t q16[MAX_TOKENS * MAX_ROW];
static uint8_t k_pages[4 * (MAX_KV + 600) * MAX_ROW + 64],
    v_pages[4 * (MAX_KV + 600) * MAX_ROW + 64];
static uint8_t memory[12 << 20];
static int64_t slots[MAX_KV];
static int32_t table[2][400], q_start[3], kv_len[2], parents[MAX_TOKENS];
static int64_t row_start[8 * 80], starts[4];
static int32_t ids[8 * 80 * 8], diags[64];
static uint64_t bits[8 * 80 * 8];

static int n_passed, n_failed;
static int edges; // build the problem with denormals, Inf and NaN

static void check(int ok, const char *problem_name, const char *isa, const char *what) {
    if (ok) n_passed++;
    else {
        n_failed++;
        printf("failed: %s, %s: %s\n", problem_name, isa, what);
    }
}

// ---- building a problem

static void set_lists(attn_mask *m, int32_t n_lists, int with_bits) {
    attn_block_list *b = &m->blocks;
    int32_t i, j;
    int64_t n = 0;
    b->row_block = 16;
    b->kv_block = 64;
    b->n_lists = n_lists;
    b->n_rows = 40;
    for (i = 0; i < n_lists * 41; i++) {
        row_start[i] = n;
        if (i % 41 == 40) continue;
        for (j = 0; j < 8; j++)
            if (next32() % 2) ids[n++] = j;
    }
    b->row_start = row_start;
    b->block = ids;
    if (!with_bits) return;
    b->bits_rows = 4;
    b->bits_cols = 16;
    for (i = 0; i < n; i++) bits[i] = (uint64_t)next32() << 32 | next32();
    b->bits = bits;
}

static void set_mask(const problem *p, attn_desc *d) {
    attn_mask *m = &d->mask;
    int32_t s, t;
    if (p->kind == WINDOW || p->kind == SINKS || p->kind == TREE) m->window_left = 101;
    if (p->kind == SINKS || p->kind == TREE) m->n_sink = 5;
    if (p->kind == FULL) m->kind = ATTN_MASK_FULL, m->window_right = 20;
    if (p->kind == BLOCKS) set_lists(m, 1, 0);
    if (p->kind == BITS) set_lists(m, p->n_heads, 1);
    if (p->kind == KEEP) m->keep_sink = 4, m->keep_recent = 33;
    if (p->kind == STRIDE) {
        m->stride.block = 16;
        m->stride.local = 2;
        m->stride.stride = 5;
        m->stride.n_dense = 1;
    }
    if (p->kind == VSLASH) {
        int32_t n = 0, g = 0;
        for (t = 0; t < 60; t++) {
            if (next32() % 4 == 0) ids[n++] = t;
            if (next32() % 4 == 0) diags[g++] = t;
        }
        m->vslash.block = 8;
        m->vslash.n_lists = 1;
        starts[0] = 0, starts[1] = n, starts[2] = 0, starts[3] = g;
        m->vslash.col_start = starts, m->vslash.diag_start = starts + 2;
        m->vslash.col = ids, m->vslash.diag = diags;
    }
    if (p->kind != TREE) return;
    m->kind = ATTN_MASK_TREE;
    for (s = 0; s < 2; s++)
        for (t = 0; t < p->q_len[s]; t++)
            parents[q_start[s] + t] = (int32_t)(next32() % (uint32_t)(t + 1)) - 1;
    m->tree_parent = parents;
}

// K of both sequences and V of the first become denormals, made from bits since this program's
// arithmetic may flush them; the last tokens of the second hold NaN and Inf. The logit scale makes
// the tiny scores matter.
static void spoil(const problem *p, attn_desc *d, int32_t n) {
    int32_t kd = p->n_kv_heads * p->head_dim, vd = p->n_kv_heads * p->v_head_dim, j;
    for (j = 0; j < n * kd; j++) k_rows[j] = attni_float(next32() & 0x807fffffu);
    for (j = 0; j < n * kd; j += 3) k_rows[j] = attni_float(next32() & 0x800fffffu);
    for (j = 0; j < kv_len[0] * vd; j++) v_rows[j] = attni_float(next32() & 0x807fffffu);
    k_rows[(n - 1) * kd] = attni_float(0x7fc00000u);
    v_rows[(n - 3) * vd + 1] = attni_float(0x7f800000u);
    k_rows[(n - 5) * kd + 2] = attni_float(0xff800000u);
    v_rows[(n - 7) * vd + 3] = attni_float(0xffc00000u);
    d->logits.scale = attni_float(0x7e000000u); // 2^125
}

static void *align64(void *p) { return (void *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

static void build(const problem *p, attn_desc *d) {
    static const float slopes[8] = {0.25f, 0.125f, 0.0625f, 0.03125f, 0.5f, 0.75f, 0, 1};
    static const float sinks[8] = {1.5f, -2, 0, 4, 3, -1, 2, 0.25f};
    int32_t s, j, pt = p->page_tokens, page = 0, n = 0;
    attn_tensor k, v;
    memset(d, 0, sizeof *d);
    d->n_seq = 2;
    d->n_heads = p->n_heads;
    d->n_kv_heads = p->n_kv_heads;
    d->head_dim = p->head_dim;
    d->v_head_dim = p->v_head_dim;
    for (s = 0; s < 2; s++) {
        q_start[s + 1] = q_start[s] + p->q_len[s];
        kv_len[s] = p->kv_len[s];
    }
    d->q_start = q_start;
    d->kv.kv_len = kv_len;
    d->kv.layout = (attn_layout)p->layout;
    d->kv.page_tokens = pt;
    d->kv.k.dtype = p->k;
    d->kv.v.dtype = p->v;
    d->kv.k.data = align64(k_pages);
    d->kv.v.data = align64(v_pages);
    for (j = 0; j * pt < kv_len[0] || j * pt < kv_len[1]; j++) // the two sequences' pages alternate
        for (s = 0; s < 2; s++)
            if (j * pt < kv_len[s]) table[s][j] = page++;
    d->kv.n_pages = page;
    d->kv.page_table = &table[0][0];
    d->kv.page_table_stride = 400;
    memset(k_pages, 0xff, sizeof k_pages); // NaN where nothing is stored
    memset(v_pages, 0xff, sizeof v_pages);
    for (s = 0; s < 2; s++)
        for (j = 0; j < kv_len[s]; j++) slots[n++] = (int64_t)table[s][j / pt] * pt + j % pt;
    for (j = 0; j < n * p->n_kv_heads * p->head_dim; j++) k_rows[j] = next_float();
    for (j = 0; j < n * p->n_kv_heads * p->v_head_dim; j++) v_rows[j] = next_float();
    if (edges) spoil(p, d, n);
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = k_rows;
    v.data = v_rows;
    check(attn_cpu_store(d, &k, &v, slots, 0, n) == ATTN_OK, p->name, "store", "ATTN_OK");
    for (j = 0; j < q_start[2] * p->n_heads * p->head_dim; j++) {
        q_rows[j] = next_float();
        q16[j] = p->q == ATTN_BF16 ? attni_to_bf16(q_rows[j]) : attni_to_f16(q_rows[j]);
    }
    d->q.data = p->q == ATTN_F32 ? (void *)q_rows : (void *)q16;
    d->q.dtype = p->q;
    d->o.data = o_rows;
    d->o.dtype = p->o;
    d->lse = lse;
    if (p->extras & 1) d->logits.softcap = 6;
    if (p->extras & 2) d->logits.alibi = slopes;
    if (p->extras & 4) d->logits.sink = sinks;
    set_mask(p, d);
}

// ---- running and comparing

static uint32_t hash_floats(uint32_t h, const float *x, int32_t n) { // FNV-1a, every NaN alike
    for (; n > 0; n--, x++) {
        uint32_t u = attni_isnan(*x) ? 0x7fc00000u : attni_bits32(*x), b;
        for (b = 0; b < 4; b++, u >>= 8) h = (h ^ (u & 255)) * 16777619u;
    }
    return h;
}

static int run(const problem *p, attn_desc *d, const char *isa, uint32_t *hash) {
    void *mem = align64(memory);
    size_t bytes = attn_cpu_forward_bytes(d, 1);
    int32_t n = q_start[2] * p->n_heads, i;
    int bdot = strstr(attn_cpu_executor(d), "bdot") != NULL;
    double worst = 0,
           limit = p->o == ATTN_F32   ? 2e-5
                   : p->o == ATTN_F16 ? 4e-3
                   : bdot             ? 8e-2
                                      : 3e-2,
           e;
    double worst_lse = 0;
    check(bytes > 0 && bytes <= sizeof memory - 64, p->name, isa, "workspace");
    memset(o_rows, 0xff, sizeof o_rows);
    memset(lse, 0xff, sizeof lse);
    if (bytes == 0 || bytes > sizeof memory - 64) return 0;
    if (attn_cpu_forward(d, mem, bytes, 1) != ATTN_OK) return 0;
    for (i = n * p->v_head_dim - 1; i >= 0; i--) // in place, from the back: O as floats
        o_rows[i] = attni_get(o_rows, p->o, i);
    for (i = 0; i < n * p->v_head_dim; i++) {
        e = (double)o_rows[i] - ref[i];
        if (e < 0) e = -e;
        if (!(e <= worst)) worst = e;
    }
    for (i = 0; i < n; i++) {
        e = (double)lse[i] - ref_lse[i];
        if (e < 0) e = -e;
        if ((double)lse[i] == ref_lse[i]) e = 0; // -inf too
        if (!(e <= worst_lse)) worst_lse = e;
    }
    *hash = hash_floats(hash_floats(2166136261u, o_rows, n * p->v_head_dim), lse, n);
    check(worst_lse <= (bdot ? 2e-2 : 5e-5), p->name, isa, "log-sum-exp near the reference");
    if (!(worst <= limit)) printf("  error %g, limit %g\n", worst, limit);
    return worst <= limit;
}

// The host's mode: denormals flushed and rounding up, or as it was. 0: no way to set it here.
static uint64_t host_mode(int other, uint64_t was) {
#if defined(__GNUC__) && defined(__SSE2__)
    uint32_t x;
    __asm__ volatile("stmxcsr %0" : "=m"(x) : : "memory");
    was = other ? x : was;
    x = other ? (x & ~0xe040u) | 0xc040u : (uint32_t)was;
    __asm__ volatile("ldmxcsr %0" : : "m"(x) : "memory");
#elif defined(__GNUC__) && defined(__aarch64__)
    uint64_t x;
    __asm__ volatile("mrs %0, fpcr" : "=r"(x) : : "memory");
    was = other ? x : was;
    x = other ? (x & ~(uint64_t)0x01c00000u) | 0x01400000u : was;
    __asm__ volatile("msr fpcr, %0" : : "r"(x) : "memory");
#elif defined(__GNUC__) && defined(__arm__) && defined(__ARM_FP)
    uint32_t x;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(x) : : "memory");
    was = other ? x : was;
    x = other ? (x & ~0x01c00000u) | 0x01400000u : (uint32_t)was;
    __asm__ volatile("vmsr fpscr, %0" : : "r"(x) : "memory");
#else
    (void)other;
#endif
    return was;
}

// PORTABLE bits of a problem with edges, which must be NaN where the reference is.
static uint32_t run_edges(const problem *p, attn_desc *d, const char *isa) {
    size_t bytes = attn_cpu_forward_bytes(d, 1);
    int32_t n = q_start[2] * p->n_heads, i, differ = 0;
    memset(o_rows, 0, sizeof o_rows);
    check(attn_cpu_forward(d, align64(memory), bytes, 1) == ATTN_OK, p->name, isa, "edges run");
    for (i = n * p->v_head_dim - 1; i >= 0; i--) o_rows[i] = attni_get(o_rows, p->o, i);
    for (i = 0; i < n * p->v_head_dim; i++) {
        uint64_t u;
        memcpy(&u, &ref[i], 8);
        differ += attni_isnan(o_rows[i]) != ((u << 1) > (uint64_t)0x7ff << 53);
    }
    check(differ == 0, p->name, isa, "NaN where the reference is");
    return hash_floats(hash_floats(2166136261u, o_rows, n * p->v_head_dim), lse, n);
}

// Problems by number in the table above: f32, bf16, int8, a token tree.
static void all_edges(uint32_t combined[ATTN_CPU_ISA_COUNT]) {
    static const int which[4] = {0, 2, 3, 11};
    int i, j, isa;
    edges = 1;
    for (i = 0; i < 4; i++)
        for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
            const problem *p = &problems[which[i]];
            const char *name = attn_cpu_isa_name((attn_cpu_isa)isa);
            attn_desc d;
            uint64_t mode;
            uint32_t hash;
            if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
            (void)attn_cpu_set_isa((attn_cpu_isa)isa);
            rng = (uint64_t)i + 77;
            build(p, &d); // K and V stored by this ISA too
            d.numerics = ATTN_NUMERICS_PORTABLE;
            check(attn_ref_forward(&d, ref, ref_lse) == ATTN_OK, p->name, "reference", "ATTN_OK");
            hash = run_edges(p, &d, name);
            for (j = 0; j < 4; j++)
                combined[isa] = (combined[isa] ^ ((hash >> (8 * j)) & 255)) * 16777619u;
            mode = host_mode(1, 0);
            rng = (uint64_t)i + 77;
            build(p, &d);
            d.numerics = ATTN_NUMERICS_PORTABLE;
            check(run_edges(p, &d, name) == hash, p->name, name, "bits in the host's mode");
            host_mode(0, mode);
        }
    edges = 0;
}

int main(void) {
    uint32_t combined[ATTN_CPU_ISA_COUNT], of_edges[ATTN_CPU_ISA_COUNT], hash;
    int i, isa, j;
    for (isa = 0; isa < ATTN_CPU_ISA_COUNT; isa++) combined[isa] = of_edges[isa] = 2166136261u;
    (void)attn_cpu_open();
    printf("%-16s PORTABLE bits of every ISA\n", "problem");
    for (i = 0; i < (int)(sizeof problems / sizeof problems[0]); i++) {
        const problem *p = &problems[i];
        attn_desc d;
        char line[200] = "";
        rng = (uint64_t)(i + 1) * 1000003u;
        (void)attn_cpu_set_isa(ATTN_CPU_SCALAR);
        build(p, &d);
        check(attn_validate(&d) == ATTN_OK, p->name, "validate", "ATTN_OK");
        check(attn_ref_forward(&d, ref, ref_lse) == ATTN_OK, p->name, "reference", "ATTN_OK");
        for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
            const char *name = attn_cpu_isa_name((attn_cpu_isa)isa);
            if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
            check(attn_cpu_set_isa((attn_cpu_isa)isa) == ATTN_OK, p->name, name, "set_isa");
            d.numerics = ATTN_NUMERICS_FAST;
            hash = 0;
            check(run(p, &d, name, &hash), p->name, name, "FAST near the reference");
            d.numerics = ATTN_NUMERICS_PORTABLE;
            check(run(p, &d, name, &hash), p->name, name, "PORTABLE near the reference");
            if (strlen(line) + 10 < sizeof line)
                sprintf(line + strlen(line), " %08x", (unsigned)hash);
            for (j = 0; j < 4; j++)
                combined[isa] = (combined[isa] ^ ((hash >> (8 * j)) & 255)) * 16777619u;
        }
        printf("%-16s%s\n", p->name, line);
    }
    all_edges(of_edges);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        const char *name = attn_cpu_isa_name((attn_cpu_isa)isa);
        if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
        printf("portable hash: %08x  %s  edges %08x\n", (unsigned)combined[isa], name,
               (unsigned)of_edges[isa]);
        check(combined[isa] == EXPECTED, "all", name, "the PORTABLE bits of other machines");
        check(of_edges[isa] == EXPECTED_EDGES, "edges", name, "the bits of other machines");
    }
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}

/* attn_cpu.h - v0.1 - MIT licence, see the end of attn.h
   CPU executors for attn.h: scalar, AVX2, AVX-512, AVX-512-BF16 (+VNNI), AMX-BF16, NEON, NEON-BF16,
   chosen at run time in one translation unit that needs no -m flags.

   DO THIS in exactly one C or C++ file (or define ATTN_IMPLEMENTATION, see attn.h):
       #define ATTN_CPU_IMPLEMENTATION
       #include "attn_cpu.h"

   EXAMPLE   one call:   bytes = attn_cpu_forward_bytes(&d, threads);
                         attn_cpu_forward(&d, mem, bytes, threads);
   an engine's step:     attn_cpu_plan_params(&d, workers, &params);         once
                         attn_plan_build(&d, &params, mem, bytes, &plan);    or attn_plan_update
       every layer:      attn_cpu_store(&d, &k, &v, NULL, 0, n_tokens);      new K, V into pages
       any threads:      attn_cpu_run(&d, plan, i, 1, partials, scratch[thread]); i < plan->n_tasks
       after a barrier:  attn_cpu_merge(&d, plan, i, 1, partials);           i < plan->n_merges

   CONTENTS  >>isa  >>store  >>run   and behind  >>impl-:
             kernels, types, scalar, avx2, avx512, dots, neon, dispatch, store, tasks, run

   MACROS    ATTN_CPU_IMPLEMENTATION   implement this header
             ATTN_CPU_SCALAR_ONLY      leave the SIMD executors out (bring-up on odd toolchains)

   MEMORY    Plans, scratch and partials: 64-byte aligned, the caller's. Nothing is allocated.
   THREADS   attn_cpu_run and attn_cpu_merge may run on any threads at once, each with its own
             scratch, on disjoint tasks. What was learnt about the CPU is the only state, atomic.
   NUMERICS  FAST: FMA in f32; where Q, K and O are bf16 the scores, and where V and O are bf16
             the weighted sums, use the bf16 dot product of AVX-512-BF16, AMX or NEON-BF16.
             PORTABLE: separate multiply and add, the same bits on every ISA.
             APPROX: as FAST, and int8 keys are scored by integer dot products (VNNI, DotProd). */

#ifndef ATTN_CPU_H
#define ATTN_CPU_H

#include "attn.h"
#if ATTN_VERSION != 100
#error "attn_cpu.h and attn.h are of different versions: copy both from the same release"
#endif

// ==== >>isa  Which executor ======================================================================

#define ATTN_CPU_ISAS(X)                                                                           \
    X(AUTO, 0, "auto")                                                                             \
    X(SCALAR, 1, "scalar")                                                                         \
    X(AVX2, 2, "avx2")             /* + FMA, F16C */                                               \
    X(AVX512, 3, "avx512")         /* F, BW, VL, DQ; VNNI under APPROX when present */             \
    X(AVX512_BF16, 4, "avx512bf16")                                                                \
    X(AMX, 5, "amx")               /* + attn_cpu_open */                                           \
    X(NEON, 6, "neon")                                                                             \
    X(NEON_BF16, 7, "neonbf16")    /* + BF16 and DotProd */

typedef enum attn_cpu_isa {
#define ATTNI_X(name, value, text) ATTN_CPU_##name = value,
    ATTN_CPU_ISAS(ATTNI_X)
#undef ATTNI_X
        ATTN_CPU_ISA_COUNT
} attn_cpu_isa;

ATTN_DEF const char *attn_cpu_isa_name(attn_cpu_isa isa); // "avx512", ...
ATTN_DEF int attn_cpu_has(attn_cpu_isa isa);              // 1 when compiled in and present
ATTN_DEF attn_cpu_isa attn_cpu_get_isa(void);             // the one in use
// Forces an executor for the whole process, for tests and comparisons; AUTO: the best one again.
// ERR_UNSUPPORTED when it is not there.
ATTN_DEF attn_result attn_cpu_set_isa(attn_cpu_isa isa);
// Asks the operating system for the AMX tile registers (Linux needs it once per process) and lets
// AUTO choose AMX. Optional; ATTN_OK also where there is no AMX.
ATTN_DEF attn_result attn_cpu_open(void);
// The kernels a problem runs on, e.g. "avx512bf16:bdot,bdot" (scores, weighted sums); static text.
ATTN_DEF const char *attn_cpu_executor(const attn_desc *d);
// ATTN_OK for every valid problem: on the CPU no combination is unsupported.
ATTN_DEF attn_result attn_cpu_supports(const attn_desc *d);

// ==== >>store  Writing K and V into pages ========================================================

// Converts rows [first, first + count) of k (n_tokens, n_kv_heads, head_dim) and v (.., v_head_dim)
// to the pages' dtypes and layout and writes them at slots[row] = page * page_tokens + place;
// slots[row] < 0 skips a row. slots NULL: every query token's own position (attn_kv_slots). k or v
// may be NULL. Scaled dtypes: scale = max |x| over the row's head / largest code, stored beside,
// unless head_scale. ERR_PAGE when a slot lies outside the pool; nothing is written then. Thread
// rule: disjoint rows.
ATTN_DEF attn_result attn_cpu_store(const attn_desc *d, const attn_tensor *k, const attn_tensor *v,
                                    const int64_t *slots, int64_t first, int64_t count);

// Carries out page copies of the tree in d's K and V pages (one layer), in the list's order; only
// the first n_tokens slots of dst are written.
ATTN_DEF attn_result attn_cpu_copy_pages(const attn_desc *d, const attn_page_copy *copies,
                                         int32_t n);

// ==== >>run  Running a plan ======================================================================

// Fills in the planner's parameters for this backend: row tile, cost model, a 64 MiB bound on
// partials.
ATTN_DEF void attn_cpu_plan_params(const attn_desc *d, int32_t workers, attn_plan_params *out);

// Scratch one thread needs for a plan of d (and its updates); 0 when d or p is NULL.
ATTN_DEF size_t attn_cpu_scratch_bytes(const attn_desc *d, const attn_plan *p);

// Runs tasks [first, first + count) of the plan. partials: attn_plan_partial_bytes, shared by all
// threads (NULL when 0); scratch: attn_cpu_scratch_bytes, this thread's own.
// ERR_STALE when d's lengths are not those of the plan; ERR_PAGE when a page id left the pool
// since.
ATTN_DEF attn_result attn_cpu_run(const attn_desc *d, const attn_plan *p, int32_t first,
                                  int32_t count, void *partials, void *scratch);

// Folds the partials of sequences plan->merge[first ..] and writes their O. After all tasks have
// run.
ATTN_DEF attn_result attn_cpu_merge(const attn_desc *d, const attn_plan *p, int32_t first,
                                    int32_t count, const void *partials);

// Plan, tasks and merge in one call, in parallel when compiled with OpenMP (else n_threads is only
// a hint to the planner). mem: attn_cpu_forward_bytes (0 when d is invalid), any alignment.
ATTN_DEF size_t attn_cpu_forward_bytes(const attn_desc *d, int32_t n_threads);
ATTN_DEF attn_result attn_cpu_forward(const attn_desc *d, void *mem, size_t bytes,
                                      int32_t n_threads);

#endif // ATTN_CPU_H

// ==== Stop here if you only want the API. ========================================================

#ifdef ATTNI_KERNEL_PASS
// ==== >>impl-kernels  Written once, included again by this file for every ISA and numerics =======
//
// ATTNI_I(f): vocabulary function f of this pass's ISA. ATTNI_K(f): the kernel's own name.
// ATTNI_NR x ATTNI_NC: register block, rows x (16-lane vectors). ATTNI_DIRECT16: has kernels that
// read f16 rows and tiles without converting them first.

#define V ATTNI_I(V)
#define U ATTNI_I(U)

// Register blocks of NR, 4 or 1 rows. Buffers have spare rows behind the last, so that a block may
// be taller than what is left.
#define ATTNI_STEP(left) ((left) >= 5 || ATTNI_NR == 1 ? ATTNI_NR : (left) >= 2 ? 4 : 1)
#define ATTNI_ARGS(...) __VA_ARGS__
#define ATTNI_CALL(f, args, nr, nc) ATTNI_CALL2(f, ATTNI_ARGS args nr, nc)
#define ATTNI_CALL2(f, ...) f(__VA_ARGS__)
#if ATTNI_NR > 1
#define ATTNI_ROWS(f, args, nc)                                                                    \
    if (left >= 5) ATTNI_CALL(f, args, ATTNI_NR, nc);                                              \
    else if (left >= 2) ATTNI_CALL(f, args, 4, nc);                                                \
    else ATTNI_CALL(f, args, 1, nc);
#else
#define ATTNI_ROWS(f, args, nc)                                                                    \
    (void)left;                                                                                    \
    ATTNI_CALL(f, args, 1, nc);
#endif

#if ATTNI_KERNEL_PASS == 1 // ---- moves: no rounding arithmetic, so one copy per ISA

// Codes in the low byte of each lane -> values.
ATTNI_INLINE ATTNI_TGT V ATTNI_I(e5m2)(U x) { return ATTNI_I(uhalf)(ATTNI_I(ushl)(x, 8)); }
ATTNI_INLINE ATTNI_TGT V ATTNI_I(e4m3)(U x) {
    // the same fields in an f16 mean 2^-8 times the value; 0x7f is NaN
    U low = ATTNI_I(uand)(x, 127);
    U h = ATTNI_I(uor)(ATTNI_I(ushl)(low, 7), ATTNI_I(ushl)(ATTNI_I(uand)(x, 128), 8));
    V v = ATTNI_I(mul)(ATTNI_I(uhalf)(h), ATTNI_I(set1)(256.0f));
    return ATTNI_I(uequal)(low, ATTNI_I(uset1)(127), ATTNI_I(asv)(ATTNI_I(uset1)(0x7fc00000u)), v);
}

// Element i of the 32 / bits elements in each lane's 4-byte unit.
ATTNI_HELPER ATTNI_TGT V ATTNI_I(element)(attn_dtype t, U x, int i) {
    switch (t) {
    case ATTN_F16: return ATTNI_I(uhalf)(i ? ATTNI_I(ushr)(x, 16) : x);
    case ATTN_BF16: return ATTNI_I(asv)(i ? ATTNI_I(uand)(x, 0xffff0000u) : ATTNI_I(ushl)(x, 16));
    case ATTN_F8E4M3: return ATTNI_I(e4m3)(ATTNI_I(ushr)(x, 8 * i));
    case ATTN_F8E5M2: return ATTNI_I(e5m2)(ATTNI_I(ushr)(x, 8 * i));
    case ATTN_I8: return ATTNI_I(utop)(ATTNI_I(ushl)(x, 24 - 8 * i), 8);
    case ATTN_I4: return ATTNI_I(utop)(ATTNI_I(ushl)(x, 28 - 4 * i), 4);
    default: return ATTNI_I(asv)(x);
    }
}

// 16 elements of a row.
ATTNI_HELPER ATTNI_TGT V ATTNI_I(row16)(attn_dtype t, const uint8_t *p) {
    switch (t) {
    case ATTN_F16: return ATTNI_I(uhalf)(ATTNI_I(uload16)(p));
    case ATTN_BF16: return ATTNI_I(asv)(ATTNI_I(ushl)(ATTNI_I(uload16)(p), 16));
    case ATTN_F8E4M3: return ATTNI_I(e4m3)(ATTNI_I(uload8)(p));
    case ATTN_F8E5M2: return ATTNI_I(e5m2)(ATTNI_I(uload8)(p));
    case ATTN_I8: return ATTNI_I(utop)(ATTNI_I(ushl)(ATTNI_I(uload8)(p), 24), 8);
    case ATTN_I4: return ATTNI_I(utop)(ATTNI_I(ushl)(ATTNI_I(uload4)(p), 28), 4);
    default: return ATTNI_I(asv)(ATTNI_I(uload)(p));
    }
}

#define ATTNI_BY_DTYPE(CALL)                                                                       \
    switch (t) {                                                                                   \
    case ATTN_F16: CALL(ATTN_F16, 2); break;                                                       \
    case ATTN_BF16: CALL(ATTN_BF16, 2); break;                                                     \
    case ATTN_F8E4M3: CALL(ATTN_F8E4M3, 4); break;                                                 \
    case ATTN_F8E5M2: CALL(ATTN_F8E5M2, 4); break;                                                 \
    case ATTN_I8: CALL(ATTN_I8, 4); break;                                                         \
    case ATTN_I4: CALL(ATTN_I4, 8); break;                                                         \
    default: CALL(ATTN_F32, 1); break;                                                             \
    }

ATTNI_TGT static void ATTNI_I(widen_tile)(attn_dtype t, const uint32_t *tile, int units,
                                          float *out) {
    int u, i;
#define ATTNI_TILE_CALL(T, P)                                                                      \
    for (u = 0; u < units; u++) {                                                                  \
        U x = ATTNI_I(uload)(tile + 16 * u);                                                       \
        ATTNI_UNROLL for (i = 0; i < P; i++)                                                       \
            ATTNI_I(store)(out + 16 * (u * P + i), ATTNI_I(element)(T, x, i));                     \
    }
    ATTNI_BY_DTYPE(ATTNI_TILE_CALL)
#undef ATTNI_TILE_CALL
}

ATTNI_TGT static void ATTNI_I(widen)(attn_dtype t, const void *src, int n, float *out) {
    const uint8_t *p = (const uint8_t *)src;
    int i = 0;
#define ATTNI_ROW_CALL(T, P)                                                                       \
    for (; i + 16 <= n; i += 16) ATTNI_I(store)(out + i, ATTNI_I(row16)(T, p + i * 4 / P));
    ATTNI_BY_DTYPE(ATTNI_ROW_CALL)
#undef ATTNI_ROW_CALL
    if (i == n) return;
    for (; i < n; i++) out[i] = attni_get(src, t, i);
    for (; i % 16; i++) out[i] = 0;
}

// bf16 bits of each lane, round to nearest even, NaN stays NaN.
ATTNI_INLINE ATTNI_TGT U ATTNI_I(to_bf16)(V x) {
    U u = ATTNI_I(asu)(x), odd = ATTNI_I(uand)(ATTNI_I(ushr)(u, 16), 1);
    U r = ATTNI_I(uadd)(u, ATTNI_I(uadd)(odd, ATTNI_I(uset1)(0x7fff)));
    // NaN: not (|x| <= inf), seen as |x| - inf > 0 on the bits
    U a = ATTNI_I(uand)(u, 0x7fffffffu);
    U nan = ATTNI_I(ushr)(ATTNI_I(uadd)(a, ATTNI_I(uset1)(0x007fffffu)), 31);
    V v =
        ATTNI_I(uequal)(nan, ATTNI_I(uset1)(1),
                        ATTNI_I(asv)(ATTNI_I(uor)(u, ATTNI_I(uset1)(0x400000u))), ATTNI_I(asv)(r));
    return ATTNI_I(ushr)(ATTNI_I(asu)(v), 16);
}

ATTNI_TGT static void ATTNI_I(narrow)(attn_dtype t, const float *src, int n, void *dst) {
    uint8_t *p = (uint8_t *)dst;
    int i = 0;
    if (t == ATTN_F16)
        for (; i + 16 <= n; i += 16) ATTNI_I(store_f16)(p + 2 * i, ATTNI_I(load)(src + i));
    else if (t == ATTN_BF16)
        for (; i + 16 <= n; i += 16)
            ATTNI_I(ustore16)(p + 2 * i, ATTNI_I(to_bf16)(ATTNI_I(load)(src + i)));
    else {
        memcpy(dst, src, 4 * (size_t)n);
        return;
    }
    for (; i < n; i++) attni_put(dst, t, i, src[i]);
}

ATTNI_TGT static int ATTNI_I(special)(const float *x, int64_t n) {
    U bad = ATTNI_I(uset1)(0);
    uint32_t b[16];
    int64_t i;
    int j;
    for (i = 0; i < n; i += 16) { // the exponent's carry shows in the sign bit
        U a = ATTNI_I(uand)(ATTNI_I(uload)(x + i), 0x7f800000u);
        bad = ATTNI_I(uor)(bad, ATTNI_I(uadd)(a, ATTNI_I(uset1)(0x00800000u)));
    }
    bad = ATTNI_I(ushr)(bad, 31);
    memcpy(b, &bad, 64);
    for (j = 1; j < 16; j++) b[0] |= b[j];
    return (int)b[0];
}

// Rows t, t + 1 of 16-bit values side by side: out[t / 2][n] of (even, odd) pairs, for the bf16
// dot.
ATTNI_TGT static void ATTNI_I(pairs)(const void *const *row, const attni_run *run, int n_runs,
                                     int n, int ldo, uint32_t *out) {
    int i, t, e;
    for (i = 0; i < n_runs; i++)
        for (t = run[i].t0; t < run[i].t1; t += 2) {
            const uint8_t *a = (const uint8_t *)row[t], *b = (const uint8_t *)row[t + 1];
            uint32_t *o = out + (int64_t)(t / 2) * ldo;
            ATTNI_PREFETCH((const uint8_t *)row[t + 32]);
            ATTNI_PREFETCH((const uint8_t *)row[t + 33]);
            for (e = 0; e + 16 <= n; e += 16) {
                U x = ATTNI_I(uor)(ATTNI_I(uload16)(a + 2 * e),
                                   ATTNI_I(ushl)(ATTNI_I(uload16)(b + 2 * e), 16));
                ATTNI_I(store)((float *)(void *)(o + e), ATTNI_I(asv)(x));
            }
            for (; e < n; e++) {
                uint16_t x, y;
                memcpy(&x, a + 2 * e, 2);
                memcpy(&y, b + 2 * e, 2);
                o[e] = x | (uint32_t)y << 16;
            }
            for (; e < ldo; e++) o[e] = 0;
        }
}

static const attni_moves ATTNI_I(moves) = {ATTNI_I(pack), ATTNI_I(widen_tile), ATTNI_I(widen),
                                           ATTNI_I(narrow), ATTNI_I(special), ATTNI_I(pairs)};

#undef ATTNI_KERNEL_PASS
#define ATTNI_KERNEL_PASS 2
#define ATTNI_PORTABLE 1
#define ATTNI_K(f) ATTNI_I(f##_portable)
#include "attn_cpu.h"
#undef ATTNI_PORTABLE
#undef ATTNI_K
#if ATTNI_FAST_TOO
#define ATTNI_PORTABLE 0
#define ATTNI_K(f) ATTNI_I(f##_fast)
#include "attn_cpu.h"
#undef ATTNI_PORTABLE
#undef ATTNI_K
#endif
#undef ATTNI_FAST_TOO
#undef ATTNI_KERNEL_PASS
#undef ATTNI_TGT
#undef ATTNI_I
#undef ATTNI_NR
#undef ATTNI_NC
#undef ATTNI_DIRECT16
#undef ATTNI_HELPER

#elif ATTNI_KERNEL_PASS == 2 // ---- math: one copy per ISA and numerics

#if ATTNI_PORTABLE
#define ATTNI_MADD(a, b, c) ATTNI_I(add)(ATTNI_I(barrier)(ATTNI_I(mul)(a, b)), c)
#else
#define ATTNI_MADD(a, b, c) ATTNI_I(fma)(a, b, c)
#endif

// Scores: c[r][j] is one multiply-add chain over d, lanes are the 16 tokens of tile j. Bits depend
// on nothing else, so any register block gives the same.
#define ATTNI_QK(name, T, P)                                                                       \
    ATTNI_INLINE ATTNI_TGT void ATTNI_K(name##_block)(                                             \
        const float *q, int64_t ldq, const uint32_t *const *kt, const uint8_t *col, int units,     \
        float *s, const int nr, const int nc) {                                                    \
        V c[ATTNI_NR][ATTNI_NC], b[ATTNI_NC], a;                                                   \
        U raw[ATTNI_NC];                                                                           \
        int r, j, i, u;                                                                            \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] =      \
            ATTNI_I(set1)(0);                                                                      \
        for (u = 0; u < units; u++) {                                                              \
            ATTNI_UNROLL for (j = 0; j < nc; j++) raw[j] = ATTNI_I(uload)(kt[j] + 16 * u);         \
            if (nr <= 4) /* few rows: memory is what one waits for */                              \
                ATTNI_UNROLL for (j = 0; j < nc; j++) ATTNI_PREFETCH(kt[j + nc] + 16 * u);         \
            ATTNI_UNROLL for (i = 0; i < P; i++) {                                                 \
                ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] = ATTNI_I(element)(T, raw[j], i);       \
                ATTNI_UNROLL for (r = 0; r < nr; r++) {                                            \
                    a = ATTNI_I(set1)(q[r * ldq + u * P + i]);                                     \
                    ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_MADD(a, b[j], c[r][j]);  \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++)                \
            ATTNI_I(store)(s + r * ATTN_SPAN + 16 * col[j], c[r][j]);                              \
    }                                                                                              \
    ATTNI_TGT static void ATTNI_K(name)(const void *qv, int64_t ldq, int nr,                       \
                                        const uint32_t *const *kt, const uint8_t *col, int nt,     \
                                        int units, float *s) {                                     \
        const float *q = (const float *)qv;                                                        \
        int r, j;                                                                                  \
        for (r = 0; r < nr;) {                                                                     \
            const float *qr = q + r * ldq;                                                         \
            float *sr = s + r * ATTN_SPAN;                                                         \
            int left = nr - r;                                                                     \
            for (j = 0; j < nt; j += ATTNI_NC) {                                                   \
                ATTNI_ROWS(ATTNI_K(name##_block), (qr, ldq, kt + j, col + j, units, sr, ),         \
                           ATTNI_NC)                                                               \
            }                                                                                      \
            r += ATTNI_STEP(left);                                                                 \
        }                                                                                          \
    }

ATTNI_QK(qk_f32, ATTN_F32, 1)
#if ATTNI_DIRECT16 && !ATTNI_PORTABLE
ATTNI_QK(qk_f16, ATTN_F16, 2)
#endif

// Weighted sums: o[r][e] is one chain over the tokens of the span, lanes are d. The last block of
// columns overlaps the one before (the same bits again); fewer than a block go one vector at a
// time.
#define ATTNI_PV(name, T, BYTES)                                                                   \
    ATTNI_INLINE ATTNI_TGT void ATTNI_K(name##_block)(                                             \
        const float *p, const void *const *row, const attni_run *run, int n, int e, float *o,      \
        int64_t ldo, const int nr, const int nc) {                                                 \
        V c[ATTNI_NR][ATTNI_NC], b[ATTNI_NC], a;                                                   \
        int r, j, t, i;                                                                            \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] =      \
            ATTNI_I(set1)(0);                                                                      \
        for (i = 0; i < n; i++)                                                                    \
            for (t = run[i].t0; t < run[i].t1; t++) {                                              \
                const uint8_t *v = (const uint8_t *)row[t] + BYTES * e;                            \
                ATTNI_PREFETCH((const uint8_t *)row[t + 32] + BYTES * e);                          \
                ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] =                                       \
                    ATTNI_I(row16)(T, v + 16 * BYTES * j);                                         \
                ATTNI_UNROLL for (r = 0; r < nr; r++) {                                            \
                    a = ATTNI_I(set1)(p[r * ATTN_SPAN + t]);                                       \
                    ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_MADD(a, b[j], c[r][j]);  \
                }                                                                                  \
            }                                                                                      \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++)                \
            ATTNI_I(store)(o + r * ldo + e + 16 * j, c[r][j]);                                     \
    }                                                                                              \
    ATTNI_TGT static void ATTNI_K(name)(const void *pv, int nr, const void *const *row,            \
                                        const attni_run *run, int n, int vd, float *o,             \
                                        int64_t ldo) {                                             \
        const float *p = (const float *)pv;                                                        \
        int r, e;                                                                                  \
        for (r = 0; r < nr;) {                                                                     \
            const float *pr = p + r * ATTN_SPAN;                                                   \
            float *or_ = o + r * ldo;                                                              \
            int left = nr - r, step = ATTNI_STEP(left), i;                                         \
            for (e = 0; e < vd && vd >= 16 * ATTNI_NC; e += 16 * ATTNI_NC) {                       \
                int at = e <= vd - 16 * ATTNI_NC ? e : vd - 16 * ATTNI_NC;                         \
                ATTNI_ROWS(ATTNI_K(name##_block), (pr, row, run, n, at, or_, ldo, ), ATTNI_NC)     \
            }                                                                                      \
            for (; e < vd; e += 16)                                                                \
                for (i = 0; i < attni_min32(step, left); i++)                                      \
                    ATTNI_K(name##_block)                                                          \
                    (pr + i * ATTN_SPAN, row, run, n, e, or_ + i * ldo, ldo, 1, 1);                \
            r += step;                                                                             \
        }                                                                                          \
    }

ATTNI_PV(pv_f32, ATTN_F32, 4)
#if ATTNI_DIRECT16 && !ATTNI_PORTABLE
ATTNI_PV(pv_f16, ATTN_F16, 2)
#endif

// exp(x) for x <= 0; below 2^-100: 0; NaN stays NaN. 2^f on [-1/2, 1/2] by a degree-6 polynomial
// (relative error 2e-9), times 2^r built in the exponent: a product, so that NaN survives.
ATTNI_HELPER ATTNI_TGT V ATTNI_K(exp)(V x) {
    const V magic = ATTNI_I(set1)(12582912.0f); // 1.5 * 2^23: the sum's low bits are round(y)
    V y = ATTNI_I(barrier)(ATTNI_I(mul)(x, ATTNI_I(set1)(1.44269504f)));
    V t = ATTNI_I(barrier)(ATTNI_I(add)(y, magic));
    V f = ATTNI_I(sub)(y, ATTNI_I(barrier)(ATTNI_I(sub)(t, magic)));
    V p = ATTNI_I(set1)(1.5345775e-4f), two_r;
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(1.3399931e-3f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(9.6184891e-3f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(5.5503286e-2f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(2.4022646e-1f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(6.9314718e-1f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(1.0f));
    two_r = ATTNI_I(asv)(
        ATTNI_I(uadd)(ATTNI_I(ushl)(ATTNI_I(asu)(t), 23), ATTNI_I(uset1)(0x3f800000u)));
    return ATTNI_I(less)(y, ATTNI_I(set1)(-100.0f), ATTNI_I(set1)(0), ATTNI_I(mul)(p, two_r));
}

// tanh: x + x^3 P(x^2) below 0.625, else 1 - 2 / (e^2|x| + 1) with the sign put back.
ATTNI_HELPER ATTNI_TGT V ATTNI_K(tanh)(V x) {
    U sign = ATTNI_I(uand)(ATTNI_I(asu)(x), 0x80000000u);
    V a = ATTNI_I(asv)(ATTNI_I(uand)(ATTNI_I(asu)(x), 0x7fffffffu)), x2 = ATTNI_I(mul)(a, a), p, e,
      big;
    const V one = ATTNI_I(set1)(1.0f);
    x2 = ATTNI_I(barrier)(x2);
    p = ATTNI_I(set1)(-5.6569898e-3f);
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(2.0598676e-2f));
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(-5.3728234e-2f));
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(1.3331318e-1f));
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(-3.3333278e-1f));
    p = ATTNI_MADD(ATTNI_I(barrier)(ATTNI_I(mul)(p, x2)), a, a);
    // e^-2a is in (0, 1]: (1 - e) / (1 + e)
    e = ATTNI_K(exp)(ATTNI_I(mul)(a, ATTNI_I(set1)(-2.0f)));
    big = ATTNI_I(div)(ATTNI_I(sub)(one, e), ATTNI_I(add)(one, e));
    p = ATTNI_I(less)(a, ATTNI_I(set1)(0.625f), p, big);
    return ATTNI_I(asv)(ATTNI_I(uor)(ATTNI_I(asu)(p), sign));
}

// Raw scores of one row to weights. Two passes: scores and their maximum; exponentials and their
// sum in 2 x 16 virtual lanes (even and odd tiles), so that skipped tiles change nothing.
ATTNI_TGT static float ATTNI_K(soft)(const attni_soft *a, float *s, const uint64_t bits[4],
                                     float *l) {
    const V ninf = ATTNI_I(asv)(ATTNI_I(uset1)(0xff800000u)), zero = ATTNI_I(set1)(0);
    const V scale = ATTNI_I(set1)(a->scale);
    V top = ninf, sum[2], x, m;
    float max;
    int i;
    for (i = 0; i < 16; i++) {
        uint32_t seen = (uint32_t)(bits[i / 4] >> (16 * (i % 4))) & 0xffffu;
        if (!seen) continue;
        x = ATTNI_I(load)(s + 16 * i);
        if (a->k_scale) x = ATTNI_I(mul)(x, ATTNI_I(load)(a->k_scale + 16 * i));
        x = ATTNI_I(barrier)(ATTNI_I(mul)(x, scale));
        if (a->softcap > 0) {
            const V cap = ATTNI_I(set1)(a->softcap);
            x = ATTNI_I(barrier)(ATTNI_I(mul)(ATTNI_K(tanh)(ATTNI_I(div)(x, cap)), cap));
        }
        if (a->alibi != 0) {
            V pos = ATTNI_I(add)(ATTNI_I(iota)(), ATTNI_I(set1)(a->alibi_first + 16.0f * (float)i));
            x = ATTNI_MADD(pos, ATTNI_I(set1)(a->alibi), x);
        }
        if (a->add) x = ATTNI_I(add)(x, ATTNI_I(load)(a->add + 16 * i));
        if (seen != 0xffffu) x = ATTNI_I(pick)(seen, x, ninf);
        ATTNI_I(store)(s + 16 * i, x);
        top = ATTNI_I(max)(x, top); // NaN is passed over here and shows in the sum
    }
    max = ATTNI_I(hmax)(top);
    if (max == attni_float(0xff800000u)) max = 0; // nothing but -inf and NaN: weights 0 and NaN
    m = ATTNI_I(set1)(max);
    sum[0] = sum[1] = zero;
    for (i = 0; i < 16; i++) {
        uint32_t seen = (uint32_t)(bits[i / 4] >> (16 * (i % 4))) & 0xffffu;
        if (!((a->tiles >> i) & 1)) continue;
        x = zero;
        if (seen) {
            x = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(load)(s + 16 * i), m));
            sum[i & 1] = ATTNI_I(add)(sum[i & 1], x);
            if (a->v_scale) { // an unseen token's scale may be anything
                x = ATTNI_I(barrier)(ATTNI_I(mul)(x, ATTNI_I(load)(a->v_scale + 16 * i)));
                if (seen != 0xffffu) x = ATTNI_I(pick)(seen, x, zero);
            }
        }
        if (a->p16) ATTNI_I(ustore16)(a->p16 + 16 * i, ATTNI_I(to_bf16)(x));
        else ATTNI_I(store)(s + 16 * i, x);
    }
    *l = ATTNI_I(hsum)(ATTNI_I(add)(sum[0], sum[1]));
    return *l == 0 ? attni_float(0xff800000u) : max;
}

#if ATTNI_PORTABLE // these run once per row and span: one copy serves both numerics
// (o, m, l) += (os, ms, ls), n a multiple of 16. m = -inf is the empty partial.
ATTNI_TGT static void ATTNI_K(fold)(float *o, float *m, float *l, const float *os, float ms,
                                    float ls, int n) {
    const float none = attni_float(0xff800000u);
    float mn = *m > ms ? *m : ms;
    V a, b;
    int i;
    if (ms == none) return;
    if (*m == none) {
        memcpy(o, os, 4 * (size_t)n);
        *m = ms;
        *l = ls;
        return;
    }
    a = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(set1)(*m), ATTNI_I(set1)(mn)));
    b = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(set1)(ms), ATTNI_I(set1)(mn)));
    for (i = 0; i < n; i += 16) {
        V x = ATTNI_I(barrier)(ATTNI_I(mul)(ATTNI_I(load)(o + i), a));
        ATTNI_I(store)(o + i, ATTNI_MADD(ATTNI_I(load)(os + i), b, x));
    }
    *l = ATTNI_I(first)(ATTNI_MADD(ATTNI_I(set1)(ls), b,
                                   ATTNI_I(barrier)(ATTNI_I(mul)(ATTNI_I(set1)(*l), a))));
    *m = mn;
}

// o / l, after the sink's logit (-inf: none) joined the sum. On return *m is finite unless the row
// is empty without a sink; *l is the final sum.
ATTNI_TGT static void ATTNI_K(finish)(float *o, float *m, float *l, float sink, int n) {
    const float none = attni_float(0xff800000u);
    V den;
    int i;
    if (*m == none) {
        for (i = 0; i < n; i++) o[i] = 0;
        *m = sink;
        *l = 1;
        return;
    }
    if (sink > none) {
        float mn = *m > sink ? *m : sink;
        V a = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(set1)(*m), ATTNI_I(set1)(mn)));
        V b = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(set1)(sink), ATTNI_I(set1)(mn)));
        *l = ATTNI_I(first)(ATTNI_MADD(ATTNI_I(set1)(*l), a, b));
        *m = mn;
        for (i = 0; i < n; i += 16) ATTNI_I(store)(o + i, ATTNI_I(mul)(ATTNI_I(load)(o + i), a));
    }
    den = ATTNI_I(set1)(*l);
    for (i = 0; i < n; i += 16) // + 0: a zero has one sign
        ATTNI_I(store)
        (o + i, ATTNI_I(add)(ATTNI_I(div)(ATTNI_I(load)(o + i), den), ATTNI_I(set1)(0)));
}

#endif // ATTNI_PORTABLE

static const attni_math ATTNI_K(math) = {
#if ATTNI_DIRECT16 && !ATTNI_PORTABLE
    {0, ATTNI_K(qk_f32), ATTNI_K(qk_f16), 0},
    {0, ATTNI_K(pv_f32), ATTNI_K(pv_f16), 0},
#else
    {0, ATTNI_K(qk_f32), 0, 0},
    {0, ATTNI_K(pv_f32), 0, 0},
#endif
    ATTNI_K(soft), ATTNI_I(fold_portable), ATTNI_I(finish_portable)};

#undef ATTNI_MADD
#undef ATTNI_QK
#undef ATTNI_PV

#elif ATTNI_KERNEL_PASS == 3 // ---- dots: for ISAs with bf16 and integer dot products

// As qk and pv above, but a step takes two bf16 elements (four int8 ones) at once.
ATTNI_INLINE ATTNI_TGT void ATTNI_I(qk_bdot_block)(const uint32_t *q, int64_t ldq,
                                                   const uint32_t *const *kt, const uint8_t *col,
                                                   int units, float *s, const int nr,
                                                   const int nc) {
    V c[ATTNI_NR][ATTNI_NC];
    U b[ATTNI_NC], a;
    int r, j, u;
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(set1)(0);
    for (u = 0; u < units; u++) {
        ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] = ATTNI_I(uload)(kt[j] + 16 * u);
        ATTNI_UNROLL for (r = 0; r < nr; r++) {
            a = ATTNI_I(uset1)(q[r * ldq + u]);
            ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(bdot)(c[r][j], a, b[j]);
        }
    }
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++)
            ATTNI_I(store)(s + r * ATTN_SPAN + 16 * col[j], c[r][j]);
}

ATTNI_INLINE ATTNI_TGT void ATTNI_I(qk_idot_block)(const uint8_t *q, int64_t ldq,
                                                   const uint32_t *const *kt, const uint8_t *col,
                                                   int units, float *s, const int nr,
                                                   const int nc) {
    U c[ATTNI_NR][ATTNI_NC], b[ATTNI_NC], a;
    uint32_t x;
    float scale;
    int r, j, u;
    ATTNI_UNROLL for (r = 0; r < nr; r++) {
        memcpy(&x, q + r * ldq + 4, 4);
        ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(uset1)(ATTNI_IDOT_BIASED ? x : 0u);
    }
    for (u = 0; u < units; u++) {
        ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] = ATTNI_I(uload)(kt[j] + 16 * u);
        ATTNI_UNROLL for (r = 0; r < nr; r++) {
            memcpy(&x, q + r * ldq + 8 + 4 * u, 4);
            a = ATTNI_I(uset1)(x);
            ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(idot)(c[r][j], b[j], a);
        }
    }
    ATTNI_UNROLL for (r = 0; r < nr; r++) {
        memcpy(&scale, q + r * ldq, 4);
        ATTNI_UNROLL for (j = 0; j < nc; j++)
            ATTNI_I(store)(s + r * ATTN_SPAN + 16 * col[j],
                           ATTNI_I(mul)(ATTNI_I(utop)(c[r][j], 32), ATTNI_I(set1)(scale)));
    }
}

#define ATTNI_QK_OVER(name, type)                                                                  \
    ATTNI_TGT static void ATTNI_I(name)(const void *qv, int64_t ldq, int nr,                       \
                                        const uint32_t *const *kt, const uint8_t *col, int nt,     \
                                        int units, float *s) {                                     \
        const type *q = (const type *)qv;                                                          \
        int r, j;                                                                                  \
        for (r = 0; r < nr;) {                                                                     \
            const type *qr = q + r * ldq;                                                          \
            float *sr = s + r * ATTN_SPAN;                                                         \
            int left = nr - r;                                                                     \
            for (j = 0; j < nt; j += ATTNI_NC) {                                                   \
                ATTNI_ROWS(ATTNI_I(name##_block), (qr, ldq, kt + j, col + j, units, sr, ),         \
                           ATTNI_NC)                                                               \
            }                                                                                      \
            r += ATTNI_STEP(left);                                                                 \
        }                                                                                          \
    }
ATTNI_QK_OVER(qk_bdot, uint32_t)
ATTNI_QK_OVER(qk_idot, uint8_t)
#undef ATTNI_QK_OVER

ATTNI_INLINE ATTNI_TGT void ATTNI_I(pv_bdot_block)(const uint16_t *p, const uint32_t *v,
                                                   const attni_run *run, int n, int vd, int e,
                                                   float *o, int64_t ldo, const int nr,
                                                   const int nc) {
    V c[ATTNI_NR][ATTNI_NC];
    U b[ATTNI_NC], a;
    uint32_t x;
    int r, j, t, i;
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(set1)(0);
    for (i = 0; i < n; i++)
        for (t = run[i].t0; t < run[i].t1; t += 2) {
            ATTNI_UNROLL for (j = 0; j < nc; j++)
                b[j] = ATTNI_I(uload)(v + (int64_t)(t / 2) * vd + e + 16 * j);
            ATTNI_UNROLL for (r = 0; r < nr; r++) {
                memcpy(&x, p + r * ATTN_SPAN + t, 4);
                a = ATTNI_I(uset1)(x);
                ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(bdot)(c[r][j], a, b[j]);
            }
        }
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++) ATTNI_I(store)(o + r * ldo + e + 16 * j, c[r][j]);
}

ATTNI_TGT static void ATTNI_I(pv_bdot)(const void *pv, int nr, const void *const *row,
                                       const attni_run *run, int n, int vd, float *o, int64_t ldo) {
    const uint16_t *p = (const uint16_t *)pv;
    const uint32_t *v = (const uint32_t *)row[0];
    int r, e;
    for (r = 0; r < nr;) {
        const uint16_t *pr = p + r * ATTN_SPAN;
        float *or_ = o + r * ldo;
        int left = nr - r, step = ATTNI_STEP(left), i;
        for (e = 0; e < vd && vd >= 16 * ATTNI_NC; e += 16 * ATTNI_NC) {
            int at = e <= vd - 16 * ATTNI_NC ? e : vd - 16 * ATTNI_NC;
            ATTNI_ROWS(ATTNI_I(pv_bdot_block), (pr, v, run, n, vd, at, or_, ldo, ), ATTNI_NC)
        }
        for (; e < vd; e += 16)
            for (i = 0; i < attni_min32(step, left); i++)
                ATTNI_I(pv_bdot_block)
                (pr + i * ATTN_SPAN, v, run, n, vd, e, or_ + i * ldo, ldo, 1, 1);
        r += step;
    }
}
#undef ATTNI_KERNEL_PASS
#undef ATTNI_TGT
#undef ATTNI_I
#undef ATTNI_NR
#undef ATTNI_NC
#undef ATTNI_IDOT_BIASED
#endif
#undef ATTNI_STEP
#undef ATTNI_ARGS
#undef ATTNI_CALL
#undef ATTNI_CALL2
#undef ATTNI_ROWS
#undef V
#undef U
#undef ATTNI_BY_DTYPE
#else // not a kernel pass

#if !defined(ATTNI_KERNEL_PASS) &&                                                                 \
    (defined(ATTN_IMPLEMENTATION) || defined(ATTN_CPU_IMPLEMENTATION))
#ifndef ATTNI_CPU_IMPLEMENTED
#define ATTNI_CPU_IMPLEMENTED
#define ATTNI_CPU_OPEN 1 // this inclusion carries the implementation; undefined at the end

// ==== >>impl-types  What kernels are given ======================================================

#if (defined(__GNUC__) || defined(__clang__)) && !defined(ATTN_CPU_SCALAR_ONLY)
#if defined(__x86_64__)
#define ATTNI_X86 1
#include <cpuid.h>
#if defined(__GNUC__) && !defined(__clang__) // its _mm512_undefined is `y = y`: GCC bug 105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define ATTNI_ARM 1
#include <arm_neon.h>
// older compilers' arm_neon.h hides the dot products without -march
#if (!defined(__clang__) && __GNUC__ >= 12) || (defined(__clang__) && __clang_major__ >= 16) ||    \
    (defined(__ARM_FEATURE_BF16) && defined(__ARM_FEATURE_DOTPROD))
#define ATTNI_ARM_DOTS 1
#else
#define ATTNI_ARM_DOTS 0
#endif
#endif
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ATTNI_INLINE static inline __attribute__((always_inline, unused))
#define ATTNI_CALLED static __attribute__((noinline, unused))
#define ATTNI_PREFETCH(p) __builtin_prefetch(p)
#else
#define ATTNI_INLINE static inline
#define ATTNI_CALLED static
#define ATTNI_PREFETCH(p) ((void)(p))
#endif
#if defined(__clang__)
#define ATTNI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define ATTNI_UNROLL _Pragma("GCC unroll 16")
#else
#define ATTNI_UNROLL
#endif

enum { ATTNI_TILE = 16, ATTNI_TILES = ATTN_SPAN / 16, ATTNI_RB_MAX = 16 };

// How a row's raw scores become weights. All pointers are for the 256 tokens of one span.
typedef struct attni_soft {
    const float *k_scale, *v_scale; // per token, or NULL
    const float *add;               // bias in natural units, or NULL
    float scale, softcap, alibi, alibi_first; // alibi_first: position of token 0 minus the query's
    uint16_t tiles; // 16-token tiles that must be written (zeros where nothing is seen)
    uint16_t *p16;                  // bf16 weights instead of f32 ones, or NULL
} attni_soft;

typedef struct attni_run { // tokens [t0, t1) of a span, multiples of 16
    int32_t t0, t1;
} attni_run;

// Scores of nr rows against nt tiles: s[r * 256 + 16 * col[j]]. kt and col go on for 7 entries that
// repeat the last, so that kernels take 4 at a time and look 4 ahead. q: f32 rows, or pairs of
// bf16, or bytes.
typedef void (*attni_qk_fn)(const void *q, int64_t ldq, int nr, const uint32_t *const *kt,
                            const uint8_t *col, int nt, int units, float *s);
// Weighted sums of nr rows over n runs of tokens: o[r * ldo + e], e < vd (multiple of 16).
// row[t]: values of token t, f32 / f16 / bf16; for the bf16 dot row[0] is a panel of token pairs
// [128][vd] and p holds bf16.
typedef void (*attni_pv_fn)(const void *p, int nr, const void *const *row, const attni_run *run,
                            int n, int vd, float *o, int64_t ldo);

// Kernels of one ISA that do no rounding arithmetic, so that numerics do not matter.
typedef struct attni_moves {
    // 16 tokens (their first units at row[t], gap bytes apart) to a K16 tile of n 4-byte units
    void (*pack)(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile);
    void (*widen_tile)(attn_dtype t, const uint32_t *tile, int units,
                       float *out);                                  // K16 -> [d][16] f32
    void (*widen)(attn_dtype t, const void *src, int n, float *out); // n % 8 == 0; pads to 16
    void (*narrow)(attn_dtype t, const float *src, int n, void *dst); // f32 -> f32, f16, bf16
    int (*special)(const float *x, int64_t n); // any Inf or NaN among n (multiple of 16)?
    void (*pairs)(const void *const *row, const attni_run *run, int n_runs, int n, int ldo,
                  uint32_t *out);
} attni_moves;

typedef struct attni_math {
    attni_qk_fn qk[4]; // by dtype: F32, and F16 or NULL: convert first
    attni_pv_fn pv[4];
    // scores -> weights in place; returns the row's maximum (-inf: nothing seen), *l the sum
    float (*soft)(const attni_soft *a, float *s, const uint64_t bits[4], float *l);
    void (*fold)(float *o, float *m, float *l, const float *os, float ms, float ls, int n);
    void (*finish)(float *o, float *m, float *l, float sink,
                   int n); // normalise; adds the sink logit
} attni_math;

// ==== >>impl-scalar  Vocabulary: 16 virtual lanes in plain C =====================================
//
// V is 16 floats, U is 16 uint32. Every ISA gives the same functions, suffixed with its name;
// kernels below are written once against them. Here only what the inner loops use is inlined: 16
// lanes unrolled everywhere would cost seconds of compile time. barrier stops the compiler from
// contracting a product and a sum.

#define ATTNI_EACH for (i = 0; i < 16; i++)
typedef struct attni_V_scalar { float f[16]; } attni_V_scalar;
typedef struct attni_U_scalar { uint32_t u[16]; } attni_U_scalar;

#if defined(__x86_64__) && defined(__GNUC__)
#define ATTNI_PIN(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__) && defined(__GNUC__)
#define ATTNI_PIN(x) __asm__("" : "+w"(x))
#elif defined(__GNUC__)
#define ATTNI_PIN(x) __asm__("" : "+m"(x))
#else
#define ATTNI_PIN(x) ((void)(*(volatile float *)&(x) = (x)))
#endif

#define ATTNI_MAP(name, how, expr)                                                                 \
    how attni_V_scalar attni_##name##_scalar(attni_V_scalar a, attni_V_scalar b) {        \
        int i;                                                                                     \
        ATTNI_EACH a.f[i] = (expr);                                                                \
        return a;                                                                                  \
    }
ATTNI_MAP(add, ATTNI_INLINE, a.f[i] + b.f[i])
ATTNI_MAP(sub, ATTNI_CALLED, a.f[i] - b.f[i])
ATTNI_MAP(mul, ATTNI_INLINE, a.f[i] * b.f[i])
ATTNI_MAP(div, ATTNI_CALLED, a.f[i] / b.f[i])
ATTNI_MAP(max, ATTNI_CALLED, a.f[i] > b.f[i] ? a.f[i] : b.f[i]) // b when a is NaN
#undef ATTNI_MAP
ATTNI_INLINE attni_V_scalar attni_barrier_scalar(attni_V_scalar a) {
    int i;
    ATTNI_EACH ATTNI_PIN(a.f[i]);
    return a;
}
ATTNI_INLINE attni_V_scalar attni_fma_scalar(attni_V_scalar a, attni_V_scalar b, attni_V_scalar c) {
    int i;
    ATTNI_EACH c.f[i] += a.f[i] * b.f[i];
    return c;
}
ATTNI_INLINE attni_V_scalar attni_set1_scalar(float x) {
    attni_V_scalar a;
    int i;
    ATTNI_EACH a.f[i] = x;
    return a;
}
ATTNI_INLINE attni_V_scalar attni_load_scalar(const float *p) {
    attni_V_scalar a;
    memcpy(&a, p, 64);
    return a;
}
ATTNI_INLINE void attni_store_scalar(float *p, attni_V_scalar a) { memcpy(p, &a, 64); }
ATTNI_CALLED attni_V_scalar attni_iota_scalar(void) {
    attni_V_scalar a;
    int i;
    ATTNI_EACH a.f[i] = (float)i;
    return a;
}
// lanes of a whose bit is set, else of b
ATTNI_CALLED attni_V_scalar attni_pick_scalar(uint32_t bits, attni_V_scalar a, attni_V_scalar b) {
    int i;
    ATTNI_EACH a.f[i] = (bits >> i) & 1u ? a.f[i] : b.f[i];
    return a;
}
// a where x < y, else b
ATTNI_CALLED attni_V_scalar attni_less_scalar(attni_V_scalar x, attni_V_scalar y, attni_V_scalar a,
                                              attni_V_scalar b) {
    int i;
    ATTNI_EACH a.f[i] = x.f[i] < y.f[i] ? a.f[i] : b.f[i];
    return a;
}
ATTNI_INLINE attni_V_scalar attni_asv_scalar(attni_U_scalar a) {
    attni_V_scalar v;
    memcpy(&v, &a, 64);
    return v;
}
ATTNI_CALLED attni_U_scalar attni_asu_scalar(attni_V_scalar a) {
    attni_U_scalar v;
    memcpy(&v, &a, 64);
    return v;
}
ATTNI_CALLED attni_U_scalar attni_uset1_scalar(uint32_t x) {
    attni_U_scalar a;
    int i;
    ATTNI_EACH a.u[i] = x;
    return a;
}
ATTNI_INLINE attni_U_scalar attni_uload_scalar(const void *p) {
    attni_U_scalar a;
    memcpy(&a, p, 64);
    return a;
}
ATTNI_CALLED attni_U_scalar attni_uload16_scalar(const void *p) {
    attni_U_scalar a;
    uint16_t h[16];
    int i;
    memcpy(h, p, 32);
    ATTNI_EACH a.u[i] = h[i];
    return a;
}
ATTNI_CALLED attni_U_scalar attni_uload8_scalar(const void *p) {
    attni_U_scalar a;
    int i;
    ATTNI_EACH a.u[i] = ((const uint8_t *)p)[i];
    return a;
}
ATTNI_CALLED attni_U_scalar attni_uload4_scalar(const void *p) { // 16 nibbles of 8 bytes
    attni_U_scalar a;
    int i;
    ATTNI_EACH a.u[i] = (uint32_t)(((const uint8_t *)p)[i / 2] >> (4 * (i & 1))) & 15u;
    return a;
}
ATTNI_CALLED attni_U_scalar attni_uand_scalar(attni_U_scalar a, uint32_t x) {
    int i;
    ATTNI_EACH a.u[i] &= x;
    return a;
}
ATTNI_CALLED attni_U_scalar attni_uor_scalar(attni_U_scalar a, attni_U_scalar b) {
    int i;
    ATTNI_EACH a.u[i] |= b.u[i];
    return a;
}
ATTNI_CALLED attni_U_scalar attni_uadd_scalar(attni_U_scalar a, attni_U_scalar b) {
    int i;
    ATTNI_EACH a.u[i] += b.u[i];
    return a;
}
ATTNI_CALLED attni_U_scalar attni_ushl_scalar(attni_U_scalar a, int n) {
    int i;
    ATTNI_EACH a.u[i] <<= n;
    return a;
}
ATTNI_CALLED attni_U_scalar attni_ushr_scalar(attni_U_scalar a, int n) {
    int i;
    ATTNI_EACH a.u[i] >>= n;
    return a;
}
// signed value of the top n bits, as floats
ATTNI_CALLED attni_V_scalar attni_utop_scalar(attni_U_scalar a, int n) {
    attni_V_scalar v;
    int i;
    uint32_t sign = (uint32_t)1 << (n - 1);
    ATTNI_EACH v.f[i] = (float)((int32_t)((a.u[i] >> (32 - n)) ^ sign) - (int32_t)sign);
    return v;
}
// f16 bits in the low half of each lane; the high half is ignored
ATTNI_CALLED attni_V_scalar attni_uhalf_scalar(attni_U_scalar a) {
    attni_V_scalar v;
    int i;
    ATTNI_EACH v.f[i] = attni_from_f16((uint16_t)a.u[i]);
    return v;
}
// a where the lanes of x and y are equal, else b
ATTNI_CALLED attni_V_scalar attni_uequal_scalar(attni_U_scalar x, attni_U_scalar y,
                                                attni_V_scalar a, attni_V_scalar b) {
    int i;
    ATTNI_EACH a.f[i] = x.u[i] == y.u[i] ? a.f[i] : b.f[i];
    return a;
}
ATTNI_CALLED void attni_store_f16_scalar(void *p, attni_V_scalar a) {
    uint16_t h[16];
    int i;
    ATTNI_EACH h[i] = attni_to_f16(a.f[i]);
    memcpy(p, h, 32);
}
ATTNI_CALLED void attni_ustore16_scalar(void *p, attni_U_scalar a) { // low halves
    uint16_t h[16];
    int i;
    ATTNI_EACH h[i] = (uint16_t)a.u[i];
    memcpy(p, h, 32);
}
ATTNI_CALLED float attni_hmax_scalar(attni_V_scalar a) {
    int i, n;
    for (n = 8; n; n /= 2)
        for (i = 0; i < n; i++) a.f[i] = a.f[i] > a.f[i + n] ? a.f[i] : a.f[i + n];
    return a.f[0];
}
// the fixed tree every ISA follows: i + (i + 8), then + 4, + 2, + 1
ATTNI_CALLED float attni_hsum_scalar(attni_V_scalar a) {
    int i, n;
    for (n = 8; n; n /= 2)
        for (i = 0; i < n; i++) a.f[i] = a.f[i] + a.f[i + n];
    return a.f[0];
}
ATTNI_CALLED float attni_first_scalar(attni_V_scalar a) { return a.f[0]; }
static void attni_pack_scalar(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile) {
    int u, t;
    for (u = 0; u < n; u++)
        for (t = 0; t < 16; t++) memcpy(tile + 16 * u + t, row[t] + u * gap, 4);
}

#ifdef ATTNI_X86
// ==== >>impl-avx2  Vocabulary ====================================================================

#define ATTNI_T2 __attribute__((target("avx2,fma,f16c")))
#define ATTNI_F2 ATTNI_INLINE ATTNI_T2
typedef struct attni_V_avx2 { __m256 a, b; } attni_V_avx2;
typedef struct attni_U_avx2 { __m256i a, b; } attni_U_avx2;

ATTNI_F2 attni_V_avx2 attni_v2(__m256 a, __m256 b) {
    attni_V_avx2 v;
    v.a = a;
    v.b = b;
    return v;
}
ATTNI_F2 attni_U_avx2 attni_u2(__m256i a, __m256i b) {
    attni_U_avx2 v;
    v.a = a;
    v.b = b;
    return v;
}
#define ATTNI_MAP(name, op)                                                                        \
    ATTNI_F2 attni_V_avx2 attni_##name##_avx2(attni_V_avx2 x, attni_V_avx2 y) {                    \
        return attni_v2(op(x.a, y.a), op(x.b, y.b));                                               \
    }
ATTNI_MAP(add, _mm256_add_ps)
ATTNI_MAP(sub, _mm256_sub_ps)
ATTNI_MAP(mul, _mm256_mul_ps)
ATTNI_MAP(div, _mm256_div_ps)
ATTNI_MAP(max, _mm256_max_ps) // y when either is NaN
#undef ATTNI_MAP
ATTNI_F2 attni_V_avx2 attni_barrier_avx2(attni_V_avx2 x) {
    __asm__("" : "+x"(x.a));
    __asm__("" : "+x"(x.b));
    return x;
}
ATTNI_F2 attni_V_avx2 attni_fma_avx2(attni_V_avx2 x, attni_V_avx2 y, attni_V_avx2 z) {
    return attni_v2(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
ATTNI_F2 attni_V_avx2 attni_set1_avx2(float x) {
    __m256 v = _mm256_set1_ps(x);
    return attni_v2(v, v);
}
ATTNI_F2 attni_V_avx2 attni_load_avx2(const float *p) {
    return attni_v2(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
ATTNI_F2 void attni_store_avx2(float *p, attni_V_avx2 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
ATTNI_F2 attni_V_avx2 attni_iota_avx2(void) {
    return attni_v2(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7),
                    _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15));
}
ATTNI_F2 attni_V_avx2 attni_pick_avx2(uint32_t bits, attni_V_avx2 x, attni_V_avx2 y) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i lo = _mm256_and_si256(_mm256_set1_epi32((int)(bits & 255u)), lane);
    __m256i hi = _mm256_and_si256(_mm256_set1_epi32((int)(bits >> 8)), lane);
    return attni_v2(
        _mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(lo, lane))),
        _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(hi, lane))));
}
ATTNI_F2 attni_V_avx2 attni_less_avx2(attni_V_avx2 x, attni_V_avx2 y, attni_V_avx2 p,
                                      attni_V_avx2 q) {
    return attni_v2(_mm256_blendv_ps(q.a, p.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
                    _mm256_blendv_ps(q.b, p.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)));
}
ATTNI_F2 attni_V_avx2 attni_asv_avx2(attni_U_avx2 x) {
    return attni_v2(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b));
}
ATTNI_F2 attni_U_avx2 attni_asu_avx2(attni_V_avx2 x) {
    return attni_u2(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}
ATTNI_F2 attni_U_avx2 attni_uset1_avx2(uint32_t x) {
    __m256i v = _mm256_set1_epi32((int)x);
    return attni_u2(v, v);
}
ATTNI_F2 attni_U_avx2 attni_uload_avx2(const void *p) {
    const __m256i *q = (const __m256i *)p;
    return attni_u2(_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1));
}
ATTNI_F2 attni_U_avx2 attni_uload16_avx2(const void *p) {
    const __m128i *q = (const __m128i *)p;
    return attni_u2(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)),
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)));
}
ATTNI_F2 attni_U_avx2 attni_uload8_avx2(const void *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return attni_u2(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
ATTNI_F2 attni_U_avx2 attni_uload4_avx2(const void *p) {
    const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28),
                  low = _mm256_set1_epi32(15);
    int32_t x[2];
    memcpy(x, p, 8);
    return attni_u2(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(x[0]), shift), low),
                    _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(x[1]), shift), low));
}
ATTNI_F2 attni_U_avx2 attni_uand_avx2(attni_U_avx2 x, uint32_t m) {
    __m256i v = _mm256_set1_epi32((int)m);
    return attni_u2(_mm256_and_si256(x.a, v), _mm256_and_si256(x.b, v));
}
ATTNI_F2 attni_U_avx2 attni_uor_avx2(attni_U_avx2 x, attni_U_avx2 y) {
    return attni_u2(_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b));
}
ATTNI_F2 attni_U_avx2 attni_uadd_avx2(attni_U_avx2 x, attni_U_avx2 y) {
    return attni_u2(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
ATTNI_F2 attni_U_avx2 attni_ushl_avx2(attni_U_avx2 x, int n) {
    return attni_u2(_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n));
}
ATTNI_F2 attni_U_avx2 attni_ushr_avx2(attni_U_avx2 x, int n) {
    return attni_u2(_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n));
}
ATTNI_F2 attni_V_avx2 attni_utop_avx2(attni_U_avx2 x, int n) {
    return attni_v2(_mm256_cvtepi32_ps(_mm256_srai_epi32(x.a, 32 - n)),
                    _mm256_cvtepi32_ps(_mm256_srai_epi32(x.b, 32 - n)));
}
ATTNI_F2 attni_V_avx2 attni_uhalf_avx2(attni_U_avx2 x) { // packus takes 128-bit lanes in turn
    __m256i low = _mm256_set1_epi32(0xffff), y;
    y = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    y = _mm256_permute4x64_epi64(y, 0xd8);
    return attni_v2(_mm256_cvtph_ps(_mm256_castsi256_si128(y)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256(y, 1)));
}
ATTNI_F2 attni_V_avx2 attni_uequal_avx2(attni_U_avx2 x, attni_U_avx2 y, attni_V_avx2 p,
                                        attni_V_avx2 q) {
    return attni_v2(_mm256_blendv_ps(q.a, p.a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(x.a, y.a))),
                    _mm256_blendv_ps(q.b, p.b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(x.b, y.b))));
}
ATTNI_F2 void attni_store_f16_avx2(void *p, attni_V_avx2 x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.b, 0));
}
ATTNI_F2 void attni_ustore16_avx2(void *p, attni_U_avx2 x) {
    __m256i low = _mm256_set1_epi32(0xffff), y;
    y = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(y, 0xd8));
}
ATTNI_F2 float attni_hmax_avx2(attni_V_avx2 x) {
    __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
ATTNI_F2 float attni_hsum_avx2(attni_V_avx2 x) {
    __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
ATTNI_F2 float attni_first_avx2(attni_V_avx2 x) { return _mm256_cvtss_f32(x.a); }

// 8 x 8 transposes of 4-byte units; the rest one by one
ATTNI_T2 static void attni_pack_avx2(const uint8_t *const *row, int64_t gap, int n,
                                     uint32_t *tile) {
    int u = 0, h, i;
    for (; gap == 4 && u + 8 <= n; u += 8)
        for (h = 0; h < 2; h++) {
            __m256 r[8], t[8];
            ATTNI_UNROLL
            for (i = 0; i < 8; i++)
                r[i] = _mm256_loadu_ps((const float *)(const void *)(row[8 * h + i] + 4 * u));
            ATTNI_UNROLL
            for (i = 0; i < 8; i += 2) {
                t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
            }
            ATTNI_UNROLL
            for (i = 0; i < 8; i += 4) {
                r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
                r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
                r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
                r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
            }
            ATTNI_UNROLL
            for (i = 0; i < 4; i++) {
                float *o = (float *)(void *)(tile + 16 * (u + i) + 8 * h);
                _mm256_storeu_ps(o, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
                _mm256_storeu_ps(o + 64, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
            }
        }
    for (; u < n; u++)
        for (i = 0; i < 16; i++) memcpy(tile + 16 * u + i, row[i] + u * gap, 4);
}

// ==== >>impl-avx512  Vocabulary ==================================================================

#define ATTNI_T5 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define ATTNI_F5 ATTNI_INLINE ATTNI_T5
typedef __m512 attni_V_avx512;
typedef __m512i attni_U_avx512;
#define ATTNI_MAP(name, op)                                                                        \
    ATTNI_F5 __m512 attni_##name##_avx512(__m512 x, __m512 y) { return op(x, y); }
ATTNI_MAP(add, _mm512_add_ps)
ATTNI_MAP(sub, _mm512_sub_ps)
ATTNI_MAP(mul, _mm512_mul_ps)
ATTNI_MAP(div, _mm512_div_ps)
ATTNI_MAP(max, _mm512_max_ps)
#undef ATTNI_MAP
ATTNI_F5 __m512 attni_barrier_avx512(__m512 x) {
    __asm__("" : "+v"(x));
    return x;
}
ATTNI_F5 __m512 attni_fma_avx512(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
ATTNI_F5 __m512 attni_set1_avx512(float x) { return _mm512_set1_ps(x); }
ATTNI_F5 __m512 attni_load_avx512(const float *p) { return _mm512_loadu_ps(p); }
ATTNI_F5 void attni_store_avx512(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
ATTNI_F5 __m512 attni_iota_avx512(void) {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
ATTNI_F5 __m512 attni_pick_avx512(uint32_t bits, __m512 x, __m512 y) {
    return _mm512_mask_mov_ps(y, (__mmask16)bits, x);
}
ATTNI_F5 __m512 attni_less_avx512(__m512 x, __m512 y, __m512 p, __m512 q) {
    return _mm512_mask_mov_ps(q, _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), p);
}
ATTNI_F5 __m512 attni_asv_avx512(__m512i x) { return _mm512_castsi512_ps(x); }
ATTNI_F5 __m512i attni_asu_avx512(__m512 x) { return _mm512_castps_si512(x); }
ATTNI_F5 __m512i attni_uset1_avx512(uint32_t x) { return _mm512_set1_epi32((int)x); }
ATTNI_F5 __m512i attni_uload_avx512(const void *p) { return _mm512_loadu_si512(p); }
ATTNI_F5 __m512i attni_uload16_avx512(const void *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
ATTNI_F5 __m512i attni_uload8_avx512(const void *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
ATTNI_F5 __m512i attni_uload4_avx512(const void *p) {
    const __m512i shift =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    int32_t x[2];
    __m512i y;
    memcpy(x, p, 8);
    y = _mm512_mask_mov_epi32(_mm512_set1_epi32(x[0]), (__mmask16)0xff00, _mm512_set1_epi32(x[1]));
    return _mm512_and_si512(_mm512_srlv_epi32(y, shift), _mm512_set1_epi32(15));
}
ATTNI_F5 __m512i attni_uand_avx512(__m512i x, uint32_t m) {
    return _mm512_and_si512(x, _mm512_set1_epi32((int)m));
}
ATTNI_F5 __m512i attni_uor_avx512(__m512i x, __m512i y) { return _mm512_or_si512(x, y); }
ATTNI_F5 __m512i attni_uadd_avx512(__m512i x, __m512i y) { return _mm512_add_epi32(x, y); }
ATTNI_F5 __m512i attni_ushl_avx512(__m512i x, int n) {
    return _mm512_sllv_epi32(x, _mm512_set1_epi32(n));
}
ATTNI_F5 __m512i attni_ushr_avx512(__m512i x, int n) {
    return _mm512_srlv_epi32(x, _mm512_set1_epi32(n));
}
ATTNI_F5 __m512 attni_utop_avx512(__m512i x, int n) {
    return _mm512_cvtepi32_ps(_mm512_srav_epi32(x, _mm512_set1_epi32(32 - n)));
}
ATTNI_F5 __m512 attni_uhalf_avx512(__m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
ATTNI_F5 __m512 attni_uequal_avx512(__m512i x, __m512i y, __m512 p, __m512 q) {
    return _mm512_mask_mov_ps(q, _mm512_cmpeq_epi32_mask(x, y), p);
}
ATTNI_F5 void attni_store_f16_avx512(void *p, __m512 x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtps_ph((__mmask16)0xffff, x, 0));
}
ATTNI_F5 void attni_ustore16_avx512(void *p, __m512i x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x));
}
ATTNI_F5 attni_V_avx2 attni_halves(__m512 x) {
    return attni_v2(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
ATTNI_F5 float attni_hmax_avx512(__m512 x) { return attni_hmax_avx2(attni_halves(x)); }
ATTNI_F5 float attni_hsum_avx512(__m512 x) { return attni_hsum_avx2(attni_halves(x)); }
ATTNI_F5 float attni_first_avx512(__m512 x) { return _mm512_cvtss_f32(x); }

// 16 x 16 transposes of 4-byte units; the rest one by one
ATTNI_T5 static void attni_pack_avx512(const uint8_t *const *row, int64_t gap, int n,
                                       uint32_t *tile) {
    int u = 0, i;
    for (; gap == 4 && u + 16 <= n; u += 16) {
        __m512i r[16], t[16];
        ATTNI_UNROLL for (i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(row[i] + 4 * u);
        ATTNI_UNROLL for (i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        ATTNI_UNROLL for (i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // r[4 a + c]: rows 4 a .. 4 a + 3 of columns c, c + 4, c + 8, c + 12 in the four 128-bit
        // lanes
        ATTNI_UNROLL for (i = 0; i < 4; i++) {
            __m512i x = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            __m512i y = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
            __m512i z = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
            __m512i w = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
            uint32_t *o = tile + 16 * (u + i);
            _mm512_storeu_si512(o, _mm512_shuffle_i32x4(x, z, 0x88));
            _mm512_storeu_si512(o + 64, _mm512_shuffle_i32x4(y, w, 0x88));
            _mm512_storeu_si512(o + 128, _mm512_shuffle_i32x4(x, z, 0xdd));
            _mm512_storeu_si512(o + 192, _mm512_shuffle_i32x4(y, w, 0xdd));
        }
    }
    for (; u < n; u++)
        for (i = 0; i < 16; i++) memcpy(tile + 16 * u + i, row[i] + u * gap, 4);
}
#endif // ATTNI_X86

// One include per ISA: each makes the moves once and the math twice (FAST, PORTABLE).
#define ATTNI_KERNEL_PASS 1
#define ATTNI_TGT
#define ATTNI_I(f) attni_##f##_scalar
#define ATTNI_NR 1
#define ATTNI_NC 1
#define ATTNI_DIRECT16 0
#define ATTNI_HELPER ATTNI_CALLED
#if defined(ATTNI_X86) || defined(ATTNI_ARM) // only asked for by name there: PORTABLE will do
#define ATTNI_FAST_TOO 0
#define attni_math_fast_scalar attni_math_portable_scalar
#else
#define ATTNI_FAST_TOO 1
#endif
#include "attn_cpu.h"
#ifdef ATTNI_X86
#define ATTNI_KERNEL_PASS 1
#define ATTNI_TGT ATTNI_T2
#define ATTNI_I(f) attni_##f##_avx2
#define ATTNI_DIRECT16 0
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 1
#define ATTNI_NR 6
#define ATTNI_NC 1
#include "attn_cpu.h"
#define ATTNI_KERNEL_PASS 1
#define ATTNI_TGT ATTNI_T5
#define ATTNI_I(f) attni_##f##_avx512
#define ATTNI_DIRECT16 1
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 1
#define ATTNI_NR 6
#define ATTNI_NC 4
#include "attn_cpu.h"
#endif // ATTNI_X86

#ifdef ATTNI_X86
// ==== >>impl-dots  AVX-512 BF16 and VNNI, AMX ====================================================

#define ATTNI_T6                                                                                   \
    __attribute__((                                                                                \
        target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
ATTNI_INLINE ATTNI_T6 __m512 attni_bdot_avx512(__m512 acc, __m512i a, __m512i b) {
    __m512bh x, y;
    memcpy(&x, &a, 64);
    memcpy(&y, &b, 64);
    return _mm512_dpbf16_ps(acc, x, y);
}
// vpdpbusd wants one unsigned side: k + 128, whose surplus 128 * sum(q) the query row takes off
ATTNI_INLINE ATTNI_T6 __m512i attni_idot_avx512(__m512i acc, __m512i k, __m512i q) {
    return _mm512_dpbusd_epi32(acc, _mm512_xor_si512(k, _mm512_set1_epi32((int)0x80808080u)), q);
}
#define ATTNI_KERNEL_PASS 3
#define ATTNI_TGT ATTNI_T6
#define ATTNI_I(f) attni_##f##_avx512
#define ATTNI_NR 6
#define ATTNI_NC 4
#define ATTNI_IDOT_BIASED 1
#include "attn_cpu.h"

#define ATTNI_TA                                                                                   \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
// Tile 0..1 sums, 4 A (16 rows x 32 bf16), 6..7 B (16 pairs x 16 columns): a K16 tile of a 16-bit
// type is a B tile as it stands, and so is a panel of V pairs. All tiles are 16 rows of 64 bytes.
// gcc's tile intrinsics do not tell that they read memory.
#define ATTNI_TILE_FENCE __asm__ volatile("" ::: "memory")
ATTNI_TA static void attni_amx_config(int on) {
    uint8_t cfg[64];
    int i;
    memset(cfg, 0, sizeof cfg);
    cfg[0] = 1;
    for (i = 0; i < 8; i++) {
        cfg[16 + 2 * i] = 64;
        cfg[48 + i] = 16;
    }
    ATTNI_TILE_FENCE;
    if (on) _tile_loadconfig(cfg);
    else _tile_release();
}

// q: rows of bf16 pairs padded with zeros to 16 units; a tile with a units count off 16 is copied
// out.
ATTNI_TA static void attni_qk_amx(const void *qv, int64_t ldq, int nr, const uint32_t *const *kt,
                                  const uint8_t *col, int nt, int units, float *s) {
    const uint32_t *q = (const uint32_t *)qv;
    uint32_t pad[16 * 16];
    int j, u;
    (void)nr; // rows past nr are zero queries, their scores land in spare rows
    for (j = 0; j < nt; j++) {
        _tile_zero(0);
        for (u = 0; u < units; u += 16) {
            const uint32_t *b = kt[j] + 16 * u;
            if (units - u < 16) {
                memset(pad, 0, sizeof pad);
                memcpy(pad, b, 64 * (size_t)(units - u));
                b = pad;
            }
            ATTNI_TILE_FENCE;
            _tile_loadd(4, q + u, (size_t)ldq * 4);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, s + 16 * col[j], ATTN_SPAN * 4);
    }
}

// Runs are widened to whole 32-token steps: weights there are zero, and so must V be.
ATTNI_TA static void attni_pv_amx(const void *pv, int nr, const void *const *row,
                                  const attni_run *run, int n, int vd, float *o, int64_t ldo) {
    const uint16_t *p = (const uint16_t *)pv;
    const uint32_t *v = (const uint32_t *)row[0];
    int e, i, t;
    (void)nr;
    ATTNI_TILE_FENCE;
    for (e = 0; e < vd; e += 16) {
        int done = -1;
        _tile_zero(0);
        for (i = 0; i < n; i++)
            for (t = run[i].t0 & ~31; t < run[i].t1; t += 32) {
                if (t <= done) continue;
                done = t;
                _tile_loadd(4, p + t, ATTN_SPAN * 2);
                _tile_loadd(6, v + (int64_t)(t / 2) * vd + e, (size_t)vd * 4);
                _tile_dpbf16ps(0, 4, 6);
            }
        _tile_stored(0, o + e, (size_t)ldo * 4);
    }
}
#define ATTNI_AMX_BEGIN(x) ((x)->isa == ATTN_CPU_AMX ? attni_amx_config(1) : (void)0)
#define ATTNI_AMX_END(x) ((x)->isa == ATTN_CPU_AMX ? attni_amx_config(0) : (void)0)
#else
#define ATTNI_AMX_BEGIN(x) ((void)0)
#define ATTNI_AMX_END(x) ((void)0)
#endif // ATTNI_X86

#ifdef ATTNI_ARM
// ==== >>impl-neon  Vocabulary ====================================================================

typedef struct attni_V_neon { float32x4_t v[4]; } attni_V_neon;
typedef struct attni_U_neon { uint32x4_t v[4]; } attni_U_neon;
#define ATTNI_Q ATTNI_UNROLL for (i = 0; i < 4; i++)
#define ATTNI_MAP(name, expr)                                                                      \
    ATTNI_INLINE attni_V_neon attni_##name##_neon(attni_V_neon x, attni_V_neon y) {                \
        int i;                                                                                     \
        ATTNI_Q x.v[i] = (expr);                                                                   \
        return x;                                                                                  \
    }
ATTNI_MAP(add, vaddq_f32(x.v[i], y.v[i]))
ATTNI_MAP(sub, vsubq_f32(x.v[i], y.v[i]))
ATTNI_MAP(mul, vmulq_f32(x.v[i], y.v[i]))
ATTNI_MAP(div, vdivq_f32(x.v[i], y.v[i]))
ATTNI_MAP(max, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])) // y when x is NaN
#undef ATTNI_MAP
ATTNI_INLINE attni_V_neon attni_barrier_neon(attni_V_neon x) {
    int i;
    ATTNI_Q __asm__("" : "+w"(x.v[i]));
    return x;
}
ATTNI_INLINE attni_V_neon attni_fma_neon(attni_V_neon x, attni_V_neon y, attni_V_neon z) {
    int i;
    ATTNI_Q z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
    return z;
}
ATTNI_INLINE attni_V_neon attni_set1_neon(float x) {
    attni_V_neon r;
    int i;
    ATTNI_Q r.v[i] = vdupq_n_f32(x);
    return r;
}
ATTNI_INLINE attni_V_neon attni_load_neon(const float *p) {
    attni_V_neon r;
    int i;
    ATTNI_Q r.v[i] = vld1q_f32(p + 4 * i);
    return r;
}
ATTNI_INLINE void attni_store_neon(float *p, attni_V_neon x) {
    int i;
    ATTNI_Q vst1q_f32(p + 4 * i, x.v[i]);
}
ATTNI_INLINE attni_V_neon attni_iota_neon(void) {
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return attni_load_neon(lanes);
}
ATTNI_INLINE attni_V_neon attni_pick_neon(uint32_t bits, attni_V_neon x, attni_V_neon y) {
    static const uint32_t lane[4] = {1, 2, 4, 8};
    const uint32x4_t l = vld1q_u32(lane);
    int i;
    ATTNI_Q x.v[i] = vbslq_f32(vtstq_u32(vdupq_n_u32(bits >> (4 * i)), l), x.v[i], y.v[i]);
    return x;
}
ATTNI_INLINE attni_V_neon attni_less_neon(attni_V_neon x, attni_V_neon y, attni_V_neon p,
                                          attni_V_neon q) {
    int i;
    ATTNI_Q p.v[i] = vbslq_f32(vcltq_f32(x.v[i], y.v[i]), p.v[i], q.v[i]);
    return p;
}
ATTNI_INLINE attni_V_neon attni_asv_neon(attni_U_neon x) {
    attni_V_neon r;
    int i;
    ATTNI_Q r.v[i] = vreinterpretq_f32_u32(x.v[i]);
    return r;
}
ATTNI_INLINE attni_U_neon attni_asu_neon(attni_V_neon x) {
    attni_U_neon r;
    int i;
    ATTNI_Q r.v[i] = vreinterpretq_u32_f32(x.v[i]);
    return r;
}
ATTNI_INLINE attni_U_neon attni_uset1_neon(uint32_t x) {
    attni_U_neon r;
    int i;
    ATTNI_Q r.v[i] = vdupq_n_u32(x);
    return r;
}
ATTNI_INLINE attni_U_neon attni_uload_neon(const void *p) {
    attni_U_neon r;
    int i;
    ATTNI_Q r.v[i] = vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)p + 16 * i));
    return r;
}
ATTNI_INLINE attni_U_neon attni_uload16_neon(const void *p) {
    attni_U_neon r;
    int i;
    ATTNI_Q r.v[i] = vmovl_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p + 8 * i)));
    return r;
}
ATTNI_INLINE attni_U_neon attni_uwide8(uint8x16_t x) {
    uint16x8_t a = vmovl_u8(vget_low_u8(x)), b = vmovl_u8(vget_high_u8(x));
    attni_U_neon r;
    r.v[0] = vmovl_u16(vget_low_u16(a));
    r.v[1] = vmovl_u16(vget_high_u16(a));
    r.v[2] = vmovl_u16(vget_low_u16(b));
    r.v[3] = vmovl_u16(vget_high_u16(b));
    return r;
}
ATTNI_INLINE attni_U_neon attni_uload8_neon(const void *p) {
    return attni_uwide8(vld1q_u8((const uint8_t *)p));
}
ATTNI_INLINE attni_U_neon attni_uload4_neon(const void *p) {
    uint8x8_t x = vld1_u8((const uint8_t *)p);
    uint8x8_t lo = vand_u8(x, vdup_n_u8(15)), hi = vshr_n_u8(x, 4);
    return attni_uwide8(vcombine_u8(vzip1_u8(lo, hi), vzip2_u8(lo, hi)));
}
ATTNI_INLINE attni_U_neon attni_uand_neon(attni_U_neon x, uint32_t m) {
    int i;
    ATTNI_Q x.v[i] = vandq_u32(x.v[i], vdupq_n_u32(m));
    return x;
}
ATTNI_INLINE attni_U_neon attni_uor_neon(attni_U_neon x, attni_U_neon y) {
    int i;
    ATTNI_Q x.v[i] = vorrq_u32(x.v[i], y.v[i]);
    return x;
}
ATTNI_INLINE attni_U_neon attni_uadd_neon(attni_U_neon x, attni_U_neon y) {
    int i;
    ATTNI_Q x.v[i] = vaddq_u32(x.v[i], y.v[i]);
    return x;
}
ATTNI_INLINE attni_U_neon attni_ushl_neon(attni_U_neon x, int n) {
    int i;
    ATTNI_Q x.v[i] = vshlq_u32(x.v[i], vdupq_n_s32(n));
    return x;
}
ATTNI_INLINE attni_U_neon attni_ushr_neon(attni_U_neon x, int n) {
    int i;
    ATTNI_Q x.v[i] = vshlq_u32(x.v[i], vdupq_n_s32(-n));
    return x;
}
ATTNI_INLINE attni_V_neon attni_utop_neon(attni_U_neon x, int n) {
    attni_V_neon r;
    int i;
    ATTNI_Q r.v[i] = vcvtq_f32_s32(vshlq_s32(vreinterpretq_s32_u32(x.v[i]), vdupq_n_s32(n - 32)));
    return r;
}
ATTNI_INLINE attni_V_neon attni_uhalf_neon(attni_U_neon x) {
    attni_V_neon r;
    int i;
    ATTNI_Q r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(x.v[i])));
    return r;
}
ATTNI_INLINE attni_V_neon attni_uequal_neon(attni_U_neon x, attni_U_neon y, attni_V_neon p,
                                            attni_V_neon q) {
    int i;
    ATTNI_Q p.v[i] = vbslq_f32(vceqq_u32(x.v[i], y.v[i]), p.v[i], q.v[i]);
    return p;
}
ATTNI_INLINE void attni_store_f16_neon(void *p, attni_V_neon x) {
    int i;
    ATTNI_Q vst1_u8((uint8_t *)p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.v[i])));
}
ATTNI_INLINE void attni_ustore16_neon(void *p, attni_U_neon x) {
    int i;
    ATTNI_Q vst1_u8((uint8_t *)p + 8 * i, vreinterpret_u8_u16(vmovn_u32(x.v[i])));
}
ATTNI_INLINE float attni_hmax_neon(attni_V_neon x) { // no NaN in here
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
ATTNI_INLINE float attni_hsum_neon(attni_V_neon x) {
    float32x4_t s = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
ATTNI_INLINE float attni_first_neon(attni_V_neon x) { return vgetq_lane_f32(x.v[0], 0); }

// 4 x 4 transposes of 4-byte units; the rest one by one
static void attni_pack_neon(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile) {
    int u = 0, h, i;
    for (; gap == 4 && u + 4 <= n; u += 4)
        for (h = 0; h < 16; h += 4) {
            uint32x4_t r[4], a, b, c, d;
            ATTNI_Q r[i] = vreinterpretq_u32_u8(vld1q_u8(row[h + i] + 4 * u));
            a = vtrn1q_u32(r[0], r[1]);
            b = vtrn2q_u32(r[0], r[1]);
            c = vtrn1q_u32(r[2], r[3]);
            d = vtrn2q_u32(r[2], r[3]);
            vst1q_u32(tile + 16 * u + h, vcombine_u32(vget_low_u32(a), vget_low_u32(c)));
            vst1q_u32(tile + 16 * (u + 1) + h, vcombine_u32(vget_low_u32(b), vget_low_u32(d)));
            vst1q_u32(tile + 16 * (u + 2) + h, vcombine_u32(vget_high_u32(a), vget_high_u32(c)));
            vst1q_u32(tile + 16 * (u + 3) + h, vcombine_u32(vget_high_u32(b), vget_high_u32(d)));
        }
    for (; u < n; u++)
        for (i = 0; i < 16; i++) memcpy(tile + 16 * u + i, row[i] + u * gap, 4);
}

// 1 when the CPU has BF16 and DotProd (Linux tells; elsewhere only what the build assumes).
#ifdef __linux__
#include <sys/auxv.h>
#endif
static int attni_arm_features(void) {
#if !ATTNI_ARM_DOTS
    return 0;
#elif defined(__ARM_FEATURE_BF16) && defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return (getauxval(16) & (1ul << 20)) && (getauxval(26) & (1ul << 14)); // HWCAP, HWCAP2
#else
    return 0;
#endif
}

#define ATTNI_KERNEL_PASS 1
#define ATTNI_TGT
#define ATTNI_I(f) attni_##f##_neon
#define ATTNI_DIRECT16 1
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 1
#define ATTNI_NR 6
#define ATTNI_NC 1
#include "attn_cpu.h"

#if ATTNI_ARM_DOTS
#define ATTNI_TD __attribute__((target("arch=armv8.2-a+bf16+dotprod")))
ATTNI_INLINE ATTNI_TD attni_V_neon attni_bdot_neon(attni_V_neon acc, attni_U_neon a,
                                                   attni_U_neon b) {
    int i;
    ATTNI_Q acc.v[i] =
        vbfdotq_f32(acc.v[i], vreinterpretq_bf16_u32(a.v[i]), vreinterpretq_bf16_u32(b.v[i]));
    return acc;
}
ATTNI_INLINE ATTNI_TD attni_U_neon attni_idot_neon(attni_U_neon acc, attni_U_neon k,
                                                   attni_U_neon q) {
    int i;
    ATTNI_Q acc.v[i] = vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(acc.v[i]),
                                                       vreinterpretq_s8_u32(k.v[i]),
                                                       vreinterpretq_s8_u32(q.v[i])));
    return acc;
}
#define ATTNI_KERNEL_PASS 3
#define ATTNI_TGT ATTNI_TD
#define ATTNI_I(f) attni_##f##_neon
#define ATTNI_NR 6
#define ATTNI_NC 1
#define ATTNI_IDOT_BIASED 0
#include "attn_cpu.h"
#endif
#endif // ATTNI_ARM

// ==== >>impl-dispatch  Which kernels a problem runs on ===========================================

enum { ATTNI_F32 = 0, ATTNI_BDOT = 1, ATTNI_IDOT = 2 }; // how scores (weighted sums) are computed

typedef struct attni_exec {
    attn_cpu_isa isa;
    const attni_moves *mv;
    const attni_math *ma;
    attni_qk_fn qk; // the dot kernel, if qk_kind says so
    attni_pv_fn pv;
    int qk_kind, pv_kind;
    int rb;         // rows a kernel takes together
} attni_exec;

static int attni_isa_id; // the cached attn_cpu_isa; 0: not yet looked up. Accessed atomically.
#ifdef ATTNI_X86
static int attni_amx_open; // attn_cpu_open got the tile registers
static int attni_x86_bits; // cached features, with bit 30 set once known
#endif
#if defined(__GNUC__) || defined(__clang__)
#define ATTNI_GET(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define ATTNI_SET(x, y) __atomic_store_n(&(x), y, __ATOMIC_RELAXED)
#else
#define ATTNI_GET(x) (*(volatile int *)&(x))
#define ATTNI_SET(x, y) (void)(*(volatile int *)&(x) = (y))
#endif

#ifdef ATTNI_X86
// Bits: 1 AVX2+FMA+F16C, 2 AVX-512 F BW VL DQ, 4 VNNI, 8 BF16, 16 AMX-BF16; the OS saves the
// registers.
static int attni_x86_look(void) {
    unsigned a, b, c, d, lo, hi, leaf7b, leaf7c, leaf7d;
    int f = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!(c & (1u << 27)) || !(c & (1u << 28)) || !(c & (1u << 12)) || !(c & (1u << 29))) return 0;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if ((lo & 6u) != 6u || !__get_cpuid_count(7, 0, &a, &leaf7b, &leaf7c, &leaf7d)) return 0;
    if (!(leaf7b & (1u << 5))) return 0;
    f = 1;
    if ((lo & 0xe0u) != 0xe0u || !(leaf7b & (1u << 16)) || !(leaf7b & (1u << 17)) ||
        !(leaf7b & (1u << 30)) || !(leaf7b & (1u << 31)))
        return f;
    f |= 2;
    if (leaf7c & (1u << 11)) f |= 4;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5))) f |= 8;
    if ((lo & (3u << 17)) == 3u << 17 && (leaf7d & (1u << 22)) && (leaf7d & (1u << 24))) f |= 16;
    return f;
}

static int attni_x86_features(void) { // CPUID costs tens of microseconds in a virtual machine
    int f = ATTNI_GET(attni_x86_bits);
    if (!f) {
        f = attni_x86_look() | 1 << 30;
        ATTNI_SET(attni_x86_bits, f);
    }
    return f;
}
#endif

ATTN_DEF int attn_cpu_has(attn_cpu_isa isa) {
    if (isa == ATTN_CPU_AUTO || isa == ATTN_CPU_SCALAR) return 1;
#ifdef ATTNI_X86
    {
        int f = attni_x86_features();
        if (isa == ATTN_CPU_AVX2) return (f & 1) != 0;
        if (isa == ATTN_CPU_AVX512) return (f & 2) != 0;
        if (isa == ATTN_CPU_AVX512_BF16) return (f & 8) != 0;
        if (isa == ATTN_CPU_AMX) return (f & 24) == 24 && ATTNI_GET(attni_amx_open);
    }
#endif
#ifdef ATTNI_ARM
    if (isa == ATTN_CPU_NEON) return 1;
    if (isa == ATTN_CPU_NEON_BF16) return attni_arm_features();
#endif
    return 0;
}

ATTN_DEF attn_cpu_isa attn_cpu_get_isa(void) {
    static const attn_cpu_isa best[] = {ATTN_CPU_AMX,  ATTN_CPU_AVX512_BF16, ATTN_CPU_AVX512,
                                        ATTN_CPU_AVX2, ATTN_CPU_NEON_BF16,   ATTN_CPU_NEON};
    int isa = ATTNI_GET(attni_isa_id), i;
    if (isa) return (attn_cpu_isa)isa;
    isa = ATTN_CPU_SCALAR;
    for (i = 0; i < (int)(sizeof best / sizeof best[0]) && isa == ATTN_CPU_SCALAR; i++)
        if (attn_cpu_has(best[i])) isa = (int)best[i];
    ATTNI_SET(attni_isa_id, isa);
    return (attn_cpu_isa)isa;
}

ATTN_DEF attn_result attn_cpu_set_isa(attn_cpu_isa isa) {
    if ((int)isa < 0 || isa >= ATTN_CPU_ISA_COUNT) return ATTN_ERR_ARGUMENT;
    if (!attn_cpu_has(isa)) return ATTN_ERR_UNSUPPORTED;
    ATTNI_SET(attni_isa_id, (int)isa);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cpu_open(void) {
#if defined(ATTNI_X86) && defined(__linux__)
    if ((attni_x86_features() & 24) == 24 && !ATTNI_GET(attni_amx_open)) {
        long ret = 158; // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
        __asm__ volatile("syscall" : "+a"(ret) : "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
        if (ret != 0) return ATTN_ERR_UNSUPPORTED;
        ATTNI_SET(attni_amx_open, 1);
        ATTNI_SET(attni_isa_id, 0);
    }
#endif
    return ATTN_OK;
}

ATTN_DEF const char *attn_cpu_isa_name(attn_cpu_isa isa) {
    switch ((int)isa) {
#define ATTNI_X(name, value, text)                                                                 \
    case value: return text;
        ATTN_CPU_ISAS(ATTNI_X)
#undef ATTNI_X
    default: return "unknown";
    }
}

// What a problem runs on: a function of ISA, dtypes and numerics only, never of sizes.
static void attni_choose(const attn_desc *d, attni_exec *x) {
    int bf16_o = d->o.dtype == ATTN_BF16, fast = d->numerics != ATTN_NUMERICS_PORTABLE;
    int bqk = fast && bf16_o && d->q.dtype == ATTN_BF16 && d->kv.k.dtype == ATTN_BF16;
    int bpv = fast && bf16_o && d->kv.v.dtype == ATTN_BF16;
    int iqk = d->numerics == ATTN_NUMERICS_APPROX && d->kv.k.dtype == ATTN_I8;
    x->isa = attn_cpu_get_isa();
    x->mv = &attni_moves_scalar;
    x->ma = fast ? &attni_math_fast_scalar : &attni_math_portable_scalar;
    x->qk = 0;
    x->pv = 0;
    x->qk_kind = x->pv_kind = ATTNI_F32;
    x->rb = 6;
    (void)bqk, (void)bpv, (void)iqk;
#ifdef ATTNI_X86
    if (x->isa == ATTN_CPU_AVX2) {
        x->mv = &attni_moves_avx2;
        x->ma = fast ? &attni_math_fast_avx2 : &attni_math_portable_avx2;
    } else if (x->isa >= ATTN_CPU_AVX512 && x->isa <= ATTN_CPU_AMX) {
        x->mv = &attni_moves_avx512;
        x->ma = fast ? &attni_math_fast_avx512 : &attni_math_portable_avx512;
        if (x->isa >= ATTN_CPU_AVX512_BF16) {
            if (bqk) x->qk_kind = ATTNI_BDOT, x->qk = attni_qk_bdot_avx512;
            if (bpv) x->pv_kind = ATTNI_BDOT, x->pv = attni_pv_bdot_avx512;
        }
        if (iqk && (attni_x86_features() & 4))
            x->qk_kind = ATTNI_IDOT, x->qk = attni_qk_idot_avx512;
        if (x->isa == ATTN_CPU_AMX && (bqk || bpv)) {
            x->rb = 16;
            if (bqk) x->qk = attni_qk_amx;
            if (bpv) x->pv = attni_pv_amx;
        }
    }
#endif
#ifdef ATTNI_ARM
    if (x->isa >= ATTN_CPU_NEON) {
        x->mv = &attni_moves_neon;
        x->ma = fast ? &attni_math_fast_neon : &attni_math_portable_neon;
#if ATTNI_ARM_DOTS
        if (x->isa == ATTN_CPU_NEON_BF16) {
            if (bqk) x->qk_kind = ATTNI_BDOT, x->qk = attni_qk_bdot_neon;
            if (bpv) x->pv_kind = ATTNI_BDOT, x->pv = attni_pv_bdot_neon;
            if (iqk) x->qk_kind = ATTNI_IDOT, x->qk = attni_qk_idot_neon;
        }
#endif
    }
#endif
}

#define ATTNI_NAMES(isa)                                                                           \
    {                                                                                              \
        isa ":f32,f32", isa ":bdot,f32", isa ":idot,f32", isa ":f32,bdot", isa ":bdot,bdot",       \
            isa ":idot,bdot"                                                                       \
    }

ATTN_DEF const char *attn_cpu_executor(const attn_desc *d) {
    static const char *const names[ATTN_CPU_ISA_COUNT][6] = {
        ATTNI_NAMES("auto"),   ATTNI_NAMES("scalar"),     ATTNI_NAMES("avx2"),
        ATTNI_NAMES("avx512"), ATTNI_NAMES("avx512bf16"), ATTNI_NAMES("amx"),
        ATTNI_NAMES("neon"),   ATTNI_NAMES("neonbf16")};
    attni_exec x;
    if (!d) return "none";
    attni_choose(d, &x);
    return names[x.isa][x.qk_kind + 3 * x.pv_kind];
}

ATTN_DEF attn_result attn_cpu_supports(const attn_desc *d) { return attn_validate(d); }

// ==== >>impl-store  ==============================================================================

// One row of one head into its place: codes gathered in a row, then scattered by 4-byte units.
ATTNI_CALLED void attni_store_row(const attni_moves *mv, const attni_side *s, const void *src,
                            attn_dtype st, int64_t page, int32_t place, int32_t head) {
    float x[ATTN_MAX_HEAD_DIM + 16], scale = 1.0f, top = 0;
    uint8_t code[4 * ATTN_MAX_HEAD_DIM];
    uint8_t *p = s->data + page * s->page_bytes + attni_token_offset(s, place, head);
    int32_t e, n = s->dim, units = n * attni_bits_of(s->dtype) / 32;
    mv->widen(st, src, n, x);
    if (attni_is_scaled(s->dtype)) {
        if (s->head_scale) scale = s->head_scale[head];
        else {
            for (e = 0; e < n; e++) {
                float a = attni_float(attni_bits32(x[e]) & 0x7fffffffu);
                if (a > top || attni_isnan(a)) top = a;
                if (attni_isnan(top)) break;
            }
            scale = top / attni_code_max(s->dtype);
            memcpy(s->data + page * s->page_bytes + attni_scale_offset(s, place, head), &scale, 4);
        }
        for (e = 0; e < n; e++)
            attni_put(code, s->dtype, e, (attni_bits32(scale) & 0x7fffffffu) ? x[e] / scale : 0.0f);
    } else {
        mv->narrow(s->dtype, x, n, code);
    }
    if (!s->k16) memcpy(p, code, 4 * (size_t)units);
    else
        for (e = 0; e < units; e++) memcpy(p + 64 * (int64_t)e, code + 4 * e, 4);
}

// Rows [0, end) of k or v.
ATTNI_CALLED attn_result attni_check_rows(const attn_desc *d, const attn_tensor *t, int64_t end) {
    int64_t limit = (int64_t)1 << 58;
    if (!t) return ATTN_OK;
    if (!t->data) return ATTN_ERR_ARGUMENT;
    if (!attni_is_float(t->dtype)) return ATTN_ERR_DTYPE;
    if (t->stride_token < 0 || t->stride_head < 0) return ATTN_ERR_LAYOUT;
    return t->stride_token > limit / attni_max64(end, 1) || t->stride_head > limit / d->n_kv_heads
               ? ATTN_ERR_OVERFLOW : ATTN_OK;
}

// What run, store and merge rely on without reading tables.
ATTNI_CALLED attn_result attni_cpu_check(const attn_desc *d) {
    int32_t vd;
    if (!d || d->n_seq < 1 || d->n_heads < 1 || d->n_kv_heads < 1 || d->n_heads % d->n_kv_heads)
        return ATTN_ERR_ARGUMENT;
    vd = attni_v_dim(d);
    if (d->head_dim < 8 || d->head_dim % 8 || d->head_dim > ATTN_MAX_HEAD_DIM || vd < 8 || vd % 8 ||
        vd > ATTN_MAX_HEAD_DIM)
        return ATTN_ERR_SHAPE;
    if (!attni_bits_of(d->kv.k.dtype) || !attni_bits_of(d->kv.v.dtype)) return ATTN_ERR_DTYPE;
    if (!d->kv.k.data || !d->kv.v.data || !d->kv.kv_len || !d->q_start) return ATTN_ERR_ARGUMENT;
    if (d->kv.page_tokens < 1 || d->kv.n_pages < 1) return ATTN_ERR_ARGUMENT;
    return (int)d->kv.layout < 0 || d->kv.layout > ATTN_K16 ? ATTN_ERR_LAYOUT : ATTN_OK;
}

// Slot of row t by the tables, or -1.
ATTNI_CALLED int64_t attni_own_slot(const attn_desc *d, int32_t *s, int64_t t) {
    int64_t place;
    int32_t page;
    while (t >= d->q_start[*s + 1]) ++*s;
    place = (int64_t)attni_q_pos0(d, *s) + (t - d->q_start[*s]) - attni_kv_pos0(d, *s);
    if (place < 0 || place >= d->kv.kv_len[*s]) return -1;
    page = attni_page_of(d, *s, (int32_t)place);
    return page < 0 ? -1 : (int64_t)page * d->kv.page_tokens + place % d->kv.page_tokens;
}

ATTN_DEF attn_result attn_cpu_store(const attn_desc *d, const attn_tensor *k, const attn_tensor *v,
                                    const int64_t *slots, int64_t first, int64_t count) {
    attni_side side[2];
    const attn_tensor *src[2];
    attni_exec x;
    attn_result r = attni_cpu_check(d);
    int64_t t, slot, n_slots;
    int32_t s = 0, h, i;
    if (r != ATTN_OK) return r;
    if (first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if (!slots && count > d->q_start[d->n_seq] - first) return ATTN_ERR_SHAPE;
    if (count > INT64_MAX - first) return ATTN_ERR_OVERFLOW;
    if ((r = attni_check_rows(d, k, first + count)) != ATTN_OK) return r;
    if ((r = attni_check_rows(d, v, first + count)) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 0, &side[0])) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &side[1])) != ATTN_OK) return r;
    src[0] = k;
    src[1] = v;
    n_slots = (int64_t)d->kv.n_pages * d->kv.page_tokens;
    for (t = first; t < first + count; t++) { // look before touching memory
        slot = slots ? slots[t] : attni_own_slot(d, &s, t);
        if (slot >= n_slots || (slot < 0 && !slots)) return ATTN_ERR_PAGE;
    }
    attni_choose(d, &x);
    for (s = 0, t = first; t < first + count; t++) {
        slot = slots ? slots[t] : attni_own_slot(d, &s, t);
        for (i = 0; i < 2 && slot >= 0; i++) {
            int64_t st, sh, bytes;
            if (!src[i]) continue;
            st = src[i]->stride_token ? src[i]->stride_token : (int64_t)d->n_kv_heads * side[i].dim;
            sh = src[i]->stride_head ? src[i]->stride_head : side[i].dim;
            bytes = attni_bits_of(src[i]->dtype) / 8;
            for (h = 0; h < d->n_kv_heads; h++)
                attni_store_row(x.mv, &side[i],
                                (const uint8_t *)src[i]->data + (t * st + h * sh) * bytes,
                                src[i]->dtype, slot / d->kv.page_tokens,
                                (int32_t)(slot % d->kv.page_tokens), h);
        }
    }
    return ATTN_OK;
}

// The first n slots of a page and nothing else: the others may hold newer tokens already.
ATTNI_CALLED void attni_copy_slots(const attn_desc *d, const attni_side *s, int32_t src,
                                   int32_t dst, int32_t n) {
    const uint8_t *from = s->data + src * s->page_bytes;
    uint8_t *to = s->data + dst * s->page_bytes;
    int64_t row = (int64_t)s->dim * attni_bits_of(s->dtype) / 8, at;
    int32_t h, t, u;
    for (h = 0; h < d->n_kv_heads; h++)
        for (t = 0; t < n; t += s->k16 ? 16 : 1) {
            size_t run = s->k16 ? 4 * (size_t)attni_min32(16, n - t) : (size_t)row;
            at = attni_token_offset(s, t, h);
            for (u = 0; u < (s->k16 ? row / 4 : 1); u++, at += 64) memcpy(to + at, from + at, run);
        }
    for (h = 0; h < d->n_kv_heads && s->scale_offset >= 0; h++)
        for (t = 0; t < n; t++) {
            at = attni_scale_offset(s, t, h);
            memcpy(to + at, from + at, 4);
        }
}

ATTN_DEF attn_result attn_cpu_copy_pages(const attn_desc *d, const attn_page_copy *copies,
                                         int32_t n) {
    attni_side side[2];
    attn_result r = attni_cpu_check(d);
    int32_t i, is_v;
    if (r != ATTN_OK) return r;
    if ((r = attni_side_init(d, 0, &side[0])) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &side[1])) != ATTN_OK) return r;
    if (n < 0 || (n > 0 && !copies)) return ATTN_ERR_ARGUMENT;
    for (i = 0; i < n; i++) {
        if (copies[i].src < 0 || copies[i].src >= d->kv.n_pages || copies[i].dst < 0 ||
            copies[i].dst >= d->kv.n_pages)
            return ATTN_ERR_PAGE;
        if (copies[i].n_tokens < 0 || copies[i].n_tokens > d->kv.page_tokens)
            return ATTN_ERR_ARGUMENT;
    }
    for (is_v = 0; is_v < 2; is_v++) {
        if (is_v && d->kv.v.data == d->kv.k.data) break; // V aliases K
        for (i = 0; i < n; i++)
            if (copies[i].src != copies[i].dst)
                attni_copy_slots(d, &side[is_v], copies[i].src, copies[i].dst, copies[i].n_tokens);
    }
    return ATTN_OK;
}

// ==== >>impl-tasks  ==============================================================================

// One thread's state while it runs tasks; the arrays lie in its scratch.
typedef struct attni_work {
    const attn_desc *d;
    const attn_plan *p;
    attni_exec x;
    attni_side k, v;
    attni_masker masker;
    int32_t group, vdp;        // GQA heads; v_head_dim padded to 16
    int32_t k_units;           // 4-byte units of a K row
    int64_t ldq;               // elements of a packed query row, in the kernel's type
    float scale;
    int per_head;              // masks differ between the heads of a group
    // the task
    int32_t kv_head, n_tokens, n_rows; // row = head in group * n_tokens + token
    int32_t *tok, *seq;        // (n_tokens) global query token, sequence
    int32_t *pos;              // (n_tokens) position
    void *q;                   // (n_rows + 16, ldq)
    float *o, *m, *l;          // (n_rows, vdp), (n_rows)
    // the span
    uint64_t (*bits)[4];       // (n_tokens or n_rows) visible keys
    uint16_t *tiles;           // per row block: 16-token tiles any of its rows sees
    float *s;                  // (n_rows + 16, 256) scores, then weights
    uint16_t *p16;             // the same for bf16 weights
    float *sm, *sl;            // (n_rows) maximum and sum of the span
    float *os;                 // (16, vdp) weighted sums of a row block, and as much to spare
    const uint8_t **krow;      // (256)
    const void **vrow;         // (256 + 40): kernels prefetch ahead
    const uint32_t **kt;       // (16) K16 tiles
    uint32_t *kraw;            // (16, k_units, 16)
    float *kf;                 // (16, head_dim, 16) f32
    float *vf;                 // (256, vdp) f32, or pairs
    float *ks, *vs, *add;      // (256)
} attni_work;

static const uint32_t attni_zeros[ATTN_MAX_HEAD_DIM + 16] = {0};

// Carves the scratch; with base NULL only counts.
ATTNI_CALLED size_t attni_work_carve(attni_work *w, uint8_t *base, int32_t n_tokens,
                                     int32_t n_rows) {
    size_t at = 0, r = (size_t)n_rows + ATTNI_RB_MAX, t = (size_t)n_tokens, vdp = (size_t)w->vdp;
    size_t dim = ((size_t)w->d->head_dim + 31) & ~(size_t)31;
#define ATTNI_CARVE(field, type, count)                                                            \
    if (base) w->field = (type)(void *)(base + at);                                                \
    at += (sizeof *w->field * (size_t)(count) + 63) & ~(size_t)63;
    ATTNI_CARVE(tok, int32_t *, t)
    ATTNI_CARVE(seq, int32_t *, t)
    ATTNI_CARVE(pos, int32_t *, t)
    if (base) w->q = base + at;
    at += r * (dim + 16) * 4;
    ATTNI_CARVE(o, float *, r * vdp)
    ATTNI_CARVE(m, float *, r)
    ATTNI_CARVE(l, float *, r)
    ATTNI_CARVE(bits, uint64_t(*)[4], r)
    ATTNI_CARVE(tiles, uint16_t *, r)
    ATTNI_CARVE(s, float *, r * ATTN_SPAN)
    ATTNI_CARVE(p16, uint16_t *, r * ATTN_SPAN)
    ATTNI_CARVE(sm, float *, r)
    ATTNI_CARVE(sl, float *, r)
    ATTNI_CARVE(os, float *, 2 * ATTNI_RB_MAX * vdp)
    ATTNI_CARVE(krow, const uint8_t **, ATTN_SPAN)
    ATTNI_CARVE(vrow, const void **, ATTN_SPAN + 40)
    ATTNI_CARVE(kt, const uint32_t **, ATTNI_TILES)
    ATTNI_CARVE(kraw, uint32_t *, ATTN_SPAN * dim)
    ATTNI_CARVE(kf, float *, ATTN_SPAN * dim)
    ATTNI_CARVE(vf, float *, ATTN_SPAN * vdp)
    ATTNI_CARVE(ks, float *, ATTN_SPAN)
    ATTNI_CARVE(vs, float *, ATTN_SPAN)
    ATTNI_CARVE(add, float *, ATTN_SPAN)
#undef ATTNI_CARVE
    return at;
}

ATTN_DEF size_t attn_cpu_scratch_bytes(const attn_desc *d, const attn_plan *p) {
    attni_work w;
    int32_t group, tile;
    if (!d || !p || d->n_kv_heads < 1) return 0;
    memset(&w, 0, sizeof w);
    w.d = d;
    w.vdp = (attni_v_dim(d) + 15) & ~15;
    group = d->n_heads / d->n_kv_heads;
    tile = attni_max32(1, (p->params.row_tile > 0 ? p->params.row_tile : 256) / group);
    return attni_work_carve(&w, NULL, tile, tile * group);
}

ATTNI_CALLED attn_result attni_work_init(attni_work *w, const attn_desc *d, const attn_plan *p) {
    attn_result r = attni_cpu_check(d);
    const attn_mask *m;
    if (r != ATTN_OK) return r;
    if (!p || !attni_is_float(d->q.dtype) || !attni_is_float(d->o.dtype)) return ATTN_ERR_ARGUMENT;
    if (!d->q.data || !d->o.data) return ATTN_ERR_ARGUMENT;
    if (p->n_seq != d->n_seq || p->n_heads != d->n_heads || p->n_kv_heads != d->n_kv_heads ||
        p->head_dim != d->head_dim || p->v_head_dim != attni_v_dim(d))
        return ATTN_ERR_STALE;
    memset(w, 0, sizeof *w);
    w->d = d;
    w->p = p;
    if ((r = attni_side_init(d, 0, &w->k)) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &w->v)) != ATTN_OK) return r;
    attni_choose(d, &w->x);
    attni_masker_init(&w->masker, d);
    m = &d->mask;
    w->per_head = (m->blocks.row_start && m->blocks.n_lists == d->n_heads) ||
                  (m->vslash.block && m->vslash.n_lists == d->n_heads);
    w->group = d->n_heads / d->n_kv_heads;
    if (w->group == 1) w->per_head = 0;
    w->vdp = (p->v_head_dim + 15) & ~15;
    w->k_units = d->head_dim * attni_bits_of(d->kv.k.dtype) / 32;
    w->scale = attni_scale(d);
    return ATTN_OK;
}

// ---- rows: which queries, and Q in the form the kernels take

// Rows of int8 codes for the integer dot: [scale f32][correction i32][codes].
ATTNI_CALLED void attni_pack_q8(const float *q, int32_t n, uint8_t *out) {
    float top = 0, scale;
    int32_t e, sum = 0;
    for (e = 0; e < n; e++) {
        float a = attni_float(attni_bits32(q[e]) & 0x7fffffffu);
        if (a > top || attni_isnan(a)) top = a;
        if (attni_isnan(top)) break;
    }
    scale = top / 127.0f;
    for (e = 0; e < n; e++) {
        int c = attni_round_clamp(scale > 0 ? q[e] / scale : 0.0f, 127);
        out[8 + e] = (uint8_t)c;
        sum += c;
    }
    sum *= -128;
    memcpy(out, &scale, 4);
    memcpy(out + 4, &sum, 4);
}

ATTNI_CALLED void attni_load_q(attni_work *w) {
    const attn_desc *d = w->d;
    int64_t st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim;
    int64_t sh = d->q.stride_head ? d->q.stride_head : d->head_dim;
    int64_t bytes = attni_bits_of(d->q.dtype) / 8;
    int32_t g, i, n = d->head_dim, pad = (n + 31) & ~31;
    float x[ATTN_MAX_HEAD_DIM + 16];
    w->ldq = w->x.qk_kind == ATTNI_BDOT ? pad / 2 : w->x.qk_kind == ATTNI_IDOT ? pad + 8 : n;
    for (g = 0; g < w->group; g++)
        for (i = 0; i < w->n_tokens; i++) {
            int64_t row = (int64_t)g * w->n_tokens + i, h = (int64_t)w->kv_head * w->group + g;
            const uint8_t *src = (const uint8_t *)d->q.data + (w->tok[i] * st + h * sh) * bytes;
            if (w->x.qk_kind == ATTNI_BDOT) {
                memset((uint32_t *)w->q + row * w->ldq, 0, 4 * (size_t)w->ldq);
                memcpy((uint32_t *)w->q + row * w->ldq, src, 2 * (size_t)n);
            } else if (w->x.qk_kind == ATTNI_IDOT) {
                w->x.mv->widen(d->q.dtype, src, n, x);
                attni_pack_q8(x, n, (uint8_t *)w->q + row * w->ldq);
            } else {
                w->x.mv->widen(d->q.dtype, src, n, x);
                memcpy((float *)w->q + row * w->ldq, x, 4 * (size_t)n);
            }
        }
    // kernels may take whole blocks of 16 rows
    memset((uint8_t *)w->q + w->n_rows * w->ldq * (w->x.qk_kind == ATTNI_IDOT ? 1 : 4), 0,
           (size_t)(ATTNI_RB_MAX * w->ldq * (w->x.qk_kind == ATTNI_IDOT ? 1 : 4)));
}

ATTNI_CALLED attn_result attni_load_rows(attni_work *w, const attn_task *t) {
    const attn_plan *p = w->p;
    const attn_segment *g = &p->segment[t->segment];
    int32_t i = 0, place, skip = t->first_token;
    w->kv_head = t->kv_head;
    w->n_tokens = t->n_tokens;
    w->n_rows = t->n_tokens * w->group;
    for (place = g->seq0; place < g->seq0 + g->n_seq && i < w->n_tokens; place++) {
        int32_t s = p->order[place], j;
        const attn_plan_seq *q = &p->seq[s];
        if (skip >= q->q_len) {
            skip -= q->q_len;
            continue;
        }
        if (w->d->kv.kv_len[s] != q->kv_len || w->d->q_start[s] != q->q_begin ||
            attni_q_pos0(w->d, s) != q->q_pos0 || attni_kv_pos0(w->d, s) != q->kv_pos0)
            return ATTN_ERR_STALE;
        for (j = skip, skip = 0; j < q->q_len && i < w->n_tokens; j++, i++) {
            w->tok[i] = q->q_begin + j;
            w->seq[i] = s;
            w->pos[i] = q->q_pos0 + j;
            if (w->d->mask.kind == ATTN_MASK_TREE && !q->is_chain)
                w->pos[i] = q->q_pos0 + attni_tree_depth(w->d, q->q_begin, j);
        }
    }
    attni_load_q(w);
    for (i = 0; i < w->n_rows; i++) {
        w->m[i] = attni_float(0xff800000u);
        w->l[i] = 0;
    }
    return ATTN_OK;
}

// ---- span: masks, then K and V rows

static uint16_t attni_tiles_of(const uint64_t b[4]) {
    uint32_t t = 0;
    int i;
    for (i = 0; i < ATTNI_TILES; i++)
        if ((b[i / 4] >> (16 * (i % 4))) & 0xffffu) t |= 1u << i;
    return (uint16_t)t;
}

static const uint64_t *attni_row_bits(const attni_work *w, int32_t row) {
    return w->bits[w->per_head ? row : row % w->n_tokens];
}

// Fills bits and tiles; returns the union of tiles (0: nobody sees anything in this span).
ATTNI_CALLED uint16_t attni_span_masks(attni_work *w, int32_t span) {
    uint32_t all = 0;
    int32_t g, i, r, rb = w->x.rb, n = w->per_head ? w->group : 1;
    for (g = 0; g < n; g++)
        for (i = 0; i < w->n_tokens; i++) {
            const attn_plan_seq *q = &w->p->seq[w->seq[i]];
            attni_span_bits(&w->masker, q, w->seq[i], w->tok[i] - q->q_begin, w->pos[i],
                            w->kv_head * w->group + g, span, w->bits[g * w->n_tokens + i]);
        }
    for (r = 0; r < w->n_rows; r += rb) {
        uint64_t u[4] = {0, 0, 0, 0};
        for (i = r; i < r + rb && i < w->n_rows; i++) {
            const uint64_t *b = attni_row_bits(w, i);
            for (g = 0; g < 4; g++) u[g] |= b[g];
        }
        w->tiles[r / rb] = attni_tiles_of(u);
        if (w->x.isa == ATTN_CPU_AMX && w->x.pv_kind == ATTNI_BDOT) // its steps are 32 tokens
            w->tiles[r / rb] |=
                (uint16_t)((w->tiles[r / rb] & 0x5555u) << 1 | (w->tiles[r / rb] & 0xaaaau) >> 1);
        all |= w->tiles[r / rb];
    }
    return (uint16_t)all;
}

// Row pointers and scales of one 16-token tile; tokens that are not held stand on a neighbour (K,
// where they are masked) or on zeros (V). Returns the page when the whole tile is one aligned K16
// tile.
ATTNI_CALLED attn_result attni_tile_rows(attni_work *w, int32_t s, int32_t span, int i,
                                   int32_t *k16_place, int64_t *k16_page) {
    const attn_plan_seq *q = &w->p->seq[s];
    int64_t j0 = (int64_t)span * ATTN_SPAN + 16 * i - q->kv_pos0;
    int32_t lo = (int32_t)attni_max64(0, -j0), hi = (int32_t)attni_min64(16, q->kv_len - j0), t, u;
    int32_t pt = w->d->kv.page_tokens, place = 0, page = -1, head = w->kv_head;
    *k16_page = -1;
    for (t = lo; t < hi; t++, place++) {
        int at = 16 * i + t;
        if (t == lo || place == pt) {
            place = (int32_t)((j0 + t) % pt);
            page = attni_page_of(w->d, s, (int32_t)(j0 + t));
            if (page < 0) return ATTN_ERR_PAGE;
            if (t == 0 && place % 16 == 0 && pt % 16 == 0) *k16_page = page, *k16_place = place;
        }
        w->krow[at] = w->k.data + page * w->k.page_bytes + attni_token_offset(&w->k, place, head);
        w->vrow[at] = w->v.data + page * w->v.page_bytes + attni_token_offset(&w->v, place, head);
        if (attni_is_scaled(w->k.dtype)) w->ks[at] = attni_token_scale(&w->k, page, place, head);
        if (attni_is_scaled(w->v.dtype)) w->vs[at] = attni_token_scale(&w->v, page, place, head);
    }
    for (u = 0; u < 16; u++)
        if (u < lo || u >= hi) {
            w->krow[16 * i + u] = lo < hi ? w->krow[16 * i + lo] : NULL;
            w->vrow[16 * i + u] = attni_zeros;
            w->ks[16 * i + u] = w->vs[16 * i + u] = 0;
        }
    return ATTN_OK;
}

ATTNI_CALLED int attni_runs_of(uint32_t tiles, attni_run run[ATTNI_TILES]) {
    int n = 0, i;
    for (i = 0; i < ATTNI_TILES; i++) {
        if (!((tiles >> i) & 1u)) continue;
        if (n && run[n - 1].t1 == 16 * i) run[n - 1].t1 += 16;
        else {
            run[n].t0 = 16 * i;
            run[n++].t1 = 16 * i + 16;
        }
    }
    return n;
}

// Makes rows of V what the kernel reads: f32 rows for the types without a kernel of their own or
// when many rows share the work, pairs for the bf16 dot. row: 256 pointers, replaced.
ATTNI_CALLED attni_pv_fn attni_prepare_v(attni_work *w, const void **row, uint32_t tiles) {
    attn_dtype t = w->v.dtype;
    attni_run run[ATTNI_TILES];
    int n = attni_runs_of(tiles, run), i, j, vd = w->p->v_head_dim;
    if (w->x.pv_kind == ATTNI_BDOT) {
        w->x.mv->pairs(row, run, n, vd, w->vdp, (uint32_t *)(void *)w->vf);
        return w->x.pv;
    }
    if (vd == w->vdp && (t == ATTN_F32 || (attni_is_float(t) && w->n_rows <= 12 && w->x.ma->pv[t])))
        return w->x.ma->pv[t];
    for (i = 0; i < n; i++)
        for (j = run[i].t0; j < run[i].t1; j++) {
            float *out = w->vf + (int64_t)j * w->vdp;
            ATTNI_PREFETCH((const uint8_t *)row[j + 16]);
            w->x.mv->widen(row[j] == (const void *)attni_zeros ? ATTN_F32 : t, row[j], vd, out);
            row[j] = out;
        }
    return w->x.ma->pv[ATTN_F32];
}

ATTNI_CALLED attn_result attni_load_span(attni_work *w, int32_t span, uint32_t tiles) {
    int row_bytes = 4 * w->k_units, i, t, b;
    for (i = 0; i < ATTNI_TILES; i++) {
        int32_t place = 0;
        int64_t page = -1;
        attn_result r;
        w->kt[i] = NULL;
        if (!((tiles >> i) & 1u)) {
            for (t = 16 * i; t < 16 * i + 16; t++) w->vrow[t] = attni_zeros;
            continue;
        }
        if ((r = attni_tile_rows(w, w->seq[0], span, i, &place, &page)) != ATTN_OK) return r;
        if (w->k.k16 && page >= 0)
            w->kt[i] =
                (const uint32_t *)(const void *)(w->k.data + page * w->k.page_bytes +
                                                 attni_token_offset(&w->k, place, w->kv_head));
    }
    for (i = 0; i < ATTNI_TILES; i++) {
        uint32_t *raw = w->kraw + (int64_t)i * 16 * w->k_units;
        if (!((tiles >> i) & 1u) || w->kt[i]) continue;
        if (!w->k.k16 && i + 1 < ATTNI_TILES && ((tiles >> (i + 1)) & 1u) && w->krow[16 * i + 16])
            for (t = 16; t < 32; t++)
                for (b = 0; b < row_bytes; b += 64) ATTNI_PREFETCH(w->krow[16 * i + t] + b);
        if (!w->krow[16 * i]) memset(raw, 0, 64 * (size_t)w->k_units); // nothing held
        else w->x.mv->pack(w->krow + 16 * i, w->k.k16 ? 64 : 4, w->k_units, raw);
        w->kt[i] = raw;
    }
    for (i = ATTN_SPAN; i < ATTN_SPAN + 40; i++) w->vrow[i] = attni_zeros;
    return ATTN_OK;
}

// ---- scores, weights, sums

ATTNI_CALLED void attni_scores(attni_work *w, uint32_t tiles) {
    attn_dtype t = w->k.dtype;
    int few = w->n_rows <= 12, units = w->k_units, panel, i, r, rb = w->x.rb;
    int direct = w->x.qk_kind != ATTNI_F32 || t == ATTN_F32 ||
                 (few && attni_is_float(t) && w->x.ma->qk[t]);
    attni_qk_fn qk = w->x.qk_kind != ATTNI_F32 ? w->x.qk
                     : direct                  ? w->x.ma->qk[t]
                                               : w->x.ma->qk[ATTN_F32];
    int64_t q_bytes = w->ldq * (w->x.qk_kind == ATTNI_IDOT ? 1 : 4);
    // 64 tokens at a time when there are many rows: their K stays in the first-level cache
    for (panel = 0; panel < ATTNI_TILES; panel += few ? ATTNI_TILES : 4) {
        uint32_t in = tiles & ((few ? 0xffffu : 15u) << panel);
        const uint32_t *kt[ATTNI_TILES + 7];
        uint8_t col[ATTNI_TILES + 7];
        if (!in) continue;
        if (!direct) {
            for (i = 0; i < ATTNI_TILES; i++) {
                float *out = w->kf + (int64_t)i * 16 * w->d->head_dim;
                if (!((in >> i) & 1u)) continue;
                w->x.mv->widen_tile(t, w->kt[i], units, out);
                w->kt[i] = (const uint32_t *)(const void *)out;
            }
        }
        for (r = 0; r < w->n_rows; r += rb) {
            uint32_t mine = in & w->tiles[r / rb];
            int n = 0;
            for (i = 0; i < ATTNI_TILES; i++)
                if ((mine >> i) & 1u) kt[n] = w->kt[i], col[n++] = (uint8_t)i;
            for (i = n; n && i < n + 7; i++) kt[i] = kt[n - 1], col[i] = col[n - 1];
            if (n)
                qk((const uint8_t *)w->q + r * q_bytes, w->ldq, attni_min32(rb, w->n_rows - r), kt,
                   col, n, direct ? units : w->d->head_dim, w->s + (int64_t)r * ATTN_SPAN);
        }
    }
}

// Bias, and ALiBi where token-tree nodes make positions irregular, as one array; NULL if neither.
static const float *attni_row_add(attni_work *w, int32_t i, int32_t head, int32_t span, int tree) {
    const attn_desc *d = w->d;
    const attn_tensor *b = &d->logits.bias;
    const attn_plan_seq *q = &w->p->seq[w->seq[i]];
    int64_t j0 = (int64_t)span * ATTN_SPAN - q->kv_pos0;
    int t;
    if (!b->data && !tree) return NULL;
    for (t = 0; t < ATTN_SPAN; t++) {
        float x = 0;
        int64_t kp = j0 + t + q->kv_pos0;
        if (j0 + t < 0 || j0 + t >= q->kv_len) {
            w->add[t] = 0;
            continue;
        }
        if (tree) {
            if (kp >= q->q_pos0)
                kp = q->q_pos0 + attni_tree_depth(d, q->q_begin, (int32_t)(kp - q->q_pos0));
            x = d->logits.alibi[head] * (float)(kp - w->pos[i]);
        }
        if (b->data)
            x += attni_get(b->data, b->dtype,
                           head * b->stride_head + w->tok[i] * b->stride_token + j0 + t);
        w->add[t] = x;
    }
    return w->add;
}

ATTNI_CALLED void attni_weights(attni_work *w, int32_t span) {
    attni_soft a;
    int32_t r;
    memset(&a, 0, sizeof a);
    a.k_scale = attni_is_scaled(w->k.dtype) ? w->ks : NULL;
    a.v_scale = attni_is_scaled(w->v.dtype) ? w->vs : NULL;
    a.scale = w->scale;
    a.softcap = w->d->logits.softcap;
    for (r = 0; r < w->n_rows; r++) {
        int32_t i = r % w->n_tokens, head = w->kv_head * w->group + r / w->n_tokens;
        const attn_plan_seq *q = &w->p->seq[w->seq[i]];
        int tree = w->d->logits.alibi && w->d->mask.kind == ATTN_MASK_TREE && !q->is_chain &&
                   (int64_t)(span + 1) * ATTN_SPAN > q->q_pos0;
        a.tiles = w->tiles[r / w->x.rb];
        if (!a.tiles) {
            w->sm[r] = attni_float(0xff800000u);
            w->sl[r] = 0;
            continue;
        }
        a.alibi = w->d->logits.alibi && !tree ? w->d->logits.alibi[head] : 0;
        a.alibi_first = (float)((int64_t)span * ATTN_SPAN - w->pos[i]);
        a.add = attni_row_add(w, i, head, span, tree);
        a.p16 = w->x.pv_kind == ATTNI_BDOT ? w->p16 + (int64_t)r * ATTN_SPAN : NULL;
        w->sm[r] =
            w->x.ma->soft(&a, w->s + (int64_t)r * ATTN_SPAN, attni_row_bits(w, r), &w->sl[r]);
    }
}

// A row whose sum holds Inf or NaN: again, with zeros for the V rows its own mask hides, since 0 *
// NaN of another row's token must not reach it.
ATTNI_CALLED void attni_row_again(attni_work *w, int32_t span, int32_t r, uint32_t tiles,
                                  float *out) {
    const void *row[ATTN_SPAN + 40];
    const uint64_t *b = attni_row_bits(w, r);
    attni_run run[ATTNI_TILES];
    attni_pv_fn pv;
    const void *p = w->x.pv_kind == ATTNI_BDOT ? (const void *)(w->p16 + (int64_t)r * ATTN_SPAN)
                                               : (const void *)(w->s + (int64_t)r * ATTN_SPAN);
    int t, n = attni_runs_of(tiles, run);
    for (t = 0; t < ATTN_SPAN + 40; t++) {
        row[t] = attni_zeros;
        if (t < ATTN_SPAN && ((b[t / 64] >> (t % 64)) & 1u)) {
            const attn_plan_seq *q = &w->p->seq[w->seq[0]];
            int64_t j = (int64_t)span * ATTN_SPAN + t - q->kv_pos0;
            int32_t page = attni_page_of(w->d, w->seq[0], (int32_t)j);
            row[t] = w->v.data + page * w->v.page_bytes +
                     attni_token_offset(&w->v, (int32_t)(j % w->d->kv.page_tokens), w->kv_head);
        }
    }
    pv = attni_prepare_v(w, row, tiles);
    if (w->x.pv_kind == ATTNI_BDOT) row[0] = w->vf;
    pv(p, 1, row, run, n, w->vdp, w->os + (int64_t)ATTNI_RB_MAX * w->vdp, w->vdp);
    memcpy(out, w->os + (int64_t)ATTNI_RB_MAX * w->vdp, 4 * (size_t)w->vdp);
}

static float *attni_partial(const attni_work *w, const attn_segment *g, const attn_task *t,
                            float *base, int32_t slot, int32_t r) {
    int64_t token = t->first_token + r % w->n_tokens,
            head = w->kv_head * w->group + r / w->n_tokens;
    int64_t row = g->partial + ((int64_t)slot * g->n_tokens + token) * w->p->n_heads + head;
    return base + row * (w->p->v_head_dim + 2);
}

static void attni_put_partial(const attni_work *w, float *dst, const float *o, float m, float l) {
    memcpy(dst, o, 4 * (size_t)w->p->v_head_dim);
    dst[w->p->v_head_dim] = m;
    dst[w->p->v_head_dim + 1] = l;
}

ATTNI_CALLED void attni_sums(attni_work *w, const attn_task *t, int32_t span, uint32_t tiles,
                       float *partials) {
    const attn_segment *g = &w->p->segment[t->segment];
    int per_span = g->n_slots > 1, rb = w->x.rb, n, i, spoiled = 0;
    int32_t r;
    attni_run run[ATTNI_TILES];
    attni_pv_fn pv = attni_prepare_v(w, w->vrow, tiles);
    if (w->x.pv_kind == ATTNI_BDOT) w->vrow[0] = w->vf;
    for (r = 0; r < w->n_rows; r += rb) {
        int nr = attni_min32(rb, w->n_rows - r);
        n = attni_runs_of(w->tiles[r / rb], run);
        if (spoiled) { // an earlier row's second try used the shared V buffer
            attni_load_span(w, span, tiles);
            pv = attni_prepare_v(w, w->vrow, tiles);
            if (w->x.pv_kind == ATTNI_BDOT) w->vrow[0] = w->vf;
            spoiled = 0;
        }
        if (n)
            pv(w->x.pv_kind == ATTNI_BDOT ? (const void *)(w->p16 + (int64_t)r * ATTN_SPAN)
                                          : (const void *)(w->s + (int64_t)r * ATTN_SPAN),
               nr, w->vrow, run, n, w->vdp, w->os, w->vdp);
        if (n && w->x.mv->special(w->os, (int64_t)nr * w->vdp))
            for (i = 0, spoiled = 1; i < nr; i++)
                attni_row_again(w, span, r + i, w->tiles[r / rb], w->os + (int64_t)i * w->vdp);
        for (i = 0; i < nr; i++) {
            float *os = w->os + (int64_t)i * w->vdp, m = w->sm[r + i], l = w->sl[r + i];
            if (per_span)
                attni_put_partial(w, attni_partial(w, g, t, partials, span - g->span0, r + i), os,
                                  m, l);
            else
                w->x.ma->fold(w->o + (int64_t)(r + i) * w->vdp, &w->m[r + i], &w->l[r + i], os, m,
                              l, w->vdp);
        }
    }
}

// ---- results

// Normalises one row and writes O and LSE. o: padded to 16, spoiled.
ATTNI_CALLED void attni_write_row(const attn_desc *d, const attni_exec *x, int32_t token,
                                  int32_t head, float *o, float m, float l) {
    int32_t vd = attni_v_dim(d);
    int64_t st = d->o.stride_token ? d->o.stride_token : (int64_t)d->n_heads * vd;
    int64_t sh = d->o.stride_head ? d->o.stride_head : vd;
    float sink = d->logits.sink ? d->logits.sink[head] : attni_float(0xff800000u);
    uint8_t *dst =
        (uint8_t *)d->o.data + (token * st + head * sh) * (attni_bits_of(d->o.dtype) / 8);
    x->ma->finish(o, &m, &l, sink, (vd + 15) & ~15);
    x->mv->narrow(d->o.dtype, o, vd, dst);
    if (!d->lse) return;
    if (!attni_finite(l)) m = attni_float(0x7fc00000u);
    else if (attni_finite(m)) m = (float)((double)m + attni_ln((double)l));
    d->lse[(int64_t)token * d->n_heads + head] = m;
}

ATTNI_CALLED attn_result attni_run_task(attni_work *w, const attn_task *t, float *partials) {
    const attn_segment *g = &w->p->segment[t->segment];
    attn_result r = attni_load_rows(w, t);
    int32_t span, i;
    int64_t p0 = INT64_MAX, p1 = 0, b0;
    const attn_mask *m = &w->d->mask;
    if (r != ATTN_OK) return r;
    for (i = 0; i < w->n_tokens; i++) { // token-tree slots reach up to the last query's
        const attn_plan_seq *q = &w->p->seq[w->seq[i]];
        p0 = attni_min64(p0, w->pos[i]);
        p1 = attni_max64(p1, (int64_t)q->q_pos0 + (w->tok[i] - q->q_begin));
    }
    for (span = g->span0; span < g->span1; span++) {
        uint16_t tiles = 0;
        b0 = (int64_t)span * ATTN_SPAN;
        if (!(m->kind != ATTN_MASK_FULL &&
              b0 > p1) && // closed-form skips before looking at any row
            !(m->window_left && b0 + ATTN_SPAN <= p0 - (m->window_left - 1) && b0 >= m->n_sink))
            tiles = attni_span_masks(w, span);
        if (tiles) {
            if ((r = attni_load_span(w, span, tiles)) != ATTN_OK) return r;
            attni_scores(w, tiles);
            attni_weights(w, span);
            attni_sums(w, t, span, tiles, partials);
        } else if (g->n_slots > 1) {
            for (i = 0; i < w->n_rows; i++)
                attni_partial(w, g, t, partials, span - g->span0, i)[w->p->v_head_dim] =
                    attni_float(0xff800000u);
        }
    }
    for (i = 0; i < w->n_rows && g->n_slots <= 1; i++) {
        float *o = w->o + (int64_t)i * w->vdp;
        int32_t head = w->kv_head * w->group + i / w->n_tokens;
        if (g->n_slots == 1)
            attni_put_partial(w, attni_partial(w, g, t, partials, 0, i), o, w->m[i], w->l[i]);
        else attni_write_row(w->d, &w->x, w->tok[i % w->n_tokens], head, o, w->m[i], w->l[i]);
    }
    return ATTN_OK;
}

// ==== >>impl-run  ================================================================================

ATTN_DEF void attn_cpu_plan_params(const attn_desc *d, int32_t workers, attn_plan_params *out) {
    int64_t rows, spans = 0, bytes, cap = (int64_t)64 << 20;
    int32_t s;
    if (!out) return;
    memset(out, 0, sizeof *out);
    out->workers = workers > 0 ? workers : 1;
    out->row_tile = 256;
    if (!d || !d->q_start || !d->kv.kv_len || d->n_heads < 1) return;
    for (s = 0; s < d->n_seq; s++)
        spans = attni_max64(spans, (int64_t)d->kv.kv_len[s] / ATTN_SPAN + 3);
    rows = (int64_t)d->q_start[d->n_seq] * d->n_heads;
    bytes = attni_v_dim(d) + 2;
    bytes = rows > cap / (4 * bytes * spans) ? cap : rows * spans * bytes * 4;
    out->partial_bytes = (size_t)bytes;
}

ATTN_DEF attn_result attn_cpu_run(const attn_desc *d, const attn_plan *p, int32_t first,
                                  int32_t count, void *partials, void *scratch) {
    attni_work w;
    attn_result r = attni_work_init(&w, d, p);
    int32_t i, tile;
    if (r != ATTN_OK) return r;
    if (first < 0 || count < 0 || count > p->n_tasks - first) return ATTN_ERR_ARGUMENT;
    if (!scratch || (uintptr_t)scratch % 64 || (p->partial_rows && !partials))
        return ATTN_ERR_BUFFER;
    tile = attni_max32(1, (p->params.row_tile > 0 ? p->params.row_tile : 256) / w.group);
    attni_work_carve(&w, (uint8_t *)scratch, tile, tile * w.group);
    ATTNI_AMX_BEGIN(&w.x);
    for (i = first; i < first + count && r == ATTN_OK; i++)
        r = attni_run_task(&w, &p->task[i], (float *)partials);
    ATTNI_AMX_END(&w.x);
    return r;
}

ATTNI_CALLED void attni_merge_sequence(attni_work *w, int32_t s, const float *partials) {
    const attn_plan *p = w->p;
    const attn_plan_seq *q = &p->seq[s];
    int32_t t, h, c, i, slot, vd = p->v_head_dim;
    float o[ATTN_MAX_HEAD_DIM + 16], x[ATTN_MAX_HEAD_DIM + 16], m, l;
    memset(x, 0, sizeof x);
    for (t = 0; t < q->q_len; t++)
        for (h = 0; h < p->n_heads; h++) {
            m = attni_float(0xff800000u);
            l = 0;
            for (c = 0; c < q->n_chain; c++) { // left fold from the first token on
                const attn_segment *g = &p->segment[p->chain[q->chain + c]];
                int64_t before = 0;
                for (i = g->seq0; i < q->place; i++) before += p->seq[p->order[i]].q_len;
                for (slot = 0; slot < g->n_slots; slot++) {
                    int64_t row =
                        g->partial + ((int64_t)slot * g->n_tokens + before + t) * p->n_heads + h;
                    const float *src = partials + row * (vd + 2);
                    if (src[vd] == attni_float(0xff800000u)) continue;
                    memcpy(x, src, 4 * (size_t)vd);
                    w->x.ma->fold(o, &m, &l, x, src[vd], src[vd + 1], w->vdp);
                }
            }
            attni_write_row(w->d, &w->x, q->q_begin + t, h, o, m, l);
        }
}

ATTN_DEF attn_result attn_cpu_merge(const attn_desc *d, const attn_plan *p, int32_t first,
                                    int32_t count, const void *partials) {
    attni_work w;
    attn_result r = attni_work_init(&w, d, p);
    int32_t i;
    if (r != ATTN_OK) return r;
    if (first < 0 || count < 0 || count > p->n_merges - first) return ATTN_ERR_ARGUMENT;
    if (count && !partials) return ATTN_ERR_BUFFER;
    for (i = first; i < first + count; i++)
        attni_merge_sequence(&w, p->merge[i], (const float *)partials);
    return ATTN_OK;
}

// One caller's block: [plan][partials][scratch per thread].
typedef struct attni_forward {
    attn_plan_params params;
    size_t plan_bytes, partial_bytes, scratch_bytes, bytes;
} attni_forward;

ATTNI_CALLED int attni_forward_layout(const attn_desc *d, int32_t n_threads, attni_forward *f) {
    attn_plan fake;
    memset(&fake, 0, sizeof fake);
    if (!d || n_threads < 1 || n_threads > 4096) return 0;
    attn_cpu_plan_params(d, n_threads, &f->params);
    f->plan_bytes = (attn_plan_bytes(d, &f->params) + 63) & ~(size_t)63;
    if (!f->plan_bytes) return 0;
    fake.params = f->params;
    f->partial_bytes = (f->params.partial_bytes + 63) & ~(size_t)63;
    f->scratch_bytes = (attn_cpu_scratch_bytes(d, &fake) + 63) & ~(size_t)63;
    f->bytes = f->plan_bytes + f->partial_bytes + f->scratch_bytes * (size_t)n_threads + 64;
    return 1;
}

ATTN_DEF size_t attn_cpu_forward_bytes(const attn_desc *d, int32_t n_threads) {
    attni_forward f;
    if (!d || attn_validate(d) != ATTN_OK) return 0;
    return attni_forward_layout(d, n_threads, &f) ? f.bytes : 0;
}

ATTN_DEF attn_result attn_cpu_forward(const attn_desc *d, void *mem, size_t bytes,
                                      int32_t n_threads) {
    attni_forward f;
    attn_plan *p = NULL;
    uint8_t *at = (uint8_t *)(((uintptr_t)mem + 63) & ~(uintptr_t)63);
    void *partials;
    int32_t i;
    int bad = ATTN_OK;
    attn_result r = attn_validate(d);
    if (r != ATTN_OK) return r;
    if (!attni_forward_layout(d, n_threads, &f)) return ATTN_ERR_ARGUMENT;
    if (!mem || bytes < f.bytes) return ATTN_ERR_BUFFER;
    if ((r = attn_plan_build(d, &f.params, at, f.plan_bytes, &p)) != ATTN_OK) return r;
    partials = at + f.plan_bytes;
    at += f.plan_bytes + f.partial_bytes;
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads)
#endif
    {
        uint8_t *scratch = at;
#ifdef _OPENMP
        scratch += f.scratch_bytes * (size_t)omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
#endif
        for (i = 0; i < p->n_tasks; i++) {
            attn_result e = attn_cpu_run(d, p, i, 1, partials, scratch);
            if (e != ATTN_OK) ATTNI_SET(bad, (int)e);
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (i = 0; i < p->n_merges; i++) {
            attn_result e = attn_cpu_merge(d, p, i, 1, partials);
            if (e != ATTN_OK) ATTNI_SET(bad, (int)e);
        }
    }
    return (attn_result)bad;
}

#undef ATTNI_AMX_BEGIN
#undef ATTNI_AMX_END
#undef ATTNI_ARM
#undef ATTNI_ARM_DOTS
#undef ATTNI_CALLED
#undef ATTNI_CPU_OPEN
#undef ATTNI_EACH
#undef ATTNI_F2
#undef ATTNI_F5
#undef ATTNI_GET
#undef ATTNI_INLINE
#undef ATTNI_NAMES
#undef ATTNI_PIN
#undef ATTNI_PREFETCH
#undef ATTNI_Q
#undef ATTNI_SET
#undef ATTNI_T2
#undef ATTNI_T5
#undef ATTNI_T6
#undef ATTNI_TA
#undef ATTNI_TD
#undef ATTNI_TILE_FENCE
#undef ATTNI_UNROLL
#undef ATTNI_X86
#undef attni_math_fast_scalar

#endif // ATTNI_CPU_IMPLEMENTED
#endif // implementation
#endif // not a kernel pass

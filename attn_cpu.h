/* attn_cpu.h - v0.1 - MIT licence, see the end of attn.h
   CPU executors for attn.h: scalar, AVX2, AVX-512, AVX-512-BF16 (+VNNI), AMX-BF16, NEON, NEON-BF16,
   chosen at run time in one translation unit that needs no -m flags; WebAssembly SIMD128 where the
   build has -msimd128.

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
   a frame budget:       params.max_task_cost = wait / seconds_per_cost;     no task is longer
       while (i < plan->n_tasks && now() + plan->task[i].cost * seconds_per_cost < deadline)
           attn_cpu_run(&d, plan, i++, 1, partials, scratch);                on in a later frame

   CONTENTS  >>isa  >>store  >>run  >>select   and behind  >>impl-:
             kernels, types, scalar, avx2, avx512, dots, neon, wasm, dispatch, store, tasks,
             run, scan, flex, hip, exact, select

   MACROS    ATTN_CPU_IMPLEMENTATION   implement this header
             ATTN_CPU_SCALAR_ONLY      leave the SIMD executors out (bring-up on odd toolchains)

   MEMORY    Plans, scratch and partials: 64-byte aligned, the caller's. Nothing is allocated.
             Optimised builds take at most 16 KiB of stack (48 with ATTN_CHECK).
   THREADS   attn_cpu_run and attn_cpu_merge may run on any threads at once, each with its own
             scratch, on disjoint tasks. What was learnt about the CPU is the only state, atomic.
   NUMERICS  FAST: FMA in f32; where Q, K and O are bf16 the scores, and where V and O are bf16
             the weighted sums, use the bf16 dot product of AVX-512-BF16, AMX or NEON-BF16.
             PORTABLE: separate multiply and add, the same bits on every ISA, whatever the flags of
             gcc and clang (-Ofast included) and the host's floating-point mode.
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
    X(AVX512_BF16, 4, "avx512bf16") /* AUTO: where the bf16 dot is faster than FMA (AMD) */        \
    X(AMX, 5, "amx")               /* + attn_cpu_open */                                           \
    X(NEON, 6, "neon")                                                                             \
    X(NEON_BF16, 7, "neonbf16")    /* + BF16 and DotProd */                                        \
    X(WASM, 8, "wasm")             /* SIMD128; it has no FMA, so FAST is PORTABLE */

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
// ATTN_OK for every valid problem: on the CPU no combination is unsupported, but block lists in a
// device's memory are.
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

// Carries out plan->merge[first ..]: folds partials and writes their rows of O. After all tasks
// have run.
ATTN_DEF attn_result attn_cpu_merge(const attn_desc *d, const attn_plan *p, int32_t first,
                                    int32_t count, const void *partials);

// Plan, tasks and merge in one call, in parallel when compiled with OpenMP (else n_threads is only
// a hint to the planner). mem: attn_cpu_forward_bytes (0 when d is invalid), any alignment.
ATTN_DEF size_t attn_cpu_forward_bytes(const attn_desc *d, int32_t n_threads);
ATTN_DEF attn_result attn_cpu_forward(const attn_desc *d, void *mem, size_t bytes,
                                      int32_t n_threads);

// ==== >>select  Block lists from Q and K =========================================================

// Work of a select call, cut into units that any threads may take (0 when s or d is invalid), and
// the scratch of one thread.
ATTN_DEF int64_t attn_cpu_select_units(const attn_desc *d, const attn_select *s);
ATTN_DEF size_t attn_cpu_select_scratch_bytes(const attn_desc *d, const attn_select *s);

// Selects for units [first, first + count) of d, whose K is stored already: writes x's rows of
// these. y: for EXACT, or NULL: bounds are not used, every key is scored. scratch: 64-byte aligned,
// this thread's own. d's mask may or may not hold x's terms. ERR_BUFFER: attn_selection_follow was
// not called for d; ERR_PAGE.
ATTN_DEF attn_result attn_cpu_select(const attn_desc *d, const attn_select *s,
                                     const attn_summary *y, const attn_selection *x,
                                     int64_t first, int64_t count, void *scratch);

// A sequence moved into a slot: its first step selects anew.
ATTN_DEF void attn_cpu_select_forget(const attn_selection *x, int32_t slot);

// Brings summaries up to date after the store of d's new tokens: units as of threads' choice, one a
// page that holds a query token, any order.
ATTN_DEF size_t attn_summary_bytes(const attn_desc *d);
ATTN_DEF int64_t attn_cpu_summarize_units(const attn_desc *d);
ATTN_DEF attn_result attn_cpu_summarize(const attn_desc *d, const attn_summary *y, int64_t first,
                                        int64_t count);

#endif // ATTN_CPU_H

// ==== Stop here if you only want the API. ========================================================

#ifdef ATTNI_KERNEL_PASS
// ==== >>impl-kernels  Written once, included again by this file for every ISA and numerics =======
//
// ATTNI_I(f): vocabulary function f of this pass's ISA. ATTNI_K(f): the kernel's own name.
// ATTNI_NR x ATTNI_NT: register block, rows x (16-lane vectors); up to 4 rows: x ATTNI_NC.
// ATTNI_DIRECT: has kernels for few rows that read f16, bf16 and int8 (2: every dtype) without
// converting it first, in blocks of ATTNI_WR x ATTNI_WC. ATTNI_OWN: brings its own loads of f16 and
// int8 (2: of every dtype).

#define V ATTNI_I(V)
#define U ATTNI_I(U)

// Register blocks of tall (1, 4, 6, 8 or 12), 4 or 1 rows. Buffers have spare rows behind the last,
// so that a block may be taller than what is left.
#define ATTNI_STEP(left, tall)                                                                     \
    ((tall) == 1 || (left) >= ((tall) > 8 ? 9 : 5) ? (tall) : (left) >= 2 ? 4 : 1)
#define ATTNI_ARGS(...) __VA_ARGS__
#define ATTNI_CALL(f, args, nr, nc) ATTNI_CALL2(f, ATTNI_ARGS args nr, nc)
#define ATTNI_CALL2(f, ...) f(__VA_ARGS__)
// A block of each shape as a function of its own, so that its loop gets all the registers.
#define ATTNI_SHAPES(ns, f, params, args, tall, tall_nc)                                           \
    ATTNI_TGT ATTNI_CALLED void ns(f##_1) params { ATTNI_CALL(ns(f), args, 1, ATTNI_NC); }         \
    ATTNI_TALLER(ns, f, params, args, tall, tall_nc)
#define ATTNI_FEW_SHAPES(ns, f, params, args, tall, tall_nc)                                       \
    ATTNI_TALLER(ns, f, params, args, tall, tall_nc)
// The fitting block, with `at` from where it is to below end, by columns of vectors * unit.
#if ATTNI_NR > 1
#define ATTNI_TALLER(ns, f, params, args, tall, tall_nc)                                           \
    ATTNI_TGT ATTNI_CALLED void ns(f##_4) params { ATTNI_CALL(ns(f), args, 4, ATTNI_NC); }         \
    ATTNI_TGT ATTNI_CALLED void ns(f##_tall) params { ATTNI_CALL(ns(f), args, tall, tall_nc); }
#define ATTNI_ROWS(ns, f, args, step, tall_nc, at, end, unit)                                      \
    for (; at < (end); at += (step > 4 ? tall_nc : ATTNI_NC) * (unit)) {                           \
        if (step == 1) ns(f##_1) args;                                                             \
        else if (step == 4) ns(f##_4) args;                                                        \
        else ns(f##_tall) args;                                                                    \
    }
#define ATTNI_FEW_ROWS(ns, f, args, step, tall_nc, at, end, unit)                                  \
    for (; at < (end); at += (step > 4 ? tall_nc : ATTNI_NC) * (unit)) {                           \
        if (step <= 4) ns(f##_4) args;                                                             \
        else ns(f##_tall) args;                                                                    \
    }
#else
#define ATTNI_TALLER(ns, f, params, args, tall, tall_nc)
#define ATTNI_ROWS(ns, f, args, step, tall_nc, at, end, unit)                                      \
    for (; at < (end); at += ATTNI_NC * (unit)) ns(f##_1) args;
#endif

#define ATTNI_QK_PARAMS(type)                                                                      \
    (const type *q, int64_t ldq, const uint32_t *const *kt, const uint8_t *const *ahead,           \
     int64_t look, const uint8_t *col, int units, float *s)
#define ATTNI_QK_ARGS (q, ldq, kt, ahead, look, col, units, s, )

#if ATTNI_KERNEL_PASS == 1 // ---- moves: no rounding arithmetic, so one copy per ISA

#define ATTNI_VIA(name, type, call)                                                                \
    ATTNI_HELPER ATTNI_TGT V ATTNI_I(name)type { return call; }
#if ATTNI_OWN < 1 // what some ISAs do better
ATTNI_VIA(load_f16, (const uint8_t *p), ATTNI_I(uhalf)(ATTNI_I(uload16)(p)))
ATTNI_VIA(load_i8, (const uint8_t *p), ATTNI_I(utop)(ATTNI_I(ushl)(ATTNI_I(uload8)(p), 24), 8))
#endif
#if ATTNI_OWN < 2
// Codes in the low byte of each lane -> values.
ATTNI_HELPER ATTNI_TGT V ATTNI_I(e5m2)(U x) { return ATTNI_I(uhalf)(ATTNI_I(ushl)(x, 8)); }
ATTNI_HELPER ATTNI_TGT V ATTNI_I(e4m3)(U x) {
    // the same fields in an f16 mean 2^-8 times the value; 0x7f is NaN
    U low = ATTNI_I(uand)(x, 127);
    U h = ATTNI_I(uor)(ATTNI_I(ushl)(low, 7), ATTNI_I(ushl)(ATTNI_I(uand)(x, 128), 8));
    V v = ATTNI_I(mul)(ATTNI_I(uhalf)(h), ATTNI_I(set1)(256.0f));
    return ATTNI_I(uequal)(low, ATTNI_I(uset1)(127), ATTNI_I(asv)(ATTNI_I(uset1)(0x7fc00000u)), v);
}
ATTNI_VIA(uhalfat, (U x, int i), ATTNI_I(uhalf)(i ? ATTNI_I(ushr)(x, 16) : x))
ATTNI_VIA(e4m3at, (U x, int i), ATTNI_I(e4m3)(ATTNI_I(ushr)(x, 8 * i)))
ATTNI_VIA(e5m2at, (U x, int i), ATTNI_I(e5m2)(ATTNI_I(ushr)(x, 8 * i)))
ATTNI_VIA(nibble, (U x, int n), ATTNI_I(utop)(ATTNI_I(ushl)(x, 28 - n), 4))
ATTNI_VIA(load_e4m3, (const uint8_t *p), ATTNI_I(e4m3)(ATTNI_I(uload8)(p)))
ATTNI_VIA(load_e5m2, (const uint8_t *p), ATTNI_I(e5m2)(ATTNI_I(uload8)(p)))
#endif
#undef ATTNI_VIA

// Element i of the 32 / bits elements in each lane's 4-byte unit.
ATTNI_HELPER ATTNI_TGT V ATTNI_I(element)(attn_dtype t, U x, int i) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    // a unit is loaded whole: its first byte is the highest, a byte's first nibble the low one
    i ^= t == ATTN_F32 ? 0 : t == ATTN_F16 || t == ATTN_BF16 ? 1 : t == ATTN_I4 ? 6 : 3;
#endif
    switch (t) {
    case ATTN_F16: return ATTNI_I(uhalfat)(x, i);
    case ATTN_BF16: return ATTNI_I(asv)(i ? ATTNI_I(uand)(x, 0xffff0000u) : ATTNI_I(ushl)(x, 16));
    case ATTN_F8E4M3: return ATTNI_I(e4m3at)(x, i);
    case ATTN_F8E5M2: return ATTNI_I(e5m2at)(x, i);
    case ATTN_I8: return ATTNI_I(utop)(ATTNI_I(ushl)(x, 24 - 8 * i), 8);
    case ATTN_I4: return ATTNI_I(nibble)(x, 4 * i);
    default: return ATTNI_I(asv)(x);
    }
}

// 16 elements of a row.
ATTNI_HELPER ATTNI_TGT V ATTNI_I(row16)(attn_dtype t, const uint8_t *p) {
    switch (t) {
    case ATTN_F16: return ATTNI_I(load_f16)(p);
    case ATTN_BF16: return ATTNI_I(asv)(ATTNI_I(ushl)(ATTNI_I(uload16)(p), 16));
    case ATTN_F8E4M3: return ATTNI_I(load_e4m3)(p);
    case ATTN_F8E5M2: return ATTNI_I(load_e5m2)(p);
    case ATTN_I8: return ATTNI_I(load_i8)(p);
    case ATTN_I4: return ATTNI_I(nibble)(ATTNI_I(uload4)(p), 0);
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

#if ATTNI_OWN < 2
// To bf16, round to nearest even, NaN stays NaN.
ATTNI_HELPER ATTNI_TGT void ATTNI_I(store_bf16)(uint16_t *p, V x) {
    U u = ATTNI_I(asu)(x), odd = ATTNI_I(uand)(ATTNI_I(ushr)(u, 16), 1);
    U r = ATTNI_I(uadd)(u, ATTNI_I(uadd)(odd, ATTNI_I(uset1)(0x7fff)));
    // NaN: not (|x| <= inf), seen as |x| - inf > 0 on the bits
    U a = ATTNI_I(uand)(u, 0x7fffffffu);
    U nan = ATTNI_I(ushr)(ATTNI_I(uadd)(a, ATTNI_I(uset1)(0x007fffffu)), 31);
    V v =
        ATTNI_I(uequal)(nan, ATTNI_I(uset1)(1),
                        ATTNI_I(asv)(ATTNI_I(uor)(u, ATTNI_I(uset1)(0x400000u))), ATTNI_I(asv)(r));
    ATTNI_I(ustore16)(p, ATTNI_I(ushr)(ATTNI_I(asu)(v), 16));
}
ATTNI_HELPER ATTNI_TGT void ATTNI_I(store_bf16_two)(uint16_t *p, V x, V y) {
    ATTNI_I(store_bf16)(p, x);
    ATTNI_I(store_bf16)(p + 16, y);
}
#endif

ATTNI_TGT static void ATTNI_I(narrow)(attn_dtype t, const float *src, int n, void *dst) {
    uint8_t *p = (uint8_t *)dst;
    int i = 0;
    if (t == ATTN_F16)
        for (; i + 16 <= n; i += 16) ATTNI_I(store_f16)(p + 2 * i, ATTNI_I(load)(src + i));
    else if (t == ATTN_BF16)
        for (; i + 16 <= n; i += 16)
            ATTNI_I(store_bf16)((uint16_t *)(void *)p + i, ATTNI_I(load)(src + i));
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

// A row of int8 codes for the integer dot: [scale f32][correction i32][codes]. n: multiple of 8,
// with zeros up to a multiple of 16.
ATTNI_TGT static void ATTNI_I(codes)(const float *q, int n, uint8_t *out) {
    V top = ATTNI_I(set1)(0);
    U nan = ATTNI_I(uset1)(0);
    uint32_t b[16];
    float scale, inv;
    int i, e, sum = 0;
    for (e = 0; e < n; e += 16) { // NaN: |x| is above infinity, and the carry shows in the sign bit
        U a = ATTNI_I(uand)(ATTNI_I(uload)(q + e), 0x7fffffffu);
        top = ATTNI_I(max)(ATTNI_I(asv)(a), top);
        nan = ATTNI_I(uor)(nan, ATTNI_I(uadd)(a, ATTNI_I(uset1)(0x007fffffu)));
    }
    memcpy(b, &nan, 64);
    for (i = 1; i < 16; i++) b[0] |= b[i];
    scale = b[0] >> 31 ? attni_float(0x7fc00000u) : ATTNI_I(hmax)(top) / 127.0f;
    inv = scale > 0 ? 1.0f / scale : 0.0f;
    for (e = 0; e < n; e += 16) { // the low byte of x + 1.5 * 2^23 is round(x), |x| <= 127.0001
        V x = ATTNI_I(mul)(ATTNI_I(load)(q + e), ATTNI_I(set1)(inv));
        x = ATTNI_I(add)(x, ATTNI_I(set1)(12582912.0f));
        memcpy(b, &x, 64);
        for (i = 0; i < 16; i++) {
            out[8 + e + i] = (uint8_t)b[i];
            sum += (int8_t)(uint8_t)b[i];
        }
    }
    sum *= -128;
    memcpy(out, &scale, 4);
    memcpy(out + 4, &sum, 4);
}

// Rows t, t + 1 of 16-bit values side by side: out[t / 2][n] of (even, odd) pairs, for the bf16
// dot.
ATTNI_TGT static void ATTNI_I(pairs)(const void *const *row, const attni_run *run, int n_runs,
                                     int n, int ldo, const void *const *ahead,
                                     uint32_t *out) {
    int i, t, e;
    for (i = 0; i < n_runs; i++)
        for (t = run[i].t0; t < run[i].t1; t += 2) {
            const uint8_t *a = (const uint8_t *)row[t], *b = (const uint8_t *)row[t + 1];
            uint32_t *o = out + (int64_t)(t / 2) * ldo;
            for (e = 0; e + 16 <= n; e += 16) {
                ATTNI_PREFETCH((const uint8_t *)ahead[t + (e >> 4 & 1)] + (e >> 5) * 64);
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
                                           ATTNI_I(narrow), ATTNI_I(special), ATTNI_I(pairs),
                                           ATTNI_I(codes)};

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
#undef ATTNI_NT
#undef ATTNI_NC
#undef ATTNI_DIRECT
#undef ATTNI_OWN
#undef ATTNI_WR
#undef ATTNI_WC
#undef ATTNI_HELPER

#elif ATTNI_KERNEL_PASS == 2 // ---- math: one copy per ISA and numerics

#if ATTNI_PORTABLE
#define ATTNI_MADD(a, b, c) ATTNI_I(add)(ATTNI_I(mul)(a, b), c)
#else
#define ATTNI_MADD(a, b, c) ATTNI_I(fma)(a, b, c)
#endif

// Scores: c[r][j] is one multiply-add chain over d, lanes are the 16 tokens of tile j. Bits depend
// on nothing else, so any register block gives the same. Each unit of K is P elements; S units a
// turn. ahead[j]: what will be read next from memory, look bytes per unit, asked for meanwhile.
#define ATTNI_QK(FEW, name, T, P, S, TALL, TALL_NC)                                                \
    ATTNI_INLINE ATTNI_TGT void ATTNI_K(name##_block)(                                             \
        const float *q, int64_t ldq, const uint32_t *const *kt, const uint8_t *const *ahead,       \
        int64_t look, const uint8_t *col, int units, float *s, const int nr, const int nc) {       \
        V c[TALL][ATTNI_NC], b[ATTNI_NC], a;                                                       \
        U raw[ATTNI_NC];                                                                           \
        const uint32_t *k[ATTNI_NC];                                                               \
        const uint8_t *next[ATTNI_NC];                                                             \
        const float *q3 = q + 3 * ldq, *q6 = q3 + 3 * ldq, *q9 = q6 + 3 * ldq;                     \
        int r, j, i, u, v;                                                                         \
        ATTNI_HIDE(q3);                                                                            \
        ATTNI_HIDE(q6);                                                                            \
        ATTNI_HIDE(q9);                                                                            \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] =      \
            ATTNI_I(set1)(0);                                                                      \
        ATTNI_UNROLL for (j = 0; j < nc; j++) k[j] = kt[j], next[j] = ahead[j];                    \
        for (u = 0; u < units; u += S)                                                             \
            ATTNI_UNROLL for (v = 0; v < S; v++) {                                                 \
                ATTNI_UNROLL for (j = 0; j < nc; j++) raw[j] =                                     \
                    ATTNI_I(uload)(k[j] + 16 * (u + v));                                           \
                ATTNI_UNROLL for (j = 0; j < nc; j++) ATTNI_PREFETCH(next[j] + look * (u + v));    \
                ATTNI_UNROLL for (i = 0; i < P; i++) {                                             \
                    ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] = ATTNI_I(element)(T, raw[j], i);   \
                    ATTNI_UNROLL for (r = 0; r < nr; r++) {                                        \
                        const float *x = (r < 3 ? q : r < 6 ? q3 : r < 9 ? q6 : q9) + r % 3 * ldq; \
                        a = ATTNI_I(set1)(x[(u + v) * P + i]);                                     \
                        ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] =                            \
                            ATTNI_MADD(a, b[j], c[r][j]);                                          \
                    }                                                                              \
                }                                                                                  \
            }                                                                                      \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++)                \
            ATTNI_I(store)(s + r * ATTNI_LDS + 16 * col[j], c[r][j]);                              \
    }                                                                                              \
    ATTNI_##FEW##SHAPES(ATTNI_K, name##_block, ATTNI_QK_PARAMS(float), ATTNI_QK_ARGS, TALL,        \
                        TALL_NC)                                                                   \
    ATTNI_TGT static void ATTNI_K(name)(const void *qv, int64_t ldq, int nr,                       \
                                        const uint32_t *const *kt, const uint8_t *const *ahead,    \
                                        int look, const uint8_t *col, int nt, int units,           \
                                        float *s) {                                                \
        const float *q = (const float *)qv;                                                        \
        int r, j, step;                                                                            \
        for (r = 0; r < nr; r += step) {                                                           \
            const float *qr = q + r * ldq;                                                         \
            float *sr = s + r * ATTNI_LDS;                                                         \
            step = ATTNI_STEP(nr - r, TALL);                                                       \
            j = 0;                                                                                 \
            ATTNI_##FEW##ROWS(ATTNI_K, name##_block,                                               \
                              (qr, ldq, kt + j, ahead + j, look, col + j, units, sr), step,        \
                              TALL_NC, j, nt, 1)                                                   \
        }                                                                                          \
    }

ATTNI_QK(, qk_f32, ATTN_F32, 1, 1, ATTNI_NR, ATTNI_NT)
#if ATTNI_DIRECT && !ATTNI_PORTABLE
ATTNI_QK(FEW_, qk_f16, ATTN_F16, 2, 2, ATTNI_WR, ATTNI_WC)
ATTNI_QK(FEW_, qk_bf16, ATTN_BF16, 2, 2, ATTNI_WR, ATTNI_WC)
ATTNI_QK(FEW_, qk_i8, ATTN_I8, 4, 1, ATTNI_WR, ATTNI_WC)
#if ATTNI_DIRECT > 1
ATTNI_QK(FEW_, qk_e4m3, ATTN_F8E4M3, 4, 1, ATTNI_WR, ATTNI_WC)
ATTNI_QK(FEW_, qk_e5m2, ATTN_F8E5M2, 4, 1, ATTNI_WR, ATTNI_WC)
ATTNI_QK(FEW_, qk_i4, ATTN_I4, 8, 1, ATTNI_WR, ATTNI_WC)
#endif
#endif

// Weighted sums: o[r][e] is one chain over the tokens of the span, lanes are d. The last block of
// columns overlaps the one before (the same bits again); fewer than a block go one vector at a
// time. more: the chain goes on from o (vd is a multiple of 64 then). ahead[t]: what is asked for
// meanwhile, from memory or, when V is kept for many rows, from the second-level cache.
#define ATTNI_PV(FEW, name, T, BITS, TALL, TALL_NC)                                                \
    ATTNI_INLINE ATTNI_TGT void ATTNI_K(name##_block)(                                             \
        const float *p, const void *const *row, const void *const *ahead, const attni_run *run,    \
        int n, int e, int more, float *o, int64_t ldo, const int nr, const int nc) {               \
        V c[TALL][ATTNI_NC], b[ATTNI_NC], a;                                                       \
        int r, j, i;                                                                               \
        int64_t at = (int64_t)e * (BITS) / 8;                                                      \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] =      \
            more ? ATTNI_I(load)(o + r * ldo + e + 16 * j) : ATTNI_I(set1)(0);                     \
        for (i = 0; i < n; i++) {                                                                  \
            const void *const *rows = row + run[i].t0, *const *end = row + run[i].t1;              \
            const void *const *next = ahead + run[i].t0;                                           \
            const float *x = p + run[i].t0;                                                        \
            for (; rows != end; rows++, next++, x++) {                                             \
                const uint8_t *v = (const uint8_t *)*rows + at;                                    \
                const uint8_t *look = (const uint8_t *)*next + at;                                 \
                ATTNI_HIDE(v);                                                                     \
                ATTNI_HIDE(look);                                                                  \
                ATTNI_UNROLL for (j = 0; j < (nc * (BITS) + 31) / 32; j++)                         \
                    ATTNI_PREFETCH(look + 64 * j);                                                 \
                ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] =                                       \
                    ATTNI_I(row16)(T, v + 2 * (BITS) * j);                                         \
                ATTNI_UNROLL for (r = 0; r < nr; r++) {                                            \
                    a = ATTNI_I(set1)(x[r * ATTNI_LDS]);                                           \
                    ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_MADD(a, b[j], c[r][j]);  \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        ATTNI_UNROLL for (r = 0; r < nr; r++) ATTNI_UNROLL for (j = 0; j < nc; j++)                \
            ATTNI_I(store)(o + r * ldo + e + 16 * j, c[r][j]);                                     \
    }                                                                                              \
    ATTNI_##FEW##SHAPES(ATTNI_K, name##_block,                                                     \
                 (const float *p, const void *const *row, const void *const *ahead,                \
                  const attni_run *run, int n, int e, int more, float *o, int64_t ldo),            \
                 (p, row, ahead, run, n, e, more, o, ldo, ), TALL, TALL_NC)                        \
    ATTNI_TGT static void ATTNI_K(name)(const void *pv, int nr, const void *const *row,            \
                                        const void *const *ahead, const attni_run *run, int n,     \
                                        int more, int vd, float *o, int64_t ldo) {                 \
        const float *p = (const float *)pv;                                                        \
        const int wide = nr > ATTNI_FEW ? 16 * TALL_NC : vd;                                       \
        int r, e, e0, i, step, nc;                                                                 \
        for (e0 = 0; e0 < vd; e0 += wide)                                                          \
            for (r = 0; r < nr; r += step) {                                                       \
                const float *pr = p + r * ATTNI_LDS;                                               \
                float *or_ = o + r * ldo;                                                          \
                step = ATTNI_STEP(nr - r, TALL);                                                   \
                nc = 16 * (step > 4 ? TALL_NC : ATTNI_NC);                                         \
                e = e0;                                                                            \
                if (vd >= nc) {                                                                    \
                    if (e0 % nc) continue; /* was done with the columns before */                  \
                    ATTNI_##FEW##ROWS(ATTNI_K, name##_block,                                       \
                                      (pr, row, ahead, run, n, e <= vd - nc ? e : vd - nc, more,   \
                                       or_, ldo),                                                  \
                                      step, TALL_NC, e,                                            \
                                      attni_min32(e0 + (nc > wide ? nc : wide), vd), 16)           \
                } else if (T == ATTN_F32)                                                          \
                    for (; e < vd; e += 16)                                                        \
                        for (i = 0; i < attni_min32(step, nr - r); i++)                            \
                            ATTNI_K(name##_block)                                                  \
                            (pr + i * ATTNI_LDS, row, ahead, run, n, e, more, or_ + i * ldo, ldo,  \
                             1, 1);                                                                \
            }                                                                                      \
    }

ATTNI_PV(, pv_f32, ATTN_F32, 32, ATTNI_NR, ATTNI_NT)
#if ATTNI_DIRECT && !ATTNI_PORTABLE
ATTNI_PV(FEW_, pv_f16, ATTN_F16, 16, ATTNI_WR, ATTNI_WC)
ATTNI_PV(FEW_, pv_bf16, ATTN_BF16, 16, ATTNI_WR, ATTNI_WC)
ATTNI_PV(FEW_, pv_i8, ATTN_I8, 8, ATTNI_WR, ATTNI_WC)
#if ATTNI_DIRECT > 1
ATTNI_PV(FEW_, pv_e4m3, ATTN_F8E4M3, 8, ATTNI_WR, ATTNI_WC)
ATTNI_PV(FEW_, pv_e5m2, ATTN_F8E5M2, 8, ATTNI_WR, ATTNI_WC)
ATTNI_PV(FEW_, pv_i4, ATTN_I4, 4, ATTNI_WR, ATTNI_WC)
#endif
#endif

// 2^y for y <= 0; below 2^-100: 0; NaN stays NaN. 2^f on [-1/2, 1/2] by a degree-6 polynomial
// (relative error 2e-9), times a power of two.
ATTNI_HELPER ATTNI_TGT V ATTNI_K(exp2)(V y) {
    const V magic = ATTNI_I(set1)(12582912.0f); // 1.5 * 2^23: the sum's low bits are round(y)
    V t = ATTNI_I(add)(y, magic);
    V f = ATTNI_I(sub)(y, ATTNI_I(sub)(t, magic));
    V p = ATTNI_I(set1)(1.5345775e-4f);
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(1.3399931e-3f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(9.6184891e-3f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(5.5503286e-2f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(2.4022646e-1f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(6.9314718e-1f));
    p = ATTNI_MADD(p, f, ATTNI_I(set1)(1.0f));
    return ATTNI_I(pow2)(p, y, t);
}

ATTNI_HELPER ATTNI_TGT V ATTNI_K(exp)(V x) { // x <= 0
    return ATTNI_K(exp2)(ATTNI_I(mul)(x, ATTNI_I(set1)(1.44269504f)));
}

// tanh: x + x^3 P(x^2) below 0.625, else 1 - 2 / (e^2|x| + 1) with the sign put back.
ATTNI_HELPER ATTNI_TGT V ATTNI_K(tanh)(V x) {
    U sign = ATTNI_I(uand)(ATTNI_I(asu)(x), 0x80000000u);
    V a = ATTNI_I(asv)(ATTNI_I(uand)(ATTNI_I(asu)(x), 0x7fffffffu)), x2 = ATTNI_I(mul)(a, a), p, e,
      big;
    const V one = ATTNI_I(set1)(1.0f);
    p = ATTNI_I(set1)(-5.6569898e-3f);
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(2.0598676e-2f));
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(-5.3728234e-2f));
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(1.3331318e-1f));
    p = ATTNI_MADD(p, x2, ATTNI_I(set1)(-3.3333278e-1f));
    p = ATTNI_MADD(ATTNI_I(mul)(p, x2), a, a);
    // e^-2a is in (0, 1]: (1 - e) / (1 + e)
    e = ATTNI_K(exp)(ATTNI_I(mul)(a, ATTNI_I(set1)(-2.0f)));
    big = ATTNI_I(div)(ATTNI_I(sub)(one, e), ATTNI_I(add)(one, e));
    p = ATTNI_I(less)(a, ATTNI_I(set1)(0.625f), p, big);
    return ATTNI_I(asv)(ATTNI_I(uor)(ATTNI_I(asu)(p), sign));
}

#if !ATTNI_PORTABLE
// The common case of soft below: nothing but a positive scale. Two passes over all rows, so that
// one row's work hides the other's latency: maxima first.
#define ATTNI_BOTH ATTNI_UNROLL for (j = 0; j < 2; j++)
#define ATTNI_SEEN (all ? 0xffffu : (uint32_t)(bits[(i + j) / 4] >> (16 * ((i + j) % 4))) & 0xffffu)
#define ATTNI_ALL_SEEN ((bits[0] & bits[1] & bits[2] & bits[3]) == ~(uint64_t)0)
ATTNI_HELPER ATTNI_TGT float ATTNI_K(plain_max)(const attni_soft *a, const attni_row *row,
                                                const int all) {
    const uint64_t *bits = row->bits;
    const V ninf = ATTNI_I(barrier)(ATTNI_I(asv)(ATTNI_I(uset1)(0xff800000u)));
    V top[2], x;
    uint32_t seen;
    int i, j;
    ATTNI_BOTH top[j] = ninf;
    for (i = 0; i < 16; i += 2)
        ATTNI_BOTH {
            seen = ATTNI_SEEN;
            if (!seen) continue;
            x = ATTNI_I(load)(row->s + 16 * (i + j));
            if (a->k_scale) {
                x = ATTNI_I(mul)(x, ATTNI_I(load)(a->k_scale + 16 * (i + j)));
                ATTNI_I(store)(row->s + 16 * (i + j), x);
            }
            if (seen != 0xffffu) x = ATTNI_I(pick)(seen, x, ninf);
            top[j] = ATTNI_I(max)(x, top[j]); // NaN is passed over here and shows in the sum
        }
    return ATTNI_I(hmax)(ATTNI_I(max)(top[0], top[1]));
}

// 2^((x - max) * scale * log2 e): the difference is taken first, so that huge scores lose nothing.
ATTNI_HELPER ATTNI_TGT float ATTNI_K(plain_exp)(const attni_soft *a, const attni_row *row,
                                                float max, const int all) {
    const uint64_t *bits = row->bits;
    const V zero = ATTNI_I(set1)(0), c = ATTNI_I(set1)(a->scale * 1.44269504f);
    const V m = ATTNI_I(set1)(max);
    V sum[2], x[2];
    uint32_t seen;
    int i, j;
    ATTNI_BOTH sum[j] = zero;
    for (i = 0; i < 16; i += 2) {
        if (!all && !((row->tiles >> i) & 3)) continue;
        ATTNI_BOTH {
            seen = ATTNI_SEEN;
            x[j] = ATTNI_I(sub)(ATTNI_I(load)(row->s + 16 * (i + j)), m);
            x[j] = ATTNI_K(exp2)(ATTNI_I(mul)(x[j], c));
            if (seen != 0xffffu) x[j] = ATTNI_I(pick)(seen, x[j], zero);
            sum[j] = ATTNI_I(add)(sum[j], x[j]);
            if (a->v_scale) { // that of an unseen token may be anything
                x[j] = ATTNI_I(mul)(x[j], ATTNI_I(load)(a->v_scale + 16 * (i + j)));
                if (seen != 0xffffu) x[j] = ATTNI_I(pick)(seen, x[j], zero);
            }
        }
        if (row->p16) ATTNI_I(store_bf16_two)(row->p16 + 16 * i, x[0], x[1]);
        else ATTNI_BOTH ATTNI_I(store)(row->s + 16 * (i + j), x[j]);
    }
    return ATTNI_I(hsum)(ATTNI_I(add)(sum[0], sum[1]));
}

ATTNI_TGT static void ATTNI_K(soft_plain)(const attni_soft *a, const attni_row *row, int n,
                                          float *m, float *l) {
    float max;
    int i;
    for (i = 0; i < n; i++) {
        const uint64_t *bits = row[i].bits;
        max = ATTNI_ALL_SEEN ? ATTNI_K(plain_max)(a, row + i, 1)
                             : ATTNI_K(plain_max)(a, row + i, 0);
        // nothing but -inf and NaN: weights 0 and NaN
        m[i] = attni_bits32(max) == 0xff800000u ? 0 : max;
    }
    for (i = 0; i < n; i++) {
        const uint64_t *bits = row[i].bits;
        max = m[i];
        l[i] = ATTNI_ALL_SEEN ? ATTNI_K(plain_exp)(a, row + i, max, 1)
                              : ATTNI_K(plain_exp)(a, row + i, max, 0);
        m[i] = attni_float(attni_bits32(l[i]) << 1 ? attni_bits32(max * a->scale) : 0xff800000u);
    }
}
#undef ATTNI_BOTH
#undef ATTNI_SEEN
#undef ATTNI_ALL_SEEN
#endif

// Raw scores of a row to weights. Two passes: scores and their maximum; exponentials and their
// sum in 2 x 16 virtual lanes (even and odd tiles), so that skipped tiles change nothing.
ATTNI_TGT static void ATTNI_K(soft_row)(const attni_soft *a, const attni_row *row, float *m1,
                                        float *l1) {
    const V zero = ATTNI_I(set1)(0); // ninf is hidden from -ffinite-math-only
    const V ninf = ATTNI_I(barrier)(ATTNI_I(asv)(ATTNI_I(uset1)(0xff800000u)));
    const V scale = ATTNI_I(set1)(a->scale);
    const uint64_t *bits = row->bits;
    float *s = row->s, max;
    V top = ninf, sum[2], x, m;
    int i;
    for (i = 0; i < 16; i++) {
        uint32_t seen = (uint32_t)(bits[i / 4] >> (16 * (i % 4))) & 0xffffu;
        if (!seen) continue;
        x = ATTNI_I(load)(s + 16 * i);
        if (a->k_scale) x = ATTNI_I(mul)(x, ATTNI_I(load)(a->k_scale + 16 * i));
        x = ATTNI_I(mul)(x, scale);
        if (a->softcap > 0) {
            const V cap = ATTNI_I(set1)(a->softcap);
            x = ATTNI_I(mul)(ATTNI_K(tanh)(ATTNI_I(div)(x, cap)), cap);
        }
        if (row->alibi != 0) {
            V pos = ATTNI_I(barrier)(ATTNI_I(set1)(row->alibi_first + 16.0f * (float)i));
            pos = ATTNI_I(add)(ATTNI_I(iota)(), pos);
            x = ATTNI_MADD(pos, ATTNI_I(set1)(row->alibi), x);
        }
        if (row->add) x = ATTNI_I(add)(x, ATTNI_I(load)(row->add + 16 * i));
        if (seen != 0xffffu) x = ATTNI_I(pick)(seen, x, ninf);
        ATTNI_I(store)(s + 16 * i, x);
        top = ATTNI_I(max)(x, top); // NaN is passed over here and shows in the sum
    }
    max = ATTNI_I(hmax)(top);
    if (attni_bits32(max) == 0xff800000u) max = 0; // nothing but -inf and NaN: weights 0 and NaN
    m = ATTNI_I(set1)(max);
    sum[0] = sum[1] = zero;
    for (i = 0; i < 16; i++) {
        uint32_t seen = (uint32_t)(bits[i / 4] >> (16 * (i % 4))) & 0xffffu;
        if (!((row->tiles >> i) & 1)) continue;
        x = zero;
        if (seen) {
            x = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(load)(s + 16 * i), m));
            sum[i & 1] = ATTNI_I(add)(sum[i & 1], x);
            if (a->v_scale) { // an unseen token's scale may be anything
                x = ATTNI_I(mul)(x, ATTNI_I(load)(a->v_scale + 16 * i));
                if (seen != 0xffffu) x = ATTNI_I(pick)(seen, x, zero);
            }
        }
        if (row->p16) ATTNI_I(store_bf16)(row->p16 + 16 * i, x);
        else ATTNI_I(store)(s + 16 * i, x);
    }
    *l1 = ATTNI_I(hsum)(ATTNI_I(add)(sum[0], sum[1]));
    *m1 = attni_float(attni_bits32(*l1) << 1 ? attni_bits32(max) : 0xff800000u);
}

ATTNI_TGT static void ATTNI_K(soft)(const attni_soft *a, const attni_row *row, int n) {
    int i = 0, j;
    for (; i < n; i = j) {
        j = i;
#if !ATTNI_PORTABLE
        if (!(a->softcap > 0) && a->scale > 0)
            while (j < n && row[j].alibi == 0 && !row[j].add) j++;
        if (j > i) {
            ATTNI_K(soft_plain)(a, row + i, j - i, a->m + i, a->l + i);
            continue;
        }
#endif
        ATTNI_K(soft_row)(a, row + j, a->m + j, a->l + j);
        j++;
    }
}

#if ATTNI_PORTABLE // these run once per row and span: one copy serves both numerics
// (o, m, l) += (os, ms, ls) for nr rows, n a multiple of 16 apart. m = -inf is the empty partial.
// m and l are read, not written, past the last row to a multiple of 16.
ATTNI_TGT static void ATTNI_K(fold)(float *o, float *m, float *l, const float *os, const float *ms,
                                    const float *ls, int nr, int n) {
    const uint32_t none = 0xff800000u;
    const V one = ATTNI_I(set1)(1.0f);
    float m16[16], l16[16], a16[16], b16[16];
    int r, i, e;
    for (r = 0; r < nr; r += 16) {
        // the larger one's factor is 1
        V x = ATTNI_I(load)(m + r), y = ATTNI_I(load)(ms + r), d = ATTNI_I(sub)(x, y), f, a, b;
        f = ATTNI_I(asv)(ATTNI_I(uor)(ATTNI_I(asu)(d), ATTNI_I(uset1)(0x80000000u)));
        f = ATTNI_K(exp)(f);
        a = ATTNI_I(less)(x, y, f, one);
        b = ATTNI_I(less)(x, y, one, f);
        ATTNI_I(store)(m16, ATTNI_I(less)(x, y, y, x));
        ATTNI_I(store)(a16, a);
        ATTNI_I(store)(b16, b);
        ATTNI_I(store)(l16, ATTNI_MADD(ATTNI_I(load)(l + r), a,
                                       ATTNI_I(mul)(ATTNI_I(load)(ls + r), b)));
        for (i = 0; i < 16 && r + i < nr; i++) {
            const float *src = os + (int64_t)(r + i) * n;
            float *dst = o + (int64_t)(r + i) * n;
            if (attni_bits32(ms[r + i]) == none) continue;
            if (attni_bits32(m[r + i]) == none) {
                memcpy(dst, src, 4 * (size_t)n);
                m[r + i] = ms[r + i];
                l[r + i] = ls[r + i];
                continue;
            }
            a = ATTNI_I(set1)(a16[i]);
            b = ATTNI_I(set1)(b16[i]);
            for (e = 0; e < n; e += 16)
                ATTNI_I(store)(dst + e, ATTNI_MADD(ATTNI_I(load)(dst + e), a,
                                                   ATTNI_I(mul)(ATTNI_I(load)(src + e), b)));
            m[r + i] = m16[i];
            l[r + i] = l16[i];
        }
    }
}

// o / l, after the sink's logit (-inf: none) joined the sum. On return *m is finite unless the row
// is empty without a sink; *l is the final sum.
ATTNI_TGT static void ATTNI_K(finish)(float *o, float *m, float *l, float sink, int n) {
    const float none = attni_float(0xff800000u);
    V den, zero;
    int i;
    if (attni_bits32(*m) == 0xff800000u) {
        for (i = 0; i < n; i++) o[i] = 0;
        *m = sink;
        *l = 1;
        return;
    }
    if (attni_less(none, sink)) {
        float mn = *m > sink ? *m : sink;
        V a = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(set1)(*m), ATTNI_I(set1)(mn)));
        V b = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(set1)(sink), ATTNI_I(set1)(mn)));
        *l = ATTNI_I(first)(ATTNI_MADD(ATTNI_I(set1)(*l), a, b));
        *m = mn;
        for (i = 0; i < n; i += 16) ATTNI_I(store)(o + i, ATTNI_I(mul)(ATTNI_I(load)(o + i), a));
    }
    den = ATTNI_I(set1)(*l);
    zero = ATTNI_I(barrier)(ATTNI_I(set1)(0)); // + 0: a zero has one sign
    for (i = 0; i < n; i += 16)
        ATTNI_I(store)
        (o + i, ATTNI_I(add)(ATTNI_I(div)(ATTNI_I(load)(o + i), den), zero));
}

#endif // ATTNI_PORTABLE

#if ATTNI_PORTABLE || !ATTNI_DIRECT
#define ATTNI_ALL(f) {0, ATTNI_K(f##_f32), 0, 0, 0, 0, 0, 0}
#elif ATTNI_DIRECT == 1
#define ATTNI_ALL(f)                                                                               \
    {0, ATTNI_K(f##_f32), ATTNI_K(f##_f16), ATTNI_K(f##_bf16), 0, 0, ATTNI_K(f##_i8), 0}
#else
#define ATTNI_ALL(f)                                                                               \
    {                                                                                              \
        0, ATTNI_K(f##_f32), ATTNI_K(f##_f16), ATTNI_K(f##_bf16), ATTNI_K(f##_e4m3),               \
            ATTNI_K(f##_e5m2), ATTNI_K(f##_i8), ATTNI_K(f##_i4)                                    \
    }
#endif
static const attni_math ATTNI_K(math) = {ATTNI_ALL(qk), ATTNI_ALL(pv), ATTNI_K(soft),
                                         ATTNI_I(fold_portable), ATTNI_I(finish_portable)};

#undef ATTNI_ALL
#undef ATTNI_MADD
#undef ATTNI_QK
#undef ATTNI_PV

#elif ATTNI_KERNEL_PASS == 3 // ---- dots: for ISAs with bf16 and integer dot products

// As qk and pv above, but a step takes two bf16 elements (four int8 ones) at once.
ATTNI_INLINE ATTNI_TGT void ATTNI_I(qk_bdot_block)(const uint32_t *q, int64_t ldq,
                                                   const uint32_t *const *kt,
                                                   const uint8_t *const *ahead, int64_t look,
                                                   const uint8_t *col, int units, float *s,
                                                   const int nr, const int nc) {
    V c[ATTNI_NR][ATTNI_NC];
    U b[ATTNI_NC], a;
    int r, j, u;
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(set1)(0);
    for (u = 0; u < units; u++) {
        ATTNI_UNROLL for (j = 0; j < nc; j++) b[j] = ATTNI_I(uload)(kt[j] + 16 * u);
        if (nr <= 4)
            ATTNI_UNROLL for (j = 0; j < nc; j++) ATTNI_PREFETCH(ahead[j] + look * u);
        ATTNI_UNROLL for (r = 0; r < nr; r++) {
            a = ATTNI_I(uset1)(q[r * ldq + u]);
            ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(bdot)(c[r][j], a, b[j]);
        }
    }
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++)
            ATTNI_I(store)(s + r * ATTNI_LDS + 16 * col[j], c[r][j]);
}

ATTNI_INLINE ATTNI_TGT void ATTNI_I(qk_idot_block)(const uint8_t *q, int64_t ldq,
                                                   const uint32_t *const *kt,
                                                   const uint8_t *const *ahead, int64_t look,
                                                   const uint8_t *col, int units, float *s,
                                                   const int nr, const int nc) {
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
        if (nr <= 4)
            ATTNI_UNROLL for (j = 0; j < nc; j++) ATTNI_PREFETCH(ahead[j] + look * u);
        ATTNI_UNROLL for (r = 0; r < nr; r++) {
            a = ATTNI_I(uload1)(q + r * ldq + 8 + 4 * u);
            ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(idot)(c[r][j], b[j], a);
        }
    }
    ATTNI_UNROLL for (r = 0; r < nr; r++) {
        memcpy(&scale, q + r * ldq, 4);
        ATTNI_UNROLL for (j = 0; j < nc; j++)
            ATTNI_I(store)(s + r * ATTNI_LDS + 16 * col[j],
                           ATTNI_I(mul)(ATTNI_I(utop)(c[r][j], 32), ATTNI_I(set1)(scale)));
    }
}

#define ATTNI_QK_OVER(name, type)                                                                  \
    ATTNI_SHAPES(ATTNI_I, name##_block, ATTNI_QK_PARAMS(type), ATTNI_QK_ARGS, ATTNI_NR, ATTNI_NC)  \
    ATTNI_TGT static void ATTNI_I(name)(const void *qv, int64_t ldq, int nr,                       \
                                        const uint32_t *const *kt, const uint8_t *const *ahead,    \
                                        int look, const uint8_t *col, int nt, int units,           \
                                        float *s) {                                                \
        const type *q = (const type *)qv;                                                          \
        int r, j, step;                                                                            \
        for (r = 0; r < nr; r += step) {                                                           \
            const type *qr = q + r * ldq;                                                          \
            float *sr = s + r * ATTNI_LDS;                                                         \
            step = ATTNI_STEP(nr - r, ATTNI_NR);                                                   \
            j = 0;                                                                                 \
            ATTNI_ROWS(ATTNI_I, name##_block,                                                      \
                       (qr, ldq, kt + j, ahead + j, look, col + j, units, sr), step, ATTNI_NC, j,  \
                       nt, 1)                                                                      \
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
                memcpy(&x, p + r * ATTNI_LDS + t, 4);
                a = ATTNI_I(uset1)(x);
                ATTNI_UNROLL for (j = 0; j < nc; j++) c[r][j] = ATTNI_I(bdot)(c[r][j], a, b[j]);
            }
        }
    ATTNI_UNROLL for (r = 0; r < nr; r++)
        ATTNI_UNROLL for (j = 0; j < nc; j++) ATTNI_I(store)(o + r * ldo + e + 16 * j, c[r][j]);
}

ATTNI_SHAPES(ATTNI_I, pv_bdot_block,
             (const uint16_t *p, const uint32_t *v, const attni_run *run, int n, int vd, int e,
              float *o, int64_t ldo),
             (p, v, run, n, vd, e, o, ldo, ), ATTNI_NR, ATTNI_NC)
ATTNI_TGT static void ATTNI_I(pv_bdot)(const void *pv, int nr, const void *const *row,
                                       const void *const *ahead, const attni_run *run, int n,
                                       int more, int vd, float *o, int64_t ldo) {
    const uint16_t *p = (const uint16_t *)pv;
    const uint32_t *v = (const uint32_t *)row[0];
    const int nc = 16 * ATTNI_NC;
    int r, e, i, step;
    (void)ahead, (void)more; // the panel is in the cache, and whole
    for (r = 0; r < nr; r += step) {
        const uint16_t *pr = p + r * ATTNI_LDS;
        float *or_ = o + r * ldo;
        step = ATTNI_STEP(nr - r, ATTNI_NR);
        e = 0;
        if (vd >= nc) {
            ATTNI_ROWS(ATTNI_I, pv_bdot_block,
                       (pr, v, run, n, vd, e <= vd - nc ? e : vd - nc, or_, ldo), step, ATTNI_NC, e,
                       vd, 16)
        }
        for (; e < vd; e += 16)
            for (i = 0; i < attni_min32(step, nr - r); i++)
                ATTNI_I(pv_bdot_block)
                (pr + i * ATTNI_LDS, v, run, n, vd, e, or_ + i * ldo, ldo, 1, 1);
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
#undef ATTNI_QK_PARAMS
#undef ATTNI_QK_ARGS
#undef ATTNI_FEW_ROWS
#undef ATTNI_FEW_SHAPES
#undef ATTNI_SHAPES
#undef ATTNI_TALLER
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
#elif defined(__wasm_simd128__)
#define ATTNI_WASM 1
#include <wasm_simd128.h>
#endif
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ATTNI_INLINE static inline __attribute__((always_inline, unused))
#define ATTNI_CALLED static __attribute__((noinline, unused))
#define ATTNI_PREFETCH(p) __builtin_prefetch(p)
#define ATTNI_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
// p is a pointer the compiler knows nothing of: it addresses from p, not from parts of it
#define ATTNI_HIDE(p) __asm__("" : "+r"(p))
#else
#define ATTNI_INLINE static inline
#define ATTNI_CALLED static
#define ATTNI_PREFETCH(p) ((void)(p))
#define ATTNI_PREFETCH_L2(p) ((void)(p))
#define ATTNI_HIDE(p) ((void)0)
#endif
#ifdef __NVCC__ // it hands GCC's pragma to gcc, and complains
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1675
#endif
#if defined(__clang__)
#define ATTNI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define ATTNI_UNROLL _Pragma("GCC unroll 16")
#else
#define ATTNI_UNROLL
#endif

// FEW: rows few enough that a kernel reads K and V in their own dtype; more share one conversion.
// ONE: rows that are worked on in one block.
// LDS: from a row of scores to the next, off the powers of two that share lines of a cache.
enum {
    ATTNI_TILE = 16, ATTNI_TILES = ATTN_SPAN / 16, ATTNI_RB_MAX = 32, ATTNI_FEW = 8, ATTNI_ONE = 48,
    ATTNI_LDS = ATTN_SPAN + 32, ATTNI_AHEAD = 12
};

// How raw scores become weights. All pointers are for the 256 tokens of one span.
typedef struct attni_soft {
    const float *k_scale, *v_scale; // per token, or NULL
    float scale, softcap;
    float *m, *l; // results, per row: maximum (-inf: nothing seen) and sum
} attni_soft;
typedef struct attni_row {
    float *s;             // scores, replaced by weights
    uint16_t *p16;        // bf16 weights instead, or NULL
    const uint64_t *bits; // (4) what the row sees
    const float *add;     // bias in natural units, or NULL
    float alibi, alibi_first; // alibi_first: position of token 0 minus the query's
    uint32_t tiles;       // 16-token tiles that must be written (zeros where nothing is seen)
    int32_t token, head;  // of the task's tokens; of all heads
} attni_row;

typedef struct attni_run { // tokens [t0, t1) of a span, multiples of 16
    int32_t t0, t1;
} attni_run;

// Scores of nr rows against nt tiles: s[r * LDS + 16 * col[j]]. kt, ahead and col go on for
// 3 entries that repeat the last, so that kernels take 4 at a time. q: f32 rows, or pairs of bf16,
// or bytes. ahead[j]: asked for from memory meanwhile, step bytes per unit.
typedef void (*attni_qk_fn)(const void *q, int64_t ldq, int nr, const uint32_t *const *kt,
                            const uint8_t *const *ahead, int step, const uint8_t *col, int nt,
                            int units, float *s);
// Weighted sums of nr rows over n runs of tokens: o[r * ldo + e], e < vd (multiple of 16); more:
// added to what is there (vd a multiple of 64, not for the bf16 dot).
// row[t]: values of token t, f32 / f16 / bf16; for the bf16 dot row[0] is a panel of token pairs
// [128][vd] and p holds bf16.
typedef void (*attni_pv_fn)(const void *p, int nr, const void *const *row,
                            const void *const *ahead, const attni_run *run, int n, int more, int vd,
                            float *o, int64_t ldo);

// Kernels of one ISA that do no rounding arithmetic, so that numerics do not matter.
typedef struct attni_moves {
    // 16 tokens (their first units at row[t], gap bytes apart) to a K16 tile of n 4-byte units
    // (ahead: 16 rows to ask for from memory meanwhile)
    void (*pack)(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile,
                 const uint8_t *const *ahead);
    void (*widen_tile)(attn_dtype t, const uint32_t *tile, int units,
                       float *out);                                  // K16 -> [d][16] f32
    void (*widen)(attn_dtype t, const void *src, int n, float *out); // n % 8 == 0; pads to 16
    void (*narrow)(attn_dtype t, const float *src, int n, void *dst); // f32 -> f32, f16, bf16
    int (*special)(const float *x, int64_t n); // any Inf or NaN among n (multiple of 16)?
    void (*pairs)(const void *const *row, const attni_run *run, int n_runs, int n, int ldo,
                  const void *const *ahead, uint32_t *out);
    void (*codes)(const float *q, int n, uint8_t *out);
} attni_moves;

typedef struct attni_math {
    attni_qk_fn qk[8]; // by dtype; NULL: convert to F32 first
    attni_pv_fn pv[8];
    void (*soft)(const attni_soft *a, const attni_row *row, int n); // scores of n rows -> weights
    void (*fold)(float *o, float *m, float *l, const float *os, const float *ms, const float *ls,
                 int nr, int n);
    void (*finish)(float *o, float *m, float *l, float sink,
                   int n); // normalise; adds the sink logit
} attni_math;

// ==== >>impl-scalar  Vocabulary: 16 virtual lanes in plain C =====================================
//
// V is 16 floats, U is 16 uint32. Every ISA gives the same functions, suffixed with its name;
// kernels below are written once against them. Here only what the inner loops use is inlined: 16
// lanes unrolled everywhere would cost seconds of compile time. add, sub, mul, div and hsum end in
// an empty instruction per result (barrier), max, less and div do not trust the compiler's idea of
// comparing and dividing: so PORTABLE has the same bits under any of its flags.

#define ATTNI_EACH for (i = 0; i < 16; i++)
// One type for both: gcc 12 reorders accesses around copies from one struct to the other (-O3).
typedef union attni_V_scalar { float f[16]; uint32_t u[16]; } attni_V_scalar;
typedef attni_V_scalar attni_U_scalar;

#define ATTNI_MAP(name, how, expr)                                                                 \
    how attni_V_scalar attni_##name##_scalar(attni_V_scalar a, attni_V_scalar b) {        \
        int i;                                                                                     \
        ATTNI_EACH {                                                                               \
            a.f[i] = (expr);                                                                       \
            ATTNI_PIN(a.f[i]);                                                                     \
        }                                                                                          \
        return a;                                                                                  \
    }
ATTNI_MAP(add, ATTNI_INLINE, a.f[i] + b.f[i])
ATTNI_MAP(sub, ATTNI_CALLED, a.f[i] - b.f[i])
ATTNI_MAP(mul, ATTNI_INLINE, a.f[i] * b.f[i])
ATTNI_MAP(div, ATTNI_CALLED, attni_div(a.f[i], b.f[i]))
ATTNI_MAP(max, ATTNI_CALLED, attni_less(b.f[i], a.f[i]) ? a.f[i] : b.f[i]) // b when a is NaN
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
    ATTNI_EACH if (!((bits >> i) & 1u)) memcpy(&a.f[i], &b.f[i], 4);
    return a;
}
// a where x < y, else b
ATTNI_CALLED attni_V_scalar attni_less_scalar(attni_V_scalar x, attni_V_scalar y, attni_V_scalar a,
                                              attni_V_scalar b) {
    int i;
    ATTNI_EACH if (!attni_less(x.f[i], y.f[i])) memcpy(&a.f[i], &b.f[i], 4);
    return a;
}
ATTNI_INLINE attni_V_scalar attni_asv_scalar(attni_U_scalar a) { return a; }
ATTNI_INLINE attni_U_scalar attni_asu_scalar(attni_V_scalar a) { return a; }
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
    ATTNI_EACH if (x.u[i] != y.u[i]) memcpy(&a.f[i], &b.f[i], 4);
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
        for (i = 0; i < n; i++) a.f[i] = attni_less(a.f[i + n], a.f[i]) ? a.f[i] : a.f[i + n];
    return a.f[0];
}
// the fixed tree every ISA follows: i + (i + 8), then + 4, + 2, + 1
ATTNI_CALLED float attni_hsum_scalar(attni_V_scalar a) {
    int i, n;
    for (n = 8; n; n /= 2)
        for (i = 0; i < n; i++) {
            a.f[i] = a.f[i] + a.f[i + n];
            ATTNI_PIN(a.f[i]);
        }
    return a.f[0];
}
// p * 2^round(y), where t = y + 1.5 * 2^23; 0 where y < -100
ATTNI_CALLED attni_V_scalar attni_pow2_scalar(attni_V_scalar p, attni_V_scalar y,
                                              attni_V_scalar t) {
    int i;
    ATTNI_EACH {
        p.f[i] *= attni_float((attni_bits32(t.f[i]) << 23) + 0x3f800000u);
        if (attni_less(y.f[i], -100.0f)) p.f[i] = 0;
        ATTNI_PIN(p.f[i]);
    }
    return p;
}
ATTNI_CALLED float attni_first_scalar(attni_V_scalar a) { return a.f[0]; }
static void attni_pack_scalar(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile,
                              const uint8_t *const *ahead) {
    int u, t;
    (void)ahead;
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
ATTNI_F2 attni_V_avx2 attni_barrier_avx2(attni_V_avx2 x) {
    __asm__("" : "+x"(x.a));
    __asm__("" : "+x"(x.b));
    return x;
}
#define ATTNI_MAP(name, op)                                                                        \
    ATTNI_F2 attni_V_avx2 attni_##name##_avx2(attni_V_avx2 x, attni_V_avx2 y) {                    \
        return attni_barrier_avx2(attni_v2(op(x.a, y.a), op(x.b, y.b)));                           \
    }
ATTNI_MAP(add, _mm256_add_ps)
ATTNI_MAP(sub, _mm256_sub_ps)
ATTNI_MAP(mul, _mm256_mul_ps)
#undef ATTNI_MAP
// Instructions that -ffast-math would replace by estimates, turn round or swap the operands of.
#define ATTNI_MAP(name, type, text)                                                                \
    ATTNI_F2 type attni_##name##_256(__m256 x, __m256 y) {                                         \
        type z;                                                                                    \
        __asm__(text " %2, %1, %0" : "=x"(z) : "x"(x), "xm"(y));                                   \
        return z;                                                                                  \
    }
ATTNI_MAP(div, __m256, "vdivps")
ATTNI_MAP(max, __m256, "vmaxps") // y when either is NaN
ATTNI_MAP(less, __m256, "vcmplt_oqps")
#undef ATTNI_MAP
ATTNI_F2 attni_V_avx2 attni_div_avx2(attni_V_avx2 x, attni_V_avx2 y) {
    return attni_v2(attni_div_256(x.a, y.a), attni_div_256(x.b, y.b));
}
ATTNI_F2 attni_V_avx2 attni_max_avx2(attni_V_avx2 x, attni_V_avx2 y) {
    return attni_v2(attni_max_256(x.a, y.a), attni_max_256(x.b, y.b));
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
    return attni_v2(_mm256_blendv_ps(q.a, p.a, attni_less_256(x.a, y.a)),
                    _mm256_blendv_ps(q.b, p.b, attni_less_256(x.b, y.b)));
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
    __m128 z;
    __asm__("" : "+x"(y)); // each step hidden: the sums could be regrouped
    z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    __asm__("" : "+x"(z));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    __asm__("" : "+x"(z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
ATTNI_F2 __m256 attni_pow2h(__m256 p, __m256 y, __m256 t) {
    __m256i e = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23),
                                 _mm256_set1_epi32(0x3f800000));
    p = _mm256_andnot_ps(attni_less_256(y, _mm256_set1_ps(-100.0f)),
                         _mm256_mul_ps(p, _mm256_castsi256_ps(e)));
    __asm__("" : "+x"(p));
    return p;
}
ATTNI_F2 attni_V_avx2 attni_pow2_avx2(attni_V_avx2 p, attni_V_avx2 y, attni_V_avx2 t) {
    return attni_v2(attni_pow2h(p.a, y.a, t.a), attni_pow2h(p.b, y.b, t.b));
}
ATTNI_F2 attni_V_avx2 attni_load_f16_avx2(const uint8_t *p) {
    const __m128i *q = (const __m128i *)(const void *)p;
    return attni_v2(_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1)));
}
ATTNI_F2 attni_V_avx2 attni_load_i8_avx2(const uint8_t *p) {
    const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
    return attni_v2(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))));
}
ATTNI_F2 float attni_first_avx2(attni_V_avx2 x) { return _mm256_cvtss_f32(x.a); }

// 8 x 8 transposes of 4-byte units; the rest one by one
ATTNI_T2 static void attni_pack_avx2(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile,
                                     const uint8_t *const *ahead) {
    int u = 0, h, i;
    for (; gap == 4 && u + 8 <= n; u += 8)
        for (h = 0; h < 2; h++) {
            __m256 r[8], t[8];
            ATTNI_UNROLL
            for (i = 0; i < 8; i++)
                r[i] = _mm256_loadu_ps((const float *)(const void *)(row[8 * h + i] + 4 * u));
            if (u % 16 == 0)
                ATTNI_UNROLL for (i = 0; i < 8; i++) ATTNI_PREFETCH(ahead[8 * h + i] + 4 * u);
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
ATTNI_F5 __m512 attni_barrier_avx512(__m512 x) {
    __asm__("" : "+v"(x));
    return x;
}
#define ATTNI_MAP(name, op)                                                                        \
    ATTNI_F5 __m512 attni_##name##_avx512(__m512 x, __m512 y) {                                    \
        return attni_barrier_avx512(op(x, y));                                                     \
    }
ATTNI_MAP(add, _mm512_add_ps)
ATTNI_MAP(sub, _mm512_sub_ps)
ATTNI_MAP(mul, _mm512_mul_ps)
#undef ATTNI_MAP
#define ATTNI_MAP(name, type, put, text)                                                           \
    ATTNI_F5 type attni_##name##_512(__m512 x, __m512 y) {                                         \
        type z;                                                                                    \
        __asm__(text " %2, %1, %0" : put(z) : "v"(x), "vm"(y));                                    \
        return z;                                                                                  \
    }
ATTNI_MAP(div, __m512, "=v", "vdivps")
ATTNI_MAP(max, __m512, "=v", "vmaxps")
ATTNI_MAP(less, __mmask16, "=k", "vcmplt_oqps")
ATTNI_MAP(keep, __mmask16, "=k", "vcmpnlt_uqps") // not less, or NaN
#undef ATTNI_MAP
ATTNI_F5 __m512 attni_div_avx512(__m512 x, __m512 y) { return attni_div_512(x, y); }
ATTNI_F5 __m512 attni_max_avx512(__m512 x, __m512 y) { return attni_max_512(x, y); }
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
    return _mm512_mask_mov_ps(q, attni_less_512(x, y), p);
}
ATTNI_F5 __m512 attni_asv_avx512(__m512i x) { return _mm512_castsi512_ps(x); }
ATTNI_F5 __m512i attni_asu_avx512(__m512 x) { return _mm512_castps_si512(x); }
ATTNI_F5 __m512i attni_uset1_avx512(uint32_t x) { return _mm512_set1_epi32((int)x); }
ATTNI_F5 __m512i attni_uload1_avx512(const void *p) { // from memory, not by way of a register
    __m512i x;
    __asm__("vpbroadcastd %1, %0" : "=v"(x) : "m"(*(const uint8_t(*)[4])p));
    return x;
}
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
ATTNI_F5 __m512 attni_pow2_avx512(__m512 p, __m512 y, __m512 t) {
    return _mm512_maskz_scalef_ps(attni_keep_512(y, _mm512_set1_ps(-100.0f)), p,
                                  _mm512_sub_ps(t, _mm512_set1_ps(12582912.0f)));
}
ATTNI_F5 __m512 attni_load_f16_avx512(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
ATTNI_F5 __m512 attni_load_i8_avx512(const uint8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
// half i of each lane, from f16: even and odd halves of all lanes are gathered, one part converted
ATTNI_F5 __m512 attni_uhalfat_avx512(__m512i x, int i) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3,
                                           1, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4,
                                           2, 0);
    __m512i y = _mm512_permutexvar_epi16(order, x);
    return _mm512_cvtph_ps(i ? _mm512_extracti64x4_epi64(y, 1) : _mm512_castsi512_si256(y));
}
// e4m3 codes in the high bytes of 16-bit halves -> f16 of 2^-8 times the value; 0x7f is NaN
ATTNI_F5 __m512i attni_e4m3_halves(__m512i x) {
    __m512i h = _mm512_and_si512(_mm512_srai_epi16(x, 1), _mm512_set1_epi16((short)0xbf80));
    __m512i low = _mm512_and_si512(h, _mm512_set1_epi16(0x3f80));
    return _mm512_mask_blend_epi16(
        _mm512_cmpeq_epi16_mask(low, _mm512_set1_epi16(0x3f80)), h, _mm512_set1_epi16(0x7e00));
}
ATTNI_F5 __m512i attni_byte_pairs(__m512i x, int odd) { // bytes 0, 2 or 1, 3 as high bytes
    return odd ? _mm512_and_si512(x, _mm512_set1_epi16((short)0xff00)) : _mm512_slli_epi16(x, 8);
}
ATTNI_F5 __m512 attni_e4m3at_avx512(__m512i x, int i) {
    __m512i h = attni_e4m3_halves(attni_byte_pairs(x, i & 1));
    return _mm512_mul_ps(attni_uhalfat_avx512(h, i >> 1), _mm512_set1_ps(256.0f));
}
ATTNI_F5 __m512 attni_e5m2at_avx512(__m512i x, int i) {
    return attni_uhalfat_avx512(attni_byte_pairs(x, i & 1), i >> 1);
}
ATTNI_F5 __m512i attni_high_bytes(const uint8_t *p) { // 16 bytes, the low 256 bits count
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm512_castsi256_si512(_mm256_slli_epi16(x, 8));
}
ATTNI_F5 __m512 attni_load_e4m3_avx512(const uint8_t *p) {
    __m512i h = attni_e4m3_halves(attni_high_bytes(p));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(h)), _mm512_set1_ps(256.0f));
}
ATTNI_F5 __m512 attni_load_e5m2_avx512(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm512_castsi512_si256(attni_high_bytes(p)));
}
ATTNI_F5 __m512i attni_round_bf16(__m512 x) { // in the high halves; nearest even, NaN stays NaN
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    __m512i a = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
    return _mm512_mask_or_epi32(r, _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(0x7f800000)), u,
                                _mm512_set1_epi32(0x400000));
}
ATTNI_F5 void attni_store_bf16_avx512(uint16_t *p, __m512 x) {
    _mm256_storeu_si256((__m256i *)(void *)p,
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(attni_round_bf16(x), 16)));
}
ATTNI_F5 void attni_store_bf16_two_avx512(uint16_t *p, __m512 x, __m512 y) {
    const __m512i high = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37,
                                          35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7,
                                          5, 3, 1);
    _mm512_storeu_si512(
        p, _mm512_permutex2var_epi16(attni_round_bf16(x), high, attni_round_bf16(y)));
}
// the signed nibble at bit n of each lane
ATTNI_F5 __m512 attni_nibble_avx512(__m512i x, int n) {
    const __m512 value =
        _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(x, _mm512_set1_epi32(n)), value);
}
ATTNI_F5 float attni_first_avx512(__m512 x) { return _mm512_cvtss_f32(x); }

// 16 x 16 transposes of 4-byte units; the rest one by one
ATTNI_T5 static void attni_pack_avx512(const uint8_t *const *row, int64_t gap, int n,
                                       uint32_t *tile, const uint8_t *const *ahead) {
    int u = 0, i;
    for (; gap == 4 && u + 16 <= n; u += 16) {
        __m512i r[16], t[16];
        ATTNI_UNROLL for (i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(row[i] + 4 * u);
        ATTNI_UNROLL for (i = 0; i < 16; i++) ATTNI_PREFETCH(ahead[i] + 4 * u);
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
#define ATTNI_NT 1
#define ATTNI_NC 1
#define ATTNI_WR 1
#define ATTNI_WC 1
#define ATTNI_DIRECT 0
#define ATTNI_OWN 0
#define ATTNI_HELPER ATTNI_CALLED
#if defined(ATTNI_X86) || defined(ATTNI_ARM) || defined(ATTNI_WASM)
// only asked for by name there: PORTABLE will do
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
#define ATTNI_DIRECT 1
#define ATTNI_OWN 1
#define ATTNI_WR 6
#define ATTNI_WC 1
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 1
#define ATTNI_NR 6
#define ATTNI_NT 1
#define ATTNI_NC 1
#include "attn_cpu.h"
#define ATTNI_KERNEL_PASS 1
#define ATTNI_TGT ATTNI_T5
#define ATTNI_I(f) attni_##f##_avx512
#define ATTNI_DIRECT 2
#define ATTNI_OWN 2
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 1
#define ATTNI_NR 12
#define ATTNI_NT 2
#define ATTNI_NC 4
#define ATTNI_WR 8
#define ATTNI_WC 2
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
// (asm: gcc spills the sums of its intrinsic)
ATTNI_INLINE ATTNI_T6 __m512i attni_idot_avx512(__m512i acc, __m512i k, __m512i q) {
    __m512i biased = _mm512_xor_si512(k, _mm512_set1_epi32((int)0x80808080u));
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(biased), "v"(q));
    return acc;
}
#define ATTNI_KERNEL_PASS 3
#define ATTNI_TGT ATTNI_T6
#define ATTNI_I(f) attni_##f##_avx512
#define ATTNI_NR 6
#define ATTNI_NC 4
#define ATTNI_IDOT_BIASED 1
#include "attn_cpu.h"

#ifdef __linux__ // attn_cpu_open knows no other system; gcc's tile loads fail on Windows
#define ATTNI_TA                                                                                   \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
// Tiles 0..3 sums, 4..5 A (16 rows x 32 bf16), 6..7 B (16 pairs x 16 columns): a K16 tile of a
// 16-bit type is a B tile as it stands, and so is a panel of V pairs. All are 16 rows of 64 bytes.
// A product takes long to finish, so four sums go at once: 2 x 2 tiles, or 1 x 4 of up to 16 rows.
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

#define ATTNI_AMX_ZERO                                                                             \
    do {                                                                                           \
        _tile_zero(0);                                                                             \
        _tile_zero(1);                                                                             \
        _tile_zero(2);                                                                             \
        _tile_zero(3);                                                                             \
    } while (0)

// q: rows of bf16 pairs padded with zeros to 16 units; a tile with a units count off 16 is copied
// out. Rows past nr are zero queries, their scores land in spare rows.
ATTNI_TA static void attni_qk_amx(const void *qv, int64_t ldq, int nr, const uint32_t *const *kt,
                                  const uint8_t *const *ahead, int look, const uint8_t *col,
                                  int nt, int units, float *s) {
    const uint32_t *q = (const uint32_t *)qv;
    const size_t lda = (size_t)ldq * 4, ldc = ATTNI_LDS * 4;
    uint32_t pad[4][16 * 16];
    const int n = nr > 16 ? 2 : 4;
    int i, j, u;
    (void)ahead, (void)look;
    for (j = 0; j < nt; j += n) {
        ATTNI_AMX_ZERO;
        for (u = 0; u < units; u += 16) {
            const uint32_t *b[4];
            for (i = 0; i < n; i++) {
                b[i] = kt[j + i] + 16 * u;
                if (units - u < 16) {
                    memset(pad[i], 0, sizeof pad[i]);
                    memcpy(pad[i], b[i], 64 * (size_t)(units - u));
                    b[i] = pad[i];
                }
            }
            ATTNI_TILE_FENCE;
            _tile_loadd(4, q + u, lda);
            _tile_loadd(6, b[0], 64);
            _tile_loadd(7, b[1], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (n == 2) {
                _tile_loadd(5, q + 16 * ldq + u, lda);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_loadd(6, b[2], 64);
                _tile_loadd(7, b[3], 64);
                _tile_dpbf16ps(2, 4, 6);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, s + 16 * col[j], ldc);
        _tile_stored(1, s + 16 * col[j + 1], ldc);
        _tile_stored(2, n == 2 ? s + 16 * ATTNI_LDS + 16 * col[j] : s + 16 * col[j + 2], ldc);
        _tile_stored(3, n == 2 ? s + 16 * ATTNI_LDS + 16 * col[j + 1] : s + 16 * col[j + 3], ldc);
    }
}

// Runs are widened to whole 32-token steps: weights there are zero, and so must V be. Columns past
// vd are those of the last tile again.
ATTNI_TA static void attni_pv_amx(const void *pv, int nr, const void *const *row,
                                  const void *const *ahead, const attni_run *run, int n, int more,
                                  int vd, float *o, int64_t ldo) {
    const uint16_t *p = (const uint16_t *)pv;
    const uint32_t *v = (const uint32_t *)row[0];
    const size_t lda = ATTNI_LDS * 2, ldb = (size_t)vd * 4, ldc = (size_t)ldo * 4;
    const int wide = nr > 16 ? 2 : 4;
    int e, i, t, k, at[4];
    (void)ahead, (void)more;
    ATTNI_TILE_FENCE;
    for (e = 0; e < vd; e += 16 * wide) {
        int done = -1;
        for (k = 0; k < 4; k++) at[k] = attni_min32(e + 16 * k, vd - 16);
        ATTNI_AMX_ZERO;
        for (i = 0; i < n; i++)
            for (t = run[i].t0 & ~31; t < run[i].t1; t += 32) {
                const uint32_t *b = v + (int64_t)(t / 2) * vd;
                if (t <= done) continue;
                done = t;
                _tile_loadd(4, p + t, lda);
                _tile_loadd(6, b + at[0], ldb);
                _tile_loadd(7, b + at[1], ldb);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (wide == 2) {
                    _tile_loadd(5, p + 16 * ATTNI_LDS + t, lda);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                } else {
                    _tile_loadd(6, b + at[2], ldb);
                    _tile_loadd(7, b + at[3], ldb);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_dpbf16ps(3, 4, 7);
                }
            }
        _tile_stored(0, o + at[0], ldc);
        _tile_stored(1, o + at[1], ldc);
        _tile_stored(2, wide == 2 ? o + 16 * ldo + at[0] : o + at[2], ldc);
        _tile_stored(3, wide == 2 ? o + 16 * ldo + at[1] : o + at[3], ldc);
    }
}
#undef ATTNI_AMX_ZERO
#define ATTNI_AMX_BEGIN(x) ((x)->isa == ATTN_CPU_AMX ? attni_amx_config(1) : (void)0)
#define ATTNI_AMX_END(x) ((x)->isa == ATTN_CPU_AMX ? attni_amx_config(0) : (void)0)
#endif
#endif // ATTNI_X86
#ifndef ATTNI_AMX_BEGIN
#define ATTNI_AMX_BEGIN(x) ((void)0)
#define ATTNI_AMX_END(x) ((void)0)
#endif

#ifdef ATTNI_ARM
// ==== >>impl-neon  Vocabulary ====================================================================

typedef struct attni_V_neon { float32x4_t v[4]; } attni_V_neon;
typedef struct attni_U_neon { uint32x4_t v[4]; } attni_U_neon;
#define ATTNI_Q ATTNI_UNROLL for (i = 0; i < 4; i++)
#define ATTNI_MAP(name, expr)                                                                      \
    ATTNI_INLINE attni_V_neon attni_##name##_neon(attni_V_neon x, attni_V_neon y) {                \
        int i;                                                                                     \
        ATTNI_Q {                                                                                  \
            x.v[i] = (expr);                                                                       \
            __asm__("" : "+w"(x.v[i]));                                                            \
        }                                                                                          \
        return x;                                                                                  \
    }
ATTNI_INLINE float32x4_t attni_div_128(float32x4_t x, float32x4_t y) {
    __asm__("fdiv %0.4s, %0.4s, %1.4s" : "+w"(x) : "w"(y));
    return x;
}
ATTNI_INLINE uint32x4_t attni_less_128(float32x4_t x, float32x4_t y) {
    uint32x4_t z;
    __asm__("fcmgt %0.4s, %2.4s, %1.4s" : "=w"(z) : "w"(x), "w"(y));
    return z;
}
ATTNI_MAP(add, vaddq_f32(x.v[i], y.v[i]))
ATTNI_MAP(sub, vsubq_f32(x.v[i], y.v[i]))
ATTNI_MAP(mul, vmulq_f32(x.v[i], y.v[i]))
ATTNI_MAP(div, attni_div_128(x.v[i], y.v[i]))
ATTNI_MAP(max, vbslq_f32(attni_less_128(y.v[i], x.v[i]), x.v[i], y.v[i])) // y when x is NaN
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
    ATTNI_Q p.v[i] = vbslq_f32(attni_less_128(x.v[i], y.v[i]), p.v[i], q.v[i]);
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
ATTNI_INLINE attni_U_neon attni_uload1_neon(const void *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return attni_uset1_neon(x);
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
    float32x4_t s, u = vaddq_f32(x.v[0], x.v[2]), v = vaddq_f32(x.v[1], x.v[3]);
    float32x2_t t;
    __asm__("" : "+w"(u), "+w"(v)); // each step hidden: the sums could be regrouped
    s = vaddq_f32(u, v);
    __asm__("" : "+w"(s));
    t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    __asm__("" : "+w"(t));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
ATTNI_INLINE attni_V_neon attni_pow2_neon(attni_V_neon p, attni_V_neon y, attni_V_neon t) {
    int i;
    ATTNI_Q {
        uint32x4_t e = vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(t.v[i]), 23),
                                 vdupq_n_u32(0x3f800000u));
        uint32x4_t drop = attni_less_128(y.v[i], vdupq_n_f32(-100.0f));
        p.v[i] = vreinterpretq_f32_u32(vbicq_u32(
            vreinterpretq_u32_f32(vmulq_f32(p.v[i], vreinterpretq_f32_u32(e))), drop));
        __asm__("" : "+w"(p.v[i]));
    }
    return p;
}
ATTNI_INLINE attni_V_neon attni_load_f16_neon(const uint8_t *p) {
    attni_V_neon r;
    int i;
    ATTNI_Q r.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i)));
    return r;
}
ATTNI_INLINE attni_V_neon attni_load_i8_neon(const uint8_t *p) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t a = vmovl_s8(vget_low_s8(x)), b = vmovl_s8(vget_high_s8(x));
    attni_V_neon r;
    r.v[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(a)));
    r.v[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(a)));
    r.v[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(b)));
    r.v[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(b)));
    return r;
}
ATTNI_INLINE float attni_first_neon(attni_V_neon x) { return vgetq_lane_f32(x.v[0], 0); }

// 4 x 4 transposes of 4-byte units; the rest one by one
static void attni_pack_neon(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile,
                            const uint8_t *const *ahead) {
    int u = 0, h, i;
    for (; gap == 4 && u + 4 <= n; u += 4)
        for (h = 0; h < 16; h += 4) {
            uint32x4_t r[4], a, b, c, d;
            ATTNI_Q r[i] = vreinterpretq_u32_u8(vld1q_u8(row[h + i] + 4 * u));
            if (u % 16 == 0) ATTNI_Q ATTNI_PREFETCH(ahead[h + i] + 4 * u);
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
#define ATTNI_DIRECT 1
#define ATTNI_OWN 1
#define ATTNI_WR 6
#define ATTNI_WC 1
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 1
#define ATTNI_NR 6
#define ATTNI_NT 1
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

#ifdef ATTNI_WASM
// ==== >>impl-wasm  Vocabulary ====================================================================

typedef struct attni_V_wasm { v128_t v[4]; } attni_V_wasm;
typedef attni_V_wasm attni_U_wasm;
#define ATTNI_Q ATTNI_UNROLL for (i = 0; i < 4; i++)
// Not the compiler's: it may turn a comparison round and take reciprocals.
ATTNI_INLINE v128_t attni_less_128(v128_t x, v128_t y) {
    v128_t z;
    __asm__("local.get %1\n\tlocal.get %2\n\tf32x4.lt\n\tlocal.set %0" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
ATTNI_INLINE v128_t attni_div_128(v128_t x, v128_t y) {
    v128_t z;
    __asm__("local.get %1\n\tlocal.get %2\n\tf32x4.div\n\tlocal.set %0" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
#define ATTNI_MAP(name, expr)                                                                      \
    ATTNI_INLINE attni_V_wasm attni_##name##_wasm(attni_V_wasm x, attni_V_wasm y) {                \
        int i;                                                                                     \
        ATTNI_Q x.v[i] = (expr);                                                                   \
        ATTNI_Q __asm__("" : "+r"(x.v[i]));                                                        \
        return x;                                                                                  \
    }
ATTNI_MAP(add, wasm_f32x4_add(x.v[i], y.v[i]))
ATTNI_MAP(sub, wasm_f32x4_sub(x.v[i], y.v[i]))
ATTNI_MAP(mul, wasm_f32x4_mul(x.v[i], y.v[i]))
ATTNI_MAP(div, attni_div_128(x.v[i], y.v[i]))
ATTNI_MAP(max, wasm_v128_bitselect(x.v[i], y.v[i], attni_less_128(y.v[i], x.v[i])))
ATTNI_MAP(uor, wasm_v128_or(x.v[i], y.v[i]))
ATTNI_MAP(uadd, wasm_i32x4_add(x.v[i], y.v[i]))
#undef ATTNI_MAP
// one argument x and a number n
#define ATTNI_MAP(name, type, expr)                                                                \
    ATTNI_INLINE attni_V_wasm attni_##name##_wasm(attni_V_wasm x, type n) {                        \
        int i;                                                                                     \
        ATTNI_Q x.v[i] = (expr);                                                                   \
        return x;                                                                                  \
    }
ATTNI_MAP(uand, uint32_t, wasm_v128_and(x.v[i], wasm_i32x4_splat((int32_t)n)))
ATTNI_MAP(ushl, int, wasm_i32x4_shl(x.v[i], (uint32_t)n))
ATTNI_MAP(ushr, int, wasm_u32x4_shr(x.v[i], (uint32_t)n))
ATTNI_MAP(utop, int, wasm_f32x4_convert_i32x4(wasm_i32x4_shr(x.v[i], (uint32_t)(32 - n))))
#undef ATTNI_MAP
ATTNI_INLINE attni_V_wasm attni_barrier_wasm(attni_V_wasm x) {
    int i;
    ATTNI_Q __asm__("" : "+r"(x.v[i]));
    return x;
}
ATTNI_INLINE attni_V_wasm attni_uset1_wasm(uint32_t n) {
    attni_V_wasm r;
    int i;
    ATTNI_Q r.v[i] = wasm_i32x4_splat((int32_t)n);
    return r;
}
ATTNI_INLINE attni_V_wasm attni_set1_wasm(float n) { return attni_uset1_wasm(attni_bits32(n)); }
ATTNI_INLINE attni_V_wasm attni_uload_wasm(const void *p) {
    attni_V_wasm r;
    int i;
    ATTNI_Q r.v[i] = wasm_v128_load((const uint8_t *)p + 16 * i);
    return r;
}
ATTNI_INLINE attni_V_wasm attni_load_wasm(const float *p) { return attni_uload_wasm(p); }
ATTNI_INLINE void attni_store_wasm(float *p, attni_V_wasm x) {
    int i;
    ATTNI_Q wasm_v128_store(p + 4 * i, x.v[i]);
}
ATTNI_INLINE attni_V_wasm attni_iota_wasm(void) {
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return attni_load_wasm(lanes);
}
ATTNI_INLINE attni_V_wasm attni_pick_wasm(uint32_t bits, attni_V_wasm x, attni_V_wasm y) {
    const v128_t lane = wasm_i32x4_const(1, 2, 4, 8);
    int i;
    ATTNI_Q {
        v128_t b = wasm_v128_and(wasm_i32x4_splat((int32_t)(bits >> (4 * i))), lane);
        x.v[i] = wasm_v128_bitselect(x.v[i], y.v[i], wasm_i32x4_eq(b, lane));
    }
    return x;
}
ATTNI_INLINE attni_V_wasm attni_less_wasm(attni_V_wasm x, attni_V_wasm y, attni_V_wasm p,
                                          attni_V_wasm q) {
    int i;
    ATTNI_Q p.v[i] = wasm_v128_bitselect(p.v[i], q.v[i], attni_less_128(x.v[i], y.v[i]));
    return p;
}
ATTNI_INLINE attni_V_wasm attni_uequal_wasm(attni_U_wasm x, attni_U_wasm y, attni_V_wasm p,
                                            attni_V_wasm q) {
    int i;
    ATTNI_Q p.v[i] = wasm_v128_bitselect(p.v[i], q.v[i], wasm_i32x4_eq(x.v[i], y.v[i]));
    return p;
}
ATTNI_INLINE attni_V_wasm attni_asv_wasm(attni_U_wasm x) { return x; }
ATTNI_INLINE attni_U_wasm attni_asu_wasm(attni_V_wasm x) { return x; }
ATTNI_INLINE attni_U_wasm attni_uload16_wasm(const void *p) {
    attni_U_wasm r;
    int i;
    ATTNI_Q r.v[i] = wasm_u32x4_load16x4((const uint8_t *)p + 8 * i);
    return r;
}
ATTNI_INLINE attni_U_wasm attni_uwide8(v128_t x) {
    v128_t a = wasm_u16x8_extend_low_u8x16(x), b = wasm_u16x8_extend_high_u8x16(x);
    attni_U_wasm r;
    r.v[0] = wasm_u32x4_extend_low_u16x8(a);
    r.v[1] = wasm_u32x4_extend_high_u16x8(a);
    r.v[2] = wasm_u32x4_extend_low_u16x8(b);
    r.v[3] = wasm_u32x4_extend_high_u16x8(b);
    return r;
}
ATTNI_INLINE attni_U_wasm attni_uload8_wasm(const void *p) {
    return attni_uwide8(wasm_v128_load(p));
}
ATTNI_INLINE attni_U_wasm attni_uload4_wasm(const void *p) {
    v128_t x = wasm_v128_load64_zero(p), lo = wasm_v128_and(x, wasm_i8x16_splat(15));
    v128_t hi = wasm_u8x16_shr(x, 4);
    return attni_uwide8(wasm_i8x16_shuffle(lo, hi, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                           7, 23));
}
// Exponents are moved by 112; Inf and NaN get the top one, denormals are a difference of floats.
ATTNI_INLINE attni_V_wasm attni_uhalf_wasm(attni_U_wasm x) {
    const v128_t least = wasm_i32x4_splat(113 << 23);
    int i;
    ATTNI_Q {
        v128_t em = wasm_v128_and(x.v[i], wasm_i32x4_splat(0x7fff));
        v128_t sign = wasm_i32x4_shl(wasm_v128_and(x.v[i], wasm_i32x4_splat(0x8000)), 16);
        v128_t wide = wasm_i32x4_shl(em, 13), r = wasm_i32x4_add(wide, wasm_i32x4_splat(112 << 23));
        v128_t tiny = wasm_f32x4_sub(wasm_i32x4_add(wide, least), least);
        v128_t quiet = wasm_v128_and(wasm_i32x4_gt(em, wasm_i32x4_splat(0x7c00)),
                                     wasm_i32x4_splat(0x400000));
        v128_t top = wasm_v128_or(wasm_v128_or(wide, quiet), wasm_i32x4_splat(0x7f800000));
        r = wasm_v128_bitselect(tiny, r, wasm_i32x4_lt(em, wasm_i32x4_splat(0x400)));
        r = wasm_v128_bitselect(top, r, wasm_i32x4_gt(em, wasm_i32x4_splat(0x7bff)));
        x.v[i] = wasm_v128_or(r, sign);
    }
    return x;
}
ATTNI_CALLED void attni_store_f16_wasm(void *p, attni_V_wasm x) {
    float f[16];
    uint16_t h[16];
    int i;
    memcpy(f, &x, 64);
    for (i = 0; i < 16; i++) h[i] = attni_to_f16(f[i]);
    memcpy(p, h, 32);
}
ATTNI_INLINE void attni_ustore16_wasm(void *p, attni_U_wasm x) {
    int i;
    for (i = 0; i < 4; i += 2)
        wasm_v128_store((uint8_t *)p + 8 * i, wasm_i16x8_shuffle(x.v[i], x.v[i + 1], 0, 2, 4, 6, 8,
                                                                 10, 12, 14));
}
ATTNI_INLINE attni_V_wasm attni_pow2_wasm(attni_V_wasm p, attni_V_wasm y, attni_V_wasm t) {
    int i;
    ATTNI_Q {
        v128_t e = wasm_i32x4_add(wasm_i32x4_shl(t.v[i], 23), wasm_i32x4_splat(0x3f800000));
        v128_t drop = attni_less_128(y.v[i], wasm_f32x4_splat(-100.0f));
        p.v[i] = wasm_v128_andnot(wasm_f32x4_mul(p.v[i], e), drop);
        __asm__("" : "+r"(p.v[i]));
    }
    return p;
}
ATTNI_INLINE float attni_first_wasm(attni_V_wasm x) { return wasm_f32x4_extract_lane(x.v[0], 0); }
// both follow the tree i, i + 8; + 4; + 2; + 1
#define ATTNI_MAP(name, f)                                                                         \
    ATTNI_INLINE float attni_h##name##_wasm(attni_V_wasm x) {                                      \
        attni_V_wasm y = x;                                                                        \
        y.v[0] = x.v[2], y.v[1] = x.v[3];                                                          \
        x = attni_##f##_wasm(x, y);                                                                \
        y.v[0] = x.v[1];                                                                           \
        x = attni_##f##_wasm(x, y);                                                                \
        y.v[0] = wasm_i32x4_shuffle(x.v[0], x.v[0], 2, 3, 2, 3);                                   \
        x = attni_##f##_wasm(x, y);                                                                \
        y.v[0] = wasm_i32x4_shuffle(x.v[0], x.v[0], 1, 1, 1, 1);                                   \
        return attni_first_wasm(attni_##f##_wasm(x, y));                                           \
    }
ATTNI_MAP(sum, add)
ATTNI_MAP(max, max)
#undef ATTNI_MAP

// 4 x 4 transposes of 4-byte units; the rest one by one
static void attni_pack_wasm(const uint8_t *const *row, int64_t gap, int n, uint32_t *tile,
                            const uint8_t *const *ahead) {
    int u = 0, h, i;
    (void)ahead;
    for (; gap == 4 && u + 4 <= n; u += 4)
        for (h = 0; h < 16; h += 4) {
            v128_t r[4], a, b, c, d;
            ATTNI_Q r[i] = wasm_v128_load(row[h + i] + 4 * u);
            a = wasm_i32x4_shuffle(r[0], r[1], 0, 4, 1, 5);
            b = wasm_i32x4_shuffle(r[2], r[3], 0, 4, 1, 5);
            c = wasm_i32x4_shuffle(r[0], r[1], 2, 6, 3, 7);
            d = wasm_i32x4_shuffle(r[2], r[3], 2, 6, 3, 7);
            wasm_v128_store(tile + 16 * u + h, wasm_i64x2_shuffle(a, b, 0, 2));
            wasm_v128_store(tile + 16 * (u + 1) + h, wasm_i64x2_shuffle(a, b, 1, 3));
            wasm_v128_store(tile + 16 * (u + 2) + h, wasm_i64x2_shuffle(c, d, 0, 2));
            wasm_v128_store(tile + 16 * (u + 3) + h, wasm_i64x2_shuffle(c, d, 1, 3));
        }
    for (; u < n; u++)
        for (i = 0; i < 16; i++) memcpy(tile + 16 * u + i, row[i] + u * gap, 4);
}

#define ATTNI_KERNEL_PASS 1
#define ATTNI_TGT
#define ATTNI_I(f) attni_##f##_wasm
#define ATTNI_DIRECT 0
#define ATTNI_OWN 0
#define ATTNI_WR 4
#define ATTNI_WC 1
#define ATTNI_HELPER ATTNI_INLINE
#define ATTNI_FAST_TOO 0
#define ATTNI_NR 4
#define ATTNI_NT 1
#define ATTNI_NC 1
#include "attn_cpu.h"
#endif // ATTNI_WASM

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
// Bits: 1 AVX2+FMA+F16C, 2 AVX-512 F BW VL DQ, 4 VNNI, 8 BF16, 16 AMX-BF16, 32 BF16 faster than
// FMA; the OS saves the registers.
static int attni_x86_look(void) {
    unsigned a, b, c, d, lo, leaf7b, leaf7c, leaf7d;
    int f = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!(c & (1u << 27)) || !(c & (1u << 28)) || !(c & (1u << 12)) || !(c & (1u << 29))) return 0;
    __asm__ volatile("xgetbv" : "=a"(lo) : "c"(0) : "edx");
    if ((lo & 6u) != 6u || !__get_cpuid_count(7, 0, &a, &leaf7b, &leaf7c, &leaf7d)) return 0;
    if (!(leaf7b & (1u << 5))) return 0;
    f = 1;
    if ((lo & 0xe0u) != 0xe0u || !(leaf7b & (1u << 16)) || !(leaf7b & (1u << 17)) ||
        !(leaf7b & (1u << 30)) || !(leaf7b & (1u << 31)))
        return f;
    f |= 2;
    if (leaf7c & (1u << 11)) f |= 4;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5))) {
        f |= 8; // Intel's vdpbf16ps does half the work of its FMA in a cycle, AMD's twice
        if (__get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541u) f |= 32;
    }
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
#ifdef ATTNI_WASM
    if (isa == ATTN_CPU_WASM) return 1;
#endif
    return 0;
}

// Does AUTO take it where it is there?
ATTNI_CALLED int attni_worth(attn_cpu_isa isa) {
#ifdef ATTNI_X86
    if (isa == ATTN_CPU_AVX512_BF16) return (attni_x86_features() & 32) != 0;
#endif
    (void)isa;
    return 1;
}

ATTN_DEF attn_cpu_isa attn_cpu_get_isa(void) {
    static const attn_cpu_isa best[] = {ATTN_CPU_AMX,  ATTN_CPU_AVX512_BF16, ATTN_CPU_AVX512,
                                        ATTN_CPU_AVX2, ATTN_CPU_NEON_BF16,   ATTN_CPU_NEON,
                                        ATTN_CPU_WASM};
    int isa = ATTNI_GET(attni_isa_id), i;
    if (isa) return (attn_cpu_isa)isa;
    isa = ATTN_CPU_SCALAR;
    for (i = 0; i < (int)(sizeof best / sizeof best[0]) && isa == ATTN_CPU_SCALAR; i++)
        if (attn_cpu_has(best[i]) && attni_worth(best[i])) isa = (int)best[i];
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
    x->rb = 24;
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
#ifdef __linux__
        if (x->isa == ATTN_CPU_AMX && (bqk || bpv)) {
            x->rb = 32;
            if (bqk) x->qk = attni_qk_amx;
            if (bpv) x->pv = attni_pv_amx;
        }
#endif
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
#ifdef ATTNI_WASM
    if (x->isa == ATTN_CPU_WASM) {
        x->mv = &attni_moves_wasm;
        x->ma = &attni_math_portable_wasm;
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
        ATTNI_NAMES("neon"),   ATTNI_NAMES("neonbf16"),   ATTNI_NAMES("wasm")};
    attni_exec x;
    if (!d) return "none";
    attni_choose(d, &x);
    return names[x.isa][x.qk_kind + 3 * x.pv_kind];
}

ATTN_DEF attn_result attn_cpu_supports(const attn_desc *d) {
    attn_result r = attn_validate(d);
    return r == ATTN_OK && attni_device_list(&d->mask) ? ATTN_ERR_UNSUPPORTED : r;
}

// The host's floating-point mode (programs linked with -ffast-math start with denormals flushed,
// audio code sets that itself, rounding may be anything): PORTABLE runs and stored rows are
// computed with denormals and to nearest, and the mode is put back. Where it is not known how, both
// are assumed.
ATTNI_CALLED uint64_t attni_mode_enter(void) {
    uint64_t was = 0;
#if defined(__GNUC__) && defined(__SSE2__)
    uint32_t old = 0, now; // set, as MemorySanitizer does not see what assembler writes to memory
    __asm__ volatile("stmxcsr %0" : "=m"(old) : : "memory");
    now = old & ~0xe040u; // flush to zero, rounding, denormals are zero
    if (now != old) __asm__ volatile("ldmxcsr %0" : : "m"(now) : "memory");
    was = old;
#elif defined(__GNUC__) && defined(__aarch64__)
    uint64_t now;
    __asm__ volatile("mrs %0, fpcr" : "=r"(was) : : "memory");
    now = was & ~(uint64_t)0x01c00003u; // FZ, RMode, AH, FIZ
    if (now != was) __asm__ volatile("msr fpcr, %0" : : "r"(now) : "memory");
#elif defined(__GNUC__) && defined(__arm__) && defined(__ARM_FP)
    uint32_t old, now;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(old) : : "memory");
    now = old & ~0x01c00000u; // FZ, RMode
    if (now != old) __asm__ volatile("vmsr fpscr, %0" : : "r"(now) : "memory");
    was = old;
#elif defined(__GNUC__) && defined(__riscv_flen)
    unsigned long old;
    __asm__ volatile("frrm %0" : "=r"(old) : : "memory");
    if (old) __asm__ volatile("fsrm x0" : : : "memory");
    was = old;
#endif
    return was;
}

ATTNI_CALLED void attni_mode_leave(uint64_t was) {
#if defined(__GNUC__) && defined(__SSE2__)
    uint32_t old = (uint32_t)was;
    if (old & 0xe040u) __asm__ volatile("ldmxcsr %0" : : "m"(old) : "memory");
#elif defined(__GNUC__) && defined(__aarch64__)
    if (was & 0x01c00003u) __asm__ volatile("msr fpcr, %0" : : "r"(was) : "memory");
#elif defined(__GNUC__) && defined(__arm__) && defined(__ARM_FP)
    if (was & 0x01c00000u)
        __asm__ volatile("vmsr fpscr, %0" : : "r"((uint32_t)was) : "memory");
#elif defined(__GNUC__) && defined(__riscv_flen)
    if (was) __asm__ volatile("fsrm %0" : : "r"((unsigned long)was) : "memory");
#else
    (void)was;
#endif
}

// ==== >>impl-check  Checked builds: what store, run and merge look at besides ====================

#ifdef ATTN_CHECK

static int attni_check_turn; // calls so far: which row is recomputed next. Atomic.
#if defined(__GNUC__) || defined(__clang__)
#define ATTNI_CHECK_NEXT() __atomic_fetch_add(&attni_check_turn, 1, __ATOMIC_RELAXED)
#else
#define ATTNI_CHECK_NEXT() (attni_check_turn++)
#endif
#if ATTN_CHECK + 0 > 1
#define ATTNI_CHECK_EVERY (ATTN_CHECK)
#else
#define ATTNI_CHECK_EVERY 1
#endif
#ifndef ATTNI_CHECK_SPOIL /* a test spoils what the tasks wrote */
#define ATTNI_CHECK_SPOIL(d, partials) ((void)0)
#endif

static attn_result attni_check_page(const attn_desc *d, int64_t page) {
    const attn_pool *pool = d->kv.pool;
    if (!pool || page < 0 || page >= d->kv.n_pages) return ATTN_OK; // else store says ERR_PAGE
    return page < pool->n_pages && pool->ref[page] > 0 ? ATTN_OK : ATTN_ERR_CHECK;
}

static attn_result attni_check_slots(const attn_desc *d, const int64_t *slots, int64_t n) {
    attn_result r = ATTN_OK;
    for (; n > 0 && r == ATTN_OK; n--, slots++)
        if (*slots >= 0) r = attni_check_page(d, *slots / d->kv.page_tokens);
    return r;
}

static attn_result attni_check_copy(const attn_desc *d, const attn_page_copy *c) {
    attn_result r = attni_check_page(d, c->src);
    return r == ATTN_OK ? attni_check_page(d, c->dst) : r;
}

#define ATTNI_CHECK_SLOTS(d, slots, n) attni_check_slots(d, slots, n)
#define ATTNI_CHECK_COPY(d, copy) attni_check_copy(d, copy)
#define ATTNI_CHECK_TABLES(d) attn_check_tables(d, (uint32_t)ATTNI_GET(attni_check_turn))
#define ATTNI_CHECK_RUN(w, first, count, partials)                                                 \
    attni_check_run(w, first, count, (float *)(partials))
#define ATTNI_CHECK_MERGE(w, first, count) attni_check_merge(w, first, count)
#else
#define ATTNI_CHECK_SLOTS(d, slots, n) ATTN_OK
#define ATTNI_CHECK_COPY(d, copy) ATTN_OK
#define ATTNI_CHECK_TABLES(d) ATTN_OK
#define ATTNI_CHECK_RUN(w, first, count, partials) ATTN_OK
#define ATTNI_CHECK_MERGE(w, first, count) ATTN_OK
#endif

// ==== >>impl-store  ==============================================================================

// Machines differ in the NaN they make; stored rows must not.
static float attni_one_nan(float x) { return attni_isnan(x) ? attni_float(0x7fc00000u) : x; }

// One row of one head into its place: codes gathered in a row, then scattered by 4-byte units.
ATTNI_CALLED void attni_store_row(const attni_moves *mv, const attni_side *s, const void *src,
                            attn_dtype st, int64_t page, int32_t place, int32_t head) {
    float x[ATTN_MAX_HEAD_DIM + 16], scale = 1.0f, y;
    uint32_t top = 0, u; // on the bits, where NaN is above everything
    uint8_t code[4 * ATTN_MAX_HEAD_DIM];
    uint8_t *p = s->data + page * s->page_bytes + attni_token_offset(s, place, head);
    int32_t e, n = s->dim, units = n * attni_bits_of(s->dtype) / 32;
    mv->widen(st, src, n, x);
    if (attni_is_scaled(s->dtype)) {
        if (s->head_scale) scale = s->head_scale[head];
        else {
            for (e = 0; e < n; e++) {
                u = attni_bits32(x[e]) & 0x7fffffffu;
                if (u > top) top = u;
            }
            scale = attni_one_nan(attni_div(attni_float(top), attni_code_max(s->dtype)));
            memcpy(s->data + page * s->page_bytes + attni_scale_offset(s, place, head), &scale, 4);
        }
        for (e = 0; e < n; e++) {
            y = attni_bits32(scale) << 1 ? attni_one_nan(attni_div(x[e], scale)) : 0.0f;
            attni_put(code, s->dtype, e, y);
        }
    } else {
        mv->narrow(s->dtype, x, n, code);
    }
    if (!s->k16) memcpy(p, code, 4 * (size_t)units);
    else
        for (e = 0; e < units; e++) memcpy(p + 64 * (int64_t)e, code + 4 * e, 4);
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
    uint64_t mode;
    int32_t s = 0, h, i;
    if (r != ATTN_OK) return r;
    if (first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if (!slots && count > d->q_start[d->n_seq] - first) return ATTN_ERR_SHAPE;
    if (count > INT64_MAX - first) return ATTN_ERR_OVERFLOW;
    if ((r = attni_check_rows(k, d->n_kv_heads, first + count)) != ATTN_OK) return r;
    if ((r = attni_check_rows(v, d->n_kv_heads, first + count)) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 0, &side[0])) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &side[1])) != ATTN_OK) return r;
    if (slots && (r = ATTNI_CHECK_SLOTS(d, slots + first, count)) != ATTN_OK) return r;
    src[0] = k;
    src[1] = v;
    n_slots = (int64_t)d->kv.n_pages * d->kv.page_tokens;
    for (t = first; t < first + count; t++) { // look before touching memory
        slot = slots ? slots[t] : attni_own_slot(d, &s, t);
        if (slot >= n_slots || (slot < 0 && !slots)) return ATTN_ERR_PAGE;
    }
    attni_choose(d, &x);
    mode = attni_mode_enter();
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
    attni_mode_leave(mode);
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
        if ((r = ATTNI_CHECK_COPY(d, copies + i)) != ATTN_OK) return r;
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

typedef struct attni_part { // tokens of one tile that stand in one page
    int32_t t, n, page, place;
} attni_part;
// Where the tokens of a span are. What is not held stands on a neighbour (K, where it is masked) or
// on zeros (V).
typedef struct attni_rows {
    int32_t seq, head, span;   // seq -1: nothing
    uint32_t tiles;            // the 16-token tiles that are filled in
    attni_part *part;          // (256)
    int n_parts, has_scales;
    const uint8_t **k;         // (256) first units
    const void **v;            // (256 + AHEAD)
    float *ks, *vs;            // (256) scales
    const void **ahead;        // (256) the K rows again, as memory is asked for them
    const uint32_t *kt[ATTNI_TILES]; // K16: aligned tiles, else NULL
} attni_rows;

// Memory is fastest read from a few places at once: the order of tiles, and a token's place in the
// order of tokens, that walks through the four quarters of a span in turn.
ATTNI_INLINE int attni_tile_turn(int i) { return (i & 3) * 4 + (i >> 2); }
ATTNI_INLINE int attni_token_place(int t) { return (t & 63) * 4 + (t >> 6); }

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
    int v_dense;               // the V rows of a tile are one piece of memory
    int per_head;              // masks differ between the heads of a group
    // the task
    int32_t segment, kv_head, n_tokens, n_rows; // rows: heads of the group x tokens
    int32_t keep;              // tiles of K and V that are kept converted: all of a span, or 4
    int32_t r0, r1;            // the rows at work, whose scores stay in the first-level cache
    int32_t q_rows;            // so many rows of q are there
    int32_t *tok, *seq;        // (n_tokens) global query token, sequence
    int32_t *pos;              // (n_tokens) position
    void *q;                   // (n_rows + 32, ldq)
    float *o, *m, *l;          // (n_rows, vdp), (n_rows)
    // the span
    uint64_t (*bits)[4];       // (n_tokens or n_rows) visible keys
    uint16_t *tiles;           // per row block: 16-token tiles any of its rows sees
    float *s;                  // (64, LDS) scores of rows r0 .. r1, then weights
    uint16_t *p16;             // the same for bf16 weights
    float *sm, *sl;            // (64) maximum and sum of the span
    attni_row *row;            // (n_rows)
    float *os;                 // (64, vdp) weighted sums of rows r0 .. r1; 16 for attni_row_again
    attni_rows rows[2];        // this span and the next
    int next;                  // rows[1] holds what comes next
    const attn_task *then;     // what this thread will probably run after this task, or NULL
    const uint32_t **kt;       // (16) K16 tiles
    uint32_t *kraw;            // (16, k_units, 16)
    float *kf;                 // (16, head_dim, 16) f32
    float *vf;                 // (256, vdp) f32, or pairs
    float *add;                // (256)
} attni_work;

static const uint32_t attni_zeros[ATTN_MAX_HEAD_DIM + 16] = {0};

// A field's array of the scratch; with base NULL only counted.
#define ATTNI_CARVE(w, field, type, count)                                                         \
    if (base) (w)->field = (type)(void *)(base + at);                                              \
    at += (sizeof *(w)->field * (size_t)(count) + 63) & ~(size_t)63;

// Carves the scratch; with base NULL only counts.
ATTNI_CALLED size_t attni_work_carve(attni_work *w, uint8_t *base, int32_t n_tokens,
                                     int32_t n_rows) {
    size_t at = 0, r = (size_t)n_rows + ATTNI_RB_MAX, t = (size_t)n_tokens, vdp = (size_t)w->vdp;
    size_t dim = ((size_t)w->d->head_dim + 31) & ~(size_t)31;
    int i;
    ATTNI_CARVE(w, tok, int32_t *, t)
    ATTNI_CARVE(w, seq, int32_t *, t)
    ATTNI_CARVE(w, pos, int32_t *, t)
    if (base) w->q = base + at;
    at += r * (dim + 16) * 4;
    ATTNI_CARVE(w, o, float *, r * vdp)
    ATTNI_CARVE(w, m, float *, r)
    ATTNI_CARVE(w, l, float *, r)
    ATTNI_CARVE(w, bits, uint64_t(*)[4], r)
    ATTNI_CARVE(w, tiles, uint16_t *, r)
    ATTNI_CARVE(w, s, float *, 2 * ATTNI_RB_MAX * ATTNI_LDS)
    ATTNI_CARVE(w, p16, uint16_t *, 2 * ATTNI_RB_MAX * ATTNI_LDS)
    ATTNI_CARVE(w, sm, float *, 2 * ATTNI_RB_MAX)
    ATTNI_CARVE(w, sl, float *, 2 * ATTNI_RB_MAX)
    ATTNI_CARVE(w, row, attni_row *, r)
    ATTNI_CARVE(w, os, float *, (2 * ATTNI_RB_MAX + 16) * vdp)
    for (i = 0; i < 2; i++) {
        ATTNI_CARVE(w, rows[i].k, const uint8_t **, ATTN_SPAN)
        ATTNI_CARVE(w, rows[i].v, const void **, ATTN_SPAN + ATTNI_AHEAD)
        ATTNI_CARVE(w, rows[i].ahead, const void **, ATTN_SPAN)
        ATTNI_CARVE(w, rows[i].part, attni_part *, ATTN_SPAN)
        ATTNI_CARVE(w, rows[i].ks, float *, ATTN_SPAN)
        ATTNI_CARVE(w, rows[i].vs, float *, ATTN_SPAN)
    }
    ATTNI_CARVE(w, kt, const uint32_t **, ATTNI_TILES)
    ATTNI_CARVE(w, kraw, uint32_t *, ATTN_SPAN * dim)
    ATTNI_CARVE(w, kf, float *, ATTN_SPAN * dim)
    ATTNI_CARVE(w, vf, float *, ATTN_SPAN * vdp)
    ATTNI_CARVE(w, add, float *, ATTN_SPAN)
    return at;
}

ATTN_DEF size_t attn_cpu_scratch_bytes(const attn_desc *d, const attn_plan *p) {
    attni_work w;
    int32_t group, tile;
    if (!d || !p || d->n_kv_heads < 1 || d->n_heads < d->n_kv_heads) return 0;
    memset(&w, 0, sizeof w);
    w.d = d;
    w.vdp = (attni_v_dim(d) + 15) & ~15;
    group = d->n_heads / d->n_kv_heads;
    tile = attni_max32(1, (p->params.row_tile > 0 ? p->params.row_tile : 256) / group);
    return attni_work_carve(&w, NULL, tile, tile * group);
}

ATTNI_CALLED attn_result attni_work_init(attni_work *w, const attn_desc *d, const attn_plan *p) {
    attn_result r = attni_cpu_check(d);
    if (r != ATTN_OK) return r;
    if (!p || !attni_is_float(d->q.dtype) || !attni_is_float(d->o.dtype)) return ATTN_ERR_ARGUMENT;
    if (!d->q.data || !d->o.data) return ATTN_ERR_ARGUMENT;
    if (attni_device_list(&d->mask)) return ATTN_ERR_UNSUPPORTED;
    if (p->n_seq != d->n_seq || p->n_heads != d->n_heads || p->n_kv_heads != d->n_kv_heads ||
        p->head_dim != d->head_dim || p->v_head_dim != attni_v_dim(d) || p->params.rule[0].span)
        return ATTN_ERR_STALE;
    memset(w, 0, sizeof *w);
    w->d = d;
    w->p = p;
    if ((r = attni_side_init(d, 0, &w->k)) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &w->v)) != ATTN_OK) return r;
    attni_choose(d, &w->x);
    attni_masker_init(&w->masker, d);
    w->per_head = attni_per_head(d);
    w->group = d->n_heads / d->n_kv_heads;
    w->vdp = (p->v_head_dim + 15) & ~15;
    w->k_units = d->head_dim * attni_bits_of(d->kv.k.dtype) / 32;
    w->v_dense = w->v.token_bytes * 8 == (int64_t)w->v.dim * attni_bits_of(w->v.dtype) &&
                 d->kv.page_tokens % 16 == 0;
    w->scale = attni_scale(d);
    return ATTN_OK;
}

// ---- rows: which queries, and Q in the form the kernels take

// Rows r0 .. r1; those after them are asked for from memory.
ATTNI_CALLED void attni_load_q(attni_work *w) {
    const attn_desc *d = w->d;
    int64_t st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim;
    int64_t sh = d->q.stride_head ? d->q.stride_head : d->head_dim;
    const int64_t bytes = attni_bits_of(d->q.dtype) / 8;
    const int32_t n = d->head_dim, pad = (n + 31) & ~31;
    float f[ATTN_MAX_HEAD_DIM + 16];
    int64_t row_bytes;
    int32_t r, b;
    w->ldq = w->x.qk_kind == ATTNI_BDOT ? pad / 2 : w->x.qk_kind == ATTNI_IDOT ? pad + 8 : n;
    row_bytes = w->ldq * (w->x.qk_kind == ATTNI_IDOT ? 1 : 4);
    for (r = w->r0; r < w->r1; r++) {
        const attni_row *x = w->row + r,
                        *next = w->row + attni_min32(r + (w->r1 - w->r0), w->n_rows - 1);
        const uint8_t *q = (const uint8_t *)d->q.data;
        const uint8_t *src = q + (w->tok[x->token] * st + x->head * sh) * bytes;
        const uint8_t *ahead = q + (w->tok[next->token] * st + next->head * sh) * bytes;
        uint8_t *out = (uint8_t *)w->q + r * row_bytes;
        for (b = 0; b < n * bytes; b += 64) ATTNI_PREFETCH(ahead + b);
        if (w->x.qk_kind == ATTNI_BDOT) {
            memset(out, 0, (size_t)row_bytes);
            memcpy(out, src, 2 * (size_t)n);
        } else if (w->x.qk_kind == ATTNI_IDOT) {
            w->x.mv->widen(d->q.dtype, src, n, f);
            w->x.mv->codes(f, n, out);
        } else w->x.mv->widen(d->q.dtype, src, n, (float *)(void *)out); // up to 8 zeros more
    }
    w->q_rows = w->r1;
    if (w->r1 == w->n_rows) // kernels may take whole blocks of rows
        memset((uint8_t *)w->q + w->n_rows * row_bytes, 0, (size_t)(ATTNI_RB_MAX * row_bytes));
}

ATTNI_CALLED attn_result attni_load_rows(attni_work *w, const attn_task *t) {
    const attn_plan *p = w->p;
    const attn_segment *g = &p->segment[t->segment];
    int32_t i = 0, place, skip = t->first_token;
    w->segment = t->segment;
    w->kv_head = t->kv_head;
    w->n_tokens = t->n_tokens;
    w->n_rows = t->n_tokens * w->group;
    // many rows in one block: what is converted for them is used at once, from the nearest cache
    w->keep = w->n_rows > ATTNI_FEW && w->n_rows <= ATTNI_ONE && w->x.qk_kind == ATTNI_F32 &&
                      w->x.pv_kind == ATTNI_F32 && w->vdp % 64 == 0 ? 4 : ATTNI_TILES;
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
    for (i = 0; i < w->n_rows; i++) {
        // rows that stand together share masks: the heads of a token, or the tokens of a head
        attni_row *x = w->row + i;
        x->token = w->per_head ? i % w->n_tokens : i / w->group;
        x->head = w->kv_head * w->group + (w->per_head ? i / w->n_tokens : i % w->group);
        x->bits = w->bits[w->per_head ? i : x->token];
        x->add = NULL;
        x->alibi = x->alibi_first = 0;
        w->m[i] = attni_float(0xff800000u);
        w->l[i] = 0;
    }
    w->q_rows = 0;
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
            const uint64_t *b = w->row[i].bits;
            for (g = 0; g < 4; g++) u[g] |= b[g];
        }
        w->tiles[r / rb] = attni_tiles_of(u);
        if (w->x.isa == ATTN_CPU_AMX && w->x.pv_kind == ATTNI_BDOT) // its steps are 32 tokens
            w->tiles[r / rb] |=
                (uint16_t)((w->tiles[r / rb] & 0x5555u) << 1 | (w->tiles[r / rb] & 0xaaaau) >> 1);
        for (i = r; i < r + rb && i < w->n_rows; i++) w->row[i].tiles = w->tiles[r / rb];
        all |= w->tiles[r / rb];
    }
    return (uint16_t)all;
}

ATTNI_INLINE const uint8_t *attni_scales_at(const attni_side *s, const attni_part *p,
                                            int32_t head) {
    return s->data + p->page * s->page_bytes + attni_scale_offset(s, p->place, head);
}

ATTNI_CALLED void attni_side_scales(const attni_side *s, const attni_rows *x, float *out) {
    const float *fixed = s->head_scale ? s->head_scale + x->head : NULL;
    int32_t i, t;
    for (i = 0; i < x->n_parts; i++) {
        const attni_part *p = x->part + i;
        const uint8_t *at = attni_scales_at(s, p, x->head);
        if (!fixed && s->scale_token == 4) memcpy(out + p->t, at, 4 * (size_t)p->n);
        else
            for (t = 0; t < p->n; t++)
                memcpy(out + p->t + t, fixed ? (const uint8_t *)fixed : at + t * s->scale_token, 4);
    }
}

ATTNI_CALLED void attni_fetch_scales(const attni_side *s, const attni_rows *x) {
    int32_t i, t;
    for (i = 0; i < x->n_parts && !s->head_scale; i++) {
        const attni_part *p = x->part + i;
        const uint8_t *at = attni_scales_at(s, p, x->head);
        for (t = 0; t < p->n; t += s->scale_token < 64 ? 64 / (int32_t)s->scale_token : 1)
            ATTNI_PREFETCH(at + t * s->scale_token);
    }
}

// Fills in the rows of tiles of a span. Bad pages are errors, or zeros when one only looks ahead.
ATTNI_CALLED attn_result attni_find_rows(attni_work *w, int32_t s, int32_t head, int32_t span,
                                         uint32_t tiles, int looking, attni_rows *x) {
    const int32_t pt = w->d->kv.page_tokens;
    const attn_plan_seq *q = &w->p->seq[s];
    const int64_t j0 = (int64_t)span * ATTN_SPAN - q->kv_pos0;
    const int32_t lo = (int32_t)attni_max64(0, attni_min64(ATTN_SPAN, -j0)),
                  hi = (int32_t)attni_max64(0, attni_min64(ATTN_SPAN, q->kv_len - j0));
    const int kscale = attni_is_scaled(w->k.dtype), vscale = attni_is_scaled(w->v.dtype);
    const int64_t k_step = w->k.k16 ? 4 : w->k.token_bytes;
    int i, t;
    x->seq = s;
    x->head = head;
    x->span = span;
    x->tiles = tiles;
    x->n_parts = 0;
    for (i = 0; i < ATTNI_AHEAD; i++) x->v[ATTN_SPAN + i] = attni_zeros;
    for (i = 0; i < ATTNI_TILES; i++) {
        int32_t t0 = attni_max32(16 * i, lo), t1 = attni_min32(16 * i + 16, hi), end;
        x->kt[i] = NULL;
        if (!((tiles >> i) & 1u)) t1 = t0;
        if (t1 - t0 < 16)
            for (t = 16 * i; t < 16 * i + 16; t++) {
                x->k[t] = NULL;
                x->v[t] = x->ahead[attni_token_place(t)] = attni_zeros;
                x->ks[t] = x->vs[t] = 0;
            }
        for (t = t0; t < t1; t = end) { // up to the end of the tile or page
            int32_t place = (int32_t)((j0 + t) % pt);
            int32_t page = attni_page_of(w->d, s, (int32_t)(j0 + t));
            const uint8_t *k, *v, *look;
            int64_t look_step = w->k.token_bytes;
            end = attni_min32(t1, t + (pt - place));
            if (page < 0) {
                if (!looking) return ATTN_ERR_PAGE;
                x->tiles &= ~(1u << i); // to be found bad when it is wanted
                for (; t < end; t++) {
                    x->v[t] = x->ahead[attni_token_place(t)] = attni_zeros;
                    x->k[t] = (const uint8_t *)attni_zeros;
                }
                continue;
            }
            if (w->k.k16) end = attni_min32(end, t + (16 - place % 16));
            k = look = w->k.data + page * w->k.page_bytes + attni_token_offset(&w->k, place, head);
            v = w->v.data + page * w->v.page_bytes + attni_token_offset(&w->v, place, head);
            if (w->k.k16) look_step = 4 * w->k_units;
            if (w->k.k16 && t == 16 * i && place % 16 == 0)
                x->kt[i] = (const uint32_t *)(const void *)k;
            if (kscale || vscale) {
                attni_part *part = x->part + x->n_parts++;
                part->t = t;
                part->n = end - t;
                part->page = page;
                part->place = place;
            }
            for (; t < end; t++, k += k_step, v += w->v.token_bytes, look += look_step) {
                x->k[t] = k;
                x->v[t] = v;
                x->ahead[attni_token_place(t)] = look;
            }
        }
        for (t = 16 * i; t < 16 * i + 16 && t0 < t1 && t1 - t0 < 16; t++)
            if (!x->k[t]) x->k[t] = x->k[t0];
    }
    x->has_scales = !looking;
    if (kscale) looking ? attni_fetch_scales(&w->k, x) : attni_side_scales(&w->k, x, x->ks);
    if (vscale) looking ? attni_fetch_scales(&w->v, x) : attni_side_scales(&w->v, x, x->vs);
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

// What a pass over V asks for meanwhile: from memory what comes next; when V is kept for many
// blocks of rows, V itself a little ahead, which comes from the second-level cache.
ATTNI_INLINE const void *const *attni_ahead(const attni_work *w) {
    return w->n_rows > ATTNI_ONE ? w->rows[0].v + ATTNI_AHEAD
                                 : w->next ? w->rows[1].ahead : w->rows[0].v;
}

// Makes rows of V what the kernel reads: f32 rows for the types without a kernel of their own or
// when many rows share the work, pairs for the bf16 dot. row: 256 pointers, replaced.
ATTNI_CALLED attni_pv_fn attni_prepare_v(attni_work *w, const void **row, uint32_t tiles) {
    attn_dtype t = w->v.dtype;
    attni_run run[ATTNI_TILES];
    const void *const *ahead = w->next ? w->rows[1].ahead : w->rows[0].v;
    int n = attni_runs_of(tiles, run), i, j, b, vd = w->p->v_head_dim;
    int look = w->next ? 4 * w->k_units : 0;
    if (w->x.pv_kind == ATTNI_BDOT) {
        w->x.mv->pairs(row, run, n, vd, w->vdp, ahead, (uint32_t *)(void *)w->vf);
        row[0] = w->vf;
        return w->x.pv;
    }
    if (t == ATTN_F32 ? vd == w->vdp // the direct kernels take whole blocks of columns
                      : vd % 16 == 0 && vd >= 64 && w->n_rows <= ATTNI_FEW && w->x.ma->pv[t])
        return w->x.ma->pv[t];
    for (i = 0; i < n; i++)
        for (j = run[i].t0; j < run[i].t1; j++) {
            float *out = w->vf + (int64_t)(j % (16 * w->keep)) * w->vdp;
            if (w->keep == ATTNI_TILES)
                for (b = 0; b < look; b += 64) ATTNI_PREFETCH((const uint8_t *)ahead[j] + b);
            w->x.mv->widen(row[j] == (const void *)attni_zeros ? ATTN_F32 : t, row[j], vd, out);
            row[j] = out;
        }
    return w->x.ma->pv[ATTN_F32];
}

// Finds the rows of what comes after this span: the segment's next, or the first of the task to
// come, if its sequence is as the plan saw it.
ATTNI_CALLED void attni_look_ahead(attni_work *w, int32_t span) {
    const attn_plan *p = w->p;
    int32_t s = w->seq[0], head = w->kv_head;
    if (++span >= p->segment[w->segment].span1) {
        const attn_segment *g;
        if (!w->then) return;
        g = &p->segment[w->then->segment];
        s = p->order[g->seq0];
        head = w->then->kv_head;
        span = g->span0;
        if (span >= g->span1 || w->d->kv.kv_len[s] != p->seq[s].kv_len ||
            attni_kv_pos0(w->d, s) != p->seq[s].kv_pos0)
            return;
    }
    attni_find_rows(w, s, head, span, 0xffffu, 1, &w->rows[1]);
    w->next = 1;
}

// Rows of a span.
ATTNI_CALLED attn_result attni_load_span(attni_work *w, int32_t span, uint32_t tiles) {
    attni_rows *x = &w->rows[0];
    if (w->next && w->rows[1].span == span && w->rows[1].seq == w->seq[0] &&
        w->rows[1].head == w->kv_head) {
        attni_rows swap = w->rows[0];
        w->rows[0] = w->rows[1];
        w->rows[1] = swap;
    } else x->seq = -1;
    w->next = 0;
    if (x->seq < 0 || (tiles & ~x->tiles)) {
        attn_result r = attni_find_rows(w, w->seq[0], w->kv_head, span, tiles, 0, x);
        if (r != ATTN_OK) return r;
    } else if (!x->has_scales) {
        if (attni_is_scaled(w->k.dtype)) attni_side_scales(&w->k, x, x->ks);
        if (attni_is_scaled(w->v.dtype)) attni_side_scales(&w->v, x, x->vs);
        x->has_scales = 1;
    }
    attni_look_ahead(w, span);
    return ATTN_OK;
}

// ---- scores, weights, sums

// K tiles as the kernel reads them: packed where they do not lie so already (V of the same tokens
// is asked for meanwhile); f32 for the types without a kernel of their own or when many rows share
// the work. Returns the kernel.
ATTNI_CALLED attni_qk_fn attni_prepare_k(attni_work *w, uint32_t tiles, int *units) {
    const attni_rows *x = &w->rows[0];
    const attn_dtype type = w->k.dtype;
    const attni_qk_fn direct =
        type == ATTN_F32 || w->n_rows <= ATTNI_FEW ? w->x.ma->qk[type] : NULL;
    const int widen = w->x.qk_kind == ATTNI_F32 && !direct;
    // half of the V rows when the scores ask for the other half
    const int half = w->v_dense && w->n_rows <= ATTNI_ONE;
    int i, t, turn;
    for (turn = 0; turn < ATTNI_TILES; turn++) {
        const uint8_t *ahead[16];
        int64_t slot;
        uint32_t *raw;
        i = w->keep == ATTNI_TILES ? attni_tile_turn(turn) : turn;
        slot = 16 * (i % w->keep);
        raw = w->kraw + slot * w->k_units;
        if (!((tiles >> i) & 1u)) continue;
        w->kt[i] = x->kt[i];
        if (!w->kt[i]) {
            if (!x->k[16 * i]) memset(raw, 0, 64 * (size_t)w->k_units); // nothing held
            else {
                for (t = 0; t < 16; t++) {
                    int row = half ? 2 * (turn % 4) + t / 4 % 2 : 4 * (turn % 4) + t / 4;
                    ahead[t] = (const uint8_t *)x->v[16 * (turn / 4 + 4 * (t % 4)) + row];
                }
                w->x.mv->pack(x->k + 16 * i, w->k.k16 ? 64 : 4, w->k_units, raw, ahead);
            }
            w->kt[i] = raw;
        }
        if (widen) {
            float *out = w->kf + slot * w->d->head_dim;
            w->x.mv->widen_tile(type, w->kt[i], w->k_units, out);
            w->kt[i] = (const uint32_t *)(const void *)out;
        }
    }
    *units = widen ? w->d->head_dim : w->k_units;
    return w->x.qk_kind != ATTNI_F32 ? w->x.qk : widen ? w->x.ma->qk[ATTN_F32] : direct;
}

// Scores of rows r0 .. r1, 64 tokens at a time when there are many: their K stays in the
// first-level cache. qk NULL: K is prepared here.
ATTNI_CALLED void attni_scores(attni_work *w, attni_qk_fn qk, int units, uint32_t tiles) {
    const attni_rows *x = &w->rows[0];
    const int few = w->n_rows <= ATTNI_FEW, here = !qk, n_panel = few ? ATTNI_TILES : 4;
    const int whole = w->k.k16; // packing has not asked for half of V
    int64_t q_bytes = w->ldq * (w->x.qk_kind == ATTNI_IDOT ? 1 : 4);
    int panel, i, r, turn, look;
    for (panel = 0; panel < ATTNI_TILES; panel += n_panel) {
        uint32_t in = tiles & ((few ? 0xffffu : 15u) << panel);
        if (!in) continue;
        if (here) qk = attni_prepare_k(w, in, &units);
        // V of the same tokens, as much per unit of K as it takes
        look = w->n_rows > ATTNI_ONE || !w->v_dense
                   ? 0 : (int)((whole ? 16 : 8) * w->v.token_bytes / units);
        for (r = w->r0; r < w->r1; r += w->x.rb) {
            const uint32_t *kt[ATTNI_TILES + 3];
            const uint8_t *ahead[ATTNI_TILES + 3];
            uint8_t col[ATTNI_TILES + 3];
            uint32_t mine = in & w->tiles[r / w->x.rb];
            int n = 0;
            for (turn = 0; turn < n_panel; turn++) {
                i = few ? attni_tile_turn(turn) : panel + turn;
                if (!((mine >> i) & 1u)) continue;
                kt[n] = w->kt[i];
                ahead[n] = look ? (const uint8_t *)x->v[16 * i + (whole ? 0 : 8)]
                                : (const uint8_t *)kt[n];
                col[n++] = (uint8_t)i;
            }
            for (i = n; n && i < n + 3; i++)
                kt[i] = kt[n - 1], ahead[i] = ahead[n - 1], col[i] = col[n - 1];
            if (n)
                qk((const uint8_t *)w->q + r * q_bytes, w->ldq, attni_min32(w->x.rb, w->r1 - r), kt,
                   ahead, look, col, n, units, w->s + (int64_t)(r - w->r0) * ATTNI_LDS);
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
            ATTNI_PIN(x);
        }
        if (b->data)
            x += attni_get(b->data, b->dtype,
                           head * b->stride_head + w->tok[i] * b->stride_token + j0 + t);
        w->add[t] = x;
    }
    return w->add;
}

ATTNI_CALLED void attni_weights(attni_work *w, int32_t span) {
    const attn_logits *c = &w->d->logits;
    attni_soft a;
    int32_t r, first = w->r0;
    a.k_scale = attni_is_scaled(w->k.dtype) ? w->rows[0].ks : NULL;
    a.v_scale = attni_is_scaled(w->v.dtype) ? w->rows[0].vs : NULL;
    a.scale = w->scale;
    a.softcap = c->softcap;
    a.m = w->sm;
    a.l = w->sl;
    for (r = w->r0; r < w->r1; r++) {
        attni_row *x = w->row + r;
        x->s = w->s + (r - w->r0) * ATTNI_LDS;
        x->p16 = w->x.pv_kind == ATTNI_BDOT ? w->p16 + (r - w->r0) * ATTNI_LDS : NULL;
        if (c->alibi || c->bias.data) {
            const attn_plan_seq *q = &w->p->seq[w->seq[x->token]];
            int tree = c->alibi && w->d->mask.kind == ATTN_MASK_TREE && !q->is_chain &&
                       (int64_t)(span + 1) * ATTN_SPAN > q->q_pos0;
            x->alibi = c->alibi && !tree ? c->alibi[x->head] : 0;
            x->alibi_first = (float)((int64_t)span * ATTN_SPAN - w->pos[x->token]);
            x->add = attni_row_add(w, x->token, x->head, span, tree);
        }
        if (x->add || r + 1 == w->r1) { // there is one buffer for what is added
            w->x.ma->soft(&a, w->row + first, r + 1 - first);
            a.m += r + 1 - first;
            a.l += r + 1 - first;
            first = r + 1;
        }
    }
}

static const void *attni_row_weights(const attni_work *w, int32_t r) {
    int32_t at = (r - w->r0) * ATTNI_LDS;
    return w->x.pv_kind == ATTNI_BDOT ? (const void *)(w->p16 + at) : (const void *)(w->s + at);
}

// A row whose sum holds Inf or NaN: again, with zeros for the V rows its own mask hides, since 0 *
// NaN of another row's token must not reach it.
ATTNI_CALLED void attni_row_again(attni_work *w, int32_t span, int32_t r, uint32_t tiles,
                                  float *out) {
    const void *row[ATTN_SPAN];
    const uint64_t *b = w->row[r].bits;
    attni_run run[ATTNI_TILES];
    attni_pv_fn pv;
    const void *p = attni_row_weights(w, r);
    int t, n = attni_runs_of(tiles, run);
    w->keep = ATTNI_TILES; // all at once here
    for (t = 0; t < ATTN_SPAN; t++) {
        row[t] = attni_zeros;
        if ((b[t / 64] >> (t % 64)) & 1u) {
            const attn_plan_seq *q = &w->p->seq[w->seq[0]];
            int64_t j = (int64_t)span * ATTN_SPAN + t - q->kv_pos0;
            int32_t page = attni_page_of(w->d, w->seq[0], (int32_t)j);
            row[t] = w->v.data + page * w->v.page_bytes +
                     attni_token_offset(&w->v, (int32_t)(j % w->d->kv.page_tokens), w->kv_head);
        }
    }
    pv = attni_prepare_v(w, row, tiles);
    pv(p, 1, row, row, run, n, 0, w->vdp, w->os + 2 * ATTNI_RB_MAX * (int64_t)w->vdp, w->vdp);
    memcpy(out, w->os + 2 * ATTNI_RB_MAX * (int64_t)w->vdp, 4 * (size_t)w->vdp);
}

static float *attni_partial(const attni_work *w, const attn_segment *g, const attn_task *t,
                            float *base, int32_t slot, int32_t r) {
    int64_t token = t->first_token + w->row[r].token;
    token += (int64_t)slot * g->n_tokens;
    return base + (g->partial + token * w->p->n_heads + w->row[r].head) * (w->p->v_head_dim + 2);
}

static void attni_put_partial(const attni_work *w, float *dst, const float *o, float m, float l) {
    memcpy(dst, o, 4 * (size_t)w->p->v_head_dim);
    dst[w->p->v_head_dim] = m;
    dst[w->p->v_head_dim + 1] = l;
}

// Folds the weighted sums of rows r0 .. r1 into their O, or stores them as partials of the span.
// pv NULL: V is prepared here.
ATTNI_CALLED void attni_sums(attni_work *w, attni_pv_fn pv, const attn_task *t, int32_t span,
                             uint32_t tiles, float *partials) {
    const attn_segment *g = &w->p->segment[t->segment];
    const int64_t vdp = w->vdp;
    const int keep = w->keep, here = !pv;
    attni_run run[ATTNI_TILES];
    int n, panel;
    int32_t r, i;
    for (panel = 0; panel < ATTNI_TILES; panel += keep) {
        uint32_t before = (1u << panel) - 1, in = tiles & (((1u << keep) - 1) << panel);
        if (!in) continue;
        if (here) pv = attni_prepare_v(w, w->rows[0].v, in);
        for (r = w->r0; r < w->r1; r += w->x.rb) {
            n = attni_runs_of(in & w->tiles[r / w->x.rb], run);
            if (n)
                pv(attni_row_weights(w, r), attni_min32(w->x.rb, w->r1 - r), w->rows[0].v,
                   attni_ahead(w), run, n, (before & w->tiles[r / w->x.rb]) != 0, w->vdp,
                   w->os + (r - w->r0) * vdp, vdp);
        }
    }
    for (r = w->r0; r < w->r1; r += w->x.rb) {
        int nr = attni_min32(w->x.rb, w->r1 - r);
        float *os = w->os + (r - w->r0) * vdp;
        uint32_t mine = w->tiles[r / w->x.rb];
        if (!mine || !w->x.mv->special(os, nr * vdp)) continue;
        for (i = 0; i < nr; i++) attni_row_again(w, span, r + i, mine, os + i * vdp);
        w->keep = keep;
        // its V stands where the other rows' did
        attni_find_rows(w, w->seq[0], w->kv_head, span, tiles, 0, &w->rows[0]);
        if (!here) attni_prepare_v(w, w->rows[0].v, tiles);
    }
    if (g->n_slots <= 1)
        w->x.ma->fold(w->o + w->r0 * vdp, w->m + w->r0, w->l + w->r0, w->os, w->sm, w->sl,
                      w->r1 - w->r0, w->vdp);
    for (r = w->r0; r < w->r1 && g->n_slots > 1; r++)
        attni_put_partial(w, attni_partial(w, g, t, partials, span - g->span0, r),
                          w->os + (r - w->r0) * vdp, w->sm[r - w->r0], w->sl[r - w->r0]);
}

// ---- results

// Normalises one row and writes O and LSE. o: padded to 16, spoiled.
ATTNI_CALLED void attni_write_row(const attn_desc *d, const attni_exec *x, int32_t token,
                                  int32_t head, float *o, float m, float l) {
    int32_t vd = attni_v_dim(d);
    int64_t st = d->o.stride_token ? d->o.stride_token : (int64_t)d->n_heads * vd;
    int64_t sh = d->o.stride_head ? d->o.stride_head : vd;
    uint32_t none = 0xff800000u, nan = 0x7fc00000u; // as bits: constants may be assumed finite
    float sink;
    uint8_t *dst =
        (uint8_t *)d->o.data + (token * st + head * sh) * (attni_bits_of(d->o.dtype) / 8);
    memcpy(&sink, d->logits.sink ? (const void *)&d->logits.sink[head] : (const void *)&none, 4);
    x->ma->finish(o, &m, &l, sink, (vd + 15) & ~15);
    x->mv->narrow(d->o.dtype, o, vd, dst);
    if (!d->lse) return;
    if (!attni_finite(l)) memcpy(&m, &nan, 4);
    else if (attni_finite(m)) m = (float)((double)m + attni_ln((double)l));
    d->lse[(int64_t)token * d->n_heads + head] = m;
}

// Tokens [t0, t1) of the next span to the second-level cache, while many rows are at work on this.
ATTNI_CALLED void attni_fetch_next(const attni_work *w, int32_t t0, int32_t t1) {
    const attni_rows *x = &w->rows[1];
    int64_t k = 4 * (int64_t)w->k_units, v = w->v.dim * attni_bits_of(w->v.dtype) / 8, b;
    if (!w->next) return;
    for (; t0 < t1; t0++) {
        for (b = 0; b < k; b += 64) ATTNI_PREFETCH_L2((const uint8_t *)x->ahead[t0] + b);
        for (b = 0; b < v; b += 64) ATTNI_PREFETCH_L2((const uint8_t *)x->v[t0] + b);
    }
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
            int units = 0, block = w->n_rows <= ATTNI_ONE ? w->n_rows : w->x.rb;
            attni_qk_fn qk = NULL;
            attni_pv_fn pv = NULL;
            if ((r = attni_load_span(w, span, tiles)) != ATTN_OK) return r;
            if (block < w->n_rows) qk = attni_prepare_k(w, tiles, &units);
            for (w->r0 = 0; w->r0 < w->n_rows; w->r0 += block) {
                w->r1 = attni_min32(w->n_rows, w->r0 + block);
                if (w->q_rows < w->r1) attni_load_q(w);
                attni_scores(w, qk, units, tiles);
                attni_weights(w, span);
                if (!pv && block < w->n_rows) pv = attni_prepare_v(w, w->rows[0].v, tiles);
                if (block < w->n_rows)
                    attni_fetch_next(w, ATTN_SPAN * w->r0 / w->n_rows,
                                     ATTN_SPAN * w->r1 / w->n_rows);
                attni_sums(w, pv, t, span, tiles, partials);
            }
        } else if (g->n_slots > 1) {
            for (i = 0; i < w->n_rows; i++)
                attni_partial(w, g, t, partials, span - g->span0, i)[w->p->v_head_dim] =
                    attni_float(0xff800000u);
        }
    }
    for (i = 0; i < w->n_rows && g->n_slots <= 1; i++) {
        float *o = w->o + (int64_t)i * w->vdp;
        if (g->n_slots == 1)
            attni_put_partial(w, attni_partial(w, g, t, partials, 0, i), o, w->m[i], w->l[i]);
        else
            attni_write_row(w->d, &w->x, w->tok[w->row[i].token], w->row[i].head, o, w->m[i],
                            w->l[i]);
    }
    return ATTN_OK;
}

// ==== >>impl-run  ================================================================================

ATTN_DEF void attn_cpu_plan_params(const attn_desc *d, int32_t workers, attn_plan_params *out) {
    int64_t rows, spans = 1, bytes, cap = (int64_t)64 << 20;
    int32_t s;
    if (!out) return;
    memset(out, 0, sizeof *out);
    out->workers = workers > 0 ? workers : 1;
    out->row_tile = 256;
    if (!d || d->n_seq < 1 || !d->q_start || !d->kv.kv_len || d->n_heads < 1) return;
    if (d->q_start[d->n_seq] < 0 || attni_v_dim(d) < 1) return; // d need not be valid
    for (s = 0; s < d->n_seq; s++)
        spans = attni_max64(spans, (int64_t)d->kv.kv_len[s] / ATTN_SPAN + 3);
    rows = (int64_t)d->q_start[d->n_seq] * d->n_heads;
    // fewer conversions of K and V; rows of block lists differ too much
    if (!d->mask.blocks.row_start && rows / 512 >= 8 * (int64_t)out->workers) out->row_tile = 512;
    bytes = attni_v_dim(d) + 2;
    bytes = rows > cap / (4 * bytes * spans) ? cap : rows * spans * bytes * 4;
    out->partial_bytes = (size_t)bytes;
}

#ifdef ATTN_CHECK

// A row of O as it was written.
static attn_result attni_check_written(const attn_desc *d, int32_t token, int32_t head) {
    float o[ATTN_MAX_HEAD_DIM];
    int32_t vd = attni_v_dim(d), e;
    int64_t st = d->o.stride_token ? d->o.stride_token : (int64_t)d->n_heads * vd;
    int64_t sh = d->o.stride_head ? d->o.stride_head : vd;
    for (e = 0; e < vd; e++) o[e] = attni_get(d->o.data, d->o.dtype, token * st + head * sh + e);
    return attn_check_row(d, token, head, 0, INT64_MAX, o,
                          d->lse ? d->lse + (int64_t)token * d->n_heads + head : NULL);
}

// A partial row: keys [span0, span1).
static attn_result attni_check_partial(const attn_desc *d, int32_t token, int32_t head,
                                       int32_t span0, int32_t span1, const float *x) {
    float o[ATTN_MAX_HEAD_DIM], m, l, lse;
    int32_t vd = attni_v_dim(d), e, seen;
    m = x[vd];
    l = x[vd + 1];
    seen = attni_bits32(m) != 0xff800000u && l > 0;
    for (e = 0; e < vd; e++) o[e] = seen ? x[e] / l : 0;
    lse = seen && attni_finite(l) ? (float)((double)m + attni_ln((double)l)) : m;
    return attn_check_row(d, token, head, (int64_t)span0 * ATTN_SPAN, (int64_t)span1 * ATTN_SPAN,
                          o, &lse);
}

static attn_result attni_check_run(attni_work *w, int32_t first, int32_t count, float *partials) {
    uint32_t turn = (uint32_t)ATTNI_CHECK_NEXT(), pick = turn * 2654435761u;
    const attn_segment *g;
    const attn_task *t;
    attn_result r;
    int32_t row, token, head, slot;
    ATTNI_CHECK_SPOIL(w->d, partials);
    if (count == 0 || turn % ATTNI_CHECK_EVERY != 0) return ATTN_OK;
    t = w->p->task + first + (int32_t)((pick >> 16) % (uint32_t)count);
    g = w->p->segment + t->segment;
    if ((r = attni_load_rows(w, t)) != ATTN_OK) return r;
    row = (int32_t)((pick >> 8) % (uint32_t)w->n_rows);
    token = w->tok[w->row[row].token];
    head = w->row[row].head;
    if (g->n_slots == 0) return attni_check_written(w->d, token, head);
    slot = (int32_t)(pick % (uint32_t)g->n_slots);
    return attni_check_partial(w->d, token, head, g->span0 + slot,
                               g->n_slots == 1 ? g->span1 : g->span0 + slot + 1,
                               attni_partial(w, g, t, partials, slot, row));
}

static attn_result attni_check_merge(attni_work *w, int32_t first, int32_t count) {
    uint32_t turn = (uint32_t)ATTNI_CHECK_NEXT(), pick = turn * 2654435761u;
    const attn_merge *u;
    int32_t token;
    if (count == 0 || turn % ATTNI_CHECK_EVERY != 0) return ATTN_OK;
    u = w->p->merge + first + (pick >> 16) % (uint32_t)count;
    token = u->first_token + (int32_t)((pick >> 8) % (uint32_t)u->n_tokens);
    return attni_check_written(w->d, w->p->seq[u->seq].q_begin + token,
                               (int32_t)(pick % (uint32_t)w->d->n_heads));
}

#endif // ATTN_CHECK

ATTN_DEF attn_result attn_cpu_run(const attn_desc *d, const attn_plan *p, int32_t first,
                                  int32_t count, void *partials, void *scratch) {
    attni_work w;
    attn_result r = attni_work_init(&w, d, p);
    uint64_t mode = 0;
    int32_t i, tile;
    if (r != ATTN_OK || (r = ATTNI_CHECK_TABLES(d)) != ATTN_OK) return r;
    if (first < 0 || count < 0 || count > p->n_tasks - first) return ATTN_ERR_ARGUMENT;
    if (!scratch || (uintptr_t)scratch % 64 || (p->partial_rows && !partials))
        return ATTN_ERR_BUFFER;
    tile = attni_max32(1, (p->params.row_tile > 0 ? p->params.row_tile : 256) / w.group);
    attni_work_carve(&w, (uint8_t *)scratch, tile, tile * w.group);
    ATTNI_AMX_BEGIN(&w.x);
    if (d->numerics == ATTN_NUMERICS_PORTABLE) mode = attni_mode_enter();
    for (i = first; i < first + count && r == ATTN_OK; i++) {
        // workers that take tasks in turn: a guess, which only prefetches
        int64_t then = i + (int64_t)(i + 1 < first + count ? 1 : attni_max32(1, p->params.workers));
        w.then = then < p->n_tasks ? &p->task[then] : NULL;
        r = attni_run_task(&w, &p->task[i], (float *)partials);
    }
    if (d->numerics == ATTN_NUMERICS_PORTABLE) attni_mode_leave(mode);
    ATTNI_AMX_END(&w.x);
    return r == ATTN_OK ? ATTNI_CHECK_RUN(&w, first, count, partials) : r;
}

ATTNI_CALLED void attni_merge_rows(attni_work *w, const attn_merge *u, const float *partials) {
    const attn_plan *p = w->p;
    const attn_plan_seq *q = &p->seq[u->seq];
    int32_t t, h, c, i, slot, vd = p->v_head_dim;
    float o[ATTN_MAX_HEAD_DIM + 16], x[ATTN_MAX_HEAD_DIM + 16], m[16], l[16], ms[16], ls[16];
    memset(x, 0, sizeof x);
    memset(m, 0, sizeof m);
    memcpy(l, m, sizeof l);
    memcpy(ms, m, sizeof ms);
    memcpy(ls, m, sizeof ls);
    for (t = u->first_token; t < u->first_token + u->n_tokens; t++)
        for (h = 0; h < p->n_heads; h++) {
            m[0] = attni_float(0xff800000u);
            l[0] = 0;
            for (c = 0; c < q->n_chain; c++) { // left fold from the first token on
                const attn_segment *g = &p->segment[p->chain[q->chain + c]];
                int64_t before = 0;
                for (i = g->seq0; i < q->place; i++) before += p->seq[p->order[i]].q_len;
                for (slot = 0; slot < g->n_slots; slot++) {
                    int64_t row =
                        g->partial + ((int64_t)slot * g->n_tokens + before + t) * p->n_heads + h;
                    const float *src = partials + row * (vd + 2);
                    if (attni_bits32(src[vd]) == 0xff800000u) continue;
                    memcpy(x, src, 4 * (size_t)vd);
                    ms[0] = src[vd];
                    ls[0] = src[vd + 1];
                    w->x.ma->fold(o, m, l, x, ms, ls, 1, w->vdp);
                }
            }
            attni_write_row(w->d, &w->x, q->q_begin + t, h, o, m[0], l[0]);
        }
}

ATTN_DEF attn_result attn_cpu_merge(const attn_desc *d, const attn_plan *p, int32_t first,
                                    int32_t count, const void *partials) {
    attni_work w;
    attn_result r = attni_work_init(&w, d, p);
    uint64_t mode = 0;
    int32_t i;
    if (r != ATTN_OK || (r = ATTNI_CHECK_TABLES(d)) != ATTN_OK) return r;
    if (first < 0 || count < 0 || count > p->n_merges - first) return ATTN_ERR_ARGUMENT;
    if (count && !partials) return ATTN_ERR_BUFFER;
    if (d->numerics == ATTN_NUMERICS_PORTABLE) mode = attni_mode_enter();
    for (i = first; i < first + count; i++)
        attni_merge_rows(&w, &p->merge[i], (const float *)partials);
    if (d->numerics == ATTN_NUMERICS_PORTABLE) attni_mode_leave(mode);
    return ATTNI_CHECK_MERGE(&w, first, count);
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

// ==== >>impl-scan  Scores of some queries against keys anywhere, for selectors ===================

enum { ATTNI_SCAN_ROWS = 64 };

// One thread's state while it selects; the arrays lie in its scratch. Scores are f32 sums of
// products of the stored values, whatever the problem's numerics.
typedef struct attni_scan {
    const attn_desc *d;
    const attn_select *f;      // filled in
    const attn_selection *x;
    const attn_summary *y;     // or NULL
    attni_exec e;
    attni_side k;
    int32_t units, group;
    float scale;
    // keys: up to 256 in tiles of 16
    int32_t n_tiles;
    const uint32_t *kt[ATTNI_TILES + 3];
    float *ks;                 // (256) scales, 1 without
    uint32_t *raw;             // (256 * units)
    float *kf;                 // (256 * head_dim)
    float *q;                  // (SCAN_ROWS + RB_MAX, head_dim + 16)
    float *s;                  // (SCAN_ROWS + RB_MAX, LDS)
    uint8_t *rest;             // what the method itself wants, rest_bytes
} attni_scan;

ATTNI_CALLED size_t attni_scan_carve(attni_scan *c, uint8_t *base, const attn_desc *d) {
    size_t at = 0, dim = ((size_t)d->head_dim + 31) & ~(size_t)31;
    ATTNI_CARVE(c, ks, float *, ATTN_SPAN)
    ATTNI_CARVE(c, raw, uint32_t *, ATTN_SPAN * dim)
    ATTNI_CARVE(c, kf, float *, ATTN_SPAN * dim)
    ATTNI_CARVE(c, q, float *, (ATTNI_SCAN_ROWS + ATTNI_RB_MAX) * (dim + 16))
    ATTNI_CARVE(c, s, float *, (ATTNI_SCAN_ROWS + ATTNI_RB_MAX) * ATTNI_LDS)
    if (base) c->rest = base + at;
    return at;
}

ATTNI_CALLED attn_result attni_scan_init(attni_scan *c, const attn_desc *d, const attn_select *f,
                                         const attn_summary *y, const attn_selection *x,
                                         uint8_t *scratch) {
    attn_desc plain = *d; // f32 scores whatever the problem runs on
    attn_result r;
    memset(c, 0, sizeof *c);
    c->d = d;
    c->f = f;
    c->x = x;
    c->y = y && y->data ? y : NULL;
    if ((r = attni_side_init(d, 0, &c->k)) != ATTN_OK) return r;
    plain.o.dtype = ATTN_F32;
    if (d->numerics == ATTN_NUMERICS_APPROX) plain.numerics = ATTN_NUMERICS_FAST;
    attni_choose(&plain, &c->e);
    c->units = d->head_dim * attni_bits_of(d->kv.k.dtype) / 32;
    c->group = d->n_heads / d->n_kv_heads;
    c->scale = attni_scale(d);
    attni_scan_carve(c, scratch, d);
    return ATTN_OK;
}

// Row r of q: query token t, one head; NULL out: q's own row.
ATTNI_CALLED void attni_scan_query(attni_scan *c, int32_t r, int64_t t, int32_t head, float *out) {
    const attn_desc *d = c->d;
    int64_t st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim;
    int64_t sh = d->q.stride_head ? d->q.stride_head : d->head_dim;
    const uint8_t *src = (const uint8_t *)d->q.data;
    src += (t * st + head * sh) * (attni_bits_of(d->q.dtype) / 8);
    c->e.mv->widen(d->q.dtype, src, d->head_dim, out ? out : c->q + (int64_t)r * d->head_dim);
}

// Takes n <= 256 keys of a sequence and KV head, at the positions pos[], or first + i without pos;
// positions that are not held score 0. ERR_PAGE.
ATTNI_CALLED attn_result attni_scan_keys(attni_scan *c, int32_t seq, int32_t kv_head,
                                         const int32_t *pos, int64_t first, int32_t n) {
    const attn_desc *d = c->d;
    const int64_t kv_pos0 = attni_kv_pos0(d, seq), kv_len = d->kv.kv_len[seq];
    const int32_t pt = d->kv.page_tokens;
    const uint8_t *key[16], *ahead[16];
    int32_t i, t;
    c->n_tiles = (n + 15) / 16;
    for (i = 0; i < c->n_tiles; i++) {
        uint32_t *raw = c->raw + 16 * i * (int64_t)c->units;
        const uint8_t *any = NULL;
        for (t = 0; t < 16; t++) {
            int64_t j = (pos && 16 * i + t < n ? pos[16 * i + t] : first + 16 * i + t) - kv_pos0;
            int32_t page;
            key[t] = NULL;
            c->ks[16 * i + t] = 0;
            if (16 * i + t >= n || j < 0 || j >= kv_len) continue;
            if ((page = attni_page_of(d, seq, (int32_t)j)) < 0) return ATTN_ERR_PAGE;
            any = key[t] = c->k.data + page * c->k.page_bytes +
                           attni_token_offset(&c->k, (int32_t)(j % pt), kv_head);
            c->ks[16 * i + t] = attni_token_scale(&c->k, page, (int32_t)(j % pt), kv_head);
        }
        c->kt[i] = raw;
        if (!any) {
            memset(raw, 0, 64 * (size_t)c->units);
        } else {
            for (t = 0; t < 16; t++) {
                if (!key[t]) key[t] = any;
                ahead[t] = key[t];
            }
            c->e.mv->pack(key, c->k.k16 ? 64 : 4, c->units, raw, ahead);
        }
        if (c->k.dtype != ATTN_F32) {
            float *out = c->kf + 16 * i * (int64_t)d->head_dim;
            c->e.mv->widen_tile(c->k.dtype, raw, c->units, out);
            c->kt[i] = (const uint32_t *)(const void *)out;
        }
    }
    for (i = c->n_tiles; i < c->n_tiles + 3; i++) c->kt[i] = c->kt[c->n_tiles - 1];
    return ATTN_OK;
}

// Raw products of rows [0, nr) of q with the keys: s[r * LDS + i]. Not yet times ks and scale.
// q goes on for RB_MAX rows.
ATTNI_CALLED void attni_scan_dots(attni_scan *c, const float *q, int32_t nr) {
    static const uint8_t col[ATTNI_TILES + 3] = {0, 1,  2,  3,  4,  5,  6,  7,  8, 9,
                                                 10, 11, 12, 13, 14, 15, 15, 15, 15};
    const uint8_t *ahead[ATTNI_TILES + 3];
    uint8_t own[ATTNI_TILES + 3];
    const int32_t dim = c->d->head_dim;
    int32_t r, i;
    for (i = 0; i < c->n_tiles + 3; i++) {
        ahead[i] = (const uint8_t *)c->kt[i];
        own[i] = col[attni_min32(i, c->n_tiles - 1)];
    }
    for (r = 0; r < nr; r += c->e.rb)
        c->e.ma->qk[ATTN_F32](q + (int64_t)r * dim, dim, attni_min32(c->e.rb, nr - r), c->kt,
                              ahead, 0, own, c->n_tiles, dim, c->s + (int64_t)r * ATTNI_LDS);
}

// ... of c->q's.
ATTNI_CALLED void attni_scan_products(attni_scan *c, int32_t nr) {
    const int32_t dim = c->d->head_dim;
    memset(c->q + (int64_t)nr * dim, 0, 4 * (size_t)(ATTNI_RB_MAX * dim));
    attni_scan_dots(c, c->q, nr);
}

// The score that counts, of a raw product.
ATTNI_INLINE float attni_scan_score(const attni_scan *c, float product, int32_t key) {
    float s = product * (c->scale * c->ks[key]), cap = c->d->logits.softcap;
    return cap > 0 ? (float)((double)cap * attni_tanh64((double)s / (double)cap)) : s;
}

// ==== >>impl-flex  FlexPrefill ===================================================================
//
// One pass over K scores the last queries of some heads of a KV head and keeps, per query and
// block, a maximum, a sum of weights below it and the sum's split over two diagonals. The
// compatible mode counts single tokens: it goes over K once more, when the rows' sums are known.

enum { ATTNI_FLEX_HEADS = 4, ATTNI_FLEX_BINS = 2048 };

typedef struct attni_flex_rule { // what a head keeps
    uint8_t *col, *diag;         // (n_blocks) 1: kept
    float *mean;                 // (rows, head_dim) mean queries
    int aware;
    double gamma;                // aware: of e_r a row holds,
    int32_t need[2];             // ... and how many blocks the scored rows do: e_r may underflow
    uint32_t least;              // compatible: bits of the smallest e_r kept,
    int64_t ties;                // ... and how many of just that size
} attni_flex_rule;

typedef struct attni_flex {
    int32_t seq, group, block, n_blocks, first; // first: block of the first key held
    int32_t kv0, end;            // positions: of the first key held; behind the last query
    int32_t q_begin, q_len, q_pos0, row0, n_rows;
    int32_t n, pos;              // queries that are scored, the first one's position
    int32_t ld, min_blocks, max_blocks; // ld: of rows of blocks
    float scale, softcap;
    float *q;                    // (FLEX_HEADS, n, head_dim)
    float *m, *l, *lo, *hi;      // (FLEX_HEADS, n, ld): lo, hi: weights times the keys' distance
                                 // before and behind the query's own place in its block
    float *near_lo, *near_hi;    // (2 * block) distances
    float *row_m, *row_l;        // (FLEX_HEADS, n) compatible: of whole rows
    float *v, *s;                // (FLEX_HEADS, end) compatible: mass by key, by distance from end
    float *mean_k;               // (n_blocks / 16, head_dim, 16)
    float *e, *part;             // (ld), (ld)
    double *mass, *slash;        // (2, ld): by row block of the queries; (ld + 1)
    uint64_t *order;             // (n_blocks)
    uint8_t *mark;               // (n_blocks)
    attni_flex_rule *rule;       // (group)
    uint8_t *kept;               // (group, 2, n_blocks)
    float *mean_q;               // (group, n_rows, head_dim)
    int32_t *bin_n;              // (FLEX_BINS)
    double *bin_sum;
} attni_flex;

// Where sequence s begins and ends; 1 when it keeps every block.
ATTNI_CALLED int attni_flex_shape(const attn_desc *d, const attn_select *f, int32_t s,
                                  attni_flex *w) {
    const int64_t b = f->kv_block;
    attn_desc plain = *d;
    w->seq = s;
    w->group = d->n_heads / d->n_kv_heads;
    w->block = f->kv_block;
    w->q_begin = d->q_start[s];
    w->q_len = d->q_start[s + 1] - w->q_begin;
    w->q_pos0 = attni_q_pos0(d, s);
    w->kv0 = attni_kv_pos0(d, s);
    w->end = w->q_pos0 + w->q_len;
    w->first = w->kv0 / f->kv_block;
    w->n_blocks = (int32_t)attni_n_blocks(w->end, b);
    w->row0 = w->q_pos0 / f->kv_block;
    w->n_rows = attni_rows_of(d, f->kv_block, s);
    w->n = attni_min32(f->kv_block, w->q_len);
    w->pos = w->end - w->n;
    w->ld = (w->n_blocks + 31) & ~31; // the softmax kernel writes 32 at a time
    w->min_blocks = (int32_t)attni_n_blocks(f->flex.min_budget, b);
    w->max_blocks = (int32_t)attni_n_blocks(f->flex.max_budget, b);
    if (f->flex.compatible) plain.logits.scale = 0;
    w->scale = attni_scale(&plain);
    w->softcap = f->flex.compatible ? 0 : d->logits.softcap;
    return d->kv.kv_len[s] <= f->dense_below ||
           w->q_len <= attni_max64(2 * b, w->min_blocks * b);
}

// Lays w's arrays out from base on (NULL: only counts); bytes.
ATTNI_CALLED size_t attni_flex_carve(attni_flex *w, uint8_t *base, const attn_desc *d,
                                     const attn_select *f) {
    const size_t dim = (size_t)d->head_dim, n = (size_t)w->n, ld = (size_t)w->ld;
    const size_t cells = ATTNI_FLEX_HEADS * n * ld, blocks = (size_t)w->n_blocks;
    const size_t old = f->flex.compatible ? 1 : 0, aware = f->flex.tau > 0 ? 1 : 0;
    size_t at = 0;
    ATTNI_CARVE(w, q, float *, (ATTNI_FLEX_HEADS * n + ATTNI_RB_MAX + 1) * dim)
    ATTNI_CARVE(w, m, float *, cells)
    ATTNI_CARVE(w, l, float *, cells)
    ATTNI_CARVE(w, lo, float *, old ? 0 : cells)
    ATTNI_CARVE(w, hi, float *, old ? 0 : cells)
    ATTNI_CARVE(w, near_lo, float *, 2 * (size_t)w->block + 32)
    ATTNI_CARVE(w, near_hi, float *, 2 * (size_t)w->block + 32)
    ATTNI_CARVE(w, row_m, float *, ATTNI_FLEX_HEADS * n)
    ATTNI_CARVE(w, row_l, float *, ATTNI_FLEX_HEADS * n)
    ATTNI_CARVE(w, v, float *, old * ATTNI_FLEX_HEADS * (size_t)w->end)
    ATTNI_CARVE(w, s, float *, old * ATTNI_FLEX_HEADS * (size_t)w->end)
    ATTNI_CARVE(w, mean_k, float *, aware * (blocks + 15) / 16 * 16 * dim)
    ATTNI_CARVE(w, e, float *, ld)
    ATTNI_CARVE(w, part, float *, ld)
    ATTNI_CARVE(w, mass, double *, 2 * ld)
    ATTNI_CARVE(w, slash, double *, ld + 1)
    ATTNI_CARVE(w, order, uint64_t *, blocks)
    ATTNI_CARVE(w, mark, uint8_t *, blocks)
    ATTNI_CARVE(w, rule, attni_flex_rule *, w->group)
    ATTNI_CARVE(w, kept, uint8_t *, 2 * blocks * (size_t)w->group)
    ATTNI_CARVE(w, mean_q, float *, aware * (size_t)w->group * (size_t)w->n_rows * dim)
    ATTNI_CARVE(w, bin_n, int32_t *, old * ATTNI_FLEX_BINS)
    ATTNI_CARVE(w, bin_sum, double *, old * ATTNI_FLEX_BINS)
    return at;
}

ATTNI_CALLED int64_t attni_flex_units(const attn_desc *d, const attn_select *f) {
    (void)f;
    return (int64_t)d->n_seq * d->n_kv_heads;
}

ATTNI_CALLED size_t attni_flex_bytes(const attn_desc *d, const attn_select *f) {
    size_t most = 0, n;
    int32_t s;
    for (s = 0; s < d->n_seq; s++) {
        attni_flex w;
        if (attni_flex_shape(d, f, s, &w)) continue;
        n = attni_flex_carve(&w, NULL, d, f);
        if (n > most) most = n;
    }
    return most;
}

// ---- scores

// x <= 0, but where scores are Inf or NaN: those rows' lists may be any.
ATTNI_INLINE double attni_flex_exp(double x) { return x > 0 ? 1 : attni_exp64(x); }

ATTNI_INLINE void attni_flex_bits(uint64_t *bits, int32_t from, int32_t to) {
    int32_t i;
    for (i = 0; i < 4; i++) {
        int32_t a = attni_max32(from - 64 * i, 0), b = attni_min32(to - 64 * i, 64);
        bits[i] = a >= b ? 0 : (~(uint64_t)0 >> (64 - (b - a))) << a;
    }
}

// Raw products of the rows at s to weights below each row's maximum, for the keys [from, to) of the
// tile at position first. pos: the first row's own, which sees no key behind it.
ATTNI_CALLED void attni_flex_soft(attni_scan *c, const attni_flex *w, int32_t nr, int64_t first,
                                  int32_t from, int32_t to, int64_t pos, float *m, float *l) {
    attni_row row[ATTNI_SCAN_ROWS];
    uint64_t some[ATTNI_SCAN_ROWS][4], all[4];
    attni_soft a;
    int32_t i, held = attni_max32(from, (int32_t)attni_max64(w->kv0 - first, 0));
    memset(&a, 0, sizeof a);
    memset(row, 0, (size_t)nr * sizeof *row);
    a.k_scale = attn_dtype_scaled(c->d->kv.k.dtype) ? c->ks : NULL;
    a.scale = w->scale;
    a.softcap = w->softcap;
    a.m = m;
    a.l = l;
    attni_flex_bits(all, held, to);
    for (i = 0; i < nr; i++) {
        row[i].s = c->s + (int64_t)i * ATTNI_LDS;
        row[i].tiles = ((1u << ((to + 15) / 16)) - 1) & ~((1u << from / 16) - 1);
        row[i].bits = all;
        if (pos + i + 1 >= first + to) continue;
        attni_flex_bits(some[i], held, (int32_t)(pos + i + 1 - first));
        row[i].bits = some[i];
    }
    c->e.ma->soft(&a, row, nr);
}

// The sum of e[i] x[i], n <= 256.
ATTNI_CALLED float attni_flex_dot(const float *e, const float *x, int32_t n) {
    float a[16] = {0}, sum = 0;
    int32_t i, j;
    for (i = 0; i + 16 <= n; i += 16)
        for (j = 0; j < 16; j++) a[j] += e[i + j] * x[i + j];
    for (; i < n; i++) sum += e[i] * x[i];
    for (i = 8; i > 0; i /= 2)
        for (j = 0; j < i; j++) a[j] += a[j + i];
    return a[0] + sum;
}

// Adds a run of a block's keys to a cell; runs of one block come one after another.
ATTNI_CALLED void attni_flex_cell(attni_flex *w, int64_t at, int anew, float m, float l, float lo,
                                  float hi) {
    const float top = anew || attni_less(w->m[at], m) ? m : w->m[at];
    float a, b;
    if (anew) {
        a = 0;
        b = 1;
    } else {
        if (!(l > 0)) return;
        a = w->l[at] > 0 ? (float)attni_flex_exp((double)w->m[at] - (double)top) : 0;
        b = (float)attni_flex_exp((double)m - (double)top);
    }
    w->m[at] = top;
    w->l[at] = (anew ? 0 : w->l[at] * a) + l * b;
    if (!w->lo) return;
    w->lo[at] = (anew ? 0 : w->lo[at] * a) + lo * b;
    w->hi[at] = (anew ? 0 : w->hi[at] * a) + hi * b;
}

// Cells of rows [r0, r0 + nr) of head h from the products at s: one block's keys, [from, to) of the
// tile at position first.
ATTNI_CALLED void attni_flex_cells(attni_scan *c, attni_flex *w, int32_t h, int32_t r0, int32_t nr,
                                   int64_t first, int32_t from, int32_t to) {
    float m[ATTNI_SCAN_ROWS], l[ATTNI_SCAN_ROWS];
    const int32_t b = (int32_t)((first + from) / w->block), n = to - from;
    const int32_t w0 = (int32_t)(first + from - (int64_t)b * w->block); // place in the block
    const int anew = !w0 || first + from <= w->kv0;
    int32_t i;
    attni_flex_soft(c, w, nr, first, from, to, w->pos + r0, m, l);
    for (i = 0; i < nr; i++) {
        const float *e = c->s + (int64_t)i * ATTNI_LDS + from;
        const int32_t p = w->pos + r0 + i, u = p % w->block;
        float lo = 0, hi = 0;
        if (w->lo && b && b < p / w->block) {
            const int32_t at = w0 + w->block - 1 - u;
            const int32_t cut = attni_max32(0, attni_min32(u - w0, n)), even = cut & ~15;
            lo = attni_flex_dot(e, w->near_lo + at, attni_min32((cut + 15) & ~15, n));
            hi = attni_flex_dot(e + even, w->near_hi + at + even, n - even);
        }
        attni_flex_cell(w, ((int64_t)h * w->n + r0 + i) * w->ld + b, anew, m[i], l[i], lo, hi);
    }
}

// Adds the keys of the tile at position first, n of them, to their blocks' sums.
ATTNI_CALLED void attni_flex_mean_keys(attni_scan *c, attni_flex *w, int64_t first, int32_t n) {
    const int32_t dim = c->d->head_dim;
    int32_t i, j, e;
    for (i = 0; i < n; i += 16) {
        const int64_t b = (first + i) / w->block;
        const float *k = (const float *)(const void *)c->kt[i / 16], *f = c->ks + i;
        float *out = w->mean_k + b / 16 * 16 * dim + b % 16;
        for (e = 0; e < dim; e++) {
            float a[16];
            for (j = 0; j < 16; j++) a[j] = k[16 * e + j] * f[j];
            for (j = 0; j < 8; j++) a[j] += a[j + 8];
            for (j = 0; j < 4; j++) a[j] += a[j + 4];
            out[16 * e] += (a[0] + a[2]) + (a[1] + a[3]);
        }
    }
}

// Compatible: adds the weights at s to the masses of single keys and of single distances.
ATTNI_CALLED void attni_flex_tokens(attni_scan *c, attni_flex *w, int32_t h, int32_t r0, int32_t nr,
                                    int64_t first, int32_t n) {
    float m[ATTNI_SCAN_ROWS], l[ATTNI_SCAN_ROWS];
    int32_t i, j, t;
    attni_flex_soft(c, w, nr, first, 0, n, w->pos + r0, m, l);
    for (i = 0; i < nr; i++) {
        const float *e = c->s + (int64_t)i * ATTNI_LDS;
        const int64_t row = (int64_t)h * w->n + r0 + i, p = w->pos + r0 + i;
        float *v = w->v + (int64_t)h * w->end + first, *s, f;
        int32_t see = (int32_t)attni_min64(n, p + 1 - first);
        if (!(l[i] > 0) && !attni_isnan(l[i])) continue;
        f = (float)(attni_flex_exp((double)m[i] - (double)w->row_m[row]) / (double)w->row_l[row]);
        s = w->s + (int64_t)h * w->end + (w->end - 1 - p + first);
        for (t = 0; t + 16 <= see; t += 16)
            for (j = 0; j < 16; j++) {
                v[t + j] += e[t + j] * f;
                s[t + j] += e[t + j] * f;
            }
        for (; t < see; t++) {
            v[t] += e[t] * f;
            s[t] += e[t] * f;
        }
    }
}

// Goes over the keys for heads [h0, h0 + nh) of KV head kv, whose queries lie at q. tokens: the
// second time.
ATTNI_CALLED attn_result attni_flex_pass(attni_scan *c, attni_flex *w, int32_t kv, int32_t nh,
                                         int means, int tokens) {
    const int32_t dim = c->d->head_dim, b = w->block;
    const int32_t most = b > ATTN_SPAN || b % 32 ? attni_min32(b, ATTN_SPAN) : ATTN_SPAN / b * b;
    int64_t first = w->kv0 / b * (int64_t)b, n, from;
    int32_t h, r, nr;
    attn_result res;
    // the kernels work on 32 keys at a time: a tile is whole blocks of so many, or part of one
    for (; first < w->end; first += n) {
        n = attni_min64(most, w->end - first);
        if (b > ATTN_SPAN || b % 32) n = attni_min64(n, b - first % b);
        if (first + n <= w->kv0) continue;
        res = attni_scan_keys(c, w->seq, kv, NULL, first, (int32_t)n);
        if (res != ATTN_OK) return res;
        if (means) attni_flex_mean_keys(c, w, first, (int32_t)n);
        for (h = 0; h < nh; h++)
            for (r = 0; r < w->n; r += nr) {
                nr = attni_min32(w->n - r, ATTNI_SCAN_ROWS);
                attni_scan_dots(c, w->q + ((int64_t)h * w->n + r) * dim, nr);
                if (tokens) {
                    attni_flex_tokens(c, w, h, r, nr, first, (int32_t)n);
                    continue;
                }
                for (from = 0; from < n; from += b)
                    attni_flex_cells(c, w, h, r, nr, first, (int32_t)from,
                                     (int32_t)attni_min64(from + b, n));
            }
    }
    return ATTN_OK;
}

// ---- masses

// Weights of scores [w->first, n) of a row, which they replace: below the largest of their run of
// 256, whose factor to those of the whole row is part[run]. The row's maximum and sum.
ATTNI_CALLED void attni_flex_weights(attni_scan *c, attni_flex *w, float *x, int32_t n, float scale,
                                     float softcap, double *top, double *sum) {
    uint64_t bits[4];
    attni_soft a;
    attni_row row;
    float m, l;
    int32_t i, runs = (n + ATTN_SPAN - 1) / ATTN_SPAN;
    memset(&a, 0, sizeof a);
    memset(&row, 0, sizeof row);
    a.scale = scale;
    a.softcap = softcap;
    a.m = &m;
    a.l = &l;
    row.bits = bits;
    *top = *sum = 0;
    for (i = 0; i < runs; i++) {
        const int32_t k = attni_min32(n - ATTN_SPAN * i, ATTN_SPAN);
        attni_flex_bits(bits, attni_min32(attni_max32(w->first - ATTN_SPAN * i, 0), k), k);
        row.tiles = (1u << ((k + 15) / 16)) - 1;
        row.s = x + (int64_t)ATTN_SPAN * i;
        c->e.ma->soft(&a, &row, 1);
        w->part[i] = m;
        if (!(l > 0) && !attni_isnan(l)) continue;
        if (!(*sum != 0) || *top < (double)m) {
            *sum = *sum != 0 ? *sum * attni_flex_exp(*top - (double)m) : 0;
            *top = (double)m;
        }
        *sum += (double)l * attni_flex_exp((double)m - *top);
    }
    for (i = 0; i < runs; i++)
        w->part[i] = attni_bits32(w->part[i]) == 0xff800000u
                         ? 0 : (float)attni_flex_exp((double)w->part[i] - *top);
}

// Corrected: the rows of head h, normalised and summed into mass and slash.
ATTNI_CALLED void attni_flex_masses(attni_scan *c, attni_flex *w, int32_t h) {
    const double n = (double)w->n, nb = (double)w->n * (double)w->block;
    int32_t i, b;
    memset(w->mass, 0, 16 * (size_t)w->ld);
    memset(w->slash, 0, 8 * ((size_t)w->ld + 1));
    for (i = 0; i < w->n; i++) {
        const int64_t at = ((int64_t)h * w->n + i) * w->ld;
        const float *l = w->l + at, *lo = w->lo + at, *hi = w->hi + at;
        const int32_t r = (w->pos + i) / w->block;
        double *mass = w->mass + (r > w->pos / w->block ? w->ld : 0);
        double top, sum, f;
        float *x = w->m + at;
        attni_flex_weights(c, w, x, r + 1, 1, 0, &top, &sum);
        for (sum = 0, b = w->first; b <= r; b++) {
            x[b] *= w->part[b / ATTN_SPAN];
            sum += (double)(x[b] * l[b]);
        }
        for (f = 1 / sum, b = w->first; b <= r; b++) {
            double p = (double)(x[b] * l[b]) * f, before, behind;
            mass[b] += p / n;
            if (!b || b == r) continue;
            before = (double)(x[b] * lo[b]) * f / nb;
            behind = (double)(x[b] * hi[b]) * f / nb;
            w->slash[r - b + 1] += before;
            w->slash[r - b] += p / n - before - behind;
            w->slash[r - b - 1] += behind;
        }
    }
}

// Compatible: rows' maxima and sums of head h.
ATTNI_CALLED void attni_flex_rows(attni_flex *w, int32_t h) {
    int32_t i, b;
    for (i = 0; i < w->n; i++) {
        const int64_t row = (int64_t)h * w->n + i, at = row * w->ld;
        const int32_t r = (w->pos + i) / w->block;
        float top = attni_float(0xff800000u);
        double sum = 0;
        for (b = w->first; b <= r; b++)
            if (w->l[at + b] > 0 && attni_less(top, w->m[at + b])) top = w->m[at + b];
        for (b = w->first; b <= r; b++)
            if (w->l[at + b] != 0)
                sum += (double)w->l[at + b] *
                       attni_flex_exp((double)w->m[at + b] - (double)top);
        w->row_m[row] = top;
        w->row_l[row] = (float)sum;
    }
}

// Compatible: v and s of head h to means and, summed by blocks, to mass and slash.
ATTNI_CALLED void attni_flex_pool(attni_flex *w, int32_t h) {
    float *v = w->v + (int64_t)h * w->end, *s = w->s + (int64_t)h * w->end;
    int32_t t;
    memset(w->mass, 0, 16 * (size_t)w->ld);
    memset(w->slash, 0, 8 * ((size_t)w->ld + 1));
    for (t = 0; t < w->end; t++) {
        v[t] /= (float)w->n;
        s[t] /= (float)w->n;
        w->mass[t / w->block] += (double)v[t];
        w->slash[t / w->block] += (double)s[t];
    }
}

// ---- choosing

// Ascending, by heap.
ATTNI_CALLED void attni_flex_sort(uint64_t *x, int32_t n) {
    int32_t i, j, k, end;
    uint64_t t;
    for (i = n / 2, end = n; end > 1;) {
        if (i > 0) {
            t = x[--i];
        } else {
            t = x[--end];
            x[end] = x[0];
        }
        for (j = i; (k = 2 * j + 1) < end; j = k) {
            if (k + 1 < end && x[k] < x[k + 1]) k++;
            if (t >= x[k]) break;
            x[j] = x[k];
        }
        x[j] = t;
    }
}

// The sort key of entry i of value x >= 0: the largest first, then the lower index.
ATTNI_INLINE uint64_t attni_flex_key(float x, int32_t i) {
    return (uint64_t)~attni_bits32(x) << 32 | (uint32_t)i;
}

ATTNI_INLINE float attni_flex_value(uint64_t key) { return attni_float(~(uint32_t)(key >> 32)); }

// Corrected: marks the largest of x until they hold gamma of the sum, within the budgets.
ATTNI_CALLED void attni_flex_most(attni_flex *w, const double *x, double gamma, uint8_t *kept) {
    double all = 0, sum = 0;
    int32_t i;
    for (i = 0; i < w->n_blocks; i++) {
        w->order[i] = attni_flex_key((float)x[i], i);
        all += (double)(float)x[i];
    }
    attni_flex_sort(w->order, w->n_blocks);
    for (i = 0; i < w->n_blocks && i < w->max_blocks; i++) {
        if (i >= w->min_blocks && sum >= gamma * all) break;
        kept[(uint32_t)w->order[i]] = 1;
        sum += (double)attni_flex_value(w->order[i]);
    }
}

// Compatible: the n largest of x, entry forced before all others.
ATTNI_CALLED void attni_flex_first(attni_flex *w, const double *x, int32_t forced, int64_t n,
                                   int flip, uint8_t *kept) {
    int32_t i, j;
    for (i = 0; i < w->n_blocks; i++)
        w->order[i] = i == forced ? (uint64_t)(uint32_t)i : attni_flex_key((float)x[i], i);
    attni_flex_sort(w->order, w->n_blocks);
    for (i = 0; i < w->n_blocks && i < n; i++) {
        j = (int32_t)(uint32_t)w->order[i];
        kept[flip ? w->n_blocks - 1 - j : j] = 1;
    }
}

// How many of a multiset of values >= 0, the largest first, keep their running sum (f32, as the
// reference's) at or below a limit: found by their bits, from the top, in three rounds over the
// values. After the last: least, and how many of just that size.
typedef struct attni_flex_count {
    int32_t *n;       // (FLEX_BINS)
    double *sum, base;
    int64_t taken, ties;
    uint32_t least;
    int shift, all;
    float limit;
} attni_flex_count;

ATTNI_CALLED void attni_flex_count_round(attni_flex_count *k, int round) {
    if (!round) k->least = 0, k->all = 0, k->base = 0, k->taken = k->ties = 0;
    k->shift = round == 0 ? 20 : round == 1 ? 9 : 0;
    memset(k->n, 0, 4 * ATTNI_FLEX_BINS);
    memset(k->sum, 0, 8 * ATTNI_FLEX_BINS);
}

ATTNI_INLINE void attni_flex_count_add(attni_flex_count *k, float x) {
    const uint32_t u = attni_bits32(x) & 0x7fffffffu;
    const int wide = k->shift == 9 ? 20 : k->shift ? 31 : 9;
    const uint32_t bin = (u & (((uint32_t)1 << wide) - 1)) >> k->shift;
    if (u >> wide != k->least >> wide) return;
    k->n[bin]++;
    k->sum[bin] += (double)x;
}

ATTNI_CALLED void attni_flex_count_end(attni_flex_count *k) {
    int32_t i;
    if (k->all) return;
    for (i = ATTNI_FLEX_BINS - 1; i >= 0; i--) {
        if (!k->n[i]) continue;
        if (!((float)(k->base + k->sum[i]) <= k->limit)) break;
        k->base += k->sum[i];
        k->taken += k->n[i];
    }
    if (i < 0) { // nothing passes the limit
        k->all = 1;
        k->ties = INT64_MAX;
        return;
    }
    k->least |= (uint32_t)i << k->shift;
    if (k->shift) return;
    while (k->ties < k->n[i] &&
           (float)(k->base + (double)attni_float(k->least) * (double)(k->ties + 1)) <= k->limit)
        k->ties++;
    k->taken += k->ties;
}

ATTNI_CALLED int64_t attni_flex_tokens_of(attni_flex *w, const float *x, float gamma) {
    attni_flex_count k;
    int round;
    int32_t i;
    k.n = w->bin_n;
    k.sum = w->bin_sum;
    k.limit = gamma;
    for (round = 0; round < 3; round++) {
        attni_flex_count_round(&k, round);
        for (i = 0; i < w->end && !k.all; i++) attni_flex_count_add(&k, x[i]);
        attni_flex_count_end(&k);
    }
    return k.taken;
}

// ---- query-aware heads

// Products of a mean query with the blocks' mean keys, e[0 .. n).
ATTNI_CALLED void attni_flex_mean_scores(attni_scan *c, attni_flex *w, const float *q, int32_t n,
                                         float *e) {
    const int32_t dim = c->d->head_dim;
    int32_t b, i, k;
    memcpy(c->q, q, 4 * (size_t)dim);
    for (b = 0; b < n; b += ATTN_SPAN) {
        k = attni_min32(n - b, ATTN_SPAN);
        c->n_tiles = (k + 15) / 16;
        for (i = 0; i < c->n_tiles + 3; i++)
            c->kt[i] = (const uint32_t *)(const void *)(
                w->mean_k + ((int64_t)b + 16 * attni_min32(i, c->n_tiles - 1)) * dim);
        attni_scan_products(c, 1);
        memcpy(e + b, c->s, 4 * (size_t)k);
    }
}

// e_r into e: the share of every block up to r, of row i of the head's mean queries.
ATTNI_CALLED void attni_flex_row(attni_scan *c, attni_flex *w, const attni_flex_rule *rule,
                                 int32_t i, float *e) {
    const int32_t r = w->row0 + i;
    double top, sum;
    int32_t b;
    attni_flex_mean_scores(c, w, rule->mean + (int64_t)i * c->d->head_dim, r + 1, e);
    attni_flex_weights(c, w, e, r + 1, w->scale, w->softcap, &top, &sum);
    for (b = w->first; b <= r; b++)
        e[b] = (float)((double)(e[b] * w->part[b / ATTN_SPAN]) / sum);
}

// Whether the distance between what the mean of the last queries expects of the blocks and their
// mass is below tau. q: a head's n queries.
ATTNI_CALLED int attni_flex_is_aware(attni_scan *c, attni_flex *w, const float *q) {
    const int32_t dim = c->d->head_dim;
    double top = 0, sum = 0, js = 0;
    float *mean = c->q + dim; // row 0 is attni_flex_mean_scores' own
    int32_t i, b;
    if (!(c->f->flex.tau > 0)) return 0;
    memset(mean, 0, 4 * (size_t)dim);
    for (i = 0; i < w->n; i++)
        for (b = 0; b < dim; b++) mean[b] += q[(int64_t)i * dim + b];
    for (b = 0; b < dim; b++) mean[b] /= (float)w->n;
    attni_flex_mean_scores(c, w, mean, w->n_blocks, w->e);
    for (b = w->first; b < w->n_blocks; b++) {
        w->e[b] *= w->scale;
        if (w->softcap > 0)
            w->e[b] = w->softcap * (float)attni_tanh64((double)w->e[b] / (double)w->softcap);
        if (b == w->first || (double)w->e[b] > top) top = (double)w->e[b];
    }
    for (b = w->first; b < w->n_blocks; b++) sum += attni_flex_exp((double)w->e[b] - top);
    for (b = w->first; b < w->n_blocks; b++) {
        const double e = (double)(float)(attni_flex_exp((double)w->e[b] - top) / sum);
        const double p = (double)(float)(w->mass[b] + w->mass[w->ld + b]), m = (e + p) / 2;
        if (!(e > 0 && p > 0) && c->f->flex.compatible) return 0; // 0 ln 0 is NaN there
        if (e > 0) js += e * attni_ln(e / m) / 2;
        if (p > 0) js += p * attni_ln(p / m) / 2;
    }
    return js >= 0 && js < (double)c->f->flex.tau * (double)c->f->flex.tau;
}

// The mean queries of a head's rows.
ATTNI_CALLED void attni_flex_mean_queries(attni_scan *c, attni_flex *w, int32_t head, float *out) {
    const int32_t dim = c->d->head_dim;
    const int64_t bytes = attni_bits_of(c->d->q.dtype) / 8;
    const int64_t st =
        c->d->q.stride_token ? c->d->q.stride_token : (int64_t)c->d->n_heads * dim;
    const uint8_t *q = (const uint8_t *)c->d->q.data +
                       head * (c->d->q.stride_head ? c->d->q.stride_head : dim) * bytes;
    int32_t i, e, p;
    for (i = 0; i < w->n_rows; i++, out += dim) {
        const int64_t at = (w->row0 + i) * (int64_t)w->block;
        const int32_t from = (int32_t)attni_max64(at, w->q_pos0);
        const int32_t to = (int32_t)attni_min64(at + w->block, w->end);
        memset(out, 0, 4 * (size_t)dim);
        for (p = from; p < to; p++) {
            const int64_t t = w->q_begin + (p - w->q_pos0);
            const uint8_t *soon = q + attni_min64(t + 8, w->q_begin + w->q_len - 1) * st * bytes;
            for (e = 0; e < dim; e += 16) // other heads' lie between: the CPU does not foresee it
                ATTNI_PREFETCH(soon + e * bytes);
            attni_scan_query(c, 0, t, head, NULL);
            for (e = 0; e < dim; e++) out[e] += c->q[e];
        }
        for (e = 0; e < dim; e++) out[e] /= (float)(to - from);
    }
}

// Corrected: how many blocks of e_r, sorted into order, row r keeps.
ATTNI_CALLED int32_t attni_flex_take(attni_flex *w, const float *e, int32_t r, double gamma) {
    double sum = 0;
    int32_t b, n = 0, held = r + 1 - w->first;
    for (b = w->first; b <= r; b++) w->order[n++] = attni_flex_key(e[b], b);
    attni_flex_sort(w->order, held);
    for (n = 0; n < held && n < w->max_blocks; n++) {
        if (n >= w->min_blocks && sum >= gamma) break;
        sum += (double)attni_flex_value(w->order[n]);
    }
    return n;
}

// Corrected: the least gamma' for which the scored rows hold gamma of their mass.
ATTNI_CALLED void attni_flex_raise(attni_scan *c, attni_flex *w, attni_flex_rule *rule) {
    const double gamma = (double)c->f->flex.gamma;
    int32_t r, i, b;
    rule->gamma = gamma;
    for (r = w->pos / w->block; r <= (w->end - 1) / w->block; r++) {
        const double *mass = w->mass + (r > w->pos / w->block ? w->ld : 0);
        double all = 0, held = mass[r] + (r ? mass[0] : 0), sum = 0; // always kept
        attni_flex_row(c, w, rule, r - w->row0, w->e);
        attni_flex_take(w, w->e, r, 2);
        for (b = w->first; b <= r; b++) all += mass[b];
        for (i = 0; i < r + 1 - w->first && held < gamma * all; i++) {
            b = (int32_t)(uint32_t)w->order[i];
            sum += (double)attni_flex_value(w->order[i]);
            if (b && b != r) held += mass[b];
        }
        rule->need[r > w->pos / w->block] = i;
        if (sum > rule->gamma) rule->gamma = sum;
    }
}

// Compatible: the size of the smallest e_r kept, over all rows at once.
ATTNI_CALLED void attni_flex_least(attni_scan *c, attni_flex *w, attni_flex_rule *rule) {
    attni_flex_count k;
    int round;
    int32_t i, b;
    k.n = w->bin_n;
    k.sum = w->bin_sum;
    k.limit = (float)((double)c->f->flex.gamma * (double)w->n_rows);
    for (round = 0; round < 3; round++) {
        attni_flex_count_round(&k, round);
        for (i = 0; i < w->n_rows && !k.all; i++) {
            attni_flex_row(c, w, rule, i, w->e);
            for (b = w->first; b <= w->row0 + i; b++) attni_flex_count_add(&k, w->e[b]);
        }
        attni_flex_count_end(&k);
    }
    rule->least = k.least;
    rule->ties = k.ties;
}

// ---- lists

// What head h of a pass (query head `head`) keeps.
ATTNI_CALLED void attni_flex_decide(attni_scan *c, attni_flex *w, int32_t h, int32_t head,
                                    attni_flex_rule *rule) {
    const double gamma = (double)c->f->flex.gamma;
    const int old = c->f->flex.compatible;
    if (old) attni_flex_pool(w, h);
    else attni_flex_masses(c, w, h);
    rule->aware = attni_flex_is_aware(c, w, w->q + (int64_t)h * w->n * c->d->head_dim);
    if (rule->aware) attni_flex_mean_queries(c, w, head, rule->mean);
    if (old) {
        int64_t n[2];
        int i;
        for (i = 0; i < 2; i++) {
            const float *x = (i ? w->s : w->v) + (int64_t)h * w->end;
            n[i] = (attni_flex_tokens_of(w, x, c->f->flex.gamma) + 1) / 128 + 1;
            n[i] = attni_max64(n[i], w->min_blocks);
            n[i] = attni_min64(n[i], w->max_blocks);
            if (rule->aware) n[i] = w->min_blocks;
        }
        attni_flex_first(w, w->mass, 0, n[0], 0, rule->col);
        attni_flex_first(w, w->slash, w->n_blocks - 1, n[1], 1, rule->diag);
        if (rule->aware) attni_flex_least(c, w, rule);
    } else if (rule->aware) {
        attni_flex_raise(c, w, rule);
    } else {
        int32_t b, r;
        for (r = w->pos / w->block; r <= (w->end - 1) / w->block; r++)
            w->mass[(r > w->pos / w->block ? w->ld : 0) + r] = 0;
        w->mass[0] = w->mass[w->ld] = 0;
        for (b = 0; b < w->n_blocks; b++) w->mass[b] += w->mass[w->ld + b];
        attni_flex_most(w, w->mass, gamma, rule->col);
        attni_flex_most(w, w->slash, gamma, rule->diag);
    }
}

// Marks what a head keeps of row i; how many mean keys it was compared with.
ATTNI_CALLED int32_t attni_flex_mark(attni_scan *c, attni_flex *w, attni_flex_rule *rule,
                                     int32_t i) {
    const int32_t r = w->row0 + i;
    int32_t b, n;
    for (b = w->first; b <= r; b++) w->mark[b] |= rule->col[b] | rule->diag[r - b];
    if (!c->f->flex.compatible) {
        w->mark[r] = 1;
        if (!w->first) w->mark[0] = 1;
    }
    if (!rule->aware) return 0;
    attni_flex_row(c, w, rule, i, w->e);
    if (c->f->flex.compatible) {
        for (b = w->first; b <= r; b++) {
            const uint32_t u = attni_bits32(w->e[b]);
            if (u > rule->least || (u == rule->least && rule->ties-- > 0)) w->mark[b] = 1;
        }
    } else {
        n = attni_flex_take(w, w->e, r, rule->gamma);
        if (r >= w->pos / w->block) {
            b = attni_min32(rule->need[r > w->pos / w->block], w->max_blocks);
            n = attni_max32(n, b);
        }
        for (b = 0; b < n; b++) w->mark[(uint32_t)w->order[b]] = 1;
    }
    return r + 1 - w->first;
}

// Writes the list's rows for n heads of rules; no rules: every block.
ATTNI_CALLED attn_result attni_flex_write(attni_scan *c, attni_flex *w, int32_t list,
                                          attni_flex_rule *rule, int32_t n) {
    const attn_selection *x = c->x;
    int32_t i, b, h;
    for (i = 0; i < w->n_rows; i++) {
        const int64_t row = (int64_t)x->seq_row[w->seq] + w->row0 + i;
        const int64_t at = (int64_t)list * (x->max_rows + 1) + row;
        const int32_t r = w->row0 + i;
        int32_t *out, scored = 0;
        if (row < 0 || row >= x->max_rows || r + 1 - w->first > x->row_capacity)
            return ATTN_ERR_BUFFER;
        x->row_start[at] = ((int64_t)list * x->max_rows + row) * x->row_capacity;
        out = x->block + x->row_start[at];
        if (rule) memset(w->mark, 0, (size_t)w->n_blocks);
        for (h = 0; h < n; h++)
            scored = attni_max32(scored, attni_flex_mark(c, w, rule + h, i));
        for (b = w->first; b <= r; b++)
            if (!rule || w->mark[b]) *out++ = b;
        x->row_end[at] = out - x->block;
        if (rule && r >= w->pos / w->block)
            scored += attni_min32(w->end, (r + 1) * w->block) - w->kv0;
        x->visited[at] = scored;
    }
    return ATTN_OK;
}

// The heads of KV head kv from h0 on, at most FLEX_HEADS: their queries, their passes, their rules.
ATTNI_CALLED attn_result attni_flex_heads(attni_scan *c, attni_flex *w, int32_t kv, int32_t h0,
                                          int32_t nh) {
    const int32_t dim = c->d->head_dim, old = c->f->flex.compatible;
    const int means = c->f->flex.tau > 0 && !h0;
    attn_result r;
    int32_t h, i, b;
    for (h = 0; h < nh; h++)
        for (i = 0; i < w->n; i++)
            attni_scan_query(c, 0, w->q_begin + w->q_len - w->n + i, kv * w->group + h0 + h,
                             w->q + ((int64_t)h * w->n + i) * dim);
    memset(w->q + (int64_t)nh * w->n * dim, 0, 4 * (size_t)((ATTNI_RB_MAX + 1) * dim));
    if (means) memset(w->mean_k, 0, 4 * (size_t)((w->n_blocks + 15) / 16 * 16) * (size_t)dim);
    if ((r = attni_flex_pass(c, w, kv, nh, means, 0)) != ATTN_OK) return r;
    for (b = w->first; means && b < w->n_blocks; b++) {
        const int64_t at = (int64_t)b * w->block;
        const float n = (float)(attni_min64(at + w->block, w->end) - attni_max64(at, w->kv0));
        for (i = 0; i < dim; i++) w->mean_k[(b / 16 * (int64_t)dim + i) * 16 + b % 16] /= n;
    }
    if (old) {
        memset(w->v, 0, 4 * (size_t)nh * (size_t)w->end);
        memset(w->s, 0, 4 * (size_t)nh * (size_t)w->end);
        for (h = 0; h < nh; h++) attni_flex_rows(w, h);
        if ((r = attni_flex_pass(c, w, kv, nh, 0, 1)) != ATTN_OK) return r;
    }
    for (h = 0; h < nh; h++)
        attni_flex_decide(c, w, h, kv * w->group + h0 + h, w->rule + h0 + h);
    return ATTN_OK;
}

ATTNI_CALLED attn_result attni_flex_unit(attni_scan *c, int64_t unit) {
    const int32_t kv = (int32_t)(unit % c->d->n_kv_heads), seq = (int32_t)(unit / c->d->n_kv_heads);
    const int each = c->f->heads == ATTN_SELECT_EACH;
    attn_result r = ATTN_OK;
    attni_flex w;
    int32_t h, i, n;
    int dense = attni_flex_shape(c->d, c->f, seq, &w);
    n = each ? w.group : 1;
    for (h = 0; dense && h < n && r == ATTN_OK; h++)
        r = attni_flex_write(c, &w, kv * n + h, NULL, 0);
    if (dense) return r;
    attni_flex_carve(&w, c->rest, c->d, c->f);
    if (c->f->flex.compatible) w.lo = w.hi = NULL;
    for (i = 0; i < 2 * w.block; i++) {
        w.near_lo[i] = (float)attni_max32(w.block - 1 - i, 0);
        w.near_hi[i] = (float)attni_max32(i - w.block + 1, 0);
    }
    memset(w.kept, 0, 2 * (size_t)w.group * (size_t)w.n_blocks);
    memset(w.rule, 0, (size_t)w.group * sizeof *w.rule);
    for (h = 0; h < w.group; h++) {
        w.rule[h].col = w.kept + 2 * (int64_t)h * w.n_blocks;
        w.rule[h].diag = w.rule[h].col + w.n_blocks;
        w.rule[h].mean = w.mean_q + (int64_t)h * w.n_rows * c->d->head_dim;
    }
    for (h = 0; h < w.group && r == ATTN_OK; h += ATTNI_FLEX_HEADS)
        r = attni_flex_heads(c, &w, kv, h, attni_min32(w.group - h, ATTNI_FLEX_HEADS));
    for (h = 0; h < n && r == ATTN_OK; h++)
        r = attni_flex_write(c, &w, kv * n + h, w.rule + h, each ? 1 : w.group);
    return r;
}

// ==== >>impl-hip  HiP, three generations =========================================================

ATTNI_CALLED int64_t attni_hip_units(const attn_desc *d, const attn_select *f) {
    (void)d, (void)f;
    return 1;
}
ATTNI_CALLED size_t attni_hip_bytes(const attn_desc *d, const attn_select *f) {
    (void)d, (void)f;
    return 0;
}
ATTNI_CALLED attn_result attni_hip_unit(attni_scan *c, int64_t unit) {
    (void)c, (void)unit;
    return ATTN_ERR_UNSUPPORTED;
}

// ==== >>impl-exact  Certified top blocks =========================================================

ATTNI_CALLED int64_t attni_exact_units(const attn_desc *d, const attn_select *f) {
    (void)d, (void)f;
    return 1;
}
ATTNI_CALLED size_t attni_exact_bytes(const attn_desc *d, const attn_select *f) {
    (void)d, (void)f;
    return 0;
}
ATTNI_CALLED attn_result attni_exact_unit(attni_scan *c, int64_t unit) {
    (void)c, (void)unit;
    return ATTN_ERR_UNSUPPORTED;
}

// ==== >>impl-select  =============================================================================

ATTN_DEF int64_t attn_cpu_select_units(const attn_desc *d, const attn_select *s) {
    attn_select f;
    if (attn_select_check(d, s) != ATTN_OK || !attni_select_fill(s, &f)) return 0;
    return f.kind == ATTN_SELECT_FLEX    ? attni_flex_units(d, &f)
           : f.kind == ATTN_SELECT_EXACT ? attni_exact_units(d, &f)
                                         : attni_hip_units(d, &f);
}

ATTN_DEF size_t attn_cpu_select_scratch_bytes(const attn_desc *d, const attn_select *s) {
    attn_select f;
    attni_scan c;
    if (attn_select_check(d, s) != ATTN_OK || !attni_select_fill(s, &f)) return 0;
    return attni_scan_carve(&c, NULL, d) + (f.kind == ATTN_SELECT_FLEX ? attni_flex_bytes(d, &f)
                                            : f.kind == ATTN_SELECT_EXACT
                                                ? attni_exact_bytes(d, &f)
                                                : attni_hip_bytes(d, &f));
}

ATTN_DEF attn_result attn_cpu_select(const attn_desc *d, const attn_select *s,
                                     const attn_summary *y, const attn_selection *x,
                                     int64_t first, int64_t count, void *scratch) {
    attn_select f;
    attni_scan c;
    uint64_t mode;
    int64_t u;
    attn_result r = attn_select_check(d, s);
    if (r != ATTN_OK) return r;
    if (!x || !x->block || !scratch || first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if (x->list.device_entries) return ATTN_ERR_UNSUPPORTED;
    if ((uintptr_t)scratch % 64) return ATTN_ERR_BUFFER;
    if (!d->q.data || !attni_is_float(d->q.dtype)) return ATTN_ERR_ARGUMENT;
    if (!attni_select_fill(s, &f)) return ATTN_ERR_ARGUMENT;
    if (first + count > attn_cpu_select_units(d, s)) return ATTN_ERR_ARGUMENT;
    if ((r = attni_scan_init(&c, d, &f, y, x, (uint8_t *)scratch)) != ATTN_OK) return r;
    mode = attni_mode_enter();
    for (u = first; u < first + count && r == ATTN_OK; u++)
        r = f.kind == ATTN_SELECT_FLEX    ? attni_flex_unit(&c, u)
            : f.kind == ATTN_SELECT_EXACT ? attni_exact_unit(&c, u)
                                          : attni_hip_unit(&c, u);
    attni_mode_leave(mode);
    return r;
}

ATTN_DEF void attn_cpu_select_forget(const attn_selection *x, int32_t slot) {
    int32_t l;
    for (l = 0; x && x->state && l < x->n_lists; l++) {
        int32_t none = -2;
        size_t at = (size_t)slot * (size_t)x->n_lists + (size_t)l;
        memcpy(x->state + at * x->state_bytes, &none, 4);
    }
}

ATTN_DEF size_t attn_summary_bytes(const attn_desc *d) {
    (void)d;
    return 0;
}
ATTN_DEF int64_t attn_cpu_summarize_units(const attn_desc *d) {
    (void)d;
    return 0;
}
ATTN_DEF attn_result attn_cpu_summarize(const attn_desc *d, const attn_summary *y, int64_t first,
                                        int64_t count) {
    (void)d, (void)y, (void)first, (void)count;
    return ATTN_ERR_UNSUPPORTED;
}

#undef ATTNI_AMX_BEGIN
#undef ATTNI_AMX_END
#undef ATTNI_ARM
#undef ATTNI_ARM_DOTS
#undef ATTNI_CALLED
#undef ATTNI_CARVE
#undef ATTNI_CHECK_COPY
#undef ATTNI_CHECK_EVERY
#undef ATTNI_CHECK_MERGE
#undef ATTNI_CHECK_NEXT
#undef ATTNI_CHECK_RUN
#undef ATTNI_CHECK_SLOTS
#undef ATTNI_CHECK_SPOIL
#undef ATTNI_CHECK_TABLES
#undef ATTNI_CPU_OPEN
#undef ATTNI_EACH
#undef ATTNI_F2
#undef ATTNI_F5
#undef ATTNI_GET
#undef ATTNI_HIDE
#undef ATTNI_INLINE
#undef ATTNI_NAMES
#undef ATTNI_PREFETCH
#undef ATTNI_PREFETCH_L2
#undef ATTNI_Q
#undef ATTNI_SET
#undef ATTNI_T2
#undef ATTNI_T5
#undef ATTNI_T6
#undef ATTNI_TA
#undef ATTNI_TD
#undef ATTNI_TILE_FENCE
#undef ATTNI_UNROLL
#ifdef __NVCC__
#pragma nv_diagnostic pop
#endif
#undef ATTNI_WASM
#undef ATTNI_X86
#undef attni_math_fast_scalar

#endif // ATTNI_CPU_IMPLEMENTED
#endif // implementation
#endif // not a kernel pass

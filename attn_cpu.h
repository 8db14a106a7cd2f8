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

   CONTENTS  >>isa  >>store  >>run  >>select  >>delta   and behind  >>impl-:
             kernels, types, scalar, avx2, avx512, dots, neon, wasm, dispatch, store, tasks,
             run, scan, flex, hip, exact, select, delta

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

// Makes the copies that attn_cache_update asked for in d.kv.cache of one layer. Thread rule:
// disjoint loads. ERR_PAGE.
ATTN_DEF attn_result attn_cpu_cache_load(const attn_desc *d, const attn_cache_load *loads,
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
// this thread's own. d as attn_selection_follow saw it, which looks at tables; its mask may or may
// not hold x's terms. ERR_BUFFER: follow was not called for d; ERR_STALE: x was laid out for other
// parameters; ERR_PAGE.
ATTN_DEF attn_result attn_cpu_select(const attn_desc *d, const attn_select *s,
                                     const attn_summary *y, const attn_selection *x,
                                     int64_t first, int64_t count, void *scratch);

// A sequence moved into a slot: its first step selects anew. ERR_ARGUMENT: no such slot.
ATTN_DEF attn_result attn_cpu_select_forget(const attn_selection *x, int32_t slot);

// HiP's landmarks of the keys of d's own tokens, after their store: d, s as for select with
// s->hip.landmark = out. Units: (sequence, KV head); scratch as for select.
ATTN_DEF int64_t attn_cpu_landmarks_units(const attn_desc *d);
ATTN_DEF attn_result attn_cpu_landmarks(const attn_desc *d, const attn_select *s, float *out,
                                        int64_t first, int64_t count, void *scratch);

// Brings summaries up to date after the store of d's query tokens: cells that hold one of them are
// made anew from K. units: of work, for any threads in any order. After attn_cpu_copy_pages or
// loading a blob: a d whose q_start and q_pos0 cover these tokens, from their page's first one on.
// Reads no Q. ERR_PAGE.
ATTN_DEF int64_t attn_cpu_summarize_units(const attn_desc *d);
ATTN_DEF attn_result attn_cpu_summarize(const attn_desc *d, const attn_summary *y, int64_t first,
                                        int64_t count);

// ==== >>delta  Correcting sparse attention by some dense rows ====================================

// delta -= O's rows that it stands for, rows [first, first + count) of it; after all of these
// (another thread's, too) the same rows are added to O, each to step rows. interpolate: a row
// between two of them gets its share of both. See attn_delta_desc; thread rule: disjoint rows.
ATTN_DEF attn_result attn_cpu_delta_take(const attn_desc *d, int32_t s, int32_t step,
                                         const attn_tensor *delta, int32_t first, int32_t count);
ATTN_DEF attn_result attn_cpu_delta_add(const attn_desc *d, int32_t s, int32_t step,
                                        int interpolate, const attn_tensor *delta, int32_t first,
                                        int32_t count);

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

// The maxima of nr rows of scores, for n tiles, into m, which a NaN does not change.
ATTNI_TGT static void ATTNI_I(maxima)(const float *s, int nr, int n, float *m) {
    int i, r;
    for (i = 0; i < 16 * n; i += 16) {
        V top = ATTNI_I(load)(m + i);
        for (r = 0; r < nr; r++)
            top = ATTNI_I(max)(ATTNI_I(load)(s + r * ATTNI_LDS + i), top);
        ATTNI_I(store)(m + i, top);
    }
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
                                           ATTNI_I(codes), ATTNI_I(maxima)};

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

// For FlexPrefill. Raw products of a row to the largest score m of keys [from, to), the sum l of
// weights below it, and sums lo, hi of weights times what a->lo (up to key cut) and a->hi (from
// there on) have for a key, from the tile of key `from` on (NULL: neither). out: m, l, lo, hi.
ATTNI_TGT static void ATTNI_K(ramps)(const attni_ramps *a, float *s, int from, int to, int cut,
                                     float *out) {
    const V ninf = ATTNI_I(barrier)(ATTNI_I(asv)(ATTNI_I(uset1)(0xff800000u)));
    const V zero = ATTNI_I(set1)(0), cap = ATTNI_I(set1)(a->softcap);
    const int plain = !(a->softcap > 0) && a->scale > 0, i0 = from & ~15;
    const uint32_t first = 0xffffu << (from & 15), last = 0xffffu >> (-to & 15);
    V c = ATTNI_I(set1)(a->scale), top = ninf, sum = zero, lo = zero, hi = zero, x;
    uint32_t seen;
    float max;
    int i;
    for (i = i0; i < to; i += 16) {
        seen = (i == i0 ? first : 0xffffu) & (i + 16 >= to ? last : 0xffffu);
        x = ATTNI_I(load)(s + i);
        if (a->k_scale) x = ATTNI_I(mul)(x, ATTNI_I(load)(a->k_scale + i));
        if (!plain) x = ATTNI_I(mul)(x, c);
        if (a->softcap > 0) x = ATTNI_I(mul)(ATTNI_K(tanh)(ATTNI_I(div)(x, cap)), cap);
        if (seen != 0xffffu) x = ATTNI_I(pick)(seen, x, ninf);
        ATTNI_I(store)(s + i, x);
        top = ATTNI_I(max)(x, top); // NaN is passed over here and shows in the sum
    }
    max = ATTNI_I(hmax)(top);
    if (attni_bits32(max) == 0xff800000u) max = 0;
    top = ATTNI_I(set1)(max);
    c = ATTNI_I(set1)((plain ? a->scale : 1.0f) * 1.44269504f);
    for (i = i0; i < to; i += 16) {
        x = ATTNI_K(exp2)(ATTNI_I(mul)(ATTNI_I(sub)(ATTNI_I(load)(s + i), top), c));
        sum = ATTNI_I(add)(sum, x);
        if (!a->lo) continue;
        if (i < cut) lo = ATTNI_MADD(x, ATTNI_I(load)(a->lo + i - i0), lo);
        if (i + 16 > cut) hi = ATTNI_MADD(x, ATTNI_I(load)(a->hi + i - i0), hi);
    }
    out[1] = ATTNI_I(hsum)(sum);
    out[0] = plain ? max * a->scale : max;
    if (!(attni_bits32(out[1]) << 1)) out[0] = attni_float(0xff800000u);
    out[2] = a->lo ? ATTNI_I(hsum)(lo) : 0;
    out[3] = a->lo ? ATTNI_I(hsum)(hi) : 0;
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

// For selectors. Raw products of a row, in segments of whole tiles, to each segment's maximum score
// m and sum l of exp(score - m), NaN if it met NaN or +inf, and e = l exp(m - ref). Returns ref,
// raised to the largest m where e would leave f32's range.
ATTNI_TGT static float ATTNI_K(sums)(const attni_segments *a, float *s, float ref, float *m,
                                     float *l, float *e) {
    const V ninf = ATTNI_I(barrier)(ATTNI_I(asv)(ATTNI_I(uset1)(0xff800000u)));
    const V scale = ATTNI_I(set1)(a->scale), cap = ATTNI_I(set1)(a->softcap);
    float top = attni_float(0xff800000u);
    V x, y, max, sum;
    int i, j;
    for (j = 0; j < a->n; j++) {
        const int32_t *seg = a->seg + 2 * j;
        float *p = s + 16 * seg[0];
        const float *ks = a->k_scale + 16 * seg[0];
        max = ninf;
        for (i = 0; 16 * i < seg[1]; i++) {
            x = ATTNI_I(mul)(ATTNI_I(mul)(ATTNI_I(load)(p + 16 * i), ATTNI_I(load)(ks + 16 * i)),
                             scale);
            if (a->softcap > 0)
                x = ATTNI_I(mul)(ATTNI_K(tanh)(ATTNI_I(div)(x, cap)), cap);
            if (seg[1] - 16 * i < 16)
                x = ATTNI_I(pick)((1u << (seg[1] - 16 * i)) - 1, x, ninf);
            ATTNI_I(store)(p + 16 * i, x);
            max = ATTNI_I(max)(x, max); // NaN is passed over here and shows in the sum
        }
        m[j] = ATTNI_I(hmax)(max);
        if (attni_less(top, m[j])) top = m[j];
        y = ATTNI_I(set1)(attni_bits32(m[j]) == 0xff800000u ? 0 : m[j]);
        sum = ATTNI_I(set1)(0);
        for (i = 0; 16 * i < seg[1]; i++)
            sum = ATTNI_I(add)(sum, ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(load)(p + 16 * i), y)));
        l[j] = ATTNI_I(hsum)(sum);
    }
    if (attni_less(ref + 60, top)) ref = top;
    x = ATTNI_K(exp)(ATTNI_I(sub)(ATTNI_I(load)(m), ATTNI_I(set1)(ref)));
    ATTNI_I(store)(e, ATTNI_I(mul)(x, ATTNI_I(load)(l)));
    return ref;
}

// Bounds x on a row's scores in 16 n nodes: products with their middles and, 128 floats on, of
// absolute values with their half-widths, the box's; the ball's replaces these if it is smaller.
// best: raised to x - z. weight: instead, returns the sum of weight exp(x - z), 3e38 past e^60.
ATTNI_TGT static float ATTNI_K(bounds)(const attni_bounds *a, const float *s, float norm, float z,
                                       float *best, const float *weight) {
    const V scale = ATTNI_I(set1)(a->scale), cap = ATTNI_I(set1)(a->softcap);
    const V q = ATTNI_I(set1)(norm), zz = ATTNI_I(set1)(z), most = ATTNI_I(set1)(60.0f);
    V sum = ATTNI_I(set1)(0), x, y;
    int i;
    for (i = 0; i < a->n; i++) {
        x = ATTNI_I(load)(s + 128 + 16 * i);
        y = ATTNI_I(mul)(q, ATTNI_I(load)(a->radius + 16 * i));
        x = ATTNI_I(add)(ATTNI_I(load)(s + 16 * i), ATTNI_I(less)(x, y, x, y));
        x = ATTNI_I(add)(x, ATTNI_I(mul)(q, ATTNI_I(load)(a->slack + 16 * i)));
        x = ATTNI_I(mul)(x, scale);
        if (a->softcap > 0)
            x = ATTNI_I(add)(ATTNI_I(mul)(ATTNI_K(tanh)(ATTNI_I(div)(x, cap)), cap),
                             ATTNI_I(mul)(cap, ATTNI_I(set1)(2e-6f)));
        x = ATTNI_I(sub)(x, zz);
        if (!weight) {
            ATTNI_I(store)(best + 16 * i, ATTNI_I(max)(x, ATTNI_I(load)(best + 16 * i)));
            continue;
        }
        y = ATTNI_K(exp)(ATTNI_I(less)(x, most, x, most));
        y = ATTNI_I(less)(x, most, y, ATTNI_I(set1)(3e38f));
        sum = ATTNI_I(add)(sum, ATTNI_I(mul)(y, ATTNI_I(load)(weight + 16 * i)));
    }
    return weight ? ATTNI_I(hsum)(sum) : 0;
}

// Squared norms of a tile's 16 rows.
ATTNI_TGT static void ATTNI_K(norms)(const float *tile, int dim, float *out) {
    V sum = ATTNI_I(set1)(0), x;
    int i;
    for (i = 0; i < dim; i++) {
        x = ATTNI_I(load)(tile + 16 * i);
        sum = ATTNI_I(add)(sum, ATTNI_I(mul)(x, x));
    }
    ATTNI_I(store)(out, sum);
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
                                         ATTNI_K(ramps), ATTNI_I(fold_portable),
                                         ATTNI_I(finish_portable), ATTNI_I(sums_portable),
                                         ATTNI_I(bounds_portable), ATTNI_I(norms_portable)};

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
// in a function that only prefetches: gcc would take it for one without effects and drop its calls
#define ATTNI_EFFECT __asm__ volatile("")
#else
#define ATTNI_INLINE static inline
#define ATTNI_CALLED static
#define ATTNI_PREFETCH(p) ((void)(p))
#define ATTNI_PREFETCH_L2(p) ((void)(p))
#define ATTNI_HIDE(p) ((void)0)
#define ATTNI_EFFECT ((void)0)
#endif
#if defined(__NVCC__) && defined(__CUDACC__) // it hands GCC's pragma to gcc, and complains
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

// Of the keys of a scan, for one row after the other.
typedef struct attni_segments {
    const float *k_scale; // per key
    float scale, softcap;
    const int32_t *seg;   // (n <= 16, 2) first tile, keys
    int n;
} attni_segments;
typedef struct attni_ramps {
    const float *k_scale, *lo, *hi; // per key, or NULL
    float scale, softcap;
} attni_ramps;
typedef struct attni_bounds {
    const float *radius, *slack; // (16 n) balls' radii; rounding, both times the row's norm
    float scale, softcap;        // scale > 0
    int n;                       // tiles of nodes, <= 8
} attni_bounds;

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
    void (*maxima)(const float *s, int nr, int n, float *m);
} attni_moves;

typedef struct attni_math {
    attni_qk_fn qk[8]; // by dtype; NULL: convert to F32 first
    attni_pv_fn pv[8];
    void (*soft)(const attni_soft *a, const attni_row *row, int n); // scores of n rows -> weights
    void (*ramps)(const attni_ramps *a, float *s, int from, int to, int cut, float *out);
    void (*fold)(float *o, float *m, float *l, const float *os, const float *ms, const float *ls,
                 int nr, int n);
    void (*finish)(float *o, float *m, float *l, float sink,
                   int n); // normalise; adds the sink logit
    float (*sums)(const attni_segments *a, float *s, float ref, float *m, float *l, float *e);
    float (*bounds)(const attni_bounds *a, const float *s, float norm, float z, float *best,
                    const float *weight);
    void (*norms)(const float *tile, int dim, float *out);
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
#define ATTNI_COUNT(x) ((void)__atomic_fetch_add(&(x), 1, __ATOMIC_RELAXED))
#else
#define ATTNI_GET(x) (*(volatile int *)&(x))
#define ATTNI_SET(x, y) (void)(*(volatile int *)&(x) = (y))
#define ATTNI_COUNT(x) ((void)(x)++) // a lost count is a guess gone wrong, no more
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

// Places t0 .. t0 + n of a page to the same places of another memory, and nothing else: the others
// may hold newer tokens already.
ATTNI_CALLED void attni_copy_slots(const attni_side *s, int64_t page, uint8_t *to, int32_t h0,
                                   int32_t h1, int32_t t0, int32_t n) {
    const uint8_t *from = s->data + page * s->page_bytes;
    int64_t row = (int64_t)s->dim * attni_bits_of(s->dtype) / 8, at;
    int32_t h, t, u, run;
    if (to == from) return;
    for (h = h0; h < h1; h++)
        for (t = t0; t < t0 + n; t += run) {
            size_t bytes = (size_t)row;
            run = 1;
            if (s->k16) { // up to the end of the tile
                run = attni_min32(16 - t % 16, t0 + n - t);
                bytes = 4 * (size_t)run;
            }
            at = attni_token_offset(s, t, h);
            for (u = 0; u < (s->k16 ? row / 4 : 1); u++, at += 64)
                memcpy(to + at, from + at, bytes);
        }
    for (h = h0; h < h1 && s->scale_offset >= 0; h++)
        for (t = t0; t < t0 + n; t++) {
            at = attni_scale_offset(s, t, h);
            memcpy(to + at, from + at, 4);
        }
}

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
    attni_copy_slots(s, page, attni_page_data(s, page), head, head + 1, place, 1);
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

ATTNI_CALLED attn_result attni_both_sides(const attn_desc *d, attni_side side[2]) {
    attn_result r = attni_cpu_check(d);
    if (r != ATTN_OK) return r;
    if ((r = attni_side_init(d, 0, &side[0])) != ATTN_OK) return r;
    return attni_side_init(d, 1, &side[1]);
}

ATTN_DEF attn_result attn_cpu_copy_pages(const attn_desc *d, const attn_page_copy *copies,
                                         int32_t n) {
    attni_side side[2];
    attn_result r = attni_both_sides(d, side);
    int32_t i, is_v;
    if (r != ATTN_OK) return r;
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
        for (i = 0; i < n; i++) {
            const attni_side *x = side + is_v;
            uint8_t *dst = x->data + copies[i].dst * x->page_bytes;
            attni_copy_slots(x, copies[i].src, dst, 0, d->n_kv_heads, 0, copies[i].n_tokens);
            attni_copy_slots(x, copies[i].dst, attni_page_data(x, copies[i].dst), 0, d->n_kv_heads,
                             0, copies[i].n_tokens);
        }
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cpu_cache_load(const attn_desc *d, const attn_cache_load *loads,
                                         int32_t n) {
    attni_side side[2];
    attn_result r = attni_both_sides(d, side);
    int32_t i, is_v;
    if (r != ATTN_OK) return r;
    if (n < 0 || (n > 0 && !loads) || !d->kv.cache) return ATTN_ERR_ARGUMENT;
    for (i = 0; i < n; i++) {
        if (loads[i].page < 0 || loads[i].page >= d->kv.n_pages) return ATTN_ERR_PAGE;
        if (loads[i].slot < 0 || loads[i].slot >= side[0].n_slots) return ATTN_ERR_PAGE;
    }
    for (is_v = 0; is_v < 2; is_v++) {
        const attni_side *x = side + is_v;
        if (is_v && x->copies == side[0].copies) break; // V aliases K
        for (i = 0; i < n; i++)
            memcpy(x->copies + loads[i].slot * x->page_bytes,
                   x->data + loads[i].page * x->page_bytes, (size_t)x->need_bytes);
    }
    return ATTN_OK;
}

// ==== >>impl-tasks  ==============================================================================

// A row's KV comes in spans of at most 256 tokens, which are folded in order. What a span is
// depends on the row's own mask and position only, and so do its bits:
//  - in general, spans are cut at multiples of 256 positions, and the mask says which are seen;
//  - under a block list (whole blocks, with nothing but keep_sink and keep_recent beside it) the
//    tokens that a list row's queries may see are gathered: the union of the sinks, the listed
//    blocks and what is recent for any query of the row block, ascending, 256 at a time from its
//    beginning. So work is what is listed, however small or scattered its blocks are. What a single
//    query does not see of this (the future, what is recent for others only) is masked.
// Such a span belongs to where it begins: to the segment, and the slot there, of the 256 positions
// that hold its first token. Spans begin 256 positions apart at least, so no slot gets two. One
// that begins before the sequence's spans may reach into them, when the front was evicted or lies
// before the window. It belongs to the 256 positions before these, of which nobody sees anything
// else, or, where no segment has them, to the sequence's first one, which folds.

typedef struct attni_part { // tokens of one tile that stand in one page
    int32_t t, n, page, place;
} attni_part;

// A place among the spans of some rows. Two equal ones go on alike.
typedef struct attni_walk {
    int32_t seq, head;  // whose K and V
    int64_t pos;        // what is below was walked over
    int64_t until;      // spans that begin here or later are another's
    int64_t stop;       // no token from here on
    int64_t e, end;     // the list row's entries that are left; end -1: spans of 256 positions
    int64_t sink, recent; // kept besides: what is below, what is not below
} attni_walk;

// A span: its tokens and where they are. What is not held stands on a neighbour (K, where it is
// masked) or on zeros (V).
typedef struct attni_rows {
    attni_walk from, to;       // before and behind the span
    int32_t n, *at;            // (256) positions of its n tokens, ascending
    uint64_t listed[4];        // gathered: which are in the list
    uint32_t tiles;            // the 16-token tiles whose rows are filled in
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
    int gathers;               // spans are gathered from block lists
    // the task
    const attn_task *task;
    int32_t *tok, *seq;        // (its tokens) global query token, sequence
    int32_t *pos;              // (its tokens) position
    // its rows at work: all of them, or, when spans are gathered, those that share a list row
    int32_t first, n_tokens, head, n_heads, n_rows; // tokens from first on x heads
    int32_t keep;              // tiles of K and V that are kept converted: all of a span, or 4
    int32_t r0, r1;            // the rows at work, whose scores stay in the first-level cache
    int32_t q_rows;            // so many rows of q are there
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
    int32_t fetched;           // so many tokens of rows[1] were asked for from memory
    int next;                  // rows[1] holds what comes next, if it is what is then asked for
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
        ATTNI_CARVE(w, rows[i].at, int32_t *, ATTN_SPAN)
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

// Are spans gathered? Sub-block bits, token trees and closed forms go the general way.
static int attni_gathers(const attn_mask *m) {
    return m->blocks.row_start && !m->blocks.bits && !m->stride.block && !m->vslash.block &&
           m->kind != ATTN_MASK_TREE;
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
    w->gathers = attni_gathers(&d->mask);
    w->v_dense = w->v.token_bytes * 8 == (int64_t)w->v.dim * attni_bits_of(w->v.dtype) &&
                 d->kv.page_tokens % 16 == 0 && !(w->gathers && d->mask.blocks.kv_block % 16);
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

// Is the sequence not as the plan saw it?
static int attni_stale(const attni_work *w, int32_t s) {
    const attn_plan_seq *q = &w->p->seq[s];
    return w->d->kv.kv_len[s] != q->kv_len || w->d->q_start[s] != q->q_begin ||
           attni_q_pos0(w->d, s) != q->q_pos0 || attni_kv_pos0(w->d, s) != q->kv_pos0;
}

// The task's query tokens.
ATTNI_CALLED attn_result attni_load_tokens(attni_work *w, const attn_task *t) {
    const attn_plan *p = w->p;
    const attn_segment *g = &p->segment[t->segment];
    int32_t i = 0, place, skip = t->first_token;
    w->task = t;
    for (place = g->seq0; place < g->seq0 + g->n_seq && i < t->n_tokens; place++) {
        int32_t s = p->order[place], j;
        const attn_plan_seq *q = &p->seq[s];
        if (skip >= q->q_len) {
            skip -= q->q_len;
            continue;
        }
        if (attni_stale(w, s)) return ATTN_ERR_STALE;
        for (j = skip, skip = 0; j < q->q_len && i < t->n_tokens; j++, i++) {
            w->tok[i] = q->q_begin + j;
            w->seq[i] = s;
            w->pos[i] = q->q_pos0 + j;
            if (w->d->mask.kind == ATTN_MASK_TREE && !q->is_chain)
                w->pos[i] = q->q_pos0 + attni_tree_depth(w->d, q->q_begin, j);
        }
    }
    return ATTN_OK;
}

// Rows: n of the task's tokens from first on, n_heads heads from head on.
ATTNI_CALLED void attni_set_rows(attni_work *w, int32_t first, int32_t n, int32_t head,
                                 int32_t n_heads) {
    // rows that stand together share masks: the heads of a token, or the tokens of a head
    const int by_head = w->per_head && n_heads > 1;
    int32_t i;
    w->first = first;
    w->n_tokens = n;
    w->head = head;
    w->n_heads = n_heads;
    w->n_rows = n * n_heads;
    // many rows in one block: what is converted for them is used at once, from the nearest cache
    w->keep = w->n_rows > ATTNI_FEW && w->n_rows <= ATTNI_ONE && w->x.qk_kind == ATTNI_F32 &&
                      w->x.pv_kind == ATTNI_F32 && w->vdp % 64 == 0 ? 4 : ATTNI_TILES;
    for (i = 0; i < w->n_rows; i++) {
        attni_row *x = w->row + i;
        x->token = first + (by_head ? i % n : i / n_heads);
        x->head = head + (by_head ? i / n : i % n_heads);
        x->bits = w->bits[by_head ? i : i / n_heads];
        x->add = NULL;
        x->alibi = x->alibi_first = 0;
        w->m[i] = attni_float(0xff800000u);
        w->l[i] = 0;
    }
    w->q_rows = 0;
}

// How many of the task's tokens from i on share a list row.
static int32_t attni_row_mates(const attni_work *w, int32_t i) {
    const int32_t rb = w->d->mask.blocks.row_block;
    int32_t n = 1;
    while (i + n < w->task->n_tokens && w->seq[i + n] == w->seq[i] &&
           w->pos[i + n] / rb == w->pos[i] / rb)
        n++;
    return n;
}

// How many heads of the group from the h'th on go together for the task's token i: all of them, or
// those whose gathered lists are the same.
ATTNI_CALLED int32_t attni_head_mates(const attni_work *w, int32_t i, int32_t h) {
    const attn_block_list *b = &w->d->mask.blocks;
    const int32_t head = w->task->kv_head * w->group + h;
    int64_t row, list, at, n;
    int32_t k = 1;
    if (!w->gathers || !w->per_head) return w->group;
    row = attni_list_row(w->d, w->seq[i], w->pos[i]);
    list = attni_list_of(w->d, b->n_lists, head);
    at = attni_row_start(b, (int32_t)list, row);
    n = attni_row_end(b, (int32_t)list, row) - at;
    for (; h + k < w->group; k++) {
        const int32_t other = attni_list_of(w->d, b->n_lists, head + k);
        const int64_t from = attni_row_start(b, other, row);
        if (attni_row_end(b, other, row) - from != n ||
            (n && memcmp(b->block + at, b->block + from, 4 * (size_t)n) != 0))
            break;
    }
    return k;
}

// ---- spans, in order

// The next tokens [lo, hi) from k->pos on, none of them or all in the list. 0 at the end.
static int attni_walk_run(const attn_block_list *b, attni_walk *k, int64_t *lo, int64_t *hi,
                          int *listed) {
    const int64_t size = b->kv_block, pos = k->pos;
    int64_t block, rest = pos < k->sink || pos > k->recent ? pos : k->recent;
    while (k->e < k->end && (b->block[k->e] + (int64_t)1) * size <= pos) k->e++;
    block = k->e < k->end ? b->block[k->e] * size : k->stop;
    *listed = block <= rest;
    if (*listed) { // with the blocks that follow it at once
        int64_t e = k->e + 1;
        *lo = attni_max64(block, pos);
        *hi = attni_min64(block + size, k->stop);
        for (; *hi - *lo < ATTN_SPAN && e < k->end && b->block[e] * size == *hi; e++)
            *hi = attni_min64(*hi + size, k->stop);
    } else {
        *lo = rest;
        *hi = attni_min64(rest < k->sink ? k->sink : k->stop, attni_min64(block, k->stop));
    }
    return *lo < *hi;
}

// Walks over the next span; x, unless NULL, becomes that span (empty at the end).
ATTNI_CALLED void attni_walk_span(const attni_work *w, attni_walk *k, attni_rows *x) {
    int64_t lo, hi;
    uint64_t in[4], rest[4] = {0, 0, 0, 0};
    int32_t n = 0, j, m;
    int listed;
    if (x) x->from = *k;
    if (k->end < 0) {
        n = k->pos < k->until ? ATTN_SPAN : 0;
        for (j = 0; x && j < n; j++) x->at[j] = (int32_t)k->pos + j;
        k->pos += n;
    } else {
        for (; n < ATTN_SPAN && attni_walk_run(&w->d->mask.blocks, k, &lo, &hi, &listed); n += m) {
            if (n == 0 && lo >= k->until) break;
            m = (int32_t)attni_min64(hi - lo, ATTN_SPAN - n);
            for (j = 0; x && j < m; j++) x->at[n + j] = (int32_t)lo + j;
            if (!listed) attni_bits_set(rest, n, n + m);
            k->pos = lo + m;
        }
        memset(in, 0, sizeof in);
        attni_bits_set(in, 0, n);
        for (j = 0; x && j < 4; j++) x->listed[j] = in[j] & ~rest[j];
    }
    if (!x) return;
    x->n = n;
    x->tiles = 0;
    x->to = *k;
}

// Where the rows of a segment at position pos of a sequence begin: those with this head.
ATTNI_CALLED void attni_walk_start(const attni_work *w, attni_walk *k, int32_t segment, int32_t s,
                                   int64_t pos, int32_t head) {
    const attn_mask *m = &w->d->mask;
    const attn_block_list *b = &m->blocks;
    const attn_segment *g = &w->p->segment[segment];
    const attn_plan_seq *q = &w->p->seq[s];
    const int32_t *chain = w->p->chain + q->chain;
    int64_t row0, first, lo, hi;
    int32_t unit = 1, list;
    int listed;
    memset(k, 0, sizeof *k); // equal ones are equal byte by byte
    k->seq = s;
    k->head = head / w->group;
    k->until = (int64_t)g->span1 * ATTN_SPAN;
    first = (int64_t)g->span0 * ATTN_SPAN;
    k->pos = first;
    k->end = -1;
    if (!w->gathers) return;
    // sinks and what is recent end where blocks may, so that tiles of K lie as they do in pages
    while (unit < 16 && b->kv_block % (2 * unit) == 0) unit *= 2;
    row0 = pos / b->row_block * b->row_block;
    k->pos = 0;
    k->stop = (int64_t)q->kv_pos0 + q->kv_len;
    if (m->kind != ATTN_MASK_FULL) k->stop = attni_min64(k->stop, row0 + b->row_block);
    k->sink = ((int64_t)m->keep_sink + unit - 1) / unit * unit;
    k->recent = k->stop;
    if (m->keep_recent)
        k->recent = attni_max64(0, row0 - (m->keep_recent - 1)) / unit * unit;
    list = attni_list_of(w->d, b->n_lists, head);
    k->e = attni_row_start(b, list, attni_list_row(w->d, s, pos));
    k->end = attni_row_end(b, list, attni_list_row(w->d, s, pos));
    if (g->span1 < q->span0) k->until = 0;
    while (w->p->segment[*chain].span1 < q->span0) chain++;
    while (*chain != segment) { // what begins before it is another segment's
        attni_walk before = *k;
        if (!attni_walk_run(b, &before, &lo, &hi, &listed) || lo >= first) break;
        attni_walk_span(w, k, NULL);
    }
}

// The slot of rows[0] in its segment.
static int32_t attni_slot(const attni_work *w) {
    const int32_t first = w->p->segment[w->task->segment].span0;
    const int32_t least = w->p->seq[w->rows[0].from.seq].span0 - 1;
    int32_t at = w->rows[0].at[0] / ATTN_SPAN;
    return w->gathers ? attni_max32(attni_max32(at, least), first) - first : at - first;
}

// rows[0] becomes the next span of k; maybe it was found already.
ATTNI_CALLED void attni_take_span(attni_work *w, attni_walk *k) {
    if (w->next && memcmp(&w->rows[1].from, k, sizeof *k) == 0) {
        attni_rows swap = w->rows[0];
        w->rows[0] = w->rows[1];
        w->rows[1] = swap;
        *k = w->rows[0].to;
        w->next = 0;
    } else attni_walk_span(w, k, &w->rows[0]);
}

// ---- span: masks, then K and V rows

static uint16_t attni_tiles_of(const uint64_t b[4]) {
    uint32_t t = 0;
    int i;
    for (i = 0; i < ATTNI_TILES; i++)
        if ((b[i / 4] >> (16 * (i % 4))) & 0xffffu) t |= 1u << i;
    return (uint16_t)t;
}

// The first of a gathered span's tokens whose position is not below p.
static int32_t attni_at_least(const attni_rows *x, int64_t p) {
    if (p <= x->at[0]) return 0;
    if (p > x->at[x->n - 1]) return x->n;
    return (int32_t)attni_lower_bound(x->at, 0, x->n, p);
}

// Which tokens of a gathered span the query of the task's token i sees: mostly all that are listed.
ATTNI_CALLED void attni_gathered_bits(const attni_work *w, int32_t i, uint64_t bits[4]) {
    const attn_mask *m = &w->d->mask;
    const attni_rows *x = &w->rows[0];
    const attn_plan_seq *q = &w->p->seq[w->seq[i]];
    const int64_t at0 = x->at[0], at1 = x->at[x->n - 1], p = w->pos[i];
    int64_t lo = q->kv_pos0, hi = lo + q->kv_len, left = lo;
    uint64_t base[4] = {0, 0, 0, 0};
    int j;
    memcpy(bits, x->listed, sizeof x->listed);
    if (at0 < m->keep_sink) attni_bits_set(bits, 0, attni_at_least(x, m->keep_sink));
    if (m->keep_recent && at1 > p - m->keep_recent)
        attni_bits_set(bits, attni_at_least(x, p - (m->keep_recent - 1)), x->n);
    if (m->kind != ATTN_MASK_FULL) hi = attni_min64(hi, p + 1);
    if (m->window_left) left = attni_max64(lo, p - (m->window_left - 1));
    if (at0 >= left && at1 < hi && !m->window_right) return;
    attni_bits_set(base, attni_at_least(x, left),
                   attni_at_least(x, m->window_right ? attni_min64(hi, p + m->window_right) : hi));
    if (m->n_sink)
        attni_bits_set(base, attni_at_least(x, lo), attni_at_least(x, attni_min64(hi, m->n_sink)));
    for (j = 0; j < 4; j++) bits[j] &= base[j];
}

// Do all rows see the same of a gathered span, as its past mostly is?
static int attni_gathered_alike(const attni_work *w) {
    const attn_mask *m = &w->d->mask;
    const attni_rows *x = &w->rows[0];
    const attn_plan_seq *q = &w->p->seq[w->seq[w->first]];
    const int64_t at1 = x->at[x->n - 1], p = w->pos[w->first]; // the other queries follow it
    if (m->window_left || m->window_right || x->at[0] < q->kv_pos0) return 0;
    if (m->keep_recent && at1 > p - m->keep_recent) return 0;
    return at1 < (int64_t)q->kv_pos0 + q->kv_len && (m->kind == ATTN_MASK_FULL || at1 <= p);
}

// Fills bits and tiles; returns the union of tiles (0: nobody sees anything in this span).
ATTNI_CALLED uint16_t attni_span_masks(attni_work *w) {
    uint32_t all = 0;
    int32_t g, i, r, rb = w->x.rb, n = w->per_head && w->n_heads > 1 ? w->n_heads : 1;
    const int alike = w->gathers && attni_gathered_alike(w);
    for (g = 0; g < n; g++)
        for (r = 0; r < w->n_tokens; r++) {
            uint64_t *bits = w->bits[g * w->n_tokens + r];
            const attn_plan_seq *q;
            i = w->first + r;
            q = &w->p->seq[w->seq[i]];
            if (alike && r) memcpy(bits, w->bits[0], sizeof *w->bits);
            else if (w->gathers) attni_gathered_bits(w, i, bits);
            else
                attni_span_bits(&w->masker, q, w->seq[i], w->tok[i] - q->q_begin, w->pos[i],
                                w->head + g, w->rows[0].at[0] / ATTN_SPAN, bits);
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
    return attni_page_data(s, p->page) + attni_scale_offset(s, p->place, head);
}

ATTNI_CALLED void attni_side_scales(const attni_side *s, const attni_rows *x, float *out) {
    const float *fixed = s->head_scale ? s->head_scale + x->from.head : NULL;
    int32_t i, t;
    for (i = 0; i < x->n_parts; i++) {
        const attni_part *p = x->part + i;
        const uint8_t *at = attni_scales_at(s, p, x->from.head);
        if (!fixed && s->scale_token == 4) memcpy(out + p->t, at, 4 * (size_t)p->n);
        else
            for (t = 0; t < p->n; t++)
                memcpy(out + p->t + t, fixed ? (const uint8_t *)fixed : at + t * s->scale_token, 4);
    }
}

ATTNI_CALLED void attni_fetch_scales(const attni_side *s, const attni_rows *x) {
    int32_t i, t;
    ATTNI_EFFECT;
    for (i = 0; i < x->n_parts && !s->head_scale; i++) {
        const attni_part *p = x->part + i;
        const uint8_t *at = attni_scales_at(s, p, x->from.head);
        for (t = 0; t < p->n; t += s->scale_token < 64 ? 64 / (int32_t)s->scale_token : 1)
            ATTNI_PREFETCH(at + t * s->scale_token);
    }
}

// How many of a span's tokens from t on, up to end, follow each other.
static int32_t attni_in_line(const attni_rows *x, int32_t t, int32_t end) {
    int32_t n = 1;
    if (x->at[end - 1] - x->at[t] == end - 1 - t) return end - t;
    while (x->at[t + n] == x->at[t] + n) n++;
    return n;
}

// Fills in the rows of tiles of a span. Bad pages are errors, or zeros when one only looks ahead.
ATTNI_CALLED attn_result attni_find_rows(attni_work *w, uint32_t tiles, int looking,
                                         attni_rows *x) {
    const int32_t pt = w->d->kv.page_tokens, s = x->from.seq, head = x->from.head;
    const attn_plan_seq *q = &w->p->seq[s];
    const int32_t lo = attni_at_least(x, q->kv_pos0),
                  hi = attni_at_least(x, (int64_t)q->kv_pos0 + q->kv_len);
    const int kscale = attni_is_scaled(w->k.dtype), vscale = attni_is_scaled(w->v.dtype);
    const int64_t k_step = w->k.k16 ? 4 : w->k.token_bytes;
    int i, t;
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
        for (t = t0; t < t1; t = end) { // up to the end of the tile, page or block
            int32_t j = x->at[t] - q->kv_pos0, place = j % pt, page = attni_page_of(w->d, s, j);
            const uint8_t *k, *v, *look;
            int64_t look_step = w->k.token_bytes;
            end = attni_min32(t + attni_in_line(x, t, t1), t + (pt - place));
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
            k = look = attni_page_data(&w->k, page) + attni_token_offset(&w->k, place, head);
            v = attni_page_data(&w->v, page) + attni_token_offset(&w->v, place, head);
            if (w->k.k16) look_step = 4 * w->k_units;
            if (w->k.k16 && t == 16 * i && place % 16 == 0 && end == t1)
                x->kt[i] = (const uint32_t *)(const void *)k;
            if (kscale || vscale) {
                const attni_part part = {t, end - t, page, place};
                x->part[x->n_parts++] = part;
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
    // what comes next from memory, or with many rows, of which attni_fetch_next took care, V itself
    const int soon = w->n_rows > ATTNI_ONE;
    const void *const *ahead = soon ? w->rows[0].v + ATTNI_AHEAD
                                    : w->next ? w->rows[1].ahead : w->rows[0].v;
    int n = attni_runs_of(tiles, run), i, j, b, vd = w->p->v_head_dim;
    int look = soon ? vd * attni_bits_of(t) / 8 : w->next ? 4 * w->k_units : 0;
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

// Where the rows after those at work begin: of this task, or of the task to come. 0: not known.
static int attni_next_rows(const attni_work *w, attni_walk *k) {
    const attn_plan *p = w->p;
    const attn_task *t = w->then;
    int32_t i = w->first, head = w->head + w->n_heads, place, skip, s;
    if (head == (w->task->kv_head + 1) * w->group) i += w->n_tokens, head -= w->group;
    if (i < w->task->n_tokens) {
        attni_walk_start(w, k, w->task->segment, w->seq[i], w->pos[i], head);
        return 1;
    }
    if (!t) return 0;
    place = p->segment[t->segment].seq0;
    for (skip = t->first_token; skip >= p->seq[p->order[place]].q_len; place++)
        skip -= p->seq[p->order[place]].q_len;
    s = p->order[place];
    if (attni_stale(w, s)) return 0;
    attni_walk_start(w, k, t->segment, s, (int64_t)p->seq[s].q_pos0 + skip, t->kv_head * w->group);
    return 1;
}

// Finds the rows of what comes after the span at work.
ATTNI_CALLED void attni_look_ahead(attni_work *w) {
    attni_walk k = w->rows[0].to;
    w->next = 0;
    attni_walk_span(w, &k, &w->rows[1]);
    if (!w->rows[1].n) {
        if (!attni_next_rows(w, &k)) return;
        attni_walk_span(w, &k, &w->rows[1]);
        if (!w->rows[1].n) return;
    }
    attni_find_rows(w, 0xffffu, 1, &w->rows[1]);
    w->next = 1;
    w->fetched = 0;
}

// One reading of every page that n tokens of a sequence lie in, at positions at[], or from first on
// without at. tiles: those that are read.
ATTNI_CALLED void attni_count_reads(const attn_desc *d, int32_t s, const int32_t *at, int64_t first,
                                    int32_t n, uint32_t tiles) {
    const int64_t kv_pos0 = attni_kv_pos0(d, s);
    int64_t last = -1;
    int32_t t, page;
    for (t = 0; t < n; t++) {
        const int64_t j = (at ? at[t] : first + t) - kv_pos0;
        if (!((tiles >> (t / 16)) & 1u) || j < 0 || j >= d->kv.kv_len[s]) continue;
        if (j / d->kv.page_tokens == last) continue;
        last = j / d->kv.page_tokens;
        if ((page = attni_page_of(d, s, (int32_t)j)) >= 0) ATTNI_COUNT(d->kv.cache->reads[page]);
    }
}

// Rows of a span.
ATTNI_CALLED attn_result attni_load_span(attni_work *w, uint32_t tiles) {
    attni_rows *x = &w->rows[0];
    if (w->d->kv.cache && w->d->kv.cache->reads)
        attni_count_reads(w->d, x->from.seq, x->at, 0, x->n, tiles);
    if (tiles & ~x->tiles) {
        attn_result r = attni_find_rows(w, tiles, 0, x);
        if (r != ATTN_OK) return r;
    } else if (!x->has_scales) {
        if (attni_is_scaled(w->k.dtype)) attni_side_scales(&w->k, x, x->ks);
        if (attni_is_scaled(w->v.dtype)) attni_side_scales(&w->v, x, x->vs);
        x->has_scales = 1;
    }
    attni_look_ahead(w);
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
    // with many rows all of it lies in the second-level cache: the next tile's K instead
    const int soon = w->n_rows > ATTNI_ONE;
    int i, t, turn;
    for (turn = 0; turn < ATTNI_TILES; turn++) {
        const uint8_t *ahead[16];
        int64_t slot;
        uint32_t *raw;
        int next;
        i = w->keep == ATTNI_TILES ? attni_tile_turn(turn) : turn;
        next = w->keep == ATTNI_TILES ? attni_tile_turn(attni_min32(turn + 1, ATTNI_TILES - 1)) : i;
        slot = 16 * (i % w->keep);
        raw = w->kraw + (widen ? 0 : slot * w->k_units);
        if (!((tiles >> i) & 1u)) continue;
        w->kt[i] = x->kt[i];
        if (!w->kt[i]) {
            if (!x->k[16 * i]) memset(raw, 0, 64 * (size_t)w->k_units); // nothing held
            else {
                for (t = 0; t < 16; t++) {
                    int row = half ? 2 * (turn % 4) + t / 4 % 2 : 4 * (turn % 4) + t / 4;
                    ahead[t] = (const uint8_t *)x->v[16 * (turn / 4 + 4 * (t % 4)) + row];
                    if (soon) ahead[t] = x->k[16 * next + t] ? x->k[16 * next + t] : x->k[16 * i];
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

// The next span to the second-level cache while many rows are at work on this, a few tokens at a
// time, or the CPU waits for them: as many as `part` of the 64 parts of rows r0 .. r1 stand for.
ATTNI_CALLED void attni_fetch_next(attni_work *w, int32_t part) {
    const attni_rows *x = &w->rows[1];
    const int32_t rows = 64 * w->r0 + part * (w->r1 - w->r0);
    const int32_t end = attni_min32(ATTN_SPAN * rows / (64 * w->n_rows) + 1, ATTN_SPAN);
    int64_t k = 4 * (int64_t)w->k_units, v = w->v.dim * attni_bits_of(w->v.dtype) / 8, b;
    ATTNI_EFFECT;
    if (!w->next || w->n_rows <= ATTNI_ONE) return;
    for (; w->fetched < end; w->fetched++) {
        const uint8_t *at = (const uint8_t *)x->ahead[w->fetched];
        for (b = 0; b < k; b += 64) ATTNI_PREFETCH_L2(at + b);
        at = (const uint8_t *)x->v[w->fetched];
        for (b = 0; b < v; b += 64) ATTNI_PREFETCH_L2(at + b);
    }
}

// Of these parts those of the scores; where the dot makes them fast the weights have the rest.
ATTNI_INLINE int32_t attni_scores_part(const attni_work *w) {
    return w->x.qk_kind == ATTNI_F32 ? 64 : 24;
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
        attni_fetch_next(w, attni_scores_part(w) / 4 * (panel / 4 + 1));
    }
}

// Bias, and ALiBi where gathering or a token tree makes positions irregular, as one array; NULL if
// neither.
static const float *attni_row_add(attni_work *w, int32_t i, int32_t head, int irregular) {
    const attn_desc *d = w->d;
    const attn_tensor *b = &d->logits.bias;
    const attni_rows *at = &w->rows[0];
    const attn_plan_seq *q = &w->p->seq[w->seq[i]];
    int t;
    if (!b->data && !irregular) return NULL;
    for (t = 0; t < ATTN_SPAN; t++) {
        float x = 0;
        int64_t kp = t < at->n ? at->at[t] : -1, j = kp - q->kv_pos0;
        if (j < 0 || j >= q->kv_len) {
            w->add[t] = 0;
            continue;
        }
        if (irregular) {
            if (!w->gathers && kp >= q->q_pos0)
                kp = q->q_pos0 + attni_tree_depth(d, q->q_begin, (int32_t)(kp - q->q_pos0));
            x = d->logits.alibi[head] * (float)(kp - w->pos[i]);
            ATTNI_PIN(x);
        }
        if (b->data)
            x += attni_get(b->data, b->dtype,
                           head * b->stride_head + w->tok[i] * b->stride_token + j);
        w->add[t] = x;
    }
    return w->add;
}

ATTNI_CALLED void attni_weights(attni_work *w) {
    const attn_logits *c = &w->d->logits;
    const int64_t at = w->rows[0].at[0];
    attni_soft a;
    const int32_t part = attni_scores_part(w);
    const int32_t few = w->n_rows > ATTNI_ONE && part < 64 ? 4 : w->n_rows;
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
            int tree = w->d->mask.kind == ATTN_MASK_TREE && !q->is_chain &&
                       at + ATTN_SPAN > q->q_pos0;
            int irregular = c->alibi && (tree || w->gathers);
            x->alibi = c->alibi && !irregular ? c->alibi[x->head] : 0;
            x->alibi_first = (float)(at - w->pos[x->token]);
            x->add = attni_row_add(w, x->token, x->head, irregular);
        }
        // there is one buffer for what is added; and see attni_fetch_next
        if (x->add || r + 1 == w->r1 || r + 1 == first + few) {
            w->x.ma->soft(&a, w->row + first, r + 1 - first);
            a.m += r + 1 - first;
            a.l += r + 1 - first;
            first = r + 1;
            attni_fetch_next(w, part + (64 - part) * (first - w->r0) / (w->r1 - w->r0));
        }
    }
}

static const void *attni_row_weights(const attni_work *w, int32_t r) {
    int32_t at = (r - w->r0) * ATTNI_LDS;
    return w->x.pv_kind == ATTNI_BDOT ? (const void *)(w->p16 + at) : (const void *)(w->s + at);
}

// A row whose sum holds Inf or NaN: again, with zeros for the V rows its own mask hides, since 0 *
// NaN of another row's token must not reach it.
ATTNI_CALLED void attni_row_again(attni_work *w, int32_t r, uint32_t tiles, float *out) {
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
            int32_t s = w->rows[0].from.seq, j = w->rows[0].at[t] - w->p->seq[s].kv_pos0;
            row[t] = attni_page_data(&w->v, attni_page_of(w->d, s, j)) +
                     attni_token_offset(&w->v, j % w->d->kv.page_tokens, w->rows[0].from.head);
        }
    }
    pv = attni_prepare_v(w, row, tiles);
    pv(p, 1, row, row, run, n, 0, w->vdp, w->os + 2 * ATTNI_RB_MAX * (int64_t)w->vdp, w->vdp);
    memcpy(out, w->os + 2 * ATTNI_RB_MAX * (int64_t)w->vdp, 4 * (size_t)w->vdp);
}

static float *attni_partial(const attni_work *w, float *base, int32_t slot, int32_t r) {
    const attn_segment *g = &w->p->segment[w->task->segment];
    int64_t token = w->task->first_token + w->row[r].token;
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
ATTNI_CALLED void attni_sums(attni_work *w, attni_pv_fn pv, uint32_t tiles, float *partials) {
    const attn_segment *g = &w->p->segment[w->task->segment];
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
        for (i = 0; i < nr; i++) attni_row_again(w, r + i, mine, os + i * vdp);
        w->keep = keep;
        // its V stands where the other rows' did
        attni_find_rows(w, tiles, 0, &w->rows[0]);
        if (!here) attni_prepare_v(w, w->rows[0].v, tiles);
    }
    if (g->n_slots <= 1)
        w->x.ma->fold(w->o + w->r0 * vdp, w->m + w->r0, w->l + w->r0, w->os, w->sm, w->sl,
                      w->r1 - w->r0, w->vdp);
    for (r = w->r0; r < w->r1 && g->n_slots > 1; r++)
        attni_put_partial(w, attni_partial(w, partials, attni_slot(w), r),
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

// The span in rows[0] for the rows at work.
ATTNI_CALLED attn_result attni_run_span(attni_work *w, float *partials) {
    const int32_t block = w->n_rows <= ATTNI_ONE ? w->n_rows : w->x.rb;
    const uint16_t tiles = attni_span_masks(w);
    attni_qk_fn qk = NULL;
    attni_pv_fn pv = NULL;
    attn_result r;
    int units = 0;
    if (!tiles) return ATTN_OK;
    if ((r = attni_load_span(w, tiles)) != ATTN_OK) return r;
    if (block < w->n_rows) qk = attni_prepare_k(w, tiles, &units);
    for (w->r0 = 0; w->r0 < w->n_rows; w->r0 += block) {
        w->r1 = attni_min32(w->n_rows, w->r0 + block);
        if (w->q_rows < w->r1) attni_load_q(w);
        attni_scores(w, qk, units, tiles);
        attni_weights(w);
        if (!pv && block < w->n_rows) pv = attni_prepare_v(w, w->rows[0].v, tiles);
        attni_sums(w, pv, tiles, partials);
    }
    return ATTN_OK;
}

// All spans for the rows at work.
ATTNI_CALLED attn_result attni_run_rows(attni_work *w, float *partials) {
    const attn_segment *g = &w->p->segment[w->task->segment];
    const attn_mask *m = &w->d->mask;
    const int64_t none = w->gathers ? INT64_MAX : 0; // closed-form skips are not for gathered spans
    int64_t p0 = INT64_MAX, p1 = none;
    attni_walk k;
    attn_result r = ATTN_OK;
    int32_t i, slot;
    for (i = w->first; i < w->first + w->n_tokens; i++) {
        const attn_plan_seq *q = &w->p->seq[w->seq[i]];
        p0 = attni_min64(p0, w->pos[i]); // token-tree slots reach up to the last query's
        p1 = attni_max64(p1, (int64_t)q->q_pos0 + (w->tok[i] - q->q_begin));
    }
    for (slot = 0; slot < g->n_slots && g->n_slots > 1; slot++)
        for (i = 0; i < w->n_rows; i++)
            attni_partial(w, partials, slot, i)[w->p->v_head_dim] = attni_float(0xff800000u);
    attni_walk_start(w, &k, w->task->segment, w->seq[w->first], w->pos[w->first], w->head);
    while (r == ATTN_OK) {
        if (m->kind != ATTN_MASK_FULL && k.pos > p1) break; // before looking at any row
        if (m->window_left && !w->gathers && k.pos >= m->n_sink)
            k.pos = attni_max64(k.pos, attni_min64(k.until, (p0 - (m->window_left - 1)) /
                                                                ATTN_SPAN * ATTN_SPAN));
        attni_take_span(w, &k);
        if (!w->rows[0].n) break;
        r = attni_run_span(w, partials);
    }
    for (i = 0; i < w->n_rows && g->n_slots <= 1 && r == ATTN_OK; i++) {
        float *o = w->o + (int64_t)i * w->vdp;
        if (g->n_slots == 1)
            attni_put_partial(w, attni_partial(w, partials, 0, i), o, w->m[i], w->l[i]);
        else
            attni_write_row(w->d, &w->x, w->tok[w->row[i].token], w->row[i].head, o, w->m[i],
                            w->l[i]);
    }
    return r;
}

ATTNI_CALLED attn_result attni_run_task(attni_work *w, const attn_task *t, float *partials) {
    attn_result r = attni_load_tokens(w, t);
    int32_t h, i;
    for (i = 0; i < t->n_tokens && r == ATTN_OK; i += w->n_tokens)
        for (h = 0; h < w->group && r == ATTN_OK; h += w->n_heads) {
            attni_set_rows(w, i, w->gathers ? attni_row_mates(w, i) : t->n_tokens,
                           t->kv_head * w->group + h, attni_head_mates(w, i, h));
            r = attni_run_rows(w, partials);
        }
    return r;
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
    // fewer conversions of K and V; rows of sub-block bits differ too much
    if (!d->mask.blocks.bits && rows / 512 >= 8 * (int64_t)out->workers) out->row_tile = 512;
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

// A partial row: keys [from, to).
static attn_result attni_check_partial(const attn_desc *d, int32_t token, int32_t head,
                                       int64_t from, int64_t to, const float *x) {
    float o[ATTN_MAX_HEAD_DIM], m, l, lse;
    int32_t vd = attni_v_dim(d), e, seen;
    m = x[vd];
    l = x[vd + 1];
    seen = attni_bits32(m) != 0xff800000u && l > 0;
    for (e = 0; e < vd; e++) o[e] = seen ? x[e] / l : 0;
    lse = seen && attni_finite(l) ? (float)((double)m + attni_ln((double)l)) : m;
    return attn_check_row(d, token, head, from, to, o, &lse);
}

// The keys [*from, *to) of row r that are folded into a slot of its segment.
static void attni_check_bounds(attni_work *w, int32_t r, int32_t slot, int64_t *from, int64_t *to) {
    const attn_segment *g = &w->p->segment[w->task->segment];
    const int32_t last = g->n_slots == 1 ? g->span1 - g->span0 - 1 : slot;
    int32_t at;
    attni_walk k;
    *from = ((int64_t)g->span0 + slot) * ATTN_SPAN;
    *to = ((int64_t)g->span0 + last + 1) * ATTN_SPAN;
    if (!w->gathers) return;
    attni_walk_start(w, &k, w->task->segment, w->seq[w->row[r].token], w->pos[w->row[r].token],
                     w->row[r].head);
    if (k.until > 0) k.until = INT64_MAX;
    *from = *to = INT32_MAX;
    do {
        attni_walk_span(w, &k, &w->rows[0]);
        if (!w->rows[0].n) return;
        at = attni_slot(w);
        if (at >= slot) *from = attni_min64(*from, w->rows[0].at[0]);
    } while (at <= last);
    *to = w->rows[0].at[0];
}

static attn_result attni_check_run(attni_work *w, int32_t first, int32_t count, float *partials) {
    uint32_t turn = (uint32_t)ATTNI_CHECK_NEXT(), pick = turn * 2654435761u;
    const attn_segment *g;
    const attn_task *t;
    attn_result r;
    int64_t from, to;
    int32_t row, token, head, slot;
    ATTNI_CHECK_SPOIL(w->d, partials);
    if (count == 0 || turn % ATTNI_CHECK_EVERY != 0) return ATTN_OK;
    t = w->p->task + first + (int32_t)((pick >> 16) % (uint32_t)count);
    g = w->p->segment + t->segment;
    if ((r = attni_load_tokens(w, t)) != ATTN_OK) return r;
    attni_set_rows(w, 0, t->n_tokens, t->kv_head * w->group, w->group);
    row = (int32_t)((pick >> 8) % (uint32_t)w->n_rows);
    token = w->tok[w->row[row].token];
    head = w->row[row].head;
    if (g->n_slots == 0) return attni_check_written(w->d, token, head);
    slot = (int32_t)(pick % (uint32_t)g->n_slots);
    attni_check_bounds(w, row, slot, &from, &to);
    return attni_check_partial(w->d, token, head, from, to, attni_partial(w, partials, slot, row));
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
// products of the stored values, whatever the problem's numerics: the bf16 dot serves where these
// are bf16 themselves, so that products are exact.
typedef struct attni_scan {
    const attn_desc *d;
    const attn_select *f;      // filled in
    const attn_selection *x;
    const attn_summary *y;     // or NULL
    attni_exec e;
    attni_side k;
    int32_t units, group;
    float scale;
    attni_exec dot;            // with the bf16 dot, if `dots`
    int dots;
    // asked for, before keys are taken: at most ATTNI_FEW rows, which read keys in their own dtype;
    // or rows of bf16 pairs
    int few, pairs;
    attni_qk_fn qk;            // what reads kt then, in so many units; a row's 4-byte units; rows
    int32_t qk_units, ldq, rb; // it takes together
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
    ATTNI_CARVE(c, q, float *, ((size_t)ATTNI_SCAN_ROWS + ATTNI_RB_MAX) * (dim + 16))
    ATTNI_CARVE(c, s, float *, ((size_t)ATTNI_SCAN_ROWS + ATTNI_RB_MAX) * ATTNI_LDS)
    if (base) c->rest = base + at;
    return at;
}

// The kernel for what was asked for; 1 when it reads keys in their own dtype.
ATTNI_CALLED int attni_scan_use(attni_scan *c) {
    const int own = c->k.dtype == ATTN_F32 || c->pairs || (c->few && c->e.ma->qk[c->k.dtype]);
    const int32_t dim = c->d->head_dim;
    c->qk = c->pairs ? c->dot.qk : c->e.ma->qk[own ? c->k.dtype : ATTN_F32];
    c->qk_units = own ? c->units : dim;
    c->ldq = c->pairs ? ((dim + 31) & ~31) / 2 : dim;
    c->rb = c->pairs ? c->dot.rb : c->e.rb;
    return own;
}

// Scratch may be asked for before the executor is known.
static size_t attni_scan_may_dot(const attn_desc *d) {
    return d->q.dtype == ATTN_BF16 && d->kv.k.dtype == ATTN_BF16;
}

// n rows of f32 that are bf16 in truth to rows of pairs.
ATTNI_CALLED void attni_scan_pairs(const attni_scan *c, const float *q, int32_t n, uint32_t *out) {
    const int32_t dim = c->d->head_dim, ld = ((dim + 31) & ~31) / 2;
    int32_t r;
    for (r = 0; r < n; r++, q += dim, out += ld) {
        memset(out, 0, 4 * (size_t)ld);
        c->e.mv->narrow(ATTN_BF16, q, dim, out);
    }
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
    plain.o.dtype = ATTN_BF16;
    attni_choose(&plain, &c->dot);
    c->dots = c->dot.qk_kind == ATTNI_BDOT;
    attni_scan_use(c);
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

// Where 16 keys lie, from the i'th of attni_scan_keys' on, and their scales; those that are not
// held: at the place of one that is. All NULL: none is.
ATTNI_CALLED attn_result attni_scan_locate(attni_scan *c, int32_t seq, int32_t kv_head,
                                           const int32_t *pos, int64_t first, int32_t n, int32_t i,
                                           const uint8_t **key) {
    const attn_desc *d = c->d;
    const int64_t kv_pos0 = attni_kv_pos0(d, seq), kv_len = d->kv.kv_len[seq];
    const int32_t pt = d->kv.page_tokens, scaled = attn_dtype_scaled(d->kv.k.dtype);
    const uint8_t *any = NULL, *base = NULL;
    int64_t lo = 0, hi = 0; // positions of the page at base
    int32_t t, page;
    for (t = 0; t < 16; t++) {
        int64_t j = (pos && i + t < n ? pos[i + t] : first + i + t) - kv_pos0;
        key[t] = NULL;
        c->ks[i + t] = 0;
        if (i + t >= n || j < 0 || j >= kv_len) continue;
        if (j < lo || j >= hi) {
            if ((page = attni_page_of(d, seq, (int32_t)j)) < 0) return ATTN_ERR_PAGE;
            base = attni_page_data(&c->k, page);
            lo = (int32_t)j / pt * (int64_t)pt;
            hi = lo + pt;
        }
        any = key[t] = base + attni_token_offset(&c->k, (int32_t)(j - lo), kv_head);
        c->ks[i + t] = scaled ? attni_scale_in(&c->k, base, (int32_t)(j - lo), kv_head) : 1;
    }
    for (t = 0; t < 16; t++)
        if (!key[t]) key[t] = any;
    return ATTN_OK;
}

// K16: do 16 keys lie as a tile already?
ATTNI_INLINE int attni_scan_is_tile(const attni_scan *c, const uint8_t *const *key) {
    int t = 0;
    if (!c->k.k16) return 0;
    while (t < 16 && key[t] == key[0] + 4 * t) t++;
    return t == 16;
}

// Takes n <= 256 keys of a sequence and KV head, at the positions pos[], or first + i without pos;
// positions that are not held score 0. ERR_PAGE.
ATTNI_CALLED attn_result attni_scan_keys(attni_scan *c, int32_t seq, int32_t kv_head,
                                         const int32_t *pos, int64_t first, int32_t n) {
    const attn_desc *d = c->d;
    const uint8_t *key[2][16]; // of this tile and the next
    attn_result r = attni_scan_locate(c, seq, kv_head, pos, first, n, 0, key[0]);
    const int own_type = attni_scan_use(c);
    int32_t i;
    if (d->kv.cache && d->kv.cache->reads) attni_count_reads(d, seq, pos, first, n, 0xffffu);
    c->n_tiles = (n + 15) / 16;
    for (i = 0; i < c->n_tiles; i++) {
        uint32_t *raw = c->raw + 16 * i * (int64_t)c->units;
        const uint8_t *const *own = key[i & 1], *const *next = key[(i + 1) & 1];
        if (r == ATTN_OK && i + 1 < c->n_tiles)
            r = attni_scan_locate(c, seq, kv_head, pos, first, n, 16 * i + 16, key[(i + 1) & 1]);
        if (r != ATTN_OK) return r;
        c->kt[i] = raw;
        if (!own[0]) memset(raw, 0, 64 * (size_t)c->units);
        else if (attni_scan_is_tile(c, own)) c->kt[i] = (const uint32_t *)(const void *)own[0];
        else
            c->e.mv->pack(own, c->k.k16 ? 64 : 4, c->units, raw,
                          i + 1 < c->n_tiles && next[0] ? next : own);
        if (!own_type) {
            float *out = c->kf + 16 * i * (int64_t)d->head_dim;
            c->e.mv->widen_tile(c->k.dtype, c->kt[i], c->units, out);
            c->kt[i] = (const uint32_t *)(const void *)out;
        }
    }
    for (i = c->n_tiles; i < c->n_tiles + 3; i++) c->kt[i] = c->kt[c->n_tiles - 1];
    return ATTN_OK;
}

// Raw products of nr <= 64 rows at q (RB_MAX more may be read) with the keys: s[r * LDS + i]. Not
// yet times ks and scale.
ATTNI_CALLED void attni_scan_rows(attni_scan *c, const void *q, int32_t nr) {
    static const uint8_t col[ATTNI_TILES + 3] = {0, 1,  2,  3,  4,  5,  6,  7,  8, 9,
                                                 10, 11, 12, 13, 14, 15, 15, 15, 15};
    const uint8_t *ahead[ATTNI_TILES + 3];
    uint8_t own[ATTNI_TILES + 3];
    int32_t r, i;
    for (i = 0; i < c->n_tiles + 3; i++) { // tiles may lie in memory still
        ahead[i] = (const uint8_t *)c->kt[attni_min32(i + 4, c->n_tiles - 1)];
        own[i] = col[attni_min32(i, c->n_tiles - 1)];
    }
    for (r = 0; r < nr; r += c->rb)
        c->qk((const uint32_t *)q + (int64_t)r * c->ldq, c->ldq, attni_min32(c->rb, nr - r), c->kt,
              ahead, c->few && c->k.k16 ? 64 : 0, own, c->n_tiles, c->qk_units,
              c->s + (int64_t)r * ATTNI_LDS);
}

// Of c->q's rows [0, nr).
ATTNI_CALLED void attni_scan_products(attni_scan *c, int32_t nr) {
    const int32_t dim = c->d->head_dim;
    memset(c->q + (int64_t)nr * dim, 0, 4 * (size_t)(ATTNI_RB_MAX * dim));
    attni_scan_rows(c, c->q, nr);
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
    uint32_t *pairs;             // the same for the bf16 dot
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
    ATTNI_CARVE(w, pairs, uint32_t *, attni_scan_may_dot(d) *
                                          (ATTNI_FLEX_HEADS * n + ATTNI_RB_MAX) * ((dim + 31) / 2))
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

// Cells of nr rows, the queries of every head from row r0 on, from the products at s: one block's
// keys, [from, to) of the tile at position first.
ATTNI_CALLED void attni_flex_cells(attni_scan *c, attni_flex *w, int32_t r0, int32_t nr,
                                   int64_t first, int32_t from, int32_t to) {
    const int32_t b = (int32_t)((first + from) / w->block);
    const int32_t w0 = (int32_t)(first + from - (int64_t)b * w->block); // place in the block
    const int anew = !w0 || first + from <= w->kv0;
    const int32_t held = attni_max32(from, (int32_t)attni_max64(w->kv0 - first, 0));
    const float none[4] = {attni_float(0xff800000u), 0, 0, 0};
    attni_ramps a;
    float got[4];
    int32_t i, p = w->pos + r0 % w->n, u = p % w->block, end;
    a.k_scale = attn_dtype_scaled(c->d->kv.k.dtype) ? c->ks : NULL;
    a.scale = w->scale;
    a.softcap = w->softcap;
    for (i = 0; i < nr; i++, p++, u++) {
        if (u == w->block) u = 0;
        if (p == w->end) p = w->pos, u = p % w->block; // the next head's first query
        end = attni_min32(to, (int32_t)attni_min64(p + 1 - first, ATTN_SPAN));
        a.lo = a.hi = NULL;
        if (w->lo && b && (b + (int64_t)1) * w->block <= p - u) {
            a.lo = w->near_lo + (w0 + w->block - 1 - u + (held & ~15) - from);
            a.hi = w->near_hi + (w0 + w->block - 1 - u + (held & ~15) - from);
        }
        memcpy(got, none, sizeof got);
        if (held < end)
            c->e.ma->ramps(&a, c->s + (int64_t)i * ATTNI_LDS, held, end, from + u - w0, got);
        attni_flex_cell(w, (int64_t)(r0 + i) * w->ld + b, anew, got[0], got[1], got[2], got[3]);
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
        if (c->pairs) {
            c->e.mv->widen_tile(c->k.dtype, c->kt[i / 16], c->units, c->kf);
            k = c->kf;
        }
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
    int32_t r, nr;
    attn_result res;
    // the kernels work on 32 keys at a time: a tile is whole blocks of so many, or part of one
    c->pairs = c->dots;
    for (; first < w->end; first += n) {
        n = attni_min64(most, w->end - first);
        if (b > ATTN_SPAN || b % 32) n = attni_min64(n, b - first % b);
        if (first + n <= w->kv0) continue;
        res = attni_scan_keys(c, w->seq, kv, NULL, first, (int32_t)n);
        if (res != ATTN_OK) return res;
        if (means) attni_flex_mean_keys(c, w, first, (int32_t)n);
        for (r = 0; r < nh * w->n; r += nr) {
            nr = attni_min32(nh * w->n - r, c->rb); // so that the scores stay in the first cache
            if (tokens) nr = attni_min32(nr, w->n - r % w->n);
            if (c->pairs) attni_scan_rows(c, w->pairs + (int64_t)r * c->ldq, nr);
            else attni_scan_rows(c, w->q + (int64_t)r * dim, nr);
            if (tokens) attni_flex_tokens(c, w, r / w->n, r % w->n, nr, first, (int32_t)n);
            for (from = 0; from < n && !tokens; from += b)
                attni_flex_cells(c, w, r, nr, first, (int32_t)from,
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
    c->pairs = 0;
    attni_scan_use(c);
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
        double all = 0, held = 0, sum = 0; // without the cells always kept
        attni_flex_row(c, w, rule, r - w->row0, w->e);
        attni_flex_take(w, w->e, r, 2);
        for (b = attni_max32(w->first, 1); b < r; b++) all += mass[b];
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
    if (c->dots) attni_scan_pairs(c, w->q, nh * w->n + ATTNI_RB_MAX, w->pairs);
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
    for (i = 0; i < 2 * w.block + 32; i++) {
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

// Query rows that score together: those of some query heads of one KV head, position by position.
typedef struct attni_hip_set {
    int32_t kv_head, head, n_heads;
    float *row; // (n_pos * n_heads, head_dim)
    uint32_t *pairs; // the same for the bf16 dot, or NULL
} attni_hip_set;

// HIP2: a group of blocks, of the lane'th list of a unit. HIP1: start is a cell of the grid.
typedef struct attni_hip_group {
    int32_t lane, start, size, rep;
    float score;
} attni_hip_group;

// HIP3: one stage of the q block at hand.
typedef struct attni_hip_scan {
    int32_t *first, n_first; // first chunk of what the stage before admits, ascending
    float *first_score;
    int32_t *chunk, n_chunks; // candidates, ascending
    float *score, *part;      // of the list; of one KV head
    int32_t *rep, *part_rep;
    float *least;             // KEEP_SCORES: scores of what they were cut from
} attni_hip_scan;

typedef struct attni_hip {
    attni_scan *c;
    int32_t seq, q_start, q_len;
    int64_t kv_pos0, kv_end, pos0;     // the sequence; pos0: its first query's position
    int64_t m, p_min, p_max, end;      // the q block
    int32_t n_pos, n_sets;             // query positions that score, or runs of them
    int64_t keys;                      // read for the list so far
    int32_t list;                      // of the lists at hand the first
    attni_hip_set *set;                // (n_kv_heads or a group's heads)
    float *rows;                       // (n_kv_heads * group * positions + RB_MAX, head_dim)
    uint32_t *pairs;                   // the same for the bf16 dot
    int32_t *at;                       // (positions) of the rows
    float *wide, *sum;                 // (head_dim + 16)
    int32_t *ids;                      // blocks of a list
    uint64_t *mark;                    // eligible blocks that are listed
    uint32_t *key;                     // what `best` sorts by
    int32_t *pick, *blk, *from;
    float *out, *all;                  // scores of blk; of all eligible blocks of every lane
    attni_hip_group *group, *child;    // (K * head_group), twice that
    int32_t n_groups;
    attni_hip_scan scan[ATTN_HIP_STAGES];
    int32_t *state; // the row's memory, or NULL
    // a stage with positions of its own: those of the keys, or NULL; SELF_EXTEND: rows once more,
    // for keys that are far away
    int32_t *key_at;
    int64_t far_rows;
} attni_hip;

ATTNI_INLINE float attni_hip_none(void) { return attni_float(0xff800000u); }

// A position, which past the last one there is holds no key.
ATTNI_INLINE int32_t attni_hip_pos(int64_t p) { return (int32_t)attni_min64(p, INT32_MAX); }

// Positions of a q block of stage 0.
ATTNI_INLINE int64_t attni_hip_block(const attn_select *f, int32_t stage) {
    return f->kind == ATTN_SELECT_HIP3 ? f->hip.stage[stage].q_block
                                       : (int64_t)f->row_block * f->hip.q_group;
}

ATTNI_INLINE int32_t attni_hip_sets(const attn_desc *d, const attn_select *f) {
    return f->heads == ATTN_SELECT_ALL    ? d->n_kv_heads
           : f->heads == ATTN_SELECT_EACH ? d->n_heads / d->n_kv_heads
                                          : 1;
}

ATTNI_CALLED size_t attni_hip_carve3(attni_hip *h, uint8_t *base, size_t at, const attn_select *f,
                                     int64_t kv_end) {
    int32_t i;
    for (i = 0; i < f->hip.n_stages; i++) {
        const attn_hip_stage *t = f->hip.stage + i;
        attni_hip_scan *x = &h->scan[i];
        int64_t n = attni_n_blocks(kv_end, t->chunk) + 2, first = 0;
        if (i) {
            first = attni_min64(t->keep / t[-1].chunk, attni_n_blocks(kv_end, t[-1].chunk) + 2);
            n = attni_min64(n, first * (t[-1].chunk / t->chunk));
        }
        ATTNI_CARVE(x, first, int32_t *, first)
        ATTNI_CARVE(x, first_score, float *, first)
        ATTNI_CARVE(x, chunk, int32_t *, n)
        ATTNI_CARVE(x, score, float *, n)
        ATTNI_CARVE(x, part, float *, n)
        ATTNI_CARVE(x, rep, int32_t *, n)
        ATTNI_CARVE(x, part_rep, int32_t *, n)
        ATTNI_CARVE(x, least, float *, n)
    }
    return at;
}

// Lays h's arrays out from base on (NULL: only counts).
ATTNI_CALLED size_t attni_hip_carve(attni_hip *h, uint8_t *base, const attn_desc *d,
                                    const attn_select *f) {
    const int third = f->kind == ATTN_SELECT_HIP3;
    int64_t kv_end = 1, q_len = 1, n, groups = 0, wide, sets = attni_hip_sets(d, f), most;
    int64_t heads = f->heads == ATTN_SELECT_ALL && !third ? d->n_heads : d->n_heads / d->n_kv_heads;
    size_t at = 0;
    int32_t s, twice = 1;
    for (s = 0; s < d->n_seq; s++) {
        kv_end = attni_max64(kv_end, (int64_t)attni_kv_pos0(d, s) + d->kv.kv_len[s]);
        q_len = attni_max64(q_len, d->q_start[s + 1] - d->q_start[s]);
    }
    n = attni_min64(q_len, attni_hip_block(f, 0)) + 1;
    most = wide = attni_n_blocks(kv_end, third ? f->kv_block : f->hip.block) + 2;
    if (!third) {
        groups = attni_min64(f->hip.keep / f->hip.block, wide) * f->hip.head_group;
        most = attni_max64(most, 2 * groups);
    }
    most = attni_max64(most, d->head_dim);
    ATTNI_CARVE(h, set, attni_hip_set *, sets)
    for (s = 0; third && s < f->hip.n_stages; s++)
        if (f->hip.stage[s].style == ATTN_ROPE_SELF_EXTEND) twice = 2;
    ATTNI_CARVE(h, rows, float *, (twice * n * heads + ATTNI_RB_MAX) * d->head_dim)
    ATTNI_CARVE(h, pairs, uint32_t *, (int64_t)attni_scan_may_dot(d) * (n * heads + ATTNI_RB_MAX) *
                                          ((d->head_dim + 31) / 2))
    ATTNI_CARVE(h, at, int32_t *, n)
    ATTNI_CARVE(h, wide, float *, d->head_dim + 16)
    ATTNI_CARVE(h, sum, float *, d->head_dim + 16)
    ATTNI_CARVE(h, ids, int32_t *, wide)
    ATTNI_CARVE(h, mark, uint64_t *, wide / 64 + 1)
    ATTNI_CARVE(h, key, uint32_t *, most)
    ATTNI_CARVE(h, pick, int32_t *, most)
    ATTNI_CARVE(h, blk, int32_t *, most)
    ATTNI_CARVE(h, from, int32_t *, most)
    ATTNI_CARVE(h, out, float *, most)
    ATTNI_CARVE(h, all, float *, f->hip.sample == ATTN_HIP_ORACLE ? wide * f->hip.head_group : 0)
    ATTNI_CARVE(h, group, attni_hip_group *, groups)
    ATTNI_CARVE(h, child, attni_hip_group *, 2 * groups)
    return third ? attni_hip_carve3(h, base, at, f, kv_end) : at;
}

ATTNI_CALLED size_t attni_hip_bytes(const attn_desc *d, const attn_select *f) {
    attni_hip h;
    return attni_hip_carve(&h, NULL, d, f);
}

// The `keep` largest of n scores, of equal ones those with the lower index: their indices,
// ascending, in h->pick. Their number. Four rounds of counting find the least that stays.
ATTNI_CALLED int32_t attni_hip_best(attni_hip *h, const float *score, int32_t n, int64_t keep) {
    uint32_t low = 0, fixed = 0, count[256];
    int32_t i, j, shift, k = 0;
    int64_t left = keep;
    if (keep >= n) {
        for (i = 0; i < n; i++) h->pick[i] = i;
        return n;
    }
    if (keep < 1) return 0;
    for (i = 0; i < n; i++) {
        uint32_t u = attni_bits32(score[i]);
        if ((u & 0x7fffffffu) > 0x7f800000u) u = 0xff800000u;
        if (u == 0x80000000u) u = 0;
        h->key[i] = u >> 31 ? ~u : u | 0x80000000u;
    }
    for (shift = 24; shift >= 0; shift -= 8) {
        memset(count, 0, sizeof count);
        for (i = 0; i < n; i++)
            if ((h->key[i] & fixed) == low) count[h->key[i] >> shift & 255]++;
        for (j = 255; count[j] < left; j--) left -= count[j];
        low |= (uint32_t)j << shift;
        fixed |= (uint32_t)255 << shift;
    }
    for (i = 0; i < n; i++)
        if (h->key[i] > low || (h->key[i] == low && left-- > 0)) h->pick[k++] = i;
    return k;
}

// m[i], i < 16 n_tiles: the max of nr rows of scores; of row r only keys at pos <= limit[r], which
// ascend (NULL: all). A NaN loses to anything.
ATTNI_CALLED void attni_hip_max(const attni_scan *c, int32_t nr, const int64_t *limit,
                                const int32_t *pos, int32_t n, int64_t top, float *m) {
    int32_t r, i, j;
    if (!limit || limit[0] >= top) {
        c->e.mv->maxima(c->s, nr, c->n_tiles, m);
        return;
    }
    for (i = 0; i < n; i += 16) {
        int32_t last = pos[i];
        for (j = i; j < attni_min32(n, i + 16); j++) last = attni_max32(last, pos[j]);
        for (r = 0; r < nr && limit[r] < last; r++) {
            const float *s = c->s + (int64_t)r * ATTNI_LDS;
            for (j = i; j < attni_min32(n, i + 16); j++)
                if (pos[j] <= limit[r] && s[j] > m[j]) m[j] = s[j];
        }
        c->e.mv->maxima(c->s + (int64_t)r * ATTNI_LDS + i, nr - r, 1, m + i);
    }
}

// Rotates x to a position, its elements gap apart.
ATTNI_CALLED void attni_hip_rotate(const attn_hip *p, int64_t at, float *x, int64_t gap) {
    const int64_t half = p->rope_dim / 2;
    const float *c, *s;
    int64_t e;
    c = p->rope + attni_max64(0, attni_min64(at, p->rope_len - 1)) * p->rope_dim;
    s = c + half;
    for (e = 0; e < half; e++) {
        float a = x[e * gap], b = x[(e + half) * gap];
        x[e * gap] = a * c[e] - b * s[e];
        x[(e + half) * gap] = b * c[e] + a * s[e];
    }
}

// SELF_EXTEND: does a key take the rows for those far away?
ATTNI_INLINE int attni_hip_far(const attni_hip *h, int64_t key) {
    return h->far_rows && h->p_min - key >= 8192;
}

// Scores of n <= 256 keys: the max over rows [r0, r0 + nr) of a set. late: a row scores only keys
// that are `late` before its position (-1: all keys up to the q block's last query).
ATTNI_CALLED attn_result attni_hip_values(attni_hip *h, const attni_hip_set *set, int32_t r0,
                                          int32_t nr, int64_t late, const int32_t *pos, int32_t n,
                                          float *out) {
    attni_scan *c = h->c;
    const int32_t dim = c->d->head_dim;
    const float scale = c->scale < 0 ? -c->scale : c->scale;
    int64_t limit[ATTNI_SCAN_ROWS], top = 0;
    float m[ATTN_SPAN];
    int32_t r, i, far, wanted, part;
    attn_result e;
    c->few = nr <= ATTNI_FEW && !h->key_at;
    c->pairs = nr > ATTNI_FEW && set->pairs;
    e = attni_scan_keys(c, h->seq, set->kv_head, pos, 0, n);
    if (e != ATTN_OK) return e;
    for (i = 0; h->key_at && i < n; i++) // a tile holds [head_dim][16]
        attni_hip_rotate(&c->f->hip, h->key_at[i],
                         (float *)(uintptr_t)(const void *)c->kt[i / 16] + i % 16, 16);
    for (i = 0; i < n; i++) top = attni_max64(top, pos[i]);
    for (far = 0; far <= (h->far_rows > 0); far++) {
        for (i = wanted = 0; i < n; i++) wanted |= attni_hip_far(h, pos[i]) == far;
        if (!wanted) continue;
        for (i = 0; i < ATTN_SPAN; i++) m[i] = attni_hip_none();
        for (r = 0; r < nr; r += part) {
            part = attni_min32(ATTNI_SCAN_ROWS / c->rb * c->rb, nr - r); // whole blocks
            for (i = 0; late >= 0 && i < part; i++)
                limit[i] = h->at[(r0 + r + i) / set->n_heads] - late;
            if (c->pairs) attni_scan_rows(c, set->pairs + (r0 + r) * (int64_t)c->ldq, part);
            else attni_scan_rows(c, set->row + (far * h->far_rows + r0 + r) * dim, part);
            attni_hip_max(c, part, late >= 0 ? limit : NULL, pos, n, top, m);
        }
        for (i = 0; i < n; i++)
            if (attni_hip_far(h, pos[i]) == far) out[i] = m[i] * (scale * c->ks[i]);
    }
    for (i = 0; i < n; i++)
        if (pos[i] < h->kv_pos0 || pos[i] >= h->end || attni_isnan(out[i]))
            out[i] = attni_hip_none();
    h->keys += n;
    return ATTN_OK;
}

// The q block m of n positions; 0 when the sequence has no query in it.
ATTNI_CALLED int attni_hip_focus(attni_hip *h, int64_t m, int64_t n) {
    h->m = m;
    h->p_min = attni_max64(m * n, h->pos0);
    h->p_max = attni_min64(m * n + n, h->pos0 + h->q_len) - 1;
    h->end = attni_min64(h->p_max + 1, h->kv_end);
    return h->p_min <= h->p_max;
}

// One query, where scores fall with a negative scale turned round.
ATTNI_CALLED void attni_hip_query(attni_hip *h, int64_t p, int32_t head, float *out) {
    int32_t e;
    attni_scan_query(h->c, 0, h->q_start + (p - h->pos0), head, out);
    for (e = 0; h->c->scale < 0 && e < h->c->d->head_dim; e++) out[e] = -out[e];
}

// Writes n blocks, ascending, to the rows of the q block: those its queries may reach.
ATTNI_CALLED attn_result attni_hip_emit(attni_hip *h, int32_t list, const int32_t *ids, int32_t n,
                                        int64_t visited) {
    const attn_selection *x = h->c->x;
    const attn_select *f = h->c->f;
    int64_t b;
    for (b = h->p_min / f->row_block; b <= h->p_max / f->row_block; b++) {
        const int64_t last = attni_min64(h->p_max, (b + 1) * f->row_block - 1);
        const int64_t row = x->seq_row[h->seq] + b, to = list * (int64_t)x->max_rows + row;
        const int64_t at = list * ((int64_t)x->max_rows + 1) + row;
        int32_t k = n;
        if (row < 0 || row >= x->max_rows || list >= x->n_lists) return ATTN_ERR_BUFFER;
        while (k > 0 && (int64_t)ids[k - 1] * f->kv_block > last) k--;
        if (k > x->row_capacity) return ATTN_ERR_BUFFER;
        x->row_start[at] = to * x->row_capacity;
        x->row_end[at] = x->row_start[at] + k;
        memcpy(x->block + x->row_start[at], ids, 4 * (size_t)k);
        x->visited[at] = (int32_t)attni_min64(visited, INT32_MAX);
    }
    return ATTN_OK;
}

// ---- HIP3

// Where a stage's style puts a query at position q, far: for keys far away.
ATTNI_CALLED int64_t attni_hip_query_at(const attni_hip *h, const attn_hip_stage *t, int64_t q,
                                        int far) {
    const attn_hip *p = &h->c->f->hip;
    const int64_t window = attni_max32(0, p->window - p->stage[0].chunk);
    switch ((int)t->style) {
    case ATTN_ROPE_RELATIVE: return window + 1;
    case ATTN_ROPE_CHUNK: return attni_min64(q, h->scan[t - p->stage].n_chunks + window);
    case ATTN_ROPE_INFLLM: return window;
    case ATTN_ROPE_SELF_EXTEND: return far ? q / 16 + 8192 - 512 : q;
    default: return q;
    }
}

// ... and a key, of the place'th candidate, probed on the left or the right.
ATTNI_CALLED int32_t attni_hip_key_at(const attni_hip *h, const attn_hip_stage *t, int64_t key,
                                      int32_t place, int32_t right) {
    const int64_t x = h->c->f->hip.context, recent = x / 4, n = h->end;
    switch ((int)t->style) {
    case ATTN_ROPE_RELATIVE: return right;
    case ATTN_ROPE_CHUNK: return place;
    case ATTN_ROPE_INFLLM: return 0;
    case ATTN_ROPE_DYNAMIC:
        if (key >= n - recent || n <= x) return (int32_t)key;
        return (int32_t)(n - recent - 1 - (n - recent - 1 - key) * (x - recent) / (n - recent));
    case ATTN_ROPE_SELF_EXTEND: return (int32_t)(attni_hip_far(h, key) ? key / 16 : key);
    default: return (int32_t)key;
    }
}

// The mean of the queries [p, next) of a head, as stage t sees them.
ATTNI_CALLED void attni_hip_mean(attni_hip *h, const attn_hip_stage *t, int64_t p, int64_t next,
                                 int32_t head, int far, float *out) {
    const attn_hip *f = &h->c->f->hip;
    const int32_t dim = h->c->d->head_dim;
    const int64_t at = t->style ? attni_hip_query_at(h, t, p, far) : 0;
    int64_t q;
    int32_t e;
    for (q = p; q < next; q++) {
        float *x = q == p ? h->sum : h->wide;
        attni_hip_query(h, q, head, x);
        if (t->style) attni_hip_rotate(f, at, x, 1);
        for (e = 0; q > p && e < dim; e++) h->sum[e] += x[e];
    }
    for (e = 0; e < dim; e++) out[e] = next - p > 1 ? h->sum[e] / (float)(next - p) : h->sum[e];
}

// Rows of a set that are queries as they were, not means or rotated, for the bf16 dot, too.
ATTNI_CALLED void attni_hip_pairs(attni_hip *h, attni_hip_set *set, int raw) {
    const int64_t first = (set->row - h->rows) / h->c->d->head_dim;
    const int32_t ld = ((h->c->d->head_dim + 31) & ~31) / 2;
    set->pairs = NULL;
    if (!h->c->dots || !raw) return;
    set->pairs = h->pairs + first * ld;
    attni_scan_pairs(h->c, set->row, h->n_pos * set->n_heads + ATTNI_RB_MAX, set->pairs);
}

// The rows of stage t for some query heads: means of runs.
ATTNI_CALLED void attni_hip_pool(attni_hip *h, const attn_hip_stage *t, attni_hip_set *set) {
    const int32_t dim = h->c->d->head_dim;
    const int64_t block = h->m * t->q_block;
    int64_t p, next;
    int32_t i, far;
    float *out = h->rows;
    h->far_rows = 0;
    for (far = 0; far <= (t->style == ATTN_ROPE_SELF_EXTEND); far++) {
        for (h->n_pos = 0, p = h->p_min; p <= h->p_max; p = next, h->n_pos++) {
            next = block + ((p - block) / t->q_stride + 1) * t->q_stride;
            next = attni_min64(next, h->p_max + 1);
            for (i = 0; i < set->n_heads; i++, out += dim)
                attni_hip_mean(h, t, p, next, set->head + i, far, out);
        }
        h->far_rows = far * (int64_t)h->n_pos * set->n_heads;
    }
    memset(out, 0, 4 * (size_t)(ATTNI_RB_MAX * dim));
    set->row = h->rows;
    attni_hip_pairs(h, set, t->q_stride == 1 && !t->style);
}

// attni_hip_descend for few rows and short chunks of K16: a probe there reads most of its tile's
// lines, so all the chunk's keys at once take less time.
ATTNI_CALLED attn_result attni_hip_whole(attni_hip *h, const attn_hip_stage *t,
                                         const attni_hip_set *set, const int32_t *chunk, int32_t n,
                                         float *score, int32_t *rep) {
    const int32_t least = attni_max32(2, t->terminate), per = ATTN_SPAN / t->chunk;
    int32_t pos[ATTN_SPAN], i, j;
    float got[ATTN_SPAN];
    for (i = 0; i < n; i++) {
        const int64_t l = (int64_t)h->c->f->hip.sink + (int64_t)chunk[i] * t->chunk;
        int32_t lo = 0, hi = t->chunk, probes = 0;
        if (i % per == 0) {
            const int32_t keys = attni_min32(per, n - i) * t->chunk;
            attn_result e;
            for (j = 0; j < keys; j++)
                pos[j] = attni_hip_pos((int64_t)h->c->f->hip.sink +
                                       (int64_t)chunk[i + j / t->chunk] * t->chunk + j % t->chunk);
            e = attni_hip_values(h, set, 0, h->n_pos * set->n_heads, -1, pos, keys, got);
            if (e != ATTN_OK) return e;
            h->keys -= keys;
        }
        score[i] = attni_hip_none();
        do {
            const int32_t mid = (lo + hi) / 2, left = (lo + mid) / 2, right = (mid + hi) / 2;
            const float *own = got + i % per * t->chunk;
            const int goes_left = own[left] > own[right];
            const float won = own[goes_left ? left : right];
            rep[i] = attni_hip_pos(l + (goes_left ? left : right));
            if (won > score[i] || t->flags & ATTN_HIP_LAST_SCORE) score[i] = won;
            if (goes_left) hi = mid;
            else lo = mid;
            probes += 2;
        } while (hi - lo >= least);
        h->keys += probes; // as the definition counts them
    }
    return ATTN_OK;
}

// Scores and representatives of n <= 128 candidates from the `place`th on by descent.
ATTNI_CALLED attn_result attni_hip_descend(attni_hip *h, const attn_hip_stage *t,
                                           const attni_hip_set *set, const int32_t *chunk,
                                           int32_t place, int32_t n, float *score, int32_t *rep) {
    int32_t lo[ATTN_SPAN / 2], hi[ATTN_SPAN / 2], open[ATTN_SPAN / 2], pos[ATTN_SPAN];
    int32_t key_at[ATTN_SPAN];
    float got[ATTN_SPAN];
    int32_t i, j, n_open = n, least = attni_max32(2, t->terminate);
    if (h->c->k.k16 && !t->style && t->chunk <= 32 && h->n_pos * set->n_heads <= ATTNI_FEW)
        return attni_hip_whole(h, t, set, chunk, n, score, rep);
    for (i = 0; i < n; i++) {
        lo[i] = 0, hi[i] = t->chunk, open[i] = i;
        score[i] = attni_hip_none();
    }
    while (n_open) {
        attn_result e;
        int32_t still = 0;
        for (j = 0; j < n_open; j++) {
            int32_t mid = (lo[open[j]] + hi[open[j]]) / 2;
            int64_t l = (int64_t)h->c->f->hip.sink + (int64_t)chunk[open[j]] * t->chunk;
            pos[2 * j] = attni_hip_pos(l + (lo[open[j]] + mid) / 2);
            pos[2 * j + 1] = attni_hip_pos(l + (mid + hi[open[j]]) / 2);
            for (i = 2 * j; t->style && i <= 2 * j + 1; i++)
                key_at[i] = attni_hip_key_at(h, t, pos[i], place + open[j], i & 1);
        }
        h->key_at = t->style ? key_at : NULL;
        e = attni_hip_values(h, set, 0, h->n_pos * set->n_heads, -1, pos, 2 * n_open, got);
        if (e != ATTN_OK) return e;
        for (j = 0; j < n_open; j++) {
            int32_t mid, left = got[2 * j] > got[2 * j + 1];
            float won = got[2 * j + !left];
            i = open[j];
            mid = (lo[i] + hi[i]) / 2;
            if (left) hi[i] = mid;
            else lo[i] = mid;
            rep[i] = pos[2 * j + !left];
            if (won > score[i] || t->flags & ATTN_HIP_LAST_SCORE) score[i] = won;
            if (hi[i] - lo[i] >= least) open[still++] = i;
        }
        n_open = still;
    }
    return ATTN_OK;
}

// The same for LANDMARK.
ATTNI_CALLED attn_result attni_hip_landmark(attni_hip *h, const attn_hip_stage *t,
                                            const attni_hip_set *set, const int32_t *chunk,
                                            int32_t place, int32_t n, float *score, int32_t *rep) {
    const attn_desc *d = h->c->d;
    const int32_t pt = d->kv.page_tokens;
    int32_t i, key_at[ATTN_SPAN];
    for (i = 0; i < n; i++) {
        int64_t l = (int64_t)h->c->f->hip.sink + (int64_t)chunk[i] * t->chunk, p;
        float best = attni_hip_none();
        rep[i] = (int32_t)attni_max64(l, h->kv_pos0);
        for (p = rep[i]; p < attni_min64(l + t->chunk, h->end); p++) {
            int32_t j = (int32_t)(p - h->kv_pos0), page = attni_page_of(d, h->seq, j);
            float v;
            if (page < 0) return ATTN_ERR_PAGE;
            v = h->c->f->hip.landmark[((int64_t)page * d->n_kv_heads + set->kv_head) * pt + j % pt];
            if (v > best) best = v, rep[i] = (int32_t)p;
        }
        if (t->style) key_at[i] = attni_hip_key_at(h, t, rep[i], place + i, 0);
    }
    h->key_at = t->style ? key_at : NULL;
    return attni_hip_values(h, set, 0, h->n_pos * set->n_heads, -1, rep, n, score);
}

// Scores of the candidates of a stage, for the list of the sets.
ATTNI_CALLED attn_result attni_hip_stage_scan(attni_hip *h, int32_t stage) {
    const attn_hip_stage *t = h->c->f->hip.stage + stage;
    attni_hip_scan *x = &h->scan[stage];
    int32_t s, i;
    for (s = 0; s < h->n_sets; s++) {
        attni_hip_set *set = h->set + s;
        float *score = s ? x->part : x->score;
        int32_t *rep = s ? x->part_rep : x->rep;
        if (x->n_chunks) attni_hip_pool(h, t, set);
        for (i = 0; i < x->n_chunks; i += ATTN_SPAN / 2) {
            const int32_t n = attni_min32(ATTN_SPAN / 2, x->n_chunks - i);
            attn_result e =
                t->flags & ATTN_HIP_LANDMARK
                    ? attni_hip_landmark(h, t, set, x->chunk + i, i, n, score + i, rep + i)
                    : attni_hip_descend(h, t, set, x->chunk + i, i, n, score + i, rep + i);
            if (e != ATTN_OK) return e;
        }
        for (i = 0; s && i < x->n_chunks; i++)
            if (score[i] > x->score[i]) x->score[i] = score[i], x->rep[i] = rep[i];
    }
    for (i = 0; t->flags & ATTN_HIP_KEEP_SCORES && i < x->n_chunks; i++)
        if (x->least[i] > x->score[i]) x->score[i] = x->least[i];
    return ATTN_OK;
}

// The eligible chunks of a stage: of stage 0 all, of another those its first[] become.
ATTNI_CALLED void attni_hip_candidates(attni_hip *h, int32_t stage) {
    const attn_hip *p = &h->c->f->hip;
    const int64_t c = p->stage[stage].chunk, c0 = p->stage[0].chunk;
    const int64_t lim = attni_min64(h->end - 1, attni_max64(h->p_min + c0, h->p_max) - p->window);
    // chunk y is eligible when low <= y <= high
    const int64_t low = h->kv_pos0 > p->sink ? (h->kv_pos0 - p->sink) / c : 0;
    const int64_t high = lim < p->sink ? -1 : (lim - p->sink) / c;
    attni_hip_scan *x = &h->scan[stage];
    int64_t y, next = low;
    int32_t i;
    x->n_chunks = 0;
    for (y = low; !stage && y <= high; y++) x->chunk[x->n_chunks++] = (int32_t)y;
    for (i = 0; stage && i < x->n_first; i++) {
        const int64_t stop = x->first[i] + p->stage[stage - 1].chunk / c;
        for (y = attni_max64(x->first[i], next); y < stop && y <= high; y++) {
            x->least[x->n_chunks] = x->first_score[i];
            x->chunk[x->n_chunks++] = (int32_t)y;
        }
        next = attni_max64(next, stop);
    }
}

// What of a scanned stage the next one admits.
ATTNI_CALLED void attni_hip_admit(attni_hip *h, int32_t next) {
    const attn_hip_stage *t = h->c->f->hip.stage + next;
    const attni_hip_scan *x = &h->scan[next - 1];
    attni_hip_scan *y = &h->scan[next];
    const int32_t c = t[-1].chunk;
    int32_t i, n = attni_hip_best(h, x->score, x->n_chunks, t->keep / c);
    for (i = 0; i < n; i++) {
        const int32_t j = h->pick[i], off = x->rep[j] - h->c->f->hip.sink - c / 2;
        y->first[i] = t->flags & ATTN_HIP_CENTRE ? attni_max32(0, off) / t->chunk
                                                 : x->chunk[j] * (c / t->chunk);
        y->first_score[i] = x->score[j];
    }
    y->n_first = n;
}

// The place of a stage in a row's memory; moves on.
ATTNI_CALLED void attni_hip_remember(attni_hip *h, int32_t stage, int write) {
    const attn_hip_stage *t = h->c->f->hip.stage;
    attni_hip_scan *x = &h->scan[stage];
    int32_t i, *at = h->state + 1, most = 0;
    for (i = 1; i <= stage; i++) {
        if (i > 1) at += 1 + (t[i - 1].flags & ATTN_HIP_KEEP_SCORES ? 2 : 1) * (int64_t)most;
        most = t[i].keep / t[i - 1].chunk;
    }
    if (write) {
        *at = x->n_first;
        memcpy(at + 1, x->first, 4 * (size_t)x->n_first);
        if (t[stage].flags & ATTN_HIP_KEEP_SCORES)
            memcpy(at + 1 + most, x->first_score, 4 * (size_t)x->n_first);
    } else {
        // no more than there is room for, whatever the row was made with
        x->n_first = (int32_t)attni_min64(
            attni_min32(*at, most), attni_n_blocks(h->kv_end, t[stage - 1].chunk) + 2);
        memcpy(x->first, at + 1, 4 * (size_t)x->n_first);
        if (t[stage].flags & ATTN_HIP_KEEP_SCORES)
            memcpy(x->first_score, at + 1 + most, 4 * (size_t)x->n_first);
    }
}

// Stages from `stage` on for q block m of it, and all smaller ones within.
ATTNI_CALLED attn_result attni_hip_run3(attni_hip *h, int32_t stage, int64_t m) {
    const attn_select *f = h->c->f;
    const attn_hip_stage *t = f->hip.stage + stage;
    attni_hip_scan *x = &h->scan[stage];
    const int64_t before = h->keys;
    attn_result e;
    int64_t k, per;
    int32_t i, n;
    if (!attni_hip_focus(h, m, t->q_block)) return ATTN_OK;
    attni_hip_candidates(h, stage);
    if ((e = attni_hip_stage_scan(h, stage)) != ATTN_OK) return e;
    if (stage + 1 == f->hip.n_stages) {
        n = attni_hip_best(h, x->score, x->n_chunks, f->hip.keep / t->chunk);
        for (i = 0; i < n; i++) h->ids[i] = f->hip.sink / f->kv_block + x->chunk[h->pick[i]];
        e = attni_hip_emit(h, h->list, h->ids, n, h->keys / h->n_sets);
    } else {
        attni_hip_admit(h, stage + 1);
        if (h->state) attni_hip_remember(h, stage + 1, 1);
        per = t->q_block / t[1].q_block;
        for (k = m * per; k < (m + 1) * per && e == ATTN_OK; k++)
            e = attni_hip_run3(h, stage + 1, k);
    }
    h->keys = before;
    return e;
}

// ---- HIP1 and HIP2

ATTNI_INLINE uint64_t attni_hip_hash(uint64_t seed, uint64_t a, uint64_t c) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u + a * 0xbf58476d1ce4e5b9u + c * 0x94d049bb133111ebu;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Below n, from the upper half of a hash.
ATTNI_INLINE int64_t attni_hip_below(uint64_t hash, int64_t n) {
    return (int64_t)((hash >> 32) * (uint64_t)n >> 32);
}

// low_dim: zeros in all but the dimensions that count, head by head.
ATTNI_CALLED void attni_hip_thin(attni_hip *h, const attni_hip_set *set) {
    const int32_t dim = h->c->d->head_dim;
    int32_t i, e, r, n, k;
    for (i = 0; i < set->n_heads; i++) {
        memset(h->sum, 0, 4 * (size_t)dim);
        for (r = i; r < h->n_pos * set->n_heads; r += set->n_heads)
            for (e = 0; e < dim; e++) {
                float v = set->row[(int64_t)r * dim + e];
                h->sum[e] += v < 0 ? -v : v;
            }
        n = attni_hip_best(h, h->sum, dim, h->c->f->hip.low_dim);
        for (r = i; r < h->n_pos * set->n_heads; r += set->n_heads)
            for (e = k = 0; e < dim; e++) {
                if (k < n && h->pick[k] == e) k++;
                else set->row[(int64_t)r * dim + e] = 0;
            }
    }
}

// The queries of the q block that score, for all sets.
ATTNI_CALLED void attni_hip_gather(attni_hip *h) {
    const attn_hip *p = &h->c->f->hip;
    const int64_t block = h->m * attni_hip_block(h->c->f, 0);
    const int32_t dim = h->c->d->head_dim;
    float *out = h->rows;
    int32_t s, i, j;
    int64_t t;
    h->n_pos = 0;
    for (t = h->p_min; t <= h->p_max; t++)
        if ((t - block) % p->q_stride == p->q_stride - 1 || t == h->p_max)
            h->at[h->n_pos++] = (int32_t)t;
    for (s = 0; s < h->n_sets; s++) {
        h->set[s].row = out;
        for (i = 0; i < h->n_pos; i++)
            for (j = 0; j < h->set[s].n_heads; j++, out += dim)
                attni_hip_query(h, h->at[i], h->set[s].head + j, out);
    }
    memset(out, 0, 4 * (size_t)(ATTNI_RB_MAX * dim));
    for (s = 0; s < h->n_sets && p->low_dim && p->low_dim < dim; s++)
        attni_hip_thin(h, h->set + s);
    for (s = 0; s < h->n_sets; s++) attni_hip_pairs(h, h->set + s, 1);
}

// S of n blocks for one lane (blk NULL: block first + i), by all its rows or the last query's.
ATTNI_CALLED attn_result attni_hip_blocks(attni_hip *h, int32_t lane, int last, const int32_t *blk,
                                          int64_t first, int32_t n, float *out) {
    const attn_select *f = h->c->f;
    const int32_t b = f->hip.block, stride = last ? 1 : attni_min32(f->hip.k_stride, b);
    const int64_t per = (b + stride - 1) / stride, late = attni_max32(
                                                       0, f->hip.window - f->hip.refresh + 1);
    const int one = f->heads == ATTN_SELECT_EACH;
    int32_t s, i, k, g, pos[ATTN_SPAN], own[ATTN_SPAN];
    float got[ATTN_SPAN];
    int64_t j, place;
    for (i = 0; i < n; i++) out[i] = attni_hip_none();
    for (s = one ? lane : 0; s < (one ? lane + 1 : h->n_sets); s++) {
        const attni_hip_set *set = h->set + s;
        const int32_t r0 = last ? (h->n_pos - 1) * set->n_heads : 0;
        for (j = 0, g = 0, place = 0; j < n * per; j += ATTN_SPAN) {
            const int32_t part = (int32_t)attni_min64(ATTN_SPAN, n * per - j);
            attn_result e;
            for (k = 0; k < part; k++) {
                own[k] = g;
                pos[k] = attni_hip_pos((blk ? blk[g] : first + g) * b + place * stride);
                if (++place == per) g++, place = 0;
            }
            e = attni_hip_values(h, set, r0, h->n_pos * set->n_heads - r0, late, pos, part, got);
            if (e != ATTN_OK) return e;
            for (k = 0; k < part; k++)
                if (got[k] > out[own[k]]) out[own[k]] = got[k];
        }
    }
    return ATTN_OK;
}

// Which block stands for a group.
ATTNI_CALLED int32_t attni_hip_rep(const attni_hip *h, int64_t start, int64_t size) {
    const attn_hip *p = &h->c->f->hip;
    switch ((int)p->sample) {
    case ATTN_HIP_FIRST: return (int32_t)start;
    case ATTN_HIP_LAST: return (int32_t)(start + size - 1);
    case ATTN_HIP_POSITION: return (int32_t)(start + h->m % size);
    case ATTN_HIP_RANDOM: {
        uint64_t z = (uint64_t)start + ((uint64_t)size << 32);
        z = attni_hip_hash(p->seed, z, (uint64_t)h->m);
        return (int32_t)(start + attni_hip_below(z, size));
    }
    default: return (int32_t)(start + size / 2);
    }
}

// Scores those of the n children whose rep is not negative, lane by lane.
ATTNI_CALLED attn_result attni_hip_score(attni_hip *h, int32_t n, int64_t b0, int64_t n_blocks) {
    const int oracle = h->c->f->hip.sample == ATTN_HIP_ORACLE && h->c->f->kind == ATTN_SELECT_HIP2;
    int32_t i, j, k, lane;
    for (i = 0; i < n; i = j) {
        attn_result e = ATTN_OK;
        lane = h->child[i].lane;
        for (j = i, k = 0; j < n && h->child[j].lane == lane; j++)
            if (h->child[j].rep >= 0) {
                h->from[k] = j;
                h->blk[k++] = h->child[j].rep;
            }
        if (!oracle) e = attni_hip_blocks(h, lane, 0, h->blk, 0, k, h->out);
        if (e != ATTN_OK) return e;
        for (; k > 0; k--) {
            attni_hip_group *g = h->child + h->from[k - 1];
            int64_t at = lane * n_blocks + g->start - b0, stop = at + g->size;
            g->score = oracle ? h->all[at] : h->out[k - 1];
            while (oracle && ++at < stop)
                if (h->all[at] > g->score) g->score = h->all[at];
        }
    }
    return ATTN_OK;
}

// Of n children the best `keep` become the groups.
ATTNI_CALLED void attni_hip_keep(attni_hip *h, int32_t n, int64_t keep) {
    int32_t i;
    for (i = 0; i < n; i++) h->out[i] = h->child[i].score;
    h->n_groups = attni_hip_best(h, h->out, n, keep);
    for (i = 0; i < h->n_groups; i++) h->group[i] = h->child[h->pick[i]];
}

// HIP2's rounds over the blocks [b0, b0 + n), n > K.
ATTNI_CALLED attn_result attni_hip_split(attni_hip *h, int64_t b0, int64_t n) {
    const attn_hip *p = &h->c->f->hip;
    const int64_t most = p->keep / p->block;
    attn_result e = ATTN_OK;
    int32_t i, j, k, open = 1;
    h->n_groups = 0;
    for (i = 0; i < p->head_group; i++) {
        if (p->sample == ATTN_HIP_ORACLE)
            e = attni_hip_blocks(h, i, 0, NULL, b0, (int32_t)n, h->all + i * n);
        if (e != ATTN_OK) return e;
        for (j = 0; j < most; j++) {
            attni_hip_group *g = h->group + h->n_groups++;
            g->lane = i;
            g->start = (int32_t)(b0 + n * j / most);
            g->size = (int32_t)(b0 + n * (j + 1) / most) - g->start;
            g->rep = -1;
        }
    }
    while (open) {
        for (i = k = open = 0; i < h->n_groups; i++)
            for (j = 0; j < 2; j++) {
                attni_hip_group g = h->group[i];
                const int32_t half = g.size / 2;
                g.start += j ? half : 0;
                g.size = j ? g.size - half : half;
                if (g.size) h->child[k++] = g;
            }
        // what stands for a child as it stood for its parent is not scored again: its rep is
        // hidden meanwhile
        for (i = 0; i < k; i++) {
            attni_hip_group *g = h->child + i;
            const int32_t rep = attni_hip_rep(h, g->start, g->size);
            const int same = rep == g->rep && p->sample != ATTN_HIP_ORACLE;
            g->rep = same ? -1 - rep : rep;
        }
        if ((e = attni_hip_score(h, k, b0, n)) != ATTN_OK) return e;
        for (i = 0; i < k; i++)
            if (h->child[i].rep < 0) h->child[i].rep = -1 - h->child[i].rep;
        attni_hip_keep(h, k, most * p->head_group);
        for (i = 0; i < h->n_groups; i++)
            if (h->group[i].size > 1) open = 1;
    }
    return e;
}

// HIP1's rounds; at the end every group is a block.
ATTNI_CALLED attn_result attni_hip_widen(attni_hip *h, int64_t b0, int64_t n) {
    const attn_hip *p = &h->c->f->hip;
    const int64_t most = p->keep / p->block;
    int64_t w = most, next, j, stop, budget;
    attn_result e;
    int32_t i, k;
    h->n_groups = (int32_t)most;
    for (i = 0; i < h->n_groups; i++) {
        h->group[i].lane = 0;
        h->group[i].start = i;
        h->group[i].score = attni_hip_none();
    }
    for (; w < n; w = next) {
        next = attni_min64(2 * w, n);
        for (i = k = 0; i < h->n_groups; i++) {
            attni_hip_group g = h->group[i];
            stop = ((g.start + (int64_t)1) * next + w - 1) / w;
            for (j = (g.start * next + w - 1) / w; j < stop; j++) {
                g.start = (int32_t)j;
                g.rep = (int32_t)(b0 + j * n / next);
                h->child[k++] = g;
            }
        }
        budget = attni_max64(p->patches / p->block, most * next / n);
        if (k > budget && (e = attni_hip_score(h, k, b0, n)) != ATTN_OK) return e;
        attni_hip_keep(h, k, budget);
    }
    for (i = 0; i < h->n_groups; i++) h->group[i].start += (int32_t)b0;
    return ATTN_OK;
}

ATTNI_CALLED void attni_hip_mark(attni_hip *h, int64_t first, int64_t last, int64_t n) {
    int64_t i = attni_max64(first, 0);
    for (; i <= attni_min64(last, n - 1); i++) h->mark[i / 64] |= (uint64_t)1 << (i % 64);
}

// A lane's extras.
ATTNI_CALLED attn_result attni_hip_extras(attni_hip *h, int32_t lane, int64_t b0, int64_t n) {
    const attn_hip *p = &h->c->f->hip;
    const int64_t t = attni_n_blocks(h->p_max - h->p_min, p->block);
    const uint64_t salt = (uint64_t)h->m + ((uint64_t)(h->list + lane + 1) << 32);
    int32_t i, j, k, top;
    for (i = k = 0; p->near && i < h->n_groups; i++) {
        if (h->group[i].lane != lane) continue;
        h->from[k] = i;
        h->out[k++] = h->group[i].score;
    }
    top = p->near ? attni_hip_best(h, h->out, k, p->near) : 0;
    for (i = 0; i < top; i++) {
        int64_t b = h->group[h->from[h->pick[i]]].start - b0;
        attni_hip_mark(h, b - p->near_window, b + p->near_window, n);
    }
    if (p->vertical || p->diagonal) {
        attn_result e = attni_hip_blocks(h, lane, 1, NULL, b0, (int32_t)n, h->out);
        if (e != ATTN_OK) return e;
        for (j = 0; j < 2; j++) {
            top = attni_hip_best(h, h->out, (int32_t)n, j ? p->diagonal : p->vertical);
            for (i = 0; i < top; i++)
                attni_hip_mark(h, h->pick[i] - (j ? t : 0), h->pick[i], n);
        }
    }
    for (i = 0; i < p->random; i++) {
        int64_t b = attni_hip_below(attni_hip_hash(p->seed, (uint64_t)i, salt), n);
        attni_hip_mark(h, b, b, n);
    }
    return ATTN_OK;
}

// The q block's lists: one a lane.
ATTNI_CALLED attn_result attni_hip_run2(attni_hip *h, int32_t n_lanes) {
    const attn_select *f = h->c->f;
    const attn_hip *p = &f->hip;
    const int64_t late = attni_max32(0, p->window - p->refresh + 1);
    const int64_t edge = attni_min64(h->end - 1, h->p_max - late);
    const int64_t b0 = attni_max64(p->sink, h->kv_pos0) / p->block;
    const int64_t n = edge < 0 ? 0 : attni_max64(0, edge / p->block + 1 - b0);
    const int all = n <= p->keep / p->block;
    int32_t lane, i, k, last;
    int64_t b;
    attn_result e = ATTN_OK;
    if (!all) {
        attni_hip_gather(h);
        e = f->kind == ATTN_SELECT_HIP2 ? attni_hip_split(h, b0, n) : attni_hip_widen(h, b0, n);
    }
    for (lane = 0; lane < n_lanes && e == ATTN_OK; lane++) {
        memset(h->mark, 0, 8 * (size_t)((n + 63) / 64));
        if (all) attni_hip_mark(h, 0, n - 1, n);
        for (i = 0; !all && i < h->n_groups; i++)
            if (h->group[i].lane == lane)
                attni_hip_mark(h, h->group[i].start - b0, h->group[i].start - b0, n);
        if (!all && (e = attni_hip_extras(h, lane, b0, n)) != ATTN_OK) return e;
        for (b = 0, k = 0, last = -1; b < n; b++) {
            int32_t id = (int32_t)((b0 + b) * p->block / f->kv_block);
            if (b % 64 == 0 && !h->mark[b / 64]) b += 63;
            else if ((h->mark[b / 64] >> (b % 64) & 1) && id != last) h->ids[k++] = last = id;
        }
        e = attni_hip_emit(h, h->list + lane, h->ids, k, h->keys / attni_max32(h->n_sets, 1));
    }
    return e;
}

// ---- units

// Every block for the row block of a sequence that dense_below keeps whole.
ATTNI_CALLED attn_result attni_hip_dense(attni_hip *h, int32_t n_lists) {
    const attn_select *f = h->c->f;
    const int64_t b0 = h->kv_pos0 / f->kv_block, b1 = (h->end - 1) / f->kv_block;
    attn_result e = ATTN_OK;
    int32_t n = 0, l;
    int64_t b;
    for (b = b0; b <= b1 && h->end > h->kv_pos0; b++) h->ids[n++] = (int32_t)b;
    for (l = 0; l < n_lists && e == ATTN_OK; l++)
        e = attni_hip_emit(h, h->list + l, h->ids, n, 0);
    return e;
}

// From which stage on position p's row is scanned: n_stages when it stays.
ATTNI_CALLED int32_t attni_hip_due(const attni_hip *h, int64_t p) {
    const attn_select *f = h->c->f;
    int32_t i = 0;
    if (!h->state || *h->state != p) return 0;
    if (f->kind != ATTN_SELECT_HIP3) return p % f->hip.refresh ? 1 : 0;
    while (i < f->hip.n_stages && p % f->hip.stage[i].refresh) i++;
    return i;
}

// Every lane's row remembers `made`; a list that stays was read for no key.
ATTNI_CALLED void attni_hip_stamp(attni_hip *h, int32_t n_lanes, int64_t made, int stays) {
    const attn_selection *x = h->c->x;
    int32_t l, *state = h->state;
    for (l = 0; state && l < n_lanes; l++) {
        const int64_t row = x->seq_row[h->seq] + h->p_min / h->c->f->row_block;
        *state = (int32_t)made;
        state = (int32_t *)(void *)((uint8_t *)state + x->state_bytes);
        if (stays) x->visited[(h->list + l) * ((int64_t)x->max_rows + 1) + row] = 0;
    }
}

// Lists [list, list + n_lanes) of q block m, made by the sets.
ATTNI_CALLED attn_result attni_hip_lists(attni_hip *h, int64_t m, int32_t n_lanes) {
    const attn_select *f = h->c->f;
    const attn_selection *x = h->c->x;
    const int third = f->kind == ATTN_SELECT_HIP3;
    const int dense = h->kv_end - h->kv_pos0 <= f->dense_below;
    int32_t from, stages = third ? f->hip.n_stages : 1;
    attn_result e;
    int64_t p;
    if (!attni_hip_focus(h, m, attni_hip_block(f, 0))) return ATTN_OK;
    p = h->p_min;
    h->keys = 0;
    h->state = NULL;
    if (f->n_slots && h->q_len == 1) {
        const int64_t row = x->seq_row[h->seq] + p / f->row_block;
        if (row < 0 || row >= f->n_slots || !x->state) return ATTN_ERR_BUFFER;
        h->state = (int32_t *)(void *)(x->state +
                                       (size_t)(row * x->n_lists + h->list) * x->state_bytes);
    }
    from = dense ? 0 : attni_hip_due(h, p);
    if (from == stages) {
        attni_hip_stamp(h, n_lanes, p + 1, 1);
        return ATTN_OK;
    }
    attni_hip_stamp(h, n_lanes, 0, 0); // should this fail half way
    if (from) attni_hip_remember(h, from, 0);
    e = dense   ? attni_hip_dense(h, n_lanes)
        : third ? attni_hip_run3(h, from, p / attni_hip_block(f, from))
                : attni_hip_run2(h, n_lanes);
    if (e == ATTN_OK && !dense) attni_hip_stamp(h, n_lanes, p + 1, 0);
    return e;
}

ATTNI_CALLED void attni_hip_begin(attni_hip *h, attni_scan *c, int32_t seq) {
    h->c = c;
    h->seq = seq;
    h->q_start = c->d->q_start[seq];
    h->q_len = c->d->q_start[seq + 1] - h->q_start;
    h->pos0 = attni_q_pos0(c->d, seq);
    h->kv_pos0 = attni_kv_pos0(c->d, seq);
    h->kv_end = h->kv_pos0 + c->d->kv.kv_len[seq];
}

// q blocks of sequence s, times what is done apart: KV heads, but for lists of all heads.
ATTNI_CALLED int64_t attni_hip_units_of(const attn_desc *d, const attn_select *f, int32_t s) {
    const int64_t n = attni_hip_block(f, 0), p = attni_q_pos0(d, s);
    const int64_t q_len = d->q_start[s + 1] - d->q_start[s];
    if (q_len < 1) return 0;
    return ((p + q_len - 1) / n - p / n + 1) * (f->heads == ATTN_SELECT_ALL ? 1 : d->n_kv_heads);
}

ATTNI_CALLED int64_t attni_hip_units(const attn_desc *d, const attn_select *f) {
    int64_t n = 0;
    int32_t s;
    for (s = 0; s < d->n_seq; s++) n += attni_hip_units_of(d, f, s);
    return n;
}

ATTNI_CALLED attn_result attni_hip_unit(attni_scan *c, int64_t unit) {
    const attn_desc *d = c->d;
    const attn_select *f = c->f;
    const int32_t apart = f->heads == ATTN_SELECT_ALL ? 1 : d->n_kv_heads;
    const int32_t lanes = f->kind == ATTN_SELECT_HIP3 ? 1 : f->hip.head_group;
    attni_hip h;
    int32_t s = 0, i, j, kv_head;
    int64_t n, m;
    attn_result e = ATTN_OK;
    for (; unit >= (n = attni_hip_units_of(d, f, s)); s++) unit -= n;
    memset(&h, 0, sizeof h);
    attni_hip_carve(&h, c->rest, d, f);
    attni_hip_begin(&h, c, s);
    m = h.pos0 / attni_hip_block(f, 0) + unit / apart;
    kv_head = (int32_t)(unit % apart);
    h.n_sets = f->heads == ATTN_SELECT_ALL ? d->n_kv_heads : lanes;
    if (f->heads != ATTN_SELECT_EACH) {
        for (i = 0; i < h.n_sets; i++) {
            h.set[i].kv_head = kv_head + i;
            h.set[i].head = (kv_head + i) * c->group;
            h.set[i].n_heads = c->group;
        }
        h.list = kv_head;
        return attni_hip_lists(&h, m, 1);
    }
    for (i = 0; i < c->group && e == ATTN_OK; i += lanes) {
        h.list = kv_head * c->group + i;
        for (j = 0; j < lanes; j++) {
            h.set[j].kv_head = kv_head;
            h.set[j].head = h.list + j;
            h.set[j].n_heads = 1;
        }
        e = attni_hip_lists(&h, m, lanes);
    }
    return e;
}

// ---- landmarks

// Those of n <= 64 keys from position p on. sum: of the queries [p, p + 512), moves on by n.
ATTNI_CALLED attn_result attni_hip_landmarks(attni_hip *h, int64_t p, int32_t n, double *sum,
                                             float *out) {
    attni_scan *c = h->c;
    const attn_desc *d = c->d;
    const int32_t dim = d->head_dim, pt = d->kv.page_tokens;
    const attni_hip_set *set = h->set;
    const int64_t stop = h->pos0 + h->q_len;
    int32_t i, j, e;
    attn_result r = attni_scan_keys(c, h->seq, set->kv_head, NULL, p, n);
    for (i = 0; i < n && r == ATTN_OK; i++) {
        for (e = 0; e < dim; e++) c->q[(int64_t)i * dim + e] = (float)sum[e];
        for (j = 0; j < set->n_heads; j++) {
            attni_scan_query(c, 0, h->q_start + (p + i - h->pos0), set->head + j, h->wide);
            for (e = 0; e < dim; e++) sum[e] -= (double)h->wide[e];
            if (p + i + 512 >= stop) continue;
            attni_scan_query(c, 0, h->q_start + (p + i + 512 - h->pos0), set->head + j, h->wide);
            for (e = 0; e < dim; e++) sum[e] += (double)h->wide[e];
        }
    }
    if (r != ATTN_OK) return r;
    attni_scan_products(c, n);
    for (i = 0; i < n; i++) {
        const int64_t at = p + i - h->kv_pos0;
        const float count = (float)(attni_min64(512, stop - p - i) * set->n_heads);
        int32_t page;
        if (at < 0 || p + i >= h->kv_end) continue;
        if ((page = attni_page_of(d, h->seq, (int32_t)at)) < 0) return ATTN_ERR_PAGE;
        out[((int64_t)page * d->n_kv_heads + set->kv_head) * pt + at % pt] =
            c->s[(int64_t)i * ATTNI_LDS + i] * (c->scale * c->ks[i]) / count;
    }
    return ATTN_OK;
}

// A sequence's, for the KV head of h->set.
ATTNI_CALLED attn_result attni_hip_landmarks_of(attni_hip *h, float *out) {
    const attni_hip_set *set = h->set;
    double sum[ATTN_MAX_HEAD_DIM];
    attn_result r = ATTN_OK;
    int32_t i, j, e;
    memset(sum, 0, sizeof sum);
    for (i = 0; i < attni_min32(512, h->q_len); i++)
        for (j = 0; j < set->n_heads; j++) {
            attni_scan_query(h->c, 0, h->q_start + i, set->head + j, h->wide);
            for (e = 0; e < h->c->d->head_dim; e++) sum[e] += (double)h->wide[e];
        }
    for (i = 0; i < h->q_len && r == ATTN_OK; i += ATTNI_SCAN_ROWS)
        r = attni_hip_landmarks(h, h->pos0 + i, attni_min32(ATTNI_SCAN_ROWS, h->q_len - i), sum,
                                out);
    return r;
}

// ==== >>impl-exact  Certified top blocks =========================================================
//
// Best first: a heap holds the blocks that compete by what bounds their value, first a run's, then
// their cells', then the value itself; a block that is popped with its value is the next best.

// What bounds a competing block's value.
enum { ATTNI_BY_RUN = 0, ATTNI_BY_CELL = 1, ATTNI_BY_KEYS = 2 };
enum { ATTNI_NODES = 128 }; // bounded together

typedef struct attni_exact {
    const attn_desc *d;
    int32_t seq, kv_head, n_kv;  // the list's KV heads
    int32_t head, n_head;        // its query heads: first, of each KV head
    int32_t token, n_q, pos;     // queries: first token, count, position of the first
    int32_t n_rows, kv_rows;     // n_kv * kv_rows; kv_rows = n_head * n_q
    int32_t kv_pos0, kv_end, b;  // b: kv_block
    int32_t first, always, last; // blocks: first, of the row block's own stretch, last
    int32_t n, want;             // competing: first + 1 ..., how many of them are wanted
    int32_t n_heap, n_listed, n_keys, open;
    int wild;                    // no bound holds
    float top_norm, top_key;     // norms of q and of keys met, at most
    float *q, *qa;               // (n_rows + RB_MAX, head_dim) and absolute values
    float *norm, *ref;           // per row: of q; masses are in units of e^ref
    double *z, *all, *kept;      // Z; masses of what was scored, of what is listed
    float *bm, *bl;              // of a block of several segments: maximum, sum
    uint8_t *lost;               // no mass is known: 1: Z is NaN or +inf, 2: a block's M is
    float *key;                  // (blocks) of competing ones
    uint8_t *by;
    int32_t *heap, *list;
    float *cell, *run;           // bounds of nodes, NaN: not known yet
    int64_t cell0, run0;         // absolute numbers of the first of each
    int32_t n_cells, n_runs;
    int32_t *node;               // (NODES) what is bounded together
    float *weight, *radius, *slack, *best; // (NODES)
} attni_exact;

ATTNI_CALLED size_t attni_exact_carve(attni_exact *x, uint8_t *base, const attn_desc *d,
                                      const attn_select *f) {
    const size_t dim = ((size_t)d->head_dim + 15) & ~(size_t)15;
    size_t at = 0, rows = 0, blocks = 0, cells = 0, heads;
    int32_t s;
    for (s = 0; s < d->n_seq; s++) {
        size_t q_len = (size_t)(d->q_start[s + 1] - d->q_start[s]), len = (size_t)d->kv.kv_len[s];
        size_t pt = (size_t)d->kv.page_tokens;
        if (q_len > rows) rows = q_len;
        if (len / (size_t)f->kv_block + 2 > blocks) blocks = len / (size_t)f->kv_block + 2;
        len = (len + pt - 1) / pt * (size_t)attni_page_cells(d);
        if (len > cells) cells = len;
    }
    if (rows > (size_t)f->row_block) rows = (size_t)f->row_block;
    heads = (size_t)(f->heads == ATTN_SELECT_ALL ? d->n_heads : f->heads == ATTN_SELECT_EACH
                                                                    ? 1
                                                                    : d->n_heads / d->n_kv_heads);
    rows *= heads;
    ATTNI_CARVE(x, q, float *, (rows + ATTNI_RB_MAX) * dim)
    ATTNI_CARVE(x, qa, float *, (rows + ATTNI_RB_MAX) * dim)
    ATTNI_CARVE(x, norm, float *, rows)
    ATTNI_CARVE(x, ref, float *, rows)
    ATTNI_CARVE(x, z, double *, rows)
    ATTNI_CARVE(x, all, double *, rows)
    ATTNI_CARVE(x, kept, double *, rows)
    ATTNI_CARVE(x, bm, float *, rows)
    ATTNI_CARVE(x, bl, float *, rows)
    ATTNI_CARVE(x, lost, uint8_t *, rows)
    ATTNI_CARVE(x, key, float *, blocks)
    ATTNI_CARVE(x, by, uint8_t *, blocks)
    ATTNI_CARVE(x, heap, int32_t *, blocks)
    ATTNI_CARVE(x, list, int32_t *, blocks)
    ATTNI_CARVE(x, cell, float *, cells)
    ATTNI_CARVE(x, run, float *, cells / ATTNI_RUN + 2)
    ATTNI_CARVE(x, node, int32_t *, ATTNI_NODES)
    ATTNI_CARVE(x, weight, float *, ATTNI_NODES)
    ATTNI_CARVE(x, radius, float *, ATTNI_NODES)
    ATTNI_CARVE(x, slack, float *, ATTNI_NODES)
    ATTNI_CARVE(x, best, float *, ATTNI_NODES)
    return at;
}

ATTNI_CALLED size_t attni_exact_bytes(const attn_desc *d, const attn_select *f) {
    attni_exact x;
    return attni_exact_carve(&x, NULL, d, f);
}

ATTNI_CALLED int64_t attni_exact_units(const attn_desc *d, const attn_select *f) {
    int64_t n = 0;
    int32_t s;
    for (s = 0; s < d->n_seq; s++) n += attni_rows_of(d, f->row_block, s);
    return n * (f->heads == ATTN_SELECT_ALL ? 1 : f->heads == ATTN_SELECT_GROUP ? d->n_kv_heads
                                                                                : d->n_heads);
}

// ---- keys' scores

// Products of q's rows [r, r + nr) with n tiles: s[i * LDS + col].
ATTNI_CALLED void attni_exact_dots(attni_scan *c, const float *q, int32_t r, int32_t nr,
                                   const uint32_t *const *tile, int32_t n, int32_t col) {
    const uint32_t *kt[ATTNI_TILES + 3];
    const uint8_t *ahead[ATTNI_TILES + 3];
    uint8_t own[ATTNI_TILES + 3];
    const int32_t dim = c->d->head_dim;
    int32_t i;
    for (i = 0; i < n + 3; i++) {
        kt[i] = tile[attni_min32(i, n - 1)];
        ahead[i] = (const uint8_t *)kt[i];
        own[i] = (uint8_t)attni_min32(i, n - 1);
    }
    for (i = 0; i < nr; i += c->e.rb)
        c->e.ma->qk[ATTN_F32](q + (int64_t)(r + i) * dim, dim, attni_min32(c->e.rb, nr - i), kt,
                              ahead, 0, own, n, dim, c->s + (int64_t)i * ATTNI_LDS + col);
}

// (m, l) += (m1, l1): maximum and sum of exp(score - maximum).
ATTNI_CALLED void attni_exact_fold(float *m, float *l, float m1, float l1) {
    if (attni_bits32(m1) == 0xff800000u && !attni_isnan(l1)) return;
    if (attni_bits32(*m) == 0xff800000u && !attni_isnan(*l)) {
        *m = m1;
        *l = l1;
    } else if (attni_isnan(*l) || attni_isnan(l1)) {
        *l = attni_float(0x7fc00000u);
    } else if (attni_less(*m, m1)) {
        *l = (float)((double)*l * attni_exp64((double)*m - (double)m1)) + l1;
        *m = m1;
    } else {
        *l += (float)((double)l1 * attni_exp64((double)m1 - (double)*m));
    }
}

// M - Z of a row.
ATTNI_CALLED float attni_exact_value(const attni_exact *x, int32_t r, float m, float l) {
    const float inf = attni_float(0x7f800000u), none = attni_float(0xff800000u);
    double z = x->z[r];
    if (attni_isnan(l)) return inf;
    if ((x->lost[r] & 1) || attni_bits32(m) == 0xff800000u) return none;
    if (z < -1e300) return inf; // nothing is kept that the row sees
    return (float)((double)m - z + attni_ln((double)l));
}

// A row's part of one pass over n segments: seg (n, 2) with lo[j] the position of its first key;
// block j's value, of which *best is the largest yet. pass 0: Z; 1: values, masses; 2: listed.
typedef struct attni_exact_pass {
    int32_t pass, n, several; // several: segments of one block that come one after the other
    int32_t seg[32], lo[16];
    float best[16];
} attni_exact_pass;

ATTNI_CALLED void attni_exact_row(attni_scan *c, attni_exact *x, attni_exact_pass *p, int32_t r,
                                  float *s) {
    float m[16] = {0}, l[16] = {0}, e[16], ref = x->lost[r] ? 0 : x->ref[r], now;
    int32_t seg[32], j, at = x->pos + r % x->n_q;
    attni_segments a;
    a.k_scale = c->ks;
    a.scale = c->scale < 0 ? -c->scale : c->scale;
    a.softcap = c->d->logits.softcap;
    a.seg = p->seg;
    a.n = p->n;
    if (!p->pass) { // up to the query's own position
        memcpy(seg, p->seg, sizeof seg);
        for (j = 0; j < p->n; j++)
            seg[2 * j + 1] = attni_max32(0, attni_min32(seg[2 * j + 1], at - p->lo[j] + 1));
        a.seg = seg;
        ref = 3e38f;
    }
    now = c->e.ma->sums(&a, s, ref, m, l, e);
    if (!p->pass) {
        for (j = 0; j < p->n; j++) attni_exact_fold(x->bm + r, x->bl + r, m[j], l[j]);
        return;
    }
    if (attni_less(ref, now) && attni_finite(now) && !x->lost[r]) {
        double by = attni_exp64((double)ref - (double)now);
        x->ref[r] = now;
        x->all[r] *= by;
        x->kept[r] *= by;
    }
    for (j = 0; j < p->n; j++) {
        if (attni_isnan(l[j])) x->lost[r] |= 2; // its value is +inf, and no mass is known
        else if (p->pass == 2) x->kept[r] += (double)e[j];
        else x->all[r] += (double)e[j];
        if (p->pass == 2) continue;
        if (p->several) attni_exact_fold(x->bm + r, x->bl + r, m[j], l[j]);
        // l <= 256: ln l < 5.6
        else if (attni_isnan(l[j]) || x->z[r] < -1e300 ||
                 (double)m[j] - x->z[r] + 5.6 > (double)p->best[j]) {
            float v = attni_exact_value(x, r, m[j], l[j]);
            if (attni_less(p->best[j], v)) p->best[j] = v;
        }
    }
}

// One pass of all rows over the segments.
ATTNI_CALLED attn_result attni_exact_keys(attni_scan *c, attni_exact *x, attni_exact_pass *p) {
    const int32_t n_tiles = p->seg[2 * p->n - 2] + (p->seg[2 * p->n - 1] + 15) / 16;
    int32_t pos[ATTN_SPAN], i, j, h, r, r1;
    attn_result res;
    for (i = 0; i < 16 * n_tiles; i++) pos[i] = -1;
    for (j = 0; j < p->n; j++)
        for (i = 0; i < p->seg[2 * j + 1]; i++) pos[16 * p->seg[2 * j] + i] = p->lo[j] + i;
    for (h = 0; h < x->n_kv; h++) {
        res = attni_scan_keys(c, x->seq, x->kv_head + h, pos, 0, 16 * n_tiles);
        if (res != ATTN_OK) return res;
        for (i = 0; i < n_tiles; i++) {
            float norm[16];
            c->e.ma->norms((const float *)(const void *)c->kt[i], c->d->head_dim, norm);
            for (j = 0; j < 16; j++) {
                float k = c->ks[16 * i + j];
                if (pos[16 * i + j] < 0) continue;
                k = norm[j] * k * k;
                if (!attni_less(k, x->top_key)) x->top_key = k; // squared; NaN stays, too
            }
        }
        for (r = h * x->kv_rows; r < (h + 1) * x->kv_rows; r = r1) {
            r1 = attni_min32(r + ATTNI_SCAN_ROWS, (h + 1) * x->kv_rows);
            attni_exact_dots(c, x->q, r, r1 - r, c->kt, n_tiles, 0);
            for (i = r; i < r1; i++)
                attni_exact_row(c, x, p, i, c->s + (int64_t)(i - r) * ATTNI_LDS);
        }
    }
    return ATTN_OK;
}

// Passes over n blocks, at most 16; values of pass 1 go to x->key.
ATTNI_CALLED attn_result attni_exact_blocks(attni_scan *c, attni_exact *x, int pass,
                                            const int32_t *id, int32_t n) {
    const float none = attni_float(0xff800000u);
    attni_exact_pass p;
    attn_result res;
    int32_t i = 0, j, r, tile, lo, hi, from;
    for (p.pass = pass; i < n; i = j) {
        p.several = 0;
        for (p.n = tile = 0, j = i; j < n && p.n < 16; j++, p.n++) {
            lo = attni_max32(id[j] * x->b, x->kv_pos0);
            hi = (int32_t)attni_min64(((int64_t)id[j] + 1) * x->b, x->kv_end);
            if (p.n && tile + (hi - lo + 15) / 16 > ATTNI_TILES) break;
            p.seg[2 * p.n] = tile;
            p.seg[2 * p.n + 1] = attni_min32(hi - lo, ATTN_SPAN);
            p.lo[p.n] = lo;
            p.best[p.n] = none;
            tile += (hi - lo + 15) / 16;
            if (pass < 2) x->n_keys += hi - lo;
            if (hi - lo <= ATTN_SPAN) continue;
            p.several = 1; // alone, in segments
            for (r = 0; r < x->n_rows && pass == 1; r++) x->bm[r] = none, x->bl[r] = 0;
            for (from = lo; from < hi; from += ATTN_SPAN) {
                p.n = 1;
                p.lo[0] = from;
                p.seg[1] = attni_min32(hi - from, ATTN_SPAN);
                if ((res = attni_exact_keys(c, x, &p)) != ATTN_OK) return res;
            }
            for (r = 0; r < x->n_rows && pass == 1; r++) {
                float v = attni_exact_value(x, r, x->bm[r], x->bl[r]);
                if (attni_less(p.best[0], v)) p.best[0] = v;
            }
            j++;
            break;
        }
        if (!p.several && (res = attni_exact_keys(c, x, &p)) != ATTN_OK) return res;
        for (r = i; r < j && pass == 1; r++) {
            x->key[id[r] - x->first] = p.best[r - i];
            x->by[id[r] - x->first] = ATTNI_BY_KEYS;
        }
    }
    return ATTN_OK;
}

// ---- nodes' bounds

// Middles and half-widths of x->node's n nodes of one level and KV head as tiles: kt[i], kt[8 + i].
ATTNI_CALLED attn_result attni_exact_nodes(attni_scan *c, attni_exact *x, int level,
                                           int32_t kv_head, int32_t n) {
    const attn_desc *d = c->d;
    const int64_t dim = d->head_dim, stride = 2 * dim + 8, pc = attni_page_cells(d);
    const uint8_t *row[16], *ahead[16];
    int32_t i, t, e, side;
    for (i = 0; i < n; i += 16) {
        float *mid = c->kf + (i / 16) * 16 * dim, *half = c->kf + (8 + i / 16) * 16 * dim;
        float sum[16] = {0};
        for (side = 0; side < 2; side++) {
            for (t = 0; t < 16; t++) {
                int64_t cell = x->node[attni_min32(i + t, n - 1)], at;
                int32_t page;
                cell = level ? (x->run0 + cell) * ATTNI_RUN + ATTNI_RUN - 1 : x->cell0 + cell;
                at = attni_cell_place(d, x->seq, cell);
                page = attni_page_of(d, x->seq, (int32_t)attni_max64(at, 0));
                if (page < 0) return ATTN_ERR_PAGE;
                at = ((level * (int64_t)d->kv.n_pages + page) * pc + cell % pc) * d->n_kv_heads;
                row[t] = (const uint8_t *)(c->y->data + (at + kv_head) * stride + side * dim);
                ahead[t] = row[t];
                if (!side) x->radius[i + t] =
                    attni_from_bf16(c->y->data[(at + kv_head) * stride + 2 * dim]);
            }
            c->e.mv->pack(row, 4, (int)dim / 2, c->raw, ahead);
            c->e.mv->widen_tile(ATTN_BF16, c->raw, (int)dim / 2, side ? half : mid);
        }
        for (e = 0; e < dim; e++)
            for (t = 0; t < 16; t++) {
                float lo = mid[16 * e + t], hi = half[16 * e + t], m = (lo + hi) * 0.5f;
                mid[16 * e + t] = m;
                half[16 * e + t] = hi - m;
                m = (m < 0 ? -m : m) + (hi - m);
                sum[t] += m * m;
            }
        for (t = 0; t < 16; t++) { // what rounding may add to a product, over the norm of q
            float norm = attni_root(sum[t]);
            x->slack[i + t] = norm * (float)(dim + 16) * 2.4e-7f + 1e-23f;
            if (!attni_less(norm * x->top_norm, 1e30f)) x->slack[i + t] = attni_float(0x7f800000u);
        }
    }
    return ATTN_OK;
}

// Bounds x->node's n nodes. mass NULL: the largest over rows of bound - Z to x->best; else adds
// weighted masses of the nodes, at most, to mass[row].
ATTNI_CALLED attn_result attni_exact_bound(attni_scan *c, attni_exact *x, int level, int32_t n,
                                           float *mass) {
    const float none = attni_float(0xff800000u);
    const uint32_t *kt[ATTNI_TILES];
    int32_t i, h, r, r1;
    attn_result res;
    attni_bounds a;
    a.radius = x->radius;
    a.slack = x->slack;
    a.scale = c->scale < 0 ? -c->scale : c->scale;
    a.softcap = c->d->logits.softcap;
    a.n = (n + 15) / 16;
    for (i = 0; i < ATTNI_TILES; i++)
        kt[i] = (const uint32_t *)(const void *)(c->kf + i * 16 * (int64_t)c->d->head_dim);
    for (i = 0; i < ATTNI_NODES; i++) x->best[i] = none;
    for (i = n; i < ATTNI_NODES; i++) x->weight[i] = 0;
    for (h = 0; h < x->n_kv; h++) {
        if ((res = attni_exact_nodes(c, x, level, x->kv_head + h, n)) != ATTN_OK) return res;
        for (r = h * x->kv_rows; r < (h + 1) * x->kv_rows; r = r1) {
            r1 = attni_min32(r + ATTNI_SCAN_ROWS, (h + 1) * x->kv_rows);
            attni_exact_dots(c, x->q, r, r1 - r, kt, a.n, 0);
            attni_exact_dots(c, x->qa, r, r1 - r, kt + 8, a.n, ATTNI_NODES);
            for (i = r; i < r1; i++) {
                const float *s = c->s + (int64_t)(i - r) * ATTNI_LDS;
                float z = (float)x->z[i];
                if (x->lost[i] & (mass ? 3 : 1)) continue;
                z -= 1e-6f * (z < 0 ? -z : z);
                if (mass) mass[i] += c->e.ma->bounds(&a, s, x->norm[i], x->ref[i], NULL, x->weight);
                else c->e.ma->bounds(&a, s, x->norm[i], z, x->best, NULL);
            }
        }
        for (i = 0; i < n; i++) // NaN and infinities bound nothing
            if (!attni_finite(x->slack[i])) x->best[i] = attni_float(0x7f800000u);
    }
    return ATTN_OK;
}

// The cells [*c0, *c1) of what is held of block first + i, from the first cell on.
ATTNI_CALLED void attni_exact_cells(const attni_exact *x, int32_t i, int32_t *c0, int32_t *c1) {
    int64_t lo = attni_max64((int64_t)(x->first + i) * x->b, x->kv_pos0);
    int64_t hi = attni_min64(((int64_t)(x->first + i) + 1) * x->b, x->kv_end);
    *c0 = (int32_t)(attni_cell_of(x->d, x->seq, lo - x->kv_pos0) - x->cell0);
    *c1 = (int32_t)(attni_cell_of(x->d, x->seq, hi - 1 - x->kv_pos0) - x->cell0) + 1;
}

ATTNI_INLINE int32_t attni_exact_run(const attni_exact *x, int32_t cell) {
    return (int32_t)((x->cell0 + cell) / ATTNI_RUN - x->run0);
}

// What a bound on a node says of a block's value.
ATTNI_INLINE float attni_exact_raise(float best, float log_b) {
    if (!attni_finite(best)) return best;
    return best + log_b + 3e-5f + 1e-6f * (best < 0 ? -best : best);
}

// Bounds of all runs, and of the blocks by them; a run that goes on behind the last cell has none.
ATTNI_CALLED attn_result attni_exact_begin(attni_scan *c, attni_exact *x, float log_b) {
    const float inf = attni_float(0x7f800000u), none = attni_float(0xff800000u);
    int32_t i, j, n, c0, c1;
    attn_result res;
    for (i = 1; i <= x->n; i++) {
        x->key[i] = inf;
        x->by[i] = x->wild ? ATTNI_BY_CELL : ATTNI_BY_RUN;
    }
    if (x->wild || x->n < 1) return ATTN_OK;
    x->cell0 = attni_cell_of(x->d, x->seq, 0);
    x->run0 = x->cell0 / ATTNI_RUN;
    x->n_cells = (int32_t)(attni_cell_of(x->d, x->seq, x->kv_end - x->kv_pos0 - 1) - x->cell0) + 1;
    x->n_runs = (int32_t)((x->cell0 + x->n_cells) / ATTNI_RUN - x->run0);
    for (i = 0; i < x->n_cells; i++) x->cell[i] = attni_float(0x7fc00000u);
    attni_exact_cells(x, x->n, &c0, &c1);
    x->n_runs = attni_min32(x->n_runs, attni_exact_run(x, c1 - 1) + 1);
    for (i = 0; i < x->n_runs; i += n) {
        n = attni_min32(ATTNI_NODES, x->n_runs - i);
        for (j = 0; j < n; j++) x->node[j] = i + j;
        if ((res = attni_exact_bound(c, x, 1, n, NULL)) != ATTN_OK) return res;
        memcpy(x->run + i, x->best, 4 * (size_t)n);
    }
    for (i = 1; i <= x->n; i++) {
        float most = none;
        attni_exact_cells(x, i, &c0, &c1);
        if (attni_exact_run(x, c1 - 1) >= x->n_runs) continue;
        for (j = attni_exact_run(x, c0); j <= attni_exact_run(x, c1 - 1); j++)
            if (attni_less(most, x->run[j])) most = x->run[j];
        x->key[i] = attni_exact_raise(most, log_b);
    }
    return ATTN_OK;
}

// ---- the heap: largest key first, then the lowest block

ATTNI_INLINE int attni_exact_before(const attni_exact *x, int32_t i, int32_t j) {
    return attni_less(x->key[j], x->key[i]) || (!attni_less(x->key[i], x->key[j]) && i < j);
}

ATTNI_CALLED void attni_exact_sink(attni_exact *x, int32_t at) {
    int32_t i = x->heap[at], kid;
    while ((kid = 2 * at + 1) < x->n_heap) {
        if (kid + 1 < x->n_heap && attni_exact_before(x, x->heap[kid + 1], x->heap[kid])) kid++;
        if (!attni_exact_before(x, x->heap[kid], i)) break;
        x->heap[at] = x->heap[kid];
        at = kid;
    }
    x->heap[at] = i;
}

ATTNI_CALLED int32_t attni_exact_pop(attni_exact *x) {
    int32_t i = x->heap[0];
    x->heap[0] = x->heap[--x->n_heap];
    if (x->n_heap) attni_exact_sink(x, 0);
    return i;
}

ATTNI_CALLED void attni_exact_push(attni_exact *x, int32_t i) {
    int32_t at = x->n_heap++;
    for (; at > 0 && attni_exact_before(x, i, x->heap[(at - 1) / 2]); at = (at - 1) / 2)
        x->heap[at] = x->heap[(at - 1) / 2];
    x->heap[at] = i;
}

// Bounds blocks that are known by their runs by their cells instead: i, and more while they come
// next and their cells fit.
ATTNI_CALLED attn_result attni_exact_refine(attni_scan *c, attni_exact *x, int32_t i, float log_b) {
    const float none = attni_float(0xff800000u);
    int32_t n = 0, k = 0, c0, c1, j, e0, e1;
    attn_result res;
    for (;; i = attni_exact_pop(x)) { // the whole run's cells: its other blocks come soon
        x->list[x->n_listed + k++] = i;
        attni_exact_cells(x, i, &c0, &c1);
        e0 = (int32_t)((x->cell0 + c0) / ATTNI_RUN * ATTNI_RUN - x->cell0);
        e1 = (int32_t)((x->cell0 + c1 + ATTNI_RUN - 1) / ATTNI_RUN * ATTNI_RUN - x->cell0);
        e1 = attni_min32(e1, x->n_cells);
        for (j = attni_max32(e0, 0); j < e1; j++) {
            if (!attni_isnan(x->cell[j])) continue;
            if (n == ATTNI_NODES) {
                if ((res = attni_exact_bound(c, x, 0, n, NULL)) != ATTN_OK) return res;
                while (n > 0) n--, x->cell[x->node[n]] = x->best[n];
            }
            x->cell[j] = none;
            x->node[n++] = j;
        }
        if (!x->n_heap || x->by[x->heap[0]] != ATTNI_BY_RUN || n + 2 * ATTNI_RUN > ATTNI_NODES)
            break;
    }
    if (n && (res = attni_exact_bound(c, x, 0, n, NULL)) != ATTN_OK) return res;
    while (n > 0) n--, x->cell[x->node[n]] = x->best[n];
    while (k-- > 0) {
        float most = none;
        i = x->list[x->n_listed + k];
        attni_exact_cells(x, i, &c0, &c1);
        for (j = c0; j < c1; j++) if (attni_less(most, x->cell[j])) most = x->cell[j];
        x->key[i] = attni_exact_raise(most, log_b);
        x->by[i] = ATTNI_BY_CELL;
        attni_exact_push(x, i);
    }
    return ATTN_OK;
}

// ---- masses

// Adds what unread blocks may hold to mass[row] (+inf: anything).
ATTNI_CALLED attn_result attni_exact_unread(attni_scan *c, attni_exact *x, float *mass) {
    int32_t level, n, i, c0, c1, j, r, any = 0;
    attn_result res;
    for (i = 1; i <= x->n; i++) any |= x->by[i] < ATTNI_BY_KEYS;
    if (any && x->wild)
        for (r = 0; r < x->n_rows; r++) mass[r] = 3e38f;
    if (!any || x->wild) return ATTN_OK;
    for (level = 0; level < 2; level++) {
        for (n = 0, i = 1; i <= x->n; i++) {
            int by_run = x->by[i] == ATTNI_BY_RUN && attni_finite(x->key[i]);
            if (x->by[i] >= ATTNI_BY_KEYS || by_run != level) continue;
            attni_exact_cells(x, i, &c0, &c1);
            for (j = c0; j < c1; j++) {
                int64_t at = attni_cell_place(x->d, x->seq, x->cell0 + j) + x->kv_pos0;
                int64_t end = attni_cell_place(x->d, x->seq, x->cell0 + j + 1) + x->kv_pos0;
                int32_t node = level ? attni_exact_run(x, j) : j;
                at = attni_max64(at, (int64_t)(x->first + i) * x->b);
                end = attni_min64(end, ((int64_t)(x->first + i) + 1) * x->b);
                if (!n || x->node[n - 1] != node) {
                    if (n == ATTNI_NODES) {
                        if ((res = attni_exact_bound(c, x, level, n, mass)) != ATTN_OK) return res;
                        n = 0;
                    }
                    x->node[n] = node;
                    x->weight[n++] = 0;
                }
                x->weight[n - 1] += (float)(end - at);
            }
        }
        if (n && (res = attni_exact_bound(c, x, level, n, mass)) != ATTN_OK) return res;
    }
    return ATTN_OK;
}

// Reads the unread blocks of the largest bounds, to a factor of about 50 in mass.
ATTNI_CALLED attn_result attni_exact_more(attni_scan *c, attni_exact *x) {
    float top = attni_float(0xff800000u);
    int32_t i, n = 0, id[16];
    attn_result res;
    for (i = 1; i <= x->n; i++)
        if (x->by[i] < ATTNI_BY_KEYS && attni_less(top, x->key[i])) top = x->key[i];
    for (i = 1; i <= x->n; i++) {
        if (x->by[i] >= ATTNI_BY_KEYS || attni_less(x->key[i], top - 4)) continue;
        id[n++] = x->first + i;
        if (n < 16) continue;
        if ((res = attni_exact_blocks(c, x, 1, id, n)) != ATTN_OK) return res;
        n = 0;
    }
    if (n && (res = attni_exact_blocks(c, x, 1, id, n)) != ATTN_OK) return res;
    for (i = x->n_heap / 2; i-- > 0;) attni_exact_sink(x, i);
    return ATTN_OK;
}

// *yes: no row misses more than epsilon of its mass.
ATTNI_CALLED attn_result attni_exact_enough(attni_scan *c, attni_exact *x, int *yes) {
    const double part = 1 - (double)c->f->exact.epsilon;
    attn_result res;
    int32_t r;
    for (*yes = 0;;) {
        for (r = 0; r < x->n_rows; r++)
            if (x->lost[r] || x->kept[r] < part * x->all[r]) return ATTN_OK;
        memset(x->bm, 0, 4 * (size_t)x->n_rows);
        if ((res = attni_exact_unread(c, x, x->bm)) != ATTN_OK) return res;
        for (r = 0; r < x->n_rows; r++)
            if (x->kept[r] < part * (x->all[r] + 1.0001 * (double)x->bm[r])) break;
        if (r == x->n_rows) break;
        if ((res = attni_exact_more(c, x)) != ATTN_OK) return res;
    }
    *yes = 1;
    return ATTN_OK;
}

// The largest bound over rows on the missed share; every listed block's mass is in kept.
ATTNI_CALLED attn_result attni_exact_missed(attni_scan *c, attni_exact *x, float *out) {
    const float dim = (float)c->d->head_dim, cap = c->d->logits.softcap;
    const float key = attni_root(x->top_key), scale = c->scale < 0 ? -c->scale : c->scale;
    double worst = 0;
    attn_result res;
    int32_t r;
    memset(x->bm, 0, 4 * (size_t)x->n_rows);
    if ((res = attni_exact_unread(c, x, x->bm)) != ATTN_OK) return res;
    for (r = 0; r < x->n_rows; r++) {
        // scores are off by so much at most, by the rounding of their sums
        float off = (dim + 16) * 2.4e-7f * x->norm[r] * key * scale + 2e-6f * cap;
        double mu, miss;
        if (x->lost[r] || !attni_finite(off) || attni_less(1e30f, x->bm[r])) break;
        mu = attni_exp64(-2 * (double)off - 2e-5);
        miss = x->all[r] - x->kept[r];
        if (miss < 0) miss = 0;
        // masses of a row whose unit changed are not the same number twice
        miss += (x->ref[r] > (float)x->z[r] ? 2e-5 : 1e-12) * x->all[r];
        miss += 1.0001 * (double)x->bm[r];
        miss /= miss + x->kept[r] * mu * mu;
        if (worst < miss) worst = miss;
    }
    worst = r < x->n_rows || worst > 1 ? 1 : worst * (1 + 1e-6);
    *out = worst < 1 ? (float)worst : 1;
    return ATTN_OK;
}

// ---- a list row

// Finds out the list row of a unit. 0: it sees no key.
ATTNI_CALLED int attni_exact_find(const attni_scan *c, attni_exact *x, int64_t unit, int32_t *row) {
    const attn_desc *d = c->d;
    const attn_select *f = c->f;
    const int32_t lists = c->x->n_lists, l = (int32_t)(unit % lists);
    int32_t s = 0, n, q_len, p0, at, p1;
    int64_t from;
    for (unit /= lists; unit >= (n = attni_rows_of(d, f->row_block, s)); s++) unit -= n;
    x->d = d;
    x->seq = s;
    q_len = d->q_start[s + 1] - d->q_start[s];
    p0 = attni_q_pos0(d, s);
    at = p0 / f->row_block + (int32_t)unit;
    *row = c->x->seq_row[s] + at;
    from = (int64_t)at * f->row_block;
    x->pos = attni_max32(p0, (int32_t)from);
    p1 = (int32_t)attni_min64(from + f->row_block, (int64_t)p0 + q_len) - 1;
    x->n_q = p1 - x->pos + 1;
    x->token = d->q_start[s] + x->pos - p0;
    x->n_kv = f->heads == ATTN_SELECT_ALL ? d->n_kv_heads : 1;
    x->n_head = f->heads == ATTN_SELECT_EACH ? 1 : c->group;
    x->kv_head = f->heads == ATTN_SELECT_EACH ? l / c->group : l;
    x->head = f->heads == ATTN_SELECT_EACH ? l : l * c->group;
    x->kv_rows = x->n_head * x->n_q;
    x->n_rows = x->n_kv * x->kv_rows;
    x->b = f->kv_block;
    x->kv_pos0 = attni_kv_pos0(d, s);
    x->kv_end = x->kv_pos0 + d->kv.kv_len[s];
    x->first = x->kv_pos0 / x->b;
    x->last = attni_min32(p1, x->kv_end - 1) / x->b;
    x->always = (int32_t)(attni_max64(from - f->exact.recent, 0) / x->b);
    x->always = attni_max32(x->always, x->first);
    x->n = attni_max32(0, attni_min32(x->always - 1, x->last) - x->first);
    return d->kv.kv_len[s] > 0 && p1 >= x->kv_pos0;
}

// How many of the competing blocks are wanted.
ATTNI_CALLED int32_t attni_exact_want(const attni_scan *c, const attni_exact *x) {
    const attn_exact *e = &c->f->exact;
    const int32_t visible = x->last - x->first + 1, always = visible - x->n;
    double share = ((double)e->share - 1e-6) * (double)visible;
    int64_t n = attni_n_blocks(e->keep, x->b), by_share = (int64_t)share;
    if (c->d->kv.kv_len[x->seq] <= c->f->dense_below) return x->n;
    if (!e->keep && !(e->share > 0)) return x->n;
    if (share > 0) n = attni_max64(n, by_share + ((double)by_share < share));
    return (int32_t)attni_max64(0, attni_min64(x->n, n - always));
}

// Loads the queries, and Z from the keys that are always kept.
ATTNI_CALLED attn_result attni_exact_load(attni_scan *c, attni_exact *x) {
    const float none = attni_float(0xff800000u);
    const int64_t dim = c->d->head_dim;
    int32_t r, i, e;
    attn_result res;
    x->n_heap = x->n_listed = x->n_keys = 0;
    x->wild = !c->y;
    x->top_key = x->top_norm = 0;
    for (r = 0; r < x->n_rows; r++) {
        float *q = x->q + r * dim, *qa = x->qa + r * dim;
        double sum = 0;
        attni_scan_query(c, 0, x->token + r % x->n_q, x->head + r / x->n_q, q);
        for (e = 0; e < dim; e++) {
            if (c->scale < 0) q[e] = -q[e];
            qa[e] = attni_float(attni_bits32(q[e]) & 0x7fffffffu);
            sum += (double)q[e] * (double)q[e];
        }
        x->norm[r] = attni_root((float)sum) + 1e-19f;
        if (!attni_less(x->norm[r], 1e18f)) x->wild = 1; // nor where a sum may overflow
        if (!attni_less(x->norm[r], x->top_norm)) x->top_norm = x->norm[r];
        x->bm[r] = none;
        x->bl[r] = 0;
        x->lost[r] = 0;
    }
    memset(x->q + x->n_rows * dim, 0, 4 * (size_t)(ATTNI_RB_MAX * dim));
    memset(x->qa + x->n_rows * dim, 0, 4 * (size_t)(ATTNI_RB_MAX * dim));
    if (x->first < x->always && (res = attni_exact_blocks(c, x, 0, &x->first, 1)) != ATTN_OK)
        return res;
    for (i = x->always; i <= x->last; i++)
        if ((res = attni_exact_blocks(c, x, 0, &i, 1)) != ATTN_OK) return res;
    for (r = 0; r < x->n_rows; r++) {
        x->lost[r] = (uint8_t)attni_isnan(x->bl[r]);
        x->z[r] = -1e301;
        if (attni_bits32(x->bm[r]) == 0xff800000u) x->wild = 1;
        else if (!x->lost[r]) x->z[r] = (double)x->bm[r] + attni_ln((double)x->bl[r]);
        x->ref[r] = x->z[r] < -1e300 ? 0 : (float)x->z[r];
        x->all[r] = x->kept[r] = x->z[r] < -1e300 ? 0 : 1 + (x->z[r] - (double)x->ref[r]);
    }
    return ATTN_OK;
}

// Lists the blocks wanted, in order of value.
ATTNI_CALLED attn_result attni_exact_choose(attni_scan *c, attni_exact *x) {
    const int certain = c->f->exact.epsilon > 0;
    const int32_t most = attni_max32(1, ATTNI_TILES / ((attni_min32(x->b, ATTN_SPAN) + 15) / 16));
    const float log_b = (float)attni_ln((double)x->b);
    int32_t i, j, n, id[16];
    int yes = 0;
    attn_result res;
    if ((res = attni_exact_begin(c, x, log_b)) != ATTN_OK) return res;
    for (i = 1; i <= x->n; i++) attni_exact_push(x, i);
    if (certain && (res = attni_exact_enough(c, x, &yes)) != ATTN_OK) return res;
    while (x->n_listed < x->want && !yes) {
        i = attni_exact_pop(x);
        if (x->by[i] == ATTNI_BY_KEYS) {
            x->list[x->n_listed++] = i;
            id[0] = x->first + i;
            if (!certain) continue;
            if ((res = attni_exact_blocks(c, x, 2, id, 1)) != ATTN_OK) return res;
            if ((res = attni_exact_enough(c, x, &yes)) != ATTN_OK) return res;
        } else if (x->by[i] == ATTNI_BY_RUN) {
            if ((res = attni_exact_refine(c, x, i, log_b)) != ATTN_OK) return res;
        } else {
            for (n = 0, id[n++] = i; n < most && n < 16 && x->n_heap &&
                                     x->by[x->heap[0]] == ATTNI_BY_CELL;)
                id[n++] = attni_exact_pop(x);
            for (j = 0; j < n; j++) id[j] += x->first;
            if ((res = attni_exact_blocks(c, x, 1, id, n)) != ATTN_OK) return res;
            for (j = 0; j < n; j++) attni_exact_push(x, id[j] - x->first);
        }
    }
    for (i = 0; i < x->n_listed && !certain; i += n) {
        n = attni_min32(16, x->n_listed - i);
        for (j = 0; j < n; j++) id[j] = x->first + x->list[i + j];
        if ((res = attni_exact_blocks(c, x, 2, id, n)) != ATTN_OK) return res;
    }
    return ATTN_OK;
}

ATTNI_CALLED attn_result attni_exact_unit(attni_scan *c, int64_t unit) {
    const attn_selection *o = c->x;
    const int32_t l = (int32_t)(unit % o->n_lists);
    attni_exact x;
    attn_result res;
    float missed = 0;
    int32_t row, i, n = 0, *out, sees, all;
    int64_t at;
    attni_exact_carve(&x, c->rest, c->d, c->f);
    sees = attni_exact_find(c, &x, unit, &row);
    if (row < 0 || row >= o->max_rows) return ATTN_ERR_BUFFER;
    at = l * ((int64_t)o->max_rows + 1) + row;
    o->row_start[at] = o->row_end[at] = (l * (int64_t)o->max_rows + row) * o->row_capacity;
    o->visited[at] = 0;
    o->missed[at] = 0;
    if (!sees) return ATTN_OK;
    x.want = attni_exact_want(c, &x);
    all = x.want == x.n && !(c->f->exact.epsilon > 0 &&
                             c->d->kv.kv_len[x.seq] > c->f->dense_below);
    if (x.last - x.first + 1 - x.n + (all ? x.n : x.want) > o->row_capacity) return ATTN_ERR_BUFFER;
    x.n_keys = 0;
    if (!all) {
        if ((res = attni_exact_load(c, &x)) != ATTN_OK) return res;
        if ((res = attni_exact_choose(c, &x)) != ATTN_OK) return res;
        if (x.n_listed < x.n && (res = attni_exact_missed(c, &x, &missed)) != ATTN_OK) return res;
        for (i = 1; i <= x.n; i++) x.by[i] = 0;
        for (i = 0; i < x.n_listed; i++) x.by[x.list[i]] = 1;
    }
    out = o->block + o->row_start[at];
    for (i = x.first; i <= x.last; i++)
        if (i == x.first || i >= x.always || all || x.by[i - x.first]) out[n++] = i;
    o->row_end[at] += n;
    o->visited[at] = x.n_keys;
    o->missed[at] = missed;
    return ATTN_OK;
}

// ==== >>impl-select  =============================================================================

static int64_t attni_select_units(const attn_desc *d, const attn_select *f) {
    return f->kind == ATTN_SELECT_FLEX    ? attni_flex_units(d, f)
           : f->kind == ATTN_SELECT_EXACT ? attni_exact_units(d, f)
                                          : attni_hip_units(d, f);
}

ATTN_DEF int64_t attn_cpu_select_units(const attn_desc *d, const attn_select *s) {
    attn_select f;
    if (attn_select_check(d, s) != ATTN_OK || !attni_select_fill(s, &f)) return 0;
    return attni_select_units(d, &f);
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
    attn_result r = attni_cpu_check(d); // called for every unit: tables are looked at once, before
    if (r != ATTN_OK) return r;
    if (!s || !attni_select_fill(s, &f)) return ATTN_ERR_ARGUMENT;
    if ((r = attni_select_problem(d, &f)) != ATTN_OK) return r;
    if (!x || !x->block || !scratch || first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if (x->list.device_entries) return ATTN_ERR_UNSUPPORTED;
    if (!attni_select_fits(d, &f, x)) return ATTN_ERR_STALE;
    if (x->keeps_all) return ATTN_OK;
    if ((uintptr_t)scratch % 64) return ATTN_ERR_BUFFER;
    if (!d->q.data || !attni_is_float(d->q.dtype)) return ATTN_ERR_ARGUMENT;
    if (first > attni_select_units(d, &f) - count) return ATTN_ERR_ARGUMENT;
    if ((r = attni_scan_init(&c, d, &f, y, x, (uint8_t *)scratch)) != ATTN_OK) return r;
    mode = attni_mode_enter();
    if (c.dots) ATTNI_AMX_BEGIN(&c.dot);
    for (u = first; u < first + count && r == ATTN_OK; u++)
        r = f.kind == ATTN_SELECT_FLEX    ? attni_flex_unit(&c, u)
            : f.kind == ATTN_SELECT_EXACT ? attni_exact_unit(&c, u)
                                          : attni_hip_unit(&c, u);
    if (c.dots) ATTNI_AMX_END(&c.dot);
    attni_mode_leave(mode);
    return r;
}

ATTN_DEF attn_result attn_cpu_select_forget(const attn_selection *x, int32_t slot) {
    int32_t l;
    if (!x || slot < 0 || slot >= x->n_slots) return ATTN_ERR_ARGUMENT;
    for (l = 0; x->state && l < x->n_lists; l++) {
        int32_t none = -2;
        size_t at = (size_t)slot * (size_t)x->n_lists + (size_t)l;
        memcpy(x->state + at * x->state_bytes, &none, 4);
    }
    return ATTN_OK;
}

ATTN_DEF int64_t attn_cpu_landmarks_units(const attn_desc *d) {
    return attn_validate(d) == ATTN_OK ? (int64_t)d->n_seq * d->n_kv_heads : 0;
}

ATTN_DEF attn_result attn_cpu_landmarks(const attn_desc *d, const attn_select *s, float *out,
                                        int64_t first, int64_t count, void *scratch) {
    attn_select f;
    attni_scan c;
    attni_hip h;
    attni_hip_set set;
    uint64_t mode;
    int64_t u;
    attn_result r = attn_select_check(d, s);
    if (r != ATTN_OK) return r;
    if (!attni_select_fill(s, &f) || f.kind != ATTN_SELECT_HIP3) return ATTN_ERR_ARGUMENT;
    if (!out || !scratch || first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if (first + count > (int64_t)d->n_seq * d->n_kv_heads) return ATTN_ERR_ARGUMENT;
    if ((uintptr_t)scratch % 64) return ATTN_ERR_BUFFER;
    if ((r = attni_scan_init(&c, d, &f, NULL, NULL, (uint8_t *)scratch)) != ATTN_OK) return r;
    attni_hip_carve(&h, c.rest, d, &f);
    h.set = &set;
    mode = attni_mode_enter();
    for (u = first; u < first + count && r == ATTN_OK; u++) {
        attni_hip_begin(&h, &c, (int32_t)(u / d->n_kv_heads));
        set.kv_head = (int32_t)(u % d->n_kv_heads);
        set.head = set.kv_head * c.group;
        set.n_heads = c.group;
        r = attni_hip_landmarks_of(&h, out);
    }
    attni_mode_leave(mode);
    return r;
}

// ---- summaries

// The sequences' places [*j0, *j1) that a call makes anew.
ATTNI_CALLED void attni_summary_new(const attn_desc *d, int32_t s, int64_t *j0, int64_t *j1) {
    const int64_t from = (int64_t)attni_q_pos0(d, s) - attni_kv_pos0(d, s);
    *j0 = attni_max64(from, 0);
    *j1 = attni_min64(from + d->q_start[s + 1] - d->q_start[s], d->kv.kv_len[s]);
    if (*j1 < *j0) *j1 = *j0;
}

// Runs that hold new tokens of sequence s, from *run on.
ATTNI_CALLED int64_t attni_summary_runs(const attn_desc *d, int32_t s, int64_t *run) {
    int64_t j0, j1;
    attni_summary_new(d, s, &j0, &j1);
    if (j0 == j1) return 0;
    *run = attni_cell_of(d, s, j0) / ATTNI_RUN;
    return attni_cell_of(d, s, j1 - 1) / ATTNI_RUN - *run + 1;
}

typedef struct attni_summer {
    const attn_desc *d;
    attni_side k;
    const attni_moves *mv;
    uint16_t *data;
    float lo[ATTN_MAX_HEAD_DIM], hi[ATTN_MAX_HEAD_DIM];
} attni_summer;

// A key as it counts, padded to 16 with zeros.
ATTNI_CALLED void attni_summer_key(const attni_summer *m, int32_t page, int32_t place, int32_t head,
                                   float *out) {
    const int32_t dim = m->d->head_dim, units = dim * attni_bits_of(m->k.dtype) / 32;
    const uint8_t *base = attni_page_data(&m->k, page);
    const uint8_t *src = base + attni_token_offset(&m->k, place, head);
    const float scale = attni_scale_in(&m->k, base, place, head);
    uint32_t raw[ATTN_MAX_HEAD_DIM];
    int32_t i;
    for (i = 0; i < units; i++) memcpy(raw + i, src + i * (m->k.k16 ? 64 : 4), 4);
    m->mv->widen(m->k.dtype, raw, dim, out);
    for (i = 0; i < dim; i++) out[i] *= scale;
}

ATTNI_CALLED void attni_summer_begin(attni_summer *m) {
    int32_t i;
    for (i = 0; i < m->d->head_dim; i++) {
        m->lo[i] = attni_float(0x7f800000u);
        m->hi[i] = attni_float(0xff800000u);
    }
}

// Writes lo and hi as a node; not finite: anything is possible.
ATTNI_CALLED void attni_summer_box(attni_summer *m, int finite, uint16_t *node) {
    const int32_t dim = m->d->head_dim;
    int32_t i;
    for (i = 0; i < dim; i++) {
        node[i] = finite ? attni_outwards(m->lo[i], 0) : 0xff80u;
        node[dim + i] = finite ? attni_outwards(m->hi[i], 1) : 0x7f80u;
    }
    memset(node + 2 * dim, 0, 16);
    node[2 * dim] = 0x7f80u;
}

// A cell of n tokens from its page's token `place` on.
ATTNI_CALLED void attni_summer_cell(attni_summer *m, int32_t page, int32_t place, int32_t n,
                                    int32_t head, uint16_t *node) {
    const int32_t dim = m->d->head_dim;
    float key[ATTN_MAX_HEAD_DIM], radius = 0;
    int32_t t, i;
    int finite = 1;
    attni_summer_begin(m);
    for (t = 0; t < n; t++) {
        attni_summer_key(m, page, place + t, head, key);
        for (i = 0; i < dim; i++) {
            finite &= attni_finite(key[i]);
            m->lo[i] = key[i] < m->lo[i] ? key[i] : m->lo[i];
            m->hi[i] = key[i] > m->hi[i] ? key[i] : m->hi[i];
        }
    }
    attni_summer_box(m, finite, node);
    for (t = 0; t < n && finite; t++) {
        float sum = 0;
        attni_summer_key(m, page, place + t, head, key);
        for (i = 0; i < dim; i++) {
            float off = key[i] - attni_node_middle(node, dim, i);
            sum += attni_mul(off, off);
        }
        attni_node_ball(sum, 0, &radius);
    }
    if (finite && attni_finite(radius)) node[2 * dim] = attni_outwards(radius, 1);
}

// A run from its n cells' nodes.
ATTNI_CALLED void attni_summer_run(attni_summer *m, uint16_t *const *cell, int32_t n,
                                   uint16_t *node) {
    const int32_t dim = m->d->head_dim;
    float radius = 0;
    int32_t t, i;
    attni_summer_begin(m);
    for (t = 0; t < n; t++)
        for (i = 0; i < dim; i++) {
            float lo = attni_from_bf16(cell[t][i]), hi = attni_from_bf16(cell[t][dim + i]);
            m->lo[i] = lo < m->lo[i] ? lo : m->lo[i];
            m->hi[i] = hi > m->hi[i] ? hi : m->hi[i];
        }
    attni_summer_box(m, 1, node);
    for (t = 0; t < n; t++) {
        float sum = 0;
        for (i = 0; i < dim; i++) {
            float off = attni_node_middle(cell[t], dim, i) - attni_node_middle(node, dim, i);
            sum += attni_mul(off, off);
        }
        attni_node_ball(sum, attni_from_bf16(cell[t][2 * dim]), &radius);
    }
    node[2 * dim] = attni_finite(radius) ? attni_outwards(radius, 1) : 0x7f80u;
}

// New cells of sequence s in a run: [*g0, *g1); 0 when there are none.
ATTNI_CALLED int attni_summary_cells(const attn_desc *d, int32_t s, int64_t run, int64_t *g0,
                                     int64_t *g1) {
    int64_t j0, j1;
    attni_summary_new(d, s, &j0, &j1);
    if (j0 == j1) return 0;
    *g0 = attni_max64(attni_cell_of(d, s, j0), run * ATTNI_RUN);
    *g1 = attni_min64(attni_cell_of(d, s, j1 - 1), run * ATTNI_RUN + ATTNI_RUN - 1) + 1;
    return *g0 < *g1;
}

// The page of a cell of sequence s, *place and *n its tokens there; -1 where none is held.
ATTNI_CALLED int32_t attni_summary_page(const attn_desc *d, int32_t s, int64_t cell, int32_t *place,
                                        int32_t *n) {
    const int32_t pt = d->kv.page_tokens;
    int64_t j = attni_cell_place(d, s, cell);
    if (j < 0 || j >= d->kv.kv_len[s]) return -1;
    *place = (int32_t)(j % pt);
    *n = attni_min32(attni_min32(ATTNI_CELL, pt - *place), (int32_t)(d->kv.kv_len[s] - j));
    return attni_page_of(d, s, (int32_t)j);
}

// Sequences that share a page may all have new tokens in it or behind it. Those of a run for which
// the first new cell any of them sees is the same are the work of the first of them. Returns that
// one, *cell: that cell.
ATTNI_CALLED int32_t attni_summary_leader(const attn_desc *d, int32_t s, int64_t run,
                                          int64_t *cell) {
    int64_t g0, g1, first;
    int32_t u, at, n;
    if (!attni_summary_cells(d, s, run, &first, &g1)) return -1;
    for (u = 0; u < d->n_seq; u++)
        if (u != s && attni_summary_cells(d, u, run, &g0, &g1) && g0 < first &&
            attni_summary_page(d, u, g0, &at, &n) == attni_summary_page(d, s, g0, &at, &n))
            first = g0;
    for (u = 0; u < s; u++)
        if (attni_summary_cells(d, u, run, &g0, &g1) &&
            attni_summary_page(d, u, first, &at, &n) == attni_summary_page(d, s, first, &at, &n))
            break;
    *cell = first;
    return u;
}

// The new cells of sequence s in a run.
ATTNI_CALLED attn_result attni_summary_fill(attni_summer *m, int32_t s, int64_t run) {
    const attn_desc *d = m->d;
    int64_t g, g0 = 0, g1 = 0;
    int32_t u, h, page, place, n, at, most;
    attni_summary_cells(d, s, run, &g0, &g1);
    for (g = g0; g < g1; g++) {
        if ((page = attni_summary_page(d, s, g, &place, &most)) < 0) return ATTN_ERR_PAGE;
        for (u = 0; u < d->n_seq; u++) // who shares it may hold more of it
            if (attni_summary_page(d, u, g, &at, &n) == page) most = attni_max32(most, n);
        for (h = 0; h < d->n_kv_heads; h++)
            attni_summer_cell(m, page, place, most, h,
                              attni_node_at(d, m->data, 0, page, g, h));
    }
    return ATTN_OK;
}

// The run's own node, once its last cell is there: as whoever shares that and has the most of the
// run sees it, since fronts that are gone are gone for one sequence only.
ATTNI_CALLED attn_result attni_summary_close(attni_summer *m, int32_t s, int64_t run) {
    const attn_desc *d = m->d;
    uint16_t *cell[ATTNI_RUN];
    int32_t page[ATTNI_RUN], h, i, n, at, len;
    int64_t g = run * ATTNI_RUN;
    if (attni_cell_of(d, s, d->kv.kv_len[s] - 1) < g + ATTNI_RUN - 1) return ATTN_OK;
    n = attni_summary_page(d, s, g + ATTNI_RUN - 1, &at, &len);
    for (i = 0; i < d->n_seq; i++)
        if (attni_kv_pos0(d, i) < attni_kv_pos0(d, s) &&
            attni_summary_page(d, i, g + ATTNI_RUN - 1, &at, &len) == n)
            s = i;
    for (i = 0; i < ATTNI_RUN; i++) { // the front may be gone
        if (attni_cell_place(d, s, g + i) < 0) page[i] = -1;
        else if ((page[i] = attni_summary_page(d, s, g + i, &at, &len)) < 0) return ATTN_ERR_PAGE;
    }
    for (h = 0; h < d->n_kv_heads; h++) {
        for (n = i = 0; i < ATTNI_RUN; i++)
            if (page[i] >= 0) cell[n++] = attni_node_at(d, m->data, 0, page[i], g + i, h);
        attni_summer_run(m, cell, n,
                         attni_node_at(d, m->data, 1, page[ATTNI_RUN - 1], g + ATTNI_RUN - 1,
                                            h));
    }
    return ATTN_OK;
}

ATTNI_CALLED attn_result attni_summary_unit(attni_summer *m, int32_t s, int64_t run) {
    const attn_desc *d = m->d;
    int64_t first, g0, g1;
    attn_result r;
    int pass;
    int32_t u, at, n;
    if (attni_summary_leader(d, s, run, &first) != s) return ATTN_OK;
    for (pass = 0; pass < 2; pass++)
        for (u = s; u < d->n_seq; u++) {
            if (u != s && (!attni_summary_cells(d, u, run, &g0, &g1) ||
                           attni_summary_page(d, u, first, &at, &n) !=
                               attni_summary_page(d, s, first, &at, &n)))
                continue;
            r = pass ? attni_summary_close(m, u, run) : attni_summary_fill(m, u, run);
            if (r != ATTN_OK) return r;
        }
    return ATTN_OK;
}

static int64_t attni_summary_units(const attn_desc *d) {
    int64_t n = 0, run;
    int32_t s;
    for (s = 0; s < d->n_seq; s++) n += attni_summary_runs(d, s, &run);
    return n;
}

ATTN_DEF int64_t attn_cpu_summarize_units(const attn_desc *d) {
    attn_desc c;
    if (!d) return 0;
    c = *d; // of which only K counts
    memset(&c.mask, 0, sizeof c.mask);
    memset(&c.logits, 0, sizeof c.logits);
    memset(&c.q, 0, sizeof c.q);
    c.q.data = c.kv.k.data;
    c.q.dtype = ATTN_F32;
    c.o = c.q;
    return attn_validate(&c) == ATTN_OK ? attni_summary_units(d) : 0;
}

ATTN_DEF attn_result attn_cpu_summarize(const attn_desc *d, const attn_summary *y, int64_t first,
                                        int64_t count) {
    attni_summer m;
    attni_exec e;
    uint64_t mode;
    int64_t n, run = 0;
    int32_t s;
    attn_result r;
    if ((r = attni_cpu_check(d)) != ATTN_OK) return r;
    if (!y || !y->data || first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if ((uintptr_t)y->data % 64) return ATTN_ERR_BUFFER;
    if (first > attni_summary_units(d) - count) return ATTN_ERR_ARGUMENT;
    m.d = d;
    m.data = y->data;
    if ((r = attni_side_init(d, 0, &m.k)) != ATTN_OK) return r;
    attni_choose(d, &e);
    m.mv = e.mv;
    mode = attni_mode_enter();
    for (s = 0; s < d->n_seq && count > 0 && r == ATTN_OK; s++) {
        n = attni_summary_runs(d, s, &run);
        for (; first < n && count > 0 && r == ATTN_OK; first++, count--)
            r = attni_summary_unit(&m, s, run + first);
        first = attni_max64(first - n, 0);
    }
    attni_mode_leave(mode);
    return r;
}

// ==== >>impl-delta  ==============================================================================

ATTN_DEF attn_result attn_cpu_delta_take(const attn_desc *d, int32_t s, int32_t step,
                                         const attn_tensor *delta, int32_t first, int32_t count) {
    attn_result r = attni_cpu_check(d);
    int32_t i, h, e;
    if (r == ATTN_OK) r = attni_delta_check(d, s, step, delta, first, count);
    for (i = first; r == ATTN_OK && i < first + count; i++)
        for (h = 0; h < d->n_heads; h++) {
            int64_t from = attni_o_row(d, &d->o, d->q_start[s] + (int64_t)i * step, h);
            int64_t to = attni_o_row(d, delta, i, h);
            for (e = 0; e < attni_v_dim(d); e++) {
                float x = attni_get(delta->data, delta->dtype, to + e);
                attni_put(delta->data, delta->dtype, to + e,
                          x - attni_get(d->o.data, d->o.dtype, from + e));
            }
        }
    return r;
}

ATTN_DEF attn_result attn_cpu_delta_add(const attn_desc *d, int32_t s, int32_t step,
                                        int interpolate, const attn_tensor *delta, int32_t first,
                                        int32_t count) {
    attn_result r = attni_cpu_check(d);
    int32_t i, j, h, e, q_len, last;
    if (r == ATTN_OK) r = attni_delta_check(d, s, step, delta, first, count);
    if (r != ATTN_OK) return r;
    q_len = d->q_start[s + 1] - d->q_start[s];
    last = (q_len - 1) / step;
    for (i = first; i < first + count; i++)
        for (j = i * step; j < q_len && j - i * step < step; j++) {
            const float f = interpolate && i < last ? (float)(j - i * step) / (float)step : 0;
            for (h = 0; h < d->n_heads; h++) {
                int64_t a = attni_o_row(d, delta, i, h);
                int64_t b = attni_o_row(d, delta, attni_min32(i + 1, last), h);
                int64_t to = attni_o_row(d, &d->o, d->q_start[s] + (int64_t)j, h);
                for (e = 0; e < attni_v_dim(d); e++) {
                    float x = attni_get(delta->data, delta->dtype, a + e);
                    if (f > 0) x += f * (attni_get(delta->data, delta->dtype, b + e) - x);
                    attni_put(d->o.data, d->o.dtype, to + e,
                              x + attni_get(d->o.data, d->o.dtype, to + e));
                }
            }
        }
    return ATTN_OK;
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
#undef ATTNI_COUNT
#undef ATTNI_CPU_OPEN
#undef ATTNI_EACH
#undef ATTNI_EFFECT
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
#if defined(__NVCC__) && defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif
#undef ATTNI_WASM
#undef ATTNI_X86
#undef attni_math_fast_scalar

#endif // ATTNI_CPU_IMPLEMENTED
#endif // implementation
#endif // not a kernel pass

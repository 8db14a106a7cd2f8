/* attn_cuda.cuh - v0.1 - MIT licence, see the end of attn.h
   CUDA executors for attn.h, sm_75 and up: tensor cores (mma.sync, cp.async from sm_80 on) for
   16-bit queries over 16-bit or quantised KV, plain f32 arithmetic for everything else.

   DO THIS in exactly one .cu file, compiled by nvcc:
       #define ATTN_CUDA_IMPLEMENTATION          (or ATTN_IMPLEMENTATION, see attn.h)
       #include "attn_cuda.cuh"
   Other files, C as well, include it without the macro; no CUDA header is needed there. The
   implementation is C++17, nvcc's default since CUDA 12.

   EXAMPLE   once:         attn_cuda_open(&c, 0);
                           attn_cuda_plan_params(&c, &d, &params);  params.max_seq = ...;
                           attn_plan_build(&d, &params, mem, bytes, &plan);          host
                           attn_cuda_plan_init(&c, &d, &params, device, n_bytes, &g);
   an engine's step:       attn_plan_update(plan, &d, NULL);
                           attn_cuda_upload(&c, &d, plan, &g, staging, n_bytes, stream);
       every layer:        attn_cuda_store(&c, &d, &g, &k, &v, NULL, 0, n_tokens, stream);
                           attn_cuda_run(&c, &d, &g, partials, partial_bytes, stream);

   WHERE THINGS LIE   Device memory: q, o, lse, the pages, head_scale, alibi, sink, bias: what only
             kernels read. Host memory: every table of the descriptor (q_start, kv_len, q_pos0,
             kv_pos0, page_table, seq_order, tree_parent, block lists, columns and diagonals): plan
             and validation read them, attn_cuda_upload packs them into the plan's device image.
             Page tables may lie in device memory (attn_cuda_tables), block lists too: see
             attn_block_list.device_entries.
   OFFLOAD   With kv.cache K and V lie in page-locked host memory (cudaMallocHost) and what kv.cache
             points to (copies, slot, reads) in device memory. Pages without a copy are read where
             they lie, over the bus: the same bits. A plan's image must have been laid out with
             kv.cache then (it serves problems without, too). When the step's reads are over, on the
             same stream: copy reads to attn_cache.reads and zero them, attn_cache_update, copy
             attn_cache.slot to slot, attn_cuda_cache_load. A slot that is none counts as -1 and is
             reported (ERR_PAGE). Captured runs follow. Counting (reads not NULL) is a pass more.

   CONTENTS  >>open  >>store  >>run  >>delta  >>select   and behind  >>impl-:
             args, ptx, rows, masks, blocks, merge, convert, mma, team, simt, store, cache, host,
             delta, summary, select-keys, select-cut, select-flex, select-hip, select-exact,
             select-host

   MACROS    ATTN_CUDA_IMPLEMENTATION   implement this header
             ATTN_CUDA_KERNELS(X)       the tensor-core kernels to compile, X(bf16, quantised,
                                        head_dim, v_head_dim) for each; fewer compile faster, what
                                        is left out runs on the f32 kernels; see >>impl-host

   MEMORY    The caller's: device image (attn_cuda_plan_bytes), staging (the same size, page-locked
             for asynchrony), partials (params.partial_bytes). Nothing is allocated.
   STREAMS   Every call takes a stream, is asynchronous on it and never synchronises; store, run and
             copy_pages may be captured into a CUDA graph. A captured run stays right after later
             uploads into the same image, and when block lists in device memory change: grids depend
             on capacities only, plans on no list. Staging must stay as it is until the upload has
             been carried out: use two in turn.
   THREADS   No state but the caller's structs. One image: one run at a time, in stream order.
   ERRORS    Bad input is told at the call. Kernels compare every page, slot and block id with its
             count, skip a bad one and set *c.error.
   NUMERICS  FAST: tensor cores round the weights P to Q's type, and few rows' to f16 where K and V
             are quantised; then Q becomes, row by row, 16-bit fixed point for integers of K, f16
             for floats. Scores and sums are f32. APPROX is FAST; PORTABLE is ERR_UNSUPPORTED.
             A row's bits do not depend on the rest of the batch, page size, layout, placement or
             sharing.
   LIMITS    Layout K16 is the CPU's: ERR_UNSUPPORTED. */

#ifndef ATTN_CUDA_CUH
#define ATTN_CUDA_CUH

#include "attn.h"
#if ATTN_VERSION != 100
#error "attn_cuda.cuh and attn.h are of different versions: copy both from the same release"
#endif

// ==== >>open  A device ===========================================================================

typedef struct CUstream_st *attn_cuda_stream; // the same as cudaStream_t

typedef struct attn_cuda {
    int32_t device;     // ordinal
    int32_t arch;       // of the code that was loaded: 75, 80, 90, ...
    int32_t n_sm;       // multiprocessors
    int32_t smem_bytes; // shared memory a block may have
    int32_t *error;     // device memory, one word: the caller zeroes and reads it; kernels store an
                        // attn_result there (ERR_PAGE, ERR_MASK) and go on (default NULL)
} attn_cuda;

// Looks at the device and loads the kernels (once per process and device; synchronises). Makes it
// the current device. error is left alone. ERR_ARGUMENT: no such device; ERR_UNSUPPORTED: older
// than sm_75; ERR_DEVICE: the driver failed.
ATTN_DEF attn_result attn_cuda_open(attn_cuda *c, int32_t device);

// ATTN_OK, or ERR_UNSUPPORTED for K16 and PORTABLE. d must be valid.
ATTN_DEF attn_result attn_cuda_supports(const attn_cuda *c, const attn_desc *d);

// The kernels a problem runs on: "mma.bf16", "mma.f16", with "+dequant" where pages are converted,
// or "simt"; static text.
ATTN_DEF const char *attn_cuda_executor(const attn_cuda *c, const attn_desc *d);

// ==== >>store  Writing K and V into pages ========================================================

typedef struct attn_cuda_plan attn_cuda_plan;

// As attn_cpu_store: converts rows [first, first + count) of k (n_tokens, n_kv_heads, head_dim) and
// v to the pages' dtypes and layout. k, v, slots: device memory; slots[row] < 0 skips a row; slots
// NULL: every query token's own position, from what was uploaded to g (else g may be NULL). Slots
// outside the pool are skipped and reported (ERR_PAGE in *c->error).
ATTN_DEF attn_result attn_cuda_store(const attn_cuda *c, const attn_desc *d,
                                     const attn_cuda_plan *g, const attn_tensor *k,
                                     const attn_tensor *v, const int64_t *slots, int64_t first,
                                     int64_t count, attn_cuda_stream stream);

// As attn_cpu_copy_pages: page copies of the tree in d's K and V (one layer), in the list's order.
// copies: host memory, free again when the call returns.
ATTN_DEF attn_result attn_cuda_copy_pages(const attn_cuda *c, const attn_desc *d,
                                          const attn_page_copy *copies, int32_t n,
                                          attn_cuda_stream stream);

// As attn_cpu_cache_load: makes the copies that attn_cache_update asked for in d.kv.cache of one
// layer. loads: host memory, free again when the call returns. See OFFLOAD above.
ATTN_DEF attn_result attn_cuda_cache_load(const attn_cuda *c, const attn_desc *d,
                                          const attn_cache_load *loads, int32_t n,
                                          attn_cuda_stream stream);

// Copies whole pages of d's K and V to or from host memory (page-locked for asynchrony): page
// pages[i] <-> host_k + i * page bytes of K, host_v likewise. pages: host memory.
ATTN_DEF attn_result attn_cuda_swap_pages(const attn_cuda *c, const attn_desc *d,
                                          const int32_t *pages, int32_t n, void *host_k,
                                          void *host_v, int to_host, attn_cuda_stream stream);

// ==== >>run  Running a plan ======================================================================

// A page table that lies in device memory; where it is not NULL it replaces what upload would pack.
// The descriptor's, in host memory, must describe the same problem, as far as plan and validation
// need it.
typedef struct attn_cuda_tables {
    const int32_t *page_table;    // (n_seq, page_table_stride)
    int64_t page_table_stride;
} attn_cuda_tables;

// A plan's image in device memory. Filled by attn_cuda_plan_init, except tables and max_q_len,
// which the caller may set afterwards. Plain data.
struct attn_cuda_plan {
    attn_cuda_tables tables;
    int32_t max_q_len;             // queries of one sequence at most, ERR_BUFFER at upload beyond:
                                   // up to 64, and up to 8 rows of a KV head where nothing is
                                   // shared, save captured runs a launch (default 0: any)
    void *device;                  // private from here on
    size_t bytes, at[25];
    attn_mask mask;                // of the upload: its plan and tables are for no other
    int64_t cap[8], n[11];
    int32_t shape[8];
};

// Fills in the planner's parameters for this device: the span table (a span's tokens follow from
// the sequence's own lengths), row tiles, cost model, a bound on partials. Set max_seq, max_tokens,
// max_kv_len for a plan that is to be updated or captured in a graph.
ATTN_DEF void attn_cuda_plan_params(const attn_cuda *c, const attn_desc *d, attn_plan_params *out);

// Bytes of the device image, and of the staging buffer, for d and for the capacities in p where
// those are larger; 0 when invalid. Block lists and page tables of up to d's size fit.
ATTN_DEF size_t attn_cuda_plan_bytes(const attn_cuda *c, const attn_desc *d,
                                     const attn_plan_params *p);

// Lays the image out. device: 256-byte aligned; nothing is written yet. ERR_BUFFER.
ATTN_DEF attn_result attn_cuda_plan_init(const attn_cuda *c, const attn_desc *d,
                                         const attn_plan_params *p, void *device, size_t bytes,
                                         attn_cuda_plan *g);

// Packs plan and tables into staging and copies them to the image. ERR_BUFFER when they outgrew the
// capacities; ERR_STALE when plan was made for other lengths than d's.
ATTN_DEF attn_result attn_cuda_upload(const attn_cuda *c, const attn_desc *d, const attn_plan *plan,
                                      attn_cuda_plan *g, void *staging, size_t bytes,
                                      attn_cuda_stream stream);

// All tasks and merges of the uploaded plan: O and LSE are written. partials: device memory,
// 64-byte aligned, at least attn_plan_partial_bytes of the plan; in a captured run
// params.partial_bytes. d: the uploaded problem, with the layer's q, o, lse and page data.
ATTN_DEF attn_result attn_cuda_run(const attn_cuda *c, const attn_desc *d, const attn_cuda_plan *g,
                                   void *partials, size_t partial_bytes, attn_cuda_stream stream);

// Merges n states of the same rows, as attention over disjoint sets of keys leaves them (cascades,
// sequence parallelism): o[i] (n_tokens, n_heads, dim), lse[i] (n_tokens, n_heads) natural logs.
// Writes o_out and, unless NULL, lse_out; both may be those of a state. n <= 16. A folded left to
// right; states with LSE -inf count nothing; sink logits must be in one state only.
ATTN_DEF attn_result attn_cuda_merge(const attn_cuda *c, const attn_tensor *o,
                                     const float *const *lse, int32_t n, int64_t n_tokens,
                                     int32_t n_heads, int32_t dim, const attn_tensor *o_out,
                                     float *lse_out, attn_cuda_stream stream);

// ==== >>delta  Correcting sparse attention by some dense rows ====================================

// As attn_cpu_delta_take and _add, the same bits; delta lies in device memory as O does. _add over
// rows behind which others follow reads the first of those when it interpolates: take all before.
ATTN_DEF attn_result attn_cuda_delta_take(const attn_cuda *c, const attn_desc *d, int32_t s,
                                          int32_t step, const attn_tensor *delta, int32_t first,
                                          int32_t count, attn_cuda_stream stream);
ATTN_DEF attn_result attn_cuda_delta_add(const attn_cuda *c, const attn_desc *d, int32_t s,
                                         int32_t step, int interpolate, const attn_tensor *delta,
                                         int32_t first, int32_t count, attn_cuda_stream stream);

// ==== >>select  Block lists from Q and K =========================================================

// Bytes of workspace in device memory that selecting for d, or for the capacities in s, takes; 0
// when s or d is invalid or CUDA cannot do it. FLEX: per sequence that is estimated (counted in d).
ATTN_DEF size_t attn_cuda_select_bytes(const attn_cuda *c, const attn_desc *d,
                                       const attn_select *s);

// Writes the lists of all rows of x (attn_selection_init with on_device = 1) for the problem that
// was uploaded to g, whose K is stored already. y: not looked at yet, EXACT scores every key. work:
// 256-byte aligned device memory. Grids depend on capacities alone, lengths and tables are read
// from the image, so a captured call follows later uploads; slots of attn_selection_follow too, if
// the uploaded mask had x's terms (else slot[s] is s). What outgrew the capacities keeps every
// block, or has rows missing, and sets *c->error (ERR_BUFFER). HiP's slots must have been forgotten
// once; landmarks and rope lie in device memory, and styles are computed in f32. ERR_UNSUPPORTED:
// epsilon; FLEX: kv_block > 4096, compatible with tau beyond 46340 blocks; more query rows of a
// list, or blocks that HiP chooses, than fit in shared memory.
ATTN_DEF attn_result attn_cuda_select(const attn_cuda *c, const attn_desc *d,
                                      const attn_cuda_plan *g, const attn_select *s,
                                      const attn_summary *y, const attn_selection *x, void *work,
                                      size_t bytes, attn_cuda_stream stream);

// As attn_cpu_summarize, after the store of the uploaded problem's query tokens: the same bits. y:
// device memory.
ATTN_DEF attn_result attn_cuda_summarize(const attn_cuda *c, const attn_desc *d,
                                         const attn_cuda_plan *g, const attn_summary *y,
                                         attn_cuda_stream stream);

// A sequence moved into a slot: its first step selects anew.
ATTN_DEF attn_result attn_cuda_select_forget(const attn_cuda *c, const attn_selection *x,
                                             int32_t slot, attn_cuda_stream stream);

// HiP's landmarks of the keys of d's own tokens, after their store: g as for select; s too, with
// s->hip.landmark = out, device memory. Lengths and tables are read from the image.
ATTN_DEF attn_result attn_cuda_landmarks(const attn_cuda *c, const attn_desc *d,
                                         const attn_cuda_plan *g, const attn_select *s, float *out,
                                         attn_cuda_stream stream);

#endif // ATTN_CUDA_CUH

// ==== Stop here if you only want the API. ========================================================

#if defined(ATTN_IMPLEMENTATION) || defined(ATTN_CUDA_IMPLEMENTATION)
#ifndef ATTNI_CUDA_IMPLEMENTED
#define ATTNI_CUDA_IMPLEMENTED

#ifndef __CUDACC__
#error "attn_cuda.cuh: implement it in a .cu file, compiled by nvcc"
#endif
#include <cuda_runtime.h>

// ==== >>impl-args  What kernels are given ========================================================
//
// A task is a tile of query rows (tokens x heads of one KV head, packed) against a run of KV,
// walked in blocks of 64 tokens at absolute positions. A row's scores are taken block by block in
// ascending order with a running maximum; at a span border its state (O, m, l) is folded into the
// spans before or left as a partial. So a row's bits follow from its own spans, whatever tile it
// is in.

#define ATTNI_CU_BLOCK 64   /* KV tokens */
#define ATTNI_CU_THREADS 128
#define ATTNI_CU_UNIT 32    /* query tokens of a sequence that are merged together */

typedef struct attni_cu_link { // what a segment left of a sequence
    int64_t partial;
    int32_t seg_tokens, token_at, n_slots, pad;
} attni_cu_link;

typedef struct attni_cu_task {
    attni_cu_link link;     // all of seq's, when it is one and n_places is 1; else n_slots is 0
    int64_t partial;        // first partial row of its segment
    int32_t place0, n_places; // sequences, as places in the plan's order
    int32_t token0;         // first query token of the segment, over all places
    int32_t first_token, n_tokens; // the tile's tokens in the segment
    int32_t seg_tokens;     // query tokens of the segment
    int32_t kv_head, head;  // head: first query head of the tile
    int32_t seq;            // whose page table is read
    int32_t pos0;           // its kv_pos0
    int32_t span0, span1;   // first and last + 1 of the segment
    int32_t n_spans;        // of seq, that hold something where lists are gathered
    int32_t lo, hi;         // positions to read: [lo, hi) and those below sink_end
    int32_t sink_end;
    int32_t slots;          // 0: writes O; 1: leaves one folded partial; 2: one for each span
    int32_t span_shift;     // a span is 1 << span_shift blocks
    int32_t sink_block, lo_block, end_block; // behind the sinks, of lo, behind hi
    int32_t full_block, full_end; // blocks that every row sees
    int32_t q_begin, q_len, q_pos0, kv_len; // of seq
    int32_t unit, expected; // of the only unit that the tile has rows of, or -1: look them up
} attni_cu_task;

// Tasks of few rows; of some, where FEW's tiles are too small for them; of many queries.
enum { ATTNI_CU_FEW, ATTNI_CU_SOME, ATTNI_CU_MANY, ATTNI_CU_KINDS };

typedef struct attni_cu_header {
    int32_t n_tasks[ATTNI_CU_KINDS];
    int32_t n_merge;
    int32_t n_seq;
} attni_cu_header;

typedef struct attni_cu_args {
    attn_desc d;              // tables lie in device memory
    attni_side k, v;
    const attni_cu_header *header;
    const attni_cu_task *task;
    const attn_plan_seq *seq; // (n_seq)
    const int32_t *order;     // (n_places) sequence at each place
    const int32_t *token0;    // (n_places + 1) query tokens before each place
    const attni_cu_link *link; // seq.chain ...
    const int32_t *unit0;     // (n_seq) first unit of a sequence
    const int32_t *expected;  // (n_units) tasks that leave partials of it; 0: merged afterwards
    const int32_t *merge;     // (n_merge, 2) sequence and index of tokens to merge afterwards
    int32_t *arrived;         // (n_units, n_heads / group)
    int32_t *ticket;          // (ATTNI_CU_KINDS, 2) next task, blocks that are through
    int32_t *error;
    uint32_t *reads;          // (n_pages) of attni_cu_count_reads
    float *partial_o, *partial_ml; // (rows, v_head_dim), (rows, 2)
    int64_t n_entries;        // of a block list that kernels have to check; else -1
    int64_t cap_tasks;        // room for both kinds
    int64_t last_task;        // in task[], where tasks of MANY begin and go down from
    int32_t kind, group;      // group: query heads in a tile
    int32_t per_group;        // 65536 / group, rounded up: row * per_group >> 16 is its token
    int32_t mods;             // scores need more than a positive scale
    int32_t odd_rows, odd_q, odd_o; // not aligned for wide accesses: rows of K and V, of Q, of O
    int32_t sparse, closed;   // closed: a row sees one run of keys
    int32_t listed;           // a list of whole blocks of keys is the only sparse term, keep_sink
                              // and keep_recent apart
    int32_t gather;           // a list of smaller ones is: tasks walk it, see >>impl-blocks
    int32_t strided;          // local-stride is, of whole blocks
    int32_t run;              // it does so as far as sparse terms let it
    int32_t wide_q, wide_o;   // rows of Q and O are found with 32 bits, 16 bytes each
    int32_t pieces;           // 64 rows of a page of so many lie in one piece of less than 2 GB
    int32_t page_shift;       // page_tokens is 1 << page_shift, or -1
    int32_t runs;             // of 16 tokens in every page, none of which has a copy
    float scale;              // of a score; with log2(e) in it when there are no mods
} attni_cu_args;

#define ATTNI_DEV static __device__ __forceinline__
// One copy for all kernels: compile time.
#define ATTNI_DEV_FAR static __device__ __noinline__
#define ATTNI_LOG2E 1.4426950408889634f
#define ATTNI_LN2 0.6931471805599453f
#define ATTNI_NINF __int_as_float((int)0xff800000)

// ==== >>impl-ptx  One wrapper per instruction ====================================================

ATTNI_DEV uint32_t attni_smem(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory, zeros when n is 0.
ATTNI_DEV void attni_cp_async16(uint32_t dst, const void *src, int n) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(dst), "l"(src), "r"(n) : "memory");
#else
    uint4 x = make_uint4(0, 0, 0, 0);
    if (n) x = *(const uint4 *)src;
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}

ATTNI_DEV void attni_cp_async4(uint32_t dst, const void *src, int n) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 ::"r"(dst), "l"(src), "r"(n) : "memory");
#else
    uint32_t x = n ? *(const uint32_t *)src : 0;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(x) : "memory");
#endif
}

ATTNI_DEV void attni_sts16(uint32_t dst, const uint32_t x[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(dst), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

ATTNI_DEV void attni_sts4(uint32_t dst, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(x) : "memory");
}
ATTNI_DEV void attni_sts8(uint32_t dst, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(dst), "r"(x), "r"(y) : "memory");
}
ATTNI_DEV void attni_lds16(uint32_t x[4], uint32_t from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
ATTNI_DEV void attni_lds8(uint32_t x[2], uint32_t from) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1]) : "r"(from) : "memory");
}
ATTNI_DEV void attni_shared_max(uint32_t at, uint32_t x) {
    asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
ATTNI_DEV uint16_t attni_lds2(uint32_t from) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
    return x;
}
ATTNI_DEV uint32_t attni_lds4(uint32_t from) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

ATTNI_DEV void attni_prefetch(const void *p) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

ATTNI_DEV void attni_cp_commit(void) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N groups are under way.
template <int N> ATTNI_DEV void attni_cp_wait(void) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Launches of a run overlap (attni_cu_launch): the next one may begin; all before this one are
// through, with what they wrote.
ATTNI_DEV void attni_grid_release(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
ATTNI_DEV void attni_grid_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

ATTNI_DEV void attni_ldmatrix(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

ATTNI_DEV void attni_ldmatrix_trans(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// 8 x 8 pairs' halves turned over: a lane has row lane / 4, columns 2 (lane % 4) and behind it.
ATTNI_DEV uint32_t attni_turn(uint32_t x) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// c (16, 8) += a (16, 16) b (16, 8). BF: bf16, else f16.
template <int BF> ATTNI_DEV void attni_mma(float c[4], const uint32_t a[4], uint32_t b0,
                                           uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    if (BF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else // Turing: two steps of 8; it has no bf16, and the host does not ask for it
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// The same of 8-bit integers: c (16, 8) += a (16, 32) b (32, 8).
ATTNI_DEV void attni_mma_i8(int32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

ATTNI_DEV float attni_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats to a pair of 16-bit ones, lo in the low half.
template <int BF> ATTNI_DEV uint32_t attni_pair(float lo, float hi) {
    uint32_t r;
#if __CUDA_ARCH__ >= 800
    if (BF) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    uint16_t a, b;
    if (BF) return (uint32_t)attni_to_bf16(hi) << 16 | attni_to_bf16(lo);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(lo));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(hi));
    r = (uint32_t)b << 16 | a;
#endif
    return r;
}

ATTNI_DEV float attni_half(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// x * f, x - f on pairs.
ATTNI_DEV uint32_t attni_mul_f16(uint32_t x, uint32_t f) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(f));
    return r;
}
ATTNI_DEV uint32_t attni_sub_f16(uint32_t x, uint32_t f) {
    uint32_t r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(f));
    return r;
}
ATTNI_DEV uint32_t attni_fma_bf16(uint32_t x, uint32_t f, uint32_t c) {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(f), "r"(c));
#endif
    return r;
}

// Counts up; true for the last of `all`, which sees what the blocks of the others wrote before (a
// barrier behind it), as do those that wait for it at a barrier. The counter is 0 again then.
ATTNI_DEV int attni_arrive(int32_t *n, int32_t all) {
    __threadfence();
    if (atomicAdd(n, 1) != all - 1) return 0;
    __threadfence();
    *n = 0;
    return 1;
}

// Over the four lanes that hold a row.
ATTNI_DEV float attni_quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
ATTNI_DEV float attni_quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Over the eight lanes that hold a column.
ATTNI_DEV float attni_oct_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}
ATTNI_DEV float attni_oct_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}

// ==== >>impl-rows  The query rows of a tile ======================================================

typedef struct attni_cu_row {
    int32_t token;  // in q and o; -1: none
    int32_t head;
    int32_t seq, t; // its place in the sequence's queries
    int32_t pos;    // absolute position
    int32_t lo, hi; // positions that kind and window leave, sinks apart; where lists are gathered,
                    // what it sees of the tile's lists
} attni_cu_row;

// Positions that kind and window leave to a query at pos, sinks apart.
ATTNI_DEV void attni_cu_reach_of(const attn_mask *m, int32_t pos, int32_t pos0, int32_t kv_len,
                                 int32_t *from, int32_t *to) {
    int64_t lo = pos0, hi = lo + kv_len;
    if (m->kind != ATTN_MASK_FULL) hi = attni_min64(hi, (int64_t)pos + 1);
    if (m->window_left) lo = attni_max64(lo, (int64_t)pos - (m->window_left - 1));
    if (m->window_right) hi = attni_min64(hi, (int64_t)pos + m->window_right);
    *from = (int32_t)attni_min64(lo, INT32_MAX);
    *to = (int32_t)attni_max64(hi, 0);
}

// Query token f of all places -> its sequence and index there.
ATTNI_DEV void attni_cu_find(const attni_cu_args &a, const attni_cu_task &w, int32_t f,
                             int32_t *seq, int32_t *t) {
    int32_t lo = w.place0, hi = w.place0 + w.n_places, at = lo + (f - w.token0);
    if (at < hi && a.token0[at] == f) lo = at, hi = at + 1; // a token each, as in decoding
    while (hi - lo > 1) {
        int32_t mid = (lo + hi) / 2;
        if (a.token0[mid] <= f) lo = mid;
        else hi = mid;
    }
    *seq = a.order[lo];
    *t = f - a.token0[lo];
}

ATTNI_DEV attni_cu_row attni_cu_get_row(const attni_cu_args &a, const attni_cu_task &w, int r) {
    const attn_mask *m = &a.d.mask;
    attni_cu_row x = {-1, 0, 0, 0, 0, 0, 0};
    int token = r * a.per_group >> 16;
    if (token >= w.n_tokens) return x;
    int32_t q_begin = w.q_begin, q_pos0 = w.q_pos0, kv_len = w.kv_len;
    x.seq = w.seq;
    x.t = w.first_token + token;
    if (w.n_places > 1) {
        attni_cu_find(a, w, w.token0 + w.first_token + token, &x.seq, &x.t);
        q_begin = a.seq[x.seq].q_begin;
        q_pos0 = a.seq[x.seq].q_pos0;
        kv_len = a.seq[x.seq].kv_len;
    }
    x.token = q_begin + x.t;
    x.head = w.head + (r - token * a.group);
    x.pos = q_pos0 + x.t;
    if (m->kind == ATTN_MASK_TREE) x.pos = q_pos0 + attni_tree_depth(&a.d, q_begin, x.t);
    attni_cu_reach_of(m, x.pos, w.pos0, kv_len, &x.lo, &x.hi);
    return x;
}

// ==== >>impl-masks  Which keys of a block a row sees =============================================

// Of the 64 keys from b0 on, bits of those in [lo, hi): what a row sees of one run of keys (kind,
// window).
ATTNI_DEV uint64_t attni_cu_closed_bits(int32_t lo, int32_t hi, int32_t b0) {
    lo = attni_max32(lo - b0, 0), hi = attni_min32(hi - b0, 64);
    return lo >= hi ? 0 : ~(uint64_t)0 >> (64 - (hi - lo)) << lo;
}

// Of keys from b0 on, those of [lo, hi) that keep_sink and keep_recent keep for a query at pos.
ATTNI_DEV uint64_t attni_cu_kept_bits(const attn_mask *m, int32_t pos, int32_t lo, int32_t hi,
                                      int32_t b0) {
    uint64_t bits = attni_cu_closed_bits(lo, attni_min32(hi, m->keep_sink), b0);
    if (m->keep_recent)
        bits |= attni_cu_closed_bits(attni_max32(lo, pos - m->keep_recent + 1), hi, b0);
    return bits;
}

// Whatever the mask is: as the CPU has it.
ATTNI_DEV uint64_t attni_cu_any_bits(const attni_cu_args &a, const attni_cu_row &x, int32_t b0) {
    uint64_t bits[4];
    attni_masker mk;
    int word = b0 >> 6 & 3;
    attni_masker_init(&mk, &a.d);
    attni_span_bits(&mk, a.seq + x.seq, x.seq, x.t, x.pos, x.head, b0 / ATTN_SPAN, bits);
    return word == 0 ? bits[0] : word == 1 ? bits[1] : word == 2 ? bits[2] : bits[3];
}

// Do the sparse terms of two rows of a tile agree everywhere?
ATTNI_DEV int attni_cu_same_terms(const attni_cu_args &a, const attni_cu_row &x,
                                  const attni_cu_row &y) {
    const attn_mask *m = &a.d.mask;
    const attn_block_list *b = &m->blocks;
    if (x.seq != y.seq || (x.head != y.head && attni_per_head(&a.d))) return 0;
    if (x.pos == y.pos) return 1;
    if (m->keep_recent && !a.listed) return 0;
    if (b->row_start) {
        int32_t unit = b->bits ? b->row_block / b->bits_rows : b->row_block;
        if (x.pos / unit != y.pos / unit) return 0;
    }
    if (m->stride.block && x.pos / m->stride.block != y.pos / m->stride.block) return 0;
    return !m->vslash.block || x.pos / m->vslash.block == y.pos / m->vslash.block;
}

// Of a row and a key; 0 where the key is none of the sequence's.
ATTNI_DEV float attni_cu_bias(const attni_cu_args &a, const attni_cu_task &w,
                              const attni_cu_row &x, int64_t pos) {
    const attn_tensor *b = &a.d.logits.bias;
    if (x.token < 0 || pos < w.pos0 || pos - w.pos0 >= a.seq[x.seq].kv_len) return 0;
    return attni_get(b->data, b->dtype,
                     x.head * b->stride_head + x.token * b->stride_token + (pos - w.pos0));
}

// Of a row and a key; nodes of a token tree are where their depth puts them.
ATTNI_DEV float attni_cu_alibi(const attni_cu_args &a, const attni_cu_row &x, int64_t pos) {
    if (x.token < 0) return 0;
    if (a.d.mask.kind == ATTN_MASK_TREE) {
        const attn_plan_seq *s = a.seq + x.seq;
        int64_t t = pos - s->q_pos0;
        if (t >= 0 && t < s->q_len)
            pos = s->q_pos0 + attni_tree_depth(&a.d, s->q_begin, (int32_t)t);
    }
    return __fmul_rn(a.d.logits.alibi[x.head], (float)(pos - x.pos));
}

// Entries of device tables are checked here; others were validated on the host.
ATTNI_DEV void attni_cu_report(const attni_cu_args &a, attn_result r) {
    if (a.error) *a.error = (int32_t)r;
}

// ==== >>impl-blocks  The blocks of a task and where their tokens lie =============================

#define ATTNI_CU_ROWS 128 /* of a tile at most */

// Lists of blocks smaller than those that a task walks are gathered: what it takes for a block is
// 64 tokens of the list of a row block, a group, one behind the other as listed, wherever they
// lie; a token is seen if the row's kind and window let it and keep_sink and keep_recent do not
// have it. What these have, in blocks of positions, follows: sinks, then the recent. Spans are not
// of positions then but shares of that: a list's blocks are cut into equal parts for the first
// spans of the sequence, those that follow for its last ones. So the work is what is listed, and a
// row's bits follow from its own list and sequence. A block's number is its span, from 0 on, above
// span_shift bits, and its place among the task's blocks of the span.

typedef struct attni_cu_group {
    int64_t from;           // first entry
    int32_t n;              // tokens
    int32_t base;           // number of its first block in each span
    int32_t place, pad;     // blocks in the lists of groups before it
} attni_cu_group;

#define ATTNI_CU_GROUPS 32    /* of a tile at most */
#define ATTNI_CU_SHARE_SHIFT 14 /* a task of few rows has fewer blocks of a span */
#define ATTNI_CU_SHARES 1024
#define ATTNI_CU_MAX_GATHERED (1 << 23) /* tokens of a sequence */

// The blocks that keep_sink and keep_recent have, counted over the sequence: sinks, then others.
typedef struct attni_cu_kept {
    int32_t n, sinks, window; // all; those of sinks; the first block of the others
    int32_t share;            // of a span
    int32_t sink0, sink1, window0, window1; // the task reads [sink0, sink1) and [window0, window1)
} attni_cu_kept;

// A task at hand, in shared memory; all threads of the block look after it.
template <int R, int T> struct attni_cu_work {
    static constexpr int ROWS = R, THREADS = T;
    static constexpr int SCAN = 4 * ATTNI_CU_THREADS;   // blocks looked at in one go
    attni_cu_task task;
    attni_cu_row row[ROWS];
    int32_t unit[ROWS], expected[ROWS];                 // of a token that is its tile's first
    union { // distinct: rows that differ in sparse terms; behind them what does not live as long
        int32_t distinct[ROWS < 32 ? ROWS + 16 : 2 * ROWS];
        attni_cu_group group[ROWS < ATTNI_CU_GROUPS ? ROWS : ATTNI_CU_GROUPS];
    };
    int32_t n_merge, n_distinct;
    int32_t n_groups, group0, n_listed;                 // groups, the first one's row block, blocks
                                                        // that they have of a span
    attni_cu_kept kept;
    int32_t recent, recent_all; // positions from which on keep_recent keeps what some, all rows see
    int32_t all_lo, all_hi;     // of a lone group's list all rows see [all_lo, all_hi)
    uint32_t any[SCAN / 32], all[SCAN / 32];            // of a sparse mask
    int32_t scan0;                                      // first block of any and all
    int32_t bad;                                        // a page of the task is none

    // First rows of units to merge; what one list has of any.
    __device__ __forceinline__ int32_t *merge(void) { return distinct + ROWS; }
    __device__ __forceinline__ uint32_t *one(void) { return (uint32_t *)(distinct + ROWS); }
};

// What a tile of a whole block's threads keeps in shared memory besides Q, K and V.
struct attni_cu_shared : attni_cu_work<ATTNI_CU_ROWS, ATTNI_CU_THREADS> {
    const uint8_t *k[ATTNI_CU_BLOCK], *v[ATTNI_CU_BLOCK]; // rows of the block loaded next, or NULL
    const uint8_t *kscale[ATTNI_CU_BLOCK], *vscale[ATTNI_CU_BLOCK];
    uint64_t bits[ATTNI_CU_ROWS];                       // of the partial block at hand
    uint64_t seen;                                      // by any row
    float wide_max[4][16], wide_sum[4][16];             // of rows that four warps share
    int32_t next;                                       // task
};

// Whether row x's list has the block of whole lists that position pos lies in.
ATTNI_DEV int attni_cu_lists(const attni_cu_args &a, const attni_cu_row &x, int32_t pos) {
    const attn_block_list *l = &a.d.mask.blocks;
    const int32_t list = attni_list_of(&a.d, l->n_lists, x.head);
    const int64_t row = attni_list_row(&a.d, x.seq, x.pos);
    return attni_contains(l->block, attni_row_start(l, list, row), attni_row_end(l, list, row),
                          pos / l->kv_block);
}

// The group of a block of gathered lists, or n_groups: one of positions. *at: of its first token
// among those of all groups' lists; the block of positions.
template <class W>
ATTNI_DEV int attni_cu_group_of(const W *s, int32_t b, int32_t *at) {
    const int32_t shift = s->task.span_shift, span = b >> shift, n = b - (span << shift);
    const attni_cu_kept &k = s->kept;
    int g = 0;
    if (n >= s->n_listed) { // of the last of n_spans
        const int32_t i = span - s->task.n_spans + (k.n + k.share - 1) / attni_max32(k.share, 1);
        const int32_t o = i * k.share + n - s->n_listed;
        *at = o < k.sinks ? o : k.window + o - k.sinks;
        return s->n_groups;
    }
    while (g + 1 < s->n_groups && n >= s->group[g + 1].base) g++;
    const int32_t end = g + 1 < s->n_groups ? s->group[g + 1].base : s->n_listed;
    *at = (s->group[g].place + span * (end - s->group[g].base) + n - s->group[g].base) *
          ATTNI_CU_BLOCK;
    return g;
}

// Bits of what a row sees of a block.
template <class W>
ATTNI_DEV uint64_t attni_cu_bits(const attni_cu_args &a, const W *s, const attni_cu_row &x,
                                 int32_t b) {
    const attn_mask *m = &a.d.mask;
    if (x.token < 0) return 0;
    if (a.gather) {
        int32_t at, lo, hi;
        if (attni_cu_group_of(s, b, &at) < s->n_groups) return attni_cu_closed_bits(x.lo, x.hi, at);
        attni_cu_reach_of(m, x.pos, s->task.pos0, s->task.kv_len, &lo, &hi);
        return attni_cu_kept_bits(m, x.pos, lo, hi, at * ATTNI_CU_BLOCK);
    }
    b *= ATTNI_CU_BLOCK;
    if (!a.listed || !a.run) return attni_cu_any_bits(a, x, b);
    return attni_cu_lists(a, x, b) ? attni_cu_closed_bits(x.lo, x.hi, b)
                                   : attni_cu_kept_bits(m, x.pos, x.lo, x.hi, b);
}

// Bits of the four blocks from b on that a row's local-stride term keeps.
ATTNI_DEV uint32_t attni_cu_strided(const attni_cu_args &a, const attni_cu_row &x, int32_t b) {
    const attn_local_stride *r = &a.d.mask.stride;
    const int64_t total = r->n_heads_total ? r->n_heads_total : a.d.n_kv_heads;
    const int32_t each = r->block / ATTNI_CU_BLOCK, i = x.pos / r->block;
    const int64_t h = r->homogeneous ? 0 : x.head / (a.d.n_heads / a.d.n_kv_heads) + r->head0;
    const int64_t step = r->head_step ? r->head_step : attni_max64(1, r->stride / total);
    const uint32_t first = (uint32_t)((h * step + r->offset) % r->stride);
    const int dense = !r->homogeneous && h >= total - r->n_dense;
    uint32_t keep = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int32_t j = (b + t) / each;
        if (j <= i && (dense || i - j < r->local ||
                       ((uint32_t)j + first) % (uint32_t)r->stride == 0))
            keep |= 1u << t;
    }
    return keep;
}

// As attni_cu_scan for lists of whole blocks: their entries say it all. Entries of device memory
// are checked here.
template <class W>
ATTNI_DEV_FAR void attni_cu_scan_lists(const attni_cu_args &a, W *s, int32_t scan0) {
    const attn_mask *m = &a.d.mask;
    const attn_block_list *l = &m->blocks;
    const int32_t each = l->kv_block / ATTNI_CU_BLOCK, t = (int32_t)threadIdx.x;
    int bad = 0;
    for (int i = 0; i < s->n_distinct; i++) {
        const attni_cu_row &x = s->row[s->distinct[i]];
        const int32_t list = attni_list_of(&a.d, l->n_lists, x.head);
        const int64_t row = attni_list_row(&a.d, x.seq, x.pos);
        const int64_t begin = attni_row_start(l, list, row), end = attni_row_end(l, list, row);
        // a few sweeps take less time than a search
        const int64_t from = end - begin <= 4 * W::THREADS || scan0 < each ? begin
                             : attni_lower_bound(l->block, begin, end, scan0 / each);
        if (t < W::SCAN / 32) s->one()[t] = 0;
        __syncthreads();
        bad |= a.n_entries >= 0 && from > begin && l->block[from - 1] < 0;
        for (int64_t e0 = from; e0 < end; e0 += W::THREADS) {
            const int64_t e = e0 + t;
            const int32_t id = e < end ? __ldg(l->block + e) : INT32_MAX;
            bad |= e < end && a.n_entries >= 0 &&
                   (id < 0 || (e > begin && id <= __ldg(l->block + e - 1)));
            const int64_t at = (int64_t)id * each - scan0;
            for (int64_t j = attni_max64(at, 0); j < attni_min64(at + each, W::SCAN); j++)
                atomicOr(&s->one()[j >> 5], 1u << (j & 31));
            if (__syncthreads_or(at >= W::SCAN)) break;
        }
        __syncthreads();
        if (t < W::SCAN / 32) {
            s->any[t] |= s->one()[t];
            s->all[t] &= s->one()[t];
        }
    }
    if (bad) attni_cu_report(a, ATTN_ERR_MASK);
    for (int j = 0; j < 32 && t < W::SCAN / 32; j++) {
        const int64_t pos = ((int64_t)scan0 + 32 * t + j) * ATTNI_CU_BLOCK;
        const int64_t end = pos + ATTNI_CU_BLOCK;
        if (pos < m->keep_sink || end > s->recent) s->any[t] |= 1u << j;
        if (end <= m->keep_sink || pos >= s->recent_all) s->all[t] |= 1u << j;
    }
}

// Fills any and all for W::SCAN blocks from b on; four blocks a thread, all threads call.
template <class W> ATTNI_DEV_FAR void attni_cu_scan(const attni_cu_args &a, W *s, int32_t b) {
    const attni_cu_task &w = s->task;
    const int mine = (int)threadIdx.x < W::SCAN / 4;
    int32_t b0 = b / 4 * 4 + 4 * (int)threadIdx.x, i, j;
    uint32_t any = 0, all = mine ? 15 : 0;
    attni_masker mk;
    __syncthreads();
    if ((int)threadIdx.x < W::SCAN / 32)
        s->any[threadIdx.x] = 0, s->all[threadIdx.x] = a.listed ? ~0u : 0;
    if (a.listed) {
        attni_cu_scan_lists(a, s, b / 4 * 4);
        any = all = 0;
    } else if (a.strided) {
        for (i = 0; i < s->n_distinct && mine; i++) {
            const uint32_t keep = attni_cu_strided(a, s->row[s->distinct[i]], b0);
            any |= keep, all &= keep;
        }
    } else {
        attni_masker_init(&mk, &a.d);
        if (mine && (int64_t)b0 * ATTNI_CU_BLOCK < w.hi)
            for (i = 0; i < s->n_distinct && (any != 15 || all); i++) {
                const attni_cu_row &x = s->row[s->distinct[i]];
                attni_sparse_bits(&mk, x.seq, x.pos, x.head, (int64_t)b0 * ATTNI_CU_BLOCK);
#pragma unroll
                for (j = 0; j < 4; j++) {
                    if (mk.bits[j]) any |= 1u << j;
                    if (~mk.bits[j]) all &= ~(1u << j);
                }
            }
    }
    __syncthreads();
    j = 4 * (int)threadIdx.x;
    if (any) atomicOr(&s->any[j >> 5], any << (j & 31));
    if (all) atomicOr(&s->all[j >> 5], all << (j & 31));
    if (threadIdx.x == 0) s->scan0 = b / 4 * 4;
    __syncthreads();
}

// Where the walk of a task begins.
ATTNI_DEV int32_t attni_cu_start(const attni_cu_args &a, const attni_cu_task &w) {
    if (a.gather) return w.end_block ? w.span0 << w.span_shift : 0;
    return attni_max32(w.span0 << w.span_shift, w.pos0 / ATTNI_CU_BLOCK);
}

// As attni_cu_next where lists are gathered.
template <class W> ATTNI_DEV_FAR int32_t attni_cu_next_listed(const W *s, int32_t b) {
    const attni_cu_task &w = s->task;
    const attni_cu_kept &k = s->kept;
    const int32_t shift = w.span_shift;
    for (; b < w.end_block; b = ((b >> shift) + 1) << shift) {
        const int32_t span = b >> shift, n = b - (span << shift);
        for (int g = 0; g < s->n_groups; g++) {
            const attni_cu_group &x = s->group[g];
            const int32_t end = g + 1 < s->n_groups ? s->group[g + 1].base : s->n_listed;
            const int32_t all = (x.n + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK;
            const int32_t i = attni_max32(n - x.base, 0), share = end - x.base;
            if (i < attni_min32(share, all - span * share)) return (span << shift) + x.base + i;
        }
        if (!k.n) continue;
        const int32_t i = span - w.n_spans + (k.n + k.share - 1) / k.share;
        if (i < 0) continue;
        int32_t o = i * k.share + attni_max32(n - s->n_listed, 0);
        const int32_t end = attni_min32((i + 1) * k.share, k.n);
        if (o < k.sinks) o = attni_max32(o, k.sink0);
        if (o >= k.sink1) o = attni_max32(o, k.window0);
        if (o < end && o < k.window1) return (span << shift) + s->n_listed + o - i * k.share;
    }
    return w.end_block;
}

// The first block from b on that the task reads, or its end. All threads call with the same b.
template <class W>
ATTNI_DEV int32_t attni_cu_next(const attni_cu_args &a, W *s, const attni_cu_task &w, int32_t b) {
    if (a.gather) return attni_cu_next_listed(s, b);
    for (;;) {
        if (b >= w.sink_block && b < w.lo_block) b = w.lo_block;
        if (!a.sparse || b >= w.end_block) return attni_min32(b, w.end_block);
        int32_t at = b - s->scan0;
        if (at < 0 || at >= W::SCAN) {
            attni_cu_scan(a, s, b);
            continue;
        }
        uint32_t left = s->any[at >> 5] >> (at & 31);
        if (left & 1) return b;
        b += left ? __ffs((int)left) - 1 : 32 - (at & 31);
    }
}

// Does keep_sink, or keep_recent for all rows, have all of the block of positions?
template <class W>
ATTNI_DEV int attni_cu_all_kept(const attni_cu_args &a, const W *s, int32_t block) {
    const int32_t pos = block * ATTNI_CU_BLOCK;
    return pos >= s->recent_all || a.d.mask.keep_sink - pos >= ATTNI_CU_BLOCK;
}

template <class W>
ATTNI_DEV_FAR int attni_cu_full_listed(const attni_cu_args &a, const W *s, int32_t b) {
    int32_t at;
    if (attni_cu_group_of(s, b, &at) < s->n_groups)
        return at >= s->all_lo && s->all_hi - at >= ATTNI_CU_BLOCK;
    return at >= s->task.full_block && at < s->task.full_end && attni_cu_all_kept(a, s, at);
}

// Every row of the tile sees every token of the block.
template <class W>
ATTNI_DEV int attni_cu_full(const attni_cu_args &a, const W *s, const attni_cu_task &w, int32_t b) {
    if (a.gather) return attni_cu_full_listed(a, s, b);
    if (b < w.full_block || b >= w.full_end) return 0;
    if (!a.sparse) return 1;
    int32_t at = b - s->scan0;
    if (at < 0 || at >= W::SCAN) return 0; // its scan has been written over: look at each row
    return s->all[at >> 5] >> (at & 31) & 1;
}

// The page, in its sequence, of token j of what is held.
ATTNI_DEV int32_t attni_cu_page_index(const attni_cu_args &a, int32_t j) {
    return a.page_shift >= 0 ? j >> a.page_shift : j / a.d.kv.page_tokens;
}

template <class W> ATTNI_DEV_FAR int32_t attni_cu_base_listed(const W *s, int32_t b) {
    int32_t at;
    return attni_cu_group_of(s, b, &at) < s->n_groups ? -4 * ATTNI_CU_BLOCK : at * ATTNI_CU_BLOCK;
}

// Position of the first token of a block that is not gathered; below all of them, if it is.
template <class W>
ATTNI_DEV int32_t attni_cu_base(const attni_cu_args &a, const W *s, int32_t b) {
    return a.gather ? attni_cu_base_listed(s, b) : b * ATTNI_CU_BLOCK;
}

// Position of token `at` among those of all groups, one of group g's list; -1 behind its end.
template <class W>
ATTNI_DEV int32_t attni_cu_listed(const attni_cu_args &a, W *s, int g, int32_t at) {
    const attn_block_list *l = &a.d.mask.blocks;
    const attni_cu_group &x = s->group[g];
    const int32_t t = at - x.place * ATTNI_CU_BLOCK, e = t / l->kv_block;
    if (t >= x.n) return -1;
    const int32_t *entry = l->block + x.from + e;
    const int32_t id = __ldg(entry);
    if (a.n_entries >= 0 && (id < 0 || (e && id <= __ldg(entry - 1)))) {
        attni_cu_report(a, ATTN_ERR_MASK);
        s->bad = 1;
        return -1;
    }
    return (int32_t)attni_min64((int64_t)id * l->kv_block + (t - e * l->kv_block), INT32_MAX);
}

// Position of token i of a block; -1 where lists are gathered and it is not read.
template <class W>
ATTNI_DEV int32_t attni_cu_position(const attni_cu_args &a, W *s, int32_t b, int i) {
    int32_t at;
    if (!a.gather) return b * ATTNI_CU_BLOCK + i;
    const int g = attni_cu_group_of(s, b, &at);
    if (g < s->n_groups) return attni_cu_listed(a, s, g, at + i);
    at = at * ATTNI_CU_BLOCK + i;
    return at < a.d.mask.keep_sink || at >= s->recent ? at : -1;
}
// ALiBi and bias of a row and token t of block b, added to its score.
ATTNI_DEV_FAR float attni_cu_extras(const attni_cu_args &a, attni_cu_shared *s,
                                    const attni_cu_row &x, int32_t b, int t, float score) {
    const int32_t pos = attni_cu_position(a, s, b, t);
    if (a.d.logits.alibi) score += attni_cu_alibi(a, x, pos);
    if (a.d.logits.bias.data) score += attni_cu_bias(a, s->task, x, pos);
    return score;
}

// As attni_cu_position, where there are no registers to spare.
template <class W>
ATTNI_DEV_FAR int32_t attni_cu_gathered(const attni_cu_args &a, W *s, int32_t b, int i) {
    return attni_cu_position(a, s, b, i);
}
template <class W>
ATTNI_DEV int32_t attni_cu_position_far(const attni_cu_args &a, W *s, int32_t b, int i) {
    return a.gather ? attni_cu_gathered(a, s, b, i) : b * ATTNI_CU_BLOCK + i;
}

// Where the token at pos lies: its page's index in the sequence and its place there, -1 when it is
// not read.
ATTNI_DEV int32_t attni_cu_place(const attni_cu_args &a, const attni_cu_task &w, int32_t pos,
                                 int32_t *page) {
    const int32_t j = pos - w.pos0; // hi is at most INT32_MAX
    *page = attni_cu_page_index(a, j);
    if (pos < 0 || pos >= w.hi || pos < w.pos0 || (pos < w.lo && pos >= w.sink_end)) return -1;
    return j - *page * a.d.kv.page_tokens;
}

// The id of the page, as the table has it.
ATTNI_DEV const int32_t *attni_cu_page_at(const attni_cu_args &a, int32_t seq, int32_t page) {
    return a.d.kv.page_table + seq * a.d.kv.page_table_stride + page;
}

ATTNI_DEV int32_t attni_cu_page(const attni_cu_args &a, const attni_cu_task &w, int32_t pos,
                                int32_t *place) {
    int32_t page;
    *place = attni_cu_place(a, w, pos, &page);
    return *place < 0 ? 0 : a.d.kv.page_table ? __ldg(attni_cu_page_at(a, w.seq, page)) : w.seq;
}
// Of token i of block b, if there are so many in a block.
ATTNI_DEV int32_t attni_cu_page_of(const attni_cu_args &a, attni_cu_shared *s, int32_t b, int i,
                                   int32_t *place) {
    const int32_t pos = i < ATTNI_CU_BLOCK ? attni_cu_position_far(a, s, b, i) : -1;
    return attni_cu_page(a, s->task, pos, place);
}

// What came of it, later: -1 when it is not read, or there is no such page.
template <class W> ATTNI_DEV int32_t attni_cu_checked(const attni_cu_args &a, W *s, int32_t page,
                                                      int32_t place) {
    if (place < 0) return -1;
    if ((uint32_t)page < (uint32_t)a.d.kv.n_pages) return page;
    attni_cu_report(a, ATTN_ERR_PAGE);
    s->bad = 1;
    return -1;
}

// Byte offset of a page, or of a copy (see attni_cu_resolve_pages), from page 0.
ATTNI_DEV int64_t attni_cu_page_offset(const attni_side &s, int32_t page) {
    return page * s.page_bytes + (page >= s.first_copy ? s.to_copies : 0);
}

// Byte offsets of that token's rows of K and V: in a page, from page 0.
ATTNI_DEV int64_t attni_cu_row_offset(const attni_side &s, int32_t place, int32_t head) {
    return place * s.token_bytes + head * s.head_bytes;
}
ATTNI_DEV int64_t attni_cu_offset(const attni_side &s, int32_t page, int32_t place, int32_t head) {
    return attni_cu_page_offset(s, page) + attni_cu_row_offset(s, place, head);
}

// Block lists that nobody has validated: a tile with a bad one reads nothing. Entries of lists that
// are walked are checked on the way. All threads call.
template <class W> ATTNI_DEV_FAR void attni_cu_check_lists(const attni_cu_args &a, W *s) {
    const attn_block_list *l = &a.d.mask.blocks;
    int bad = 0;
    for (int i = 0; i < s->n_distinct && !bad; i++) {
        const attni_cu_row &x = s->row[s->distinct[i]];
        const int32_t list = attni_list_of(&a.d, l->n_lists, x.head);
        const int64_t row = attni_list_row(&a.d, x.seq, x.pos);
        const int64_t from = attni_row_start(l, list, row), to = attni_row_end(l, list, row);
        bad = from < 0 || to < from || to > a.n_entries;
        for (int64_t e = from + (int)threadIdx.x; e < to && !bad && !a.listed; e += W::THREADS)
            bad = l->block[e] < 0 || (e > from && l->block[e] <= l->block[e - 1]);
    }
    bad = __syncthreads_or(bad);
    if (bad) attni_cu_report(a, ATTN_ERR_MASK);
    if (bad && threadIdx.x == 0) s->task.hi = s->task.end_block = 0;
    __syncthreads();
}

// Group g of the tile, as its row says; 0: that says nothing sensible.
template <class W>
ATTNI_DEV int attni_cu_take_group(const attni_cu_args &a, W *s, int g) {
    const attn_block_list *l = &a.d.mask.blocks;
    const int32_t list = attni_list_of(&a.d, l->n_lists, s->row[0].head);
    const int64_t row = (l->seq_row ? l->seq_row[s->task.seq] : 0) + (int64_t)s->group0 + g;
    const int64_t from = attni_row_start(l, list, row), to = attni_row_end(l, list, row);
    if (a.n_entries >= 0 && (from < 0 || to < from || to > a.n_entries)) return 0;
    s->group[g].from = from;
    s->group[g].n = (int32_t)attni_min64(to - from, INT32_MAX);
    return 1;
}

// Leaves of its entries those that the sequence holds something of; n becomes tokens.
template <class W> ATTNI_DEV void attni_cu_trim_group(const attni_cu_args &a, W *s, int g) {
    const attn_block_list *l = &a.d.mask.blocks;
    const int64_t begin = s->task.pos0, end = begin + s->task.kv_len;
    int64_t from = s->group[g].from, to = from + s->group[g].n;
    if (from < to && a.n_entries >= 0 && __ldg(l->block + from) < 0)
        attni_cu_report(a, ATTN_ERR_MASK);
    if (from < to && ((int64_t)__ldg(l->block + from) + 1) * l->kv_block <= begin)
        from = attni_lower_bound(l->block, from, to, begin / l->kv_block);
    if (from < to && (int64_t)__ldg(l->block + to - 1) * l->kv_block >= end)
        to = attni_lower_bound(l->block, from, to, (end + l->kv_block - 1) / l->kv_block);
    // more there cannot be, unless ids are not ascending
    to = attni_min64(to, from + s->task.kv_len / l->kv_block + 2);
    s->group[g].from = from;
    s->group[g].n = (int32_t)(to - from) * l->kv_block;
}

// Of a group's list the first token at pos or behind it.
ATTNI_DEV int32_t attni_cu_seek(const attni_cu_args &a, const attni_cu_group &x, int32_t pos) {
    const attn_block_list *l = &a.d.mask.blocks;
    const int32_t each = l->kv_block, n = x.n / each;
    const int32_t *block = l->block + x.from;
    if (!n || pos <= (int64_t)__ldg(block) * each) return 0;
    if (pos >= ((int64_t)__ldg(block + n - 1) + 1) * each) return x.n;
    const int32_t e = (int32_t)attni_lower_bound(block, 0, n, pos / each);
    return e * each + (e < n && __ldg(block + e) == pos / each ? pos % each : 0);
}

// Numbers the blocks of the groups. One thread calls.
template <class W> ATTNI_DEV void attni_cu_number(W *s) {
    const int32_t n_spans = s->task.n_spans;
    int32_t base = 0, place = 0;
    for (int g = 0; g < s->n_groups; g++) {
        attni_cu_group &x = s->group[g];
        const int32_t n = (x.n + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK;
        x.base = base, x.place = place;
        place += n;
        base += attni_min32(n, attni_max32(2, (n + n_spans - 1) / n_spans));
    }
    s->n_listed = base;
}

// The blocks that keep_sink and keep_recent have. One thread calls; says whether some of them are
// in the task's spans.
template <class W> ATTNI_DEV int attni_cu_find_kept(const attni_cu_args &a, W *s) {
    const attn_mask *m = &a.d.mask;
    const attni_cu_task &w = s->task;
    attni_cu_kept &k = s->kept;
    int32_t end = w.pos0 + w.kv_len;
    // of the sequence, so that it does not matter which tile a row is in
    if (m->kind != ATTN_MASK_FULL) end = attni_min32(end, w.q_pos0 + w.q_len);
    end = (end + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK;
    k.sinks = attni_min32((m->keep_sink + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK, end);
    k.window = !m->keep_recent ? end
               : attni_max32(k.sinks, (w.q_pos0 - m->keep_recent + 1) / ATTNI_CU_BLOCK);
    k.n = k.sinks + attni_max32(end - k.window, 0);
    k.share = attni_min32(k.n, attni_max32(2, (k.n + w.n_spans - 1) / w.n_spans));
    const int32_t lo = w.lo / ATTNI_CU_BLOCK, hi = (w.hi + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK;
    k.sink0 = attni_min32(lo, k.sinks);
    k.sink1 = attni_max32(attni_min32(hi, k.sinks), k.sink0);
    k.window0 = k.sinks + attni_max32(attni_max32(lo, s->recent / ATTNI_CU_BLOCK) - k.window, 0);
    k.window1 = attni_max32(k.sink1, k.sinks + attni_max32(hi - k.window, 0));
    if (k.window1 <= k.sinks) k.window1 = k.sink1;
    return k.n && w.span1 > w.n_spans - (k.n + k.share - 1) / k.share;
}

// The lists that a tile's rows have, and what each row sees of its own: runs, as lists ascend. All
// threads call.
template <class W> ATTNI_DEV_FAR void attni_cu_gather(const attni_cu_args &a, W *s, int n) {
    const attn_mask *m = &a.d.mask;
    const attni_cu_task &w = s->task;
    const int32_t each = m->blocks.row_block, first = s->row[0].pos / each;
    const int tid = (int)threadIdx.x;
    const int groups = (s->row[0].pos + w.n_tokens - 1) / each - first + 1;
    int bad = 0, some = 0;
    if (tid == 0) {
        s->n_groups = groups, s->group0 = first;
        s->all_lo = groups > 1 ? INT32_MAX : 0, s->all_hi = groups > 1 ? 0 : INT32_MAX;
        some = attni_cu_find_kept(a, s);
    }
    __syncthreads();
    for (int g = tid; g < groups; g += W::THREADS) {
        bad |= !attni_cu_take_group(a, s, g);
        // a span has two blocks of a list at least, but for the last of them
        some |= 2 * ATTNI_CU_BLOCK * (int64_t)w.span0 <
                (int64_t)s->group[g].n * m->blocks.kv_block;
    }
    bad = __syncthreads_or(bad);
    some = __syncthreads_or(some);
    if (bad) attni_cu_report(a, ATTN_ERR_MASK);
    if (bad || !some) { // nothing is read
        if (tid == 0) s->n_groups = s->n_listed = s->task.hi = s->task.end_block = 0;
        __syncthreads();
        return;
    }
    for (int g = tid; g < groups; g += W::THREADS) attni_cu_trim_group(a, s, g);
    __syncthreads();
    if (tid == 0) attni_cu_number(s);
    __syncthreads();
    for (int r = tid; r < n; r += W::THREADS) {
        attni_cu_row &x = s->row[r];
        if (x.token < 0) continue;
        const attni_cu_group &g = s->group[x.pos / each - first];
        const int32_t lo = attni_max32(x.lo, m->keep_sink);
        const int32_t hi = m->keep_recent ? attni_min32(x.hi, x.pos - m->keep_recent + 1) : x.hi;
        const int32_t at = g.place * ATTNI_CU_BLOCK;
        x.lo = at + attni_cu_seek(a, g, lo);
        x.hi = lo < hi ? at + attni_cu_seek(a, g, hi) : x.lo;
        if (groups == 1) atomicMax(&s->all_lo, x.lo), atomicMin(&s->all_hi, x.hi);
    }
    __syncthreads();
}

ATTNI_DEV const uint8_t *attni_cu_scale_at(const attni_side &s, int32_t page, int32_t place,
                                           int32_t head) {
    if (s.head_scale) return (const uint8_t *)(s.head_scale + head);
    return s.data + attni_cu_page_offset(s, page) + attni_scale_offset(&s, place, head);
}

// Nothing is known of a new task.
template <class W> ATTNI_DEV void attni_cu_fresh(W *s) {
    s->n_merge = s->n_distinct = s->bad = 0, s->scan0 = INT32_MIN / 2;
}

// Task i of its kind to s, if there are so many. All threads call.
template <class W> ATTNI_DEV int attni_cu_draw(const attni_cu_args &a, W *s, int32_t i) {
    const int *from = (const int *)(a.task + (a.kind == ATTNI_CU_MANY ? a.last_task - i : i));
    __syncthreads(); // the task before is done with s
    if (i >= a.cap_tasks) return 0;
    int32_t n = a.header->n_tasks[a.kind]; // together with the task, which may be an old one
#pragma unroll
    for (int r = (int)threadIdx.x; r < (int)(sizeof(attni_cu_task) / 4); r += W::THREADS)
        ((int *)&s->task)[r] = from[r];
    if (threadIdx.x == 0) attni_cu_fresh(s);
    __syncthreads();
    return i < n;
}

// Which of the first n rows differ in sparse terms. All threads call.
template <class W> ATTNI_DEV void attni_cu_distinct(const attni_cu_args &a, W *s, int n) {
    for (int r = (int)threadIdx.x; r < n; r += W::THREADS)
        if (s->row[r].token >= 0 && (r == 0 || !attni_cu_same_terms(a, s->row[r - 1], s->row[r])))
            s->distinct[atomicAdd(&s->n_distinct, 1)] = r;
    __syncthreads();
    if (a.n_entries >= 0) attni_cu_check_lists(a, s);
}

// What is known of a tile's sparse terms before its blocks are looked at. All threads call.
template <class W> ATTNI_DEV void attni_cu_terms(const attni_cu_args &a, W *s, int n) {
    const attn_mask *m = &a.d.mask;
    if (threadIdx.x == 0) { // rows lie one behind the other, but for those of token trees
        const int32_t last = (s->task.n_tokens - 1) * a.group;
        s->recent = m->keep_recent ? s->row[0].pos - m->keep_recent + 1 : INT32_MAX;
        s->recent_all = m->keep_recent ? s->row[last].pos - m->keep_recent + 1 : INT32_MAX;
    }
    if (a.gather) attni_cu_gather(a, s, n);
    else attni_cu_distinct(a, s, n);
}

// Units that the task's rows are the first of. All threads call.
template <class W> ATTNI_DEV void attni_cu_units(const attni_cu_args &a, W *s) {
    for (int r = (int)threadIdx.x; r < s->task.n_tokens && s->task.slots; r += W::THREADS) {
        const attni_cu_row &x = s->row[r * a.group];
        int first = r == 0 || x.t % ATTNI_CU_UNIT == 0 || s->row[(r - 1) * a.group].seq != x.seq;
        s->unit[r] = -1;
        if (!first) continue;
        if (s->task.unit >= 0) {
            s->unit[r] = s->task.unit;
            s->expected[r] = s->task.expected;
        } else {
            s->unit[r] = a.unit0[x.seq] + x.t / ATTNI_CU_UNIT;
            s->expected[r] = a.expected[s->unit[r]];
        }
    }
}

// What is kept of a task whose rows are known. All threads call.
ATTNI_DEV_FAR void attni_cu_settle(const attni_cu_args &a, attni_cu_shared *s) {
    attni_cu_units(a, s);
    if (a.sparse) attni_cu_terms(a, s, attni_cu_shared::ROWS);
}

// Takes over task i of its kind, if there are so many. All threads call.
ATTNI_DEV_FAR int attni_cu_begin(const attni_cu_args &a, attni_cu_shared *s, int32_t i) {
    if (!attni_cu_draw(a, s, i)) return 0;
    s->row[threadIdx.x] = attni_cu_get_row(a, s->task, (int)threadIdx.x); // as many as threads
    __syncthreads();
    attni_cu_settle(a, s);
    return 1;
}

// Bits of a partial block for every row; all threads call. seen: what any row sees.
ATTNI_DEV_FAR void attni_cu_mask_any(const attni_cu_args &a, attni_cu_shared *s, int32_t b) {
    int r = (int)threadIdx.x; // a row each
    uint32_t *seen = (uint32_t *)&s->seen;
    uint64_t bits = attni_cu_bits(a, s, s->row[r], b);
    s->bits[r] = bits;
    if (a.sparse && (uint32_t)bits) atomicOr(seen, (uint32_t)bits);
    if (a.sparse && bits >> 32) atomicOr(seen + 1, (uint32_t)(bits >> 32));
}

ATTNI_DEV void attni_cu_mask_rows(const attni_cu_args &a, attni_cu_shared *s, int32_t b) {
    if (threadIdx.x == 0) s->seen = a.sparse ? 0 : ~(uint64_t)0; // else what none sees is not read
    if (a.closed) {
        const attni_cu_row &x = s->row[threadIdx.x];
        s->bits[threadIdx.x] = attni_cu_closed_bits(x.lo, x.hi, b * ATTNI_CU_BLOCK);
    } else {
        __syncthreads();
        attni_cu_mask_any(a, s, b);
    }
    __syncthreads();
}

// ==== >>impl-merge  States of a row: folding, writing, merging ===================================
//
// A state is (O, m, l): sums weighted by 2^(score - m), scores in units of log2. m = -inf, l = 0
// says that nothing was seen; it leaves the other state as it is.

// Weights of an old state and of the one behind it; m and l become the sum's.
ATTNI_DEV void attni_cu_fold(float *m, float *l, float m1, float l1, float *w0, float *w1) {
    float top = fmaxf(*m, m1), base = top == ATTNI_NINF ? 0.0f : top;
    *w0 = 1.0f, *w1 = 0.0f;
    if (m1 == ATTNI_NINF && l1 == 0.0f) return;
    *w0 = attni_exp2(*m - base);
    *w1 = attni_exp2(m1 - base);
    *l = __fmaf_rn(*l, *w0, __fmul_rn(l1, *w1));
    *m = top;
}

// O = O * w0 + O1 * w1, the same everywhere.
ATTNI_DEV float attni_cu_blend(float o, float w0, float o1, float w1) {
    return __fmaf_rn(o, w0, __fmul_rn(o1, w1));
}

// Adds the sink logit; the factor that normalises O, and the row's LSE.
ATTNI_DEV float attni_cu_close(const attni_cu_args &a, int32_t head, float m, float l, float *lse) {
    float w = 1.0f;
    if (a.d.logits.sink) {
        float sink = a.d.logits.sink[head] * ATTNI_LOG2E, w1;
        attni_cu_fold(&m, &l, sink, 1.0f, &w, &w1);
    }
    *lse = l == 0.0f ? ATTNI_NINF : (m + log2f(l)) * ATTNI_LN2;
    return l == 0.0f ? 0.0f : w / l;
}

ATTNI_DEV void *attni_cu_o(const attni_cu_args &a, int32_t token, int32_t head) {
    int size = a.d.o.dtype == ATTN_F32 ? 4 : 2;
    return (uint8_t *)a.d.o.data + (token * a.d.o.stride_token + head * a.d.o.stride_head) * size;
}

ATTNI_DEV void attni_cu_put(const attni_cu_args &a, void *o, int32_t col, float x) {
    if (a.d.o.dtype == ATTN_F32) ((float *)o)[col] = x;
    else
        ((uint16_t *)o)[col] =
            (uint16_t)(a.d.o.dtype == ATTN_BF16 ? attni_pair<1>(x, 0) : attni_pair<0>(x, 0));
}

// Where a row of Q or O lies, in units of 16 bytes.
ATTNI_DEV uint32_t attni_cu_row16(const attn_tensor &x, const attni_cu_row &r) {
    return (uint32_t)((r.token * x.stride_token + r.head * x.stride_head) >> 3);
}

// Two neighbouring elements of a row of O.
ATTNI_DEV void attni_cu_put2(const attni_cu_args &a, void *o, int32_t col, float x, float y) {
    attni_cu_put(a, o, col, x);
    attni_cu_put(a, o, col + 1, y);
}

// Partial row of row x of the tile in slot n of its segment.
ATTNI_DEV int64_t attni_cu_partial(const attni_cu_args &a, const attni_cu_task &w, int r,
                                   const attni_cu_row &x, int32_t slot) {
    return w.partial +
           ((int64_t)slot * w.seg_tokens + w.first_token + (r * a.per_group >> 16)) * a.d.n_heads +
           x.head;
}

// Spans [from, to) in which the tile visited no block: they are partials, too.
template <class W>
ATTNI_DEV_FAR void attni_cu_empty_spans(const attni_cu_args &a, const W *s, int32_t from,
                                        int32_t to) {
    for (int r = (int)threadIdx.x; r < s->task.n_tokens * a.group; r += W::THREADS)
        for (int32_t i = from; i < to; i++) {
            int64_t at = attni_cu_partial(a, s->task, r, s->row[r], i - s->task.span0);
            __stcg((float2 *)a.partial_ml + at, make_float2(ATTNI_NINF, 0.0f));
        }
}

// Folds what all tasks left of 128 columns of a row, in span order, and writes them: the row of
// query t and a head of the sequence whose first token is q_begin. One warp.
ATTNI_DEV void attni_cu_merge_row(const attni_cu_args &a, const attni_cu_link *link, int n_links,
                                  int32_t q_begin, int32_t t, int32_t head, int32_t col) {
    const int vd = a.d.v_head_dim, lane = (int)threadIdx.x & 31, mine = col + 4 * lane < vd;
    float4 o = make_float4(0, 0, 0, 0);
    float m = ATTNI_NINF, l = 0, lse, f;
    for (int c0 = 0; c0 < n_links; c0 += 32) { // a link a lane, and then a slot a lane
        attni_cu_link k = {0, 0, 0, 0, 0};
        const int one = n_links == 1;
        if (one || c0 + lane < n_links) k = link[one ? 0 : c0 + lane];
        const int64_t first = k.partial + (int64_t)(k.token_at + t) * a.d.n_heads + head;
        int32_t end = k.n_slots; // of the lane's link, among the slots of all
#pragma unroll
        for (int i = 1; i < 32 && !one; i *= 2) {
            const int32_t y = __shfl_up_sync(~0u, end, i);
            if (lane >= i) end += y;
        }
        const int32_t total = __shfl_sync(~0u, end, 31);
        for (int i0 = 0; i0 < total; i0 += 32) {
            const int n = attni_min32(32, total - i0);
            int64_t at = first + (i0 + lane) * (int64_t)k.seg_tokens * a.d.n_heads;
            if (!one) {
                int c = 0; // the lane's slot is one of this link's
#pragma unroll
                for (int i = 16; i; i /= 2)
                    if (__shfl_sync(~0u, end, c + i - 1) <= i0 + lane) c += i;
                const int32_t j = i0 + lane - __shfl_sync(~0u, end - k.n_slots, c);
                const int64_t step = (int64_t)__shfl_sync(~0u, k.seg_tokens, c) * a.d.n_heads;
                at = __shfl_sync(~0u, first, c) + j * step;
            }
            float2 x = make_float2(ATTNI_NINF, 0);
            if (lane < n) x = __ldcg((const float2 *)a.partial_ml + at);
            // what attni_cu_fold would give one slot after the other, for all of them at once
            const int some = x.x != ATTNI_NINF || x.y != 0.0f;
            float top = x.x, before;
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                float y = __shfl_up_sync(~0u, top, i);
                if (lane >= i) top = fmaxf(top, y);
            }
            top = fmaxf(m, top);
            before = __shfl_up_sync(~0u, top, 1);
            if (lane == 0) before = m;
            const float base = top == ATTNI_NINF ? 0.0f : top;
            const float w0 = some ? attni_exp2(before - base) : 1.0f;
            const float w1 = some ? attni_exp2(x.x - base) : 0.0f, lw = __fmul_rn(x.y, w1);
            const uint32_t all = __ballot_sync(~0u, some);
            m = __shfl_sync(~0u, top, 31);
            for (int i1 = 0; i1 < n; i1 += 16) {
                float4 part[16]; // first, so that one latency is waited for
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const float *from = a.partial_o + __shfl_sync(~0u, at, i1 + i) * vd + col +
                                        4 * lane;
                    // where nothing was seen, O was not written
                    if (!mine || !(all >> (i1 + i) & 1))
                        from = (const float *)(const void *)a.header;
                    part[i] = __ldcg((const float4 *)from);
                }
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const float v0 = __shfl_sync(~0u, w0, i1 + i);
                    const float v1 = __shfl_sync(~0u, w1, i1 + i);
                    const float lv = __shfl_sync(~0u, lw, i1 + i);
                    if (!(all >> (i1 + i) & 1)) continue;
                    l = __fmaf_rn(l, v0, lv);
                    o.x = attni_cu_blend(o.x, v0, part[i].x, v1);
                    o.y = attni_cu_blend(o.y, v0, part[i].y, v1);
                    o.z = attni_cu_blend(o.z, v0, part[i].z, v1);
                    o.w = attni_cu_blend(o.w, v0, part[i].w, v1);
                }
            }
        }
    }
    f = attni_cu_close(a, head, m, l, &lse);
    if (l == 0) o = make_float4(0, 0, 0, 0);
    void *out = attni_cu_o(a, q_begin + t, head);
    if (mine) {
        attni_cu_put2(a, out, col + 4 * lane, o.x * f, o.y * f);
        attni_cu_put2(a, out, col + 4 * lane + 2, o.z * f, o.w * f);
    }
    if (a.d.lse && lane == 0 && col == 0)
        a.d.lse[(int64_t)(q_begin + t) * a.d.n_heads + head] = lse;
}

// Tokens that are merged when all tasks are through; a warp takes 128 columns of a head.
static __global__ void __launch_bounds__(ATTNI_CU_THREADS)
    attni_cu_merge_tokens(const __grid_constant__ attni_cu_args a) {
    const int32_t chunks = (a.d.v_head_dim + 127) / 128, per = a.d.n_heads * chunks;
    const int64_t n = (int64_t)a.header->n_merge * per;
    int64_t i = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
    if (i < n) { // while tasks run, what they do not write
        const attn_plan_seq *s = a.seq + a.merge[2 * (i / per)];
        const int lane = (int)threadIdx.x & 31;
        if (lane < s->n_chain) attni_prefetch(a.link + s->chain + lane);
    }
    attni_grid_wait();
    for (; i < n; i += (int64_t)gridDim.x * 4) {
        int32_t at = (int32_t)(i / per), rest = (int32_t)(i - (int64_t)at * per);
        const attn_plan_seq *s = a.seq + a.merge[2 * at];
        attni_cu_merge_row(a, a.link + s->chain, s->n_chain, s->q_begin, a.merge[2 * at + 1],
                           rest / chunks, 128 * (rest % chunks));
    }
}

// The tile's partials are written: whoever is the last to leave some of a unit merges it, in a
// fixed order, so that it does not matter who that is. All threads call.
template <class W> ATTNI_DEV void attni_cu_arrive(const attni_cu_args &a, W *s) {
    const attni_cu_task &w = s->task;
    const int tid = (int)threadIdx.x;
    int i;
    if (w.slots == 0 || (w.unit >= 0 && w.expected == 0)) return;
    __syncthreads();
    for (i = tid; i < w.n_tokens; i += W::THREADS) {
        if (s->unit[i] < 0 || s->expected[i] == 0) continue;
        int32_t *n = a.arrived +
                     (int64_t)s->unit[i] * (a.d.n_heads / a.group) + w.head / a.group;
        if (!attni_arrive(n, s->expected[i])) continue;
        s->merge()[atomicAdd(&s->n_merge, 1)] = i;
    }
    __syncthreads();
    if (s->n_merge == 0) return;
    for (int u = 0; u < s->n_merge; u++) {
        const attni_cu_row &x = s->row[s->merge()[u] * a.group];
        const int32_t t0 = x.t / ATTNI_CU_UNIT * ATTNI_CU_UNIT;
        const int32_t chunks = (a.d.v_head_dim + 127) / 128;
        const attni_cu_link *link = &s->task.link;
        int32_t n_links = 1, q_begin = w.q_begin, q_len = w.q_len;
        if (!link->n_slots) {
            const attn_plan_seq *q = a.seq + x.seq;
            link = a.link + q->chain;
            n_links = q->n_chain, q_begin = q->q_begin, q_len = q->q_len;
        }
        const int32_t n = attni_min32(ATTNI_CU_UNIT, q_len - t0) * a.group * chunks;
        for (i = tid >> 5; i < n; i += W::THREADS / 32) {
            const int32_t r = i / chunks;
            attni_cu_merge_row(a, link, n_links, q_begin, t0 + r / a.group, w.head + r % a.group,
                               128 * (i - r * chunks));
        }
    }
}

// The block is through; the last one puts the counter back, and stays for launches before its own,
// so that the end of a run's last launch is that of all.
ATTNI_DEV void attni_cu_leave_tasks(const attni_cu_args &a) {
    int32_t *ticket = a.ticket + 2 * a.kind;
    __threadfence();
    if (atomicAdd(ticket + 1, 1) != attni_min32((int32_t)gridDim.x, a.header->n_tasks[a.kind]) - 1)
        return;
    ticket[0] = ticket[1] = 0;
    attni_grid_wait();
}

// The block has a task to begin with; others keep away from the counter.
ATTNI_DEV int attni_cu_has_task(const attni_cu_args &a) {
    const int32_t n = a.header->n_tasks[a.kind];
    attni_grid_release();
    if (n == 0 && blockIdx.x == 0 && threadIdx.x == 0) attni_grid_wait();
    return (int32_t)blockIdx.x < n;
}

template <class W> ATTNI_DEV_FAR void attni_cu_arrive_far(const attni_cu_args &a, W *s) {
    attni_cu_arrive(a, s);
}

// Runs every task of the kernel's kind: the arguments, with the next one's rows in s. The counter
// is put back by the last block to leave.
#define ATTNI_CU_TASKS(...)                                                                        \
    attni_cu_shared *s = (attni_cu_shared *)(void *)smem;                                          \
    int32_t i = (int32_t)blockIdx.x, *ticket = a.ticket + 2 * a.kind;                              \
    if (!attni_cu_has_task(a)) return;                                                             \
    while (attni_cu_begin(a, s, i)) {                                                              \
        int32_t next = 0;                                                                          \
        if (threadIdx.x == 0) next = (int32_t)gridDim.x + atomicAdd(ticket, 1);                    \
        __VA_ARGS__;                                                                               \
        attni_cu_arrive_far(a, s);                                                                 \
        if (threadIdx.x == 0) s->next = next;                                                      \
        __syncthreads();                                                                           \
        i = s->next;                                                                               \
    }                                                                                              \
    if (threadIdx.x == 0) attni_cu_leave_tasks(a);

// ==== >>impl-convert  Quantised pages to 16-bit tiles ============================================

// The slow way, which also knows NaN and infinities.
template <int BF>
ATTNI_DEV_FAR void attni_cu_convert_any(attn_dtype t, uint4 x, uint32_t out[8]) {
    const void *src = &x;
#pragma unroll
    for (int i = 0; i < 8; i++)
        out[i] = attni_pair<BF>(attni_get(src, t, 2 * i), attni_get(src, t, 2 * i + 1));
}

// Four bytes of an 8-bit float whose fields lie `shift` places too high in a 16-bit one and whose
// exponents are too small by that of `factor`.
template <int BF, int SHIFT>
ATTNI_DEV void attni_cu_small4(uint32_t w, uint32_t factor, uint32_t *lo, uint32_t *hi) {
    uint32_t a = __byte_perm(w, 0, 0x1404), b = __byte_perm(w, 0, 0x3424);
    a = (a & 0x80008000u) | ((a & 0x7f007f00u) >> SHIFT);
    b = (b & 0x80008000u) | ((b & 0x7f007f00u) >> SHIFT);
    *lo = BF ? attni_fma_bf16(a, factor, 0x80008000u) : attni_mul_f16(a, factor);
    *hi = BF ? attni_fma_bf16(b, factor, 0x80008000u) : attni_mul_f16(b, factor);
}

// Four int8 codes.
template <int BF> ATTNI_DEV void attni_cu_int4x8(uint32_t w, uint32_t *lo, uint32_t *hi) {
    uint32_t u = w ^ 0x80808080u;
    if (BF) {
        const uint32_t one = 0x4b000000u; // 2^23
        const float bias = 8388736.0f;    // 2^23 + 128
        *lo = attni_pair<1>(__uint_as_float(__byte_perm(u, one, 0x7440)) - bias,
                            __uint_as_float(__byte_perm(u, one, 0x7441)) - bias);
        *hi = attni_pair<1>(__uint_as_float(__byte_perm(u, one, 0x7442)) - bias,
                            __uint_as_float(__byte_perm(u, one, 0x7443)) - bias);
    } else { // 1024 + 128 + code
        *lo = attni_sub_f16(__byte_perm(u, 0x64646464u, 0x4140), 0x64806480u);
        *hi = attni_sub_f16(__byte_perm(u, 0x64646464u, 0x4342), 0x64806480u);
    }
}

// The two int4 codes of byte j.
template <int BF> ATTNI_DEV uint32_t attni_cu_nibbles(uint32_t lo, uint32_t hi, int j) {
    uint32_t p = __byte_perm(lo, hi, (uint32_t)(j | (4 + j) << 8)) & 0x000f000fu;
    p ^= BF ? 0x43084308u : 0x64086408u; // 128 or 1024, + 8 + code
    return BF ? attni_fma_bf16(p, 0x3f803f80u, 0xc308c308u) : attni_sub_f16(p, 0x64086408u);
}

// 16 elements of raw codes of dtype T (8 bytes of int4) to pairs.
template <int BF, int T>
ATTNI_DEV void attni_cu_convert16(const uint4 &x, uint32_t out[8]) {
    const uint32_t w[4] = {x.x, x.y, x.z, x.w};
    if (T == ATTN_I4) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            out[i] = attni_cu_nibbles<BF>(w[i >> 2] & 0x0f0f0f0fu, w[i >> 2] >> 4 & 0x0f0f0f0fu,
                                          i & 3);
        return;
    }
    if (T == ATTN_I8) {
#pragma unroll
        for (int i = 0; i < 4; i++) attni_cu_int4x8<BF>(w[i], &out[2 * i], &out[2 * i + 1]);
        return;
    }
    // codes that are no numbers: e4m3 has 7f alone, e5m2 all from 7c on
    uint32_t odd = 0, add = T == ATTN_F8E4M3 ? 0x01010101u : 0x04040404u;
#pragma unroll
    for (int i = 0; i < 4; i++) odd |= ((w[i] & 0x7f7f7f7fu) + add) & 0x80808080u;
    if (odd) {
        uint32_t slow[8]; // where its address is taken
        attni_cu_convert_any<BF>((attn_dtype)T, x, slow);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = slow[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (T == ATTN_F8E4M3) // 2^120 or 2^8
            attni_cu_small4<BF, BF ? 4 : 1>(w[i], BF ? 0x7b807b80u : 0x5c005c00u, &out[2 * i],
                                            &out[2 * i + 1]);
        else                  // 2^112 or 1
            attni_cu_small4<BF, BF ? 3 : 0>(w[i], BF ? 0x77807780u : 0x3c003c00u, &out[2 * i],
                                            &out[2 * i + 1]);
}

// The four codes of a word of dtype T as pairs of f16: 0 and 1, 2 and 3 (NEXT), or 0 and 2, 1 and
// 3.
template <int T, int NEXT> ATTNI_DEV void attni_cu_pairs(uint32_t w, uint32_t out[2]) {
    if (T == ATTN_F8E5M2) {
        out[0] = __byte_perm(w, 0, NEXT ? 0x1404 : 0x2404);
        out[1] = __byte_perm(w, 0, NEXT ? 0x3424 : 0x3414);
        return;
    }
#if __CUDA_ARCH__ >= 890
    if (T == ATTN_F8E4M3) {
        if (!NEXT) w = __byte_perm(w, 0, 0x3120);
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2;"
            " cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
            : "=r"(out[0]), "=r"(out[1]) : "r"(w));
        return;
    }
#endif
    if (NEXT) w = __byte_perm(w, 0, 0x3120);
    const uint32_t nan = T == ATTN_I8 ? 0 : ((w & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t u = i ? w >> 8 : w;
        if (T == ATTN_I8) // 1024 + 128 + code
            out[i] = attni_sub_f16((u & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
        else // fields to their places, exponents 8 more; 7e00 where there is no number
            out[i] = attni_mul_f16((u << 8 & 0x80008000u) | (u << 7 & 0x3f803f80u), 0x5c005c00u) |
                     ((i ? nan >> 8 : nan) & 0x00800080u) * 0xfc;
    }
}

// Each r has four int4 codes of a token in its low half and of the next token in its high one.
// Pairs of f16 of both tokens' codes number n.
ATTNI_DEV uint32_t attni_cu_nibble_pair(uint32_t r, int n) { // 1024 + 8 + code
    return attni_sub_f16((r >> 4 * n & 0x000f000fu) ^ 0x64086408u, 0x64086408u);
}

// Raw codes of a tile (rows of n elements, `row` bytes apart) to 16-bit elements (`to` bytes apart,
// swizzled), a few pieces at a time so that their latencies overlap. D: n where it is a constant,
// else 0.
template <int BF, int D, int T>
ATTNI_DEV void attni_cu_convert_tile(const uint8_t *raw, int row, int n, uint32_t dst, int to) {
    constexpr int TURNS = D ? ATTNI_CU_BLOCK * D / 16 / ATTNI_CU_THREADS : 1;
    constexpr int LOT = TURNS < 4 ? TURNS : 4, BYTES = T == ATTN_I4 ? 8 : 16;
    const int per = D ? D / 16 : n / 16;
#pragma unroll 1
    for (int i0 = (int)threadIdx.x; i0 < ATTNI_CU_BLOCK * per; i0 += LOT * ATTNI_CU_THREADS) {
        uint4 x[LOT];
#pragma unroll
        for (int j = 0; j < LOT; j++) {
            int i = i0 + j * ATTNI_CU_THREADS, r = i / per;
            const uint8_t *src = raw + r * row + BYTES * (i - r * per);
            if (T == ATTN_I4) {
                uint2 y = *(const uint2 *)(const void *)src;
                x[j] = make_uint4(y.x, y.y, 0, 0);
            } else {
                x[j] = *(const uint4 *)(const void *)src;
            }
        }
#pragma unroll
        for (int j = 0; j < LOT; j++) {
            int i = i0 + j * ATTNI_CU_THREADS, r = i / per, c = i - r * per;
            uint32_t u[8], at = dst + (uint32_t)(r * to);
            attni_cu_convert16<BF, T>(x[j], u);
#pragma unroll
            for (int h = 0; h < 2; h++)
                attni_sts16(at + (uint32_t)(((2 * c + h) ^ (r & 7)) << 4), &u[4 * h]);
        }
    }
}

template <int BF, int D>
ATTNI_DEV void attni_cu_convert(attn_dtype t, const uint8_t *raw, int row, int n, uint32_t dst,
                                int to) {
    switch (t) {
    case ATTN_F8E4M3: attni_cu_convert_tile<BF, D, ATTN_F8E4M3>(raw, row, n, dst, to); break;
    case ATTN_F8E5M2: attni_cu_convert_tile<BF, D, ATTN_F8E5M2>(raw, row, n, dst, to); break;
    case ATTN_I8: attni_cu_convert_tile<BF, D, ATTN_I8>(raw, row, n, dst, to); break;
    default: attni_cu_convert_tile<BF, D, ATTN_I4>(raw, row, n, dst, to); break;
    }
}

// ==== >>impl-mma  Tensor cores ===================================================================
//
// BF: Q (and the tiles) are bf16, else f16. Q8: pages hold 8- or 4-bit codes, converted tile by
// tile. DK, DV: head dims, exact for 64 and 128, else the most (d says how many). R: 16-row strips
// of a warp; 0: 16 rows in all, whose tokens (scores) and output columns four warps share. FOLD:
// spans are folded in registers. MODS: scores may need more than a scale; such calls would take
// registers from the tallest tiles, which do without. Tiles lie in shared memory row by row, their
// 16-byte chunks permuted by the row's low bits, so that ldmatrix and stores meet no bank twice.

// Blocks of K and V in flight.
__host__ __device__ constexpr int attni_cu_stages(int arch, int q8, int dk, int r) {
    // sm_90 to sm_110 have 227 KB for a block; code for sm_80 runs on devices with 99 KB, too
    return arch < 80 || dk > 256 || (dk > 128 && (q8 || r)) ? 1
           : (dk > 128 || r == 2 || (dk > 64 && r == 1) ? 2 : 3) - (arch < 90 || arch >= 120);
}
__host__ __device__ constexpr int attni_cu_rows(int r) { return r ? 64 * r : 16; }
__host__ __device__ constexpr int attni_cu_stage_bytes(int q8, int dk, int dv) {
    return ATTNI_CU_BLOCK * (dk + dv) * (q8 ? 1 : 2) + (q8 ? 2 * 4 * ATTNI_CU_BLOCK : 0);
}
__host__ __device__ constexpr int attni_cu_smem_bytes(int arch, int q8, int dk, int dv, int r) {
    return ((int)sizeof(attni_cu_shared) + 127) / 128 * 128 + attni_cu_rows(r) * dk * 2 +
           attni_cu_stages(arch, q8, dk, r) * attni_cu_stage_bytes(q8, dk, dv) +
           (q8 ? ATTNI_CU_BLOCK * (dk + dv) * 2 : 0) + (r ? 0 : 16 * 128) +
           (attni_cu_stages(arch, q8, dk, r) > 1 && r == 2 && !q8 ? 7680 : 0); // tall_shared
}

// Rows of n bytes to shared memory: 16-byte chunks, up to `chunks` of them with zeros behind n.
// Tokens or chunks may be missing.
template <int STRIDE, int SWIZZLE>
ATTNI_DEV void attni_cu_load_some(uint32_t dst, const uint8_t *const *rows, int n, int chunks) {
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < ATTNI_CU_BLOCK * chunks; i += ATTNI_CU_THREADS) {
        int row = i / chunks, c = i - row * chunks, some = rows[row] && 16 * c < n;
        attni_cp_async16(dst + (uint32_t)(row * STRIDE + ((SWIZZLE ? c ^ (row & 7) : c) << 4)),
                         rows[row] + (some ? 16 * c : 0), some ? 16 : 0);
    }
}

// The same with all tokens and CHUNKS whole chunks. The addresses first, so that one latency is
// waited for and not one for each.
template <int STRIDE, int SWIZZLE, int CHUNKS>
ATTNI_DEV void attni_cu_load_whole(uint32_t dst, const uint8_t *const *rows) {
    constexpr int STEP = ATTNI_CU_THREADS / CHUNKS, TURNS = ATTNI_CU_BLOCK / STEP;
    const int row = (int)threadIdx.x / CHUNKS, c = (int)threadIdx.x % CHUNKS;
    const uint8_t *from[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) from[i] = rows[row + i * STEP];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int r = row + i * STEP;
        attni_cp_async16(dst + (uint32_t)(r * STRIDE + ((SWIZZLE ? c ^ (r & 7) : c) << 4)),
                         from[i] + 16 * c, 16);
    }
}

// The same from addresses that are no multiples of 16.
ATTNI_DEV_FAR void attni_cu_load_bytes(uint32_t dst, const uint8_t *const *rows, int n, int chunks,
                                       int stride, int swizzle) {
    for (int i = (int)threadIdx.x; i < ATTNI_CU_BLOCK * chunks; i += ATTNI_CU_THREADS) {
        int row = i / chunks, c = i - row * chunks;
        uint32_t x[4] = {0, 0, 0, 0};
        for (int b = 0; b < 16 && rows[row] && 16 * c + b < n; b++)
            x[b >> 2] |= (uint32_t)rows[row][16 * c + b] << 8 * (b & 3);
        attni_sts16(dst + (uint32_t)(row * stride + ((swizzle ? c ^ (row & 7) : c) << 4)), x);
    }
}

template <int STRIDE, int SWIZZLE, int CHUNKS>
ATTNI_DEV void attni_cu_load_tile(const attni_cu_args &a, uint32_t dst, const uint8_t *const *rows,
                                  int n, int chunks, int whole) {
    if (a.odd_rows) attni_cu_load_bytes(dst, rows, n, chunks, STRIDE, SWIZZLE);
    else if (CHUNKS && whole && n == 16 * CHUNKS)
        attni_cu_load_whole<STRIDE, SWIZZLE, CHUNKS ? CHUNKS : 2>(dst, rows);
    else attni_cu_load_some<STRIDE, SWIZZLE>(dst, rows, n, chunks);
}

template <int BF, int Q8, int DK, int DV, int R, int FOLD, int MODS> struct attni_cu_mma {
    static constexpr int ARCH =
#ifdef __CUDA_ARCH__
        __CUDA_ARCH__ / 10;
#else
        0;
#endif
    static constexpr int MT = attni_cu_rows(R), STAGES = attni_cu_stages(ARCH, Q8, DK, R);
    static constexpr int EXACT = DK == 64 || DK == 128; // else dims are run-time bounds
    static constexpr int RS = R ? R : 1;                // strips
    static constexpr int NT = R ? 8 : 2;                // 8-token tiles of scores a warp has
    static constexpr int NP = R ? DV / 16 : DV / 64;    // pairs of 8-column tiles of O it has
    static constexpr int NL = FOLD && R ? 4 : 1;        // sums kept apart, by 16 tokens
    static constexpr int QREG = !R && DK <= 256;        // Q stays in registers
    static constexpr int KROW = DK * (Q8 ? 1 : 2), VROW = DV * (Q8 ? 1 : 2);
    static constexpr int STAGE = attni_cu_stage_bytes(Q8, DK, DV);

    float o[RS][2 * NP][4], m[RS][2], l[RS][2][NL];
    float to[FOLD ? RS : 1][FOLD ? 2 * NP : 1][4], tm[RS][2], tl[RS][2]; // spans folded so far
    uint32_t qf[QREG ? DK / 16 : 1][4];
    uint32_t q, ring, conv, p;   // shared memory addresses
    int warp, lane, dk, dv;

    // Chunks of n bytes, an even number of them.
    __device__ __forceinline__ static int even(int n) { return (n + 31) / 32 * 2; }

    // Column of the first of pair j's tiles.
    __device__ __forceinline__ int column(int j) const { return R ? 16 * j : 16 * (4 * j + warp); }
    __device__ __forceinline__ int row(int rs, int half) const {
        return (R ? 16 * (warp * RS + rs) : 0) + (lane >> 2) + 8 * half;
    }

    __device__ __forceinline__ void reset(void) {
#pragma unroll
        for (int i = 0; i < RS; i++) {
#pragma unroll
            for (int j = 0; j < 2 * NP; j++) o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                m[i][h] = ATTNI_NINF;
#pragma unroll
                for (int k = 0; k < NL; k++) l[i][h][k] = 0;
            }
        }
    }

    __device__ __forceinline__ void load_q(const attni_cu_args &a, const attni_cu_shared *s) {
        const int chunks = EXACT ? DK / 8 : (dk + 15) / 16 * 2;
#pragma unroll 2
        for (int i = (int)threadIdx.x; i < MT * chunks; i += ATTNI_CU_THREADS) {
            int r = i / chunks, c = i - r * chunks, some = s->row[r].token >= 0 && 8 * c < dk;
            uint32_t to = q + (uint32_t)(r * DK * 2 + ((c ^ (r & 7)) << 4)), x[4] = {0, 0, 0, 0};
            const uint16_t *from = (const uint16_t *)a.d.q.data;
            if (some)
                from += s->row[r].token * a.d.q.stride_token +
                        s->row[r].head * a.d.q.stride_head + 8 * c;
            if (!a.odd_q) {
                attni_cp_async16(to, from, some ? 16 : 0);
                continue;
            }
            for (int e = 0; e < 8 && some; e++) x[e >> 1] |= (uint32_t)from[e] << 16 * (e & 1);
            attni_sts16(to, x);
        }
    }

    // Notes where a token lies, for load(); all threads call.
    __device__ __forceinline__ void locate(const attni_cu_args &a, attni_cu_shared *s,
                                           int32_t page, int32_t place) {
        const int i = (int)threadIdx.x;
        if (i >= ATTNI_CU_BLOCK) return;
        const int32_t head = s->task.kv_head;
        page = attni_cu_checked(a, s, page, place);
        s->k[i] = page < 0 ? NULL : a.k.data + attni_cu_offset(a.k, page, place, head);
        s->v[i] = page < 0 ? NULL : a.v.data + attni_cu_offset(a.v, page, place, head);
        if (!Q8) return;
        s->kscale[i] = page < 0 ? NULL : attni_cu_scale_at(a.k, page, place, head);
        s->vscale[i] = page < 0 ? NULL : attni_cu_scale_at(a.v, page, place, head);
    }

    // Block b, which is located, to a stage of the ring.
    __device__ __forceinline__ void load(const attni_cu_args &a, attni_cu_shared *s, int32_t b,
                                         int stage) {
        uint32_t at = ring + (uint32_t)(stage * STAGE), scale = at + ATTNI_CU_BLOCK * (KROW + VROW);
        const int32_t pos = a.gather ? -1 : b * ATTNI_CU_BLOCK; // gathered: each token by itself
        const int kn = Q8 ? attni_bits_of(a.k.dtype) * dk / 8 : 2 * dk;
        const int vn = Q8 ? attni_bits_of(a.v.dtype) * dv / 8 : 2 * dv;
        const int whole = pos >= s->task.lo && s->task.hi - pos >= ATTNI_CU_BLOCK && !s->bad;
        attni_cu_load_tile<KROW, !Q8, EXACT ? KROW / 16 : 0>(a, at, s->k, kn, even(kn), whole);
        if (Q8) scales(a, s->kscale, scale);
        attni_cp_commit();
        at += ATTNI_CU_BLOCK * KROW;
        attni_cu_load_tile<VROW, !Q8, EXACT ? VROW / 16 : 0>(a, at, s->v, vn, even(vn), whole);
        if (Q8) scales(a, s->vscale, scale + 4 * ATTNI_CU_BLOCK);
        attni_cp_commit();
    }

    __device__ __forceinline__ void scales(const attni_cu_args &a, const uint8_t *const *from,
                                           uint32_t dst) {
        const int i = (int)threadIdx.x;
        uint32_t u = 0;
        if (i >= ATTNI_CU_BLOCK) return;
        if (!a.odd_rows) {
            attni_cp_async4(dst + (uint32_t)(4 * i), from[i], from[i] ? 4 : 0);
            return;
        }
        for (int b = 0; b < 4 && from[i]; b++) u |= (uint32_t)from[i][b] << 8 * b;
        attni_sts4(dst + (uint32_t)(4 * i), u);
    }

    __device__ __forceinline__ void keep_q(void) {
        const uint32_t qx = (uint32_t)((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
        for (int ks = 0; ks < DK / 16 && QREG; ks++)
            if (EXACT || 16 * ks < dk)
                attni_ldmatrix(qf[QREG ? ks : 0],
                               q + (uint32_t)((lane & 15) * DK * 2) + (32u * ks ^ qx));
    }

    // Scores of the warp's rows against its tokens.
    __device__ __forceinline__ void scores(float c[RS][NT][4], uint32_t k) {
        // a chunk's place is its number xor the row's low bits: constants but for the lane's part
        const uint32_t qx = (uint32_t)((lane >> 4 ^ (lane & 7)) << 4);
        const uint32_t kx = (uint32_t)(((lane >> 3 & 1) ^ (lane & 7)) << 4);
        const uint32_t q0 = q + (uint32_t)(((R ? 16 * RS * warp : 0) + (lane & 15)) * DK * 2);
        const uint32_t k0 = k + (uint32_t)(((R ? 0 : 16 * warp) + (lane & 7) + (lane >> 4 << 3)) *
                                           DK * 2);
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int j = 0; j < NT; j++) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
#pragma unroll
        for (int ks = 0; ks < DK / 16; ks++) {
            uint32_t qa[RS][4];
            if (!EXACT && 16 * ks >= dk) break;
#pragma unroll
            for (int i = 0; i < RS; i++)
                if (QREG) {
#pragma unroll
                    for (int e = 0; e < 4; e++) qa[i][e] = qf[QREG ? ks : 0][e];
                } else {
                    attni_ldmatrix(qa[i], q0 + (uint32_t)(32 * i * DK) + (32u * ks ^ qx));
                }
#pragma unroll
            for (int j = 0; j < NT / 2; j++) {
                uint32_t kb[4];
                attni_ldmatrix(kb, k0 + (uint32_t)(32 * j * DK) + (32u * ks ^ kx));
#pragma unroll
                for (int i = 0; i < RS; i++) {
                    attni_mma<BF>(c[i][2 * j], qa[i], kb[0], kb[1]);
                    attni_mma<BF>(c[i][2 * j + 1], qa[i], kb[2], kb[3]);
                }
            }
        }
    }

    // Scores to logits in units of log2: scale, softcap, ALiBi, bias.
    __device__ __forceinline__ void logits(const attni_cu_args &a, attni_cu_shared *s,
                                           float c[RS][NT][4], int32_t b) {
        const attn_logits *g = &a.d.logits;
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int e = 0; e < 4 * NT; e++) {
                const attni_cu_row &x = s->row[row(i, e >> 1 & 1)];
                const int t = (R ? 0 : 16 * warp) + 8 * (e >> 2) + 2 * (lane & 3) + (e & 1);
                float y = c[i][e >> 2][e & 3] * a.scale;
                if (g->softcap > 0) {
                    float z = attni_exp2(fabsf(y) * (2 * ATTNI_LOG2E) / g->softcap);
                    z = g->softcap * (1.0f - 2.0f / (z + 1.0f));
                    y = y < 0 ? -z : y != y ? y : z;
                }
                if (g->alibi || g->bias.data) y = attni_cu_extras(a, s, x, b, t, y);
                c[i][e >> 2][e & 3] = y * ATTNI_LOG2E;
            }
    }

    __device__ __forceinline__ void hide(const attni_cu_shared *s, float c[RS][NT][4]) {
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint64_t bits = s->bits[row(i, h)] >> ((R ? 0 : 16 * warp) + 2 * (lane & 3));
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    if (!(bits >> (8 * j) & 1)) c[i][j][2 * h] = ATTNI_NINF;
                    if (!(bits >> (8 * j) & 2)) c[i][j][2 * h + 1] = ATTNI_NINF;
                }
            }
    }

    // Raises the running maximum where it has grown much, and scales what was summed. A row's own
    // scores decide, so neighbours do not matter; most blocks change nothing.
    __device__ __forceinline__ void raise(float top[RS][2]) {
        float w[RS][2];
        int change = 0;
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                w[i][h] = 1.0f;
                if (top[i][h] > m[i][h] + 8.0f) { // from -inf, too
                    w[i][h] = attni_exp2(m[i][h] - top[i][h]);
                    m[i][h] = top[i][h];
                    change = 1;
                }
            }
        if (!__any_sync(~0u, change)) return;
#pragma unroll
        for (int i = 0; i < RS; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int k = 0; k < NL; k++) l[i][h][k] *= w[i][h];
#pragma unroll
            for (int j = 0; j < 2 * NP; j++) {
                o[i][j][0] *= w[i][0], o[i][j][1] *= w[i][0];
                o[i][j][2] *= w[i][1], o[i][j][3] *= w[i][1];
            }
        }
    }

    // The rows' highest scores of a block, of the warp's tokens.
    __device__ __forceinline__ static void tops(const float c[RS][NT][4], float f,
                                                float top[RS][2]) {
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float x = fmaxf(c[i][0][2 * h], c[i][0][2 * h + 1]);
#pragma unroll
                for (int j = 1; j < NT; j++)
                    x = fmaxf(x, fmaxf(c[i][j][2 * h], c[i][j][2 * h + 1]));
                top[i][h] = attni_quad_max(x) * f;
            }
    }

    // Scores -> weights in place; sums.
    __device__ __forceinline__ void weights(const attni_cu_args &a, attni_cu_shared *s,
                                            float c[RS][NT][4]) {
        const float f = MODS && a.mods ? 1.0f : a.scale;
        float top[RS][2];
        tops(c, f, top);
        if (!R) {
            if ((lane & 3) == 0) {
                s->wide_max[warp][lane >> 2] = top[0][0];
                s->wide_max[warp][(lane >> 2) + 8] = top[0][1];
            }
            __syncthreads();
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int r = (lane >> 2) + 8 * h;
                top[0][h] = fmaxf(fmaxf(s->wide_max[0][r], s->wide_max[1][r]),
                                  fmaxf(s->wide_max[2][r], s->wide_max[3][r]));
            }
        }
        raise(top);
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float base = m[i][h] == ATTNI_NINF ? 0.0f : m[i][h];
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    float x = attni_exp2(__fmaf_rn(c[i][j][2 * h], f, -base));
                    float y = attni_exp2(__fmaf_rn(c[i][j][2 * h + 1], f, -base));
                    c[i][j][2 * h] = x;
                    c[i][j][2 * h + 1] = y;
                    l[i][h][NL == 4 ? j / 2 : 0] += x + y;
                }
            }
    }

    // Weights as the left operand of the second product: in place, or through shared memory.
    __device__ __forceinline__ void spread(const float c[NT][4]) {
        int r = lane >> 2, col = 32 * warp + 4 * (lane & 3); // bytes
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int rr = r + 8 * h, at = col + 16 * j;
                attni_sts4(p + (uint32_t)(rr * 128 + ((at >> 4 ^ (rr & 7)) << 4) + (at & 15)),
                           attni_pair<BF>(c[j][2 * h], c[j][2 * h + 1]));
            }
    }

    __device__ __forceinline__ void values(float c[RS][NT][4], uint32_t v) {
        const uint32_t vx = (uint32_t)((lane >> 4 ^ (lane & 7)) << 4);
        const uint32_t v0 = v + (uint32_t)((lane & 15) * DV * 2);
        const uint32_t p0 = p + (uint32_t)((lane & 15) * 128);
#pragma unroll
        for (int kk = 0; kk < ATTNI_CU_BLOCK / 16; kk++) {
            uint32_t pa[RS][4];
#pragma unroll
            for (int i = 0; i < RS; i++)
                if (R) {
                    constexpr int last = NT - 1; // NT is 8 here
                    int j0 = 2 * kk < last ? 2 * kk : last, j1 = j0 + 1 < last ? j0 + 1 : last;
                    pa[i][0] = attni_pair<BF>(c[i][j0][0], c[i][j0][1]);
                    pa[i][1] = attni_pair<BF>(c[i][j0][2], c[i][j0][3]);
                    pa[i][2] = attni_pair<BF>(c[i][j1][0], c[i][j1][1]);
                    pa[i][3] = attni_pair<BF>(c[i][j1][2], c[i][j1][3]);
                } else {
                    attni_ldmatrix(pa[i], p0 + (32u * kk ^ vx));
                }
#pragma unroll
            for (int j = 0; j < NP; j++) {
                uint32_t vb[4];
                if (!EXACT && column(j) >= dv) break;
                attni_ldmatrix_trans(vb, v0 + (uint32_t)(32 * kk * DV) +
                                             (2u * (uint32_t)column(j) ^ vx));
#pragma unroll
                for (int i = 0; i < RS; i++) {
                    attni_mma<BF>(o[i][2 * j], pa[i], vb[0], vb[1]);
                    attni_mma<BF>(o[i][2 * j + 1], pa[i], vb[2], vb[3]);
                }
            }
        }
    }

    // Whole sums of the rows, from all lanes (and warps).
    __device__ __forceinline__ void total(attni_cu_shared *s, float sum[RS][2]) {
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float x[4] = {0, 0, 0, 0};
#pragma unroll
                for (int k = 0; k < NL; k++) x[k] = attni_quad_sum(l[i][h][k]);
                sum[i][h] = NL == 4 ? (x[0] + x[1]) + (x[2] + x[3]) : x[0];
            }
        if (R) return;
        if ((lane & 3) == 0) {
            s->wide_sum[warp][lane >> 2] = sum[0][0];
            s->wide_sum[warp][(lane >> 2) + 8] = sum[0][1];
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = (lane >> 2) + 8 * h;
            sum[0][h] = (s->wide_sum[0][r] + s->wide_sum[1][r]) +
                        (s->wide_sum[2][r] + s->wide_sum[3][r]);
        }
        __syncthreads();
    }

    // A row's state as a partial.
    __device__ __forceinline__ void leave(const attni_cu_args &a, const attni_cu_shared *s,
                                          const float x[2 * NP][4], int i, int h, float mm,
                                          float ll, int32_t slot) {
        int r = row(i, h);
        if (s->row[r].token < 0) return;
        int64_t at = attni_cu_partial(a, s->task, r, s->row[r], slot);
        if ((lane & 3) == 0 && (R || warp == 0))
            __stcg((float2 *)a.partial_ml + at, make_float2(mm, ll));
#pragma unroll
        for (int j = 0; j < 2 * NP; j++) {
            int col = column(j / 2) + 8 * (j & 1) + 2 * (lane & 3);
            if (EXACT || col < dv)
                __stcg((float2 *)(a.partial_o + at * dv + col),
                       make_float2(x[j][2 * h], x[j][2 * h + 1]));
        }
    }

    // A row's state as its result.
    __device__ __forceinline__ void finish(const attni_cu_args &a, const attni_cu_shared *s,
                                           const float x[2 * NP][4], int i, int h, float mm,
                                           float ll) {
        const attni_cu_row &y = s->row[row(i, h)];
        float lse, f;
        if (y.token < 0) return;
        f = attni_cu_close(a, y.head, mm, ll, &lse);
        if (a.d.lse && (lane & 3) == 0 && (R || warp == 0))
            a.d.lse[(int64_t)y.token * a.d.n_heads + y.head] = lse;
        uint32_t *out = (uint32_t *)attni_cu_o(a, y.token, y.head);
        int none = ll == 0.0f, bf = a.d.o.dtype == ATTN_BF16;
#pragma unroll
        for (int j = 0; j < 2 * NP; j++) {
            int col = column(j / 2) + 8 * (j & 1) + 2 * (lane & 3);
            float u = none ? 0 : x[j][2 * h] * f, v = none ? 0 : x[j][2 * h + 1] * f;
            if (!EXACT && col >= dv) continue;
            if (a.odd_o) attni_cu_put2(a, out, col, u, v);
            else out[col / 2] = bf ? attni_pair<1>(u, v) : attni_pair<0>(u, v);
        }
    }

    // A span is through: fold it, or leave it, or (nothing comes behind) write the result.
    __device__ __forceinline__ void close_span(const attni_cu_args &a, attni_cu_shared *s,
                                               int32_t span, int more) {
        const int32_t slots = s->task.slots;
        float sum[RS][2];
        total(s, sum);
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (FOLD && slots != 2) {
                    float w0, w1;
                    int empty = m[i][h] == ATTNI_NINF && sum[i][h] == 0.0f;
                    attni_cu_fold(&tm[i][h], &tl[i][h], m[i][h], sum[i][h], &w0, &w1);
#pragma unroll
                    for (int j = 0; j < 2 * NP && FOLD; j++)
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) {
                            float y = attni_cu_blend(to[i][j][e], w0, o[i][j][e], w1);
                            o[i][j][e] = to[i][j][e] = empty ? to[i][j][e] : y;
                        }
                    m[i][h] = tm[i][h];
                    sum[i][h] = tl[i][h];
                    if (more) continue;
                }
                if (slots)
                    leave(a, s, o[i], i, h, m[i][h], sum[i][h],
                          slots == 2 ? span - s->task.span0 : 0);
                else finish(a, s, o[i], i, h, m[i][h], sum[i][h]);
            }
        reset();
    }

    // V of tokens that no row sees must not matter, NaN neither.
    __device__ __forceinline__ void blank(const attni_cu_shared *s, uint32_t v) {
        const uint32_t zero[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int i = (int)threadIdx.x; i < ATTNI_CU_BLOCK * (DV / 8); i += ATTNI_CU_THREADS)
            if (!(s->seen >> (i / (DV / 8)) & 1)) attni_sts16(v + (uint32_t)(16 * i), zero);
        __syncthreads();
    }

    __device__ __forceinline__ void run(const attni_cu_args &a, attni_cu_shared *s,
                                        uint8_t *smem) {
        constexpr int AHEAD = STAGES - 1;
        const attni_cu_task &w = s->task;
        uint8_t *tiles = smem + (sizeof(attni_cu_shared) + 127) / 128 * 128;
        int32_t queue[STAGES], b, end = w.end_block, span = -1;
        const int32_t shift = w.span_shift;
        int32_t page, place;
        int stage = 0, i;
        warp = (int)threadIdx.x >> 5;
        lane = (int)threadIdx.x & 31;
        dk = EXACT ? DK : a.d.head_dim;
        dv = EXACT ? DV : a.d.v_head_dim;
        q = attni_smem(tiles);
        ring = q + MT * DK * 2;
        conv = ring + STAGES * STAGE;
        p = conv + (Q8 ? ATTNI_CU_BLOCK * (DK + DV) * 2 : 0);
        load_q(a, s);
        reset();
#pragma unroll
        for (int x = 0; x < RS; x++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                tm[x][h] = ATTNI_NINF, tl[x][h] = 0;
#pragma unroll
                for (int j = 0; j < 2 * NP && FOLD; j++)
                    to[x][j][2 * h] = to[x][j][2 * h + 1] = 0;
            }
        b = attni_cu_next(a, s, w, attni_cu_start(a, w));
        page = attni_cu_page_of(a, s, b, (int)threadIdx.x, &place);
        locate(a, s, page, place);
#pragma unroll
        for (i = 0; i < STAGES; i++) queue[i] = -1; // the first turns only load
#pragma unroll 1
        for (;;) {
            // b is what is loaded now, AHEAD blocks before its turn
            queue[AHEAD] = b;
            if (AHEAD == 0) __syncthreads();
            else {
                attni_cp_wait<AHEAD ? 2 * AHEAD - 1 - Q8 : 0>(); // quantised: V as well
                __syncthreads();
            }
            const int32_t cur = queue[0], more = cur < end;
            if (b < end) load(a, s, b, stage ? stage - 1 : AHEAD);
            else {
                attni_cp_commit();
                attni_cp_commit();
            }
            if (AHEAD == 0) {
                attni_cp_wait<1 - Q8>();
                __syncthreads();
            }
            if (b < end) b = attni_cu_next(a, s, w, b + 1);
            page = attni_cu_page_of(a, s, b, (int)threadIdx.x, &place);
            stage = stage == AHEAD ? 0 : stage + 1;
#pragma unroll
            for (i = 0; i < AHEAD; i++) queue[i] = queue[i + 1];
            if (cur < 0) { // nothing to compute yet
                __syncthreads();
                locate(a, s, page, place);
                continue;
            }
            const int32_t next = more ? cur >> shift : w.span1;
            if (!more || next != span) {
                if (w.slots == 2 ? span >= 0 : !more || (FOLD && span >= 0))
                    close_span(a, s, span, more);
                if (w.slots == 2)
                    attni_cu_empty_spans(a, s, span < 0 ? w.span0 : span + 1, next);
                if (!more) break;
                span = next;
                keep_q();
            }
            const int at = stage ? stage - 1 : AHEAD; // of cur

            float c[RS][NT][4];
            uint32_t kt = ring + (uint32_t)(at * STAGE), vt = kt + ATTNI_CU_BLOCK * KROW;
            uint8_t *raw = tiles + MT * DK * 2 + at * STAGE;
            float *scale = (float *)(void *)(raw + ATTNI_CU_BLOCK * (KROW + VROW));
            int full = attni_cu_full(a, s, w, cur);
            if (Q8) { // one copy of the code for both
                kt = conv;
                vt = conv + ATTNI_CU_BLOCK * DK * 2;
                if (DK == DV) {
#pragma unroll 1
                    for (i = 0; i < 2; i++)
                        attni_cu_convert<BF, EXACT ? DK : 0>(
                            i ? a.v.dtype : a.k.dtype, raw + i * ATTNI_CU_BLOCK * KROW, KROW,
                            i ? dv : dk, i ? vt : kt, DK * 2);
                } else {
                    attni_cu_convert<BF, 0>(a.k.dtype, raw, KROW, dk, kt, DK * 2);
                    attni_cu_convert<BF, 0>(a.v.dtype, raw + ATTNI_CU_BLOCK * KROW, VROW, dv, vt,
                                            DV * 2);
                }
                __syncthreads();
            }
            if (!full) attni_cu_mask_rows(a, s, cur);
            scores(c, kt);
            if (Q8) {
#pragma unroll
                for (int x = 0; x < RS; x++)
#pragma unroll
                    for (int e = 0; e < 4 * NT; e++)
                        c[x][e >> 2][e & 3] *= scale[(R ? 0 : 16 * warp) + 8 * (e >> 2) +
                                                     2 * (lane & 3) + (e & 1)];
            }
            if (MODS && a.mods) logits(a, s, c, cur);
            if (!full) hide(s, c);
            weights(a, s, c);
            if (Q8) {
#pragma unroll
                for (int x = 0; x < RS; x++)
#pragma unroll
                    for (int e = 0; e < 4 * NT; e++) {
                        int t = (R ? 0 : 16 * warp) + 8 * (e >> 2) + 2 * (lane & 3) + (e & 1);
                        float f = scale[ATTNI_CU_BLOCK + t]; // NaN where nobody looks, perhaps
                        c[x][e >> 2][e & 3] *= full || (s->seen >> t & 1) ? f : 0.0f;
                    }
            } else {
                attni_cp_wait<2 * AHEAD>();
            }
            if (!R) spread(c[0]);
            __syncthreads();
            if (!full && a.sparse) blank(s, vt);
            values(c, vt);
            locate(a, s, page, place);
        }
        attni_cp_wait<0>();
    }
};

// What tall tiles visit, found for many blocks at once: block numbers and flags, or a mark.
#define ATTNI_CU_END (-1)
#define ATTNI_CU_MORE (-2)        /* the queue is to be filled anew */
#define ATTNI_CU_AT 0x01ffffff
#define ATTNI_CU_COPY 0x02000000  /* as PIECE, from the copy of a page */
#define ATTNI_CU_WHOLE 0x04000000 /* each of its tokens is read */
#define ATTNI_CU_STAGE 0x08000000 /* where it lies in shared memory */
#define ATTNI_CU_FULL 0x10000000  /* every row sees all of it */
#define ATTNI_CU_KEPT 0x20000000  /* the sparse terms of all rows keep all of it */
#define ATTNI_CU_PIECE 0x40000000 /* all of it is read, from one piece of memory */

struct attni_cu_tall_shared : attni_cu_shared {
    int32_t queue[attni_cu_shared::SCAN + 1];
    uint32_t k16[attni_cu_shared::SCAN], v16[attni_cu_shared::SCAN]; // pieces, 16 bytes each, from
                              // page 0 or slot 0 on
    attni_cu_task ahead;      // the one that comes next
    uint32_t q16[ATTNI_CU_ROWS], o16[ATTNI_CU_ROWS]; // where rows lie, 16 bytes each; ~0: nowhere
    int32_t queue_end, n_tasks; // first block behind
    int32_t queued[ATTNI_CU_THREADS / 32];
};

static_assert(sizeof(attni_cu_tall_shared) + 127 <= sizeof(attni_cu_shared) + 7680,
              "attni_cu_smem_bytes counts on it");
static_assert(attni_cu_smem_bytes(90, 0, 128, 128, 2) <= 228 * 1024 / 2 - 1024,
              "two blocks on a multiprocessor");

// Do rows of a block lie one stride apart, which 32 bits count?
ATTNI_DEV int attni_cu_flat(const attni_cu_args &a, const attni_cu_task &w) {
    return a.pieces && (!a.d.kv.page_table || w.pos0 % ATTNI_CU_BLOCK == 0);
}

// Entry i of the queue: block number at, which lies at a block of positions: its flags, and where
// that is.
ATTNI_DEV void attni_cu_note(const attni_cu_args &a, attni_cu_tall_shared *s, int i, int32_t at,
                             int32_t block, int32_t page, int flat, int kept) {
    const attni_cu_task &w = s->task;
    const int32_t pos = block * ATTNI_CU_BLOCK;
    // where lists are gathered, rows' runs are those of their lists
    int32_t flags = kept && !a.gather ? ATTNI_CU_KEPT : 0, j = pos - w.pos0;
    if (kept && block >= w.full_block && block < w.full_end) flags |= ATTNI_CU_FULL;
    if (pos >= w.lo && w.hi - pos >= ATTNI_CU_BLOCK &&
        (!a.gather || pos >= s->recent || a.d.mask.keep_sink - pos >= ATTNI_CU_BLOCK))
        flags |= ATTNI_CU_WHOLE;
    if (flat) {
        page = attni_cu_checked(a, static_cast<attni_cu_shared *>(s), page, 0);
        if (a.d.kv.page_table) j &= a.d.kv.page_tokens - 1;
        const int copy = page >= a.k.first_copy;
        if (page >= 0 && flags & ATTNI_CU_WHOLE) flags |= copy ? ATTNI_CU_COPY : ATTNI_CU_PIECE;
        if (copy) page -= a.k.first_copy;
        const int64_t k = page * a.k.page_bytes + attni_cu_row_offset(a.k, j, w.kv_head);
        const int64_t v = page * a.v.page_bytes + attni_cu_row_offset(a.v, j, w.kv_head);
        s->k16[i] = (uint32_t)(k / 16), s->v16[i] = (uint32_t)(v / 16);
    }
    s->queue[i] = at | flags;
}

// As attni_cu_enqueue where lists are gathered, of one span then: entries from number `from` on of
// those that the task has.
ATTNI_DEV_FAR void attni_cu_enqueue_listed(const attni_cu_args &a, attni_cu_tall_shared *s,
                                           int32_t from, int flat) {
    const attni_cu_task &w = s->task;
    const attni_cu_kept &k = s->kept;
    attni_cu_shared &shared = *s;
    const int32_t sinks = k.sink1 - k.sink0, window = attni_max32(k.window1 - k.window0, 0);
    const int32_t all = w.end_block ? s->n_listed + sinks + window : 0;
    const int32_t n = attni_min32(all - from, attni_cu_shared::SCAN);
    for (int i = (int)threadIdx.x; i < n; i += ATTNI_CU_THREADS) {
        int32_t b = from + i, at, page = w.seq;
        if (b >= s->n_listed) {
            b += b - s->n_listed < sinks ? k.sink0 : k.window0 - sinks;
            (void)attni_cu_group_of(&shared, b, &at);
            const int32_t j = at * ATTNI_CU_BLOCK - w.pos0;
            if (flat && a.d.kv.page_table && at * ATTNI_CU_BLOCK < w.hi)
                page = __ldg(attni_cu_page_at(a, w.seq, attni_max32(j, 0) >> a.page_shift));
            attni_cu_note(a, s, i, b, at, page, flat && j >= 0, attni_cu_all_kept(a, &shared, at));
            continue;
        }
        const int g = attni_cu_group_of(&shared, b, &at);
        int32_t flags = ATTNI_CU_KEPT;
        if (at >= s->all_lo && s->all_hi - at >= ATTNI_CU_BLOCK) flags |= ATTNI_CU_FULL;
        if (attni_cu_listed(a, &shared, g, at) >= w.lo) {
            const int32_t last = attni_cu_listed(a, &shared, g, at + ATTNI_CU_BLOCK - 1);
            if (last >= 0 && last < w.hi) flags |= ATTNI_CU_WHOLE;
        }
        s->queue[i] = b | flags;
    }
    if (threadIdx.x == 0) {
        s->queue[attni_max32(n, 0)] = from + n < all ? ATTNI_CU_MORE : ATTNI_CU_END;
        s->queue_end = from + n;
    }
    __syncthreads();
}

// How many of the block's threads' bits lie before the thread's own, and of all.
ATTNI_DEV void attni_cu_rank(attni_cu_tall_shared *s, uint32_t bits, uint32_t *before, int32_t *n) {
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    int32_t mine = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t votes = __ballot_sync(~0u, bits >> i & 1);
        *before += (uint32_t)__popc(votes & ((1u << lane) - 1));
        mine += __popc(votes);
    }
    if (lane == 0) s->queued[warp] = mine;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ATTNI_CU_THREADS / 32; i++) {
        if (i < warp) *before += (uint32_t)s->queued[i];
        *n += s->queued[i];
    }
}

// How many of the blocks [b, e) lie in what the task reads.
ATTNI_DEV int32_t attni_cu_count(const attni_cu_task &w, int32_t b, int32_t e) {
    e = attni_min32(e, w.end_block);
    return attni_max32(e - b, 0) -
           attni_max32(attni_min32(e, w.lo_block) - attni_max32(b, w.sink_block), 0);
}

// Fills the queue with what is visited of SCAN blocks from b on, or of those behind if that is
// nothing. All threads call, four blocks each, behind a barrier.
ATTNI_DEV void attni_cu_enqueue(const attni_cu_args &a, attni_cu_tall_shared *s, int32_t b) {
    const attni_cu_task &w = s->task;
    const int flat = attni_cu_flat(a, w);
    if (a.gather) {
        attni_cu_enqueue_listed(a, s, b, flat);
        return;
    }
    for (;; b = s->queue_end) {
        int32_t n = 0;
        if (b >= w.sink_block && b < w.lo_block) b = w.lo_block;
        const int32_t b0 = b / 4 * 4 + 4 * (int32_t)threadIdx.x;
        uint32_t some = 15, all = 15, before = 0;
        if (a.sparse && b < w.end_block) {
            attni_cu_scan(a, static_cast<attni_cu_shared *>(s), b);
            some = s->any[threadIdx.x / 8] >> 4 * (threadIdx.x % 8);
            all = s->all[threadIdx.x / 8] >> 4 * (threadIdx.x % 8);
        }
        int32_t page[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t at = b0 + i;
            if (at < b || at >= w.end_block || (at >= w.sink_block && at < w.lo_block))
                some &= ~(1u << i);
            page[i] = w.seq;
            if ((some >> i & 1) && flat && a.d.kv.page_table)
                page[i] = __ldg(a.d.kv.page_table + w.seq * a.d.kv.page_table_stride +
                                ((at * ATTNI_CU_BLOCK - w.pos0) >> a.page_shift));
        }
        const int32_t end = b / 4 * 4 + attni_cu_shared::SCAN;
        if (a.sparse) attni_cu_rank(s, some, &before, &n);
        else {
            before = (uint32_t)attni_cu_count(w, b, b0);
            n = attni_cu_count(w, b, end);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (some >> i & 1)
                attni_cu_note(a, s, (int)before++, b0 + i, b0 + i, page[i], flat, all >> i & 1);
        const int over = end >= w.end_block;
        if (threadIdx.x == 0) {
            s->queue[n] = over ? ATTNI_CU_END : ATTNI_CU_MORE;
            s->queue_end = end;
        }
        __syncthreads();
        if (n || over) return;
    }
}

ATTNI_DEV_FAR void attni_cu_enqueue_more(const attni_cu_args &a, attni_cu_tall_shared *s) {
    const int32_t b = s->queue_end;
    __syncthreads(); // the queue before has been read
    attni_cu_enqueue(a, s, b);
}

// Notes where the tokens of block b lie that is in no one piece; buf: one is written, one read.
ATTNI_DEV void attni_cu_locate(const attni_cu_args &a, attni_cu_shared *s, int32_t b, int buf) {
    const int i = (int)threadIdx.x;
    const int32_t head = s->task.kv_head;
    if (i >= ATTNI_CU_BLOCK) return;
    int32_t place, page = attni_cu_page(a, s->task, attni_cu_position(a, s, b, i), &place);
    page = attni_cu_checked(a, s, page, place);
    (buf ? s->kscale : s->k)[i] =
        page < 0 ? NULL : a.k.data + attni_cu_offset(a.k, page, place, head);
    (buf ? s->vscale : s->v)[i] =
        page < 0 ? NULL : a.v.data + attni_cu_offset(a.v, page, place, head);
}

// Rows of K or V from one piece of memory.
template <int CHUNKS>
ATTNI_DEV void attni_cu_fetch_piece(uint32_t dst, const uint8_t *from, int32_t stride) {
    constexpr int STEP = ATTNI_CU_THREADS / CHUNKS, TURNS = ATTNI_CU_BLOCK / STEP;
    const int r = (int)threadIdx.x / CHUNKS, c = (int)threadIdx.x % CHUNKS;
    dst += (uint32_t)(r * CHUNKS * 16 + ((c ^ (r & 7)) << 4));
    from += r * stride + 16 * c;
    stride *= STEP;
#pragma unroll
    for (int i = 0; i < TURNS; i++, from += stride)
        attni_cp_async16(dst + (uint32_t)(i * STEP * CHUNKS * 16), from, 16);
}
// From copies of pages: apart, so that others do not pay for it.
template <int DK, int DV>
ATTNI_DEV_FAR void attni_cu_fetch_copy(const attni_cu_args &a, uint32_t kf, uint32_t vf, uint32_t k,
                                       uint32_t v) {
    attni_cu_fetch_piece<DK / 8>(k, a.k.copies + (uint64_t)kf * 16, (int32_t)a.k.token_bytes);
    attni_cu_fetch_piece<DV / 8>(v, a.v.copies + (uint64_t)vf * 16, (int32_t)a.v.token_bytes);
}

// What there is of such a block, zeros elsewhere.
template <int DK, int DV>
ATTNI_DEV_FAR void attni_cu_fetch_some(const attni_cu_args &a, const attni_cu_shared *s, int buf,
                                       uint32_t k, uint32_t v) {
    attni_cu_load_tile<DK * 2, 1, 0>(a, k, buf ? s->kscale : s->k, 2 * DK, DK / 8, 0);
    attni_cu_load_tile<DV * 2, 1, 0>(a, v, buf ? s->vscale : s->v, 2 * DV, DV / 8, 0);
}

// Reads task i, if there are so many, to where the next one waits. A warp calls, lane 0 knows i.
ATTNI_DEV void attni_cu_look_ahead(const attni_cu_args &a, attni_cu_tall_shared *s, int32_t i) {
    const int lane = (int)threadIdx.x & 31;
    i = __shfl_sync(~0u, i, 0);
    if (lane == 0) s->next = i;
    if (i >= s->n_tasks) return;
    const int *from = (const int *)(a.task + (a.last_task - i));
#pragma unroll
    for (int r = lane; r < (int)(sizeof(attni_cu_task) / 4); r += 32)
        ((int *)&s->ahead)[r] = from[r];
}

// The task that waits becomes the one at hand; its rows. False: there is none. All threads call.
ATTNI_DEV int attni_cu_take(const attni_cu_args &a, attni_cu_tall_shared *s) {
    const int r = (int)threadIdx.x;
    __syncthreads(); // the task before is done with s
    if (s->next >= s->n_tasks) return 0;
    if (r < (int)(sizeof(attni_cu_task) / 4)) ((int *)&s->task)[r] = ((const int *)&s->ahead)[r];
    if (r == 0) attni_cu_fresh(s);
    __syncthreads();
    const attni_cu_row x = attni_cu_get_row(a, s->task, r);
    s->row[r] = x;
    s->q16[r] = x.token < 0 ? ~0u : attni_cu_row16(a.d.q, x);
    s->o16[r] = x.token < 0 ? ~0u : attni_cu_row16(a.d.o, x);
    __syncthreads();
    if (s->task.slots || a.sparse) attni_cu_settle(a, static_cast<attni_cu_shared *>(s));
    return 1;
}

// Tall tiles over 16-bit pages, on devices whose shared memory takes two stages: the whole of the
// next block is under way while one is at work, so a block costs one barrier; what a thread needs
// of a page is one pointer where blocks lie in one piece; exponentials run between the matrix
// products of the keys before.
template <int BF, int DK, int DV, int R>
struct attni_cu_tall : attni_cu_mma<BF, 0, DK, DV, R, 0, 0> {
    typedef attni_cu_mma<BF, 0, DK, DV, R, 0, 0> base;
    using base::l;
    using base::lane;
    using base::m;
    using base::o;
    using base::q;
    using base::ring;
    using base::row;
    using base::warp;
    static constexpr int KEEP = DK <= 64; // Q stays in registers
    static constexpr int ONES = DK > 64;  // rows are summed by a product: pays where it is rare
    uint32_t queue, qf[R][KEEP ? DK / 16 : 1][4];
    float sum[R][4];          // of the rows, columns as of an accumulator
    static constexpr int RS = R, NT = 8, NP = DV / 16;
    static constexpr int FITS = base::EXACT && DK == DV && base::STAGES > 1;

    // Entry x of the queue to a stage; kf, vf: where it lies, if in one piece.
    __device__ __forceinline__ void fetch(const attni_cu_args &a, attni_cu_tall_shared *s,
                                          int32_t x, uint32_t kf, uint32_t vf, int stage) const {
        const uint32_t k = ring + (uint32_t)(stage * base::STAGE);
        const uint32_t v = k + ATTNI_CU_BLOCK * DK * 2;
        if (x >= ATTNI_CU_PIECE) {
            attni_cu_fetch_piece<DK / 8>(k, a.k.data + (uint64_t)kf * 16, (int32_t)a.k.token_bytes);
            attni_cu_fetch_piece<DV / 8>(v, a.v.data + (uint64_t)vf * 16, (int32_t)a.v.token_bytes);
            return;
        }
        if (x & ATTNI_CU_COPY) {
            attni_cu_fetch_copy<DK, DV>(a, kf, vf, k, v);
            return;
        }
        if (x & ATTNI_CU_WHOLE && !s->bad && !a.odd_rows) {
            attni_cu_load_whole<DK * 2, 1, DK / 8>(k, stage ? s->kscale : s->k);
            attni_cu_load_whole<DV * 2, 1, DV / 8>(v, stage ? s->vscale : s->v);
        } else attni_cu_fetch_some<DK, DV>(a, s, stage, k, v);
    }

    // Q's part in registers, where there is room.
    __device__ __forceinline__ void keep_q(void) {
        const uint32_t qx = (uint32_t)((lane >> 4 ^ (lane & 7)) << 4);
        const uint32_t q0 = q + (uint32_t)((16 * RS * warp + (lane & 15)) * DK * 2);
#pragma unroll
        for (int n = 0; n < DK / 16 * RS && KEEP; n++)
            attni_ldmatrix(qf[n % RS][KEEP ? n / RS : 0],
                           q0 + (uint32_t)(32 * (n % RS) * DK) + (32u * (n / RS) ^ qx));
    }

    // As base's, from that: 32 keys and then 32 more, so that maxima are found meanwhile.
    __device__ __forceinline__ void scores(float c[RS][NT][4], uint32_t k) {
        const uint32_t kx = (uint32_t)(((lane >> 3 & 1) ^ (lane & 7)) << 4);
        const uint32_t k0 = k + (uint32_t)(((lane & 7) + (lane >> 4 << 3)) * DK * 2);
        uint32_t kb[2][4];
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int j = 0; j < NT; j++) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
        attni_ldmatrix(kb[0], k0 + kx);
#pragma unroll
        for (int t = 0; t < DK / 4; t++) { // half, 16 dims, 16 keys
            const int half = t / (DK / 8), ks = t / 2 % (DK / 16), j = 2 * half + t % 2, u = t + 1;
            if (u < DK / 4)
                attni_ldmatrix(kb[u & 1],
                               k0 + (uint32_t)(32 * (2 * (u / (DK / 8)) + u % 2) * DK) +
                                   (32u * (u / 2 % (DK / 16)) ^ kx));
#pragma unroll
            for (int i = 0; i < RS; i++) {
                attni_mma<BF>(c[i][2 * j], qf[i][KEEP ? ks : 0], kb[t & 1][0], kb[t & 1][1]);
                attni_mma<BF>(c[i][2 * j + 1], qf[i][KEEP ? ks : 0], kb[t & 1][2], kb[t & 1][3]);
            }
        }
    }

    // Raises the rows' maxima as far as the scores demand.
    __device__ __forceinline__ void maxima(const attni_cu_args &a, const float c[RS][NT][4]) {
        float top[RS][2];
        base::tops(c, a.scale, top);
        if (ONES) {
#pragma unroll
            for (int i = 0; i < RS; i++) l[i][0][0] = sum[i][0], l[i][1][0] = sum[i][2];
        }
        base::raise(top);
        if (ONES) {
#pragma unroll
            for (int i = 0; i < RS; i++) sum[i][0] = l[i][0][0], sum[i][2] = l[i][1][0];
        }
    }

    // Nothing is seen yet. A maximum is finite in here, so that differences with it are numbers.
    __device__ __forceinline__ void clear(void) {
        base::reset();
#pragma unroll
        for (int i = 0; i < RS; i++) {
            m[i][0] = m[i][1] = least();
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
        }
    }
    __device__ __forceinline__ static float least(void) { return __int_as_float((int)0xff7fffff); }

    // The state as others know it.
    __device__ __forceinline__ void settle(void) {
#pragma unroll
        for (int i = 0; i < 2 * RS; i++) {
            float &x = m[i / 2][i & 1];
            x = x == least() ? ATTNI_NINF : x;
            if (ONES) l[i / 2][i & 1][0] = sum[i / 2][2 * (i & 1)];
        }
    }

    // Weights n of the 4 RS pairs that a lane has of 16 keys.
    __device__ __forceinline__ void weigh(const float c[RS][NT][4], float f, int kk, int n,
                                          uint32_t pa[RS][4]) {
        const int i = n / 4, h = n & 1;
        const float *y = &c[i][2 * kk + (n >> 1 & 1)][2 * h];
        const float u = attni_exp2(__fmaf_rn(y[0], f, -m[i][h]));
        const float v = attni_exp2(__fmaf_rn(y[1], f, -m[i][h]));
        if (!ONES) l[i][h][0] += u + v;
        pa[i][n & 3] = attni_pair<BF>(u, v);
    }

    // O += weights x V, the weights of 16 keys being made between the products of those before.
    __device__ __forceinline__ void values(const attni_cu_args &a, const float c[RS][NT][4],
                                           uint32_t v) {
        constexpr int STEPS = ATTNI_CU_BLOCK / 16 * NP, EACH = 4 * RS / NP ? 4 * RS / NP : 1;
        const uint32_t vx = (uint32_t)((lane >> 4 ^ (lane & 7)) << 4);
        const uint32_t v0 = v + (uint32_t)((lane & 15) * DV * 2);
        uint32_t pa[2][RS][4], vb[2][4];
        const uint32_t one = lane < 4 ? BF ? 0x3f803f80u : 0x3c003c00u : 0; // column 0
        attni_ldmatrix_trans(vb[0], v0 + vx);
#pragma unroll
        for (int n = 0; n < 4 * RS; n++) weigh(c, a.scale, 0, n, pa[0]);
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            const int kk = t / NP, j = t % NP, u = t + 1;
            if (u < STEPS)
                attni_ldmatrix_trans(vb[u & 1], v0 + (uint32_t)(32 * (u / NP) * DV) +
                                                    (32u * (uint32_t)(u % NP) ^ vx));
#pragma unroll
            for (int n = EACH * j; n < EACH * (j + 1) && n < 4 * RS && t + NP < STEPS; n++)
                weigh(c, a.scale, kk + 1, n, pa[(kk + 1) & 1]);
#pragma unroll
            for (int i = 0; i < RS; i++) {
                attni_mma<BF>(o[i][2 * j], pa[kk & 1][i], vb[t & 1][0], vb[t & 1][1]);
                attni_mma<BF>(o[i][2 * j + 1], pa[kk & 1][i], vb[t & 1][2], vb[t & 1][3]);
                if (ONES && j == 0) attni_mma<BF>(sum[i], pa[kk & 1][i], one, one);
            }
        }
    }

    // What row (i, h) sees of block b. open: the masks of all rows lie in s->bits.
    __device__ __forceinline__ uint64_t seen(const attni_cu_shared *s, int32_t b, int open, int i,
                                             int h) const {
        const attni_cu_row &x = s->row[row(i, h)];
        return open ? s->bits[row(i, h)] : attni_cu_closed_bits(x.lo, x.hi, b * ATTNI_CU_BLOCK);
    }

    __device__ __forceinline__ void hide(const attni_cu_shared *s, float c[RS][NT][4], int32_t b,
                                         int open) const {
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint64_t bits = seen(s, b, open, i, h) >> 2 * (lane & 3);
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    if (!(bits >> (8 * j) & 1)) c[i][j][2 * h] = ATTNI_NINF;
                    if (!(bits >> (8 * j) & 2)) c[i][j][2 * h + 1] = ATTNI_NINF;
                }
            }
    }

    // A block that rows see in part: their masks, and whether the warp's rows see any of it (2: all
    // of it). Masks that are one run of keys where the sparse terms keep the block (kept) need no
    // exchange.
    __device__ __forceinline__ int look(const attni_cu_args &a, attni_cu_shared *s, int32_t b,
                                        int kept, int *open, uint32_t v) {
        const int r = 16 * RS * warp + lane % (16 * RS), pos = b * ATTNI_CU_BLOCK;
        const attni_cu_row &x = s->row[r];
        *open = !(a.run && kept);
        if (*open && a.gather) { // what no row sees was not read, and a warp's rows are its own
            attni_cu_mask_any(a, s, b);
            __syncwarp();
        } else if (*open) {
            attni_cu_mask_rows(a, s, b);
            if (s->seen != ~(uint64_t)0) base::blank(s, v);
        } else if (__all_sync(~0u, x.lo <= pos && x.hi - pos >= 64)) return 2;
        return __any_sync(~0u, *open ? s->bits[r] != 0
                                     : attni_max32(x.lo, pos) < attni_min32(x.hi - pos, 64) + pos);
    }

    // The rows' results, through the warp's part of Q so that stores are wide. A lane closes one
    // of the rows that four lanes share.
    __device__ __forceinline__ void write(const attni_cu_args &a, const attni_cu_tall_shared *s) {
        const int bf = BF || a.d.o.dtype == ATTN_BF16, mine = lane & 3;
        float sums[RS][2];
        base::total((attni_cu_shared *)NULL, sums);
        float mm = m[0][0], ll = sums[0][0];
#pragma unroll
        for (int n = 1; n < 2 * RS; n++)
            if (mine == n) mm = m[n / 2][n & 1], ll = sums[n / 2][n & 1];
        const attni_cu_row &y = s->row[row(mine / 2, mine & 1)];
        float lse, close = attni_cu_close(a, y.head, mm, ll, &lse);
        if (a.d.lse && mine < 2 * RS && y.token >= 0)
            a.d.lse[(int64_t)y.token * a.d.n_heads + y.head] = lse;
        if (__any_sync(~0u, ll == 0.0f)) { // what was summed may be NaN
#pragma unroll
            for (int i = 0; i < RS; i++)
#pragma unroll
                for (int j = 0; j < 2 * NP; j++) {
                    if (sums[i][0] == 0.0f) o[i][j][0] = o[i][j][1] = 0;
                    if (sums[i][1] == 0.0f) o[i][j][2] = o[i][j][3] = 0;
                }
        }
        __syncwarp(); // Q has been read
        const uint32_t to = q + (uint32_t)(row(0, 0) * DV * 2 + 4 * mine);
        const uint32_t rx = (uint32_t)((lane >> 2 & 7) << 4);
#pragma unroll
        for (int i = 0; i < RS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float f = __shfl_sync(~0u, close, (lane & ~3) + 2 * i + h);
#pragma unroll
                for (int j = 0; j < 2 * NP; j++) {
                    const float u = o[i][j][2 * h] * f, v = o[i][j][2 * h + 1] * f;
                    attni_sts4(to + (uint32_t)((16 * i + 8 * h) * DV * 2) + (16u * j ^ rx),
                               bf ? attni_pair<1>(u, v) : attni_pair<0>(u, v));
                }
            }
        __syncwarp();
        if (a.wide_o) store_rows(a, s);
        else store_any(a, s);
    }

    __device__ __forceinline__ void store_rows(const attni_cu_args &a,
                                               const attni_cu_tall_shared *s) const {
        constexpr int CHUNKS = DV / 8, STEP = 32 / CHUNKS;
        const int c = lane % CHUNKS;
        int r = 16 * RS * warp + lane / CHUNKS;
        const uint32_t base_o = q + (uint32_t)(r * DV * 2);
#pragma unroll
        for (int i = 0; i < 16 * RS / STEP; i++, r += STEP) {
            const uint32_t at = s->o16[r];
            uint32_t x[4];
            attni_lds16(x, base_o + (uint32_t)(i * STEP * DV * 2 + ((c ^ (r & 7)) << 4)));
            if (at != ~0u)
                ((uint4 *)a.d.o.data)[(uint64_t)at + c] = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }

    __device__ __forceinline__ void store_any(const attni_cu_args &a,
                                              const attni_cu_tall_shared *s) const {
#pragma unroll 1
        for (int n = lane; n < 16 * RS * DV; n += 32) {
            const int r = 16 * RS * warp + n / DV, e = n % DV;
            const attni_cu_row &y = s->row[r];
            if (y.token >= 0)
                ((uint16_t *)attni_cu_o(a, y.token, y.head))[e] = attni_lds2(
                    q + (uint32_t)(r * DV * 2 + ((e / 8 ^ (r & 7)) << 4) + e % 8 * 2));
        }
    }

    // Rows of Q whose places were noted.
    __device__ __forceinline__ void fetch_q(const attni_cu_args &a,
                                            const attni_cu_tall_shared *s) const {
        constexpr int CHUNKS = DK / 8, STEP = ATTNI_CU_THREADS / CHUNKS;
        const int r = (int)threadIdx.x / CHUNKS, c = (int)threadIdx.x % CHUNKS;
        const uint32_t to = q + (uint32_t)(r * DK * 2 + ((c ^ (r & 7)) << 4));
#pragma unroll
        for (int i = 0; i < base::MT / STEP; i++) {
            const uint32_t at = s->q16[r + i * STEP];
            attni_cp_async16(to + (uint32_t)(i * STEP * DK * 2),
                             (const uint4 *)a.d.q.data + (at == ~0u ? 0 : (uint64_t)at + c),
                             at == ~0u ? 0 : 16);
        }
    }

    __device__ __forceinline__ void start(const attni_cu_args &a, attni_cu_tall_shared *s) {
        asm volatile("mov.u32 %0, %1;" : "=r"(lane) : "r"(threadIdx.x & 31));
        warp = (int)threadIdx.x >> 5;
        base::dk = DK;
        base::dv = DV;
        // opaque, or the address would be made anew wherever it is used
        asm volatile("mov.u32 %0, %1;" : "=r"(queue) : "r"(attni_smem(s->queue)));
        q = queue + (uint32_t)((sizeof *s + 127) / 128 * 128) -
            (uint32_t)((const uint8_t *)s->queue - (const uint8_t *)s);
        ring = q + base::MT * DK * 2;
        if (a.wide_q) fetch_q(a, s);
        else base::load_q(a, s);
    }

    // The task at hand; then: number of the one behind, thread 0 knows.
    __device__ __forceinline__ void run(const attni_cu_args &a, attni_cu_tall_shared *s,
                                        int32_t then) {
        const attni_cu_task &w = s->task;
        const uint32_t k16 = (uint32_t)sizeof s->queue, v16 = k16 + (uint32_t)sizeof s->k16;
        volatile int32_t border = 0; // first block behind the span, 0 before there is one
        int32_t x, next;
        uint32_t at;
        int begin = 1;
        start(a, s);
        attni_cu_enqueue(a, s, attni_cu_start(a, w));
        at = queue;
        x = (int32_t)attni_lds4(at);
        if (x >= 0) {
            if (x < ATTNI_CU_PIECE) {
                attni_cu_locate(a, s, x & ATTNI_CU_AT, 0);
                __syncthreads();
            }
            fetch(a, s, x, attni_lds4(at + k16), attni_lds4(at + v16), 0);
            at += 4;
            next = (int32_t)attni_lds4(at);
        }
        attni_cp_commit();
        if (warp == 0) attni_cu_look_ahead(a, s, then); // while the first block comes
        clear();
#pragma unroll 1
        for (;; x = next | (~x & ATTNI_CU_STAGE), next = (int32_t)attni_lds4(at)) {
            const int32_t b = x & ATTNI_CU_AT;
            if (x < 0 || b >= border) {
                const int32_t to = x < 0 ? w.span1 : b >> w.span_shift, behind = border;
                const int32_t span = behind ? (behind >> w.span_shift) - 1 : w.span0 - 1;
                if (w.slots && behind && (w.slots == 2 || x < 0)) {
                    settle();
                    base::close_span(a, s, span, 1);
                    clear();
                }
                if (w.slots == 2) attni_cu_empty_spans(a, s, span + 1, to);
                if (x < 0) break;
                border = (to + 1) << w.span_shift;
            }
            // opaque: what follows from it would be kept for the whole loop, where nothing is free
            asm volatile("mov.u32 %0, %0;" : "+r"(lane));
            if (next < ATTNI_CU_PIECE) {
                if (next == ATTNI_CU_MORE) {
                    attni_cu_enqueue_more(a, s);
                    at = queue;
                    next = (int32_t)attni_lds4(at);
                }
                if (next >= 0 && next < ATTNI_CU_PIECE && !(next & ATTNI_CU_COPY))
                    attni_cu_locate(a, s, next & ATTNI_CU_AT, !(x & ATTNI_CU_STAGE));
            }
            const uint32_t kf = attni_lds4(at + k16), vf = attni_lds4(at + v16);
            attni_cp_wait<0>();
            __syncthreads(); // x has come, next is located, the other stage is done with
            if (KEEP && begin) keep_q();
            begin = 0;
            if (next >= 0) {
                fetch(a, s, next, kf, vf, !(x & ATTNI_CU_STAGE));
                at += 4;
            }
            attni_cp_commit();
            const uint32_t k = ring + (x & ATTNI_CU_STAGE ? (uint32_t)base::STAGE : 0);
            const uint32_t v = k + ATTNI_CU_BLOCK * DK * 2;
            int open = 0;
            if (!(x & ATTNI_CU_FULL)) {
                const int some = look(a, s, b, x & ATTNI_CU_KEPT, &open, v);
                if (!some) continue;
                if (some == 2) x |= ATTNI_CU_FULL;
            }
            float c[RS][NT][4];
            if (KEEP) scores(c, k);
            else base::scores(c, k);
            if (!(x & ATTNI_CU_FULL)) hide(s, c, b, open);
            maxima(a, c);
            values(a, c, v);
        }
        if (w.slots) return;
        if (!border) { // Q is not there yet, whose place write() takes
            attni_cp_wait<0>();
            __syncthreads();
        }
        settle();
        write(a, s);
    }
};

// What attni_cu_team does not do: wide heads, scores with extras, sm_75. Tiles of 16 rows, and on
// sm_75 of 64 where a head dim leaves room for their sums and scores are plain.
template <int BF, int Q8, int DK, int DV>
static __global__ void __launch_bounds__(ATTNI_CU_THREADS, DK > 128 ? 1 : DK > 64 ? 2 : 3)
    attni_cu_few(const __grid_constant__ attni_cu_args a) {
#ifdef __CUDA_ARCH__
    if constexpr (DK > 128 || __CUDA_ARCH__ < 800) {
        extern __shared__ __align__(256) uint8_t smem[];
        ATTNI_CU_TASKS({
            if (DK <= 128 && s->task.n_tokens * a.group > 16) {
                attni_cu_mma<BF, Q8, DK, DV, DK <= 128, 1, 0> t;
                t.run(a, s, smem);
            } else {
                attni_cu_mma<BF, Q8, DK, DV, 0, 1, 1> t;
                t.run(a, s, smem);
            }
        })
    }
#endif
}

// Tiles of 128 rows (R 2), or 64 (wide heads, scores with extras), for long queries.
template <int BF, int Q8, int DK, int DV, int R>
static __global__ void __launch_bounds__(
    ATTNI_CU_THREADS,
    DK > 128 ? 1 : DK > 64 || (R == 2 && !Q8 && attni_cu_tall<BF, DK, DV, R>::FITS) ? 2 : 3)
    attni_cu_many(const __grid_constant__ attni_cu_args a) {
    extern __shared__ __align__(256) uint8_t smem[];
    if (R == 2 && !Q8 && attni_cu_tall<BF, DK, DV, R>::FITS) {
        attni_cu_tall_shared *s = (attni_cu_tall_shared *)(void *)smem;
        int32_t *ticket = a.ticket + 2 * a.kind;
        if (!attni_cu_has_task(a)) return;
        if (threadIdx.x == 0) s->n_tasks = a.header->n_tasks[a.kind];
        __syncwarp();
        if (threadIdx.x < 32) attni_cu_look_ahead(a, s, (int32_t)blockIdx.x);
        while (attni_cu_take(a, s)) {
            attni_cu_tall<BF, DK, DV, R> t;
            int32_t next = 0;
            if (threadIdx.x == 0) next = (int32_t)gridDim.x + atomicAdd(ticket, 1);
            t.run(a, s, next);
            if (s->task.slots)
                attni_cu_arrive_far(a, static_cast<attni_cu_shared *>(s));
        }
        if (threadIdx.x == 0) attni_cu_leave_tasks(a);
        return;
    }
    ATTNI_CU_TASKS({
        attni_cu_mma<BF, Q8, DK, DV, R, 0, R == 1> t;
        t.run(a, s, smem);
    })
}

// ==== >>impl-team  Few rows: every warp its own tokens ===========================================
//
// Tiles of few rows (decode, short queries, prefixes that sequences share), which memory decides:
// sm_80 and up, head_dim 64 and 128, plain scores, any mask. Of every block of 64 tokens each warp
// of a team of four has 16, a unit, with copies of its own under way and maxima, sums and O of its
// own, so that inside a span no warp waits for another. At a span's end the four states of a row
// are folded in order. Products are turned over, K Q' and V' P', so that rows are the side of 8 of
// a tensor core's tile and keys and dims that of 16: a group of heads seldom fills more. Tiles have
// S strips of 8 rows, 1 or 4; a row's bits are the same in both.
//
// Codes never become bf16, which takes twice the instructions. Integers of K are multiplied as they
// are with Q in 16-bit fixed point, two digits of 8 bits; all else is f16, with Q scaled to its
// range row by row. Weights of V are kept in f16's range by a row's running maximum, which looks at
// V's scales, too, and is kept 2^6 too low, so that small weights lose nothing.

enum { // of a block: there is one; all rows see all of it; the warp's unit can be read as it lies;
       // a span ends behind it; the task, too; spans before it are empty; time to ask for the next
       // task. Its number (of 25 bits) is kept above.
    ATTNI_CU_IS_THERE = 1, ATTNI_CU_IS_FULL = 2, ATTNI_CU_IS_EASY = 4, ATTNI_CU_IS_CLOSE = 8,
    ATTNI_CU_IS_LAST = 16, ATTNI_CU_IS_GAP = 32, ATTNI_CU_IS_ASK = 64, ATTNI_CU_IS_BITS = 7
};

template <int S> struct attni_cu_teams {
    static constexpr int ROWS = 8 * S;
    float2 ml[4][ROWS];                          // a span's maxima and sums, of each stream
    float q_scale[ROWS];                         // of scores, where K is codes
    uint16_t bits[4][4][ROWS];                   // what rows see of a partial unit, of each stage
    int2 ahead[4][33];                           // blocks behind those at hand, by warps: 2 x
                                                 // number + full, page; the last: the span before
                                                 // them, the last block looked at
    attni_cu_task next;
    int32_t n_next;                              // its number
    attni_cu_work<ROWS, 128> work[2];            // tasks take turns
};

// Blocks on a multiprocessor: converting hides behind more of them, else registers are worth more.
__host__ __device__ constexpr int attni_cu_team_blocks(int q8, int d, int s) {
    return s == 1 && (q8 || d == 64) ? 3 : 2;
}
// Units that a warp has under way, and their bytes.
__host__ __device__ constexpr int attni_cu_team_stages(int d) { return d == 128 ? 2 : 3; }
__host__ __device__ constexpr int attni_cu_team_stage(int q8, int d) {
    return 2 * 16 * (q8 ? d + 8 : 2 * d); // codes: with their scales, rounded up to 256
}
// Of its rows: Q, folded states.
__host__ __device__ constexpr int attni_cu_team_row_bytes(int d, int s) {
    return (8 * s * (2 * d + 4 * d + 4 * 8) + 255) / 256 * 256;
}
__host__ __device__ constexpr int attni_cu_team_smem(int q8, int d, int s) {
    return ((int)(s == 1 ? sizeof(attni_cu_teams<1>) : sizeof(attni_cu_teams<4>)) + 255) / 256 *
               256 +
           attni_cu_team_row_bytes(d, s) + 4 * attni_cu_team_stages(d) * attni_cu_team_stage(q8, d);
}

// What the 16-byte pieces of a row of so many bytes are exclusive-ored with: no two of a ldmatrix
// in a bank, nor (codes) of the 16-byte loads of 8 lanes.
template <int BYTES> ATTNI_DEV int attni_cu_twist(int r) {
    return BYTES == 64 ? r >> 1 & 3 : (r & 1) << 2 | (r >> 1 & 3);
}
template <int BYTES> ATTNI_DEV uint32_t attni_cu_piece(int r, int c) {
    return (uint32_t)(r * BYTES + ((c ^ attni_cu_twist<BYTES>(r)) << 4));
}

// What the rows of a task see of a warp's unit of block b, to bits; returns what any of them sees.
// A warp calls. (Not a member, as objects whose address is passed on keep the arguments from being
// read as constants.)
template <class W>
ATTNI_DEV_FAR uint32_t attni_cu_look_at_rows(const attni_cu_args &a, const W *s, uint16_t *bits,
                                             int32_t b) {
    const int n = s->task.n_tokens * a.group, stream = (int)threadIdx.x >> 5 & 3;
    uint32_t any = 0;
    for (int r = (int)threadIdx.x & 31; r < n; r += 32) {
        const uint32_t u =
            (uint32_t)(attni_cu_bits(a, s, s->row[r], b) >> 16 * stream) & 0xffff;
        bits[r] = (uint16_t)u;
        any |= u;
    }
#if __CUDA_ARCH__ >= 800
    any = __reduce_or_sync(~0u, any);
#endif
    return a.sparse ? any : 0xffff; // what no row sees is not read
}

// Copies a unit of block b token by token: a partial one, one with a page that is none, rows that
// are no multiples of 16 bytes. page: of the unit where there are runs. A warp calls. (It has no
// registers to spare for this.)
template <int Q8, int D, class W>
ATTNI_DEV_FAR void attni_cu_copy_tokens(const attni_cu_args &a, W *s, uint8_t *to, uint16_t *bits,
                                        int32_t b, int whole, int runs, int32_t page) {
    constexpr int ROW = Q8 ? D : 2 * D, CHUNKS = ROW / 16, STEP = 32 / CHUNKS;
    const attni_cu_task &w = s->task;
    const int lane = (int)threadIdx.x & 31, stream = (int)threadIdx.x >> 5 & 3;
    const int c = lane % CHUNKS;
    const attni_side &mine = lane >> 4 ? a.v : a.k; // a lane has a token of K or of V
    uint32_t seen = 0xffff;
    const int32_t pos = attni_cu_position_far(a, s, b, 16 * stream + (lane & 15));
    int32_t p, place = attni_cu_place(a, w, pos, &p);
    if (!whole && !a.closed) seen = attni_cu_look_at_rows(a, s, bits, b);
    if (!(seen >> (lane & 15) & 1)) place = -1;
    if ((!runs || a.gather) && place >= 0)
        page = a.d.kv.page_table ? __ldg(attni_cu_page_at(a, w.seq, p)) : w.seq;
    page = attni_cu_checked(a, s, page, place);
    const uint8_t *row =
        page < 0 ? NULL : mine.data + attni_cu_offset(mine, page, place, w.kv_head);
    const uint8_t *scale = page < 0 || !Q8 ? NULL : attni_cu_scale_at(mine, page, place, w.kv_head);
#pragma unroll 4
    for (int i = 0; i < 2 * 16; i += STEP) {
        const int r = i + lane / CHUNKS; // V's rows behind those of K
        const attn_dtype t = r >> 4 ? a.v.dtype : a.k.dtype;
        const int n = (Q8 && t == ATTN_I4 ? D / 2 : ROW) - 16 * c;
        const uint8_t *from = (const uint8_t *)__shfl_sync(~0u, (unsigned long long)row, r);
        uint8_t *there = to + (r & 16) * ROW + attni_cu_piece<ROW>(r & 15, c);
        if (from) from += 16 * c;
        if (!a.odd_rows && n > 0)
            attni_cp_async16(attni_smem(there), from ? from : a.k.data, from ? 16 : 0);
        for (int j = 0; j < 16 && j < n && a.odd_rows; j++) there[j] = from ? from[j] : 0;
    }
    if (Q8) {
        uint8_t *there = to + 2 * 16 * ROW + 4 * lane;
        if (!a.odd_rows)
            attni_cp_async4(attni_smem(there), scale ? scale : a.k.data, scale ? 4 : 0);
        for (int j = 0; j < 4 && a.odd_rows; j++) there[j] = scale ? scale[j] : 0;
    }
}

template <int BF, int Q8, int D, int S> struct attni_cu_team {
    static constexpr int ROW = Q8 ? D : 2 * D, QROW = 2 * D; // bytes
    static constexpr int STAGE = attni_cu_team_stage(Q8, D);
    static constexpr int STAGES = attni_cu_team_stages(D);
    static constexpr int NO = D / 16;        // tiles of 16 columns of O
    static constexpr int OWN = D / 16;       // columns of a folded row that a lane has
    static constexpr int CHUNKS = ROW / 16;
    static constexpr int M = Q8 ? 0 : BF;    // of products: bf16, else f16
    static constexpr int LOW = 6;            // maxima are 2^LOW too low
    static_assert(STAGE >= 8 * 4 * D, "a strip's state is handed over where a unit was");
    typedef attni_cu_teams<S> teams_t;
    typedef attni_cu_work<8 * S, 128> work_t;
    const attni_cu_args &a;
    teams_t *f;
    work_t *work;                       // the task at hand
    int lane, stream, rows, stage;
    uint32_t k_lane, v_lane;            // where ldmatrix takes the lane's rows of K and V
    uint32_t to_lane;                   // where the lane's first piece of a unit goes
    uint32_t q, total, ring;            // shared memory addresses; ring: of the warp
    // blocks to come, 32 at hand, one to a lane: number and flags, the unit's page, its place there
    uint32_t block;
    int32_t page, place;
    uint32_t under_way[STAGES];         // those asked for
    int runs;
    const uint8_t *kv[2];               // K and V of page 0, the lane's piece
    const uint8_t *scale;               // the lane's scale there: of K's token, or of V's
    int32_t drawn;                      // number of the next task; -1: not asked for, -2: fetched
    // sums
    float o[S][NO][4], m[S][2], l[S][2]; // of the pair of rows that a lane has of a strip

    __device__ __forceinline__ attni_cu_team(const attni_cu_args &args, uint8_t *smem) : a(args) {
        f = (teams_t *)(void *)smem;
        work = &f->work[1];
        lane = (int)threadIdx.x & 31;
        stream = (int)threadIdx.x >> 5;
        q = attni_smem(smem) + (sizeof(teams_t) + 255) / 256 * 256;
        total = q + 8 * S * QROW;
        ring = q + attni_cu_team_row_bytes(D, S) + (uint32_t)(stream * STAGES * STAGE);
        k_lane = attni_cu_piece<ROW>(lane & 15, lane >> 4);
        v_lane = 16 * ROW +
                 (!Q8 ? attni_cu_piece<ROW>((lane & 7) + 8 * (lane >> 4), lane >> 3 & 1)
                      : attni_cu_piece<ROW>(lane & 15, lane >> 4));
        to_lane = attni_cu_piece<ROW>(lane / CHUNKS, lane % CHUNKS);
        // once, not in front of each use
        asm volatile("" : "+r"(ring), "+r"(k_lane), "+r"(v_lane), "+r"(to_lane));
    }

    // ---- blocks and where their tokens lie

    // Goes on to the next 32 blocks; those behind them are looked for, and their units' pages.
    __device__ __forceinline__ void look(void) {
        const attni_cu_task &w = work->task;
        int2 *ahead = f->ahead[threadIdx.x >> 5];
        const int2 now = ahead[lane], last = ahead[32];
        const int32_t end = w.end_block, shift = w.span_shift;
        int32_t at = last.y, b = end, full = 0, pg = w.seq;
        if (!a.sparse) {
            int32_t next = at + 1;
            if (next >= w.sink_block && next < w.lo_block) next = w.lo_block;
            b = next + lane;
            if (next < w.sink_block && b >= w.sink_block)
                b += attni_max32(w.lo_block - w.sink_block, 0);
            at = attni_min32(__shfl_sync(~0u, b, 31), end);
            b = attni_min32(b, end);
            full = b >= w.full_block && b < w.full_end;
        }
#pragma unroll 1
        for (int i = 0; i < 32 && at < end && a.sparse; i++) {
            at = attni_cu_next(a, work, w, at + 1);
            const int all = at < end && attni_cu_full(a, work, w, at);
            if (lane == i) b = at, full = all;
        }
        const int32_t pos = attni_cu_base(a, work, b) + 16 * stream, j = pos - w.pos0;
        if (runs && a.d.kv.page_table && b < end && j > -16 && pos < w.hi &&
            (pos + 15 >= w.lo || pos < w.sink_end))
            pg = __ldg(attni_cu_page_at(a, w.seq, attni_cu_page_index(a, j)));
        const int32_t n = now.x >> 1, first = __shfl_sync(~0u, b, 0);
        int32_t behind = __shfl_down_sync(~0u, n, 1);
        int32_t before = __shfl_up_sync(~0u, n >> shift, 1);
        if (lane == 31) behind = first;
        if (lane == 0) before = last.x;
        page = now.y;
        block = (uint32_t)n << ATTNI_CU_IS_BITS | about(w, n, behind, before, now.x & 1);
        __syncwarp();
        ahead[lane] = make_int2(2 * b + full, pg);
        if (lane == 31) ahead[32] = make_int2(n >> shift, at);
        __syncwarp();
    }

    // Flags of the lane's block, before and behind which there are a span and a block; its place in
    // its page.
    __device__ __forceinline__ uint32_t about(const attni_cu_task &w, int32_t n, int32_t behind,
                                              int32_t before, int full) {
        const int32_t shift = w.span_shift, pos = attni_cu_base(a, work, n) + 16 * stream;
        uint32_t is = ATTNI_CU_IS_THERE;
        place = pos - w.pos0;
        place = a.page_shift >= 0 ? place & (a.d.kv.page_tokens - 1)
                                  : place % a.d.kv.page_tokens;
        if (n >= w.end_block) return 0;
        if (full) is |= ATTNI_CU_IS_FULL;
        if ((runs ? (uint32_t)page < (uint32_t)a.d.kv.n_pages : !a.odd_rows) &&
            (full || a.closed) && pos >= w.pos0 && pos + 16 <= w.hi &&
            (pos >= w.lo || pos + 16 <= w.sink_end))
            is |= ATTNI_CU_IS_EASY;
        if (behind >= w.end_block) is |= ATTNI_CU_IS_LAST;
        if (behind >= w.end_block || behind >> shift != n >> shift) is |= ATTNI_CU_IS_CLOSE;
        if (w.slots == 2 && n >> shift > before + 1) is |= ATTNI_CU_IS_GAP;
        if (w.end_block - n <= 6 || (a.gather && behind >= w.end_block)) is |= ATTNI_CU_IS_ASK;
        return is;
    }

    // Bytes from a token's scale to the next one's.
    __device__ __forceinline__ int64_t to_scale(int v) const {
        return v ? a.v.head_scale ? 0 : a.v.scale_token : a.k.head_scale ? 0 : a.k.scale_token;
    }
    // Copies the lane's scale, of a unit, from where it lies in page pg, its token e places behind
    // the one that `scale` is of.
    __device__ __forceinline__ void copy_scale(int32_t pg, int32_t e) const {
        const int64_t to_page = lane >> 4 ? a.v.head_scale ? 0 : a.v.page_bytes
                                          : a.k.head_scale ? 0 : a.k.page_bytes;
        attni_cp_async4(ring + (uint32_t)(stage * STAGE + 2 * 16 * ROW + 4 * lane),
                        scale + pg * to_page + e * to_scale(lane >> 4), 4);
    }

    // Copies a unit that lies in one run of a page.
    __device__ __forceinline__ void copy(int32_t pg, int32_t e) const {
        constexpr int STEP = 32 / CHUNKS;
        const uint32_t there = ring + (uint32_t)(stage * STAGE) + to_lane;
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const attni_side &d = v ? a.v : a.k;
            const int some = !Q8 || d.dtype != ATTN_I4 || lane % CHUNKS < CHUNKS / 2;
            const uint8_t *from = kv[v] + pg * d.page_bytes + e * d.token_bytes;
#pragma unroll
            for (int n = 0; n < 16; n += STEP, from += STEP * d.token_bytes)
                if (some)
                    attni_cp_async16((there ^ (uint32_t)(attni_cu_twist<ROW>(n) << 4)) +
                                         (uint32_t)((16 * v + n) * ROW),
                                     from, 16);
        }
        if (Q8) copy_scale(pg, e);
    }

    // Copies a unit of block b whose tokens lie anywhere; false when one of their pages is none.
    __device__ __forceinline__ int copy_each(int32_t b) const {
        const attni_cu_task &w = work->task;
        const int32_t pos = attni_cu_base(a, work, b) + 16 * stream + (lane & 15), j = pos - w.pos0;
        const int32_t p = attni_cu_page_index(a, j);
        const int v = lane >> 4; // a lane has a token of K or of V
        const int32_t pg = a.d.kv.page_table ? __ldg(attni_cu_page_at(a, w.seq, p)) : w.seq;
        const int32_t e = j - p * a.d.kv.page_tokens;
        if (a.d.kv.page_table && pos + ATTNI_CU_BLOCK < w.hi) // the next block's
            attni_prefetch(attni_cu_page_at(a, w.seq, attni_cu_page_index(a, j + ATTNI_CU_BLOCK)));
        if (!__all_sync(~0u, (uint32_t)pg < (uint32_t)a.d.kv.n_pages)) return 0;
        const uint8_t *row = v ? a.v.data + attni_cu_offset(a.v, pg, e, w.kv_head)
                               : a.k.data + attni_cu_offset(a.k, pg, e, w.kv_head);
        const uint32_t there = ring + (uint32_t)(stage * STAGE) + to_lane;
#pragma unroll
        for (int r = 0; r < 32; r += 32 / CHUNKS) { // V's rows behind those of K
            const attn_dtype t = r >> 4 ? a.v.dtype : a.k.dtype;
            const uint8_t *from = (const uint8_t *)__shfl_sync(~0u, (unsigned long long)row,
                                                               r + lane / CHUNKS);
            if (!Q8 || t != ATTN_I4 || lane % CHUNKS < CHUNKS / 2)
                attni_cp_async16((there ^ (uint32_t)(attni_cu_twist<ROW>(r & 15) << 4)) +
                                     (uint32_t)(r * ROW),
                                 from + 16 * (lane % CHUNKS), 16);
        }
        if (Q8) {
            const uint8_t *from = attni_cu_scale_at(v ? a.v : a.k, pg, e, w.kv_head);
            attni_cp_async4(ring + (uint32_t)(stage * STAGE + 2 * 16 * ROW + 4 * lane), from, 4);
        }
        return 1;
    }

    // Asks for the task's block number n.
    __device__ __forceinline__ void issue(int n) {
        const int32_t pg = __shfl_sync(~0u, page, n & 31), e = __shfl_sync(~0u, place, n & 31);
        const uint32_t is = __shfl_sync(~0u, block, n & 31);
        const int32_t b = (int32_t)(is >> ATTNI_CU_IS_BITS);
        if (is & ATTNI_CU_IS_EASY && runs) copy(pg, e);
        else if (is & ATTNI_CU_IS_THERE && !(is & ATTNI_CU_IS_EASY && copy_each(b)))
            attni_cu_copy_tokens<Q8, D>(
                a, work, (uint8_t *)f + (ring - attni_smem(f)) + stage * STAGE,
                f->bits[stage][stream], b, is & ATTNI_CU_IS_FULL, runs, pg);
        if (is & ATTNI_CU_IS_ASK && threadIdx.x < 32) draw(work->task.end_block - b <= 3);
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) under_way[i] = under_way[i + 1];
        under_way[STAGES - 1] = is;
        attni_cp_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // ---- rows and Q

    // All that is known before keys are: rows, Q (on its way), units.
    __device__ __forceinline__ void prepare(void) {
        const attni_cu_task &w = work->task;
        rows = w.n_tokens * a.group;
        const int tid = (int)threadIdx.x, all = (rows + 7) / 8 * 8;
        if (tid < all) work->row[tid] = attni_cu_get_row(a, w, tid);
        __syncthreads();
        for (int e = tid; e < all * (D / 8); e += 128) {
            const int r = e / (D / 8), c = e % (D / 8);
            const attni_cu_row &y = work->row[r];
            const uint16_t *from = (const uint16_t *)a.d.q.data + y.token * a.d.q.stride_token +
                                   y.head * a.d.q.stride_head + 8 * c;
            const uint32_t to_q = q + attni_cu_piece<QROW>(r, c);
            uint32_t u[4] = {0, 0, 0, 0};
            if (!a.odd_q) {
                attni_cp_async16(to_q, y.token < 0 ? a.d.q.data : from, y.token < 0 ? 0 : 16);
                continue;
            }
            for (int j = 0; j < 8 && y.token >= 0; j++)
                u[j >> 1] |= (uint32_t)from[j] << 16 * (j & 1);
            attni_sts16(to_q, u);
        }
        if (a.sparse) attni_cu_terms(a, work, all);
        attni_cu_units(a, work);
        runs = a.runs && w.pos0 % 16 == 0;
        const int32_t at = attni_cu_start(a, w) - 1;
        int2 *ahead = f->ahead[tid >> 5];
        ahead[lane] = make_int2(2 * ((w.span0 << w.span_shift) - 1), 0);
        if (lane == 0) ahead[32] = make_int2(0, at);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const attni_side &d = i ? a.v : a.k;
            kv[i] = d.data + w.kv_head * d.head_bytes + lane / CHUNKS * d.token_bytes +
                    16 * (lane % CHUNKS);
        }
        if constexpr (Q8) {
            const int v = lane >> 4;
            const float *one = v ? a.v.head_scale : a.k.head_scale;
            scale = one ? (const uint8_t *)(one + w.kv_head)
                        : (v ? a.v.data + a.v.scale_offset + w.kv_head * a.v.scale_head
                             : a.k.data + a.k.scale_offset + w.kv_head * a.k.scale_head) +
                              (lane & 15) * to_scale(v);
        }
    }

    // Q has come: where K is codes, it becomes what they are multiplied with (see load_q), with the
    // scales of its rows. A thread takes 8 dims.
    __device__ __forceinline__ void convert_q(void) const {
        constexpr int PER = D / 8;
        const int n = (rows + 7) / 8 * 8 * PER, i4 = a.k.dtype == ATTN_I4;
        for (int e = (int)threadIdx.x; e < n; e += 128) {
            const int r = e / PER, c = e % PER;
            float x[8], top = 0, odd = 0, scale;
            uint32_t u[4];
            attni_lds16(u, q + attni_cu_piece<QROW>(r, c));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint16_t y = (uint16_t)(u[i >> 1] >> 16 * (i & 1));
                x[i] = a.d.q.dtype == ATTN_BF16 ? __uint_as_float((uint32_t)y << 16)
                                                : attni_half(y);
                top = fmaxf(top, fabsf(x[i]));
                odd = __fmaf_rn(x[i], 0.0f, odd); // NaN, if one is no number
            }
#pragma unroll
            for (int i = 1; i < PER; i *= 2) {
                top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
                odd += __shfl_xor_sync(~0u, odd, i);
            }
            __syncwarp();
            if (i4 || a.k.dtype == ATTN_I8) {
                // 8 int4 codes are even dims and odd ones, 4 bytes each
                const int at = i4 ? 64 * (c >> 3) + 16 * (c >> 2 & 1) + 4 * (c & 3) : 8 * c;
                const float step = fmaxf(top, 1e-30f) / 32512.0f, per = 1.0f / step;
                uint32_t digit[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int v = __float2int_rn(x[i] * per), hi = (v + 128) >> 8;
                    const int word = i4 ? i & 1 : i >> 2, byte = i4 ? i >> 1 : i & 3;
                    digit[0][0] |= word == 0 ? (uint32_t)(hi & 255) << 8 * byte : 0;
                    digit[0][1] |= word == 1 ? (uint32_t)(hi & 255) << 8 * byte : 0;
                    digit[1][0] |= word == 0 ? (uint32_t)(v & 255) << 8 * byte : 0;
                    digit[1][1] |= word == 1 ? (uint32_t)(v & 255) << 8 * byte : 0;
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int to = at + (i & 1) * (i4 ? 32 : 4);
                    attni_sts4(q + attni_cu_piece<QROW>(r, (to >> 4) + (i >> 1) * (D / 16)) +
                                   (uint32_t)(to & 15), digit[i >> 1][i & 1]);
                }
                scale = i4 ? step / 16 : step;
            } else {
                // to below 2^11; pairs of dims 0 1, 4 5, 8 9, 12 13 of 16 before the others
                const uint32_t y = attni_max32((int32_t)(__float_as_uint(top) >> 23), 11);
                const float per = __uint_as_float((264 - attni_min32(y, 254)) << 23);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    u[i] = attni_pair<0>(x[2 * i] * per, x[2 * i + 1] * per);
                attni_sts8(q + attni_cu_piece<QROW>(r, c & ~1) + 8u * (c & 1), u[0], u[2]);
                attni_sts8(q + attni_cu_piece<QROW>(r, c | 1) + 8u * (c & 1), u[1], u[3]);
                scale = __uint_as_float((y - 10) << 23);
            }
            if (c == 0) f->q_scale[r] = (scale + odd) * a.scale;
        }
    }

    // 64 bytes of Q of a strip as right operands of two steps, from piece c on: 32 dims in 16 bits,
    // 64 of a digit.
    __device__ __forceinline__ void load_q(uint32_t u[4], int s, int c) const {
        attni_ldmatrix(u, q + attni_cu_piece<QROW>(8 * s + (lane & 7), c + (lane >> 3)));
    }

    // ---- a unit

    __device__ __forceinline__ void reset(void) {
#pragma unroll
        for (int i = 0; i < S; i++) {
#pragma unroll
            for (int e = 0; e < 4 * NO; e++) o[i][e >> 2][e & 3] = 0;
            m[i][0] = m[i][1] = ATTNI_NINF;
            l[i][0] = l[i][1] = 0;
        }
    }

    // Keys x rows, 16-bit K or (T) floats of 8. Even and odd steps apart: half the way from one
    // product to the next.
    template <int N, int T>
    __device__ __forceinline__ void scores(float c[N][4], uint32_t k) const {
        float d[N][4];
#pragma unroll
        for (int e = 0; e < 4 * N; e++) c[e >> 2][e & 3] = d[e >> 2][e & 3] = 0;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint32_t ka[2][4], u[4], y[2];
            if constexpr (!Q8) {
                attni_ldmatrix(ka[0], k ^ (uint32_t)(4 * i << 4));
                attni_ldmatrix(ka[1], k ^ (uint32_t)((4 * i + 2) << 4));
            } else { // pairs 2 dims apart are taken as if they were 8 dims apart
                attni_ldmatrix(u, k ^ (uint32_t)(2 * i << 4));
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    attni_cu_pairs<T, 1>(u[e], y);
                    ka[e >> 1][e & 1] = y[0], ka[e >> 1][2 + (e & 1)] = y[1];
                }
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                load_q(u, n, 4 * i);
                attni_mma<M>(c[n], ka[0], u[0], u[1]);
                attni_mma<M>(d[n], ka[1], u[2], u[3]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4 * N; e++) c[e >> 2][e & 3] += d[e >> 2][e & 3];
    }

    // The same of integers; int4 codes become 16 times as much.
    template <int N, int T>
    __device__ __forceinline__ void scores_of_integers(float c[N][4], uint32_t k) const {
        int32_t hi[N][4], lo[N][4];
#pragma unroll
        for (int e = 0; e < 4 * N; e++) hi[e >> 2][e & 3] = lo[e >> 2][e & 3] = 0;
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
            uint32_t ka[2][4], u[4];
            if (T == ATTN_I8) {
                attni_ldmatrix(ka[0], k ^ (uint32_t)(4 * i << 4));
                attni_ldmatrix(ka[1], k ^ (uint32_t)((4 * i + 2) << 4));
            } else {
                attni_ldmatrix(u, k ^ (uint32_t)(2 * i << 4));
#pragma unroll
                for (int e = 0; e < 4; e++)
                    ka[0][e] = u[e] << 4 & 0xf0f0f0f0u, ka[1][e] = u[e] & 0xf0f0f0f0u;
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                load_q(u, n, 4 * i);
                attni_mma_i8(hi[n], ka[0], u[0], u[1]);
                attni_mma_i8(hi[n], ka[1], u[2], u[3]);
                load_q(u, n, 4 * i + D / 16);
                attni_mma_i8(lo[n], ka[0], u[0], u[1]);
                attni_mma_i8(lo[n], ka[1], u[2], u[3]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4 * N; e++)
            c[e >> 2][e & 3] = (float)(256 * hi[e >> 2][e & 3] + lo[e >> 2][e & 3]);
    }

    template <int N> __device__ __forceinline__ void scores_of(float c[N][4], uint32_t k) const {
        if constexpr (!Q8) {
            scores<N, 0>(c, k);
        } else {
            if (a.k.dtype == ATTN_F8E4M3) scores<N, ATTN_F8E4M3>(c, k);
            else if (a.k.dtype == ATTN_I8) scores_of_integers<N, ATTN_I8>(c, k);
            else if (a.k.dtype == ATTN_F8E5M2) scores<N, ATTN_F8E5M2>(c, k);
            else scores_of_integers<N, ATTN_I4>(c, k);
        }
    }

    __device__ __forceinline__ void hide(float c[4], int i, int32_t b) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = 8 * i + 2 * (lane & 3) + h;
            const attni_cu_row &y = work->row[r];
            uint32_t bits;
            if (a.closed)
                bits = (uint32_t)(attni_cu_closed_bits(y.lo, y.hi, b * ATTNI_CU_BLOCK) >>
                                  16 * stream);
            else
                bits = f->bits[stage][stream][r];
            bits >>= lane >> 2;
            if (!(bits & 1)) c[h] = ATTNI_NINF;
            if (!(bits & 256)) c[2 + h] = ATTNI_NINF;
        }
    }

    // Scores -> weights, by the running maximum as it is, and with V's scales; bit h when one of
    // row h is too large.
    __device__ __forceinline__ int weigh(const float c[4], float y[4], float p[4],
                                         const float scale[2], const float vs[2], int i) const {
        int grown = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float top = m[i][e & 1], base = top == ATTNI_NINF ? 0.0f : top;
            y[e] = attni_exp2(__fmaf_rn(c[e], scale[e & 1], -base));
            p[e] = Q8 ? y[e] * vs[e >> 1] : y[e];
            const int large = c[e] * scale[e & 1] > top + (LOW + 8) || // above -inf, too
                              (Q8 && p[e] > (float)(1 << (LOW + 8)));
            grown |= large << (e & 1);
        }
        return grown;
    }

    // Raises the running maximum of rows that have a weight which is too large, and scales what was
    // summed; weights are to be taken again then.
    __device__ __forceinline__ void raise(const float c[4], const float scale[2],
                                          const float vs[2], int grown, int i) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float v0 = Q8 && vs[0] > 1.0f ? log2f(vs[0]) : 0.0f;
            const float v1 = Q8 && vs[1] > 1.0f ? log2f(vs[1]) : 0.0f;
            const float top = attni_oct_max(fmaxf(__fmaf_rn(c[h], scale[h], v0),
                                                  __fmaf_rn(c[2 + h], scale[h], v1)));
            float y = 1.0f;
            if (__ballot_sync(~0u, grown >> h & 1) & 0x11111111u << (lane & 3)) {
                y = attni_exp2(m[i][h] - (top - LOW));
                m[i][h] = top - LOW;
            }
            l[i][h] *= y;
#pragma unroll
            for (int j = 0; j < NO; j++) o[i][j][h] *= y, o[i][j][2 + h] *= y;
        }
    }

    // V of 16 tokens as left operands, turned over: tiles 2 j and 2 j + 1 of O. A piece of V has
    // the columns of a tile, every other one in its upper half; of int4, of two tiles.
    template <int T>
    __device__ __forceinline__ void left_v(uint32_t va[2][4], uint32_t v, int j) const {
        uint32_t u[4], y[2];
        if constexpr (!Q8) {
            attni_ldmatrix_trans(va[0], v ^ (uint32_t)(4 * j << 4));
            attni_ldmatrix_trans(va[1], v ^ (uint32_t)((4 * j + 2) << 4));
        } else if constexpr (T == ATTN_I4) {
            attni_ldmatrix_trans(u, v ^ (uint32_t)(2 * (j / 2) << 4));
#pragma unroll
            for (int e = 0; e < 8; e++)
                va[e >> 2][e & 3] = attni_cu_nibble_pair(u[2 * (j & 1) + (e >> 1 & 1)],
                                                         2 * (e >> 2) + (e & 1));
        } else {
            attni_ldmatrix_trans(u, v ^ (uint32_t)(2 * j << 4));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                attni_cu_pairs<T, 0>(u[e], y);
                va[e >> 1][2 * (e & 1)] = y[0], va[e >> 1][2 * (e & 1) + 1] = y[1];
            }
        }
    }

    template <int N, int T>
    __device__ __forceinline__ void add_v(const uint32_t pb[N][2], uint32_t v) {
#pragma unroll
        for (int j = 0; j < NO / 2; j++) {
            uint32_t va[2][4];
            left_v<T>(va, v, j);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    attni_mma<M>(o[i][2 * j + e], va[e], pb[i][0], pb[i][1]);
        }
    }

    template <int N>
    __device__ __forceinline__ void add_v_of(const uint32_t pb[N][2], uint32_t v) {
        if constexpr (!Q8) {
            add_v<N, 0>(pb, v);
        } else {
            if (a.v.dtype == ATTN_F8E4M3) add_v<N, ATTN_F8E4M3>(pb, v);
            else if (a.v.dtype == ATTN_I8) add_v<N, ATTN_I8>(pb, v);
            else if (a.v.dtype == ATTN_F8E5M2) add_v<N, ATTN_F8E5M2>(pb, v);
            else add_v<N, ATTN_I4>(pb, v);
        }
    }

    // Columns of elements e (and 2 + e) of tile j of O.
    __device__ __forceinline__ int column(int j, int e) const {
        const int r = lane >> 2, h = e >> 1;
        if (!Q8) return 16 * j + r + 8 * h;
        return a.v.dtype == ATTN_I4 ? 32 * (j >> 1) + 4 * r + 2 * (j & 1) + h : 16 * j + 2 * r + h;
    }

    // The unit of block b, N strips.
    template <int N> __device__ __forceinline__ void unit(int32_t b, int whole) {
        const uint32_t at = ring + (uint32_t)(stage * STAGE), k = at + k_lane, v = at + v_lane;
        float c[N][4], y[N][4], p[N][4], scale[N][2], vs[2] = {1, 1};
        uint32_t pb[N][2];
        int grown[N], any = 0;
        scores_of<N>(c, k);
#pragma unroll
        for (int h = 0; h < 2 && Q8; h++) {
            const uint32_t there = at + 32 * ROW + 4u * (8 * h + (lane >> 2));
            const float z = __uint_as_float(attni_lds4(there));
            vs[h] = __uint_as_float(attni_lds4(there + 64));
#pragma unroll
            for (int i = 0; i < N; i++) c[i][2 * h] *= z, c[i][2 * h + 1] *= z;
        }
#pragma unroll
        for (int i = 0; i < 2 * N; i++)
            scale[i >> 1][i & 1] = Q8 ? f->q_scale[8 * (i >> 1) + 2 * (lane & 3) + (i & 1)]
                                      : a.scale;
#pragma unroll
        for (int i = 0; i < N && !whole; i++) hide(c[i], i, b);
#pragma unroll
        for (int i = 0; i < N; i++) any |= grown[i] = weigh(c[i], y[i], p[i], scale[i], vs, i);
        if (__any_sync(~0u, any)) { // rare
#pragma unroll
            for (int i = 0; i < N; i++) {
                raise(c[i], scale[i], vs, grown[i], i);
                (void)weigh(c[i], y[i], p[i], scale[i], vs, i);
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                l[i][h] += y[i][h] + y[i][2 + h];
                pb[i][h] = attni_turn(attni_pair<M>(p[i][2 * h], p[i][2 * h + 1]));
            }
        add_v_of<N>(pb, v);
    }

    // ---- a span

    // Where a column of a row of the warp's O is handed over.
    __device__ __forceinline__ static uint32_t handed(int r, int col) {
        return (uint32_t)(r * 4 * D + (((col >> 2) ^ r) << 4) + 4 * (col & 3));
    }

    // A row's state, the lane's columns, as a partial.
    __device__ __forceinline__ void leave(int r, float top, float sum, const float z[OWN],
                                          int32_t slot) const {
        const int64_t i = attni_cu_partial(a, work->task, r, work->row[r], slot);
        float *out = a.partial_o + i * D + stream * (D / 4) + (lane & 3) * OWN;
        if ((lane & 3) == 0 && stream == 0)
            __stcg((float2 *)a.partial_ml + i, make_float2(top, sum));
#pragma unroll
        for (int j = 0; j < OWN; j += 4)
            __stcg((float4 *)(out + j), make_float4(z[j], z[j + 1], z[j + 2], z[j + 3]));
    }

    // A row's state, the lane's columns, as its result.
    __device__ __forceinline__ void finish(int r, float top, float sum,
                                           const float z[OWN]) const {
        const attni_cu_row &y = work->row[r];
        const int col = stream * (D / 4) + (lane & 3) * OWN, bf = a.d.o.dtype == ATTN_BF16;
        float lse, w = attni_cu_close(a, y.head, top, sum, &lse);
        if (a.d.lse && (lane & 3) == 0 && stream == 0)
            a.d.lse[(int64_t)y.token * a.d.n_heads + y.head] = lse;
        uint16_t *out = (uint16_t *)attni_cu_o(a, y.token, y.head) + col;
        uint32_t u[OWN / 2];
#pragma unroll
        for (int j = 0; j < OWN; j += 2) {
            const float p = sum == 0.0f ? 0 : z[j] * w, q1 = sum == 0.0f ? 0 : z[j + 1] * w;
            u[j / 2] = bf ? attni_pair<1>(p, q1) : attni_pair<0>(p, q1);
        }
        if (!a.wide_o) {
#pragma unroll
            for (int j = 0; j < OWN; j++) out[j] = (uint16_t)(u[j / 2] >> 16 * (j & 1));
        } else if constexpr (OWN == 8) {
            *(uint4 *)(void *)out = make_uint4(u[0], u[1], u[2], u[3]);
        } else {
            *(uint2 *)(void *)out = make_uint2(u[0], u[1]);
        }
    }

    // Adds a state to what its row's spans before it have left in shared memory. (Each warp keeps
    // maxima and sums of its own there, so that no other is waited for.)
    __device__ __forceinline__ void fold(int r, float *top, float *sum, float z[OWN]) {
        const int empty = *top == ATTNI_NINF && *sum == 0.0f;
        const uint32_t state = total + (uint32_t)(32 * S * D + 8 * (8 * S * stream + r));
        const uint32_t from = total + (uint32_t)(4 * (r * D + stream * (D / 4) + (lane & 3) * OWN));
        float w0, w1, m0, l0;
        uint32_t u[4];
        attni_lds8(u, state);
        m0 = __uint_as_float(u[0]), l0 = __uint_as_float(u[1]);
        attni_cu_fold(&m0, &l0, *top, *sum, &w0, &w1);
#pragma unroll
        for (int j = 0; j < OWN; j += 4) {
            attni_lds16(u, from + 4 * j);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float y = __uint_as_float(u[e]), b = attni_cu_blend(y, w0, z[j + e], w1);
                z[j + e] = empty ? y : b;
                u[e] = __float_as_uint(z[j + e]);
            }
            attni_sts16(from + 4 * j, u);
        }
        *top = m0, *sum = l0;
        __syncwarp(); // all have read it
        if ((lane & 3) == 0) attni_sts8(state, __float_as_uint(m0), __float_as_uint(l0));
    }

    // Hands strip I over to the team.
    template <int I> __device__ __forceinline__ void put(uint32_t there) const {
#pragma unroll
        for (int j = 0; j < NO; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = 2 * (lane & 3) + h;
                const uint32_t x = __float_as_uint(o[I][j][h]), y = __float_as_uint(o[I][j][2 + h]);
                if (Q8) {
                    attni_sts8(there + handed(r, column(j, 0)), x, y);
                } else {
                    attni_sts4(there + handed(r, column(j, 0)), x);
                    attni_sts4(there + handed(r, column(j, 2)), y);
                }
            }
    }

    // A span is through: folds the four states of each row, of which a lane has OWN columns.
    __device__ __forceinline__ void close(int32_t slots, int32_t slot, int last) {
        const uint32_t mine = ring + (uint32_t)(stage * STAGE);
        const uint32_t step = (uint32_t)(STAGES * STAGE); // of streams
        const uint32_t from = mine - (uint32_t)stream * step;
#pragma unroll
        for (int i = 0; i < S; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float sum = attni_oct_sum(l[i][h]);
                if (lane < 4) f->ml[stream][8 * i + 2 * lane + h] = make_float2(m[i][h], sum);
            }
#pragma unroll 1
        for (int i = 0; i < S; i++) {
            const int r = 8 * i + (lane >> 2);
            float2 y[4];
            float z[OWN], top, sum = 0;
            if (8 * i >= rows) break;
            if (i == 0) put<0>(mine);
            else if (i == 1) put<1 % S>(mine);
            else if (i == 2) put<2 % S>(mine);
            else put<3 % S>(mine);
            __syncthreads();
#pragma unroll
            for (int j = 0; j < 4; j++) y[j] = f->ml[j][r];
            top = fmaxf(fmaxf(y[0].x, y[1].x), fmaxf(y[2].x, y[3].x));
            const float zero = top == ATTNI_NINF ? 0.0f : top;
#pragma unroll
            for (int j = 0; j < OWN; j++) z[j] = 0;
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const float w = attni_exp2(y[t].x - zero);
                sum = __fmaf_rn(y[t].y, w, sum);
#pragma unroll
                for (int j = 0; j < OWN; j += 4) {
                    uint32_t u[4];
                    attni_lds16(u, from + (uint32_t)t * step +
                                       handed(lane >> 2,
                                              stream * (D / 4) + (lane & 3) * OWN + j));
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        z[j + e] = __fmaf_rn(__uint_as_float(u[e]), w, z[j + e]);
                }
            }
            __syncthreads(); // and the copies that come next may be made
            if (slots != 2) fold(r, &top, &sum, z);
            if (r >= rows || (slots != 2 && !last)) continue;
            if (slots) leave(r, top, sum, z, slot);
            else finish(r, top, sum, z);
        }
        reset();
    }

    // Nothing is summed as yet.
    __device__ __forceinline__ void clear(void) {
        const uint32_t none[4] = {0, 0, 0, 0};
        reset();
#pragma unroll 1
        for (int i = (int)threadIdx.x; i < rows * D / 4; i += 128)
            attni_sts16(total + 16u * i, none);
        for (int i = (int)threadIdx.x; i < 4 * 8 * S; i += 128)
            attni_sts8(total + (uint32_t)(32 * S * D + 8 * i), 0xff800000u, 0);
    }

    // ---- tasks

    // Asks for the next task's number, late, so that no block keeps work that others wait for; and
    // then for its record. The first warp calls.
    __device__ __forceinline__ void draw(int record) {
        if (drawn == -1) {
            drawn = 0;
            if (lane == 0) drawn = (int32_t)gridDim.x + atomicAdd(a.ticket + 2 * a.kind, 1);
        } else if (drawn >= 0 && record) {
            const int32_t i = __shfl_sync(~0u, drawn, 0);
            fetch(i);
            if (lane == 0) f->n_next = i;
            drawn = -2;
        }
    }
    __device__ __forceinline__ void fetch(int32_t i) const {
        int64_t from = i;
        if (a.kind == ATTNI_CU_SOME) from += a.header->n_tasks[ATTNI_CU_FEW];
        for (int e = lane; e < (int)sizeof(attni_cu_task) / 4 && from < a.cap_tasks; e += 32)
            attni_cp_async4(attni_smem(&f->next) + 4u * e,
                            (const int32_t *)(const void *)(a.task + from) + e, 4);
    }

    // The next task is at hand; false when there is none.
    __device__ __forceinline__ int take(void) {
        if (threadIdx.x < 32 && drawn != -2) {
            draw(0);
            draw(1);
        }
        attni_cp_commit();
        attni_cp_wait<0>();
        __syncthreads(); // the record is there, and the task before is through
        work = work == f->work ? f->work + 1 : f->work;
        drawn = -1;
        if (f->n_next >= a.header->n_tasks[a.kind]) return 0;
        if (threadIdx.x < sizeof(attni_cu_task) / 4)
            ((int32_t *)(void *)&work->task)[threadIdx.x] =
                ((const int32_t *)(const void *)&f->next)[threadIdx.x];
        if (threadIdx.x == 0) attni_cu_fresh(work);
        __syncthreads();
        return 1;
    }

    // The task at hand is begun: its first blocks are under way.
    __device__ __forceinline__ void begin(void) {
        prepare();
#pragma unroll 1
        for (int i = 0; i < 2; i++) look();
        stage = 0;
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) issue(i);
    }

    // All of it but for its arrival.
    __device__ __forceinline__ void run(void) {
        attni_cp_wait<STAGES - 1>();
        if (threadIdx.x < 32 && drawn >= 0) draw(1); // a short task
        clear();
        __syncthreads();
        if constexpr (Q8) {
            convert_q();
            __syncthreads();
        }
        const int32_t slots = work->task.slots, shift = work->task.span_shift;
        const int32_t span0 = work->task.span0;
        const int all = S > 1 && (Q8 || rows > 16); // strips (Q8: compile time)
        int32_t span = span0 - 1;
        for (int n = 0;; n++) {
            const uint32_t is = under_way[0], there = is & ATTNI_CU_IS_THERE;
            const int32_t b = (int32_t)(is >> ATTNI_CU_IS_BITS);
            const int last = !there || is & ATTNI_CU_IS_LAST;
            if (is & ATTNI_CU_IS_GAP) attni_cu_empty_spans(a, work, span + 1, b >> shift);
            if (there) {
                if (all) unit<S>(b, is & ATTNI_CU_IS_FULL);
                else unit<(S + 1) / 2>(b, is & ATTNI_CU_IS_FULL);
                __syncwarp();
            }
            if (there ? is & ATTNI_CU_IS_CLOSE : slots != 2) { // or nothing is to be read
                if (there) span = b >> shift;
                close(slots, slots == 2 ? span - span0 : 0, last);
            }
            if (last) break;
            if (!((n + STAGES) & 31)) look();
            issue(n + STAGES);
            attni_cp_wait<STAGES - 1>();
            __syncwarp();
        }
        if (slots == 2) attni_cu_empty_spans(a, work, span + 1, work->task.span1);
    }

    __device__ __forceinline__ void all(void) {
        work_t *before = NULL;
        if (S == 1 && threadIdx.x < 32) fetch((int32_t)blockIdx.x); // known without the header
        attni_cp_commit();
        if (!attni_cu_has_task(a)) {
            attni_cp_wait<0>();
            return;
        }
        if (S > 1 && threadIdx.x < 32) fetch((int32_t)blockIdx.x);
        if (threadIdx.x == 0) f->n_next = (int32_t)blockIdx.x;
        drawn = -2;
        for (;;) { // a task arrives when the next one is under way, so that nothing waits for it
            const int more = take();
            if (more) begin();
            if (before && S == 1) attni_cu_arrive(a, before);
            else if (before) attni_cu_arrive_far(a, before);
            if (!more) break;
            run();
            before = work;
        }
        if (threadIdx.x == 0) attni_cu_leave_tasks(a);
    }
};

template <int BF, int Q8, int D, int S>
static __global__ void __launch_bounds__(128, attni_cu_team_blocks(Q8, D, S))
    attni_cu_team_tasks(const __grid_constant__ attni_cu_args a) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(256) uint8_t smem[];
    attni_cu_team<BF, Q8, D, S> x(a, smem);
    x.all();
#endif
}

// ==== >>impl-simt  Any dtypes and dims, in f32 ===================================================
//
// 16 rows a tile. A thread has one token's scores of 8 rows, K passing through shared memory 32
// dims at a time, then NC columns of all 16 rows of O, V coming straight from its page.

#define ATTNI_CU_SIMT_ROWS 16
#define ATTNI_CU_SIMT_DIMS 32

typedef struct attni_cu_simt_tile {
    float q[ATTNI_CU_SIMT_ROWS][ATTNI_CU_SIMT_DIMS];
    float k[ATTNI_CU_BLOCK][ATTNI_CU_SIMT_DIMS + 1];
    float p[ATTNI_CU_SIMT_ROWS][ATTNI_CU_BLOCK];
    float scale[2][ATTNI_CU_BLOCK];
    float m[ATTNI_CU_SIMT_ROWS], l[ATTNI_CU_SIMT_ROWS], w[ATTNI_CU_SIMT_ROWS];
} attni_cu_simt_tile;

ATTNI_DEV_FAR float attni_cu_element(const uint8_t *row, attn_dtype t, int32_t e) {
    return attni_get(row, t, e);
}

// Scores of 8 rows against the thread's token, all dims.
ATTNI_DEV_FAR void attni_cu_simt_scores(const attni_cu_args &a, attni_cu_shared *s,
                                            attni_cu_simt_tile *x, float c[8]) {
    const int tid = (int)threadIdx.x, token = tid & 63, r0 = tid >> 6 << 3, dk = a.d.head_dim;
#pragma unroll
    for (int i = 0; i < 8; i++) c[i] = 0;
    for (int e0 = 0; e0 < dk; e0 += ATTNI_CU_SIMT_DIMS) {
        __syncthreads();
        for (int i = tid; i < ATTNI_CU_SIMT_ROWS * ATTNI_CU_SIMT_DIMS; i += ATTNI_CU_THREADS) {
            const attni_cu_row &y = s->row[i / ATTNI_CU_SIMT_DIMS];
            int e = e0 + i % ATTNI_CU_SIMT_DIMS;
            x->q[i / ATTNI_CU_SIMT_DIMS][i % ATTNI_CU_SIMT_DIMS] =
                y.token < 0 || e >= dk ? 0
                : attni_get(a.d.q.data, a.d.q.dtype, y.token * a.d.q.stride_token +
                                                         y.head * a.d.q.stride_head + e);
        }
        for (int i = tid; i < ATTNI_CU_BLOCK * ATTNI_CU_SIMT_DIMS; i += ATTNI_CU_THREADS) {
            int t = i / ATTNI_CU_SIMT_DIMS, e = e0 + i % ATTNI_CU_SIMT_DIMS;
            x->k[t][i % ATTNI_CU_SIMT_DIMS] =
                !s->k[t] || e >= dk ? 0 : attni_cu_element(s->k[t], a.k.dtype, e);
        }
        __syncthreads();
        for (int e = 0; e < ATTNI_CU_SIMT_DIMS; e++) {
            float k = x->k[token][e];
#pragma unroll
            for (int i = 0; i < 8; i++) c[i] = fmaf(x->q[r0 + i][e], k, c[i]);
        }
    }
}

// Scores -> weights in x->p, running maxima and sums; one warp has 4 rows.
ATTNI_DEV_FAR void attni_cu_simt_weights(const attni_cu_args &a, attni_cu_shared *s,
                                             attni_cu_simt_tile *x) {
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    for (int r = 4 * warp; r < 4 * warp + 4; r++) {
        float y0 = x->p[r][lane], y1 = x->p[r][lane + 32], top = fmaxf(y0, y1), base, sum;
        for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        top = fmaxf(top, x->m[r]);
        base = top == ATTNI_NINF ? 0.0f : top;
        y0 = exp2f(y0 - base);
        y1 = exp2f(y1 - base);
        sum = y0 + y1;
        for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        x->p[r][lane] = y0;
        x->p[r][lane + 32] = y1;
        __syncwarp();
        if (lane == 0) {
            float w = exp2f(x->m[r] - base);
            x->w[r] = w;
            x->l[r] = fmaf(x->l[r], w, sum);
            x->m[r] = top;
        }
    }
}

// Of row y and token t of block b.
ATTNI_DEV float attni_cu_simt_logit(const attni_cu_args &a, attni_cu_shared *s,
                                    const attni_cu_row &y, int32_t b, int t, float c) {
    const attn_logits *g = &a.d.logits;
    if (!a.mods) return c * a.scale;
    c *= a.scale;
    if (g->softcap > 0) c = g->softcap * tanhf(c / g->softcap);
    if (g->alibi || g->bias.data) c = attni_cu_extras(a, s, y, b, t, c);
    return c * ATTNI_LOG2E;
}

template <int NC>
static __device__ void attni_cu_simt_close(const attni_cu_args &a, attni_cu_shared *s,
                                           attni_cu_simt_tile *x, float o[ATTNI_CU_SIMT_ROWS][NC],
                                           int32_t slot) {
    const int tid = (int)threadIdx.x, vd = a.d.v_head_dim;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ATTNI_CU_SIMT_ROWS; r++) {
        const attni_cu_row &y = s->row[r];
        if (y.token < 0) continue;
        float lse, f = attni_cu_close(a, y.head, x->m[r], x->l[r], &lse);
        int64_t at = slot < 0 ? 0 : attni_cu_partial(a, s->task, r, y, slot);
        if (tid == 0 && slot >= 0)
            __stcg((float2 *)a.partial_ml + at, make_float2(x->m[r], x->l[r]));
        if (tid == 0 && slot < 0 && a.d.lse)
            a.d.lse[(int64_t)y.token * a.d.n_heads + y.head] = lse;
#pragma unroll
        for (int j = 0; j < NC; j++) {
            int col = tid + ATTNI_CU_THREADS * j;
            if (col >= vd) break;
            if (slot >= 0) __stcg(a.partial_o + at * vd + col, o[r][j]);
            else
                attni_cu_put(a, attni_cu_o(a, y.token, y.head), col,
                             x->l[r] == 0 ? 0 : o[r][j] * f);
            o[r][j] = 0;
        }
    }
    __syncthreads();
    if (tid < ATTNI_CU_SIMT_ROWS) x->m[tid] = ATTNI_NINF, x->l[tid] = 0;
    __syncthreads();
}

template <int NC>
static __device__ void attni_cu_simt_run(const attni_cu_args &a, attni_cu_shared *s,
                                         attni_cu_simt_tile *x) {
    const attni_cu_task &w = s->task;
    const int tid = (int)threadIdx.x, token = tid & 63, r0 = tid >> 6 << 3, vd = a.d.v_head_dim;
    int32_t span = -1;
    int32_t b, end = w.end_block;
    float o[ATTNI_CU_SIMT_ROWS][NC];
#pragma unroll
    for (int r = 0; r < ATTNI_CU_SIMT_ROWS; r++)
#pragma unroll
        for (int j = 0; j < NC; j++) o[r][j] = 0;
    if (tid < ATTNI_CU_SIMT_ROWS) x->m[tid] = ATTNI_NINF, x->l[tid] = 0;
    b = attni_cu_next(a, s, w, attni_cu_start(a, w));
    for (;; b = attni_cu_next(a, s, w, b + 1)) {
        float c[8];
        int32_t more = b < end, next = more ? b >> w.span_shift : w.span1;
        if (!more || next != span) {
            if (w.slots == 2 ? span >= 0 : !more)
                attni_cu_simt_close<NC>(a, s, x, o, w.slots == 2 ? span - w.span0
                                                    : w.slots ? 0 : -1);
            if (w.slots == 2) attni_cu_empty_spans(a, s, span < 0 ? w.span0 : span + 1, next);
            if (!more) break;
            span = next;
        }
        __syncthreads();
        if (tid < ATTNI_CU_BLOCK) {
            int32_t place, page = attni_cu_page_of(a, s, b, tid, &place);
            page = attni_cu_checked(a, s, page, place);
            s->k[tid] = page < 0 ? NULL : a.k.data + attni_cu_offset(a.k, page, place, w.kv_head);
            s->v[tid] = page < 0 ? NULL : a.v.data + attni_cu_offset(a.v, page, place, w.kv_head);
            for (int v = 0; v < 2; v++) {
                const attni_side &y = v ? a.v : a.k;
                x->scale[v][tid] = page < 0 ? 0
                                            : attni_scale_in(&y, y.data +
                                                                 attni_cu_page_offset(y, page),
                                                             place, w.kv_head);
            }
        }
        attni_cu_mask_rows(a, s, b);
        attni_cu_simt_scores(a, s, x, c);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int sees = (int)(s->bits[r0 + i] >> token & 1);
            x->p[r0 + i][token] =
                !sees ? ATTNI_NINF
                      : attni_cu_simt_logit(a, s, s->row[r0 + i], b, token,
                                            c[i] * x->scale[0][token]);
        }
        __syncthreads();
        attni_cu_simt_weights(a, s, x);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ATTNI_CU_SIMT_ROWS; r++)
#pragma unroll
            for (int j = 0; j < NC; j++) o[r][j] *= x->w[r];
        for (int t = 0; t < ATTNI_CU_BLOCK; t++) {
            if (!s->v[t] || !(s->seen >> t & 1)) continue;
#pragma unroll
            for (int j = 0; j < NC; j++) {
                int col = tid + ATTNI_CU_THREADS * j;
                if (col >= vd) break;
                float v = attni_cu_element(s->v[t], a.v.dtype, col) * x->scale[1][t];
#pragma unroll
                for (int r = 0; r < ATTNI_CU_SIMT_ROWS; r++)
                    o[r][j] = fmaf(x->p[r][t], v, o[r][j]);
            }
        }
    }
}

template <int NC>
static __global__ void __launch_bounds__(ATTNI_CU_THREADS)
    attni_cu_simt(const __grid_constant__ attni_cu_args a) {
    extern __shared__ __align__(256) uint8_t smem[];
    ATTNI_CU_TASKS(attni_cu_simt_run<NC>(
        a, s, (attni_cu_simt_tile *)(void *)(smem + (sizeof *s + 127) / 128 * 128)))
}

// ==== >>impl-store  Rows into pages, pages to pages ==============================================

typedef struct attni_cu_store_args {
    attn_desc d;
    attni_side side[2];
    attn_tensor src[2];          // strides resolved; data NULL: skip
    const int64_t *slots;        // NULL: by the tables
    const attn_plan_seq *seq;
    const int32_t *q_start;
    int64_t first, count;
    int32_t *error;
} attni_cu_store_args;

ATTNI_DEV int64_t attni_cu_own_slot(const attni_cu_store_args &a, int64_t t) {
    int32_t lo = 0, hi = a.d.n_seq, page;
    while (hi - lo > 1) {
        int32_t mid = (lo + hi) / 2;
        if (a.q_start[mid] <= t) lo = mid;
        else hi = mid;
    }
    while (a.q_start[lo + 1] <= t) lo++; // sequences without queries
    const attn_plan_seq *s = a.seq + lo;
    int64_t j = (int64_t)s->q_pos0 + (t - s->q_begin) - s->kv_pos0;
    if (j < 0 || j >= s->kv_len) return (int64_t)1 << 62;
    page = a.d.kv.page_table
               ? a.d.kv.page_table[lo * a.d.kv.page_table_stride + j / a.d.kv.page_tokens]
               : lo;
    if (page < 0) return (int64_t)1 << 62;
    return (int64_t)page * a.d.kv.page_tokens + j % a.d.kv.page_tokens;
}

// Two elements at once, so that a warp's go over a bus in one piece.
ATTNI_DEV void attni_cu_put_pair(uint8_t *to, uint64_t pair, int bytes) {
    if ((uintptr_t)to % (unsigned)bytes) {
        for (int i = 0; i < bytes; i++) to[i] = (uint8_t)(pair >> 8 * i);
    } else if (bytes == 8) *(uint64_t *)(void *)to = pair;
    else if (bytes == 4) *(uint32_t *)(void *)to = (uint32_t)pair;
    else if (bytes == 2) *(uint16_t *)(void *)to = (uint16_t)pair;
    else *to = (uint8_t)pair;
}

// One row of one head, by one warp; the CPU's arithmetic. A page and its copy are written.
ATTNI_DEV void attni_cu_store_row(const attni_side &s, const attn_tensor &from, int64_t at,
                                  int64_t page, int32_t place, int32_t head) {
    const int lane = (int)threadIdx.x & 31;
    uint8_t *base = s.data + page * s.page_bytes, *to = base + attni_token_offset(&s, place, head);
    const int64_t copy = attni_page_data(&s, page) - base; // 0: there is none
    float scale = 1.0f;
    if (attni_is_scaled(s.dtype)) {
        if (s.head_scale) scale = s.head_scale[head];
        else {
            uint32_t top = 0; // on the bits, where NaN is above everything
            for (int e = lane; e < s.dim; e += 32) {
                uint32_t u = attni_bits32(attni_get(from.data, from.dtype, at + e)) & 0x7fffffffu;
                top = u > top ? u : top;
            }
            for (int i = 16; i; i /= 2) {
                uint32_t u = __shfl_xor_sync(~0u, top, i);
                top = u > top ? u : top;
            }
            scale = __fdiv_rn(attni_float(top), attni_code_max(s.dtype));
            if (attni_isnan(scale)) scale = attni_float(0x7fc00000u);
            for (int i = 0; lane == 0 && i < 1 + (copy != 0); i++)
                memcpy(base + i * copy + attni_scale_offset(&s, place, head), &scale, 4);
        }
    }
    const int bytes = attni_bits_of(s.dtype) / 4; // of two elements
    for (int e = 2 * lane; e < s.dim; e += 64) {
        uint64_t pair = 0;
        for (int i = 0; i < 2; i++) {
            float y = attni_get(from.data, from.dtype, at + e + i);
            if (attni_is_scaled(s.dtype)) {
                y = attni_bits32(scale) << 1 ? __fdiv_rn(y, scale) : 0.0f;
                if (attni_isnan(y)) y = attni_float(0x7fc00000u);
            }
            attni_put(&pair, s.dtype, i, y);
        }
        attni_cu_put_pair(to + e / 2 * bytes, pair, bytes);
        if (copy) attni_cu_put_pair(to + copy + e / 2 * bytes, pair, bytes);
    }
}

static __global__ void __launch_bounds__(128)
    attni_cu_store_rows(const __grid_constant__ attni_cu_store_args a) {
    const int64_t heads = a.d.n_kv_heads, n = a.count * heads;
    for (int64_t i = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5); i < n; i += gridDim.x * 4) {
        int64_t t = a.first + i / heads, slot = a.slots ? a.slots[t] : attni_cu_own_slot(a, t);
        int32_t head = (int32_t)(i % heads);
        if (slot < 0) continue;
        if (slot >= (int64_t)a.d.kv.n_pages * a.d.kv.page_tokens) {
            if (a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
            continue;
        }
        for (int v = 0; v < 2; v++)
            if (a.src[v].data)
                attni_cu_store_row(a.side[v], a.src[v],
                                   t * a.src[v].stride_token + head * a.src[v].stride_head,
                                   slot / a.d.kv.page_tokens,
                                   (int32_t)(slot % a.d.kv.page_tokens), head);
    }
}

#define ATTNI_CU_COPIES 256

typedef struct attni_cu_copy_args {
    attni_side side[2];
    int32_t n_sides, heads, n;
    attn_page_copy copy[ATTNI_CU_COPIES];
} attni_cu_copy_args;

// Copies that do not depend on each other: block x is the copy, y one of its tokens.
static __global__ void __launch_bounds__(128)
    attni_cu_copy_rows(const __grid_constant__ attni_cu_copy_args a) {
    const attn_page_copy c = a.copy[blockIdx.x];
    for (int v = 0; v < a.n_sides; v++) {
        const attni_side &s = a.side[v];
        const uint8_t *from = attni_page_data(&s, c.src);
        uint8_t *to = s.data + c.dst * s.page_bytes;
        const int64_t copy = attni_page_data(&s, c.dst) - to; // 0: there is none
        int32_t units = s.dim * attni_bits_of(s.dtype) / 32;
        for (int32_t t = (int32_t)blockIdx.y; t < c.n_tokens; t += (int32_t)gridDim.y)
            for (int32_t i = (int32_t)threadIdx.x; i < a.heads * units; i += 128) {
                int64_t at = attni_token_offset(&s, t, i / units) + 4 * (i % units);
                uint32_t u;
                memcpy(&u, from + at, 4);
                memcpy(to + at, &u, 4);
                if (copy) memcpy(to + copy + at, &u, 4);
                if (s.scale_offset < 0 || i % units) continue;
                at = attni_scale_offset(&s, t, i / units);
                memcpy(&u, from + at, 4);
                memcpy(to + at, &u, 4);
                if (copy) memcpy(to + copy + at, &u, 4);
            }
    }
}

#define ATTNI_CU_STATES 16

typedef struct attni_cu_merge_args {
    attn_tensor o[ATTNI_CU_STATES], out;
    const float *lse[ATTNI_CU_STATES];
    float *lse_out;
    int64_t n_tokens;
    int32_t n, n_heads, dim;
} attni_cu_merge_args;

// One warp for a row.
static __global__ void __launch_bounds__(128)
    attni_cu_merge_states(const __grid_constant__ attni_cu_merge_args a) {
    const int64_t i = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
    const int lane = (int)threadIdx.x & 31;
    if (i >= a.n_tokens * a.n_heads) return;
    const int64_t t = i / a.n_heads, h = i % a.n_heads;
    float m = ATTNI_NINF, l = 0, w0, w1;
    for (int k = 0; k < a.n; k++) m = fmaxf(m, a.lse[k][i]);
    const float base = m == ATTNI_NINF ? 0 : m;
    for (int k = 0; k < a.n; k++) l += expf(a.lse[k][i] - base);
    for (int e = lane; e < a.dim; e += 32) {
        float x = 0;
        for (int k = 0; k < a.n; k++) {
            w1 = expf(a.lse[k][i] - base);
            w0 = attni_get(a.o[k].data, a.o[k].dtype,
                           t * a.o[k].stride_token + h * a.o[k].stride_head + e);
            if (w1 != 0) x = fmaf(w0, w1, x);
        }
        attni_put(a.out.data, a.out.dtype, t * a.out.stride_token + h * a.out.stride_head + e,
                  l == 0 ? 0 : x / l);
    }
    __syncwarp();
    if (lane == 0 && a.lse_out) a.lse_out[i] = l == 0 ? ATTNI_NINF : m + logf(l);
}

// ==== >>impl-cache  Pages in host memory behind copies on the device =============================
//
// A run looks every page up first: resolved tables name a page that has a copy in slot i by
// n_pages + i. So kernels find pages as ever, but for an addition (attni_cu_page_offset). What a
// run reads is counted by a pass of its own over its tasks, in nobody's way.

typedef struct attni_cu_resolve_args {
    const attni_cu_header *header;
    const attn_plan_seq *seq;
    const int32_t *table;      // (n_seq, stride); NULL: sequence i is page i
    int32_t *resolved;         // (n_seq, capacity)
    const int32_t *slot;
    int32_t *error;
    int64_t stride, capacity;
    int32_t n_pages, n_slots, page_tokens;
} attni_cu_resolve_args;

// A page without a valid id is -1 for kernels to report if they read it; one whose slot is none is
// read where it lies.
static __global__ void __launch_bounds__(256)
    attni_cu_resolve_pages(const __grid_constant__ attni_cu_resolve_args a) {
    for (int32_t s = (int32_t)blockIdx.y; s < a.header->n_seq; s += (int32_t)gridDim.y) {
        const int32_t kv_len = a.seq[s].kv_len, n = kv_len ? (kv_len - 1) / a.page_tokens + 1 : 0;
        int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
        for (; i < n; i += (int64_t)gridDim.x * 256) {
            int32_t id = a.table ? a.table[s * a.stride + i] : s, slot = -1;
            if ((uint32_t)id < (uint32_t)a.n_pages) slot = a.slot[id];
            else id = -1;
            if (slot < -1 || slot >= a.n_slots) {
                if (a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
                slot = -1;
            }
            a.resolved[s * a.capacity + i] = slot < 0 ? id : a.n_pages + slot;
        }
    }
}

// Counts for every page the blocks of 64 positions from `from` to `to` that lie in it.
ATTNI_DEV void attni_cu_count_run(const attni_cu_args &a, const attni_cu_task &w, int32_t from,
                                  int32_t to, uint32_t n) {
    const int32_t pt = a.d.kv.page_tokens, p0 = attni_cu_page_index(a, from - w.pos0);
    int64_t p = p0 + (int64_t)threadIdx.x;
    for (; from < to && p <= attni_cu_page_index(a, to - 1 - w.pos0); p += ATTNI_CU_THREADS) {
        const int32_t lo = (int32_t)attni_max64(p * pt + w.pos0, from) / ATTNI_CU_BLOCK;
        const int32_t hi = (int32_t)(attni_min64((p + 1) * pt + w.pos0, to) - 1) / ATTNI_CU_BLOCK;
        int32_t id = w.seq;
        if (a.d.kv.page_table) id = __ldg(attni_cu_page_at(a, w.seq, (int32_t)p));
        if ((uint32_t)id < (uint32_t)a.d.kv.n_pages)
            atomicAdd(&a.reads[id], n * (uint32_t)(hi - lo + 1));
    }
}

// Walks the blocks of tasks as kernels do and counts the pages in them: a warp has a block, a lane
// two of its tokens. Where heads read alike, the first one's tasks count for all. The tables are
// not resolved.
static __global__ void __launch_bounds__(ATTNI_CU_THREADS)
    attni_cu_count_reads(const __grid_constant__ attni_cu_args a) {
    __shared__ attni_cu_shared s;
    const attn_mask *m = &a.d.mask;
    const int alike = !m->stride.block && (!m->blocks.row_start || m->blocks.n_lists == 1) &&
                      (!m->vslash.block || m->vslash.n_lists == 1);
    const uint32_t n = alike ? (uint32_t)(a.d.n_heads / a.group) : 1;
    const int32_t warp = (int32_t)threadIdx.x >> 5, lane = (int32_t)threadIdx.x & 31;
    for (int32_t i = (int32_t)blockIdx.x; attni_cu_draw(a, &s, i); i += (int32_t)gridDim.x) {
        const attni_cu_task &w = s.task;
        if (alike && w.head) continue;
        if (!a.sparse) {
            const int32_t begin = attni_max32(attni_cu_start(a, w) * ATTNI_CU_BLOCK, w.pos0);
            attni_cu_count_run(a, w, begin, attni_min32(w.sink_end, w.lo), n);
            attni_cu_count_run(a, w, w.lo, w.hi, n);
            continue;
        }
        s.row[threadIdx.x] = attni_cu_get_row(a, w, (int)threadIdx.x); // as many as threads
        __syncthreads();
        attni_cu_terms(a, &s, attni_cu_shared::ROWS);
        int32_t b = attni_cu_next(a, &s, w, attni_cu_start(a, w)), turn = 0;
        for (; b < w.end_block; b = attni_cu_next(a, &s, w, b + 1)) {
            int32_t page[2], place, before;
            if ((turn++ & 3) != warp) continue;
            for (int e = 0; e < 2; e++) {
                page[e] = attni_cu_page_of(a, &s, b, 2 * lane + e, &place);
                page[e] = attni_cu_checked(a, &s, page[e], place);
            }
            before = __shfl_up_sync(~0u, page[1], 1);
            if (page[0] >= 0 && (lane == 0 || page[0] != before)) atomicAdd(&a.reads[page[0]], n);
            if (page[1] >= 0 && page[1] != page[0]) atomicAdd(&a.reads[page[1]], n);
        }
    }
}

#define ATTNI_CU_LOADS 256 /* of a launch */

typedef struct attni_cu_load_args {
    attni_side side[2];
    int32_t n_sides, odd;
    attn_cache_load load[ATTNI_CU_LOADS];
} attni_cu_load_args;

// Block x is the load, y a part of it.
static __global__ void __launch_bounds__(256)
    attni_cu_load_pages(const __grid_constant__ attni_cu_load_args a) {
    const attn_cache_load l = a.load[blockIdx.x];
    const int64_t step = (int64_t)gridDim.y * 256, first = (int64_t)blockIdx.y * 256 + threadIdx.x;
    for (int v = 0; v < a.n_sides; v++) {
        const attni_side &s = a.side[v];
        const uint8_t *from = s.data + l.page * s.page_bytes;
        uint8_t *to = s.copies + l.slot * s.page_bytes;
        const int64_t n = a.odd ? 0 : s.need_bytes / 16;
#pragma unroll 4
        for (int64_t i = first; i < n; i += step)
            ((uint4 *)(void *)to)[i] = ((const uint4 *)(const void *)from)[i];
        for (int64_t i = 16 * n + first; i < s.need_bytes; i += step) to[i] = from[i];
    }
}

// ==== >>impl-host  Choosing, planning, uploading, launching ======================================

typedef void (*attni_cu_kernel)(attni_cu_args);

// X(bf16, quantised pages, head_dim, v_head_dim): 64 and 128 exactly, else the most.
#ifndef ATTN_CUDA_KERNELS
#define ATTN_CUDA_KERNELS(X)                                                                       \
    X(1, 0, 64, 64) X(1, 0, 128, 128) X(1, 0, 256, 256) X(1, 0, 576, 512)                          \
    X(0, 0, 64, 64) X(0, 0, 128, 128) X(0, 0, 256, 256) X(0, 0, 576, 512)                          \
    X(1, 1, 64, 64) X(1, 1, 128, 128) X(1, 1, 256, 256)                                            \
    X(0, 1, 64, 64) X(0, 1, 128, 128) X(0, 1, 256, 256)
#endif

enum { // in attn_cuda_plan.n, behind a number of tasks for each kind
    ATTNI_CU_N_BLOCKS = ATTNI_CU_KINDS, ATTNI_CU_N_PARTIALS = 2 * ATTNI_CU_KINDS, ATTNI_CU_N_TOKENS,
    ATTNI_CU_N_SEQS, ATTNI_CU_N_MERGES, ATTNI_CU_N_CLEARED
};

typedef struct attni_cu_choice { // kernels of a problem
    attni_cu_kernel kernel[ATTNI_CU_KINDS]; // SOME, MANY may be NULL: FEW does it all
    int smem[ATTNI_CU_KINDS];
    int threads[ATTNI_CU_KINDS];
    int rows[ATTNI_CU_KINDS];               // of a tile
    int at_once;                            // tasks of FEW on a multiprocessor, about
    int32_t id;                             // the same for the same kernels
    const char *name;
} attni_cu_choice;

static int attni_cu_max2(int a, int b) { return a > b ? a : b; }

template <int BF, int Q8, int D, int S>
static void attni_cu_fill_team(int kind, attni_cu_choice *c) {
    c->kernel[kind] = attni_cu_team_tasks<BF, Q8, D, S>;
    c->smem[kind] = attni_cu_team_smem(Q8, D, S);
    c->threads[kind] = 128;
    c->rows[kind] = 8 * S;
}

template <int BF, int Q8, int DK, int DV>
static void attni_cu_fill(int arch, int mods, attni_cu_choice *c) {
    constexpr int EXACT = DK <= 128, MK = EXACT ? DK : 64, MV = EXACT ? DV : 64;
    // scores with extras are rare: one kernel for all head dims
    constexpr int WK = EXACT ? 256 : DK, WV = EXACT ? 256 : DV;
    const int plain = EXACT && arch >= 80 && !mods;
    c->threads[ATTNI_CU_FEW] = c->threads[ATTNI_CU_MANY] = ATTNI_CU_THREADS;
    c->at_once = 2;
    if (plain) {
        constexpr int TEAM_BF = Q8 ? 0 : BF; // codes become f16, whatever Q is
        c->at_once = attni_cu_team_blocks(Q8, MK, 1);
        attni_cu_fill_team<TEAM_BF, Q8, MK, 1>(ATTNI_CU_FEW, c);
        attni_cu_fill_team<TEAM_BF, Q8, MK, 4>(ATTNI_CU_SOME, c);
    } else if (EXACT && arch >= 80) {
        c->kernel[ATTNI_CU_FEW] = attni_cu_few<BF, Q8, WK, WV>;
        c->smem[ATTNI_CU_FEW] = attni_cu_smem_bytes(arch, Q8, WK, WV, 0);
        c->rows[ATTNI_CU_FEW] = 16;
    } else {
        c->kernel[ATTNI_CU_FEW] = attni_cu_few<BF, Q8, DK, DV>;
        c->smem[ATTNI_CU_FEW] =
            attni_cu_max2(attni_cu_smem_bytes(arch, Q8, DK, DV, 0),
                          EXACT ? attni_cu_smem_bytes(arch, Q8, DK, DV, 1) : 0);
        c->rows[ATTNI_CU_FEW] = EXACT && !mods ? 64 : 16;
    }
    if (DK > 256) return;
    c->kernel[ATTNI_CU_MANY] =
        plain ? attni_cu_many<BF, Q8, MK, MV, 2> : attni_cu_many<BF, Q8, 256, 256, 1>;
    c->smem[ATTNI_CU_MANY] = plain ? attni_cu_smem_bytes(arch, Q8, DK, DV, 2)
                                   : attni_cu_smem_bytes(arch, Q8, 256, 256, 1);
    c->rows[ATTNI_CU_MANY] = plain ? 128 : 64;
}

static void attni_cu_fill_simt(int32_t vd, attni_cu_choice *c) {
    memset(c, 0, sizeof *c);
    c->kernel[ATTNI_CU_FEW] = vd <= 256 ? attni_cu_simt<2> : attni_cu_simt<5>;
    c->smem[ATTNI_CU_FEW] =
        (int)((sizeof(attni_cu_shared) + 127) / 128 * 128 + sizeof(attni_cu_simt_tile));
    c->threads[ATTNI_CU_FEW] = ATTNI_CU_THREADS;
    c->at_once = 2;
    c->rows[ATTNI_CU_FEW] = ATTNI_CU_SIMT_ROWS;
    c->id = vd <= 256 ? 1 : 2;
    c->name = "simt";
}

static int attni_cu_misaligned(int64_t a, int64_t b, int64_t c, int64_t n) {
    return ((a | b | c) & (n - 1)) != 0;
}

// Do the tensor-core kernels know this dtype and head dim? What follows must not depend on strides
// or addresses: another executor has other bits.
static int attni_cu_side_fits(const attni_side *s, attn_dtype q) {
    if (s->dtype != q && !attni_is_scaled(s->dtype)) return 0;
    if (attni_is_scaled(s->dtype) && s->dim % 16) return 0;
    return s->dim * attni_bits_of(s->dtype) / 8 % 16 == 0;
}

static int attni_cu_mma_fits(const attn_cuda *c, const attn_desc *d, const attni_side *k,
                             const attni_side *v) {
    if (d->q.dtype == ATTN_F32 || d->o.dtype == ATTN_F32) return 0;
    if (d->q.dtype == ATTN_BF16 && d->o.dtype == ATTN_F16) return 0; // finer than weights in bf16
    if (c->arch < 80 && d->q.dtype == ATTN_BF16) return 0;
    if (attni_is_scaled(k->dtype) != attni_is_scaled(v->dtype)) return 0;
    return attni_cu_side_fits(k, d->q.dtype) && attni_cu_side_fits(v, d->q.dtype);
}

static int attni_cu_odd_side(const attni_side *s) {
    return attni_cu_misaligned(s->page_bytes | (int64_t)(uintptr_t)s->data |
                                   (int64_t)(uintptr_t)s->copies,
                               s->token_bytes, s->head_bytes, 16) ||
           (s->head_scale && (uintptr_t)s->head_scale % 4);
}

static void attni_cu_alignment(attni_cu_args *a) {
    const attn_tensor *q = &a->d.q, *o = &a->d.o;
    a->odd_rows = attni_cu_odd_side(&a->k) || attni_cu_odd_side(&a->v);
    a->odd_q = attni_cu_misaligned((int64_t)(uintptr_t)q->data, 2 * q->stride_token,
                                   2 * q->stride_head, 16);
    a->odd_o = attni_cu_misaligned((int64_t)(uintptr_t)o->data, 2 * o->stride_token,
                                   2 * o->stride_head, 4);
}

// Can kernels take 64 rows of this side in one piece, found with 32 bits?
static int attni_cu_in_pieces(const attni_cu_args *a, const attni_side *s) {
    const int32_t n = attni_max32(a->d.kv.n_pages, s->copies ? s->n_slots : 0);
    return !a->odd_rows && (!a->d.kv.page_table || a->page_shift >= 6) &&
           s->token_bytes < INT32_MAX / 64 && s->page_bytes >> 4 <= UINT32_MAX / n;
}

// Do rows of Q or O lie at multiples of 16 bytes that 32 bits count?
static int attni_cu_wide(const attn_desc *d, const attn_tensor *x, int64_t n_tokens) {
    return !attni_cu_misaligned((int64_t)(uintptr_t)x->data, 2 * x->stride_token,
                                2 * x->stride_head, 16) &&
           x->stride_token >= 0 && x->stride_head >= 0 &&
           x->stride_token / 8 <= INT32_MAX / (n_tokens + 1) &&
           x->stride_head / 8 <= INT32_MAX / d->n_heads;
}

// Strides and the value head dim as they are.
static attn_desc attni_cu_resolved(const attn_desc *d) {
    attn_desc c = *d;
    c.v_head_dim = attni_v_dim(d);
    if (!c.q.stride_token) c.q.stride_token = (int64_t)d->n_heads * d->head_dim;
    if (!c.q.stride_head) c.q.stride_head = d->head_dim;
    if (!c.o.stride_token) c.o.stride_token = (int64_t)d->n_heads * c.v_head_dim;
    if (!c.o.stride_head) c.o.stride_head = c.v_head_dim;
    return c;
}

// Do scores need more than a positive scale?
static int attni_cu_mods(const attn_desc *d) {
    return d->logits.softcap > 0 || d->logits.alibi || d->logits.bias.data || attni_scale(d) <= 0;
}

static attn_result attni_cu_choose(const attn_cuda *c, const attn_desc *d, attni_cu_choice *out) {
    attn_desc x;
    attni_side k, v;
    attn_result r;
    int bf, q8, dk, dv;
    if (!c || !d || d->n_seq < 1 || d->n_heads < 1 || d->n_kv_heads < 1) return ATTN_ERR_ARGUMENT;
    if (d->n_heads % d->n_kv_heads || d->n_heads > 65536) return ATTN_ERR_SHAPE;
    x = attni_cu_resolved(d);
    if (d->head_dim < 8 || d->head_dim % 8 || d->head_dim > ATTN_MAX_HEAD_DIM ||
        x.v_head_dim < 8 || x.v_head_dim % 8 || x.v_head_dim > ATTN_MAX_HEAD_DIM)
        return ATTN_ERR_SHAPE;
    if (!attni_is_float(d->q.dtype) || !attni_is_float(d->o.dtype) ||
        !attni_bits_of(d->kv.k.dtype) || !attni_bits_of(d->kv.v.dtype))
        return ATTN_ERR_DTYPE;
    if (d->kv.page_tokens < 1 || d->kv.n_pages < 1) return ATTN_ERR_ARGUMENT;
    if ((int)d->kv.layout < 0 || d->kv.layout > ATTN_K16) return ATTN_ERR_LAYOUT;
    if ((r = attni_side_init(d, 0, &k)) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &v)) != ATTN_OK) return r;
    attni_cu_fill_simt(x.v_head_dim, out);
    if (!attni_cu_mma_fits(c, d, &k, &v)) return ATTN_OK;
    attni_cu_choice m;
    memset(&m, 0, sizeof m);
    bf = d->q.dtype == ATTN_BF16;
    q8 = attni_is_scaled(k.dtype);
    dk = attni_max32(x.head_dim, x.v_head_dim);
    dk = x.head_dim == 64 && x.v_head_dim == 64     ? 64
         : x.head_dim == 128 && x.v_head_dim == 128 ? 128
         : dk <= 256 ? 256 : x.v_head_dim <= 512 ? 576 : 0;
    dv = dk == 576 ? 512 : dk;
    (void)(bf + q8 + dv); // no kernels, no use
#define ATTNI_X(B, Q, DK, DV)                                                                      \
    if (bf == B && q8 == Q && dk == DK && dv == DV)                                                \
        attni_cu_fill<B, Q, DK, DV>(c->arch, attni_cu_mods(d), &m);
    ATTN_CUDA_KERNELS(ATTNI_X)
#undef ATTNI_X
    if (!m.kernel[ATTNI_CU_FEW] || m.smem[ATTNI_CU_FEW] > c->smem_bytes) return ATTN_OK;
    for (int i = ATTNI_CU_SOME; i < ATTNI_CU_KINDS; i++)
        if (m.smem[i] > c->smem_bytes) m.kernel[i] = NULL, m.rows[i] = 0; // FEW does it all
    m.id = 16 + dk * 8 + attni_cu_mods(d) * 4 + bf * 2 + q8;
    m.name = bf ? q8 ? "mma.bf16+dequant" : "mma.bf16" : q8 ? "mma.f16+dequant" : "mma.f16";
    *out = m;
    return ATTN_OK;
}

static __global__ void attni_cu_probe(void) {}

// Lets the kernels have the shared memory they want.
static attn_result attni_cu_allow(const attn_cuda *c, const attni_cu_choice *k) {
    for (int i = 0; i < ATTNI_CU_KINDS; i++)
        if (k->kernel[i] && k->smem[i] <= c->smem_bytes &&
            cudaFuncSetAttribute((const void *)k->kernel[i],
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 k->smem[i]) != cudaSuccess)
            return ATTN_ERR_DEVICE;
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_open(attn_cuda *c, int32_t device) {
    struct cudaFuncAttributes attr;
    attni_cu_choice k;
    attn_result r;
    int n = 0, major = 0, minor = 0;
    if (!c) return ATTN_ERR_ARGUMENT;
    if (cudaGetDeviceCount(&n) != cudaSuccess) return ATTN_ERR_DEVICE;
    if (device < 0 || device >= n) return ATTN_ERR_ARGUMENT;
    if (cudaSetDevice(device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&c->n_sm, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&c->smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
            cudaSuccess)
        return ATTN_ERR_DEVICE;
    if (10 * major + minor < 75) return ATTN_ERR_UNSUPPORTED;
    if (cudaFuncGetAttributes(&attr, attni_cu_probe) != cudaSuccess) return ATTN_ERR_DEVICE;
    c->device = device;
    c->arch = attr.ptxVersion; // of the text: an older one may have been compiled for a newer GPU
#define ATTNI_X(B, Q, DK, DV)                                                                      \
    for (n = 0; n < 2; n++) {                                                                      \
        memset(&k, 0, sizeof k);                                                                   \
        attni_cu_fill<B, Q, DK, DV>(c->arch, n, &k);                                               \
        if ((r = attni_cu_allow(c, &k)) != ATTN_OK) return r;                                      \
    }
    ATTN_CUDA_KERNELS(ATTNI_X)
#undef ATTNI_X
    for (n = 256; n <= 512; n *= 2) {
        attni_cu_fill_simt(n, &k);
        if ((r = attni_cu_allow(c, &k)) != ATTN_OK) return r;
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_supports(const attn_cuda *c, const attn_desc *d) {
    if (!c || !d) return ATTN_ERR_ARGUMENT;
    if (d->kv.layout == ATTN_K16 || d->numerics == ATTN_NUMERICS_PORTABLE)
        return ATTN_ERR_UNSUPPORTED;
    return ATTN_OK;
}

ATTN_DEF const char *attn_cuda_executor(const attn_cuda *c, const attn_desc *d) {
    attni_cu_choice k;
    return attni_cu_choose(c, d, &k) == ATTN_OK ? k.name : "none";
}

// Rows of a tile where queries are few.
static int32_t attni_cu_few_rows(const attni_cu_choice *k) {
    return attni_max32(k->rows[ATTNI_CU_FEW], k->rows[ATTNI_CU_SOME]);
}

// So many tiles become of a KV head's task: one for each query head where masks differ between
// them, more than one where the group is larger than a tile.
static int32_t attni_cu_split(const attn_desc *d, const attni_cu_choice *k) {
    int32_t group = d->n_heads / d->n_kv_heads, part = attni_cu_few_rows(k);
    if (attni_per_head(d)) return group;
    for (part = attni_min32(part, group); group % part;) part--;
    return group / part;
}

// ---- plan parameters

#define ATTNI_CU_FEW_Q 64 /* queries of a sequence that tiles of FEW take */

static void attni_cu_rule(attn_plan_params *p, int *n, int32_t q, int32_t kv, int32_t span,
                          int32_t tile, int no_fold) {
    attn_span_rule *r = &p->rule[(*n)++];
    r->max_q_len = q;
    r->max_kv_len = kv;
    r->span = span;
    r->row_tile = tile;
    r->no_fold = no_fold;
}

ATTN_DEF void attn_cuda_plan_params(const attn_cuda *c, const attn_desc *d, attn_plan_params *out) {
    static const int32_t few[6][2] = {{2048, 128},   {4096, 256},   {8192, 512},
                                      {16384, 1024}, {32768, 2048}, {0, 4096}};
    const int32_t whole = 1 << 30;
    attni_cu_choice k;
    int64_t rows, bytes, must = 0, most = (int64_t)256 << 20, least = (int64_t)16 << 20;
    int32_t s, i, h, tile, codes, size;
    int n = 0;
    if (!out) return;
    memset(out, 0, sizeof *out);
    if (attni_cu_choose(c, d, &k) != ATTN_OK) return;
    // a lone sequence should keep the device busy; more sequences do so by themselves. Codes of a
    // span are of half the bytes. A list for each head makes as many tiles of a span.
    h = 1;
    while (h < 8 && 2 * h * d->n_kv_heads <= 8) h *= 2;
    codes = 1 + (attni_is_scaled(d->kv.k.dtype) && attni_is_scaled(d->kv.v.dtype));
    tile = attni_cu_split(d, &k);
    for (size = codes; attni_per_head(d) && size < codes * tile;) size *= 2;
    for (i = 0; i < 6; i++)
        attni_cu_rule(out, &n, k.kernel[ATTNI_CU_MANY] ? ATTNI_CU_FEW_Q : 0, few[i][0],
                      attni_max32(64, size * few[i][1] / h), tile * attni_cu_few_rows(&k),
                      k.id < 16);
    if (k.kernel[ATTNI_CU_MANY]) {
        tile *= k.rows[ATTNI_CU_MANY];
        attni_cu_rule(out, &n, 512, 4096, whole, tile, 1);
        attni_cu_rule(out, &n, 512, 32768, 4096, tile, 1);
        attni_cu_rule(out, &n, 512, 0, 16384, tile, 1);
        attni_cu_rule(out, &n, 0, 0, whole, tile, 1);
    }
    out->workers = c->n_sm;
    out->tasks_per_worker = (float)k.at_once;
    out->cost_kv_token = 80; // bytes of a token at an SM's share of bandwidth, in row x token units
    out->cost_row_token = 3;
    out->cost_partial = 60;
    if (!d->q_start || !d->kv.kv_len) return;
    bytes = 0;
    for (s = 0; s < d->n_seq; s++) {
        int32_t q_len = d->q_start[s + 1] - d->q_start[s], span = whole, no_fold = 0;
        if (q_len < 0 || d->kv.kv_len[s] < 0) return;
        for (i = n - 1; i >= 0; i--)
            if ((!out->rule[i].max_q_len || q_len <= out->rule[i].max_q_len) &&
                (!out->rule[i].max_kv_len || d->kv.kv_len[s] <= out->rule[i].max_kv_len))
                span = out->rule[i].span, no_fold = out->rule[i].no_fold;
        rows = (int64_t)q_len * d->n_heads * (d->kv.kv_len[s] / span + 2);
        if (span == whole) rows = 0; // tasks of all keys write O
        bytes += rows * 4 * (attni_v_dim(d) + 2);
        if (no_fold) must += rows * 4 * (attni_v_dim(d) + 2);
        if (bytes > (int64_t)1 << 50) return;
    }
    bytes = attni_max64(attni_min64(bytes, most), attni_max64(must, least));
    out->partial_bytes = (size_t)bytes;
}

// ---- the image
//
// Sections at offsets that capacities decide, so that captured launches stay right.

enum {
    ATTNI_CU_HEADER, ATTNI_CU_TICKET, ATTNI_CU_ARRIVED, ATTNI_CU_TASK, ATTNI_CU_SEQ,
    ATTNI_CU_ORDER, ATTNI_CU_TOKEN0, ATTNI_CU_LINK, ATTNI_CU_UNIT0, ATTNI_CU_EXPECTED,
    ATTNI_CU_MERGE, ATTNI_CU_Q_START, ATTNI_CU_SEQ_ROW, ATTNI_CU_PARENT, ATTNI_CU_ROW_START,
    ATTNI_CU_ROW_END, ATTNI_CU_BLOCKS, ATTNI_CU_BITS, ATTNI_CU_COL_START, ATTNI_CU_COL,
    ATTNI_CU_DIAG_START, ATTNI_CU_DIAG, ATTNI_CU_PAGES, ATTNI_CU_RESOLVED, ATTNI_CU_SECTIONS
};

// Was the image laid out for pages with copies?
static int attni_cu_may_resolve(const attn_cuda_plan *g) {
    return g->at[ATTNI_CU_RESOLVED + 1] > g->at[ATTNI_CU_RESOLVED];
}

static int64_t attni_cu_entries(const attn_block_list *b) { // one in host memory
    int64_t n = 0, l, row;
    for (l = 0; l < b->n_lists; l++)
        for (row = b->row_end ? 0 : b->n_rows - 1; row < b->n_rows; row++)
            n = attni_max64(n, attni_row_end(b, l, row));
    return n;
}

static int64_t attni_cu_bit_words(const attn_block_list *b) {
    return b->bits ? ((int64_t)b->bits_rows * b->bits_cols + 63) / 64 : 0;
}

// Bytes that the tables of d fill in each section (tasks, links, units: not here).
static void attni_cu_table_bytes(const attn_desc *d, int64_t seqs, int64_t tokens, int64_t pages,
                                 int64_t bytes[ATTNI_CU_SECTIONS]) {
    const attn_block_list *b = &d->mask.blocks;
    const attn_vertical_slash *v = &d->mask.vslash;
    bytes[ATTNI_CU_HEADER] = (int64_t)sizeof(attni_cu_header);
    bytes[ATTNI_CU_SEQ] = seqs * (int64_t)sizeof(attn_plan_seq);
    bytes[ATTNI_CU_ORDER] = bytes[ATTNI_CU_UNIT0] = seqs * 4;
    bytes[ATTNI_CU_TOKEN0] = bytes[ATTNI_CU_Q_START] = (seqs + 1) * 4;
    if (d->mask.kind == ATTN_MASK_TREE) bytes[ATTNI_CU_PARENT] = tokens * 4;
    if (d->kv.page_table) // one table, where all sequences have the same pages
        bytes[ATTNI_CU_PAGES] = (d->kv.page_table_stride ? seqs : 1) * pages * 4;
    if (d->kv.cache) bytes[ATTNI_CU_RESOLVED] = seqs * pages * 4;
    if (b->row_start && b->seq_row) bytes[ATTNI_CU_SEQ_ROW] = seqs * 4;
    if (b->row_start && !b->device_entries) {
        bytes[ATTNI_CU_ROW_START] = (int64_t)b->n_lists * ((int64_t)b->n_rows + 1) * 8;
        if (b->row_end) bytes[ATTNI_CU_ROW_END] = bytes[ATTNI_CU_ROW_START];
        bytes[ATTNI_CU_BLOCKS] = attni_cu_entries(b) * 4;
        bytes[ATTNI_CU_BITS] = attni_cu_entries(b) * 8 * attni_cu_bit_words(b);
    }
    if (v->block) {
        bytes[ATTNI_CU_COL_START] = bytes[ATTNI_CU_DIAG_START] = 8 * ((int64_t)v->n_lists + 1);
        bytes[ATTNI_CU_COL] = 4 * v->col_start[v->n_lists];
        bytes[ATTNI_CU_DIAG] = 4 * v->diag_start[v->n_lists];
    }
}

static int64_t attni_cu_max_pages(const attn_desc *d) {
    int64_t n = 1, s;
    for (s = 0; s < d->n_seq; s++)
        n = attni_max64(n, ((int64_t)d->kv.kv_len[s] + d->kv.page_tokens - 1) / d->kv.page_tokens);
    return n;
}

// Capacities of an image and where its sections lie; 0: invalid.
static size_t attni_cu_layout(const attn_cuda *c, const attn_desc *d, const attn_plan_params *p,
                              attn_cuda_plan *g) {
    attni_cu_choice k;
    int64_t seqs, tokens, pages, tasks, units, bytes[ATTNI_CU_SECTIONS];
    int32_t group, i;
    size_t at = 0;
    memset(g, 0, sizeof *g);
    if (!p || attni_cu_choose(c, d, &k) != ATTN_OK || attn_validate(d) != ATTN_OK) return 0;
    group = attni_cu_split(d, &k);
    seqs = attni_max32(d->n_seq, p->max_seq);
    tokens = attni_max32(d->q_start[d->n_seq], p->max_tokens);
    pages = attni_max64(attni_cu_max_pages(d), ((int64_t)p->max_kv_len + d->kv.page_tokens - 1) /
                                                       d->kv.page_tokens + 1);
    tasks = (int64_t)(attn_plan_bytes(d, p) / sizeof(attn_task));
    units = tokens / ATTNI_CU_UNIT + seqs;
    if (tasks < 1 || tasks > INT32_MAX / 64) return 0;
    memset(bytes, 0, sizeof bytes);
    attni_cu_table_bytes(d, seqs, tokens, pages, bytes);
    bytes[ATTNI_CU_TICKET] = 4 * 2 * ATTNI_CU_KINDS;
    bytes[ATTNI_CU_ARRIVED] = units * d->n_kv_heads * group * 4;
    bytes[ATTNI_CU_TASK] = tasks * group * (int64_t)sizeof(attni_cu_task);
    bytes[ATTNI_CU_LINK] = 2 * tasks * (int64_t)sizeof(attni_cu_link);
    bytes[ATTNI_CU_EXPECTED] = units * 4;
    bytes[ATTNI_CU_MERGE] = tokens * 8;
    for (i = 0; i < ATTNI_CU_SECTIONS; i++) {
        if (bytes[i] < 0 || bytes[i] > (int64_t)1 << 46) return 0;
        g->at[i] = at;
        at += ((size_t)bytes[i] + 255) / 256 * 256;
    }
    g->at[ATTNI_CU_SECTIONS] = g->bytes = at;
    g->cap[0] = seqs;
    g->cap[1] = tokens;
    g->cap[2] = pages;
    g->cap[3] = tasks * group;
    g->cap[4] = 2 * tasks;
    g->cap[5] = units;
    g->cap[6] = (int64_t)(p->partial_bytes / 4 / (size_t)(attni_v_dim(d) + 2));
    g->cap[7] = d->kv.page_table_stride ? pages : 0; // from one sequence's pages to the next one's
    g->shape[0] = d->n_heads;
    g->shape[1] = d->n_kv_heads;
    g->shape[2] = d->head_dim;
    g->shape[3] = attni_v_dim(d);
    g->shape[4] = d->kv.page_tokens;
    g->shape[5] = k.id;
    g->shape[6] = group;
    g->shape[7] = // may share
        p->share != 1 && seqs > 1 && d->kv.page_table && !attni_has_sparse(&d->mask);
    return at;
}

ATTN_DEF size_t attn_cuda_plan_bytes(const attn_cuda *c, const attn_desc *d,
                                     const attn_plan_params *p) {
    attn_cuda_plan g;
    return attni_cu_layout(c, d, p, &g);
}

ATTN_DEF attn_result attn_cuda_plan_init(const attn_cuda *c, const attn_desc *d,
                                         const attn_plan_params *p, void *device, size_t bytes,
                                         attn_cuda_plan *g) {
    attn_cuda_plan x;
    attni_cu_choice k;
    attn_result r = attn_validate(d);
    int i;
    if (r != ATTN_OK) return r;
    if ((r = attn_cuda_supports(c, d)) != ATTN_OK) return r;
    if (!p || !device || !g) return ATTN_ERR_ARGUMENT;
    if (!attni_cu_layout(c, d, p, &x)) return ATTN_ERR_ARGUMENT;
    if (bytes < x.bytes || (uintptr_t)device % 256) return ATTN_ERR_BUFFER;
    if ((r = attni_cu_choose(c, d, &k)) != ATTN_OK) return r;
    x.device = device;
    for (i = 0; i < ATTNI_CU_KINDS; i++) {
        int blocks = 0;
        if (k.kernel[i] &&
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, (const void *)k.kernel[i],
                                                          k.threads[i], (size_t)k.smem[i]) !=
                cudaSuccess)
            return ATTN_ERR_DEVICE;
        if (k.kernel[i] && blocks < 1) return ATTN_ERR_DEVICE;
        x.n[ATTNI_CU_N_BLOCKS + i] = (int64_t)blocks * c->n_sm; // blocks that fit on the device
    }
    *g = x;
    return ATTN_OK;
}

// ---- upload

typedef struct attni_cu_packer {
    const attn_desc *d;
    const attn_plan *p;
    attn_cuda_plan *g;
    uint8_t *to;                       // staging
    int64_t used[ATTNI_CU_SECTIONS];   // bytes
    int64_t tail;                      // bytes of tasks at the end of their section
    const attni_cu_choice *k;
    int gather;
    int32_t *token0, *expected, *unit0, *merge;
} attni_cu_packer;

static void attni_cu_pack(attni_cu_packer *b, int section, const void *from, int64_t bytes) {
    if (bytes > 0) memcpy(b->to + b->g->at[section], from, (size_t)bytes);
    b->used[section] = bytes;
}

// Positions that rows [t0, t0 + n) of sequence q see at most, and all see: [lo, hi), [flo, fhi).
static void attni_cu_reach(const attn_mask *m, const attn_plan_seq *q, int32_t t0, int32_t n,
                           int64_t r[4]) {
    int64_t p0 = (int64_t)q->q_pos0 + t0, p1 = p0 + n - 1, end = (int64_t)q->kv_pos0 + q->kv_len;
    r[0] = r[2] = q->kv_pos0;
    r[1] = r[3] = end;
    if (m->kind == ATTN_MASK_TREE && !q->is_chain) {
        r[3] = q->q_pos0;
        p0 = q->q_pos0; // a node's position is its depth's
    } else if (m->kind != ATTN_MASK_FULL) {
        r[1] = attni_min64(end, p1 + 1);
        r[3] = attni_min64(end, p0 + 1);
    }
    if (m->window_left) {
        r[0] = attni_max64(r[0], p0 - (m->window_left - 1));
        r[2] = attni_max64(r[2], p1 - (m->window_left - 1));
    }
    if (m->window_right) {
        r[1] = attni_min64(r[1], attni_max64(p1 + m->window_right, m->n_sink));
        r[3] = attni_min64(r[3], p0 + m->window_right);
    }
}

static int32_t attni_cu_clip(int64_t x, int64_t lo, int64_t hi) {
    return (int32_t)attni_max64(lo, attni_min64(x, hi));
}

// Is a list of whole blocks the only sparse term, keep_sink and keep_recent apart?
static int attni_cu_lists_alone(const attn_mask *m) {
    return m->blocks.row_start && !m->blocks.bits && !m->stride.block && !m->vslash.block;
}

// Do tasks walk the list, token by token?
static int attni_cu_gathers(const attn_desc *d, const attn_cuda_plan *g, const attni_cu_choice *k) {
    const attn_mask *m = &d->mask;
    int32_t heads = d->n_heads / d->n_kv_heads / g->shape[6], rows = 0, i;
    if (!attni_cu_lists_alone(m) || m->blocks.kv_block >= ATTNI_CU_BLOCK) return 0;
    if (m->n_sink || m->kind == ATTN_MASK_TREE) return 0;
    if (g->cap[2] * d->kv.page_tokens > ATTNI_CU_MAX_GATHERED) return 0;
    for (i = 0; i < ATTNI_CU_KINDS; i++) rows = attni_max32(rows, k->rows[i]);
    rows = attni_max32(rows / heads, 1); // tokens; as many row blocks at most
    return (rows - 1 + m->blocks.row_block - 1) / m->blocks.row_block < ATTNI_CU_GROUPS;
}

// A task whose lists are gathered: spans are shares of what is listed.
static void attni_cu_pack_shares(const attn_plan_seq *q, int many, attni_cu_task *w) {
    w->n_spans = many ? 1 : attni_min32(q->span1 - q->span0, ATTNI_CU_SHARES);
    w->span_shift = many ? 30 : ATTNI_CU_SHARE_SHIFT;
    w->span0 -= q->span0;
    w->span1 -= q->span0;
    w->end_block = w->span0 < w->n_spans ? attni_min32(w->span1, w->n_spans) << w->span_shift : 0;
}

// A plan's task as kernels take it; false when it reads nothing and leaves nothing.
static void attni_cu_pack_task(const attni_cu_packer *b, const attn_task *t, int kind,
                               attni_cu_task *w) {
    const attni_cu_link *link = (attni_cu_link *)(void *)(b->to + b->g->at[ATTNI_CU_LINK]);
    const attn_plan_seq *packed = (attn_plan_seq *)(void *)(b->to + b->g->at[ATTNI_CU_SEQ]);
    const attn_plan *p = b->p;
    const attn_segment *g = &p->segment[t->segment];
    const attn_plan_seq *first = &p->seq[p->order[g->seq0]];
    const attn_mask *m = &b->d->mask;
    int64_t all[4] = {INT32_MAX, 0, 0, INT32_MAX}, r[4], lo, hi;
    int32_t i, skip = t->first_token, left = t->n_tokens;
    memset(w, 0, sizeof *w);
    for (i = g->seq0; i < g->seq0 + g->n_seq && left > 0; i++) {
        const attn_plan_seq *q = &p->seq[p->order[i]];
        int32_t take = attni_min32(q->q_len - skip, left);
        if (take > 0) {
            attni_cu_reach(m, q, skip, take, r);
            all[0] = attni_min64(all[0], r[0]);
            all[1] = attni_max64(all[1], r[1]);
            all[2] = attni_max64(all[2], r[2]);
            all[3] = attni_min64(all[3], r[3]);
            left -= take;
        }
        skip = attni_max32(0, skip - q->q_len);
    }
    lo = attni_max64(b->gather ? 0 : (int64_t)g->span0 * first->span, first->kv_pos0);
    hi = b->gather ? INT32_MAX : attni_min64((int64_t)g->span1 * first->span, INT32_MAX);
    w->lo = attni_cu_clip(all[0], lo, hi);
    w->hi = attni_cu_clip(all[1], lo, hi);
    w->sink_end = m->window_left || m->window_right ? attni_cu_clip(m->n_sink, 0, w->hi) : 0;
    w->partial = g->partial;
    w->place0 = g->seq0;
    w->n_places = g->n_seq;
    w->token0 = b->token0[g->seq0];
    w->first_token = t->first_token;
    w->n_tokens = t->n_tokens;
    w->seg_tokens = g->n_tokens;
    w->kv_head = t->kv_head;
    w->seq = p->order[g->seq0];
    w->pos0 = first->kv_pos0;
    while (ATTNI_CU_BLOCK << w->span_shift < first->span) w->span_shift++;
    w->sink_block = (w->sink_end + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK;
    w->lo_block = w->lo / ATTNI_CU_BLOCK;
    w->end_block = (int32_t)(((int64_t)w->hi + ATTNI_CU_BLOCK - 1) / ATTNI_CU_BLOCK);
    w->full_block = (int32_t)(((int64_t)attni_cu_clip(all[2], lo, hi) + ATTNI_CU_BLOCK - 1) /
                              ATTNI_CU_BLOCK);
    w->full_end = attni_cu_clip(all[3], lo, hi) / ATTNI_CU_BLOCK;
    if (g->n_seq == 1 && packed[w->seq].n_chain == 1) w->link = link[first->chain];
    w->q_begin = first->q_begin;
    w->q_len = first->q_len;
    w->q_pos0 = first->q_pos0;
    w->kv_len = first->kv_len;
    w->unit = -1;
    if (g->n_seq == 1 &&
        t->first_token / ATTNI_CU_UNIT == (t->first_token + t->n_tokens - 1) / ATTNI_CU_UNIT)
        w->unit = b->unit0[w->seq] + t->first_token / ATTNI_CU_UNIT;
    w->span0 = g->span0;
    w->span1 = g->span1;
    w->slots = g->n_slots == 0 ? 0 : g->n_slots == 1 && g->span1 - g->span0 > 1 ? 1 : 2;
    if (b->gather) attni_cu_pack_shares(first, kind == ATTNI_CU_MANY, w);
}

// Units that a task leaves partials of.
static void attni_cu_expect(const attni_cu_packer *b, const attn_task *t) {
    const attn_plan *p = b->p;
    const attn_segment *g = &p->segment[t->segment];
    int32_t i, u, skip = t->first_token, left = t->n_tokens;
    if (t->kv_head || !g->n_slots) return;
    for (i = g->seq0; i < g->seq0 + g->n_seq && left > 0; i++) {
        const attn_plan_seq *q = &p->seq[p->order[i]];
        int32_t take = attni_min32(q->q_len - skip, left);
        if (take > 0) {
            for (u = skip / ATTNI_CU_UNIT; u <= (skip + take - 1) / ATTNI_CU_UNIT; u++)
                b->expected[b->unit0[p->order[i]] + u]++;
            left -= take;
        }
        skip = attni_max32(0, skip - q->q_len);
    }
}

// Tokens whose sequence has a part in a shared task are merged afterwards, by all of the device: a
// tile that comes last would have many rows to merge. Their units expect nobody. Returns how many.
static int32_t attni_cu_pack_merges(const attni_cu_packer *b) {
    const attn_plan *p = b->p;
    int32_t s, c, t, n = 0;
    for (s = 0; s < p->n_seq; s++) {
        const attn_plan_seq *q = &p->seq[s];
        int shared = 0;
        for (c = 0; c < q->n_chain; c++) {
            const attn_segment *g = &p->segment[p->chain[q->chain + c]];
            shared |= g->n_slots > 0 && g->n_seq > 1;
        }
        for (t = 0; t < q->q_len && shared; t++, n++) {
            b->merge[2 * n] = s;
            b->merge[2 * n + 1] = t;
            b->expected[b->unit0[s] + t / ATTNI_CU_UNIT] = 0;
        }
    }
    return n;
}

// What a merge reads of each sequence. Segments whose partials lie one behind the other, as those
// of a sequence's own pieces do, are one link.
static void attni_cu_pack_links(const attni_cu_packer *b) {
    const attn_plan *p = b->p;
    attni_cu_link *link = (attni_cu_link *)(void *)(b->to + b->g->at[ATTNI_CU_LINK]);
    attn_plan_seq *seq = (attn_plan_seq *)(void *)(b->to + b->g->at[ATTNI_CU_SEQ]);
    int32_t s, c;
    for (s = 0; s < p->n_seq; s++) {
        attni_cu_link *l = &link[p->seq[s].chain] - 1;
        seq[s] = p->seq[s];
        seq[s].n_chain = 0;
        for (c = 0; c < p->seq[s].n_chain; c++) {
            const attn_segment *e = &p->segment[p->chain[p->seq[s].chain + c]];
            int32_t at = b->token0[p->seq[s].place] - b->token0[e->seq0];
            if (seq[s].n_chain && l->seg_tokens == e->n_tokens && l->token_at == at &&
                l->partial + (int64_t)l->n_slots * e->n_tokens * p->n_heads == e->partial) {
                l->n_slots += e->n_slots;
                continue;
            }
            l++;
            seq[s].n_chain++;
            l->partial = e->partial;
            l->seg_tokens = e->n_tokens;
            l->token_at = at;
            l->n_slots = e->n_slots;
            l->pad = 0;
        }
    }
}

static attn_result attni_cu_pack_plan(attni_cu_packer *b) {
    const attn_plan *p = b->p;
    attn_cuda_plan *g = b->g;
    attni_cu_header head;
    attni_cu_task *task = (attni_cu_task *)(void *)(b->to + g->at[ATTNI_CU_TASK]);
    int32_t i, s, c, kind, some, n_links = 0, units = 0, group = g->shape[6];
    const int32_t part = p->n_heads / p->n_kv_heads / group; // heads of a tile
    memset(&head, 0, sizeof head);
    for (i = 0; i < p->n_active; i++) {
        b->token0[i + 1] = b->token0[i] + p->seq[p->order[i]].q_len;
    }
    for (s = 0; s < p->n_seq; s++) {
        b->unit0[s] = units;
        units += (p->seq[s].q_len + ATTNI_CU_UNIT - 1) / ATTNI_CU_UNIT;
        n_links += p->seq[s].n_chain;
    }
    if (units > g->cap[5] || n_links > g->cap[4] || (int64_t)p->n_tasks * group > g->cap[3])
        return ATTN_ERR_BUFFER;
    memset(b->expected, 0, 4 * (size_t)units);
    for (i = 0; i < p->n_tasks; i++) attni_cu_expect(b, &p->task[i]);
    head.n_merge = attni_cu_pack_merges(b);
    attni_cu_pack_links(b);
    for (some = 0; some < 2; some++) // those of SOME behind those of FEW
        for (i = 0; i < p->n_tasks; i++) {
            const attn_task *t = &p->task[i];
            const attn_plan_seq *q = &p->seq[p->order[p->segment[t->segment].seq0]];
            const int32_t rows = t->n_tokens * part;
            kind = ATTNI_CU_FEW;
            if (g->shape[5] >= 16 && p->params.rule[q->rule].no_fold) kind = ATTNI_CU_MANY;
            else if (rows > b->k->rows[kind]) kind = ATTNI_CU_SOME;
            if (some != (kind == ATTNI_CU_SOME)) continue;
            if (rows > b->k->rows[kind]) return ATTN_ERR_STALE; // other kernels' plan
            for (c = 0; c < group; c++) {
                const int64_t at = head.n_tasks[kind]++;
                attni_cu_task *w = &task[kind == ATTNI_CU_MANY ? g->cap[3] - 1 - at
                                         : some ? head.n_tasks[ATTNI_CU_FEW] + at : at];
                attni_cu_pack_task(b, t, kind, w);
                w->head = (w->kv_head * group + c) * part;
                if (w->unit >= 0) w->expected = b->expected[w->unit];
            }
        }
    if (head.n_merge && !g->shape[7]) return ATTN_ERR_STALE; // captured runs would not merge them
    g->n[ATTNI_CU_N_MERGES] = head.n_merge;
    head.n_seq = p->n_seq;
    for (kind = 0; kind < ATTNI_CU_KINDS; kind++) g->n[kind] = head.n_tasks[kind];
    attni_cu_pack(b, ATTNI_CU_HEADER, &head, (int64_t)sizeof head);
    b->used[ATTNI_CU_SEQ] = p->n_seq * (int64_t)sizeof *p->seq;
    attni_cu_pack(b, ATTNI_CU_ORDER, p->order, p->n_active * 4);
    b->used[ATTNI_CU_TASK] =
        ((int64_t)head.n_tasks[ATTNI_CU_FEW] + head.n_tasks[ATTNI_CU_SOME]) * (int64_t)sizeof *task;
    b->tail = head.n_tasks[ATTNI_CU_MANY] * (int64_t)sizeof *task;
    b->used[ATTNI_CU_LINK] = n_links * (int64_t)sizeof(attni_cu_link);
    b->used[ATTNI_CU_TOKEN0] = 4 * ((int64_t)p->n_active + 1);
    b->used[ATTNI_CU_UNIT0] = 4 * (int64_t)p->n_seq;
    b->used[ATTNI_CU_EXPECTED] = 4 * (int64_t)units;
    b->used[ATTNI_CU_MERGE] = 8 * (int64_t)head.n_merge;
    g->n[ATTNI_CU_N_PARTIALS] = (int64_t)p->partial_rows;
    g->n[ATTNI_CU_N_TOKENS] = p->n_tokens;
    g->n[ATTNI_CU_N_SEQS] = p->n_seq;
    return ATTN_OK;
}

static attn_result attni_cu_pack_tables(attni_cu_packer *b) {
    const attn_desc *d = b->d;
    const attn_block_list *l = &d->mask.blocks;
    const attn_vertical_slash *v = &d->mask.vslash;
    const attn_cuda_tables *have = &b->g->tables;
    const attn_cuda_plan *g = b->g;
    int64_t bytes[ATTNI_CU_SECTIONS], pages = g->cap[2], most = 0, s, n;
    int i;
    memset(bytes, 0, sizeof bytes);
    attni_cu_table_bytes(d, d->n_seq, d->q_start[d->n_seq], pages, bytes);
    for (i = ATTNI_CU_Q_START; i < ATTNI_CU_SECTIONS; i++)
        if ((size_t)bytes[i] > g->at[i + 1] - g->at[i]) return ATTN_ERR_BUFFER;
    attni_cu_pack(b, ATTNI_CU_Q_START, d->q_start, bytes[ATTNI_CU_Q_START]);
    attni_cu_pack(b, ATTNI_CU_PARENT, d->mask.tree_parent, bytes[ATTNI_CU_PARENT]);
    attni_cu_pack(b, ATTNI_CU_SEQ_ROW, l->seq_row, bytes[ATTNI_CU_SEQ_ROW]);
    attni_cu_pack(b, ATTNI_CU_ROW_START, l->row_start, bytes[ATTNI_CU_ROW_START]);
    attni_cu_pack(b, ATTNI_CU_ROW_END, l->row_end, bytes[ATTNI_CU_ROW_END]);
    attni_cu_pack(b, ATTNI_CU_BLOCKS, l->block, bytes[ATTNI_CU_BLOCKS]);
    attni_cu_pack(b, ATTNI_CU_BITS, l->bits, bytes[ATTNI_CU_BITS]);
    attni_cu_pack(b, ATTNI_CU_COL_START, v->col_start, bytes[ATTNI_CU_COL_START]);
    attni_cu_pack(b, ATTNI_CU_COL, v->col, bytes[ATTNI_CU_COL]);
    attni_cu_pack(b, ATTNI_CU_DIAG_START, v->diag_start, bytes[ATTNI_CU_DIAG_START]);
    attni_cu_pack(b, ATTNI_CU_DIAG, v->diag, bytes[ATTNI_CU_DIAG]);
    for (s = 0; attni_cu_may_resolve(g) && s < d->n_seq; s++)
        if ((d->kv.kv_len[s] - 1) / d->kv.page_tokens >= pages) return ATTN_ERR_BUFFER;
    if (!d->kv.page_table || have->page_table) return ATTN_OK;
    if (!g->cap[7] && d->kv.page_table_stride && d->n_seq > 1) return ATTN_ERR_BUFFER;
    for (s = 0; s < d->n_seq; s++) {
        int32_t *to = (int32_t *)(void *)(b->to + g->at[ATTNI_CU_PAGES]) + s * g->cap[7];
        n = ((int64_t)d->kv.kv_len[s] + d->kv.page_tokens - 1) / d->kv.page_tokens;
        if (n > pages) return ATTN_ERR_BUFFER;
        if (s && !g->cap[7] && n <= most) continue; // it is there
        memcpy(to, d->kv.page_table + s * d->kv.page_table_stride, 4 * (size_t)n);
        memset(to + n, 0xff, 4 * (size_t)(pages - n));
        b->used[ATTNI_CU_PAGES] = 4 * (s * g->cap[7] + pages);
        most = n;
    }
    return ATTN_OK;
}

// Used parts of sections, neighbours in one go.
static attn_result attni_cu_send(const attni_cu_packer *b, cudaStream_t stream) {
    const size_t *at = b->g->at;
    uint8_t *to = (uint8_t *)b->g->device;
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    int i = ATTNI_CU_TASK, j;
    if (cudaMemsetAsync(to + at[ATTNI_CU_TICKET], 0, at[ATTNI_CU_TASK] - at[ATTNI_CU_TICKET],
                        stream) != cudaSuccess)
        return ATTN_ERR_DEVICE;
    if (cudaMemcpyAsync(to, b->to, sizeof(attni_cu_header), cudaMemcpyHostToDevice, stream) !=
        cudaSuccess)
        return ATTN_ERR_DEVICE;
    // Kernels look at tasks before they know how many there are. Once is enough, unless this call
    // is only written down, for a graph that may never run.
    if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess) return ATTN_ERR_DEVICE;
    if (!b->g->n[ATTNI_CU_N_CLEARED] && cudaMemsetAsync(to + at[ATTNI_CU_TASK], 0,
                                       at[ATTNI_CU_SEQ] - at[ATTNI_CU_TASK],
                                       stream) != cudaSuccess)
        return ATTN_ERR_DEVICE;
    if (capture == cudaStreamCaptureStatusNone) b->g->n[ATTNI_CU_N_CLEARED] = 1;
    if (b->tail) {
        size_t from = at[ATTNI_CU_TASK] + (size_t)b->g->cap[3] * sizeof(attni_cu_task) -
                      (size_t)b->tail;
        if (cudaMemcpyAsync(to + from, b->to + from, (size_t)b->tail, cudaMemcpyHostToDevice,
                            stream) != cudaSuccess)
            return ATTN_ERR_DEVICE;
    }
    while (i < ATTNI_CU_SECTIONS) {
        size_t end;
        if (!b->used[i]) {
            i++;
            continue;
        }
        end = at[i] + (size_t)b->used[i];
        for (j = i + 1; j < ATTNI_CU_SECTIONS && at[j] < end + 8192; j++)
            if (b->used[j]) end = at[j] + (size_t)b->used[j];
        if (cudaMemcpyAsync(to + at[i], b->to + at[i], end - at[i], cudaMemcpyHostToDevice,
                            stream) != cudaSuccess)
            return ATTN_ERR_DEVICE;
        i = j;
    }
    return ATTN_OK;
}

static attn_result attni_cu_same_plan(const attn_desc *d, const attn_plan *p,
                                      const attn_cuda_plan *g) {
    int32_t s;
    if (p->n_seq != d->n_seq || p->n_tokens != d->q_start[d->n_seq]) return ATTN_ERR_STALE;
    if (p->n_heads != g->shape[0] || p->n_kv_heads != g->shape[1] || p->head_dim != g->shape[2] ||
        p->v_head_dim != g->shape[3])
        return ATTN_ERR_STALE;
    for (s = 0; s < d->n_seq; s++) {
        const attn_plan_seq *q = &p->seq[s];
        if (q->q_begin != d->q_start[s] || q->q_len != d->q_start[s + 1] - d->q_start[s] ||
            q->kv_len != d->kv.kv_len[s] || q->q_pos0 != attni_q_pos0(d, s) ||
            q->kv_pos0 != attni_kv_pos0(d, s) || q->rule < 0)
            return ATTN_ERR_STALE;
        if (g->max_q_len > 0 && q->q_len > g->max_q_len) return ATTN_ERR_BUFFER;
    }
    return ATTN_OK;
}

// Would tasks and tables made for mask x do for y? Lists may lie elsewhere.
static int attni_cu_same_mask(const attn_mask *x, const attn_mask *y) {
    const attn_block_list *a = &x->blocks, *b = &y->blocks;
    if (x->kind != y->kind || x->window_left != y->window_left ||
        x->window_right != y->window_right || x->n_sink != y->n_sink ||
        x->keep_sink != y->keep_sink || x->keep_recent != y->keep_recent)
        return 0;
    if (memcmp(&x->stride, &y->stride, sizeof x->stride) != 0) return 0; // int32 alone
    if (x->vslash.block != y->vslash.block || x->vslash.n_lists != y->vslash.n_lists) return 0;
    if (!a->row_start != !b->row_start) return 0;
    return !a->row_start ||
           (a->row_block == b->row_block && a->kv_block == b->kv_block &&
            a->n_lists == b->n_lists && a->n_rows == b->n_rows && !a->bits == !b->bits &&
            a->bits_rows == b->bits_rows && a->bits_cols == b->bits_cols &&
            !a->seq_row == !b->seq_row && !a->row_end == !b->row_end &&
            !a->device_entries == !b->device_entries);
}

// d against what the image was laid out for; the kernels it runs on.
static attn_result attni_cu_check(const attn_cuda *c, const attn_desc *d, const attn_cuda_plan *g,
                                  attni_cu_choice *k) {
    attn_result r;
    if ((r = attn_cuda_supports(c, d)) != ATTN_OK) return r;
    if (!g || !g->device) return ATTN_ERR_ARGUMENT;
    if ((r = attni_cu_choose(c, d, k)) != ATTN_OK) return r;
    if (!d->kv.k.data || !d->kv.v.data || !d->q.data || !d->o.data) return ATTN_ERR_ARGUMENT;
    if (attni_bad_view(&d->q, g->n[ATTNI_CU_N_TOKENS], d->n_heads, d->head_dim, 0) ||
        attni_bad_view(&d->o, g->n[ATTNI_CU_N_TOKENS], d->n_heads, attni_v_dim(d), 1))
        return ATTN_ERR_LAYOUT;
    if (d->n_heads != g->shape[0] || d->n_kv_heads != g->shape[1] || d->head_dim != g->shape[2] ||
        attni_v_dim(d) != g->shape[3] || d->kv.page_tokens != g->shape[4] || k->id != g->shape[5] ||
        attni_cu_split(d, k) != g->shape[6] || (d->kv.cache && !attni_cu_may_resolve(g)))
        return ATTN_ERR_STALE;
    return attni_bad_cache(&d->kv) ? ATTN_ERR_ARGUMENT : ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_upload(const attn_cuda *c, const attn_desc *d, const attn_plan *plan,
                                      attn_cuda_plan *g, void *staging, size_t bytes,
                                      attn_cuda_stream stream) {
    attni_cu_packer b;
    attni_cu_choice k;
    attn_result r = attn_validate(d);
    if (r != ATTN_OK) return r;
    if (!plan || !staging) return ATTN_ERR_ARGUMENT;
    if ((r = attni_cu_check(c, d, g, &k)) != ATTN_OK) return r;
    if (bytes < g->bytes || (uintptr_t)staging % 16) return ATTN_ERR_BUFFER;
    if ((r = attni_cu_same_plan(d, plan, g)) != ATTN_OK) return r;
    if (d->n_seq > g->cap[0] || d->q_start[d->n_seq] > g->cap[1]) return ATTN_ERR_BUFFER;
    memset(&b, 0, sizeof b);
    b.d = d;
    b.p = plan;
    b.g = g;
    b.k = &k;
    b.gather = attni_cu_gathers(d, g, &k);
    b.to = (uint8_t *)staging;
    b.token0 = (int32_t *)(void *)(b.to + g->at[ATTNI_CU_TOKEN0]);
    b.expected = (int32_t *)(void *)(b.to + g->at[ATTNI_CU_EXPECTED]);
    b.unit0 = (int32_t *)(void *)(b.to + g->at[ATTNI_CU_UNIT0]);
    b.merge = (int32_t *)(void *)(b.to + g->at[ATTNI_CU_MERGE]);
    b.token0[0] = 0;
    if ((r = attni_cu_pack_plan(&b)) != ATTN_OK) return r;
    if ((r = attni_cu_pack_tables(&b)) != ATTN_OK) return r;
    g->mask = d->mask;
    return attni_cu_send(&b, stream);
}

// ---- run

// The descriptor with its tables in device memory.
static void attni_cu_device_tables(const attn_cuda_plan *g, attn_desc *d) {
    const uint8_t *m = (const uint8_t *)g->device;
    attn_block_list *b = &d->mask.blocks;
    attn_vertical_slash *v = &d->mask.vslash;
    const attn_cuda_tables *t = &g->tables;
#define ATTNI_AT(type, section) ((const type *)(const void *)(m + g->at[section]))
    d->q_start = ATTNI_AT(int32_t, ATTNI_CU_Q_START);
    d->q_pos0 = d->kv.kv_len = d->kv.kv_pos0 = d->seq_order = NULL; // kernels read seq[]
    if (d->kv.page_table) {
        d->kv.page_table = t->page_table ? t->page_table : ATTNI_AT(int32_t, ATTNI_CU_PAGES);
        d->kv.page_table_stride = t->page_table ? t->page_table_stride : g->cap[7];
    }
    if (d->mask.tree_parent) d->mask.tree_parent = ATTNI_AT(int32_t, ATTNI_CU_PARENT);
    if (b->row_start && !b->device_entries) {
        b->row_start = ATTNI_AT(int64_t, ATTNI_CU_ROW_START);
        if (b->row_end) b->row_end = ATTNI_AT(int64_t, ATTNI_CU_ROW_END);
        b->block = ATTNI_AT(int32_t, ATTNI_CU_BLOCKS);
        if (b->bits) b->bits = ATTNI_AT(uint64_t, ATTNI_CU_BITS);
    }
    if (b->row_start && b->seq_row) b->seq_row = ATTNI_AT(int32_t, ATTNI_CU_SEQ_ROW);
    if (v->block) {
        v->col_start = ATTNI_AT(int64_t, ATTNI_CU_COL_START);
        v->col = ATTNI_AT(int32_t, ATTNI_CU_COL);
        v->diag_start = ATTNI_AT(int64_t, ATTNI_CU_DIAG_START);
        v->diag = ATTNI_AT(int32_t, ATTNI_CU_DIAG);
    }
}

// Can later uploads have tasks of this kind?
static int attni_cu_may_have(const attn_cuda_plan *g, const attni_cu_choice *k, int kind,
                             int32_t group) {
    const int64_t q = g->max_q_len ? g->max_q_len : g->cap[1];
    if (kind == ATTNI_CU_MANY) return q > ATTNI_CU_FEW_Q;
    return kind == ATTNI_CU_FEW || g->shape[7] || q * group > k->rows[ATTNI_CU_FEW];
}

// joins: launches before it in this run need not have ended.
static attn_result attni_cu_launch(const attn_cuda *c, attni_cu_kernel kernel, int64_t blocks,
                                   int threads, int smem, int joins, const attni_cu_args *a,
                                   attn_cuda_stream stream) {
    cudaLaunchConfig_t l = {};
    cudaLaunchAttribute early = {};
    l.gridDim = dim3((unsigned)blocks);
    l.blockDim = dim3((unsigned)threads);
    l.dynamicSmemBytes = (size_t)smem;
    l.stream = stream;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    l.attrs = &early;
    l.numAttrs = joins && c->arch >= 90 && CUDART_VERSION >= 12030; // older ones do not capture it
    return cudaLaunchKernelEx(&l, kernel, *a) == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

// Where pages have copies: resolves the tables of x, which lie on the device, and lets x and its
// sides read through them.
static attn_result attni_cu_resolve(const attn_cuda *c, const attn_cuda_plan *g, attn_desc *x,
                                    attni_side *k, attni_side *v, attn_cuda_stream stream) {
    const uint8_t *m = (const uint8_t *)g->device;
    const attn_kv_cache *cache = x->kv.cache;
    attni_cu_resolve_args a;
    dim3 grid;
    int i;
    if (!cache) return ATTN_OK;
    if (!attni_cu_may_resolve(g)) return ATTN_ERR_STALE;
    if (cache->n_slots > INT32_MAX - x->kv.n_pages) return ATTN_ERR_OVERFLOW;
    memset(&a, 0, sizeof a);
    a.header = ATTNI_AT(attni_cu_header, ATTNI_CU_HEADER);
    a.seq = ATTNI_AT(attn_plan_seq, ATTNI_CU_SEQ);
    a.table = x->kv.page_table;
    a.stride = x->kv.page_table_stride;
    a.resolved = (int32_t *)(void *)((uint8_t *)g->device + g->at[ATTNI_CU_RESOLVED]);
    a.capacity = g->cap[2];
    a.slot = cache->slot;
    a.error = c->error;
    a.n_pages = x->kv.n_pages;
    a.n_slots = cache->n_slots;
    a.page_tokens = x->kv.page_tokens;
    grid = dim3((unsigned)attni_min64((g->cap[2] + 255) / 256, 64),
                (unsigned)attni_min64(g->cap[0], 1024));
    attni_cu_resolve_pages<<<grid, 256, 0, stream>>>(a);
    for (i = 0; i < 2; i++) {
        attni_side *s = i ? v : k;
        s->first_copy = x->kv.n_pages;
        s->to_copies = (int64_t)((uintptr_t)s->copies - (uintptr_t)s->data) -
                       x->kv.n_pages * s->page_bytes;
    }
    x->kv.page_table = a.resolved;
    x->kv.page_table_stride = a.capacity;
    x->kv.n_pages += cache->n_slots;
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

// Tasks of this kind that a launch has to do for.
static int64_t attni_cu_n_tasks(const attn_cuda_plan *g, const attni_cu_choice *k, int kind,
                                int32_t group, int captured) {
    if (!k->kernel[kind]) return 0;
    if (!captured) return g->n[kind];
    return attni_cu_may_have(g, k, kind, group) ? g->cap[3] : 0;
}

ATTN_DEF attn_result attn_cuda_run(const attn_cuda *c, const attn_desc *d, const attn_cuda_plan *g,
                                   void *partials, size_t partial_bytes, attn_cuda_stream stream) {
    attni_cu_args a;
    attni_cu_choice k;
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    attn_result r = attni_cu_check(c, d, g, &k);
    const uint8_t *m;
    int64_t rows;
    int i, none, captured, joins = 0;
    if (r != ATTN_OK) return r;
    if (d->n_seq != g->n[ATTNI_CU_N_SEQS] || !attni_cu_same_mask(&d->mask, &g->mask))
        return ATTN_ERR_STALE;
    rows = (int64_t)(partial_bytes / 4 / (size_t)(attni_v_dim(d) + 2));
    if (rows < g->n[ATTNI_CU_N_PARTIALS] || (g->n[ATTNI_CU_N_PARTIALS] && !partials) ||
        (uintptr_t)partials % 64)
        return ATTN_ERR_BUFFER;
    if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess) return ATTN_ERR_DEVICE;
    captured = capture != cudaStreamCaptureStatusNone;
    if (captured && rows < g->cap[6]) return ATTN_ERR_BUFFER;
    memset(&a, 0, sizeof a);
    a.d = attni_cu_resolved(d);
    attni_cu_device_tables(g, &a.d);
    (void)attni_side_init(d, 0, &a.k);
    (void)attni_side_init(d, 1, &a.v);
    m = (const uint8_t *)g->device;
    a.header = ATTNI_AT(attni_cu_header, ATTNI_CU_HEADER);
    a.task = ATTNI_AT(attni_cu_task, ATTNI_CU_TASK);
    a.seq = ATTNI_AT(attn_plan_seq, ATTNI_CU_SEQ);
    a.order = ATTNI_AT(int32_t, ATTNI_CU_ORDER);
    a.token0 = ATTNI_AT(int32_t, ATTNI_CU_TOKEN0);
    a.link = ATTNI_AT(attni_cu_link, ATTNI_CU_LINK);
    a.unit0 = ATTNI_AT(int32_t, ATTNI_CU_UNIT0);
    a.expected = ATTNI_AT(int32_t, ATTNI_CU_EXPECTED);
    a.merge = ATTNI_AT(int32_t, ATTNI_CU_MERGE);
    a.arrived = (int32_t *)(void *)((uint8_t *)g->device + g->at[ATTNI_CU_ARRIVED]);
    a.ticket = (int32_t *)(void *)((uint8_t *)g->device + g->at[ATTNI_CU_TICKET]);
    a.error = c->error;
    a.cap_tasks = g->cap[3];
    a.last_task = g->cap[3] - 1;
    a.partial_o = (float *)partials;
    a.partial_ml = a.partial_o + rows * attni_v_dim(d);
    a.n_entries = attni_device_list(&d->mask) ? d->mask.blocks.device_entries : -1;
    a.group = d->n_heads / d->n_kv_heads / g->shape[6];
    a.per_group = 65536 / a.group + 1; // rows and groups go up to 128
    a.sparse = attni_has_sparse(&d->mask);
    a.run = !d->mask.n_sink && d->mask.kind != ATTN_MASK_TREE;
    a.listed = attni_cu_lists_alone(&d->mask) && d->mask.blocks.kv_block % ATTNI_CU_BLOCK == 0 &&
               (d->mask.kind != ATTN_MASK_TREE || !(d->mask.keep_sink || d->mask.keep_recent));
    a.gather = attni_cu_gathers(d, g, &k);
    a.strided = d->mask.stride.block && d->mask.stride.block % ATTNI_CU_BLOCK == 0 &&
                !d->mask.stride.bidirectional && !d->mask.blocks.row_start &&
                !d->mask.vslash.block && !d->mask.keep_sink && !d->mask.keep_recent;
    a.closed = !a.sparse && a.run;
    for (a.page_shift = 0; a.page_shift < 31 && d->kv.page_tokens >> a.page_shift > 1;)
        a.page_shift++;
    if (d->kv.page_tokens & (d->kv.page_tokens - 1)) a.page_shift = -1;
    a.scale = attni_scale(d);
    a.mods = attni_cu_mods(d);
    attni_cu_alignment(&a);
    a.runs = d->kv.page_tokens % 16 == 0 && !a.odd_rows && !d->kv.cache;
    a.wide_q = attni_cu_wide(&a.d, &a.d.q, g->cap[1]);
    a.wide_o = attni_cu_wide(&a.d, &a.d.o, g->cap[1]);
    a.pieces = attni_cu_in_pieces(&a, &a.k) && attni_cu_in_pieces(&a, &a.v);
    if (!a.mods) a.scale *= ATTNI_LOG2E;
    if (d->kv.cache) a.reads = d->kv.cache->reads;
    for (i = 0; i < ATTNI_CU_KINDS && a.reads; i++) {
        int64_t blocks = attni_cu_n_tasks(g, &k, i, a.group, captured);
        a.kind = i;
        if (!blocks) continue;
        r = attni_cu_launch(c, attni_cu_count_reads, attni_min64(blocks, 8 * c->n_sm),
                            ATTNI_CU_THREADS, 0, 0, &a, stream);
        if (r != ATTN_OK) return r;
    }
    if ((r = attni_cu_resolve(c, g, &a.d, &a.k, &a.v, stream)) != ATTN_OK) return r;
    // the longest tasks first; a captured launch must do for every later upload: those of kinds
    // that have no tasks now behind the others
    for (none = 0; none < 2; none++)
        for (i = ATTNI_CU_KINDS - 1; i >= 0; i--) {
            int64_t blocks = attni_cu_n_tasks(g, &k, i, a.group, captured);
            if (!blocks || none != (g->n[i] == 0)) continue;
            a.kind = i;
            blocks = attni_min64(blocks, g->n[ATTNI_CU_N_BLOCKS + i]);
            r = attni_cu_launch(c, k.kernel[i], blocks, k.threads[i], k.smem[i], joins, &a, stream);
            if (r != ATTN_OK) return r;
            joins = 1;
        }
    if (captured ? g->shape[7] : g->n[ATTNI_CU_N_MERGES] > 0) {
        int64_t n = captured ? g->cap[1] : g->n[ATTNI_CU_N_MERGES];
        n = attni_min64((n * d->n_heads * ((attni_v_dim(d) + 127) / 128) + 3) / 4, 8 * c->n_sm);
        return attni_cu_launch(c, attni_cu_merge_tokens, n, ATTNI_CU_THREADS, 0, joins, &a, stream);
    }
    return ATTN_OK;
}
#undef ATTNI_AT

// ---- store, copies, states

// A tensor whose rows will do, with its strides as they are; NULL stays without data.
static attn_result attni_cu_rows_of(const attn_tensor *t, int64_t heads, int64_t dim, int64_t end,
                                    attn_tensor *out) {
    attn_result r = attni_check_rows(t, heads, end);
    memset(out, 0, sizeof *out);
    if (r != ATTN_OK || !t) return r;
    *out = *t;
    if (!out->stride_token) out->stride_token = heads * dim;
    if (!out->stride_head) out->stride_head = dim;
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_store(const attn_cuda *c, const attn_desc *d,
                                     const attn_cuda_plan *g, const attn_tensor *k,
                                     const attn_tensor *v, const int64_t *slots, int64_t first,
                                     int64_t count, attn_cuda_stream stream) {
    attni_cu_store_args a;
    attni_cu_choice choice;
    attn_result r = attni_cu_choose(c, d, &choice);
    int64_t blocks;
    if (r != ATTN_OK) return r;
    if (d->kv.layout == ATTN_K16) return ATTN_ERR_UNSUPPORTED;
    if (attni_bad_cache(&d->kv)) return ATTN_ERR_ARGUMENT;
    if (!d->kv.k.data || !d->kv.v.data || first < 0 || count < 0) return ATTN_ERR_ARGUMENT;
    if (count > INT64_MAX - first || first + count > INT64_MAX / 65536) return ATTN_ERR_OVERFLOW;
    if (!slots && (!g || !g->device)) return ATTN_ERR_ARGUMENT;
    if (!slots && first + count > g->n[ATTNI_CU_N_TOKENS]) return ATTN_ERR_SHAPE;
    if (!slots && d->n_seq != g->n[ATTNI_CU_N_SEQS]) return ATTN_ERR_STALE;
    memset(&a, 0, sizeof a);
    a.d = attni_cu_resolved(d);
    (void)attni_side_init(d, 0, &a.side[0]);
    (void)attni_side_init(d, 1, &a.side[1]);
    if ((r = attni_cu_rows_of(k, d->n_kv_heads, a.side[0].dim, first + count, &a.src[0])) !=
        ATTN_OK)
        return r;
    if ((r = attni_cu_rows_of(v, d->n_kv_heads, a.side[1].dim, first + count, &a.src[1])) !=
        ATTN_OK)
        return r;
    if (!count || (!k && !v)) return ATTN_OK;
    if (!slots) {
        attni_cu_device_tables(g, &a.d);
        a.seq = (const attn_plan_seq *)(const void *)((uint8_t *)g->device +
                                                      g->at[ATTNI_CU_SEQ]);
        a.q_start = a.d.q_start;
    }
    a.slots = slots;
    a.first = first;
    a.count = count;
    a.error = c->error;
    blocks = attni_min64((count * d->n_kv_heads + 3) / 4, 1 << 16);
    attni_cu_store_rows<<<(unsigned)blocks, 128, 0, stream>>>(a);
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

// How many copies from i on can go side by side: none reads or writes what another one writes.
static int32_t attni_cu_independent(const attn_page_copy *c, int32_t i, int32_t n) {
    int32_t j, k;
    for (j = i; j < n && j - i < ATTNI_CU_COPIES; j++)
        for (k = i; k < j; k++)
            if (c[j].src == c[k].dst || c[j].dst == c[k].dst || c[j].dst == c[k].src) return j - i;
    return j - i;
}

ATTN_DEF attn_result attn_cuda_copy_pages(const attn_cuda *c, const attn_desc *d,
                                          const attn_page_copy *copies, int32_t n,
                                          attn_cuda_stream stream) {
    attni_cu_copy_args a;
    attni_cu_choice choice;
    attn_result r = attni_cu_choose(c, d, &choice);
    int32_t i, j, step, most;
    if (r != ATTN_OK) return r;
    if (d->kv.layout == ATTN_K16) return ATTN_ERR_UNSUPPORTED;
    if (attni_bad_cache(&d->kv)) return ATTN_ERR_ARGUMENT;
    if (!d->kv.k.data || !d->kv.v.data || n < 0 || (n > 0 && !copies)) return ATTN_ERR_ARGUMENT;
    for (i = 0; i < n; i++) {
        if (copies[i].src < 0 || copies[i].src >= d->kv.n_pages || copies[i].dst < 0 ||
            copies[i].dst >= d->kv.n_pages)
            return ATTN_ERR_PAGE;
        if (copies[i].n_tokens < 0 || copies[i].n_tokens > d->kv.page_tokens)
            return ATTN_ERR_ARGUMENT;
    }
    memset(&a, 0, sizeof a);
    (void)attni_side_init(d, 0, &a.side[0]);
    (void)attni_side_init(d, 1, &a.side[1]);
    a.n_sides = d->kv.v.data == d->kv.k.data ? 1 : 2; // as their copies are, see attni_bad_cache
    a.heads = d->n_kv_heads;
    for (i = 0; i < n; i += step) {
        step = attni_cu_independent(copies, i, n);
        for (j = 0, most = 0, a.n = 0; j < step; j++) {
            if (copies[i + j].src == copies[i + j].dst || !copies[i + j].n_tokens) continue;
            a.copy[a.n++] = copies[i + j];
            most = attni_max32(most, copies[i + j].n_tokens);
        }
        if (!a.n) continue;
        attni_cu_copy_rows<<<dim3((unsigned)a.n, (unsigned)attni_min32(most, 64)), 128, 0,
                             stream>>>(a);
        if (cudaGetLastError() != cudaSuccess) return ATTN_ERR_DEVICE;
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_cache_load(const attn_cuda *c, const attn_desc *d,
                                          const attn_cache_load *loads, int32_t n,
                                          attn_cuda_stream stream) {
    attni_cu_load_args a;
    attni_cu_choice choice;
    attn_result r = attni_cu_choose(c, d, &choice);
    int32_t i, step;
    if (r != ATTN_OK) return r;
    if (d->kv.layout == ATTN_K16) return ATTN_ERR_UNSUPPORTED;
    if (!d->kv.k.data || !d->kv.v.data || n < 0 || (n > 0 && !loads) || !d->kv.cache ||
        attni_bad_cache(&d->kv))
        return ATTN_ERR_ARGUMENT;
    for (i = 0; i < n; i++)
        if (loads[i].page < 0 || loads[i].page >= d->kv.n_pages || loads[i].slot < 0 ||
            loads[i].slot >= d->kv.cache->n_slots)
            return ATTN_ERR_PAGE;
    memset(&a, 0, sizeof a);
    (void)attni_side_init(d, 0, &a.side[0]);
    (void)attni_side_init(d, 1, &a.side[1]);
    a.n_sides = d->kv.v.data == d->kv.k.data ? 1 : 2;
    a.odd = attni_cu_odd_side(&a.side[0]) || attni_cu_odd_side(&a.side[1]);
    for (i = 0; i < n; i += step) {
        step = attni_min32(n - i, ATTNI_CU_LOADS);
        memcpy(a.load, loads + i, (size_t)step * sizeof *loads);
        attni_cu_load_pages<<<dim3((unsigned)step, (unsigned)(1 + 1023 / step)), 256, 0, stream>>>(
            a);
        if (cudaGetLastError() != cudaSuccess) return ATTN_ERR_DEVICE;
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_swap_pages(const attn_cuda *c, const attn_desc *d,
                                          const int32_t *pages, int32_t n, void *host_k,
                                          void *host_v, int to_host, attn_cuda_stream stream) {
    attni_cu_choice choice;
    attni_side s;
    attn_result r = attni_cu_choose(c, d, &choice);
    int32_t i, v;
    if (r != ATTN_OK) return r;
    if (!d->kv.k.data || !d->kv.v.data || n < 0 || (n > 0 && !pages)) return ATTN_ERR_ARGUMENT;
    for (i = 0; i < n; i++)
        if (pages[i] < 0 || pages[i] >= d->kv.n_pages) return ATTN_ERR_PAGE;
    for (v = 0; v < 2; v++) {
        uint8_t *host = (uint8_t *)(v ? host_v : host_k);
        if (!host) continue;
        (void)attni_side_init(d, v, &s);
        for (i = 0; i < n; i++) {
            uint8_t *there = s.data + pages[i] * s.page_bytes, *here = host + i * s.page_bytes;
            if (cudaMemcpyAsync(to_host ? here : there, to_host ? there : here,
                                (size_t)s.need_bytes, cudaMemcpyDefault, stream) != cudaSuccess)
                return ATTN_ERR_DEVICE;
        }
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_cuda_merge(const attn_cuda *c, const attn_tensor *o,
                                     const float *const *lse, int32_t n, int64_t n_tokens,
                                     int32_t n_heads, int32_t dim, const attn_tensor *o_out,
                                     float *lse_out, attn_cuda_stream stream) {
    attni_cu_merge_args a;
    attn_result r;
    int32_t i;
    if (!c || !o || !lse || !o_out || n < 1 || n > ATTNI_CU_STATES || n_tokens < 0 || n_heads < 1 ||
        dim < 1)
        return ATTN_ERR_ARGUMENT;
    if (n_tokens > ((int64_t)1 << 31) / n_heads) return ATTN_ERR_OVERFLOW;
    memset(&a, 0, sizeof a);
    for (i = 0; i < n; i++) {
        if ((r = attni_cu_rows_of(&o[i], n_heads, dim, n_tokens, &a.o[i])) != ATTN_OK) return r;
        if (!lse[i]) return ATTN_ERR_ARGUMENT;
        a.lse[i] = lse[i];
    }
    if ((r = attni_cu_rows_of(o_out, n_heads, dim, n_tokens, &a.out)) != ATTN_OK) return r;
    if (!n_tokens) return ATTN_OK;
    a.lse_out = lse_out;
    a.n_tokens = n_tokens;
    a.n = n;
    a.n_heads = n_heads;
    a.dim = dim;
    attni_cu_merge_states<<<(unsigned)((n_tokens * n_heads + 3) / 4), 128, 0, stream>>>(a);
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

// ==== >>impl-delta  Correcting sparse attention by some dense rows ===============================

typedef struct attni_cu_delta_args {
    attn_tensor o, delta;   // strides resolved
    int64_t n;              // elements of O (take: of delta) to look after
    int32_t heads, dim;
    int32_t token0, q_len, step, first; // of the sequence in O; of its queries; delta's first row
    int32_t add, interpolate;
} attni_cu_delta_args;

ATTNI_DEV float attni_cu_delta_at(const attni_cu_delta_args &a, int64_t row, int32_t h, int32_t e) {
    return attni_get(a.delta.data, a.delta.dtype,
                     row * a.delta.stride_token + h * a.delta.stride_head + e);
}

// A thread has an element of a row of delta, or of a row of O that is added to.
static __global__ void __launch_bounds__(256)
    attni_cu_delta_rows(const __grid_constant__ attni_cu_delta_args a) {
    const int64_t per = (int64_t)a.heads * a.dim;
    for (int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x; at < a.n;
         at += (int64_t)gridDim.x * 256) {
        const int32_t j = (int32_t)(at / per) + (a.add ? a.first * a.step : a.first);
        const int32_t in = (int32_t)(at % per), h = in / a.dim, e = in % a.dim;
        const int32_t i = a.add ? j / a.step : j, q = a.add ? j : j * a.step;
        const int64_t there = ((int64_t)a.token0 + q) * a.o.stride_token + h * a.o.stride_head + e;
        const float o = attni_get(a.o.data, a.o.dtype, there);
        float x = attni_cu_delta_at(a, i, h, e);
        if (!a.add) {
            attni_put(a.delta.data, a.delta.dtype,
                      i * a.delta.stride_token + h * a.delta.stride_head + e, __fsub_rn(x, o));
            continue;
        }
        if (a.interpolate && j % a.step && i < (a.q_len - 1) / a.step) {
            const float f = __fdiv_rn((float)(j % a.step), (float)a.step);
            const float y = attni_cu_delta_at(a, i + 1, h, e);
            x = __fadd_rn(x, __fmul_rn(f, __fsub_rn(y, x)));
        }
        attni_put(a.o.data, a.o.dtype, there, __fadd_rn(x, o));
    }
}

static attn_result attni_cu_delta(const attn_cuda *c, const attn_desc *d, int32_t s, int32_t step,
                                  const attn_tensor *delta, int32_t first, int32_t count, int add,
                                  int interpolate, attn_cuda_stream stream) {
    attni_cu_delta_args a;
    attni_cu_choice k;
    int64_t tokens;
    attn_result r = attni_cu_choose(c, d, &k);
    if (r != ATTN_OK) return r;
    if (!d->q_start) return ATTN_ERR_ARGUMENT;
    if ((r = attni_delta_check(d, s, step, delta, first, count)) != ATTN_OK || !count) return r;
    memset(&a, 0, sizeof a);
    a.heads = d->n_heads;
    a.dim = attni_v_dim(d);
    a.o = attni_cu_resolved(d).o;
    (void)attni_cu_rows_of(delta, a.heads, a.dim, 0, &a.delta);
    a.token0 = d->q_start[s];
    a.q_len = d->q_start[s + 1] - d->q_start[s];
    a.step = step;
    a.first = first;
    a.add = add;
    a.interpolate = interpolate;
    tokens = attni_min64((int64_t)count * step, a.q_len - (int64_t)first * step);
    a.n = (add ? tokens : count) * a.heads * a.dim;
    attni_cu_delta_rows<<<(unsigned)attni_min64((a.n + 255) / 256, 16 * c->n_sm), 256, 0, stream>>>(
        a);
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

ATTN_DEF attn_result attn_cuda_delta_take(const attn_cuda *c, const attn_desc *d, int32_t s,
                                          int32_t step, const attn_tensor *delta, int32_t first,
                                          int32_t count, attn_cuda_stream stream) {
    return attni_cu_delta(c, d, s, step, delta, first, count, 0, 0, stream);
}

ATTN_DEF attn_result attn_cuda_delta_add(const attn_cuda *c, const attn_desc *d, int32_t s,
                                         int32_t step, int interpolate, const attn_tensor *delta,
                                         int32_t first, int32_t count, attn_cuda_stream stream) {
    return attni_cu_delta(c, d, s, step, delta, first, count, 1, interpolate, stream);
}

// ==== >>impl-summary  What keys lie in ===========================================================
//
// Sums and folds go in the CPU's order: the same bits. Sequences that share a page may write a node
// more than once, the same each time.

typedef struct attni_cu_summary_args {
    attn_desc d;              // tables lie in device memory
    attni_side k;
    const attni_cu_header *header;
    const attn_plan_seq *seq;
    uint16_t *data;
    int32_t *error;
} attni_cu_summary_args;

// Cells [*g0, *g1) that hold new tokens of a sequence; 0: there are none.
ATTNI_DEV int attni_cu_new_cells(const attni_cu_summary_args &a, const attn_plan_seq &q,
                                 int64_t *g0, int64_t *g1) {
    const int64_t from = (int64_t)q.q_pos0 - q.kv_pos0, j0 = attni_max64(from, 0);
    const int64_t j1 = attni_min64(from + q.q_len, q.kv_len);
    if (j1 <= j0) return 0;
    *g0 = attni_cell_from(&a.d, q.kv_pos0, j0);
    *g1 = attni_cell_from(&a.d, q.kv_pos0, j1 - 1) + 1;
    return 1;
}

// The page of a cell of sequence s, *place and *n its tokens there; -1 where none is held.
ATTNI_DEV int32_t attni_cu_cell_page(const attni_cu_summary_args &a, int32_t s, int64_t cell,
                                     int32_t *place, int32_t *n) {
    const attn_plan_seq &q = a.seq[s];
    const int32_t pt = a.d.kv.page_tokens;
    const int64_t j = attni_place_from(&a.d, q.kv_pos0, cell);
    int32_t id = s;
    if (j < 0 || j >= q.kv_len) return -1;
    *place = (int32_t)(j % pt);
    *n = attni_min32(attni_min32(ATTNI_CELL, pt - *place), (int32_t)(q.kv_len - j));
    if (a.d.kv.page_table) id = a.d.kv.page_table[s * a.d.kv.page_table_stride + j / pt];
    if ((uint32_t)id < (uint32_t)a.d.kv.n_pages) return id;
    if (a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
    return -1;
}

// The block's threads have smallest and largest values of dims in bits; its node and the middle.
ATTNI_DEV void attni_cu_put_box(const attni_cu_summary_args &a, uint16_t *node, int32_t i,
                                uint16_t lo, uint16_t hi, float *mid) {
    const uint16_t box[2] = {lo, hi};
    node[i] = lo;
    node[a.d.head_dim + i] = hi;
    mid[i] = attni_node_middle(box, 1, 0);
}

// The node's ball from n smaller ones at distances sqrt(sum), in order; not finite: anything. One
// thread calls.
ATTNI_DEV void attni_cu_put_ball(const attni_cu_summary_args &a, uint16_t *node, int finite, int n,
                                 const float *sum, const float *r) {
    float radius = 0;
    for (int t = 0; t < n && finite; t++) attni_node_ball(sum[t], r ? r[t] : 0, &radius);
    for (int i = 0; i < 8; i++) node[2 * a.d.head_dim + i] = 0;
    finite = finite && attni_finite(radius);
    node[2 * a.d.head_dim] = finite ? attni_outwards(radius, 1) : 0x7f80;
}

struct attni_cu_summer { // in shared memory
    float mid[ATTN_MAX_HEAD_DIM], scale[ATTNI_CELL], sum[ATTNI_CELL], radius[ATTNI_RUN];
    uint64_t owner;
    int32_t most;
};

// A cell of n tokens, at most 64, of a page from token `place` on. All threads call.
ATTNI_DEV void attni_cu_sum_cell(const attni_cu_summary_args &a, attni_cu_summer *m, int32_t page,
                                 int32_t place, int n, int32_t head, uint16_t *node) {
    constexpr int EACH = (ATTN_MAX_HEAD_DIM + ATTNI_CU_THREADS - 1) / ATTNI_CU_THREADS;
    const uint8_t *base = attni_page_data(&a.k, page);
    const int tid = (int)threadIdx.x, dim = a.d.head_dim;
    float lo[EACH], hi[EACH];
    int finite = 1;
    if (tid < n) m->scale[tid] = attni_scale_in(&a.k, base, place + tid, head);
#pragma unroll
    for (int e = 0; e < EACH; e++) lo[e] = __int_as_float(0x7f800000), hi[e] = ATTNI_NINF;
    __syncthreads();
    for (int t = 0; t < n; t++) {
        const uint8_t *row = base + attni_token_offset(&a.k, place + t, head);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = tid + e * ATTNI_CU_THREADS;
            if (i >= dim) break;
            const float key = attni_mul(attni_get(row, a.k.dtype, i), m->scale[t]);
            finite &= attni_finite(key);
            lo[e] = key < lo[e] ? key : lo[e];
            hi[e] = key > hi[e] ? key : hi[e];
        }
    }
    finite = __syncthreads_and(finite);
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (tid + e * ATTNI_CU_THREADS < dim)
            attni_cu_put_box(a, node, tid + e * ATTNI_CU_THREADS,
                             finite ? attni_outwards(lo[e], 0) : 0xff80,
                             finite ? attni_outwards(hi[e], 1) : 0x7f80, m->mid);
    __syncthreads();
    if (tid < n && finite) {
        const uint8_t *row = base + attni_token_offset(&a.k, place + tid, head);
        float x = 0;
        for (int i = 0; i < dim; i++) {
            const float off = attni_mul(attni_get(row, a.k.dtype, i), m->scale[tid]) - m->mid[i];
            x += attni_mul(off, off);
        }
        m->sum[tid] = x;
    }
    __syncthreads();
    if (tid == 0) attni_cu_put_ball(a, node, finite, n, m->sum, NULL);
}

// x: new cells of a sequence, y: sequences, z: KV heads.
static __global__ void __launch_bounds__(ATTNI_CU_THREADS)
    attni_cu_sum_cells(const __grid_constant__ attni_cu_summary_args a) {
    __shared__ attni_cu_summer m;
    const int32_t head = (int32_t)blockIdx.z, n_seq = a.header->n_seq;
    for (int32_t s = (int32_t)blockIdx.y; s < n_seq; s += (int32_t)gridDim.y) {
        int64_t g0, g1;
        if (!attni_cu_new_cells(a, a.seq[s], &g0, &g1)) continue;
        for (int64_t g = g0 + blockIdx.x; g < g1; g += gridDim.x) {
            int32_t place, n, at;
            const int32_t page = attni_cu_cell_page(a, s, g, &place, &n);
            if (page < 0) continue;
            __syncthreads();
            if (threadIdx.x == 0) m.most = n;
            __syncthreads(); // who shares the page may hold more of it
            for (int32_t u = (int32_t)threadIdx.x; u < n_seq; u += ATTNI_CU_THREADS)
                if (attni_cu_cell_page(a, u, g, &at, &n) == page) atomicMax(&m.most, n);
            __syncthreads();
            attni_cu_sum_cell(a, &m, page, place, m.most, head,
                              attni_node_at(&a.d, a.data, 0, page, g, head));
        }
    }
}

// The sequence to make a run's node for s from, whose last cell is g: see attni_summary_close. All
// threads call.
ATTNI_DEV int32_t attni_cu_run_owner(const attni_cu_summary_args &a, int32_t s, int64_t g,
                                     int32_t page, uint64_t *owner) {
    int32_t place, n;
    __syncthreads();
    if (threadIdx.x == 0) *owner = ~(uint64_t)0;
    __syncthreads();
    for (int32_t u = (int32_t)threadIdx.x; u < a.header->n_seq; u += ATTNI_CU_THREADS)
        if (attni_cu_cell_page(a, u, g, &place, &n) == page)
            atomicMin((unsigned long long *)owner,
                      (unsigned long long)a.seq[u].kv_pos0 << 32 | (uint32_t)u);
    __syncthreads();
    return (int32_t)(uint32_t)*owner;
}

// As attni_cu_sum_cells, of runs that are complete.
static __global__ void __launch_bounds__(ATTNI_CU_THREADS)
    attni_cu_sum_runs(const __grid_constant__ attni_cu_summary_args a) {
    __shared__ attni_cu_summer m;
    const int32_t head = (int32_t)blockIdx.z, dim = a.d.head_dim, tid = (int32_t)threadIdx.x;
    for (int32_t s = (int32_t)blockIdx.y; s < a.header->n_seq; s += (int32_t)gridDim.y) {
        const attn_plan_seq &q = a.seq[s];
        int64_t g0, g1;
        if (!attni_cu_new_cells(a, q, &g0, &g1)) continue;
        const int64_t last = attni_cell_from(&a.d, q.kv_pos0, q.kv_len - 1);
        for (int64_t run = g0 / ATTNI_RUN + blockIdx.x; run <= (g1 - 1) / ATTNI_RUN;
             run += gridDim.x) {
            const int64_t g = run * ATTNI_RUN;
            const uint16_t *cell[ATTNI_RUN];
            int32_t place, len, n = 0, bad = 0;
            if (last < g + ATTNI_RUN - 1) continue;
            const int32_t page = attni_cu_cell_page(a, s, g + ATTNI_RUN - 1, &place, &len);
            if (page < 0) continue;
            const int32_t u = attni_cu_run_owner(a, s, g + ATTNI_RUN - 1, page, &m.owner);
            for (int i = 0; i < ATTNI_RUN; i++) {
                if (attni_place_from(&a.d, a.seq[u].kv_pos0, g + i) < 0) continue; // gone
                const int32_t p = attni_cu_cell_page(a, u, g + i, &place, &len);
                bad |= p < 0;
                cell[n++] = attni_node_at(&a.d, a.data, 0, attni_max32(p, 0), g + i, head);
            }
            if (bad) continue;
            uint16_t *node = attni_node_at(&a.d, a.data, 1, page, g + ATTNI_RUN - 1, head);
            for (int i = tid; i < dim; i += ATTNI_CU_THREADS) {
                float lo = __int_as_float(0x7f800000), hi = ATTNI_NINF;
                for (int t = 0; t < n; t++) {
                    const float x = attni_from_bf16(cell[t][i]);
                    const float y = attni_from_bf16(cell[t][dim + i]);
                    lo = x < lo ? x : lo;
                    hi = y > hi ? y : hi;
                }
                attni_cu_put_box(a, node, i, attni_outwards(lo, 0), attni_outwards(hi, 1), m.mid);
            }
            __syncthreads();
            for (int t = tid; t < n; t += ATTNI_CU_THREADS) {
                float x = 0;
                for (int i = 0; i < dim; i++) {
                    const float off = attni_node_middle(cell[t], dim, i) - m.mid[i];
                    x += attni_mul(off, off);
                }
                m.sum[t] = x, m.radius[t] = attni_from_bf16(cell[t][2 * dim]);
            }
            __syncthreads();
            if (tid == 0) attni_cu_put_ball(a, node, 1, n, m.sum, m.radius);
            __syncthreads();
        }
    }
}

ATTN_DEF attn_result attn_cuda_summarize(const attn_cuda *c, const attn_desc *d,
                                         const attn_cuda_plan *g, const attn_summary *y,
                                         attn_cuda_stream stream) {
    attni_cu_summary_args a;
    attni_cu_choice k;
    dim3 grid;
    attn_result r = attni_cu_choose(c, d, &k);
    if (r != ATTN_OK) return r;
    if (d->kv.layout == ATTN_K16 || d->n_kv_heads > 65535) return ATTN_ERR_UNSUPPORTED;
    if (!g || !g->device || !y || !y->data || !d->kv.k.data || attni_bad_cache(&d->kv))
        return ATTN_ERR_ARGUMENT;
    if ((uintptr_t)y->data % 64) return ATTN_ERR_BUFFER;
    if (d->n_seq != g->n[ATTNI_CU_N_SEQS] || d->kv.page_tokens != g->shape[4])
        return ATTN_ERR_STALE;
    memset(&a, 0, sizeof a);
    a.d = *d;
    attni_cu_device_tables(g, &a.d);
    (void)attni_side_init(d, 0, &a.k);
    a.header = (const attni_cu_header *)(const void *)((const uint8_t *)g->device +
                                                       g->at[ATTNI_CU_HEADER]);
    a.seq = (const attn_plan_seq *)(const void *)((const uint8_t *)g->device +
                                                  g->at[ATTNI_CU_SEQ]);
    a.data = y->data;
    a.error = c->error;
    grid = dim3((unsigned)attni_min64(g->cap[1] / ATTNI_CELL + 2, 1024),
                (unsigned)attni_min64(g->cap[0], 1024), (unsigned)d->n_kv_heads);
    attni_cu_sum_cells<<<grid, ATTNI_CU_THREADS, 0, stream>>>(a);
    attni_cu_sum_runs<<<grid, ATTNI_CU_THREADS, 0, stream>>>(a);
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

// ==== >>impl-select-keys  Selectors: rows of lists, keys anywhere, products ======================
//
// Scores are f32 sums of products of the stored values: by tensor cores where Q is f16 or bf16 and
// K of Q's type or quantised (codes are exact in either), else one fused multiply-add after the
// other. A block of 256 threads has 128 rows against 64 keys: warp w has rows 16 w ..., laid out as
// mma.m16n8k16 leaves them, whatever made them.

enum { ATTNI_CU_PICK = 256, ATTNI_CU_PICK_ROWS = 128, ATTNI_CU_PICK_KEYS = 64 };
enum { ATTNI_CU_CHUNK = 1024 }; // keys that one block looks at for FLEX as coded

typedef struct attni_cu_est { // a sequence that FLEX estimates
    int32_t seq;              // -1: none
    int32_t n, p0, nb;        // its last queries, the first one's position, blocks up to the last's
} attni_cu_est;

typedef struct attni_cu_row_of { // whose a list row is
    int32_t seq, block;          // -1: nobody's; row block of absolute positions
    int32_t est;                 // FLEX: in est[]; -1: keeps every block
    int32_t wanted;              // used by kernels
} attni_cu_row_of;

typedef struct attni_cu_pick {
    attn_desc d;               // tables lie in device memory
    attni_side k;
    attn_select f;             // every default filled in
    attn_selection x;
    attn_summary y;
    const attni_cu_header *header;
    const attn_plan_seq *seq;
    const int32_t *seq_row;    // NULL: rows as attn_selection_follow counts them without slots
    attni_cu_row_of *row_of;   // (max_rows)
    attni_cu_est *est;         // (n_est)
    uint8_t *work;             // (n_est) of est_bytes each
    int32_t *error;
    uint32_t *reads;           // (n_pages) of the cache, or NULL
    int32_t each_key;          // counts there, else one of 64
    int64_t est_bytes, head_bytes, at[12];
    int64_t kv_cap;            // positions, chunks and blocks there is room for
    int32_t n_chunks, n_blocks, n_est;
    int32_t group, per_list;   // query heads of a KV head, of a list
    int32_t mode;              // 0: f32; 1: bf16; 2: f16
    int32_t wide, row_bytes, per, per_shift; // of a row in shared memory: elements, bytes, 16 bytes
    int32_t odd_k, odd_q, page_shift;
    int32_t tile_bytes;        // of the tiles in shared memory
    float scale;
    int32_t flip;              // HiP: the scale is negative, so queries are turned round
    uint32_t page16, token16;  // HiP: of K, 16-byte pieces from a page, a token to the next
    int32_t at_once;           // HIP1, HIP2: list rows of a launch
} attni_cu_pick;

typedef struct attni_cu_keys { // where the keys of four tiles lie; 64 of each
    const uint8_t *row[4][ATTNI_CU_PICK_KEYS]; // NULL: not held
    float scale[4][ATTNI_CU_PICK_KEYS];        // of a product
} attni_cu_keys;

ATTNI_DEV float attni_cu_value_at(const uint8_t *row, attn_dtype t, int i) {
    const uint16_t *half = (const uint16_t *)(const void *)row;
    if (t == ATTN_BF16) return __uint_as_float((uint32_t)half[i] << 16);
    if (t == ATTN_F16) return attni_half(half[i]);
    return attni_get(row, t, i);
}

// Where a page is read: its copy, if there is one.
ATTNI_DEV_FAR const uint8_t *attni_cu_copy_of(const attni_cu_pick &a, int32_t page, int32_t place) {
    const int32_t slot = __ldg(a.k.slot + page);
    if (a.reads && (a.each_key || place % ATTNI_CU_BLOCK == 0)) atomicAdd(&a.reads[page], 1u);
    if ((slot < -1 || slot >= a.k.n_slots) && a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
    return attni_page_data(&a.k, page);
}

// The page of token j of what a sequence holds.
ATTNI_DEV int32_t attni_cu_page_of(const attni_cu_pick &a, int32_t seq, int32_t j) {
    const int32_t page = a.page_shift >= 0 ? j >> a.page_shift : j / a.d.kv.page_tokens;
    return a.d.kv.page_table ? __ldg(a.d.kv.page_table + seq * a.d.kv.page_table_stride + page)
                             : seq;
}

// Where token j lies in its page; NULL: the page is none.
ATTNI_DEV const uint8_t *attni_cu_token_in(const attni_cu_pick &a, int32_t id, int32_t kv_head,
                                           int32_t j, float *scale) {
    const int32_t place = a.page_shift >= 0 ? j & ((1 << a.page_shift) - 1)
                                            : j % a.d.kv.page_tokens;
    if ((uint32_t)id >= (uint32_t)a.d.kv.n_pages) {
        if (a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
        return NULL;
    }
    const uint8_t *base = a.k.data + id * a.k.page_bytes;
    if (a.k.copies) base = attni_cu_copy_of(a, id, place);
    *scale = attni_is_scaled(a.k.dtype) ? a.scale * attni_scale_in(&a.k, base, place, kv_head)
                                        : a.scale;
    return base + place * a.k.token_bytes + kv_head * a.k.head_bytes;
}

ATTNI_DEV const uint8_t *attni_cu_token_at(const attni_cu_pick &a, int32_t seq, int32_t kv_head,
                                           int32_t j, float *scale) {
    return attni_cu_token_in(a, attni_cu_page_of(a, seq, j), kv_head, j, scale);
}

// Where the key at position pos lies, NULL when it is not held.
ATTNI_DEV const uint8_t *attni_cu_key_at(const attni_cu_pick &a, const attn_plan_seq &q,
                                         int32_t seq, int32_t kv_head, int64_t pos, float *scale) {
    const int64_t j = pos - q.kv_pos0;
    *scale = 0;
    return j < 0 || j >= q.kv_len ? NULL : attni_cu_token_at(a, seq, kv_head, (int32_t)j, scale);
}

// Key i of a tile.
ATTNI_DEV void attni_cu_find_key(const attni_cu_pick &a, const attn_plan_seq &q, int32_t seq,
                                 int32_t kv_head, int64_t pos, attni_cu_keys *s, int slot, int i) {
    float scale;
    s->row[slot][i] = attni_cu_key_at(a, q, seq, kv_head, pos, &scale);
    s->scale[slot][i] = scale;
}

ATTNI_DEV const uint8_t *attni_cu_query_at(const attni_cu_pick &a, int64_t token, int32_t head) {
    return (const uint8_t *)a.d.q.data +
           (token * a.d.q.stride_token + head * a.d.q.stride_head) *
               (a.d.q.dtype == ATTN_F32 ? 4 : 2);
}

// Sixteen codes to pairs.
ATTNI_DEV_FAR void attni_cu_widen16(int bf, attn_dtype t, const uint8_t *src, uint32_t out[8]) {
    uint4 x;
    if (t == ATTN_I4) {
        const uint2 y = *(const uint2 *)(const void *)src;
        x = make_uint4(y.x, y.y, 0, 0);
    } else {
        x = *(const uint4 *)(const void *)src;
    }
    if (bf) attni_cu_convert_any<1>(t, x, out);
    else attni_cu_convert_any<0>(t, x, out);
}

// n rows of Q or K to a tile of 16-bit elements, `row_bytes` apart; NULL: zeros. All threads call;
// what is copied asynchronously is not committed.
ATTNI_DEV void attni_cu_copy_rows(const attni_cu_pick &a, const uint8_t *const *rows, int n,
                                  attn_dtype t, int odd, uint32_t dst) {
    const int scaled = attni_is_scaled(t), dim = a.d.head_dim;
    const int per = scaled ? a.per / 2 : a.per;
    if (!scaled && !odd && a.per_shift >= 0) { // a thread keeps to its 16 bytes of a row
        const int c = (int)threadIdx.x & (per - 1), step = (int)blockDim.x >> a.per_shift;
        const uint32_t to = dst + 16 * c;
#pragma unroll 4
        for (int r = (int)threadIdx.x >> a.per_shift; r < n; r += step) {
            const uint8_t *src = rows[r];
            const int held = src && 8 * c < dim;
            attni_cp_async16(to + (uint32_t)(r * a.row_bytes), held ? src + 16 * c : a.k.data,
                             held ? 16 : 0);
        }
        return;
    }
    for (int i = (int)threadIdx.x; i < n * per; i += (int)blockDim.x) {
        const int r = i / per, c = i - r * per;
        const uint8_t *src = rows[r];
        const uint32_t to = dst + (uint32_t)(r * a.row_bytes + c * (scaled ? 32 : 16));
        if (!scaled && !odd) {
            const int held = src && 8 * c < dim;
            attni_cp_async16(to, held ? src + 16 * c : a.k.data, held ? 16 : 0);
            continue;
        }
        uint32_t u[8];
#pragma unroll
        for (int e = 0; e < 8; e++) u[e] = 0;
        if (scaled && src && !odd && 16 * c + 16 <= dim) {
            attni_cu_widen16(a.mode == 1, t, src + (t == ATTN_I4 ? 8 : 16) * c, u);
        } else if (src) {
            for (int e = 0; e < (scaled ? 16 : 8); e++) {
                const int at = (scaled ? 16 : 8) * c + e;
                const float y = at < dim ? attni_cu_value_at(src, t, at) : 0.0f;
                u[e >> 1] |= (a.mode == 1 ? attni_pair<1>(y, 0) : attni_pair<0>(y, 0))
                             << 16 * (e & 1);
            }
        }
        attni_sts16(to, u);
        if (scaled) attni_sts16(to + 16, u + 4);
    }
}

// acc (SETS, 16, 64) of a warp: rows from q on, those of the next set `apart` bytes behind, against
// the tile k, all in shared memory.
template <int BF, int SETS>
ATTNI_DEV void attni_cu_mma_tile(const attni_cu_pick &a, float (*acc)[8][4], uint32_t q,
                                 uint32_t apart, uint32_t k) {
    const int lane = (int)threadIdx.x & 31;
    q += (uint32_t)((lane & 15) * a.row_bytes + (lane >> 4) * 16);
    k += (uint32_t)(((lane >> 4) * 8 + (lane & 7)) * a.row_bytes + (lane >> 3 & 1) * 16);
    for (int e = 0; e < 2 * a.wide; e += 32) {
        uint32_t x[SETS][4];
#pragma unroll
        for (int s = 0; s < SETS; s++) attni_ldmatrix(x[s], q + s * apart + e);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t y[4];
            attni_ldmatrix(y, k + (uint32_t)(16 * j * a.row_bytes) + e);
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                attni_mma<BF>(acc[s][2 * j], x[s], y[0], y[1]);
                attni_mma<BF>(acc[s][2 * j + 1], x[s], y[2], y[3]);
            }
        }
    }
}

// The same of one set in f32, from where its 128 rows lie. All threads of the block call.
// buf: (192, 17).
ATTNI_DEV_FAR void attni_cu_f32_tile(const attni_cu_pick &a, float acc[8][4],
                                     const uint8_t *const *q, const uint8_t *const *k, float *buf) {
    const int lane = (int)threadIdx.x & 31, row = ((int)threadIdx.x >> 5) * 16 + (lane >> 2);
    const int n = ATTNI_CU_PICK_ROWS;
    for (int c = 0; c < a.d.head_dim; c += 16) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < (n + ATTNI_CU_PICK_KEYS) * 16; i += (int)blockDim.x) {
            const int r = i >> 4, e = c + (i & 15), key = r >= n;
            const uint8_t *src = key ? k[r - n] : q[r];
            buf[r * 17 + (i & 15)] = !src || e >= a.d.head_dim ? 0.0f :
                attni_cu_value_at(src, key ? a.k.dtype : a.d.q.dtype, e);
        }
        __syncthreads();
#pragma unroll 4
        for (int e = 0; e < 16; e++) {
            const float q0 = buf[row * 17 + e], q1 = buf[(row + 8) * 17 + e];
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const float y = buf[(n + 8 * (j >> 1) + 2 * (lane & 3) + (j & 1)) * 17 + e];
                acc[j >> 1][j & 1] = __fmaf_rn(q0, y, acc[j >> 1][j & 1]);
                acc[j >> 1][2 + (j & 1)] = __fmaf_rn(q1, y, acc[j >> 1][2 + (j & 1)]);
            }
        }
    }
    __syncthreads();
}

// What a tile of keys comes to, before scales, for SETS of 128 rows. q_tile: 16-bit rows in shared
// memory, or scratch for f32; q: where rows lie. Only `rows` are there: what else is the first set.
template <int SETS>
ATTNI_DEV void attni_cu_products(const attni_cu_pick &a, float (*acc)[8][4], uint8_t *q_tile,
                                 int rows, uint32_t k_tile, const uint8_t *const *q,
                                 const uint8_t *const *k) {
    const uint32_t at = attni_smem(q_tile) + (threadIdx.x >> 5) * 16 * (uint32_t)a.row_bytes;
    const uint32_t apart = (uint32_t)(rows - ATTNI_CU_PICK_ROWS) * (uint32_t)a.row_bytes;
#pragma unroll
    for (int j = 0; j < 32 * SETS; j++) acc[j >> 5][j >> 2 & 7][j & 3] = 0;
    if (a.mode == 1) attni_cu_mma_tile<1, SETS>(a, acc, at, apart, k_tile);
    else if (a.mode == 2) attni_cu_mma_tile<0, SETS>(a, acc, at, apart, k_tile);
    else {
        float x[8][4]; // in memory, so that acc need not be
#pragma unroll
        for (int s = 0; s < SETS; s++) {
#pragma unroll
            for (int j = 0; j < 32; j++) x[j >> 2][j & 3] = 0;
            attni_cu_f32_tile(a, x, q + s * ATTNI_CU_PICK_ROWS, k, (float *)(void *)q_tile);
#pragma unroll
            for (int j = 0; j < 32; j++) acc[s][j >> 2][j & 3] = x[j >> 2][j & 3];
        }
    }
}

ATTNI_DEV_FAR float attni_cu_capped(float s, float cap) { return cap * tanhf(s / cap); }

// The score of a product. scale: with the key's own.
ATTNI_DEV float attni_cu_score(const attni_cu_pick &a, float product, float scale) {
    const float s = product * scale, cap = a.d.logits.softcap;
    return cap > 0 ? attni_cu_capped(s, cap) : s;
}

// Whose each list row is, and which sequences FLEX looks into. One block.
static __global__ void __launch_bounds__(1024)
    attni_cu_pick_rows(const __grid_constant__ attni_cu_pick a) {
    __shared__ int32_t at_row, at_est, warps[2][32];
    __shared__ attni_cu_row_of first_of[1024];
    __shared__ int32_t row_at[1024], n_of[1024];
    const int tid = (int)threadIdx.x, lane = tid & 31;
    const int32_t n_seq = a.header->n_seq, b = a.f.kv_block;
    const attni_cu_row_of nobody = {-1, 0, -1, 0};
    const attni_cu_est none = {-1, 0, 0, 0};
    for (int i = tid; i < a.x.max_rows; i += 1024) a.row_of[i] = nobody;
    for (int i = tid; i < a.n_est; i += 1024) a.est[i] = none;
    if (tid == 0) at_row = a.f.n_slots, at_est = 0;
    for (int32_t s0 = 0; s0 < n_seq; s0 += 1024) {
        const int32_t s = s0 + tid;
        attn_plan_seq q;
        memset(&q, 0, sizeof q);
        if (s < n_seq) q = a.seq[s];
        const int decodes = a.f.n_slots && q.q_len == 1;
        const int32_t first = q.q_pos0 / a.f.row_block;
        const int32_t n = q.q_len > 0 ? (q.q_pos0 + q.q_len - 1) / a.f.row_block - first + 1 : 0;
        int32_t rows = decodes ? 0 : n, est = 0, rows_in, est_in;
        if (a.f.kind == ATTN_SELECT_FLEX) {
            const int64_t least = ((int64_t)a.f.flex.min_budget + b - 1) / b * b;
            est = q.q_len > attni_max64(2 * (int64_t)b, least) &&
                  q.kv_len > a.f.dense_below;
        }
        rows_in = rows, est_in = est;
        __syncthreads();
        for (int i = 1; i < 32; i *= 2) {
            const int32_t x = __shfl_up_sync(~0u, rows_in, i), y = __shfl_up_sync(~0u, est_in, i);
            if (lane >= i) rows_in += x, est_in += y;
        }
        if (lane == 31) warps[0][tid >> 5] = rows_in, warps[1][tid >> 5] = est_in;
        __syncthreads();
        int32_t row = at_row + rows_in - rows, e = at_est + est_in - est;
        for (int i = 0; i < tid >> 5; i++) row += warps[0][i], e += warps[1][i];
        __syncthreads();
        if (tid == 1023) at_row = row + rows, at_est = e + est;
        if (decodes) row = s;
        if (a.seq_row && s < n_seq) row = a.seq_row[s] + first;
        if (est && e >= a.n_est && a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
        if (est && e < a.n_est) {
            attni_cu_est x;
            x.seq = s;
            x.n = attni_min32(b, q.q_len);
            x.p0 = q.q_pos0 + q.q_len - x.n;
            x.nb = (q.q_pos0 + q.q_len - 1) / b + 1;
            a.est[e] = x;
        }
        const attni_cu_row_of own = {s, first, est && e < a.n_est ? e : -1, 0};
        first_of[tid] = own;
        row_at[tid] = row, n_of[tid] = n;
        __syncthreads();
        for (int j = 0; j < 1024 && s0 + j < n_seq; j++)
            for (int i = tid; i < n_of[j]; i += 1024) {
                attni_cu_row_of x = first_of[j];
                x.block += i;
                if ((uint32_t)(row_at[j] + i) < (uint32_t)a.x.max_rows) a.row_of[row_at[j] + i] = x;
                else if (a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
            }
    }
}

// ==== >>impl-select-cut  Selectors: the largest of many, by count and by sum =====================
//
// For a team of 32 threads, a warp, or 1024, a block, all of which call. Sums are f32, of four runs
// per thread, added up in a fixed order: more values never sum up to less.

typedef struct attni_cu_sums {
    float sum[32];
    uint32_t count[32];
} attni_cu_sums;

typedef struct attni_cu_cut { // what is above key, and the first `ties` of what equals it
    float key;
    int32_t above, ties;
    int32_t held;             // 1: that holds the part (where values are their own weights)
} attni_cu_cut;

enum { ATTNI_CU_STRICT = 1, ATTNI_CU_SHARE = 2 }; // more than part; part is a share of the sum

// Order of floats as integers; -0 as 0.
ATTNI_DEV uint32_t attni_cu_order(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f);
    return u >> 31 ? ~u : u | 0x80000000u;
}
ATTNI_DEV float attni_cu_ordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

ATTNI_DEV uint32_t attni_cu_warp_count(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(~0u, x);
#else
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
#endif
}

ATTNI_DEV float attni_cu_warp_max(float x) {
    for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    return x;
}

ATTNI_DEV float attni_cu_warp_sum(float x) {
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

ATTNI_DEV double attni_cu_warp_double(double x) {
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// How many of v's n values are at least `least`, and what their w (NULL: v) sum up to.
template <int TEAM>
ATTNI_DEV float attni_cu_sum_from(const float *v, const float *w, int32_t n, float least,
                                  uint32_t *count, attni_cu_sums *s) {
    const int lane = (int)threadIdx.x & 31, own = !w || w == v;
    int32_t i = TEAM == 32 ? lane : (int)threadIdx.x;
    float sum[4] = {0, 0, 0, 0}, all;
    uint32_t c[4] = {0, 0, 0, 0};
#pragma unroll 2
    for (; i + 3 * TEAM < n; i += 4 * TEAM)
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const float x = v[i + u * TEAM], y = own ? x : w[i + u * TEAM];
            if (x >= least) c[u]++, sum[u] += y;
        }
    for (; i < n; i += TEAM) {
        const float x = v[i], y = own ? x : w[i];
        if (x >= least) c[0]++, sum[0] += y;
    }
    *count = attni_cu_warp_count(c[0] + c[1] + c[2] + c[3]);
    all = attni_cu_warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (TEAM == 32) return all;
    __syncthreads();
    if (lane == 0) s->count[threadIdx.x >> 5] = *count, s->sum[threadIdx.x >> 5] = all;
    __syncthreads();
    *count = attni_cu_warp_count(s->count[lane]);
    return attni_cu_warp_sum(s->sum[lane]);
}

// The largest of v's n values below limit.
template <int TEAM>
ATTNI_DEV float attni_cu_max_below(const float *v, int32_t n, float limit, attni_cu_sums *s) {
    const int lane = (int)threadIdx.x & 31;
    float most = ATTNI_NINF;
    for (int32_t i = TEAM == 32 ? lane : (int)threadIdx.x; i < n; i += TEAM)
        if (!(v[i] >= limit)) most = fmaxf(most, v[i]);
    most = attni_cu_warp_max(most);
    if (TEAM == 32) return most;
    __syncthreads();
    if (lane == 0) s->sum[threadIdx.x >> 5] = most;
    __syncthreads();
    return attni_cu_warp_max(s->sum[lane]);
}

ATTNI_DEV int attni_cu_holds(double sum, double part, int rule) {
    return rule & ATTNI_CU_STRICT ? sum > part : sum >= part;
}

// The fewest of v's n values, largest first, the lower index of equals first, such that they are
// at least lo and their w hold `part`, or that they are hi. The key is found bit by bit. 1 <= hi <=
// n; w: v or other weights >= 0, NULL: hi decides.
template <int TEAM>
ATTNI_DEV_FAR attni_cu_cut attni_cu_find_cut(const float *v, const float *w, int32_t n, int32_t lo,
                                             int32_t hi, double part, int rule, attni_cu_sums *s) {
    attni_cu_cut c = {0, 0, 0, 0};
    uint32_t key = 0, limit = ~0u, reached = (uint32_t)n, above = 0, count;
    double sum, over = 0; // of what is at least limit, `above` values
    if (w && rule & ATTNI_CU_SHARE) {
        sum = (double)attni_cu_sum_from<TEAM>(v, w, n, ATTNI_NINF, &count, s);
        part *= sum;
        if (!(sum > 0) && !lo) { // nothing holds that
            c.key = __int_as_float(0x7f800000), c.held = 1;
            return c;
        }
    }
    for (uint32_t bit = 0x80000000u; bit && reached - above != 1; bit >>= 1) {
        sum = (double)attni_cu_sum_from<TEAM>(v, w, n, attni_cu_ordered(key | bit), &count, s);
        if ((count >= (uint32_t)lo && w && attni_cu_holds(sum, part, rule)) ||
            count >= (uint32_t)hi)
            key |= bit, reached = count;
        else
            limit = key | bit, above = count, over = sum;
    }
    c.key = attni_cu_ordered(key);
    if (reached - above == 1) // the only one from key to limit
        c.key = attni_cu_max_below<TEAM>(v, n, attni_cu_ordered(limit), s);
    sum = over;
    c.above = (int32_t)above;
    const int32_t most = attni_min32((int32_t)reached, hi) - c.above;
    c.ties = most;
    if (!w) return c;
    if (v == w) {
        const double each = (double)c.key;
        double need = each > 0 ? floor((part - sum) / each) : 0;
        need = need > 0 ? need - 1 : 0; // as the division rounds
        while (need < most && !attni_cu_holds(sum + need * each, part, rule)) need += 1;
        c.ties = attni_min32(most, attni_max32((int32_t)need, lo - c.above));
        sum += c.ties * each;
    } else if (most > 1) { // equals of other weights, in their order
        int32_t m = 0;
        for (int32_t i = 0; i < n && m < most; i++) {
            if (!(v[i] == c.key)) continue;
            if (c.above + m >= lo && attni_cu_holds(sum, part, rule)) break;
            sum += (double)w[i];
            m++;
        }
        c.ties = m;
    }
    c.held = attni_cu_holds(sum, part, rule);
    return c;
}

// Sets bits (bit i, or last - i where last >= 0) of what the cut keeps. A warp.
ATTNI_DEV_FAR void attni_cu_keep_cut(const float *v, int32_t n, const attni_cu_cut &c, int32_t last,
                                     uint32_t *bits) {
    const int lane = (int)threadIdx.x & 31;
    int32_t seen = 0;
    for (int32_t i0 = 0; i0 < n; i0 += 32) {
        const int32_t i = i0 + lane;
        const float x = i < n ? v[i] : -1;
        const uint32_t ties = __ballot_sync(~0u, i < n && x == c.key);
        const int32_t rank = seen + __popc(ties & ((1u << lane) - 1));
        const int tie = (ties >> lane & 1) && rank < c.ties;
        uint32_t word = __ballot_sync(~0u, i < n && (x > c.key || tie));
        seen += __popc(ties);
        if (lane || !word) continue;
        if (last < 0) {
            bits[i0 >> 5] |= word;
            continue;
        }
        int32_t at = last - i0 - 31; // of what was the last bit
        word = __brev(word);
        if (at < 0) word >>= -at, at = 0;
        bits[at >> 5] |= word << (at & 31);
        if ((at & 31) && word >> (32 - (at & 31))) bits[(at >> 5) + 1] |= word >> (32 - (at & 31));
    }
    __syncwarp();
}

// Writes the bits below n_bits as the entries of a row, ascending, bit 0 as `first`. A warp.
ATTNI_DEV_FAR void attni_cu_emit(const attni_cu_pick &a, int32_t list, int32_t row,
                                 const uint32_t *bits, int32_t first, int32_t n_bits,
                                 int32_t visited) {
    const int lane = (int)threadIdx.x & 31;
    const int64_t base = ((int64_t)list * a.x.max_rows + row) * a.x.row_capacity;
    const int64_t at = list * ((int64_t)a.x.max_rows + 1) + row;
    int32_t done = 0;
    for (int32_t w0 = 0; 32 * (int64_t)w0 < n_bits; w0 += 32) {
        const int64_t left = n_bits - 32 * ((int64_t)w0 + lane);
        uint32_t x = left > 0 ? bits[w0 + lane] : 0;
        if (left < 32 && x) x &= (1u << left) - 1;
        int32_t upto = __popc(x);
        for (int i = 1; i < 32; i *= 2) {
            const int32_t y = __shfl_up_sync(~0u, upto, i);
            if (lane >= i) upto += y;
        }
        for (uint32_t some = __ballot_sync(~0u, x != 0); some; some &= some - 1) { // word by word
            const int src = __ffs((int)some) - 1;
            const uint32_t y = __shfl_sync(~0u, x, src);
            const int32_t to = done + __shfl_sync(~0u, upto, src) - __popc(y >> lane);
            if ((y >> lane & 1) && to < a.x.row_capacity)
                a.x.block[base + to] = first + 32 * (w0 + src) + lane;
        }
        done += __shfl_sync(~0u, upto, 31);
    }
    if (lane) return;
    a.x.row_start[at] = base;
    a.x.row_end[at] = base + attni_min32(done, a.x.row_capacity);
    a.x.visited[at] = visited;
    if (done > a.x.row_capacity && a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
}

// ==== >>impl-select-flex  FlexPrefill ============================================================
//
// The last queries see every key once: a cell of a query and a block of keys has the maximum and
// the sums of weights below it, by how they count for the block's diagonal and the two beside it.
// Cells add up to masses; a block of threads per head chooses, one per few list rows writes. As
// coded, single tokens count: the keys are seen once more, when the rows' sums are known, for v by
// tokens and for diagonals, a piece per chunk of keys.

enum { // in attni_cu_pick.at: sections of a head's workspace; MEAN: of a sequence's
    ATTNI_CU_FLEX_CELLS, ATTNI_CU_FLEX_NORM, ATTNI_CU_FLEX_BLOCKS, ATTNI_CU_FLEX_BITS,
    ATTNI_CU_FLEX_CHOICE, ATTNI_CU_FLEX_V, ATTNI_CU_FLEX_DIAG, ATTNI_CU_FLEX_TOKENS,
    ATTNI_CU_FLEX_MAP, ATTNI_CU_FLEX_MEAN
};

// Arrays of n_blocks floats each of a head. SUMS: of the cells of the first and of the second row
// block, what counts for the own diagonal, the one further and the one nearer.
enum { ATTNI_CU_SUMS, ATTNI_CU_ALL = 6, ATTNI_CU_COLS, ATTNI_CU_SLASH, ATTNI_CU_MASS,
       ATTNI_CU_E = ATTNI_CU_MASS + 2, ATTNI_CU_ARRAYS = ATTNI_CU_E + 3 };

typedef struct attni_cu_flex_choice {
    double gamma;          // gamma' of a query-aware head,
    int32_t need[2];       // ... and how many blocks the scored rows keep: e_r may underflow
    attni_cu_cut map;      // as coded: what is kept of the map
    int32_t aware;
} attni_cu_flex_choice;

enum { ATTNI_CU_FLEX_ROWS = 8 }; // list rows of a block of threads, a warp each
#define ATTNI_CU_P 65 /* row of weights in shared memory */

ATTNI_DEV uint8_t *attni_cu_flex_at(const attni_cu_pick &a, int32_t est, int32_t head,
                                    int section) {
    return a.work + est * a.est_bytes + head * a.head_bytes + a.at[section];
}
ATTNI_DEV float *attni_cu_flex_floats(const attni_cu_pick &a, int32_t est, int32_t head,
                                      int section) {
    return (float *)(void *)attni_cu_flex_at(a, est, head, section);
}
ATTNI_DEV attni_cu_flex_choice *attni_cu_flex_chosen(const attni_cu_pick &a, int32_t est,
                                                     int32_t head) {
    return (attni_cu_flex_choice *)(void *)attni_cu_flex_at(a, est, head, ATTNI_CU_FLEX_CHOICE);
}

// First position of chunk 0.
ATTNI_DEV int64_t attni_cu_flex_base(const attn_plan_seq &q) {
    return q.kv_pos0 / ATTNI_CU_CHUNK * (int64_t)ATTNI_CU_CHUNK;
}

// Behind the last key that counts.
ATTNI_DEV int64_t attni_cu_flex_end(const attni_cu_est &e, const attn_plan_seq &q) {
    return attni_min64((int64_t)q.kv_pos0 + q.kv_len, (int64_t)e.p0 + e.n);
}

// ---- cells

typedef struct attni_cu_tiling { // keys of a tile: part of a block, or whole ones
    int32_t wide;  // columns of a block: whole eights
    int32_t parts; // tiles of a block, or 1,
    int32_t fit;   // ... and blocks of a tile
    int32_t j0, j1, n;
} attni_cu_tiling;

ATTNI_DEV void attni_cu_flex_find(const attni_cu_pick &a, const attni_cu_tiling &g,
                                  const attni_cu_est &e, const attn_plan_seq &q, int32_t kv_head,
                                  int32_t t, attni_cu_keys *s, int32_t (*place)[ATTNI_CU_PICK_KEYS],
                                  int (*full)[2]) {
    const int c = (int)threadIdx.x, slot = t & 3, b = a.f.kv_block;
    const int32_t block = g.parts > 1 ? g.j0 + t / g.parts : g.j0 + t * g.fit + c / g.wide;
    const int32_t off = g.parts > 1 ? t % g.parts * ATTNI_CU_PICK_KEYS + c : c % g.wide;
    const int64_t pos = (int64_t)block * b + off;
    const int held = off < b && block < g.j1 && (g.parts > 1 || c / g.wide < g.fit) &&
                     pos < attni_cu_flex_end(e, q);
    attni_cu_find_key(a, q, e.seq, kv_head, held ? pos : -1, s, slot, c);
    place[slot][c] = s->row[slot][c] ? (int32_t)pos : INT32_MAX;
    const int all = __all_sync(~0u, s->row[slot][c] && pos <= e.p0);
    if (c % 32 == 0) full[slot][c / 32] = all; // every row sees every key
}

// Scores of a row, of base 2, join its cell: x is the maximum and the sums. u: the query's place in
// its block less that of the first score's key.
template <int G>
ATTNI_DEV void attni_cu_flex_fold(const float (*c)[4], int h, float u, float b, float4 &x) {
    float most = x.x;
#pragma unroll
    for (int j = 0; j < G; j++) most = fmaxf(most, fmaxf(c[j][2 * h], c[j][2 * h + 1]));
    if (most > x.x) {
        const float f = attni_exp2(x.x - most);
        x = make_float4(most, x.y * f, x.z * f, x.w * f);
    }
    most = most > ATTNI_NINF ? most : 0;
#pragma unroll
    for (int i = 0; i < 2 * G; i++) {
        const float d = u - (float)(8 * (i >> 1) + (i & 1));
        const float p = attni_exp2(c[i >> 1][2 * h + (i & 1)] - most);
        x.y = __fmaf_rn(p, b - fabsf(d), x.y);
        x.z = __fmaf_rn(p, fmaxf(d, 0), x.z);
        x.w = __fmaf_rn(p, fmaxf(-d, 0), x.w);
    }
}

// The quad's parts of a cell, which starts anew. to: NULL: nobody's.
ATTNI_DEV_FAR void attni_cu_flex_flush(float4 x, float4 *to) {
    const float most = attni_quad_max(x.x);
    const float f = x.x > ATTNI_NINF ? attni_exp2(x.x - most) : 0;
    x.y = attni_quad_sum(x.y * f), x.z = attni_quad_sum(x.z * f), x.w = attni_quad_sum(x.w * f);
    if (to && (threadIdx.x & 3) == 0) *to = make_float4(most, x.y, x.z, x.w);
}

// Rows are (head of the KV head, query); `rows` of them, 128 or 256, against a share of the blocks
// of keys.
static __global__ void __launch_bounds__(ATTNI_CU_PICK, 2)
    attni_cu_flex_cells(const __grid_constant__ attni_cu_pick a, int rows) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_keys keys;
    __shared__ int32_t place[4][ATTNI_CU_PICK_KEYS];
    __shared__ int full_of[4][2];
    __shared__ const uint8_t *q_row[2 * ATTNI_CU_PICK_ROWS];
    __shared__ float4 *cell[2 * ATTNI_CU_PICK_ROWS];
    const attni_cu_est e = a.est[blockIdx.z];
    if (e.seq < 0) return;
    const attn_plan_seq q = a.seq[e.seq];
    const int tiles = (int)gridDim.y / a.d.n_kv_heads, kv_head = (int)blockIdx.y / tiles;
    const int r0 = (int)blockIdx.y % tiles * rows, all = a.group * e.n, b = a.f.kv_block;
    const int tid = (int)threadIdx.x, lane = tid & 31, row0 = (tid >> 5) * 16 + (lane >> 2);
    attni_cu_tiling g;
    g.wide = (b + 7) / 8 * 8, g.parts = (b + 63) / 64, g.fit = g.parts > 1 ? 1 : 64 / g.wide;
    const int32_t per = (e.nb - q.kv_pos0 / b + (int32_t)gridDim.x - 1) / (int32_t)gridDim.x;
    g.j0 = q.kv_pos0 / b + (int32_t)blockIdx.x * per, g.j1 = attni_min32(g.j0 + per, e.nb);
    g.n = g.parts > 1 ? (g.j1 - g.j0) * g.parts : (g.j1 - g.j0 + g.fit - 1) / g.fit;
    if (g.j0 >= g.j1 || r0 >= all) return;
    uint8_t *k_tile = smem + rows * a.row_bytes;
    const int tile = ATTNI_CU_PICK_KEYS * a.row_bytes;
    if (tid < rows) {
        const int i = r0 + tid, h = kv_head * a.group + i / e.n, r = i % e.n;
        q_row[tid] = NULL, cell[tid] = NULL;
        if (i < all) {
            q_row[tid] = attni_cu_query_at(a, (int64_t)q.q_begin + e.p0 - q.q_pos0 + r, h);
            cell[tid] = (float4 *)(void *)attni_cu_flex_at(a, blockIdx.z, h, ATTNI_CU_FLEX_CELLS) +
                        r;
        }
    }
    for (int t = 0; t < 2 && tid < 64; t++)
        attni_cu_flex_find(a, g, e, q, kv_head, t, &keys, place, full_of);
    __syncthreads();
    if (a.mode) {
        attni_cu_copy_rows(a, q_row, rows, a.d.q.dtype, a.odd_q, attni_smem(smem));
        attni_cu_copy_rows(a, keys.row[0], 64, a.k.dtype, a.odd_k, attni_smem(k_tile));
        attni_cp_commit();
    }
    // of the lane's rows: the last position they see, their place in their own block
    int limit[4];
    float u[4];
    float4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = r0 + row0 + 8 * (i & 1) + 128 * (i >> 1), p = e.p0 + r % e.n;
        limit[i] = r < all ? p : -1;
        u[i] = (float)(p % b - 2 * (lane & 3));
        x[i] = make_float4(ATTNI_NINF, 0, 0, 0);
    }
    for (int t = 0; t < g.n; t++) {
        float acc[2][8][4];
        attni_cp_wait<0>();
        __syncthreads();
        if (t + 1 < g.n && a.mode) {
            attni_cu_copy_rows(a, keys.row[(t + 1) & 3], 64, a.k.dtype, a.odd_k,
                               attni_smem(k_tile + ((t + 1) & 1) * tile));
            attni_cp_commit();
        }
        if (t + 2 < g.n && tid < 64)
            attni_cu_flex_find(a, g, e, q, kv_head, t + 2, &keys, place, full_of);
        attni_cu_products<2>(a, acc, smem, rows, attni_smem(k_tile + (t & 1) * tile), q_row,
                             keys.row[t & 3]);
        const int full = full_of[t & 3][0] && full_of[t & 3][1];
        const float base2 = a.d.logits.softcap > 0 ? 1 : ATTNI_LOG2E;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int c = 8 * j + 2 * (lane & 3);
            float2 scale = *(const float2 *)(const void *)(keys.scale[t & 3] + c);
            scale.x *= base2, scale.y *= base2;
#pragma unroll
            for (int i = 0; i < 8; i++) acc[i >> 2][j][i & 3] *= i & 1 ? scale.y : scale.x;
        }
        if (a.d.logits.softcap > 0)
#pragma unroll
            for (int i = 0; i < 64; i++)
                acc[i >> 5][i >> 2 & 7][i & 3] = attni_cu_capped(acc[i >> 5][i >> 2 & 7][i & 3],
                                                                 a.d.logits.softcap) * ATTNI_LOG2E;
        if (!full)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int2 at = *(const int2 *)(const void *)(place[t & 3] + 8 * j +
                                                              2 * (lane & 3));
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if ((i & 1 ? at.y : at.x) > limit[i >> 1]) acc[i >> 2][j][i & 3] = ATTNI_NINF;
            }
        if (g.fit == 1) {
            const int part = t % g.parts;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                attni_cu_flex_fold<8>(acc[i >> 1], i & 1, u[i] - (float)(64 * part), (float)b,
                                      x[i]);
                if (part < g.parts - 1) continue;
                float4 *to = cell[row0 + 8 * (i & 1) + (i > 1 && rows > 128 ? 128 : 0)];
                to = i > 1 && rows == 128 ? NULL : to;
                attni_cu_flex_flush(x[i], to ? to + (g.j0 + t / g.parts) * (int64_t)b : NULL);
                x[i] = make_float4(ATTNI_NINF, 0, 0, 0);
            }
            continue;
        }
        const int eights = g.wide / 8;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int own = j / eights, block = g.j0 + t * g.fit + own;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                attni_cu_flex_fold<1>(acc[i >> 1] + j, i & 1,
                                      u[i] - (float)(8 * (j - own * eights)), (float)b, x[i]);
                if ((j + 1) % eights) continue;
                float4 *to = cell[row0 + 8 * (i & 1) + (i > 1 && rows > 128 ? 128 : 0)];
                to = (i > 1 && rows == 128) || own >= g.fit || block >= g.j1 ? NULL : to;
                attni_cu_flex_flush(x[i], to ? to + block * (int64_t)b : NULL);
                x[i] = make_float4(ATTNI_NINF, 0, 0, 0);
            }
        }
    }
}

// Each row's maximum and n_blocks / (sum n) over its cells, whose weights count kv_block times.
static __global__ void __launch_bounds__(1024)
    attni_cu_flex_norm(const __grid_constant__ attni_cu_pick a) {
    __shared__ float2 part[32][33];
    const attni_cu_est e = a.est[blockIdx.z];
    const int32_t r = (int32_t)(blockIdx.x * 32 + (threadIdx.x & 31)), head = (int32_t)blockIdx.y;
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, b = a.f.kv_block;
    if (e.seq < 0 || (int32_t)blockIdx.x * 32 >= e.n) return;
    const attn_plan_seq q = a.seq[e.seq];
    const float4 *cell = (const float4 *)(const void *)attni_cu_flex_at(a, blockIdx.z, head,
                                                                        ATTNI_CU_FLEX_CELLS);
    float m = ATTNI_NINF, l = 0;
#pragma unroll 4
    for (int32_t j = q.kv_pos0 / b + warp; j < e.nb && r < e.n; j += 32) {
        const float4 x = cell[(int64_t)j * b + r];
        const float top = fmaxf(m, x.x);
        if (!(x.x > ATTNI_NINF)) continue;
        l = l * attni_exp2(m - top) + (x.y + x.z + x.w) * attni_exp2(x.x - top);
        m = top;
    }
    part[warp][lane] = make_float2(m, l);
    __syncthreads();
    if (warp || r >= e.n) return;
    for (int i = 1; i < 32; i++) m = fmaxf(m, part[i][lane].x);
    l = 0;
    for (int i = 0; i < 32; i++)
        if (part[i][lane].x > ATTNI_NINF) l += part[i][lane].y * attni_exp2(part[i][lane].x - m);
    float *to = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_NORM) + 2 * r;
    to[0] = m, to[1] = l > 0 ? (float)b / (l * (float)e.n) : 0;
}

// Cells of a block of keys, added up by row blocks. A warp a block.
static __global__ void __launch_bounds__(256)
    attni_cu_flex_masses(const __grid_constant__ attni_cu_pick a) {
    const attni_cu_est e = a.est[blockIdx.z];
    const int32_t j = (int32_t)(blockIdx.x * 8 + (threadIdx.x >> 5)), head = (int32_t)blockIdx.y;
    const int32_t b = a.f.kv_block, cut = b - e.p0 % b; // rows from there on: the second row block
    const int lane = (int)threadIdx.x & 31;
    if (e.seq < 0 || j >= e.nb) return;
    const float4 *cell = (const float4 *)(const void *)attni_cu_flex_at(a, blockIdx.z, head,
                                                                        ATTNI_CU_FLEX_CELLS);
    const float *norm = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_NORM);
    float *to = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_BLOCKS) + j;
    const int held = j >= a.seq[e.seq].kv_pos0 / b;
    for (int side = 0; side < 2; side++) {
        const int end = side ? e.n : attni_min32(cut, e.n);
        float sum[3] = {0, 0, 0};
        for (int r = side ? cut + lane : lane; r < end && held; r += 32) {
            const float4 x = cell[(int64_t)j * b + r];
            // exp2f: what is tiny counts where nothing else is there
            const float f = x.x > ATTNI_NINF
                                ? exp2f(x.x - norm[2 * r]) * norm[2 * r + 1] / (float)b : 0;
            sum[0] += x.y * f, sum[1] += x.z * f, sum[2] += x.w * f;
        }
        for (int i = 0; i < 3; i++) {
            const float y = attni_cu_warp_sum(sum[i]);
            if (lane == 0) to[(int64_t)(ATTNI_CU_SUMS + 3 * side + i) * a.n_blocks] = y;
        }
    }
}

// ---- as coded: single tokens

// The weights of 128 rows against a tile, in shared memory, to sums of columns and of diagonals.
// rows: so many are there. diag: of row - key.
ATTNI_DEV void attni_cu_flex_sums(const float *w, int32_t rows, float *diag, float *part,
                                  float *v) {
    const int tid = (int)threadIdx.x, c = tid & 63, quarter = tid >> 6;
    float column = 0, sum = 0;
    for (int i = 32 * quarter; i < 32 * quarter + 32; i++) column += w[i * ATTNI_CU_P + c];
    part[tid] = column;
    if (tid < 191)
        for (int j = 0; j < 64; j++) {
            const int i = j + tid - 63;
            if ((unsigned)i < 128) sum += w[i * ATTNI_CU_P + j];
        }
    if (tid < 191 && tid - 63 < rows) diag[tid - 63] += sum;
    __syncthreads();
    if (tid < 64) v[c] += part[tid] + part[64 + tid] + part[128 + tid] + part[192 + tid];
}

static __global__ void __launch_bounds__(ATTNI_CU_PICK)
    attni_cu_flex_tokens(const __grid_constant__ attni_cu_pick a) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_keys keys;
    __shared__ const uint8_t *q_row[ATTNI_CU_PICK_ROWS];
    __shared__ float part[ATTNI_CU_PICK];
    const attni_cu_est e = a.est[blockIdx.z];
    if (e.seq < 0) return;
    const attn_plan_seq q = a.seq[e.seq];
    const int32_t head = (int32_t)blockIdx.y, chunk = (int32_t)blockIdx.x, kv_head = head / a.group;
    const int64_t base = attni_cu_flex_base(q), k0 = base + (int64_t)chunk * ATTNI_CU_CHUNK;
    const int64_t end = attni_cu_flex_end(e, q);
    if (k0 >= end) return;
    const int tid = (int)threadIdx.x, lane = tid & 31, row0 = (tid >> 5) * 16 + (lane >> 2);
    const int tile = ATTNI_CU_PICK_KEYS * a.row_bytes;
    uint8_t *k_tile = smem + ATTNI_CU_PICK_ROWS * a.row_bytes;
    float *w = (float *)(void *)(smem + a.tile_bytes), *diag = w + 128 * ATTNI_CU_P;
    float *v = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_V) + k0 - base;
    const float *norm = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_NORM);
    for (int i = tid; i < e.n + 1023; i += ATTNI_CU_PICK) diag[i] = 0;
    for (int i = tid; i < ATTNI_CU_CHUNK; i += ATTNI_CU_PICK) v[i] = 0;
    for (int32_t r0 = 0; r0 < e.n; r0 += ATTNI_CU_PICK_ROWS) {
        const int64_t reach = attni_min64(end, (int64_t)e.p0 + r0 + ATTNI_CU_PICK_ROWS);
        const int n = (int)attni_min64(ATTNI_CU_CHUNK / 64, (reach - k0 + 63) / 64);
        __syncthreads();
        if (tid < ATTNI_CU_PICK_ROWS)
            q_row[tid] = r0 + tid >= e.n ? NULL
                : attni_cu_query_at(a, (int64_t)q.q_begin + e.p0 - q.q_pos0 + r0 + tid, head);
        for (int t = 0; t < 2; t++)
            if (tid < 64)
                attni_cu_find_key(a, q, e.seq, kv_head, k0 + 64 * t + tid, &keys, t, tid);
        __syncthreads();
        if (a.mode) {
            attni_cu_copy_rows(a, q_row, ATTNI_CU_PICK_ROWS, a.d.q.dtype, a.odd_q,
                               attni_smem(smem));
            attni_cu_copy_rows(a, keys.row[0], 64, a.k.dtype, a.odd_k, attni_smem(k_tile));
            attni_cp_commit();
        }
        // of the lane's rows: the last key of the chunk they see, maximum, factor
        int limit[2];
        float m[2], f[2];
        const int low = (int)attni_max64(q.kv_pos0 - k0, 0);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int32_t r = r0 + row0 + 8 * h;
            limit[h] = r < e.n ? (int)(attni_min64(e.p0 + r, end - 1) - k0) : -1;
            m[h] = r < e.n ? norm[2 * r] : 0, f[h] = r < e.n ? norm[2 * r + 1] : 0;
        }
        for (int t = 0; t < n; t++) {
            float acc[1][8][4];
            attni_cp_wait<0>();
            __syncthreads();
            if (t + 1 < n && a.mode) {
                attni_cu_copy_rows(a, keys.row[(t + 1) & 3], 64, a.k.dtype, a.odd_k,
                                   attni_smem(k_tile + ((t + 1) & 1) * tile));
                attni_cp_commit();
            }
            if (t + 2 < n && tid < 64)
                attni_cu_find_key(a, q, e.seq, kv_head, k0 + 64 * (t + 2) + tid, &keys, (t + 2) & 3,
                                  tid);
            attni_cu_products<1>(a, acc, smem, ATTNI_CU_PICK_ROWS,
                                 attni_smem(k_tile + (t & 1) * tile), q_row, keys.row[t & 3]);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int c = 8 * j + 2 * (lane & 3) + (i & 1), h = i >> 1;
                    const float s =
                        attni_cu_score(a, acc[0][j][i], keys.scale[t & 3][c]) * ATTNI_LOG2E;
                    const int seen = 64 * t + c <= limit[h] && 64 * t + c >= low && s > ATTNI_NINF;
                    w[(row0 + 8 * h) * ATTNI_CU_P + c] = seen ? exp2f(s - m[h]) * f[h] : 0;
                }
            __syncthreads();
            attni_cu_flex_sums(w, e.n - r0, diag + r0 - 64 * t + 1023, part, v + 64 * t);
        }
    }
    float *to = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_DIAG) +
                chunk * ((int64_t)a.f.kv_block + 1023);
    __syncthreads();
    for (int i = tid; i < e.n + 1023; i += ATTNI_CU_PICK) to[i] = diag[i];
}

// Weight of the pairs t apart, over all chunks.
ATTNI_DEV float attni_cu_flex_distance(const attni_cu_pick &a, const attni_cu_est &e,
                                       const float *diag, int64_t base, int64_t n_chunks,
                                       int64_t t) {
    const int64_t first = (int64_t)e.p0 - t - base; // of the key of the first row, may be negative
    int64_t c = first - 1023 > 0 ? (first - 1023 + ATTNI_CU_CHUNK - 1) / ATTNI_CU_CHUNK : 0;
    float sum = 0;
    for (; c < n_chunks && c * ATTNI_CU_CHUNK < first + e.n; c++)
        sum += diag[c * ((int64_t)a.f.kv_block + 1023) + c * ATTNI_CU_CHUNK - first + 1023];
    return sum;
}

// How many blocks hold gamma of v and of s by tokens, and s by runs of kv_block tokens from the
// furthest on. All threads call.
ATTNI_DEV void attni_cu_flex_counts(const attni_cu_pick &a, const attni_cu_est &e,
                                    const attn_plan_seq &q, int32_t head, float *slash,
                                    int32_t n_of[2], attni_cu_sums *s) {
    const int lane = (int)threadIdx.x & 31, warps = (int)blockDim.x >> 5;
    const float *v = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_V);
    const float *diag = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_DIAG);
    float *tokens = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_TOKENS);
    const int64_t b = a.f.kv_block, base = attni_cu_flex_base(q);
    const int32_t len = e.p0 + e.n, held = (int32_t)(attni_cu_flex_end(e, q) - base);
    const int64_t n_chunks = (held + ATTNI_CU_CHUNK - 1) / ATTNI_CU_CHUNK;
    for (int i = (int)threadIdx.x; i < len; i += (int)blockDim.x)
        tokens[len - 1 - i] = attni_cu_flex_distance(a, e, diag, base, n_chunks, i);
    __syncthreads();
    for (int h = 0; h < 2; h++) {
        const float *x = h ? tokens : v;
        const int32_t all = h ? len : held;
        const attni_cu_cut c = attni_cu_find_cut<1024>(x, x, all, 0, all, (double)a.f.flex.gamma,
                                                       ATTNI_CU_STRICT, s);
        const int32_t least = (a.f.flex.min_budget - 1) / (int32_t)b + 1;
        const int32_t most = (a.f.flex.max_budget - 1) / (int32_t)b + 1;
        n_of[h] = attni_max32((c.above + c.ties) / 128 + 1, least);
        n_of[h] = attni_min32(n_of[h], attni_min32(most, e.nb));
    }
    for (int32_t j = (int32_t)threadIdx.x >> 5; j < e.nb; j += warps) {
        float x = 0;
        for (int64_t k = j * b + lane; k < attni_min64((j + 1) * b, len); k += 32) x += tokens[k];
        x = attni_cu_warp_sum(x);
        if (lane == 0) slash[j] = j == e.nb - 1 ? __int_as_float(0x7f800000) : x;
    }
}

// ---- means

// Rows to be averaged: of Q (q NULL) from token `first` on, or of K from that position on.
typedef struct attni_cu_run {
    const attn_plan_seq *q;
    int32_t seq, head, n;
    int64_t first;
} attni_cu_run;

// Adds 16 bytes, 8 elements.
ATTNI_DEV void attni_cu_mean_add(uint4 y, attn_dtype t, float scale, float x[8]) {
    const uint32_t u[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const uint16_t v = (uint16_t)(u[e >> 1] >> 16 * (e & 1));
        x[e] += (t == ATTN_BF16 ? __uint_as_float((uint32_t)v << 16) : attni_half(v)) * scale;
    }
}

// mean: (head_dim) in shared memory, of K with the scale of scores. A warp.
ATTNI_DEV_FAR void attni_cu_mean(const attni_cu_pick &a, const attni_cu_run &w, float *mean) {
    const attn_dtype t = w.q ? a.k.dtype : a.d.q.dtype;
    const int wide = !(w.q ? a.odd_k : a.odd_q) && t != ATTN_F32 && !attni_is_scaled(t);
    const int unit = wide ? 8 : 1, per = a.d.head_dim / unit; // lanes that a row takes
    const int turns = per < 32 ? 32 / per : 1, lane = (int)threadIdx.x & 31;
    const int own = per < 32 ? lane / per : 0;
    for (int c0 = 0; c0 < per; c0 += 32) {
        const int c = per < 32 ? lane % per : c0 + lane, works = own < turns && c < per;
        float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int i0 = 0; i0 < w.n; i0 += 32) {
            const int n = attni_min32(w.n - i0, 32);
            const uint8_t *row = NULL;
            float scale = 1;
            if (lane < n)
                row = w.q ? attni_cu_key_at(a, *w.q, w.seq, w.head, w.first + i0 + lane, &scale)
                          : attni_cu_query_at(a, w.first + i0 + lane, w.head);
            for (int i = 0; i < n; i += 8 * turns) { // eight loads are on their way at once
                const uint8_t *from[8];
                uint4 y[8];
                float f[8];
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const int r = i + k * turns + own;
                    from[k] = (const uint8_t *)(uintptr_t)__shfl_sync(
                        ~0u, (unsigned long long)(uintptr_t)row, r & 31);
                    f[k] = __shfl_sync(~0u, scale, r & 31);
                    if (!works || r >= n) from[k] = NULL;
                }
                if (!wide) {
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        if (from[k]) x[0] += attni_cu_value_at(from[k], t, c) * f[k];
                    continue;
                }
#pragma unroll
                for (int k = 0; k < 8; k++)
                    y[k] = from[k] ? *(const uint4 *)(const void *)(from[k] + 16 * c)
                                   : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int k = 0; k < 8; k++) attni_cu_mean_add(y[k], t, f[k], x);
            }
        }
        for (int s = 0; s < turns; s++) { // in order: the sum does not depend on timing
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (own == s && works && e < unit)
                    mean[c * unit + e] = s ? mean[c * unit + e] + x[e] : x[e];
            __syncwarp();
        }
    }
    for (int i = lane; i < a.d.head_dim; i += 32) mean[i] /= (float)w.n;
    __syncwarp();
}

// Mean keys of every block, with the scale of scores: (n_kv_heads, head_dim / 4, n_blocks, 4).
static __global__ void __launch_bounds__(128)
    attni_cu_flex_means(const __grid_constant__ attni_cu_pick a) {
    __shared__ __align__(16) float mean[4][ATTN_MAX_HEAD_DIM];
    const attni_cu_est e = a.est[blockIdx.z];
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    const int32_t j = (int32_t)blockIdx.x * 4 + warp, kv_head = (int32_t)blockIdx.y;
    const int32_t b = a.f.kv_block;
    if (e.seq < 0 || j >= e.nb) return;
    const attn_plan_seq q = a.seq[e.seq];
    const int64_t lo = attni_max64((int64_t)j * b, q.kv_pos0);
    const int64_t hi = attni_min64(((int64_t)j + 1) * b, attni_cu_flex_end(e, q));
    const attni_cu_run w = {&q, e.seq, kv_head, (int32_t)(hi - lo), lo};
    float4 *to = (float4 *)(void *)(a.work + blockIdx.z * a.est_bytes + a.at[ATTNI_CU_FLEX_MEAN]) +
                 (int64_t)kv_head * (a.d.head_dim / 4) * a.n_blocks + j;
    if (hi <= lo) return; // attni_cu_flex_scores does not look
    attni_cu_mean(a, w, mean[warp]);
    for (int i = lane; i < a.d.head_dim / 4; i += 32)
        to[(int64_t)i * a.n_blocks] = *(const float4 *)(const void *)(mean[warp] + 4 * i);
}

// Scores of up to FLEX_ROWS mean queries, (rows, head_dim) in shared memory, against the mean keys
// of blocks [0, n): e (rows, ld), row r where use has bit r. All threads call.
ATTNI_DEV_FAR void attni_cu_flex_scores(const attni_cu_pick &a, int32_t est,
                                        const attn_plan_seq &q, int64_t end, int32_t kv_head,
                                        const float *mean, uint32_t use, int32_t n, float *e,
                                        int64_t ld) {
    const int32_t dim = a.d.head_dim, b = a.f.kv_block;
    const float4 *keys = (const float4 *)(const void *)(a.work + est * a.est_bytes +
                                                        a.at[ATTNI_CU_FLEX_MEAN]) +
                         (int64_t)kv_head * (dim / 4) * a.n_blocks;
    for (int32_t j = (int32_t)threadIdx.x; j < n; j += (int32_t)blockDim.x) {
        const int held = ((int64_t)j + 1) * b > q.kv_pos0 && (int64_t)j * b < end;
        float x[ATTNI_CU_FLEX_ROWS];
#pragma unroll
        for (int r = 0; r < ATTNI_CU_FLEX_ROWS; r++) x[r] = 0;
#pragma unroll 4
        for (int i = 0; i < dim / 4 && held; i++) {
            const float4 y = keys[(int64_t)i * a.n_blocks + j];
#pragma unroll
            for (int r = 0; r < ATTNI_CU_FLEX_ROWS; r++)
                if (use >> r & 1) {
                    const float4 z = *(const float4 *)(const void *)(mean + r * dim + 4 * i);
                    x[r] = __fmaf_rn(z.x, y.x, x[r]), x[r] = __fmaf_rn(z.y, y.y, x[r]);
                    x[r] = __fmaf_rn(z.z, y.z, x[r]), x[r] = __fmaf_rn(z.w, y.w, x[r]);
                }
        }
#pragma unroll
        for (int r = 0; r < ATTNI_CU_FLEX_ROWS; r++)
            if (use >> r & 1) e[r * ld + j] = held ? attni_cu_score(a, x[r], 1) : ATTNI_NINF;
    }
    __syncthreads();
}

// e: softmax over [0, n) of scores. A warp.
ATTNI_DEV_FAR void attni_cu_flex_softmax(float *e, int32_t n) {
    const int lane = (int)threadIdx.x & 31;
    float most = ATTNI_NINF;
    double sum = 0;
    for (int32_t j = lane; j < n; j += 32) most = fmaxf(most, e[j]);
    most = attni_cu_warp_max(most);
    for (int32_t j = lane; j < n; j += 32) {
        e[j] = e[j] > ATTNI_NINF ? expf(e[j] - most) : 0;
        sum += (double)e[j];
    }
    sum = attni_cu_warp_double(sum);
    const float one = (float)(1 / sum);
    for (int32_t j = lane; j < n; j += 32) e[j] *= one;
    __syncwarp();
}

// The queries of row block r.
ATTNI_DEV attni_cu_run attni_cu_flex_queries(const attni_cu_pick &a, const attn_plan_seq &q,
                                             int32_t head, int32_t r) {
    const int32_t b = a.f.kv_block;
    const int64_t lo = attni_max64((int64_t)r * b, q.q_pos0);
    const int64_t hi = attni_min64(((int64_t)r + 1) * b, (int64_t)q.q_pos0 + q.q_len);
    const attni_cu_run w = {NULL, 0, head, (int32_t)attni_max64(hi - lo, 0),
                            q.q_begin + lo - q.q_pos0};
    return w;
}

// ---- choosing

// Corrected: masses of columns and diagonals from SUMS, without what is always kept.
ATTNI_DEV void attni_cu_flex_pool(const attni_cu_pick &a, const attni_cu_est &e,
                                  const attn_plan_seq &q, float *f) {
    const int64_t n = a.n_blocks;
    const int32_t b = a.f.kv_block, low = attni_max32(1, q.kv_pos0 / b);
    for (int32_t j = (int32_t)threadIdx.x; j < e.nb; j += (int32_t)blockDim.x) {
        float slash = 0, all = 0, column = 0;
        for (int side = 0; side < 2; side++) {
            const int32_t row = side ? e.nb - 1 : e.p0 / b, c = row - j; // this diagonal's block
            const float *x = f + (int64_t)(ATTNI_CU_SUMS + 3 * side) * n;
            const float mass = x[j] + x[n + j] + x[2 * n + j];
            const float own = j == 0 || j == row ? 0 : mass;
            all += mass, column += own;
            f[(ATTNI_CU_MASS + side) * n + j] = own;
            if (c >= low && c < row) slash += x[c];
            if (c + 1 >= low && c + 1 < row) slash += x[n + c + 1];
            if (c - 1 >= low && c - 1 < row) slash += x[2 * n + c - 1];
        }
        f[ATTNI_CU_ALL * n + j] = all;
        f[ATTNI_CU_COLS * n + j] = column;
        f[ATTNI_CU_SLASH * n + j] = slash;
    }
}

// (Jensen-Shannon distance) ^ 2 of e and p below tau ^ 2? As coded 0 ln 0 is no number. All threads
// call.
ATTNI_DEV int attni_cu_flex_aware(const attni_cu_pick &a, const float *e, const float *p, int32_t n,
                                  double *part) {
    double sum = 0;
    int zeros = 0;
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) {
        const double x = (double)e[i], y = (double)p[i], m = (x + y) / 2;
        if (x > 0) sum += x * log(x / m) / 2;
        if (y > 0) sum += y * log(y / m) / 2;
        zeros |= x <= 0 || y <= 0;
    }
    sum = attni_cu_warp_double(sum);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
    zeros = __syncthreads_or(zeros);
    sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) sum += part[i];
    return sum < (double)a.f.flex.tau * (double)a.f.flex.tau &&
           !(a.f.flex.compatible && zeros);
}

// What of e_r, own, a row of the last queries needs to hold gamma of its own mass, and in how many
// blocks. A warp.
ATTNI_DEV double attni_cu_flex_gamma(const attni_cu_pick &a, const float *own, const float *mass,
                                     int32_t n, int32_t *need) {
    const attni_cu_cut c = attni_cu_find_cut<32>(own, mass, n, 0, n, (double)a.f.flex.gamma,
                                                 ATTNI_CU_SHARE, NULL);
    const float over = attni_cu_ordered(attni_cu_order(c.key) + 1);
    uint32_t count;
    const double all = (double)attni_cu_sum_from<32>(own, own, n, ATTNI_NINF, &count, NULL);
    double sum = (double)attni_cu_sum_from<32>(own, own, n, over, &count, NULL);
    *need = c.above + c.ties;
    if (c.ties > 0) sum += c.ties * (double)c.key;
    return all > 0 ? sum / all : 0;
}

// What one head keeps: bits of columns and of diagonals, whether it is query-aware.
static __global__ void __launch_bounds__(1024)
    attni_cu_flex_choose(const __grid_constant__ attni_cu_pick a) {
    __shared__ attni_cu_sums s;
    __shared__ __align__(16) float mean[3 * ATTN_MAX_HEAD_DIM];
    __shared__ double gamma[2], js[32];
    const attni_cu_est e = a.est[blockIdx.z];
    const int32_t head = (int32_t)blockIdx.y, b = a.f.kv_block, coded = a.f.flex.compatible;
    if (e.seq < 0) return;
    const attn_plan_seq q = a.seq[e.seq];
    const int warp = (int)threadIdx.x >> 5;
    const int64_t n = a.n_blocks;
    float *f = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_BLOCKS);
    float *own = f + ATTNI_CU_E * n;
    uint32_t *bits = (uint32_t *)(void *)attni_cu_flex_at(a, blockIdx.z, head, ATTNI_CU_FLEX_BITS);
    attni_cu_flex_choice *to = attni_cu_flex_chosen(a, blockIdx.z, head);
    const int32_t words = (a.n_blocks + 31) / 32, least = (a.f.flex.min_budget - 1) / b + 1;
    const int32_t most = attni_min32((a.f.flex.max_budget - 1) / b + 1, e.nb);
    const int32_t row0 = e.p0 / b, row = attni_min32(row0 + attni_max32(warp - 1, 0), e.nb - 1);
    int32_t n_of[2] = {0, 0};
    int aware = 0;
    for (int i = (int)threadIdx.x; i < 2 * words; i += (int)blockDim.x) bits[i] = 0;
    attni_cu_flex_pool(a, e, q, f);
    if (coded) attni_cu_flex_counts(a, e, q, head, f + ATTNI_CU_SLASH * n, n_of, &s);
    __syncthreads();
    if (coded && threadIdx.x == 0) f[ATTNI_CU_COLS * n] = __int_as_float(0x7f800000);
    if (coded) // it knows of nothing that is always kept
        for (int j = 1 + (int)threadIdx.x; j < e.nb; j += (int)blockDim.x)
            f[ATTNI_CU_COLS * n + j] = f[ATTNI_CU_ALL * n + j];
    if (a.f.flex.tau > 0) { // warps 0, 1, 2: all last queries, their row blocks
        attni_cu_run w = attni_cu_flex_queries(a, q, head, row);
        if (warp == 0) w.first = (int64_t)q.q_begin + e.p0 - q.q_pos0, w.n = e.n;
        if (warp < 3) attni_cu_mean(a, w, mean + warp * a.d.head_dim);
        __syncthreads();
        attni_cu_flex_scores(a, blockIdx.z, q, attni_cu_flex_end(e, q), head / a.group, mean, 7,
                             e.nb, own, n);
        if (warp < 3) attni_cu_flex_softmax(own + warp * n, warp ? row + 1 : e.nb);
    }
    __syncthreads();
    if (a.f.flex.tau > 0) aware = attni_cu_flex_aware(a, own, f + ATTNI_CU_ALL * n, e.nb, js);
    if (warp < 2 && (coded || !aware)) {
        const float *x = f + (warp ? ATTNI_CU_SLASH : ATTNI_CU_COLS) * n;
        const int32_t want = aware ? attni_min32(least, e.nb) : n_of[warp];
        const attni_cu_cut c =
            coded ? attni_cu_find_cut<32>(x, NULL, e.nb, want, want, 0, 0, NULL)
                  : attni_cu_find_cut<32>(x, x, e.nb, least, most, (double)a.f.flex.gamma,
                                          ATTNI_CU_SHARE, NULL);
        attni_cu_keep_cut(x, e.nb, c, coded && warp ? e.nb - 1 : -1, bits + warp * words);
    } else if (aware && !coded && (warp == 1 || warp == 2)) {
        const double g = attni_cu_flex_gamma(a, own + warp * n, f + (ATTNI_CU_MASS + warp - 1) * n,
                                             row + 1, n_of);
        if ((threadIdx.x & 31) == 0) gamma[warp - 1] = g, to->need[warp - 1] = n_of[0];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        to->aware = aware;
        if (aware && !coded) to->gamma = fmax((double)a.f.flex.gamma, fmax(gamma[0], gamma[1]));
    }
}

// ---- lists

// e_r of the rows in use, a warp's own each, (rows, ld) in shared memory like mean (rows,
// head_dim). use: of the warp's own. All threads call.
ATTNI_DEV void attni_cu_flex_rows(const attni_cu_pick &a, attni_cu_row_of *row, int rows,
                                  int32_t head, int use, float *mean, float *e, int64_t ld) {
    const int warp = (int)threadIdx.x >> 5;
    uint32_t left = 0;
    __syncthreads();
    if (warp < rows && (threadIdx.x & 31) == 0) row[warp].wanted = use;
    if (use) {
        const attn_plan_seq q = a.seq[row[warp].seq];
        attni_cu_mean(a, attni_cu_flex_queries(a, q, head, row[warp].block),
                      mean + warp * a.d.head_dim);
    }
    __syncthreads();
    for (int i = 0; i < rows; i++) left |= (uint32_t)(row[i].wanted != 0) << i;
    while (left) { // those of one sequence together
        const int32_t est = row[__ffs((int)left) - 1].est;
        uint32_t some = 0;
        int32_t n = 0;
        for (int i = 0; i < rows; i++)
            if ((left >> i & 1) && row[i].est == est)
                some |= 1u << i, n = attni_max32(n, row[i].block + 1);
        const attn_plan_seq q = a.seq[a.est[est].seq];
        attni_cu_flex_scores(a, est, q, attni_cu_flex_end(a.est[est], q), head / a.group, mean,
                             some, n, e, ld);
        left &= ~some;
    }
    if (use) attni_cu_flex_softmax(e + warp * ld, row[warp].block + 1);
}

// As coded, query-aware heads: e_r of every row block, (n_blocks, n_blocks); -1 beyond the
// diagonal. Shared memory as attni_cu_flex_write's.
static __global__ void __launch_bounds__(256)
    attni_cu_flex_map(const __grid_constant__ attni_cu_pick a, int rows) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_row_of row[ATTNI_CU_FLEX_ROWS];
    const attni_cu_est e = a.est[blockIdx.z];
    const int32_t head = (int32_t)blockIdx.y, r0 = (int32_t)blockIdx.x * rows;
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    if (e.seq < 0 || r0 >= e.nb || !attni_cu_flex_chosen(a, blockIdx.z, head)->aware) return;
    const attn_plan_seq q = a.seq[e.seq];
    float *mean = (float *)(void *)smem, *own = mean + rows * a.d.head_dim;
    float *to = attni_cu_flex_floats(a, blockIdx.z, head, ATTNI_CU_FLEX_MAP);
    if (threadIdx.x < (unsigned)rows) {
        const attni_cu_row_of x = {e.seq, r0 + (int32_t)threadIdx.x, (int32_t)blockIdx.z, 0};
        row[threadIdx.x] = x;
    }
    const int32_t r = r0 + warp;
    const int use = warp < rows && r < e.nb && attni_cu_flex_queries(a, q, head, r).n > 0;
    attni_cu_flex_rows(a, row, rows, head, use, mean, own, a.n_blocks);
    for (int32_t j = lane; j < e.nb && warp < rows && r < e.nb; j += 32)
        to[(int64_t)r * e.nb + j] = use && j <= r ? own[(int64_t)warp * a.n_blocks + j] : -1;
}

// The cut through a head's map.
static __global__ void __launch_bounds__(1024)
    attni_cu_flex_map_cut(const __grid_constant__ attni_cu_pick a) {
    __shared__ attni_cu_sums s;
    const attni_cu_est e = a.est[blockIdx.z];
    if (e.seq < 0) return;
    attni_cu_flex_choice *to = attni_cu_flex_chosen(a, blockIdx.z, (int32_t)blockIdx.y);
    if (!to->aware) return;
    const float *x = attni_cu_flex_floats(a, blockIdx.z, (int32_t)blockIdx.y, ATTNI_CU_FLEX_MAP);
    const int64_t row0 = a.seq[e.seq].q_pos0 / a.f.kv_block;
    const int32_t visible = (int32_t)(((int64_t)e.nb * (e.nb + 1) - row0 * (row0 + 1)) / 2);
    const double part = (double)a.f.flex.gamma * (double)(e.nb - row0);
    // the entry that crosses stays out: the fewest that hold more than part, less one
    attni_cu_cut c = attni_cu_find_cut<1024>(x, x, e.nb * e.nb, 0, visible, part, ATTNI_CU_STRICT,
                                             &s);
    if (c.ties > 0 && c.held) c.ties--;
    if (threadIdx.x == 0) to->map = c;
}

// As coded: bits of row r of the map. A warp.
ATTNI_DEV void attni_cu_flex_mapped(const float *map, int32_t nb, int32_t r,
                                    const attni_cu_cut &c, uint32_t *bits) {
    const float *own = map + (int64_t)r * nb;
    const int lane = (int)threadIdx.x & 31;
    attni_cu_cut mine = c;
    for (int64_t i0 = 0; i0 < (int64_t)r * nb && mine.ties > 0; i0 += 32) { // those of rows before
        const int64_t i = i0 + lane;
        mine.ties -= __popc(__ballot_sync(
            ~0u, i < (int64_t)r * nb && map[i] == c.key));
    }
    attni_cu_keep_cut(own, r + 1, mine, -1, bits);
}

// Bits of the columns and diagonals that row r keeps. A warp.
ATTNI_DEV void attni_cu_flex_lines(const uint32_t *col, int32_t words, int32_t r, uint32_t *bits) {
    const uint32_t *diag = col + words;
    for (int32_t i = (int32_t)threadIdx.x & 31; i <= r >> 5; i += 32) {
        const int32_t at = r - 32 * i - 31; // of the diagonal of bit 31
        uint32_t x = at >= 0 ? diag[at >> 5] >> (at & 31) : diag[0] << -at;
        if (at >= 0 && (at & 31)) x |= diag[(at >> 5) + 1] << (32 - (at & 31));
        bits[i] |= col[i] | __brev(x);
    }
    __syncwarp();
}

// Bits of a row that one head keeps, e_r if it is wanted. How many mean keys that took. A warp.
ATTNI_DEV int32_t attni_cu_flex_keep(const attni_cu_pick &a, const attni_cu_row_of &w, int32_t head,
                                     const float *own, uint32_t *bits) {
    const attni_cu_est e = a.est[w.est];
    const attn_plan_seq q = a.seq[w.seq];
    const attni_cu_flex_choice *c = attni_cu_flex_chosen(a, w.est, head);
    const int32_t b = a.f.kv_block, words = (a.n_blocks + 31) / 32, coded = a.f.flex.compatible;
    if (!c->aware || coded)
        attni_cu_flex_lines((const uint32_t *)(const void *)attni_cu_flex_at(a, w.est, head,
                                                                             ATTNI_CU_FLEX_BITS),
                            words, w.block, bits);
    if (!c->aware) return 0;
    if (coded) {
        attni_cu_flex_mapped(attni_cu_flex_floats(a, w.est, head, ATTNI_CU_FLEX_MAP), e.nb, w.block,
                             c->map, bits);
    } else {
        const int32_t n = w.block + 1, most = attni_min32((a.f.flex.max_budget - 1) / b + 1, n);
        int32_t least = (a.f.flex.min_budget - 1) / b + 1;
        if (w.block >= e.p0 / b) least = attni_max32(least, c->need[w.block > e.p0 / b]);
        const attni_cu_cut k =
            attni_cu_find_cut<32>(own, own, n, least, most, c->gamma, ATTNI_CU_SHARE, NULL);
        attni_cu_keep_cut(own, n, k, -1, bits);
    }
    return w.block + 1 - q.kv_pos0 / b;
}

// `rows` list rows, the longest first. Shared memory: mean queries (rows, head_dim), e (rows,
// n_blocks) where heads may be query-aware; bits (rows, words).
static __global__ void __launch_bounds__(256, 3)
    attni_cu_flex_write(const __grid_constant__ attni_cu_pick a, int rows, int words) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_row_of row[ATTNI_CU_FLEX_ROWS];
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    const int32_t first = ((int32_t)gridDim.x - 1 - (int32_t)blockIdx.x) * rows;
    const int32_t list = (int32_t)blockIdx.y;
    float *mean = (float *)(void *)smem;
    float *own = mean + (a.f.flex.tau > 0 ? rows * a.d.head_dim : 0);
    uint32_t *bits = (uint32_t *)(void *)(own + (a.f.flex.tau > 0 ? rows * a.n_blocks : 0)) +
                     attni_min32(warp, rows - 1) * words;
    attni_cu_row_of w = {-1, 0, -1, 0};
    int32_t visited = 0;
    if (warp < rows && first + warp < a.x.max_rows) w = a.row_of[first + warp];
    if (warp < rows && lane == 0) row[warp] = w;
    for (int i = lane; i < words && warp < rows; i += 32) bits[i] = w.est < 0 ? ~0u : 0;
    __syncthreads();
    for (int h = list * a.per_list; h < (list + 1) * a.per_list; h++) {
        const int use = w.est >= 0 && !a.f.flex.compatible &&
                        attni_cu_flex_chosen(a, w.est, h)->aware;
        if (a.f.flex.tau > 0 && __syncthreads_or(use))
            attni_cu_flex_rows(a, row, rows, h, use, mean, own, a.n_blocks);
        if (w.est >= 0)
            visited = attni_max32(visited, attni_cu_flex_keep(a, w, h, own + warp * a.n_blocks,
                                                              bits));
    }
    if (w.seq < 0) return;
    const attn_plan_seq q = a.seq[w.seq];
    const int32_t none = q.kv_pos0 / a.f.kv_block, n = w.block + 1;
    if (w.est >= 0) {
        const attni_cu_est e = a.est[w.est];
        if (lane == 0 && !a.f.flex.compatible)
            bits[0] |= 1, bits[w.block >> 5] |= 1u << (w.block & 31);
        if (w.block >= e.p0 / a.f.kv_block)
            visited += (int32_t)attni_min64((int64_t)e.p0 + e.n, (int64_t)n * a.f.kv_block) -
                       q.kv_pos0;
    }
    __syncwarp();
    for (int i = lane; 32 * i < none; i += 32) // evicted
        bits[i] &= none - 32 * i >= 32 ? 0 : ~0u << (none - 32 * i);
    __syncwarp();
    attni_cu_emit(a, list, first + warp, bits, 0, n, visited);
}

// ==== >>impl-select-hip  HiP, three generations ==================================================
//
// A warp scores 16 keys anywhere against the rows of a list in shared memory: K goes from global
// memory to registers as it lies, 16 bytes of a row to each of four lanes, and Q is laid out
// likewise: which dimensions meet in a step of mma does not matter. A lane's two keys: lane / 4 and
// 8 behind it. HIP3 gives the two halves of a chunk's descent to one lane. BF, NQ: bf16, 32
// dimensions each; NQ 0: anything, in f32.

// In attni_cu_pick.at. HIP3: scores of candidates, what rows remember, representatives (behind the
// scores). HIP1 and HIP2 (-1: nothing): S of all blocks, the same by the last query, queries
// without the dimensions that do not count.
enum { ATTNI_CU_HIP_KEYS, ATTNI_CU_HIP_STATE, ATTNI_CU_HIP_ALL, ATTNI_CU_HIP_LAST,
       ATTNI_CU_HIP_THIN, ATTNI_CU_HIP_REPS };

typedef struct attni_cu_hip_block { // a q block, as a list row sees it
    int32_t seq, list, head, heads, kv_head; // head: the first of `heads`
    int64_t m, first;                 // first: position it begins at
    int64_t p_min, p_max, end, last;  // last: of the row block's own queries
    int64_t kv_pos0, kv_end;
    uint32_t held;                    // keys in [kv_pos0, end)
    int32_t q_begin, q_pos0;
    int32_t from;                     // first stage that is scanned
    int32_t *state;
} attni_cu_hip_block;

// The row's memory: of a slot in x, else in the workspace.
ATTNI_DEV int32_t *attni_cu_hip_state(const attni_cu_pick &a, int32_t row, int32_t list) {
    uint8_t *base = row < a.f.n_slots ? a.x.state : a.work + a.at[ATTNI_CU_HIP_STATE];
    base += ((int64_t)row * a.x.n_lists + list) * (int64_t)a.x.state_bytes;
    return (int32_t *)(void *)base;
}

// Where in a row's memory a stage's admitted chunks are: their number, the first chunk that each
// becomes, KEEP_SCORES: the orders of their scores.
ATTNI_DEV int32_t attni_cu_hip_place(const attni_cu_pick &a, int32_t stage) {
    int32_t at = 1;
    for (int i = 1; i < stage; i++)
        at += 1 + (a.f.hip.stage[i].flags & ATTN_HIP_KEEP_SCORES ? 2 : 1) *
                      (a.f.hip.stage[i].keep / a.f.hip.stage[i - 1].chunk);
    return at;
}

// The q block of n positions around a list row. 0: nobody's.
ATTNI_DEV int attni_cu_hip_focus(const attni_cu_pick &a, int32_t row, int32_t list, int64_t n,
                                 attni_cu_hip_block *b) {
    const attni_cu_row_of w = a.row_of[row];
    if (w.seq < 0) return 0;
    const attn_plan_seq q = a.seq[w.seq];
    const int64_t at = (int64_t)w.block * a.f.row_block;
    b->seq = w.seq;
    b->list = list;
    b->q_begin = q.q_begin;
    b->q_pos0 = q.q_pos0;
    b->kv_pos0 = q.kv_pos0;
    b->kv_end = (int64_t)q.kv_pos0 + q.kv_len;
    b->m = at / n;
    b->first = b->m * n;
    b->p_min = attni_max64(b->first, q.q_pos0);
    b->p_max = attni_min64(b->first + n, (int64_t)q.q_pos0 + q.q_len) - 1;
    b->last = attni_min64(at + a.f.row_block - 1, b->p_max);
    b->end = attni_min64(b->p_max + 1, b->kv_end);
    b->held = (uint32_t)attni_max64(b->end - b->kv_pos0, 0);
    b->from = 0;
    b->state = NULL;
    if (row >= a.f.n_slots && a.f.kind != ATTN_SELECT_HIP3) return 1;
    b->state = attni_cu_hip_state(a, row, list);
    if (row >= a.f.n_slots || b->state[0] != (int32_t)b->p_min) return 1;
    if (a.f.kind != ATTN_SELECT_HIP3) b->from = b->p_min % a.f.hip.refresh ? 1 : 0;
    else
        while (b->from < a.f.hip.n_stages && b->p_min % a.f.hip.stage[b->from].refresh) b->from++;
    return 1;
}

// The set-th of a list's KV heads (ALL), or of the lists from the block's on (EACH).
ATTNI_DEV void attni_cu_hip_set(const attni_cu_pick &a, int32_t set, attni_cu_hip_block *b) {
    const int each = a.f.heads == ATTN_SELECT_EACH;
    b->kv_head = each ? (b->list + set) / a.group : a.f.heads == ATTN_SELECT_ALL ? set : b->list;
    b->head = each ? b->list + set : b->kv_head * a.group;
    b->heads = each ? 1 : a.group;
}

// Positions of a q block of the first two generations.
ATTNI_DEV int64_t attni_cu_hip_span(const attni_cu_pick &a) {
    return (int64_t)a.f.row_block * a.f.hip.q_group;
}

// Bytes of a row of Q in shared memory.
template <int NQ> ATTNI_DEV int attni_cu_hip_row_bytes(const attni_cu_pick &a) {
    return NQ ? 64 * NQ : 4 * a.d.head_dim;
}

// Dimensions 8 c ... of row r of Q to where the lanes that multiply them load 16 bytes at once: of
// 16 rows, step after step of mma, lane after lane. A step has of each lane 4 dimensions.
template <int NQ>
ATTNI_DEV void attni_cu_hip_put(uint8_t *q, int r, int c, const uint32_t u[4]) {
    const uint32_t to = attni_smem(q) + (uint32_t)(((r >> 4) * 2 * NQ + 2 * (c >> 2)) * 512 +
                                                   (4 * (r & 7) + (c & 3)) * 16 + (r >> 3 & 1) * 4);
    attni_sts4(to, u[0]);
    attni_sts4(to + 8, u[1]);
    attni_sts4(to + 512, u[2]);
    attni_sts4(to + 520, u[3]);
}

// Where a position's rotation is; an element of a row rotated so (NULL: as it is).
ATTNI_DEV const float *attni_cu_hip_turn(const attni_cu_pick &a, int64_t at) {
    const attn_hip &h = a.f.hip;
    return h.rope + attni_max64(0, attni_min64(at, h.rope_len - 1)) * h.rope_dim;
}
ATTNI_DEV float attni_cu_hip_element(const attni_cu_pick &a, const uint8_t *row, attn_dtype t,
                                     int e, const float *turn) {
    const int half = a.f.hip.rope_dim / 2;
    const float x = attni_cu_value_at(row, t, e);
    if (!turn || e >= 2 * half) return x;
    const int first = e < half, i = first ? e : e - half;
    const float y = attni_cu_value_at(row, t, first ? e + half : i);
    return first ? x * turn[i] - y * turn[half + i] : x * turn[i] + y * turn[half + i];
}

// Row r of Q, the mean of n queries from `from` on, to shared memory; `low` bytes behind it (0:
// nowhere) what 16 bits leave of it. turn: in f32 only.
template <int BF, int NQ>
ATTNI_DEV void attni_cu_hip_query(const attni_cu_pick &a, uint8_t *q, int r, const uint8_t *from,
                                  int n, const float *turn, int low, int step, int steps) {
    const int64_t next = a.d.q.stride_token * (a.d.q.dtype == ATTN_F32 ? 4 : 2);
    if constexpr (NQ == 0) {
        float *to = (float *)(void *)q + r * a.d.head_dim;
        for (int e = step; e < a.d.head_dim; e += steps) {
            float x = 0;
            for (int i = 0; i < n; i++)
                x += attni_cu_hip_element(a, from + i * next, a.d.q.dtype, e, turn);
            x = n > 1 ? x / (float)n : x;
            to[e] = a.flip ? -x : x;
        }
    } else for (int c = step; c < 4 * NQ; c += steps) {
        float x[8];
        uint32_t u[4], v[4] = {0, 0, 0, 0};
        if (n == 1) {
            const uint4 y = *(const uint4 *)(const void *)(from + 16 * c);
            u[0] = y.x, u[1] = y.y, u[2] = y.z, u[3] = y.w;
            attni_cu_hip_put<NQ>(q, r, c, u);
            if (low) attni_cu_hip_put<NQ>(q + low, r, c, v);
            continue;
        }
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = 0;
        for (int i = 0; i < n; i++) {
            const uint8_t *src = from + i * next + 16 * c;
#pragma unroll
            for (int e = 0; e < 8; e++)
                x[e] += attni_cu_value_at(src, BF ? ATTN_BF16 : ATTN_F16, e);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] /= (float)n;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u[e] = attni_pair<BF>(x[2 * e], x[2 * e + 1]);
            const float lo = BF ? __uint_as_float(u[e] << 16) : attni_half((uint16_t)u[e]);
            const float hi = BF ? __uint_as_float(u[e] & 0xffff0000u)
                                : attni_half((uint16_t)(u[e] >> 16));
            v[e] = attni_pair<BF>(x[2 * e] - lo, x[2 * e + 1] - hi);
        }
        attni_cu_hip_put<NQ>(q, r, c, u);
        if (low) attni_cu_hip_put<NQ>(q + low, r, c, v);
    }
}

typedef struct attni_cu_hip_turns { // of two keys; which come after how many rows of Q
    const float *turn[2];
    int32_t skip[2];
} attni_cu_hip_turns;

// Of the largest products of a lane's rows with columns 2 (lane % 4) + e of 8 h, best[h][e], what
// the lane gets of all rows: each passes on what is not its own.
ATTNI_DEV float attni_cu_hip_over_rows(const float best[2][2]) {
    const int lane = (int)threadIdx.x & 31;
    const int h = lane >> 2 & 1, e = lane >> 3 & 1;
    const float even = fmaxf(h ? best[1][0] : best[0][0],
                             __shfl_xor_sync(~0u, h ? best[0][0] : best[1][0], 4));
    const float odd = fmaxf(h ? best[1][1] : best[0][1],
                            __shfl_xor_sync(~0u, h ? best[0][1] : best[1][1], 4));
    const float m = fmaxf(e ? odd : even, __shfl_xor_sync(~0u, e ? even : odd, 8));
    return fmaxf(m, __shfl_xor_sync(~0u, m, 16));
}

// attni_cu_hip_score in f32.
ATTNI_DEV float attni_cu_hip_score_f32(const attni_cu_pick &a, const uint8_t *q, int n,
                                       const uint8_t *const key[2], const int32_t *limit,
                                       const int32_t pos[2], const attni_cu_hip_turns *turns) {
    const int lane = (int)threadIdx.x & 31;
    float m[2] = {ATTNI_NINF, ATTNI_NINF};
    for (int r = lane & 3; r < 32 * n; r += 4) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float *turn = turns ? turns->turn[h] : NULL;
            const float *y = (const float *)(const void *)q +
                             (r + (turns ? turns->skip[h] : 0)) * a.d.head_dim;
            float c = 0;
            for (int e = 0; e < a.d.head_dim && key[h]; e++)
                c = __fmaf_rn(y[e], attni_cu_hip_element(a, key[h], a.k.dtype, e, turn), c);
            if (!limit || pos[h] <= limit[r]) m[h] = fmaxf(m[h], c);
        }
    }
    const int from = 4 * (2 * (lane & 3) + (lane >> 3 & 1));
    m[0] = __shfl_sync(~0u, attni_quad_max(m[0]), from);
    m[1] = __shfl_sync(~0u, attni_quad_max(m[1]), from);
    return lane & 4 ? m[1] : m[0];
}

// The largest product of a key with 32 n rows, of 16 keys: the lane's are lane / 4 of each 8 (NULL:
// anything), what it gets is of 8 h + 2 (lane % 4) + e, h and e the bits above. With limits only of
// rows r that see the key: pos <= limit[r]. turns: in f32, or NULL.
template <int BF, int NQ>
ATTNI_DEV float attni_cu_hip_score(const attni_cu_pick &a, const uint8_t *q, int n, int low,
                                   const uint8_t *const key[2], const int32_t *limit,
                                   const int32_t pos[2], const attni_cu_hip_turns *turns) {
    if constexpr (NQ > 0) {
        const int lane = (int)threadIdx.x & 31;
        uint32_t x[2][NQ][4], at = attni_smem(q) + (uint32_t)(16 * lane);
        float best[2][2] = {{ATTNI_NINF, ATTNI_NINF}, {ATTNI_NINF, ATTNI_NINF}};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint8_t *from = (key[h] ? key[h] : a.k.data) + 16 * (lane & 3);
#pragma unroll
            for (int d = 0; d < NQ; d++) {
                const uint4 y = __ldg((const uint4 *)(const void *)(from + 64 * d));
                x[h][d][0] = y.x, x[h][d][1] = y.y, x[h][d][2] = y.z, x[h][d][3] = y.w;
            }
        }
        for (int g = 0; g < n; g++, at += 2 * 2 * NQ * 512) {
            float c[2][2][4]; // 16 rows; 8 keys
#pragma unroll
            for (int e = 0; e < 16; e++) c[e >> 3][e >> 2 & 1][e & 3] = 0;
#pragma unroll
            for (int d = 0; d < 2 * NQ; d++)
                for (int part = 0; part <= low; part += low ? low : 1) {
                    uint32_t y[2][4];
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        attni_lds16(y[i], at + (uint32_t)(part + (i * 2 * NQ + d) * 512));
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        attni_mma<BF>(c[i >> 1][i & 1], y[i >> 1], x[i & 1][d >> 1][2 * (d & 1)],
                                      x[i & 1][d >> 1][2 * (d & 1) + 1]);
                }
            if (limit) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const int column = 2 * (lane & 3) + (i & 1);
                    const int r = 32 * g + 16 * (i >> 3) + 8 * (i >> 1 & 1) + (lane >> 2);
                    if (__shfl_sync(~0u, pos[i >> 2 & 1], 4 * column) > limit[r])
                        c[i >> 3][i >> 2 & 1][i & 3] = ATTNI_NINF;
                }
            }
#pragma unroll
            for (int i = 0; i < 16; i++)
                best[i >> 2 & 1][i & 1] = fmaxf(best[i >> 2 & 1][i & 1],
                                                c[i >> 3][i >> 2 & 1][i & 3]);
        }
        return attni_cu_hip_over_rows(best);
    } else {
        return attni_cu_hip_score_f32(a, q, n, key, limit, pos, turns);
    }
}

// Where the key at pos lies, if rows may see it. WIDE: rows of 16-byte pieces without scales.
template <int WIDE>
ATTNI_DEV const uint8_t *attni_cu_hip_key(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                          uint32_t pos, float *scale) {
    const uint32_t j = pos - (uint32_t)b.kv_pos0;
    *scale = 0;
    if (j >= b.held) return NULL;
    if (!WIDE) return attni_cu_token_at(a, b.seq, b.kv_head, (int32_t)j, scale);
    const uint32_t tokens = (uint32_t)a.d.kv.page_tokens;
    const uint32_t page = a.page_shift >= 0 ? j >> a.page_shift : j / tokens;
    uint32_t id = (uint32_t)b.seq;
    if (a.d.kv.page_table)
        id = (uint32_t)__ldg(a.d.kv.page_table + b.seq * a.d.kv.page_table_stride + page);
    if (id >= (uint32_t)a.d.kv.n_pages) {
        if (a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
        return NULL;
    }
    *scale = a.scale;
    return a.k.data + b.kv_head * a.k.head_bytes +
           ((uint64_t)id * a.page16 + (uint64_t)(j - page * tokens) * a.token16) * 16;
}

// The largest product as a score: -infinity of a key that is not there or no number.
ATTNI_DEV float attni_cu_hip_value(float m, const uint8_t *key, float scale) {
    const float s = m * scale;
    return key && s == s ? s : ATTNI_NINF;
}

// Exclusive sums over the block of x (two 16-bit counts), and of all. All threads call.
ATTNI_DEV uint32_t attni_cu_count_before(uint32_t x, uint32_t *all) {
    __shared__ uint32_t s[32];
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    uint32_t n = x, before = 0;
    for (int i = 1; i < 32; i *= 2) {
        const uint32_t y = __shfl_up_sync(~0u, n, i);
        if (lane >= i) n += y;
    }
    __syncthreads();
    if (lane == 31) s[warp] = n;
    __syncthreads();
    *all = 0;
    for (int j = 0; j < (int)blockDim.x / 32; j++) {
        if (j < warp) before += s[j];
        *all += s[j];
    }
    return before + n - x;
}

// Of n keys the k-th largest (1 <= k <= n), and how many that equal it are among the first k; or
// what is below exactly these, and 0. By digits of 8 bits, each with its own counts, which every
// warp looks through. All threads call.
ATTNI_DEV_FAR uint32_t attni_cu_kth(const uint32_t *key, int n, int k, int *ties) {
    __shared__ uint32_t count[4 * 256];
    uint32_t *s = count;
    const int lane = (int)threadIdx.x & 31, n32 = (n + 31) & ~31;
    uint32_t low = 0, fixed = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < 4 * 256; i += (int)blockDim.x) count[i] = 0;
    __syncthreads();
    for (int shift = 24; shift >= 0; shift -= 8, s += 256) {
        for (int i = (int)threadIdx.x; i < n32; i += (int)blockDim.x) {
            const int is = i < n && (key[i] & fixed) == low;
            const uint32_t digit = is ? key[i] >> shift & 255 : 256;
            if (shift == 24) { // signs and exponents: many are the same
                const uint32_t same = __match_any_sync(~0u, digit);
                if (is && lane == __ffs((int)same) - 1)
                    atomicAdd(s + digit, (uint32_t)__popc(same));
            } else if (is) {
                atomicAdd(s + digit, 1);
            }
        }
        __syncthreads();
        const int top = 255 - 8 * lane; // lane l: bins from 255 - 8 l down
        int sum = 0, left, j = 0;
        for (int i = 0; i < 8; i++) sum += (int)s[top - i];
        int upto = sum;
        for (int i = 1; i < 32; i *= 2) {
            const int y = __shfl_up_sync(~0u, upto, i);
            if (lane >= i) upto += y;
        }
        const int has = upto >= k && upto - sum < k;
        for (left = k - (upto - sum); has && (int)s[top - j] < left; j++) left -= (int)s[top - j];
        const int who = __ffs((int)__ballot_sync(~0u, has)) - 1;
        const int all = __shfl_sync(~0u, has && (int)s[top - j] == left, who);
        k = __shfl_sync(~0u, left, who);
        low |= (uint32_t)__shfl_sync(~0u, top - j, who) << shift;
        fixed |= (uint32_t)255 << shift;
        if (all && low) {
            *ties = 0;
            return low - 1;
        }
    }
    *ties = k;
    return low;
}

// Entries [lo, hi] of a row: every block. All threads call.
ATTNI_DEV void attni_cu_hip_range(const attni_cu_pick &a, int32_t list, int32_t row, int64_t lo,
                                  int64_t hi, int32_t visited) {
    const int64_t base = ((int64_t)list * a.x.max_rows + row) * a.x.row_capacity;
    const int64_t at = list * ((int64_t)a.x.max_rows + 1) + row;
    const int64_t n = attni_min64(attni_max64(hi - lo + 1, 0), a.x.row_capacity);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) a.x.block[base + i] = (int32_t)(lo + i);
    if (threadIdx.x) return;
    a.x.row_start[at] = base;
    a.x.row_end[at] = base + n;
    a.x.visited[at] = visited;
    if (hi - lo + 1 > a.x.row_capacity && a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
}

// ---- HIP1 and HIP2

typedef struct attni_cu_hip_group {
    int32_t start, size, rep; // blocks (HIP1: start is a cell of the grid); what stands for it
    int32_t lane;             // of the lists at hand, which
    uint32_t key;             // order of its score
} attni_cu_hip_group;

typedef struct attni_cu_hip_grid { // which list rows a launch is for, what it has room for
    int32_t row0, n_rows;
    int32_t q_rows, words;         // of Q; of a bitmap
    int32_t n_sets, n_scorers;     // of heads; queries of a q block that score, at most
} attni_cu_hip_grid;

typedef struct attni_cu_hip_rows { // a list row in shared memory
    uint8_t *q;
    int32_t *limit;            // the last position that a row of Q scores
    attni_cu_hip_group *group, *next_group;
    uint32_t *key;             // of children, two places a group; 0: there is none
    int32_t *rep;              // below 0: not to be scored
    uint32_t *bits;            // blocks listed
    const uint32_t *all;       // S of eligible blocks of the first list, or NULL
    int32_t b0, n, w, next;    // eligible blocks; HIP1: the grid, the one after it
    int32_t n_groups, per;     // keys of a block that score
} attni_cu_hip_rows;

ATTNI_DEV uint64_t attni_cu_hip_hash(uint64_t seed, uint64_t a, uint64_t c) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u + a * 0xbf58476d1ce4e5b9u + c * 0x94d049bb133111ebu;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Which block stands for a group.
ATTNI_DEV int32_t attni_cu_hip_rep(const attn_hip &h, int32_t start, int32_t size, int64_t m) {
    if (h.sample == ATTN_HIP_FIRST) return start;
    if (h.sample == ATTN_HIP_LAST) return start + size - 1;
    if (h.sample == ATTN_HIP_POSITION) return start + (int32_t)(m % size);
    if (h.sample == ATTN_HIP_RANDOM) {
        const uint64_t z =
            attni_cu_hip_hash(h.seed, (uint64_t)start + ((uint64_t)size << 32), (uint64_t)m);
        return start + (int32_t)((z >> 32) * (uint64_t)size >> 32);
    }
    return start + size / 2;
}

__host__ __device__ static inline int attni_cu_hip_oracle(const attn_select &f) {
    return f.kind == ATTN_SELECT_HIP2 && f.hip.sample == ATTN_HIP_ORACLE;
}

// How much of the window stays until the next scan.
ATTNI_DEV int64_t attni_cu_hip_late(const attni_cu_pick &a) {
    return attni_max32(0, a.f.hip.window - a.f.hip.refresh + 1);
}

// The eligible blocks: how many, and the first one.
ATTNI_DEV int64_t attni_cu_hip_eligible(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                        int64_t *b0) {
    const int64_t edge = attni_min64(b.end - 1, b.p_max - attni_cu_hip_late(a));
    *b0 = attni_max64(a.f.hip.sink, b.kv_pos0) / a.f.hip.block;
    return edge < 0 ? 0 : attni_max64(0, edge / a.f.hip.block + 1 - *b0);
}

// The queries that score: how many, and the position of the j-th.
ATTNI_DEV int attni_cu_hip_scorers(const attni_cu_pick &a, const attni_cu_hip_block &b) {
    const int64_t stride = a.f.hip.q_stride, end = b.p_max - b.first + 1;
    return (int)(end / stride - (b.p_min - b.first) / stride) + (end % stride != 0);
}
ATTNI_DEV int64_t attni_cu_hip_scorer(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                      int32_t j) {
    const int64_t stride = a.f.hip.q_stride, at = (b.p_min - b.first) / stride + j + 1;
    return attni_min64(b.first + at * stride - 1, b.p_max);
}

// ... where it lies: low_dim has a copy.
ATTNI_DEV const uint8_t *attni_cu_query_of(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                           int64_t p, int32_t head) {
    return attni_cu_query_at(a, b.q_begin + p - b.q_pos0, head);
}
ATTNI_DEV uint8_t *attni_cu_hip_thinned(const attni_cu_pick &a, const attni_cu_hip_grid &w,
                                        int32_t row, int32_t j, int32_t head) {
    const int64_t at = (int64_t)(row - w.row0) * a.d.n_heads + head;
    return a.work + a.at[ATTNI_CU_HIP_THIN] +
           (at * w.n_scorers + j) * a.d.head_dim * (a.d.q.dtype == ATTN_F32 ? 4 : 2);
}
ATTNI_DEV const uint8_t *attni_cu_hip_scoring(const attni_cu_pick &a, const attni_cu_hip_grid &w,
                                              const attni_cu_hip_block &b, int32_t row, int32_t j,
                                              int32_t head) {
    if (a.at[ATTNI_CU_HIP_THIN] >= 0) return attni_cu_hip_thinned(a, w, row, j, head);
    return attni_cu_query_of(a, b, attni_cu_hip_scorer(a, b, j), head);
}

// S of a list's eligible blocks: by all queries that score, or by the last one alone.
ATTNI_DEV uint32_t *attni_cu_hip_all_of(const attni_cu_pick &a, const attni_cu_hip_grid &w,
                                        int last, int32_t row, int32_t list) {
    return (uint32_t *)(void *)(a.work + a.at[last ? ATTNI_CU_HIP_LAST : ATTNI_CU_HIP_ALL]) +
           ((int64_t)(row - w.row0) * a.x.n_lists + list) * a.kv_cap;
}

// Those, 32 n rows of a set of heads; what is behind the last repeats it.
template <int BF, int NQ>
ATTNI_DEV int attni_cu_hip2_queries(const attni_cu_pick &a, const attni_cu_hip_grid &w,
                                    const attni_cu_hip_block &b, int32_t row, uint8_t *q,
                                    int32_t *limit) {
    const int rows = attni_cu_hip_scorers(a, b) * b.heads, n = (rows + 31) / 32;
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    for (int r = warp; r < 32 * n; r += (int)blockDim.x >> 5) {
        const int x = r < rows ? r : rows - 1, j = x / b.heads;
        attni_cu_hip_query<BF, NQ>(a, q, r,
                                   attni_cu_hip_scoring(a, w, b, row, j, b.head + x % b.heads), 1,
                                   NULL, 0, lane, 32);
        if (lane == 0)
            limit[r] = (int32_t)(attni_cu_hip_scorer(a, b, j) - attni_cu_hip_late(a));
    }
    return n;
}

// The two children of a group, of size 0 where there is none (HIP1: else of 1).
ATTNI_DEV void attni_cu_hip2_split(const attni_cu_pick &a, const attni_cu_hip_rows &x,
                                   const attni_cu_hip_group &g, int32_t start[2], int32_t size[2]) {
    if (a.f.kind == ATTN_SELECT_HIP1) {
        const int64_t from = ((int64_t)g.start * x.next + x.w - 1) / x.w;
        const int64_t to = ((g.start + (int64_t)1) * x.next + x.w - 1) / x.w;
        start[0] = (int32_t)from, size[0] = from < to;
        start[1] = start[0] + 1, size[1] = from + 1 < to;
    } else {
        start[0] = g.start, size[0] = g.size / 2;
        start[1] = g.start + size[0], size[1] = g.size - size[0];
    }
}

// What stands for the children and, until they are scored, their keys. Their number, and that of
// those to be scored, of the thread's.
ATTNI_DEV int attni_cu_hip2_children(const attni_cu_pick &a, const attni_cu_hip_rows &x, int64_t m,
                                     int *visited) {
    const uint32_t none = attni_cu_order(ATTNI_NINF);
    int there = 0;
    for (int i = (int)threadIdx.x; i < x.n_groups; i += (int)blockDim.x) {
        const attni_cu_hip_group g = x.group[i];
        int32_t start[2], size[2];
        attni_cu_hip2_split(a, x, g, start, size);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int32_t rep = -1;
            uint32_t key = size[c] ? none : 0;
            there += size[c] > 0;
            if (size[c] && a.f.kind == ATTN_SELECT_HIP1) {
                rep = (int32_t)(x.b0 + (int64_t)start[c] * x.n / x.next);
            } else if (size[c] && attni_cu_hip_oracle(a.f)) {
                const uint32_t *s = x.all + g.lane * a.kv_cap + (start[c] - x.b0);
                for (int32_t e = 0; e < size[c]; e++) key = s[e] > key ? s[e] : key;
            } else if (size[c]) {
                rep = attni_cu_hip_rep(a.f.hip, start[c], size[c], m);
                // what stood for its parent too is not scored again
                if (rep == g.rep) key = g.key, rep = -1 - rep;
            }
            x.rep[2 * i + c] = rep, x.key[2 * i + c] = key;
            *visited += rep >= 0;
        }
    }
    return there;
}

// Where key i of the children's lies (NULL: not to be scored), its position.
template <int BF, int NQ>
ATTNI_DEV const uint8_t *attni_cu_hip2_key(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                           const attni_cu_hip_rows &x, int32_t only, int i,
                                           int32_t *pos, float *scale) {
    const int of = x.per == 1 ? i : x.per == 2 ? i >> 1 : i / x.per;
    *pos = 0, *scale = 0;
    if (of >= 2 * x.n_groups) return NULL;
    const int32_t rep = x.rep[of];
    if (rep < 0 || (only >= 0 && x.group[of >> 1].lane != only)) return NULL;
    *pos = rep * a.f.hip.block + (i - of * x.per) * a.f.hip.k_stride;
    return attni_cu_hip_key<(NQ > 0)>(a, b, (uint32_t)*pos, scale);
}

// Scores of the children that are to be scored, for a set of heads; only: of a list alone, -1: all.
// A lane of a warp looks for one of 32 keys, while those before are multiplied, 16 at a time.
template <int BF, int NQ>
ATTNI_DEV void attni_cu_hip2_scores(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                    const attni_cu_hip_rows &x, int rows, int32_t only) {
    const int lane = (int)threadIdx.x & 31, mine = 8 * (lane >> 2 & 1) + 2 * (lane & 3) +
                                                   (lane >> 3 & 1);
    const int n = 2 * x.n_groups * x.per;
    const int32_t seen = (int32_t)(b.p_min - attni_cu_hip_late(a)); // by all rows
    int i = (int)(threadIdx.x & ~31u);
    int32_t next_pos;
    float next_scale;
    const uint8_t *next = attni_cu_hip2_key<BF, NQ>(a, b, x, only, i + lane, &next_pos,
                                                    &next_scale);
    for (; i < n; i += (int)blockDim.x) {
        const uint8_t *now = next;
        const int32_t at = next_pos, all = __all_sync(~0u, at <= seen);
        const float scale_now = next_scale;
        next = attni_cu_hip2_key<BF, NQ>(a, b, x, only, i + (int)blockDim.x + lane, &next_pos,
                                         &next_scale);
        for (int d = 0; d < 64 * NQ && next; d += 128) attni_prefetch(next + d);
#pragma unroll 1
        for (int j = 0; j < 32; j += 16) {
            const uint8_t *key[2];
            int32_t pos[2] = {0, 0};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int from = j + 8 * h + (lane >> 2);
                key[h] = (const uint8_t *)__shfl_sync(~0u, (unsigned long long)now, from);
                if (!all) pos[h] = __shfl_sync(~0u, at, from);
            }
            if (!__any_sync(~0u, key[0] || key[1])) continue;
            const float m = attni_cu_hip_score<BF, NQ>(a, x.q, rows, 0, key, all ? NULL : x.limit,
                                                       pos, NULL);
            const int is = __shfl_sync(~0u, now != NULL, j + mine);
            const float scale = NQ ? a.scale : __shfl_sync(~0u, scale_now, j + mine);
            const int of = i + j + mine;
            if (is && lane < 16)
                attni_shared_max(attni_smem(x.key + (x.per == 1   ? of
                                                     : x.per == 2 ? of >> 1
                                                                  : of / x.per)),
                                 attni_cu_order(attni_cu_hip_value(m, x.q, scale)));
        }
    }
}

// Of so many children the best k (or all) become the groups, in order; whether one of them can be
// split. All threads call.
ATTNI_DEV int attni_cu_hip2_keep(const attni_cu_pick &a, attni_cu_hip_rows *x, int there, int k) {
    int ties = 0, open = 0;
    uint32_t done = 0, all, cut = 0;
    if (there > k) cut = attni_cu_kth(x->key, 2 * x->n_groups, k, &ties);
    for (int i0 = 0; i0 < x->n_groups; i0 += (int)blockDim.x) {
        const int i = i0 + (int)threadIdx.x;
        uint32_t u[2] = {0, 0};
        if (i < x->n_groups) u[0] = x->key[2 * i], u[1] = x->key[2 * i + 1];
        const uint32_t is[2] = {(u[0] > cut) | (uint32_t)(u[0] && u[0] == cut) << 16,
                                (u[1] > cut) | (uint32_t)(u[1] && u[1] == cut) << 16};
        uint32_t before = done + attni_cu_count_before(is[0] + is[1], &all);
        done += all;
#pragma unroll
        for (int c = 0; c < 2; before += is[c++]) {
            const int tied = (int)(before >> 16);
            if (!is[c] || (u[c] == cut && tied >= ties)) continue;
            attni_cu_hip_group g = x->group[i];
            int32_t start[2], size[2];
            attni_cu_hip2_split(a, *x, g, start, size);
            g.start = start[c], g.size = size[c], g.key = u[c];
            g.rep = x->rep[2 * i + c];
            if (g.rep < 0) g.rep = -1 - g.rep;
            x->next_group[(before & 65535) + attni_min32(tied, ties)] = g;
            open |= g.size > 1;
        }
    }
    attni_cu_hip_group *last = x->group;
    x->group = x->next_group, x->next_group = last;
    x->n_groups = (int)(done & 65535) + attni_min32((int)(done >> 16), ties);
    return __syncthreads_or(open);
}

// The rounds of either generation; b (in shared memory) is left with any set. Keys read.
template <int BF, int NQ>
ATTNI_DEV int32_t attni_cu_hip2_rounds(const attni_cu_pick &a, attni_cu_hip_block &b,
                                       const attni_cu_hip_grid &w, int32_t row,
                                       attni_cu_hip_rows *x) {
    const attn_hip &h = a.f.hip;
    const int first = a.f.kind == ATTN_SELECT_HIP1, lanes = h.head_group, k = h.keep / h.block;
    int rows = 0, visited = 0;
    uint32_t all;
    x->n_groups = k * lanes, x->w = k;
    for (int i = (int)threadIdx.x; i < x->n_groups; i += (int)blockDim.x) {
        attni_cu_hip_group g = {i % k, 1, -1, i / k, attni_cu_order(ATTNI_NINF)};
        if (!first) g.start = (int32_t)(x->b0 + (int64_t)x->n * (i % k) / k);
        if (!first) g.size = (int32_t)(x->b0 + (int64_t)x->n * (i % k + 1) / k) - g.start;
        x->group[i] = g;
    }
    __syncthreads();
    for (int open = 1; open;) {
        int want = k * lanes, there, score = 1;
        x->next = (int32_t)attni_min64(2 * (int64_t)x->w, x->n);
        const int before = visited;
        there = attni_cu_hip2_children(a, *x, b.m, &visited);
        if (!first) {
            there = INT32_MAX; // more than stay: one of k groups can be split
        } else {
            attni_cu_count_before((uint32_t)there, &all);
            there = (int)all;
            want = (int)attni_max64(h.patches / h.block, (int64_t)k * x->next / x->n);
            score = there > want;
        }
        for (int set = 0; set < w.n_sets && score; set++) {
            __syncthreads();
            if (threadIdx.x == 0) attni_cu_hip_set(a, set, &b);
            __syncthreads();
            if (w.n_sets > 1 || !rows) {
                rows = attni_cu_hip2_queries<BF, NQ>(a, w, b, row, x->q, x->limit);
                __syncthreads();
            }
            attni_cu_hip2_scores<BF, NQ>(a, b, *x, rows, lanes > 1 ? set : -1);
        }
        __syncthreads();
        if (!score) visited = before;
        if (!score) // what they were is what they stay
            for (int i = (int)threadIdx.x; i < 2 * x->n_groups; i += (int)blockDim.x)
                if (x->key[i]) x->key[i] = x->group[i / 2].key;
        open = attni_cu_hip2_keep(a, x, there, want);
        if (first) open = x->next < x->n;
        x->w = x->next;
    }
    for (int i = (int)threadIdx.x; i < x->n_groups && first; i += (int)blockDim.x)
        x->group[i].start += x->b0;
    attni_cu_count_before((uint32_t)visited, &all);
    return (int32_t)all * x->per / lanes;
}

// Sets bits of the eligible blocks from number `from` to `to`.
ATTNI_DEV void attni_cu_hip_mark(const attni_cu_pick &a, const attni_cu_hip_rows &x, int64_t from,
                                 int64_t to) {
    const int64_t first = (int64_t)x.b0 * a.f.hip.block / a.f.kv_block;
    for (int64_t i = attni_max64(from, 0); i <= attni_min64(to, x.n - 1); i++) {
        const int64_t id = (x.b0 + i) * (int64_t)a.f.hip.block / a.f.kv_block - first;
        atomicOr(x.bits + (id >> 5), 1u << (id & 31));
    }
}

// Marks, for the `best` largest of n keys, `before` blocks before and `behind` behind: of entries
// of `of`, or (NULL) of the keys' own numbers. All threads call.
ATTNI_DEV_FAR void attni_cu_hip_around(const attni_cu_pick &a, attni_cu_hip_rows x,
                                       const uint32_t *key, int n, int best,
                                       const attni_cu_hip_group *of, int64_t before,
                                       int64_t behind) {
    uint32_t cut = 0, done = 0, all;
    int ties = n;
    if (best < 1) return;
    if (best < n) cut = attni_cu_kth(key, n, best, &ties);
    for (int i0 = 0; i0 < n; i0 += (int)blockDim.x) {
        const int i = i0 + (int)threadIdx.x;
        const uint32_t u = i < n ? key[i] : 0, tie = i < n && u == cut;
        const uint32_t rank = done + attni_cu_count_before(tie, &all);
        const int64_t at = of && i < n ? of[i].start - x.b0 : i;
        done += all;
        if (i < n && (u > cut || (tie && rank < (uint32_t)ties)))
            attni_cu_hip_mark(a, x, at - before, at + behind);
    }
}

// Marks what extras add to the list of a lane, whose groups' keys are at x.key; its S at `s`. All
// threads call.
ATTNI_DEV void attni_cu_hip_extras(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                   const attni_cu_hip_rows &x, int32_t lane, const uint32_t *s) {
    const attn_hip &h = a.f.hip;
    const int64_t t = (b.p_max - b.p_min + h.block - 1) / h.block;
    const uint64_t salt = (uint64_t)b.m + ((uint64_t)(b.list + lane + 1) << 32);
    int from = 0, to = 0; // groups of the lane
    while (from < x.n_groups && x.group[from].lane < lane) from++;
    for (to = from; to < x.n_groups && x.group[to].lane == lane;) to++;
    if (h.near)
        attni_cu_hip_around(a, x, x.key + from, to - from, h.near, x.group + from, h.near_window,
                            h.near_window);
    attni_cu_hip_around(a, x, s, (int)x.n, h.vertical, NULL, 0, 0);
    attni_cu_hip_around(a, x, s, (int)x.n, h.diagonal, NULL, t, 0);
    for (int i = (int)threadIdx.x; i < h.random; i += (int)blockDim.x) {
        const uint64_t z = attni_cu_hip_hash(h.seed, (uint64_t)i, salt);
        const int64_t at = (int64_t)((z >> 32) * (uint64_t)x.n >> 32);
        attni_cu_hip_mark(a, x, at, at);
    }
}

// The blocks of a lane's groups, ascending, as entries of a row.
ATTNI_DEV void attni_cu_hip2_write(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                   const attni_cu_hip_rows &x, int32_t row, int32_t lane,
                                   int32_t visited) {
    const int32_t list = b.list + lane, kv = a.f.kv_block, block = a.f.hip.block;
    const int64_t base = ((int64_t)list * a.x.max_rows + row) * a.x.row_capacity;
    const int64_t at = list * ((int64_t)a.x.max_rows + 1) + row;
    uint32_t done = 0, all;
    for (int i0 = 0; i0 < x.n_groups; i0 += (int)blockDim.x) {
        const int i = i0 + (int)threadIdx.x, mine = i < x.n_groups && x.group[i].lane == lane;
        const int64_t id = mine ? (int64_t)x.group[i].start * block / kv : 0;
        const uint32_t is = mine && id * kv <= b.last &&
                            (i == 0 || x.group[i - 1].lane != lane ||
                             id != (int64_t)x.group[i - 1].start * block / kv);
        const uint32_t to = done + attni_cu_count_before(is, &all);
        done += all;
        if (is && to < (uint32_t)a.x.row_capacity) a.x.block[base + to] = (int32_t)id;
    }
    if (threadIdx.x) return;
    a.x.row_start[at] = base;
    a.x.row_end[at] = base + attni_min64(done, a.x.row_capacity);
    a.x.visited[at] = visited;
}

// The lists of chosen groups and extras.
ATTNI_DEV void attni_cu_hip2_lists(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                   const attni_cu_hip_grid &w, attni_cu_hip_rows &x, int32_t row,
                                   int64_t read) {
    const attn_hip &h = a.f.hip;
    const int32_t visited = (int32_t)attni_min64(read, INT32_MAX);
    for (int i = (int)threadIdx.x; i < x.n_groups; i += (int)blockDim.x)
        x.key[i] = x.group[i].key;
    for (int32_t lane = 0; lane < h.head_group; lane++) {
        if (!w.words) {
            attni_cu_hip2_write(a, b, x, row, lane, visited);
            continue;
        }
        const int64_t first = (int64_t)x.b0 * h.block / a.f.kv_block;
        const int64_t top = ((int64_t)x.b0 + x.n - 1) * h.block;
        const int64_t end = attni_min64(top, b.last) / a.f.kv_block + 1;
        const int n_bits = (int)attni_max64(end - first, 0);
        __syncthreads();
        for (int i = (int)threadIdx.x; i < w.words; i += (int)blockDim.x) x.bits[i] = 0;
        __syncthreads();
        for (int i = (int)threadIdx.x; i < x.n_groups; i += (int)blockDim.x)
            if (x.group[i].lane == lane)
                attni_cu_hip_mark(a, x, x.group[i].start - x.b0, x.group[i].start - x.b0);
        attni_cu_hip_extras(a, b, x, lane, attni_cu_hip_all_of(a, w, 1, row, b.list + lane));
        __syncthreads();
        if (threadIdx.x < 32)
            attni_cu_emit(a, b.list + lane, row, x.bits, (int32_t)first, n_bits, visited);
    }
}

// The row's lists. Shared memory: Q, limits, groups twice, children, a bitmap.
template <int BF, int NQ>
static __global__ void __launch_bounds__(512)
    attni_cu_hip2(const __grid_constant__ attni_cu_pick a, const attni_cu_hip_grid w) {
    extern __shared__ __align__(256) uint8_t smem[];
    const attn_hip &h = a.f.hip;
    const int32_t row = w.row0 + w.n_rows - 1 - (int32_t)blockIdx.x; // the longest first
    const int k = h.keep / h.block, lanes = h.head_group, most = k * lanes;
    __shared__ attni_cu_hip_block b; // registers are short
    attni_cu_hip_rows x;
    int found = 0;
    if (threadIdx.x == 0)
        found = attni_cu_hip_focus(a, row, (int32_t)blockIdx.y * lanes, attni_cu_hip_span(a), &b);
    if (!__syncthreads_or(found)) return;
    const int dense = b.kv_end - b.kv_pos0 <= a.f.dense_below;
    int64_t b0;
    x.n = (int32_t)attni_cu_hip_eligible(a, b, &b0);
    x.b0 = (int32_t)b0;
    if (b.from && !dense) { // the lists stay
        for (int l = (int)threadIdx.x; l < lanes; l += (int)blockDim.x)
            a.x.visited[(b.list + l) * ((int64_t)a.x.max_rows + 1) + row] = 0;
    } else if (dense || x.n <= k) {
        const int64_t kv = a.f.kv_block, top = b.last / kv, end = (b0 + x.n) * h.block;
        const int64_t lo = dense ? b.kv_pos0 / kv : b0 * h.block / kv;
        const int64_t hi = dense ? (attni_min64(b.last + 1, b.kv_end) - 1) / kv
                                 : x.n ? attni_min64((end - 1) / kv, top) : -1;
        for (int l = 0; l < lanes; l++) attni_cu_hip_range(a, b.list + l, row, lo, hi, 0);
    } else if (x.n > a.kv_cap && (w.words || attni_cu_hip_oracle(a.f))) { // outgrew the memory
        for (int l = 0; l < lanes; l++) attni_cu_hip_range(a, b.list + l, row, 0, -1, 0);
        if (a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
    } else {
        x.q = smem;
        x.limit = (int32_t *)(void *)(smem + w.q_rows * attni_cu_hip_row_bytes<NQ>(a));
        x.group = (attni_cu_hip_group *)(void *)(x.limit + w.q_rows);
        x.next_group = x.group + most;
        x.key = (uint32_t *)(void *)(x.next_group + most);
        x.rep = (int32_t *)(void *)(x.key + 2 * most);
        x.bits = (uint32_t *)(void *)(x.rep + 2 * most);
        x.all = attni_cu_hip_all_of(a, w, 0, row, b.list);
        x.per = (int32_t)attni_n_blocks(h.block, h.k_stride);
        int64_t read = attni_cu_hip2_rounds<BF, NQ>(a, b, w, row, &x);
        if (attni_cu_hip_oracle(a.f)) read += (int64_t)x.n * x.per;
        if (h.vertical || h.diagonal) read += (int64_t)x.n * h.block;
        attni_cu_hip2_lists(a, b, w, x, row, read);
    }
    for (int l = (int)threadIdx.x; l < lanes && b.state; l += (int)blockDim.x)
        attni_cu_hip_state(a, row, b.list + l)[0] = dense ? 0 : (int32_t)b.p_min + 1;
}

// ---- S of all blocks

// low_dim: the queries that score once more, zeros in all but the dimensions that count.
static __global__ void __launch_bounds__(128)
    attni_cu_hip_thin(const __grid_constant__ attni_cu_pick a, const attni_cu_hip_grid w) {
    __shared__ float sum[ATTN_MAX_HEAD_DIM];
    const int32_t row = w.row0 + (int32_t)blockIdx.x, head = (int32_t)blockIdx.y;
    const int dim = a.d.head_dim, bytes = a.d.q.dtype == ATTN_F32 ? 4 : 2;
    attni_cu_hip_block b;
    if (!attni_cu_hip_focus(a, row, 0, attni_cu_hip_span(a), &b)) return;
    const int n = attni_cu_hip_scorers(a, b);
    for (int e = (int)threadIdx.x; e < dim; e += 128) {
        float x = 0;
        for (int j = 0; j < n; j++) {
            const int64_t p = attni_cu_hip_scorer(a, b, j);
            x += fabsf(attni_cu_value_at(attni_cu_query_of(a, b, p, head), a.d.q.dtype, e));
        }
        sum[e] = x == x ? x : ATTNI_NINF;
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < dim; e += 128) {
        int before = 0; // dimensions that count more
        for (int i = 0; i < dim; i++) before += sum[i] > sum[e] || (sum[i] == sum[e] && i < e);
        for (int j = 0; j < n; j++) {
            const uint8_t *q = attni_cu_query_of(a, b, attni_cu_hip_scorer(a, b, j), head);
            uint8_t *to = attni_cu_hip_thinned(a, w, row, j, head);
            for (int i = 0; i < bytes; i++)
                to[e * bytes + i] = before < a.f.hip.low_dim ? q[e * bytes + i] : 0;
        }
    }
}

// LAST: of the last query and every key, else of all those that score. A tile has 128 of them, of
// `each` list rows of a sequence at most or of a part of one, for one KV head; and a slice of keys.
template <int LAST>
static __global__ void __launch_bounds__(ATTNI_CU_PICK, 2)
    attni_cu_hip_all(const __grid_constant__ attni_cu_pick a, const attni_cu_hip_grid w, int each) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_keys keys;
    __shared__ const uint8_t *q_row[ATTNI_CU_PICK_ROWS];
    __shared__ uint32_t *out[ATTNI_CU_PICK_ROWS];
    __shared__ int32_t limit[ATTNI_CU_PICK_ROWS], top, n_q;
    const int tid = (int)threadIdx.x, lane = tid & 31, row0 = (tid >> 5) * 16 + (lane >> 2);
    const int32_t x = w.n_rows - 1 - (int32_t)blockIdx.x, kv_head = blockIdx.y % a.d.n_kv_heads;
    const int32_t part = (int32_t)blockIdx.y / a.d.n_kv_heads, seq = a.row_of[w.row0 + x].seq;
    const uint32_t block = (uint32_t)a.f.hip.block, stride = LAST ? 1 : a.f.hip.k_stride;
    int64_t b0 = 0;
    if (seq < 0 || (x % each && a.row_of[w.row0 + x - 1].seq == seq)) return;
    const attn_plan_seq q = a.seq[seq];
    if (tid == 0) top = -1, n_q = 0;
    __syncthreads();
    if (tid < ATTNI_CU_PICK_ROWS) {
        const int32_t per = a.group * (LAST ? 1 : w.n_scorers), f = part * ATTNI_CU_PICK_ROWS + tid;
        const int32_t r = f / per, row = w.row0 + x + r, j = f % per / a.group;
        const int32_t head = kv_head * a.group + f % a.group, list = head / a.per_list;
        attni_cu_hip_block b;
        q_row[tid] = NULL, limit[tid] = -1;
        if (r < each - x % each && x + r < w.n_rows && a.row_of[row].seq == seq &&
            attni_cu_hip_focus(a, row, list, attni_cu_hip_span(a), &b) && !b.from &&
            b.kv_end - b.kv_pos0 > a.f.dense_below && (LAST || j < attni_cu_hip_scorers(a, b))) {
            const int64_t n = attni_cu_hip_eligible(a, b, &b0);
            const int32_t i = LAST ? attni_cu_hip_scorers(a, b) - 1 : j;
            const int64_t p = attni_cu_hip_scorer(a, b, i) - attni_cu_hip_late(a);
            if (n > a.kv_cap && a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
            if (n > a.f.hip.keep / block && n <= a.kv_cap) {
                q_row[tid] = attni_cu_hip_scoring(a, w, b, row, i, head);
                out[tid] = attni_cu_hip_all_of(a, w, LAST, row, list);
                limit[tid] = (int32_t)attni_min64(p, b.end - 1);
                atomicMax(&top, limit[tid]);
                atomicMax(&n_q, (tid + 16) & ~15);
            }
        }
    }
    __syncthreads();
    b0 = attni_max64(a.f.hip.sink, q.kv_pos0) / block;
    const int64_t tiles = (top - b0 * block + ATTNI_CU_PICK_KEYS) / ATTNI_CU_PICK_KEYS;
    const int64_t per = (tiles + gridDim.z - 1) / gridDim.z;
    if (top < b0 * block) return;
    if (a.mode) attni_cu_copy_rows(a, q_row, n_q, a.d.q.dtype, a.odd_q, attni_smem(smem));
    for (int64_t t = blockIdx.z * per; t < attni_min64(tiles, (blockIdx.z + 1) * per); t++) {
        uint8_t *k_tile = smem + ATTNI_CU_PICK_ROWS * a.row_bytes;
        float acc[1][8][4];
        __syncthreads();
        if (tid < ATTNI_CU_PICK_KEYS)
            attni_cu_find_key(a, q, seq, kv_head, b0 * block + t * ATTNI_CU_PICK_KEYS + tid, &keys,
                              0, tid);
        __syncthreads();
        if (a.mode) {
            attni_cu_copy_rows(a, keys.row[0], ATTNI_CU_PICK_KEYS, a.k.dtype, a.odd_k,
                               attni_smem(k_tile));
            attni_cp_commit();
            attni_cp_wait<0>();
            __syncthreads();
        }
        if (a.mode && 16 * (tid >> 5) >= n_q) continue;
        attni_cu_products<1>(a, acc, smem, ATTNI_CU_PICK_ROWS, attni_smem(k_tile), q_row,
                             keys.row[0]);
#pragma unroll
        for (int j = 0; j < 8; j++) { // two keys, often of one block, and two rows
            const int c = 8 * j + 2 * (lane & 3);
            const uint32_t from = (uint32_t)(t * ATTNI_CU_PICK_KEYS + c), of = from / block;
            const uint32_t place = from - of * block, apart = place + 1 == block;
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int32_t last = limit[row0 + 4 * i] - (int32_t)(b0 * block + from);
                float v[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int scores = last >= e && keys.row[0][c + e] &&
                                       (apart && e ? 0 : place + e) % stride == 0;
                    v[e] = (a.flip ? -acc[0][j][i + e] : acc[0][j][i + e]) * keys.scale[0][c + e];
                    v[e] = scores && v[e] == v[e] ? v[e] : ATTNI_NINF;
                }
                if (!apart) v[0] = fmaxf(v[0], v[1]);
                if (v[0] > ATTNI_NINF) atomicMax(out[row0 + 4 * i] + of, attni_cu_order(v[0]));
                if (apart && v[1] > ATTNI_NINF)
                    atomicMax(out[row0 + 4 * i] + of + 1, attni_cu_order(v[1]));
            }
        }
    }
}

// ---- HIP3

// Eligible chunks of a stage: low <= y <= high.
ATTNI_DEV void attni_cu_hip3_reach(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                   int32_t stage, int64_t *low, int64_t *high) {
    const attn_hip &h = a.f.hip;
    const int64_t c = h.stage[stage].chunk, c0 = h.stage[0].chunk;
    const int64_t lim = attni_min64(b.end - 1, attni_max64(b.p_min + c0, b.p_max) - h.window);
    *low = b.kv_pos0 > h.sink ? (b.kv_pos0 - h.sink) / c : 0;
    *high = lim < h.sink ? -1 : (lim - h.sink) / c;
}

// Places of a stage's candidates, some of which may be empty.
ATTNI_DEV int64_t attni_cu_hip3_places(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                       int32_t stage, int64_t low, int64_t high) {
    const attn_hip_stage *t = a.f.hip.stage + stage;
    if (!stage) return attni_max64(high - low + 1, 0);
    const int32_t most = t->keep / t[-1].chunk, n = b.state[attni_cu_hip_place(a, stage)];
    return (int64_t)attni_max32(0, attni_min32(n, most)) * (t[-1].chunk / t->chunk);
}

// The chunk at a place.
ATTNI_DEV int64_t attni_cu_hip3_chunk(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                      int32_t stage, int64_t low, int64_t i) {
    const attn_hip_stage *t = a.f.hip.stage + stage;
    if (!stage) return low + i;
    const int32_t ratio = t[-1].chunk / t->chunk;
    return (int64_t)b.state[attni_cu_hip_place(a, stage) + 1 + i / ratio] + i % ratio;
}

// Is a candidate's chunk one, which no place before has (CENTRE)?
ATTNI_DEV int attni_cu_hip3_is(const attni_cu_pick &a, const attni_cu_hip_block &b, int32_t stage,
                               int64_t low, int64_t high, int64_t i, int64_t y) {
    const attn_hip_stage *t = a.f.hip.stage + stage;
    if (y < low || y > high) return 0;
    if (!(t->flags & ATTN_HIP_CENTRE)) return 1;
    const int32_t ratio = t[-1].chunk / t->chunk;
    return i < ratio || y >= b.state[attni_cu_hip_place(a, stage) + i / ratio] + ratio;
}

// How many candidates there are before place i.
ATTNI_DEV int32_t attni_cu_hip3_rank(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                     int32_t stage, int64_t low, int64_t high, int64_t i) {
    const attn_hip_stage *t = a.f.hip.stage + stage;
    int32_t n = 0;
    if (!stage) return (int32_t)i;
    const int32_t *first = b.state + attni_cu_hip_place(a, stage) + 1;
    const int32_t ratio = t[-1].chunk / t->chunk;
    int64_t next = low;
    for (int64_t j = 0; j * ratio < i; j++) {
        const int64_t stop = attni_min64((int64_t)first[j] + attni_min64(ratio, i - j * ratio),
                                         high + 1);
        n += (int32_t)attni_max64(0, stop - attni_max64(first[j], next));
        next = attni_max64(next, stop);
    }
    return n;
}

// Where a stage's style puts a query at position q (far: for keys far away) ...
ATTNI_DEV int64_t attni_cu_hip3_query_at(const attni_cu_pick &a, const attn_hip_stage &t, int64_t q,
                                         int far, int32_t candidates) {
    const int64_t window = attni_max32(0, a.f.hip.window - a.f.hip.stage[0].chunk);
    switch ((int)t.style) {
    case ATTN_ROPE_RELATIVE: return window + 1;
    case ATTN_ROPE_CHUNK: return attni_min64(q, candidates + window);
    case ATTN_ROPE_INFLLM: return window;
    case ATTN_ROPE_SELF_EXTEND: return far ? q / 16 + 8192 - 512 : q;
    default: return q;
    }
}
// ... and a key of the place'th candidate, probed on the left or the right.
ATTNI_DEV int64_t attni_cu_hip3_key_at(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                       const attn_hip_stage &t, int64_t key, int32_t place,
                                       int right) {
    const int64_t x = a.f.hip.context, recent = x / 4, n = b.end;
    switch ((int)t.style) {
    case ATTN_ROPE_RELATIVE: return right;
    case ATTN_ROPE_CHUNK: return place;
    case ATTN_ROPE_INFLLM: return 0;
    case ATTN_ROPE_DYNAMIC:
        if (key >= n - recent || n <= x) return key;
        return n - recent - 1 - (n - recent - 1 - key) * (x - recent) / (n - recent);
    case ATTN_ROPE_SELF_EXTEND: return b.p_min - key >= 8192 ? key / 16 : key;
    default: return key;
    }
}

// Means of the runs of a set of heads, 32 n rows; SELF_EXTEND: then those for keys far away.
template <int BF, int NQ>
ATTNI_DEV int attni_cu_hip3_queries(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                    const attn_hip_stage &t, int32_t candidates, uint8_t *q,
                                    int low) {
    const int64_t stride = t.q_stride, r0 = (b.p_min - b.first) / stride;
    const int runs = (int)((b.p_max - b.first) / stride - r0) + 1, rows = runs * b.heads;
    const int n = (rows + 31) / 32, share = NQ ? 4 * NQ : 32; // lanes of a row
    const int sets = t.style == ATTN_ROPE_SELF_EXTEND ? 2 : 1;
    for (int i = (int)threadIdx.x; i < sets * 32 * n * share; i += (int)blockDim.x) {
        const int r = i / share, far = r >= 32 * n, x = attni_min32(r - 32 * n * far, rows - 1);
        const int64_t at = b.first + (r0 + x / b.heads) * stride;
        const int64_t p = attni_max64(at, b.p_min), end = attni_min64(at + stride, b.p_max + 1);
        const float *turn = NQ || !t.style ? NULL : attni_cu_hip_turn(
                                a, attni_cu_hip3_query_at(a, t, p, far, candidates));
        attni_cu_hip_query<BF, NQ>(
            a, q, r, attni_cu_query_at(a, b.q_begin + p - b.q_pos0, b.head + x % b.heads),
            (int)(end - p), turn, low, i - r * share, share);
    }
    return n;
}

// LANDMARK: the key that stands for the chunk at l. Four lanes have the same chunk.
ATTNI_DEV int64_t attni_cu_hip3_landmark(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                         int64_t l, int32_t chunk) {
    const int32_t pt = a.d.kv.page_tokens, *table = a.d.kv.page_table;
    const int64_t from = attni_max64(l, b.kv_pos0), end = attni_min64(l + chunk, b.end);
    int64_t rep = from;
    float best = ATTNI_NINF;
    for (int64_t p = from + (threadIdx.x & 3); p < end; p += 4) {
        const int32_t j = (int32_t)(p - b.kv_pos0), page = j / pt;
        const int32_t id = table ? table[b.seq * a.d.kv.page_table_stride + page] : b.seq;
        if ((uint32_t)id >= (uint32_t)a.d.kv.n_pages) {
            if (a.error) *a.error = (int32_t)ATTN_ERR_PAGE;
            continue;
        }
        const float v = a.f.hip.landmark[((int64_t)id * a.d.n_kv_heads + b.kv_head) * pt +
                                         (j - page * pt)];
        if (v > best) best = v, rep = p;
    }
    for (int i = 1; i < 4; i *= 2) {
        const float v = __shfl_xor_sync(~0u, best, i);
        const int64_t p = __shfl_xor_sync(~0u, (long long)rep, i);
        if (v > best || (v == best && p < rep)) best = v, rep = p;
    }
    return rep;
}

// Score of the chunk at l (active: if there is one) by descent, 8 chunks a warp; its key that won.
template <int BF, int NQ>
ATTNI_DEV float attni_cu_hip3_descend(const attni_cu_pick &a, const attni_cu_hip_block &b,
                                      const attn_hip_stage &t, const uint8_t *q, int rows, int low,
                                      int64_t l, int active, int32_t place, int64_t *rep) {
    const int32_t least = attni_max32(2, t.terminate), marked = t.flags & ATTN_HIP_LANDMARK;
    int32_t lo = 0, hi = t.chunk;
    float best = ATTNI_NINF;
    if (marked) *rep = attni_cu_hip3_landmark(a, b, l, active ? t.chunk : 0);
    while (__any_sync(~0u, active)) {
        const int32_t mid = (lo + hi) / 2;
        const int64_t pos[2] = {marked ? *rep : l + (lo + mid) / 2, l + (mid + hi) / 2};
        const uint8_t *key[2] = {NULL, NULL};
        float scale[2] = {0, 0};
        attni_cu_hip_turns turns;
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (active && !(h && marked))
                key[h] = attni_cu_hip_key<(NQ > 0)>(a, b, (uint32_t)pos[h], scale + h);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (NQ || !t.style) continue;
            turns.turn[h] = attni_cu_hip_turn(a, attni_cu_hip3_key_at(a, b, t, pos[h], place, h));
            turns.skip[h] = t.style == ATTN_ROPE_SELF_EXTEND && b.p_min - pos[h] >= 8192
                                ? 32 * rows : 0;
        }
        const float m = attni_cu_hip_score<BF, NQ>(a, q, rows, low, key, NULL, NULL,
                                                   !NQ && t.style ? &turns : NULL);
        const int from = (int)(threadIdx.x >> 3 & 3) | (int)(threadIdx.x >> 2 & 1) << 3;
        const float left = attni_cu_hip_value(__shfl_sync(~0u, m, from), key[0], scale[0]);
        const float right = attni_cu_hip_value(__shfl_sync(~0u, m, from | 4), key[1], scale[1]);
        if (!active) continue;
        const int to_left = marked || left > right;
        const float won = to_left ? left : right;
        if (to_left) hi = mid;
        else lo = mid;
        *rep = to_left ? pos[0] : pos[1];
        if (won > best || t.flags & ATTN_HIP_LAST_SCORE) best = won;
        active = hi - lo >= least && !marked;
    }
    return best;
}

// Scores of a slice of a stage's candidates for one KV head: 8 chunks a warp at a time. low: bytes
// between rows of Q and what 16 bits leave of them.
template <int BF, int NQ>
static __global__ void __launch_bounds__(256, 2) attni_cu_hip3_scan(
    const __grid_constant__ attni_cu_pick a, int32_t stage, int turns, int low_bytes) {
    extern __shared__ __align__(256) uint8_t smem[];
    const attn_hip_stage t = a.f.hip.stage[stage];
    const int32_t row = a.x.max_rows - 1 - (int32_t)blockIdx.x, z = (int32_t)blockIdx.z;
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const int placed = !NQ && t.style == ATTN_ROPE_CHUNK;
    const int centre = stage + 1 < a.f.hip.n_stages &&
                       a.f.hip.stage[stage + 1].flags & ATTN_HIP_CENTRE;
    attni_cu_hip_block b;
    int64_t low, high;
    if (!attni_cu_hip_focus(a, row, a.f.heads == ATTN_SELECT_ALL ? 0 : z, t.q_block, &b)) return;
    if (b.kv_end - b.kv_pos0 <= a.f.dense_below || stage < b.from) return;
    attni_cu_hip_set(a, a.f.heads == ATTN_SELECT_ALL ? z : 0, &b);
    attni_cu_hip3_reach(a, b, stage, &low, &high);
    const int64_t n = attni_cu_hip3_places(a, b, stage, low, high);
    if ((int64_t)blockIdx.y * 64 * turns >= n) return;
    const int32_t candidates = placed ? attni_cu_hip3_rank(a, b, stage, low, high, n) : 0;
    const int rows = attni_cu_hip3_queries<BF, NQ>(a, b, t, candidates, smem, low_bytes);
    __syncthreads();
    const int64_t at = ((int64_t)row * a.x.n_lists + b.list) * a.kv_cap;
    uint32_t *keys = (uint32_t *)(void *)(a.work + a.at[ATTNI_CU_HIP_KEYS]) + at;
    for (int turn = 0; turn < turns; turn++) {
        const int64_t i = (((int64_t)blockIdx.y * turns + turn) * 8 + warp) * 8 + (lane >> 2);
        const int64_t y = i < n ? attni_cu_hip3_chunk(a, b, stage, low, i) : -1;
        const int there = i < n && attni_cu_hip3_is(a, b, stage, low, high, i, y);
        const int64_t l = a.f.hip.sink + y * t.chunk;
        const int32_t place = placed && there ? attni_cu_hip3_rank(a, b, stage, low, high, i) : 0;
        int64_t rep = l;
        const float best = attni_cu_hip3_descend<BF, NQ>(a, b, t, smem, rows, low_bytes, l, there,
                                                         place, &rep);
        uint32_t key = attni_cu_order(best);
        if (!there || (lane & 3)) continue;
        if (i >= a.kv_cap) {
            if (a.error) *a.error = (int32_t)ATTN_ERR_BUFFER;
            continue;
        }
        if (centre) // the first KV head with the largest score has a say
            atomicMax((unsigned long long *)(void *)(a.work + a.at[ATTNI_CU_HIP_REPS]) + at + i,
                      (unsigned long long)key << 32 |
                          (uint32_t)((a.d.n_kv_heads - 1 - b.kv_head) * t.chunk + (rep - l)));
        if (t.flags & ATTN_HIP_KEEP_SCORES) {
            const int32_t most = t.keep / a.f.hip.stage[stage - 1].chunk;
            const int64_t from = i / (a.f.hip.stage[stage - 1].chunk / t.chunk);
            const uint32_t was = (uint32_t)b.state[attni_cu_hip_place(a, stage) + 1 + most + from];
            key = was > key ? was : key;
        }
        atomicMax(keys + i, key);
    }
}

// Keys read for a chunk.
ATTNI_DEV int32_t attni_cu_hip3_reads(const attn_hip_stage &t) {
    if (t.flags & ATTN_HIP_LANDMARK) return 1;
    int32_t n = 2, width = (t.chunk + 1) / 2;
    while (width >= attni_max32(2, t.terminate)) n += 2, width = (width + 1) / 2;
    return n;
}

// The best candidates of a stage: what the next one admits, or the list.
static __global__ void __launch_bounds__(256)
    attni_cu_hip3_pick(const __grid_constant__ attni_cu_pick a, int32_t stage) {
    const attn_hip_stage *t = a.f.hip.stage + stage;
    const int32_t row = (int32_t)blockIdx.x, list = (int32_t)blockIdx.y;
    const int last = stage + 1 == a.f.hip.n_stages, keep = last ? a.f.hip.keep : t[1].keep;
    attni_cu_hip_block b;
    int64_t low, high;
    uint32_t done = 0, all, cut = 0;
    int ties = 0;
    if (!attni_cu_hip_focus(a, row, list, t->q_block, &b)) return;
    const int64_t at = list * ((int64_t)a.x.max_rows + 1) + row;
    const int64_t base = ((int64_t)list * a.x.max_rows + row) * a.x.row_capacity;
    if (b.kv_end - b.kv_pos0 <= a.f.dense_below) {
        if (last)
            attni_cu_hip_range(a, list, row, b.kv_pos0 / a.f.kv_block,
                               (attni_min64(b.last + 1, b.kv_end) - 1) / a.f.kv_block, 0);
        if (last && threadIdx.x == 0) b.state[0] = 0;
        return;
    }
    if (stage < b.from) { // from n_stages on the list stays
        if (last && threadIdx.x == 0) b.state[0] = (int32_t)b.p_min + 1, a.x.visited[at] = 0;
        return;
    }
    attni_cu_hip3_reach(a, b, stage, &low, &high);
    const int n = (int)attni_min64(attni_cu_hip3_places(a, b, stage, low, high), a.kv_cap);
    const int64_t of = ((int64_t)row * a.x.n_lists + list) * a.kv_cap;
    uint32_t *key = (uint32_t *)(void *)(a.work + a.at[ATTNI_CU_HIP_KEYS]) + of;
    unsigned long long *reps =
        (unsigned long long *)(void *)(a.work + a.at[ATTNI_CU_HIP_REPS]) + of;
    uint32_t there = 0;
    for (int i = (int)threadIdx.x; i < n; i += 256) there += key[i] != 0;
    attni_cu_count_before(there, &all);
    there = all;
    const int k = keep / t->chunk;
    if (k < 1) cut = ~0u;
    else if ((int)there > k) cut = attni_cu_kth(key, n, k, &ties);
    int32_t *admitted = b.state + attni_cu_hip_place(a, stage + 1);
    const int32_t ratio = last ? 1 : t->chunk / t[1].chunk;
    uint32_t kept = 0;
    for (int i0 = 0; i0 < n; i0 += 256) {
        const int i = i0 + (int)threadIdx.x;
        const uint32_t x = i < n ? key[i] : 0, is = (x > cut) | (uint32_t)(x && x == cut) << 16;
        const uint32_t before = done + attni_cu_count_before(is, &all);
        done += all;
        const int tied = (int)(before >> 16);
        uint32_t mine = is && (x > cut || tied < ties);
        const int to = (int)(before & 65535) + attni_min32(tied, ties);
        const int64_t y = mine ? attni_cu_hip3_chunk(a, b, stage, low, i) : 0;
        if (mine && !last) {
            const int32_t most = t[1].keep / t->chunk;
            int64_t first = y * ratio;
            if (t[1].flags & ATTN_HIP_CENTRE) {
                first = y * t->chunk + (uint32_t)reps[i] % (uint32_t)t->chunk - t->chunk / 2;
                first = attni_max64(first, 0) / t[1].chunk;
            }
            admitted[1 + to] = (int32_t)first;
            if (t[1].flags & ATTN_HIP_KEEP_SCORES) admitted[1 + most + to] = (int32_t)x;
        }
        if (i < n && !last && t[1].flags & ATTN_HIP_CENTRE) reps[i] = 0;
        if (mine && last) {
            const int64_t id = a.f.hip.sink / a.f.kv_block + y;
            mine = id * a.f.kv_block <= b.last && to < a.x.row_capacity;
            if (mine) a.x.block[base + to] = (int32_t)id;
        }
        kept += mine;
        if (i < n) key[i] = 0; // for the next stage
    }
    attni_cu_count_before(kept, &all);
    if (threadIdx.x) return;
    const int64_t read = (int64_t)there * attni_cu_hip3_reads(*t) +
                         (stage == b.from ? 0 : a.x.visited[at]);
    a.x.visited[at] = (int32_t)attni_min64(read, INT32_MAX);
    if (!last) {
        admitted[0] = (int32_t)all;
        return;
    }
    a.x.row_start[at] = base;
    a.x.row_end[at] = base + all;
    if (row < a.f.n_slots) b.state[0] = (int32_t)b.p_min + 1;
}

// ---- landmarks

enum { ATTNI_CU_MARKS = 128 }; // keys of a block of threads, of one KV head

// A thread has dimensions 256 apart: their sums over the queries that the key at hand counts.
static __global__ void __launch_bounds__(256)
    attni_cu_landmarks(const __grid_constant__ attni_cu_pick a, float *out) {
    enum { OWN = (ATTN_MAX_HEAD_DIM + 255) / 256 };
    __shared__ float part[8];
    const int32_t kv_head = (int32_t)blockIdx.y, n_seq = a.header->n_seq, dim = a.d.head_dim;
    const int32_t pt = a.d.kv.page_tokens;
    const int tid = (int)threadIdx.x;
    const attn_plan_seq last = a.seq[n_seq - 1];
    int64_t t = (int64_t)blockIdx.x * ATTNI_CU_MARKS;
    const int64_t end = attni_min64(t + ATTNI_CU_MARKS, (int64_t)last.q_begin + last.q_len);
    while (t < end) {
        int32_t s = 0, high = n_seq - 1; // the last sequence that begins at t or before
        while (s < high) {
            const int32_t mid = (s + high + 1) / 2;
            if (a.seq[mid].q_begin <= t) s = mid;
            else high = mid - 1;
        }
        const attn_plan_seq q = a.seq[s];
        const int64_t q_end = (int64_t)q.q_begin + q.q_len, stop = attni_min64(end, q_end);
        const uint8_t *row = attni_cu_query_at(a, 0, kv_head * a.group);
        const int64_t to_head = attni_cu_query_at(a, 0, 1) - attni_cu_query_at(a, 0, 0);
        const int64_t to_token = attni_cu_query_at(a, 1, 0) - attni_cu_query_at(a, 0, 0);
        double sum[OWN] = {0};
        for (int64_t in = t; t < stop; in++) { // queries come in until the key at t has all of its
            for (int32_t h = 0; h < a.group; h++)
                for (int i = 0; i < OWN; i++)
                    if (tid + 256 * i < dim && in < q_end)
                        sum[i] += (double)attni_cu_value_at(row + in * to_token + h * to_head,
                                                            a.d.q.dtype, tid + 256 * i);
            if (in < attni_min64(t + 511, q_end - 1)) continue;
            const int64_t j = (int64_t)q.q_pos0 + t - q.q_begin - q.kv_pos0;
            float scale = 0, x = 0;
            const uint8_t *key = j < 0 || j >= q.kv_len
                                     ? NULL
                                     : attni_cu_token_at(a, s, kv_head, (int32_t)j, &scale);
            for (int i = 0; i < OWN && key; i++)
                if (tid + 256 * i < dim)
                    x += attni_cu_value_at(key, a.k.dtype, tid + 256 * i) * (float)sum[i];
            for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
            __syncthreads();
            if (tid % 32 == 0) part[tid / 32] = x;
            __syncthreads();
            if (tid == 0 && key) {
                const float n = (float)(attni_min64(512, q_end - t) * a.group);
                const int32_t page = (int32_t)j / pt, *table = a.d.kv.page_table;
                const int64_t id = table ? table[s * a.d.kv.page_table_stride + page] : s;
                for (int i = 1; i < 8; i++) x += part[i];
                out[(id * a.d.n_kv_heads + kv_head) * pt + ((int32_t)j - page * pt)] =
                    x * scale / n;
            }
            for (int32_t h = 0; h < a.group; h++) // the query of the key goes
                for (int i = 0; i < OWN; i++)
                    if (tid + 256 * i < dim)
                        sum[i] -= (double)attni_cu_value_at(row + t * to_token + h * to_head,
                                                            a.d.q.dtype, tid + 256 * i);
            t++;
        }
    }
}

// ==== >>impl-select-exact  The blocks that matter most ===========================================
//
// Every key is scored: first those of the blocks always kept (Z of each query row), then those of
// the competing ones, whose values are the largest over rows of M - Z. Logarithms are of base 2.
// A block of threads has 128 rows (queries x heads of a KV head) of a list row and a slice of the
// blocks. Once the list is there, what it holds of the rows' mass bounds what it misses.
//
// On tensor cores the mass of a competing block is summed relative to Z, without a maximum of its
// own. What that does not hold (a mass beyond 2^-100 .. 2^100 of Z, NaN, a softcap) is left to the
// careful pass behind, which does the whole slice again.

// In attni_cu_pick.at: values of blocks; of each slice, its rows' Z and masses; is it left?
enum { ATTNI_CU_EXACT_KEYS, ATTNI_CU_EXACT_ROWS, ATTNI_CU_EXACT_LEFT };

typedef struct attni_cu_exact_mass { // of a row, relative to Z: 1
    float z, all, held;              // what competes in the slice; what of it is listed
} attni_cu_exact_mass;

typedef struct attni_cu_exact_row {
    int32_t seq, list, kv_head, head, heads; // the last three: of a tile
    int32_t pos, n_q;                        // queries of the row block
    int32_t first, always, last, n;          // n blocks behind `first` compete
    int64_t token, end;
} attni_cu_exact_row;

// 0: nobody's, or it sees no key.
ATTNI_DEV int attni_cu_exact_find(const attni_cu_pick &a, int32_t row, int32_t list, int32_t set,
                                  attni_cu_exact_row *x) {
    const attni_cu_row_of w = a.row_of[row];
    if (w.seq < 0) return 0;
    const attn_plan_seq q = a.seq[w.seq];
    const int64_t from = (int64_t)w.block * a.f.row_block, b = a.f.kv_block;
    const int each = a.f.heads == ATTN_SELECT_EACH;
    const int64_t p1 = attni_min64(from + a.f.row_block, (int64_t)q.q_pos0 + q.q_len) - 1;
    x->seq = w.seq;
    x->list = list;
    x->kv_head = each ? list / a.group : a.f.heads == ATTN_SELECT_ALL ? set : list;
    x->head = each ? list : x->kv_head * a.group;
    x->heads = each ? 1 : a.group;
    x->pos = (int32_t)attni_max64(from, q.q_pos0);
    x->n_q = (int32_t)(p1 - x->pos) + 1;
    x->token = (int64_t)q.q_begin + x->pos - q.q_pos0;
    x->end = (int64_t)q.kv_pos0 + q.kv_len;
    x->first = (int32_t)(q.kv_pos0 / b);
    x->last = (int32_t)(attni_min64(p1, x->end - 1) / b);
    x->always = (int32_t)(attni_max64(from - a.f.exact.recent, 0) / b);
    x->always = attni_max32(x->always, x->first);
    x->n = attni_max32(0, attni_min32(x->always - 1, x->last) - x->first);
    return q.kv_len > 0 && p1 >= q.kv_pos0;
}

// How many of the competing blocks are listed.
ATTNI_DEV int32_t attni_cu_exact_want(const attni_cu_pick &a, const attni_cu_exact_row &x) {
    const attn_exact *e = &a.f.exact;
    const int32_t visible = x.last - x.first + 1, always = visible - x.n;
    const double share = ((double)e->share - 1e-6) * (double)visible;
    int64_t n = attni_n_blocks(e->keep, a.f.kv_block);
    if (a.seq[x.seq].kv_len <= a.f.dense_below || (!e->keep && !(e->share > 0))) return x.n;
    if (share > 0) n = attni_max64(n, (int64_t)ceil(share));
    return (int32_t)attni_max64(0, attni_min64(x.n, n - always));
}

// The i-th block of a walk: 0: always kept; 1: competing; 2: listed.
ATTNI_DEV int32_t attni_cu_exact_block(const attni_cu_pick &a, const attni_cu_exact_row &x,
                                       int32_t row, int walk, int32_t i) {
    const int apart = x.first < x.always;
    if (walk == 0) return apart && !i ? x.first : x.always + i - apart;
    if (walk == 1) return x.first + 1 + i;
    return a.x.block[((int64_t)x.list * a.x.max_rows + row) * a.x.row_capacity + i];
}

// Of one block, for the lane's two rows: maximum and sum of what is below it, over the quad. All
// threads of the block call.
ATTNI_DEV void attni_cu_exact_block_mass(const attni_cu_pick &a, const attni_cu_exact_row &x,
                                   const attn_plan_seq &q, int32_t r0, int32_t block,
                                   const uint8_t *const *q_row, attni_cu_keys *keys, uint8_t *smem,
                                   float m[2], float l[2]) {
    const int tid = (int)threadIdx.x, lane = tid & 31, row0 = (tid >> 5) * 16 + (lane >> 2);
    const int64_t b = a.f.kv_block, k0 = block * b;
    uint8_t *k_tile = smem + ATTNI_CU_PICK_ROWS * a.row_bytes;
    m[0] = m[1] = ATTNI_NINF, l[0] = l[1] = 0;
    for (int64_t at = 0; at < b && k0 + at < x.end; at += ATTNI_CU_PICK_KEYS) {
        float acc[1][8][4], most[2] = {ATTNI_NINF, ATTNI_NINF};
        __syncthreads();
        if (tid < ATTNI_CU_PICK_KEYS)
            attni_cu_find_key(a, q, x.seq, x.kv_head, at + tid < b ? k0 + at + tid : -1, keys, 0,
                              tid);
        __syncthreads();
        if (a.mode) {
            attni_cu_copy_rows(a, keys->row[0], ATTNI_CU_PICK_KEYS, a.k.dtype, a.odd_k,
                               attni_smem(k_tile));
            attni_cp_commit();
            attni_cp_wait<0>();
            __syncthreads();
        }
        attni_cu_products<1>(a, acc, smem, ATTNI_CU_PICK_ROWS, attni_smem(k_tile), q_row,
                             keys->row[0]);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = 8 * j + 2 * (lane & 3) + (i & 1);
                const int32_t r = r0 + row0 + 8 * (i >> 1);
                const int seen = r < x.n_q * x.heads && keys->row[0][c] &&
                                 k0 + at + c <= (int64_t)x.pos + r / x.heads;
                const float s = attni_cu_score(a, acc[0][j][i], keys->scale[0][c]) * ATTNI_LOG2E;
                acc[0][j][i] = seen ? s : ATTNI_NINF;
                most[i >> 1] = fmaxf(most[i >> 1], acc[0][j][i]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (most[h] > m[h]) l[h] *= attni_exp2(m[h] - most[h]), m[h] = most[h];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(acc[0][j][i] == ATTNI_NINF))
                    l[i >> 1] += attni_exp2(acc[0][j][i] - m[i >> 1]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float most = attni_quad_max(m[h]);
        l[h] = attni_quad_sum(m[h] > ATTNI_NINF || l[h] != l[h] ? l[h] * attni_exp2(m[h] - most)
                                                                : 0);
        m[h] = most;
    }
}

typedef struct attni_cu_exact_task { // a slice of a list row's blocks for up to 128 of its rows
    attni_cu_exact_row x;
    attn_plan_seq q;
    int32_t row, r0, n_rows;   // list row; the first query row, and how many
    int32_t always, i0, i1;    // blocks always kept; of those that compete or are listed
    uint32_t *value;           // of the competing blocks, from x.first on
    attni_cu_exact_mass *mass; // (128)
    int32_t *left;
} attni_cu_exact_task;

typedef struct attni_cu_exact_grid { // rows x (lists x tiles) x slices
    int32_t tiles, tiles_kv, slices; // tiles of a list's KV heads, of one KV head
} attni_cu_exact_grid;

// Pass 0: values, Z and masses of what competes; 1: masses of what is listed. 0: nothing to do.
ATTNI_DEV int attni_cu_exact_begin(const attni_cu_pick &a, int pass, attni_cu_exact_grid g,
                                   attni_cu_exact_task *t) {
    const int32_t list = (int32_t)blockIdx.y / g.tiles, tile = (int32_t)blockIdx.y % g.tiles;
    const int32_t slice = (int32_t)blockIdx.z;
    const int32_t row = t->row = a.x.max_rows - 1 - (int32_t)blockIdx.x; // the longest first
    t->r0 = tile % g.tiles_kv * ATTNI_CU_PICK_ROWS;
    if (!attni_cu_exact_find(a, row, list, tile / g.tiles_kv, &t->x)) return 0;
    t->n_rows = attni_min32(t->x.n_q * t->x.heads - t->r0, ATTNI_CU_PICK_ROWS);
    if (t->n_rows < 1 || attni_cu_exact_want(a, t->x) == t->x.n) return 0; // every block
    const int64_t of = (int64_t)row * a.x.n_lists + list;
    const int64_t part = (of * g.tiles + tile) * g.slices + slice;
    const int64_t at = list * ((int64_t)a.x.max_rows + 1) + row;
    const int32_t n = pass ? (int32_t)(a.x.row_end[at] - a.x.row_start[at]) : t->x.n;
    const int32_t per = (n + g.slices - 1) / g.slices;
    t->q = a.seq[t->x.seq];
    t->always = pass ? 0 : (t->x.first < t->x.always) + t->x.last - t->x.always + 1;
    t->i0 = attni_min32(n, slice * per);
    t->i1 = attni_min32(n, t->i0 + per);
    t->value = (uint32_t *)(void *)(a.work + a.at[ATTNI_CU_EXACT_KEYS]) + of * a.kv_cap;
    t->mass = (attni_cu_exact_mass *)(void *)(a.work + a.at[ATTNI_CU_EXACT_ROWS]) +
              part * ATTNI_CU_PICK_ROWS;
    t->left = (int32_t *)(void *)(a.work + a.at[ATTNI_CU_EXACT_LEFT]) + part;
    return 1;
}

// Where row r of Q lies.
ATTNI_DEV const uint8_t *attni_cu_exact_query(const attni_cu_pick &a, const attni_cu_exact_task &t,
                                              int r) {
    const int32_t at = t.r0 + r;
    return r >= t.n_rows ? NULL
                         : attni_cu_query_at(a, t.x.token + at / t.x.heads,
                                             t.x.head + at % t.x.heads);
}

// The careful pass. all: every slice; else what is left.
static __global__ void __launch_bounds__(ATTNI_CU_PICK, 2)
    attni_cu_exact_scan(const __grid_constant__ attni_cu_pick a, int pass, attni_cu_exact_grid g,
                        int all) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_keys keys;
    __shared__ const uint8_t *q_row[ATTNI_CU_PICK_ROWS];
    const int tid = (int)threadIdx.x, lane = tid & 31, row0 = (tid >> 5) * 16 + (lane >> 2);
    attni_cu_exact_task t;
    if (!attni_cu_exact_begin(a, pass, g, &t) || (!all && !*t.left)) return;
    const attni_cu_exact_row &x = t.x;
    float zm[2] = {ATTNI_NINF, ATTNI_NINF}, zl[2] = {0, 0}, z[2], sum[2] = {0, 0}, m[2], l[2];
    if (tid < ATTNI_CU_PICK_ROWS) q_row[tid] = attni_cu_exact_query(a, t, tid);
    __syncthreads();
    if (a.mode)
        attni_cu_copy_rows(a, q_row, ATTNI_CU_PICK_ROWS, a.d.q.dtype, a.odd_q, attni_smem(smem));
    for (int32_t i = 0; i < t.always; i++) {
        attni_cu_exact_block_mass(a, x, t.q, t.r0, attni_cu_exact_block(a, x, t.row, 0, i), q_row,
                                  &keys, smem, m, l);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float most = fmaxf(zm[h], m[h]);
            if (!(most > ATTNI_NINF) && l[h] == l[h]) continue;
            zl[h] = zl[h] * attni_exp2(zm[h] - most) + l[h] * attni_exp2(m[h] - most);
            zm[h] = most;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        z[h] = zm[h] + log2f(zl[h]); // -inf: sees none of them
        if (pass) z[h] = row0 + 8 * h < t.n_rows ? t.mass[row0 + 8 * h].z : 0;
    }
    for (int32_t i = t.i0; i < t.i1; i++) {
        const int32_t b = attni_cu_exact_block(a, x, t.row, 1 + pass, i);
        if (pass && (b <= x.first || b >= x.always)) continue;
        attni_cu_exact_block_mass(a, x, t.q, t.r0, b, q_row, &keys, smem, m, l);
        float best = ATTNI_NINF;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float v = m[h] + log2f(l[h]) - z[h];
            if (!(l[h] == l[h])) v = __int_as_float(0x7f800000);
            else if (z[h] != z[h] || !(m[h] > ATTNI_NINF)) v = ATTNI_NINF;
            else if (z[h] == ATTNI_NINF) v = __int_as_float(0x7f800000);
            best = fmaxf(best, v);
            sum[h] += exp2f(v);
        }
        for (int j = 4; !pass && j < 32; j *= 2)
            best = fmaxf(best, __shfl_xor_sync(~0u, best, j));
        if (!pass && lane == 0 && b - x.first < a.kv_cap)
            atomicMax(t.value + (b - x.first), attni_cu_order(best * ATTNI_LN2));
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row0 + 8 * h;
        if ((lane & 3) || r >= t.n_rows) continue;
        if (pass) t.mass[r].held = sum[h];
        else t.mass[r].z = z[h], t.mass[r].all = sum[h];
    }
}

// One walk over the tiles of 64 keys of the blocks always kept and of the slice's. A warp has 32
// rows, a lane 4 of them: lane / 4 + 8 g; so there are as many rows as threads. Shared memory: Q,
// two tiles of keys.
static __global__ void __launch_bounds__(128, 3)
    attni_cu_exact_tiles(const __grid_constant__ attni_cu_pick a, int pass,
                         attni_cu_exact_grid grid) {
    extern __shared__ __align__(256) uint8_t smem[];
    __shared__ attni_cu_keys keys;
    __shared__ const uint8_t *q_row[ATTNI_CU_PICK_ROWS];
    const int tid = (int)threadIdx.x, lane = tid & 31;
    const int row0 = (tid & ~31) + (lane >> 2), idle = (tid & ~31);
    const uint32_t q_tile = attni_smem(smem);
    const uint32_t k_tile = q_tile + blockDim.x * (uint32_t)a.row_bytes;
    const uint32_t k_bytes = (uint32_t)(ATTNI_CU_PICK_KEYS * a.row_bytes);
    const int32_t b = a.f.kv_block;
    attni_cu_exact_task t;
    if (!attni_cu_exact_begin(a, pass, grid, &t)) return;
    const int32_t n = t.always + t.i1 - t.i0; // blocks of the walk
    const int32_t end = (int32_t)t.x.end;
    const int scaled = attni_is_scaled(a.k.dtype);
    const float f = scaled ? ATTNI_LOG2E : a.scale * ATTNI_LOG2E;
    float z[4], l[4] = {0, 0, 0, 0}, sum[4] = {0, 0, 0, 0};
    int left = 0;
#pragma unroll
    for (int g = 0; g < 4; g++) {
        z[g] = ATTNI_NINF;
        if (pass) z[g] = row0 + 8 * g < t.n_rows ? t.mass[row0 + 8 * g].z : 0;
    }
    struct place { // of a tile: block of the walk, key of the block it begins with, place in memory
        int32_t i, at, slot;
    } now = {0, 0, 0}, next = now, found = now;
    const auto step = [&](place *x) {
        x->at += ATTNI_CU_PICK_KEYS;
        if (x->at >= b) x->at = 0, x->i++;
        x->slot = (x->slot + 1) & 3;
    };
    const auto block = [&](int32_t i) {
        return i < t.always ? attni_cu_exact_block(a, t.x, t.row, 0, i)
                            : attni_cu_exact_block(a, t.x, t.row, 1 + pass, t.i0 + i - t.always);
    };
    // keys are looked up while another tile is scored: their page first, their address later
    int32_t page[2];
    int32_t place = 0; // of the tile, in what is held
    int held[2];
    const auto look = [&]() {
        place = found.i < n ? block(found.i) * b + found.at - t.q.kv_pos0 : 0;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int c = tid + k * (int)blockDim.x;
            held[k] = found.i < n && c < ATTNI_CU_PICK_KEYS && found.at + c < b &&
                      place + c >= 0 && place + c < t.q.kv_len;
            page[k] = held[k] ? attni_cu_page_of(a, t.x.seq, place + c) : 0;
        }
    };
    const auto settle = [&]() {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int c = tid + k * (int)blockDim.x;
            float scale = 0;
            if (c >= ATTNI_CU_PICK_KEYS) continue;
            keys.row[found.slot][c] = !held[k] ? NULL
                                               : attni_cu_token_in(a, page[k], t.x.kv_head,
                                                                   place + c, &scale);
            keys.scale[found.slot][c] = scale;
        }
        step(&found);
        look();
    };
    const auto copy = [&]() {
        if (next.i < n)
            attni_cu_copy_rows(a, keys.row[next.slot], ATTNI_CU_PICK_KEYS, a.k.dtype, a.odd_k,
                               k_tile + (uint32_t)(next.slot & 1) * k_bytes);
        attni_cp_commit();
        step(&next);
    };
    q_row[tid] = attni_cu_exact_query(a, t, tid);
    look();
    settle();
    settle();
    __syncthreads();
    attni_cu_copy_rows(a, q_row, (int)blockDim.x, a.d.q.dtype, a.odd_q, q_tile);
    copy();
    for (; now.i < n; step(&now)) {
        const int32_t id = block(now.i), at = now.at;
        const int first = now.i < t.always, slot = now.slot;
        const int32_t k0 = id * b + at; // the tile's first key; what it holds of the block
        const int cols = pass && (id <= t.x.first || id >= t.x.always)
                             ? 0 : attni_max32(0, attni_min32(attni_min32(b - at, end - k0),
                                                              ATTNI_CU_PICK_KEYS));
        float acc[2][8][4];
        attni_cp_wait<0>();
        __syncthreads();
        copy();
        settle();
        if (cols && idle < t.n_rows) {
#pragma unroll
            for (int j = 0; j < 64; j++) acc[j >> 5][j >> 2 & 7][j & 3] = 0;
            const uint32_t k = k_tile + (uint32_t)(slot & 1) * k_bytes;
            const uint32_t q = q_tile + (uint32_t)idle * (uint32_t)a.row_bytes;
            const uint32_t apart = 16 * (uint32_t)a.row_bytes;
            if (a.mode == 1) attni_cu_mma_tile<1, 2>(a, acc, q, apart, k);
            else attni_cu_mma_tile<0, 2>(a, acc, q, apart, k);
            if (first) {
#pragma unroll
                for (int g = 0; g < 4; g++) { // rows, each with a maximum of its own
                    const int32_t r = t.r0 + row0 + 8 * g;
                    const int32_t last = t.x.pos + r / t.x.heads - k0;
                    float most = z[g];
#pragma unroll
                    for (int j = 0; j < 16; j++) {
                        const int c = 8 * (j >> 1) + 2 * (lane & 3) + (j & 1);
                        float *s = &acc[g >> 1][j >> 1][(g & 1) * 2 + (j & 1)];
                        *s = c < cols && c <= last && keys.row[slot][c]
                                 ? *s * keys.scale[slot][c] * ATTNI_LOG2E : ATTNI_NINF;
                        most = fmaxf(most, *s);
                    }
                    if (most > ATTNI_NINF) l[g] *= attni_exp2(z[g] - most);
                    z[g] = most;
#pragma unroll
                    for (int j = 0; j < 16; j++) {
                        const float s = acc[g >> 1][j >> 1][(g & 1) * 2 + (j & 1)];
                        if (!(s == ATTNI_NINF)) l[g] += attni_exp2(s - most);
                    }
                }
            } else {
                if (scaled)
#pragma unroll
                    for (int j = 0; j < 64; j++)
                        acc[j >> 5][j >> 2 & 7][j & 3] *=
                            keys.scale[slot][8 * (j >> 2 & 7) + 2 * (lane & 3) + (j & 1)];
                if (cols < ATTNI_CU_PICK_KEYS)
#pragma unroll
                    for (int j = 0; j < 64; j++)
                        if (8 * (j >> 2 & 7) + 2 * (lane & 3) + (j & 1) >= cols)
                            acc[j >> 5][j >> 2 & 7][j & 3] = f < 0 ? -ATTNI_NINF : ATTNI_NINF;
#pragma unroll
                for (int j = 0; j < 64; j++) {
                    const int g = (j & 1) + 2 * (j >> 5);
                    l[g] += attni_exp2(
                        __fmaf_rn(acc[g >> 1][j >> 2 & 7][(j & 1) * 2 + (j >> 1 & 1)], f, -z[g]));
                }
            }
        }
        if (at + ATTNI_CU_PICK_KEYS >= b && idle < t.n_rows) { // the block is done
            float best = 0;
            int odd = 0;
#pragma unroll
            for (int g = 0; g < 4 && !first; g++) {
                const float mass = attni_quad_sum(l[g]);
                if (row0 + 8 * g < t.n_rows) best = fmaxf(best, mass), odd |= mass != mass;
                sum[g] += mass;
                l[g] = 0;
            }
            for (int j = 4; j < 32; j *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, j));
            if (!first && cols) {
                left |= odd || !(best > 7.9e-31f && best < 1.2e30f);
                if (!pass && lane == 0 && id - t.x.first < a.kv_cap && !left)
                    atomicMax(t.value + (id - t.x.first), attni_cu_order(log2f(best) * ATTNI_LN2));
            }
#pragma unroll
            for (int g = 0; g < 4 && first && now.i + 1 == t.always; g++) { // Z
                const float most = attni_quad_max(z[g]);
                const float mass = attni_quad_sum(z[g] > ATTNI_NINF || l[g] != l[g]
                                                      ? l[g] * attni_exp2(z[g] - most) : 0);
                z[g] = most + log2f(mass);
                l[g] = 0;
            }
        }
    }
    attni_cp_wait<0>();
    left = __syncthreads_or(left);
    if (tid == 0) *t.left = left;
#pragma unroll
    for (int g = 0; g < 4; g++) {
        const int r = row0 + 8 * g;
        if ((lane & 3) || r >= t.n_rows) continue;
        if (pass) t.mass[r].held = sum[g];
        else t.mass[r].z = z[g], t.mass[r].all = sum[g];
    }
}

// What the lists miss of a tile's rows at most.
static __global__ void __launch_bounds__(ATTNI_CU_PICK_ROWS)
    attni_cu_exact_missed(const __grid_constant__ attni_cu_pick a, attni_cu_exact_grid g) {
    const int list = (int)blockIdx.y / g.tiles, r = (int)threadIdx.x;
    attni_cu_exact_task t;
    float all = 0, held = 0, missed;
    if (!attni_cu_exact_begin(a, 0, g, &t) || r >= t.n_rows) return;
    for (int i = r; i < g.slices * ATTNI_CU_PICK_ROWS; i += ATTNI_CU_PICK_ROWS)
        all += t.mass[i].all, held += t.mass[i].held;
    missed = (all - held) / (1 + all);
    missed = (missed < 0 ? 0 : missed) * 1.001f + 1e-4f; // and what rounding may have done
    if (!(missed < 1)) missed = 1;
    atomicMax((int *)(void *)(a.x.missed + list * ((int64_t)a.x.max_rows + 1) + t.row),
              __float_as_int(missed));
}

// A list row. Shared memory: bits.
static __global__ void __launch_bounds__(256)
    attni_cu_exact_pick(const __grid_constant__ attni_cu_pick a) {
    extern __shared__ __align__(256) uint8_t smem[];
    uint32_t *bits = (uint32_t *)(void *)smem, done = 0, counted, cut = 0;
    const int32_t row = (int32_t)blockIdx.x, list = (int32_t)blockIdx.y;
    const int64_t at = list * ((int64_t)a.x.max_rows + 1) + row;
    attni_cu_exact_row x;
    if (a.row_of[row].seq < 0) return;
    const int sees = attni_cu_exact_find(a, row, list, 0, &x);
    const int32_t want = sees ? attni_cu_exact_want(a, x) : 0, n = sees ? x.n : 0;
    const uint32_t *value = (const uint32_t *)(const void *)(a.work + a.at[ATTNI_CU_EXACT_KEYS]) +
                            ((int64_t)row * a.x.n_lists + list) * a.kv_cap;
    int ties = 0;
    const int32_t all = sees ? x.last - x.first + 1 : 0; // bit 0: x.first
    for (int i = (int)threadIdx.x; 32 * i < all; i += 256) bits[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < all; i += 256)
        if (i == 0 || x.first + i >= x.always || want == n)
            atomicOr(bits + (i >> 5), 1u << (i & 31));
    if (want > 0 && want < n) {
        cut = attni_cu_kth(value + 1, n, want, &ties);
        for (int i0 = 0; i0 < n; i0 += 256) {
            const int i = i0 + (int)threadIdx.x;
            const uint32_t v = i < n ? value[1 + i] : 0;
            const uint32_t before = done + attni_cu_count_before(i < n && v == cut, &counted);
            done += counted;
            if (i < n && (v > cut || (v == cut && (int)before < ties)))
                atomicOr(bits + ((1 + i) >> 5), 1u << ((1 + i) & 31));
        }
    }
    __syncthreads();
    const int64_t read = attni_min64(x.end, ((int64_t)x.last + 1) * a.f.kv_block);
    if (threadIdx.x < 32)
        attni_cu_emit(a, list, row, bits, x.first, all,
                      want < n ? (int32_t)read - a.seq[x.seq].kv_pos0 : 0);
    if (threadIdx.x == 0) a.x.missed[at] = 0;
}

// ==== >>impl-select-host  Selectors: workspace, launches =========================================

#define ATTNI_AT(type, section) ((const type *)(const void *)(m + g->at[section]))

// The end of d's longest sequence.
static int64_t attni_cu_kv_end(const attn_desc *d, const attn_select *f) {
    int64_t end = f->max_kv_len;
    for (int32_t s = 0; s < d->n_seq; s++)
        end = attni_max64(end, (int64_t)attni_kv_pos0(d, s) + d->kv.kv_len[s]);
    return attni_max64(end, 1);
}

// How queries and keys are multiplied, and what fits in shared memory then.
static void attni_cu_pick_mode(const attn_cuda *c, const attn_desc *d, int extra_bytes,
                               attni_cu_pick *a) {
    const attn_dtype q = d->q.dtype, k = d->kv.k.dtype;
    a->wide = (d->head_dim + 15) / 16 * 16;
    a->row_bytes = 2 * a->wide + 16;
    a->per = a->wide / 8;
    for (a->per_shift = 0; 1 << a->per_shift < a->per;) a->per_shift++;
    if (1 << a->per_shift != a->per) a->per_shift = -1;
    a->tile_bytes = (ATTNI_CU_PICK_ROWS + 2 * ATTNI_CU_PICK_KEYS) * a->row_bytes;
    a->mode = q == ATTN_BF16 && c->arch >= 80 ? 1 : q == ATTN_F16 ? 2 : 0;
    if (k != q && !attni_is_scaled(k)) a->mode = 0;
    if (a->tile_bytes + extra_bytes + 4096 > c->smem_bytes) a->mode = 0;
    if (!a->mode)
        a->tile_bytes = (ATTNI_CU_PICK_ROWS + ATTNI_CU_PICK_KEYS) * 17 * 4;
    a->odd_k = attni_cu_odd_side(&a->k);
    a->odd_q = attni_cu_misaligned((int64_t)(uintptr_t)d->q.data, 2 * d->q.stride_token,
                                   2 * d->q.stride_head, 16);
}

static int64_t attni_cu_up256(int64_t x) { return (x + 255) & ~(int64_t)255; }

// FLEX: sections of a head's and a sequence's workspace.
static void attni_cu_flex_layout(const attn_desc *d, int64_t kv_end, attni_cu_pick *a) {
    const int64_t b = a->f.kv_block, coded = a->f.flex.compatible, aware = a->f.flex.tau > 0;
    int64_t size[ATTNI_CU_FLEX_MEAN], at = 0;
    a->n_blocks = (int32_t)attni_n_blocks(kv_end, b);
    a->n_chunks = (int32_t)(attni_n_blocks(kv_end, ATTNI_CU_CHUNK) + 1);
    a->kv_cap = (int64_t)a->n_chunks * ATTNI_CU_CHUNK;
    size[ATTNI_CU_FLEX_CELLS] = b * a->n_blocks * 16;
    size[ATTNI_CU_FLEX_NORM] = b * 8;
    size[ATTNI_CU_FLEX_BLOCKS] = ATTNI_CU_ARRAYS * (int64_t)a->n_blocks * 4;
    size[ATTNI_CU_FLEX_BITS] = 2 * (((int64_t)a->n_blocks + 31) / 32) * 4;
    size[ATTNI_CU_FLEX_CHOICE] = (int64_t)sizeof(attni_cu_flex_choice);
    size[ATTNI_CU_FLEX_V] = coded * a->kv_cap * 4;
    size[ATTNI_CU_FLEX_DIAG] = coded * a->n_chunks * (b + 1023) * 4;
    size[ATTNI_CU_FLEX_TOKENS] = coded * a->kv_cap * 4;
    size[ATTNI_CU_FLEX_MAP] = coded && aware ? (int64_t)a->n_blocks * a->n_blocks * 4 : 0;
    for (int i = 0; i < ATTNI_CU_FLEX_MEAN; i++) {
        a->at[i] = at;
        at += attni_cu_up256(size[i]);
    }
    a->head_bytes = at;
    a->at[ATTNI_CU_FLEX_MEAN] = d->n_heads * at;
    a->est_bytes = d->n_heads * at +
                   attni_cu_up256(aware * d->n_kv_heads * (int64_t)a->n_blocks * d->head_dim * 4);
}

// HIP3: the most candidates of a stage of sequences that hold so many tokens; per list row scores
// of candidates and what it remembers. 0: does not fit in `bytes` (-1: any).
static int64_t attni_cu_hip_layout(int64_t tokens, int64_t rows, int64_t bytes, attni_cu_pick *a) {
    const attn_hip *h = &a->f.hip;
    const int64_t state = attni_cu_up256(rows * attni_state_bytes(&a->f));
    int64_t most = tokens / h->stage[0].chunk + 2, each = 4; // bytes of a candidate
    if (a->f.kind != ATTN_SELECT_HIP3) return 0;
    for (int i = 1; i < h->n_stages; i++)
        most = attni_max64(most, (int64_t)h->stage[i].keep / h->stage[i].chunk);
    for (int i = 1; i < h->n_stages; i++)
        if (h->stage[i].flags & ATTN_HIP_CENTRE) each = 12;
    if (bytes >= 0)
        most = attni_min64(most, attni_max64(bytes - state - 512, 0) / (each * rows));
    a->kv_cap = most;
    a->at[ATTNI_CU_HIP_KEYS] = 0;
    a->at[ATTNI_CU_HIP_REPS] = attni_cu_up256(4 * rows * most);
    a->at[ATTNI_CU_HIP_STATE] =
        a->at[ATTNI_CU_HIP_REPS] + attni_cu_up256((each - 4) * rows * most);
    return most ? a->at[ATTNI_CU_HIP_STATE] + state + 512 : 0;
}

// EXACT: tiles of 128 query rows of a list row, those of one KV head, and slices of its blocks.
static attni_cu_exact_grid attni_cu_exact_cut(const attn_cuda *c, const attn_desc *d,
                                              const attn_select *f, int64_t rows) {
    const int32_t heads = f->heads == ATTN_SELECT_EACH ? 1 : d->n_heads / d->n_kv_heads;
    attni_cu_exact_grid g;
    g.tiles_kv = (int32_t)attni_n_blocks((int64_t)f->row_block * heads, ATTNI_CU_PICK_ROWS);
    g.tiles = g.tiles_kv * (f->heads == ATTN_SELECT_ALL ? d->n_kv_heads : 1);
    for (g.slices = 1; g.slices < 128 && rows * g.tiles * g.slices < 8 * (int64_t)c->n_sm;)
        g.slices *= 2;
    return g;
}

// HIP1, HIP2: what queries that score there are at most; bytes that a list row takes for what is
// computed of all blocks.
static int32_t attni_cu_hip_scorers_of(const attn_select *f) {
    return (int32_t)attni_n_blocks((int64_t)f->row_block * f->hip.q_group, f->hip.q_stride);
}
static int64_t attni_cu_hip_row_extra(const attn_desc *d, const attn_select *f, int64_t blocks,
                                      int64_t size[3]) {
    const attn_hip *h = &f->hip;
    memset(size, 0, 3 * sizeof *size);
    if (attni_cu_hip_oracle(*f)) size[0] = 4 * attni_select_lists(d, f) * blocks;
    if (h->vertical || h->diagonal) size[1] = 4 * attni_select_lists(d, f) * blocks;
    if (h->low_dim && h->low_dim < d->head_dim)
        size[2] = (int64_t)d->n_heads * attni_cu_hip_scorers_of(f) * d->head_dim *
                  (d->q.dtype == ATTN_F32 ? 4 : 2);
    return size[0] + size[1] + size[2];
}

// As attni_cu_hip_layout, but list rows may be done some at a time: a->at_once, 0: not even one.
static int64_t attni_cu_hip2_layout(const attn_desc *d, int64_t tokens, int64_t rows, int64_t bytes,
                                    attni_cu_pick *a) {
    const int64_t room = attni_max64(bytes - 3 * 256, 0);
    int64_t size[3], each, at = 0, n = rows;
    if (a->f.kind != ATTN_SELECT_HIP1 && a->f.kind != ATTN_SELECT_HIP2) return 0;
    a->kv_cap = (tokens / a->f.hip.block + 9) & ~(int64_t)7;
    each = attni_cu_hip_row_extra(d, &a->f, a->kv_cap, size);
    if (each && bytes < 0) n = attni_max64(1, ((int64_t)256 << 20) / each); // as are worth it
    if (each && bytes >= 0) n = room / each;
    if (each && bytes >= 0 && n < 1 && room > size[2]) { // one row, of fewer blocks
        const int64_t block = each - size[2] > 0 ? (each - size[2]) / a->kv_cap : room + 1;
        a->kv_cap = (room - size[2]) / block & ~(int64_t)7;
        each = attni_cu_hip_row_extra(d, &a->f, a->kv_cap, size);
        n = a->kv_cap > 0;
    }
    a->at_once = (int32_t)attni_min64(n, rows);
    for (int i = 0; i < 3; i++) {
        a->at[ATTNI_CU_HIP_ALL + i] = size[i] ? at : -1;
        at += attni_cu_up256(a->at_once * size[i]);
    }
    return each ? at + 3 * 256 : 0;
}

// As attni_cu_hip_layout. rows: list rows of all lists.
static int64_t attni_cu_exact_layout(const attn_cuda *c, const attn_desc *d, int64_t tokens,
                                     int64_t rows, int64_t bytes, attni_cu_pick *a) {
    int64_t most = tokens / a->f.kv_block + 2, state, parts;
    attni_cu_exact_grid g;
    if (a->f.kind != ATTN_SELECT_EXACT) return 0;
    g = attni_cu_exact_cut(c, d, &a->f, rows);
    parts = rows * g.tiles * g.slices;
    state = attni_cu_up256(parts * ATTNI_CU_PICK_ROWS * (int64_t)sizeof(attni_cu_exact_mass)) +
            attni_cu_up256(4 * parts);
    if (bytes >= 0)
        most = attni_min64(most, attni_max64((bytes - state) & ~(int64_t)255, 0) / (4 * rows));
    a->kv_cap = most;
    a->at[ATTNI_CU_EXACT_KEYS] = 0;
    a->at[ATTNI_CU_EXACT_ROWS] = attni_cu_up256(4 * rows * most);
    a->at[ATTNI_CU_EXACT_LEFT] = a->at[ATTNI_CU_EXACT_ROWS] + state - attni_cu_up256(4 * parts);
    return most ? a->at[ATTNI_CU_EXACT_ROWS] + state : 0;
}

// Bytes besides those of estimated sequences: whose rows are.
static int64_t attni_cu_pick_fixed(int32_t max_rows, int64_t n_est) {
    return attni_cu_up256(max_rows * (int64_t)sizeof(attni_cu_row_of)) +
           attni_cu_up256(n_est * (int64_t)sizeof(attni_cu_est));
}

static int attni_cu_pick_supports(const attn_select *f) {
    if (f->kind == ATTN_SELECT_FLEX) return f->kv_block <= 4096;
    if (f->kind == ATTN_SELECT_HIP1 || f->kind == ATTN_SELECT_HIP2) return 1;
    if (f->kind == ATTN_SELECT_EXACT) return !(f->exact.epsilon > 0);
    return f->kind == ATTN_SELECT_HIP3;
}

ATTN_DEF size_t attn_cuda_select_bytes(const attn_cuda *c, const attn_desc *d,
                                       const attn_select *s) {
    attni_cu_pick a;
    int64_t n_est = 0, rows;
    memset(&a, 0, sizeof a);
    if (!c || attn_select_check(d, s) != ATTN_OK || !attni_select_fill(s, &a.f)) return 0;
    if (!attni_cu_pick_supports(&a.f)) return 0;
    rows = attni_max32(attn_select_rows(d, s), a.f.max_rows);
    if (a.f.kind == ATTN_SELECT_FLEX) {
        const int64_t b = a.f.kv_block; // whole blocks, as a selection's rows have
        attni_cu_flex_layout(d, attni_n_blocks(attni_cu_kv_end(d, &a.f), b) * b, &a);
        for (int32_t i = 0; i < d->n_seq; i++)
            n_est += d->q_start[i + 1] - d->q_start[i] > 2 * a.f.kv_block;
        n_est = attni_max64(n_est, 1);
    }
    return (size_t)(attni_cu_pick_fixed((int32_t)rows, n_est) + n_est * a.est_bytes +
                    attni_cu_hip_layout(attni_cu_kv_end(d, &a.f),
                                        rows * attni_select_lists(d, &a.f), -1, &a) +
                    attni_cu_hip2_layout(d, attni_cu_kv_end(d, &a.f), rows, -1, &a) +
                    attni_cu_exact_layout(c, d, attni_cu_kv_end(d, &a.f),
                                          rows * attni_select_lists(d, &a.f), -1, &a));
}

template <class... T>
static attn_result attni_cu_pick_launch(void (*kernel)(const attni_cu_pick, T...), dim3 grid,
                                        int threads, int64_t smem, attn_cuda_stream stream,
                                        const attni_cu_pick &a, T... more) {
    if (!grid.x || !grid.y || !grid.z) return ATTN_OK;
    // what kernels have besides counts, too
    if (smem > 32768 && cudaFuncSetAttribute((const void *)kernel,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)smem) != cudaSuccess)
        return ATTN_ERR_UNSUPPORTED;
    kernel<<<grid, (unsigned)threads, (size_t)smem, stream>>>(a, more...);
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

// FLEX: cells, and what they add up to. Grids depend on capacities; cells do not depend on grids.
static attn_result attni_cu_flex_scan(const attn_cuda *c, attni_cu_pick *a, int extra,
                                      attn_cuda_stream stream) {
    const unsigned heads = (unsigned)a->d.n_heads, est = (unsigned)a->n_est;
    const int32_t b = a->f.kv_block;
    const int64_t two = (2 * ATTNI_CU_PICK_ROWS + 2 * ATTNI_CU_PICK_KEYS) * (int64_t)a->row_bytes;
    const int rows = a->mode && two + 9000 > c->smem_bytes ? ATTNI_CU_PICK_ROWS
                                                            : 2 * ATTNI_CU_PICK_ROWS;
    const int64_t tiles = attni_n_blocks((int64_t)a->group * b, rows) * a->d.n_kv_heads;
    const int64_t wave = attni_max64(2 * (int64_t)c->n_sm / tiles, 1);
    const int64_t smem = !a->mode || rows == ATTNI_CU_PICK_ROWS ? a->tile_bytes : two;
    attn_result r;
    if (tiles > 65535) return ATTN_ERR_UNSUPPORTED;
    r = attni_cu_pick_launch(attni_cu_flex_cells,
                             dim3((unsigned)attni_min64(a->n_blocks, wave), (unsigned)tiles, est),
                             ATTNI_CU_PICK, smem, stream, *a, rows);
    if (r == ATTN_OK)
        r = attni_cu_pick_launch(attni_cu_flex_norm, dim3((unsigned)(b + 31) / 32, heads, est),
                                 1024, 0, stream, *a);
    if (r == ATTN_OK)
        r = attni_cu_pick_launch(attni_cu_flex_masses,
                                 dim3((unsigned)(a->n_blocks + 7) / 8, heads, est), 256, 0, stream,
                                 *a);
    if (r == ATTN_OK && a->f.flex.compatible)
        r = attni_cu_pick_launch(attni_cu_flex_tokens, dim3((unsigned)a->n_chunks, heads, est),
                                 ATTNI_CU_PICK, a->tile_bytes + extra, stream, *a);
    if (r == ATTN_OK && a->f.flex.tau > 0)
        r = attni_cu_pick_launch(
            attni_cu_flex_means,
            dim3((unsigned)(a->n_blocks + 3) / 4, (unsigned)a->d.n_kv_heads, est), 128, 0, stream,
            *a);
    return r;
}

static attn_result attni_cu_flex_launch(const attn_cuda *c, const attn_cuda_plan *g,
                                        attni_cu_pick *a, attn_cuda_stream stream) {
    const unsigned heads = (unsigned)a->d.n_heads, est = (unsigned)a->n_est;
    const int32_t b = a->f.kv_block, coded = a->f.flex.compatible;
    const int extra = coded ? 4 * (128 * ATTNI_CU_P + b + 1023) : 0;
    const int64_t words = ((int64_t)a->n_blocks + 31) / 32;
    const int64_t row_bytes = a->f.flex.tau > 0 ? 4 * ((int64_t)a->d.head_dim + a->n_blocks) : 0;
    int rows = ATTNI_CU_FLEX_ROWS;
    attn_result r = ATTN_OK;
    while (rows > 1 && rows * (row_bytes + 4 * words) > c->smem_bytes / 4) rows /= 2;
    if (rows * (row_bytes + 4 * words) > c->smem_bytes - 2048) return ATTN_ERR_UNSUPPORTED;
    if (coded && a->f.flex.tau > 0 && a->n_blocks > 46340) // its map is counted in 32 bits
        return ATTN_ERR_UNSUPPORTED;
    attni_cu_pick_mode(c, &a->d, extra, a);
    if (coded) {
        attn_desc plain = a->d;
        plain.logits.scale = 0;
        a->scale = attni_scale(&plain);
        a->d.logits.softcap = 0;
    }
    if ((!g->max_q_len || g->max_q_len > 2 * b) &&
        (int64_t)a->x.row_capacity * b > a->f.dense_below) { // else every list is full
        r = attni_cu_flex_scan(c, a, extra, stream);
        if (r == ATTN_OK)
            r = attni_cu_pick_launch(attni_cu_flex_choose, dim3(1, heads, est), coded ? 1024 : 512,
                                     0, stream, *a);
        if (r == ATTN_OK && a->f.flex.tau > 0 && coded) {
            r = attni_cu_pick_launch(attni_cu_flex_map,
                                     dim3((unsigned)attni_n_blocks(a->n_blocks, rows), heads, est),
                                     32 * rows, rows * row_bytes, stream, *a, rows);
            if (r == ATTN_OK)
                r = attni_cu_pick_launch(attni_cu_flex_map_cut, dim3(1, heads, est), 1024, 0,
                                         stream, *a);
        }
        if (r != ATTN_OK) return r;
    }
    return attni_cu_pick_launch(attni_cu_flex_write,
                                dim3((unsigned)attni_n_blocks(a->x.max_rows, rows),
                                     (unsigned)a->x.n_lists),
                                32 * rows, rows * (row_bytes + 4 * words), stream, *a, rows,
                                (int)words);
}

// Kernels of HiP: by dimensions and dtype.
typedef struct attni_cu_hip_kernels {
    void (*second)(const attni_cu_pick, const attni_cu_hip_grid);
    void (*third)(const attni_cu_pick, int32_t, int, int);
    int row_bytes, wide; // of Q in shared memory; wide: through tensor cores
} attni_cu_hip_kernels;

template <int BF, int NQ>
static attni_cu_hip_kernels attni_cu_hip_kernels_of(int row_bytes) {
    attni_cu_hip_kernels k = {attni_cu_hip2<BF, NQ>, attni_cu_hip3_scan<BF, NQ>, row_bytes, NQ > 0};
    return k;
}

static attni_cu_hip_kernels attni_cu_hip_choose(const attni_cu_pick *a) {
    const int dim = a->d.head_dim, per = 2 * dim;
    int styled = 0; // positions of its own: in f32
    for (int i = 0; a->f.kind == ATTN_SELECT_HIP3 && i < a->f.hip.n_stages; i++)
        styled |= a->f.hip.stage[i].style != ATTN_ROPE_NONE;
    const int wide = !styled && a->mode && !a->odd_k && !a->odd_q && !a->flip && !a->k.copies &&
                     !attni_is_scaled(a->k.dtype) && a->k.page_bytes < (int64_t)1 << 36;
    if (wide && dim == 64)
        return a->mode == 1 ? attni_cu_hip_kernels_of<1, 2>(per)
                            : attni_cu_hip_kernels_of<0, 2>(per);
    if (wide && dim == 128)
        return a->mode == 1 ? attni_cu_hip_kernels_of<1, 4>(per)
                            : attni_cu_hip_kernels_of<0, 4>(per);
    return attni_cu_hip_kernels_of<0, 0>(4 * dim);
}

// S of all blocks for the list rows of a launch.
static attn_result attni_cu_hip_all_launch(const attn_cuda *c, const attni_cu_pick *a,
                                           const attni_cu_hip_grid *w, int last,
                                           attn_cuda_stream stream) {
    const int64_t at = a->at[last ? ATTNI_CU_HIP_LAST : ATTNI_CU_HIP_ALL];
    const int64_t bytes = (int64_t)w->n_rows * a->x.n_lists * a->kv_cap * 4;
    const int64_t per = (int64_t)a->group * (last ? 1 : w->n_scorers); // of a list row
    const int32_t each = (int32_t)attni_max64(1, ATTNI_CU_PICK_ROWS / per);
    const int64_t parts = attni_n_blocks(per, ATTNI_CU_PICK_ROWS) * a->d.n_kv_heads;
    int64_t slices = 1;
    if (parts > 65535) return ATTN_ERR_UNSUPPORTED;
    if (cudaMemsetAsync(a->work + at, 0, (size_t)bytes, stream) != cudaSuccess)
        return ATTN_ERR_DEVICE;
    while (slices < 64 && attni_n_blocks(w->n_rows, each) * parts * slices < 4 * (int64_t)c->n_sm)
        slices *= 2;
    return attni_cu_pick_launch(last ? attni_cu_hip_all<1> : attni_cu_hip_all<0>,
                                dim3((unsigned)w->n_rows, (unsigned)parts, (unsigned)slices),
                                ATTNI_CU_PICK, a->tile_bytes, stream, *a, *w, each);
}

static attn_result attni_cu_hip2_launch(const attn_cuda *c, attni_cu_pick *a,
                                        const attni_cu_hip_kernels *k, attn_cuda_stream stream) {
    const attn_hip *h = &a->f.hip;
    const int32_t lanes = h->head_group, heads = a->f.heads == ATTN_SELECT_EACH ? 1 : a->group;
    const unsigned lists = (unsigned)(a->x.n_lists / lanes);
    const int64_t most = (int64_t)(h->keep / h->block) * lanes;
    attni_cu_hip_grid w;
    attn_result r = ATTN_OK;
    memset(&w, 0, sizeof w);
    w.n_scorers = attni_cu_hip_scorers_of(&a->f);
    w.n_sets = a->f.heads == ATTN_SELECT_ALL ? a->d.n_kv_heads : lanes;
    w.q_rows = (int32_t)(((int64_t)w.n_scorers * heads + 31) / 32 * 32);
    if (h->near || h->vertical || h->diagonal || h->random)
        w.words = (int32_t)attni_n_blocks(a->kv_cap * h->block / a->f.kv_block + 2, 32);
    const int64_t smem = (int64_t)w.q_rows * (k->row_bytes + 4) + 4 * (int64_t)w.words +
                         most * (2 * (int64_t)sizeof(attni_cu_hip_group) + 16);
    if (smem > c->smem_bytes - 6144 || most > 16383) return ATTN_ERR_UNSUPPORTED;
    for (w.row0 = 0; w.row0 < a->x.max_rows && r == ATTN_OK; w.row0 += a->at_once) {
        w.n_rows = attni_min32(a->at_once, a->x.max_rows - w.row0);
        if (a->at[ATTNI_CU_HIP_THIN] >= 0)
            r = attni_cu_pick_launch(attni_cu_hip_thin,
                                     dim3((unsigned)w.n_rows, (unsigned)a->d.n_heads), 128, 0,
                                     stream, *a, w);
        for (int last = 0; last < 2 && r == ATTN_OK; last++)
            if (a->at[last ? ATTNI_CU_HIP_LAST : ATTNI_CU_HIP_ALL] >= 0)
                r = attni_cu_hip_all_launch(c, a, &w, last, stream);
        // a few lists: one to a multiprocessor
        const int threads = (int64_t)w.n_rows * lists <= c->n_sm ? 512 : 128;
        if (r == ATTN_OK)
            r = attni_cu_pick_launch(k->second, dim3((unsigned)w.n_rows, lists), threads, smem,
                                     stream, *a, w);
    }
    return r;
}

static attn_result attni_cu_hip_launch(const attn_cuda *c, attni_cu_pick *a,
                                       attn_cuda_stream stream) {
    const attn_hip *h = &a->f.hip;
    const unsigned rows = (unsigned)a->x.max_rows, lists = (unsigned)a->x.n_lists;
    const int32_t heads = a->f.heads == ATTN_SELECT_EACH ? 1 : a->group;
    attni_cu_hip_kernels k;
    attn_result r = ATTN_OK;
    attni_cu_pick_mode(c, &a->d, 0, a);
    if (c->arch < 80) a->mode = 0;
    a->flip = a->scale < 0;
    a->scale = a->flip ? -a->scale : a->scale;
    a->page16 = (uint32_t)(a->k.page_bytes / 16);
    a->token16 = (uint32_t)(a->k.token_bytes / 16);
    k = attni_cu_hip_choose(a);
    if (a->f.kind != ATTN_SELECT_HIP3) return attni_cu_hip2_launch(c, a, &k, stream);
    if (cudaMemsetAsync(a->work, 0, (size_t)a->at[ATTNI_CU_HIP_STATE], stream) !=
        cudaSuccess)
        return ATTN_ERR_DEVICE;
    for (int i = 0; i < h->n_stages && r == ATTN_OK; i++) {
        const attn_hip_stage *t = h->stage + i;
        const unsigned z = a->f.heads == ATTN_SELECT_EACH ? (unsigned)a->d.n_heads
                                                          : (unsigned)a->d.n_kv_heads;
        const int64_t n = (attni_n_blocks(t->q_block, t->q_stride) * heads + 31) / 32 * 32;
        const int64_t places = i ? (int64_t)t->keep / t->chunk : a->kv_cap;
        const int low = k.wide && t->q_stride > 1 ? (int)(n * k.row_bytes) : 0;
        const int turns = (int64_t)rows * z >= 4 * (int64_t)c->n_sm ? 4 : 1;
        const int64_t far = t->style == ATTN_ROPE_SELF_EXTEND ? n * k.row_bytes : 0;
        const int64_t smem = n * k.row_bytes + low + far;
        const int64_t slices = attni_n_blocks(places, 64 * turns);
        if ((int64_t)t->chunk * a->d.n_kv_heads > UINT32_MAX) return ATTN_ERR_UNSUPPORTED;
        if (smem > c->smem_bytes - 2048 || slices > 65535) return ATTN_ERR_UNSUPPORTED;
        r = attni_cu_pick_launch(k.third, dim3(rows, (unsigned)slices, z), 256, smem, stream, *a,
                                 (int32_t)i, turns, low);
        if (r == ATTN_OK)
            r = attni_cu_pick_launch(attni_cu_hip3_pick, dim3(rows, lists), 256, 0, stream, *a,
                                     (int32_t)i);
    }
    return r;
}

static attn_result attni_cu_exact_launch(const attn_cuda *c, const attn_cuda_plan *p,
                                         attni_cu_pick *a, attn_cuda_stream stream) {
    const unsigned rows = (unsigned)a->x.max_rows, lists = (unsigned)a->x.n_lists;
    const int64_t words = attni_n_blocks(a->kv_cap, 32);
    const attni_cu_exact_grid g = attni_cu_exact_cut(c, &a->d, &a->f, (int64_t)rows * lists);
    const dim3 grid(rows, lists * (unsigned)g.tiles, (unsigned)g.slices);
    attn_result r = ATTN_OK;
    attni_cu_pick_mode(c, &a->d, 0, a);
    const int all = !a->mode || a->d.logits.softcap > 0; // nothing for tensor cores
    const int64_t q = p->max_q_len ? p->max_q_len : p->cap[1];
    const int few = q * (a->f.heads == ATTN_SELECT_EACH ? 1 : a->group) <= 32;
    const int threads = few ? 32 : ATTNI_CU_PICK_ROWS; // and query rows
    const int smem = (threads + 2 * ATTNI_CU_PICK_KEYS) * a->row_bytes;
    if (grid.y > 65535) return ATTN_ERR_UNSUPPORTED;
    if (cudaMemsetAsync(a->work, 0, (size_t)a->at[ATTNI_CU_EXACT_ROWS], stream) != cudaSuccess)
        return ATTN_ERR_DEVICE;
    for (int pass = 0; pass < 2 && r == ATTN_OK; pass++) {
        if (!all)
            r = attni_cu_pick_launch(attni_cu_exact_tiles, grid, threads, smem, stream, *a, pass,
                                     g);
        if (r == ATTN_OK)
            r = attni_cu_pick_launch(attni_cu_exact_scan, grid, ATTNI_CU_PICK, a->tile_bytes,
                                     stream, *a, pass, g, all);
        if (r == ATTN_OK && !pass)
            r = attni_cu_pick_launch(attni_cu_exact_pick, dim3(rows, lists), 256, 4 * words, stream,
                                     *a);
    }
    if (r == ATTN_OK)
        r = attni_cu_pick_launch(attni_cu_exact_missed, dim3(grid.x, grid.y), ATTNI_CU_PICK_ROWS, 0,
                                 stream, *a, g);
    return r;
}

// What kernels are told of a problem and its image.
static void attni_cu_pick_problem(const attn_cuda *c, const attn_desc *d, const attn_cuda_plan *g,
                                  attni_cu_pick *a) {
    const uint8_t *m = (const uint8_t *)g->device;
    a->d = attni_cu_resolved(d);
    attni_cu_device_tables(g, &a->d);
    (void)attni_side_init(d, 0, &a->k);
    a->header = ATTNI_AT(attni_cu_header, ATTNI_CU_HEADER);
    a->seq = ATTNI_AT(attn_plan_seq, ATTNI_CU_SEQ);
    a->error = c->error;
    a->group = d->n_heads / d->n_kv_heads;
    for (a->page_shift = 0; a->page_shift < 31 && d->kv.page_tokens >> a->page_shift > 1;)
        a->page_shift++;
    if (d->kv.page_tokens & (d->kv.page_tokens - 1)) a->page_shift = -1;
    a->scale = attni_scale(d);
}

// Everything that kernels are told but the method's own.
static attn_result attni_cu_pick_args(const attn_cuda *c, const attn_desc *d,
                                      const attn_cuda_plan *g, const attn_summary *y,
                                      const attn_selection *x, void *work, int64_t bytes,
                                      attni_cu_pick *a) {
    const uint8_t *m = (const uint8_t *)g->device;
    const attn_block_list *b = &g->mask.blocks;
    int64_t n;
    attni_cu_pick_problem(c, d, g, a);
    a->x = *x;
    if (y) a->y = *y;
    if (b->row_start && b->seq_row && b->n_rows == x->list.n_rows &&
        b->row_block == x->list.row_block && b->kv_block == x->list.kv_block)
        a->seq_row = ATTNI_AT(int32_t, ATTNI_CU_SEQ_ROW);
    a->per_list = d->n_heads / x->n_lists;
    a->row_of = (attni_cu_row_of *)work;
    n = attni_cu_pick_fixed(x->max_rows, 0);
    if (bytes < n) return ATTN_ERR_BUFFER;
    a->n_est = 0;
    if (a->f.kind == ATTN_SELECT_FLEX) {
        attni_cu_flex_layout(d, (int64_t)x->row_capacity * a->f.kv_block, a);
        a->n_est = (int32_t)attni_min64(
            (bytes - n) / (a->est_bytes + (int64_t)sizeof(attni_cu_est)), g->cap[0]);
        while (a->n_est > 0 &&
               attni_cu_pick_fixed(x->max_rows, a->n_est) + a->n_est * a->est_bytes > bytes)
            a->n_est--;
        if (a->n_est < 1) return ATTN_ERR_BUFFER;
    }
    a->est = (attni_cu_est *)(void *)((uint8_t *)work + n);
    n = attni_cu_pick_fixed(x->max_rows, a->n_est);
    a->work = (uint8_t *)work + n;
    if (attni_cu_hip2_layout(d, g->cap[2] * d->kv.page_tokens, x->max_rows, bytes - n, a) &&
        !a->at_once)
        return ATTN_ERR_BUFFER;
    if (a->f.kind == ATTN_SELECT_HIP3 &&
        !attni_cu_hip_layout(g->cap[2] * d->kv.page_tokens, (int64_t)x->max_rows * x->n_lists,
                             bytes - n, a))
        return ATTN_ERR_BUFFER;
    if (a->f.kind == ATTN_SELECT_EXACT &&
        !attni_cu_exact_layout(c, d, g->cap[2] * d->kv.page_tokens,
                               (int64_t)x->max_rows * x->n_lists, bytes - n, a))
        return ATTN_ERR_BUFFER;
    return ATTN_OK;
}
#undef ATTNI_AT

ATTN_DEF attn_result attn_cuda_select(const attn_cuda *c, const attn_desc *d,
                                      const attn_cuda_plan *g, const attn_select *s,
                                      const attn_summary *y, const attn_selection *x, void *work,
                                      size_t bytes, attn_cuda_stream stream) {
    attni_cu_pick a;
    attn_result r = attn_select_check(d, s);
    if (r != ATTN_OK) return r;
    if (!c || !g || !g->device || !x || !x->block || !work) return ATTN_ERR_ARGUMENT;
    if ((r = attn_cuda_supports(c, d)) != ATTN_OK) return r;
    if (!x->list.device_entries || !d->q.data || !d->kv.k.data) return ATTN_ERR_ARGUMENT;
    if (!attni_is_float(d->q.dtype)) return ATTN_ERR_DTYPE;
    if ((uintptr_t)work % 256 || bytes > (size_t)INT64_MAX) return ATTN_ERR_BUFFER;
    if (d->n_seq != g->n[ATTNI_CU_N_SEQS]) return ATTN_ERR_STALE;
    memset(&a, 0, sizeof a);
    if (!attni_select_fill(s, &a.f)) return ATTN_ERR_ARGUMENT;
    if (!attni_select_fits(d, &a.f, x)) return ATTN_ERR_STALE;
    if (x->keeps_all) return ATTN_OK;
    if (attni_bad_cache(&d->kv)) return ATTN_ERR_ARGUMENT;
    if (!attni_cu_pick_supports(&a.f)) return ATTN_ERR_UNSUPPORTED;
    if ((r = attni_cu_pick_args(c, d, g, y, x, work, (int64_t)bytes, &a)) != ATTN_OK) return r;
    if (d->kv.cache) a.reads = d->kv.cache->reads;
    a.each_key = a.f.kind != ATTN_SELECT_FLEX && a.f.kind != ATTN_SELECT_EXACT;
    r = attni_cu_pick_launch(attni_cu_pick_rows, dim3(1), 1024, 0, stream, a);
    if (r != ATTN_OK) return r;
    return a.f.kind == ATTN_SELECT_FLEX    ? attni_cu_flex_launch(c, g, &a, stream)
           : a.f.kind == ATTN_SELECT_EXACT ? attni_cu_exact_launch(c, g, &a, stream)
                                           : attni_cu_hip_launch(c, &a, stream);
}

// The position of a row's state that no step follows.
static __global__ void attni_cu_forget(uint8_t *state, size_t bytes, int32_t n) {
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        *(int32_t *)(void *)(state + (size_t)i * bytes) = -2;
}

ATTN_DEF attn_result attn_cuda_landmarks(const attn_cuda *c, const attn_desc *d,
                                         const attn_cuda_plan *g, const attn_select *s, float *out,
                                         attn_cuda_stream stream) {
    attni_cu_pick a;
    attn_result r = attn_select_check(d, s);
    if (r != ATTN_OK) return r;
    if (!c || !g || !g->device || !out) return ATTN_ERR_ARGUMENT;
    if ((r = attn_cuda_supports(c, d)) != ATTN_OK) return r;
    if (!d->q.data || !d->kv.k.data) return ATTN_ERR_ARGUMENT;
    if (!attni_is_float(d->q.dtype)) return ATTN_ERR_DTYPE;
    if (d->n_seq != g->n[ATTNI_CU_N_SEQS]) return ATTN_ERR_STALE;
    memset(&a, 0, sizeof a);
    if (!attni_select_fill(s, &a.f) || a.f.kind != ATTN_SELECT_HIP3) return ATTN_ERR_ARGUMENT;
    attni_cu_pick_problem(c, d, g, &a);
    return attni_cu_pick_launch(attni_cu_landmarks,
                                dim3((unsigned)attni_n_blocks(g->cap[1], ATTNI_CU_MARKS),
                                     (unsigned)d->n_kv_heads), 256, 0, stream, a, out);
}

ATTN_DEF attn_result attn_cuda_select_forget(const attn_cuda *c, const attn_selection *x,
                                             int32_t slot, attn_cuda_stream stream) {
    if (!c || !x || slot < 0 || slot >= x->n_slots) return ATTN_ERR_ARGUMENT;
    if (!x->state) return ATTN_OK;
    attni_cu_forget<<<1, 1024, 0, stream>>>(
        x->state + (size_t)slot * (size_t)x->n_lists * x->state_bytes, x->state_bytes, x->n_lists);
    return cudaGetLastError() == cudaSuccess ? ATTN_OK : ATTN_ERR_DEVICE;
}

#endif // ATTNI_CUDA_IMPLEMENTED
#endif // implementation

/* attn.h - v0.1 - MIT licence, see the end of the file
   Attention over paged KV shared through a prefix tree, and over sparse score matrices.
   This header is the core: page pool, prefix tree, masks, the problem descriptor, validation,
   planning and an fp64 reference kernel. Backends: attn_cpu.h, attn_cuda.cuh, attn_metal.h.

   DO THIS in exactly one C or C++ file, before including any attn header:
       #define ATTN_IMPLEMENTATION
       #include "attn.h"
       #include "attn_cpu.h"
   Every other file includes the headers without the macro.

   EXAMPLE (dense causal attention of one sequence over contiguous KV, 8 query / 2 KV heads):
       attn_desc d = {0};
       int32_t q_start[2] = {0, 1}, kv_len[1] = {n_cached};           // one new token
       d.n_seq = 1;  d.q_start = q_start;  d.kv.kv_len = kv_len;
       d.n_heads = 8;  d.n_kv_heads = 2;  d.head_dim = 64;
       d.q.data = q;  d.q.dtype = ATTN_F32;  d.o.data = o;  d.o.dtype = ATTN_F32;
       d.kv.k.data = key_cache;    d.kv.k.dtype = ATTN_F32;           // (max_len, 2, 64)
       d.kv.v.data = value_cache;  d.kv.v.dtype = ATTN_F32;
       d.kv.n_pages = 1;  d.kv.page_tokens = max_len;                 // one long page
       size_t bytes = attn_cpu_forward_bytes(&d, 1);
       attn_result r = attn_cpu_forward(&d, malloc(bytes), bytes, 1); // ATTN_OK or an error

   CONTENTS (search for the tag)
       >>config   >>result   >>dtype   >>tensor   >>kv   >>mask   >>desc   >>validate   >>plan
       >>ref   >>pool   >>tree   >>blob   and the implementation of each behind  >>impl

   MACROS
       ATTN_IMPLEMENTATION        implement every attn header this file includes
       ATTN_CORE_IMPLEMENTATION   implement attn.h only
       ATTN_STATIC                make every function static (a private copy per file)
       ATTN_DEF                   or define the linkage of public functions yourself

   MEMORY   The caller owns everything. ..._bytes() functions say how large a buffer must be; nothing
            is allocated, ever. Buffers need 64-byte alignment only where the text says so.
   THREADS  The library starts none and has no mutable state of its own. Pool and tree are locked by
            the caller; a plan is read-only while it runs.
   ERRORS   Every function that can fail returns an attn_result; 0 is success, errors are negative.
            Nothing aborts or prints. Failed calls leave their structures as they were.
   ZERO     Structs are zero-initialised by the caller; 0 always means the default.
   NUMERICS Partial results are f32. For a given mask a row's bits do not depend on the rest of the
            batch, page size, layout, placement or (CPU) the number of threads, chunking, cache hits.
   LIMITS   head_dim: multiples of 8 up to 576. Positions and token ids: int32. Offsets: 64-bit. */

#ifndef ATTN_H
#define ATTN_H

#define ATTN_VERSION 100 /* 10000 major + 100 minor + patch */

#include <stddef.h>
#include <stdint.h>

#ifdef ATTN_STATIC
#if defined(__GNUC__) || defined(__clang__)
#define ATTN_DEF static __attribute__((unused))
#else
#define ATTN_DEF static
#endif
#endif
#ifndef ATTN_DEF
#ifdef __cplusplus
#define ATTN_DEF extern "C"
#else
#define ATTN_DEF extern
#endif
#endif

// ==== >>config  Limits ===========================================================================

#define ATTN_MAX_HEAD_DIM 576
#define ATTN_SPAN 256 /* tokens: KV is cut here, at absolute positions, whatever the batch (CPU) */

// ==== >>result  Result codes =====================================================================

#define ATTN_RESULTS(X)                                                                            \
    X(OK, 0, "success")                                                                            \
    X(ERR_ARGUMENT, -1, "a required argument is NULL, negative or out of its range")               \
    X(ERR_SHAPE, -2, "sizes do not fit together (heads, dims, lengths, positions)")                \
    X(ERR_DTYPE, -3, "a dtype is missing or not allowed here")                                     \
    X(ERR_LAYOUT, -4, "strides, page size or layout do not fit together")                          \
    X(ERR_PAGE, -5, "a page id lies outside the pool")                                             \
    X(ERR_MASK, -6, "a mask is malformed (ids not ascending, out of range, bad sub-blocks)")       \
    X(ERR_OVERFLOW, -7, "a size or offset does not fit in 63 bits")                                \
    X(ERR_UNSUPPORTED, -8, "valid, but this backend cannot do it")                                 \
    X(ERR_BUFFER, -9, "a caller's buffer is too small or misaligned")                              \
    X(ERR_FULL, -10, "out of pages, nodes or sequence slots; nothing was changed")                 \
    X(ERR_STALE, -11, "the plan was made for another problem; build or update it")                 \
    X(ERR_NOT_FOUND, -12, "no such sequence or prefix")                                            \
    X(ERR_BUSY, -13, "still in use (pinned, referenced or not acknowledged)")                      \
    X(ERR_CORRUPT, -14, "a blob is damaged or was not written by this library")                    \
    X(ERR_VERSION, -15, "a blob or header of another version")                                     \
    X(ERR_CALLBACK, -16, "a caller's callback reported failure")

typedef enum attn_result {
#define ATTNI_X(name, value, text) ATTN_##name = value,
    ATTN_RESULTS(ATTNI_X)
#undef ATTNI_X
        ATTN_RESULT_FORCE_INT = 0x7fffffff
} attn_result;

// A static English sentence for a result code; never NULL.
ATTN_DEF const char *attn_result_string(attn_result r);

// ==== >>dtype  Data types ========================================================================

// X(name, value, bits per element, has scales): quantised types carry one f32 scale per token and KV
// head, K and V apart, so that a stored token is never rewritten. value = code * scale.
// I4: two's complement nibbles -7..7, element 2i in the low half of byte i.
#define ATTN_DTYPES(X)                                                                             \
    X(F32, 1, 32, 0)                                                                               \
    X(F16, 2, 16, 0)                                                                               \
    X(BF16, 3, 16, 0)                                                                              \
    X(F8E4M3, 4, 8, 1)                                                                             \
    X(F8E5M2, 5, 8, 1)                                                                             \
    X(I8, 6, 8, 1)                                                                                 \
    X(I4, 7, 4, 1)

typedef enum attn_dtype {
    ATTN_DTYPE_NONE = 0, // invalid: a forgotten dtype is an error
#define ATTNI_X(name, value, bits, scaled) ATTN_##name = value,
    ATTN_DTYPES(ATTNI_X)
#undef ATTNI_X
        ATTN_DTYPE_COUNT
} attn_dtype;

ATTN_DEF const char *attn_dtype_name(attn_dtype t); // "f32", "f8e4m3", ... or "none"
ATTN_DEF int attn_dtype_bits(attn_dtype t);         // 32, 16, 8, 4, or 0 for an invalid one
ATTN_DEF int attn_dtype_scaled(attn_dtype t);       // 1 when values carry a scale

// ==== >>tensor  Views of the caller's arrays =====================================================

// (n_tokens, n_heads, dim) with unit stride along dim. dtype: F32, F16 or BF16.
typedef struct attn_tensor {
    void *data;
    attn_dtype dtype;
    int64_t stride_token; // elements between tokens (default 0: n_heads * dim)
    int64_t stride_head;  // elements between heads  (default 0: dim)
} attn_tensor;

// ==== >>kv  Paged keys and values ================================================================

// Where a token's elements lie inside a page. Every layout gives the same bits.
typedef enum attn_layout {
    ATTN_TOKEN_MAJOR = 0, // [page, token, kv_head, d]
    ATTN_HEAD_MAJOR = 1,  // [page, kv_head, token, d]
    ATTN_K16 = 2          // CPU. K: [page, kv_head, token / 16, d / p, 16, p], p = 32 / bits, so that a
                          // 4-byte unit holds p elements of one token; V: head-major.
                          // page_tokens must be a multiple of 16.
} attn_layout;

// The pages of K or of V of one layer. After a page's elements follow, for scaled dtypes without
// head_scale, its f32 scales: [token, kv_head] for TOKEN_MAJOR, [kv_head, token] otherwise.
// V may alias K (MLA: K rows of 576, V their first 512): same data, page_bytes and stride_token.
typedef struct attn_kv_array {
    void *data;              // page 0
    attn_dtype dtype;        // any
    const float *head_scale; // (n_kv_heads) fixed scales (default NULL: scales stored in the page)
    int64_t page_bytes;      // distance between pages (default 0: attn_kv_page_bytes)
    int64_t stride_token;    // elements (default 0: by layout); K16 keys: must be 0
    int64_t stride_head;     // elements (default 0: by layout); K16 keys: must be 0
} attn_kv_array;

typedef struct attn_kv {
    attn_kv_array k, v;
    attn_layout layout;
    int32_t page_tokens;        // tokens per page, any size >= 1
    int32_t n_pages;            // every page id must be in [0, n_pages)
    const int32_t *page_table;  // (n_seq, page_table_stride) page ids; entry j holds the tokens
                                // j * page_tokens ... of the sequence
                                // (default NULL: sequence i is page i: contiguous KV)
    int64_t page_table_stride;  // int32 entries between sequences
    const int32_t *kv_len;      // (n_seq) tokens held, the new ones included
    const int32_t *kv_pos0;     // (n_seq) absolute position of the first held token (default NULL: 0);
                                // > 0 after the front of a sequence was evicted
} attn_kv;

// ==== >>mask  Which keys a query sees ============================================================
//
// visible = base AND sparse, for a query at absolute position p and a key at absolute position k.
//   base   = k is held AND (k <= p | anything | token tree) AND (inside the window OR k < n_sink)
//   sparse = true when no sparse term is given, else the OR of the terms that are:
//            block list, local-stride, vertical-slash, keep_sink, keep_recent

typedef enum attn_mask_kind {
    ATTN_MASK_CAUSAL = 0,
    ATTN_MASK_FULL = 1, // bidirectional
    ATTN_MASK_TREE = 2  // speculative verify: the sequence's q_len queries are its last q_len tokens,
                        // nodes of a token tree; each sees what came before and its own ancestors
} attn_mask_kind;

// Arbitrary block-sparse pattern, CSR. Row of a query: seq_row[seq] + p / row_block; it lists the KV
// blocks (ids k / kv_block, ascending, unique) that are kept. Optional sub-block bitmask per entry:
// bits_rows x bits_cols bits, row-major, (bits_rows * bits_cols + 63) / 64 words per entry; sub-row =
// (p % row_block) / (row_block / bits_rows), sub-column likewise.
typedef struct attn_block_list {
    int32_t row_block, kv_block; // tokens
    int32_t n_lists;             // 1 (all heads share), n_kv_heads or n_heads
    int32_t n_rows;              // row blocks in each list
    const int64_t *row_start;    // (n_lists, n_rows + 1) offsets into block; NULL: no block list
    const int32_t *block;        // KV block ids
    const uint64_t *bits;        // (default NULL: whole blocks)
    int32_t bits_rows, bits_cols;
    const int32_t *seq_row;      // (n_seq) list row of the row block 0 of each sequence, may be
                                 // negative (default NULL: 0 for all)
} attn_block_list;

// dkernel's closed form with i = p / block, j = k / block, h = KV head + head0:
//   causal:        i - j < local  or  (j + h * step + offset) mod stride == 0
//   bidirectional: (max(0, i - j - local + 1) + max(0, j - i - local_right + 1)) mod stride == 0
// The last n_dense of n_heads_total KV heads keep everything.
typedef struct attn_local_stride {
    int32_t block;         // tokens; 0: no local-stride term
    int32_t local;         // blocks, >= 1
    int32_t stride;        // blocks, >= 1
    int32_t head_step;     // (default 0: max(1, stride / n_heads_total))
    int32_t offset;        // phi-3-small: 1
    int32_t homogeneous;   // 1: every head as head 0
    int32_t n_dense;       // dense heads (default 0)
    int32_t head0;         // first KV head of this tensor-parallel rank (default 0)
    int32_t n_heads_total; // KV heads over all ranks (default 0: n_kv_heads)
    int32_t bidirectional; // 1: the second form
    int32_t local_right;   // (default 0: local)
} attn_local_stride;

// Kept: block columns j in col, block diagonals i - j in diag, per list; ids ascending, unique.
typedef struct attn_vertical_slash {
    int32_t block;            // tokens, 1 for token columns; 0: no vertical-slash term
    int32_t n_lists;          // 1, n_kv_heads or n_heads
    const int64_t *col_start; // (n_lists + 1) into col
    const int32_t *col;
    const int64_t *diag_start; // (n_lists + 1) into diag
    const int32_t *diag;
} attn_vertical_slash;

typedef struct attn_mask {
    attn_mask_kind kind;        // (default: causal)
    int32_t window_left;        // n + 1: keys from p - n on (default 0: unlimited)
    int32_t window_right;       // n + 1: keys up to p + n (default 0: unlimited)
    int32_t n_sink;             // first positions, visible outside the window (default 0)
    const int32_t *tree_parent; // TREE: (n_tokens) index of the parent among the sequence's queries,
                                // smaller than its own; -1: child of the context.
                                // A node's position is q_pos0 + its depth.
    attn_block_list blocks;
    attn_local_stride stride;
    attn_vertical_slash vslash;
    int32_t keep_sink;   // sparse term: k < keep_sink (default 0: off)
    int32_t keep_recent; // sparse term: p - k < keep_recent (default 0: off)
} attn_mask;

// Turns a dense boolean matrix into a block list with one sub-block bit per token pair.
//   m            (rows, cols) bytes, nonzero = keep; row r is absolute position r, column c too
//   row_block, kv_block   tokens, row_block * kv_block <= 4096
//   row_start    out, (ceil(rows / row_block) + 1);  block, bits: out, capacity entries;
//                bits holds (row_block * kv_block + 63) / 64 words per entry
//   n_entries    out; call with capacity 0 (block, bits may be NULL) to ask for the count
// Fills out->... with pointers to these arrays. ERR_ARGUMENT, ERR_FULL (capacity).
ATTN_DEF attn_result attn_mask_from_dense(const uint8_t *m, int32_t rows, int32_t cols,
                                          int32_t row_block, int32_t kv_block, int64_t *row_start,
                                          int32_t *block, uint64_t *bits, int64_t capacity,
                                          int64_t *n_entries, attn_block_list *out);

// ==== >>desc  One attention problem ==============================================================

typedef enum attn_numerics {
    ATTN_NUMERICS_FAST = 0,     // the ISA's best: FMA; bf16 dot where Q, K and O are all bf16
    ATTN_NUMERICS_PORTABLE = 1, // the same bits on every ISA
    ATTN_NUMERICS_APPROX = 2    // FAST, and integer-dot scores for int8 K: Q is rounded to 8 bits
                                // per row, so a score is off by at most |q|_max * |k|_1 / 254
} attn_numerics;

typedef struct attn_logits {
    float scale;        // (default 0: 1 / sqrt(head_dim))
    float softcap;      // s = softcap * tanh(s / softcap) (default 0: off)
    const float *alibi; // (n_heads) slopes: s += slope * (k - p) (default NULL)
    const float *sink;  // (n_heads) logits of a virtual key without value (default NULL)
    attn_tensor bias;   // additive, (n_heads or 1, n_tokens, columns): element
                        // [head * stride_head + token * stride_token + (k - kv_pos0)];
                        // stride_head 0: shared by all heads; stride_token is required (default: off)
} attn_logits;

// Score of a visible pair, in this order: scale * q.k, softcap, ALiBi, bias; then softmax over the
// visible keys and the sink logit.
typedef struct attn_desc {
    int32_t n_seq;
    int32_t n_heads;         // query heads, a multiple of n_kv_heads
    int32_t n_kv_heads;
    int32_t head_dim;        // multiple of 8, 8..576
    int32_t v_head_dim;      // (default 0: head_dim)
    const int32_t *q_start;  // (n_seq + 1) first query token of each sequence; q_start[n_seq] = n_tokens
    const int32_t *q_pos0;   // (n_seq) absolute position of its first query
                             // (default NULL: its queries are the last tokens held)
    const int32_t *seq_order; // (n_seq) permutation that puts sequences with common pages side by
                              // side, from attn_tree_order (default NULL: the planner sorts)
    attn_tensor q;           // (n_tokens, n_heads, head_dim)
    attn_tensor o;           // (n_tokens, n_heads, v_head_dim), written
    float *lse;              // (n_tokens, n_heads) natural log-sum-exp, the sink included (default NULL)
    attn_kv kv;
    attn_mask mask;
    attn_logits logits;
    attn_numerics numerics;  // (default: FAST)
} attn_desc;

// Bytes of one page of K (is_v = 0) or V (is_v = 1), scales included, rounded up to 64; 0 if invalid.
// Reads n_kv_heads, head_dim, v_head_dim, kv.layout, kv.page_tokens, the array's dtype, strides, scale.
ATTN_DEF size_t attn_kv_page_bytes(const attn_desc *d, int is_v);

// Slot (page * page_tokens + place) of every query token's own K and V: out (n_tokens), for store.
// ERR_PAGE when a position has no page. Reads the tables; d must be valid.
ATTN_DEF attn_result attn_kv_slots(const attn_desc *d, int64_t *out);

// Copies rows between a page and canonical order, whatever the layout: rows (n_tokens, n_kv_heads, d)
// of raw elements little-endian, followed by (n_tokens, n_kv_heads) f32 scales when stored in the page.
// For attn_tree_save / attn_tree_load callbacks. ERR_PAGE, ERR_ARGUMENT (place or count outside).
ATTN_DEF size_t attn_kv_rows_bytes(const attn_desc *d, int is_v, int32_t n_tokens);
ATTN_DEF attn_result attn_kv_read_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                       int32_t n_tokens, void *rows);
ATTN_DEF attn_result attn_kv_write_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                        int32_t n_tokens, const void *rows);

// ==== >>validate  Finding mistakes ===============================================================

// ATTN_OK, or the first mistake found: pointers, shapes, dtypes, strides, page ids, positions, masks.
// Reads every table (host memory): O(pages + list entries). The same answer for every backend.
ATTN_DEF attn_result attn_validate(const attn_desc *d);

// ==== >>plan  The tasks of a problem =============================================================

// Get defaults from the backend (attn_cpu_plan_params) and change what you like. Nothing here changes
// the bits of the result.
typedef struct attn_plan_params {
    int32_t row_tile;      // query rows x heads per task (default 0: 256)
    int32_t workers;       // threads that will run tasks (default 0: 1): decides splitting
    int32_t share;         // 0: shared-prefix tasks where the cost model says so; 1: never; 2: always
    int32_t max_seq;       // capacities for later updates of the same plan (default 0: as described)
    int32_t max_tokens;    // query tokens
    int32_t max_kv_len;    // longest sequence, kv_pos0 included
    size_t partial_bytes;  // workspace the caller will hand to run (default 0: no splitting, no sharing)
    float cost_kv_token;   // cost model: reading one token of K and V of one head ...
    float cost_row_token;  // ... one query row against one token ...
    float cost_partial;    // ... and storing plus merging one partial row (defaults 0: CPU figures)
} attn_plan_params;

// One task: query rows x a run of KV spans for one KV head. Rows are tokens first_token.. of the
// group's flattened queries, times the GQA heads.
typedef struct attn_task {
    int32_t segment;     // which sequences and spans
    int32_t kv_head;
    int32_t first_token; // in the segment's flattened query tokens
    int32_t n_tokens;
    float cost;          // tasks are sorted by it, dearest first
} attn_task;

// Sequences [seq0, seq0 + n_seq) of the plan's order against the spans [span0, span1), the pages of
// which they all share. n_slots = 0: the task writes O itself; 1: one folded partial per row; else one
// per span.
typedef struct attn_segment {
    int32_t seq0, n_seq;
    int32_t span0, span1;
    int32_t n_tokens; // query tokens of these sequences together
    int32_t n_slots;
    int64_t partial;  // first partial row
} attn_segment;

// A sequence as the plan saw it. place: in the plan's order.
typedef struct attn_plan_seq {
    int32_t q_begin, q_len, q_pos0;
    int32_t kv_len, kv_pos0;
    int32_t span0, span1;  // the spans any of its rows may see
    int32_t place;         // in order[]
    int32_t chain, n_chain; // its segments, in span order: plan->chain[chain ...]; n_chain 1: no merge
    int32_t is_chain;      // TREE: every parent is the previous token, so plain causal
} attn_plan_seq;

// Lives in the caller's memory; holds no pointer into Q, K, V or O, so one plan serves every layer.
typedef struct attn_plan {
    attn_plan_params params;
    int32_t n_seq, n_tokens, n_heads, n_kv_heads, head_dim, v_head_dim;
    int32_t n_tasks, n_merges, n_segments, n_shared; // n_shared: segments of more than one sequence
    int32_t tile_tokens;   // query tokens per task at most
    int32_t cap_seq, cap_segments, cap_tasks, cap_chain;
    size_t partial_rows;   // partial rows used, each (v_head_dim + 2) f32
    uint64_t shape;        // fingerprint of the descriptor's shape
    int64_t kv_tokens_read; // KV tokens (x heads) visited by a step, shared runs counted once
    int64_t kv_tokens_seen; // ... if every sequence read its own
    attn_plan_seq *seq;    // (n_seq)
    int32_t *order;        // (n_seq) sequence at each place
    int32_t *share;        // (n_seq) spans shared with the next place
    attn_segment *segment;
    attn_task *task;
    int32_t *chain;
    int32_t *merge;        // (n_merges) sequences whose partials must be merged
} attn_plan;

// Bytes attn_plan_build needs for d, or for the capacities in p if those are larger; 0 when invalid.
ATTN_DEF size_t attn_plan_bytes(const attn_desc *d, const attn_plan_params *p);

// Validates d and plans it into mem (64-byte aligned, bytes long, kept until the plan is dropped).
// *plan points into mem. Errors: those of attn_validate; ERR_BUFFER.
ATTN_DEF attn_result attn_plan_build(const attn_desc *d, const attn_plan_params *p, void *mem,
                                     size_t bytes, attn_plan **plan);

// Follows a changed problem (the next decode step, say) in the same memory: when neither the sharing
// nor a span border changed only lengths are patched (*rebuilt = 0), else everything is planned again
// (*rebuilt = 1). rebuilt may be NULL. ERR_BUFFER when d outgrew the capacities; then the plan is void.
ATTN_DEF attn_result attn_plan_update(attn_plan *plan, const attn_desc *d, int *rebuilt);

// Bytes of partial workspace this plan uses, <= params.partial_bytes. 64-byte aligned.
ATTN_DEF size_t attn_plan_partial_bytes(const attn_plan *plan);

// ==== >>ref  The specification ===================================================================

// fp64 attention straight from the definitions above, one score at a time; slow. o (n_tokens, n_heads,
// v_head_dim) and lse (n_tokens, n_heads; may be NULL) are dense doubles; d->o and d->lse are ignored.
// Fully masked rows: o = 0, lse = the sink logit or -inf. Errors: those of attn_validate.
ATTN_DEF attn_result attn_ref_forward(const attn_desc *d, double *o, double *lse);

// 1 when query token t (of all n_tokens) and head h see the held token j (0 .. kv_len - 1) of their
// sequence s. d must be valid.
ATTN_DEF int attn_ref_visible(const attn_desc *d, int32_t s, int32_t t, int32_t h, int32_t j);

// ==== >>pool  Pages and their reference counts ===================================================

// Pages 0 .. n_pages - 1; a page is free while its count is 0. No page memory here: page ids index the
// caller's arrays, in every layer alike.
typedef struct attn_pool {
    int32_t n_pages, n_free;
    int32_t *ref;  // (n_pages)
    int32_t *free; // (n_pages) stack of free ids
} attn_pool;

ATTN_DEF size_t attn_pool_bytes(int32_t n_pages); // 0 when n_pages < 1
ATTN_DEF attn_result attn_pool_init(attn_pool *pool, int32_t n_pages, void *mem, size_t bytes);
ATTN_DEF attn_result attn_pool_alloc(attn_pool *pool, int32_t *page);  // count 1; ERR_FULL
ATTN_DEF attn_result attn_pool_retain(attn_pool *pool, int32_t page);  // ERR_PAGE if free or outside
ATTN_DEF attn_result attn_pool_release(attn_pool *pool, int32_t page); // ERR_PAGE if free or outside

// ==== >>tree  Token prefixes -> pages ============================================================
//
// A radix tree over token ids for all layers at once. A node holds a run of tokens and the pages they
// lie in; sequences end anywhere in a node. Runs may begin inside a page: two sequences that diverge
// there have their own copies of that page (copy on write), listed as attn_page_copy for the caller to
// carry out (attn_<dev>_copy_pages) before the next store. Token ids are compared on every hit.
// A namespace (model, adapter, tenant) shares nothing with another.
// Released prefixes stay cached until evicted.

typedef struct attn_page_copy {
    int32_t src, dst;
    int32_t n_tokens; // the first n_tokens slots
} attn_page_copy;

typedef struct attn_tree attn_tree; // lives in the caller's memory

typedef struct attn_tree_desc {
    int32_t n_pages;     // pages the tree manages (it owns a pool of that many)
    int32_t page_tokens;
    int32_t max_seq;     // live sequences (default 0: 256)
    int32_t max_nodes;   // (default 0: 2 * n_pages + max_seq + 64)
} attn_tree_desc;

ATTN_DEF size_t attn_tree_bytes(const attn_tree_desc *desc); // 0 when invalid
ATTN_DEF attn_result attn_tree_init(const attn_tree_desc *desc, void *mem, size_t bytes,
                                    attn_tree **tree);

// Longest cached prefix of tokens, in tokens. Changes nothing.
ATTN_DEF int32_t attn_tree_match(const attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n);

// Starts a sequence that holds the longest cached prefix of tokens (maybe 0 of them): *seq is its
// handle, *n_cached the length. Pass n - 1 tokens when the logits of the last one are needed.
// ERR_FULL: no sequence slot.
ATTN_DEF attn_result attn_tree_open(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                    int32_t *seq, int32_t *n_cached);

// Lengthens a sequence by n tokens. The first *n_cached of them were already cached behind it (their
// K and V are there; do not store them again), the rest get page slots: the caller stores their K and
// V before anyone runs attention over them, or truncates. Page copies are appended to copies
// (capacity max_copies, *n_copies counts on); at most one per call. The source page stays pinned until
// attn_tree_ack. Makes room by evicting cached leaves. ERR_FULL undoes everything.
ATTN_DEF attn_result attn_tree_append(attn_tree *t, int32_t seq, const int32_t *tokens, int32_t n,
                                      int32_t *n_cached, attn_page_copy *copies, int32_t max_copies,
                                      int32_t *n_copies);

// open + append of all the tokens.
ATTN_DEF attn_result attn_tree_insert(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                      int32_t *seq, int32_t *n_cached, attn_page_copy *copies,
                                      int32_t max_copies, int32_t *n_copies);

// The copies were carried out: their sources may be reused.
ATTN_DEF attn_result attn_tree_ack(attn_tree *t, const attn_page_copy *copies, int32_t n_copies);

// A second sequence with the same tokens (beam, speculative draft). No copy until they diverge.
ATTN_DEF attn_result attn_tree_fork(attn_tree *t, int32_t seq, int32_t *out);

// Shortens a sequence to n_tokens. Tokens that no other sequence, cached prefix or pin needs are
// dropped and their pages freed (rollback of a draft); tokens cached before stay.
ATTN_DEF attn_result attn_tree_truncate(attn_tree *t, int32_t seq, int32_t n_tokens);

// Ends a sequence. keep = 1: its tokens stay cached until evicted; 0: as truncate to 0 first.
ATTN_DEF attn_result attn_tree_release(attn_tree *t, int32_t seq, int keep);

// Pins (+1) or unpins (-1) a cached prefix against eviction; its exact tokens must be cached.
ATTN_DEF attn_result attn_tree_pin(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                   int delta);

// Prefixes of higher priority are evicted later (default 0). Applies to the sequence's whole path.
ATTN_DEF attn_result attn_tree_priority(attn_tree *t, int32_t seq, int32_t priority);

// Frees pages of unpinned, unused leaves, lowest priority first, then least recently used, until
// n_pages were freed or none is left; *n_freed may be NULL. n_pages < 0: everything evictable.
ATTN_DEF attn_result attn_tree_evict(attn_tree *t, int32_t n_pages, int32_t *n_freed);

ATTN_DEF int32_t attn_tree_length(const attn_tree *t, int32_t seq); // tokens; < 0: an attn_result
// Copies tokens [first, first + n) of the sequence to out.
ATTN_DEF attn_result attn_tree_tokens(const attn_tree *t, int32_t seq, int32_t first, int32_t n,
                                      int32_t *out);
// Writes the sequence's page ids to out; returns how many ((length + page_tokens - 1) / page_tokens),
// or an attn_result < 0 (ERR_BUFFER when capacity is less).
ATTN_DEF int32_t attn_tree_pages(const attn_tree *t, int32_t seq, int32_t *out, int32_t capacity);
// Writes to order the permutation of seqs (n handles) that puts common prefixes side by side: a
// depth-first walk of the tree, ties by place in seqs. scratch: n int32. For attn_desc.seq_order.
ATTN_DEF attn_result attn_tree_order(const attn_tree *t, const int32_t *seqs, int32_t n,
                                     int32_t *order, int32_t *scratch);

typedef struct attn_tree_stats {
    int32_t n_pages, n_free, n_nodes, n_seq;
    int64_t tokens_cached;   // tokens held by nodes
    int64_t tokens_hit;      // since init: tokens that open and append found cached
    int64_t tokens_missed;   // ... and that append gave new slots
    int64_t pages_evicted, pages_copied;
} attn_tree_stats;
ATTN_DEF void attn_tree_get_stats(const attn_tree *t, attn_tree_stats *out);

// Checks every invariant (reference counts, links, fills, hash index); ATTN_OK or ERR_CORRUPT.
// O(nodes + pages). For tests and debugging.
ATTN_DEF attn_result attn_tree_check(const attn_tree *t);

// ==== >>blob  Saving and loading a branch ========================================================

// Moves token_bytes * n_tokens bytes of canonical rows (all layers, K and V, as the caller composes
// them, e.g. from attn_kv_read_rows) between rows and the given slots of a page. Nonzero: failure.
typedef int (*attn_rows_fn)(void *user, int32_t page, int32_t place, int32_t n_tokens, void *rows);

// A sequence as a versioned, checksummed little-endian blob: header, token ids, rows.
ATTN_DEF size_t attn_tree_save_bytes(const attn_tree *t, int32_t seq, size_t token_bytes);
// mem: attn_tree_save_bytes long. read is called for runs of slots in ascending order.
ATTN_DEF attn_result attn_tree_save(const attn_tree *t, int32_t seq, size_t token_bytes,
                                    attn_rows_fn read, void *user, void *mem, size_t bytes);
// Checks the whole blob first (ERR_CORRUPT, ERR_VERSION, ERR_SHAPE when token_bytes differs), then
// opens a sequence in namespace ns that holds its tokens; write is called for the slots that were not
// cached already. copies as in append: carry them out before the write callbacks can matter, that is
// load calls copy first (may be NULL when the tree is empty). ERR_FULL, ERR_CALLBACK undo everything.
typedef int (*attn_copy_fn)(void *user, const attn_page_copy *copy);
ATTN_DEF attn_result attn_tree_load(attn_tree *t, uint64_t ns, size_t token_bytes, attn_rows_fn write,
                                    attn_copy_fn copy, void *user, const void *mem, size_t bytes,
                                    int32_t *seq);

#endif // ATTN_H

// ==== Stop here if you only want the API. ========================================================

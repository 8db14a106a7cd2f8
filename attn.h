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
    int32_t max_nodes;   // (default 0: 2 * n_pages + max_seq + 64: never runs out while fewer than 63
                         // prefixes are pinned or end where the priority changes)
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
// V before anyone runs attention over them, or truncates; take the slots from attn_tree_pages
// right after the call: a later append may move the sequence's end to a copy of its last page. Page
// copies are appended to copies (capacity max_copies, *n_copies counts on; ERR_BUFFER); at most one per
// call. Carry them out in their order, in every layer, after the stores of tokens appended before them
// and before attention; stores of later tokens may come before or after. Both pages stay as they are
// until attn_tree_ack. Makes room by evicting cached leaves; a hopeless request evicts nothing.
// ERR_FULL undoes everything. It may come one page early for each border page kept in two copies.
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

// Shortens a sequence to n_tokens. Tokens stay as long as another sequence holds them, or once one that
// held them was released with keep, or they were pinned; else they are dropped and their pages freed
// (rollback of a draft). ERR_FULL: a node was needed and there was none, see max_nodes.
ATTN_DEF attn_result attn_tree_truncate(attn_tree *t, int32_t seq, int32_t n_tokens);

// Ends a sequence. keep = 1: its tokens stay cached until evicted; 0: as truncate to 0 first.
ATTN_DEF attn_result attn_tree_release(attn_tree *t, int32_t seq, int keep);

// Pins (+1) or unpins (-1) a cached prefix against eviction; its exact tokens must be in the tree
// (ERR_NOT_FOUND) and stay cached when unpinned. Pins count. ERR_FULL: out of nodes.
ATTN_DEF attn_result attn_tree_pin(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                   int delta);

// Prefixes of higher priority are evicted later (default 0). Applies to the tokens that the sequence
// holds now (sets, not raises); tokens appended later have 0 again.
ATTN_DEF attn_result attn_tree_priority(attn_tree *t, int32_t seq, int32_t priority);

// Frees pages of unpinned, unused leaves, lowest priority first, then least recently used, each from
// its tail, until n_pages were freed or none is left; *n_freed may be NULL. n_pages < 0: everything.
ATTN_DEF attn_result attn_tree_evict(attn_tree *t, int32_t n_pages, int32_t *n_freed);

ATTN_DEF int32_t attn_tree_length(const attn_tree *t, int32_t seq); // tokens; < 0: an attn_result
// Copies tokens [first, first + n) of the sequence to out.
ATTN_DEF attn_result attn_tree_tokens(const attn_tree *t, int32_t seq, int32_t first, int32_t n,
                                      int32_t *out);
// Writes the sequence's page ids to out; returns how many ((length + page_tokens - 1) / page_tokens),
// or an attn_result < 0 (ERR_BUFFER when capacity is less).
ATTN_DEF int32_t attn_tree_pages(const attn_tree *t, int32_t seq, int32_t *out, int32_t capacity);
// Writes to order the permutation of seqs (n handles) that puts common prefixes side by side: by
// namespace, then token by token, a prefix before what continues it, ties by place in seqs (so it
// depends on the tokens only). scratch: n int32. For attn_desc.seq_order.
ATTN_DEF attn_result attn_tree_order(const attn_tree *t, const int32_t *seqs, int32_t n,
                                     int32_t *order, int32_t *scratch);

typedef struct attn_tree_stats {
    int32_t n_pages, n_free, n_nodes, n_seq;
    int64_t tokens_cached;   // tokens held by nodes
    int64_t tokens_hit;      // since init: tokens that open and append found cached
    int64_t tokens_missed;   // ... and that append gave new slots
    int64_t tokens_evicted, pages_evicted, pages_copied;
} attn_tree_stats;
ATTN_DEF void attn_tree_get_stats(const attn_tree *t, attn_tree_stats *out);

// Checks every invariant (reference counts, links, fills, hash index); ATTN_OK or ERR_CORRUPT.
// O(nodes + pages + tokens). For tests and debugging. Uses scratch in the tree, as save does: both need
// the lock of a writer.
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
// opens a sequence in namespace ns that holds its tokens; write is called for the slots that were
// not cached already. copies as in append: carry them out before the write callbacks can matter,
// that is load calls copy first, and the tokens of the tree must have been stored (NULL:
// ERR_ARGUMENT when a copy is needed). write must not change rows. ERR_FULL, ERR_CALLBACK undo
// everything.
typedef int (*attn_copy_fn)(void *user, const attn_page_copy *copy);
ATTN_DEF attn_result attn_tree_load(attn_tree *t, uint64_t ns, size_t token_bytes,
                                    attn_rows_fn write, attn_copy_fn copy, void *user,
                                    const void *mem, size_t bytes, int32_t *seq);

#endif // ATTN_H

// ==== Stop here if you only want the API. ========================================================

#if defined(ATTN_IMPLEMENTATION) || defined(ATTN_CORE_IMPLEMENTATION)
#ifndef ATTNI_CORE_IMPLEMENTED
#define ATTNI_CORE_IMPLEMENTED

#include <string.h>

// ==== >>impl-pool  Pages and their reference counts ==============================================

#define ATTNI_ALIGN 16 /* of every array carved out of a caller's block */

// Lays arrays out one behind the other from *at on; base = NULL only adds the sizes up.
static void *attni_carve(unsigned char *base, uint64_t *at, int64_t count, size_t size) {
    uint64_t place = *at;
    uint64_t bytes = (uint64_t)count * size;
    *at = place + (bytes + (ATTNI_ALIGN - 1)) / ATTNI_ALIGN * ATTNI_ALIGN;
    return base ? (void *)(base + place) : (void *)0;
}

// The first aligned byte of a block; sizes include ATTNI_ALIGN of slack for it.
static unsigned char *attni_align(void *mem) {
    uintptr_t at = (uintptr_t)mem;
    return (unsigned char *)mem + (size_t)((0 - at) & (uintptr_t)(ATTNI_ALIGN - 1));
}

static uint64_t attni_pool_layout(attn_pool *pool, int32_t n_pages, unsigned char *base) {
    uint64_t at = 0;
    pool->ref = (int32_t *)attni_carve(base, &at, n_pages, sizeof(int32_t));
    pool->free = (int32_t *)attni_carve(base, &at, n_pages, sizeof(int32_t));
    return at;
}

// Low page ids are handed out first.
static void attni_pool_reset(attn_pool *pool, int32_t n_pages) {
    int32_t i;
    pool->n_pages = pool->n_free = n_pages;
    for (i = 0; i < n_pages; i++) {
        pool->ref[i] = 0;
        pool->free[i] = n_pages - 1 - i;
    }
}

ATTN_DEF size_t attn_pool_bytes(int32_t n_pages) {
    attn_pool pool;
    uint64_t bytes;
    if (n_pages < 1) return 0;
    bytes = attni_pool_layout(&pool, n_pages, (unsigned char *)0) + ATTNI_ALIGN;
    return bytes > (uint64_t)SIZE_MAX ? 0 : (size_t)bytes;
}

ATTN_DEF attn_result attn_pool_init(attn_pool *pool, int32_t n_pages, void *mem, size_t bytes) {
    if (!pool || !mem || n_pages < 1) return ATTN_ERR_ARGUMENT;
    if (attn_pool_bytes(n_pages) == 0) return ATTN_ERR_OVERFLOW;
    if (bytes < attn_pool_bytes(n_pages)) return ATTN_ERR_BUFFER;
    (void)attni_pool_layout(pool, n_pages, attni_align(mem));
    attni_pool_reset(pool, n_pages);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_pool_alloc(attn_pool *pool, int32_t *page) {
    if (!pool || !page) return ATTN_ERR_ARGUMENT;
    if (pool->n_free == 0) return ATTN_ERR_FULL;
    *page = pool->free[--pool->n_free];
    pool->ref[*page] = 1;
    return ATTN_OK;
}

ATTN_DEF attn_result attn_pool_retain(attn_pool *pool, int32_t page) {
    if (!pool) return ATTN_ERR_ARGUMENT;
    if (page < 0 || page >= pool->n_pages || pool->ref[page] == 0) return ATTN_ERR_PAGE;
    if (pool->ref[page] == INT32_MAX) return ATTN_ERR_OVERFLOW;
    pool->ref[page]++;
    return ATTN_OK;
}

ATTN_DEF attn_result attn_pool_release(attn_pool *pool, int32_t page) {
    if (!pool) return ATTN_ERR_ARGUMENT;
    if (page < 0 || page >= pool->n_pages || pool->ref[page] == 0) return ATTN_ERR_PAGE;
    if (--pool->ref[page] == 0) pool->free[pool->n_free++] = page;
    return ATTN_OK;
}

// ==== >>impl-tree  Token prefixes -> pages =======================================================
//
// Nodes. A namespace is a root without tokens; every other node holds tokens [start, end), end >
// start, and its parent ends where it starts. Sequences and pins sit exactly at the end of a node:
// a border is cut where one is needed and removed (attni_node_merge) as soon as nothing needs it. A
// border is needed by a fork of the path, a sequence, a pin, or a change of `cached` or `priority`.
// Hence the number of nodes: leaves <= n_pages (two leaves never share a page), nodes with several
// children and roots of non-empty namespaces <= leaves, other borders and empty roots <= sequences
// (a change of `cached` is charged to a sequence below it) + pins + changes of priority, + 1 while
// cutting.
//
// Pages. Position p lies in slot p % page_tokens of its page, and the page knows its token ids. A
// node lists every page that holds one of its tokens, linked by next / prev. A page may be listed
// by a node and by the child that continues in it, and by that child's child ...: always a downward
// chain of nodes, each but the deepest ending inside the page, each but the topmost starting inside
// it. So a page is non-last in one node at most (the deepest) and non-first in one at most (the
// topmost): one next and one prev per page suffice. A second child that starts inside the page
// takes a copy.
//   ref[page]  = nodes that list it + copies not acknowledged that read or write it
//   fill[page] = end of the deepest of those nodes in it, in slots: where a child that starts there
//                may continue in place
//   hold[page] = held nodes that list it + such copies
// A node is held while a sequence or pin sits in its subtree. What is not held can all be evicted,
// so "n_free + pages not held" answers whether a request is hopeless before anything is evicted.
//
// cached: a sequence released with keep, or a pin, covers the node; prefix-closed. Tokens that are
// not cached vanish with the last sequence that holds them: an uncached leaf always has a sequence.

typedef struct attni_tree_node {
    uint64_t key;       // root: the namespace; else the first token. (parent, key) is the hash key
    int64_t last_use;   // tick at which a sequence left it, or a removed child
    int32_t parent;     // -1: root; of an unused node: the next unused one
    int32_t n_child;    // children are found by hash; no lists
    int32_t child_xor;  // XOR of the children's ids: names an only child
    int32_t start, end; // start -1: unused node
    int32_t first_page, last_page; // -1 in roots
    int32_t first_seq;             // list of the sequences that end here
    int32_t pins;
    int32_t held; // sequences and pins here + children with held > 0
    int32_t priority;
    int32_t heap_at; // -1: cannot be evicted now (root, has children, held)
    int32_t cached;
} attni_tree_node;

typedef struct attni_tree_seq {
    int32_t node;       // -1: unused
    int32_t prev, next; // in the node's list; next also links unused slots
} attni_tree_seq;

struct attn_tree {
    int32_t n_pages, page_tokens, max_seq, max_nodes;
    int32_t n_nodes, n_held_nodes, free_node;
    int32_t n_seq, free_seq;
    int32_t n_held_pages;
    int32_t n_heap;
    uint32_t table_mask;
    int64_t tick;
    attn_pool pool;
    attn_tree_stats count; // the counters since init and tokens_cached
    attni_tree_node *node; // (max_nodes)
    attni_tree_seq *seq;   // (max_seq)
    int32_t *heap;         // (max_nodes) nodes that can be evicted, the next victim first
    int32_t *table;        // (table_mask + 1) open addressing, -1: empty
    int32_t *next, *prev;  // (n_pages) order inside a node
    int32_t *fill, *hold;  // (n_pages)
    int32_t *copy_src;     // (n_pages) source of the copy into this page not acknowledged, or -1
    int32_t *n_copying;    // (n_pages) such copies that read or write the page
    int32_t *lock;         // (n_pages) slots below are read or written by them: not to be reused
    int32_t *token;        // (n_pages, page_tokens)
    int32_t *scratch;      // (2 * n_pages + 3 * max_nodes) for check, save and load
};

// ---- pages

static int32_t *attni_page_token(const attn_tree *t, int32_t page, int32_t slot) {
    return t->token + (int64_t)page * t->page_tokens + slot;
}

static void attni_page_hold(attn_tree *t, int32_t page, int32_t delta) {
    int32_t was = t->hold[page];
    t->hold[page] = was + delta;
    if (was == 0 || was + delta == 0) t->n_held_pages += delta;
}

// A node, held or not, no longer lists the page.
static void attni_page_drop(attn_tree *t, int32_t page, int held) {
    if (held) attni_page_hold(t, page, -1);
    (void)attn_pool_release(&t->pool, page);
}

// A copy reads or writes the first n_tokens slots of the page: until it was carried out the page is
// not freed nor, after a truncation say, those slots given to other tokens. So it does not matter
// whether copies run before or after the stores of tokens appended later.
static void attni_page_begin_copy(attn_tree *t, int32_t page, int32_t n_tokens) {
    attni_page_hold(t, page, 1);
    (void)attn_pool_retain(&t->pool, page);
    t->n_copying[page]++;
    if (t->lock[page] < n_tokens) t->lock[page] = n_tokens;
}

static void attni_page_end_copy(attn_tree *t, int32_t page) {
    if (--t->n_copying[page] == 0) t->lock[page] = 0;
    attni_page_drop(t, page, 1);
}

// The page of node x that holds position pos, from the nearer end.
static int32_t attni_node_page(const attn_tree *t, int32_t x, int32_t pos) {
    const attni_tree_node *n = t->node + x;
    int32_t at = pos / t->page_tokens;
    int32_t up = at - n->start / t->page_tokens, down = (n->end - 1) / t->page_tokens - at;
    int32_t page = up <= down ? n->first_page : n->last_page;
    if (up <= down) {
        while (up-- > 0) page = t->next[page];
    } else {
        while (down-- > 0) page = t->prev[page];
    }
    return page;
}

// ---- the heap of nodes that can be evicted: a binary heap over (priority, last_use)

static int attni_heap_before(const attn_tree *t, int32_t x, int32_t y) {
    const attni_tree_node *a = t->node + x, *b = t->node + y;
    if (a->priority != b->priority) return a->priority < b->priority;
    if (a->last_use != b->last_use) return a->last_use < b->last_use;
    return x < y;
}

static void attni_heap_put(attn_tree *t, int32_t at, int32_t x) {
    t->heap[at] = x;
    t->node[x].heap_at = at;
}

static void attni_heap_sift(attn_tree *t, int32_t at) {
    int32_t x = t->heap[at], up, down;
    while (at > 0 && attni_heap_before(t, x, t->heap[up = (at - 1) / 2])) {
        attni_heap_put(t, at, t->heap[up]);
        at = up;
    }
    while (at < t->n_heap / 2) {
        down = 2 * at + 1;
        if (down + 1 < t->n_heap && attni_heap_before(t, t->heap[down + 1], t->heap[down])) down++;
        if (!attni_heap_before(t, t->heap[down], x)) break;
        attni_heap_put(t, at, t->heap[down]);
        at = down;
    }
    attni_heap_put(t, at, x);
}

// Called whenever children, held, priority or last_use of x changed.
static void attni_node_rank(attn_tree *t, int32_t x) {
    attni_tree_node *n = t->node + x;
    int32_t at = n->heap_at, last;
    if (n->parent >= 0 && n->n_child == 0 && n->held == 0) {
        if (at < 0) attni_heap_put(t, at = t->n_heap++, x);
        attni_heap_sift(t, at);
    } else if (at >= 0) {
        n->heap_at = -1;
        last = t->heap[--t->n_heap];
        if (last == x) return;
        attni_heap_put(t, at, last);
        attni_heap_sift(t, at);
    }
}

// ---- the hash index (parent, key) -> node. Keys are compared exactly. Deletion shifts back.

static uint32_t attni_tree_hash(int32_t parent, uint64_t key) {
    uint64_t h = (key ^ ((uint64_t)(uint32_t)parent << 32)) * 0x9e3779b97f4a7c15u;
    h = (h ^ (uint64_t)(uint32_t)parent ^ (h >> 29)) * 0xbf58476d1ce4e5b9u;
    return (uint32_t)(h >> 32);
}
#ifndef ATTNI_HASH /* a test makes every hash collide */
#define ATTNI_HASH(parent, key) attni_tree_hash(parent, key)
#endif

static int32_t attni_index_find(const attn_tree *t, int32_t parent, uint64_t key) {
    uint32_t i = ATTNI_HASH(parent, key) & t->table_mask;
    int32_t x;
    for (; (x = t->table[i]) >= 0; i = (i + 1) & t->table_mask)
        if (t->node[x].parent == parent && t->node[x].key == key) return x;
    return -1;
}

static void attni_index_add(attn_tree *t, int32_t x) {
    uint32_t i = ATTNI_HASH(t->node[x].parent, t->node[x].key) & t->table_mask;
    while (t->table[i] >= 0) i = (i + 1) & t->table_mask;
    t->table[i] = x;
}

static void attni_index_remove(attn_tree *t, int32_t x) {
    uint32_t mask = t->table_mask, home, j;
    uint32_t i = ATTNI_HASH(t->node[x].parent, t->node[x].key) & mask;
    while (t->table[i] != x) i = (i + 1) & mask;
    // Entries behind the hole move into it unless their home lies behind the hole.
    for (j = (i + 1) & mask; t->table[j] >= 0; j = (j + 1) & mask) {
        const attni_tree_node *n = t->node + t->table[j];
        home = ATTNI_HASH(n->parent, n->key) & mask;
        if (((j - home) & mask) < ((j - i) & mask)) continue;
        t->table[i] = t->table[j];
        i = j;
    }
    t->table[i] = -1;
}

// ---- nodes

// The caller made sure that there is an unused one. It has no pages yet.
static int32_t attni_node_new(attn_tree *t, int32_t parent, uint64_t key, int32_t start) {
    int32_t x = t->free_node;
    attni_tree_node *n = t->node + x;
    t->free_node = n->parent;
    t->n_nodes++;
    memset(n, 0, sizeof *n);
    n->key = key;
    n->last_use = t->tick;
    n->parent = parent;
    n->start = n->end = start;
    n->first_page = n->last_page = n->first_seq = n->heap_at = -1;
    attni_index_add(t, x);
    if (parent >= 0) {
        t->node[parent].n_child++;
        t->node[parent].child_xor ^= x;
        attni_node_rank(t, parent);
    }
    return x;
}

// x: a node without children, pages or holders.
static void attni_node_free(attn_tree *t, int32_t x) {
    attni_tree_node *n = t->node + x;
    int32_t parent = n->parent;
    attni_index_remove(t, x);
    n->n_child = 1; // takes it out of the heap
    attni_node_rank(t, x);
    n->start = -1;
    n->parent = t->free_node;
    t->free_node = x;
    t->n_nodes--;
    if (parent >= 0) {
        t->node[parent].n_child--;
        t->node[parent].child_xor ^= x;
        attni_node_rank(t, parent);
    }
}

// One sequence or pin more or less at x. Costs O(1) unless pages begin or cease to be held.
static void attni_node_hold(attn_tree *t, int32_t x, int32_t delta) {
    for (; x >= 0; x = t->node[x].parent) {
        attni_tree_node *n = t->node + x;
        int32_t was = n->held, page = n->first_page;
        n->held = was + delta;
        if (was != 0 && was + delta != 0) return;
        t->n_held_nodes += delta;
        for (; page >= 0; page = page == n->last_page ? -1 : t->next[page])
            attni_page_hold(t, page, delta);
        attni_node_rank(t, x);
    }
}

// Cuts x at pos, start < pos < end, there being an unused node: a new upper half takes its place in
// the parent, x becomes the lower half and keeps children, sequences and pins (all behind pos).
static int32_t attni_node_split(attn_tree *t, int32_t x, int32_t pos) {
    attni_tree_node *low = t->node + x, *up;
    int32_t border = attni_node_page(t, x, pos - 1), u;
    attni_index_remove(t, x);
    u = attni_node_new(t, low->parent, low->key, low->start);
    up = t->node + u;
    t->node[low->parent].n_child--; // low has a parent: roots are never cut
    t->node[low->parent].child_xor ^= x;
    up->end = pos;
    up->first_page = low->first_page;
    up->last_page = border;
    up->last_use = low->last_use;
    up->priority = low->priority;
    up->cached = low->cached;
    up->n_child = 1;
    up->child_xor = x;
    up->held = low->held > 0;
    t->n_held_nodes += up->held;
    if (pos % t->page_tokens != 0) { // inside a page: both halves list it
        low->first_page = border;
        (void)attn_pool_retain(&t->pool, border);
        if (low->held > 0) attni_page_hold(t, border, 1);
    } else {
        low->first_page = t->next[border];
    }
    low->start = pos;
    low->parent = u;
    low->key = (uint32_t)*attni_page_token(t, low->first_page, pos % t->page_tokens);
    attni_index_add(t, x);
    attni_node_rank(t, u);
    return u;
}

// Removes the border between u and its only child if nothing needs it: the child takes over u's
// tokens and place. The pages of a live sequence never change by it: none ends at u, and those
// below read the child's copy of a page that u and the child list apart.
static int attni_node_merge(attn_tree *t, int32_t u) {
    attni_tree_node *up = t->node + u, *low;
    int32_t x = up->child_xor, page = up->last_page;
    if (up->parent < 0 || up->n_child != 1 || up->first_seq >= 0 || up->pins > 0) return 0;
    low = t->node + x;
    if (low->cached != up->cached || low->priority != up->priority) return 0;
    if (up->end % t->page_tokens == 0) {
        t->next[page] = low->first_page;
        t->prev[low->first_page] = page;
        low->first_page = up->first_page;
    } else {
        if (page == low->first_page) {
            low->first_page = up->first_page;
        } else if (page == up->first_page) {
            t->fill[page] = up->start % t->page_tokens; // where a parent that lists it ends
        } else {
            t->next[t->prev[page]] = low->first_page;
            t->prev[low->first_page] = t->prev[page];
            low->first_page = up->first_page;
        }
        attni_page_drop(t, page, up->held > 0);
    }
    t->n_held_nodes -= up->held > 0;
    attni_index_remove(t, x);
    low->parent = up->parent;
    low->start = up->start;
    t->node[low->parent].n_child++;
    t->node[low->parent].child_xor ^= x;
    if (low->last_use < up->last_use) low->last_use = up->last_use;
    low->key = up->key;
    up->held = 0;
    attni_node_free(t, u);
    attni_index_add(t, x);
    attni_node_rank(t, x);
    return 1;
}

// Shortens a leaf to end > start.
static void attni_node_trim(attn_tree *t, int32_t x, int32_t end) {
    attni_tree_node *n = t->node + x;
    int32_t at = (n->end - 1) / t->page_tokens, keep = (end - 1) / t->page_tokens;
    for (; at > keep; at--) {
        int32_t page = n->last_page;
        n->last_page = t->prev[page];
        attni_page_drop(t, page, n->held > 0);
    }
    t->fill[n->last_page] = (end - 1) % t->page_tokens + 1;
    t->count.tokens_cached -= n->end - end;
    n->end = end;
}

// Removes a node without children that is not held. Its first page may stay with the parent.
static void attni_node_remove(attn_tree *t, int32_t x) {
    attni_tree_node *n = t->node + x;
    int32_t page = n->last_page, before;
    for (; page >= 0; page = before) {
        before = page == n->first_page ? -1 : t->prev[page];
        if (before < 0) t->fill[page] = n->start % t->page_tokens;
        attni_page_drop(t, page, 0);
    }
    t->count.tokens_cached -= n->end - n->start;
    if (n->parent >= 0 && t->node[n->parent].last_use < n->last_use)
        t->node[n->parent].last_use = n->last_use;
    attni_node_free(t, x);
}

// A holder or a child of x went away: removes what nobody needs from x upwards.
static void attni_node_prune(attn_tree *t, int32_t x) {
    while (t->node[x].n_child == 0 && t->node[x].held == 0 &&
           (t->node[x].parent < 0 || !t->node[x].cached)) {
        int32_t parent = t->node[x].parent;
        attni_node_remove(t, x);
        if (parent < 0) return;
        x = parent;
    }
    (void)attni_node_merge(t, x);
}

// Marks the path of x as cached, or gives it a priority, and drops the borders this makes needless.
static void attni_path_set(attn_tree *t, int32_t x, int cached, const int32_t *priority) {
    int32_t y;
    for (y = x; t->node[y].parent >= 0; y = t->node[y].parent) {
        if (cached) t->node[y].cached = 1;
        if (priority) t->node[y].priority = *priority;
        attni_node_rank(t, y);
    }
    for (y = x; t->node[y].parent >= 0;)
        if (!attni_node_merge(t, t->node[y].parent)) y = t->node[y].parent;
}

// ---- making room

// Trims a leaf, page by page from its tail, until the pool has n_free pages or the leaf is gone.
static void attni_tree_shrink(attn_tree *t, int32_t x, int32_t n_free) {
    int32_t before = t->pool.n_free, parent = t->node[x].parent, cut;
    int64_t tokens = t->count.tokens_cached;
    do {
        cut = (t->node[x].end - 1) / t->page_tokens * t->page_tokens;
        if (cut > t->node[x].start) {
            attni_node_trim(t, x, cut);
        } else {
            attni_node_remove(t, x);
            attni_node_prune(t, parent);
            break;
        }
    } while (t->pool.n_free < n_free);
    t->count.tokens_evicted += tokens - t->count.tokens_cached;
    t->count.pages_evicted += t->pool.n_free - before;
}

// Evicts until that many pages and nodes are unused; 0, and nothing done, when that cannot be.
static int attni_tree_room(attn_tree *t, int64_t pages, int32_t nodes) {
    if (pages > (int64_t)t->n_pages - t->n_held_pages) return 0;
    if (nodes > t->max_nodes - t->n_held_nodes) return 0;
    while (t->pool.n_free < pages) attni_tree_shrink(t, t->heap[0], (int32_t)pages);
    while (t->max_nodes - t->n_nodes < nodes) attni_tree_shrink(t, t->heap[0], INT32_MAX);
    return 1;
}

static void attni_node_pin(attn_tree *t, int32_t x, int32_t delta) {
    t->node[x].pins += delta;
    attni_node_hold(t, x, delta);
}

// The node on x's tokens that ends at pos, start < pos <= end (or x is a root); -1: out of nodes.
static int32_t attni_tree_cut(attn_tree *t, int32_t x, int32_t pos) {
    int32_t u = -1;
    if (pos == t->node[x].end) return x;
    if (t->n_nodes < t->max_nodes) return attni_node_split(t, x, pos);
    attni_node_pin(t, x, 1); // or eviction might take x, or merge it away
    if (attni_tree_room(t, 0, 1)) u = attni_node_split(t, x, pos);
    attni_node_pin(t, x, -1);
    (void)attni_node_merge(t, x);
    return u;
}

// ---- walking

// Tokens that follow the end of *node in the tree, as far as they equal tokens[0 .. n). *node
// becomes the node in which they end (unchanged when there are none).
static int32_t attni_tree_walk(const attn_tree *t, int32_t *node, const int32_t *tokens,
                               int32_t n) {
    int32_t done = 0, pt = t->page_tokens, x, page, pos;
    while (done < n && (x = attni_index_find(t, *node, (uint32_t)tokens[done])) >= 0) {
        const attni_tree_node *c = t->node + x;
        *node = x;
        page = c->first_page;
        for (pos = c->start; pos < c->end; pos++, done++) {
            if (pos > c->start && pos % pt == 0) page = t->next[page];
            if (done == n || *attni_page_token(t, page, pos % pt) != tokens[done]) return done;
        }
    }
    return done;
}

static int attni_tree_is_seq(const attn_tree *t, int32_t seq) {
    return seq >= 0 && seq < t->max_seq && t->seq[seq].node >= 0;
}

static void attni_seq_link(attn_tree *t, int32_t s, int32_t x) {
    attni_tree_seq *q = t->seq + s;
    q->node = x;
    q->prev = -1;
    q->next = t->node[x].first_seq;
    if (q->next >= 0) t->seq[q->next].prev = s;
    t->node[x].first_seq = s;
    attni_node_hold(t, x, 1);
}

static void attni_seq_unlink(attn_tree *t, int32_t s) {
    attni_tree_seq *q = t->seq + s;
    if (q->prev >= 0)
        t->seq[q->prev].next = q->next;
    else
        t->node[q->node].first_seq = q->next;
    if (q->next >= 0) t->seq[q->next].prev = q->prev;
}

// The new place is held before the old one is let go, so that the common path costs nothing.
static void attni_seq_move(attn_tree *t, int32_t s, int32_t x) {
    int32_t from = t->seq[s].node;
    if (from == x) return;
    attni_seq_unlink(t, s);
    attni_seq_link(t, s, x);
    attni_node_hold(t, from, -1);
    attni_node_prune(t, from);
}

// A new sequence at x; there is an unused slot.
static int32_t attni_seq_new(attn_tree *t, int32_t x) {
    int32_t s = t->free_seq;
    t->free_seq = t->seq[s].next;
    t->n_seq++;
    attni_seq_link(t, s, x);
    return s;
}

static void attni_seq_free(attn_tree *t, int32_t s) {
    int32_t x = t->seq[s].node;
    attni_seq_unlink(t, s);
    t->seq[s].node = -1;
    t->seq[s].next = t->free_seq;
    t->free_seq = s;
    t->n_seq--;
    attni_node_hold(t, x, -1);
    attni_node_prune(t, x);
}

// ---- set-up

// The layout for a description with its defaults filled in; 0: invalid or too large.
static uint64_t attni_tree_layout(const attn_tree_desc *desc, unsigned char *base, attn_tree *t) {
    uint64_t at = 0, table = 1;
    int64_t p = desc->n_pages, s = desc->max_seq, n = desc->max_nodes;
    if (p < 1 || desc->page_tokens < 1 || s < 0 || n < 0) return 0;
    if (s == 0) s = 256;
    if (n == 0) n = 2 * p + s + 64;
    if (n > INT32_MAX / 2 || p > ((int64_t)1 << 48) / desc->page_tokens) return 0;
    while (table < 2 * (uint64_t)n) table *= 2;
    (void)attni_carve(base, &at, 1, sizeof *t);
    at += attni_pool_layout(&t->pool, desc->n_pages, base ? base + at : base);
    t->n_pages = desc->n_pages;
    t->page_tokens = desc->page_tokens;
    t->max_seq = (int32_t)s;
    t->max_nodes = (int32_t)n;
    t->table_mask = (uint32_t)(table - 1);
    t->node = (attni_tree_node *)attni_carve(base, &at, n, sizeof *t->node);
    t->seq = (attni_tree_seq *)attni_carve(base, &at, s, sizeof *t->seq);
    t->heap = (int32_t *)attni_carve(base, &at, n, sizeof(int32_t));
    t->table = (int32_t *)attni_carve(base, &at, (int64_t)table, sizeof(int32_t));
    t->next = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->prev = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->fill = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->hold = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->copy_src = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->n_copying = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->lock = (int32_t *)attni_carve(base, &at, p, sizeof(int32_t));
    t->token = (int32_t *)attni_carve(base, &at, p * desc->page_tokens, sizeof(int32_t));
    t->scratch = (int32_t *)attni_carve(base, &at, 2 * p + 3 * n, sizeof(int32_t));
    return at + ATTNI_ALIGN;
}

ATTN_DEF size_t attn_tree_bytes(const attn_tree_desc *desc) {
    attn_tree t;
    uint64_t bytes = desc ? attni_tree_layout(desc, (unsigned char *)0, &t) : 0;
    return bytes > (uint64_t)SIZE_MAX ? 0 : (size_t)bytes;
}

ATTN_DEF attn_result attn_tree_init(const attn_tree_desc *desc, void *mem, size_t bytes,
                                    attn_tree **tree) {
    size_t need = attn_tree_bytes(desc);
    unsigned char *base;
    attn_tree *t;
    int32_t i;
    if (!desc || !mem || !tree || need == 0) return ATTN_ERR_ARGUMENT;
    if (bytes < need) return ATTN_ERR_BUFFER;
    base = attni_align(mem);
    t = (attn_tree *)(void *)base;
    memset(t, 0, sizeof *t);
    (void)attni_tree_layout(desc, base, t);
    attni_pool_reset(&t->pool, t->n_pages);
    for (i = 0; i < t->n_pages; i++) {
        t->next[i] = t->prev[i] = t->copy_src[i] = -1;
        t->fill[i] = t->hold[i] = t->n_copying[i] = t->lock[i] = 0;
    }
    for (i = 0; i < t->max_nodes; i++) {
        t->node[i].start = t->node[i].heap_at = -1;
        t->node[i].parent = i + 1 < t->max_nodes ? i + 1 : -1;
    }
    for (i = 0; i < t->max_seq; i++) {
        t->seq[i].node = -1;
        t->seq[i].next = i + 1 < t->max_seq ? i + 1 : -1;
    }
    memset(t->table, 0xff, ((size_t)t->table_mask + 1) * sizeof(int32_t));
    *tree = t;
    return ATTN_OK;
}

// ---- the calls

ATTN_DEF int32_t attn_tree_match(const attn_tree *t, uint64_t ns, const int32_t *tokens,
                                 int32_t n) {
    int32_t x;
    if (!t || n < 0 || (!tokens && n > 0)) return ATTN_ERR_ARGUMENT;
    x = attni_index_find(t, -1, ns);
    return x < 0 ? 0 : attni_tree_walk(t, &x, tokens, n);
}

ATTN_DEF attn_result attn_tree_open(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                    int32_t *seq, int32_t *n_cached) {
    int32_t x, hit = 0;
    if (!t || !seq || n < 0 || (!tokens && n > 0)) return ATTN_ERR_ARGUMENT;
    if (t->n_seq == t->max_seq) return ATTN_ERR_FULL;
    x = attni_index_find(t, -1, ns);
    if (x >= 0) {
        hit = attni_tree_walk(t, &x, tokens, n);
        x = attni_tree_cut(t, x, hit);
    } else if (attni_tree_room(t, 0, 1)) {
        x = attni_node_new(t, -1, ns, 0);
    }
    if (x < 0) return ATTN_ERR_FULL;
    *seq = attni_seq_new(t, x);
    if (n_cached) *n_cached = hit;
    t->count.tokens_hit += hit;
    return ATTN_OK;
}

// Must tokens behind x go to a copy of its last page?
static int attni_node_must_copy(const attn_tree *t, int32_t x) {
    int32_t slot = t->node[x].end % t->page_tokens, page = t->node[x].last_page;
    return slot != 0 && (t->fill[page] > slot || t->lock[page] > slot);
}

// May s, about to sit alone with new tokens behind x, lengthen x itself? They are neither cached
// nor of any priority. pins: those of the call in progress.
static int attni_node_extends(const attn_tree *t, int32_t x, int32_t s, int32_t pins) {
    const attni_tree_node *n = t->node + x;
    return n->parent >= 0 && n->n_child == 0 && n->pins == pins && !n->cached && n->priority == 0 &&
           n->first_seq == s && t->seq[s].next < 0 && !attni_node_must_copy(t, x);
}

// Is a copy of x's last page needed only because of a child that continues in it and that nobody
// holds? The page names that child's first token.
static int attni_node_owns_tail(const attn_tree *t, int32_t x) {
    int32_t slot = t->node[x].end % t->page_tokens, page = t->node[x].last_page;
    if (t->lock[page] > slot) return 0;
    x = attni_index_find(t, x, (uint32_t)*attni_page_token(t, page, slot));
    return t->node[x].held == 0;
}

// Held pages that fall free all the same when everything is evicted: then u merges with the one
// child that is held, which has its own copy of u's last page.
static int32_t attni_tree_doubled(const attn_tree *t) {
    int32_t x, n = 0;
    for (x = 0; x < t->max_nodes; x++) {
        const attni_tree_node *c = t->node + x, *u = t->node + c->parent;
        if (c->start < 1 || c->held == 0 || c->start % t->page_tokens == 0) continue;
        n += u->held == 1 && u->first_seq < 0 && u->pins == 0 && u->cached == c->cached &&
             u->priority == c->priority && u->last_page != c->first_page &&
             t->hold[u->last_page] == 1;
    }
    return n;
}

// Room for n tokens of s behind x, which is pinned: pages, a node, a place for the copy. Where
// simply evicting falls short, evicting everything may also free doubled pages and spare the copy:
// a sequence may fill the whole pool whatever is cached.
static attn_result attni_tree_reserve(attn_tree *t, int32_t s, int32_t x, int32_t n, int can_copy) {
    int64_t pt = t->page_tokens, end = t->node[x].end;
    int copy = attni_node_must_copy(t, x), node = !attni_node_extends(t, x, s, 1), less;
    int64_t pages = (end + n + pt - 1) / pt - (end + pt - 1) / pt;
    if (n == 0) return ATTN_OK;
    if (copy && !can_copy) return ATTN_ERR_BUFFER;
    if (attni_tree_room(t, pages + copy, node)) return ATTN_OK;
    less = copy && attni_node_owns_tail(t, x);
    if (t->n_heap == 0 || t->n_held_nodes + node > t->max_nodes ||
        pages + copy - less > (int64_t)t->n_pages - t->n_held_pages + attni_tree_doubled(t))
        return ATTN_ERR_FULL;
    while (t->n_heap > 0) attni_tree_shrink(t, t->heap[0], INT32_MAX);
    return attni_tree_room(t, pages + attni_node_must_copy(t, x), node) ? ATTN_OK : ATTN_ERR_FULL;
}

// A child of x that begins inside x's last page: the same page or a copy of it.
static void attni_node_begin_inside(attn_tree *t, int32_t child, int32_t x, attn_page_copy *copies,
                                    int32_t *n_copies) {
    attn_page_copy *copy;
    int32_t page = t->node[x].last_page, slot = t->node[x].end % t->page_tokens, own = page;
    if (attni_node_must_copy(t, x)) {
        (void)attn_pool_alloc(&t->pool, &own);
        memcpy(attni_page_token(t, own, 0), attni_page_token(t, page, 0),
               (size_t)slot * sizeof(int32_t));
        t->fill[own] = slot;
        t->copy_src[own] = page;
        attni_page_begin_copy(t, page, slot);
        attni_page_begin_copy(t, own, slot);
        copy = copies + (*n_copies)++;
        copy->src = page;
        copy->dst = own;
        copy->n_tokens = slot;
        t->count.pages_copied++;
    } else {
        (void)attn_pool_retain(&t->pool, page);
    }
    t->node[child].first_page = t->node[child].last_page = own;
}

// Writes n tokens at the end of x, a leaf, into pages reserved before.
static void attni_node_fill(attn_tree *t, int32_t x, const int32_t *tokens, int32_t n) {
    attni_tree_node *c = t->node + x;
    int32_t pt = t->page_tokens, done, slot, run, page = -1;
    for (done = 0; done < n; done += run) {
        slot = c->end % pt;
        run = n - done < pt - slot ? n - done : pt - slot;
        if (slot == 0) {
            (void)attn_pool_alloc(&t->pool, &page);
            if (c->held > 0) attni_page_hold(t, page, 1);
            if (c->first_page < 0) {
                c->first_page = page;
            } else {
                t->next[c->last_page] = page;
                t->prev[page] = c->last_page;
            }
            c->last_page = page;
        }
        memcpy(attni_page_token(t, c->last_page, slot), tokens + done,
               (size_t)run * sizeof(int32_t));
        t->fill[c->last_page] = slot + run;
        c->end += run;
    }
    t->count.tokens_cached += n;
    t->count.tokens_missed += n;
}

ATTN_DEF attn_result attn_tree_append(attn_tree *t, int32_t seq, const int32_t *tokens, int32_t n,
                                      int32_t *n_cached, attn_page_copy *copies, int32_t max_copies,
                                      int32_t *n_copies) {
    int32_t x, child, hit, none = 0;
    attn_result r;
    if (!t || n < 0 || (!tokens && n > 0) || max_copies < 0) return ATTN_ERR_ARGUMENT;
    if (max_copies > 0 && (!copies || !n_copies)) return ATTN_ERR_ARGUMENT;
    if (!n_copies) n_copies = &none;
    if (*n_copies < 0 || *n_copies > max_copies) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    x = t->seq[seq].node;
    if (n > INT32_MAX - t->node[x].end) return ATTN_ERR_OVERFLOW;
    child = x;
    hit = attni_tree_walk(t, &child, tokens, n);
    x = attni_tree_cut(t, child, t->node[x].end + hit);
    if (x < 0) return ATTN_ERR_FULL;
    // Until the reservation stands the sequence stays where it is; a failure only lets the pin go.
    attni_node_pin(t, x, 1);
    r = attni_tree_reserve(t, seq, x, n - hit, *n_copies < max_copies);
    if (r == ATTN_OK) attni_seq_move(t, seq, x);
    attni_node_pin(t, x, -1);
    if (r != ATTN_OK) {
        (void)attni_node_merge(t, x);
        return r;
    }
    if (hit < n) {
        child = x;
        if (!attni_node_extends(t, x, seq, 0)) {
            child = attni_node_new(t, x, (uint32_t)tokens[hit], t->node[x].end);
            if (t->node[x].end % t->page_tokens != 0)
                attni_node_begin_inside(t, child, x, copies, n_copies);
        }
        attni_node_fill(t, child, tokens + hit, n - hit);
        attni_seq_move(t, seq, child);
    }
    if (n_cached) *n_cached = hit;
    t->count.tokens_hit += hit;
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_insert(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                      int32_t *seq, int32_t *n_cached, attn_page_copy *copies,
                                      int32_t max_copies, int32_t *n_copies) {
    int32_t s, hit;
    attn_result r;
    if (!seq) return ATTN_ERR_ARGUMENT;
    r = attn_tree_open(t, ns, tokens, n, &s, &hit);
    if (r != ATTN_OK) return r;
    r = attn_tree_append(t, s, n > 0 ? tokens + hit : tokens, n - hit, (int32_t *)0, copies,
                         max_copies, n_copies);
    if (r != ATTN_OK) {
        t->count.tokens_hit -= hit;
        attni_seq_free(t, s);
        return r;
    }
    *seq = s;
    if (n_cached) *n_cached = hit;
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_ack(attn_tree *t, const attn_page_copy *copies, int32_t n_copies) {
    int32_t i, dst;
    if (!t || n_copies < 0 || (!copies && n_copies > 0)) return ATTN_ERR_ARGUMENT;
    // Taking the marks one by one also finds a copy that is listed twice.
    for (i = 0; i < n_copies; i++) {
        dst = copies[i].dst;
        if (dst < 0 || dst >= t->n_pages || copies[i].src < 0 || t->copy_src[dst] != copies[i].src)
            break;
        t->copy_src[dst] = -1;
    }
    if (i < n_copies) {
        while (i-- > 0) t->copy_src[copies[i].dst] = copies[i].src;
        return ATTN_ERR_ARGUMENT;
    }
    for (i = 0; i < n_copies; i++) {
        attni_page_end_copy(t, copies[i].src);
        attni_page_end_copy(t, copies[i].dst);
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_fork(attn_tree *t, int32_t seq, int32_t *out) {
    if (!t || !out) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    if (t->n_seq == t->max_seq) return ATTN_ERR_FULL;
    *out = attni_seq_new(t, t->seq[seq].node);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_truncate(attn_tree *t, int32_t seq, int32_t n_tokens) {
    int32_t from, x;
    if (!t) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    x = from = t->seq[seq].node;
    if (n_tokens < 0 || n_tokens > t->node[x].end) return ATTN_ERR_ARGUMENT;
    if (n_tokens == t->node[x].end) return ATTN_OK;
    // The rollback of a draft: nobody else has the tail, and no border is needed.
    if (n_tokens > t->node[x].start && t->node[x].n_child == 0 && !t->node[x].cached &&
        t->node[x].first_seq == seq && t->seq[seq].next < 0) {
        attni_node_trim(t, x, n_tokens);
        return ATTN_OK;
    }
    while (t->node[x].parent >= 0 && t->node[x].start >= n_tokens) x = t->node[x].parent;
    x = attni_tree_cut(t, x, n_tokens);
    if (x < 0) return ATTN_ERR_FULL;
    t->node[from].last_use = ++t->tick;
    attni_seq_move(t, seq, x);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_release(attn_tree *t, int32_t seq, int keep) {
    int32_t x;
    if (!t) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    x = t->seq[seq].node;
    t->node[x].last_use = ++t->tick;
    if (keep) attni_path_set(t, x, 1, (const int32_t *)0);
    attni_seq_free(t, seq);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_pin(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                   int delta) {
    int32_t x;
    if (!t || !tokens || n < 1 || (delta != 1 && delta != -1)) return ATTN_ERR_ARGUMENT;
    x = attni_index_find(t, -1, ns);
    if (x < 0 || attni_tree_walk(t, &x, tokens, n) < n) return ATTN_ERR_NOT_FOUND;
    if (delta < 0) {
        if (t->node[x].end != n || t->node[x].pins == 0) return ATTN_ERR_NOT_FOUND;
        t->node[x].last_use = ++t->tick;
        attni_node_pin(t, x, -1);
        attni_node_prune(t, x);
        return ATTN_OK;
    }
    if (t->node[x].end == n && t->node[x].pins == INT32_MAX) return ATTN_ERR_OVERFLOW;
    x = attni_tree_cut(t, x, n);
    if (x < 0) return ATTN_ERR_FULL;
    attni_node_pin(t, x, 1);
    attni_path_set(t, x, 1, (const int32_t *)0);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_priority(attn_tree *t, int32_t seq, int32_t priority) {
    if (!t) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    attni_path_set(t, t->seq[seq].node, 0, &priority);
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_evict(attn_tree *t, int32_t n_pages, int32_t *n_freed) {
    int32_t before, goal;
    if (!t) return ATTN_ERR_ARGUMENT;
    before = t->pool.n_free;
    goal = n_pages < 0 || n_pages > t->n_pages - before ? INT32_MAX : before + n_pages;
    while (t->n_heap > 0 && t->pool.n_free < goal) attni_tree_shrink(t, t->heap[0], goal);
    if (n_freed) *n_freed = t->pool.n_free - before;
    return ATTN_OK;
}

ATTN_DEF int32_t attn_tree_length(const attn_tree *t, int32_t seq) {
    if (!t) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    return t->node[t->seq[seq].node].end;
}

ATTN_DEF attn_result attn_tree_tokens(const attn_tree *t, int32_t seq, int32_t first, int32_t n,
                                      int32_t *out) {
    int32_t x, pt, pos, end, run, page;
    if (!t || first < 0 || n < 0 || (!out && n > 0)) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    x = t->seq[seq].node;
    pt = t->page_tokens;
    if (first > t->node[x].end || n > t->node[x].end - first) return ATTN_ERR_ARGUMENT;
    for (; n > 0; x = t->node[x].parent) { // from the tail of the range up
        pos = first > t->node[x].start ? first : t->node[x].start;
        end = first + n;
        if (pos >= end) continue;
        page = attni_node_page(t, x, pos);
        n = pos - first;
        for (; pos < end; pos += run, page = t->next[page]) {
            run = end - pos < pt - pos % pt ? end - pos : pt - pos % pt;
            memcpy(out + (pos - first), attni_page_token(t, page, pos % pt),
                   (size_t)run * sizeof(int32_t));
            if (pos + run == end) break;
        }
    }
    return ATTN_OK;
}

ATTN_DEF int32_t attn_tree_pages(const attn_tree *t, int32_t seq, int32_t *out, int32_t capacity) {
    int32_t x, pt, limit, n, j, page;
    if (!t || capacity < 0 || (!out && capacity > 0)) return ATTN_ERR_ARGUMENT;
    if (!attni_tree_is_seq(t, seq)) return ATTN_ERR_NOT_FOUND;
    x = t->seq[seq].node;
    pt = t->page_tokens;
    n = limit = t->node[x].end / pt + (t->node[x].end % pt != 0);
    if (n > capacity) return ATTN_ERR_BUFFER;
    // A page that a node and its child both cover is the child's: its copy holds the parent's
    // slots.
    for (; limit > 0; x = t->node[x].parent) {
        j = t->node[x].start / pt;
        for (page = t->node[x].first_page; j < limit; j++) {
            out[j] = page;
            if (j + 1 < limit) page = t->next[page];
        }
        j = t->node[x].start / pt;
        limit = j < limit ? j : limit;
    }
    return n;
}

// ---- batch order: by namespace, then token by token; a prefix before what continues it

// < 0, 0, > 0; climbs from both nodes to where their paths meet. Independent of how paths are cut.
static int attni_tree_compare(const attn_tree *t, int32_t x, int32_t y) {
    int32_t cx = -1, cy = -1, sx, sy;
    while (x != y) {
        sx = x < 0 ? -2 : t->node[x].start - (t->node[x].parent < 0); // roots above their children
        sy = y < 0 ? -2 : t->node[y].start - (t->node[y].parent < 0);
        if (sx >= sy) {
            cx = x;
            x = t->node[x].parent;
        }
        if (sy >= sx) {
            cy = y;
            y = t->node[y].parent;
        }
    }
    if (cx < 0 || cy < 0) return (cx >= 0) - (cy >= 0);
    return t->node[cx].key < t->node[cy].key ? -1 : 1;
}

ATTN_DEF attn_result attn_tree_order(const attn_tree *t, const int32_t *seqs, int32_t n,
                                     int32_t *order, int32_t *scratch) {
    int64_t width, lo;
    int32_t i;
    if (!t || n < 0 || (n > 0 && (!seqs || !order || !scratch))) return ATTN_ERR_ARGUMENT;
    for (i = 0; i < n; i++)
        if (!attni_tree_is_seq(t, seqs[i])) return ATTN_ERR_NOT_FOUND;
    for (i = 0; i < n; i++) order[i] = i;
    for (width = 1; width < n; width *= 2) { // merge sort, bottom up, stable
        for (lo = 0; lo < n; lo += 2 * width) {
            int64_t mid = lo + width < n ? lo + width : n, hi = mid + width < n ? mid + width : n;
            int64_t a = lo, b = mid, k;
            for (k = lo; k < hi; k++) {
                int left =
                    b == hi || (a < mid && attni_tree_compare(t, t->seq[seqs[order[a]]].node,
                                                              t->seq[seqs[order[b]]].node) <= 0);
                scratch[k] = left ? order[a++] : order[b++];
            }
        }
        memcpy(order, scratch, (size_t)n * sizeof(int32_t));
    }
    return ATTN_OK;
}

ATTN_DEF void attn_tree_get_stats(const attn_tree *t, attn_tree_stats *out) {
    if (!t || !out) return;
    *out = t->count;
    out->n_pages = t->n_pages;
    out->n_free = t->pool.n_free;
    out->n_nodes = t->n_nodes;
    out->n_seq = t->n_seq;
}

// ---- attn_tree_check: every statement of the section's first comment

// Pages of a node: their number, links, fills and its first token. Counts into ref and held.
static int attni_check_pages(const attn_tree *t, int32_t x, int32_t *ref, int32_t *held) {
    const attni_tree_node *n = t->node + x, *p = t->node + n->parent;
    int32_t pt = t->page_tokens, j = n->start / pt, last = (n->end - 1) / pt, page = n->first_page;
    int32_t i, slot = n->start % pt, behind = -1;
    if (n->end <= n->start || n->start != p->end) return 0;
    for (;; j++) {
        if (page < 0 || page >= t->n_pages || t->pool.ref[page] == 0) return 0;
        if (behind >= 0 && t->prev[page] != behind) return 0;
        if (t->fill[page] < (j == last ? (n->end - 1) % pt + 1 : pt) || t->fill[page] > pt)
            return 0;
        ref[page]++;
        held[page] += n->held > 0;
        if (j == last) break;
        behind = page;
        page = t->next[page];
    }
    if (page != n->last_page || (n->n_child == 0 && t->fill[page] != (n->end - 1) % pt + 1))
        return 0;
    if (n->key != (uint32_t)*attni_page_token(t, n->first_page, slot)) return 0;
    for (i = 0; slot != 0 && p->last_page != n->first_page && i < slot; i++) // a copy has the slots
        if (*attni_page_token(t, n->first_page, i) != *attni_page_token(t, p->last_page, i))
            return 0;
    return 1;
}

// One node but for its pages. sum: (3, max_nodes) children, XOR of children, held children.
static int attni_check_node(const attn_tree *t, int32_t x, const int32_t *sum) {
    const attni_tree_node *n = t->node + x, *only;
    int32_t s, n_seq = 0, before = -1, up = (n->heap_at - 1) / 2;
    for (s = n->first_seq; s >= 0; before = s, s = t->seq[s].next, n_seq++)
        if (s >= t->max_seq || t->seq[s].node != x || t->seq[s].prev != before) return 0;
    if (n->n_child != sum[x] || n->child_xor != sum[t->max_nodes + x]) return 0;
    if (n->pins < 0 || n->held != n_seq + n->pins + sum[2 * t->max_nodes + x]) return 0;
    if (attni_index_find(t, n->parent, n->key) != x) return 0;
    if ((n->heap_at >= 0) != (n->parent >= 0 && n->n_child == 0 && n->held == 0)) return 0;
    if (n->heap_at >= t->n_heap || (n->heap_at >= 0 && t->heap[n->heap_at] != x)) return 0;
    if (n->heap_at > 0 && attni_heap_before(t, x, t->heap[up])) return 0;
    if (n->parent < 0) return n->end == 0 && n->first_page < 0 && (n->n_child > 0 || n->held > 0);
    if (n->cached && t->node[n->parent].parent >= 0 && !t->node[n->parent].cached) return 0;
    if (!n->cached && (n->pins > 0 || (n->n_child == 0 && n_seq == 0))) return 0;
    if (n->n_child != 1 || n_seq > 0 || n->pins > 0) return 1;
    only = t->node + n->child_xor; // the border below must have a reason
    return only->cached != n->cached || only->priority != n->priority;
}

// Free lists and totals, after ref and held were counted.
static int attni_check_totals(const attn_tree *t, const int32_t *ref, const int32_t *held) {
    int32_t i, n = 0, n_held = 0;
    if (t->pool.n_free < 0 || t->pool.n_free > t->n_pages) return 0;
    for (i = 0; i < t->n_pages; i++) {
        if (t->pool.ref[i] != ref[i] || t->hold[i] != held[i]) return 0;
        if (t->n_copying[i] > ref[i] || (t->n_copying[i] > 0) != (t->lock[i] > 0)) return 0;
        n += ref[i] == 0;
        n_held += held[i] > 0;
    }
    if (n != t->pool.n_free || n_held != t->n_held_pages) return 0;
    for (i = 0; i < t->pool.n_free; i++)
        if (t->pool.free[i] < 0 || t->pool.free[i] >= n + t->n_pages || ref[t->pool.free[i]] != 0)
            return 0;
    for (n = 0, i = t->free_node; i >= 0 && n <= t->max_nodes; i = t->node[i].parent, n++)
        if (i >= t->max_nodes || t->node[i].start >= 0) return 0;
    if (n + t->n_nodes != t->max_nodes) return 0;
    for (n = 0, i = t->free_seq; i >= 0 && n <= t->max_seq; i = t->seq[i].next, n++)
        if (i >= t->max_seq || t->seq[i].node >= 0) return 0;
    return n + t->n_seq == t->max_seq;
}

ATTN_DEF attn_result attn_tree_check(const attn_tree *t) {
    int32_t *ref, *held, *sum, x, i, n_nodes = 0, n_held = 0, n_heap = 0, n_index = 0;
    int64_t tokens = 0;
    if (!t) return ATTN_ERR_ARGUMENT;
    ref = t->scratch;
    held = ref + t->n_pages;
    sum = held + t->n_pages;
    memset(ref, 0, (2 * (size_t)t->n_pages + 3 * (size_t)t->max_nodes) * sizeof(int32_t));
    for (x = 0; x < t->max_nodes; x++) {
        const attni_tree_node *n = t->node + x;
        if (n->start < 0) continue;
        n_nodes++;
        n_held += n->held > 0;
        n_heap += n->heap_at >= 0;
        tokens += n->end - n->start;
        if (n->parent < 0) continue;
        if (n->parent >= t->max_nodes || t->node[n->parent].start < 0) return ATTN_ERR_CORRUPT;
        sum[n->parent]++;
        sum[t->max_nodes + n->parent] ^= x;
        sum[2 * t->max_nodes + n->parent] += n->held > 0;
        if (!attni_check_pages(t, x, ref, held)) return ATTN_ERR_CORRUPT;
    }
    for (x = 0; x < t->max_nodes; x++)
        if (t->node[x].start >= 0 && !attni_check_node(t, x, sum)) return ATTN_ERR_CORRUPT;
    for (i = 0; i < t->n_pages; i++) {
        if (t->copy_src[i] < 0) continue;
        ref[i]++, ref[t->copy_src[i]]++;
        held[i]++, held[t->copy_src[i]]++;
    }
    for (i = 0; i <= (int32_t)t->table_mask; i++) n_index += t->table[i] >= 0;
    if (n_nodes != t->n_nodes || n_held != t->n_held_nodes || n_heap != t->n_heap ||
        n_index != n_nodes || tokens != t->count.tokens_cached)
        return ATTN_ERR_CORRUPT;
    return attni_check_totals(t, ref, held) ? ATTN_OK : ATTN_ERR_CORRUPT;
}

// ==== >>impl-blob  Saving and loading a branch ===================================================
//
//   0 magic "attnblob"   8 version u32   12 header size u32   16 n_tokens u64   24 token_bytes u64
//  32 size of the blob u64   40 checksum u64 of everything else   48 token ids i32   then the rows.
// All little-endian, independent of the page size.

#define ATTNI_BLOB_HEADER 48
#define ATTNI_BLOB_VERSION 1
#define ATTNI_BLOB_SUM 40 /* place of the checksum */

static void attni_put_le(unsigned char *p, uint64_t v, int n) {
    for (; n-- > 0; v >>= 8) *p++ = (unsigned char)(v & 255);
}

static uint64_t attni_get_le(const unsigned char *p, size_t n) {
    uint64_t v = 0;
    while (n-- > 0) v = v << 8 | p[n];
    return v;
}

// Eight bytes a step; every step is a bijection of h for a given word and of the word for a given
// h, so that a change confined to one word always changes the sum.
static uint64_t attni_blob_hash(const unsigned char *p, size_t n, uint64_t h) {
    size_t run;
    h ^= (uint64_t)n;
    for (; n > 0; n -= run, p += run) {
        run = n < 8 ? n : 8;
        h = (h ^ attni_get_le(p, run)) * 0x9fb21c651e98df25u;
        h ^= h >> 32;
    }
    return h;
}

static uint64_t attni_blob_sum(const unsigned char *p, size_t n) {
    uint64_t h = attni_blob_hash(p, ATTNI_BLOB_SUM, 0xcbf29ce484222325u);
    return attni_blob_hash(p + ATTNI_BLOB_HEADER, n - ATTNI_BLOB_HEADER, h);
}

// Bytes of a blob, 0 when they do not fit in size_t (or 63 bits).
static size_t attni_blob_size(uint64_t n_tokens, uint64_t token_bytes) {
    uint64_t limit =
        (uint64_t)INT64_MAX < (uint64_t)SIZE_MAX ? (uint64_t)INT64_MAX : (uint64_t)SIZE_MAX;
    if (token_bytes > limit - 4) return 0;
    if (n_tokens > (limit - ATTNI_BLOB_HEADER) / (token_bytes + 4)) return 0;
    return (size_t)(ATTNI_BLOB_HEADER + n_tokens * (token_bytes + 4));
}

// Hands the rows of positions [pos, end) of a sequence to fn, page by page.
static attn_result attni_blob_rows(const attn_tree *t, int32_t seq, int32_t pos, int32_t end,
                                   size_t token_bytes, attn_rows_fn fn, void *user,
                                   unsigned char *rows) {
    int32_t pt = t->page_tokens, run;
    (void)attn_tree_pages(t, seq, t->scratch, t->n_pages); // its pages are distinct: they fit
    for (; pos < end; pos += run, rows += (size_t)run * token_bytes) {
        run = end - pos < pt - pos % pt ? end - pos : pt - pos % pt;
        if (fn(user, t->scratch[pos / pt], pos % pt, run, rows) != 0) return ATTN_ERR_CALLBACK;
    }
    return ATTN_OK;
}

ATTN_DEF size_t attn_tree_save_bytes(const attn_tree *t, int32_t seq, size_t token_bytes) {
    int32_t n = attn_tree_length(t, seq);
    return n < 0 || token_bytes == 0 ? 0 : attni_blob_size((uint64_t)n, token_bytes);
}

ATTN_DEF attn_result attn_tree_save(const attn_tree *t, int32_t seq, size_t token_bytes,
                                    attn_rows_fn read, void *user, void *mem, size_t bytes) {
    unsigned char *p = (unsigned char *)mem, *ids;
    int32_t n = attn_tree_length(t, seq), i, page;
    size_t size = attn_tree_save_bytes(t, seq, token_bytes);
    attn_result r;
    if (!t || !read || !mem || token_bytes == 0) return ATTN_ERR_ARGUMENT;
    if (n < 0) return ATTN_ERR_NOT_FOUND;
    if (size == 0) return ATTN_ERR_OVERFLOW;
    if (bytes < size) return ATTN_ERR_BUFFER;
    ids = p + ATTNI_BLOB_HEADER;
    r = attni_blob_rows(t, seq, 0, n, token_bytes, read, user, ids + 4 * (size_t)n);
    if (r != ATTN_OK) return r;
    for (i = 0; i < n; i++) {
        page = t->scratch[i / t->page_tokens];
        attni_put_le(ids + 4 * (size_t)i, (uint32_t)*attni_page_token(t, page, i % t->page_tokens),
                     4);
    }
    memcpy(p, "attnblob", 8);
    attni_put_le(p + 8, ATTNI_BLOB_VERSION, 4);
    attni_put_le(p + 12, ATTNI_BLOB_HEADER, 4);
    attni_put_le(p + 16, (uint64_t)n, 8);
    attni_put_le(p + 24, token_bytes, 8);
    attni_put_le(p + 32, size, 8);
    attni_put_le(p + ATTNI_BLOB_SUM, attni_blob_sum(p, size), 8);
    return ATTN_OK;
}

// Everything that can be wrong with a blob; then its number of tokens.
static attn_result attni_blob_verify(const unsigned char *p, size_t bytes, size_t token_bytes,
                                     int32_t *n_tokens) {
    uint64_t n, row;
    if (bytes < ATTNI_BLOB_HEADER || memcmp(p, "attnblob", 8) != 0) return ATTN_ERR_CORRUPT;
    if (attni_get_le(p + 8, 4) != ATTNI_BLOB_VERSION) return ATTN_ERR_VERSION;
    n = attni_get_le(p + 16, 8);
    row = attni_get_le(p + 24, 8);
    if (attni_get_le(p + 12, 4) != ATTNI_BLOB_HEADER || attni_get_le(p + 32, 8) != bytes ||
        n > INT32_MAX || row == 0 || attni_blob_size(n, row) != bytes ||
        attni_get_le(p + ATTNI_BLOB_SUM, 8) != attni_blob_sum(p, bytes))
        return ATTN_ERR_CORRUPT;
    if (row != token_bytes) return ATTN_ERR_SHAPE;
    *n_tokens = (int32_t)n;
    return ATTN_OK;
}

// Appends the blob's n token ids to s, some at a time; *n_cached: up to the first one not cached.
static attn_result attni_blob_append(attn_tree *t, int32_t s, const unsigned char *ids, int32_t n,
                                     attn_copy_fn copy, void *user, int32_t *n_cached) {
    int32_t token[256], done, run, i, hit, n_copies;
    attn_page_copy todo;
    attn_result r;
    *n_cached = 0;
    for (done = 0; done < n; done += run) {
        run = n - done < 256 ? n - done : 256;
        for (i = 0; i < run; i++)
            token[i] = (int32_t)(uint32_t)attni_get_le(ids + 4 * ((size_t)done + (size_t)i), 4);
        n_copies = 0;
        r = attn_tree_append(t, s, token, run, &hit, &todo, copy ? 1 : 0, &n_copies);
        if (r != ATTN_OK) return r == ATTN_ERR_BUFFER ? ATTN_ERR_ARGUMENT : r;
        *n_cached += hit; // nothing behind a miss is cached
        if (n_copies == 0) continue;
        i = copy(user, &todo);
        (void)attn_tree_ack(t, &todo, 1);
        if (i != 0) return ATTN_ERR_CALLBACK;
    }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_tree_load(attn_tree *t, uint64_t ns, size_t token_bytes,
                                    attn_rows_fn write, attn_copy_fn copy, void *user,
                                    const void *mem, size_t bytes, int32_t *seq) {
    const unsigned char *p = (const unsigned char *)mem, *rows;
    int32_t n = 0, s, hit;
    int64_t hits, misses;
    attn_result r;
    if (!t || !write || !mem || !seq || token_bytes == 0) return ATTN_ERR_ARGUMENT;
    r = attni_blob_verify(p, bytes, token_bytes, &n);
    if (r != ATTN_OK) return r;
    if ((int64_t)n > (int64_t)t->n_pages * t->page_tokens) return ATTN_ERR_FULL;
    hits = t->count.tokens_hit;
    misses = t->count.tokens_missed;
    r = attn_tree_open(t, ns, (const int32_t *)0, 0, &s, &hit);
    if (r != ATTN_OK) return r;
    r = attni_blob_append(t, s, p + ATTNI_BLOB_HEADER, n, copy, user, &hit);
    if (r == ATTN_OK) {
        // The callback's type serves saving too; a load's callback only reads the rows.
        rows = p + ATTNI_BLOB_HEADER + 4 * (size_t)n + (size_t)hit * token_bytes;
        r = attni_blob_rows(t, s, hit, n, token_bytes, write, user, (unsigned char *)rows);
    }
    if (r == ATTN_OK) {
        *seq = s;
        return ATTN_OK;
    }
    attni_seq_free(t, s); // tokens that only it had go with it
    t->count.tokens_hit = hits;
    t->count.tokens_missed = misses;
    return r;
}

#undef ATTNI_ALIGN
#undef ATTNI_HASH
#undef ATTNI_BLOB_HEADER
#undef ATTNI_BLOB_VERSION
#undef ATTNI_BLOB_SUM

#endif // ATTNI_CORE_IMPLEMENTED
#endif // ATTN_IMPLEMENTATION || ATTN_CORE_IMPLEMENTATION

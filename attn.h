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
       >>ref   >>select   >>delta   >>pool   >>tree   >>cache   >>blob   >>check
       and the implementation of each behind  >>impl

   MACROS
       ATTN_IMPLEMENTATION        implement every attn header this file includes
       ATTN_CORE_IMPLEMENTATION   implement attn.h only
       ATTN_STATIC                make every function static (a private copy per file)
       ATTN_DEF                   or define the linkage of public functions yourself
       ATTN_CHECK                 checked build, see >>check; for every file that includes a header
                                  (n > 1: recompute a row in every n-th call only)

   MEMORY   The caller owns everything. ..._bytes() functions say how large a buffer must be;
            nothing is allocated, ever. Plans, partials and scratch are 64-byte aligned.
   THREADS  The library starts none and has no mutable state of its own. Pool and tree are locked
            by the caller; a plan is read-only while it runs.
   ERRORS   Every function that can fail returns an attn_result; 0 is success, errors are negative.
            Nothing aborts or prints. Failed calls leave their structures as they were.
   ZERO     Structs are zero-initialised by the caller; 0 always means the default.
   NUMERICS Partial results are f32. For a given mask a row's bits do not depend on the rest of
            the batch, page size, layout, placement or (CPU) threads, chunking, cache hits.
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
#define ATTN_SPAN 256 /* tokens: KV is cut here, whatever the batch (CPU): at absolute positions, */
                      /* under block lists at places of the row's own list */
#define ATTN_SPAN_RULES 10 /* entries of attn_plan_params.rule, for backends of other spans */

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
    X(ERR_CALLBACK, -16, "a caller's callback reported failure")                                   \
    X(ERR_CHECK, -17, "checked build: a free page in use, or a result that the reference denies")  \
    X(ERR_DEVICE, -18, "a call of the CUDA or Metal driver failed")

typedef enum attn_result {
#define ATTNI_X(name, value, text) ATTN_##name = value,
    ATTN_RESULTS(ATTNI_X)
#undef ATTNI_X
        ATTN_RESULT_FORCE_INT = 0x7fffffff
} attn_result;

// A static English sentence for a result code; never NULL.
ATTN_DEF const char *attn_result_string(attn_result r);

// ==== >>dtype  Data types ========================================================================

// X(name, value, bits per element, has scales): quantised types carry one f32 scale per token and
// KV head, K and V apart, so that a stored token is never rewritten. value = code * scale. I4:
// two's complement nibbles -7..7, element 2i in the low half of byte i.
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
    ATTN_K16 = 2 // CPU. K: [page, kv_head, token / 16, d / p, 16, p], p = 32 / bits, so that a
                 // 4-byte unit holds p elements of one token; V: head-major.
                 // page_tokens must be a multiple of 16.
} attn_layout;

// The pages of K or of V of one layer. After a page's elements follow, for scaled dtypes without
// head_scale, its f32 scales: [token, kv_head] for TOKEN_MAJOR, [kv_head, token] otherwise.
// V may alias K (MLA: K rows of 576, V their first 512): same data, page_bytes and stride_token;
// not in K16, where the two lie differently.
typedef struct attn_kv_array {
    void *data;              // page 0
    attn_dtype dtype;        // any
    const float *head_scale; // (n_kv_heads) fixed scales (default NULL: scales stored in the page)
    int64_t page_bytes;      // distance between pages (default 0: attn_kv_page_bytes)
    int64_t stride_token;    // elements (default 0: by layout); K16 keys: must be 0
    int64_t stride_head;     // elements (default 0: by layout); K16 keys: must be 0
} attn_kv_array;

typedef struct attn_pool attn_pool;
typedef struct attn_kv_cache attn_kv_cache;

typedef struct attn_kv {
    attn_kv_array k, v;
    attn_layout layout;
    int32_t page_tokens;        // tokens per page, any size >= 1
    int32_t n_pages;            // every page id must be in [0, n_pages)
    const int32_t *page_table;  // (n_seq, page_table_stride) page ids; entry j holds the tokens
                                // j * page_tokens ... of the sequence
                                // (default NULL: sequence i is page i: contiguous KV)
    int64_t page_table_stride;  // int32 entries between sequences; 0: all have the same pages
    const int32_t *kv_len;      // (n_seq) tokens held, the new ones included
    const int32_t *kv_pos0; // (n_seq) absolute position of the first held token (default NULL: 0);
                            // > 0 after the front of a sequence was evicted
    const attn_pool *pool;  // checked builds: the pages' owner, see >>check (default NULL)
    const attn_kv_cache *cache; // copies of pages in faster memory, see >>cache (default NULL)
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
    ATTN_MASK_TREE =
        2 // speculative verify: the sequence's q_len queries are its last q_len tokens,
          // nodes of a token tree; each sees what came before and its own ancestors
} attn_mask_kind;

// Arbitrary block-sparse pattern, CSR. Row of a query: seq_row[seq] + p / row_block; it lists the
// KV blocks (ids k / kv_block, ascending, unique) that are kept. Optional sub-block bitmask per
// entry: bits_rows x bits_cols bits, row-major, (bits_rows * bits_cols + 63) / 64 words per entry;
// sub-row = (p % row_block) / (row_block / bits_rows), sub-column likewise.
typedef struct attn_block_list {
    int32_t row_block, kv_block; // tokens
    int32_t n_lists;             // 1 (all heads share), n_kv_heads or n_heads
    int32_t n_rows;              // row blocks in each list
    const int64_t *row_start;    // (n_lists, n_rows + 1) offsets into block; NULL: no block list
    const int64_t *row_end;      // (n_lists, n_rows + 1) where each row's entries end, the last of
                                 // a list unused (default NULL: where the next row's start)
    const int32_t *block;        // KV block ids
    const uint64_t *bits;        // (default NULL: whole blocks)
    int32_t bits_rows, bits_cols;
    const int32_t *seq_row;      // (n_seq) list row of the row block 0 of each sequence, may be
                                 // negative (default NULL: 0 for all)
    int64_t device_entries;      // > 0: row_start, row_end, block and bits lie in device memory,
                                 // block with so many entries: host functions leave them alone,
                                 // kernels check them (default 0: host memory). Not on the CPU
} attn_block_list;

// dkernel's closed form with i = p / block, j = k / block, h = KV head + head0:
//   causal:        j <= i and (i - j < local or (j + h * step + offset) mod stride == 0)
//   bidirectional: (max(0, i - j - local + 1) + max(0, j - i - local_right + 1)) mod stride == 0
// The last n_dense of n_heads_total KV heads keep every j (j <= i in the causal form).
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
    const int32_t *tree_parent; // TREE: (n_tokens) index of the parent among the sequence's
                                // queries, smaller than its own; -1: child of the context.
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
                        // a stride of 0: shared by all heads, by all tokens (default: off)
} attn_logits;

// Score of a visible pair, in this order: scale * q.k, softcap, ALiBi, bias; then softmax over the
// visible keys and the sink logit.
typedef struct attn_desc {
    int32_t n_seq;
    int32_t n_heads;         // query heads, a multiple of n_kv_heads
    int32_t n_kv_heads;
    int32_t head_dim;        // multiple of 8, 8..576
    int32_t v_head_dim;      // (default 0: head_dim)
    const int32_t *q_start;  // (n_seq + 1) first query token of each sequence, from 0 on;
                             // q_start[n_seq] = n_tokens
    const int32_t *q_pos0;   // (n_seq) absolute position of its first query
                             // (default NULL: its queries are the last tokens held)
    const int32_t *seq_order; // (n_seq) permutation that puts sequences with common pages side by
                              // side, from attn_tree_order (default NULL: the planner sorts)
    attn_tensor q;           // (n_tokens, n_heads, head_dim)
    attn_tensor o;           // (n_tokens, n_heads, v_head_dim), written
    float *lse; // (n_tokens, n_heads) natural log-sum-exp, the sink included (default NULL)
    attn_kv kv;
    attn_mask mask;
    attn_logits logits;
    attn_numerics numerics;  // (default: FAST)
} attn_desc;

// Bytes of one page of K (is_v = 0) or V (is_v = 1), scales included; 0 if invalid or too large.
// Reads n_kv_heads, head_dim, v_head_dim, kv.layout, kv.page_tokens, the array's dtype, strides,
// scale.
ATTN_DEF size_t attn_kv_page_bytes(const attn_desc *d, int is_v);

// Slot (page * page_tokens + place) of every query token's own K and V: out (n_tokens), for store.
// ERR_PAGE when a position has no page. Reads the tables; d must be valid.
ATTN_DEF attn_result attn_kv_slots(const attn_desc *d, int64_t *out);

// Copies rows between a page and canonical order, whatever the layout: rows (n_tokens, n_kv_heads,
// d) of raw elements little-endian, followed by (n_tokens, n_kv_heads) f32 scales when stored in
// the page. For attn_tree_save / attn_tree_load callbacks. ERR_PAGE, ERR_ARGUMENT (place or count
// outside). Bytes: 0 when d is invalid or they do not fit in size_t.
ATTN_DEF size_t attn_kv_rows_bytes(const attn_desc *d, int is_v, int32_t n_tokens);
ATTN_DEF attn_result attn_kv_read_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                       int32_t n_tokens, void *rows);
ATTN_DEF attn_result attn_kv_write_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                        int32_t n_tokens, const void *rows);

// The sparse terms of d's mask as one block list, the same set of pairs: rows and columns cover the
// absolute positions [0, rows) and [0, cols); rows of block lists are those of sequence seq.
//   row_block, kv_block    tokens; CAUSAL masks leave out blocks that lie above the diagonal whole
//   bits_rows, bits_cols   divisors of the two: sub-blocks that are kept or not as one. bits NULL:
//                          both must be 1. ERR_MASK where one is kept in part, base term aside
//   n_lists                1, n_kv_heads or n_heads; ERR_MASK where heads of a list differ
//   row_start out, (n_lists, ceil(rows / row_block) + 1);  block, bits, n_entries, out as above
// ERR_ARGUMENT, ERR_MASK, ERR_FULL (capacity).
ATTN_DEF attn_result attn_mask_lists(const attn_desc *d, int32_t seq, int32_t n_lists, int32_t rows,
                                     int32_t cols, int32_t row_block, int32_t kv_block,
                                     int32_t bits_rows, int32_t bits_cols, int64_t *row_start,
                                     int32_t *block, uint64_t *bits, int64_t capacity,
                                     int64_t *n_entries, attn_block_list *out);

// The transposed lists: the rows that keep a column, ascending; backward passes over K and V read
// these. n_cols: KV blocks; ids beyond are ERR_MASK.
//   col_start  out, (n_lists, n_cols + 1) into row;  row, entry: out, one per entry of the list;
//   entry (may be NULL): where the pair stands in list->block, to find its sub-block bits
ATTN_DEF attn_result attn_mask_transpose(const attn_block_list *list, int32_t n_cols,
                                         int64_t *col_start, int32_t *row, int64_t *entry);

// Pages of sequence s that no query at position p or later can see, by causal order, window, sinks,
// local-stride, keep_sink, keep_recent and vertical-slash: out (n_kv_heads, pages of the sequence)
// bytes, 1 = may be evicted for that KV head. Block lists are only about rows that they have, so
// with one nothing is; nor with FULL and TREE masks. Pages that hold a position >= p stay.
ATTN_DEF attn_result attn_mask_evictable(const attn_desc *d, int32_t s, int64_t p, uint8_t *out);

// ==== >>validate  Finding mistakes ===============================================================

// ATTN_OK, or the first mistake found: pointers, shapes, dtypes, strides, page ids, positions,
// masks. Reads every table (host memory): O(pages + list entries). The same answer for every
// backend.
ATTN_DEF attn_result attn_validate(const attn_desc *d);

// ==== >>plan  The tasks of a problem =============================================================

// How the KV of sequences of some lengths is cut. The first rule whose limits hold is a sequence's
// own, whatever else is in the batch; with none, ATTN_SPAN, row_tile of the params and folds.
typedef struct attn_span_rule {
    int32_t max_q_len;  // queries it has at most (default 0: any)
    int32_t max_kv_len; // tokens it holds at most (default 0: any)
    int32_t span;       // tokens, a power of two >= 64: KV is cut at its multiples; 0: table's end
    int32_t row_tile;   // query rows x heads per task, whatever workers (default 0: as row_tile and
                        // workers of the params say)
    int32_t no_fold;    // 1: tasks leave a partial per span always, unless there is one span only;
                        // these partials have to fit in partial_bytes
} attn_span_rule;

// Get defaults from the backend (attn_cpu_plan_params) and change what you like. Nothing here but
// the rules' spans and limits, which are the backend's own, changes the bits of the result.
typedef struct attn_plan_params {
    int32_t row_tile;      // query rows x heads per task (default 0: 256)
    int32_t workers;       // threads that will run tasks (default 0: 1): decides splitting
    int32_t share;   // 0: shared-prefix tasks where the cost model says so; 1: never; 2: always
    int32_t max_seq; // capacities for later updates of the same plan (default 0: as described)
    int32_t max_tokens;    // query tokens
    int32_t max_kv_len;    // longest sequence, kv_pos0 included
    size_t partial_bytes;  // workspace the caller will hand to run (default 0: no splitting, no
                           // sharing)
    float max_task_cost;   // no task or merge is dearer, so that a host can stop soon (default 0:
                           // no bound); see "Frame budgets" below
    float cost_kv_token;   // cost model: reading one token of K and V of one head ...
    float cost_row_token;  // ... one query row against one token ...
    float cost_partial;    // ... and storing plus merging one partial row (defaults 0: CPU figures)
    float tasks_per_worker; // splitting aims at so many (default 0: 3), <= 1024
    attn_span_rule rule[ATTN_SPAN_RULES]; // (default: empty, as the CPU backend needs it). With a
                           // table KV is cut for balance into pieces of one length, their number
                           // rounded, and costs count what is shared once
} attn_plan_params;

// One task: query rows x a run of KV spans for one KV head. Rows are tokens first_token.. of the
// group's flattened queries, times the GQA heads.
typedef struct attn_task {
    int32_t segment;     // which sequences and spans
    int32_t kv_head;
    int32_t first_token; // in the segment's flattened query tokens
    int32_t n_tokens;
    float cost;          // estimate; tasks are sorted by it, dearest first
} attn_task;

// One merge: the partials of n_tokens query tokens of a sequence, all heads.
typedef struct attn_merge {
    int32_t seq;
    int32_t first_token; // in the sequence's queries
    int32_t n_tokens;
    float cost;          // as of tasks
} attn_merge;

// Sequences [seq0, seq0 + n_seq) of the plan's order against the spans [span0, span1), the pages of
// which they all share; they have one rule, so spans of one length. n_slots = 0: the task writes O
// itself; 1: one folded partial per row; else one per span.
typedef struct attn_segment {
    int32_t seq0, n_seq;
    int32_t span0, span1;
    int32_t n_tokens; // query tokens of these sequences together
    int32_t n_slots;
    int64_t partial;  // first partial row
} attn_segment;

// A sequence as the plan saw it.
typedef struct attn_plan_seq {
    int32_t q_begin, q_len, q_pos0;
    int32_t kv_len, kv_pos0;
    int32_t rule, span;    // in params.rule (-1: none); tokens a span
    int32_t span0, span1;  // the spans any of its rows may see, in units of its own
    int32_t place;         // in order[]
    int32_t chain, n_chain; // its segments in span order: plan->chain[chain ...]
    int32_t is_chain;      // TREE: every parent is the previous token, so plain causal
} attn_plan_seq;

// Lives in the caller's memory; holds no pointer into Q, K, V or O, so one plan serves every layer.
typedef struct attn_plan {
    attn_plan_params params;
    int32_t n_seq, n_active, n_tokens; // n_active: sequences that have queries
    int32_t n_heads, n_kv_heads, head_dim, v_head_dim;
    int32_t n_tasks, n_merges, n_segments, n_shared; // n_shared: segments of more than one sequence
    int32_t tile_tokens;   // query tokens per task at most, of sequences without a rule ...
    int32_t rule_tile[ATTN_SPAN_RULES]; // ... and of those with rule i
    int32_t cap_seq, cap_segments, cap_tasks, cap_chain, cap_merges;
    size_t partial_rows;   // partial rows used, each (v_head_dim + 2) f32
    int64_t kv_tokens_read; // KV tokens (x heads) visited by a step, shared runs counted once
    int64_t kv_tokens_seen; // ... if every sequence read its own
    attn_plan_seq *seq;    // (n_seq)
    int32_t *order;        // (n_seq) sequence at each place, those of a rule side by side
    int32_t *share;        // (n_seq) spans shared with the next place
    attn_segment *segment;
    attn_task *task;
    int32_t *chain;
    attn_merge *merge;     // (n_merges)
    int32_t *stack;        // (3 * n_seq + 3) for the builder
} attn_plan;

// Frame budgets: tasks, then merges, may run in any order on any threads, be interrupted between
// any two and go on in a later frame; partials and plan have to be kept meanwhile, scratch has not,
// and the bits are those of one call. task[i].cost and merge[i].cost say whether the next one still
// fits: time = cost x seconds per cost, which a host measures as it goes (one problem shape, dtype
// and machine: keep the largest ratio seen lately). Unit: cost_row_token = 1 is one query row (one
// head of one token) against one KV token. An estimate from above for sparse masks; closed forms
// (causal, window) are counted by spans, those of sequences with a rule by tokens.
// max_task_cost = (longest wait in seconds) / (seconds per cost). Query rows are cut first, since
// that needs no workspace; where 32 rows a task are still too dear, KV is cut between spans. What
// cannot be cut may exceed it: one span x one query token x the GQA group, and the merge of one
// token. Cut KV needs partial_bytes: 4 x (v_head_dim + 2) x the sum over sequences of query tokens
// x n_heads x (kv_len / span + 2) always suffices (attn_cpu_plan_params sets that for d, up to
// 64 MiB); ERR_BUFFER when it is too small to keep the bound. Updates need max_kv_len then.

// Bytes attn_plan_build needs for d, or for the capacities in p if those are larger; 0 when
// invalid (a rule included).
ATTN_DEF size_t attn_plan_bytes(const attn_desc *d, const attn_plan_params *p);

// Validates d and plans it into mem (64-byte aligned, bytes long, kept until the plan is dropped).
// *plan points into mem. Errors: those of attn_validate; ERR_BUFFER; ERR_ARGUMENT for bad params.
ATTN_DEF attn_result attn_plan_build(const attn_desc *d, const attn_plan_params *p, void *mem,
                                     size_t bytes, attn_plan **plan);

// Follows a changed problem (the next decode step, say) in the same memory: when neither a span
// border nor a rule changed nor what neighbours in the plan's order share, only lengths are patched
// (*rebuilt = 0), else everything is planned again (*rebuilt = 1). rebuilt may be NULL. ERR_BUFFER
// when d outgrew the capacities; then the plan is void.
ATTN_DEF attn_result attn_plan_update(attn_plan *plan, const attn_desc *d, int *rebuilt);

// Bytes of partial workspace this plan uses, <= params.partial_bytes. 64-byte aligned.
ATTN_DEF size_t attn_plan_partial_bytes(const attn_plan *plan);

// ==== >>ref  The specification ===================================================================

// fp64 attention straight from the definitions above, one score at a time; slow. o (n_tokens,
// n_heads, v_head_dim) and lse (n_tokens, n_heads; may be NULL) are dense doubles; d->o and d->lse
// are ignored. Fully masked rows: o = 0, lse = the sink logit or -inf. Errors: those of
// attn_validate.
ATTN_DEF attn_result attn_ref_forward(const attn_desc *d, double *o, double *lse);

// 1 when query token t (of all n_tokens) and head h see the held token j (0 .. kv_len - 1) of their
// sequence s. d must be valid.
ATTN_DEF int attn_ref_visible(const attn_desc *d, int32_t s, int32_t t, int32_t h, int32_t j);

// ==== >>select  Block lists computed from Q and K ================================================
//
// A selector is a pure function of Q, K and parameters: for every row block of queries it lists the
// KV blocks worth reading. Everything after it is the ordinary mask: put attn_selection_mask's
// terms into the descriptor and run. Where scores tie, the lower index wins. Selection uses
// logits.scale and softcap; ERR_UNSUPPORTED with ALiBi, bias, a window, FULL or TREE masks.
//
// Rows. A list row is a row block (row_block absolute positions) of one sequence that holds at
// least one of its queries; sequences in order, each with its row blocks in order. seq_row follows
// from that, so attn_block_list needs nothing else. A row has its entries at (list * n_rows + row)
// * row_capacity, so that rows are written by any thread. HiP's lists outlive a decode step: the
// first n_slots rows are for sequences with one query, row slot[s] for sequence s whatever else is
// in the batch, the others' come behind. Such a row is scanned again when the refresh interval
// divides its query's position, when the step before was not its sequence's, or after
// attn_<dev>_select_forget; between that only the window moves on.

typedef enum attn_select_kind {
    ATTN_SELECT_NONE = 0,
    ATTN_SELECT_FLEX = 1,  // FlexPrefill: vertical-slash and query-aware heads
    ATTN_SELECT_HIP1 = 2,  // HiP, first generation: width doubling
    ATTN_SELECT_HIP2 = 3,  // HiP (ICLR'25): binary splitting
    ATTN_SELECT_HIP3 = 4,  // InfiniteHiP: staged chunk scan
    ATTN_SELECT_EXACT = 5  // ours: certified top blocks by branch and bound over page summaries
} attn_select_kind;

typedef enum attn_select_heads {
    ATTN_SELECT_HEADS_DEFAULT = 0, // FLEX, HIP1, HIP2: EACH; HIP3: ALL; EXACT: GROUP
    ATTN_SELECT_EACH = 1,          // a list for every query head
    ATTN_SELECT_GROUP = 2,         // one for the query heads of a KV head
    ATTN_SELECT_ALL = 3            // one for all heads
} attn_select_heads;

// FlexPrefill (arXiv 2502.20766). The last n = min(kv_block, q_len) queries of a sequence are
// scored against every key, A = their softmax. Default: corrected, defined so:
//   mass[r][j]  A / n summed over the keys of block j and the queries of row block r
//   slash[x]    a pair at distance t adds (1 - f) A / n to x = t div B and f A / n to x + 1,
//               f = (t mod B) / B; what lies beyond the last diagonal is dropped
//   always kept: block 0, the diagonal block. Masses below leave their cells out.
//   columns j   by mass summed over r, descending, until they hold gamma of what they sum to
//   diagonals x by slash mass, descending, until they hold gamma of it; both counts within the
//               budgets. A row r keeps columns j <= r and blocks r - x.
//   query-aware heads, if the Jensen-Shannon distance (the root) of e and all of A / n by blocks is
//               < tau, e = softmax over blocks of the mean of these queries against blocks' mean
//               keys: every row r has e_r = softmax over j <= r of its mean query against mean keys
//               and keeps the fewest blocks by e_r that hold gamma'; gamma' >= gamma is the least
//               for which the rows of A hold gamma of mass[r] too (where e_r is rounded to 0, they
//               alone keep so many blocks). The budgets bound those blocks of a row.
// Keys behind the last query do not count; blocks that hold no key are not listed.
// compatible: the reference's own sets (spec/flexprefill: as coded), scale 1 / sqrt(head_dim), no
// softcap; of a chunk, query-aware heads share gamma times its own rows.
// A sequence with q_len <= max(2 B, min_budget rounded up to B) keeps every block.
typedef struct attn_flex {
    int32_t compatible; // 1: as the reference's code has it (default 0: corrected)
    float gamma;        // (default 0: .95)
    float tau;          // (default 0: no head is query-aware)
    int32_t min_budget; // tokens, of columns and of diagonals each (default 0: one block)
    int32_t max_budget; // (default 0: no limit)
} attn_flex;

// HiP (arXiv 2406.09827, 2502.08910): sink + window + the blocks of tokens that score best. What is
// not said in the papers or differs from their code is marked "ours". All positions are absolute.
//   q block m: the sequence's queries here at positions [m n, m n + n), n = row_block * q_group
//     (HIP3: the stage's q_block). p_min, p_max: their first and last position. Its row blocks get
//     one list, each without the blocks that start after the row block's own last query here.
//   end = min(p_max + 1, kv_pos0 + kv_len). Keys outside [kv_pos0, end) score -infinity.
//   score of a query row and a key: (q . k) * (scale * the key's own scale), f32. Softcap changes
//     no order and is left out. NaN counts as -infinity, -0 as 0. "Best": the largest; of equal
//     ones the lowest index. What scores -infinity still competes.
//   dense_below: a row lists every block from kv_pos0's to that of its last visible key.
//   Decode rows in slots: with p their query's position, scanned are the stages from the first on
//     whose refresh divides p (HIP1, HIP2: the only one); if there is none the list stays. A row
//     that the step before did not leave made for p - 1 scans all stages.
//   visited: keys read for the row's list / the KV heads it serves, 0 for a list that stays.
//
// HIP1, HIP2. Blocks of `block` tokens, K = keep / block. Eligible: [b0, b1), b0 = floor(max(sink,
// kv_pos0) / block), b1 = floor(min(end - 1, p_max - v) / block) + 1, v = max(0, window - refresh +
// 1): what stays of the window until the next scan, so that a list that stays leaves no gap (ours).
// N = b1 - b0. N <= K: all, no extras. Chosen blocks are listed as the kv_blocks that hold them.
//   S(b), of a list: the max over its heads, over the keys at places 0, k_stride, 2 k_stride .. of
//     block b and over the queries with (p - m n) mod q_stride = q_stride - 1, and the last one, of
//     the score; -infinity where the key is > p - v.
//   low_dim: products only over the so many dimensions with the largest sum of |q| (f32, in order
//     of position) over these queries, for each query head; of equal sums the lower dimension.
// HIP2. Group i of K: blocks [start_i, start_i+1), start_i = b0 + floor(N i / K). While a group has
// more than one block: every group is split, floor(size / 2) blocks to the left child and the rest
// to the right; of all children that are not empty the best K by S(rep) stay. rep:
//   MIDDLE start + floor(size / 2)   FIRST start   LAST start + size - 1
//   POSITION start + m mod size: neighbouring q blocks look at different places (ours)
//   RANDOM start + ((hash(start + 2^32 size, m) >> 32) * size >> 32) (ours)
//   ORACLE the child's score is the max of S over all its blocks
//   hash(a, c), 64 bits, of seed: z = seed * 0x9e3779b97f4a7c15 + a * 0xbf58476d1ce4e5b9 +
//     c * 0x94d049bb133111eb; then z ^= z >> 30, z *= 0xbf58476d1ce4e5b9, z ^= z >> 27,
//     z *= 0x94d049bb133111eb, z ^= z >> 31.
//   head_group g (ours, lists EACH; g divides the query heads of a KV head): g heads in order share
//     one budget: the best g K of all their children stay, equal ones: lower head first.
// HIP1. Cells of a grid of w: cell i begins at block b0 + floor(i N / w). First w = K, all cells.
// While w < N: w' = min(2 w, N); cell i becomes the cells j with i w' <= j w < (i + 1) w'. If they
// are more than max(floor(patches / block), floor(K w' / N)), so many stay, the best by S of the
// block they begin at; else all stay, with the score (at first -infinity) of what they were.
// Extras of HIP1 and HIP2, all ours, where N > K; equal blocks are listed once:
//   near: the `near` best of the chosen blocks, by their last score, bring the eligible blocks at
//     most near_window away
//   vertical: the so many best eligible blocks for the last query alone: S with it and every key
//   diagonal: the so many best by the same, each with the eligible ones of the t blocks before it,
//     t = ceil((p_max - p_min) / block): where their diagonals pass for the other queries
//   random: blocks b0 + ((hash(i, m + 2^32 (list + 1)) >> 32) * N >> 32), i < random
//
// HIP3. Stage i: chunk j is [l, l + c), l = sink + j c, c its chunk; runs of q_stride positions
// from the q block's start on give a row each: the mean of the run's queries here (f32 sum in order
// of position / their number). Eligible: l + c > kv_pos0 and l <= min(end - 1, max(p_min + c0,
// p_max) - window), c0 stage 0's chunk: a list that stays leaves no gap, nor does a q block larger
// than c0 (ours). Candidates of stage 0: the eligible chunks. Of stage i > 0: the keep / c_before
// best candidates (all if fewer) of the stage before, of the q block this one lies in, cut to this
// stage's chunks, the eligible ones of these for this q block. In a slot, where the stage before is
// not scanned: what its last scan admitted, the eligible ones for p. The list: the hip.keep / c
// best candidates of the last stage.
//   score of a chunk, for one KV head, where S(t) is the max over the list's query heads of this KV
//     head (all go one way together: ours) and their rows of key l + t:
//       lo = 0, hi = c, best = -infinity
//       do mid = (lo + hi) / 2, a = S((lo + mid) / 2), b = S((mid + hi) / 2)
//          best = max(best, a, b); a > b: hi = mid, else lo = mid (all divisions round down)
//       while hi - lo >= max(2, terminate)
//     the representative is the key that won last. A list's score: the max over its KV heads, the
//     representative that of the first KV head with this score.
//   LAST_SCORE   the score is that of the representative
//   LANDMARK     the representative is the key of the chunk in [kv_pos0, end) with the largest
//                landmark of the KV head (NaN: -infinity, equal ones: the lowest), with its score
//   CENTRE       (stages after the first, ours) what a chunk of the stage before admits is not
//                itself but the c_before / c chunks of this stage from floor(max(0, rep - sink -
//                floor(c_before / 2)) / c) on, each once
//   landmark of a key: ((q . k) summed over the queries at most 511 positions after it, of its own
//                step and KV head) * (scale * its own scale) / the number of these queries
//   KEEP_SCORES  (stages after the first) a chunk's score is at least that of the (lowest) one of
//                the stage before which it was cut from
typedef enum attn_hip_sample {
    ATTN_HIP_MIDDLE = 0,
    ATTN_HIP_FIRST = 1,
    ATTN_HIP_LAST = 2,
    ATTN_HIP_POSITION = 3,
    ATTN_HIP_RANDOM = 4,
    ATTN_HIP_ORACLE = 5
} attn_hip_sample;

#define ATTN_HIP_LAST_SCORE 1
#define ATTN_HIP_LANDMARK 2
#define ATTN_HIP_CENTRE 4
#define ATTN_HIP_KEEP_SCORES 8

// Positions that a HIP3 stage scores by, for context extension: select from a descriptor whose Q
// and K are un-rotated; attention by the same lists takes its own Q and K as they are. A vector x
// is rotated to position p, cut to [0, rope_len), before products: for e < h = rope_dim / 2 x[e]
// and x[e + h] become x[e] cos[e] - x[e + h] sin[e] and x[e + h] cos[e] + x[e] sin[e], f32; the
// other elements stay. A run of queries is rotated to the position of its first query q, then
// averaged.
// u = max(0, window - c0), n = end, x = context. Query position; key position:
//   RELATIVE     u + 1; the left key of a round at 0, the right one at 1 (LANDMARK: 0)
//   CHUNK        min(q, candidates + u); the chunk's place among the stage's candidates, from 0
//   INFLLM       u; 0
//   DYNAMIC      q; k >= n - floor(x / 4) or n <= x: k, else n - floor(x / 4) - 1 - floor((n -
//                floor(x / 4) - 1 - k) (x - floor(x / 4)) / (n - floor(x / 4)))
//   SELF_EXTEND  p_min - k < 8192: q; k, else floor(q / 16) + 8192 - 512; floor(k / 16)
typedef enum attn_rope_style {
    ATTN_ROPE_NONE = 0, // keys are stored as they are to be scored
    ATTN_ROPE_RELATIVE = 1,
    ATTN_ROPE_CHUNK = 2, // = streaming
    ATTN_ROPE_INFLLM = 3,
    ATTN_ROPE_DYNAMIC = 4,
    ATTN_ROPE_SELF_EXTEND = 5
} attn_rope_style;

#define ATTN_HIP_STAGES 6

typedef struct attn_hip_stage {
    int32_t q_block;   // positions that share a scan, a multiple of row_block that divides the
                       // stage's before
    int32_t q_stride;  // runs of so many queries are averaged (default 0: 1)
    int32_t chunk;     // tokens of a chunk, a divisor of the stage's before; the last: kv_block
    int32_t keep;      // tokens admitted from the stage before, a multiple of its chunk; the first
                       // admits all
    int32_t refresh;   // decode steps between scans (default 0: 1, every step)
    int32_t terminate; // width below which the descent ends (default 0: at single keys)
    int32_t flags;     // ATTN_HIP_LAST_SCORE ... (default 0: the reference's)
    attn_rope_style style;
} attn_hip_stage;

// 0 means the default.
typedef struct attn_hip {
    int32_t keep;       // tokens besides sink and window, a multiple of kv_block (512; HIP3: 2048)
    int32_t sink;       // tokens, a multiple of kv_block (16; HIP3: 256; -1: none)
    int32_t window;     // tokens (256; HIP3: 1024; -1: none)
    // HIP1, HIP2
    int32_t block;      // tokens that are chosen together, a divisor of kv_block (kv_block)
    int32_t q_group;    // row blocks that share a list (1)
    int32_t q_stride;   // every so-manieth query scores (2)
    int32_t k_stride;   // ... and every so-manieth key of a block (1)
    int32_t low_dim;    // score by so many dimensions (all)
    int32_t refresh;    // decode steps between scans (1)
    int32_t near, near_window, vertical, diagonal, random; // extras, at most 65536 each (none)
    // HIP2
    attn_hip_sample sample; // which block stands for a group of blocks (the middle one)
    int32_t head_group; // query heads that share a budget (1)
    uint64_t seed;      // of RANDOM and of `random`
    // HIP1
    int32_t patches;    // tokens, the least that stays, at most keep (half of keep)
    // HIP3
    int32_t n_stages;   // (3: the reference's)
    attn_hip_stage stage[ATTN_HIP_STAGES];
    const float *landmark; // for LANDMARK: (n_pages, n_kv_heads, page_tokens), memory of the
                           // backend, filled by attn_<dev>_landmarks after each store
    const float *rope;     // for styles: (rope_len, 2, rope_dim / 2) cos, then sin; likewise
    int32_t rope_len, rope_dim, context; // rope_dim: even; context: tokens the model was made for
} attn_hip;

// Ours: certified top blocks. Always kept: the first block (of position kv_pos0), the blocks from
// the row block's first position on, and those that hold the last `recent` positions before it.
// The blocks between compete. For a query row r of the list (of each of its heads) let
// M(r, b) be the log of the sum of exp(score) over the keys of block b, Z(r) the same over those
// keys of the blocks always kept that r sees, and
//   value(b) = max over r of M(r, b) - Z(r);  +inf where a score of b is NaN or +inf;
// rows whose Z is NaN or +inf count for the latter only.
// Kept: by value, descending, until the row has `budget` blocks, what is always kept included:
// the larger of ceil(keep / kv_block) and ceil((share - 1e-6) * visible blocks); with epsilon > 0
// only the fewest (none, if they will do) for which no row's missed share of mass
//   missed(r) = sum of exp(score) over the keys r sees of unlisted blocks / ... of all blocks
// is above epsilon. Blocks that summaries prove to be worth less are not read: the lists are the
// same with and without summaries. attn_selection.missed: a bound that no missed(r) of the list row
// exceeds, whatever rounding did (by which it may exceed epsilon); 1 where it would not be finite,
// 0 where every block is listed.
typedef struct attn_exact {
    int32_t keep;   // tokens per row block, what is always kept included (default 0: by share)
    float share;    // ... as a share of the blocks up to the row block's last query; neither keep
                    // nor share: every block
    float epsilon;  // stop early at this missed share of softmax mass (default 0: fill the budget)
    int32_t recent; // tokens always kept before the row block (default 0: kv_block)
} attn_exact;

typedef struct attn_select {
    attn_select_kind kind;
    attn_select_heads heads;
    int32_t row_block; // queries of a list row (default 0: FLEX 128, else 64)
    int32_t kv_block;  // tokens of a listed block (default 0: FLEX 128, EXACT 64, HIP 2, HIP3 8);
                       // FLEX: row_block = kv_block
    int32_t dense_below; // sequences with kv_len at most so many keep every block (default 0: none
                         // but what a method says itself; -1: up to about where it overtakes
                         // dense attention: FLEX 4096, HIP3 12288, else 8192)
    int32_t n_slots;     // rows of sequences that decode (default 0: they are like the others)
    int32_t max_rows;    // capacity in list rows for later problems (default 0: as described)
    int32_t max_kv_len;  // ... and in tokens, kv_pos0 included
    attn_flex flex;
    attn_hip hip;
    attn_exact exact;
} attn_select;

// What K lies in, per KV head: for cells of up to 64 tokens (a page is cut into such from its first
// token on; a smaller page is one) the smallest and largest value of every dimension, rounded
// outwards to bf16, and a radius about the middle; and the same of runs of 8 cells (absolute: the
// first of a run is a multiple of 8 from position 0 on), under their last cell. A page of a prefix
// tree has one history, so what sequences share they share here too: pages that two sequences share
// must have the same pages before them, kv_pos0 may differ by whole pages. Memory of the backend,
// which knows the layout.
typedef struct attn_summary {
    uint16_t *data; // attn_summary_bytes, 64-byte aligned
} attn_summary;

// Bytes of one layer's summary; 0 when d is invalid or they do not fit in size_t. Reads n_kv_heads,
// head_dim, kv.page_tokens, kv.n_pages.
ATTN_DEF size_t attn_summary_bytes(const attn_desc *d);

// One layer's lists, in memory of the backend (seq_row in host memory). Plain data.
typedef struct attn_selection {
    attn_block_list list; // for desc.mask.blocks
    int64_t *row_start, *row_end; // (n_lists, n_rows + 1): list's, writable
    int32_t *block;               // (n_lists * n_rows * row_capacity): list's, writable
    int32_t *visited;             // (n_lists, n_rows + 1) keys scored for the row, per head
    float *missed;                // EXACT: (n_lists, n_rows + 1) bound on the missed share of mass
    uint8_t *state;               // HIP: stage caches, private
    int32_t *seq_row;             // (n_seq) host memory
    int32_t row_capacity, max_rows, n_lists, n_slots, keep_sink, keep_recent;
    int32_t keeps_all; // follow: by dense_below everything is kept, so select does nothing and the
                       // mask has no lists. 0 (a host may set it): lists all the same, which a
                       // captured graph follows past dense_below
    size_t state_bytes;
} attn_selection;

// ERR_ARGUMENT: bad parameters; ERR_UNSUPPORTED: see above; ERR_BUFFER: capacities.
ATTN_DEF attn_result attn_select_check(const attn_desc *d, const attn_select *s);

// List rows of d; bytes of a selection's memory and entries of one row for d, or for the capacities
// in s if those are larger; 0 when invalid.
ATTN_DEF int32_t attn_select_rows(const attn_desc *d, const attn_select *s);
ATTN_DEF size_t attn_select_bytes(const attn_desc *d, const attn_select *s);

// Lays a selection out in mem (64-byte aligned) and in seq_row ((n_seq), host memory). on_device:
// mem is a GPU's and is not touched; else every row is empty until it is selected. ERR_BUFFER.
ATTN_DEF attn_result attn_selection_init(const attn_desc *d, const attn_select *s, void *mem,
                                         size_t bytes, int32_t *seq_row, int on_device,
                                         attn_selection *out);

// Follows d: fills in seq_row; host only, before a step's first select. slot: (n_seq) distinct rows
// in [0, n_slots) of sequences with one query (default NULL: s). ERR_BUFFER: capacities; ERR_STALE:
// x was laid out for other parameters.
ATTN_DEF attn_result attn_selection_follow(const attn_desc *d, const attn_select *s,
                                           const int32_t *slot, attn_selection *x);

// Puts the selection's terms into a mask.
ATTN_DEF void attn_selection_mask(const attn_selection *x, attn_mask *m);

// Pairs (query, key, head) that d's mask lets through, and those its base term alone would.
ATTN_DEF attn_result attn_mask_kept(const attn_desc *d, int64_t *kept, int64_t *base);

// ==== >>delta  Correcting sparse attention by some dense rows ====================================
//
// Delta correction (arXiv 2505.11254), for any mask. Every step-th query of a sequence gets a dense
// row besides its sparse one; their difference is added to the rows up to the next of these, which
// itself becomes the dense one. About 1 / step of dense attention more:
//     run d as ever;   attn_delta_desc(&d, s, step, &delta, tables, &dense);   plan and run dense;
//     attn_<dev>_delta_take, then attn_<dev>_delta_add over its rows.
// LSE stays the sparse one's. Rows that need to be exact (the last of a prompt) are a dense problem
// of their own: q and o from the first of them on, q_pos0 to match.

// The dense rows of sequence s as a problem: sequences of one query each, over s's pages, d's base
// mask without its sparse terms.
//   delta   (n, n_heads, v_head_dim) for n = ceil(q_len / step) rows, f32 or as O
//   tables  4 n + 2 entries of host memory, kept as long as out
// ERR_ARGUMENT (step < 1, no queries), ERR_UNSUPPORTED (TREE masks, bias), those of attn_validate.
ATTN_DEF attn_result attn_delta_desc(const attn_desc *d, int32_t s, int32_t step,
                                     const attn_tensor *delta, int32_t *tables, attn_desc *out);

// ==== >>pool  Pages and their reference counts ===================================================

// Pages 0 .. n_pages - 1; a page is free while its count is 0. No page memory here: page ids index
// the caller's arrays, in every layer alike.
struct attn_pool {
    int32_t n_pages, n_free;
    int32_t *ref;  // (n_pages)
    int32_t *free; // (n_pages) stack of free ids
    void (*freed)(void *user, int32_t page); // checked builds: called when a count falls to 0
    void *freed_user;                        // (both set by the caller after init; default NULL)
};

ATTN_DEF size_t attn_pool_bytes(int32_t n_pages); // 0 when n_pages < 1
ATTN_DEF attn_result attn_pool_init(attn_pool *pool, int32_t n_pages, void *mem, size_t bytes);
ATTN_DEF attn_result attn_pool_alloc(attn_pool *pool, int32_t *page);  // count 1; ERR_FULL
// ERR_PAGE when the page is free or outside:
ATTN_DEF attn_result attn_pool_retain(attn_pool *pool, int32_t page);
ATTN_DEF attn_result attn_pool_release(attn_pool *pool, int32_t page);

// ==== >>tree  Token prefixes -> pages ============================================================
//
// A radix tree over token ids for all layers at once. A node holds a run of tokens and the pages
// they lie in; sequences end anywhere in a node. Runs may begin inside a page: two sequences that
// diverge there have their own copies of that page (copy on write), listed as attn_page_copy for
// the caller to carry out (attn_<dev>_copy_pages) before the next store. Token ids are compared on
// every hit. A namespace (model, adapter, tenant) shares nothing with another. Released prefixes
// stay cached until evicted.

typedef struct attn_page_copy {
    int32_t src, dst;
    int32_t n_tokens; // the first n_tokens slots
} attn_page_copy;

typedef struct attn_tree attn_tree; // lives in the caller's memory

typedef struct attn_tree_desc {
    int32_t n_pages;     // pages the tree manages (it owns a pool of that many)
    int32_t page_tokens;
    int32_t max_seq;     // live sequences (default 0: 256)
    int32_t max_nodes; // (default 0: 2 * n_pages + max_seq + 64: never runs out while fewer than 63
                       // prefixes are pinned or end where the priority changes; with fewer, a
                       // call that fails for want of a node may have evicted cached tokens)
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

// Lengthens a sequence by n tokens. The first *n_cached of them were already cached behind it
// (their K and V are there; do not store them again), the rest get page slots: the caller stores
// their K and V before anyone runs attention over them, or truncates; take the slots from
// attn_tree_pages right after the call: a later append may move the sequence's end to a copy of its
// last page. Page copies are appended to copies (capacity max_copies, *n_copies counts on;
// ERR_BUFFER); at most one per call. Carry them out in their order, in every layer, after the
// stores of tokens appended before them and before attention; stores of later tokens may come
// before or after. Both pages stay as they are until attn_tree_ack. Makes room by evicting cached
// leaves; a hopeless request evicts nothing. ERR_FULL undoes everything. It may come one page early
// for each border page kept in two copies.
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

// Shortens a sequence to n_tokens. Tokens stay as long as another sequence holds them, or once one
// that held them was released with keep, or they were pinned; else they are dropped and their pages
// freed (rollback of a draft). ERR_FULL: a node was needed and there was none, see max_nodes.
ATTN_DEF attn_result attn_tree_truncate(attn_tree *t, int32_t seq, int32_t n_tokens);

// Ends a sequence. keep = 1: its tokens stay cached until evicted; 0: as truncate to 0 first.
ATTN_DEF attn_result attn_tree_release(attn_tree *t, int32_t seq, int keep);

// Pins (+1) or unpins (-1) a cached prefix against eviction; its exact tokens must be in the tree
// (ERR_NOT_FOUND) and stay cached when unpinned. Pins count. ERR_FULL: out of nodes.
ATTN_DEF attn_result attn_tree_pin(attn_tree *t, uint64_t ns, const int32_t *tokens, int32_t n,
                                   int delta);

// Prefixes of higher priority are evicted later (default 0). Applies to the tokens that the
// sequence holds now (sets, not raises); tokens appended later have 0 again.
ATTN_DEF attn_result attn_tree_priority(attn_tree *t, int32_t seq, int32_t priority);

// Frees pages of unpinned, unused leaves, lowest priority first, then least recently used, each
// from its tail, until n_pages were freed or none is left; *n_freed may be NULL. n_pages < 0:
// everything.
ATTN_DEF attn_result attn_tree_evict(attn_tree *t, int32_t n_pages, int32_t *n_freed);

ATTN_DEF int32_t attn_tree_length(const attn_tree *t, int32_t seq); // tokens; < 0: an attn_result
// Copies tokens [first, first + n) of the sequence to out.
ATTN_DEF attn_result attn_tree_tokens(const attn_tree *t, int32_t seq, int32_t first, int32_t n,
                                      int32_t *out);
// Writes the sequence's page ids to out; returns how many ((length + page_tokens - 1) /
// page_tokens), or an attn_result < 0 (ERR_BUFFER when capacity is less).
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

// The tree's own pool, for attn_kv.pool and the freed callback: pages are the tree's to count.
ATTN_DEF attn_pool *attn_tree_pool(attn_tree *t);

// Checks every invariant (reference counts, links, fills, hash index); ATTN_OK or ERR_CORRUPT.
// O(nodes + pages + tokens). For tests and debugging. Uses scratch in the tree, as save does: both
// need the lock of a writer.
ATTN_DEF attn_result attn_tree_check(const attn_tree *t);

// ==== >>cache  Pages in slow memory behind a cache ===============================================
//
// KV offload. All pages of a layer lie where kv.k.data and kv.v.data say: a file mapped into memory
// or a second pool for the CPU, page-locked host memory for a GPU. kv.cache says which of them have
// a copy in fast memory. Executors and selectors read a page's copy where there is one, else the
// page itself, and count reads; stores write both. So results do not depend on what is cached, and
// nothing is lost when a cache thrashes. Between steps attn_cache_update decides by what was read
// which copies to drop and which to make, attn_<dev>_cache_load makes them.

// Memory of the backend; the counters may be NULL.
struct attn_kv_cache {
    void *k, *v;         // copies: n_slots pages as of kv.k and kv.v, as far apart as those; the
                         // same memory where V aliases K
    int32_t n_slots;
    const int32_t *slot; // (n_pages) where a page's copy is, or -1
    uint32_t *reads;     // (n_pages) += 1 by every task and unit of selection that reads a page's
                         // 256 tokens, or part of them (on a GPU: 64; there HiP counts each key)
};

typedef enum attn_cache_policy { // which pages stay; of equals those that are there, lower ids
    ATTN_CACHE_LRU = 0,          // read last
    ATTN_CACHE_LFU = 1,          // read most
    ATTN_CACHE_LRU_K = 2,        // whose k-th last reading is youngest, then LRU
    ATTN_CACHE_LRU_LFU = 3,      // LRU; of those read in the same step LFU
    ATTN_CACHE_DECAYED_LFU = 4   // LFU, counts fading by `decay` every update
} attn_cache_policy;

#define ATTN_CACHE_K 4

typedef struct attn_cache_params {
    int32_t n_pages, n_slots;
    attn_cache_policy policy;
    int32_t k;         // LRU_K (default 0: 2), <= ATTN_CACHE_K
    float decay;       // DECAYED_LFU, in (0, 1] (default 0: .9)
    int32_t max_loads; // copies an update may ask for (default 0: n_slots)
} attn_cache_params;

typedef struct attn_cache_load { // copy this page to this slot
    int32_t page, slot;
} attn_cache_load;

// One layer's cache, or that of several layers whose pages go together. Host memory.
typedef struct attn_cache {
    attn_cache_params params;
    int32_t *slot;    // (n_pages) for attn_kv_cache.slot, copied to the device for a GPU
    int32_t *page;    // (n_slots) the page there, or -1
    uint32_t *reads;  // (n_pages) for attn_kv_cache.reads, or filled from a device's; update zeroes
    uint8_t *wanted;  // (n_pages)
    int32_t *last;    // (n_pages, K) updates in which the page was read, youngest first; 0: none
    double *count;    // (n_pages) reads, faded
    int32_t *order;   // (n_pages) for update
    int32_t tick;     // updates so far
    int64_t hits, misses, loads, evictions; // hits, misses: reads with and without a copy
} attn_cache;

// Bytes of an attn_cache and its tables, 0 when p is invalid; 64-byte aligned memory, ERR_BUFFER.
ATTN_DEF size_t attn_cache_bytes(const attn_cache_params *p);
ATTN_DEF attn_result attn_cache_init(const attn_cache_params *p, void *mem, size_t bytes,
                                     attn_cache **out);

// Prefetching: the next update counts the page as read in this step, without statistics. A step's
// lists are a good guess at the next one's: attn_cache_want_listed does it for all pages that the
// rows of sequence s list for its queries. d must be valid, its mask's lists in host memory. (What
// was read over a GPU's own lists is in reads, which says the same.)
ATTN_DEF void attn_cache_want(attn_cache *c, int32_t page);
ATTN_DEF attn_result attn_cache_want_listed(attn_cache *c, const attn_desc *d, int32_t s);

// After a step: takes the reads in, and says which copies to make; slot is what it will be after
// that, so no reader may be under way until attn_<dev>_cache_load is done. loads: max_loads.
ATTN_DEF attn_result attn_cache_update(attn_cache *c, attn_cache_load *loads, int32_t *n_loads);

// The page's copy is void: it was freed, or written by other means than attn_<dev>_store and
// copy_pages. History is forgotten too.
ATTN_DEF void attn_cache_drop(attn_cache *c, int32_t page);

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

// ==== >>check  Checked builds ====================================================================
//
// With ATTN_CHECK every run, merge and forward of a backend validates its tables again and then
// recomputes one row of what it wrote (another one in each call) by the definitions of >>ref; a
// deviation beyond the rounding that the backend may do is ERR_CHECK. With d.kv.pool set, a page in
// a table, slot or copy that is free there is ERR_CHECK as well, before memory is touched. Pages
// are the caller's memory, so the pool says when one falls free and the caller poisons it, in every
// layer; a run then also looks whether a free page was written to:
//     static void freed(void *user, int32_t page) {
//         for (int i = 0; i < n_layers; i++) attn_check_poison(&layer[i].desc, page);
//     }
//     pool = attn_tree_pool(tree);  pool->freed = freed;  freed(NULL, -1);
//     layer[i].desc.kv.pool = pool;
// The pool must not change while a run is under way. Costs O(tables) and one row in fp64 per call;
// 32 KiB of stack. Without the macro nothing of this is compiled, and kv.pool and freed are unused.
#ifdef ATTN_CHECK

// Fills the rows of a page of d's K and V, scales included, with bytes of 0xff: NaN in every float
// type, through the stored scale else. page -1: all. Nothing when d's layout or page is invalid.
ATTN_DEF void attn_check_poison(const attn_desc *d, int32_t page);

// attn_validate, then what kv.pool and freed promise; turn picks the free page that is looked at.
ATTN_DEF attn_result attn_check_tables(const attn_desc *d, uint32_t turn);

// Compares o (v_head_dim values as the backend wrote them) and *lse (may be NULL) with the
// definitions: query token t, head h, keys at positions [from, to); the sink logit counts only when
// to is INT64_MAX. ATTN_OK also where rounding could explain anything (scores of 1e9, say) or NaN
// comes from the inputs; else ERR_CHECK. d must be valid.
ATTN_DEF attn_result attn_check_row(const attn_desc *d, int32_t t, int32_t h, int64_t from,
                                    int64_t to, const float *o, const float *lse);
#endif

#endif // ATTN_H

// ==== Stop here if you only want the API. ========================================================

#if defined(ATTN_IMPLEMENTATION) || defined(ATTN_CORE_IMPLEMENTATION) ||                           \
    defined(ATTN_CPU_IMPLEMENTATION) || defined(ATTN_CUDA_IMPLEMENTATION) ||                       \
    defined(ATTN_METAL_IMPLEMENTATION)
#ifndef ATTNI_SHARED
#define ATTNI_SHARED

// ==== >>impl-shared  What the core and the backends both need (private, static) ==================

#include <string.h>

#ifdef __CUDACC__
#define ATTNI_HD __host__ __device__ // kernels call this section's functions as well
#else
#define ATTNI_HD
#endif
#if defined(__GNUC__) || defined(__clang__)
#define ATTNI_FN ATTNI_HD static inline __attribute__((unused))
#ifdef __CUDACC__
#define ATTNI_FAR ATTNI_HD static __noinline__ __attribute__((unused))
#else
#define ATTNI_FAR                                                                                  \
    static __attribute__((unused, noinline)) // larger ones: inlining costs compile time
#endif
#else
#define ATTNI_FN ATTNI_HD static inline
#define ATTNI_FAR ATTNI_HD static
#endif

ATTNI_FN int32_t attni_min32(int32_t a, int32_t b) { return a < b ? a : b; }
ATTNI_FN int32_t attni_max32(int32_t a, int32_t b) { return a > b ? a : b; }
ATTNI_FN int64_t attni_min64(int64_t a, int64_t b) { return a < b ? a : b; }
ATTNI_FN int64_t attni_max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- scalar conversions; NaN tests on the bits, so that the user's -ffast-math cannot drop them

ATTNI_FN uint32_t attni_bits32(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

ATTNI_FN float attni_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// ---- arithmetic that the user's flags cannot change
//
// PIN and PIN64 hide a float and a double behind an empty instruction, in the register they are in.
// A compiler cannot contract, reassociate, distribute or simplify through it, whatever -ffast-math,
// -ffp-contract or x87 registers allow.

#if defined(__CUDA_ARCH__) // contraction is ptxas's, which sees through this: kernels use _rn calls
#define ATTNI_PIN(x) ((void)(x))
#define ATTNI_PIN64(x) ((void)(x))
#elif defined(__GNUC__) && defined(__SSE2__)
#define ATTNI_PIN(x) __asm__("" : "+x"(x))
#define ATTNI_PIN64(x) __asm__("" : "+x"(x))
#elif defined(__GNUC__) && defined(__aarch64__)
#define ATTNI_PIN(x) __asm__("" : "+w"(x))
#define ATTNI_PIN64(x) __asm__("" : "+w"(x))
#elif defined(__GNUC__) && defined(__arm__) && defined(__ARM_FP) && (__ARM_FP & 12) == 12
#define ATTNI_PIN(x) __asm__("" : "+t"(x)) // not NEON, which has no denormals
#define ATTNI_PIN64(x) __asm__("" : "+w"(x))
#elif defined(__GNUC__) && (defined(__s390x__) || (defined(__riscv_flen) && __riscv_flen >= 64))
#define ATTNI_PIN(x) __asm__("" : "+f"(x))
#define ATTNI_PIN64(x) __asm__("" : "+f"(x))
#elif defined(__GNUC__) && defined(__wasm__)
#define ATTNI_PIN(x) __asm__("" : "+r"(x))
#define ATTNI_PIN64(x) __asm__("" : "+r"(x))
#elif defined(__GNUC__)
#define ATTNI_PIN(x) __asm__("" : "+m"(x))
#define ATTNI_PIN64(x) __asm__("" : "+m"(x))
#else
#define ATTNI_PIN(x) ((void)(*(volatile float *)&(x) = (x)))
#define ATTNI_PIN64(x) ((void)(*(volatile double *)&(x) = (x)))
#endif

// a / b, correctly rounded: no reciprocal, no estimate. On x86 -ffast-math turns divisions it
// vectorises into estimates, so there the instruction is written out.
ATTNI_FN float attni_div(float a, float b) {
#if defined(__CUDA_ARCH__)
    a = __fdiv_rn(a, b);
#elif defined(__GNUC__) && defined(__AVX__)
    __asm__("vdivss %1, %0, %0" : "+x"(a) : "x"(b));
#elif defined(__GNUC__) && defined(__SSE2__)
    __asm__("divss %1, %0" : "+x"(a) : "x"(b));
#else
    ATTNI_PIN(a);
    ATTNI_PIN(b);
    a = a / b;
    ATTNI_PIN(a);
#endif
    return a;
}

// a * b, which no addition makes one operation with on a GPU.
ATTNI_FN float attni_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// a < b on the bits, false with NaN: -ffinite-math-only lets a compiler turn comparisons round.
ATTNI_FN int attni_less(float a, float b) {
    int64_t x = attni_bits32(a), y = attni_bits32(b);
    x = x >> 31 ? 0x80000000 - x : x;
    y = y >> 31 ? 0x80000000 - y : y;
    return x < y && x >= -0x7f800000 && y <= 0x7f800000;
}

ATTNI_FN int attni_finite(float x) { return (attni_bits32(x) & 0x7f800000u) != 0x7f800000u; }
ATTNI_FN int attni_isnan(float x) { return (attni_bits32(x) & 0x7fffffffu) > 0x7f800000u; }

ATTNI_FN float attni_from_bf16(uint16_t h) { return attni_float((uint32_t)h << 16); }

ATTNI_FN uint16_t attni_to_bf16(float x) {
    uint32_t u = attni_bits32(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// A small float of 1 + e + m bits with bias 2^(e-1) - 1 to f32, exactly. Integer arithmetic only:
// denormals do not depend on the FPU's mode. The all-ones exponent is Inf/NaN if ieee.
ATTNI_FAR float attni_from_small(uint32_t h, int e, int m, int ieee) {
    uint32_t sign = ((h >> (e + m)) & 1u) << 31, man = h & ((1u << m) - 1u);
    int32_t ex = (int32_t)((h >> m) & ((1u << e) - 1u));
    int32_t bias = (1 << (e - 1)) - 1, top = (1 << e) - 1;
    if (ex == top && ieee)
        return attni_float(sign | 0x7f800000u | (man ? 0x400000u | (man << (23 - m)) : 0u));
    if (ex == 0) {
        if (man == 0) return attni_float(sign);
        for (ex = 1; !(man & (1u << m)); ex--) man <<= 1;
        man &= (1u << m) - 1u;
    }
    return attni_float(sign | (uint32_t)(ex - bias + 127) << 23 | man << (23 - m));
}

// f32 to such a float, round to nearest even; too large becomes max_code (Inf or the largest
// value).
ATTNI_FAR uint32_t attni_to_small(float x, int e, int m, uint32_t max_code, uint32_t nan_code) {
    uint32_t u = attni_bits32(x), sign = (u >> 31) << (e + m), a = u & 0x7fffffffu, man, rest;
    int32_t bias = (1 << (e - 1)) - 1, ex, shift;
    if (a > 0x7f800000u) return sign | nan_code;
    ex = (int32_t)(a >> 23) - 127 + bias;
    if (ex >= (1 << e)) return sign | max_code;
    man = (a & 0x7fffffu) | 0x800000u;
    shift = 23 - m + (ex < 1 ? 1 - ex : 0);
    if (shift > 24) return sign; // below half of the smallest denormal
    rest = man & ((1u << shift) - 1u);
    man >>= shift;
    if (rest > (1u << (shift - 1)) || (rest == (1u << (shift - 1)) && (man & 1u))) man++;
    // a carry out of the mantissa moves into the exponent by itself
    man = ex < 1 ? man : man + ((uint32_t)(ex - 1) << m);
    return sign | (man > max_code ? max_code : man);
}

ATTNI_FN float attni_from_f16(uint16_t h) {
#if defined(__CUDA_ARCH__)
    float f; // a NaN would lose its sign
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    if ((h & 0x7fffu) <= 0x7c00u) return f;
#endif
    return attni_from_small(h, 5, 10, 1);
}
ATTNI_FN uint16_t attni_to_f16(float x) {
    return (uint16_t)attni_to_small(x, 5, 10, 0x7c00u, 0x7e00u);
}
ATTNI_FN float attni_from_e5m2(uint8_t h) { return attni_from_small(h, 5, 2, 1); }
ATTNI_FN uint8_t attni_to_e5m2(float x) { return (uint8_t)attni_to_small(x, 5, 2, 0x7bu, 0x7fu); }
ATTNI_FN float attni_from_e4m3(uint8_t h) { // no Inf; only 0x7f is NaN
    if ((h & 0x7fu) == 0x7fu) return attni_float(0x7fc00000u | (uint32_t)(h & 0x80u) << 24);
    return attni_from_small(h, 4, 3, 0);
}
ATTNI_FN uint8_t attni_to_e4m3(float x) { return (uint8_t)attni_to_small(x, 4, 3, 0x7eu, 0x7fu); }

// Nearest integer, ties to even, clamped to [-lim, lim]; NaN gives 0 (the row's scale is NaN then).
ATTNI_FAR int attni_round_clamp(float x, int lim) {
    float r;
    int i;
    if (attni_isnan(x)) return 0;
    if (x >= (float)lim) return lim;
    if (x <= (float)-lim) return -lim;
    i = (int)x;
    r = x - (float)i; // exact, |r| < 1
    if (r > 0.5f || (r == 0.5f && (i & 1))) i++;
    if (r < -0.5f || (r == -0.5f && (i & 1))) i--;
    return i;
}

ATTNI_FN int attni_bits_of(attn_dtype t) {
    static const uint8_t bits[ATTN_DTYPE_COUNT] = {0, 32, 16, 16, 8, 8, 8, 4};
    return (int)t > 0 && (int)t < (int)ATTN_DTYPE_COUNT ? bits[t] : 0;
}
ATTNI_FN int attni_is_scaled(attn_dtype t) { return t >= ATTN_F8E4M3 && t < ATTN_DTYPE_COUNT; }
ATTNI_FN int attni_is_float(attn_dtype t) { return t >= ATTN_F32 && t <= ATTN_BF16; }

// The largest code of a scaled dtype: scale = max |x| / this.
ATTNI_FN float attni_code_max(attn_dtype t) {
    return t == ATTN_F8E4M3 ? 448.0f : t == ATTN_F8E5M2 ? 57344.0f : t == ATTN_I8 ? 127.0f : 7.0f;
}

// Element i of an array at p, without its scale.
ATTNI_FAR float attni_get(const void *p, attn_dtype t, int64_t i) {
    const uint8_t *b = (const uint8_t *)p;
    uint16_t h;
    float f;
    int c;
    switch (t) {
    case ATTN_F32: memcpy(&f, b + 4 * i, 4); return f;
    case ATTN_F16: memcpy(&h, b + 2 * i, 2); return attni_from_f16(h);
    case ATTN_BF16: memcpy(&h, b + 2 * i, 2); return attni_from_bf16(h);
    case ATTN_F8E4M3: return attni_from_e4m3(b[i]);
    case ATTN_F8E5M2: return attni_from_e5m2(b[i]);
    case ATTN_I8: return (float)(b[i] < 128 ? (int)b[i] : (int)b[i] - 256);
    case ATTN_I4:
        c = (b[i >> 1] >> (4 * (int)(i & 1))) & 15;
        return (float)(c < 8 ? c : c - 16);
    default: return 0.0f;
    }
}

// Stores x (already divided by the scale) as element i.
ATTNI_FAR void attni_put(void *p, attn_dtype t, int64_t i, float x) {
    uint8_t *b = (uint8_t *)p;
    uint16_t h;
    switch (t) {
    case ATTN_F32: memcpy(b + 4 * i, &x, 4); break;
    case ATTN_F16: h = attni_to_f16(x); memcpy(b + 2 * i, &h, 2); break;
    case ATTN_BF16: h = attni_to_bf16(x); memcpy(b + 2 * i, &h, 2); break;
    case ATTN_F8E4M3: b[i] = attni_to_e4m3(x); break;
    case ATTN_F8E5M2: b[i] = attni_to_e5m2(x); break;
    case ATTN_I8: b[i] = (uint8_t)attni_round_clamp(x, 127); break;
    case ATTN_I4: {
        int c = attni_round_clamp(x, 7) & 15, s = 4 * (int)(i & 1);
        b[i >> 1] = (uint8_t)((b[i >> 1] & (15 << (4 - s))) | (c << s));
        break;
    }
    default: break;
    }
}

ATTNI_FAR double attni_sqrt(double x) { // x in [1, 1e6]; no libm
    double y = x;
    int i;
    for (i = 0; i < 40; i++) {
        double t = x / y;
        ATTNI_PIN64(t);
        y = 0.5 * (y + t);
        ATTNI_PIN64(y);
    }
    return y;
}

// ln x by an atanh series, to about 1e-16.
ATTNI_FAR double attni_ln(double x) { // x > 0, finite and normal
    uint64_t u;
    double m, n, s2, t, term, sum = 0;
    int64_t k;
    int i;
    memcpy(&u, &x, 8);
    k = (int64_t)(u >> 52) - 1023;
    u = (u & (((uint64_t)1 << 52) - 1)) | (uint64_t)1023 << 52;
    memcpy(&m, &u, 8);
    if (m > 1.4142135623730951) m *= 0.5, k++;
    n = m + 1;
    m -= 1;
    ATTNI_PIN64(m);
    ATTNI_PIN64(n);
    t = m / n;
    ATTNI_PIN64(t);
    s2 = t * t;
    ATTNI_PIN64(s2);
    for (i = 1; i < 30; i += 2) {
        term = (double)i; // hidden: else t / i is t * (1 / i) under -freciprocal-math
        ATTNI_PIN64(term);
        term = t / term;
        ATTNI_PIN64(term);
        sum += term;
        ATTNI_PIN64(sum);
        t *= s2;
        ATTNI_PIN64(t);
    }
    t = (double)k * 0.6931471805599453;
    ATTNI_PIN64(t);
    return 2 * sum + t;
}

ATTNI_FN int attni_isnan64(double x) {
    uint64_t u;
    memcpy(&u, &x, 8);
    return (u & ~((uint64_t)1 << 63)) > (uint64_t)0x7ff << 52;
}

// exp and tanh without libm, to about 1e-15: x = k ln 2 + r and a Taylor series in r. x <= 0.
ATTNI_FAR double attni_exp64(double x) {
    double r, s = 1, t = 1;
    int64_t k;
    uint64_t u;
    int i;
    if (attni_isnan64(x)) return x;
    if (x < -745) return 0;
    k = (int64_t)(x * 1.4426950408889634 - 0.5);
    r = (x - (double)k * 0.693147180369123816490) - (double)k * 1.90821492927058770002e-10;
    for (i = 1; i < 16; i++) s += (t *= r / i);
    if (k < -1000)
        return attni_exp64(x + 693.14718055994530942) * 9.332636185032189e-302; // 2^-1000
    u = (uint64_t)(k + 1023) << 52;
    memcpy(&t, &u, 8);
    return s * t;
}

ATTNI_FAR double attni_tanh64(double x) {
    double a = x < 0 ? -x : x, e, y, q = x * x;
    if (a < 0.03)
        return x * (1 - q * (1.0 / 3 - q * (2.0 / 15 - q * (17.0 / 315 - q * (62.0 / 2835)))));
    e = attni_exp64(-2 * a);
    y = (1 - e) / (1 + e);
    return x < 0 ? -y : y;
}

ATTNI_FN int32_t attni_v_dim(const attn_desc *d) {
    return d->v_head_dim ? d->v_head_dim : d->head_dim;
}
ATTNI_FN float attni_scale(const attn_desc *d) {
    uint32_t u = attni_bits32(d->logits.scale);
    return (u & 0x7fffffffu) ? d->logits.scale : (float)(1.0 / attni_sqrt((double)d->head_dim));
}

// ---- checks that read no tables

// Do n_in rows of dim elements s_in apart, repeated n_out times s_out apart, touch each other?
ATTNI_FAR int attni_rows_overlap(int64_t n_in, int64_t s_in, int64_t n_out, int64_t s_out,
                                 int64_t dim) {
    if (n_in > 1 && s_in < dim) return 1;
    return n_out > 1 && s_out < (n_in - 1) * s_in + dim;
}

ATTNI_FAR int attni_bad_view(const attn_tensor *t, int64_t n_tokens, int64_t heads, int64_t dim,
                             int written) {
    int64_t st = t->stride_token ? t->stride_token : heads * dim;
    int64_t sh = t->stride_head ? t->stride_head : dim, limit = (int64_t)1 << 58;
    if (st < 0 || sh < 0) return 1;
    if (st > limit / attni_max64(n_tokens, 1) || sh > limit / heads) return 1;
    if (!written || n_tokens == 0) return 0;
    // rows that are written must not overlap, in either order of the two strides
    return attni_rows_overlap(heads, sh, n_tokens, st, dim) &&
           attni_rows_overlap(n_tokens, st, heads, sh, dim);
}

// Rows [0, end) of a tensor to read or, NULL, to leave out.
ATTNI_FAR attn_result attni_check_rows(const attn_tensor *t, int64_t heads, int64_t end) {
    int64_t limit = (int64_t)1 << 58;
    if (!t) return ATTN_OK;
    if (!t->data) return ATTN_ERR_ARGUMENT;
    if (!attni_is_float(t->dtype)) return ATTN_ERR_DTYPE;
    if (t->stride_token < 0 || t->stride_head < 0) return ATTN_ERR_LAYOUT;
    return t->stride_token > limit / attni_max64(end, 1) || t->stride_head > limit / heads
               ? ATTN_ERR_OVERFLOW : ATTN_OK;
}

// ---- Delta correction: rows of tensors of heads x v_head_dim

// Element 0 of a row.
ATTNI_FN int64_t attni_o_row(const attn_desc *d, const attn_tensor *t, int64_t token,
                             int32_t head) {
    int64_t st = t->stride_token ? t->stride_token : (int64_t)d->n_heads * attni_v_dim(d);
    return token * st + head * (t->stride_head ? t->stride_head : attni_v_dim(d));
}

// d's shape must be right already.
ATTNI_FAR attn_result attni_delta_check(const attn_desc *d, int32_t s, int32_t step,
                                        const attn_tensor *delta, int32_t first, int32_t count) {
    int32_t q_len, n;
    attn_result r;
    if (s < 0 || s >= d->n_seq || step < 1 || !delta || !delta->data || !d->o.data)
        return ATTN_ERR_ARGUMENT;
    q_len = d->q_start[s + 1] - d->q_start[s];
    if (first < 0 || count < 0 || q_len < 1) return ATTN_ERR_ARGUMENT;
    n = (q_len - 1) / step + 1;
    if (count > n - first) return ATTN_ERR_ARGUMENT;
    if ((r = attni_check_rows(delta, d->n_heads, n)) != ATTN_OK) return r;
    return attni_is_float(d->o.dtype) ? ATTN_OK : ATTN_ERR_DTYPE;
}

// ---- K or V pages, resolved: where the 4-byte units and the scales of a token lie

typedef struct attni_side {
    uint8_t *data;
    attn_dtype dtype;
    int k16;                          // units of a token are 64 bytes apart, else 4
    int32_t dim, page_tokens;
    int64_t page_bytes, token_bytes, head_bytes;
    int64_t scale_offset, scale_token,
        scale_head; // bytes in the page; scale_offset < 0: none there
    const float *head_scale;
    int64_t need_bytes;               // what a page really holds
    uint8_t *copies;                  // of pages that have one, as slot says; NULL: no cache
    const int32_t *slot;
    int32_t n_slots;
    int32_t first_copy;               // CUDA: ids from here on are slots', whose copies lie ...
    int64_t to_copies;                // ... so many bytes from where a page of this id would
} attni_side;

// Where a page is read: its copy, if there is one.
ATTNI_FN uint8_t *attni_page_data(const attni_side *s, int64_t page) {
    if (s->copies) {
        int32_t slot = s->slot[page];
        if (slot >= 0 && slot < s->n_slots) return s->copies + slot * s->page_bytes;
    }
    return s->data + page * s->page_bytes;
}

// Byte offset of the first unit of a token inside its page.
ATTNI_FN int64_t attni_token_offset(const attni_side *s, int32_t place, int32_t head) {
    if (s->k16)
        return head * s->head_bytes + (int64_t)(place >> 4) * 16 * s->token_bytes +
               (place & 15) * 4;
    return place * s->token_bytes + head * s->head_bytes;
}

// Byte offset of its scale, where pages hold scales.
ATTNI_FN int64_t attni_scale_offset(const attni_side *s, int32_t place, int32_t head) {
    return s->scale_offset + place * s->scale_token + head * s->scale_head;
}

// The scale of a token in a page that lies at `page`: the page itself or its copy.
ATTNI_FAR float attni_scale_in(const attni_side *s, const uint8_t *page, int32_t place,
                               int32_t head) {
    float f = 1.0f;
    if (s->head_scale) return s->head_scale[head];
    if (s->scale_offset < 0) return 1.0f;
    memcpy(&f, page + attni_scale_offset(s, place, head), 4);
    return f;
}

ATTNI_FN float attni_token_scale(const attni_side *s, int64_t page, int32_t place, int32_t head) {
    return attni_scale_in(s, s->data + page * s->page_bytes, place, head);
}

// Elements of a page whose tokens are st and whose heads are sh elements apart; 0: rows overlap or
// leave it; -1: more than 2^54.
ATTNI_FAR int64_t attni_page_elements(int64_t heads, int64_t pt, int64_t dim, int64_t st,
                                      int64_t sh, int head_major) {
    int64_t elements, limit = (int64_t)1 << 54;
    if (st > limit / pt || sh > limit / heads) return -1;
    elements = attni_max64(pt * st, heads * sh);
    if (heads == 1 && !head_major) elements = pt * st;
    if (pt == 1 && head_major) elements = heads * sh;
    return (pt - 1) * st + (heads - 1) * sh + dim > elements ? 0 : elements;
}

// Places rows, then scales in a page; dim, page_tokens and dtype are set.
ATTNI_FAR attn_result attni_side_place(attni_side *s, int64_t heads, int64_t st, int64_t sh,
                                       int head_major, int scales) {
    int64_t bits = attni_bits_of(s->dtype), pt = s->page_tokens;
    int64_t elements = attni_page_elements(heads, pt, s->dim, st, sh, head_major);
    if (elements < 0) return ATTN_ERR_OVERFLOW;
    if (elements == 0 || st * bits % 8 || sh * bits % 8) return ATTN_ERR_LAYOUT;
    s->token_bytes = st * bits / 8;
    s->head_bytes = sh * bits / 8;
    s->need_bytes = elements * bits / 8;
    s->scale_offset = -1;
    s->scale_token = s->scale_head = 0;
    if (scales) {
        s->scale_offset = (s->need_bytes + 3) / 4 * 4;
        s->scale_token = head_major ? 4 : 4 * heads;
        s->scale_head = head_major ? 4 * pt : 4;
        s->need_bytes = s->scale_offset + 4 * pt * heads;
    }
    return ATTN_OK;
}

// Resolves an array; d's dims, heads, dtype and page_tokens must be in range already.
ATTNI_FAR attn_result attni_side_init(const attn_desc *d, int is_v, attni_side *s) {
    const attn_kv_array *a = is_v ? &d->kv.v : &d->kv.k;
    int64_t heads = d->n_kv_heads, pt = d->kv.page_tokens, limit = (int64_t)1 << 56;
    int64_t dim = is_v ? attni_v_dim(d) : d->head_dim, st = a->stride_token, sh = a->stride_head;
    attn_result r;
    int head_major = d->kv.layout != ATTN_TOKEN_MAJOR;
    s->data = (uint8_t *)a->data;
    s->dtype = a->dtype;
    s->k16 = d->kv.layout == ATTN_K16 && !is_v;
    s->dim = (int32_t)dim;
    s->page_tokens = d->kv.page_tokens;
    s->head_scale = attni_is_scaled(a->dtype) ? a->head_scale : NULL;
    s->copies = NULL;
    s->first_copy = INT32_MAX;
    s->to_copies = 0;
    if (d->kv.cache) {
        s->copies = (uint8_t *)(is_v ? d->kv.cache->v : d->kv.cache->k);
        s->slot = d->kv.cache->slot;
        s->n_slots = d->kv.cache->n_slots;
    }
    if (st < 0 || sh < 0 || (s->k16 && (st || sh))) return ATTN_ERR_LAYOUT;
    if (d->kv.layout == ATTN_K16 && pt % 16) return ATTN_ERR_LAYOUT;
    if (!st) st = head_major ? dim : heads * dim;
    if (!sh) sh = head_major ? pt * dim : dim;
    if ((r = attni_side_place(s, heads, st, sh, head_major,
                              attni_is_scaled(a->dtype) && !a->head_scale)) != ATTN_OK)
        return r;
    s->page_bytes = a->page_bytes ? a->page_bytes : s->need_bytes;
    if (s->page_bytes < s->need_bytes) return ATTN_ERR_LAYOUT;
    if (s->page_bytes > limit || s->page_bytes > (INT64_MAX >> 1) / d->kv.n_pages)
        return ATTN_ERR_OVERFLOW;
    return ATTN_OK;
}

// V's copies alias K's where its pages do.
ATTNI_FN int attni_bad_cache(const attn_kv *kv) {
    const attn_kv_cache *c = kv->cache;
    return c && (!c->k || !c->v || !c->slot || c->n_slots < 1 ||
                 (c->k == c->v) != (kv->k.data == kv->v.data));
}

ATTNI_FN int32_t attni_kv_pos0(const attn_desc *d, int32_t s) {
    return d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0;
}

ATTNI_FN int32_t attni_q_pos0(const attn_desc *d, int32_t s) {
    if (d->q_pos0) return d->q_pos0[s];
    return attni_kv_pos0(d, s) + d->kv.kv_len[s] - (d->q_start[s + 1] - d->q_start[s]);
}

// Page of held token j, or -1.
ATTNI_FN int32_t attni_page_of(const attn_desc *d, int32_t s, int32_t j) {
    int32_t page = s;
    if (d->kv.page_table)
        page = d->kv.page_table[s * d->kv.page_table_stride + j / d->kv.page_tokens];
    return page >= 0 && page < d->kv.n_pages ? page : -1;
}

// ---- masks, one pair at a time (the definition) and 256 keys at a time (what backends run)

ATTNI_FN int32_t attni_list_of(const attn_desc *d, int32_t n_lists, int32_t head) {
    return n_lists == 1 ? 0 : n_lists == d->n_heads ? head : head / (d->n_heads / d->n_kv_heads);
}

// First index in [lo, hi) of an ascending array whose element is >= x.
ATTNI_FAR int64_t attni_lower_bound(const int32_t *a, int64_t lo, int64_t hi, int64_t x) {
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        if (a[mid] < x) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

ATTNI_FN int attni_contains(const int32_t *a, int64_t lo, int64_t hi, int64_t x) {
    int64_t i = attni_lower_bound(a, lo, hi, x);
    return i < hi && a[i] == x;
}

ATTNI_FAR int attni_stride_keeps(const attn_desc *d, int32_t kv_head, int64_t i, int64_t j) {
    const attn_local_stride *r = &d->mask.stride;
    int64_t total = r->n_heads_total ? r->n_heads_total : d->n_kv_heads;
    int64_t h = r->homogeneous ? 0 : kv_head + r->head0, step = r->head_step, a, right;
    if (!r->bidirectional && j > i) return 0;
    if (!r->homogeneous && h >= total - r->n_dense) return 1;
    if (r->bidirectional) {
        right = r->local_right ? r->local_right : r->local;
        a = attni_max64(0, i - j - r->local + 1) + attni_max64(0, j - i - right + 1);
        return a % r->stride == 0;
    }
    if (!step) step = attni_max64(1, r->stride / total);
    if (i - j < r->local) return 1;
    a = (j + h * step + r->offset) % r->stride;
    return a == 0;
}

// 1 when entry e of the block list (of a row at sub-row sub) keeps the sub-column col.
ATTNI_FN int attni_sub_bit(const attn_block_list *b, int64_t e, int32_t sub, int32_t col) {
    int64_t words = ((int64_t)b->bits_rows * b->bits_cols + 63) / 64;
    int64_t bit = (int64_t)sub * b->bits_cols + col;
    return (int)((b->bits[e * words + bit / 64] >> (bit % 64)) & 1u);
}

ATTNI_FN int64_t attni_list_row(const attn_desc *d, int32_t seq, int64_t p) {
    const attn_block_list *b = &d->mask.blocks;
    return (b->seq_row ? b->seq_row[seq] : 0) + p / b->row_block;
}

// Where the entries of a row of a list begin and end.
ATTNI_FN int64_t attni_row_start(const attn_block_list *b, int64_t list, int64_t row) {
    return b->row_start[list * ((int64_t)b->n_rows + 1) + row];
}
ATTNI_FN int64_t attni_row_end(const attn_block_list *b, int64_t list, int64_t row) {
    int64_t at = list * ((int64_t)b->n_rows + 1) + row;
    return b->row_end ? b->row_end[at] : b->row_start[at + 1];
}

// Do masks differ between the query heads of a KV head?
ATTNI_FN int attni_per_head(const attn_desc *d) {
    const attn_mask *m = &d->mask;
    return d->n_heads > d->n_kv_heads &&
           ((m->blocks.row_start && m->blocks.n_lists == d->n_heads) ||
            (m->vslash.block && m->vslash.n_lists == d->n_heads));
}

// Block lists that host functions may not read.
ATTNI_FN int attni_device_list(const attn_mask *m) {
    return m->blocks.row_start && m->blocks.device_entries;
}

ATTNI_FN int attni_has_sparse(const attn_mask *m) {
    return m->blocks.row_start || m->stride.block || m->vslash.block || m->keep_sink ||
           m->keep_recent;
}

ATTNI_FAR int attni_sparse_pair(const attn_desc *d, int32_t seq, int64_t p, int64_t k,
                               int32_t head) {
    const attn_mask *m = &d->mask;
    const attn_block_list *b = &m->blocks;
    const attn_vertical_slash *v = &m->vslash;
    if (!attni_has_sparse(m)) return 1;
    if (k < m->keep_sink || (m->keep_recent && p - k < m->keep_recent)) return 1;
    if (m->stride.block &&
        attni_stride_keeps(d, head / (d->n_heads / d->n_kv_heads), p / m->stride.block,
                           k / m->stride.block))
        return 1;
    if (v->block) {
        int32_t l = attni_list_of(d, v->n_lists, head);
        int64_t i = p / v->block, j = k / v->block;
        if (attni_contains(v->col, v->col_start[l], v->col_start[l + 1], j)) return 1;
        if (attni_contains(v->diag, v->diag_start[l], v->diag_start[l + 1], i - j)) return 1;
    }
    if (b->row_start) {
        int32_t l = attni_list_of(d, b->n_lists, head);
        int64_t row = attni_list_row(d, seq, p), end = attni_row_end(b, l, row);
        int64_t e = attni_lower_bound(b->block, attni_row_start(b, l, row), end, k / b->kv_block);
        if (e < end && b->block[e] == k / b->kv_block) {
            if (!b->bits) return 1;
            return attni_sub_bit(b, e, (int32_t)(p % b->row_block) / (b->row_block / b->bits_rows),
                                 (int32_t)(k % b->kv_block) / (b->kv_block / b->bits_cols));
        }
    }
    return 0;
}

ATTNI_FN int attni_window_pair(const attn_mask *m, int64_t p, int64_t k) {
    if (k < m->n_sink) return 1;
    if (m->window_left && k < p - (m->window_left - 1)) return 0;
    if (m->window_right && k > p + (m->window_right - 1)) return 0;
    return 1;
}

// Sets bits [a, b) of 256, clipped.
ATTNI_FAR void attni_bits_set(uint64_t bits[4], int64_t a, int64_t b) {
    int w;
    a = attni_max64(a, 0);
    b = attni_min64(b, 256);
    for (w = 0; w < 4; w++) {
        int64_t lo = attni_max64(a - 64 * w, 0), hi = attni_min64(b - 64 * w, 64);
        if (lo < hi)
            bits[w] |= (hi - lo == 64 ? ~(uint64_t)0 : (((uint64_t)1 << (hi - lo)) - 1)) << lo;
    }
}

// Remembers the sparse terms of the last row block seen: the rows of a tile mostly share them.
typedef struct attni_masker {
    const attn_desc *d;
    int sparse;
    int64_t key[6];
    uint64_t bits[4];
} attni_masker;

ATTNI_FN void attni_masker_init(attni_masker *m, const attn_desc *d) {
    m->d = d;
    m->sparse = attni_has_sparse(&d->mask);
    m->key[0] = -1;
}

ATTNI_FAR void attni_list_bits(const attn_desc *d, int32_t seq, int64_t p, int32_t head, int64_t b0,
                              uint64_t bits[4]) {
    const attn_block_list *b = &d->mask.blocks;
    int32_t l = attni_list_of(d, b->n_lists, head);
    int64_t row = attni_list_row(d, seq, p), end = attni_row_end(b, l, row);
    int64_t e = attni_lower_bound(b->block, attni_row_start(b, l, row), end, b0 / b->kv_block);
    for (; e < end && (int64_t)b->block[e] * b->kv_block < b0 + 256; e++) {
        int64_t first = (int64_t)b->block[e] * b->kv_block - b0;
        int32_t c, sub, width;
        if (!b->bits) {
            attni_bits_set(bits, first, first + b->kv_block);
            continue;
        }
        sub = (int32_t)(p % b->row_block) / (b->row_block / b->bits_rows);
        width = b->kv_block / b->bits_cols;
        for (c = 0; c < b->bits_cols; c++)
            if (attni_sub_bit(b, e, sub, c))
                attni_bits_set(bits, first + (int64_t)c * width, first + (int64_t)(c + 1) * width);
    }
}

ATTNI_FAR void attni_vslash_bits(const attn_desc *d, int64_t p, int32_t head, int64_t b0,
                                uint64_t bits[4]) {
    const attn_vertical_slash *v = &d->mask.vslash;
    int32_t l = attni_list_of(d, v->n_lists, head);
    int64_t i = p / v->block, j0 = b0 / v->block, j1 = (b0 + 255) / v->block, e;
    e = attni_lower_bound(v->col, v->col_start[l], v->col_start[l + 1], j0);
    for (; e < v->col_start[l + 1] && v->col[e] <= j1; e++)
        attni_bits_set(bits, (int64_t)v->col[e] * v->block - b0,
                       ((int64_t)v->col[e] + 1) * v->block - b0);
    e = attni_lower_bound(v->diag, v->diag_start[l], v->diag_start[l + 1], i - j1);
    for (; e < v->diag_start[l + 1] && v->diag[e] <= i - j0; e++)
        attni_bits_set(bits, (i - v->diag[e]) * v->block - b0,
                       (i - v->diag[e] + 1) * v->block - b0);
}

// The sparse terms for keys [b0, b0 + 256) in m->bits; a key of what they depend on saves the work
// for the next row of the same row block.
ATTNI_FAR void attni_sparse_bits(attni_masker *m, int32_t seq, int64_t p, int32_t head,
                                 int64_t b0) {
    const attn_desc *d = m->d;
    const attn_mask *k = &d->mask;
    int32_t group = d->n_heads / d->n_kv_heads;
    int64_t key[6], j;
    key[0] = b0;
    key[1] = seq;
    key[2] = attni_per_head(d) ? head : head / group;
    key[3] = !k->blocks.row_start ? 0
             : k->blocks.bits     ? p / (k->blocks.row_block / k->blocks.bits_rows)
                                  : p / k->blocks.row_block;
    key[4] = k->stride.block ? p / k->stride.block : 0;
    key[5] = k->keep_recent ? p : k->vslash.block ? p / k->vslash.block : 0;
    for (j = 0; j < 6 && key[j] == m->key[j]; j++) {} // no memcmp in device code
    if (j == 6) return;
    memcpy(m->key, key, sizeof key);
    memset(m->bits, 0, sizeof m->bits);
    attni_bits_set(m->bits, -b0, k->keep_sink - b0);
    if (k->keep_recent) attni_bits_set(m->bits, p - k->keep_recent + 1 - b0, 256);
    if (k->stride.block)
        for (j = b0 / k->stride.block; j * k->stride.block < b0 + 256; j++)
            if (attni_stride_keeps(d, head / group, p / k->stride.block, j))
                attni_bits_set(m->bits, j * k->stride.block - b0, (j + 1) * k->stride.block - b0);
    if (k->vslash.block) attni_vslash_bits(d, p, head, b0, m->bits);
    if (k->blocks.row_start) attni_list_bits(d, seq, p, head, b0, m->bits);
}

// Depth of query t (index in its sequence) in the token tree.
ATTNI_FAR int32_t attni_tree_depth(const attn_desc *d, int32_t q_begin, int32_t t) {
    int32_t depth = 0;
    while ((t = d->mask.tree_parent[q_begin + t]) >= 0) depth++;
    return depth;
}

// Which of the keys [256 * span, + 256) query t of sequence seq, at position p, sees with head.
ATTNI_FAR void attni_span_bits(attni_masker *m, const attn_plan_seq *s, int32_t seq, int32_t t,
                              int64_t p, int32_t head, int32_t span, uint64_t bits[4]) {
    const attn_mask *k = &m->d->mask;
    int64_t b0 = (int64_t)span * ATTN_SPAN, lo = s->kv_pos0, hi = (int64_t)s->kv_pos0 + s->kv_len;
    int64_t left = k->window_left ? p - (k->window_left - 1) : 0;
    int64_t right = k->window_right ? p + k->window_right : INT64_MAX / 2;
    int tree = k->kind == ATTN_MASK_TREE && !s->is_chain, w;
    if (tree) hi = attni_min64(hi, s->q_pos0);
    else if (k->kind != ATTN_MASK_FULL) hi = attni_min64(hi, p + 1);
    memset(bits, 0, 4 * sizeof bits[0]);
    attni_bits_set(bits, attni_max64(lo, left) - b0, attni_min64(hi, right) - b0);
    if (k->n_sink) attni_bits_set(bits, lo - b0, attni_min64(hi, k->n_sink) - b0);
    if (m->sparse && (bits[0] | bits[1] | bits[2] | bits[3])) {
        attni_sparse_bits(m, seq, p, head, b0);
        for (w = 0; w < 4; w++) bits[w] &= m->bits[w];
    }
    if (tree && b0 + 256 > s->q_pos0) {
        int64_t kp = p;
        for (; t >= 0; t = k->tree_parent[s->q_begin + t], kp--) {
            int64_t at = (int64_t)s->q_pos0 + t - b0;
            if (at >= 0 && at < 256 && attni_window_pair(k, p, kp) &&
                attni_sparse_pair(m->d, seq, p, kp, head))
                bits[at / 64] |= (uint64_t)1 << (at % 64);
        }
    }
}

// ---- selectors: parameters and rows

// Blocks of b tokens that hold positions [0, end).
ATTNI_FN int64_t attni_n_blocks(int64_t end, int64_t b) { return (end + b - 1) / b; }

ATTNI_FN int32_t attni_or(int32_t x, int32_t otherwise) { return x ? x : otherwise; }

ATTNI_FN int attni_hip_stages_fill(attn_select *f) {
    const attn_hip_stage usual[3] = {{64, 4, 256, 0, 32, 0, 0, ATTN_ROPE_NONE},
                                     {64, 4, 32, 32768, 16, 0, 0, ATTN_ROPE_NONE},
                                     {64, 1, 8, 8192, 8, 0, 0, ATTN_ROPE_NONE}};
    int32_t i;
    if (f->hip.n_stages < 0 || f->hip.n_stages > ATTN_HIP_STAGES) return 0;
    if (!f->hip.n_stages) {
        f->hip.n_stages = 3;
        memcpy(f->hip.stage, usual, sizeof usual);
    }
    for (i = 0; i < f->hip.n_stages; i++) {
        attn_hip_stage *t = f->hip.stage + i;
        t->q_stride = attni_or(t->q_stride, 1);
        t->refresh = attni_or(t->refresh, 1);
        if (t->q_block < f->row_block || t->q_block % f->row_block || t->q_stride < 1) return 0;
        if (t->chunk < 1 || t->keep < 0 || t->refresh < 1 || t->terminate < 0) return 0;
        if (t->flags & ~15 || (int)t->style < 0 || t->style > ATTN_ROPE_SELF_EXTEND) return 0;
        if (t->flags & ATTN_HIP_LANDMARK && !f->hip.landmark) return 0;
        if (!i && t->flags & (ATTN_HIP_CENTRE | ATTN_HIP_KEEP_SCORES)) return 0;
        if (t->style && (!f->hip.rope || f->hip.rope_len < 1 || f->hip.rope_dim < 2)) return 0;
        if (t->style && (f->hip.rope_dim % 2 || f->hip.context < 0)) return 0;
        if (t->style == ATTN_ROPE_DYNAMIC && f->hip.context < 4) return 0;
        if (!i) continue;
        if (t->q_block > t[-1].q_block || t[-1].q_block % t->q_block) return 0;
        if (t->keep < t[-1].chunk || t->keep % t[-1].chunk || t[-1].chunk % t->chunk) return 0;
    }
    return f->hip.stage[f->hip.n_stages - 1].chunk == f->kv_block;
}

// The part of attni_select_fill that is HiP's; f: s with kv_block and row_block filled in.
ATTNI_FN int attni_hip_fill(attn_select *f) {
    const int third = f->kind == ATTN_SELECT_HIP3;
    attn_hip *h = &f->hip;
    h->keep = attni_or(h->keep, third ? 2048 : 512);
    h->sink = h->sink == -1 ? 0 : attni_or(h->sink, third ? 256 : 16);
    h->window = h->window == -1 ? 0 : attni_or(h->window, third ? 1024 : 256);
    if (h->keep < 0 || h->sink < 0 || h->window < 0) return 0;
    if (h->sink % f->kv_block || h->keep % f->kv_block) return 0;
    if (third) return attni_hip_stages_fill(f);
    h->block = attni_or(h->block, f->kv_block);
    h->q_group = attni_or(h->q_group, 1);
    h->head_group = attni_or(h->head_group, 1);
    h->q_stride = attni_or(h->q_stride, 2);
    h->k_stride = attni_or(h->k_stride, 1);
    h->refresh = attni_or(h->refresh, 1);
    if (h->q_stride < 1 || h->k_stride < 1 || h->refresh < 1 || h->low_dim < 0) return 0;
    if (h->block < 1 || f->kv_block % h->block) return 0;
    if (h->q_group < 1 || h->q_group > INT32_MAX / f->row_block) return 0;
    if ((uint32_t)h->near > 65536 || (uint32_t)h->near_window > 65536) return 0;
    if ((uint32_t)h->vertical > 65536 || (uint32_t)h->diagonal > 65536) return 0;
    if ((uint32_t)h->random > 65536 || h->patches < 0 || h->patches > h->keep) return 0;
    h->patches = attni_max32(attni_or(h->patches, h->keep / 2), h->block);
    if ((int)h->sample < 0 || h->sample > ATTN_HIP_ORACLE) return 0;
    if (h->head_group < 1 || (f->heads != ATTN_SELECT_EACH && h->head_group > 1)) return 0;
    return f->kind == ATTN_SELECT_HIP2 || h->head_group == 1;
}

// s with every default filled in. 0 when a parameter is out of range.
ATTNI_FAR int attni_select_fill(const attn_select *s, attn_select *f) {
    const int hip = s->kind >= ATTN_SELECT_HIP1 && s->kind <= ATTN_SELECT_HIP3;
    const int flex = s->kind == ATTN_SELECT_FLEX, exact = s->kind == ATTN_SELECT_EXACT;
    *f = *s;
    if (!(hip || flex || exact) || (int)s->heads < 0 || s->heads > ATTN_SELECT_ALL) return 0;
    if (s->row_block < 0 || s->kv_block < 0 || s->dense_below < -1) return 0;
    if (s->n_slots < 0 || s->max_rows < 0 || s->max_kv_len < 0) return 0;
    if (!f->heads)
        f->heads = exact                          ? ATTN_SELECT_GROUP
                   : s->kind == ATTN_SELECT_HIP3 ? ATTN_SELECT_ALL
                                                  : ATTN_SELECT_EACH;
    f->kv_block = attni_or(s->kv_block,
                           flex ? 128 : exact ? 64 : s->kind == ATTN_SELECT_HIP3 ? 8 : 2);
    f->row_block = attni_or(s->row_block, flex ? f->kv_block : 64);
    if (s->dense_below < 0)
        f->dense_below = flex ? 4096 : s->kind == ATTN_SELECT_HIP3 ? 12288 : 8192;
    if (flex) {
        if (!(s->flex.gamma >= 0 && s->flex.gamma <= 1) || !(s->flex.tau >= 0)) return 0;
        if (s->flex.min_budget < 0 || s->flex.max_budget < 0) return 0;
        if (f->row_block != f->kv_block || f->heads == ATTN_SELECT_ALL) return 0;
        if (!(s->flex.gamma > 0)) f->flex.gamma = 0.95f;
        f->flex.min_budget = attni_or(s->flex.min_budget, f->kv_block);
        f->flex.max_budget = attni_or(s->flex.max_budget, INT32_MAX);
    }
    if (exact) {
        if (s->exact.keep < 0 || s->exact.recent < 0) return 0;
        if (!(s->exact.share >= 0 && s->exact.share <= 1) || !(s->exact.epsilon >= 0)) return 0;
        f->exact.recent = attni_or(s->exact.recent, f->kv_block);
    }
    if (!hip) return 1;
    return f->kv_block > 0 && attni_hip_fill(f);
}

// Row blocks that hold queries of sequence s.
ATTNI_FN int32_t attni_rows_of(const attn_desc *d, int32_t row_block, int32_t s) {
    int32_t q_len = d->q_start[s + 1] - d->q_start[s], p = attni_q_pos0(d, s);
    return q_len > 0 ? (p + (q_len - 1)) / row_block - p / row_block + 1 : 0;
}

// Bytes of what a HiP row remembers between steps: the position after the one it was made for (0,
// -2: none) and, of every stage but the first, how many chunks it admits, the first chunk of its
// own that each becomes, and their scores if these count.
ATTNI_FN int64_t attni_state_bytes(const attn_select *f) {
    int64_t n = 1;
    int32_t i;
    if (f->kind < ATTN_SELECT_HIP1 || f->kind > ATTN_SELECT_HIP3) return 0;
    for (i = 1; f->kind == ATTN_SELECT_HIP3 && i < f->hip.n_stages; i++) {
        const attn_hip_stage *t = f->hip.stage + i;
        int64_t each = t->flags & ATTN_HIP_KEEP_SCORES ? 2 : 1;
        n += 1 + each * (t->keep / t[-1].chunk);
    }
    return 4 * n;
}

ATTNI_FN int32_t attni_select_lists(const attn_desc *d, const attn_select *f) {
    return f->heads == ATTN_SELECT_ALL ? 1 : f->heads == ATTN_SELECT_GROUP ? d->n_kv_heads
                                                                           : d->n_heads;
}

// What a filled-in f asks of a problem, tables apart.
ATTNI_FN attn_result attni_select_problem(const attn_desc *d, const attn_select *f) {
    int32_t i;
    if (f->kind == ATTN_SELECT_HIP2 && d->n_heads / d->n_kv_heads % f->hip.head_group)
        return ATTN_ERR_ARGUMENT;
    for (i = 0; f->kind == ATTN_SELECT_HIP3 && i < f->hip.n_stages; i++)
        if (f->hip.stage[i].style && f->hip.rope_dim > d->head_dim) return ATTN_ERR_ARGUMENT;
    if (d->mask.kind != ATTN_MASK_CAUSAL || d->mask.window_left || d->mask.window_right)
        return ATTN_ERR_UNSUPPORTED;
    return d->logits.alibi || d->logits.bias.data ? ATTN_ERR_UNSUPPORTED : ATTN_OK;
}

// Was x laid out for these parameters?
ATTNI_FN int attni_select_fits(const attn_desc *d, const attn_select *f, const attn_selection *x) {
    return x->n_lists == attni_select_lists(d, f) && x->n_slots == f->n_slots &&
           x->list.row_block == f->row_block && x->list.kv_block == f->kv_block &&
           (int64_t)x->state_bytes == attni_state_bytes(f) &&
           (f->kind == ATTN_SELECT_EXACT) == (x->missed != NULL);
}

// ---- summaries: nodes [2 levels: cells, runs][page][cell of the page][KV head] of 2 dim + 8 bf16:
// smallest, largest, radius, padding

enum { ATTNI_CELL = 64, ATTNI_RUN = 8 }; // tokens; cells

ATTNI_FN int32_t attni_page_cells(const attn_desc *d) {
    return (int32_t)attni_n_blocks(d->kv.page_tokens, ATTNI_CELL);
}

// Cell, counted from position 0 on, of the token at place j of a sequence that begins at pos0.
ATTNI_FN int64_t attni_cell_from(const attn_desc *d, int32_t pos0, int64_t j) {
    const int64_t pt = d->kv.page_tokens;
    return (pos0 / pt + j / pt) * attni_page_cells(d) + j % pt / ATTNI_CELL;
}
ATTNI_FN int64_t attni_cell_of(const attn_desc *d, int32_t s, int64_t j) {
    return attni_cell_from(d, attni_kv_pos0(d, s), j);
}

// The first place of a cell; may be negative where the sequence's front was evicted.
ATTNI_FN int64_t attni_place_from(const attn_desc *d, int32_t pos0, int64_t cell) {
    const int64_t pt = d->kv.page_tokens, n = attni_page_cells(d);
    return (cell / n - pos0 / pt) * pt + cell % n * ATTNI_CELL;
}
ATTNI_FN int64_t attni_cell_place(const attn_desc *d, int32_t s, int64_t cell) {
    return attni_place_from(d, attni_kv_pos0(d, s), cell);
}

// The node of a cell or (level 1) of the run that ends with it.
ATTNI_FN uint16_t *attni_node_at(const attn_desc *d, uint16_t *data, int level, int32_t page,
                                 int64_t cell, int32_t head) {
    const int64_t pc = attni_page_cells(d);
    const int64_t at = (level * (int64_t)d->kv.n_pages + page) * pc + cell % pc;
    return data + (at * d->n_kv_heads + head) * (2 * (int64_t)d->head_dim + 8);
}

// At least the square root of x >= 0: Newton's steps come from above. Inf and NaN stay.
ATTNI_FAR float attni_root(float x) {
    float y = attni_float((attni_bits32(x) >> 1) + 0x1fbd1df5u);
    if (!attni_less(0, x) || !attni_finite(x)) return x;
    y = 0.5f * (y + attni_div(x, y));
    y = 0.5f * (y + attni_div(x, y));
    return y * 1.000001f;
}

// To bf16, never below x (up) or never above it.
ATTNI_FN uint16_t attni_outwards(float x, int up) {
    uint32_t u = attni_bits32(x);
    if ((u & 0xffffu) && (u >> 31) != (uint32_t)up) u += 0x10000u;
    return (uint16_t)(u >> 16);
}

// The middle of a node as bounds are taken about it.
ATTNI_FN float attni_node_middle(const uint16_t *node, int32_t dim, int32_t i) {
    return (attni_from_bf16(node[i]) + attni_from_bf16(node[dim + i])) * 0.5f;
}

// Widens the ball of a node by one of radius r at distance sqrt(sum).
ATTNI_FN void attni_node_ball(float sum, float r, float *radius) {
    float far = attni_mul(attni_root(sum), 1.0001f) + r;
    if (!attni_less(far, *radius)) *radius = far;
}

#endif // ATTNI_SHARED
#endif // any implementation

#if defined(ATTN_IMPLEMENTATION) || defined(ATTN_CORE_IMPLEMENTATION)
#ifndef ATTNI_CORE_IMPLEMENTED
#define ATTNI_CORE_IMPLEMENTED

// ==== >>impl-names  ==============================================================================

ATTN_DEF const char *attn_result_string(attn_result r) {
    switch ((int)r) {
#define ATTNI_X(name, value, text)                                                                 \
    case value: return text;
        ATTN_RESULTS(ATTNI_X)
#undef ATTNI_X
    default: return "unknown result code";
    }
}

ATTN_DEF const char *attn_dtype_name(attn_dtype t) {
    static const char *const names[ATTN_DTYPE_COUNT] = {"none",   "f32",    "f16", "bf16",
                                                        "f8e4m3", "f8e5m2", "i8",  "i4"};
    return attni_bits_of(t) ? names[t] : names[0];
}
ATTN_DEF int attn_dtype_bits(attn_dtype t) { return attni_bits_of(t); }
ATTN_DEF int attn_dtype_scaled(attn_dtype t) { return attni_is_scaled(t); }

// ==== >>impl-kv  =================================================================================

ATTN_DEF size_t attn_kv_page_bytes(const attn_desc *d, int is_v) {
    attn_desc c;
    attni_side s;
    int32_t dim;
    if (!d) return 0;
    c = *d;
    c.kv.k.page_bytes = c.kv.v.page_bytes = 0;
    if (c.kv.n_pages < 1) c.kv.n_pages = 1;
    dim = is_v ? attni_v_dim(d) : d->head_dim;
    if (dim < 8 || dim > ATTN_MAX_HEAD_DIM || dim % 8 || d->n_kv_heads < 1 || d->kv.page_tokens < 1)
        return 0;
    if (!attni_bits_of(is_v ? d->kv.v.dtype : d->kv.k.dtype)) return 0;
    if (attni_side_init(&c, is_v, &s) != ATTN_OK) return 0;
    return (uint64_t)s.page_bytes > SIZE_MAX ? 0 : (size_t)s.page_bytes;
}

ATTN_DEF attn_result attn_kv_slots(const attn_desc *d, int64_t *out) {
    int32_t s, t;
    if (!d || !out) return ATTN_ERR_ARGUMENT;
    for (s = 0; s < d->n_seq; s++) {
        int64_t place = (int64_t)attni_q_pos0(d, s) - attni_kv_pos0(d, s);
        for (t = d->q_start[s]; t < d->q_start[s + 1]; t++, place++) {
            int32_t page;
            if (place < 0 || place >= d->kv.kv_len[s]) return ATTN_ERR_PAGE;
            page = attni_page_of(d, s, (int32_t)place);
            if (page < 0) return ATTN_ERR_PAGE;
            out[t] = (int64_t)page * d->kv.page_tokens + place % d->kv.page_tokens;
        }
    }
    return ATTN_OK;
}

ATTN_DEF size_t attn_kv_rows_bytes(const attn_desc *d, int is_v, int32_t n_tokens) {
    attni_side s;
    uint64_t row; // one token, all heads
    if (!d || n_tokens < 0 || !attn_kv_page_bytes(d, is_v)) return 0;
    if (attni_side_init(d, is_v, &s) != ATTN_OK) return 0;
    row = (uint64_t)s.dim * (uint64_t)attni_bits_of(s.dtype) / 8 + (s.scale_offset < 0 ? 0 : 4);
    row *= (uint64_t)d->n_kv_heads;
    return (uint64_t)n_tokens > SIZE_MAX / row ? 0 : (size_t)(row * (uint64_t)n_tokens);
}

// Reverses the bytes of each element.
static void attni_copy_swapped(void *dst, const void *src, size_t n_elements, size_t width) {
    size_t i, b;
    for (i = 0; i < n_elements; i++)
        for (b = 0; b < width; b++)
            ((uint8_t *)dst)[i * width + b] = ((const uint8_t *)src)[i * width + width - 1 - b];
}

// Rows outside a page are little-endian on every host.
static void attni_copy_le(void *dst, const void *src, size_t n_elements, size_t width) {
    const uint16_t probe = 1;
    if (*(const uint8_t *)&probe) memcpy(dst, src, n_elements * width);
    else attni_copy_swapped(dst, src, n_elements, width);
}

static attn_result attni_move_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                   int32_t n, uint8_t *rows, int writing) {
    attni_side s;
    int32_t t, h;
    size_t width, row_bytes, u;
    uint8_t *scales;
    if (!d || !rows || !attn_kv_page_bytes(d, is_v)) return ATTN_ERR_ARGUMENT;
    if (attni_side_init(d, is_v, &s) != ATTN_OK) return ATTN_ERR_LAYOUT;
    if (page < 0 || page >= d->kv.n_pages) return ATTN_ERR_PAGE;
    if (!s.data || place < 0 || n < 0 || n > s.page_tokens - place) return ATTN_ERR_ARGUMENT;
    width = attni_bits_of(s.dtype) < 8 ? 1 : (size_t)attni_bits_of(s.dtype) / 8;
    row_bytes = (size_t)s.dim * (size_t)attni_bits_of(s.dtype) / 8;
    scales = rows + row_bytes * (size_t)n * (size_t)d->n_kv_heads;
    for (t = 0; t < n; t++)
        for (h = 0; h < d->n_kv_heads; h++) {
            uint8_t *base = s.data + page * s.page_bytes;
            uint8_t *p = base + attni_token_offset(&s, place + t, h);
            uint8_t *r = rows + row_bytes * ((size_t)t * (size_t)d->n_kv_heads + (size_t)h);
            for (u = 0; u < row_bytes / 4; u++, p += s.k16 ? 64 : 4)
                if (writing) attni_copy_le(p, r + 4 * u, 4 / width, width);
                else attni_copy_le(r + 4 * u, p, 4 / width, width);
            if (s.scale_offset < 0) continue;
            p = base + attni_scale_offset(&s, place + t, h);
            if (writing) attni_copy_le(p, scales, 1, 4);
            else attni_copy_le(scales, p, 1, 4);
            scales += 4;
        }
    return ATTN_OK;
}

ATTN_DEF attn_result attn_kv_read_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                       int32_t n_tokens, void *rows) {
    return attni_move_rows(d, is_v, page, place, n_tokens, (uint8_t *)rows, 0);
}

ATTN_DEF attn_result attn_kv_write_rows(const attn_desc *d, int is_v, int32_t page, int32_t place,
                                        int32_t n_tokens, const void *rows) {
    // rows is only read when writing
    return attni_move_rows(d, is_v, page, place, n_tokens, (uint8_t *)(uintptr_t)rows, 1);
}

// ==== >>impl-mask  ===============================================================================

ATTN_DEF attn_result attn_mask_from_dense(const uint8_t *m, int32_t rows, int32_t cols,
                                          int32_t row_block, int32_t kv_block, int64_t *row_start,
                                          int32_t *block, uint64_t *bits, int64_t capacity,
                                          int64_t *n_entries, attn_block_list *out) {
    int64_t n = 0, words, w;
    int32_t rb, cb, r, c;
    if (!m || !row_start || !n_entries || !out || rows < 1 || cols < 1) return ATTN_ERR_ARGUMENT;
    if (row_block < 1 || kv_block < 1 || row_block > 4096 / kv_block) return ATTN_ERR_ARGUMENT;
    if (capacity < 0 || (capacity > 0 && (!block || !bits))) return ATTN_ERR_ARGUMENT;
    words = ((int64_t)row_block * kv_block + 63) / 64;
    for (rb = 0; rb <= (rows - 1) / row_block; rb++) {
        row_start[rb] = n;
        for (cb = 0; cb <= (cols - 1) / kv_block; cb++) {
            int any = 0;
            int32_t r1 = attni_min32(rows - rb * row_block, row_block);
            int32_t c1 = attni_min32(cols - cb * kv_block, kv_block);
            if (n < capacity)
                for (w = 0; w < words; w++) bits[n * words + w] = 0;
            for (r = 0; r < r1; r++)
                for (c = 0; c < c1; c++) {
                    int64_t bit = (int64_t)r * kv_block + c;
                    if (!m[((int64_t)rb * row_block + r) * cols + (int64_t)cb * kv_block + c])
                        continue;
                    any = 1;
                    if (n < capacity) bits[n * words + bit / 64] |= (uint64_t)1 << (bit % 64);
                }
            if (!any) continue;
            if (n < capacity) block[n] = cb;
            n++;
        }
    }
    row_start[rb] = n;
    *n_entries = n;
    memset(out, 0, sizeof *out);
    out->row_block = out->bits_rows = row_block;
    out->kv_block = out->bits_cols = kv_block;
    out->n_lists = 1;
    out->n_rows = rb;
    out->row_start = row_start;
    out->block = block;
    out->bits = bits;
    return n > capacity && capacity > 0 ? ATTN_ERR_FULL : ATTN_OK;
}

// A list under construction: entries beyond the capacity are only counted.
typedef struct attni_lister {
    attni_masker masker;
    const attn_desc *d;
    int32_t seq, head, rows, cols, row_block, kv_block, bits_rows, bits_cols;
} attni_lister;

// Do the keys [c0, c1) seen from position p agree? 1 or 0, -1 where they differ.
static int attni_run_kept(attni_lister *w, int64_t p, int64_t c0, int64_t c1) {
    int kept = -1;
    while (c0 < c1) {
        int64_t b0 = c0 & ~(int64_t)255, end = attni_min64(c1, b0 + 256);
        attni_sparse_bits(&w->masker, w->seq, p, w->head, b0);
        for (; c0 < end; c0++) {
            int on = (int)(w->masker.bits[(c0 - b0) / 64] >> ((c0 - b0) % 64) & 1u);
            if (kept >= 0 && on != kept) return -1;
            kept = on;
        }
    }
    return kept;
}

// Sub-block bits of one entry; 1: some are set, 0: none, -1: a sub-block is kept in part.
static int attni_entry_bits(attni_lister *w, int32_t rb, int32_t cb, uint64_t *bits) {
    const int32_t height = w->row_block / w->bits_rows, width = w->kv_block / w->bits_cols;
    int32_t i, j;
    int64_t p;
    int any = 0;
    for (i = 0; i < w->bits_rows; i++)
        for (j = 0; j < w->bits_cols; j++) {
            int64_t p0 = (int64_t)rb * w->row_block + (int64_t)i * height;
            int64_t c0 = (int64_t)cb * w->kv_block + (int64_t)j * width;
            int64_t p1 = attni_min64(p0 + height, w->rows), c1 = attni_min64(c0 + width, w->cols);
            int64_t bit = (int64_t)i * w->bits_cols + j;
            int kept = -1;
            for (p = p0; p < p1 && c0 < c1; p++) {
                int on = attni_run_kept(w, p, c0, c1);
                if (on < 0 || (kept >= 0 && on != kept)) return -1;
                kept = on;
            }
            if (kept <= 0) continue;
            any = 1;
            if (bits) bits[bit / 64] |= (uint64_t)1 << (bit % 64);
        }
    return any;
}

// Do the heads [h, h + n) keep the same?
static int attni_heads_agree(const attn_desc *d, int32_t h, int32_t n) {
    const attn_mask *m = &d->mask;
    const int32_t group = d->n_heads / d->n_kv_heads;
    const int32_t lists[2] = {m->blocks.row_start ? m->blocks.n_lists : 1,
                              m->vslash.block ? m->vslash.n_lists : 1};
    int i;
    for (i = 0; i < 2; i++)
        if (attni_list_of(d, lists[i], h) != attni_list_of(d, lists[i], h + n - 1)) return 0;
    return !m->stride.block || m->stride.homogeneous || h / group == (h + n - 1) / group;
}

ATTN_DEF attn_result attn_mask_lists(const attn_desc *d, int32_t seq, int32_t n_lists, int32_t rows,
                                     int32_t cols, int32_t row_block, int32_t kv_block,
                                     int32_t bits_rows, int32_t bits_cols, int64_t *row_start,
                                     int32_t *block, uint64_t *bits, int64_t capacity,
                                     int64_t *n_entries, attn_block_list *out) {
    attni_lister w;
    int64_t n = 0, words;
    int32_t l, rb, cb, n_rows;
    attn_result r = attn_validate(d);
    if (r != ATTN_OK) return r;
    if (!row_start || !n_entries || !out || seq < 0 || seq >= d->n_seq || rows < 1 || cols < 1 ||
        row_block < 1 || kv_block < 1 || bits_rows < 1 || bits_cols < 1 || capacity < 0)
        return ATTN_ERR_ARGUMENT;
    if (n_lists != 1 && n_lists != d->n_kv_heads && n_lists != d->n_heads) return ATTN_ERR_ARGUMENT;
    if (row_block % bits_rows || kv_block % bits_cols || bits_rows > (1 << 20) / bits_cols)
        return ATTN_ERR_ARGUMENT;
    if ((!bits && bits_rows * bits_cols > 1) || (capacity > 0 && !block)) return ATTN_ERR_ARGUMENT;
    if (attni_device_list(&d->mask)) return ATTN_ERR_UNSUPPORTED;
    if (!attni_has_sparse(&d->mask)) return ATTN_ERR_MASK;
    n_rows = (rows - 1) / row_block + 1;
    if (d->mask.blocks.row_start && (attni_list_row(d, seq, 0) < 0 ||
                                     attni_list_row(d, seq, rows - 1) >= d->mask.blocks.n_rows))
        return ATTN_ERR_MASK;
    memset(&w, 0, sizeof w);
    attni_masker_init(&w.masker, d);
    w.d = d;
    w.seq = seq;
    w.rows = rows;
    w.cols = cols;
    w.row_block = row_block;
    w.kv_block = kv_block;
    w.bits_rows = bits_rows;
    w.bits_cols = bits_cols;
    words = ((int64_t)bits_rows * bits_cols + 63) / 64;
    for (l = 0; l < n_lists; l++) {
        int64_t *start = row_start + l * ((int64_t)n_rows + 1);
        w.head = l * (d->n_heads / n_lists);
        if (!attni_heads_agree(d, w.head, d->n_heads / n_lists)) return ATTN_ERR_MASK;
        for (rb = 0; rb < n_rows; rb++) {
            int64_t end = cols; // keys that the last query of the row block may see
            if (d->mask.kind == ATTN_MASK_CAUSAL)
                end = attni_min64(end, ((int64_t)rb + 1) * row_block);
            start[rb] = n;
            for (cb = 0; (int64_t)cb * kv_block < end; cb++) {
                uint64_t *mine = bits && n < capacity ? bits + n * words : NULL;
                int any;
                if (mine) memset(mine, 0, (size_t)words * sizeof *mine);
                if ((any = attni_entry_bits(&w, rb, cb, mine)) < 0) return ATTN_ERR_MASK;
                if (any && n < capacity) block[n] = cb;
                n += any;
            }
        }
        start[rb] = n;
    }
    *n_entries = n;
    memset(out, 0, sizeof *out);
    out->row_block = row_block;
    out->kv_block = kv_block;
    out->bits_rows = bits_rows;
    out->bits_cols = bits_cols;
    out->n_lists = n_lists;
    out->n_rows = n_rows;
    out->row_start = row_start;
    out->block = block;
    out->bits = bits;
    return n > capacity && capacity > 0 ? ATTN_ERR_FULL : ATTN_OK;
}

ATTN_DEF attn_result attn_mask_transpose(const attn_block_list *list, int32_t n_cols,
                                         int64_t *col_start, int32_t *row, int64_t *entry) {
    int64_t at = 0, e;
    int32_t l, r, c;
    if (!list || !list->row_start || !col_start || n_cols < 0 || list->n_lists < 1 ||
        list->n_rows < 0)
        return ATTN_ERR_ARGUMENT;
    if (list->device_entries) return ATTN_ERR_UNSUPPORTED;
    for (l = 0; l < list->n_lists; l++) {
        int64_t *start = col_start + l * ((int64_t)n_cols + 1), first = at;
        for (c = 0; c <= n_cols; c++) start[c] = 0;
        for (r = 0; r < list->n_rows; r++) // count, one place further on
            for (e = attni_row_start(list, l, r); e < attni_row_end(list, l, r); e++) {
                if (list->block[e] < 0 || list->block[e] >= n_cols) return ATTN_ERR_MASK;
                start[list->block[e] + 1]++;
                at++;
            }
        for (start[0] = first, c = 0; c < n_cols; c++) start[c + 1] += start[c];
        if (at > first && !row) return ATTN_ERR_ARGUMENT;
        for (r = 0; r < list->n_rows; r++)
            for (e = attni_row_start(list, l, r); e < attni_row_end(list, l, r); e++) {
                int64_t to = start[list->block[e]]++;
                row[to] = r;
                if (entry) entry[to] = e;
            }
        for (c = n_cols; c > 0; c--) start[c] = start[c - 1]; // each has moved to the next one's
        start[0] = first;
    }
    return ATTN_OK;
}

// Will a query at position p or later, with one of the heads of a KV head, see key k < p?
static int attni_seen_later(const attn_desc *d, int32_t kv_head, int64_t p, int64_t k) {
    const attn_mask *m = &d->mask;
    const attn_local_stride *r = &m->stride;
    const attn_vertical_slash *v = &m->vslash;
    const int32_t group = d->n_heads / d->n_kv_heads;
    int32_t h;
    if (!attni_window_pair(m, p, k)) return 0;
    if (!attni_has_sparse(m) || m->blocks.row_start) return 1;
    if (k < m->keep_sink || (m->keep_recent && p - k < m->keep_recent)) return 1;
    // in the causal form a block's distance to later rows only grows
    if (r->block && (r->bidirectional ||
                     attni_stride_keeps(d, kv_head, p / r->block, k / r->block)))
        return 1;
    for (h = kv_head * group; h < (kv_head + 1) * group && v->block; h++) {
        int32_t l = attni_list_of(d, v->n_lists, h);
        int64_t last = v->diag_start[l + 1];
        if (attni_contains(v->col, v->col_start[l], v->col_start[l + 1], k / v->block)) return 1;
        if (last > v->diag_start[l] && v->diag[last - 1] >= p / v->block - k / v->block) return 1;
    }
    return 0;
}

ATTN_DEF attn_result attn_mask_evictable(const attn_desc *d, int32_t s, int64_t p, uint8_t *out) {
    attn_result r = attn_validate(d);
    int64_t n, j, t, pos0;
    int32_t h;
    if (r != ATTN_OK) return r;
    if (!out || s < 0 || s >= d->n_seq || p < 0) return ATTN_ERR_ARGUMENT;
    n = attni_n_blocks(d->kv.kv_len[s], d->kv.page_tokens);
    pos0 = attni_kv_pos0(d, s);
    for (h = 0; h < d->n_kv_heads; h++)
        for (j = 0; j < n; j++) {
            int64_t first = pos0 + j * d->kv.page_tokens, end = first + d->kv.page_tokens;
            int keep = d->mask.kind != ATTN_MASK_CAUSAL || end > p;
            for (t = first; t < end && !keep; t++) keep = attni_seen_later(d, h, p, t);
            out[h * n + j] = (uint8_t)!keep;
        }
    return ATTN_OK;
}

// ==== >>impl-validate  ===========================================================================

static attn_result attni_check_shape(const attn_desc *d) {
    int32_t vd, s;
    if (d->n_seq < 1 || d->n_heads < 1 || d->n_kv_heads < 1) return ATTN_ERR_ARGUMENT;
    if (d->n_heads % d->n_kv_heads || d->n_heads > 65536) return ATTN_ERR_SHAPE;
    if (d->head_dim < 8 || d->head_dim % 8 || d->head_dim > ATTN_MAX_HEAD_DIM)
        return ATTN_ERR_SHAPE;
    vd = attni_v_dim(d);
    if (vd < 8 || vd % 8 || vd > ATTN_MAX_HEAD_DIM) return ATTN_ERR_SHAPE;
    if (!d->q_start || !d->kv.kv_len || !d->kv.k.data || !d->kv.v.data) return ATTN_ERR_ARGUMENT;
    if (d->q_start[0] != 0) return ATTN_ERR_SHAPE;
    for (s = 0; s < d->n_seq; s++)
        if (d->q_start[s + 1] < d->q_start[s]) return ATTN_ERR_SHAPE;
    if (d->q_start[d->n_seq] > 0 && (!d->q.data || !d->o.data)) return ATTN_ERR_ARGUMENT;
    if (!attni_is_float(d->q.dtype) || !attni_is_float(d->o.dtype)) return ATTN_ERR_DTYPE;
    if (!attni_bits_of(d->kv.k.dtype) || !attni_bits_of(d->kv.v.dtype)) return ATTN_ERR_DTYPE;
    if (attni_bad_view(&d->q, d->q_start[d->n_seq], d->n_heads, d->head_dim, 0))
        return ATTN_ERR_LAYOUT;
    if (attni_bad_view(&d->o, d->q_start[d->n_seq], d->n_heads, vd, 1)) return ATTN_ERR_LAYOUT;
    if ((int)d->numerics < 0 || d->numerics > ATTN_NUMERICS_APPROX) return ATTN_ERR_ARGUMENT;
    if ((int)d->mask.kind < 0 || d->mask.kind > ATTN_MASK_TREE) return ATTN_ERR_MASK;
    if (!attni_finite(d->logits.scale) || !attni_finite(d->logits.softcap) || d->logits.softcap < 0)
        return ATTN_ERR_ARGUMENT;
    if (d->logits.bias.data) {
        if (!attni_is_float(d->logits.bias.dtype)) return ATTN_ERR_DTYPE;
        if (d->logits.bias.stride_head < 0 || d->logits.bias.stride_token < 0)
            return ATTN_ERR_LAYOUT;
        if (d->logits.bias.stride_head > ((int64_t)1 << 58) / d->n_heads ||
            d->logits.bias.stride_token > ((int64_t)1 << 58) / attni_max32(d->q_start[d->n_seq], 1))
            return ATTN_ERR_OVERFLOW;
    }
    return ATTN_OK;
}

static attn_result attni_check_kv(const attn_desc *d) {
    const attn_kv *kv = &d->kv;
    attni_side side;
    attn_result r;
    int32_t s, j;
    if (kv->page_tokens < 1 || kv->n_pages < 1) return ATTN_ERR_ARGUMENT;
    if ((int)kv->layout < 0 || kv->layout > ATTN_K16) return ATTN_ERR_LAYOUT;
    if ((r = attni_side_init(d, 0, &side)) != ATTN_OK) return r;
    if ((r = attni_side_init(d, 1, &side)) != ATTN_OK) return r;
    if (kv->page_table && kv->page_table_stride < 0) return ATTN_ERR_LAYOUT;
    if (kv->page_table && kv->page_table_stride > ((int64_t)1 << 58) / d->n_seq)
        return ATTN_ERR_OVERFLOW;
    if (!kv->page_table && d->n_seq > kv->n_pages) return ATTN_ERR_PAGE;
    if (attni_bad_cache(kv)) return ATTN_ERR_ARGUMENT;
    for (s = 0; s < d->n_seq; s++) {
        int32_t len = kv->kv_len[s], n_pages = 0;
        int64_t pos0 = attni_kv_pos0(d, s), q_len = d->q_start[s + 1] - d->q_start[s];
        int64_t q0 = d->q_pos0 ? d->q_pos0[s] : pos0 + len - q_len;
        if (len < 0 || pos0 < 0 || pos0 + len > INT32_MAX) return ATTN_ERR_SHAPE;
        if (q0 < 0 || q0 + q_len > INT32_MAX) return ATTN_ERR_SHAPE;
        if (!kv->page_table && len > kv->page_tokens) return ATTN_ERR_SHAPE;
        if (d->seq_order && (d->seq_order[s] < 0 || d->seq_order[s] >= d->n_seq))
            return ATTN_ERR_ARGUMENT;
        if (!kv->page_table) continue;
        n_pages = len / kv->page_tokens + (len % kv->page_tokens != 0);
        if (n_pages > kv->page_table_stride && kv->page_table_stride) return ATTN_ERR_SHAPE;
        for (j = 0; j < n_pages; j++) {
            int32_t page = kv->page_table[s * kv->page_table_stride + j];
            if (page < 0 || page >= kv->n_pages) return ATTN_ERR_PAGE;
        }
    }
    return ATTN_OK;
}

// ids of [start[i], end[i]) must be ascending and unique; negative ones only where allowed.
static int attni_bad_csr(const int64_t *start, const int64_t *end, const int32_t *ids, int64_t n,
                         int negative) {
    int64_t i, e;
    for (i = 0; i < n; i++) {
        if (start[i] < 0 || end[i] < start[i] || (end[i] > start[i] && !ids)) return 1;
        for (e = start[i]; e < end[i]; e++) {
            if (ids[e] < 0 && !negative) return 1;
            if (e > start[i] && ids[e] <= ids[e - 1]) return 1;
        }
    }
    return 0;
}

static int attni_bad_lists(const attn_desc *d, int32_t n) {
    return n != 1 && n != d->n_kv_heads && n != d->n_heads;
}

static attn_result attni_check_blocks(const attn_desc *d) {
    const attn_block_list *b = &d->mask.blocks;
    int32_t s;
    if (b->row_block < 1 || b->kv_block < 1 || b->n_rows < 1) return ATTN_ERR_MASK;
    if (attni_bad_lists(d, b->n_lists)) return ATTN_ERR_MASK;
    if (b->bits && (b->bits_rows < 1 || b->bits_cols < 1 || b->row_block % b->bits_rows ||
                    b->kv_block % b->bits_cols))
        return ATTN_ERR_MASK;
    if (b->device_entries < 0) return ATTN_ERR_MASK;
    for (s = 0; s < b->n_lists && !b->device_entries; s++) {
        int64_t at = s * ((int64_t)b->n_rows + 1);
        const int64_t *end = b->row_end ? b->row_end + at : b->row_start + at + 1;
        if (attni_bad_csr(b->row_start + at, end, b->block, b->n_rows, 0)) return ATTN_ERR_MASK;
    }
    for (s = 0; s < d->n_seq; s++) {
        int64_t q_len = d->q_start[s + 1] - d->q_start[s], p = attni_q_pos0(d, s);
        if (!q_len) continue;
        if (attni_list_row(d, s, p) < 0 || attni_list_row(d, s, p + q_len - 1) >= b->n_rows)
            return ATTN_ERR_MASK;
    }
    return ATTN_OK;
}

static attn_result attni_check_tree(const attn_desc *d) {
    int32_t s, t;
    if (!d->mask.tree_parent) return ATTN_ERR_ARGUMENT;
    for (s = 0; s < d->n_seq; s++) {
        const int32_t *parent = d->mask.tree_parent + d->q_start[s];
        int32_t q_len = d->q_start[s + 1] - d->q_start[s];
        if (!q_len) continue;
        if (q_len > d->kv.kv_len[s]) return ATTN_ERR_MASK;
        if (attni_q_pos0(d, s) + q_len != attni_kv_pos0(d, s) + d->kv.kv_len[s])
            return ATTN_ERR_MASK;
        for (t = 0; t < q_len; t++)
            if (parent[t] < -1 || parent[t] >= t) return ATTN_ERR_MASK;
    }
    return ATTN_OK;
}

static attn_result attni_check_mask(const attn_desc *d) {
    const attn_mask *m = &d->mask;
    const attn_local_stride *r = &m->stride;
    const attn_vertical_slash *v = &m->vslash;
    int64_t total = r->n_heads_total ? r->n_heads_total : d->n_kv_heads;
    if (m->window_left < 0 || m->window_right < 0 || m->n_sink < 0) return ATTN_ERR_MASK;
    if (m->keep_sink < 0 || m->keep_recent < 0) return ATTN_ERR_MASK;
    if (r->block < 0 || v->block < 0) return ATTN_ERR_MASK;
    if (r->block) {
        if (r->local < 1 || r->stride < 1 || r->local_right < 0 || r->head_step < 0 ||
            r->offset < 0)
            return ATTN_ERR_MASK;
        if (r->n_dense < 0 || r->n_dense > total || (r->homogeneous && r->n_dense))
            return ATTN_ERR_MASK;
        if (r->head0 < 0 || (int64_t)r->head0 + d->n_kv_heads > total) return ATTN_ERR_MASK;
    }
    if (v->block) {
        if (attni_bad_lists(d, v->n_lists) || !v->col_start || !v->diag_start) return ATTN_ERR_MASK;
        if (attni_bad_csr(v->col_start, v->col_start + 1, v->col, v->n_lists, 0) ||
            attni_bad_csr(v->diag_start, v->diag_start + 1, v->diag, v->n_lists, 1))
            return ATTN_ERR_MASK;
    }
    if (m->kind == ATTN_MASK_TREE) {
        attn_result t = attni_check_tree(d);
        if (t != ATTN_OK) return t;
    }
    return m->blocks.row_start ? attni_check_blocks(d) : ATTN_OK;
}

ATTN_DEF attn_result attn_validate(const attn_desc *d) {
    attn_result r;
    if (!d) return ATTN_ERR_ARGUMENT;
    if ((r = attni_check_shape(d)) != ATTN_OK) return r;
    if ((r = attni_check_kv(d)) != ATTN_OK) return r;
    return attni_check_mask(d);
}

// ==== >>impl-ref  fp64, one score at a time, from the definitions ================================

// a < b, as attni_less.
static int attni_less64(double a, double b) {
    const int64_t inf = (int64_t)0x7ff << 52;
    int64_t x, y;
    memcpy(&x, &a, 8);
    memcpy(&y, &b, 8);
    x = x < 0 ? -(x & INT64_MAX) : x;
    y = y < 0 ? -(y & INT64_MAX) : y;
    return x < y && x >= -inf && y <= inf;
}

ATTN_DEF int attn_ref_visible(const attn_desc *d, int32_t s, int32_t t, int32_t h, int32_t j) {
    const attn_mask *m = &d->mask;
    int32_t i = t - d->q_start[s], a;
    int64_t q0 = attni_q_pos0(d, s), p = q0 + i, k = (int64_t)attni_kv_pos0(d, s) + j;
    if (j < 0 || j >= d->kv.kv_len[s]) return 0;
    if (m->kind == ATTN_MASK_CAUSAL && k > p) return 0;
    if (m->kind == ATTN_MASK_TREE) {
        p = q0 + attni_tree_depth(d, d->q_start[s], i);
        if (k >= q0) { // a node of the tree: an ancestor or the query itself
            for (a = i; a >= 0 && q0 + a != k; a = m->tree_parent[d->q_start[s] + a]) {}
            if (a < 0) return 0;
            k = q0 + attni_tree_depth(d, d->q_start[s], a);
        }
    }
    return attni_window_pair(m, p, k) && attni_sparse_pair(d, s, p, k, h);
}

// Score of a visible pair after scale, softcap, ALiBi and bias. q, k: rows of head_dim.
static double attni_ref_score(const attn_desc *d, const double *q, const double *k, int32_t s,
                              int32_t t, int32_t h, int32_t j) {
    const attn_logits *g = &d->logits;
    double sum = 0;
    int32_t e, i = t - d->q_start[s];
    int64_t q0 = attni_q_pos0(d, s), p = q0 + i, kp = (int64_t)attni_kv_pos0(d, s) + j;
    for (e = 0; e < d->head_dim; e++) sum += q[e] * k[e];
    sum *= (double)attni_scale(d);
    if (g->softcap > 0) sum = (double)g->softcap * attni_tanh64(sum / (double)g->softcap);
    if (g->alibi) {
        if (d->mask.kind == ATTN_MASK_TREE) {
            p = q0 + attni_tree_depth(d, d->q_start[s], i);
            if (kp >= q0) kp = q0 + attni_tree_depth(d, d->q_start[s], (int32_t)(kp - q0));
        }
        sum += (double)g->alibi[h] * (double)(kp - p);
    }
    if (g->bias.data)
        sum += (double)attni_get(g->bias.data, g->bias.dtype,
                                 h * g->bias.stride_head + t * g->bias.stride_token + j);
    return sum;
}

// Row of K or V of held token j as doubles, scale applied.
static void attni_ref_row(const attn_desc *d, const attni_side *side, int32_t s, int32_t h,
                          int32_t j, double *out) {
    int32_t page = attni_page_of(d, s, j), place = j % d->kv.page_tokens, e;
    const uint8_t *p = side->data + page * side->page_bytes + attni_token_offset(side, place, h);
    double scale = (double)attni_token_scale(side, page, place, h);
    int32_t per = 32 / attni_bits_of(side->dtype), gap = side->k16 ? 64 : 4;
    for (e = 0; e < side->dim; e++)
        out[e] = (double)attni_get(p + (int64_t)(e / per) * gap, side->dtype, e % per) * scale;
}

static void attni_ref_query(const attn_desc *d, const attni_side *k, const attni_side *v, int32_t s,
                            int32_t t, int32_t h, double *o, double *lse) {
    double q[ATTN_MAX_HEAD_DIM], row[ATTN_MAX_HEAD_DIM], m = 0, l = 0, x, f;
    int32_t kv_head = h / (d->n_heads / d->n_kv_heads), vd = attni_v_dim(d), j, e;
    int64_t st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim;
    int64_t sh = d->q.stride_head ? d->q.stride_head : d->head_dim;
    const uint64_t none = (uint64_t)0xfff << 52; // -inf
    int seen = 0;
    for (e = 0; e < d->head_dim; e++)
        q[e] = (double)attni_get(d->q.data, d->q.dtype, t * st + h * sh + e);
    for (e = 0; e < vd; e++) o[e] = 0;
    for (j = 0; j < d->kv.kv_len[s]; j++) {
        if (!attn_ref_visible(d, s, t, h, j)) continue;
        attni_ref_row(d, k, s, kv_head, j, row);
        x = attni_ref_score(d, q, row, s, t, h, j);
        if (attni_less64(x, -1e300)) continue; // a bias of -inf masks
        if (!seen || attni_less64(m, x)) {     // online softmax: rescale to the new maximum
            f = seen ? attni_exp64(m - x) : 0;
            for (e = 0; e < vd; e++) o[e] *= f;
            l *= f;
            m = x;
            seen = 1;
        }
        ATTNI_PIN64(m); // else -ffinite-math-only makes Inf - Inf a zero
        f = attni_exp64(x - m);
        l += f;
        attni_ref_row(d, v, s, kv_head, j, row);
        for (e = 0; e < vd; e++) o[e] += f * row[e];
    }
    if (d->logits.sink && d->logits.sink[h] > -3.0e38f) {
        x = (double)d->logits.sink[h];
        if (!seen || attni_less64(m, x)) {
            f = seen ? attni_exp64(m - x) : 0;
            for (e = 0; e < vd; e++) o[e] *= f;
            l = l * f;
            m = x;
        }
        ATTNI_PIN64(m);
        l += attni_exp64(x - m);
        seen = 1;
    }
    for (e = 0; e < vd; e++) o[e] = attni_isnan64(l) || l > 0 ? o[e] / l : 0;
    if (!lse) return;
    if (seen) *lse = m + (attni_isnan64(l) ? l : attni_ln(l)); // the greatest x alone makes l >= 1
    else memcpy(lse, &none, 8);
}

ATTN_DEF attn_result attn_ref_forward(const attn_desc *d, double *o, double *lse) {
    attn_result r = attn_validate(d);
    attni_side k, v;
    int32_t s, t, h;
    if (r != ATTN_OK) return r;
    if (!o) return ATTN_ERR_ARGUMENT;
    attni_side_init(d, 0, &k);
    attni_side_init(d, 1, &v);
    for (s = 0; s < d->n_seq; s++)
        for (t = d->q_start[s]; t < d->q_start[s + 1]; t++)
            for (h = 0; h < d->n_heads; h++) {
                int64_t row = (int64_t)t * d->n_heads + h;
                attni_ref_query(d, &k, &v, s, t, h, o + row * attni_v_dim(d),
                                lse ? lse + row : NULL);
            }
    return ATTN_OK;
}

// ==== >>impl-select  Parameters, rows and memory of selectors ====================================

ATTN_DEF attn_result attn_select_check(const attn_desc *d, const attn_select *s) {
    attn_select f;
    attn_result r;
    if (!d || !s) return ATTN_ERR_ARGUMENT;
    if ((r = attni_check_shape(d)) != ATTN_OK) return r;
    if ((r = attni_check_kv(d)) != ATTN_OK) return r;
    if (!attni_select_fill(s, &f)) return ATTN_ERR_ARGUMENT;
    return attni_select_problem(d, &f);
}

// List rows of d, and the end of its longest sequence.
static int64_t attni_select_size(const attn_desc *d, const attn_select *f, int64_t *kv_end) {
    int64_t n = f->n_slots;
    int32_t s;
    *kv_end = f->max_kv_len;
    for (s = 0; s < d->n_seq; s++) {
        *kv_end = attni_max64(*kv_end, (int64_t)attni_kv_pos0(d, s) + d->kv.kv_len[s]);
        if (d->q_start[s + 1] > d->q_start[s]) // queries may lie beyond what is held
            *kv_end = attni_max64(*kv_end, (int64_t)attni_q_pos0(d, s) + d->q_start[s + 1] -
                                               d->q_start[s]);
        if (!f->n_slots || d->q_start[s + 1] - d->q_start[s] != 1)
            n += attni_rows_of(d, f->row_block, s);
    }
    return attni_max64(n, 1);
}

// Entries that a HiP row may have.
static int64_t attni_hip_most(const attn_select *f) {
    const attn_hip *h = &f->hip;
    int64_t n;
    if (f->kind == ATTN_SELECT_HIP3) return h->keep / f->kv_block;
    n = (int64_t)h->keep / h->block * h->head_group + 2 * (int64_t)h->near * h->near_window;
    n += h->vertical + h->random;
    return n + h->diagonal * (1 + attni_n_blocks((int64_t)f->row_block * h->q_group, h->block));
}

// Entries that a row of a sequence ending at kv_end may have.
static int64_t attni_row_capacity(const attn_select *f, int64_t kv_end) {
    const int64_t b = f->kv_block, all = attni_n_blocks(kv_end, b);
    int64_t n = all;
    if (f->kind == ATTN_SELECT_EXACT && (f->exact.keep || f->exact.share > 0)) {
        n = attni_max64(attni_n_blocks(f->exact.keep, b),
                        (int64_t)((double)f->exact.share * (double)all) + 1);
        n += attni_n_blocks(f->row_block, b) + attni_n_blocks(f->exact.recent, b) + 3;
    } else if (f->kind != ATTN_SELECT_FLEX && f->kind != ATTN_SELECT_EXACT) n = attni_hip_most(f);
    if (f->dense_below) n = attni_max64(n, f->dense_below / b + 2); // they may begin inside a block
    return attni_max64(1, attni_min64(all, n));
}

// Lays x out from base on (NULL: only counts); bytes, or 0 when they do not fit in size_t.
static size_t attni_select_lay(const attn_desc *d, const attn_select *f, uint8_t *base,
                               attn_selection *x) {
    int64_t kv_end, rows = attni_select_size(d, f, &kv_end), lists = attni_select_lists(d, f);
    int64_t cap = attni_row_capacity(f, kv_end), n, at = 0, size[6];
    int i;
    rows = attni_max64(rows, f->max_rows);
    if (rows > INT32_MAX - 1 || rows * lists > (INT64_MAX >> 8) / cap) return 0;
    if (f->n_slots && attni_state_bytes(f) > (INT64_MAX >> 8) / (f->n_slots * lists)) return 0;
    n = lists * (rows + 1);
    size[0] = size[1] = 8 * n;
    size[2] = 4 * lists * rows * cap;
    size[3] = 4 * n;
    size[4] = f->kind == ATTN_SELECT_EXACT ? 4 * n : 0;
    size[5] = f->n_slots * lists * attni_state_bytes(f);
    memset(x, 0, sizeof *x);
    for (i = 0; i < 6; i++) {
        uint8_t *p = base && size[i] ? base + at : NULL;
        if (i == 0) x->row_start = (int64_t *)(void *)p;
        else if (i == 1) x->row_end = (int64_t *)(void *)p;
        else if (i == 2) x->block = (int32_t *)(void *)p;
        else if (i == 3) x->visited = (int32_t *)(void *)p;
        else if (i == 4) x->missed = (float *)(void *)p;
        else x->state = p;
        at += (size[i] + 63) & ~(int64_t)63;
    }
    x->row_capacity = (int32_t)cap;
    x->max_rows = (int32_t)rows;
    x->n_lists = (int32_t)lists;
    x->n_slots = f->n_slots;
    x->state_bytes = (size_t)attni_state_bytes(f);
    return (uint64_t)at > (uint64_t)((size_t)-1 >> 1) ? 0 : (size_t)at;
}

ATTN_DEF int32_t attn_select_rows(const attn_desc *d, const attn_select *s) {
    attn_select f;
    int64_t end, n;
    if (attn_select_check(d, s) != ATTN_OK || !attni_select_fill(s, &f)) return 0;
    n = attni_select_size(d, &f, &end);
    return n > INT32_MAX - 1 ? 0 : (int32_t)n;
}

ATTN_DEF size_t attn_select_bytes(const attn_desc *d, const attn_select *s) {
    attn_select f;
    attn_selection x;
    if (attn_select_check(d, s) != ATTN_OK || !attni_select_fill(s, &f)) return 0;
    return attni_select_lay(d, &f, NULL, &x);
}

ATTN_DEF size_t attn_summary_bytes(const attn_desc *d) {
    uint64_t n, most = (uint64_t)((size_t)-1 >> 1);
    if (!d || d->n_kv_heads < 1 || d->kv.page_tokens < 1 || d->kv.n_pages < 1) return 0;
    if (d->head_dim < 8 || d->head_dim % 8 || d->head_dim > ATTN_MAX_HEAD_DIM) return 0;
    n = 4 * (2 * (uint64_t)d->head_dim + 8) * (uint64_t)d->n_kv_heads; // < 2^44
    if (n > most / (uint64_t)attni_page_cells(d)) return 0;
    n *= (uint64_t)attni_page_cells(d);
    return n > most / (uint64_t)d->kv.n_pages ? 0 : (size_t)(n * (uint64_t)d->kv.n_pages);
}

ATTN_DEF attn_result attn_selection_init(const attn_desc *d, const attn_select *s, void *mem,
                                         size_t bytes, int32_t *seq_row, int on_device,
                                         attn_selection *out) {
    attn_select f;
    attn_result r = attn_select_check(d, s);
    attn_selection x;
    size_t need;
    if (r != ATTN_OK) return r;
    if (!mem || !seq_row || !out) return ATTN_ERR_ARGUMENT;
    if (!attni_select_fill(s, &f)) return ATTN_ERR_ARGUMENT;
    need = attni_select_lay(d, &f, (uint8_t *)mem, &x);
    if (!need) return ATTN_ERR_OVERFLOW;
    if (bytes < need || (uintptr_t)mem % 64) return ATTN_ERR_BUFFER;
    x.seq_row = seq_row;
    x.list.row_block = f.row_block;
    x.list.kv_block = f.kv_block;
    x.list.n_lists = x.n_lists;
    x.list.n_rows = x.max_rows;
    if (on_device) x.list.device_entries = (int64_t)x.n_lists * x.max_rows * x.row_capacity;
    else memset(mem, 0, need);
    x.list.row_start = x.row_start;
    x.list.row_end = x.row_end;
    x.list.block = x.block;
    x.list.seq_row = seq_row;
    if (f.kind >= ATTN_SELECT_HIP1 && f.kind <= ATTN_SELECT_HIP3) {
        x.keep_sink = f.hip.sink;
        x.keep_recent = f.hip.window;
    }
    *out = x;
    return attn_selection_follow(d, s, NULL, out);
}

ATTN_DEF attn_result attn_selection_follow(const attn_desc *d, const attn_select *s,
                                           const int32_t *slot, attn_selection *x) {
    attn_select f;
    attn_result r = attn_select_check(d, s);
    int64_t kv_end, at;
    int32_t i;
    if (r != ATTN_OK) return r;
    if (!x || !x->seq_row || !attni_select_fill(s, &f)) return ATTN_ERR_ARGUMENT;
    if (!attni_select_fits(d, &f, x)) return ATTN_ERR_STALE;
    if (attni_select_size(d, &f, &kv_end) > x->max_rows ||
        attni_row_capacity(&f, kv_end) > x->row_capacity)
        return ATTN_ERR_BUFFER;
    for (i = 0; i < d->n_seq && f.n_slots; i++) {
        int64_t own = slot ? slot[i] : i;
        if (d->q_start[i + 1] - d->q_start[i] == 1 && (own < 0 || own >= f.n_slots))
            return ATTN_ERR_BUFFER;
    }
    x->keeps_all = 1;
    for (at = f.n_slots, i = 0; i < d->n_seq; i++) {
        int32_t n = attni_rows_of(d, f.row_block, i), p = attni_q_pos0(d, i);
        int decodes = f.n_slots && d->q_start[i + 1] - d->q_start[i] == 1;
        x->seq_row[i] = (int32_t)((decodes ? slot ? slot[i] : i : at) - p / f.row_block);
        if (!decodes) at += n;
        if (n && d->kv.kv_len[i] > f.dense_below) x->keeps_all = 0;
    }
    return ATTN_OK;
}

ATTN_DEF void attn_selection_mask(const attn_selection *x, attn_mask *m) {
    memset(&m->blocks, 0, sizeof m->blocks);
    if (!x->keeps_all) m->blocks = x->list;
    m->keep_sink = x->keeps_all ? 0 : x->keep_sink;
    m->keep_recent = x->keeps_all ? 0 : x->keep_recent;
}

// Keys that query t of sequence s sees with head.
static int64_t attni_count_seen(attni_masker *m, const attn_plan_seq *q, int32_t s, int32_t t,
                                int32_t head) {
    int64_t n = 0;
    int32_t span, end = (q->kv_pos0 + q->kv_len - 1) / ATTN_SPAN, w;
    int32_t p = q->q_pos0 + (m->d->mask.kind == ATTN_MASK_TREE
                                 ? attni_tree_depth(m->d, q->q_begin, t) : t);
    for (span = q->kv_pos0 / ATTN_SPAN; span <= end && q->kv_len > 0; span++) {
        uint64_t bits[4];
        attni_span_bits(m, q, s, t, p, head, span, bits);
        for (w = 0; w < 4; w++)
            for (; bits[w]; bits[w] &= bits[w] - 1) n++;
    }
    return n;
}

ATTN_DEF attn_result attn_mask_kept(const attn_desc *d, int64_t *kept, int64_t *base) {
    attn_desc open;
    attni_masker all, some;
    attn_result r = attn_validate(d);
    int32_t s, t, h, group;
    if (r != ATTN_OK) return r;
    if (!kept || !base) return ATTN_ERR_ARGUMENT;
    if (d->mask.blocks.device_entries) return ATTN_ERR_UNSUPPORTED;
    open = *d;
    open.mask.blocks.row_start = NULL;
    open.mask.stride.block = open.mask.vslash.block = 0;
    open.mask.keep_sink = open.mask.keep_recent = 0;
    attni_masker_init(&some, d);
    attni_masker_init(&all, &open);
    group = d->n_heads / d->n_kv_heads;
    *kept = *base = 0;
    for (s = 0; s < d->n_seq; s++) {
        attn_plan_seq q;
        memset(&q, 0, sizeof q);
        q.q_begin = d->q_start[s];
        q.q_len = d->q_start[s + 1] - q.q_begin;
        q.q_pos0 = attni_q_pos0(d, s);
        q.kv_len = d->kv.kv_len[s];
        q.kv_pos0 = attni_kv_pos0(d, s);
        for (h = 0; h < d->n_heads; h += attni_per_head(d) ? 1 : group)
            for (t = 0; t < q.q_len; t++)
                *kept += attni_count_seen(&some, &q, s, t, h) * (attni_per_head(d) ? 1 : group);
        for (t = 0; t < q.q_len; t++)
            *base += attni_count_seen(&all, &q, s, t, 0) * d->n_heads;
    }
    return ATTN_OK;
}

// ==== >>impl-delta  Correcting sparse attention by some dense rows ===============================

ATTN_DEF attn_result attn_delta_desc(const attn_desc *d, int32_t s, int32_t step,
                                     const attn_tensor *delta, int32_t *tables, attn_desc *out) {
    attn_result r = attn_validate(d);
    int64_t st;
    int32_t n, i, q_len, *pos, *len, *pos0;
    if (r != ATTN_OK) return r;
    if (s < 0 || s >= d->n_seq || step < 1 || !delta || !tables || !out) return ATTN_ERR_ARGUMENT;
    q_len = d->q_start[s + 1] - d->q_start[s];
    if (q_len < 1) return ATTN_ERR_ARGUMENT;
    if (d->mask.kind == ATTN_MASK_TREE || d->logits.bias.data) return ATTN_ERR_UNSUPPORTED;
    n = (q_len - 1) / step + 1;
    pos = tables + n + 1;
    len = pos + n;
    pos0 = len + n;
    for (i = 0; i < n; i++) {
        tables[i] = i;
        pos[i] = attni_q_pos0(d, s) + i * step;
        len[i] = d->kv.kv_len[s];
        pos0[i] = attni_kv_pos0(d, s);
    }
    tables[n] = n;
    *out = *d;
    out->n_seq = n;
    out->q_start = tables;
    out->q_pos0 = pos;
    out->seq_order = NULL;
    out->kv.kv_len = len;
    out->kv.kv_pos0 = pos0;
    tables[4 * n + 1] = s; // contiguous: the sequence's one long page
    out->kv.page_table = d->kv.page_table ? d->kv.page_table + s * d->kv.page_table_stride
                                          : tables + 4 * n + 1;
    out->kv.page_table_stride = 0;
    st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim;
    out->q.data = (uint8_t *)d->q.data + d->q_start[s] * st * (attni_bits_of(d->q.dtype) / 8);
    out->q.stride_token = st * step;
    out->o = *delta;
    out->lse = NULL;
    out->mask.blocks.row_start = NULL;
    out->mask.stride.block = out->mask.vslash.block = 0;
    out->mask.keep_sink = out->mask.keep_recent = 0;
    return attn_validate(out);
}

// ==== >>impl-plan  ===============================================================================
//
// 1. spans each sequence may see   2. order: rule by rule, in it common pages side by side   3.
// shared[i]: whole spans
// that place i and i + 1 have in common   4. segments: maximal rectangles (places x spans), from
// the root down   5. tasks: segment x row tile x KV head, dearest first   6. each sequence's chain
// of segments

// Builder state; all arrays lie in the plan's memory. Every sequence's own segment, tiles and chain
// link are provided for by the capacities, the partial rows that its rule asks for before anything
// else; what sharing and cutting add is charged to the *_left counters.
typedef struct attni_planner {
    attn_plan *p;
    const attn_desc *d;
    int32_t *stack;    // (3 * n_seq) pending (lo, hi, span)
    int32_t group;     // GQA heads
    int64_t rows_left; // partial rows in the caller's workspace
    int64_t tiles_left, chain_left, cuts_left; // what max_task_cost forces is not charged here
    float max_cost;    // dearer tasks are cut along the KV, for balance; 0: never
    int frugal;        // no sharing and no cuts but those that max_task_cost forces
    int lacking;       // the workspace was too small for one of those
} attni_planner;

static int32_t attni_n_rules(const attn_plan_params *q) {
    int32_t n = 0;
    while (n < ATTN_SPAN_RULES && q->rule[n].span) n++;
    return n;
}

static int attni_rules_ok(const attn_plan_params *q) {
    int32_t i, n = attni_n_rules(q);
    for (i = 0; i < n; i++) {
        const attn_span_rule *r = &q->rule[i];
        if (r->span < 64 || (r->span & (r->span - 1))) return 0;
        if (r->max_q_len < 0 || r->max_kv_len < 0 || r->row_tile < 0 || r->no_fold < 0) return 0;
    }
    return 1;
}

// The rule of a sequence, -1: none.
static int32_t attni_rule_of(const attn_desc *d, const attn_plan_params *q, int32_t s) {
    int32_t i, n = attni_n_rules(q), q_len = d->q_start[s + 1] - d->q_start[s];
    for (i = 0; i < n; i++) {
        const attn_span_rule *r = &q->rule[i];
        if (r->max_q_len && q_len > r->max_q_len) continue;
        if (!r->max_kv_len || d->kv.kv_len[s] <= r->max_kv_len) return i;
    }
    return -1;
}

static int32_t attni_rule_span(const attn_plan_params *q, int32_t rule) {
    return rule < 0 ? ATTN_SPAN : q->rule[rule].span;
}

static void attni_seq_spans(const attn_desc *d, const attn_plan_params *params, int32_t s,
                            attn_plan_seq *q) {
    const attn_mask *m = &d->mask;
    int64_t lo, hi, p0, p1;
    q->q_begin = d->q_start[s];
    q->q_len = d->q_start[s + 1] - d->q_start[s];
    q->q_pos0 = attni_q_pos0(d, s);
    q->kv_len = d->kv.kv_len[s];
    q->kv_pos0 = attni_kv_pos0(d, s);
    q->is_chain = 0;
    if (m->kind == ATTN_MASK_TREE) {
        int32_t t = 0;
        while (t < q->q_len && m->tree_parent[q->q_begin + t] == t - 1) t++;
        q->is_chain = t == q->q_len;
    }
    p0 = q->q_pos0;
    p1 = p0 + attni_max32(q->q_len, 1) - 1;
    lo = q->kv_pos0;
    hi = lo + q->kv_len;
    if (m->kind != ATTN_MASK_FULL) hi = attni_min64(hi, p1 + 1); // a tree's nodes end at p1 as well
    else if (m->window_right) hi = attni_min64(hi, attni_max64(p1 + m->window_right, m->n_sink));
    // tree nodes have positions from p0 on, so p0 bounds every window from below
    if (m->window_left && !m->n_sink) lo = attni_max64(lo, p0 - (m->window_left - 1));
    q->rule = attni_rule_of(d, params, s);
    q->span = attni_rule_span(params, q->rule);
    q->span0 = (int32_t)(lo / q->span);
    q->span1 = hi > lo ? (int32_t)((hi + q->span - 1) / q->span) : q->span0;
}

// Orders sequences with a page table by rule, first position, then by the ids of their whole pages,
// a beginning before what continues it (or the order would not be transitive), then by number.
static int attni_seq_less(const attni_planner *b, int32_t x, int32_t y) {
    const attn_kv *kv = &b->d->kv;
    const attn_plan_seq *sx = &b->p->seq[x], *sy = &b->p->seq[y];
    int32_t nx = sx->kv_len / kv->page_tokens, ny = sy->kv_len / kv->page_tokens;
    int32_t j, n = attni_min32(nx, ny);
    if (sx->rule != sy->rule) return sx->rule < sy->rule;
    if (sx->kv_pos0 != sy->kv_pos0) return sx->kv_pos0 < sy->kv_pos0;
    for (j = 0; j < n; j++) {
        int32_t px = kv->page_table[x * kv->page_table_stride + j];
        int32_t py = kv->page_table[y * kv->page_table_stride + j];
        if (px != py) return px < py;
    }
    return nx != ny ? nx < ny : x < y;
}

static void attni_sort_order(const attni_planner *b,
                             int32_t n) { // heap sort: no memory, no recursion
    int32_t *a = b->p->order, start, end, root, child, t;
    for (start = n / 2 - 1, end = n; end > 1;) {
        if (start >= 0) root = start--;
        else {
            root = 0;
            end--;
            t = a[0], a[0] = a[end], a[end] = t;
        }
        for (; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && attni_seq_less(b, a[child], a[child + 1])) child++;
            if (!attni_seq_less(b, a[root], a[child])) break;
            t = a[root], a[root] = a[child], a[child] = t;
        }
    }
}

// Absolute end of the whole spans that two sequences of one rule hold in the same pages.
static int32_t attni_shared_spans(const attn_desc *d, const attn_plan *p, int32_t x, int32_t y) {
    const attn_kv *kv = &d->kv;
    const attn_plan_seq *sx = &p->seq[x], *sy = &p->seq[y];
    int64_t len = attni_min32(sx->kv_len, sy->kv_len), same = 0;
    int32_t j, n = (int32_t)((len + kv->page_tokens - 1) / kv->page_tokens);
    if (!kv->page_table || sx->kv_pos0 != sy->kv_pos0 || sx->rule != sy->rule) return 0;
    for (j = 0; j < n; j++)
        if (kv->page_table[x * kv->page_table_stride + j] !=
            kv->page_table[y * kv->page_table_stride + j])
            break;
    same = attni_min64(len, (int64_t)j * kv->page_tokens);
    return (int32_t)((sx->kv_pos0 + same) / sx->span);
}

// Fills order with the sequences that have queries; their number in *n.
static attn_result attni_plan_order(attni_planner *b, int32_t *n) {
    attn_plan *p = b->p;
    int32_t i, k = 0, s, rule;
    for (s = 0; s < p->n_seq; s++) p->seq[s].place = -1;
    for (i = 0; i < p->n_seq; i++) {
        s = b->d->seq_order ? b->d->seq_order[i] : i;
        if (p->seq[s].place >= 0) return ATTN_ERR_ARGUMENT; // not a permutation
        p->seq[s].place = 0;
    }
    for (rule = -1; rule < attni_n_rules(&p->params); rule++)
        for (i = 0; i < p->n_seq; i++) {
            s = b->d->seq_order ? b->d->seq_order[i] : i;
            if (p->seq[s].q_len > 0 && p->seq[s].rule == rule) p->order[k++] = s;
        }
    if (!b->d->seq_order && b->d->kv.page_table) attni_sort_order(b, k);
    for (i = 0; i < k; i++) {
        p->seq[p->order[i]].place = i;
        p->share[i] = i + 1 < k ? attni_shared_spans(b->d, p, p->order[i], p->order[i + 1]) : 0;
    }
    *n = k;
    return ATTN_OK;
}

static int32_t attni_seq_tile(const attn_plan *p, const attn_plan_seq *q) {
    return q->rule < 0 ? p->tile_tokens : p->rule_tile[q->rule];
}

static int64_t attni_tile_count(const attn_plan *p, const attn_plan_seq *q, int64_t n_tokens) {
    return n_tokens / attni_seq_tile(p, q) + 2;
}

static float attni_span_cost(const attn_plan_params *q, int32_t span, int64_t rows) {
    return (float)span * (q->cost_kv_token + (float)rows * q->cost_row_token);
}

static float attni_task_cost(const attn_plan *p, int32_t span, int64_t spans, int64_t rows) {
    return (float)spans * attni_span_cost(&p->params, span, rows);
}

static float attni_tokens_cost(const attn_plan *p, int64_t tokens, int64_t rows) {
    return (float)tokens * (p->params.cost_kv_token + (float)rows * p->params.cost_row_token);
}

// Of one query token.
static float attni_merge_cost(const attn_plan_params *q, int64_t n_heads, int64_t slots) {
    return (float)(n_heads * slots) * q->cost_partial;
}

// How many things of cost `one` stay within bound: at least 1, at most `most`. No bound: most.
static int32_t attni_fitting(float bound, float one, int32_t most) {
    float fits;
    most = attni_max32(most, 1);
    if (!(bound > 0) || (float)most * one <= bound) return most;
    fits = bound / one; // any float, NaN too, when the caller's costs are absurd
    return fits >= (float)most ? most : fits >= 1 ? (int32_t)fits : 1;
}

// How many of the spans [span0, span1) of `span` tokens the window and causality leave to queries
// at [p0, p1].
static int32_t attni_span_count(const attn_mask *m, int32_t span, int64_t span0, int64_t span1,
                                int64_t p0, int64_t p1) {
    int64_t lo = span0, hi = span1, sinks = 0;
    if (m->kind != ATTN_MASK_FULL) hi = attni_min64(hi, p1 / span + 1);
    else if (m->window_right) hi = attni_min64(hi, (p1 + m->window_right - 1) / span + 1);
    if (m->window_left) {
        lo = attni_max64(lo, (p0 - (m->window_left - 1)) / span);
        sinks = ((int64_t)m->n_sink + span - 1) / span;
        sinks = attni_min64(sinks, attni_min64(lo, span1)) - span0;
    }
    return (int32_t)(attni_max64(hi - lo, 0) + attni_max64(sinks, 0));
}

static void attni_add_segment(attni_planner *b, int32_t lo, int32_t hi, int32_t span0,
                              int32_t span1, int32_t tokens, int32_t n_slots) {
    attn_plan *p = b->p;
    attn_segment *s = &p->segment[p->n_segments++];
    s->seq0 = lo;
    s->n_seq = hi - lo;
    s->span0 = span0;
    s->span1 = span1;
    s->n_tokens = tokens;
    s->n_slots = n_slots;
    s->partial = (int64_t)p->partial_rows;
    p->partial_rows += (size_t)n_slots * (size_t)tokens * (size_t)p->n_heads;
    p->n_shared += hi - lo > 1;
}

// Do rows whose first span a task starts at leave one folded partial there?
static int attni_folds(const attn_plan *p, const attn_plan_seq *q) {
    return q->rule < 0 || !p->params.rule[q->rule].no_fold;
}

// May one task over all n spans of rows (none: rows that see no key) write O itself? Without folds
// bits would differ from those of a cut.
static int attni_writes(const attn_plan *p, const attn_plan_seq *q, int32_t n) {
    return n < 2 || attni_folds(p, q);
}

// Partial rows that a sequence's tasks leave however it is cut.
static int64_t attni_owed(const attn_plan *p, const attn_plan_seq *q) {
    int32_t n = q->span1 - q->span0;
    return attni_writes(p, q, n) ? 0 : (int64_t)q->q_len * p->n_heads * n;
}

#define ATTNI_LONG 1024   // tokens of a piece that need not be as long as the others
#define ATTNI_WHOLE 1.3f  // so many times max_cost are not cut at all,
#define ATTNI_SHORT 2.25f // nor so many into pieces shorter than ATTNI_LONG

// Spans per piece of n, of `span` tokens, so that pieces are no dearer than they should be: without
// rules, than max_cost; with them, long pieces and one with the rest, which fills gaps at the end,
// or the nearest number of equal ones, at most `most` (what comes later wants to share, too).
static int32_t attni_balanced(const attni_planner *b, float one, int32_t span, int32_t n,
                              int64_t most) {
    float x;
    int64_t pieces, piece;
    if (attni_n_rules(&b->p->params) == 0) return attni_fitting(b->max_cost, one, n);
    if (n < 2 || !(b->max_cost > 0)) return attni_max32(n, 1);
    x = (float)n * one / b->max_cost;
    if (!(x > ATTNI_WHOLE)) return n;
    piece = x >= (float)n ? 1 : (int64_t)((float)n / x + 0.999f);
    if (piece * span >= ATTNI_LONG)
        return (int32_t)attni_min64(n, attni_max64(piece, n / most + 1));
    pieces = x >= (float)n ? n : x >= ATTNI_SHORT ? (int64_t)(x + 0.5f) : 1;
    pieces = attni_max64(1, attni_min64(pieces, most));
    return (int32_t)((n + pieces - 1) / pieces);
}

// Spans per piece of n, of n_seq sequences like q, so that no task is dearer than max_task_cost,
// nor than max_cost asks for if workspace and capacities allow. The partial rows that cutting costs
// are charged.
static int32_t attni_piece(attni_planner *b, const attn_plan_seq *q, int32_t n, int32_t n_seq,
                           int32_t tokens, int starts, int direct) {
    attn_plan *p = b->p;
    int64_t tiles = attni_tile_count(p, q, tokens), rows = (int64_t)tokens * p->n_heads;
    float one = attni_task_cost(
        p, q->span, 1, (int64_t)attni_min32(tokens, attni_seq_tile(p, q)) * b->group);
    int32_t must = attni_fitting(p->params.max_task_cost, one, n);
    int64_t least = (n + must - 1) / must;
    int64_t room = attni_min64(b->cuts_left, attni_min64(b->chain_left / n_seq,
                                                         b->tiles_left / tiles));
    int32_t piece = attni_min32(must, attni_balanced(b, one, q->span, n, least + room / 2));
    int64_t extra = (n + piece - 1) / piece - least, more;
    // rows that fold have a slot less than spans, or none when they are not cut and write O; what
    // those that do not fold leave is provided for
    more = starts ? rows * (n - piece + direct) : 0;
    if (piece < must && more <= b->rows_left && extra <= room) {
        b->rows_left -= more;
        b->cuts_left -= extra;
        b->chain_left -= extra * n_seq;
        b->tiles_left -= extra * tiles;
        return piece;
    }
    more = starts && must < n ? rows * (n - must + direct) : 0;
    if (more > b->rows_left) b->lacking = 1; // 0 as well, when what is provided for did not fit
    else b->rows_left -= more;
    return must;
}

// Emits the spans [span0, span1) of places [lo, hi), cut if need be. The piece where the rows'
// folds start keeps them in registers and leaves one slot per row, if their rule folds; the others
// leave one per span.
static void attni_emit(attni_planner *b, int32_t lo, int32_t hi, int32_t span0, int32_t span1,
                       int32_t tokens, int direct) {
    const attn_plan_seq *q = &b->p->seq[b->p->order[lo]];
    int32_t i, piece;
    int starts = attni_folds(b->p, q);
    for (i = lo; i < hi; i++) starts &= span0 <= b->p->seq[b->p->order[i]].span0;
    piece = attni_piece(b, q, span1 - span0, hi - lo, tokens, starts, direct);
    if (direct && piece >= span1 - span0 && attni_writes(b->p, q, span1 - span0)) {
        attni_add_segment(b, lo, hi, span0, span1, tokens, 0);
        return;
    }
    for (; span0 < span1; span0 += piece, starts = 0) {
        int32_t end = attni_min32(span0 + piece, span1);
        attni_add_segment(b, lo, hi, span0, end, tokens, starts ? 1 : end - span0);
    }
}

// Is each token of the spans [from, to) seen by a row of q? (Sparse terms are another matter.)
static int attni_sees_spans(const attn_mask *m, const attn_plan_seq *q, int32_t from, int32_t to) {
    int64_t p0 = attni_max64((int64_t)from * q->span, q->kv_pos0), p1 = (int64_t)to * q->span;
    int64_t end = (int64_t)q->q_pos0 + q->q_len;
    if (m->window_left && (int64_t)q->q_pos0 - (m->window_left - 1) > p0) return 0;
    if (m->kind != ATTN_MASK_FULL) return end >= p1;
    return !m->window_right || end - 1 + m->window_right >= p1;
}

// Is it worth computing the spans [from, to) of places [lo, hi) once for all? Charges workspace
// (for the whole rest of these rows, unless an outer segment did) and capacities if so.
static int attni_worth_sharing(attni_planner *b, int32_t lo, int32_t hi, int32_t from, int32_t to,
                               int reserved, int32_t *tokens) {
    attn_plan *p = b->p;
    const attn_plan_seq *head = &p->seq[p->order[lo]];
    int64_t slots = 0, owed = 0, n = hi - lo, tiles;
    float gain, loss;
    int starts = attni_folds(p, head), all_see = 1;
    int32_t i;
    *tokens = 0;
    for (i = lo; i < hi; i++) {
        const attn_plan_seq *q = &p->seq[p->order[i]];
        *tokens += q->q_len;
        all_see &= attni_sees_spans(&b->d->mask, q, from, to);
        starts &= from <= q->span0;
        if (reserved) // a row whose own spans end before
            slots += (int64_t)q->q_len * attni_max32(0, to - attni_max32(from, q->span1));
        else {
            slots += (int64_t)q->q_len * attni_max32(0, q->span1 - to);
            owed += attni_owed(p, q);
        }
    }
    if (p->params.share == 1 || b->frugal) return 0;
    // with a table: rows of a tile would meet weight 0 x NaN in V that only another sequence sees
    if (attni_n_rules(&p->params) && (attni_has_sparse(&b->d->mask) || !all_see)) return 0;
    if (!reserved) slots += (int64_t)*tokens * (starts ? 1 : to - from);
    slots *= p->n_heads;
    gain = (float)(n - 1) * (float)(to - from) * (float)head->span * p->params.cost_kv_token *
           (float)p->n_kv_heads;
    loss = (float)slots * p->params.cost_partial;
    if (p->params.share == 0 && loss >= gain) return 0;
    slots -= owed; // which is charged already
    if (slots > b->rows_left) return 0;
    tiles = attni_tile_count(p, head, *tokens);
    if (tiles > b->tiles_left || n > b->chain_left) return 0;
    b->tiles_left -= tiles;
    b->chain_left -= n;
    b->rows_left -= slots;
    return 1;
}

// Walks the implicit tree of common prefixes with a stack of (places, spans already covered; -1:
// none).
static void attni_plan_segments(attni_planner *b, int32_t n) {
    attn_plan *p = b->p;
    int32_t *top = b->stack, lo, hi, from, start, to, end, i, tokens;
    if (n == 0) return;
    *top++ = 0, *top++ = n, *top++ = -1;
    while (top > b->stack) {
        from = *--top, hi = *--top, lo = *--top;
        if (hi - lo == 1) {
            const attn_plan_seq *q = &p->seq[p->order[lo]];
            if (from < q->span1)
                attni_emit(b, lo, hi, attni_max32(from, q->span0), q->span1, q->q_len, from < 0);
            continue;
        }
        start = from < 0 ? INT32_MAX : from;
        to = p->share[lo];
        for (end = 0, i = lo; i < hi; i++) {
            const attn_plan_seq *q = &p->seq[p->order[i]];
            if (i < hi - 1) to = attni_min32(to, p->share[i]);
            if (from < 0) start = attni_min32(start, q->span0);
            end = attni_max32(end, q->span1);
        }
        end = attni_min32(end, to);
        if (end > start && attni_worth_sharing(b, lo, hi, start, end, from >= 0, &tokens)) {
            attni_emit(b, lo, hi, start, end, tokens, 0);
            from = end;
        }
        // split where only these spans are common; last group first, so that places pop in order
        for (i = end = hi; i > lo; i--)
            if (i - 1 == lo || p->share[i - 2] <= to) {
                *top++ = i - 1, *top++ = end, *top++ = from;
                end = i - 1;
            }
    }
}

// The positions of a segment's flattened query tokens [first, first + n): least and greatest.
static void attni_tile_positions(const attn_plan *p, const attn_segment *g, int32_t first,
                                 int32_t n, int64_t *p0, int64_t *p1) {
    int32_t i, skip = first;
    *p0 = INT64_MAX;
    *p1 = -1;
    for (i = g->seq0; i < g->seq0 + g->n_seq && n > 0; i++) {
        const attn_plan_seq *q = &p->seq[p->order[i]];
        int32_t take = attni_min32(q->q_len - skip, n);
        if (take > 0) {
            *p0 = attni_min64(*p0, (int64_t)q->q_pos0 + skip);
            *p1 = attni_max64(*p1, (int64_t)q->q_pos0 + skip + take - 1);
            n -= take;
        }
        skip = attni_max32(0, skip - q->q_len);
    }
}

// Tokens that the sequence holds in the spans [span0, span1).
static int64_t attni_tokens_in(const attn_plan_seq *q, int32_t span0, int32_t span1) {
    int64_t lo = attni_max64((int64_t)span0 * q->span, q->kv_pos0);
    int64_t hi = attni_min64((int64_t)span1 * q->span, (int64_t)q->kv_pos0 + q->kv_len);
    return attni_max64(0, hi - lo);
}

// How many of these the window and causality leave to queries at [p0, p1], token by token: spans of
// a rule may be longer than anything.
static int64_t attni_reach(const attn_mask *m, const attn_plan_seq *q, int32_t span0, int32_t span1,
                           int64_t p0, int64_t p1) {
    int64_t lo = attni_max64((int64_t)span0 * q->span, q->kv_pos0), from = lo;
    int64_t hi = attni_min64((int64_t)span1 * q->span, (int64_t)q->kv_pos0 + q->kv_len);
    if (m->kind != ATTN_MASK_FULL) hi = attni_min64(hi, p1 + 1);
    else if (m->window_right) hi = attni_min64(hi, attni_max64(p1 + m->window_right, m->n_sink));
    if (m->kind == ATTN_MASK_TREE) p0 = attni_min64(p0, q->q_pos0); // positions are depths there
    if (m->window_left) from = attni_max64(lo, p0 - (m->window_left - 1));
    return attni_max64(0, hi - from) +
           attni_max64(0, attni_min64(m->n_sink, attni_min64(hi, from)) - lo);
}

// Of all rows of a sequence, an estimate before anything is shared or cut.
static float attni_seq_cost(const attni_planner *b, const attn_plan_seq *q) {
    int64_t rows = (int64_t)q->q_len * b->group, p1 = (int64_t)q->q_pos0 + q->q_len - 1;
    if (q->rule < 0) return attni_task_cost(b->p, q->span, q->span1 - q->span0, rows);
    if (rows == 0) return 0;
    return attni_tokens_cost(
        b->p, attni_reach(&b->d->mask, q, q->span0, q->span1, q->q_pos0, p1), rows);
}

static void attni_plan_tasks(attni_planner *b) {
    attn_plan *p = b->p;
    int32_t i, h, first, n, spans, tile;
    for (i = 0; i < p->n_segments; i++) {
        const attn_segment *g = &p->segment[i];
        const attn_plan_seq *q = &p->seq[p->order[g->seq0]];
        tile = attni_seq_tile(p, q);
        for (first = 0; first < g->n_tokens; first += n) {
            int64_t p0, p1, tokens, reach;
            float cost;
            n = attni_min32(tile, g->n_tokens - first);
            // tiles of a long prefill start at multiples of the tile, as row blocks of masks do
            if (first == 0 && g->n_seq == 1 && g->n_tokens > tile && q->q_pos0 % tile)
                n = tile - q->q_pos0 % tile;
            attni_tile_positions(p, g, first, n, &p0, &p1);
            spans = attni_span_count(&b->d->mask, q->span, g->span0, g->span1, p0, p1);
            tokens = attni_min64((int64_t)spans * q->span, attni_tokens_in(q, g->span0, g->span1));
            reach = attni_reach(&b->d->mask, q, g->span0, g->span1, p0, p1);
            cost = q->rule < 0 ? attni_task_cost(p, q->span, spans, (int64_t)n * b->group)
                               : attni_tokens_cost(p, reach, (int64_t)n * b->group);
            for (h = 0; h < p->n_kv_heads; h++) {
                attn_task *t = &p->task[p->n_tasks++];
                t->segment = i;
                t->kv_head = h;
                t->first_token = first;
                t->n_tokens = n;
                t->cost = cost;
                p->kv_tokens_read += tokens;
            }
        }
    }
}

static int attni_task_before(const attn_task *a,
                             const attn_task *b) { // dearest first, then in order
    if (a->cost != b->cost) return a->cost > b->cost;
    if (a->kv_head != b->kv_head) return a->kv_head < b->kv_head;
    if (a->segment != b->segment) return a->segment < b->segment;
    return a->first_token < b->first_token;
}

static void attni_sort_tasks(attn_task *a, int32_t n) {
    int32_t start, end, root, child;
    attn_task t;
    for (start = n / 2 - 1, end = n; end > 1;) {
        if (start >= 0) root = start--;
        else {
            root = 0;
            end--;
            t = a[0], a[0] = a[end], a[end] = t;
        }
        for (; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && attni_task_before(&a[child], &a[child + 1])) child++;
            if (!attni_task_before(&a[root], &a[child])) break;
            t = a[root], a[root] = a[child], a[child] = t;
        }
    }
}

// The merges of a sequence: as many query tokens in each as max_task_cost allows.
static void attni_add_merges(attn_plan *p, int32_t s) {
    const attn_plan_seq *q = &p->seq[s];
    int32_t t, c, n, slots = 0;
    float one;
    for (c = 0; c < q->n_chain; c++) slots += p->segment[p->chain[q->chain + c]].n_slots;
    one = attni_merge_cost(&p->params, p->n_heads, slots);
    n = attni_fitting(p->params.max_task_cost, one, q->q_len);
    for (t = 0; t < q->q_len; t += n) {
        attn_merge *m = &p->merge[p->n_merges++];
        m->seq = s;
        m->first_token = t;
        m->n_tokens = attni_min32(n, q->q_len - t);
        m->cost = (float)m->n_tokens * one;
    }
}

// Chains, merges and what a run without sharing would read.
static void attni_plan_chains(attn_plan *p) {
    int32_t i, s, at = 0, tile;
    for (s = 0; s < p->n_seq; s++) p->seq[s].n_chain = 0;
    for (i = 0; i < p->n_segments; i++)
        for (s = 0; s < p->segment[i].n_seq; s++)
            p->seq[p->order[p->segment[i].seq0 + s]].n_chain++;
    for (s = 0; s < p->n_seq; s++) {
        attn_plan_seq *q = &p->seq[s];
        q->chain = at;
        at += q->n_chain;
        q->n_chain = 0;
        tile = attni_seq_tile(p, q);
        if (q->q_len > 0)
            p->kv_tokens_seen += (int64_t)p->n_kv_heads * ((q->q_len + tile - 1) / tile) *
                                 attni_tokens_in(q, q->span0, q->span1);
    }
    for (i = 0; i < p->n_segments; i++)
        for (s = 0; s < p->segment[i].n_seq; s++) {
            attn_plan_seq *q = &p->seq[p->order[p->segment[i].seq0 + s]];
            p->chain[q->chain + q->n_chain++] = i;
        }
    for (s = 0; s < p->n_seq; s++)
        if (p->seq[s].n_chain > 0 && p->segment[p->chain[p->seq[s].chain]].n_slots > 0)
            attni_add_merges(p, s);
}

static int32_t attni_floor_pow2(int32_t x) {
    int32_t p = 1;
    while (p <= x / 2) p *= 2;
    return p;
}

static int32_t attni_held_spans(const attn_desc *d, int32_t s, int32_t span) { // at most
    return d->kv.kv_len[s] / span + 2;
}

// The largest tile (tokens) of a rule for max_task_cost: from low on while the longest KV needs no
// cut then; where even low does, the largest whose single spans are cheap enough.
static int32_t attni_bounded_tile(const attn_desc *d, const attn_plan_params *q, int32_t rule,
                                  int32_t tile, int32_t low) {
    int32_t group = d->n_heads / d->n_kv_heads, span = attni_rule_span(q, rule), s, t, spans;
    if (!(q->max_task_cost > 0)) return tile;
    for (t = tile; t >= low; t /= 2) {
        for (spans = 1, s = 0; s < d->n_seq; s++) // a smaller tile is no help to shorter queries
            if (d->q_start[s + 1] - d->q_start[s] > t / 2 && attni_rule_of(d, q, s) == rule)
                spans = attni_max32(spans, attni_held_spans(d, s, span));
        if ((float)spans * attni_span_cost(q, span, (int64_t)t * group) <= q->max_task_cost)
            return t;
    }
    for (t = tile; t > 1 && attni_span_cost(q, span, (int64_t)t * group) > q->max_task_cost;)
        t /= 2;
    return t;
}

static int attni_sets_tile(const attn_plan_params *q, int32_t rule) {
    return rule >= 0 && q->rule[rule].row_tile > 0;
}

static int32_t attni_most_tile(const attn_desc *d, const attn_plan_params *q, int32_t rule) {
    int32_t group = d->n_heads / d->n_kv_heads, rows = q->row_tile > 0 ? q->row_tile : 256;
    if (attni_sets_tile(q, rule)) rows = q->rule[rule].row_tile;
    return attni_floor_pow2(attni_max32(1, rows / group));
}

// Query tokens per tile of sequences of a rule: a power of two; where the rule does not say,
// smaller tiles when there would be too few tasks; always smaller ones when they would be too dear.
// least: no problem's tiles are smaller.
static int32_t attni_tile_tokens(const attn_desc *d, const attn_plan_params *q, int32_t rule,
                                 int least) {
    int32_t group = d->n_heads / d->n_kv_heads, s, tile = attni_most_tile(d, q, rule), low;
    low = attni_min32(tile, attni_floor_pow2(attni_max32(1, 32 / group)));
    if (least) return attni_bounded_tile(d, q, rule, low, low);
    for (; q->workers > 1 && tile > low && !attni_sets_tile(q, rule); tile /= 2) {
        int64_t n = 0;
        for (s = 0; s < d->n_seq; s++) {
            int32_t q_len = d->q_start[s + 1] - d->q_start[s], own = attni_rule_of(d, q, s), t;
            t = attni_sets_tile(q, own) ? attni_most_tile(d, q, own) : tile;
            n += q_len / t + (q_len % t != 0);
        }
        if ((double)(n * d->n_kv_heads) >= (double)q->tasks_per_worker * q->workers) break;
    }
    return attni_bounded_tile(d, q, rule, tile, low);
}

static attn_plan_params attni_plan_defaults(const attn_plan_params *q) {
    attn_plan_params p = *q;
    if (p.workers < 1) p.workers = 1;
    if (!(p.tasks_per_worker > 0)) p.tasks_per_worker = 3;
    // in units of one row x token at 128 dims, measured on AVX-512
    if (!(p.cost_kv_token > 0)) p.cost_kv_token = 4;
    if (!(p.cost_row_token > 0)) p.cost_row_token = 1;
    if (!(p.cost_partial > 0)) p.cost_partial = 16;
    return p;
}

typedef struct attni_plan_caps {
    int64_t seq, segments, tiles, tasks, chain, merges;
    int64_t cut_segments, cut_tiles; // of these, what max_task_cost alone may take; cut_segments is
                                     // its part of chain as well
    uint64_t at_seq, at_order, at_share, at_segment, at_task, at_chain, at_merge, at_stack;
    size_t bytes;
} attni_plan_caps;

// In 64 bits on every host: the sum may not fit in a 32-bit size_t.
static uint64_t attni_take(uint64_t *at, int64_t n, size_t size) {
    uint64_t here = *at;
    *at += ((uint64_t)n * size + 63) / 64 * 64;
    return here;
}

// What cutting for max_task_cost may add to sequences of one rule. A sequence's segments have no
// more spans together than the sequence, so pieces of n spans add spans / n to the segments on its
// path. Returns the spans that one may have.
static int32_t attni_rule_caps(const attn_desc *d, const attn_plan_params *q, int32_t rule,
                               int64_t tokens, attni_plan_caps *c) {
    int32_t group = d->n_heads / d->n_kv_heads, span = attni_rule_span(q, rule), s;
    int32_t spans = q->max_kv_len / span + 2;
    int64_t tile; // the largest tile's double too
    for (s = 0; s < d->n_seq; s++) spans = attni_max32(spans, attni_held_spans(d, s, span));
    for (tile = attni_tile_tokens(d, q, rule, 1); tile <= attni_most_tile(d, q, rule); tile *= 2) {
        int64_t n = attni_fitting(q->max_task_cost, attni_span_cost(q, span, tile * group), spans);
        c->cut_segments = attni_max64(c->cut_segments, c->seq * (spans / n));
        c->cut_tiles = attni_max64(c->cut_tiles, spans / n * (tokens / tile + 2 * c->seq));
    }
    return spans;
}

static void attni_cut_caps(const attn_desc *d, const attn_plan_params *q, int64_t tokens,
                           attni_plan_caps *c) {
    int32_t rule, spans = 1;
    c->cut_segments = c->cut_tiles = 0;
    c->merges = c->seq;
    if (!(q->max_task_cost > 0)) return;
    for (rule = -1; rule < attni_n_rules(q); rule++)
        spans = attni_max32(spans, attni_rule_caps(d, q, rule, tokens, c));
    c->merges += tokens / attni_fitting(q->max_task_cost,
                                        attni_merge_cost(q, d->n_heads, spans), INT32_MAX);
}

// q: with its defaults.
static attn_result attni_plan_caps_of(const attn_desc *d, const attn_plan_params *q,
                                      attni_plan_caps *c) {
    int64_t tokens = attni_max64(d->q_start[d->n_seq], q->max_tokens);
    int64_t workers = q->workers, each;
    int32_t rule, tile = INT32_MAX;
    uint64_t at = (sizeof(attn_plan) + 63) / 64 * 64;
    if (workers > 1 << 16 || !(q->max_task_cost >= 0)) return ATTN_ERR_ARGUMENT;
    if (!(q->tasks_per_worker <= 1024) || !attni_rules_ok(q)) return ATTN_ERR_ARGUMENT;
    each = (int64_t)q->tasks_per_worker; // room for balance is in proportion, from 3 on
    if (each > 2) workers = (workers * (each + ((float)each < q->tasks_per_worker)) + 2) / 3;
    c->seq = attni_max32(d->n_seq, q->max_seq);
    attni_cut_caps(d, q, tokens, c);
    for (rule = -1; rule < attni_n_rules(q); rule++)
        tile = attni_min32(tile, attni_tile_tokens(d, q, rule, 1));
    c->tiles = 4 * (tokens / tile + 2 * c->seq) + 16 * workers + c->cut_tiles;
    c->segments = 2 * c->seq + 8 * workers + c->cut_segments;
    c->chain = 12 * c->seq + 16 * workers + c->cut_segments;
    // segments and chain are less than twice tiles
    if (c->tiles > INT32_MAX / 64 / d->n_kv_heads) return ATTN_ERR_OVERFLOW;
    c->tasks = c->tiles * d->n_kv_heads;
    c->at_seq = attni_take(&at, c->seq, sizeof(attn_plan_seq));
    c->at_order = attni_take(&at, c->seq, 4);
    c->at_share = attni_take(&at, c->seq, 4);
    c->at_segment = attni_take(&at, c->segments, sizeof(attn_segment));
    c->at_task = attni_take(&at, c->tasks, sizeof(attn_task));
    c->at_chain = attni_take(&at, c->chain, 4);
    c->at_merge = attni_take(&at, c->merges, sizeof(attn_merge));
    c->at_stack = attni_take(&at, 3 * c->seq + 3, 4);
    if (at > SIZE_MAX) return ATTN_ERR_OVERFLOW;
    c->bytes = (size_t)at;
    return ATTN_OK;
}

ATTN_DEF size_t attn_plan_bytes(const attn_desc *d, const attn_plan_params *q) {
    attni_plan_caps c;
    attn_plan_params full;
    if (!d || !q || attni_check_shape(d) != ATTN_OK) return 0;
    full = attni_plan_defaults(q);
    return attni_plan_caps_of(d, &full, &c) == ATTN_OK ? c.bytes : 0;
}

#define ATTNI_MIXED 1.5f // times as many tasks where rows of some are shared: kernels of two kinds

// Plans d into p, whose arrays and capacities are set; c: what d needs of them. cost: of all tasks
// (0: a guess, without sharing).
static attn_result attni_plan_try(attn_plan *p, const attn_desc *d, const attni_plan_caps *c,
                                  int frugal, float cost) {
    attni_planner b;
    float total = 0;
    int32_t s, n;
    attn_result r;
    p->n_seq = d->n_seq;
    p->n_tokens = d->q_start[d->n_seq];
    p->tile_tokens = attni_tile_tokens(d, &p->params, -1, 0);
    for (s = 0; s < attni_n_rules(&p->params); s++)
        p->rule_tile[s] = attni_tile_tokens(d, &p->params, s, 0);
    p->n_tasks = p->n_merges = p->n_segments = p->n_shared = 0;
    p->partial_rows = 0;
    p->kv_tokens_read = p->kv_tokens_seen = 0;
    b.p = p;
    b.d = d;
    b.stack = p->stack;
    b.frugal = frugal;
    b.lacking = 0;
    b.group = d->n_heads / d->n_kv_heads;
    b.rows_left = (int64_t)(p->params.partial_bytes / 4 / (size_t)(p->v_head_dim + 2));
    b.tiles_left = p->cap_tasks / p->n_kv_heads - c->cut_tiles;
    b.chain_left = p->cap_chain - p->n_seq - c->cut_segments;
    b.cuts_left = p->cap_segments - 2 * p->n_seq - c->cut_segments;
    for (s = 0; s < p->n_seq; s++) {
        attn_plan_seq *q = &p->seq[s];
        attni_seq_spans(d, &p->params, s, q);
        b.tiles_left -= attni_tile_count(p, q, q->q_len);
        b.rows_left -= attni_owed(p, q);
        total += attni_seq_cost(&b, q);
    }
    total *= (float)p->n_kv_heads;
    if (cost > 0) total = cost / ATTNI_MIXED;
    b.max_cost = p->params.workers > 1 && !frugal
                     ? total / (p->params.tasks_per_worker * (float)p->params.workers) : 0;
    if ((r = attni_plan_order(&b, &n)) != ATTN_OK) return r;
    p->n_active = n;
    attni_plan_segments(&b, n);
    if (b.lacking) return ATTN_ERR_BUFFER;
    attni_plan_tasks(&b);
    attni_sort_tasks(p->task, p->n_tasks);
    attni_plan_chains(p);
    return ATTN_OK;
}

// With rules, sharing is planned first for what its tasks then cost. What sharing and balance took
// of the workspace may be what max_task_cost lacks.
static attn_result attni_plan_fill(attn_plan *p, const attn_desc *d, const attni_plan_caps *c) {
    attn_result r = attni_plan_try(p, d, c, 0, 0);
    float cost = 0;
    int32_t i;
    if (r == ATTN_OK && p->n_shared > 0 && p->params.workers > 1 && attni_n_rules(&p->params) > 0) {
        for (i = 0; i < p->n_tasks; i++) cost += p->task[i].cost;
        r = attni_plan_try(p, d, c, 0, cost);
    }
    return r == ATTN_ERR_BUFFER ? attni_plan_try(p, d, c, 1, 0) : r;
}

ATTN_DEF attn_result attn_plan_build(const attn_desc *d, const attn_plan_params *q, void *mem,
                                     size_t bytes, attn_plan **plan) {
    attn_result r = attn_validate(d);
    attni_plan_caps c;
    attn_plan_params full;
    uint8_t *m = (uint8_t *)mem;
    attn_plan *p = (attn_plan *)mem;
    if (r != ATTN_OK) return r;
    if (!q || !mem || !plan || q->row_tile < 0 || q->workers < 0) return ATTN_ERR_ARGUMENT;
    full = attni_plan_defaults(q);
    if ((r = attni_plan_caps_of(d, &full, &c)) != ATTN_OK) return r;
    if (bytes < c.bytes || (uintptr_t)mem % 64) return ATTN_ERR_BUFFER;
    memset(p, 0, sizeof *p);
    p->params = full;
    p->n_heads = d->n_heads;
    p->n_kv_heads = d->n_kv_heads;
    p->head_dim = d->head_dim;
    p->v_head_dim = attni_v_dim(d);
    p->cap_seq = (int32_t)c.seq;
    p->cap_segments = (int32_t)c.segments;
    p->cap_tasks = (int32_t)c.tasks;
    p->cap_chain = (int32_t)c.chain;
    p->cap_merges = (int32_t)c.merges;
    p->seq = (attn_plan_seq *)(void *)(m + c.at_seq);
    p->order = (int32_t *)(void *)(m + c.at_order);
    p->share = (int32_t *)(void *)(m + c.at_share);
    p->segment = (attn_segment *)(void *)(m + c.at_segment);
    p->task = (attn_task *)(void *)(m + c.at_task);
    p->chain = (int32_t *)(void *)(m + c.at_chain);
    p->merge = (attn_merge *)(void *)(m + c.at_merge);
    p->stack = (int32_t *)(void *)(m + c.at_stack);
    r = attni_plan_fill(p, d, &c);
    if (r == ATTN_OK) *plan = p;
    return r;
}

// Is seq_order what p's order was made from?
static int attni_order_kept(const attn_plan *p, const attn_desc *d) {
    int32_t rule, s, i = 0;
    for (rule = -1; rule < attni_n_rules(&p->params); rule++)
        for (s = 0; s < p->n_seq; s++) {
            const attn_plan_seq *q = &p->seq[d->seq_order[s]];
            if (q->q_len > 0 && q->rule == rule && p->order[i++] != d->seq_order[s]) return 0;
        }
    return 1;
}

// 1 when d differs from what p was built for in lengths only; patches those.
static int attni_plan_patch(attn_plan *p, const attn_desc *d) {
    int32_t s, i;
    attn_plan_seq q;
    if (d->n_seq != p->n_seq || d->q_start[d->n_seq] != p->n_tokens) return 0;
    for (s = 0; s < p->n_seq; s++) {
        const attn_plan_seq *o = &p->seq[s];
        attni_seq_spans(d, &p->params, s, &q);
        if (q.q_len != o->q_len || q.rule != o->rule) return 0;
        if (q.span0 != o->span0 || q.span1 != o->span1) return 0;
    }
    if (d->seq_order && !attni_order_kept(p, d)) return 0;
    for (s = 0; s < p->n_seq; s++) {
        attn_plan_seq *o = &p->seq[s];
        attni_seq_spans(d, &p->params, s, &q);
        o->q_pos0 = q.q_pos0;
        o->kv_len = q.kv_len;
        o->kv_pos0 = q.kv_pos0;
        o->is_chain = q.is_chain;
    }
    for (i = 0; i + 1 < p->n_active; i++)
        if (p->share[i] != attni_shared_spans(d, p, p->order[i], p->order[i + 1])) return 0;
    for (i = 0; i < p->n_segments && attni_n_rules(&p->params) && p->n_shared; i++) {
        const attn_segment *g = &p->segment[i];
        for (s = g->seq0; s < g->seq0 + g->n_seq && g->n_seq > 1; s++)
            if (!attni_sees_spans(&d->mask, &p->seq[p->order[s]], g->span0, g->span1)) return 0;
    }
    return 1;
}

ATTN_DEF attn_result attn_plan_update(attn_plan *plan, const attn_desc *d, int *rebuilt) {
    attni_plan_caps c;
    attn_result r = attn_validate(d);
    if (r != ATTN_OK) return r;
    if (!plan) return ATTN_ERR_ARGUMENT;
    if (rebuilt) *rebuilt = 0;
    if (d->n_heads != plan->n_heads || d->n_kv_heads != plan->n_kv_heads ||
        d->head_dim != plan->head_dim || attni_v_dim(d) != plan->v_head_dim)
        return ATTN_ERR_STALE;
    if (attni_plan_patch(plan, d)) return ATTN_OK;
    if (rebuilt) *rebuilt = 1;
    if ((r = attni_plan_caps_of(d, &plan->params, &c)) != ATTN_OK) return r;
    // no more sequences than before: a chain that outgrew its room would need more segments as well
    if (c.seq > plan->cap_seq || c.tasks > plan->cap_tasks || c.segments > plan->cap_segments ||
        c.merges > plan->cap_merges)
        return ATTN_ERR_BUFFER;
    return attni_plan_fill(plan, d, &c);
}

ATTN_DEF size_t attn_plan_partial_bytes(const attn_plan *plan) {
    return plan ? plan->partial_rows * (size_t)(plan->v_head_dim + 2) * 4 : 0;
}

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
    return (unsigned char *)mem + (size_t)(at % ATTNI_ALIGN ? ATTNI_ALIGN - at % ATTNI_ALIGN : 0);
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
    memset(pool, 0, sizeof *pool);
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
    if (--pool->ref[page] == 0) {
        pool->free[pool->n_free++] = page;
#ifdef ATTN_CHECK
        if (pool->freed) pool->freed(pool->freed_user, page);
#endif
    }
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
#ifndef ATTNI_FAULT /* a test refuses a request for pages, a node or a sequence slot */
#define ATTNI_FAULT() 0
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
    if (ATTNI_FAULT()) return 0;
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
    if (t->n_nodes < t->max_nodes) return ATTNI_FAULT() ? -1 : attni_node_split(t, x, pos);
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
    if (ATTNI_FAULT()) return ATTN_ERR_FULL;
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
        // held once: by c, so no sequence or pin sits at u
        n += u->held == 1 && u->cached == c->cached && u->priority == c->priority &&
             u->last_page != c->first_page && t->hold[u->last_page] == 1;
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
    if (t->n_heap == 0 || // else there is a node to evict as well
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
    if (ATTNI_FAULT()) return ATTN_ERR_FULL;
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
        for (;; pos += run, page = t->next[page]) {
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
        sx = t->node[x].start - (t->node[x].parent < 0); // roots above their children,
        sy = t->node[y].start - (t->node[y].parent < 0); // so both leave theirs together
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

// ---- attn_tree_check: every statement of the section's first comment. Whatever the arrays hold,
// no index read from them is followed before it was compared with its count.

static int attni_check_ids(const int32_t *id, int64_t n, int32_t least, int32_t limit) {
    int64_t i;
    for (i = 0; i < n; i++)
        if (id[i] < least || id[i] >= limit) return 0;
    return 1;
}

// The arrays of ids; and the index has an unused place, so that every search in it ends.
static int attni_check_arrays(const attn_tree *t) {
    int64_t i, n_index = 0, n_table = (int64_t)t->table_mask + 1;
    if (t->pool.n_free < 0 || t->pool.n_free > t->n_pages) return 0;
    if (t->n_heap < 0 || t->n_heap > t->max_nodes) return 0;
    if (!attni_check_ids(t->pool.free, t->pool.n_free, 0, t->n_pages)) return 0;
    if (!attni_check_ids(t->heap, t->n_heap, 0, t->max_nodes)) return 0;
    if (!attni_check_ids(t->copy_src, t->n_pages, -1, t->n_pages)) return 0;
    if (!attni_check_ids(t->table, n_table, -1, t->max_nodes)) return 0;
    for (i = 0; i < n_table; i++) n_index += t->table[i] >= 0;
    return n_index == t->n_nodes && n_index <= t->max_nodes;
}
ATTN_DEF attn_pool *attn_tree_pool(attn_tree *t) { return t ? &t->pool : (attn_pool *)0; }

// ---- attn_tree_check: every statement of the section's first comment

// Pages of a node: their number, links, fills and its first token. Counts into ref and held.
static int attni_check_pages(const attn_tree *t, int32_t x, int32_t *ref, int32_t *held) {
    const attni_tree_node *n = t->node + x, *p = t->node + n->parent;
    int32_t pt = t->page_tokens, j, last, page = n->first_page;
    int32_t i, slot = n->start % pt, behind = -1;
    if (n->end <= n->start || n->start != p->end) return 0;
    last = (n->end - 1) / pt;
    for (j = n->start / pt;; j++) {
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
    if (slot == 0 || p->last_page == n->first_page) return 1;
    if (p->last_page < 0 || p->last_page >= t->n_pages) return 0;
    for (i = 0; i < slot; i++) // a copy has the slots
        if (*attni_page_token(t, n->first_page, i) != *attni_page_token(t, p->last_page, i))
            return 0;
    return 1;
}

// One node but for its pages. sum: (3, max_nodes) children, XOR of children, held children.
static int attni_check_node(const attn_tree *t, int32_t x, const int32_t *sum) {
    const attni_tree_node *n = t->node + x, *only;
    int32_t s, n_seq = 0, before = -1;
    for (s = n->first_seq; s >= 0; before = s, s = t->seq[s].next, n_seq++)
        if (s >= t->max_seq || t->seq[s].node != x || t->seq[s].prev != before) return 0;
    if (n->n_child != sum[x] || n->child_xor != sum[t->max_nodes + x]) return 0;
    if (n->pins < 0 || n->held != (int64_t)n_seq + n->pins + sum[2 * t->max_nodes + x]) return 0;
    if (attni_index_find(t, n->parent, n->key) != x) return 0;
    if ((n->heap_at >= 0) != (n->parent >= 0 && n->n_child == 0 && n->held == 0)) return 0;
    if (n->heap_at >= t->n_heap || (n->heap_at >= 0 && t->heap[n->heap_at] != x)) return 0;
    if (n->heap_at > 0 && attni_heap_before(t, x, t->heap[(n->heap_at - 1) / 2])) return 0;
    if (n->parent < 0) return n->end == 0 && n->first_page < 0 && (n->n_child > 0 || n->held > 0);
    if (n->cached && t->node[n->parent].parent >= 0 && !t->node[n->parent].cached) return 0;
    if (!n->cached && (n->pins > 0 || (n->n_child == 0 && n_seq == 0))) return 0;
    if (n->n_child != 1 || n_seq > 0 || n->pins > 0) return 1;
    only = t->node + n->child_xor; // the border below must have a reason
    return only->cached != n->cached || only->priority != n->priority;
}

// Free lists and totals, after ref and held were counted.
static int attni_check_totals(const attn_tree *t, int32_t *ref, const int32_t *held) {
    int32_t i, n = 0, n_held = 0;
    for (i = 0; i < t->n_pages; i++) {
        if (t->pool.ref[i] != ref[i] || t->hold[i] != held[i]) return 0;
        if (t->n_copying[i] > ref[i] || (t->n_copying[i] > 0) != (t->lock[i] > 0)) return 0;
        n += ref[i] == 0;
        n_held += held[i] > 0;
    }
    if (n != t->pool.n_free || n_held != t->n_held_pages) return 0;
    for (i = 0; i < t->pool.n_free; i++)
        if (ref[t->pool.free[i]]++ != 0) return 0; // in use, or listed twice
    for (n = 0, i = t->free_node; i >= 0 && n <= t->max_nodes; i = t->node[i].parent, n++)
        if (i >= t->max_nodes || t->node[i].start >= 0) return 0;
    if (t->max_nodes - n != t->n_nodes) return 0;
    for (n = 0, i = t->free_seq; i >= 0 && n <= t->max_seq; i = t->seq[i].next, n++)
        if (i >= t->max_seq || t->seq[i].node >= 0) return 0;
    return t->max_seq - n == t->n_seq;
}

ATTN_DEF attn_result attn_tree_check(const attn_tree *t) {
    int32_t *ref, *held, *sum, x, i, n_nodes = 0, n_held = 0, n_heap = 0;
    int64_t tokens = 0;
    if (!t) return ATTN_ERR_ARGUMENT;
    if (!attni_check_arrays(t)) return ATTN_ERR_CORRUPT;
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
        tokens += (int64_t)n->end - n->start;
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
    if (n_nodes != t->n_nodes || n_held != t->n_held_nodes || n_heap != t->n_heap ||
        tokens != t->count.tokens_cached)
        return ATTN_ERR_CORRUPT;
    return attni_check_totals(t, ref, held) ? ATTN_OK : ATTN_ERR_CORRUPT;
}

// ==== >>impl-cache  Pages in slow memory behind a cache ==========================================

static size_t attni_cache_lay(const attn_cache_params *p, uint8_t *base, attn_cache *c) {
    const size_t n = (size_t)p->n_pages, slots = (size_t)p->n_slots;
    const size_t size[7] = {4 * n, 4 * slots, 4 * n, n, 4 * ATTN_CACHE_K * n, 8 * n, 4 * n};
    size_t at = (sizeof *c + 63) & ~(size_t)63, where[7];
    int i;
    for (i = 0; i < 7; i++) {
        where[i] = at;
        at += (size[i] + 63) & ~(size_t)63;
    }
    if (!base) return at;
    c->slot = (int32_t *)(void *)(base + where[0]);
    c->page = (int32_t *)(void *)(base + where[1]);
    c->reads = (uint32_t *)(void *)(base + where[2]);
    c->wanted = base + where[3];
    c->last = (int32_t *)(void *)(base + where[4]);
    c->count = (double *)(void *)(base + where[5]);
    c->order = (int32_t *)(void *)(base + where[6]);
    return at;
}

ATTN_DEF size_t attn_cache_bytes(const attn_cache_params *p) {
    if (!p || p->n_pages < 1 || p->n_slots < 1 || p->n_slots > p->n_pages) return 0;
    if ((int)p->policy < 0 || p->policy > ATTN_CACHE_DECAYED_LFU) return 0;
    if (p->k < 0 || p->k > ATTN_CACHE_K || p->max_loads < 0) return 0;
    if (!(p->decay >= 0 && p->decay <= 1)) return 0;
    if ((uint64_t)p->n_pages > (uint64_t)((size_t)-1 / (8 * (ATTN_CACHE_K + 8)))) return 0;
    return attni_cache_lay(p, NULL, NULL);
}

ATTN_DEF attn_result attn_cache_init(const attn_cache_params *p, void *mem, size_t bytes,
                                     attn_cache **out) {
    size_t need = attn_cache_bytes(p);
    attn_cache *c = (attn_cache *)mem;
    int32_t i;
    if (!need || !mem || !out) return ATTN_ERR_ARGUMENT;
    if (bytes < need || (uintptr_t)mem % 64) return ATTN_ERR_BUFFER;
    memset(mem, 0, need);
    c->params = *p;
    c->params.k = attni_or(p->k, 2);
    c->params.max_loads = attni_min32(attni_or(p->max_loads, p->n_slots), p->n_slots);
    if (!(p->decay > 0)) c->params.decay = 0.9f;
    attni_cache_lay(p, (uint8_t *)mem, c);
    for (i = 0; i < p->n_pages; i++) c->slot[i] = -1;
    for (i = 0; i < p->n_slots; i++) c->page[i] = -1;
    *out = c;
    return ATTN_OK;
}

ATTN_DEF void attn_cache_want(attn_cache *c, int32_t page) {
    if (page >= 0 && page < c->params.n_pages) c->wanted[page] = 1;
}

ATTN_DEF attn_result attn_cache_want_listed(attn_cache *c, const attn_desc *d, int32_t s) {
    const attn_block_list *b;
    int64_t row, end, e, t, pos0;
    int32_t l;
    if (!c || !d || s < 0 || s >= d->n_seq) return ATTN_ERR_ARGUMENT;
    b = &d->mask.blocks;
    if (!b->row_start) return ATTN_ERR_MASK;
    if (b->device_entries) return ATTN_ERR_UNSUPPORTED;
    pos0 = attni_kv_pos0(d, s);
    if (d->q_start[s + 1] == d->q_start[s]) return ATTN_OK;
    row = attni_list_row(d, s, attni_q_pos0(d, s));
    end = attni_list_row(d, s, attni_q_pos0(d, s) + d->q_start[s + 1] - d->q_start[s] - 1);
    for (l = 0; l < b->n_lists; l++)
        for (t = row; t <= end; t++)
            for (e = attni_row_start(b, l, t); e < attni_row_end(b, l, t); e++) {
                int64_t j = attni_max64(0, (int64_t)b->block[e] * b->kv_block - pos0), last;
                last = ((int64_t)b->block[e] + 1) * b->kv_block - pos0;
                last = attni_min64(last, d->kv.kv_len[s]);
                for (; j < last; j += d->kv.page_tokens - j % d->kv.page_tokens)
                    attn_cache_want(c, attni_page_of(d, s, (int32_t)j));
            }
    return ATTN_OK;
}

// Does page a deserve its place more than page b?
static int attni_cache_before(const attn_cache *c, int32_t a, int32_t b) {
    const int32_t *x = c->last + (int64_t)a * ATTN_CACHE_K;
    const int32_t *y = c->last + (int64_t)b * ATTN_CACHE_K;
    const attn_cache_policy p = c->params.policy;
    const int32_t k = c->params.k - 1;
    if (p == ATTN_CACHE_LRU_K && x[k] != y[k]) return x[k] > y[k];
    if (p != ATTN_CACHE_LFU && p != ATTN_CACHE_DECAYED_LFU && x[0] != y[0]) return x[0] > y[0];
    if (p != ATTN_CACHE_LRU && p != ATTN_CACHE_LRU_K) {
        if (c->count[a] > c->count[b]) return 1;
        if (c->count[a] < c->count[b]) return 0;
    }
    if ((c->slot[a] >= 0) != (c->slot[b] >= 0)) return c->slot[a] >= 0;
    return a < b;
}

// order[0 .. n) as a heap with the least deserving page on top, from place i down.
static void attni_cache_sift(attn_cache *c, int32_t i, int32_t n) {
    int32_t *h = c->order;
    for (;;) {
        int32_t child = 2 * i + 1, x = h[i];
        if (child >= n) return;
        if (child + 1 < n && attni_cache_before(c, h[child], h[child + 1])) child++;
        if (!attni_cache_before(c, x, h[child])) return;
        h[i] = h[child];
        h[child] = x;
        i = child;
    }
}

// Takes a step's reads into the history of a page; 1 when it is one to choose from.
static int attni_cache_note(attn_cache *c, int32_t page) {
    int32_t *last = c->last + (int64_t)page * ATTN_CACHE_K, i;
    const uint32_t n = c->reads[page];
    const int now = n || c->wanted[page];
    if (c->slot[page] >= 0) c->hits += n;
    else c->misses += n;
    if (c->params.policy == ATTN_CACHE_DECAYED_LFU) c->count[page] *= (double)c->params.decay;
    c->count[page] += n;
    for (i = ATTN_CACHE_K - 1; now && i > 0; i--) last[i] = last[i - 1];
    if (now) last[0] = c->tick;
    c->reads[page] = 0;
    c->wanted[page] = 0;
    return now || c->slot[page] >= 0;
}

static void attni_cache_leave(attn_cache *c, int32_t page) {
    c->page[c->slot[page]] = -1;
    c->slot[page] = -1;
}

ATTN_DEF attn_result attn_cache_update(attn_cache *c, attn_cache_load *loads, int32_t *n_loads) {
    int32_t n = 0, i, page, slot = 0, to, worst, *order;
    if (!c || !loads || !n_loads) return ATTN_ERR_ARGUMENT;
    order = c->order;
    c->tick++;
    *n_loads = 0;
    for (page = 0; page < c->params.n_pages; page++)
        if (attni_cache_note(c, page)) order[n++] = page;
    for (i = n / 2 - 1; i >= 0; i--) attni_cache_sift(c, i, n);
    for (i = n - 1; i > 0; i--) { // the most deserving comes first
        page = order[0];
        order[0] = order[i];
        order[i] = page;
        attni_cache_sift(c, 0, i);
    }
    worst = n - 1;
    for (i = 0; i < n && i < c->params.n_slots && *n_loads < c->params.max_loads; i++) {
        page = order[i];
        if (c->slot[page] >= 0) continue;
        while (slot < c->params.n_slots && c->page[slot] >= 0) slot++;
        if (slot == c->params.n_slots) { // of the pages behind the first n_slots one has a copy
            while (c->slot[order[worst]] < 0) worst--;
            to = c->slot[order[worst]];
            attni_cache_leave(c, order[worst--]);
            c->evictions++;
        } else to = slot;
        c->page[to] = page;
        c->slot[page] = to;
        loads[*n_loads].page = page;
        loads[(*n_loads)++].slot = to;
        c->loads++;
    }
    return ATTN_OK;
}

ATTN_DEF void attn_cache_drop(attn_cache *c, int32_t page) {
    if (page < 0 || page >= c->params.n_pages) return;
    if (c->slot[page] >= 0) attni_cache_leave(c, page);
    c->reads[page] = 0;
    c->wanted[page] = 0;
    c->count[page] = 0;
    memset(c->last + (int64_t)page * ATTN_CACHE_K, 0, ATTN_CACHE_K * sizeof *c->last);
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
    uint64_t limit = (uint64_t)SIZE_MAX & (uint64_t)INT64_MAX; // both are 2^n - 1: the lesser
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
    int64_t hits, misses, copied;
    attn_result r;
    if (!t || !write || !mem || !seq || token_bytes == 0) return ATTN_ERR_ARGUMENT;
    r = attni_blob_verify(p, bytes, token_bytes, &n);
    if (r != ATTN_OK) return r;
    if ((int64_t)n > (int64_t)t->n_pages * t->page_tokens) return ATTN_ERR_FULL;
    hits = t->count.tokens_hit;
    misses = t->count.tokens_missed;
    copied = t->count.pages_copied;
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
    t->count.pages_copied = copied;
    return r;
}

// ==== >>impl-check  Checked builds ===============================================================

#ifdef ATTN_CHECK

// Sets the bytes of a page's rows and scales to 0xff, or only looks whether they are: 1. Never what
// lies between the rows, which may be another array's.
static int attni_check_bytes(uint8_t *p, int64_t n, int set) {
    int64_t i;
    if (set) memset(p, 0xff, (size_t)n);
    for (i = 0; !set && i < n; i++)
        if (p[i] != 0xff) return 0;
    return 1;
}

static int attni_check_poisoned(const attn_desc *d, int32_t page, int set) {
    attni_side s;
    int32_t h, t, u, is_v, ok = 1;
    for (is_v = 0; is_v < 2; is_v++) {
        int64_t row, step;
        if (attni_side_init(d, is_v, &s) != ATTN_OK) return 0;
        row = (int64_t)s.dim * attni_bits_of(s.dtype) / 8;
        step = s.k16 ? 4 : row;
        for (h = 0; h < d->n_kv_heads; h++)
            for (t = 0; t < s.page_tokens && ok; t++) {
                uint8_t *p = s.data + page * s.page_bytes;
                for (u = 0; u < row / step; u++)
                    ok &= attni_check_bytes(p + attni_token_offset(&s, t, h) + 64 * u, step, set);
                p += s.scale_offset + t * s.scale_token + h * s.scale_head;
                if (s.scale_offset >= 0) ok &= attni_check_bytes(p, 4, set);
            }
    }
    return ok;
}

ATTN_DEF void attn_check_poison(const attn_desc *d, int32_t page) {
    int32_t i, first = page < 0 ? 0 : page;
    if (!d || page >= d->kv.n_pages || !d->kv.k.data || !d->kv.v.data) return;
    if (attn_kv_page_bytes(d, 0) == 0 || attn_kv_page_bytes(d, 1) == 0) return;
    for (i = first; i < (page < 0 ? d->kv.n_pages : page + 1); i++)
        (void)attni_check_poisoned(d, i, 1);
}

ATTN_DEF attn_result attn_check_tables(const attn_desc *d, uint32_t turn) {
    attn_result r = attn_validate(d);
    const attn_pool *pool;
    int32_t s, j, pt, page;
    if (r != ATTN_OK || !d->kv.pool) return r;
    pool = d->kv.pool;
    pt = d->kv.page_tokens;
    if (pool->n_pages > d->kv.n_pages) return ATTN_ERR_CHECK;
    for (s = 0; s < d->n_seq; s++)
        for (j = 0; j < d->kv.kv_len[s]; j += attni_min32(pt, INT32_MAX - j)) {
            page = attni_page_of(d, s, j);
            if (page >= pool->n_pages || pool->ref[page] == 0) return ATTN_ERR_CHECK;
        }
    if (!pool->freed || pool->n_free == 0) return ATTN_OK;
    page = pool->free[turn % (uint32_t)pool->n_free];
    return attni_check_poisoned(d, page, 0) ? ATTN_OK : ATTN_ERR_CHECK;
}

static int attni_finite64(double x) { // on the bits, as attni_finite
    uint64_t u;
    memcpy(&u, &x, 8);
    return (u >> 52 & 2047) != 2047;
}

// What is known of a row while it is recomputed. Weights are relative to the largest score m.
typedef struct attni_checked {
    const attn_desc *d;
    attni_side k, v;
    int32_t s, t, h, kv_head, n_seen;
    double m, sum, slack; // slack: the most by which the weights' sum may be off
    double q[ATTN_MAX_HEAD_DIM], row[ATTN_MAX_HEAD_DIM];
    double o[ATTN_MAX_HEAD_DIM];   // weighted sum of V
    double abs[ATTN_MAX_HEAD_DIM]; // ... of |V|
    double off[ATTN_MAX_HEAD_DIM]; // the most by which it may be off through the weights
} attni_checked;

// Score of the visible key j, and how far a backend's f32 arithmetic may take it from there: every
// operation rounds by 2^-24 of its result, so the chain of a dot product by at most head_dim times
// the sum of its terms' magnitudes.
static double attni_check_score(attni_checked *c, int32_t j, double *off) {
    const attn_desc *d = c->d;
    const attn_logits *g = &d->logits;
    double x, plain, dot = 0, k1 = 0, q_top = 0, a, rest, scale = (double)attni_scale(d);
    int32_t e;
    attni_ref_row(d, &c->k, c->s, c->kv_head, j, c->row);
    x = attni_ref_score(d, c->q, c->row, c->s, c->t, c->h, j);
    for (e = 0, plain = 0; e < d->head_dim; e++) {
        a = c->q[e] * c->row[e];
        plain += a;
        dot += a < 0 ? -a : a;
        k1 += c->row[e] < 0 ? -c->row[e] : c->row[e];
        a = c->q[e] < 0 ? -c->q[e] : c->q[e];
        if (a > q_top) q_top = a;
    }
    if (scale < 0) scale = -scale;
    plain *= (double)attni_scale(d);
    if (g->softcap > 0) plain = (double)g->softcap * attni_tanh64(plain / (double)g->softcap);
    rest = x - plain; // ALiBi and bias
    a = (d->head_dim + 8) * scale * dot + 8 * (double)g->softcap;
    a += 16 * ((rest < 0 ? -rest : rest) + (x < 0 ? -x : x) + (c->m < 0 ? -c->m : c->m)) + 32;
    *off = a / 16777216;
    if (d->numerics == ATTN_NUMERICS_APPROX && d->kv.k.dtype == ATTN_I8)
        *off += scale * q_top * k1 / 250;
    // 16-bit O allows kernels that round Q to it
    if (d->o.dtype != ATTN_F32 && d->q.dtype != d->o.dtype) *off += scale * dot / 256;
    if (dot > 1e38) *off = 1e300; // f32 may overflow on the way
    return x;
}

static double attni_check_exp(double x) { // attni_exp64 is for x <= 0
    return x > 0 ? 1 / attni_exp64(x < 700 ? -x : -700) : attni_exp64(x);
}

// Runs over the visible keys at positions [from, to): the largest score, or everything else.
static void attni_check_keys(attni_checked *c, int64_t from, int64_t to, int only_max) {
    const attn_desc *d = c->d;
    int64_t pos0 = attni_kv_pos0(d, c->s);
    int32_t vd = attni_v_dim(d), j, e;
    double x, w, off, a;
    for (j = 0; j < d->kv.kv_len[c->s]; j++) {
        if (pos0 + j < from || pos0 + j >= to || !attn_ref_visible(d, c->s, c->t, c->h, j))
            continue;
        x = attni_check_score(c, j, &off);
        if (x < -1e300) continue; // a bias of -inf masks
        if (only_max) {
            c->n_seen++;
            if (c->n_seen == 1 || x > c->m || !attni_finite64(x)) c->m = x;
            if (!attni_finite64(x)) return;
            continue;
        }
        w = attni_check_exp(x - c->m);
        off = off < 1e-4 ? w * off * 1.0001 : attni_check_exp(x - c->m + off) - w;
        if (w < 8e-31) off += 8e-31; // weights below 2^-100 may be dropped
        c->sum += w;
        c->slack += off;
        attni_ref_row(d, &c->v, c->s, c->kv_head, j, c->row);
        for (e = 0; e < vd; e++) {
            a = c->row[e] < 0 ? -c->row[e] : c->row[e];
            c->o[e] += w * c->row[e];
            c->abs[e] += w * a;
            c->off[e] += a > 1e36 ? 1e300 : off * a; // as above
        }
    }
}

// May NaN have come from a value that other rows of the sequence see?
static int attni_check_spoilt(attni_checked *c) {
    int32_t j, e, vd = attni_v_dim(c->d);
    for (j = 0; j < c->d->kv.kv_len[c->s]; j++) {
        attni_ref_row(c->d, &c->v, c->s, c->kv_head, j, c->row);
        for (e = 0; e < vd; e++)
            if (!attni_finite64(c->row[e])) return 1;
    }
    return 0;
}

ATTN_DEF attn_result attn_check_row(const attn_desc *d, int32_t t, int32_t h, int64_t from,
                                    int64_t to, const float *o, const float *lse) {
    attni_checked c;
    int32_t e, vd;
    int64_t st, sh;
    double adds, ulp, tiny, x, bound, got;
    if (!d || !o) return ATTN_ERR_ARGUMENT;
    memset(&c, 0, sizeof c);
    c.d = d;
    c.t = t;
    c.h = h;
    while (t >= d->q_start[c.s + 1]) c.s++;
    c.kv_head = h / (d->n_heads / d->n_kv_heads);
    vd = attni_v_dim(d);
    attni_side_init(d, 0, &c.k);
    attni_side_init(d, 1, &c.v);
    st = d->q.stride_token ? d->q.stride_token : (int64_t)d->n_heads * d->head_dim;
    sh = d->q.stride_head ? d->q.stride_head : d->head_dim;
    for (e = 0; e < d->head_dim; e++)
        c.q[e] = (double)attni_get(d->q.data, d->q.dtype, t * st + h * sh + e);
    attni_check_keys(&c, from, to, 1);
    x = to == INT64_MAX && d->logits.sink ? (double)d->logits.sink[h] : -1e300;
    if (x > -3.0e38 && (c.n_seen == 0 || x > c.m)) c.m = x;
    if (!attni_finite64(c.m)) return ATTN_OK;
    if (c.n_seen > 0) attni_check_keys(&c, from, to, 0);
    if (x > -3.0e38) c.sum += attni_check_exp(x - c.m);
    if (c.sum == 0) { // nothing seen: zeros, and a log-sum-exp of -inf
        for (e = 0; e < vd; e++)
            if (attni_bits32(o[e]) & 0x7fffffffu) return ATTN_ERR_CHECK;
        return lse && attni_bits32(*lse) != 0xff800000u ? ATTN_ERR_CHECK : ATTN_OK;
    }
    c.slack /= c.sum;
    if (!(c.slack < 0.25)) return ATTN_OK;
    // The sum over the tokens: a chain per span, then a fold; bf16 weights where O allows them.
    adds = (attni_min32(c.n_seen, ATTN_SPAN) + 16.0 * (c.n_seen / ATTN_SPAN) + 64) / 16777216;
    if (d->o.dtype != ATTN_F32 && d->numerics != ATTN_NUMERICS_PORTABLE) adds += 1.0 / 256;
    ulp = d->o.dtype == ATTN_F32 ? 4.0 / 16777216 : d->o.dtype == ATTN_F16 ? 1.0 / 1024 : 1.0 / 128;
    tiny = d->o.dtype == ATTN_F16 ? 1.0 / 8388608 : 1e-36;
    for (e = 0; e < vd; e++) {
        x = c.o[e] / c.sum;
        bound = (c.off[e] / c.sum + (x < 0 ? -x : x) * c.slack) / (1 - c.slack);
        bound += adds * c.abs[e] / c.sum + ulp * (x < 0 ? -x : x) + tiny;
        if (!attni_finite64(x) || !attni_finite64(bound)) continue;
        if ((x < 0 ? -x : x) + bound > (d->o.dtype == ATTN_F16 ? 65000.0 : 3.3e38)) continue;
        got = (double)o[e] - x;
        if (got <= bound && got >= -bound) continue;
        return !attni_finite(o[e]) && attni_check_spoilt(&c) ? ATTN_OK : ATTN_ERR_CHECK;
    }
    if (!lse) return ATTN_OK;
    x = c.m + attni_ln(c.sum);
    bound = c.slack / (1 - c.slack) + adds + 8.0 / 16777216 * ((x < 0 ? -x : x) + 4);
    got = (double)*lse - x;
    return got <= bound && got >= -bound ? ATTN_OK : ATTN_ERR_CHECK;
}

#endif // ATTN_CHECK

#undef ATTNI_ALIGN
#undef ATTNI_FAULT
#undef ATTNI_HASH
#undef ATTNI_BLOB_HEADER
#undef ATTNI_BLOB_VERSION
#undef ATTNI_BLOB_SUM

#endif // ATTNI_CORE_IMPLEMENTED
#endif // ATTN_IMPLEMENTATION || ATTN_CORE_IMPLEMENTATION

/* MIT License

      Copyright (c) 2026 the attn authors

      Permission is hereby granted, free of charge, to any person obtaining a copy
   of this software and associated documentation files (the "Software"), to deal
   in the Software without restriction, including without limitation the rights
   to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
   copies of the Software, and to permit persons to whom the Software is
   furnished to do so, subject to the following conditions:

      The above copyright notice and this permission notice shall be included in all
   copies or substantial portions of the Software.

      THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
   SOFTWARE.

   0.1  core, prefix tree, CPU executors */

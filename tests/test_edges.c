/* test_edges.c - the conditions of attn.h that ordinary use leaves on one side: every error code
   of every call beside a neighbour that succeeds, capacities one too small, sizes that overflow,
   shared prefixes inside shared prefixes, NaN and -inf in the reference, a damaged tree.
   tests/coverage.sh says what is still missing. Private functions are called only where no public
   call reaches. cc -std=c11 -O2 -I. -Itests tests/test_edges.c -o test_edges -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"

// ---- names and numbers

static void names(void) {
    static const struct {
        int value;
        const char *text;
    } all[] = {
#define X(name, value, text) {value, text},
        ATTN_RESULTS(X)
#undef X
    };
    size_t i, j, n = sizeof all / sizeof all[0];
    for (i = 0; i < n; i++) {
        CHECK_EQ(all[i].value, -(int)i);
        CHECK(strcmp(attn_result_string((attn_result)all[i].value), all[i].text) == 0);
        for (j = 0; j < i; j++) CHECK(strcmp(all[i].text, all[j].text) != 0);
    }
    CHECK(strcmp(attn_result_string((attn_result)1), "unknown result code") == 0);
    CHECK(strcmp(attn_result_string((attn_result)-(int)n), "unknown result code") == 0);
#define X(name, value, bits, scaled)                                                               \
    CHECK(attn_dtype_bits(ATTN_##name) == bits && attn_dtype_scaled(ATTN_##name) == scaled);
    ATTN_DTYPES(X)
#undef X
}

static void numbers(void) {
    static const uint8_t bytes[6] = {1, 2, 3, 4, 5, 6};
    uint8_t out[6], kept[4] = {9, 9, 9, 9};
    int n;
    // an invalid dtype reads as 0 and stores nothing
    CHECK(attni_get(bytes, ATTN_DTYPE_NONE, 1) == 0 && attni_get(bytes, ATTN_DTYPE_COUNT, 1) == 0);
    attni_put(kept, ATTN_DTYPE_NONE, 0, 3.0f);
    attni_put(kept, ATTN_DTYPE_COUNT, 0, 3.0f);
    CHECK(kept[0] == 9 && kept[1] == 9 && kept[2] == 9 && kept[3] == 9);
    // what a big-endian host does to rows
    attni_copy_swapped(out, bytes, 3, 2);
    CHECK(memcmp(out, "\2\1\4\3\6\5", 6) == 0);
    attni_copy_swapped(out, bytes, 1, 4);
    CHECK(memcmp(out, "\4\3\2\1", 4) == 0);
    attni_copy_swapped(out, bytes, 6, 1);
    CHECK(memcmp(out, bytes, 6) == 0);
    for (n = 1; n <= 1000000; n = n * 3 + 1)
        CHECK(fabs(attni_sqrt(n) - sqrt(n)) <= 1e-15 * sqrt(n));
    for (n = 0; n > -760; n--) {
        double want = exp(n + 0.25 * (n & 3) - 0.75), got = attni_exp64(n + 0.25 * (n & 3) - 0.75);
        // the last step to where doubles end costs some digits of numbers that no sum can notice
        CHECK(fabs(got - want) <= (n > -690 ? 4e-15 : 1e-13) * want + 1e-322);
    }
    CHECK(attni_exp64(0) == 1 && attni_exp64(-746) == 0 && attni_exp64(-HUGE_VAL) == 0);
    CHECK(attni_exp64((double)NAN) != attni_exp64((double)NAN));
    { // a NaN of either sign is neither less than anything nor more
        static const uint32_t nan[] = {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xffffffffu};
        static const float some[] = {-HUGE_VALF, -1, -0.0f, 0, 1, HUGE_VALF};
        for (n = 0; n < 24; n++) {
            float a = attni_float(nan[n % 4]), b = some[n / 4];
            uint64_t wide = (uint64_t)(nan[n % 4] & 0x80000000u) << 32 | (uint64_t)0x7ff80001 << 32;
            double c;
            memcpy(&c, &wide, 8);
            CHECK(!attni_less(a, b) && !attni_less(b, a) && !attni_less(a, a));
            CHECK(!attni_less64(c, (double)b) && !attni_less64((double)b, c));
        }
        for (n = 0; n < 36; n++) {
            CHECK_EQ(attni_less(some[n / 6], some[n % 6]), some[n / 6] < some[n % 6]);
            CHECK_EQ(attni_less64((double)some[n / 6], (double)some[n % 6]),
                     some[n / 6] < some[n % 6]);
        }
    }
    // as many as fit, at least one, whatever was rounded: three of 1 + e cost more than 3 + 2 e,
    // yet (3 + 2 e) / (1 + e) is 3
    CHECK_EQ(attni_fitting(10, 3, 5), 3);
    CHECK_EQ(attni_fitting(10, 3, 2), 2);
    CHECK_EQ(attni_fitting(2, 3, 5), 1);
    CHECK_EQ(attni_fitting(0, 3, 5), 5);
    CHECK_EQ(attni_fitting(3 + ldexpf(1, -22), 1 + ldexpf(1, -23), 3), 3);
}

// ---- a world: sequences over pages of random K and V, 4 query heads over 2 KV heads of 8

enum { SEQS = 48, ROW = 32, PAGES = 64, PAGE = 256, HEADS = 4, KV_HEADS = 2, DIM = 8 };
enum { QUERIES = 1024, WORK = 32 << 20 };

typedef struct world {
    attn_desc d;
    int32_t q_start[SEQS + 1], q_pos0[SEQS], kv_len[SEQS], kv_pos0[SEQS], order[SEQS];
    int32_t table[SEQS][ROW], parent[QUERIES], seq_row[SEQS];
    int64_t start[HEADS * 65], col_start[HEADS + 1], diag_start[HEADS + 1];
    int32_t block[1024], col[8], diag[8];
    uint64_t bits[1024];
    float sink[HEADS], alibi[HEADS], scales[KV_HEADS];
} world;

static float data_q[QUERIES * HEADS * DIM], data_o[QUERIES * HEADS * DIM];
static float data_k[PAGES * PAGE * KV_HEADS * DIM], data_v[PAGES * PAGE * KV_HEADS * DIM];
static float data_lse[QUERIES * HEADS], first_o[QUERIES * HEADS * DIM];
static double ref_o[QUERIES * HEADS * DIM], ref_lse[QUERIES * HEADS];
static unsigned char *work; // WORK bytes, aligned

static void data_make(void) {
    test_rng r = {7};
    work = (unsigned char *)aligned_alloc(64, WORK);
    if (!work) exit(1);
    test_fill_normal(&r, data_q, sizeof data_q / 4, 1);
    test_fill_normal(&r, data_k, sizeof data_k / 4, 1);
    test_fill_normal(&r, data_v, sizeof data_v / 4, 1);
}

// n sequences of q_len queries each that hold n_tokens tokens, in pages of their own as far as
// there are any.
static void world_make(world *w, int32_t n, int32_t q_len, int32_t n_tokens, int32_t page_tokens) {
    attn_desc *d = &w->d;
    int32_t s, j, per = (n_tokens + page_tokens - 1) / page_tokens;
    memset(w, 0, sizeof *w);
    d->n_seq = n;
    d->n_heads = HEADS;
    d->n_kv_heads = KV_HEADS;
    d->head_dim = DIM;
    d->q_start = w->q_start;
    d->kv.kv_len = w->kv_len;
    d->q.data = data_q;
    d->o.data = data_o;
    d->lse = data_lse;
    d->kv.k.data = data_k;
    d->kv.v.data = data_v;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_F32;
    d->kv.page_tokens = page_tokens;
    d->kv.n_pages = PAGES;
    d->kv.page_table = &w->table[0][0];
    d->kv.page_table_stride = ROW;
    for (s = 0; s < n; s++) {
        w->q_start[s + 1] = w->q_start[s] + q_len;
        w->kv_len[s] = n_tokens;
        w->kv_pos0[s] = 0;
        w->q_pos0[s] = n_tokens - q_len;
        w->order[s] = n - 1 - s;
        for (j = 0; j < ROW; j++) w->table[s][j] = (s * per + j) % PAGES;
    }
}

// Validation says want; `want` other than ATTN_OK on a world that is otherwise fine.
#define VALID(want, change)                                                                        \
    do {                                                                                           \
        world w;                                                                                   \
        world_make(&w, 2, 3, 100, 16);                                                             \
        { change; }                                                                                \
        CHECK_EQ(attn_validate(&w.d), want);                                                       \
    } while (0)

// Runs the problem under these parameters into data_o and data_lse; the plan, or NULL.
static const attn_plan *world_run(const attn_desc *d, const attn_plan_params *params) {
    attn_plan *p = NULL;
    size_t at;
    if (!CHECK_EQ(attn_plan_build(d, params, work, WORK / 2, &p), ATTN_OK)) return NULL;
    CHECK(attn_plan_partial_bytes(p) <= params->partial_bytes);
    memset(data_o, 0xff, sizeof data_o);
    at = WORK / 2 + ((attn_plan_partial_bytes(p) + 63) & ~(size_t)63);
    if (!CHECK(at + attn_cpu_scratch_bytes(d, p) <= WORK)) return NULL;
    CHECK_EQ(attn_cpu_run(d, p, 0, p->n_tasks, work + WORK / 2, work + at), ATTN_OK);
    CHECK_EQ(attn_cpu_merge(d, p, 0, p->n_merges, work + WORK / 2), ATTN_OK);
    return p;
}

static void world_params(attn_plan_params *p) { // one worker, no sharing, no cuts
    memset(p, 0, sizeof *p);
}

// The executor against the reference; keeps what it found for world_same.
static void world_check(const world *w, int line) {
    attn_plan_params params;
    size_t n = (size_t)w->q_start[w->d.n_seq] * HEADS, i;
    int ok = 1;
    world_params(&params);
    if (!world_run(&w->d, &params)) return;
    CHECK_EQ(attn_ref_forward(&w->d, ref_o, ref_lse), ATTN_OK);
    for (i = 0; i < n * DIM; i++) ok &= fabs((double)data_o[i] - ref_o[i]) <= 2e-5;
    for (i = 0; i < n; i++)
        ok &= (double)data_lse[i] == ref_lse[i] || fabs((double)data_lse[i] - ref_lse[i]) <= 2e-5;
    test_check(ok, __FILE__, line, "executor and reference agree");
    memcpy(first_o, data_o, n * DIM * 4);
}
#define AGREE(w) world_check(w, __LINE__)

// Another plan of the problem last checked gives the same bits.
static const attn_plan *world_same(const world *w, const attn_plan_params *params, int line) {
    const attn_plan *p = world_run(&w->d, params);
    size_t n = (size_t)w->q_start[w->d.n_seq] * HEADS * DIM;
    test_check(p && memcmp(first_o, data_o, n * 4) == 0, __FILE__, line, "same bits");
    return p;
}
#define SAME(w, params) world_same(w, params, __LINE__)

// ---- descriptors

static void shapes(void) {
    const int64_t huge = (int64_t)1 << 57;
    VALID(ATTN_OK, (void)0);
    VALID(ATTN_OK, w.d.n_heads = 65536; w.q_start[1] = w.q_start[2] = 0);
    VALID(ATTN_ERR_SHAPE, w.d.n_heads = 65538; w.q_start[1] = w.q_start[2] = 0);
    VALID(ATTN_OK, w.d.v_head_dim = 8);
    VALID(ATTN_ERR_SHAPE, w.d.v_head_dim = 12);
    VALID(ATTN_ERR_SHAPE, w.d.v_head_dim = 584);
    VALID(ATTN_OK, w.q_start[1] = w.q_start[2] = 0; w.d.q.data = w.d.o.data = NULL); // no queries
    VALID(ATTN_ERR_ARGUMENT, w.d.q.data = NULL);
    VALID(ATTN_ERR_ARGUMENT, w.d.o.data = NULL);
    VALID(ATTN_ERR_ARGUMENT, w.d.numerics = (attn_numerics)-1);
    VALID(ATTN_ERR_ARGUMENT, w.d.logits.scale = attni_float(0x7f800000u));
    VALID(ATTN_ERR_ARGUMENT, w.d.logits.softcap = attni_float(0x7fc00000u));
    VALID(ATTN_ERR_ARGUMENT, w.d.logits.softcap = -1);
    VALID(ATTN_ERR_LAYOUT, w.d.logits.bias.data = data_q; w.d.logits.bias.dtype = ATTN_F32;
          w.d.logits.bias.stride_head = -1);
    VALID(ATTN_ERR_LAYOUT, w.d.logits.bias.data = data_q; w.d.logits.bias.dtype = ATTN_F32;
          w.d.logits.bias.stride_token = -1);
    VALID(ATTN_ERR_OVERFLOW, w.d.logits.bias.data = data_q; w.d.logits.bias.dtype = ATTN_F32;
          w.d.logits.bias.stride_head = huge);
    VALID(ATTN_ERR_OVERFLOW, w.d.logits.bias.data = data_q; w.d.logits.bias.dtype = ATTN_F32;
          w.d.logits.bias.stride_token = huge);
    VALID(ATTN_OK, w.d.logits.bias.data = data_q; w.d.logits.bias.dtype = ATTN_F32);
    // O: one head, one token, none; overlapping in one order of the strides, in both
    VALID(ATTN_OK, w.d.n_heads = w.d.n_kv_heads = 1; w.d.o.stride_token = 8; w.d.o.stride_head = 1);
    VALID(ATTN_OK, w.q_start[1] = 1; w.q_start[2] = 1; w.d.o.stride_token = 1);
    VALID(ATTN_OK, w.q_start[1] = w.q_start[2] = 0; w.d.o.stride_token = 1);
    VALID(ATTN_OK, w.d.o.stride_token = 8; w.d.o.stride_head = 8 * 6);
    VALID(ATTN_ERR_LAYOUT, w.d.o.stride_token = 8; w.d.o.stride_head = 8 * 6 - 1);
    VALID(ATTN_ERR_LAYOUT, w.d.o.stride_token = 31; w.d.o.stride_head = 8);
    VALID(ATTN_ERR_LAYOUT, w.d.o.stride_token = 32; w.d.o.stride_head = 7);
    VALID(ATTN_ERR_LAYOUT, w.d.o.stride_token = 7; w.d.o.stride_head = 64);
    VALID(ATTN_OK, w.d.q.stride_token = 1; w.d.q.stride_head = 1); // Q is only read
    VALID(ATTN_ERR_LAYOUT, w.d.q.stride_token = huge * 2);
    VALID(ATTN_ERR_LAYOUT, w.d.q.stride_head = huge * 2);
    // rows of 4-bit numbers begin at whole bytes, those of tokens and those of heads
    VALID(ATTN_OK, w.d.kv.k.dtype = ATTN_I4; w.d.kv.k.stride_token = 20; w.d.kv.k.stride_head = 10);
    VALID(ATTN_ERR_LAYOUT, w.d.kv.k.dtype = ATTN_I4; w.d.kv.k.stride_token = 20;
          w.d.kv.k.stride_head = 9);
    VALID(ATTN_ERR_LAYOUT, w.d.kv.k.dtype = ATTN_I4; w.d.kv.k.stride_token = 21;
          w.d.kv.k.stride_head = 10);
}

static void pages(void) {
    VALID(ATTN_ERR_LAYOUT, w.d.kv.k.stride_head = -1);
    VALID(ATTN_ERR_LAYOUT, w.d.kv.layout = ATTN_K16; w.d.kv.k.stride_head = 8);
    VALID(ATTN_ERR_LAYOUT, w.d.kv.layout = ATTN_K16; w.d.kv.k.stride_token = 8);
    VALID(ATTN_OK, w.d.kv.layout = ATTN_K16);
    VALID(ATTN_OK, w.d.kv.k.dtype = ATTN_I4);
    VALID(ATTN_OK, w.d.kv.page_tokens = 1; w.kv_len[0] = w.kv_len[1] = 20);
    VALID(ATTN_OK, w.d.kv.page_tokens = 1; w.kv_len[0] = w.kv_len[1] = 20;
          w.d.kv.layout = ATTN_HEAD_MAJOR; w.d.kv.k.stride_token = 1); // one token: no next one
    VALID(ATTN_ERR_LAYOUT, w.d.kv.k.dtype = ATTN_I4; w.d.kv.k.stride_token = 17);
    VALID(ATTN_ERR_LAYOUT, w.d.kv.k.dtype = ATTN_I4; w.d.kv.k.stride_head = 9);
    VALID(ATTN_ERR_OVERFLOW, w.d.kv.k.stride_head = (int64_t)1 << 60);
    VALID(ATTN_ERR_OVERFLOW, w.d.kv.k.page_bytes = ((int64_t)1 << 56) + 1); // one page too large
    VALID(ATTN_ERR_OVERFLOW, w.d.kv.k.page_bytes = (int64_t)1 << 56; w.d.kv.n_pages = 64); // all
    VALID(ATTN_OK, w.d.kv.k.page_bytes = (int64_t)1 << 56; w.d.kv.n_pages = 63;
          w.table[1][0] = w.table[0][0]);
    VALID(ATTN_ERR_ARGUMENT, w.d.seq_order = w.order; w.order[1] = -1);
    VALID(ATTN_ERR_ARGUMENT, w.d.seq_order = w.order; w.order[1] = 2);
    VALID(ATTN_OK, w.d.seq_order = w.order);
    // a stride of 0 says that there is one sequence; it does not say how long its row is
    VALID(ATTN_OK, w.d.kv.page_table_stride = 0);
    VALID(ATTN_OK, w.d.n_seq = 1; w.d.kv.page_table_stride = 0);
    VALID(ATTN_ERR_SHAPE, w.d.n_seq = 1; w.d.kv.page_table_stride = 6);
    VALID(ATTN_OK, w.d.n_seq = 1; w.d.kv.page_table_stride = 7);
    VALID(ATTN_ERR_SHAPE, w.d.kv.kv_pos0 = w.kv_pos0; w.kv_pos0[1] = -1);
    VALID(ATTN_ERR_SHAPE, w.d.q_pos0 = w.q_pos0; w.q_pos0[1] = INT32_MAX - 2);
    VALID(ATTN_OK, w.d.q_pos0 = w.q_pos0; w.q_pos0[1] = INT32_MAX - 3);
    VALID(ATTN_ERR_SHAPE, w.kv_len[0] = -1);
    VALID(ATTN_ERR_SHAPE, w.kv_len[0] = 2); // three queries: the first would be at -1
}

static void blocks_make(world *w) { // row blocks of 16, KV blocks of 16, all of the first two
    attn_block_list *b = &w->d.mask.blocks;
    int32_t i;
    b->row_block = b->kv_block = 16;
    b->n_lists = 1;
    b->n_rows = 64;
    b->row_start = w->start;
    b->block = w->block;
    for (i = 0; i < HEADS * 65; i++) w->start[i] = 2 * i;
    for (i = 0; i < 1024; i++) w->block[i] = i % 2;
}

static void vslash_make(world *w) { // columns 0 .. 2, diagonals -1 .. 1, blocks of 16
    attn_vertical_slash *v = &w->d.mask.vslash;
    int32_t i;
    v->block = 16;
    v->n_lists = 1;
    v->col_start = w->col_start;
    v->col = w->col;
    v->diag_start = w->diag_start;
    v->diag = w->diag;
    w->col_start[1] = w->diag_start[1] = 3;
    for (i = 0; i < 3; i++) w->col[i] = i, w->diag[i] = i - 1;
}

static void masks(void) {
    VALID(ATTN_OK, blocks_make(&w));
    VALID(ATTN_OK, blocks_make(&w); w.d.mask.blocks.n_lists = KV_HEADS); // a list per KV head
    VALID(ATTN_OK, blocks_make(&w); w.d.mask.blocks.n_lists = HEADS);
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.d.mask.blocks.n_lists = 3);
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.start[3] = 3); // descends, past the ids that do not
    VALID(ATTN_ERR_MASK, blocks_make(&w); memset(w.start, 0, sizeof w.start); w.start[0] = 1);
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.d.mask.blocks.block = NULL);
    VALID(ATTN_OK, blocks_make(&w); memset(w.start, 0, sizeof w.start);
          w.d.mask.blocks.block = NULL); // nothing listed at all
    VALID(ATTN_OK, blocks_make(&w); w.d.mask.blocks.bits_rows = -1); // without bits never read
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.d.mask.blocks.bits = w.bits;
          w.d.mask.blocks.bits_cols = 4);
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.d.mask.blocks.bits = w.bits;
          w.d.mask.blocks.bits_rows = 4);
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.d.mask.blocks.bits = w.bits;
          w.d.mask.blocks.bits_rows = 3; w.d.mask.blocks.bits_cols = 4);
    VALID(ATTN_ERR_MASK, blocks_make(&w); w.d.mask.blocks.bits = w.bits;
          w.d.mask.blocks.bits_rows = 4; w.d.mask.blocks.bits_cols = 3);
    VALID(ATTN_OK, blocks_make(&w); w.d.mask.blocks.bits = w.bits;
          w.d.mask.blocks.bits_rows = w.d.mask.blocks.bits_cols = 4);
    VALID(ATTN_OK, w.d.mask.stride.block = 16; w.d.mask.stride.local = w.d.mask.stride.stride = 1;
          w.d.mask.stride.n_dense = 1);
    VALID(ATTN_OK, w.d.mask.stride.block = 16; w.d.mask.stride.local = w.d.mask.stride.stride = 1;
          w.d.mask.stride.homogeneous = 1);
    VALID(ATTN_ERR_MASK, w.d.mask.stride.block = 16;
          w.d.mask.stride.local = w.d.mask.stride.stride = 1;
          w.d.mask.stride.homogeneous = w.d.mask.stride.n_dense = 1);
    VALID(ATTN_OK, vslash_make(&w));
    VALID(ATTN_ERR_MASK, vslash_make(&w); w.col[0] = -1);
    VALID(ATTN_ERR_MASK, vslash_make(&w); w.diag[1] = -1);
}

// The shapes of an attention row: nothing seen, NaN, -inf, weights 300 powers of ten apart.
static void rows(void) {
    world w;
    int32_t i, h;
    world_make(&w, 2, 3, 20, 16);
    CHECK(attn_ref_visible(&w.d, 1, 3, 0, 0) && attn_ref_visible(&w.d, 1, 3, 0, 17));
    CHECK(!attn_ref_visible(&w.d, 1, 3, 0, -1) && !attn_ref_visible(&w.d, 1, 3, 0, 20));
    w.d.mask.kind = ATTN_MASK_FULL;
    CHECK(attn_ref_visible(&w.d, 1, 3, 0, 19) && !attn_ref_visible(&w.d, 1, 3, 0, 20));
    CHECK(!attn_ref_visible(&w.d, 1, 3, 0, -1));
    CHECK_EQ(attn_ref_forward(&w.d, NULL, ref_lse), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_ref_forward(&w.d, ref_o, NULL), ATTN_OK); // LSE is optional
    AGREE(&w);
    w.d.q.stride_token = HEADS * DIM + 8; // Q inside a wider array, heads far apart
    w.d.q.stride_head = 12;
    AGREE(&w);
    world_make(&w, 2, 3, 20, 16);
    for (h = 0; h < HEADS; h++) w.sink[h] = h % 2 ? -HUGE_VALF : 0.5f; // of -inf: none
    w.d.logits.sink = w.sink;
    AGREE(&w);
    w.kv_len[1] = 0; // three queries that hold nothing
    w.d.q_pos0 = w.q_pos0;
    AGREE(&w);
    for (i = 3 * HEADS; i < 6 * HEADS; i++) CHECK((double)data_lse[i] == (double)w.sink[i % HEADS]);
    { // a NaN in Q stays in its row
        float was = data_q[0];
        world_make(&w, 2, 3, 20, 16);
        data_q[0] = NAN;
        CHECK_EQ(attn_ref_forward(&w.d, ref_o, ref_lse), ATTN_OK);
        CHECK(ref_o[0] != ref_o[0] && ref_lse[0] != ref_lse[0]);
        CHECK(ref_o[DIM] == ref_o[DIM] && ref_lse[1] == ref_lse[1]);
        data_q[0] = was;
    }
    { // the key with all the weight has value 0, the other, 700 below, value 1
        static const float bias[2] = {0, -700};
        float k[2 * DIM], v[2 * DIM], o[DIM], q[DIM];
        attn_desc d;
        int32_t q_start[2] = {0, 1}, kv_len[1] = {2};
        memset(&d, 0, sizeof d);
        memset(k, 0, sizeof k);
        memset(q, 0, sizeof q);
        for (i = 0; i < DIM; i++) v[i] = 0, v[DIM + i] = 1;
        d.n_seq = d.n_heads = d.n_kv_heads = 1;
        d.head_dim = DIM;
        d.q_start = q_start;
        d.q.data = q, d.o.data = o;
        d.kv.k.data = k, d.kv.v.data = v;
        d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = d.logits.bias.dtype = ATTN_F32;
        d.kv.n_pages = 1;
        d.kv.page_tokens = 2;
        d.kv.kv_len = kv_len;
        d.logits.bias.data = (void *)(uintptr_t)bias;
        CHECK_EQ(attn_ref_forward(&d, ref_o, ref_lse), ATTN_OK);
        for (i = 0; i < DIM; i++) CHECK(fabs(ref_o[i] - exp(-700)) < 1e-13 * exp(-700));
    }
}

// Masks where few rows see what is asked about: trees under windows and lists, far windows.
static void visible_edges(void) {
    world w;
    int32_t i;
    world_make(&w, 2, 6, 530, 32); // the tree's tokens cross nothing; context of two spans
    for (i = 0; i < 12; i++) w.parent[i] = i % 6 < 2 ? -1 : i % 6 - 2;
    w.d.mask.kind = ATTN_MASK_TREE;
    w.d.mask.tree_parent = w.parent;
    AGREE(&w);
    w.d.mask.window_left = 2; // ancestors two steps up are outside
    AGREE(&w);
    w.d.mask.window_left = 0;
    w.d.mask.window_right = 1;
    AGREE(&w);
    w.d.mask.window_right = 0;
    w.d.mask.stride.block = 1; // every other position of what the tree allows
    w.d.mask.stride.local = 1;
    w.d.mask.stride.stride = 2;
    AGREE(&w);
    memset(&w.d.mask.stride, 0, sizeof w.d.mask.stride);
    w.d.mask.keep_recent = 2;
    AGREE(&w);
    w.d.mask.keep_recent = 0;
    vslash_make(&w);
    w.d.mask.vslash.block = 1;
    AGREE(&w);
    world_make(&w, 1, 40, 280, 16); // the tree itself crosses a span's border
    for (i = 0; i < 40; i++) w.parent[i] = i < 2 ? -1 : i - 2;
    w.d.mask.kind = ATTN_MASK_TREE;
    w.d.mask.tree_parent = w.parent;
    AGREE(&w);
    w.d.mask.window_left = 7;
    AGREE(&w);
    world_make(&w, 2, 4, 300, 16); // queries far behind what is held: nothing in the window
    w.d.q_pos0 = w.q_pos0;
    w.q_pos0[1] = 5000;
    w.d.mask.window_left = 100;
    AGREE(&w);
    w.d.mask.keep_sink = 3; // sparse terms with nothing left to apply them to
    AGREE(&w);
    w.d.mask.window_left = 0;
    w.d.mask.keep_sink = 0;
    w.d.mask.keep_recent = 9; // the only sparse term
    AGREE(&w);
    world_make(&w, 2, 30, 300, 16);
    w.d.mask.kind = ATTN_MASK_FULL;
    w.d.mask.window_right = 3;
    AGREE(&w);
    w.d.mask.n_sink = 290;
    AGREE(&w);
    w.d.mask.window_left = 5;
    AGREE(&w);
    blocks_make(&w);
    w.d.mask.blocks.n_lists = KV_HEADS; // lists per KV head that differ
    for (i = 130; i < 260; i++) w.block[i] += 3;
    AGREE(&w);
    vslash_make(&w);
    AGREE(&w);
}

// Lists that go on behind the span at hand, lists per query head, rows that see nothing of a span.
static void list_edges(void) {
    world w;
    int32_t i;
    world_make(&w, 1, 300, 600, 32);
    blocks_make(&w);
    for (i = 0; i < 1024; i++) {
        w.block[i] = i % 2 ? 37 - (i / 2) % 19 : (i / 2) % 11; // up to the last of 37 KV blocks
        w.bits[i] = i % 3 ? 0x1234567u * (uint32_t)i : 0;
    }
    AGREE(&w);
    w.d.mask.blocks.bits = w.bits;
    w.d.mask.blocks.bits_rows = 4;
    w.d.mask.blocks.bits_cols = 8;
    AGREE(&w);
    w.d.mask.blocks.n_lists = HEADS;
    AGREE(&w);
    w.d.mask.blocks.n_lists = 1;
    vslash_make(&w);
    w.col[2] = 30; // in the third span
    w.d.mask.vslash.n_lists = HEADS;
    for (i = 0; i < HEADS; i++) w.col_start[i + 1] = w.diag_start[i + 1] = 3;
    AGREE(&w);
    memset(&w.d.mask.blocks, 0, sizeof w.d.mask.blocks);
    AGREE(&w);
    w.d.mask.vslash.n_lists = 1;
    AGREE(&w);
    w.d.mask.window_left = 9; // most rows of a tile see nothing of its first span
    AGREE(&w);
    memset(&w.d.mask.vslash, 0, sizeof w.d.mask.vslash);
    w.d.mask.keep_recent = 5;
    AGREE(&w);
    world_make(&w, 1, 40, 300, 16);
    w.d.mask.kind = ATTN_MASK_FULL;
    w.d.mask.stride.block = 16;
    w.d.mask.stride.local = 2;
    w.d.mask.stride.stride = 3;
    AGREE(&w); // the causal form drops what is to the right of a bidirectional row
    w.d.mask.stride.bidirectional = 1;
    AGREE(&w);
}

static void token_rows(void) {
    world w;
    int64_t slot[QUERIES];
    static float rows[4 * KV_HEADS * DIM + 64];
    world_make(&w, 2, 3, 100, 16);
    CHECK_EQ(attn_kv_slots(&w.d, slot), ATTN_OK);
    CHECK_EQ(slot[0], w.table[0][6] * 16 + 1);
    w.d.q_pos0 = w.q_pos0;
    w.d.kv.kv_pos0 = w.kv_pos0;
    w.kv_pos0[1] = 98; // queries 97 .. 99: the first was evicted
    CHECK_EQ(attn_validate(&w.d), ATTN_OK);
    CHECK_EQ(attn_kv_slots(&w.d, slot), ATTN_ERR_PAGE);
    w.kv_pos0[1] = 0;
    w.q_pos0[1] = 98; // 98 .. 100: the last is not held
    CHECK_EQ(attn_kv_slots(&w.d, slot), ATTN_ERR_PAGE);
    world_make(&w, 2, 3, 100, 16);
    CHECK_EQ(attn_kv_page_bytes(&w.d, 0), 16 * KV_HEADS * DIM * 4);
    w.d.kv.n_pages = 0; // not needed for the size of one
    CHECK_EQ(attn_kv_page_bytes(&w.d, 1), 16 * KV_HEADS * DIM * 4);
    w.d.kv.n_pages = PAGES;
#define NO_PAGE(change, undo)                                                                      \
    do {                                                                                           \
        change;                                                                                    \
        CHECK(attn_kv_page_bytes(&w.d, 0) == 0 && attn_kv_rows_bytes(&w.d, 0, 1) == 0);            \
        CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 0, 1, rows), ATTN_ERR_ARGUMENT);                    \
        undo;                                                                                      \
    } while (0)
    NO_PAGE(w.d.head_dim = 4, w.d.head_dim = DIM);
    NO_PAGE(w.d.head_dim = 584, w.d.head_dim = DIM);
    NO_PAGE(w.d.head_dim = 12, w.d.head_dim = DIM);
    NO_PAGE(w.d.n_kv_heads = 0, w.d.n_kv_heads = KV_HEADS);
    NO_PAGE(w.d.kv.page_tokens = 0, w.d.kv.page_tokens = 16);
    NO_PAGE(w.d.kv.k.dtype = ATTN_DTYPE_NONE, w.d.kv.k.dtype = ATTN_F32);
    w.d.kv.k.page_bytes = 100; // less than a page holds
    CHECK_EQ(attn_kv_rows_bytes(&w.d, 0, 1), 0);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 0, 1, rows), ATTN_ERR_LAYOUT);
    w.d.kv.k.page_bytes = 0;
    CHECK_EQ(attn_kv_rows_bytes(&w.d, 0, 1), KV_HEADS * DIM * 4);
    CHECK_EQ(attn_kv_rows_bytes(&w.d, 0, 0), 0);
    CHECK_EQ(attn_kv_rows_bytes(&w.d, 0, -1), 0);
    CHECK_EQ(attn_kv_rows_bytes(NULL, 0, 1), 0);
    CHECK_EQ(attn_kv_read_rows(NULL, 0, 0, 0, 1, rows), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 0, 1, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, -1, 0, 1, rows), ATTN_ERR_PAGE);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, PAGES, 0, 1, rows), ATTN_ERR_PAGE);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, -1, 1, rows), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 0, -1, rows), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 15, 2, rows), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 14, 2, rows), ATTN_OK);
    CHECK(memcmp(rows, data_k + 14 * KV_HEADS * DIM, 2 * KV_HEADS * DIM * 4) == 0);
    w.d.kv.k.data = NULL;
    CHECK_EQ(attn_kv_read_rows(&w.d, 0, 0, 14, 2, rows), ATTN_ERR_ARGUMENT);
}

static void dense_masks(void) {
    static const uint8_t m[6] = {1, 1, 0, 0, 0, 1};
    int64_t start[3], n = -1;
    int32_t block[2];
    uint64_t bits[2];
    attn_block_list b;
    CHECK_EQ(attn_mask_from_dense(m, 2, 3, 1, 2, start, NULL, NULL, 0, &n, &b), ATTN_OK);
    CHECK_EQ(n, 2); // only asked how many
    CHECK_EQ(attn_mask_from_dense(m, 2, 3, 1, 2, start, NULL, bits, 2, &n, &b), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 2, 3, 1, 2, start, block, NULL, 2, &n, &b), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 2, 3, 1, 2, start, block, bits, 1, &n, &b), ATTN_ERR_FULL);
    CHECK_EQ(n, 2);
    CHECK_EQ(attn_mask_from_dense(m, 2, 3, 1, 2, start, block, bits, 2, &n, &b), ATTN_OK);
    CHECK(start[0] == 0 && start[1] == 1 && start[2] == 2 && block[0] == 0 && block[1] == 1);
    CHECK(bits[0] == 3 && bits[1] == 1 && b.n_rows == 2);
}

// ---- plans

// A comb: every sequence follows the spine one page further than the one before it, so that shared
// runs lie inside shared runs, n - 1 deep. A page is a span.
static void comb_make(world *w, int32_t n, int32_t q_len) {
    int32_t s, j;
    world_make(w, n, q_len, (n < 24 ? n + 1 : 24) * PAGE, PAGE);
    for (s = 0; s < n; s++)
        for (j = 0; j < ROW; j++) w->table[s][j] = j <= s ? j : 32 + (s * 7 + j) % 32;
}

static int32_t longest_chain(const attn_plan *p) {
    int32_t s, most = 0;
    for (s = 0; s < p->n_seq; s++) most = attni_max32(most, p->seq[s].n_chain);
    return most;
}

static void nested_sharing(void) {
    attn_plan_params params;
    const attn_plan *p;
    world w;
    size_t all;
    int32_t n;
    comb_make(&w, 6, 2);
    AGREE(&w);
    world_params(&params);
    params.share = 2;
    params.partial_bytes = WORK / 4;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 5 && longest_chain(p) == 6 && p->n_merges == 6);
    CHECK(p && p->kv_tokens_read < p->kv_tokens_seen);
    all = p ? attn_plan_partial_bytes(p) : 0;
    params.partial_bytes = all; // the outermost run reserves for all inside it
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 5);
    params.partial_bytes = all - 1;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared < 5);
    params.partial_bytes = 0;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 0);
    params.partial_bytes = WORK / 4; // cut as well: what a plan uses is what it was charged
    params.workers = 16;
    p = SAME(&w, &params);
    n = p ? p->n_segments : 0;
    CHECK(n > 11); // the uncut one has 5 shared and 6 of their own
    params.partial_bytes = p ? attn_plan_partial_bytes(p) : 0;
    p = SAME(&w, &params);
    CHECK(p && p->n_segments == n);
    params.workers = 0;
    params.share = 0; // by the cost model: partials too dear, partials for nothing
    params.partial_bytes = WORK / 4;
    params.cost_kv_token = 1e-6f;
    params.cost_row_token = 1;
    params.cost_partial = 1e6f;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 0);
    params.cost_kv_token = 1e6f;
    params.cost_partial = 1e-6f;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 5);
    params.share = 1;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 0);
    world_make(&w, 3, 2, 300, 16); // nobody has queries: nothing to do
    w.q_start[1] = w.q_start[2] = w.q_start[3] = 0;
    params.share = 2;
    p = SAME(&w, &params);
    CHECK(p && p->n_tasks == 0 && p->n_active == 0 && p->n_merges == 0);
}

// Equal pages at other positions are not shared; long runs are cut for several workers.
static void cut_plans(void) {
    attn_plan_params params;
    const attn_plan *p;
    world w;
    int32_t i;
    world_make(&w, 3, 2, 600, 32);
    for (i = 0; i < 3 * ROW; i++) w.table[i / ROW][i % ROW] = i % ROW;
    w.d.kv.kv_pos0 = w.kv_pos0;
    w.kv_pos0[1] = 64; // the front of the second was evicted
    AGREE(&w);
    world_params(&params);
    params.share = 2;
    params.partial_bytes = WORK / 4;
    p = SAME(&w, &params);
    CHECK(p && p->n_shared == 1 && p->order[0] == 0 && p->order[1] == 2);
    params.workers = 4;
    p = SAME(&w, &params);
    CHECK(p && p->n_segments > 2);
    world_make(&w, 2, 1, 24 * PAGE, PAGE); // 8 common spans, 16 apart: both are cut
    for (i = 0; i < 2 * ROW; i++)
        w.table[i / ROW][i % ROW] = i % ROW < 8 ? i % ROW : (i * 5) % PAGES;
    AGREE(&w);
    p = SAME(&w, &params);
    CHECK(p && p->n_shared > 1 && longest_chain(p) > 3);
    world_make(&w, 1, 300, 600, 32); // a chunk that starts inside a tile
    AGREE(&w);
    params.row_tile = 128;
    p = SAME(&w, &params);
    CHECK(p && p->n_tasks > 2);
    for (i = 0; p && i < p->n_tasks; i++)
        CHECK(p->task[i].first_token == 0 ||
              (w.kv_len[0] - 300 + p->task[i].first_token) % p->tile_tokens == 0);
    world_make(&w, 2, 100, 300, 16); // two whose queries make more than a tile together
    for (i = 0; i < 2 * ROW; i++) w.table[i / ROW][i % ROW] = i % ROW;
    AGREE(&w);
    p = SAME(&w, &params);
    CHECK(p && p->n_shared >= 1);
    world_make(&w, 1, 100, 356, 16); // one that starts where a tile does
    AGREE(&w);
    p = SAME(&w, &params);
    CHECK(p && p->n_tasks > 2);
}

static int within(const attn_plan *p) { // its capacities
    int32_t s, chain = 0;
    for (s = 0; s < p->n_seq; s++) chain += p->seq[s].n_chain;
    return p->n_segments <= p->cap_segments && p->n_tasks <= p->cap_tasks && chain <= p->cap_chain;
}

// All hold the same pages, and each looks back a little from a span of its own: what they share is
// many times what they see.
static void staggered_make(world *w, int32_t q_len) {
    int32_t i;
    world_make(w, 24, q_len, 24 * PAGE, PAGE);
    for (i = 0; i < 24 * ROW; i++) w->table[i / ROW][i % ROW] = i % ROW;
    for (i = 0; i < 24; i++) w->q_pos0[i] = i * PAGE + PAGE / 2;
    w->d.q_pos0 = w->q_pos0;
    w->d.mask.window_left = 64;
}

// More nested runs than the plan has room for: the inner ones are computed apart.
static void full_plans(void) {
    attn_plan_params params;
    const attn_plan *p;
    world w;
    int32_t i;
    comb_make(&w, 40, 1);
    AGREE(&w);
    world_params(&params);
    params.share = 2;
    params.partial_bytes = WORK / 4;
    p = SAME(&w, &params); // chains run out
    CHECK(p && p->n_shared > 5 && p->n_shared < 23 && within(p));
    params.row_tile = 1;   // tiles run out before them
    p = SAME(&w, &params);
    CHECK(p && p->n_shared > 3 && p->n_shared < 23 && within(p));
    // where all costs are infinite every cut looks needed: whatever is done must fit
    params.row_tile = 0;
    params.share = 1;
    params.workers = 2;
    params.cost_kv_token = HUGE_VALF;
    p = SAME(&w, &params);
    CHECK(p && within(p));
    params.cost_kv_token = 1e-6f;
    world_make(&w, 1, 1, 30 * PAGE, PAGE);
    for (i = 0; i < ROW; i++) w.table[0][i] = i;
    AGREE(&w);
    params.workers = 4;
    p = SAME(&w, &params);
    CHECK(p && within(p) && p->n_segments > 4);
    params.partial_bytes = 16; // fewer partials than cuts
    p = SAME(&w, &params);
    CHECK(p && within(p) && p->n_segments == 1);
    params.partial_bytes = WORK / 4;
    world_make(&w, 1, 256, 8 * PAGE, PAGE); // more tiles than tasks
    AGREE(&w);
    params.workers = 2;
    params.row_tile = 1;
    p = SAME(&w, &params);
    CHECK(p && within(p));
    params.row_tile = 0;
    p = SAME(&w, &params);
    CHECK(p && within(p));
    world_make(&w, 24, 1, 30 * PAGE, PAGE); // one shared run, more cuts than chains
    for (i = 0; i < 24 * ROW; i++) w.table[i / ROW][i % ROW] = i % ROW;
    AGREE(&w);
    params.share = 2;
    p = SAME(&w, &params);
    CHECK(p && within(p));
    params.workers = 16;
    p = SAME(&w, &params);
    CHECK(p && within(p) && p->n_shared == 1);
    params.workers = 2;
    staggered_make(&w, 2); // more cuts than segments
    AGREE(&w);
    p = SAME(&w, &params);
    CHECK(p && within(p) && p->n_shared == 1);
    staggered_make(&w, 8); // more tiles than tasks, of one run that would be cut
    AGREE(&w);
    params.row_tile = 1;
    params.workers = 64;
    p = SAME(&w, &params);
    CHECK(p && within(p) && p->n_shared == 1);
}

static void plan_limits(void) {
    attn_plan_params params;
    attn_plan *p = NULL;
    world w;
    int rebuilt = 7;
    world_make(&w, 4, 2, 300, 16);
    w.q_start[3] = 4, w.q_start[4] = 6; // the third has no queries
    w.d.q_pos0 = w.q_pos0;
    world_params(&params);
    params.workers = 65536;
    CHECK(attn_plan_bytes(&w.d, &params) > 0);
    params.workers = 65537;
    CHECK_EQ(attn_plan_bytes(&w.d, &params), 0);
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_ERR_ARGUMENT);
    params.workers = 0;
    params.max_seq = INT32_MAX;
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_ERR_OVERFLOW);
    params.max_seq = 0;
    params.max_tokens = INT32_MAX;
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_ERR_OVERFLOW);
    CHECK_EQ(attn_plan_bytes(&w.d, &params), 0);
    params.max_tokens = 0;
    // an order, followed through changes
    w.d.seq_order = w.order;
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_OK);
    if (!p) return;
    CHECK(p->n_active == 3 && p->order[0] == 3 && p->order[1] == 1 && p->order[2] == 0);
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK_EQ(rebuilt, 0);
    w.order[0] = 2, w.order[1] = 3; // the one without queries moved: nothing to do
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK_EQ(rebuilt, 0);
    w.order[2] = 0, w.order[3] = 1;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 1 && p->order[0] == 3 && p->order[1] == 0 && p->order[2] == 1);
    w.order[3] = 0; // no permutation any more
    CHECK_EQ(attn_plan_update(p, &w.d, NULL), ATTN_ERR_ARGUMENT);
    w.order[3] = 1;
    CHECK_EQ(attn_plan_update(p, &w.d, NULL), ATTN_OK);
    // lengths that changed
    w.q_start[1] = 1; // one query less, one more
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 1 && p->seq[0].q_len == 1 && p->seq[1].q_len == 3);
    w.q_start[4] = 5; // a query less
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 1 && p->n_tokens == 5);
    w.kv_len[1] = 250; // a span less, but the mask allowed it already
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 1 && p->seq[1].span1 == 1);
    w.kv_len[1] = 251;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 0 && p->seq[1].kv_len == 251);
    w.q_pos0[0] = w.q_pos0[0] + 300; // under a window the first span goes
    w.d.mask.window_left = 200;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 1 && p->seq[0].span0 == 1);
    // pages: the same in two sequences now, which the plan does not share yet
    world_make(&w, 2, 1, 300, 16);
    params.share = 2;
    params.partial_bytes = 1 << 20;
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_OK);
    CHECK_EQ(p->n_shared, 0);
    memcpy(w.table[1], w.table[0], 16 * sizeof(int32_t));
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK(rebuilt == 1 && p->n_shared == 1);
    // another model
#define STALE(change, undo)                                                                        \
    change;                                                                                        \
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_ERR_STALE);                                 \
    undo;
    STALE(w.d.n_heads = 2, w.d.n_heads = HEADS)
    STALE(w.d.n_kv_heads = 4, w.d.n_kv_heads = KV_HEADS)
    STALE(w.d.head_dim = 16; w.d.v_head_dim = 8, w.d.head_dim = DIM; w.d.v_head_dim = 0)
    STALE(w.d.v_head_dim = 16, w.d.v_head_dim = 0)
    // more than the plan has room for: tasks, sequences, and what no plan has room for
    world_make(&w, 2, 1, 300, 16);
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_OK);
    w.d.q_pos0 = w.q_pos0;
    w.q_start[1] = w.q_start[2] = 9999;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_ERR_BUFFER);
    w.q_start[1] = w.q_start[2] = 500000000;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_ERR_OVERFLOW);
    world_make(&w, 2, 300, 300, PAGE); // fewer tasks, but more segments: longer KV, cut for a bound
    params.max_task_cost = 3000;
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_OK);
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    world_make(&w, 2, 1, 3000, PAGE);
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_ERR_BUFFER);
    params.max_task_cost = 0;
    world_make(&w, 2, 1, 300, 16);
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_OK);
    world_make(&w, 3, 1, 300, 16);
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_ERR_BUFFER);
    w.d.n_seq = 2;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    world_make(&w, 2, 1, 300, 16); // no order, no table: as they come
    w.d.kv.page_table = NULL;
    w.d.kv.page_tokens = 512;
    CHECK_EQ(attn_plan_build(&w.d, &params, work, WORK, &p), ATTN_OK);
    CHECK(p->order[0] == 0 && p->order[1] == 1 && p->n_shared == 0);
}

// ---- pool and tree

static void pool_edges(void) {
    attn_pool p;
    unsigned char mem[256];
    int32_t page;
    CHECK_EQ(attn_pool_init(&p, 3, mem + 3, attn_pool_bytes(3)), ATTN_OK); // any alignment
    CHECK((uintptr_t)p.ref % 4 == 0 && (uintptr_t)p.free % 4 == 0);
    CHECK_EQ(attn_pool_alloc(&p, &page), ATTN_OK);
    CHECK_EQ(attn_pool_retain(NULL, 0), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_release(NULL, 0), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_retain(&p, -1), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_retain(&p, 3), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_retain(&p, 1), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_release(&p, -1), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_release(&p, 3), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_release(&p, 1), ATTN_ERR_PAGE);
    p.ref[page] = INT32_MAX; // as often as can be
    CHECK_EQ(attn_pool_retain(&p, page), ATTN_ERR_OVERFLOW);
    CHECK_EQ(p.ref[page], INT32_MAX);
    p.ref[page] = INT32_MAX - 1;
    CHECK_EQ(attn_pool_retain(&p, page), ATTN_OK);
    CHECK_EQ(p.ref[page], INT32_MAX);
}

enum { TREE_MEM = 1 << 16 };
static unsigned char tree_mem[TREE_MEM + 16], tree_was[TREE_MEM + 16];

static attn_tree *tree_make(int32_t n_pages, int32_t page_tokens, int32_t max_seq,
                            int32_t max_nodes) {
    attn_tree *t = NULL;
    attn_tree_desc d = {0, 0, 0, 0};
    memset(tree_mem, 0, sizeof tree_mem);
    d.n_pages = n_pages;
    d.page_tokens = page_tokens;
    d.max_seq = max_seq;
    d.max_nodes = max_nodes;
    if (!CHECK_EQ(attn_tree_init(&d, tree_mem + 5, TREE_MEM, &t), ATTN_OK)) exit(1);
    return t;
}

static int32_t letters(const char *text, int32_t *token) {
    int32_t n = 0;
    for (; text[n]; n++) token[n] = text[n];
    return n;
}

// A sequence of the letters in namespace ns; a copy it needs stays unacknowledged in *c.
static int32_t put(attn_tree *t, uint64_t ns, const char *text, attn_page_copy *c) {
    int32_t token[64], n_copies = 0, s = -1;
    int32_t n = letters(text, token);
    CHECK_EQ(attn_tree_insert(t, ns, token, n, &s, NULL, c, c ? 1 : 0, c ? &n_copies : NULL),
             ATTN_OK);
    CHECK_EQ(n_copies, c != NULL);
    return s;
}

static void tree_arguments(void) {
    attn_tree *t = tree_make(8, 4, 2, 0);
    attn_tree_desc d = {8, 4, 0, 0};
    attn_tree_stats st;
    attn_page_copy c[2] = {{0, 0, 0}, {0, 0, 0}};
    int32_t tok[64], s = -7, hit = -7, n = 0, out[16], a, b;
    letters("abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz", tok);
    CHECK(attn_tree_bytes(&d) > 0);
    CHECK(attn_tree_pool(NULL) == NULL && attn_tree_pool(t)->n_pages == 8);
    d.max_seq = -1;
    CHECK_EQ(attn_tree_bytes(&d), 0);
    d.max_seq = 1, d.max_nodes = -1;
    CHECK_EQ(attn_tree_bytes(&d), 0);
    d.max_nodes = INT32_MAX / 2 + 1;
    CHECK_EQ(attn_tree_bytes(&d), 0);
    d.max_nodes = 1;
    CHECK(attn_tree_bytes(&d) > 0);
    CHECK_EQ(attn_tree_match(NULL, 0, tok, 3), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_match(t, 0, tok, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_match(t, 0, NULL, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_match(t, 0, NULL, 0), 0);
    CHECK_EQ(attn_tree_open(NULL, 0, tok, 3, &s, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_open(t, 0, tok, 3, NULL, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_open(t, 0, tok, -1, &s, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_open(t, 0, NULL, 1, &s, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_insert(t, 0, tok, 3, NULL, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_insert(t, 0, NULL, 1, &s, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    CHECK(s == -7 && hit == -7 && n == 0);
    CHECK_EQ(attn_tree_open(t, 0, NULL, 0, &a, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_append(NULL, a, tok, 3, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(t, a, tok, -1, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(t, a, NULL, 1, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(t, a, NULL, 0, &hit, c, 2, &n), ATTN_OK);
    CHECK_EQ(attn_tree_append(t, a, tok, 1, &hit, c, -1, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(t, a, tok, 1, &hit, NULL, 2, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(t, a, tok, 1, &hit, c, 2, NULL), ATTN_ERR_ARGUMENT);
    n = -1;
    CHECK_EQ(attn_tree_append(t, a, tok, 1, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    n = 3;
    CHECK_EQ(attn_tree_append(t, a, tok, 1, &hit, c, 2, &n), ATTN_ERR_ARGUMENT);
    n = 0;
    CHECK_EQ(attn_tree_length(t, a), 0);
    CHECK_EQ(attn_tree_append(t, a, tok, 6, NULL, c, 2, &n), ATTN_OK);
    CHECK_EQ(attn_tree_append(t, a, tok, INT32_MAX, &hit, c, 2, &n), ATTN_ERR_OVERFLOW);
    CHECK_EQ(attn_tree_append(t, -1, tok, 1, &hit, c, 2, &n), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_append(t, 2, tok, 1, &hit, c, 2, &n), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_append(t, 1, tok, 1, &hit, c, 2, &n), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_fork(NULL, a, &b), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_fork(t, a, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_fork(t, a, &b), ATTN_OK);
    CHECK_EQ(attn_tree_fork(t, a, &s), ATTN_ERR_FULL);
    CHECK_EQ(attn_tree_insert(t, 0, tok, 3, &s, &hit, c, 2, &n), ATTN_ERR_FULL);
    CHECK_EQ(attn_tree_append(t, a, tok, 1, &hit, c, 2, &n), ATTN_OK);
    CHECK_EQ(attn_tree_append(t, b, tok + 9, 1, &hit, c, 2, &n), ATTN_OK);
    CHECK(n == 1 && c[0].n_tokens == 2);
    // acknowledging what was not listed
    CHECK_EQ(attn_tree_ack(NULL, c, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_ack(t, c, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_ack(t, NULL, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_ack(t, NULL, 0), ATTN_OK);
#define NO_COPY(field, value)                                                                      \
    c[1] = c[0];                                                                                   \
    c[1].field = value;                                                                            \
    CHECK_EQ(attn_tree_ack(t, c + 1, 1), ATTN_ERR_ARGUMENT);
    NO_COPY(dst, -1)
    NO_COPY(dst, 8)
    NO_COPY(dst, c[0].src)
    NO_COPY(src, -1)
    NO_COPY(src, c[0].dst)
    c[1] = c[0];
    CHECK_EQ(attn_tree_ack(t, c, 2), ATTN_ERR_ARGUMENT); // twice the same
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    CHECK_EQ(attn_tree_ack(t, c, 1), ATTN_OK);
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    // reading back
    CHECK_EQ(attn_tree_tokens(NULL, a, 0, 1, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_tokens(t, a, -1, 1, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_tokens(t, a, 0, -1, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_tokens(t, a, 0, 1, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_tokens(t, a, 8, 0, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_tokens(t, a, 7, 1, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_tokens(t, a, 7, 0, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_tokens(t, a, 1, 4, out), ATTN_OK); // all above the sequence's own node
    CHECK(memcmp(out, tok + 1, 16) == 0);
    CHECK_EQ(attn_tree_tokens(t, a, 5, 2, out), ATTN_OK);
    CHECK(out[0] == 'f' && out[1] == 'a');
    CHECK_EQ(attn_tree_pages(NULL, a, out, 16), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pages(t, a, out, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pages(t, a, NULL, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pages(t, a, NULL, 0), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_tree_pages(t, a, out, 2), 2);
    out[0] = b, out[1] = a;
    CHECK_EQ(attn_tree_order(NULL, out, 2, out + 2, out + 4), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_order(t, out, -1, out + 2, out + 4), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_order(t, NULL, 2, out + 2, out + 4), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_order(t, out, 2, NULL, out + 4), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_order(t, out, 2, out + 2, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_order(t, NULL, 0, NULL, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_order(t, out, 2, out + 2, out + 4), ATTN_OK);
    CHECK(out[2] == 1 && out[3] == 0); // "abcdefa" before "abcdefj"
    CHECK_EQ(attn_tree_priority(NULL, a, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pin(t, 0, NULL, 1, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pin(t, 0, tok, 1, 0), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pin(t, 0, tok, 6, -1), ATTN_ERR_NOT_FOUND); // a border without a pin
    CHECK_EQ(attn_tree_pin(t, 0, tok, 5, -1), ATTN_ERR_NOT_FOUND); // not even a border
    CHECK_EQ(attn_tree_pin(t, 0, tok, 6, 1), ATTN_OK);
    {
        attni_tree_node *x = t->node + t->node[t->seq[a].node].parent;
        CHECK(x->end == 6 && x->pins == 1);
        x->pins = INT32_MAX; // pinned as often as can be
        CHECK_EQ(attn_tree_pin(t, 0, tok, 6, 1), ATTN_ERR_OVERFLOW);
        CHECK_EQ(x->pins, INT32_MAX);
        CHECK_EQ(attn_tree_pin(t, 0, tok, 4, 1), ATTN_OK); // elsewhere there is room
        CHECK_EQ(attn_tree_pin(t, 0, tok, 4, -1), ATTN_OK);
        x->pins = 1;
    }
    CHECK_EQ(attn_tree_pin(t, 0, tok, 6, -1), ATTN_OK);
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    memset(&st, 0xa5, sizeof st);
    attn_tree_get_stats(NULL, &st);
    CHECK(st.n_pages == (int32_t)0xa5a5a5a5u);
    attn_tree_get_stats(t, NULL);
    attn_tree_get_stats(t, &st);
    CHECK(st.n_pages == 8 && st.n_seq == 2);
}

static int rows_fail;
static int move_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    (void)user, (void)page, (void)place, (void)n, (void)rows;
    return rows_fail;
}

static void blob_edges(void) {
    static unsigned char blob[4096];
    int32_t tok[400], a = -1, s = -7, i;
    attn_tree *t = tree_make(50, 8, 4, 0);
    size_t bytes;
    for (i = 0; i < 400; i++) tok[i] = i * i;
    CHECK_EQ(attn_tree_insert(t, 0, tok, 300, &a, NULL, NULL, 0, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_save_bytes(t, a, 0), 0);
    CHECK_EQ(attn_tree_save_bytes(NULL, a, 4), 0);
    bytes = attn_tree_save_bytes(t, a, 4);
    CHECK(bytes == 48 + 300 * 8 && bytes <= sizeof blob);
    CHECK_EQ(attn_tree_save(NULL, a, 4, move_rows, NULL, blob, bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_save(t, a, 4, NULL, NULL, blob, bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_save(t, a, 4, move_rows, NULL, NULL, bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_save(t, a, 0, move_rows, NULL, blob, bytes), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_save(t, a, SIZE_MAX / 8, move_rows, NULL, blob, bytes), ATTN_ERR_OVERFLOW);
    CHECK_EQ(attn_tree_save(t, a, SIZE_MAX, move_rows, NULL, blob, bytes), ATTN_ERR_OVERFLOW);
    CHECK_EQ(attn_tree_save(t, a, 4, move_rows, NULL, blob, bytes), ATTN_OK);
    CHECK_EQ(attn_tree_load(NULL, 1, 4, move_rows, NULL, NULL, blob, bytes, &s), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_load(t, 1, 4, NULL, NULL, NULL, blob, bytes, &s), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_load(t, 1, 4, move_rows, NULL, NULL, NULL, bytes, &s), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_load(t, 1, 4, move_rows, NULL, NULL, blob, bytes, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_load(t, 1, 0, move_rows, NULL, NULL, blob, bytes, &s), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_load(t, 1, 5, move_rows, NULL, NULL, blob, bytes, &s), ATTN_ERR_SHAPE);
    CHECK_EQ(s, -7);
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    t = tree_make(37, 8, 4, 0); // 296 tokens: four too few
    CHECK_EQ(attn_tree_load(t, 1, 4, move_rows, NULL, NULL, blob, bytes, &s), ATTN_ERR_FULL);
    CHECK(s == -7 && t->n_nodes == 0 && t->pool.n_free == 37);
    t = tree_make(38, 8, 4, 0);
    rows_fail = 1;
    CHECK_EQ(attn_tree_load(t, 1, 4, move_rows, NULL, NULL, blob, bytes, &s), ATTN_ERR_CALLBACK);
    CHECK(s == -7 && t->n_nodes == 0 && t->pool.n_free == 38);
    rows_fail = 0;
    CHECK_EQ(attn_tree_load(t, 1, 4, move_rows, NULL, NULL, blob, bytes, &s), ATTN_OK);
    CHECK_EQ(attn_tree_length(t, s), 300);
    CHECK_EQ(attn_tree_match(t, 1, tok, 400), 300);
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    CHECK_EQ(attn_tree_release(t, s, 0), ATTN_OK);
    // headers that say what cannot be, each under a checksum that is right
#define LIAR(place, value, n, code)                                                                \
    do {                                                                                           \
        static unsigned char liar[4096];                                                           \
        memcpy(liar, blob, bytes);                                                                 \
        attni_put_le(liar + (place), value, n);                                                    \
        attni_put_le(liar + 40, attni_blob_sum(liar, bytes), 8);                                   \
        CHECK_EQ(attn_tree_load(t, 2, 4, move_rows, NULL, NULL, liar, bytes, &s), code);           \
    } while (0)
    LIAR(0, 'x', 1, ATTN_ERR_CORRUPT);
    LIAR(8, 2, 4, ATTN_ERR_VERSION);
    LIAR(12, 64, 4, ATTN_ERR_CORRUPT);
    LIAR(16, 299, 8, ATTN_ERR_CORRUPT);
    LIAR(16, (uint64_t)INT32_MAX + 1, 8, ATTN_ERR_CORRUPT);
    LIAR(24, 0, 8, ATTN_ERR_CORRUPT);
    LIAR(24, UINT64_MAX, 8, ATTN_ERR_CORRUPT);
    LIAR(32, bytes + 1, 8, ATTN_ERR_CORRUPT);
    LIAR(24, 4, 8, ATTN_OK); // nothing changed
    blob[60] ^= 1;
    CHECK_EQ(attn_tree_load(t, 3, 4, move_rows, NULL, NULL, blob, bytes, &s), ATTN_ERR_CORRUPT);
}

// A tree with everything in it: two namespaces, forks inside a page with a copy outstanding, a pin,
// priorities, cached and uncached leaves, unused nodes and slots.
static attn_tree *tree_rich(void) {
    attn_tree *t = tree_make(14, 4, 8, 24);
    attn_page_copy c;
    int32_t tok[8], a, b;
    a = put(t, 0, "abcdefghij", NULL);
    b = put(t, 0, "abcdefxyz", &c); // its copy stays outstanding
    CHECK_EQ(attn_tree_fork(t, b, &b), ATTN_OK);
    CHECK_EQ(attn_tree_release(t, put(t, 0, "abcdQRST", NULL), 1), ATTN_OK);
    CHECK_EQ(attn_tree_release(t, put(t, 9, "mnopq", NULL), 1), ATTN_OK);
    CHECK_EQ(attn_tree_release(t, put(t, 9, "mnst", &c), 1), ATTN_OK);
    CHECK_EQ(attn_tree_ack(t, &c, 1), ATTN_OK);
    CHECK_EQ(attn_tree_priority(t, a, 2), ATTN_OK);
    CHECK_EQ(attn_tree_pin(t, 0, tok, letters("ab", tok), 1), ATTN_OK);
    CHECK_EQ(attn_tree_release(t, put(t, 3, "uv", NULL), 1), ATTN_OK);
    (void)put(t, 3, "uvw", NULL); // a border because "uv" is cached
    a = put(t, 4, "rs", NULL);
    CHECK_EQ(attn_tree_priority(t, a, 1), ATTN_OK); // a border because "rs" ranks higher
    CHECK_EQ(attn_tree_append(t, a, tok, 1, NULL, NULL, 0, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_open(t, 77, NULL, 0, &a, NULL), ATTN_OK); // an empty namespace
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    CHECK(t->pool.n_free > 0 && t->n_nodes < 24 && t->n_seq < 8 && t->n_heap > 1);
    return t;
}

static long long damage_seen, damage_missed;

// Every wrong value of one number: the check must end, and find it where `must`.
static void damage(attn_tree *t, int32_t *at, int must, const char *what) {
    const int32_t was = *at;
    int32_t wrong[10], i, n = 0;
    wrong[n++] = was + 1;
    wrong[n++] = was - 1;
    wrong[n++] = was ^ 2;
    wrong[n++] = 0;
    wrong[n++] = 3;
    wrong[n++] = -1;
    wrong[n++] = 1000;
    wrong[n++] = INT32_MAX;
    wrong[n++] = INT32_MIN;
    for (i = 0; i < n; i++) {
        attn_result r;
        if (wrong[i] == was || (was < 0 && wrong[i] < 0)) continue; // negative: none, either way
        *at = wrong[i];
        r = attn_tree_check(t);
        *at = was;
        if (r == ATTN_ERR_CORRUPT) damage_seen++;
        else damage_missed++;
        if (must && !CHECK_EQ(r, ATTN_ERR_CORRUPT))
            printf("    %s: %d for %d\n", what, (int)wrong[i], (int)was);
    }
}
#define DAMAGE(number, must) damage(t, &(number), must, #number)

static void tree_damage(void) {
    attn_tree *t = tree_rich();
    int32_t i, x;
    memcpy(tree_was, tree_mem, sizeof tree_was);
    for (x = 0; x < t->max_nodes; x++) {
        attni_tree_node *n = t->node + x;
        int used = n->start >= 0;
        DAMAGE(n->parent, used);
        DAMAGE(n->n_child, used);
        DAMAGE(n->child_xor, used);
        DAMAGE(n->start, 1);
        DAMAGE(n->end, used);
        DAMAGE(n->first_page, used);
        DAMAGE(n->last_page, used && n->parent >= 0);
        DAMAGE(n->first_seq, used);
        DAMAGE(n->pins, used);
        DAMAGE(n->held, used);
        DAMAGE(n->priority, 0);
        DAMAGE(n->heap_at, used);
        DAMAGE(n->cached, 0);
        if (!used) continue;
        n->key++;
        CHECK_EQ(attn_tree_check(t), ATTN_ERR_CORRUPT);
        n->key--;
    }
    for (i = 0; i < t->max_seq; i++) {
        DAMAGE(t->seq[i].node, 1);
        DAMAGE(t->seq[i].prev, t->seq[i].node >= 0);
        DAMAGE(t->seq[i].next, 1);
    }
    for (i = 0; i < t->n_pages; i++) {
        DAMAGE(t->pool.ref[i], 1);
        DAMAGE(t->pool.free[i], i < t->pool.n_free);
        DAMAGE(t->hold[i], 1);
        DAMAGE(t->copy_src[i], 1);
        DAMAGE(t->n_copying[i], 0);
        DAMAGE(t->lock[i], 0);
        DAMAGE(t->fill[i], 0);
        DAMAGE(t->next[i], 0);
        DAMAGE(t->prev[i], 0);
        for (x = 0; x < t->page_tokens; x++) DAMAGE(t->token[i * t->page_tokens + x], 0);
    }
    for (i = 0; i < t->max_nodes; i++) DAMAGE(t->heap[i], i < t->n_heap);
    for (i = 0; i <= (int32_t)t->table_mask; i++) DAMAGE(t->table[i], 1);
    DAMAGE(t->pool.n_free, 1);
    DAMAGE(t->n_nodes, 1);
    DAMAGE(t->n_held_nodes, 1);
    DAMAGE(t->n_seq, 1);
    DAMAGE(t->n_held_pages, 1);
    DAMAGE(t->n_heap, 1);
    DAMAGE(t->free_node, 1);
    DAMAGE(t->free_seq, 1);
    t->count.tokens_cached++;
    CHECK_EQ(attn_tree_check(t), ATTN_ERR_CORRUPT);
    t->count.tokens_cached--;
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    for (i = 0; i <= (int32_t)t->table_mask; i++) t->table[i] = 0; // no search would ever end
    t->n_nodes = (int32_t)t->table_mask + 1;
    CHECK_EQ(attn_tree_check(t), ATTN_ERR_CORRUPT);
    // consistent numbers of a state that no call leaves behind
    t = tree_rich();
    x = attni_index_find(t, attni_index_find(t, -1, 9), 'm');
    CHECK(x >= 0 && t->node[x].end == 2);
    CHECK(attni_node_split(t, x, 1) >= 0); // a border that nothing needs
    CHECK_EQ(attn_tree_check(t), ATTN_ERR_CORRUPT);
    t = tree_rich();
    (void)attni_node_new(t, -1, 5, 0); // a namespace that nobody is in
    CHECK_EQ(attn_tree_check(t), ATTN_ERR_CORRUPT);
    t = tree_make(4, 4, 2, 0);
    CHECK_EQ(attn_tree_release(t, put(t, 0, "abc", NULL), 1), ATTN_OK);
    {
        int32_t tok[4], n = letters("abc", tok);
        CHECK_EQ(attn_tree_pin(t, 0, tok, n, 1), ATTN_OK);
    }
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    x = attni_index_find(t, attni_index_find(t, -1, 0), 'a');
    t->node[x].cached = 0; // pinned, but would go with the last sequence
    CHECK_EQ(attn_tree_check(t), ATTN_ERR_CORRUPT);
    printf("damaged numbers found: %lld, without meaning: %lld\n", damage_seen, damage_missed);
}

// ---- what the executor is asked beside running

static void store_edges(void) {
    static float rows[4 * KV_HEADS * DIM];
    const int64_t huge = INT64_MAX / 2;
    int64_t slot[4] = {0, 1, -1, 3};
    attn_tensor k;
    attn_page_copy c = {0, 1, 16};
    world w;
    int32_t i;
    memset(&k, 0, sizeof k);
    k.data = rows;
    k.dtype = ATTN_F32;
    world_make(&w, 2, 2, 100, 16);
    CHECK_EQ(attn_cpu_store(&w.d, NULL, NULL, slot, 0, 4), ATTN_OK); // nothing to write
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, slot, -1, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, slot, 0, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, NULL, 1, 4), ATTN_ERR_SHAPE);
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, slot, 1, INT64_MAX), ATTN_ERR_OVERFLOW);
    slot[3] = PAGES * 16;
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, slot, 0, 4), ATTN_ERR_PAGE);
#define NO_STORE(code, change, undo)                                                               \
    change;                                                                                        \
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, slot, 0, 2), code);                                    \
    undo;
    NO_STORE(ATTN_ERR_ARGUMENT, k.data = NULL, k.data = rows)
    NO_STORE(ATTN_ERR_DTYPE, k.dtype = ATTN_I8, k.dtype = ATTN_F32)
    NO_STORE(ATTN_ERR_LAYOUT, k.stride_token = -1, k.stride_token = 0)
    NO_STORE(ATTN_ERR_LAYOUT, k.stride_head = -1, k.stride_head = 0)
    NO_STORE(ATTN_ERR_OVERFLOW, k.stride_token = huge, k.stride_token = 0)
    NO_STORE(ATTN_ERR_OVERFLOW, k.stride_head = huge, k.stride_head = 0)
    // of the descriptor they look at what they need
#define NEITHER(code, change, undo)                                                                \
    change;                                                                                        \
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, slot, 0, 2), code);                                    \
    CHECK_EQ(attn_cpu_copy_pages(&w.d, &c, 1), code);                                              \
    undo;
    NEITHER(ATTN_ERR_ARGUMENT, w.d.n_seq = 0, w.d.n_seq = 2)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.n_heads = 0, w.d.n_heads = HEADS)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.n_kv_heads = 0, w.d.n_kv_heads = KV_HEADS)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.n_kv_heads = 3, w.d.n_kv_heads = KV_HEADS)
    NEITHER(ATTN_ERR_SHAPE, w.d.head_dim = 0, w.d.head_dim = DIM)
    NEITHER(ATTN_ERR_SHAPE, w.d.head_dim = 12, w.d.head_dim = DIM)
    NEITHER(ATTN_ERR_SHAPE, w.d.head_dim = 584, w.d.head_dim = DIM)
    NEITHER(ATTN_ERR_SHAPE, w.d.v_head_dim = 4, w.d.v_head_dim = 0)
    NEITHER(ATTN_ERR_SHAPE, w.d.v_head_dim = 12, w.d.v_head_dim = 0)
    NEITHER(ATTN_ERR_SHAPE, w.d.v_head_dim = 584, w.d.v_head_dim = 0)
    NEITHER(ATTN_ERR_DTYPE, w.d.kv.k.dtype = ATTN_DTYPE_NONE, w.d.kv.k.dtype = ATTN_F32)
    NEITHER(ATTN_ERR_DTYPE, w.d.kv.v.dtype = ATTN_DTYPE_COUNT, w.d.kv.v.dtype = ATTN_F32)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.kv.k.data = NULL, w.d.kv.k.data = data_k)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.kv.v.data = NULL, w.d.kv.v.data = data_v)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.kv.kv_len = NULL, w.d.kv.kv_len = w.kv_len)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.q_start = NULL, w.d.q_start = w.q_start)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.kv.page_tokens = 0, w.d.kv.page_tokens = 16)
    NEITHER(ATTN_ERR_ARGUMENT, w.d.kv.n_pages = 0, w.d.kv.n_pages = PAGES)
    NEITHER(ATTN_ERR_LAYOUT, w.d.kv.layout = (attn_layout)-1, w.d.kv.layout = ATTN_TOKEN_MAJOR)
    NEITHER(ATTN_ERR_LAYOUT, w.d.kv.layout = (attn_layout)3, w.d.kv.layout = ATTN_TOKEN_MAJOR)
    NEITHER(ATTN_ERR_LAYOUT, w.d.kv.k.page_bytes = 8, w.d.kv.k.page_bytes = 0)
    NEITHER(ATTN_ERR_LAYOUT, w.d.kv.v.page_bytes = 8, w.d.kv.v.page_bytes = 0)
    w.d.q_pos0 = w.q_pos0;
    w.d.kv.kv_pos0 = w.kv_pos0;
    w.kv_pos0[0] = 99; // its first query lies before what is held
    CHECK_EQ(attn_cpu_store(&w.d, &k, NULL, NULL, 0, 2), ATTN_ERR_PAGE);
    CHECK_EQ(attn_cpu_copy_pages(&w.d, &c, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_copy_pages(&w.d, NULL, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_copy_pages(&w.d, NULL, 0), ATTN_OK);
#define NO_PAGES(code, field, value, right)                                                        \
    c.field = value;                                                                               \
    CHECK_EQ(attn_cpu_copy_pages(&w.d, &c, 1), code);                                              \
    c.field = right;
    NO_PAGES(ATTN_ERR_PAGE, src, -1, 0)
    NO_PAGES(ATTN_ERR_PAGE, src, PAGES, 0)
    NO_PAGES(ATTN_ERR_PAGE, dst, -1, 1)
    NO_PAGES(ATTN_ERR_PAGE, dst, PAGES, 1)
    NO_PAGES(ATTN_ERR_ARGUMENT, n_tokens, -1, 16)
    NO_PAGES(ATTN_ERR_ARGUMENT, n_tokens, 17, 16)
    { // V in K's memory is copied once, a page onto itself not at all
        static float page[2][16 * KV_HEADS * DIM];
        for (i = 0; i < 16 * KV_HEADS * DIM; i++) page[0][i] = (float)i, page[1][i] = -1;
        w.d.kv.k.data = w.d.kv.v.data = page;
        w.d.kv.n_pages = 2;
        c.n_tokens = 5;
        CHECK_EQ(attn_cpu_copy_pages(&w.d, &c, 1), ATTN_OK);
        for (i = 0; i < 16 * KV_HEADS * DIM; i++)
            CHECK(page[1][i] == (i < 5 * KV_HEADS * DIM ? (float)i : -1.0f));
        c.src = 1;
        CHECK_EQ(attn_cpu_copy_pages(&w.d, &c, 1), ATTN_OK);
    }
}

static void run_edges(void) {
    attn_plan_params params;
    attn_plan *p = NULL;
    world w;
    size_t bytes;
    int32_t i, h;
    // parameters and sizes of problems that are not valid: no partials, no bytes, no division by 0
    attn_cpu_plan_params(NULL, 3, &params);
    CHECK(params.workers == 3 && params.partial_bytes == 0);
#define NO_PARTIALS(change, undo)                                                                  \
    change;                                                                                        \
    attn_cpu_plan_params(&w.d, 0, &params);                                                        \
    CHECK(params.workers == 1 && params.partial_bytes == 0);                                       \
    undo;
    world_make(&w, 2, 2, 300, 16);
    NO_PARTIALS(w.d.n_seq = 0, w.d.n_seq = 2)
    NO_PARTIALS(w.d.n_seq = -1, w.d.n_seq = 2)
    NO_PARTIALS(w.d.q_start = NULL, w.d.q_start = w.q_start)
    NO_PARTIALS(w.d.kv.kv_len = NULL, w.d.kv.kv_len = w.kv_len)
    NO_PARTIALS(w.d.n_heads = 0, w.d.n_heads = HEADS)
    NO_PARTIALS(w.q_start[2] = -1, w.q_start[2] = 4)
    NO_PARTIALS(w.d.v_head_dim = -2, w.d.v_head_dim = 0)
    w.kv_len[0] = w.kv_len[1] = -5000;
    attn_cpu_plan_params(&w.d, 1, &params); // anything, but returns
    w.kv_len[0] = w.kv_len[1] = 300;
    w.q_start[2] = INT32_MAX; // as much as is allowed
    attn_cpu_plan_params(&w.d, 1, &params);
    CHECK_EQ(params.partial_bytes, (size_t)64 << 20);
    world_make(&w, 2, 2, 300, 16);
    CHECK_EQ(attn_plan_build(&w.d, (attn_cpu_plan_params(&w.d, 1, &params), &params), work,
                             WORK / 2, &p), ATTN_OK);
    CHECK(attn_cpu_scratch_bytes(&w.d, p) > 0 && attn_cpu_scratch_bytes(NULL, p) == 0 &&
          attn_cpu_scratch_bytes(&w.d, NULL) == 0);
    w.d.n_kv_heads = 0;
    CHECK_EQ(attn_cpu_scratch_bytes(&w.d, p), 0);
    w.d.n_kv_heads = 2 * HEADS;
    CHECK_EQ(attn_cpu_scratch_bytes(&w.d, p), 0);
    w.d.n_kv_heads = KV_HEADS;
#define NO_RUN(code, change, undo)                                                                 \
    change;                                                                                        \
    CHECK_EQ(attn_cpu_run(&w.d, p, 0, 0, work + WORK / 2, work + WORK / 2), code);                 \
    CHECK_EQ(attn_cpu_merge(&w.d, p, 0, 0, work + WORK / 2), code);                                \
    undo;
    NO_RUN(ATTN_OK, (void)0, (void)0)
    NO_RUN(ATTN_ERR_ARGUMENT, w.d.q.dtype = ATTN_I8, w.d.q.dtype = ATTN_F32)
    NO_RUN(ATTN_ERR_ARGUMENT, w.d.o.dtype = ATTN_DTYPE_NONE, w.d.o.dtype = ATTN_F32)
    NO_RUN(ATTN_ERR_ARGUMENT, w.d.q.data = NULL, w.d.q.data = data_q)
    NO_RUN(ATTN_ERR_ARGUMENT, w.d.o.data = NULL, w.d.o.data = data_o)
    NO_RUN(ATTN_ERR_LAYOUT, w.d.kv.k.page_bytes = 8, w.d.kv.k.page_bytes = 0)
    NO_RUN(ATTN_ERR_LAYOUT, w.d.kv.v.page_bytes = 8, w.d.kv.v.page_bytes = 0)
    // a plan with spans of another backend, even where they are as long
    NO_RUN(ATTN_ERR_STALE, p->params.rule[0].span = ATTN_SPAN, p->params.rule[0].span = 0)
    CHECK_EQ(attn_cpu_merge(&w.d, p, 0, -1, work), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_merge(&w.d, p, 0, 0, NULL), ATTN_OK);
    w.q_start[1] = 1; // other queries than the plan's
    CHECK_EQ(attn_cpu_run(&w.d, p, 0, p->n_tasks, work + WORK / 2, work + WORK / 2),
             ATTN_ERR_STALE);
    world_make(&w, 2, 2, 300, 16);
    bytes = attn_cpu_forward_bytes(&w.d, 4096);
    CHECK(bytes > 0 && attn_cpu_forward_bytes(&w.d, 4097) == 0);
    CHECK_EQ(attn_cpu_forward(&w.d, work, WORK, 4097), ATTN_ERR_ARGUMENT);
    w.d.seq_order = w.order;
    w.order[0] = w.order[1] = 0; // found by planning only
    CHECK_EQ(attn_cpu_forward(&w.d, work, WORK, 1), ATTN_ERR_ARGUMENT);
    w.d.seq_order = NULL;
    w.d.q_pos0 = w.q_pos0; // valid, but more queries than any plan has tasks for
    w.q_start[1] = w.q_start[2] = 500000000;
    CHECK_EQ(attn_cpu_forward_bytes(&w.d, 1), 0);
    CHECK(attn_cpu_forward(&w.d, work, WORK, 1) != ATTN_OK);
    // a token tree under ALiBi and bias: distances are depths
    world_make(&w, 2, 6, 530, 32);
    for (i = 0; i < 12; i++) w.parent[i] = i % 6 < 2 ? -1 : i % 6 - 2;
    for (h = 0; h < HEADS; h++) w.alibi[h] = 0.05f * (float)(h + 1);
    w.d.mask.kind = ATTN_MASK_TREE;
    w.d.mask.tree_parent = w.parent;
    w.d.logits.alibi = w.alibi;
    AGREE(&w);
    w.d.logits.bias.data = data_v;
    w.d.logits.bias.dtype = ATTN_F32;
    w.d.logits.bias.stride_token = 600;
    AGREE(&w);
    w.d.logits.alibi = NULL;
    AGREE(&w);
    world_make(&w, 1, 40, 280, 16); // the same across a span's border, and as a chain
    for (i = 0; i < 40; i++) w.parent[i] = i < 2 ? -1 : i - 2;
    w.d.mask.kind = ATTN_MASK_TREE;
    w.d.mask.tree_parent = w.parent;
    w.d.logits.alibi = w.alibi;
    AGREE(&w);
    for (i = 0; i < 40; i++) w.parent[i] = i - 1;
    AGREE(&w);
}

int main(void) {
    data_make();
    names();
    numbers();
    shapes();
    pages();
    masks();
    rows();
    visible_edges();
    list_edges();
    token_rows();
    dense_masks();
    nested_sharing();
    cut_plans();
    full_plans();
    plan_limits();
    store_edges();
    run_edges();
    pool_edges();
    tree_arguments();
    blob_edges();
    tree_damage();
    free(work);
    return TEST_END();
}

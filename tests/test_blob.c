/* Blobs between machines: a branch with pages of every dtype, saved on one and loaded on another.
     test_blob              saves and loads within itself
     test_blob save FILE    writes the blob; the same bytes on every machine
     test_blob load FILE    loads it into other layouts and page sizes and compares all it holds
   tests/ports.sh carries files between little-endian and big-endian programs. */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
#include "test.h"

enum { LAYERS = 7, HEADS = 2, DIM = 24, V_DIM = 40, TOKENS = 83, PAGES = 24, PAGE_MAX = 32,
       Q_HEADS = 4, MAX_BLOB = 1 << 20 };

static const attn_dtype k_types[LAYERS] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                           ATTN_F8E5M2, ATTN_I8,  ATTN_I4};

typedef struct engine {
    attn_tree *tree;
    attn_layout layout[LAYERS];
    int32_t page_tokens;
    uint8_t *k[LAYERS], *v[LAYERS];
    int writing;
} engine;

static uint8_t arena[24 << 20];
static size_t used;

static uint8_t *buffer(size_t bytes) {
    size_t at = (used + 63) & ~(size_t)63;
    uint8_t *base = arena + (64 - (uintptr_t)arena % 64) % 64;
    used = at + bytes;
    if (used + 64 > sizeof arena) {
        printf("arena too small\n");
        exit(2);
    }
    return base + at;
}

static int32_t table[PAGES], kv_len[1], q_start[2];

// Layer l of an engine as a problem without queries of its own.
static attn_desc describe(const engine *e, int l) {
    attn_desc d;
    memset(&d, 0, sizeof d);
    d.n_seq = 1;
    d.n_heads = Q_HEADS, d.n_kv_heads = HEADS, d.head_dim = DIM, d.v_head_dim = V_DIM;
    d.q_start = q_start;
    d.kv.kv_len = kv_len;
    d.kv.layout = e->layout[l];
    d.kv.page_tokens = e->page_tokens;
    d.kv.n_pages = PAGES;
    d.kv.page_table = table;
    d.kv.page_table_stride = PAGES;
    d.kv.k.dtype = k_types[l];
    d.kv.v.dtype = k_types[(l + 3) % LAYERS];
    d.kv.k.data = e->k[l];
    d.kv.v.data = e->v[l];
    return d;
}

static void engine_open(engine *e, int32_t page_tokens, int first_layout) {
    attn_tree_desc t;
    int l;
    memset(e, 0, sizeof *e);
    memset(&t, 0, sizeof t);
    t.n_pages = PAGES;
    t.page_tokens = e->page_tokens = page_tokens;
    CHECK_EQ(attn_tree_init(&t, buffer(attn_tree_bytes(&t)), attn_tree_bytes(&t), &e->tree),
             ATTN_OK);
    for (l = 0; l < LAYERS; l++) {
        attn_desc d;
        size_t kb, vb;
        e->layout[l] = (attn_layout)((first_layout + l) % (page_tokens % 16 ? 2 : 3));
        e->k[l] = e->v[l] = arena; // looked at, not read
        d = describe(e, l);
        kb = PAGES * attn_kv_page_bytes(&d, 0);
        vb = PAGES * attn_kv_page_bytes(&d, 1);
        CHECK(kb > 0 && vb > 0);
        e->k[l] = buffer(kb);
        e->v[l] = buffer(vb);
        memset(e->k[l], 0xa5, kb);
        memset(e->v[l], 0xa5, vb);
    }
}

static size_t token_bytes(const engine *e) {
    size_t n = 0;
    int l;
    for (l = 0; l < LAYERS; l++) {
        attn_desc d = describe(e, l);
        n += attn_kv_rows_bytes(&d, 0, 1) + attn_kv_rows_bytes(&d, 1, 1);
    }
    return n;
}

// Token by token: K, then V of every layer.
static int move(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    const engine *e = (const engine *)user;
    uint8_t *p = (uint8_t *)rows;
    int32_t t;
    int l, is_v;
    for (t = 0; t < n; t++)
        for (l = 0; l < LAYERS; l++)
            for (is_v = 0; is_v < 2; is_v++) {
                attn_desc d = describe(e, l);
                attn_result r = e->writing
                                    ? attn_kv_write_rows(&d, is_v, page, place + t, 1, p)
                                    : attn_kv_read_rows(&d, is_v, page, place + t, 1, p);
                if (r != ATTN_OK) return 1;
                p += attn_kv_rows_bytes(&d, is_v, 1);
            }
    return 0;
}

// Rows of many sizes, with zeros, denormals of f16 and the odd huge value: codes and scales differ
// from token to token. Exact arithmetic, so every machine fills in the same.
static void fill(test_rng *r, float *x, int n) {
    int32_t shift = test_below(r, 24), i;
    for (i = 0; i < n; i++) {
        x[i] = (float)(test_below(r, 4096) - 2048) / (float)(1 << shift);
        if (test_below(r, 40) == 0) x[i] = 0;
    }
}

static int32_t tokens[TOKENS];

// A sequence of TOKENS tokens, stored.
static int32_t make(engine *e) {
    test_rng r;
    attn_page_copy copies[2];
    int32_t seq, n_cached, n_copies = 0, t, l;
    int64_t slot;
    for (t = 0; t < TOKENS; t++) tokens[t] = (int32_t)((uint32_t)t * 0x01020305u & 0x7fffffffu);
    CHECK_EQ(attn_tree_insert(e->tree, 7, tokens, TOKENS, &seq, &n_cached, copies, 2, &n_copies),
             ATTN_OK);
    CHECK_EQ(n_cached, 0);
    attn_tree_pages(e->tree, seq, table, PAGES);
    for (l = 0; l < LAYERS; l++)
        for (r.state = (uint64_t)l, t = 0; t < TOKENS; t++) {
            attn_desc d = describe(e, l);
            float k[HEADS * DIM], v[HEADS * V_DIM];
            attn_tensor kt, vt;
            memset(&kt, 0, sizeof kt);
            kt.dtype = ATTN_F32;
            vt = kt;
            kt.data = k;
            vt.data = v;
            fill(&r, k, HEADS * DIM);
            fill(&r, v, HEADS * V_DIM);
            slot = (int64_t)table[t / e->page_tokens] * e->page_tokens + t % e->page_tokens;
            CHECK_EQ(attn_cpu_store(&d, &kt, &vt, &slot, 0, 1), ATTN_OK);
        }
    return seq;
}

static size_t save(engine *e, int32_t seq, uint8_t *blob) {
    size_t bytes = attn_tree_save_bytes(e->tree, seq, token_bytes(e));
    CHECK(bytes > 0 && bytes <= MAX_BLOB);
    e->writing = 0;
    CHECK_EQ(attn_tree_save(e->tree, seq, token_bytes(e), move, e, blob, bytes), ATTN_OK);
    return bytes;
}

// Attention of three queries over layer l of seq, PORTABLE, as hash material.
static void attend(const engine *e, int32_t seq, int l, float *o) {
    static float q[3 * Q_HEADS * DIM];
    attn_desc d;
    test_rng r;
    void *mem;
    size_t bytes, was = used;
    kv_len[0] = TOKENS, q_start[1] = 3;
    CHECK(attn_tree_pages(e->tree, seq, table, PAGES) > 0);
    r.state = 99;
    fill(&r, q, 3 * Q_HEADS * DIM);
    d = describe(e, l);
    d.numerics = ATTN_NUMERICS_PORTABLE;
    d.q.data = q, d.o.data = o;
    d.q.dtype = d.o.dtype = ATTN_F32;
    bytes = attn_cpu_forward_bytes(&d, 1);
    CHECK(bytes > 0);
    mem = buffer(bytes);
    CHECK_EQ(attn_cpu_forward(&d, mem, bytes, 1), ATTN_OK);
    used = was; // the next one's
}

// Loads the blob into engines of other page sizes and layouts, where everything must be as made.
static void load(uint8_t *blob, size_t bytes) {
    static const int32_t pages[3] = {16, 5, 32};
    static uint8_t again[MAX_BLOB];
    static float a[3 * Q_HEADS * V_DIM], b[3 * Q_HEADS * V_DIM];
    engine made, e;
    int32_t seq, mine, got[TOKENS], i, l;
    for (i = 0; i < 3; i++) {
        used = 0;
        engine_open(&made, 8, 0);
        mine = make(&made);
        engine_open(&e, pages[i], i);
        e.writing = 1;
        if (!CHECK_EQ(attn_tree_load(e.tree, 3, token_bytes(&e), move, NULL, &e, blob, bytes, &seq),
                      ATTN_OK))
            continue;
        CHECK_EQ(attn_tree_check(e.tree), ATTN_OK);
        CHECK_EQ(attn_tree_length(e.tree, seq), TOKENS);
        CHECK_EQ(attn_tree_tokens(e.tree, seq, 0, TOKENS, got), ATTN_OK);
        CHECK(memcmp(got, tokens, sizeof got) == 0);
        CHECK_EQ(save(&e, seq, again), bytes);
        CHECK(memcmp(again, blob, bytes) == 0);
        for (l = 0; l < LAYERS; l++) { // pages as this machine's kernels read them
            attend(&made, mine, l, a);
            attend(&e, seq, l, b);
            CHECK(memcmp(a, b, sizeof a) == 0);
        }
    }
    blob[bytes - 1] ^= 1; // and a broken one is refused
    used = 0;
    engine_open(&e, 16, 0);
    e.writing = 1;
    CHECK_EQ(attn_tree_load(e.tree, 3, token_bytes(&e), move, NULL, &e, blob, bytes, &seq),
             ATTN_ERR_CORRUPT);
}

int main(int argc, char **argv) {
    static uint8_t blob[MAX_BLOB + 1];
    engine e;
    size_t bytes = 0;
    FILE *f = NULL;
    int loading = argc == 3 && strcmp(argv[1], "load") == 0;
    if (argc != 1 && !loading && (argc != 3 || strcmp(argv[1], "save") != 0)) return 2;
    if (argc == 3 && !(f = fopen(argv[2], loading ? "rb" : "wb"))) {
        perror(argv[2]);
        return 2;
    }
    if (loading) bytes = fread(blob, 1, sizeof blob, f);
    else {
        engine_open(&e, 8, 0);
        bytes = save(&e, make(&e), blob);
        if (f) CHECK(fwrite(blob, 1, bytes, f) == bytes);
    }
    if (f) CHECK_EQ(fclose(f), 0);
    if (loading || argc == 1) load(blob, bytes);
    return TEST_END();
}

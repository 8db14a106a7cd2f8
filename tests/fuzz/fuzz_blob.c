/* fuzz_blob.c - saved branches: hostile blobs never corrupt a tree, valid ones round trip.
   cc -DFUZZ_MAIN -I. -Itests tests/fuzz/fuzz_blob.c -o fuzz_blob && ./fuzz_blob CORPUS

   The input loads a row of blobs into one small tree: bytes as they are, blobs written here with
   some field changed (the checksum set right again or not), and blobs the tree itself saved. What a
   blob must lead to is worked out from its bytes by a reader of its own. Callbacks fail on demand.
   The branch of every live sequence is saved again after every call and must not have changed. */
#include "fuzz.h"

#define ATTN_CORE_IMPLEMENTATION
#include "attn.h"

enum { MAX_SEQ = 4, MAX_ROW = 9, MAX_KV = 16 * 8 * MAX_ROW, MAX_BLOB = 4096 };

typedef struct model {
    fuzz_in in;
    attn_tree *t;
    int32_t pt, n_pages;
    size_t row;                  // bytes per token
    uint8_t kv[MAX_KV];          // (n_pages, pt, row)
    uint8_t *blob[MAX_SEQ];      // what each live sequence saves as; NULL: unused handle
    size_t size[MAX_SEQ];
    const uint8_t *load;         // the blob being loaded
    size_t load_size;
    int32_t fail_at, n_written, first_written;
} model;

static uint64_t le(const uint8_t *p, int n) {
    uint64_t v = 0;
    while (n-- > 0) v = v << 8 | p[n];
    return v;
}

static void put_le(uint8_t *p, uint64_t v, int n) {
    for (; n-- > 0; v >>= 8) *p++ = (uint8_t)v;
}

// ---- callbacks

static int read_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    model *m = (model *)user;
    FUZZ_CHECK(page >= 0 && page < m->n_pages && place >= 0 && n > 0 && place + n <= m->pt);
    memcpy(rows, m->kv + (size_t)(page * m->pt + place) * m->row, (size_t)n * m->row);
    return --m->fail_at == 0;
}

static int write_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    model *m = (model *)user;
    size_t at = (size_t)((const uint8_t *)rows - m->load), ids;
    int32_t token;
    FUZZ_CHECK(page >= 0 && page < m->n_pages && place >= 0 && n > 0 && place + n <= m->pt);
    // the rows are the blob's own, in ascending order and at the place of their tokens
    ids = 48 + 4 * (size_t)le(m->load + 16, 8);
    FUZZ_CHECK(at >= ids && at + (size_t)n * m->row <= m->load_size && (at - ids) % m->row == 0);
    token = (int32_t)((at - ids) / m->row);
    if (m->n_written == 0) m->first_written = token;
    FUZZ_CHECK(token == m->first_written + m->n_written && token % m->pt == place);
    m->n_written += n;
    if (--m->fail_at == 0) return 1;
    memcpy(m->kv + (size_t)(page * m->pt + place) * m->row, rows, (size_t)n * m->row);
    return 0;
}

static int copy_page(void *user, const attn_page_copy *c) {
    model *m = (model *)user;
    size_t page = (size_t)m->pt * m->row;
    FUZZ_CHECK(c->src >= 0 && c->src < m->n_pages && c->dst >= 0 && c->dst < m->n_pages);
    FUZZ_CHECK(c->n_tokens > 0 && c->n_tokens < m->pt && c->src != c->dst);
    memcpy(m->kv + page * (size_t)c->dst, m->kv + page * (size_t)c->src,
           (size_t)c->n_tokens * m->row);
    return --m->fail_at == 0;
}

// ---- what must hold

static uint8_t *save(model *m, int32_t s, size_t *size) {
    uint8_t *p;
    *size = attn_tree_save_bytes(m->t, s, m->row);
    FUZZ_CHECK(*size == 48 + (size_t)attn_tree_length(m->t, s) * (4 + m->row));
    p = (uint8_t *)fuzz_alloc(*size);
    m->fail_at = 0;
    FUZZ_CHECK(attn_tree_save(m->t, s, m->row, read_rows, m, p, *size - 1) == ATTN_ERR_BUFFER);
    FUZZ_CHECK(attn_tree_save(m->t, s, m->row, read_rows, m, p, *size) == ATTN_OK);
    return p;
}

static void verify(model *m) {
    int32_t s;
    FUZZ_CHECK(attn_tree_check(m->t) == ATTN_OK);
    for (s = 0; s < MAX_SEQ; s++) {
        size_t size;
        uint8_t *p;
        if (!m->blob[s]) {
            FUZZ_CHECK(attn_tree_length(m->t, s) == ATTN_ERR_NOT_FOUND);
            continue;
        }
        p = save(m, s, &size);
        FUZZ_CHECK(size == m->size[s] && memcmp(p, m->blob[s], size) == 0);
        free(p);
    }
}

// The verdict a blob deserves when there is room and no callback fails; sum: the right checksum.
static attn_result verdict(const uint8_t *p, size_t n, size_t row, uint64_t sum) {
    uint64_t tokens, bytes;
    if (n < 48 || memcmp(p, "attnblob", 8) != 0) return ATTN_ERR_CORRUPT;
    if (le(p + 8, 4) != 1) return ATTN_ERR_VERSION;
    tokens = le(p + 16, 8);
    bytes = le(p + 24, 8);
    if (le(p + 12, 4) != 48 || le(p + 32, 8) != n || le(p + 40, 8) != sum || bytes == 0)
        return ATTN_ERR_CORRUPT;
    if (tokens > n || (tokens > 0 && bytes > n) || bytes > (uint64_t)INT64_MAX - 4 ||
        48 + tokens * (4 + bytes) != n)
        return ATTN_ERR_CORRUPT;
    return bytes == row ? ATTN_OK : ATTN_ERR_SHAPE;
}

static void check_loaded(model *m, int32_t s, const uint8_t *p, size_t n) {
    int32_t tokens = (int32_t)le(p + 16, 8), hit = tokens - m->n_written;
    size_t size, rows = 48 + 4 * (size_t)tokens, from;
    uint8_t *again;
    FUZZ_CHECK(s >= 0 && s < MAX_SEQ && !m->blob[s]);
    FUZZ_CHECK(m->n_written == 0 || m->first_written == hit);
    again = save(m, s, &size);
    from = rows + (size_t)hit * m->row; // rows of tokens that were cached stay the tree's own
    FUZZ_CHECK(size == n && memcmp(again, p, 40) == 0);
    FUZZ_CHECK(memcmp(again + 48, p + 48, rows - 48) == 0);
    FUZZ_CHECK(memcmp(again + from, p + from, n - from) == 0);
    FUZZ_CHECK(hit > 0 || memcmp(again, p, n) == 0);
    m->blob[s] = again;
    m->size[s] = size;
}

static void load(model *m, uint8_t *p, size_t n) {
    uint64_t ns = fuzz_below(&m->in, 2) ? 7 : 0;
    int32_t s = -77, how = fuzz_below(&m->in, 8);
    attn_copy_fn copy = how == 1 ? NULL : copy_page;
    attn_tree_stats was, now;
    attn_result want = verdict(p, n, m->row, n < 48 ? 0 : attni_blob_sum(p, n)), r;
    m->load = p;
    m->load_size = n;
    m->n_written = 0;
    m->fail_at = how == 2 ? 1 + fuzz_below(&m->in, 4) : 0;
    memset(&was, 0, sizeof was);
    memset(&now, 0, sizeof now);
    attn_tree_get_stats(m->t, &was);
    r = attn_tree_load(m->t, ns, m->row, write_rows, copy, m, p, n, &s);
    attn_tree_get_stats(m->t, &now);
    if (r == ATTN_OK) {
        FUZZ_CHECK(want == ATTN_OK);
        check_loaded(m, s, p, n);
    } else {
        FUZZ_CHECK(r == want || (want == ATTN_OK && r == ATTN_ERR_FULL) ||
                   (want == ATTN_OK && r == ATTN_ERR_CALLBACK && how == 2) ||
                   (want == ATTN_OK && r == ATTN_ERR_ARGUMENT && how == 1));
        FUZZ_CHECK(s == -77 && now.n_seq == was.n_seq && now.tokens_hit == was.tokens_hit &&
                   now.tokens_missed == was.tokens_missed);
        if (want != ATTN_OK) FUZZ_CHECK(memcmp(&now, &was, sizeof now) == 0 && !m->n_written);
    }
    verify(m);
}

// ---- blobs

// A blob of a few tokens, often beginning like another one.
static uint8_t *write_blob(model *m, size_t *size) {
    int32_t n = fuzz_below(&m->in, 40), i, s = fuzz_below(&m->in, MAX_SEQ + 2), like = 0;
    uint8_t *p;
    uint64_t v;
    *size = 48 + (size_t)n * (4 + m->row);
    p = (uint8_t *)fuzz_alloc(*size);
    memset(p, 0, *size);
    memcpy(p, "attnblob", 8);
    put_le(p + 8, 1, 4);
    put_le(p + 12, 48, 4);
    put_le(p + 16, (uint64_t)n, 8);
    put_le(p + 24, m->row, 8);
    put_le(p + 32, *size, 8);
    if (s < MAX_SEQ && m->blob[s]) {
        like = (int32_t)le(m->blob[s] + 16, 8);
        if (like > n) like = n;
        like = fuzz_below(&m->in, like + 1);
        memcpy(p + 48, m->blob[s] + 48, 4 * (size_t)like);
    }
    for (i = like; i < n; i++) put_le(p + 48 + 4 * i, (uint64_t)fuzz_below(&m->in, 3), 4);
    v = fuzz_u8(&m->in);
    for (i = 48 + 4 * n; i < (int32_t)*size; i++) p[i] = (uint8_t)fuzz_random(&v);
    put_le(p + 40, attni_blob_sum(p, *size), 8);
    return p;
}

static void op_written(model *m) {
    static const int field[][2] = {{0, 8}, {8, 4}, {12, 4}, {16, 8}, {24, 8}, {32, 8}, {40, 8}};
    size_t n, cut;
    uint8_t *p = write_blob(m, &n), *q;
    int32_t edits = fuzz_below(&m->in, 4), how, f;
    for (; edits > 0; edits--) {
        how = fuzz_below(&m->in, 4);
        if (how == 0) {
            f = fuzz_below(&m->in, 7);
            put_le(p + field[f][0], (uint64_t)fuzz_edge(&m->in), field[f][1]);
        } else if (how == 1) {
            f = fuzz_below(&m->in, 7);
            p[field[f][0]] ^= (uint8_t)(1u << fuzz_below(&m->in, 8));
        } else if (how == 2) {
            p[fuzz_bits(&m->in, 2) % n] ^= (uint8_t)fuzz_u8(&m->in);
        } else { // a size that overflows into the right one: n * (4 + row) = size mod 2^64
            put_le(p + 16, ((uint64_t)1 << 63) + (n - 48) / (4 + m->row), 8);
        }
    }
    if (fuzz_below(&m->in, 2)) put_le(p + 40, attni_blob_sum(p, n), 8);
    cut = fuzz_below(&m->in, 4) ? n : fuzz_bits(&m->in, 2) % (n + 1);
    q = (uint8_t *)fuzz_copy(p, cut);
    free(p);
    if (cut < n && cut >= 48 && fuzz_below(&m->in, 2)) {
        put_le(q + 32, cut, 8);
        put_le(q + 40, attni_blob_sum(q, cut), 8);
    }
    load(m, q, cut);
    free(q);
}

static void op_raw(model *m) {
    size_t n = fuzz_bits(&m->in, 2) % MAX_BLOB;
    uint8_t *p;
    if (n > m->in.n) n = m->in.n;
    p = (uint8_t *)fuzz_copy(m->in.p, n);
    m->in.p += n;
    m->in.n -= n;
    if (n >= 48 && fuzz_below(&m->in, 2)) put_le(p + 40, attni_blob_sum(p, n), 8);
    load(m, p, n);
    free(p);
}

// Into a tree of its own with other page sizes: the same bytes come out again.
static void op_round_trip(model *m, int32_t s) {
    static model other;
    attn_tree_desc d;
    void *mem;
    size_t n = m->size[s], again;
    int32_t out = -1;
    uint8_t *p = (uint8_t *)fuzz_copy(m->blob[s], n), *q;
    memset(&other, 0, sizeof other);
    memset(&d, 0, sizeof d);
    d.page_tokens = other.pt = 1 + fuzz_below(&m->in, 8);
    d.n_pages = other.n_pages = 16 * 8 / other.pt;
    d.max_seq = 1;
    other.row = m->row;
    mem = fuzz_alloc(attn_tree_bytes(&d));
    FUZZ_CHECK(attn_tree_init(&d, mem, attn_tree_bytes(&d), &other.t) == ATTN_OK);
    other.load = p;
    other.load_size = n;
    FUZZ_CHECK(attn_tree_load(other.t, 1, m->row, write_rows, copy_page, &other, p, n, &out) ==
               ATTN_OK);
    q = save(&other, out, &again);
    FUZZ_CHECK(again == n && memcmp(q, p, n) == 0);
    FUZZ_CHECK(attn_tree_check(other.t) == ATTN_OK);
    free(q);
    free(p);
    free(mem);
}

static void op_release(model *m, int32_t s) {
    FUZZ_CHECK(attn_tree_release(m->t, s, fuzz_below(&m->in, 3) > 0) == ATTN_OK);
    free(m->blob[s]);
    m->blob[s] = NULL;
    verify(m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const size_t rows[4] = {1, 4, 8, MAX_ROW};
    static model m;
    attn_tree_desc d;
    void *mem;
    int32_t i, s, what;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    m.in.p = data;
    m.in.n = size;
    d.page_tokens = m.pt = 1 + fuzz_below(&m.in, 8);
    d.n_pages = m.n_pages = 1 + fuzz_below(&m.in, 16);
    d.max_seq = MAX_SEQ;
    if (fuzz_below(&m.in, 4) == 0) d.max_nodes = 2 + fuzz_below(&m.in, 12);
    m.row = rows[fuzz_below(&m.in, 4)];
    mem = fuzz_alloc(attn_tree_bytes(&d));
    FUZZ_CHECK(attn_tree_init(&d, mem, attn_tree_bytes(&d), &m.t) == ATTN_OK);
    for (i = 0; i < 60 && m.in.n > 0; i++) {
        what = fuzz_below(&m.in, 8);
        s = fuzz_below(&m.in, MAX_SEQ);
        if (what < 4) op_written(&m);
        else if (what < 5) op_raw(&m);
        else if (m.blob[s] && what < 6) op_round_trip(&m, s);
        else if (m.blob[s] && what < 7) load(&m, m.blob[s], m.size[s]);
        else if (m.blob[s]) op_release(&m, s);
    }
    for (s = 0; s < MAX_SEQ; s++)
        if (m.blob[s]) op_release(&m, s);
    free(mem);
    return 0;
}

/* HiP's selectors by their properties: what lists look like, hills and needles that a descent must
   find, stages cached over steps of decoding, pages, chunks and batches that must not matter.
   test_hip [SEED [COUNT]]
   cc -std=c11 -I. -Itests tests/test_hip.c -o test_hip -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"

enum { DIM = 16, MAX_SEQ = 4, MAX_POS = 4096 };

// Small integers by absolute position, so that every problem cut out of them has exact scores.
typedef struct source {
    int32_t n_heads, n_kv_heads;
    float *q, *k; // (MAX_SEQ, MAX_POS, heads, DIM)
} source;

typedef struct view {
    attn_desc d;
    int32_t q_start[MAX_SEQ + 1], q_pos0[MAX_SEQ], kv_len[MAX_SEQ], kv_pos0[MAX_SEQ];
    int32_t seq[MAX_SEQ]; // of the source
    void *q, *k, *v, *o;
    int32_t *table;
} view;

typedef struct lists {
    attn_selection x;
    void *mem, *scratch;
    size_t scratch_bytes;
    int32_t seq_row[MAX_SEQ];
} lists;

static void *zeroed(size_t bytes) {
    void *m = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!m) abort();
    memset(m, 0, (bytes + 127) & ~(size_t)63);
    return m;
}

static float *key_of(const source *s, int32_t seq, int32_t p, int32_t head) {
    return s->k + (((int64_t)seq * MAX_POS + p) * s->n_kv_heads + head) * DIM;
}
static float *query_of(const source *s, int32_t seq, int32_t p, int32_t head) {
    return s->q + (((int64_t)seq * MAX_POS + p) * s->n_heads + head) * DIM;
}

static void source_make(source *s, test_rng *r, int32_t n_heads, int32_t n_kv_heads) {
    size_t nq = (size_t)MAX_SEQ * MAX_POS * (size_t)n_heads * DIM, i;
    size_t nk = (size_t)MAX_SEQ * MAX_POS * (size_t)n_kv_heads * DIM;
    s->n_heads = n_heads;
    s->n_kv_heads = n_kv_heads;
    s->q = (float *)zeroed(4 * nq);
    s->k = (float *)zeroed(4 * nk);
    for (i = 0; i < nq; i++) s->q[i] = (float)(test_below(r, 9) - 4);
    for (i = 0; i < nk; i++) s->k[i] = (float)(test_below(r, 9) - 4);
}

static void source_free(source *s) {
    free(s->q);
    free(s->k);
}

// How a view stores what it sees.
typedef struct store {
    attn_layout layout;
    attn_dtype dtype;
    int32_t page_tokens; // 0: contiguous
} store;

static const store plain = {ATTN_HEAD_MAJOR, ATTN_F32, 0};

static void view_pages(view *v, const source *s, const store *how, test_rng *r) {
    int32_t n = v->d.n_seq, i, j, most = 1, total = 0, *deck;
    int64_t *slots;
    attn_kv *kv = &v->d.kv;
    attn_tensor k;
    for (i = 0; i < n; i++) most = attni_max32(most, v->kv_len[i]);
    kv->layout = how->layout;
    kv->k.dtype = how->dtype;
    kv->v.dtype = ATTN_F32;
    kv->page_tokens = how->page_tokens ? how->page_tokens : (most + 15) / 16 * 16;
    kv->page_table_stride = (most + kv->page_tokens - 1) / kv->page_tokens;
    kv->n_pages = n * (int32_t)kv->page_table_stride;
    deck = (int32_t *)zeroed(4 * (size_t)kv->n_pages);
    for (i = 0; i < kv->n_pages; i++) deck[i] = i;
    for (i = kv->n_pages - 1; i > 0 && how->page_tokens; i--) {
        int32_t other = test_below(r, i + 1), t = deck[i];
        deck[i] = deck[other];
        deck[other] = t;
    }
    v->table = deck;
    if (how->page_tokens) kv->page_table = deck;
    v->k = zeroed(attn_kv_page_bytes(&v->d, 0) * (size_t)kv->n_pages);
    v->v = zeroed(attn_kv_page_bytes(&v->d, 1) * (size_t)kv->n_pages);
    memset(v->k, 0xff, attn_kv_page_bytes(&v->d, 0) * (size_t)kv->n_pages); // NaN
    kv->k.data = v->k;
    kv->v.data = v->v;
    for (i = 0; i < n; i++) total += v->kv_len[i];
    slots = (int64_t *)zeroed(8 * (size_t)total);
    for (i = 0; i < n; i++) {
        for (j = 0; j < v->kv_len[i]; j++)
            slots[j] = (int64_t)deck[i * kv->page_table_stride + j / kv->page_tokens] *
                           kv->page_tokens + j % kv->page_tokens;
        memset(&k, 0, sizeof k);
        k.data = key_of(s, v->seq[i], v->kv_pos0[i], 0);
        k.dtype = ATTN_F32;
        CHECK_EQ(attn_cpu_store(&v->d, &k, NULL, slots, 0, v->kv_len[i]), ATTN_OK);
    }
    free(slots);
}

// Sequence i: positions [q_pos0, q_pos0 + q_len) of source sequence seq, keys [kv_pos0, kv_end).
static void view_add(view *v, int32_t seq, int32_t kv_pos0, int32_t q_pos0, int32_t q_len) {
    int32_t i = v->d.n_seq++;
    v->seq[i] = seq;
    v->kv_pos0[i] = kv_pos0;
    v->q_pos0[i] = q_pos0;
    v->kv_len[i] = q_pos0 + q_len - kv_pos0;
    v->q_start[i + 1] = v->q_start[i] + q_len;
}

static void view_make(view *v, const source *s, const store *how, test_rng *r) {
    int32_t i, t, h;
    float *q;
    v->d.n_heads = s->n_heads;
    v->d.n_kv_heads = s->n_kv_heads;
    v->d.head_dim = DIM;
    v->d.q_start = v->q_start;
    v->d.q_pos0 = v->q_pos0;
    v->d.kv.kv_len = v->kv_len;
    v->d.kv.kv_pos0 = v->kv_pos0;
    v->d.logits.scale = 0.25f;
    v->d.q.dtype = v->d.o.dtype = ATTN_F32;
    v->q = zeroed(4 * (size_t)(v->q_start[v->d.n_seq] * s->n_heads * DIM));
    v->o = zeroed(4 * (size_t)(v->q_start[v->d.n_seq] * s->n_heads * DIM));
    v->d.q.data = v->q;
    v->d.o.data = v->o;
    v->d.kv.k.data = v->d.kv.v.data = v->q;
    v->d.kv.n_pages = v->d.kv.page_tokens = 1;
    for (i = 0; i < v->d.n_seq; i++)
        for (t = v->q_start[i]; t < v->q_start[i + 1]; t++)
            for (h = 0; h < s->n_heads; h++) {
                q = query_of(s, v->seq[i], v->q_pos0[i] + t - v->q_start[i], h);
                memcpy((float *)v->q + ((int64_t)t * s->n_heads + h) * DIM, q, 4 * DIM);
            }
    view_pages(v, s, how, r);
}

static void view_free(view *v) {
    free(v->q);
    free(v->o);
    free(v->k);
    free(v->v);
    free(v->table);
    memset(v, 0, sizeof *v);
}

static void lists_init(lists *l, const attn_desc *d, const attn_select *s) {
    size_t bytes = attn_select_bytes(d, s);
    memset(l, 0, sizeof *l);
    CHECK(bytes > 0);
    l->mem = zeroed(bytes);
    CHECK_EQ(attn_selection_init(d, s, l->mem, bytes, l->seq_row, 0, &l->x), ATTN_OK);
}

// Selects in two calls, the later units first; the scratch ends where it says.
static void lists_select(lists *l, const attn_desc *d, const attn_select *s, const int32_t *slot) {
    int64_t n = attn_cpu_select_units(d, s), half = n / 2;
    size_t bytes = attn_cpu_select_scratch_bytes(d, s), i;
    int whole = 1;
    uint8_t *scratch = (uint8_t *)zeroed(bytes + 64);
    memset(scratch, 0xa5, bytes + 64);
    CHECK_EQ(attn_selection_follow(d, s, slot, &l->x), ATTN_OK);
    l->x.keeps_all = 0; // lists all the same
    CHECK_EQ(attn_cpu_select(d, s, NULL, &l->x, half, n - half, scratch), ATTN_OK);
    CHECK_EQ(attn_cpu_select(d, s, NULL, &l->x, 0, half, scratch), ATTN_OK);
    for (i = bytes; i < bytes + 64; i++) whole &= scratch[i] == 0xa5;
    CHECK(whole);
    free(scratch);
}

static void lists_free(lists *l) { free(l->mem); }

static void lists_make(lists *l, const attn_desc *d, const attn_select *s) {
    lists_init(l, d, s);
    lists_select(l, d, s, NULL);
}

// Entries of a list's row: of sequence seq, of the row block that holds position p.
static int32_t row_of(const lists *l, int32_t list, int32_t seq, int32_t p, const int32_t **b) {
    const attn_selection *x = &l->x;
    int64_t row = x->seq_row[seq] + p / x->list.row_block;
    int64_t at = list * ((int64_t)x->max_rows + 1) + row;
    *b = x->block + x->row_start[at];
    return (int32_t)(x->row_end[at] - x->row_start[at]);
}

static int32_t visited_of(const lists *l, int32_t list, int32_t seq, int32_t p) {
    int64_t row = l->x.seq_row[seq] + p / l->x.list.row_block;
    return l->x.visited[list * ((int64_t)l->x.max_rows + 1) + row];
}

static int same_row(const lists *a, int32_t seq_a, const lists *b, int32_t seq_b, int32_t list,
                    int32_t p) {
    const int32_t *u, *w;
    int32_t n = row_of(a, list, seq_a, p, &u), m = row_of(b, list, seq_b, p, &w);
    return n == m && !memcmp(u, w, 4 * (size_t)n);
}

// All rows of a view's sequence agree with another's.
static int same_rows(const view *v, const lists *a, int32_t seq_a, const lists *b, int32_t seq_b) {
    int32_t list, p, same = 1, first = v->q_pos0[seq_a];
    int32_t stop = first + v->q_start[seq_a + 1] - v->q_start[seq_a];
    for (list = 0; list < a->x.n_lists; list++)
        for (p = first; p < stop; p++) same &= same_row(a, seq_a, b, seq_b, list, p);
    return same;
}

static int holds(const lists *l, int32_t list, int32_t seq, int32_t p, int32_t key) {
    const int32_t *b;
    int32_t n = row_of(l, list, seq, p, &b), i;
    for (i = 0; i < n; i++)
        if (b[i] == key / l->x.list.kv_block) return 1;
    return 0;
}

// ---- parameters

static void random_stages(attn_select *s, test_rng *r) {
    static const int32_t chunks[] = {64, 32, 16, 8, 4};
    int32_t i, n = 1 + test_below(r, 3), c = test_below(r, 3), block = s->row_block;
    for (i = n - 1; i >= 0; i--) { // q blocks grow towards the first stage
        s->hip.stage[i].q_block = block;
        if (test_below(r, 3) == 0) block *= 2;
    }
    for (i = 0; i < n; i++, c += i < n ? test_below(r, 2) : 0) {
        attn_hip_stage *t = s->hip.stage + i;
        c = attni_min32(c, 4);
        t->chunk = chunks[c];
        t->q_stride = test_below(r, 5);
        t->keep = i ? t[-1].chunk * (1 + test_below(r, 12)) : 0;
        t->refresh = test_below(r, 4);
        t->terminate = test_below(r, 3) ? 0 : 1 + test_below(r, 8);
        t->flags = test_below(r, 2) ? ATTN_HIP_LAST_SCORE : 0;
        if (i && test_below(r, 3) == 0) t->flags |= ATTN_HIP_CENTRE;
        if (i && test_below(r, 3) == 0) t->flags |= ATTN_HIP_KEEP_SCORES;
    }
    s->hip.n_stages = n;
    s->kv_block = s->hip.stage[n - 1].chunk;
}

static void random_select(attn_select *s, test_rng *r) {
    memset(s, 0, sizeof *s);
    s->kind = (attn_select_kind)(ATTN_SELECT_HIP1 + test_below(r, 3));
    s->heads = (attn_select_heads)test_below(r, 4);
    s->row_block = 8 << test_below(r, 4);
    s->kv_block = 1 << test_below(r, 5);
    if (s->kind == ATTN_SELECT_HIP3) random_stages(s, r);
    s->hip.keep = s->kv_block * (1 + test_below(r, 20));
    s->hip.sink = test_below(r, 4) ? s->kv_block * test_below(r, 6) : -1;
    if (!s->hip.sink) s->hip.sink = s->kv_block;
    s->hip.window = test_below(r, 4) ? 1 + test_below(r, 150) : -1;
    if (s->kind == ATTN_SELECT_HIP3) return;
    s->hip.block = test_below(r, 2) ? 0 : 1 << test_below(r, 3);
    if (s->hip.block > s->kv_block) s->hip.block = 0;
    s->hip.q_group = test_below(r, 3);
    s->hip.q_stride = test_below(r, 5);
    s->hip.k_stride = test_below(r, 4);
    s->hip.low_dim = test_below(r, 3) ? 0 : 1 + test_below(r, DIM + 4);
    s->hip.refresh = test_below(r, 4);
    s->hip.near = test_below(r, 3) ? 0 : test_below(r, 5);
    s->hip.near_window = test_below(r, 4);
    s->hip.vertical = test_below(r, 3) ? 0 : test_below(r, 5);
    s->hip.diagonal = test_below(r, 3) ? 0 : test_below(r, 3);
    s->hip.random = test_below(r, 3) ? 0 : test_below(r, 6);
    s->hip.seed = test_u64(r);
    if (s->kind == ATTN_SELECT_HIP1) s->hip.patches = test_below(r, s->hip.keep + 1);
    else s->hip.sample = (attn_hip_sample)test_below(r, 6);
    if (s->kind == ATTN_SELECT_HIP2 && s->heads <= ATTN_SELECT_EACH && !test_below(r, 4)) {
        s->heads = ATTN_SELECT_EACH;
        s->hip.head_group = 2;
    }
}

// ---- tests

// What every row must look like, and how many entries it has where that is certain.
static void check_rows(const view *v, const attn_select *s, const lists *l) {
    int32_t list, i, j, p, sorted = 1, inside = 1, few = 1;
    for (i = 0; i < v->d.n_seq; i++)
        for (list = 0; list < l->x.n_lists; list++)
            for (p = v->q_pos0[i]; p < v->q_pos0[i] + v->q_start[i + 1] - v->q_start[i]; p++) {
                const int32_t *b, rb = l->x.list.row_block, kb = l->x.list.kv_block;
                int32_t n = row_of(l, list, i, p, &b);
                int32_t last = attni_min32(v->q_pos0[i] + v->q_start[i + 1] - v->q_start[i],
                                           (p / rb + 1) * rb) - 1;
                for (j = 1; j < n; j++) sorted &= b[j] > b[j - 1];
                if (n) inside &= b[0] >= 0 && (b[0] + 1) * kb > v->kv_pos0[i];
                if (n) inside &= b[n - 1] * kb <= last;
                if (v->kv_len[i] <= s->dense_below) continue;
                if (n) inside &= b[0] * kb >= l->x.keep_sink / kb * kb;
                if (s->kind == ATTN_SELECT_HIP3) few &= n <= attni_or(s->hip.keep, 2048) / kb;
            }
    CHECK(sorted);
    CHECK(inside);
    CHECK(few);
}

// Any parameters, batch, pages and layout: rows are well formed; a batch is its sequences one by
// one; chunks at row blocks of the whole are the whole; pages do not matter.
static void test_random(uint64_t seed, int count) {
    static const attn_layout layouts[] = {ATTN_TOKEN_MAJOR, ATTN_HEAD_MAJOR, ATTN_K16};
    int i;
    for (i = 0; i < count; i++) {
        test_rng r = {seed + (uint64_t)i};
        source src;
        attn_select s;
        view whole = {0}, part = {0};
        lists a, b;
        store how = plain;
        int32_t q, n_seq = 1 + test_below(&r, 3), group = 1 + test_below(&r, 2), most = 0, at;
        int failed = (int)test_failed;
        random_select(&s, &r);
        if (s.hip.head_group) group = 2;
        source_make(&src, &r, 2 * group, 2);
        if (test_below(&r, 4) == 0) s.dense_below = test_below(&r, 300);
        for (q = 0; q < n_seq; q++) {
            int32_t pos0 = test_below(&r, 2) ? test_below(&r, 700) : 0;
            int32_t evicted = test_below(&r, 3) ? 0 : test_below(&r, pos0 + 1);
            view_add(&whole, q, evicted, pos0, test_below(&r, 5) ? test_below(&r, 300) : 1);
        }
        view_make(&whole, &src, &plain, &r);
        if (whole.q_start[n_seq]) {
            lists_make(&a, &whole.d, &s);
            check_rows(&whole, &s, &a);
            for (q = 0; q < n_seq; q++) {
                int32_t q_len = whole.q_start[q + 1] - whole.q_start[q];
                if (!q_len) continue;
                how.layout = layouts[test_below(&r, 3)];
                how.page_tokens = how.layout == ATTN_K16 ? 16 : 1 + test_below(&r, 40);
                view_add(&part, q, whole.kv_pos0[q], whole.q_pos0[q], q_len);
                view_make(&part, &src, &how, &r);
                lists_make(&b, &part.d, &s);
                CHECK(same_rows(&part, &b, 0, &a, q));
                lists_free(&b);
                view_free(&part);
                // the same up to a border of q blocks (a chunk's keys end with it)
                most = s.kind == ATTN_SELECT_HIP3 ? s.hip.stage[0].q_block
                                                  : s.row_block * attni_max32(1, s.hip.q_group);
                at = (whole.q_pos0[q] / most + 1) * most;
                if (at >= whole.q_pos0[q] + q_len || s.dense_below) continue;
                view_add(&part, q, whole.kv_pos0[q], whole.q_pos0[q], at - whole.q_pos0[q]);
                view_add(&part, q, whole.kv_pos0[q], at, whole.q_pos0[q] + q_len - at);
                view_make(&part, &src, &how, &r);
                lists_make(&b, &part.d, &s);
                CHECK(same_rows(&part, &b, 0, &a, q) && same_rows(&part, &b, 1, &a, q));
                lists_free(&b);
                view_free(&part);
            }
            lists_free(&a);
        }
        view_free(&whole);
        source_free(&src);
        if (test_failed > failed) printf("    seed %llu\n", (unsigned long long)seed + i);
    }
}

// q . k = -|k - top| for all heads: a hill that every descent must climb.
static void source_hill(source *s, int32_t seq, int32_t top) {
    int32_t p, h, e;
    for (p = 0; p < MAX_POS; p++) {
        for (h = 0; h < s->n_kv_heads; h++)
            for (e = 0; e < DIM; e++)
                key_of(s, seq, p, h)[e] = e ? 0 : (float)-(p > top ? p - top : top - p);
        for (h = 0; h < s->n_heads; h++)
            for (e = 0; e < DIM; e++) query_of(s, seq, p, h)[e] = e ? 0 : 1;
    }
}

// The same score everywhere but at one key.
static void source_needle(source *s, int32_t seq, int32_t at) {
    int32_t h, p;
    source_hill(s, seq, 0);
    for (p = 0; p < MAX_POS; p++)
        for (h = 0; h < s->n_kv_heads; h++) key_of(s, seq, p, h)[0] = p == at ? 9 : 1;
}

static void one_query(view *v, const source *src, int32_t pos0, int32_t q_len) {
    view_add(v, 0, 0, pos0, q_len);
    view_make(v, src, &plain, NULL);
}

static void test_hills(uint64_t seed) {
    test_rng r = {seed};
    source src;
    attn_select s;
    int kind, i;
    source_make(&src, &r, 4, 2);
    for (i = 0; i < 40; i++)
        for (kind = ATTN_SELECT_HIP2; kind <= ATTN_SELECT_HIP3; kind++) {
            view v = {0};
            lists l;
            int32_t top = 300 + test_below(&r, 2400), list;
            const int32_t *b;
            source_hill(&src, 0, top);
            one_query(&v, &src, 4000, 64);
            memset(&s, 0, sizeof s);
            s.kind = (attn_select_kind)kind;
            s.heads = (attn_select_heads)test_below(&r, 4);
            s.hip.keep = 64;
            lists_make(&l, &v.d, &s);
            for (list = 0; list < l.x.n_lists; list++) {
                CHECK(holds(&l, list, 0, 4000, top));
                CHECK_EQ(row_of(&l, list, 0, 4000, &b), 64 / l.x.list.kv_block);
            }
            if (kind == ATTN_SELECT_HIP3) // the chunks around the top are all that is kept
                CHECK(holds(&l, 0, 0, 4000, top - 24) && holds(&l, 0, 0, 4000, top + 24));
            lists_free(&l);
            view_free(&v);
        }
    { // a q block larger than a chunk: what the last queries' window leaves out is not lost
        view v = {0};
        lists l;
        source_hill(&src, 0, 2047 - 20);
        one_query(&v, &src, 1792, 256);
        memset(&s, 0, sizeof s);
        s.kind = ATTN_SELECT_HIP3;
        s.row_block = 256;
        s.hip.keep = 64;
        s.hip.window = 16;
        s.hip.n_stages = 1;
        s.hip.stage[0].q_block = 256;
        s.hip.stage[0].chunk = 8;
        lists_make(&l, &v.d, &s);
        CHECK(holds(&l, 0, 0, 2047, 2047 - 20));
        lists_free(&l);
        view_free(&v);
    }
    source_free(&src);
}

// A lone key among equal ones: an oracle sample and verticals find it anywhere, the descent at a
// chunk's end (ties go right), a landmark anywhere.
static void test_needles(uint64_t seed) {
    test_rng r = {seed};
    source src;
    int i;
    source_make(&src, &r, 4, 2);
    for (i = 0; i < 12; i++) {
        view v = {0};
        lists l;
        attn_select s;
        int32_t at = 256 + test_below(&r, 2600), h, list, p;
        float *mark;
        source_needle(&src, 0, at);
        one_query(&v, &src, 3900, 128);
        memset(&s, 0, sizeof s);
        s.kind = ATTN_SELECT_HIP2;
        s.hip.keep = 32;
        s.hip.sample = ATTN_HIP_ORACLE;
        lists_make(&l, &v.d, &s);
        for (list = 0; list < 4; list++) CHECK(holds(&l, list, 0, 3950, at));
        lists_free(&l);
        s.kind = i % 2 ? ATTN_SELECT_HIP1 : ATTN_SELECT_HIP2;
        s.hip.sample = ATTN_HIP_FIRST;
        s.hip.vertical = 1;
        lists_make(&l, &v.d, &s);
        for (list = 0; list < 4; list++) CHECK(holds(&l, list, 0, 3950, at));
        lists_free(&l);
        memset(&s, 0, sizeof s);
        s.kind = ATTN_SELECT_HIP3;
        s.hip.keep = 64;
        mark = (float *)zeroed(4 * (size_t)(v.d.kv.n_pages * 2 * v.d.kv.page_tokens));
        for (h = 0; h < 2; h++) mark[h * v.d.kv.page_tokens + at] = 1;
        s.hip.landmark = mark;
        s.hip.n_stages = 2;
        s.hip.stage[0].q_block = s.hip.stage[1].q_block = 64;
        s.hip.stage[0].chunk = 128;
        s.hip.stage[1].chunk = 8;
        s.hip.stage[1].keep = 256;
        s.hip.stage[0].flags = s.hip.stage[1].flags = ATTN_HIP_LANDMARK;
        lists_make(&l, &v.d, &s);
        CHECK(holds(&l, 0, 0, 3950, at));
        lists_free(&l);
        free(mark);
        // the last key of a chunk of every stage
        p = 256 + 256 * test_below(&r, 9) + 255;
        source_needle(&src, 0, p);
        view_free(&v);
        one_query(&v, &src, 3900, 128);
        memset(&s, 0, sizeof s);
        s.kind = ATTN_SELECT_HIP3;
        s.hip.keep = 64;
        lists_make(&l, &v.d, &s);
        CHECK(holds(&l, 0, 0, 3950, p));
        lists_free(&l);
        view_free(&v);
    }
    source_free(&src);
}

// Equal scores everywhere: the lowest indices.
static void test_ties(uint64_t seed) {
    test_rng r = {seed};
    source src;
    attn_select s;
    view v = {0};
    lists l;
    const int32_t *b;
    int32_t i, n, ok = 1;
    source_make(&src, &r, 2, 1);
    source_needle(&src, 0, MAX_POS);
    one_query(&v, &src, 3000, 256);
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP3;
    lists_make(&l, &v.d, &s);
    n = row_of(&l, 0, 0, 3100, &b);
    CHECK_EQ(n, 256);
    for (i = 0; i < n; i++) ok &= b[i] == 256 / 8 + i;
    CHECK(ok);
    lists_free(&l);
    s.kind = ATTN_SELECT_HIP2;
    lists_make(&l, &v.d, &s);
    for (n = row_of(&l, 0, 0, 3100, &b), i = 0; i < n; i++) ok &= b[i] == 16 / 2 + i;
    CHECK(ok);
    CHECK_EQ(n, 256);
    lists_free(&l);
    view_free(&v);
    for (i = 0; i < MAX_POS; i++) { // 0 and -0
        memset(query_of(&src, 0, i, 0), 0, 4 * 2 * DIM);
        key_of(&src, 0, i, 0)[0] = (float)test_below(&r, 3) - 1;
    }
    one_query(&v, &src, 3000, 256);
    lists_make(&l, &v.d, &s);
    for (n = row_of(&l, 0, 0, 3100, &b), i = 0; i < n; i++) ok &= b[i] == 16 / 2 + i;
    CHECK(ok);
    lists_free(&l);
    view_free(&v);
    source_free(&src);
}

// The score of chunk j of stage t for one query, by the comment in attn.h; one KV head.
static float descent(const source *s, const attn_select *f, const attn_hip_stage *t, int32_t p,
                     int32_t j) {
    int32_t lo = 0, hi = t->chunk, l = f->hip.sink + j * t->chunk, i, h, e;
    float best = -HUGE_VALF;
    do {
        int32_t mid = (lo + hi) / 2, at[2];
        float got[2];
        at[0] = l + (lo + mid) / 2;
        at[1] = l + (mid + hi) / 2;
        for (i = 0; i < 2; i++) {
            got[i] = -HUGE_VALF;
            for (h = 0; h < s->n_heads && at[i] <= p; h++) {
                float sum = 0;
                for (e = 0; e < DIM; e++)
                    sum += query_of(s, 0, p, h)[e] * key_of(s, 0, at[i], 0)[e];
                if (sum > got[i]) got[i] = sum;
            }
            if (got[i] > best) best = got[i];
        }
        if (got[0] > got[1]) hi = mid;
        else lo = mid;
    } while (hi - lo >= 2);
    return best;
}

// The keep / c best of chunks, of those that begin up to lim. Marks them in kept.
static void best_of(const source *s, const attn_select *f, const attn_hip_stage *t, int32_t p,
                    const uint8_t *open, int32_t n, int32_t want, uint8_t *kept) {
    int32_t j, lim = p + f->hip.stage[0].chunk - f->hip.window;
    memset(kept, 0, (size_t)n);
    for (; want > 0; want--) {
        int32_t best = -1;
        float top = 0;
        for (j = 0; j < n; j++) {
            float x;
            if (!open[j] || kept[j] || f->hip.sink + j * t->chunk > attni_min32(lim, p)) continue;
            x = descent(s, f, t, p, j);
            if (best >= 0 && !(x > top)) continue;
            best = j;
            top = x;
        }
        if (best >= 0) kept[best] = 1;
    }
}

// Decoding with a cached first stage: the list is a scan of what that stage admitted when it was
// last due, or stays; from scratch after a gap, a forget or a prefill.
static void test_refresh(uint64_t seed) {
    test_rng r = {seed};
    source src;
    attn_select s;
    lists l, fresh;
    uint8_t open[512], admitted[512], pieces[512], kept[512];
    const int32_t *b;
    int32_t p, i, n, last = -1, stays = 0, scans = 0;
    source_make(&src, &r, 4, 1);
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP3;
    s.n_slots = 3;
    s.max_kv_len = 2000;
    s.hip.sink = 32;
    s.hip.window = 64;
    s.hip.keep = 64;
    s.hip.n_stages = 2;
    s.hip.stage[0].q_block = s.hip.stage[1].q_block = 64;
    s.hip.stage[0].chunk = 32;
    s.hip.stage[1].chunk = s.kv_block = 8;
    s.hip.stage[1].keep = 320;
    s.hip.stage[0].refresh = 9;
    s.hip.stage[1].refresh = 3;
    memset(open, 1, sizeof open);
    for (p = 1000; p < 1060; p++) {
        view v = {0};
        int32_t slot = 2, ok = 1, from;
        one_query(&v, &src, p, 1);
        if (p == 1000) lists_init(&l, &v.d, &s);
        if (p == 1030) p = 1031, view_free(&v), one_query(&v, &src, p, 1); // a step goes missing
        if (p == 1040) attn_cpu_select_forget(&l.x, 2);
        lists_select(&l, &v.d, &s, &slot);
        lists_make(&fresh, &v.d, &s);
        from = last != p - 1 || p == 1040 || p % 9 == 0 ? 0 : p % 3 == 0 ? 1 : 2;
        if (from == 0) {
            best_of(&src, &s, s.hip.stage, p, open, 64, 320 / 32, admitted);
            CHECK(same_row(&l, 0, &fresh, 0, 0, p));
        }
        if (from <= 1) {
            for (i = 0; i < 256; i++) pieces[i] = admitted[i / 4];
            best_of(&src, &s, s.hip.stage + 1, p, pieces, 256, 64 / 8, kept);
            scans++;
        } else stays++;
        CHECK_EQ(visited_of(&l, 0, 0, p) == 0, from == 2);
        n = row_of(&l, 0, 0, p, &b);
        CHECK_EQ(n, 8);
        for (i = 0; i < n; i++) ok &= kept[b[i] - 4];
        CHECK(ok);
        last = p;
        lists_free(&fresh);
        view_free(&v);
    }
    CHECK(stays > 30 && scans > 15);
    lists_free(&l);
    source_free(&src);
}

// Sequences change their places in the batch, not their slots; one slot takes another sequence
// after a forget; a prefill in between makes the next step a scan.
static void test_slots(uint64_t seed, int kind) {
    test_rng r = {seed};
    source src;
    attn_select s;
    lists l, alone[2], fresh;
    int32_t p, list, i;
    source_make(&src, &r, 4, 2);
    memset(&s, 0, sizeof s);
    s.kind = (attn_select_kind)kind;
    s.n_slots = 2;
    s.max_kv_len = 2000;
    s.max_rows = 6;
    s.hip.sink = 32;
    s.hip.window = 64;
    s.hip.keep = 64;
    s.hip.refresh = 16;
    for (p = 1001; p < 1014; p++) {
        view both = {0}, one[2];
        int32_t slot[2] = {1, 0}, zero = 0, swap = p % 2;
        if (swap) slot[0] = 0, slot[1] = 1;
        memset(one, 0, sizeof one);
        for (i = 0; i < 2; i++) { // sequence 0 in slot 1, sequence 1 in slot 0
            view_add(&both, swap ? 1 - i : i, 0, p, 1);
            view_add(&one[i], i, 0, p, 1);
            view_make(&one[i], &src, &plain, &r);
        }
        view_make(&both, &src, &plain, &r);
        if (p == 1001) {
            lists_init(&l, &both.d, &s);
            for (i = 0; i < 2; i++) lists_init(&alone[i], &one[i].d, &s);
        }
        lists_select(&l, &both.d, &s, slot);
        for (i = 0; i < 2; i++) {
            lists_select(&alone[i], &one[i].d, &s, &zero);
            for (list = 0; list < l.x.n_lists; list++) {
                CHECK(same_row(&l, swap ? 1 - i : i, &alone[i], 0, list, p));
                CHECK_EQ(visited_of(&l, list, swap ? 1 - i : i, p),
                         visited_of(&alone[i], list, 0, p));
            }
        }
        for (i = 0; i < 2; i++) view_free(&one[i]);
        view_free(&both);
    }
    { // sequence 2 takes slot 1 at the position that slot 1 waits for
        view v = {0};
        int32_t slot = 1, zero = 0;
        view_add(&v, 2, 0, p, 1);
        view_make(&v, &src, &plain, &r);
        attn_cpu_select_forget(&l.x, 1);
        lists_select(&l, &v.d, &s, &slot);
        lists_init(&fresh, &v.d, &s);
        lists_select(&fresh, &v.d, &s, &zero);
        for (list = 0; list < l.x.n_lists; list++) {
            CHECK(same_row(&l, 0, &fresh, 0, list, p));
            CHECK(visited_of(&l, list, 0, p) > 0);
        }
        view_free(&v);
        view_add(&v, 2, 0, p + 1, 4); // several queries: the rows behind the slots
        view_make(&v, &src, &plain, &r);
        lists_select(&l, &v.d, &s, NULL);
        CHECK(l.seq_row[0] + (p + 1) / 64 == 2);
        view_free(&v);
        view_add(&v, 2, 0, p + 5, 1);
        view_make(&v, &src, &plain, &r);
        lists_select(&l, &v.d, &s, &slot);
        CHECK(visited_of(&l, 0, 0, p + 5) > 0);
        view_free(&v);
        lists_free(&fresh);
    }
    for (i = 0; i < 2; i++) lists_free(&alone[i]);
    lists_free(&l);
    source_free(&src);
}

// Extras add, groups of heads share, coarse blocks hold the fine ones, dense means dense.
static void test_options(uint64_t seed) {
    test_rng r = {seed};
    source src;
    attn_select s, t;
    view v = {0};
    lists a, b;
    const int32_t *x, *y;
    int32_t list, n, i, j, p = 2010, sum;
    source_make(&src, &r, 4, 2);
    one_query(&v, &src, 2000, 48);
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP2;
    s.hip.keep = 64;
    lists_make(&a, &v.d, &s);
    for (i = 0; i < 5; i++) {
        t = s;
        if (i == 0) t.hip.near = 8, t.hip.near_window = 2;
        if (i == 1) t.hip.vertical = 40;
        if (i == 2) t.hip.diagonal = 3;
        if (i == 3) t.hip.random = 40;
        if (i == 4) t.kv_block = 16, t.hip.block = 2;
        lists_make(&b, &v.d, &t);
        for (list = 0; list < 4; list++) {
            int32_t m = row_of(&a, list, 0, p, &x), all = 1;
            n = row_of(&b, list, 0, p, &y);
            CHECK(i == 4 ? n <= m && n >= m / 8 : n > m);
            for (j = 0; j < m; j++) all &= holds(&b, list, 0, p, 2 * x[j]);
            CHECK(all);
            if (i == 1) CHECK(n >= 40);
            if (i == 2) CHECK(n <= m + 3 * (1 + 24));
        }
        lists_free(&b);
    }
    t = s;
    t.hip.head_group = 2;
    lists_make(&b, &v.d, &t);
    for (list = 0; list < 4; list += 2) {
        sum = row_of(&b, list, 0, p, &x);
        CHECK(sum != 32); // random heads do not share evenly
        CHECK_EQ(sum + row_of(&b, list + 1, 0, p, &x), 64);
    }
    lists_free(&b);
    t = s;
    t.dense_below = 2048;
    lists_make(&b, &v.d, &t);
    CHECK_EQ(row_of(&b, 3, 0, 2047, &x), 1024);
    CHECK(x[0] == 0 && x[1023] == 1023);
    lists_free(&b);
    t.dense_below = 2047;
    lists_make(&b, &v.d, &t);
    CHECK(row_of(&b, 3, 0, 2047, &x) == row_of(&a, 3, 0, 2047, &y));
    lists_free(&b);
    t = s;
    t.hip.sink = t.hip.window = -1;
    lists_make(&b, &v.d, &t);
    CHECK(b.x.keep_sink == 0 && b.x.keep_recent == 0);
    lists_free(&b);
    lists_free(&a);
    view_free(&v);
    source_free(&src);
}

// Blocks of four queries that begin in the middle of one: only every second query matters to HIP2;
// runs of four are those of the positions; a diagonal is followed for all of the block.
static void test_queries(uint64_t seed) {
    test_rng r = {seed};
    source src;
    attn_select s;
    lists a, b;
    int32_t p, h, e, list;
    source_make(&src, &r, 4, 2);
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP2;
    s.hip.keep = 64;
    {
        view v = {0}, w = {0};
        one_query(&v, &src, 2005, 90);
        for (p = 2006; p < 2094; p += 2) memset(query_of(&src, 0, p, 0), 0, 4 * 4 * DIM);
        one_query(&w, &src, 2005, 90);
        lists_make(&a, &v.d, &s);
        lists_make(&b, &w.d, &s);
        CHECK(same_rows(&v, &a, 0, &b, 0));
        lists_free(&a);
        lists_free(&b);
        view_free(&v);
        view_free(&w);
    }
    for (p = 2000; p < 2100; p++)
        for (h = 0; h < 4; h++)
            for (e = 0; e < DIM; e++)
                query_of(&src, 0, p, h)[e] = (p / 4 % 2 ? 1 : -1) * query_of(&src, 0, 1, h)[e];
    s.kind = ATTN_SELECT_HIP3;
    s.hip.n_stages = 1;
    s.hip.stage[0].q_block = 64;
    s.hip.stage[0].chunk = 8;
    {
        view v = {0};
        one_query(&v, &src, 2002, 90);
        lists_make(&a, &v.d, &s);
        s.hip.stage[0].q_stride = 4;
        lists_make(&b, &v.d, &s);
        CHECK(same_rows(&v, &a, 0, &b, 0));
        lists_free(&a);
        lists_free(&b);
        view_free(&v);
    }
    { // runs of 4, 4 and 1 queries: their means, not sums or firsts, decide between three keys
        view v = {0};
        const int32_t *x;
        attn_select one = s;
        source_needle(&src, 0, MAX_POS);
        for (p = 0; p < MAX_POS; p++) {
            int32_t run = p >= 2056 ? 2 : (p - 2048) / 4 % 2;
            for (h = 0; h < 2; h++) {
                memset(key_of(&src, 0, p, h), 0, 4 * DIM);
                if (p == 400) key_of(&src, 0, p, h)[0] = 9;
                if (p == 600) key_of(&src, 0, p, h)[1] = 3;
                if (p == 900) key_of(&src, 0, p, h)[2] = 2;
            }
            for (h = 0; h < 4; h++) {
                memset(query_of(&src, 0, p, h), 0, 4 * DIM);
                query_of(&src, 0, p, h)[run] = run == 0 ? (p % 2 ? -1 : 1) : (float)run;
            }
        }
        one_query(&v, &src, 2048, 9);
        one.kv_block = one.hip.stage[0].chunk = one.hip.keep = 1;
        lists_make(&a, &v.d, &one);
        CHECK_EQ(row_of(&a, 0, 0, 2048, &x), 1);
        CHECK_EQ(x[0], 900);
        lists_free(&a);
        view_free(&v);
    }
    {
        view v = {0};
        source_needle(&src, 0, 1000);
        one_query(&v, &src, 2048, 64);
        s.kind = ATTN_SELECT_HIP2;
        s.hip.diagonal = 1;
        lists_make(&a, &v.d, &s);
        for (list = 0; list < 4; list++)
            for (p = 1000; p >= 1000 - 63; p--) CHECK(holds(&a, list, 0, 2100, p));
        lists_free(&a);
        view_free(&v);
    }
    source_free(&src);
}

// What a stage admits around the representative of the head that found it; keys that come after a
// q block's queries do not matter to it.
static void test_stages(uint64_t seed) {
    test_rng r = {seed};
    source src;
    attn_select s;
    lists a, b;
    int32_t p, i;
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP3;
    s.hip.keep = 64;
    s.hip.n_stages = 2;
    s.hip.stage[0].q_block = s.hip.stage[1].q_block = 64;
    s.hip.stage[0].chunk = s.hip.stage[1].keep = 64;
    s.hip.stage[1].chunk = 8;
    s.hip.stage[1].flags = ATTN_HIP_CENTRE;
    source_make(&src, &r, 4, 2);
    {
        view v = {0};
        source_hill(&src, 0, 256 + 640);
        for (p = 0; p < MAX_POS; p++) key_of(&src, 0, p, 0)[0] = -5000;
        one_query(&v, &src, 3000, 64);
        lists_make(&a, &v.d, &s);
        CHECK(holds(&a, 0, 0, 3000, 256 + 640 - 32) && holds(&a, 0, 0, 3000, 256 + 640 + 31));
        lists_free(&a);
        view_free(&v);
    }
    source_free(&src);
    source_make(&src, &r, 4, 2);
    s.hip.n_stages = 1;
    s.hip.window = -1;
    s.kv_block = 64;
    s.hip.sink = -1;
    s.hip.stage[0].chunk = 64;
    s.row_block = s.hip.stage[0].q_block = 16;
    s.hip.keep = 64 * 8;
    {
        view v = {0};
        one_query(&v, &src, 1024, 320);
        lists_make(&a, &v.d, &s);
        for (i = 0; i < 20; i++) {
            view w = {0};
            one_query(&w, &src, 1024 + 16 * i, 16);
            lists_make(&b, &w.d, &s);
            CHECK(same_rows(&w, &b, 0, &a, 0));
            lists_free(&b);
            view_free(&w);
        }
        lists_free(&a);
        view_free(&v);
    }
    source_free(&src);
}

// Few keys, fewer than the sink, none that may be selected, everything kept; NaN.
static void test_degenerate(uint64_t seed) {
    static const int32_t at[][3] = {{0, 0, 1}, {0, 0, 7}, {0, 5, 3}, {0, 270, 1}, {200, 270, 9},
                                    {300, 300, 2}, {1000, 1100, 70}, {0, 2000, 64}};
    test_rng r = {seed};
    source src;
    int kind, i, j;
    source_make(&src, &r, 4, 2);
    for (kind = ATTN_SELECT_HIP1; kind <= ATTN_SELECT_HIP3; kind++)
        for (i = 0; i < 8; i++)
            for (j = 0; j < 2; j++) {
                view v = {0};
                lists l;
                attn_select s;
                view_add(&v, 0, at[i][0], at[i][1], at[i][2]);
                view_make(&v, &src, &plain, &r);
                memset(&s, 0, sizeof s);
                s.kind = (attn_select_kind)kind;
                if (j) { // all of K is NaN
                    memset(v.k, 0xff, attn_kv_page_bytes(&v.d, 0) * (size_t)v.d.kv.n_pages);
                    s.hip.keep = 1 << 20;
                }
                s.hip.head_group = kind == ATTN_SELECT_HIP2 ? 2 : 0;
                lists_make(&l, &v.d, &s);
                check_rows(&v, &s, &l);
                if (i < 3) CHECK_EQ(l.x.row_end[0] - l.x.row_start[0], 0);
                lists_free(&l);
                view_free(&v);
            }
    source_free(&src);
}

// Landmarks against the plain mean over what follows.
static void test_landmarks(uint64_t seed) {
    test_rng r = {seed};
    source src;
    view v = {0};
    attn_select s;
    float *out;
    void *scratch;
    int32_t p, h, g, t, e, bad = 0, n = 700;
    source_make(&src, &r, 4, 2);
    view_add(&v, 0, 0, 50, n);
    view_make(&v, &src, &plain, &r);
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP3;
    out = (float *)zeroed(4 * (size_t)(2 * v.d.kv.page_tokens));
    scratch = zeroed(attn_cpu_select_scratch_bytes(&v.d, &s));
    CHECK_EQ(attn_cpu_landmarks_units(&v.d), 2);
    CHECK_EQ(attn_cpu_landmarks(&v.d, &s, out, 0, 2, scratch), ATTN_OK);
    for (p = 0; p < 50 + n; p++)
        for (h = 0; h < 2; h++) {
            double sum = 0, got = (double)out[h * v.d.kv.page_tokens + p];
            int32_t stop = attni_min32(p + 512, 50 + n);
            for (t = p; t < stop && p >= 50; t++)
                for (g = 0; g < 2; g++)
                    for (e = 0; e < DIM; e++)
                        sum += (double)(query_of(&src, 0, t, 2 * h + g)[e] *
                                        key_of(&src, 0, p, h)[e]);
            bad += fabs(got - 0.25 * sum / (2 * (stop - p))) > 1e-6 * (1 + fabs(got));
        }
    CHECK_EQ(bad, 0);
    CHECK_EQ(attn_cpu_landmarks(&v.d, &s, out, 1, 2, scratch), ATTN_ERR_ARGUMENT);
    s.kind = ATTN_SELECT_HIP2;
    CHECK_EQ(attn_cpu_landmarks(&v.d, &s, out, 0, 2, scratch), ATTN_ERR_ARGUMENT);
    free(out);
    free(scratch);
    view_free(&v);
    source_free(&src);
}

// Where a style puts a query and a key, by the comment in attn.h; 2000 tokens were trained for.
static void style_places(int style, int32_t q, int32_t k, int32_t end, int32_t n, int32_t place,
                         int32_t right, int64_t *at_q, int64_t *at_k) {
    const int64_t u = 256 - 1;
    *at_q = q;
    *at_k = k;
    if (style == ATTN_ROPE_RELATIVE) *at_q = u + 1, *at_k = right;
    if (style == ATTN_ROPE_CHUNK) *at_q = q < n + u ? q : n + u, *at_k = place;
    if (style == ATTN_ROPE_INFLLM) *at_q = u, *at_k = 0;
    if (style == ATTN_ROPE_DYNAMIC && end > 2000 && k < end - 500)
        *at_k = end - 501 - (int64_t)(end - 501 - k) * 1500 / (end - 500);
    if (style == ATTN_ROPE_SELF_EXTEND && q - k >= 8192)
        *at_q = q / 16 + 8192 - 512, *at_k = k / 16;
}

// Chunks of one key, so that a list is the keys with the best scores, against double precision.
static void test_styles(uint64_t seed) {
    enum { D = 16, ROPE = 12, LEN = 9500 };
    test_rng r = {seed};
    float *k = (float *)zeroed(4 * LEN * D), *q = (float *)zeroed(4 * D), o[D];
    float *rope = (float *)zeroed(4 * LEN * ROPE);
    double *score = (double *)zeroed(8 * LEN);
    int32_t q_start[2] = {0, 1}, kv_len, style, i, e, side;
    attn_desc d;
    attn_select s;
    memset(&d, 0, sizeof d);
    test_fill_normal(&r, k, LEN * D, 1);
    test_fill_normal(&r, q, D, 2);
    for (i = 0; i < LEN; i++)
        for (e = 0; e < ROPE / 2; e++) {
            rope[i * ROPE + e] = (float)cos(i * pow(10, -e));
            rope[i * ROPE + ROPE / 2 + e] = (float)sin(i * pow(10, -e));
        }
    d.n_seq = d.n_heads = d.n_kv_heads = d.kv.n_pages = 1;
    d.head_dim = D;
    d.q_start = q_start;
    d.kv.kv_len = &kv_len;
    d.kv.page_tokens = LEN;
    d.q.data = q;
    d.o.data = o;
    d.kv.k.data = d.kv.v.data = k;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    memset(&s, 0, sizeof s);
    s.kind = ATTN_SELECT_HIP3;
    s.kv_block = s.hip.stage[0].chunk = s.hip.n_stages = 1;
    s.hip.stage[0].q_block = 64;
    s.hip.sink = 20;
    s.hip.window = 256;
    s.hip.keep = 300;
    s.hip.rope = rope;
    s.hip.rope_len = LEN;
    s.hip.rope_dim = ROPE;
    s.hip.context = 2000;
    for (style = 0; style <= ATTN_ROPE_SELF_EXTEND; style++)
        for (kv_len = 1500; kv_len <= LEN; kv_len += 4000) {
            lists l;
            double least = HUGE_VAL, most = -HUGE_VAL;
            int32_t p = kv_len - 1, n = p + 1 - 256 - 20 + 1;
            s.hip.stage[0].style = (attn_rope_style)style;
            for (i = 0; i < n; i++)
                for (score[i] = -HUGE_VAL, side = 0; side < 2; side++) {
                    double sum = 0;
                    int64_t a, b;
                    style_places(style, p, 20 + i, kv_len, n, i, side, &a, &b);
                    for (e = 0; e < ROPE / 2 && style; e++) {
                        const float *x = k + (20 + i) * D, *u = rope + a * ROPE;
                        const float *w = rope + b * ROPE;
                        double c = (double)u[e] * (double)w[e] +
                                   (double)u[e + ROPE / 2] * (double)w[e + ROPE / 2];
                        double z = (double)u[e + ROPE / 2] * (double)w[e] -
                                   (double)u[e] * (double)w[e + ROPE / 2];
                        double x0 = (double)x[e], x1 = (double)x[e + ROPE / 2];
                        sum += (double)q[e] * (x0 * c + x1 * z) +
                               (double)q[e + ROPE / 2] * (x1 * c - x0 * z);
                    }
                    for (e = style ? ROPE : 0; e < D; e++)
                        sum += (double)q[e] * (double)k[(20 + i) * D + e];
                    if (sum > score[i]) score[i] = sum;
                }
            lists_make(&l, &d, &s);
            for (i = 0; i < n; i++) {
                int kept = holds(&l, 0, 0, p, 20 + i);
                if (kept && score[i] < least) least = score[i];
                if (!kept && score[i] > most) most = score[i];
            }
            CHECK_EQ(l.x.row_end[0] - l.x.row_start[0], 300);
            CHECK(least > most - 1e-4);
            lists_free(&l);
        }
    kv_len = 100;
    CHECK_EQ(attn_select_check(&d, &s), ATTN_OK);
    s.hip.rope_dim = 18;
    CHECK_EQ(attn_select_check(&d, &s), ATTN_ERR_ARGUMENT);
    free(k);
    free(q);
    free(rope);
    free(score);
}

static void test_errors(uint64_t seed) {
    test_rng r = {seed};
    source src;
    view v = {0};
    lists l;
    attn_select s, good;
    store paged = {ATTN_HEAD_MAJOR, ATTN_F32, 16};
    uint8_t *scratch;
    source_make(&src, &r, 4, 2);
    view_add(&v, 0, 0, 1900, 64);
    view_make(&v, &src, &paged, &r);
    memset(&good, 0, sizeof good);
    good.kind = ATTN_SELECT_HIP3;
#define BAD(change)                                                                                \
    do {                                                                                           \
        s = good;                                                                                  \
        change;                                                                                    \
        CHECK_EQ(attn_select_check(&v.d, &s), ATTN_ERR_ARGUMENT);                                  \
        CHECK_EQ(attn_cpu_select_units(&v.d, &s), 0);                                              \
    } while (0)
    CHECK_EQ(attn_select_check(&v.d, &good), ATTN_OK);
    BAD(s.hip.keep = -1);
    BAD(s.hip.keep = 12);
    BAD(s.hip.sink = 12);
    BAD(s.hip.sink = -2);
    BAD(s.hip.window = -2);
    BAD(s.hip.n_stages = 7);
    BAD(s.kv_block = 16);
    BAD(s.row_block = 48);
    BAD(s.hip.n_stages = 1; s.hip.stage[0].q_block = 64);
    BAD(s.hip.n_stages = 1; s.hip.stage[0].q_block = 64; s.hip.stage[0].chunk = 8;
        s.hip.stage[0].flags = ATTN_HIP_CENTRE);
    BAD(s.hip.n_stages = 1; s.hip.stage[0].q_block = 64; s.hip.stage[0].chunk = 8;
        s.hip.stage[0].flags = ATTN_HIP_LANDMARK);
    good.kind = ATTN_SELECT_HIP2;
    CHECK_EQ(attn_select_check(&v.d, &good), ATTN_OK);
    BAD(s.hip.block = 3);
    BAD(s.hip.near = 65537);
    BAD(s.hip.random = -1);
    BAD(s.hip.q_stride = -1);
    BAD(s.hip.head_group = 3);
    BAD(s.hip.head_group = 2; s.heads = ATTN_SELECT_GROUP);
    BAD(s.hip.sample = (attn_hip_sample)6);
    BAD(s.hip.patches = 513);
    BAD(s.hip.q_group = INT32_MAX);
#undef BAD
    good.kind = ATTN_SELECT_HIP3; // memory that no size_t counts
    good.n_slots = INT32_MAX - 2;
    good.max_kv_len = INT32_MAX;
    good.hip.n_stages = 2;
    good.hip.stage[0].q_block = good.hip.stage[1].q_block = 64;
    good.hip.stage[0].chunk = good.hip.stage[1].chunk = 8;
    good.hip.stage[1].keep = INT32_MAX / 8 * 8;
    CHECK_EQ(attn_select_check(&v.d, &good), ATTN_OK);
    CHECK_EQ(attn_select_bytes(&v.d, &good), 0);
    memset(&good, 0, sizeof good);
    good.kind = ATTN_SELECT_HIP2;
    lists_init(&l, &v.d, &good);
    scratch = (uint8_t *)zeroed(attn_cpu_select_scratch_bytes(&v.d, &good));
    v.table[60] = -1;
    CHECK_EQ(attn_cpu_select(&v.d, &good, NULL, &l.x, 0, 1, scratch), ATTN_ERR_PAGE);
    lists_free(&l);
    free(scratch);
    view_free(&v);
    source_free(&src);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1);
    int count = (int)test_arg(argc, argv, 2, 250), kind;
    test_random(seed * 100000, count);
    test_hills(seed);
    test_needles(seed);
    test_ties(seed);
    test_refresh(seed);
    for (kind = ATTN_SELECT_HIP1; kind <= ATTN_SELECT_HIP3; kind++) test_slots(seed, kind);
    test_options(seed);
    test_queries(seed);
    test_stages(seed);
    test_degenerate(seed);
    test_landmarks(seed);
    test_styles(seed);
    test_errors(seed);
    return TEST_END();
}

/* KV offload: the policies against plain models of them, and pages behind a cache that is far too
   small: the same bits as without one, whatever was cached when. test_cache [SEED [COUNT]]
   cc -std=c11 -O2 -I. -Itests tests/test_cache.c -o test_cache -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"
#include "attn_cpu.h"

enum { PAGES = 40, K = ATTN_CACHE_K };

// ---- policies: every page's whole history, and a sort by counting who is better

typedef struct model {
    int32_t resident[PAGES], times[PAGES][K], n_times[PAGES];
    double count[PAGES];
} model;

static int better(const model *m, const attn_cache_params *p, int a, int b) {
    double x[3] = {0, 0, 0}, y[3] = {0, 0, 0};
    int k = (p->k ? p->k : 2) - 1, i;
    const double ax = m->times[a][0], bx = m->times[b][0];
    if (p->policy == ATTN_CACHE_LRU) x[0] = ax, y[0] = bx;
    if (p->policy == ATTN_CACHE_LFU || p->policy == ATTN_CACHE_DECAYED_LFU)
        x[0] = m->count[a], y[0] = m->count[b];
    if (p->policy == ATTN_CACHE_LRU_K) {
        x[0] = m->times[a][k], y[0] = m->times[b][k];
        x[1] = ax, y[1] = bx;
    }
    if (p->policy == ATTN_CACHE_LRU_LFU) {
        x[0] = ax, y[0] = bx;
        x[1] = m->count[a], y[1] = m->count[b];
    }
    x[2] = m->resident[a], y[2] = m->resident[b];
    for (i = 0; i < 3; i++)
        if (x[i] != y[i]) return x[i] > y[i];
    return a < b;
}

static void policies(uint64_t seed) {
    test_rng r;
    attn_cache_params p;
    attn_cache *c;
    attn_cache_load loads[PAGES];
    model m;
    int64_t hits = 0, misses = 0;
    int32_t step, i, j, n, n_pages, in_use[PAGES];
    size_t bytes;
    void *mem;
    r.state = seed;
    memset(&p, 0, sizeof p);
    memset(&m, 0, sizeof m);
    p.n_pages = n_pages = 1 + test_below(&r, PAGES);
    p.n_slots = 1 + test_below(&r, n_pages);
    p.policy = (attn_cache_policy)test_below(&r, 5);
    p.k = test_below(&r, K + 1);
    p.decay = test_below(&r, 2) ? 0.5f : 0;
    if (test_below(&r, 3) == 0) p.max_loads = 1 + test_below(&r, 5);
    bytes = attn_cache_bytes(&p);
    mem = aligned_alloc(64, bytes + 64);
    CHECK(bytes > 0 && bytes % 64 == 0);
    memset(mem, 0x5a, bytes + 64);
    CHECK_EQ(attn_cache_init(&p, mem, bytes - 1, &c), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cache_init(&p, mem, bytes, &c), ATTN_OK);
    for (step = 1; step < 30; step++) {
        int wanted[PAGES] = {0}, rank[PAGES], ok = 1, n_resident = 0, want_loads = 0, cap;
        for (i = 0; i < n_pages; i++) {
            uint32_t reads = test_below(&r, 3) ? 0 : (uint32_t)test_below(&r, 4);
            c->reads[i] = reads;
            if (test_below(&r, 9) == 0) wanted[i] = 1, attn_cache_want(c, i);
            *(m.resident[i] ? &hits : &misses) += reads;
            if (p.policy == ATTN_CACHE_DECAYED_LFU) m.count[i] *= (double)(p.decay > 0 ? .5f : .9f);
            m.count[i] += reads;
            if (reads || wanted[i]) {
                for (j = K - 1; j > 0; j--) m.times[i][j] = m.times[i][j - 1];
                m.times[i][0] = step;
            }
            in_use[i] = reads || wanted[i] || m.resident[i];
        }
        attn_cache_want(c, -1), attn_cache_want(c, n_pages);
        CHECK_EQ(attn_cache_update(c, loads, &n), ATTN_OK);
        for (i = 0; i < n_pages; i++)
            for (rank[i] = j = 0; j < n_pages; j++)
                rank[i] += in_use[i] && in_use[j] && j != i && better(&m, &p, j, i);
        cap = p.max_loads && p.max_loads < p.n_slots ? p.max_loads : p.n_slots;
        for (i = 0; i < n_pages; i++)
            want_loads += in_use[i] && rank[i] < p.n_slots && !m.resident[i];
        CHECK_EQ(n, want_loads < cap ? want_loads : cap);
        for (j = 0; j < n; j++) { // the best newcomers, the best first, each into a slot of its own
            ok &= !m.resident[loads[j].page] && rank[loads[j].page] < p.n_slots;
            ok &= j == 0 || rank[loads[j].page] > rank[loads[j - 1].page];
            ok &= c->slot[loads[j].page] == loads[j].slot;
        }
        for (i = 0; i < n_pages; i++) { // who stays: all that rank, and others while there is room
            int was = m.resident[i], is = c->slot[i] >= 0;
            ok &= !is || (c->slot[i] < p.n_slots && c->page[c->slot[i]] == i);
            if (was && rank[i] < p.n_slots) ok &= is;
            if (was && !is) // only the worst were dropped
                for (j = 0; j < n_pages; j++)
                    ok &= !(m.resident[j] && c->slot[j] >= 0 && rank[j] > rank[i]);
            n_resident += is;
            ok &= c->reads[i] == 0 && c->wanted[i] == 0;
        }
        for (i = 0; i < p.n_slots; i++) ok &= c->page[i] < 0 || c->slot[c->page[i]] == i;
        ok &= n_resident <= p.n_slots && c->hits == hits && c->misses == misses;
        if (!CHECK(ok)) printf("  seed %llu step %d\n", (unsigned long long)seed, step);
        if (test_below(&r, 4) == 0) {
            i = test_below(&r, n_pages);
            attn_cache_drop(c, i);
            CHECK_EQ(c->slot[i], -1);
            memset(m.times[i], 0, sizeof m.times[i]);
            m.count[i] = 0;
        }
        for (i = 0; i < n_pages; i++) m.resident[i] = c->slot[i] >= 0;
    }
    for (i = 0; i < 64; i++) CHECK_EQ(((uint8_t *)mem)[bytes + (size_t)i], 0x5a);
    free(mem);
}

static void bad_params(void) {
    attn_cache_params p;
    attn_cache *c;
    char mem[64];
    memset(&p, 0, sizeof p);
    CHECK_EQ(attn_cache_bytes(NULL), 0);
    CHECK_EQ(attn_cache_bytes(&p), 0);
    p.n_pages = 4, p.n_slots = 5;
    CHECK_EQ(attn_cache_bytes(&p), 0);
    p.n_slots = 4;
    CHECK(attn_cache_bytes(&p) > 0);
    p.policy = (attn_cache_policy)5;
    CHECK_EQ(attn_cache_bytes(&p), 0);
    CHECK_EQ(attn_cache_init(&p, mem, 64, &c), ATTN_ERR_ARGUMENT);
    p.policy = ATTN_CACHE_LRU, p.k = K + 1;
    CHECK_EQ(attn_cache_bytes(&p), 0);
    p.k = 0, p.decay = -1;
    CHECK_EQ(attn_cache_bytes(&p), 0);
    p.decay = (float)NAN;
    CHECK_EQ(attn_cache_bytes(&p), 0);
    p.decay = 0, p.n_pages = INT32_MAX;
    CHECK(sizeof(size_t) > 4 || attn_cache_bytes(&p) == 0);
}

// ---- attention and selection over cached pages

static uint8_t *output(const problem *p, const attn_desc *d, size_t *n) {
    size_t bytes = attn_cpu_forward_bytes(d, 1);
    void *mem = malloc(bytes);
    uint8_t *o;
    *n = (size_t)p->n_tokens * (size_t)d->n_heads * (size_t)attni_v_dim(d) * 4;
    memset(d->o.data, 0x5a, *n);
    CHECK_EQ(attn_cpu_forward(d, mem, bytes, 1), ATTN_OK);
    free(mem);
    o = (uint8_t *)malloc(*n + 1);
    memcpy(o, d->o.data, *n);
    return o;
}

// The lists of a selector, as bytes.
static uint8_t *lists(const attn_desc *d, const attn_select *s, size_t *n) {
    attn_selection x;
    int32_t *seq_row = (int32_t *)calloc((size_t)d->n_seq, 4);
    int64_t u, units = attn_cpu_select_units(d, s);
    size_t bytes = attn_select_bytes(d, s), scratch = attn_cpu_select_scratch_bytes(d, s);
    uint8_t *mem = (uint8_t *)aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    void *work = aligned_alloc(64, (scratch + 127) & ~(size_t)63);
    CHECK_EQ(attn_selection_init(d, s, mem, bytes, seq_row, 0, &x), ATTN_OK);
    for (u = 0; u < units; u++)
        CHECK_EQ(attn_cpu_select(d, s, NULL, &x, u, 1, work), ATTN_OK);
    free(work), free(seq_row);
    *n = bytes;
    return mem;
}

static void cached(uint64_t seed) {
    static const attn_dtype types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16,
                                       ATTN_F8E4M3, ATTN_I8,  ATTN_I4};
    static const attn_select_kind kinds[] = {ATTN_SELECT_FLEX, ATTN_SELECT_HIP2, ATTN_SELECT_HIP3,
                                             ATTN_SELECT_EXACT};
    test_rng r;
    problem_opts o;
    problem p;
    attn_desc d;
    attn_kv_cache kc;
    attn_cache_params cp;
    attn_cache *c;
    attn_cache_load *loads;
    attn_select s;
    size_t n = 0, m = 0, kb, vb;
    uint8_t *plain, *with;
    int32_t step, i, j, n_loads;
    void *mem;
    r.state = seed;
    memset(&o, 0, sizeof o);
    o.mask = test_below(&r, N_MASKS);
    o.phase = test_below(&r, N_PHASES);
    o.layout = (attn_layout)test_below(&r, 3);
    o.page_tokens = o.layout == ATTN_K16 ? 16 : 1 + test_below(&r, 20);
    o.n_seq = 1 + test_below(&r, 4);
    o.max_kv = 1 + test_below(&r, 400);
    o.n_kv_heads = 1 + test_below(&r, 2);
    o.n_heads = o.n_kv_heads * (1 + test_below(&r, 3));
    o.head_dim = o.v_head_dim = 8 + 8 * test_below(&r, 3);
    o.k = types[test_below(&r, 6)];
    o.v = types[test_below(&r, 6)];
    o.q = types[test_below(&r, 3)];
    o.o = ATTN_F32;
    o.shared = test_below(&r, 3) == 0 ? 16 : 0;
    o.sharp = 3;
    problem_make(&p, &o, &r);
    d = p.d;
    d.o.stride_token = d.o.stride_head = 0;
    memset(&cp, 0, sizeof cp);
    cp.n_pages = d.kv.n_pages;
    cp.n_slots = d.kv.n_pages / 20 + 1; // 5 %
    cp.policy = (attn_cache_policy)test_below(&r, 5);
    mem = aligned_alloc(64, attn_cache_bytes(&cp));
    CHECK_EQ(attn_cache_init(&cp, mem, attn_cache_bytes(&cp), &c), ATTN_OK);
    loads = (attn_cache_load *)malloc(sizeof *loads * (size_t)cp.n_slots);
    kb = d.kv.k.page_bytes ? (size_t)d.kv.k.page_bytes : attn_kv_page_bytes(&d, 0);
    vb = d.kv.v.page_bytes ? (size_t)d.kv.v.page_bytes : attn_kv_page_bytes(&d, 1);
    memset(&kc, 0, sizeof kc);
    kc.k = malloc(kb * (size_t)cp.n_slots);
    kc.v = malloc(vb * (size_t)cp.n_slots);
    kc.n_slots = cp.n_slots;
    kc.slot = c->slot;
    kc.reads = c->reads;
    memset(kc.k, 0xff, kb * (size_t)cp.n_slots); // what was never loaded is not read
    memset(kc.v, 0xff, vb * (size_t)cp.n_slots);
    memset(&s, 0, sizeof s);
    s.kind = kinds[test_below(&r, 4)];
    s.row_block = s.kv_block = s.kind == ATTN_SELECT_HIP3 ? 0 : 16;
    s.hip.sink = 16, s.hip.window = 32, s.hip.keep = 64;
    s.exact.keep = 64;
    for (step = 0; step < 5; step++) {
        attn_tensor rows = p.d.q; // any rows to store: keys are overwritten by queries
        uint64_t reads = 0;
        d.kv.cache = NULL;
        plain = output(&p, &d, &n);
        d.kv.cache = &kc;
        with = output(&p, &d, &n);
        CHECK(memcmp(plain, with, n) == 0);
        free(plain), free(with);
        if (attn_select_check(&d, &s) == ATTN_OK) {
            d.kv.cache = NULL;
            plain = lists(&d, &s, &n);
            d.kv.cache = &kc;
            with = lists(&d, &s, &m);
            for (i = 0, j = 1; (size_t)i < n; i++) j &= plain[i] == with[i];
            CHECK(n == m && j);
            free(plain), free(with);
        }
        for (i = 0; i < cp.n_pages; i++) reads += c->reads[i];
        CHECK(reads > 0 || p.n_tokens == 0 || d.mask.kind != ATTN_MASK_FULL);
        if (d.mask.blocks.row_start && d.mask.kind != ATTN_MASK_TREE)
            CHECK_EQ(attn_cache_want_listed(c, &d, test_below(&r, d.n_seq)), ATTN_OK);
        CHECK_EQ(attn_cache_update(c, loads, &n_loads), ATTN_OK);
        CHECK_EQ(attn_cpu_cache_load(&d, loads, n_loads), ATTN_OK);
        // stores and copies reach both memories
        if (d.n_heads == d.n_kv_heads && p.n_tokens && o.head_dim == o.v_head_dim)
            CHECK_EQ(attn_cpu_store(&d, &rows, &rows, NULL, 0, p.n_tokens), ATTN_OK);
        if (d.kv.n_pages > 1) {
            attn_page_copy copy = {test_below(&r, d.kv.n_pages), test_below(&r, d.kv.n_pages),
                                   test_below(&r, d.kv.page_tokens + 1)};
            CHECK_EQ(attn_cpu_copy_pages(&d, &copy, 1), ATTN_OK);
        }
    }
    CHECK(c->hits + c->misses > 0 || p.n_tokens == 0 || c->loads == 0);
    free(mem), free(loads), free(kc.k), free(kc.v);
    problem_free(&p);
}

// V's copies must alias K's where V's pages do, and nowhere else.
static void aliases(void) {
    float a[64], b[64];
    int alias, shared;
    test_rng r = {1};
    problem_opts o;
    problem p;
    memset(&o, 0, sizeof o);
    o.n_seq = 1, o.max_kv = 20, o.n_heads = o.n_kv_heads = 1, o.page_tokens = 16;
    o.head_dim = 16, o.v_head_dim = 8;
    o.k = o.v = o.q = o.o = ATTN_F32;
    for (alias = 0; alias < 2; alias++) {
        o.alias = alias;
        problem_make(&p, &o, &r);
        for (shared = 0; shared < 2; shared++) {
            int32_t slot[64];
            attn_kv_cache kc = {a, NULL, 1, NULL, NULL};
            kc.v = shared ? a : b;
            kc.slot = slot;
            p.d.kv.cache = &kc;
            CHECK_EQ(attn_validate(&p.d), alias == shared ? ATTN_OK : ATTN_ERR_ARGUMENT);
        }
        problem_free(&p);
    }
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 1000), i;
    bad_params();
    aliases();
    for (i = 0; i < count; i++) policies(seed + i);
    for (i = 0; i < count / 4; i++) cached(seed + i);
    return TEST_END();
}

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

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 1000), i;
    bad_params();
    for (i = 0; i < count; i++) policies(seed + i);
    return TEST_END();
}

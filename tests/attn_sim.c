/* attn_sim.c - a whole engine, simulated: scheduler, prefix tree, page pool and CPU executor.
   attn_sim SEED [OPS [EPOCH]]     EPOCH: start there, to come to a failure sooner
   cc -O2 -I. -Itests tests/attn_sim.c -o attn_sim -lm; -DATTN_CHECK: the checked build

   One seeded generator decides everything: an epoch draws its sizes, dtypes, layout, executor, mask
   and fault rate, then runs some thousand operations on one tree. Against it stands a flat model:
   every sequence owns a contiguous array of tokens and of K and V. What is checked:
     - page slots hold their sequence's own values, whatever was shared, copied, evicted or refused
     - an attention step over the shared pages gives the bits of the sequence computed alone from
       contiguous memory, and agrees with naive fp64 attention over that memory
     - the tree's invariants and reference counts, recomputed; nothing is left at an epoch's end
     - the same seed gives the same log
   Requests for pages, nodes and slots fail at random besides, as do row callbacks; free pages are
   poisoned. */
#include "test.h"

static uint32_t hash_mask;
static int sim_fault(void);
#define ATTNI_HASH(parent, key) (attni_tree_hash(parent, key) & hash_mask)
#define ATTNI_FAULT() sim_fault()
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

enum {
    LAYERS = 2,
    MAX_SEQ = 12,
    MAX_LEN = 640,
    MAX_PAGES = 64,
    MAX_PIN = 4,
    MAX_COPIES = 128,
    MAX_EVENTS = 4096,
    MAX_Q = 512,
    KV_HEADS = 2,
    HEADS = 4,
    MAX_DIM = 24,
    PROMPTS = 4,
    LOG = 48,
    EPOCH_OPS = 4000
};
#define POISON 0xdeaddeaddeaddeadu
#define ROW (KV_HEADS * MAX_DIM)

typedef struct run {
    uint64_t ns;
    int32_t n;
    int32_t token[MAX_LEN];
    uint64_t hash[MAX_LEN]; // of the namespace and the tokens up to here: decides K, V and Q
} run;

typedef struct event { // what the engine still has to do in KV memory, in the order it was told
    int is_copy, done;
    int64_t slot;
    uint64_t hash;
    attn_page_copy copy;
} event;

typedef struct sim {
    test_rng rng;
    attn_tree *t;
    int32_t pt, n_pages, max_seq, max_len, n_ns, alphabet, n_layers, fault_rate, step_rate;
    int tight, lazy; // few nodes; copies and stores that wait for long
    int used[MAX_SEQ], n_live;
    run live[MAX_SEQ];
    int32_t n_flat[MAX_SEQ]; // tokens whose K and V lie in flat
    run prompt[PROMPTS], pin[MAX_PIN], saved;
    int32_t n_pin, has_saved;
    event queue[MAX_EVENTS];
    int32_t n_queue, n_copies; // n_copies: of them
    attn_page_copy done[MAX_COPIES]; // to acknowledge
    int32_t n_done;
    int clean[MAX_PAGES];       // free and poisoned
    uint64_t tag[MAX_PAGES * 32]; // whose value a slot holds
    int32_t fail_at;            // callback that fails
    attn_desc d;                // the epoch's problem, less its batch
    void *kv[LAYERS][2], *flat[MAX_SEQ][LAYERS][2];
    float sinks[HEADS];
    attn_plan *plan;
    size_t scratch_bytes;
    size_t token_bytes;         // of a blob
    uint64_t log;
    int32_t n_ops;
} sim;

static sim m; // zeroed by every epoch
static void *mem_tree, *mem_plan, *mem_partials, *mem_scratch[2], *mem_forward, *mem_blob;
static void *mem_kv[LAYERS][2], *mem_flat[MAX_SEQ][LAYERS][2];
enum {
    TREE_BYTES = 1 << 20,
    PLAN_BYTES = 1 << 20,
    PARTIAL_BYTES = 1 << 20,
    SCRATCH_BYTES = 4 << 20,
    FORWARD_BYTES = 24 << 20,
    BLOB_BYTES = 2 << 20,
    FLAT_BYTES = MAX_LEN * (ROW + KV_HEADS) * 4 + 64,
    KV_BYTES = MAX_PAGES * 32 * (ROW + KV_HEADS) * 4 + 64
};

static struct {
    long long steps, rows, oracle, full, faults, hits, copies, loads, updates, patched, merges;
} sum; // what the epochs came by, so that a dose which tests nothing is seen

// ---- the log: a hash of everything, and the last entries in words

static struct {
    const char *what;
    int64_t a, b, c;
} tail[LOG];
static int64_t n_log;

static uint64_t mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0xd6e8feb86659fd93u;
    return h ^ (h >> 32);
}

static void note(const char *what, int64_t a, int64_t b, int64_t c) {
    const char *p;
    tail[n_log % LOG].what = what;
    tail[n_log % LOG].a = a;
    tail[n_log % LOG].b = b;
    tail[n_log++ % LOG].c = c;
    for (p = what; *p; p++) m.log = mix(m.log, (unsigned char)*p);
    m.log = mix(mix(mix(m.log, (uint64_t)a), (uint64_t)b), (uint64_t)c);
}

static void print_tail(void) {
    int64_t i = n_log > LOG ? n_log - LOG : 0;
    for (; i < n_log; i++)
        printf("    %-10s %lld %lld %lld\n", tail[i % LOG].what, (long long)tail[i % LOG].a,
               (long long)tail[i % LOG].b, (long long)tail[i % LOG].c);
}

static int32_t below(int32_t n) { return test_below(&m.rng, n); }
static int one_in(int32_t n) { return below(n) == 0; }

static int faults_on;
static int sim_fault(void) {
    if (!faults_on || m.fault_rate == 0 || !one_in(m.fault_rate)) return 0;
    sum.faults++;
    return 1;
}

// ---- the model's K, V and Q: functions of a token's prefix hash

static void fill_row(uint64_t seed, int32_t n, double size, float *out) {
    test_rng r;
    int32_t i;
    r.state = seed;
    for (i = 0; i < n; i++) {
        uint64_t u = test_u64(&r);
        out[i] = (float)(((double)(uint32_t)u / 2147483648.0 - 1) * 1.7 * size);
        if (++i < n) out[i] = (float)(((double)(u >> 32) / 2147483648.0 - 1) * 1.7 * size);
    }
}

static void run_push(run *r, int32_t token) {
    uint64_t h = r->n > 0 ? r->hash[r->n - 1] : mix(7, r->ns);
    r->token[r->n] = token;
    r->hash[r->n++] = mix(h, (uint32_t)token + 3u);
}

static void run_copy(run *to, const run *from, int32_t n) {
    to->ns = from->ns;
    to->n = n;
    memcpy(to->token, from->token, (size_t)n * sizeof *to->token);
    memcpy(to->hash, from->hash, (size_t)n * sizeof *to->hash);
}

static int32_t common(const run *a, const run *b) {
    int32_t i = 0, n = a->n < b->n ? a->n : b->n;
    if (a->ns != b->ns) return 0;
    while (i < n && a->token[i] == b->token[i]) i++;
    return i;
}

// The longest prefix of r that nothing may have evicted.
static int32_t held(const run *r) {
    int32_t i, c, best = 0;
    for (i = 0; i < m.max_seq; i++)
        if (m.used[i] && (c = common(r, m.live + i)) > best) best = c;
    for (i = 0; i < m.n_pin; i++)
        if ((c = common(r, m.pin + i)) > best) best = c;
    return best;
}

static attn_desc layer_desc(int l) {
    attn_desc d = m.d;
    d.kv.k.data = m.kv[l][0];
    d.kv.v.data = m.kv[l][1];
    return d;
}

// Contiguous: one long page of the sequence's own.
static attn_desc flat_desc(int32_t s, int l) {
    attn_desc d = m.d;
    d.n_seq = 1;
    d.kv.layout = ATTN_TOKEN_MAJOR;
    d.kv.page_tokens = MAX_LEN;
    d.kv.n_pages = 1;
    d.kv.page_table = NULL;
    d.kv.pool = NULL;
    d.kv.k.data = m.flat[s][l][0];
    d.kv.v.data = m.flat[s][l][1];
    return d;
}

static void store_rows(const attn_desc *d, int l, const uint64_t *hash, const int64_t *slot,
                       int32_t n) {
    static float k[256 * ROW], v[256 * ROW];
    int32_t i, kn = m.d.n_kv_heads * m.d.head_dim, vn = m.d.n_kv_heads * m.d.v_head_dim, part;
    attn_tensor kt, vt;
    memset(&kt, 0, sizeof kt);
    kt.dtype = ATTN_F32;
    vt = kt;
    kt.data = k;
    vt.data = v;
    for (; n > 0; n -= part, hash += part, slot += part) {
        part = n < 256 ? n : 256;
        for (i = 0; i < part; i++) {
            fill_row(hash[i] ^ mix(11, (uint64_t)l), kn, 1, k + i * kn);
            fill_row(hash[i] ^ mix(12, (uint64_t)l), vn, 1, v + i * vn);
        }
        CHECK_EQ(attn_cpu_store(d, &kt, &vt, slot, 0, part), ATTN_OK);
    }
}

// ---- the engine's side: stores and copies, carried out late and in any order the contract allows

static void do_copies(const attn_page_copy *c, int32_t n) {
    int l;
    int32_t i;
    for (l = 0; l < m.n_layers; l++) {
        attn_desc d = layer_desc(l);
        CHECK_EQ(attn_cpu_copy_pages(&d, c, n), ATTN_OK);
    }
    for (sum.copies += n; n > 0; n--, c++)
        for (i = 0; i < c->n_tokens; i++) m.tag[c->dst * m.pt + i] = m.tag[c->src * m.pt + i];
}

// Stores told before a copy come before it; those told later before or after. All stores may come
// before all copies.
static void flush(void) {
    static uint64_t hash[MAX_EVENTS];
    static int64_t slot[MAX_EVENTS];
    attn_page_copy copy[MAX_COPIES];
    int32_t i, j, n, at = 0, next;
    int l;
    while (at < m.n_queue) {
        int early = one_in(2);
        for (next = at; next < m.n_queue && !m.queue[next].is_copy; next++) {}
        for (n = 0, i = at; i < m.n_queue; i++) {
            event *e = m.queue + i;
            if (e->is_copy || e->done || (i > next && (!early || one_in(3)))) continue;
            e->done = 1;
            j = below(n + 1);
            slot[n] = slot[j], hash[n] = hash[j];
            slot[j] = e->slot, hash[j] = e->hash;
            n++;
        }
        for (i = 0; i < n; i++) m.tag[slot[i]] = hash[i];
        for (l = 0; l < m.n_layers; l++) {
            attn_desc d = layer_desc(l);
            store_rows(&d, l, hash, slot, n);
        }
        // this copy, and those behind it whose earlier stores are done
        for (n = 0; next < m.n_queue && (m.queue[next].is_copy || m.queue[next].done); next++) {
            if (!m.queue[next].is_copy) continue;
            if (n > 0 && one_in(4)) break;
            copy[n++] = m.done[m.n_done++] = m.queue[next].copy;
        }
        do_copies(copy, n);
        at = next;
    }
    m.n_queue = m.n_copies = 0;
}

static void flush_stores(void) {
    int32_t i, n = 0;
    int l;
    for (i = 0; i < m.n_queue; i++) {
        event *e = m.queue + i;
        if (e->is_copy) {
            m.queue[n++] = *e;
            continue;
        }
        m.tag[e->slot] = e->hash;
        for (l = 0; l < m.n_layers; l++) {
            attn_desc d = layer_desc(l);
            store_rows(&d, l, &e->hash, &e->slot, 1);
        }
    }
    m.n_queue = n;
}

static void ack(int32_t n) {
    while (n-- > 0 && m.n_done > 0) {
        int32_t k = below(m.n_done);
        CHECK_EQ(attn_tree_ack(m.t, m.done + k, 1), ATTN_OK);
        m.done[k] = m.done[--m.n_done];
    }
}

// Poison in the memory of pages that fell free, and in the tags of every slot that nobody has.
static void freed(void *user, int32_t page) {
    int l;
    (void)user;
    for (l = 0; l < m.n_layers; l++) {
#ifdef ATTN_CHECK
        attn_desc d = layer_desc(l);
        attn_check_poison(&d, page);
#else
        int v;
        for (v = 0; v < 2; v++) {
            size_t bytes = attn_kv_page_bytes(&m.d, v);
            memset((char *)m.kv[l][v] + (size_t)page * bytes, 0xff, bytes);
        }
#endif
    }
}

static void sweep(void) {
    const attn_pool *pool = attn_tree_pool(m.t);
    int32_t p, i, from;
    for (p = 0; p < m.n_pages; p++) {
        if (pool->ref[p] == 0 && m.clean[p]) continue;
        m.clean[p] = pool->ref[p] == 0;
        if (m.clean[p]) freed(NULL, p);
        from = m.clean[p] ? 0 : m.t->fill[p];
        for (i = 0; i < m.n_queue; i++) // still to be read
            if (m.queue[i].is_copy && m.queue[i].copy.src == p && from < m.queue[i].copy.n_tokens)
                from = m.queue[i].copy.n_tokens;
        for (i = from; i < m.pt; i++) m.tag[p * m.pt + i] = POISON;
    }
}

static attn_tree_stats stats(void) {
    attn_tree_stats s;
    memset(&s, 0, sizeof s);
    attn_tree_get_stats(m.t, &s);
    return s;
}

// ---- what holds after every operation

static void verify_seq(int32_t s) {
    const run *r = m.live + s;
    int32_t page[MAX_LEN], token[MAX_LEN], i, n, bad = 0;
    CHECK_EQ(attn_tree_length(m.t, s), r->n);
    n = attn_tree_pages(m.t, s, page, MAX_LEN);
    if (!CHECK_EQ(n, (r->n + m.pt - 1) / m.pt)) return;
    for (i = 0; i < n; i++)
        bad += page[i] < 0 || page[i] >= m.n_pages || attn_tree_pool(m.t)->ref[page[i]] < 1;
    if (!CHECK_EQ(bad, 0) || m.n_queue > 0) return; // else values are in flight
    for (i = 0; i < r->n; i++) bad += m.tag[page[i / m.pt] * m.pt + i % m.pt] != r->hash[i];
    CHECK_EQ(bad, 0);
    if (!one_in(4)) return;
    CHECK_EQ(attn_tree_tokens(m.t, s, 0, r->n, token), ATTN_OK);
    CHECK(memcmp(token, r->token, (size_t)r->n * sizeof *token) == 0);
}

static void verify_all(void) {
    int32_t s, n = 0;
    CHECK_EQ(attn_tree_check(m.t), ATTN_OK);
    for (s = 0; s < m.max_seq; s++)
        if (m.used[s]) verify_seq(s), n++;
    CHECK_EQ(stats().n_seq, n);
    CHECK_EQ(n, m.n_live);
}

// ---- operations on the tree

static int32_t pick(void) { // a live sequence or -1
    int32_t s = below(m.max_seq), i;
    for (i = 0; i < m.max_seq; i++, s = (s + 1) % m.max_seq)
        if (m.used[s]) return s;
    return -1;
}

// The beginning of a prompt or of a live sequence, then something new.
static void random_run(run *r, int32_t max) {
    int32_t s = pick(), n = 1 + below(max);
    const run *from = m.prompt + below(PROMPTS);
    if (s >= 0 && one_in(3)) from = m.live + s;
    run_copy(r, from, 0);
    if (from >= m.prompt && from < m.prompt + PROMPTS) r->ns = (uint64_t)below(m.n_ns) + 1;
    if (!one_in(8)) {
        int32_t keep = one_in(2) ? from->n : below(from->n + 1), i;
        for (i = 0; i < keep && r->n < n; i++) run_push(r, from->token[i]);
    }
    while (r->n < n) run_push(r, below(m.alphabet));
}

static void added(int32_t s, const run *r) {
    m.used[s] = 1;
    m.n_live++;
    m.n_flat[s] = 0;
    if (r != m.live + s) run_copy(m.live + s, r, r->n);
}

static int full(attn_result r) {
    sum.full += r == ATTN_ERR_FULL;
    return r == ATTN_ERR_FULL;
}

// Page slots for tokens [from, n) of s: stores that are due.
static void queue_stores(int32_t s, int32_t from) {
    const run *r = m.live + s;
    int32_t page[MAX_LEN], i;
    CHECK_EQ(attn_tree_pages(m.t, s, page, MAX_LEN), (r->n + m.pt - 1) / m.pt);
    for (i = from; i < r->n; i++) {
        event *e = m.queue + m.n_queue++;
        memset(e, 0, sizeof *e);
        e->slot = (int64_t)page[i / m.pt] * m.pt + i % m.pt;
        e->hash = r->hash[i];
    }
}

// Lengthens s to want, or inserts want as a new sequence when s < 0.
static int append(int32_t s, const run *want) {
    int32_t old = s < 0 ? 0 : m.live[s].n, hit = -1, n_copies = 0, room = !one_in(16), least = 0;
    int32_t before[MAX_LEN], after[MAX_LEN], n_page = 0, i;
    int insert = s < 0, look = one_in(4);
    attn_page_copy copy[1];
    attn_result r;
    if (look) least = held(want);
    if (!insert) n_page = attn_tree_pages(m.t, s, before, MAX_LEN);
    faults_on = 1;
    if (insert)
        r = attn_tree_insert(m.t, want->ns, want->token, want->n, &s, &hit, copy, room, &n_copies);
    else
        r = attn_tree_append(m.t, s, want->token + old, want->n - old, &hit, copy, room, &n_copies);
    faults_on = 0;
    note(insert ? "insert" : "append", s, want->n - old, r == ATTN_OK ? hit : r);
    if (r != ATTN_OK) {
        CHECK(full(r) || (r == ATTN_ERR_BUFFER && !room));
        CHECK_EQ(n_copies, 0);
        for (i = 0; !insert && i < 1; i++) { // its table is what it was
            CHECK_EQ(attn_tree_pages(m.t, s, after, MAX_LEN), n_page);
            CHECK(memcmp(before, after, (size_t)n_page * sizeof *before) == 0);
        }
        return 0;
    }
    if (!CHECK(s >= 0 && s < m.max_seq && (m.used[s] != 0) == !insert)) return 0;
    CHECK(hit >= 0 && hit <= want->n - old && (!look || hit >= least - old));
    if (insert) added(s, want);
    else run_copy(m.live + s, want, want->n);
    sum.hits += hit;
    for (i = 0; i < n_copies; i++) {
        event *e = m.queue + m.n_queue++;
        memset(e, 0, sizeof *e);
        e->is_copy = 1;
        e->copy = copy[i];
        m.n_copies++;
        note("copy", copy[i].src, copy[i].dst, copy[i].n_tokens);
    }
    queue_stores(s, old + hit);
    return 1;
}

static void op_grow(int32_t s, int32_t n) {
    static run r;
    run_copy(&r, m.live + s, m.live[s].n);
    while (n-- > 0 && r.n < m.max_len) run_push(&r, below(m.alphabet));
    append(s, &r);
}

static void op_open(void) {
    static run r;
    int32_t s = -1, hit = -1, least;
    attn_result e;
    random_run(&r, m.max_len);
    least = held(&r);
    faults_on = 1;
    e = attn_tree_open(m.t, r.ns, r.token, r.n, &s, &hit);
    faults_on = 0;
    note("open", s, r.n, e == ATTN_OK ? hit : e);
    if (e != ATTN_OK) {
        CHECK(full(e));
        return;
    }
    if (!CHECK(s >= 0 && s < m.max_seq && !m.used[s] && hit >= least && hit <= r.n)) return;
    r.n = hit;
    added(s, &r);
}

static void op_match(void) {
    static run r;
    int32_t hit;
    random_run(&r, m.max_len);
    hit = attn_tree_match(m.t, r.ns, r.token, r.n);
    note("match", (int64_t)r.ns, r.n, hit);
    CHECK(hit >= held(&r) && hit <= r.n);
}

static void op_fork(int32_t s) {
    int32_t out = -1;
    attn_result r;
    faults_on = 1;
    r = attn_tree_fork(m.t, s, &out);
    faults_on = 0;
    note("fork", s, out, r);
    if (r != ATTN_OK) {
        CHECK(full(r));
        return;
    }
    if (CHECK(out >= 0 && out < m.max_seq && !m.used[out])) added(out, m.live + s);
}

static void op_truncate(int32_t s) {
    int32_t n = m.live[s].n, to = one_in(2) ? below(n + 1) : n - below(n < 4 ? n + 1 : 4);
    attn_result r;
    if (n > ATTN_SPAN && one_in(3)) to = ATTN_SPAN - below(5); // soon to cross a span's border
    faults_on = 1;
    r = attn_tree_truncate(m.t, s, to);
    faults_on = 0;
    note("truncate", s, to, r);
    if (r != ATTN_OK) {
        CHECK(full(r));
        return;
    }
    m.live[s].n = to;
    if (m.n_flat[s] > to) m.n_flat[s] = to;
}

static void op_release(int32_t s) {
    int keep = !one_in(3);
    note("release", s, keep, m.live[s].n);
    CHECK_EQ(attn_tree_release(m.t, s, keep), ATTN_OK);
    m.used[s] = 0;
    m.n_live--;
}

static void op_pin(void) {
    int32_t i = below(MAX_PIN), have;
    static run r;
    attn_result e;
    if (i < m.n_pin) {
        note("unpin", m.pin[i].n, 0, 0);
        CHECK_EQ(attn_tree_pin(m.t, m.pin[i].ns, m.pin[i].token, m.pin[i].n, -1), ATTN_OK);
        --m.n_pin;
        if (i < m.n_pin) run_copy(m.pin + i, m.pin + m.n_pin, m.pin[m.n_pin].n);
        return;
    }
    random_run(&r, m.max_len);
    have = attn_tree_match(m.t, r.ns, r.token, r.n);
    if (have > 0 && !one_in(4)) r.n = have;
    faults_on = 1;
    e = attn_tree_pin(m.t, r.ns, r.token, r.n, 1);
    faults_on = 0;
    note("pin", r.n, have, e);
    if (have < r.n) CHECK_EQ(e, ATTN_ERR_NOT_FOUND);
    else if (e == ATTN_OK) run_copy(m.pin + m.n_pin++, &r, r.n);
    else CHECK(full(e));
}

static void op_evict(void) {
    int32_t n = below(8) - 1, n_freed = -1, was = stats().n_free;
    CHECK_EQ(attn_tree_evict(m.t, n, &n_freed), ATTN_OK);
    note("evict", n, n_freed, stats().n_free);
    CHECK_EQ(stats().n_free - was, n_freed);
}

// ---- blobs: a tag, then the rows of every layer, token by token

static int read_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    unsigned char *p = (unsigned char *)rows;
    int32_t i;
    int l, v;
    (void)user;
    for (i = 0; i < n; i++) {
        memcpy(p, &m.tag[page * m.pt + place + i], 8);
        p += 8;
        for (l = 0; l < m.n_layers; l++)
            for (v = 0; v < 2; v++) {
                attn_desc d = layer_desc(l);
                CHECK_EQ(attn_kv_read_rows(&d, v, page, place + i, 1, p), ATTN_OK);
                p += attn_kv_rows_bytes(&d, v, 1);
            }
    }
    return --m.fail_at == 0;
}

static int write_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    const unsigned char *p = (const unsigned char *)rows;
    int32_t i;
    int l, v;
    (void)user;
    if (--m.fail_at == 0) return 1;
    for (i = 0; i < n; i++) {
        memcpy(&m.tag[page * m.pt + place + i], p, 8);
        p += 8;
        for (l = 0; l < m.n_layers; l++)
            for (v = 0; v < 2; v++) {
                attn_desc d = layer_desc(l);
                CHECK_EQ(attn_kv_write_rows(&d, v, page, place + i, 1, p), ATTN_OK);
                p += attn_kv_rows_bytes(&d, v, 1);
            }
    }
    return 0;
}

static int copy_rows(void *user, const attn_page_copy *c) {
    (void)user;
    do_copies(c, 1);
    return --m.fail_at == 0;
}

static void op_save(int32_t s) {
    size_t bytes = attn_tree_save_bytes(m.t, s, m.token_bytes);
    attn_result r;
    if (!CHECK(bytes > 0 && bytes <= BLOB_BYTES)) return;
    m.fail_at = one_in(8) ? 1 : 0;
    m.has_saved = 0;
    r = attn_tree_save(m.t, s, m.token_bytes, read_rows, NULL, mem_blob, bytes);
    note("save", s, m.live[s].n, r);
    if (r == ATTN_ERR_CALLBACK) {
        CHECK_EQ(m.fail_at, 0);
        return;
    }
    CHECK_EQ(r, ATTN_OK);
    run_copy(&m.saved, m.live + s, m.live[s].n);
    m.has_saved = 1;
}

static void op_load(void) {
    size_t bytes = 48 + (size_t)m.saved.n * (4 + m.token_bytes);
    int32_t s = -1;
    attn_result r;
    m.fail_at = one_in(4) ? 1 + below(4) : 0;
    faults_on = 1;
    r = attn_tree_load(m.t, m.saved.ns, m.token_bytes, write_rows, copy_rows, NULL, mem_blob, bytes,
                       &s);
    faults_on = 0;
    note("load", s, m.saved.n, r);
    if (r != ATTN_OK) {
        CHECK(full(r) || (r == ATTN_ERR_CALLBACK && m.fail_at == 0));
        CHECK_EQ(s, -1);
        return;
    }
    if (!CHECK(s >= 0 && s < m.max_seq && !m.used[s])) return;
    added(s, &m.saved);
    sum.loads++;
}

// ---- attention

typedef struct batch {
    attn_desc d;
    int32_t n, seq[MAX_SEQ], q_start[MAX_SEQ + 1], q_pos0[MAX_SEQ], kv_len[MAX_SEQ], order[MAX_SEQ];
    int32_t table[MAX_SEQ * MAX_LEN], parent[MAX_Q];
    int layer;
} batch;

static unsigned char q_rows[MAX_Q * HEADS * MAX_DIM * 4], o_rows[MAX_Q * HEADS * MAX_DIM * 4];
static unsigned char q_flat[MAX_LEN * HEADS * MAX_DIM * 4], o_flat[MAX_LEN * HEADS * MAX_DIM * 4];
static float lse_rows[MAX_Q * HEADS], lse_flat[MAX_LEN * HEADS];

static void fill_query(const run *r, int32_t pos, void *q, int64_t row) {
    float x[HEADS * MAX_DIM];
    int32_t n = m.d.n_heads * m.d.head_dim, i;
    fill_row(r->hash[pos] ^ mix(13, 0), n, 2, x);
    for (i = 0; i < n; i++) attni_put(q, m.d.q.dtype, row * n + i, x[i]);
}

// Which sequences take part.
static int choose_batch(batch *b) {
    int32_t i, j, s, n = 0;
    for (s = 0; s < m.max_seq; s++)
        if (m.used[s] && m.live[s].n > 0 && !one_in(3)) b->seq[n++] = s;
    for (i = n - 1; i > 0; i--) {
        j = below(i + 1);
        s = b->seq[i], b->seq[i] = b->seq[j], b->seq[j] = s;
    }
    b->n = n;
    return n > 0;
}

// The next step of a decode loop: a token more for each, and sometimes another sequence.
static void next_batch(batch *b) {
    int32_t i, s = pick(), at = below(b->n);
    for (i = 0; i < b->n; i++)
        if (b->seq[i] == s) s = -1;
    if (s >= 0 && m.live[s].n > 0 && one_in(2)) b->seq[at] = s; // shares less, perhaps
    for (i = 0; i < b->n; i++)
        if (m.live[b->seq[i]].n < m.max_len) op_grow(b->seq[i], 1);
}

// With how many of their last tokens, and where those lie.
static void make_batch(batch *b, int loop) {
    int32_t i, k, n = b->n, q, total = 0, wide = !loop && one_in(4), stride;
    int tree = !loop && one_in(3), prefill = !loop && one_in(6);
    int32_t scratch[MAX_SEQ];
    b->layer = below(m.n_layers);
    b->d = layer_desc(b->layer);
    if (tree) b->d.mask.kind = ATTN_MASK_TREE;
    stride = (m.max_len + m.pt - 1) / m.pt + below(3);
    for (i = 0; i < n; i++) {
        const run *r = m.live + b->seq[i];
        q = tree || wide ? 1 + below(8) : 1;
        if (prefill && !tree && r->n <= 96) q = r->n;
        if (one_in(12) && !tree && !loop) q = 0;
        if (q > r->n) q = r->n;
        if (q > MAX_Q - total) q = MAX_Q - total;
        b->q_start[i] = total;
        b->kv_len[i] = r->n;
        b->q_pos0[i] = r->n - q;
        CHECK(attn_tree_pages(m.t, b->seq[i], b->table + i * stride, stride) > 0);
        for (k = 0; k < q; k++) {
            fill_query(r, r->n - q + k, q_rows, total + k);
            b->parent[total + k] = one_in(2) ? k - 1 : below(k + 1) - 1;
        }
        total += q;
    }
    b->q_start[n] = total;
    b->d.n_seq = n;
    b->d.q_start = b->q_start;
    b->d.kv.kv_len = b->kv_len;
    b->d.kv.page_table = b->table;
    b->d.kv.page_table_stride = stride;
    if (one_in(2)) b->d.q_pos0 = b->q_pos0;
    if (tree) b->d.mask.tree_parent = b->parent;
    if (one_in(2)) {
        CHECK_EQ(attn_tree_order(m.t, b->seq, n, b->order, scratch), ATTN_OK);
        b->d.seq_order = b->order;
    }
    b->d.q.data = q_rows;
    b->d.o.data = o_rows;
    b->d.lse = lse_rows;
}

// A new plan, or the last one brought up to date.
static int make_plan(const attn_desc *d) {
    attn_plan_params p;
    attn_result r;
    int rebuilt = 0;
    if (m.plan && !one_in(4)) {
        r = attn_plan_update(m.plan, d, &rebuilt);
        sum.updates++;
        sum.patched += !rebuilt;
        return CHECK_EQ(r, ATTN_OK);
    }
    attn_cpu_plan_params(d, 1 + below(4), &p);
    if (one_in(3)) p.row_tile = 1 << below(9);
    p.share = below(3);
    p.max_seq = MAX_SEQ;
    p.max_tokens = MAX_Q;
    p.max_kv_len = MAX_LEN;
    p.partial_bytes = one_in(4) ? (size_t)below(20000) : PARTIAL_BYTES;
    if (!CHECK(attn_plan_bytes(d, &p) <= PLAN_BYTES)) return 0;
    CHECK_EQ(attn_plan_build(d, &p, mem_plan, attn_plan_bytes(d, &p) - 1, &m.plan),
             ATTN_ERR_BUFFER);
    r = attn_plan_build(d, &p, mem_plan, PLAN_BYTES, &m.plan);
    return CHECK_EQ(r, ATTN_OK) && CHECK(attn_cpu_scratch_bytes(d, m.plan) <= SCRATCH_BYTES);
}

// Every task once, in any order and in groups, as threads might; then the merges.
static void run_plan(const attn_desc *d) {
    static int32_t order[4096];
    int32_t i, j, x, n = m.plan->n_tasks, count;
    if (!CHECK(n <= 4096 && attn_plan_partial_bytes(m.plan) <= PARTIAL_BYTES)) return;
    memset(mem_partials, 0xff, attn_plan_partial_bytes(m.plan));
    for (i = 0; i < n; i++) {
        j = below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    if (one_in(3)) { // in order, several at a time
        for (i = 0; i < n; i += count) {
            count = 1 + below(n - i);
            CHECK_EQ(attn_cpu_run(d, m.plan, i, count, mem_partials, mem_scratch[0]), ATTN_OK);
        }
    } else {
        for (i = 0; i < n; i++)
            CHECK_EQ(attn_cpu_run(d, m.plan, order[i], 1, mem_partials, mem_scratch[below(2)]),
                     ATTN_OK);
    }
    for (i = m.plan->n_merges - 1; i >= 0; i--) {
        CHECK_EQ(attn_cpu_merge(d, m.plan, i, 1, mem_partials), ATTN_OK);
        sum.merges++;
    }
    for (x = 0, i = 0; i < d->n_seq; i++) x += d->kv.kv_len[i];
    note("attend", d->n_seq, d->q_start[d->n_seq], x);
}

// The model's own K and V, up to the last token.
static void flat_store(int32_t s) {
    const run *r = m.live + s;
    int64_t slot[MAX_LEN];
    int32_t i, l, n = r->n - m.n_flat[s];
    for (i = 0; i < n; i++) slot[i] = m.n_flat[s] + i;
    for (l = 0; l < m.n_layers; l++) {
        attn_desc d = flat_desc(s, l);
        store_rows(&d, l, r->hash + m.n_flat[s], slot, n);
    }
    m.n_flat[s] = r->n;
}

// The rows in the pages are those that the model stored, byte for byte.
static void verify_rows(int32_t s) {
    static unsigned char a[ROW * 4 + 64], b[ROW * 4 + 64];
    int32_t page[MAX_LEN], j, k, n = m.live[s].n, l = below(m.n_layers), v;
    attn_desc d = layer_desc(l), f = flat_desc(s, l);
    if (n == 0 || m.n_queue > 0) return;
    flat_store(s);
    CHECK_EQ(attn_tree_pages(m.t, s, page, MAX_LEN), (n + m.pt - 1) / m.pt);
    for (k = 0; k < 8; k++)
        for (v = 0; v < 2; v++) {
            j = below(n);
            CHECK_EQ(attn_kv_read_rows(&d, v, page[j / m.pt], j % m.pt, 1, a), ATTN_OK);
            CHECK_EQ(attn_kv_read_rows(&f, v, 0, j, 1, b), ATTN_OK);
            CHECK(memcmp(a, b, attn_kv_rows_bytes(&d, v, 1)) == 0);
        }
}

// Sequence i of the batch alone, over contiguous memory and with more of its tokens as queries: the
// same bits. Leaves its description for the oracle.
static void compare_flat(const batch *b, int32_t i, attn_desc *d, int32_t *q_start) {
    int32_t s = b->seq[i], n = m.live[s].n, q = b->q_start[i + 1] - b->q_start[i], more = 0, k;
    size_t row = (size_t)m.d.n_heads * (size_t)m.d.v_head_dim *
                 (size_t)(attni_bits_of(m.d.o.dtype) / 8);
    flat_store(s);
    *d = flat_desc(s, b->layer);
    d->mask = b->d.mask;
    if (d->mask.kind == ATTN_MASK_TREE) d->mask.tree_parent = b->parent + b->q_start[i];
    else more = below(n - q + 1 < 24 ? n - q + 1 : 24);
    for (k = 0; k < q + more; k++) fill_query(m.live + s, n - q - more + k, q_flat, k);
    q_start[0] = 0;
    q_start[1] = q + more;
    d->q_start = q_start;
    d->kv.kv_len = b->kv_len + i;
    d->q.data = q_flat;
    d->o.data = o_flat;
    d->lse = lse_flat;
    CHECK_EQ(attn_cpu_forward(d, mem_forward, FORWARD_BYTES, 1), ATTN_OK);
    CHECK(memcmp(o_flat + (size_t)more * row, o_rows + (size_t)b->q_start[i] * row,
                 (size_t)q * row) == 0);
    CHECK(memcmp(lse_flat + more * m.d.n_heads, lse_rows + b->q_start[i] * m.d.n_heads,
                 (size_t)(q * m.d.n_heads) * 4) == 0);
    sum.rows += q;
}

// ---- the oracle: naive attention of one row over the contiguous memory, in fp64 and in plain f32

static struct { // sums over everything that shares a contract
    double exec2, plain2, ref2, exec_max, plain_max, ref_max;
    long long n;
} accuracy[3][2]; // by O's dtype; 1: bf16 dot products

static double flat_value(const void *p, attn_dtype t, int32_t j, int32_t h, int32_t dim,
                         int32_t e) {
    int64_t at = (int64_t)j * m.d.n_kv_heads + h;
    int64_t elements = (int64_t)MAX_LEN * m.d.n_kv_heads * dim;
    float scale = 1;
    if (attni_is_scaled(t))
        memcpy(&scale, (const char *)p + (elements * attni_bits_of(t) / 8 + 3) / 4 * 4 + 4 * at, 4);
    return (double)attni_get(p, t, at * dim + e) * (double)scale;
}

static int sees(const attn_desc *d, int32_t n, int32_t q, int32_t i, int32_t j) {
    const attn_mask *k = &d->mask;
    int32_t first = n - q, p = first + i, kp = j, a, x;
    if (k->kind == ATTN_MASK_TREE) {
        for (p = first, a = k->tree_parent[i]; a >= 0; a = k->tree_parent[a]) p++;
        if (j >= first) {
            for (a = i; a >= 0 && first + a != j; a = k->tree_parent[a]) {}
            if (a < 0) return 0;
            for (kp = first, x = k->tree_parent[a]; x >= 0; x = k->tree_parent[x]) kp++;
        }
    } else if (j > p) {
        return 0;
    }
    if (k->window_left && kp < p - (k->window_left - 1) && kp >= k->n_sink) return 0;
    if (k->keep_recent || k->keep_sink) return kp < k->keep_sink || p - kp < k->keep_recent;
    return 1;
}

// Scores of the keys that query i sees, in fp64 (-1e300: not seen) and in plain f32; gives by how
// much APPROX may miss them, as documented.
static double oracle_scores(const attn_desc *d, int32_t i, int32_t h, double *x, float *xf) {
    int32_t n = d->kv.kv_len[0], kh = h / (d->n_heads / d->n_kv_heads), dim = d->head_dim, j, e;
    float scale = (float)(1 / sqrt((double)dim)), cap = d->logits.softcap;
    int approx = d->numerics == ATTN_NUMERICS_APPROX && d->kv.k.dtype == ATTN_I8;
    double slack = 0;
    for (j = 0; j < n; j++) {
        double sum64 = 0, k1 = 0, q_top = 0;
        float sum32 = 0;
        x[j] = -1e300;
        if (!sees(d, n, d->q_start[1], i, j)) continue;
        for (e = 0; e < dim; e++) {
            double kv = flat_value(d->kv.k.data, d->kv.k.dtype, j, kh, dim, e);
            double qv = (double)attni_get(d->q.data, d->q.dtype,
                                          ((int64_t)i * d->n_heads + h) * dim + e);
            sum64 += qv * kv;
            sum32 += (float)qv * (float)kv;
            k1 += fabs(kv);
            if (fabs(qv) > q_top) q_top = fabs(qv);
        }
        x[j] = sum64 * (double)scale;
        xf[j] = sum32 * scale;
        if (cap > 0) {
            x[j] = (double)cap * tanh(x[j] / (double)cap);
            xf[j] = cap * tanhf(xf[j] / cap);
        }
        if (approx && q_top * k1 / 254 * (double)scale > slack)
            slack = q_top * k1 / 254 * (double)scale;
    }
    return slack;
}

static void oracle(const attn_desc *d, int32_t i, int32_t h) {
    static double x[MAX_LEN];
    static float xf[MAX_LEN];
    int32_t n = d->kv.kv_len[0], kh = h / (d->n_heads / d->n_kv_heads), vd = d->v_head_dim, j, e;
    double o[MAX_DIM] = {0}, abs[MAX_DIM] = {0}, top = -1e300, l = 0, slack, ulp;
    float of[MAX_DIM] = {0}, topf = -3e38f, lf = 0;
    int dot = strstr(attn_cpu_executor(d), "bdot") != NULL, o_id;
    int approx = d->numerics == ATTN_NUMERICS_APPROX && d->kv.k.dtype == ATTN_I8;
    slack = oracle_scores(d, i, h, x, xf);
    for (j = 0; j < n; j++) {
        if (x[j] > top) top = x[j];
        if (x[j] > -1e299 && xf[j] > topf) topf = xf[j];
    }
    if (d->logits.sink) {
        if ((double)d->logits.sink[h] > top) top = (double)d->logits.sink[h];
        if (d->logits.sink[h] > topf) topf = d->logits.sink[h];
        l = exp((double)d->logits.sink[h] - top);
        lf = expf(d->logits.sink[h] - topf);
    }
    for (j = 0; j < n; j++) {
        double w = exp(x[j] - top);
        float wf;
        if (x[j] < -1e299) continue;
        wf = expf(xf[j] - topf);
        l += w;
        lf += wf;
        for (e = 0; e < vd; e++) {
            double v = flat_value(d->kv.v.data, d->kv.v.dtype, j, kh, vd, e);
            o[e] += w * v;
            abs[e] += w * fabs(v);
            of[e] += wf * (float)v;
        }
    }
    ulp = d->o.dtype == ATTN_F32 ? 1.2e-7 : d->o.dtype == ATTN_F16 ? 9.8e-4 : 7.9e-3;
    o_id = d->o.dtype == ATTN_F32 ? 0 : d->o.dtype == ATTN_F16 ? 1 : 2;
    for (e = 0; e < vd; e++) {
        int64_t at = ((int64_t)i * d->n_heads + h) * vd + e;
        double got = (double)attni_get(d->o.data, d->o.dtype, at), ef, ep;
        double ref = l > 0 ? o[e] / l : 0;
        float plain = lf > 0 ? of[e] / lf : 0;
        uint8_t b[4];
        attni_put(b, d->o.dtype, 0, plain);
        ef = fabs(got - ref);
        ep = fabs((double)attni_get(b, d->o.dtype, 0) - ref);
        // one row by itself: no more than a few rounding errors of its largest terms
        CHECK(ef <= (d->o.dtype == ATTN_F32 ? 256 : 4) * ulp * (l > 0 ? abs[e] / l : 0) +
                        (exp(2 * slack) - 1) * 2 * (l > 0 ? abs[e] / l : 0) + 1e-7);
        if (approx) continue;
        accuracy[o_id][dot].exec2 += ef * ef;
        accuracy[o_id][dot].plain2 += ep * ep;
        accuracy[o_id][dot].ref2 += ref * ref;
        if (ef > accuracy[o_id][dot].exec_max) accuracy[o_id][dot].exec_max = ef;
        if (ep > accuracy[o_id][dot].plain_max) accuracy[o_id][dot].plain_max = ep;
        if (fabs(ref) > accuracy[o_id][dot].ref_max) accuracy[o_id][dot].ref_max = fabs(ref);
        accuracy[o_id][dot].n++;
    }
    sum.oracle++;
}

// The accuracy contract, over all rows that the oracle saw.
static void judge_accuracy(void) {
    static const double ulps[3] = {1.2e-7, 9.8e-4, 7.9e-3};
    int i, dot;
    for (i = 0; i < 3; i++)
        for (dot = 0; dot < 2; dot++) {
            double n = (double)accuracy[i][dot].n, floor2, rms, plain, top;
            if (n < 2000) continue;
            floor2 = ulps[i] * ulps[i] * accuracy[i][dot].ref2;
            rms = sqrt(accuracy[i][dot].exec2 / n);
            plain = sqrt((accuracy[i][dot].plain2 > floor2 ? accuracy[i][dot].plain2 : floor2) / n);
            top = ulps[i] * accuracy[i][dot].ref_max;
            if (accuracy[i][dot].plain_max > top) top = accuracy[i][dot].plain_max;
            CHECK(rms <= (dot ? 2 : 1.5) * plain);
            CHECK(accuracy[i][dot].exec_max <= (dot ? 4 : 3) * top);
            printf("O %s%s: RMS error %.2f, largest %.2f of plain f32's, %.0f values\n",
                   i == 0 ? "f32" : i == 1 ? "f16" : "bf16", dot ? " by bf16 dots" : "",
                   rms / plain, accuracy[i][dot].exec_max / top, n);
        }
}

static void attend(batch *b) {
    attn_desc d;
    int32_t i, q, q_start[2], left = 2;
    size_t k, bytes = (size_t)b->q_start[b->n] * (size_t)(m.d.n_heads * m.d.v_head_dim) *
                      (size_t)(attni_bits_of(m.d.o.dtype) / 8);
    memset(o_rows, 0xff, bytes);
    if (!make_plan(&b->d)) return;
    run_plan(&b->d);
    for (k = 0; k < bytes; k += 7) m.log = mix(m.log, o_rows[k]);
    for (i = 0; i < b->n && test_failed == 0; i++) {
        if ((q = b->q_start[i + 1] - b->q_start[i]) == 0) continue;
        compare_flat(b, i, &d, q_start);
        if (left > 0 && one_in(2)) {
            oracle(&d, below(q_start[1]), below(m.d.n_heads));
            left--;
        }
    }
    sum.steps++;
}

static void op_step(void) {
    static batch b;
    int32_t i, s, n_steps = one_in(3) ? 2 + below(6) : 1;
    for (i = 0; i < 3 && (s = pick()) >= 0; i++) // decode, or the next chunks of prompts
        if (m.live[s].n < m.max_len) op_grow(s, one_in(3) ? 1 + below(12) : 1);
    memset(&b, 0, sizeof b);
    if (!choose_batch(&b)) return;
    for (i = 0; i < n_steps && test_failed == 0; i++) {
        if (i > 0) next_batch(&b);
        flush();
        sweep();
        if (one_in(2)) ack(1 + below(4));
        make_batch(&b, n_steps > 1);
        attend(&b);
    }
}

// ---- epochs

static void op(void) {
    static run r;
    int32_t s = pick(), what = below(100);
    if (m.n_queue > MAX_EVENTS - 5 * MAX_LEN || m.n_done + m.n_copies > MAX_COPIES - 8) what = 99;
    if (s < 0 && what >= 18) what %= 18;
    if (m.lazy && (what >= 66 || what == 99) && m.n_copies < 40 && one_in(2)) what = 18 + below(34);
    // tokens are stored before their sequence may shorten or end, as the contract says
    if (what >= 52 && what < 76 && one_in(2)) flush_stores();
    else if (what >= 52 && what < 80) flush();
    if (what < 99 && one_in(m.step_rate)) {
        op_step();
        return;
    }
    if (what < 10) random_run(&r, m.max_len), append(-1, &r);
    else if (what < 15) op_open();
    else if (what < 18) op_match();
    else if (what < 36) op_grow(s, 1);
    else if (what < 46) op_grow(s, 1 + below(m.max_len / 4));
    else if (what < 52) op_fork(s);
    else if (what < 62) op_truncate(s);
    else if (what < 76) op_release(s);
    else if (what < 78 && m.has_saved) op_load();
    else if (what < 80) op_save(s);
    else if (what < 84) op_pin();
    else if (what < 87) op_evict();
    else if (what < 89) CHECK_EQ(attn_tree_priority(m.t, s, below(3)), ATTN_OK);
    else if (what < 94) ack(1 + below(4));
    else flush(), ack(MAX_COPIES);
}

static void draw_problem(void) {
    static const attn_dtype kv[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                    ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    static const int32_t dims[] = {8, 16, 16, 24};
    attn_cpu_isa isa;
    int i;
    do isa = (attn_cpu_isa)(1 + below(ATTN_CPU_ISA_COUNT - 1));
    while (attn_cpu_set_isa(isa) != ATTN_OK);
    m.n_layers = 1 + below(LAYERS);
    m.d.n_kv_heads = 1 + below(KV_HEADS);
    m.d.n_heads = m.d.n_kv_heads * (1 + below(HEADS / m.d.n_kv_heads));
    m.d.head_dim = dims[below(4)];
    m.d.v_head_dim = dims[below(4)];
    m.d.kv.k.dtype = kv[below(7)];
    m.d.kv.v.dtype = kv[below(7)];
    m.d.q.dtype = (attn_dtype)(ATTN_F32 + below(3));
    m.d.o.dtype = (attn_dtype)(ATTN_F32 + below(3));
    if (one_in(4)) m.d.kv.k.dtype = m.d.kv.v.dtype = m.d.q.dtype = m.d.o.dtype = ATTN_BF16;
    m.d.numerics = (attn_numerics)below(3);
    m.d.kv.layout = (attn_layout)below(3);
    if (one_in(2)) m.d.mask.window_left = 1 + below(m.max_len);
    if (one_in(3)) m.d.mask.n_sink = 1 + below(8);
    if (one_in(6)) m.d.mask.keep_sink = 1 + below(8), m.d.mask.keep_recent = 1 + below(40);
    if (one_in(5)) m.d.logits.softcap = 5;
    for (i = 0; i < HEADS; i++) m.sinks[i] = (float)below(5) - 2;
    if (one_in(4)) m.d.logits.sink = m.sinks;
}

static void draw_sizes(attn_tree_desc *td) {
    static const int32_t small[] = {1, 2, 3, 4, 8, 16}, large[] = {16, 24, 32};
    int is_long = one_in(6), i; // sequences of several spans
    memset(td, 0, sizeof *td);
    m.max_len = is_long ? MAX_LEN : 40 + below(60);
    m.step_rate = is_long ? 40 : 24;
    m.pt = is_long ? large[below(3)] : small[below(6)];
    m.n_pages = is_long ? 36 + below(28) : 4 + below(m.pt < 3 ? 60 : 28);
    m.max_seq = 2 + below(MAX_SEQ - 1);
    m.tight = one_in(4);
    m.lazy = one_in(3);
    if (m.tight) td->max_nodes = 6 + below(16);
    m.n_ns = 1 + below(is_long && one_in(2) ? 1 : 3);
    m.alphabet = 2 + below(4);
    m.fault_rate = one_in(2) ? 20 + below(100) : 0;
    hash_mask = one_in(3) ? 0 : one_in(2) ? 7 : 0xffffffffu;
    draw_problem();
    if (m.d.kv.layout == ATTN_K16) m.pt = (m.pt + 15) / 16 * 16;
    td->n_pages = m.d.kv.n_pages = m.n_pages;
    td->page_tokens = m.d.kv.page_tokens = m.pt;
    td->max_seq = m.max_seq;
    for (i = 0; i < PROMPTS; i++) {
        int32_t n = is_long ? ATTN_SPAN + below(200) : m.max_len / 4 + below(m.max_len / 2);
        m.prompt[i].ns = 1;
        while (m.prompt[i].n < n) run_push(m.prompt + i, below(m.alphabet));
    }
}

static int epoch_begin(uint64_t seed) {
    static const int32_t nobody[2] = {0, 0};
    attn_tree_desc td;
    attn_pool *pool;
    int l, v, s;
    memset(&m, 0, sizeof m);
    n_log = 0;
    m.rng.state = seed;
    for (v = 0; v < 2; v++)
        for (l = 0; l < LAYERS; l++) {
            m.kv[l][v] = mem_kv[l][v];
            for (s = 0; s < MAX_SEQ; s++) m.flat[s][l][v] = mem_flat[s][l][v];
        }
    draw_sizes(&td);
    m.d.n_seq = 1; // store and copies want a batch, though an empty one
    m.d.q_start = m.d.kv.kv_len = nobody;
    m.d.kv.k.data = m.kv[0][0];
    m.d.kv.v.data = m.kv[0][1];
    if (!CHECK(attn_tree_bytes(&td) <= TREE_BYTES) ||
        !CHECK_EQ(attn_tree_init(&td, mem_tree, TREE_BYTES, &m.t), ATTN_OK))
        return 0;
    for (v = 0; v < 2; v++) {
        if (!CHECK(attn_kv_page_bytes(&m.d, v) * (size_t)m.n_pages <= KV_BYTES)) return 0;
        m.token_bytes += attn_kv_rows_bytes(&m.d, v, 1) * (size_t)m.n_layers;
    }
    m.token_bytes += 8;
    pool = attn_tree_pool(m.t);
#ifdef ATTN_CHECK
    pool->freed = freed;
#endif
    m.d.kv.pool = pool;
    sweep();
    note("epoch", m.n_pages, m.pt, m.max_seq);
    note("problem", m.d.head_dim, m.d.kv.k.dtype * 16 + m.d.kv.v.dtype, m.d.numerics);
    return 1;
}

static void epoch_end(void) {
    attn_tree_stats end;
    int32_t s;
    flush();
    ack(MAX_COPIES);
    for (s = 0; s < m.max_seq; s++)
        if (m.used[s]) CHECK_EQ(attn_tree_release(m.t, s, s & 1), ATTN_OK);
    for (s = 0; s < m.n_pin; s++)
        CHECK_EQ(attn_tree_pin(m.t, m.pin[s].ns, m.pin[s].token, m.pin[s].n, -1), ATTN_OK);
    CHECK_EQ(attn_tree_check(m.t), ATTN_OK);
    CHECK_EQ(attn_tree_evict(m.t, -1, NULL), ATTN_OK);
    end = stats();
    CHECK(end.n_free == m.n_pages && end.n_nodes == 0 && end.tokens_cached == 0 && end.n_seq == 0);
}

// Runs n operations of an epoch; gives the hash of its log.
static uint64_t epoch(uint64_t seed, uint64_t number, int32_t n) {
    int begun = epoch_begin(mix(mix(1, seed), number));
    for (m.n_ops = 0; begun && m.n_ops < n && test_failed == 0; m.n_ops++) {
        int32_t s;
        op();
        sweep();
        if (one_in(12)) verify_all();
        else if ((s = pick()) >= 0) verify_seq(s);
        if (one_in(20) && (s = pick()) >= 0) verify_rows(s);
    }
    if (test_failed == 0) epoch_end();
    if (test_failed > 0) {
        printf("    attn_sim %llu, epoch %llu, operation %d; the last of its log:\n",
               (unsigned long long)seed, (unsigned long long)number, (int)m.n_ops);
        print_tail();
        printf("    again: attn_sim %llu %d %llu\n", (unsigned long long)seed, EPOCH_OPS,
               (unsigned long long)number);
    }
    return m.log;
}

static void *block(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    if (!p) exit(2);
    memset(p, 0xff, bytes);
    return p;
}

static void allocate(void) {
    int l, v, s;
    mem_tree = block(TREE_BYTES);
    mem_plan = block(PLAN_BYTES);
    mem_partials = block(PARTIAL_BYTES);
    mem_scratch[0] = block(SCRATCH_BYTES);
    mem_scratch[1] = block(SCRATCH_BYTES);
    mem_forward = block(FORWARD_BYTES);
    mem_blob = block(BLOB_BYTES);
    for (v = 0; v < 2; v++)
        for (l = 0; l < LAYERS; l++) {
            mem_kv[l][v] = block(KV_BYTES);
            for (s = 0; s < MAX_SEQ; s++) mem_flat[s][l][v] = block(FLAT_BYTES);
        }
}

static void release(void) {
    int l, v, s;
    free(mem_tree), free(mem_plan), free(mem_partials), free(mem_scratch[0]);
    free(mem_scratch[1]), free(mem_forward), free(mem_blob);
    for (v = 0; v < 2; v++)
        for (l = 0; l < LAYERS; l++) {
            free(mem_kv[l][v]);
            for (s = 0; s < MAX_SEQ; s++) free(mem_flat[s][l][v]);
        }
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), number = test_arg(argc, argv, 3, 0), log = 0, h;
    long long left = (long long)test_arg(argc, argv, 2, 100000), done = 0;
    attn_cpu_open();
    allocate();
    for (; left > 0 && test_failed == 0; left -= EPOCH_OPS, number++) {
        int32_t n = left < EPOCH_OPS ? (int32_t)left : EPOCH_OPS;
        h = epoch(seed, number, n);
        done += m.n_ops;
        log = mix(log, h);
        if (number % 16 == 0 && test_failed == 0) CHECK(epoch(seed, number, n) == h);
    }
    judge_accuracy();
    printf("seed %llu: %lld operations, log %016llx\n", (unsigned long long)seed, done,
           (unsigned long long)log);
    printf("  %lld attention steps, %lld rows equal to those computed alone, %lld against fp64\n",
           sum.steps, sum.rows, sum.oracle);
    printf("  %lld hits, %lld page copies, %lld loads, %lld plan updates (%lld patched), %lld "
           "merges\n", sum.hits, sum.copies, sum.loads, sum.updates, sum.patched, sum.merges);
    printf("  %lld requests refused, %lld of them injected faults\n", sum.full, sum.faults);
    release();
    return TEST_END();
}

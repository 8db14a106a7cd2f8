/* test_faults.c - every request of the library refused in turn, every callback failed in turn, and
   pools, node stores and sequence slots of every size too small.
   test_faults [SEED [SCRIPTS]]
   cc -O2 -I. -Itests tests/test_faults.c -o test_faults -lm

   The library allocates nothing, so what can run out are pages, nodes and sequence slots. A script
   of tree operations runs with the k-th request for one of them refused, for k = 1, 2, ... until a
   run needs no k-th. After a failed call everything observable is as it was (tokens, K and V,
   sequences, pins, priorities, what would be evicted next, counters), the same call made again
   succeeds with the outcome it had without the fault, and in the end nothing is lost. */
#include "test.h"

static long long fault_n, fault_at; // requests so far; the one to refuse
#define ATTNI_FAULT() (++fault_n == fault_at)
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

enum { MAX_SEQ = 8, MAX_LEN = 48, MAX_OPS = 64, MAX_PAGES = 96, MAX_COPIES = 64, PT_MAX = 8 };

// ---- a script: operations on up to MAX_SEQ named sequences

typedef enum kind {
    OPEN, INSERT, APPEND, FORK, TRUNCATE, RELEASE, PIN, UNPIN, PRIORITY, EVICT, ACK, SAVE, LOAD,
    N_KINDS
} kind;
static const char *const kinds[N_KINDS] = {"open",    "insert", "append", "fork",     "truncate",
                                           "release", "pin",    "unpin",  "priority", "evict",
                                           "ack",     "save",   "load"};

typedef struct step {
    kind what;
    int32_t a, b; // a: the sequence; b: where a fork goes, a length, a flag, a count
    uint64_t ns;
    int32_t n, token[MAX_LEN];
} step;

typedef struct script {
    int32_t n, page_tokens, n_pages, max_nodes, max_seq;
    step step[MAX_OPS];
} script;

typedef struct engine {
    attn_tree *t;
    int32_t pt, n_pages;
    int32_t seq[MAX_SEQ];          // handle or -1
    attn_page_copy copy[MAX_COPIES]; // not acknowledged
    int32_t n_copy;
    uint64_t tag[MAX_PAGES * PT_MAX]; // whose K and V a slot holds
    unsigned char blob[48 + MAX_LEN * 12];
    size_t blob_bytes;
    uint64_t blob_ns;
    long long callback_n, callback_at; // the callback to fail
    unsigned char *mem;
} engine;

static uint64_t mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0xd6e8feb86659fd93u;
    return h ^ (h >> 31);
}

static uint64_t prefix_hash(uint64_t ns, const int32_t *token, int32_t n) {
    uint64_t h = mix(5, ns);
    int32_t i;
    for (i = 0; i < n; i++) h = mix(h, (uint32_t)token[i] + 2u);
    return h;
}

// ---- everything observable, as a hash that page ids, node ids and borders do not enter

static uint64_t node_hash(const attn_tree *t, int32_t x, int32_t end) { // tokens up to end
    int32_t token[MAX_LEN], pos, page;
    const attni_tree_node *n = t->node + x;
    while (n->parent >= 0) {
        page = n->first_page;
        for (pos = n->start; pos < n->end; pos++) {
            if (pos > n->start && pos % t->page_tokens == 0) page = t->next[page];
            token[pos] = *attni_page_token(t, page, pos % t->page_tokens);
        }
        n = t->node + n->parent;
    }
    return prefix_hash(n->key, token, end);
}

static uint64_t dump(const engine *e) {
    const attn_tree *t = e->t;
    attn_tree_stats st;
    uint64_t h = 1;
    int32_t x, s, pos, page, i;
    for (x = 0; x < t->max_nodes; x++) {
        const attni_tree_node *n = t->node + x;
        if (n->start < 0) continue;
        for (pos = n->start, page = n->first_page; pos < n->end; pos++) {
            uint64_t own = node_hash(t, x, pos + 1);
            if (pos > n->start && pos % t->page_tokens == 0) page = t->next[page];
            CHECK(e->tag[page * e->pt + pos % e->pt] == own); // K and V are the tokens' own
            h += mix(mix(mix(own, (uint64_t)n->cached), (uint64_t)n->priority), n->held > 0);
        }
        h += mix(node_hash(t, x, n->end), 77 + (uint64_t)n->pins);
        if (n->heap_at >= 0) h += mix(node_hash(t, x, n->end), 99 + (uint64_t)n->last_use);
    }
    for (s = 0; s < t->max_seq; s++)
        if (t->seq[s].node >= 0)
            h += mix(node_hash(t, t->seq[s].node, t->node[t->seq[s].node].end), 7 + (uint64_t)s);
    for (i = 0; i < t->n_pages; i++)
        h += t->copy_src[i] < 0 ? 0 : mix((uint64_t)i, (uint64_t)t->copy_src[i]);
    memset(&st, 0, sizeof st);
    attn_tree_get_stats(t, &st);
    h = mix(mix(mix(h, (uint64_t)st.n_free), (uint64_t)st.n_nodes), (uint64_t)st.n_seq);
    h = mix(mix(h, (uint64_t)st.tokens_hit), (uint64_t)st.tokens_missed);
    return mix(h, (uint64_t)st.pages_copied);
}

static int64_t evicted(const engine *e) {
    attn_tree_stats st;
    memset(&st, 0, sizeof st);
    attn_tree_get_stats(e->t, &st);
    return st.tokens_evicted;
}

// ---- one step

static void carry_out(engine *e, const attn_page_copy *c) {
    memcpy(e->tag + c->dst * e->pt, e->tag + c->src * e->pt, (size_t)c->n_tokens * 8);
}

static int read_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    engine *e = (engine *)user;
    memcpy(rows, e->tag + page * e->pt + place, (size_t)n * 8);
    return ++e->callback_n == e->callback_at;
}

static int write_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    engine *e = (engine *)user;
    if (++e->callback_n == e->callback_at) return 1;
    memcpy(e->tag + page * e->pt + place, rows, (size_t)n * 8);
    return 0;
}

static int copy_rows(void *user, const attn_page_copy *c) {
    engine *e = (engine *)user;
    carry_out(e, c);
    return ++e->callback_n == e->callback_at;
}

// New tokens [from, n) of a sequence are stored at once.
static void store(engine *e, int32_t seq, uint64_t ns, int32_t from) {
    int32_t token[MAX_LEN], page[MAX_LEN], n = attn_tree_length(e->t, seq), i;
    CHECK_EQ(attn_tree_tokens(e->t, seq, 0, n, token), ATTN_OK);
    CHECK(attn_tree_pages(e->t, seq, page, MAX_LEN) >= 0);
    for (i = from; i < n; i++)
        e->tag[page[i / e->pt] * e->pt + i % e->pt] = prefix_hash(ns, token, i + 1);
}

static uint64_t seq_ns(const engine *e, int32_t seq) {
    int32_t x = e->t->seq[seq].node;
    while (e->t->node[x].parent >= 0) x = e->t->node[x].parent;
    return e->t->node[x].key;
}

// Does the step apply, things being as they are?
static int applies(const engine *e, const step *p) {
    int32_t s = e->seq[p->a];
    switch (p->what) {
    case OPEN: case INSERT: case LOAD: return s < 0 && (p->what != LOAD || e->blob_bytes > 0);
    case APPEND: return s >= 0 && attn_tree_length(e->t, s) + p->n <= MAX_LEN;
    case FORK: return s >= 0 && e->seq[p->b] < 0;
    case TRUNCATE: case RELEASE: case PRIORITY: case SAVE: return s >= 0;
    default: return 1;
    }
}

// *out: what the caller learns by it.
static attn_result perform(engine *e, const step *p, int64_t *out) {
    int32_t s = e->seq[p->a], hit = 0, n = 0, to = -1, old;
    attn_result r = ATTN_OK;
    *out = 0;
    switch (p->what) {
    case OPEN:
        r = attn_tree_open(e->t, p->ns, p->token, p->n, &to, &hit);
        if (r == ATTN_OK) e->seq[p->a] = to;
        break;
    case INSERT:
        r = attn_tree_insert(e->t, p->ns, p->token, p->n, &to, &hit, e->copy + e->n_copy, 1, &n);
        if (r == ATTN_OK) {
            e->seq[p->a] = to;
            if (n) carry_out(e, e->copy + e->n_copy);
            store(e, to, p->ns, hit);
        }
        break;
    case APPEND:
        old = attn_tree_length(e->t, s);
        r = attn_tree_append(e->t, s, p->token, p->n, &hit, e->copy + e->n_copy, 1, &n);
        if (r == ATTN_OK && n) carry_out(e, e->copy + e->n_copy);
        if (r == ATTN_OK) store(e, s, seq_ns(e, s), old + hit);
        break;
    case FORK:
        r = attn_tree_fork(e->t, s, &to);
        if (r == ATTN_OK) e->seq[p->b] = to;
        break;
    case TRUNCATE:
        hit = attn_tree_length(e->t, s);
        r = attn_tree_truncate(e->t, s, p->b < hit ? p->b : hit);
        break;
    case RELEASE:
        r = attn_tree_release(e->t, s, p->b & 1);
        e->seq[p->a] = -1;
        break;
    case PIN: case UNPIN:
        r = attn_tree_pin(e->t, p->ns, p->token, p->n, p->what == PIN ? 1 : -1);
        break;
    case PRIORITY: r = attn_tree_priority(e->t, s, p->b); break;
    case EVICT: r = attn_tree_evict(e->t, p->b, &hit); break;
    case ACK:
        r = attn_tree_ack(e->t, e->copy, e->n_copy);
        e->n_copy = 0;
        break;
    case SAVE:
        e->blob_bytes = 0;
        r = attn_tree_save(e->t, s, 8, read_rows, e, e->blob, sizeof e->blob);
        if (r == ATTN_OK) e->blob_bytes = attn_tree_save_bytes(e->t, s, 8);
        e->blob_ns = seq_ns(e, s);
        break;
    default:
        r = attn_tree_load(e->t, e->blob_ns, 8, write_rows, copy_rows, e, e->blob, e->blob_bytes,
                           &to);
        if (r == ATTN_OK) e->seq[p->a] = to;
        break;
    }
    CHECK(r == ATTN_OK || n == 0);
    e->n_copy += n;
    *out = hit;
    return r;
}

// ---- a run of a script

typedef struct outcome {
    attn_result r[MAX_OPS];
    int64_t out[MAX_OPS], evicted[MAX_OPS];
    uint64_t end;
    int failed, cost_cache; // calls that failed; whether more was evicted than without the fault
} outcome;

static void begin(engine *e, const script *s) {
    attn_tree_desc d;
    size_t bytes;
    int32_t i;
    memset(e, 0, sizeof *e);
    memset(&d, 0, sizeof d);
    d.n_pages = e->n_pages = s->n_pages;
    d.page_tokens = e->pt = s->page_tokens;
    d.max_seq = s->max_seq;
    d.max_nodes = s->max_nodes;
    bytes = attn_tree_bytes(&d);
    e->mem = (unsigned char *)malloc(bytes);
    if (!e->mem) exit(2);
    CHECK_EQ(attn_tree_init(&d, e->mem, bytes - 1, &e->t), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_tree_init(&d, e->mem, bytes, &e->t), ATTN_OK);
    for (i = 0; i < MAX_SEQ; i++) e->seq[i] = -1;
}

static void finish(engine *e) {
    attn_tree_stats st;
    int32_t i, x;
    CHECK_EQ(attn_tree_ack(e->t, e->copy, e->n_copy), ATTN_OK);
    for (i = 0; i < MAX_SEQ; i++)
        if (e->seq[i] >= 0) CHECK_EQ(attn_tree_release(e->t, e->seq[i], i & 1), ATTN_OK);
    for (x = 0; x < e->t->max_nodes; x++) // pins left over; a pin may merge nodes away, so again
        while (e->t->node[x].start >= 0 && e->t->node[x].pins > 0) {
            int32_t token[MAX_LEN], y = x, n = e->t->node[x].end, pos, page;
            for (; e->t->node[y].parent >= 0; y = e->t->node[y].parent)
                for (pos = e->t->node[y].start, page = e->t->node[y].first_page;
                     pos < e->t->node[y].end; pos++) {
                    if (pos > e->t->node[y].start && pos % e->pt == 0) page = e->t->next[page];
                    token[pos] = *attni_page_token(e->t, page, pos % e->pt);
                }
            if (!CHECK_EQ(attn_tree_pin(e->t, e->t->node[y].key, token, n, -1), ATTN_OK)) return;
            x = 0;
        }
    CHECK_EQ(attn_tree_evict(e->t, -1, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_check(e->t), ATTN_OK);
    memset(&st, 0, sizeof st);
    attn_tree_get_stats(e->t, &st);
    CHECK(st.n_free == e->n_pages && st.n_nodes == 0 && st.n_seq == 0 && st.tokens_cached == 0);
    free(e->mem);
}

// A call failed: all is as it was. What it evicted on the way cannot come back; `may_evict`.
static void unchanged(engine *e, uint64_t before, int64_t was_evicted, int may_evict) {
    int lost = evicted(e) != was_evicted;
    CHECK_EQ(attn_tree_check(e->t), ATTN_OK);
    CHECK(!lost || may_evict);
    if (!lost) CHECK(dump(e) == before);
}

enum { RETRY = 1, MAY_EVICT = 2 };

// clean: the outcome to compare with, or NULL.
static void run(const script *s, int flags, long long callback_at, const outcome *clean,
                outcome *o) {
    engine e;
    int32_t i;
    int tainted = 0;
    memset(o, 0, sizeof *o);
    begin(&e, s);
    e.callback_at = callback_at;
    for (i = 0; i < s->n && test_failed == 0; i++) {
        const step *p = s->step + i;
        uint64_t before;
        int64_t was;
        if (!applies(&e, p) || e.n_copy == MAX_COPIES) continue;
        before = dump(&e);
        was = evicted(&e);
        o->r[i] = perform(&e, p, &o->out[i]);
        if (o->r[i] != ATTN_OK) {
            o->failed++;
            CHECK(o->r[i] == ATTN_ERR_FULL || o->r[i] == ATTN_ERR_CALLBACK ||
                  (p->what >= PIN && p->what <= UNPIN && o->r[i] == ATTN_ERR_NOT_FOUND));
            unchanged(&e, before, was, flags & MAY_EVICT);
            if ((flags & RETRY) && o->r[i] != (clean ? clean->r[i] : ATTN_OK))
                o->r[i] = perform(&e, p, &o->out[i]);
        }
        CHECK_EQ(attn_tree_check(e.t), ATTN_OK);
        // A refusal may cost cached tokens: room is looked for in another way. Then hits differ.
        o->evicted[i] = evicted(&e);
        if (clean && o->evicted[i] != clean->evicted[i]) tainted = o->cost_cache = 1;
        if (clean && !tainted) {
            CHECK_EQ(o->r[i], clean->r[i]);
            CHECK_EQ(o->out[i], clean->out[i]);
        }
        if (test_failed > 0) printf("    step %d: %s\n", (int)i, kinds[p->what]);
    }
    o->end = dump(&e);
    if (clean && !tainted) CHECK(o->end == clean->end || e.n_copy > 0); // copies are by page id
    fault_at = 0;
    finish(&e);
}

// ---- scripts

static void tokens(step *p, const char *text) {
    for (p->n = 0; text[p->n]; p->n++) p->token[p->n] = text[p->n];
}

static step *add(script *s, kind what, int32_t a, int32_t b, const char *text) {
    step *p = s->step + s->n++;
    memset(p, 0, sizeof *p);
    p->what = what;
    p->a = a;
    p->b = b;
    p->ns = 1;
    tokens(p, text);
    return p;
}

static void base_script(script *s) {
    memset(s, 0, sizeof *s);
    s->page_tokens = 4;
    s->n_pages = 24;
    s->max_seq = MAX_SEQ;
}

// A server: a prompt shared by requests that diverge inside a page, beams, drafts, a saved branch.
static void server_script(script *s) {
    base_script(s);
    add(s, INSERT, 0, 0, "you are a helpful model");
    add(s, PIN, 0, 0, "you are a");
    add(s, FORK, 0, 1, "");
    add(s, APPEND, 0, 0, " what is");
    add(s, APPEND, 1, 0, " where");
    add(s, FORK, 1, 2, "");
    add(s, APPEND, 1, 0, "x");
    add(s, APPEND, 2, 0, "y");
    add(s, TRUNCATE, 1, 25, "");
    add(s, PRIORITY, 2, 3, "");
    add(s, SAVE, 0, 0, "");
    add(s, ACK, 0, 0, "");
    add(s, RELEASE, 0, 1, "");
    add(s, RELEASE, 2, 0, "");
    add(s, EVICT, 0, 2, "");
    add(s, LOAD, 3, 0, "");
    add(s, OPEN, 4, 0, "you are a helpful person");
    add(s, APPEND, 4, 0, "person");
    add(s, TRUNCATE, 4, 5, "");
    add(s, UNPIN, 0, 0, "you are a");
    add(s, INSERT, 5, 0, "other things altogether, and long")->ns = 2;
    add(s, RELEASE, 5, 1, "");
    add(s, INSERT, 6, 0, "other things altogether, not so long")->ns = 2;
}

// A saved branch comes back beside one that leaves it inside a page: a page is copied, then a row
// cannot be written.
static void branch_script(script *s) {
    base_script(s);
    add(s, INSERT, 0, 0, "abcdefghij");
    add(s, SAVE, 0, 0, "");
    add(s, RELEASE, 0, 0, "");
    add(s, INSERT, 1, 0, "abcdefXY");
    add(s, LOAD, 2, 0, "");
    add(s, APPEND, 2, 0, "k");
}

static void random_script(script *s, test_rng *r) {
    int32_t i, k, from;
    step *p;
    base_script(s);
    s->page_tokens = 1 + test_below(r, PT_MAX);
    s->n_pages = 6 + test_below(r, 60);
    s->max_seq = 3 + test_below(r, MAX_SEQ - 2);
    if (test_below(r, 3) == 0) s->max_nodes = 8 + test_below(r, 20);
    for (i = 0; i < MAX_OPS - 8; i++) {
        static const kind often[] = {INSERT, INSERT, INSERT, OPEN,     APPEND,  APPEND, APPEND,
                                     APPEND, FORK,   FORK,   TRUNCATE, RELEASE, PIN,    UNPIN,
                                     EVICT,  ACK,    SAVE,   LOAD,     PRIORITY, TRUNCATE};
        p = add(s, often[test_below(r, 20)], test_below(r, MAX_SEQ), test_below(r, MAX_SEQ), "");
        p->ns = 1 + (uint64_t)test_below(r, 2);
        if (p->what == TRUNCATE) p->b = test_below(r, MAX_LEN);
        if (p->what == EVICT) p->b -= 1;
        p->n = 1 + test_below(r, p->what == APPEND ? 6 : MAX_LEN / 2);
        from = i > 0 && test_below(r, 4) ? test_below(r, i) : -1; // often as an earlier step
        for (k = 0; k < p->n; k++)
            p->token[k] = from >= 0 && k < s->step[from].n && k < p->n - 1
                              ? s->step[from].token[k] : test_below(r, 2);
        if ((p->what == PIN || p->what == UNPIN) && from >= 0) {
            p->ns = s->step[from].ns;
            if (p->n > s->step[from].n) p->n = s->step[from].n;
            memcpy(p->token, s->step[from].token, (size_t)p->n * 4);
        }
    }
}

static long long n_refused, n_small, n_callbacks, n_cost;

static void refuse_each(const script *s) {
    outcome clean, o;
    long long k, requests;
    fault_n = fault_at = 0;
    run(s, MAY_EVICT, 0, NULL, &clean);
    requests = fault_n;
    CHECK(requests > 0);
    for (k = 1; k <= requests + 1 && test_failed == 0; k++) {
        fault_n = 0;
        fault_at = k;
        run(s, RETRY | MAY_EVICT, 0, &clean, &o);
        n_refused++;
        n_cost += o.cost_cache;
    }
    for (k = 1; test_failed == 0; k++) { // callbacks likewise
        fault_at = 0;
        run(s, RETRY | MAY_EVICT, k, &clean, &o);
        if (o.failed == clean.failed) break;
        n_callbacks++;
    }
}

// What is really too small: 1, 2, 3 ... of a resource until nothing fails any more.
static void small_sizes(const script *given) {
    script s;
    outcome o;
    int32_t i;
    int what;
    fault_at = 0;
    for (what = 0; what < 3; what++)
        for (i = 1; i < 200 && test_failed == 0; i++) {
            s = *given;
            s.max_nodes = 0;
            if (what == 0) s.n_pages = i;
            if (what == 1) s.max_nodes = i;
            if (what == 2) s.max_seq = i;
            if (s.n_pages > MAX_PAGES || s.max_seq > MAX_SEQ) break;
            run(&s, what == 1 ? MAY_EVICT : 0, 0, NULL, &o);
            n_small++;
        }
}

// ---- buffers of the executor: one byte too few, and nothing is written

static void test_buffers(void) {
    static float q[3 * 2 * 16], k[64 * 16], v[64 * 16];
    static float o[3 * 2 * 16];
    static const int32_t q_start[3] = {0, 1, 3}, kv_len[2] = {20, 30};
    unsigned char *mem = (unsigned char *)aligned_alloc(64, 1 << 20), *at;
    attn_plan_params p;
    attn_plan *plan = NULL;
    attn_desc d, more;
    size_t bytes, i;
    int32_t many[3] = {0, 30, 60}, page = -1;
    attn_pool pool;
    if (!mem) exit(2);
    memset(&d, 0, sizeof d);
    d.n_seq = 2;
    d.n_heads = 2;
    d.n_kv_heads = 1;
    d.head_dim = 16;
    d.q_start = q_start;
    d.kv.kv_len = kv_len;
    d.q.data = q;
    d.o.data = o;
    d.kv.k.data = k;
    d.kv.v.data = v;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.n_pages = 2;
    d.kv.page_tokens = 32;
    for (i = 0; i < 64 * 16; i++) v[i] = 1;
    attn_cpu_plan_params(&d, 1, &p);
    bytes = attn_plan_bytes(&d, &p);
    memset(mem, 0xa5, 1 << 20);
    CHECK_EQ(attn_plan_build(&d, &p, mem, bytes - 1, &plan), ATTN_ERR_BUFFER);
    for (i = 0; i < bytes; i++) CHECK(mem[i] == 0xa5);
    CHECK(plan == NULL);
    bytes = attn_cpu_forward_bytes(&d, 1);
    CHECK_EQ(attn_cpu_forward(&d, mem, bytes - 1, 1), ATTN_ERR_BUFFER);
    for (i = 0; i < 3 * 2 * 16; i++) CHECK(o[i] == 0);
    CHECK_EQ(attn_cpu_forward(&d, mem, bytes, 1), ATTN_OK);
    for (i = 0; i < 3 * 2 * 16; i++) CHECK(fabs((double)o[i] - 1) < 1e-5);
    // a plan outgrown: void, and the same memory takes a plan again
    CHECK_EQ(attn_plan_build(&d, &p, mem, 1 << 20, &plan), ATTN_OK);
    more = d;
    many[1] = kv_len[0], many[2] = kv_len[0] + kv_len[1];
    more.q_start = many;
    p.row_tile = 2;
    CHECK_EQ(attn_plan_build(&d, &p, mem, 1 << 20, &plan), ATTN_OK);
    CHECK_EQ(attn_plan_update(plan, &more, NULL), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_plan_build(&d, &p, mem, 1 << 20, &plan), ATTN_OK);
    // scratch: missing or misaligned
    memset(o, 0, sizeof o);
    at = mem + (1 << 19);
    CHECK_EQ(attn_cpu_run(&d, plan, 0, plan->n_tasks, NULL, NULL), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cpu_run(&d, plan, 0, plan->n_tasks, NULL, at + 4), ATTN_ERR_BUFFER);
    for (i = 0; i < 3 * 2 * 16; i++) CHECK(o[i] == 0);
    CHECK_EQ(attn_cpu_run(&d, plan, 0, plan->n_tasks, NULL, at), ATTN_OK);
    for (i = 0; i < 3 * 2 * 16; i++) CHECK(fabs((double)o[i] - 1) < 1e-5);
    // a pool: full, and one byte too few
    bytes = attn_pool_bytes(5);
    CHECK_EQ(attn_pool_init(&pool, 5, mem, bytes - 1), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_pool_init(&pool, 5, mem, bytes), ATTN_OK);
    for (i = 0; i < 5; i++) CHECK_EQ(attn_pool_alloc(&pool, &page), ATTN_OK);
    page = -7;
    CHECK_EQ(attn_pool_alloc(&pool, &page), ATTN_ERR_FULL);
    CHECK(page == -7 && pool.n_free == 0);
    CHECK_EQ(attn_pool_release(&pool, 3), ATTN_OK);
    CHECK_EQ(attn_pool_release(&pool, 3), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_alloc(&pool, &page), ATTN_OK);
    CHECK_EQ(page, 3);
    free(mem);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 60), i;
    script s;
    test_rng r;
    server_script(&s);
    refuse_each(&s);
    small_sizes(&s);
    branch_script(&s);
    refuse_each(&s);
    small_sizes(&s);
    for (i = 0; i < count && test_failed == 0; i++) {
        r.state = seed + i;
        random_script(&s, &r);
        refuse_each(&s);
        if (i % 4 == 0) small_sizes(&s);
        if (test_failed > 0) printf("    seed %llu\n", (unsigned long long)(seed + i));
    }
    test_buffers();
    printf("%lld refusals in turn (%lld of them cost cached tokens), %lld failed callbacks, %lld "
           "runs in too small a tree\n", n_refused, n_cost, n_callbacks, n_small);
    return TEST_END();
}

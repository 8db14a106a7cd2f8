/* test_tree.c - page pool, prefix tree and blob against a naive model.
   cc -O2 -I. tests/test_tree.c -o test_tree -lm && ./test_tree [SEED [N_OPS]]

   The model: every live sequence is a plain array of tokens; the cache is a list of such arrays. A
   token's "KV" is a hash of the tokens up to it, written into a (page, slot) array when the tree says
   that it must be stored and moved by the page copies, late and many at a time, as a device would.
   After every operation each sequence must read its own values back from its pages, free pages are
   poisoned, and the hits must be exactly the longest prefix that the model knows. */
#include "test.h"

static uint32_t hash_mask = 0xffffffffu; // 0: all hashes collide
#define ATTNI_HASH(parent, key) (attni_tree_hash(parent, key) & hash_mask)
#define ATTN_CORE_IMPLEMENTATION
#include "attn.h"

enum { MAX_SEQ = 8, MAX_LEN = 120, MAX_KEPT = 32, MAX_PIN = 4, MAX_PAGES = 40, MAX_TODO = 64,
       MAX_LATE = 4096 };
#define POISON 0xdeaddeaddeaddeadu

typedef struct run {
    uint64_t ns;
    int32_t n;
    int32_t token[MAX_LEN];
} run;

typedef struct model {
    test_rng rng;
    attn_tree *t;
    int32_t pt, n_pages, max_seq, n_ns, alphabet;
    int tight;           // few nodes: running out of them is part of the test
    int used[MAX_SEQ];   // by handle
    run live[MAX_SEQ];
    int32_t page[MAX_SEQ][MAX_LEN];    // page table after the last operation
    int32_t n_page[MAX_SEQ];
    run kept[MAX_KEPT];  // cached
    int32_t n_kept;
    run pin[MAX_PIN];
    int32_t n_pin;
    attn_page_copy todo[MAX_TODO], done[MAX_TODO]; // copies to carry out; to acknowledge
    int32_t n_todo, n_done;
    struct {
        int32_t at; // page * pt + slot
        uint64_t value;
    } late[MAX_LATE];    // stores to carry out
    int32_t n_late;
    uint64_t *kv;        // (n_pages, pt)
    uint64_t ns_in, ns_out; // of the blob being moved
    int32_t fail_at;     // row callback that fails
    attn_tree_stats was; // before the operation
} model;

static uint64_t mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0xd6e8feb86659fd93u;
    return h ^ (h >> 31);
}

static uint64_t value_at(const run *r, int32_t i) {
    uint64_t h = 1;
    int32_t j;
    for (j = 0; j <= i; j++) h = mix(h, (uint32_t)r->token[j] + 7u);
    return h ^ mix(3, r->ns);
}

static int32_t common(const run *a, const run *b) {
    int32_t i = 0;
    if (a->ns != b->ns) return 0;
    while (i < a->n && i < b->n && a->token[i] == b->token[i]) i++;
    return i;
}

// Longest prefix of r that live sequences and pins hold, and, with_kept, the cache.
static int32_t known(const model *m, const run *r, int with_kept) {
    int32_t i, best = 0, c;
    for (i = 0; i < m->max_seq; i++)
        if (m->used[i] && (c = common(r, m->live + i)) > best) best = c;
    for (i = 0; i < m->n_pin; i++)
        if ((c = common(r, m->pin + i)) > best) best = c;
    for (i = 0; with_kept && i < m->n_kept; i++)
        if ((c = common(r, m->kept + i)) > best) best = c;
    return best;
}

// ---- the caller's side: copies and stores

// The stores of a step in any order, then its copies in theirs.
static void flush(model *m) {
    int32_t i, k;
    while (m->n_late > 0) {
        k = test_below(&m->rng, m->n_late);
        m->kv[m->late[k].at] = m->late[k].value;
        m->late[k] = m->late[--m->n_late];
    }
    for (k = 0; k < m->n_todo; k++) {
        attn_page_copy c = m->todo[k];
        for (i = 0; i < c.n_tokens; i++) m->kv[c.dst * m->pt + i] = m->kv[c.src * m->pt + i];
        m->done[m->n_done++] = c;
    }
    m->n_todo = 0;
}

static void ack(model *m, int32_t n) {
    while (n-- > 0 && m->n_done > 0) {
        int32_t k = test_below(&m->rng, m->n_done);
        CHECK_EQ(attn_tree_ack(m->t, m->done + k, 1), ATTN_OK);
        m->done[k] = m->done[--m->n_done];
    }
}

static void poison(model *m) {
    int32_t p, i, from;
    for (p = 0; p < m->n_pages; p++) {
        from = m->t->pool.ref[p] == 0 ? 0 : m->t->fill[p];
        for (i = 0; i < m->n_todo; i++) // still to be read
            if (m->todo[i].src == p && from < m->todo[i].n_tokens) from = m->todo[i].n_tokens;
        for (i = from; i < m->pt; i++) m->kv[p * m->pt + i] = POISON;
    }
}

// ---- what must hold after every operation

static void verify_seq(model *m, int32_t s) {
    const run *r = m->live + s;
    int32_t page[MAX_LEN], token[MAX_LEN], i, n, n_page = (r->n + m->pt - 1) / m->pt, first, bad = 0;
    uint64_t h = 1, salt = mix(3, r->ns);
    CHECK_EQ(attn_tree_length(m->t, s), r->n);
    n = attn_tree_pages(m->t, s, page, MAX_LEN);
    if (!CHECK_EQ(n, n_page)) return;
    // Pages change only through the sequence's own calls, and those replace the table first.
    for (i = 0; i < n && i < m->n_page[s]; i++) bad += page[i] != m->page[s][i];
    CHECK_EQ(bad, 0);
    memcpy(m->page[s], page, (size_t)n * sizeof *page);
    m->n_page[s] = n;
    first = r->n > 0 ? test_below(&m->rng, r->n + 1) : 0;
    CHECK_EQ(attn_tree_tokens(m->t, s, 0, r->n, token), ATTN_OK);
    CHECK(r->n == 0 || memcmp(token, r->token, (size_t)r->n * sizeof *token) == 0);
    CHECK_EQ(attn_tree_tokens(m->t, s, first, r->n - first, token), ATTN_OK);
    CHECK(memcmp(token, r->token + first, (size_t)(r->n - first) * sizeof *token) == 0);
    if (m->n_late + m->n_todo > 0) return; // values are in flight
    for (i = 0, bad = 0; i < r->n; i++) {
        h = mix(h, (uint32_t)r->token[i] + 7u);
        bad += m->kv[page[i / m->pt] * m->pt + i % m->pt] != (h ^ salt);
    }
    CHECK_EQ(bad, 0);
}

static int before(const run *a, const run *b) { // 1: a sorts strictly before b
    int32_t c = common(a, b);
    if (a->ns != b->ns) return a->ns < b->ns;
    if (c == a->n || c == b->n) return a->n < b->n;
    return (uint32_t)a->token[c] < (uint32_t)b->token[c];
}

static void verify_pairs(model *m) {
    int32_t seqs[MAX_SEQ], order[MAX_SEQ], scratch[MAX_SEQ], n = 0, i, j, c, seen = 0;
    for (i = 0; i < m->max_seq; i++)
        if (m->used[i]) seqs[n++] = i;
    for (i = n - 1; i > 0; i--) {
        j = test_below(&m->rng, i + 1);
        c = seqs[i], seqs[i] = seqs[j], seqs[j] = c;
    }
    CHECK_EQ(attn_tree_order(m->t, seqs, n, order, scratch), ATTN_OK);
    for (i = 0; i < n; i++) {
        seen |= 1 << order[i];
        if (i == 0) continue;
        const run *a = m->live + seqs[order[i - 1]], *b = m->live + seqs[order[i]];
        CHECK(before(a, b) || (!before(b, a) && order[i - 1] < order[i]));
        c = common(a, b); // neighbours share every page that they can
        if (c < a->n || c < b->n) c -= c % m->pt;
        for (j = 0; j * m->pt < c; j++)
            CHECK_EQ(m->page[seqs[order[i]]][j], m->page[seqs[order[i - 1]]][j]);
    }
    CHECK_EQ(seen, (1 << n) - 1);
}

static void random_run(model *m, run *r, int32_t max);

// s: the sequence that the operation gave new tokens, from position first_new on; or -1.
static void resync(model *m, int32_t s, int32_t first_new) {
    attn_tree_stats now;
    int32_t i, j, left;
    attn_tree_get_stats(m->t, &now);
    if (now.tokens_evicted == m->was.tokens_evicted) return;
    for (i = 0; i < m->n_kept; i++) {
        run *k = m->kept + i;
        left = attn_tree_match(m->t, k->ns, k->token, k->n);
        CHECK(left >= known(m, k, 0) || k->n < known(m, k, 0));
        // New tokens were not in the tree when they came: the cache cannot have had them.
        if (s >= 0 && common(k, m->live + s) > first_new && left > first_new) left = first_new;
        k->n = left;
    }
    for (i = 0; i < m->n_kept; i++) // forget what another covers
        for (j = 0; j < m->n_kept; j++)
            if (i != j && common(m->kept + i, m->kept + j) == m->kept[i].n) {
                m->kept[i--] = m->kept[--m->n_kept];
                break;
            }
}

static void verify(model *m) {
    attn_tree_stats now;
    run probe;
    int32_t s, n_seq = 0;
    CHECK_EQ(attn_tree_check(m->t), ATTN_OK);
    poison(m);
    for (s = 0; s < m->max_seq; s++)
        if (m->used[s]) verify_seq(m, s), n_seq++;
    attn_tree_get_stats(m->t, &now);
    CHECK_EQ(now.n_seq, n_seq);
    random_run(m, &probe, MAX_LEN);
    CHECK_EQ(attn_tree_match(m->t, probe.ns, probe.token, probe.n), known(m, &probe, 1));
    if (test_below(&m->rng, 4) == 0) verify_pairs(m);
}

// ---- operations

// Tokens that often follow what is in the tree.
static void extend_run(model *m, run *r, int32_t max) {
    int32_t k = test_below(&m->rng, m->max_seq + MAX_KEPT);
    const run *from = k < m->max_seq ? m->live + k : m->kept + (k - m->max_seq) % MAX_KEPT;
    int follow = (k < m->max_seq ? m->used[k] : k - m->max_seq < m->n_kept) && common(r, from) == r->n;
    int32_t until = follow ? test_below(&m->rng, from->n + 1) : 0;
    if (max > MAX_LEN) max = MAX_LEN;
    while (r->n < max) {
        r->token[r->n] = r->n < until ? from->token[r->n] : test_below(&m->rng, m->alphabet) - 1;
        r->n++;
    }
}

static void random_run(model *m, run *r, int32_t max) {
    memset(r, 0, sizeof *r);
    r->ns = ((uint64_t)test_below(&m->rng, m->n_ns) << 40) + 5;
    extend_run(m, r, test_below(&m->rng, max + 1));
}

static int32_t pick(model *m) { // a live sequence or -1
    int32_t s = test_below(&m->rng, m->max_seq), i;
    for (i = 0; i < m->max_seq; i++, s = (s + 1) % m->max_seq)
        if (m->used[s]) return s;
    return -1;
}

// A failed call changed nothing but, where it may, what is cached.
static void verify_failed(model *m, int may_evict) {
    attn_tree_stats now;
    attn_tree_get_stats(m->t, &now);
    if (!may_evict) CHECK(memcmp(&now, &m->was, sizeof now) == 0);
    CHECK_EQ(now.tokens_hit, m->was.tokens_hit);
    CHECK_EQ(now.tokens_missed, m->was.tokens_missed);
    CHECK_EQ(now.n_seq, m->was.n_seq);
    resync(m, -1, 0);
}

static void op_append(model *m, int32_t s, const run *want, int insert) {
    int32_t old = insert ? 0 : m->live[s].n, expect, hit = -1, max = test_below(&m->rng, 8) > 0;
    int32_t n_copies = 0, i, n = want->n - old, page[MAX_LEN];
    attn_page_copy copy[1];
    attn_result r;
    expect = known(m, want, 1) - old;
    if (insert)
        r = attn_tree_insert(m->t, want->ns, want->token, n, &s, &hit, copy, max, &n_copies);
    else
        r = attn_tree_append(m->t, s, want->token + old, n, &hit, copy, max, &n_copies);
    if (r != ATTN_OK) {
        CHECK(r == ATTN_ERR_FULL || (r == ATTN_ERR_BUFFER && max == 0));
        CHECK_EQ(n_copies, 0);
        verify_failed(m, m->tight);
        if (r == ATTN_ERR_FULL && !m->tight && test_below(&m->rng, 4) == 0 &&
            (!insert || m->was.n_seq < m->max_seq)) { // it really was hopeless
            CHECK_EQ(attn_tree_evict(m->t, -1, NULL), ATTN_OK);
            resync(m, -1, 0);
            if (insert) r = attn_tree_insert(m->t, want->ns, want->token, n, &s, &hit, copy, 1, &n_copies);
            else r = attn_tree_append(m->t, s, want->token + old, n, &hit, copy, 1, &n_copies);
            CHECK_EQ(r, ATTN_ERR_FULL);
        }
        return;
    }
    if (!CHECK(s >= 0 && s < m->max_seq && (m->used[s] != 0) == !insert)) exit(1);
    CHECK_EQ(hit, expect);
    m->used[s] = 1;
    m->live[s] = *want;
    if (insert) m->n_page[s] = 0;
    // Its own partial last page may be exchanged for a copy; earlier pages may not.
    if (m->n_page[s] > old / m->pt) m->n_page[s] = old / m->pt;
    n = attn_tree_pages(m->t, s, page, MAX_LEN);
    if (!CHECK_EQ(n, (want->n + m->pt - 1) / m->pt)) exit(1);
    for (i = old + hit; i < want->n; i++, m->n_late++) {
        m->late[m->n_late].at = page[i / m->pt] * m->pt + i % m->pt;
        m->late[m->n_late].value = value_at(want, i);
    }
    for (i = 0; i < n_copies; i++) m->todo[m->n_todo++] = copy[i];
    resync(m, s, old + hit);
}

static void op_open(model *m) {
    int32_t s = -1, hit = -1;
    run r;
    attn_result e;
    random_run(m, &r, MAX_LEN / 2);
    e = attn_tree_open(m->t, r.ns, r.token, r.n, &s, &hit);
    if (e != ATTN_OK) {
        CHECK(e == ATTN_ERR_FULL && (m->was.n_seq == m->max_seq || m->tight));
        verify_failed(m, m->tight);
        return;
    }
    CHECK_EQ(hit, known(m, &r, 1));
    if (!CHECK(s >= 0 && s < m->max_seq && !m->used[s])) exit(1);
    r.n = hit;
    m->used[s] = 1;
    m->live[s] = r;
    m->n_page[s] = 0;
    resync(m, -1, 0);
}

static void op_fork(model *m, int32_t s) {
    int32_t out = -1;
    attn_result r = attn_tree_fork(m->t, s, &out);
    if (r != ATTN_OK) {
        CHECK(r == ATTN_ERR_FULL && m->was.n_seq == m->max_seq);
        return;
    }
    if (!CHECK(out >= 0 && out < m->max_seq && !m->used[out])) exit(1);
    m->used[out] = 1;
    m->live[out] = m->live[s];
    m->n_page[out] = m->n_page[s];
    memcpy(m->page[out], m->page[s], sizeof m->page[s]);
}

static void op_truncate(model *m, int32_t s) {
    int32_t n = m->live[s].n, to = test_below(&m->rng, 2) ? test_below(&m->rng, n + 1)
                                                           : n - test_below(&m->rng, n < 4 ? n + 1 : 4);
    attn_result r = attn_tree_truncate(m->t, s, to);
    if (r != ATTN_OK) {
        CHECK(r == ATTN_ERR_FULL && m->tight);
        verify_failed(m, 1);
        return;
    }
    m->live[s].n = to;
    if (m->n_page[s] > (to + m->pt - 1) / m->pt) m->n_page[s] = (to + m->pt - 1) / m->pt;
    resync(m, -1, 0);
    // The tail's own page may stand for its parent's where the two covered the same slots.
    if (to % m->pt != 0 && m->n_page[s] > to / m->pt) m->n_page[s] = to / m->pt;
}

static void make_kept_room(model *m) {
    if (m->n_kept < MAX_KEPT) return;
    attn_tree_get_stats(m->t, &m->was);
    m->was.tokens_evicted = -1; // always look again
    CHECK_EQ(attn_tree_evict(m->t, -1, NULL), ATTN_OK);
    resync(m, -1, 0);
    CHECK(m->n_kept < MAX_KEPT);
}

static void op_release(model *m, int32_t s) {
    int keep = test_below(&m->rng, 3) > 0;
    if (keep) make_kept_room(m);
    CHECK_EQ(attn_tree_release(m->t, s, keep), ATTN_OK);
    m->used[s] = 0;
    if (keep) m->kept[m->n_kept++] = m->live[s];
    CHECK_EQ(attn_tree_length(m->t, s), ATTN_ERR_NOT_FOUND);
}

static void op_pin(model *m) {
    run r;
    int32_t i = test_below(&m->rng, MAX_PIN), have;
    attn_result e;
    if (i < m->n_pin) {
        CHECK_EQ(attn_tree_pin(m->t, m->pin[i].ns, m->pin[i].token, m->pin[i].n, -1), ATTN_OK);
        m->pin[i] = m->pin[--m->n_pin];
        return;
    }
    make_kept_room(m);
    random_run(m, &r, MAX_LEN);
    have = known(m, &r, 1);
    if (r.n == 0) return;
    if (have < r.n && test_below(&m->rng, 4) > 0) r.n = have > 0 ? have : 1;
    attn_tree_get_stats(m->t, &m->was);
    e = attn_tree_pin(m->t, r.ns, r.token, r.n, 1);
    if (have < r.n) {
        CHECK_EQ(e, ATTN_ERR_NOT_FOUND);
    } else if (e != ATTN_OK) {
        CHECK(e == ATTN_ERR_FULL && m->tight);
        verify_failed(m, 1);
    } else {
        m->pin[m->n_pin++] = r;
        m->kept[m->n_kept++] = r; // stays cached when unpinned
        resync(m, -1, 0);
    }
}

static void op_evict(model *m) {
    int32_t want = test_below(&m->rng, 6) - 1, freed = -1, held = m->t->n_held_pages;
    attn_tree_stats now;
    CHECK_EQ(attn_tree_evict(m->t, want, &freed), ATTN_OK);
    attn_tree_get_stats(m->t, &now);
    CHECK_EQ(now.n_free - m->was.n_free, freed);
    if (want < 0 || freed < want) CHECK(now.n_free >= m->n_pages - held && m->t->n_heap == 0);
    else if (want == 0) CHECK_EQ(now.tokens_evicted, m->was.tokens_evicted);
    resync(m, -1, 0);
}

// ---- blobs

static int read_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    model *m = (model *)user;
    memcpy(rows, m->kv + page * m->pt + place, (size_t)n * 8);
    return --m->fail_at == 0;
}

static int write_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    model *m = (model *)user;
    int32_t i;
    uint64_t v;
    if (--m->fail_at == 0) return 1;
    for (i = 0; i < n; i++) {
        memcpy(&v, (unsigned char *)rows + 8 * i, 8);
        m->kv[page * m->pt + place + i] = v ^ mix(3, m->ns_in) ^ mix(3, m->ns_out);
    }
    return 0;
}

static int copy_page(void *user, const attn_page_copy *c) {
    model *m = (model *)user;
    memcpy(m->kv + c->dst * m->pt, m->kv + c->src * m->pt, (size_t)c->n_tokens * 8);
    return --m->fail_at == 0;
}

static void op_blob(model *m, int32_t s) {
    static unsigned char blob[64 + MAX_LEN * 12];
    size_t bytes = attn_tree_save_bytes(m->t, s, 8);
    int32_t out = -1, hit;
    run r = m->live[s];
    attn_result e;
    CHECK(bytes > 0 && bytes <= sizeof blob);
    m->fail_at = 0;
    CHECK_EQ(attn_tree_save(m->t, s, 8, read_rows, m, blob, bytes), ATTN_OK);
    r.ns = test_below(&m->rng, 2) ? r.ns : ((uint64_t)test_below(&m->rng, m->n_ns) << 40) + 5;
    if (test_below(&m->rng, 2)) { // load over what stays cached, or not
        CHECK_EQ(attn_tree_truncate(m->t, s, 0) == ATTN_OK, 1);
        m->live[s].n = m->n_page[s] = 0;
    }
    m->ns_in = m->live[s].ns;
    m->ns_out = r.ns;
    m->fail_at = test_below(&m->rng, 4) == 0 ? 1 + test_below(&m->rng, 4) : 0;
    hit = known(m, &r, 1);
    attn_tree_get_stats(m->t, &m->was);
    e = attn_tree_load(m->t, r.ns, 8, write_rows, copy_page, m, blob, bytes, &out);
    if (e != ATTN_OK) {
        CHECK(e == ATTN_ERR_FULL || (e == ATTN_ERR_CALLBACK && m->fail_at == 0));
        CHECK_EQ(out, -1);
        m->was.pages_copied = m->t->count.pages_copied;
        verify_failed(m, 1);
        return;
    }
    if (!CHECK(out >= 0 && out < m->max_seq && !m->used[out])) exit(1);
    m->used[out] = 1;
    m->live[out] = r;
    m->n_page[out] = 0;
    CHECK_EQ(m->t->count.tokens_hit - m->was.tokens_hit, hit);
    resync(m, out, hit);
}

// ---- the random test

static int step(model *m) {
    int32_t s = pick(m), what = test_below(&m->rng, 100), grow;
    run r;
    if (m->n_late > MAX_LATE / 2 || m->n_todo > MAX_TODO / 2 || m->n_done > MAX_TODO / 2) what = 99;
    if (s < 0 && what >= 15) what = what % 15;
    // Tokens are stored before their sequence may shorten or end, as the contract says.
    if (what >= 55 && what < 85) flush(m);
    attn_tree_get_stats(m->t, &m->was);
    if (what < 10) {
        random_run(m, &r, test_below(&m->rng, 3) ? MAX_LEN / 2 : MAX_LEN);
        op_append(m, -1, &r, 1);
    } else if (what < 15) {
        op_open(m);
    } else if (what < 50) {
        r = m->live[s];
        grow = test_below(&m->rng, 3) ? 1 + test_below(&m->rng, 3) : test_below(&m->rng, 30);
        extend_run(m, &r, r.n + grow);
        op_append(m, s, &r, 0);
    } else if (what < 55) {
        op_fork(m, s);
    } else if (what < 67) {
        op_truncate(m, s);
    } else if (what < 77) {
        op_release(m, s);
    } else if (what < 80) {
        op_blob(m, s);
    } else if (what < 86) {
        op_pin(m);
    } else if (what < 89) {
        op_evict(m);
    } else if (what < 91) {
        CHECK_EQ(attn_tree_priority(m->t, s, test_below(&m->rng, 3)), ATTN_OK);
    } else if (what < 94) {
        ack(m, 3);
    } else {
        flush(m);
        ack(m, MAX_TODO);
    }
    verify(m);
    if (test_below(&m->rng, 3) > 0) {
        flush(m);
        verify(m);
        if (test_below(&m->rng, 2)) ack(m, 1 + test_below(&m->rng, 3));
    }
    return test_failed == 0;
}

static int random_round(uint64_t seed, int32_t n_ops) {
    static const int32_t sizes[5] = {1, 2, 4, 16, 3};
    static model m;
    attn_tree_desc d;
    attn_tree_stats end;
    unsigned char *mem;
    size_t bytes;
    int32_t i;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    m.rng.state = seed;
    d.page_tokens = m.pt = sizes[test_below(&m.rng, 5)];
    d.n_pages = m.n_pages = 3 + test_below(&m.rng, (m.pt < 3 ? MAX_PAGES : MAX_PAGES / 2) - 3);
    d.max_seq = m.max_seq = 2 + test_below(&m.rng, MAX_SEQ - 1);
    m.tight = test_below(&m.rng, 3) == 0;
    if (m.tight) d.max_nodes = 4 + test_below(&m.rng, 12);
    m.n_ns = 1 + test_below(&m.rng, 3);
    m.alphabet = 2 + test_below(&m.rng, 3);
    hash_mask = test_below(&m.rng, 3) == 0 ? 0 : test_below(&m.rng, 2) ? 7 : 0xffffffffu;
    bytes = attn_tree_bytes(&d);
    mem = (unsigned char *)malloc(bytes + 16);
    m.kv = (uint64_t *)calloc((size_t)(m.n_pages * m.pt), 8);
    if (!mem || !m.kv) exit(2);
    memset(mem, 0xa5, bytes + 16);
    CHECK_EQ(attn_tree_init(&d, mem + 3, bytes, &m.t), ATTN_OK); // any alignment
    poison(&m);
    for (i = 0; i < n_ops; i++)
        if (!step(&m)) {
            printf("    seed %llu, operation %d of the round\n", (unsigned long long)seed, (int)i);
            break;
        }
    flush(&m);
    ack(&m, MAX_TODO);
    for (i = 0; i < m.max_seq; i++)
        if (m.used[i]) CHECK_EQ(attn_tree_release(m.t, i, i & 1), ATTN_OK);
    for (i = 0; i < m.n_pin; i++)
        CHECK_EQ(attn_tree_pin(m.t, m.pin[i].ns, m.pin[i].token, m.pin[i].n, -1), ATTN_OK);
    CHECK_EQ(attn_tree_check(m.t), ATTN_OK);
    CHECK_EQ(attn_tree_evict(m.t, -1, NULL), ATTN_OK);
    attn_tree_get_stats(m.t, &end);
    CHECK(end.n_free == m.n_pages && end.n_nodes == 0 && end.tokens_cached == 0);
    CHECK_EQ(attn_tree_check(m.t), ATTN_OK);
    for (i = 0; i < 13; i++) CHECK(mem[bytes + 3 + (size_t)i] == 0xa5 && mem[i % 3] == 0xa5);
    free(mem);
    free(m.kv);
    return test_failed == 0;
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), n_ops = test_arg(argc, argv, 2, 200000), done, i;
    printf("seed %llu, %llu operations\n", (unsigned long long)seed, (unsigned long long)n_ops);
    for (done = 0, i = 0; done < n_ops; done += 500, i++)
        if (!random_round(seed + i, (int32_t)(n_ops - done < 500 ? n_ops - done : 500))) break;
    return TEST_END();
}

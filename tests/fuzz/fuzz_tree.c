/* fuzz_tree.c - the prefix tree and its pool, one operation per few bytes, against a trie that
   holds one node per token.
   cc -DFUZZ_MAIN -I. -Itests tests/fuzz/fuzz_tree.c -o fuzz_tree && ./fuzz_tree CORPUS

   The trie knows which prefixes must be cached; only what the tree says it evicted may be missing,
   and never what a sequence or a pin holds. Each (page, slot) has a value, the hash of the tokens
   up to it: stores happen at once, page copies and their acknowledgements as late as the input
   likes, free pages are poisoned, and every sequence must read its own values back. Pools are
   small and nodes scarce, so running out of both is a common case. */
#include "fuzz.h"

static uint32_t hash_mask = 0xffffffffu; // 0: all hashes collide
#define ATTNI_HASH(parent, key) (attni_tree_hash(parent, key) & hash_mask)
#define ATTN_CORE_IMPLEMENTATION
#include "attn.h"

enum { MAX_SEQ = 6, MAX_PAGES = 24, MAX_PT = 8, MAX_LEN = 200, MAX_NODES = 200, MAX_PINS = 4 };
enum { MAX_TODO = 64, MAX_OPS = 250, N_NS = 3 };
#define POISON 0xdeaddeaddeaddeadu

typedef struct trie_node {
    int used, cached;
    int32_t parent, token, depth, held; // held: sequences and pins at or below
    uint64_t value;
} trie_node;

typedef struct model {
    fuzz_in in;
    attn_tree *t;
    int32_t pt, n_pages, max_seq, alphabet;
    int tight;
    trie_node node[MAX_NODES];      // 0 .. N_NS - 1: the roots
    int32_t seq[MAX_SEQ];           // node at which a sequence ends, -1: unused handle
    int32_t pin[MAX_PINS], n_pin;
    attn_page_copy todo[MAX_TODO], done[MAX_TODO];
    int32_t n_todo, n_done;
    uint64_t kv[MAX_PAGES * MAX_PT];
    attn_tree_stats was;
} model;

static uint64_t name_space(int32_t root) { return (uint64_t)root << 40 | 5u; }

// ---- the trie

static int32_t trie_child(const model *m, int32_t x, int32_t token) {
    int32_t i;
    for (i = N_NS; i < MAX_NODES; i++)
        if (m->node[i].used && m->node[i].parent == x && m->node[i].token == token) return i;
    return -1;
}

static int32_t trie_add(model *m, int32_t x, int32_t token) {
    int32_t i;
    for (i = N_NS; i < MAX_NODES && m->node[i].used; i++) {}
    FUZZ_CHECK(i < MAX_NODES);
    memset(&m->node[i], 0, sizeof m->node[i]);
    m->node[i].used = 1;
    m->node[i].parent = x;
    m->node[i].token = token;
    m->node[i].depth = m->node[x].depth + 1;
    m->node[i].value = (m->node[x].value ^ ((uint32_t)token + 7u)) * 0xd6e8feb86659fd93u;
    m->node[i].value ^= m->node[i].value >> 31;
    return i;
}

static int32_t trie_root(const model *m, int32_t x) {
    while (m->node[x].depth > 0) x = m->node[x].parent;
    return x;
}

static int32_t trie_path(const model *m, int32_t x, int32_t *token) {
    int32_t n = m->node[x].depth;
    for (; m->node[x].depth > 0; x = m->node[x].parent)
        token[m->node[x].depth - 1] = m->node[x].token;
    return n;
}

static int32_t trie_up(const model *m, int32_t x, int32_t depth) {
    while (m->node[x].depth > depth) x = m->node[x].parent;
    return x;
}

static void trie_hold(model *m, int32_t x) {
    for (; m->node[x].depth > 0; x = m->node[x].parent) m->node[x].held++;
}

// Forgets what nobody holds and nothing keeps cached.
static void trie_sweep(model *m) {
    int32_t i;
    for (i = 0; i < MAX_NODES; i++) m->node[i].held = 0;
    for (i = 0; i < m->max_seq; i++)
        if (m->seq[i] >= 0) trie_hold(m, m->seq[i]);
    for (i = 0; i < m->n_pin; i++) trie_hold(m, m->pin[i]);
    for (i = N_NS; i < MAX_NODES; i++)
        if (!m->node[i].cached && !m->node[i].held) m->node[i].used = 0;
}

static void trie_keep(model *m, int32_t x) {
    for (; m->node[x].depth > 0; x = m->node[x].parent) m->node[x].cached = 1;
}

// After an eviction: unheld nodes, deepest first, are gone when the tree does not find them.
static void trie_evicted(model *m) {
    int32_t token[MAX_LEN], depth, i, n;
    for (depth = MAX_LEN; depth > 0; depth--)
        for (i = N_NS; i < MAX_NODES; i++) {
            if (!m->node[i].used || m->node[i].depth != depth || m->node[i].held) continue;
            n = trie_path(m, i, token);
            if (attn_tree_match(m->t, name_space(trie_root(m, i)), token, n) < n)
                m->node[i].used = m->node[i].cached = 0;
        }
}

// ---- the caller's side

static void flush(model *m) {
    int32_t i, k;
    for (k = 0; k < m->n_todo; k++) {
        attn_page_copy c = m->todo[k];
        for (i = 0; i < c.n_tokens; i++) m->kv[c.dst * m->pt + i] = m->kv[c.src * m->pt + i];
        m->done[m->n_done++] = c;
    }
    m->n_todo = 0;
}

static void ack(model *m, int32_t n) {
    while (n-- > 0 && m->n_done > 0) {
        int32_t k = fuzz_below(&m->in, m->n_done);
        FUZZ_CHECK(attn_tree_ack(m->t, m->done + k, 1) == ATTN_OK);
        FUZZ_CHECK(attn_tree_ack(m->t, m->done + k, 1) == ATTN_ERR_ARGUMENT); // not twice
        m->done[k] = m->done[--m->n_done];
    }
}

// ---- what must hold after every operation

static int32_t sequence_pages(const model *m, int32_t s, int32_t *page) {
    int32_t n = m->node[m->seq[s]].depth, want = (n + m->pt - 1) / m->pt;
    FUZZ_CHECK(attn_tree_pages(m->t, s, page, want) == want);
    FUZZ_CHECK(want == 0 || attn_tree_pages(m->t, s, page, want - 1) == ATTN_ERR_BUFFER);
    return want;
}

static void verify_sequence(model *m, int32_t s) {
    int32_t page[MAX_LEN], token[MAX_LEN], path[MAX_LEN], n, i, j, x = m->seq[s], y, np;
    n = trie_path(m, x, path);
    FUZZ_CHECK(attn_tree_length(m->t, s) == n);
    FUZZ_CHECK(attn_tree_tokens(m->t, s, 0, n, token) == ATTN_OK);
    FUZZ_CHECK(n == 0 || memcmp(token, path, (size_t)n * sizeof *token) == 0);
    i = n / 3;
    FUZZ_CHECK(attn_tree_tokens(m->t, s, i, n / 2, token) == ATTN_OK);
    FUZZ_CHECK(n / 2 == 0 || memcmp(token, path + i, (size_t)(n / 2) * sizeof *token) == 0);
    np = sequence_pages(m, s, page);
    for (i = 0; i < np; i++) {
        FUZZ_CHECK(page[i] >= 0 && page[i] < m->n_pages && m->t->pool.ref[page[i]] > 0);
        for (j = 0; j < i; j++) FUZZ_CHECK(page[i] != page[j]);
    }
    for (y = x; m->n_todo == 0 && m->node[y].depth > 0; y = m->node[y].parent) {
        i = m->node[y].depth - 1;
        FUZZ_CHECK(m->kv[page[i / m->pt] * m->pt + i % m->pt] == m->node[y].value);
    }
}

// Two sequences share every whole page of their common prefix.
static void verify_sharing(const model *m) {
    int32_t a, b, i, pa[MAX_LEN], pb[MAX_LEN], x, y;
    for (a = 0; a < m->max_seq; a++)
        for (b = 0; b < a; b++) {
            if (m->seq[a] < 0 || m->seq[b] < 0) continue;
            x = m->seq[a], y = m->seq[b];
            while (x != y) {
                if (m->node[x].depth == 0 && m->node[y].depth == 0) break; // other namespaces
                if (m->node[x].depth >= m->node[y].depth) x = m->node[x].parent;
                else y = m->node[y].parent;
            }
            if (x != y) continue;
            (void)sequence_pages(m, a, pa);
            (void)sequence_pages(m, b, pb);
            for (i = 0; (i + 1) * m->pt <= m->node[x].depth; i++) FUZZ_CHECK(pa[i] == pb[i]);
        }
}

static int before(const model *m, int32_t a, int32_t b) { // < 0, 0, > 0
    int32_t ta[MAX_LEN], tb[MAX_LEN], na, nb, i, ra = trie_root(m, a), rb = trie_root(m, b);
    if (ra != rb) return ra < rb ? -1 : 1;
    na = trie_path(m, a, ta);
    nb = trie_path(m, b, tb);
    for (i = 0; i < na && i < nb; i++)
        if (ta[i] != tb[i]) return (uint32_t)ta[i] < (uint32_t)tb[i] ? -1 : 1;
    return na < nb ? -1 : na > nb;
}

static void verify_order(const model *m) {
    int32_t seqs[MAX_SEQ], order[MAX_SEQ], scratch[MAX_SEQ], n = 0, i, c;
    for (i = m->max_seq - 1; i >= 0; i--)
        if (m->seq[i] >= 0) seqs[n++] = i;
    FUZZ_CHECK(attn_tree_order(m->t, seqs, n, order, scratch) == ATTN_OK);
    for (i = 1; i < n; i++) {
        c = before(m, m->seq[seqs[order[i - 1]]], m->seq[seqs[order[i]]]);
        FUZZ_CHECK(c < 0 || (c == 0 && order[i - 1] < order[i]));
    }
}

static void verify(model *m) {
    attn_tree_stats now;
    int32_t i, n_tokens = 0, n_seq = 0;
    FUZZ_CHECK(attn_tree_check(m->t) == ATTN_OK);
    for (i = 0; i < m->n_pages * m->pt; i++)
        if (m->t->pool.ref[i / m->pt] == 0) m->kv[i] = POISON;
    for (i = N_NS; i < MAX_NODES; i++) n_tokens += m->node[i].used;
    for (i = 0; i < m->max_seq; i++) n_seq += m->seq[i] >= 0;
    memset(&now, 0, sizeof now);
    attn_tree_get_stats(m->t, &now);
    FUZZ_CHECK(now.tokens_cached == n_tokens && now.n_seq == n_seq);
    for (i = 0; i < m->max_seq; i++)
        if (m->seq[i] >= 0) verify_sequence(m, i);
    verify_sharing(m);
}

// An operation ended: brings the trie up to date with evictions. failed: nothing else may differ.
static void settle(model *m, int failed) {
    attn_tree_stats now;
    memset(&now, 0, sizeof now);
    attn_tree_get_stats(m->t, &now);
    if (failed)
        FUZZ_CHECK(now.tokens_hit == m->was.tokens_hit && now.n_seq == m->was.n_seq &&
                   now.tokens_missed == m->was.tokens_missed &&
                   now.pages_copied == m->was.pages_copied);
    if (failed && !m->tight) FUZZ_CHECK(memcmp(&now, &m->was, sizeof now) == 0);
    if (now.tokens_evicted != m->was.tokens_evicted) trie_evicted(m);
}

// ---- operations

static int32_t pick(model *m) { // a live sequence or -1
    int32_t k = fuzz_below(&m->in, m->max_seq), i;
    for (i = 0; i < m->max_seq; i++, k = (k + 1) % m->max_seq)
        if (m->seq[k] >= 0) return k;
    return -1;
}

// Tokens after node x: some way down the trie, then new ones. Returns how many; *hit: known ones.
static int32_t extend(model *m, int32_t x, int32_t *token, int32_t *hit) {
    int32_t n = 0, max = MAX_LEN - 1 - m->node[x].depth, down, more, c, k, t;
    down = fuzz_below(&m->in, 3) ? fuzz_below(&m->in, 40) : 0;
    for (; n < down && n < max; x = c) {
        k = fuzz_below(&m->in, m->alphabet);
        for (c = -1, t = 0; t < m->alphabet && c < 0; t++)
            c = trie_child(m, x, (k + t) % m->alphabet - 1);
        if (c < 0) break;
        token[n++] = m->node[c].token;
    }
    more = fuzz_below(&m->in, 3) ? fuzz_below(&m->in, 6) : fuzz_below(&m->in, 50);
    for (; more > 0 && n < max; more--) token[n++] = fuzz_below(&m->in, m->alphabet) - 1;
    *hit = 0;
    return n;
}

static int32_t walk(const model *m, int32_t x, const int32_t *token, int32_t n, int32_t *at) {
    int32_t i, c;
    for (i = 0; i < n && (c = trie_child(m, x, token[i])) >= 0; i++) x = c;
    *at = x;
    return i;
}

// With one token per page nothing is ever held twice: then room is a matter of counting.
static int must_fit(const model *m, int32_t x, int32_t n_new) {
    int32_t i, held = 0;
    if (m->tight || m->pt != 1) return 0;
    for (i = N_NS; i < MAX_NODES; i++) held += m->node[i].used && m->node[i].held > 0;
    for (; m->node[x].depth > 0; x = m->node[x].parent) held += m->node[x].held == 0;
    return held + n_new <= m->n_pages;
}

// s < 0: insert into namespace root, else append.
static void op_append(model *m, int32_t s, int32_t root) {
    int32_t token[MAX_LEN], page[MAX_LEN], x = s < 0 ? root : m->seq[s], at, n, hit, got = -1, i;
    int32_t n_copies = 0, room = fuzz_below(&m->in, 8) > 0, d0 = m->node[x].depth, handle = -1;
    attn_page_copy copy[1];
    attn_result r;
    if (m->n_todo + m->n_done >= MAX_TODO - 1) {
        flush(m);
        ack(m, MAX_TODO);
    }
    n = extend(m, x, token, &hit);
    hit = walk(m, x, token, n, &at);
    if (s < 0)
        r = attn_tree_insert(m->t, name_space(root), token, n, &handle, &got, copy, room,
                             &n_copies);
    else r = attn_tree_append(m->t, s, token, n, &got, copy, room, &n_copies);
    if (r != ATTN_OK) {
        FUZZ_CHECK(r == ATTN_ERR_FULL || (r == ATTN_ERR_BUFFER && !room));
        FUZZ_CHECK(n_copies == 0 && got == -1 && handle == -1);
        FUZZ_CHECK(r != ATTN_ERR_FULL || !must_fit(m, at, n - hit) ||
                   (s < 0 && m->was.n_seq == m->max_seq));
        settle(m, 1);
        return;
    }
    FUZZ_CHECK(got == hit);
    if (s < 0) {
        s = handle;
        FUZZ_CHECK(s >= 0 && s < m->max_seq && m->seq[s] < 0);
    }
    m->seq[s] = at; // what it found is held from now on
    trie_sweep(m);
    settle(m, 0);
    for (i = hit; i < n; i++) at = trie_add(m, at, token[i]);
    m->seq[s] = at;
    (void)sequence_pages(m, s, page);
    for (i = d0 + hit; i < d0 + n; i++)
        m->kv[page[i / m->pt] * m->pt + i % m->pt] = m->node[trie_up(m, at, i + 1)].value;
    for (i = 0; i < n_copies; i++) m->todo[m->n_todo++] = copy[i];
}

static void op_open(model *m, int32_t root) {
    int32_t token[MAX_LEN], n, hit, at, got = -1, s = -1;
    attn_result r;
    n = extend(m, root, token, &hit);
    hit = walk(m, root, token, n, &at);
    FUZZ_CHECK(attn_tree_match(m->t, name_space(root), token, n) == hit);
    r = attn_tree_open(m->t, name_space(root), token, n, &s, &got);
    if (r != ATTN_OK) {
        FUZZ_CHECK(r == ATTN_ERR_FULL && (m->was.n_seq == m->max_seq || m->tight));
        settle(m, 1);
        return;
    }
    FUZZ_CHECK(got == hit && s >= 0 && s < m->max_seq && m->seq[s] < 0);
    m->seq[s] = at;
    trie_sweep(m);
    settle(m, 0);
}

static void op_fork(model *m, int32_t s) {
    int32_t out = -1;
    attn_result r = attn_tree_fork(m->t, s, &out);
    if (r != ATTN_OK) {
        FUZZ_CHECK(r == ATTN_ERR_FULL && m->was.n_seq == m->max_seq && out == -1);
        return;
    }
    FUZZ_CHECK(out >= 0 && out < m->max_seq && m->seq[out] < 0);
    m->seq[out] = m->seq[s];
}

static void op_truncate(model *m, int32_t s) {
    int32_t n = m->node[m->seq[s]].depth, to;
    attn_result r;
    if (fuzz_below(&m->in, 2)) to = fuzz_below(&m->in, n + 1);
    else to = n - fuzz_below(&m->in, n < 4 ? n + 1 : 4);
    r = attn_tree_truncate(m->t, s, to);
    if (r != ATTN_OK) {
        FUZZ_CHECK(r == ATTN_ERR_FULL && m->tight);
        settle(m, 1);
        return;
    }
    settle(m, 0); // a cut may evict, but not what the sequence held
    m->seq[s] = trie_up(m, m->seq[s], to);
}

static void op_release(model *m, int32_t s) {
    int keep = fuzz_below(&m->in, 3) > 0;
    FUZZ_CHECK(attn_tree_release(m->t, s, keep) == ATTN_OK);
    FUZZ_CHECK(attn_tree_length(m->t, s) == ATTN_ERR_NOT_FOUND);
    if (keep) trie_keep(m, m->seq[s]);
    m->seq[s] = -1;
}

static void op_pin(model *m, int32_t root) {
    int32_t token[MAX_LEN], n, hit, at, i;
    attn_result r;
    if (m->n_pin > 0 && fuzz_below(&m->in, 2)) {
        i = fuzz_below(&m->in, m->n_pin);
        n = trie_path(m, m->pin[i], token);
        root = trie_root(m, m->pin[i]);
        FUZZ_CHECK(attn_tree_pin(m->t, name_space(root), token, n, -1) == ATTN_OK);
        m->pin[i] = m->pin[--m->n_pin];
        return;
    }
    n = extend(m, root, token, &hit);
    hit = walk(m, root, token, n, &at);
    if (m->n_pin == MAX_PINS || n == 0) return;
    r = attn_tree_pin(m->t, name_space(root), token, n, 1);
    if (hit < n) {
        FUZZ_CHECK(r == ATTN_ERR_NOT_FOUND);
        settle(m, 1);
    } else if (r != ATTN_OK) {
        FUZZ_CHECK(r == ATTN_ERR_FULL && m->tight);
        settle(m, 1);
    } else {
        m->pin[m->n_pin++] = at;
        trie_keep(m, at);
        trie_sweep(m);
        settle(m, 0);
    }
}

static void op_evict(model *m) {
    int32_t want = fuzz_below(&m->in, 8) - 1, freed = -1, i;
    attn_tree_stats now;
    FUZZ_CHECK(attn_tree_evict(m->t, want, &freed) == ATTN_OK);
    memset(&now, 0, sizeof now);
    attn_tree_get_stats(m->t, &now);
    FUZZ_CHECK(now.n_free - m->was.n_free == freed && freed >= 0);
    settle(m, 0);
    // fewer than asked for: then everything that could go went
    for (i = N_NS; i < MAX_NODES && (want < 0 || freed < want); i++)
        FUZZ_CHECK(!m->node[i].used || m->node[i].held > 0);
}

static void op_priority(model *m, int32_t s) {
    FUZZ_CHECK(attn_tree_priority(m->t, s, fuzz_below(&m->in, 3) - 1) == ATTN_OK);
}

// Calls that must be refused without a trace.
static void op_hostile(model *m) {
    int32_t s = fuzz_edge32(&m->in), n = fuzz_edge32(&m->in), token[2] = {0, 0}, out[2], copies = 0;
    attn_page_copy c;
    attn_tree_stats now;
    int live = s >= 0 && s < m->max_seq && m->seq[s] >= 0;
    c.src = s;
    c.dst = n;
    c.n_tokens = 1;
    switch (fuzz_below(&m->in, 12)) {
    case 0: FUZZ_CHECK(live || attn_tree_append(m->t, s, token, 2, out, &c, 1, &copies) < 0); break;
    case 1:
        FUZZ_CHECK(n >= 0 || attn_tree_append(m->t, 0, token, n, out, &c, 1, &copies) < 0);
        break;
    case 2: FUZZ_CHECK(live || attn_tree_truncate(m->t, s, 0) == ATTN_ERR_NOT_FOUND); break;
    case 3:
        if (live && n >= 0 && n <= m->node[m->seq[s]].depth) break;
        FUZZ_CHECK(attn_tree_truncate(m->t, s, n) < 0);
        break;
    case 4: FUZZ_CHECK(live || attn_tree_release(m->t, s, 1) == ATTN_ERR_NOT_FOUND); break;
    case 5: FUZZ_CHECK(live || attn_tree_fork(m->t, s, out) == ATTN_ERR_NOT_FOUND); break;
    case 6: // a copy that was never listed, or a list that is cut short
        if (s >= 0 && s < m->n_pages && n >= 0 && n < m->n_pages) break;
        FUZZ_CHECK(attn_tree_ack(m->t, &c, 1) == ATTN_ERR_ARGUMENT);
        break;
    case 7:
        if (live && n >= 0 && n <= 2) break;
        FUZZ_CHECK(n <= 0 || attn_tree_tokens(m->t, s, n, 2, out) < 0 ||
                   (live && n <= m->node[m->seq[s]].depth - 2));
        break;
    case 8: FUZZ_CHECK(live || attn_tree_pages(m->t, s, out, 2) == ATTN_ERR_NOT_FOUND); break;
    case 9: FUZZ_CHECK(live || attn_tree_priority(m->t, s, n) == ATTN_ERR_NOT_FOUND); break;
    case 10: FUZZ_CHECK(attn_tree_pin(m->t, name_space(0), token, n < 0 ? n : 0, 1) < 0); break;
    default: FUZZ_CHECK(live || attn_tree_order(m->t, &s, 1, out, out + 1) == ATTN_ERR_NOT_FOUND);
    }
    memset(&now, 0, sizeof now);
    attn_tree_get_stats(m->t, &now);
    FUZZ_CHECK(copies == 0 && memcmp(&now, &m->was, sizeof now) == 0);
}

static void step(model *m) {
    int32_t what = fuzz_below(&m->in, 32), s = pick(m), root = fuzz_below(&m->in, N_NS);
    attn_tree_get_stats(m->t, &m->was);
    if (s < 0 && what >= 6 && what < 24) what %= 6;
    if (what < 4) op_append(m, -1, root);
    else if (what < 6) op_open(m, root);
    else if (what < 13) op_append(m, s, root);
    else if (what < 15) op_fork(m, s);
    else if (what < 18) op_truncate(m, s);
    else if (what < 22) op_release(m, s);
    else if (what < 24) op_priority(m, s);
    else if (what < 26) op_pin(m, root);
    else if (what < 27) op_evict(m);
    else if (what < 28) op_hostile(m);
    else if (what < 29) flush(m);
    else if (what < 30) ack(m, 2);
    else if (what < 31) verify_order(m);
    else flush(m), ack(m, MAX_TODO);
    trie_sweep(m);
    verify(m);
}

// Lets everything go: not a page, node or token may stay behind.
static void drain(model *m) {
    int32_t token[MAX_LEN], i, n;
    attn_tree_stats end;
    flush(m);
    ack(m, MAX_TODO);
    for (i = 0; i < m->max_seq; i++)
        if (m->seq[i] >= 0) FUZZ_CHECK(attn_tree_release(m->t, i, i & 1) == ATTN_OK);
    for (i = 0; i < m->n_pin; i++) {
        uint64_t ns = name_space(trie_root(m, m->pin[i]));
        n = trie_path(m, m->pin[i], token);
        FUZZ_CHECK(attn_tree_pin(m->t, ns, token, n, -1) == ATTN_OK);
    }
    FUZZ_CHECK(attn_tree_check(m->t) == ATTN_OK);
    FUZZ_CHECK(attn_tree_evict(m->t, -1, NULL) == ATTN_OK);
    attn_tree_get_stats(m->t, &end);
    FUZZ_CHECK(end.n_free == m->n_pages && end.n_nodes == 0 && end.tokens_cached == 0);
    FUZZ_CHECK(attn_tree_check(m->t) == ATTN_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint32_t masks[3] = {0xffffffffu, 7, 0};
    static model m;
    attn_tree_desc d;
    unsigned char *mem;
    size_t bytes;
    int32_t i;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    m.in.p = data;
    m.in.n = size;
    d.page_tokens = m.pt = 1 + fuzz_below(&m.in, MAX_PT);
    d.n_pages = m.n_pages = 1 + fuzz_below(&m.in, MAX_PAGES);
    d.max_seq = m.max_seq = 1 + fuzz_below(&m.in, MAX_SEQ);
    m.tight = fuzz_below(&m.in, 3) == 0;
    if (m.tight) d.max_nodes = 1 + fuzz_below(&m.in, 16);
    m.alphabet = 2 + fuzz_below(&m.in, 3);
    hash_mask = masks[fuzz_below(&m.in, 3)];
    for (i = 0; i < N_NS; i++) {
        m.node[i].used = 1;
        m.node[i].value = name_space(i) * 0x9fb21c651e98df25u;
    }
    for (i = 0; i < MAX_SEQ; i++) m.seq[i] = -1;
    bytes = attn_tree_bytes(&d);
    mem = (unsigned char *)fuzz_alloc(bytes);
    memset(mem, 0xa5, bytes);
    FUZZ_CHECK(attn_tree_init(&d, mem, bytes - 1, &m.t) == ATTN_ERR_BUFFER);
    FUZZ_CHECK(attn_tree_init(&d, mem, bytes, &m.t) == ATTN_OK);
    for (i = 0; i < MAX_OPS && m.in.n > 0; i++) step(&m);
    drain(&m);
    free(mem);
    return 0;
}

/* test_plan.c - what a plan promises, counted again without the planner: coverage, sharing,
   workspace, costs, tiles, order, updates. No tensor is read, so thousands of plans are cheap.
   test_plan [SEED [COUNT]]
   cc -std=c11 -O2 -I. -Itests tests/test_plan.c -o test_plan -lm */
#include "test.h"
#define ATTN_CORE_IMPLEMENTATION
#include "attn.h"

enum { MAX_SEQ = 14, STRIDE = 130, PAGE = 16 };

typedef struct world {
    attn_desc d;
    attn_plan_params params;
    // what lies beside an array would be noticed if it were read
    int32_t guard0, q_start[MAX_SEQ + 1], guard1, q_pos0[MAX_SEQ], guard2, kv_len[MAX_SEQ];
    int32_t guard3, kv_pos0[MAX_SEQ], guard4, page[MAX_SEQ * STRIDE], guard5, order[MAX_SEQ];
    int32_t guard6;
} world;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A table of spans, now and then with a bound on tasks: what may follow from a sequence's lengths.
static void world_rules(world *w, test_rng *r) {
    int32_t i, n = test_below(r, 2) ? 0 : 1 + test_below(r, ATTN_SPAN_RULES);
    for (i = 0; i < n; i++) {
        attn_span_rule *x = &w->params.rule[i];
        x->max_q_len = test_below(r, 2) ? 0 : test_below(r, 2) ? 1 : test_below(r, 400);
        x->max_kv_len = test_below(r, 3) ? 1 + test_below(r, 2000) : 0;
        x->span = test_below(r, 8) ? 64 << test_below(r, 5) : 1 << 30;
        x->row_tile = test_below(r, 2) ? 0 : 1 + test_below(r, 200);
        x->no_fold = test_below(r, 2);
    }
    w->params.tasks_per_worker = test_below(r, 2) ? 0 : 0.25f * (float)(1 + test_below(r, 48));
    if (test_below(r, 4)) return;
    w->params.max_task_cost = (float)(1 << (6 + test_below(r, 14)));
    w->params.partial_bytes = (size_t)1 << 30;
    w->params.max_kv_len = STRIDE * PAGE + 96;
}

static int32_t n_rules(const world *w) {
    int32_t n = 0;
    while (n < ATTN_SPAN_RULES && w->params.rule[n].span) n++;
    return n;
}

static int32_t rule_of(const world *w, int32_t s) {
    int32_t i, q = w->q_start[s + 1] - w->q_start[s];
    for (i = 0; i < n_rules(w); i++) {
        const attn_span_rule *x = &w->params.rule[i];
        if ((x->max_q_len == 0 || q <= x->max_q_len) &&
            (x->max_kv_len == 0 || w->kv_len[s] <= x->max_kv_len))
            return i;
    }
    return -1;
}

static int32_t span_of(const world *w, int32_t s) {
    return rule_of(w, s) < 0 ? 256 : w->params.rule[rule_of(w, s)].span;
}

// The spans that any of a sequence's rows may see, from what each row sees.
static void own_spans(const world *w, int32_t s, int64_t *span0, int64_t *span1) {
    const attn_mask *m = &w->d.mask;
    int64_t lo = w->kv_pos0[s], hi = lo + w->kv_len[s], p0 = w->q_pos0[s], span = span_of(w, s);
    int64_t p1 = p0 + most(w->q_start[s + 1] - w->q_start[s], 1) - 1;
    if (m->kind == ATTN_MASK_CAUSAL) hi = least(hi, p1 + 1);
    else if (m->window_right) hi = least(hi, most(p1 + m->window_right, m->n_sink));
    if (m->window_left && !m->n_sink) lo = most(lo, p0 - m->window_left + 1);
    *span0 = lo / span;
    *span1 = hi > lo ? up(hi, span) : *span0;
}

// Partial rows that rules without folds ask for, whatever else is planned.
static int64_t owed_rows(const world *w) {
    int64_t rows = 0, span0, span1;
    int32_t s;
    for (s = 0; s < w->d.n_seq; s++) {
        if (rule_of(w, s) < 0 || !w->params.rule[rule_of(w, s)].no_fold) continue;
        own_spans(w, s, &span0, &span1);
        if (span1 - span0 > 1)
            rows += (w->q_start[s + 1] - w->q_start[s]) * w->d.n_heads * (span1 - span0);
    }
    return rows;
}

static int64_t budget_rows(const world *w) {
    return (int64_t)(w->params.partial_bytes / 4 / (size_t)(attni_v_dim(&w->d) + 2));
}

static void world_make(world *w, test_rng *r) {
    static float somewhere[4];
    attn_desc *d = &w->d;
    int32_t s, j, n_pages = 0, common = test_below(r, 90), groups = 1 + test_below(r, 3);
    memset(w, 0, sizeof *w);
    w->guard0 = w->guard1 = w->guard2 = -1000000;
    w->guard3 = w->guard4 = w->guard5 = w->guard6 = -1000000;
    d->n_seq = 1 + test_below(r, MAX_SEQ);
    d->n_kv_heads = 1 + test_below(r, 3);
    d->n_heads = d->n_kv_heads * (1 + test_below(r, 8));
    d->head_dim = 64;
    d->v_head_dim = test_below(r, 2) ? 32 : 0;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_BF16;
    d->q.data = d->o.data = d->kv.k.data = d->kv.v.data = somewhere;
    d->q_start = w->q_start, d->q_pos0 = w->q_pos0, d->kv.kv_len = w->kv_len;
    d->kv.kv_pos0 = w->kv_pos0, d->kv.page_table = w->page;
    d->kv.page_table_stride = STRIDE;
    d->kv.page_tokens = PAGE;
    for (s = 0; s < d->n_seq; s++) {
        int32_t kind = test_below(r, 6), len = 1 + test_below(r, 1800), mate = s % groups;
        int32_t q = test_below(r, kind == 4 ? 9 : len);
        if (kind < 4) q = kind > 0;
        if (q > len) q = len;
        w->kv_pos0[s] = groups == 3 ? 48 * mate : 0;
        w->kv_len[s] = len;
        w->q_start[s + 1] = w->q_start[s] + q;
        w->q_pos0[s] = w->kv_pos0[s] + len - q;
        if (test_below(r, 8) == 0) // rows that end, or even stand, before what is held
            w->q_pos0[s] = (int32_t)most(0, w->q_pos0[s] - test_below(r, 900));
        for (j = 0; j < STRIDE; j++)
            w->page[s * STRIDE + j] = s > mate && j < common ? w->page[mate * STRIDE + j]
                                                             : n_pages++;
    }
    d->kv.n_pages = n_pages;
    d->mask.kind = (attn_mask_kind)test_below(r, 2);
    if (test_below(r, 3) == 0) d->mask.window_left = 1 + test_below(r, 900);
    if (test_below(r, 3) == 0) d->mask.window_right = 1 + test_below(r, 600);
    if (test_below(r, 3) == 0) d->mask.n_sink = test_below(r, 600);
    if (test_below(r, 6) == 0) d->mask.keep_recent = 1 + test_below(r, 500);
    if (test_below(r, 12) == 0) d->mask.keep_sink = 1 + test_below(r, 50);
    for (s = 0; s < d->n_seq; s++) w->order[s] = s;
    for (s = d->n_seq - 1; s > 0; s--) {
        int32_t o = test_below(r, s + 1), t = w->order[o];
        w->order[o] = w->order[s], w->order[s] = t;
    }
    if (test_below(r, 3) == 0) d->seq_order = w->order;
    w->params.workers = test_below(r, 3) ? 1 + test_below(r, 40) : test_below(r, 2);
    w->params.row_tile = test_below(r, 2) ? 0 : 1 + test_below(r, 300);
    w->params.share = test_below(r, 3);
    w->params.partial_bytes = test_below(r, 2) ? (size_t)1 << 28 : (size_t)test_below(r, 1 << 20);
    if (test_below(r, 2)) {
        w->params.cost_kv_token = (float)(1 + test_below(r, 8));
        w->params.cost_row_token = (float)(1 + test_below(r, 4));
        w->params.cost_partial = (float)(1 + test_below(r, 400));
    }
    world_rules(w, r);
    if (owed_rows(w) > 0 && test_below(r, 4)) { // what must fit, now and then a row more than that
        int64_t rows = owed_rows(w) + (test_below(r, 2) ? test_below(r, 1 << 16) : 0);
        size_t bytes = (size_t)rows * 4 * (size_t)(attni_v_dim(d) + 2) - (test_below(r, 6) == 0);
        if (w->params.max_task_cost > 0) w->params.partial_bytes += bytes;
        else w->params.partial_bytes = bytes;
    }
}

// The plan in memory of exactly its size; what lies behind must stay.
static attn_plan *build(const world *w, void **mem) {
    size_t bytes = attn_plan_bytes(&w->d, &w->params), i;
    attn_plan *p = NULL;
    uint8_t *m = (uint8_t *)aligned_alloc(64, bytes + 64);
    *mem = m;
    CHECK(bytes > 0 && bytes % 64 == 0);
    memset(m, 0xa5, bytes + 64);
    CHECK_EQ(attn_plan_build(&w->d, &w->params, m, bytes, &p),
             owed_rows(w) > budget_rows(w) ? ATTN_ERR_BUFFER : ATTN_OK);
    for (i = 0; i < 64; i++) CHECK_EQ(m[bytes + i], 0xa5);
    return p;
}

static int same_pages(const world *w, int32_t x, int32_t y, int64_t until) { // until: position
    int64_t j;
    if (w->kv_pos0[x] != w->kv_pos0[y]) return 0;
    if (until > w->kv_pos0[x] + least(w->kv_len[x], w->kv_len[y])) return 0;
    for (j = 0; j < up(until - w->kv_pos0[x], PAGE); j++)
        if (w->page[x * STRIDE + j] != w->page[y * STRIDE + j]) return 0;
    return 1;
}

// Could a query at a position in [p0, p1] see any key of first .. last, by kind, window and sinks?
static int span_seen(const attn_mask *m, int64_t first, int64_t last, int64_t p0, int64_t p1) {
    if (m->kind == ATTN_MASK_CAUSAL && first > p1) return 0;
    if (m->kind == ATTN_MASK_FULL && m->window_right && first > p1 + m->window_right - 1) return 0;
    if (m->window_left && last < p0 - (m->window_left - 1)) return first < m->n_sink;
    return 1;
}

// Keys that a sequence holds in these spans and some query at [p0, p1] may see, one by one.
static int64_t keys_seen(const world *w, int32_t s, int64_t span0, int64_t span1, int64_t p0,
                         int64_t p1) {
    const attn_mask *m = &w->d.mask;
    int64_t span = span_of(w, s), lo = most(span0 * span, w->kv_pos0[s]), k, n = 0;
    int64_t hi = least(span1 * span, (int64_t)w->kv_pos0[s] + w->kv_len[s]);
    for (k = lo; k < hi; k++)
        if (m->kind == ATTN_MASK_FULL && k < m->n_sink) n++;
        else n += span_seen(m, k, k, p0, p1);
    return n;
}

static int64_t tokens_in(const world *w, int32_t s, int64_t span0, int64_t span1) {
    int64_t span = span_of(w, s);
    return most(0, least(span1 * span, w->kv_pos0[s] + w->kv_len[s]) -
                       most(span0 * span, w->kv_pos0[s]));
}

// ordered: lengths have not changed since its sequences were sorted.
static void check_seqs(const world *w, const attn_plan *p, int ordered) {
    int32_t s, i, c, active = 0, merges = 0;
    for (s = 0; s < p->n_seq; s++) {
        const attn_plan_seq *q = &p->seq[s];
        int64_t at, span0, span1;
        CHECK(q->q_begin == w->q_start[s] && q->q_len == w->q_start[s + 1] - w->q_start[s]);
        CHECK(q->q_pos0 == w->q_pos0[s] && q->kv_len == w->kv_len[s]);
        CHECK(q->kv_pos0 == w->kv_pos0[s]);
        CHECK_EQ(q->place < 0, 0);
        own_spans(w, s, &span0, &span1);
        CHECK_EQ(q->rule, rule_of(w, s));
        CHECK_EQ(q->span, span_of(w, s));
        CHECK_EQ(q->span0, span0);
        CHECK_EQ(q->span1, span1);
        if (q->q_len == 0) {
            CHECK_EQ(q->n_chain, 0);
            continue;
        }
        active++;
        CHECK_EQ(p->order[q->place], s);
        // the chain covers the spans once, in order; only its first link may write by itself
        CHECK(q->n_chain > 0);
        for (at = q->span0, c = 0; c < q->n_chain; c++) {
            const attn_segment *g = &p->segment[p->chain[q->chain + c]];
            CHECK(g->seq0 <= q->place && q->place < g->seq0 + g->n_seq);
            CHECK(g->span0 == at || g->span0 <= q->span0); // spans before its own are others'
            at = g->span1;
            if (g->n_slots == 0) CHECK(q->n_chain == 1 && g->n_seq == 1);
        }
        // what lies behind its own spans others of the segment see
        CHECK(at == q->span1 ||
              (at > q->span1 && p->segment[p->chain[q->chain + c - 1]].n_seq > 1));
        if (q->n_chain && p->segment[p->chain[q->chain]].n_slots > 0) {
            for (c = 0; merges < p->n_merges && p->merge[merges].seq == s; merges++) {
                CHECK_EQ(p->merge[merges].first_token, c);
                CHECK(p->merge[merges].n_tokens > 0);
                c += p->merge[merges].n_tokens;
            }
            CHECK_EQ(c, q->q_len); // merges cover a sequence's rows once, in order
        }
    }
    CHECK_EQ(active, p->n_active);
    CHECK_EQ(merges, p->n_merges);
    // by rule, then the caller's order, or by front, pages, number
    for (i = 1; i < p->n_active && ordered; i++) {
        int32_t x = p->order[i - 1], y = p->order[i], j = 0, n;
        if (rule_of(w, x) != rule_of(w, y)) {
            CHECK(rule_of(w, x) < rule_of(w, y));
            continue;
        }
        if (w->d.seq_order) {
            for (c = 0; w->order[c] != x; c++) {}
            for (; w->order[c] != y && c < p->n_seq - 1; c++) {}
            CHECK_EQ(w->order[c], y);
            continue;
        }
        n = (int32_t)least(w->kv_len[x], w->kv_len[y]) / PAGE;
        while (j < n && w->page[x * STRIDE + j] == w->page[y * STRIDE + j]) j++;
        if (w->kv_pos0[x] != w->kv_pos0[y]) CHECK(w->kv_pos0[x] < w->kv_pos0[y]);
        else if (j < n) CHECK(w->page[x * STRIDE + j] < w->page[y * STRIDE + j]);
        else if (w->kv_len[x] / PAGE != w->kv_len[y] / PAGE) CHECK(w->kv_len[x] < w->kv_len[y]);
        else CHECK(x < y);
    }
}

static int32_t tile_of(const attn_plan *p, int32_t rule) {
    return rule < 0 ? p->tile_tokens : p->rule_tile[rule];
}

// Each token of the spans is seen by a row of the sequence, one by one.
static int sees(const world *w, int32_t s, int32_t from, int32_t to, int32_t span) {
    const attn_mask *m = &w->d.mask;
    int64_t k = most((int64_t)from * span, w->kv_pos0[s]), p, p0 = w->q_pos0[s];
    int32_t t, n = w->q_start[s + 1] - w->q_start[s];
    for (; k < (int64_t)to * span; k++) {
        for (t = 0; t < n; t++) {
            p = p0 + t;
            if (m->kind != ATTN_MASK_FULL && k > p) continue;
            if (m->window_left && k < p - (m->window_left - 1)) continue;
            if (m->kind == ATTN_MASK_FULL && m->window_right && k > p + m->window_right - 1)
                continue;
            break;
        }
        if (t == n) return 0;
    }
    return 1;
}

// Is there room left to share all sequences of one rule once more? Capacities count a tile's worth
// of rows at both ends of every run of them.
static int more_fits(const world *w, const attn_plan *p, int32_t rule) {
    int64_t tiles = p->cap_tasks / p->n_kv_heads, chain = p->cap_chain - 2 * p->n_seq, need = 2;
    int32_t i;
    for (i = 0; i < p->n_seq; i++) {
        int32_t tile = tile_of(p, rule_of(w, i));
        tiles -= p->seq[i].q_len / tile + 2;
        chain -= p->seq[i].n_chain;
        if (rule_of(w, i) == rule) need += p->seq[i].q_len / tile + 1;
    }
    for (i = 0; i < p->n_segments; i++) {
        const attn_segment *g = &p->segment[i];
        if (g->n_seq > 1 || (i > 0 && g[-1].n_seq == 1 && g[-1].seq0 == g->seq0))
            tiles -= g->n_tokens / tile_of(p, rule_of(w, p->order[g->seq0])) + 2;
    }
    return need <= tiles && chain >= 0;
}

static void check_segments(const world *w, const attn_plan *p) {
    int32_t i, s, shared = 0;
    int64_t chain = 0, rows = 0, budget = budget_rows(w);
    for (i = 0; i < p->n_segments; i++) {
        const attn_segment *g = &p->segment[i];
        int32_t head = p->order[g->seq0], tokens = 0, rule = rule_of(w, head);
        int32_t span = span_of(w, head);
        int32_t starts = rule < 0 || !w->params.rule[rule].no_fold;
        shared += g->n_seq > 1;
        CHECK(g->n_seq >= 1 && g->span0 <= g->span1);
        for (s = g->seq0; s < g->seq0 + g->n_seq; s++) {
            const attn_plan_seq *q = &p->seq[p->order[s]];
            tokens += q->q_len;
            starts &= g->span0 <= q->span0;
            CHECK_EQ(q->rule, rule);
            if (g->n_seq > 1)
                CHECK(same_pages(w, p->order[g->seq0], p->order[s], (int64_t)g->span1 * span));
            if (g->n_seq > 1 && rule >= 0) CHECK(sees(w, p->order[s], g->span0, g->span1, span));
        }
        CHECK_EQ(g->n_tokens, tokens);
        if (i > 0 && g[-1].seq0 == g->seq0 && g[-1].n_seq == g->n_seq && g[-1].span1 == g->span0)
            starts = 0; // a piece behind another one
        if (g->n_slots) {
            CHECK_EQ(g->n_slots, starts ? 1 : g->span1 - g->span0);
            CHECK_EQ(g->partial, rows);
        } else {
            CHECK(starts || g->span1 - g->span0 < 2);
        }
        rows += (int64_t)g->n_slots * tokens * p->n_heads;
    }
    CHECK_EQ(p->n_shared, shared);
    CHECK_EQ(p->partial_rows, rows);
    for (s = 0; s < p->n_seq; s++) chain += p->seq[s].n_chain;
    CHECK(p->n_segments <= p->cap_segments && chain <= p->cap_chain);
    CHECK(p->n_tasks <= p->cap_tasks && p->n_merges <= p->cap_merges);
    CHECK_EQ(attn_plan_partial_bytes(p), 4 * rows * (p->v_head_dim + 2));
    CHECK(rows <= budget);
    if (w->params.share == 1) CHECK_EQ(shared, 0);
    if (n_rules(w) && (w->d.mask.keep_recent || w->d.mask.keep_sink)) { // no tile of many sequences
        CHECK_EQ(shared, 0);
        return;
    }
    for (s = 0; s < p->n_seq && n_rules(w); s++) // what a row does not see may keep it apart
        if (w->d.mask.window_left || w->d.mask.window_right ||
            w->q_pos0[s] + p->seq[s].q_len < w->kv_pos0[s] + w->kv_len[s])
            return;
    // tiny tiles, as a bound makes them, are more than a plan has room for at every level
    if (w->params.share != 2 || budget < 1 << 20 || w->params.max_task_cost > 0) return;
    for (i = 0; i + 1 < p->n_active; i++) { // neighbours share every whole span that they can
        int32_t x = p->order[i], y = p->order[i + 1], span, c;
        if (rule_of(w, x) != rule_of(w, y) || !more_fits(w, p, rule_of(w, x))) continue;
        for (span = (int32_t)most(p->seq[x].span0, p->seq[y].span0);
             span < least(p->seq[x].span1, p->seq[y].span1); span++) {
            if (!same_pages(w, x, y, (int64_t)(span + 1) * span_of(w, x))) break;
            for (c = 0; c < p->seq[x].n_chain; c++) {
                const attn_segment *g = &p->segment[p->chain[p->seq[x].chain + c]];
                if (g->span0 <= span && span < g->span1) CHECK(g->seq0 + g->n_seq > i + 1);
            }
        }
    }
}

// Without max_task_cost.
static int32_t expected_tile(const world *w, int32_t rule) {
    const attn_desc *d = &w->d;
    int32_t group = d->n_heads / d->n_kv_heads, tile = 1, low = 1, s;
    int32_t rows = w->params.row_tile ? w->params.row_tile : 256, fixed = 0;
    float each = w->params.tasks_per_worker > 0 ? w->params.tasks_per_worker : 3;
    if (rule >= 0 && w->params.rule[rule].row_tile) rows = w->params.rule[rule].row_tile, fixed = 1;
    while (2 * tile * group <= rows) tile *= 2;
    while (2 * low * group <= 32) low *= 2;
    for (; w->params.workers > 1 && tile > low && !fixed; tile /= 2) {
        int64_t n = 0;
        for (s = 0; s < d->n_seq; s++) {
            int32_t own = rule_of(w, s), len = w->q_start[s + 1] - w->q_start[s];
            int own_tile = own >= 0 && w->params.rule[own].row_tile;
            n += up(len, own_tile ? expected_tile(w, own) : tile);
        }
        if ((float)(n * d->n_kv_heads) >= each * (float)w->params.workers) break;
    }
    return tile;
}

// Tiles as expected; a bound on tasks may only make them smaller, and not without need.
static void check_tiles(const world *w, const attn_plan *p) {
    int32_t rule, s, group = p->n_heads / p->n_kv_heads;
    for (rule = -1; rule < n_rules(w); rule++) {
        int32_t tile = tile_of(p, rule), want = expected_tile(w, rule);
        int32_t span = rule < 0 ? 256 : w->params.rule[rule].span;
        float one = (float)span * (p->params.cost_kv_token +
                                   (float)(want * group) * p->params.cost_row_token);
        int64_t spans = 1;
        for (s = 0; s < p->n_seq; s++)
            if (rule_of(w, s) == rule && p->seq[s].q_len > want / 2)
                spans = most(spans, w->kv_len[s] / span + 2);
        CHECK(tile >= 1 && tile <= want && want % tile == 0);
        if (!(w->params.max_task_cost > 0) || (float)spans * one <= w->params.max_task_cost)
            CHECK_EQ(tile, want);
    }
}

// cost: of a task with so many spans, one: of its rows' single span, top: total / tasks wanted.
static void check_cost(const world *w, const attn_task *t, int64_t spans, float one, float top) {
    const attn_plan_params *q = &w->params;
    if (q->max_task_cost > 0)
        CHECK(t->cost <= q->max_task_cost || (spans == 1 && t->n_tokens == 1));
    if (q->workers <= 1 || q->partial_bytes < (size_t)1 << 28) return;
    // with rules short ones are not cut below 2.25 times it, and pieces are whole spans
    if (n_rules(w)) CHECK(t->cost <= (2.25f * top + one) * 1.001f);
    else CHECK(t->cost <= (top > one ? top : one) * 1.0001f);
}

static void check_tasks(const world *w, const attn_plan *p) {
    int32_t i, j, s, group = p->n_heads / p->n_kv_heads;
    int64_t read = 0, seen = 0, *covered = (int64_t *)calloc((size_t)p->n_segments + 1, 8);
    float kv = w->params.cost_kv_token > 0 ? w->params.cost_kv_token : 4;
    float row = w->params.cost_row_token > 0 ? w->params.cost_row_token : 1;
    float each = w->params.tasks_per_worker > 0 ? w->params.tasks_per_worker : 3;
    float total = 0, top, sum = 0;
    check_tiles(w, p);
    for (s = 0; s < p->n_seq; s++) {
        const attn_plan_seq *q = &p->seq[s];
        int32_t len = q->q_len;
        if (len || q->rule < 0)
            total += (q->rule < 0 ? (float)(q->span1 - q->span0) * (float)q->span
                                  : (float)keys_seen(w, s, q->span0, q->span1, q->q_pos0,
                                                     (int64_t)q->q_pos0 + len - 1)) *
                     (kv + (float)(len * group) * row);
        if (len)
            seen += p->n_kv_heads * up(len, tile_of(p, q->rule)) *
                    tokens_in(w, s, q->span0, q->span1);
    }
    for (i = 0; i < p->n_tasks; i++) sum += p->task[i].cost;
    total *= (float)p->n_kv_heads;
    top = (n_rules(w) && p->n_shared ? sum : total) / (each * (float)most(w->params.workers, 1));
    for (i = 0; i < p->n_tasks; i++) {
        const attn_task *t = &p->task[i], *u = t + 1;
        const attn_segment *g = &p->segment[t->segment];
        const attn_plan_seq *head = &p->seq[p->order[g->seq0]];
        int32_t tile = tile_of(p, head->rule), span = head->span;
        int64_t p0 = INT64_MAX, p1 = -1, spans = 0, at = 0, keys;
        int64_t held = tokens_in(w, p->order[g->seq0], g->span0, g->span1);
        float one = (float)(head->rule < 0 ? span : least(span, held)) *
                    (kv + (float)(least(g->n_tokens, tile) * group) * row);
        CHECK(t->kv_head >= 0 && t->kv_head < p->n_kv_heads);
        CHECK(t->n_tokens >= 1 && t->n_tokens <= tile);
        CHECK(t->first_token >= 0 && t->first_token + t->n_tokens <= g->n_tokens);
        covered[t->segment] += t->n_tokens;
        for (s = g->seq0; s < g->seq0 + g->n_seq; s++) // positions of its rows
            for (j = 0; j < p->seq[p->order[s]].q_len; j++, at++)
                if (at >= t->first_token && at < t->first_token + t->n_tokens) {
                    p0 = least(p0, p->seq[p->order[s]].q_pos0 + j);
                    p1 = most(p1, p->seq[p->order[s]].q_pos0 + j);
                }
        if (g->n_seq == 1 && g->n_tokens > tile && t->first_token) CHECK_EQ(p0 % tile, 0);
        for (j = g->span0; j < g->span1; j++)
            spans += span_seen(&w->d.mask, (int64_t)j * span, (int64_t)j * span + span - 1, p0, p1);
        keys = head->rule < 0 ? spans * span
                              : keys_seen(w, p->order[g->seq0], g->span0, g->span1, p0, p1);
        CHECK(t->cost == (float)keys * (kv + (float)(t->n_tokens * group) * row));
        read += least(spans * span, held);
        check_cost(w, t, head->rule < 0 ? spans : g->span1 - g->span0, one, top);
        if (i + 1 == p->n_tasks) break;
        CHECK(t->cost >= u->cost);
        if (t->cost == u->cost)
            CHECK(t->kv_head < u->kv_head ||
                  (t->kv_head == u->kv_head &&
                   (t->segment < u->segment ||
                    (t->segment == u->segment && t->first_token < u->first_token))));
    }
    for (i = 0; i < p->n_segments; i++)
        CHECK_EQ(covered[i], (int64_t)p->segment[i].n_tokens * p->n_kv_heads);
    CHECK_EQ(p->kv_tokens_read, read);
    CHECK_EQ(p->kv_tokens_seen, seen);
    free(covered);
}

static void check_all(const world *w, const attn_plan *p) {
    check_seqs(w, p, 1);
    check_segments(w, p);
    check_tasks(w, p);
}

// The same problem a token later: patched where no border was crossed, the same as planned anew.
static void update(world *w, attn_plan *p, test_rng *r) {
    int32_t s, i, step = 1 + test_below(r, 3) * 40, share[MAX_SEQ], n = p->n_active;
    attn_plan_seq was[MAX_SEQ];
    int rebuilt = 7, same = 1;
    memcpy(was, p->seq, sizeof was[0] * (size_t)p->n_seq);
    memcpy(share, p->share, 4 * (size_t)n);
    for (s = 0; s < w->d.n_seq; s++)
        if (w->kv_len[s] + step < STRIDE * PAGE) w->kv_len[s] += step, w->q_pos0[s] += step;
    if (owed_rows(w) > budget_rows(w)) { // a span more: only planning anew could find this
        CHECK_EQ(attn_plan_update(p, &w->d, &rebuilt), ATTN_ERR_BUFFER);
        CHECK_EQ(rebuilt, 1);
        return;
    }
    CHECK_EQ(attn_plan_update(p, &w->d, &rebuilt), ATTN_OK);
    for (s = 0; s < w->d.n_seq; s++)
        same &= was[s].span0 == p->seq[s].span0 && was[s].span1 == p->seq[s].span1 &&
                was[s].rule == p->seq[s].rule;
    for (i = 0; i < n; i++) same &= share[i] == p->share[i];
    // windows may have left what is shared
    if (n_rules(w) && w->d.mask.window_left) CHECK(rebuilt || same);
    else CHECK_EQ(rebuilt, !same);
    check_seqs(w, p, rebuilt);
    check_segments(w, p);
    if (rebuilt) check_tasks(w, p);
}

// Two decoding sequences with one common span and one private token each: when is it shared?
static void thresholds(int32_t span) {
    world w;
    test_rng r = {3};
    void *mem;
    attn_plan *p;
    int32_t i, j, rows = 2 * 4 * 2; // 2 rows x 4 heads, a partial of the prefix and one behind it
    do world_make(&w, &r);
    while (w.d.n_seq != 2);
    memset(&w.d.mask, 0, sizeof w.d.mask);
    w.d.seq_order = NULL;
    w.d.n_heads = 4, w.d.n_kv_heads = 2, w.d.v_head_dim = 64;
    for (i = 0; i < 2; i++) {
        w.kv_pos0[i] = 0, w.kv_len[i] = span + 1, w.q_pos0[i] = span, w.q_start[i + 1] = i + 1;
        for (j = 0; j < span / PAGE; j++) w.page[i * STRIDE + j] = j;
    }
    memset(&w.params, 0, sizeof w.params);
    w.params.rule[0].span = span == 256 ? 0 : span;
    // gain: one reading of the span by 2 heads; loss: 16 partial rows
    for (i = 0; i < 5; i++) {
        w.params.share = i < 3 ? 0 : 2;
        w.params.cost_kv_token = 1;
        w.params.cost_partial = i < 2 ? (float)span / 8 : i == 2 ? 1.0f : 1000.0f;
        if (i == 0) w.params.cost_partial *= 0.99f;
        w.params.partial_bytes = (size_t)(4 * 66 * (rows - (i == 2 || i == 4)));
        p = build(&w, &mem);
        CHECK_EQ(p->n_shared, i == 0 || i == 3);
        check_all(&w, p);
        free(mem);
    }
}

// One sequence of 2000 keys, 1 or 200 queries, 4 heads on 2: what must not cut it, and what a plan
// made for it has room for.
static void one_sequence(void) {
    world w;
    test_rng r = {4};
    int32_t q, s, n_tasks;
    void *mem;
    attn_plan *p;
    do world_make(&w, &r);
    while (w.d.n_seq < 3);
    memset(&w.d.mask, 0, sizeof w.d.mask);
    w.d.seq_order = NULL;
    w.d.n_heads = 4, w.d.n_kv_heads = 2;
    for (q = 1; q <= 200; q += 199) {
        memset(&w.params, 0, sizeof w.params);
        w.params.partial_bytes = (size_t)1 << 28;
        w.params.workers = 1;
        w.d.n_seq = 1;
        w.kv_pos0[0] = 0, w.kv_len[0] = 2000, w.q_pos0[0] = 2000 - q, w.q_start[1] = q;
        CHECK(attn_plan_bytes(&w.d, &w.params) < 1 << 15);
        p = build(&w, &mem);
        n_tasks = p->n_tasks;
        CHECK_EQ(n_tasks, q == 1 ? 2 : 2 * (int32_t)up(q, 128)); // a worker alone: nothing is cut
        check_all(&w, p);
        free(mem);
        w.params.max_task_cost = 1e30f; // nothing is too dear
        p = build(&w, &mem);
        CHECK_EQ(p->n_tasks, n_tasks);
        check_all(&w, p);
        if (q > 1) { // whole sequences fit in a smaller tile: no cut
            w.params.max_task_cost = 8 * attni_span_cost(&p->params, ATTN_SPAN, 2 * 32);
            free(mem);
            p = build(&w, &mem);
            CHECK(p->tile_tokens < 128 && p->n_merges == 0);
        } else { // more tasks than it has room for, of as many sequences
            w.q_start[1] = 1900, w.q_pos0[0] = 100;
            CHECK_EQ(attn_plan_update(p, &w.d, NULL), ATTN_ERR_BUFFER);
        }
        // more sequences
        w.d.n_seq = 2;
        for (s = 0; s < 2; s++)
            w.kv_len[s] = 20, w.kv_pos0[s] = 0, w.q_pos0[s] = 19, w.q_start[s + 1] = s + 1;
        CHECK_EQ(attn_plan_update(p, &w.d, NULL), ATTN_ERR_BUFFER);
        free(mem);
    }
}

// n sequences of one query each and of these lengths, causal, 4 heads on 2, all in the same pages.
static void decoding(world *w, int32_t n, const int32_t *kv_len) {
    test_rng r = {5};
    int32_t s, j;
    do world_make(w, &r);
    while (w->d.n_seq < n);
    memset(&w->d.mask, 0, sizeof w->d.mask);
    memset(&w->params, 0, sizeof w->params);
    w->params.partial_bytes = (size_t)1 << 28;
    w->d.seq_order = NULL;
    w->d.n_seq = n;
    w->d.n_heads = 4, w->d.n_kv_heads = 2;
    for (s = 0; s < n; s++) {
        w->kv_pos0[s] = 0, w->kv_len[s] = kv_len[s], w->q_pos0[s] = kv_len[s] - 1;
        w->q_start[s + 1] = s + 1;
        for (j = 0; j < STRIDE; j++) w->page[s * STRIDE + j] = j;
    }
}

static attn_span_rule *rule(world *w, int32_t i, int32_t max_q, int32_t max_kv, int32_t span) {
    attn_span_rule *x = &w->params.rule[i];
    x->max_q_len = max_q, x->max_kv_len = max_kv, x->span = span;
    return x;
}

// What a table may hold.
static void rule_errors(void) {
    static const int32_t len[1] = {300};
    world w;
    void *mem;
    attn_plan *p = NULL;
    int32_t i, bad;
    for (i = 0; i < ATTN_SPAN_RULES; i++)
        for (bad = 0; bad < 10; bad++) {
            int32_t j;
            attn_span_rule *x;
            static uint8_t room[64];
            decoding(&w, 1, len);
            for (j = 0; j < i; j++) rule(&w, j, 1, 20, 64);
            x = rule(&w, i, 0, 0, bad == 0 ? 32 : bad == 1 ? 96 : bad == 2 ? -64 : 128);
            if (bad == 3) x->max_q_len = -1;
            if (bad == 4) x->max_kv_len = -1;
            if (bad == 5) x->row_tile = -1;
            if (bad == 6) x->no_fold = -1;
            if (bad == 7) w.params.tasks_per_worker = 1024.5f;
            if (bad == 8) w.params.tasks_per_worker = 1e30f;
            if (bad == 9) { // behind the end of the table anything may stand
                x->span = 0;
                if (i + 1 < ATTN_SPAN_RULES) rule(&w, i + 1, -5, -5, 3);
                p = build(&w, &mem);
                CHECK(p && p->seq[0].rule == -1 && p->seq[0].span == 256);
                free(mem);
                continue;
            }
            CHECK_EQ(attn_plan_bytes(&w.d, &w.params), 0);
            CHECK_EQ(attn_plan_build(&w.d, &w.params, room, sizeof room, &p), ATTN_ERR_ARGUMENT);
        }
}

// Prefixes in common are shared inside a class of lengths, once in each; the limits are inclusive.
static void classes(void) {
    static const int32_t len[8] = {500, 512, 513, 700, 501, 1800, 701, 1900};
    static const int32_t want[8] = {0, 0, 1, 1, 0, 2, 1, 2};
    world w;
    void *mem;
    attn_plan *p;
    int32_t s;
    decoding(&w, 8, len);
    rule(&w, 0, 1, 512, 64)->row_tile = 2;
    rule(&w, 1, 1, 1024, 128)->row_tile = 16;
    rule(&w, 2, 0, 0, 512)->no_fold = 1;
    w.params.share = 2;
    p = build(&w, &mem);
    check_all(&w, p);
    for (s = 0; s < 8; s++) CHECK_EQ(p->seq[s].rule, want[s]);
    CHECK(p->rule_tile[0] == 1 && p->rule_tile[1] == 8 && p->rule_tile[2] == p->tile_tokens);
    // 500 and 501 leave 7 whole spans of 64 to all three, 512 has 8 itself; 513, 700 and 701: 4 of
    // 128, then 5 for two; 1800 and 1900: 3 of 512, one slot per span
    CHECK_EQ(p->n_shared, 4);
    for (s = 0; s < p->n_segments; s++) {
        const attn_segment *g = &p->segment[s];
        const attn_plan_seq *q = &p->seq[p->order[g->seq0]];
        if (g->n_seq == 1) continue;
        if (q->rule == 0) CHECK(g->n_seq == 3 && g->span1 == 7 && g->n_slots == 1);
        if (q->rule == 1) CHECK(g->span1 == (g->n_seq == 3 ? 4 : 5) && g->n_slots == 1);
        if (q->rule == 2) CHECK(g->n_seq == 2 && g->span1 == 3 && g->n_slots == 3);
    }
    free(mem);
}

// Rows that see no key have a task, too: it writes their O, whatever the rule.
static void no_keys(void) {
    static const int32_t len[2] = {300, 300};
    world w;
    void *mem;
    attn_plan *p;
    int32_t i, fold, rebuilt;
    for (fold = 0; fold < 2; fold++) {
        decoding(&w, 2, len);
        rule(&w, 0, 0, 0, 64)->no_fold = !fold;
        w.kv_len[0] = w.q_pos0[0] = 0;
        w.kv_pos0[1] = 640, w.q_pos0[1] = 100; // causal, before all that is held
        p = build(&w, &mem);
        check_all(&w, p);
        CHECK(p->n_tasks == 4 && p->n_merges == 0 && p->n_segments == 2);
        for (i = 0; i < p->n_tasks; i++) CHECK_EQ(p->task[i].cost, 0);
        w.q_pos0[1] = 640 + 63, w.kv_len[0] = 1; // a span of each
        CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
        CHECK(rebuilt && p->n_tasks == 4 && p->n_merges == 0);
        check_all(&w, p);
        free(mem);
    }
}

// How many pieces one sequence's spans are cut into, and that they are of one length.
static void pieces(void) {
    // spans, tasks wanted of the two heads together, pieces
    static const int32_t want[10][3] = {{32, 2, 1}, {32, 8, 4}, {30, 8, 4}, {32, 5, 3},
                                        {3, 40, 3}, {32, 12, 6}, {9, 12, 5}, {2, 3, 1},
                                        {10, 2, 1}, {32, 64, 32}};
    world w;
    void *mem;
    attn_plan *p;
    int32_t i, j, fold;
    for (i = 0; i < 20; i++) {
        const int32_t *x = want[i % 10];
        int32_t len[2] = {64 * x[0], 1900};
        fold = i < 10;
        decoding(&w, 1 + i % 2, len);
        w.q_start[2] = 1, w.q_pos0[1] = 1900; // one without queries costs nothing
        rule(&w, 0, 0, 0, 64)->no_fold = !fold;
        w.params.workers = 2;
        w.params.tasks_per_worker = 0.5f * (float)x[1];
        p = build(&w, &mem);
        check_all(&w, p);
        CHECK_EQ(p->n_segments, x[2]);
        for (j = 0; j < p->n_segments; j++) {
            const attn_segment *g = &p->segment[j];
            int32_t n = g->span1 - g->span0;
            CHECK_EQ(n, j + 1 < p->n_segments ? up(x[0], x[2]) : x[0] - j * up(x[0], x[2]));
            CHECK_EQ(g->n_slots, !fold ? n : p->n_segments == 1 ? 0 : j == 0 ? 1 : n);
        }
        CHECK_EQ(p->n_merges, p->n_segments > 1 || !fold);
        // a budget of a row too few: no cut
        w.params.partial_bytes = attn_plan_partial_bytes(p);
        if (w.params.partial_bytes) {
            free(mem);
            p = build(&w, &mem);
            CHECK_EQ(p->n_segments, x[2]);
            w.params.partial_bytes--;
            if (fold) { // no cut; without folds bits would not be those of a cut
                free(mem);
                p = build(&w, &mem);
                CHECK_EQ(p->n_segments, 1);
            } else {
                size_t bytes = attn_plan_bytes(&w.d, &w.params);
                CHECK_EQ(attn_plan_build(&w.d, &w.params, mem, bytes, &p), ATTN_ERR_BUFFER);
            }
        }
        free(mem);
    }
}

// With a table, a window that reaches over all of a shared prefix leaves it shared; one that begins
// inside does not, nor one that a later token lets begin there.
static void windows(void) {
    int32_t len[3] = {1793, 1793, 1793}, s, rebuilt;
    world w;
    void *mem;
    attn_plan *p;
    decoding(&w, 3, len);
    for (s = 0; s < 3; s++) w.page[s * STRIDE + 112] = 200 + s;
    w.d.kv.n_pages = 300;
    rule(&w, 0, 0, 0, 64);
    w.params.share = 2;
    w.params.workers = 4;
    w.d.mask.window_left = 1793; // the last query is at 1792: all of it
    p = build(&w, &mem);
    check_all(&w, p);
    CHECK(p->n_shared > 0);
    for (s = 0; s < 3; s++) w.kv_len[s]++, w.q_pos0[s]++;
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    check_all(&w, p);
    CHECK(rebuilt && p->n_shared == 0);
    free(mem);
}

// Long pieces are as long as they should be, and the last is what is left.
static void long_pieces(void) {
    // sequences of 30 spans, tasks wanted of two heads together, spans of each one's pieces
    static const int32_t want[5][4] = {{1, 3, 20, 10}, {1, 2, 30, 0}, {3, 10, 18, 12},
                                       {3, 8, 23, 7}, {3, 7, 30, 0}};
    world w;
    void *mem;
    attn_plan *p;
    int32_t i, j, n, len[5] = {1920, 1920, 1920, 1920, 1920};
    for (i = 0; i < 5; i++) {
        const int32_t *x = want[i];
        decoding(&w, x[0], len);
        rule(&w, 0, 0, 0, 64);
        w.params.share = 1;
        w.params.workers = x[1];
        w.params.tasks_per_worker = 1;
        p = build(&w, &mem);
        check_all(&w, p);
        n = x[3] ? 2 : 1;
        CHECK_EQ(p->n_segments, n * x[0]);
        for (j = 0; j < p->n_segments && p->n_segments == n * x[0]; j++)
            CHECK_EQ(p->segment[j].span1 - p->segment[j].span0, x[2 + j % n]);
        free(mem);
    }
}

// 12 sequences of 1800 tokens, 1792 of them shared. Cuts follow from what is left to compute when
// those count once, so the common part is cut into as many pieces as make 1.5 times the tasks
// wanted.
static void shared_cost(void) {
    int32_t len[14], s, cut = 0;
    world w;
    void *mem;
    attn_plan *p;
    for (s = 0; s < 14; s++) len[s] = 1793;
    decoding(&w, 12, len);
    for (s = 0; s < 12; s++) w.page[s * STRIDE + 112] = 200 + s;
    w.d.kv.n_pages = 300;
    rule(&w, 0, 0, 0, 64);
    w.params.share = 2;
    w.params.workers = 4;
    p = build(&w, &mem);
    check_all(&w, p);
    CHECK_EQ(p->n_shared, 7);
    for (s = 0; s < p->n_segments; s++) cut += p->segment[s].n_seq == 12;
    CHECK_EQ(cut, 7);
    free(mem);
    // more pieces than a plan has links for in so many chains: as many as it has, not none
    decoding(&w, 14, len);
    for (s = 0; s < 14; s++) w.page[s * STRIDE + 112] = 200 + s;
    w.d.kv.n_pages = 300;
    w.d.n_kv_heads = 1;
    rule(&w, 0, 0, 0, 64)->row_tile = 64;
    w.params.share = 2;
    w.params.workers = 12;
    p = build(&w, &mem);
    check_seqs(&w, p, 1);
    check_segments(&w, p);
    for (s = cut = 0; s < p->n_segments; s++) cut += p->segment[s].n_seq == 14;
    CHECK(cut >= 8 && cut < 28);
    free(mem);
}

// Rows whose own spans end before what they share with others leave partials there all the same:
// those, too, are of the workspace.
static void early_rows(void) {
    static const int32_t len[3] = {1793, 1793, 1793};
    world w;
    void *mem;
    attn_plan *p;
    int32_t i, rows, with_rule, most_shared = 0;
    for (with_rule = 0; with_rule < 3; with_rule++) {
        decoding(&w, 3, len);
        for (i = 32; i < STRIDE; i++) w.page[i] = 200 + i; // 512 tokens of all three, 1792 of two
        for (i = 1; i < 3; i++) w.page[i * STRIDE + 112] = 400 + i;
        w.d.kv.n_pages = 500;
        w.q_pos0[1] = 600;
        if (with_rule) rule(&w, 0, 0, 0, 256)->no_fold = with_rule == 2;
        w.params.share = 2;
        for (rows = with_rule == 2 ? 4 * (8 + 8 + 3) : 0; rows < 160; rows++) {
            w.params.partial_bytes = (size_t)(4 * (attni_v_dim(&w.d) + 2) * rows);
            p = build(&w, &mem);
            if (p) check_all(&w, p);
            if (p && p->n_shared > most_shared) most_shared = p->n_shared;
            free(mem);
        }
    }
    CHECK_EQ(most_shared, 2);
}

// What rules without folds ask for is set aside before anything is shared, and sharing it is free.
static void owed_first(void) {
    static const int32_t len[4] = {513, 513, 1025, 1025};
    world w;
    void *mem;
    attn_plan *p;
    int32_t i, j, less, owed = 2 * 4 * 5, folded = 2 * 4 * (1 + 1);
    for (less = 0; less < 4; less++) {
        decoding(&w, 4, len);
        rule(&w, 0, 0, 600, 256);
        rule(&w, 1, 0, 0, 256)->no_fold = 1;
        for (i = 0; i < 4; i++) // one token of its own behind what all share
            w.page[i * STRIDE + len[i] / PAGE] = 300 + i;
        w.d.kv.n_pages = 400;
        w.params.share = 2;
        w.params.partial_bytes = (size_t)(4 * (attni_v_dim(&w.d) + 2) * (owed + folded));
        w.params.partial_bytes -= less == 1;
        if (less > 1) w.params.partial_bytes = (size_t)(4 * (attni_v_dim(&w.d) + 2) * owed);
        w.params.partial_bytes -= less == 3;
        p = build(&w, &mem); // NULL in the last round: build() expects that
        CHECK_EQ(p == NULL, less == 3);
        if (p) check_all(&w, p);
        if (p) CHECK_EQ(p->n_shared, less ? 1 : 2);
        for (j = 0; p && j < p->n_segments; j++)
            if (less && p->segment[j].n_seq > 1)
                CHECK_EQ(p->seq[p->order[p->segment[j].seq0]].rule, 1);
        free(mem);
    }
    // a mask with sparse terms: nothing is shared with a table, as without one it is
    for (i = 0; i < 2; i++) {
        decoding(&w, 4, len);
        if (i) rule(&w, 0, 0, 0, 256);
        w.params.share = 2;
        w.d.mask.keep_recent = 40;
        p = build(&w, &mem);
        CHECK_EQ(p->n_shared > 0, i == 0);
        check_all(&w, p);
        free(mem);
    }
}

// What a bound on tasks forces, with folds and without, and updates under it.
static void bounded(void) {
    static const int32_t len[1] = {2000};
    world w;
    void *mem;
    attn_plan *p;
    int32_t i;
    decoding(&w, 1, len);
    for (i = 0; i < 3; i++) {
        decoding(&w, 1, len);
        w.params.max_task_cost = 10 * 64 * 6; // ten spans of two rows
        if (i == 2) w.params.max_task_cost = 2 * 256 * 6;
        else rule(&w, 0, 0, 0, 64)->no_fold = i;
        p = build(&w, &mem);
        check_all(&w, p);
        CHECK(p->n_segments == 4 && attn_plan_partial_bytes(p) > 0);
        w.params.partial_bytes = attn_plan_partial_bytes(p);
        free(mem);
        p = build(&w, &mem);
        CHECK_EQ(p->n_segments, 4);
        w.params.partial_bytes--;
        CHECK_EQ(attn_plan_build(&w.d, &w.params, mem, attn_plan_bytes(&w.d, &w.params), &p),
                 ATTN_ERR_BUFFER);
        free(mem);
    }
    // tiles of a rule's size, which longer KV makes smaller
    w.params.partial_bytes = (size_t)1 << 28;
    rule(&w, 0, 0, 0, 64)->no_fold = 1;
    w.params.rule[0].row_tile = 256;
    w.params.max_task_cost = 90000;
    w.params.max_kv_len = 2000;
    w.q_start[1] = w.kv_len[0] = 200, w.q_pos0[0] = 0;
    p = build(&w, &mem);
    check_all(&w, p);
    CHECK_EQ(p->rule_tile[0], 128);
    w.kv_len[0] = 2000, w.q_pos0[0] = 1800;
    CHECK_EQ(attn_plan_update(p, &w.d, NULL), ATTN_OK);
    check_all(&w, p);
    CHECK_EQ(p->rule_tile[0], 16);
    free(mem);
}

// A sequence that outgrows its class is planned anew, even between the same spans.
static void class_border(void) {
    static const int32_t len[2] = {99, 90};
    world w;
    void *mem;
    attn_plan *p;
    int32_t rebuilt = 7, i;
    decoding(&w, 2, len);
    rule(&w, 0, 0, 100, 64);
    rule(&w, 1, 0, 0, 64)->row_tile = 2;
    w.d.seq_order = w.order;
    w.order[0] = 1, w.order[1] = 0;
    p = build(&w, &mem);
    CHECK(p->order[0] == 1 && p->order[1] == 0);
    for (i = 0; i < 3; i++) { // 100, 101, 102 tokens
        w.kv_len[1] = 100 + i, w.q_pos0[1] = 99 + i;
        CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
        CHECK_EQ(rebuilt, i == 1);
        CHECK(p->seq[1].rule == (i > 0) && p->order[0] == (i == 0));
        check_seqs(&w, p, 1);
        check_segments(&w, p);
    }
    w.order[0] = 0, w.order[1] = 1; // another order of the caller's, the same one rule by rule
    CHECK_EQ(attn_plan_update(p, &w.d, &rebuilt), ATTN_OK);
    CHECK_EQ(rebuilt, 0);
    free(mem);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 1500), i;
    thresholds(256);
    thresholds(64);
    thresholds(1024);
    one_sequence();
    rule_errors();
    classes();
    no_keys();
    pieces();
    windows();
    long_pieces();
    shared_cost();
    early_rows();
    owed_first();
    bounded();
    class_border();
    for (i = 0; i < count && !test_failed; i++) {
        test_rng r;
        world w;
        void *mem;
        attn_plan *p;
        r.state = seed + i;
        world_make(&w, &r);
        p = build(&w, &mem);
        if (p) check_all(&w, p);
        if (p) update(&w, p, &r);
        if (test_failed) printf("  problem %llu\n", (unsigned long long)(seed + i));
        free(mem);
    }
    return TEST_END();
}

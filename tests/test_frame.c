/* Frame budgets: tasks run in any order, by any thread, in as many frames as it takes, with other
   work between, and every bit is that of one call; no task is dearer than max_task_cost.
   test_frame [SEED [COUNT]]
   cc -std=c11 -I. -Itests tests/test_frame.c -o test_frame -pthread -lm */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define ATTN_IMPLEMENTATION
#include "problem.h"
#include <pthread.h>

enum { THREADS = 3, GUARD = 256 };

static const attn_dtype kv_types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                      ATTN_F8E5M2, ATTN_I8,  ATTN_I4};

static void random_opts(test_rng *r, problem_opts *o, attn_numerics numerics) {
    static const int32_t dims[] = {8, 16, 40, 64, 128};
    static const int32_t pages[] = {1, 16, 48, 64, 256};
    static const attn_dtype qo[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    memset(o, 0, sizeof *o);
    o->phase = test_below(r, N_PHASES);
    o->mask = test_below(r, N_MASKS);
    o->layout = (attn_layout)test_below(r, 3);
    o->contiguous = test_below(r, 5) == 0;
    o->page_tokens = pages[test_below(r, 5)];
    if (o->layout == ATTN_K16) o->page_tokens = (o->page_tokens + 15) / 16 * 16;
    o->n_seq = 1 + test_below(r, 5);
    o->max_kv = o->phase == PREFILL ? 1 + test_below(r, 700) : 1 + test_below(r, 3000);
    o->n_kv_heads = 1 + test_below(r, 2);
    o->n_heads = o->n_kv_heads * (1 + test_below(r, 4));
    o->head_dim = dims[test_below(r, 5)];
    o->v_head_dim = test_below(r, 3) ? o->head_dim : dims[test_below(r, 5)];
    o->k = kv_types[test_below(r, 7)];
    o->v = kv_types[test_below(r, 7)];
    o->q = qo[test_below(r, 3)];
    o->o = qo[test_below(r, 3)];
    if (numerics == ATTN_NUMERICS_APPROX && test_below(r, 3)) o->k = ATTN_I8;
    if (test_below(r, 5) == 0) o->k = o->v = o->q = o->o = ATTN_BF16;
    o->softcap = test_below(r, 5) == 0;
    o->alibi = test_below(r, 5) == 0;
    o->sink = test_below(r, 5) == 0;
    o->lse = 1;
    o->evicted = test_below(r, 5) == 0;
    o->shared = test_below(r, 2) == 0 ? 16 * (1 + test_below(r, 60)) : 0;
    if (o->mask == M_DENSE && o->max_kv > 700) o->max_kv = 700; // n x n bytes
    o->numerics = numerics;
    o->sharp = 3;
}

// ---- what the cost model says, counted apart from the planner

static double span_cost(const attn_plan *p, double rows) {
    return ATTN_SPAN * ((double)p->params.cost_kv_token + rows * (double)p->params.cost_row_token);
}

// Every task and merge keeps the bound or is the smallest there is.
static int within(const attn_plan *p, double bound) {
    int32_t i, group = p->n_heads / p->n_kv_heads, bad = 0;
    double slack = 1 + 1e-5;
    for (i = 0; i < p->n_tasks; i++) {
        const attn_task *t = &p->task[i];
        const attn_segment *g = &p->segment[t->segment];
        double most = (g->span1 - g->span0) * span_cost(p, (double)t->n_tokens * group);
        bad += (double)t->cost > most * slack; // closed forms may make it less
        if (most > bound * slack)
            bad += g->span1 - g->span0 > 1 || t->n_tokens > 1;
    }
    for (i = 0; i < p->n_merges; i++) {
        const attn_merge *u = &p->merge[i];
        const attn_plan_seq *q = &p->seq[u->seq];
        double cost = 0;
        int32_t c;
        for (c = 0; c < q->n_chain; c++) cost += p->segment[p->chain[q->chain + c]].n_slots;
        cost *= (double)p->params.cost_partial * u->n_tokens * p->n_heads;
        bad += fabs(cost - (double)u->cost) > cost * 1e-5;
        bad += cost > bound * slack && u->n_tokens > 1;
    }
    return !bad;
}

// Each (query token, KV head, span any row may see) lies in one task, each merged token in one
// merge. Closed-form masks prune inside a task, so segments are what counts.
static int covered(const attn_plan *p) {
    int32_t i, c, t, s, h, ok = 1;
    for (s = 0; s < p->n_seq; s++) {
        const attn_plan_seq *q = &p->seq[s];
        int32_t at = 0, merged = 0;
        for (c = 0; c < q->n_chain; c++) {
            const attn_segment *g = &p->segment[p->chain[q->chain + c]];
            // spans before a row's first one may be skipped, or read for others
            ok &= g->span0 >= at && (g->span0 == at || g->span0 <= q->span0);
            at = g->span1;
        }
        if (q->q_len > 0) ok &= at >= q->span1;
        for (i = 0; i < p->n_merges; i++)
            if (p->merge[i].seq == s) {
                ok &= p->merge[i].first_token == merged;
                merged += p->merge[i].n_tokens;
            }
        if (q->n_chain) ok &= merged == (p->segment[p->chain[q->chain]].n_slots ? q->q_len : 0);
    }
    for (i = 0; i < p->n_segments; i++)
        for (h = 0; h < p->n_kv_heads; h++) {
            int32_t sum = 0, top = 0;
            for (t = 0; t < p->n_tasks; t++)
                if (p->task[t].segment == i && p->task[t].kv_head == h) {
                    sum += p->task[t].n_tokens;
                    if (p->task[t].first_token + p->task[t].n_tokens > top)
                        top = p->task[t].first_token + p->task[t].n_tokens;
                }
            ok &= sum == p->segment[i].n_tokens && top == sum;
        }
    return ok;
}

// The arrays of a plan lie side by side: nobody else notices one that runs over.
static int in_capacity(const attn_plan *p) {
    int64_t chain = 0;
    int32_t s;
    for (s = 0; s < p->n_seq; s++) chain += p->seq[s].n_chain;
    return p->n_tasks <= p->cap_tasks && p->n_segments <= p->cap_segments &&
           p->n_merges <= p->cap_merges && chain <= p->cap_chain;
}

// ---- a host that stops and goes on

typedef struct host {
    problem *p;
    attn_plan *plan;
    uint8_t *partials, *scratch[THREADS]; // partials: of exactly the bytes the plan names, guarded
    size_t partial_bytes, scratch_bytes;
    int32_t *order, next, end;            // next: atomic
    int32_t merging;
    int bad;
} host;

static void shuffle(test_rng *r, int32_t *a, int32_t n) {
    int32_t i, j, t;
    for (i = 0; i < n; i++) a[i] = i;
    for (i = n - 1; i > 0; i--) {
        j = test_below(r, i + 1);
        t = a[i], a[i] = a[j], a[j] = t;
    }
}

static attn_result unit(host *h, int32_t i, int thread) {
    if (h->merging) return attn_cpu_merge(&h->p->d, h->plan, i, 1, h->partials);
    return attn_cpu_run(&h->p->d, h->plan, i, 1, h->partials, h->scratch[thread]);
}

typedef struct worker {
    host *h;
    int thread;
} worker;

static void *work(void *arg) {
    worker *w = (worker *)arg;
    int32_t i;
    while ((i = __atomic_fetch_add(&w->h->next, 1, __ATOMIC_RELAXED)) < w->h->end)
        if (unit(w->h, w->h->order[i], w->thread) != ATTN_OK)
            __atomic_store_n(&w->h->bad, 1, __ATOMIC_RELAXED);
    return NULL;
}

// One frame: count units on real threads, or one after another on scratch of any of them.
static void frame(host *h, test_rng *r, int32_t count, int threads) {
    pthread_t id[THREADS];
    worker w[THREADS];
    int i;
    for (i = 0; i < THREADS; i++) memset(h->scratch[i], test_below(r, 256), h->scratch_bytes);
    h->end = h->next + count;
    if (threads) {
        for (i = 0; i < THREADS; i++) {
            w[i].h = h;
            w[i].thread = i;
            if (i) CHECK_EQ(pthread_create(&id[i], NULL, work, &w[i]), 0);
        }
        work(&w[0]);
        for (i = 1; i < THREADS; i++) pthread_join(id[i], NULL);
        h->next = h->end; // claims past the end moved it on
        return;
    }
    for (; h->next < h->end; h->next++)
        h->bad |= unit(h, h->order[h->next], test_below(r, THREADS)) != ATTN_OK;
}

static void frames(host *h, test_rng *r, int merging, int threads) {
    int32_t n = merging ? h->plan->n_merges : h->plan->n_tasks;
    h->order = (int32_t *)malloc(4 * (size_t)n + 4);
    shuffle(r, h->order, n);
    h->merging = merging;
    for (h->next = 0; h->next < n;) {
        int32_t left = n - h->next, count = test_below(r, 4) ? 1 + test_below(r, left) : 1;
        frame(h, r, count, threads);
    }
    free(h->order);
}

static void *buffer(size_t bytes) {
    void *m = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!m) abort();
    memset(m, 0xff, bytes);
    return m;
}

static int same_bits(const void *a, const void *b, size_t n) { return !memcmp(a, b, n); }

// A merge writes the rows of its own tokens and no others.
static void lone_merge(host *h, test_rng *r) {
    const attn_desc *d = &h->p->d;
    size_t row = (size_t)d->n_heads * (size_t)d->v_head_dim, bytes;
    uint8_t *o = (uint8_t *)d->o.data, *before;
    int32_t i = test_below(r, h->plan->n_merges), t;
    const attn_merge *u = &h->plan->merge[i];
    int32_t first = d->q_start[u->seq] + u->first_token, changed = 0, touched = 0;
    row *= (size_t)attn_dtype_bits(d->o.dtype) / 8;
    bytes = row * (size_t)h->p->n_tokens;
    before = (uint8_t *)malloc(bytes + 1);
    memcpy(before, o, bytes);
    CHECK_EQ(attn_cpu_merge(d, h->plan, i, 1, h->partials), ATTN_OK);
    for (t = 0; t < h->p->n_tokens; t++)
        if (memcmp(o + row * (size_t)t, before + row * (size_t)t, row)) {
            changed++;
            touched += t >= first && t < first + u->n_tokens;
        }
    CHECK(changed == touched && changed == u->n_tokens);
    memcpy(o, before, bytes);
    free(before);
}

static void host_run(problem *p, attn_plan *plan, test_rng *r, int threads) {
    host h;
    int i;
    memset(&h, 0, sizeof h);
    h.p = p;
    h.plan = plan;
    h.partial_bytes = attn_plan_partial_bytes(plan);
    h.scratch_bytes = attn_cpu_scratch_bytes(&p->d, plan);
    h.partials = (uint8_t *)buffer(h.partial_bytes + GUARD);
    for (i = 0; i < THREADS; i++) h.scratch[i] = (uint8_t *)buffer(h.scratch_bytes);
    frames(&h, r, 0, threads);
    if (plan->n_merges) lone_merge(&h, r);
    frames(&h, r, 1, threads);
    CHECK(!h.bad);
    for (i = 0; i < GUARD; i++)
        if (h.partials[h.partial_bytes + (size_t)i] != 0xff) break;
    CHECK_EQ(i, GUARD);
    free(h.partials);
    for (i = 0; i < THREADS; i++) free(h.scratch[i]);
}

static void single_call(problem *p) {
    size_t bytes = attn_cpu_forward_bytes(&p->d, 1);
    void *mem = buffer(bytes);
    CHECK_EQ(attn_cpu_forward(&p->d, mem, bytes, 1), ATTN_OK);
    free(mem);
}

// partial_bytes that max_task_cost can always be kept with, from the header's formula.
static size_t enough(const attn_desc *d) {
    size_t n = 0;
    int32_t s;
    for (s = 0; s < d->n_seq; s++)
        n += (size_t)(d->q_start[s + 1] - d->q_start[s]) * (size_t)d->n_heads *
             (size_t)(d->kv.kv_len[s] / ATTN_SPAN + 2);
    return 4 * n * (size_t)(d->v_head_dim + 2);
}

static double random_bound(test_rng *r, const problem *p) {
    double group = p->d.n_heads / p->d.n_kv_heads;
    double least = ATTN_SPAN * (4 + group), most = 12 * ATTN_SPAN * (4 + 256.0);
    if (test_below(r, 6) == 0) return 1;                      // every task the smallest
    return least * exp(test_uniform(r, 0, log(most / least))); // about one span .. a long list
}

static void one(uint64_t seed, attn_numerics numerics, int *cut) {
    test_rng r;
    problem p;
    problem_opts o;
    attn_plan_params params;
    attn_plan *plan = NULL;
    attn_result res;
    double bound;
    size_t n, bytes;
    void *mem, *out, *lse;
    r.state = seed * 3 + (uint64_t)numerics;
    random_opts(&r, &o, numerics);
    problem_make(&p, &o, &r);
    do attn_cpu_set_isa((attn_cpu_isa)test_below(&r, ATTN_CPU_ISA_COUNT));
    while (!attn_cpu_has(attn_cpu_get_isa()));
    n = (size_t)p.n_tokens * (size_t)o.n_heads;
    bytes = n * (size_t)o.v_head_dim * (size_t)attn_dtype_bits(o.o) / 8;
    out = malloc(bytes + 1);
    lse = malloc(4 * n + 1);
    single_call(&p);
    memcpy(out, p.d.o.data, bytes);
    memcpy(lse, p.d.lse, 4 * n);

    bound = random_bound(&r, &p);
    attn_cpu_plan_params(&p.d, 1 + test_below(&r, 4), &params);
    params.max_task_cost = (float)bound;
    bound = (double)params.max_task_cost;
    params.share = test_below(&r, 3);
    params.partial_bytes = enough(&p.d);
    if (test_below(&r, 4) == 0) params.row_tile = 1 + test_below(&r, 600);
    mem = buffer(attn_plan_bytes(&p.d, &params));
    res = attn_plan_build(&p.d, &params, mem, attn_plan_bytes(&p.d, &params), &plan);
    if (CHECK_EQ(res, ATTN_OK)) {
        CHECK(within(plan, bound));
        CHECK(covered(plan));
        CHECK(attn_plan_partial_bytes(plan) <= params.partial_bytes);
        CHECK(in_capacity(plan));
        *cut += attn_plan_partial_bytes(plan) > 0;
        memset(p.d.o.data, 0xff, bytes);
        memset(p.d.lse, 0xff, 4 * n);
        host_run(&p, plan, &r, test_below(&r, 4) == 0);
        CHECK(same_bits(out, p.d.o.data, bytes));
        if (!CHECK(same_bits(lse, p.d.lse, 4 * n)))
            printf("  seed %llu %s %s numerics %d\n", (unsigned long long)seed,
                   problem_phases[o.phase], problem_masks[o.mask], numerics);
    }
    // less workspace: the bound still holds, or the plan is refused; never more than was given
    params.partial_bytes = (size_t)((double)params.partial_bytes * test_uniform(&r, 0, 1));
    res = attn_plan_build(&p.d, &params, mem, attn_plan_bytes(&p.d, &params), &plan);
    CHECK(res == ATTN_OK || res == ATTN_ERR_BUFFER);
    if (res == ATTN_OK) {
        CHECK(within(plan, bound) && covered(plan) && in_capacity(plan));
        CHECK(attn_plan_partial_bytes(plan) <= params.partial_bytes);
        memset(p.d.o.data, 0xff, bytes);
        host_run(&p, plan, &r, 0);
        CHECK(same_bits(out, p.d.o.data, bytes));
    }
    free(mem);
    free(out);
    free(lse);
    problem_free(&p);
}

// ---- chosen cases

// A plan that follows a growing sequence keeps its bound across span borders, and says so when the
// capacities end.
static void growing(void) {
    static const int32_t q_start[3] = {0, 3, 4};
    int32_t kv_len[2] = {200, 900}, step, built = 0;
    attn_plan_params params;
    attn_plan *plan = NULL;
    attn_desc d;
    void *mem;
    static float q[4 * 8 * 16], o[4 * 8 * 16];
    memset(&d, 0, sizeof d);
    d.n_seq = 2;
    d.n_heads = 8;
    d.n_kv_heads = 2;
    d.head_dim = d.v_head_dim = 16;
    d.q_start = q_start;
    d.q.data = q;
    d.o.data = o;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.k.data = d.kv.v.data = q; // planning reads no KV
    d.kv.kv_len = kv_len;
    d.kv.n_pages = 2;
    d.kv.page_tokens = 4000;
    attn_cpu_plan_params(&d, 2, &params);
    params.max_task_cost = 2 * ATTN_SPAN * (4 + 12);
    params.max_kv_len = 4000;
    params.partial_bytes = 4 * 18 * 4 * 8 * 18;
    mem = buffer(attn_plan_bytes(&d, &params));
    CHECK_EQ(attn_plan_build(&d, &params, mem, attn_plan_bytes(&d, &params), &plan), ATTN_OK);
    for (step = 0; step < 3000; step++, kv_len[0]++, kv_len[1]++) {
        int rebuilt = 0;
        if (!CHECK_EQ(attn_plan_update(plan, &d, &rebuilt), ATTN_OK)) break;
        built += rebuilt;
        if (step % 97 == 0 || rebuilt)
            CHECK(within(plan, (double)params.max_task_cost) && covered(plan) &&
                  in_capacity(plan));
    }
    CHECK(built > 10 && built < 40);
    kv_len[0] = kv_len[1] = 4000;
    plan->params.partial_bytes = 4 * 18 * 8 * 5; // a shared workspace shrank
    CHECK_EQ(attn_plan_update(plan, &d, NULL), ATTN_ERR_BUFFER);
    free(mem);
    params.max_kv_len = 0; // nothing beyond what is described now was asked for
    kv_len[0] = kv_len[1] = 300;
    mem = buffer(attn_plan_bytes(&d, &params));
    CHECK_EQ(attn_plan_build(&d, &params, mem, attn_plan_bytes(&d, &params), &plan), ATTN_OK);
    kv_len[0] = kv_len[1] = 3900;
    CHECK_EQ(attn_plan_update(plan, &d, NULL), ATTN_ERR_BUFFER);
    free(mem);
    mem = buffer(1 << 20);
    params.max_task_cost = -1;
    CHECK_EQ(attn_plan_build(&d, &params, mem, 1 << 20, &plan), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_plan_bytes(&d, &params), 0);
    params.max_task_cost = attni_float(0x7fc00000u);
    CHECK_EQ(attn_plan_build(&d, &params, mem, 1 << 20, &plan), ATTN_ERR_ARGUMENT);
    params.max_task_cost = 3e38f; // a bound beyond everything changes nothing
    params.workers = 1;
    free(mem);
    mem = buffer(attn_plan_bytes(&d, &params));
    CHECK_EQ(attn_plan_build(&d, &params, mem, attn_plan_bytes(&d, &params), &plan), ATTN_OK);
    CHECK_EQ(attn_plan_partial_bytes(plan), 0);
    free(mem);
}

// Longer KV means fewer tokens in each merge: more merges than there is room for are refused.
static void many_merges(void) {
    static const int32_t q_start[2] = {0, 900};
    int32_t kv_len = 1000;
    attn_plan_params params;
    attn_plan *plan = NULL;
    attn_desc d;
    float dummy[1];
    void *mem;
    memset(&d, 0, sizeof d);
    d.n_seq = 1;
    d.n_heads = 32;
    d.n_kv_heads = 4;
    d.head_dim = 16;
    d.q_start = q_start;
    d.q.data = d.o.data = d.kv.k.data = d.kv.v.data = dummy; // planning reads none of them
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.kv_len = &kv_len;
    d.kv.n_pages = 1;
    d.kv.page_tokens = 4000;
    attn_cpu_plan_params(&d, 1, &params);
    params.row_tile = 8;
    params.max_task_cost = 8 * ATTN_SPAN * (4 + 8); // eight spans of a tile: no cuts, tasks as many
    mem = buffer(attn_plan_bytes(&d, &params));
    CHECK_EQ(attn_plan_build(&d, &params, mem, attn_plan_bytes(&d, &params), &plan), ATTN_OK);
    kv_len = 1020;
    CHECK_EQ(attn_plan_update(plan, &d, NULL), ATTN_OK);
    kv_len = 1500;
    CHECK_EQ(attn_plan_update(plan, &d, NULL), ATTN_ERR_BUFFER);
    free(mem);
    d.n_heads = d.n_kv_heads; // a tile of 2^30 tokens: its double is no int32_t
    params.row_tile = INT32_MAX;
    CHECK(attn_plan_bytes(&d, &params) > 0);
}

// Sharing and balance do not take the workspace that the bound needs.
static void frugal(void) {
    test_rng r = {7};
    problem_opts o;
    problem p;
    attn_plan_params params;
    attn_plan *plan = NULL;
    void *mem;
    size_t need;
    float bound = 2000;
    random_opts(&r, &o, ATTN_NUMERICS_FAST);
    o.phase = CHUNKED, o.mask = M_CAUSAL, o.n_seq = 4, o.shared = 1024, o.max_kv = 3000;
    o.contiguous = 0, o.page_tokens = 64, o.evicted = 0;
    problem_make(&p, &o, &r);
    mem = buffer(1 << 22);
    for (; bound < 40000; bound += 1000) {
        attn_cpu_plan_params(&p.d, 4, &params);
        params.max_task_cost = bound;
        params.share = 1;
        params.workers = 1;
        params.partial_bytes = enough(&p.d);
        CHECK_EQ(attn_plan_build(&p.d, &params, mem, 1 << 22, &plan), ATTN_OK);
        need = attn_plan_partial_bytes(plan); // what the bound alone takes
        if (!need) break;
        params.share = 0;
        params.workers = 4;
        params.partial_bytes = need;
        CHECK_EQ(attn_plan_build(&p.d, &params, mem, 1 << 22, &plan), ATTN_OK);
        CHECK(within(plan, (double)bound));
        params.share = params.workers = 1;
        params.partial_bytes = need - 4;
        CHECK_EQ(attn_plan_build(&p.d, &params, mem, 1 << 22, &plan), ATTN_ERR_BUFFER);
    }
    CHECK(bound > 4000);
    free(mem);
    problem_free(&p);
}

// Plans alone, many of them: bounds, capacities and coverage over shapes that would be slow to run.
static void plans(uint64_t seed) {
    enum { SEQS = 12 };
    int32_t q_start[SEQS + 1] = {0}, kv_len[SEQS], table[SEQS * 64], s, j;
    test_rng r;
    attn_plan_params params;
    attn_plan *plan = NULL;
    attn_desc d;
    float dummy[1];
    double bound;
    int32_t longest = 0, common;
    size_t bytes;
    void *mem;
    r.state = seed;
    memset(&d, 0, sizeof d);
    d.n_seq = 1 + test_below(&r, SEQS);
    d.n_kv_heads = 1 + test_below(&r, 8);
    d.n_heads = d.n_kv_heads * (1 + test_below(&r, 16));
    d.head_dim = d.v_head_dim = 64;
    d.q_start = q_start;
    d.q.data = d.o.data = d.kv.k.data = d.kv.v.data = dummy; // planning reads none of them
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.kv_len = kv_len;
    d.kv.page_tokens = 256 << test_below(&r, 3);
    d.kv.n_pages = SEQS * 64;
    d.kv.page_table = table;
    d.kv.page_table_stride = 64;
    common = test_below(&r, 3) ? test_below(&r, 20) : 0;
    for (s = 0; s < d.n_seq; s++) {
        kv_len[s] = 1 + test_below(&r, test_below(&r, 2) ? 300 : 24 * d.kv.page_tokens);
        q_start[s + 1] = q_start[s] + 1;
        if (test_below(&r, 3) == 0)
            q_start[s + 1] += test_below(&r, kv_len[s] < 400 ? kv_len[s] : 400);
        if (kv_len[s] > longest) longest = kv_len[s];
        for (j = 0; j < 64; j++) table[s * 64 + j] = j < common ? j : s * 64 + j;
    }
    if (test_below(&r, 3) == 0) d.mask.window_left = 1 + test_below(&r, longest);
    attn_cpu_plan_params(&d, 1 + test_below(&r, 16), &params);
    bound = ATTN_SPAN * 5 * exp(test_uniform(&r, -1, 7));
    params.max_task_cost = (float)bound;
    params.share = test_below(&r, 3);
    params.row_tile = test_below(&r, 3) ? 256 : 1 + test_below(&r, 2000);
    params.partial_bytes = enough(&d);
    bytes = attn_plan_bytes(&d, &params);
    mem = buffer(bytes);
    if (CHECK_EQ(attn_plan_build(&d, &params, mem, bytes, &plan), ATTN_OK)) {
        CHECK(in_capacity(plan) && within(plan, (double)params.max_task_cost));
        CHECK(plan->n_tasks > 500 || covered(plan)); // quadratic
        CHECK(attn_plan_partial_bytes(plan) <= params.partial_bytes);
    }
    free(mem);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 40), i;
    int cut = 0;
    attn_cpu_open();
    growing();
    many_merges();
    frugal();
    for (i = 0; i < count; i++) {
        one(seed + i, ATTN_NUMERICS_FAST, &cut);
        one(seed + i, ATTN_NUMERICS_PORTABLE, &cut);
        one(seed + i, ATTN_NUMERICS_APPROX, &cut);
    }
    for (i = 0; i < 10 * count; i++) plans(seed + i);
    CHECK(cut > (int)count / 2); // plans that cut KV, not rows alone, were among them
    return TEST_END();
}

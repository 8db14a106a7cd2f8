/* Selectors on a CUDA device against the oracle: the problems, parameters and comparisons are
   tests/test_select.c's. test_select_cuda [SEED [COUNT]] */
#define main test_select_main
#include "../test_select.c"
#undef main
#undef ATTN_IMPLEMENTATION
#define GUARD DEV_GUARD // its own has the same name
#include "device.h"

// What CUDA does not do, and how often it was drawn.
enum { NO_EPSILON, NO_FLAGS, N_REFUSED };
static const char *const refusals[N_REFUSED] = {"exact: epsilon",
                                                "hip3: landmark, centre, keep scores"};
static long long drawn[6], refused[6], by_reason[N_REFUSED];

// Takes it out of parameters that are refused, but for what must be done.
static void strip(const attn_desc *d, attn_select *s) {
    int i, flags = 0;
    drawn[s->kind]++;
    if (attn_cuda_select_bytes(&cu, d, s) > 0) return;
    refused[s->kind]++;
    by_reason[NO_EPSILON] += s->kind == ATTN_SELECT_EXACT && s->exact.epsilon > 0;
    s->exact.epsilon = 0;
    for (i = 0; i < ATTN_HIP_STAGES; i++) {
        flags |= s->hip.stage[i].flags & ~ATTN_HIP_LAST_SCORE;
        s->hip.stage[i].flags &= ATTN_HIP_LAST_SCORE;
    }
    by_reason[NO_FLAGS] += s->kind == ATTN_SELECT_HIP3 && flags;
    s->hip.landmark = NULL;
}

typedef struct held { // a selection on the device and its twin on the host
    attn_selection x, host;
    void *mem, *work;
    uint8_t *copy;
    size_t bytes, work_bytes;
    int32_t *seq_row, *seq_row2;
} held;

static void held_open(held *m, const attn_desc *d, const attn_select *s) {
    int32_t i;
    m->bytes = attn_select_bytes(d, s);
    m->work_bytes = attn_cuda_select_bytes(&cu, d, s);
    CHECK(m->bytes > 0);
    CHECK(m->work_bytes > 0);
    m->mem = dev_alloc(m->bytes, NULL);
    m->work = dev_alloc(m->work_bytes, NULL);
    m->copy = (uint8_t *)aligned_alloc(64, (m->bytes + 63) & ~(size_t)63);
    m->seq_row = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    m->seq_row2 = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    CHECK_EQ(attn_selection_init(d, s, m->mem, m->bytes, m->seq_row, 1, &m->x), ATTN_OK);
    CHECK_EQ(attn_selection_init(d, s, m->copy, m->bytes, m->seq_row2, 0, &m->host), ATTN_OK);
    for (i = 0; i < s->n_slots; i++)
        CHECK_EQ(attn_cuda_select_forget(&cu, &m->x, i, dev_stream), ATTN_OK);
}

static void held_close(held *m) {
    free(m->copy);
    free(m->seq_row);
    free(m->seq_row2);
}

// Selects for d, whose arrays lie on the device. with: the uploaded mask has the selection's terms.
static int held_run(held *m, const attn_desc *d, const attn_select *s, int with) {
    attn_desc e = *d;
    how h;
    job j;
    int mark = dev_n, ok;
    memset(&h, 0, sizeof h);
    if (with) attn_selection_mask(&m->x, &e.mask);
    job_make(&j, &e, &h);
    DEV(cudaDeviceSynchronize());
    ok = j.plan && CHECK_EQ(job_upload(&j, &e), ATTN_OK);
    if (ok) {
        attn_result r = attn_cuda_select(&cu, &e, &j.g, s, NULL, &m->x, m->work, m->work_bytes,
                                         dev_stream);
        // told before anything is touched where a list's rows do not fit into shared memory
        if (r == ATTN_ERR_UNSUPPORTED && d->head_dim * d->n_heads / d->n_kv_heads >= 256) ok = 0;
        else ok = CHECK_EQ(r, ATTN_OK);
    }
    dev_sync();
    ok &= CHECK_EQ(dev_error(), 0);
    ok &= CHECK(dev_guards(0));
    dev_read(m->copy, m->mem, m->bytes);
    memcpy(m->seq_row2, m->seq_row, 4 * (size_t)d->n_seq);
    dev_release(mark);
    job_free(&j);
    return ok;
}

static void cuda_problem(problem *p, test_rng *r, int kind, int family, int prefill) {
    do {
        if (p->n_mem) problem_free(p);
        make_problem(p, r, kind, family, prefill);
    } while (p->d.kv.layout == ATTN_K16);
    p->d.numerics = ATTN_NUMERICS_FAST;
}

static void cuda_one(uint64_t seed, int kind, int family) {
    test_rng r;
    problem p;
    attn_select s;
    twin t;
    held m;
    oracle *o;
    int mark = dev_n;
    now = seed;
    r.state = seed * 64 + (uint64_t)(kind * 10 + family);
    memset(&p, 0, sizeof p);
    cuda_problem(&p, &r, kind, family, kind == ATTN_SELECT_FLEX && test_below(&r, 2));
    make_select(&r, &p, kind, family == F_INTS, &s);
    strip(&p.d, &s);
    o = oracle_select(&p.d, &s, NULL, NULL);
    twin_make(&t, &p, 1, test_below(&r, 3) ? NULL : &r);
    held_open(&m, &t.d, &s);
    if (held_run(&m, &t.d, &s, test_below(&r, 2))) compare(o, &m.host, family);
    else tell(&p.d, &s, family, "the call");
    held_close(&m);
    dev_release(mark);
    oracle_free(o);
    problem_free(&p);
}

// As decode() of test_select.c.
static void cuda_decode(uint64_t seed, int kind, int family) {
    test_rng r;
    problem p;
    attn_select s;
    held m;
    twin w;
    oracle_slot *slots;
    step t;
    int32_t slot[8], ahead[8], i, n, lists;
    int mark = dev_n;
    now = seed;
    r.state = seed * 64 + (uint64_t)(640 + kind * 10 + family);
    memset(&p, 0, sizeof p);
    cuda_problem(&p, &r, kind, family, 1);
    make_select(&r, &p, kind, family == F_INTS, &s);
    strip(&p.d, &s);
    s.n_slots = p.d.n_seq + test_below(&r, 3);
    twin_make(&w, &p, 1, NULL);
    held_open(&m, &p.d, &s);
    lists = m.x.n_lists;
    slots = oracle_slots_new(s.n_slots * lists);
    for (i = 0; i < s.n_slots; i++) slot[i] = s.n_slots - 1 - i;
    memset(&t, 0, sizeof t);
    for (n = 0; n < 10; n++) {
        int step_mark = dev_n;
        attn_desc d;
        oracle *o;
        for (i = 0; i < p.d.n_seq; i++) {
            int32_t left = p.d.kv.kv_len[i] - t.kv_len[i];
            ahead[i] = n == 0               ? oracle_most(1, left - 12)
                       : test_below(&r, 12) ? 1
                                            : test_below(&r, 3);
            ahead[i] = oracle_least(ahead[i], left);
        }
        step_make(&t, &p, ahead);
        if (t.q_start[p.d.n_seq] > 0) {
            if (test_below(&r, 8) == 0) {
                int32_t f = test_below(&r, s.n_slots);
                CHECK_EQ(attn_cuda_select_forget(&cu, &m.x, f, dev_stream), ATTN_OK);
                for (i = 0; i < lists; i++) slots[f * lists + i].next = -1;
            }
            d = w.d;
            d.q_start = t.d.q_start, d.q_pos0 = t.d.q_pos0, d.kv.kv_len = t.d.kv.kv_len;
            d.q.data = dev_alloc((size_t)t.q_start[p.d.n_seq] * (size_t)d.n_heads *
                                     (size_t)d.head_dim * element_bytes(d.q.dtype), t.d.q.data);
            CHECK_EQ(attn_selection_follow(&t.d, &s, slot, &m.x), ATTN_OK);
            o = oracle_select(&t.d, &s, slot, slots);
            if (held_run(&m, &d, &s, 1)) compare(o, &m.host, family);
            else tell(&p.d, &s, family, "a step");
            oracle_free(o);
        }
        free(t.d.q.data);
        dev_release(step_mark);
    }
    oracle_slots_free(slots, s.n_slots * lists);
    held_close(&m);
    dev_release(mark);
    problem_free(&p);
}

static void cuda_report(int kind) {
    long long n = 0, excused = 0;
    int f;
    printf("%-5s refused %lld of %lld\n", kinds[kind], refused[kind], drawn[kind]);
    for (f = 0; f < N_FAMILIES; f++) {
        if (f <= F_SLASH) n += tally[kind][f].n;
        if (f <= F_SLASH) excused += tally[kind][f].excused;
        printf("%-5s %-9s rows %6lld entries %8lld excused %5lld\n", kinds[kind], families[f],
               tally[kind][f].rows, tally[kind][f].n, tally[kind][f].excused);
    }
    CHECK(excused * 500 <= n);
    if (kind != ATTN_SELECT_FLEX && kind != ATTN_SELECT_EXACT)
        CHECK_EQ(tally[kind][F_INTS].excused, 0); // nothing is added up
}

int main(int argc, char **argv) {
    static const int done[] = {ATTN_SELECT_FLEX, ATTN_SELECT_HIP1, ATTN_SELECT_HIP2,
                               ATTN_SELECT_HIP3, ATTN_SELECT_EXACT};
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 6), i;
    const char *only = getenv("TEST_SELECT"); // one kind
    int k, f, status = dev_open();
    if (status) return status;
    for (k = 0; k < 5; k++) {
        if (only && strcmp(only, kinds[done[k]]) != 0) continue;
        for (i = 0; i < count; i++)
            for (f = 0; f < N_FAMILIES; f++) cuda_one(seed + i, done[k], f);
        for (i = 0; i < count; i++)
            for (f = 0; f < N_FAMILIES; f += 5)
                cuda_decode(seed + i, done[k], f);
        cuda_report(done[k]);
    }
    for (i = 0; i < N_REFUSED; i++) printf("refused %6lld %s\n", by_reason[i], refusals[i]);
    return TEST_END();
}

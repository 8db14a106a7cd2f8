/* Selectors on a CUDA device against the oracle: the problems, parameters and comparisons are
   tests/test_select.c's. test_select_cuda [SEED [COUNT]] */
#define main test_select_main
#include "../test_select.c"
#undef main
#undef ATTN_IMPLEMENTATION
#define GUARD DEV_GUARD // its own has the same name
#include "device.h"

// What CUDA does not do is taken out, and counted. Returned: the parameters as the device takes
// them.
static long long drawn[6], refused[6];

static attn_select strip(const attn_desc *d, attn_select *s) {
    const size_t n = (size_t)d->kv.n_pages * (size_t)d->n_kv_heads * (size_t)d->kv.page_tokens;
    attn_select on;
    drawn[s->kind]++;
    if (attn_cuda_select_bytes(&cu, d, s) == 0) {
        refused[s->kind]++;
        s->exact.epsilon = 0;
    }
    on = *s;
    if (s->hip.landmark) on.hip.landmark = (const float *)dev_alloc(4 * n, s->hip.landmark);
    if (s->hip.rope)
        on.hip.rope = (const float *)dev_alloc(4 * (size_t)s->hip.rope_len *
                                               (size_t)s->hip.rope_dim, s->hip.rope);
    return on;
}

// Bytes of the query rows of a list, in f32: they lie in shared memory.
static int64_t rows_bytes(const attn_desc *d, const attn_select *s) {
    const int64_t group = d->n_heads / d->n_kv_heads, row = s->row_block ? s->row_block : 64;
    int64_t n = row * (s->hip.q_group ? s->hip.q_group : 1);
    int i;
    for (i = 0; i < s->hip.n_stages; i++)
        if (s->hip.stage[i].q_block > n) n = s->hip.stage[i].q_block;
    return 2 * 4 * n * group * d->head_dim; // SELF_EXTEND has them twice
}

typedef struct held { // a selection on the device and its twin on the host
    attn_selection x, host;
    void *mem, *work;
    uint8_t *copy;
    size_t bytes, work_bytes;
    int32_t *seq_row, *seq_row2;
    int too_large; // a list's rows do not fit into shared memory
} held;

static void held_open(held *m, const attn_desc *d, const attn_select *s) {
    int32_t i;
    m->too_large = 0;
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
    m->x.keeps_all = 0; // lists all the same
    for (i = 0; i < s->n_slots; i++)
        CHECK_EQ(attn_cuda_select_forget(&cu, &m->x, i, dev_stream), ATTN_OK);
}

static void held_close(held *m) {
    free(m->copy);
    free(m->seq_row);
    free(m->seq_row2);
}

// The rows of d's sequences, as they are on the device.
static void held_read(held *m, const attn_desc *d) {
    const attn_selection *x = &m->x, *y = &m->host;
    int32_t s, l, r;
    memset(m->copy, 0xff, m->bytes);
    memcpy(m->seq_row2, m->seq_row, 4 * (size_t)d->n_seq);
    for (s = 0; s < d->n_seq; s++) {
        const int32_t q_len = d->q_start[s + 1] - d->q_start[s];
        const int32_t p0 = d->q_pos0 ? d->q_pos0[s]
                                     : (d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0) + d->kv.kv_len[s] -
                                           q_len;
        const int32_t first = m->seq_row[s] + p0 / x->list.row_block;
        const int32_t last = m->seq_row[s] + (p0 + q_len - 1) / x->list.row_block;
        for (l = 0; l < x->n_lists && q_len; l++) {
            const int64_t at = l * ((int64_t)x->list.n_rows + 1) + first;
            const size_t n = (size_t)(last - first + 1);
            dev_read(y->row_start + at, x->row_start + at, 8 * n);
            dev_read(y->row_end + at, x->row_end + at, 8 * n);
            dev_read(y->visited + at, x->visited + at, 4 * n);
            if (x->missed) dev_read(y->missed + at, x->missed + at, 4 * n);
            for (r = 0; r <= last - first; r++) {
                const int64_t i = y->row_start[at + r], e = y->row_end[at + r] - i;
                if (i >= 0 && e > 0 && e <= x->row_capacity &&
                    i <= x->list.device_entries - x->row_capacity)
                    dev_read(y->block + i, x->block + i, 4 * (size_t)e);
            }
        }
    }
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
        m->too_large = r == ATTN_ERR_UNSUPPORTED && rows_bytes(d, s) > 65536;
        if (m->too_large) refused[s->kind]++, ok = 0;
        else ok = CHECK_EQ(r, ATTN_OK);
    }
    dev_sync();
    ok &= CHECK_EQ(dev_error(), 0);
    ok &= CHECK(dev_guards(0));
    held_read(m, d);
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
    attn_select s, on;
    twin t;
    held m;
    oracle *o;
    int mark = dev_n;
    now = seed;
    r.state = seed * 64 + (uint64_t)(kind * 10 + family);
    memset(&p, 0, sizeof p);
    cuda_problem(&p, &r, kind, family, kind == ATTN_SELECT_FLEX && test_below(&r, 2));
    make_select(&r, &p, kind, family == F_INTS, &s);
    on = strip(&p.d, &s);
    o = oracle_select(&p.d, &s, NULL, NULL);
    twin_make(&t, &p, 1, test_below(&r, 3) ? NULL : &r);
    held_open(&m, &t.d, &on);
    if (held_run(&m, &t.d, &on, test_below(&r, 2))) {
        compare(o, &m.host, family);
        if (kind == ATTN_SELECT_FLEX || kind == ATTN_SELECT_EXACT) worth(o, &m.host, family);
    } else if (!m.too_large) {
        tell(&p.d, &s, family, "the call");
    }
    held_close(&m);
    dev_release(mark);
    oracle_free(o);
    problem_free(&p);
}

// As decode() of test_select.c.
static void cuda_decode(uint64_t seed, int kind, int family) {
    test_rng r;
    problem p;
    attn_select s, on;
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
    s.n_slots = p.d.n_seq + test_below(&r, 3);
    on = strip(&p.d, &s);
    twin_make(&w, &p, 1, NULL);
    held_open(&m, &p.d, &on);
    lists = m.x.n_lists;
    slots = oracle_slots_new(s.n_slots * lists);
    for (i = 0; i < s.n_slots; i++) slot[i] = s.n_slots - 1 - i;
    memset(&t, 0, sizeof t);
    for (n = 0; n < 10; n++) {
        int step_mark = dev_n;
        attn_desc d;
        oracle *o;
        if (step_next(&t, &p, &r, n, ahead)) {
            int32_t f = step_forgets(&r, slots, s.n_slots, lists);
            if (f >= 0) CHECK_EQ(attn_cuda_select_forget(&cu, &m.x, f, dev_stream), ATTN_OK);
            d = w.d;
            d.q_start = t.d.q_start, d.q_pos0 = t.d.q_pos0, d.kv.kv_len = t.d.kv.kv_len;
            d.q.data = dev_alloc((size_t)t.q_start[p.d.n_seq] * (size_t)d.n_heads *
                                     (size_t)d.head_dim * element_bytes(d.q.dtype), t.d.q.data);
            CHECK_EQ(attn_selection_follow(&t.d, &on, slot, &m.x), ATTN_OK);
            m.x.keeps_all = 0;
            o = oracle_select(&t.d, &s, slot, slots);
            if (held_run(&m, &d, &on, 1)) compare(o, &m.host, family);
            else if (!m.too_large) tell(&p.d, &s, family, "a step");
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

// Positions of stages against the CPU's lists: with turns by right angles all arithmetic is exact.
static void cuda_styles(uint64_t seed) {
    test_rng r;
    problem p;
    attn_select s, on;
    twin t;
    held m;
    memory cpu;
    int32_t i, n;
    float *rope;
    int mark = dev_n;
    now = seed;
    r.state = seed * 64 + 1000;
    memset(&p, 0, sizeof p);
    cuda_problem(&p, &r, ATTN_SELECT_HIP3, F_INTS, 0);
    make_select(&r, &p, ATTN_SELECT_HIP3, 1, &s);
    s.hip.rope_dim = 2 * (1 + test_below(&r, p.d.head_dim / 2));
    s.hip.rope_len = 1 + test_below(&r, 900);
    s.hip.context = 4 + test_below(&r, 300);
    for (i = 0; i < s.hip.n_stages; i++)
        s.hip.stage[i].style = (attn_rope_style)test_below(&r, 6);
    n = s.hip.rope_len * s.hip.rope_dim;
    s.hip.rope = rope = (float *)problem_alloc(&p, 4 * (size_t)n);
    for (i = 0; i < n; i++) {
        const int32_t half = s.hip.rope_dim / 2, place = i % s.hip.rope_dim;
        const int turn = place < half ? test_below(&r, 4) : 0;
        if (place >= half) continue;
        rope[i] = (float)(turn == 0) - (float)(turn == 2);
        rope[i + half] = (float)(turn == 1) - (float)(turn == 3);
    }
    on = strip(&p.d, &s);
    memory_open(&cpu, &p.d, &s);
    CHECK_EQ(run(&p.d, &s, NULL, &cpu.x, 0), ATTN_OK);
    twin_make(&t, &p, 1, &r);
    held_open(&m, &t.d, &on);
    if (held_run(&m, &t.d, &on, 0)) {
        oracle *o = oracle_select(&p.d, &s, NULL, NULL); // its rows, not its lists
        if (!CHECK(same(o, &cpu.x, &m.host))) tell(&p.d, &s, F_INTS, "styles");
        oracle_free(o);
    }
    held_close(&m);
    memory_close(&cpu);
    dev_release(mark);
    problem_free(&p);
}

// Landmarks against the CPU's.
static void cuda_landmarks(uint64_t seed) {
    test_rng r;
    problem p;
    attn_select s, on;
    twin t;
    how h;
    job j;
    int mark = dev_n;
    size_t n, i, bytes;
    float *want, *got, *out, size = 0, off = 0;
    uint8_t *scratch;
    now = seed;
    r.state = seed * 64 + 2000;
    memset(&p, 0, sizeof p);
    memset(&s, 0, sizeof s);
    memset(&h, 0, sizeof h);
    cuda_problem(&p, &r, ATTN_SELECT_HIP3, F_NORMAL, 0);
    n = (size_t)p.d.kv.n_pages * (size_t)p.d.n_kv_heads * (size_t)p.d.kv.page_tokens;
    want = (float *)problem_alloc(&p, 4 * n);
    got = (float *)problem_alloc(&p, 4 * n);
    for (i = 0; i < n; i++) want[i] = got[i] = 7;
    s.kind = ATTN_SELECT_HIP3;
    s.hip.landmark = want;
    bytes = attn_cpu_select_scratch_bytes(&p.d, &s);
    scratch = guarded(bytes);
    CHECK_EQ(attn_cpu_landmarks(&p.d, &s, want, 0, attn_cpu_landmarks_units(&p.d),
                                scratch + GUARD), ATTN_OK);
    free(scratch);
    twin_make(&t, &p, 1, &r);
    out = (float *)dev_alloc(4 * n, got);
    on = s;
    on.hip.landmark = out;
    job_make(&j, &t.d, &h);
    DEV(cudaDeviceSynchronize());
    if (j.plan && CHECK_EQ(job_upload(&j, &t.d), ATTN_OK))
        CHECK_EQ(attn_cuda_landmarks(&cu, &t.d, &j.g, &on, out, dev_stream), ATTN_OK);
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    CHECK(dev_guards(0));
    dev_read(got, out, 4 * n);
    for (i = 0; i < n; i++) {
        if (want[i] != 7 && fabsf(want[i]) > size) size = fabsf(want[i]);
        if (!(fabsf(want[i] - got[i]) <= off)) off = fabsf(want[i] - got[i]);
    }
    if (!CHECK(off <= 2e-5f * size)) {
        tell(&p.d, &s, F_NORMAL, "landmarks");
        printf("    off by %g of %g\n", (double)off, (double)size);
    }
    job_free(&j);
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
        for (i = 0; i < 4 * count && done[k] == ATTN_SELECT_HIP3; i++) {
            cuda_styles(seed + i);
            cuda_landmarks(seed + i);
        }
        cuda_report(done[k]);
    }
    return TEST_END();
}

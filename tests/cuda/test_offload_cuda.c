/* KV offload on a CUDA device: pages in page-locked host memory behind a cache in device memory
   that is far too small. Attention and selectors must give the bits that they give without,
   whatever is cached; stores and page copies must reach both memories; reads must be counted. The
   problems are tests/cuda/test_cuda.c's. test_offload_cuda [SEED [COUNT [NAME]]] */
#define main test_cuda_main
#include "test_cuda.c"
#undef main

enum { STEPS = 4 };

// ---- a twin whose pages lie in host memory

typedef struct offload {
    twin t;               // pages in host memory, d.kv.cache
    attn_kv_cache kc;
    attn_cache *c;
    attn_cache_load *loads;
    int32_t *slot;        // device memory, as c's
    void *mem;
} offload;

static size_t page_stride(const twin *t, int v) {
    return t->page_bytes[t->p->opt.alias ? 0 : v];
}

// The twin t over again, offloaded. slots: of the cache, at least.
static void offload_make(offload *x, const twin *t, int32_t slots, attn_cache_policy policy) {
    const int32_t n = t->d.kv.n_pages;
    attn_cache_params cp;
    size_t bytes;
    int v;
    memset(x, 0, sizeof *x);
    x->t = *t;
    memset(&cp, 0, sizeof cp);
    cp.n_pages = n;
    cp.n_slots = attni_min32(n, attni_max32(slots, n / 20 + 1));
    cp.policy = policy;
    bytes = attn_cache_bytes(&cp);
    x->mem = aligned_alloc(64, bytes);
    CHECK_EQ(attn_cache_init(&cp, x->mem, bytes, &x->c), ATTN_OK);
    x->loads = (attn_cache_load *)malloc(sizeof *x->loads * (size_t)cp.n_slots);
    for (v = 0; v < 2; v++) {
        attn_kv_array *a = v ? &x->t.d.kv.v : &x->t.d.kv.k;
        const size_t one = page_stride(t, v);
        if (v && t->p->opt.alias) {
            a->data = x->t.d.kv.k.data;
            x->kc.v = x->kc.k;
            break;
        }
        a->data = dev_new(one * (size_t)n, NULL, 1);
        dev_read(a->data, v ? t->d.kv.v.data : t->d.kv.k.data, one * (size_t)n);
        // what was never loaded must not be read: poison
        *(v ? &x->kc.v : &x->kc.k) = dev_alloc(one * (size_t)cp.n_slots, NULL);
    }
    x->kc.n_slots = cp.n_slots;
    x->slot = (int32_t *)dev_alloc(4 * (size_t)n, x->c->slot);
    x->kc.slot = x->slot;
    x->kc.reads = (uint32_t *)dev_alloc(4 * (size_t)n, NULL);
    dev_fill(x->kc.reads, 0, 4 * (size_t)n);
    x->t.d.kv.cache = &x->kc;
}

static void offload_free(offload *x) {
    free(x->mem), free(x->loads);
}

// After a step: what was read to the cache, what it decides to the device.
static void offload_update(offload *x) {
    const size_t n = 4 * (size_t)x->t.d.kv.n_pages;
    int32_t n_loads;
    dev_read(x->c->reads, x->kc.reads, n);
    dev_fill(x->kc.reads, 0, n);
    CHECK_EQ(attn_cache_update(x->c, x->loads, &n_loads), ATTN_OK);
    dev_write(x->slot, x->c->slot, n);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(attn_cuda_cache_load(&cu, &x->t.d, x->loads, n_loads, dev_stream), ATTN_OK);
    dev_sync();
}

// 1 when the pages are t's, byte for byte, and every copy is its page's.
static int offload_equal(const offload *x, const twin *t) {
    int32_t i;
    int v, ok = 1;
    for (v = 0; v < (t->p->opt.alias ? 1 : 2); v++) {
        const attn_kv_array *a = v ? &x->t.d.kv.v : &x->t.d.kv.k;
        const size_t one = page_stride(t, v), need = t->need_bytes[v];
        const uint8_t *home = (const uint8_t *)a->data;
        uint8_t *m = (uint8_t *)malloc(one * (size_t)t->d.kv.n_pages);
        dev_read(m, v ? t->d.kv.v.data : t->d.kv.k.data, one * (size_t)t->d.kv.n_pages);
        if (memcmp(m, home, one * (size_t)t->d.kv.n_pages)) ok = 0;
        for (i = 0; i < x->kc.n_slots; i++) {
            if (x->c->page[i] < 0) continue;
            dev_read(m, (const uint8_t *)(v ? x->kc.v : x->kc.k) + one * (size_t)i, need);
            if (memcmp(m, home + one * (size_t)x->c->page[i], need)) ok = 0;
        }
        free(m);
    }
    return ok;
}

// ---- attention

// Pages that hold a key which a query sees are counted; those that no sequence with queries has are
// not.
static int reads_right(const offload *x) {
    const attn_desc *d = &x->t.p->d;
    const int32_t pt = d->kv.page_tokens;
    uint8_t *have = (uint8_t *)calloc((size_t)d->kv.n_pages, 1);
    const int32_t most = attni_max32(1, x->t.p->n_tokens / 24), step = 1 + d->n_heads / 8;
    int32_t s, t, h, j, ok = 1;
    uint32_t *reads = (uint32_t *)malloc(4 * (size_t)d->kv.n_pages);
    dev_read(reads, x->kc.reads, 4 * (size_t)d->kv.n_pages);
    for (s = 0; s < d->n_seq; s++)
        for (j = 0; j < d->kv.kv_len[s] && d->q_start[s] < d->q_start[s + 1]; j++) {
            const int32_t page = attni_page_of(d, s, j);
            have[page] = 1;
            for (t = d->q_start[s]; t < d->q_start[s + 1] && !reads[page]; t += most)
                for (h = 0; h < d->n_heads && !reads[page]; h += step)
                    if (attn_ref_visible(d, s, t, h, j)) ok = 0;
            if (!ok) printf("  page %d (token %d of %d, %d a page) is seen but not counted\n", page,
                            j, s, pt);
            if (!ok) goto done;
        }
    for (j = 0; j < d->kv.n_pages; j++)
        if (reads[j] && !have[j]) ok = 0, printf("  page %d is nobody's and counted\n", j);
done:
    free(have), free(reads);
    return ok;
}

// Rows of the sequences' own tokens, other than those that are there, into both twins' pages.
static void store_both(const offload *x, const twin *t, test_rng *r) {
    static const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    const problem *p = t->p;
    const attn_desc *d = &p->d;
    const int mark = dev_n;
    int32_t n = 1 + test_below(r, 40), i;
    const int64_t rows = (int64_t)n * d->n_kv_heads, pt = d->kv.page_tokens;
    int64_t *slots = (int64_t *)malloc(8 * (size_t)n);
    float *f = (float *)malloc(4 * (size_t)(rows * d->head_dim));
    attn_tensor k, v;
    for (i = 0; i < n; i++) { // no slot twice: the last one to write would win
        slots[i] = i * 7 + test_below(r, 7);
        if (slots[i] >= (int64_t)d->kv.n_pages * pt) slots[i] = -1;
    }
    for (i = 0; i < rows * d->head_dim; i++) f[i] = (float)test_uniform(r, -2, 2);
    memset(&k, 0, sizeof k);
    k.dtype = types[test_below(r, 3)];
    v = k;
    {
        void *m = rows_as(f, rows * d->head_dim, k.dtype);
        k.data = dev_alloc((size_t)(rows * d->head_dim) * element_bytes(k.dtype), m);
        v.data = k.data; // its first columns
        v.stride_token = (int64_t)d->n_kv_heads * d->head_dim, v.stride_head = d->head_dim;
        free(m);
    }
    {
        const int64_t *there = (const int64_t *)dev_alloc(8 * (size_t)n, slots);
        const int both = !p->opt.alias && d->v_head_dim <= d->head_dim;
        DEV(cudaDeviceSynchronize());
        CHECK_EQ(attn_cuda_store(&cu, &t->d, NULL, &k, both ? &v : NULL, there, 0, n, dev_stream),
                 ATTN_OK);
        CHECK_EQ(attn_cuda_store(&cu, &x->t.d, NULL, &k, both ? &v : NULL, there, 0, n, dev_stream),
                 ATTN_OK);
    }
    if (d->kv.n_pages > 1)
        for (i = 0; i < 3; i++) {
            const attn_page_copy copy = {test_below(r, d->kv.n_pages), test_below(r, d->kv.n_pages),
                                         test_below(r, d->kv.page_tokens + 1)};
            CHECK_EQ(attn_cuda_copy_pages(&cu, &t->d, &copy, 1, dev_stream), ATTN_OK);
            CHECK_EQ(attn_cuda_copy_pages(&cu, &x->t.d, &copy, 1, dev_stream), ATTN_OK);
        }
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    dev_release(mark);
    free(slots), free(f);
}

// Steps of one problem, whose pages change between them; every second one a graph's replay.
static void steps(offload *x, const twin *t, const how *h, test_rng *r, const problem_opts *o,
                  uint64_t seed, int large) {
    const problem *p = t->p;
    const int mark = dev_n;
    attn_desc d = x->t.d;
    result plain, with;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    job j;
    int i, ok;
    result_make(&plain, p), result_make(&with, p);
    if (h->device_tables & 2) list_on_device(&d);
    job_make(&j, &d, h);
    DEV(cudaDeviceSynchronize());
    if (!j.plan || !CHECK_EQ(job_upload(&j, &d), ATTN_OK)) goto done;
    dev_sync();
    DEV(cudaStreamBeginCapture(dev_stream, cudaStreamCaptureModeGlobal));
    if (h->partials == 0) CHECK_EQ(job_run(&j, &d), ATTN_OK);
    DEV(cudaStreamEndCapture(dev_stream, &graph));
    DEV(cudaGraphInstantiate(&exec, graph, 0));
    for (i = 0; i < STEPS; i++) {
        ok = twin_run(t, h, plain.o, plain.lse);
        twin_clear(&x->t);
        DEV(cudaDeviceSynchronize());
        if (i % 2 && h->partials == 0) DEV(cudaGraphLaunch(exec, dev_stream));
        else CHECK_EQ(job_run(&j, &d), ATTN_OK);
        dev_sync();
        ok &= CHECK_EQ(dev_error(), 0);
        ok &= CHECK(twin_output(&x->t, with.o, with.lse));
        ok &= CHECK(same_rows(p, &plain, 0, &with, 0, p->n_tokens));
        if (!large && i == 0) ok &= CHECK(reads_right(x));
        offload_update(x);
        ok &= CHECK(offload_equal(x, t));
        store_both(x, t, r);
        ok &= CHECK(offload_equal(x, t));
        ok &= CHECK(dev_guards(0));
        if (!ok) {
            describe(o, seed, attn_cuda_executor(&cu, &d));
            printf("  step %d, %d of %d pages have copies\n", i, x->kc.n_slots, d.kv.n_pages);
            break;
        }
    }
    DEV(cudaGraphExecDestroy(exec));
    DEV(cudaGraphDestroy(graph));
done:
    dev_release(mark);
    job_free(&j);
    result_free(&plain), result_free(&with);
}

static void run_one(uint64_t seed, int which, int counts[3]) {
    const attn_cache_policy policy = (attn_cache_policy)(seed % 5);
    problem_opts o;
    test_rng r;
    problem p;
    offload x;
    const char *name;
    twin t;
    how h;
    r.state = seed;
    if (which == TENSOR) tensor_opts(&r, &o);
    else if (which == LARGE) large_opts(&r, &o);
    else if (which == LISTS) lists_opts(&r, &o);
    else problem_random(&r, &o);
    if (o.layout == ATTN_K16) o.layout = ATTN_HEAD_MAJOR;
    o.numerics = ATTN_NUMERICS_FAST;
    problem_make(&p, &o, &r);
    if (which == LISTS) lists_mask(&p, &r);
    sample_vary(&p, &r);
    twin_make(&t, &p, 1, &r);
    random_how(&r, &h);
    offload_make(&x, &t, test_below(&r, 2) ? 1 : p.d.kv.n_pages / 2, policy);
    name = attn_cuda_executor(&cu, &t.d);
    counts[strncmp(name, "mma", 3) != 0 ? 0 : strstr(name, "dequant") ? 2 : 1]++;
    steps(&x, &t, &h, &r, &o, seed, which == LARGE);
    dev_release(0);
    offload_free(&x);
    problem_free(&p);
}

static void part_run(uint64_t seed, uint64_t count) {
    static const int kinds[] = {ANY, TENSOR, LISTS, LARGE};
    int counts[3] = {0, 0, 0}, k;
    uint64_t i;
    for (k = 0; k < 4; k++)
        for (i = 0; i < (kinds[k] == LARGE ? count / 12 + 1 : count); i++) {
            run_one(seed + i, kinds[k], counts);
            fflush(stdout);
        }
    printf("  %d simt, %d mma, %d mma with dequantisation\n", counts[0], counts[1], counts[2]);
}

// Exact counts: a lone sequence in decode reads every page of its KV heads' tasks once for each
// block of 64 tokens that is in it; a policy that sees them has the right hits and misses.
static void part_reads(uint64_t seed, uint64_t count) {
    static const int32_t pages[] = {16, 64, 128};
    problem_opts o;
    problem p;
    offload x;
    test_rng r;
    twin t;
    how h;
    int i;
    (void)count;
    r.state = seed;
    memset(&h, 0, sizeof h);
    for (i = 0; i < 6; i++) {
        const int32_t pt = pages[i % 3], per = (64 + pt - 1) / pt; // pages of a block
        uint32_t *reads;
        int64_t hits = 0, misses = 0;
        int32_t j, ok = 1, n;
        result y;
        plain_opts(&o, i < 3 ? ATTN_BF16 : ATTN_F32, DECODE, M_CAUSAL);
        o.n_seq = 1, o.max_kv = 3000, o.page_tokens = pt;
        problem_make(&p, &o, &r);
        twin_make(&t, &p, 1, NULL);
        offload_make(&x, &t, 3, ATTN_CACHE_LFU);
        result_make(&y, &p);
        reads = (uint32_t *)malloc(4 * (size_t)p.d.kv.n_pages);
        twin_run(&x.t, &h, y.o, y.lse);
        dev_read(reads, x.kc.reads, 4 * (size_t)p.d.kv.n_pages);
        for (j = 0; j < p.d.kv.kv_len[0]; j += pt) {
            n = per > 1 ? 1 : (attni_min32(p.d.kv.kv_len[0] - j, pt) + 63) / 64;
            ok &= reads[p.d.kv.page_table[j / pt]] == (uint32_t)(n * o.n_kv_heads);
            misses += n * o.n_kv_heads;
        }
        CHECK(ok);
        offload_update(&x);
        CHECK(x.c->hits == 0 && x.c->misses == misses && x.c->loads == x.kc.n_slots);
        for (j = 0; j < x.kc.n_slots; j++) hits += reads[x.c->page[j]];
        twin_run(&x.t, &h, y.o, y.lse);
        offload_update(&x);
        CHECK(x.c->hits == hits && x.c->misses == 2 * misses - hits);
        dev_release(0);
        free(reads);
        result_free(&y);
        offload_free(&x);
        problem_free(&p);
    }
}

// ---- selectors

static uint8_t *lists(const attn_desc *d, const attn_select *s, attn_result *out, size_t *n) {
    const int mark = dev_n;
    attn_selection x;
    int32_t *seq_row = (int32_t *)calloc((size_t)d->n_seq, 4), i;
    size_t bytes = attn_select_bytes(d, s), work_bytes = attn_cuda_select_bytes(&cu, d, s);
    uint8_t *mem = (uint8_t *)dev_alloc(bytes, NULL), *m = (uint8_t *)malloc(bytes);
    void *work = dev_alloc(work_bytes, NULL);
    how h;
    job j;
    memset(&h, 0, sizeof h);
    dev_fill(mem, 0xff, bytes); // rows' ends are all that selecting leaves as it was
    CHECK_EQ(attn_selection_init(d, s, mem, bytes, seq_row, 1, &x), ATTN_OK);
    for (i = 0; i < x.n_slots; i++)
        CHECK_EQ(attn_cuda_select_forget(&cu, &x, i, dev_stream), ATTN_OK);
    job_make(&j, d, &h);
    DEV(cudaDeviceSynchronize());
    CHECK_EQ(job_upload(&j, d), ATTN_OK);
    *out = attn_cuda_select(&cu, d, &j.g, s, NULL, &x, work, work_bytes, dev_stream);
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    dev_read(m, mem, bytes);
    dev_release(mark);
    job_free(&j);
    free(seq_row);
    *n = bytes;
    return m;
}

static int64_t select_one(uint64_t seed) {
    static const attn_dtype types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16,
                                       ATTN_F8E4M3, ATTN_I8,  ATTN_I4};
    static const attn_select_kind kinds[] = {ATTN_SELECT_FLEX, ATTN_SELECT_HIP2, ATTN_SELECT_HIP3,
                                             ATTN_SELECT_EXACT};
    attn_select s;
    problem_opts o;
    problem p;
    offload x;
    test_rng r;
    twin t;
    int64_t hits = 0;
    int i;
    r.state = seed;
    plain_opts(&o, types[test_below(&r, 3)], test_below(&r, 2) ? DECODE : CHUNKED, M_CAUSAL);
    o.layout = (attn_layout)test_below(&r, 2);
    o.contiguous = test_below(&r, 4) == 0;
    o.page_tokens = test_below(&r, 2) ? 16 : 1 + test_below(&r, 70);
    o.k = o.v = test_below(&r, 2) ? o.q : types[test_below(&r, 6)];
    o.max_kv = 1 + test_below(&r, 2000);
    o.evicted = test_below(&r, 3) == 0;
    memset(&s, 0, sizeof s);
    s.kind = kinds[seed % 4];
    s.row_block = s.kv_block = s.kind == ATTN_SELECT_HIP3 ? 0 : 16;
    s.hip.sink = 16, s.hip.window = 32, s.hip.keep = 64;
    s.exact.keep = 64;
    problem_make(&p, &o, &r);
    twin_make(&t, &p, 1, &r);
    offload_make(&x, &t, p.d.kv.n_pages / 3, (attn_cache_policy)(seed % 5));
    CHECK_EQ(attn_select_check(&t.d, &s), ATTN_OK);
    for (i = 0; i < 3; i++) {
        size_t n, m;
        attn_result a, b;
        uint8_t *plain = lists(&t.d, &s, &a, &n), *with = lists(&x.t.d, &s, &b, &m);
        CHECK_EQ(a, ATTN_OK);
        if (!CHECK(a == b && n == m && memcmp(plain, with, n) == 0)) describe(&o, seed, "select");
        free(plain), free(with);
        offload_update(&x);
        if (s.kind == ATTN_SELECT_FLEX || s.kind == ATTN_SELECT_EXACT) // HiP: few keys, or none
            CHECK(x.c->loads > 0 && (i == 0 || x.c->hits > 0));
    }
    hits += x.c->hits;
    dev_release(0);
    offload_free(&x);
    problem_free(&p);
    return hits;
}

static void part_select(uint64_t seed, uint64_t count) {
    int64_t hits[4] = {0, 0, 0, 0};
    uint64_t i;
    for (i = 0; i < count; i++) hits[(seed + i) % 4] += select_one(seed + i);
    for (i = 0; i < 4; i++) CHECK(count < 40 || hits[i] > 0);
}

// ---- errors

// Slots that are none are read from the page itself and reported.
static void bad_slots(attn_dtype type) {
    problem_opts o;
    problem p;
    offload x;
    test_rng r = {5};
    result base, y;
    twin t;
    how h;
    job j;
    int i;
    memset(&h, 0, sizeof h);
    plain_opts(&o, type, DECODE, M_CAUSAL);
    problem_make(&p, &o, &r);
    twin_make(&t, &p, 1, NULL);
    offload_make(&x, &t, 2, ATTN_CACHE_LRU);
    result_make(&base, &p), result_make(&y, &p);
    twin_run(&t, &h, base.o, base.lse);
    for (i = 0; i < 4; i++) {
        const int32_t bad[] = {x.kc.n_slots, -2, INT32_MAX, INT32_MIN};
        dev_write(x.slot + p.d.kv.page_table[p.d.kv.page_table_stride], &bad[i], 4);
        twin_clear(&x.t);
        job_make(&j, &x.t.d, &h);
        DEV(cudaDeviceSynchronize());
        CHECK_EQ(job_upload(&j, &x.t.d), ATTN_OK);
        CHECK_EQ(job_run(&j, &x.t.d), ATTN_OK);
        dev_sync();
        CHECK_EQ(dev_error(), ATTN_ERR_PAGE);
        twin_output(&x.t, y.o, y.lse);
        CHECK(same_rows(&p, &base, 0, &y, 0, p.n_tokens));
        job_free(&j);
    }
    dev_release(0);
    offload_free(&x);
    result_free(&base), result_free(&y);
    problem_free(&p);
}

// Page ids that are none stay so, those too that a slot's would be.
static void bad_pages(attn_dtype type) {
    problem_opts o;
    problem p;
    offload x;
    test_rng r = {6};
    result base, y;
    twin t;
    how h;
    job j;
    int i;
    memset(&h, 0, sizeof h);
    plain_opts(&o, type, DECODE, M_CAUSAL);
    do { // the page must be one that is looked at
        problem_make(&p, &o, &r);
        if (p.d.kv.kv_len[1] > 64) break;
        problem_free(&p);
    } while (1);
    twin_make(&t, &p, 1, NULL);
    offload_make(&x, &t, 2, ATTN_CACHE_LRU);
    result_make(&base, &p), result_make(&y, &p);
    twin_run(&t, &h, base.o, base.lse);
    h.device_tables = 1;
    for (i = 0; i < 4; i++) {
        const int32_t bad[] = {-1, p.d.kv.n_pages, p.d.kv.n_pages + 1, INT32_MIN};
        twin_clear(&x.t);
        job_make(&j, &x.t.d, &h);
        dev_write((int32_t *)(uintptr_t)j.g.tables.page_table + j.g.tables.page_table_stride + 2,
                  &bad[i], 4);
        DEV(cudaDeviceSynchronize());
        CHECK_EQ(job_upload(&j, &x.t.d), ATTN_OK);
        CHECK_EQ(job_run(&j, &x.t.d), ATTN_OK);
        dev_sync();
        CHECK_EQ(dev_error(), ATTN_ERR_PAGE);
        twin_output(&x.t, y.o, y.lse);
        others_same(&p, &base, &y, 1, "a bad page");
        CHECK(!same_rows(&p, &base, p.d.q_start[1], &y, p.d.q_start[1], 1));
        job_free(&j);
    }
    dev_release(0);
    offload_free(&x);
    result_free(&base), result_free(&y);
    problem_free(&p);
}

static void part_errors_cache(uint64_t seed, uint64_t count) {
    problem_opts o;
    problem p;
    offload x;
    test_rng r;
    attn_kv_cache kc;
    attn_desc d;
    twin t;
    how h;
    job j;
    int i;
    (void)count;
    r.state = seed;
    memset(&h, 0, sizeof h);
    bad_slots(ATTN_BF16), bad_slots(ATTN_F32);
    bad_pages(ATTN_BF16), bad_pages(ATTN_F32);
    plain_opts(&o, ATTN_F16, DECODE, M_CAUSAL);
    problem_make(&p, &o, &r);
    twin_make(&t, &p, 1, NULL);
    offload_make(&x, &t, 4, ATTN_CACHE_LRU);
    for (i = 0; i < 4; i++) { // loads that lead outside
        const attn_cache_load bad[] = {{-1, 0}, {p.d.kv.n_pages, 0}, {0, -1}, {0, x.kc.n_slots}};
        CHECK_EQ(attn_cuda_cache_load(&cu, &x.t.d, &bad[i], 1, dev_stream), ATTN_ERR_PAGE);
    }
    CHECK_EQ(attn_cuda_cache_load(&cu, &x.t.d, NULL, 1, dev_stream), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_cache_load(&cu, &x.t.d, x.loads, -1, dev_stream), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_cache_load(&cu, &t.d, x.loads, 1, dev_stream), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_cache_load(&cu, &x.t.d, NULL, 0, dev_stream), ATTN_OK);
    d = x.t.d;
    d.kv.cache = &kc;
    for (i = 0; i < 5; i++) {
        kc = x.kc;
        if (i == 0) kc.k = NULL;
        if (i == 1) kc.v = NULL;
        if (i == 2) kc.slot = NULL;
        if (i == 3) kc.n_slots = 0;
        if (i == 4) kc.v = kc.k; // K and V do not alias
        CHECK_EQ(attn_validate(&d), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_cuda_cache_load(&cu, &d, x.loads, 0, dev_stream), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_cuda_store(&cu, &d, NULL, NULL, NULL, NULL, 0, 0, dev_stream),
                 ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_cuda_copy_pages(&cu, &d, NULL, 0, dev_stream), ATTN_ERR_ARGUMENT);
    }
    job_make(&j, &t.d, &h); // an image laid out without a cache
    CHECK_EQ(job_upload(&j, &x.t.d), ATTN_ERR_STALE);
    CHECK_EQ(job_upload(&j, &t.d), ATTN_OK);
    CHECK_EQ(job_run(&j, &x.t.d), ATTN_ERR_STALE);
    job_free(&j);
    job_make(&j, &x.t.d, &h); // one with a cache does for both
    CHECK_EQ(job_upload(&j, &t.d), ATTN_OK);
    CHECK_EQ(job_run(&j, &t.d), ATTN_OK);
    CHECK_EQ(job_run(&j, &x.t.d), ATTN_OK);
    kc = x.kc;
    kc.slot = NULL;
    CHECK_EQ(job_run(&j, &d), ATTN_ERR_ARGUMENT);
    dev_sync();
    CHECK_EQ(dev_error(), 0);
    job_free(&j);
    dev_release(0);
    offload_free(&x);
    problem_free(&p);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*part)(uint64_t seed, uint64_t count);
    } parts[] = {{"run", part_run}, {"reads", part_reads}, {"select", part_select},
                 {"errors", part_errors_cache}};
    uint64_t seed = test_arg(argc, argv, 1, 1), count = test_arg(argc, argv, 2, 40);
    int i, status = dev_open();
    if (status) return status;
    for (i = 0; i < (int)(sizeof parts / sizeof parts[0]); i++) {
        const double start = seconds();
        const long long failed = test_failed;
        if (argc > 3 && strcmp(argv[3], parts[i].name) != 0) continue;
        parts[i].part(seed, count);
        printf("%s: %s, %.1f s\n", parts[i].name, test_failed > failed ? "failed" : "passed",
               seconds() - start);
        fflush(stdout);
    }
    return TEST_END();
}

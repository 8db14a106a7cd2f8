/* device.h - for tests that run on a CUDA device: buffers with guard zones that are filled with
   0xff, and the twin of a problem whose q, o, lse, pages and logit arrays lie in device memory.
   C, with the CUDA runtime's C interface: the kernels are in another object (impl.cu). With
   TEST_CUDA_BARE=1 in the environment nothing is filled and there are no guards, so that
   compute-sanitizer sees reads of unwritten memory and the real ends of buffers. */
#ifndef DEVICE_H
#define DEVICE_H

#include "problem.h"
#include "attn_cuda.cuh"
#include <cuda_runtime_api.h>

enum { GUARD = 256, DEV_MAX = 512 };

static attn_cuda cu;
static cudaStream_t dev_stream; // not ordered with the default one: what strays there is noticed
static int dev_bare;

static void dev_ok(cudaError_t e, const char *file, int line) {
    if (e == cudaSuccess) return;
    printf("%s:%d: CUDA: %s\n", file, line, cudaGetErrorString(e));
    CHECK(e == cudaSuccess);
    printf("%lld passed, %lld failed\n", test_passed, test_failed);
    exit(1); // nothing works after a fault
}
#define DEV(call) dev_ok(call, __FILE__, __LINE__)

// ---- buffers

typedef struct dev_buffer {
    uint8_t *base;
    size_t bytes;
    int host; // page-locked
} dev_buffer;

static dev_buffer dev_list[DEV_MAX];
static int dev_n;

// bytes of device (or page-locked host) memory between guards, 256-byte aligned: a copy of src, or
// 0xff where src is NULL.
static void *dev_new(size_t bytes, const void *src, int host) {
    dev_buffer *b = &dev_list[dev_n++];
    size_t pad = dev_bare ? 0 : GUARD;
    if (dev_n > DEV_MAX) abort();
    b->bytes = bytes;
    b->host = host;
    if (host)
        DEV(cudaMallocHost((void **)&b->base, bytes + 2 * pad + 1));
    else
        DEV(cudaMalloc((void **)&b->base, bytes + 2 * pad + 1));
    if (host && !dev_bare)
        memset(b->base, 0x5a, bytes + 2 * pad);
    else if (!dev_bare)
        DEV(cudaMemset(b->base, 0x5a, bytes + 2 * pad));
    if (host && !dev_bare)
        memset(b->base + pad, 0xff, bytes);
    else if (src)
        DEV(cudaMemcpy(b->base + pad, src, bytes, cudaMemcpyHostToDevice));
    else if (!dev_bare)
        DEV(cudaMemset(b->base + pad, 0xff, bytes));
    return b->base + pad;
}

static void *dev_alloc(size_t bytes, const void *src) {
    return dev_new(bytes, src, 0);
}

static void dev_fill(void *p, int byte, size_t bytes) {
    DEV(cudaMemset(p, byte, bytes));
}

static void dev_read(void *dst, const void *src, size_t bytes) {
    DEV(cudaMemcpy(dst, src, bytes, cudaMemcpyDeviceToHost));
}

static void dev_write(void *dst, const void *src, size_t bytes) {
    DEV(cudaMemcpy(dst, src, bytes, cudaMemcpyHostToDevice));
}

// 1 when every guard of the buffers from mark on is as it was.
static int dev_guards(int mark) {
    uint8_t g[2 * GUARD];
    int i, ok = 1;
    size_t e;
    for (i = mark; i < dev_n && !dev_bare; i++) {
        const dev_buffer *b = &dev_list[i];
        dev_read(g, b->base, GUARD);
        dev_read(g + GUARD, b->base + GUARD + b->bytes, GUARD);
        for (e = 0; e < sizeof g && g[e] == 0x5a; e++) {
        }
        if (e < sizeof g)
            printf("  buffer %d of %lld bytes: written at %lld\n", i, (long long)b->bytes,
                   e < GUARD ? (long long)e - GUARD : (long long)(b->bytes + e) - GUARD);
        ok &= e == sizeof g;
    }
    return ok;
}

static void dev_release(int mark) {
    while (dev_n > mark) {
        dev_n--;
        DEV(dev_list[dev_n].host ? cudaFreeHost(dev_list[dev_n].base)
                                 : cudaFree(dev_list[dev_n].base));
    }
}

static void dev_sync(void) {
    DEV(cudaStreamSynchronize(dev_stream));
    DEV(cudaGetLastError());
}

static int32_t dev_error(void) { // what kernels reported since; cleared
    int32_t e;
    dev_read(&e, cu.error, 4);
    dev_fill(cu.error, 0, 4);
    return e;
}

// 0: there is a device; else the exit status.
static int dev_open(void) {
    int n = 0;
    attn_result r;
    const char *bare = getenv("TEST_CUDA_BARE");
    dev_bare = bare && *bare == '1';
    if (cudaGetDeviceCount(&n) != cudaSuccess || n < 1) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    r = attn_cuda_open(&cu, 0);
    if (!CHECK_EQ(r, ATTN_OK)) return 1;
    DEV(cudaStreamCreateWithFlags(&dev_stream, cudaStreamNonBlocking));
    DEV(cudaMalloc((void **)&cu.error, 4));
    dev_fill(cu.error, 0, 4);
    printf("device: code for sm_%d, %d multiprocessors, %d bytes of shared memory\n", cu.arch,
           cu.n_sm, cu.smem_bytes);
    return 0;
}

// ---- the device's twin of a problem

typedef struct twin {
    const problem *p;
    attn_desc d;     // as p->d, with device pointers
    uint8_t *o_base; // O with everything around its rows
    size_t o_bytes, page_bytes[2], need_bytes[2];
    int64_t o_first; // element of O's first
} twin;

static size_t element_bytes(attn_dtype t) {
    return (size_t)attni_bits_of(t) / 8;
}

// A view of rows spread out by random gaps, or dense where r is NULL; data: the first element.
static void twin_view(attn_tensor *x, int64_t n_tokens, int64_t heads, int64_t dim, const void *src,
                      test_rng *r, uint8_t **base, size_t *bytes, int64_t *first) {
    size_t e = element_bytes(x->dtype);
    int64_t sh = dim, st, at = 0, t, h;
    uint8_t *m;
    if (r && test_below(r, 2)) sh += test_below(r, 2) ? 8 : 1 + test_below(r, 5);
    st = heads * sh;
    if (r && test_below(r, 2)) st += test_below(r, 2) ? 64 : test_below(r, 9);
    if (r) at = test_below(r, 2) ? 8 : test_below(r, 4);
    *bytes = (size_t)(at + (n_tokens > 0 ? n_tokens * st : 1)) * e;
    *first = at;
    m = (uint8_t *)malloc(*bytes);
    memset(m, 0xff, *bytes);
    for (t = 0; t < n_tokens && src; t++)
        for (h = 0; h < heads; h++)
            memcpy(m + (size_t)(at + t * st + h * sh) * e,
                   (const uint8_t *)src + (size_t)((t * heads + h) * dim) * e, (size_t)dim * e);
    *base = (uint8_t *)dev_alloc(*bytes, m);
    free(m);
    x->data = *base + (size_t)at * e;
    x->stride_token = r ? st : 0;
    x->stride_head = r ? sh : 0;
}

static const float *twin_floats(const float *x, int32_t n) {
    return x ? (const float *)dev_alloc(4 * (size_t)n, x) : NULL;
}

// with_pages: K and V as the host holds them, else poison, to be stored into. r: gaps between rows
// of Q and O and between pages, now and then; NULL: none.
static void twin_make(twin *t, const problem *p, int with_pages, test_rng *r) {
    attn_desc *d = &t->d;
    uint8_t *base, *m;
    size_t bytes, i, n = (size_t)p->d.kv.n_pages;
    int64_t first;
    int v;
    memset(t, 0, sizeof *t);
    t->p = p;
    *d = p->d;
    twin_view(&d->q, p->n_tokens, d->n_heads, d->head_dim, p->d.q.data,
              r && test_below(r, 4) == 0 ? r : NULL, &base, &bytes, &first);
    twin_view(&d->o, p->n_tokens, d->n_heads, d->v_head_dim, NULL,
              r && test_below(r, 4) == 0 ? r : NULL, &t->o_base, &t->o_bytes, &t->o_first);
    if (d->lse) d->lse = (float *)dev_alloc(4 * (size_t)p->n_tokens * (size_t)d->n_heads, NULL);
    d->logits.alibi = twin_floats(d->logits.alibi, d->n_heads);
    d->logits.sink = twin_floats(d->logits.sink, d->n_heads);
    if (d->logits.bias.data) {
        int64_t planes = d->logits.bias.stride_head ? d->n_heads : 1;
        bytes = (size_t)(planes * p->n_tokens * d->logits.bias.stride_token) *
                element_bytes(d->logits.bias.dtype);
        d->logits.bias.data = dev_alloc(bytes, p->d.logits.bias.data);
    }
    for (v = 0; v < 2; v++) {
        attn_kv_array *a = v ? &d->kv.v : &d->kv.k;
        const attn_kv_array *h = v ? &p->d.kv.v : &p->d.kv.k;
        size_t need = attn_kv_page_bytes(&p->d, v), gap = 0;
        t->need_bytes[v] = t->page_bytes[v] = need;
        a->head_scale = twin_floats(a->head_scale, d->n_kv_heads);
        if (v && p->opt.alias) {
            t->page_bytes[1] = t->page_bytes[0];
            t->d.kv.v = t->d.kv.k;
            break;
        }
        if (r && test_below(r, 6) == 0) gap = 16 * (size_t)(1 + test_below(r, 40)), need += gap;
        if (gap && need % 4) need += 4 - need % 4;
        t->page_bytes[v] = need;
        m = (uint8_t *)malloc(n * need);
        memset(m, 0xff, n * need);
        for (i = 0; i < n && with_pages; i++)
            memcpy(m + i * need, (const uint8_t *)h->data + i * t->need_bytes[v], t->need_bytes[v]);
        a->data = dev_alloc(n * need, m);
        a->page_bytes = gap ? (int64_t)need : 0;
        free(m);
    }
}

// 1 when K and V on the device are the host's, byte for byte, and the gaps are poison.
static int twin_pages_equal(const twin *t) {
    size_t i, e, n = (size_t)t->d.kv.n_pages;
    int v, ok = 1;
    for (v = 0; v < 2; v++) {
        const uint8_t *h = (const uint8_t *)(v ? t->p->d.kv.v.data : t->p->d.kv.k.data);
        uint8_t *m = (uint8_t *)malloc(n * t->page_bytes[v]);
        dev_read(m, v ? t->d.kv.v.data : t->d.kv.k.data, n * t->page_bytes[v]);
        for (i = 0; i < n && ok; i++)
            for (e = 0; e < t->page_bytes[v] && ok; e++) {
                int want = e < t->need_bytes[v] ? h[i * t->need_bytes[v] + e] : 0xff;
                if (m[i * t->page_bytes[v] + e] == want) continue;
                printf("  %s page %d byte %d of %d: %02x, not %02x\n", v ? "V" : "K", (int)i,
                       (int)e, (int)t->page_bytes[v], m[i * t->page_bytes[v] + e], want);
                ok = 0;
            }
        free(m);
        if (t->p->opt.alias) break;
    }
    return ok;
}

// O as it lies dense, in O's dtype; 0 when a gap between its rows was written.
static int twin_output(const twin *t, uint8_t *o, float *lse) {
    const attn_desc *d = &t->d;
    size_t e = element_bytes(d->o.dtype), row = (size_t)d->v_head_dim * e, i;
    int64_t sh = d->o.stride_head ? d->o.stride_head : d->v_head_dim, tok, h;
    int64_t st = d->o.stride_token ? d->o.stride_token : d->n_heads * sh;
    uint8_t *m = (uint8_t *)malloc(t->o_bytes);
    int ok = 1;
    dev_read(m, t->o_base, t->o_bytes);
    for (tok = 0; tok < t->p->n_tokens; tok++)
        for (h = 0; h < d->n_heads; h++) {
            uint8_t *x = m + (size_t)(t->o_first + tok * st + h * sh) * e;
            memcpy(o + (size_t)(tok * d->n_heads + h) * row, x, row);
            memset(x, 0xff, row);
        }
    for (i = 0; i < t->o_bytes; i++) ok &= m[i] == 0xff;
    free(m);
    if (lse && d->lse) dev_read(lse, d->lse, 4 * (size_t)(t->p->n_tokens * d->n_heads));
    return ok;
}

// Clears what a run writes.
static void twin_clear(const twin *t) {
    dev_fill(t->o_base, 0xff, t->o_bytes);
    if (t->d.lse) dev_fill(t->d.lse, 0xff, 4 * (size_t)(t->p->n_tokens * t->d.n_heads));
}

// ---- a plan on the device

typedef struct how { // zero: the defaults
    int32_t share, workers, row_tile;
    int partials;      // 0: all that the parameters allow, 1: what the plan needs, 2: little, 3: 0
    int max;           // capacities beyond the problem's
    int device_tables; // 1: the page table in device memory, 2: the block list
    float max_task_cost, tasks_per_worker;
} how;

typedef struct job {
    attn_plan_params params;
    attn_plan *plan;
    void *mem, *image, *staging, *partials;
    size_t bytes, partial_bytes;
    attn_cuda_plan g;
} job;

static void job_tables(job *j, const attn_desc *d) {
    attn_cuda_tables *t = &j->g.tables;
    if (!d->kv.page_table) return;
    t->page_table_stride = d->kv.page_table_stride;
    t->page_table = (const int32_t *)dev_alloc(4 * (size_t)(d->n_seq * d->kv.page_table_stride),
                                               d->kv.page_table);
}

// The block list of d, if there is one, in device memory.
static void list_on_device(attn_desc *d) {
    attn_block_list *b = &d->mask.blocks;
    int64_t n = 0, l, row, offsets = (int64_t)b->n_lists * (b->n_rows + 1);
    if (!b->row_start || b->device_entries) return;
    for (l = 0; l < b->n_lists; l++)
        for (row = 0; row < b->n_rows; row++) n = attni_max64(n, attni_row_end(b, l, row));
    b->row_start = (const int64_t *)dev_alloc(8 * (size_t)offsets, b->row_start);
    if (b->row_end) b->row_end = (const int64_t *)dev_alloc(8 * (size_t)offsets, b->row_end);
    b->block = (const int32_t *)dev_alloc(4 * (size_t)n, n ? b->block : NULL);
    if (b->bits)
        b->bits = (const uint64_t *)dev_alloc(
            8 * (size_t)n * (size_t)((b->bits_rows * b->bits_cols + 63) / 64), n ? b->bits : NULL);
    b->device_entries = n ? n : 1;
}

static void job_make(job *j, const attn_desc *d, const how *h) {
    size_t n, room;
    attn_result r;
    memset(j, 0, sizeof *j);
    memset(&j->g, 0xff, sizeof j->g);
    memset(&j->params, 0xff, sizeof j->params);
    attn_cuda_plan_params(&cu, d, &j->params);
    room = j->params.partial_bytes;
    if (h->tasks_per_worker > 0) j->params.tasks_per_worker = h->tasks_per_worker;
    if (h->share) j->params.share = h->share;
    if (h->workers) j->params.workers = h->workers;
    if (h->row_tile) j->params.row_tile = h->row_tile;
    if (h->max_task_cost > 0) j->params.max_task_cost = h->max_task_cost;
    if (h->partials == 2) j->params.partial_bytes = 40000;
    if (h->partials == 3) j->params.partial_bytes = 0;
    if (h->max) {
        int32_t s, most = 0;
        for (s = 0; s < d->n_seq; s++)
            most = attni_max32(most, (d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0) + d->kv.kv_len[s]);
        j->params.max_seq = d->n_seq + 3;
        j->params.max_tokens = d->q_start[d->n_seq] + 40;
        j->params.max_kv_len = most + 700;
    }
    for (;;) {
        n = attn_plan_bytes(d, &j->params);
        CHECK(n > 0);
        j->mem = aligned_alloc(64, (n + 127) & ~(size_t)63);
        memset(j->mem, 0xff, n);
        r = attn_plan_build(d, &j->params, j->mem, n, &j->plan);
        // there may be too little room for what rules and a bound on costs cut
        if (r != ATTN_ERR_BUFFER || (h->partials < 2 && !(j->params.max_task_cost > 0))) break;
        if (j->params.max_task_cost <= 0 && j->params.partial_bytes == room) break;
        j->params.max_task_cost = 0;
        j->params.partial_bytes = room;
        free(j->mem);
    }
    if (!CHECK_EQ(r, ATTN_OK)) return;
    j->bytes = attn_cuda_plan_bytes(&cu, d, &j->params);
    CHECK(j->bytes > 0);
    j->image = dev_alloc(j->bytes, NULL);
    j->staging = dev_new(j->bytes, NULL, 1);
    n = attn_plan_partial_bytes(j->plan);
    CHECK(n <= j->params.partial_bytes);
    j->partial_bytes = h->partials == 1 ? n : j->params.partial_bytes;
    if (j->partial_bytes) j->partials = dev_alloc(j->partial_bytes, NULL);
    CHECK_EQ(attn_cuda_plan_init(&cu, d, &j->params, j->image, j->bytes, &j->g), ATTN_OK);
    CHECK(!j->g.tables.page_table);
    if (h->device_tables & 1) job_tables(j, d);
}

static attn_result job_upload(job *j, const attn_desc *d) {
    return attn_cuda_upload(&cu, d, j->plan, &j->g, j->staging, j->bytes, dev_stream);
}

static attn_result job_run(job *j, const attn_desc *d) {
    return attn_cuda_run(&cu, d, &j->g, j->partials, j->partial_bytes, dev_stream);
}

static void job_free(job *j) {
    free(j->mem);
}

// A whole run of a twin: O (dense, O's dtype) and LSE on the host. 1 when nothing went wrong.
static int twin_run(const twin *t, const how *h, uint8_t *o, float *lse) {
    int mark = dev_n, ok;
    attn_desc d = t->d;
    job j;
    twin_clear(t);
    if (h->device_tables & 2) list_on_device(&d);
    job_make(&j, &d, h);
    DEV(cudaDeviceSynchronize()); // the fills were on another stream
    ok = j.plan && CHECK_EQ(job_upload(&j, &d), ATTN_OK) && CHECK_EQ(job_run(&j, &d), ATTN_OK);
    dev_sync();
    ok &= CHECK_EQ(dev_error(), 0);
    ok &= CHECK(twin_output(t, o, lse));
    ok &= CHECK(dev_guards(0));
    dev_release(mark);
    job_free(&j);
    return ok;
}

#endif // DEVICE_H

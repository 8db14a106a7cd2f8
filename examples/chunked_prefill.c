/* cc -O2 -I. examples/chunked_prefill.c -o chunked_prefill -lm
 *
 * Prefill of one prompt over paged KV, by hand: store, plan, run, merge. A chunk is a problem whose
 * queries are the last tokens held, so prefill at once, in chunks of any size and decode are the
 * same calls; and the same bits, whatever the chunk and the page size. */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 8, KV_HEADS = 2, DIM = 64, LEN = 700 };

static float q[LEN * HEADS * DIM], k[LEN * KV_HEADS * DIM], v[LEN * KV_HEADS * DIM];

static void need(attn_result r) {
    if (r == ATTN_OK) return;
    fprintf(stderr, "attn: %s\n", attn_result_string(r));
    exit(2);
}

/* Buffers of the library start at multiples of 64 bytes. *raw is what to free. */
static void *buffer(size_t bytes, void **raw) {
    *raw = malloc(bytes + 64);
    if (!*raw) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return (char *)*raw + (64 - (uintptr_t)*raw % 64);
}

/* out (LEN, HEADS, DIM) from chunks of chunk tokens, over int8 pages of page_tokens. */
static void prefill(float *out, int chunk, int page_tokens) {
    int n_pages = (LEN + page_tokens - 1) / page_tokens;
    void *raw[6];
    int32_t *table = buffer((size_t)n_pages * sizeof *table, &raw[0]);
    int32_t q_start[2] = {0, 0}, kv_len = 0, max_len = LEN;
    attn_plan_params params;
    attn_plan *plan;
    attn_desc d;

    /* Any pages in any order: here from the back. The tree hands them out in an engine. */
    for (int j = 0; j < n_pages; j++) table[j] = n_pages - 1 - j;
    memset(&d, 0, sizeof d);
    d.n_seq = 1;
    d.n_heads = HEADS;
    d.n_kv_heads = KV_HEADS;
    d.head_dim = DIM;
    d.q_start = q_start;
    d.q.dtype = d.o.dtype = ATTN_F32;
    d.kv.k.dtype = d.kv.v.dtype = ATTN_I8;
    d.kv.layout = ATTN_HEAD_MAJOR;
    d.kv.page_tokens = page_tokens;
    d.kv.n_pages = n_pages;
    d.kv.page_table = table;
    d.kv.page_table_stride = n_pages;
    d.kv.kv_len = &kv_len;
    d.kv.k.data = buffer(attn_kv_page_bytes(&d, 0) * (size_t)n_pages, &raw[1]);
    d.kv.v.data = buffer(attn_kv_page_bytes(&d, 1) * (size_t)n_pages, &raw[2]);

    /* The plan is sized for the largest chunk at the full length, then updated chunk by chunk. */
    d.q.data = q;
    d.o.data = out;
    q_start[1] = chunk;
    kv_len = max_len;
    attn_cpu_plan_params(&d, 1, &params);
    params.max_tokens = chunk;
    params.max_kv_len = max_len;
    size_t bytes = attn_plan_bytes(&d, &params);
    need(attn_plan_build(&d, &params, buffer(bytes, &raw[3]), bytes, &plan));
    void *scratch = buffer(attn_cpu_scratch_bytes(&d, plan), &raw[4]);
    void *partials = buffer(params.partial_bytes, &raw[5]);

    for (int at = 0; at < LEN; at += chunk) {
        int n = at + chunk < LEN ? chunk : LEN - at;
        attn_tensor new_k = {k + at * KV_HEADS * DIM, ATTN_F32, 0, 0};
        attn_tensor new_v = {v + at * KV_HEADS * DIM, ATTN_F32, 0, 0};
        q_start[1] = n;
        kv_len = at + n; /* queries are the last n of these */
        d.q.data = q + at * HEADS * DIM;
        d.o.data = out + at * HEADS * DIM;
        need(attn_cpu_store(&d, &new_k, &new_v, NULL, 0, n));
        need(attn_plan_update(plan, &d, NULL));
        /* Tasks are independent: any threads may take them, each with its own scratch. */
        for (int32_t i = 0; i < plan->n_tasks; i++)
            need(attn_cpu_run(&d, plan, i, 1, partials, scratch));
        /* ... a barrier here ... */
        for (int32_t i = 0; i < plan->n_merges; i++)
            need(attn_cpu_merge(&d, plan, i, 1, partials));
    }
    for (int i = 0; i < 6; i++) free(raw[i]);
}

int main(void) {
    static const int chunks[] = {LEN, 512, 64, 7, 1}, pages[] = {64, 16, 1, 256, 1000};
    static float at_once[LEN * HEADS * DIM], out[LEN * HEADS * DIM];
    uint32_t state = 1;
    int wrong = 0;
    float *const rows[] = {q, k, v};
    const int sizes[] = {LEN * HEADS * DIM, LEN * KV_HEADS * DIM, LEN * KV_HEADS * DIM};
    for (int r = 0; r < 3; r++) {
        for (int i = 0; i < sizes[r]; i++) {
            state = state * 1664525u + 1013904223u;
            rows[r][i] = (float)(state >> 8) / 8388608.0f - 1.0f;
        }
    }
    prefill(at_once, LEN, 32);
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
        memset(out, 0xff, sizeof out);
        prefill(out, chunks[c], pages[c]);
        int same = memcmp(out, at_once, sizeof out) == 0;
        printf("chunks of %3d, pages of %4d: %s\n", chunks[c], pages[c],
               same ? "the same bits as at once" : "DIFFERENT");
        wrong += !same;
    }
    return wrong != 0;
}

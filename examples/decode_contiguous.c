/* cc -O2 -I. examples/decode_contiguous.c -o decode_contiguous -lm
 *
 * Decode on contiguous KV, as an engine with its own caches and its own attention does it: each
 * layer keeps (max_len, n_kv_heads, head_dim) keys and values, a step appends one token and
 * attends. attend_attn() computes what the engine's attend_naive() does, and both are compared. */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 2, HEADS = 8, KV_HEADS = 2, DIM = 64, MAX_LEN = 300, STEPS = 300 };

typedef struct cache {
    float k[MAX_LEN * KV_HEADS * DIM], v[MAX_LEN * KV_HEADS * DIM];
} cache;

/* What the engine has: out and q (HEADS, DIM), len tokens in the cache, the new one included. */
static void attend_naive(float *out, const float *q, const cache *c, int len) {
    static float p[MAX_LEN];
    for (int h = 0; h < HEADS; h++) {
        int g = h / (HEADS / KV_HEADS);
        float max = -INFINITY, sum = 0;
        for (int t = 0; t < len; t++) {
            p[t] = 0;
            for (int i = 0; i < DIM; i++)
                p[t] += q[h * DIM + i] * c->k[(t * KV_HEADS + g) * DIM + i];
            p[t] /= sqrtf((float)DIM);
            max = fmaxf(max, p[t]);
        }
        for (int t = 0; t < len; t++) sum += p[t] = expf(p[t] - max);
        for (int i = 0; i < DIM; i++) {
            float o = 0;
            for (int t = 0; t < len; t++) o += p[t] * c->v[(t * KV_HEADS + g) * DIM + i];
            out[h * DIM + i] = o / sum;
        }
    }
}

/* The same from the headers. A cache is one long page, so there is no page table; len is the only
 * thing that changes from step to step, and the plan is the same for all layers of one. */
typedef struct attention {
    attn_desc d;
    attn_plan *plan;
    void *partials, *scratch;
    int32_t len, q_start[2];
} attention;

/* The library wants buffers at multiples of 64 bytes, and never asks for more after this. */
static void *buffer(size_t bytes) {
    char *p = malloc(bytes + 64);
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return p + (64 - (uintptr_t)p % 64);
}

static void need(attn_result r) {
    if (r == ATTN_OK) return;
    fprintf(stderr, "attn: %s\n", attn_result_string(r));
    exit(2);
}

static void attention_open(attention *a, float *out, float *q, cache *c) {
    static const attention zero;
    attn_plan_params params;
    *a = zero;
    a->q_start[1] = 1; /* one new token */
    a->len = MAX_LEN;  /* size the buffers for the longest problem */
    a->d.n_seq = 1;
    a->d.q_start = a->q_start;
    a->d.n_heads = HEADS;
    a->d.n_kv_heads = KV_HEADS;
    a->d.head_dim = DIM;
    a->d.q.data = q;
    a->d.o.data = out;
    a->d.kv.k.data = c->k;
    a->d.kv.v.data = c->v;
    a->d.q.dtype = a->d.o.dtype = a->d.kv.k.dtype = a->d.kv.v.dtype = ATTN_F32;
    a->d.kv.n_pages = 1;
    a->d.kv.page_tokens = MAX_LEN;
    a->d.kv.kv_len = &a->len;
    attn_cpu_plan_params(&a->d, 1, &params);
    params.max_kv_len = MAX_LEN;
    size_t bytes = attn_plan_bytes(&a->d, &params);
    need(attn_plan_build(&a->d, &params, buffer(bytes), bytes, &a->plan));
    a->scratch = buffer(attn_cpu_scratch_bytes(&a->d, a->plan));
    a->partials = buffer(params.partial_bytes);
}

static void attention_step(attention *a, int len) { /* once a step */
    a->len = len;
    need(attn_plan_update(a->plan, &a->d, NULL));
}

static void attend_attn(attention *a, cache *c) { /* every layer */
    a->d.kv.k.data = c->k;
    a->d.kv.v.data = c->v;
    need(attn_cpu_run(&a->d, a->plan, 0, a->plan->n_tasks, a->partials, a->scratch));
    need(attn_cpu_merge(&a->d, a->plan, 0, a->plan->n_merges, a->partials));
}

static float noise(void) { /* the model: rows of a linear congruential generator */
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

int main(void) {
    static cache caches[LAYERS];
    static float q[HEADS * DIM], out[HEADS * DIM], expected[HEADS * DIM];
    static attention a;
    double worst = 0;
    attention_open(&a, out, q, &caches[0]);
    for (int pos = 0; pos < STEPS; pos++) {
        attention_step(&a, pos + 1);
        for (int l = 0; l < LAYERS; l++) {
            for (int i = 0; i < HEADS * DIM; i++) q[i] = 3 * noise();
            for (int i = 0; i < KV_HEADS * DIM; i++) {
                caches[l].k[pos * KV_HEADS * DIM + i] = noise();
                caches[l].v[pos * KV_HEADS * DIM + i] = noise();
            }
            attend_naive(expected, q, &caches[l], pos + 1);
            attend_attn(&a, &caches[l]);
            for (int i = 0; i < HEADS * DIM; i++) {
                double e = fabs((double)out[i] - (double)expected[i]);
                if (!(e <= worst)) worst = e; /* a NaN must not pass */
            }
        }
    }
    printf("%d steps of %d layers on %s: largest difference from the naive loop %.1e\n", STEPS,
           LAYERS, attn_cpu_executor(&a.d), worst);
    return worst < 1e-5 ? 0 : 1;
}

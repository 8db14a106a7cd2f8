/* cc -O2 -I. examples/naive_llama_attn.c -o naive_llama_attn -lm
 *
 * The inference loop everybody writes first: a llama-architecture model, one token at a time, plain
 * loops over one float cache. naive_llama_attn.c is the same program with attn's headers taken in;
 * `diff` of the two is the whole change. The weights are random, so the tokens mean nothing. */
#define ATTN_IMPLEMENTATION
#include "attn_cpu.h"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_LAYERS = 3,
    N_HEADS = 8,
    N_KV_HEADS = 2,
    HEAD_DIM = 32,
    DIM = N_HEADS * HEAD_DIM,
    KV_DIM = N_KV_HEADS * HEAD_DIM,
    HIDDEN = 512,
    VOCAB = 320,
    MAX_LEN = 400
};

typedef struct layer {
    float attn_norm[DIM], ffn_norm[DIM];
    float wq[DIM * DIM], wk[KV_DIM * DIM], wv[KV_DIM * DIM], wo[DIM * DIM];
    float w_gate[HIDDEN * DIM], w_up[HIDDEN * DIM], w_down[DIM * HIDDEN];
} layer;

typedef struct model {
    float embed[VOCAB * DIM], norm[DIM], head[VOCAB * DIM];
    layer layers[N_LAYERS];
} model;

typedef struct state {
    float x[DIM], xn[DIM], q[DIM], att[DIM], tmp[DIM], gate[HIDDEN], up[HIDDEN], logits[VOCAB];
    float k_cache[N_LAYERS][MAX_LEN * KV_DIM], v_cache[N_LAYERS][MAX_LEN * KV_DIM];
} state;

/* ---- weights: seeded, so that every build of either program has the same model */

static uint64_t rng = 42;

static void random_fill(float *w, int n, float scale) {
    for (int i = 0; i < n; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        w[i] = ((float)(rng >> 40) / 8388608.0f - 1.0f) * scale;
    }
}

static void random_model(model *m) {
    const float s = 1.7f / sqrtf((float)DIM);
    random_fill(m->embed, VOCAB * DIM, 1.0f);
    random_fill(m->head, VOCAB * DIM, 3 * s);
    for (int i = 0; i < DIM; i++) m->norm[i] = 1.0f;
    for (int l = 0; l < N_LAYERS; l++) {
        layer *w = &m->layers[l];
        for (int i = 0; i < DIM; i++) w->attn_norm[i] = w->ffn_norm[i] = 1.0f;
        random_fill(w->wq, DIM * DIM, 2 * s); /* sharp scores: tokens depend on the attention */
        random_fill(w->wk, KV_DIM * DIM, 2 * s);
        random_fill(w->wv, KV_DIM * DIM, 2 * s);
        random_fill(w->wo, DIM * DIM, 2 * s);
        random_fill(w->w_gate, HIDDEN * DIM, s);
        random_fill(w->w_up, HIDDEN * DIM, s);
        random_fill(w->w_down, DIM * HIDDEN, s);
    }
}

/* ---- the pieces */

static void rms_norm(float *out, const float *x, const float *weight) {
    float sum = 0;
    for (int i = 0; i < DIM; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / DIM + 1e-5f);
    for (int i = 0; i < DIM; i++) out[i] = x[i] * scale * weight[i];
}

/* out (rows) = w (rows, cols) x (cols) */
static void mat_vec(float *out, const float *w, const float *x, int rows, int cols) {
    for (int r = 0; r < rows; r++) {
        float sum = 0;
        for (int c = 0; c < cols; c++) sum += w[r * cols + c] * x[c];
        out[r] = sum;
    }
}

static void rope(float *v, int n_heads, int pos) {
    for (int h = 0; h < n_heads; h++) {
        for (int i = 0; i < HEAD_DIM; i += 2) {
            float angle = (float)pos * powf(10000.0f, -(float)i / HEAD_DIM);
            float c = cosf(angle), s = sinf(angle), *p = v + h * HEAD_DIM + i;
            float a = p[0], b = p[1];
            p[0] = a * c - b * s;
            p[1] = a * s + b * c;
        }
    }
}

/* out (N_HEADS, HEAD_DIM) from q of the same shape and a layer's cache up to position pos */
static void attention(state *s, int l, int pos) {
    static char mem[4 << 20] __attribute__((aligned(64))); /* attn_cpu_forward_bytes: less */
    int32_t q_start[2] = {0, 1}, kv_len = pos + 1;
    attn_desc d = {.n_seq = 1, .q_start = q_start, .n_heads = N_HEADS, .n_kv_heads = N_KV_HEADS,
                   .head_dim = HEAD_DIM, .q = {s->q, ATTN_F32, 0, 0}, .o = {s->att, ATTN_F32, 0, 0},
                   .kv = {.k = {.data = s->k_cache[l], .dtype = ATTN_F32},
                          .v = {.data = s->v_cache[l], .dtype = ATTN_F32},
                          .n_pages = 1, .page_tokens = MAX_LEN, .kv_len = &kv_len}};
    attn_result r = attn_cpu_forward(&d, mem, sizeof mem, 1);
    if (r != ATTN_OK) exit(fprintf(stderr, "%s\n", attn_result_string(r)));
}

static void add(float *x, const float *y) {
    for (int i = 0; i < DIM; i++) x[i] += y[i];
}

/* logits of the token after `token`, which stands at pos */
static void forward(const model *m, state *s, int token, int pos) {
    memcpy(s->x, m->embed + token * DIM, sizeof s->x);
    for (int l = 0; l < N_LAYERS; l++) {
        const layer *w = &m->layers[l];
        float *k = s->k_cache[l] + pos * KV_DIM, *v = s->v_cache[l] + pos * KV_DIM;
        rms_norm(s->xn, s->x, w->attn_norm);
        mat_vec(s->q, w->wq, s->xn, DIM, DIM);
        mat_vec(k, w->wk, s->xn, KV_DIM, DIM);
        mat_vec(v, w->wv, s->xn, KV_DIM, DIM);
        rope(s->q, N_HEADS, pos);
        rope(k, N_KV_HEADS, pos);
        attention(s, l, pos);
        mat_vec(s->tmp, w->wo, s->att, DIM, DIM);
        add(s->x, s->tmp);
        rms_norm(s->xn, s->x, w->ffn_norm);
        mat_vec(s->gate, w->w_gate, s->xn, HIDDEN, DIM);
        mat_vec(s->up, w->w_up, s->xn, HIDDEN, DIM);
        for (int i = 0; i < HIDDEN; i++) s->gate[i] *= s->up[i] / (1.0f + expf(-s->gate[i]));
        mat_vec(s->tmp, w->w_down, s->gate, DIM, HIDDEN);
        add(s->x, s->tmp);
    }
    rms_norm(s->xn, s->x, m->norm);
    mat_vec(s->logits, m->head, s->xn, VOCAB, DIM);
}

int main(int argc, char **argv) {
    static model m;
    static state s;
    int n = argc > 1 ? atoi(argv[1]) : 300, token = 1;
    if (n < 1 || n > MAX_LEN) {
        fprintf(stderr, "usage: %s [tokens, 1 to %d]\n", argv[0], MAX_LEN);
        return 2;
    }
    random_model(&m);
    for (int pos = 0; pos < n; pos++) {
        forward(&m, &s, token, pos);
        token = 0;
        for (int i = 1; i < VOCAB; i++)
            if (s.logits[i] > s.logits[token]) token = i;
        printf("%d%c", token, pos % 16 == 15 || pos == n - 1 ? '\n' : ' ');
    }
    return 0;
}

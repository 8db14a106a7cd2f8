/* test_llama_cuda.c - the layers of examples/llama_cuda.cu against those of llama.h, on models of
   made-up geometries. Attention is left out: both sides are given the same rows for it.
   nvcc -I. -Itests -Iexamples tests/cuda/test_llama_cuda.c examples/llama_cuda.cu -lcublas
   test_llama_cuda [SEED] */
#define LLAMA_IMPLEMENTATION
#include "llama.h"
#include "llama_cuda.h"
#define ATTN_CORE_IMPLEMENTATION /* llama_cuda.cu has the CUDA backend in it */
#include "attn.h"
#include "test.h"

enum { CAP = 70, LAYERS = 2 };

typedef struct geometry {
    int32_t d_model, n_heads, n_kv_heads, head_dim, v_head_dim, rope_dim, d_ff, n_vocab;
    int type, tied, biases;
} geometry;

static float *random_row(test_rng *r, int64_t n, double middle, double width) {
    float *p = (float *)malloc((size_t)n * sizeof *p);
    if (!p) exit(3);
    test_fill_uniform(r, p, (size_t)n, middle - width, middle + width);
    return p;
}

/* Outputs stay of the size of the inputs. F32, or Q8_0: a half as scale, then 32 bytes. */
static llama_weight matrix(test_rng *r, int type, int64_t n_in, int64_t n_out) {
    llama_weight w = {NULL, type, n_in, n_out, 0, NULL};
    if (type == LLAMA_F32) {
        w.row_bytes = (size_t)n_in * 4;
        w.data = (uint8_t *)random_row(r, n_in * n_out, 0, sqrt(3.0 / (double)n_in));
        return w;
    }
    w.row_bytes = (size_t)n_in / 32 * 34;
    uint8_t *p = (uint8_t *)malloc(w.row_bytes * (size_t)n_out);
    if (!p) exit(3);
    for (size_t i = 0; i < w.row_bytes * (size_t)n_out; i++) {
        p[i] = (uint8_t)test_u64(r);
        if (i % 34 == 1) p[i] = (uint8_t)(0x10 + test_below(r, 4)); /* 2^-11 to 2^-10 */
    }
    w.data = p;
    return w;
}

static void fill_layer(test_rng *r, const geometry *g, llama_layer *l) {
    int64_t q = (int64_t)g->n_heads * g->head_dim, k = (int64_t)g->n_kv_heads * g->head_dim;
    int64_t v = (int64_t)g->n_kv_heads * g->v_head_dim, a = (int64_t)g->n_heads * g->v_head_dim;
    l->attn_norm = random_row(r, g->d_model, 1, 0.5);
    l->ffn_norm = random_row(r, g->d_model, 1, 0.5);
    if (g->biases) {
        l->bq = random_row(r, q, 0, 1);
        l->bk = random_row(r, k, 0, 1);
        l->bv = random_row(r, v, 0, 1);
        l->bo = random_row(r, g->d_model, 0, 1);
    }
    l->wq = matrix(r, g->type, g->d_model, q);
    l->wk = matrix(r, g->type, g->d_model, k);
    l->wv = matrix(r, g->type, g->d_model, v);
    l->wo = matrix(r, g->type, a, g->d_model);
    l->gate = matrix(r, g->type, g->d_model, g->d_ff);
    l->up = matrix(r, g->type, g->d_model, g->d_ff);
    l->down = matrix(r, g->type, g->d_ff, g->d_model);
}

static void free_layer(llama_layer *l) {
    const llama_weight *w[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down};
    float *f[] = {l->attn_norm, l->ffn_norm, l->bq, l->bk, l->bv, l->bo};
    for (int i = 0; i < 7; i++) free((void *)(uintptr_t)w[i]->data);
    for (int i = 0; i < 6; i++) free(f[i]);
}

/* The device's rows are the host's but for f32 rounding, which the layers pass on. */
static void same(llama_cuda *c, const float *device, const float *host, int64_t n, const char *what,
                 int layer) {
    char err[LLAMA_ERR_BYTES];
    float *got = (float *)malloc((size_t)n * sizeof *got);
    double wrong = 0, sum = 0;
    if (!got) exit(3);
    if (!CHECK(llama_cuda_download(c, got, device, (size_t)n * sizeof *got, err) == 0))
        printf("    %s\n", err);
    for (int64_t i = 0; i < n; i++) {
        double x = (double)got[i] - (double)host[i];
        wrong += x * x;
        sum += (double)host[i] * (double)host[i];
    }
    if (!CHECK(sqrt(wrong / sum) < 1e-5))
        printf("    %s, layer %d: relative error %.1e\n", what, layer, sqrt(wrong / sum));
    free(got);
}

static void run_layers(test_rng *r, const llama_model *m, llama_pool *pool, llama_state *s,
                       llama_cuda *c, int32_t n) {
    char err[LLAMA_ERR_BYTES] = "";
    int32_t ids[CAP], pos[CAP], rows[3];
    size_t att = (size_t)n * (size_t)(m->n_heads * m->v_head_dim);
    float *host = random_row(r, 3 * m->n_vocab, 0, 1);
    float *device = random_row(r, 3 * m->n_vocab, 0, 1);
    double seconds = -1;
    for (int32_t i = 0; i < n; i++) {
        ids[i] = test_below(r, m->n_vocab);
        pos[i] = test_below(r, 100000);
    }
    for (int i = 0; i < 3; i++) rows[i] = test_below(r, n);
    llama_embed(m, pool, s, ids, pos, n);
    CHECK_EQ(llama_cuda_embed(c, ids, pos, n, err), 0);
    for (int l = 0; l < LAYERS; l++) {
        llama_qkv(m, pool, s, l);
        CHECK_EQ(llama_cuda_qkv(c, l, err), 0);
        CHECK_EQ(llama_cuda_mark(c, l, 1, err), 0);
        same(c, c->q, s->q, (int64_t)n * m->n_heads * m->head_dim, "q", l);
        same(c, c->k, s->k, (int64_t)n * m->n_kv_heads * m->head_dim, "k", l);
        same(c, c->v, s->v, (int64_t)n * m->n_kv_heads * m->v_head_dim, "v", l);
        test_fill_uniform(r, s->att, att, -1, 1);
        CHECK_EQ(llama_cuda_upload(c, c->att, s->att, att * sizeof(float), err), 0);
        CHECK_EQ(llama_cuda_mark(c, l, 3, err), 0);
        llama_out(m, pool, s, l);
        CHECK_EQ(llama_cuda_out(c, l, err), 0);
    }
    llama_logits(m, pool, s, rows, 3, host);
    CHECK_EQ(llama_cuda_logits(c, rows, 3, device, err), 0);
    CHECK_EQ(llama_cuda_seconds(c, 1, 3, &seconds, err), 0);
    CHECK(seconds > 0 && seconds < 100);
    double wrong = 0, sum = 0;
    for (int64_t i = 0; i < 3 * m->n_vocab; i++) {
        wrong += ((double)device[i] - (double)host[i]) * ((double)device[i] - (double)host[i]);
        sum += (double)host[i] * (double)host[i];
    }
    if (!CHECK(sqrt(wrong / sum) < 1e-5))
        printf("    logits: relative error %.1e %s\n", sqrt(wrong / sum), err);
    free(host);
    free(device);
}

static void test_geometry(test_rng *r, const geometry *g) {
    static const int32_t sizes[] = {CAP, 1, 33, 2};
    llama_layer layers[LAYERS];
    double freq[64];
    char err[LLAMA_ERR_BYTES];
    llama_pool *pool = llama_pool_create(2);
    llama_model m;
    llama_cuda c;
    memset(&m, 0, sizeof m);
    memset(layers, 0, sizeof layers);
    m.n_layers = LAYERS;
    m.d_model = g->d_model;
    m.n_heads = g->n_heads;
    m.n_kv_heads = g->n_kv_heads;
    m.head_dim = g->head_dim;
    m.v_head_dim = g->v_head_dim;
    m.rope_dim = g->rope_dim;
    m.d_ff = g->d_ff;
    m.n_vocab = g->n_vocab;
    m.rms_eps = 1e-5;
    for (int32_t i = 0; i < g->rope_dim / 2; i++) freq[i] = pow(10000, -2.0 * i / g->rope_dim);
    m.rope_freq = freq;
    m.out_norm = random_row(r, g->d_model, 1, 0.5);
    m.embed = matrix(r, g->type, g->d_model, g->n_vocab);
    m.output = g->tied ? m.embed : matrix(r, g->type, g->d_model, g->n_vocab);
    m.layers = layers;
    for (int i = 0; i < LAYERS; i++) fill_layer(r, g, &layers[i]);
    llama_state *s = llama_state_create(&m, CAP);
    if (!pool || !s) exit(3);
    if (CHECK(llama_cuda_open(&c, &m, pool, CAP, 3, err) == 0)) {
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            run_layers(r, &m, pool, s, &c, sizes[i]);
        llama_cuda_close(&c);
    } else {
        printf("    %s\n", err);
    }
    for (int i = 0; i < LAYERS; i++) free_layer(&layers[i]);
    if (!g->tied) free((void *)(uintptr_t)m.output.data);
    free((void *)(uintptr_t)m.embed.data);
    free(m.out_norm);
    llama_state_free(s);
    llama_pool_free(pool);
}

int main(int argc, char **argv) {
    static const geometry all[] = {
        {256, 4, 2, 64, 64, 64, 704, 300, LLAMA_F32, 1, 0},
        {72, 6, 2, 24, 16, 16, 100, 50, LLAMA_F32, 0, 1},
        {128, 2, 2, 32, 32, 0, 96, 33, LLAMA_Q8_0, 1, 1},
        {1024, 8, 1, 128, 128, 128, 2816, 1000, LLAMA_Q8_0, 0, 0}};
    test_rng r = {argc > 1 ? strtoull(argv[1], NULL, 10) : 1};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) test_geometry(&r, &all[i]);
    return TEST_END();
}

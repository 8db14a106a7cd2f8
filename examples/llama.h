/* llama.h - just enough of a llama-architecture model for examples/generate.c: GGUF files,
 * tokenizers, and every layer piece except attention, which is what attn.h is for.
 *
 * Do this in ONE C file, before the first system header:
 *     #define LLAMA_IMPLEMENTATION
 *     #include "llama.h"
 * Build with -O3 -march=native -ffp-contract=fast -pthread -lm (all but -pthread -lm optional).
 *
 *     char err[LLAMA_ERR_BYTES];
 *     llama_pool *pool = llama_pool_create(2);
 *     llama_model *m = llama_load("model.gguf", pool, 0, err);
 *     llama_state *s = llama_state_create(m, 512);
 *     llama_embed(m, pool, s, ids, pos, n);                  // s->x (n, d_model)
 *     for (int l = 0; l < m->n_layers; l++) {
 *         llama_qkv(m, pool, s, l);                          // s->q, s->k, s->v, rope applied
 *         ... store s->k, s->v; attend s->q over the cache; write s->att ...
 *         llama_out(m, pool, s, l);                          // wo, residual, feed-forward
 *     }
 *     llama_logits(m, pool, s, rows, n_rows, logits);        // (n_rows, n_vocab)
 *
 * Memory: a model maps its file and owns what it allocates; a state owns one batch of buffers.
 * Threads: a pool starts n - 1 threads; calls that take a pool are made by one thread at a time.
 * Errors: NULL or -1 and a sentence in err; a broken file never crashes the reader.
 * Numerics: f32; an output element is one multiply-add chain over the inputs in order, so a
 *   token's result depends neither on its batch nor on the number of threads, and a weight kept
 *   packed gives the bits of the same weight converted at load. LLAMA_USE_CBLAS gives this up.
 * Limits: GGUF v2 and v3, little-endian; architecture llama without experts; weights F32, F16,
 *   BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K; vocabularies SPM ("llama") and byte-level BPE ("gpt2",
 *   pre-tokenizers gpt-2, default (= gpt-2), llama-bpe, qwen2, smollm); gcc or clang, pthreads.
 * Licence: MIT, see LICENSE. */
#ifndef LLAMA_H
#define LLAMA_H

#if defined(LLAMA_IMPLEMENTATION) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_ERR_BYTES 256

/* GGUF tensor types that can be read. */
enum {
    LLAMA_F32 = 0, LLAMA_F16 = 1, LLAMA_Q4_0 = 2, LLAMA_Q8_0 = 8,
    LLAMA_Q4_K = 12, LLAMA_Q5_K = 13, LLAMA_Q6_K = 14, LLAMA_BF16 = 30
};

typedef struct llama_pool llama_pool;
typedef struct llama_vocab llama_vocab;
typedef struct llama_gguf llama_gguf;

/* A matrix (n_out, n_in), row-major and packed as in the file; data == NULL: absent. */
typedef struct llama_weight {
    const uint8_t *data;
    int32_t type;
    int64_t n_in, n_out;
    size_t row_bytes;
    float *f32; /* converted at load: panels of LLAMA_NR rows, inputs outermost; or NULL */
} llama_weight;

typedef struct llama_layer {
    float *attn_norm, *ffn_norm;    /* (d_model) */
    float *bq, *bk, *bv, *bo;       /* biases or NULL */
    llama_weight wq, wk, wv, wo;    /* (n_heads * head_dim, d_model) ... (d_model, n_heads * vd) */
    llama_weight gate, up, down;    /* (d_ff, d_model) twice, (d_model, d_ff) */
} llama_layer;

typedef struct llama_model {
    int32_t n_layers, d_model, n_heads, n_kv_heads, head_dim, v_head_dim, d_ff, n_vocab, n_ctx;
    int32_t rope_dim;               /* first dims of a head that rotate, in pairs (2i, 2i + 1) */
    double rms_eps;
    double *rope_freq;              /* (rope_dim / 2) radians per position */
    float *out_norm;                /* (d_model) */
    llama_weight embed, output;     /* (n_vocab, d_model); output may be embed (tied) */
    llama_layer *layers;
    llama_vocab *vocab;
    llama_gguf *gguf;
    void *arena;                    /* converted weights */
    int64_t n_params;
    size_t weight_bytes;            /* of the matrices, as held in memory for the matmuls */
} llama_model;

/* One batch of at most cap tokens; every array is (cap, width). */
typedef struct llama_state {
    int32_t cap, n;
    float *x, *xn;                  /* d_model: residual stream, normed copy */
    float *q, *k, *v, *att;         /* heads * dim of each */
    float *gate, *up;               /* d_ff */
    float *rope;                    /* rope_dim: cos and sin of each pair */
    void *memory;
} llama_state;

/* ---- threads ---- */
typedef void (*llama_task)(void *ctx, int64_t task, int32_t thread);
llama_pool *llama_pool_create(int32_t n_threads);   /* NULL: out of memory or no threads */
void llama_pool_free(llama_pool *pool);             /* NULL is allowed */
int32_t llama_pool_threads(const llama_pool *pool); /* NULL counts as one */
/* Calls fn for tasks 0..n_tasks-1, each once, and returns when all are done; thread is
 * 0..n_threads-1. pool NULL: in the calling thread. */
void llama_pool_run(llama_pool *pool, llama_task fn, void *ctx, int64_t n_tasks);

/* ---- model ---- */
/* Weights are converted to f32 when that takes at most f32_bytes (0 = 1 GiB), else they stay
 * packed and are unpacked block by block in each matmul. err holds LLAMA_ERR_BYTES. */
llama_model *llama_load(const char *path, llama_pool *pool, size_t f32_bytes, char *err);
void llama_free(llama_model *m);
/* One row of a weight as f32, n_in values: what the file format defines, to the bit. */
void llama_weight_row(const llama_weight *w, int64_t row, float *out);
/* A numeric or boolean metadata value, or fallback. */
double llama_meta_number(const llama_model *m, const char *key, double fallback);

/* ---- layers ---- */
llama_state *llama_state_create(const llama_model *m, int32_t cap);
void llama_state_free(llama_state *s);
void llama_embed(const llama_model *m, llama_pool *pool, llama_state *s, const int32_t *ids,
                 const int32_t *pos, int32_t n);
void llama_qkv(const llama_model *m, llama_pool *pool, llama_state *s, int32_t layer);
void llama_out(const llama_model *m, llama_pool *pool, llama_state *s, int32_t layer);
void llama_logits(const llama_model *m, llama_pool *pool, llama_state *s, const int32_t *rows,
                  int32_t n_rows, float *logits); /* overwrites s->xn */
/* y (n, n_out) = x (n, n_in) times the transposed weight; the building block of the above. */
void llama_matmul(llama_pool *pool, const llama_weight *w, const float *x, int32_t n, float *y);

/* ---- layers in slices ----
 * An operation is a number of short tasks, fn(&op->ctx, 0 .. n_tasks-1, thread), that any threads
 * run in any order, now or in a later frame; the next operation starts when all of them are done.
 * llama_embed ... llama_logits are these operations run at once, so the bits are the same. What
 * they point to (state, ids, pos, rows, logits) must stay until they are done. */
enum { LLAMA_MAX_OPS = 5, LLAMA_MAX_JOBS = 3 };

typedef struct llama_job { /* private: y = x W^T, + bias, or y += that */
    const llama_weight *w;
    const float *bias;     /* or NULL */
    float *y;              /* (n, n_out) */
    int add;
} llama_job;

typedef struct llama_gemm { /* private: jobs that read the same x */
    llama_job job[LLAMA_MAX_JOBS];
    int64_t first[LLAMA_MAX_JOBS + 1]; /* first panel of each job */
    int n_jobs;
    int32_t n, block;       /* tokens, tokens per task */
    const float *x;         /* (n, n_in) */
} llama_gemm;

typedef struct llama_pass { /* private: element-wise over tokens */
    const llama_model *m;
    llama_state *s;
    const float *weight;    /* of a norm */
    const int32_t *ids, *pos;
    const float *x;         /* norm: input rows */
    const int32_t *rows;    /* norm: which of them, NULL for all */
    int32_t n;
} llama_pass;

typedef struct llama_op {
    llama_task fn;
    int64_t n_tasks;
    double cost;            /* of one task at most: multiply-adds; elements, where there are none */
    union {
        llama_gemm gemm;
        llama_pass pass;
    } ctx;
} llama_op;

/* Each writes up to LLAMA_MAX_OPS operations and returns how many. */
int llama_embed_ops(const llama_model *m, llama_state *s, const int32_t *ids, const int32_t *pos,
                    int32_t n, llama_op *ops);
int llama_qkv_ops(const llama_model *m, llama_state *s, int32_t layer, llama_op *ops);
int llama_out_ops(const llama_model *m, llama_state *s, int32_t layer, llama_op *ops);
int llama_logits_ops(const llama_model *m, llama_state *s, const int32_t *rows, int32_t n_rows,
                     float *logits, llama_op *ops);

/* ---- text ---- */
enum {
    LLAMA_ADD_BOS = 1,     /* put the begin token first if the vocabulary asks for it */
    LLAMA_PARSE_SPECIAL = 2 /* control tokens written out in the text become those tokens */
};
/* Token ids of n_bytes of text, to be released with free(); NULL when out of memory or when the
 * text is over 256 MiB. */
int32_t *llama_tokenize(const llama_model *m, const char *text, size_t n_bytes, int flags,
                        size_t *n_ids);
/* Bytes of a token's text; writes at most cap of them. Control tokens are empty. */
size_t llama_piece(const llama_model *m, int32_t id, char *out, size_t cap);
int32_t llama_bos(const llama_model *m);            /* -1: none */
int llama_is_end(const llama_model *m, int32_t id); /* end of text or of turn */

/* temp <= 0: the largest logit, lowest id on ties. top_k 0 and top_p >= 1: no cut. */
typedef struct llama_sampler {
    float temp, top_p;
    int32_t top_k;
    uint64_t rng;
} llama_sampler;
int32_t llama_sample(llama_sampler *s, const float *logits, int32_t n); /* -1: out of memory */

#ifdef __cplusplus
}
#endif
#endif /* LLAMA_H */

/* ======== Stop here if you only want the API. ======== */
#ifdef LLAMA_IMPLEMENTATION
#ifndef LLAMA_IMPLEMENTED
#define LLAMA_IMPLEMENTED

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifndef LLAMA_MMAP
#define LLAMA_MMAP 1 /* define it as 0 to read files instead of mapping them */
#endif
#else
#undef LLAMA_MMAP
#define LLAMA_MMAP 0
#endif
#ifdef LLAMA_USE_CBLAS
#include <cblas.h>
#endif

__attribute__((format(printf, 2, 3))) static int llama_fail(char *err, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err, LLAMA_ERR_BYTES, fmt, ap);
    va_end(ap);
    return -1;
}

/* ==== threads ==== */

struct llama_pool {
    int32_t n_threads, n_started;
    pthread_t *threads;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    llama_task fn;
    void *ctx;
    int64_t n_tasks;
    int64_t next;     /* atomic: the next task to claim */
    uint32_t epoch;   /* atomic: changes when a run starts or the pool stops */
    int32_t running;  /* atomic: workers that have not left the current run */
    int32_t sleeping; /* workers inside pthread_cond_wait, under mutex */
    int stop;
};

typedef struct llama_worker {
    llama_pool *pool;
    int32_t thread;
} llama_worker;

static void llama_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void llama_claim(llama_pool *p, int32_t thread) {
    for (;;) {
        int64_t t = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
        if (t >= p->n_tasks) return;
        p->fn(p->ctx, t, thread);
    }
}

/* Layers follow each other within microseconds, so a worker spins that long before it sleeps. */
#define LLAMA_SPINS 4000

static void *llama_worker_main(void *arg) {
    llama_worker w = *(llama_worker *)arg;
    llama_pool *p = w.pool;
    uint32_t seen = 0;
    free(arg);
    for (;;) {
        int spins = 0;
        while (__atomic_load_n(&p->epoch, __ATOMIC_ACQUIRE) == seen && spins++ < LLAMA_SPINS)
            llama_relax();
        if (__atomic_load_n(&p->epoch, __ATOMIC_ACQUIRE) == seen) {
            pthread_mutex_lock(&p->mutex);
            p->sleeping++;
            while (__atomic_load_n(&p->epoch, __ATOMIC_ACQUIRE) == seen)
                pthread_cond_wait(&p->wake, &p->mutex);
            p->sleeping--;
            pthread_mutex_unlock(&p->mutex);
        }
        seen++; /* every worker takes part in every run, so epochs are seen one by one */
        if (p->stop) return NULL;
        llama_claim(p, w.thread);
        if (__atomic_sub_fetch(&p->running, 1, __ATOMIC_ACQ_REL) == 0) {
            pthread_mutex_lock(&p->mutex);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->mutex);
        }
    }
}

static void llama_pool_start(llama_pool *p) {
    pthread_mutex_lock(&p->mutex);
    __atomic_add_fetch(&p->epoch, 1, __ATOMIC_RELEASE);
    if (p->sleeping) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

llama_pool *llama_pool_create(int32_t n_threads) {
    if (n_threads < 1 || n_threads > 1024) return NULL;
    llama_pool *p = (llama_pool *)calloc(1, sizeof *p);
    if (!p) return NULL;
    p->n_threads = n_threads;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->threads = (pthread_t *)calloc((size_t)n_threads, sizeof *p->threads);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, (size_t)2 << 20); /* tasks keep tiles on the stack */
    for (int32_t i = 1; p->threads && i < n_threads; i++) {
        llama_worker *w = (llama_worker *)malloc(sizeof *w);
        if (!w) break;
        w->pool = p;
        w->thread = i;
        if (pthread_create(&p->threads[i - 1], &attr, llama_worker_main, w)) {
            free(w);
            break;
        }
        p->n_started++;
    }
    pthread_attr_destroy(&attr);
    if (!p->threads || p->n_started != n_threads - 1) {
        llama_pool_free(p);
        return NULL;
    }
    return p;
}

void llama_pool_free(llama_pool *p) {
    if (!p) return;
    p->stop = 1;
    llama_pool_start(p);
    for (int32_t i = 0; i < p->n_started; i++) pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    pthread_mutex_destroy(&p->mutex);
    free(p->threads);
    free(p);
}

int32_t llama_pool_threads(const llama_pool *p) { return p ? p->n_threads : 1; }

void llama_pool_run(llama_pool *p, llama_task fn, void *ctx, int64_t n_tasks) {
    if (!p || p->n_threads == 1 || n_tasks <= 1) {
        for (int64_t t = 0; t < n_tasks; t++) fn(ctx, t, 0);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->n_tasks = n_tasks;
    p->running = p->n_threads - 1;
    p->next = 0;
    llama_pool_start(p);
    llama_claim(p, 0);
    for (int s = 0; __atomic_load_n(&p->running, __ATOMIC_ACQUIRE) && s < LLAMA_SPINS; s++)
        llama_relax();
    if (__atomic_load_n(&p->running, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&p->mutex);
        while (__atomic_load_n(&p->running, __ATOMIC_ACQUIRE))
            pthread_cond_wait(&p->done, &p->mutex);
        pthread_mutex_unlock(&p->mutex);
    }
}

/* ==== GGUF ====
 * magic, version, n_tensors, n_kv; key-value pairs; tensor infos; padding; tensor data.
 * Everything below trusts no count: each read is bounded by the file's end. */

enum { /* value types */
    LLAMA_U8, LLAMA_I8, LLAMA_U16, LLAMA_I16, LLAMA_U32, LLAMA_I32, LLAMA_FLOAT, LLAMA_BOOL,
    LLAMA_STR, LLAMA_ARR, LLAMA_U64, LLAMA_I64, LLAMA_DOUBLE, LLAMA_N_VALUE_TYPES
};

typedef struct llama_str {
    const char *s;
    size_t n;
} llama_str;

typedef struct llama_kv {
    llama_str key;
    int32_t type, elem;  /* elem: of an array */
    uint64_t count;      /* of an array */
    size_t at;           /* file offset of the value, of the first element for an array */
} llama_kv;

typedef struct llama_tensor {
    llama_str name;
    uint64_t dims[4], offset;
    uint32_t n_dims, type;
} llama_tensor;

struct llama_gguf {
    const uint8_t *bytes;
    size_t n_bytes, data; /* data: where tensor offsets count from */
    int mapped;
    llama_kv *kv;
    llama_tensor *tensors;
    size_t n_kv, n_tensors;
};

typedef struct llama_reader {
    const uint8_t *p;
    size_t n, at;
    int bad; /* sticky: a read ran past the end */
} llama_reader;

static int llama_mul(size_t a, size_t b, size_t *out) {
    if (b && a > SIZE_MAX / b) return -1;
    *out = a * b;
    return 0;
}

static uint16_t llama_le16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t llama_le32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t llama_le64(const uint8_t *p) {
    return (uint64_t)llama_le32(p) | (uint64_t)llama_le32(p + 4) << 32;
}

static const uint8_t *llama_take(llama_reader *r, size_t n) {
    if (r->bad || n > r->n - r->at) {
        r->bad = 1;
        return NULL;
    }
    r->at += n;
    return r->p + r->at - n;
}
static uint32_t llama_take32(llama_reader *r) {
    const uint8_t *p = llama_take(r, 4);
    return p ? llama_le32(p) : 0;
}
static uint64_t llama_take64(llama_reader *r) {
    const uint8_t *p = llama_take(r, 8);
    return p ? llama_le64(p) : 0;
}
static llama_str llama_take_str(llama_reader *r) {
    llama_str s = {"", 0};
    uint64_t n = llama_take64(r);
    const uint8_t *p = n <= SIZE_MAX ? llama_take(r, (size_t)n) : NULL;
    if (!p) r->bad = 1;
    if (p) s.s = (const char *)p, s.n = (size_t)n;
    return s;
}

static size_t llama_value_bytes(int32_t type) {
    static const uint8_t bytes[LLAMA_N_VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return bytes[type];
}

/* Steps over one value; arrays of strings are walked once here so that later walks are safe.
 * Arrays of arrays do not occur in model files and are refused. */
static void llama_take_value(llama_reader *r, llama_kv *kv) {
    if ((uint32_t)kv->type >= LLAMA_N_VALUE_TYPES) {
        r->bad = 1;
        return;
    }
    kv->at = r->at;
    if (kv->type == LLAMA_STR) {
        llama_take_str(r);
    } else if (kv->type == LLAMA_ARR) {
        size_t bytes = 0;
        kv->elem = (int32_t)llama_take32(r);
        kv->count = llama_take64(r);
        kv->at = r->at;
        if ((uint32_t)kv->elem >= LLAMA_N_VALUE_TYPES || kv->elem == LLAMA_ARR ||
            kv->count > r->n) {
            r->bad = 1;
        } else if (kv->elem == LLAMA_STR) {
            for (uint64_t i = 0; i < kv->count && !r->bad; i++) llama_take_str(r);
        } else if (llama_mul((size_t)kv->count, llama_value_bytes(kv->elem), &bytes)) {
            r->bad = 1;
        } else {
            llama_take(r, bytes);
        }
    } else {
        llama_take(r, llama_value_bytes(kv->type));
    }
}

static int llama_str_is(llama_str s, const char *z) {
    return s.n == strlen(z) && memcmp(s.s, z, s.n) == 0;
}

static const llama_kv *llama_find(const llama_gguf *g, const char *key) {
    for (size_t i = 0; i < g->n_kv; i++)
        if (llama_str_is(g->kv[i].key, key)) return &g->kv[i];
    return NULL;
}

/* 0 and *out, or -1 when the value is not a number. */
static int llama_number(const llama_gguf *g, const llama_kv *kv, double *out) {
    const uint8_t *p = g->bytes + kv->at;
    uint32_t u32;
    uint64_t u64;
    float f;
    switch (kv->type) {
    case LLAMA_U8: *out = *p; return 0;
    case LLAMA_BOOL: *out = *p != 0; return 0;
    case LLAMA_I8: *out = (int8_t)*p; return 0;
    case LLAMA_U16: *out = llama_le16(p); return 0;
    case LLAMA_I16: *out = (int16_t)llama_le16(p); return 0;
    case LLAMA_U32: *out = llama_le32(p); return 0;
    case LLAMA_I32: *out = (int32_t)llama_le32(p); return 0;
    case LLAMA_U64: *out = (double)llama_le64(p); return 0;
    case LLAMA_I64: *out = (double)(int64_t)llama_le64(p); return 0;
    case LLAMA_FLOAT:
        u32 = llama_le32(p);
        memcpy(&f, &u32, 4);
        *out = (double)f;
        return 0;
    case LLAMA_DOUBLE:
        u64 = llama_le64(p);
        memcpy(out, &u64, 8);
        return 0;
    default: return -1;
    }
}

double llama_meta_number(const llama_model *m, const char *key, double fallback) {
    const llama_kv *kv = llama_find(m->gguf, key);
    double v;
    return kv && !llama_number(m->gguf, kv, &v) ? v : fallback;
}

static llama_str llama_meta_str(const llama_gguf *g, const char *key) {
    llama_str none = {"", 0};
    const llama_kv *kv = llama_find(g, key);
    if (!kv || kv->type != LLAMA_STR) return none;
    llama_reader r = {g->bytes, g->n_bytes, kv->at, 0};
    return llama_take_str(&r);
}

/* An integer in [lo, hi]; a missing key gives fallback, or an error when fallback < lo. */
static int llama_meta_int(const llama_gguf *g, const char *key, int32_t fallback, int32_t lo,
                          int32_t hi, int32_t *out, char *err) {
    const llama_kv *kv = llama_find(g, key);
    double v = fallback;
    if (!kv && fallback < lo) return llama_fail(err, "missing key %s", key);
    if (kv && llama_number(g, kv, &v)) return llama_fail(err, "key %s is not a number", key);
    if (!(v >= lo && v <= hi) || v != floor(v))
        return llama_fail(err, "key %s: %g is outside %d..%d", key, v, (int)lo, (int)hi);
    *out = (int32_t)v;
    return 0;
}

static void llama_gguf_close(llama_gguf *g) {
    if (!g) return;
#if LLAMA_MMAP
    if (g->mapped) munmap((void *)(uintptr_t)g->bytes, g->n_bytes);
#endif
    if (!g->mapped) free((void *)(uintptr_t)g->bytes);
    free(g->kv);
    free(g->tensors);
    free(g);
}

static int llama_read_whole(llama_gguf *g, const char *path, char *err) {
#if LLAMA_MMAP
    struct stat st;
    int fd = open(path, O_RDONLY);
    if (fd < 0) return llama_fail(err, "cannot open the file");
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size <= 0 ||
        (uint64_t)st.st_size > SIZE_MAX / 2) {
        close(fd);
        return llama_fail(err, "not a regular file with something in it");
    }
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (p == MAP_FAILED) return llama_fail(err, "cannot map the file into memory");
    g->bytes = (const uint8_t *)p;
    g->n_bytes = (size_t)st.st_size;
    g->mapped = 1;
#else
    FILE *f = fopen(path, "rb");
    long n = f && !fseek(f, 0, SEEK_END) ? ftell(f) : -1;
    uint8_t *p = n > 0 ? (uint8_t *)malloc((size_t)n) : NULL;
    if (p && (fseek(f, 0, SEEK_SET) || fread(p, 1, (size_t)n, f) != (size_t)n)) free(p), p = NULL;
    if (f) fclose(f);
    if (!p) return llama_fail(err, "cannot read the file");
    g->bytes = p;
    g->n_bytes = (size_t)n;
#endif
    return 0;
}

static int llama_take_tensors(llama_gguf *g, llama_reader *r, char *err) {
    for (size_t i = 0; i < g->n_tensors; i++) {
        llama_tensor *t = &g->tensors[i];
        t->name = llama_take_str(r);
        t->n_dims = llama_take32(r);
        if (r->bad || t->n_dims < 1 || t->n_dims > 4)
            return llama_fail(err, "tensor %zu: bad header", i);
        for (uint32_t d = 0; d < 4; d++) t->dims[d] = d < t->n_dims ? llama_take64(r) : 1;
        t->type = llama_take32(r);
        t->offset = llama_take64(r);
    }
    return r->bad ? llama_fail(err, "file ends inside the tensor table") : 0;
}

static int llama_gguf_parse(llama_gguf *g, char *err) {
    llama_reader r = {g->bytes, g->n_bytes, 0, 0};
    const uint8_t *magic = llama_take(&r, 4);
    uint32_t version = llama_take32(&r);
    uint64_t n_tensors = llama_take64(&r), n_kv = llama_take64(&r);
    int32_t align;
    if (!magic || memcmp(magic, "GGUF", 4)) return llama_fail(err, "not a GGUF file");
    if (version == 0x02000000u || version == 0x03000000u)
        return llama_fail(err, "big-endian GGUF files are not supported");
    if (version != 2 && version != 3)
        return llama_fail(err, "GGUF version %u is not supported (2 and 3 are)",
                          (unsigned)version);
    /* the smallest pair takes 13 bytes and the smallest tensor info 32 */
    if (r.bad || n_kv > (r.n - r.at) / 13 || n_tensors > (r.n - r.at) / 32)
        return llama_fail(err, "more keys or tensors declared than the file can hold");
    g->kv = (llama_kv *)calloc((size_t)n_kv + 1, sizeof *g->kv);
    g->tensors = (llama_tensor *)calloc((size_t)n_tensors + 1, sizeof *g->tensors);
    if (!g->kv || !g->tensors) return llama_fail(err, "out of memory");
    for (g->n_kv = 0; g->n_kv < (size_t)n_kv; g->n_kv++) {
        llama_kv *kv = &g->kv[g->n_kv];
        kv->key = llama_take_str(&r);
        kv->type = (int32_t)llama_take32(&r);
        if (!r.bad) llama_take_value(&r, kv);
        if (r.bad) return llama_fail(err, "broken metadata at key %zu", g->n_kv);
    }
    g->n_tensors = (size_t)n_tensors;
    if (llama_take_tensors(g, &r, err)) return -1;
    if (llama_meta_int(g, "general.alignment", 32, 1, 1 << 20, &align, err)) return -1;
    size_t pad = ((size_t)align - r.at % (size_t)align) % (size_t)align;
    if (pad > r.n - r.at) return llama_fail(err, "file ends before the tensor data");
    g->data = r.at + pad;
    return 0;
}

/* ==== weight formats ==== */

/* Elements and bytes of one block; 0 when the type cannot be read. */
static size_t llama_block(uint32_t type, size_t *bytes) {
    switch (type) {
    case LLAMA_F32: *bytes = 4; return 1;
    case LLAMA_F16: case LLAMA_BF16: *bytes = 2; return 1;
    case LLAMA_Q4_0: *bytes = 18; return 32;
    case LLAMA_Q8_0: *bytes = 34; return 32;
    case LLAMA_Q4_K: *bytes = 144; return 256;
    case LLAMA_Q5_K: *bytes = 176; return 256;
    case LLAMA_Q6_K: *bytes = 210; return 256;
    default: *bytes = 0; return 0;
    }
}

static float llama_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* Exact for every half including subnormals: shift the fields into place, rescale the exponent
 * by a multiplication, then repair Inf and NaN. No branches, so loops over it vectorise. */
static float llama_half(uint16_t h) {
    uint32_t mag = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float f = llama_bits(mag) * 0x1p112f;
    uint32_t u;
    memcpy(&u, &f, 4);
    u |= mag >= 0x0f800000u ? 0x7f800000u : 0u;
    return llama_bits(u | sign);
}

/* Widest vector that fits the registers, and a tile of LLAMA_MR x LLAMA_NR accumulators. */
#if defined(__AVX512F__)
#define LLAMA_VEC 16
#define LLAMA_NV 4
#define LLAMA_MR 6
#elif defined(__AVX__)
#define LLAMA_VEC 8
#define LLAMA_NV 2
#define LLAMA_MR 6
#elif defined(__aarch64__)
#define LLAMA_VEC 4
#define LLAMA_NV 4
#define LLAMA_MR 6
#else
#define LLAMA_VEC 4
#define LLAMA_NV 2
#define LLAMA_MR 5
#endif
#define LLAMA_NR (LLAMA_VEC * LLAMA_NV)
#define LLAMA_KB 256 /* inputs per step: a multiple of every block size */

typedef float llama_vec __attribute__((vector_size(LLAMA_VEC * 4)));

/* Stops the compiler from fusing this product into the addition that follows: the K formats are
 * defined with two roundings. */
#if defined(__AVX512F__)
#define LLAMA_ROUNDED(v) __asm__("" : "+v"(v))
#elif defined(__SSE__)
#define LLAMA_ROUNDED(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define LLAMA_ROUNDED(v) __asm__("" : "+w"(v))
#else
#define LLAMA_ROUNDED(v) __asm__("" : "+m"(v))
#endif

/* y (32) = d * q - m */
static void llama_affine32(float *y, const float *q, float d, float m) {
    for (int i = 0; i < 32; i += LLAMA_VEC) {
        llama_vec v;
        memcpy(&v, q + i, sizeof v);
        v *= d;
        LLAMA_ROUNDED(v);
        v -= m;
        memcpy(y + i, &v, sizeof v);
    }
}

/* Q4_K and Q5_K: eight sub-blocks of 32 with 6-bit scales and minima packed into 12 bytes. */
static void llama_unpack_k45(const uint8_t *b, int five, float *y) {
    const uint8_t *s = b + 4, *qh = b + 16, *qs = b + (five ? 48 : 16);
    float d = llama_half(llama_le16(b)), dmin = llama_half(llama_le16(b + 2)), q[32];
    for (int j = 0; j < 8; j++) {
        int sc = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        int mn = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
        const uint8_t *p = qs + 32 * (j / 2);
        int shift = 4 * (j & 1);
        if (five)
            for (int i = 0; i < 32; i++)
                q[i] = (float)((p[i] >> shift & 15) | (qh[i] >> j & 1) << 4);
        else
            for (int i = 0; i < 32; i++) q[i] = (float)(p[i] >> shift & 15);
        llama_affine32(y + 32 * j, q, d * (float)sc, dmin * (float)mn);
    }
}

static void llama_unpack_q6k(const uint8_t *b, float *y) {
    float d = llama_half(llama_le16(b + 208));
    for (int j = 0; j < 8; j++) { /* 32 values each, two scales */
        const uint8_t *ql = b + 64 * (j / 4) + 32 * (j & 1), *qh = b + 128 + 32 * (j / 4);
        int lo = j & 2 ? 4 : 0, hi = 2 * (j & 3);
        for (int i = 0; i < 32; i++) {
            float scale = d * (float)(int8_t)b[192 + 2 * j + i / 16];
            y[32 * j + i] = scale * (float)(((ql[i] >> lo & 15) | (qh[i] >> hi & 3) << 4) - 32);
        }
    }
}

/* n is a multiple of the block; src is the start of a block. */
static void llama_unpack(int32_t type, const uint8_t *b, int64_t n, float *y) {
    switch (type) {
    case LLAMA_F32:
        for (int64_t i = 0; i < n; i++) y[i] = llama_bits(llama_le32(b + 4 * i));
        break;
    case LLAMA_F16:
        for (int64_t i = 0; i < n; i++) y[i] = llama_half(llama_le16(b + 2 * i));
        break;
    case LLAMA_BF16:
        for (int64_t i = 0; i < n; i++) y[i] = llama_bits((uint32_t)llama_le16(b + 2 * i) << 16);
        break;
    case LLAMA_Q8_0:
        for (; n > 0; n -= 32, b += 34, y += 32) {
            float d = llama_half(llama_le16(b));
            for (int i = 0; i < 32; i++) y[i] = d * (float)(int8_t)b[2 + i];
        }
        break;
    case LLAMA_Q4_0:
        for (; n > 0; n -= 32, b += 18, y += 32) {
            float d = llama_half(llama_le16(b));
            for (int i = 0; i < 16; i++) y[i] = d * (float)((b[2 + i] & 15) - 8);
            for (int i = 0; i < 16; i++) y[i + 16] = d * (float)((b[2 + i] >> 4) - 8);
        }
        break;
    case LLAMA_Q4_K:
        for (; n > 0; n -= 256, b += 144, y += 256) llama_unpack_k45(b, 0, y);
        break;
    case LLAMA_Q5_K:
        for (; n > 0; n -= 256, b += 176, y += 256) llama_unpack_k45(b, 1, y);
        break;
    default:
        for (; n > 0; n -= 256, b += 210, y += 256) llama_unpack_q6k(b, y);
        break;
    }
}

/* Values k0 .. k0 + n - 1 of a row; k0 is a multiple of LLAMA_KB. */
static void llama_unpack_part(const llama_weight *w, int64_t row, int64_t k0, int64_t n,
                              float *out) {
    size_t bytes, block = llama_block((uint32_t)w->type, &bytes);
    llama_unpack(w->type, w->data + (size_t)row * w->row_bytes + (size_t)k0 / block * bytes, n,
                 out);
}

void llama_weight_row(const llama_weight *w, int64_t row, float *out) {
    llama_unpack_part(w, row, 0, w->n_in, out);
}

/* ==== matmul ====
 * Lanes are outputs: a weight panel holds LLAMA_NR rows with inputs outermost, so an output
 * element is one chain over the inputs whatever the tile height. Partial sums of LLAMA_KB inputs
 * go through memory, which changes no bit. */

#define LLAMA_ALIGN 64
#define LLAMA_TOKENS 192 /* tokens per task: what one unpacked weight block serves */

#ifndef LLAMA_USE_CBLAS
/* c (mr, NR) += x (mr, kn) W (kn, NR); mr is a constant at each call, so all of c stays in
 * registers. */
static inline __attribute__((always_inline)) void
llama_tile(int mr, int64_t kn, const float *w, const float *x, int64_t ldx, float *c) {
    llama_vec acc[LLAMA_MR][LLAMA_NV];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < LLAMA_NV; j++)
            memcpy(&acc[i][j], c + i * LLAMA_NR + j * LLAMA_VEC, sizeof(llama_vec));
    for (int64_t k = 0; k < kn; k++, w += LLAMA_NR) {
        llama_vec wv[LLAMA_NV];
        for (int j = 0; j < LLAMA_NV; j++) memcpy(&wv[j], w + j * LLAMA_VEC, sizeof wv[j]);
        for (int i = 0; i < mr; i++)
            for (int j = 0; j < LLAMA_NV; j++) acc[i][j] += wv[j] * x[i * ldx + k];
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < LLAMA_NV; j++)
            memcpy(c + i * LLAMA_NR + j * LLAMA_VEC, &acc[i][j], sizeof(llama_vec));
}

static void llama_tiles(int32_t n, int64_t kn, const float *w, const float *x, int64_t ldx,
                        float *c) {
    for (; n >= LLAMA_MR; n -= LLAMA_MR, x += LLAMA_MR * ldx, c += LLAMA_MR * LLAMA_NR)
        llama_tile(LLAMA_MR, kn, w, x, ldx, c);
    switch (n) {
    case 5: llama_tile(5, kn, w, x, ldx, c); break;
    case 4: llama_tile(4, kn, w, x, ldx, c); break;
    case 3: llama_tile(3, kn, w, x, ldx, c); break;
    case 2: llama_tile(2, kn, w, x, ldx, c); break;
    case 1: llama_tile(1, kn, w, x, ldx, c); break;
    default: break;
    }
}

/* Inputs k0 .. k0 + kn - 1 of LLAMA_NR rows from row0, transposed; missing rows are zero. */
static void llama_panel(const llama_weight *w, int64_t row0, int64_t k0, int64_t kn, float *out) {
    float row[LLAMA_KB];
    for (int r = 0; r < LLAMA_NR; r++) {
        if (row0 + r < w->n_out)
            llama_unpack_part(w, row0 + r, k0, kn, row);
        else
            memset(row, 0, sizeof row);
        for (int64_t k = 0; k < kn; k++) out[k * LLAMA_NR + r] = row[k];
    }
}

static void llama_gemm_task(void *ctx, int64_t task, int32_t thread) {
    const llama_gemm *g = (const llama_gemm *)ctx;
    float c[LLAMA_TOKENS * LLAMA_NR] __attribute__((aligned(LLAMA_ALIGN)));
    float wb[LLAMA_KB * LLAMA_NR] __attribute__((aligned(LLAMA_ALIGN)));
    int64_t blocks = (g->n + g->block - 1) / g->block, panel = task / blocks;
    int32_t t0 = (int32_t)(task % blocks) * g->block;
    int32_t nt = g->n - t0 < g->block ? g->n - t0 : g->block, j = 0;
    (void)thread;
    while (panel >= g->first[j + 1]) j++;
    const llama_job *job = &g->job[j];
    const llama_weight *w = job->w;
    int64_t row0 = (panel - g->first[j]) * LLAMA_NR;
    int64_t width = w->n_out - row0 < LLAMA_NR ? w->n_out - row0 : LLAMA_NR;
    memset(c, 0, (size_t)nt * LLAMA_NR * sizeof *c);
    for (int64_t k0 = 0; k0 < w->n_in; k0 += LLAMA_KB) {
        int64_t kn = w->n_in - k0 < LLAMA_KB ? w->n_in - k0 : LLAMA_KB;
        const float *wp = wb;
        if (w->f32)
            wp = w->f32 + row0 * w->n_in + k0 * LLAMA_NR;
        else
            llama_panel(w, row0, k0, kn, wb);
        llama_tiles(nt, kn, wp, g->x + (int64_t)t0 * w->n_in + k0, w->n_in, c);
    }
    for (int32_t t = 0; t < nt; t++) {
        float *y = job->y + (int64_t)(t0 + t) * w->n_out + row0;
        const float *a = c + t * LLAMA_NR;
        if (job->bias)
            for (int64_t i = 0; i < width; i++) c[t * LLAMA_NR + i] += job->bias[row0 + i];
        if (job->add)
            for (int64_t i = 0; i < width; i++) y[i] += a[i];
        else
            memcpy(y, a, (size_t)width * sizeof *y);
    }
}

#else
/* Weights are always converted then; the library brings its own threads. */
static void llama_blas_task(void *ctx, int64_t task, int32_t thread) {
    const llama_gemm *g = (const llama_gemm *)ctx;
    (void)task;
    (void)thread;
    for (int j = 0; j < g->n_jobs; j++) {
        const llama_job *job = &g->job[j];
        int n_in = (int)job->w->n_in, n_out = (int)job->w->n_out;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, g->n, n_out, n_in, 1.0f, g->x, n_in,
                    job->w->f32, n_in, job->add ? 1.0f : 0.0f, job->y, n_out);
        for (int64_t t = 0; job->bias && t < g->n; t++)
            for (int64_t i = 0; i < n_out; i++) job->y[t * n_out + i] += job->bias[i];
    }
}
#endif

/* All jobs read the same x, so their panels form one list of tasks without barriers between. */
static llama_op llama_gemm_op(llama_gemm g) {
    llama_op op;
    memset(&op, 0, sizeof op);
    for (int j = 0; j < g.n_jobs; j++)
        g.first[j + 1] = g.first[j] + (g.job[j].w->n_out + LLAMA_NR - 1) / LLAMA_NR;
#ifdef LLAMA_USE_CBLAS
    op.fn = llama_blas_task;
    op.n_tasks = 1;
    op.cost = (double)g.first[g.n_jobs] * LLAMA_NR * (double)g.job[0].w->n_in * g.n;
#else
    /* many small tasks balance threads; packed weights want many tokens per unpacked block */
    g.block = g.job[0].w->f32 && g.n > 48 ? 48 : LLAMA_TOKENS;
    int64_t blocks = (g.n + g.block - 1) / g.block;
    op.fn = llama_gemm_task;
    op.n_tasks = g.first[g.n_jobs] * blocks;
    op.cost = (double)LLAMA_NR * (double)g.job[0].w->n_in * (g.n < g.block ? g.n : g.block);
#endif
    op.ctx.gemm = g;
    return op;
}

static llama_op llama_matmul_op(const llama_weight *w, const float *x, int32_t n, float *y) {
    llama_gemm g;
    memset(&g, 0, sizeof g);
    g.n = n;
    g.x = x;
    g.n_jobs = 1;
    g.job[0].w = w;
    g.job[0].y = y;
    return llama_gemm_op(g);
}

void llama_matmul(llama_pool *pool, const llama_weight *w, const float *x, int32_t n, float *y) {
    llama_op op = llama_matmul_op(w, x, n, y);
    llama_pool_run(pool, op.fn, &op.ctx, op.n_tasks);
}

typedef struct llama_convert_ctx {
    const llama_weight *w;
    float *out;
} llama_convert_ctx;

/* One panel, or that many rows when BLAS wants them as they are. */
static void llama_convert_task(void *ctx, int64_t task, int32_t thread) {
    const llama_convert_ctx *c = (const llama_convert_ctx *)ctx;
    const llama_weight *w = c->w;
    int64_t row0 = task * LLAMA_NR;
    (void)thread;
#ifdef LLAMA_USE_CBLAS
    for (int64_t r = row0; r < row0 + LLAMA_NR && r < w->n_out; r++)
        llama_weight_row(w, r, c->out + r * w->n_in);
#else
    for (int64_t k0 = 0; k0 < w->n_in; k0 += LLAMA_KB)
        llama_panel(w, row0, k0, w->n_in - k0 < LLAMA_KB ? w->n_in - k0 : LLAMA_KB,
                    c->out + row0 * w->n_in + k0 * LLAMA_NR);
#endif
}

/* ==== load ==== */

static int llama_config(llama_model *m, char *err) {
    const llama_gguf *g = m->gguf;
    llama_str arch = llama_meta_str(g, "general.architecture");
    int32_t max_width = 1 << 20, n_experts, head;
    if (!llama_str_is(arch, "llama"))
        return llama_fail(err, "architecture is not llama (general.architecture)");
    if (llama_meta_int(g, "llama.expert_count", 0, 0, INT32_MAX, &n_experts, err)) return -1;
    if (n_experts) return llama_fail(err, "mixture-of-experts models are not supported");
    if (llama_meta_int(g, "llama.block_count", 0, 1, 4096, &m->n_layers, err) ||
        llama_meta_int(g, "llama.embedding_length", 0, 1, max_width, &m->d_model, err) ||
        llama_meta_int(g, "llama.attention.head_count", 0, 1, 4096, &m->n_heads, err) ||
        llama_meta_int(g, "llama.attention.head_count_kv", m->n_heads, 1, 4096, &m->n_kv_heads,
                       err) ||
        llama_meta_int(g, "llama.feed_forward_length", 0, 1, max_width, &m->d_ff, err) ||
        llama_meta_int(g, "llama.context_length", 2048, 1, 1 << 27, &m->n_ctx, err))
        return -1;
    if (m->n_heads % m->n_kv_heads)
        return llama_fail(err, "%d query heads do not divide among %d KV heads", (int)m->n_heads,
                          (int)m->n_kv_heads);
    head = m->d_model / m->n_heads;
    if (llama_meta_int(g, "llama.attention.key_length", head, 1, 4096, &m->head_dim, err) ||
        llama_meta_int(g, "llama.attention.value_length", m->head_dim, 1, 4096, &m->v_head_dim,
                       err) ||
        llama_meta_int(g, "llama.rope.dimension_count", m->head_dim, 0, m->head_dim, &m->rope_dim,
                       err))
        return -1;
    if (m->rope_dim % 2) return llama_fail(err, "llama.rope.dimension_count is odd");
    m->rms_eps = llama_meta_number(m, "llama.attention.layer_norm_rms_epsilon", 1e-5);
    if (!(m->rms_eps >= 0 && m->rms_eps < 1))
        return llama_fail(err, "llama.attention.layer_norm_rms_epsilon is out of range");
    return 0;
}

static const llama_tensor *llama_tensor_find(const llama_gguf *g, const char *name) {
    for (size_t i = 0; i < g->n_tensors; i++)
        if (llama_str_is(g->tensors[i].name, name)) return &g->tensors[i];
    return NULL;
}

/* Looks a tensor up and checks type, shape and that its bytes lie inside the file. GGUF lists
 * the innermost dimension first. *w stays zero when it is absent. */
static int llama_bind(const llama_gguf *g, const char *name, int64_t n_in, int64_t n_out,
                      int optional, llama_weight *w, char *err) {
    const llama_tensor *t = llama_tensor_find(g, name);
    size_t bytes, block, total, room = g->n_bytes - g->data;
    if (!t) return optional ? 0 : llama_fail(err, "tensor %s is missing", name);
    block = llama_block(t->type, &bytes);
    if (!block)
        return llama_fail(err, "tensor %s has type %u, which this program cannot read", name,
                          (unsigned)t->type);
    if (t->dims[0] != (uint64_t)n_in || t->dims[1] != (uint64_t)n_out || t->dims[2] != 1 ||
        t->dims[3] != 1)
        return llama_fail(err, "tensor %s is %llu x %llu, expected %lld x %lld", name,
                          (unsigned long long)t->dims[0], (unsigned long long)t->dims[1],
                          (long long)n_in, (long long)n_out);
    if ((size_t)n_in % block)
        return llama_fail(err, "tensor %s: %lld columns do not fill blocks of %zu", name,
                          (long long)n_in, block);
    w->row_bytes = (size_t)n_in / block * bytes;
    if (llama_mul(w->row_bytes, (size_t)n_out, &total) || t->offset > room ||
        total > room - (size_t)t->offset)
        return llama_fail(err, "tensor %s lies outside the file", name);
    w->data = g->bytes + g->data + (size_t)t->offset;
    w->type = (int32_t)t->type;
    w->n_in = n_in;
    w->n_out = n_out;
    return 0;
}

/* A 1-D tensor as floats; NULL result without error when an optional one is absent. */
static int llama_vector(const llama_gguf *g, const char *name, int64_t n, int optional,
                        float **out, char *err) {
    llama_weight w;
    memset(&w, 0, sizeof w);
    if (llama_bind(g, name, n, 1, optional, &w, err)) return -1;
    if (!w.data) return 0;
    *out = (float *)malloc((size_t)n * sizeof **out);
    if (!*out) return llama_fail(err, "out of memory");
    llama_weight_row(&w, 0, *out);
    return 0;
}

static int llama_rope_setup(llama_model *m, char *err) {
    const llama_gguf *g = m->gguf;
    int32_t pairs = m->rope_dim / 2;
    float *factor = NULL;
    llama_str kind = llama_meta_str(g, "llama.rope.scaling.type");
    double base = llama_meta_number(m, "llama.rope.freq_base", 10000.0), scale = 1;
    if (!(base >= 1 && base <= 1e15)) return llama_fail(err, "llama.rope.freq_base: bad value");
    if (llama_str_is(kind, "linear"))
        scale = llama_meta_number(m, "llama.rope.scaling.factor", 1);
    else if (kind.n && !llama_str_is(kind, "none") &&
             !(llama_str_is(kind, "llama3") && llama_tensor_find(g, "rope_freqs.weight")))
        return llama_fail(err, "this llama.rope.scaling.type is not supported");
    if (!kind.n) scale = llama_meta_number(m, "llama.rope.scale_linear", 1);
    if (!(scale > 0 && scale <= 1e6))
        return llama_fail(err, "llama.rope.scaling.factor: bad value");
    m->rope_freq = (double *)malloc(((size_t)pairs + 1) * sizeof *m->rope_freq);
    if (!m->rope_freq) return llama_fail(err, "out of memory");
    if (pairs && llama_vector(g, "rope_freqs.weight", pairs, 1, &factor, err)) return -1;
    for (int32_t i = 0; i < pairs; i++) { /* the tensor divides: how llama-3 files scale */
        double f = factor ? (double)factor[i] : 1.0;
        m->rope_freq[i] = pow(base, -2.0 * i / m->rope_dim) / (scale * f);
        if (!(f > 0) || !isfinite(m->rope_freq[i])) {
            free(factor);
            return llama_fail(err, "rope_freqs.weight holds a factor that is not positive");
        }
    }
    free(factor);
    return 0;
}

static int llama_bind_layer(llama_model *m, int32_t layer, char *err) {
    llama_layer *l = &m->layers[layer];
    int64_t d = m->d_model, q = (int64_t)m->n_heads * m->head_dim;
    int64_t k = (int64_t)m->n_kv_heads * m->head_dim, v = (int64_t)m->n_kv_heads * m->v_head_dim;
    int64_t o = (int64_t)m->n_heads * m->v_head_dim, f = m->d_ff;
    struct { const char *name; llama_weight *w; int64_t n_in, n_out; } mat[] = {
        {"attn_q", &l->wq, d, q}, {"attn_k", &l->wk, d, k}, {"attn_v", &l->wv, d, v},
        {"attn_output", &l->wo, o, d}, {"ffn_gate", &l->gate, d, f}, {"ffn_up", &l->up, d, f},
        {"ffn_down", &l->down, f, d}};
    struct { const char *name; float **v; int64_t n; int optional; } vec[] = {
        {"attn_norm.weight", &l->attn_norm, d, 0}, {"ffn_norm.weight", &l->ffn_norm, d, 0},
        {"attn_q.bias", &l->bq, q, 1}, {"attn_k.bias", &l->bk, k, 1},
        {"attn_v.bias", &l->bv, v, 1}, {"attn_output.bias", &l->bo, d, 1}};
    char name[96];
    for (size_t i = 0; i < sizeof mat / sizeof *mat; i++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", (int)layer, mat[i].name);
        if (llama_bind(m->gguf, name, mat[i].n_in, mat[i].n_out, 0, mat[i].w, err)) return -1;
        m->n_params += mat[i].n_in * mat[i].n_out;
    }
    for (size_t i = 0; i < sizeof vec / sizeof *vec; i++) {
        snprintf(name, sizeof name, "blk.%d.%s", (int)layer, vec[i].name);
        if (llama_vector(m->gguf, name, vec[i].n, vec[i].optional, vec[i].v, err)) return -1;
    }
    return 0;
}

/* The i-th matrix that matmuls read: seven per layer, then the output. */
static llama_weight *llama_matrix(llama_model *m, int64_t i) {
    if (i / 7 >= m->n_layers) return &m->output;
    llama_layer *l = &m->layers[i / 7];
    llama_weight *w[7] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down};
    return w[i % 7];
}

static int llama_convert(llama_model *m, llama_pool *pool, size_t limit, char *err) {
    int64_t n = 7 * (int64_t)m->n_layers + 1;
    size_t total = LLAMA_ALIGN;
    for (int64_t i = 0; i < n; i++) { /* sizes were bounded by the file's, so sums fit */
        llama_weight *w = llama_matrix(m, i);
        size_t rows = ((size_t)w->n_out + LLAMA_NR - 1) / LLAMA_NR * LLAMA_NR, bytes;
        if (llama_mul(rows * sizeof(float), (size_t)w->n_in, &bytes) || total > SIZE_MAX - bytes)
            total = SIZE_MAX;
        else if (total != SIZE_MAX)
            total += bytes;
        m->weight_bytes += w->row_bytes * (size_t)w->n_out;
    }
#ifdef LLAMA_USE_CBLAS
    limit = SIZE_MAX - 1;
#endif
    if (total > limit) return 0;
    m->weight_bytes = total;
    m->arena = malloc(total);
    if (!m->arena) return llama_fail(err, "out of memory (%zu bytes of weights)", total);
    float *at = (float *)(((uintptr_t)m->arena + LLAMA_ALIGN - 1) / LLAMA_ALIGN * LLAMA_ALIGN);
    for (int64_t i = 0; i < n; i++) {
        llama_weight *w = llama_matrix(m, i);
        llama_convert_ctx c = {w, at};
        int64_t panels = (w->n_out + LLAMA_NR - 1) / LLAMA_NR;
        llama_pool_run(pool, llama_convert_task, &c, panels);
        w->f32 = at;
        at += panels * LLAMA_NR * w->n_in;
    }
    return 0;
}

static int llama_vocab_load(llama_model *m, char *err);
static void llama_vocab_free(llama_vocab *v);

static int llama_load_parts(llama_model *m, const char *path, llama_pool *pool, size_t f32_bytes,
                            char *err) {
    if (llama_read_whole(m->gguf, path, err) || llama_gguf_parse(m->gguf, err) ||
        llama_config(m, err) || llama_vocab_load(m, err))
        return -1;
    m->layers = (llama_layer *)calloc((size_t)m->n_layers, sizeof *m->layers);
    if (!m->layers) return llama_fail(err, "out of memory");
    if (llama_bind(m->gguf, "token_embd.weight", m->d_model, m->n_vocab, 0, &m->embed, err) ||
        llama_bind(m->gguf, "output.weight", m->d_model, m->n_vocab, 1, &m->output, err) ||
        llama_vector(m->gguf, "output_norm.weight", m->d_model, 0, &m->out_norm, err) ||
        llama_rope_setup(m, err))
        return -1;
    m->n_params = (int64_t)m->n_vocab * m->d_model * (m->output.data ? 2 : 1);
    if (!m->output.data) m->output = m->embed;
    for (int32_t l = 0; l < m->n_layers; l++)
        if (llama_bind_layer(m, l, err)) return -1;
    return llama_convert(m, pool, f32_bytes ? f32_bytes : (size_t)1 << 30, err);
}

llama_model *llama_load(const char *path, llama_pool *pool, size_t f32_bytes, char *err) {
    llama_model *m = (llama_model *)calloc(1, sizeof *m);
    if (m) m->gguf = (llama_gguf *)calloc(1, sizeof *m->gguf);
    if (!m || !m->gguf) {
        llama_fail(err, "out of memory");
    } else if (!llama_load_parts(m, path, pool, f32_bytes, err)) {
        return m;
    }
    llama_free(m);
    return NULL;
}

void llama_free(llama_model *m) {
    if (!m) return;
    for (int32_t i = 0; m->layers && i < m->n_layers; i++) {
        llama_layer *l = &m->layers[i];
        free(l->attn_norm);
        free(l->ffn_norm);
        free(l->bq);
        free(l->bk);
        free(l->bv);
        free(l->bo);
    }
    free(m->layers);
    free(m->out_norm);
    free(m->rope_freq);
    free(m->arena);
    llama_vocab_free(m->vocab);
    llama_gguf_close(m->gguf);
    free(m);
}

/* ==== layers ==== */

#define LLAMA_SLICE 16 /* tokens per task of the element-wise passes */

static llama_op llama_pass_op(llama_task fn, llama_pass p, int64_t width) {
    llama_op op;
    memset(&op, 0, sizeof op);
    op.fn = fn;
    op.n_tasks = ((int64_t)p.n + LLAMA_SLICE - 1) / LLAMA_SLICE;
    op.cost = (double)width * (p.n < LLAMA_SLICE ? p.n : LLAMA_SLICE);
    op.ctx.pass = p;
    return op;
}

static void llama_ops_run(llama_pool *pool, llama_op *ops, int n) {
    for (int i = 0; i < n; i++) llama_pool_run(pool, ops[i].fn, &ops[i].ctx, ops[i].n_tasks);
}

static int32_t llama_slice(const llama_pass *p, int64_t task, int32_t *t0) {
    *t0 = (int32_t)task * LLAMA_SLICE;
    return p->n - *t0 < LLAMA_SLICE ? p->n : *t0 + LLAMA_SLICE;
}

llama_state *llama_state_create(const llama_model *m, int32_t cap) {
    llama_state *s = (llama_state *)calloc(1, sizeof *s);
    int64_t width[9] = {m->d_model, m->d_model, (int64_t)m->n_heads * m->head_dim,
                        (int64_t)m->n_kv_heads * m->head_dim,
                        (int64_t)m->n_kv_heads * m->v_head_dim,
                        (int64_t)m->n_heads * m->v_head_dim, m->d_ff, m->d_ff, m->rope_dim};
    float **part[9];
    size_t total = 0, bytes;
    if (!s || cap < 1) {
        free(s);
        return NULL;
    }
    float **parts[9] = {&s->x, &s->xn, &s->q, &s->k, &s->v, &s->att, &s->gate, &s->up, &s->rope};
    memcpy(part, parts, sizeof part);
    for (int i = 0; i < 9; i++) total += ((size_t)width[i] + 16) * sizeof(float);
    if (!llama_mul(total, (size_t)cap, &bytes)) s->memory = calloc(bytes + LLAMA_ALIGN, 1);
    if (!s->memory) {
        free(s);
        return NULL;
    }
    uintptr_t at = ((uintptr_t)s->memory + LLAMA_ALIGN - 1) / LLAMA_ALIGN * LLAMA_ALIGN;
    for (int i = 0; i < 9; i++) {
        *part[i] = (float *)at;
        at += ((size_t)width[i] * (size_t)cap * sizeof(float) + LLAMA_ALIGN - 1) / LLAMA_ALIGN *
              LLAMA_ALIGN;
    }
    s->cap = cap;
    return s;
}

void llama_state_free(llama_state *s) {
    if (s) free(s->memory);
    free(s);
}

static void llama_embed_task(void *ctx, int64_t task, int32_t thread) {
    const llama_pass *p = (const llama_pass *)ctx;
    const llama_model *m = p->m;
    int32_t t, end = llama_slice(p, task, &t), pairs = m->rope_dim / 2;
    (void)thread;
    for (; t < end; t++) {
        llama_weight_row(&m->embed, p->ids[t], p->s->x + (int64_t)t * m->d_model);
        float *r = p->s->rope + (int64_t)t * m->rope_dim;
        for (int32_t i = 0; i < pairs; i++) {
            double angle = (double)p->pos[t] * m->rope_freq[i];
            r[2 * i] = (float)cos(angle);
            r[2 * i + 1] = (float)sin(angle);
        }
    }
}

int llama_embed_ops(const llama_model *m, llama_state *s, const int32_t *ids, const int32_t *pos,
                    int32_t n, llama_op *ops) {
    llama_pass p = {m, s, NULL, ids, pos, NULL, NULL, n};
    s->n = n;
    ops[0] = llama_pass_op(llama_embed_task, p, m->d_model + m->rope_dim);
    return 1;
}

void llama_embed(const llama_model *m, llama_pool *pool, llama_state *s, const int32_t *ids,
                 const int32_t *pos, int32_t n) {
    llama_op ops[LLAMA_MAX_OPS];
    llama_ops_run(pool, ops, llama_embed_ops(m, s, ids, pos, n, ops));
}

/* xn = x / rms(x) * weight, sums in 16 lanes and a fixed tree */
static void llama_norm_task(void *ctx, int64_t task, int32_t thread) {
    const llama_pass *p = (const llama_pass *)ctx;
    int32_t t, end = llama_slice(p, task, &t), d = p->m->d_model;
    (void)thread;
    for (; t < end; t++) {
        const float *x = p->x + (int64_t)(p->rows ? p->rows[t] : t) * d;
        float *y = p->s->xn + (int64_t)t * d, lane[16] = {0}, scale;
        int32_t i = 0;
        for (; i + 16 <= d; i += 16)
            for (int j = 0; j < 16; j++) lane[j] += x[i + j] * x[i + j];
        for (int j = 0; i < d; i++, j++) lane[j] += x[i] * x[i];
        for (int w = 8; w; w /= 2)
            for (int j = 0; j < w; j++) lane[j] += lane[j + w];
        scale = (float)(1.0 / sqrt((double)lane[0] / d + p->m->rms_eps));
        for (i = 0; i < d; i++) y[i] = x[i] * scale * p->weight[i];
    }
}

static llama_op llama_norm_op(const llama_model *m, llama_state *s, const float *weight,
                              const int32_t *rows, int32_t n) {
    llama_pass p = {m, s, weight, NULL, NULL, s->x, rows, n};
    return llama_pass_op(llama_norm_task, p, m->d_model);
}

static void llama_rotate(float *head, const float *rope, int32_t rope_dim) {
    for (int32_t i = 0; i < rope_dim; i += 2) {
        float a = head[i], b = head[i + 1], c = rope[i], s = rope[i + 1];
        head[i] = a * c - b * s;
        head[i + 1] = a * s + b * c;
    }
}

static void llama_rope_task(void *ctx, int64_t task, int32_t thread) {
    const llama_pass *p = (const llama_pass *)ctx;
    const llama_model *m = p->m;
    int32_t t, end = llama_slice(p, task, &t);
    (void)thread;
    for (; t < end; t++) {
        const float *rope = p->s->rope + (int64_t)t * m->rope_dim;
        float *q = p->s->q + (int64_t)t * m->n_heads * m->head_dim;
        float *k = p->s->k + (int64_t)t * m->n_kv_heads * m->head_dim;
        for (int32_t h = 0; h < m->n_heads; h++)
            llama_rotate(q + h * m->head_dim, rope, m->rope_dim);
        for (int32_t h = 0; h < m->n_kv_heads; h++)
            llama_rotate(k + h * m->head_dim, rope, m->rope_dim);
    }
}

int llama_qkv_ops(const llama_model *m, llama_state *s, int32_t layer, llama_op *ops) {
    const llama_layer *l = &m->layers[layer];
    llama_pass p = {m, s, NULL, NULL, NULL, NULL, NULL, s->n};
    llama_gemm g = {{{&l->wq, l->bq, s->q, 0}, {&l->wk, l->bk, s->k, 0}, {&l->wv, l->bv, s->v, 0}},
                    {0}, 3, s->n, 0, s->xn};
    ops[0] = llama_norm_op(m, s, l->attn_norm, NULL, s->n);
    ops[1] = llama_gemm_op(g);
    if (!m->rope_dim) return 2;
    ops[2] = llama_pass_op(llama_rope_task, p, (int64_t)(m->n_heads + m->n_kv_heads) * m->rope_dim);
    return 3;
}

void llama_qkv(const llama_model *m, llama_pool *pool, llama_state *s, int32_t layer) {
    llama_op ops[LLAMA_MAX_OPS];
    llama_ops_run(pool, ops, llama_qkv_ops(m, s, layer, ops));
}

static void llama_swiglu_task(void *ctx, int64_t task, int32_t thread) {
    const llama_pass *p = (const llama_pass *)ctx;
    int32_t t, end = llama_slice(p, task, &t);
    int64_t i = (int64_t)t * p->m->d_ff, n = (int64_t)end * p->m->d_ff;
    (void)thread;
    for (; i < n; i++) {
        float a = p->s->gate[i];
        p->s->gate[i] = a / (1.0f + expf(-a)) * p->s->up[i];
    }
}

int llama_out_ops(const llama_model *m, llama_state *s, int32_t layer, llama_op *ops) {
    const llama_layer *l = &m->layers[layer];
    llama_pass p = {m, s, NULL, NULL, NULL, NULL, NULL, s->n};
    llama_gemm wo = {{{&l->wo, l->bo, s->x, 1}}, {0}, 1, s->n, 0, s->att};
    llama_gemm in = {{{&l->gate, NULL, s->gate, 0}, {&l->up, NULL, s->up, 0}}, {0}, 2, s->n, 0,
                     s->xn};
    llama_gemm down = {{{&l->down, NULL, s->x, 1}}, {0}, 1, s->n, 0, s->gate};
    ops[0] = llama_gemm_op(wo);
    ops[1] = llama_norm_op(m, s, l->ffn_norm, NULL, s->n);
    ops[2] = llama_gemm_op(in);
    ops[3] = llama_pass_op(llama_swiglu_task, p, m->d_ff);
    ops[4] = llama_gemm_op(down);
    return 5;
}

void llama_out(const llama_model *m, llama_pool *pool, llama_state *s, int32_t layer) {
    llama_op ops[LLAMA_MAX_OPS];
    llama_ops_run(pool, ops, llama_out_ops(m, s, layer, ops));
}

int llama_logits_ops(const llama_model *m, llama_state *s, const int32_t *rows, int32_t n_rows,
                     float *logits, llama_op *ops) {
    ops[0] = llama_norm_op(m, s, m->out_norm, rows, n_rows);
    ops[1] = llama_matmul_op(&m->output, s->xn, n_rows, logits);
    return 2;
}

void llama_logits(const llama_model *m, llama_pool *pool, llama_state *s, const int32_t *rows,
                  int32_t n_rows, float *logits) {
    llama_op ops[LLAMA_MAX_OPS];
    llama_ops_run(pool, ops, llama_logits_ops(m, s, rows, n_rows, logits, ops));
}

/* ==== vocabulary ==== */

enum { LLAMA_SPM, LLAMA_BPE };
enum { LLAMA_PRE_GPT2, LLAMA_PRE_LLAMA3, LLAMA_PRE_QWEN2, LLAMA_PRE_SMOLLM };
enum { /* tokenizer.ggml.token_type */
    LLAMA_T_NORMAL = 1, LLAMA_T_UNKNOWN, LLAMA_T_CONTROL, LLAMA_T_USER, LLAMA_T_UNUSED, LLAMA_T_BYTE
};

typedef struct llama_pair { /* a BPE merge; id < 0: free slot */
    int32_t left, right, id, rank;
} llama_pair;

struct llama_vocab {
    int32_t n, kind, pre, bos, eos, eot, unk, add_bos, add_prefix, whole_words;
    llama_str *piece;
    float *score;
    uint8_t *type;
    int32_t byte[256];    /* SPM: byte tokens; BPE: tokens of the mapped byte; or -1 */
    int32_t *slot;        /* piece -> id, open addressing, -1 free */
    size_t mask;
    llama_pair *pair;
    size_t pair_mask;
    int32_t *special;     /* ids matched literally, grouped by first byte */
    int32_t special_at[257];
};

static uint64_t llama_hash(const char *s, size_t n) {
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * 1099511628211u;
    return h ^ h >> 29;
}

static int32_t llama_lookup(const llama_vocab *v, const char *s, size_t n) {
    for (size_t i = (size_t)llama_hash(s, n) & v->mask;; i = (i + 1) & v->mask) {
        int32_t id = v->slot[i];
        if (id < 0) return -1;
        if (v->piece[id].n == n && !memcmp(v->piece[id].s, s, n)) return id;
    }
}

/* Text never turns into a control, unknown or byte token by merging. */
static int32_t llama_lookup_text(const llama_vocab *v, const char *s, size_t n) {
    int32_t id = llama_lookup(v, s, n);
    if (id < 0) return -1;
    int t = v->type[id];
    return t == LLAMA_T_CONTROL || t == LLAMA_T_UNKNOWN || t == LLAMA_T_BYTE ? -1 : id;
}

static llama_pair *llama_pair_at(const llama_vocab *v, int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    for (size_t i = (size_t)(h >> 20) & v->pair_mask;; i = (i + 1) & v->pair_mask) {
        llama_pair *p = &v->pair[i];
        if (p->id < 0 || (p->left == left && p->right == right)) return p;
    }
}

/* Byte-level BPE writes a byte as a printable character: itself when it is one in Latin-1, else
 * U+0100 and up in order. */
static uint32_t llama_byte_char(int b) {
    int low = b < 33 ? b : b < 127 ? -1 : b < 161 ? 33 + b - 127 : b == 173 ? 67 : -1;
    return low < 0 ? (uint32_t)b : 256u + (uint32_t)low;
}

static int llama_char_byte(uint32_t c) { /* the inverse, or -1 */
    if (c < 256) return llama_byte_char((int)c) == c ? (int)c : -1;
    if (c >= 324) return -1;
    int low = (int)c - 256;
    return low < 33 ? low : low < 67 ? low + 127 - 33 : 173;
}

static size_t llama_utf8_put(uint32_t c, char *out) { /* c < 0x800 */
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xc0 | c >> 6);
    out[1] = (char)(0x80 | (c & 63));
    return 2;
}

/* Decodes the character at s (n >= 1 bytes left). A byte that starts no valid sequence counts as
 * one character U+FFFD. */
static uint32_t llama_utf8(const char *s, size_t n, size_t *len) {
    const uint8_t *p = (const uint8_t *)s;
    size_t k = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3
               : p[0] < 0xf5 ? 4 : 0;
    uint32_t c = k < 2 ? p[0] : p[0] & (0xffu >> (k + 1));
    if (k > n) k = 0;
    for (size_t i = 1; i < k; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            k = 0;
            break;
        }
        c = c << 6 | (p[i] & 63);
    }
    if ((k == 3 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) ||
        (k == 4 && (c < 0x10000 || c > 0x10ffff)))
        k = 0;
    *len = k ? k : 1;
    return k ? c : 0xfffd;
}

/* Fetches array key of n (or any, n < 0) elements of the wanted type. 0 found, 1 absent. */
static int llama_array(const llama_gguf *g, const char *key, int32_t elem, int64_t n,
                       llama_reader *r, uint64_t *count, char *err) {
    const llama_kv *kv = llama_find(g, key);
    if (!kv) return 1;
    if (kv->type != LLAMA_ARR || kv->elem != elem)
        return llama_fail(err, "key %s is not an array of the expected type", key);
    if (n >= 0 && kv->count != (uint64_t)n)
        return llama_fail(err, "key %s has %llu elements for %lld tokens", key,
                          (unsigned long long)kv->count, (long long)n);
    r->p = g->bytes;
    r->n = g->n_bytes;
    r->at = kv->at;
    r->bad = 0;
    *count = kv->count;
    return 0;
}

static int llama_vocab_arrays(llama_vocab *v, const llama_gguf *g, char *err) {
    llama_reader r;
    uint64_t count = 0;
    int got = llama_array(g, "tokenizer.ggml.tokens", LLAMA_STR, -1, &r, &count, err);
    if (got < 0) return -1;
    if (got || count < 1 || count > 1 << 26)
        return llama_fail(err, "no usable vocabulary (tokenizer.ggml.tokens)");
    v->n = (int32_t)count;
    v->mask = 1;
    while (v->mask < 2 * (size_t)v->n) v->mask *= 2;
    v->slot = (int32_t *)malloc(v->mask * sizeof *v->slot);
    v->piece = (llama_str *)calloc((size_t)v->n, sizeof *v->piece);
    v->score = (float *)calloc((size_t)v->n, sizeof *v->score);
    v->type = (uint8_t *)malloc((size_t)v->n);
    if (!v->slot || !v->piece || !v->score || !v->type) return llama_fail(err, "out of memory");
    memset(v->slot, 0xff, v->mask-- * sizeof *v->slot);
    memset(v->type, LLAMA_T_NORMAL, (size_t)v->n);
    for (int32_t i = 0; i < v->n; i++) {
        v->piece[i] = llama_take_str(&r);
        size_t h = (size_t)llama_hash(v->piece[i].s, v->piece[i].n) & v->mask;
        while (v->slot[h] >= 0 && (v->piece[v->slot[h]].n != v->piece[i].n ||
                                   memcmp(v->piece[v->slot[h]].s, v->piece[i].s, v->piece[i].n)))
            h = (h + 1) & v->mask;
        if (v->slot[h] < 0) v->slot[h] = i; /* of equal pieces the first one counts */
    }
    got = llama_array(g, "tokenizer.ggml.scores", LLAMA_FLOAT, v->n, &r, &count, err);
    if (got < 0) return -1;
    for (int32_t i = 0; !got && i < v->n; i++) {
        v->score[i] = llama_bits(llama_take32(&r));
        if (isnan(v->score[i])) return llama_fail(err, "token %d has a NaN score", (int)i);
    }
    got = llama_array(g, "tokenizer.ggml.token_type", LLAMA_I32, v->n, &r, &count, err);
    if (got < 0) return -1;
    for (int32_t i = 0; !got && i < v->n; i++) {
        uint32_t t = llama_take32(&r);
        if (t > LLAMA_T_BYTE) return llama_fail(err, "token %d has type %u", (int)i, (unsigned)t);
        v->type[i] = (uint8_t)t;
    }
    return 0;
}

static int llama_vocab_merges(llama_vocab *v, const llama_gguf *g, char *err) {
    llama_reader r;
    uint64_t count = 0;
    size_t slots = 2;
    char buf[512];
    int got = llama_array(g, "tokenizer.ggml.merges", LLAMA_STR, -1, &r, &count, err);
    if (got < 0) return -1;
    if (count > 1 << 26) return llama_fail(err, "too many merges");
    while (slots < 2 * (size_t)count + 2) slots *= 2;
    v->pair = (llama_pair *)malloc(slots * sizeof *v->pair);
    if (!v->pair) return llama_fail(err, "out of memory");
    memset(v->pair, 0xff, slots * sizeof *v->pair);
    v->pair_mask = slots - 1;
    for (uint64_t i = 0; !got && i < count; i++) {
        llama_str s = llama_take_str(&r);
        const char *gap = s.n > 2 ? (const char *)memchr(s.s + 1, ' ', s.n - 1) : NULL;
        if (!gap || s.n > sizeof buf) continue; /* no such tokens: the merge can never apply */
        size_t nl = (size_t)(gap - s.s), nr = s.n - nl - 1;
        memcpy(buf, s.s, nl);
        memcpy(buf + nl, gap + 1, nr);
        int32_t a = llama_lookup(v, s.s, nl), b = llama_lookup(v, gap + 1, nr);
        int32_t id = llama_lookup(v, buf, nl + nr);
        if (a < 0 || b < 0 || id < 0) continue;
        llama_pair *p = llama_pair_at(v, a, b);
        if (p->id < 0) p->left = a, p->right = b, p->id = id, p->rank = (int32_t)i;
    }
    return 0;
}

/* Buckets control and user tokens by first byte, longest first within a bucket. */
static int llama_vocab_special(llama_vocab *v, char *err) {
    int32_t count[257] = {0};
    for (int32_t i = 0; i < v->n; i++)
        if ((v->type[i] == LLAMA_T_CONTROL || v->type[i] == LLAMA_T_USER) && v->piece[i].n)
            count[(uint8_t)v->piece[i].s[0] + 1]++;
    for (int b = 0; b < 256; b++) count[b + 1] += count[b];
    memcpy(v->special_at, count, sizeof count);
    v->special = (int32_t *)malloc(((size_t)count[256] + 1) * sizeof *v->special);
    if (!v->special) return llama_fail(err, "out of memory");
    for (int32_t i = 0; i < v->n; i++) {
        if ((v->type[i] != LLAMA_T_CONTROL && v->type[i] != LLAMA_T_USER) || !v->piece[i].n)
            continue;
        int b = (uint8_t)v->piece[i].s[0];
        int32_t at = count[b]++;
        /* a file may call every token special: keep the insertion cheap then */
        for (int steps = 0; at > v->special_at[b] && steps < 4096 &&
                            v->piece[v->special[at - 1]].n < v->piece[i].n; steps++, at--)
            v->special[at] = v->special[at - 1];
        v->special[at] = i;
    }
    return 0;
}

static void llama_vocab_bytes(llama_vocab *v) {
    for (int b = 0; b < 256; b++) {
        char name[8];
        size_t n;
        if (v->kind == LLAMA_BPE) {
            n = llama_utf8_put(llama_byte_char(b), name);
            v->byte[b] = llama_lookup(v, name, n);
        } else {
            n = (size_t)snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
            v->byte[b] = llama_lookup(v, name, n);
            if (v->byte[b] >= 0) v->type[v->byte[b]] = LLAMA_T_BYTE;
        }
    }
}

static int llama_vocab_pre(llama_vocab *v, const llama_gguf *g, char *err) {
    static const struct { const char *name; int pre, whole; } known[] = {
        {"", LLAMA_PRE_GPT2, 0}, {"default", LLAMA_PRE_GPT2, 0}, {"gpt-2", LLAMA_PRE_GPT2, 0},
        {"llama-bpe", LLAMA_PRE_LLAMA3, 1}, {"llama3", LLAMA_PRE_LLAMA3, 1},
        {"llama-v3", LLAMA_PRE_LLAMA3, 1}, {"qwen2", LLAMA_PRE_QWEN2, 0},
        {"smollm", LLAMA_PRE_SMOLLM, 0}};
    llama_str pre = llama_meta_str(g, "tokenizer.ggml.pre");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (llama_str_is(pre, known[i].name)) {
            v->pre = known[i].pre;
            v->whole_words = known[i].whole;
            return 0;
        }
    return llama_fail(err, "this tokenizer.ggml.pre is not supported "
                           "(gpt-2, default, llama-bpe, qwen2 and smollm are)");
}

static int llama_vocab_load(llama_model *m, char *err) {
    const llama_gguf *g = m->gguf;
    llama_vocab *v = (llama_vocab *)calloc(1, sizeof *v);
    llama_str kind = llama_meta_str(g, "tokenizer.ggml.model");
    if (!v) return llama_fail(err, "out of memory");
    m->vocab = v;
    if (llama_str_is(kind, "llama")) v->kind = LLAMA_SPM;
    else if (llama_str_is(kind, "gpt2")) v->kind = LLAMA_BPE;
    else return llama_fail(err, "tokenizer.ggml.model is neither llama (SPM) nor gpt2 (BPE)");
    if (v->kind == LLAMA_BPE && llama_vocab_pre(v, g, err)) return -1;
    if (llama_vocab_arrays(v, g, err)) return -1;
    m->n_vocab = v->n;
    llama_vocab_bytes(v);
    if (v->kind == LLAMA_BPE && llama_vocab_merges(v, g, err)) return -1;
    if (llama_vocab_special(v, err)) return -1;
    int spm = v->kind == LLAMA_SPM, bos = spm || v->pre == LLAMA_PRE_LLAMA3;
    int32_t last = v->n - 1;
    if (llama_meta_int(g, "tokenizer.ggml.bos_token_id", spm && last > 0 ? 1 : -1, -1, last,
                       &v->bos, err) ||
        llama_meta_int(g, "tokenizer.ggml.eos_token_id", spm && last > 1 ? 2 : -1, -1, last,
                       &v->eos, err) ||
        llama_meta_int(g, "tokenizer.ggml.eot_token_id", -1, -1, last, &v->eot, err) ||
        llama_meta_int(g, "tokenizer.ggml.unknown_token_id", spm ? 0 : -1, -1, last, &v->unk,
                       err) ||
        llama_meta_int(g, "tokenizer.ggml.add_bos_token", bos, 0, 1, &v->add_bos, err) ||
        llama_meta_int(g, "tokenizer.ggml.add_space_prefix", spm, 0, 1, &v->add_prefix, err))
        return -1;
    return 0;
}

static void llama_vocab_free(llama_vocab *v) {
    if (!v) return;
    free(v->piece);
    free(v->score);
    free(v->type);
    free(v->slot);
    free(v->pair);
    free(v->special);
    free(v);
}

int32_t llama_bos(const llama_model *m) { return m->vocab->bos; }

int llama_is_end(const llama_model *m, int32_t id) {
    const llama_vocab *v = m->vocab;
    if (id < 0 || id >= v->n) return 0;
    if (id == v->eos || id == v->eot) return 1;
    return v->type[id] == LLAMA_T_CONTROL && (llama_str_is(v->piece[id], "<|eot_id|>") ||
                                              llama_str_is(v->piece[id], "<|end_of_text|>") ||
                                              llama_str_is(v->piece[id], "<|im_end|>"));
}

size_t llama_piece(const llama_model *m, int32_t id, char *out, size_t cap) {
    const llama_vocab *v = m->vocab;
    size_t n = 0, step;
    if (id < 0 || id >= v->n || v->type[id] == LLAMA_T_CONTROL) return 0;
    llama_str p = v->piece[id];
    if (v->type[id] == LLAMA_T_BYTE) { /* <0xNN>: the name was matched at load, or is of a file
                                          that calls something else a byte: then its text */
        for (int b = 0; b < 256; b++)
            if (v->byte[b] == id) {
                if (cap) out[0] = (char)b;
                return 1;
            }
    }
    for (size_t i = 0; i < p.n; i += step) {
        uint32_t c = llama_utf8(p.s + i, p.n - i, &step);
        int b = -1;
        if (v->kind == LLAMA_SPM && c == 0x2581) b = ' ';
        if (v->kind == LLAMA_BPE && v->type[id] == LLAMA_T_NORMAL) b = llama_char_byte(c);
        for (size_t j = 0; j < (b < 0 ? step : 1); j++, n++)
            if (n < cap) out[n] = b < 0 ? p.s[i + j] : (char)b;
    }
    return n;
}

/* ==== splitting text into words, as the vocabularies' regular expressions do ==== */

/* Unicode 14 categories L* and N*: lengths of alternating runs (outside, inside) from U+0000. */
static const uint16_t llama_letter_runs[] = {
    65, 26, 6, 26, 47, 1, 10, 1, 4, 1, 5, 23, 1, 31, 1, 458, 4, 12, 14, 5, 7, 1, 1, 1, 129, 5,
    1, 2, 2, 4, 1, 1, 6, 1, 1, 3, 1, 1, 1, 20, 1, 83, 1, 139, 8, 166, 1, 38, 2, 1, 6, 41, 71,
    27, 4, 4, 45, 43, 35, 2, 1, 99, 1, 1, 15, 2, 7, 2, 10, 3, 2, 1, 16, 1, 1, 30, 29, 89, 11, 1,
    24, 33, 9, 2, 4, 1, 5, 22, 4, 1, 9, 1, 3, 1, 23, 25, 7, 11, 5, 24, 1, 6, 17, 42, 58, 54, 3,
    1, 18, 1, 7, 10, 15, 16, 4, 8, 2, 2, 2, 22, 1, 7, 1, 1, 3, 4, 3, 1, 16, 1, 13, 2, 1, 3, 14,
    2, 10, 1, 8, 6, 4, 2, 2, 22, 1, 7, 1, 2, 1, 2, 1, 2, 31, 4, 1, 1, 19, 3, 16, 9, 1, 3, 1, 22,
    1, 7, 1, 2, 1, 5, 3, 1, 18, 1, 15, 2, 23, 1, 11, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 30,
    2, 1, 3, 15, 1, 17, 1, 1, 6, 3, 3, 1, 4, 3, 2, 1, 1, 1, 2, 3, 2, 3, 3, 3, 12, 22, 1, 52, 8,
    1, 3, 1, 23, 1, 16, 3, 1, 26, 3, 2, 1, 2, 2, 30, 1, 4, 8, 1, 3, 1, 23, 1, 10, 1, 5, 3, 1,
    31, 2, 1, 2, 15, 2, 17, 9, 1, 3, 1, 41, 2, 1, 16, 1, 5, 3, 8, 3, 24, 6, 5, 18, 3, 24, 1, 9,
    1, 1, 2, 7, 58, 48, 1, 2, 12, 7, 58, 2, 1, 1, 1, 5, 1, 24, 1, 1, 1, 10, 1, 2, 9, 1, 2, 5, 1,
    1, 21, 4, 32, 1, 63, 8, 1, 36, 27, 5, 115, 43, 20, 1, 16, 6, 4, 4, 3, 1, 3, 2, 7, 3, 4, 13,
    12, 1, 17, 38, 1, 1, 5, 1, 2, 43, 1, 333, 1, 4, 2, 7, 1, 1, 1, 4, 2, 41, 1, 4, 2, 33, 1, 4,
    2, 7, 1, 1, 1, 4, 2, 15, 1, 57, 1, 4, 2, 67, 37, 16, 16, 86, 2, 6, 3, 620, 2, 17, 1, 26, 5,
    75, 6, 8, 7, 18, 13, 19, 14, 18, 14, 13, 1, 3, 15, 52, 35, 1, 4, 1, 67, 89, 7, 5, 2, 34, 1,
    1, 5, 70, 10, 31, 49, 30, 2, 5, 11, 44, 4, 26, 54, 23, 9, 53, 82, 1, 93, 47, 17, 8, 54, 30,
    13, 2, 10, 44, 26, 36, 41, 3, 10, 36, 2, 9, 7, 43, 2, 3, 41, 4, 1, 6, 1, 2, 3, 1, 5, 192,
    64, 278, 2, 6, 2, 38, 2, 6, 2, 8, 1, 1, 1, 1, 1, 1, 1, 31, 2, 53, 1, 7, 1, 1, 3, 3, 1, 7, 3,
    4, 2, 6, 4, 13, 5, 3, 1, 7, 116, 1, 13, 1, 16, 13, 101, 1, 4, 1, 2, 10, 1, 1, 3, 5, 6, 1, 1,
    1, 1, 1, 1, 4, 1, 11, 2, 4, 5, 5, 4, 1, 52, 2, 2683, 229, 6, 4, 3, 2, 12, 38, 1, 1, 5, 1, 2,
    56, 7, 1, 16, 23, 9, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 80, 1, 469, 2, 42, 5, 5,
    2, 4, 86, 6, 3, 1, 90, 1, 4, 5, 43, 1, 94, 17, 32, 48, 16, 512, 6592, 64, 22157, 67, 46, 2,
    269, 3, 16, 10, 2, 20, 47, 16, 31, 2, 70, 49, 9, 2, 103, 2, 64, 5, 2, 1, 1, 1, 5, 24, 16, 1,
    3, 1, 4, 1, 23, 29, 52, 14, 50, 62, 6, 3, 1, 1, 2, 11, 28, 10, 23, 25, 29, 7, 47, 28, 1, 16,
    5, 1, 10, 10, 5, 1, 41, 23, 3, 1, 8, 20, 23, 3, 1, 3, 50, 1, 1, 3, 2, 2, 5, 2, 1, 1, 1, 24,
    3, 2, 11, 7, 3, 12, 6, 2, 6, 2, 6, 9, 7, 1, 7, 1, 43, 1, 14, 6, 115, 29, 11172, 12, 23, 4,
    49, 8452, 366, 2, 106, 38, 7, 12, 5, 5, 1, 1, 10, 1, 13, 1, 5, 1, 1, 1, 2, 1, 2, 1, 108, 33,
    363, 18, 64, 2, 54, 40, 12, 116, 5, 1, 135, 36, 26, 6, 26, 11, 89, 3, 6, 2, 6, 2, 6, 2, 3,
    35, 12, 1, 26, 1, 19, 1, 2, 1, 15, 2, 14, 34, 123, 389, 29, 3, 49, 47, 32, 13, 20, 1, 8, 6,
    38, 10, 30, 2, 36, 4, 8, 48, 158, 18, 36, 4, 36, 4, 40, 8, 52, 12, 11, 1, 15, 1, 7, 1, 2, 1,
    11, 1, 15, 1, 7, 1, 2, 67, 311, 9, 22, 10, 8, 24, 6, 1, 42, 1, 9, 69, 6, 2, 1, 1, 44, 1, 2,
    3, 1, 2, 23, 10, 23, 9, 31, 65, 19, 1, 2, 10, 22, 10, 26, 70, 56, 6, 2, 64, 1, 15, 4, 1, 3,
    1, 29, 42, 29, 3, 29, 35, 8, 1, 28, 27, 54, 10, 22, 10, 19, 13, 18, 110, 73, 55, 51, 13, 51,
    13, 36, 348, 42, 6, 2, 78, 29, 10, 1, 8, 22, 42, 18, 46, 21, 27, 23, 12, 53, 57, 2, 2, 1,
    13, 45, 32, 25, 26, 36, 29, 1, 2, 1, 8, 35, 3, 1, 12, 48, 14, 4, 21, 1, 1, 1, 35, 18, 1, 25,
    84, 7, 1, 1, 1, 4, 1, 15, 1, 10, 7, 47, 38, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 18, 1,
    12, 5, 158, 53, 18, 4, 20, 3, 30, 48, 20, 2, 1, 1, 184, 47, 41, 4, 36, 48, 20, 1, 59, 43,
    13, 1, 71, 27, 37, 7, 185, 44, 116, 64, 31, 8, 2, 1, 2, 8, 1, 2, 1, 24, 15, 1, 1, 1, 94, 8,
    2, 39, 16, 1, 1, 1, 28, 1, 10, 40, 7, 1, 21, 1, 11, 46, 19, 1, 18, 73, 263, 9, 1, 37, 17, 1,
    49, 30, 112, 7, 1, 2, 1, 38, 21, 1, 25, 6, 1, 2, 1, 32, 14, 1, 327, 19, 189, 1, 79, 922,
    230, 196, 2636, 97, 15, 1071, 4049, 583, 8633, 569, 7, 31, 17, 79, 17, 30, 18, 48, 16, 4,
    31, 21, 5, 19, 688, 64, 128, 75, 5, 1, 66, 13, 64, 2, 1, 1, 28, 6136, 8, 1238, 42, 9, 8935,
    4, 1, 7, 1, 2, 1, 291, 45, 3, 17, 4, 8, 396, 2308, 107, 5, 13, 3, 9, 7, 10, 5990, 85, 1, 71,
    1, 2, 2, 1, 2, 2, 2, 4, 1, 12, 1, 1, 1, 7, 1, 65, 1, 4, 2, 8, 1, 7, 1, 28, 1, 4, 1, 5, 1, 1,
    3, 7, 1, 340, 2, 25, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 8,
    1844, 31, 481, 45, 10, 7, 16, 1, 321, 30, 18, 44, 1268, 7, 1, 4, 1, 2, 1, 15, 1, 197, 59,
    68, 7, 1, 1204, 4, 1, 27, 1, 2, 1, 1, 2, 1, 1, 10, 1, 4, 1, 1, 1, 1, 6, 1, 4, 1, 1, 1, 1, 1,
    1, 3, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 7, 1, 4, 1, 4, 1, 1, 1,
    10, 1, 17, 5, 3, 1, 5, 1, 17, 4420, 42720, 32, 4153, 7, 222, 2, 5762, 14, 7473, 3103, 542,
    1506, 4939
};
static const uint16_t llama_number_runs[] = {
    48, 10, 120, 2, 5, 1, 2, 3, 1441, 10, 134, 10, 198, 10, 412, 10, 118, 10, 4, 6, 108, 10,
    118, 10, 118, 10, 2, 6, 110, 13, 115, 10, 8, 7, 103, 10, 104, 7, 7, 19, 109, 10, 96, 10,
    118, 10, 70, 20, 268, 10, 70, 10, 719, 20, 881, 3, 239, 10, 6, 10, 22, 10, 300, 10, 128, 11,
    165, 10, 6, 10, 182, 10, 86, 10, 134, 10, 6, 10, 1046, 1, 3, 6, 6, 10, 198, 51, 2, 5, 726,
    60, 78, 22, 630, 30, 1385, 1, 777, 1, 25, 9, 14, 3, 343, 4, 138, 10, 30, 8, 1, 15, 32, 10,
    39, 15, 29536, 10, 188, 10, 320, 6, 154, 10, 38, 10, 198, 10, 22, 10, 86, 10, 406, 10,
    21270, 10, 493, 45, 12, 57, 17, 2, 341, 27, 36, 4, 29, 1, 8, 1, 134, 5, 202, 10, 942, 8, 25,
    7, 39, 9, 75, 5, 22, 6, 160, 2, 2, 16, 2, 46, 64, 9, 52, 2, 30, 3, 75, 5, 104, 8, 24, 8, 41,
    7, 330, 6, 48, 10, 294, 31, 158, 10, 42, 4, 112, 7, 134, 30, 128, 10, 60, 10, 144, 10, 7,
    20, 251, 10, 342, 10, 118, 10, 374, 10, 102, 10, 102, 12, 420, 19, 93, 10, 758, 29, 227, 10,
    70, 10, 534, 21, 1067, 111, 17905, 10, 86, 10, 134, 10, 1, 7, 798, 23, 25673, 20, 108, 25,
    1109, 50, 2368, 10, 422, 10, 1485, 9, 128, 10, 791, 59, 1, 3, 1, 4, 76, 45, 1, 15, 962, 13,
    2787, 10
};

enum { LLAMA_OTHER, LLAMA_LETTER, LLAMA_NUMBER, LLAMA_SPACE, LLAMA_NEWLINE, LLAMA_STOP };

static int llama_in_runs(const uint16_t *run, size_t n, uint32_t c) {
    uint32_t at = 0;
    for (size_t i = 0; i < n; i++) {
        at += run[i];
        if (c < at) return (int)(i & 1);
    }
    return 0;
}

static int llama_class(uint32_t c) {
    if (c == '\r' || c == '\n') return LLAMA_NEWLINE;
    if (c < 128) {
        if ((c | 32) >= 'a' && (c | 32) <= 'z') return LLAMA_LETTER;
        if (c >= '0' && c <= '9') return LLAMA_NUMBER;
        return c == ' ' || (c >= 9 && c <= 13) ? LLAMA_SPACE : LLAMA_OTHER;
    }
    if (c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
        c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000)
        return LLAMA_SPACE;
    if (llama_in_runs(llama_letter_runs, sizeof llama_letter_runs / sizeof(uint16_t), c))
        return LLAMA_LETTER;
    if (llama_in_runs(llama_number_runs, sizeof llama_number_runs / sizeof(uint16_t), c))
        return LLAMA_NUMBER;
    return LLAMA_OTHER;
}

static int llama_class_at(const char *s, size_t n, size_t i, size_t *len) {
    *len = 0;
    return i < n ? llama_class(llama_utf8(s + i, n - i, len)) : LLAMA_STOP;
}

/* End of the run of one class from i; at most max characters. */
static size_t llama_run(const char *s, size_t n, size_t i, int cls, size_t max) {
    size_t len;
    for (; max && llama_class_at(s, n, i, &len) == cls; max--) i += len;
    return i;
}

static int llama_blank(int cls) { return cls == LLAMA_SPACE || cls == LLAMA_NEWLINE; }

/* Length of 's 't 'm 'd 're 've 'll at s, or 0. */
static size_t llama_contraction(const char *s, size_t n, int any_case) {
    static const char *const tail[] = {"s", "t", "m", "d", "re", "ve", "ll"};
    if (n < 2 || s[0] != '\'') return 0;
    for (size_t i = 0; i < sizeof tail / sizeof *tail; i++) {
        size_t k = strlen(tail[i]), j = 0;
        if (n < k + 1) continue;
        while (j < k && (s[1 + j] == tail[i][j] ||
                         (any_case && s[1 + j] >= 'A' && s[1 + j] <= 'Z' &&
                          s[1 + j] + 32 == tail[i][j])))
            j++;
        if (j == k) return k + 1;
    }
    return 0;
}

/* A run of white space gives its last character to the word that follows, unless that is all
 * there is: \s+(?!\S)|\s+ */
static size_t llama_blank_end(const char *s, size_t n, size_t i) {
    size_t e = i, len, last = i;
    while (llama_blank(llama_class_at(s, n, e, &len))) {
        last = e;
        e += len;
    }
    return e == n || last == i ? e : last;
}

/* End of the word at i for
 * gpt-2: '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t llama_word_gpt2(const char *s, size_t n, size_t i) {
    size_t len, j = llama_contraction(s + i, n - i, 0);
    if (j) return i + j;
    j = i + (s[i] == ' ');
    int cls = llama_class_at(s, n, j, &len);
    if (cls == LLAMA_LETTER || cls == LLAMA_NUMBER || cls == LLAMA_OTHER)
        return llama_run(s, n, j, cls, SIZE_MAX);
    return llama_blank_end(s, n, i);
}

/* llama-3 (digits = 3) and qwen2 (digits = 1): (?i:'s|'t|'re|'ve|'m|'ll|'d)
 * |[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t llama_word_llama3(const char *s, size_t n, size_t i, size_t digits) {
    size_t len, next, j = llama_contraction(s + i, n - i, 1), e, end = 0;
    if (j) return i + j;
    int cls = llama_class_at(s, n, i, &len);
    if (cls == LLAMA_LETTER) return llama_run(s, n, i, LLAMA_LETTER, SIZE_MAX);
    if (cls == LLAMA_NUMBER) return llama_run(s, n, i, LLAMA_NUMBER, digits);
    if (cls != LLAMA_NEWLINE && llama_class_at(s, n, i + len, &next) == LLAMA_LETTER)
        return llama_run(s, n, i + len, LLAMA_LETTER, SIZE_MAX);
    j = i + (s[i] == ' ');
    e = llama_run(s, n, j, LLAMA_OTHER, SIZE_MAX);
    if (e > j) return llama_run(s, n, e, LLAMA_NEWLINE, SIZE_MAX);
    for (e = i; llama_blank(cls = llama_class_at(s, n, e, &len));) {
        e += len;
        if (cls == LLAMA_NEWLINE) end = e;
    }
    return end ? end : llama_blank_end(s, n, i);
}

static size_t llama_word(int pre, const char *s, size_t n, size_t i) {
    size_t len, e;
    if (pre == LLAMA_PRE_LLAMA3) return llama_word_llama3(s, n, i, 3);
    if (pre == LLAMA_PRE_QWEN2) return llama_word_llama3(s, n, i, 1);
    if (pre == LLAMA_PRE_SMOLLM) { /* every digit stands alone, gpt-2 sees what is between */
        if (llama_class_at(s, n, i, &len) == LLAMA_NUMBER) return i + len;
        for (e = i; e < n && llama_class_at(s, n, e, &len) != LLAMA_NUMBER;) e += len;
        return llama_word_gpt2(s, e, i);
    }
    return llama_word_gpt2(s, n, i);
}

/* ==== merging ====
 * Both kinds start from characters (SPM) or bytes (BPE) and join the best neighbouring pair until
 * none is left: SPM by the score of the joined piece, BPE by the rank of the merge; leftmost
 * first on ties. A heap holds the candidate pairs; stale ones are recognised by their sizes. */

typedef struct llama_symbol {
    size_t at, n;      /* bytes; n == 0: merged away */
    int64_t prev, next;
    int32_t id;        /* or -1 */
} llama_symbol;

typedef struct llama_bigram {
    double rank;       /* lower is better */
    int64_t left, right;
    size_t n;          /* bytes of the joined piece */
    int32_t id;
} llama_bigram;

typedef struct llama_text {
    const llama_vocab *v;
    const char *s;
    llama_symbol *sym;
    llama_bigram *heap;
    size_t n_sym, n_heap, cap_sym;
    int32_t *ids;
    size_t n_ids, cap_ids;
    int failed;        /* out of memory */
} llama_text;

static void llama_push_id(llama_text *t, int32_t id) {
    if (t->n_ids == t->cap_ids) {
        size_t cap = t->cap_ids ? 2 * t->cap_ids : 256;
        int32_t *p = (int32_t *)realloc(t->ids, cap * sizeof *p);
        if (!p) {
            t->failed = 1;
            return;
        }
        t->ids = p;
        t->cap_ids = cap;
    }
    t->ids[t->n_ids++] = id;
}

static int llama_before(const llama_bigram *a, const llama_bigram *b) {
    return a->rank < b->rank || (a->rank == b->rank && a->left < b->left);
}

static void llama_heap_push(llama_text *t, llama_bigram b) {
    size_t i = t->n_heap++;
    for (; i && llama_before(&b, &t->heap[(i - 1) / 2]); i = (i - 1) / 2)
        t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = b;
}

static llama_bigram llama_heap_pop(llama_text *t) {
    llama_bigram top = t->heap[0], b = t->heap[--t->n_heap];
    size_t i = 0, c;
    while ((c = 2 * i + 1) < t->n_heap) {
        if (c + 1 < t->n_heap && llama_before(&t->heap[c + 1], &t->heap[c])) c++;
        if (!llama_before(&t->heap[c], &b)) break;
        t->heap[i] = t->heap[c];
        i = c;
    }
    t->heap[i] = b;
    return top;
}

static void llama_try_pair(llama_text *t, int64_t left, int64_t right) {
    if (left < 0 || right < 0) return;
    const llama_symbol *a = &t->sym[left], *b = &t->sym[right];
    llama_bigram g = {0, left, right, a->n + b->n, -1};
    if (t->v->kind == LLAMA_SPM) {
        g.id = llama_lookup_text(t->v, t->s + a->at, g.n);
        if (g.id >= 0) g.rank = -(double)t->v->score[g.id];
    } else if (a->id >= 0 && b->id >= 0) {
        const llama_pair *p = llama_pair_at(t->v, a->id, b->id);
        g.id = p->id;
        g.rank = p->rank;
    }
    if (g.id >= 0) llama_heap_push(t, g);
}

static int llama_reserve(llama_text *t, size_t n) {
    if (n <= t->cap_sym) return 0;
    free(t->sym);
    free(t->heap);
    t->sym = (llama_symbol *)malloc(n * sizeof *t->sym);
    t->heap = (llama_bigram *)malloc(3 * n * sizeof *t->heap); /* a merge adds at most two */
    t->cap_sym = t->sym && t->heap ? n : 0;
    t->failed |= !t->cap_sym;
    return t->cap_sym ? 0 : -1;
}

static void llama_emit(llama_text *t, const llama_symbol *a) {
    if (a->id >= 0) {
        llama_push_id(t, a->id);
        return;
    }
    for (size_t i = 0; i < a->n; i++) {
        int32_t id = t->v->byte[(uint8_t)t->s[a->at + i]];
        if (id < 0) id = t->v->unk;
        if (id >= 0) llama_push_id(t, id);
    }
}

/* Tokens of the bytes from..end of t->s, without looking outside. */
static void llama_merge(llama_text *t, size_t from, size_t end) {
    const llama_vocab *v = t->v;
    size_t len = 1;
    int64_t n = 0;
    if (from == end || llama_reserve(t, end - from)) return;
    t->n_heap = 0;
    for (size_t i = from; i < end; i += len, n++) {
        llama_symbol *a = &t->sym[n];
        if (v->kind == LLAMA_SPM) llama_utf8(t->s + i, end - i, &len);
        a->at = i;
        a->n = len;
        a->prev = n - 1;
        a->next = i + len < end ? n + 1 : -1;
        a->id = v->kind == LLAMA_SPM ? llama_lookup_text(v, t->s + i, len)
                                     : v->byte[(uint8_t)t->s[i]];
    }
    for (int64_t i = 0; i + 1 < n; i++) llama_try_pair(t, i, i + 1);
    while (t->n_heap) {
        llama_bigram g = llama_heap_pop(t);
        llama_symbol *a = &t->sym[g.left], *b = &t->sym[g.right];
        if (!a->n || !b->n || a->n + b->n != g.n || a->next != g.right) continue;
        a->n = g.n;
        a->id = g.id;
        a->next = b->next;
        b->n = 0;
        if (b->next >= 0) t->sym[b->next].prev = g.left;
        llama_try_pair(t, a->prev, g.left);
        llama_try_pair(t, g.left, a->next);
    }
    for (int64_t i = 0; i >= 0; i = t->sym[i].next) llama_emit(t, &t->sym[i]);
}

/* Plain text between special tokens. */
static void llama_fragment(llama_text *t, const char *s, size_t n, int first) {
    const llama_vocab *v = t->v;
    if (!n || t->failed) return;
    if (v->kind == LLAMA_SPM) { /* spaces become U+2581, with one more in front if asked */
        char *buf = (char *)malloc(3 * n + 3);
        size_t k = 0;
        if (!buf) {
            t->failed = 1;
            return;
        }
        if (v->add_prefix && first) memcpy(buf, "\xe2\x96\x81", 3), k = 3;
        for (size_t i = 0; i < n; i++)
            if (s[i] == ' ') memcpy(buf + k, "\xe2\x96\x81", 3), k += 3;
            else buf[k++] = s[i];
        t->s = buf;
        llama_merge(t, 0, k);
        free(buf);
        return;
    }
    t->s = s;
    for (size_t i = 0, e; i < n && !t->failed; i = e) {
        e = llama_word(v->pre, s, n, i);
        int32_t id = -1;
        if (v->whole_words && e - i <= 64) {
            char mapped[128];
            size_t k = 0;
            for (size_t j = i; j < e; j++)
                k += llama_utf8_put(llama_byte_char((uint8_t)s[j]), mapped + k);
            id = llama_lookup_text(v, mapped, k);
        }
        if (id >= 0) llama_push_id(t, id);
        else llama_merge(t, i, e);
    }
}

/* The special token written at s, or -1. User-defined ones always count. */
static int32_t llama_special_at(const llama_vocab *v, const char *s, size_t n, int control) {
    int b = (uint8_t)s[0];
    for (int32_t i = v->special_at[b]; i < v->special_at[b + 1]; i++) {
        int32_t id = v->special[i];
        llama_str p = v->piece[id];
        if (p.n <= n && (control || v->type[id] == LLAMA_T_USER) && !memcmp(p.s, s, p.n))
            return id;
    }
    return -1;
}

int32_t *llama_tokenize(const llama_model *m, const char *text, size_t n_bytes, int flags,
                        size_t *n_ids) {
    const llama_vocab *v = m->vocab;
    llama_text t;
    size_t from = 0, i = 0;
    int first = 1;
    memset(&t, 0, sizeof t);
    t.v = v;
    *n_ids = 0;
    if (n_bytes > (size_t)1 << 28) return NULL;
    if ((flags & LLAMA_ADD_BOS) && v->add_bos && v->bos >= 0) llama_push_id(&t, v->bos);
    while (i < n_bytes && !t.failed) {
        int32_t id = llama_special_at(v, text + i, n_bytes - i, flags & LLAMA_PARSE_SPECIAL);
        if (id < 0) {
            i++;
            continue;
        }
        llama_fragment(&t, text + from, i - from, first);
        llama_push_id(&t, id);
        first = 1;
        from = i += v->piece[id].n;
    }
    llama_fragment(&t, text + from, n_bytes - from, first);
    free(t.sym);
    free(t.heap);
    if (!t.failed && !t.ids) t.ids = (int32_t *)malloc(sizeof *t.ids); /* no text, no tokens */
    if (t.failed) {
        free(t.ids);
        return NULL;
    }
    *n_ids = t.n_ids;
    return t.ids;
}

/* ==== sampling ==== */

typedef struct llama_choice {
    float p;
    int32_t id;
} llama_choice;

static int llama_choice_cmp(const void *a, const void *b) {
    const llama_choice *x = (const llama_choice *)a, *y = (const llama_choice *)b;
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static double llama_uniform(uint64_t *state) { /* splitmix64, 53 bits */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

int32_t llama_sample(llama_sampler *s, const float *logits, int32_t n) {
    int32_t best = 0, kept = 0, k;
    for (int32_t i = 1; i < n; i++)
        if (logits[i] > logits[best] || isnan(logits[best])) best = i;
    if (!(s->temp > 0)) return best;
    llama_choice *c = (llama_choice *)malloc((size_t)n * sizeof *c);
    if (!c) return -1;
    for (int32_t i = 0; i < n; i++) { /* e^-30 of the best: never drawn, and not worth sorting */
        float d = (logits[i] - logits[best]) / s->temp;
        if (d > -30.0f) c[kept].p = expf(d), c[kept++].id = i;
    }
    if (!kept) c[0].p = 1.0f, c[0].id = best, kept = 1; /* all NaN */
    qsort(c, (size_t)kept, sizeof *c, llama_choice_cmp);
    if (s->top_k > 0 && s->top_k < kept) kept = s->top_k;
    double sum = 0, part = 0, u;
    for (int32_t i = 0; i < kept; i++) sum += (double)c[i].p;
    for (k = 0; k < kept && s->top_p < 1.0f; k++) { /* smallest set that holds top_p */
        part += (double)c[k].p;
        if (part >= (double)s->top_p * sum) kept = k + 1, sum = part;
    }
    u = llama_uniform(&s->rng) * sum;
    for (k = 0; k + 1 < kept && u >= (double)c[k].p; k++) u -= (double)c[k].p;
    int32_t id = c[k].id;
    free(c);
    return id;
}

#endif /* LLAMA_IMPLEMENTED */
#endif /* LLAMA_IMPLEMENTATION */

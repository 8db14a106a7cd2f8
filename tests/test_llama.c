/* test_llama.c - examples/llama.h by itself: the shipped model against golden.json with a naive
 * double-precision attention, batch and thread independence, the pool, sampling, broken files.
 *
 *   cc -std=c99 -O2 -Iexamples tests/test_llama.c -o test_llama -pthread -lm && ./test_llama
 *
 * Run from the repository root. With arguments it is the other half of test_llama_py.py:
 *   test_llama rows FILE TENSOR     a tensor's rows as raw f32 on stdout
 *   test_llama ids FILE FLAGS       token ids of the text on stdin, one a line
 *   test_llama text FILE            bytes of the token ids on stdin
 *   test_llama logits FILE F32_BYTES  logits of the last of the ids on stdin, raw f32
 *   test_llama load FILE            exit 0, or 1 with the error on stdout */
#define LLAMA_IMPLEMENTATION
#include "llama.h"
#ifndef LLAMA_USE_CBLAS
#define SAME_BITS 1
#else
#define SAME_BITS 0
#endif

static int n_passed, n_failed;

#define CHECK(ok, ...)                                            \
    do {                                                          \
        if (ok) {                                                 \
            n_passed++;                                           \
        } else {                                                  \
            n_failed++;                                           \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #ok);       \
            printf(__VA_ARGS__);                                  \
            printf("\n");                                         \
        }                                                         \
    } while (0)

static void *need(void *p) {
    if (!p) {
        printf("out of memory\n");
        exit(2);
    }
    return p;
}

/* ---- naive attention: one query row, f64, dense causal ---- */

typedef struct cache { /* one per layer: (n_ctx, n_kv_heads * dim) */
    float *k, *v;
} cache;

static void attend(const llama_model *m, const cache *c, const float *q, int pos, float *out) {
    int group = m->n_heads / m->n_kv_heads, hd = m->head_dim, vd = m->v_head_dim;
    double *p = (double *)need(malloc(((size_t)pos + 1) * sizeof *p));
    for (int h = 0; h < m->n_heads; h++) {
        double top = -1e300, sum = 0;
        for (int t = 0; t <= pos; t++) {
            const float *k = c->k + ((int64_t)t * m->n_kv_heads + h / group) * hd;
            double dot = 0;
            for (int i = 0; i < hd; i++) dot += (double)q[h * hd + i] * (double)k[i];
            p[t] = dot / sqrt((double)hd);
            if (p[t] > top) top = p[t];
        }
        for (int t = 0; t <= pos; t++) sum += p[t] = exp(p[t] - top);
        for (int i = 0; i < vd; i++) {
            double o = 0;
            for (int t = 0; t <= pos; t++)
                o += p[t] * (double)c->v[((int64_t)t * m->n_kv_heads + h / group) * vd + i];
            out[h * vd + i] = (float)(o / sum);
        }
    }
    free(p);
}

/* The tasks of each operation in a strange order: every step-th, around and around. */
static void run_sliced(llama_op *ops, int n) {
    for (int i = 0; i < n; i++) {
        int64_t tasks = ops[i].n_tasks, step = 7, at = 0;
        for (int64_t a = tasks, b = step, t; b; t = a % b, a = b, b = t)
            if (a % b == 0 && b > 1) step = 1; /* a common factor would miss some */
        for (int64_t t = 0; t < tasks; t++, at = (at + step) % tasks)
            ops[i].fn(&ops[i].ctx, at, (int32_t)(t % 3));
    }
}

/* Runs n tokens from position pos and writes the logits of the last one. */
static void forward(const llama_model *m, llama_pool *pool, llama_state *s, cache *c,
                    const int32_t *ids, int pos, int n, int sliced, float *logits) {
    llama_op ops[LLAMA_MAX_OPS];
    int32_t *where = (int32_t *)need(malloc((size_t)n * sizeof *where)), last = n - 1;
    size_t kw = (size_t)m->n_kv_heads * (size_t)m->head_dim;
    size_t vw = (size_t)m->n_kv_heads * (size_t)m->v_head_dim;
    for (int i = 0; i < n; i++) where[i] = pos + i;
    if (sliced) run_sliced(ops, llama_embed_ops(m, s, ids, where, n, ops));
    else llama_embed(m, pool, s, ids, where, n);
    for (int l = 0; l < m->n_layers; l++) {
        if (sliced) run_sliced(ops, llama_qkv_ops(m, s, l, ops));
        else llama_qkv(m, pool, s, l);
        memcpy(c[l].k + (size_t)pos * kw, s->k, (size_t)n * kw * sizeof(float));
        memcpy(c[l].v + (size_t)pos * vw, s->v, (size_t)n * vw * sizeof(float));
        for (int i = 0; i < n; i++)
            attend(m, &c[l], s->q + (int64_t)i * m->n_heads * m->head_dim, pos + i,
                   s->att + (int64_t)i * m->n_heads * m->v_head_dim);
        if (sliced) run_sliced(ops, llama_out_ops(m, s, l, ops));
        else llama_out(m, pool, s, l);
    }
    if (sliced) run_sliced(ops, llama_logits_ops(m, s, &last, 1, logits, ops));
    else llama_logits(m, pool, s, &last, 1, logits);
    free(where);
}

static cache *cache_create(const llama_model *m, size_t n) {
    cache *c = (cache *)need(calloc((size_t)m->n_layers, sizeof *c));
    for (int l = 0; l < m->n_layers; l++) {
        c[l].k = (float *)need(
            calloc(n * (size_t)m->n_kv_heads * (size_t)m->head_dim, sizeof(float)));
        c[l].v = (float *)need(
            calloc(n * (size_t)m->n_kv_heads * (size_t)m->v_head_dim, sizeof(float)));
    }
    return c;
}

static void cache_free(const llama_model *m, cache *c) {
    for (int l = 0; l < m->n_layers; l++) {
        free(c[l].k);
        free(c[l].v);
    }
    free(c);
}

static char *read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    size_t cap = 0;
    char *p = NULL;
    *n = 0;
    if (!f) return NULL;
    do {
        if (*n + 65536 > cap) p = (char *)need(realloc(p, (cap = 2 * cap + 65537) + 1));
        *n += fread(p + *n, 1, 65536, f);
    } while (!feof(f) && !ferror(f));
    fclose(f);
    p[*n] = 0;
    return p;
}

/* ---- golden.json: only what that file needs of JSON ---- */

static const char *json_key(const char *p, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    p = strstr(p, quoted);
    return p ? p + strlen(quoted) : NULL;
}

static size_t json_string(const char *p, char *out, size_t cap) {
    size_t n = 0;
    for (p = strchr(p, '"') + 1; *p && *p != '"' && n < cap; p++) {
        if (*p == '\\') {
            p++;
            out[n++] = *p == 'n' ? '\n' : *p == 't' ? '\t' : *p;
        } else {
            out[n++] = *p;
        }
    }
    return n;
}

/* All numbers up to the bracket that closes the array at p. */
static int json_numbers(const char *p, double *out, int cap) {
    int n = 0, depth = 0;
    for (;; p++) {
        if (*p == '[') depth++;
        else if (*p == ']' && --depth == 0) return n;
        else if (!*p) return n;
        else if (n < cap && (*p == '-' || (*p >= '0' && *p <= '9'))) {
            char *end;
            out[n++] = strtod(p, &end);
            p = end - 1;
        }
    }
}

enum { CAP = 4096 };

static void golden_one(const llama_model *m, llama_pool *pool, const char *item) {
    static char prompt[CAP];
    static double want[CAP], top[10], first[8], greedy[CAP];
    size_t len = json_string(json_key(item, "prompt"), prompt, CAP), n;
    int n_want = json_numbers(json_key(item, "tokens"), want, CAP);
    int n_top = json_numbers(json_key(item, "last_logits_top5"), top, 10) / 2;
    int n_first = json_numbers(json_key(item, "last_logits_first8"), first, 8);
    int n_greedy = json_numbers(json_key(item, "greedy_tokens"), greedy, CAP);
    int32_t *ids = llama_tokenize(m, prompt, len, LLAMA_ADD_BOS, &n), next;
    double worst = 0;
    int same = (int)n == n_want, right = 0;
    for (int i = 0; i < n_want && same; i++) same = ids[i] == (int32_t)want[i];
    CHECK(same, "token ids of the golden prompt");
    if (!same || n + (size_t)n_greedy > CAP) {
        free(ids);
        return;
    }
    cache *c = cache_create(m, n + (size_t)n_greedy);
    llama_state *s = llama_state_create(m, (int32_t)n);
    float *logits = (float *)need(malloc((size_t)m->n_vocab * sizeof *logits));
    llama_sampler pick = {0, 1, 0, 0};
    forward(m, pool, s, c, ids, 0, (int)n, 0, logits);
    for (int i = 0; i < n_top; i++)
        worst = fmax(worst, fabs((double)logits[(int)top[2 * i]] - top[2 * i + 1]));
    for (int i = 0; i < n_first; i++) worst = fmax(worst, fabs((double)logits[i] - first[i]));
    CHECK(n_top == 5 && n_first == 8 && worst < 2e-3, "logits off by %g", worst);
    for (int i = 0; i < n_greedy; i++) {
        next = llama_sample(&pick, logits, m->n_vocab);
        right += next == (int32_t)greedy[i];
        forward(m, pool, s, c, &next, (int)n + i, 1, 0, logits);
    }
    CHECK(n_greedy > 0 && right == n_greedy, "%d of %d greedy tokens", right, n_greedy);
    printf("golden: %d tokens, logits within %.1e, %d greedy tokens\n", (int)n, worst, right);
    free(ids);
    free(logits);
    llama_state_free(s);
    cache_free(m, c);
}

static void test_golden(const llama_model *m, llama_pool *pool) {
    size_t n;
    char *json = read_file("examples/models/golden.json", &n);
    CHECK(json != NULL, "golden.json can be read");
    int items = 0;
    for (const char *p = json; p && (p = strstr(p, "\"prompt\":")) != NULL; p += 9, items++)
        golden_one(m, pool, p);
    CHECK(items == 3, "%d golden prompts", items);
    free(json);
}

/* ---- bits: batch size, thread count, packed or converted ---- */

static uint32_t noise(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

static void test_matmul(void) {
    enum { N = 77, IN = 300, OUT = 147 };
    static uint8_t raw[IN * OUT * 4];
    static float w[OUT * IN], x[N * IN], all[N * OUT], one[OUT], part[N * OUT];
    uint32_t rng = 1;
    double worst = 0;
    for (int i = 0; i < OUT * IN; i++) w[i] = (float)(noise(&rng) >> 8) * 0x1p-23f - 1.0f;
    for (int i = 0; i < N * IN; i++) x[i] = (float)(noise(&rng) >> 8) * 0x1p-23f - 1.0f;
    memcpy(raw, w, sizeof raw);
    llama_weight W = {raw, LLAMA_F32, IN, OUT, IN * 4, NULL};
    float *arena = (float *)need(malloc(sizeof(float) * (OUT + 256) * IN));
    W.f32 = arena;
    llama_convert_ctx conv = {&W, arena};
    for (int p = 0; p * LLAMA_NR < OUT; p++) llama_convert_task(&conv, p, 0);
    for (int threads = 1; threads <= 7; threads += 3) {
        llama_pool *pool = llama_pool_create(threads);
        llama_matmul(pool, &W, x, N, threads == 1 ? all : part);
        if (threads > 1) CHECK(!memcmp(all, part, sizeof all), "%d threads", threads);
        llama_pool_free(pool);
    }
    for (int t = 0; t < N; t++)
        for (int r = 0; r < OUT; r++) {
            double y = 0;
            for (int k = 0; k < IN; k++) y += (double)x[t * IN + k] * (double)w[r * IN + k];
            worst = fmax(worst, fabs(y - (double)all[t * OUT + r]));
        }
    CHECK(worst < 1e-4, "matmul off by %g", worst);
    int same = 1;
    for (int t = 0; t < N; t++) {
        llama_matmul(NULL, &W, x + t * IN, 1, one);
        same &= !memcmp(one, all + t * OUT, sizeof one);
    }
    CHECK(same || !SAME_BITS, "a token alone gives other bits than in a batch");
    for (int n = 2; n < 20; n++) {
        llama_matmul(NULL, &W, x, n, part);
        same &= !memcmp(part, all, (size_t)n * OUT * sizeof *all);
    }
    CHECK(same || !SAME_BITS, "bits depend on the batch size");
#ifndef LLAMA_USE_CBLAS
    W.f32 = NULL;
    llama_matmul(NULL, &W, x, N, part);
    CHECK(!memcmp(part, all, sizeof all), "packed weights give other bits");
#endif
    free(arena);
}

static void test_state_bits(const llama_model *m, llama_pool *pool) {
    enum { N = 50 };
    int32_t ids[N];
    uint32_t rng = 7;
    for (int i = 0; i < N; i++) ids[i] = (int32_t)(noise(&rng) >> 8) % m->n_vocab;
    float *a = (float *)need(malloc((size_t)m->n_vocab * 2 * sizeof *a)), *b = a + m->n_vocab;
    llama_state *s = llama_state_create(m, N);
    cache *c = cache_create(m, N);
    forward(m, pool, s, c, ids, 0, N, 0, a);
    for (int at = 0, step = 1; at < N; at += step, step = step * 2 + 1) {
        if (step > N - at) step = N - at;
        forward(m, NULL, s, c, ids + at, at, step, 0, b);
    }
    CHECK(!memcmp(a, b, (size_t)m->n_vocab * sizeof *a) || !SAME_BITS,
          "prefill in chunks gives other bits");
    forward(m, NULL, s, c, ids, 0, N, 1, b);
    CHECK(!memcmp(a, b, (size_t)m->n_vocab * sizeof *a) || !SAME_BITS,
          "operations in slices give other bits");
    free(a);
    llama_state_free(s);
    cache_free(m, c);
}

/* ---- pool, sampler ---- */

static void count_task(void *ctx, int64_t task, int32_t thread) {
    int32_t *hits = (int32_t *)ctx;
    (void)thread;
    __atomic_add_fetch(&hits[task], 1, __ATOMIC_RELAXED);
}

static void test_pool(void) {
    static int32_t hits[1000];
    for (int threads = 1; threads <= 5; threads++) {
        llama_pool *pool = llama_pool_create(threads);
        int ok = pool != NULL, runs = 200;
        memset(hits, 0, sizeof hits);
        for (int r = 0; r < runs; r++) llama_pool_run(pool, count_task, hits, 1 + r * 5);
        for (int i = 0; i < 1000; i++) {
            int want = 0;
            for (int r = 0; r < runs; r++) want += i < 1 + r * 5;
            ok &= hits[i] == want;
        }
        CHECK(ok, "every task runs once with %d threads", threads);
        llama_pool_free(pool);
    }
    CHECK(!llama_pool_create(0) && !llama_pool_create(-3), "no pool without threads");
}

static void test_sampler(void) {
    float logits[5] = {1.0f, 3.0f, 3.0f, -2.0f, 0.0f};
    llama_sampler s = {0, 1, 0, 1};
    int count[5] = {0};
    CHECK(llama_sample(&s, logits, 5) == 1, "greedy takes the first of equals");
    s.temp = 1;
    for (int i = 0; i < 20000; i++) count[llama_sample(&s, logits, 5)]++;
    CHECK(abs(count[1] - count[2]) < 500 && count[0] > 800 && count[0] < 1500,
          "temperature 1: %d %d %d", count[0], count[1], count[2]);
    s.top_k = 2;
    memset(count, 0, sizeof count);
    for (int i = 0; i < 1000; i++) count[llama_sample(&s, logits, 5)]++;
    CHECK(count[1] + count[2] == 1000 && count[1] > 400, "top-k 2");
    s.top_k = 0;
    s.top_p = 0.3f;
    memset(count, 0, sizeof count);
    for (int i = 0; i < 1000; i++) count[llama_sample(&s, logits, 5)]++;
    CHECK(count[1] == 1000, "top-p keeps the smallest set");
    logits[0] = logits[1] = logits[2] = logits[3] = logits[4] = (float)NAN;
    int32_t id = llama_sample(&s, logits, 5);
    CHECK(id >= 0 && id < 5, "NaN logits");
}

/* ---- broken files ---- */

static int loads(const char *path, char *err) {
    llama_model *m = llama_load(path, NULL, 1, err);
    if (!m) return 0;
    float *row = (float *)need(malloc((size_t)m->d_model * sizeof *row));
    size_t n;
    llama_weight_row(&m->output, m->n_vocab - 1, row);
    int32_t *ids = llama_tokenize(m, "<s> a\xff<0x0A>\n1", 14, 3, &n);
    char piece[64];
    for (size_t i = 0; ids && i < n; i++) llama_piece(m, ids[i], piece, sizeof piece);
    for (int32_t i = 0; i < m->n_vocab; i += 7) llama_piece(m, i, piece, 2);
    free(ids);
    free(row);
    llama_free(m);
    return 1;
}

static int put(const char *path, const char *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    int ok = f && fwrite(bytes, 1, n, f) == n;
    if (f) ok &= !fclose(f);
    return ok;
}

static void test_broken(const llama_model *m) {
    const char *path = "test_llama.tmp.gguf";
    size_t n, header = m->gguf->data, opened = 0, silent = 0, flips = 0, ok_flips = 0;
    char *bytes = read_file("examples/models/recall.gguf", &n), err[LLAMA_ERR_BYTES];
    uint32_t rng = 99;
    for (size_t cut = 0; cut < header + 4096; cut += 64) {
        err[0] = 0;
        if (!put(path, bytes, cut)) silent++;
        opened += (size_t)loads(path, err);
        silent += !err[0];
    }
    if (!put(path, bytes, n - 1)) silent++;
    opened += (size_t)loads(path, err);
    CHECK(opened == 0 && silent == 0, "%zu truncated files opened, %zu without message", opened,
          silent);
    FILE *f = put(path, bytes, n) ? fopen(path, "r+b") : NULL;
    for (; f && flips < 3000; flips++) { /* mostly early: that is where the counts are */
        size_t at = noise(&rng) % (flips % 3 ? header : 400);
        int c = (uint8_t)bytes[at] ^ (flips % 5 ? 1 << (noise(&rng) >> 28 & 7) : 0xff);
        err[0] = 0;
        if (fseek(f, (long)at, SEEK_SET) || fputc(c, f) == EOF || fflush(f)) break;
        int good = loads(path, err);
        ok_flips += (size_t)good;
        silent += !good && !err[0];
        if (fseek(f, (long)at, SEEK_SET) || fputc((uint8_t)bytes[at], f) == EOF || fflush(f)) break;
    }
    if (f) fclose(f);
    CHECK(flips == 3000 && silent == 0, "%zu flips, %zu failures without message", flips, silent);
    printf("broken files: %zu of %zu flipped files still open\n", ok_flips, flips);
    remove(path);
    CHECK(!loads(path, err) && !loads(".", err) && !loads("LICENSE", err), "not model files");
    free(bytes);
}

/* ---- commands for test_llama_py.py ---- */

static int32_t *read_ids(size_t *n) {
    size_t cap = 0;
    int32_t *ids = NULL;
    long id;
    for (*n = 0; scanf("%ld", &id) == 1; ids[(*n)++] = (int32_t)id)
        if (*n == cap) ids = (int32_t *)need(realloc(ids, (cap = cap * 2 + 64) * sizeof *ids));
    return ids;
}

static int command(const llama_model *m, llama_pool *pool, int argc, char **argv) {
    size_t n;
    if (!strcmp(argv[1], "rows") && argc > 3) {
        const llama_tensor *t = llama_tensor_find(m->gguf, argv[3]);
        llama_weight w;
        char err[LLAMA_ERR_BYTES];
        memset(&w, 0, sizeof w);
        if (!t || llama_bind(m->gguf, argv[3], (int64_t)t->dims[0], (int64_t)t->dims[1], 0, &w,
                             err))
            return 1;
        float *row = (float *)need(malloc((size_t)w.n_in * sizeof *row));
        for (int64_t r = 0; r < w.n_out; r++) {
            llama_weight_row(&w, r, row);
            fwrite(row, sizeof *row, (size_t)w.n_in, stdout);
        }
        free(row);
    } else if (!strcmp(argv[1], "ids") && argc > 3) {
        static char text[1 << 20];
        size_t len = fread(text, 1, sizeof text, stdin);
        int32_t *ids = llama_tokenize(m, text, len, atoi(argv[3]), &n);
        for (size_t i = 0; i < n; i++) printf("%d\n", (int)ids[i]);
        free(ids);
    } else if (!strcmp(argv[1], "text")) {
        int32_t *ids = read_ids(&n);
        char piece[4096];
        for (size_t i = 0; i < n; i++)
            fwrite(piece, 1, llama_piece(m, ids[i], piece, sizeof piece), stdout);
        free(ids);
    } else if (!strcmp(argv[1], "logits")) {
        int32_t *ids = read_ids(&n);
        float *logits = (float *)need(malloc((size_t)m->n_vocab * sizeof *logits));
        llama_state *s = (llama_state *)need(llama_state_create(m, (int32_t)n));
        cache *c = cache_create(m, n);
        forward(m, pool, s, c, ids, 0, (int)n, 0, logits);
        fwrite(logits, sizeof *logits, (size_t)m->n_vocab, stdout);
        cache_free(m, c);
        llama_state_free(s);
        free(logits);
        free(ids);
    }
    return 0;
}

int main(int argc, char **argv) {
    char err[LLAMA_ERR_BYTES];
    llama_pool *pool = (llama_pool *)need(llama_pool_create(2));
    const char *path = argc > 2 ? argv[2] : "examples/models/recall.gguf";
    size_t limit = argc > 3 && !strcmp(argv[1], "logits") ? (size_t)atol(argv[3]) : 0;
    llama_model *m = llama_load(path, pool, limit, err);
    int rc = 0;
    if (!m) {
        printf("%s: %s\n", path, err);
        rc = 1;
    } else if (argc > 2) {
        rc = command(m, pool, argc, argv);
    } else {
        test_pool();
        test_sampler();
        test_matmul();
        test_state_bits(m, pool);
        test_golden(m, pool);
        test_broken(m);
        printf("%d passed, %d failed\n", n_passed, n_failed);
        rc = n_failed != 0;
    }
    llama_free(m);
    llama_pool_free(pool);
    return rc;
}

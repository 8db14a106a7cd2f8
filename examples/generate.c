/* generate.c - the main job: many questions about one document, answered by a llama-architecture
 * model with continuous batching over paged KV that requests share through a prefix tree.
 *
 *   cc -O3 -march=native -ffp-contract=fast -I. examples/generate.c -o generate -pthread -lm
 *
 * and with --device cuda, which runs the same batches of the same tree on a GPU:
 *
 *   nvcc -O3 -arch=native -DGENERATE_CUDA -I. examples/generate.c examples/llama_cuda.cu
 *        -o generate_cuda -lcublas          (in one line)
 *
 * Every scheduler step builds one ragged batch: a row for each answer being decoded and chunks of
 * the prompts still being read. The tree says which tokens of a prompt have their K and V in some
 * page already, so no chunk is computed twice. `generate --help` lists the options. */
#define LLAMA_IMPLEMENTATION
#include "llama.h"
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
#ifdef GENERATE_CUDA
#undef ATTN_IMPLEMENTATION /* llama_cuda.cu has that of the CUDA backend */
#include "attn_cuda.cuh"
#include "llama_cuda.h"
#endif

#include <errno.h>
#include <sys/resource.h>
#include <time.h>

/* ==== options ==== */

typedef struct options {
    const char *model, *document, *questions, *prompt, *mask_text, *kv_text, *isa, *device;
    int32_t no_share, json, threads, n_predict, page, chunk, batch, every, kv_mem, top_k, seed;
    float temp, top_p;
    attn_dtype kv;
    attn_numerics numerics;
    attn_mask mask;
} options;

static const char usage[] =
    "generate: answers questions about a document with a llama-architecture GGUF model\n"
    "\n"
    "  --model FILE       GGUF file                    (examples/models/recall.gguf)\n"
    "  --document FILE    text that all requests share (examples/data/document.txt)\n"
    "  --questions FILE   lines question<TAB>expected  (examples/data/questions.txt)\n"
    "  --prompt TEXT      complete TEXT instead\n"
    "  --no-share         every request reads the document on its own\n"
    "  --mask M           dense | window:LEFT[,SINK] | stride:BLOCK,LOCAL,STRIDE (dense)\n"
    "  --kv TYPE          f32 | f16 | bf16 | fp8 | int8 | int4 (f32)\n"
    "  --kv-mem MIB       limit of the KV pages        (4096)\n"
    "  --page N           tokens per page              (32)\n"
    "  --chunk N          tokens per scheduler step    (512)\n"
    "  --batch N          requests at a time           (64)\n"
    "  --every N          a request arrives every N steps (1)\n"
    "  --device D         cpu | cuda                   (cpu)\n"
    "  --threads N        (all cores)\n"
    "  --numerics X       fast | portable | approx     (fast)\n"
    "  --isa NAME         force an instruction set     (the best one)\n"
    "  --n-predict N      tokens per answer at most    (32; 128 with --prompt)\n"
    "  --temp T --top-k K --top-p P --seed S           (0: greedy; 40; 0.95; 1)\n"
    "  --json             one JSON object on stdout and nothing else\n";

__attribute__((format(printf, 1, 2))) static int complain(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "generate: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    return -1;
}

/* Up to cap comma-separated integers >= 0; how many, or -1. */
static int parse_list(const char *s, int32_t *out, int cap) {
    int n = 0;
    for (;; s++) {
        char *end;
        if (*s < '0' || *s > '9' || n == cap) return -1;
        errno = 0;
        long v = strtol(s, &end, 10);
        if (errno || v > 1 << 30) return -1;
        out[n++] = (int32_t)v;
        if (!*end) return n;
        if (*end != ',') return -1;
        s = end;
    }
}

static int parse_mask(const char *s, attn_mask *m) {
    int32_t v[3] = {0, 0, 0};
    int n;
    if (!strcmp(s, "dense")) return 0;
    if (!strncmp(s, "window:", 7) && (n = parse_list(s + 7, v, 2)) >= 1) {
        m->window_left = v[0] + 1;
        m->n_sink = v[1];
        return 0;
    }
    if (!strncmp(s, "stride:", 7) && parse_list(s + 7, v, 3) == 3 && v[0] && v[1] && v[2]) {
        m->stride.block = v[0];
        m->stride.local = v[1];
        m->stride.stride = v[2];
        return 0;
    }
    return complain("--mask %s: want dense, window:LEFT[,SINK] or stride:BLOCK,LOCAL,STRIDE", s);
}

static int parse_kv(const char *s, attn_dtype *out) {
    static const struct { const char *name; attn_dtype type; } known[] = {
        {"f32", ATTN_F32}, {"f16", ATTN_F16}, {"bf16", ATTN_BF16},
        {"fp8", ATTN_F8E4M3}, {"int8", ATTN_I8}, {"int4", ATTN_I4}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(s, known[i].name)) {
            *out = known[i].type;
            return 0;
        }
    return complain("--kv %s: want f32, f16, bf16, fp8, int8 or int4", s);
}

static int parse_numerics(const char *s, attn_numerics *out) {
    if (!strcmp(s, "fast")) *out = ATTN_NUMERICS_FAST;
    else if (!strcmp(s, "portable")) *out = ATTN_NUMERICS_PORTABLE;
    else if (!strcmp(s, "approx")) *out = ATTN_NUMERICS_APPROX;
    else return complain("--numerics %s: want fast, portable or approx", s);
    return 0;
}

typedef struct option {
    const char *name;
    const char **text;  /* one of text, number, real is set; flags take no value */
    int32_t *number, lo, hi;
    float *real;
    int flag;
} option;

static int parse_value(const option *op, const char *v) {
    char *end;
    errno = 0;
    if (op->text) {
        *op->text = v;
    } else if (op->number) {
        long n = strtol(v, &end, 10);
        if (errno || end == v || *end || n < op->lo || n > op->hi)
            return complain("%s %s: want a number from %d to %d", op->name, v, (int)op->lo,
                            (int)op->hi);
        *op->number = (int32_t)n;
    } else {
        double x = strtod(v, &end);
        if (end == v || *end || !(x >= 0 && x <= 1e6))
            return complain("%s %s: want a number that is not negative", op->name, v);
        *op->real = (float)x;
    }
    return 0;
}

static void default_options(options *o) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    memset(o, 0, sizeof *o);
    o->model = "examples/models/recall.gguf";
    o->document = "examples/data/document.txt";
    o->questions = "examples/data/questions.txt";
    o->mask_text = "dense";
    o->kv_text = "f32";
    o->device = "cpu";
    o->threads = cores < 1 ? 1 : cores > 256 ? 256 : (int32_t)cores;
    o->page = 32;
    o->chunk = 512;
    o->batch = 64;
    o->every = 1;
    o->kv_mem = 4096;
    o->top_k = 40;
    o->top_p = 0.95f;
    o->seed = 1;
}

/* 0: go on; 1: help was printed; -1: mistake */
static int parse_options(int argc, char **argv, options *o) {
    const char *numerics = "fast";
    const option table[] = {
        {"--model", &o->model, NULL, 0, 0, NULL, 0},
        {"--document", &o->document, NULL, 0, 0, NULL, 0},
        {"--questions", &o->questions, NULL, 0, 0, NULL, 0},
        {"--prompt", &o->prompt, NULL, 0, 0, NULL, 0},
        {"--mask", &o->mask_text, NULL, 0, 0, NULL, 0},
        {"--kv", &o->kv_text, NULL, 0, 0, NULL, 0},
        {"--isa", &o->isa, NULL, 0, 0, NULL, 0},
        {"--device", &o->device, NULL, 0, 0, NULL, 0},
        {"--numerics", &numerics, NULL, 0, 0, NULL, 0},
        {"--no-share", NULL, &o->no_share, 0, 1, NULL, 1},
        {"--json", NULL, &o->json, 0, 1, NULL, 1},
        {"--threads", NULL, &o->threads, 1, 1024, NULL, 0},
        {"--n-predict", NULL, &o->n_predict, 1, 1 << 20, NULL, 0},
        {"--page", NULL, &o->page, 1, 1 << 16, NULL, 0},
        {"--chunk", NULL, &o->chunk, 1, 1 << 16, NULL, 0},
        {"--batch", NULL, &o->batch, 1, 1 << 12, NULL, 0},
        {"--every", NULL, &o->every, 0, 1 << 20, NULL, 0},
        {"--kv-mem", NULL, &o->kv_mem, 1, 1 << 26, NULL, 0},
        {"--top-k", NULL, &o->top_k, 0, 1 << 30, NULL, 0},
        {"--seed", NULL, &o->seed, 0, INT32_MAX, NULL, 0},
        {"--temp", NULL, NULL, 0, 0, &o->temp, 0},
        {"--top-p", NULL, NULL, 0, 0, &o->top_p, 0}};
    size_t n = sizeof table / sizeof *table, k;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            fputs(usage, stdout);
            return 1;
        }
        for (k = 0; k < n && strcmp(argv[i], table[k].name); k++) {}
        if (k == n) return complain("unknown option %s (--help lists them)", argv[i]);
        if (table[k].flag) {
            *table[k].number = 1;
            continue;
        }
        if (i + 1 == argc) return complain("%s needs a value", argv[i]);
        if (parse_value(&table[k], argv[++i])) return -1;
    }
    if (!o->n_predict) o->n_predict = o->prompt ? 128 : 32;
    if (strcmp(o->device, "cpu") && strcmp(o->device, "cuda"))
        return complain("--device %s: want cpu or cuda", o->device);
    return parse_mask(o->mask_text, &o->mask) || parse_kv(o->kv_text, &o->kv) ||
                   parse_numerics(numerics, &o->numerics)
               ? -1
               : 0;
}

/* ==== requests ==== */

typedef enum phase { WAITING, READING, ANSWERING, FINISHED } phase;

typedef struct request {
    char *question, *expected; /* expected NULL: not a question, nothing to compare */
    int32_t *ids;              /* prompt, then what was generated */
    int32_t n_prompt, n_ids, cap;
    int32_t n_kv;              /* tokens of ids in the tree's sequence */
    int32_t stored;            /* prompt tokens whose K and V lay in pages before this step */
    int32_t seq;               /* tree handle */
    int32_t arrival;           /* scheduler step */
    uint64_t ns;
    phase phase;
    llama_sampler sampler;
    char *text;                /* the answer */
    size_t n_text, cap_text;
} request;

static char *read_file(const char *path, size_t *n_bytes) {
    FILE *f = fopen(path, "rb");
    size_t n = 0, cap = 1 << 16, got;
    char *p = f ? (char *)malloc(cap + 1) : NULL;
    if (!f) {
        complain("%s: cannot open", path);
        return NULL;
    }
    while (p && (got = fread(p + n, 1, cap - n, f)) > 0) {
        n += got;
        if (n > (size_t)1 << 28) break;
        if (n == cap) {
            char *q = (char *)realloc(p, (cap *= 2) + 1);
            if (!q) free(p);
            p = q;
        }
    }
    if (!p || ferror(f) || n > (size_t)1 << 28) {
        complain("%s: %s", path, !p ? "out of memory" : ferror(f) ? "cannot read" : "too large");
        free(p);
        p = NULL;
    } else {
        p[n] = 0;
    }
    fclose(f);
    *n_bytes = n;
    return p;
}

/* Token ids of the prompt with room for the answer; checks the context. */
static int set_prompt(const llama_model *m, const options *o, request *r, const char *text,
                      size_t n_bytes, int flags) {
    size_t n;
    int32_t *ids = llama_tokenize(m, text, n_bytes, LLAMA_ADD_BOS | flags, &n);
    if (!ids) return complain("out of memory, or a prompt over 256 MiB");
    if (n < 1 || n >= (size_t)m->n_ctx) {
        free(ids);
        return n < 1 ? complain("the prompt is empty")
                     : complain("a prompt has %zu tokens and the context of this model is %d", n,
                                (int)m->n_ctx);
    }
    r->n_prompt = r->n_ids = (int32_t)n;
    r->cap = r->n_prompt + (o->n_predict < m->n_ctx - r->n_prompt ? o->n_predict
                                                                 : m->n_ctx - r->n_prompt);
    int32_t *grown = (int32_t *)realloc(ids, (size_t)r->cap * sizeof *ids);
    r->ids = grown ? grown : ids;
    return grown ? 0 : complain("out of memory");
}

static char *copy_text(const char *s, size_t n) {
    char *p = (char *)malloc(n + 1);
    if (!p) return NULL;
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

/* One line: question<TAB>expected. The prompt is document, "\nQ: ", question, "\nA: ". */
static int set_question(const llama_model *m, const options *o, request *r, const char *doc,
                        size_t n_doc, const char *line, size_t n_line, int line_no) {
    const char *tab = (const char *)memchr(line, '\t', n_line);
    if (!tab) return complain("%s: line %d has no tab", o->questions, line_no);
    size_t nq = (size_t)(tab - line), n = n_doc + nq + 16;
    char *text = (char *)malloc(n);
    r->question = copy_text(line, nq);
    r->expected = copy_text(tab + 1, n_line - nq - 1);
    if (!text || !r->question || !r->expected) {
        free(text);
        return complain("out of memory");
    }
    memcpy(text, doc, n_doc);
    n = n_doc;
    memcpy(text + n, "\nQ: ", 4);
    memcpy(text + n + 4, line, nq);
    memcpy(text + n + 4 + nq, "\nA: ", 4);
    int bad = set_prompt(m, o, r, text, n + 8 + nq, 0);
    free(text);
    return bad;
}

static void free_requests(request *r, int32_t n) {
    for (int32_t i = 0; r && i < n; i++) {
        free(r[i].question);
        free(r[i].expected);
        free(r[i].ids);
        free(r[i].text);
    }
    free(r);
}

static int load_questions(const llama_model *m, const options *o, request *r, int32_t *n,
                          const char *doc, size_t n_doc, const char *q, size_t n_q) {
    int line_no = 0;
    for (size_t at = 0, end; at < n_q; at = end + 1) {
        for (end = at; end < n_q && q[end] != '\n'; end++) {}
        size_t len = end - at;
        line_no++;
        if (len && q[at + len - 1] == '\r') len--;
        if (!len) continue;
        ++*n; /* counted first, so that a request that fails half way is freed */
        if (set_question(m, o, &r[*n - 1], doc, n_doc, q + at, len, line_no)) return -1;
    }
    return *n ? 0 : complain("%s: no questions", o->questions);
}

/* NULL after a message. */
static request *load_requests(const llama_model *m, const options *o, int32_t *n) {
    size_t n_doc = 0, n_q = 0, lines = 1;
    char *doc = NULL, *q = NULL;
    request *r = NULL;
    int bad = 0;
    *n = 0;
    if (o->prompt) {
        *n = 1;
        r = (request *)calloc(1, sizeof *r);
        bad = r ? set_prompt(m, o, r, o->prompt, strlen(o->prompt), LLAMA_PARSE_SPECIAL) : -1;
    } else {
        doc = read_file(o->document, &n_doc);
        q = doc ? read_file(o->questions, &n_q) : NULL;
        for (size_t i = 0; i < n_q; i++) lines += q[i] == '\n';
        if (q && lines <= 1 << 20) r = (request *)calloc(lines, sizeof *r);
        bad = r ? load_questions(m, o, r, n, doc, n_doc, q, n_q) : -1;
        if (q && !r) complain("%s: out of memory or too many lines", o->questions);
    }
    free(doc);
    free(q);
    for (int32_t i = 0; !bad && i < *n; i++) {
        r[i].seq = -1;
        r[i].arrival = o->every ? (int32_t)((int64_t)i * o->every % INT32_MAX) : 0;
        r[i].ns = o->no_share ? (uint64_t)i + 1 : 0;
        r[i].sampler.temp = o->temp;
        r[i].sampler.top_k = o->top_k;
        r[i].sampler.top_p = o->top_p;
        r[i].sampler.rng = (uint64_t)o->seed * 0x9e3779b97f4a7c15u + (uint64_t)i;
    }
    if (bad) {
        free_requests(r, *n);
        return NULL;
    }
    return r;
}

/* ==== engine ==== */

typedef struct kv_layer {
    uint8_t *k, *v;
} kv_layer;

typedef struct totals {
    int64_t prompt_tokens, cached_tokens, prefill_rows, decode_rows;
    int64_t kept, causal;          /* visible and causal (query, key, KV head) triples */
    int64_t kv_read, kv_seen;      /* KV tokens x heads visited, and as if nothing were shared */
    double prefill_s, decode_s, attention_s, busy_s, wall_s;
    int32_t steps, peak_pages, plans_rebuilt;
} totals;

typedef struct engine engine;

/* What depends on where the model runs. 0, or -1 after a message. */
typedef struct device {
    int k16;                                             /* wants keys in the layout K16 */
    size_t f32_bytes;                                    /* for llama_load */
    int (*find)(engine *e);                              /* before the model is loaded */
    int (*open)(engine *e);                              /* layers; sets d.q.data, d.o.data */
    void *(*alloc_pages)(engine *e, size_t n, size_t each); /* zeroed; NULL after a message */
    void (*plan_params)(engine *e, attn_plan_params *p);
    int (*open_plan)(engine *e, const attn_plan_params *p); /* what a run needs beside it */
    int (*forward)(engine *e);                           /* the planned batch; fills in logits */
    const char *(*executor)(const engine *e);
    void (*close)(engine *e);
} device;

struct engine {
    const options *o;
    const device *on;
    void *gpu;                                   /* what --device cuda keeps */
    const llama_model *m;
    llama_pool *pool;
    llama_state *s;
    request *req;
    int32_t n_req, max_rows, max_seq, max_pages; /* max_pages: of one sequence */
    int32_t first_open;                          /* requests before it are finished */
    attn_tree *tree;
    void *tree_mem;
    int32_t n_pages;
    size_t page_bytes;                           /* K and V of all layers */
    kv_layer *kv;
    void *kv_mem;
    attn_desc d;
    attn_plan *plan;
    void *plan_mem, *partial_mem, *scratch_mem;
    size_t plan_bytes, partial_bytes, scratch_bytes; /* scratch: per thread */
    /* the batch being built */
    int32_t n_rows, n_seq, n_out, n_copies;
    int32_t *ids, *pos;                          /* (max_rows) */
    int64_t *slots;                              /* (max_rows) */
    int32_t *q_start, *q_pos0, *kv_len;          /* (max_seq + 1) */
    int32_t *table, *seqs, *order, *order_tmp;   /* (max_seq, max_pages), (max_seq) ... */
    int32_t *out_row, *out_req;                  /* (max_seq) rows whose logits are wanted */
    int32_t *fresh;                              /* (max_seq) first position to store */
    attn_page_copy *copies;                      /* (max_seq) */
    float *logits;                               /* (max_seq, n_vocab) */
    totals t;
};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int attn_failed(const char *what, attn_result r) {
    return complain("%s: %s", what, attn_result_string(r));
}

static int32_t pages_of(const engine *e, int32_t n_tokens) {
    return (n_tokens + e->o->page - 1) / e->o->page;
}

/* NULL: leave the choice to the library. */
static int choose_isa(const char *name) {
    attn_result r = attn_cpu_open();
    if (r || !name) return r ? attn_failed("opening the CPU backend", r) : 0;
    for (int i = 0; i < ATTN_CPU_ISA_COUNT; i++)
        if (!strcmp(name, attn_cpu_isa_name((attn_cpu_isa)i))) {
            r = attn_cpu_set_isa((attn_cpu_isa)i);
            return r ? complain("--isa %s: this machine or build does not have it", name) : 0;
        }
    fprintf(stderr, "generate: --isa %s: want one of", name);
    for (int i = 0; i < ATTN_CPU_ISA_COUNT; i++)
        fprintf(stderr, " %s", attn_cpu_isa_name((attn_cpu_isa)i));
    fprintf(stderr, "\n");
    return -1;
}

static void *aligned(void *p) {
    return (void *)(((uintptr_t)p + 63) / 64 * 64);
}

static int32_t common_prefix(const request *a, const request *b) {
    int32_t n = a->n_prompt < b->n_prompt ? a->n_prompt : b->n_prompt, i = 0;
    while (i < n && a->ids[i] == b->ids[i]) i++;
    return a->ns == b->ns ? i : 0;
}

/* Pages that hold all requests at once, at most what --kv-mem allows; a request needs one page
 * more than its length when it diverges inside a shared one. */
static int size_pages(engine *e) {
    int64_t total = 0, largest = 0, limit = ((int64_t)e->o->kv_mem << 20) / (int64_t)e->page_bytes;
    for (int32_t i = 0; i < e->n_req; i++) {
        const request *r = &e->req[i];
        int32_t shared = i ? common_prefix(r, &e->req[0]) : 0;
        int32_t near = i ? common_prefix(r, &e->req[i - 1]) : 0;
        int32_t all = pages_of(e, r->cap) + 1;
        if (near > shared) shared = near;
        total += all - shared / e->o->page + 1;
        if (all > largest) largest = all;
    }
    if (total > limit) total = limit;
    if (largest > total || total > INT32_MAX)
        return complain("the KV of one request takes %lld MiB; --kv-mem is %d",
                        (long long)(largest * (int64_t)e->page_bytes >> 20) + 1,
                        (int)e->o->kv_mem);
    e->n_pages = (int32_t)total;
    e->max_pages = (int32_t)largest;
    return 0;
}

static void describe(engine *e) {
    const llama_model *m = e->m;
    attn_desc *d = &e->d;
    d->n_heads = m->n_heads;
    d->n_kv_heads = m->n_kv_heads;
    d->head_dim = m->head_dim;
    d->v_head_dim = m->v_head_dim;
    d->q.dtype = d->o.dtype = ATTN_F32;
    d->kv.k.dtype = d->kv.v.dtype = e->o->kv;
    d->kv.page_tokens = e->o->page;
    d->kv.layout = e->on->k16 && e->o->page % 16 == 0 ? ATTN_K16 : ATTN_HEAD_MAJOR;
    d->mask = e->o->mask;
    d->numerics = e->o->numerics;
}

static int open_kv(engine *e) {
    size_t k = attn_kv_page_bytes(&e->d, 0), v = attn_kv_page_bytes(&e->d, 1);
    size_t layers = (size_t)e->m->n_layers, each;
    if (!k || !v)
        return complain("attention over heads of %d and %d dims with --kv %s is not possible",
                        (int)e->m->head_dim, (int)e->m->v_head_dim, e->o->kv_text);
    e->page_bytes = layers * (k + v);
    if (size_pages(e)) return -1;
    each = (size_t)e->n_pages * (k + v) + 128; /* fits: n_pages was bounded by --kv-mem */
    e->kv = (kv_layer *)calloc(layers, sizeof *e->kv);
    e->kv_mem = e->on->alloc_pages(e, layers, each);
    if (!e->kv) return complain("out of memory for the KV pages");
    if (!e->kv_mem) return -1;
    uint8_t *at = (uint8_t *)aligned(e->kv_mem);
    for (size_t l = 0; l < layers; l++) {
        e->kv[l].k = at;
        at = (uint8_t *)aligned(at + (size_t)e->n_pages * k);
        e->kv[l].v = at;
        at = (uint8_t *)aligned(at + (size_t)e->n_pages * v);
    }
    e->d.kv.k.data = e->kv[0].k; /* each layer puts its own here */
    e->d.kv.v.data = e->kv[0].v;
    e->d.kv.n_pages = e->n_pages;
    attn_tree_desc td;
    memset(&td, 0, sizeof td);
    td.n_pages = e->n_pages;
    td.page_tokens = e->o->page;
    td.max_seq = e->max_seq;
    size_t bytes = attn_tree_bytes(&td);
    e->tree_mem = bytes ? malloc(bytes + 64) : NULL;
    if (!e->tree_mem) return complain("out of memory for the prefix tree");
    attn_result r = attn_tree_init(&td, aligned(e->tree_mem), bytes, &e->tree);
    return r ? attn_failed("prefix tree", r) : 0;
}

static int open_batch(engine *e) {
    size_t rows = (size_t)e->max_rows, seqs = (size_t)e->max_seq + 1;
    e->ids = (int32_t *)calloc(rows, sizeof(int32_t));
    e->pos = (int32_t *)calloc(rows, sizeof(int32_t));
    e->slots = (int64_t *)calloc(rows, sizeof(int64_t));
    e->q_start = (int32_t *)calloc(seqs, 9 * sizeof(int32_t)); /* and the eight below */
    e->table = (int32_t *)calloc(seqs, (size_t)e->max_pages * sizeof(int32_t));
    e->copies = (attn_page_copy *)calloc(seqs, sizeof *e->copies);
    e->logits = (float *)calloc(seqs, (size_t)e->m->n_vocab * sizeof(float));
    if (!e->ids || !e->pos || !e->slots || !e->q_start || !e->table || !e->copies || !e->logits)
        return complain("out of memory for a batch of %d tokens", (int)e->max_rows);
    e->q_pos0 = e->q_start + seqs;
    e->kv_len = e->q_pos0 + seqs;
    e->seqs = e->kv_len + seqs;
    e->order = e->seqs + seqs;
    e->order_tmp = e->order + seqs;
    e->out_row = e->order_tmp + seqs;
    e->out_req = e->out_row + seqs;
    e->fresh = e->out_req + seqs;
    e->d.q_start = e->q_start;
    e->d.q_pos0 = e->q_pos0;
    e->d.seq_order = e->order;
    e->d.kv.kv_len = e->kv_len;
    e->d.kv.page_table = e->table;
    e->d.kv.page_table_stride = e->max_pages;
    return 0;
}

/* ---- scheduler: which tokens run in this step ---- */

/* Pages that the running requests may still take; new ones are admitted only beside that. */
static int64_t promised_pages(const engine *e) {
    int64_t n = 0;
    for (int32_t i = e->first_open; i < e->n_req; i++) {
        const request *r = &e->req[i];
        if (r->phase == READING || r->phase == ANSWERING)
            n += pages_of(e, r->cap) + 1 - pages_of(e, r->n_kv);
    }
    return n;
}

/* Opens a sequence on whatever the cache holds of the prompt. 1: no room yet; -1: error. */
static int admit(engine *e, request *r) {
    attn_tree_stats st;
    int32_t cached = 0;
    memset(&st, 0, sizeof st);
    attn_result got = attn_tree_open(e->tree, r->ns, r->ids, r->n_prompt - 1, &r->seq, &cached);
    if (got == ATTN_ERR_FULL) return 1;
    if (got) return attn_failed("prefix tree", got);
    int64_t want = promised_pages(e) + pages_of(e, r->cap) + 1 - pages_of(e, cached);
    attn_tree_get_stats(e->tree, &st);
    if (want > st.n_free) { /* let go of what finished requests left behind */
        got = attn_tree_evict(e->tree, (int32_t)(want - st.n_free), NULL);
        if (got) return attn_failed("prefix tree", got);
        attn_tree_get_stats(e->tree, &st);
    }
    if (want > st.n_free) {
        got = attn_tree_release(e->tree, r->seq, 1);
        r->seq = -1;
        return got ? attn_failed("prefix tree", got) : 1;
    }
    r->n_kv = cached;
    r->phase = READING;
    e->t.cached_tokens += cached;
    return 0;
}

/* Adds the sequence of r, lengthened to end tokens, to the batch. Tokens the cache turns out to
 * hold are skipped, except the last one when its logits are wanted. */
static int add_rows(engine *e, request *r, int32_t end, int want_logits) {
    int32_t cached = 0, begin, i = e->n_seq;
    attn_result got = attn_tree_append(e->tree, r->seq, r->ids + r->n_kv, end - r->n_kv, &cached,
                                       e->copies, e->max_seq, &e->n_copies);
    if (got) return attn_failed("prefix tree", got);
    begin = r->n_kv + cached;
    r->n_kv = end;
    if (begin == end && !want_logits) {
        e->t.cached_tokens += cached;
        return 0;
    }
    int32_t fresh = begin; /* K and V of tokens before it are in their pages already */
    if (begin == end) begin--;
    if (r->phase == READING) {
        e->t.cached_tokens += cached - (fresh - begin);
        e->t.prefill_rows += end - begin;
    } else {
        e->t.decode_rows++;
    }
    for (int32_t p = begin; p < end; p++, e->n_rows++) {
        e->ids[e->n_rows] = r->ids[p];
        e->pos[e->n_rows] = p;
    }
    e->seqs[i] = r->seq;
    e->q_pos0[i] = begin;
    e->fresh[i] = fresh;
    e->kv_len[i] = end;
    e->q_start[++e->n_seq] = e->n_rows;
    int32_t n = attn_tree_pages(e->tree, r->seq, e->table + (int64_t)i * e->max_pages,
                                e->max_pages);
    if (n < 0) return attn_failed("prefix tree", (attn_result)n);
    if (want_logits) {
        e->out_req[e->n_out] = (int32_t)(r - e->req);
        e->out_row[e->n_out++] = e->n_rows - 1;
    }
    return 0;
}

/* Decoding rows first, so that answers never wait behind a prompt; then prompts in order of
 * arrival. A prompt whose next tokens another request computes in this very step waits for them:
 * nothing is computed twice, and page copies never read a page that is being written. */
static int build_batch(engine *e) {
    int32_t running = 0, room;
    e->n_rows = e->n_seq = e->n_out = e->n_copies = 0;
    e->q_start[0] = 0;
    for (int32_t i = e->first_open; i < e->n_req; i++) {
        request *r = &e->req[i];
        if (r->phase == READING || (r->phase == WAITING && r->arrival <= e->t.steps))
            r->stored = attn_tree_match(e->tree, r->ns, r->ids, r->n_prompt);
    }
    for (int32_t i = e->first_open; i < e->n_req; i++) {
        request *r = &e->req[i];
        running += r->phase == READING || r->phase == ANSWERING;
        if (r->phase == ANSWERING && add_rows(e, r, r->n_ids, 1)) return -1;
    }
    room = e->o->chunk > e->n_rows ? e->o->chunk - e->n_rows : 1;
    for (int32_t i = e->first_open; i < e->n_req; i++) {
        request *r = &e->req[i];
        int32_t rows = e->n_rows, cached, end;
        if (r->phase == WAITING) {
            if (r->arrival > e->t.steps || running == e->max_seq) break;
            int full = admit(e, r);
            if (full < 0) return -1;
            if (full && !running) return complain("the KV pages cannot hold one request");
            if (full) break;
            running++;
        }
        if (r->phase != READING) continue;
        cached = attn_tree_match(e->tree, r->ns, r->ids, r->n_prompt);
        if (cached > r->stored) continue;
        end = r->n_prompt - cached < room ? r->n_prompt : cached + room;
        if (end <= r->n_kv) continue;
        if (add_rows(e, r, end, end == r->n_prompt)) return -1;
        room -= e->n_rows - rows < room ? e->n_rows - rows : room;
    }
    return 0;
}

/* ---- on the CPU ---- */

/* What one thread pool task needs of the attention of a layer. */
typedef struct attend_ctx {
    engine *e;
    int32_t status; /* atomic: first attn_result that was not OK */
} attend_ctx;

static void note(attend_ctx *c, attn_result r) {
    if (r) __atomic_store_n(&c->status, (int32_t)r, __ATOMIC_RELAXED);
}

static void attend_task(void *ctx, int64_t task, int32_t thread) {
    attend_ctx *c = (attend_ctx *)ctx;
    engine *e = c->e;
    uint8_t *scratch = (uint8_t *)aligned(e->scratch_mem) + (size_t)thread * e->scratch_bytes;
    note(c, attn_cpu_run(&e->d, e->plan, (int32_t)task, 1, aligned(e->partial_mem), scratch));
}

static void merge_task(void *ctx, int64_t task, int32_t thread) {
    attend_ctx *c = (attend_ctx *)ctx;
    engine *e = c->e;
    (void)thread;
    note(c, attn_cpu_merge(&e->d, e->plan, (int32_t)task, 1, aligned(e->partial_mem)));
}

enum { STORE_ROWS = 64 }; /* per task */

static void store_task(void *ctx, int64_t task, int32_t thread) {
    attend_ctx *c = (attend_ctx *)ctx;
    engine *e = c->e;
    attn_tensor k, v;
    int64_t first = task * STORE_ROWS, left = e->n_rows - first;
    (void)thread;
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = e->s->k;
    v.data = e->s->v;
    note(c, attn_cpu_store(&e->d, &k, &v, e->slots, first, left < STORE_ROWS ? left : STORE_ROWS));
}

/* Copies pages that diverge, stores the new K and V, then attends. */
static int attend(engine *e, int32_t layer) {
    attend_ctx c = {e, 0};
    attn_result r;
    e->d.kv.k.data = e->kv[layer].k;
    e->d.kv.v.data = e->kv[layer].v;
    r = attn_cpu_copy_pages(&e->d, e->copies, e->n_copies);
    if (r) return attn_failed("copying pages", r);
    llama_pool_run(e->pool, store_task, &c, (e->n_rows + STORE_ROWS - 1) / STORE_ROWS);
    if (c.status) return attn_failed("storing keys and values", (attn_result)c.status);
    llama_pool_run(e->pool, attend_task, &c, e->plan->n_tasks);
    llama_pool_run(e->pool, merge_task, &c, e->plan->n_merges);
    return c.status ? attn_failed("attention", (attn_result)c.status) : 0;
}

static int cpu_find(engine *e) { return choose_isa(e->o->isa); }

static int cpu_open(engine *e) {
    e->s = llama_state_create(e->m, e->max_rows);
    if (!e->s) return complain("out of memory for a batch of %d tokens", (int)e->max_rows);
    e->d.q.data = e->s->q;
    e->d.o.data = e->s->att;
    return 0;
}

static void *cpu_alloc_pages(engine *e, size_t n, size_t each) {
    void *pages = calloc(n, each);
    (void)e;
    if (!pages) complain("out of memory for the KV pages");
    return pages;
}

static void cpu_plan_params(engine *e, attn_plan_params *p) {
    attn_cpu_plan_params(&e->d, llama_pool_threads(e->pool), p);
}

static int cpu_open_plan(engine *e, const attn_plan_params *p) {
    (void)p;
    e->partial_mem = malloc(e->partial_bytes + 64);
    e->scratch_bytes = (attn_cpu_scratch_bytes(&e->d, e->plan) + 63) / 64 * 64;
    e->scratch_mem = malloc((size_t)llama_pool_threads(e->pool) * e->scratch_bytes + 64);
    return e->partial_mem && e->scratch_mem ? 0
                                            : complain("out of memory for the attention kernels");
}

static int cpu_forward(engine *e) {
    double t0, attention = 0;
    llama_embed(e->m, e->pool, e->s, e->ids, e->pos, e->n_rows);
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        llama_qkv(e->m, e->pool, e->s, l);
        t0 = seconds();
        if (attend(e, l)) return -1;
        attention += seconds() - t0;
        llama_out(e->m, e->pool, e->s, l);
    }
    if (e->n_out) llama_logits(e->m, e->pool, e->s, e->out_row, e->n_out, e->logits);
    e->t.attention_s += attention;
    return 0;
}

static const char *cpu_executor(const engine *e) { return attn_cpu_executor(&e->d); }

static void cpu_close(engine *e) {
    free(e->kv_mem);
    free(e->partial_mem);
    free(e->scratch_mem);
    llama_state_free(e->s);
}

static const device on_cpu = {1, 0, cpu_find, cpu_open, cpu_alloc_pages, cpu_plan_params,
                              cpu_open_plan, cpu_forward, cpu_executor, cpu_close};

/* ---- on a CUDA device ---- */

#ifdef GENERATE_CUDA
typedef struct gpu {
    attn_cuda attn;
    llama_cuda model;
    int64_t *slots;                    /* device: (max_rows) */
    attn_cuda_plan plan;
    void *staging, *partials;
    size_t bytes;                      /* of the plan's image and of staging */
    char err[LLAMA_ERR_BYTES];
} gpu;

static int gpu_failed(const gpu *g) { return complain("CUDA: %s", g->err); }

static int gpu_find(engine *e) {
    if (e->o->numerics == ATTN_NUMERICS_PORTABLE)
        return complain("--numerics portable: --device cpu has it, --device cuda has not");
    gpu *g = (gpu *)calloc(1, sizeof *g);
    if (!g) return complain("out of memory");
    e->gpu = g;
    attn_result r = attn_cuda_open(&g->attn, 0);
    return r ? complain("--device cuda: no CUDA device that can be used (%s)",
                        attn_result_string(r))
             : 0;
}

static int gpu_open(engine *e) {
    gpu *g = (gpu *)e->gpu;
    size_t rows = (size_t)e->max_rows;
    if (llama_cuda_open(&g->model, e->m, e->pool, e->max_rows, e->max_seq, g->err))
        return gpu_failed(g);
    g->slots = (int64_t *)llama_cuda_alloc(&g->model, rows * sizeof *g->slots, 0, g->err);
    if (!g->slots) return gpu_failed(g);
    g->attn.error = (int32_t *)llama_cuda_alloc(&g->model, sizeof(int32_t), 0, g->err);
    if (!g->attn.error) return gpu_failed(g);
    e->d.q.data = g->model.q;
    e->d.o.data = g->model.att;
    return 0;
}

static void *gpu_alloc_pages(engine *e, size_t n, size_t each) {
    gpu *g = (gpu *)e->gpu;
    void *pages = llama_cuda_alloc(&g->model, n * each, 0, g->err);
    if (!pages) gpu_failed(g);
    return pages;
}

/* The first batch says little about the later ones: room for splitting, and for what must be split
 * whatever the batch is, if all its rows are of the length with the most spans. */
static void gpu_plan_params(engine *e, attn_plan_params *p) {
    gpu *g = (gpu *)e->gpu;
    size_t spans = 0, bytes;
    int32_t longest = e->max_pages * e->o->page;
    attn_cuda_plan_params(&g->attn, &e->d, p);
    for (int i = 0; i < ATTN_SPAN_RULES && p->rule[i].span; i++) {
        const attn_span_rule *r = &p->rule[i];
        int32_t n = r->max_kv_len && r->max_kv_len < longest ? r->max_kv_len : longest;
        if (r->no_fold && (size_t)(n / r->span) + 2 > spans) spans = (size_t)(n / r->span) + 2;
    }
    bytes = (size_t)e->max_rows * (size_t)e->m->n_heads * spans *
            ((size_t)e->m->v_head_dim + 2) * sizeof(float);
    if (bytes < (size_t)64 << 20) bytes = (size_t)64 << 20;
    if (p->partial_bytes < bytes) p->partial_bytes = bytes;
}

static int gpu_open_plan(engine *e, const attn_plan_params *p) {
    gpu *g = (gpu *)e->gpu;
    attn_result r = attn_cuda_supports(&g->attn, &e->d);
    if (r) return attn_failed("attention", r);
    g->bytes = attn_cuda_plan_bytes(&g->attn, &e->d, p);
    void *image = llama_cuda_alloc(&g->model, g->bytes, 0, g->err);
    g->staging = image ? llama_cuda_alloc(&g->model, g->bytes, 1, g->err) : NULL;
    g->partials = g->staging ? llama_cuda_alloc(&g->model, p->partial_bytes, 0, g->err) : NULL;
    if (!g->partials) return gpu_failed(g);
    r = attn_cuda_plan_init(&g->attn, &e->d, p, image, g->bytes, &g->plan);
    return r ? attn_failed("planning attention", r) : 0;
}

/* attend() for the device; every call is queued and none waits. */
static int gpu_attend(engine *e, int32_t layer) {
    gpu *g = (gpu *)e->gpu;
    attn_cuda_stream stream = g->model.stream;
    attn_tensor k, v;
    attn_result r;
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = g->model.k;
    v.data = g->model.v;
    e->d.kv.k.data = e->kv[layer].k;
    e->d.kv.v.data = e->kv[layer].v;
    r = attn_cuda_copy_pages(&g->attn, &e->d, e->copies, e->n_copies, stream);
    if (r) return attn_failed("copying pages", r);
    r = attn_cuda_store(&g->attn, &e->d, &g->plan, &k, &v, g->slots, 0, e->n_rows, stream);
    if (r) return attn_failed("storing keys and values", r);
    r = attn_cuda_run(&g->attn, &e->d, &g->plan, g->partials, e->partial_bytes, stream);
    return r ? attn_failed("attention", r) : 0;
}

/* The step ends when the host has what it asked for, so one staging buffer is enough. */
static int gpu_forward(engine *e) {
    gpu *g = (gpu *)e->gpu;
    llama_cuda *m = &g->model;
    double attention = 0;
    int32_t error = 0;
    attn_result r = attn_cuda_upload(&g->attn, &e->d, e->plan, &g->plan, g->staging, g->bytes,
                                     m->stream);
    if (r) return attn_failed("planning attention", r);
    if (llama_cuda_upload(m, g->slots, e->slots, (size_t)e->n_rows * sizeof *e->slots, g->err) ||
        llama_cuda_embed(m, e->ids, e->pos, e->n_rows, g->err))
        return gpu_failed(g);
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        if (llama_cuda_qkv(m, l, g->err) || llama_cuda_mark(m, 2 * l, g->err))
            return gpu_failed(g);
        if (gpu_attend(e, l)) return -1;
        if (llama_cuda_mark(m, 2 * l + 1, g->err) || llama_cuda_out(m, l, g->err))
            return gpu_failed(g);
    }
    if ((e->n_out && llama_cuda_logits(m, e->out_row, e->n_out, e->logits, g->err)) ||
        llama_cuda_download(m, &error, g->attn.error, sizeof error, g->err) ||
        llama_cuda_seconds(m, &attention, g->err))
        return gpu_failed(g);
    e->t.attention_s += attention;
    return error ? attn_failed("attention on the device", (attn_result)error) : 0;
}

static const char *gpu_executor(const engine *e) {
    return attn_cuda_executor(&((const gpu *)e->gpu)->attn, &e->d);
}

static void gpu_close(engine *e) {
    gpu *g = (gpu *)e->gpu;
    if (g) llama_cuda_close(&g->model); /* the pages as well */
    free(g);
}

static const device on_cuda = {0, 1, gpu_find, gpu_open, gpu_alloc_pages, gpu_plan_params,
                               gpu_open_plan, gpu_forward, gpu_executor, gpu_close};
#endif

static const device *choose_device(const options *o) {
    if (!strcmp(o->device, "cpu")) return &on_cpu;
#ifdef GENERATE_CUDA
    return &on_cuda;
#else
    complain("--device cuda: this program was built without it; make build/generate_cuda, or\n"
             "  nvcc -O3 -arch=native -DGENERATE_CUDA -I. examples/generate.c "
             "examples/llama_cuda.cu -o generate_cuda -lcublas");
    return NULL;
#endif
}

/* ---- one step of the model ---- */

/* Buffers for the largest problem that can come; sized when the first one is known. */
static int open_plan(engine *e) {
    attn_plan_params p;
    attn_result r = attn_validate(&e->d);
    if (r) return attn_failed("attention", r);
    memset(&p, 0, sizeof p);
    e->on->plan_params(e, &p);
    p.max_seq = e->max_seq;
    p.max_tokens = e->max_rows;
    p.max_kv_len = e->max_pages * e->o->page;
    e->partial_bytes = p.partial_bytes;
    e->plan_bytes = attn_plan_bytes(&e->d, &p);
    e->plan_mem = malloc(e->plan_bytes + 64);
    if (!e->plan_bytes || !e->plan_mem) return complain("out of memory for the attention plan");
    r = attn_plan_build(&e->d, &p, aligned(e->plan_mem), e->plan_bytes, &e->plan);
    return r ? attn_failed("planning attention", r) : e->on->open_plan(e, &p);
}

static int plan_batch(engine *e) {
    int rebuilt = 1;
    attn_result r;
    e->d.n_seq = e->n_seq;
    r = attn_tree_order(e->tree, e->seqs, e->n_seq, e->order, e->order_tmp);
    if (r) return attn_failed("prefix tree", r);
    if (!e->plan) {
        if (open_plan(e)) return -1;
    } else if ((r = attn_plan_update(e->plan, &e->d, &rebuilt)) != ATTN_OK) {
        return attn_failed("planning attention", r);
    }
    e->t.plans_rebuilt += rebuilt;
    r = attn_kv_slots(&e->d, e->slots);
    if (r) return attn_failed("page table", r);
    for (int32_t i = 0; i < e->n_seq; i++) /* rows that only ask for logits store nothing */
        if (e->q_pos0[i] < e->fresh[i]) e->slots[e->q_start[i]] = -1;
    e->t.kv_read += e->plan->kv_tokens_read * e->m->n_layers;
    e->t.kv_seen += e->plan->kv_tokens_seen * e->m->n_layers;
    return 0;
}

/* One step: plan, run, and the copies are done. */
static int forward(engine *e) {
    double t0 = seconds();
    if (plan_batch(e)) return -1;
    e->t.attention_s += seconds() - t0;
    if (e->on->forward(e)) return -1;
    attn_result r = attn_tree_ack(e->tree, e->copies, e->n_copies);
    return r ? attn_failed("prefix tree", r) : 0;
}

/* Keys that the head sees from position p: the closed forms of the masks of --mask. */
static int64_t kept_keys(const attn_mask *m, int32_t p, int32_t head, int32_t n_heads) {
    if (m->window_left) {
        int64_t from = (int64_t)p - m->window_left + 1; /* first key inside the window */
        if (from <= 0) return p + 1;
        return p + 1 - from + (from < m->n_sink ? from : m->n_sink);
    }
    if (m->stride.block) {
        int64_t i = p / m->stride.block, kept = p % m->stride.block + 1;
        int64_t step = m->stride.stride / n_heads > 1 ? m->stride.stride / n_heads : 1;
        for (int64_t j = 0; j < i; j++)
            if (i - j < m->stride.local || (j + head * step) % m->stride.stride == 0)
                kept += m->stride.block;
        return kept;
    }
    return p + 1;
}

static void count_kept(engine *e) {
    for (int32_t i = 0; i < e->n_rows; i++)
        for (int32_t h = 0; h < e->m->n_kv_heads; h++) {
            e->t.kept += kept_keys(&e->o->mask, e->pos[i], h, e->m->n_kv_heads);
            e->t.causal += e->pos[i] + 1;
        }
}

/* ---- answers ---- */

/* Appends a token's text; 1 when the answer is complete. Answers end at a newline. */
static int add_text(engine *e, request *r, int32_t id) {
    size_t n = llama_piece(e->m, id, NULL, 0), at = r->n_text;
    if (llama_is_end(e->m, id)) return 1;
    if (at + n + 1 > r->cap_text) {
        size_t cap = 2 * (at + n) + 64;
        char *p = (char *)realloc(r->text, cap);
        if (!p) return complain("out of memory");
        r->text = p;
        r->cap_text = cap;
    }
    llama_piece(e->m, id, r->text + at, n);
    r->n_text += n;
    if (e->o->prompt && !e->o->json) {
        fwrite(r->text + at, 1, n, stdout);
        fflush(stdout);
    }
    char *newline = r->question ? (char *)memchr(r->text + at, '\n', n) : NULL;
    if (newline) r->n_text = (size_t)(newline - r->text);
    r->text[r->n_text] = 0;
    return newline != NULL;
}

static int answer_right(const request *r) {
    size_t n = r->expected ? strlen(r->expected) : 0;
    return n && r->text && r->n_text >= n && !memcmp(r->text, r->expected, n);
}

static int finish(engine *e, request *r) {
    attn_result got = attn_tree_release(e->tree, r->seq, 1);
    r->phase = FINISHED;
    while (e->first_open < e->n_req && e->req[e->first_open].phase == FINISHED) e->first_open++;
    if (r->question && !e->o->json) {
        if (isatty(2)) fprintf(stderr, "\r\033[K");
        printf("%3d  %s  %s%s\n", (int)(r - e->req) + 1, r->question, r->text ? r->text : "",
               answer_right(r) ? "" : "  (wrong)");
        fflush(stdout);
    }
    return got ? attn_failed("prefix tree", got) : 0;
}

static int pick_tokens(engine *e) {
    for (int32_t i = 0; i < e->n_out; i++) {
        request *r = &e->req[e->out_req[i]];
        int32_t id = llama_sample(&r->sampler, e->logits + (int64_t)i * e->m->n_vocab,
                                  e->m->n_vocab);
        int done = id < 0 ? complain("out of memory") : add_text(e, r, id);
        if (done < 0) return -1;
        r->phase = ANSWERING;
        r->ids[r->n_ids++] = id;
        if ((done || r->n_ids == r->cap) && finish(e, r)) return -1;
    }
    return 0;
}

/* Shown while prompts are being read, on a terminal only. */
static void progress(const engine *e) {
    int64_t total = 0, have = 0;
    for (int32_t i = 0; i < e->n_req; i++) {
        const request *r = &e->req[i];
        total += r->n_prompt;
        have += r->n_kv < r->n_prompt ? r->n_kv : r->n_prompt;
    }
    if (e->o->json || !isatty(2) || have == total) return;
    int filled = (int)(30 * have / total);
    fprintf(stderr, "\r\033[K[%.*s%*s] %lld of %lld prompt tokens", filled,
            "##############################", 30 - filled, "", (long long)have, (long long)total);
}

static int serve(engine *e) {
    double start = seconds();
    while (e->first_open < e->n_req) {
        double t0 = seconds(), dt;
        int64_t prefill = e->t.prefill_rows;
        if (build_batch(e)) return -1;
        if (!e->n_rows) { /* nobody is here yet */
            e->t.steps++;
            continue;
        }
        if (forward(e) || pick_tokens(e)) return -1;
        count_kept(e);
        attn_tree_stats st;
        memset(&st, 0, sizeof st);
        attn_tree_get_stats(e->tree, &st);
        if (st.n_pages - st.n_free > e->t.peak_pages) e->t.peak_pages = st.n_pages - st.n_free;
        e->t.steps++;
        dt = seconds() - t0; /* shared out by rows: a batch mixes both kinds */
        e->t.busy_s += dt;
        prefill = e->t.prefill_rows - prefill;
        e->t.prefill_s += dt * (double)prefill / e->n_rows;
        e->t.decode_s += dt * (double)(e->n_rows - prefill) / e->n_rows;
        progress(e);
    }
    if (!e->o->json && isatty(2)) fprintf(stderr, "\r\033[K");
    e->t.wall_s = seconds() - start;
    return 0;
}

/* ==== report ==== */

static double peak_bytes(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
#ifdef __APPLE__
    return (double)u.ru_maxrss;
#else
    return (double)u.ru_maxrss * 1024;
#endif
}

static double ratio(double a, double b) { return b > 0 ? a / b : 0; }

static int32_t count_right(const engine *e) {
    int32_t right = 0;
    for (int32_t i = 0; i < e->n_req; i++) right += answer_right(&e->req[i]);
    return right;
}

/* What each request would hold with pages of its own. */
static double unshared_bytes(const engine *e) {
    double pages = 0;
    for (int32_t i = 0; i < e->n_req; i++) pages += pages_of(e, e->req[i].n_kv);
    return pages * (double)e->page_bytes;
}

static void print_table(const engine *e) {
    const totals *t = &e->t;
    double kv = (double)t->peak_pages * (double)e->page_bytes, own = unshared_bytes(e);
    printf("\n%s, %s KV, %s mask, %d threads, %s%s\n", e->o->model, e->o->kv_text,
           e->o->mask_text, (int)llama_pool_threads(e->pool), e->on->executor(e),
           e->o->no_share ? ", nothing shared" : "");
    if (!e->o->prompt)
        printf("answers right      %d of %d\n", (int)count_right(e), (int)e->n_req);
    printf("prompt tokens      %lld, %lld of them served from the prefix cache (%.1f %%)\n",
           (long long)t->prompt_tokens, (long long)t->cached_tokens,
           100 * ratio((double)t->cached_tokens, (double)t->prompt_tokens));
    printf("prefill            %lld tokens, %.0f tokens/s\n", (long long)t->prefill_rows,
           ratio((double)t->prefill_rows, t->prefill_s));
    printf("decode             %lld tokens, %.0f tokens/s\n", (long long)t->decode_rows,
           ratio((double)t->decode_rows, t->decode_s));
    printf("KV memory          %.1f MB, unshared %.1f MB (%.1fx)\n", kv / 1e6, own / 1e6,
           ratio(own, kv));
    if (t->kv_seen > t->kv_read)
        printf("KV visited         %.1fx fewer tokens than without sharing\n",
               ratio((double)t->kv_seen, (double)t->kv_read));
    printf("attention          %.0f %% of the time, %.1f %% of the scores kept\n",
           100 * ratio(t->attention_s, t->busy_s),
           100 * ratio((double)t->kept, (double)t->causal));
    printf("time, memory       %.2f s in %d steps, %.0f MB at the peak\n", t->wall_s,
           (int)t->steps, peak_bytes() / 1e6);
}

/* Valid JSON whatever the bytes are: broken UTF-8 becomes U+FFFD. */
static void json_string(const char *s, size_t n) {
    putchar('"');
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t c = llama_utf8(s + i, n - i, &len);
        if (c == 0xfffd && (uint8_t)s[i] != 0xef) printf("\\ufffd");
        else if (c == '"' || c == '\\') printf("\\%c", (int)c);
        else if (c < 32 || c == 127) printf("\\u%04x", (unsigned)c);
        else fwrite(s + i, 1, len, stdout);
    }
    putchar('"');
}

static void print_json(const engine *e) {
    const totals *t = &e->t;
    printf("{\"answers\": %d, \"answers_right\": %d, \"prompt_tokens\": %lld, "
           "\"cached_tokens\": %lld, \"prefill_tokens\": %lld, \"decode_tokens\": %lld,\n",
           (int)e->n_req, (int)count_right(e), (long long)t->prompt_tokens,
           (long long)t->cached_tokens, (long long)t->prefill_rows, (long long)t->decode_rows);
    printf(" \"prefill_tok_s\": %.1f, \"decode_tok_s\": %.1f, \"kv_bytes\": %.0f, "
           "\"kv_bytes_unshared\": %.0f,\n",
           ratio((double)t->prefill_rows, t->prefill_s),
           ratio((double)t->decode_rows, t->decode_s),
           (double)t->peak_pages * (double)e->page_bytes, unshared_bytes(e));
    printf(" \"kv_tokens_read\": %lld, \"kv_tokens_seen\": %lld, \"attention_share\": %.4f, "
           "\"kept_share\": %.6f,\n",
           (long long)t->kv_read, (long long)t->kv_seen, ratio(t->attention_s, t->busy_s),
           ratio((double)t->kept, (double)t->causal));
    printf(" \"wall_s\": %.4f, \"steps\": %d, \"plans_rebuilt\": %d, \"peak_bytes\": %.0f, "
           "\"threads\": %d,\n \"device\": \"%s\", \"executor\": \"%s\", \"kv\": \"%s\", "
           "\"mask\": \"%s\", \"share\": %s, \"model\": ",
           t->wall_s, (int)t->steps, (int)t->plans_rebuilt, peak_bytes(),
           (int)llama_pool_threads(e->pool), e->o->device, e->on->executor(e), e->o->kv_text,
           e->o->mask_text, e->o->no_share ? "false" : "true");
    json_string(e->o->model, strlen(e->o->model));
    printf(",\n \"texts\": [");
    for (int32_t i = 0; i < e->n_req; i++) {
        printf(i ? ",\n  " : "\n  ");
        json_string(e->req[i].text ? e->req[i].text : "", e->req[i].n_text);
    }
    printf("]}\n");
}

/* ==== main ==== */

static void close_engine(engine *e) {
    e->on->close(e);
    free(e->kv);
    free(e->tree_mem);
    free(e->ids);
    free(e->pos);
    free(e->slots);
    free(e->q_start);
    free(e->table);
    free(e->copies);
    free(e->logits);
    free(e->plan_mem);
}

static int answer_all(engine *e) {
    e->max_seq = e->n_req < e->o->batch ? e->n_req : e->o->batch;
    e->max_rows = e->o->chunk + e->max_seq + 1;
    for (int32_t i = 0; i < e->n_req; i++) e->t.prompt_tokens += e->req[i].n_prompt;
    describe(e);
    if (e->on->open(e) || open_kv(e) || open_batch(e)) return -1;
    if (e->o->prompt && !e->o->json) printf("%s", e->o->prompt);
    if (serve(e)) return -1;
    if (e->o->prompt && !e->o->json) printf("\n");
    if (e->o->json) print_json(e);
    else print_table(e);
    return fflush(stdout) ? complain("cannot write to stdout") : 0;
}

int main(int argc, char **argv) {
    options o;
    engine e;
    char err[LLAMA_ERR_BYTES];
    llama_model *m = NULL;
    int bad;
    memset(&e, 0, sizeof e);
    default_options(&o);
    bad = parse_options(argc, argv, &o);
    if (bad) return bad > 0 ? 0 : 2;
    e.o = &o;
    e.on = choose_device(&o);
    if (!e.on) return 1;
    bad = e.on->find(&e);
    if (!bad && !(e.pool = llama_pool_create(o.threads)))
        bad = complain("cannot start %d threads", (int)o.threads);
    /* only the CPU has a use for weights converted in its memory */
    if (!bad && !(m = llama_load(o.model, e.pool, e.on->f32_bytes, err)))
        bad = complain("%s: %s", o.model, err);
    e.m = m;
    if (!bad && !(e.req = load_requests(m, &o, &e.n_req))) bad = -1;
    if (!bad) bad = answer_all(&e);
    close_engine(&e);
    free_requests(e.req, e.n_req);
    llama_free(m);
    llama_pool_free(e.pool);
    return bad ? 1 : 0;
}

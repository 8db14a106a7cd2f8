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
#include <math.h>
#include <sys/resource.h>
#include <time.h>

#ifdef __has_include
#if __has_include(<stb/stb_image_write.h>)
#define HAVE_STB 1
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#endif
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif
#endif

/* ==== options ==== */

enum { MAX_DENSE = 256 }; /* layers that dense= can name */

typedef struct options {
    const char *model, *document, *questions, *prompt, *mask_text, *kv_text, *isa, *device;
    const char *select_text, *draw_text, *draw_file;
    int32_t no_share, json, threads, n_predict, page, chunk, batch, every, kv_mem, top_k, seed;
    float temp, top_p;
    attn_dtype kv;
    attn_numerics numerics;
    attn_mask mask;            /* of layers without lists that are not dense */
    attn_select select;        /* kind NONE: no lists */
    uint8_t dense[MAX_DENSE];  /* layers that stay dense */
    int32_t draw_layer, draw_head;
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
    "  --select S         lists of KV blocks computed from Q and K, NAME or NAME:KEY=VALUE,...\n"
    "                     exact: share= keep= epsilon= recent= (with none: .05, 512 at least)\n"
    "                     flex: gamma= tau= min= max= block= compat\n"
    "                     hip1, hip2: k= block= sink= window= qstride= kstride= refresh= group=\n"
    "                     near= nearwindow= vertical= (32) diagonal= random=; hip1 lowdim=\n"
    "                     patches=, hip2 headgroup=\n"
    "                     sample=first|middle|last|position|random|oracle\n"
    "                     hip (generation 3): keep= sink= window=, and for each stage\n"
    "                     stage=QUERIES/QSTRIDE/CHUNK/KEEP/REFRESH and any of the letters\n"
    "                     l (last score), c (centre), s (keep scores); with none: chunks of 2,\n"
    "                     all read; with kvblock=8 the three of the method's authors\n"
    "                     stride:BLOCK,LOCAL,STRIDE, the mask\n"
    "                     all: dense=0-2+5 (these layers), and but for stride rows= kvblock=\n"
    "                     heads=each|group|all (lists), from= (shorter sequences are dense)\n"
    "                     (with --device cuda no epsilon)\n"
    "  --draw L,H,FILE    PNG: what head H of layer L keeps of the first prompt (blue) and\n"
    "                     misses (red), the darker the more attention it gets\n"
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

/* ---- --select ---- */

enum { ON_STRIDE = 1 << ATTN_SELECT_NONE, ON_FLEX = 1 << ATTN_SELECT_FLEX,
       ON_HIP1 = 1 << ATTN_SELECT_HIP1, ON_HIP2 = 1 << ATTN_SELECT_HIP2,
       ON_HIP3 = 1 << ATTN_SELECT_HIP3, ON_EXACT = 1 << ATTN_SELECT_EXACT,
       ON_HIP12 = ON_HIP1 | ON_HIP2, ON_HIP = ON_HIP12 | ON_HIP3,
       ON_ANY = ON_FLEX | ON_HIP | ON_EXACT, OR_ZERO = 1 << 8 };

typedef struct select_key {
    const char *name;
    int kinds;                                         /* ON_... that have it */
    int32_t *number;                                   /* 1 .. 2^30 (OR_ZERO: or 0), or */
    float *real, most;                                 /* above 0, at most that, or */
    int (*parse)(const char *s, options *o);           /* 0 when it makes sense */
    const char *want;                                  /* what parse wants; no parse: a flag */
} select_key;

static int parse_heads(const char *s, options *o) {
    attn_select_heads *h = &o->select.heads;
    if (!strcmp(s, "each")) *h = ATTN_SELECT_EACH;
    else if (!strcmp(s, "group")) *h = ATTN_SELECT_GROUP;
    else if (!strcmp(s, "all")) *h = ATTN_SELECT_ALL;
    else return -1;
    return 0;
}

/* Layers, 0-2+5. */
static int parse_dense(const char *s, options *o) {
    for (;; s++) {
        char *end;
        if (*s < '0' || *s > '9') return -1;
        long a = strtol(s, &end, 10), b = a;
        if (*end == '-') {
            s = end + 1;
            if (*s < '0' || *s > '9') return -1;
            b = strtol(s, &end, 10);
        }
        if (a > b || b >= MAX_DENSE || (*end && *end != '+')) return -1;
        while (a <= b) o->dense[a++] = 1;
        if (!*end) return 0;
        s = end;
    }
}

/* QUERIES/QSTRIDE/CHUNK/KEEP/REFRESH and letters */
static int parse_stage(const char *s, options *o) {
    attn_hip *h = &o->select.hip;
    char text[96];
    int32_t v[5], flags = 0;
    size_t n = strlen(s);
    for (; n && (s[n - 1] == 'l' || s[n - 1] == 'c' || s[n - 1] == 's'); n--)
        flags |= s[n - 1] == 'l' ? ATTN_HIP_LAST_SCORE
                                 : s[n - 1] == 'c' ? ATTN_HIP_CENTRE : ATTN_HIP_KEEP_SCORES;
    if (n >= sizeof text || strchr(s, ',') || h->n_stages == ATTN_HIP_STAGES) return -1;
    for (size_t i = 0; i < n; i++) text[i] = s[i] == '/' ? ',' : s[i];
    text[n] = 0;
    if (parse_list(text, v, 5) != 5 || !v[0] || !v[1] || !v[2] || !v[4]) return -1;
    attn_hip_stage *t = &h->stage[h->n_stages++];
    t->q_block = v[0];
    t->q_stride = v[1];
    t->chunk = v[2];
    t->keep = v[3];
    t->refresh = v[4];
    t->flags = flags;
    return 0;
}

static int parse_sample(const char *s, options *o) {
    static const struct { const char *name; attn_hip_sample sample; } known[] = {
        {"middle", ATTN_HIP_MIDDLE}, {"first", ATTN_HIP_FIRST}, {"last", ATTN_HIP_LAST},
        {"position", ATTN_HIP_POSITION}, {"random", ATTN_HIP_RANDOM}, {"oracle", ATTN_HIP_ORACLE}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(s, known[i].name)) {
            o->select.hip.sample = known[i].sample;
            return 0;
        }
    return -1;
}

/* Gives key k its value, NULL: none was written. */
static int set_select_key(options *o, const select_key *k, const char *value) {
    const char *spec = o->select_text, *name = k->name;
    char *end;
    int32_t n;
    if (k->want && !k->parse) {
        *k->number = 1;
        return value ? complain("--select %s: %s takes no value", spec, name) : 0;
    }
    if (!value) return complain("--select %s: %s= needs a value", spec, name);
    if (k->parse) {
        if (!k->parse(value, o)) return 0;
        return complain("--select %s: %s=%s: want %s", spec, name, value, k->want);
    }
    if (k->number) {
        const int zero = (k->kinds & OR_ZERO) != 0;
        if (parse_list(value, &n, 1) != 1 || n < !zero)
            return complain("--select %s: %s=%s: want a whole number%s", spec, name, value,
                            zero ? "" : " above 0");
        *k->number = n;
        return 0;
    }
    double x = strtod(value, &end);
    if (end == value || *end || !(x > 0 && x <= (double)k->most))
        return complain("--select %s: %s=%s: want a number above 0, at most %g", spec, name, value,
                        (double)k->most);
    *k->real = (float)x;
    return 0;
}

/* One KEY=VALUE or flag. */
static int parse_select_key(options *o, char *text) {
    attn_select *s = &o->select;
    const select_key table[] = {
        {"rows", ON_ANY, &s->row_block, NULL, 0, NULL, NULL},
        {"kvblock", ON_ANY, &s->kv_block, NULL, 0, NULL, NULL},
        {"block", ON_FLEX, &s->kv_block, NULL, 0, NULL, NULL},
        {"block", ON_HIP12, &s->hip.block, NULL, 0, NULL, NULL},
        {"from", ON_ANY, &s->dense_below, NULL, 0, NULL, NULL},
        {"heads", ON_ANY, NULL, NULL, 0, parse_heads, "each, group or all"},
        {"dense", ON_ANY | ON_STRIDE, NULL, NULL, 0, parse_dense, "layers, 0-2+5 say"},
        {"gamma", ON_FLEX, NULL, &s->flex.gamma, 1, NULL, NULL},
        {"tau", ON_FLEX, NULL, &s->flex.tau, 1, NULL, NULL},
        {"min", ON_FLEX, &s->flex.min_budget, NULL, 0, NULL, NULL},
        {"max", ON_FLEX, &s->flex.max_budget, NULL, 0, NULL, NULL},
        {"compat", ON_FLEX, &s->flex.compatible, NULL, 0, NULL, "no value"},
        {"keep", ON_HIP, &s->hip.keep, NULL, 0, NULL, NULL},
        {"k", ON_HIP, &s->hip.keep, NULL, 0, NULL, NULL},
        {"sink", ON_HIP, &s->hip.sink, NULL, 0, NULL, NULL},
        {"window", ON_HIP, &s->hip.window, NULL, 0, NULL, NULL},
        {"qstride", ON_HIP12, &s->hip.q_stride, NULL, 0, NULL, NULL},
        {"kstride", ON_HIP12, &s->hip.k_stride, NULL, 0, NULL, NULL},
        {"refresh", ON_HIP12, &s->hip.refresh, NULL, 0, NULL, NULL},
        {"lowdim", ON_HIP1, &s->hip.low_dim, NULL, 0, NULL, NULL},
        {"group", ON_HIP12, &s->hip.q_group, NULL, 0, NULL, NULL},
        {"near", ON_HIP12 | OR_ZERO, &s->hip.near, NULL, 0, NULL, NULL},
        {"nearwindow", ON_HIP12, &s->hip.near_window, NULL, 0, NULL, NULL},
        {"vertical", ON_HIP12 | OR_ZERO, &s->hip.vertical, NULL, 0, NULL, NULL},
        {"diagonal", ON_HIP12 | OR_ZERO, &s->hip.diagonal, NULL, 0, NULL, NULL},
        {"random", ON_HIP12 | OR_ZERO, &s->hip.random, NULL, 0, NULL, NULL},
        {"patches", ON_HIP1, &s->hip.patches, NULL, 0, NULL, NULL},
        {"headgroup", ON_HIP2, &s->hip.head_group, NULL, 0, NULL, NULL},
        {"sample", ON_HIP2, NULL, NULL, 0, parse_sample,
         "first, middle, last, position, random or oracle"},
        {"stage", ON_HIP3, NULL, NULL, 0, parse_stage,
         "QUERIES/QSTRIDE/CHUNK/KEEP/REFRESH and any of l, c, s, six times at most"},
        {"keep", ON_EXACT, &s->exact.keep, NULL, 0, NULL, NULL},
        {"share", ON_EXACT, NULL, &s->exact.share, 1, NULL, NULL},
        {"epsilon", ON_EXACT, NULL, &s->exact.epsilon, 1, NULL, NULL},
        {"recent", ON_EXACT, &s->exact.recent, NULL, 0, NULL, NULL}};
    const size_t n = sizeof table / sizeof *table;
    char *value = strchr(text, '=');
    size_t i;
    if (value) *value++ = 0;
    for (i = 0; i < n && (strcmp(text, table[i].name) || !(table[i].kinds >> s->kind & 1)); i++) {}
    if (i == n) return complain("--select %s: no key %s here", o->select_text, text);
    return set_select_key(o, &table[i], value);
}

/* BLOCK,LOCAL,STRIDE; *text goes to what follows, NULL: nothing. */
static int parse_stride_select(options *o, char **text) {
    char *at = *text, *rest = at;
    int32_t v[3];
    for (int i = 0; i < 3 && rest; i++) rest = strchr(rest + (i > 0), ',');
    if (rest) *rest++ = 0;
    if (!at || parse_list(at, v, 3) != 3 || !v[0] || !v[1] || !v[2]) return -1;
    o->mask.stride.block = v[0];
    o->mask.stride.local = v[1];
    o->mask.stride.stride = v[2];
    *text = rest;
    return 0;
}

/* Where attn.h's defaults are not those of choice for a model that reads bytes. */
static int default_select(options *o) {
    attn_select *s = &o->select;
    attn_hip_stage stage = {0, 1, 2, 0, 1, 0, 0, ATTN_ROPE_NONE};
    attn_exact *x = &s->exact;
    if (s->kind == ATTN_SELECT_FLEX) {
        if (!s->kv_block) s->kv_block = s->row_block ? s->row_block : 128;
        if (!s->row_block) s->row_block = s->kv_block;
        if (s->row_block != s->kv_block)
            return complain("--select %s: rows and blocks must be equal", o->select_text);
    }
    if (!s->row_block) s->row_block = 64;
    if (s->kind == ATTN_SELECT_HIP3 && !s->hip.n_stages && !s->kv_block) {
        stage.q_block = s->row_block; /* a descent that reads both keys of every chunk */
        s->hip.stage[s->hip.n_stages++] = stage;
        s->kv_block = stage.chunk;
    }
    if (!x->keep && !(x->share > 0) && !(x->epsilon > 0)) {
        x->share = 0.05f; /* enough at 16k tokens, and less than the sink and oneself at 2k */
        x->keep = 512;
    }
    return 0;
}

static int parse_select(options *o) {
    static const struct { const char *name; attn_select_kind kind; int32_t vertical; } kinds[] = {
        {"stride", ATTN_SELECT_NONE, 0}, {"flex", ATTN_SELECT_FLEX, 0},
        {"hip1", ATTN_SELECT_HIP1, 32}, {"hip2", ATTN_SELECT_HIP2, 32},
        {"hip", ATTN_SELECT_HIP3, 0}, {"exact", ATTN_SELECT_EXACT, 0}};
    const char *s = o->select_text, *all = "stride, flex, hip1, hip2, hip or exact";
    char text[512], *at, *end;
    size_t i, n = s ? strcspn(s, ":") : 0, known = sizeof kinds / sizeof *kinds;
    if (!s) return 0;
    if (strcmp(o->mask_text, "dense")) return complain("--select and --mask exclude each other");
    if (strlen(s) >= sizeof text) return complain("--select: %zu characters at most", sizeof text);
    for (i = 0; i < known && (strlen(kinds[i].name) != n || strncmp(s, kinds[i].name, n)); i++) {}
    if (i == known) return complain("--select %s: want %s", s, all);
    o->select.kind = kinds[i].kind;
    o->select.hip.vertical = kinds[i].vertical;
    memcpy(text, s + n, strlen(s + n) + 1);
    at = text[0] ? text + 1 : NULL;
    if (!o->select.kind && parse_stride_select(o, &at))
        return complain("--select %s: want stride:BLOCK,LOCAL,STRIDE", s);
    if (at && !*at)
        return complain("--select %s: nothing after the last %c", s, at[-1] ? ':' : ',');
    while (at) { /* NULL: behind the last one */
        if ((end = strchr(at, ',')) != NULL) *end++ = 0;
        if (parse_select_key(o, at)) return -1;
        at = end;
    }
    return default_select(o);
}

/* LAYER,HEAD,FILE */
static int parse_draw(options *o) {
    char text[32];
    int32_t v[2];
    const char *s = o->draw_text, *file = s ? strchr(s, ',') : NULL;
    if (!s) return 0;
    if (file) file = strchr(file + 1, ',');
    if (!file || !file[1] || (size_t)(file - s) >= sizeof text)
        return complain("--draw %s: want LAYER,HEAD,FILE.png", s);
    memcpy(text, s, (size_t)(file - s));
    text[file - s] = 0;
    if (parse_list(text, v, 2) != 2) return complain("--draw %s: want LAYER,HEAD,FILE.png", s);
    o->draw_layer = v[0];
    o->draw_head = v[1];
    o->draw_file = file + 1;
#ifndef HAVE_STB
    return complain("--draw: this program was built without stb_image_write.h (libstb-dev)");
#else
    return 0;
#endif
}

/* ---- the command line ---- */

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
        {"--select", &o->select_text, NULL, 0, 0, NULL, 0},
        {"--draw", &o->draw_text, NULL, 0, 0, NULL, 0},
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
                   parse_numerics(numerics, &o->numerics) || parse_select(o) || parse_draw(o)
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
    int32_t slot;              /* its own among those that run */
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
    int64_t kept, causal;          /* visible and causal (query, key, head, layer) */
    int64_t scored, scorable;      /* ... that a selector scored, and could have; by list rows */
    int64_t kv_read, kv_seen;      /* KV tokens x heads visited, and as if nothing were shared */
    double prefill_s, decode_s, attention_s, select_s, busy_s, wall_s;
    int32_t steps, peak_pages, plans_rebuilt;
} totals;

typedef struct engine engine;
typedef struct picture picture;

/* What depends on where the model runs. 0, or -1 after a message. */
typedef struct device {
    int k16;                                             /* wants keys in the layout K16 */
    size_t f32_bytes;                                    /* for llama_load */
    int (*find)(engine *e);                              /* before the model is loaded */
    int (*open)(engine *e);                              /* layers; sets d.q.data, d.o.data */
    void *(*alloc_pages)(engine *e, size_t n, size_t each); /* zeroed; NULL after a message */
    int (*check_select)(const engine *e);                /* can it do what --select asks for? */
    int (*open_lists)(engine *e, size_t each);           /* memory; lays out lists, seen_lists */
    int (*forget)(engine *e, int32_t layer, int32_t slot);
    int (*follow)(engine *e);                            /* room for selecting from the batch */
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
    size_t partial_bytes, scratch_bytes;         /* scratch: per thread */
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
    /* --select */
    attn_select select;
    attn_selection *lists;                       /* (n_layers) NULL: no lists */
    attn_selection *seen_lists;                  /* (n_layers) what the host sees of them */
    attn_summary *summary;                       /* (n_layers) exact */
    int32_t *slot, *seq_row;                     /* (max_seq) */
    int32_t *new_start, *new_pos0;               /* (max_seq + 1) what summaries have to cover */
    uint8_t *slot_taken;                         /* (max_seq) */
    void *lists_mem, *summary_mem, *select_mem;
    size_t select_bytes;                         /* scratch: per thread */
    picture *draw;                               /* --draw */
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
    e->q_start = (int32_t *)calloc(seqs, 13 * sizeof(int32_t)); /* and the 12 below */
    e->slot_taken = (uint8_t *)calloc(seqs, 1);
    e->table = (int32_t *)calloc(seqs, (size_t)e->max_pages * sizeof(int32_t));
    e->copies = (attn_page_copy *)calloc(seqs, sizeof *e->copies);
    e->logits = (float *)calloc(seqs, (size_t)e->m->n_vocab * sizeof(float));
    if (!e->ids || !e->pos || !e->slots || !e->q_start || !e->table || !e->copies || !e->logits ||
        !e->slot_taken)
        return complain("out of memory for a batch of %d tokens", (int)e->max_rows);
    e->q_pos0 = e->q_start + seqs;
    e->kv_len = e->q_pos0 + seqs;
    e->seqs = e->kv_len + seqs;
    e->order = e->seqs + seqs;
    e->order_tmp = e->order + seqs;
    e->out_row = e->order_tmp + seqs;
    e->out_req = e->out_row + seqs;
    e->fresh = e->out_req + seqs;
    e->slot = e->fresh + seqs;
    e->seq_row = e->slot + seqs;
    e->new_start = e->seq_row + seqs;
    e->new_pos0 = e->new_start + seqs;
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
    r->slot = 0; /* one is free: at most max_seq requests run */
    while (e->slot_taken[r->slot]) r->slot++;
    e->slot_taken[r->slot] = 1;
    for (int32_t l = 0; e->lists && l < e->m->n_layers; l++)
        if (e->on->forget(e, l, r->slot)) return -1;
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
    e->slot[i] = r->slot;
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

/* ---- layers: their pages, masks and lists ---- */

static int is_dense(const engine *e, int32_t layer) {
    return layer < MAX_DENSE && e->o->dense[layer];
}

static int has_lists(const engine *e, int32_t layer) { return e->lists && !is_dense(e, layer); }

static void choose_layer(engine *e, int32_t layer) {
    e->d.kv.k.data = e->kv[layer].k;
    e->d.kv.v.data = e->kv[layer].v;
    memset(&e->d.mask, 0, sizeof e->d.mask);
    if (has_lists(e, layer)) attn_selection_mask(&e->lists[layer], &e->d.mask);
    else if (!is_dense(e, layer)) e->d.mask = e->o->mask;
}

/* The first layer that is dense or not, -1: none. */
static int32_t first_layer(const engine *e, int dense) {
    for (int32_t l = 0; l < e->m->n_layers; l++)
        if (is_dense(e, l) == dense) return l;
    return -1;
}

/* The plan is that of every layer: it depends on whether there are lists, not on what they say. */
static void choose_planned_layer(engine *e) {
    int32_t l = first_layer(e, 0);
    choose_layer(e, l < 0 ? 0 : l);
}

/* Before anything is read; the batch is still empty. */
static int check_select(engine *e) {
    if (!e->o->select.kind) return 0;
    e->d.n_seq = 1;
    attn_result r = attn_select_check(&e->d, &e->o->select);
    if (r == ATTN_ERR_ARGUMENT)
        return complain("--select %s: values that do not fit each other", e->o->select_text);
    return r ? attn_failed("selecting", r) : e->on->check_select(e);
}

/* Layers' lists in mem, `each` bytes for one. */
static int lay_lists(engine *e, void *mem, size_t each, int on_gpu, attn_selection *out) {
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        uint8_t *at = (uint8_t *)aligned(mem) + (size_t)l * each;
        e->d.mask = e->o->mask;
        attn_result r = attn_selection_init(&e->d, &e->select, at, each, e->seq_row, on_gpu,
                                            &out[l]);
        if (r) return attn_failed("selecting", r);
    }
    return 0;
}

/* Lists for every layer, large enough for whatever batch comes; called with the first one. */
static int open_lists(engine *e) {
    attn_select *s = &e->select;
    const size_t layers = (size_t)e->m->n_layers;
    *s = e->o->select;
    if (s->kind >= ATTN_SELECT_HIP1 && s->kind <= ATTN_SELECT_HIP3) s->n_slots = e->max_seq;
    s->max_rows = s->n_slots + e->max_rows / s->row_block + 2 * e->max_seq;
    s->max_kv_len = e->max_pages * e->o->page;
    size_t each = (attn_select_bytes(&e->d, s) + 63) / 64 * 64;
    e->lists = (attn_selection *)calloc(layers, sizeof *e->lists);
    e->seen_lists = (attn_selection *)calloc(layers, sizeof *e->seen_lists);
    if (!each || !e->lists || !e->seen_lists) return complain("out of memory for the lists");
    if (e->on->open_lists(e, each)) return -1;
    for (int32_t l = 0; l < e->m->n_layers; l++)
        for (int32_t i = 0; i < s->n_slots; i++)
            if (e->on->forget(e, l, i)) return -1;
    return 0;
}

/* The lists' rows for this batch, and scratch. */
static int follow_batch(engine *e) {
    if (!e->o->select.kind) return 0;
    if (!e->lists && open_lists(e)) return -1;
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        attn_result r = attn_selection_follow(&e->d, &e->select, e->slot, &e->lists[l]);
        if (r) return attn_failed("selecting", r);
        e->lists[l].keeps_all = 0; /* lists all the same: what they keep is counted */
    }
    return e->on->follow(e);
}

/* ---- plans ---- */

/* Parameters and a plan for the chosen layer, in *mem, for the largest problem that can come. */
static int build_plan(engine *e, attn_plan_params *p, void **mem, attn_plan **plan) {
    attn_result r = attn_validate(&e->d);
    if (r) return attn_failed("attention", r);
    memset(p, 0, sizeof *p);
    e->on->plan_params(e, p);
    p->max_seq = e->max_seq;
    p->max_tokens = e->max_rows;
    p->max_kv_len = e->max_pages * e->o->page;
    size_t bytes = attn_plan_bytes(&e->d, p);
    *mem = malloc(bytes + 64);
    if (!bytes || !*mem) return complain("out of memory for the attention plan");
    r = attn_plan_build(&e->d, p, aligned(*mem), bytes, plan);
    return r ? attn_failed("planning attention", r) : 0;
}

/* ---- on the CPU ---- */

/* What one thread pool task needs of the attention of a layer. */
typedef struct attend_ctx {
    engine *e;
    int32_t status; /* atomic: first attn_result that was not OK */
    int32_t layer;
    const attn_desc *d;     /* of what is cut into units */
    int64_t units, n_tasks;
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

static void summarize_task(void *ctx, int64_t task, int32_t thread) {
    attend_ctx *c = (attend_ctx *)ctx;
    int64_t first = c->units * task / c->n_tasks, end = c->units * (task + 1) / c->n_tasks;
    (void)thread;
    note(c, attn_cpu_summarize(c->d, &c->e->summary[c->layer], first, end - first));
}

static void select_task(void *ctx, int64_t task, int32_t thread) {
    attend_ctx *c = (attend_ctx *)ctx;
    engine *e = c->e;
    int64_t first = c->units * task / c->n_tasks, end = c->units * (task + 1) / c->n_tasks;
    uint8_t *scratch = (uint8_t *)aligned(e->select_mem) + (size_t)thread * e->select_bytes;
    note(c, attn_cpu_select(c->d, &e->select, &e->summary[c->layer], &e->lists[c->layer], first,
                            end - first, scratch));
}

/* Units are uneven and a call has a price of its own: some tasks for each thread. */
static void run_units(attend_ctx *c, llama_task fn, int64_t units) {
    int64_t most = 16 * (int64_t)llama_pool_threads(c->e->pool);
    c->units = units;
    c->n_tasks = units < most ? units : most;
    llama_pool_run(c->e->pool, fn, c, c->n_tasks);
}

/* The layer's lists from its Q and stored K. */
static int select_blocks(engine *e, int32_t layer) {
    attn_desc fresh = e->d;
    attend_ctx c = {e, 0, layer, &fresh, 0, 0};
    double t0 = seconds();
    fresh.q_start = e->new_start;
    fresh.q_pos0 = e->new_pos0;
    memset(&fresh.mask, 0, sizeof fresh.mask);
    if (e->select.kind == ATTN_SELECT_EXACT)
        run_units(&c, summarize_task, attn_cpu_summarize_units(&fresh));
    c.d = &e->d;
    if (!c.status) run_units(&c, select_task, attn_cpu_select_units(&e->d, &e->select));
    e->t.select_s += seconds() - t0;
    return c.status ? attn_failed("selecting", (attn_result)c.status) : 0;
}

static int cpu_check_select(const engine *e) {
    (void)e;
    return 0; /* all there is */
}

static int cpu_forget(engine *e, int32_t layer, int32_t slot) {
    attn_cpu_select_forget(&e->lists[layer], slot);
    return 0;
}

static int cpu_open_lists(engine *e, size_t each) {
    const size_t layers = (size_t)e->m->n_layers;
    size_t summary = e->select.kind == ATTN_SELECT_EXACT ? attn_summary_bytes(&e->d) : 0;
    summary = (summary + 63) / 64 * 64;
    e->summary = (attn_summary *)calloc(layers, sizeof *e->summary);
    e->summary_mem = malloc(layers * summary + 64);
    e->lists_mem = calloc(layers, each + 64);
    if (!e->summary || !e->summary_mem || !e->lists_mem)
        return complain("out of memory for the lists");
    for (size_t l = 0; l < layers; l++)
        e->summary[l].data = (uint16_t *)(void *)((uint8_t *)aligned(e->summary_mem) + l * summary);
    if (lay_lists(e, e->lists_mem, each, 0, e->lists)) return -1;
    memcpy(e->seen_lists, e->lists, layers * sizeof *e->lists);
    return 0;
}

/* Summaries change where K does: at new tokens, and in a copied page from its first token on. */
static void cover_new_keys(engine *e) {
    for (int32_t i = 0; i < e->n_seq; i++) {
        int32_t before = e->n_copies ? e->q_pos0[i] % e->o->page : 0;
        e->new_pos0[i] = e->q_pos0[i] - before;
        e->new_start[i + 1] = e->new_start[i] + e->q_start[i + 1] - e->q_start[i] + before;
    }
}

static int cpu_follow(engine *e) {
    const size_t threads = (size_t)llama_pool_threads(e->pool);
    cover_new_keys(e);
    size_t bytes = (attn_cpu_select_scratch_bytes(&e->d, &e->select) + 63) / 64 * 64;
    if (bytes <= e->select_bytes) return 0;
    free(e->select_mem);
    e->select_bytes = bytes;
    e->select_mem = malloc(threads * bytes + 64);
    return e->select_mem ? 0 : complain("out of memory for selecting");
}

/* ---- picture: what a head keeps and misses of the first prompt ---- */

struct picture {
    int32_t n, cell;     /* cells a side, tokens a cell */
    float *k;            /* (n_prompt, head_dim) of the head's KV head */
    float *scores;       /* (threads, n_prompt) */
    float *cells;        /* (n, n, 4): pairs, pairs kept, attention, attention kept */
    double mass, kept;   /* attention in all of them, and kept */
    int32_t seq;         /* in the batch being drawn */
};

enum { PICTURE = 1024 }; /* cells a side at most */

static int open_picture(engine *e) {
    const options *o = e->o;
    const size_t n = (size_t)e->req[0].n_prompt;
    if (!o->draw_file) return 0;
    if (o->draw_layer >= e->m->n_layers || o->draw_head >= e->m->n_heads)
        return complain("--draw %s: the model has %d layers and %d heads", o->draw_text,
                        (int)e->m->n_layers, (int)e->m->n_heads);
    picture *p = e->draw = (picture *)calloc(1, sizeof *p);
    if (!p) return complain("out of memory for the picture");
    p->cell = (e->req[0].n_prompt + PICTURE - 1) / PICTURE;
    p->n = (e->req[0].n_prompt + p->cell - 1) / p->cell;
    p->k = (float *)calloc(n, (size_t)e->m->head_dim * sizeof(float));
    p->scores = (float *)calloc((size_t)llama_pool_threads(e->pool), n * sizeof(float));
    p->cells = (float *)calloc((size_t)p->n, (size_t)p->n * 4 * sizeof(float));
    return p->k && p->scores && p->cells ? 0 : complain("out of memory for the picture");
}

static void close_picture(engine *e) {
    if (!e->draw) return;
    free(e->draw->k);
    free(e->draw->scores);
    free(e->draw->cells);
    free(e->draw);
}

/* Query row i of the batch into the cells of its line. */
static void draw_query(engine *e, int32_t i, float *score) {
    picture *pic = e->draw;
    const int32_t dim = e->m->head_dim, head = e->o->draw_head, pos = e->pos[i];
    const float *q = e->s->q + ((int64_t)i * e->m->n_heads + head) * dim;
    const float scale = 1 / sqrtf((float)dim);
    float *line = pic->cells + (int64_t)(pos / pic->cell) * pic->n * 4, most = -INFINITY, sum = 0;
    for (int32_t j = 0; j <= pos; j++) {
        const float *k = pic->k + (int64_t)j * dim;
        float x = 0;
        for (int32_t c = 0; c < dim; c++) x += q[c] * k[c];
        score[j] = x * scale;
        if (score[j] > most) most = score[j];
    }
    for (int32_t j = 0; j <= pos; j++) sum += score[j] = expf(score[j] - most);
    for (int32_t j = 0; j <= pos; j++) {
        float *cell = line + (int64_t)(j / pic->cell) * 4, mass = score[j] / sum;
        cell[0] += 1;
        cell[2] += mass;
        if (!attn_ref_visible(&e->d, pic->seq, i, head, j)) continue;
        cell[1] += 1;
        cell[3] += mass;
    }
}

/* Task: a line of cells. */
static void draw_task(void *ctx, int64_t task, int32_t thread) {
    engine *e = (engine *)ctx;
    picture *p = e->draw;
    const int32_t first = e->q_start[p->seq], end = e->q_start[p->seq + 1];
    const int64_t line = e->pos[first] / p->cell + task;
    for (int32_t i = first; i < end; i++)
        if (e->pos[i] / p->cell == line && e->pos[i] < e->req[0].n_prompt)
            draw_query(e, i, p->scores + (int64_t)thread * e->req[0].n_prompt);
}

/* The first request is ahead of the others, so all of its K passes by here. */
static void draw_batch(engine *e) {
    picture *p = e->draw;
    const int32_t dim = e->m->head_dim, n = e->req[0].n_prompt;
    const int32_t kv_head = e->o->draw_head / (e->m->n_heads / e->m->n_kv_heads);
    for (p->seq = 0; p->seq < e->n_seq && e->seqs[p->seq] != e->req[0].seq; p->seq++) {}
    if (p->seq == e->n_seq || e->req[0].phase != READING) return;
    const int32_t first = e->q_start[p->seq], last = e->q_start[p->seq + 1] - 1;
    for (int32_t i = first; i <= last && e->pos[i] < n; i++)
        memcpy(p->k + (int64_t)e->pos[i] * dim,
               e->s->k + ((int64_t)i * e->m->n_kv_heads + kv_head) * dim,
               (size_t)dim * sizeof(float));
    llama_pool_run(e->pool, draw_task, e, e->pos[last] / p->cell - e->pos[first] / p->cell + 1);
}

/* Kept cells from light to dark blue, missed ones from white to red, by the logarithm of what a
 * pair gets of its query's attention: 1e-6 to 0.1. */
static void shade(const float *cell, uint8_t *rgb) {
    static const float from[2][3] = {{255, 255, 255}, {198, 219, 239}};
    static const float to[2][3] = {{203, 24, 29}, {8, 48, 107}};
    float dark[2], f = cell[0] > 0 ? cell[1] / cell[0] : 0;
    for (int k = 0; k < 2; k++) {
        float n = k ? cell[1] : cell[0] - cell[1], m = k ? cell[3] : cell[2] - cell[3];
        float x = n > 0 && m > 0 ? (log10f(m / n) + 6) / 5 : 0;
        dark[k] = x < 0 ? 0 : x > 1 ? 1 : x;
    }
    for (int c = 0; c < 3; c++) {
        float miss = from[0][c] + dark[0] * (to[0][c] - from[0][c]);
        float kept = from[1][c] + dark[1] * (to[1][c] - from[1][c]);
        rgb[c] = (uint8_t)(cell[0] > 0 ? miss + f * (kept - miss) : 235);
    }
}

static int write_picture(engine *e) {
    picture *p = e->draw;
    int ok = 0;
    if (!p) return 0;
    uint8_t *rgb = (uint8_t *)malloc((size_t)p->n * (size_t)p->n * 3);
    if (!rgb) return complain("out of memory for the picture");
    for (int64_t i = 0; i < (int64_t)p->n * p->n; i++) {
        p->mass += (double)p->cells[4 * i + 2];
        p->kept += (double)p->cells[4 * i + 3];
        shade(p->cells + 4 * i, rgb + 3 * i);
    }
#ifdef HAVE_STB
    ok = stbi_write_png(e->o->draw_file, p->n, p->n, 3, rgb, p->n * 3);
#endif
    free(rgb);
    return ok ? 0 : complain("%s: cannot write", e->o->draw_file);
}

/* ---- a step ---- */

/* Copies pages that diverge, stores the new K and V, selects, then attends. */
static int attend(engine *e, int32_t layer) {
    attend_ctx c = {e, 0, layer, &e->d, 0, 0};
    attn_result r;
    choose_layer(e, layer);
    r = attn_cpu_copy_pages(&e->d, e->copies, e->n_copies);
    if (r) return attn_failed("copying pages", r);
    llama_pool_run(e->pool, store_task, &c, (e->n_rows + STORE_ROWS - 1) / STORE_ROWS);
    if (c.status) return attn_failed("storing keys and values", (attn_result)c.status);
    if (has_lists(e, layer) && select_blocks(e, layer)) return -1;
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
    double t0, attention = e->t.select_s; /* less what attend spends on it */
    llama_embed(e->m, e->pool, e->s, e->ids, e->pos, e->n_rows);
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        llama_qkv(e->m, e->pool, e->s, l);
        t0 = seconds();
        if (attend(e, l)) return -1;
        attention += seconds() - t0;
        if (e->draw && l == e->o->draw_layer) draw_batch(e);
        llama_out(e->m, e->pool, e->s, l);
    }
    if (e->n_out) llama_logits(e->m, e->pool, e->s, e->out_row, e->n_out, e->logits);
    e->t.attention_s += attention - e->t.select_s;
    return 0;
}

static const char *cpu_executor(const engine *e) { return attn_cpu_executor(&e->d); }

static void cpu_close(engine *e) {
    free(e->kv_mem);
    free(e->partial_mem);
    free(e->scratch_mem);
    free(e->lists_mem);
    free(e->summary);
    free(e->summary_mem);
    free(e->select_mem);
    llama_state_free(e->s);
}

static const device on_cpu = {1, 0, cpu_find, cpu_open, cpu_alloc_pages, cpu_check_select,
                              cpu_open_lists, cpu_forget, cpu_follow, cpu_plan_params,
                              cpu_open_plan, cpu_forward, cpu_executor, cpu_close};

/* ---- on a CUDA device ---- */

#ifdef GENERATE_CUDA
/* Layers with one kind of mask. */
typedef struct gpu_plan {
    int32_t layer;                     /* the first of them, -1: none */
    attn_plan *plan;
    void *mem;                         /* host: the plan, unless it is the engine's */
    attn_cuda_plan image;
    void *staging;
    size_t bytes;                      /* of the plan's image and of staging */
} gpu_plan;

typedef struct gpu {
    attn_cuda attn;
    llama_cuda model;
    int64_t *slots;                    /* device: (max_rows) */
    gpu_plan plan, dense;              /* dense: of such layers where others are not */
    void *partials;
    void *work;                        /* --select */
    size_t work_bytes;
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

static int gpu_check_select(const engine *e) {
    const gpu *g = (const gpu *)e->gpu;
    return attn_cuda_select_bytes(&g->attn, &e->d, &e->o->select)
               ? 0
               : complain("--select %s: --device cpu has it, --device cuda has not",
                          e->o->select_text);
}

static int gpu_forget(engine *e, int32_t layer, int32_t slot) {
    gpu *g = (gpu *)e->gpu;
    attn_result r = attn_cuda_select_forget(&g->attn, &e->lists[layer], slot, g->model.stream);
    return r ? attn_failed("selecting", r) : 0;
}

/* FLEX needs room by the sequences that have over two blocks of queries: as many as a batch may. */
static size_t gpu_select_bytes(engine *e) {
    const gpu *g = (const gpu *)e->gpu;
    const int32_t b = e->select.kv_block;
    attn_desc d = e->d;
    if (e->select.kind == ATTN_SELECT_FLEX && b < e->max_rows / 2) {
        const int32_t each = 2 * b + 1, n = e->max_rows / each;
        d.n_seq = n < e->max_seq ? n : e->max_seq;
        for (int32_t i = 0; i < d.n_seq; i++) e->new_start[i + 1] = (i + 1) * each;
        d.q_start = e->new_start;
        d.q_pos0 = e->new_pos0; /* zeroes: the device has no other use for these */
        d.seq_order = NULL;
    }
    return attn_cuda_select_bytes(&g->attn, &d, &e->select);
}

static int gpu_open_lists(engine *e, size_t each) {
    gpu *g = (gpu *)e->gpu;
    const size_t bytes = (size_t)e->m->n_layers * each + 64;
    void *lists = llama_cuda_alloc(&g->model, bytes, 0, g->err);
    void *seen = lists ? llama_cuda_alloc(&g->model, bytes, 1, g->err) : NULL;
    if (!seen) return gpu_failed(g);
    g->work_bytes = gpu_select_bytes(e);
    g->work = llama_cuda_alloc(&g->model, g->work_bytes, 0, g->err);
    if (!g->work) return gpu_failed(g);
    return lay_lists(e, lists, each, 1, e->lists) || lay_lists(e, seen, each, 0, e->seen_lists)
               ? -1
               : 0;
}

static int gpu_follow(engine *e) {
    (void)e;
    return 0; /* the workspace does for every batch */
}

static int gpu_open_image(engine *e, const attn_plan_params *p, gpu_plan *x) {
    gpu *g = (gpu *)e->gpu;
    attn_result r = attn_cuda_supports(&g->attn, &e->d);
    if (r) return attn_failed("attention", r);
    x->bytes = attn_cuda_plan_bytes(&g->attn, &e->d, p);
    void *image = llama_cuda_alloc(&g->model, x->bytes, 0, g->err);
    x->staging = image ? llama_cuda_alloc(&g->model, x->bytes, 1, g->err) : NULL;
    if (!x->staging) return gpu_failed(g);
    r = attn_cuda_plan_init(&g->attn, &e->d, p, image, x->bytes, &x->image);
    return r ? attn_failed("planning attention", r) : 0;
}

/* Tasks on the device follow from the mask, so dense layers beside others have their own. */
static int gpu_open_plan(engine *e, const attn_plan_params *p) {
    gpu *g = (gpu *)e->gpu;
    attn_plan_params q;
    g->plan.plan = e->plan;
    g->plan.layer = first_layer(e, 0);
    g->dense.layer = first_layer(e, 1);
    if (g->plan.layer < 0) { /* all are dense */
        g->plan.layer = g->dense.layer;
        g->dense.layer = -1;
    }
    if (gpu_open_image(e, p, &g->plan)) return -1;
    if (g->dense.layer >= 0) {
        choose_layer(e, g->dense.layer);
        if (build_plan(e, &q, &g->dense.mem, &g->dense.plan) ||
            gpu_open_image(e, &q, &g->dense))
            return -1;
        if (q.partial_bytes > e->partial_bytes) e->partial_bytes = q.partial_bytes;
    }
    g->partials = llama_cuda_alloc(&g->model, e->partial_bytes, 0, g->err);
    return g->partials ? 0 : gpu_failed(g);
}

/* attend() for the device; every call is queued and none waits. */
static int gpu_attend(engine *e, int32_t layer) {
    gpu *g = (gpu *)e->gpu;
    attn_cuda_stream stream = g->model.stream;
    const gpu_plan *x = g->dense.layer >= 0 && is_dense(e, layer) ? &g->dense : &g->plan;
    attn_tensor k, v;
    attn_result r;
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = g->model.k;
    v.data = g->model.v;
    choose_layer(e, layer);
    r = attn_cuda_copy_pages(&g->attn, &e->d, e->copies, e->n_copies, stream);
    if (r) return attn_failed("copying pages", r);
    r = attn_cuda_store(&g->attn, &e->d, &x->image, &k, &v, g->slots, 0, e->n_rows, stream);
    if (r) return attn_failed("storing keys and values", r);
    if (llama_cuda_mark(&g->model, layer, 1, g->err)) return gpu_failed(g);
    if (has_lists(e, layer)) {
        r = attn_cuda_select(&g->attn, &e->d, &x->image, &e->select, NULL, &e->lists[layer],
                             g->work, g->work_bytes, stream);
        if (r) return attn_failed("selecting", r);
    }
    if (llama_cuda_mark(&g->model, layer, 2, g->err)) return gpu_failed(g);
    r = attn_cuda_run(&g->attn, &e->d, &x->image, g->partials, e->partial_bytes, stream);
    return r ? attn_failed("attention", r) : 0;
}

/* The step ends when the host has what it asked for, so one staging buffer each is enough. */
static int gpu_upload(engine *e, gpu_plan *x) {
    gpu *g = (gpu *)e->gpu;
    attn_result r;
    choose_layer(e, x->layer);
    r = x->mem ? attn_plan_update(x->plan, &e->d, NULL) : ATTN_OK; /* the engine's: up to date */
    if (!r)
        r = attn_cuda_upload(&g->attn, &e->d, x->plan, &x->image, x->staging, x->bytes,
                             g->model.stream);
    return r ? attn_failed("planning attention", r) : 0;
}

/* What was selected, for the host to count. */
static int gpu_fetch_lists(engine *e) {
    gpu *g = (gpu *)e->gpu;
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        if (!has_lists(e, l)) continue;
        const attn_selection *x = &e->lists[l];
        const int64_t n = (int64_t)x->n_lists * (x->max_rows + 1); /* visited, the last to read */
        const size_t bytes = (size_t)((uint8_t *)(x->visited + n) - (uint8_t *)x->row_start);
        if (llama_cuda_download(&g->model, e->seen_lists[l].row_start, x->row_start, bytes, g->err))
            return gpu_failed(g);
    }
    return 0;
}

static int gpu_forward(engine *e) {
    gpu *g = (gpu *)e->gpu;
    llama_cuda *m = &g->model;
    double attention = 0, select = 0;
    int32_t error = 0;
    if (gpu_upload(e, &g->plan) || (g->dense.layer >= 0 && gpu_upload(e, &g->dense))) return -1;
    if (llama_cuda_upload(m, g->slots, e->slots, (size_t)e->n_rows * sizeof *e->slots, g->err) ||
        llama_cuda_embed(m, e->ids, e->pos, e->n_rows, g->err))
        return gpu_failed(g);
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        if (llama_cuda_qkv(m, l, g->err) || llama_cuda_mark(m, l, 0, g->err))
            return gpu_failed(g);
        if (gpu_attend(e, l)) return -1;
        if (llama_cuda_mark(m, l, 3, g->err) || llama_cuda_out(m, l, g->err))
            return gpu_failed(g);
    }
    if ((e->n_out && llama_cuda_logits(m, e->out_row, e->n_out, e->logits, g->err)) ||
        llama_cuda_download(m, &error, g->attn.error, sizeof error, g->err) ||
        llama_cuda_seconds(m, 0, 3, &attention, g->err) ||
        llama_cuda_seconds(m, 1, 2, &select, g->err))
        return gpu_failed(g);
    if (!e->lists || first_layer(e, 0) < 0) select = 0; /* what the marks themselves take */
    e->t.attention_s += attention - select;
    e->t.select_s += select;
    return error ? attn_failed("attention on the device", (attn_result)error) : gpu_fetch_lists(e);
}

static const char *gpu_executor(const engine *e) {
    return attn_cuda_executor(&((const gpu *)e->gpu)->attn, &e->d);
}

static void gpu_close(engine *e) {
    gpu *g = (gpu *)e->gpu;
    if (g) llama_cuda_close(&g->model); /* pages and lists as well */
    if (g) free(g->dense.mem);
    free(g);
}

static const device on_cuda = {0, 1, gpu_find, gpu_open, gpu_alloc_pages, gpu_check_select,
                               gpu_open_lists, gpu_forget, gpu_follow, gpu_plan_params,
                               gpu_open_plan, gpu_forward, gpu_executor, gpu_close};
#endif

static const device *choose_device(const options *o) {
    if (!strcmp(o->device, "cpu")) return &on_cpu;
    if (o->draw_file) {
        complain("--device cuda: --draw runs with --device cpu");
        return NULL;
    }
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

/* Sized when the first batch is known. */
static int open_plan(engine *e) {
    attn_plan_params p;
    if (build_plan(e, &p, &e->plan_mem, &e->plan)) return -1;
    e->partial_bytes = p.partial_bytes;
    return e->on->open_plan(e, &p);
}

static int plan_batch(engine *e) {
    int rebuilt = 1;
    attn_result r;
    e->d.n_seq = e->n_seq;
    r = attn_tree_order(e->tree, e->seqs, e->n_seq, e->order, e->order_tmp);
    if (r) return attn_failed("prefix tree", r);
    if (follow_batch(e)) return -1;
    choose_planned_layer(e);
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

/* Keys that the KV head sees from position p: the closed forms of the masks. */
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

/* Keys that position p sees by row of a list: sink, window, and what its blocks add between. */
static int64_t listed_keys(const attn_selection *x, int64_t row, int32_t p) {
    const int64_t end = (int64_t)p + 1, recent = end - x->keep_recent;
    const int64_t sink = x->keep_sink < end ? x->keep_sink : end;
    const int64_t window = recent > sink ? recent : sink;
    int64_t kept = sink + end - window;
    for (int64_t i = x->row_start[row]; i < x->row_end[row]; i++) {
        int64_t a = (int64_t)x->block[i] * x->list.kv_block, b = a + x->list.kv_block;
        if (a < sink) a = sink;
        if (b > window) b = window;
        if (a < b) kept += b - a;
    }
    return kept;
}

/* What the lists of a layer let query row i of sequence s see, over all heads. */
static void count_listed(engine *e, int32_t layer, int32_t s, int32_t i) {
    const attn_selection *x = &e->seen_lists[layer];
    const int32_t heads = e->m->n_heads / x->n_lists, p = e->pos[i], rows = x->list.row_block;
    const int32_t last = e->pos[e->q_start[s + 1] - 1], end = p / rows * rows + rows;
    e->t.scorable += (int64_t)e->m->n_heads * (end <= last ? end : last + 1);
    for (int32_t l = 0; l < x->n_lists; l++) {
        int64_t row = (int64_t)l * (x->list.n_rows + 1) + x->seq_row[s] + p / rows;
        e->t.kept += heads * listed_keys(x, row, p);
        e->t.scored += (int64_t)heads * x->visited[row];
    }
}

static void count_kept(engine *e) {
    const int32_t kv_heads = e->m->n_kv_heads, group = e->m->n_heads / kv_heads;
    for (int32_t l = 0; l < e->m->n_layers; l++) {
        choose_layer(e, l);
        for (int32_t s = 0; s < e->n_seq; s++)
            for (int32_t i = e->q_start[s]; i < e->q_start[s + 1]; i++) {
                e->t.causal += (int64_t)e->m->n_heads * (e->pos[i] + 1);
                if (has_lists(e, l)) count_listed(e, l, s, i);
                else
                    for (int32_t h = 0; h < kv_heads; h++)
                        e->t.kept += group * kept_keys(&e->d.mask, e->pos[i], h, kv_heads);
            }
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
    e->slot_taken[r->slot] = 0;
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
        count_kept(e);
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
           e->o->select_text ? e->o->select_text : e->o->mask_text,
           (int)llama_pool_threads(e->pool), e->on->executor(e),
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
    printf("attention          %.0f %% of the time (%.2f s), %.1f %% of the scores kept\n",
           100 * ratio(t->attention_s, t->busy_s), t->attention_s,
           100 * ratio((double)t->kept, (double)t->causal));
    if (e->lists)
        printf("selector           %.0f %% of the time (%.2f s), %.1f %% of the keys scored\n",
               100 * ratio(t->select_s, t->busy_s), t->select_s,
               100 * ratio((double)t->scored, (double)t->scorable));
    if (e->draw)
        printf("picture            %s: %.2f %% of the attention of layer %d, head %d kept\n",
               e->o->draw_file, 100 * ratio(e->draw->kept, e->draw->mass), (int)e->o->draw_layer,
               (int)e->o->draw_head);
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
    printf(" \"visited_share\": %.6f, \"attention_s\": %.4f, \"select_s\": %.4f,\n",
           ratio((double)t->scored, (double)t->scorable), t->attention_s, t->select_s);
    if (e->draw) printf(" \"drawn_mass_kept\": %.6f,\n", ratio(e->draw->kept, e->draw->mass));
    printf(" \"wall_s\": %.4f, \"steps\": %d, \"plans_rebuilt\": %d, \"peak_bytes\": %.0f, "
           "\"threads\": %d,\n \"device\": \"%s\", \"executor\": \"%s\", \"kv\": \"%s\", "
           "\"mask\": \"%s\", \"share\": %s, \"model\": ",
           t->wall_s, (int)t->steps, (int)t->plans_rebuilt, peak_bytes(),
           (int)llama_pool_threads(e->pool), e->o->device, e->on->executor(e), e->o->kv_text,
           e->o->mask_text, e->o->no_share ? "false" : "true");
    json_string(e->o->model, strlen(e->o->model));
    printf(", \"select\": ");
    if (e->o->select_text) json_string(e->o->select_text, strlen(e->o->select_text));
    else printf("null");
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
    free(e->lists);
    free(e->seen_lists);
    free(e->slot_taken);
    close_picture(e);
}

static int answer_all(engine *e) {
    e->max_seq = e->n_req < e->o->batch ? e->n_req : e->o->batch;
    e->max_rows = e->o->chunk + e->max_seq + 1;
    for (int32_t i = 0; i < e->n_req; i++) e->t.prompt_tokens += e->req[i].n_prompt;
    describe(e);
    if (e->on->open(e) || open_kv(e) || open_batch(e) || check_select(e) || open_picture(e))
        return -1;
    if (e->o->prompt && !e->o->json) printf("%s", e->o->prompt);
    if (serve(e) || write_picture(e)) return -1;
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

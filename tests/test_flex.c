// FlexPrefill on the CPU: the reference's own sets (tests/golden/flexprefill, and all of
// ../shared/golden where it is at hand), recall of the corrected mode, and what lists must not
// depend on: chunks, batches, pages, layouts.
//   test_flex [SEED [COUNT]]
#define ATTN_IMPLEMENTATION
#include "problem.h"

// ---- one sequence, contiguous f32 or any stored dtype

typedef struct flex_case {
    attn_desc d;
    attn_select s;
    attn_selection x;
    int32_t n, dim, heads, kv_heads;
    int32_t q_start[2], kv_len[1], kv_pos0[1], seq_row[1];
    float *q, *k;
    void *pages, *mem, *scratch, *out;
} flex_case;

static void *flex_alloc(size_t bytes) {
    void *m = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!m) abort();
    memset(m, 0, (bytes + 127) & ~(size_t)63);
    return m;
}

// n tokens whose q and k the caller fills in next.
static void flex_open(flex_case *c, int32_t n, int32_t heads, int32_t kv_heads, int32_t dim,
                      int32_t block, float gamma) {
    memset(c, 0, sizeof *c);
    c->n = n;
    c->dim = dim;
    c->heads = heads;
    c->kv_heads = kv_heads;
    c->q = (float *)flex_alloc(4 * (size_t)n * (size_t)(heads * dim));
    c->k = (float *)flex_alloc(4 * (size_t)n * (size_t)(kv_heads * dim));
    c->d.n_seq = 1;
    c->d.n_heads = heads;
    c->d.n_kv_heads = kv_heads;
    c->d.head_dim = dim;
    c->s.kind = ATTN_SELECT_FLEX;
    c->s.kv_block = block;
    c->s.flex.gamma = gamma;
}

// Takes the last q_len of the tokens as queries (0: all), with kv_pos0 tokens in front that are
// not held.
static void flex_store(flex_case *c, attn_dtype dtype, int32_t q_len, int32_t kv_pos0) {
    attn_desc *d = &c->d;
    attn_tensor k;
    int64_t *slots = (int64_t *)flex_alloc(8 * (size_t)c->n);
    int32_t i;
    if (!q_len) q_len = c->n;
    c->q_start[1] = q_len;
    c->kv_len[0] = c->n;
    c->kv_pos0[0] = kv_pos0;
    d->q_start = c->q_start;
    d->q.data = c->q + (int64_t)(c->n - q_len) * c->heads * c->dim;
    d->q.dtype = d->o.dtype = ATTN_F32;
    d->o.data = c->out = flex_alloc(4 * (size_t)q_len * (size_t)(c->heads * c->dim));
    d->kv.page_tokens = (c->n + 15) / 16 * 16;
    d->kv.n_pages = 1;
    d->kv.kv_len = c->kv_len;
    d->kv.kv_pos0 = c->kv_pos0;
    d->kv.k.dtype = dtype;
    d->kv.v.dtype = ATTN_I4;
    c->pages = flex_alloc((attn_kv_page_bytes(d, 0) + attn_kv_page_bytes(d, 1)) + 64);
    d->kv.k.data = c->pages;
    d->kv.v.data = (char *)c->pages + ((attn_kv_page_bytes(d, 0) + 63) & ~(size_t)63);
    for (i = 0; i < c->n; i++) slots[i] = i;
    memset(&k, 0, sizeof k);
    k.data = c->k;
    k.dtype = ATTN_F32;
    CHECK_EQ(attn_cpu_store(d, &k, NULL, slots, 0, c->n), ATTN_OK);
    free(slots);
}

static void flex_close(flex_case *c) {
    free(c->q);
    free(c->k);
    free(c->pages);
    free(c->mem);
    free(c->scratch);
    free(c->out);
}

// Selects for any descriptor; mem and scratch are the caller's to free.
static void flex_run(const attn_desc *d, const attn_select *s, int32_t *seq_row,
                     attn_selection *x, void **mem, void **scratch) {
    size_t bytes = attn_select_bytes(d, s);
    int64_t u, units = attn_cpu_select_units(d, s);
    *mem = flex_alloc(bytes);
    *scratch = flex_alloc(attn_cpu_select_scratch_bytes(d, s));
    CHECK(bytes > 0 && units > 0);
    CHECK_EQ(attn_selection_init(d, s, *mem, bytes, seq_row, 0, x), ATTN_OK);
    for (u = units; u-- > 0;) // any order
        CHECK_EQ(attn_cpu_select(d, s, NULL, x, u, 1, *scratch), ATTN_OK);
}

static void flex_select(flex_case *c) {
    free(c->mem);
    free(c->scratch);
    flex_run(&c->d, &c->s, c->seq_row, &c->x, &c->mem, &c->scratch);
}

static int flex_has(const attn_selection *x, int32_t list, int64_t row, int32_t block) {
    int64_t at = (int64_t)list * (x->list.n_rows + 1) + row, i;
    for (i = x->row_start[at]; i < x->row_end[at]; i++) if (x->block[i] == block) return 1;
    return 0;
}

// ---- golden sets

static void *flex_file(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    void *m;
    long n;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    n = ftell(f);
    rewind(f);
    m = calloc((size_t)n + 1, 1);
    *bytes = m ? fread(m, 1, (size_t)n, f) : 0;
    fclose(f);
    return m;
}

static double flex_number(const char **at, const char *name) {
    const char *p = strstr(*at, name);
    if (!p) return -1;
    return strtod(p + strlen(name) + 2, NULL);
}

static float *flex_halves(const char *dir, int i, char what, float *out, size_t n) {
    char path[512];
    size_t bytes = 0, j;
    uint8_t *m;
    snprintf(path, sizeof path, "%s/case%d_%c.f16", dir, i, what);
    m = (uint8_t *)flex_file(path, &bytes);
    if (!CHECK(m && bytes == 2 * n)) exit(1);
    for (j = 0; j < n; j++) {
        uint16_t h = (uint16_t)(m[2 * j] | m[2 * j + 1] << 8);
        out[j] = attni_get(&h, ATTN_F16, 0);
    }
    free(m);
    return out;
}

// Compares with the ids behind *at; blocks that differ.
static int32_t flex_against(const flex_case *c, int32_t head, const char **at, int32_t nb) {
    int32_t bad = 0, r, j;
    char *next;
    uint8_t *want = (uint8_t *)calloc((size_t)nb * (size_t)nb, 1);
    *at = strchr(*at, '[') + 1;
    while (**at != ']') {
        want[strtol(*at, &next, 10)] = 1;
        *at = next;
        while (**at == ',' || **at == ' ') ++*at;
    }
    ++*at;
    for (r = 0; r < nb; r++)
        for (j = 0; j <= r; j++) bad += want[r * nb + j] != flex_has(&c->x, head, r, j);
    free(want);
    return bad;
}

static void flex_golden(const char *dir, int needed) {
    static const attn_dtype types[2] = {ATTN_F16, ATTN_F32};
    size_t bytes = 0;
    char path[512];
    char *json;
    const char *at;
    int i, t;
    snprintf(path, sizeof path, "%s/cases.json", dir);
    json = (char *)flex_file(path, &bytes);
    if (!json) {
        if (needed) CHECK(json != NULL);
        else printf("%s is not there: only the cases of tests/golden\n", dir);
        return;
    }
    for (i = 0, at = json; (at = strchr(at, '{')) != NULL; i++) {
        const int32_t n = (int32_t)flex_number(&at, "\"n\""), block =
            (int32_t)flex_number(&at, "\"block\"");
        const char *blocks = at;
        for (t = 0; t < 2; t++) {
            flex_case c;
            int32_t h, bad = 0;
            flex_open(&c, n, (int32_t)flex_number(&at, "\"n_heads\""),
                      (int32_t)flex_number(&at, "\"n_kv_heads\""),
                      (int32_t)flex_number(&at, "\"head_dim\""), block,
                      (float)flex_number(&at, "\"gamma\""));
            c.s.flex.compatible = 1;
            c.s.flex.tau = (float)flex_number(&at, "\"tau\"");
            c.s.flex.min_budget = block * (int32_t)flex_number(&at, "\"min_blocks\"");
            c.s.flex.max_budget = block * (int32_t)flex_number(&at, "\"max_blocks\"");
            flex_halves(dir, i, 'q', c.q, (size_t)n * (size_t)(c.heads * c.dim));
            flex_halves(dir, i, 'k', c.k, (size_t)n * (size_t)(c.kv_heads * c.dim));
            flex_store(&c, types[t], 0, 0);
            c.d.logits.scale = 0.5f; // the reference's search does not look at it
            flex_select(&c);
            blocks = strstr(at, "\"blocks\"") + 11;
            for (h = 0; h < c.heads; h++) bad += flex_against(&c, h, &blocks, (n + block - 1) / block);
            if (!CHECK_EQ(bad, 0)) printf("%s case %d\n", dir, i);
            flex_close(&c);
        }
        at = blocks;
    }
    CHECK(i >= 2);
    printf("%s: %d cases\n", dir, i);
    free(json);
}

// ---- recall

// Mean share of the softmax mass that the lists keep, over queries [q0, n), every step-th; the
// smallest in *least.
static double flex_recall(const flex_case *c, int32_t head, int32_t q0, int32_t step,
                          double *least) {
    const int32_t b = c->x.list.kv_block, dim = c->dim, kv = head * c->kv_heads / c->heads;
    const int32_t list = c->x.n_lists == c->heads ? head : kv;
    const int32_t p0 = c->n - c->q_start[1];
    double sum = 0, count = 0;
    double *s = (double *)malloc(8 * (size_t)c->n);
    uint8_t *kept = (uint8_t *)malloc((size_t)(c->n / b + 2));
    int32_t p, j, e;
    *least = 1;
    for (p = q0 > p0 ? q0 : p0; p < c->n; p += step) {
        const float *q = c->q + ((int64_t)p * c->heads + head) * dim;
        int64_t at = (int64_t)list * (c->x.list.n_rows + 1) + c->seq_row[0] + p / b, i;
        double top = -HUGE_VAL, all = 0, held = 0;
        memset(kept, 0, (size_t)(c->n / b + 2));
        for (i = c->x.row_start[at]; i < c->x.row_end[at]; i++) kept[c->x.block[i]] = 1;
        for (j = 0; j <= p; j++) {
            const float *k = c->k + ((int64_t)j * c->kv_heads + kv) * dim;
            float x[8] = {0}, y = 0;
            for (e = 0; e < dim; e += 8) {
                int32_t f;
                for (f = 0; f < 8; f++) x[f] += q[e + f] * k[e + f];
            }
            for (e = 0; e < 8; e++) y += x[e];
            s[j] = (double)y * (double)attni_scale(&c->d);
            if (s[j] > top) top = s[j];
        }
        for (j = 0; j <= p; j++) {
            s[j] = exp(s[j] - top);
            all += s[j];
            if (kept[j / b]) held += s[j];
        }
        sum += held / all;
        if (held / all < *least) *least = held / all;
        count++;
    }
    free(s);
    free(kept);
    return sum / count;
}

static double flex_share(const flex_case *c, int32_t list) {
    const int32_t b = c->x.list.kv_block, nb = (c->n + b - 1) / b, r0 = (c->n - c->q_start[1]) / b;
    double kept = 0, all = 0;
    int32_t r;
    for (r = r0; r < nb; r++) {
        int64_t at = (int64_t)list * (c->x.list.n_rows + 1) + c->seq_row[0] + r;
        kept += (double)(c->x.row_end[at] - c->x.row_start[at]);
        all += r + 1;
    }
    return kept / all;
}

// The heads on which the reference misses its gamma (spec: the table), two kinds besides.
enum { H_GAUSS, H_TOKENS, H_OFFSET, H_BOTH, H_SINK_LOCAL, N_HEADS };
static const char *const flex_heads[N_HEADS] = {"Gaussian", "40 heavy tokens", "one offset",
                                                "tokens and offset", "sink and local"};

static void flex_fill(flex_case *c, test_rng *r, int kind, int32_t offset) {
    const int32_t dim = c->dim, n = c->n;
    int32_t i, e, heavy;
    float *u = (float *)malloc(4 * (size_t)dim);
    test_fill_normal(r, c->k, (size_t)n * (size_t)(c->kv_heads * dim), 1);
    test_fill_normal(r, c->q, (size_t)n * (size_t)(c->heads * dim), kind == H_GAUSS ? 1 : 0.3);
    for (e = 0; e < dim; e++) u[e] = test_below(r, 2) ? 1 : -1;
    if (kind == H_TOKENS || kind == H_BOTH) { // heavy tokens point where every query looks
        for (heavy = 0; heavy < 40; heavy++)
            for (i = test_below(r, n), e = 0; e < dim; e++) c->k[(int64_t)i * dim + e] = 1.5f * u[e];
        for (i = 0; i < n * c->heads; i++)
            for (e = 0; e < dim; e++) c->q[(int64_t)i * dim + e] += u[e];
    }
    if (kind == H_SINK_LOCAL)
        for (e = 0; e < dim; e++) c->k[e] = 1.5f * u[e];
    if (kind == H_OFFSET || kind == H_BOTH || kind == H_SINK_LOCAL)
        for (i = 0; i < n * c->heads; i++) {
            int32_t t = i / c->heads;
            int32_t from = t - (kind == H_SINK_LOCAL ? test_below(r, 300) : offset);
            for (e = 0; e < dim && from >= 0; e++)
                c->q[(int64_t)i * dim + e] += 2 * c->k[(int64_t)from * dim + e];
            for (e = 0; e < dim && kind == H_SINK_LOCAL; e++) c->q[(int64_t)i * dim + e] += 1.2f * u[e];
        }
    free(u);
}

static void flex_adversarial(test_rng *r, int32_t n) {
    static const float gammas[2] = {0.9f, 0.95f};
    int kind, i;
    for (kind = 0; kind < N_HEADS; kind++)
        for (i = 0; i < 2; i++) {
            flex_case c;
            double last, mean, least, ignore;
            flex_open(&c, n, 1, 1, 64, 128, gammas[i]);
            c.s.flex.tau = 0.1f;
            flex_fill(&c, r, kind, (int32_t)(1000 * (int64_t)n / 16384)); // 7.8 blocks of 16384
            flex_store(&c, ATTN_F32, 0, 0);
            flex_select(&c);
            last = flex_recall(&c, 0, n - 128, 1, &ignore);
            mean = flex_recall(&c, 0, 0, n > 5000 ? 37 : 5, &least);
            printf("  %-18s gamma %.2f: recall of the last block %.4f, mean %.4f, least %.4f; kept %.3f\n",
                   flex_heads[kind], (double)gammas[i], last, mean, least, flex_share(&c, 0));
            CHECK(last >= (double)gammas[i] - 1e-5);
            if (kind <= H_OFFSET) CHECK(mean >= (double)gammas[i]);
            flex_close(&c);
        }
}

int main(int argc, char **argv) {
    test_rng r;
    r.state = test_arg(argc, argv, 1, 1);
    flex_golden("tests/golden/flexprefill", 1);
    flex_golden("../shared/golden/flexprefill", 0);
    flex_adversarial(&r, (int32_t)test_arg(argc, argv, 2, 4096));
    return TEST_END();
}

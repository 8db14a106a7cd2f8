// FlexPrefill on the CPU: the reference's own sets (tests/golden/flexprefill, and all of
// ../shared/golden where it is at hand), recall of the corrected mode, and what lists must not
// depend on: chunks, batches, pages, layouts.
//   test_flex [SEED [TOKENS]]   (of the adversarial heads)
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

// The keys as they are stored.
static void flex_read(flex_case *c) {
    double row[ATTN_MAX_HEAD_DIM];
    attni_side side;
    int32_t j, h, e;
    CHECK_EQ(attni_side_init(&c->d, 0, &side), ATTN_OK);
    for (j = 0; j < c->n; j++)
        for (h = 0; h < c->kv_heads; h++) {
            attni_ref_row(&c->d, &side, 0, h, j, row);
            for (e = 0; e < c->dim; e++)
                c->k[((int64_t)j * c->kv_heads + h) * c->dim + e] = (float)row[e];
        }
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
    flex_read(c);
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
    x->keeps_all = 0; // lists all the same
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
            for (h = 0; h < c.heads; h++)
                bad += flex_against(&c, h, &blocks, (n + block - 1) / block);
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
    const int32_t p0 = c->n - c->q_start[1], gap = c->kv_pos0[0];
    double sum = 0, count = 0;
    double *s = (double *)malloc(8 * (size_t)c->n);
    uint8_t *kept = (uint8_t *)malloc((size_t)((c->n + gap) / b + 2));
    int32_t p, j, e;
    *least = 1;
    for (p = q0 > p0 ? q0 : p0; p < c->n; p += step) {
        const float *q = c->q + ((int64_t)p * c->heads + head) * dim;
        int64_t at = (int64_t)list * (c->x.list.n_rows + 1) + c->seq_row[0] + (p + gap) / b, i;
        double top = -HUGE_VAL, all = 0, held = 0;
        memset(kept, 0, (size_t)((c->n + gap) / b + 2));
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
            if (c->d.logits.softcap > 0)
                s[j] = (double)c->d.logits.softcap * tanh(s[j] / (double)c->d.logits.softcap);
            if (s[j] > top) top = s[j];
        }
        for (j = 0; j <= p; j++) {
            s[j] = exp(s[j] - top);
            all += s[j];
            if (kept[(j + gap) / b]) held += s[j];
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
            for (i = test_below(r, n), e = 0; e < dim; e++)
                c->k[(int64_t)i * dim + e] = 1.5f * u[e];
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
            for (e = 0; e < dim && kind == H_SINK_LOCAL; e++)
                c->q[(int64_t)i * dim + e] += 1.2f * u[e];
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
            mean = flex_recall(&c, 0, 0, n > 5000 ? 37 : 11, &least);
            printf("  %-18s gamma %.2f: recall of the last block %.4f, mean %.4f, least %.4f; "
                   "kept %.3f\n",
                   flex_heads[kind], (double)gammas[i], last, mean, least, flex_share(&c, 0));
            CHECK(last >= (double)gammas[i] - 1e-5);
            if (kind <= H_OFFSET) CHECK(mean >= (double)gammas[i]);
            flex_close(&c);
        }
}

// ---- what a row must look like

// Ids ascend, are held and not behind the row; corrected: block 0 and the diagonal are there.
static void flex_well_formed(const flex_case *c) {
    const int32_t b = c->x.list.kv_block, gap = c->kv_pos0[0], end = c->n + gap;
    const int32_t r0 = (end - c->q_start[1]) / b, r1 = (end - 1) / b;
    attn_desc d = c->d;
    int32_t l, r, last, bad = 0;
    int64_t i;
    for (l = 0; l < c->x.n_lists; l++)
        for (r = r0; r <= r1; r++) {
            int64_t at = (int64_t)l * (c->x.list.n_rows + 1) + c->seq_row[0] + r;
            for (last = -1, i = c->x.row_start[at]; i < c->x.row_end[at]; i++) {
                bad += c->x.block[i] <= last || c->x.block[i] < gap / b || c->x.block[i] > r;
                last = c->x.block[i];
            }
            if (c->s.flex.compatible) continue;
            bad += last != r;
            bad += !gap && c->x.block[c->x.row_start[at]] != 0;
        }
    CHECK_EQ(bad, 0);
    attn_selection_mask(&c->x, &d.mask);
    CHECK_EQ(attn_validate(&d), ATTN_OK);
}

static void flex_check_recall(const flex_case *c) {
    const int32_t n = c->x.list.kv_block < c->q_start[1] ? c->x.list.kv_block : c->q_start[1];
    const double gamma = c->s.flex.gamma > 0 ? (double)c->s.flex.gamma : 0.95;
    int32_t h;
    double least, last;
    flex_well_formed(c);
    for (h = 0; h < c->heads; h++) {
        last = flex_recall(c, h, c->n - n, 1, &least);
        if (!CHECK(last >= gamma - 2e-5))
            printf("    %g of %g: head %d, n %d, block %d\n", last, gamma, h, c->n,
                   c->x.list.kv_block);
    }
}

// Recall over block sizes, dtypes, chunks, gaps in front, terms of scores and lengths.
static void flex_recalls(test_rng *r) {
    static const int32_t blocks[] = {16, 32, 48, 64, 100, 128, 256, 300, 7};
    static const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_I8, ATTN_F8E4M3, ATTN_I4};
    int i;
    for (i = 0; i < 36; i++) {
        const int32_t b = blocks[i % 9], n = 3 * b + test_below(r, 2 * b);
        flex_case c;
        flex_open(&c, n, 4, 2, 16, b, i % 4 ? 0.9f : 0.6f);
        test_fill_normal(r, c.k, (size_t)n * 32, 1);
        test_fill_normal(r, c.q, (size_t)n * 64, i % 3 ? 2.5 : 0.7);
        c.s.heads = (attn_select_heads)(i % 3);
        c.s.flex.tau = i % 2 ? 0.6f : 0;
        if (i % 5 == 1) c.d.logits.scale = 0.3f;
        if (i % 5 == 2) c.d.logits.softcap = 3;
        if (i % 7 == 3) c.d.numerics = ATTN_NUMERICS_PORTABLE;
        flex_store(&c, types[i % 5], i % 4 ? 0 : n - test_below(r, n - 2 * b),
                   i % 6 == 5 ? 1 + test_below(r, 3 * b) : 0);
        flex_select(&c);
        flex_check_recall(&c);
        flex_close(&c);
    }
}

// ---- inputs with one answer

// Every query looks at `heavy` keys from position at on, and at nothing else.
static void flex_one_answer(flex_case *c, int32_t n, int32_t at, int32_t heavy, int compatible) {
    int32_t i;
    flex_open(c, n, 1, 1, 16, 128, 0.995f);
    for (i = 0; i < n; i++) c->q[16 * i] = 16;
    for (i = at; i < at + heavy; i++) c->k[16 * i] = 16;
    c->s.flex.compatible = compatible;
    flex_store(c, ATTN_F32, 0, 0);
}

static void flex_row_is(const flex_case *c, int32_t r, const char *want) {
    int32_t j;
    for (j = 0; j <= r; j++)
        if (!CHECK_EQ(flex_has(&c->x, 0, r, j), want[j] == '1')) printf("    row %d, %d\n", r, j);
}

static void flex_known(void) {
    flex_case c;
    int32_t i, j;
    // one key at the start of block 2, at distances 640 ... 767: block diagonal 5
    flex_one_answer(&c, 1024, 256, 1, 1);
    c.s.flex.min_budget = 129; // two blocks
    flex_select(&c);
    flex_row_is(&c, 0, "1");
    flex_row_is(&c, 1, "11");
    flex_row_is(&c, 3, "1011");
    flex_row_is(&c, 6, "1110001");
    flex_row_is(&c, 7, "10100001");
    c.s.flex.min_budget = 0; // one column: what is forced takes its place; 128 distances, two
    flex_select(&c);
    flex_row_is(&c, 3, "1001");
    flex_row_is(&c, 6, "1100001");
    flex_row_is(&c, 7, "10100001");
    CHECK_EQ(c.x.visited[7], 1024);
    CHECK_EQ(c.x.visited[6], 0);
    flex_close(&c);
    // tokens to blocks: 127 are one block, 128 two
    for (i = 127; i <= 128; i++) {
        flex_one_answer(&c, 1024, 128, i, 1);
        flex_select(&c);
        for (j = 1; j < 4; j++) CHECK_EQ(flex_has(&c.x, 0, 3, 1), i == 128);
        flex_close(&c);
    }
    // corrected: the column of the key, and distances 576 ... 703: diagonals 4, 5 and 6
    flex_one_answer(&c, 1024, 256 + 64, 1, 0);
    flex_select(&c);
    flex_row_is(&c, 7, "11110001");
    flex_row_is(&c, 6, "1110001");
    flex_row_is(&c, 3, "1011");
    flex_close(&c);
}
// ---- what lists do not depend on

// Blocks in which row `row` of a list of x differs from one of y.
static int32_t flex_differs(const attn_selection *x, int32_t l, int64_t row,
                            const attn_selection *y, int32_t m, int64_t other) {
    const int64_t a = (int64_t)l * (x->list.n_rows + 1) + row;
    const int64_t b = (int64_t)m * (y->list.n_rows + 1) + other;
    int64_t i;
    int32_t bad = 0;
    for (i = x->row_start[a]; i < x->row_end[a]; i++) bad += !flex_has(y, m, other, x->block[i]);
    for (i = y->row_start[b]; i < y->row_end[b]; i++) bad += !flex_has(x, l, row, y->block[i]);
    return bad;
}

// The last chunk of a prompt has the rows of the whole; a group's list is its heads' union.
static void flex_chunks(test_rng *r) {
    int32_t more = 0;
    int i;
    for (i = 0; i < 12; i++) {
        flex_case c, part;
        const int32_t b = i % 2 ? 64 : 48, n = 7 * b + test_below(r, b), cut = (2 + i % 3) * b;
        int32_t l, row, bad = 0, j;
        flex_open(&c, n, 4, 2, 32, b, 0.8f);
        flex_open(&part, n, 4, 2, 32, b, 0.8f);
        test_fill_normal(r, c.k, (size_t)n * 64, 1);
        test_fill_normal(r, c.q, (size_t)n * 128, i % 3 ? 3 : 1);
        memcpy(part.k, c.k, 4 * (size_t)n * 64);
        memcpy(part.q, c.q, 4 * (size_t)n * 128);
        c.s.flex.compatible = part.s.flex.compatible = i % 4 == 3;
        c.s.flex.tau = part.s.flex.tau = i % 4 == 1 ? 0.5f : 0;
        flex_store(&c, ATTN_F16, 0, 0);
        flex_store(&part, ATTN_F16, n - cut, 0);
        flex_select(&c);
        flex_select(&part);
        for (l = 0; l < 4; l++)
            for (row = cut / b; row < (n + b - 1) / b; row++)
                bad += flex_differs(&c.x, l, c.seq_row[0] + row, &part.x, l, part.seq_row[0] + row);
        CHECK_EQ(bad, 0);
        part.s.heads = ATTN_SELECT_GROUP;
        flex_select(&part);
        CHECK_EQ(part.x.n_lists, 2);
        for (bad = 0, row = cut / b; row < (n + b - 1) / b; row++)
            for (l = 0; l < 2; l++)
                for (j = 0; j <= row; j++) {
                    const int one = flex_has(&c.x, 2 * l, c.seq_row[0] + row, j);
                    const int two = flex_has(&c.x, 2 * l + 1, c.seq_row[0] + row, j);
                    more += one != two;
                    bad += (one || two) != flex_has(&part.x, l, part.seq_row[0] + row, j);
                }
        CHECK_EQ(bad, 0);
        flex_close(&c);
        flex_close(&part);
    }
    CHECK(more > 0);
}

// A batch over any pages and dtypes against its sequences alone, and against one long page.
static void flex_batches(test_rng *r) {
    static const int32_t blocks[] = {16, 32, 40};
    int i;
    for (i = 0; i < 40; i++) {
        problem p;
        problem_opts o;
        attn_select s;
        attn_selection x, y;
        int32_t seq_row[8], one_row[1], q = 0, l, row, bad = 0;
        void *mem[4];
        problem_random(r, &o);
        o.phase = i % 2 ? RAGGED : PREFILL;
        o.mask = M_CAUSAL;
        o.alibi = o.bias = o.contiguous = 0;
        if (o.layout == ATTN_K16) o.page_tokens = (o.page_tokens + 15) / 16 * 16;
        o.max_kv = 300;
        o.head_dim = o.v_head_dim = i % 2 ? 24 : 64;
        problem_make(&p, &o, r);
        memset(&s, 0, sizeof s);
        s.kind = ATTN_SELECT_FLEX;
        s.kv_block = blocks[i % 3];
        s.heads = (attn_select_heads)(i % 3);
        s.flex.gamma = 0.85f;
        s.flex.tau = i % 4 == 1 ? 0.5f : 0;
        s.flex.compatible = i % 5 == 4;
        s.dense_below = i % 7 == 6 ? 150 : 0;
        flex_run(&p.d, &s, seq_row, &x, mem, mem + 1);
        for (q = 0; q < p.d.n_seq; q++) {
            attn_desc d = p.d;
            int32_t start[2] = {0, 0};
            const int32_t r0 = p.d.q_pos0[q] / s.kv_block;
            const int32_t rows = attni_rows_of(&p.d, s.kv_block, q);
            start[1] = p.d.q_start[q + 1] - p.d.q_start[q];
            d.n_seq = 1;
            d.q_start = start;
            d.q_pos0 += q;
            d.kv.kv_len += q;
            d.kv.kv_pos0 += q;
            d.kv.page_table += q * p.d.kv.page_table_stride;
            d.q.data = (char *)p.d.q.data + (int64_t)p.d.q_start[q] * p.d.n_heads * o.head_dim *
                                                attni_bits_of(o.q) / 8;
            flex_run(&d, &s, one_row, &y, mem + 2, mem + 3);
            for (l = 0; l < x.n_lists; l++)
                for (row = r0; row < r0 + rows; row++)
                    bad += flex_differs(&x, l, seq_row[q] + row, &y, l, one_row[0] + row);
            if (p.d.kv.kv_len[q] <= s.dense_below || start[1] <= 2 * s.kv_block)
                for (row = r0; row < r0 + rows; row++) {
                    bad += y.row_end[one_row[0] + row] - y.row_start[one_row[0] + row] !=
                           row + 1 - p.d.kv.kv_pos0[q] / s.kv_block;
                    bad += y.visited[one_row[0] + row] != 0;
                }
            free(mem[2]);
            free(mem[3]);
        }
        CHECK_EQ(bad, 0);
        attn_selection_mask(&x, &p.d.mask);
        CHECK_EQ(attn_validate(&p.d), ATTN_OK);
        free(mem[0]);
        free(mem[1]);
        problem_free(&p);
    }
}

// Stored values spread over pages in any layout against the same in one page of f32.
static void flex_layouts(test_rng *r) {
    static const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    int i;
    for (i = 0; i < 18; i++) {
        problem p;
        problem_opts o;
        flex_case c;
        attn_selection x;
        attni_side side;
        int32_t seq_row[1], l, row, j, e, bad = 0;
        double k[ATTN_MAX_HEAD_DIM];
        void *mem[2];
        problem_random(r, &o);
        o.phase = PREFILL;
        o.mask = M_CAUSAL;
        o.n_seq = 1;
        o.softcap = o.alibi = o.bias = o.sink = o.evicted = o.alias = o.contiguous = o.shared = 0;
        o.layout = (attn_layout)(i % 3);
        o.page_tokens = i % 2 ? 16 : 48;
        o.max_kv = 900;
        o.n_heads = 4;
        o.n_kv_heads = 2;
        o.head_dim = o.v_head_dim = 64;
        o.k = types[i / 3 % 3];
        o.q = ATTN_F32;
        o.numerics = ATTN_NUMERICS_FAST;
        problem_make(&p, &o, r);
        flex_open(&c, p.n_tokens, 4, 2, 64, 64, 0.9f);
        c.s.flex.tau = i % 2 ? 0.5f : 0;
        CHECK_EQ(attni_side_init(&p.d, 0, &side), ATTN_OK);
        for (j = 0; j < c.n; j++)
            for (l = 0; l < 2; l++) {
                attni_ref_row(&p.d, &side, 0, l, j, k);
                for (e = 0; e < 64; e++) c.k[(j * 2 + l) * 64 + e] = (float)k[e];
            }
        memcpy(c.q, p.d.q.data, 4 * (size_t)c.n * 256);
        flex_store(&c, ATTN_F32, 0, 0);
        flex_select(&c);
        flex_run(&p.d, &c.s, seq_row, &x, mem, mem + 1);
        for (l = 0; l < 4; l++)
            for (row = 0; row < (c.n + 63) / 64; row++)
                bad += flex_differs(&x, l, seq_row[0] + row, &c.x, l, c.seq_row[0] + row);
        CHECK_EQ(bad, 0);
        free(mem[0]);
        free(mem[1]);
        flex_close(&c);
        problem_free(&p);
    }
}

// ---- degenerate inputs, budgets, errors

static void flex_degenerate(test_rng *r) {
    int kind, tau;
    for (kind = 0; kind < 6; kind++)
        for (tau = 0; tau < 4; tau++) {
            const int32_t n = kind == 5 ? 20 : 500;
            flex_case c;
            int32_t i;
            flex_open(&c, n, 2, 1, 16, 64, 0.9f);
            c.s.flex.tau = tau & 1 ? 2 : 0;
            c.s.flex.compatible = tau >= 2;
            if (kind != 0) test_fill_normal(r, c.q, (size_t)n * 32, kind == 2 ? 3e4 : 1);
            if (kind != 1) test_fill_normal(r, c.k, (size_t)n * 16, kind == 2 ? 3e4 : 1);
            for (i = 0; i < 16 * n && kind == 1; i++) c.k[i] = 1;
            if (kind == 3) c.k[16 * 77] = attni_float(0x7fc00000u); // NaN: any list, but a list
            if (kind == 4) c.q[32 * (n - 1)] = attni_float(0x7f800000u);
            flex_store(&c, ATTN_F32, 0, 0);
            flex_select(&c);
            if (tau < 2 && kind != 3 && kind != 4) flex_check_recall(&c);
            else flex_well_formed(&c);
            flex_close(&c);
        }
}

static void flex_budgets(test_rng *r) {
    int i;
    for (i = 0; i < 4; i++) {
        flex_case c;
        int32_t row;
        flex_open(&c, 2000, 1, 1, 32, 64, i & 1 ? 1.0f : 0.01f);
        test_fill_normal(r, c.k, 2000 * 32, 1);
        test_fill_normal(r, c.q, 2000 * 32, 1);
        c.s.flex.tau = i & 2 ? 2 : 0;
        c.s.flex.min_budget = i & 1 ? 0 : 5 * 64 - 63; // rounded up
        c.s.flex.max_budget = i & 1 ? 3 * 64 : 0;
        flex_store(&c, ATTN_F32, 0, 0);
        flex_select(&c);
        for (row = 0; row < 32; row++) {
            int64_t n = c.x.row_end[row] - c.x.row_start[row];
            if (i & 1) CHECK(n <= (i & 2 ? 3 + 2 : 6 + 2));
            else if ((i & 2) || row == 31) CHECK(n >= attni_min32(5, row + 1));
        }
        c.s.flex.compatible = 1; // what is forced takes a slot
        flex_select(&c);
        if (!(i & 2))
            CHECK(c.x.row_end[31] - c.x.row_start[31] <= (i & 1 ? 6 : 10));
        flex_close(&c);
    }
}

static void flex_errors(test_rng *r) {
    flex_case c;
    int32_t table[1] = {0};
    flex_open(&c, 300, 2, 1, 16, 32, 0.9f);
    test_fill_normal(r, c.k, 300 * 16, 1);
    flex_store(&c, ATTN_F16, 0, 0);
    flex_select(&c);
    c.seq_row[0] = 1000; // attn_selection_follow was not called
    CHECK_EQ(attn_cpu_select(&c.d, &c.s, NULL, &c.x, 0, 1, c.scratch), ATTN_ERR_BUFFER);
    c.seq_row[0] = -1;
    CHECK_EQ(attn_cpu_select(&c.d, &c.s, NULL, &c.x, 0, 1, c.scratch), ATTN_ERR_BUFFER);
    c.seq_row[0] = 0;
    c.d.kv.page_table = table;
    c.d.kv.page_table_stride = 1;
    CHECK_EQ(attn_cpu_select(&c.d, &c.s, NULL, &c.x, 0, 1, c.scratch), ATTN_OK);
    table[0] = 7;
    CHECK(attn_cpu_select(&c.d, &c.s, NULL, &c.x, 0, 1, c.scratch) != ATTN_OK);
    table[0] = 0;
    CHECK_EQ(attn_cpu_select(&c.d, &c.s, NULL, &c.x, 1, 1, c.scratch), ATTN_ERR_ARGUMENT);
    flex_close(&c);
}

int main(int argc, char **argv) {
    test_rng r;
    r.state = test_arg(argc, argv, 1, 1);
    flex_golden("tests/golden/flexprefill", 1);
    flex_golden("../shared/golden/flexprefill", 0);
    flex_known();
    flex_recalls(&r);
    flex_chunks(&r);
    flex_batches(&r);
    flex_layouts(&r);
    flex_degenerate(&r);
    flex_budgets(&r);
    flex_errors(&r);
    flex_adversarial(&r, (int32_t)test_arg(argc, argv, 2, 4096));
    return TEST_END();
}

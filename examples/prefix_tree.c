/* cc -O2 -I. examples/prefix_tree.c -o prefix_tree -lm
 *
 * A prompt in the prefix tree, forked into two answers that diverge inside a page, a third request
 * that finds it all cached, and a branch saved to a blob and loaded into another engine. Results
 * are compared, bit for bit, with the same tokens stored alone.
 *
 * Order of a step: append; carry out its page copies in every layer; acknowledge; store. A copy
 * moves what is in the page NOW: tokens that others appended must have been stored by then. */
#define ATTN_IMPLEMENTATION
#include "attn_cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, HEADS = 4, DIM = 32, PAGE = 16, PAGES = 32, ROW = HEADS * DIM, PROMPT = 50,
       WORK = 2 << 20, TOKEN_BYTES = 4 * 2 * LAYERS * ROW };

static int wrong;
static void need(attn_result r, const char *what) {
    if (r == ATTN_OK) return;
    fprintf(stderr, "%s: %s\n", what, attn_result_string(r));
    exit(2);
}
static void expect(int ok, const char *what) {
    wrong += !ok;
    printf("%-66s %s\n", what, ok ? "ok" : "WRONG");
}
static void *buffer(size_t bytes) { /* at a multiple of 64 bytes; taken and never given back */
    static char arena[8 << 20];
    static size_t used;
    size_t at = used + (64 - (uintptr_t)(arena + used) % 64);
    if ((used = at + bytes) > sizeof arena) exit(3);
    return arena + at;
}

typedef struct engine {
    attn_tree *tree;
    float *kv[LAYERS]; /* (PAGES, PAGE, HEADS, DIM) of K, then of V */
    int loading;       /* which way move_rows goes */
} engine;

static void engine_open(engine *e) {
    attn_tree_desc t = {PAGES, PAGE, 0, 0};
    need(attn_tree_init(&t, buffer(attn_tree_bytes(&t)), attn_tree_bytes(&t), &e->tree), "init");
    for (int l = 0; l < LAYERS; l++) e->kv[l] = buffer(sizeof(float) * 2 * PAGES * PAGE * ROW);
}

/* One sequence as a problem: its last token asks about all it holds. Tables live until the next. */
static attn_desc describe(const engine *e, int layer, int32_t seq) {
    static int32_t table[PAGES], kv_len, q_start[2] = {0, 1};
    attn_desc d = {.n_seq = 1, .n_heads = HEADS, .n_kv_heads = HEADS, .head_dim = DIM,
                   .q_start = q_start, .q = {.dtype = ATTN_F32}, .o = {.dtype = ATTN_F32},
                   .kv = {.k = {.data = e->kv[layer], .dtype = ATTN_F32},
                          .v = {.data = e->kv[layer] + PAGES * PAGE * ROW, .dtype = ATTN_F32},
                          .page_tokens = PAGE, .n_pages = PAGES, .page_table = table,
                          .page_table_stride = PAGES, .kv_len = &kv_len}};
    kv_len = attn_tree_length(e->tree, seq);
    if (seq >= 0 && attn_tree_pages(e->tree, seq, table, PAGES) < 0) exit(2);
    return d;
}

/* The model's stand-in: rows of K, V or Q as a function of layer, position and token. */
static void row_of(float *row, int what, int layer, int pos, int32_t token) {
    uint32_t x = (uint32_t)(what + 3 * layer + 7 * pos) * 2654435761u + (uint32_t)token;
    for (int i = 0; i < ROW; i++, x = x * 1664525u + 1013904223u)
        row[i] = (float)(x >> 8) / 8388608.0f - 1.0f;
}

/* Lengthens seq and computes what was not cached; returns how many tokens were. */
static int32_t append(engine *e, int32_t seq, const int32_t *tokens, int32_t n) {
    attn_page_copy copies[1];
    int32_t n_copies = 0, n_cached, at = attn_tree_length(e->tree, seq);
    need(attn_tree_append(e->tree, seq, tokens, n, &n_cached, copies, 1, &n_copies), "append");
    for (int l = 0; l < LAYERS; l++) {
        attn_desc d = describe(e, l, seq);
        need(attn_cpu_copy_pages(&d, copies, n_copies), "copy");
        for (int32_t i = n_cached; i < n; i++) {
            float k[ROW], v[ROW];
            attn_tensor k_row = {k, ATTN_F32, 0, 0}, v_row = {v, ATTN_F32, 0, 0};
            int64_t slot = (int64_t)d.kv.page_table[(at + i) / PAGE] * PAGE + (at + i) % PAGE;
            row_of(k, 0, l, at + i, tokens[i]);
            row_of(v, 1, l, at + i, tokens[i]);
            need(attn_cpu_store(&d, &k_row, &v_row, &slot, 0, 1), "store");
        }
    }
    need(attn_tree_ack(e->tree, copies, n_copies), "ack");
    return n_cached;
}

static void attend(const engine *e, int32_t seq, float out[LAYERS * ROW]) {
    static void *mem;
    for (int l = 0; l < LAYERS; l++) {
        float q[ROW];
        attn_desc d = describe(e, l, seq);
        row_of(d.q.data = q, 2, l, 0, 0);
        d.o.data = out + l * ROW;
        if (!mem) mem = buffer(WORK);
        need(attn_cpu_forward(&d, mem, WORK, 1), "forward"); /* says so when WORK is too small */
    }
}

/* Blob rows go token by token (K, V of every layer): save and load may cut runs differently. */
static int move_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    const engine *e = (const engine *)user;
    float *row = (float *)rows;
    for (int32_t i = 0; i < n * 2 * LAYERS; i++, row += ROW) {
        attn_desc d = describe(e, i / 2 % LAYERS, -1);
        int32_t at = place + i / (2 * LAYERS);
        if (e->loading ? attn_kv_write_rows(&d, i % 2, page, at, 1, row)
                       : attn_kv_read_rows(&d, i % 2, page, at, 1, row)) return 1;
    }
    return 0;
}

int main(void) {
    static engine e, other;
    static float a[LAYERS * ROW], b[LAYERS * ROW], c[LAYERS * ROW];
    attn_tree_stats stats;
    int32_t s, fork, third, alone, n_cached, prompt[PROMPT + 4];
    for (int i = 0; i < PROMPT + 4; i++) prompt[i] = 100 + i;
    engine_open(&e), engine_open(&other);
    need(attn_tree_open(e.tree, 0, prompt, PROMPT, &s, &n_cached), "open");
    append(&e, s, prompt, PROMPT);
    need(attn_tree_fork(e.tree, s, &fork), "fork");
    append(&e, s, (const int32_t[]){7, 8, 9}, 3);
    append(&e, fork, prompt + PROMPT, 4); /* diverges inside page 3: this one gets a copy of it */
    attn_tree_get_stats(e.tree, &stats);
    expect(stats.pages_copied == 1 && stats.n_free == PAGES - 5,
           "5 pages hold 53 + 54 tokens, 1 copied");

    need(attn_tree_open(other.tree, 1, prompt, PROMPT, &alone, &n_cached), "open");
    append(&other, alone, prompt, PROMPT + 4);
    attend(&e, fork, a), attend(&other, alone, b);
    expect(memcmp(a, b, sizeof a) == 0, "the fork attends as the same tokens stored alone");

    need(attn_tree_open(e.tree, 0, prompt, PROMPT + 2, &third, &n_cached), "open");
    expect(n_cached == PROMPT + 2 && append(&e, third, prompt + PROMPT + 2, 2) == 2,
           "a third request computes nothing: 52 tokens cached, then 2");

    attend(&e, s, b);
    other.loading = 1;
    size_t bytes = attn_tree_save_bytes(e.tree, s, TOKEN_BYTES);
    void *blob = buffer(bytes);
    need(attn_tree_save(e.tree, s, TOKEN_BYTES, move_rows, &e, blob, bytes), "save");
    need(attn_tree_load(other.tree, 0, TOKEN_BYTES, move_rows, 0, &other, blob, bytes, &s), "load");
    attend(&other, s, c);
    expect(!memcmp(b, c, sizeof b) && memcmp(a, b, sizeof a), "a saved branch attends as before");
    return wrong != 0;
}

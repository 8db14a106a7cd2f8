/* cc -O2 -I. examples/sparse_mask.c -o sparse_mask -lm
 *
 * A mask of your own: any boolean matrix becomes a block list with one bit per token pair, and
 * fully masked blocks are never read. Writes a picture of it, sparse_mask.png or the file named as
 * the first argument, where stb_image_write is installed (libstb-dev). */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

enum { N = 384, HEADS = 4, DIM = 32, BLOCK = 16 };

static float q[N * HEADS * DIM], k[N * HEADS * DIM], v[N * HEADS * DIM], out[N * HEADS * DIM];
static double ref[N * HEADS * DIM];
static uint8_t keep[N * N];

static void need(attn_result r, const char *what) {
    if (r == ATTN_OK) return;
    fprintf(stderr, "%s: %s\n", what, attn_result_string(r));
    exit(2);
}
static void *buffer(size_t bytes) { /* at a multiple of 64 bytes; taken and never given back */
    static char arena[8 << 20];
    static size_t used;
    size_t at = used + (64 - (uintptr_t)(arena + used) % 64);
    if (bytes > sizeof arena - at) exit(3);
    used = at + bytes;
    return arena + at;
}

/* Blue: a pair the kernels see. Grey lines: borders of the blocks. */
static void picture(const char *path, const attn_desc *d) {
#ifdef HAVE_STB
    static uint8_t rgb[N * N * 3];
    for (int32_t t = 0; t < N; t++) {
        for (int32_t j = 0; j < N; j++) {
            uint8_t *px = rgb + ((size_t)t * N + (size_t)j) * 3;
            int seen = attn_ref_visible(d, 0, t, 0, j), line = t % BLOCK == 0 || j % BLOCK == 0;
            px[0] = seen ? 40 : line ? 225 : 250;
            px[1] = seen ? 90 : line ? 225 : 250;
            px[2] = seen ? 170 : line ? 225 : 250;
        }
    }
    if (!stbi_write_png(path, N, N, 3, rgb, N * 3)) {
        fprintf(stderr, "cannot write %s\n", path);
        exit(2);
    }
    printf("picture: %s\n", path);
#else
    (void)d;
    printf("picture skipped: no stb_image_write.h, so no %s\n", path);
#endif
}

int main(int argc, char **argv) {
    uint32_t state = 1;
    float *const rows[] = {q, k, v};
    int32_t q_start[2] = {0, N}, kv_len = N;
    int64_t n_entries;
    attn_desc d;
    for (int r = 0; r < 3; r++) {
        for (int i = 0; i < N * HEADS * DIM; i++) {
            state = state * 1664525u + 1013904223u;
            rows[r][i] = (float)(state >> 8) / 8388608.0f - 1.0f;
        }
    }
    /* The rule: a disc on the diagonal every 128 tokens, rays of slope 1/2, and oneself. */
    for (int p = 0; p < N; p++) {
        for (int j = 0; j < N; j++) {
            int y = p % 128 - 64, x = j - p / 128 * 128 - 64;
            keep[p * N + j] = p == j || x * x + y * y < 50 * 50 || (p - 2 * j) % 96 == 0;
        }
    }
    memset(&d, 0, sizeof d);
    d.n_seq = 1;
    d.q_start = q_start;
    d.n_heads = d.n_kv_heads = HEADS;
    d.head_dim = DIM;
    d.q.data = q;
    d.o.data = out;
    d.kv.k.data = k;
    d.kv.v.data = v;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.n_pages = 1;
    d.kv.page_tokens = N;
    d.kv.kv_len = &kv_len;

    /* Causal stays on: visible = causal AND listed. The first call counts, the second fills. */
    int64_t *row_start = buffer(sizeof *row_start * (N / BLOCK + 1));
    need(attn_mask_from_dense(keep, N, N, BLOCK, BLOCK, row_start, NULL, NULL, 0, &n_entries,
                              &d.mask.blocks), "count");
    int32_t *block = buffer(sizeof *block * (size_t)n_entries);
    uint64_t *bits = buffer(sizeof *bits * (size_t)n_entries * (BLOCK * BLOCK / 64));
    need(attn_mask_from_dense(keep, N, N, BLOCK, BLOCK, row_start, block, bits, n_entries,
                              &n_entries, &d.mask.blocks), "fill");

    size_t bytes = attn_cpu_forward_bytes(&d, 1);
    need(attn_cpu_forward(&d, buffer(bytes), bytes, 1), "forward");
    need(attn_ref_forward(&d, ref, NULL), "reference");
    double worst = 0;
    int64_t wrong = 0, seen = 0;
    for (int i = 0; i < N * HEADS * DIM; i++) {
        double e = fabs((double)out[i] - ref[i]);
        if (!(e <= worst)) worst = e;
    }
    for (int32_t t = 0; t < N; t++) {
        for (int32_t j = 0; j < N; j++) {
            int visible = attn_ref_visible(&d, 0, t, 0, j);
            wrong += visible != (keep[t * N + j] && j <= t);
            seen += visible;
        }
    }
    printf("%lld of %d pairs in %lld of %d blocks; %lld misread; largest error %.1e\n",
           (long long)seen, N * N, (long long)n_entries, N / BLOCK * (N / BLOCK), (long long)wrong,
           worst);
    picture(argc > 1 ? argv[1] : "sparse_mask.png", &d);
    return wrong || !(worst < 1e-5);
}

/* fuzz_gguf.c - the model reader of examples/llama.h: a broken file is refused with a sentence, a
   good one loads, tokenizes and runs; nothing else happens.
   cc -DFUZZ_MAIN -I. -Itests -Iexamples tests/fuzz/fuzz_gguf.c -o fuzz_gguf -pthread -lm

   First byte even: the rest is the file. Odd: the input describes a small model, which is written,
   spoiled in up to four places (its pairs or tensors, its length) and read back; unspoiled it must
   load, and where every byte has a token, text must come back from its tokens unchanged. */
#define LLAMA_MMAP 0 // read, so that the sanitizer knows where the file ends
#define LLAMA_IMPLEMENTATION
#define _POSIX_C_SOURCE 200809L
#include "gguf.h"

static const uint8_t *file_bytes;
static size_t file_size;

static FILE *open_bytes(const char *path) {
    (void)path;
    return fmemopen((void *)(uintptr_t)file_bytes, file_size, "rb");
}

#define fopen(path, mode) open_bytes(path)
#include "llama.h"
#undef fopen

static void check_text(const llama_model *m, const char *text, size_t n, int back) {
    int flags;
    size_t n_ids, i, len = 0;
    char piece[64], *joined;
    for (flags = 0; flags < 4; flags++) {
        int32_t *ids = llama_tokenize(m, text, n, flags, &n_ids);
        FUZZ_CHECK(ids != NULL);
        joined = (char *)fuzz_alloc(64 * (n + 4));
        for (len = i = 0; i < n_ids; i++) {
            size_t k;
            FUZZ_CHECK(ids[i] >= 0 && ids[i] < m->n_vocab);
            k = llama_piece(m, ids[i], piece, sizeof piece);
            (void)llama_is_end(m, ids[i]);
            if (k > sizeof piece) continue;
            if (len + k <= 64 * (n + 4)) memcpy(joined + len, piece, k), len += k;
        }
        // control tokens have no text, so only text that names none comes back
        if (back && flags < 2) FUZZ_CHECK(len == n && memcmp(joined, text, n) == 0);
        free(joined);
        free(ids);
    }
}

static void check_forward(const llama_model *m) {
    int32_t ids[3] = {0, m->n_vocab - 1, m->n_vocab / 2}, pos[3] = {0, 1, 1 << 26}, l;
    llama_state *s = llama_state_create(m, 3);
    float *logits = (float *)fuzz_alloc(2 * (size_t)m->n_vocab * sizeof *logits);
    int32_t rows[2] = {2, 0};
    llama_sampler sampler = {0.7f, 0.9f, 5, 1};
    FUZZ_CHECK(s != NULL);
    llama_embed(m, NULL, s, ids, pos, 3);
    for (l = 0; l < m->n_layers && l < 3; l++) {
        llama_qkv(m, NULL, s, l);
        llama_out(m, NULL, s, l);
    }
    llama_logits(m, NULL, s, rows, 2, logits);
    l = llama_sample(&sampler, logits, m->n_vocab);
    FUZZ_CHECK(l >= 0 && l < m->n_vocab);
    free(logits);
    llama_state_free(s);
}

static void read_file(const uint8_t *p, size_t n, const char *text, size_t n_text, int sound,
                      int back, size_t f32_bytes) {
    char err[LLAMA_ERR_BYTES] = "", piece[8];
    llama_model *m;
    file_bytes = p;
    file_size = n;
    m = llama_load("fuzz", NULL, f32_bytes, err);
    FUZZ_CHECK(m || (err[0] && memchr(err, 0, sizeof err)));
    FUZZ_CHECK(m || !sound);
    if (!m) return;
    for (int32_t i = -1; i <= m->n_vocab && i < 2000; i++) {
        size_t want = llama_piece(m, i, NULL, 0);
        FUZZ_CHECK(llama_piece(m, i, piece, sizeof piece) == want);
    }
    FUZZ_CHECK(llama_bos(m) >= -1 && llama_bos(m) < m->n_vocab);
    check_text(m, text, n_text, back);
    check_forward(m);
    llama_free(m);
}

static void build(fuzz_in *in) {
    static const char *const pre[] = {"gpt-2", "llama-bpe", "qwen2", "smollm", "default"};
    static const int types[] = {8, 1, 0, 30, 2, 12, 13, 14};
    gguf_spec s;
    gguf_out o;
    uint32_t how = fuzz_u8(in);
    int i;
    size_t cut;
    uint8_t *exact;
    memset(&s, 0, sizeof s);
    s.bpe = how & 1;
    s.all_bytes = how >> 1 & 1;
    s.tied = how >> 2 & 1;
    s.n_layers = 1 + (int)(how >> 3 & 1);
    s.type = types[fuzz_below(in, 8)];
    s.d_model = s.d_ff = s.type >= 12 && s.type <= 14 ? 256 : 32;
    s.n_kv_heads = 1 + fuzz_below(in, 2);
    s.n_heads = s.n_kv_heads * (1 + fuzz_below(in, 2));
    s.head_dim = s.d_model / s.n_heads;
    s.pre = pre[fuzz_below(in, 5)];
    s.seed = fuzz_u8(in);
    s.n_edits = fuzz_below(in, 5);
    s.edits_in_pairs = (int)fuzz_u8(in);
    for (i = 0; i < s.n_edits; i++) {
        gguf_edit e;
        e.at = fuzz_below(in, 26);
        e.what = fuzz_below(in, 6);
        e.value = fuzz_edge(in);
        s.pair[i] = s.tensor[i] = e;
    }
    gguf_write(&o, &s);
    cut = fuzz_below(in, 6) ? o.n : fuzz_bits(in, 2) % (o.n + 1);
    exact = (uint8_t *)fuzz_copy(o.p, cut);
    i = s.n_edits == 0 && cut == o.n; // sound; all of the rest is text
    read_file(exact, cut, (const char *)in->p, in->n, i,
              i && s.all_bytes && !memchr(in->p, '<', in->n) && !memchr(in->p, 0x96, in->n),
              how & 16 ? 1 : 1 << 22);
    free(exact);
    free(o.p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_in in = {data, size};
    uint8_t *exact;
    size_t tail;
    if (size == 0) return 0;
    if (fuzz_u8(&in) & 1) {
        build(&in);
        return 0;
    }
    exact = (uint8_t *)fuzz_copy(in.p, in.n);
    tail = in.n < 64 ? in.n : 64;
    read_file(exact, in.n, (const char *)in.p + in.n - tail, tail, 0, 0, 1 << 22);
    free(exact);
    return 0;
}

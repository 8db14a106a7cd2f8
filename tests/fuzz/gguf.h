/* gguf.h - writes small llama-architecture GGUF files from a few bytes, sound or spoiled on
   purpose, for the fuzz targets that read models. */
#ifndef FUZZ_GGUF_H
#define FUZZ_GGUF_H

#include "fuzz.h"

typedef struct gguf_out {
    uint8_t *p;
    size_t n, cap;
} gguf_out;

FUZZ_FN void gguf_put(gguf_out *o, const void *bytes, size_t n) {
    if (o->n + n > o->cap) {
        o->cap = 2 * (o->n + n) + 1024;
        o->p = (uint8_t *)realloc(o->p, o->cap);
        if (!o->p) exit(2);
    }
    if (n) memcpy(o->p + o->n, bytes, n);
    o->n += n;
}

FUZZ_FN void gguf_int(gguf_out *o, uint64_t v, int bytes) {
    uint8_t b[8];
    int i;
    for (i = 0; i < bytes; i++, v >>= 8) b[i] = (uint8_t)v;
    gguf_put(o, b, (size_t)bytes);
}

FUZZ_FN void gguf_str(gguf_out *o, const char *s) {
    gguf_int(o, strlen(s), 8);
    gguf_put(o, s, strlen(s));
}

// How to spoil entry `at` of a table: what < 0: not at all.
typedef struct gguf_edit {
    int32_t at, what;
    int64_t value;
} gguf_edit;

typedef struct gguf_spec {
    int32_t d_model, n_heads, n_kv_heads, head_dim, d_ff, n_layers; // 32 fills a block of Q8_0
    int bpe, all_bytes, tied, type; // type: of the matrices
    const char *pre;                // of byte-level BPE
    int n_edits, edits_in_pairs;
    gguf_edit pair[4], tensor[4];
    uint64_t seed;                  // of the weights
} gguf_spec;

// One piece of the vocabulary: text, score, type (1 normal, 2 unknown, 3 control, 4 user, 6 byte).
typedef struct gguf_piece {
    char text[24];
    float score;
    int32_t type;
} gguf_piece;

FUZZ_FN int32_t gguf_vocab(const gguf_spec *s, gguf_piece *v) {
    static const char *const spm[] = {"\xe2\x96\x81", "a", "b", "t", "h", "e", "th", "the",
                                      "\xe2\x96\x81the", "ab", "aba", "\xc3\xa9", "tt", "ttt"};
    static const char *const bpe[] = {"th", "he", "the", "\xc4\xa0t", "\xc4\xa0the", "12", "in",
                                      "ing", "ab", "aba"};
    int32_t n = 0, i;
    const char *const *text = s->bpe ? bpe : spm;
    int32_t n_text = s->bpe ? (int32_t)(sizeof bpe / sizeof *bpe)
                            : (int32_t)(sizeof spm / sizeof *spm);
    memset(v, 0, 300 * sizeof *v);
    snprintf(v[n].text, 24, "<unk>"), v[n++].type = 2;
    snprintf(v[n].text, 24, "<s>"), v[n++].type = 3;
    snprintf(v[n].text, 24, "</s>"), v[n++].type = 3;
    for (i = 0; i < (s->all_bytes ? 256 : 4); i++, n++) {
        int low = i < 33 ? i : i < 127 ? -1 : i < 161 ? 33 + i - 127 : i == 173 ? 67 : -1;
        uint32_t c = low < 0 ? (uint32_t)i : 256u + (uint32_t)low;
        v[n].type = s->bpe ? 1 : 6;
        if (!s->bpe) snprintf(v[n].text, 24, "<0x%02X>", (unsigned)i);
        else if (c < 128) v[n].text[0] = (char)c;
        else v[n].text[0] = (char)(0xc0 | c >> 6), v[n].text[1] = (char)(0x80 | (c & 63));
    }
    for (i = 0; i < n_text; i++, n++) {
        snprintf(v[n].text, 24, "%s", text[i]);
        v[n].score = -(float)(i % 7);
        v[n].type = 1;
    }
    snprintf(v[n].text, 24, "<|im_end|>"), v[n++].type = 3;
    snprintf(v[n].text, 24, "[user]"), v[n++].type = 4;
    return n;
}

// ---- key-value pairs

enum { G_U8, G_I8, G_U16, G_I16, G_U32, G_I32, G_F32, G_BOOL, G_STR, G_ARR, G_U64, G_I64, G_F64 };

// A scalar or string pair, with its edit: a type, a value, a key length, or left out.
FUZZ_FN void gguf_pair(gguf_out *o, const gguf_spec *s, int32_t *at, const char *key, int type,
                       uint64_t value, const char *text) {
    int32_t i, what = -1;
    int64_t x = 0;
    size_t start = o->n;
    for (i = 0; i < s->n_edits; i++)
        if (s->edits_in_pairs & 1 << i && s->pair[i].at == *at)
            what = s->pair[i].what, x = s->pair[i].value;
    ++*at;
    gguf_str(o, key);
    gguf_int(o, what == 0 ? (uint64_t)x : (uint64_t)type, 4);
    if (what == 1) value = (uint64_t)x;
    if (type == G_STR) {
        if (what == 1 || what == 2) gguf_int(o, (uint64_t)x, 8), gguf_put(o, text, strlen(text));
        else gguf_str(o, text);
    } else {
        gguf_int(o, value, type == G_BOOL || type == G_U8 ? 1 : type >= G_U64 ? 8 : 4);
    }
    if (what == 3) { // the length of the key
        uint64_t k = (uint64_t)x;
        for (i = 0; i < 8; i++, k >>= 8) o->p[start + (size_t)i] = (uint8_t)k;
    }
    if (what == 4 && o->n > start) o->p[start + 8] ^= 1; // another name: as if it were missing
}

FUZZ_FN void gguf_float(gguf_out *o, const gguf_spec *s, int32_t *at, const char *key, float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    gguf_pair(o, s, at, key, G_F32, u, "");
}

// The head of an array pair, with its edit: element type or count.
FUZZ_FN void gguf_array(gguf_out *o, const gguf_spec *s, int32_t *at, const char *key, int elem,
                        uint64_t count) {
    int32_t i;
    gguf_str(o, key);
    gguf_int(o, G_ARR, 4);
    for (i = 0; i < s->n_edits; i++)
        if (s->edits_in_pairs & 1 << i && s->pair[i].at == *at) {
            if (s->pair[i].what & 1) count = (uint64_t)s->pair[i].value;
            else elem = (int)s->pair[i].value;
        }
    ++*at;
    gguf_int(o, (uint64_t)(uint32_t)elem, 4);
    gguf_int(o, count, 8);
}

FUZZ_FN uint64_t gguf_pairs(gguf_out *o, const gguf_spec *s) {
    static const char *const merges[] = {"t h", "h e", "th e", "\xc4\xa0 t", "\xc4\xa0t he",
                                         "1 2", "i n", "in g", "a b", "ab a", "no such"};
    gguf_piece v[300];
    int32_t n = gguf_vocab(s, v), i, at = 0;
    gguf_pair(o, s, &at, "general.architecture", G_STR, 0, "llama");
    gguf_pair(o, s, &at, "general.alignment", G_U32, 32, "");
    gguf_pair(o, s, &at, "llama.block_count", G_U32, (uint64_t)s->n_layers, "");
    gguf_pair(o, s, &at, "llama.embedding_length", G_U32, (uint64_t)s->d_model, "");
    gguf_pair(o, s, &at, "llama.attention.head_count", G_U32, (uint64_t)s->n_heads, "");
    gguf_pair(o, s, &at, "llama.attention.head_count_kv", G_U32, (uint64_t)s->n_kv_heads, "");
    gguf_pair(o, s, &at, "llama.attention.key_length", G_U32, (uint64_t)s->head_dim, "");
    gguf_pair(o, s, &at, "llama.feed_forward_length", G_U32, (uint64_t)s->d_ff, "");
    gguf_pair(o, s, &at, "llama.context_length", G_U64, 256, "");
    gguf_pair(o, s, &at, "llama.rope.dimension_count", G_I32, (uint64_t)s->head_dim, "");
    gguf_float(o, s, &at, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_float(o, s, &at, "llama.rope.freq_base", 10000.0f);
    gguf_pair(o, s, &at, "llama.rope.scaling.type", G_STR, 0, "linear");
    gguf_float(o, s, &at, "llama.rope.scaling.factor", 2.0f);
    gguf_pair(o, s, &at, "tokenizer.ggml.model", G_STR, 0, s->bpe ? "gpt2" : "llama");
    gguf_pair(o, s, &at, "tokenizer.ggml.pre", G_STR, 0, s->pre);
    gguf_pair(o, s, &at, "tokenizer.ggml.bos_token_id", G_U32, 1, "");
    gguf_pair(o, s, &at, "tokenizer.ggml.eos_token_id", G_U32, 2, "");
    gguf_pair(o, s, &at, "tokenizer.ggml.unknown_token_id", G_U32, 0, "");
    gguf_pair(o, s, &at, "tokenizer.ggml.add_bos_token", G_BOOL, 1, "");
    gguf_pair(o, s, &at, "tokenizer.ggml.add_space_prefix", G_BOOL, 0, "");
    gguf_array(o, s, &at, "tokenizer.ggml.tokens", G_STR, (uint64_t)n);
    for (i = 0; i < n; i++) gguf_str(o, v[i].text);
    gguf_array(o, s, &at, "tokenizer.ggml.scores", G_F32, (uint64_t)n);
    for (i = 0; i < n; i++) gguf_put(o, &v[i].score, 4);
    gguf_array(o, s, &at, "tokenizer.ggml.token_type", G_I32, (uint64_t)n);
    for (i = 0; i < n; i++) gguf_int(o, (uint64_t)v[i].type, 4);
    gguf_array(o, s, &at, "tokenizer.ggml.merges", G_STR, 11);
    for (i = 0; i < 11; i++) gguf_str(o, merges[i]);
    return (uint64_t)at;
}

// ---- tensors

FUZZ_FN size_t gguf_bytes(int type, size_t n) { // of n elements of a row
    switch (type) {
    case 0: return 4 * n;
    case 1: case 30: return 2 * n;
    case 2: return n / 32 * 18;
    case 8: return n / 32 * 34;
    case 12: return n / 256 * 144;
    case 13: return n / 256 * 176;
    default: return n / 256 * 210;
    }
}

FUZZ_FN void gguf_tensor(gguf_out *o, const gguf_spec *s, int32_t *at, uint64_t *offset,
                         const char *name, int type, uint64_t n_in, uint64_t n_out) {
    uint64_t dims[4] = {n_in, n_out, 1, 1}, where = *offset;
    uint32_t n_dims = n_out > 1 ? 2 : 1;
    int32_t i;
    *offset += (gguf_bytes(type, (size_t)n_in) * n_out + 31) / 32 * 32;
    for (i = 0; i < s->n_edits; i++) {
        uint64_t x = (uint64_t)s->tensor[i].value;
        if (s->edits_in_pairs & 1 << i || s->tensor[i].at != *at) continue;
        switch (s->tensor[i].what) {
        case 0: type = (int)x; break;
        case 1: dims[0] = x; break;
        case 2: dims[1] = x; n_dims = 2; break;
        case 3: n_dims = (uint32_t)x; break;
        case 4: where = x; break;
        case 5: name = "nothing"; break;
        default: dims[2] = x; n_dims = 3;
        }
    }
    ++*at;
    gguf_str(o, name);
    gguf_int(o, n_dims, 4);
    for (i = 0; i < 4 && i < (int32_t)(n_dims & 7); i++) gguf_int(o, dims[i], 8);
    gguf_int(o, (uint64_t)(uint32_t)type, 4);
    gguf_int(o, where, 8);
}

FUZZ_FN int32_t gguf_tensors(gguf_out *o, const gguf_spec *s, uint64_t *size) {
    gguf_piece v[300];
    uint64_t d = (uint64_t)s->d_model, q = (uint64_t)(s->n_heads * s->head_dim), at = 0;
    uint64_t k = (uint64_t)(s->n_kv_heads * s->head_dim), f = (uint64_t)s->d_ff;
    uint64_t vocab = (uint64_t)gguf_vocab(s, v);
    int32_t n = 0, l, i;
    gguf_tensor(o, s, &n, &at, "token_embd.weight", s->type, d, vocab);
    gguf_tensor(o, s, &n, &at, "output_norm.weight", 0, d, 1);
    if (!s->tied) gguf_tensor(o, s, &n, &at, "output.weight", s->type, d, vocab);
    gguf_tensor(o, s, &n, &at, "rope_freqs.weight", 0, (uint64_t)s->head_dim / 2, 1);
    for (l = 0; l < s->n_layers; l++) {
        const struct { const char *name; uint64_t n_in, n_out; } t[] = {
            {"attn_norm.weight", d, 1}, {"ffn_norm.weight", d, 1}, {"attn_q.bias", q, 1},
            {"attn_q.weight", d, q}, {"attn_k.weight", d, k}, {"attn_v.weight", d, k},
            {"attn_output.weight", q, d}, {"ffn_gate.weight", d, f}, {"ffn_up.weight", d, f},
            {"ffn_down.weight", f, d}};
        for (i = 0; i < 10; i++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.%s", (int)l, t[i].name);
            gguf_tensor(o, s, &n, &at, name, t[i].n_out > 1 ? s->type : 0, t[i].n_in, t[i].n_out);
        }
    }
    *size = at;
    return n;
}

// The whole file; the caller frees o->p.
FUZZ_FN void gguf_write(gguf_out *o, const gguf_spec *s) {
    gguf_out pairs = {NULL, 0, 0}, tensors = {NULL, 0, 0};
    uint64_t n_pairs = gguf_pairs(&pairs, s), size, rng = s->seed, i;
    int32_t n_tensors = gguf_tensors(&tensors, s, &size);
    memset(o, 0, sizeof *o);
    gguf_put(o, "GGUF", 4);
    gguf_int(o, 3, 4);
    gguf_int(o, (uint64_t)n_tensors, 8);
    gguf_int(o, n_pairs, 8);
    gguf_put(o, pairs.p, pairs.n);
    gguf_put(o, tensors.p, tensors.n);
    while (o->n % 32) gguf_int(o, 0, 1);
    for (i = 0; i < size; i += 4) { // small positive f32, harmless in every other format
        float f = 0.1f + 0.05f * fuzz_unit(&rng);
        gguf_put(o, &f, 4);
    }
    free(pairs.p);
    free(tensors.p);
}

#endif // FUZZ_GGUF_H

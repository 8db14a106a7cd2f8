/* Bad input to every public call gives its documented code and touches nothing; store, rows, page
   copies, slots and dtype conversions against naive ones. test_api [SEED [COUNT]]   COUNT: random
   stores per dtype, layout and source dtype (default 3) cc -std=c11 -O2 -I. -Itests
   tests/test_api.c -o test_api -lm */
#define ATTN_IMPLEMENTATION
#include "problem.h"

// ---- dtypes from their definitions, in doubles

typedef struct small { // 1 + e + m bits; ieee: the top exponent is Inf and NaN
    int e, m, ieee;
    double top; // the largest finite value
} small;
static const small f16_type = {5, 10, 1, 65504}, bf16_type = {8, 7, 1, 3.3895313892515355e38};
static const small e4m3_type = {4, 3, 0, 448}, e5m2_type = {5, 2, 1, 57344};

static double small_value(small t, uint32_t code) {
    int bias = (1 << (t.e - 1)) - 1, ex = (int)(code >> t.m) & ((1 << t.e) - 1);
    int man = (int)code & ((1 << t.m) - 1);
    double x;
    if (t.ieee && ex == (1 << t.e) - 1) x = man ? (double)NAN : (double)INFINITY;
    else if (!t.ieee && ex == (1 << t.e) - 1 && man == (1 << t.m) - 1) x = (double)NAN;
    else if (ex == 0) x = ldexp(man, 1 - bias - t.m);
    else x = ldexp((1 << t.m) + man, ex - bias - t.m);
    return (code >> (t.e + t.m)) & 1 ? -x : x;
}

// Nearest, ties to even; too large: Inf, or the largest value where saturating.
static double small_round(small t, double x, int saturate) {
    double a = fabs(x), step, y;
    int ex, least = 2 - (1 << (t.e - 1));
    if (x != x) return x;
    if (a == 0) return x;
    if (isinf(a)) return saturate ? copysign(t.top, x) : x;
    frexp(a, &ex);
    ex = ex - 1 < least ? least : ex - 1;
    step = ldexp(1, ex - t.m);
    y = rint(a / step) * step;
    if (y > t.top) y = saturate ? t.top : (double)INFINITY;
    return copysign(y, x);
}

static int same(double a, double b) { // NaN like NaN, zeros by sign
    return (a != a && b != b) || (a == b && signbit(a) == signbit(b));
}

static void conversions(test_rng *r) {
    uint32_t i;
    int ok = 1, k;
    for (i = 0; i < 65536; i++) {
        double x = (double)attni_from_f16((uint16_t)i), y = (double)attni_from_bf16((uint16_t)i);
        ok &= same(x, small_value(f16_type, i)) && same(y, small_value(bf16_type, i));
        ok &= x != x ? same((double)attni_from_f16(attni_to_f16((float)x)), x)
                     : attni_to_f16((float)x) == i;
        ok &= y != y ? same((double)attni_from_bf16(attni_to_bf16((float)y)), y)
                     : attni_to_bf16((float)y) == i;
    }
    CHECK(ok);
    for (i = 0; i < 256; i++) {
        double x = (double)attni_from_e4m3((uint8_t)i), y = (double)attni_from_e5m2((uint8_t)i);
        ok &= same(x, small_value(e4m3_type, i)) && same(y, small_value(e5m2_type, i));
        if (fabs(x) <= 448) ok &= attni_to_e4m3((float)x) == i;
        if (fabs(y) <= 57344) ok &= attni_to_e5m2((float)y) == i;
    }
    CHECK(ok);
    for (k = 0; k < 400000; k++) { // random bits, ties and their neighbours, edges
        float x = attni_float((uint32_t)test_u64(r));
        if (k % 4 == 1)
            x = attni_from_f16((uint16_t)test_u64(r)) +
                attni_from_f16((uint16_t)(test_u64(r) & 0x83ff));
        if (k % 4 == 2) { // halfway between two codes of one of the types, give or take an ulp
            small t = k % 3 == 0 ? e4m3_type : k % 3 == 1 ? e5m2_type : f16_type;
            uint32_t c = (uint32_t)test_below(r, (1 << (t.e + t.m)) - 1);
            x = (float)((small_value(t, c) + small_value(t, c + 1)) / 2);
            if (attni_finite(x)) x = attni_float(attni_bits32(x) + (uint32_t)test_below(r, 3) - 1);
        }
        if (k % 4 == 3)
            x = attni_float((attni_bits32(x) & 0x8000ffffu) | (uint32_t)(0x4770 + test_below(r, 32))
                                                                  << 16);
        ok &= same((double)attni_from_f16(attni_to_f16(x)), small_round(f16_type, (double)x, 0));
        ok &= same((double)attni_from_bf16(attni_to_bf16(x)), small_round(bf16_type, (double)x, 0));
        ok &= same((double)attni_from_e4m3(attni_to_e4m3(x)), small_round(e4m3_type, (double)x, 1));
        ok &= same((double)attni_from_e5m2(attni_to_e5m2(x)), small_round(e5m2_type, (double)x, 1));
        if (!ok) {
            printf("  conversion of %.9g (%08x)\n", (double)x, (unsigned)attni_bits32(x));
            break;
        }
    }
    CHECK(ok);
    for (i = 0; i < ATTN_DTYPE_COUNT; i++) {
        static const int bits[] = {0, 32, 16, 16, 8, 8, 8, 4}, scaled[] = {0, 0, 0, 0, 1, 1, 1, 1};
        static const char *const names[] = {"none",   "f32",    "f16", "bf16",
                                            "f8e4m3", "f8e5m2", "i8",  "i4"};
        CHECK_EQ(attn_dtype_bits((attn_dtype)i), bits[i]);
        CHECK_EQ(attn_dtype_scaled((attn_dtype)i), scaled[i]);
        CHECK(strcmp(attn_dtype_name((attn_dtype)i), names[i]) == 0);
    }
    CHECK(attn_dtype_bits((attn_dtype)99) == 0 && !attn_dtype_scaled((attn_dtype)99) &&
          strcmp(attn_dtype_name((attn_dtype)99), "none") == 0 &&
          attn_dtype_bits((attn_dtype)-1) == 0);
}

// ---- where an element lies, from the comments of attn_layout and attn_kv_array

typedef struct pages {
    attn_desc d;
    uint8_t *data[2];
    size_t bytes[2];
    int32_t q_start[2], kv_len[1];
    float head_scale[2][4];
} pages;

static int64_t element_bit(const attn_desc *d, int is_v, int64_t page, int64_t t, int64_t h,
                           int64_t e) {
    int64_t dim = is_v ? d->v_head_dim : d->head_dim, n = d->n_kv_heads, pt = d->kv.page_tokens;
    int64_t bits = attn_dtype_bits(is_v ? d->kv.v.dtype : d->kv.k.dtype), p = 32 / bits, at;
    if (d->kv.layout == ATTN_TOKEN_MAJOR) at = (t * n + h) * dim + e;
    else if (d->kv.layout == ATTN_HEAD_MAJOR || is_v) at = (h * pt + t) * dim + e;
    else at = (((h * (pt / 16) + t / 16) * (dim / p) + e / p) * 16 + t % 16) * p + e % p;
    return page * 8 * (int64_t)attn_kv_page_bytes(d, is_v) + at * bits;
}

static int64_t scale_byte(const attn_desc *d, int is_v, int64_t page, int64_t t, int64_t h) {
    int64_t dim = is_v ? d->v_head_dim : d->head_dim, n = d->n_kv_heads, pt = d->kv.page_tokens;
    int64_t bits = attn_dtype_bits(is_v ? d->kv.v.dtype : d->kv.k.dtype);
    int64_t at = (pt * n * dim * bits / 8 + 3) / 4 * 4;
    at += 4 * (d->kv.layout == ATTN_TOKEN_MAJOR ? t * n + h : h * pt + t);
    return page * (int64_t)attn_kv_page_bytes(d, is_v) + at;
}

static uint32_t code_at(const uint8_t *p, int64_t bit, int bits) {
    uint32_t x = 0;
    uint16_t y = 0;
    if (bits == 32) memcpy(&x, p + bit / 8, 4);
    else if (bits == 16) memcpy(&y, p + bit / 8, 2), x = y;
    else x = (uint32_t)p[bit / 8] >> (bit % 8) & ((1u << bits) - 1);
    return x;
}

static double code_value(attn_dtype t, uint32_t c) {
    float f;
    switch (t) {
    case ATTN_F32: memcpy(&f, &c, 4); return (double)f;
    case ATTN_F16: return small_value(f16_type, c);
    case ATTN_BF16: return small_value(bf16_type, c);
    case ATTN_F8E4M3: return small_value(e4m3_type, c);
    case ATTN_F8E5M2: return small_value(e5m2_type, c);
    case ATTN_I8: return c < 128 ? (double)c : (double)c - 256;
    default: return c < 8 ? (double)c : (double)c - 16;
    }
}

// What storing x as t must leave: the nearest value, ties to even.
static double expected(attn_dtype t, double x) {
    double lim = t == ATTN_I8 ? 127 : 7, y;
    switch (t) {
    case ATTN_F32: return x;
    case ATTN_F16: return small_round(f16_type, x, 0);
    case ATTN_BF16: return small_round(bf16_type, x, 0);
    case ATTN_F8E4M3: return small_round(e4m3_type, x, 1);
    case ATTN_F8E5M2: return small_round(e5m2_type, x, 1);
    default: y = rint(x); return (y > lim ? lim : y < -lim ? -lim : y) + 0.0;
    }
}

static void pages_make(pages *p, attn_dtype type, attn_layout layout, int32_t pt, int32_t n_pages) {
    int i;
    memset(p, 0, sizeof *p);
    p->d.n_seq = 1;
    p->d.n_heads = p->d.n_kv_heads = 3;
    p->d.head_dim = 40;
    p->d.v_head_dim = 24;
    p->d.q_start = p->q_start;
    p->d.kv.kv_len = p->kv_len;
    p->d.kv.layout = layout;
    p->d.kv.page_tokens = pt;
    p->d.kv.n_pages = n_pages;
    p->d.kv.k.dtype = p->d.kv.v.dtype = type;
    for (i = 0; i < 2; i++) {
        p->bytes[i] = attn_kv_page_bytes(&p->d, i) * (size_t)n_pages;
        p->data[i] = (uint8_t *)aligned_alloc(64, (p->bytes[i] + 127) & ~(size_t)63);
        memset(p->data[i], 0xa5, p->bytes[i]);
    }
    p->d.kv.k.data = p->data[0];
    p->d.kv.v.data = p->data[1];
}

static void pages_free(pages *p) { free(p->data[0]), free(p->data[1]); }

static int untouched(const uint8_t *p, size_t n) {
    while (n > 0)
        if (p[--n] != 0xa5) return 0;
    return 1;
}

static void store_case(test_rng *r, attn_dtype type, attn_layout layout, attn_dtype src,
                       int fixed) {
    enum { ROWS = 40, GAP = 5 };
    pages p;
    attn_tensor t[2];
    int64_t slot[ROWS];
    int32_t i, j, h, e, is_v, n_pages = 4, pt = layout == ATTN_K16 ? 16 : 11, ok = 1;
    pages_make(&p, type, layout, pt, n_pages);
    memset(t, 0, sizeof t);
    if (fixed) { // pages without scales are smaller; the memory stays as it is
        for (h = 0; h < 3; h++)
            p.head_scale[0][h] = 0.01f * (float)(1 + h), p.head_scale[1][h] = 0.3f / (float)(1 + h);
        p.d.kv.k.head_scale = p.head_scale[0];
        p.d.kv.v.head_scale = p.head_scale[1];
    }
    for (is_v = 0; is_v < 2; is_v++) { // rows of every sort; a gap of NaN between heads and tokens
        int32_t dim = is_v ? 24 : 40;
        t[is_v].dtype = src;
        t[is_v].stride_head = dim + GAP;
        t[is_v].stride_token = 3 * (dim + GAP) + 7;
        t[is_v].data = malloc((size_t)(ROWS * t[is_v].stride_token) * 4);
        memset(t[is_v].data, 0xff, (size_t)(ROWS * t[is_v].stride_token) * 4);
        for (i = 0; i < ROWS; i++)
            for (h = 0; h < 3; h++)
                for (e = 0; e < dim; e++) {
                    int sort = (i + h) % 10;
                    float x = (float)test_normal(r);
                    if (sort == 1) x = 0;
                    if (sort == 2)
                        x = attni_float((uint32_t)test_u64(r) & 0x807fffffu); // denormals
                    if (sort == 3 && e == 5) x = attni_float(0x7fc00000u);
                    if (sort == 4 && e == 6) x = attni_float(0xff800000u);
                    if (sort == 5)
                        x = (float)(test_below(r, 255) - 127) / 2; // ties of the integers
                    if (sort == 5 && e == 0) x = 127;
                    if (sort == 6) x = attni_from_e4m3((uint8_t)test_below(r, 127)) * (1 + 0.0625f);
                    if (sort == 6 && e == 0) x = 448;
                    if (sort == 7) x = (float)ldexp((double)x, test_below(r, 60) - 30);
                    if (sort == 8) x = -0.0f;
                    attni_put(t[is_v].data, src,
                              i * t[is_v].stride_token + h * t[is_v].stride_head + e, x);
                }
    }
    for (i = 0; i < ROWS; i++) slot[i] = i; // a random assignment with some rows skipped
    for (i = ROWS - 1; i > 0; i--) {
        int64_t x = slot[j = test_below(r, i + 1)];
        slot[j] = slot[i], slot[i] = x;
    }
    for (i = 0; i < ROWS; i += 9) slot[i] = i % 2 ? -1 : -77;
    // a slot outside: nothing is written
    slot[20] = (int64_t)n_pages * pt;
    CHECK_EQ(attn_cpu_store(&p.d, &t[0], &t[1], slot, 0, ROWS), ATTN_ERR_PAGE);
    CHECK(untouched(p.data[0], p.bytes[0]) && untouched(p.data[1], p.bytes[1]));
    slot[20] = -1;
    // rows [3, ROWS - 2), K and V apart: V NULL leaves V alone
    CHECK_EQ(attn_cpu_store(&p.d, &t[0], NULL, slot, 3, ROWS - 5), ATTN_OK);
    CHECK(untouched(p.data[1], p.bytes[1]));
    CHECK_EQ(attn_cpu_store(&p.d, NULL, &t[1], slot, 3, ROWS - 5), ATTN_OK);
    for (is_v = 0; is_v < 2; is_v++) {
        int32_t dim = is_v ? 24 : 40, bits = attn_dtype_bits(type);
        uint8_t *seen = (uint8_t *)calloc(p.bytes[is_v], 1), *m = p.data[is_v];
        for (i = 3; i < ROWS - 2; i++)
            for (h = 0; h < 3 && slot[i] >= 0; h++) {
                float scale = 1, top = 0;
                const float *fs = is_v ? p.d.kv.v.head_scale : p.d.kv.k.head_scale;
                if (attn_dtype_scaled(type) && fixed) scale = fs[h];
                else if (attn_dtype_scaled(type)) {
                    int64_t at = scale_byte(&p.d, is_v, slot[i] / pt, slot[i] % pt, h);
                    for (e = 0; e < dim; e++) {
                        float x = attni_get(t[is_v].data, src,
                                            i * t[is_v].stride_token + h * t[is_v].stride_head + e);
                        if (x != x) top = x;
                        else if (fabsf(x) > top) top = fabsf(x);
                    }
                    memcpy(&scale, m + at, 4);
                    memset(seen + at, 1, 4);
                    ok &= same((double)scale, (double)(top / (type == ATTN_F8E4M3   ? 448.0f
                                                              : type == ATTN_F8E5M2 ? 57344.0f
                                                              : type == ATTN_I8     ? 127.0f
                                                                                    : 7.0f)));
                }
                for (e = 0; e < dim; e++) {
                    int64_t bit = element_bit(&p.d, is_v, slot[i] / pt, slot[i] % pt, h, e);
                    float x = attni_get(t[is_v].data, src,
                                        i * t[is_v].stride_token + h * t[is_v].stride_head + e);
                    double got = code_value(type, code_at(m, bit, bits)), want;
                    memset(seen + bit / 8, 1, (size_t)(bits < 8 ? 1 : bits / 8));
                    if (!attni_finite(scale)) continue; // the row is NaN or Inf through its scale
                    want = expected(type, attn_dtype_scaled(type)
                                              ? (scale != 0 ? (double)(x / scale) : 0)
                                              : (double)x);
                    if (want != want && bits <= 8 && (type == ATTN_I8 || type == ATTN_I4)) want = 0;
                    if (type == ATTN_I8 || type == ATTN_I4) got += 0.0;
                    if (same(got, want) || (got == 0 && want == 0 && attn_dtype_scaled(type)))
                        continue;
                    if (ok)
                        printf("  row %d head %d element %d: %.9g stored as %.9g, not %.9g (scale "
                               "%g)\n",
                               i, h, e, (double)x, got, want, (double)scale);
                    ok = 0;
                }
            }
        for (j = 0; j < (int32_t)p.bytes[is_v]; j++)
            ok &= seen[j] || m[j] == 0xa5; // and nothing else
        free(seen);
    }
    if (!CHECK(ok))
        printf("  store %s layout %d from %s%s on %s\n", attn_dtype_name(type), (int)layout,
               attn_dtype_name(src), fixed ? " fixed scales" : "",
               attn_cpu_isa_name(attn_cpu_get_isa()));
    free(t[0].data), free(t[1].data);
    pages_free(&p);
}

// Rows out of one layout, into another, and out again.
static void rows_case(test_rng *r, attn_dtype type, int from, int to) {
    pages a, b;
    int32_t is_v, n = 16, place = test_below(r, 8), m = 1 + test_below(r, 8);
    size_t i;
    pages_make(&a, type, (attn_layout)from, n, 2);
    pages_make(&b, type, (attn_layout)to, n, 3);
    for (is_v = 0; is_v < 2; is_v++) {
        size_t bytes = attn_kv_rows_bytes(&a.d, is_v, m);
        int32_t dim = is_v ? 24 : 40;
        uint8_t *x = (uint8_t *)malloc(bytes + 1), *y = (uint8_t *)malloc(bytes + 1);
        CHECK_EQ(bytes, (size_t)m * 3 *
                            ((size_t)(dim * attn_dtype_bits(type) / 8) +
                             (attn_dtype_scaled(type) ? 4 : 0)));
        for (i = 0; i < a.bytes[is_v]; i++) a.data[is_v][i] = (uint8_t)test_u64(r);
        x[bytes] = y[bytes] = 0x77;
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, 1, place, m, x), ATTN_OK);
        // canonical order: token, head, element; by hand for one element and one scale
        i = (size_t)((((m - 1) * 3 + 2) * dim + 9) * attn_dtype_bits(type));
        CHECK_EQ(code_at(x, (int64_t)i, attn_dtype_bits(type)),
                 code_at(a.data[is_v], element_bit(&a.d, is_v, 1, place + m - 1, 2, 9),
                         attn_dtype_bits(type)));
        if (attn_dtype_scaled(type))
            CHECK(memcmp(x + bytes - 8, a.data[is_v] + scale_byte(&a.d, is_v, 1, place + m - 1, 1),
                         4) == 0);
        CHECK_EQ(attn_kv_write_rows(&b.d, is_v, 2, place, m, x), ATTN_OK);
        CHECK_EQ(attn_kv_read_rows(&b.d, is_v, 2, place, m, y), ATTN_OK);
        CHECK(memcmp(x, y, bytes + 1) == 0);
        CHECK(untouched(b.data[is_v], 2 * b.bytes[is_v] / 3)); // pages 0 and 1
        // bad input
        memset(y, 0xa5, bytes);
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, 2, 0, m, y), ATTN_ERR_PAGE);
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, -1, 0, m, y), ATTN_ERR_PAGE);
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, 0, -1, m, y), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, 0, n - m + 1, m, y), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, 0, 0, -1, y), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_kv_read_rows(&a.d, is_v, 0, 0, m, NULL), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_kv_read_rows(NULL, is_v, 0, 0, m, y), ATTN_ERR_ARGUMENT);
        CHECK(untouched(y, bytes));
        memset(b.data[is_v], 0xa5, b.bytes[is_v]);
        CHECK_EQ(attn_kv_write_rows(&b.d, is_v, 3, 0, m, x), ATTN_ERR_PAGE);
        CHECK_EQ(attn_kv_write_rows(&b.d, is_v, -1, 0, m, x), ATTN_ERR_PAGE);
        CHECK_EQ(attn_kv_write_rows(&b.d, is_v, 0, n, 1, x), ATTN_ERR_ARGUMENT);
        CHECK_EQ(attn_kv_write_rows(&b.d, is_v, 0, 0, m, NULL), ATTN_ERR_ARGUMENT);
        CHECK(untouched(b.data[is_v], b.bytes[is_v]));
        CHECK(attn_kv_rows_bytes(NULL, is_v, 1) == 0 && attn_kv_rows_bytes(&a.d, is_v, -1) == 0);
        free(x), free(y);
    }
    pages_free(&a), pages_free(&b);
}

static void copies_case(test_rng *r, attn_dtype type, int layout) {
    pages p;
    attn_page_copy c[3] = {{0, 3, 16}, {1, 0, 5}, {2, 2, 16}};
    uint8_t *before[2];
    int i;
    size_t e;
    pages_make(&p, type, (attn_layout)layout, 16, 4);
    for (i = 0; i < 2; i++) {
        for (e = 0; e < p.bytes[i]; e++) p.data[i][e] = (uint8_t)test_u64(r);
        before[i] = (uint8_t *)malloc(p.bytes[i]);
        memcpy(before[i], p.data[i], p.bytes[i]);
    }
    for (i = 0; i < 5; i++) { // one bad copy among good ones: nothing is copied
        attn_page_copy bad[3];
        memcpy(bad, c, sizeof c);
        if (i == 0) bad[2].src = 4;
        if (i == 1) bad[2].dst = -1;
        if (i == 2) bad[2].n_tokens = 17;
        if (i == 3) bad[2].n_tokens = -1;
        if (i == 4) bad[2].src = -1;
        CHECK_EQ(attn_cpu_copy_pages(&p.d, bad, 3),
                 i == 2 || i == 3 ? ATTN_ERR_ARGUMENT : ATTN_ERR_PAGE);
    }
    CHECK_EQ(attn_cpu_copy_pages(&p.d, NULL, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_copy_pages(&p.d, c, -1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_copy_pages(NULL, c, 1), ATTN_ERR_ARGUMENT);
    p.d.kv.v.page_bytes = 1; // V's layout is wrong: K must not have been copied already
    CHECK_EQ(attn_cpu_copy_pages(&p.d, c, 3), ATTN_ERR_LAYOUT);
    p.d.kv.v.page_bytes = 0;
    CHECK(memcmp(before[0], p.data[0], p.bytes[0]) == 0 &&
          memcmp(before[1], p.data[1], p.bytes[1]) == 0);
    CHECK_EQ(attn_cpu_copy_pages(&p.d, c, 3), ATTN_OK);
    for (i = 0; i < 2; i++) {
        size_t b = p.bytes[i] / 4;
        int32_t dim = i ? 24 : 40;
        uint8_t x[5 * 3 * 200], y[5 * 3 * 200];
        CHECK(memcmp(p.data[i] + 3 * b, before[i], b) == 0);          // all of page 0 to page 3
        CHECK(memcmp(p.data[i] + b, before[i] + b, 2 * b) == 0);      // pages 1 and 2 as they were
        if (attn_kv_rows_bytes(&p.d, i, 5) > sizeof x || dim == 0) continue;
        CHECK_EQ(attn_kv_read_rows(&p.d, i, 0, 0, 5, x), ATTN_OK);    // 5 rows of page 1 in page 0
        CHECK_EQ(attn_kv_read_rows(&p.d, i, 1, 0, 5, y), ATTN_OK);
        CHECK(memcmp(x, y, attn_kv_rows_bytes(&p.d, i, 5)) == 0);
        free(before[i]);
        before[i] = NULL;
    }
    free(before[0]), free(before[1]);
    pages_free(&p);
}

// ---- bad descriptors

typedef struct fixture { // two sequences, everything set
    attn_desc d;
    int32_t q_start[3], kv_len[2], table[2][8], q_pos0[2], kv_pos0[2], order[2], parent[8];
    int64_t row_start[41], csr[2][2];
    int32_t block[80], col[4], diag[4];
    uint64_t bits[80];
    float *q, *k, *v, *o, *lse, bias[4096];
} fixture;

enum { F_TOKENS = 5, F_O = F_TOKENS * 4 * 16 };

static void fixture_make(fixture *f) {
    attn_desc *d = &f->d;
    int32_t i;
    memset(f, 0, sizeof *f);
    f->q = (float *)calloc(F_TOKENS * 4 * 16, 4);
    f->o = (float *)malloc(F_O * 4);
    f->lse = (float *)malloc(F_TOKENS * 4 * 4);
    f->k = (float *)calloc(16 * 16 * 2 * 16, 4);
    f->v = (float *)calloc(16 * 16 * 2 * 16, 4);
    d->n_seq = 2;
    d->n_heads = 4;
    d->n_kv_heads = 2;
    d->head_dim = d->v_head_dim = 16;
    f->q_start[1] = 2, f->q_start[2] = 5;
    f->kv_len[0] = 40, f->kv_len[1] = 100;
    f->q_pos0[0] = 38, f->q_pos0[1] = 97;
    f->order[0] = 1;
    for (i = 0; i < 16; i++) (&f->table[0][0])[i] = i < 3 || i >= 8 ? i : -1; // page 0 is a page
    d->q_start = f->q_start;
    d->kv.kv_len = f->kv_len;
    d->q_pos0 = f->q_pos0;
    d->kv.kv_pos0 = f->kv_pos0;
    d->q.data = f->q, d->o.data = f->o, d->lse = f->lse;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_F32;
    d->kv.k.data = f->k, d->kv.v.data = f->v;
    d->kv.page_tokens = 16;
    d->kv.n_pages = 16;
    d->kv.page_table = &f->table[0][0];
    d->kv.page_table_stride = 8;
    for (i = 0; i <= 40; i++) f->row_start[i] = 2 * i;
    for (i = 0; i < 80; i++) f->block[i] = i % 2 ? 3 : 1;
    f->csr[0][1] = f->csr[1][1] = 2;
    f->col[1] = f->diag[1] = 3;
    for (i = 0; i < 5; i++) f->parent[i] = i == 0 || i == 2 ? -1 : 0;
}

static void fixture_blocks(fixture *f) {
    attn_block_list *b = &f->d.mask.blocks;
    b->row_block = b->kv_block = 16;
    b->n_lists = 1;
    b->n_rows = 40;
    b->row_start = f->row_start;
    b->block = f->block;
    b->bits = f->bits;
    b->bits_rows = b->bits_cols = 4;
}

static void fixture_vslash(fixture *f) {
    attn_vertical_slash *v = &f->d.mask.vslash;
    v->block = 16;
    v->n_lists = 1;
    v->col_start = f->csr[0], v->diag_start = f->csr[1];
    v->col = f->col, v->diag = f->diag;
}

static void fixture_stride(fixture *f) {
    f->d.mask.stride.block = 16;
    f->d.mask.stride.local = f->d.mask.stride.stride = 2;
}

static void fixture_tree(fixture *f) {
    f->d.mask.kind = ATTN_MASK_TREE;
    f->d.mask.tree_parent = f->parent;
}

static void fixture_free(fixture *f) {
    free(f->q), free(f->o), free(f->lse), free(f->k), free(f->v);
}

static _Alignas(64) uint8_t work[8 << 20];

// Every call that takes a whole problem says `want`, and none writes.
static void expect(fixture *f, attn_result want, const char *what, int line) {
    attn_plan_params params;
    attn_plan *plan = (attn_plan *)(void *)&params;
    double ref[F_O], ref_lse[F_TOKENS * 4];
    attn_result got[5];
    int i, ok = 1;
    memset(f->o, 0xa5, F_O * 4);
    memset(f->lse, 0xa5, F_TOKENS * 4 * 4);
    memset(ref, 0xa5, sizeof ref);
    memset(ref_lse, 0xa5, sizeof ref_lse);
    memset(&params, 0, sizeof params);
    params.partial_bytes = 1 << 16;
    got[0] = attn_validate(&f->d);
    if (got[0] == ATTN_OK && want != ATTN_OK) { // running it would only crash
        if (!test_check(0, __FILE__, line, what)) printf("    found valid, want %d\n", want);
        return;
    }
    got[1] = attn_cpu_supports(&f->d);
    got[2] = attn_ref_forward(&f->d, ref, ref_lse);
    got[3] = attn_plan_build(&f->d, &params, work, sizeof work, &plan);
    got[4] = attn_cpu_forward(&f->d, work, sizeof work, 2);
    for (i = 0; i < 5; i++) ok &= got[i] == want;
    if (want != ATTN_OK) {
        ok &= plan == (attn_plan *)(void *)&params;
        ok &= attn_cpu_forward_bytes(&f->d, 1) == 0;
        ok &= untouched((uint8_t *)f->o, F_O * 4) && untouched((uint8_t *)f->lse, F_TOKENS * 16);
        ok &=
            untouched((uint8_t *)ref, sizeof ref) && untouched((uint8_t *)ref_lse, sizeof ref_lse);
    }
    if (!test_check(ok, __FILE__, line, what))
        printf("    validate %d supports %d ref %d plan %d forward %d, want %d (%s)\n", got[0],
               got[1], got[2], got[3], got[4], want, attn_result_string(want));
}

#define BAD(want, change)                                                                          \
    do {                                                                                           \
        fixture f;                                                                                 \
        fixture_make(&f);                                                                          \
        { change; }                                                                                \
        expect(&f, want, #change, __LINE__);                                                       \
        fixture_free(&f);                                                                          \
    } while (0)

static void bad_shapes(void) {
    BAD(ATTN_OK, (void)0);
    BAD(ATTN_ERR_ARGUMENT, f.d.n_seq = 0);
    BAD(ATTN_ERR_ARGUMENT, f.d.n_seq = -1);
    BAD(ATTN_ERR_ARGUMENT, f.d.n_heads = 0);
    BAD(ATTN_ERR_ARGUMENT, f.d.n_kv_heads = -2);
    BAD(ATTN_ERR_SHAPE, f.d.n_heads = 5);
    BAD(ATTN_ERR_SHAPE, f.d.head_dim = 0);
    BAD(ATTN_ERR_SHAPE, f.d.head_dim = 12);
    BAD(ATTN_ERR_SHAPE, f.d.head_dim = 584);
    BAD(ATTN_ERR_SHAPE, f.d.head_dim = -16);
    BAD(ATTN_ERR_SHAPE, f.d.v_head_dim = 4);
    BAD(ATTN_ERR_SHAPE, f.d.v_head_dim = -8);
    BAD(ATTN_ERR_ARGUMENT, f.d.q_start = NULL);
    BAD(ATTN_ERR_ARGUMENT, f.d.kv.kv_len = NULL);
    BAD(ATTN_ERR_ARGUMENT, f.d.q.data = NULL);
    BAD(ATTN_ERR_ARGUMENT, f.d.o.data = NULL);
    BAD(ATTN_ERR_ARGUMENT, f.d.kv.k.data = NULL);
    BAD(ATTN_ERR_ARGUMENT, f.d.kv.v.data = NULL);
    BAD(ATTN_OK, f.d.lse = NULL);
    BAD(ATTN_OK, f.d.q_pos0 = NULL);
    BAD(ATTN_OK, f.d.kv.kv_pos0 = NULL);
    BAD(ATTN_ERR_SHAPE, f.q_start[0] = 1);
    BAD(ATTN_ERR_SHAPE, f.q_start[1] = 6);
    BAD(ATTN_ERR_SHAPE, f.q_start[1] = -1);
    BAD(ATTN_ERR_SHAPE, f.kv_len[1] = -1);
    BAD(ATTN_ERR_SHAPE, f.kv_pos0[1] = -1);
    BAD(ATTN_ERR_SHAPE, f.kv_pos0[1] = INT32_MAX - 50);
    BAD(ATTN_ERR_SHAPE, f.q_pos0[0] = -1);
    BAD(ATTN_ERR_SHAPE, f.q_pos0[0] = INT32_MAX - 1);
    BAD(ATTN_ERR_SHAPE, f.kv_len[1] = 129); // more pages than the table's row holds
    BAD(ATTN_ERR_SHAPE, f.d.q_pos0 = NULL; f.kv_len[0] = 1); // queries would start at -1
    BAD(ATTN_ERR_DTYPE, f.d.q.dtype = ATTN_DTYPE_NONE);
    BAD(ATTN_ERR_DTYPE, f.d.o.dtype = ATTN_I8);
    BAD(ATTN_ERR_DTYPE, f.d.kv.k.dtype = ATTN_DTYPE_NONE);
    BAD(ATTN_ERR_DTYPE, f.d.kv.v.dtype = ATTN_DTYPE_COUNT);
    BAD(ATTN_ERR_DTYPE, f.d.kv.v.dtype = (attn_dtype)-1);
    BAD(ATTN_ERR_ARGUMENT, f.d.numerics = (attn_numerics)3);
    BAD(ATTN_ERR_ARGUMENT, f.d.logits.softcap = -1);
    BAD(ATTN_ERR_ARGUMENT, f.d.logits.softcap = attni_float(0x7fc00000u));
    BAD(ATTN_ERR_ARGUMENT, f.d.logits.scale = attni_float(0x7f800000u));
    BAD(ATTN_ERR_DTYPE, f.d.logits.bias.data = f.bias);
    BAD(ATTN_ERR_LAYOUT, f.d.logits.bias.data = f.bias; f.d.logits.bias.dtype = ATTN_F32;
        f.d.logits.bias.stride_head = -1);
    BAD(ATTN_ERR_ARGUMENT, f.d.seq_order = f.order; f.order[1] = 2);
    BAD(ATTN_OK, f.d.seq_order = f.order);
}

static void bad_layouts(void) {
    const int64_t huge = INT64_MAX / 2;
    BAD(ATTN_ERR_LAYOUT, f.d.q.stride_token = -1);
    BAD(ATTN_ERR_LAYOUT, f.d.q.stride_head = INT64_MIN);
    BAD(ATTN_ERR_LAYOUT, f.d.o.stride_token = 15); // rows of O overlap
    BAD(ATTN_ERR_LAYOUT, f.d.o.stride_head = 8);
    BAD(ATTN_OK, f.d.o.stride_head = 16 * F_TOKENS; f.d.o.stride_token = 16); // head-major O
    BAD(ATTN_ERR_LAYOUT, f.d.q.stride_token = huge);
    BAD(ATTN_ERR_LAYOUT, f.d.o.stride_head = huge);
    BAD(ATTN_ERR_ARGUMENT, f.d.kv.page_tokens = 0);
    BAD(ATTN_ERR_ARGUMENT, f.d.kv.page_tokens = -16);
    BAD(ATTN_ERR_ARGUMENT, f.d.kv.n_pages = 0);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.layout = (attn_layout)3);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.layout = (attn_layout)-1);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.layout = ATTN_K16; f.d.kv.page_tokens = 24);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.layout = ATTN_K16; f.d.kv.k.stride_token = 16);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.k.stride_token = -32);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.v.stride_token = 8);  // tokens overlap
    BAD(ATTN_ERR_LAYOUT, f.d.kv.v.stride_head = 1024;
        f.d.kv.v.page_bytes = 2048); // heads leave the page
    BAD(ATTN_ERR_LAYOUT, f.d.kv.k.page_bytes = 100);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.k.page_bytes = -4096);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.k.dtype = ATTN_I4; f.d.kv.k.stride_token = 33);
    BAD(ATTN_ERR_OVERFLOW, f.d.kv.k.stride_token = huge);
    BAD(ATTN_ERR_OVERFLOW, f.d.kv.k.stride_head = huge);
    BAD(ATTN_ERR_OVERFLOW, f.d.kv.v.page_bytes = huge);
    BAD(ATTN_ERR_LAYOUT, f.d.kv.page_table_stride = -8);
    BAD(ATTN_ERR_OVERFLOW, f.d.kv.page_table_stride = INT64_MAX); // row 1 is at no address
    BAD(ATTN_ERR_OVERFLOW, f.d.logits.bias.data = f.bias; f.d.logits.bias.dtype = ATTN_F32;
        f.d.logits.bias.stride_head = INT64_MAX);
    BAD(ATTN_ERR_OVERFLOW, f.d.logits.bias.data = f.bias; f.d.logits.bias.dtype = ATTN_F32;
        f.d.logits.bias.stride_token = INT64_MAX);
    BAD(ATTN_ERR_PAGE, f.table[1][6] = -1);
    BAD(ATTN_ERR_PAGE, f.table[0][0] = 16);
    BAD(ATTN_OK, f.table[0][0] = 15);
    BAD(ATTN_OK, f.table[1][7] = -1); // behind the last token
    BAD(ATTN_ERR_SHAPE, f.d.kv.page_table = NULL); // 40 and 100 tokens in pages of 16
    BAD(ATTN_ERR_PAGE, f.d.kv.page_table = NULL; f.d.kv.page_tokens = 128; f.d.kv.n_pages = 1);
    BAD(ATTN_OK, f.d.kv.page_table = NULL; f.d.kv.page_tokens = 128; f.d.kv.n_pages = 2);
}

static void bad_masks(void) {
    BAD(ATTN_ERR_MASK, f.d.mask.kind = (attn_mask_kind)3);
    BAD(ATTN_ERR_MASK, f.d.mask.kind = (attn_mask_kind)-1);
    BAD(ATTN_ERR_MASK, f.d.mask.window_left = -1);
    BAD(ATTN_ERR_MASK, f.d.mask.window_right = -1);
    BAD(ATTN_ERR_MASK, f.d.mask.n_sink = -1);
    BAD(ATTN_ERR_MASK, f.d.mask.keep_sink = -1);
    BAD(ATTN_ERR_MASK, f.d.mask.keep_recent = -1);
    BAD(ATTN_OK, fixture_blocks(&f));
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.block[8] = 3); // twice the same
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.block[8] = 5); // descending
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.block[8] = -1);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.row_start[3] = 9); // descending offsets
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.row_start[0] = -1);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.block = NULL);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.row_block = 0);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.kv_block = -16);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.n_lists = 3);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.n_rows = 0);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.n_rows = 6); // position 97 is in row 6
    BAD(ATTN_OK, fixture_blocks(&f); f.d.mask.blocks.n_rows = 7);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.seq_row = f.order;
        f.order[0] = -3); // row -1
    BAD(ATTN_OK, fixture_blocks(&f); f.d.mask.blocks.seq_row = f.order; f.order[0] = -2);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.seq_row = f.order;
        f.order[1] = INT32_MAX);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.bits_rows = 3);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.bits_cols = 0);
    BAD(ATTN_ERR_MASK, fixture_blocks(&f); f.d.mask.blocks.bits_cols = 32);
    BAD(ATTN_OK, fixture_stride(&f));
    BAD(ATTN_ERR_MASK, f.d.mask.stride.block = -1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.local = 0);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.stride = 0);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.head_step = -1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.offset = -1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.n_dense = 3);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.n_dense = -1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f);
        f.d.mask.stride.n_dense = f.d.mask.stride.homogeneous = 1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.head0 = 1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.head0 = -1);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.n_heads_total = 1);
    BAD(ATTN_OK, fixture_stride(&f); f.d.mask.stride.head0 = 1; f.d.mask.stride.n_heads_total = 3);
    BAD(ATTN_ERR_MASK, fixture_stride(&f); f.d.mask.stride.local_right = -1);
    BAD(ATTN_OK, fixture_vslash(&f));
    BAD(ATTN_ERR_MASK, f.d.mask.vslash.block = -1);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.d.mask.vslash.n_lists = 3);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.d.mask.vslash.col_start = NULL);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.d.mask.vslash.diag_start = NULL);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.d.mask.vslash.col = NULL);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.col[1] = 0);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.diag[0] = 4);
    BAD(ATTN_ERR_MASK, fixture_vslash(&f); f.col[0] = -1);
    BAD(ATTN_OK, fixture_vslash(&f); f.diag[0] = -1);
    BAD(ATTN_OK, fixture_tree(&f));
    BAD(ATTN_ERR_ARGUMENT, f.d.mask.kind = ATTN_MASK_TREE);
    BAD(ATTN_ERR_MASK, fixture_tree(&f); f.parent[1] = 1);  // its own parent
    BAD(ATTN_ERR_MASK, fixture_tree(&f); f.parent[3] = 2);  // a later one
    BAD(ATTN_ERR_MASK, fixture_tree(&f); f.parent[2] = -2);
    BAD(ATTN_ERR_MASK, fixture_tree(&f); f.parent[0] = 0);
    BAD(ATTN_ERR_MASK, fixture_tree(&f); f.q_pos0[1] = 96); // not the last tokens
    BAD(ATTN_ERR_MASK, fixture_tree(&f); f.kv_len[0] = 1;
        f.kv_pos0[0] = 39); // more queries than tokens
}

// The last value that is good and the first that is not; validated only, nothing so large is run.
#define EDGE(want, field, good, bad)                                                               \
    do {                                                                                           \
        fixture f;                                                                                 \
        fixture_make(&f);                                                                          \
        edge_setup(&f, edge);                                                                      \
        f.field = good;                                                                            \
        if (!CHECK_EQ(attn_validate(&f.d), ATTN_OK)) printf("    " #field " = " #good "\n");       \
        f.field = bad;                                                                             \
        if (!CHECK_EQ(attn_validate(&f.d), want)) printf("    " #field " = " #bad "\n");           \
        fixture_free(&f);                                                                          \
    } while (0)

enum { E_NONE, E_ONE, E_HEAD_MAJOR_O, E_BIAS, E_BLOCKS, E_STRIDE, E_VSLASH, E_TREE, E_HEAD_MAJOR };

static void edge_setup(fixture *f, int edge) {
    if (edge == E_ONE) f->d.n_seq = 1;
    if (edge == E_HEAD_MAJOR_O) f->d.o.stride_token = 16, f->d.o.stride_head = 80;
    if (edge == E_BIAS) f->d.logits.bias.data = f->bias, f->d.logits.bias.dtype = ATTN_F32;
    if (edge == E_BLOCKS) fixture_blocks(f), f->d.mask.blocks.n_rows = 7;
    if (edge == E_STRIDE) fixture_stride(f);
    if (edge == E_VSLASH) fixture_vslash(f);
    if (edge == E_TREE) fixture_tree(f);
    if (edge == E_HEAD_MAJOR) f->d.kv.layout = ATTN_HEAD_MAJOR;
}

static void edges_of_shapes(void) {
    const int64_t l56 = (int64_t)1 << 56, l58 = (int64_t)1 << 58;
    int edge = E_NONE;
    EDGE(ATTN_ERR_SHAPE, d.n_heads, 65536, 65538);
    EDGE(ATTN_ERR_SHAPE, d.n_heads, 2, 1);
    EDGE(ATTN_ERR_SHAPE, d.head_dim, 576, 584);
    EDGE(ATTN_ERR_SHAPE, d.head_dim, 8, 4);
    EDGE(ATTN_ERR_SHAPE, d.v_head_dim, 576, 584);
    EDGE(ATTN_ERR_SHAPE, d.v_head_dim, 8, 7);
    EDGE(ATTN_ERR_SHAPE, d.v_head_dim, 0, 1);
    EDGE(ATTN_ERR_SHAPE, q_start[1], 0, -1);
    EDGE(ATTN_ERR_SHAPE, q_start[1], 5, 6);
    EDGE(ATTN_ERR_SHAPE, kv_len[0], 0, -1);
    EDGE(ATTN_ERR_SHAPE, kv_len[1], 128, 129);
    EDGE(ATTN_ERR_SHAPE, kv_pos0[1], INT32_MAX - 100, INT32_MAX - 99);
    EDGE(ATTN_ERR_SHAPE, q_pos0[0], 0, -1);
    EDGE(ATTN_ERR_SHAPE, q_pos0[0], INT32_MAX - 2, INT32_MAX - 1);
    EDGE(ATTN_ERR_DTYPE, d.q.dtype, ATTN_BF16, ATTN_F8E4M3);
    EDGE(ATTN_ERR_DTYPE, d.o.dtype, ATTN_F32, ATTN_DTYPE_NONE);
    EDGE(ATTN_ERR_DTYPE, d.kv.k.dtype, ATTN_I4, ATTN_DTYPE_COUNT);
    EDGE(ATTN_ERR_ARGUMENT, d.numerics, ATTN_NUMERICS_APPROX, (attn_numerics)-1);
    EDGE(ATTN_ERR_LAYOUT, d.q.stride_token, l58 / 5, l58 / 5 + 1);
    EDGE(ATTN_ERR_LAYOUT, d.q.stride_head, l58 / 4, l58 / 4 + 1);
    EDGE(ATTN_ERR_LAYOUT, d.q.stride_head, 0, -1);
    EDGE(ATTN_ERR_LAYOUT, d.o.stride_token, 64, 63);
    EDGE(ATTN_ERR_LAYOUT, d.o.stride_head, 16, 15);
    EDGE(ATTN_ERR_LAYOUT, d.kv.k.stride_token, 32, 31);
    EDGE(ATTN_ERR_OVERFLOW, d.kv.k.stride_token, l56 / 64, l56 / 64 + 1);
    EDGE(ATTN_ERR_OVERFLOW, d.kv.v.page_bytes, l56, l56 + 1);
    EDGE(ATTN_ERR_LAYOUT, d.kv.v.page_bytes, 2048, 2047);
    EDGE(ATTN_ERR_PAGE, table[0][1], 0, -1);
    EDGE(ATTN_ERR_PAGE, table[1][6], 15, 16);
    EDGE(ATTN_ERR_PAGE, d.kv.n_pages, 15, 14); // ids up to 14 are in use
    EDGE(ATTN_ERR_SHAPE, d.kv.page_table_stride, 8, 6);
    edge = E_ONE;
    EDGE(ATTN_ERR_OVERFLOW, d.kv.page_table_stride, l58, l58 + 1);
    EDGE(ATTN_ERR_SHAPE, d.kv.page_table_stride, 0, 2); // 0: there is no second row
    EDGE(ATTN_ERR_SHAPE, d.kv.page_table_stride, 3, 1);
    edge = E_HEAD_MAJOR_O;
    EDGE(ATTN_ERR_LAYOUT, d.o.stride_head, 80, 79);
    EDGE(ATTN_ERR_LAYOUT, d.o.stride_token, 16, 15);
    edge = E_HEAD_MAJOR;
    EDGE(ATTN_ERR_LAYOUT, d.kv.v.stride_head, 256, 255);
    EDGE(ATTN_ERR_OVERFLOW, d.kv.v.stride_head, l56 / 16, l56 / 8 + 1);
    edge = E_BIAS;
    EDGE(ATTN_ERR_OVERFLOW, d.logits.bias.stride_head, l58 / 4, l58 / 4 + 1);
    EDGE(ATTN_ERR_OVERFLOW, d.logits.bias.stride_token, l58 / 5, l58 / 5 + 1);
    EDGE(ATTN_ERR_LAYOUT, d.logits.bias.stride_token, 0, -1);
    EDGE(ATTN_ERR_DTYPE, d.logits.bias.dtype, ATTN_F16, ATTN_I8);
}

static void edges_of_masks(void) {
    int edge = E_NONE;
    EDGE(ATTN_ERR_MASK, d.mask.window_left, INT32_MAX, INT32_MIN);
    EDGE(ATTN_ERR_MASK, d.mask.window_right, INT32_MAX, INT32_MIN);
    EDGE(ATTN_ERR_MASK, d.mask.kind, ATTN_MASK_FULL, (attn_mask_kind)3);
    edge = E_BLOCKS;
    EDGE(ATTN_ERR_MASK, d.mask.blocks.n_lists, 1, 0);
    EDGE(ATTN_ERR_MASK, d.mask.blocks.n_lists, 2, 3); // KV heads
    EDGE(ATTN_ERR_MASK, d.mask.blocks.n_lists, 4, 5); // query heads
    EDGE(ATTN_ERR_MASK, d.mask.blocks.bits_rows, 1, 0);
    EDGE(ATTN_ERR_MASK, d.mask.blocks.bits_rows, 16, 32);
    EDGE(ATTN_ERR_MASK, d.mask.blocks.bits_cols, 16, 12);
    EDGE(ATTN_ERR_MASK, d.mask.blocks.kv_block, 4, 0);
    EDGE(ATTN_ERR_MASK, d.mask.blocks.kv_block, 4, 2);
    EDGE(ATTN_ERR_MASK, block[0], 0, -1);
    EDGE(ATTN_ERR_MASK, block[1], 2, 1);
    EDGE(ATTN_ERR_MASK, block[13], 2, 1); // the last entry of the last row
    EDGE(ATTN_ERR_MASK, row_start[0], 0, -1);
    EDGE(ATTN_ERR_MASK, row_start[7], 12, 11);
    edge = E_STRIDE;
    EDGE(ATTN_ERR_MASK, d.mask.stride.n_dense, 2, 3);
    EDGE(ATTN_ERR_MASK, d.mask.stride.n_dense, 0, -1);
    EDGE(ATTN_ERR_MASK, d.mask.stride.block, 1, -1);
    EDGE(ATTN_ERR_MASK, d.mask.stride.local, 1, 0);
    EDGE(ATTN_ERR_MASK, d.mask.stride.stride, 1, 0);
    EDGE(ATTN_ERR_MASK, d.mask.stride.n_heads_total, 2, 1);
    EDGE(ATTN_ERR_MASK, d.mask.stride.local_right, 0, -1);
    EDGE(ATTN_ERR_MASK, d.mask.stride.head_step, 0, -1);
    edge = E_VSLASH;
    EDGE(ATTN_ERR_MASK, col[0], 0, -1);
    EDGE(ATTN_ERR_MASK, diag[1], 3, 0);
    EDGE(ATTN_ERR_MASK, d.mask.vslash.block, 1, -1);
    EDGE(ATTN_ERR_MASK, csr[0][1], 0, -1);
    edge = E_TREE;
    EDGE(ATTN_ERR_MASK, parent[0], -1, -2);
    EDGE(ATTN_ERR_MASK, parent[1], 0, 1);
    EDGE(ATTN_ERR_MASK, parent[4], 1, 2); // the last query of the last sequence
    EDGE(ATTN_ERR_MASK, q_pos0[1], 97, 98);
    EDGE(ATTN_ERR_MASK, kv_len[1], 100, 99);
}

// ---- plan, run, merge, forward

static void bad_plans(void) {
    fixture f;
    attn_plan_params p;
    attn_plan *plan = NULL;
    size_t bytes, fb;
    uint8_t *scratch, *partials;
    int rebuilt = 7;
    int32_t i;
    fixture_make(&f);
    attn_cpu_plan_params(&f.d, 4, &p);
    p.share = 2;
    CHECK(p.workers == 4 && p.row_tile > 0 && p.partial_bytes > 0);
    attn_cpu_plan_params(&f.d, 4, NULL); // and nothing happens
    bytes = attn_plan_bytes(&f.d, &p);
    CHECK(bytes > 0 && bytes < sizeof work);
    CHECK(attn_plan_bytes(NULL, &p) == 0 && attn_plan_bytes(&f.d, NULL) == 0);
    f.d.n_heads = 5;
    CHECK(attn_plan_bytes(&f.d, &p) == 0);
    f.d.n_heads = 4;
    memset(work, 0xa5, bytes + 64);
    CHECK_EQ(attn_plan_build(NULL, &p, work, bytes, &plan), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_plan_build(&f.d, NULL, work, bytes, &plan), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_plan_build(&f.d, &p, NULL, bytes, &plan), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_plan_build(&f.d, &p, work, bytes, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_plan_build(&f.d, &p, work, bytes - 1, &plan), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_plan_build(&f.d, &p, work + 8, bytes, &plan), ATTN_ERR_BUFFER);
    p.row_tile = -1;
    CHECK_EQ(attn_plan_build(&f.d, &p, work, bytes, &plan), ATTN_ERR_ARGUMENT);
    p.row_tile = 16;
    p.workers = -1;
    CHECK_EQ(attn_plan_build(&f.d, &p, work, bytes, &plan), ATTN_ERR_ARGUMENT);
    p.workers = 4;
    CHECK(plan == NULL && untouched(work, bytes + 64));
    f.d.seq_order = f.order;
    f.order[0] = f.order[1] = 1; // not a permutation
    CHECK_EQ(attn_plan_build(&f.d, &p, work, bytes, &plan), ATTN_ERR_ARGUMENT);
    CHECK(plan == NULL);
    f.d.seq_order = NULL;
    bytes = attn_plan_bytes(&f.d, &p);
    // both sequences on the same first page of a span, so that partials are needed
    f.d.kv.page_tokens = 16;
    CHECK_EQ(attn_plan_build(&f.d, &p, work, bytes, &plan), ATTN_OK);
    scratch =
        (uint8_t *)aligned_alloc(64, (attn_cpu_scratch_bytes(&f.d, plan) + 127) & ~(size_t)63);
    partials = (uint8_t *)aligned_alloc(64, (attn_plan_partial_bytes(plan) + 127) & ~(size_t)63);
    CHECK(attn_cpu_scratch_bytes(NULL, plan) == 0 && attn_cpu_scratch_bytes(&f.d, NULL) == 0);
    CHECK(attn_plan_partial_bytes(NULL) == 0);
    memset(f.o, 0xa5, F_O * 4);
    CHECK_EQ(attn_cpu_run(NULL, plan, 0, 1, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, NULL, 0, 1, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, plan, -1, 1, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, plan, 0, -1, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, plan, plan->n_tasks, 1, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, plan, INT32_MAX, INT32_MAX, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, plan, 1, INT32_MAX, partials, scratch), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_run(&f.d, plan, 0, 1, partials, NULL), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cpu_run(&f.d, plan, 0, 1, partials, scratch + 4), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cpu_merge(NULL, plan, 0, 0, partials), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_merge(&f.d, NULL, 0, 0, partials), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_merge(&f.d, plan, 0, plan->n_merges + 1, partials), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_merge(&f.d, plan, -1, 1, partials), ATTN_ERR_ARGUMENT);
    // the plan of another problem
#define STALE(change, undo)                                                                        \
    change;                                                                                        \
    CHECK_EQ(attn_cpu_run(&f.d, plan, 0, plan->n_tasks, partials, scratch), ATTN_ERR_STALE);       \
    undo;
    STALE(f.d.n_seq = 1, f.d.n_seq = 2)
    STALE(f.d.n_heads = 2, f.d.n_heads = 4)
    STALE(f.d.n_kv_heads = 4, f.d.n_kv_heads = 2)
    STALE(f.d.head_dim = 24, f.d.head_dim = 16)
    STALE(f.d.v_head_dim = 8, f.d.v_head_dim = 16)
    STALE(f.kv_len[0]++; f.kv_len[1]++, f.kv_len[0]--; f.kv_len[1]--)
    STALE(f.q_pos0[0]--; f.q_pos0[1]--, f.q_pos0[0]++; f.q_pos0[1]++)
    STALE(f.kv_pos0[0]++; f.kv_pos0[1]++, f.kv_pos0[0]--; f.kv_pos0[1]--)
    for (i = 0; i < 16; i++) (&f.table[0][0])[i] -= 100; // pages that left the pool since
    CHECK_EQ(attn_cpu_run(&f.d, plan, 0, plan->n_tasks, partials, scratch), ATTN_ERR_PAGE);
    for (i = 0; i < 16; i++) (&f.table[0][0])[i] += 100;
    CHECK(untouched((uint8_t *)f.o, F_O * 4));
    CHECK_EQ(attn_plan_update(NULL, &f.d, &rebuilt), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_plan_update(plan, NULL, &rebuilt), ATTN_ERR_ARGUMENT);
    f.d.n_heads = 2;
    CHECK_EQ(attn_plan_update(plan, &f.d, &rebuilt), ATTN_ERR_STALE);
    f.d.n_heads = 4;
    f.kv_len[0] = -1;
    CHECK_EQ(attn_plan_update(plan, &f.d, &rebuilt), ATTN_ERR_SHAPE);
    f.kv_len[0] = 40;
    CHECK_EQ(attn_plan_update(plan, &f.d, NULL), ATTN_OK);
    { // more sequences than there is room for
        static int32_t q_start[400], kv_len[400], table[400];
        attn_desc d = f.d;
        d.n_seq = 300;
        for (i = 0; i < 300; i++) q_start[i + 1] = i + 1, kv_len[i] = 1;
        d.q_start = q_start, d.kv.kv_len = kv_len, d.kv.page_table = table,
        d.kv.page_table_stride = 1;
        d.q_pos0 = d.kv.kv_pos0 = NULL;
        CHECK_EQ(attn_plan_update(plan, &d, &rebuilt), ATTN_ERR_BUFFER);
    }
    fb = attn_cpu_forward_bytes(&f.d, 2);
    CHECK(fb > 0 && fb < sizeof work && attn_cpu_forward_bytes(NULL, 1) == 0);
    CHECK(attn_cpu_forward_bytes(&f.d, 0) == 0 && attn_cpu_forward_bytes(&f.d, -1) == 0);
    CHECK_EQ(attn_cpu_forward(NULL, work, fb, 2), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_forward(&f.d, NULL, fb, 2), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cpu_forward(&f.d, work, fb - 1, 2), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cpu_forward(&f.d, work, fb, 0), ATTN_ERR_ARGUMENT);
    CHECK(untouched((uint8_t *)f.o, F_O * 4));
    CHECK_EQ(attn_cpu_forward(&f.d, work + 4, fb, 2), ATTN_OK); // any alignment will do
    CHECK_EQ(attn_cpu_forward(&f.d, work, fb, 2), ATTN_OK);
    CHECK(!untouched((uint8_t *)f.o, 64));
    CHECK(strcmp(attn_cpu_executor(NULL), "none") == 0);
    free(scratch), free(partials);
    fixture_free(&f);
}

// Partials that are needed and missing: two sequences that share 256 tokens.
static void missing_partials(void) {
    static int32_t table[2][20];
    fixture f;
    attn_plan_params p;
    attn_plan *plan = NULL;
    uint8_t *scratch;
    int32_t i;
    fixture_make(&f);
    for (i = 0; i < 20; i++) table[0][i] = table[1][i] = i % 16;
    table[1][19] = 3;
    f.d.kv.page_table = &table[0][0];
    f.d.kv.page_table_stride = 20;
    f.kv_len[0] = 300, f.kv_len[1] = 310;
    f.d.q_pos0 = NULL;
    attn_cpu_plan_params(&f.d, 1, &p);
    p.share = 2;
    CHECK_EQ(attn_plan_build(&f.d, &p, work, sizeof work, &plan), ATTN_OK);
    CHECK(plan && plan->n_shared == 1 && plan->n_merges == 2 && attn_plan_partial_bytes(plan) > 0);
    scratch =
        (uint8_t *)aligned_alloc(64, (attn_cpu_scratch_bytes(&f.d, plan) + 127) & ~(size_t)63);
    memset(f.o, 0xa5, F_O * 4);
    CHECK_EQ(attn_cpu_run(&f.d, plan, 0, plan->n_tasks, NULL, scratch), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_cpu_merge(&f.d, plan, 0, 2, NULL), ATTN_ERR_BUFFER);
    CHECK(untouched((uint8_t *)f.o, F_O * 4));
    // a workspace one partial row too small is never exceeded: the plan does without
    p.partial_bytes = attn_plan_partial_bytes(plan) - 1;
    CHECK_EQ(attn_plan_build(&f.d, &p, work, sizeof work, &plan), ATTN_OK);
    CHECK(attn_plan_partial_bytes(plan) <= p.partial_bytes && plan->n_shared == 0);
    // costs beyond any sense plan something all the same
    for (i = 0; i < 140; i++) { // past the point where a sum of finite costs is infinite
        attn_cpu_plan_params(&f.d, 4, &p);
        p.cost_row_token = p.cost_kv_token = (float)ldexp(1, i);
        CHECK_EQ(attn_plan_build(&f.d, &p, work, sizeof work, &plan), ATTN_OK);
        CHECK(plan->n_tasks > 0);
    }
    free(scratch);
    fixture_free(&f);
}

static void bad_stores(void) {
    fixture f;
    attn_tensor k, v;
    int64_t slot[5] = {0, 1, 2, 3, 4}, out[F_TOKENS];
    int i;
    fixture_make(&f);
    memset(&k, 0, sizeof k);
    k.data = f.q;
    k.dtype = ATTN_F32;
    v = k;
    memset(f.k, 0xa5, 16 * 16 * 2 * 16 * 4);
    memset(f.v, 0xa5, 16 * 16 * 2 * 16 * 4);
    CHECK_EQ(attn_cpu_store(NULL, &k, &v, slot, 0, 5), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, -1, 5), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, -5), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, NULL, 0, 6), ATTN_ERR_SHAPE);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, NULL, INT64_MAX, 5), ATTN_ERR_SHAPE);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, NULL, 5, INT64_MAX), ATTN_ERR_SHAPE);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, INT64_MAX, 1), ATTN_ERR_OVERFLOW);
    slot[4] = 256;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), ATTN_ERR_PAGE);
    slot[4] = INT64_MAX;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), ATTN_ERR_PAGE);
    slot[4] = 255;
    v.dtype = ATTN_I8;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), ATTN_ERR_DTYPE);
    v = k;
    k.data = NULL;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), ATTN_ERR_ARGUMENT);
    k = v;
    v.stride_token = -1;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), ATTN_ERR_LAYOUT);
    v.stride_token = INT64_MAX / 2;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), ATTN_ERR_OVERFLOW);
    v = k;
#define BAD_STORE(want, change, undo)                                                              \
    change;                                                                                        \
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, slot, 0, 5), want);                                      \
    undo;
    BAD_STORE(ATTN_ERR_DTYPE, f.d.kv.v.dtype = ATTN_DTYPE_NONE, f.d.kv.v.dtype = ATTN_F32)
    BAD_STORE(ATTN_ERR_SHAPE, f.d.head_dim = 580, f.d.head_dim = 16)
    BAD_STORE(ATTN_ERR_ARGUMENT, f.d.kv.v.data = NULL, f.d.kv.v.data = f.v)
    BAD_STORE(ATTN_ERR_ARGUMENT, f.d.kv.n_pages = 0, f.d.kv.n_pages = 16)
    BAD_STORE(ATTN_ERR_LAYOUT, f.d.kv.v.page_bytes = 8, f.d.kv.v.page_bytes = 0)
    BAD_STORE(ATTN_ERR_LAYOUT, f.d.kv.layout = (attn_layout)7, f.d.kv.layout = ATTN_TOKEN_MAJOR)
    f.q_pos0[1] = 98; // the third query would be token 100 of 100
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, NULL, 0, 5), ATTN_ERR_PAGE);
    CHECK_EQ(attn_kv_slots(&f.d, out), ATTN_ERR_PAGE);
    f.q_pos0[1] = 97;
    f.table[1][6] = 16;
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, NULL, 0, 5), ATTN_ERR_PAGE);
    CHECK_EQ(attn_kv_slots(&f.d, out), ATTN_ERR_PAGE);
    f.table[1][6] = 14;
    CHECK(untouched((uint8_t *)f.k, 16 * 16 * 2 * 16 * 4) &&
          untouched((uint8_t *)f.v, 16 * 16 * 2 * 16 * 4));
    CHECK_EQ(attn_cpu_store(&f.d, NULL, NULL, slot, 0, 5), ATTN_OK);
    CHECK_EQ(attn_kv_slots(NULL, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_slots(&f.d, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_kv_slots(&f.d, out), ATTN_OK);
    for (i = 0; i < 2; i++)
        CHECK_EQ(out[i], 2 * 16 + 6 + i); // tokens 38, 39 of sequence 0, in its page 2
    for (i = 0; i < 3; i++) CHECK_EQ(out[2 + i], 14 * 16 + 1 + i);
    // slots NULL writes exactly there
    for (i = 0; i < F_TOKENS * 2 * 16; i++) f.q[i] = (float)(i + 1);
    CHECK_EQ(attn_cpu_store(&f.d, &k, &v, NULL, 1, 4), ATTN_OK);
    CHECK(untouched((uint8_t *)f.k, (size_t)out[1] * 128));
    for (i = 1; i < 5; i++) CHECK(memcmp(f.k + out[i] * 32, f.q + 32 * i, 128) == 0);
    for (i = 1; i < 5; i++) CHECK(memcmp(f.v + out[i] * 32, f.q + 32 * i, 128) == 0);
    CHECK(attn_kv_page_bytes(NULL, 0) == 0);
    CHECK_EQ(attn_kv_page_bytes(&f.d, 0), 16 * 2 * 16 * 4);
    f.d.kv.k.dtype = ATTN_I4;
    CHECK_EQ(attn_kv_page_bytes(&f.d, 0), 16 * 2 * 8 + 16 * 2 * 4);
    f.d.n_kv_heads = 0;
    CHECK_EQ(attn_kv_page_bytes(&f.d, 0), 0);
    f.d.n_kv_heads = INT32_MAX, f.d.kv.page_tokens = INT32_MAX;
    CHECK_EQ(attn_kv_page_bytes(&f.d, 0), 0);
    // sizes beyond size_t are 0, never their low bits
    f.d.kv.page_tokens = 1, f.d.kv.k.dtype = ATTN_F32;
    CHECK_EQ(attn_kv_page_bytes(&f.d, 0), SIZE_MAX > UINT32_MAX ? (int64_t)INT32_MAX * 64 : 0);
    CHECK_EQ(attn_kv_rows_bytes(&f.d, 0, INT32_MAX), 0);
    fixture_free(&f);
}

static void bad_dense(void) {
    uint8_t m[16] = {1};
    int64_t start[8], n = 77;
    int32_t block[4];
    uint64_t bits[4];
    attn_block_list out;
    memset(&out, 0xa5, sizeof out);
    CHECK_EQ(attn_mask_from_dense(NULL, 4, 4, 2, 2, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 0, 4, 2, 2, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, -1, 2, 2, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 0, 2, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, -2, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 64, 65, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, INT32_MAX, 2, start, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, NULL, block, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, start, NULL, bits, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, start, block, NULL, 4, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, start, block, bits, -1, &n, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, start, block, bits, 4, NULL, &out),
             ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, start, block, bits, 4, &n, NULL),
             ATTN_ERR_ARGUMENT);
    CHECK(n == 77 && untouched((uint8_t *)&out, sizeof out));
    CHECK_EQ(attn_mask_from_dense(m, 4, 4, 2, 2, start, block, bits, 4, &n, &out), ATTN_OK);
    CHECK(n == 1 && block[0] == 0 && bits[0] == 1);
}

static void bad_isa(void) {
    attn_cpu_isa now = attn_cpu_get_isa();
    int i;
    CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)-1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_ISA_COUNT), ATTN_ERR_ARGUMENT);
    for (i = 0; i < ATTN_CPU_ISA_COUNT; i++)
        if (!attn_cpu_has((attn_cpu_isa)i))
            CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)i), ATTN_ERR_UNSUPPORTED);
    CHECK_EQ(attn_cpu_get_isa(), now);
    CHECK(!attn_cpu_has((attn_cpu_isa)-1) && !attn_cpu_has(ATTN_CPU_ISA_COUNT));
    CHECK(strcmp(attn_cpu_isa_name((attn_cpu_isa)99), "unknown") == 0);
    for (i = 0; i < ATTN_CPU_ISA_COUNT; i++) CHECK(strlen(attn_cpu_isa_name((attn_cpu_isa)i)) > 2);
    for (i = -20; i < 3; i++)
        CHECK(attn_result_string((attn_result)i) != NULL && *attn_result_string((attn_result)i));
    CHECK(strcmp(attn_result_string(ATTN_ERR_PAGE), attn_result_string(ATTN_ERR_FULL)) != 0);
}

// ---- pool and tree: what has no tree, no sequence, no room

static int no_rows(void *user, int32_t page, int32_t place, int32_t n, void *rows) {
    (void)user, (void)page, (void)place, (void)n, (void)rows;
    return 0;
}

static void bad_pool(void) {
    attn_pool p;
    uint8_t mem[256];
    int32_t page = -7, i;
    CHECK(attn_pool_bytes(0) == 0 && attn_pool_bytes(-1) == 0 && attn_pool_bytes(4) > 0);
    CHECK_EQ(attn_pool_init(NULL, 4, mem, sizeof mem), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_init(&p, 0, mem, sizeof mem), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_init(&p, 4, NULL, sizeof mem), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_init(&p, 4, mem, attn_pool_bytes(4) - 1), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_pool_init(&p, 4, mem, attn_pool_bytes(4)), ATTN_OK);
    CHECK_EQ(attn_pool_alloc(NULL, &page), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_alloc(&p, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_pool_release(&p, 0), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_retain(&p, 0), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_retain(&p, 4), ATTN_ERR_PAGE);
    CHECK_EQ(attn_pool_release(&p, -1), ATTN_ERR_PAGE);
    CHECK_EQ(p.n_free, 4);
    for (i = 0; i < 4; i++) CHECK_EQ(attn_pool_alloc(&p, &page), ATTN_OK);
    page = -7;
    CHECK_EQ(attn_pool_alloc(&p, &page), ATTN_ERR_FULL);
    CHECK_EQ(page, -7);
}

static void bad_tree(void) {
    attn_tree_desc td = {8, 16, 4, 0};
    attn_tree *t = NULL;
    attn_tree_stats stats;
    attn_page_copy c;
    size_t bytes = attn_tree_bytes(&td);
    void *mem = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    int32_t tokens[200], seq = -5, hit = -5, n = 0, i, out[16];
    for (i = 0; i < 200; i++) tokens[i] = i;
    CHECK(bytes > 0 && attn_tree_bytes(NULL) == 0);
    td.n_pages = 0;
    CHECK_EQ(attn_tree_bytes(&td), 0);
    CHECK(attn_tree_init(&td, mem, bytes, &t) != ATTN_OK);
    td.n_pages = 8, td.page_tokens = -1;
    CHECK_EQ(attn_tree_bytes(&td), 0);
    td.page_tokens = 16;
    CHECK_EQ(attn_tree_init(NULL, mem, bytes, &t), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_init(&td, NULL, bytes, &t), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_init(&td, mem, bytes, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_init(&td, mem, bytes - 1, &t), ATTN_ERR_BUFFER);
    CHECK(t == NULL);
    CHECK_EQ(attn_tree_init(&td, mem, bytes, &t), ATTN_OK);
    CHECK_EQ(attn_tree_open(NULL, 0, tokens, 3, &seq, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_open(t, 0, NULL, 3, &seq, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_open(t, 0, tokens, -1, &seq, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_open(t, 0, tokens, 3, NULL, &hit), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_insert(NULL, 0, tokens, 3, &seq, &hit, &c, 1, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(NULL, 0, tokens, 3, &hit, &c, 1, &n), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_append(t, 0, tokens, 3, &hit, &c, 1, &n), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_fork(t, 2, &seq), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_fork(NULL, 2, &seq), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_truncate(t, -1, 0), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_truncate(NULL, 0, 0), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_release(t, 4, 1), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_release(NULL, 0, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pin(NULL, 0, tokens, 3, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_pin(t, 0, tokens, 3, 1), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_priority(t, 1, 3), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_evict(NULL, 1, NULL), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_ack(NULL, &c, 1), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_check(NULL), ATTN_ERR_ARGUMENT);
    CHECK(attn_tree_length(t, 0) < 0 && attn_tree_length(NULL, 0) < 0);
    CHECK(attn_tree_pages(t, 0, out, 16) < 0 && attn_tree_pages(NULL, 0, out, 16) < 0);
    CHECK_EQ(attn_tree_tokens(t, 0, 0, 1, out), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_order(t, tokens, 1, out, NULL), ATTN_ERR_ARGUMENT);
    CHECK(attn_tree_save_bytes(t, 0, 4) == 0 && attn_tree_save_bytes(NULL, 0, 4) == 0);
    CHECK_EQ(attn_tree_save(t, 0, 4, no_rows, NULL, work, sizeof work), ATTN_ERR_NOT_FOUND);
    CHECK_EQ(attn_tree_load(t, 0, 4, no_rows, NULL, NULL, work, 20, &seq), ATTN_ERR_CORRUPT);
    CHECK_EQ(attn_tree_load(t, 0, 4, NULL, NULL, NULL, work, 20, &seq), ATTN_ERR_ARGUMENT);
    CHECK_EQ(seq, -5);
    attn_tree_get_stats(t, NULL);
    CHECK_EQ(attn_tree_insert(t, 0, tokens, 129, &seq, &hit, &c, 1, &n),
             ATTN_ERR_FULL); // 8 pages hold 128
    CHECK_EQ(attn_tree_insert(t, 0, tokens, 40, &seq, &hit, &c, 1, &n), ATTN_OK);
    CHECK_EQ(attn_tree_pages(t, seq, out, 2), ATTN_ERR_BUFFER);
    CHECK_EQ(attn_tree_pages(t, seq, out, 3), 3);
    CHECK_EQ(attn_tree_tokens(t, seq, 39, 2, out), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_truncate(t, seq, 41), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_tree_save(t, seq, 4, no_rows, NULL, work, attn_tree_save_bytes(t, seq, 4) - 1),
             ATTN_ERR_BUFFER);
    CHECK_EQ(attn_tree_save(t, seq, 4, NULL, NULL, work, sizeof work), ATTN_ERR_ARGUMENT);
    attn_tree_get_stats(t, &stats);
    CHECK_EQ(stats.n_seq, 1);
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    free(mem);
}

int main(int argc, char **argv) {
    static const attn_dtype types[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                       ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    uint64_t count = test_arg(argc, argv, 2, 3), c;
    test_rng r;
    int t, l, s, isa;
    r.state = test_arg(argc, argv, 1, 1);
    CHECK_EQ(attn_cpu_open(), ATTN_OK);
    conversions(&r);
    for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
        if (!attn_cpu_has((attn_cpu_isa)isa)) continue;
        CHECK_EQ(attn_cpu_set_isa((attn_cpu_isa)isa), ATTN_OK);
        for (c = 0; c < count; c++)
            for (t = 0; t < 7; t++)
                for (l = 0; l < 3; l++)
                    for (s = 0; s < 3; s++)
                        store_case(&r, types[t], (attn_layout)l, types[s], (int)(c % 3 == 2));
    }
    CHECK_EQ(attn_cpu_set_isa(ATTN_CPU_AUTO), ATTN_OK);
    for (t = 0; t < 7; t++)
        for (l = 0; l < 3; l++) {
            for (s = 0; s < 3; s++) rows_case(&r, types[t], l, s);
            copies_case(&r, types[t], l);
        }
    bad_shapes();
    bad_layouts();
    bad_masks();
    edges_of_shapes();
    edges_of_masks();
    bad_plans();
    missing_partials();
    bad_stores();
    bad_dense();
    bad_isa();
    bad_pool();
    bad_tree();
    return TEST_END();
}

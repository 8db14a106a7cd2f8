/* select_oracle.h - what every selector has to select, written from attn.h's >>select once more:
   doubles, libm, one plain loop after the other, slow. It shares the descriptor with the library
   and nothing else; keys come out of the pages through attn_kv_read_rows.

   oracle_select fills, for every list, row and block, `keep` and `near`: the decision on a near
   entry hangs on a score or running sum within ORACLE_NEAR (relative) of its cut, so that another
   order of summation may decide it otherwise. What merely follows from such a decision is near as
   well: a diagonal's blocks, the rest of a descent. */
#ifndef SELECT_ORACLE_H
#define SELECT_ORACLE_H

#include "test.h"
#include "attn.h"

#define ORACLE_NEAR 1e-5

// Of masses: an error of scores is that of their exponentials, and grows with them.
static double oracle_near = ORACLE_NEAR;
static double oracle_tiny; // and masses below this may be none in f32

typedef struct oracle {
    const attn_desc *d;
    attn_select f; // every default filled in
    int32_t n_lists, n_seq;
    int32_t *row0, *n_rows, *n_blocks; // (n_seq) first row block, their number, blocks of a row
    uint8_t **keep, **near;            // (n_seq) (n_lists, n_rows, n_blocks)
} oracle;

// One sequence as one query head sees it.
typedef struct oracle_view {
    const attn_desc *d;
    const attn_select *f;
    int32_t s, head, dim, group;
    int32_t q_len, p0;       // queries at positions p0 ...
    int32_t kv_len, k0, end; // keys at positions k0 ... end - 1
    double *q, *k;           // (q_len, dim), (kv_len, dim)
    double *score;           // (q_len, kv_len), -inf where the query does not see the key
    double scale, cap;
    double size; // the largest |score|
} oracle_view;

TEST_FN void *oracle_alloc(size_t n, size_t size) {
    void *p = calloc(n + 1, size);
    if (!p) abort();
    return p;
}

TEST_FN double *oracle_doubles(int64_t n) {
    return (double *)oracle_alloc((size_t)n, sizeof(double));
}

TEST_FN int32_t oracle_up(int64_t n, int32_t b) {
    return (int32_t)((n + b - 1) / b);
}
TEST_FN int32_t oracle_least(int64_t a, int64_t b) {
    return (int32_t)(a < b ? a : b);
}
TEST_FN int32_t oracle_most(int64_t a, int64_t b) {
    return (int32_t)(a > b ? a : b);
}
TEST_FN double oracle_larger(double a, double b) {
    return a > b ? a : b;
}

// Whether a and b, of values as large as size, may change places.
TEST_FN int oracle_close(double a, double b, double size) {
    if (a == b) return 1;
    if (fabs(a) < oracle_tiny && fabs(b) < oracle_tiny) return 1;
    return fabs(a - b) <= oracle_near * fabs(size);
}

// ---- Q and K as doubles

// Element i of a row of raw elements.
TEST_FN double oracle_element(attn_dtype t, const uint8_t *row, int32_t i) {
    uint32_t u;
    float x;
    int32_t c, sign, man, bits, e;
    if (t == ATTN_F32) {
        memcpy(&x, row + 4 * i, 4);
        return (double)x;
    }
    if (t == ATTN_BF16) {
        u = (uint32_t)(row[2 * i] | row[2 * i + 1] << 8) << 16;
        memcpy(&x, &u, 4);
        return (double)x;
    }
    if (t == ATTN_I8) return row[i] > 127 ? row[i] - 256 : row[i];
    if (t == ATTN_I4) {
        c = row[i / 2] >> (4 * (i % 2)) & 15;
        return c > 7 ? c - 16 : c;
    }
    c = t == ATTN_F16 ? row[2 * i] | row[2 * i + 1] << 8 : row[i];
    bits = t == ATTN_F16 ? 10 : t == ATTN_F8E4M3 ? 3 : 2; // of the mantissa
    e = t == ATTN_F8E4M3 ? 4 : 5;
    sign = c >> (bits + e);
    man = c & ((1 << bits) - 1);
    c = c >> bits & ((1 << e) - 1);
    if (c == 0) return (sign ? -1 : 1) * ldexp(man, 2 - (1 << (e - 1)) - bits);
    if (t != ATTN_F8E4M3 && c == 31) return man ? NAN : sign ? -HUGE_VAL : HUGE_VAL;
    if (t == ATTN_F8E4M3 && c == 15 && man == 7) return NAN;
    return (sign ? -1 : 1) * ldexp(man + (1 << bits), c + 1 - (1 << (e - 1)) - bits);
}

TEST_FN void oracle_keys(oracle_view *v) {
    const attn_desc *d = v->d;
    const attn_kv *kv = &d->kv;
    int32_t h = v->head / v->group, j, e, bits = attn_dtype_bits(kv->k.dtype);
    size_t row = (size_t)v->dim * (size_t)bits / 8;
    uint8_t *m = (uint8_t *)oracle_alloc(attn_kv_rows_bytes(d, 0, 1), 1);
    for (j = 0; j < v->kv_len; j++) {
        int64_t entry = v->s * kv->page_table_stride + j / kv->page_tokens;
        int32_t page = kv->page_table ? kv->page_table[entry] : v->s;
        float scale = 1;
        if (attn_kv_read_rows(d, 0, page, j % kv->page_tokens, 1, m) != ATTN_OK) abort();
        if (attn_dtype_scaled(kv->k.dtype) && !kv->k.head_scale)
            memcpy(&scale, m + row * (size_t)d->n_kv_heads + 4 * (size_t)h, 4);
        else if (attn_dtype_scaled(kv->k.dtype))
            scale = kv->k.head_scale[h];
        for (e = 0; e < v->dim; e++)
            v->k[(int64_t)j * v->dim + e] =
                oracle_element(kv->k.dtype, m + row * (size_t)h, e) * (double)scale;
    }
    free(m);
}

TEST_FN double oracle_dot(const double *a, const double *b, int32_t n) {
    double sum = 0;
    int32_t e;
    for (e = 0; e < n; e++) sum += a[e] * b[e];
    return sum;
}

TEST_FN double oracle_capped(const oracle_view *v, double s) {
    return v->cap > 0 ? v->cap * tanh(s / v->cap) : s;
}

// The score of query i and the key at position k, whether visible or not.
TEST_FN double oracle_score(const oracle_view *v, int32_t i, int32_t k) {
    return oracle_capped(v, v->scale * oracle_dot(v->q + (int64_t)i * v->dim,
                                                  v->k + (int64_t)(k - v->k0) * v->dim, v->dim));
}

TEST_FN oracle_view oracle_open(const attn_desc *d, const attn_select *f, int32_t s, int32_t head) {
    oracle_view v;
    const attn_tensor *q = &d->q;
    int64_t st = q->stride_token ? q->stride_token : (int64_t)d->n_heads * d->head_dim;
    int64_t sh = q->stride_head ? q->stride_head : d->head_dim;
    int32_t t, e, size = attn_dtype_bits(q->dtype) / 8;
    memset(&v, 0, sizeof v);
    v.d = d;
    v.f = f;
    v.s = s;
    v.head = head;
    v.dim = d->head_dim;
    v.group = d->n_heads / d->n_kv_heads;
    v.q_len = d->q_start[s + 1] - d->q_start[s];
    v.kv_len = d->kv.kv_len[s];
    v.k0 = d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0;
    v.end = v.k0 + v.kv_len;
    v.p0 = d->q_pos0 ? d->q_pos0[s] : v.end - v.q_len;
    v.scale = d->logits.scale != 0 ? (double)d->logits.scale : 1 / sqrt((double)v.dim);
    v.cap = (double)d->logits.softcap;
    if (f->kind == ATTN_SELECT_FLEX && f->flex.compatible) { // the reference knows neither
        v.scale = 1 / sqrt((double)v.dim);
        v.cap = 0;
    }
    v.q = oracle_doubles((int64_t)v.q_len * v.dim);
    v.k = oracle_doubles((int64_t)v.kv_len * v.dim);
    for (t = 0; t < v.q_len; t++)
        for (e = 0; e < v.dim; e++)
            v.q[(int64_t)t * v.dim + e] = oracle_element(
                q->dtype, (const uint8_t *)q->data + ((d->q_start[s] + t) * st + head * sh) * size,
                e);
    oracle_keys(&v);
    v.score = oracle_doubles((int64_t)v.q_len * v.kv_len);
    for (t = 0; t < v.q_len; t++)
        for (e = 0; e < v.kv_len; e++) {
            double *x = v.score + (int64_t)t * v.kv_len + e;
            *x = v.k0 + e <= v.p0 + t ? oracle_score(&v, t, v.k0 + e) : -HUGE_VAL;
            if (fabs(*x) < HUGE_VAL) v.size = oracle_larger(v.size, fabs(*x));
        }
    return v;
}

TEST_FN void oracle_done(oracle_view *v) {
    free(v->q);
    free(v->k);
    free(v->score);
}

// Means of the n rows of x from `first` on.
TEST_FN void oracle_mean(const double *x, int32_t dim, int32_t first, int32_t n, double *out) {
    int32_t i, e;
    for (e = 0; e < dim; e++) {
        out[e] = 0;
        for (i = first; i < first + n; i++) out[e] += x[(int64_t)i * dim + e];
        out[e] /= n > 0 ? n : 1;
    }
}

// ---- orders and cuts

static const double *oracle_sorted;

TEST_FN int oracle_before(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    double x = oracle_sorted[i], y = oracle_sorted[j];
    return x > y ? -1 : x < y ? 1 : i < j ? -1 : i > j;
}

// Indices by value, largest first, the lower of equals first. To be freed.
TEST_FN int32_t *oracle_order(const double *value, int32_t n) {
    int32_t *order = (int32_t *)oracle_alloc((size_t)n, 4), i;
    for (i = 0; i < n; i++) order[i] = i;
    oracle_sorted = value;
    qsort(order, (size_t)n, 4, oracle_before);
    return order;
}

// Keeps the first `want` by value. Near: what equals the value at the cut but for ORACLE_NEAR of
// size (0: of that value itself), where the cut may lie anywhere in [lo, hi].
TEST_FN void oracle_top(const double *value, int32_t n, int32_t lo, int32_t want, int32_t hi,
                        double size, uint8_t *keep, uint8_t *near) {
    int32_t *order = oracle_order(value, n), i, c;
    for (i = 0; i < n; i++) {
        if (i < want) keep[order[i]] = 1;
        if (i >= lo && i < hi) near[order[i]] = 1;
    }
    for (c = oracle_most(lo, 1); c <= hi && c < n; c++) {
        double in = value[order[c - 1]], out = value[order[c]];
        if (fabs(in) == HUGE_VAL) continue;
        for (i = 0; i < n; i++) {
            double other = i < c ? out : in, x = value[order[i]];
            if (fabs(x) == HUGE_VAL || fabs(other) == HUGE_VAL) continue;
            if (oracle_close(x, other, size > 0 ? size : in)) near[order[i]] = 1;
        }
    }
    free(order);
}

// How many of the largest it takes until they hold more than (or, exactly = 1, at least) part.
TEST_FN int32_t oracle_cover(const double *value, int32_t n, double part, int at_least) {
    int32_t *order = oracle_order(value, n), i;
    double sum = 0;
    for (i = 0; i < n; i++) {
        if (at_least ? sum >= part : sum > part) break;
        sum += value[order[i]];
    }
    free(order);
    return i;
}

// ---- FlexPrefill

// A of the last n queries: (n, kv_len), softmax over the keys each sees.
TEST_FN double *oracle_last_queries(const oracle_view *v, int32_t n) {
    double *a = oracle_doubles((int64_t)n * v->kv_len);
    int32_t i, j;
    for (i = 0; i < n; i++) {
        int32_t query = v->q_len - n + i;
        double *row = a + (int64_t)i * v->kv_len, most = -HUGE_VAL, sum = 0;
        for (j = 0; j < v->kv_len; j++) {
            row[j] = v->score[(int64_t)query * v->kv_len + j];
            most = oracle_larger(most, row[j]);
        }
        for (j = 0; j < v->kv_len; j++) sum += row[j] = exp(row[j] - most);
        for (j = 0; j < v->kv_len; j++) row[j] /= sum;
    }
    return a;
}

// Of block b of positions: the first row of x that lies in it, and how many do. x starts at
// `first`.
TEST_FN int32_t oracle_part(int32_t b, int32_t size, int32_t first, int32_t n, int32_t *count) {
    int32_t lo = oracle_most((int64_t)b * size, first);
    int32_t hi = oracle_least((int64_t)(b + 1) * size, (int64_t)first + n);
    *count = oracle_most(hi - lo, 0);
    return lo - first;
}

// Softmax over blocks 0 ... n - 1 of q against the blocks' mean keys; blocks without keys get 0.
TEST_FN void oracle_estimate(const oracle_view *v, const double *q, int32_t n, double *e) {
    double *mean = oracle_doubles(v->dim), most = -HUGE_VAL, sum = 0;
    int32_t b, first, count;
    for (b = 0; b < n; b++) {
        first = oracle_part(b, v->f->kv_block, v->k0, v->kv_len, &count);
        e[b] = -HUGE_VAL;
        if (!count) continue;
        oracle_mean(v->k, v->dim, first, count, mean);
        e[b] = oracle_capped(v, v->scale * oracle_dot(q, mean, v->dim));
        most = oracle_larger(most, e[b]);
    }
    for (b = 0; b < n; b++) sum += e[b] = exp(e[b] - most);
    for (b = 0; b < n; b++) e[b] /= sum;
    free(mean);
}

// (Jensen-Shannon distance) ^ 2. nan_on_zero: as coded, 0 ln 0 is no number.
TEST_FN double oracle_divergence(const double *e, const double *p, int32_t n, int nan_on_zero) {
    double sum = 0;
    int32_t i;
    for (i = 0; i < n; i++) {
        double m = (e[i] + p[i]) / 2;
        if (nan_on_zero && (e[i] < 1.4e-45 || p[i] < 1.4e-45)) return NAN; // in f32
        if (e[i] > 0) sum += e[i] * log(e[i] / m) / 2;
        if (p[i] > 0) sum += p[i] * log(p[i] / m) / 2;
    }
    return sum;
}

// Blocks of columns and of diagonals the reference takes: n of the three, at gamma (1 -+ NEAR).
TEST_FN void oracle_flex_counts(const oracle_view *v, const double *mass, int32_t nb,
                                int32_t n[3]) {
    const attn_flex *x = &v->f->flex;
    int32_t i, least = oracle_up(x->min_budget, v->f->kv_block);
    for (i = 0; i < 3; i++) {
        double gamma = (double)x->gamma * (1 + (i - 1) * oracle_near);
        int32_t cover = oracle_cover(mass, v->kv_len, gamma, 0);
        if (cover > v->kv_len) cover = v->kv_len;
        n[i] = cover / 128 + 1;
        if (n[i] < least) n[i] = least;
        n[i] = oracle_least(n[i], oracle_least(oracle_up(x->max_budget, v->f->kv_block), nb));
    }
}

// The blocks of query-aware heads: largest first over the whole map until their sum would pass
// gamma * nb.
TEST_FN void oracle_flex_map(const oracle_view *v, int32_t nb, uint8_t *keep, uint8_t *near) {
    int64_t n = (int64_t)nb * nb;
    double *map = oracle_doubles(n), *q = oracle_doubles(v->dim), sum = 0, cut = 0;
    double part = (double)v->f->flex.gamma * nb;
    int32_t r, first, count, i, *order;
    for (r = 0; r < nb; r++) {
        first = oracle_part(r, v->f->kv_block, v->p0, v->q_len, &count);
        oracle_mean(v->q, v->dim, first, count, q);
        oracle_estimate(v, q, r + 1, map + (int64_t)r * nb);
    }
    order = oracle_order(map, (int32_t)n);
    for (i = 0; i < n; i++) {
        int32_t at = order[i];
        sum += map[at];
        if (sum <= part) keep[at] = 1;
        if (sum <= part) cut = map[at];
        if (oracle_close(sum, part, part)) near[at] = 1;
    }
    for (i = 0; i < n; i++)
        if (oracle_close(map[i], cut, cut)) near[i] = 1;
    free(order);
    free(map);
    free(q);
}

// As the reference's code has it. keep, near: (nb, nb), cleared.
TEST_FN void oracle_flex_compatible(oracle_view *v, int32_t nb, uint8_t *keep, uint8_t *near) {
    const int32_t b = v->f->kv_block, n = oracle_least(b, v->kv_len), last = v->kv_len - 1;
    double *a = oracle_last_queries(v, n), *col = oracle_doubles(v->kv_len);
    double *diag = oracle_doubles(v->kv_len), *block = oracle_doubles(nb), d2, tau2;
    double *across = oracle_doubles(nb), *e = oracle_doubles(nb), *q = oracle_doubles(v->dim);
    uint8_t *k = (uint8_t *)oracle_alloc((size_t)nb, 4), *kd = k + nb, *kn = kd + nb, *dn = kn + nb;
    int32_t i, j, x, r, c[3], g[3];
    int unsure = 0;
    for (i = 0; i < n; i++)
        for (j = 0; j < v->kv_len; j++) {
            int32_t t = j - i + n - 1; // a[i][j] = a[i][i + t - (n - 1)]
            col[j] += a[(int64_t)i * v->kv_len + j] / n;
            if (t <= last) diag[t] += a[(int64_t)i * v->kv_len + j] / n;
        }
    for (j = 0; j < v->kv_len; j++) block[j / b] += col[j];
    for (j = 0; j < v->kv_len; j++) across[j / b] += diag[j];
    oracle_mean(v->q, v->dim, v->q_len - n, n, q);
    oracle_estimate(v, q, nb, e);
    d2 = oracle_divergence(e, block, nb, 1);
    for (i = 0; i < nb; i++) // subnormal, or none: hangs on the hardware
        unsure |=
            (e[i] > 1e-46 && e[i] < oracle_tiny) || (block[i] > 1e-46 && block[i] < oracle_tiny);
    tau2 = (double)v->f->flex.tau * (double)v->f->flex.tau;
    oracle_flex_counts(v, col, nb, c);
    oracle_flex_counts(v, diag, nb, g);
    if (tau2 > 0 && d2 < tau2) {
        int32_t least = oracle_least(oracle_up(v->f->flex.min_budget, b), nb);
        for (i = 0; i < 3; i++) c[i] = g[i] = least;
        oracle_flex_map(v, nb, keep, near);
    }
    block[0] = across[nb - 1] = HUGE_VAL;
    oracle_top(block, nb, c[0], c[1], c[2], 0, k, kn);
    oracle_top(across, nb, g[0], g[1], g[2], 0, kd, dn);
    for (r = 0; r < nb; r++)
        for (x = 0; x < nb; x++) {
            int32_t to = x + r - (nb - 1); // the diagonal nb - 1 - x meets row r there
            if (x <= r && k[x]) keep[r * nb + x] = 1;
            if (x <= r && kn[x]) near[r * nb + x] = 1;
            if (to >= 0 && kd[x]) keep[r * nb + to] = 1;
            if (to >= 0 && dn[x]) near[r * nb + to] = 1;
        }
    if (tau2 > 0 && (unsure || oracle_close(d2, tau2, tau2)))
        memset(near, 1, (size_t)nb * (size_t)nb);
    for (r = 0; r < nb; r++) memset(keep + r * nb + r + 1, 0, (size_t)(nb - r - 1));
    free(k);
    free(a);
    free(col);
    free(diag);
    free(block);
    free(across);
    free(e);
    free(q);
}

// What the corrected mode takes of one of its two kinds: the largest that hold gamma of all.
TEST_FN void oracle_flex_take(const oracle_view *v, const double *mass, int32_t n, uint8_t *keep,
                              uint8_t *near) {
    const attn_flex *x = &v->f->flex;
    int32_t i, c[3], least = oracle_up(x->min_budget, v->f->kv_block);
    double sum = 0;
    for (i = 0; i < n; i++) sum += mass[i];
    for (i = 0; i < 3; i++) {
        double part = (double)x->gamma * sum * (1 + (i - 1) * oracle_near);
        c[i] = oracle_most(oracle_cover(mass, n, part, 1), least);
        c[i] = oracle_least(c[i], oracle_least(oracle_up(x->max_budget, v->f->kv_block), n));
    }
    oracle_top(mass, n, c[0], c[1], c[2], 0, keep, near);
}

// Rows r0 ... r1 of query-aware heads: the fewest blocks that hold gamma' of e_r. gamma' of the
// three: at gamma and -+ oracle_near. mass: (rows, nb).
TEST_FN void oracle_flex_rows(const oracle_view *v, int32_t nb, int32_t r0, int32_t rows,
                              const double *mass, uint8_t *keep, uint8_t *near) {
    const attn_flex *x = &v->f->flex;
    double *e = oracle_doubles((int64_t)rows * nb), *q = oracle_doubles(v->dim), g[3];
    int32_t r, i, first, count, c, n[3];
    for (r = 0; r < rows; r++) {
        first = oracle_part(r0 + r, v->f->kv_block, v->p0, v->q_len, &count);
        oracle_mean(v->q, v->dim, first, count, q);
        oracle_estimate(v, q, r0 + r + 1, e + (int64_t)r * nb);
    }
    for (i = 0; i < 3; i++) {
        double gamma = (double)x->gamma * (1 + (i - 1) * oracle_near);
        g[i] = gamma;
        for (r = 0; r < rows; r++) {
            const double *m = mass + (int64_t)r * nb, *own = e + (int64_t)r * nb;
            int32_t *order = oracle_order(own, r0 + r + 1);
            double all = 0, sum = 0, prefix = 0; // masses without the cells always kept
            for (c = 1; c < r0 + r; c++) all += m[c];
            for (c = 0; c <= r0 + r && sum < gamma * all; c++) {
                if (order[c] && order[c] != r0 + r) sum += m[order[c]];
                prefix += own[order[c]];
            }
            g[i] = oracle_larger(g[i], prefix);
            free(order);
        }
    }
    for (r = 0; r < rows; r++) {
        for (i = 0; i < 3; i++) {
            double part = oracle_larger(g[i], 0) * (i == 1 ? 1 - 1e-14 : 1 + (i - 1) * oracle_near);
            n[i] = oracle_cover(e + (int64_t)r * nb, r0 + r + 1, part, 1);
            n[i] = oracle_most(n[i], oracle_up(x->min_budget, v->f->kv_block));
            n[i] = oracle_least(n[i], oracle_up(x->max_budget, v->f->kv_block));
            n[i] = oracle_least(n[i], r0 + r + 1);
        }
        oracle_top(e + (int64_t)r * nb, r0 + r + 1, n[0], n[1], n[2], 0, keep + (int64_t)r * nb,
                   near + (int64_t)r * nb);
    }
    free(e);
    free(q);
}

// Masses of A's pairs: (rows, nb) by cells, and by diagonals without the cells always kept.
TEST_FN double *oracle_flex_mass(const oracle_view *v, int32_t nb, int32_t r0, int32_t rows,
                                 int32_t n, double *slash) {
    const int32_t b = v->f->kv_block;
    double *a = oracle_last_queries(v, n), *mass = oracle_doubles((int64_t)rows * nb);
    int32_t i, j;
    for (i = 0; i < n; i++)
        for (j = 0; j < v->kv_len; j++) {
            int32_t p = v->p0 + v->q_len - n + i, k = v->k0 + j, t = p - k;
            double part = a[(int64_t)i * v->kv_len + j] / n, f;
            if (t < 0) continue;
            mass[(int64_t)(p / b - r0) * nb + k / b] += part;
            if (k / b == 0 || k / b == p / b) continue;
            f = (double)(t % b) / b;
            slash[t / b] += (1 - f) * part;
            if (t / b + 1 < nb) slash[t / b + 1] += f * part;
        }
    free(a);
    return mass;
}

// The corrected mode. keep, near: (rows, nb) of row blocks r0 ..., cleared.
TEST_FN void oracle_flex_corrected(oracle_view *v, int32_t nb, int32_t r0, int32_t rows,
                                   uint8_t *keep, uint8_t *near) {
    const int32_t n = oracle_least(v->f->kv_block, v->q_len);
    double *slash = oracle_doubles(nb), *col = oracle_doubles(nb), *e = oracle_doubles(nb);
    double *all = oracle_doubles(nb), *q = oracle_doubles(v->dim), d2, tau2;
    double *mass = oracle_flex_mass(v, nb, r0, rows, n, slash);
    uint8_t *k = (uint8_t *)oracle_alloc((size_t)nb, 4), *kd = k + nb, *kn = kd + nb, *dn = kn + nb;
    int32_t r, j;
    for (r = 0; r < rows; r++)
        for (j = 0; j < nb; j++) {
            double m = mass[(int64_t)r * nb + j];
            all[j] += m;
            if (j > 0 && j != r0 + r) col[j] += m;
        }
    oracle_mean(v->q, v->dim, v->q_len - n, n, q);
    oracle_estimate(v, q, nb, e);
    d2 = oracle_divergence(e, all, nb, 0);
    tau2 = (double)v->f->flex.tau * (double)v->f->flex.tau;
    if (d2 < tau2) {
        oracle_flex_rows(v, nb, r0, rows, mass, keep, near);
    } else {
        oracle_flex_take(v, col, nb, k, kn);
        oracle_flex_take(v, slash, nb, kd, dn);
    }
    for (r = 0; r < rows; r++)
        for (j = 0; j <= r0 + r; j++) {
            int64_t at = (int64_t)r * nb + j;
            int sure = (k[j] && !kn[j]) || (kd[r0 + r - j] && !dn[r0 + r - j]);
            keep[at] = keep[at] || k[j] || kd[r0 + r - j];
            near[at] = !sure && (near[at] || kn[j] || dn[r0 + r - j]);
            if (j == 0 || j == r0 + r) keep[at] = 1;
            if (j == 0 || j == r0 + r) near[at] = 0;
            if (tau2 > 0 && fabs(d2 - tau2) <= oracle_near * tau2 + 1e-9) near[at] = 1;
        }
    free(slash);
    free(col);
    free(e);
    free(all);
    free(q);
    free(mass);
    free(k);
}

TEST_FN void oracle_flex(oracle_view *v, int32_t nb, int32_t r0, int32_t rows, uint8_t *keep,
                         uint8_t *near) {
    const int32_t b = v->f->kv_block, least = oracle_up(v->f->flex.min_budget, b);
    int32_t r, dense = oracle_most(2 * (int64_t)b, (int64_t)least * b);
    oracle_near = ORACLE_NEAR * oracle_larger(1, v->size / 16);
    oracle_tiny = ldexp(1, -90);
    if (v->q_len > dense && v->f->flex.compatible)
        oracle_flex_compatible(v, nb, keep, near);
    else if (v->q_len > dense)
        oracle_flex_corrected(v, nb, r0, rows, keep, near);
    else
        for (r = 0; r < rows; r++) memset(keep + (int64_t)r * nb, 1, (size_t)(r0 + r + 1));
}

// ---- exact

// Log of the sum of exp(score) over the keys of block b that query i sees.
TEST_FN double oracle_log_mass(const oracle_view *v, int32_t i, int32_t b) {
    int32_t n, j, first = oracle_part(b, v->f->kv_block, v->k0, v->kv_len, &n);
    const double *s = v->score + (int64_t)i * v->kv_len;
    double most = -HUGE_VAL, sum = 0;
    for (j = first; j < first + n; j++) most = oracle_larger(most, s[j]);
    if (most == -HUGE_VAL) return most;
    for (j = first; j < first + n; j++) sum += exp(s[j] - most);
    return most + log(sum);
}

// Log of the sum of exp(m[b]) over the blocks of which is[b] == want.
TEST_FN double oracle_log_sum(const double *m, const uint8_t *is, int want, int32_t nb) {
    double most = -HUGE_VAL, sum = 0;
    int32_t b;
    for (b = 0; b < nb; b++)
        if (is[b] == want) most = oracle_larger(most, m[b]);
    if (most == -HUGE_VAL) return most;
    for (b = 0; b < nb; b++)
        if (is[b] == want) sum += exp(m[b] - most);
    return most + log(sum);
}

// The largest share of mass that one of the n rows of shares misses without the blocks of keep.
TEST_FN double oracle_missed(const double *share, int32_t n, const uint8_t *keep, int32_t nb) {
    double worst = 0;
    int32_t i, b;
    for (i = 0; i < n; i++) {
        double missed = 0;
        for (b = 0; b < nb; b++)
            if (!keep[b]) missed += share[(int64_t)i * nb + b];
        worst = oracle_larger(worst, missed);
    }
    return worst;
}

// Shares of softmax mass of the rows of m.
TEST_FN double *oracle_shares(const double *m, int32_t n, int32_t nb) {
    double *share = oracle_doubles((int64_t)n * nb);
    uint8_t *none = (uint8_t *)oracle_alloc((size_t)nb, 1);
    int32_t i, b;
    for (i = 0; i < n; i++) {
        double all = oracle_log_sum(m + (int64_t)i * nb, none, 0, nb);
        for (b = 0; b < nb; b++) share[(int64_t)i * nb + b] = exp(m[(int64_t)i * nb + b] - all);
    }
    free(none);
    return share;
}

// M of every query of row block r, of every head of the list: (*n, nb).
TEST_FN double *oracle_logs(const oracle_view *v, int32_t n_views, int32_t nb, int32_t r,
                            int32_t *n) {
    int32_t count, i, h, b, first = oracle_part(r, v->f->row_block, v->p0, v->q_len, &count);
    double *m = oracle_doubles((int64_t)n_views * count * nb);
    for (*n = h = 0; h < n_views; h++)
        for (i = first; i < first + count; i++, ++*n)
            for (b = 0; b < nb; b++) m[(int64_t)*n * nb + b] = oracle_log_mass(v + h, i, b);
    return m;
}

// One list row: the heads v[0 ... n_views - 1] of row block r. keep, near: (nb), cleared.
TEST_FN void oracle_exact(const oracle_view *v, int32_t n_views, int32_t nb, int32_t r,
                          uint8_t *keep, uint8_t *near) {
    const attn_exact *x = &v->f->exact;
    const int32_t b = v->f->kv_block, rb = v->f->row_block, first = v->k0 / b;
    const int32_t last = oracle_least((int64_t)(r + 1) * rb, (int64_t)v->p0 + v->q_len) - 1;
    const int32_t own = oracle_most(0, (int64_t)r * rb - x->recent) / b,
                  visible = last / b - first + 1;
    int32_t n, i, j, c[3], more, others = 0, budget = oracle_up(x->keep, b), *order;
    double *m = oracle_logs(v, n_views, nb, r, &n), *share = oracle_shares(m, n, nb);
    double *value = oracle_doubles(nb), size = 1;
    uint8_t *always = (uint8_t *)oracle_alloc((size_t)nb, 2), *with = always + nb;
    oracle_near = ORACLE_NEAR;
    oracle_tiny = 0;
    for (i = 0; i < n_views; i++) size = oracle_larger(size, v[i].size);
    budget = oracle_most(budget, (int64_t)ceil(((double)x->share - 1e-6) * visible));
    if (!x->keep && !(x->share > 0)) budget = visible;
    for (j = 0; j < nb; j++) always[j] = j <= last / b && (j == first || (j >= own && j >= first));
    for (j = 0; j < nb; j++) value[j] = -HUGE_VAL;
    for (i = 0; i < n; i++) {
        double z = oracle_log_sum(m + (int64_t)i * nb, always, 1, nb);
        for (j = first; j <= last / b; j++)
            if (!always[j]) value[j] = oracle_larger(value[j], m[(int64_t)i * nb + j] - z);
    }
    for (j = 0; j < nb; j++) others += j >= first && j <= last / b && !always[j];
    more = oracle_most(0, oracle_least(others, (int64_t)budget - (visible - others)));
    order = oracle_order(value, nb);
    for (i = 0; i < 3; i++) {
        double most = (double)x->epsilon * (1 + (1 - i) * ORACLE_NEAR * size);
        c[i] = more;
        if (!(x->epsilon > 0)) continue;
        memcpy(with, always, (size_t)nb);
        for (c[i] = 0; c[i] < more && oracle_missed(share, n, with, nb) > most; c[i]++)
            with[order[c[i]]] = 1;
    }
    oracle_top(value, nb, c[0], c[1], c[2], size, keep, near);
    for (j = 0; j < nb; j++) {
        if (always[j] || value[j] == -HUGE_VAL) near[j] = 0;
        keep[j] = always[j] || (keep[j] && value[j] > -HUGE_VAL);
    }
    free(order);
    free(m);
    free(share);
    free(value);
    free(always);
}

// ---- HiP

// A q block as one list sees it: the list's heads v[0 ... n_views - 1].
typedef struct oracle_q_block {
    const oracle_view *v;
    int32_t n_views, list, m, size; // positions [m size, m size + size)
    int32_t first, count;           // the queries that lie there
    int32_t p_min, p_max, end;
    int32_t b0, n, later; // HIP1, HIP2: first eligible block, their number, v
    uint8_t *dims;        // (n_views, dim) those that count
    double most;          // the largest |score| met
    int tainted;          // a decision was close
} oracle_q_block;

// Scores of products do not add up: equal ones are equal in any arithmetic.
TEST_FN int oracle_hip_close(oracle_q_block *q, double a, double b) {
    double most = fabs(a) == HUGE_VAL || fabs(b) == HUGE_VAL ? 0 : fabs(a) + 0.3 * q->most;
    return a != b && fabs(a - b) <= ORACLE_NEAR * most;
}

// The score of a query row and the key at position k.
TEST_FN double oracle_hip_score(oracle_q_block *q, int32_t h, const double *row, int64_t k) {
    const oracle_view *v = q->v + h;
    double sum = 0;
    int32_t e;
    if (k < v->k0 || k >= q->end) return -HUGE_VAL;
    for (e = 0; e < v->dim; e++)
        if (!q->dims || q->dims[h * v->dim + e]) sum += row[e] * v->k[(k - v->k0) * v->dim + e];
    sum *= v->scale;
    if (sum != sum) return -HUGE_VAL;
    if (fabs(sum) < HUGE_VAL) q->most = oracle_larger(q->most, fabs(sum));
    return sum + 0;
}

// Keeps the best `want` of n.
TEST_FN void oracle_hip_best(oracle_q_block *q, const double *score, int32_t n, int32_t want,
                             uint8_t *keep) {
    int32_t *order = oracle_order(score, n), i;
    memset(keep, 0, (size_t)n);
    for (i = 0; i < n && i < want; i++) keep[order[i]] = 1;
    for (i = 0; i < n && want > 0 && want < n; i++) {
        double other = score[order[i < want ? want : want - 1]];
        if (oracle_hip_close(q, score[order[i]], other)) q->tainted = 1;
    }
    free(order);
}

// q block m of `size` positions; 0 when no query lies there.
TEST_FN int oracle_hip_open(oracle_q_block *q, const oracle_view *v, int32_t n_views, int32_t list,
                            int32_t m, int32_t size) {
    memset(q, 0, sizeof *q);
    q->v = v;
    q->n_views = n_views;
    q->list = list;
    q->m = m;
    q->size = size;
    q->first = oracle_part(m, size, v->p0, v->q_len, &q->count);
    q->p_min = v->p0 + q->first;
    q->p_max = q->p_min + q->count - 1;
    q->end = oracle_least((int64_t)q->p_max + 1, v->end);
    return q->count > 0;
}

// ---- HiP, generations 1 and 2

TEST_FN int oracle_hip_scores(const oracle_q_block *q, int32_t i) { // does query i of it count?
    const int32_t stride = q->v->f->hip.q_stride;
    return (q->p_min + i - q->m * q->size) % stride == stride - 1 || i == q->count - 1;
}

// S(b); last: with the last query and every key.
TEST_FN double oracle_hip_s(oracle_q_block *q, int32_t b, int last) {
    const attn_hip *x = &q->v->f->hip;
    double best = -HUGE_VAL;
    int32_t h, i, e;
    for (h = 0; h < q->n_views; h++)
        for (i = 0; i < q->count; i++)
            for (e = 0; e < x->block; e += last ? 1 : x->k_stride) {
                int64_t k = (int64_t)b * x->block + e;
                if (last ? i < q->count - 1 : !oracle_hip_scores(q, i)) continue;
                if (k > q->p_min + i - q->later) continue;
                best = oracle_larger(
                    best,
                    oracle_hip_score(q, h, q->v[h].q + (int64_t)(q->first + i) * q->v[h].dim, k));
            }
    return best;
}

TEST_FN void oracle_hip_low(oracle_q_block *q) {
    const int32_t dim = q->v->dim;
    double *sum = oracle_doubles(dim), most = q->most;
    int32_t h, i, e;
    q->dims = (uint8_t *)oracle_alloc((size_t)(q->n_views * dim), 1);
    for (h = 0; h < q->n_views; h++) {
        for (e = 0; e < dim; e++) sum[e] = 0;
        for (i = 0; i < q->count; i++)
            for (e = 0; e < dim && oracle_hip_scores(q, i); e++)
                sum[e] += fabs(q->v[h].q[(int64_t)(q->first + i) * dim + e]);
        oracle_hip_best(q, sum, dim, q->v->f->hip.low_dim, q->dims + h * dim);
    }
    q->most = most;
    free(sum);
}

TEST_FN uint64_t oracle_hash(uint64_t seed, uint64_t a, uint64_t c) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u + a * 0xbf58476d1ce4e5b9u + c * 0x94d049bb133111ebu;
    z ^= z >> 30;
    z *= 0xbf58476d1ce4e5b9u;
    z ^= z >> 27;
    z *= 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// The score of a child of `size` blocks.
TEST_FN double oracle_hip_child(oracle_q_block *q, int32_t start, int32_t size) {
    double best = -HUGE_VAL;
    uint64_t z;
    int32_t b;
    switch (q->v->f->hip.sample) {
    case ATTN_HIP_FIRST:
        return oracle_hip_s(q, start, 0);
    case ATTN_HIP_LAST:
        return oracle_hip_s(q, start + size - 1, 0);
    case ATTN_HIP_POSITION:
        return oracle_hip_s(q, start + q->m % size, 0);
    case ATTN_HIP_RANDOM:
        z = oracle_hash(q->v->f->hip.seed, (uint64_t)start + ((uint64_t)size << 32),
                        (uint64_t)q->m);
        return oracle_hip_s(q, start + (int32_t)((z >> 32) * (uint64_t)size >> 32), 0);
    case ATTN_HIP_ORACLE:
        for (b = start; b < start + size; b++) best = oracle_larger(best, oracle_hip_s(q, b, 0));
        return best;
    default:
        return oracle_hip_s(q, start + size / 2, 0);
    }
}

typedef struct oracle_group {
    int32_t list, start, size;
    double score;
} oracle_group;

// Binary splitting of the blocks of n_lists lists that share a budget. chosen, score: (n_lists, n).
TEST_FN void oracle_hip_split(oracle_q_block *q, int32_t n_lists, uint8_t *chosen, double *score) {
    const int32_t k = q->v->f->hip.keep / q->v->f->hip.block, n = q->n;
    oracle_group *g = (oracle_group *)oracle_alloc((size_t)(n_lists * k * 2), sizeof *g);
    oracle_group *next = (oracle_group *)oracle_alloc((size_t)(n_lists * k * 2), sizeof *g);
    double *s = oracle_doubles(n_lists * k * 2);
    uint8_t *keep = (uint8_t *)oracle_alloc((size_t)(n_lists * k * 2), 1);
    int32_t count = 0, l, i, j, c, more = 1;
    for (l = 0; l < n_lists; l++)
        for (i = 0; i < k; i++, count++) {
            g[count].list = l;
            g[count].start = (int32_t)((int64_t)n * i / k);
            g[count].size = (int32_t)((int64_t)n * (i + 1) / k) - g[count].start;
        }
    while (more) {
        for (more = 0, j = i = 0; i < count; i++)
            for (c = 0; c < 2; c++) {
                next[j] = g[i];
                next[j].start += c ? g[i].size / 2 : 0;
                next[j].size = c ? g[i].size - g[i].size / 2 : g[i].size / 2;
                if (!next[j].size) continue;
                next[j].score = s[j] =
                    oracle_hip_child(q + g[i].list, q->b0 + next[j].start, next[j].size);
                for (l = 0; l < n_lists; l++) q[l].most = oracle_larger(q[l].most, q->most);
                j++;
            }
        oracle_hip_best(q, s, j, n_lists * k, keep);
        for (count = i = 0; i < j; i++) {
            if (!keep[i]) continue;
            more |= next[i].size > 1;
            g[count++] = next[i];
        }
    }
    for (i = 0; i < count; i++) {
        chosen[(int64_t)g[i].list * n + g[i].start] = 1;
        score[(int64_t)g[i].list * n + g[i].start] = g[i].score;
    }
    for (l = 1; l < n_lists; l++) q->tainted |= q[l].tainted;
    for (l = 1; l < n_lists; l++) q[l].tainted = q->tainted;
    free(g);
    free(next);
    free(s);
    free(keep);
}

// Width doubling. chosen, score: (n).
TEST_FN void oracle_hip_double(oracle_q_block *q, uint8_t *chosen, double *score) {
    const attn_hip *x = &q->v->f->hip;
    const int32_t k = x->keep / x->block, n = q->n;
    int32_t *cell = (int32_t *)oracle_alloc((size_t)n, 4),
            *next = (int32_t *)oracle_alloc((size_t)n, 4);
    double *was = oracle_doubles(n), *s = oracle_doubles(n);
    uint8_t *keep = (uint8_t *)oracle_alloc((size_t)n, 1);
    int32_t i, w = k, wide, cells = k, count, most;
    int64_t j;
    for (i = 0; i < k; i++) cell[i] = i, was[i] = -HUGE_VAL;
    for (; w < n; w = wide) {
        wide = oracle_least(2 * (int64_t)w, n);
        most = oracle_most(x->patches / x->block, (int64_t)k * wide / n);
        for (count = i = 0; i < cells; i++)
            for (j = 0; j < wide; j++) {
                if (j * w < (int64_t)cell[i] * wide || j * w >= ((int64_t)cell[i] + 1) * wide)
                    continue;
                next[count] = (int32_t)j;
                s[count++] = was[i];
            }
        memset(keep, 1, (size_t)count);
        if (count > most) {
            for (i = 0; i < count; i++)
                s[i] = oracle_hip_s(q, q->b0 + (int32_t)((int64_t)next[i] * n / wide), 0);
            oracle_hip_best(q, s, count, most, keep);
        }
        for (cells = i = 0; i < count; i++) {
            if (!keep[i]) continue;
            cell[cells] = next[i];
            was[cells++] = s[i];
        }
    }
    for (i = 0; i < cells; i++) {
        chosen[cell[i]] = 1;
        score[cell[i]] = was[i];
    }
    free(cell);
    free(next);
    free(was);
    free(s);
    free(keep);
}

// near, vertical, diagonal and random: more blocks of [b0, b0 + n).
TEST_FN void oracle_hip_extras(oracle_q_block *q, uint8_t *chosen, const double *score) {
    const attn_hip *x = &q->v->f->hip;
    const int32_t n = q->n, back = oracle_up(q->p_max - q->p_min, x->block);
    double *s = oracle_doubles(n);
    uint8_t *out = (uint8_t *)oracle_alloc((size_t)n, 2), *keep = out + n;
    int32_t *at = (int32_t *)oracle_alloc((size_t)n, 4), i, j, count = 0;
    memcpy(out, chosen, (size_t)n);
    for (i = 0; i < n; i++) {
        if (!chosen[i]) continue;
        at[count] = i;
        s[count++] = score[i];
    }
    oracle_hip_best(q, s, count, x->near, keep);
    for (i = 0; i < count; i++)
        for (j = 0; j < n && keep[i]; j++)
            if (j >= at[i] - x->near_window && j <= at[i] + x->near_window) out[j] = 1;
    for (i = 0; i < n && (x->vertical || x->diagonal); i++) s[i] = oracle_hip_s(q, q->b0 + i, 1);
    if (x->vertical) oracle_hip_best(q, s, n, x->vertical, keep);
    for (i = 0; i < n && x->vertical; i++) out[i] |= keep[i];
    if (x->diagonal) oracle_hip_best(q, s, n, x->diagonal, keep);
    for (i = 0; i < n && x->diagonal; i++)
        for (j = oracle_most(0, i - back); j <= i && keep[i]; j++) out[j] = 1;
    for (i = 0; i < x->random; i++) {
        uint64_t z =
            oracle_hash(x->seed, (uint64_t)i, (uint64_t)q->m + ((uint64_t)(q->list + 1) << 32));
        out[(z >> 32) * (uint64_t)n >> 32] = 1;
    }
    memcpy(chosen, out, (size_t)n);
    free(s);
    free(out);
    free(at);
}

// Generations 1 and 2, of n_lists lists that share a budget. listed: (n_lists, nb) kv_blocks.
TEST_FN void oracle_hip_first(oracle_q_block *q, int32_t n_lists, int32_t nb, uint8_t *listed) {
    const attn_select *f = q->v->f;
    const int32_t block = f->hip.block;
    int32_t later = oracle_most(0, f->hip.window - f->hip.refresh + 1), l, i, b0, n;
    int64_t last = oracle_least((int64_t)q->end - 1, (int64_t)q->p_max - later);
    uint8_t *chosen;
    double *score;
    b0 = oracle_most(f->hip.sink, q->v->k0) / block;
    n = last < 0 ? 0 : oracle_most(0, last / block + 1 - b0);
    chosen = (uint8_t *)oracle_alloc((size_t)(n_lists * n), 1);
    score = oracle_doubles(n_lists * n);
    for (l = 0; l < n_lists; l++) {
        q[l].b0 = b0;
        q[l].n = n;
        q[l].later = later;
        if (f->hip.low_dim > 0 && f->hip.low_dim < q->v->dim) oracle_hip_low(q + l);
    }
    if (n <= f->hip.keep / block)
        memset(chosen, 1, (size_t)(n_lists * n));
    else if (f->kind == ATTN_SELECT_HIP2)
        oracle_hip_split(q, n_lists, chosen, score);
    else
        oracle_hip_double(q, chosen, score);
    for (l = 0; l < n_lists; l++) {
        if (n > f->hip.keep / block) oracle_hip_extras(q + l, chosen + l * n, score + l * n);
        for (i = 0; i < n; i++)
            if (chosen[l * n + i])
                listed[l * nb + (int32_t)((int64_t)(b0 + i) * block / f->kv_block)] = 1;
        free(q[l].dims);
    }
    free(chosen);
    free(score);
}

// ---- HiP, generation 3

typedef struct oracle_chunks { // of one stage, ascending
    int32_t n;
    int32_t *j;    // chunk j is [sink + j c, sink + j c + c)
    int32_t *rep;  // its representative
    double *score; // of chunks to be scanned: the least it may be
} oracle_chunks;

TEST_FN oracle_chunks oracle_chunks_new(int32_t n) {
    oracle_chunks c;
    c.n = 0;
    c.j = (int32_t *)oracle_alloc((size_t)n, 4);
    c.rep = (int32_t *)oracle_alloc((size_t)n, 4);
    c.score = oracle_doubles(n);
    return c;
}

TEST_FN void oracle_chunks_free(oracle_chunks *c) {
    free(c->j);
    free(c->rep);
    free(c->score);
    memset(c, 0, sizeof *c);
}

// The rows of query head h in a stage: the mean of each run of q_stride positions. (*n, dim)
TEST_FN double *oracle_hip_runs(const oracle_q_block *q, int32_t h, int32_t stride, int32_t *n) {
    const oracle_view *v = q->v + h;
    const int32_t runs = oracle_up(q->size, stride);
    double *rows = oracle_doubles((int64_t)runs * v->dim);
    int32_t r, e, count;
    for (*n = r = 0; r < runs; r++) {
        int64_t lo = (int64_t)q->m * q->size + (int64_t)r * stride;
        int64_t hi = oracle_least(lo + stride, (int64_t)(q->m + 1) * q->size);
        double *row = rows + (int64_t)*n * v->dim;
        int32_t p, from = oracle_most(lo, q->p_min), to = oracle_least(hi, (int64_t)q->p_max + 1);
        count = to - from;
        if (count < 1) continue;
        for (e = 0; e < v->dim; e++) {
            for (row[e] = 0, p = from; p < to; p++)
                row[e] += v->q[(int64_t)(p - v->p0) * v->dim + e];
            row[e] /= count;
        }
        ++*n;
    }
    return rows;
}

// S(t) at position k: heads [h0, h1) of the list, their rows x[h] (n_rows, dim).
TEST_FN double oracle_hip_at(oracle_q_block *q, int32_t h0, int32_t h1, double **x, int32_t n_rows,
                             int64_t k) {
    double best = -HUGE_VAL;
    int32_t h, i;
    for (h = h0; h < h1; h++)
        for (i = 0; i < n_rows; i++)
            best = oracle_larger(best, oracle_hip_score(q, h, x[h] + (int64_t)i * q->v->dim, k));
    return best;
}

TEST_FN double oracle_hip_landmark(const oracle_q_block *q, int32_t kv_head, int64_t k) {
    const attn_kv *kv = &q->v->d->kv;
    int64_t j = k - q->v->k0, page = q->v->s;
    double x;
    if (kv->page_table)
        page = kv->page_table[q->v->s * kv->page_table_stride + j / kv->page_tokens];
    x = (double)q->v->f->hip.landmark[(page * q->v->d->n_kv_heads + kv_head) * kv->page_tokens +
                                      j % kv->page_tokens];
    return x != x ? -HUGE_VAL : x;
}

// Score and representative of chunk [l, l + c) for the heads [h0, h1) of one KV head.
TEST_FN double oracle_hip_chunk(oracle_q_block *q, const attn_hip_stage *t, int32_t h0, int32_t h1,
                                double **x, int32_t n_rows, int64_t l, int32_t *rep) {
    int32_t lo = 0, hi = t->chunk, mid;
    double best = -HUGE_VAL, a, b, last = 0;
    int64_t k;
    if (t->flags & ATTN_HIP_LANDMARK) {
        const int32_t kv_head = q->v[h0].head / q->v->group;
        for (*rep = -1, k = l; k < l + t->chunk; k++) {
            if (k < q->v->k0 || k >= q->end) continue;
            a = oracle_hip_landmark(q, kv_head, k);
            if (*rep < 0 || a > best) *rep = (int32_t)k, best = a;
        }
        return oracle_hip_at(q, h0, h1, x, n_rows, *rep);
    }
    do {
        mid = (lo + hi) / 2;
        a = oracle_hip_at(q, h0, h1, x, n_rows, l + (lo + mid) / 2);
        b = oracle_hip_at(q, h0, h1, x, n_rows, l + (mid + hi) / 2);
        if (oracle_hip_close(q, a, b)) q->tainted = 1;
        best = oracle_larger(best, oracle_larger(a, b));
        last = a > b ? a : b;
        *rep = (int32_t)(l + (a > b ? (lo + mid) / 2 : (mid + hi) / 2));
        if (a > b)
            hi = mid;
        else
            lo = mid;
    } while (hi - lo >= oracle_most(2, t->terminate));
    return t->flags & ATTN_HIP_LAST_SCORE ? last : best;
}

// Scores the candidates c of a stage.
TEST_FN void oracle_hip_scan(oracle_q_block *q, const attn_hip_stage *t, oracle_chunks *c) {
    const int32_t sink = q->v->f->hip.sink, per = q->v->group;
    double *x[64];
    int32_t h, h1, i, rows = 0, rep;
    for (h = 0; h < q->n_views; h++) x[h] = oracle_hip_runs(q, h, t->q_stride, &rows);
    for (i = 0; i < c->n; i++) {
        double best = 0, least = c->score[i];
        for (h = 0; h < q->n_views; h = h1) {
            double s;
            for (h1 = h + 1; h1 < q->n_views && q->v[h1].head / per == q->v[h].head / per; h1++) {
            }
            s = oracle_hip_chunk(q, t, h, h1, x, rows, sink + (int64_t)c->j[i] * t->chunk, &rep);
            if (h && oracle_hip_close(q, s, best)) q->tainted = 1; // the representative's head
            if (h && s <= best) continue;
            best = s;
            c->rep[i] = rep;
        }
        c->score[i] = best;
        if (t->flags & ATTN_HIP_KEEP_SCORES) c->score[i] = oracle_larger(best, least);
    }
    for (h = 0; h < q->n_views; h++) free(x[h]);
}

TEST_FN int oracle_hip_eligible(const oracle_q_block *q, int64_t l, int32_t c) {
    const attn_hip *x = &q->v->f->hip;
    int64_t last = (int64_t)q->p_min + x->stage[0].chunk;
    if (last < q->p_max) last = q->p_max;
    last -= x->window;
    if (last > q->end - 1) last = q->end - 1;
    return l + c > q->v->k0 && l <= last;
}

// What stage i admits from the scanned candidates c of the one before: chunks of its own, each
// once, whether eligible or not.
TEST_FN oracle_chunks oracle_hip_admit(oracle_q_block *q, int32_t i, const oracle_chunks *c) {
    const attn_hip_stage *t = q->v->f->hip.stage + i, *old = t - 1;
    const int32_t parts = old->chunk / t->chunk, want = t->keep / old->chunk;
    uint8_t *keep = (uint8_t *)oracle_alloc((size_t)c->n, 1);
    oracle_chunks out = oracle_chunks_new(oracle_least(c->n, want) * parts);
    int32_t a, b, o, at;
    oracle_hip_best(q, c->score, c->n, want, keep);
    for (a = 0; a < c->n; a++)
        for (b = 0; b < parts && keep[a]; b++) {
            int32_t first = c->j[a] * parts;
            if (t->flags & ATTN_HIP_CENTRE)
                first = oracle_most(0, c->rep[a] - q->v->f->hip.sink - old->chunk / 2) / t->chunk;
            for (o = 0; o < out.n && out.j[o] != first + b; o++) {
            }
            if (o < out.n) continue;
            out.score[out.n] = c->score[a];
            out.j[out.n++] = first + b;
        }
    for (a = 1; a < out.n; a++) // ascending
        for (at = a; at > 0 && out.j[at - 1] > out.j[at]; at--) {
            double s = out.score[at];
            o = out.j[at];
            out.j[at] = out.j[at - 1];
            out.score[at] = out.score[at - 1];
            out.j[at - 1] = o;
            out.score[at - 1] = s;
        }
    free(keep);
    return out;
}

// What a row in a slot remembers.
typedef struct oracle_slot {
    int32_t next;    // the position it stays good for, -1: none
    int tainted, n;  // n: kv_blocks of its list
    uint8_t *listed; // (n)
    oracle_chunks admitted[ATTN_HIP_STAGES];
} oracle_slot;

// Stage i and those before it, down to the cached: its candidates for q, scored.
TEST_FN oracle_chunks oracle_hip_stage(oracle_q_block *q, int32_t i, int32_t first,
                                       oracle_slot *slot) {
    const attn_hip_stage *t = q->v->f->hip.stage + i;
    const int32_t sink = q->v->f->hip.sink;
    oracle_chunks in, c;
    int32_t a;
    if (i == 0) {
        c = oracle_chunks_new(q->end / t->chunk + 1);
        for (a = 0; sink + (int64_t)a * t->chunk < q->end; a++)
            if (oracle_hip_eligible(q, sink + (int64_t)a * t->chunk, t->chunk)) c.j[c.n++] = a;
        oracle_hip_scan(q, t, &c);
        return c;
    }
    if (slot && i == first) {
        in = slot->admitted[i];
    } else {
        oracle_q_block before;
        int32_t size = q->v->f->hip.stage[i - 1].q_block;
        oracle_hip_open(&before, q->v, q->n_views, q->list, q->p_min / size, size);
        c = oracle_hip_stage(&before, i - 1, first, slot);
        in = oracle_hip_admit(&before, i, &c);
        oracle_chunks_free(&c);
        q->tainted |= before.tainted;
        if (slot) {
            oracle_chunks_free(&slot->admitted[i]);
            slot->admitted[i] = in;
        }
    }
    c = oracle_chunks_new(in.n);
    for (a = 0; a < in.n; a++) {
        if (!oracle_hip_eligible(q, sink + (int64_t)in.j[a] * t->chunk, t->chunk)) continue;
        c.score[c.n] = in.score[a];
        c.j[c.n++] = in.j[a];
    }
    if (!slot) oracle_chunks_free(&in);
    oracle_hip_scan(q, t, &c);
    return c;
}

TEST_FN void oracle_hip_third(oracle_q_block *q, int32_t first, oracle_slot *slot,
                              uint8_t *listed) {
    const attn_hip *x = &q->v->f->hip;
    const attn_hip_stage *t = x->stage + x->n_stages - 1;
    oracle_chunks c = oracle_hip_stage(q, x->n_stages - 1, first, slot);
    uint8_t *keep = (uint8_t *)oracle_alloc((size_t)c.n, 1);
    int32_t i;
    oracle_hip_best(q, c.score, c.n, x->keep / t->chunk, keep);
    for (i = 0; i < c.n; i++)
        if (keep[i]) listed[x->sink / t->chunk + c.j[i]] = 1;
    free(keep);
    oracle_chunks_free(&c);
}

// ---- metrics

// Softmax mass of query i on the keys it sees in the listed blocks, at least `sink` first positions
// and the `recent` last ones.
TEST_FN double recall_of(const oracle_view *v, int32_t i, const uint8_t *keep, int32_t sink,
                         int32_t recent) {
    const double *s = v->score + (int64_t)i * v->kv_len;
    double most = -HUGE_VAL, in = 0, all = 0;
    int32_t j, p = v->p0 + i;
    for (j = 0; j < v->kv_len; j++) most = oracle_larger(most, s[j]);
    for (j = 0; j < v->kv_len && v->k0 + j <= p; j++) {
        int32_t k = v->k0 + j;
        all += exp(s[j] - most);
        if (keep[k / v->f->kv_block] || k < sink || p - k < recent) in += exp(s[j] - most);
    }
    return in / all;
}

// ---- all of them

TEST_FN void oracle_defaults(const attn_select *s, attn_select *f) {
    const int three = s->kind == ATTN_SELECT_HIP3, flex = s->kind == ATTN_SELECT_FLEX;
    const int exact = s->kind == ATTN_SELECT_EXACT;
    static const attn_hip_stage usual[3] = {{64, 4, 256, 0, 32, 0, 0, ATTN_ROPE_NONE},
                                            {64, 4, 32, 32768, 16, 0, 0, ATTN_ROPE_NONE},
                                            {64, 1, 8, 8192, 8, 0, 0, ATTN_ROPE_NONE}};
    int32_t i;
    *f = *s;
    if (!f->heads)
        f->heads = exact ? ATTN_SELECT_GROUP : three ? ATTN_SELECT_ALL : ATTN_SELECT_EACH;
    if (!f->kv_block) f->kv_block = flex ? 128 : exact ? 64 : three ? 8 : 2;
    if (!f->row_block) f->row_block = flex ? f->kv_block : 64;
    if (!(f->flex.gamma > 0)) f->flex.gamma = 0.95f;
    if (!f->flex.min_budget) f->flex.min_budget = f->kv_block;
    if (!f->flex.max_budget) f->flex.max_budget = INT32_MAX;
    if (!f->exact.recent) f->exact.recent = f->kv_block;
    if (!f->hip.keep) f->hip.keep = three ? 2048 : 512;
    f->hip.sink = s->hip.sink < 0 ? 0 : s->hip.sink ? s->hip.sink : three ? 256 : 16;
    f->hip.window = s->hip.window < 0 ? 0 : s->hip.window ? s->hip.window : three ? 1024 : 256;
    if (!f->hip.block) f->hip.block = f->kv_block;
    if (!f->hip.q_group) f->hip.q_group = 1;
    if (!f->hip.head_group) f->hip.head_group = 1;
    if (!f->hip.patches) f->hip.patches = f->hip.keep / 2;
    if (f->hip.patches < f->hip.block) f->hip.patches = f->hip.block;
    if (!f->hip.q_stride) f->hip.q_stride = 2;
    if (!f->hip.k_stride) f->hip.k_stride = 1;
    if (!f->hip.refresh) f->hip.refresh = 1;
    if (three && !f->hip.n_stages) {
        f->hip.n_stages = 3;
        memcpy(f->hip.stage, usual, sizeof usual);
    }
    for (i = 0; i < ATTN_HIP_STAGES; i++) {
        if (!f->hip.stage[i].q_stride) f->hip.stage[i].q_stride = 1;
        if (!f->hip.stage[i].refresh) f->hip.stage[i].refresh = 1;
    }
}

// The last position that row r of sequence s is for.
TEST_FN int32_t oracle_row_end(const oracle *o, const oracle_view *v, int32_t s, int32_t r) {
    int64_t last = ((int64_t)o->row0[s] + r + 1) * o->f.row_block;
    return oracle_least(oracle_least(last, (int64_t)v->p0 + v->q_len), v->end) - 1;
}

// A list of any method but HiP: the heads v[0 ... n_views - 1].
TEST_FN void oracle_list(oracle *o, int32_t s, int32_t l, oracle_view *v, int32_t n_views) {
    const int32_t nb = o->n_blocks[s], rows = o->n_rows[s], r0 = o->row0[s];
    const int64_t size = (int64_t)rows * nb;
    uint8_t *keep = o->keep[s] + l * size, *near = o->near[s] + l * size;
    uint8_t *one = (uint8_t *)oracle_alloc((size_t)size, 2);
    int64_t i;
    int32_t r, h;
    for (r = 0; r < rows && o->f.kind == ATTN_SELECT_EXACT; r++)
        oracle_exact(v, n_views, nb, r0 + r, keep + r * nb, near + r * nb);
    for (h = 0; h < n_views && o->f.kind == ATTN_SELECT_FLEX; h++) { // the union of the heads' own
        memset(one, 0, 2 * (size_t)size);
        oracle_flex(v + h, nb, r0, rows, one, one + size);
        for (i = 0; i < size; i++) {
            int sure = (keep[i] && !near[i]) || (one[i] && !one[size + i]);
            keep[i] |= one[i];
            near[i] = !sure && (near[i] || one[size + i]);
        }
    }
    free(one);
}

// Puts what a q block listed into its rows.
TEST_FN void oracle_hip_rows(oracle *o, int32_t s, const oracle_q_block *q, const uint8_t *listed) {
    const int32_t nb = o->n_blocks[s], rb = o->f.row_block;
    int32_t r, j;
    for (r = q->p_min / rb - o->row0[s]; r <= q->p_max / rb - o->row0[s]; r++)
        for (j = 0; j < nb; j++) {
            int64_t at = ((int64_t)q->list * o->n_rows[s] + r) * nb + j;
            if (j <= oracle_row_end(o, q->v, s, r) / o->f.kv_block) o->keep[s][at] = listed[j];
            o->near[s][at] = q->tainted != 0;
        }
}

// n_lists HiP lists that share a budget, of one q block. slot: (n_lists), or NULL.
TEST_FN void oracle_hip_block(oracle *o, int32_t s, oracle_q_block *q, int32_t n_lists,
                              oracle_slot *slot) {
    const attn_hip *x = &o->f.hip;
    const int32_t nb = o->n_blocks[s], three = o->f.kind == ATTN_SELECT_HIP3;
    uint8_t *listed = (uint8_t *)oracle_alloc((size_t)(n_lists * nb), 1);
    int32_t l, first = 0, n = three ? x->n_stages : 1;
    if (slot && slot->next == q->p_min)
        while (first < n && q->p_min % (three ? x->stage[first].refresh : x->refresh)) first++;
    if (first == n) {
        for (l = 0; l < n_lists; l++) memcpy(listed + l * nb, slot[l].listed, (size_t)slot[l].n);
    } else if (three) {
        oracle_hip_third(q, first, slot, listed);
    } else {
        oracle_hip_first(q, n_lists, nb, listed);
    }
    for (l = 0; l < n_lists; l++) {
        if (slot && first > 0) q[l].tainted |= slot[l].tainted;
        oracle_hip_rows(o, s, q + l, listed + l * nb);
        if (!slot) continue;
        free(slot[l].listed);
        slot[l].listed = (uint8_t *)oracle_alloc((size_t)nb, 1);
        memcpy(slot[l].listed, listed + l * nb, (size_t)nb);
        slot[l].n = nb;
        slot[l].next = q->p_min + 1;
        slot[l].tainted = q[l].tainted;
    }
    free(listed);
}

// Lists [l, l + n_lists), the heads v[i * per ...] of each.
TEST_FN void oracle_hip(oracle *o, int32_t s, int32_t l, int32_t n_lists, oracle_view *v,
                        int32_t per, oracle_slot *slot) {
    const int32_t size = o->f.kind == ATTN_SELECT_HIP3
                             ? o->f.hip.stage[o->f.hip.n_stages - 1].q_block
                             : o->f.row_block * o->f.hip.q_group;
    oracle_q_block q[64];
    int32_t m, i;
    for (m = v->p0 / size; m <= (v->p0 + v->q_len - 1) / size; m++) {
        for (i = 0; i < n_lists; i++) oracle_hip_open(q + i, v + i * per, per, l + i, m, size);
        oracle_hip_block(o, s, q, n_lists, slot);
    }
}

TEST_FN void oracle_sizes(oracle *o, int32_t s) {
    const attn_desc *d = o->d;
    int32_t end = (d->kv.kv_pos0 ? d->kv.kv_pos0[s] : 0) + d->kv.kv_len[s];
    int32_t q_len = d->q_start[s + 1] - d->q_start[s], p0 = d->q_pos0 ? d->q_pos0[s] : end - q_len;
    size_t size;
    o->row0[s] = p0 / o->f.row_block;
    o->n_rows[s] = q_len ? (p0 + q_len - 1) / o->f.row_block - o->row0[s] + 1 : 0;
    o->n_blocks[s] = oracle_up(end, o->f.kv_block);
    size = (size_t)o->n_lists * (size_t)o->n_rows[s] * (size_t)o->n_blocks[s];
    o->keep[s] = (uint8_t *)oracle_alloc(size, 1);
    o->near[s] = (uint8_t *)oracle_alloc(size, 1);
}

TEST_FN void oracle_dense(oracle *o, int32_t s, int32_t l, const oracle_view *v) {
    int32_t r, j;
    for (r = 0; r < o->n_rows[s]; r++)
        for (j = v->k0 / o->f.kv_block; j <= oracle_row_end(o, v, s, r) / o->f.kv_block; j++)
            o->keep[s][((int64_t)l * o->n_rows[s] + r) * o->n_blocks[s] + j] = 1;
}

// What s selects for d. slot: as attn_selection_follow's; memory: (n_slots, n_lists) for steps, or
// NULL. To be freed by oracle_free.
TEST_FN oracle *oracle_select(const attn_desc *d, const attn_select *sel, const int32_t *slot,
                              oracle_slot *memory) {
    oracle *o = (oracle *)oracle_alloc(1, sizeof *o);
    int32_t s, l, h, per, share, i;
    o->d = d;
    o->n_seq = d->n_seq;
    oracle_defaults(sel, &o->f);
    o->n_lists = o->f.heads == ATTN_SELECT_ALL     ? 1
                 : o->f.heads == ATTN_SELECT_GROUP ? d->n_kv_heads
                                                   : d->n_heads;
    per = d->n_heads / o->n_lists;
    share = o->f.kind == ATTN_SELECT_HIP2 ? o->f.hip.head_group : 1;
    o->row0 = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    o->n_rows = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    o->n_blocks = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    o->keep = (uint8_t **)oracle_alloc((size_t)d->n_seq, sizeof(uint8_t *));
    o->near = (uint8_t **)oracle_alloc((size_t)d->n_seq, sizeof(uint8_t *));
    for (s = 0; s < d->n_seq; s++) {
        oracle_sizes(o, s);
        for (l = 0; l < o->n_lists && o->n_rows[s]; l += share) {
            oracle_view v[64];
            oracle_slot *own = NULL;
            if (memory && o->f.n_slots && d->q_start[s + 1] - d->q_start[s] == 1)
                own = memory + (slot ? slot[s] : s) * o->n_lists + l;
            for (h = 0; h < per * share; h++) v[h] = oracle_open(d, &o->f, s, l * per + h);
            if (v->kv_len <= o->f.dense_below) {
                for (i = 0; i < share; i++) {
                    oracle_dense(o, s, l + i, v);
                    if (own) own[i].next = -1;
                }
            } else if (o->f.kind == ATTN_SELECT_FLEX || o->f.kind == ATTN_SELECT_EXACT) {
                oracle_list(o, s, l, v, per);
            } else {
                oracle_hip(o, s, l, share, v, per, own);
            }
            for (h = 0; h < per * share; h++) oracle_done(v + h);
        }
    }
    return o;
}

TEST_FN oracle_slot *oracle_slots_new(int32_t n) {
    oracle_slot *m = (oracle_slot *)oracle_alloc((size_t)n, sizeof *m);
    while (n-- > 0) m[n].next = -1;
    return m;
}

TEST_FN void oracle_slots_free(oracle_slot *m, int32_t n) {
    int32_t i, k;
    for (i = 0; i < n; i++) {
        free(m[i].listed);
        for (k = 0; k < ATTN_HIP_STAGES; k++) oracle_chunks_free(&m[i].admitted[k]);
    }
    free(m);
}

TEST_FN void oracle_free(oracle *o) {
    int32_t s;
    for (s = 0; s < o->n_seq; s++) {
        free(o->keep[s]);
        free(o->near[s]);
    }
    free(o->keep);
    free(o->near);
    free(o->row0);
    free(o->n_rows);
    free(o->n_blocks);
    free(o);
}

#endif // SELECT_ORACLE_H

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

typedef struct oracle {
    const attn_desc *d;
    attn_select f;           // every default filled in
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
    double size;             // the largest |score|
} oracle_view;

TEST_FN void *oracle_alloc(size_t n, size_t size) {
    void *p = calloc(n + 1, size);
    if (!p) abort();
    return p;
}

TEST_FN double *oracle_doubles(int64_t n) {
    return (double *)oracle_alloc((size_t)n, sizeof(double));
}

TEST_FN int32_t oracle_up(int64_t n, int32_t b) { return (int32_t)((n + b - 1) / b); }
TEST_FN int32_t oracle_least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }
TEST_FN int32_t oracle_most(int64_t a, int64_t b) { return (int32_t)(a > b ? a : b); }
TEST_FN double oracle_larger(double a, double b) { return a > b ? a : b; }

// Whether a and b, of values as large as size, may change places.
TEST_FN int oracle_close(double a, double b, double size) {
    if (a == b) return 1;
    return fabs(a - b) <= ORACLE_NEAR * fabs(size);
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
        else if (attn_dtype_scaled(kv->k.dtype)) scale = kv->k.head_scale[h];
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
    v.q = oracle_doubles((int64_t)v.q_len * v.dim);
    v.k = oracle_doubles((int64_t)v.kv_len * v.dim);
    for (t = 0; t < v.q_len; t++)
        for (e = 0; e < v.dim; e++)
            v.q[(int64_t)t * v.dim + e] = oracle_element(
                q->dtype,
                (const uint8_t *)q->data + ((d->q_start[s] + t) * st + head * sh) * size, e);
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

// Of block b of positions: the first row of x that lies in it, and how many do. x starts at `first`.
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
        if (nan_on_zero && (e[i] == 0 || p[i] == 0)) return NAN;
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
        double gamma = (double)x->gamma * (1 + (i - 1) * ORACLE_NEAR);
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
    tau2 = (double)v->f->flex.tau * (double)v->f->flex.tau;
    oracle_flex_counts(v, col, nb, c);
    oracle_flex_counts(v, diag, nb, g);
    if (tau2 > 0 && d2 < tau2) {
        int32_t least = oracle_least(oracle_up(v->f->flex.min_budget, b), nb);
        least = oracle_least(least, oracle_up(v->f->flex.max_budget, b));
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
    if (tau2 > 0 && oracle_close(d2, tau2, tau2)) memset(near, 1, (size_t)nb * (size_t)nb);
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
        double part = (double)x->gamma * sum * (1 + (i - 1) * ORACLE_NEAR);
        c[i] = oracle_most(oracle_cover(mass, n, part, 1), least);
        c[i] = oracle_least(c[i], oracle_least(oracle_up(x->max_budget, v->f->kv_block), n));
    }
    oracle_top(mass, n, c[0], c[1], c[2], 0, keep, near);
}

// Rows r0 ... r1 of query-aware heads: the fewest blocks that hold gamma' of e_r. gamma' of the
// three: at gamma and -+ ORACLE_NEAR. mass: (rows, nb).
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
        double gamma = (double)x->gamma * (1 + (i - 1) * ORACLE_NEAR);
        g[i] = gamma;
        for (r = 0; r < rows; r++) {
            const double *m = mass + (int64_t)r * nb, *own = e + (int64_t)r * nb;
            int32_t *order = oracle_order(own, r0 + r + 1);
            double all = 0, sum = 0, prefix = 0;
            for (c = 0; c < nb; c++) all += m[c];
            for (c = 0; c <= r0 + r && sum < gamma * all; c++) {
                sum += m[order[c]];
                prefix += own[order[c]];
            }
            g[i] = oracle_larger(g[i], prefix);
            free(order);
        }
    }
    for (r = 0; r < rows; r++) {
        for (i = 0; i < 3; i++) {
            double part = oracle_larger(g[i], 0) * (i == 1 ? 1 - 1e-14 : 1 + (i - 1) * ORACLE_NEAR);
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
            double *m = mass + (int64_t)r * nb + j;
            all[j] += *m;
            if (j == 0 || j == r0 + r) *m = 0;
            col[j] += *m;
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
            if (tau2 > 0 && fabs(d2 - tau2) <= ORACLE_NEAR * tau2 + 1e-9) near[at] = 1;
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
    const int32_t b = v->f->kv_block;
    int32_t r, dense = oracle_most(2 * (int64_t)b, (int64_t)oracle_up(v->f->flex.min_budget, b) * b);
    if (v->q_len > dense && v->f->flex.compatible) oracle_flex_compatible(v, nb, keep, near);
    else if (v->q_len > dense) oracle_flex_corrected(v, nb, r0, rows, keep, near);
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

// The largest share of mass that one of the n rows of m misses without the blocks of keep.
TEST_FN double oracle_missed(const double *m, int32_t n, const uint8_t *keep, int32_t nb) {
    double worst = 0;
    int32_t i;
    for (i = 0; i < n; i++) {
        double in = oracle_log_sum(m + (int64_t)i * nb, keep, 1, nb);
        double out = oracle_log_sum(m + (int64_t)i * nb, keep, 0, nb);
        if (out > -HUGE_VAL) worst = oracle_larger(worst, 1 / (1 + exp(in - out)));
    }
    return worst;
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
    const int32_t own = oracle_most(0, (int64_t)r * rb - x->recent) / b, visible = last / b - first + 1;
    int32_t n, i, j, c[3], more, others = 0, budget = oracle_up(x->keep, b), *order;
    double *m = oracle_logs(v, n_views, nb, r, &n), *value = oracle_doubles(nb), size = 1;
    uint8_t *always = (uint8_t *)oracle_alloc((size_t)nb, 2), *with = always + nb;
    for (i = 0; i < n_views; i++) size = oracle_larger(size, v[i].size);
    budget = oracle_most(budget, (int64_t)ceil(((double)x->share - 1e-6) * visible));
    if (!x->keep && !(x->share > 0)) budget = visible;
    for (j = 0; j < nb; j++) always[j] = j <= last / b && (j == first || (j >= own && j >= first));
    for (j = 0; j < nb; j++) value[j] = -HUGE_VAL;
    for (i = 0; i < n; i++)
        for (j = first; j <= last / b; j++)
            if (!always[j])
                value[j] = oracle_larger(value[j], m[(int64_t)i * nb + j] -
                                                   oracle_log_sum(m + (int64_t)i * nb, always, 1, nb));
    for (j = 0; j < nb; j++) others += j >= first && j <= last / b && !always[j];
    more = oracle_most(0, oracle_least(others, (int64_t)budget - (visible - others)));
    order = oracle_order(value, nb);
    for (i = 0; i < 3; i++) {
        double most = (double)x->epsilon * (1 + (1 - i) * ORACLE_NEAR * size);
        c[i] = more;
        if (!(x->epsilon > 0)) continue;
        memcpy(with, always, (size_t)nb);
        for (c[i] = 0; c[i] < more && oracle_missed(m, n, with, nb) > most; c[i]++)
            with[order[c[i]]] = 1;
    }
    oracle_top(value, nb, c[0], c[1], c[2], size, keep, near);
    for (j = 0; j < nb; j++) {
        if (always[j] || value[j] == -HUGE_VAL) near[j] = 0;
        keep[j] = always[j] || (keep[j] && value[j] > -HUGE_VAL);
    }
    free(order);
    free(m);
    free(value);
    free(always);
}

// ---- all of them

TEST_FN void oracle_defaults(const attn_select *s, attn_select *f) {
    const int three = s->kind == ATTN_SELECT_HIP3, flex = s->kind == ATTN_SELECT_FLEX;
    const int exact = s->kind == ATTN_SELECT_EXACT;
    static const attn_hip_stage usual[3] = {
        {64, 4, 256, 0, 32}, {64, 4, 32, 32768, 16}, {64, 1, 8, 8192, 8}};
    int32_t i;
    *f = *s;
    if (!f->heads) f->heads = exact ? ATTN_SELECT_GROUP : three ? ATTN_SELECT_ALL : ATTN_SELECT_EACH;
    if (!f->kv_block) f->kv_block = flex ? 128 : exact ? 64 : three ? 8 : 2;
    if (!f->row_block) f->row_block = flex ? f->kv_block : 64;
    if (!(f->flex.gamma > 0)) f->flex.gamma = 0.95f;
    if (!f->flex.min_budget) f->flex.min_budget = f->kv_block;
    if (!f->flex.max_budget) f->flex.max_budget = INT32_MAX;
    if (!f->exact.recent) f->exact.recent = f->kv_block;
    if (!f->hip.keep) f->hip.keep = three ? 2048 : 512;
    if (!f->hip.sink) f->hip.sink = three ? 256 : 16;
    if (!f->hip.window) f->hip.window = three ? 1024 : 256;
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

// List l of sequence s: the heads v[0 ... n_views - 1].
TEST_FN void oracle_list(oracle *o, int32_t s, int32_t l, oracle_view *v, int32_t n_views) {
    const int32_t nb = o->n_blocks[s], rows = o->n_rows[s], r0 = o->row0[s];
    const int64_t size = (int64_t)rows * nb;
    uint8_t *keep = o->keep[s] + l * size, *near = o->near[s] + l * size;
    uint8_t *one = (uint8_t *)oracle_alloc((size_t)size, 2);
    int64_t i;
    int32_t r, h;
    for (r = 0; r < rows; r++) {
        int32_t p = oracle_least((int64_t)(r0 + r + 1) * o->f.row_block, v->p0 + v->q_len) - 1;
        if (v->kv_len <= o->f.dense_below) memset(keep + r * nb, 1, (size_t)(p / o->f.kv_block + 1));
        else if (o->f.kind == ATTN_SELECT_EXACT)
            oracle_exact(v, n_views, nb, r0 + r, keep + r * nb, near + r * nb);
    }
    for (h = 0; h < n_views && o->f.kind == ATTN_SELECT_FLEX; h++) { // the union of the heads' own
        if (v->kv_len <= o->f.dense_below) continue;
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

// What s selects for d. To be freed by oracle_free.
TEST_FN oracle *oracle_select(const attn_desc *d, const attn_select *sel) {
    oracle *o = (oracle *)oracle_alloc(1, sizeof *o);
    int32_t s, l, h, per;
    o->d = d;
    o->n_seq = d->n_seq;
    oracle_defaults(sel, &o->f);
    o->n_lists = o->f.heads == ATTN_SELECT_ALL     ? 1
                 : o->f.heads == ATTN_SELECT_GROUP ? d->n_kv_heads
                                                   : d->n_heads;
    per = d->n_heads / o->n_lists;
    o->row0 = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    o->n_rows = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    o->n_blocks = (int32_t *)oracle_alloc((size_t)d->n_seq, 4);
    o->keep = (uint8_t **)oracle_alloc((size_t)d->n_seq, sizeof(uint8_t *));
    o->near = (uint8_t **)oracle_alloc((size_t)d->n_seq, sizeof(uint8_t *));
    for (s = 0; s < d->n_seq; s++) {
        oracle_view v[64];
        size_t size;
        if (d->q_start[s + 1] == d->q_start[s]) continue;
        for (l = 0; l < o->n_lists; l++) {
            for (h = 0; h < per; h++) v[h] = oracle_open(d, &o->f, s, l * per + h);
            if (!l) {
                o->row0[s] = v->p0 / o->f.row_block;
                o->n_rows[s] = (v->p0 + v->q_len - 1) / o->f.row_block - o->row0[s] + 1;
                o->n_blocks[s] = oracle_up(v->end, o->f.kv_block);
                size = (size_t)o->n_lists * (size_t)o->n_rows[s] * (size_t)o->n_blocks[s];
                o->keep[s] = (uint8_t *)oracle_alloc(size, 1);
                o->near[s] = (uint8_t *)oracle_alloc(size, 1);
            }
            oracle_list(o, s, l, v, per);
            for (h = 0; h < per; h++) oracle_done(v + h);
        }
    }
    return o;
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

/* test.h - checks, seeded random numbers and error statistics for the tests. Include it once per
   program. CHECK counts, prints where it failed and goes on; main ends with `return TEST_END();`,
   which prints "N passed, N failed" and is 0 only when nothing failed. */
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define TEST_FN static __attribute__((unused))
#define TEST_COUNT(n) __atomic_add_fetch(&(n), 1, __ATOMIC_RELAXED) // checks on several threads
#else
#define TEST_FN static
#define TEST_COUNT(n) (++(n))
#endif

// ---- checks

static long long test_passed, test_failed;

TEST_FN int test_check(int ok, const char *file, int line, const char *what) {
    if (ok) {
        TEST_COUNT(test_passed);
    } else if (TEST_COUNT(test_failed) <= 20) { // the first ones say enough
        printf("%s:%d: failed: %s\n", file, line, what);
    }
#ifdef TEST_FIRST // for who asks only whether anything fails
    if (!ok) exit(1);
#endif
    return ok;
}

TEST_FN int test_check_eq(long long a, long long b, const char *file, int line, const char *what) {
    if (!test_check(a == b, file, line, what) && test_failed <= 20)
        printf("    %lld against %lld\n", a, b);
    return a == b;
}

// Both give 1 when the check held, so that a test can leave early.
#define CHECK(cond) test_check((cond) ? 1 : 0, __FILE__, __LINE__, #cond)
#define CHECK_EQ(a, b)                                                                             \
    test_check_eq((long long)(a), (long long)(b), __FILE__, __LINE__, #a " == " #b)
#define TEST_END()                                                                                 \
    (printf("%lld passed, %lld failed\n", test_passed, test_failed), test_failed ? 1 : 0)

// ---- random numbers: splitmix64, one 64-bit state, any seed

typedef struct test_rng {
    uint64_t state;
} test_rng;

TEST_FN uint64_t test_u64(test_rng *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Uniform in [0, n), n >= 1.
TEST_FN int32_t test_below(test_rng *r, int32_t n) {
    return (int32_t)(((test_u64(r) >> 32) * (uint64_t)(uint32_t)n) >> 32);
}

// Uniform in [lo, hi).
TEST_FN double test_uniform(test_rng *r, double lo, double hi) {
    return lo + (hi - lo) * ((double)(test_u64(r) >> 11) * (1.0 / 9007199254740992.0));
}

// Mean 0, standard deviation 1 (Box-Muller).
TEST_FN double test_normal(test_rng *r) {
    double u = test_uniform(r, 0, 1), v = test_uniform(r, 0, 1);
    return sqrt(-2 * log(1 - u)) * cos(6.283185307179586 * v);
}

TEST_FN void test_fill_uniform(test_rng *r, float *x, size_t n, double lo, double hi) {
    while (n-- > 0) *x++ = (float)test_uniform(r, lo, hi);
}

TEST_FN void test_fill_normal(test_rng *r, float *x, size_t n, double deviation) {
    while (n-- > 0) *x++ = (float)(deviation * test_normal(r));
}

// ---- error statistics of results against a reference

// NaN against NaN and equal infinities agree; any other meeting of them counts in n_bad.
typedef struct test_error {
    double sum2, max, ref2; // of (x - ref)^2, |x - ref|, ref^2
    size_t n, n_bad, at;    // at: index of max
} test_error;

TEST_FN void test_error_add(test_error *e, double x, double ref) {
    double d = fabs(x - ref);
    size_t i = e->n++;
    if (x == ref || (x != x && ref != ref)) d = 0;
    if (!(d <= 1.7976931348623157e308)) {
        e->n_bad++;
        return;
    }
    e->sum2 += d * d;
    if (ref == ref && fabs(ref) <= 1.7976931348623157e308) e->ref2 += ref * ref;
    if (d > e->max) {
        e->max = d;
        e->at = i;
    }
}

TEST_FN double test_error_rms(const test_error *e) {
    return e->n > 0 ? sqrt(e->sum2 / (double)e->n) : 0;
}

// RMS error over RMS of the reference.
TEST_FN double test_error_relative(const test_error *e) {
    return e->ref2 > 0 ? sqrt(e->sum2 / e->ref2) : e->sum2 > 0 ? 1 : 0;
}

// The RMS error of n floats; *max (may be NULL) the largest; infinite when a value is bad.
TEST_FN double test_error_floats(const float *x, const double *ref, size_t n, double *max) {
    test_error e = {0, 0, 0, 0, 0, 0};
    size_t i;
    for (i = 0; i < n; i++) test_error_add(&e, (double)x[i], ref[i]);
    if (max) *max = e.n_bad ? HUGE_VAL : e.max;
    return e.n_bad ? HUGE_VAL : test_error_rms(&e);
}

// ---- arguments: test_name [SEED [COUNT]]

TEST_FN uint64_t test_arg(int argc, char **argv, int i, uint64_t otherwise) {
    return argc > i ? (uint64_t)strtoull(argv[i], NULL, 0) : otherwise;
}

#endif // TEST_H

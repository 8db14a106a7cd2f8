/* bench.h - what every CPU benchmark needs: clocks, medians, threads that start together, memory
   that caches cannot hold, and the machine's ceilings. Include it once per program, before any
   other header (or with _GNU_SOURCE defined). */
#ifndef BENCH_H
#define BENCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define BENCH_FN static __attribute__((unused))
#define BENCH_MAX_THREADS 64

// ---- clocks and statistics

BENCH_FN double bench_clock(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

BENCH_FN double bench_now(void) {
    return bench_clock(CLOCK_MONOTONIC);
}

static int bench_order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

BENCH_FN double bench_median(double *v, int n) { // sorts v
    qsort(v, (size_t)n, sizeof *v, bench_order);
    return n == 0 ? 0 : n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

// ---- memory

BENCH_FN void *bench_alloc(size_t bytes) { // zeroed, huge pages asked for
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        perror("bench: mmap");
        exit(2);
    }
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}

BENCH_FN size_t bench_l3_bytes(void) {
    long n = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    n = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return n > 0 ? (size_t)n : (size_t)64 << 20;
}

// ---- threads: they spin until all have started, then run fn(arg, thread) together

typedef struct bench_team {
    int n, ready, go, done, at_barrier;
    void (*fn)(struct bench_team *, int thread, void *arg);
    void *arg;
} bench_team;

typedef struct bench_member {
    bench_team *team;
    int thread;
} bench_member;

static void bench_wait(int *x, int until) {
    int k = 0;
    while (__atomic_load_n(x, __ATOMIC_ACQUIRE) < until)
        if (++k > 20000) sched_yield();
}

BENCH_FN void bench_barrier(bench_team *t) { // once per run
    __atomic_add_fetch(&t->at_barrier, 1, __ATOMIC_ACQ_REL);
    bench_wait(&t->at_barrier, t->n);
}

static void *bench_member_main(void *p) {
    bench_member *m = (bench_member *)p;
    __atomic_add_fetch(&m->team->ready, 1, __ATOMIC_ACQ_REL);
    bench_wait(&m->team->go, 1);
    m->team->fn(m->team, m->thread, m->team->arg);
    __atomic_add_fetch(&m->team->done, 1, __ATOMIC_ACQ_REL);
    return NULL;
}

// Seconds from the common start to the last thread's end. *busy: CPU time over threads x wall time;
// threads never sleep here, so less than 1 means that other programs took the cores.
BENCH_FN double bench_together(int n, void (*fn)(bench_team *, int, void *), void *arg,
                               double *busy) {
    bench_team t;
    bench_member m[BENCH_MAX_THREADS];
    pthread_t id[BENCH_MAX_THREADS];
    double t0, t1, c0, c1;
    int i;
    memset(&t, 0, sizeof t);
    t.n = n;
    t.fn = fn;
    t.arg = arg;
    for (i = 1; i < n; i++) {
        m[i].team = &t;
        m[i].thread = i;
        if (pthread_create(&id[i], NULL, bench_member_main, &m[i])) {
            fprintf(stderr, "bench: cannot start thread %d\n", i);
            exit(2);
        }
    }
    bench_wait(&t.ready, n - 1);
    c0 = bench_clock(CLOCK_PROCESS_CPUTIME_ID);
    t0 = bench_now();
    __atomic_store_n(&t.go, 1, __ATOMIC_RELEASE);
    fn(&t, 0, arg);
    bench_wait(&t.done, n - 1);
    t1 = bench_now();
    c1 = bench_clock(CLOCK_PROCESS_CPUTIME_ID);
    for (i = 1; i < n; i++) pthread_join(id[i], NULL);
    if (busy) *busy = (c1 - c0) / ((t1 - t0) * n);
    return t1 - t0;
}

// ---- ceilings: loops of independent chains, as many operations as the ports take

enum bench_ceiling { // GFLOP/s, but READ in GB/s
    BENCH_NONE,
    BENCH_FMA,
    BENCH_YMM,
    BENCH_BF16,
    BENCH_AMX,
    BENCH_READ,
    BENCH_N_CEILINGS
};
static const char *const bench_ceiling_names[BENCH_N_CEILINGS] = {
    "-", "f32 FMA", "f32 FMA, 256 bits", "bf16 dot", "AMX bf16", "streaming read"};

static volatile float bench_sink;

#define BENCH_12(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define BENCH_24(M)                                                                                \
    BENCH_12(M) M(12) M(13) M(14) M(15) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23)

#ifdef __x86_64__
#define BENCH_512 __attribute__((noinline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define BENCH_DECL(i) __m512 a##i = _mm512_setzero_ps();
#define BENCH_ADD(i) a0 = _mm512_add_ps(a0, a##i);
BENCH_512 static double bench_fma512(long n) { // returns operations done
    __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1e-3f);
    long k;
    BENCH_24(BENCH_DECL)
    for (k = 0; k < n; k++) {
#define BENCH_STEP(i) __asm__ volatile("vfmadd213ps %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
        BENCH_24(BENCH_STEP)
#undef BENCH_STEP
    }
    BENCH_24(BENCH_ADD)
    bench_sink = _mm512_reduce_add_ps(a0);
    return (double)n * 24 * 16 * 2;
}

BENCH_512 static double bench_bf16(long n) {
    __m512i x = _mm512_set1_epi16(0x3c01), y = _mm512_set1_epi16(0x3c02);
    long k;
    BENCH_24(BENCH_DECL)
    for (k = 0; k < n; k++) {
#define BENCH_STEP(i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
        BENCH_24(BENCH_STEP)
#undef BENCH_STEP
    }
    BENCH_24(BENCH_ADD)
    bench_sink = _mm512_reduce_add_ps(a0);
    return (double)n * 24 * 32 * 2;
}
#undef BENCH_DECL
#undef BENCH_ADD

__attribute__((noinline, target("avx2,fma"))) static double bench_fma256(long n) {
    __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1e-3f);
    long k;
#define BENCH_DECL(i) __m256 a##i = _mm256_setzero_ps();
#define BENCH_ADD(i) a0 = _mm256_add_ps(a0, a##i);
#define BENCH_STEP(i) __asm__ volatile("vfmadd213ps %2, %1, %0" : "+x"(a##i) : "x"(x), "x"(y));
    BENCH_12(BENCH_DECL)
    for (k = 0; k < n; k++) {
        BENCH_12(BENCH_STEP)
    }
    BENCH_12(BENCH_ADD)
#undef BENCH_DECL
#undef BENCH_ADD
#undef BENCH_STEP
    bench_sink = _mm256_cvtss_f32(a0);
    return (double)n * 12 * 8 * 2;
}

// Four sums of 16 x 16, tiles of 16 rows x 32 bf16. Only after the OS granted the tile registers.
__attribute__((noinline)) static double bench_amx(long n) {
    uint8_t cfg[64], zero[1024];
    long k;
    int i;
    memset(cfg, 0, sizeof cfg);
    memset(zero, 0, sizeof zero);
    cfg[0] = 1;
    for (i = 0; i < 8; i++) {
        cfg[16 + 2 * i] = 64;
        cfg[48 + i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(cfg));
    __asm__ volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
                     "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5" ::"r"(zero),
                     "r"((long)64)
                     : "memory");
    for (k = 0; k < n; k++)
        __asm__ volatile("tdpbf16ps %tmm5, %tmm4, %tmm0\n\ttdpbf16ps %tmm5, %tmm4, %tmm1\n\t"
                         "tdpbf16ps %tmm5, %tmm4, %tmm2\n\ttdpbf16ps %tmm5, %tmm4, %tmm3");
    __asm__ volatile("tilerelease");
    return (double)n * 4 * 16 * 16 * 32 * 2;
}
#endif

// Any machine: 128-bit vectors, fused by the compiler where the machine fuses.
typedef float bench_v4 __attribute__((vector_size(16)));
__attribute__((noinline)) static double bench_generic(long n) {
    bench_v4 x = {0.999f, 0.998f, 0.997f, 0.996f}, y = {1e-3f, 2e-3f, 3e-3f, 4e-3f};
    long k;
#define BENCH_DECL(i) bench_v4 a##i = {0, 0, 0, 0};
#define BENCH_STEP(i)                                                                              \
    a##i = a##i * x + y;                                                                           \
    __asm__ volatile("" : BENCH_REG(a##i));
#define BENCH_ADD(i) a0 += a##i;
#ifdef __aarch64__
#define BENCH_REG(a) "+w"(a)
    BENCH_24(BENCH_DECL)
    for (k = 0; k < n; k++) {
        BENCH_24(BENCH_STEP)
    }
    BENCH_24(BENCH_ADD)
    bench_sink = a0[0];
    return (double)n * 24 * 4 * 2;
#else
#ifdef __x86_64__
#define BENCH_REG(a) "+x"(a)
#else
#define BENCH_REG(a) "+m"(a)
#endif
    BENCH_12(BENCH_DECL)
    for (k = 0; k < n; k++) {
        BENCH_12(BENCH_STEP)
    }
    BENCH_12(BENCH_ADD)
    bench_sink = a0[0];
    return (double)n * 12 * 4 * 2;
#endif
#undef BENCH_DECL
#undef BENCH_STEP
#undef BENCH_ADD
}

#ifdef __x86_64__
BENCH_512 static void bench_read512(const uint8_t *p, size_t n, size_t ahead) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    size_t i;
    for (i = 0; i < n; i += 256) {
        if (ahead) {
            __builtin_prefetch(p + i + ahead);
            __builtin_prefetch(p + i + ahead + 64);
            __builtin_prefetch(p + i + ahead + 128);
            __builtin_prefetch(p + i + ahead + 192);
        }
        a = _mm512_xor_si512(a, _mm512_load_si512((const void *)(p + i)));
        b = _mm512_xor_si512(b, _mm512_load_si512((const void *)(p + i + 64)));
        c = _mm512_xor_si512(c, _mm512_load_si512((const void *)(p + i + 128)));
        d = _mm512_xor_si512(d, _mm512_load_si512((const void *)(p + i + 192)));
    }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    bench_sink = (float)_mm512_reduce_add_epi64(a);
}
#endif

typedef uint64_t bench_u2 __attribute__((vector_size(16)));
__attribute__((noinline)) static void bench_read_generic(const uint8_t *p, size_t n, size_t ahead) {
    bench_u2 a = {0, 0}, b = a, c = a, d = a;
    size_t i;
    for (i = 0; i < n; i += 64) {
        const bench_u2 *v = (const bench_u2 *)(const void *)(p + i);
        if (ahead) __builtin_prefetch(p + i + ahead);
        a ^= v[0], b ^= v[1], c ^= v[2], d ^= v[3];
    }
    a ^= b ^ c ^ d;
    bench_sink = (float)(a[0] ^ a[1]);
}

typedef struct bench_probe { // what a ceiling loop needs
    int kind;
    int wide;       // 512-bit vectors are there
    long n;         // iterations of a compute loop
    uint8_t *arena; // for READ
    size_t arena_bytes, bytes, at, ahead;
    double ops[BENCH_MAX_THREADS];
} bench_probe;

static void bench_probe_run(bench_team *t, int thread, void *arg) {
    bench_probe *p = (bench_probe *)arg;
    size_t part = p->bytes / (size_t)t->n / 4096 * 4096;
    const uint8_t *at = p->arena + p->at + part * (size_t)thread;
    double ops = 0;
    switch (p->kind) {
#ifdef __x86_64__
    case BENCH_FMA:
        if (p->wide) {
            ops = bench_fma512(p->n);
            break;
        }
        ops = __builtin_cpu_supports("fma") ? bench_fma256(p->n) : bench_generic(p->n);
        break;
    case BENCH_YMM:
        ops = bench_fma256(p->n);
        break;
    case BENCH_BF16:
        ops = bench_bf16(p->n);
        break;
    case BENCH_AMX:
        ops = bench_amx(p->n);
        break;
    case BENCH_READ:
        if (p->wide)
            bench_read512(at, part, p->ahead);
        else
            bench_read_generic(at, part, p->ahead);
        ops = (double)part;
        break;
#else
    case BENCH_READ:
        bench_read_generic(at, part, p->ahead);
        ops = (double)part;
        break;
    default:
        ops = bench_generic(p->n);
        break;
#endif
    }
    p->ops[thread] = ops;
}

// One sample of a ceiling: G operations (bytes) per second over n threads.
BENCH_FN double bench_probe_rate(bench_probe *p, int n, double *busy) {
    double sum = 0, sec;
    int i;
    if (p->kind == BENCH_READ) { // walk through the arena: never what was read last
        p->at += p->bytes;
        if (p->at + p->bytes + p->ahead > p->arena_bytes) p->at = 0;
    }
    sec = bench_together(n, bench_probe_run, p, busy);
    for (i = 0; i < n; i++) sum += p->ops[i];
    return sum / sec * 1e-9;
}

#endif // BENCH_H

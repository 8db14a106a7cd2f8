/* fuzz.h - what the fuzz targets share: reading decisions from bytes, checks that stop the program,
   and a main for compilers without libFuzzer.

   A target is one .c file with LLVMFuzzerTestOneInput. Built with clang -fsanitize=fuzzer it is
   driven by libFuzzer; built with -DFUZZ_MAIN by any compiler it replays files and folders:
       fuzz_x [-m SECONDS [SEED]] PATH...
   -m goes on with random mutations of those files, without coverage: for machines that have no
   libFuzzer. The last line is "N passed, N failed"; a bad input stops the program, is named, and
   with -m written to ./crash-SEED. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define FUZZ_FN static __attribute__((unused))
#else
#define FUZZ_FN static
#endif

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(cond)                                                                           \
    do {                                                                                           \
        if (!(cond)) fuzz_fail(__FILE__, __LINE__, #cond);                                         \
    } while (0)

FUZZ_FN void fuzz_fail(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    abort();
}

// Exactly n bytes, so that the sanitizer sees the first one too far; never NULL.
FUZZ_FN void *fuzz_alloc(size_t n) {
    void *p = malloc(n ? n : 1);
    if (!p) exit(2);
    return p;
}

FUZZ_FN void *fuzz_copy(const void *from, size_t n) {
    void *p = fuzz_alloc(n);
    if (n) memcpy(p, from, n);
    return p;
}

// ---- decisions: most take one byte, so that a mutated byte is a changed decision

typedef struct fuzz_in {
    const uint8_t *p;
    size_t n;
} fuzz_in;

FUZZ_FN uint32_t fuzz_u8(fuzz_in *in) { // 0 behind the end
    if (in->n == 0) return 0;
    in->n--;
    return *in->p++;
}

FUZZ_FN uint64_t fuzz_bits(fuzz_in *in, int bytes) {
    uint64_t v = 0;
    while (bytes-- > 0) v = v << 8 | fuzz_u8(in);
    return v;
}

// In [0, n), n >= 1.
FUZZ_FN int32_t fuzz_below(fuzz_in *in, int32_t n) {
    uint64_t v = n <= 256 ? fuzz_u8(in) : n <= 65536 ? fuzz_bits(in, 2) : fuzz_bits(in, 4);
    return (int32_t)(v % (uint64_t)(uint32_t)n);
}

// An integer that code is likely to get wrong.
FUZZ_FN int64_t fuzz_edge(fuzz_in *in) {
    static const int64_t edge[] = {0, 1, -1, 2, 7, 8, 15, 16, 17, 255, 256, 257, 576, 577, 65536,
                                   65537, INT32_MAX, (int64_t)INT32_MAX + 1, INT32_MIN, -2,
                                   INT64_MAX, INT64_MIN, (int64_t)1 << 56, (int64_t)1 << 58,
                                   (int64_t)1 << 62, ((int64_t)1 << 31) - 2, (int64_t)1 << 30};
    uint32_t k = fuzz_u8(in);
    if (k < 96) return edge[k % (sizeof edge / sizeof *edge)];
    if (k < 192) return (int64_t)fuzz_u8(in);
    if (k < 224) return (int64_t)fuzz_u8(in) - 128;
    if (k < 240) return (int32_t)(uint32_t)fuzz_bits(in, 4);
    return (int64_t)fuzz_bits(in, 8);
}

FUZZ_FN int32_t fuzz_edge32(fuzz_in *in) { return (int32_t)(uint32_t)(uint64_t)fuzz_edge(in); }

// Any f32, NaN and infinities among them.
FUZZ_FN float fuzz_float(fuzz_in *in) {
    static const uint32_t edge[] = {0, 0x80000000u, 0x3f800000u, 0xbf800000u, 0x7f800000u,
                                    0xff800000u, 0x7fc00000u, 1, 0x7f7fffffu, 0xc8742400u,
                                    0x00800000u, 0x3e000000u};
    uint32_t k = fuzz_u8(in), u;
    float f;
    u = k < 192 ? edge[k % (sizeof edge / sizeof *edge)] : (uint32_t)fuzz_bits(in, 4);
    memcpy(&f, &u, 4);
    return f;
}

// ---- random data that no decision depends on

FUZZ_FN uint64_t fuzz_random(uint64_t *state) { // splitmix64
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

FUZZ_FN float fuzz_unit(uint64_t *state) { // [-1, 1)
    return (float)(int32_t)(fuzz_random(state) >> 40) / 8388608.0f - 1.0f;
}

#ifdef FUZZ_MAIN
// ==== replay =====================================================================================

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FUZZ_MAX_FILES 100000
#define FUZZ_MAX_BYTES ((size_t)1 << 20)

static struct {
    uint8_t *bytes[FUZZ_MAX_FILES];
    size_t size[FUZZ_MAX_FILES];
    int n;
    const uint8_t *now; // the input that runs
    size_t now_size;
    char crash[64]; // where it goes if it stops the program
} fuzz_set;

static void fuzz_on_signal(int sig) {
    int fd = open(fuzz_set.crash, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd >= 0 && write(fd, fuzz_set.now, fuzz_set.now_size) >= 0) close(fd);
    signal(sig, SIG_DFL);
    raise(sig);
}

static int fuzz_read(const char *path, int replay) {
    FILE *f = fopen(path, "rb");
    uint8_t *p = (uint8_t *)fuzz_alloc(FUZZ_MAX_BYTES), *exact;
    size_t n = f ? fread(p, 1, FUZZ_MAX_BYTES, f) : 0;
    if (!f || fuzz_set.n == FUZZ_MAX_FILES) {
        printf("%s: cannot read\n", path);
        if (f) fclose(f);
        free(p);
        return 1;
    }
    fclose(f);
    exact = (uint8_t *)fuzz_copy(p, n);
    free(p);
    if (replay) {
        fprintf(stderr, "%s\n", path); // the last one named is the one that failed
        (void)LLVMFuzzerTestOneInput(exact, n);
    }
    fuzz_set.bytes[fuzz_set.n] = exact;
    fuzz_set.size[fuzz_set.n++] = n;
    return 0;
}

static int fuzz_read_all(const char *path) { // a file, or every file of a folder; failures
    DIR *dir = opendir(path);
    struct dirent *e;
    struct stat st;
    char name[4096];
    int failed = 0;
    if (!dir) return fuzz_read(path, 1);
    while ((e = readdir(dir)) != NULL) {
        if (snprintf(name, sizeof name, "%s/%s", path, e->d_name) >= (int)sizeof name) continue;
        if (stat(name, &st) == 0 && S_ISREG(st.st_mode)) failed += fuzz_read(name, 1);
    }
    closedir(dir);
    return failed;
}

// One to eight random edits of one input, or the head of one and the tail of another.
static void fuzz_mutate(uint64_t *rng) {
    size_t a = fuzz_set.n ? fuzz_random(rng) % (uint64_t)fuzz_set.n : 0, n, i, at, k;
    uint8_t *p = (uint8_t *)fuzz_alloc(FUZZ_MAX_BYTES + 64), *exact;
    n = fuzz_set.n ? fuzz_set.size[a] : 0;
    if (n) memcpy(p, fuzz_set.bytes[a], n);
    for (i = 1 + fuzz_random(rng) % 8; i > 0; i--) {
        at = n ? fuzz_random(rng) % n : 0;
        k = 1 + fuzz_random(rng) % 8;
        switch (fuzz_random(rng) % 6) {
        case 0: if (n) p[at] = (uint8_t)(p[at] ^ (1u << (k - 1))); break;
        case 1: if (n) p[at] = (uint8_t)fuzz_random(rng); break;
        case 2: // insert
            if (n + k > FUZZ_MAX_BYTES) break;
            memmove(p + at + k, p + at, n - at);
            for (n += k; k > 0; k--) p[at + k - 1] = (uint8_t)fuzz_random(rng);
            break;
        case 3: // delete
            if (at + k >= n) break;
            memmove(p + at, p + at + k, n - at - k);
            n -= k;
            break;
        case 4: if (n) n = at + 1; break;
        default: // cross over
            if (!fuzz_set.n) break;
            a = fuzz_random(rng) % (uint64_t)fuzz_set.n;
            if (fuzz_set.size[a] <= at) break;
            n = fuzz_set.size[a];
            memcpy(p + at, fuzz_set.bytes[a] + at, n - at);
        }
    }
    exact = (uint8_t *)fuzz_copy(p, n);
    free(p);
    fuzz_set.now = exact;
    fuzz_set.now_size = n;
    (void)LLVMFuzzerTestOneInput(exact, n);
    free(exact);
}

int main(int argc, char **argv) {
    long long passed = 0, failed = 0;
    double seconds = 0;
    uint64_t seed = 1;
    time_t start = time(NULL);
    int i = 1;
    if (i + 1 < argc && !strcmp(argv[i], "-m")) {
        seconds = atof(argv[i + 1]);
        i += 2;
        if (i < argc && argv[i][0] >= '0' && argv[i][0] <= '9') seed = strtoull(argv[i++], NULL, 0);
    }
    for (; i < argc; i++) failed += fuzz_read_all(argv[i]);
    passed = fuzz_set.n;
    if (seconds > 0) {
        static const int fatal[] = {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
        snprintf(fuzz_set.crash, sizeof fuzz_set.crash, "crash-%llu", (unsigned long long)seed);
        for (i = 0; i < 6; i++) signal(fatal[i], fuzz_on_signal);
        for (; difftime(time(NULL), start) < seconds; passed++) fuzz_mutate(&seed);
    }
    if (passed == 0) failed++; // a replay of nothing proves nothing
    for (i = 0; i < fuzz_set.n; i++) free(fuzz_set.bytes[i]);
    printf("%lld passed, %lld failed\n", passed, failed);
    return failed != 0;
}
#endif // FUZZ_MAIN

#endif // FUZZ_H

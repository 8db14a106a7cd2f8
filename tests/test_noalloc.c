/* test_noalloc.c - a step allocates nothing, and how much stack it takes.
   cc -O2 -I. -Itests tests/test_noalloc.c -o test_noalloc -pthread -lm

   The program brings its own malloc family and mmap, which the whole process uses, the C library
   included; while a count is taken, every call of them counts. Then the same calls run on a thread
   whose stack was painted. The bounds are those that attn_cpu.h documents. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "test.h"

static int counting;
static long long n_calls;

#if defined(__linux__) && defined(__GLIBC__) && !defined(TEST_SANITIZED)
#define HOOKED 1
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// A heap that only grows, until a test resets it; each block is preceded by its size.
static unsigned char heap[256u << 20] __attribute__((aligned(64)));
static size_t heap_used;

static void *take(size_t align, size_t bytes) {
    size_t at;
    n_calls += counting;
    if (align < 16) align = 16;
    at = (__atomic_load_n(&heap_used, __ATOMIC_RELAXED) + 16 + align - 1) / align * align;
    if (bytes > sizeof heap - at) return NULL;
    __atomic_store_n(&heap_used, at + bytes, __ATOMIC_RELAXED);
    memcpy(heap + at - 8, &bytes, sizeof bytes);
    return heap + at;
}

void *malloc(size_t bytes) { return take(16, bytes); }
void free(void *p) {
    if (p) n_calls += counting;
}
void *calloc(size_t n, size_t size) {
    void *p = take(16, n * size);
    return p ? memset(p, 0, n * size) : NULL;
}
void *realloc(void *p, size_t bytes) {
    void *q = take(16, bytes);
    size_t old = 0;
    if (p) memcpy(&old, (unsigned char *)p - 8, sizeof old);
    if (p && q) memcpy(q, p, old < bytes ? old : bytes);
    return q;
}
void *memalign(size_t align, size_t bytes) { return take(align, bytes); }
void *aligned_alloc(size_t align, size_t bytes) { return take(align, bytes); }
void *valloc(size_t bytes) { return take(4096, bytes); }
int posix_memalign(void **p, size_t align, size_t bytes) {
    *p = take(align, bytes);
    return *p ? 0 : ENOMEM;
}
void *mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) {
    n_calls += counting;
    return (void *)syscall(SYS_mmap, at, bytes, prot, flags, fd, offset);
}
void *sbrk(intptr_t by) {
    (void)by;
    n_calls += counting;
    errno = ENOMEM;
    return (void *)-1;
}
#else
#define HOOKED 0
static size_t heap_used;
#endif

#define ATTN_IMPLEMENTATION
#include "problem.h"
#include <pthread.h>

static void begin(void) {
    n_calls = 0;
    counting = 1;
}

static void end(const char *what) {
    counting = 0;
    if (!CHECK_EQ(n_calls, 0)) printf("    %s\n", what);
}

static void test_hook(void) {
    char *(*volatile duplicate)(const char *) = strdup;
    void *(*volatile get)(size_t) = malloc;
    void *p;
    char *s;
    n_calls = 0;
    counting = 1;
    p = get(100);
    s = duplicate("calls inside the C library count, too");
    counting = 0;
    CHECK(n_calls >= 2 || !HOOKED);
    free(p);
    free(s);
}

// ---- a step of everything

typedef struct work { // what a step needs, taken beforehand
    problem p;
    attn_plan_params params;
    attn_plan *plan;
    void *mem, *partials, *scratch, *forward;
    size_t bytes, forward_bytes;
    attn_tensor k, v;
    attn_result r;
} work;

static void work_make(work *w, uint64_t seed, const problem_opts *o) {
    test_rng r;
    r.state = seed;
    memset(w, 0, sizeof *w);
    problem_make(&w->p, o, &r);
    attn_cpu_plan_params(&w->p.d, 2, &w->params);
    w->params.share = 2;
    if (w->params.partial_bytes > 8u << 20) w->params.partial_bytes = 8u << 20;
    w->bytes = attn_plan_bytes(&w->p.d, &w->params);
    w->mem = problem_alloc(&w->p, w->bytes);
    CHECK_EQ(attn_plan_build(&w->p.d, &w->params, w->mem, w->bytes, &w->plan), ATTN_OK);
    w->partials = problem_alloc(&w->p, w->params.partial_bytes);
    w->scratch = problem_alloc(&w->p, attn_cpu_scratch_bytes(&w->p.d, w->plan));
    w->forward_bytes = attn_cpu_forward_bytes(&w->p.d, 1);
    w->forward = problem_alloc(&w->p, w->forward_bytes);
    w->k.data = w->p.k_rows;
    w->v.data = w->p.v_rows;
    w->k.dtype = w->v.dtype = ATTN_F32;
}

static void *step(void *arg) { // store, plan update, run, merge
    work *w = (work *)arg;
    const attn_desc *d = &w->p.d;
    attn_result r = attn_cpu_store(d, &w->k, &w->v, w->p.slots, 0, w->p.n_rows);
    if (r == ATTN_OK) r = attn_plan_update(w->plan, d, NULL);
    if (r == ATTN_OK)
        r = attn_cpu_run(d, w->plan, 0, w->plan->n_tasks, w->partials, w->scratch);
    if (r == ATTN_OK) r = attn_cpu_merge(d, w->plan, 0, w->plan->n_merges, w->partials);
    w->r = r;
    return NULL;
}

static void *whole(void *arg) { // everything in one call, and the plan anew
    work *w = (work *)arg;
    w->r = attn_cpu_forward(&w->p.d, w->forward, w->forward_bytes, 1);
    if (w->r == ATTN_OK)
        w->r = attn_plan_build(&w->p.d, &w->params, w->mem, w->bytes, &w->plan);
    return NULL;
}

static void *nothing(void *arg) { return arg; }

// ---- stack: paint it, run, and look how far the paint is gone

enum { STACK = 1 << 20 };
static unsigned char stack[STACK] __attribute__((aligned(4096)));

static size_t stack_of(void *(*fn)(void *), void *arg) {
    pthread_attr_t a;
    pthread_t t;
    size_t i = 0;
    memset(stack, 0xa5, STACK);
    pthread_attr_init(&a);
    if (pthread_attr_setstack(&a, stack, STACK) != 0 || pthread_create(&t, &a, fn, arg) != 0) {
        CHECK(!"a thread on a stack of one's own");
        return 0;
    }
    pthread_join(t, NULL);
    pthread_attr_destroy(&a);
    while (i < STACK && stack[i] == 0xa5) i++;
    return STACK - i;
}

// As attn_cpu.h says; unoptimised code keeps every temporary of the kernels.
#if defined(__OPTIMIZE__) && !defined(TEST_SANITIZED)
#define STACK_BOUND 16384
#else
#define STACK_BOUND (STACK / 2)
#endif

static void random_opts(test_rng *r, problem_opts *o, int i) {
    static const attn_dtype kv[] = {ATTN_F32,    ATTN_F16, ATTN_BF16, ATTN_F8E4M3,
                                    ATTN_F8E5M2, ATTN_I8,  ATTN_I4};
    static const int32_t dims[] = {8, 64, 128, 64, 128, 576};
    memset(o, 0, sizeof *o);
    o->phase = i % N_PHASES;
    o->mask = test_below(r, N_MASKS);
    o->layout = (attn_layout)test_below(r, 3);
    o->page_tokens = 16;
    o->n_seq = 2;
    o->max_kv = 560;
    o->n_kv_heads = 1 + test_below(r, 2);
    o->n_heads = o->n_kv_heads * (1 + test_below(r, 4));
    o->head_dim = dims[test_below(r, 6)];
    o->v_head_dim = dims[test_below(r, 6)];
    o->k = kv[i % 7];
    o->v = kv[test_below(r, 7)];
    o->q = (attn_dtype)(ATTN_F32 + test_below(r, 3));
    o->o = (attn_dtype)(ATTN_F32 + test_below(r, 3));
    if (i % 4 == 0) o->k = o->v = o->q = o->o = ATTN_BF16;
    o->softcap = o->alibi = o->sink = o->bias = i % 2;
    o->lse = 1;
    o->shared = 272;
    o->numerics = (attn_numerics)(i % 3);
    o->sharp = 3;
}

static void test_steps(uint64_t seed, int count) {
    size_t most[ATTN_CPU_ISA_COUNT] = {0}, base = stack_of(nothing, NULL);
    int isa, i;
    for (i = 0; i < count; i++) {
        size_t mark = heap_used;
        problem_opts o;
        test_rng r;
        work w;
        r.state = seed + (uint64_t)i;
        random_opts(&r, &o, i);
        work_make(&w, seed + (uint64_t)i, &o);
        for (isa = ATTN_CPU_SCALAR; isa < ATTN_CPU_ISA_COUNT; isa++) {
            size_t used;
            if (attn_cpu_set_isa((attn_cpu_isa)isa) != ATTN_OK) continue;
            begin();
            step(&w);
            end("step");
            CHECK_EQ(w.r, ATTN_OK);
            begin();
            whole(&w);
            end("forward");
            CHECK_EQ(w.r, ATTN_OK);
            used = stack_of(step, &w);
            if (used > base && used - base > most[isa]) most[isa] = used - base;
            used = stack_of(whole, &w);
            if (used > base && used - base > most[isa]) most[isa] = used - base;
        }
        problem_free(&w.p);
        heap_used = mark;
    }
    for (isa = 0; isa < ATTN_CPU_ISA_COUNT; isa++) {
        if (most[isa] == 0) continue;
        printf("stack of a step, %s: %lu bytes\n", attn_cpu_isa_name((attn_cpu_isa)isa),
               (unsigned long)most[isa]);
        CHECK(most[isa] <= STACK_BOUND);
    }
    attn_cpu_set_isa(ATTN_CPU_AUTO);
}

// ---- the tree

static int rows(void *user, int32_t page, int32_t place, int32_t n, void *p) {
    (void)user, (void)page, (void)place, (void)n, (void)p;
    return 0;
}

static int copy_page(void *user, const attn_page_copy *c) {
    (void)user, (void)c;
    return 0;
}

static void *tree_steps(void *arg) {
    static unsigned char blob[1 << 16];
    attn_tree *t = (attn_tree *)arg;
    attn_page_copy copy[2];
    attn_tree_stats stats;
    int32_t seq[8], token[200], page[64], order[8], scratch[8], i, n, hit, out, n_copies = 0;
    size_t bytes;
    test_rng r;
    r.state = 9;
    for (i = 0; i < 200; i++) token[i] = test_below(&r, 3);
    CHECK_EQ(attn_tree_insert(t, 1, token, 100, &seq[0], &hit, copy, 1, &n_copies), ATTN_OK);
    for (i = 1; i < 4; i++) CHECK_EQ(attn_tree_fork(t, seq[0], &seq[i]), ATTN_OK);
    for (n = 0; n < 40; n++)
        for (i = 0; i < 4; i++) {
            n_copies = 0;
            token[0] = i + n;
            CHECK_EQ(attn_tree_append(t, seq[i], token, 1, &hit, copy, 1, &n_copies), ATTN_OK);
            CHECK_EQ(attn_tree_ack(t, copy, n_copies), ATTN_OK);
            CHECK(attn_tree_pages(t, seq[i], page, 64) > 0);
        }
    CHECK_EQ(attn_tree_order(t, seq, 4, order, scratch), ATTN_OK);
    CHECK_EQ(attn_tree_truncate(t, seq[1], 60), ATTN_OK);
    CHECK_EQ(attn_tree_priority(t, seq[2], 2), ATTN_OK);
    CHECK_EQ(attn_tree_pin(t, 1, token + 1, 0, 1), ATTN_ERR_ARGUMENT);
    bytes = attn_tree_save_bytes(t, seq[2], 8);
    CHECK_EQ(attn_tree_save(t, seq[2], 8, rows, NULL, blob, sizeof blob), ATTN_OK);
    for (i = 0; i < 4; i++) CHECK_EQ(attn_tree_release(t, seq[i], i & 1), ATTN_OK);
    CHECK_EQ(attn_tree_evict(t, 3, NULL), ATTN_OK);
    CHECK_EQ(attn_tree_load(t, 2, 8, rows, copy_page, NULL, blob, bytes, &out), ATTN_OK);
    CHECK(attn_tree_match(t, 2, token, 5) >= 0);
    CHECK_EQ(attn_tree_release(t, out, 0), ATTN_OK);
    CHECK_EQ(attn_tree_check(t), ATTN_OK);
    attn_tree_get_stats(t, &stats);
    return NULL;
}

static void test_tree(void) {
    attn_tree_desc d;
    attn_tree *t = NULL;
    size_t bytes, base, used;
    void *mem;
    memset(&d, 0, sizeof d);
    d.n_pages = 64;
    d.page_tokens = 8;
    bytes = attn_tree_bytes(&d);
    mem = malloc(bytes);
    begin();
    CHECK_EQ(attn_tree_init(&d, mem, bytes, &t), ATTN_OK);
    tree_steps(t);
    end("tree");
    base = stack_of(nothing, NULL);
    used = stack_of(tree_steps, t);
    used = used > base ? used - base : 0;
    printf("stack of the tree's calls: %lu bytes\n", (unsigned long)used);
    CHECK(used <= STACK_BOUND);
    free(mem);
}

int main(int argc, char **argv) {
    uint64_t seed = test_arg(argc, argv, 1, 1);
    int count = (int)test_arg(argc, argv, 2, 14);
    attn_cpu_open();
    printf(HOOKED ? "malloc and mmap are counted\n" : "no hook of malloc here: the stack alone\n");
    test_hook();
    test_steps(seed, count);
    test_tree();
    return TEST_END();
}

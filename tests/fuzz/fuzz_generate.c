/* fuzz_generate.c - examples/generate.c as a whole: options, document and questions are the input,
   the model is a tiny one written here. Whatever they say, it answers or complains, and gives back
   all memory.
   cc -DFUZZ_MAIN -I. -Itests -Iexamples tests/fuzz/fuzz_generate.c -o fuzz_generate -pthread -lm

   The input: options, a zero byte, the document, a zero byte, the questions. An option is a byte
   that picks it from a table and, where it takes a value, a byte that picks that. */
#define LLAMA_MMAP 0
#define LLAMA_IMPLEMENTATION
#define _GNU_SOURCE
#include "gguf.h"

static struct { // the files that there are: model, document, questions
    const uint8_t *bytes;
    size_t size;
} given[3];

static FILE *open_given(const char *path) {
    int i = path[0] == 'm' ? 0 : path[0] == 'd' ? 1 : path[0] == 'q' ? 2 : -1;
    if (i < 0 || path[1]) return NULL;
    return fmemopen((void *)(uintptr_t)given[i].bytes, given[i].size, "rb");
}

#define fopen(path, mode) open_given(path)
#include "llama.h"
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

#include <errno.h>
#include <sys/resource.h>
#include <time.h>

static int quiet(const char *fmt, ...) { // what it prints is not looked at
    return fmt == NULL;
}

#define printf(...) quiet(__VA_ARGS__)
#define fprintf(file, ...) quiet(__VA_ARGS__)
#define vfprintf(file, fmt, ap) ((void)(fmt))
#define fputs(s, file) ((void)(s))
#define fputc(c, file) ((void)(c))
#define putchar(c) ((void)(c))
#define fwrite(p, size, n, file) ((void)(p))
#define main generate_main
#include "generate.c"
#undef main
#undef fopen
#undef printf
#undef fprintf
#undef vfprintf
#undef fputs
#undef fputc
#undef putchar
#undef fwrite

enum { MAX_ARGS = 40 };

static void write_model(gguf_out *o) {
    gguf_spec s;
    memset(&s, 0, sizeof s);
    s.all_bytes = s.tied = 1;
    s.n_layers = 1;
    s.d_model = s.d_ff = 16;
    s.n_kv_heads = 1;
    s.n_heads = 2;
    s.head_dim = 8;
    s.pre = "default";
    s.seed = 1;
    gguf_write(o, &s);
}

// Options from bytes up to the first 0; a number that is not in the table goes to text.
static int arguments(fuzz_in *in, char **argv, char text[MAX_ARGS][24]) {
    // what keeps a run short; the input may say otherwise
    static const char *const fixed[] = {"generate", "--model", "m", "--document", "d",
                                        "--questions", "q", "--threads", "1", "--n-predict", "3",
                                        "--kv-mem", "1"};
    static const char *const name[] = {
        "--mask", "--kv", "--page", "--chunk", "--batch", "--every", "--kv-mem", "--n-predict",
        "--numerics", "--temp", "--top-k", "--top-p", "--seed", "--isa", "--no-share", "--json",
        "--prompt", "--document", "--unknown", "--help", "--select"};
    static const char *const value[] = {
        "1", "0", "2", "7", "16", "33", "-1", "4096", "99999999999", "0.5", "1e9", "nan", "", "x",
        "dense", "window:5", "window:3,2", "window:0", "window:,", "window:9999999999", "q",
        "stride:4,1,2", "stride:1,1,1", "stride:0,1,1", "stride:1000000000,1000000000,1", "f32",
        "f16", "bf16", "fp8", "int8", "int4", "fast", "portable", "approx", "scalar", "auto",
        "the <s> tt", "[user]", "none", "exact:keep=8,kvblock=4,rows=4", "exact:share=.5,dense=0",
        "exact:epsilon=.1,heads=all", "flex:block=4", "flex:tau=.2,block=2,compat", "hip1:k=4",
        "hip2:k=4,sink=2,window=4", "hip:keep=8,sink=8,window=4", "stride:4,1,2,dense=1", "hip:"};
    int n = 0;
    uint32_t k;
    for (; n < (int)(sizeof fixed / sizeof *fixed); n++) argv[n] = (char *)(uintptr_t)fixed[n];
    while (n < MAX_ARGS - 2 && in->n > 0 && (k = fuzz_u8(in)) != 0) {
        k %= 21;
        argv[n++] = (char *)(uintptr_t)name[k];
        if (k == 14 || k == 15 || k == 19) continue;
        k = fuzz_u8(in);
        if (k < 200) {
            argv[n] = (char *)(uintptr_t)value[k % (sizeof value / sizeof *value)];
        } else {
            snprintf(text[n], sizeof text[n], "%lld", (long long)fuzz_edge(in));
            argv[n] = text[n];
        }
        n++;
    }
    argv[n] = NULL;
    return n;
}

static void give_file(int i, const uint8_t *p, size_t n) {
    given[i].bytes = (const uint8_t *)fuzz_copy(p, n);
    given[i].size = n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static gguf_out model;
    static char text[MAX_ARGS][24];
    fuzz_in in = {data, size};
    char *argv[MAX_ARGS];
    int argc, r;
    size_t n = 0;
    if (!model.p) write_model(&model);
    argc = arguments(&in, argv, text);
    while (n < in.n && n < 150 && in.p[n]) n++;
    give_file(0, model.p, model.n);
    give_file(1, in.p, n);
    if (n < in.n) n++;
    give_file(2, in.p + n, in.n - n < 250 ? in.n - n : 250);
    r = generate_main(argc, argv);
    FUZZ_CHECK(r >= 0 && r <= 2);
    (void)attn_cpu_set_isa(ATTN_CPU_AUTO);
    for (r = 0; r < 3; r++) free((void *)(uintptr_t)given[r].bytes);
    return 0;
}

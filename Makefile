# attn - plain make, no configure step. Everything built goes under build/.
#
#   make run [ARGS='--kv int8']   the main job (needs cc and make only)
#   make test                     everything that is fast; ends with "N passed, N failed"
#   make frame [ARGS=--show]      60 frames a second while a character talks
#   make coverage [coverage-cpu]  every condition of attn.h, MC/DC included (clang >= 18)
#   make test-ports-fast | test-ports   one PORTABLE hash over compilers and machines: a table
#   make test-all                 everything, the slow ones too; `make deps-all` installs its tools
#   make test-asan test-clang test-compile test-aarch64 test-tsan test-msan test-valgrind
#   make fuzz-short | fuzz [SECONDS= JOBS= SEEDS=] | fuzz-static     (clang; see "fuzzing" below)
#   make sim [OPS=10000000 SIM_SEED=1000]   the simulator, in shards of their own seeds
#   make mutants [MUTANTS=40 SEED=1]   planted and random bugs that the tests must notice
#   make cuda | test-cuda         attn_cuda.cuh for every architecture | its tests, on a GPU
#   make proof | proof-planted    Frama-C on attn.h; bugs that the proofs must notice
#   make examples-cuda | test-generate-cuda    examples/*.cu and generate --device cuda (nvcc)
#   make recall [ARGS=]   five documents of 16k tokens with each selector: answers lost, a table
#   make examples | bench | bench-cuda | lint | deps | install [PREFIX= DESTDIR=] | clean

CC ?= cc
CLANG ?= clang
AARCH64_CC ?= aarch64-linux-gnu-gcc
AARCH64_RUN ?= qemu-aarch64
PYTHON ?= $(if $(wildcard build/venv/bin/python3),build/venv/bin/python3,python3)
PREFIX ?= /usr/local
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
LIMIT ?= 900# seconds a test program may take

# ARCH is for the examples alone: the headers choose their executor at run time, but llama.h's
# matrix products are plain loops that the compiler vectorises.
ARCH ?= -march=native
RUN_FLAGS ?= -O3 $(ARCH) -ffp-contract=fast
TEST_FLAGS ?= -O2 -g -Wall -Wextra
INCLUDES = -I. -Itests -Iexamples
LIBS = -pthread -lm

HEADERS = $(wildcard *.h *.cuh)
DEPS = $(HEADERS) $(wildcard examples/*.h tests/*.h)
EXAMPLES = decode_contiguous chunked_prefill prefix_tree sparse_mask
NAIVE = naive_llama naive_llama_attn
TESTS = $(patsubst tests/%.c,%,$(wildcard tests/test_*.c tests/selftest.c))
FUZZ = $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
CORPUS = tests/fuzz/corpus
SIM = build/attn_sim build/attn_sim_check
FOREIGN = $(filter selftest test_cpu,$(TESTS))

# Arguments of test programs whose defaults take longer than a routine run should.
ARGS_test_cpu ?= 1 200
ARGS_sparse_mask = build/sparse_mask.png
ARGS_slow_test_cpu ?= 2 25
ARGS_slow_test_frame ?= 1 4
ARGS_slow_test_bits ?= 5 1
ARGS_slow_test_mask ?= 1 60
ARGS_slow_test_exact ?= 1 300
ARGS_slow_test_api ?= 1 1
ARGS_slow_test_tree ?= 1 20000
ARGS_slow_test_tails ?= 1 3
ARGS_slow_test_threads ?= 1 4
ARGS_slow_test_check ?= 1 12
ARGS_slow_test_faults ?= 1 10
ARGS_slow_test_noalloc ?= 1 2
ARGS_arm_test_cpu ?= 2 4

all: examples

run: build/generate
	@./build/generate $(ARGS)

# 60 frames a second while a character talks.
frame: build/frame_budget
	@./build/frame_budget $(ARGS)

build/generate build/frame_budget: build/%: examples/%.c $(DEPS) | build
	$(CC) $(RUN_FLAGS) $(INCLUDES) $< -o $@ $(LIBS)

examples: $(EXAMPLES:%=build/%) $(NAIVE:%=build/%) build/generate build/frame_budget

$(EXAMPLES:%=build/%) $(NAIVE:%=build/%): build/%: examples/%.c $(DEPS) | build
	$(CC) -O2 -g -Wall -Wextra $(INCLUDES) $< -o $@ $(LIBS)

# On a GPU; nvcc also compiles generate.c with the C compiler, as above.
NVCC ?= nvcc
CUDA_CODE ?= -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=compute_80
CUDA_EXAMPLES = cuda_decode cuda_prefill cuda_graph
CUDA_HOST = $(addprefix -Xcompiler ,$(ARCH) -ffp-contract=fast)

$(CUDA_EXAMPLES:%=build/%): build/%: examples/%.cu $(DEPS) | build
	$(NVCC) -O3 $(CUDA_CODE) $(INCLUDES) $< -o $@
build/llama_cuda.o: examples/llama_cuda.cu $(DEPS) | build
	$(NVCC) -O3 $(CUDA_CODE) $(INCLUDES) -c $< -o $@
build/generate_cuda: examples/generate.c build/llama_cuda.o $(DEPS) | build
	$(NVCC) -O3 $(CUDA_HOST) -DGENERATE_CUDA $(INCLUDES) $(filter %.c %.o,$^) -o $@ -lcublas
build/test_llama_cuda: tests/cuda/test_llama_cuda.c build/llama_cuda.o $(DEPS) | build
	$(NVCC) -O3 $(CUDA_HOST) $(INCLUDES) $(filter %.c %.o,$^) -o $@ -lcublas
examples-cuda:
	+@if command -v $(NVCC) >/dev/null; then \
	    $(MAKE_J) $(CUDA_EXAMPLES:%=build/%) build/generate_cuda build/test_llama_cuda; \
	else echo "skipped: no $(NVCC)"; fi
test-generate-cuda: build/generate examples-cuda
	@if nvidia-smi -L >/dev/null 2>&1 && command -v $(NVCC) >/dev/null; then \
	    $(RUNNER) -v ./build/test_llama_cuda -v "python3 tests/cuda/test_generate_cuda.py" \
	        $(foreach e,$(CUDA_EXAMPLES),-x ./build/$e); \
	else echo "skipped: no GPU or no $(NVCC)"; fi
.PHONY: examples-cuda test-generate-cuda

# What taking the headers in costs a program that has its own attention.
naive-diff:
	@diff -u examples/naive_llama.c examples/naive_llama_attn.c; true

# ---- tests

build/%: tests/%.c $(DEPS) | build
	$(CC) $(TEST_FLAGS) $(INCLUDES) $< -o $@ $(LIBS)
build/asan/%: tests/%.c $(DEPS) | build/asan
	$(CC) -O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	    -DTEST_SANITIZED $(INCLUDES) $< -o $@ $(LIBS)
build/asan/%: examples/%.c $(DEPS) | build/asan
	$(CC) -O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	    $(INCLUDES) $< -o $@ $(LIBS)
build/clang/%: tests/%.c $(DEPS) | build/clang
	$(CLANG) $(TEST_FLAGS) $(INCLUDES) $< -o $@ $(LIBS)
build/aarch64/%: tests/%.c $(DEPS) | build/aarch64
	$(AARCH64_CC) -static $(TEST_FLAGS) $(INCLUDES) $< -o $@ $(LIBS)
build build/asan build/clang build/aarch64:
	@mkdir -p $@

# One -j for the whole build unless the caller gave one; the programs then run $(JOBS) at a time.
MAKE_J = $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS))
RUNNER = bash tests/run.sh -j $(JOBS) -t $(LIMIT) --

programs: $(TESTS:%=build/%) $(SIM) $(FUZZ:%=build/replay/%) examples

test:
	@$(MAKE_J) programs
	@$(RUNNER) -s -m gguf,numpy "$(PYTHON) tests/test_generate.py ./build/generate --quick" \
	    -s -x "./build/frame_budget --fast" \
	    "bash tests/test_compile.sh" \
	    $(foreach t,$(TESTS),"./build/$t $(ARGS_$t)") \
	    "./build/attn_sim 1 200000" "./build/attn_sim_check 2 60000" \
	    -m gguf,numpy,tokenizers "$(PYTHON) tests/test_llama_py.py ./build/test_llama" \
	    $(foreach e,$(EXAMPLES),-x "./build/$e $(ARGS_$e)") \
	    "bash tests/test_naive.sh" $(foreach t,$(FUZZ),"./build/replay/$t $(CORPUS)/$t")

test-asan:
	@$(MAKE_J) $(TESTS:%=build/asan/%) $(EXAMPLES:%=build/asan/%) build/asan/generate \
	    build/asan/frame_budget build/asan/attn_sim
	@$(RUNNER) $(foreach t,$(TESTS),"./build/asan/$t $(ARGS_slow_$t)") \
	    "./build/asan/attn_sim 1 2000" \
	    $(foreach e,$(EXAMPLES),-x "./build/asan/$e $(ARGS_$e)") \
	    -x "./build/asan/generate --n-predict 2 --prompt 'The harbor code'" \
	    -x "./build/asan/frame_budget --fast --frames 30 --agents 500 --budget 100 --answer 2"

test-clang:
	@if command -v $(CLANG) >/dev/null; then \
	    $(MAKE_J) $(TESTS:%=build/clang/%) && \
	    $(RUNNER) $(foreach t,$(TESTS),"./build/clang/$t $(ARGS_$t)"); \
	else echo "skipped: no $(CLANG)"; fi

test-compile:
	@bash tests/test_compile.sh

# The executors for ARM, under emulation (which cannot say how fast they are).
test-aarch64:
	@if command -v $(AARCH64_CC) >/dev/null && command -v $(AARCH64_RUN) >/dev/null; then \
	    $(MAKE_J) $(FOREIGN:%=build/aarch64/%) && \
	    $(RUNNER) $(foreach t,$(FOREIGN),"$(AARCH64_RUN) ./build/aarch64/$t $(ARGS_arm_$t)"); \
	else echo "skipped: needs $(AARCH64_CC) and $(AARCH64_RUN)"; fi

# Which conditions of attn.h the tests show; fails when one is neither shown nor explained.
coverage:
	@PYTHON="$(PYTHON)" bash tests/coverage.sh
coverage-cpu:
	@PYTHON="$(PYTHON)" bash tests/coverage.sh cpu

# The same bits over compilers, flags, machines (under qemu), WebAssembly (node) and Windows (wine).
test-ports-fast test-ports:
	@bash tests/ports.sh -j $(JOBS) -t $(LIMIT) $(if $(filter %-fast,$@),fast,all) $(PORT)

# ---- everything. A check prints "N passed, N failed" last, or "skipped: why".
# test-compile is part of test.

ALL_CHECKS = test test-asan test-clang test-ports test-tsan test-msan test-valgrind fuzz-short sim \
    mutants coverage proof cuda test-cuda
ALL_PACKAGES = gcc g++ libc6-dev make clang libclang-rt-dev clang-19 llvm-19 libclang-rt-19-dev \
    binutils pkg-config python3-venv libstb-dev valgrind frama-c-base why3 cvc4 z3 qemu-user \
    gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-i686-linux-gnu libc6-dev-i386-cross \
    gcc-arm-linux-gnueabihf libc6-dev-armhf-cross gcc-riscv64-linux-gnu \
    libc6-dev-riscv64-cross gcc-s390x-linux-gnu libc6-dev-s390x-cross musl-tools wasi-libc lld \
    libclang-rt-14-dev-wasm32 nodejs gcc-mingw-w64-x86-64 gcc-mingw-w64-i686 wine64

test-all:
	@bash tests/run.sh -j 1 -t 5400 -- \
	    $(foreach c,$(ALL_CHECKS),$(if $(filter test-ports,$c),-v) "$(MAKE) --no-print-directory $c") \
	    -x "$(MAKE) --no-print-directory lint"

# As root, on Debian. 32-bit Windows programs need wine32 as well, from the i386 architecture.
deps-all: deps
	apt-get -q update
	DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $(ALL_PACKAGES)

# ---- more sanitizers, at small doses: each takes minutes on one core

TSAN = test_threads
MSAN = selftest test_tree test_tails
MEMCHECK = selftest test_tree test_tails test_cpu test_threads
ARGS_tsan_test_threads ?= 1 40
ARGS_msan_test_tree ?= 1 20000
ARGS_msan_test_tails ?= 1 25
ARGS_memcheck_test_tree ?= 1 1500
ARGS_memcheck_test_tails ?= 1 2
ARGS_memcheck_test_cpu ?= 1 2
ARGS_memcheck_test_threads ?= 1 2

build/tsan/%: tests/%.c $(DEPS) | build/tsan
	$(CLANG) -O1 -g -fsanitize=thread -fno-omit-frame-pointer $(INCLUDES) $< -o $@ $(LIBS)
build/msan/%: tests/%.c $(DEPS) | build/msan
	$(CLANG) -O1 -g -fsanitize=memory -fno-omit-frame-pointer $(INCLUDES) $< -o $@ $(LIBS)
build/tsan build/msan build/replay build/fuzz build/fuzz-static:
	@mkdir -p $@

test-tsan:
	@if command -v $(CLANG) >/dev/null; then \
	    $(MAKE_J) $(TSAN:%=build/tsan/%) && \
	    TSAN_OPTIONS=halt_on_error=1 \
	    $(RUNNER) $(foreach t,$(TSAN),"./build/tsan/$t $(ARGS_tsan_$t)"); \
	else echo "skipped: no $(CLANG)"; fi

test-msan:
	@if command -v $(CLANG) >/dev/null; then \
	    $(MAKE_J) $(MSAN:%=build/msan/%) && \
	    $(RUNNER) $(foreach t,$(MSAN),"./build/msan/$t $(ARGS_msan_$t)"); \
	else echo "skipped: no $(CLANG)"; fi

# Memcheck's processor has no AVX-512; what the programs find there is scalar and AVX2.
test-valgrind:
	@if command -v valgrind >/dev/null; then \
	    $(MAKE_J) $(MEMCHECK:%=build/%) && \
	    $(RUNNER) $(foreach t,$(MEMCHECK),"valgrind -q --error-exitcode=9 --exit-on-first-error=yes \
	        --leak-check=full ./build/$t $(ARGS_memcheck_$t)"); \
	else echo "skipped: no valgrind"; fi

# ---- fuzzing
#
# tests/fuzz/fuzz_*.c are libFuzzer targets; any compiler builds them to replay tests/fuzz/corpus,
# which make test does. fuzz-static makes build/fuzz-static, a folder that runs on any x86-64 Linux
# with bash: cd there, ./campaign.sh -s 500 -j 16 -r "1 2 3" -o /tmp/out.

SECONDS ?= 60
SEEDS ?= 1
FUZZ_DEPS = $(DEPS) $(wildcard tests/fuzz/*.h examples/generate.c)
FUZZ_FLAGS = -O1 -gline-tables-only -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined \
    -fno-sanitize-recover=all $(INCLUDES)
# Only fuzz_desc is about the executors; the others build ten times as fast without most of them.
FUZZ_EXECUTORS = $(if $(findstring fuzz_desc,$@),,-DATTN_CPU_SCALAR_ONLY)
FUZZ_LOADER = ld-linux-x86-64.so.2
MODEL = examples/models/recall.gguf

build/replay/%: tests/fuzz/%.c $(FUZZ_DEPS) | build/replay
	$(CC) -O1 -g -Wall -Wextra -DFUZZ_MAIN $(INCLUDES) $< -o $@ $(LIBS)
build/fuzz/%: tests/fuzz/%.c $(FUZZ_DEPS) | build/fuzz
	$(CLANG) $(FUZZ_FLAGS) $(FUZZ_EXECUTORS) $< -o $@ $(LIBS)
build/fuzz-static/%: tests/fuzz/%.c $(FUZZ_DEPS) | build/fuzz-static
	$(CLANG) $(FUZZ_FLAGS) $(FUZZ_EXECUTORS) $< -o $@ $(LIBS) -static-libstdc++ -static-libgcc -gz \
	    -Wl,--dynamic-linker=lib/$(FUZZ_LOADER) -Wl,-rpath,'$$ORIGIN/lib'

# Seeds too large for the tree: the head of a real model as a file of its own.
FUZZ_SEEDS = mkdir -p $(1)/seeds/fuzz_gguf && { printf '\0'; head -c 12000 $(MODEL); } \
    >$(1)/seeds/fuzz_gguf/header

fuzz-build:
	+@$(MAKE_J) $(FUZZ:%=build/fuzz/%)
	@$(call FUZZ_SEEDS,build/fuzz)

fuzz-short:
	+@if command -v $(CLANG) >/dev/null; then $(MAKE_J) fuzz-build && \
	    bash tests/fuzz/campaign.sh -s 20 -j $(JOBS) -b build/fuzz -o build/fuzz-out $(FUZZ); \
	else echo "skipped: no $(CLANG)"; fi

fuzz: fuzz-build
	bash tests/fuzz/campaign.sh -s $(SECONDS) -j $(JOBS) -r "$(SEEDS)" -b build/fuzz \
	    -o build/fuzz-out $(FUZZ)

fuzz-static:
	@$(MAKE_J) $(FUZZ:%=build/fuzz-static/%)
	@mkdir -p build/fuzz-static/lib
	@for f in $(FUZZ_LOADER) libc.so.6 libm.so.6; do \
	    cp -L $$($(CLANG) -print-file-name=$$f) build/fuzz-static/lib/ || exit 1; done
	@$(call FUZZ_SEEDS,build/fuzz-static)
	@rm -rf build/fuzz-static/corpus && cp -r $(CORPUS) build/fuzz-static/corpus
	@cp tests/fuzz/campaign.sh build/fuzz-static/
	@du -sh build/fuzz-static

# The simulator, plain and in the checked build: a dose in make test, all of it here.
OPS ?= 10000000
SIM_SEED ?= 1000
SIM_N = $(shell n=$$(( $(OPS) / 250000 )); echo $$(( n ? n : 1 )))
SIM_SHARDS = $(shell seq $(SIM_SEED) $$(( $(SIM_SEED) + $(SIM_N) - 1 )))
SIM_OPS = $(shell echo $$(( $(OPS) / $(SIM_N) )))

build/attn_sim_check: tests/attn_sim.c $(DEPS) | build
	$(CC) $(TEST_FLAGS) -DATTN_CHECK $(INCLUDES) $< -o $@ $(LIBS)

sim:
	@$(MAKE_J) $(SIM)
	@$(RUNNER) "./build/attn_sim_check $(SIM_SEED) 250000" \
	    $(foreach s,$(SIM_SHARDS),"./build/attn_sim $s $(SIM_OPS)")

# Bugs put into copies of the headers: those of the atlas by name, then random ones.
MUTANTS ?= 40
SEED ?= 1
mutants:
	@CC="$(CC)" python3 tests/mutate.py --planted --random $(MUTANTS) --seed $(SEED) -j $(JOBS)

# The Python side of the tests, in a place of its own.
deps:
	python3 -m venv build/venv
	build/venv/bin/python3 -m pip install --quiet gguf tokenizers numpy

bench: build/bench_cpu
	./build/bench_cpu $(ARGS)

build/bench_cpu: tests/bench/bench_cpu.c $(DEPS) | build
	$(CC) -O2 $(INCLUDES) $< -o $@ $(LIBS)

# Answers right against kept share, all selectors: half an hour (ARGS="--only 'exact*'" for some).
.PHONY: recall
recall: build/generate
	$(PYTHON) tests/bench/recall.py --csv build/recall.csv $(ARGS)

# On a machine with a GPU. Beside torch's attention: $(PYTHON) tests/bench/bench_cuda.py
NVCC ?= nvcc
bench-cuda: build/bench_cuda
	./build/bench_cuda $(ARGS)

build/bench_cuda: tests/bench/bench_cuda.cu $(DEPS) | build
	$(NVCC) -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a $(INCLUDES) $< -o $@

# Proofs of attn.h's reference counts and offsets; needs frama-c-base, why3, cvc4 and z3 (Debian).
proof:
	@bash tests/proof/run.sh
proof-planted:
	@bash tests/proof/run.sh --planted

# ---- CUDA
#
# cuda compiles attn_cuda.cuh for every architecture (no GPU needed) and links it with a C program.
# test-cuda runs tests/cuda/test_cuda.c on the GPU at hand: with code for it, then with PTX for
# sm_75 and sm_80 that the driver compiles, then a small dose under each tool of compute-sanitizer.

NVCC ?= nvcc
SANITIZER ?= compute-sanitizer
NVCC_FLAGS ?= -O2 -std=c++17 -Xcompiler -Wall,-Wextra
CUDA_ARCHS ?= 75 80 89 90a 100 120
CUDA_SM = $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
    | head -n 1))
CUDA_ARCH ?= $(if $(filter-out 90,$(CUDA_SM)),$(CUDA_SM),90a)
ARGS_test_cuda ?= 1 150
ARGS_ptx_test_cuda ?= 500 40
ARGS_sanitizer_test_cuda ?= 900 4
ARGS_sanitizer_test_offload_cuda ?= 900 2
SANITIZE = command -v $(SANITIZER) >/dev/null || { echo skipped: no $(SANITIZER); exit 77; }; \
    TEST_CUDA_BARE=1 $(SANITIZER) --tool $(1) --error-exitcode 9 --report-api-errors no \
    ./build/cuda/$(2)_$(CUDA_ARCH)

cuda: | build/cuda
	@if command -v $(NVCC) >/dev/null; then \
	    $(RUNNER) $(foreach a,$(CUDA_ARCHS),-v "$(PYTHON) tests/cuda/compile.py $a \
	        build/cuda/all_$a.o $(NVCC) $(NVCC_FLAGS) -I. -c tests/cuda/all.cu \
	        -gencode arch=compute_$a,code=sm_$a -o build/cuda/all_$a.o") \
	        -x "$(NVCC) -O1 -std=c++17 -Xcompiler -Wall,-Wextra,-Werror -Werror all-warnings -I. \
	        -c tests/cuda/cpu.cu -o build/cuda/cpu.o" \
	        -s "$(CC) -std=c99 -Wall -Wextra $(INCLUDES) -c tests/cuda/user.c \
	        -o build/cuda/user.o && $(NVCC) build/cuda/user.o \
	        build/cuda/all_$(firstword $(CUDA_ARCHS)).o -o build/cuda/user && ./build/cuda/user"; \
	else echo "skipped: no $(NVCC)"; fi

test-cuda:
	@if ! command -v $(NVCC) >/dev/null; then echo "skipped: no $(NVCC)"; \
	elif [ -z "$(CUDA_SM)" ]; then echo "skipped: no GPU"; \
	else $(MAKE_J) $(addprefix build/cuda/test_cuda_,$(CUDA_ARCH) ptx75 ptx80) \
	    build/cuda/test_select_cuda_$(CUDA_ARCH) build/cuda/test_offload_cuda_$(CUDA_ARCH) && \
	    bash tests/run.sh -j 1 -t $(LIMIT) -- \
	    -v "./build/cuda/test_cuda_$(CUDA_ARCH) $(ARGS_test_cuda)" \
	    -v ./build/cuda/test_select_cuda_$(CUDA_ARCH) \
	    -v ./build/cuda/test_offload_cuda_$(CUDA_ARCH) \
	    $(foreach a,ptx75 ptx80,-v "./build/cuda/test_cuda_$a $(ARGS_ptx_test_cuda)") \
	    $(foreach t,memcheck racecheck initcheck,"$(call SANITIZE,$t,test_cuda) \
	        $(ARGS_sanitizer_test_cuda)" \
	        "$(call SANITIZE,$t,test_offload_cuda) $(ARGS_sanitizer_test_offload_cuda)"); \
	fi

# The program is C with the runtime's headers; only the kernels differ from one to the next.
build/cuda/test_cuda.o: tests/cuda/test_cuda.c tests/cuda/device.h $(DEPS) | build/cuda
	$(NVCC) -O2 -g -Xcompiler -std=gnu11,-fopenmp,-Wall,-Wextra $(INCLUDES) -c $< -o $@
build/cuda/impl_ptx%.o: tests/cuda/impl.cu $(HEADERS) | build/cuda
	$(NVCC) $(NVCC_FLAGS) -I. -DTEST_PTX=$* -gencode arch=compute_$*,code=compute_$* -c $< -o $@
build/cuda/impl_%.o: tests/cuda/impl.cu $(HEADERS) | build/cuda
	$(NVCC) $(NVCC_FLAGS) -I. -gencode arch=compute_$*,code=sm_$* -c $< -o $@
build/cuda/test_cuda_%: build/cuda/test_cuda.o build/cuda/impl_%.o
	$(NVCC) -Xcompiler -fopenmp $^ -o $@
build/cuda/test_select_cuda.o: tests/cuda/test_select_cuda.c tests/test_select.c \
    tests/cuda/device.h $(DEPS) | build/cuda
	$(NVCC) -O1 -g -Xcompiler -std=gnu11,-fopenmp $(INCLUDES) -c $< -o $@
build/cuda/test_select_cuda_%: build/cuda/test_select_cuda.o build/cuda/impl_%.o
	$(NVCC) -Xcompiler -fopenmp $^ -o $@
build/cuda/test_offload_cuda.o: tests/cuda/test_offload_cuda.c tests/cuda/test_cuda.c \
    tests/cuda/device.h $(DEPS) | build/cuda
	$(NVCC) -O2 -g -Xcompiler -std=gnu11,-fopenmp $(INCLUDES) -c $< -o $@
build/cuda/test_offload_cuda_%: build/cuda/test_offload_cuda.o build/cuda/impl_%.o
	$(NVCC) -Xcompiler -fopenmp $^ -o $@
build/cuda:
	@mkdir -p $@

# ---- house rules that a compiler does not know

SOURCES = $(HEADERS) $(wildcard examples/*.[ch] examples/*.cu tests/*.[ch] tests/*.sh \
    tests/*.py tests/*.cjs tests/*/*.[ch] tests/*/*.cpp tests/*/*.cu tests/*/*.sh \
    tests/*/*.py) .ci/run

build/lint.o: $(HEADERS) | build
	printf '#define ATTN_IMPLEMENTATION\n#include "attn.h"\n#include "attn_cpu.h"\n' > build/lint.c
	$(CC) -O0 -I. -c build/lint.c -o $@

lint: build/lint.o
	@LC_ALL=C awk 'length > 100 { print FILENAME ":" FNR ": over 100 columns"; bad = 1 } \
	    /\t/ { print FILENAME ":" FNR ": tab"; bad = 1 } \
	    /[^ -~\t]/ { print FILENAME ":" FNR ": not ASCII"; bad = 1 } \
	    /[ \t]$$/ { print FILENAME ":" FNR ": space at the end"; bad = 1 } \
	    END { exit bad }' $(SOURCES)
	@nm -g --defined-only build/lint.o | awk 'NF == 3 && $$3 !~ /^_?attn_/ { print $$3; bad = 1 } \
	    END { exit bad }'
	@echo "lint: clean"

# ---- install

VERSION = $(shell awk '$$2 == "ATTN_VERSION" { \
    printf "%d.%d.%d", $$3 / 10000, $$3 / 100 % 100, $$3 % 100 }' attn.h)
INCLUDEDIR = $(DESTDIR)$(PREFIX)/include
PKGDIR = $(DESTDIR)$(PREFIX)/share/pkgconfig
CMAKEDIR = $(DESTDIR)$(PREFIX)/share/cmake/attn

install:
	mkdir -p $(INCLUDEDIR) $(PKGDIR) $(CMAKEDIR)
	for h in $(HEADERS); do install -m 644 $$h $(INCLUDEDIR)/ || exit 1; done
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: attn' \
	    'Description: attention over paged KV shared through a prefix tree (headers)' \
	    'Version: $(VERSION)' 'Cflags: -I$${includedir}' > $(PKGDIR)/attn.pc
	printf '%s\n' 'if(NOT TARGET attn::attn)' \
	    '  get_filename_component(_attn_root "$${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)' \
	    '  add_library(attn::attn INTERFACE IMPORTED)' \
	    '  set_target_properties(attn::attn PROPERTIES' \
	    '    INTERFACE_INCLUDE_DIRECTORIES "$${_attn_root}/include")' \
	    '  unset(_attn_root)' 'endif()' > $(CMAKEDIR)/attn-config.cmake
	printf '%s\n' 'set(PACKAGE_VERSION "$(VERSION)")' \
	    'if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)' \
	    '  set(PACKAGE_VERSION_EXACT TRUE)' 'endif()' \
	    'if(NOT PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)' \
	    '  set(PACKAGE_VERSION_COMPATIBLE TRUE)' 'endif()' > $(CMAKEDIR)/attn-config-version.cmake

clean:
	rm -rf build

.PHONY: all run frame examples naive-diff programs test test-asan test-clang test-compile
.PHONY: test-aarch64 coverage coverage-cpu test-ports-fast test-ports test-all deps-all deps
.PHONY: bench lint install cuda test-cuda
.PRECIOUS: build/cuda/impl_%.o build/cuda/impl_ptx%.o
.PHONY: proof proof-planted mutants sim test-tsan test-msan test-valgrind
.PHONY: fuzz fuzz-build fuzz-short fuzz-static clean
.DELETE_ON_ERROR:

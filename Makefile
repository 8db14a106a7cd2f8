# attn - plain make, no configure step. Everything built goes under build/.
#
#   make run [ARGS='--kv int8']   the main job (needs cc and make only)
#   make test                     everything that is fast; ends with "N passed, N failed"
#   make test-asan test-clang test-compile test-aarch64
#   make proof | proof-planted    Frama-C on attn.h; bugs that the proofs must notice
#   make examples | bench | lint | deps | install [PREFIX= DESTDIR=] | clean

CC ?= cc
CLANG ?= clang
AARCH64_CC ?= aarch64-linux-gnu-gcc
AARCH64_RUN ?= qemu-aarch64
PYTHON ?= $(if $(wildcard build/venv/bin/python3),build/venv/bin/python3,python3)
PREFIX ?= /usr/local
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
LIMIT ?= 500# seconds a test program may take

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
FOREIGN = $(filter selftest test_cpu,$(TESTS))

# Arguments of test programs whose defaults take longer than a routine run should.
ARGS_test_cpu ?= 1 200
ARGS_sparse_mask = build/sparse_mask.png
ARGS_slow_test_cpu ?= 2 25
ARGS_slow_test_bits ?= 5 1
ARGS_slow_test_mask ?= 1 60
ARGS_slow_test_api ?= 1 1
ARGS_slow_test_tree ?= 1 20000
ARGS_arm_test_cpu ?= 2 4

all: examples

run: build/generate
	@./build/generate $(ARGS)

build/generate: examples/generate.c $(DEPS) | build
	$(CC) $(RUN_FLAGS) $(INCLUDES) $< -o $@ $(LIBS)

examples: $(EXAMPLES:%=build/%) $(NAIVE:%=build/%) build/generate

$(EXAMPLES:%=build/%) $(NAIVE:%=build/%): build/%: examples/%.c $(DEPS) | build
	$(CC) -O2 -g -Wall -Wextra $(INCLUDES) $< -o $@ $(LIBS)

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

programs: $(TESTS:%=build/%) examples

test:
	@$(MAKE_J) programs
	@$(RUNNER) -s -m gguf,numpy "$(PYTHON) tests/test_generate.py ./build/generate --quick" \
	    "bash tests/test_compile.sh" \
	    $(foreach t,$(TESTS),"./build/$t $(ARGS_$t)") \
	    -m gguf,numpy,tokenizers "$(PYTHON) tests/test_llama_py.py ./build/test_llama" \
	    $(foreach e,$(EXAMPLES),-x "./build/$e $(ARGS_$e)") \
	    "bash tests/test_naive.sh"

test-asan:
	@$(MAKE_J) $(TESTS:%=build/asan/%) $(EXAMPLES:%=build/asan/%) build/asan/generate
	@$(RUNNER) $(foreach t,$(TESTS),"./build/asan/$t $(ARGS_slow_$t)") \
	    $(foreach e,$(EXAMPLES),-x "./build/asan/$e $(ARGS_$e)") \
	    -x "./build/asan/generate --n-predict 2 --prompt 'The harbor code'"

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

# The Python side of the tests, in a place of its own.
deps:
	python3 -m venv build/venv
	build/venv/bin/python3 -m pip install --quiet gguf tokenizers numpy

bench: build/bench_cpu
	./build/bench_cpu $(ARGS)

build/bench_cpu: tests/bench/bench_cpu.c $(DEPS) | build
	$(CC) -O2 $(INCLUDES) $< -o $@ $(LIBS)

# Proofs of attn.h's reference counts and offsets; needs frama-c-base, why3, cvc4 and z3 (Debian).
proof:
	@bash tests/proof/run.sh
proof-planted:
	@bash tests/proof/run.sh --planted
.PHONY: proof proof-planted

# ---- house rules that a compiler does not know

SOURCES = $(HEADERS) $(wildcard examples/*.[ch] tests/*.[ch] tests/*.sh tests/*.py tests/*/*.[ch] \
    tests/*/*.cpp) .ci/run

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

.PHONY: all run examples naive-diff programs test test-asan test-clang test-compile test-aarch64 \
    deps bench lint install clean
.DELETE_ON_ERROR:

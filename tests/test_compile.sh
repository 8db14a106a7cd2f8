#!/usr/bin/env bash
# The compile matrix: the files of tests/compile in every language version, with gcc and clang where
# found, at the full warning list as errors; then a few real builds that are linked and run.
# Prints 'N passed, N failed'. Run from the repository root.
LIST="-Wall -Wextra -Wconversion -Wsign-conversion -Wshadow -Wpedantic -Wundef -Werror"
INC="-I. -Itests/compile"
out=build/compile
mkdir -p "$out" || exit 2
passed=0 failed=0

try() { # WHAT COMMAND...: passes when the command succeeds in silence
    local what=$1 text
    shift
    if text=$(timeout 120 "$@" 2>&1 </dev/null) && [ -z "$text" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAIL: %s\n' "$what"
        printf '%s\n' "$text" | grep -vE '^(In file|cc1|[0-9]+ error)' | head -n 6
    fi
}

compilers=
for c in gcc clang; do command -v $c >/dev/null && compilers="$compilers $c"; done
[ -n "$compilers" ] || compilers=cc

# ---- syntax and types: cheap, so all of it
for c in $compilers; do
    for std in c99 c11 c17 gnu17; do
        for f in only public all; do
            try "$c -std=$std $f.c" $c -std=$std $LIST $INC -fsyntax-only tests/compile/$f.c
        done
    done
    for std in c++11 c++17 c++20; do
        for f in only public all; do
            try "$c -std=$std $f.c" $c -x c++ -std=$std $LIST $INC -fsyntax-only tests/compile/$f.c
        done
    done
    if [ -e attn_cuda.cuh ]; then # its public part needs neither nvcc nor a CUDA header
        for std in c99 c11; do
            try "$c -std=$std cuda.c" $c -std=$std $LIST $INC -fsyntax-only tests/compile/cuda.c
        done
        try "$c -std=c++11 cuda.c" $c -x c++ -std=c++11 $LIST $INC -fsyntax-only \
            tests/compile/cuda.c
        try "$c -std=c99 user.c" $c -std=c99 -Wall -Wextra -Wpedantic $INC -Itests -fsyntax-only \
            tests/cuda/user.c
    fi
    for f in core cpu static_a; do
        try "$c -std=c99 $f.c" $c -std=c99 $LIST $INC -fsyntax-only tests/compile/$f.c
    done
    for d in -DATTN_CPU_SCALAR_ONLY -march=native -ffast-math -fopenmp -DATTN_CHECK \
        -DATTN_CHECK= -DATTN_CHECK=16; do
        try "$c $d" $c -std=c99 $d $LIST $INC -fsyntax-only tests/compile/all.c
    done
    try "$c -DATTN_CHECK C++" $c -x c++ -std=c++11 -DATTN_CHECK $LIST $INC -fsyntax-only \
        tests/compile/all.c
    for e in decode_contiguous chunked_prefill prefix_tree sparse_mask naive_llama \
        naive_llama_attn; do
        try "$c $e.c" $c -std=c99 $LIST -I. -fsyntax-only examples/$e.c
    done
    try "$c generate.c" $c -std=gnu99 $LIST -I. -Iexamples -fsyntax-only examples/generate.c
    try "$c generate.c, CUDA" $c -std=gnu99 $LIST -DGENERATE_CUDA -I. -Iexamples -fsyntax-only \
        examples/generate.c
done
# 32-bit targets: where the C library's headers for them are installed.
if echo '#include <stdint.h>' | gcc -m32 -fsyntax-only -x c - 2>/dev/null; then
    for f in public all; do
        try "-m32 $f.c" gcc -m32 -std=c99 $LIST $INC -fsyntax-only tests/compile/$f.c
    done
else
    echo "skipped: -m32, no 32-bit headers"
fi
if command -v aarch64-linux-gnu-gcc >/dev/null; then
    try "aarch64 all.c" aarch64-linux-gnu-gcc -std=c99 $LIST $INC -fsyntax-only tests/compile/all.c
fi

# ---- optimised builds: flow analysis warns here only; each one runs
for flags in "gcc -O2" "clang -O2" "gcc -O0" "gcc -O3 -march=native" "gcc -O1 -ffast-math" \
    "gcc -O1 -DATTN_CPU_SCALAR_ONLY"; do
    command -v ${flags%% *} >/dev/null || continue
    try "$flags" $flags -std=c99 $LIST $INC tests/compile/all.c -o $out/all
    try "$flags: runs" $out/all
    rm -f $out/all
done

# ---- core and CPU implementations apart, the user in C++
cc=${compilers##* } # the last one found: the loop above was mostly the first one's
for f in core cpu; do try "$cc $f.c" $cc -O0 -std=c99 $INC -c tests/compile/$f.c -o $out/$f.o; done
try "user.cpp" $cc -std=c++11 $LIST $INC -c tests/compile/user.cpp -o $out/user.o
try "core + cpu + user" $cc $out/core.o $out/cpu.o $out/user.o -o $out/apart
try "core + cpu + user: runs" $out/apart
nm -g --defined-only $out/core.o $out/cpu.o |
    awk 'NF == 3 && $3 !~ /^_?attn_/ { print $3 } { n++ } END { if (n < 50) print n " symbols?" }' \
        >$out/foreign
try "only attn_ symbols" cat $out/foreign

# ---- two private copies
for f in static_a static_b; do
    try "$f.c" $cc -O0 -std=c99 $LIST $INC -c tests/compile/$f.c -o $out/$f.o
done
try "static copies" $cc $out/static_a.o $out/static_b.o -o $out/copies
try "static copies: runs" $out/copies
nm -g --defined-only $out/static_a.o $out/static_b.o | awk '$3 ~ /attn/ { print $3 }' \
    >$out/exported
try "static copies export nothing" cat $out/exported

# ---- the README's program
awk '/^```c/ { on = 1; next } /^```/ { on = 0 } on' README.md >$out/readme.c
try "README" $cc -std=gnu99 -O0 $LIST -I. $out/readme.c -o $out/readme
try "README: right" bash -c "$out/readme | grep -v '^success: 1.000000'; exit \${PIPESTATUS[0]}"

# ---- what install leaves is enough
try "install" bash -c "make -s install DESTDIR=$PWD/$out/root PREFIX=/usr >/dev/null"
try "installed headers" $cc -std=c99 -I$out/root/usr/include -fsyntax-only tests/compile/only.c
if command -v pkg-config >/dev/null; then
    try "pkg-config" env PKG_CONFIG_PATH=$out/root/usr/share/pkgconfig pkg-config --exists attn
fi
if command -v cmake >/dev/null; then
    mkdir -p $out/cmake
    printf '%s\n' 'cmake_minimum_required(VERSION 3.13)' 'project(x C)' \
        'find_package(attn 0.1 REQUIRED)' 'add_executable(x x.c)' \
        'target_link_libraries(x attn::attn)' >$out/cmake/CMakeLists.txt
    cp tests/compile/only.c $out/cmake/x.c
    try "cmake" bash -c "cmake -S $out/cmake -B $out/cmake/b \
        -DCMAKE_PREFIX_PATH=$PWD/$out/root/usr \
        >/dev/null && cmake --build $out/cmake/b >/dev/null && $out/cmake/b/x"
fi

echo "$passed passed, $failed failed"
exit $((failed != 0))

#!/usr/bin/env bash
# Taking the headers into a naive inference loop: at most 30 changed lines, and the same tokens.
# Needs build/naive_llama and build/naive_llama_attn (make examples).
passed=0 failed=0
check() {
    if [ "$1" = 1 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAIL: $2"; fi
}
# Lines taken out count as much as lines put in.
n=$(diff examples/naive_llama.c examples/naive_llama_attn.c | grep -c '^[<>]')
check $((n > 0 && n <= 30)) "$n changed lines"
for length in 1 7 257 400; do
    a=$(./build/naive_llama $length) && b=$(./build/naive_llama_attn $length)
    check $((${#a} > 0)) "naive_llama $length says nothing"
    if [ "$a" = "$b" ]; then same=1; else same=0; fi
    check $same "other tokens than the naive loop's at length $length"
done
# A loop that went around in one token would hide a wrong attention.
n=$(./build/naive_llama 400 | tr ' ' '\n' | sort -u | wc -l)
check $((n > 30)) "only $n different tokens"
echo "$passed passed, $failed failed"
exit $((failed != 0))

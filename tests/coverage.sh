#!/usr/bin/env bash
# tests/coverage.sh [cpu] - which branches of attn.h the tests take, condition by condition.
# With cpu: the same of what attn_cpu.h does around its kernels, as a report that fails nothing.
#
# The programs below are built with clang's source coverage and run; tests/coverage.py adds their
# counts up. Two things are asked of every condition (a leaf of &&, || and !) in attn.h:
#
#   outcomes    it was true at least once and false at least once
#   alone       where it is one of several in a decision: two executions were seen in which the
#               decision came out differently, this condition differed, and every other one was
#               the same or not evaluated. This is MC/DC, unique cause with short-circuit masking,
#               as measured by clang's test vectors (-fcoverage-mcdc).
#
# In a chain of && alone, or of || alone, the second follows from the first: evaluating a condition
# means that all before it were neutral, so its deciding outcome decides; the execution in which
# every one was neutral, without which the last condition lacks an outcome, is the other half of
# the pair for all. Where && and || are mixed it does not follow: in (a || b) && c, b may have had
# both outcomes and yet never made a difference. So nothing is inferred here: every decision is
# measured, and one that clang cannot measure (its warning says which) is a failure. A pair has to
# come from one program: what two programs show only together does not count.
#
# What no input can reach is listed with its reason in tests/coverage_gaps.txt; an entry that was
# covered after all, or whose line is gone, is a failure too. Ends with "N passed, N failed".
# Exit status 77: no clang >= 18 with its llvm-cov and run-time library.
cd "$(dirname "$0")/.." || exit 2
out=build/coverage
rm -rf $out
mkdir -p $out || exit 2

tools= # of the newest clang that can do it: its suffix
for suffix in -22 -21 -20 -19 -18 ""; do
    echo 'int main(int argc, char **argv) { return argc > 9 && argv != 0; }' >$out/probe.c
    if command -v llvm-cov$suffix llvm-profdata$suffix >/dev/null && clang$suffix \
        -fprofile-instr-generate -fcoverage-mapping -fcoverage-mcdc $out/probe.c -o $out/probe \
        2>/dev/null; then
        tools=yes
        break
    fi
done
[ -n "$tools" ] || { echo "needs clang-19, llvm-19 and libclang-rt-19-dev"; exit 77; }

failed=0
# program NAME ARGUMENTS. These reach every condition; the others would only take longer.
program() {
    local name=$1 at=$out/$1 start=$SECONDS
    shift
    clang$suffix -O1 -fprofile-instr-generate -fcoverage-mapping -fcoverage-mcdc -I. -Itests \
        -Iexamples "tests/$name.c" -o "$at" -pthread -lm 2>"$at.log" &&
        LLVM_PROFILE_FILE=$at.profraw timeout "${LIMIT:-500}" "$at" "$@" >>"$at.log" 2>&1
    if [ $? != 0 ]; then
        tail -n 20 "$at.log"
        echo "$name: failed"
        failed=$((failed + 1))
        return
    fi
    if grep -E 'attn\.h:.*unsupported MC/DC' "$at.log"; then failed=$((failed + 1)); fi
    llvm-profdata$suffix merge -o "$at.profdata" "$at.profraw" && llvm-cov$suffix export "$at" \
        -instr-profile "$at.profdata" attn.h attn_cpu.h >"$at.json" || failed=$((failed + 1))
    printf '%-14s %4d s\n' "$name" $((SECONDS - start))
}

program test_edges
program test_tree 1 100000
program test_mask 1 300
program test_api 1 1
program test_frame 1 2
program test_faults 1 2
if [ "$1" = cpu ]; then
    program test_cpu 1 60
    program test_bits 1 2
    ${PYTHON:-python3} tests/coverage.py attn_cpu.h --report \
        impl-dispatch,impl-store,impl-tasks,impl-run $out/*.json
    exit $failed
fi

${PYTHON:-python3} tests/coverage.py attn.h tests/coverage_gaps.txt $out/*.json >$out/report.txt
cat $out/report.txt
tail -n 1 $out/report.txt | {
    read -r passed _ bad _
    [ $failed = 0 ] || echo "$passed passed, $((bad + failed)) failed"
    [ "$bad" = 0 ] && [ $failed = 0 ]
}

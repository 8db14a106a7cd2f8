#!/usr/bin/env bash
# tests/fuzz/campaign.sh [OPTION...] [TARGET...] - runs fuzz targets that are built already.
#
#   -b DIR      programs fuzz_*, perhaps with lib/ and seeds/ beside them (default: where this
#               script lies if programs lie there, else build/fuzz)
#   -c DIR      corpus, one folder per target (default: corpus/ beside this script)
#   -o DIR      output (default: build/fuzz-out)
#   -s SECONDS  of each process (default 20)
#   -r "SEEDS"  one process per target and seed (default "1")
#   -j JOBS     processes at a time (default 1)
#
# Processes of one target share what they find. The output folder gets summary.txt, at most 8
# inputs that failed (crash.TARGET.N), the end of each failed log, and corpus.tar.gz: everything
# found, merged to the smallest set with the same coverage. Needs bash, awk, tar and coreutils; the
# last line is "N passed, N failed", one per target.
here=$(cd "$(dirname "$0")" && pwd)
bin=build/fuzz corpus=$here/corpus out=build/fuzz-out seconds=20 seeds=1 jobs=1
ls "$here"/fuzz_* 2>/dev/null | grep -qv '\.c$' && bin=$here
while getopts b:c:o:s:r:j: o; do
    case $o in
    b) bin=$OPTARG ;;
    c) corpus=$OPTARG ;;
    o) out=$OPTARG ;;
    s) seconds=$OPTARG ;;
    r) seeds=$OPTARG ;;
    j) jobs=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
corpus=$(cd "$corpus" 2>/dev/null && pwd)
cd "$bin" || exit 2 # programs that bring their C library find it from here
bin=$PWD
if [ $# = 0 ]; then
    for t in fuzz_*; do if [ -f "$t" ] && [ -x "$t" ]; then set -- "$@" "$t"; fi; done
fi
[ $# != 0 ] || { echo "no programs in $bin"; echo "0 passed, 1 failed"; exit 1; }
work=$(mktemp -d "$out/work.XXXXXX") || exit 2
trap 'rm -rf "$work"' EXIT
# Looking for leaks needs ptrace and /proc, which not every container gives.
leaks=1
ASAN_OPTIONS=detect_leaks=1 ./"$1" -runs=1 >/dev/null 2>&1 || leaks=0
export ASAN_OPTIONS=detect_leaks=$leaks:allocator_may_return_null=1

longest() { # bytes of an input
    case $1 in
    fuzz_gguf) echo 16384 ;;
    *) echo 800 ;;
    esac
}

inputs() { # TARGET: folders to start from
    local d
    for d in "$corpus/$1" "$bin/seeds/$1"; do if [ -d "$d" ]; then echo "$d"; fi; done
}

one() { # TARGET SEED
    local log=$work/$1.$2.log
    mkdir -p "$work/$1.found" "$work/$1.bad"
    TIMEFORMAT='%U %S'
    # shellcheck disable=SC2046 # folders are words here
    { time ./"$1" -seed="$2" -max_total_time="$seconds" -max_len="$(longest "$1")" -len_control=0 \
        -timeout=25 -report_slow_units=25 -rss_limit_mb=2560 -print_final_stats=1 \
        -close_fd_mask=1 -artifact_prefix="$work/$1.bad/" "$work/$1.found" $(inputs "$1") \
        >"$log" 2>&1; } 2>"$work/$1.$2.time"
    echo $? >"$work/$1.$2.rc"
}

for seed in $seeds; do
    for t in "$@"; do
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
        one "$t" "$seed" &
    done
done
wait

merge() { # TARGET: the found and the given, without what adds nothing
    mkdir -p "$work/corpus/$1"
    # shellcheck disable=SC2046
    ./"$1" -merge=1 -close_fd_mask=1 -rss_limit_mb=2560 "$work/corpus/$1" $(inputs "$1") \
        "$work/$1.found" >"$work/$1.merge" 2>&1
}

stat_sum() { # TARGET NAME
    cat "$work/$1".*.log | awk -v k="stat::$2:" '$1 == k { s += $2 } END { printf "%d", s }'
}

passed=0 failed=0 kept=0
{
    echo "seconds per process $seconds, seeds $seeds, jobs $jobs, leaks looked for: $leaks"
    printf '%-12s %9s %9s %7s %9s %7s %9s %7s\n' target runs CPU-s exec/s features edges \
        'files/KB' failed
} | tee "$out/summary.txt"
for t in "$@"; do
    bad=0
    for seed in $seeds; do [ "$(cat "$work/$t.$seed.rc")" = 0 ] || bad=$((bad + 1)); done
    merge "$t"
    runs=$(stat_sum "$t" number_of_executed_units)
    cpu=$(cat "$work/$t".*.time | awk '{ s += $1 + $2 } END { printf "%.0f", s }')
    cov=$(grep -ho 'cov: [0-9]* ft: [0-9]*' "$work/$t".*.log |
        awk '{ if ($2 > c) c = $2; if ($4 > f) f = $4 } END { printf "%d %d", f, c }')
    files=$(find "$work/corpus/$t" -type f | wc -l)
    size=$(cat "$work/corpus/$t"/* 2>/dev/null | wc -c)
    if [ "$runs" = 0 ]; then bad=$((bad + 1)); fi # a target that ran nothing has shown nothing
    if [ $bad = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-12s %9d %9d %7d %9d %7d %9s %7d\n' "$t" "$runs" "$cpu" \
        "$((runs / (cpu > 0 ? cpu : 1)))" $cov "$files/$((size / 1024))" $bad |
        tee -a "$out/summary.txt"
    for f in "$work/$t.bad"/*; do
        if [ -f "$f" ] && [ $kept -lt 8 ]; then
            kept=$((kept + 1))
            cp "$f" "$out/crash.$t.$kept"
        fi
    done
    [ $bad = 0 ] || for seed in $seeds; do
        [ "$(cat "$work/$t.$seed.rc")" = 0 ] ||
            { echo "---- $t, seed $seed"; grep -avE '^#[0-9]+[[:space:]]' "$work/$t.$seed.log" |
                tail -n 60; } >>"$out/failed-logs.txt"
    done
done
tar -C "$work" -czf "$out/corpus.tar.gz" corpus
echo "$passed passed, $failed failed" | tee -a "$out/summary.txt"
[ $failed = 0 ]

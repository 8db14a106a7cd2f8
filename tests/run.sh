#!/usr/bin/env bash
# tests/run.sh [-j N] [-t SECONDS] COMMAND... - runs test programs and adds up their verdicts.
#
# A COMMAND is a shell command line that prints "N passed, N failed" last; ending without that line,
# a nonzero exit or running past the limit is a failure of its own. Exit status 77 or a last line
# "skipped: why": skipped, said again at the end. "-x COMMAND" counts by its exit status alone (1
# passed); "-m MODULES COMMAND" is skipped where its Python, the command's first word, lacks a
# module; "-s COMMAND" runs alone (its threads spin on every core); "-v COMMAND" shows all that it
# prints. The last line is the sum.
jobs=1 limit=300
while getopts j:t: o; do
    case $o in
    j) jobs=$OPTARG ;;
    t) limit=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
logs=$(mktemp -d) || exit 2
trap 'rm -rf "$logs"' EXIT

# one INDEX BY_STATUS MODULES COMMAND SHOW: leaves "passed failed skipped" in a file, so that jobs
# can run side by side without a lock.
one() {
    local log=$logs/$1.log start=$SECONDS rc line p=0 f=0 s=0 note=
    if [ -n "$3" ] && ! "${4%% *}" -c "import $3" 2>/dev/null; then
        echo "Python modules $3 (make deps)" >"$log"
        rc=77
    else
        timeout -k 5 "$limit" sh -c "$4" >"$log" 2>&1 </dev/null
        rc=$?
    fi
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ $rc = 77 ]; then
        s=1 note="skipped: $(tail -n 1 "$log")"
    elif [ "$2" = 1 ]; then
        if [ $rc = 0 ]; then p=1; else f=1 note="exit $rc"; fi
    elif [ $rc = 0 ] && [ -z "$line" ] && tail -n 1 "$log" | grep -q '^skipped: '; then
        s=1 note=$(tail -n 1 "$log")
    elif [ -n "$line" ]; then
        read -r p _ f _ <<<"$line"
        if [ $rc != 0 ] && [ "$f" = 0 ]; then f=1 note="exit $rc"; fi
    else
        f=1 note="no verdict, exit $rc"
    fi
    if [ $rc = 124 ] || [ $rc = 137 ]; then note="stopped after $limit s"; fi
    echo "$p $f $s" >"$logs/$1.sum"
    printf '%-44s %8d passed %4d failed %4d s  %s\n' "$4" "$p" "$f" $((SECONDS - start)) \
        "$note"
    if [ "$5" = 1 ]; then cat "$log"
    elif [ "$f" != 0 ]; then tail -n 40 "$log" | sed 's/^/    /'
    fi
}

n=0 by_status=0 modules= show=0
while [ $# != 0 ]; do
    alone=0
    if [ "$1" = -s ]; then alone=1 && shift && wait; fi
    if [ "$1" = -v ]; then show=1 && shift; fi
    case $1 in
    -x) by_status=1 && shift ;;
    -m) modules=$2 && shift 2 ;;
    esac
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    one "$n" $by_status "$modules" "$1" $show &
    if [ $alone = 1 ]; then wait; fi
    n=$((n + 1)) by_status=0 modules= show=0
    shift
done
wait

cat "$logs"/*.sum 2>/dev/null | awk -v n="$n" '
    { p += $1; f += $2; s += $3 }
    END {
        if (NR != n || p == 0) f++   # a lost verdict, or nothing tested at all
        if (s) printf "%d skipped, see above\n", s
        printf "%d passed, %d failed\n", p, f
        exit f != 0
    }'

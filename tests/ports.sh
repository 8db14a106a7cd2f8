#!/usr/bin/env bash
# tests/ports.sh [-j N] [-t SECONDS] [-o DIR] fast|all [REGEX] - the same bits everywhere.
#
# Builds tests/selftest.c for every port below (compiler, flags, machine), runs it natively or under
# an emulator and compares the PORTABLE hash of each ISA with the frozen one in selftest.c. Ports
# with more programs also run short forms of test_cpu, test_mask and test_tree. Ports with a blob
# save one of their own and load the one this machine's compiler saved, page contents included; all
# blobs must be the same file, and this machine loads them all. A toolchain that is not there is a
# skipped row. "fast" leaves out the rows marked all; REGEX selects ports by name. Prints one table,
# then "N passed, N failed".
cd "$(dirname "$0")/.." || exit 2
jobs=1 limit=300 dir=build/ports
while getopts j:t:o: o; do
    case $o in
    j) jobs=$OPTARG ;;
    t) limit=$OPTARG ;;
    o) dir=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
tier=${1:-fast} only=${2:-.}
case $tier in fast | all) ;; *) echo "tests/ports.sh fast|all [REGEX]" && exit 2 ;; esac
case $limit in *[!0-9]*) exit 2 ;; esac
frozen() { sed -n "s/^#define $1 0x\\([0-9a-f]*\\)u.*/\\1/p" tests/selftest.c; }
want="$(frozen EXPECTED) $(frozen EXPECTED_EDGES)"
mkdir -p "$dir" && rm -f "$dir"/*.rows "$dir"/*.blob || exit 2
wine=$(command -v wine64 || ls /usr/lib/wine/wine64 2>/dev/null)
export WINEPREFIX=$PWD/$dir/wine WINEDEBUG=-all

# Under emulation a problem of test_cpu takes ten seconds and more: the machines take turns.
args_test_cpu="1 12" args_test_mask="1 25" args_test_tree="1 4000"
args_test_cpu_aarch64="1 4" args_test_cpu_armv7="4 4"
args_test_cpu_riscv64="7 4" args_test_cpu_s390x="10 4"

# port NAME TIER PROGRAMS RUNNER COMPILER FLAGS...   PROGRAMS: selftest, cpu, mask, tree, blob;
# those behind + under all only
list() {
    local c
    # this machine, where every x86 executor runs: compilers, levels, and the flags that let a
    # compiler contract, reassociate, take reciprocals and forget about NaN
    port x86_64 fast "selftest blob" - "${CC:-cc}" -O2
    for c in gcc clang; do
        port $c-O0 fast selftest - $c -O0
        port $c-O2 all selftest - $c -O2
        port $c-O3 all selftest - $c -O3
        port $c-fma all selftest - $c -O3 -mfma -ffp-contract=fast
        port $c-native all selftest - $c -O3 -march=native -ffp-contract=fast
        port $c-fast-math all selftest - $c -O2 -ffast-math
        port $c-Ofast-native fast selftest - $c -Ofast -march=native
        port $c-unsafe all selftest - $c -O2 -funsafe-math-optimizations
        port $c-finite all selftest - $c -O3 -ffinite-math-only -fno-signed-zeros
        port $c-scalar all selftest - $c -Ofast -march=native -DATTN_CPU_SCALAR_ONLY
        port $c-cpp all selftest - $c -x c++ -std=c++11 -O2 -ffast-math
    done
    port gcc-recip all selftest - gcc -Ofast -march=native -mrecip -fassociative-math
    port gcc-lto all selftest - gcc -Ofast -flto -march=native
    port musl fast "selftest blob" - musl-gcc -O2 -static
    # 32-bit x86: SSE2 arithmetic is the contract
    port i686 fast "selftest blob + cpu mask tree" - \
        i686-linux-gnu-gcc -O2 -msse2 -mfpmath=sse -static
    port i686-Ofast all selftest - i686-linux-gnu-gcc -Ofast -msse2 -mfpmath=sse -static
    port i686-x87 all selftest - i686-linux-gnu-gcc -O2 -mno-sse -mfpmath=387 -static
    # other machines under qemu
    port aarch64 fast "selftest blob + cpu mask tree" qemu-aarch64 aarch64-linux-gnu-gcc -O2 -static
    port aarch64-Ofast all selftest qemu-aarch64 aarch64-linux-gnu-gcc -Ofast -static
    port aarch64-O3 all selftest qemu-aarch64 aarch64-linux-gnu-gcc -O3 -static
    port aarch64-scalar all selftest qemu-aarch64 \
        aarch64-linux-gnu-gcc -Ofast -static -DATTN_CPU_SCALAR_ONLY
    port aarch64-clang all selftest qemu-aarch64 \
        clang --target=aarch64-linux-gnu -O3 -ffast-math -static
    port armv7 fast "selftest blob + cpu mask tree" qemu-arm arm-linux-gnueabihf-gcc -O2 -static
    port armv7-Ofast-neon all selftest qemu-arm \
        arm-linux-gnueabihf-gcc -Ofast -mfpu=neon-vfpv4 -static
    port armv7-clang all selftest qemu-arm \
        clang --target=arm-linux-gnueabihf -O3 -ffast-math -mfpu=neon-vfpv4 -static
    port riscv64 fast "selftest blob + cpu mask tree" qemu-riscv64 riscv64-linux-gnu-gcc -O2 -static
    port riscv64-Ofast all selftest qemu-riscv64 riscv64-linux-gnu-gcc -Ofast -static
    port riscv64-clang all selftest qemu-riscv64 \
        clang --target=riscv64-linux-gnu -march=rv64gc -O3 -ffast-math -static
    port s390x fast "selftest blob + cpu mask tree" qemu-s390x s390x-linux-gnu-gcc -O2 -static
    port s390x-Ofast all selftest qemu-s390x s390x-linux-gnu-gcc -Ofast -march=z13 -static
    port s390x-clang all selftest qemu-s390x \
        clang --target=s390x-linux-gnu -O3 -ffast-math -static
    # WebAssembly and Windows
    port wasm all "selftest cpu mask tree blob" "node --no-warnings tests/wasi.cjs" \
        clang --target=wasm32-wasi -O2
    port wasm-simd128 all "selftest cpu mask blob" "node --no-warnings tests/wasi.cjs" \
        clang --target=wasm32-wasi -O2 -msimd128
    port wasm-simd128-fast-math all selftest "node --no-warnings tests/wasi.cjs" \
        clang --target=wasm32-wasi -O3 -msimd128 -ffast-math
    port mingw64 all "selftest tree blob" "$wine" x86_64-w64-mingw32-gcc -O2 -static
    port mingw64-Ofast all selftest "$wine" x86_64-w64-mingw32-gcc -Ofast -static
    port mingw32 all "selftest blob" "$wine" i686-w64-mingw32-gcc -O2 -msse2 -mfpmath=sse -static
}

row() { # FILE PORT COMPILER FLAGS ISA HASH VERDICT
    printf '%s|%s|%s|%s|%s|%s\n' "${@:2}" >>"$1"
}

# What stops a port from being built and run here; nothing: it can be.
missing() { # RUNNER COMPILER
    command -v "$2" >/dev/null || { echo "no $2" && return; }
    case $1 in
    -) ;;
    "") echo "no wine" && return ;;
    *) command -v "${1%% *}" >/dev/null || { echo "no ${1%% *}" && return; } ;;
    esac
    case $2 in
    i686-w64*) [ -e /usr/lib/i386-linux-gnu/wine ] || { echo "no 32-bit wine" && return; } ;;
    esac
}

# Can this compiler link a C program for its target at all? clang may lack the libraries.
links() { # OUT COMPILER FLAGS...
    local out=$1
    shift
    printf '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n' >"$out.c"
    timeout 60 "${@:1}" "$out.c" -o "$out" >"$out.log" 2>&1
}

build_and_run() { # INDEX NAME PROGRAMS RUNNER COMPILER FLAGS...
    local rows=$dir/$1.rows name=$2 programs=$3 runner=$4 cc=$5 p why label flags exe out rc
    local libs="-lm" include line n
    shift 4
    flags="${*:2}"
    local shown=${flags/-static/}
    shown=$(echo $shown)
    why=$(missing "$runner" "$cc")
    if [ -z "$why" ] && ! links "$dir/$name.probe" "$@"; then
        why="$cc cannot link for this target"
    fi
    if [ -n "$why" ]; then
        row "$rows" "$name" "$cc" "$shown" - - "skipped: $why"
        return
    fi
    label="${cc##*/} $("$cc" -dumpversion)"
    [ "$runner" = - ] && runner=
    for p in $programs; do
        [ "$p" = selftest ] || p=test_$p
        exe=$dir/$name.$p
        case "$cc $flags" in
        *mingw*) exe=$exe.exe ;;
        *wasm32*) exe=$exe.wasm libs="-lm -Wl,-z,stack-size=1048576" ;;
        esac
        out=$dir/$name.$p.log
        if ! timeout -k 5 "$limit" "$@" -I. -Itests "tests/$p.c" -o "$exe" $libs >"$out" 2>&1; then
            row "$rows" "$name" "$label" "$shown" "$p" - "FAILED: not built, see $out"
            continue
        fi
        if [ "$p" = test_blob ]; then continue; fi # later: all ports' blobs meet
        args=args_${p}_${name//-/_}
        [ -n "${!args}" ] || args=args_$p
        timeout -k 5 "$limit" $runner "$exe" ${!args} >"$out" 2>&1 </dev/null
        rc=$?
        line=$(tr -d '\r' <"$out" | grep -E '^[0-9]+ passed, [0-9]+ failed' | tail -n 1)
        if [ $rc = 124 ] || [ $rc = 137 ]; then why="FAILED: stopped after $limit s"
        elif [ -z "$line" ]; then why="FAILED: exit $rc, see $out"
        elif [ $rc != 0 ]; then why="FAILED: $line, see $out"
        else why=ok
        fi
        if [ "$p" != selftest ] || ! grep -q '^portable hash' "$out"; then
            row "$rows" "$name" "$label" "$shown" "$p" "${line%%,*}" "$why"
            continue
        fi
        while read -r _ _ n p _ edges; do # one row per ISA
            line=$why
            [ "$n $edges" = "$want" ] || line="FAILED: not $want"
            row "$rows" "$name" "$label" "$shown" "$p" "$n $edges" "$line"
        done < <(tr -d '\r' <"$out" | grep '^portable hash')
    done
}

names=() programs_of=() runner_of=()
port() { # NAME TIER PROGRAMS RUNNER COMPILER FLAGS...
    local programs=${3/+/}
    if [ "$tier" = fast ]; then
        [ "$2" = fast ] || return
        programs=${3%+*}
    fi
    # the native build is everyone's partner for blobs
    if [[ ! $1 =~ $only ]] && [ "$1" != x86_64 ]; then return; fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    build_and_run "$(printf %03d ${#names[@]})" "$1" "$programs" "$4" "${@:5}" &
    names+=("$1") programs_of+=("$programs") runner_of+=("$4")
}
list
wait

# Blobs: every port's own against the native one, and loaded by both.
native=$dir/x86_64.blob
n=${#names[@]}
blob_row() { # NAME WHAT COMMAND...
    local rows=$dir/$(printf %03d "$n").rows name=$1 what=$2 verdict=ok
    shift 2
    timeout -k 5 "$limit" "$@" >"$dir/blob.log" 2>&1 </dev/null ||
        verdict="FAILED: $(tail -n 1 "$dir/blob.log")"
    row "$rows" "$name" - "$what" blob "$(cksum <"$dir/$name.blob" 2>/dev/null | cut -d' ' -f1)" \
        "$verdict"
}
for ((i = 0; i < n; i++)); do
    name=${names[i]} runner=${runner_of[i]}
    exe=$(ls "$dir/$name.test_blob" "$dir/$name.test_blob".{exe,wasm} 2>/dev/null | head -n 1)
    case " ${programs_of[i]} " in *" blob "*) ;; *) continue ;; esac
    [ -n "$exe" ] && [ -s "$dir/$(printf %03d "$i").rows" ] || continue
    grep -q '|skipped' "$dir/$(printf %03d "$i").rows" && continue
    [ "$runner" = - ] && runner=
    blob_row "$name" "saves it" $runner "$exe" save "$dir/$name.blob"
    if [ "$name" = x86_64 ]; then continue; fi
    blob_row "$name" "the same file" cmp "$dir/$name.blob" "$native"
    blob_row "$name" "loads the native one" $runner "$exe" load "$native"
    blob_row "$name" "is loaded here" "$dir/x86_64.test_blob" load "$dir/$name.blob"
done
if [ -d "$WINEPREFIX" ]; then "$(dirname "$wine")/wineserver" -k 2>/dev/null; fi

cat "$dir"/*.rows | awk -F'|' '
    BEGIN { print "port|compiler|flags|ISA or test|hash|verdict" }
    { print; if ($6 == "ok") p++; else if ($6 ~ /^skipped/) s++; else f++ }
    END { printf "%d skipped\n", s; printf "%d passed, %d failed\n", p, f > "'"$dir"'/sum" }
    ' | awk -F'|' '
    NF == 6 { for (i = 1; i < 6; i++) { x[NR, i] = $i; if (length($i) > w[i]) w[i] = length($i) } }
    { n = NR; last[NR] = $NF; nf[NR] = NF }
    END {
        for (r = 1; r <= n; r++) {
            line = ""
            if (nf[r] == 6) for (i = 1; i < 6; i++) line = line sprintf("%-" w[i] "s  ", x[r, i])
            print line last[r]
        }
    }'
cat "$dir/sum"
grep -q '^[1-9][0-9]* passed, 0 failed' "$dir/sum"

#!/usr/bin/env bash
# Proofs with Frama-C's WP on the text of attn.h itself.
#
#   run.sh [GROUP...]          goals of all groups or these; ends with "N passed, N failed"
#   run.sh open                goals of functions whose proof is not finished (see below)
#   run.sh --planted [NAME...] each bug of planted.txt must make a goal of its function fail, and
#                              no goal may fail without the bug under the same limits
#
# splice.py puts the contracts of *.acsl beside the functions in a copy of attn.h and changes
# nothing else. Run-time errors (overflow, division by 0, invalid memory) are goals too.
#
# Proved, for every input that meets the contracts:
#   pool, release   counts never negative, no double free, the free list is exactly the set of
#            pages with count 0, a page handed out was free, errors leave everything as it was
#   memory64, memory32   the pool's arrays lie in the caller's block, apart and aligned
#   sizes64  sizes of plans' parts and blobs never wrap; a page's tokens lie in the tree's array
#   plan64   a plan's counts and sizes never overflow, its arrays lie one behind the other
#   offsets  a row's offset and a scale's offset stay inside their page, K16 included
# Assumed:
#   attn_pool_init  "admit": the bytes proved to lie in the block form two int32_t arrays, and a
#                   struct's bytes may be cleared. WP has no view of bytes as integers.
#   low_bits        "admit lemma": x >> 4 and x & 15 are quotient and remainder for x >= 0.
#   memory64, memory32, offsets   model Typed+cast: a cast keeps the pointer. No function of
#                   these groups steps through memory under two types.
#   group plan64    model Typed+real: floats are real numbers, so without NaN, infinity or rounding.
#                   Only the comparisons and the quotient of attni_fitting depend on them.
#   callers         that the public functions call with what the contracts ask for (attn_validate's
#                   loops over the caller's tables, for one) is not proved.
# Open, not part of the default run: attni_side_place and attni_side_init are to establish side_ok,
# head_in and page_in, from which group offsets starts. Not proved of them are (8 of 220 goals at
# 3 seconds each; the other 212 are):
#   attni_side_place   4 * pt * heads and scale_offset + 4 * pt * heads do not overflow; the last
#                      scale's place (assertion); the postconditions side_rows and head_in
#   attni_side_init    the postconditions side_ok, head_in and page_in
# Contracts without a proof, in no group: attn_plan_bytes, attni_tree_layout, attn_tree_bytes. The
# tree's own invariants have no contract (attn_tree_check tests them).
#
# Needs frama-c-base, why3, cvc4, z3 (Debian 12: Frama-C 25). SECONDS_PER_GOAL: default 30. Provers
# count time by the clock; on an idle core the slowest goal takes 2 s.

cd "$(dirname "$0")/../.." || exit 1
out=${PROOF_OUT:-build/proof}
here=tests/proof
limit=${SECONDS_PER_GOAL:-30}

for tool in frama-c why3 cvc4 z3 python3; do
    if ! command -v $tool >/dev/null; then
        echo "0 passed, 0 failed ($tool not installed)"
        exit 0
    fi
done

mkdir -p "$out" || exit 1
export WHY3CONFIG=$PWD/$out/why3.conf
[ -s "$WHY3CONFIG" ] || why3 config detect >"$out/why3.log" 2>&1
downcasts="-warn-signed-downcast -warn-unsigned-downcast"
all="$downcasts -warn-unsigned-overflow"
flat="-wp-no-pruning" # quicker where a function branches much; the pool's goals need pruning
memory="attni_carve,attni_align,attni_pool_layout,attn_pool_bytes,attn_pool_init"
sizes="attni_min32,attni_max32,attni_min64,attni_max64,attni_floor_pow2,attni_take,\
attni_page_token,attni_blob_size"
plan="proof_mul_abs,proof_div_le,attni_held_spans,attni_span_cost,attni_merge_cost,attni_fitting,\
attni_n_rules,attni_rules_ok,attni_rule_of,attni_rule_span,attni_sets_tile,attni_most_tile,\
attni_bounded_tile,attni_tile_tokens,attni_rule_caps,attni_cut_caps,attni_plan_caps_of"
offsets="proof_mul_le,attni_bits_of,attni_is_scaled,attni_is_float,attni_v_dim,\
proof_div_mul,attni_page_elements,attni_token_offset,attni_scale_offset"
cast="-wp-model Typed+cast"

# group  machine  functions  options
groups=(
    "pool|gcc_x86_64|attni_pool_reset,attn_pool_alloc,attn_pool_retain|$all"
    "release|gcc_x86_64|attn_pool_release|$all -wp-split"
    "memory64|gcc_x86_64|$memory|$cast $downcasts"
    "memory32|gcc_x86_32|$memory|$cast $downcasts"
    "sizes64|gcc_x86_64|$sizes|$all $flat"
    "plan64|gcc_x86_64|$plan|-wp-model Typed+real -warn-special-float none $all $flat"
    "offsets|gcc_x86_64|$offsets|$cast $all $flat"
    "lemmas|gcc_x86_64||-wp-prop mul_range,mul_least,div_mul,head_below,page_below"
    "open|gcc_x86_64|attni_side_place,attni_side_init|$cast $all $flat"
)

# prove OUT_DIR LOG MACHINE SELECTION... -> every goal's verdict in LOG
prove() {
    local dir=$1 log=$2 machine=$3
    shift 3
    printf '#define ATTN_CORE_IMPLEMENTATION\n#include "attn.h"\n' >"$dir/main.c"
    nice -n 10 timeout 3000 frama-c -cpp-extra-args="-I$dir" -machdep "$machine" "$dir/main.c" \
        -wp -wp-rte -wp-prover cvc4,z3 -wp-timeout "$limit" -wp-par 1 "$@" \
        >"$log" 2>&1 </dev/null
}

# Verdicts of a log, one a line: function, prover or FAILED, goal.
verdicts() {
    awk '/^\[wp\] \[.*\] Goal / {
        prover = $0; sub(/^\[wp\] \[/, "", prover); sub(/\].*/, "", prover)
        goal = $0; sub(/.*\] Goal /, "", goal); split(goal, word, " "); goal = word[1]
        ok = $0 ~ / : Valid/
        if (!ok && prover != "Failed") next
        print (ok ? prover : "FAILED") "\t" goal
    }' "$1"
}

# How many goals a finished log has.
goals() { sed -n 's/.*Proved goals: *[0-9]* *\/ *//p' "$1"; }

# Goals of a log that were not proved; "none", which counts for nothing, if there is no result.
failures() {
    if grep -q 'Proved goals' "$1"; then verdicts "$1" | grep -c '^FAILED'; else echo none; fi
}

# The same function without the bug under the same limits, once: $unplanted[FUNCTION].
control() {
    [ -z "${unplanted[$1]}" ] || return
    mkdir -p "$out/control"
    python3 $here/splice.py attn.h "$out/control/attn.h" $here/*.acsl || exit 1
    # shellcheck disable=SC2086
    prove "$out/control" "$out/control.log" "$machine" -wp-fct "$1" $options
    unplanted[$1]=$(failures "$out/control.log")
}

if [ "$1" = --planted ]; then
    declare -A unplanted
    caught=0 missed=0 limit=${SECONDS_PER_GOAL:-5}
    shift
    while read -r _ name fct; do
        case " ${*:-$name} " in *" $name "*) ;; *) continue ;; esac
        for g in "${groups[@]}"; do
            IFS='|' read -r group machine fcts options <<<"$g"
            case ",$fcts," in *",$fct,"*) break ;; esac
        done
        control "$fct"
        mkdir -p "$out/plant"
        python3 $here/splice.py attn.h "$out/plant/attn.h" --plant "$here/planted.txt:$name" \
            $here/*.acsl || exit 1
        # shellcheck disable=SC2086
        prove "$out/plant" "$out/plant.log" "$machine" -wp-fct "$fct" $options
        n=$(failures "$out/plant.log")
        case "${unplanted[$fct]}:$n" in
        0:*[1-9]*)
            caught=$((caught + 1))
            printf '%-28s %-22s %3d goals fail, without it 0\n' "$name" "$fct" "$n"
            ;;
        *)
            missed=$((missed + 1))
            printf '%-28s %-22s NOT NOTICED (%s goals fail, without it %s)\n' "$name" "$fct" \
                "$n" "${unplanted[$fct]}"
            ;;
        esac
    done < <(grep '^== ' $here/planted.txt)
    echo "$caught passed, $missed failed"
    [ "$missed" = 0 ] && [ "$caught" -gt 0 ]
    exit
fi

mkdir -p "$out/real"
python3 $here/splice.py attn.h "$out/real/attn.h" $here/*.acsl || exit 1
: >"$out/table"
broken=0
for g in "${groups[@]}"; do
    IFS='|' read -r group machine fcts options <<<"$g"
    case " ${*:-pool release memory64 memory32 sizes64 plan64 offsets lemmas} " in
    *" $group "*) ;;
    *) continue ;;
    esac
    # shellcheck disable=SC2086
    prove "$out/real" "$out/$group.log" "$machine" ${fcts:+-wp-fct "$fcts"} $options
    verdicts "$out/$group.log" | while IFS=$'\t' read -r prover goal; do
        name=${goal#typed_}
        name=${name#cast_}
        name=${name#real_}
        for f in ${fcts//,/ } lemma; do
            case $name in "${f}_"*)
                printf '%s\t%s\t%s\t%s\n' "$group" "$f" "$prover" "$goal"
                ;;
            esac
        done
    done >>"$out/table"
    if [ "$(grep -c "^$group"$'\t' "$out/table")" != "$(goals "$out/$group.log")" ]; then
        echo "$group: not every goal has a verdict, see $out/$group.log"
        broken=$((broken + 1))
    fi
done
awk -F'\t' -v broken="$broken" '
    { key = $1 "\t" $2; if (!(key in n)) order[++m] = key
      n[key]++; total++
      if ($3 == "FAILED") { failed++; list[failed] = $4 }
      else { proved[key]++; by[key, substr($3, 1, 4)]++; passed++ } }
    END {
        printf "%-9s %-22s %6s %6s %6s %6s %6s\n", "group", "function", "goals", "proved", "Qed",
            "CVC4", "Z3"
        for (i = 1; i <= m; i++) {
            k = order[i]; split(k, part, "\t")
            printf "%-9s %-22s %6d %6d %6d %6d %6d\n", part[1], part[2], n[k], proved[k],
                by[k, "Qed"], by[k, "CVC4"], by[k, "Z3 4"] }
        for (i = 1; i <= failed; i++) print "not proved: " list[i]
        printf "%d passed, %d failed\n", passed, failed + broken
        exit failed + broken > 0 || passed == 0 }' "$out/table"

"""bench_cuda.py - the table of bench_cuda with torch's attention beside it, on the same GPU.

    python3 tests/bench/bench_cuda.py [--exe build/bench_cuda] [--only decode,prefix,prefill,sparse]
        [--quick] [--flex] [--rounds 2] [--out table.md] [--csv PREFIX] [-- ARGS OF bench_cuda]

Each section runs in turn: our program, then torch on the same shapes; that is done --rounds times
and ratios of the same round are what is compared. Peers get contiguous K and V, random normal, in
as many sets and graph iterations as our row had, and are checked on a few rows before they are
timed: SDPA's FlashAttention-2 and cuDNN back ends (each forced by sdpa_kernel, so no other can
answer; of the ways to hand them grouped heads and of two memory layouts the fastest counts), and
with --flex compiled FlexAttention over the same blocks. A row's verdict is 'ok' when it keeps every
limit: those that bench_cuda printed (see its first comment) and
    cuDNN   decode over pages of 16 and 64: at or under cuDNN on contiguous KV
    FA2     dense prefill: FA2's time / 1.05
Limits in brackets are for information."""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile

KINDS = ["decode", "prefix", "prefill", "sparse"]
DECODE_CELLS = [(1, 1024), (1, 4096), (1, 16384), (8, 1024), (8, 4096), (32, 1024), (32, 4096),
                (128, 1024), (128, 4096), (32, 16384)]
BROKEN = []  # sections that our program did not finish
MASK64 = (1 << 64) - 1


# ---- our program

def run_exe(args, kind, path):
    """Rows and ceilings of one section. After a crash the rows behind the culprit are run."""
    rows, ceilings = [], {}
    for crashes in range(3):
        cmd = [args.exe, "--only", kind, "--csv", path] + (["--quick"] if args.quick else [])
        if crashes:
            cmd += ["--skip", str(len(rows) + crashes)]
        try:
            code = subprocess.run(cmd + args.extra, timeout=args.limit).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {args.limit:.0f} s"
        if not os.path.exists(path):
            raise SystemExit(f"{' '.join(cmd)}: {code}")
        more, found = read_csv(path)
        rows += more
        ceilings = ceilings or found
        if code in (0, 1):
            break
        note(f"bench_cuda --only {kind} broke off after {rows[-1]['key'] if rows else 'no row'}: "
             f"{code}")
        BROKEN.append(kind)
        os.remove(path)
        if "--rows" in args.extra:  # rows left out are not in the file, so they cannot be counted
            break
    return rows, ceilings


def read_csv(path):
    ceilings, lines = {}, []
    with open(path, encoding="ascii") as f:
        for line in f:
            if line.startswith("#"):
                words = line[1:].split()
                ceilings = {k: float(v) for k, v in zip(words[::2], words[1::2])}
            else:
                lines.append(line)
    rows = list(csv.DictReader(lines))
    for r in rows:
        for k in ("B", "ctx", "shared", "private", "Hq", "Hkv", "D", "page", "N", "ragged",
                  "density", "lists", "sets", "n_iter", "repeats"):
            r[k] = int(r[k])
        for k in ("kept", "us", "us_lo", "us_hi", "sustained_us", "bytes", "flops", "read"):
            r[k] = float(r[k])
        r["limits"] = [(n, float(us), int(judged)) for n, us, judged in
                       (x.split(":") for x in r["limits"].split("|") if x)]
    return rows, ceilings


# ---- torch: graphs, checks

class Graph:
    """n calls of fns in turn, captured; sample() replays them once and keeps us per call."""

    def __init__(self, torch, fns, n):
        self.torch, self.n, self.times, self.graph = torch, n, [], torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for f in fns[:2]:
                f()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            for i in range(n):
                fns[i % len(fns)]()
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.sample()
        self.times.clear()

    def sample(self):
        self.events[0].record()
        self.graph.replay()
        self.events[1].record()
        self.events[1].synchronize()
        self.times.append(1e3 * self.events[0].elapsed_time(self.events[1]) / self.n)

    def us(self):
        return statistics.median(self.times)

    def sustained(self):
        """us per call in the last fifth of a second of replays, under the power limit."""
        n = int(1e6 / (self.us() * self.n)) + 5
        for i in range(n):
            if i == n - n // 5:
                self.events[0].record()
            self.graph.replay()
        self.events[1].record()
        self.events[1].synchronize()
        return 1e3 * self.events[0].elapsed_time(self.events[1]) / (n // 5) / self.n


def time_calls(torch, calls, row):
    """{name: (us, sustained us or 0)} for the named lists of calls, with as many iterations and
    repeats as our row had; their replays alternate. Calls that fail are left out."""
    graphs = {}
    for name, fns in calls.items():
        try:
            graphs[name] = Graph(torch, fns, row["n_iter"])
        except Exception as e:  # one back end's refusal must not end the others
            torch.cuda.synchronize()
            note(f"{name}: not captured: {first_line(e)}")
    for _ in range(row["repeats"]):
        for g in graphs.values():
            g.sample()
    times = {name: (g.us(), g.sustained() if row["sustained_us"] > 0 else 0.0)
             for name, g in graphs.items()}
    graphs.clear()
    return times


NOTES = []


def note(text):
    if text not in NOTES:
        NOTES.append(text)
        print("note:", text, flush=True)


def first_line(e):
    return str(e).strip().split("\n")[0][:160]


def check_rows(torch, out, q, k, v, keep):
    """Relative RMS error of sampled (sequence, head, query) rows against fp64; inf when NaN.
    keep(head, query) is None (all keys) or a boolean row over the keys."""
    b, h, n, d = q.shape
    worst = 0.0
    for s, i, t in ((0, 0, 0), (b - 1, h - 1, n - 1), (b // 2, h // 2, n // 2)):
        kv = i // (h // k.shape[1])
        scores = k[s, kv].double() @ q[s, i, t].double() / d ** 0.5
        visible = keep(i, t)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        ref = torch.softmax(scores, 0) @ v[s, kv].double()
        err = ((out[s, i, t].double() - ref).norm() / ref.norm()).item()
        worst = max(worst, err if err == err else float("inf"))
    return worst


# ---- torch: SDPA

def inputs(torch, row, layout):
    """Sets of q, k, v as (B, H, tokens, D) views; layout bshd: the memory of (B, tokens, H, D)."""
    def tensor(heads, tokens):
        shape = (row["B"], heads, tokens, row["D"])
        if layout == "bshd":
            shape = (shape[0], shape[2], shape[1], shape[3])
        t = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return t.transpose(1, 2) if layout == "bshd" else t
    return [(tensor(row["Hq"], row["N"]), tensor(row["Hkv"], row["ctx"]),
             tensor(row["Hkv"], row["ctx"])) for _ in range(row["sets"])]


def sdpa_ways(torch, row, q, k, v):
    """Equivalent calls: the heads grouped by SDPA, or the group's heads as queries (decode)."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    b, h, n, d = q.shape
    group = h // k.shape[1]
    causal = row["kind"] != "decode"
    if group == 1:
        return {"": lambda: sdpa(q, k, v, is_causal=causal)}
    ways = {"gqa": lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=True)}
    if n == 1:
        packed = q.reshape(b, k.shape[1], group, d)
        ways["packed"] = lambda: sdpa(packed, k, v).reshape(b, h, 1, d)
    return ways


def sdpa_repeated(torch, row, q, k, v):
    """For a back end that takes no grouped heads: K and V repeated beforehand."""
    group = row["Hq"] // row["Hkv"]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(q, k, v, is_causal=row["kind"] != "decode")


def accepted(torch, name, call, keep, q, k, v):
    """Whether the back end takes the call and answers rightly."""
    try:
        err = check_rows(torch, call(), q, k, v, keep)
    except Exception as e:
        torch.cuda.synchronize()
        note(f"{name}: refused: {first_line(e)}")
        return False
    if err > 2e-2:
        note(f"{name}: WRONG (error {err:.1e}), not timed")
    return err <= 2e-2


def causal_row(torch, row):
    n, ctx = row["N"], row["ctx"]
    at = torch.arange(ctx, device="cuda")
    return lambda head, t: at <= t + ctx - n


CHOSEN = {}  # (shape, peer): its fastest way in the first round, the only one in later rounds


def time_sdpa(torch, row):
    """{"FA2": (us, sustained us, way), "cuDNN": ...} for one shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    backends = {"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    shape, best, keep = peer_shape(row), {}, causal_row(torch, row)
    for layout in ("bshd", "bhsd"):
        wanted = {p: CHOSEN.get((shape, p)) for p in backends}
        wanted = {p: w for p, w in wanted.items() if w is None or w.endswith(layout)}
        sets = inputs(torch, row, layout) if wanted else []
        for peer, only in wanted.items():
            with sdpa_kernel(backends[peer]):
                calls = sdpa_calls(torch, row, peer, layout, only, sets, keep)
                for way, (us, sustained) in time_calls(torch, calls, row).items():
                    if us < best.get(peer, (float("inf"),))[0]:
                        best[peer] = us, sustained, way
                calls.clear()
        del sets
        torch.cuda.empty_cache()
    CHOSEN.update({(shape, peer): t[2] for peer, t in best.items()})
    return best


def sdpa_calls(torch, row, peer, layout, only, sets, keep):
    """{way: a call per set} of what the back end in force accepts; only: that way alone."""
    calls = {}
    for way in sdpa_ways(torch, row, *sets[0]):
        name = f"{way} {layout}".strip()
        if only not in (None, name):
            continue
        fns = [sdpa_ways(torch, row, *s)[way] for s in sets]
        if accepted(torch, f"{peer} {row['kind']} {way}".strip(), fns[0], keep, *sets[0]):
            calls[name] = fns
    if not calls and row["Hq"] != row["Hkv"]:
        fns = [sdpa_repeated(torch, row, *s) for s in sets]
        if accepted(torch, f"{peer} {row['kind']} repeated", fns[0], keep, *sets[0]):
            calls[f"repeated {layout}"] = fns
    return calls


# ---- torch: FlexAttention over the blocks that bench_cuda draws

def mix64(np, z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    return z ^ (z >> np.uint64(31))


def kept_blocks(np, row):
    """Boolean (lists, rows, columns) and the block size: keep_block, keep_stride of bench_cuda."""
    size = 64 if row["pattern"] == "stride" else 128
    lists = row["Hkv"] if row["pattern"] == "stride" else max(1, row["lists"])
    n = row["ctx"] // size
    h, i, j = np.meshgrid(*(np.arange(x, dtype=np.uint64) for x in (lists, n, n)), indexing="ij")
    if row["pattern"] == "stride":
        return (j <= i) & ((i - j < 16) | ((j + h) % np.uint64(8) == 0)), size
    seed = np.uint64(0x9e3779b97f4a7c15 * (row["density"] + 1) & MASK64)
    z = mix64(np, ((h << np.uint64(40)) | (i << np.uint64(20)) | j) + seed)
    low = (z >> np.uint64(32)) * np.uint64(100) < np.uint64(row["density"] << 32)
    return (j == i) | ((j < i) & low), size


def not_after(b, h, q, k):
    return q >= k


FLEX = {}  # compiled once: a new function each time would be compiled again


def flex_attention(torch):
    if not FLEX:
        from torch.nn.attention.flex_attention import flex_attention as plain
        torch._dynamo.config.recompile_limit = 64  # each shape is one
        FLEX["call"] = torch.compile(plain, dynamic=False)
    return FLEX["call"]


def block_mask(torch, np, row):
    from torch.nn.attention.flex_attention import BlockMask
    kept, size = kept_blocks(np, row)
    diagonal = np.eye(kept.shape[1], dtype=bool)[None]
    share = (kept.sum() - 0.5 * kept.shape[0] * kept.shape[1]) / (0.5 * kept.size)
    if abs(share - row["kept"]) > 1e-5:
        raise RuntimeError(f"kept share {share:.6f} here, {row['kept']:.6f} in bench_cuda")

    def ordered(x):
        order = np.argsort(~x, axis=-1, kind="stable").astype(np.int32)
        counts = x.sum(-1).astype(np.int32)
        return (torch.from_numpy(counts)[None].cuda().contiguous(),
                torch.from_numpy(order)[None].cuda().contiguous())

    part, full = ordered(kept & diagonal), ordered(kept & ~diagonal)
    mask = BlockMask.from_kv_blocks(*part, *full, BLOCK_SIZE=size, mask_mod=not_after)
    return mask, torch.from_numpy(kept).cuda(), size


def time_flex(torch, row):
    import numpy as np
    mask, kept, size = block_mask(torch, np, row)
    flex = flex_attention(torch)
    gqa = row["Hq"] != row["Hkv"]
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if size == 64 else None
    at = torch.arange(row["ctx"], device="cuda")

    def keep(head, t):
        return (at <= t) & kept[head if kept.shape[0] > 1 else 0, t // size, at // size]

    def call(q, k, v):
        return lambda: flex(q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options=options)

    sets = inputs(torch, row, "bhsd")
    fns = [call(*s) for s in sets]
    if not accepted(torch, f"flex {row['key']}", fns[0], keep, *sets[0]):
        return {}
    return {name: (*t, "") for name, t in time_calls(torch, {"flex": fns}, row).items()}


# ---- torch: sections

def peer_shape(row):
    """What rows that differ in paging only have in common; None: no peer."""
    if row["status"] != "ok" or row["us"] <= 0 or row["dtype"] != "bf16":
        return None
    if row["kind"] == "prefix" or row["ragged"]:
        return None
    return (row["kind"], row["B"], row["ctx"], row["Hq"], row["Hkv"], row["D"], row["pattern"],
            row["density"], row["lists"])


def run_peers(torch, args, rows):
    """{shape: {peer: (us, sustained us, way)}} of one section."""
    found = {}
    for row in rows:
        shape = peer_shape(row)
        if shape is None or shape in found:
            continue
        found[shape] = {}
        try:
            if row["pattern"] == "dense":
                found[shape] = time_sdpa(torch, row)
            elif args.flex:
                found[shape] = time_flex(torch, row)
        except Exception as e:  # out of memory, say: the table has a hole there
            note(f"peers of {row['key']}: {first_line(e)}")
        torch.cuda.empty_cache()
        if found[shape]:
            print("peers", row["key"], ", ".join(
                f"{k} {us:.2f} us ({way})" for k, (us, _, way) in found[shape].items()), flush=True)
    return found


def matmul_rate(torch):
    """bf16, 8192^3, FLOP/s: the median of short bursts."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    g = Graph(torch, [lambda: a @ b], 4)
    for _ in range(9):
        g.sample()
    return 2.0 * 8192 ** 3 / g.us() * 1e6


# ---- the table

def collect(rounds):
    """Rows of all rounds by key: times, ratios to limits [(name, judged) -> list], peers."""
    table = {}
    for rows, peers in rounds:
        for row in rows:
            t = table.setdefault(row["key"], {"row": row, "us": [], "pct": [], "ratio": {},
                                              "peer": {}, "bad": None, "long": []})
            if row["status"] != "ok":
                t["bad"] = row["status"]
                continue
            t["us"].append(row["us"])
            t["pct"].append(100 * row["bytes"] / row["us"] * 1e6 / row["read"])
            if row["sustained_us"] > 0:
                t["long"].append(row["sustained_us"])
            for name, us, judged in row["limits"]:
                t["ratio"].setdefault((name, judged), []).append(row["us"] / us)
            for name, (us, sustained, way) in peers.get(peer_shape(row), {}).items():
                t["peer"].setdefault(name, []).append((us, sustained, way))
                judged, factor = peer_limit(row, name)
                t["ratio"].setdefault((name, judged), []).append(row["us"] * factor / us)
    return table


def peer_limit(row, name):
    if row["kind"] == "decode" and name == "cuDNN":
        return int(row["page"] in (16, 64) and (row["B"], row["ctx"]) in DECODE_CELLS), 1.0
    if row["kind"] == "prefill" and name == "FA2":
        return 1, 1.05
    return 0, 1.0


def verdict(t):
    if t["bad"]:
        return t["bad"]
    judged = {n: statistics.median(v) for (n, j), v in t["ratio"].items() if j}
    missed = [n for n, x in judged.items() if x > 1]
    return "MISSED " + ", ".join(missed) if missed else "ok" if judged else "-"


def peer_cell(row, name, values):
    us, sustained = (statistics.median(v[i] for v in values) for i in (0, 1))
    way = values[-1][2]
    text = f"{name} {us:.1f}" + (f" ({way})" if way else "")
    if sustained > 0:
        text += f" sustained {row['flops'] / sustained * 1e-6:.0f} TFLOP/s"
    return text


def table_lines(table, kind, matmul):
    yield ("| row | us | +-% | GB/s | % of read | TFLOP/s | % of matmul | peers, us | time / limit "
           "| verdict |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for key, t in table.items():
        row = t["row"]
        if row["kind"] != kind:
            continue
        if not t["us"]:
            yield f"| {key} | | | | | | | | | {verdict(t)} |"
            continue
        us = statistics.median(t["us"])
        spread = 50 * (max(t["us"]) - min(t["us"])) / us
        peers = ", ".join(peer_cell(row, n, v) for n, v in t["peer"].items())
        ratios = ", ".join((f"{n} {statistics.median(v):.2f}" if j else
                            f"({n} {statistics.median(v):.2f})")
                           for (n, j), v in t["ratio"].items())
        tflops = row["flops"] / us * 1e-6
        part = f"{100e12 * tflops / matmul:.1f}" if matmul else ""
        if t["long"]:
            ratios += f"{', ' if ratios else ''}sustained "
            ratios += f"{row['flops'] / statistics.median(t['long']) * 1e-6:.0f} TFLOP/s"
        yield (f"| {key} | {us:.2f} | {spread:.1f} | {row['bytes'] / us * 1e-3:.0f} | "
               f"{statistics.median(t['pct']):.1f} | {tflops:.1f} | {part} | {peers} | {ratios} | "
               f"{verdict(t)} |")


def limit_lines(table):
    limits = {}
    for key, t in table.items():
        for (name, judged), v in t["ratio"].items():
            if judged:
                limits.setdefault((t["row"]["kind"], name), []).append((statistics.median(v), key))
    yield "| section | limit | kept by | worst, time / limit | at |"
    yield "|---|---|---|---|---|"
    for (kind, name), v in limits.items():
        worst, key = max(v)
        yield (f"| {kind} | {name} | {sum(x <= 1 for x, _ in v)} of {len(v)} | {worst:.3f} | "
               f"{key} |")


def document(args, table, ceilings, matmul, machine):
    lines = [f"{machine}; {args.rounds} round(s){', quick' if args.quick else ''}.", ""]
    rate = {k: statistics.median(c[k] for c in ceilings if c.get(k)) for k in
            ("read", "copy", "launch_us", "dense") if any(c.get(k) for c in ceilings)}
    lines.append("Ceilings of this run: " + ", ".join(
        ([f"read {rate['read'] * 1e-9:.0f} GB/s"] if "read" in rate else []) +
        ([f"copy {rate['copy'] * 1e-9:.0f} GB/s"] if "copy" in rate else []) +
        ([f"bf16 matmul {matmul * 1e-12:.0f} TFLOP/s"] if matmul else []) +
        ([f"own dense prefill {rate['dense'] * 1e-12:.0f} TFLOP/s"] if "dense" in rate else []) +
        ([f"empty kernel in a graph {rate['launch_us']:.2f} us"] if "launch_us" in rate else [])) +
        ".")
    verdicts = [verdict(t) for t in table.values()]
    ok, missed = verdicts.count("ok"), sum(v.startswith("MISSED") for v in verdicts)
    bad = sum(bool(t["bad"]) for t in table.values())
    lines += ["", "## limits", ""] + list(limit_lines(table))
    for kind in KINDS:
        if any(t["row"]["kind"] == kind for t in table.values()):
            lines += ["", f"## {kind}", ""] + list(table_lines(table, kind, matmul))
    lines += ["", f"{ok} ok, {missed} missed, {bad} wrong or failed, "
              f"{len(verdicts) - ok - missed - bad} without a limit."]
    if NOTES:
        lines += ["", "Notes:"] + [f"- {n}" for n in NOTES]
    return "\n".join(lines) + "\n", bad


# ---- main

def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--exe", default="build/bench_cuda")
    p.add_argument("--only", default=",".join(KINDS))
    p.add_argument("--quick", action="store_true")
    p.add_argument("--flex", action="store_true", help="FlexAttention too (compiles for a minute)")
    p.add_argument("--no-peers", action="store_true", help="our program alone; needs no torch")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--limit", type=float, default=200, help="seconds for one run of our program")
    p.add_argument("--out", help="markdown file (default: standard output)")
    p.add_argument("--csv", help="keep our program's rows as PREFIX.<section>.<round>.csv")
    p.add_argument("extra", nargs="*", help="after --: further arguments of bench_cuda")
    args = p.parse_args()
    args.kinds = [k for k in args.only.split(",") if k]
    if any(k not in KINDS for k in args.kinds):
        p.error("--only takes " + ",".join(KINDS))
    return args


def main():
    args = arguments()
    torch, matmul, machine = None, 0.0, "torch not used"
    if not args.no_peers:
        import torch
        torch.manual_seed(20251121)
        machine = (f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
                   f"cuDNN {torch.backends.cudnn.version()}")
        matmul = matmul_rate(torch)
        torch.cuda.empty_cache()
    rounds, ceilings = [], []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            for r in range(args.rounds):
                path = f"{args.csv or os.path.join(folder, 'rows')}.{kind}.{r}.csv"
                rows, found = run_exe(args, kind, path)
                ceilings.append(found)
                rounds.append((rows, run_peers(torch, args, rows) if torch else {}))
                if torch:
                    matmul = max(matmul, matmul_rate(torch))
                    torch.cuda.empty_cache()
                text, bad = document(args, collect(rounds), ceilings, matmul, machine)
                if args.out:  # after every step, so that a run cut short leaves what it has
                    with open(args.out, "w", encoding="ascii") as f:
                        f.write(text)
    print(text)
    return 1 if bad or BROKEN else 0


if __name__ == "__main__":
    sys.exit(main())

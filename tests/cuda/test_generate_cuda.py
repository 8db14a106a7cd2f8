#!/usr/bin/env python3
"""The main job on the CPU and on a GPU: the same answers from the same scheduler, tree and pages.

    make build/generate build/generate_cuda
    python3 tests/cuda/test_generate_cuda.py [GENERATE [GENERATE_CUDA]] [--quick]

Run from the repository root. --quick: dense, fp8 and a selector only. A job takes a CPU with two
cores 3 to 7 s.
Prints each answer that differs and 'N passed, N failed'; 'skipped: why' without a GPU."""
import json
import os
import subprocess
import sys

args = [a for a in sys.argv[1:] if a != "--quick"]
QUICK = len(args) < len(sys.argv) - 1
CPU = args[0] if args else "./build/generate"
CUDA = args[1] if len(args) > 1 else "./build/generate_cuda"
SAME = ("answers prompt_tokens cached_tokens prefill_tokens decode_tokens steps kv_bytes "
        "kv_bytes_unshared kept_share kv mask select share").split()
JOBS = ["", "--kv fp8", "--select exact"]
MORE = ["--kv f16", "--kv bf16", "--kv int8", "--kv int4", "--mask window:1023,64",
        "--mask stride:16,8,4", "--mask stride:16,8,4 --kv fp8", "--page 7 --chunk 100 --batch 5",
        "--every 0 --kv int8", "--prompt Once --temp 1 --seed 5",
        "--select exact --page 7 --chunk 100 --batch 5", "--select exact:keep=256,heads=each",
        "--select flex:gamma=.9,tau=.1", "--select flex:gamma=.9,tau=.1,block=96 --every 0",
        "--select flex:gamma=.9,tau=.1,compat", "--select hip2:k=512,vertical=0,dense=0+3",
        "--select hip2:k=512,vertical=0,refresh=4,dense=0+3 --kv fp8",
        "--select hip:keep=512,window=256,sink=64",
        "--select hip:keep=512,kvblock=8,dense=3 --page 64 --no-share",
        "--select hip2:k=256", "--select hip1:k=256",
        "--select hip2:k=512,sample=oracle,headgroup=2",
        "--select stride:16,4,8,dense=0+2+4", "--select exact:dense=0-5"]
LISTS = 1e-3  # of the kept share, between lists of one device and of the other
passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAIL:", what, flush=True)


def run(program, *options, **env):
    return subprocess.run([program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, timeout=600, env=dict(os.environ, **env))


def job(program, device, options):
    r = run(program, "--json", "--device", device, *options.split())
    check(r.returncode == 0 and not r.stderr,
          "%s %s: exit %d %r" % (device, options, r.returncode, r.stderr[:300]))
    try:
        j = json.loads(r.stdout)
    except ValueError:
        check(False, "%s %s: not JSON: %r" % (device, options, r.stdout[:200]))
        return None
    check(j["device"] == device, "%s %s: device %r" % (device, options, j["device"]))
    return j


def compare(options):
    cpu, cuda = job(CPU, "cpu", options), job(CUDA, "cuda", options)
    if not cpu or not cuda:
        return
    for key in SAME:
        same = cpu[key] == cuda[key]
        if key == "kept_share" and cuda["select"]:  # a last bit in Q or K may choose another block
            same = abs(cpu[key] - cuda[key]) <= LISTS * cpu[key]
        check(same, "%s: %s: cpu %s, cuda %s" % (options, key, cpu[key], cuda[key]))
    check(bool(cuda["select_s"]) == bool(cpu["select_s"]), "%s: select_s" % options)
    other = [i for i, t in enumerate(cpu["texts"]) if t != cuda["texts"][i:i + 1][0]]
    for i in other:
        print("%s: answer %d: cpu %r, cuda %r" % (options or "dense", i + 1, cpu["texts"][i],
                                                  cuda["texts"][i]))
    if "int4" in options:  # 15 values to round to: a last bit in K may choose another
        right = cpu["answers_right"], cuda["answers_right"]
        check(abs(right[0] - right[1]) <= 1, "%s: cpu %d right, cuda %d" % ((options,) + right))
    else:
        check(not other, "%s: %d answers differ" % (options or "dense", len(other)))
    if not options:
        check(cuda["answers_right"] >= 31, "dense: %d right" % cuda["answers_right"])
    print("%-34s %2d of %2d alike, %2d right; cpu %.2f s, cuda %.2f s (%s)" % (
        options or "dense", len(cpu["texts"]) - len(other), len(cpu["texts"]),
        cuda["answers_right"], cpu["wall_s"], cuda["wall_s"], cuda["executor"]), flush=True)


def refused(program, word, *options, **env):
    r = run(program, *options, **env)
    check(r.returncode == 1 and r.stderr.startswith(b"generate: ") and word in r.stderr and
          not r.stdout, "%s %s: exit %d, %r" % (program, options, r.returncode, r.stderr[:300]))


def has_gpu():
    """Not asked of generate_cuda: one that does not find the GPU must fail here."""
    try:
        r = run("nvidia-smi", "-L")
    except OSError:
        return False
    return r.returncode == 0 and b"GPU" in r.stdout


def main():
    refused(CPU, b"built without", "--device", "cuda")
    refused(CUDA, b"no CUDA device", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    if not failed and not has_gpu():
        print("skipped: no CUDA device")
        sys.exit(0)
    refused(CUDA, b"portable", "--device", "cuda", "--numerics", "portable")
    refused(CUDA, b"cannot open", "--device", "cuda", "--model", "nowhere.gguf")
    refused(CUDA, b"--kv-mem", "--device", "cuda", "--kv-mem", "1")
    for spec in ("exact:epsilon=.01",):
        refused(CUDA, b"--device cpu has it", "--device", "cuda", "--select", spec)
    for options in JOBS + ([] if QUICK else MORE):
        compare(options)
    a, b = job(CPU, "cpu", ""), job(CUDA, "cpu", "")
    check(a and b and a["texts"] == b["texts"], "generate_cuda --device cpu: other answers")


main()
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)

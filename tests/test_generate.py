#!/usr/bin/env python3
"""The main job from the outside: answers, sharing, options, mistakes, another model geometry.

    pip install gguf numpy
    python3 tests/test_generate.py path/to/generate [--quick] [--only GROUP]

Run from the repository root. --quick leaves out the unshared run of the whole job (a minute),
--only all groups of tests but one.
Prints 'N passed, N failed'."""
import json
import os
import subprocess
import sys
import tempfile

import gguf
import numpy as np

BIN = sys.argv[1] if len(sys.argv) > 1 else "./generate"
QUICK = "--quick" in sys.argv
ONLY = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else None
MODEL = "examples/models/recall.gguf"
TMP = tempfile.mkdtemp(prefix="test_generate_")
KEYS = ("answers answers_right prompt_tokens cached_tokens prefill_tok_s decode_tok_s kv_bytes "
        "kv_bytes_unshared attention_share kept_share visited_share attention_s select_s wall_s "
        "texts").split()
passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAIL:", what, flush=True)


def run(*args, timeout=600):
    return subprocess.run([BIN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, timeout=timeout)


def job(*args):
    """The parsed JSON of a run, which must be all of stdout, with nothing on stderr."""
    r = run("--json", *args)
    check(r.returncode == 0 and not r.stderr,
          "%s: exit %d %r" % (args, r.returncode, r.stderr[:300]))
    try:
        j = json.loads(r.stdout)
    except ValueError:
        check(False, "%s: not JSON: %r" % (args, r.stdout[:200]))
        return dict.fromkeys(KEYS, 0, texts=[])
    check(all(k in j for k in KEYS), "%s: keys" % (args,))
    check(len(j["texts"]) == j["answers"], "%s: a text for each answer" % (args,))
    check(j["prefill_tokens"] + j["cached_tokens"] == j["prompt_tokens"],
          "%s: every prompt token is computed once or cached" % (args,))
    return j


def write(name, text):
    path = os.path.join(TMP, name)
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def small_files():
    text = open("examples/data/document.txt").read()
    cut = text.index("\n", 2200)
    doc = text[:cut + 1]
    facts = []
    for part in doc.split("Note: the code for the ")[1:]:
        name, code = part.split(" is ")[:2]
        facts.append("What is the code for the %s?\t%s\n" % (name, code[:5]))
    facts.insert(3, facts[1])  # the same question twice, at different times
    return doc, write("small.txt", doc), write("small.tsv", "".join(facts)), len(facts)


def test_main_job():
    dense = job()
    check(dense["answers"] == 32 and dense["answers_right"] >= 31,
          "dense: %s of %s right" % (dense["answers_right"], dense["answers"]))
    check(dense["kept_share"] == 1, "dense keeps every score")
    check(dense["kv_bytes"] * 20 <= dense["kv_bytes_unshared"],
          "KV bytes %s and %s" % (dense["kv_bytes"], dense["kv_bytes_unshared"]))
    doc = os.path.getsize("examples/data/document.txt") + 1
    check(dense["prefill_tokens"] < doc + 32 * 80, "the document is read once")
    eight = job("--kv", "int8")
    check(eight["answers_right"] >= 31, "int8: %s right" % eight["answers_right"])
    check(eight["kv_bytes"] * 3 < dense["kv_bytes"], "int8 takes less memory than f32")
    burst = job("--every", 0)
    check(burst["texts"] == dense["texts"], "all requests at once: other answers")
    print("dense %s right in %.2f s, int8 %s right in %.2f s" % (
        dense["answers_right"], dense["wall_s"], eight["answers_right"], eight["wall_s"]))
    if not QUICK:
        alone = job("--no-share")
        check(alone["texts"] == dense["texts"], "--no-share: other answers")
        check(alone["cached_tokens"] == 0, "--no-share finds nothing cached")
        check(alone["wall_s"] >= 5 * dense["wall_s"],
              "sharing takes %.2f s instead of %.2f s" % (dense["wall_s"], alone["wall_s"]))
        check(alone["kv_bytes"] >= 20 * dense["kv_bytes"], "--no-share KV bytes")
        print("unshared: %.2f s, %.1fx" % (alone["wall_s"], alone["wall_s"] / dense["wall_s"]))


def test_variants(doc, questions, n):
    base = ["--document", doc, "--questions", questions]
    want = job(*base)
    check(want["answers"] == n and want["answers_right"] >= n - 1, "small document: %d of %d" % (
        want["answers_right"], n))
    for args in (["--no-share"], ["--page", 1], ["--page", 7], ["--page", 16], ["--page", 64],
                 ["--page", 4096], ["--chunk", 1], ["--chunk", 33], ["--chunk", 4000],
                 ["--batch", 1],
                 ["--batch", 3], ["--every", 0], ["--every", 9], ["--threads", 1], ["--threads", 5],
                 ["--no-share", "--kv-mem", 40], ["--no-share", "--kv-mem", 20, "--batch", 2],
                 ["--kv-mem", 20], ["--no-share", "--page", 5, "--chunk", 100, "--every", 0]):
        got = job(*base, *args)
        check(got["texts"] == want["texts"], "%s: other answers: %s" % (args, got["texts"]))
        if "--no-share" in args:
            check(got["cached_tokens"] == 0, "%s: cached tokens" % args)
    for kv in "f32 f16 bf16 fp8 int8 int4".split():
        got = job(*base, "--kv", kv)
        check(got["answers_right"] >= want["answers_right"] - (1 if kv != "int4" else n),
              "--kv %s: %d right" % (kv, got["answers_right"]))
    got = job(*base, "--numerics", "portable")
    check(got["texts"] == want["texts"], "portable numerics: other answers")


def test_masks(doc, questions):
    base = ["--document", doc, "--questions", questions]
    dense = job(*base)
    n = dense["prompt_tokens"] / dense["answers"]
    for mask in ("window:100000", "window:100000,4", "stride:16,100000,1", "stride:64,1,1"):
        got = job(*base, "--mask", mask)
        check(got["texts"] == dense["texts"] and got["kept_share"] == 1, "%s is dense" % mask)
    for mask, low, high in (("window:255", 200 / n, 600 / n), ("window:255,16", 200 / n, 650 / n),
                            ("stride:16,4,8", 0.1, 0.4), ("window:0", 0, 3 / n)):
        got = job(*base, "--mask", mask)
        check(low < got["kept_share"] < high, "%s keeps %g" % (mask, got["kept_share"]))
        check(job(*base, "--mask", mask, "--page", 7, "--chunk", 50, "--no-share")["texts"] ==
              got["texts"], "%s: texts depend on sharing" % mask)
    check(job(*base, "--mask", "window:64")["answers_right"] < dense["answers_right"],
          "a short window loses facts")


# Options, and how many answers more than dense attention they may lose on the small document.
SELECTORS = (("exact", 0), ("exact:share=.2,rows=32,kvblock=16,heads=each,recent=48", 0),
             ("exact:epsilon=.01,share=.5", 0), ("flex", 0),
             ("flex:gamma=.9,tau=.1,block=32,heads=group", 0),
             ("hip2:k=256", 0),
             ("hip2:k=256,vertical=0,sample=oracle,refresh=4", 0),
             ("hip:keep=512,sink=64,window=128", 0), ("hip1:k=256,vertical=0,dense=3", 0),
             ("hip:keep=512,sink=64,window=256,kvblock=8,dense=3", 0),
             ("flex:gamma=.95,block=64,compat", 99),
             ("hip1:k=512,vertical=0,heads=group,lowdim=32", 99),
             ("hip:keep=256,sink=32,window=128,kvblock=16,"
              "stage=64/4/64/0/8,stage=64/1/16/512/4", 99))


def test_select(doc, questions):
    base = ["--document", doc, "--questions", questions]
    dense = job(*base)
    check(dense["visited_share"] == 0 and dense["select_s"] == 0, "dense selects nothing")
    for spec in ("exact:share=1", "exact:share=1,heads=all,rows=7,kvblock=5", "flex:min=100000",
                 "flex:min=100000,compat", "hip1:k=16384,vertical=0", "hip2:k=16384",
                 "hip:keep=16384",
                 "exact:from=16384", "flex:from=16384", "hip1:from=16384", "hip2:from=16384",
                 "hip:from=16384", "exact:keep=64,dense=0-5", "stride:16,4,8,dense=0+5+1-4"):
        got = job(*base, "--select", spec)
        check(got["texts"] == dense["texts"] and got["kept_share"] == 1, "%s is dense: keeps %g" % (
            spec, got["kept_share"]))
    for i, (spec, may_lose) in enumerate(SELECTORS):
        got = job(*base, "--select", spec)
        check(got["answers_right"] >= dense["answers_right"] - may_lose,
              "%s: %d right" % (spec, got["answers_right"]))
        check(0.02 < got["kept_share"] < 1, "%s keeps %g" % (spec, got["kept_share"]))
        check(0 < got["visited_share"] <= 2, "%s: visited %g" % (spec, got["visited_share"]))
        check(got["select_s"] > 0 and got["attention_s"] > 0 and
              got["select_s"] + got["attention_s"] < got["wall_s"], "%s: times" % spec)
        args = ["--page", (7, 512, 1)[i % 3], "--threads", (5, 1)[i % 2]]
        again = job(*base, "--select", spec, *args)
        check(again["texts"] == got["texts"] and again["kept_share"] == got["kept_share"],
              "%s %s: other answers" % (spec, args))
    got = job(*base, "--select", "exact:keep=64,rows=64,recent=1")
    check(got["answers_right"] < dense["answers_right"], "a block or two lose facts")
    stride = job(*base, "--select", "stride:16,4,8")
    check(stride["texts"] == job(*base, "--mask", "stride:16,4,8")["texts"], "stride is the mask")
    half = job(*base, "--select", "stride:16,4,8,dense=0+2+4")["kept_share"]
    check(abs(half - (1 + stride["kept_share"]) / 2) < 1e-5, "half of the layers dense: %g" % half)


def test_draw(doc, questions):
    """The picture's file, and that its figure is the mask's."""
    png = os.path.join(TMP, "mask.png")
    base = ["--document", doc, "--questions", questions, "--n-predict", 1]
    if b"without stb" in run("--draw", "0,0," + png, "--prompt", "x").stderr:
        print("pictures: skipped, stb_image_write.h is not installed")
        return
    kept = []
    for mask in ("dense", "window:99", "window:9"):
        kept.append(job(*base, "--mask", mask, "--draw", "1,3," + png)["drawn_mass_kept"])
        head = open(png, "rb").read()
        check(head[:8] == b"\x89PNG\r\n\x1a\n" and head[-8:-4] == b"IEND", "%s: PNG" % mask)
        side = int.from_bytes(head[16:20], "big")
        check(256 < side <= 1024 and side == int.from_bytes(head[20:24], "big"), "side %d" % side)
    check(abs(kept[0] - 1) < 1e-5 and kept[0] > kept[1] > kept[2] > 0, "attention kept: %s" % kept)
    for bad in ("1,3", "1,3,", "x,3,f.png", "1,f.png", ",,", "-1,0,f.png"):
        r = run("--draw", bad, "--prompt", "x")
        check(r.returncode == 2 and r.stderr.startswith(b"generate: --draw"), "--draw " + bad)
    for bad in ("6,0," + png, "0,4," + png, "0,0," + TMP):
        check(run("--draw", bad, "--prompt", "x").returncode == 1, "--draw " + bad)


def test_prompt():
    for g in json.load(open("examples/models/golden.json")):
        got = job("--prompt", g["prompt"], "--n-predict", len(g["greedy_tokens"]))
        check(got["texts"] == [g["greedy_text"]], "golden: %r" % got["texts"])
        r = run("--prompt", g["prompt"], "--n-predict", len(g["greedy_tokens"]))
        check(r.stdout.decode().startswith(g["prompt"] + g["greedy_text"]), "plain --prompt")
    one = job("--prompt", "Once", "--temp", 1, "--seed", 5)["texts"]
    check(one == job("--prompt", "Once", "--temp", 1, "--seed", 5)["texts"], "same seed, same text")
    check(one != job("--prompt", "Once", "--temp", 1, "--seed", 6)["texts"], "another seed")
    check(job("--prompt", "Once", "--temp", 1, "--top-k", 1)["texts"] ==
          job("--prompt", "Once")["texts"], "top-k 1 is greedy")
    job("--prompt", "caf\u00e9 \u4f60\u597d \"quoted\"\\\n", "--temp", 5, "--top-k", 0,
        "--top-p", 1)


def test_mistakes(doc, questions):
    def refused(code, *args):
        r = run(*args)
        check(r.returncode == code and r.stderr.startswith(b"generate: ") and not r.stdout,
              "%s: exit %d, %r %r" % (args, r.returncode, r.stdout[:100], r.stderr[:200]))

    for args in (["--nonsense"], ["--threads"], ["--threads", "0"], ["--threads", "x"],
                 ["--threads", "2x"], ["--threads", "99999999999999"], ["--page", "0"],
                 ["--page", "-1"], ["--chunk", "0"], ["--kv", "f64"], ["--mask", "window:"],
                 ["--mask", "window:1,2,3"], ["--mask", "window:-5"], ["--mask", "stride:1,2"],
                 ["--mask", "stride:0,1,1"], ["--mask", "stride:16,0,1"], ["--mask", ""],
                 ["--mask", "window:99999999999"], ["--numerics", "slow"], ["--temp", "-1"],
                 ["--temp", "nan"], ["--top-p", "x"], ["--n-predict", "0"]):
        refused(2, *args)
    for spec, says in (
            ("", "want stride"), ("nonsense", "want stride"), ("exac:share=1", "want stride"),
            ("exact:", "nothing"), ("exact:share", "needs a value"), ("exact:share=", "number"),
            ("exact:share=0", "above 0"), ("exact:share=1.01", "at most 1"),
            ("exact:share=nan", "number"), ("exact:keep=-1", "whole number"),
            ("exact:keep=64x", "whole number"), ("exact:gamma=.9", "no key gamma"),
            ("exact:share=.1,", "no key"), ("exact:,", "no key"),
            ("exact:share=.1,,keep=64", "no key"),
            ("exact:dense=2-1", "layers"), ("exact:dense=256", "layers"),
            ("exact:dense=1+", "layers"), ("exact:dense=", "layers"), ("exact:heads=two", "each"),
            ("exact:" + 600 * "x", "characters"), ("flex:gamma=2", "at most 1"),
            ("flex:compat=1", "no value"), ("flex:rows=64,kvblock=128", "equal"),
            ("flex:k=5", "no key k"), ("hip:lowdim=5", "no key lowdim"),
            ("hip2:sample=best", "first"), ("hip:stage=64/4/256/0", "QUERIES"),
            ("hip:stage=0/4/256/0/1", "QUERIES"), ("hip1:stage=64/4/256/0/1", "no key stage"),
            ("hip:" + ",".join(7 * ["stage=64/4/8/0/1"]), "QUERIES"),
            ("stride:1,2", "BLOCK"), ("stride:16,4,8,", "nothing"), ("stride:", "BLOCK"),
            ("stride:0,1,1", "BLOCK"), ("stride:16,4,8,rows=4", "no key"),
            ("stride", "BLOCK")):
        refused(2, "--select", spec)
        check(says.encode() in run("--select", spec).stderr, "--select %s: %s" % (spec, says))
    refused(2, "--select", "exact", "--mask", "window:64")
    refused(1, "--select", "flex:heads=all", "--prompt", "x")
    refused(1, "--select", "hip2:k=511", "--prompt", "x")
    refused(1, "--isa", "nonsense")
    refused(1, "--model", "nowhere.gguf")
    refused(1, "--model", "LICENSE")
    refused(1, "--model", ".")
    refused(1, "--document", "nowhere.txt")
    refused(1, "--document", ".")
    refused(1, "--questions", "nowhere.tsv")
    refused(1, "--questions", write("notab.tsv", "What is it?\n"))
    refused(1, "--questions", write("empty.tsv", "\n\n"))
    refused(1, "--document", write("long.txt", "x" * 17000))
    refused(1, "--prompt", "y" * 16384)
    refused(1, "--document", doc, "--questions", questions, "--kv-mem", 1)
    raw = open(MODEL, "rb").read()
    refused(1, "--model", write("cut.gguf", raw[:len(raw) // 2]))
    refused(1, "--json", "--model", write("cut.gguf", raw[:2000]))
    r = run("--help")
    check(r.returncode == 0 and b"--no-share" in r.stdout and not r.stderr, "--help")
    odd = write("odd.tsv", "What is the code\0?\tx\r\nA b\xff?\t\n".encode("latin-1"))
    got = job("--document", write("odd.txt", bytes(range(256)) * 4), "--questions", odd)
    check(got["answers"] == 2 and got["answers_right"] == 0, "bytes that are no text")


def geometry(name, one_kv_head):
    """recall.gguf with heads of 128 dims and a context of 32k, computing the same function.

    one_kv_head: both KV heads side by side in one; a query head is zero in the other head's half,
    and rope_freqs gives both halves the frequencies of 64 dims. Otherwise heads are padded with
    zeros that do not rotate. Scores are scaled by 1/sqrt(128) instead of 1/sqrt(64): queries make
    up for it."""
    src = gguf.GGUFReader(MODEL)
    path = os.path.join(TMP, name + ".gguf")
    w = gguf.GGUFWriter(path, "llama")
    skip = ("GGUF.", "general.architecture", "llama.context_length",
            "llama.attention.head_count_kv",
            "llama.rope.dimension_count")
    for key, f in src.fields.items():
        if not key.startswith(skip):
            t = f.types[0]
            w.add_key_value(key, f.contents(), t,
                            f.types[-1] if t == gguf.GGUFValueType.ARRAY else None)
    w.add_context_length(32768)
    w.add_head_count_kv(1 if one_kv_head else 2)
    w.add_key_length(128)
    w.add_value_length(128)
    w.add_rope_dimension_count(128 if one_kv_head else 64)
    if one_kv_head:
        j = np.arange(64)
        freq = lambda i, dims: 500000.0 ** (-2.0 * i / dims)
        w.add_tensor("rope_freqs.weight", (freq(j, 128) / freq(j % 32, 64)).astype(np.float32))

    def spread(x):  # (4 * 64, n) -> (4 * 128, n)
        y = np.zeros((4, 128, x.shape[1]), np.float32)
        for h in range(4):
            at = 64 * (h // 2) if one_kv_head else 0
            y[h, at:at + 64] = x.reshape(4, 64, -1)[h]
        return y.reshape(512, -1)

    def pad(x):  # (2 * 64, n) -> (2 * 128, n)
        y = np.zeros((2, 128, x.shape[1]), np.float32)
        y[:, :64] = x.reshape(2, 64, -1)
        return y.reshape(256, -1)

    for t in src.tensors:
        x = np.array(t.data)
        if t.name.endswith("attn_q.weight"):
            x = spread(x.astype(np.float32) * np.float32(2 ** 0.5))
        elif t.name.endswith("attn_output.weight"):
            x = np.ascontiguousarray(spread(x.astype(np.float32).T).T).astype(np.float16)
        elif t.name.endswith(("attn_k.weight", "attn_v.weight")) and not one_kv_head:
            x = pad(x.astype(np.float32)).astype(np.float16)
        w.add_tensor(t.name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_geometry(doc, questions):
    small = ["--document", doc, "--questions", questions]
    want = job(*small)
    for name, one in (("one_kv_head", True), ("padded", False)):
        path = geometry(name, one)
        got = job("--model", path, *small)
        check(got["texts"] == want["texts"], "%s: other answers" % name)
        if one:
            full = job("--model", path)
            check(full["answers_right"] >= 31, "%s: %d right" % (name, full["answers_right"]))
            # over 16k tokens only this one has the context; a window keeps it quick
            long = write("long.txt", open(doc).read() * 8)
            got = job("--model", path, "--document", long, "--questions", questions, "--mask",
                      "window:256,16", "--n-predict", 2)
            check(got["prompt_tokens"] > 16384 * got["answers"], "a long context")


doc_text, small_doc, small_questions, n_small = small_files()
for name, test in (("main job", test_main_job),
                   ("variants", lambda: test_variants(small_doc, small_questions, n_small)),
                   ("masks", lambda: test_masks(small_doc, small_questions)),
                   ("selectors", lambda: test_select(small_doc, small_questions)),
                   ("pictures", lambda: test_draw(small_doc, small_questions)),
                   ("prompt", test_prompt),
                   ("mistakes", lambda: test_mistakes(small_doc, small_questions)),
                   ("geometry", lambda: test_geometry(small_doc, small_questions))):
    if ONLY and name != ONLY:
        continue
    before = failed
    test()
    print("%s: %s" % (name, "ok" if failed == before else "FAILED"), flush=True)
subprocess.run(["rm", "-rf", TMP])
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)

#!/usr/bin/env python3
"""Checks examples/llama.h against independent implementations, on files made here.

    pip install gguf tokenizers numpy
    python3 tests/test_llama_py.py path/to/test_llama

Every weight type against gguf's dequantiser; byte-level BPE against the tokenizers package; SPM
against a plain Python merge loop; packed against converted weights; odd geometries; rope scaling;
broken headers. Prints 'N passed, N failed'."""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

BIN = sys.argv[1] if len(sys.argv) > 1 else "./test_llama"
TMP = tempfile.mkdtemp(prefix="test_llama_")
passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAIL:", what)


def run(*args, data=b""):
    return subprocess.run([BIN, *map(str, args)], input=data, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120)


# ---- writing models ----

def blocks(rng, qtype, n_out, n_in):
    """Random packed rows of a type: any bytes, with half-precision scales that stay finite."""
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    raw = rng.integers(0, 256, (n_out * n_in // block, size), dtype=np.uint8)
    halves = {T.Q8_0: [0], T.Q4_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}[qtype]
    for at in halves:
        scale = (rng.standard_normal(len(raw)) * 0.02).astype(np.float16)
        scale[::7] = np.float16(3e-6) * rng.integers(-9, 9)  # subnormal halves too
        raw[:, at:at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw.reshape(n_out, -1)


def tensor(rng, qtype, n_out, n_in):
    x = (rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(np.float32)
    if qtype == T.F32:
        return x, None
    if qtype == T.F16:
        x = x.astype(np.float16)
        x.reshape(-1)[:4] = [6e-8, -6e-8, 65504, 6.1e-5]
        return x, None
    if qtype == T.BF16:
        return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(n_out, -1), T.BF16
    return blocks(rng, qtype, n_out, n_in), qtype


def byte_vocab(w):
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % b for b in range(256)] + ["\u2581"]
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * 260)
    w.add_token_types([2, 3, 3] + [6] * 256 + [1])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)


def model(name, qtype=T.F32, d=256, heads=4, kv=2, hd=None, vd=None, ff=512, layers=2, vocab=None,
          n_vocab=260, tied=False, extra=None, seed=1, skip=(), rope_dim=None):
    path = os.path.join(TMP, name + ".gguf")
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    hd, vd = hd or d // heads, vd or hd or d // heads
    w.add_context_length(512)
    w.add_embedding_length(d)
    w.add_block_count(layers)
    w.add_feed_forward_length(ff)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(1e-5)
    if hd != d // heads or vd != hd:
        w.add_key_length(hd)
        w.add_value_length(vd)
    w.add_rope_dimension_count(rope_dim or hd)
    (vocab or byte_vocab)(w)
    if extra:
        extra(w)

    def put(tname, n_out, n_in, t=None):
        if tname in skip:
            return
        data, raw = tensor(rng, t if t is not None else qtype, n_out, n_in)
        w.add_tensor(tname, data, raw_dtype=raw)

    def ones(tname, n):
        if tname not in skip:
            w.add_tensor(tname, (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))

    put("token_embd.weight", n_vocab, d)
    ones("output_norm.weight", d)
    if not tied:
        put("output.weight", n_vocab, d)
    for i in range(layers):
        b = "blk.%d." % i
        ones(b + "attn_norm.weight", d)
        ones(b + "ffn_norm.weight", d)
        put(b + "attn_q.weight", heads * hd, d)
        put(b + "attn_k.weight", kv * hd, d)
        put(b + "attn_v.weight", kv * vd, d)
        put(b + "attn_output.weight", d, heads * vd)
        put(b + "ffn_gate.weight", ff, d)
        put(b + "ffn_up.weight", ff, d)
        put(b + "ffn_down.weight", d, ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


# ---- an independent forward pass ----

def load(path):
    r = gguf.GGUFReader(path)
    tensors = {}
    for t in r.tensors:
        x = gguf.quants.dequantize(t.data, t.tensor_type)
        tensors[t.name] = x.reshape([int(n) for n in reversed(t.shape)]).astype(np.float64)
    fields = {k: f.contents() for k, f in r.fields.items() if not k.startswith("tokenizer")}
    return fields, tensors


def forward(path, ids):
    f, w = load(path)
    key = lambda k, alt=None: f.get("llama." + k, alt)
    d, heads = key("embedding_length"), key("attention.head_count")
    kv, layers = key("attention.head_count_kv"), key("block_count")
    hd = key("attention.key_length", d // heads)
    vd = key("attention.value_length", hd)
    rd, base = key("rope.dimension_count", hd), key("rope.freq_base", 10000.0)
    freq = base ** (-np.arange(0, rd, 2) / rd)
    if "rope_freqs.weight" in w:
        freq = freq / w["rope_freqs.weight"]
    if key("rope.scaling.type") == "linear":
        freq = freq / key("rope.scaling.factor")
    n = len(ids)
    angle = np.arange(n)[:, None] * freq
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * g

    def rope(x):
        y = x.copy()
        y[..., 0:rd:2] = x[..., 0:rd:2] * cos - x[..., 1:rd:2] * sin
        y[..., 1:rd:2] = x[..., 0:rd:2] * sin + x[..., 1:rd:2] * cos
        return y

    x = w["token_embd.weight"][ids]
    hidden = np.arange(n)[None] > np.arange(n)[:, None]
    for i in range(layers):
        g = lambda s: w["blk.%d.%s.weight" % (i, s)]
        h = norm(x, g("attn_norm"))
        bias = lambda s: w.get("blk.%d.%s.bias" % (i, s), 0.0)
        q = rope((h @ g("attn_q").T + bias("attn_q")).reshape(n, heads, hd))
        k = rope((h @ g("attn_k").T + bias("attn_k")).reshape(n, kv, hd))
        v = (h @ g("attn_v").T + bias("attn_v")).reshape(n, kv, vd)
        o = np.empty((n, heads, vd))
        for j in range(heads):
            s = q[:, j] @ k[:, j * kv // heads].T / np.sqrt(hd)
            s[hidden] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            o[:, j] = p / p.sum(-1, keepdims=True) @ v[:, j * kv // heads]
        x = x + o.reshape(n, -1) @ g("attn_output").T
        h = norm(x, g("ffn_norm"))
        a = h @ g("ffn_gate").T
        x = x + a / (1 + np.exp(-a)) * (h @ g("ffn_up").T) @ g("ffn_down").T
    out = w.get("output.weight", w["token_embd.weight"])
    return (norm(x, w["output_norm.weight"]) @ out.T)[-1]


def logits(path, ids, limit=0):
    r = run("logits", path, limit, data=" ".join(map(str, ids)).encode())
    return np.frombuffer(r.stdout, np.float32) if r.returncode == 0 else r.stdout


# ---- the checks ----

TYPES = [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_K, T.Q5_K, T.Q6_K]


def test_types():
    for t in TYPES:
        path = model("type_" + t.name, t)
        f, w = load(path)
        for name in ("output.weight", "blk.0.ffn_down.weight"):
            got = run("rows", path, name).stdout
            want = w[name].astype(np.float32)
            check(got == want.tobytes(), "%s %s: not bit for bit" % (t.name, name))
        ids = [1, 5, 99, 100, 200, 259, 3, 4, 5, 6, 7]
        a, b = logits(path, ids), logits(path, ids, 1)
        check(a.tobytes() == b.tobytes(), "%s: packed and converted weights differ" % t.name)
        want = forward(path, ids)
        err = np.abs(a - want).max() / np.abs(want).max()
        check(err < 1e-4, "%s: logits off by %g" % (t.name, err))


def test_geometries():
    ids = [1, 9, 250, 77, 78, 79, 80, 12, 13, 14]

    def freqs(w):
        w.add_tensor("rope_freqs.weight", np.geomspace(1, 8, 32).astype(np.float32))

    def linear(w):
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(4.0)
        w.add_rope_freq_base(500000.0)

    def biases(w):
        rng = np.random.default_rng(3)
        for i in range(2):
            for s, n in (("q", 256), ("k", 128), ("v", 128)):
                w.add_tensor("blk.%d.attn_%s.bias" % (i, s),
                             rng.standard_normal(n).astype(np.float32))

    cases = {
        "tied": dict(tied=True), "mqa": dict(kv=1), "mha": dict(kv=4),
        "wide": dict(hd=128, kv=1), "narrow": dict(d=96, heads=3, kv=3, hd=40, ff=130),
        "value": dict(hd=48, vd=80), "partial": dict(rope_dim=32), "odd": dict(d=250, heads=5, kv=5,
                                                                           ff=333),
        "freqs": dict(extra=freqs), "linear": dict(extra=linear), "bias": dict(extra=biases),
    }
    for name, kw in cases.items():
        path = model("geo_" + name, T.F32, **kw)
        got, want = logits(path, ids), forward(path, ids)
        ok = isinstance(got, np.ndarray) and np.abs(got - want).max() < 1e-4 * np.abs(want).max()
        check(ok, "geometry %s: %s" % (name, got if isinstance(got, bytes) else "logits differ"))


HARD = [
    "", " ", "  ", "\n", "a", " a", "Hello, world!", "I'm you're we'll THEY'LL he'd I'VE it'S 'tis",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F", "tab\tand\ttabs\t\t x",
    "line\r\nline\r\n\r\n  end",
    "trailing   ", "   leading", "a    b     c\n\n\n   d \n e", "\n \n  \n", " \u00a0 \u3000x",
    "caf\u00e9 na\u00efve \u00fcber \u0130stanbul \u017fs '\u017f",
    "\u4f60\u597d\uff0c\u4e16\u754c 123\u5e74",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0663\u0664",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 x\U0001f44d\U0001f3fdy",
    "combining e\u0301 a\u0308\u0304 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u00bd \u2153 \u2167 \u00b2\u00b3 x\u2082 \u0e53",
    "$100.00 (50%) [a] {b} <c> a=b; x+=1; // c\n/* d */", "snake_case camelCase __init__ a.b.c",
    "----- ===== ***** ...... !!!\n\n???", "!\n\n a", " !\r\n", "'s 't", "x's\u2019s", "''''s",
    "\u2028para\u2029sep\u0085nel", "a\u200bb\ufeffc", "\U00020000\U0002a6d6 \U00010400\U0001d7d8",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababab", "\x00\x01\x02\x7f", "the the the  the",
    "<s>", "<|end|>", "\u2581under \u2581\u2581", "1\u00b2 a1b2c3 \u0661\u0662\u0663\u0664",
    "\t\tif (x) {\n\t\t\treturn;\n\t\t}\n",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def fuzz_text(rng, alphabet, n):
    return "".join(rng.choice(alphabet) for _ in range(n))


def corpus():
    with open(os.path.join(os.path.dirname(__file__), "..", "examples/data/document.txt")) as f:
        text = f.read()
    return [text] + HARD * 3


def test_bpe():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    digits = pre_tokenizers.Digits(individual_digits=True)
    kinds = {
        "gpt-2": [pre_tokenizers.Split(Regex(GPT2), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")],
        "smollm": [digits, pre_tokenizers.Split(Regex(GPT2), "isolated")],
    }
    rng = random.Random(5)
    for pre, steps in kinds.items():
        tok = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            steps + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tok.decoder = decoders.ByteLevel()
        tok.train_from_iterator(corpus(), trainers.BpeTrainer(
            vocab_size=900, show_progress=False, special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        vocab = sorted(tok.get_vocab().items(), key=lambda kv: kv[1])
        merges = json.loads(tok.to_str())["model"]["merges"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]

        def add(w):
            w.add_tokenizer_model("gpt2")
            w.add_tokenizer_pre(pre)
            w.add_token_list([t for t, _ in vocab])
            w.add_token_types([3 if t.startswith("<|") else 1 for t, _ in vocab])
            w.add_token_merges(merges)
            w.add_bos_token_id(0)
            w.add_eos_token_id(1)
            w.add_add_bos_token(False)

        path = model("bpe_" + pre, T.F32, d=32, heads=2, kv=2, ff=32, layers=1, vocab=add,
                     n_vocab=len(vocab))
        alphabet = list("ab s't'RE1 23\n\r\t  .!_") + ["\u00e9", "\u4f60", "\U0001f600", "\u0663",
                                                       "\u00a0"]
        texts = HARD + corpus()[:1]
        texts += [fuzz_text(rng, alphabet, rng.randint(1, 60)) for _ in range(150)]
        for text in texts:
            r = run("ids", path, 0, data=text.encode())
            got = [int(x) for x in r.stdout.split()]
            want = tok.encode(text, add_special_tokens=False).ids
            if "<|" in text:  # the package always parses its special tokens
                got = [int(x) for x in run("ids", path, 2, data=text.encode()).stdout.split()]
            check(got == want, "%s: %r: %s, expected %s" % (pre, text[:60], got[:20], want[:20]))
            back = run("text", path, data=" ".join(map(str, got)).encode()).stdout
            check("<|" in text or back == text.encode(),
                  "%s: %r comes back as %r" % (pre, text, back))


def spm_reference(pieces, text, prefix):
    """Joins the best-scoring neighbours, leftmost first, until nothing fits; then bytes."""
    s = list(("\u2581" if prefix else "") + text.replace(" ", "\u2581"))
    normal = {p: (sc, i) for i, (p, sc, ty) in enumerate(pieces) if ty == 1}
    while True:
        best = None
        for i in range(len(s) - 1):
            hit = normal.get(s[i] + s[i + 1])
            if hit and (best is None or hit[0] > best[0]):
                best = (hit[0], i)
        if best is None:
            break
        i = best[1]
        s[i:i + 2] = [s[i] + s[i + 1]]
    ids = []
    for piece in s:
        if piece in normal:
            ids.append(normal[piece][1])
        else:
            ids += [3 + b for b in piece.encode()]
    return ids


def test_spm():
    rng = random.Random(11)
    words = "\u2581the \u2581harbor th he er or \u2581h ar bor har"
    words = (words + " \u2581a in \u2581in ing st \u2581st re on \u2581c ode").split()
    words += list("\u2581abcdefghijklmnopqrstuvwxyz.,!?") + ["\u00e9", "\u4f60\u597d", "\u4f60",
                                                             "ab", "ba", "aba", "bab",
                                                       "\u2581\u2581", "\u2581\u2581\u2581\u2581",
                                                       "<s", "12"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [("<0x%02X>" % b, 0.0, 6) for b in range(256)]
    pieces += [(p, -float(rng.randint(0, 30)), 1) for p in dict.fromkeys(words)]
    for prefix in (0, 1):
        def add(w):
            w.add_tokenizer_model("llama")
            w.add_token_list([p for p, _, _ in pieces])
            w.add_token_scores([s for _, s, _ in pieces])
            w.add_token_types([t for _, _, t in pieces])
            w.add_add_space_prefix(bool(prefix))

        path = model("spm%d" % prefix, T.F32, d=32, heads=2, kv=2, ff=32, layers=1, vocab=add,
                     n_vocab=len(pieces))
        texts = HARD + ["the harbor code string in a harbor", "ababababa bab  the    the"]
        texts += [fuzz_text(rng, list("abthe rinostcd  .\n1\u00e9\u4f60\u597d"), rng.randint(1, 80))
                  for _ in range(150)]
        for text in texts:
            got = [int(x) for x in run("ids", path, 1, data=text.encode()).stdout.split()]
            want = [1] + (spm_reference(pieces, text, prefix) if text else [])
            check(got == want, "spm: %r: %s, expected %s" % (text[:60], got[:20], want[:20]))
        got = [int(x) for x in run("ids", path, 3, data=b"ab</s>ab").stdout.split()]
        part = spm_reference(pieces, "ab", prefix)
        check(got == [1] + part + [2] + part, "spm: control token in the text")
        r = run("ids", path, 1, data=b"ok \xff\xc3(\xe4\xbd")
        check(r.returncode == 0 and b"258\n" in r.stdout, "spm: bytes that are not UTF-8")


def test_broken():
    good = model("good", T.F32, d=64, heads=2, kv=2, ff=64, layers=1)
    raw = open(good, "rb").read()
    bad = os.path.join(TMP, "bad.gguf")

    def refused(data, what):
        with open(bad, "wb") as f:
            f.write(data)
        r = run("load", bad)
        check(r.returncode == 1 and len(r.stdout) > 20 and not r.stderr,
              "%s: exit %d, %r %r" % (what, r.returncode, r.stdout, r.stderr[:300]))

    check(run("load", good).returncode == 0, "the good file loads")
    refused(b"", "empty file")
    refused(b"GGUX" + raw[4:], "magic")
    for v in (0, 1, 4, 0x03000000):
        refused(raw[:4] + struct.pack("<I", v) + raw[8:], "version %d" % v)
    for count in (1 << 63, (1 << 64) - 1, 1 << 32, 1 << 20):
        refused(raw[:8] + struct.pack("<Q", count) + raw[16:], "tensor count %d" % count)
        refused(raw[:16] + struct.pack("<Q", count) + raw[24:], "key count %d" % count)
        refused(raw[:24] + struct.pack("<Q", count) + raw[32:], "key length %d" % count)
    at = raw.index(b"token_embd.weight") + len("token_embd.weight")
    for name, off, fmt, values in (("dims", 0, "<I", (0, 5, 1 << 31)),
                                   ("dim", 4, "<Q", (0, 1, 1 << 62)),
                                   ("rows", 12, "<Q", (0, 259, (1 << 64) - 1)),
                                   ("type", 20, "<I", (3, 99, 1 << 31)),
                                   ("offset", 24, "<Q", (len(raw), 1 << 63, (1 << 64) - 4))):
        for v in values:
            data = bytearray(raw)
            struct.pack_into(fmt, data, at + off, v)
            refused(bytes(data), "tensor %s %d" % (name, v))

    def field(key, fmt, value):
        data = bytearray(raw)
        i = raw.index(key.encode()) + len(key) + 4
        struct.pack_into(fmt, data, i, value)
        return bytes(data)

    for key in ("embedding_length", "block_count", "attention.head_count", "feed_forward_length",
                "context_length"):
        for v in (0, 0xffffffff, 0x80000000, 77777777 if key == "context_length" else 3):
            if not (key == "context_length" and v == 77777777):
                refused(field("llama." + key, "<I", v), "%s = %d" % (key, v))
    refused(field("llama.attention.layer_norm_rms_epsilon", "<f", float("nan")), "NaN epsilon")
    refused(field("llama.rope.dimension_count", "<I", 31), "odd rope dimension")
    refused(field("llama.rope.dimension_count", "<I", 34), "rope dimension over the head")
    refused(field("tokenizer.ggml.bos_token_id", "<I", 260), "bos id outside the vocabulary")
    scores = raw.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 16
    refused(raw[:scores] + struct.pack("<f", float("nan")) + raw[scores + 4:], "NaN score")
    refused(raw[:scores - 8] + struct.pack("<Q", 259) + raw[scores:], "score count")
    types = raw.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 16
    refused(raw[:types] + struct.pack("<i", -1) + raw[types + 4:], "token type")
    for name in ("output_norm.weight", "blk.0.attn_k.weight", "token_embd.weight"):
        path = model("skip", T.F32, d=64, heads=2, kv=2, ff=64, layers=1, skip=(name,))
        r = run("load", path)
        check(r.returncode == 1 and name.encode() in r.stdout, "missing " + name)
    other = raw.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lamma")
    refused(other, "architecture")
    rng = random.Random(3)
    crashed = 0
    early = raw.index(b"token_embd.weight") + 2000  # the header and the first weights
    for i in range(400):  # several bytes at once, anywhere before the weights
        data = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(early)] = rng.choice((0, 1, 255, 128, rng.randrange(256)))
        with open(bad, "wb") as f:
            f.write(data)
        r = run("logits", bad, 0, data=b"1 2 3")
        crashed += r.returncode not in (0, 1) or bool(r.stderr)
    check(crashed == 0, "%d crashes on random damage" % crashed)


for test in (test_types, test_geometries, test_bpe, test_spm, test_broken):
    before = failed
    test()
    print("%s: %s" % (test.__name__, "ok" if failed == before else "FAILED"))
subprocess.run(["rm", "-rf", TMP])
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)

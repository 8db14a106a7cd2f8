#!/usr/bin/env python3
"""Plants bugs in copies of the headers and sees whether the tests notice.

mutate.py --planted [-j J] [--only NAME,...]
    Each class of tests/test_atlas.c is put back by hand (the table PLANTS); the test of that very
    name must fail. A fragment that no longer occurs exactly once is an error.
mutate.py --random N [--seed S] [-j J] [--file attn.h] [--sections tree,pool] [--out FILE]
    N mutants drawn at random from the implementation: relational operators, off-by-one constants,
    && and ||, + and -, deleted statements, negated conditions, swapped arguments, dropped early
    returns. Those that do not compile are drawn again, those with the same object code are
    equivalent; killed: a test program fails, crashes or runs out of time or memory. At least 95 %
    of the others must be killed. tests/mutants_equivalent.txt lists survivors that were judged to
    be harmless, each with its reason.

Needs Python 3 and a C compiler (CC, default cc), POSIX. Ends with "N passed, N failed".
"""
import argparse
import concurrent.futures
import difflib
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CC = shlex.split(os.environ.get("CC", "cc"))
FLAGS = ["-w", "-I.", "-Itests"]
TESTS = ["-O0", "-DTEST_FIRST", "-DTEST_SANITIZED"]  # stop at the first failure; small doses
TESTS_OF = {"test_cpu": ["-O1"], "test_bits": ["-O1"]}  # those that run longer than they compile
KERNELS = ["-O1"]
LIBS = ["-pthread", "-lm"]
JUDGED = os.path.join(ROOT, "tests", "mutants_equivalent.txt")
MEMORY = 3 << 30  # bytes of private memory a process may have

# Program and arguments: doses small enough for hundreds of runs. They run in the order of their
# measured times.
PROGRAMS = [
    ("test_atlas", []),
    ("test_tree", ["1", "60000"]),
    ("test_plan", ["1", "600"]),
    ("test_mask", ["1", "400"]),
    ("test_api", ["1", "1"]),
    ("test_edges", []),
    ("test_cpu", ["1", "12"]),
    ("test_bits", ["1", "1"]),
    ("selftest", []),
]


# ---- running things

def limited(seconds):
    """Limits for a child: its own process group, CPU time, memory, no core, small files."""
    def set_limits():
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    return set_limits


CHILDREN = set()  # process groups that are running; None in it: this program was told to stop


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def stop(number, frame):
    groups = list(CHILDREN)
    CHILDREN.add(None)
    for pid in groups:
        if pid:
            kill_group(pid)
    sys.exit("stopped by signal %d" % number)


def execute(argv, cwd, seconds):
    """Exit status (negative: a signal, None: out of wall time) and the end of the output."""
    with tempfile.TemporaryFile(dir=cwd) as out:
        if None in CHILDREN:
            raise SystemExit("stopped")
        child = subprocess.Popen(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out,
                                 stderr=subprocess.STDOUT, preexec_fn=limited(seconds))
        CHILDREN.add(child.pid)
        try:
            status = child.wait(timeout=8 * seconds + 60)
        except subprocess.TimeoutExpired:
            status = None
        kill_group(child.pid)
        child.wait()
        CHILDREN.discard(child.pid)
        size = out.seek(0, os.SEEK_END)
        out.seek(max(0, size - 20000))
        return status, out.read().decode("utf-8", "replace")


def children_cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_seconds(argv, cwd):
    """CPU time of a run that must pass, with nothing else running beside it."""
    before = children_cpu()
    must(execute(argv, cwd, 900), "%s without a bug" % " ".join(argv))
    return children_cpu() - before


def how(status):
    if status is None or status == -signal.SIGXCPU or status == -signal.SIGKILL:
        return "ran out of time"
    if status < 0:
        return "crashed (%s)" % signal.Signals(-status).name
    return "failed"


SOURCES = {}  # name: text, as they were when the program started


def load_sources():
    for name in ("attn.h", "attn_cpu.h"):
        SOURCES[name] = read(os.path.join(ROOT, name))
    for name in os.listdir(os.path.join(ROOT, "tests")):
        if name.endswith((".c", ".h")):
            text = read(os.path.join(ROOT, "tests", name))
            SOURCES["tests/" + name] = text.replace("#define ATTN_IMPLEMENTATION\n",
                                                    "#define ATTN_CORE_IMPLEMENTATION\n")
    text = '#define ATTN_%s_IMPLEMENTATION\n#include "attn.h"\n'
    SOURCES["core.c"] = text % "CORE"
    SOURCES["cpu.c"] = text % "CPU" + '#include "attn_cpu.h"\n'


class Tree:
    """A copy of the sources to build in. Tests get the core in their own unit and the CPU backend
    from cpu.o, so that a mutant of one costs no compilation of the other. Tests are compiled
    without optimisation, which is most of their cost; kernels with."""

    def __init__(self, parent, name):
        self.dir = os.path.join(parent, name)
        os.makedirs(os.path.join(self.dir, "tests"))
        for name, text in SOURCES.items():
            write(os.path.join(self.dir, name), text)

    def compile(self, source, target, flags):
        argv = CC + FLAGS + flags + ["-c", source, "-o", target]
        return execute(argv, self.dir, 300)

    def link(self, target, objects):
        return execute(CC + ["-o", target] + objects + LIBS, self.dir, 100)

    def path(self, name):
        return os.path.join(self.dir, name)


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def must(result, what):
    status, text = result
    if status != 0:
        sys.exit("%s: %s\n%s" % (what, how(status), text))
    return text


# ---- planted bugs

# (name of the atlas test, file, fragment, replacement). Fragments are whole enough to occur once.
PLANTS = []


def plant(name, file, old, new):
    PLANTS.append((name, file, old, new))


H, C = "attn.h", "attn_cpu.h"

# keys that are not compared; chains broken by a removal; tokens that are not compared
plant("hash_collision", H, "if (t->node[x].parent == parent && t->node[x].key == key) return x;",
      "if (t->node[x].parent == parent) return x;")
plant("hash_collision", H, "if (t->node[x].parent == parent && t->node[x].key == key) return x;",
      "if (t->node[x].key == key) return x;")
plant("hash_collision", H, "if (((j - home) & mask) < ((j - i) & mask)) continue;", "continue;")
plant("hash_collision", H,
      "if (done == n || *attni_page_token(t, page, pos % pt) != tokens[done]) return done;",
      "if (done == n) return done;")
# both halves of a cut list the border page: counted once, held once, dropped never
plant("refcount_under_split", H, "(void)attn_pool_retain(&t->pool, border);", "")
plant("refcount_under_split", H, "if (low->held > 0) attni_page_hold(t, border, 1);", "")
plant("refcount_under_split", H, "up->held = low->held > 0;", "up->held = low->held;")
plant("refcount_under_split", H, "attni_page_drop(t, page, up->held > 0);", "")
# what was freed is still found; what is held is freed; freed twice
plant("stale_kv_after_eviction", H, "    attni_index_remove(t, x);\n    n->n_child = 1;",
      "    n->n_child = 1;")
plant("stale_kv_after_eviction", H, "if (n->parent >= 0 && n->n_child == 0 && n->held == 0) {",
      "if (n->parent >= 0 && n->n_child == 0) {")
plant("stale_kv_after_eviction", H,
      "attni_page_hold(t, page, -1);\n    (void)attn_pool_release(&t->pool, page);",
      "attni_page_hold(t, page, -1);\n    (void)attn_pool_release(&t->pool, page);\n"
      "    (void)attn_pool_release(&t->pool, page);")
# writing into a shared page; a copy that lacks its last token
plant("equal_positions", H,
      "return slot != 0 && (t->fill[page] > slot || t->lock[page] > slot);",
      "return slot != 0 && t->lock[page] > slot;")
plant("equal_positions", H, "copy->n_tokens = slot;", "copy->n_tokens = slot - 1;")
# 0 taken for "none"; -1 taken for a page
plant("page_zero_is_real", H, "return page >= 0 && page < d->kv.n_pages ? page : -1;",
      "return page > 0 && page < d->kv.n_pages ? page : -1;")
plant("page_zero_is_real", H, "if (page < 0 || page >= kv->n_pages)",
      "if (page <= 0 || page >= kv->n_pages)")
plant("page_zero_is_real", H, "if (page < 0 || page >= kv->n_pages)",
      "if (page < -1 || page >= kv->n_pages)")
plant("page_zero_is_real", H, "copies[i].src < 0 || t->copy_src",
      "copies[i].src <= 0 || t->copy_src")
# a mask value that real logits fall below; the missing sink as a logit of 0
plant("fully_masked_rows", C, "w->m[i] = attni_float(0xff800000u);", "w->m[i] = -1e5f;")
plant("fully_masked_rows", C, "uint32_t none = 0xff800000u, nan", "uint32_t none = 0, nan")
# negative positions and trees larger than the cache accepted; keys lost behind the first query
plant("more_queries_than_keys", H, "if (q0 < 0 || q0 + q_len > INT32_MAX)",
      "if (q0 + q_len > INT32_MAX)")
plant("more_queries_than_keys", H, "if (q_len > d->kv.kv_len[s]) return ATTN_ERR_MASK;", "")
plant("more_queries_than_keys", H, "hi = attni_min64(hi, p1 + 1); //",
      "hi = attni_min64(hi, p0 + 1); //")
# offsets in 32 bits: pages, places, scales, slots, rows of O, the bias
plant("offsets_above_2_31", H, "side->data + page * side->page_bytes",
      "side->data + (int32_t)(page * side->page_bytes)")
plant("offsets_above_2_31", H, "return place * s->token_bytes + head * s->head_bytes;",
      "return (int64_t)(uint32_t)(place * s->token_bytes + head * s->head_bytes);")
plant("offsets_above_2_31", H, "memcpy(&f, s->data + page * s->page_bytes +",
      "memcpy(&f, s->data + (uint32_t)(page * s->page_bytes) +")
plant("offsets_above_2_31", H, "h * g->bias.stride_head + t * g->bias.stride_token + j)",
      "(int32_t)(h * g->bias.stride_head + t * g->bias.stride_token + j))")
plant("offsets_above_2_31", C, "src[i]->dtype, slot / d->kv.page_tokens,",
      "src[i]->dtype, (int32_t)slot / d->kv.page_tokens,")
plant("offsets_above_2_31", C, "(token * st + head * sh)",
      "(int64_t)(int32_t)(token * st + head * sh)")
# the bound itself accepted; the last, part-filled page not looked at; run trusting the table
plant("page_table_out_of_bounds", H, "if (page < 0 || page >= kv->n_pages)",
      "if (page < 0 || page > kv->n_pages)")
plant("page_table_out_of_bounds", H,
      "n_pages = len / kv->page_tokens + (len % kv->page_tokens != 0);",
      "n_pages = len / kv->page_tokens;")
plant("page_table_out_of_bounds", H, "return page >= 0 && page < d->kv.n_pages ? page : -1;",
      "return page >= 0 && page <= d->kv.n_pages ? page : -1;")
# the new token's own span lost where it begins one; a decode's position for a prefill
plant("decode_is_last_prefill_row", H, "hi = attni_min64(hi, p1 + 1); //",
      "hi = attni_min64(hi, p1); //")
plant("decode_is_last_prefill_row", H,
      "d->kv.kv_len[s] - (d->q_start[s + 1] - d->q_start[s]);", "d->kv.kv_len[s] - 1;")
# the window of the chunk's last row for all; one key too many; sinks lost with the window
plant("window_edges_chunked", H, "lo = attni_max64(lo, p0 - (m->window_left - 1));",
      "lo = attni_max64(lo, p1 - (m->window_left - 1));")
plant("window_edges_chunked", H, "int64_t left = k->window_left ? p - (k->window_left - 1) : 0;",
      "int64_t left = k->window_left ? p - k->window_left : 0;")
plant("window_edges_chunked", H, "if (m->window_left && !m->n_sink) lo", "if (m->window_left) lo")
plant("window_edges_chunked", H, "if (m->window_right && k > p + (m->window_right - 1)) return 0;",
      "if (m->window_right && k >= p + (m->window_right - 1)) return 0;")
# the namespace cut to 32 bits, in the node and in the comparison; ignored on loading
plant("namespace_separation", H, "    n->key = key;", "    n->key = (uint32_t)key;")
plant("namespace_separation", H, "t->node[x].parent == parent && t->node[x].key == key)",
      "t->node[x].parent == parent && (uint32_t)t->node[x].key == (uint32_t)key)")
plant("namespace_separation", H, "attn_tree_open(t, ns, (const int32_t *)0, 0, &s, &hit);",
      "attn_tree_open(t, 1, (const int32_t *)0, 0, &s, &hit);")
# one scale for all tokens of a page
plant("scales_of_stored_tokens", H, "s->scale_token = head_major ? 4 : 4 * heads;",
      "s->scale_token = 0;")
# equal lengths taken for equal pages; mask rows kept from the sequence before
plant("short_sequences_in_a_tile", H, "same = attni_min64(len, (int64_t)j * kv->page_tokens);",
      "same = len;")
plant("short_sequences_in_a_tile", H, "key[1] = seq;", "key[1] = 0;")
plant("per_head_lists_in_a_group", H, "n_lists == d->n_heads ? head : head / (", "head / (")
plant("per_head_lists_in_a_group", H, "key[2] = per_head ? head : head / group;",
      "key[2] = head / group;")
# a rollback that shortens the fork as well, or leaves the page's end where it was
plant("rollback_of_drafts", H, "t->node[x].first_seq == seq && t->seq[seq].next < 0) {",
      "t->node[x].first_seq >= 0) {")
plant("rollback_of_drafts", H, "t->fill[n->last_page] = (end - 1) % t->page_tokens + 1;", "")
# a copy's source is free while the copy waits; its slots are given to others
plant("copies_carried_out_late", H, "        attni_page_begin_copy(t, page, slot);\n", "")
plant("copies_carried_out_late", H,
      "return slot != 0 && (t->fill[page] > slot || t->lock[page] > slot);",
      "return slot != 0 && t->fill[page] > slot;")
# what two sequences share taken for what they shared when the plan was made
plant("plan_kept_over_a_swap", H,
      "if (p->share[i] != attni_shared_spans(d, p, p->order[i], p->order[i + 1])) return 0;", ";")


def plant_one(args):
    work, base, i, limits = args
    name, file, old, new = PLANTS[i]
    text = SOURCES[file]
    if text.count(old) != 1:
        return name, "STALE", "the fragment occurs %d times: %s" % (text.count(old), old)
    tree = Tree(work, "plant%d" % i)
    try:
        write(tree.path(file), text.replace(old, new))
        shared = file == "attn.h" and text.index(old) < text.index("#endif // ATTNI_SHARED")
        objects = ["atlas.o", "cpu.o"]
        if file == "attn.h":
            status, out = tree.compile("tests/test_atlas.c", "atlas.o", TESTS)
        else:
            status, out, objects[0] = 0, "", base.path("test_atlas.o")
        if status == 0 and (shared or file == "attn_cpu.h"):
            status, out = tree.compile("cpu.c", "cpu.o", KERNELS)
        elif status == 0:
            objects[1] = base.path("cpu.o")
        if status == 0:
            status, out = tree.link("atlas", objects)
        if status != 0:
            return name, "BROKEN", "does not compile: " + out[-600:]
        status, out = execute(["./atlas", name], tree.dir, limits)
        if status == 0:
            return name, "MISSED", "%s -> %s" % (old.strip(), new.strip())
        first = re.search(r"(\w+\.\w+:\d+): failed: (.*)", out)
        what = "%s %s" % (first.group(1), first.group(2)) if first else how(status)
        return name, "caught", what
    finally:
        shutil.rmtree(tree.dir)


def planted(args, work, say):
    base = Tree(work, "base")
    must(base.compile("tests/test_atlas.c", "test_atlas.o", TESTS), "test_atlas.c")
    must(base.compile("cpu.c", "cpu.o", KERNELS), "cpu.c")
    must(base.link("test_atlas", ["test_atlas.o", "cpu.o"]), "linking test_atlas")
    table = SOURCES["tests/test_atlas.c"]
    names = re.findall(r'\{"(\w+)", \w+\}', table[table.index("} atlas[] ="):])
    limits = {}
    for name in args.only or names:
        limits[name] = int(6 * cpu_seconds(["./test_atlas", name], base.dir)) + 5
    jobs = [(work, base, i, limits[p[0]]) for i, p in enumerate(PLANTS) if p[0] in limits]
    passed = failed = 0
    unplanted = [] if args.only else [n for n in names if n not in [p[0] for p in PLANTS]]
    unknown = [p[0] for p in PLANTS if p[0] not in names]
    for name in unplanted + unknown:
        say("%-28s %-7s" % (name, "NO TEST" if name in unknown else "NO PLANT"))
        failed += 1
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for name, verdict, detail in pool.map(plant_one, jobs):
            say("%-28s %-7s %s" % (name, verdict, detail))
            passed += verdict == "caught"
            failed += verdict != "caught"
    say("%d planted bugs in %d classes" % (len(jobs), len(limits)))
    return passed, failed


# ---- random mutants

KEYWORDS = set("if for while switch return sizeof do else case break continue goto default".split())
TYPES = re.compile(r"(const|static|unsigned|signed|struct|enum|void|char|short|int|long|float|"
                   r"double|size_t|u?int\d+_t|uintptr_t|attni?_\w+|V|U)$")
TOKEN = re.compile(r"0[xX][0-9a-fA-F]+[uUlL]*|\d+\.\d*(?:[eE][-+]?\d+)?f?|\d+[eE][-+]?\d+f?|"
                   r"\d+[uUlL]*|[A-Za-z_]\w*|->|<<=|>>=|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||"
                   r"[-+*/%&|^]=|[^\s\w]")
SWAPS = {
    "<": ["<=", ">="], ">": [">=", "<="], "<=": ["<", ">"], ">=": [">", "<"], "==": ["!="],
    "!=": ["=="], "&&": ["||"], "||": ["&&"], "++": ["--"], "--": ["++"], "+=": ["-="],
    "-=": ["+="], "<<": [">>"], ">>": ["<<"], "%": ["/"], "/": ["*"],
}
CLASS_OF = {"&&": "logic", "||": "logic", "++": "plus", "--": "plus", "+=": "plus", "-=": "plus",
            "<<": "plus", ">>": "plus", "%": "plus", "/": "plus"}


def blank(text):
    """The text with comments, strings and preprocessor lines as spaces, of the same length."""
    def spaces(m):
        return re.sub(r"[^\n]", " ", m.group(0))
    text = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'", spaces, text,
                  flags=re.S)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", spaces, text, flags=re.M)


class Source:
    """A header: its tokens inside function bodies and the section each lies in."""

    def __init__(self, file):
        self.file = file
        self.text = SOURCES[file]
        self.start = self.text.index("Stop here if you only want the API")
        self.shared_end = (self.text.index("#endif // ATTNI_SHARED") if file == "attn.h" else -1)
        self.tokens = []  # (text, start, end)
        depth, body, before = 0, False, ""
        for m in TOKEN.finditer(blank(self.text), self.start):
            t = m.group(0)
            if t == "{":
                if depth == 0:
                    body = before == ")"
                depth += 1
            elif t == "}":
                depth -= 1
            if body and depth > 0:
                self.tokens.append((t, m.start(), m.end()))
            before = t
        self.sections = [(m.start(), m.group(1)) for m in
                         re.finditer(r"^// ==== >>impl-(\w+)", self.text, re.M)]
        self.close = self.match_brackets()

    def match_brackets(self):
        stack, close = [], {}
        for i, (t, _, _) in enumerate(self.tokens):
            if t in "([{":
                stack.append(i)
            elif t in ")]}" and stack:
                close[stack.pop()] = i
        return close

    def section(self, at):
        name = ""
        for start, s in self.sections:
            if start <= at:
                name = s
        return name

    def mutants(self):
        """All (class, start, end, replacement)."""
        out = []
        tok = self.tokens
        for i, (t, a, b) in enumerate(tok):
            before = tok[i - 1][0] if i else ""
            value = re.match(r"[\w)\]]$", before[-1:]) and before not in KEYWORDS
            if t in SWAPS and (t in ("++", "--") or value):
                for s in SWAPS[t]:
                    out.append((CLASS_OF.get(t, "relation"), a, b, s))
            elif t in "+-" and value:
                out.append(("plus", a, b, "-" if t == "+" else "+"))
            elif re.match(r"(0[xX][0-9a-fA-F]+|\d+)[uUlL]*$", t):
                digits, suffix = re.match(r"(.*?)([uUlL]*)$", t).groups()
                n = int(digits, 0)
                form = "0x%x" if digits[:2] in ("0x", "0X") else "%d"
                for v in (n + 1, n - 1):
                    if v >= 0:
                        out.append(("constant", a, b, form % v + suffix))
                if n == 0:
                    out.append(("constant", a, b, "(-1)"))
            if t == "if" and i + 1 in self.close:
                end = self.close[i + 1]
                inner = self.text[tok[i + 1][2]:tok[end][1]]
                out.append(("negate", tok[i + 1][2], tok[end][1], "!(" + inner + ")"))
                jump = tok[end + 1][0] if end + 1 < len(tok) else ""
                if jump in ("return", "continue", "break"):
                    stop = end + 1
                    while tok[stop][0] != ";":
                        stop += 1
                    out.append(("return", a, tok[stop][2], ";"))
            if (re.match(r"[A-Za-z_]\w*$", t) and t not in KEYWORDS and i + 1 < len(tok)
                    and tok[i + 1][0] == "(" and i + 1 in self.close):
                out += self.swapped_arguments(i + 1)
        return out + self.deleted_statements()

    def swapped_arguments(self, opening):
        tok, end = self.tokens, self.close[opening]
        cuts, i = [tok[opening][2]], opening + 1
        commas = []
        while i < end:
            if i in self.close:
                i = self.close[i]
            elif tok[i][0] == ",":
                commas.append((tok[i][1], tok[i][2]))
            i += 1
        if not commas:
            return []
        parts = []
        for a, b in commas:
            parts.append((cuts[-1], a))
            cuts.append(b)
        parts.append((cuts[-1], tok[end][1]))
        out = []
        for (a, b), (c, d) in zip(parts, parts[1:]):
            x, y = self.text[a:b].strip(), self.text[c:d].strip()
            if x != y:
                gap = " " if self.text[a] == " " else ""
                out.append(("arguments", a, d, "%s%s, %s" % (gap, y, x)))
        return out

    def deleted_statements(self):
        out, tok, i = [], self.tokens, 0
        while i < len(tok):
            starts = i == 0 or tok[i - 1][0] in ";{}" or tok[i - 1][0] == "else"
            if i and tok[i - 1][0] == ")":  # the body of an if, for or while
                starts = any(self.close.get(j) == i - 1 and j and
                             tok[j - 1][0] in ("if", "for", "while")
                             for j in range(max(0, i - 80), i))
            if not starts or tok[i][0] in KEYWORDS or tok[i][0] in "{};)":
                i += 1
                continue
            j = i
            while j < len(tok) and tok[j][0] not in ";{}":
                j = self.close.get(j, j) + 1 if tok[j][0] in "([" else j + 1
            first_is_type = TYPES.match(tok[i][0]) and i + 1 < len(tok) and (
                re.match(r"[A-Za-z_]", tok[i + 1][0]) or tok[i + 1][0] == "*")
            if j < len(tok) and tok[j][0] == ";" and not first_is_type and j > i + 1:
                out.append(("statement", tok[i][1], tok[j][2], ";"))
            i = j + 1
        return out


class Mutant:
    def __init__(self, source, kind, a, b, new):
        self.source, self.kind, self.a, self.b, self.new = source, kind, a, b, new
        text = source.text
        self.text = text[:a] + new + text[b:]
        self.line = text.count("\n", 0, a) + 1
        lo, hi = text.rfind("\n", 0, a) + 1, text.find("\n", b)
        self.old_lines = " ".join(text[lo:hi].split())
        self.new_lines = " ".join((text[lo:a] + new + text[b:hi]).split())
        self.where = "cpu" if source.file != "attn.h" else (
            "shared" if a < source.shared_end else "core")

    def name(self):
        return "%s:%d (%s, %s)" % (self.source.file, self.line, self.source.section(self.a),
                                   self.kind)

    def diff(self):
        d = difflib.unified_diff(self.source.text.splitlines(), self.text.splitlines(), n=0,
                                 lineterm="")
        return "\n".join("    " + s for s in list(d)[2:])


def judged():
    """{(file, old, new): reason} of survivors that are known to be harmless."""
    out, entry = {}, {}
    lines = read(JUDGED).splitlines() if os.path.exists(JUDGED) else []
    for line in lines + [""]:
        if line.startswith("#"):
            continue
        m = re.match(r"(file|old|new|why): (.*)", line)
        if m:
            entry[m.group(1)] = m.group(2)
        elif line.startswith("     ") and "why" in entry:
            entry["why"] += " " + line.strip()
        elif not line.strip() and entry:
            if set(entry) != {"file", "old", "new", "why"}:
                sys.exit("%s: an entry lacks a line: %s" % (JUDGED, entry))
            out[entry["file"], entry["old"], entry["new"]] = entry["why"]
            entry = {}
    return out


class Campaign:
    def __init__(self, work, say, without):
        self.work, self.say, self.known = work, say, judged()
        self.lock, self.count = threading.Lock(), 0
        self.base = Tree(work, "base")
        must(self.base.compile("cpu.c", "cpu.o", KERNELS), "cpu.c")
        self.programs = []
        for name, arguments in PROGRAMS:
            if name in without:
                continue
            obj = name + ".o"
            start = children_cpu()
            must(self.base.compile("tests/%s.c" % name, obj, TESTS + TESTS_OF.get(name, [])), name)
            must(self.base.link(name, [obj, "cpu.o"]), name)
            cpu = cpu_seconds(["./" + name] + arguments, self.base.dir)
            self.programs.append((children_cpu() - start, name, arguments, int(6 * cpu) + 10))
        self.programs.sort()
        for seconds, name, arguments, limit in self.programs:
            say("  %-12s %5.1f s of CPU to build and run, limit %d s" % (name, seconds, limit))

    def run(self, m):
        """(verdict, detail): killed, survived, equivalent, judged, discarded."""
        with self.lock:
            self.count += 1
            tree = Tree(self.work, "mutant%d" % self.count)
        try:
            write(tree.path(m.source.file), m.text)
            return self.try_programs(m, tree)
        finally:
            shutil.rmtree(tree.dir)

    def try_programs(self, m, tree):
        cpu = self.base.path("cpu.o")
        if m.where != "core":
            cpu = "cpu.o"
            if tree.compile("cpu.c", cpu, KERNELS)[0] != 0:
                return "discarded", ""
            if m.where == "cpu" and read_bytes(tree.path(cpu)) == read_bytes(
                    self.base.path("cpu.o")):
                return "equivalent", "same object code"
        for _, name, arguments, limit in self.programs:
            obj = "test.o"
            if m.where == "cpu":
                obj = self.base.path(name + ".o")
            elif tree.compile("tests/%s.c" % name, obj, TESTS + TESTS_OF.get(name, []))[0] != 0:
                return "discarded", ""
            if tree.link("test", [obj, cpu])[0] != 0:
                return "discarded", ""
            status, out = execute(["./test"] + arguments, tree.dir, limit)
            if status != 0 or not re.search(r"^\d+ passed, 0 failed", out, re.M):
                return "killed", "%s %s" % (name, how(status))
        if self.same_code(m, tree):
            return "equivalent", "same object code at -O2"
        why = self.known.get((m.source.file, m.old_lines, m.new_lines))
        return ("judged", why) if why else ("survived", "")

    def same_code(self, m, tree):
        for name in {"core": ["core"], "cpu": ["cpu"], "shared": ["core", "cpu"]}[m.where]:
            with self.lock:
                if not os.path.exists(self.base.path(name + "2.o")):
                    must(self.base.compile(name + ".c", name + "2.o", ["-O2"]), name)
            if tree.compile(name + ".c", name + "2.o", ["-O2"])[0] != 0:
                return False
            if read_bytes(tree.path(name + "2.o")) != read_bytes(self.base.path(name + "2.o")):
                return False
        return True


def draw(source, rng, sections):
    """Mutants without end, each class as likely as another, none twice."""
    by_class = {}
    for m in source.mutants():
        if not sections or source.section(m[1]) in sections:
            by_class.setdefault(m[0], []).append(m)
    for kind in sorted(by_class):
        rng.shuffle(by_class[kind])
    while by_class:
        kind = rng.choice(sorted(by_class))
        yield Mutant(source, *by_class[kind].pop())
        if not by_class[kind]:
            del by_class[kind]


def randomly(args, work, say):
    source = Source(args.file)
    mutants = draw(source, random.Random(args.seed), args.sections)
    start = time.time()
    say("%d mutants of %s%s, seed %d, %d at a time" % (
        args.random, args.file, " (%s)" % ", ".join(args.sections) if args.sections else "",
        args.seed, args.jobs))
    campaign = Campaign(work, say, args.without)
    counts = dict.fromkeys(["killed", "survived", "equivalent", "judged", "discarded"], 0)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running, wanted = {}, args.random
        while wanted > 0 or running:
            while wanted > len(running) and len(running) < args.jobs:
                m = next(mutants, None)
                if m is None:
                    wanted = len(running)
                    break
                running[pool.submit(campaign.run, m)] = m
            if not running:
                break
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for f in done:
                m = running.pop(f)
                verdict, detail = f.result()
                counts[verdict] += 1
                if verdict == "discarded":
                    continue
                wanted -= 1
                say("%-10s %s %s" % (verdict, m.name(), detail))
                if verdict == "survived" or args.verbose:
                    say(m.diff())
    total = counts["killed"] + counts["survived"]
    rate = 100.0 * counts["killed"] / total if total else 0
    say("killed %d of %d (%.1f %%), %d equivalent, %d judged equivalent, %d did not compile, "
        "%.0f s" % (counts["killed"], total, rate, counts["equivalent"], counts["judged"],
                    counts["discarded"], time.time() - start))
    if rate >= 95:
        return counts["killed"], 0
    return counts["killed"], max(1, counts["survived"])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--planted", action="store_true")
    p.add_argument("--random", type=int, default=0, metavar="N")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("-j", "--jobs", type=int, default=1)
    p.add_argument("--file", default="attn.h", choices=["attn.h", "attn_cpu.h"])
    p.add_argument("--sections", type=lambda s: s.split(","), default=[])
    p.add_argument("--only", type=lambda s: s.split(","), default=[],
                   help="planted bugs of these classes only")
    p.add_argument("--without", type=lambda s: s.split(","), default=[],
                   help="programs to leave out (test_bits takes longest), for a first look")
    p.add_argument("--out", help="write the report here as well")
    p.add_argument("--verbose", action="store_true", help="the diff of every mutant")
    args = p.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    if not args.planted and not args.random:
        p.error("say --planted or --random N")
    load_sources()
    out = open(args.out, "w", encoding="utf-8") if args.out else None

    def say(line):
        print(line, flush=True)
        if out:
            print(line, file=out, flush=True)

    passed = failed = 0
    for wanted, work in ((args.planted, planted), (args.random, randomly)):
        if wanted:
            with tempfile.TemporaryDirectory(prefix="mutate.") as d:
                p1, f1 = work(args, d, say)
                passed, failed = passed + p1, failed + f1
    say("%d passed, %d failed" % (passed, failed))
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""recall.py - answers right against kept share: the main job on five documents with each selector.

    make build/generate
    python3 tests/bench/recall.py [--exe build/generate] [--threads N] [--only PATTERN ...]
        [--quick] [--csv FILE] [--readme README.md] [--plot FILE.png] [--documents FOLDER]

Five documents of 15-16k tokens, each with 32 facts and a question for each: 160 questions to
examples/models/recall.gguf. Fillers are texts of different kinds (prose, three licences, C), cut
and interleaved the same way every time. A question counts as lost when dense attention answers it
right and the mask does not; nothing is netted. Times are seconds for all five documents; user CPU
time is of the whole process. Finished rows of --csv are not run again, so a long table can be
made in pieces; the plot takes matplotlib."""
import argparse
import csv
import fnmatch
import hashlib
import json
import os
import re
import resource
import subprocess
import sys

LICENCES = "/usr/share/common-licenses/"  # Debian base
N_FACTS = 32
DOCUMENT_BYTES = 15800  # a byte is a token
SIZES = range(15000, 16001)

# Family, options, the most questions that may be lost of 160 (None: no goal).
SETTINGS = [
    ("dense", "--mask dense", None),
    ("exact", "--select exact:share=.048", 1),
    ("FlexPrefill", "--select flex:gamma=.95,tau=.1", 3),
    ("HiP 3", "--select hip:keep=2048", 6),
    ("HiP 2", "--select hip2:k=1024", 16),
    ("local-stride", "--select stride:64,16,2", None),
    ("window", "--mask window:1023,64", None),
    ("exact", "--select exact:share=.01", None), ("exact", "--select exact:share=.015", None),
    ("exact", "--select exact:share=.02", None), ("exact", "--select exact:share=.1", None),
    ("exact, epsilon", "--select exact:share=.5,epsilon=.03", None),
    ("exact, epsilon", "--select exact:share=.5,epsilon=.01", None),
    ("exact, epsilon", "--select exact:share=.5,epsilon=.1", None),
    ("FlexPrefill", "--select flex:gamma=.7,tau=.1", None),
    ("FlexPrefill", "--select flex:gamma=.8,tau=.1", None),
    ("FlexPrefill", "--select flex:gamma=.9,tau=.1", None),
    ("FlexPrefill", "--select flex:gamma=.99,tau=.1", None),
    ("FlexPrefill, compatible", "--select flex:gamma=.8,tau=.1,compat", None),
    ("FlexPrefill, compatible", "--select flex:gamma=.9,tau=.1,compat", None),
    ("FlexPrefill, compatible", "--select flex:gamma=.95,tau=.1,compat", None),
    ("FlexPrefill, compatible", "--select flex:gamma=.99,tau=.1,compat", None),
    ("HiP 1", "--select hip1:k=256", None), ("HiP 1", "--select hip1:k=512", None),
    ("HiP 1", "--select hip1:k=1024", None), ("HiP 1", "--select hip1:k=2048", None),
    ("HiP 2", "--select hip2:k=256", None), ("HiP 2", "--select hip2:k=512", None),
    ("HiP 2", "--select hip2:k=2048", None),
    ("HiP 2, no verticals", "--select hip2:k=1024,vertical=0", None),
    ("HiP 2, no verticals", "--select hip2:k=4096,vertical=0", None),
    ("HiP 2, layer 3 dense", "--select hip2:k=1024,vertical=0,dense=3", None),
    ("HiP 3", "--select hip:keep=256,window=256,sink=64", None),
    ("HiP 3", "--select hip:keep=512,window=256,sink=64", None),
    ("HiP 3", "--select hip:keep=1024,window=512,sink=64", None),
    ("HiP 3, authors' stages", "--select hip:keep=2048,kvblock=8", None),
    ("HiP 3, authors' stages", "--select hip:keep=4096,kvblock=8", None),
    ("HiP 3, layer 3 dense", "--select hip:keep=2048,kvblock=8,dense=3", None),
    ("local-stride", "--select stride:64,4,16", None),
    ("local-stride", "--select stride:64,8,8", None),
    ("local-stride", "--select stride:64,16,4", None),
    ("window", "--mask window:255,64", None), ("window", "--mask window:4095,64", None),
    ("window", "--mask window:8191,64", None),
    ("window, layer 3 dense", "--select stride:64,16,4096,dense=3", None),
]
GOALS = {options: goal for _, options, goal in SETTINGS}
COLUMNS = ("options family right lost kept visited wall user select attend documents").split()


# ---- documents

class Random:
    """A generator of our own, so that a document is the same with every version of Python."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2 ** 64
        return (self.state >> 33) % n


def read(path):
    with open(path, encoding="ascii", errors="ignore") as f:
        return f.read()


def prose():
    text = read("examples/data/document.txt")
    return re.sub(r"Note: [^\n]*\n", "", text)


def fillers():
    c = "".join(read("examples/" + name) for name in
                ("prefix_tree.c", "naive_llama.c", "chunked_prefill.c", "decode_contiguous.c"))
    return [prose() + read(LICENCES + "Artistic") + read(LICENCES + "CC0-1.0"),
            read(LICENCES + "GPL-3"), read(LICENCES + "GFDL-1.3"), read(LICENCES + "MPL-1.1"), c]


def names():
    """Adjectives and nouns of the example's facts."""
    pairs = re.findall(r"code for the (\w+) (\w+) is", read("examples/data/document.txt"))
    return sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})


def document(seed, filler):
    """The text and its (question, code) pairs; facts stand at even distances, at line ends."""
    rng, facts = Random(seed), {}
    adjectives, nouns = names()
    while len(facts) < N_FACTS:
        name = "%s %s" % (adjectives[rng.below(len(adjectives))], nouns[rng.below(len(nouns))])
        if name not in facts:
            facts[name] = "%05d" % (10000 + rng.below(90000))
    notes = ["Note: the code for the %s is %s.\n" % f for f in facts.items()]
    filler = re.sub(r"\n{2,}", "\n\n", filler)[:DOCUMENT_BYTES - sum(map(len, notes))]
    filler = filler[:filler.rindex("\n") + 1]
    parts, at = [], 0
    for i, note in enumerate(notes):
        end = filler.find("\n", (2 * i + 1) * len(filler) // (2 * N_FACTS)) + 1
        end = max(end, at) if end else len(filler)
        parts += [filler[at:end], note]
        at = end
    text = "".join(parts) + filler[at:]
    questions = [("What is the code for the %s?" % n, c) for n, c in facts.items()]
    for i in range(N_FACTS - 1, 0, -1):  # asked in another order than told
        j = rng.below(i + 1)
        questions[i], questions[j] = questions[j], questions[i]
    return text, questions


def write_documents(folder):
    """[(document, questions, codes)] and a hash of all texts."""
    os.makedirs(folder, exist_ok=True)
    out, digest = [], hashlib.sha256()
    for i, filler in enumerate(fillers()):
        text, questions = document(1000 + i, filler)
        if len(text) + 1 not in SIZES:
            sys.exit("recall.py: document %d has %d tokens" % (i + 1, len(text) + 1))
        lines = "".join("%s\t%s\n" % q for q in questions)
        paths = [os.path.join(folder, "%d.%s" % (i + 1, ext)) for ext in ("txt", "tsv")]
        for path, what in zip(paths, (text, lines)):
            with open(path, "w", encoding="ascii", newline="\n") as f:
                f.write(what)
            digest.update(what.encode())
        out.append(paths + [[c for _, c in questions]])
    return out, digest.hexdigest()[:12]


# ---- runs

def user_seconds():
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def measure(args, documents, options):
    """One row: for each question whether it was right, and totals over the documents."""
    row = {"right": "", "kept": 0.0, "visited": 0.0, "wall": 0.0, "select": 0.0, "attend": 0.0}
    user, n = user_seconds(), len(documents)
    for doc, questions, codes in documents:
        cmd = [args.exe, "--json", "--document", doc, "--questions", questions,
               "--threads", str(args.threads)] + options.split() + args.also.split()
        r = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=3600)
        if r.returncode:
            print("%s: %s" % (options, r.stderr.decode(errors="replace").strip()), flush=True)
            return None
        j = json.loads(r.stdout)
        row["right"] += "".join("01"[t.startswith(c)] for t, c in zip(j["texts"], codes))
        row["kept"] += j["kept_share"] / n  # documents of nearly one length: a plain mean
        row["visited"] += j.get("visited_share", 0) / n
        row["wall"] += j["wall_s"]
        row["select"] += j.get("select_s", 0)
        row["attend"] += j.get("attention_s", 0)
    row["user"] = user_seconds() - user
    return row


def lost(dense, row):
    return sum(a == "1" and b == "0" for a, b in zip(dense, row))


def load(path, digest):
    done = {}
    if path and os.path.exists(path):
        with open(path, newline="") as f:
            for row in csv.DictReader(f):
                if row["documents"] == digest:
                    done[row["options"]] = row
    return done


def save(path, rows):
    if path:
        with open(path, "w", newline="") as f:
            w = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
            w.writeheader()
            w.writerows(rows)


# ---- output

def table(rows):
    order = [r["family"] for r in rows]
    out = ["| selector | options | lost of %d | goal | kept, %% | scored, %% | selector, s | "
           "attention, s | user CPU, s |" % len(rows[0]["right"]),
           "|---|---|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: (order.index(r["family"]), float(r["kept"]))):
        opts = r["options"].split(" ", 1)[1]
        what = "%s right" % r["right"].count("1") if r["family"] == "dense" else r["lost"]
        goal = GOALS.get(r["options"])
        seconds = ["%.1f" % float(r[k]) if float(r[k]) else "" for k in ("select", "attend")]
        out.append("| %s | `%s` | %s | %s | %.1f | %s | %s | %s | %.0f |" % (
            r["family"], opts, what, "" if goal is None else "<= %d" % goal,
            100 * float(r["kept"]),
            "%.1f" % (100 * float(r["visited"])) if float(r["visited"]) else "", *seconds,
            float(r["user"])))
    return "\n".join(out) + "\n"


def plot(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8.6, 4.2), dpi=100)
    families = []
    for r in rows:
        if r["family"] not in families and r["family"] != "dense":
            families.append(r["family"])
    n_dense = [r["right"].count("1") for r in rows if r["family"] == "dense"][0]
    colours = plt.get_cmap("tab20").colors
    for family, marker, colour in zip(families, "sDo^v<>PX*dphH8" * 3, colours):
        mine = sorted((100 * float(r["kept"]), 100 * (1 - int(r["lost"]) / n_dense))
                      for r in rows if r["family"] == family)
        ax.plot([x for x, _ in mine], [y for _, y in mine], marker=marker, color=colour,
                label=family)
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    ax.set_xlabel("kept share of the causal pairs, %")
    ax.set_ylabel("kept of what dense answers right, %")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
    fig.savefig(path, metadata={"Software": None})


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--exe", default="build/generate")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--only", nargs="*", default=["*"], help="patterns of options or families")
    p.add_argument("--quick", action="store_true", help="two documents")
    p.add_argument("--add", nargs="*", default=[], metavar="FAMILY=OPTIONS", help="more settings")
    p.add_argument("--also", default="", help="options of every run")
    p.add_argument("--csv")
    p.add_argument("--readme", help="puts the table between the markers of this file")
    p.add_argument("--plot")
    p.add_argument("--documents", default="build/recall")
    args = p.parse_args()
    documents, digest = write_documents(args.documents)
    if args.quick:
        documents, digest = documents[:2], digest + "q"
    done, rows, dense = load(args.csv, digest), [], None
    settings = [s[:2] for s in SETTINGS] + [tuple(a.split("=", 1)) for a in args.add]
    known = {options for _, options in settings}
    settings += [(r["family"], o) for o, r in done.items() if o not in known]
    for family, options in settings:
        wanted = family == "dense" or any(fnmatch.fnmatch(options, "*" + o) or
                                          fnmatch.fnmatch(family, o) for o in args.only)
        if options not in done and not wanted:
            continue
        row = done.get(options) or measure(args, documents, options)
        if not row:
            continue
        dense = dense or row["right"]
        row.update(options=options, family=family, documents=digest,
                   lost=lost(dense, row["right"]))
        done[options] = row
        rows.append(row)
        save(args.csv, done.values())
        print("%-44s right %3d, lost %3d, kept %5.1f %%, selector %6.1f s, attention %6.1f s, "
              "user %6.1f s" % (options, row["right"].count("1"), row["lost"],
                                100 * float(row["kept"]), float(row["select"]),
                                float(row["attend"]), float(row["user"])), flush=True)
    text = table(rows)
    print("documents", digest)
    print(text)
    if args.readme:
        old = read(args.readme)
        with open(args.readme, "w") as f:
            f.write(re.sub("(<!-- recall -->\n).*(<!-- /recall -->)",
                           lambda m: m[1] + text + m[2], old, flags=re.S))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()

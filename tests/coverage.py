"""coverage.py HEADER GAPS EXPORT.json... - adds up what several programs covered, and judges it.
coverage.py HEADER --report SECTION,... EXPORT.json... - only says so, of these sections.

Called by tests/coverage.sh, which says what is measured. Prints a table by section of HEADER, what
is neither covered nor listed in GAPS, entries of GAPS that no longer hold, and the verdict.
"""
import collections
import json
import os
import re
import sys

MOST_EXPLAINED = 0.02  # of all outcomes
PART = 6  # the export's kind of a branch that is one condition of several


class Function:
    """One function of the header: what every program that compiled it counted, added up."""

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.branch = collections.defaultdict(lambda: [0, 0])  # place -> [true, false]
        self.alone = collections.defaultdict(bool)  # place of a condition -> independence shown
        self.regions = collections.Counter()  # place -> count
        self.unclear = set()  # decisions whose conditions cannot be told apart


def inside(a, b):
    """Does place b hold place a? Places are (line, column, line, column)."""
    return b[:2] <= a[:2] and a[2:] <= b[2:]


def load(header, exports, wanted):
    """name -> Function, of those whose first line is wanted."""
    functions = {}
    for path in exports:
        with open(path) as f:
            data = json.load(f)["data"][0]
        for entry in data["functions"]:
            if os.path.realpath(entry["filenames"][0]) != os.path.realpath(header):
                continue
            name = entry["name"].rsplit(":", 1)[-1]  # static functions: "file.c:name"
            body = entry["regions"][0]
            if not wanted(body[0]):
                continue
            fn = functions.setdefault(name, Function(body[0], body[2]))
            here = [os.path.realpath(f) == os.path.realpath(header) for f in entry["filenames"]]
            for r in entry["regions"]:
                if r[5] == 0 and r[7] == 0 and r[:2] != r[2:4]:  # code, not a macro's nor a gap
                    fn.regions[tuple(r[:4])] += r[4]
            own = set()
            for b in entry["branches"]:
                if not here[b[6]]:
                    continue
                count = fn.branch[tuple(b[:4])]
                count[0] += b[4]
                count[1] += b[5]
                if b[8] == PART:
                    own.add(tuple(b[:4]))
            # A decision's record lists its conditions in the order of the source. Those of a
            # decision inside one of them, an argument of a call say, are not its own.
            decisions = [(tuple(m[:4]), m[-1]) for m in entry["mcdc_records"]]
            for place, shown in decisions:
                inner = [p for p, _ in decisions if p != place and inside(p, place)]
                own_leaves = sorted(p for p in own if inside(p, place)
                                    and not any(inside(p, i) for i in inner))
                if len(own_leaves) != len(shown):  # conditions inside macros: not told apart
                    fn.unclear.add(place)
                    continue
                for leaf, alone in zip(own_leaves, shown):
                    fn.alone[leaf] |= bool(alone)
    return functions


def executed(fn, source):
    """(line, count of the innermost region it begins in) of the function's lines of code."""
    order = sorted(fn.regions, key=lambda p: (p[2] - p[0], p[3] - p[1]))
    for line in range(fn.first, fn.last + 1):
        text = source[line - 1]
        at = (line, len(text) - len(text.lstrip()) + 1)
        if re.match(r"\s*([{}]*\s*(//.*)?|#.*)$", text):
            continue
        for p in order:
            if p[:2] <= at < p[2:] or (p[0] == line == fn.first):
                yield line, fn.regions[p]
                break


def read_gaps(path):
    """Entries (function, outcome, condition, line of source), each with a reason."""
    gaps = collections.Counter()
    with open(path) as f:
        text = re.sub(r"(?m)^#.*\n", "", f.read())
    for block in re.split(r"\n\s*\n", text.strip()):
        part = [p.strip() for p in block.split("\n")]
        head = part[0].split(None, 2)
        if not block.strip():
            continue
        if len(part) < 3 or len(head) != 3 or head[1] not in ("true", "false", "alone"):
            sys.exit("%s: not an entry: %s" % (path, part[0]))
        gaps[(head[0], head[1], head[2], part[1])] += 1
    return gaps


def text_of(source, place):
    l1, c1, l2, c2 = place
    if l1 == l2:
        return source[l1 - 1][c1 - 1:c2 - 1]
    rows = [source[l1 - 1][c1 - 1:]] + source[l1:l2 - 1] + [source[l2 - 1][:c2 - 1]]
    return " ".join(r.strip() for r in rows)


def sections(source):
    """Line number -> tag of its section."""
    tag, out = "-", [""]
    for line in source:
        found = re.match(r"// ==== >>(\S+)", line)
        tag = found.group(1) if found else tag
        out.append(tag)
    return out


def main():
    header, gap_file, exports = sys.argv[1], sys.argv[2], sys.argv[3:]
    report = exports.pop(0).split(",") if gap_file == "--report" else None
    with open(header) as f:
        source = f.read().split("\n")
    tag = sections(source)
    functions = load(header, exports, lambda line: not report or tag[line] in report)
    gaps = collections.Counter() if report else read_gaps(gap_file)
    listed = sum(gaps.values())
    table = collections.OrderedDict((t, collections.Counter()) for t in tag if t)
    missing = []
    explained = set()  # lines

    def count(line, column, ok):
        row = table[tag[line]]
        row[column] += 1
        row[column + " ok"] += bool(ok)

    def judge(name, place, what, ok, column):
        """A thing to be shown: covered, explained by an entry of the list, or missing."""
        key = (name, what, text_of(source, place), source[place[0] - 1].strip())
        count(place[0], column, ok)
        if ok:
            return
        if gaps[key] > 0:
            gaps[key] -= 1
            explained.add(place[0])
            table[tag[place[0]]][column + " explained"] += 1
        else:
            missing.append((place, key))

    for name, fn in sorted(functions.items(), key=lambda item: item[1].first):
        for line, n in executed(fn, source):
            count(line, "lines", n)
        for place in sorted(fn.branch):
            true, false = fn.branch[place]
            judge(name, place, "true", true, "outcomes")
            judge(name, place, "false", false, "outcomes")
            if place in fn.alone:
                judge(name, place, "alone", fn.alone[place], "conditions")
        missing += [(place, (name, "alone", text_of(source, place), ""))
                    for place in fn.unclear if not report]
        for place in sorted(fn.regions):
            count(place[0], "regions", fn.regions[place])
            # code that only a listed outcome leads to stands beside or below its condition
            if not fn.regions[place] and not {place[0], place[0] - 1} & explained:
                missing.append((place, (name, "reached", text_of(source, place)[:60], "")))

    columns = ("lines", "regions", "outcomes", "conditions")
    form = "%-14s" + " %13s" * 4 + " %9s"
    print(form % (("section",) + columns + ("explained",)))
    total = collections.Counter()
    for name, row in list(table.items()) + [("all", total)]:
        if not row:
            continue
        cells = ["%d/%d" % (row[c + " ok"], row[c]) for c in columns]
        print(form % ((name,) + tuple(cells) +
                      (row["outcomes explained"] + row["conditions explained"],)))
        total.update(row if row is not total else {})
    print("lines, regions: reached / all; outcomes: of each condition, true and false;")
    print("conditions: of decisions with several, whose independent effect was shown (MC/DC)")

    for place, (name, what, condition, _) in sorted(missing):
        print("%s:%d:%d: %s: not shown %s: %s" %
              (os.path.basename(header), place[0], place[1], name, what, condition))
    if report:
        return 0
    stale = [key for key in gaps for _ in range(gaps[key])]
    for name, what, condition, _ in stale:
        print("%s: covered or gone: %s %s %s" % (gap_file, name, what, condition))
    judged = total["outcomes"] + total["conditions"]
    few = listed <= MOST_EXPLAINED * judged
    if not few:
        print("%d of %d explained: more than %g %%" % (listed, judged, 100 * MOST_EXPLAINED))
    failed = len(missing) + len(stale) + (not few) + (judged == 0)
    print("%d passed, %d failed" % (judged - len(missing), failed))
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())

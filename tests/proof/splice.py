#!/usr/bin/env python3
"""Puts ACSL contracts beside the functions of a header, and planted bugs into it.

    splice.py HEADER OUT [--plant FILE:NAME] SPEC...

A spec file is a list of blocks; each block's text is inserted, nothing is ever removed:
    == NAME             before the definition of function NAME
    -- before: TEXT     (inside the last NAME) before the line that holds TEXT
    -- after: TEXT      ... after it
    -- end              ... before its closing brace
    == before: TEXT     anywhere in the header, before the line that holds TEXT
Each NAME and TEXT must be found exactly once, so that a contract cannot silently lose its code.
A plant file replaces text instead: '== NAME FUNCTION', then '- OLD' and '+ NEW'.
"""
import re
import sys


def fail(message):
    sys.exit("splice: " + message)


def function(text, name):
    """(start, end) of the definition of a function, from its first line to its closing brace."""
    found = [m for m in re.finditer(
        r"^(?:ATTN_DEF|ATTNI_FN|ATTNI_FAR|static)\b[^;{}#=]*?\b%s\([^;{}]*\) \{" % re.escape(name),
        text, re.M)]
    if len(found) != 1:
        fail("%d definitions of %s" % (len(found), name))
    start = found[0].start()
    line_end = text.index("\n", found[0].end())
    if text[line_end - 1] == "}":
        return start, line_end + 1
    return start, text.index("\n}\n", start) + 3


def line_of(text, wanted, start, end, where):
    """(start, end) of the one line in [start, end) that holds the wanted text."""
    if text.count(wanted, start, end) != 1:
        fail("%d times in %s: %s" % (text.count(wanted, start, end), where, wanted))
    at = text.index(wanted, start, end)
    return text.rindex("\n", 0, at) + 1, text.index("\n", at + len(wanted) - 1) + 1


def blocks(path):
    head, body = None, []
    with open(path, encoding="ascii") as lines:
        for line in lines:
            if line.startswith(("== ", "-- ")):
                if head:
                    yield head, "".join(body)
                head, body = line.rstrip("\n"), []
            elif head:
                body.append(line)
    if head:
        yield head, "".join(body)


def plant(text, path, name):
    for head, body in blocks(path):
        words = head.split()
        if words[1] != name:
            continue
        start, end = function(text, words[2])
        lines = body.splitlines()
        old = "\n".join(x[2:] for x in lines if x.startswith("- "))
        new = "\n".join(x[2:] for x in lines if x.startswith("+ "))
        if text.count(old, start, end) != 1:
            fail("plant %s: %d times in %s" % (name, text.count(old, start, end), words[2]))
        return text[:start] + text[start:end].replace(old, new) + text[end:]
    return fail("no plant " + name)


def main(argv):
    header, out, argv = argv[0], argv[1], argv[2:]
    with open(header, encoding="ascii") as f:
        text = f.read()
    planted = None
    if argv and argv[0] == "--plant":
        planted, argv = argv[1].rsplit(":", 1), argv[2:]
    edits, name = [], None  # (place in the unchanged text, order, inserted text)
    for spec in argv:
        for head, body in blocks(spec):
            kind, rest = head[:2], head[3:]
            if kind == "==" and rest.startswith("before: "):
                at = line_of(text, rest[8:], 0, len(text), header)[0]
            elif kind == "==":
                name = rest
                at = function(text, name)[0]
            elif rest == "end":
                at = function(text, name)[1] - 2
            else:
                side, wanted = rest.split(": ", 1)
                start, end = function(text, name)
                at = line_of(text, wanted, start, end, name)[side == "after"]
            edits.append((at, len(edits), body))
    for at, _, body in sorted(edits, reverse=True):
        text = text[:at] + body + text[at:]
    if planted:
        text = plant(text, planted[0], planted[1])
    with open(out, "w", encoding="ascii") as f:
        f.write(text)


main(sys.argv[1:])

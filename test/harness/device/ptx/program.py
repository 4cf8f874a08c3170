"""One kernel of a PTX file as a list of instructions."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """guard: the predicate that must hold, and whether negated. op: the parts of the opcode. args: operands, vectors as tuples."""

    guard: tuple | None
    op: tuple
    args: tuple
    text: str


@dataclass(frozen=True)
class Program:
    """labels: to indices of instructions. parameters: to offsets in the bytes of the arguments."""

    instructions: list
    labels: dict
    parameters: dict


def parse(text, kernel):
    """The entry whose mangled name contains ``kernel``. Raises ValueError where there is none or more than one."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = [m for m in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)", text, re.S) if kernel in m[1]]
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} entries are called {kernel!r}")
    parameters = _parameters(entries[0][2])
    instructions, labels = [], {}
    for statement in _body(text, entries[0].end()).split(";"):
        # Braces that begin a statement open and close scopes; those of vectors follow an opcode.
        statement = statement.lstrip(" \t\n{}").rstrip()
        while label := re.match(r"(\$?\w+):\s*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :].lstrip(" \t\n{}")
        if statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    return Program(instructions, labels, parameters)


def _parameters(text):
    offsets, at = {}, 0
    for align, kind, name, count in re.findall(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", text):
        size = int(re.sub(r"\D", "", kind)) // 8
        align = int(align or size)
        at = -(-at // align) * align
        offsets[name] = at
        at += size * int(count or 1)
    return offsets


def _body(text, start):
    start = text.index("{", start) + 1
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1]


def _instruction(statement):
    guard = None
    if guarded := re.match(r"@(!?)(%p\d+)\s+", statement):
        guard = guarded[2], bool(guarded[1])
        statement = statement[guarded.end() :]
    op, _, rest = statement.replace("\t", " ").partition(" ")
    args = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
    vectors = (tuple(x.strip() for x in a.strip("{} ").split(",")) if a.startswith("{") else a.strip() for a in args)
    return Instruction(guard, tuple(op.split(".")), tuple(vectors), statement)

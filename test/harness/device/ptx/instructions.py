"""What each instruction does to a block (machine.py), by the first part of its opcode."""

import numpy as np

from harness.device.ptx.values import SIGNED, from_raw, size_of

U64 = np.uint64


def compute(function):
    """An instruction that makes one value of others of its type."""

    def run(block, instruction):
        kind = instruction.op[-1]
        with np.errstate(all="ignore"):
            result = function(*(block.get(arg, kind) for arg in instruction.args[1:]))
        block.set(instruction.args[0], result, kind)

    return run


def multiply(block, instruction):
    """mul and mad, of which .lo keeps the width, .wide doubles it, .hi takes the upper half."""
    op, kind, args = instruction.op, instruction.op[-1], instruction.args
    if kind[0] == "f":
        return compute(np.multiply)(block, instruction)
    a, b = (block.get(arg, kind) for arg in args[1:3])
    to = kind
    if op[1] != "lo":
        bits = int(kind[1:])
        wide = f"{kind[0]}{2 * bits}"
        a, b = (to_signed_or_not(x, wide) for x in (a, b))
        product = a * b
        to = wide if op[1] == "wide" else kind
        product = product >> bits if op[1] == "hi" else product
    else:
        product = a * b
    if op[0] == "mad":
        product = product + block.get(args[3], to)
    block.set(args[0], product, to)


def to_signed_or_not(values, kind):
    return values.astype(SIGNED[kind[1:]]) if kind[0] == "s" else values.astype(f"u{size_of(kind)}")


def fused(a, b, c):
    return a.astype(np.float64) * b + c


def quotient(a, b):
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(np.int64)
    return np.trunc(a.astype(np.int64) / b)


def remainder(a, b):
    return np.fmod(a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64))


def power(x):
    y = np.exp2(x.astype(np.float64))
    return np.where(y < 2.0**-126, 0, y)


def smaller(a, b):
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def larger(a, b):
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def lop3(block, instruction):
    d, a, b, c, table = instruction.args
    a, b, c, table = block.get(a, "u32"), block.get(b, "u32"), block.get(c, "u32"), int(table, 0)
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    block.set(d, result, "u32")


def permute(block, instruction):
    d, a, b, selector = instruction.args
    both = block.get(a, "u32").astype(U64) | block.get(b, "u32").astype(U64) << U64(32)
    selector, result = block.get(selector, "u32").astype(U64), np.zeros(block.count, U64)
    for i in range(4):
        byte = both >> (selector >> U64(4 * i) & U64(7)) * U64(8) & U64(255)
        result |= byte << U64(8 * i)
    block.set(d, result, "u64")


def shift(block, instruction):
    (name, kind), (d, a, by) = instruction.op, instruction.args
    x, by, bits = block.get(a, kind), block.get(by, "u32"), int(kind[1:])
    inside = np.minimum(by, bits - 1).astype(x.dtype)
    result = x << inside if name == "shl" else x >> inside
    past = x >> (bits - 1) if kind[0] == "s" else np.zeros_like(x)
    block.set(d, np.where(by < bits, result, past), kind)


def convert(block, instruction):
    op, args = instruction.op, instruction.args
    to, kind = op[-2:]
    if to in ("f16x2", "bf16x2"):  # the first operand is the high half
        high, low = (block.get(arg, kind) for arg in args[1:])
        with np.errstate(all="ignore"):
            return block.set(args[0], np.stack([low, high], 1), to)
    x = block.get(args[1], kind)
    with np.errstate(all="ignore"):
        if "rzi" in op:
            x = np.nan_to_num(np.trunc(x.astype(np.float64))).astype(np.int64)
        block.set(args[0], x.astype(np.int64) if to[0] in "su" else x, to)


COMPARISONS = {
    "eq": np.equal, "ne": lambda a, b: ~np.isnan(a) & ~np.isnan(b) & (a != b) if a.dtype.kind == "f" else a != b,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "equ": lambda a, b: ~(a < b) & ~(a > b), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip


def compare(block, instruction):
    _, relation, kind = instruction.op
    d, a, b = instruction.args
    with np.errstate(all="ignore"):
        block.set(d, COMPARISONS[relation](block.get(a, kind), block.get(b, kind)), "pred")


def select(block, instruction):
    d, a, b, condition = instruction.args
    block.set(d, np.where(block.get(condition, "pred"), block.raw(a), block.raw(b)), "u64")


def move(block, instruction):
    """A vector of registers is the parts of one, the lowest first."""
    to, source = instruction.args
    part = 16 if instruction.op[-1] == "b32" else 32
    if isinstance(to, tuple):
        for i, name in enumerate(to):
            block.set(name, block.raw(source) >> U64(part * i), f"u{part}")
    elif isinstance(source, tuple):
        low, high = (block.get(name, f"u{part}").astype(U64) for name in source)
        block.set(to, low | high << U64(part), "u64")
    else:
        block.set(to, block.raw(source), "u64")


def load(block, instruction):
    space, kind = instruction.op[1], instruction.op[-1]
    names, size = instruction.args[0], size_of(kind)
    addresses = block.address(instruction.args[1])
    for i, name in enumerate(names if isinstance(names, tuple) else (names,)):
        at = addresses + i * size
        if space == "param":
            first = int(at[0])
            value = int.from_bytes(block.arguments[first : first + size], "little")
            raw = np.full(block.count, value, U64)
        else:
            raw = block.load(space, at, size)
        block.set(name, from_raw(raw, kind), kind)


def store(block, instruction):
    space, kind = instruction.op[1], instruction.op[-1]
    values, size = instruction.args[1], size_of(kind)
    addresses = block.address(instruction.args[0])
    for i, name in enumerate(values if isinstance(values, tuple) else (values,)):
        block.store(space, addresses + i * size, size, block.raw(name))


def atomic(block, instruction):
    d, address, value = instruction.args
    size, everyone = size_of(instruction.op[-1]), block.active
    addresses, added = block.address(address), block.raw(value)
    for thread in np.flatnonzero(everyone):
        one = np.arange(block.count) == thread
        before = block.load("global", addresses, size, one)
        block.store("global", addresses, size, before + added, one)
        block.active = one
        block.set(d, before, "u64")
    block.active = everyone


def asynchronous_copy(block, instruction):
    what = instruction.op[2]
    if what == "commit_group":
        for thread in np.flatnonzero(block.active):
            block.groups[thread].append([copy[1:] for copy in block.open if copy[0] == thread])
        block.open = [copy for copy in block.open if not block.active[copy[0]]]
    elif what == "wait_group":
        block.land_copies(int(instruction.args[0]))
    else:
        to, source = (block.address(arg) for arg in instruction.args[:2])
        block.load("shared", to, 8), block.load("global", source, 8)  # checks them
        block.open += [(t, int(to[t]), int(source[t])) for t in np.flatnonzero(block.active)]


def branch(block, instruction):
    block.pc[block.active] = block.program.labels[instruction.args[0]]


def leave(block, instruction):
    block.pc[block.active] = len(block.program.instructions)


def barrier(block, instruction):
    if instruction.op[1] == "warp":
        block.whole_warps(instruction)
    else:
        block.waiting[block.active] = block.here


def shuffle(block, instruction):
    block.whole_warps(instruction)
    d, x, lane = instruction.args[:3]
    threads, lane = np.arange(block.count), block.get(lane, "u32").astype(np.int64)
    source = threads ^ lane if instruction.op[2] == "bfly" else threads // 32 * 32 + lane % 32
    block.set(d.split("|")[0], block.raw(x)[source], "u64")


def vote(block, instruction):
    block.whole_warps(instruction)
    any_lane = block.get(instruction.args[1], "pred").reshape(-1, 32).any(1)
    block.set(instruction.args[0], np.repeat(any_lane, 32), "pred")


def load_matrices(block, instruction):
    block.whole_warps(instruction)
    threads = np.arange(block.count)
    first, lane = threads // 32 * 32, threads % 32
    rows = block.address(instruction.args[1])
    for i, name in enumerate(instruction.args[0]):
        halves = [block.load("shared", rows[first + 8 * i + 2 * (lane % 4) + h] + 2 * (lane // 4), 2) for h in range(2)]
        block.set(name, halves[0] | halves[1] << U64(16), "u64")


def matrix_multiply(block, instruction):
    """mma.m16n8k16, exactly; the fragments as in the PTX manual."""
    block.whole_warps(instruction)
    d, a, b, c = instruction.args
    kind = f"{instruction.op[-2]}x2"
    threads = np.arange(block.count)
    warp, g, t = threads // 32, threads % 32 // 4, threads % 4
    warps = block.count // 32
    left, right, total = (np.zeros((warps, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
    for h in range(2):
        for i, name in enumerate(a):
            left[warp, g + i % 2 * 8, 2 * t + h + i // 2 * 8] = block.get(name, kind)[:, h]
        for i, name in enumerate(b):
            right[warp, 2 * t + h + 8 * i, g] = block.get(name, kind)[:, h]
    for i, name in enumerate(c):
        total[warp, g + i // 2 * 8, 2 * t + i % 2] = block.get(name, "f32")
    with np.errstate(all="ignore"):
        total += left @ right
    for i, name in enumerate(d):
        block.set(name, total[warp, g + i // 2 * 8, 2 * t + i % 2], "f32")


def logic(function):
    def run(block, instruction):
        kind = "pred" if instruction.op[-1] == "pred" else "u64"
        result = function(*(block.get(arg, kind) for arg in instruction.args[1:]))
        width = instruction.op[-1]
        block.set(instruction.args[0], result, kind if width == "pred" else f"u{width[1:]}")

    return run


def nothing(block, instruction):
    """Fences: threads of a block run in turn."""


INSTRUCTIONS = {
    "abs": compute(np.abs), "add": compute(np.add), "sub": compute(np.subtract), "neg": compute(np.negative),
    "mul": multiply, "mad": multiply, "fma": compute(fused), "div": compute(quotient), "rem": compute(remainder),
    "rcp": compute(lambda x: 1 / x), "min": compute(smaller), "max": compute(larger), "ex2": compute(power),
    "lg2": compute(lambda x: np.log2(x.astype(np.float64))), "and": logic(np.bitwise_and), "or": logic(np.bitwise_or),
    "xor": logic(np.bitwise_xor), "not": logic(np.invert), "lop3": lop3, "prmt": permute, "shl": shift, "shr": shift,
    "cvt": convert, "cvta": move, "setp": compare, "selp": select, "mov": move, "ld": load, "st": store, "atom": atomic,
    "cp": asynchronous_copy, "bra": branch, "ret": leave, "exit": leave, "bar": barrier, "barrier": barrier, "shfl": shuffle,
    "vote": vote, "ldmatrix": load_matrices, "mma": matrix_multiply, "membar": nothing, "fence": nothing,
}  # fmt: skip

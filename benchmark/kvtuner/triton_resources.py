"""Compile every Triton kernel for sm_89 and sm_90, without a GPU, and list what each needs: registers, spills, shared memory,
instructions.

    python benchmark/kvtuner/triton_resources.py           # print the table
    python benchmark/kvtuner/triton_resources.py --write   # into docs/gpu_kernels.md

Counted is what ptxas made, by cuobjdump and nvdisasm of the Triton package.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang.kernels.ops.attention.kvtuner import triton_launch as launch
from sglang.kernels.ops.attention.kvtuner.triton_attend import attend_decode_kernel
from sglang.kernels.ops.attention.kvtuner.triton_gather import gather_kernel
from sglang.kernels.ops.attention.kvtuner.triton_merge import merge_into_kernel, merge_splits_kernel
from sglang.kernels.ops.attention.kvtuner.triton_plan import plan_decode_kernel
from sglang.kernels.ops.attention.kvtuner.triton_store import store_pages_kernel, store_rows_kernel
from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.hadamard import block_size

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpu_kernels.md"
BEGIN, END = "<!-- table: benchmark/kvtuner/triton_resources.py --write -->", "<!-- end of table -->"
TARGETS = (89, 90)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


@dataclass(frozen=True)
class Recipe:
    """Formats of a layer, and the model around them: 4 query heads for each of 8 KV heads."""

    name: str
    key: TensorFormat
    value: TensorFormat
    dtype: str = "bf16"
    sinks: int = 0


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs. spills: bytes of a thread's local memory. shared: bytes of a block."""

    registers: int
    spills: int
    shared: int
    instructions: int


def _recipe(
    key: str, value: str, *, head_dim: int = 128, page: int = 64, rotated: bool = False, **model: Any
) -> Recipe:
    """key, value: such as ``4at64``: bits, sym or asym, per token or channel, group; or ``16``."""

    def tensor(text: str, token_lanes: bool) -> TensorFormat:
        if text == "16":
            return TensorFormat.unquantized(page, head_dim, token_lanes)
        bits, asym, axis, group = re.fullmatch(r"(\d)([as])([tc])(\d+)", text).groups()  # type: ignore[union-attr]
        rotation = block_size(head_dim) if rotated and token_lanes else 0
        return TensorFormat(int(bits), asym == "a", "tc".index(axis), int(group), page, head_dim, token_lanes, rotation)

    words = [f"K {key} V {value}", f"head_dim {head_dim}"]
    words += [f"page {page}"] * (page != 64) + ["rotated"] * rotated + [f"{k} {v}" for k, v in model.items()]
    return Recipe(", ".join(words), tensor(key, True), tensor(value, False), **model)


RECIPES = (
    _recipe("4st64", "4st64"),
    _recipe("4ac64", "4at64"),
    _recipe("4ac32", "4at32"),
    _recipe("8at64", "4at64", rotated=True),
    _recipe("8st128", "8st128"),
    _recipe("2ac32", "2at32"),
    _recipe("4at128", "2at128", sinks=4),
    _recipe("16", "16"),
    _recipe("16", "4at64", sinks=4),
    _recipe("4ac64", "4at64", dtype="fp16"),
    _recipe("4ac64", "4at64", head_dim=64),
    _recipe("4ac64", "4at80", head_dim=80),
    _recipe("4at48", "4at96", head_dim=96, rotated=True),
    _recipe("8ac64", "4at64", head_dim=256),
    _recipe("4ac128", "4at64", page=128),
    _recipe("4ac16", "4at64", page=16),
    _recipe("4ac64", "4at64", dtype="fp32"),
)


def kernels(recipe: Recipe) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Name, kernel, constants and launch options of what a layer of the recipe runs."""
    key, value, dtype = recipe.key, recipe.value, _DTYPES[recipe.dtype]
    tile = launch.tile_tokens(key.page_size, key.head_dim, 4 if recipe.dtype == "fp32" else 2)
    cache = {"KV_HEADS": 8, "RING": 2 * key.page_size, "SINKS": recipe.sinks}
    both = {"K": key, "V": value, **cache}
    pack = launch.pack_options(key.page_size, key.head_dim)
    attend = {**both, "HEADS": 32, "SPLITS": 8, "TOKENS": tile, "DOT": dtype}
    yield "attend", attend_decode_kernel, attend, launch.attend_options(key.head_dim)
    yield "store", store_pages_kernel, {**both, "DECODE": True}, pack
    yield "gather K", gather_kernel, {"F": key, **cache, "TOKENS": tile}, launch.GATHER
    yield "gather V", gather_kernel, {"F": value, **cache, "TOKENS": tile}, launch.GATHER


def plain_kernels(head_dim: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Those to which formats mean nothing."""
    yield "plan", plan_decode_kernel, {"PAGE": 64, "RESIDUAL": 128, "BLOCK": launch.PLAN_PAGES}, {}
    yield "merge splits", merge_splits_kernel, {"HEAD_DIM": head_dim, "PARTS": 9}, {}
    yield "merge rounds", merge_into_kernel, {"HEAD_DIM": head_dim}, {}
    rows = {"HEAD_DIM": head_dim, "KV_HEADS": 8, "RING": 192, "TOKENS": launch.ROW_TOKENS}
    yield "store rows", store_rows_kernel, rows, {}


def compile_kernel(kernel: Any, constants: dict[str, Any], options: dict[str, Any], dtype: str, target: int) -> Usage:
    """Compile for compute capability ``target`` (89 for sm_89)."""
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = _type_of(name, dtype)
        strides = name.endswith(("_row", "_head", "_stride")) and not kernel.params[i].do_not_specialize
        if signature[name].startswith("*") or strides:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, code = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", resources)[-1]) for what in ("REG", "STACK", "LOCAL"))
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    return Usage(registers, stack + local, compiled.metadata.shared, instructions)


def _type_of(argument: str, dtype: str) -> str:
    types = {
        "*i64": ("slots", "seq_lens"),
        "*i32": ("prefix_lens", "packed_end", "pages", "query_start", "prefix_start", "ring_start", "req_to_token"),
        "*u8": ("key_pages", "value_pages", "packed"),
        "*fp32": ("part_out", "part_lse", "lse"),
        "fp32": ("scaling",),
        "i32": ("window", "window_tokens"),
    }
    for kind, names in types.items():
        if argument in names:
            return kind
    return "i32" if argument.endswith(("_row", "_head", "_stride")) else f"*{dtype}"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def rows() -> Iterator[tuple[str, str, int, Usage]]:
    """Recipe, kernel, target and usage of everything."""
    for target in TARGETS:
        for recipe in RECIPES:
            for name, kernel, constants, options in kernels(recipe):
                yield recipe.name, name, target, compile_kernel(kernel, constants, options, recipe.dtype, target)
        for head_dim in (128, 256):
            for name, kernel, constants, options in plain_kernels(head_dim):
                yield f"head_dim {head_dim}", name, target, compile_kernel(kernel, constants, options, "bf16", target)


def table() -> str:
    """Markdown: a line for each recipe and kernel. Raises RuntimeError where one spills."""
    found: dict[tuple[str, str], dict[int, Usage]] = {}
    for recipe, name, target, usage in rows():
        if usage.spills:
            raise RuntimeError(f"{name} of {recipe} spills {usage.spills} bytes on sm_{target}")
        found.setdefault((recipe, name), {})[target] = usage
    cells = "registers | shared | instructions"
    head = " | ".join(["recipe", "kernel", *(f"sm_{target} {cells}" for target in TARGETS)])
    lines = [f"| {head} |", "|" + "---|" * (2 + 3 * len(TARGETS))]
    for (recipe, name), by_target in found.items():
        numbers = [f"{u.registers} | {u.shared} | {u.instructions}" for u in map(by_target.__getitem__, TARGETS)]
        lines.append(f"| {recipe} | {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def documented() -> dict[tuple[str, str, int], Usage]:
    """The table in docs/gpu_kernels.md: by recipe, kernel and target."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = {}
    for line in text[text.index(BEGIN) : text.index(END)].splitlines()[3:]:
        recipe, name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        for i, target in enumerate(TARGETS):
            registers, shared, instructions = map(int, numbers[3 * i : 3 * i + 3])
            found[recipe, name, target] = Usage(registers, 0, shared, instructions)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of the Triton kernels, compiled without a GPU.")
    parser.add_argument("--write", action="store_true", help=f"write the table into {DOCUMENT.name}")
    found = f"{BEGIN}\n{table()}\n{END}"
    if not parser.parse_args().write:
        print(found)
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text[: text.index(BEGIN)] + found + text[text.index(END) + len(END) :], encoding="utf-8")


if __name__ == "__main__":
    main()

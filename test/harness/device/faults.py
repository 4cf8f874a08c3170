"""Faults to plant in the kernels' sources: a test of the tests. Each names what must find it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from harness.device.build import KERNELS

INCLUDE = "include/sgl_kernel/kvtuner/cuda/"
DECODE, STORE = "csrc/kvtuner/cuda/decode.h", "csrc/kvtuner/cuda/store.h"


@dataclass(frozen=True)
class Fault:
    """Replaces ``old`` (all of its occurrences, or the nth alone) by ``new`` in a file of sgl-kernel.

    found_by: a regular expression for the message: of the machine's findings, or "error" where the numbers are wrong, "bytes"
    where pages or rows are. machine: how the kernels are run.
    """

    name: str
    file: str
    old: str
    new: str
    found_by: str
    nth: int | None = None
    machine: tuple = ()

    def plant(self, folder: Path) -> Path:
        """A copy of the kernels with the fault. Raises AssertionError where the text is not there."""
        copy = folder / "kernels"
        shutil.copytree(KERNELS / "include", copy / "include")
        shutil.copytree(KERNELS / "csrc/kvtuner/cuda", copy / "csrc/kvtuner/cuda")
        path = copy / self.file
        parts = path.read_text().split(self.old)
        assert len(parts) > 1, f"{self.old!r} is not in {self.file}: the fault must follow the kernels"
        if self.nth is None:
            text = self.new.join(parts)
        else:
            text = self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])
        path.write_text(text)
        return copy


RACE = "race|uninitialised"
FAULTS = (
    Fault("weights are read before all are written", INCLUDE + "value_product.h", "    sync_warp();\n", "", RACE),
    Fault("keys are read without a barrier after the wait", DECODE, "    sync_warp();\n    product", "    product", RACE),
    Fault(
        "keys are refilled while others read them", DECODE, "    sync_warp();\n    fetch_keys(page + F::warps)",
        "    fetch_keys(page + F::warps)", "race",
    ),
    Fault(
        "values are refilled while others read them", DECODE, "    sync_warp();\n    fetch_values(page + F::warps)",
        "    fetch_values(page + F::warps)", "race",
    ),
    Fault("values are waited for a group too few", DECODE, "copy_wait<1>", "copy_wait<2>", RACE, nth=1),
    Fault("keys are waited for a group too few", DECODE, "copy_wait<1>", "copy_wait<2>", RACE, nth=0),
    Fault("values of rows are read before they are there", INCLUDE + "full_rows.h", "    copy_wait<0>();\n", "", RACE),
    Fault(
        "rows of the next tile overwrite this one's", INCLUDE + "full_rows.h", "    sync_warp();\n  }\n};", "  }\n};", "race",
        machine=(("late_copies", 0),),
    ),
    Fault("warps are merged before all have written", INCLUDE + "merge.h", "  sync_block();\n", "", RACE, nth=1),
    Fault("results overwrite pages that others read", INCLUDE + "merge.h", "  sync_block();\n", "", "race", nth=0),
    Fault("the swizzle differs between copy and read", INCLUDE + "codes.h", "swizzled(8 * block + g, t)", "8 * block + g", "error"),
    Fault(
        "a product in divergent code", INCLUDE + "codes.h", "  mma<kBf16>(low, first, b);",
        "  if (thread_index() % 8 != 7) mma<kBf16>(low, first, b);", "different instructions|without all of its lanes",
    ),
    Fault("two registers of an operand are exchanged", INCLUDE + "codes.h", "h[0][2 * step], h[1][2 * step]", "h[1][2 * step], h[0][2 * step]", "error"),
    Fault("the step's own row is read from the ring", INCLUDE + "full_rows.h", "position >= prefix_len", "position > prefix_len", "error|uninitialised"),
    Fault("rows beyond the last are not masked", INCLUDE + "full_rows.h", "s[0][j] = -INFINITY", "s[0][j] += 0.f", "error"),
    Fault("ring rows are not counted modulo its length", INCLUDE + "full_rows.h", "position % p.ring_length", "position", "error|crosses|in no buffer"),
    Fault("sinks are read from their packed page too", DECODE, "page == 0 && p.sink_length > 0", "false", "error"),
    Fault("a page id is one too large", DECODE, "(int64_t)ids[page] * p.kv_heads", "(int64_t)(ids[page] + 1) * p.kv_heads", "error|crosses"),
    Fault("the last bytes of a block are not copied", INCLUDE + "page_copy.h", "pieces = kBytes / 16;", "pieces = kBytes / 16 - 1;", "uninitialised"),
    Fault("a block is copied beyond its end", INCLUDE + "page_copy.h", "pieces = kBytes / 16;", "pieces = kBytes / 16 + 1;", "race|error|crosses", machine=(("late_copies", 0),)),
    Fault("a part is not written", INCLUDE + "merge.h", "i < place.heads * dim;", "i < place.heads * dim - 1;", "uninitialised part_out"),
    Fault("an empty part is not marked", INCLUDE + "merge.h", "if (h < place.heads) p.part_lse", "if (h < 0) p.part_lse", "uninitialised part_lse"),
    Fault("the wrong block merges", INCLUDE + "merge.h", "before == p.splits;", "before == 0;", "uninitialised"),
    Fault("the counter is not reset", INCLUDE + "merge.h", "if (before == p.splits) p.arrivals[place.tile] = 0;", "", "not reset"),
    Fault("accumulators are not rescaled", INCLUDE + "accumulator.h", "factor[j] = kept * down;", "factor[j] = 1.f;", "error"),
    Fault("zero points of keys are left out", INCLUDE + "key_product.h", "sum[i][j] += zero[2 * i + j / 2]", "sum[i][j] += 0 * zero[2 * i + j / 2]", "error"),
    Fault("a group's scale is another's", INCLUDE + "key_product.h", "(n * kPageTokens + 32 * block", "(0 * kPageTokens + 32 * block", "error"),
    Fault("codes are not rounded to even", INCLUDE + "pack_block.h", "zeros[at], f.offset())", "zeros[at] - 0.001f, f.offset())", "bytes"),
    Fault("a page is packed before its rows are there", INCLUDE + "pack_block.h", "    sync_block();\n", "", RACE, nth=0),
    Fault("words are placed before parameters are there", INCLUDE + "pack_block.h", "      sync_block();\n    }\n    bad |=", "    }\n    bad |=", RACE),
    Fault("the new row goes to the wrong place", STORE, "rows.ring_row(rows.prefix_len), rows.own", "rows.ring_row(rows.prefix_len + 1), rows.own", "bytes"),
    Fault("sinks are not kept", STORE, "if (index == 0)", "if (index < 0)", "bytes"),
)  # fmt: skip

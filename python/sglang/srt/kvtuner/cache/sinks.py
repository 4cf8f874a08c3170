"""Sinks: the first tokens of every sequence, kept in full precision beside its first page.

Attention gives the first tokens of a sequence much of its weight (StreamingLLM, ICLR 2024, section 3), so that errors
there cost more than elsewhere. Rows are kept per *page id*, not per request: whoever reads a first page that another
request packed, through the prefix cache or after upstream gave two equal prefixes one page, finds the sinks of exactly
that page. They are written when a page is packed as the first of its sequence and stay valid as long as the page does; a
page handed to another sequence is packed anew before it is read. What is stored for pages that are never first is the
price, and it is counted: see sizing.py.
"""

from __future__ import annotations

import torch

from sglang.srt.kvtuner.cache import huge_pages


class Sinks:
    """Full-precision rows of all layers, of which each has its own number.

    keys, values: per layer [num_pages, sink_length, kv_heads, head_dim] in the model's dtype; row t of page p is token t
    of the sequences that begin with p.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        num_pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        shapes = [(num_pages, length, kv_heads, head_dim) for length in lengths]
        self.keys = huge_pages.zeros(shapes, dtype, device)
        self.values = huge_pages.zeros(shapes, dtype, device)

    def size_bytes(self) -> int:
        """Bytes allocated for all rows."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

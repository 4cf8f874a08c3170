"""The plan of a decode step, made on the device in Triton (attention/steps.py says what it holds)."""

import triton
import triton.language as tl


@triton.jit
def plan_decode_kernel(
    slots, seq_lens, req_to_token, req_stride, ring_start, prefix_lens, packed_end, pages, pages_stride,
    PAGE: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (requests, blocks of BLOCK pages up to the longest context); programs behind a request's pages leave at once.

    slots, seq_lens: int64 [requests]; seq_lens counts the step's own token. req_to_token: int32 [slots, context], rows
    req_stride apart. ring_start: int32 [slots]. Writes prefix_lens and packed_end, int32 [requests], and the page ids of every
    whole page that a request has after the step, int32 [requests, most pages].
    """
    row, block = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens + row).to(tl.int32)
    count = seq_len // PAGE
    if (block > 0) & (block * BLOCK >= count):
        return
    slot = tl.load(slots + row).to(tl.int64)
    if block == 0:
        aged = tl.maximum(seq_len - 1 - RESIDUAL, 0) // PAGE * PAGE
        tl.store(prefix_lens + row, seq_len - 1)
        tl.store(packed_end + row, tl.maximum(aged, tl.load(ring_start + slot)))
    i = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(req_to_token + slot * req_stride + i * PAGE, mask=i < count, other=0)
    tl.store(pages + row.to(tl.int64) * pages_stride + i, token // PAGE, mask=i < count)

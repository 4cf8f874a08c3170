"""The formats that the suites run on, by name: every width, symmetry, axis, orientation and rotation on several shapes."""

from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.hadamard import block_size

# Tokens of a page, head_dim, group. A group that does not divide what its axis groups gives no format.
SHAPES = (
    (64, 64, 64),
    (64, 128, 64),
    (64, 128, 32),
    (64, 64, 16),
    (64, 256, 64),
    (32, 96, 32),
    (16, 80, 16),
    (128, 128, 128),
)
# Lanes or reduction do not fill vectors: codes lie row by row, and the reference alone reads them.
ROW_SHAPES = ((8, 64, 8), (16, 120, 8), (64, 100, 4))


def tensor_format(nbits, asym, axis, group, page, head_dim, token_lanes, rotated=False):
    """A format of the cache; at 16 bits there is one per shape and orientation."""
    if nbits == 16:
        return TensorFormat.unquantized(page, head_dim, token_lanes)
    return TensorFormat(
        nbits=nbits,
        asym=asym,
        axis=axis,
        group_size=group,
        page_size=page,
        head_dim=head_dim,
        token_lanes=token_lanes,
        hadamard=block_size(head_dim) if rotated else 0,
    )


def name_of(fmt):
    """Such as ``K4-asym-channel-g64-p64-d128-rotated``."""
    parts = [f"{'K' if fmt.token_lanes else 'V'}{fmt.nbits}"]
    if fmt.quantized:
        parts += ["asym" if fmt.asym else "sym", ("token", "channel")[fmt.axis], f"g{fmt.group_size}"]
    parts += [f"p{fmt.page_size}", f"d{fmt.head_dim}"]
    return "-".join(parts + (["rotated"] if fmt.hadamard else []))


def all_formats(shapes=SHAPES + ROW_SHAPES):
    """Every format on ``shapes``, by name."""
    found = {}
    for page, head_dim, group in shapes:
        for nbits in (2, 4, 8, 16):
            for asym in (False, True):
                for axis in (0, 1):
                    for token_lanes, rotated in ((True, False), (True, True), (False, False)):
                        if (head_dim, page)[axis] % group == 0:
                            fmt = tensor_format(nbits, asym, axis, group, page, head_dim, token_lanes, rotated)
                            found[name_of(fmt)] = fmt
    return found

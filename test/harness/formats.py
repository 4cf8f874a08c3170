"""The formats that the suites run on, by name: every width, symmetry, axis, orientation and rotation on several shapes."""

from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
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


# Error of an output row relative to its norm that kernels may add to the format's own: they multiply rounded rows.
ATTENTION_TOLERANCE = 2e-3


def random_format(rng, page, head_dim, token_lanes):
    """A format that kernels take, drawn with ``rng``."""
    nbits, axis = rng.choice((2, 4, 8, 16)), rng.choice((0, 1))
    groups = [g for g in (16, 32, 48, 64, 80, 96, 128, 256) if (head_dim, page)[axis] % g == 0]
    asym, rotated = rng.random() < 0.5, token_lanes and rng.random() < 0.5
    return tensor_format(nbits, asym, axis, rng.choice(groups), page, head_dim, token_lanes, rotated)


def mixed_layers(page, sinks=0, head_dim=64):
    """Formats of layers that differ in everything, all of them for kernels; the second keeps ``sinks``."""

    def half(nbits, asym, axis, token_lanes, rotated=False):
        return tensor_format(nbits, asym, axis, 16, page, head_dim, token_lanes, rotated)

    return (
        LayerFormat(half(8, False, 0, True), half(4, False, 1, False)),
        LayerFormat(half(4, True, 1, True, rotated=True), half(2, True, 0, False), sinks),
        LayerFormat(half(2, False, 0, True), half(16, False, 0, False)),
    )

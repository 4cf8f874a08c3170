"""The bytes of packed pages and the values that they give back, against a list of digests.

What servers keep in storage and what tuned presets were measured on are these bytes: a change of them is a change of the
format, never a side effect. ``KVTUNER_WRITE_DIGESTS=1`` writes the list anew.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from harness.formats import all_formats
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages

DIGESTS = Path(__file__).resolve().parents[3] / "data" / "page_digests.json"
FORMATS = all_formats()


def pages_of(page, head_dim):
    """Pages whose floats are computed from whole numbers, so that every machine and release has the same ones."""
    count = page * head_dim
    noise = (torch.arange(8 * count, dtype=torch.int64) * 1103515245 + 12345) % 2**31 // 2**15
    x = (noise.double() / 2**13 - 4).float().view(8, page, head_dim)
    channel = torch.arange(head_dim)
    x[1] += (channel % 7 - 3) * 16.0  # channels with offsets of their own
    x[2] *= torch.where(channel % 16 == 5, 64.0, 1.0)  # outlier channels
    x[3] = x[3] * 2.0**-20 + 1000.0  # an offset far above the range
    x[4] *= 2.0**-24  # below the floor of ranges
    x[5] = 0
    x[6] = x[6] * 2.0**14  # scales near the top of float16
    x[7, 0] = 2.5  # ties of rounding: whole steps and halves
    return x


def digests_of(fmt):
    x = pages_of(fmt.page_size, fmt.head_dim)
    blocks = pack_pages(x, fmt)
    values = unpack_pages(blocks, fmt)
    return [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16] for t in (blocks, values)]


def test_the_list_is_complete():
    if os.environ.get("KVTUNER_WRITE_DIGESTS") == "1":
        found = {name: digests_of(fmt) for name, fmt in FORMATS.items()}
        DIGESTS.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    assert sorted(json.loads(DIGESTS.read_text(encoding="utf-8"))) == sorted(FORMATS)


@pytest.mark.parametrize("bits", ("K2", "K4", "K8", "K16", "V2", "V4", "V8", "V16"))
def test_bytes_and_values_are_those_of_the_list(bits):
    listed = json.loads(DIGESTS.read_text(encoding="utf-8"))
    formats = {name: fmt for name, fmt in FORMATS.items() if name.startswith(bits + "-")}
    assert formats
    changed = [name for name, fmt in formats.items() if digests_of(fmt) != listed[name]]
    assert not changed

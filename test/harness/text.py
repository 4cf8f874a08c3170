"""English prose for tests that measure quality, and token windows of it."""

import functools
from pathlib import Path

PROSE = Path(__file__).resolve().parents[1] / "data" / "prose.txt"


@functools.cache
def prose_tokens(checkpoint):
    """Token ids of the prose with the checkpoint's tokenizer, no special tokens."""
    from transformers import AutoTokenizer

    text = PROSE.read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"]


def windows(checkpoint, count, length):
    """``count`` windows of ``length`` tokens, one after the other."""
    ids = prose_tokens(checkpoint)
    assert len(ids) >= count * length, f"the prose has {len(ids)} tokens, {count * length} are needed"
    return [ids[i * length : (i + 1) * length] for i in range(count)]

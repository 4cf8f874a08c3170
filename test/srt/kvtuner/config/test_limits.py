"""What pages ask of upstream's settings: values by themselves; through upstream's resolution in the hook's tests."""

import pytest

from sglang.srt.kvtuner.config import limits
from sglang.srt.kvtuner.config.flags import KVTunerConfigError


@pytest.mark.parametrize("value", ("64", 64.0, True, 10**5000, 7, 12, 2048, -8), ids=lambda value: type(value).__name__)
def test_pages(value):
    with pytest.raises(
        KVTunerConfigError, match=r"--page-size is .*; .* powers of two from 8 to 1024 \(64 by default\)"
    ):
        limits.page_size_of(value)
    assert [limits.page_size_of(valid) for valid in (None, 8, 1024)] == [64, 8, 1024]


@pytest.mark.parametrize("value", ("128", 128.0, True, None, 100, 32))
def test_chunks(value):
    with pytest.raises(
        KVTunerConfigError, match=r"--chunked-prefill-size is .*; .* multiples of the page \(--page-size 64\)"
    ):
        limits.require_chunks_of_pages(value, 64)
    for valid in (-1, 0, 64, 4096):
        limits.require_chunks_of_pages(valid, 64)


@pytest.mark.parametrize("value", ("64", 64.0, True, -64, 0, 63))
def test_tokens(value):
    with pytest.raises(
        KVTunerConfigError, match=r"--max-total-tokens is .*; .* 64 and above, 4 pages \(--page-size 16\)"
    ):
        limits.require_enough_tokens(value, 16)
    for valid in (None, 64, 10**9):
        limits.require_enough_tokens(valid, 16)

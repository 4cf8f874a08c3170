"""CUDA graphs at start-up: what passes through, what is refused by name."""

import logging

import pytest

from harness.server_args import refusal, resolve


@pytest.mark.parametrize(
    "asked, decode, prefill",
    [
        ({}, "full", None),
        ({"cuda_graph_backend_decode": "full"}, "full", None),
        ({"cuda_graph_backend_prefill": "breakable"}, "full", "breakable"),
        ({"cuda_graph_config": {"decode": {"backend": "disabled"}, "prefill": {"backend": "disabled"}}}, "disabled", "disabled"),
        ({"disable_cuda_graph": True}, "disabled", "disabled"),
        ({"cuda_graph_max_bs_decode": 24, "disable_cuda_graph_padding": True, "debug_cuda_graph": True}, "full", None),
    ],
)  # fmt: skip
def test_cuda_graphs_pass_through(model, asked, decode, prefill):
    graphs = resolve(model, device="cuda", **asked)["cuda_graph_config"]
    assert graphs["decode"]["backend"] == decode
    assert prefill in (None, graphs["prefill"]["backend"])
    assert asked.get("cuda_graph_max_bs_decode") in (None, graphs["decode"]["max_bs"])


@pytest.mark.parametrize(
    "asked",
    [{"cuda_graph_backend_prefill": "full"}, {"cuda_graph_config": {"prefill": {"backend": "full"}}}],
)
def test_prefill_graphs_without_breaks_are_refused(model, asked):
    assert refusal(model, **asked).startswith("--cuda-graph-backend-prefill, ")


@pytest.mark.parametrize(
    "asked",
    [{"cuda_graph_backend_decode": "breakable"}, {"cuda_graph_config": {"decode": {"backend": "breakable"}}}],
)
def test_decode_graphs_that_upstream_cannot_capture_are_refused(model, asked):
    message = refusal(model, device="cuda", **asked)
    assert message.startswith("--cuda-graph-backend-decode, ") and "valid are full, disabled" in message


def test_no_decode_graphs_where_the_reference_serves(model, caplog):
    """A page of 8 tokens does not fill vectors, which Triton's kernels need."""
    with caplog.at_level(logging.WARNING, logger="sglang.srt.arg_groups.kvtuner_hook"):
        settled = resolve(model, device="cuda", page_size=8)
    assert settled["cuda_graph_config"]["decode"]["backend"] == "disabled"
    assert "CUDA graphs of decode steps are off" in caplog.text and "do not fill vectors" in caplog.text
    message = refusal(model, device="cuda", page_size=8, cuda_graph_backend_decode="full")
    assert message.startswith("--cuda-graph-backend-decode, ") and "do not fill vectors" in message
    resolve(model, device="cuda", page_size=8, cuda_graph_backend_decode="disabled")

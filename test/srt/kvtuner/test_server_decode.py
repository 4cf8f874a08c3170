"""Decoded tokens of the served cache against the independent simulation, in float32 on a real model.

Unlike a prompt's tokens, generated ones see a window that moves with every token and pages that are packed as they decode.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harness.fake_quant import Recipe, packed_lengths, sequence_logprobs
from harness.text import prose_tokens

pytestmark = pytest.mark.server

CHUNK, PAGE = 128, 64
# Tokens of the prompts: two that end with a page, and two within one. Every request packs pages while it decodes. What a
# prompt leaves of its last chunk is less than a page, so that no other request's chunk is shortened to it.
PROMPTS = (512, 384, 449, 333)
NEW_TOKENS = 100
CASES = {
    "KV4 per token, window 64": (Recipe(4, 4), 64),
    "KV4 K per channel, 4 sinks, window 128": (Recipe(4, 4, asym=True, axis_key=1, sinks=4), 128),
}


def decoded(server, prompts):
    """Greedy answers to all prompts at once: whole sequences, and log-probabilities of what was generated."""

    def answer(ids):
        sampling = {"ignore_eos": True}
        return server.generate(ids, NEW_TOKENS, return_logprob=True, sampling_params=sampling)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(answer, prompts))
    assert [a["meta_info"]["cached_tokens"] for a in answers] == [0] * len(prompts)
    logprobs = [[entry[0] for entry in a["meta_info"]["output_token_logprobs"]] for a in answers]
    return [ids + a["output_ids"] for ids, a in zip(prompts, answers)], torch.tensor(logprobs).double().flatten()


def simulated(checkpoint, sequences, recipe, residual):
    """Log-probabilities of the sequences' generated tokens, float64 [tokens]."""
    packed = [
        packed_lengths(len(ids), chunk=CHUNK, prompt=len(ids) - NEW_TOKENS, page=PAGE, residual=residual)
        for ids in sequences
    ]
    logprobs = sequence_logprobs(checkpoint, sequences, recipe, packed)
    return torch.cat([found[-NEW_TOKENS:] for found in logprobs]).double()


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("recipe, residual", CASES.values(), ids=CASES)
def test_decoded_logprobs_are_the_simulations(smollm2_checkpoint, launch_server, recipe, residual):
    ids = prose_tokens(smollm2_checkpoint)
    prompts = [ids[1000 * i : 1000 * i + length] for i, length in enumerate(PROMPTS)]
    flags = (*recipe.flags(), "--kvtuner-residual-length", str(residual), "--chunked-prefill-size", str(CHUNK))
    with launch_server(smollm2_checkpoint, *flags, "--dtype", "float32", "--sleep-on-idle") as server:
        sequences, served = decoded(server, prompts)
    exact = simulated(smollm2_checkpoint, sequences, None, residual)
    found = simulated(smollm2_checkpoint, sequences, recipe, residual)
    page_later, page_earlier = (
        simulated(smollm2_checkpoint, sequences, recipe, residual + shift) for shift in (PAGE, -PAGE)
    )
    print(
        f"rms of what quantization does {rms(found - exact):.5f}, served {rms(served - exact):.5f}, "
        f"between them {rms(served - found):.5f}, a page later {rms(served - page_later):.5f}, "
        f"a page earlier {rms(served - page_earlier):.5f}"
    )
    assert rms(served - exact) == pytest.approx(rms(found - exact), rel=0.1)
    assert rms(served - found) <= 0.1 * rms(found - exact)
    # A window of another length, or a page packed too early or too late, would be seen.
    assert min(rms(served - page_later), rms(served - page_earlier)) > 5 * rms(served - found)

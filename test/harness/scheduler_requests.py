"""Requests as upstream's tokenizer sends them to its scheduler."""

from array import array

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams


def tokenized(rid, prompt, *, stream=False, priority=None, **sampling):
    """A request for an answer to the tokens of ``prompt``; the rest are SamplingParams."""
    params = SamplingParams(**sampling)
    params.normalize(None)
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=stream,
        priority=priority,
    )

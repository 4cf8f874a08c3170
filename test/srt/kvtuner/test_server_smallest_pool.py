"""The smallest pool that the server accepts answers, and says so where a request is too long for it."""

import pytest

from launcher import ServerError

pytestmark = pytest.mark.server

PAGE = 64
TOKENS = 4 * PAGE


def ids(count):
    return [5 + i % 200 for i in range(count)]


@pytest.mark.parametrize("flags", [(), ("--disable-radix-cache",)], ids=["radix", "no-radix"])
def test_the_smallest_pool(random_llama, launch_server, flags):
    flags = ("--enable-kvtuner-quant", "--max-total-tokens", str(TOKENS), "--sleep-on-idle", *flags)
    with launch_server(random_llama(), *flags) as server:

        def ask(prompt, new_tokens, **sampling):
            payload = {"temperature": 0, "max_new_tokens": new_tokens, **sampling}
            return server.request("/generate", {"input_ids": ids(prompt), "sampling_params": payload}, timeout=120)

        for prompt in (1, 5, PAGE):
            for ignore_eos in (False, True):
                tokens = ask(prompt, 8, ignore_eos=ignore_eos)["meta_info"]["completion_tokens"]
                assert tokens == 8 or (not ignore_eos and tokens > 0)
        # More than the pool has: as much as fits is answered.
        assert ask(5, 10_000, ignore_eos=True)["meta_info"]["completion_tokens"] == PAGE - 1
        # Prompts that fit, but leave no room for an answer, and prompts that do not fit.
        longest = TOKENS - PAGE - 2
        assert ask(longest, 8)["meta_info"]["finish_reason"]["type"] == "length"
        for prompt in (longest + 1, TOKENS - PAGE, TOKENS - 7, TOKENS - 6, TOKENS, 4 * TOKENS):
            with pytest.raises(ServerError, match=rf"status 400: .*Input length \({prompt} tokens\) exceeds"):
                ask(prompt, 8)
        assert ask(5, 8)["meta_info"]["completion_tokens"] > 0

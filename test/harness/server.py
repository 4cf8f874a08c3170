"""A real server under test, over HTTP."""

import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from launcher import Server
from machine import device_flags

# Small and quick to allocate. A flag that a test gives comes later on the command line and wins.
DEFAULT_FLAGS = (
    *("--max-total-tokens", "16384"),
    *("--max-running-requests", "16"),
    *("--random-seed", "0"),
    # /health itself runs a token through the model.
    "--skip-server-warmup",
)


class RunningServer(Server):
    """A server with the requests that tests make."""

    def generate(self, prompt, max_new_tokens=16, **options):
        """POST /generate at temperature 0 and return the answer, a list of answers for a list of prompts.

        Args:
            prompt: a text or a list of token ids, or a list of either.
            max_new_tokens: tokens to generate.
            options: ``sampling_params`` are merged into the defaults, anything else is sent along
                (``return_logprob=True`` …).
        """
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **options.pop("sampling_params", {})}
        first = prompt[0] if isinstance(prompt, list) and prompt else prompt
        is_ids = isinstance(first, int) or (isinstance(first, list) and isinstance(first[0], int))
        return self.request(
            "/generate", {"input_ids" if is_ids else "text": prompt, "sampling_params": sampling, **options}
        )

    def chat(self, question, max_tokens=64):
        """The text that /v1/chat/completions answers to one question at temperature 0."""
        message = {"role": "user", "content": question}
        payload = {"model": "default", "messages": [message], "temperature": 0, "max_tokens": max_tokens}
        return self.request("/v1/chat/completions", payload)["choices"][0]["message"]["content"]

    def flush_cache(self, timeout=60.0):
        """Empty the prefix cache; waits until no request runs, which it needs."""
        request = urllib.request.Request(f"{self.url}/flush_cache", data=b"", method="POST")
        deadline = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    if answer.status == 200:
                        return
            except urllib.error.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise self.error("requests are still running")
            time.sleep(0.2)

    def server_info(self):
        """GET /server_info."""
        return self.request("/server_info")


@contextmanager
def launch_server(model, *flags, log_path, env=None, ranks=1, timeout=600.0, wait=True):
    """Run a server for the time of a ``with`` block; its whole process tree is gone afterwards.

    Args:
        model: checkpoint folder.
        flags: command line flags beside :data:`DEFAULT_FLAGS`, over which they win.
        log_path: file for what the server prints.
        env: environment variables that win over the inherited ones; None as a value removes one.
        ranks: tensor-parallel ranks on this machine, for the way the cores are shared out.
        timeout: seconds until it must answer.
        wait: False yields the server at once, for tests of start-up itself and for nodes that answer no requests.

    Raises:
        ServerError: it ended before it answered, or did not answer in time; the end of its log is in the message.
    """
    flags = (*device_flags(), *DEFAULT_FLAGS, *flags)
    server = RunningServer(model, flags, log_path=log_path, ranks=ranks, env=env)
    with server:
        if wait:
            server.wait_until_healthy(timeout)
        yield server

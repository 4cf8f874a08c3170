"""A client that sends the requests of a script, each when another one has got as far as the script says."""

from harness.scheduler_requests import tokenized
from sglang.srt.managers.io_struct import BatchTokenIDOutput

# Polls without an answer after which a request counts as forgotten.
PATIENCE = 500


class ScriptClient:
    """Sends the requests of ``script``, by name, and keeps their ``tokens``."""

    def __init__(self, script, vocab):
        self.tokens = {name: [] for name in script}
        self._left, self._vocab = dict(script), vocab
        self._under_way = set()
        self._polls = 0

    @property
    def over(self):
        return not self._left and not self._under_way

    def recv_requests(self, local_reqs=None):
        """Upstream's SchedulerRequestReceiver.recv_requests."""
        self._polls += 1
        assert self._polls < PATIENCE, f"no answer to {sorted(self._under_way)} in {PATIENCE} polls"
        ready = [name for name, asked in self._left.items() if self._is_time(asked)]
        self._under_way.update(ready)
        return [*(local_reqs or ()), *(self._message(name, self._left.pop(name)) for name in ready)]

    def send_output(self, output, recv_obj=None):
        """Upstream's SenderWrapper.send_output."""
        if isinstance(output, BatchTokenIDOutput):
            self._polls = 0
            for rid, reason, tokens in zip(output.rids, output.finished_reasons, output.output_ids, strict=True):
                self.tokens[rid].extend(tokens)
                if reason is not None:
                    self._under_way.discard(rid)

    def _is_time(self, asked):
        return asked.after is None or len(self.tokens[asked.after[0]]) >= asked.after[1]

    def _message(self, name, asked):
        stop = list(range(self._vocab)) if asked.stops else None
        return tokenized(
            name, asked.prompt, stream=True,
            temperature=0, max_new_tokens=asked.most, ignore_eos=not asked.stops, stop_token_ids=stop,
        )  # fmt: skip

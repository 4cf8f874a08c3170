"""The clients of a soak: random requests that share prefixes, go on from one another, ask for samples, give up.

What they do depends on the seed and on the order of what the scheduler does, not on time or on what the model samples: a soak
does the same on every machine.
"""

from collections import Counter, deque
from dataclasses import dataclass

from harness.scheduler_requests import tokenized
from harness.soak_model import VOCAB
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
)

# Polls without an answer after which a request counts as forgotten.
PATIENCE = 2000
# Part of the soak after which the clients wait until all have their answers, and have the prefix cache flushed.
FLUSH_AT = 0.3


@dataclass(frozen=True)
class Asked:
    """A request under way; ``samples`` more are sent when it has filled the prefix cache for them."""

    prompt: tuple
    most: int
    samples: int = 0


class Client:
    """What the scheduler receives from and sends to. Counts ``events``.

    progress: says which part of the soak is over, 0 to 1 and above. finished: is told each request that ended.
    """

    def __init__(self, rng, scenario, progress, finished):
        self.events = Counter()
        self._rng, self._scenario = rng, scenario
        self._progress, self._finished = progress, finished
        self._shared = [self._tokens(rng.randrange(40, 160)) for _ in range(3)]
        self._conversations = deque(maxlen=6)
        self._asked, self._answers, self._queue = {}, {}, []
        self._number = self._polls = 0
        self._flush = "to send"
        self.over = False

    def recv_requests(self, local_reqs=None):
        """Upstream's SchedulerRequestReceiver.recv_requests."""
        self._polls += 1
        if self._polls > PATIENCE:
            raise AssertionError(f"no answer to {sorted(self._asked)} in {PATIENCE} polls")
        progress = self._progress()
        draining = progress >= 1 or (self._flush != "done" and progress >= FLUSH_AT)
        messages, self._queue = [*(local_reqs or ()), *self._queue], []
        while not draining and len(self._asked) < self._scenario.clients:
            messages.append(self._ask(self._invent()))
        if self._asked and self._rng.random() < self._scenario.aborts:
            # What a client that goes away leads to, too.
            messages.append(AbortReq(rid=self._rng.choice(list(self._asked))))
            self.events["abort"] += 1
        if draining and self._asked and self._rng.random() < self._scenario.aborts:
            messages.append(AbortReq(rid="", abort_all=True))
            self.events["abort of all"] += 1
        if draining and not self._asked and not messages:
            if self._flush == "to send":
                self._flush = "sent"
                messages.append(FlushCacheReqInput(timeout_s=60.0))
            elif self._flush == "done":
                self.over = True
        return messages

    def send_output(self, output, recv_obj=None):
        """Upstream's SenderWrapper.send_output, of both the tokenizer's and the detokenizer's channel."""
        self._polls = 0
        if isinstance(output, BatchTokenIDOutput):
            for rid, reason, tokens in zip(output.rids, output.finished_reasons, output.output_ids, strict=True):
                self._answers[rid].extend(tokens)
                if reason is not None:
                    self._end(rid, reason["type"])
        elif isinstance(output, AbortReq):
            self._end(output.rid, "abort while waiting")
        elif isinstance(output, FlushCacheReqOutput):
            assert output.success, "the cache of an idle server was not flushed"
            self.events["flush"] += 1
            self._flush = "done"

    def _end(self, rid, reason):
        asked, tokens = self._asked.pop(rid), self._answers.pop(rid)
        self._finished(rid)
        self.events[f"end: {reason}"] += 1
        if reason != "length":
            return
        assert len(tokens) == asked.most, f"{rid} asked for {asked.most} tokens and got {len(tokens)}"
        for _ in range(asked.samples):
            self.events["sample"] += 1
            self._queue.append(self._ask(Asked(asked.prompt, self._rng.randrange(5, 60))))
        self._conversations.append((*asked.prompt, *tokens))

    def _invent(self):
        """A prompt of its own, one that begins as others do, or a conversation that goes on; at times for several samples."""
        rng = self._rng
        kind = rng.randrange(4)
        if kind == 0 or (kind == 1 and not self._conversations):
            prompt = self._tokens(rng.choice((rng.randrange(1, 40), rng.randrange(1, 300))))
        elif kind == 1:
            prompt = (*rng.choice(self._conversations), *self._tokens(rng.randrange(1, 30)))
        else:
            shared = rng.choice(self._shared)
            prompt = (*shared[: rng.randrange(10, len(shared))], *self._tokens(rng.randrange(1, 60)))
        prompt = prompt[: self._scenario.longest_prompt]
        if rng.random() < self._scenario.samples:
            # Upstream sends a request of n > 1 like this: once for no tokens, to have the prompt in the cache, then n times.
            return Asked(prompt, 0, rng.randrange(2, 5))
        return Asked(prompt, rng.choice((rng.randrange(1, 30), rng.randrange(60, 200))))

    def _ask(self, asked):
        self._number += 1
        rid = f"{self._number:06}"
        self._asked[rid], self._answers[rid] = asked, []
        # Rising, so that some preempt what runs.
        priority = self._number * self._rng.randrange(4) if self._scenario.priorities else None
        # With a token that ends an answer, what happens would depend on how the machine samples.
        return tokenized(
            rid, asked.prompt, priority=priority, temperature=1.0, max_new_tokens=asked.most, ignore_eos=True
        )

    def _tokens(self, count):
        return tuple(self._rng.randrange(2, VOCAB) for _ in range(count))

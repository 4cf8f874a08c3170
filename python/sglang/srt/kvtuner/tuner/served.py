"""Tasks that a server answers through its OpenAI endpoint: exact recall of entries in a long list, and lm-eval's."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.evaluate import Configuration
from sglang.srt.kvtuner.tuner.server_process import Server, ServerError

RECALL = "recall"
_GOODS = [
    "anvil",
    "apron",
    "awl",
    "barrel",
    "basket",
    "bellows",
    "bobbin",
    "bottle",
    "bowl",
    "brush",
    "bucket",
    "candle",
    "chain",
    "chisel",
    "churn",
    "clamp",
    "comb",
    "crate",
    "drum",
    "fiddle",
    "flask",
    "funnel",
    "gimlet",
    "hammer",
    "hatchet",
    "hinge",
    "hook",
    "horn",
    "jug",
    "kettle",
    "ladder",
    "ladle",
    "lamp",
    "lantern",
    "lever",
    "loom",
    "mallet",
    "mirror",
    "mortar",
    "needle",
    "net",
    "oar",
    "paddle",
    "pail",
    "pan",
    "pestle",
    "pin",
    "plane",
    "plough",
    "pulley",
    "quill",
    "rake",
    "rasp",
    "razor",
    "rope",
    "saddle",
    "saw",
    "scale",
    "scoop",
    "scythe",
    "shears",
    "shovel",
    "sickle",
    "sieve",
    "spade",
    "spindle",
    "spool",
    "stool",
    "tongs",
    "trowel",
    "wedge",
    "wheel",
    "whip",
]


@dataclass(frozen=True)
class TaskSettings:
    """model: checkpoint folder or Hugging Face name. server: flags beside the configuration's. log: the server's.
    recall: items of the built-in task, 0 leaves it out. lm_eval: its tasks, comma-separated, or None. limit: documents
    per lm-eval task. include_path: folder with definitions of further tasks, or None."""

    model: str
    server: tuple[str, ...]
    log: Path
    recall: int = 40
    lm_eval: str | None = None
    limit: int | None = None
    include_path: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lm_eval and importlib.util.find_spec("lm_eval") is None:
            raise TuningError("--lm-eval needs lm-eval, which is not installed: pip install 'lm-eval[api]'")


def run_tasks(settings: TaskSettings, configuration: Configuration) -> dict[str, float]:
    """Serve a configuration and score it; returns shares of right answers by task."""
    scores = {}
    with serve(settings, configuration.flags) as server:
        if settings.recall:
            scores[RECALL] = _recall(server, settings)
        if settings.lm_eval:
            scores |= _lm_eval(server.url, settings)
    return scores


def recall_items(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts with their answers: a list of goods with four-digit numbers, then the name of one of the goods again."""
    chooser = random.Random(seed)
    items = []
    for _ in range(count):
        stock = [(name, str(chooser.randrange(1000, 10000))) for name in chooser.sample(_GOODS, len(_GOODS))]
        name, number = chooser.choice(stock[: len(stock) * 3 // 4])
        lines = "".join(f"{n}: {v}\n" for n, v in stock)
        items.append((f"The store's list of goods and their numbers.\n{lines}\nAgain from the list:\n{name}:", number))
    return items


def _recall(server: Server, settings: TaskSettings) -> float:
    items = recall_items(settings.recall, settings.seed)
    payload = {"model": "default", "prompt": [p for p, _ in items], "temperature": 0, "max_tokens": 8}
    choices = server.request("/v1/completions", payload, timeout=1800)["choices"]
    answers = {choice["index"]: choice["text"].strip() for choice in choices}
    return sum(answers[i].startswith(number) for i, (_, number) in enumerate(items)) / len(items)


def _lm_eval(url: str, settings: TaskSettings) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        # Without a backend lm-eval asks the server for its tokenizer, through proxies that the environment may name.
        tokenizer = f"tokenizer={settings.model},tokenizer_backend=huggingface"
        arguments = f"model=default,base_url={url}/v1/completions,num_concurrent=8,{tokenizer}"
        command = [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments),
            *("--tasks", settings.lm_eval, "--output_path", folder, "--seed", str(settings.seed)),
            *(("--limit", str(settings.limit)) if settings.limit else ()),
            *(("--include_path", settings.include_path) if settings.include_path else ()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(folder).rglob("results*.json"))
        if done.returncode or not found:
            raise TuningError(f"lm-eval failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")
        results = json.loads(found[-1].read_text(encoding="utf-8"))["results"]
    return shares_of_right_answers(results)


def shares_of_right_answers(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """From lm-eval's results by task: accuracies and exact matches, as ``task metric``, with the filter of the answers
    that they hold for where there is one (a task may have several)."""
    found = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, answers = name.partition(",")
            if metric in ("acc", "acc_norm", "exact_match") and isinstance(value, float):
                found[f"{task} {metric}" + (f" ({answers})" if answers not in ("", "none") else "")] = value
    return found


@contextmanager
def serve(settings: TaskSettings, flags: list[str], timeout: float = 900.0) -> Iterator[Server]:
    """A server for the time of a ``with`` block.

    Raises TuningError, with the end of its log, when it does not come up within ``timeout`` seconds or fails a request.
    """
    settings.log.parent.mkdir(parents=True, exist_ok=True)
    # Whether the hub may be asked is the user's choice: the model may be a name.
    env = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE")}
    try:
        with Server(settings.model, [*settings.server, *flags], log_path=settings.log, env=env) as server:
            yield server.wait_until_healthy(timeout)
    except ServerError as error:
        raise TuningError(f"the server for {' '.join(flags) or 'upstream'}: {error}") from error

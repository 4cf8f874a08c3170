#!/usr/bin/env python3
"""Compares serving with and without the quantized KV cache, by upstream's own benchmark client.

Two servers run one after the other, flag off and --enable-kvtuner-quant, and get the same load from
sglang.benchmark.serving (random-ids prompts as token ids, temperature 0, EOS ignored, all requests of a batch at once).
Printed are both servers' figures and their ratio, where above 1 means that the quantized server is faster.

    python benchmark/kvtuner/serving.py --model-path .cache/models/SmolLM2-135M-Instruct
    python benchmark/kvtuner/serving.py --model-path M --scenario decode:context=8192,batch=32 --rounds 3 \\
        --server-flags-on="--kvtuner-asym --kvtuner-axis-key 1" -- --tp-size 2
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from serving_report import (
    Comparison,
    Figures,
    Scenario,
    cache_mismatch,
    failure,
    figures_of,
    table,
    write_json,
    write_plot,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from launcher import HOST, Server, ServerError, server_environment  # noqa: E402
from machine import has_cuda  # noqa: E402

# A page of 64 tokens is completed, and packed, by every sequence of a decode run.
DECODE_TOKENS = 72
WARM_UP_TOKENS = 4
PRESETS = {
    "decode": {"context": 2048, "batch": 8, "output": DECODE_TOKENS},
    "prefill": {"prompt": 4000, "batch": 1, "output": 8},
    "cached-prefix": {"prompt": 4000, "cached": 3500, "batch": 1, "output": 8},
    "custom": {"prompt": None, "cached": 0, "batch": 1, "output": DECODE_TOKENS},
}
DEFAULT_SCENARIOS = ["decode:context=512,batch=1", "decode:batch=8", "decode:batch=32", "prefill", "cached-prefix"]
VARIANTS = {"off": [], "on": ["--enable-kvtuner-quant"]}

EXPLANATION = """
scenarios, as NAME or NAME:KEY=VALUE,...:
  decode         context=2048 batch=8 output=72: the prefix cache holds `context` tokens of every prompt, put there
                 before by the same client, and a prompt is one token longer, so that the run is decode alone
  prefill        prompt=4000 batch=1 output=8: empty prefix cache; look at TTFT
  cached-prefix  prompt=4000 cached=3500 batch=1 output=8: the rest of the prompt is computed; look at TTFT
  custom         prompt=(required) cached=0 batch=1 output=72
  Prompts of one batch differ from the first token on. A run fails if a request finds other cached tokens than these.

figures:
  decode throughput  tokens per second while all requests of the batch decode: those that arrive after the last request's
                     first token and until the first request's last token, divided by that time; "-" if they never do
  output throughput  upstream's: all generated tokens by the duration of the run, prefill included
  TTFT               upstream's: from sending a request to its first token that yields text
  ITL                upstream's: time between a request's tokens, over all tokens of all requests
  With several rounds each figure is the median over rounds.

exit status: 0 only if both servers answered every request of every scenario in full.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXPLANATION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", required=True, metavar="PATH", help="checkpoint (make model makes a small one)")
    add(
        "--scenario",
        nargs="+",
        default=DEFAULT_SCENARIOS,
        metavar="SPEC",
        help=f"default: {' '.join(DEFAULT_SCENARIOS)}",
    )
    add("--rounds", type=positive, default=1, help="start both servers that often, in alternating order (1)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--dtype", default="bfloat16", help="of model and unquantized cache (bfloat16)")
    add("--chunk", type=positive, default=512, metavar="TOKENS", help="chunked prefill size of both servers (512)")
    add("--server-flags-off", type=shlex.split, default=[], metavar="=FLAGS", help="for the unquantized server only")
    add("--server-flags-on", type=shlex.split, default=[], metavar="=FLAGS", help="for the quantized server only")
    add("--timeout", type=positive, default=3600, metavar="S", help="for a server's start and for each run (3600)")
    add("--json", metavar="FILE", help="write settings, all runs and ratios there")
    add("--plot", metavar="FILE", help="draw the ratios there, by the name's ending (.png, .svg, .pdf)")
    add("--logs", type=Path, metavar="DIR", help="what servers and clients print; default: a new temporary folder")
    add("server_flags", nargs="*", metavar="FLAG", help="after --: flags of both servers; the last of a flag wins")
    options = parser.parse_args(arguments)
    try:
        options.scenarios = [parse_scenario(spec) for spec in options.scenario]
    except ValueError as e:
        parser.error(f"--scenario {e}")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    options.device = options.device or ("cuda" if has_cuda() else "cpu")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def parse_scenario(spec: str) -> Scenario:
    """A scenario from ``NAME:KEY=VALUE,...``. Raises ValueError, naming the spec and what is valid."""
    name, _, settings = spec.partition(":")
    if name not in PRESETS:
        raise ValueError(f"{spec!r}: there is no {name!r}; valid are {', '.join(PRESETS)}")
    values = dict(PRESETS[name])
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in values or not value.isdecimal():
            raise ValueError(f"{spec!r}: {setting!r} is not KEY=NUMBER with a key of {', '.join(values)}")
        values[key] = int(value)
    if "context" in values:
        values["cached"] = values.pop("context")
        values["prompt"] = values["cached"] + 1
    values.setdefault("cached", 0)
    for key, value in values.items():
        if value is None or (value < 1 and key != "cached"):
            raise ValueError(f"{spec!r}: {key} must be given and above 0")
    if values["cached"] >= values["prompt"]:
        raise ValueError(f"{spec!r}: of {values['prompt']} tokens at most {values['prompt'] - 1} can be cached")
    return Scenario(name, **values)


def server_flags(options: argparse.Namespace, variant: str) -> list[str]:
    """Flags of a server. Later ones win on its command line, so the user's come last."""
    flags = ["--dtype", options.dtype, "--chunked-prefill-size", str(options.chunk), "--skip-server-warmup"]
    flags += ["--device", options.device, "--random-seed", "0"]
    flags += ["--max-running-requests", str(max(s.batch for s in options.scenarios))]
    if options.device == "cpu":
        # By default a server takes most of the machine's memory. Room for a second run's answers, and for whole pages.
        tokens = max(s.batch * (s.prompt + 2 * s.output + 128) for s in options.scenarios)
        flags += ["--max-total-tokens", str(tokens)]
    own = {"off": options.server_flags_off, "on": options.server_flags_on}[variant]
    return [*flags, *VARIANTS[variant], *options.server_flags, *own]


def client_command(url: str, options: argparse.Namespace, load: Scenario, flush: bool, output: Path) -> list[str]:
    """Upstream's client for a load. Equal seeds give equal prompts, of which a shorter one is a prefix of a longer."""
    # The parameters replace upstream's own. Special tokens must count as text, or the first token may go unseen.
    sampling = {"temperature": 0, "max_new_tokens": load.output, "ignore_eos": True, "skip_special_tokens": False}
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", url]
    command += ["--model", options.model_path, "--tokenizer", options.model_path, "--seed", "1"]
    command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    command += ["--num-prompts", str(load.batch), "--random-input-len", str(load.prompt)]
    command += [
        "--random-output-len",
        str(load.output),
        "--extra-request-body",
        json.dumps({"sampling_params": sampling}),
    ]
    command += ["--warmup-requests", "0", "--disable-tqdm", "--cache-report", "--output-details"]
    return [*command, "--output-file", str(output), *(["--flush-cache"] if flush else [])]


def send(server: Server, options: argparse.Namespace, load: Scenario, flush: bool, log: Path) -> dict:
    """Run the client once and return its result. Raises ServerError where it, or the server, fails."""
    output = log.with_suffix(".jsonl")
    output.unlink(missing_ok=True)  # the client appends
    command = client_command(server.url, options, load, flush, output)
    with open(log, "w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=server_environment(["--device", options.device], extra={"no_proxy": HOST}),
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired:
            raise server.error(f"{load.describe()}: no end within {options.timeout} s") from None
    if not server.alive():
        raise server.error(f"{load.describe()}: the server died")
    if done.returncode or not output.exists():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise ServerError(f"{load.describe()}: the client failed\n--- last lines of {log} ---\n{tail}")
    return json.loads(output.read_text(encoding="utf-8"))


def run_scenario(server: Server, options: argparse.Namespace, scenario: Scenario, page_size: int, log: Path) -> Figures:
    """Warm up and fill the prefix cache, then measure. Raises ServerError where a run is not what the scenario says."""
    before = Scenario("warm-up", scenario.cached or scenario.prompt, 0, scenario.batch, WARM_UP_TOKENS)
    # Only a prompt's last token is never taken from the cache: where that is all, earlier prompts may stay and save time.
    flush = scenario.cached + 1 < scenario.prompt
    for load, empties, name in [(before, flush, "warm-up"), (scenario, scenario.cached == 0, "run")]:
        result = send(server, options, load, empties, log.with_name(f"{log.name}-{name}.log"))
        if reason := failure(result, load):
            raise server.error(f"{scenario.describe()}: {name}: {reason}")
    if reason := cache_mismatch(result, scenario, page_size):
        raise server.error(f"{scenario.describe()}: {reason}")
    return figures_of(result)


def run_server(options: argparse.Namespace, variant: str, name: str) -> tuple[dict, list[Figures]]:
    """One server's life: what it says about itself, and its figures in the order of scenarios."""
    log_path = options.logs / f"{name}-server.log"
    server = Server(options.model_path, server_flags(options, variant), log_path=log_path)
    figures = []
    with server:
        server.wait_until_healthy(options.timeout)
        info = server.request("/server_info")
        attention = info["internal_states"][0].get("kvtuner", {}).get("attention", "upstream's")
        say(f"{name}: attention is {attention}")
        for i, scenario in enumerate(options.scenarios, 1):
            log = options.logs / f"{name}-{i}-{scenario.name}"
            now = run_scenario(server, options, scenario, info["page_size"], log)
            rate = f"{now.decode_throughput:.1f}" if now.decode_throughput else "-"
            say(f"{name}: {scenario.describe()}: TTFT {now.ttft_median:.0f} ms, decode {rate} tokens/s")
            figures.append(now)
    return {"command": shlex.join(server.command), "attention": attention}, figures


def compare(options: argparse.Namespace) -> tuple[list[Comparison], dict]:
    """All rounds on both servers. Returns the comparisons, in the order of scenarios, and what the servers were."""
    rounds: dict[str, list[list[Figures]]] = {variant: [] for variant in VARIANTS}
    servers = {}
    for number in range(1, options.rounds + 1):
        # Alternating, so that a machine that gets slower or faster favours neither.
        for variant in list(VARIANTS)[:: 1 if number % 2 else -1]:
            servers[variant], figures = run_server(options, variant, f"{number}-{variant}")
            rounds[variant].append(figures)
    by_scenario = zip(options.scenarios, zip(*rounds["off"]), zip(*rounds["on"]), strict=True)
    return [Comparison.of(scenario, list(off), list(on)) for scenario, off, on in by_scenario], servers


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.logs = options.logs or Path(tempfile.mkdtemp(prefix="kvtuner-serving-"))
    options.logs.mkdir(parents=True, exist_ok=True)
    say(f"logs: {options.logs}")
    try:
        comparisons, servers = compare(options)
    except ServerError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for comparison in comparisons:
        print("\n" + table(comparison))
    if options.json:
        kept = {k: v for k, v in vars(options).items() if k not in ("scenarios", "logs")}
        write_json(options.json, comparisons, kept | {"servers": servers})
    if options.plot:
        write_plot(options.plot, comparisons)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Figures of served loads, their ratios between the unquantized and the quantized server, as text, JSON and a plot."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields
from itertools import accumulate


@dataclass(frozen=True)
class Scenario:
    """A load: ``batch`` requests sent at once.

    prompt, cached, output: tokens of a prompt, those of them that the prefix cache already holds, and tokens to generate.
    """

    name: str
    prompt: int
    cached: int
    batch: int
    output: int

    def describe(self) -> str:
        return (
            f"{self.name}: batch {self.batch}, prompts of {self.prompt} tokens, {self.cached} of them cached, "
            f"{self.output} generated"
        )


@dataclass(frozen=True)
class Figures:
    """What one run of a scenario gave, or the medians of several. Throughputs in tokens/s, times in ms.

    decode_throughput: see :func:`decode_throughput`; None where it is not defined.
    output_throughput, ttft_*, itl_*: upstream's own figures; a None: one token per request has no inter-token latency.
    """

    decode_throughput: float | None
    output_throughput: float
    ttft_median: float
    ttft_p99: float
    itl_median: float | None
    itl_p99: float | None


LABELS = {
    "decode_throughput": "decode throughput, tokens/s",
    "output_throughput": "output throughput, tokens/s",
    "ttft_median": "TTFT median, ms",
    "ttft_p99": "TTFT p99, ms",
    "itl_median": "ITL median, ms",
    "itl_p99": "ITL p99, ms",
}


def decode_throughput(ttfts: list[float], itls: list[list[float]]) -> float | None:
    """Tokens per second while all requests decode.

    ttfts: seconds from a request's start to its first token. itls: per request, seconds between its tokens. The requests
    start together. Counted are the tokens that arrive after the last request's first token and until the first request's
    last token. None where no such time exists: one token per request, or requests that waited for each other.
    """
    arrivals = [list(accumulate(gaps, initial=first)) for first, gaps in zip(ttfts, itls, strict=True)]
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    if end <= begin:
        return None
    return sum(begin < t <= end for times in arrivals for t in times) / (end - begin)


def figures_of(result: dict) -> Figures:
    """Figures of a result that upstream's benchmark wrote with --output-details."""
    has_gaps = any(result["itls"])
    return Figures(
        decode_throughput=decode_throughput(result["ttfts"], result["itls"]),
        output_throughput=result["output_throughput"],
        ttft_median=result["median_ttft_ms"],
        ttft_p99=result["p99_ttft_ms"],
        itl_median=result["median_itl_ms"] if has_gaps else None,
        itl_p99=result["p99_itl_ms"] if has_gaps else None,
    )


def median_figures(runs: list[Figures]) -> Figures:
    """The median of each figure over the runs; None where a run lacks it."""
    columns = {f.name: [getattr(run, f.name) for run in runs] for f in fields(Figures)}
    return Figures(**{name: None if None in column else statistics.median(column) for name, column in columns.items()})


def ratios(off: Figures, on: Figures) -> dict[str, float | None]:
    """By how much the quantized server is better, per figure: above 1 for more throughput and for shorter times."""

    def ratio(name: str) -> float | None:
        before, after = getattr(off, name), getattr(on, name)
        if not name.endswith("throughput"):
            before, after = after, before
        return after / before if before and after else None

    return {f.name: ratio(f.name) for f in fields(Figures)}


def failure(result: dict, scenario: Scenario) -> str | None:
    """Why a run is no measurement: a request that failed, an empty or short answer. None if it is one."""
    if len(result["errors"]) != scenario.batch:
        return f"{len(result['errors'])} of {scenario.batch} requests were sent"
    for i, error in enumerate(result["errors"]):
        if error:
            return f"request {i} failed: {error.strip().splitlines()[-1]}"
        if not result["generated_texts"][i]:
            return f"the answer to request {i} is empty"
        if (length := result["output_lens"][i]) != scenario.output:
            return f"the answer to request {i} has {length} tokens instead of {scenario.output}"
    return None


def cache_mismatch(result: dict, scenario: Scenario, page_size: int) -> str | None:
    """What a request found in the prefix cache, where that is not what the scenario says; else None."""
    for i, cached in enumerate(result["cached_tokens"]):
        # Whole pages are found, and a generated token may happen to continue the prompt.
        if abs(cached - scenario.cached) >= max(page_size, 8):
            return (
                f"request {i} found {cached} tokens in the prefix cache instead of {scenario.cached}; where the pool is "
                "too small to keep them all, give more --max-total-tokens or --mem-fraction-static"
            )
    return None


@dataclass(frozen=True)
class Comparison:
    """A scenario on both servers: medians over rounds, and the runs that they come from."""

    scenario: Scenario
    off: Figures
    on: Figures
    runs_off: list[Figures]
    runs_on: list[Figures]

    @classmethod
    def of(cls, scenario: Scenario, off: list[Figures], on: list[Figures]) -> Comparison:
        return cls(scenario, median_figures(off), median_figures(on), off, on)

    def ratios(self) -> dict[str, float | None]:
        return ratios(self.off, self.on)


def table(comparison: Comparison) -> str:
    """The scenario's figures as lines of text."""
    lines = [comparison.scenario.describe(), f"  {'':30}{'off':>12}{'on':>12}{'ratio':>9}"]
    for name, ratio in comparison.ratios().items():
        cells = [_cell(getattr(side, name)) for side in (comparison.off, comparison.on)]
        lines.append(f"  {LABELS[name]:30}{cells[0]:>12}{cells[1]:>12}{_cell(ratio):>9}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def write_json(path: str, comparisons: list[Comparison], settings: dict) -> None:
    results = [asdict(c) | {"ratios": c.ratios()} for c in comparisons]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"settings": settings, "results": results}, file, indent=1)
        file.write("\n")


def write_plot(path: str, comparisons: list[Comparison]) -> None:
    """Bars of the ratios, one group per scenario. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    shown = ("decode_throughput", "ttft_median", "itl_median", "itl_p99")
    figure = Figure(figsize=(2.5 + 2 * len(comparisons), 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(shown):
        at = [c + (i - (len(shown) - 1) / 2) * 0.2 for c in range(len(comparisons))]
        heights = [comparison.ratios()[name] or 0 for comparison in comparisons]
        bars = axes.bar(at, heights, 0.2, label=LABELS[name].split(",")[0])
        axes.bar_label(bars, [f"{h:.2f}" if h else "-" for h in heights], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    labels = [f"{c.scenario.name}\n{c.scenario.prompt} tokens × {c.scenario.batch}" for c in comparisons]
    axes.set_xticks(range(len(comparisons)), labels)
    axes.set_ylabel("quantized over unquantized; above 1 is faster")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)

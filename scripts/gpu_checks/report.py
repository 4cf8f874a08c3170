"""What a check finds, and what becomes of it: one line, and raw numbers."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, NOT_RUN = "pass", "FAIL", "not run"
# Exit statuses of gpu_check.py; 2 is what argparse ends with.
PASSED, FAILED, INCOMPLETE = 0, 1, 3


class NotRun(Exception):
    """A check cannot run here; the message says why."""


@dataclass(frozen=True)
class Result:
    """Verdict of a check: PASS, FAIL or NOT_RUN; a line that says what was found or why not; raw numbers for JSON."""

    name: str
    verdict: str
    summary: str
    seconds: float
    numbers: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.verdict:<8} {self.name:<12} {self.seconds:7.1f} s  {self.summary}"


class Findings:
    """What a check finds while it runs. It goes on after a fault, so that one run shows all of them.

    numbers: of the check, by name; lists and dicts of plain values. compared: how many comparisons were made.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.faults: list[str] = []
        self.left_out: list[str] = []
        self.compared = 0

    def expect(self, holds: bool, fault: str) -> None:
        """Note a fault unless ``holds``."""
        self.compared += 1
        if not holds:
            self.faults.append(fault)

    def leave_out(self, part: str) -> None:
        """Note a part that cannot run here, with the reason: the check counts as not run unless it fails."""
        self.left_out.append(part)

    def record(self, name: str, value: Any) -> None:
        """Add a raw number to the list ``name``."""
        self.numbers.setdefault(name, []).append(value)


def run(name: str, check: Callable[[Findings], str]) -> Result:
    """Run a check, which returns what it found in words; an exception is a fault like any other."""
    findings, start = Findings(), time.perf_counter()
    try:
        summary, verdict = check(findings), PASS
        if not findings.compared:
            findings.faults.append("nothing was compared")
        if findings.left_out:
            summary, verdict = f"{summary}; left out: {'; '.join(findings.left_out)}", NOT_RUN
    except NotRun as e:
        summary, verdict = str(e), NOT_RUN
    except Exception as e:
        findings.numbers["traceback"] = traceback.format_exc()
        findings.faults.append(f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}")
        summary = ""
    if findings.faults:
        more = f" (and {len(findings.faults) - 1} more)" if len(findings.faults) > 1 else ""
        summary, verdict = findings.faults[0] + more, FAIL
        findings.numbers["faults"] = findings.faults
    return Result(name, verdict, summary, time.perf_counter() - start, findings.numbers)


def exit_status(results: list[Result]) -> int:
    """FAILED if a check failed, else INCOMPLETE if one could not run, else PASSED."""
    verdicts = {result.verdict for result in results}
    return FAILED if FAIL in verdicts else INCOMPLETE if NOT_RUN in verdicts else PASSED

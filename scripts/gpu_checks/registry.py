"""The ten checks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_checks import (
    attending,
    bandwidth,
    compiled,
    fence,
    graphs,
    packing,
    pools,
    prefill,
    report,
    sanitizer,
    slot_reuse,
)
from gpu_checks.device import Device
from gpu_checks.report import Findings, NotRun, Result


@dataclass(frozen=True)
class Check:
    """name: for ``--only``. needs_gpu: means nothing in the interpreter."""

    name: str
    function: Callable[[Device, Findings], str]
    needs_gpu: bool = False

    def run(self, device: Device) -> Result:
        def guarded(findings: Findings) -> str:
            if self.needs_gpu and not device.gpu:
                raise NotRun("needs a GPU")
            return self.function(device, findings)

        return report.run(self.name, guarded)


CHECKS = (
    Check("compile", compiled.check, needs_gpu=True),
    Check("pack", packing.check),
    Check("attend", attending.check),
    Check("pools", pools.check),
    Check("graphs", graphs.check, needs_gpu=True),
    Check("fence", fence.check, needs_gpu=True),
    Check("slots", slot_reuse.check),
    Check("prefill", prefill.check),
    Check("bandwidth", bandwidth.check, needs_gpu=True),
    Check("sanitizer", sanitizer.check, needs_gpu=True),
)

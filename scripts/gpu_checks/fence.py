"""Check 6: the request table may be overwritten as soon as a graph's plan has run, while its layers are still to come."""

from __future__ import annotations

import torch

from gpu_checks.cache import Cache, Rows
from gpu_checks.device import Device
from gpu_checks.graphs import capture, contents, graph_shape
from gpu_checks.report import Findings


def check(device: Device, findings: Findings) -> str:
    """A second stream hands every slot's pages to someone else right after the event that the graph records behind its plan. The
    results must be those of an undisturbed step; those of a step that plans later must not, else the check saw nothing."""
    undisturbed = Scene(device)
    outputs = undisturbed.run()
    for late in (False, True):
        scene = Scene(device)
        disturbed = scene.run(overwritten=True, late_plan=late)
        same = all(map(torch.equal, outputs, disturbed))
        stored = all(torch.equal(ours, theirs) for _, ours, theirs in contents(scene.cache, undisturbed.cache))
        findings.numbers["late_plan" if late else "snapshot"] = {"outputs_equal": same, "buffers_equal": stored}
        if late:
            findings.expect(not same, "a step without the snapshot gave the same outputs: the race was not run")
            findings.expect(not stored, "a step without the snapshot packed into the same pages: the race was not run")
        else:
            findings.expect(same, "outputs changed when the request table was overwritten behind the plan")
            findings.expect(stored, "stored pages changed when the request table was overwritten behind the plan")
    return "unchanged by writes behind the plan; without the snapshot outputs and pages change"


class Scene:
    """Two requests, of which the first completes a page in the step, and a third one's pages."""

    def __init__(self, device: Device) -> None:
        self.device, self.cache = device, Cache(device, graph_shape(device), seed=3)
        page = self.cache.page
        for slot, length in ((1, 5 * page - 1), (2, 3 * page + 1), (3, 6 * page)):
            self.cache.begin(slot)
            self.cache.extend(slot, length)

    def run(self, overwritten: bool = False, late_plan: bool = False) -> list[torch.Tensor]:
        """Outputs of the step, per layer."""
        cache, race = self.cache, self.device.race()
        graph = capture(self.device, cache, 2, race.mark, late_plan)
        rows: Rows = cache.padded_rows([1, 2])
        graph.fill(cache.decode_inputs([1, 2]), rows)
        others = cache.req_to_token[3].clone()
        self.device.synchronize()
        race.replay(graph.replay, (lambda: overwrite(cache, others)) if overwritten else (lambda: None))
        self.device.synchronize()
        return [out.clone() for out in graph.outputs]


def overwrite(cache: Cache, row: torch.Tensor) -> None:
    """The scheduler writes its table for the next batch: slots 1 and 2 have other pages."""
    cache.req_to_token[1:3] = row

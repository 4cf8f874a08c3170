"""How much memory a call takes at its peak."""

import gc

import torch


def peak_memory(call):
    """The largest number of bytes that ``call`` had allocated on the CPU at once."""
    gc.collect()  # what is freed in between would count as less
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

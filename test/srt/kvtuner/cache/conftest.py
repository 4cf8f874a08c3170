import pytest

from harness.sizing import FakeKernels, FakeRunner
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.runtime_context import get_context


@pytest.fixture
def serve(monkeypatch):
    """Publish server arguments and give back a runner with a budget; extra arguments are flags."""
    published = []
    monkeypatch.setattr(dispatch, "choose_kernels", lambda device, formats: (FakeKernels, []))

    def serve(budget, **flags):
        override = get_context().override_server_args(enable_kvtuner_quant=True, page_size=64, **flags)
        override.install()
        published.append(override.restore)
        return FakeRunner(budget)

    yield serve
    while published:
        published.pop()()

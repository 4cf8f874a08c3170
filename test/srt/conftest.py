"""Settings for tests that compute in this process."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors are tiny here: a second thread costs more than it computes, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

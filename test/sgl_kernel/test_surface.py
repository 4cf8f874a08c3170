"""The portable package as its users meet it."""

import importlib.metadata
import inspect

import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")
if "cpu" not in getattr(sgl_kernel, "__version__", ""):
    pytest.skip("the published CUDA build of sgl_kernel is installed", allow_module_level=True)


def test_every_listed_function_is_documented():
    for name in sgl_kernel.__all__:
        assert inspect.getdoc(getattr(sgl_kernel, name)), name


def test_version_satisfies_the_pin_of_sglang():
    packaging_version = pytest.importorskip("packaging.version")
    installed = importlib.metadata.version("sglang-kernel")
    assert installed == sgl_kernel.__version__
    assert packaging_version.Version(installed).public == "0.4.10"


def test_missing_function_is_named_in_the_error():
    with pytest.raises(AttributeError, match=r"sgl_kernel\.fp8_scaled_mm is not in the portable CPU build"):
        sgl_kernel.fp8_scaled_mm


def test_missing_function_can_be_probed():
    assert not hasattr(sgl_kernel, "fp8_scaled_mm")
    with pytest.raises(ImportError, match="fp8_scaled_mm"):
        from sgl_kernel import fp8_scaled_mm  # noqa: F401


def test_missing_dunder_gets_the_plain_message():
    with pytest.raises(AttributeError, match="has no attribute '__wrapped__'"):
        sgl_kernel.__wrapped__


def test_no_operator_is_registered():
    # sglang chooses its AMX paths by this operator.
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")

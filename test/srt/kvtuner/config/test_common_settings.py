"""What ranks compare: which flags, which model, which code."""

import shutil

import pytest

from harness.server_args import server_args, write_model
from harness.upstream import ROOT
from sglang.srt.kvtuner.config import common_settings, model_digest
from sglang.srt.server_args import ServerArgs


@pytest.fixture(autouse=True)
def no_memory():
    """Nothing is remembered of another test's files."""
    for function in (model_digest.weight_files, model_digest.tokenizer_files, common_settings.own_code):
        function.cache_clear()


@pytest.fixture
def model(tmp_path):
    """A Llama of 4 layers without weights."""
    return write_model(tmp_path / "model")


def setup(model_path, **fields):
    args = server_args(model_path, **fields)
    args.resolve_once()
    return common_settings.setup_of(args, common_settings.resolved_cache_format(args))


def changed(model, **fields):
    """What a rank is told of another that was started with these fields."""
    return setup(model).differences(setup(model, **fields))


def test_equal_ranks_differ_in_nothing(model):
    assert changed(model) == []


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"dtype": "float32"}, "--dtype: here bfloat16, there float32"),
        ({"chunked_prefill_size": 256}, "--chunked-prefill-size: here "),
        ({"page_size": 128}, "--page-size: here 64, there 128"),
        ({"max_total_tokens": 4096}, "--max-total-tokens: here null, there 4096"),
        ({"max_running_requests": 8}, "--max-running-requests: here null, there 8"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk: here false, there true"),
        ({"disable_overlap_schedule": True}, "--disable-overlap-schedule: here false, there true"),
        ({"disable_radix_cache": True}, "--disable-radix-cache: here false, there true"),
        ({"context_length": 1024}, "--context-length: here null, there 1024"),
        ({"schedule_policy": "lpm"}, "--schedule-policy: here fcfs, there lpm"),
        ({"schedule_conservativeness": 0.5}, "--schedule-conservativeness: here 1.0, there 0.5"),
        ({"kvtuner_sink_length": 4}, "sink_length: here 0, there 4 (all layers)"),
        ({"kvtuner_residual_length": 64}, "--kvtuner-residual-length: here 128, there 64"),
        ({"kvtuner_workspace_tokens": 2048}, "--kvtuner-workspace-tokens: here 16384, there 2048"),
        ({"json_model_override_args": '{"rope_theta": 5.0}'}, "--json-model-override-args: here {}, there "),
    ],
)
def test_a_flag_that_must_agree_is_told_by_its_name(model, fields, told):
    assert any(change.startswith(told) for change in changed(model, **fields)), changed(model, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "10.0.0.1", "port": 31000, "nccl_port": 4000},
        {"dist_init_addr": "10.0.0.1:5000", "node_rank": 1, "nnodes": 1, "dist_timeout": 100},
        {"log_level": "debug", "log_requests": True, "enable_metrics": True, "decode_log_interval": 7},
        {"mem_fraction_static": 0.3, "base_gpu_id": 2, "watchdog_timeout": 900, "sleep_on_idle": True},
        {"api_key": "secret", "served_model_name": "x", "random_seed": 5, "download_dir": "elsewhere"},
    ],
)
def test_what_may_differ_between_nodes_is_not_compared(model, fields):
    assert changed(model, **fields) == []


def test_the_kernels_that_are_asked_for_must_agree(model, monkeypatch):
    ours = setup(model)
    monkeypatch.setenv("SGLANG_KVTUNER_KERNELS", "reference")
    monkeypatch.setenv("SGLANG_KVTUNER_CPU_ISA", "plain")  # which may differ: processors do
    assert ours.differences(setup(model)) == ["SGLANG_KVTUNER_KERNELS: here unset, there reference"]


def test_the_fields_that_are_named_exist():
    """Upstream renames and moves fields: the lists must follow."""
    namespaces = ServerArgs._NS_BY_FIELD
    assert set(common_settings.PICKED_FIELDS) <= set(namespaces)
    for namespace, but in common_settings.WHOLE_NAMESPACES.items():
        assert but <= {name for name, found in namespaces.items() if found == namespace}, namespace


def test_a_copy_of_the_model_in_another_place_is_the_same(model, tmp_path):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    copy = shutil.copytree(model, tmp_path / "copy")
    assert setup(model).differences(setup(str(copy))) == []


def test_other_weights_of_the_same_shape_are_told(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (copy / "model.safetensors").write_bytes(b"wrights")
    (told,) = setup(model).differences(setup(str(copy)))
    assert told.startswith("model weights: file model.safetensors differs (here 7 bytes, sample ")


def test_weights_that_are_not_loaded_are_not_compared(model, tmp_path):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    assert "model weights" not in setup(model, load_format="dummy").files


def test_another_tokenizer_is_told(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("[]")
    (told,) = setup(model).differences(setup(str(copy)))
    assert told.startswith("tokenizer: file tokenizer.json differs")


def test_another_configuration_of_the_model_is_told_by_the_field(model, tmp_path):
    other = write_model(tmp_path / "other", rms_norm_eps=1e-6, eos_token_id=3)
    told = setup(model).differences(setup(other))
    assert told == [
        "model's end-of-text tokens: here [2], there [3]",
        "model config eos_token_id: here 2, there 3",
        "model config rms_norm_eps: here 1e-05, there 1e-06",
    ]


def test_who_wrote_the_configuration_does_not_matter(model, tmp_path):
    other = write_model(tmp_path / "other", transformers_version="1.2.3", _name_or_path="/somewhere")
    assert setup(model).differences(setup(other)) == []


def test_another_version_of_the_package_is_told(model, monkeypatch):
    ours = setup(model)
    monkeypatch.setattr("sglang.version.__version__", "0+other")
    (told,) = ours.differences(setup(model))
    assert told.startswith("sglang version: here 0.") and told.endswith(", there 0+other")


def test_other_code_is_told_by_the_file(model, monkeypatch):
    ours = setup(model)
    monkeypatch.setattr(common_settings, "own_code", lambda: {**ours.files["own code"], "srt/kvtuner/hooks.py": "0"})
    (told,) = ours.differences(setup(model))
    assert told.startswith("own code: file srt/kvtuner/hooks.py differs")


def test_all_own_files_are_compared(monkeypatch):
    """Those that the build adds to the package, as installed."""
    monkeypatch.syspath_prepend(str(ROOT / "python" / "upstream"))
    from backend import own

    assert {f"sglang/{name}" for name in common_settings.own_code()} == set(own.find())


def test_long_values_are_shortened_and_stay_different():
    long, longer = (common_settings.shown(["a" * 100, end]) for end in "yz")
    assert len(long) < 100 and long != longer
    assert common_settings.shown(["a"]) == '["a"]' and common_settings.shown("a") == "a"

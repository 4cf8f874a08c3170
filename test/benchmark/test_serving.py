"""The serving benchmark without servers: what it is asked to run, what counts as a run, and its figures."""

import json
from pathlib import Path

import pytest

import serving
import serving_report
from serving_report import Comparison, Figures, Scenario

FAST = Figures(40.0, 30.0, 100.0, 110.0, 20.0, 25.0)
SLOW = Figures(10.0, 6.0, 300.0, 330.0, 80.0, 50.0)


def parse(*arguments):
    return serving.parse(["--model-path", "M", "--device", "cpu", *arguments])


def value_of(flags, name):
    """The value that a command line parser takes: the last one."""
    return flags[len(flags) - 1 - flags[::-1].index(name) + 1]


def result_of(scenario, **changes):
    """What upstream's client writes for a run in which all went well."""
    n = scenario.batch
    result = {
        "errors": [""] * n,
        "generated_texts": ["text"] * n,
        "output_lens": [scenario.output] * n,
        "cached_tokens": [scenario.cached] * n,
        "ttfts": [0.5] * n,
        "itls": [[0.1] * (scenario.output - 1)] * n,
        "output_throughput": 7.0,
        "median_ttft_ms": 500.0,
        "p99_ttft_ms": 510.0,
        "median_itl_ms": 100.0,
        "p99_itl_ms": 120.0,
    }
    return result | changes


def test_default_scenarios():
    loads = [(s.name, s.prompt, s.cached, s.batch) for s in parse().scenarios]
    assert loads == [
        ("decode", 513, 512, 1),
        ("decode", 2049, 2048, 8),
        ("decode", 2049, 2048, 32),
        ("prefill", 4000, 0, 1),
        ("cached-prefix", 4000, 3500, 1),
    ]


def test_scenarios_are_read():
    assert serving.parse_scenario("decode:context=64,batch=2,output=5") == Scenario("decode", 65, 64, 2, 5)
    assert serving.parse_scenario("custom:prompt=9") == Scenario("custom", 9, 0, 1, 72)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("decoding", "valid are decode, prefill, cached-prefix, custom"),
        ("decode:prompt=4", "'prompt=4' is not KEY=NUMBER with a key of context, batch, output"),
        ("decode:batch", "'batch' is not KEY=NUMBER"),
        ("decode:batch=-1", "'batch=-1' is not KEY=NUMBER"),
        ("prefill:batch=0", "batch must be given and above 0"),
        ("custom:batch=2", "prompt must be given"),
        ("custom:prompt=8,cached=8", "of 8 tokens at most 7 can be cached"),
    ],
)
def test_bad_scenarios_are_refused(spec, said, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--scenario", spec)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "--scenario" in error and spec in error and said in error


def test_servers_differ_in_nothing_but_the_flag_and_what_was_asked_for():
    options = parse("--server-flags-on=--kvtuner-nbits-key 8", "--", "--tp-size", "2")
    off, on = (serving.server_flags(options, variant) for variant in ("off", "on"))
    assert [flag for flag in on if flag not in off] == ["--enable-kvtuner-quant", "--kvtuner-nbits-key", "8"]
    assert [flag for flag in off if flag not in on] == []
    assert value_of(off, "--tp-size") == "2"
    assert value_of(off, "--dtype") == "bfloat16"
    assert value_of(off, "--max-running-requests") == "32"
    # Every request in whole pages, and the answers of the run before.
    assert int(value_of(off, "--max-total-tokens")) >= 32 * (2049 + 2 * 72 + 64)


def test_flags_of_the_user_win():
    options = parse("--server-flags-off=--dtype float16", "--", "--dtype", "float32", "--max-total-tokens", "5")
    assert value_of(serving.server_flags(options, "off"), "--dtype") == "float16"
    assert value_of(serving.server_flags(options, "on"), "--dtype") == "float32"
    assert value_of(serving.server_flags(options, "on"), "--max-total-tokens") == "5"


def test_only_a_cpu_server_gets_a_pool_size():
    options = serving.parse(["--model-path", "M", "--device", "cuda"])
    assert "--max-total-tokens" not in serving.server_flags(options, "off")


def test_the_client_is_asked_for_the_load():
    load = Scenario("decode", 65, 64, 2, 5)
    command = serving.client_command("http://x", parse(), load, True, Path("out.jsonl"))
    assert value_of(command, "--random-input-len") == "65"
    assert value_of(command, "--num-prompts") == "2"
    sampling = json.loads(value_of(command, "--extra-request-body"))["sampling_params"]
    assert sampling["max_new_tokens"] == 5 and sampling["ignore_eos"]
    assert "--flush-cache" in command
    assert "--flush-cache" not in serving.client_command("http://x", parse(), load, False, Path("out.jsonl"))


def test_a_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse("--plot", "ratios.png")
    assert "pip install matplotlib" in capsys.readouterr().err


def test_decode_throughput_counts_the_time_in_which_all_decode():
    # The first request decodes alone until 2 s; from then on both give a token a second until the first one ends at 4 s.
    assert serving_report.decode_throughput([1.0, 2.0], [[1.0] * 3, [1.0] * 4]) == pytest.approx(4 / 2)
    assert serving_report.decode_throughput([1.0], [[0.5] * 8]) == pytest.approx(2.0)


def test_decode_throughput_is_undefined_without_common_time():
    assert serving_report.decode_throughput([1.0, 9.0], [[1.0], [1.0]]) is None
    assert serving_report.decode_throughput([1.0], [[]]) is None


def test_ratios_above_one_mean_that_the_quantized_server_is_better():
    assert serving_report.ratios(SLOW, FAST) == {
        "decode_throughput": 4.0,
        "output_throughput": 5.0,
        "ttft_median": 3.0,
        "ttft_p99": 3.0,
        "itl_median": 4.0,
        "itl_p99": 2.0,
    }
    nothing = Figures(None, 6.0, 300.0, 330.0, None, None)
    undefined = serving_report.ratios(nothing, FAST)
    assert undefined["decode_throughput"] is None and undefined["itl_median"] is None
    assert undefined["ttft_median"] == 3.0


def test_rounds_are_reduced_to_medians():
    runs = [Figures(d, 1.0, t, 1.0, 1.0, None) for d, t in [(3.0, 5.0), (1.0, 9.0), (2.0, 7.0)]]
    median = serving_report.median_figures(runs)
    assert (median.decode_throughput, median.ttft_median, median.itl_p99) == (2.0, 7.0, None)


def test_a_good_run():
    scenario = Scenario("cached-prefix", 400, 350, 2, 4)
    result = result_of(scenario)
    assert serving_report.failure(result, scenario) is None
    assert serving_report.cache_mismatch(result, scenario, 1) is None
    assert serving_report.figures_of(result) == Figures(pytest.approx(20.0), 7.0, 500.0, 510.0, 100.0, 120.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": ["", "Traceback\nConnectionError: refused\n"]}, "request 1 failed: ConnectionError: refused"),
        ({"errors": [""]}, "1 of 2 requests"),
        ({"generated_texts": ["text", ""]}, "answer to request 1 is empty"),
        ({"output_lens": [4, 3]}, "request 1 has 3 tokens instead of 4"),
    ],
)
def test_what_is_no_measurement(changes, said):
    scenario = Scenario("cached-prefix", 400, 350, 2, 4)
    assert said in serving_report.failure(result_of(scenario, **changes), scenario)


def test_cached_tokens_must_be_those_of_the_scenario():
    scenario = Scenario("cached-prefix", 400, 350, 2, 4)
    whole_pages = result_of(scenario, cached_tokens=[350, 320])
    assert serving_report.cache_mismatch(whole_pages, scenario, 64) is None
    assert "request 1 found 320 tokens" in serving_report.cache_mismatch(whole_pages, scenario, 16)
    assert "instead of 350" in serving_report.cache_mismatch(result_of(scenario, cached_tokens=[0, 350]), scenario, 64)


def test_one_token_answers_have_no_inter_token_figures():
    scenario = Scenario("custom", 8, 0, 2, 1)
    figures = serving_report.figures_of(result_of(scenario, itls=[[], []]))
    assert (figures.itl_median, figures.itl_p99, figures.decode_throughput) == (None, None, None)


def test_report(tmp_path):
    scenario = Scenario("decode", 2049, 2048, 8, 72)
    comparison = Comparison.of(scenario, [SLOW], [FAST])
    lines = serving_report.table(comparison).splitlines()
    assert "batch 8" in lines[0] and "2048 of them cached" in lines[0]
    assert lines[2].split()[-3:] == ["10.00", "40.00", "4.00"]
    serving_report.write_json(tmp_path / "r.json", [comparison], {"rounds": 1})
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["settings"] == {"rounds": 1}
    assert written["results"][0]["ratios"]["ttft_median"] == 3.0
    assert written["results"][0]["scenario"]["cached"] == 2048


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    comparison = Comparison.of(Scenario("prefill", 40, 0, 1, 1), [Figures(None, 1, 2, 2, None, None)], [FAST])
    serving_report.write_plot(tmp_path / "r.png", [comparison])
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"

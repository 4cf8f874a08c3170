"""``sglang kvtuner version|sensitivity|search|evaluate``; also ``python -m sglang.srt.kvtuner.tuner``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from sglang.srt.kvtuner.config.flags import (
    DEFAULT_PAGE_SIZE,
    RECIPE_FLAGS,
    KVTunerConfig,
    KVTunerConfigError,
    add_recipe_arguments,
)
from sglang.srt.kvtuner.config.identity import identity

_EPILOG = "Server flags for loading the model (--device, --dtype, --mem-fraction-static ...) come last, after --."


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status: 0, 1 for input that cannot work, 130 when interrupted."""
    from sglang.srt.kvtuner.tuner.errors import TuningError

    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = _parser().parse_args(own)
    if options.command == "version":
        print(identity().describe())
        return 0
    # A terminated run says what it kept, as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(options, tuple(flags))
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with what is in {options.out}", file=sys.stderr)
        return 130
    except (TuningError, KVTunerConfigError) as error:
        print(f"sglang kvtuner {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang kvtuner", description="Find per-layer bits of the quantized KV cache for a model.", epilog=_EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("version", help="which build of this package runs")
    sensitivity = commands.add_parser("sensitivity", help="what pairs of bits cost in every layer", epilog=_EPILOG)
    _add_common(sensitivity)
    sensitivity.add_argument(
        "--only-recipe", action="store_true", help="leave out the other symmetries and axes than the ones given"
    )
    search = commands.add_parser("search", help="find mixes of bits over layers, as presets", epilog=_EPILOG)
    _add_common(search)
    search.add_argument("--max-bits", type=float, default=4.0, help="cap on average bits (default: %(default)s)")
    search.add_argument("--trials", type=int, default=100, help="different mixes to score (default: %(default)s)")
    search.add_argument("--groups", type=int, default=12, help="most groups of layers (default: %(default)s)")
    search.add_argument("--population", type=int, default=16, help="of NSGA-II (default: %(default)s)")
    search.add_argument("--starts", type=int, default=12, help="trials from the additive model (default: %(default)s)")
    search.add_argument("--seed", type=int, default=0)
    evaluate = commands.add_parser("evaluate", help="compare configurations on other text and tasks", epilog=_EPILOG)
    _add_common(evaluate)
    evaluate.add_argument(
        "--configs",
        nargs="+",
        required=True,
        help="unquantized, pairs (K8V4), presets (best.yaml); with another recipe: asym/K-channel/V-token/g64:K4V4",
    )
    evaluate.add_argument("--recall", type=int, default=0, metavar="ITEMS", help="serve each, ask for exact recall")
    evaluate.add_argument("--lm-eval", metavar="TASKS", help="serve each, run these lm-eval tasks")
    evaluate.add_argument("--limit", type=int, help="documents per lm-eval task")
    evaluate.add_argument("--include-path", metavar="DIR", help="folder with definitions of lm-eval tasks of your own")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="checkpoint folder or Hugging Face name")
    parser.add_argument("--out", type=Path, default=Path("kvtuner-run"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--text", default="builtin", help="builtin, a text file, or a data set NAME[:CONFIG[:SPLIT]] (default: builtin)"
    )
    parser.add_argument("--eval-text", help="text of the final evaluation (default: a part of --text of its own)")
    parser.add_argument(
        "--windows",
        type=int,
        nargs=3,
        default=(2, 4, 4),
        metavar=("CALIBRATION", "SEARCH", "FINAL"),
        help="windows of text for each (default: 2 4 4)",
    )
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a window per step (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=4, help="score every STRIDE-th position (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows per step (default: %(default)s)")
    parser.add_argument(
        "--page-size", type=int, default=DEFAULT_PAGE_SIZE, help="as the server's (default: %(default)s)"
    )
    # No window by default, so that short texts exercise the quantized cache.
    add_recipe_arguments(parser, residual_length=0)


def _interrupt(*unused) -> None:
    raise KeyboardInterrupt


def _run(options: argparse.Namespace, flags: tuple[str, ...]) -> None:
    from sglang.srt.kvtuner.tuner import evaluate as evaluation
    from sglang.srt.kvtuner.tuner import search as searching
    from sglang.srt.kvtuner.tuner import sensitivity
    from sglang.srt.kvtuner.tuner.errors import import_optional
    from sglang.srt.kvtuner.tuner.served import TaskSettings, run_tasks

    config = KVTunerConfig.from_args(options, RECIPE_FLAGS)
    if options.command == "sensitivity":
        import_optional("matplotlib")
        run = _open(options, config, flags)
        recipes = (config,) if options.only_recipe else sensitivity.all_recipes(run)
        sensitivity.measure(run, recipes)
    elif options.command == "search":
        import_optional("matplotlib")
        import_optional("optuna")
        settings = searching.SearchSettings(
            max_bits=options.max_bits,
            groups=options.groups,
            trials=options.trials,
            population=options.population,
            starts=options.starts,
            seed=options.seed,
        )
        run = _open(options, config, flags)
        searching.search(run, settings)
        print((options.out / "front.md").read_text(encoding="utf-8"))
        best = str(options.out / "best.yaml")
        rows = evaluation.evaluate(run, ["unquantized", "K8V8", "K8V4", "K4V4", best])
        print(evaluation.table(rows))
    else:
        tasks = None
        if options.recall or options.lm_eval:
            server = ("--chunked-prefill-size", str(options.chunk), *flags)
            tasks = TaskSettings(
                model=options.model_path,
                server=server,
                log=options.out / "server.log",
                recall=options.recall,
                lm_eval=options.lm_eval,
                limit=options.limit,
                include_path=options.include_path,
            )
        run = _open(options, config, flags)
        rows = evaluation.evaluate(run, options.configs, tasks and (lambda row: run_tasks(tasks, row)))
        print(evaluation.table(rows))


def _open(options: argparse.Namespace, config: KVTunerConfig, flags: tuple[str, ...]):
    from sglang.srt.kvtuner.tuner.engine import EngineSettings, TunerEngine
    from sglang.srt.kvtuner.tuner.errors import TuningError
    from sglang.srt.kvtuner.tuner.run import TuningRun
    from sglang.srt.kvtuner.tuner.text import read_source, split_text

    settings = EngineSettings(
        model=options.model_path,
        batch=options.batch,
        window=options.window,
        chunk=options.chunk,
        stride=options.stride,
        page_size=options.page_size,
        flags=flags,
    )
    if min(options.windows) < 1:
        given = " ".join(map(str, options.windows))
        raise TuningError(f"--windows is {given}; valid are three counts from 1 on")
    # Before the model, which takes longer to load.
    read_source("--text", options.text)
    if options.eval_text is not None:
        read_source("--eval-text", options.eval_text)
    engine = TunerEngine(settings)
    text = split_text(
        engine.tokenizer, options.text, options.eval_text, counts=tuple(options.windows), window=options.window
    )
    return TuningRun(engine, config, text, options.out)

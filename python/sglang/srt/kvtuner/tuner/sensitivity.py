"""The sensitivity of every layer: errors of its own attention output, and what they do to the model's output.

``measure`` fills the run's folder with sensitivity.json, sensitivity.md and sensitivity.png.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product

from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError
from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.tuner.attention_error import ErrorTable, measure_errors
from sglang.srt.kvtuner.tuner.outputs import text_table, write_json, write_text
from sglang.srt.kvtuner.tuner.pareto import pareto_front
from sglang.srt.kvtuner.tuner.plots import heat_map
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS, BEST_PAIR, FormatMaker, parse_pair, recipe_name
from sglang.srt.kvtuner.tuner.run import CALIBRATION, TuningRun

# Per layer: pair of bits to what it alone adds to the output's divergence, nats.
Damage = list[dict[LayerBits, float]]


def all_recipes(run: TuningRun) -> tuple[KVTunerConfig, ...]:
    """The run's recipe first, then every other symmetry and pair of axes with its group size that a server accepts for
    this model. The log names those that are left out, and why."""
    found = {run.config: None}
    for asym, key, value in product((False, True), (0, 1), (0, 1)):
        axes = dict(asym=asym, axis_key=key, axis_value=value)
        try:
            recipe = replace(run.config, **axes)
            FormatMaker(recipe, **run.shape)
        except KVTunerConfigError as error:
            run.say(f"sensitivity: recipe {recipe_name(run.config, **axes)} is left out, a server refuses it: {error}")
        else:
            found[recipe] = None
    return tuple(found)


def attention_errors(run: TuningRun, recipes: tuple[KVTunerConfig, ...]) -> ErrorTable:
    """Relative attention-output errors of the recipes, measured now or taken from the run's folder."""
    path = run.folder / "attention-errors.json"
    _ = run.journal  # refuses the folder of another run before anything in it is used or replaced
    known = _read_errors(path, recipes) if path.exists() else {}
    if missing := tuple(recipe for recipe in recipes if recipe not in known):
        run.say(f"sensitivity: attention-output errors of {len(missing)} recipes in {run.engine.num_layers} layers")
        known |= measure_errors(run.engine, run.text.calibration, missing)
        write_json(
            path,
            [
                {"recipe": asdict(recipe), "layers": [{str(p): e for p, e in layer.items()} for layer in layers]}
                for recipe, layers in known.items()
            ],
        )
    return {recipe: known[recipe] for recipe in recipes}


def _read_errors(path, recipes: tuple[KVTunerConfig, ...]) -> ErrorTable:
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {
        KVTunerConfig(**entry["recipe"]): [{parse_pair(n): e for n, e in layer.items()} for layer in entry["layers"]]
        for entry in stored
    }


def output_damage(run: TuningRun, fronts: list[tuple[LayerBits, ...]]) -> Damage:
    """What each pair of a layer's front adds to the output's divergence with K8V8 in all other layers.

    A forward pass over the calibration text per layer and pair, through the packed cache. Scores that the run's journal
    holds are not measured again.
    """
    layers = len(fronts)
    wanted = [(i, pair) for i, front in enumerate(fronts) for pair in front if pair != BEST_PAIR]
    base = (BEST_PAIR,) * layers
    mixes = {(i, pair): (*base[:i], pair, *base[i + 1 :]) for i, pair in wanted}
    found = run.score_all(CALIBRATION, [base, *mixes.values()], "sensitivity: output KL")
    damage: Damage = [{BEST_PAIR: 0.0} for _ in range(layers)]
    for (i, pair), mix in mixes.items():
        damage[i][pair] = max(found[mix].kl - found[base].kl, 0.0)
    return damage


def measure(run: TuningRun, recipes: tuple[KVTunerConfig, ...]) -> tuple[list[tuple[LayerBits, ...]], Damage]:
    """Measure everything for the run's recipe (the first of ``recipes``), the attention errors for all of them, and
    write table, JSON and heat map. Returns the run's recipe's fronts and damage.

    Raises KVTunerConfigError, before anything is measured, for a recipe that a server refuses.
    """
    _ = run.formats
    errors = attention_errors(run, recipes)
    heat_map(run.folder / "sensitivity.png", errors)
    fronts = [pareto_front(layer) for layer in errors[run.config]]
    _write(run, errors, fronts, None)
    damage = output_damage(run, fronts)
    _write(run, errors, fronts, damage)
    run.say(f"sensitivity: {run.folder}/sensitivity.md, .json, .png")
    return fronts, damage


def _write(run: TuningRun, errors: ErrorTable, fronts: list[tuple[LayerBits, ...]], damage: Damage | None) -> None:
    names = tuple(map(str, ALL_PAIRS))
    content = {
        "model": run.settings["model"],
        "recipe": recipe_name(run.config),
        "attention_output_error": {
            recipe_name(recipe): [{str(p): e for p, e in layer.items()} for layer in layers]
            for recipe, layers in errors.items()
        },
        "front": [list(map(str, front)) for front in fronts],
    }
    parts = []
    for recipe, layers in errors.items():
        rows = [(str(i), *(f"{layer[p]:.4f}" for p in ALL_PAIRS)) for i, layer in enumerate(layers)]
        means = [sum(layer[p] for layer in layers) / len(layers) for p in ALL_PAIRS]
        rows.append(("mean", *(f"{m:.4f}" for m in means)))
        title = f"## Relative error of the attention output, {recipe_name(recipe)}\n\n"
        parts.append(title + text_table(("layer", *names), rows))
    if damage is not None:
        content["output_kl"] = [{str(p): kl for p, kl in layer.items()} for layer in damage]
        rows = [
            (str(i), *(f"{layer[p]:.6f}" if p in layer else "" for p in ALL_PAIRS)) for i, layer in enumerate(damage)
        ]
        title = f"## KL that one layer's pair adds to the output (others K8V8), {recipe_name(run.config)}\n\n"
        parts.append(title + text_table(("layer", *names), rows))
    write_json(run.folder / "sensitivity.json", content)
    write_text(run.folder / "sensitivity.md", "\n".join(parts))

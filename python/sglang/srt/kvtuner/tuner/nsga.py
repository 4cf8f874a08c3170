"""Multi-objective search over the groups' choices with Optuna's NSGA-II.

Nothing of the sampler is stored: a run asks the same seeded sampler the same questions again, and scores that are
already known come from the journal. An interrupted run that is started again therefore asks for exactly what an
uninterrupted one would have. Source: KVTuner (arXiv 2502.04420), multi-objective search; NSGA-II: Deb et al. 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sglang.srt.kvtuner.tuner.errors import import_optional
from sglang.srt.kvtuner.tuner.pareto import Choice, LayerGroup, mix_of
from sglang.srt.kvtuner.tuner.recipe import average_bits

# Asking costs next to nothing, scoring seconds: choices over the cap and repeated ones are asked past.
_ASKS_PER_TRIAL = 50


def nsga_search(
    groups: tuple[LayerGroup, ...],
    starts: Iterable[Choice],
    score: Callable[[Choice], float],
    *,
    most_bits: float,
    trials: int,
    population: int,
    seed: int,
) -> list[Choice]:
    """Ask for choices until ``trials`` different ones within ``most_bits`` (average nominal bits) are scored, or no new
    ones turn up; returns them in that order.

    starts: choices scored first. score: the quality loss of a choice, lower is better; asked once per choice.
    """
    optuna = import_optional("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
    )
    for choice in starts:
        study.enqueue_trial({f"group {g}": index for g, index in enumerate(choice)})
    losses: dict[Choice, float] = {}
    for _ in range(_ASKS_PER_TRIAL * trials):
        if len(losses) >= trials:
            break
        trial = study.ask()
        choice = tuple(trial.suggest_int(f"group {g}", 0, len(group.front) - 1) for g, group in enumerate(groups))
        bits = average_bits(mix_of(groups, choice))
        if bits > most_bits + 1e-9:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        if choice not in losses:
            losses[choice] = score(choice)
        study.tell(trial, [bits, losses[choice]])
    return list(losses)

"""The comments at the top of a preset that the tuner wrote, and what they tell a server that loads it.

A header is lines ``# name: value`` before the first layer; KVTuner's own presets have none, which is fine.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from sglang.srt.kvtuner.config.flags import DEFAULT_PAGE_SIZE, KVTunerConfig, flag_of
from sglang.srt.kvtuner.config.preset_file import read_text

logger = logging.getLogger(__name__)


def format_header(fields: dict[str, str]) -> str:
    """Comment lines of the fields, in their order."""
    return "".join(f"# {name}: {' '.join(str(value).split())}\n" for name, value in fields.items())


def read_header(path: str) -> dict[str, str]:
    """The fields of a preset's header; empty without one. Raises PresetError for a file that cannot be read."""
    fields = {}
    for line in read_text(path).split("\n"):
        if not line.startswith("#"):
            break
        name, colon, value = line[1:].partition(":")
        if colon:
            fields[name.strip()] = value.strip()
    return fields


def model_name(model_path: str) -> str:
    """The model's own name in a path or a Hugging Face name: ``org/Name``, ``/checkpoints/Name`` and a cached snapshot
    of it are one model, ``Name``."""
    parts = Path(model_path).parts
    for part in parts:
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return parts[-1] if parts else model_path


def recipe_flags(config: KVTunerConfig) -> str:
    """The flags that say how codes are made, which a preset's bits were tuned for."""
    given = ["asym", "axis_key", "axis_value", "group_size"]
    # Presets that were written before these flags existed have none of them.
    given += [name for name in ("hadamard_key", "sink_length") if getattr(config, name)]
    return " ".join(f"{flag_of(name).name} {str(getattr(config, name)).lower()}" for name in given)


def preset_recipe(config: KVTunerConfig, page_size: int) -> str:
    """:func:`recipe_flags` without rotation and sinks, which a preset's layers say themselves, and with the page size
    where it is not the default."""
    recipe = recipe_flags(replace(config, hadamard_key=False, sink_length=0))
    return recipe if page_size == DEFAULT_PAGE_SIZE else f"{recipe} --page-size {page_size}"


def warn_of_mismatch(config: KVTunerConfig, model_path: str, page_size: int) -> None:
    """Log a warning when the header of the preset in use names another model, other recipe flags or another page size."""
    path, recipe = config.preset, preset_recipe(config, page_size)
    if path is None:
        return
    header = read_header(path)
    tuned_for = header.get("model", model_path)
    if model_name(tuned_for).lower() != model_name(model_path).lower():
        logger.warning(
            "--kvtuner-config %s was tuned for the model %.200s, this server has %s: its bits suit that other model",
            path, tuned_for, model_path,
        )  # fmt: skip
    if header.get("recipe", recipe) != recipe:
        logger.warning(
            "--kvtuner-config %s was tuned with %.500s, this server has %s: its quality figures do not hold here",
            path, header["recipe"], recipe,
        )  # fmt: skip

"""Checkpoints for tests, made on first use and kept in .cache/models."""

import hashlib
from dataclasses import astuple
from pathlib import Path

import make_random_llama
import make_smollm2

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "models"


def smollm2():
    """Folder of SmolLM2-135M-Instruct: a real model of 30 layers, 9 heads, 3 KV heads, head_dim 64."""
    return make_smollm2.make(say=_quiet)


def random_llama(**shape):
    """Folder of a small Llama with random weights; see ``make_random_llama.Shape`` for the options."""
    wanted = make_random_llama.Shape(**shape)
    key = hashlib.sha256(repr(astuple(wanted)).encode()).hexdigest()[:12]
    return make_random_llama.make(MODELS / f"random-llama-{key}", wanted, say=_quiet)


def _quiet(line):
    """Progress lines would only be noise in a test's output."""

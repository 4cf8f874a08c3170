"""Processes for tests that need one of their own, forked from one that has imported what they need.

That one is spawned, for a process that has used threads must not fork. There is one for every core, and tests of a module start
together: what they wait for has one thread.
"""

import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from unittest import mock

import launcher
from harness.chosen import chosen_tests

LIMIT_SECONDS = 300  # for a process that hangs; what runs in one takes seconds


@contextmanager
def forked_processes(module, changes):
    """Yields a function that calls another one, with arguments, in a process of its own, and returns a Future of what it does.

    module: what to import beforehand, by name. changes: of the environment, from before anything is imported.
    """
    spawn = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as temporary:  # upstream leaves files behind
        changes = {"OMP_NUM_THREADS": "1", "SGLANG_CPU_OMP_THREADS_BIND": None, "TMPDIR": temporary, **changes}
        environment = launcher.server_environment(("--device", "cpu"), extra=changes)
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            ProcessPoolExecutor(os.cpu_count(), spawn, _load, (module,)) as pool,
        ):
            yield lambda function, *args: pool.submit(_fork, function, *args)


def start_all(request, start, runs_of):
    """Start what the chosen tests of a module will wait for; returns Futures by the name of the test.

    request: of a module's fixture. start: takes the arguments of a run and returns a Future. runs_of: takes a test (pytest.Item)
    and returns the arguments of its runs.
    """
    return {test.name: [start(*run) for run in runs_of(test)] for test in chosen_tests(request)}


def _load(module):
    """Import what every process needs, which takes far longer than what it does then: a fork has it at once."""
    logging.disable(logging.WARNING)  # upstream names the models that it cannot load
    importlib.import_module(module)
    importlib.import_module("sglang.srt.models.registry")
    gc.collect()
    gc.freeze()  # upstream collects garbage often


def _fork(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_run, function, *args).result()


def _run(function, *args):
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    return function(*args)

"""The package's server launcher, loaded from its file alone: importing the package takes seconds and loads torch."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NAME = "sglang.srt.kvtuner.tuner.server_process"


def _load():
    # Under its own name, so that what imports the package later gets this same module.
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, ROOT / "python" / f"{_NAME.replace('.', '/')}.py")
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_NAME])
    return sys.modules[_NAME]


_module = _load()
HOST, Server, ServerError = _module.HOST, _module.Server, _module.ServerError
server_environment = _module.server_environment

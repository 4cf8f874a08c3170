#!/usr/bin/env python3
"""Start a composed tree once: resolve the arguments of a tiny model, then serve it on the CPU and ask it for tokens.

`fork.py rebase` runs this with the interpreter whose environment is meant to carry the release. Exit status 0: it started; 1: it did
not; 3: the environment lacks what the release requires, so nothing was tried.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STARTED, FAILED, LACKING = 0, 1, 3
FLAGS = (
    *("--device", "cpu", "--enable-kvtuner-quant", "--page-size", "16", "--kvtuner-q-group-size", "16"),
    *("--max-total-tokens", "512", "--max-running-requests", "2", "--kvtuner-residual-length", "16"),
    *("--skip-server-warmup", "--log-level", "error"),
)
PROMPT = list(range(300, 350))
ANSWER = 8
RESOLVE = """
import sys
from sglang.srt.server_args import prepare_server_args
arguments = prepare_server_args(sys.argv[1:])
arguments.resolve_once()
print(f"resolved: {len(arguments.resolved_dict())} arguments")
"""


def lacking(tree):
    """What the tree's metadata requires and this interpreter's environment has not, as text."""
    from packaging.requirements import Requirement

    (info,) = tree.glob("*.dist-info")
    metadata = importlib.metadata.PathDistribution(info)
    found = []
    for text in metadata.requires or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement.name}{requirement.specifier} (here: none)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier} (here: {version})")
    return found


def resolve(model, environment):
    """Resolve the arguments of a server in a process of its own; returns whether that went well."""
    command = [sys.executable, "-c", RESOLVE, "--model-path", str(model), *FLAGS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    print((result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()[-1])
    if result.returncode:
        print(result.stderr[-4000:])
    return result.returncode == 0


def serve(model, environment, folder):
    """Serve the model and ask for tokens; returns whether they came and the cache was the quantized one."""
    from launcher import Server, ServerError

    try:
        with Server(model, FLAGS, log_path=folder / "server.log", env=environment) as server:
            server.wait_until_healthy(300)
            sampling = {"max_new_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
            answer = server.request("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
            states = server.request("/server_info")["internal_states"]
    except ServerError as error:
        print(f"the server did not serve: {error}")
        return False
    tokens, cache = answer["meta_info"]["completion_tokens"], states[0].get("kvtuner", {})
    print(f"served: {tokens} tokens from a cache of {cache.get('stored_bits', 0):.3g} bits per element")
    return tokens == ANSWER and 0 < cache.get("stored_bits", 0) < 16


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, metavar="TREE", help="folder with the composed package and its metadata")
    tree = parser.parse_args(arguments).tree.resolve()
    if missing := lacking(tree):
        print(f"this environment lacks {', '.join(missing)}")
        return LACKING
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_random_llama

    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        shape = make_random_llama.Shape(layers=2, heads=2, kv_heads=1, head_dim=64, hidden=64, intermediate=128)
        model = make_random_llama.make(Path(folder, "model"), shape, say=lambda line: None)
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        done = resolve(model, environment) and serve(model, environment, Path(folder))
    return STARTED if done else FAILED


if __name__ == "__main__":
    sys.exit(main())

"""A small synthetic fork to build, break and look at."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.tags import sys_tags

from backend import fetch, identity
from backend.pin import ROOT, Pin

TAG = next(tag for tag in sys_tags() if tag.platform.startswith("manylinux"))

METADATA = (
    "Metadata-Version: 2.4\nName: sglang\nVersion: 1.2.3\nSummary: says hello\n"
    "License: Some text\n        \n        License: more of it\n"
    "Project-URL: Bug Tracker, https://upstream.example/issues\n"
    "Classifier: License :: OSI Approved :: Apache Software License\nClassifier: Topic :: Greetings\n"
    "License-File: LICENSE\n\nVersion: 1.2.3\n"
)
UPSTREAM = {
    "sglang/__init__.py": '"""A package."""\n',
    "sglang/greet.py": '"""Greetings."""\n\n\ndef greet(name):\n    text = "hello " + name\n    return text\n',
    "sglang/data.json": "{}\n",
    "sglang/run.sh": "#!/bin/sh\n",
    "sglang-1.2.3.dist-info/METADATA": METADATA,
    "sglang-1.2.3.dist-info/entry_points.txt": "[console_scripts]\nsglang = sglang.greet:greet\n",
    "sglang-1.2.3.dist-info/licenses/LICENSE": "theirs\n",
}

EDIT = {
    "id": "louder",
    "scope": "greet",
    "where": "after",
    "anchor": "text = 'hello ' + name",
    "code": "text = text.upper()",
    "why": "to be heard",
    "upstream": "none: a test",
    "drop_when": "upstream shouts",
}


START = """import sys
sys.path.insert(0, sys.argv[1])
from sglang.greet import greet
print("started:", greet("you"))
"""


class Fork:
    """A repository like ours with a one-edit, one-file fork of a tiny upstream; `run` calls its own backend."""

    def __init__(self, root: Path):
        self.root = root
        upstream = root / "python" / "upstream"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "python/upstream/backend", upstream / "backend", ignore=ignored)
        for name in ("python/upstream/fork.py", "python/upstream/own.toml", "pyproject.toml", "LICENSE"):
            shutil.copyfile(ROOT / name, root / name)
        self.write("python/upstream/start.py", START)
        self.write("python/sglang/srt/ours.py", "NAME = 'ours'\n")
        self.wheel = self.make_wheel(UPSTREAM)
        self.edit(EDIT)
        assert self.verb("record").returncode == 0

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def edit(self, *tables: dict, file: str = "greet.py") -> Path:
        """Write the edits of one upstream file; JSON's strings are TOML's too."""
        text = "".join("[[edit]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items()) + "\n" for t in tables)
        return self.write(f"python/upstream/edits/{file}.toml", text)

    def make_wheel(self, files: dict[str, str], version: str = "1.2.3") -> Path:
        """Write an upstream wheel of these files, which are of version 1.2.3, for the running interpreter; pin version 1.2.3."""
        name = f"sglang-{version}-{TAG}.whl"
        path = self.root.parent / f"{self.root.name}-upstream" / name
        path.parent.mkdir(exist_ok=True)
        text = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {TAG}\n"
        with zipfile.ZipFile(path, "w") as archive:
            made = {"sglang-1.2.3.dist-info/WHEEL": text, "sglang-1.2.3.dist-info/RECORD": "stale\n"}
            for entry, content in {**files, **made}.items():
                info = zipfile.ZipInfo(entry.replace("-1.2.3.", f"-{version}."))
                info.external_attr = (0o755 if entry.endswith(".sh") else 0o600) << 16
                archive.writestr(info, content.replace("Version: 1.2.3\n", f"Version: {version}\n"))
        if version == "1.2.3":
            Pin(version, "kvtuner.1", {name: fetch.digest(path)}).save(self.root)
        return path

    @property
    def version(self) -> str:
        """The version of a wheel that is built now."""
        return identity.version(Pin.load(self.root), self.root)

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", fetch.WHEEL: str(self.wheel)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.root, env=environment | variables, capture_output=True, text=True)

    def verb(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run fork.py."""
        return self.python("python/upstream/fork.py", *arguments, **variables)

    def hook(self, name: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
        """Run a build hook that writes into `folder`."""
        folder.mkdir(exist_ok=True)
        path = "import sys; sys.path.insert(0, 'python/upstream')"
        return self.python("-c", f"{path}; from backend import hooks; hooks.{name}({str(folder)!r})", **variables)

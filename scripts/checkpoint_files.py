"""What the scripts that make checkpoints share: folders that appear complete or not at all, and JSON files."""

import json
import shutil
import tempfile
from pathlib import Path

MARK = "made-by.json"


def make_folder(output, mark, build, say=print):
    """Have ``build(folder)`` fill the folder ``output``, unless it is there already, and return its path.

    The files are written beside the final place and renamed into it, so a folder of that name is always complete.

    Args:
        output: the folder to make.
        mark: a JSON value that tells what the folder is made from. One made earlier with an equal mark is left as it
            is, one with another mark is replaced.
        build: called with an empty folder to fill.
        say: gets progress lines.

    Raises:
        FileExistsError: ``output`` exists and was not made this way.
    """
    output = Path(output).resolve()
    if is_complete(output, mark):
        say(f"{output} is complete")
        return output
    if output.exists() and not (output / MARK).exists():
        raise FileExistsError(f"{output} exists and was not made by this script; name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        build(partial)
        write_json(partial / MARK, mark)
        partial.chmod(0o755)
        if output.exists() and not is_complete(output, mark):
            shutil.rmtree(output)
        try:
            partial.rename(output)
        except OSError:
            # Another process may have made the same folder meanwhile.
            if not is_complete(output, mark):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"made {output}")
    return output


def is_complete(folder, mark):
    """Whether a folder was made with this mark."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8")) == mark
    except (OSError, ValueError):
        return False


def write_json(path, value):
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

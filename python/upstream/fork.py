#!/usr/bin/env python3
"""The maintainer's commands for the composed fork; docs/upstream.md explains them."""

from __future__ import annotations

import argparse
import signal
import sys

from backend import commands, rebase, tables


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fork.py", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("compose", help="write the composed tree, as the wheel would hold it, into a new folder")
    verb.add_argument("folder", metavar="DIR", help="the folder; it must not exist or be empty")
    verb.set_defaults(run=lambda options: commands.compose(options.folder))

    verb = verbs.add_parser("wheels", help="write the wheel of every interpreter and machine that is pinned")
    verb.add_argument("folder", nargs="?", default="dist", metavar="DIR", help="the folder (default: %(default)s)")
    verb.set_defaults(run=lambda options: commands.wheels(options.folder))

    verb = verbs.add_parser("diff", help="show what the edits change, and list the own files")
    verb.set_defaults(run=lambda options: commands.diff())

    verb = verbs.add_parser(
        "check", help="try edits and premises on the pinned release; exit 1 on a review or conflict"
    )
    verb.set_defaults(run=lambda options: commands.check())

    verb = verbs.add_parser("record", help="accept what is new in this repository, and reviews by id")
    verb.add_argument(
        "ids", metavar="ID", nargs="*", help="an edit or a premise as check names it; * stands for anything"
    )
    verb.set_defaults(run=lambda options: commands.record(options.ids))

    verb = verbs.add_parser("rebase", help="try another release and start it; exit 1 on a review or conflict")
    verb.add_argument("version", metavar="VERSION", help="the upstream release, such as 0.5.24")
    verb.add_argument("--write", action="store_true", help="without a conflict, and if it starts, move the pin there")
    verb.add_argument("--python", default=sys.executable, help="interpreter that starts it (default: this one)")
    verb.set_defaults(run=lambda options: rebase.rebase(options.version, options.write, options.python))

    verb = verbs.add_parser("releases", help="list upstream's releases above the pinned one")
    verb.set_defaults(run=lambda options: commands.newer_releases())

    verb = verbs.add_parser("tables", help="write the tables of docs/rebasing.md")
    verb.add_argument(
        "versions", metavar="VERSION", nargs="*", help="older releases, beside every newer one of the index"
    )
    verb.set_defaults(run=lambda options: tables.write(options.versions))

    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fork.py diff | head` ends quietly
    sys.exit(main())

"""``python -m dl_norm COMMAND``."""

from __future__ import annotations

import argparse
import sys

from ._version import __version__
from .diagnose import cli as diagnose


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dl_norm")
    parser.add_argument("--version", action="version", version=f"dl-norm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("diagnose", help="what each aggregation does to your lengths")
    diagnose.add_arguments(command)
    command.set_defaults(run=diagnose.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())

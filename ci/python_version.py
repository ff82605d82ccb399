"""Says what to do, and exits 1, where this Python is too old for dl-norm or what its extras need.

    python ci/python_version.py EXTRAS

EXTRAS are names of pyproject.toml's optional dependencies with commas between them. This runs
before there is an environment: on any Python 3.6, with the standard library alone.
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def minima(text, extras):
    """(who, its least Python) of the package and of everything with a marker in the extras."""
    yield "dl-norm", re.search(r'^requires-python = ">=([\d.]+)"', text, re.M).group(1)
    for extra in extras:
        found = re.search(rf"^{re.escape(extra)} = (\[.*\])$", text, re.M)
        if found is None:
            continue  # ci/missing.py says so
        requirements = found.group(1)
        yield from re.findall(r"\"([^\";]+?) *; *python_version *>= *'([\d.]+)'\"", requirements)
        for inner in re.findall(r"\"dl-norm\[([^]]*)\]", requirements):
            yield from minima(text, inner.split(","))


def main(extras):
    """Ask every one of them."""
    for who, least in minima(PYPROJECT.read_text(encoding="utf-8"), extras.split(",")):
        if sys.version_info < tuple(map(int, least.split("."))):
            version = ".".join(map(str, sys.version_info[:3]))
            sys.exit(
                f"env: {who} needs Python >= {least}, and {sys.executable} is {version}. "
                "Name a newer one and run again: PYTHON=python3.12 bash ci/..."
            )


if __name__ == "__main__":
    main(sys.argv[1])

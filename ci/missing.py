"""Prints the requirements that this environment does not meet, one a line.

    python ci/missing.py EXTRAS [REQUIREMENT ...]

EXTRAS are names of pyproject.toml's optional dependencies with commas between them. "dl-norm" is
printed when this working tree is not what is installed under that name.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

# pip brings these two along; an environment has pip before it has anything else.
from pip._vendor.packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements(project: dict, extras: list[str]) -> list[Requirement]:
    """The dependencies of the project and of the extras, those of extras within extras included."""
    optional = project.get("optional-dependencies", {})
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise ValueError(
            f"pyproject.toml has no extra {', '.join(unknown)}; it has {list(optional)}"
        )
    found = [Requirement(text) for text in project.get("dependencies", [])]
    for extra in extras:
        for requirement in map(Requirement, optional[extra]):
            if requirement.name == project["name"]:
                found += requirements(project, sorted(requirement.extras))
            else:
                found.append(requirement)
    return found


def is_met(requirement: Requirement) -> bool:
    """Whether the requirement does not apply here, or a version that fits is installed."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def is_installed_from(name: str, root: Path) -> bool:
    """Whether the package ``name`` is installed from the folder ``root``."""
    try:
        origin = distribution(name).read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return origin is not None and json.loads(origin).get("url") == root.as_uri()


def main(extras: str, *more: str) -> None:
    """Print what is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = requirements(project, [name for name in extras.split(",") if name])
    wanted += [Requirement(text) for text in more]
    missing = {str(requirement): None for requirement in wanted if not is_met(requirement)}
    if not is_installed_from(project["name"], ROOT):
        missing[project["name"]] = None
    print("\n".join(missing))


if __name__ == "__main__":
    main(*sys.argv[1:])

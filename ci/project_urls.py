"""Puts the repository's address into what a package index shows, before a release is built.

    python ci/project_urls.py https://github.com/OWNER/NAME v0.2.0 [FOLDER]

In place: links of README.md to files, which break outside the repository, and the project's URLs in
pyproject.toml. The release workflow knows the address; nothing else needs it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def absolute(text: str, address: str, tag: str) -> str:
    """``text`` with its relative links as addresses of the files at ``tag``."""
    return LINK.sub(rf"]({address}/blob/{tag}/\1)", text)


def with_urls(pyproject: str, address: str, tag: str) -> str:
    """``pyproject`` with the addresses of repository, issues and changes."""
    urls = {
        "Repository": address,
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Documentation": f"{address}/blob/{tag}/README.md",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    changed, found = re.subn(r"(?m)^\[project\.urls\]\n", rf"\g<0>{lines}", pyproject)
    if found != 1:
        raise ValueError(f"pyproject.toml must have one [project.urls], found {found}")
    return changed


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("address", help="https://github.com/OWNER/NAME")
    parser.add_argument("tag")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    given = parser.parse_args()
    address = given.address.rstrip("/")
    if not address.startswith("https://"):
        parser.error(f"the address must begin with https://, got {address}")
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = given.folder / name
        path.write_text(change(path.read_text(encoding="utf-8"), address, given.tag), "utf-8")


if __name__ == "__main__":
    main()

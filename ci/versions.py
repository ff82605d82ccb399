"""What `ci/versions.sh` makes of the reports of pytest: rows, and a table of them.

python ci/versions.py row REPORT.xml              one line of JSON, with this environment's releases
python ci/versions.py table ROWS [--save FOLDER]  a table; and FOLDER/versions-DATE.json, in which
                                                  a row takes the place of one of its releases
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "transformers", "trl")
RELEASES = ("python", *PACKAGES)
COLUMNS = ("torch", "triton", "python", "passed", "failed", "skipped", "seconds")


def row(report: Path) -> dict[str, object]:
    """Counts of a JUnit report; what was expected to fail and did counts as skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{report} is no report of pytest: it has no <testsuite>")
    broken = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return {
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "passed": int(suite.get("tests", 0)) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(float(suite.get("time", 0))),
        "failures": broken,
    }


def installed(name: str) -> str | None:
    """The release of a package here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown, and below them the tests that failed."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(str(one[name]) for name in COLUMNS)} |" for one in rows]
    lines += [f"torch {one['torch']}: {name}" for one in rows for name in one["failures"]]
    return "\n".join(lines)


def save(rows: list[dict[str, object]], folder: Path) -> Path:
    """Write today's file, over the rows of the same releases that it has."""
    path = folder / f"versions-{datetime.date.today().isoformat()}.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {tuple(one[name] for name in RELEASES) for one in rows}
    kept = [one for one in earlier if tuple(one[name] for name in RELEASES) not in new]
    data = {"command": "bash ci/versions.sh", "rows": kept + rows}
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["row", "table"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    if given.what == "row":
        print(json.dumps(row(given.file)))
        return
    rows = [json.loads(line) for line in given.file.read_text().splitlines()]
    print(table(rows))
    if given.save:
        print(save(rows, given.save))


if __name__ == "__main__":
    main()

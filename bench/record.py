"""What every file of results begins with, and where it lies."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import peers

RESULTS = Path(__file__).parent / "results"


def origin(device: torch.device, command: str) -> dict[str, Any]:
    """Where, when and with what a run was made."""
    name, versions = describe(device)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"device": name, "date": date, "command": command, "versions": versions}


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", module, *given])


def save(report: dict[str, Any], name: str, folder: Path, indent: int | None = 1) -> Path:
    """Writes DEVICE-NAME-DATE.json into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = folder / f"{slug}-{re.sub(r'[_.]', '-', name)}-{report['date'][:10]}.json"
    path.write_text(json.dumps(report, indent=indent) + "\n")
    return path


def describe(device: torch.device) -> tuple[str, dict[str, str]]:
    """The device's name, and the versions of everything that a number may depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "not installed"
    versions |= peers.versions()
    if device.type == "cuda":
        versions["driver"] = _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        versions["cuda"] = str(torch.version.cuda)
        return torch.cuda.get_device_name(device), versions
    versions["threads"] = str(torch.get_num_threads())
    return _cpu_name(), versions


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} CPU {torch.get_num_threads()} threads"

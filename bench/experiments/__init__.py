"""The paper's claims, measured at a size that a laptop can repeat: see REPORT.md."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"  # committed: what REPORT.md shows
RAW = Path("out/experiments")  # not committed: unfinished runs, per-sequence gradients, models

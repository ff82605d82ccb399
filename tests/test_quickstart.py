"""The quickstart's pure parts; the whole of it is run by `bash ci/quickstart.sh`."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    """A module of ci/, which is no package, by its path."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / "ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    return load("quickstart_report")


@pytest.fixture(scope="module")
def missing():
    pytest.importorskip("pip")
    return load("missing")


LENGTHS = torch.tensor([10, 100, 1000])
# (weights, E / grad J, Var / V, CV): values of the closed forms for these lengths, M = 1.
INVERSE = 1 / LENGTHS.double()
STATISTICS = {
    "grpo": (INVERSE / 3, 0.037, 0.012333333333333333, 3.0015011259383213),
    "dapo": (
        torch.full((3,), 1 / 1110, dtype=torch.float64),
        0.002702702702702703,
        9.009009009009009e-4,
        11.105554165971787,
    ),
    "dr_grpo": (
        torch.full((3,), 1 / 3, dtype=torch.float64),
        1.0,
        123.33333333333331,
        11.105554165971787,
    ),
    "delta_l": (INVERSE / INVERSE.sum(), 1.0, 9.009009009009008, 3.0015011259383213),
}


@pytest.mark.parametrize("method", STATISTICS)
def test_aggregation_statistics(report, method):
    weights, expectation, variance, cv = STATISTICS[method]
    found = report.aggregation_statistics(weights, LENGTHS)
    # Float64 sums of three terms: a few roundings of 1.1e-16 each.
    assert found.expectation == pytest.approx(expectation, rel=1e-14)
    assert found.variance == pytest.approx(variance, rel=1e-14)
    assert found.cv == pytest.approx(cv, rel=1e-14)


@pytest.mark.parametrize(
    ("alpha", "variance"),
    [(0.0, 123.33333333333331), (0.5, 14.957363398172792), (0.75, 9.681814370939643)],
)
def test_statistics_of_the_packages_weights(report, alpha, variance):
    weights = report.method_weights(LENGTHS, max_length=3072, alpha=alpha)["DeltaL"]
    found = report.aggregation_statistics(weights, LENGTHS)
    # The weights are float32: 2^-24 = 6e-8 each, twice that in the squares.
    assert found.expectation * 3072 == pytest.approx(1.0, rel=3e-7)
    assert found.variance * 3072**2 == pytest.approx(variance, rel=3e-7)
    assert found.cv == pytest.approx(math.sqrt(variance), rel=3e-7)


def test_aggregation_table_lists_the_four_methods(report):
    weights = report.method_weights(LENGTHS, max_length=3072, alpha=1.0)
    table = report.aggregation_table(weights, LENGTHS, 3072)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["DeltaL", "GRPO", "DAPO", "Dr. GRPO"]
    assert columns[2] == ["1.0000", "113.6640", "8.3027", "1.0000"]  # M times .037 and 3/1110
    assert columns[4] == ["1.00 x", "1.00 x", "3.70 x", "3.70 x"]  # 11.10555 / 3.00150


def test_figure_is_written(report, tmp_path):
    lengths = torch.tensor([7, 64, 512, 3072])
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5])
    path = tmp_path / "new folder" / "aggregation.png"
    report.save_figure(path, lengths, advantages, report.method_weights(lengths, 3072, 0.75), 3072)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_follows_extras_within_extras_and_versions(missing):
    project = {
        "name": "dl-norm",
        "dependencies": ["torch>=2"],
        "optional-dependencies": {
            "a": ["dl-norm[b]", "no-such-package-xyz"],
            "b": ["torch>=9999", "no-such-on-windows-xyz; sys_platform == 'win32'"],
        },
    }
    found = missing.requirements(project, ["a"])
    assert [requirement.name for requirement in found] == [
        "torch",
        "torch",
        "torch",
        "no-such-on-windows-xyz",
        "no-such-package-xyz",
    ]
    unmet = {str(requirement) for requirement in found if not missing.is_met(requirement)}
    expected = {"torch>=9999", "no-such-package-xyz"}
    if sys.platform == "win32":
        expected.add('no-such-on-windows-xyz; sys_platform == "win32"')
    assert unmet == expected
    with pytest.raises(ValueError, match="no extra c; it has"):
        missing.requirements(project, ["c"])

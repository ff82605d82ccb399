"""What the kernels may move and execute, held to budgets; predictions from such counts."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from rich.console import Console
from triton.runtime.driver import driver

import dl_norm
from bench import predict, record, table, traffic
from bench.cases import Case
from bench.contest import OURS
from bench.heads import HeadCase
from bench.kept import KeptCase
from bench.predict import Machine, Work
from bench.roofline import Ceilings
from bench.traffic import BF16, METRICS, Entry, Row
from dl_norm import Reject, RolloutCorrection

compiled = pytest.mark.skipif(
    os.environ.get("DL_NORM_TEST_TARGET", "").partition(",")[0] != "sm_90",
    reason="counted with DL_NORM_TEST_TARGET=sm_90",
)

DENSE = Case("64x1024 100%", 64, 1024)
FILLED = Case("16x8192 40%", 16, 8192, 0.4)
PACKED = Case("packed 16x8192", 16, 8192, 0.4, True)
LOGITS = HeadCase("2x151936", "logits", 1, 2, traffic.V)
LOG_PROBS = HeadCase("2x151936", "token_log_probs", 1, 2, traffic.V)
# By the model of its bytes 68,160 a token: the head's gradient, 32,768 of them, is written.
KEPT = KeptCase("128x1024x2048", 1, 128, 2048, 1024)
# For sm_90, per position, logit or token: bytes moved, instructions, special functions; barriers
# of a program. What is measured, rounded up. Make a kernel cheaper, lower its line.
BUDGETS = [
    (Entry("log_probs", DENSE, ()), OURS, (13.02, 38.7, 1.01, 2)),
    (Entry("log_probs", DENSE, ()), METRICS, (13.1, 78.5, 1.01, 8)),
    (Entry("log_probs", DENSE, (), upstream=0.5), OURS, (21.02, 43.5, 1.01, 2)),
    (Entry("log_probs", DENSE, (), BF16), OURS, (7.02, 40, 1.01, 2)),
    (Entry("log_probs", DENSE, (), BF16), METRICS, (7.1, 79.7, 1.01, 8)),
    (Entry("log_probs", FILLED, ()), OURS, (8.22, 38.6, 1.01, 2)),
    (Entry("log_probs", FILLED, (), BF16), OURS, (4.62, 39.9, 1.01, 2)),
    (Entry("log_probs", PACKED, ()), OURS, (12.02, 45.2, 1.02, 2)),
    (Entry("logits", LOGITS, (), BF16, clipped=False), OURS, (4.01, 12.9, 2.05, 7)),
    (Entry("token_log_probs", LOG_PROBS, (), BF16), OURS, (2.01, 6.2, 1.02, 5)),
    (Entry("kept", KEPT, (), BF16), OURS, (72_700, 477_000, 141, 3.2)),
]


@compiled
@pytest.mark.parametrize(
    ("entry", "contestant", "budget"), BUDGETS, ids=[f"{e.name}, {c}" for e, c, _ in BUDGETS]
)
def test_budgets(entry: Entry, contestant: str, budget: tuple[float, ...]):
    row = traffic.count(entry, contestant, traffic.make_inputs(entry))
    assert row.refused is None
    found = (
        row.total("bytes") / row.units,
        32 * row.total("instructions") / row.units,
        32 * row.total("special") / row.units,
        row.barriers,
    )
    assert row.floor <= row.total("bytes") * 1.001  # else the model of the floor is wrong
    assert all(f <= b for f, b in zip(found, budget, strict=True)), f"{found}, allowed {budget}"


@compiled
def test_operations_of_pytorch_count_with_their_operands():
    operations = traffic.Operations()
    with operations:
        x = torch.empty(10).fill_(2.0)
        y = x[:5].expand(3, 5) * torch.ones(3, 5)
        (y.t() @ torch.ones(3, 7)).sum()
    found = [(work.name, work.bytes, work.flops) for work in operations.work]
    assert found == [
        ("fill_", 40, 0), ("ones", 60, 0), ("mul", 20 + 60 + 60, 0), ("ones", 84, 0),
        ("mm", 0, 2 * 5 * 3 * 7), ("sum", 35 * 4 + 4, 0),
    ]  # fmt: skip


MACHINE = Machine("a round one", bytes=1e9, instructions=1e6, special=1e5, flops=1e12, launch=1.0)


def row(suite: str = "logits", contestant: str = OURS, **changes: Any) -> Row:
    work = [Work("kernel", bytes=2 * 10**9, instructions=10**6, special=3 * 10**5), Work("add", 10)]
    work.append(Work("mm", flops=10**12))
    given = {"stands_for": {"big": (10.0, 4.0)}, "work": work, **changes}
    return Row("small", suite, contestant, "logit", units=1, floor=1, **given)


def test_a_launch_takes_the_longest_of_what_it_needs():
    """Three launches of a second; 10 times 3 s of special functions, which is more than 10 times
    2 s of bytes; 4 times 1 s of products."""
    found = predict.predict(row(), "big", MACHINE)
    assert found.seconds == pytest.approx(3 + 30 + 4, rel=1e-6)
    assert found.bound == "special"


def test_rates_of_the_h100():
    assert predict.H100.instructions == pytest.approx(132 * 4 * 1.755e9)
    assert predict.H100.special == pytest.approx(132 * 16 / 32 * 1.755e9)


def test_the_committed_counts_are_shown():
    (path,) = sorted(record.RESULTS.glob("sm-90-ptx-traffic-*.json"))[-1:]
    report, rows = traffic.load(path)
    console = Console(width=200, record=True)
    traffic.show(report, rows, console)
    text = console.export_text()
    assert "Predicted, not measured: H100" in text and "not here" not in text
    assert {row.entry for row in rows} == {entry.name for entry in traffic.ENTRIES}


def test_predictions_are_put_beside_what_a_gpu_measures(tmp_path):
    """Of the same cases and contestants, at the ceilings of that run."""
    ceilings = Ceilings(predict.H100.bytes, predict.H100.flops, "bfloat16")
    for suite in ("log_probs", "logits", "token_log_probs", "linear"):
        cases = {case.name for case in table.SUITES[suite].cases(torch.device("cuda"))}
        names = {contestant.name for contestant in table.SUITES[suite].contestants}
        found = predict.for_table(suite, ceilings)
        assert {case for case, _ in found} == cases
        assert {name for _, name in found} <= names
    half = Ceilings(predict.H100.bytes / 2, predict.H100.flops, "bfloat16")
    case = ("1024x8192 40%", "TRL")
    slow, fast = (predict.for_table("log_probs", c)[case] for c in (half, ceilings))
    assert 1.8 < slow / fast < 2
    assert predict.for_table("logits", ceilings, tmp_path) == {}
    timed = table.Row("case", OURS, "both", table.Stats(1e-6, 1e-6, 1e-6, 3), predicted=2e-6)
    assert dict(zip(table.COLUMNS, table.cells(timed), strict=True))["predicted µs"] == "2.0"


# (options, launches, bytes per position beyond those without a correction)
CORRECTIONS = {
    "token": (dict(rollout_correction=RolloutCorrection(high=2.0)), 2, 4.01),
    "mask, rejection": (
        dict(
            rollout_correction=RolloutCorrection(
                mode="mask", low=0.5, high=2.0, reject=Reject("k3", high=1.0)
            )
        ),
        2,
        4.01,
    ),
    # A pass over old log-probs, rollout log-probs and mask before the loss, which then reads no
    # rollout log-probs.
    "sequence": (dict(rollout_correction=RolloutCorrection("sequence", high=2.0)), 3, 9.02),
    # The pass that the ratio of the sequence takes anyway.
    "sequence, GSPO": (
        dict(
            rollout_correction=RolloutCorrection("geometric", "mask", 0.9, 1.1),
            ratio_level="sequence",
        ),
        3,
        9.02,
    ),
}


@compiled
@pytest.mark.parametrize("name", CORRECTIONS)
def test_rollout_correction(name: str):
    options, launches, budget = CORRECTIONS[name]
    inputs = traffic.make_inputs(Entry("log_probs", DENSE, ()))
    active: Any = driver.active
    shape = inputs.log_probs.shape
    moved = []
    for given in ({"rollout_log_probs": torch.full(shape, -1.0), **options}, dict(options)):
        if "rollout_log_probs" not in given:
            del given["rollout_correction"]
        active.launches.clear()
        with traffic.as_on_a_gpu():
            dl_norm.policy_loss(
                inputs.log_probs, inputs.old_log_probs, torch.ones(shape[0]), inputs.mask,
                torch.ones(shape[0]), impl="triton", **given,
            )  # fmt: skip
        moved.append(sum(32 * launch.sectors.total() for launch in active.launches))
        count = len(active.launches)
        assert count == (launches if "rollout_log_probs" in given else 2 + len(given)), count
    found = (moved[0] - moved[1]) / shape.numel()
    assert found <= budget, f"{found}, allowed {budget}"

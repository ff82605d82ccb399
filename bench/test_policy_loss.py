"""pytest-benchmark entry: one benchmark for each case, pass and contestant.

    python -m pytest bench --benchmark-enable -q -k log_probs-64x1024

These are wall times of one contestant after another; `python -m bench.table` interleaves them and
uses the device's clock. Without --benchmark-enable each is called once, after its parity check.
"""

from __future__ import annotations

import pytest
import torch

from bench import contest, timing
from bench.contest import AnyCase, Contestant, Suite
from bench.suites import SUITES
from bench.table import extra_compiles, make_trial, recompile_lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_SETS = 16  # enough to leave the caches at the larger shapes, and few enough to prepare


ALL = [
    pytest.param(suite, case, pass_, contestant, id=f"{name}-{case.name}-{pass_}-{contestant.name}")
    for name, suite in SUITES.items()
    for case in suite.cases(DEVICE)
    for pass_ in suite.passes
    for contestant in suite.contestants
]


@pytest.mark.parametrize("suite, case, pass_, contestant", ALL)
def test_policy_loss(
    benchmark, suite: Suite, case: AnyCase, pass_: str, contestant: Contestant
) -> None:
    count = min(MAX_SETS, timing.buffer_sets(case.bytes_moved(), DEVICE))
    sets = [suite.make_inputs(case, DEVICE, seed) for seed in range(count)]
    torch.compiler.reset()
    try:
        prepared = contest.prepare(contestant, sets[0])
    except contest.NotHere as reason:
        pytest.skip(str(reason))
    suite.check(prepared, suite.truth(sets[0]))

    trials = [make_trial(contestant, inputs, pass_) for inputs in sets]
    clock = timing.Clock(DEVICE, "wall")
    turn = iter(range(10**9))

    def set_up():
        return (trials[next(turn) % count](),), {}

    def timed(call: timing.Call) -> None:
        call()
        clock.synchronize()

    for trial in trials[:3]:
        timed(trial())
    benchmark.group = f"{suite.name} {case.name} {pass_}"
    benchmark.pedantic(timed, setup=set_up, rounds=30 if suite.passes[0] == "forward" else 10)
    benchmark.extra_info["bytes_model"] = case.bytes_moved()
    benchmark.extra_info["includes"] = contestant.note


@pytest.mark.skipif(DEVICE.type != "cuda", reason="Triton compiles nothing on a CPU")
def test_no_compile_for_a_new_length() -> None:
    """Row 12: 20 different T need no more kernels than the first."""
    assert extra_compiles(DEVICE, recompile_lengths())["extra"] == []

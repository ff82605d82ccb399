"""pytest-benchmark entry: one benchmark for each case, pass and contestant.

    python -m pytest bench --benchmark-enable -q --benchmark-group-by=param:case,param:pass_

These are wall times of one contestant after another; `python -m bench.table` interleaves them and
uses the device's clock. Without --benchmark-enable each is called once, after its parity check.
"""

from __future__ import annotations

import pytest
import torch

from bench import parity, peers, timing
from bench.cases import Case, cases_for, make_inputs
from bench.peers import CONTESTANTS, Contestant
from bench.table import PASSES, extra_compiles, make_trial, recompile_lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_SETS = 16  # enough to leave the caches at the larger shapes, and few enough to prepare


@pytest.mark.parametrize("case", cases_for(DEVICE), ids=lambda case: case.name)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
def test_policy_loss(benchmark, case: Case, pass_: str, contestant: Contestant) -> None:
    count = min(MAX_SETS, timing.buffer_sets(case.bytes_moved(), DEVICE))
    sets = [make_inputs(case, DEVICE, seed) for seed in range(count)]
    torch.compiler.reset()
    try:
        loss = peers.prepare(contestant, sets[0])
    except peers.NotHere as reason:
        pytest.skip(str(reason))
    parity.check(sets[0], loss, parity.truth(sets[0]))

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
    benchmark.pedantic(timed, setup=set_up, rounds=30)
    benchmark.extra_info["bytes_model"] = case.bytes_moved()
    benchmark.extra_info["includes"] = contestant.note


@pytest.mark.skipif(DEVICE.type != "cuda", reason="Triton compiles nothing on a CPU")
def test_no_compile_for_a_new_length() -> None:
    """Row 12: 20 different T need no more kernels than the first."""
    assert extra_compiles(DEVICE, recompile_lengths())["extra"] == []

"""Weights of a batch that is spread over processes: to the bit those of one process, also where a
prompt's sequences lie on several."""

import datetime
import sys

import pytest
import torch
import torch.distributed as dist

import dl_norm
from dl_norm._aggregations import AGGREGATIONS

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

RANKS = 2
# Prompts 4 and 6 lie on both ranks; rank 1 has an empty prompt, and one filled up with length 0.
BATCH = {
    "lengths": [10, 7, 300, 64, 0, 2000, 5, 0],
    "groups": [4, 4, 6, 9, 7, 6, 4, 4],
    "advantages": [0.5, -1.0, 1.0, 0.0, 2.0, -1.0, 3.0, 0.0],
    "keep": [True, True, True, True, True, True, False, True],
}


def arguments(method, rows):
    row = AGGREGATIONS[method]
    names = ["keep"] + ["groups"] * row.takes_groups + ["advantages"] * row.takes_advantages
    options = {name: torch.tensor(BATCH[name])[rows] for name in names}
    return torch.tensor(BATCH["lengths"])[rows], method, options


def constant(method):
    return {"max_length": 50} if AGGREGATIONS[method].takes_max_length else {}


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )
    world = dist.group.WORLD
    rows = slice(4 * rank, 4 * rank + 4)
    results = {}
    try:
        for method in AGGREGATIONS:
            lengths, _, options = arguments(method, rows)
            results[method] = dl_norm.sequence_weights(
                lengths, method, group=world, **options, **constant(method)
            )
            if not constant(method):
                results["reference", method] = dl_norm.reference_length(
                    lengths, method, group=world, **options
                )
            lengths, _, options = arguments(method, slice(None))
            whole = {**options, **constant(method)}
            results["local", method] = dl_norm.sequence_weights(
                lengths, method, group="local", **whole
            )
            results["no group", method] = refusal(
                lambda call=(lengths, method), whole=whole: dl_norm.sequence_weights(*call, **whole)
            )
        zeros = torch.zeros(0, dtype=torch.int64)
        results["nothing"] = dl_norm.sequence_weights(
            zeros, "prompt_mean", groups=zeros, group=world
        )
        uneven = torch.ones(3 + rank, dtype=torch.int64)
        results["uneven"] = refusal(
            lambda: dl_norm.sequence_weights(uneven, "prompt_mean", groups=uneven, group=world)
        )
    finally:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks(__file__, RANKS)


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_weights_are_those_of_one_process(ranks, method):
    lengths, _, options = arguments(method, slice(None))
    want = dl_norm.sequence_weights(lengths, method, **options, **constant(method))
    assert want.count_nonzero() == 5
    got = torch.cat([result[method] for result in ranks])
    if AGGREGATIONS[method].takes_groups:
        assert got.equal(want)  # every rank computes the whole batch
    else:  # float64 sums in another order
        torch.testing.assert_close(got, want, rtol=1.2e-7, atol=0.0)
    for result in ranks:
        assert result["local", method].equal(want)
        assert "2 processes, but no group" in result["no group", method]


@pytest.mark.parametrize("method", [m for m in AGGREGATIONS if not constant(m)])
def test_the_reference_is_one_number(ranks, method):
    lengths, _, options = arguments(method, slice(None))
    want = dl_norm.reference_length(lengths, method, **options)
    found = {result["reference", method] for result in ranks}
    assert len(found) == 1
    assert found.pop() == pytest.approx(want, rel=1e-7)


def test_prompts_need_as_many_sequences_on_every_process(ranks):
    for rank, result in enumerate(ranks):
        assert f"{3 + rank} here, 3.5 on average; add sequences of length 0" in result["uneven"]
        assert result["nothing"].shape == (0,)


if __name__ == "__main__":
    worker(int(sys.argv[2]), sys.argv[3])

"""Real processes over gloo against one process: weights, advantages, metrics, DDP gradients."""

import copy
import datetime
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dl_norm

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 12
VOCABULARY = 7
# Lengths of the sequences of each rank. Unequal batches, an empty sequence, a rank without any.
SPLITS = {
    "unequal": ([1, 12, 5], [3, 0, 8, 2]),
    "one sequence against five": ([7], [1, 2, 4, 9, 12]),
    "empty rank": ([4, 9, 1], []),
    "a rank of empty sequences": ([4, 9, 1], [0, 0]),
}
WEIGHTS = (
    ("delta_l", {"alpha": 1.0, "max_length": MAX_LENGTH}),
    ("delta_l", {"alpha": 0.75, "max_length": MAX_LENGTH}),
    ("grpo", {}),
    ("dapo", {}),
    ("dr_grpo", {"max_length": MAX_LENGTH}),
)
LOSS_OPTIONS = {"eps_low": 0.1, "eps_high": 0.15, "dual_clip": 1.3}


def batch(lengths):
    """A batch whose sequences depend on their place in the whole, not on the rank."""
    generator = torch.Generator().manual_seed(20)
    shape = (len(lengths), MAX_LENGTH)
    columns = torch.arange(MAX_LENGTH)
    return {
        "tokens": torch.randint(VOCABULARY, shape, generator=generator),
        # Wide enough, with advantages of both signs, that every clip is at work.
        "old": -2.2 + 0.8 * torch.randn(shape, generator=generator),
        "advantages": torch.randn(shape[0], generator=generator).abs()
        * torch.tensor([-1.0, 1.0]).repeat(shape[0])[: shape[0]],
        "mask": columns < torch.tensor(lengths, dtype=torch.int64)[:, None],
        "lengths": torch.tensor(lengths, dtype=torch.int64),
    }


def part(whole, rank, split):
    first = sum(map(len, split[:rank]))
    return {name: tensor[first : first + len(split[rank])] for name, tensor in whole.items()}


class Policy(nn.Module):
    """Log-probs of tokens under a model small enough to run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(21)
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, tokens):
        logits = self.head(torch.tanh(self.embedding(tokens.roll(1, -1))))
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def loss_of(model, data, weights, metrics=False):
    return dl_norm.policy_loss(
        model(data["tokens"]), data["old"], data["advantages"], data["mask"], weights,
        return_metrics=metrics, **LOSS_OPTIONS,
    )  # fmt: skip


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def worker(name, rank, folder):
    split = SPLITS[name]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=len(split),
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(distributed_results(rank, split), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def distributed_results(rank, split):
    """Everything that one rank computes."""
    group = dist.group.WORLD
    world = dist.get_world_size()
    data = part(batch([length for lengths in split for length in lengths]), rank, split)
    lengths = data["lengths"]
    results = {}
    for i, (method, options) in enumerate(WEIGHTS):
        results[f"weights {i}"] = dl_norm.sequence_weights(lengths, method, group=group, **options)
    results["advantages"] = dl_norm.reweight_advantages(
        data["advantages"], lengths, alpha=0.75, group=group
    )

    # A group that is not the world: this rank alone.
    alone = [dist.new_group([r]) for r in range(world)][rank]
    results["weights alone"] = dl_norm.sequence_weights(
        lengths, "delta_l", max_length=MAX_LENGTH, group=alone
    )

    weights = dl_norm.sequence_weights(lengths, "delta_l", max_length=MAX_LENGTH, group=group)
    model = DistributedDataParallel(Policy())
    # DDP averages gradients over the ranks; the loss of the batch is the sum of the ranks'.
    loss, metrics = loss_of(model, data, weights, metrics=True)
    (world * loss).backward()
    results["gradients"] = gradients(model)
    total = loss.detach().clone()
    dist.all_reduce(total)
    results["loss"] = total
    results["metrics"] = list(metrics.all_reduce(group).summary().values())
    results["metrics, default group"] = list(metrics.all_reduce().summary().values())
    results["metrics, this rank"] = list(metrics.summary().values())

    model = DistributedDataParallel(Policy())
    cut = len(lengths) // 2
    micro_batches = [
        ({name: tensor[rows] for name, tensor in data.items()}, weights[rows])
        for rows in (slice(0, cut), slice(cut, None))
    ]
    with model.no_sync():
        (world * loss_of(model, *micro_batches[0])).backward()
    (world * loss_of(model, *micro_batches[1])).backward()
    results["gradients of micro-batches"] = gradients(model)

    model = DistributedDataParallel(Policy())
    loss = dl_norm.delta_l_loss(
        model(data["tokens"]), data["old"], data["advantages"], data["mask"],
        alpha=1.0, max_length=MAX_LENGTH, group=group, **LOSS_OPTIONS,
    )  # fmt: skip
    (world * loss).backward()
    results["gradients of delta_l_loss"] = gradients(model)
    return results


@functools.cache
def run_ranks(name, folder):
    """Starts this file once per rank: multiprocessing would have to import it by a name, and
    `tests` is what other projects call their package too."""
    folder = folder / name.replace(" ", "_")
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    ranks = range(len(SPLITS[name]))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, name, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gloo")


@pytest.fixture(params=SPLITS)
def ranks(request, folder):
    """(results of every rank, the whole batch, lengths by rank)"""
    split = SPLITS[request.param]
    whole = batch([length for lengths in split for length in lengths])
    return run_ranks(request.param, folder), whole, split


def single_process(whole):
    model = Policy()
    weights = dl_norm.sequence_weights(whole["lengths"], "delta_l", max_length=MAX_LENGTH)
    loss, metrics = loss_of(model, whole, weights, metrics=True)
    loss.backward()
    return loss.detach(), metrics, gradients(model)


def test_weights_over_the_group_are_those_of_the_whole_batch(ranks):
    """One float32 rounding: the sums are in float64, but in another order."""
    results, whole, _ = ranks
    for i, (method, options) in enumerate(WEIGHTS):
        expected = dl_norm.sequence_weights(whole["lengths"], method, **options)
        got = torch.cat([result[f"weights {i}"] for result in results])
        torch.testing.assert_close(got, expected, rtol=1.2e-7, atol=0.0)
        assert (got > 0).any()


def test_a_smaller_group_sees_its_own_ranks_only(ranks):
    results, _, split = ranks
    for result, lengths in zip(results, split, strict=True):
        expected = dl_norm.sequence_weights(
            torch.tensor(lengths, dtype=torch.int64), "delta_l", max_length=MAX_LENGTH
        )
        torch.testing.assert_close(result["weights alone"], expected, rtol=1.2e-7, atol=0.0)


def test_reweighted_advantages_are_those_of_the_whole_batch(ranks):
    results, whole, _ = ranks
    expected = dl_norm.reweight_advantages(whole["advantages"], whole["lengths"], alpha=0.75)
    got = torch.cat([result["advantages"] for result in results])
    # A factor rounded to float32, then one product.
    torch.testing.assert_close(got, expected, rtol=2.4e-7, atol=0.0)


def test_the_losses_of_the_ranks_add_up(ranks):
    results, whole, _ = ranks
    loss, _, _ = single_process(whole)
    for result in results:
        # A sum of at most 40 float32 terms of size 1 times weights of at most 1 / MAX_LENGTH.
        torch.testing.assert_close(result["loss"], loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "key", ["gradients", "gradients of micro-batches", "gradients of delta_l_loss"]
)
def test_ddp_gradients_are_those_of_one_process(ranks, key):
    """Averaging over ranks included; accumulated under no_sync too. Float32 sums in another
    order: relative to the largest entry of each gradient."""
    results, whole, _ = ranks
    _, _, expected = single_process(whole)
    for result in results:
        for got, want in zip(result[key], expected, strict=True):
            assert want.abs().max() > 1e-3
            torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6 * float(want.abs().max()))


def test_metrics_all_reduce(ranks):
    results, whole, split = ranks
    _, metrics, _ = single_process(whole)
    want = metrics.summary()
    for result in results:
        for key in ("metrics", "metrics, default group"):
            got = dict(zip(want, result[key], strict=True))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
            assert float(got["tokens"]) == sum(map(sum, split))
    clipped = [float(v) for k, v in want.items() if k.startswith("clip_fraction")]
    assert all(clipped), "a batch in which nothing is clipped would prove little"
    own = [float(dict(zip(want, r["metrics, this rank"], strict=True))["tokens"]) for r in results]
    assert own == [float(sum(lengths)) for lengths in split], "all_reduce leaves its operand alone"


def test_metrics_add_up_over_micro_batches_as_over_ranks(ranks):
    _, whole, _ = ranks
    model = Policy()
    weights = dl_norm.sequence_weights(whole["lengths"], "delta_l", max_length=MAX_LENGTH)
    _, together, _ = single_process(whole)
    parts = [
        loss_of(model, {k: v[i : i + 1] for k, v in whole.items()}, weights[i : i + 1], True)[1]
        for i in range(len(weights))
    ]
    total = functools.reduce(lambda a, b: a + b, copy.copy(parts))
    torch.testing.assert_close(total.summary(), together.summary(), rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])

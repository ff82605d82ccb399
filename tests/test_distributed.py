"""Real processes over gloo against one process: weights, metrics, losses, parameters' gradients.

One group of processes is started for each number of ranks; every case runs in it.
"""

import copy
import datetime
import functools
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dl_norm
from dl_norm import context_parallel_lengths, gradient_scale

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 12
VOCABULARY = 7
MICRO_BATCHES = (1, 2, 3)
WRAPPERS = ("ddp", "fsdp2")
# Lengths of the sequences of each rank. Unequal batches, an empty sequence, a rank without any.
# With fewer sequences than micro-batches some micro-batches are empty, too.
SPLITS = {
    1: {"one rank": ([1, 12, 5, 0, 7],)},
    2: {
        "unequal": ([1, 12, 5], [3, 0, 8, 2]),
        "one sequence against five": ([7], [1, 2, 4, 9, 12]),
        "empty rank": ([4, 9, 1], []),
        "a rank of empty sequences": ([4, 9, 1], [0, 0]),
    },
    4: {
        "unequal": ([12], [1, 6, 3], [2, 2, 0, 11], [5, 8]),
        "two empty ranks": ([4, 9, 1, 12, 3], [], [7], []),
    },
}
CASES = [(ranks, name) for ranks, splits in SPLITS.items() for name in splits]
WEIGHTS = (
    ("delta_l", {"alpha": 1.0, "max_length": MAX_LENGTH}),
    ("delta_l", {"alpha": 0.75, "max_length": MAX_LENGTH}),
    ("grpo", {}),
    ("dapo", {}),
    ("dr_grpo", {"max_length": MAX_LENGTH}),
)
METHOD = {"alpha": 0.75, "max_length": MAX_LENGTH}
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


def pieces(data, weights, count):
    """The micro-batches of a rank, equal but for one sequence; some may have none."""
    for rows in torch.arange(len(weights)).tensor_split(count):
        yield {name: tensor[rows] for name, tensor in data.items()}, weights[rows]


class Policy(nn.Module):
    """Log-probs of tokens under a model small enough to run many times.

    Its parameters are float64, so sums over tokens, ranks and micro-batches in another order are
    the same to 1e-15, and what a comparison sees is this package: a float32 loss and token
    gradients, scaled. float32 parameters would round each sum by about as much as the tolerance.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(21)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.head = nn.Linear(6, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens):
        logits = self.head(torch.tanh(self.embedding(tokens.roll(1, -1))))
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].float()


def loss_of(model, data, weights, metrics=False):
    return dl_norm.policy_loss(
        model(data["tokens"]), data["old"], data["advantages"], data["mask"], weights,
        return_metrics=metrics, **LOSS_OPTIONS,
    )  # fmt: skip


class Ddp:
    """A policy under DistributedDataParallel."""

    def __init__(self):
        self.model = DistributedDataParallel(Policy())

    def backward(self, loss, last):
        self.model.require_backward_grad_sync = last
        loss.backward()

    def gradients(self):
        return [parameter.grad.clone() for parameter in self.model.parameters()]


class Fsdp:
    """A policy under FSDP2, each layer a shard group of its own."""

    def __init__(self, divide_by=None):
        self.model = Policy()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (self.model.embedding, self.model.head, self.model):
            fully_shard(module, mesh=mesh)
            if divide_by is not None:
                module.set_gradient_divide_factor(divide_by)

    def backward(self, loss, last):
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def gradients(self):
        return [parameter.grad.full_tensor() for parameter in self.model.parameters()]


def accumulate(policy, micro_batches, scale):
    """One optimizer step's gradients, and this rank's share of the loss (not scaled)."""
    micro_batches = list(micro_batches)
    total = torch.zeros(())
    for i, (data, weights) in enumerate(micro_batches, start=1):
        last = i == len(micro_batches)
        # DDP decides in forward whether the backward will be reduced.
        if isinstance(policy, Ddp):
            policy.model.require_backward_grad_sync = last
        loss = loss_of(policy.model, data, weights)
        policy.backward(scale * loss, last)
        total += loss.detach()
    return total, policy.gradients()


def worker(ranks, rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    results = {}
    try:
        # A group that is not the world: this rank alone.
        groups = [dist.new_group([r]) for r in range(ranks)]
        for name, split in SPLITS[ranks].items():
            results[name] = results_of_rank(rank, split, groups[rank])
        results["errors"] = errors_of_rank(rank, groups)
        stale = dist.new_group(list(range(ranks)))
    finally:
        dist.destroy_process_group()
    results["errors"]["destroyed"] = refusal(stale)
    torch.save(results, f"{folder}/{rank}.pt")


def results_of_rank(rank, split, alone):
    """Everything that one rank computes of one split."""
    group = dist.group.WORLD
    world = dist.get_world_size()
    data = part(batch([length for lengths in split for length in lengths]), rank, split)
    lengths = data["lengths"]
    results = {}
    for i, (method, options) in enumerate(WEIGHTS):
        results[f"weights {i}"] = dl_norm.sequence_weights(lengths, method, group=group, **options)
    results["weights alone"] = dl_norm.sequence_weights(lengths, group=alone, **METHOD)
    results["weights, local"] = dl_norm.sequence_weights(lengths, group="local", **METHOD)
    results["advantages"] = dl_norm.reweight_advantages(
        data["advantages"], lengths, alpha=0.75, group=group
    )

    weights = dl_norm.sequence_weights(lengths, group=group, **METHOD)
    scale = gradient_scale(num_processes=world)
    for wrapper, make in zip(WRAPPERS, (Ddp, Fsdp), strict=True):
        for count in MICRO_BATCHES:
            loss, gradients = accumulate(make(), pieces(data, weights, count), scale)
            dist.all_reduce(loss)
            results[wrapper, count] = loss, gradients

    # A trainer that divides each loss by the number of micro-batches.
    divided = gradient_scale(
        num_processes=world, accumulation_steps=3, loss_divided_by_accumulation=True
    )
    results["divided"] = accumulate(Ddp(), pieces(data, weights, 3), divided / 3)[1]
    # Gradients summed over the ranks.
    summed = gradient_scale(num_processes=world, gradients_averaged=False)
    results["summed"] = accumulate(Fsdp(1.0), pieces(data, weights, 2), summed)[1]
    # Two optimizer steps on one generation, a micro-batch each: the mean is the whole batch.
    halves = gradient_scale(
        num_processes=world, accumulation_steps=1, micro_batches_per_generation=2
    )
    steps = [accumulate(Ddp(), [piece], halves)[1] for piece in pieces(data, weights, 2)]
    results["mean of two steps"] = [(one + two) / 2 for one, two in zip(*steps, strict=True)]

    policy = Ddp()
    loss = dl_norm.delta_l_loss(
        policy.model(data["tokens"]), data["old"], data["advantages"], data["mask"],
        group=group, **METHOD, **LOSS_OPTIONS,
    )  # fmt: skip
    policy.backward(scale * loss, last=True)
    results["delta_l_loss"] = policy.gradients()

    with torch.no_grad():
        _, metrics = loss_of(Policy(), data, weights, metrics=True)
    results["metrics"] = list(metrics.all_reduce(group).summary().values())
    results["metrics, default group"] = list(metrics.all_reduce().summary().values())
    results["metrics, this rank"] = list(metrics.summary().values())
    return results


def refusal(group, function=dl_norm.sequence_weights, **options):
    """What the refusal of a group says; "" if the sum is taken, over whatever it is."""
    lengths = torch.tensor([2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if function is dl_norm.sequence_weights:
                function(lengths, group=group, **METHOD)
            elif function is dl_norm.reweight_advantages:
                function(lengths.float(), lengths, group=group)
            elif function is dl_norm.delta_l_loss:
                zeros = torch.zeros(1, 2)
                function(zeros, zeros, zeros, zeros, group=group, **METHOD)
            elif function is dl_norm.PolicyLossMetrics.all_reduce:
                function(dl_norm.PolicyLossMetrics.from_sums(torch.ones(9), torch.ones(2)), group)
            else:
                function(torch.ones(1, 2), group)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def errors_of_rank(rank, groups):
    functions = {
        "sequence_weights": dl_norm.sequence_weights,
        "reweight_advantages": dl_norm.reweight_advantages,
        "delta_l_loss": dl_norm.delta_l_loss,
        "context_parallel_lengths": context_parallel_lengths,
    }
    errors = {f"no group: {name}": refusal(None, f) for name, f in functions.items()}
    other = groups[(rank + 1) % len(groups)]
    errors["not a member"] = refusal(other)
    errors["not a member: metrics"] = refusal(other, dl_norm.PolicyLossMetrics.all_reduce)
    errors["mesh"] = refusal(init_device_mesh("cpu", (dist.get_world_size(),)))
    return errors


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def case(request, run_ranks):
    """(results of every rank, the whole batch, lengths by rank)"""
    ranks, name = request.param
    split = SPLITS[ranks][name]
    whole = batch([length for lengths in split for length in lengths])
    return [results[name] for results in run_ranks(__file__, ranks)], whole, split


def single_process(whole):
    model = Policy()
    weights = dl_norm.sequence_weights(whole["lengths"], **METHOD)
    loss, metrics = loss_of(model, whole, weights, metrics=True)
    loss.backward()
    return loss.detach(), metrics, [parameter.grad for parameter in model.parameters()]


def assert_same_gradients(results, expected):
    """To 1e-6 of the largest entry of each parameter's gradient, on every rank."""
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert want.abs().max() > 1e-3
            torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("count", MICRO_BATCHES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_loss_and_gradients_are_those_of_one_process(case, wrapper, count):
    results, whole, _ = case
    loss, _, expected = single_process(whole)
    for result in results:
        # A sum of at most 50 float32 terms of size 1 times weights of at most 1 / MAX_LENGTH.
        torch.testing.assert_close(result[wrapper, count][0], loss, rtol=1e-6, atol=1e-7)
    assert_same_gradients([result[wrapper, count][1] for result in results], expected)


@pytest.mark.parametrize("key", ["divided", "summed", "mean of two steps", "delta_l_loss"])
def test_every_factor_of_the_scale(case, key):
    results, whole, _ = case
    _, _, expected = single_process(whole)
    assert_same_gradients([result[key] for result in results], expected)


def test_weights_over_the_group_are_those_of_the_whole_batch(case):
    """One float32 rounding: the sums are in float64, but in another order."""
    results, whole, _ = case
    for i, (method, options) in enumerate(WEIGHTS):
        expected = dl_norm.sequence_weights(whole["lengths"], method, **options)
        got = torch.cat([result[f"weights {i}"] for result in results])
        torch.testing.assert_close(got, expected, rtol=1.2e-7, atol=0.0)
        assert (got > 0).any()


@pytest.mark.parametrize("key", ["weights alone", "weights, local"])
def test_a_smaller_group_sees_its_own_ranks_only(case, key):
    results, _, split = case
    for result, lengths in zip(results, split, strict=True):
        expected = dl_norm.sequence_weights(torch.tensor(lengths, dtype=torch.int64), **METHOD)
        torch.testing.assert_close(result[key], expected, rtol=1.2e-7, atol=0.0)


def test_reweighted_advantages_are_those_of_the_whole_batch(case):
    results, whole, _ = case
    expected = dl_norm.reweight_advantages(whole["advantages"], whole["lengths"], alpha=0.75)
    got = torch.cat([result["advantages"] for result in results])
    # A factor rounded to float32, then one product.
    torch.testing.assert_close(got, expected, rtol=2.4e-7, atol=0.0)


@pytest.mark.parametrize("ranks", SPLITS)
def test_a_missing_or_wrong_group_is_refused(ranks, run_ranks):
    """Nothing is ever summed over this process alone in silence."""
    for results in run_ranks(__file__, ranks):
        errors = results["errors"]
        assert "not initialised" in errors["destroyed"]
        assert "TypeError" in errors["mesh"] and "get_group()" in errors["mesh"]
        without = {key: error for key, error in errors.items() if key.startswith("no group")}
        assert len(without) == 4
        if ranks == 1:  # one process has the whole batch
            assert not any(without.values())
            assert not errors["not a member"] and not errors["not a member: metrics"]
        else:
            assert all(f"ValueError: {ranks} processes" in error for error in without.values())
            for key in ("not a member", "not a member: metrics"):
                assert "ValueError" in errors[key] and "not in the group" in errors[key], key


def test_metrics_all_reduce(case):
    results, whole, split = case
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


def test_metrics_add_up_over_micro_batches_as_over_ranks(case):
    _, whole, _ = case
    model = Policy()
    weights = dl_norm.sequence_weights(whole["lengths"], **METHOD)
    _, together, _ = single_process(whole)
    parts = [loss_of(model, *piece, metrics=True)[1] for piece in pieces(whole, weights, 4)]
    total = functools.reduce(lambda a, b: a + b, copy.copy(parts))
    torch.testing.assert_close(total.summary(), together.summary(), rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""One sequence over several processes: data x context meshes of real processes against one process.

The model looks at the whole sequence, so gradients cross the borders between the processes.
"""

import datetime
import sys
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
RANKS = 4
WIDTH = 16
VOCABULARY = 7
METHOD = {"alpha": 0.75, "max_length": WIDTH}
LOSS_OPTIONS = {"eps_low": 0.1, "eps_high": 0.15, "dual_clip": 1.3}
# (data size, context size) -> lengths by data rank. Short sequences lie on one context rank alone.
SPLITS = {
    (2, 2): {"unequal": ([16, 3, 9], [1, 12, 0, 7, 5]), "empty data rank": ([16, 3, 9], [])},
    (1, 4): {"all ranks on each sequence": ([2, 16, 7, 0, 11],)},
}
CASES = [(mesh, name) for mesh, splits in SPLITS.items() for name in splits]
LAYOUTS = ("contiguous", "zig-zag", "packed")
MICRO_BATCHES = (1, 2, 3)


def batch(lengths):
    generator = torch.Generator().manual_seed(30)
    shape = (len(lengths), WIDTH)
    counted = torch.arange(WIDTH) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    # A hole, as a tool's answer leaves: lengths are counts.
    counted[:, 1] = False
    return {
        "tokens": torch.randint(VOCABULARY, shape, generator=generator),
        "old": -2.2 + 0.8 * torch.randn(shape, generator=generator),
        "advantages": torch.randn(shape[0], generator=generator),
        "mask": counted,
    }


def columns_of(layout, context_rank, context_size):
    """Which columns of the sequences a context rank holds."""
    if layout == "zig-zag":  # one part from the front, one from the back: equal causal work
        parts = torch.arange(WIDTH).chunk(2 * context_size)
        return torch.cat([parts[context_rank], parts[2 * context_size - 1 - context_rank]])
    return torch.arange(WIDTH).chunk(context_size)[context_rank]


class Gather(torch.autograd.Function):
    """(G, T', d) of each rank to (C, G, T', d) on all of them."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, *grads):
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)  # what all ranks' losses ask of all parts
        return grad[dist.get_rank(ctx.group)], None


class Policy(nn.Module):
    """Each token's logits depend on the mean of all embeddings before it.

    float64 parameters, as in test_distributed.py: sums in another order do not matter, so what is
    compared is this package's float32.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(31)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.head = nn.Linear(6, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens, columns=None, group=None):
        """(G, T') log-probs of a context rank's ``columns``; all of them without a group."""
        embedded = self.embedding(tokens)
        if group is not None:
            order = torch.cat(columns).argsort()
            embedded = torch.cat(Gather.apply(embedded, group).unbind(), 1)[:, order]
        mean = embedded.cumsum(1) / torch.arange(1, WIDTH + 1, dtype=embedded.dtype)[:, None]
        before = torch.nn.functional.pad(mean, (0, 0, 1, 0))[:, :-1]
        if group is not None:
            before = before[:, columns[dist.get_rank(group)]]
        logits = self.head(torch.tanh(before))
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].float()


def pack(data, log_probs):
    """A rank's padded part as a packed stream with the counted tokens alone."""
    keep = data["mask"]
    cu_seqlens = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    return log_probs[keep], data["old"][keep], cu_seqlens


def worker(_, rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )
    results = {}
    try:
        for shape, splits in SPLITS.items():
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "context"))
            for name, split in splits.items():
                for layout in LAYOUTS:
                    results[shape, name, layout] = results_of_rank(mesh, split, layout)
        try:
            context_parallel_lengths(torch.ones(1 + rank // 3, 2), dist.group.WORLD)
        except ValueError as error:
            results["another number of sequences"] = str(error)
    finally:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


def results_of_rank(mesh, split, layout):
    data_group, context_group = mesh.get_group("data"), mesh.get_group("context")
    data_rank, size = mesh.get_local_rank("data"), mesh.size(1)
    columns = [columns_of(layout, c, size) for c in range(size)]
    mine = columns[mesh.get_local_rank("context")]
    first = sum(map(len, split[:data_rank]))
    rows = slice(first, first + len(split[data_rank]))
    whole = batch([length for lengths in split for length in lengths])
    data = {
        name: tensor[rows] if tensor.ndim == 1 else tensor[rows][:, mine]
        for name, tensor in whole.items()
    }

    packed = layout == "packed"
    if packed:
        _, _, cu_seqlens = pack(data, data["old"])
        lengths = context_parallel_lengths(None, context_group, cu_seqlens=cu_seqlens)
    else:
        lengths = context_parallel_lengths(data["mask"], context_group)
    weights = dl_norm.sequence_weights(lengths, group=data_group, **METHOD)
    scale = gradient_scale(num_processes=mesh.size())
    results = {"lengths": lengths, "weights": weights}

    def loss_of(model, rows, weights, metrics=False):
        data_of = {name: tensor[rows] for name, tensor in data.items()}
        log_probs = model(data_of["tokens"], columns, context_group)
        old, mask, cu_seqlens = data_of["old"], data_of["mask"], None
        if packed:
            log_probs, old, cu_seqlens = pack(data_of, log_probs)
            mask = None
        return dl_norm.policy_loss(
            log_probs, old, data_of["advantages"], mask, weights[rows],
            cu_seqlens=cu_seqlens, return_metrics=metrics, **LOSS_OPTIONS,
        )  # fmt: skip

    def step(model, count, weights=weights):
        total = torch.zeros(())
        for rows in torch.arange(len(weights)).tensor_split(count):
            loss = loss_of(model, rows, weights)
            (scale * loss).backward()
            total += loss.detach()
        dist.all_reduce(total)
        full = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
        return total, full

    for count in MICRO_BATCHES:
        results["ddp", count] = step(DistributedDataParallel(Policy()), count)
        sharded = Policy()
        for module in (sharded.embedding, sharded.head, sharded):
            fully_shard(module, mesh=mesh._flatten() if mesh.ndim > 1 else mesh)
        results["fsdp2", count] = step(sharded, count)

    # The mistake that the lengths over the context group prevent.
    local = dl_norm.sequence_weights(data["mask"].sum(-1), group=dist.group.WORLD, **METHOD)
    results["lengths of this rank"] = step(DistributedDataParallel(Policy()), 1, local)

    with torch.no_grad():
        _, metrics = loss_of(Policy(), torch.arange(len(weights)), weights, metrics=True)
    results["metrics"] = metrics.all_reduce(dist.group.WORLD).summary()
    return results


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0][0]}x{case[0][1]}, {case[1]}")
def case(request, run_ranks):
    """(results of every rank by layout, the whole batch, lengths by data rank, context size)"""
    shape, name = request.param
    split = SPLITS[shape][name]
    whole = batch([length for lengths in split for length in lengths])
    ranks = run_ranks(__file__, RANKS)
    by_layout = {key: [results[shape, name, key] for results in ranks] for key in LAYOUTS}
    return by_layout, whole, split, shape[1]


def single_process(whole):
    model = Policy()
    weights = dl_norm.sequence_weights(whole["mask"].sum(-1), **METHOD)
    loss, metrics = dl_norm.policy_loss(
        model(whole["tokens"]), whole["old"], whole["advantages"], whole["mask"], weights,
        return_metrics=True, **LOSS_OPTIONS,
    )  # fmt: skip
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return weights, loss.detach(), gradients, metrics.summary()


def relative_error(got, want):
    assert want.abs().max() > 1e-4
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_and_weights_are_those_of_whole_sequences(case, layout):
    by_layout, whole, split, context = case
    weights, *_ = single_process(whole)
    lengths = whole["mask"].sum(-1)
    first = 0
    for data_rank, own in enumerate(split):
        rows = slice(first, first := first + len(own))
        for result in by_layout[layout][data_rank * context : (data_rank + 1) * context]:
            assert result["lengths"].equal(lengths[rows])
            # One float32 rounding: the sums are in float64, but in another order.
            torch.testing.assert_close(result["weights"], weights[rows], rtol=1.2e-7, atol=0.0)


@pytest.mark.parametrize("count", MICRO_BATCHES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(case, layout, wrapper, count):
    """The loss of the float32 terms of at most 60 tokens; gradients to 1e-6 of their scale."""
    by_layout, whole, _, _ = case
    _, loss, expected, _ = single_process(whole)
    for result in by_layout[layout]:
        got, gradients = result[wrapper, count]
        torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-7)
        for one, want in zip(gradients, expected, strict=True):
            assert relative_error(one, want) < 1e-6


def test_lengths_of_one_context_rank_would_be_wrong(case):
    """The parity above is not for want of a difference."""
    by_layout, whole, _, _ = case
    _, _, expected, _ = single_process(whole)
    _, gradients = by_layout["contiguous"][0]["lengths of this rank"]
    assert relative_error(gradients[0], expected[0]) > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_sums_over_tokens(case, layout):
    """All but ``sequences``, which every context rank counts."""
    by_layout, whole, _, context = case
    *_, want = single_process(whole)
    for result in by_layout[layout]:
        got = dict(result["metrics"])
        assert float(got.pop("sequences")) == context * float(want["sequences"])
        expected = {name: value for name, value in want.items() if name != "sequences"}
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_ranks_that_disagree_on_the_number_of_sequences_are_refused(run_ranks):
    for rank, results in enumerate(run_ranks(__file__, RANKS)):
        assert f"{1 + rank // 3} here, 1.25 on average" in results["another number of sequences"]


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

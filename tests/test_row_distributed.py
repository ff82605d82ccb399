"""A sharded head: the losses of two gloo processes against those of one.

linear_policy_loss gathers a head that is a DTensor, and its gradient is the mean over the ranks, as
FSDP2 takes it of every parameter: with the loss multiplied by the number of ranks the gradients are
those of one process. They are not with PyTorch 2.8, whose gloo sums where it is asked for a mean.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dl_norm

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
SEQUENCES, TOKENS, SIZE, VOCABULARY = 4, 5, 8, 11  # 11 words: shards of 6 and 5
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
WRAPPERS = {
    "head of its own": (0, 1),
    "head with the root": (0,),
    "nothing but the root": (),
}
IMPLEMENTATIONS = ("torch", "triton")
OPTIONS = {"chunk_size": 4, "temperature": 0.8, "eps_high": 0.3}


def make_batch():
    random = torch.Generator().manual_seed(31)
    shape = (SEQUENCES, TOKENS)
    # The ranks have unequal numbers of tokens.
    mask = torch.arange(TOKENS) < torch.tensor([5, 3, 1, 2])[:, None]
    return {
        "hidden": torch.randn(*shape, SIZE, generator=random),
        "token_ids": torch.randint(VOCABULARY, shape, generator=random),
        "old_log_probs": -2.5 + 0.5 * torch.randn(shape, generator=random),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.2]),
        "mask": mask,
        "weights": dl_norm.sequence_weights(mask.sum(1), max_length=TOKENS, group="local"),
    }


def rank_of(batch, rank):
    """This rank's sequences, with the factor that undoes the mean over the ranks."""
    part = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    return {**part, "weights": RANKS * part["weights"]}


class Policy(nn.Sequential):
    """A body and a head that is never called: its weight goes to the loss."""

    def __init__(self):
        torch.manual_seed(32)
        super().__init__(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, VOCABULARY))

    def forward(self, batch, impl="torch"):
        batch = dict(batch)
        body, head = self
        hidden = body(batch.pop("hidden"))
        return dl_norm.linear_policy_loss(
            hidden, head.weight, **batch, bias=head.bias, impl=impl, **OPTIONS
        )


def log_probs_of(head, batch, impl="torch"):
    with torch.no_grad():
        return dl_norm.token_log_probs(
            batch["hidden"], batch["token_ids"], head.weight, bias=head.bias, mask=batch["mask"],
            impl=impl,
        )  # fmt: skip


def worker(_, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = make_batch()
    mine = rank_of(whole, rank)
    results = {}
    for impl in IMPLEMENTATIONS:
        for name, placement in PLACEMENTS.items():
            model = Policy()
            body, head = model
            bias_placement = Replicate() if name == "columns" else placement
            for parameter, how in (("weight", placement), ("bias", bias_placement)):
                sharded = distribute_tensor(getattr(head, parameter).detach(), mesh, [how])
                setattr(head, parameter, nn.Parameter(sharded))
            loss = model(mine, impl)
            loss.backward()
            for parameter in body.parameters():  # a plain parameter's gradient nobody averages
                dist.all_reduce(parameter.grad)
                parameter.grad /= RANKS
            grads = [parameter.grad for parameter in model.parameters()]
            assert head.weight.grad.placements == (placement,)
            assert head.weight.grad.to_local().shape == head.weight.to_local().shape
            results[impl, name] = (
                loss.detach(),
                [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads],
                log_probs_of(head, mine, impl),
            )
    for name, own in WRAPPERS.items():
        model = Policy()
        # The head is a DTensor in the loss if it is sharded by itself, else the root gathers it.
        for index in own:
            fully_shard(model[index])
        fully_shard(model)
        loss = model(mine)
        loss.backward()
        results["fsdp2", name] = (
            loss.detach(), [parameter.grad.full_tensor() for parameter in model.parameters()]
        )  # fmt: skip
    try:
        sharded = distribute_tensor(whole["hidden"], mesh, [Shard(0)])
        dl_norm.logits_policy_loss(sharded, **{k: v for k, v in whole.items() if k != "hidden"})
    except ValueError as error:
        results["logits"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(run_ranks):
    return run_ranks(__file__, RANKS)


def check(results, key):
    model = Policy()
    loss = model(make_batch())
    loss.backward()
    total = sum(result[key][0] for result in results) / RANKS
    torch.testing.assert_close(total, loss.detach(), rtol=2e-6, atol=1e-8)
    for result in results:
        for got, parameter in zip(result[key][1], model.parameters(), strict=True):
            want = parameter.grad
            assert want.abs().max() > 1e-4
            # Sums of float32 products in another order.
            torch.testing.assert_close(got, want, rtol=0.0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_distributed_head(placement, impl, results):
    check(results, (impl, placement))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_log_probs_of_a_distributed_head(placement, impl, results):
    batch = make_batch()
    got = torch.cat([result[impl, placement][2] for result in results])
    expected = log_probs_of(Policy()[1], batch)
    assert torch.equal(got != 0, batch["mask"])
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_under_fsdp2(wrapper, results):
    check(results, ("fsdp2", wrapper))


def test_distributed_logits_are_refused(results):
    for result in results:
        assert "logits is a DTensor" in result["logits"] and "to_local()" in result["logits"]


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

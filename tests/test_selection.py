"""Clip-cov, KL-cov and M2PO: which tokens of a batch, against sorting, against the code of verl,
SkyRL and AReaL, and over two processes with different numbers of tokens."""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parent))

from adapter_tools import Lenient, lift

import dl_norm
from bench.lift import NotInstalled
from bench.lift import lift as lift_installed
from dl_norm._log_probs.order import largest, order_keys, smallest_of_mean_below

RANKS = 2
WORST = math.inf, -math.inf, 1e30, -0.0, 0.0, 1e-40, -1e-40


def make_batch(seed=0, dtype=torch.float32):
    """Log-probs and old ones, advantages by sequence, mask."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([40, 3, 0, 60, 17, 57])
    old = -4 * torch.rand(6, 60, generator=random, dtype=torch.float64)
    log_probs = (old + 0.2 * torch.randn(6, 60, generator=random, dtype=torch.float64)).clamp(max=0)
    mask = torch.arange(60) < lengths[:, None]
    mask[3, 5:9] = False
    advantages = torch.tensor([2.0, -1.0, 0.3, -0.5, 0.0, 1.5], dtype=torch.float64)
    return log_probs.to(dtype), old.to(dtype), advantages.to(dtype), mask


# -- against sorting


@pytest.mark.parametrize("seed", range(4))
def test_largest_and_smallest(seed):
    """Any floats in their order, equal ones in that of their positions."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(300, generator=random).round(decimals=seed)
    values[: len(WORST)] = torch.tensor(WORST)
    wanted = torch.rand(300, generator=random) < 0.7
    keys = order_keys(values)
    assert (keys[values.argsort()].diff() >= 0).all() and keys.unique().numel() > 7
    order = [at for at in keys.argsort(descending=True, stable=True).tolist() if wanted[at]]
    for count in (0, 1, 7, len(order) - 1, len(order), 1000):
        expected = torch.zeros(300, dtype=torch.bool)
        expected[order[:count]] = True
        got = largest(keys, wanted, torch.tensor(count), None)
        assert torch.equal(got, expected), count
    small = (values[8:].abs() * 1000).round().long()
    chosen = wanted[8:]
    order = [at for at in small.argsort(stable=True).tolist() if chosen[at]]
    means = small[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    for bound in (0.5, 100.3, 400.3, means[-1].item() - 0.1, means[-1].item() + 0.1, 1e6):
        expected = torch.zeros(292, dtype=torch.bool)
        expected[order[: max(1, int((means < bound).sum()))]] = True
        assert torch.equal(smallest_of_mean_below(small, chosen, bound, None), expected), bound
    nothing = torch.zeros(292, dtype=torch.bool)
    assert not smallest_of_mean_below(small, nothing, 1.0, None).any()
    assert not largest(small, nothing, torch.tensor(1), None).any()


# -- against the trainers


def verl(name: str, **policy_loss):
    functional, algorithms = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    try:
        masked_sum = lift_installed(functional, "masked_sum", {"torch": torch})
        masked_mean = lift_installed(
            functional, "masked_mean", {"torch": torch, "masked_sum": masked_sum}
        )
        tools = {"torch": torch, "verl_F": SimpleNamespace(masked_mean=masked_mean)}
        tools |= {"AlgoConfig": type(None), "agg_loss": summed}
        function = lift_installed(algorithms, f"compute_policy_loss_{name}", tools)
    except NotInstalled as error:
        pytest.skip(str(error))
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.2, global_batch_info={},
        policy_loss=Lenient(**policy_loss),
    )  # fmt: skip

    def loss(log_probs, old, advantages, mask):
        return function(old, log_probs, advantages, mask, config=config)[0]

    return loss


def summed(loss_mat, loss_mask, loss_agg_mode):
    return (loss_mat * loss_mask).sum()


def skyrl(name: str, **settings):
    utils = "skyrl/backends/skyrl_train/utils"
    mean = lift(f"{utils}/torch_utils.py", "masked_mean").masked_mean
    name = f"compute_policy_loss_{name}"
    file = f"{utils}/ppo_utils.py"
    function = getattr(lift(file, "reduce_loss", name, masked_mean=mean), name)
    given = SimpleNamespace(**settings)
    config = SimpleNamespace(clip_cov=given, kl_cov=given, eps_clip_low=0.1, eps_clip_high=0.2)

    def loss(log_probs, old, advantages, mask):
        return function(log_probs, old, advantages, config, mask)[0]

    return loss


def gradients(*losses, log_probs):
    leaves = [log_probs.clone().requires_grad_() for _ in losses]
    values = [loss(leaf) for loss, leaf in zip(losses, leaves, strict=True)]
    return values, [torch.autograd.grad(v, leaf)[0] for v, leaf in zip(values, leaves, strict=True)]


def agree(ours, theirs, log_probs):
    (value, expected), (grad, true) = gradients(ours, theirs, log_probs=log_probs)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, true, rtol=3e-6, atol=3e-6)
    return true


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("trainer", ["verl", "SkyRL"])
def test_kl_cov(trainer, impl):
    fraction, weight = 0.07, 0.4
    if trainer == "verl":
        theirs = verl("kl_cov", kl_cov_ratio=fraction, ppo_kl_coef=weight)
    else:
        theirs = skyrl("kl_cov", kl_cov_frac=fraction, ppo_kl_coef=weight)
    log_probs, old, advantages, mask = make_batch(dtype=torch.float64)
    tokens = dl_norm.kl_cov_tokens(log_probs, advantages, mask, fraction=fraction)
    assert tokens.sum() == int(fraction * mask.sum()) and not tokens[~mask].any()
    more = {"weights": torch.ones(6), "advantages": advantages, "mask": mask, "impl": impl}

    def ours(leaf):
        given = {"log_probs": leaf.float(), "old_log_probs": old.float(), **more}
        loss = dl_norm.policy_loss(**given, surrogate="importance_sampling")
        penalty = f"abs_drift({weight})"
        return loss + dl_norm.policy_loss(**given, surrogate=penalty, entropy_mask=tokens)

    def of_trainer(leaf):
        return theirs(leaf, old, advantages[:, None].expand(old.shape), mask.double())

    agree(ours, of_trainer, log_probs)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("trainer", ["verl", "SkyRL"])
def test_clip_cov(trainer, impl):
    """Where there are fewer candidates than may be drawn, chance has no say."""
    names = {"verl": "clip_cov_ratio", "SkyRL": "clip_ratio"}
    settings = {names[trainer]: 0.9, "clip_cov_lb": 0.4, "clip_cov_ub": 2.0}
    theirs = (verl if trainer == "verl" else skyrl)("clip_cov", **settings)
    log_probs, old, advantages, mask = make_batch(dtype=torch.float64)
    options = {"eps_low": 0.1, "eps_high": 0.2}
    kept = dl_norm.clip_cov_mask(
        log_probs, old, advantages, mask, fraction=0.9, low=0.4, high=2.0, **options
    )
    assert 10 < (~kept).sum() < 0.9 * mask.sum()

    def ours(leaf):
        return dl_norm.policy_loss(
            leaf.float(), old.float(), advantages, mask, torch.ones(6), entropy_mask=kept,
            impl=impl, **options,
        )  # fmt: skip

    def of_trainer(leaf):
        return theirs(leaf, old, advantages[:, None].expand(old.shape), mask.double())

    true = agree(ours, of_trainer, log_probs)
    assert (true[~kept] == 0).all()


def test_clip_cov_draws():
    """As many as asked for, of the candidates, each as often as any other, by the generator."""
    log_probs, old, advantages, mask = make_batch()
    bounds = {"low": 0.4, "high": 2.0}
    arguments = log_probs, old, advantages, mask
    candidates = ~dl_norm.clip_cov_mask(*arguments, fraction=1.0, **bounds)
    count = int(0.05 * mask.sum())
    random = torch.Generator().manual_seed(3)
    times = torch.zeros(mask.shape)
    for _ in range(300):
        drawn = ~dl_norm.clip_cov_mask(*arguments, fraction=0.05, generator=random, **bounds)
        assert drawn.sum() == count and not drawn[~candidates].any()
        times += drawn
    expected = 300 * count / candidates.sum()
    assert ((times[candidates] - expected).abs() < 5 * expected.sqrt()).all()
    one, same = (
        dl_norm.clip_cov_mask(*arguments, generator=random.manual_seed(1), **bounds)
        for _ in range(2)
    )
    assert torch.equal(one, same) and (~one).sum() == 1  # at least one


@pytest.mark.parametrize("threshold", [1e-4, 0.01, 0.02, 10.0])
def test_m2po(threshold):
    names = "_apply_m2po_masking", "_get_m2po_loss_mask"
    areal = lift("areal/trainer/ppo/actor.py", *reversed(names))._apply_m2po_masking
    log_probs, old, _, mask = make_batch(dtype=torch.float64)
    expected = areal(old, log_probs, mask, threshold)
    got = dl_norm.second_moment_mask(log_probs, old, mask, threshold)
    assert torch.equal(got & mask, expected) and got[~mask].all()
    assert {1e-4: 0 < got[mask].sum() < 20, 10.0: got.all()}.get(threshold, not got.all())


def test_packed_and_unscored():
    """The same tokens packed; NaN from the engine is no difference; padding may hold anything."""
    log_probs, old, advantages, mask = make_batch()
    counted = mask.sum(-1)
    cu_seqlens = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
    packed = {"mask": None, "cu_seqlens": cu_seqlens}
    spoilt = log_probs.masked_fill(~mask, math.nan)
    tokens = dl_norm.kl_cov_tokens(spoilt, advantages, mask, fraction=0.1)
    flat = dl_norm.kl_cov_tokens(log_probs[mask], advantages, fraction=0.1, **packed)
    assert torch.equal(tokens[mask], flat) and flat.any()
    unscored = mask & (torch.arange(60) % 9 == 4)
    engine = old.masked_fill(unscored, math.nan)
    kept = dl_norm.second_moment_mask(spoilt, engine, mask, 0.01)
    same = dl_norm.second_moment_mask(log_probs, old.where(~unscored, log_probs), mask, 0.01)
    assert torch.equal(kept, same) and kept[unscored].all() and not kept.all()
    flat = dl_norm.second_moment_mask(log_probs[mask], engine[mask], threshold=0.01, **packed)
    assert torch.equal(flat, kept[mask])
    kept = dl_norm.clip_cov_mask(spoilt, old, advantages, mask, fraction=1.0)
    flat = dl_norm.clip_cov_mask(log_probs[mask], old[mask], advantages, fraction=1.0, **packed)
    assert torch.equal(flat, kept[mask]) and not flat.all()


class NoValue(TorchDispatchMode):
    """Raises where a value goes to the host, or a shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
            torch.ops.aten.masked_select, torch.ops.aten.repeat_interleave,
        ), func  # fmt: skip
        assert func is not torch.ops.aten.index.Tensor or args[1][0].dtype != torch.bool
        return func(*args, **(kwargs or {}))


def test_no_host_sync(as_on_a_gpu):
    batch = make_batch()
    packed = torch.arange(7) * 60
    flat = [tensor.flatten() for tensor in batch]
    with NoValue():
        for case in CASES.values():
            case(*batch, None)
        dl_norm.clip_cov_mask(*flat, cu_seqlens=packed)
    with pytest.raises(AssertionError), NoValue():
        batch[0].sum().item()


def test_refused():
    log_probs, old, advantages, mask = make_batch()
    for call, message in (
        (lambda: dl_norm.kl_cov_tokens(log_probs, advantages, mask, fraction=0.0), "fraction <= 1"),
        (lambda: dl_norm.clip_cov_mask(log_probs, old, advantages, mask, low=6.0), "low < high"),
        (lambda: dl_norm.second_moment_mask(log_probs, old, mask, 0.0), "0 < threshold < 256"),
        (lambda: dl_norm.kl_cov_tokens(log_probs, advantages[:3], mask), "advantages must be"),
        (lambda: dl_norm.kl_cov_tokens(log_probs, advantages, None), "mask is required"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# -- over processes

CASES = {
    "kl_cov": (lambda lp, old, a, mask, group: dl_norm.kl_cov_tokens(
        lp, a, mask, fraction=0.1, group=group)),
    "ties": (lambda lp, old, a, mask, group: dl_norm.kl_cov_tokens(
        lp.round(), a.sign(), mask, fraction=0.1, group=group)),
    "clip_cov": (lambda lp, old, a, mask, group: dl_norm.clip_cov_mask(
        lp, old, a, mask, fraction=1.0, low=0.5, group=group)),
    "m2po": (lambda lp, old, a, mask, group: dl_norm.second_moment_mask(
        lp, old, mask, 0.01, group=group)),
}  # fmt: skip


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    rows = slice(0, 4) if rank == 0 else slice(4, 6)
    batch = [tensor[rows] for tensor in make_batch()]
    world = dist.group.WORLD
    try:
        results = {name: case(*batch, world) for name, case in CASES.items()}
        random = torch.Generator().manual_seed(rank)
        drawn = ~dl_norm.clip_cov_mask(
            *batch, fraction=0.03, low=0.4, high=2.0, generator=random, group=world
        )
        results["drawn"] = drawn.sum()
        try:
            dl_norm.kl_cov_tokens(batch[0], batch[2], batch[3])
        except ValueError as error:
            results["no group"] = str(error)
    finally:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


def test_over_processes(run_ranks):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo")
    ranks = run_ranks(__file__, RANKS)
    batch = make_batch()
    for name, case in CASES.items():
        whole = case(*batch, None)
        assert whole.any() and not whole.all()
        assert torch.equal(torch.cat([result[name] for result in ranks]), whole), name
    assert sum(result["drawn"].item() for result in ranks) == int(0.03 * batch[3].sum())
    assert all("2 processes, but no group" in result["no group"] for result in ranks)


if __name__ == "__main__":
    worker(int(sys.argv[2]), sys.argv[3])

"""Token losses beside the code of the trainers that have them, in value and gradient.

verl's and TRL's are in test_variants_trainers.py. SkyRL's is that of its wheel; prime-rl, ROLL,
NeMo-RL and torchforge are repositories and need TRAINER_SOURCES. Their code runs in float64.
Budgets: 1e-7 of the largest gradient for the float64 reference, whose weights are float32 and whose
trainers add 1e-8 to denominators; 3e-6 for float32.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from adapter_tools import Lenient, lift, source

import dl_norm
from dl_norm.surrogates import (
    Clip,
    DppoKL,
    DppoTV,
    Drift,
    ImportanceSampling,
    Ipo,
    Nll,
    PolicyGradient,
    Surrogate,
)

IMPLEMENTATIONS = ("triton", "torch", "reference")


def skyrl(name: str, **settings: Any) -> Callable[..., Tensor]:
    utils = "skyrl/backends/skyrl_train/utils"
    tools = vars(lift(f"{utils}/torch_utils.py", "masked_mean", "safe_exp_delta"))
    tools["apply_off_policy_correction"] = lambda loss, old, rollout, mask, config: (loss, mask, {})
    function = getattr(lift(f"{utils}/ppo_utils.py", "reduce_loss", name, **tools), name)
    config = Lenient(dppo=SimpleNamespace(**settings), cispo=SimpleNamespace(**settings))

    def loss(log_probs, old, advantages, mask):
        return function(log_probs, old, advantages, config, mask)[0]

    return loss


def prime_rl(name: str, **settings: Any) -> Callable[..., Tensor]:
    file = "prime-rl/src/prime_rl/trainer/rl/loss.py"
    tools = ("_safe_mean", "compute_importance_ratio_and_mismatch_kl")
    function = getattr(lift(file, *tools, name, LossOutputs=SimpleNamespace), name)

    def loss(log_probs, old, advantages, mask):
        inputs = Lenient(
            trainer_logprobs=log_probs, inference_logprobs=old, advantages=advantages,
            loss_mask=mask,
        )  # fmt: skip
        return function(inputs, SimpleNamespace(adv_tau=1.0, **settings)).loss

    return loss


def roll(variant: str, **settings: Any) -> Callable[..., Tensor]:
    name = f"_compute_{variant}_loss"
    path = "ROLL/roll/pipeline/rlvr/actor_pg_worker.py"
    function = getattr(lift(path, f"ActorPGWorker.{name}", DataProto=None), name)
    worker = Lenient(
        _get_or_cache_config=lambda key, default: settings.get(key, default),
        _cached_metrics={}, _topr_sample_logged=True, _kimi15_config_logged=True,
    )  # fmt: skip

    def loss(log_probs, old, advantages, mask):
        ratio = (log_probs - old).exp()
        given = {"vanilla_pg": (ratio, log_probs, advantages)}
        more = (ratio, log_probs, old, advantages)
        data = SimpleNamespace(batch={"scores": advantages[:, 0]})
        arguments = given.get(variant) or (more if variant == "kimi15" else (*more, data))
        return function(worker, *arguments)[mask].sum()

    return loss


def torchforge() -> Callable[..., Tensor]:
    path = "torchforge/src/forge/losses/reinforce_loss.py"
    function = lift(
        path, "ReinforceLoss.forward", compute_logprobs=lambda logits, ids, align: logits
    ).forward

    def loss(log_probs, old, advantages, mask):
        return function(None, log_probs, None, mask, advantages, old) * mask.sum()

    return loss


KL = {"kl_tau": 0.05}
THEIRS: dict[str, tuple[Callable[[], Callable[..., Tensor]], Surrogate | str]] = {
    "SkyRL dppo, TV": (
        lambda: skyrl(
            "dppo_policy_loss", dppo_type="binary_tv", delta_low=0.05, delta_high=0.03
        ),
        DppoTV(0.05, 0.03),
    ),
    "SkyRL dppo, KL": (
        lambda: skyrl(
            "dppo_policy_loss", dppo_type="binary_kl", delta_low=0.01, delta_high=0.02
        ),
        DppoKL(0.01, 0.02),
    ),
    "SkyRL importance sampling": (
        lambda: skyrl("importance_sampling_loss"), ImportanceSampling(),
    ),
    "prime-rl default": (
        lambda: prime_rl("default_loss_fn", dppo_mask_low=0.05, dppo_mask_high=0.03, **KL),
        "dppo_tv(0.05, 0.03) + drift(0.1)",
    ),
    "prime-rl ipo": (
        lambda: prime_rl("ipo_loss_fn", ipo_threshold=0.04, **KL), Ipo(0.04) + Drift(0.1),
    ),
    "ROLL vanilla": (lambda: roll("vanilla_pg"), "policy_gradient"),
    "ROLL tis": (lambda: roll("tis"), "policy_gradient(0, 1, 0, 1)"),
    "ROLL topr": (lambda: roll("topr"), PolicyGradient(negative_low=0.0)),
    "ROLL kimi15": (lambda: roll("kimi15", kimi15_tau=0.3), "dro(0.3)"),
    "torchforge": (lambda: torchforge(), PolicyGradient(0.1, 10.0, 0.1, 10.0)),
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and mask of six answers, one of them empty."""
    random = torch.Generator().manual_seed(5)
    lengths = torch.tensor([20, 5, 0, 13, 1, 24])
    old = -2 * torch.rand(6, 24, generator=random, dtype=torch.float64)
    step = 0.3 * torch.randn(6, 24, generator=random, dtype=torch.float64)
    mask = torch.arange(24) < lengths[:, None]
    mask[0, 2:4] = False
    advantages = torch.tensor([0.7, -1.2, 1.0, -0.4, 1.3, 0.2], dtype=torch.float64)
    return (old + step).clamp(max=-0.01).requires_grad_(), old, advantages, mask


def policy_loss(impl: str, log_probs: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    if impl == "reference":
        return dl_norm.reference.policy_loss(log_probs, *rest, **options)
    return dl_norm.policy_loss(log_probs.float(), *rest, **options, impl=impl)


def agree(impl: str, ours: Tensor, theirs: Tensor, log_probs: Tensor) -> Tensor:
    """Returns the gradient."""
    (expected,) = torch.autograd.grad(theirs, log_probs, retain_graph=True)
    (got,) = torch.autograd.grad(ours, log_probs)
    budget = 1e-7 if impl == "reference" else 3e-6
    assert (got - expected).abs().amax() <= budget * expected.abs().amax()
    assert ours.item() == pytest.approx(theirs.item(), rel=30 * budget, abs=30 * budget)
    return got


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", THEIRS)
def test_the_trainers_loss(name: str, impl: str) -> None:
    make, surrogate = THEIRS[name]
    log_probs, old, advantages, mask = batch()
    ones = torch.ones(len(mask))
    theirs = make()(log_probs, old, advantages[:, None].expand(old.shape), mask)
    ours = policy_loss(impl, log_probs, old, advantages, mask, ones, surrogate=surrogate)
    got = agree(impl, ours, theirs, log_probs)
    if any(what in name for what in ("dppo", "default", "ipo")):
        # Some tokens are dropped, and not all, for either sign of A.
        everything = ImportanceSampling()
        if "drift" in str(surrogate).lower():
            everything += Drift(0.1)
        whole = policy_loss(impl, log_probs, old, advantages, mask, ones, surrogate=everything)
        (whole,) = torch.autograd.grad(whole, log_probs)
        for sign in (advantages > 0, advantages < 0):
            dropped = ((whole - got).abs() > 1e-4)[mask & sign[:, None]]
            assert dropped.any() and not dropped.all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nemo_rl_nll_of_correct_answers(impl: str) -> None:
    """VAPO's term as NeMo-RL has it, a mean over the tokens of answers with a reward, is a second
    loss. Where the sign of A says which these are, and the weights are the same, one call has
    both."""
    folder = "RL/nemo_rl/algorithms"
    masked_mean = lift(f"{folder}/utils.py", "masked_mean").masked_mean
    log_probs, old, advantages, mask = batch()
    correct = advantages > 0
    term = nll_of(f"{folder}/loss/loss_functions.py", masked_mean)
    theirs = 0.3 * term(log_probs, mask.double(), correct.double())
    weights = torch.ones(len(mask)) / mask[correct].sum()
    second = policy_loss(
        impl, log_probs, None, torch.ones(len(mask)), mask, 0.3 * weights, sequence_mask=correct,
        surrogate="policy_gradient",
    )  # fmt: skip
    agree(impl, second, theirs, log_probs)
    arguments = log_probs, old, advantages, mask, torch.ones(len(mask)) / mask[correct].sum()
    both = policy_loss(impl, *arguments, surrogate=Clip() + Nll(0.3))
    agree(impl, both - policy_loss(impl, *arguments), theirs, log_probs)


def nll_of(path: str, masked_mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """NeMo-RL's lines of the term, which stand in the middle of a long function."""
    text = source(path).read_text()
    found = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.If) and "positive_example_nll_weight" in ast.unparse(node.test)
    ]
    assert len(found) == 1, f"{path} has moved"
    code = compile(ast.Module([found[0]], []), path, "exec")

    def term(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
        space = {
            "self": SimpleNamespace(positive_example_nll_weight=0.3), "mask": mask,
            "data": {"rewards": rewards}, "curr_logprobs": log_probs, "masked_mean": masked_mean,
        }  # fmt: skip
        exec(code, space)
        return space["nll_loss"]

    return term

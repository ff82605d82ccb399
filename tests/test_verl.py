"""Parity with verl 0.9.1's own code: `compute_policy_loss_vanilla` and `agg_loss`.

verl does not install beside current packages, so `ci/verl_env.sh` gives it an environment of its
own. Where verl is importable the checks run in this process; else this file is run once by
`.venv-verl/bin/python`, which answers with one outcome per check; else the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
VERL_PYTHON = ROOT / ".venv-verl" / "bin" / "python"
VERL_VERSION = "0.9.1"

EPS_LOW, EPS_HIGH, DUAL_CLIP = 0.2, 0.3, 3.0
MAX_LENGTH = 40
# Two fp32 evaluations of one formula: exp is good to about 2 ulp and the sums add a few more.
FP32 = 2e-6
# One rounding to bf16 (8 significant bits): half an ulp. Triton's interpreter truncates: a whole
# one.
BF16 = 2.0**-8
BF16_INTERPRETED = 2.0**-7

# verl's mode -> (its loss_scale_factor, the weights that say the same)
MODES: dict[str, tuple[int | None, Callable[[Tensor], Tensor]]] = {
    "token-mean": (None, partial(dl_norm.sequence_weights, method="dapo")),
    "token-sum": (None, lambda lengths: torch.ones_like(lengths, dtype=torch.float32)),
    "seq-mean-token-sum": (
        None,
        partial(dl_norm.sequence_weights, method="dr_grpo", max_length=1),
    ),
    "seq-mean-token-sum-norm": (
        None,  # verl then divides by the padded length
        partial(dl_norm.sequence_weights, method="dr_grpo", max_length=MAX_LENGTH),
    ),
    "seq-mean-token-sum-norm/100": (
        100,
        partial(dl_norm.sequence_weights, method="dr_grpo", max_length=100),
    ),
    "seq-mean-token-mean": (None, partial(dl_norm.sequence_weights, method="grpo")),
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def implementations() -> list[str | None]:
    """The default one, and the kernel where something can run it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [None, "triton"] if interpreted or torch.cuda.is_available() else [None]


def make_batch(dtype: torch.dtype, *, empty: bool = False) -> dict[str, Tensor]:
    """Six sequences of up to 40 tokens that reach every branch: low, high, dual and log clamp."""
    generator = torch.Generator().manual_seed(20250907)
    shape = (6, MAX_LENGTH)
    old = -3 * torch.rand(shape, generator=generator)
    log_ratio = 0.7 * torch.randn(shape, generator=generator)
    log_ratio[:, 3], log_ratio[:, 4] = 25.0, -25.0  # beyond the clamp of 20
    mask = torch.rand(shape, generator=generator) < 0.7  # holes
    mask[:, 3:5] = True
    mask[2, 10:] = False
    if empty:
        mask[4] = False
    batch = {
        "old_log_probs": old.to(dtype),
        "log_probs": (old + log_ratio).to(dtype),
        "advantages": torch.randn(shape, generator=generator),
        "mask": mask,
        "rollout_weights": 2 * torch.rand(shape, generator=generator),
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def run_verl(batch: dict[str, Tensor], mode: str, *, rollout: bool, **global_batch_info):
    """Loss of verl and its gradient with respect to log_prob."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=EPS_LOW,
        clip_ratio_high=EPS_HIGH,
        clip_ratio_c=DUAL_CLIP,
    )
    config.global_batch_info.update(global_batch_info, loss_scale_factor=MODES[mode][0])
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, _ = compute_policy_loss_vanilla(
        old_log_prob=batch["old_log_probs"],
        log_prob=log_probs,
        advantages=batch["advantages"],
        response_mask=batch["mask"],
        loss_agg_mode=mode.split("/")[0],
        config=config,
        rollout_is_weights=batch["rollout_weights"] if rollout else None,
    )
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def run_ours(batch: dict[str, Tensor], weights: Tensor, impl: str | None, *, rollout: bool):
    """dl_norm's loss and gradient with verl's options."""
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss: Any = dl_norm.policy_loss(
        log_probs,
        batch["old_log_probs"],
        batch["advantages"],
        batch["mask"],
        weights,
        eps_low=EPS_LOW,
        eps_high=EPS_HIGH,
        dual_clip=DUAL_CLIP,
        log_ratio_clamp=20.0,
        rollout_weights=batch["rollout_weights"] if rollout else None,
        impl=impl,
    )
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def weights_of(batch: dict[str, Tensor], mode: str) -> Tensor:
    return MODES[mode][1](batch["mask"].sum(-1))


def term_scale(gradient: Tensor) -> float:
    """A size for the errors of the loss: unclipped terms are about as large as the gradient's."""
    return gradient.float().abs().sum().item()


def check_fp32(mode: str, impl: str | None, rollout: bool, empty: bool) -> None:
    """Same loss and gradient from fp32 log-probs."""
    batch = make_batch(torch.float32, empty=empty)
    loss, gradient = run_ours(batch, weights_of(batch, mode), impl, rollout=rollout)
    verl_loss, verl_gradient = run_verl(batch, mode, rollout=rollout)
    assert verl_gradient.abs().max() > 0
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(loss, verl_loss, rtol=FP32, atol=FP32 * term_scale(verl_gradient))
    torch.testing.assert_close(
        gradient, verl_gradient, rtol=FP32, atol=FP32 * verl_gradient.abs().max().item()
    )


def check_bf16(mode: str, impl: str | None) -> None:
    """bf16 log-probs: verl in fp32 on the very same values, and never worse than verl in bf16."""
    batch = make_batch(torch.bfloat16)
    widened = batch | {name: batch[name].float() for name in ("log_probs", "old_log_probs")}
    loss, gradient = run_ours(batch, weights_of(batch, mode), impl, rollout=True)
    true_loss, true_gradient = run_verl(widened, mode, rollout=True)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss, true_loss, rtol=FP32, atol=FP32 * term_scale(true_gradient))
    interpreted = impl == "triton" and device().type == "cpu"
    rtol = BF16_INTERPRETED if interpreted else BF16
    torch.testing.assert_close(gradient.float(), true_gradient, rtol=rtol * (1 + 1e-3), atol=0)

    verl_loss, verl_gradient = run_verl(batch, mode, rollout=True)
    assert (loss - true_loss).abs() <= (verl_loss - true_loss).abs() + FP32 * term_scale(
        true_gradient
    )
    if not interpreted:
        ours, theirs = ((g.float() - true_gradient).abs().max() for g in (gradient, verl_gradient))
        assert ours <= theirs


def check_micro_batches(mode: str, dp_size: int) -> None:
    """Given the global counts, verl on a micro-batch: ours, with the weights cut the same way.

    verl multiplies by dp_size because DDP averages the ranks' gradients.
    """
    batch = make_batch(torch.float32, empty=True)
    weights = weights_of(batch, mode)
    counts = {
        "dp_size": dp_size,
        "batch_num_tokens": int(batch["mask"].sum()),
        "global_batch_size": int((batch["mask"].sum(-1) > 0).sum()),
    }
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        loss, gradient = run_ours(part, weights[rows] * dp_size, None, rollout=False)
        verl_loss, verl_gradient = run_verl(part, mode, rollout=False, **counts)
        scale = term_scale(verl_gradient)
        torch.testing.assert_close(loss, verl_loss, rtol=FP32, atol=FP32 * scale)
        torch.testing.assert_close(
            gradient, verl_gradient, rtol=FP32, atol=FP32 * verl_gradient.abs().max().item()
        )


def check_lifted() -> None:
    """What the benchmarks lift out of verl's source gives the bits of the imported function."""
    sys.path.insert(0, str(ROOT))
    from verl.trainer.ppo import core_algos

    from bench.peers import _verl_compute_loss

    batch = make_batch(torch.float32)
    imported = run_verl(batch, "token-mean", rollout=True)
    for metrics in (False, True):
        original = core_algos.compute_policy_loss_vanilla
        core_algos.compute_policy_loss_vanilla = _verl_compute_loss(metrics)
        try:
            lifted = run_verl(batch, "token-mean", rollout=True)
        finally:
            core_algos.compute_policy_loss_vanilla = original
        assert all(torch.equal(a, b) for a, b in zip(imported, lifted, strict=True))


def check_version() -> None:
    """The code compared with is the release that is named."""
    import verl

    assert verl.__version__ == VERL_VERSION


def make_checks() -> dict[str, Callable[[], None]]:
    checks: dict[str, Callable[[], None]] = {
        "version": check_version,
        "lifted": check_lifted,
    }
    for mode in MODES:
        for impl in (None, "triton"):
            for rollout in (False, True):
                for empty in (False, True):
                    name = f"fp32-{mode}-{impl}-rollout={rollout}-empty={empty}"
                    checks[name] = partial(check_fp32, mode, impl, rollout, empty)
            checks[f"bf16-{mode}-{impl}"] = partial(check_bf16, mode, impl)
        for dp_size in (1, 2):
            checks[f"micro-batches-{mode}-dp={dp_size}"] = partial(
                check_micro_batches, mode, dp_size
            )
    runnable = implementations()
    return {
        name: check
        for name, check in checks.items()
        if "triton" in runnable or "-triton" not in name
    }


CHECKS = make_checks()


def run_checks() -> dict[str, str | None]:
    """One outcome per check: None, or the traceback of what went wrong."""
    outcomes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    if importlib.util.find_spec("verl") is not None:
        return run_checks()
    if not VERL_PYTHON.exists():
        pytest.skip("verl is not installed and .venv-verl does not exist: bash ci/verl_env.sh")
    done = subprocess.run(
        [str(VERL_PYTHON), __file__],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{VERL_PYTHON} failed:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_verl(check: str, outcomes: dict[str, str | None]) -> None:
    problem = outcomes[check]
    assert problem is None, problem


if __name__ == "__main__":
    print(json.dumps(run_checks()))

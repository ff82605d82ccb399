"""OpenRLHF has no hook for the loss: advantages are weighted instead. Parity with its PolicyLoss.

The two files of OpenRLHF 0.11.2 are loaded from `.venv-trainers` (`ci/trainers_env.sh`); importing
the package would need flash_attn and deepspeed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dl_norm

MODELS = Path(__file__).resolve().parents[1] / ".venv-trainers" / "openrlhf" / "models"
ALPHA, M = 0.75, 40
CLIP = {"eps_low": 0.2, "eps_high": 0.3}
# Two float32 sums of the same terms in another order.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-7}


@pytest.fixture(scope="module")
def openrlhf() -> Any:
    if not MODELS.exists():
        pytest.skip("OpenRLHF's files are not there: bash ci/trainers_env.sh")
    patch = pytest.MonkeyPatch()
    # Named at the top of utils.py, not used by what is loaded.
    patch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    package = ModuleType("openrlhf_models")
    package.__path__ = [str(MODELS)]
    patch.setitem(sys.modules, "openrlhf_models", package)
    for name in ("utils", "loss"):
        full = f"openrlhf_models.{name}"
        spec = importlib.util.spec_from_file_location(full, MODELS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)
    yield module
    patch.undo()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-probs, old log-probs, an advantage a response, mask: six responses, one empty."""
    random = torch.Generator().manual_seed(11)
    lengths = torch.tensor([4, 9, 0, 6, 1, 9])
    old = -3 * torch.rand(6, 9, generator=random)
    log_probs = (old + 0.6 * torch.randn(6, 9, generator=random)).requires_grad_()
    mask = (torch.arange(9) < lengths[:, None]).float()
    return log_probs, old, torch.randn(6, generator=random), mask


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weighted_advantages(openrlhf: Any, batch: Any, dual_clip: Any, ranks: int) -> None:
    """OpenRLHF's token-level loss of the reweighted advantages is ours under DeltaL weights.

    It divides by N = ``batch_num_tokens``, the tokens of the step on all ranks, and DeltaL by G M:
    the constant N / (G M) on the advantages makes up for it.
    """
    log_probs, old, advantages, mask = batch
    lengths = (mask != 0).sum(-1)
    tokens, sequences = int(lengths.sum()), int((lengths > 0).sum())
    weighted = dl_norm.reweight_advantages(advantages, lengths, alpha=ALPHA)
    weighted = weighted * tokens / (sequences * M)
    policy_loss = openrlhf.PolicyLoss(
        clip_eps_low=CLIP["eps_low"], clip_eps_high=CLIP["eps_high"], dual_clip=dual_clip
    )
    # Each rank has some rows; its loss is multiplied by dp_size because gradients are averaged.
    loss = sum(
        policy_loss(
            log_probs[part],
            old[part],
            weighted[part, None].expand(-1, 9),
            mask[part],
            dp_size=ranks,
            batch_num_tokens=tokens,
        )[0]
        for part in torch.arange(6).chunk(ranks)
    )
    loss = loss / ranks
    (gradient,) = torch.autograd.grad(loss, log_probs)

    weights = dl_norm.sequence_weights(lengths, alpha=ALPHA, max_length=M)
    ours = dl_norm.policy_loss(
        log_probs, old, advantages, mask, weights, dual_clip=dual_clip, **CLIP
    )
    (our_gradient,) = torch.autograd.grad(ours, log_probs)
    torch.testing.assert_close(ours, loss, **TOLERANCE)
    torch.testing.assert_close(our_gradient, gradient, **TOLERANCE)
    assert gradient.abs().max() > 1e-3  # there is something to compare


def test_without_the_constant_the_scale_follows_the_batch(openrlhf: Any, batch: Any) -> None:
    """Reweighting alone gives the right direction, times G M / N."""
    log_probs, old, advantages, mask = batch
    lengths = (mask != 0).sum(-1)
    tokens, sequences = int(lengths.sum()), int((lengths > 0).sum())
    weighted = dl_norm.reweight_advantages(advantages, lengths, alpha=ALPHA)
    loss = openrlhf.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.3)(
        log_probs, old, weighted[:, None].expand(-1, 9), mask, batch_num_tokens=tokens
    )[0]
    weights = dl_norm.sequence_weights(lengths, alpha=ALPHA, max_length=M)
    ours = dl_norm.policy_loss(log_probs, old, advantages, mask, weights, **CLIP)
    torch.testing.assert_close(loss, ours * sequences * M / tokens, **TOLERANCE)

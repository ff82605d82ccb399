"""SkyRL 0.4: its mini-batch division and its losses, and the installed package if it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_runs import WeightedSkyRLTrainer, skyrl_steps
from adapter_stand_ins import skyrl_config
from adapter_tools import (
    ALPHA,
    ROOT,
    THEIRS,
    Lenient,
    Rollout,
    check_hook,
    fake,
    lift,
    make_rollout,
)

from dl_norm.integrations import rollout as settings_of
from dl_norm.integrations import skyrl


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.mark.parametrize("boundaries", [[(0, 6)], [(0, 3), (3, 6)], [(0, 2), (2, 6)]])
def test_mini_batches(
    rollout: Rollout, boundaries: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the mini-batch steps, in micro-batches of one row, is the whole batch."""
    rollout.check(skyrl_steps(rollout, monkeypatch, boundaries))


@pytest.mark.parametrize(
    "changes", [{"loss_reduction": "token_mean"}, {"advantage_batch_normalize": True}]
)
def test_refuses(rollout: Rollout, changes: dict[str, Any]) -> None:
    data = {"advantages": rollout.advantages[:, None], "loss_mask": rollout.mask}
    with pytest.raises(ValueError, match=next(iter(changes))):
        WeightedSkyRLTrainer(skyrl_config(**changes))._normalize_advantages(data, [(0, 6)])


# Settings of SkyRL's, and whether the kernel can say them.
CORRECTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "token": ({"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.1}, True),
    "sequence": ({"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.3}, True),
    "geometric": (
        {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.05}, True
    ),
    "tokens out of a sequence's ratio": (
        {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.3,
         "token_mask_is_threshold_low": 0.9, "token_mask_is_threshold_high": 1.3}, False,
    ),
}  # fmt: skip


def _check_corrections(rollout: Rollout, ppo: Any, module: Any) -> None:
    """SkyRL's own settings and a ``rollout_correction`` give SkyRL's loss, and not one on top of
    the other; in the kernel, or by SkyRL's function where the kernel cannot say them."""
    sampled = rollout.old + 0.3 * rollout.log_probs.detach().sin()
    batch = rollout.log_probs, rollout.old, rollout.advantages[:, None].expand_as(rollout.old)

    def config(given: dict[str, Any], name: str) -> Any:
        return skyrl_config(off_policy_correction=Lenient(**given), policy_loss_type=name)

    def ours(config: Any, sampled: Any = sampled, **options: Any) -> Any:
        return skyrl.delta_l_policy_loss(
            *batch, config, rollout.mask, rollout_logprobs=sampled, **options
        )

    def check(found: Any, given: dict[str, Any], kernel: bool) -> None:
        loss, metrics = found
        theirs = ppo.ppo_policy_loss(
            *batch, config(given, "regular"), rollout.mask.float(), sampled
        )
        torch.testing.assert_close(loss, theirs[0], **THEIRS)
        gradients = (torch.autograd.grad(x, rollout.log_probs)[0] for x in (loss, theirs[0]))
        torch.testing.assert_close(*gradients, **THEIRS)
        plain = ours(config({}, "delta_l"))[0]
        assert (plain - loss).abs() > 1e-3
        assert ("rollout_weight_mean" in metrics) == kernel
        assert ("is_ratio_mean" in metrics) != kernel

    for given, kernel in CORRECTIONS.values():
        with pytest.MonkeyPatch.context() as patch:
            name = f"{skyrl._UTILS}.off_policy_correction_utils"
            if not kernel:
                fake(patch, name, **vars(module))
            check(ours(config(given, "delta_l")), given, kernel)
    given, _ = CORRECTIONS["token"]
    own = {"rollout_correction": settings_of.skyrl(given)}
    check(ours(config({}, "delta_l"), **own), given, True)
    for given, _ in CORRECTIONS.values():
        with pytest.raises(ValueError, match="would correct twice"):
            ours(config(given, "delta_l"), **own)
        with pytest.raises(ValueError, match="rollout_logprobs is missing"):
            ours(config(given, "delta_l"), None)
    with pytest.raises(ValueError, match="rollout_logprobs is missing"):
        ours(config({}, "delta_l"), None, **own)


def test_real(rollout: Rollout) -> None:
    """SkyRL's own mini-batch division under the mixin; its loss on the same data agrees."""
    utils = "skyrl/backends/skyrl_train/utils"
    torch_utils = lift(f"{utils}/torch_utils.py", "masked_mean", "safe_exp_delta")
    correction = lift(
        f"{utils}/off_policy_correction_utils.py",
        "off_policy_correction_enabled",
        "compute_tis_ratio",
        "compute_outlier_token_mask",
        "compute_token_mask",
        "compute_sequence_mask",
        "compute_off_policy_correction",
        "apply_off_policy_correction",
        **vars(torch_utils),
    )
    ppo = lift(
        f"{utils}/ppo_utils.py",
        "reduce_loss",
        "apply_loss_reduction_to_advantages_minibatch",
        "ppo_policy_loss",
        **vars(torch_utils),
        **vars(correction),
    )
    trainer = lift(
        "skyrl/train/trainer.py",
        "RayPPOTrainer._normalize_advantages",
        apply_loss_reduction_to_advantages_minibatch=(
            ppo.apply_loss_reduction_to_advantages_minibatch
        ),
    )
    check_hook(ppo.ppo_policy_loss, "skyrl")
    _check_corrections(rollout, ppo, correction)
    check_hook(trainer._normalize_advantages, "skyrl trainer")

    class Data(dict):
        def __getitem__(self, key):
            if isinstance(key, slice):
                return {name: stream[key] for name, stream in self.items()}
            return super().__getitem__(key)

    class SkyRLTrainer:
        _normalize_advantages = trainer._normalize_advantages

    class Trainer(skyrl.DeltaLAdvantages, SkyRLTrainer):
        alpha = ALPHA

    config = skyrl_config(
        off_policy_correction=SimpleNamespace(
            tis_ratio_type=None,
            sequence_mask_metric=None,
            **dict.fromkeys(
                f"{kind}_is_threshold_{end}"
                for kind in ("outlier_token", "token_mask")
                for end in ("low", "high")
            ),
        )
    )
    runner = Trainer()
    algorithm = SimpleNamespace(algorithm=config, micro_train_batch_size_per_gpu=1)
    runner.cfg = SimpleNamespace(trainer=algorithm)
    data = Data(
        advantages=rollout.advantages[:, None] * rollout.mask,
        loss_mask=rollout.mask.float(),
        response_mask=torch.ones_like(rollout.mask),
    )
    boundaries = [(0, 2), (2, 6)]
    data = runner._normalize_advantages(data, boundaries)
    totals = {"ours": torch.zeros(()), "theirs": torch.zeros(())}
    for row in range(6):
        part = slice(row, row + 1)
        args = (rollout.log_probs[part], rollout.old[part], data["advantages"][part])
        masks = {"loss_mask": data["loss_mask"][part]}
        loss, metrics = skyrl.delta_l_policy_loss(*args, config=config, **masks)
        config.policy_loss_type = "dual_clip"
        their_loss, their_metrics = ppo.ppo_policy_loss(*args, config=config, **masks)
        config.policy_loss_type = "delta_l_dual_clip"
        assert metrics == pytest.approx(their_metrics)
        totals = {"ours": totals["ours"] + loss, "theirs": totals["theirs"] + their_loss}
    rollout.check(totals["theirs"] / len(boundaries))
    rollout.check(totals["ours"] / len(boundaries))


SKYRL_PYTHON = Path(os.environ.get("SKYRL_PYTHON", ROOT / ".venv-skyrl" / "bin" / "python"))
# Runs where SkyRL is installed. Rounded alike: two float32 sums of the same terms.
IN_SKYRL = """
import torch
from ray import cloudpickle
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from skyrl.train.config import AlgorithmConfig
from dl_norm.integrations import skyrl as delta_l

delta_l.register(log_ratio_clamp=None)  # an option of one's own; no ratio here is clamped
assert {"delta_l", "delta_l_dual_clip"} <= set(PolicyLossRegistry.list_available())
# Ray's workers get it pickled.
assert cloudpickle.loads(cloudpickle.dumps(PolicyLossRegistry.get("delta_l"))).keywords
random = torch.Generator().manual_seed(1)
old = -3 * torch.rand(4, 9, generator=random)
new = (old + 0.6 * torch.randn(4, 9, generator=random)).requires_grad_()
sampled = old + 0.3 * torch.randn(4, 9, generator=random)
mask = (torch.rand(4, 9, generator=random) < 0.8).float()
advantages = torch.randn(4, 1, generator=random).expand(4, 9) / 160
for ours, theirs in (("delta_l", "regular"), ("delta_l_dual_clip", "dual_clip")):
    for correct in (None, "token", "sequence"):
        results = []
        for name in (ours, theirs):
            config = AlgorithmConfig(
                policy_loss_type=name, loss_reduction="seq_mean_token_sum_norm", max_seq_len=40
            )
            if correct:
                config.off_policy_correction.tis_ratio_type = correct
                config.off_policy_correction.token_mask_is_threshold_low = 0.7
                config.off_policy_correction.token_mask_is_threshold_high = 1.5
            loss, metrics = PolicyLossRegistry.get(name)(
                new, old, advantages, config=config, loss_mask=mask, rollout_logprobs=sampled
            )
            results.append((loss, torch.autograd.grad(loss, new)[0], metrics))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-6, atol=2e-7)
        mine, other = results[0][2], results[1][2]
        assert all(type(v) is float for v in mine.values())
        # The token mask beside the weight of a sequence is left to SkyRL, with its metrics.
        assert (mine.keys() == other.keys()) == (correct != "token")
        assert ("rollout_weight_mean" in mine) == (correct == "token")
        # SkyRL counts clipped tokens before its correction masks any, ours after.
        if not correct:
            assert abs(mine["clip_ratio"] - other["clip_ratio"]) < 1e-6
print("agreed")
"""


def test_registry() -> None:
    """SkyRL itself: registration, its configuration class, both of its losses, its correction."""
    if not SKYRL_PYTHON.exists():
        pytest.skip("no .venv-skyrl: bash ci/skyrl_env.sh (Python 3.12)")
    done = subprocess.run(
        [str(SKYRL_PYTHON), "-c", IN_SKYRL],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout + done.stderr

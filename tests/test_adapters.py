"""The adapters of trainers that are not installed here: signatures, and the gradient of the whole
batch on data shaped and divided as each trainer does it.

`test_adapters_real.py` does the same with the trainers' own code where that can be had.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dl_norm
from dl_norm.integrations import areal, carried, nemo_rl, prime_rl, skyrl, slime, torchforge

ALPHA, M = 0.75, 40
LENGTHS = [3, 8, 0, 5, 1, 8]  # one response is empty
T = max(LENGTHS)
CLIP = {"eps_low": 0.2, "eps_high": 0.3, "dual_clip": 3.0}
# Two float32 sums of the same terms, one with the weights on the advantages.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-7}


@dataclass
class Rollout:
    """Six responses of a rollout, padded to T."""

    log_probs: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor  # (B,)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)

    def true(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Loss and gradient in float64 of the whole batch in one piece."""
        log_probs = self.log_probs.detach().double().requires_grad_()
        weights = dl_norm.sequence_weights(self.lengths, alpha=ALPHA, max_length=M)
        loss = dl_norm.reference.policy_loss(
            log_probs, self.old, self.advantages, self.mask, weights, **{**CLIP, **options}
        )
        loss.backward()
        return loss.detach().float(), log_probs.grad.float()

    def check(self, loss: Tensor, **options: Any) -> None:
        """``loss`` is that of the whole batch, its gradient by ``log_probs`` included."""
        true_loss, true_gradient = self.true(**options)
        (gradient,) = torch.autograd.grad(loss, self.log_probs)
        torch.testing.assert_close(loss.detach().float(), true_loss, **TOLERANCE)
        torch.testing.assert_close(gradient, true_gradient, **TOLERANCE)


@pytest.fixture
def rollout() -> Rollout:
    random = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), T)
    old = -3 * torch.rand(shape, generator=random)
    log_probs = old + 0.6 * torch.randn(shape, generator=random)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[1, 2:4] = False  # a tool's tokens
    return Rollout(
        log_probs.requires_grad_(), old, mask, torch.randn(len(LENGTHS), generator=random)
    )


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A stand-in for module ``name`` and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if depth > 1:
            parent = sys.modules[".".join(parts[: depth - 1])]
            monkeypatch.setattr(parent, parts[depth - 1], sys.modules[path], raising=False)
    for key, value in contents.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


# As read in the versions named in the adapters; `test_adapters_real.py` reads them from the source.
SIGNATURES = {
    "skyrl": "log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None",
    "skyrl trainer": "self, data, mini_batch_boundaries, prompt_boundaries=None",
    "prime-rl compute_loss": (
        "trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask, rl_weights, "
        "ce_weights, ref_kl_weights, rl_loss_fn, rl_scale, ce_scale, ref_kl_scale"
    ),
    "slime": "args, batch, logits, sum_of_sample_mean",
    "slime reducer": (
        "total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False"
    ),
    "slime advantages": "args, rollout_data",
    "nemo-rl": "self, next_token_logprobs, data, global_valid_seqs, global_valid_toks",
    "nemo-rl estimator": "self, prompt_ids, rewards, mask, **kwargs",
    "areal": ("self, logprobs, entropy, input_data, vocab_min_logits=None, vocab_max_logits=None"),
    "areal weight": "self, input_data",
    # Keyword arguments, from collate's targets; `weights` is the one that is added.
    "torchforge": (
        "logits, response, ref_logprobs, advantages, padding_mask, weights=None, beta=0.1"
    ),
    "roll": "self, data, output_tensor",
}
HOOKS = {
    "skyrl": skyrl.delta_l_policy_loss,
    "skyrl trainer": skyrl.DeltaLAdvantages._normalize_advantages,
    "prime-rl compute_loss": prime_rl.make_compute_loss(),
    "slime": slime.policy_loss,
    "slime reducer": slime.pg_loss_reducer,
    "slime advantages": slime.advantages,
    "nemo-rl": nemo_rl.DeltaLLossFn.__call__,
    "nemo-rl estimator": nemo_rl.WeightedEstimator.compute_advantage,
    "areal": areal.DeltaLLoss.__call__,
    "areal weight": areal.DeltaLLoss.weight,
    "torchforge": torchforge.delta_l_loss,
}


def plain(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


@pytest.mark.parametrize("hook", HOOKS)
def test_signature(hook: str) -> None:
    assert plain(HOOKS[hook]) == SIGNATURES[hook]


# -- the shared core


def test_factors_are_the_weights(rollout: Rollout) -> None:
    factors = carried.row_factors(rollout.lengths, alpha=ALPHA)
    weights = dl_norm.sequence_weights(rollout.lengths, alpha=ALPHA, max_length=M)
    torch.testing.assert_close(factors / (len(LENGTHS) * M), weights)


def test_packed_is_one_call(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed sequences reach the packed path once, with cu_seqlens."""
    calls = []
    original = dl_norm.policy_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["cu_seqlens"].tolist())
        return original(*args, **kwargs)

    monkeypatch.setattr(dl_norm, "policy_loss", counted)
    streams = [rollout.log_probs, rollout.old, rollout.advantages[:, None].expand(-1, T)]
    split = [[row[:n] for row, n in zip(s, LENGTHS, strict=True)] for s in streams]
    masks = [row[:n] for row, n in zip(rollout.mask, LENGTHS, strict=True)]
    prime_rl.make_compute_loss()(*split[:2], None, split[2], masks, *[None] * 4, 7, 1, 1)
    assert calls == [[0, 3, 11, 11, 16, 17, 25]]


def test_the_trainer_s_mask_is_left_alone(rollout: Rollout) -> None:
    mask = rollout.mask.float() * 2  # float, as SkyRL's and NeMo-RL's
    before = mask.clone(), mask._version
    carried.carried_loss(rollout.log_probs, rollout.old, rollout.advantages, mask)
    assert torch.equal(mask, before[0]) and mask._version == before[1]


# -- SkyRL


def skyrl_config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "policy_loss_type": "delta_l_dual_clip",
            "loss_reduction": "seq_mean_token_sum_norm",
            "max_seq_len": M,
            "eps_clip_low": CLIP["eps_low"],
            "eps_clip_high": CLIP["eps_high"],
            "clip_ratio_c": CLIP["dual_clip"],
            "advantage_batch_normalize": False,
            **changes,
        }
    )


class SkyRLTrainer:
    """SkyRL's division of a mini-batch's advantages by its rows and max_seq_len."""

    def __init__(self, config: SimpleNamespace):
        self.cfg = SimpleNamespace(trainer=SimpleNamespace(algorithm=config))

    def _normalize_advantages(self, data, mini_batch_boundaries, prompt_boundaries=None):
        for start, end in mini_batch_boundaries:
            data["advantages"][start:end] /= (end - start) * self.cfg.trainer.algorithm.max_seq_len
        return data


class WeightedSkyRLTrainer(skyrl.DeltaLAdvantages, SkyRLTrainer):
    alpha = ALPHA


@pytest.mark.parametrize("boundaries", [[(0, 6)], [(0, 3), (3, 6)], [(0, 2), (2, 6)]])
def test_skyrl(rollout: Rollout, boundaries: list[tuple[int, int]]) -> None:
    """The mean of the mini-batch steps, in micro-batches of one row, is the whole batch."""
    config = skyrl_config()
    data = {
        "advantages": rollout.advantages[:, None] * torch.ones(T),
        "loss_mask": rollout.mask.float(),
    }
    data = WeightedSkyRLTrainer(config)._normalize_advantages(data, boundaries)
    total = torch.zeros(())
    for start, end in boundaries:
        for row in range(start, end):
            part = slice(row, row + 1)
            loss, metrics = skyrl.delta_l_policy_loss(
                rollout.log_probs[part],
                rollout.old[part],
                data["advantages"][part],
                config=config,
                loss_mask=data["loss_mask"][part],
                rollout_logprobs=None,
            )
            assert isinstance(metrics["clip_ratio"], float)
            total = total + loss
    rollout.check(total / len(boundaries))


@pytest.mark.parametrize(
    "changes", [{"loss_reduction": "token_mean"}, {"advantage_batch_normalize": True}]
)
def test_skyrl_refuses(rollout: Rollout, changes: dict[str, Any]) -> None:
    data = {"advantages": rollout.advantages[:, None], "loss_mask": rollout.mask}
    with pytest.raises(ValueError, match=next(iter(changes))):
        WeightedSkyRLTrainer(skyrl_config(**changes))._normalize_advantages(data, [(0, 6)])


# -- prime-rl


def prime_samples(rollout: Rollout, **changes: Any) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            **{
                "mask": [False, *mask[:n].tolist()],  # a prompt token first
                "advantages": [0.0, *([advantage] * n)],
                "rl_weights": None,
                **changes,
            }
        )
        for mask, advantage, n in zip(
            rollout.mask, rollout.advantages.tolist(), LENGTHS, strict=True
        )
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_prime_rl(rollout: Rollout, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    samples = prime_samples(rollout)
    prime_rl.weight_samples(samples, alpha=ALPHA, max_length=M)
    count = int(rollout.mask.sum())
    streams = {
        "trainer_logprobs": [row[:n] for row, n in zip(rollout.log_probs, LENGTHS, strict=True)],
        "inference_logprobs": [row[:n] for row, n in zip(rollout.old, LENGTHS, strict=True)],
        "advantages": [torch.tensor(sample.advantages[1:]) for sample in samples],
        "loss_mask": [torch.tensor(sample.mask[1:], dtype=torch.bool) for sample in samples],
    }
    if packed:
        loss, metrics = prime_rl.make_compute_loss(**CLIP)(
            **streams,
            **dict.fromkeys(("ref_logprobs", "rl_weights", "ce_weights", "ref_kl_weights")),
            rl_loss_fn=None,
            rl_scale=count,
            ce_scale=1,
            ref_kl_scale=1,
        )
    else:
        outputs = [
            prime_rl.delta_l_loss(SimpleNamespace(**inputs, loss_weights=None), **CLIP)
            for inputs in (
                dict(zip(streams, values, strict=True))
                for values in zip(*streams.values(), strict=True)
            )
        ]
        metrics = outputs[0].metrics
        assert all(value.ndim == 0 for value in metrics.values())
        loss = torch.stack([output.loss for output in outputs]).sum() / count
    assert set(metrics) == {"is_masked", "is_masked_low", "is_masked_high"}
    rollout.check(loss)


def test_prime_rl_weight_stream(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or one by one, rl weights multiply the loss, and 0 takes a token out."""
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    weights = (torch.arange(len(LENGTHS) * T) % 3).view(-1, T) * 0.5
    old = rollout.old.masked_fill(weights == 0, torch.nan)  # must not be read
    streams = (rollout.log_probs, old, rollout.old, rollout.mask, weights)
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "loss_weights")
    one_by_one = torch.zeros(())
    for row in zip(*streams, strict=True):
        inputs = dict(zip(names, row, strict=True))
        inputs["loss_mask"] = inputs["loss_mask"] & (inputs["loss_weights"] != 0)
        one_by_one = one_by_one + prime_rl.delta_l_loss(SimpleNamespace(**inputs)).loss
    log_probs, old, advantages, mask, weights = map(list, streams)
    packed, _ = prime_rl.make_compute_loss()(
        log_probs, old, None, advantages, mask, weights, None, None, None, 7, 1, 1
    )
    torch.testing.assert_close(packed * 7, one_by_one, **TOLERANCE)


def test_prime_rl_counts_what_the_trainer_counts() -> None:
    """rl_weights of 0 take a token out; advantages may be missing only where nothing counts."""
    sample = SimpleNamespace(mask=[True] * 3, advantages=[1.0] * 3, rl_weights=[1.0, 0.0, 2.0])
    other = SimpleNamespace(mask=[True], advantages=None, rl_weights=[0.0])
    prime_rl.weight_samples([sample, other], alpha=1.0, max_length=10)
    assert sample.advantages == pytest.approx([2 / 10] * 3)  # x = 1/10, N = 2
    other.rl_weights = None
    with pytest.raises(ValueError, match="no advantages"):
        prime_rl.weight_samples([sample, other], alpha=1.0, max_length=10)


def test_prime_rl_refuses_other_components(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="ce_weights"):
        prime_rl.make_compute_loss()(
            *[[torch.ones(2)]] * 2,
            None,
            [torch.ones(2)],
            [torch.ones(2).bool()],
            None,
            [torch.ones(2)],
            *[None] * 2,
            *[1] * 3,
        )


# -- slime


def slime_args(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "delta_l_alpha": ALPHA,
            "delta_l_max_length": M,
            "calculate_per_token_loss": False,
            "normalize_advantages": False,
            "eps_clip": CLIP["eps_low"],
            "eps_clip_high": CLIP["eps_high"],
            "eps_clip_c": CLIP["dual_clip"],
            "use_rollout_logprobs": False,
            **changes,
        }
    )


def slime_batch(rollout: Rollout) -> dict[str, Any]:
    """slime's rollout data: lists of (L_i,) streams. Lengths are those of the responses."""

    def cut(stream: Tensor) -> list[Tensor]:
        return [row[:n] for row, n in zip(stream, LENGTHS, strict=True)]

    return {
        "rewards": rollout.advantages.tolist(),
        "response_lengths": LENGTHS,
        "total_lengths": [n + 2 for n in LENGTHS],
        "loss_masks": cut(rollout.mask.int()),
        "kl": cut(torch.zeros_like(rollout.old)),
        "log_probs": cut(rollout.old),
        "new_log_probs": cut(rollout.log_probs),
        "unconcat_tokens": None,
    }


@pytest.fixture
def slime_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "megatron.core", mpu=SimpleNamespace(get_data_parallel_group=lambda: None))
    fake(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        # The "logits" of these tests are the list of log-probs.
        get_log_probs_and_entropy=lambda logits, **_: (None, {"log_probs": logits}),
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )


@pytest.mark.usefixtures("slime_modules")
@pytest.mark.parametrize("hook", ["reducer", "loss"])
def test_slime(rollout: Rollout, hook: str) -> None:
    args, batch = slime_args(), slime_batch(rollout)
    slime.advantages(args, batch)
    keys = ("response_lengths", "total_lengths", "loss_masks", "log_probs", "advantages")
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 6)):
        micro = {key: batch[key][part] for key in keys} | {"unconcat_tokens": None}
        log_probs = batch["new_log_probs"][part]
        if hook == "loss":
            loss, metrics = slime.policy_loss(args, micro, log_probs, None)
            assert set(metrics) == {"loss", "pg_loss", "pg_clipfrac", "ppo_kl"}
            assert all(value.ndim == 0 for value in metrics.values())
        else:
            # The token losses as slime has them, NaN where masked: the reducer must not see it.
            tokens = torch.cat(
                [
                    -torch.where(
                        a < 0,
                        torch.clamp((new - old).exp(), 1 - CLIP["eps_low"], CLIP["dual_clip"]),
                        torch.clamp((new - old).exp(), max=1 + CLIP["eps_high"]),
                    )
                    * a
                    for new, old, a in zip(
                        log_probs, micro["log_probs"], micro["advantages"], strict=True
                    )
                ]
            )
            tokens = tokens.masked_fill(torch.cat(micro["loss_masks"]) == 0, torch.nan)
            loss = slime.pg_loss_reducer(
                micro["total_lengths"], micro["response_lengths"], micro["loss_masks"]
            )(tokens)
        total = total + loss
    rollout.check(total / len(LENGTHS))


@pytest.mark.usefixtures("slime_modules")
@pytest.mark.parametrize(
    "change",
    ["calculate_per_token_loss", "use_kl_loss", "use_tis", "entropy_coef", "normalize_advantages"],
)
def test_slime_refuses(rollout: Rollout, change: str) -> None:
    args, batch = slime_args(**{change: True}), slime_batch(rollout)
    call = slime.advantages if change == "normalize_advantages" else slime.policy_loss
    with pytest.raises(ValueError, match=change.replace("_", "[-_]")):
        call(args, batch, *([batch["new_log_probs"], None] if call is slime.policy_loss else []))


@pytest.mark.usefixtures("slime_modules")
def test_slime_needs_the_constant(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="delta_l_max_length"):
        slime.advantages(slime_args(delta_l_max_length=None), slime_batch(rollout))


# -- NeMo-RL


def fake_nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(
        monkeypatch,
        "nemo_rl.algorithms.loss.interfaces",
        LossInputType=Enum("LossInputType", {"LOGPROB": "logprob"}),
        LossType=Enum("LossType", {"SEQUENCE_LEVEL": auto()}),
        MetricNormalizer=Enum("MetricNormalizer", {"TOKENS": 1, "SEQUENCES": 2, "NONE": 3}),
    )


@pytest.fixture
def nemo_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nemo_rl(monkeypatch)


NEMO = {
    "ratio_clip_min": CLIP["eps_low"],
    "ratio_clip_max": CLIP["eps_high"],
    "ratio_clip_c": CLIP["dual_clip"],
    "reference_policy_kl_penalty": 0.0,
}


def nemo_data(rollout: Rollout) -> dict[str, Tensor]:
    """NeMo-RL's streams have a position more than the log-probs, in front."""

    def shifted(stream: Tensor) -> Tensor:
        return torch.nn.functional.pad(stream, (1, 0))

    class Grpo:
        def compute_advantage(self, prompt_ids, rewards, mask, **kwargs):
            return rewards[:, None].expand(mask.shape)

    token_mask = shifted(rollout.mask.int())
    advantages = nemo_rl.WeightedEstimator(Grpo(), alpha=ALPHA).compute_advantage(
        prompt_ids=None, rewards=rollout.advantages, mask=token_mask
    )
    return {
        "token_mask": token_mask,
        "sample_mask": (rollout.lengths > 0).float(),
        "advantages": advantages,
        "prev_logprobs": shifted(rollout.old),
        "generation_logprobs": shifted(rollout.old),
    }


@pytest.mark.usefixtures("nemo_modules")
def test_nemo_rl(rollout: Rollout) -> None:
    loss_fn = nemo_rl.DeltaLLossFn(NEMO, max_length=M)
    data = nemo_data(rollout)
    counts = data["sample_mask"].sum(), rollout.mask.sum()
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 6)):
        micro = {name: stream[part] for name, stream in data.items()}
        loss, metrics = loss_fn(rollout.log_probs[part], micro, *counts)
        assert all(isinstance(value, float) for value in metrics.values())
        total = total + loss
    # exp is not clamped in NeMo-RL; no ratio here comes near the clamp.
    rollout.check(total)


@pytest.mark.usefixtures("nemo_modules")
@pytest.mark.parametrize("missing", ["global_valid_seqs", "global_valid_toks"])
def test_nemo_rl_needs_both_counts(rollout: Rollout, missing: str) -> None:
    counts = {"global_valid_seqs": torch.tensor(5.0), "global_valid_toks": torch.tensor(20.0)}
    with pytest.raises(ValueError, match=missing):
        nemo_rl.DeltaLLossFn(NEMO, max_length=M)(
            rollout.log_probs, nemo_data(rollout), **(counts | {missing: None})
        )


@pytest.mark.usefixtures("nemo_modules")
@pytest.mark.parametrize(
    "changes",
    [
        {"reference_policy_kl_penalty": 0.01},
        {"use_cispo": True},
        {"truncated_importance_sampling_type": "tis"},
        {"sequence_level_importance_ratios": True},
    ],
)
def test_nemo_rl_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        nemo_rl.DeltaLLossFn(NEMO | changes, max_length=M)


# -- torchforge


def forge_targets(rollout: Rollout, logits: Tensor) -> tuple[list[dict], list[Tensor], list[slice]]:
    parts = [slice(0, 2), slice(2, 6)]  # two data-parallel ranks
    random = torch.Generator().manual_seed(3)
    response = torch.randint(0, 11, (len(LENGTHS), T), generator=random)

    def collate(batches: Any) -> tuple[list[dict], list[dict]]:
        return [{} for _ in parts], [
            {
                "response": response[part],
                "ref_logprobs": rollout.old[part],
                "advantages": rollout.advantages[part, None],
                "padding_mask": rollout.mask[part],
            }
            for part in parts
        ]

    _, targets = torchforge.weighted(collate, alpha=ALPHA, max_length=M)(None)
    return targets, [logits[part] for part in parts], parts


@pytest.mark.parametrize("compiled", [False, True])
def test_torchforge(rollout: Rollout, compiled: bool) -> None:
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(len(LENGTHS), T + 3, 11, generator=random, requires_grad=True)
    targets, parts, _ = forge_targets(rollout, logits)
    f = torchforge.delta_l_loss
    f = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    loss = torch.stack([f(part, **t) for part, t in zip(parts, targets, strict=True)]).mean()
    (gradient,) = torch.autograd.grad(loss, logits)

    log_probs = logits.double()[:, -T - 1 : -1].log_softmax(-1)
    response = torch.cat([t["response"] for t in targets])
    true = dl_norm.reference.policy_loss(
        log_probs.gather(-1, response[..., None])[..., 0],
        None,
        rollout.advantages,
        rollout.mask,
        dl_norm.sequence_weights(rollout.lengths, alpha=ALPHA, max_length=M),
        ref_log_probs=rollout.old,
        beta=0.1,
    )
    (true_gradient,) = torch.autograd.grad(true, logits)
    torch.testing.assert_close(loss, true.float(), **TOLERANCE)
    torch.testing.assert_close(gradient, true_gradient, **TOLERANCE)


def test_torchforge_needs_weights(rollout: Rollout) -> None:
    logits = torch.zeros(len(LENGTHS), T + 1, 11)
    targets, parts, _ = forge_targets(rollout, logits)
    del targets[0]["weights"]
    with pytest.raises(ValueError, match="weights are missing"):
        torchforge.delta_l_loss(parts[0], **targets[0])


# -- AReaL


def areal_batches(rollout: Rollout) -> list[tuple[Tensor, dict[str, Any]]]:
    """Two packed micro-batches with padding at the end of each row cut off."""
    batches = []
    for rows in ([0, 1, 2], [3, 4, 5]):
        keep = [LENGTHS[row] for row in rows]

        def pack(stream: Tensor, rows=rows, keep=keep) -> Tensor:
            return torch.cat([stream[row, :n] for row, n in zip(rows, keep, strict=True)])

        batches.append(
            (
                pack(rollout.log_probs),
                {
                    "logprobs": pack(rollout.old),
                    "advantages": pack(rollout.advantages[:, None].expand(-1, T)),
                    "loss_mask": pack(rollout.mask),
                    "cu_seqlens": carried.offsets(keep, torch.device("cpu")).int(),
                },
            )
        )
    return batches


def test_areal(rollout: Rollout) -> None:
    stats = StatsTracker()
    hook = areal.DeltaLLoss(alpha=ALPHA, max_length=M, **CLIP, stats=stats)
    batches = areal_batches(rollout)
    weights = torch.stack([hook.weight(data) for _, data in batches])
    total = sum(
        hook(log_probs, torch.zeros_like(log_probs), data) * weight / weights.sum()
        for (log_probs, data), weight in zip(batches, weights, strict=True)
    )
    rollout.check(total)
    assert {"approx_kl", "clip_ratio", "importance_weight", "entropy"} <= stats.names


class StatsTracker:
    """Takes what AReaL's stats_tracker takes."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def denominator(self, **masks: Tensor) -> None:
        assert all(mask.dtype == torch.bool for mask in masks.values())

    def stat(self, denominator: str, **streams: Tensor) -> None:
        assert denominator == "n_valid_tokens"
        assert all(stream.dtype == torch.float32 for stream in streams.values())
        self.names |= set(streams)


def test_areal_needs_offsets(rollout: Rollout) -> None:
    log_probs, data = areal_batches(rollout)[0]
    del data["cu_seqlens"]
    hook = areal.DeltaLLoss(max_length=M)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hook(log_probs, log_probs, data)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hook.weight(data)


@pytest.mark.parametrize("options", [{"max_length": 0}, {"max_length": 9, "eps_low": 2.0}])
def test_areal_bad_options_raise_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        areal.DeltaLLoss(**options)


# -- ROLL


class RollActorWorker:
    """What ROLL's actor worker is to its hook: steps of micro-batches, as its FSDP2 strategy."""

    def __init__(self, **changes: Any):
        self.pipeline_config = SimpleNamespace(
            **{
                "response_length": M,
                "difficulty_loss_weight": False,
                "length_loss_weight": False,
                "entropy_loss_coef": 0.0,
                "importance_sampling": "token",
                "use_pg_clip_range": True,
                "pg_clip_low": CLIP["eps_low"],
                "pg_clip_high": CLIP["eps_high"],
                "pg_clip": 1.0,  # dual clip 1 + 2 pg_clip = 3
                "dual_clip_loss": True,
                "use_kl_loss": False,
                "rl_loss_coef": 1.0,
                "enable_old_logprobs_recompute": True,
                "train_infer_correction": SimpleNamespace(is_weight=SimpleNamespace(enabled=False)),
                **changes,
            }
        )
        self.worker_config = SimpleNamespace(
            use_dynamic_batching_in_train=False,
            apply_loss_scale=changes.get("apply_loss_scale", True),
            training_args=SimpleNamespace(
                per_device_train_batch_size=1, gradient_accumulation_steps=3
            ),
        )
        self.strategy = SimpleNamespace(
            get_data_input=lambda data: data,
            op_compute_log_probs=lambda logits, input_ids, attention_mask: logits,
        )

    def get_old_log_probs_with_cache(self, data, log_probs):
        return data.batch["old_log_probs"]

    def train_step(self, data):
        self.losses, self.metrics = [], []
        for row in range(len(data)):
            part = slice(row, row + 1)
            micro = SimpleNamespace(
                batch={name: stream[part] for name, stream in data.batch.items()},
                meta_info={"batch_num_tokens": {"response_mask": torch.tensor(20)}},
            )
            loss, metrics = self.loss_func(micro, micro.batch["logits"])
            self.losses.append(loss)
            self.metrics.append(metrics)
        return data


class RollBatch(SimpleNamespace):
    def __len__(self) -> int:
        return len(LENGTHS)


def import_roll(monkeypatch: pytest.MonkeyPatch, worker: type | None = None) -> Any:
    """The adapter, which imports ROLL, over stand-ins."""
    fake(
        monkeypatch,
        "roll.distributed.scheduler.decorator",
        Dispatch=SimpleNamespace(DP_MP_DISPATCH_FIRST=None),
        register=lambda **_: lambda function: function,
    )
    fake(monkeypatch, "roll.pipeline.rlvr.actor_worker", ActorWorker=worker or RollActorWorker)
    fake(monkeypatch, "roll.utils.train_infer_corrections", compute_train_infer_correction=None)
    # Noted as absent first, so that it is absent again afterwards.
    monkeypatch.setitem(sys.modules, "dl_norm.integrations.roll", None)
    del sys.modules["dl_norm.integrations.roll"]
    return importlib.import_module("dl_norm.integrations.roll")


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_roll(monkeypatch)


def roll_batch(rollout: Rollout) -> RollBatch:
    return RollBatch(
        batch={
            "input_ids": torch.zeros(len(LENGTHS), T + 1),
            "response_mask": torch.nn.functional.pad(rollout.mask.int(), (1, 0)),
            "advantages": rollout.advantages[:, None] * rollout.mask,
            "old_log_probs": rollout.old,
            "logits": rollout.log_probs,
        },
        meta_info={},
    )


def test_roll(rollout: Rollout, roll: Any) -> None:
    """Two steps of three rows each on one rollout: their mean is the whole."""
    worker = type("Worker", (roll.DeltaLActorWorker,), {"alpha": ALPHA})()
    assert plain(roll.DeltaLActorWorker.loss_func) == SIGNATURES["roll"]
    worker.train_step(roll_batch(rollout))
    rollout.check(torch.stack(worker.losses).sum() / 2)
    names = set(worker.metrics[0])
    assert {"actor/pg_loss@sum", "actor/ppo_ratio_clipfrac@sum", "actor/ratio_max@max"} <= names


RANK = """
import sys
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
import test_adapters as t
import dl_norm
from dl_norm.integrations import carried

rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mask = torch.arange(t.T) < torch.tensor(t.LENGTHS)[:, None]
mine = mask[:2] if rank == 0 else mask[2:]
whole = dl_norm.sequence_weights(mask.sum(-1), alpha=t.ALPHA, max_length=t.M, group="local")
part = whole[:2] if rank == 0 else whole[2:]

factors = carried.row_factors(mine.sum(-1), alpha=t.ALPHA, group=dist.group.WORLD)
torch.testing.assert_close(factors / (len(t.LENGTHS) * t.M), part)

patch = pytest.MonkeyPatch()
worker = type("Worker", (t.import_roll(patch).DeltaLActorWorker,), {"alpha": t.ALPHA})()
# Data parallel: each has its rows. Tensor parallel: both have all of them.
for dp_size, rows, expected in ((2, mine, part), (1, mask, whole)):
    worker.rank_info = t.SimpleNamespace(dp_size=dp_size)
    torch.testing.assert_close(worker._weights(rows), expected)
dist.destroy_process_group()
"""


def test_weights_over_two_ranks(tmp_path: Path) -> None:
    """slime's and ROLL's weights come from all ranks, however the rows are spread or copied."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(Path(__file__).parent), tmp_path / "store", str(rank)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize(
    "changes",
    [
        {"importance_sampling": "seq"},
        {"entropy_loss_coef": 0.1},
        {"length_loss_weight": True},
        {"apply_loss_scale": False},
    ],
)
def test_roll_refuses(rollout: Rollout, roll: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        roll.DeltaLActorWorker(**changes).train_step(roll_batch(rollout))


def test_roll_needs_weights(rollout: Rollout, roll: Any) -> None:
    with pytest.raises(ValueError, match="delta_l_weights is missing"):
        roll.DeltaLActorWorker().loss_func(roll_batch(rollout), rollout.log_probs)


# -- what is missing says what to install


def test_missing_trainers_are_named(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skyrl", "prime_rl", "slime", "megatron", "nemo_rl", "roll"):
        monkeypatch.setitem(sys.modules, name, None)  # not importable, even if it is installed
    inputs = SimpleNamespace(**{name: torch.ones(2) for name in ("trainer_logprobs",)})
    for call, words in (
        (skyrl.register, "pip install 'skyrl"),
        (lambda: prime_rl.delta_l_loss(inputs), "needs prime-rl"),
        (lambda: nemo_rl.DeltaLLossFn(NEMO, max_length=M), "needs NeMo-RL"),
        (lambda: slime.advantages(slime_args(), slime_batch(rollout)), "needs slime"),
        (lambda: slime.policy_loss(slime_args(), {}, torch.ones(1), None), "needs slime"),
        (lambda: importlib.import_module("dl_norm.integrations.roll"), "needs ROLL"),
    ):
        with pytest.raises(ImportError, match=words):
            call()

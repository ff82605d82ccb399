"""torchtitan's RL trainer: its real batcher, losses and chunked head around the adapter.

Of the wheel only these modules run; what they import besides (structured logging, type checks of
sharding, the configuration's command line) is stood in for.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_stand_ins import import_torchtitan, titan_samples
from adapter_tools import (
    ALPHA,
    CLIP,
    LENGTHS,
    THEIRS,
    TOLERANCE,
    M,
    Rollout,
    T,
    check_hook,
    fake,
    forget,
    fresh_import,
    hollow,
    make_rollout,
)
from torch import Tensor

import dl_norm

VOCABULARY = 11


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.fixture
def titan(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The adapter over torchtitan's own batcher, loss base and losses."""
    hollow(
        monkeypatch,
        "torchtitan",
        "torchtitan.config",
        "torchtitan.components",
        "torchtitan.experiments",
        "torchtitan.experiments.rl",
        "torchtitan.experiments.rl.components",
    )
    monkeypatch.setitem(sys.modules, "spmd_types", MagicMock())
    fake(monkeypatch, "torchtitan.observability", structured_logger=MagicMock())
    fake(monkeypatch, "torchtitan.tools.logging", logger=MagicMock())
    fake(monkeypatch, "torchtitan.distributed.utils", get_spmd_backend=lambda: "default")
    fake(
        monkeypatch,
        "torchtitan.distributed.spmd_types",
        current_spmd_mesh=lambda: None,
        spmd_mesh_size=lambda name: 1,
    )
    fake(monkeypatch, "torchtitan.experiments.rl.observability", metrics=MagicMock())
    config = sys.modules["torchtitan.config"]
    config.Configurable = importlib.import_module("torchtitan.config.configurable").Configurable
    config.CompileConfig = Any
    adapter = fresh_import(monkeypatch, "dl_norm.integrations.torchtitan")
    yield SimpleNamespace(
        adapter=adapter,
        types=importlib.import_module("torchtitan.experiments.rl.types"),
        batcher=importlib.import_module("torchtitan.experiments.rl.components.batcher"),
        losses=importlib.import_module("torchtitan.experiments.rl.losses"),
        components=importlib.import_module("torchtitan.components.loss"),
    )
    forget("torchtitan")


def steps(titan: SimpleNamespace, rollout: Rollout, ranks: int, **options: Any) -> Any:
    """The training batch of a step, by torchtitan's batcher or ours: two groups of three samples.

    Token ids say where a sample's logits are: row * T + position, in the order of the rollout.
    """
    parts = titan_samples(rollout)
    samples = [
        titan.types.TrainingSample(
            min_policy_version=0,
            max_policy_version=0,
            rollout_id=titan.types.RolloutTurnID(group_id=row // 3, rollout_id=row, turn_id=0),
            token_ids=[row * (T + 1) + t for t in range(len(part.loss_mask))],
            **vars(part),
        )
        for row, part in enumerate(parts)
    ]
    config = titan.batcher.Batcher.Config(
        batch=titan.batcher.BatchConfig(local_batch_size=1, seq_len=12)
    )
    if options:
        config = titan.adapter.weighted(config, **options)
    batcher = config.build(num_prompts_per_train_step=2, dp_degree=ranks, pad_id=0)
    for group in range(2):
        batch = batcher.add_training_samples(
            training_sample_group=titan.types.TrainingSampleGroup(
                group_id=group, training_samples=samples[3 * group : 3 * group + 3], metrics=[]
            )
        )
    return batch


def head(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states by token id, the head's weight, and the label of each token id."""
    random = torch.Generator().manual_seed(6)
    hidden = torch.randn(len(LENGTHS) * (T + 1), 5, generator=random).requires_grad_()
    weight = torch.randn(VOCABULARY, 5, generator=random).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, hidden.shape[:1], generator=random)


def true_gradients(
    rollout: Rollout, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Loss and gradients in float64 of the whole batch in one piece."""
    ids = torch.arange(len(LENGTHS))[:, None] * (T + 1) + torch.arange(T)
    log_probs = (hidden[ids].double() @ weight.double().T).log_softmax(-1)
    log_probs = log_probs.gather(-1, labels[ids + 1][..., None])[..., 0]
    loss = dl_norm.reference.policy_loss(
        log_probs,
        rollout.old.double(),
        rollout.advantages,
        rollout.mask & rollout.old.isfinite(),
        dl_norm.sequence_weights(
            (rollout.mask & rollout.old.isfinite()).sum(-1), alpha=ALPHA, max_length=M
        ),
        **options,
    )
    return loss.float(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_correction(rollout: Rollout, titan: SimpleNamespace, mode: str, chunked: bool) -> None:
    """-A w log pi with a constant w of the current policy, bounded, by its formula."""
    rollout.old[3, 2] = math.nan
    batch = steps(titan, rollout, 1, alpha=ALPHA, max_length=M)
    hidden, weight, labels = head(rollout)
    correction = dl_norm.RolloutCorrection(mode=mode, low=0.5, high=1.5)
    config = titan.adapter.DeltaLLoss.Config(options={"rollout_correction": correction})
    if chunked:
        config = titan.components.ChunkedLossWrapper.Config(num_chunks=3, loss_fn=config)
    loss_fn = config.build()
    project = torch.nn.Linear(5, VOCABULARY, bias=False)
    project.weight = torch.nn.Parameter(weight.detach().clone())
    if chunked:
        loss_fn.set_lm_head(project)
    expected, total, outside = torch.zeros(()), torch.zeros(()), 0
    metrics: dict[str, float] = dict.fromkeys(("loss/ratio_mean", "loss/ratio_clipped_frac"), 0.0)
    ratios = 0.0
    for part in [part for parts in batch.microbatches for part in parts]:
        states, targets = hidden[part.token_ids], labels[part.labels]
        streams = {
            name: getattr(part, name) for name in ("generator_logprobs", "advantages", "loss_mask")
        }
        value, seen = loss_fn(
            states if chunked else project(states), targets, batch.num_global_valid_tokens,
            **streams,
        )  # fmt: skip
        value.backward()
        total = total + value.detach()
        metrics = {name: metrics[name] + float(seen[name]) for name in metrics}
        states = hidden[part.token_ids]
        log_probs = (states @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        ratio = (log_probs.detach() - part.generator_logprobs).exp()
        counted = part.loss_mask.bool() & ratio.isfinite()
        inside = (ratio >= 0.5) & (ratio <= 1.5)
        bounded = ratio.clamp(0.5, 1.5) if mode == "truncate" else ratio * inside
        bounded = torch.where(counted, bounded, 0.0)
        gradient_of = -(part.advantages * bounded * log_probs).sum()
        expected = expected + gradient_of / batch.num_global_valid_tokens
        outside += int((counted & ~inside).sum())
        ratios += float(ratio[counted].sum())
    assert outside > 3
    wanted = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(hidden.grad, wanted[0], **THEIRS)
    torch.testing.assert_close(project.weight.grad, wanted[1], **THEIRS)
    tokens = batch.num_global_valid_tokens
    assert metrics["loss/ratio_clipped_frac"] == pytest.approx(outside / tokens)
    assert metrics["loss/ratio_mean"] == pytest.approx(ratios / tokens, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", ["theirs", "ours", "theirs, chunked", "ours, chunked"])
def test_step(rollout: Rollout, titan: SimpleNamespace, loss: str, ranks: int) -> None:
    """A step's gradient over micro-batches and ranks, with torchtitan's loss and with ours."""
    rollout.old[3, 2] = math.nan  # the sampler gave none: the token is left out
    batch = steps(titan, rollout, ranks, alpha=ALPHA, max_length=M)
    hidden, weight, labels = head(rollout)
    clip = {"eps_low": CLIP["eps_low"], "eps_high": CLIP["eps_high"]}
    if loss.startswith("ours"):
        config = titan.adapter.DeltaLLoss.Config(options=clip)
    else:
        config = titan.losses.DAPOLoss.Config(
            ratio_clip_low=CLIP["eps_low"], ratio_clip_high=CLIP["eps_high"]
        )
    if loss.endswith("chunked"):
        config = titan.components.ChunkedLossWrapper.Config(num_chunks=3, loss_fn=config)
    loss_fn = config.build()
    project = torch.nn.Linear(5, VOCABULARY, bias=False)
    project.weight = torch.nn.Parameter(weight.detach().clone())
    if loss.endswith("chunked"):
        loss_fn.set_lm_head(project)
    total = torch.zeros(())
    for micro_batch in [part for parts in batch.microbatches for part in parts]:
        states = hidden[micro_batch.token_ids]
        value, metrics = loss_fn(
            states if loss.endswith("chunked") else project(states),
            labels[micro_batch.labels],
            batch.num_global_valid_tokens,
            generator_logprobs=micro_batch.generator_logprobs,
            advantages=micro_batch.advantages,
            loss_mask=micro_batch.loss_mask,
        )
        value.backward()  # torchtitan's FSDP adds the ranks' gradients up
        total = total + value.detach()
        assert {"loss/mean", "loss/ratio_mean", "loss/ratio_clipped_frac"} <= set(metrics)
        assert "trainer/entropy/mean" in metrics
    expected = true_gradients(rollout, hidden, weight, labels, **clip)
    torch.testing.assert_close(total, expected[0], **TOLERANCE)
    torch.testing.assert_close(hidden.grad, expected[1], **THEIRS)
    torch.testing.assert_close(project.weight.grad, expected[2], **THEIRS)


def test_without_the_batcher_it_is_the_token_mean(rollout: Rollout, titan: SimpleNamespace) -> None:
    """The weights come from the batcher alone, and nothing else of a batch changes."""
    ours = steps(titan, rollout, 2, alpha=ALPHA, max_length=M)
    theirs = steps(titan, rollout, 2)
    assert ours.num_global_valid_tokens == theirs.num_global_valid_tokens
    for mine, other in zip(ours.microbatches, theirs.microbatches, strict=True):
        for one, two in zip(mine, other, strict=True):
            for name in ("token_ids", "labels", "positions", "generator_logprobs", "loss_mask"):
                assert torch.equal(getattr(one, name), getattr(two, name)), name
            counted = one.loss_mask.any()  # not padding alone
            assert torch.equal(one.advantages, two.advantages) != bool(counted)


def test_hooks_are_called_as_recorded(titan: SimpleNamespace) -> None:
    check_hook(titan.losses.DAPOLoss.__call__, "torchtitan")
    check_hook(titan.adapter.DeltaLLoss.__call__, "torchtitan")
    check_hook(titan.batcher.Batcher._take_groups, "torchtitan batcher")
    check_hook(titan.adapter.DeltaLBatcher._take_groups, "torchtitan batcher")


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_correction_reaches_the_loss(
    rollout: Rollout, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over stand-ins, whose logits are log-probs: the formula's loss without old log-probs."""
    adapter = import_torchtitan(monkeypatch)
    correction = dl_norm.RolloutCorrection(mode=mode, low=0.7, high=1.3)
    loss_fn = adapter.DeltaLLoss(
        adapter.DeltaLLoss.Config(options={"rollout_correction": correction})
    )
    advantages = rollout.advantages[:, None].expand(rollout.mask.shape)
    loss, _ = loss_fn(
        rollout.log_probs, rollout.log_probs, 10, generator_logprobs=rollout.old,
        advantages=advantages, loss_mask=rollout.mask,
    )  # fmt: skip
    true = dl_norm.reference.policy_loss(
        rollout.log_probs, None, advantages, rollout.mask, torch.full((len(LENGTHS),), 0.1),
        rollout_log_probs=rollout.old, rollout_correction=correction,
    )  # fmt: skip
    torch.testing.assert_close(loss, true, **THEIRS)
    gradients = [torch.autograd.grad(value, rollout.log_probs)[0] for value in (loss, true)]
    torch.testing.assert_close(*gradients, **THEIRS)


def test_bad_settings_raise_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    titan = import_torchtitan(monkeypatch)
    with pytest.raises(ValueError, match="ratio_level"):
        titan.DeltaLLoss(titan.DeltaLLoss.Config(options={"ratio_level": "sequence"}))
    for correction in (
        dl_norm.RolloutCorrection("sequence"),
        dl_norm.RolloutCorrection(veto=0.1),
        dl_norm.RolloutCorrection(reject=dl_norm.Reject("k1", "mean", high=2.0)),
    ):
        options = {"rollout_correction": correction}
        with pytest.raises(ValueError, match="sees no sequences"):
            titan.DeltaLLoss(titan.DeltaLLoss.Config(options=options))
    with pytest.raises(ValueError, match="alpha"):
        titan.DeltaLBatcher(titan.DeltaLBatcher.Config(alpha=-1.0, max_length=M), samples=[])
    with pytest.raises(TypeError, match="max_length"):
        titan.DeltaLBatcher.Config()

"""open-instruct: its packing, collation, token loss and division, with weighted advantages."""

from __future__ import annotations

import enum
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_tools import ALPHA, CLIP, LENGTHS, Dist, M, Rollout, lift, make_rollout
from torch import Tensor

from dl_norm.integrations import open_instruct

FOLDER = "open-instruct/open_instruct"


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.mark.parametrize("denominator", ["token", 0.0, -1])
def test_refuses(rollout: Rollout, denominator: Any) -> None:
    with pytest.raises(ValueError, match="loss_denominator"):
        open_instruct.weight_advantages(
            rollout.advantages.numpy(),
            SimpleNamespace(response_masks=[]),
            max_length=M,
            loss_denominator=denominator,
        )


@dataclass
class Collated:
    """open-instruct's CollatedBatchData."""

    query_responses: list[Tensor]
    attention_masks: list[Tensor]
    position_ids: list[Tensor]
    advantages: list[Tensor]
    response_masks: list[Tensor]
    vllm_logprobs: list[Tensor]

    def __len__(self) -> int:
        return len(self.query_responses)

    def to(self, device: str) -> Collated:
        return self


class Quiet:
    """Its Timer and loggers."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class LossType(enum.Enum):
    dapo, cispo = "dapo", "cispo"


def pack(rollout: Rollout) -> Any:
    """Its packing of the rollout, four rows. A token's id says where its log-prob is."""
    module = lift(
        f"{FOLDER}/rl_utils.py",
        "PackedSequences",
        "reset_position_ids",
        "pack_sequences",
        keep=("PackedSequences",),
        dataclass=dataclass,
        Generic=Generic,
        T=TypeVar("T"),
    )
    return module.pack_sequences(
        queries=[[1, 2]] * 6,
        responses=[[10 + 20 * row + t for t in range(n)] for row, n in enumerate(LENGTHS)],
        masks=[mask.long().tolist() for mask in rollout.cut(rollout.mask)],
        pack_length=14,
        pad_token_id=0,
        vllm_logprobs=[stream.tolist() for stream in rollout.cut(rollout.old)],
        mask_tool_use=True,
    )


def steps(rollout: Rollout, batch: Any, ranks: int, mini_batches: int, denominator: Any) -> Any:
    """The losses of a rank's steps, by open-instruct's own step over a stand-in for DeepSpeed."""
    model_utils = SimpleNamespace(estimate_kl=None)
    grpo_utils = lift(
        f"{FOLDER}/grpo_utils.py",
        "RhoCorrection",
        "mask_logprobs",
        "resolve_old_logprob",
        "compute_rho_correction",
        "compute_grpo_loss",
        "calculate_token_counts",
        keep=("RhoCorrection",),
        dataclass=dataclass,
        field=field,
        GRPOLossType=LossType,
        model_utils=model_utils,
        INVALID_LOGPROB=1.0,
        dist=Dist,
    )

    def forward_for_logprobs(model: Any, tokens: Tensor, *_: Any, **__: Any) -> Any:
        rows, columns = (tokens[:, 1:] - 10).clamp(min=0) // 20, (tokens[:, 1:] - 10) % 20
        return rollout.log_probs[rows, columns.clamp(max=rollout.mask.shape[1] - 1)], None

    for name in (
        "compute_vllm_local_debug_metrics",
        "create_loss_stats",
        "accumulate_rho_histograms",
        "populate_sample_loss_stats",
        "finalize_rho_histograms",
    ):
        setattr(grpo_utils, name, lambda *args, **kwargs: {})
    grpo_utils.forward_for_logprobs = forward_for_logprobs
    masked_mean = lift(f"{FOLDER}/rl_utils.py", "masked_mean").masked_mean
    step = lift(
        f"{FOLDER}/grpo_fast.py",
        "PolicyTrainerRayProcess.step",
        math=math,
        np=numpy,
        Timer=Quiet,
        logger=Quiet(),
        grpo_utils=grpo_utils,
        masked_mean=masked_mean,
    ).step
    losses: list[Tensor] = []
    args = SimpleNamespace(
        num_epochs=1, load_ref_policy=False, use_vllm_logprobs=True, use_rho_correction=False,
        record_entropy=False, loss_denominator=denominator, loss_fn=LossType.dapo, beta=0.0,
        clip_lower=CLIP["eps_low"], clip_higher=CLIP["eps_high"], world_size=ranks,
        sequence_parallel_size=1,
    )  # fmt: skip
    model = SimpleNamespace(
        backward=losses.append,
        step=lambda: None,
        set_gradient_accumulation_boundary=lambda last: None,
        get_global_grad_norm=lambda: 1.0,
    )
    step(
        SimpleNamespace(
            dataloader=iter([{"batch": batch, "metrics": {}}]),
            splitter=None,
            device="cpu",
            rank=1,
            args=args,
            model=model,
            num_mini_batches=mini_batches,
            pad_token_id=0,
            streaming_config=SimpleNamespace(temperature=1.0),
            local_metrics=Metrics(),
            _compute_loss_metrics=lambda *args: None,
        )
    )
    return losses


class Metrics(dict):
    def get_metrics_list(self) -> list[Any]:
        return []


@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_real(rollout: Rollout, ranks: int, mini_batches: int) -> None:
    """The mean of a rollout's steps, ranks averaged as DeepSpeed does."""
    packed = pack(rollout)
    assert len(packed.query_responses) == 4
    denominator = 6 * M / mini_batches
    advantages = open_instruct.weight_advantages(
        rollout.advantages.double().numpy(),
        packed,
        alpha=ALPHA,
        max_length=M,
        loss_denominator=denominator,
        num_mini_batches=mini_batches,
    )
    # As in DataPreparationActor, after the line that is added there.
    lookup = numpy.zeros(len(advantages) + 1, dtype=numpy.float32)
    lookup[1:] = advantages
    packed.advantages = [torch.tensor(lookup[mask]) for mask in packed.response_masks]
    packed.response_masks = [mask.bool() for mask in packed.response_masks]
    collate = lift(f"{FOLDER}/data_loader.py", "collate_fn").collate_fn
    loader = lift(
        f"{FOLDER}/data_loader.py",
        "prepare_collated_data_for_workers",
        np=numpy,
        collate_fn=collate,
        data_types=SimpleNamespace(CollatedBatchData=Collated),
        logger=SimpleNamespace(warning=pytest.fail),
    )
    total = torch.zeros(())
    for batch in loader.prepare_collated_data_for_workers(packed, ranks, 1, 0):
        losses = steps(rollout, batch, ranks, mini_batches, denominator)
        total = total + torch.stack(losses).sum() / ranks
    rollout.check(total / mini_batches, dual_clip=None)

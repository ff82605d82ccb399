"""A bfloat16 head whose logits are float32 (`fp32_logits=True`), beside the two that it is between:
bfloat16 logits, and ScaleRL's head in float32."""

from __future__ import annotations

import dataclasses

import torch

from bench import heads
from bench.contest import OURS, Contestant, Loss, our_impl
from bench.head_peers import CLIP, _plain
from bench.heads import HeadCase, HeadInputs
from dl_norm import linear_policy_loss


def make_inputs(case: HeadCase, device: torch.device, seed: int = 0) -> HeadInputs:
    """As for the suite `linear`, hidden states and head in bfloat16 on every device."""
    inputs = heads.make_inputs(case, device, seed)
    leaves = tuple(leaf.detach().bfloat16().requires_grad_() for leaf in inputs.leaves)
    return dataclasses.replace(inputs, leaves=leaves)


def _ours(inputs: HeadInputs, fp32_logits: bool = True) -> Loss:
    options = {**CLIP, "impl": our_impl(inputs.mask), "fp32_logits": fp32_logits}
    return lambda: linear_policy_loss(*inputs.leaves, *inputs.loss_tensors, **options)


def _float32_head(inputs: HeadInputs) -> Loss:
    options = {**CLIP, "impl": our_impl(inputs.mask)}

    def loss() -> torch.Tensor:
        leaves = (leaf.float() for leaf in inputs.leaves)
        return linear_policy_loss(*leaves, *inputs.loss_tensors, **options)

    return loss


CONTESTANTS = (
    Contestant(OURS, "linear_policy_loss of bfloat16, fp32_logits=True", _ours),
    Contestant("dl_norm bfloat16 logits", "the same without", lambda inputs: _ours(inputs, False)),
    Contestant("dl_norm float32 head", "hidden states and head made float32 first", _float32_head),
    Contestant("plain", "bfloat16 logits, float32 log_softmax, the reference's loss", _plain),
)

"""The policy loss less an entropy bonus, from hidden states: what the bonus costs, and who has it.

The loss is :func:`bench.heads.truth`'s less COEFFICIENT times the weighted entropies of the tokens;
beside the suite `linear`, which is the same without the bonus, a row says what the bonus costs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import dl_norm.reference
from bench import heads
from bench.contest import OURS, Contestant, Expected, Loss, our_impl
from bench.head_peers import CLIP, _compiled
from bench.heads import HeadInputs
from dl_norm import linear_policy_loss

COEFFICIENT = 0.01


def _ours(inputs: HeadInputs) -> Loss:
    options = {**CLIP, "impl": our_impl(inputs.mask), "entropy_coef": COEFFICIENT}
    return lambda: linear_policy_loss(*inputs.leaves, *inputs.loss_tensors, **options)


def _plain_loss(hidden: Tensor, head: Tensor, token_ids: Tensor, *tensors: Tensor) -> Tensor:
    """As it is usually written, with float32 logits, log-probs and probabilities."""
    log_p = F.linear(hidden, head).float().log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    log_probs = log_p.gather(-1, token_ids[..., None])[..., 0]
    loss = dl_norm.reference.policy_loss(log_probs, *tensors, **CLIP)
    mask, weights = tensors[-2:]
    return loss - COEFFICIENT * (weights[:, None] * mask * entropies).sum()


def _plain(inputs: HeadInputs) -> Loss:
    return lambda: _plain_loss(*inputs.leaves, *inputs.loss_tensors)


def _torch_compile(inputs: HeadInputs) -> Loss:
    return lambda: _compiled(_plain_loss)(*inputs.leaves, *inputs.loss_tensors)


CONTESTANTS = (
    Contestant(OURS, f"linear_policy_loss, entropy_coef={COEFFICIENT}", _ours),
    Contestant("plain", "float32 log_softmax, its entropy, the reference's loss", _plain),
    Contestant("torch.compile", "the plain code compiled for this shape", _torch_compile),
)


def truth(inputs: HeadInputs) -> Expected:
    """In float64, the entropies some rows at a time."""
    expected = heads.truth(inputs)
    hidden, head = (leaf.detach() for leaf in inputs.leaves)
    rows = hidden.flatten(0, 1)
    weights = (COEFFICIENT * inputs.weights.double()[:, None] * inputs.mask).flatten()
    loss, (of_hidden, of_head) = expected.result.double(), expected.gradients
    of_rows, of_head = of_hidden.flatten(0, 1).double(), of_head.double()
    for start in range(0, rows.shape[0], heads.CHUNK):
        some = slice(start, start + heads.CHUNK)
        leaves = [tensor.double().requires_grad_() for tensor in (rows[some], head)]
        log_p = F.linear(*leaves).log_softmax(-1)
        bonus = -(weights[some, None] * log_p.exp() * log_p).sum()
        first, second = torch.autograd.grad(bonus, leaves)
        loss, of_head = loss - bonus.detach(), of_head - second
        of_rows[some] -= first
    return Expected(loss, (of_rows.view(hidden.shape), of_head), expected.scale)

r"""DeltaL Normalization in torchforge, as the loss of its ``TitanTrainer``.

Read: torchforge's main (6e77f0b3, after 0.1.0-rc1). The hook is ``TitanTrainer(loss=f)`` with
``f(logits, **targets) -> Tensor``, which torchforge compiles; it traces without a graph break.
What a user writes in ``apps/grpo/main.py``::

    from dl_norm.integrations import torchforge as delta_l

    TitanTrainer.options(...).as_actor(**cfg.trainer, loss=delta_l.delta_l_loss)
    ReplayBuffer.options(...).as_actor(
        **cfg.replay_buffer, collate=delta_l.weighted(collate, alpha=0.75, max_length=3072)
    )

**Where the weights come from.** Global lengths: ``collate`` makes the batches of all data-parallel
ranks of a step in one place, so the weights over all of them are computed there and travel as one
more target, times the number of ranks because FSDP averages gradients. (The loss that torchforge
logs is summed over ranks, so it is larger by that number.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dl_norm
from dl_norm.weights import gradient_scale


def delta_l_loss(
    logits: Tensor,
    response: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    padding_mask: Tensor,
    weights: Tensor | None = None,
    beta: float = 0.1,
) -> Tensor:
    """Policy gradient with the k3 KL to the reference, by :func:`dl_norm.policy_loss`.

    Args:
        logits: (B, S, V) of prompt and response; those that predict the response are used.
        response: (B, T) token ids.
        ref_logprobs: (B, T). advantages: (B, 1). padding_mask: (B, T).
        weights: (B,) from :func:`weighted`.
        beta: coefficient of the KL; it takes the sequence weights too.

    Raises:
        ValueError: no ``weights``.
    """
    if weights is None:
        raise ValueError(
            "weights are missing: pass collate=weighted(collate, ...) to the ReplayBuffer; the "
            "batch of one rank is not enough to compute them"
        )
    length = response.size(1)
    # In float32, as torchforge does. cross_entropy does not keep the log-probs of all words.
    log_probs = -torch.nn.functional.cross_entropy(
        logits[:, -length - 1 : -1].float().flatten(0, 1),
        response.flatten().long(),
        reduction="none",
    ).view(response.shape)
    return dl_norm.policy_loss(
        log_probs,
        None,  # on policy: the ratio is 1
        advantages.reshape(-1),
        padding_mask,
        weights,
        ref_log_probs=ref_logprobs.reshape(response.shape),
        beta=beta,
    )  # pyright: ignore[reportReturnType]


def weighted(
    collate: Callable[[Any], tuple[list[dict], list[dict]]], *, alpha: float = 1.0, max_length: int
) -> Callable[[Any], tuple[list[dict], list[dict]]]:
    """torchforge's ``collate`` with the DeltaL ``weights`` of the whole step among the targets."""

    @functools.wraps(collate)
    def collate_weighted(batches: Any) -> tuple[list[dict], list[dict]]:
        inputs, targets = collate(batches)
        lengths = [dl_norm.sequence_lengths(target["padding_mask"]) for target in targets]
        weights = dl_norm.sequence_weights(
            torch.cat(lengths), alpha=alpha, max_length=max_length, group="local"
        )
        weights = weights * gradient_scale(num_processes=len(targets))
        parts = weights.split([len(part) for part in lengths])
        for target, part in zip(targets, parts, strict=True):
            target["weights"] = part
        return inputs, targets

    return collate_weighted

"""One call of a loss: what its arguments come down to."""

from __future__ import annotations

import torch

from ._batch import TENSORS, Batch, make_batch
from ._checks import LOG_PROB_DTYPES, check_no_transform
from ._options import TokenLoss, token_loss_of
from ._rollout import NO_ROLLOUT


def make_call(
    arguments: dict,
    *,
    metrics: bool,
    dtypes: tuple[torch.dtype, ...] = LOG_PROB_DTYPES,
) -> tuple[Batch, TokenLoss]:
    """Checks all arguments of :func:`dl_norm.policy_loss` but ``impl`` and what it returns.

    The reference's log-probs are left out where nothing reads them.
    """
    check_no_transform("policy_loss")
    options = dict(arguments)
    tensors = {name: options.pop(name) for name in TENSORS if name in options}
    terms = token_loss_of(options)
    batch = make_batch(**tensors, dtypes=dtypes)
    _check_rollout(batch, terms)
    if terms.beta and batch.ref_log_probs is None:
        raise ValueError(
            f"beta = {terms.beta} needs ref_log_probs, the reference policy's log-probs"
        )
    if batch.ref_log_probs is not None and not (terms.beta or metrics):
        batch = batch._replace(ref_log_probs=None)  # multiplied by zero
    return batch, terms


def _check_rollout(batch: Batch, terms: TokenLoss) -> None:
    if (batch.rollout_log_probs is None) == (terms.rollout == NO_ROLLOUT):
        return
    if batch.rollout_log_probs is None:
        raise ValueError(
            "rollout_correction needs rollout_log_probs, the log-probs of the policy that sampled"
        )
    raise ValueError(
        "rollout_log_probs needs rollout_correction=RolloutCorrection(...), which says what "
        "weights are made of them; RolloutCorrection(level='none') gives their metrics alone"
    )


def token_options(arguments: dict) -> dict:
    """Those that are no tensors."""
    return {name: value for name, value in arguments.items() if name not in TENSORS}

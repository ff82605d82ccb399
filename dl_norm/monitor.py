r"""How gradient variance grows with length, estimated while training from the log-probs alone.

The exponent beta of Var(g_i) ~ L_i^beta decides which alpha is best (alpha = beta), and the true
|g_i|^2 of a sequence costs a backward pass of its own. :func:`variance_proxy` needs nothing that
the loss does not already have:

    proxy_i = sum_t c_it^2 (1 - pi_it),      pi_it = exp(log_probs_it)

*Why.* The gradient of a sequence is g_i = sum_t c_it s_it with the scores s_it = grad log pi_it.
Under the policy that sampled, E[s_it | tokens before t] = 0, so for coefficients that do not look
ahead the cross terms vanish: E|g_i|^2 = sum_t E c_it^2 |s_it|^2. A score is the Jacobian of the
logits times (onehot(y) - pi), and E_y|onehot(y) - pi|^2 = 1 - sum_v pi_v^2, which is also
E_y[1 - pi_y]: 1 - pi_it estimates it without bias from the log-prob of the sampled token, and no
second look at the vocabulary is needed.

*What it leaves out.* The Jacobian (taken as equally large at every position, in every direction),
and the advantage, which does look ahead: it is one number for all tokens of a sequence and
correlates their terms. So the proxy sees how uncertain the tokens of long and short sequences are,
and cannot see an exponent that comes from correlation between tokens.

*How good it is.* ``python -m bench.experiments.variance`` holds it against true gradients of single
sequences. It ranks them well, but on both models its exponent is near 1 and outside the interval of
the true one, far from it on the tiny model. So the estimate is a hint, there is no
``alpha="auto"``, and the exponent to trust is one of measured gradient norms
(``python -m dl_norm diagnose``). sum_t c_it^2, the squared
gradient at the log-probs, would be worse: on-policy it is A_i^2 L_i, and its exponent is 1
whatever the model does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import theory
from ._checks import check_number
from .weights import METHODS, sequence_lengths

Slice = tuple[Tensor, Tensor, Tensor]  # (G,) lengths, proxies and group ids, -1 for none


def variance_proxy(
    log_probs: Tensor,
    mask: Tensor | None,
    *,
    coefficients: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sum_sq_probs: Tensor | None = None,
) -> Tensor:
    r"""(G,) float32 proxy of |g_i|^2 / A_i^2: sum_t c_it^2 (1 - exp(log_probs_it)), up to a factor.

    Args:
        log_probs: (B, T), or (N,) with ``cu_seqlens``, any floating dtype, of the sampled tokens
            under the policy. Not differentiated.
        mask: of that shape; a position counts where mask != 0, what others hold does not matter.
            Optional for packed input.
        coefficients: of that shape; d loss_it / d log_probs_it without advantage and weight, that
            is the ratio where it is not clipped and 0 where it is. None: 1 (on-policy).
        cu_seqlens: (G + 1,) offsets of packed sequences.
        sum_sq_probs: like ``log_probs``, sum_v p_v^2 of the softmax, an output of the losses over
            logits or hidden states and of ``token_log_probs``. With it the term of a token is its
            squared score at the logits, 1 - 2 exp(log_probs) + sum_sq_probs (arXiv:2602.07078), of
            which 1 - exp(log_probs) is an estimate from one sample.

    A sequence without a counted token has proxy 0. No host sync.

    Raises:
        ValueError: shapes that do not fit, or a padded batch without a mask.
    """
    ndim = 2 if cu_seqlens is None else 1
    if log_probs.ndim != ndim:
        raise ValueError(
            f"log_probs must be (B, T), or (N,) with cu_seqlens; got {tuple(log_probs.shape)}"
        )
    if mask is None and cu_seqlens is None:
        raise ValueError("mask is required for padded (B, T) input: pass a (B, T) tensor")
    others = {"mask": mask, "coefficients": coefficients, "sum_sq_probs": sum_sq_probs}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != log_probs.shape:
            raise ValueError(
                f"{name} must be {tuple(log_probs.shape)} like log_probs, got {tuple(tensor.shape)}"
            )
    # expm1: 1 - exp of a log-prob near 0 would keep no digit.
    log_probs = log_probs.detach().float()
    terms = -torch.expm1(log_probs)
    if sum_sq_probs is not None:
        # (1 - pi)^2, and the squares of the others, which rounding must not make negative.
        others_squared = sum_sq_probs.detach().float() - (2.0 * log_probs).exp()
        terms = terms.square() + others_squared.clamp(min=0.0)
    if coefficients is not None:
        terms = terms * coefficients.detach().float().square()
    if mask is not None:
        terms = torch.where(mask != 0, terms, torch.zeros_like(terms))
    if cu_seqlens is None:
        return terms.sum(1)
    tokens = cu_seqlens.diff()
    sequence = torch.arange(tokens.numel(), device=terms.device)
    sequence = sequence.repeat_interleave(tokens, output_size=terms.numel())
    return terms.new_zeros(tokens.numel()).index_add_(0, sequence, terms)


class VarianceMonitor:
    """Collects lengths and proxies while training; estimates beta, and the noise of each method.

    For any trainer:

        monitor = VarianceMonitor()
        for step in ...:
            for micro_batch in ...:
                loss = policy_loss(log_probs, old, advantages, mask, weights)
                monitor.update(log_probs, mask)   # tensors stay on the device: no sync
            monitor.end_batch()
            if step % 10 == 0:
                log(monitor.summary())            # the one place that waits for the device

    With several processes pass each ``update`` what it sees and give ``summary`` the function
    that gathers: see there. For TRL there is
    :class:`dl_norm.integrations.trl.VarianceMonitorCallback`.

    Args:
        alpha: the exponent in use, for the noise of "delta_l".
        window: sequences kept for the estimate, the newest; whole batches are dropped.
        confidence: of the bootstrap interval.

    The suggestion is for a person to read. Nothing here changes alpha while training.
    """

    def __init__(self, *, alpha: float = 1.0, window: int = 4096, confidence: float = 0.95):
        check_number(alpha, "alpha", "0 <= alpha <= 16", lambda a: 0 <= a <= 16)
        check_number(window, "window", "window >= 2", lambda w: w >= 2)
        check_number(confidence, "confidence", "0 < confidence < 1", lambda c: 0 < c < 1)
        self.alpha = alpha
        self.window = window
        self.confidence = confidence
        self._open: list[Slice] = []  # of the batch that is under way
        self._batches: deque[Slice] = deque()
        self._sequences = 0

    def update(
        self,
        log_probs: Tensor,
        mask: Tensor | None,
        *,
        coefficients: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        groups: Tensor | None = None,
        sum_sq_probs: Tensor | None = None,
    ) -> None:
        """Take in a batch or a slice of one. Arguments as :func:`variance_proxy`; ``groups`` is
        (G,) integer prompt ids, so that the interval knows which sequences belong together."""
        proxy = variance_proxy(
            log_probs, mask, coefficients=coefficients, cu_seqlens=cu_seqlens,
            sum_sq_probs=sum_sq_probs,
        )  # fmt: skip
        lengths = sequence_lengths(mask, cu_seqlens)
        if groups is None:
            groups = torch.full_like(lengths, -1)
        elif groups.shape != lengths.shape:
            raise ValueError(f"groups must be {tuple(lengths.shape)}, got {tuple(groups.shape)}")
        self._open.append((lengths, proxy, groups))

    def end_batch(self) -> None:
        """The slices since the last call were one batch: what one optimizer step adds up."""
        if not self._open:
            return
        self._batches.append(_joined(self._open))
        self._open = []
        self._sequences += self._batches[-1][0].numel()
        while self._sequences > self.window and len(self._batches) > 1:
            self._sequences -= self._batches.popleft()[0].numel()

    def summary(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The estimate over the window, as Python numbers; {} before the first whole batch.

        - ``beta``, ``beta_low``, ``beta_high``: the exponent and its interval. Absent while the
          window has fewer than two lengths or prompts.
        - ``suggested_alpha``: beta, between 0 and 16.
        - ``cv_<method>``: noise over signal of a batch under that beta, the mean over the window's
          batches, in units of one response of mean length (1/sqrt(G) for G equal lengths). Uses
          beta = 1, the paper's law, while there is no estimate.

        Args:
            gather: with several processes, a function that takes a tensor (n,), equally long on
                all P processes, and returns theirs end to end, (P n,): ``accelerator.gather``.
                Every process must then call ``summary``.
        """
        if not self._batches:
            return {}
        tensors = _joined(list(self._batches))
        if gather is not None:
            tensors = tuple(gather(tensor) for tensor in tensors)
        lengths, proxies, groups = (tensor.cpu().numpy() for tensor in tensors)
        result: dict[str, float] = {}
        beta = 1.0
        try:
            estimate = theory.estimate_exponent(
                lengths,
                proxies,
                groups if (groups >= 0).all() else None,
                confidence=self.confidence,
                resamples=500,
            )
        except ValueError:  # equal lengths or a single prompt: nothing to fit yet
            pass
        else:
            beta = estimate.beta
            result["beta"] = beta
            result["beta_low"], result["beta_high"] = estimate.low, estimate.high
            result["suggested_alpha"] = theory.optimal_alpha(beta)
        sizes = [batch[0].numel() for batch in self._batches]
        by_process = lengths.reshape(-1, sum(sizes))
        batches = np.split(by_process, np.cumsum(sizes)[:-1], axis=1)
        for method in METHODS:
            cvs = [_relative_cv(batch.ravel(), method, self.alpha, beta) for batch in batches]
            cvs = [cv for cv in cvs if cv is not None]
            if cvs:
                result[f"cv_{method}"] = float(np.mean(cvs))
        return result


def _joined(slices: list[Slice]) -> Slice:
    lengths, proxies, groups = (torch.cat(column) for column in zip(*slices, strict=True))
    return lengths, proxies, groups


def _relative_cv(
    lengths: np.ndarray, method: theory.Method, alpha: float, beta: float
) -> float | None:
    """CV in units of one response of mean length; None for a batch without a token."""
    full = lengths[lengths > 0]
    if not full.size:
        return None
    statistics = theory.method_statistics(full, method, alpha=alpha, beta=beta)
    return statistics.cv / float(full.mean()) ** (beta / 2)

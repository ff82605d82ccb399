"""No speed without parity: a contestant is timed only where its loss and gradient are right."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.peers import Loss, reference

# Relative to the largest gradient and to the sum of the loss's terms. The arithmetic is fp32,
# with sums of up to millions of terms. A wrong branch, weight or mask is off by far more.
TOLERANCE = 1e-5


class Wrong(Exception):
    """The loss or the gradient differs from the float64 reference."""


def truth(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the plain reference in float64."""
    exact = inputs.to(torch.float64)
    loss = reference(exact)()
    return loss.detach(), torch.autograd.grad(loss, exact.log_probs)[0]


def check(inputs: Inputs, loss: Loss, expected: tuple[Tensor, Tensor]) -> None:
    """Raise `Wrong`, in words, unless the contestant agrees with `truth(inputs)`."""
    expected_loss, expected_gradient = expected
    got_loss = loss()
    (got_gradient,) = torch.autograd.grad(got_loss, inputs.log_probs)
    largest = expected_gradient.abs().max()
    error = (got_gradient.double() - expected_gradient).abs().max() / largest
    if not error <= TOLERANCE:  # also true for NaN
        raise Wrong(f"gradient off by {error.item():.1e} of the largest (allowed {TOLERANCE:.0e})")
    # Every term is about as large as its gradient, which is x·A·r.
    error = (got_loss.double() - expected_loss).abs() / expected_gradient.abs().sum()
    if not error <= TOLERANCE:
        raise Wrong(f"loss off by {error.item():.1e} of its terms (allowed {TOLERANCE:.0e})")

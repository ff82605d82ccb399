"""No speed without parity: a contestant is timed only where its loss and gradient are right."""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.contest import Expected, Prepared
from bench.peers import reference

# Relative to the largest gradient and to the sum of the loss's terms. The arithmetic is fp32,
# with sums of up to millions of terms. A wrong branch, weight or mask is off by far more.
TOLERANCE = 1e-5


class Wrong(Exception):
    """The loss or the gradient differs from the float64 reference."""


def truth(inputs: Inputs) -> Expected:
    """Loss and gradient of the plain reference in float64."""
    exact = inputs.to(torch.float64)
    loss = reference(exact)()
    (gradient,) = torch.autograd.grad(loss, exact.log_probs)
    # Every term is about as large as its gradient, which is x·A·r.
    return Expected(loss.detach(), (gradient,), gradient.abs().sum().item())


def check(prepared: Prepared, expected: Expected) -> None:
    """Raise `Wrong`, in words, unless the contestant agrees with ``expected``."""
    prepared.restore()
    loss = prepared.result()
    (gradient,) = prepared.gradients(torch.autograd.grad(loss, prepared.leaves))
    (exact,) = expected.gradients
    error = (gradient.double() - exact).abs().max() / exact.abs().max()
    if not error <= TOLERANCE:  # also true for NaN
        raise Wrong(f"gradient off by {error.item():.1e} of the largest (allowed {TOLERANCE:.0e})")
    error = (loss.double() - expected.result).abs().item() / expected.scale
    if not error <= TOLERANCE:
        raise Wrong(f"loss off by {error:.1e} of its terms (allowed {TOLERANCE:.0e})")

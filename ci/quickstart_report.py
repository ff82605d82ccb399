"""What the quickstart shows after training: the loss three ways, and what each aggregation does."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import dl_norm
from dl_norm.theory import aggregation_statistics

LABELS = {"delta_l": "DeltaL", "grpo": "GRPO", "dapo": "DAPO", "dr_grpo": "Dr. GRPO"}


def method_weights(lengths: Tensor, max_length: int, alpha: float) -> dict[str, Tensor]:
    """The weights of the four methods for these lengths, by name for display."""
    weights = {
        "delta_l": dl_norm.sequence_weights(lengths, alpha=alpha, max_length=max_length),
        "grpo": dl_norm.sequence_weights(lengths, "grpo"),
        "dapo": dl_norm.sequence_weights(lengths, "dapo"),
        "dr_grpo": dl_norm.sequence_weights(lengths, "dr_grpo", max_length=max_length),
    }
    return {LABELS[name]: weight for name, weight in weights.items()}


def aggregation_table(weights: dict[str, Tensor], lengths: Tensor, max_length: int) -> Table:
    """Bias and coefficient of variation of each method for the observed lengths.

    The paper's model: Var(g_i) = V L_i.
    """
    table = Table(
        title=f"Gradient of the batch: {lengths.numel()} sequences of {int(lengths.min())} to "
        f"{int(lengths.max())} tokens, M = {max_length}",
        caption="unbiased: M E = 1 whatever the lengths. Noise: sqrt(Var)/E, smaller is better.",
    )
    for heading in ("method", "E / grad J", "M E / grad J", "CV |grad J| / sqrt(V)", "vs best"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    lengths = lengths.cpu()
    rows = {name: aggregation_statistics(x.cpu(), lengths) for name, x in weights.items()}
    best = min(row.cv for row in rows.values())
    for name, row in rows.items():
        scaled = row.expectation * max_length
        cells = f"{row.expectation:.3e}", f"{scaled:.4f}", f"{row.cv:.4f}", f"{row.cv / best:.2f} x"
        table.add_row(name, *cells)
    return table


def save_figure(
    path: Path, lengths: Tensor, advantages: Tensor, weights: dict[str, Tensor], max_length: int
) -> None:
    """Draw the lengths of the rollouts, and the weight that each method gives to a length."""
    order = lengths.argsort()
    sorted_lengths = lengths[order].tolist()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ["tab:green" if a > 0 else "lightgray" for a in advantages[order].tolist()]
    left.bar(range(len(colors)), sorted_lengths, color=colors)
    left.axhline(max_length, color="black", linewidth=0.8, linestyle=":", label=f"M = {max_length}")
    left.bar(0, 0, color="tab:green", label="better than its group")
    left.bar(0, 0, color="lightgray", label="not better")
    left.set(
        title="Rollouts of the last step", xlabel="rollout, by length", ylabel="length (tokens)"
    )
    left.legend(frameon=False)
    styles = ("-", "--", "-.", ":")
    for (name, weight), style in zip(weights.items(), styles, strict=True):
        right.plot(sorted_lengths, weight[order].tolist(), style, marker="o", ms=4, label=name)
    right.set(
        title="Weight of a sequence in the loss", xlabel="length (tokens)", ylabel="weight $x_i$"
    )
    right.set(xscale="log", yscale="log")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _loss_and_gradient(loss_of, log_probs: Tensor, old: Tensor, advantages: Tensor, *rest):
    leaf = log_probs.detach().clone().requires_grad_()
    loss = loss_of(leaf, old, advantages, *rest)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach().double(), gradient.double()


def implementations_table(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor, how: str
) -> Table:
    """Loss and gradient of both implementations beside the reference under autograd in float64.

    ``how`` says how the kernel runs here: "compiled" or "interpreted".
    """
    truth, true_gradient = _loss_and_gradient(
        dl_norm.reference.policy_loss,
        *(tensor.double() for tensor in (log_probs, old, advantages)),
        mask,
        weights.double(),
    )
    table = Table(
        title=f"dl_norm.policy_loss on these {mask.size(0)} rollouts, three ways",
        caption="difference: largest over the tokens, over the largest gradient of the reference",
    )
    for heading in ("implementation", "loss", "gradient norm", "gradient difference"):
        table.add_column(heading, justify="left" if heading == "implementation" else "right")
    table.add_row("reference, float64", f"{truth:.9f}", f"{true_gradient.norm():.9f}", "")
    for impl, label in {"torch": "torch", "triton": f"triton, {how}"}.items():

        def loss_of(*arguments, impl=impl):
            return dl_norm.policy_loss(*arguments, impl=impl)

        loss, gradient = _loss_and_gradient(loss_of, log_probs, old, advantages, mask, weights)
        difference = (gradient - true_gradient).abs().max() / true_gradient.abs().max()
        table.add_row(label, f"{loss:.9f}", f"{gradient.norm():.9f}", f"{difference:.1e}")
    return table

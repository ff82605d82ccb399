"""The gradient of one sequence, small enough to keep: exact norms and a random projection."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCKS = ("all", "qkv")  # all parameters; the Q, K and V matrices of three layers


class Sketch:
    """A linear map of a list of tensors to ``size`` numbers that keeps inner products.

    A count sketch: every coordinate gets a random sign and goes to one bucket, the position
    modulo ``size``. Inner products are unbiased, with a deviation of about sqrt(1/size) of the
    product of the norms. Tensors share nothing but the buckets.
    """

    def __init__(self, parameters: list[Tensor], size: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.signs = [
            torch.randint(2, (p.numel(),), generator=generator, dtype=torch.int8)
            .mul_(2)
            .sub_(1)
            .to(p.device)
            for p in parameters
        ]

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """(size,) float32 sketch of tensors shaped like the parameters."""
        total = torch.zeros(self.size, device=tensors[0].device)
        for tensor, signs in zip(tensors, self.signs, strict=True):
            signed = tensor.reshape(-1).float() * signs
            whole = signed.numel() // self.size * self.size
            total += signed[:whole].view(-1, self.size).sum(0)
            total[: signed.numel() - whole] += signed[whole:]
        return total


@dataclass(frozen=True)
class Score:
    """Sum over t of grad log pi(o_t) of one response, and what the loss sees of it for free."""

    sketch: dict[str, Tensor]  # of each block
    squared_norm: dict[str, float]  # exact
    log_probs: Tensor  # (L,) of the response's tokens
    vocabulary_proxy: float  # sum_t 1 - 2 pi_t + sum_v pi_v^2: |onehot - pi|^2 at the logits


def qkv_matrices(model: nn.Module) -> list[str]:
    """Names of the query, key and value matrices of the first, the middle and the last layer."""
    last = model.config.num_hidden_layers - 1
    layers = "|".join(str(n) for n in sorted({0, last // 2, last}))
    pattern = re.compile(rf".*layers\.({layers})\.self_attn\.[qkv]_proj\.weight$")
    return [name for name, _ in model.named_parameters() if pattern.match(name)]


def score_function(model: nn.Module, size: int = 4096) -> Callable[[Tensor, int], Score]:
    """A function of (ids of prompt and response, length of the prompt): the response's score."""
    named = dict(model.named_parameters())
    names = {"all": list(named), "qkv": qkv_matrices(model)}
    parameters = list(named.values())
    sketches = {block: Sketch([named[n] for n in names[block]], size) for block in BLOCKS}

    def score(tokens: Tensor, prompt: int) -> Score:
        kept = len(tokens) - prompt  # a head on the prompt's positions would be thrown away
        logits = model(input_ids=tokens[None, :-1], logits_to_keep=kept).logits[0].float()
        distribution = logits.log_softmax(-1)
        log_probs = distribution.gather(1, tokens[prompt:, None])[:, 0]
        gradients = torch.autograd.grad(log_probs.sum(), parameters)
        by_name = dict(zip(named, gradients, strict=True))
        blocks = {block: [by_name[n] for n in names[block]] for block in BLOCKS}
        squares = {
            block: sum(torch.linalg.vector_norm(g).item() ** 2 for g in gs)
            for block, gs in blocks.items()
        }
        with torch.no_grad():
            proxy = 1 - 2 * log_probs.exp() + distribution.exp().square().sum(-1)
        return Score(
            sketch={block: sketches[block](gs).cpu() for block, gs in blocks.items()},
            squared_norm=squares,
            log_probs=log_probs.detach().cpu(),
            vocabulary_proxy=proxy.sum().item(),
        )

    return score

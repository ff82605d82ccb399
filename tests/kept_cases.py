"""Batches with kept sets, a way to run them, and their truth by masking full logits in float64."""

from __future__ import annotations

import dataclasses
import itertools

import torch

import dl_norm
from dl_norm import KeptSets, linear_policy_loss


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor
    old: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor | None
    weights: torch.Tensor
    kept: KeptSets | None
    tensors: dict

    def args(self):
        return self.token_ids, self.old, self.advantages, self.mask, self.weights

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def sets(self):
        """(N,) lists of ids."""
        ends = self.kept.offsets.tolist()
        ids = self.kept.ids.tolist()
        return [ids[a:b] for a, b in itertools.pairwise(ends)]

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def draw_sets(token_ids, counted, vocabulary, random):
    """A set for every token: itself alone for nearly half of them, else up to 13 ids in any order;
    none where nothing counts."""
    sets = []
    for token, counts in zip(token_ids.flatten().tolist(), counted.flatten().tolist(), strict=True):
        size = int(torch.randint(2, 14, (), generator=random))
        others = torch.randperm(vocabulary, generator=random)[:size].tolist()
        others = [other for other in others if other != token]
        if torch.rand((), generator=random) < 0.45:
            others = []
        place = int(torch.randint(len(others) + 1, (), generator=random))
        sets.append([*others[:place], token, *others[place:]] if counts else [])
    return sets


def kept_of(sets, device, dtype=torch.int64):
    counts = torch.tensor([0, *(len(members) for members in sets)])
    ids = torch.tensor([member for members in sets for member in members], dtype=dtype)
    return KeptSets(ids.to(device), counts.cumsum(0).to(dtype).to(device))


def make(device, shape=(3, 7), size=16, vocabulary=50, dtype=torch.float32, *, bias=True,
         packed=False, softcap=None, temperature=1.0, ids=torch.int64, seed=0):  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, size, generator=random).to(dtype)
    weight = torch.randn(vocabulary, size, generator=random).to(dtype)
    bias = torch.randn(vocabulary, generator=random).to(dtype) if bias else None
    token_ids = torch.randint(vocabulary, shape, generator=random)
    mask = torch.rand(shape, generator=random) < 0.7
    kept = kept_of(draw_sets(token_ids, mask, vocabulary, random), "cpu", ids)
    advantages = torch.randn(shape[0], generator=random)
    weights = (torch.rand(shape[0], generator=random) + 0.1) * 1e-4
    case = Case(
        hidden, weight, bias, token_ids, None, advantages, mask, weights, kept, {}
    )  # fmt: skip
    with torch.no_grad():
        log_probs = masked_log_probs(case, torch.float64, softcap, temperature)[0]
    case.old = (log_probs + 0.3 * torch.randn(shape, generator=random)).float()
    ref = (log_probs + 0.3 * torch.randn(shape, generator=random)).float()
    case.tensors["ref_log_probs"] = ref
    case.tensors["rollout_weights"] = torch.rand(shape[0], generator=random) + 0.5
    if packed:
        for name in ("hidden", "token_ids", "old", "mask"):
            setattr(case, name, getattr(case, name).flatten(0, 1))
        case.tensors["ref_log_probs"] = ref.flatten()
        case.tensors["cu_seqlens"] = torch.arange(shape[0] + 1) * shape[1]
    moved = {k: v.to(device) for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    tensors = {k: v.to(device) for k, v in case.tensors.items()}
    kept = KeptSets(*(tensor.to(device) for tensor in kept))
    return dataclasses.replace(case, **moved, tensors=tensors, kept=kept)


def masked_log_probs(case, dtype=torch.float64, softcap=None, temperature=1.0):
    """Log-probs, entropy and sum of squared probabilities through the full logits, -inf outside the
    sets; 0 without a set."""
    logits = torch.nn.functional.linear(
        case.hidden.to(dtype), case.weight.to(dtype),
        None if case.bias is None else case.bias.to(dtype),
    )  # fmt: skip
    logits = logits.double() if dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    flat = (logits / temperature).flatten(0, -2)
    outside = torch.ones_like(flat, dtype=torch.bool)
    for number, members in enumerate(case.sets()):
        outside[number, members or slice(None)] = False
    log_probs = flat.masked_fill(outside, -torch.inf).log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.masked_fill(outside, 0.0)).sum(-1)
    own = log_probs.gather(-1, case.token_ids.flatten()[:, None].clamp(0, flat.shape[1] - 1))
    empty = (case.kept.offsets.diff() == 0).view(case.token_ids.shape)
    seen = own[:, 0], entropy, probs.square().sum(-1)
    return tuple(values.view(empty.shape).masked_fill(empty, 0.0) for values in seen)


def leaves_of(case):
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if getattr(case, name) is not None
    }
    return case.replace(**leaves)


def run(case, impl, *, upstream=1.0, **options):
    """(loss, gradients), and the outputs if any were asked for."""
    case = leaves_of(case)
    result = linear_policy_loss(
        case.hidden, case.weight, *case.args(), bias=case.bias, kept=case.kept, **case.tensors,
        impl=impl, **options,
    )  # fmt: skip
    loss, *outputs = result if isinstance(result, tuple) else (result,)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), [leaf.grad for leaf in case.leaves], *outputs


def truth(case, *, upstream=1.0, logit_softcap=None, temperature=1.0, entropy_coef=0.0,
          entropy_weights=None, **options):  # fmt: skip
    case = leaves_of(case)
    log_probs, entropy, _ = masked_log_probs(case, torch.float64, logit_softcap, temperature)
    old = None if case.old is None else case.old.double()
    loss = dl_norm.reference.policy_loss(
        log_probs, old, *case.args()[2:], **case.tensors, **options
    )
    if entropy_coef:
        weights = case.weights if entropy_weights is None else entropy_weights
        if weights.shape != entropy.shape:
            weights = weights.repeat_interleave(entropy.numel() // weights.numel())
        weights = weights.view(entropy.shape).double() * (case.mask != 0)
        loss = loss - entropy_coef * (weights * entropy).sum()
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach().double(), [leaf.grad.double() for leaf in case.leaves]


def errors(result, expected):
    """Relative errors: of the loss, and of each gradient to its largest entry."""
    loss = (result[0].double() - expected[0]).abs() / expected[0].abs()
    grads = [
        (ours.double() - true).abs().amax() / true.abs().amax()
        for ours, true in zip(result[1], expected[1], strict=True)
    ]
    return [error.item() for error in (loss, *grads)]

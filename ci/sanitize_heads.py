"""The configurations of the logits and fused-head kernels that ci/sanitize.py launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dl_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A multiple of every vector; odd; longer than a tile of the kernel, and odd.
VOCABULARIES = (1024, 777, 33_001)
LENGTHS = (9, 0, 4, 1)
HIDDEN = 48
OUTPUTS = {
    "loss alone": {},
    "all outputs": {"entropy": True, "return_log_probs": True, "return_metrics": True},
}


def configurations() -> Iterator[tuple[str, Callable[[torch.device], list[Tensor]]]]:
    for vocabulary, dtype in itertools.product(VOCABULARIES, DTYPES):
        label = f"{vocabulary} {str(dtype).removeprefix('torch.')}"
        for name, outputs in OUTPUTS.items():
            for layout in ("contiguous", "in place", "sliced", "packed"):
                yield (
                    f"logits {label} {layout} {name}",
                    lambda device, v=vocabulary, d=dtype, y=layout, o=outputs: logits(
                        v, d, y, o, device
                    ),
                )
            for options in (
                {}, {"logit_softcap": 15.0, "bias": True}, {"fp32_logits": True},
                {"kept": True, "logit_softcap": 15.0, "bias": True},
            ):  # fmt: skip
                yield (
                    f"linear {label} {'+'.join(options) or '-'} {name}",
                    lambda device, v=vocabulary, d=dtype, p=options, o=outputs: linear(
                        v, d, p | o, device
                    ),
                )
        for surrogate in ("cispo", "sapo"):
            variant = {"surrogate": surrogate, "bias_corrected_kl": True, **OUTPUTS["all outputs"]}
            yield (
                f"logits {label} {surrogate}",
                lambda device, v=vocabulary, d=dtype, o=variant: logits(
                    v, d, "contiguous", o, device
                ),
            )
        yield (
            f"token log-probs {label}",
            lambda device, v=vocabulary, d=dtype: log_probs(v, d, device),
        )


class Draw:
    """Seeded by nothing but the order of the draws."""

    def __init__(self, device: torch.device):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator, device=self.device)

    def tokens(self, vocabulary: int, *shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=self.generator, device=self.device)


def loss_tensors(draw: Draw, vocabulary: int, packed: bool) -> tuple[tuple[Tensor, ...], dict]:
    """token_ids to weights, and the options that go with them: a KL term and rollout weights."""
    lengths = torch.tensor(LENGTHS, device=draw.device)
    shape = (sum(LENGTHS),) if packed else (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(max(LENGTHS), device=draw.device) < lengths[:, None]
    if packed:
        mask = draw.normal(*shape) > -1
    tensors = (
        draw.tokens(vocabulary, *shape),
        draw.normal(*shape, scale=0.1) - 6,
        draw.normal(len(LENGTHS)),
        mask,
        dl_norm.sequence_weights(lengths, max_length=max(LENGTHS)),
    )
    options = {
        "ref_log_probs": draw.normal(*shape, scale=0.1) - 6,
        "beta": 0.05,
        "rollout_weights": draw.normal(*shape).abs(),
        "impl": "triton",
    }
    if packed:
        options["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return tensors, options


def results(returned, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss, what came with it, and the gradients under an upstream gradient that is not 1."""
    loss, extra = returned if isinstance(returned, tuple) else (returned, None)
    found = [loss.detach()]
    if extra is not None:
        found += [extra.log_probs, extra.entropy, *extra.metrics.summary().values()]
    found += torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))
    return [tensor.detach().clone() for tensor in found]


def logits(
    vocabulary: int, dtype: torch.dtype, layout: str, outputs: dict, device: torch.device
) -> list[Tensor]:
    draw = Draw(device)
    tensors, options = loss_tensors(draw, vocabulary, layout == "packed")
    shape = (*tensors[0].shape, vocabulary)
    if layout == "sliced":
        leaf = draw.normal(shape[0], shape[1] + 1, vocabulary).to(dtype).requires_grad_()
        values = leaf[:, :-1]
    else:
        leaf = draw.normal(*shape).to(dtype).requires_grad_()
        values = leaf.view_as(leaf)
    in_place = {"in_place": True} if layout == "in place" else {}
    loss = dl_norm.logits_policy_loss(values, *tensors, **options, **outputs, **in_place)
    return results(loss, (leaf,))


def linear(
    vocabulary: int, dtype: torch.dtype, options: dict, device: torch.device
) -> list[Tensor]:
    draw = Draw(device)
    tensors, loss_options = loss_tensors(draw, vocabulary, packed=False)
    hidden = draw.normal(*tensors[0].shape, HIDDEN).to(dtype).requires_grad_()
    head = draw.normal(vocabulary, HIDDEN, scale=HIDDEN**-0.5).to(dtype).requires_grad_()
    leaves = (hidden, head)
    options = dict(options)
    if options.pop("bias", False):
        bias = draw.normal(vocabulary).to(dtype).requires_grad_()
        options["bias"] = bias
        leaves += (bias,)
    if options.pop("kept", False):
        options["kept"] = kept_sets(tensors[0], vocabulary)
    else:
        options["chunk_size"] = 8  # two chunks, so that the head's gradient is accumulated
    loss = dl_norm.linear_policy_loss(hidden, head, *tensors, **loss_options, **options)
    return results(loss, leaves)


def kept_sets(token_ids: Tensor, vocabulary: int) -> dl_norm.KeptSets:
    """One, three, five and 200 tokens in turn, of which many are in several sets."""
    sizes = torch.tensor((1, 3, 5, 200), device=token_ids.device).repeat(token_ids.numel())
    sizes = sizes[: token_ids.numel()]
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    steps = torch.arange(len(owners), device=sizes.device) - offsets[owners]
    return dl_norm.KeptSets((token_ids.flatten()[owners] + steps) % vocabulary, offsets)


def log_probs(vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    draw = Draw(device)
    values = draw.normal(13, vocabulary).to(dtype)
    token_ids = draw.tokens(vocabulary, 13)
    return list(dl_norm.token_log_probs(values, token_ids, entropy=True, impl="triton"))

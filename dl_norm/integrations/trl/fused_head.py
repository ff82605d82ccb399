"""The loss in the place of a Hugging Face model's head, so that nothing holds the full logits.

``add_loss_head(model)`` gives the model's forward an argument ``loss_head``. With it the forward
runs the model without its head, and then *calls the head module*, whose forward is for that moment
``loss_head``. As both are called like any module, the hooks of FSDP2, the wrappers of DDP and PEFT,
autocast and gradient checkpointing see nothing unusual: parameters are gathered and gradients are
reduced by whoever shards them.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import dl_norm

LossHead = Callable[..., Tensor]


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to z = hidden @ W.T + b: softcap tanh(scale z / softcap), or scale z."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def options(self, temperature: float) -> dict[str, float | None]:
        """Options of ``linear_policy_loss``: c tanh(s z / c) = s (c/s) tanh(z / (c/s))."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "logit_softcap": softcap}


def logit_transform(config: Any) -> LogitTransform:
    """Read off a model's config, under the names that transformers has for it."""
    scale = 1.0
    for name in (
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
    ):  # Cohere, Falcon-H1, ...
        if (value := getattr(config, name, None)) is not None:
            scale = float(value)
            break
    else:
        if (value := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
            scale = float(value) if config.model_type == "hyperclovax" else 1.0 / value
    if not scale > 0:
        raise ValueError(
            f"fused_lm_head=True needs logits that are scaled by a positive number; the config of "
            f"this model scales them by {scale}: use fused_lm_head=False"
        )
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def add_loss_head(model: Any, temperature: float, cast_to_fp32: bool = False) -> None:
    """Give ``model.forward`` an argument ``loss_head``; without it the forward is as it was.

    ``model(input_ids=..., attention_mask=..., loss_head=f)`` returns
    ``f(hidden, lm_head_weight, bias=..., temperature=..., logit_softcap=...)``: the last hidden
    states (B, S, D), and arguments under the names of ``dl_norm.linear_policy_loss``. With
    ``output_router_logits=True`` it returns that and the load-balancing loss of the experts.

    Args:
        model: a transformers causal language model, not wrapped in PEFT or anything else.
        temperature: of the policy that sampled.
        cast_to_fp32: run the head in float32, outside autocast.

    Raises:
        ValueError: the logits of this model are not a transform of its head that is known here;
            found by running the model on four tokens.
    """
    transform = logit_transform(_text_config(model))
    _check_head(model.get_output_embeddings())
    _check_logits(model, transform)
    original = model.forward
    options = transform.options(temperature)

    # The original's signature: `generate` validates its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, loss_head: LossHead | None = None, **kwargs):
        if loss_head is None:
            return original(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes it on as None
        kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        # Looked up on every call: sharding replaces the head's parameters.
        head, hidden = self.get_output_embeddings(), outputs.last_hidden_state
        loss = _call_head(head, hidden, loss_head, options, cast_to_fp32)
        if not kwargs.get("output_router_logits"):
            return loss
        return loss, _load_balancing_loss(
            outputs.router_logits, self.config.get_text_config(), kwargs.get("attention_mask")
        )

    model.forward = types.MethodType(forward, model)


def loss_of_gradient(
    hidden: Tensor, lm_head_weight: Tensor, token_ids: Tensor, grad: Tensor, mask: Tensor, **head
) -> Tensor:
    """A loss with a given gradient at the log-probs, for gradients that are known only afterwards.

    The 0-dim result has, at ``hidden`` and at the head, the gradient of
    ``sum_t grad_t log pi(token_t)``; its value means nothing. On-policy, the policy loss of
    advantage A and weight x has the gradient -A x at a log-prob, so this is one of A = -grad / x.
    x is the largest entry of ``grad``, which float16 needs: the loss scales by its weights there.

    Args:
        hidden: (B, T, D). Row t predicts ``token_ids[t]``.
        lm_head_weight: (V, D).
        token_ids, mask: (B, T), as for ``dl_norm.linear_policy_loss``.
        grad: (B, T) float32, 0 where masked.
        head: its bias, temperature and other options of ``dl_norm.linear_policy_loss``.
    """
    largest = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny)
    weights = largest.repeat(len(grad))
    loss: Any = dl_norm.linear_policy_loss(
        hidden, lm_head_weight, token_ids, None, -grad / largest, mask, weights, **head
    )
    return loss


def _call_head(
    head: Any, hidden: Tensor, loss_head: LossHead, options: dict, cast_to_fp32: bool
) -> Tensor:
    """``head(hidden)``, hooks and all, with ``loss_head`` as its forward."""

    def forward(hidden: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        device = weight.device
        dtype = hidden.dtype
        if cast_to_fp32:
            dtype = torch.float32
        elif torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if cast_to_fp32 or torch.is_autocast_enabled(device.type):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        hidden = hidden.to(device, dtype)  # a model split over devices may end on another one
        with torch.autocast(device.type, enabled=False):
            return loss_head(hidden, weight, bias=bias, **options)

    previous = vars(head).get("forward")
    head.forward = forward
    try:
        return head(hidden)
    finally:
        del head.forward
        if previous is not None:
            head.forward = previous


def _load_balancing_loss(router_logits: Any, config: Any, attention_mask: Tensor | None) -> Tensor:
    """Of all experts of a model, as TRL takes it where it computes log-probs without logits."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return cast(
        Tensor,
        load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
        ),
    )


def _text_config(model: Any) -> Any:
    config = model.config.get_text_config()
    if config is not model.config:
        raise ValueError(
            f"fused_lm_head=True is for text models; {type(model).__name__} is multimodal: use "
            "fused_lm_head=False"
        )
    return config


def _check_head(head: Any) -> None:
    """The loss reads the head's weight and bias, so there must be no more to the head than that."""
    if type(head).__module__.partition(".")[0] == "peft":
        raise ValueError(
            "fused_lm_head=True computes the loss from the head's own weight, past the PEFT "
            f"{type(head).__name__} that wraps it, which would get no gradient: take the head out "
            "of target_modules and modules_to_save, or set fused_lm_head=False"
        )
    # A subclass may do anything in its forward; sharding makes one later, of the same forward.
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        kind = type(head).__name__
        if isinstance(head, nn.Linear):
            kind += f" of {head.weight.dtype}"
        raise ValueError(
            f"fused_lm_head=True needs a torch.nn.Linear head of floating point weights; this "
            f"model's is {kind}: use fused_lm_head=False"
        )


def _current_autocast(device_type: str) -> torch.autocast:
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )


@torch.no_grad()
def _check_logits(model: Any, transform: LogitTransform) -> None:
    """The model's own logits of four tokens must be the transform of its head's."""
    head = model.get_output_embeddings()
    if head.weight.is_meta:  # not loaded on this process; the one that has the weights checks
        return
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    ids = torch.arange(4, device=device)[None]
    # Accelerate puts autocast into the forward of a reference model, but not into its base_model's.
    inside: list[Any] = [contextlib.nullcontext()]
    hook = embedding.register_forward_hook(
        lambda *_: inside.__setitem__(0, _current_autocast(device.type))
    )
    training = model.training
    model.eval()
    try:
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        with inside[0]:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = head(hidden.to(head.weight.device))
    finally:
        hook.remove()
        model.train(training)
    # The same products in the same dtype; only the transform may have been rounded in between, at
    # most four times: scale, division by the softcap, tanh, multiplication.
    tolerance = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    got = transform(logits.float())
    error = (got - wanted.to(got.device)).abs().max() / wanted.abs().max().clamp(min=1e-30)
    if not error <= tolerance:
        raise ValueError(
            f"fused_lm_head=True: the logits of {type(model).__name__} are not its head's with "
            f"scale {transform.scale} and softcap {transform.softcap}, as its config says (they "
            f"differ by {float(error):.2g} of the largest): use fused_lm_head=False"
        )

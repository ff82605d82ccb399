"""Every option of the loss, from logits and from hidden states, against float64.

The truth is log_softmax in float64 and the reference loss under autograd, which test_variants.py
holds to the losses of TRL and verl. Budget: 5e-6 of the largest entry of each gradient, and of the
sum of the absolute token losses, as in test_linear.py.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

import dl_norm

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("triton", "torch")
ENTRIES = ("logits", "linear")
BUDGET = 5e-6
SEQUENCES, TOKENS, SIZE, VOCABULARY = 4, 4, 6, 19

# Options of the loss, and the tensors that the batch has besides.
KL = {"beta": 0.3}
VARIANTS = {
    "dual clip": ({"eps_low": 0.1, "eps_high": 0.28, "dual_clip": 1.3}, ()),
    "two-sided": ({"delta": 1.25}, ("rollout_weights",)),
    "clamp": ({"log_ratio_clamp": 0.2, "eps_low": 0.9, "eps_high": 3.0}, ()),
    "KL": (KL, ("ref_log_probs",)),
    "corrected KL": ({**KL, "bias_corrected_kl": True}, ("ref_log_probs", "rollout_weights")),
    "corrected KL, clamp": (
        {**KL, "bias_corrected_kl": True, "log_ratio_clamp": 0.2},
        ("ref_log_probs",),
    ),
    "cispo": ({"surrogate": "cispo", "eps_low": 0.1, "eps_high": 0.15}, ("rollout_weights",)),
    "cispo, corrected KL": (
        {"surrogate": "cispo", "eps_low": 1.0, "eps_high": -0.2, **KL, "bias_corrected_kl": True},
        ("ref_log_probs", "entropy_mask"),
    ),
    "sapo": ({"surrogate": "sapo"}, ("rollout_weights",)),
    "sapo, temperatures, KL": (
        {"surrogate": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 3.0, **KL},
        ("ref_log_probs", "sequence_mask"),
    ),
    "entropy mask": ({}, ("entropy_mask",)),
    "sequence mask, KL": (KL, ("sequence_mask", "ref_log_probs")),
    "both masks": (
        {"dual_clip": 1.3},
        ("entropy_mask", "sequence_mask", "rollout_weights"),
    ),
    "both masks, corrected KL": (
        {**KL, "bias_corrected_kl": True, "delta": 1.4},
        ("entropy_mask", "sequence_mask", "rollout_weights", "ref_log_probs"),
    ),
}
SETTINGS = {"temperature": 0.8}


def make_batch(device, layout, tensors=(), *, old=True, seed=0):
    """The first arguments of linear_policy_loss, and its tensors by name. ``layout`` "padded" has
    advantages and rollout weights by sequence, "packed" has them by token."""
    random = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, TOKENS)
    hidden = torch.randn(*shape, SIZE, generator=random)
    head = torch.randn(VOCABULARY, SIZE, generator=random)
    ids = torch.randint(VOCABULARY, shape, generator=random)
    mask = torch.rand(shape, generator=random) < 0.8
    mask[0, 0] = True
    log_probs = ((hidden.double() @ head.double().T) / SETTINGS["temperature"]).log_softmax(-1)
    log_probs = log_probs.gather(-1, ids[..., None])[..., 0]

    def near():
        return (log_probs + 0.5 * torch.randn(shape, generator=random)).float()

    per = shape if layout == "packed" else (SEQUENCES,)
    # Both signs, none near 0 (a sequence of advantage 0 has tests of its own).
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    signs = signs[:, None] if layout == "packed" else signs
    given = {
        "old_log_probs": near() if old else None,
        "advantages": signs * (torch.rand(per, generator=random) + 0.3),
        "mask": mask,
        "weights": (torch.rand(SEQUENCES, generator=random) + 0.1) * 1e-4,
    }
    optional = {
        "ref_log_probs": near(),
        "rollout_weights": torch.rand(per, generator=random) + 0.5,
        "entropy_mask": torch.rand(shape, generator=random) < 0.6,
        "sequence_mask": torch.tensor([True, True, False, True]),
    }
    given |= {name: optional[name] for name in tensors}
    given |= {"hidden": hidden, "token_ids": ids}
    if layout == "packed":
        given = {
            name: tensor.flatten(0, 1) if tensor is not None and tensor.ndim > 1 else tensor
            for name, tensor in given.items()
        }
        given["cu_seqlens"] = torch.arange(SEQUENCES + 1) * TOKENS
    given["lm_head_weight"] = head
    return {name: None if t is None else t.to(device) for name, t in given.items()}


def run(entry, impl, batch, **options):
    """Loss, gradients of hidden states and head, outputs, through either entry."""
    batch = dict(batch)
    hidden = batch.pop("hidden").clone().requires_grad_()
    head = batch.pop("lm_head_weight").clone().requires_grad_()
    if entry == "logits":
        result = dl_norm.logits_policy_loss(hidden @ head.T, **batch, **options, impl=impl)
    else:
        result = dl_norm.linear_policy_loss(hidden, head, **batch, **options, impl=impl)
    loss, outputs = result if isinstance(result, tuple) else (result, None)
    loss.backward(torch.full_like(loss, 3.0))
    return SimpleNamespace(loss=loss.detach(), grads=(hidden.grad, head.grad), outputs=outputs)


def truth(batch, *, temperature, **options):
    batch = dict(batch)
    hidden = batch.pop("hidden").double().requires_grad_()
    head = batch.pop("lm_head_weight").double().requires_grad_()
    ids = batch.pop("token_ids")
    log_probs = (hidden @ head.T / temperature).log_softmax(-1)
    log_probs = log_probs.gather(-1, ids[..., None])[..., 0]
    loss, metrics = dl_norm.reference.policy_loss(
        log_probs, **batch, **options, return_metrics=True
    )
    loss.backward(torch.full_like(loss, 3.0))
    # Token losses are of size 1, before their weights.
    weights = batch["weights"].double()
    scale = (weights * TOKENS).sum().item()
    return SimpleNamespace(
        loss=loss.detach(), grads=(hidden.grad, head.grad), metrics=metrics, scale=scale
    )


def check(got, expected):
    assert (got.loss.double() - expected.loss).abs().item() <= BUDGET * expected.scale
    for ours, true in zip(got.grads, expected.grads, strict=True):
        assert true.any()
        assert (ours.double() - true).abs().max() <= BUDGET * true.abs().max()


@pytest.mark.parametrize(
    "layout, entry, impl",
    [
        ("padded", "logits", "torch"),
        ("packed", "logits", "torch"),
        ("padded", "linear", "torch"),
        ("packed", "linear", "torch"),
        ("padded", "logits", "triton"),  # either entry comes to the same launches
        ("packed", "linear", "triton"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_float64(variant, layout, entry, impl, device, poison_empty):
    options, tensors = VARIANTS[variant]
    batch = make_batch(device, layout, tensors)
    check(run(entry, impl, batch, **SETTINGS, **options), truth(batch, **SETTINGS, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_another_loss(variant, device):
    """Or the comparison above would prove little: each option moves the true gradient."""
    options, tensors = VARIANTS[variant]
    batch = make_batch(device, "padded", tensors)
    whole = truth(batch, **SETTINGS, **options)
    without = [(name, {**options, name: None}) for name in options if name != "beta"]
    signature = inspect.signature(dl_norm.policy_loss)
    for name, changed in without:
        if name in ("surrogate", "log_ratio_clamp", "eps_low", "eps_high"):
            continue  # others of the variant are no options of another surrogate
        changed[name] = signature.parameters[name].default
        other = truth(batch, **SETTINGS, **changed)
        assert not torch.allclose(other.grads[0], whole.grads[0], rtol=1e-3, atol=0), name
    for name in tensors:
        if name == "ref_log_probs":
            continue
        fewer = {key: tensor for key, tensor in batch.items() if key != name}
        other = truth(fewer, **SETTINGS, **options)
        assert not torch.allclose(other.grads[0], whole.grads[0], rtol=1e-3, atol=0), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_without_old_log_probs(surrogate, entry, impl, device):
    """The ratio is 1: CISPO's gradient is that of REINFORCE, and so are the others'."""
    batch = make_batch(device, "padded", ("rollout_weights", "ref_log_probs"), old=False)
    options = {"surrogate": surrogate, "beta": 0.2, "bias_corrected_kl": True, **SETTINGS}
    check(run(entry, impl, batch, **options), truth(batch, **options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("variant", ["cispo", "sapo, temperatures, KL", "both masks, corrected KL"])
def test_metrics(variant, entry, impl, device):
    """Those of the reference: masks that drop a policy term change no metric."""
    options, tensors = VARIANTS[variant]
    batch = make_batch(device, "padded", {*tensors, "ref_log_probs"})
    expected = truth(batch, **SETTINGS, **options).metrics.summary()
    outputs = run(entry, impl, batch, **SETTINGS, **options, return_metrics=True).outputs
    for name, value in outputs.metrics.summary().items():
        # A ratio is known to about 5e-6 of itself, and here it is of size 1.
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5, abs=5e-6), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_dropped_policy_terms_have_exactly_no_gradient(entry, impl, device):
    """Without a KL term. Nor do they where log-probs are asked for, which reads their rows."""
    batch = make_batch(device, "padded", ("entropy_mask", "sequence_mask"))
    kept = batch["mask"] & batch["entropy_mask"] & batch["sequence_mask"][:, None]
    assert (batch["mask"] & ~kept).sum() >= 3
    for options in ({}, {"return_log_probs": True}):
        got = run(entry, impl, batch, **SETTINGS, **options)
        assert not got.grads[0][~kept].any() and got.grads[0][kept].any(-1).any()
    counted = got.outputs.log_probs != 0
    assert torch.equal(counted, batch["mask"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_dropped_term_may_be_anything(entry, impl, device):
    """The rollout weight and the advantage of a sequence that a mask drops, and old log-probs of
    tokens that one drops: also where the KL term reads the row."""
    tensors = ("entropy_mask", "sequence_mask", "rollout_weights", "ref_log_probs")
    batch = make_batch(device, "padded", tensors)
    expected = run(entry, impl, batch, beta=0.2, **SETTINGS)
    for name in ("rollout_weights", "advantages"):
        batch[name] = batch[name].masked_fill(~batch["sequence_mask"], float("nan"))
    dropped = ~(batch["entropy_mask"] & batch["sequence_mask"][:, None])
    batch["old_log_probs"] = batch["old_log_probs"].masked_fill(dropped, float("nan"))
    got = run(entry, impl, batch, beta=0.2, **SETTINGS)
    assert torch.equal(got.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(got.grads, expected.grads, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_masks_of_other_dtypes(mask_dtype, entry, impl, device):
    batch = make_batch(device, "packed", ("entropy_mask", "sequence_mask"))
    expected = run(entry, impl, batch)
    for name in ("mask", "entropy_mask", "sequence_mask"):
        batch[name] = batch[name].to(mask_dtype) * 2
    got = run(entry, impl, batch)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.grads[0], expected.grads[0])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"ratio_level": "sequence"}, ValueError, r"_policy_loss has ratio_level='token' alone"),
        ({"ratio_level": "sequence_token"}, ValueError, "pass them to policy_loss"),
        ({"ratio_level": "word"}, ValueError, "ratio_level must be one of"),
        ({"surrogate": "ppo"}, ValueError, "there is no surrogate 'ppo'"),
        ({"surrogate": "sapo", "dual_clip": 3.0}, ValueError, "has no effect with surrogate"),
        ({"surrogate": "cispo", "delta": 3.0}, ValueError, "has no effect with surrogate"),
        ({"sapo_temperature_pos": 2.0}, ValueError, "has no effect with surrogate"),
        ({"bias_corrected_kl": 1}, TypeError, "bias_corrected_kl must be True or False"),
        ({"beta": 0.1, "ref_log_probs": None}, ValueError, "needs ref_log_probs"),
        ({"epsilon": 0.2}, TypeError, "epsilon"),
        ({"entropy_mask": torch.ones(2, 2)}, ValueError, "entropy_mask must be"),
        ({"sequence_mask": torch.ones(2)}, ValueError, "sequence_mask must be"),
        ({"sequence_mask": [True] * SEQUENCES}, TypeError, "sequence_mask must be a tensor"),
    ],
)
def test_what_cannot_be_honoured_is_refused(entry, change, error, match):
    batch = make_batch(torch.device("cpu"), "padded", ("ref_log_probs",))
    batch = {**batch, **{name: value for name, value in change.items() if name in batch}}
    options = {name: value for name, value in change.items() if name not in batch}
    with pytest.raises(error, match=match):
        run(entry, "torch", batch, **options)

"""Ratio levels, surrogates, KL correction and policy masks: the implementations against the float64
reference, which test_variants_trainers.py holds to the trainers' losses.

Budget of float32: 3e-6 of the largest term of a token's gradient before any clip, or of the sum of
the absolute terms. A ratio of a sequence is one more mean and one more product than the ratio of a
token, for which 2e-6 is allowed.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import dl_norm
from dl_norm._log_probs import autograd
from dl_norm._options import make_token_loss

IMPLEMENTATIONS = ("triton", "torch", "reference")
BUDGET = 3e-6


# -- the implementations against float64 ---------------------------------------------------------

VARIANTS = {
    "sequence": {"ratio_level": "sequence", "eps_low": 0.05, "eps_high": 0.06},
    "sequence_token": {"ratio_level": "sequence_token", "eps_low": 0.05, "eps_high": 0.06},
    "cispo": {"surrogate": "cispo", "eps_low": 0.3, "eps_high": 0.4},
    "sapo": {"surrogate": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 2.5},
    "corrected KL": {"beta": 0.3, "bias_corrected_kl": True},
    "sequence, corrected KL": {"ratio_level": "sequence", "beta": 0.3, "bias_corrected_kl": True},
    "sequence, sapo": {"ratio_level": "sequence", "surrogate": "sapo"},
    "sequence_token, cispo, corrected KL": {
        "ratio_level": "sequence_token", "surrogate": "cispo", "beta": 0.3,
        "bias_corrected_kl": True,
    },
    "sequence, dual clip, clamp": {
        "ratio_level": "sequence", "dual_clip": 1.04, "log_ratio_clamp": 0.05, "eps_high": 0.03,
    },
    "corrected KL, clamp": {"beta": 0.3, "bias_corrected_kl": True, "log_ratio_clamp": 0.3},
    "sapo, clamp": {"surrogate": "sapo", "log_ratio_clamp": 0.3},
    "sequence_token, clamp": {"ratio_level": "sequence_token", "log_ratio_clamp": 0.04},
}  # fmt: skip

# Of test_surrogates.py, here for what holds of every loss
OTHERS = {
    "dppo_kl + drift + nll": {"surrogate": "dppo_kl + drift + nll"},
    "vespo": {"surrogate": "vespo", "ratio_level": "sequence_sum"},
    "gmpo": {"surrogate": "gmpo(0.2, 0.3)", "ratio_level": "sequence"},
}


def policy_masks(batch, entropy: bool = True, sequence: bool = True, seed: int = 0) -> dict:
    random = torch.Generator().manual_seed(seed)
    device = batch.log_probs.device
    masks = {}
    if entropy:
        kept = torch.rand(batch.log_probs.shape, generator=random) < 0.5
        masks["entropy_mask"] = kept.to(device)
    if sequence:
        kept = torch.rand(batch.weights.shape, generator=random) < 0.6
        masks["sequence_mask"] = kept.float().to(device)
    return masks


def true_of(batch, run_loss, **options):
    """The float64 reference, and the terms that errors are measured against (see the top)."""
    wide = batch.map(torch.Tensor.double)
    true = run_loss("reference", wide, **options)
    log_prob = wide.log_probs
    ratio = torch.ones_like(log_prob)
    if wide.old_log_probs is not None:
        ratio = (log_prob - wide.old_log_probs).exp().clamp(min=1)
    term = wide.spread(wide.advantages).abs() * ratio
    if options.get("surrogate") == "cispo":
        term = term * log_prob.abs().clamp(min=1)
    if options.get("surrogate") == "sapo":
        term = term * 5  # 4 / temperature
    if wide.rollout_weights is not None:
        term = term * wide.spread(wide.rollout_weights)
    if options.get("beta"):
        exp = (wide.ref_log_probs - log_prob).exp()
        term = term + options["beta"] * ratio * (exp + 1)
    term = (term * wide.spread(wide.weights)).masked_fill(~wide.counted(), 0.0)
    largest = term.amax().item() if term.numel() else 0.0
    return SimpleNamespace(
        loss=true.loss, grad=true.grad, loss_scale=term.sum().item(), grad_scale=largest
    )


def check(impl, batch, got, true) -> None:
    assert got.grad.dtype == batch.log_probs.dtype and got.grad.shape == batch.log_probs.shape
    ignored = ~batch.counted()
    assert torch.equal(got.grad[ignored], torch.zeros_like(got.grad[ignored]))
    budget = BUDGET
    rounding = 0.0
    if batch.log_probs.dtype != torch.float32:
        # Stored once in the dtype; Triton's interpreter truncates to bf16 where a GPU rounds.
        half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[batch.log_probs.dtype]
        truncated = impl == "triton" and not got.grad.is_cuda
        largest = true.grad.abs().amax().item()
        rounding = half_ulp * largest * (2 if truncated else 1) + 2.0**-25
    assert abs(got.loss.item() - true.loss.item()) <= budget * true.loss_scale
    error = (got.grad.double() - true.grad).abs().amax().item() if got.grad.numel() else 0.0
    assert error <= budget * true.grad_scale + rounding


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, layout, impl, make_batch, run_loss):
    """Two tiles, an odd width, holes, empty sequences, sequences that begin inside a tile; the
    terms of a sequence's tokens alike, and each its own."""
    options = VARIANTS[variant]
    for advantages, rollout, masks in (
        ("sequence", None, {}),
        ("sequence", "sequence", {"entropy": False}),
        ("token", "token", {"entropy": True}),
    ):
        batch = make_batch(
            [60, 0, 397, 3, 350, 0], 401, layout=layout, holes=layout != "packed", ref=True,
            advantages=advantages, rollout=rollout,
        )  # fmt: skip
        given = policy_masks(batch, **masks) if masks else {}
        got = run_loss(impl, batch, **options, **given)
        check(impl, batch, got, true_of(batch, run_loss, **options, **given))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "variant", ["sequence, corrected KL", "cispo", "sapo", "sequence_token", "corrected KL"]
)
def test_variants_in_16_bits(variant, dtype, impl, make_batch, run_loss):
    batch = make_batch(
        [700, 0, 399, 3], 701, dtype=dtype, holes=True, ref=True, advantages="token",
        rollout="sequence",
    )  # fmt: skip
    given = {**VARIANTS[variant], **policy_masks(batch)}
    check(impl, batch, run_loss(impl, batch, **given), true_of(batch, run_loss, **given))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_all_options_together(level, surrogate, impl, make_batch, run_loss):
    """Each surrogate and level on small batches of every other flag."""
    flags = [
        ("sequence", None, True, False, False), ("token", None, True, False, True),
        ("sequence", "token", True, True, False), ("token", "sequence", False, True, True),
        ("sequence", None, False, True, True), ("token", "token", True, False, False),
    ]  # fmt: skip
    for seed, (advantages, rollout, old, corrected, masked) in enumerate(flags):
        batch = make_batch(
            [3, 0, 8, 5], 9, layout="padded" if seed % 2 else "packed_mask", holes=True, seed=seed,
            ref=True, advantages=advantages, rollout=rollout, old=old,
        )  # fmt: skip
        given = {
            "ratio_level": level, "surrogate": surrogate, "beta": 0.2,
            "bias_corrected_kl": corrected,
            **policy_masks(batch, masked, not masked, seed),
        }  # fmt: skip
        check(impl, batch, run_loss(impl, batch, **given), true_of(batch, run_loss, **given))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics(variant, impl, make_batch, run_loss):
    batch = make_batch([5, 0, 9, 3, 17], 20, layout="packed_mask", holes=True, ref=True, seed=3)
    given = {**VARIANTS[variant], **policy_masks(batch)}
    wide = batch.map(torch.Tensor.double)
    expected = run_loss("reference", wide, **given, return_metrics=True).metrics.summary()
    got = run_loss(impl, batch, **given, return_metrics=True).metrics.summary()
    for name, value in got.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=2e-6, abs=5e-7), name
    if impl == "reference":  # policy masks change no metric
        plain = run_loss(impl, batch, **VARIANTS[variant], return_metrics=True).metrics.summary()
        assert all(torch.equal(value, plain[name]) for name, value in got.items())


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_positions_may_hold_anything(poison, impl, make_batch, run_loss, poison_empty):
    """The bits of zeros there, also in the mean over a sequence and without the clamp."""
    fields = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "rollout_weights")
    for variant in ("sequence, corrected KL", "cispo", "sapo", "sequence_token", *OTHERS):
        given = {**{**VARIANTS, **OTHERS}[variant], "log_ratio_clamp": None, "beta": 0.1}
        batch = make_batch(
            [9, 0, 4, 6], 9, holes=True, ref=True, advantages="token", rollout="token"
        )
        given |= policy_masks(batch)
        ignored = ~batch.counted()

        def filled(value, batch=batch, ignored=ignored):
            return batch.replace(
                **{name: getattr(batch, name).masked_fill(ignored, value) for name in fields}
            )

        expected = run_loss(impl, filled(0.0), **given, return_metrics=True)
        got = run_loss(impl, filled(poison), **given, return_metrics=True)
        assert got.loss.isfinite().item()
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad, expected.grad)
        for name, value in got.metrics.summary().items():
            assert torch.equal(value, expected.metrics.summary()[name]), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["sequence", "sapo", "cispo", "corrected KL", *OTHERS])
def test_a_nan_that_counts_is_not_hidden(variant, impl, make_batch, run_loss):
    for name in ("log_probs", "old_log_probs", "advantages", "weights"):
        batch = make_batch([6, 4], 9, ref=True)
        tensor = getattr(batch, name).clone()
        tensor[(0,) * tensor.ndim] = math.nan
        options = {**VARIANTS, **OTHERS}[variant]
        got = run_loss(impl, batch.replace(**{name: tensor}), **options)
        assert got.loss.isnan().item(), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_dropped_term_may_be_anything(poison, impl, make_batch, run_loss):
    """Rows without a policy term: their rollout weights may be what they like."""
    batch = make_batch([6, 4, 8], 9, rollout="sequence")
    keep = torch.tensor([True, False, True], device=batch.log_probs.device)
    expected = run_loss(impl, batch, sequence_mask=keep)
    weights = batch.rollout_weights.clone()
    weights[1] = poison
    got = run_loss(impl, batch.replace(rollout_weights=weights), sequence_mask=keep)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad, expected.grad)
    assert (got.grad[1] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_policy_masks_keep_where_they_are_not_zero(mask_dtype, impl, make_batch, run_loss):
    """Of any dtype and any strides; all ones change nothing, all zeros leave the KL."""
    batch = make_batch([20, 0, 5], 21, holes=True, ref=True)
    masks = policy_masks(batch)
    expected = run_loss(impl, batch, beta=0.2, **masks)
    wide = torch.stack([masks["entropy_mask"].to(mask_dtype)] * 2, -1)[..., 0]
    assert not wide.is_contiguous()
    column = torch.stack([masks["sequence_mask"].to(mask_dtype)] * 2, 1)[:, 0]
    got = run_loss(impl, batch, beta=0.2, entropy_mask=wide, sequence_mask=column)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad, expected.grad)

    ones = {name: torch.ones_like(mask) for name, mask in masks.items()}
    plain = run_loss(impl, batch, beta=0.2)
    same = run_loss(impl, batch, beta=0.2, **ones)
    torch.testing.assert_close(same.grad, plain.grad, rtol=1e-6, atol=1e-9)
    for name, mask in masks.items():
        none = run_loss(impl, batch, beta=0.2, **{name: torch.zeros_like(mask)})
        zero = batch.replace(advantages=torch.zeros_like(batch.advantages))
        kl = run_loss(impl, zero, beta=0.2)
        torch.testing.assert_close(none.grad, kl.grad, rtol=1e-6, atol=1e-9)


# -- invariance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    "variant",
    ["sequence", "sequence, corrected KL", "sequence_token", "cispo", "sapo", *OTHERS],
)
def test_slices_add_up(variant, impl, make_batch, run_loss):
    """Losses to rounding, gradients to the bit: a sequence's mean does not depend on what else is
    in the batch, nor on where the sequence lies in it."""
    batch = make_batch(
        [900, 0, 1300, 17, 64], 1301, holes=True, ref=True, advantages="token", rollout="token"
    )
    masks = policy_masks(batch)
    given = {**VARIANTS, **OTHERS}[variant]
    whole = run_loss(impl, batch, **given, **masks)
    parts = [
        run_loss(
            impl, batch.rows(rows), **given, **{name: mask[rows] for name, mask in masks.items()}
        )
        for rows in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    assert torch.equal(torch.cat([part.grad for part in parts]), whole.grad)
    scale = true_of(batch, run_loss, **given, **masks).loss_scale
    assert abs(sum(part.loss.item() for part in parts) - whole.loss.item()) <= 1e-6 * scale

    flat = batch.replace(
        cu_seqlens=torch.arange(6, device=batch.mask.device) * 1301,
        **{
            name: tensor.reshape(-1)
            for name, tensor in vars(batch).items()
            if tensor is not None and tensor.ndim == 2
        },
    )
    masks["entropy_mask"] = masks["entropy_mask"].reshape(-1)
    packed = run_loss(impl, flat, **given, **masks)
    if impl == "triton":
        assert torch.equal(packed.grad.reshape(whole.grad.shape), whole.grad)
    again = run_loss(impl, flat, **given, **masks)
    assert torch.equal(again.grad, packed.grad) and torch.equal(again.loss, packed.loss)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_both_gradients_of_a_sequence_ratio(impl, make_batch, run_loss):
    """With one advantage a sequence they are the same, and so is an advantage given by token;
    with an entropy mask the terms differ, and so do the gradients."""
    batch = make_batch([60, 9, 31], 61, holes=True)
    narrow = {"eps_low": 0.05, "eps_high": 0.05}
    spread = batch.replace(advantages=batch.spread(batch.advantages).contiguous())
    runs = [
        run_loss(impl, given, ratio_level=level, **narrow)
        for level in ("sequence", "sequence_token")
        for given in (batch, spread)
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run.grad, runs[0].grad, rtol=2e-6, atol=1e-9)
        assert run.loss.item() == pytest.approx(runs[0].loss.item(), rel=1e-6)
    masks = policy_masks(batch, sequence=False)
    one, other = (
        run_loss(impl, batch, ratio_level=level, **masks)
        for level in ("sequence", "sequence_token")
    )
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    assert (one.grad - other.grad).abs().amax() > 0.1 * other.grad.abs().amax()
    # What every log-prob of a sequence changes together is the same.
    torch.testing.assert_close(one.grad.sum(1), other.grad.sum(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [1] * 40])
def test_few_tokens(lengths, layout, impl, make_batch, run_loss, poison_empty):
    batch = make_batch(lengths, layout=layout, ref=True, advantages="sequence")
    for variant in ("sequence, corrected KL", "cispo"):
        got = run_loss(impl, batch, **VARIANTS[variant])
        check(impl, batch, got, true_of(batch, run_loss, **VARIANTS[variant]))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
def test_without_old_log_probs(surrogate, impl, make_batch, run_loss):
    """The ratio is exactly 1; the value of CISPO still has the log-prob."""
    batch = make_batch([6, 4], 9, old=False)
    same = batch.replace(old_log_probs=batch.log_probs.clone())
    got = run_loss(impl, batch, surrogate=surrogate)
    expected = run_loss(impl, same, surrogate=surrogate)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad, expected.grad)
    plain = run_loss(impl, batch)
    torch.testing.assert_close(got.grad, plain.grad, rtol=1e-6, atol=1e-9)


# -- ties and extremes ---------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_sequence_ratio_on_the_bound_has_a_gradient(advantage, impl, make_batch, run_loss):
    """As for a token; TRL's torch.min gives half of it there (both branches are equal)."""
    batch = make_batch([4], 4, max_length=4)
    shift = 0.25 * advantage  # a mean that is exact in any order
    batch = batch.replace(
        log_probs=torch.full_like(batch.log_probs, -1.0),
        old_log_probs=torch.full_like(batch.log_probs, -1.0 - shift),
        advantages=torch.full_like(batch.advantages, advantage),
    )
    options = {"ratio_level": "sequence", "eps_low": 0.9, "eps_high": 3.0}
    ratio = run_loss(impl, batch, **options, return_metrics=True).metrics.ratio_max.cpu().double()
    bound = {"eps_high": ratio.item() - 1} if advantage > 0 else {"eps_low": 1 - ratio.item()}
    on = run_loss(impl, batch, **{**options, **bound})
    assert (on.grad != 0).all()
    past = {name: value - 1e-3 for name, value in bound.items()}
    assert (run_loss(impl, batch, **{**options, **past}).grad == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_ratios(impl, make_batch, run_loss):
    """Ratios up to the clamp at e^20 and past it: SAPO saturates without overflow."""
    batch = make_batch([50, 50], 50, ref=True)
    shifts = torch.linspace(-40, 40, 100, device=batch.log_probs.device).reshape(2, 50)
    batch = batch.replace(old_log_probs=batch.log_probs - shifts)
    for given in ({"surrogate": "sapo"}, {"surrogate": "cispo", "eps_high": 4.0},
                  {"ratio_level": "sequence"}):  # fmt: skip
        got = run_loss(impl, batch, **given)
        wide = run_loss("reference", batch.map(torch.Tensor.double), **given)
        torch.testing.assert_close(got.loss.double(), wide.loss, rtol=1e-5, atol=1e-6)
        # exp(20) is known to 2e-6: the differences of two log-probs near 20 are rounded.
        tolerance = 1e-5 * wide.grad.abs().amax().item()
        torch.testing.assert_close(got.grad.double(), wide.grad, rtol=1e-5, atol=tolerance)


# -- compile, operator, options ------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    ("variant", "layout"),
    [("sequence, corrected KL", "packed"), ("cispo", "padded"), ("sequence, sapo", "padded")],
)
def test_compiles_in_one_graph(variant, layout, impl, make_batch):
    batch = make_batch([30, 0, 5], layout=layout, ref=True, advantages="token")
    given = {**batch.kwargs(), **VARIANTS[variant], **policy_masks(batch), "impl": impl}

    def step(log_probs):
        loss, metrics = dl_norm.policy_loss(
            log_probs, *batch.args()[1:], **given, return_metrics=True
        )
        return 2 * loss, metrics.summary()["ratio_mean"]

    results = []
    torch._dynamo.reset()
    for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step):
        log_probs = batch.log_probs.detach().clone().requires_grad_()
        loss, ratio = function(log_probs)
        loss.backward()
        results.append((loss.detach(), ratio, log_probs.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_opcheck(make_batch):
    batch = make_batch([5, 0, 9], 11, holes=True, ref=True)
    terms = make_token_loss(
        eps_high=0.28, beta=0.1, ratio_level="sequence", surrogate="cispo", bias_corrected_kl=True
    )
    records = dl_norm._batch.make_batch(**vars(batch), **policy_masks(batch))
    arguments = autograd.policy_loss_op.arguments(records, terms, True, True)
    torch.library.opcheck(autograd.policy_loss_op.op, tuple(arguments))


NO_EFFECT = [
    ({"surrogate": "cispo", "dual_clip": 3.0},
     "dual_clip=3.0 has no effect with surrogate='cispo'; omit it"),
    ({"surrogate": "cispo", "delta": 2.0}, "delta=2.0 has no effect"),
    ({"surrogate": "cispo", "sapo_temperature_pos": 2.0}, "sapo_temperature_pos=2.0 has no effect"),
    ({"surrogate": "sapo", "eps_low": 0.1}, "eps_low=0.1 has no effect with surrogate='sapo'"),
    ({"surrogate": "sapo", "eps_high": 0.28}, "eps_high=0.28 has no effect"),
    ({"surrogate": "sapo", "dual_clip": 3.0}, "dual_clip=3.0 has no effect"),
    ({"surrogate": "sapo", "delta": 2.0}, "delta=2.0 has no effect"),
    ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg=2.0 has no effect with surrogate='clip'"),
    ({"surrogate": "sapo", "sapo_temperature_neg": 0.0}, "expected sapo_temperature_neg > 0"),
    ({"surrogate": "SAPO"}, "there is no surrogate 'SAPO': take one of clip, cispo, sapo, policy"),
    ({"ratio_level": "row"}, "ratio_level must be one of 'token', 'sequence', 'sequence_token'"),
    ({"surrogate": "cispo", "eps_low": 0.1, "eps_high": -0.2}, "expected eps_high >= -eps_low"),
    ({"surrogate": "cispo", "eps_low": 1.0, "eps_high": -1.0}, "eps_high > -1"),
    ({"eps_high": -0.1}, "expected eps_high >= 0"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), NO_EFFECT)
def test_options_without_effect_are_refused(options, message, make_batch):
    batch = make_batch([3])
    for call in (
        lambda: dl_norm.policy_loss(*batch.args(), **options),
        lambda: dl_norm.reference.policy_loss(*batch.args(), **options),
        lambda: dl_norm.DeltaLLoss(max_length=8, **options),
        lambda: make_token_loss(**options),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert message in str(raised.value)


def test_bad_policy_masks(make_batch):
    batch = make_batch([3, 5])
    for options, error, message in (
        ({"entropy_mask": batch.mask[:, 1:]}, ValueError,
         "entropy_mask must be (2, 5) like log_probs, got (2, 4)"),
        ({"sequence_mask": batch.mask}, ValueError,
         "sequence_mask must be (B,) = (2,), got (2, 5): a mask of tokens is an entropy_mask"),
        ({"sequence_mask": [True, False]}, TypeError, "sequence_mask must be a tensor, got list"),
        ({"entropy_mask": batch.mask.to("meta")}, ValueError, "entropy_mask is on meta"),
        ({"bias_corrected_kl": 1}, TypeError, "bias_corrected_kl must be True or False, got int"),
    ):  # fmt: skip
        for function in (dl_norm.policy_loss, dl_norm.reference.policy_loss):
            with pytest.raises(error) as raised:
                function(*batch.args(), **options)
            assert message in str(raised.value)


def test_module_and_one_call_pass_them_on(make_batch):
    batch = make_batch([30, 25], ref=True)
    masks = policy_masks(batch)
    base = {"max_length": 64, "alpha": 1.0}
    plain = dl_norm.delta_l_loss(*batch.args()[:4], **base)
    for change in (
        {"ratio_level": "sequence"}, {"surrogate": "cispo"},
        {"surrogate": "sapo", "sapo_temperature_pos": 2.0},
        {"surrogate": "sapo", "sapo_temperature_neg": 2.0},
        {"beta": 0.5, "bias_corrected_kl": True},
    ):  # fmt: skip
        given = {"ref_log_probs": batch.ref_log_probs, **masks}
        module = dl_norm.DeltaLLoss(**base, **change)
        got = module(*batch.args()[:4], **given)
        expected = dl_norm.delta_l_loss(*batch.args()[:4], **base, **change, **given)
        assert torch.equal(got, expected) and not torch.equal(got, plain), change


def test_luspo_weights():
    lengths = torch.tensor([3, 0, 9, 1])
    assert dl_norm.sequence_weights(lengths, "luspo").tolist() == pytest.approx(
        [1 / 3, 0] + [1 / 3] * 2
    )
    assert dl_norm.sequence_weights(lengths * 0, "luspo").tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="no effect"):
        dl_norm.sequence_weights(lengths, "luspo", max_length=8)

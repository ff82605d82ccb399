"""Ratio levels, surrogates, KL correction and policy masks beside the trainers that have them.

Values, gradients and metrics against the real losses of TRL and verl, taken out of the installed
packages. Budgets: float64 against float64 1e-11, some thousand roundings; float32 3e-6 of the
largest term of a token's gradient before any clip, or of the sum of the absolute terms.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from bench.lift import NotInstalled, lift
from dl_norm._log_probs.off_policy import off_policy_sequence_mask
from dl_norm.surrogates import DppoKL, DppoTV, Gmpo

IMPLEMENTATIONS = ("triton", "torch", "reference")
BUDGET = 3e-6


@functools.cache
def lifted(module: str, name: str, *used: tuple[str, object]):
    try:
        return lift(module, name, dict(used))
    except NotInstalled as error:
        pytest.skip(str(error))


# -- TRL's real loss -----------------------------------------------------------------------------


class NoPrompt:
    """A prompt of no tokens: torch.cat with it is the completion."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.cat
        return args[0][1]


def trl(name: str):
    utilities = (
        (tool, lifted("trl.trainer.utils", tool, ("torch", torch))) for tool in ("nanmin", "nanmax")
    )
    tools = (("torch", torch), ("math", math), *utilities)
    return lifted("trl.trainer.grpo_trainer", f"GRPOTrainer.{name}", *tools)


def trl_loss(batch, entropies=None, function=None, **options):
    """Loss, gradient and logged metrics of GRPOTrainer._compute_loss on a padded batch."""
    settings = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "beta": 0.0, "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0, "sampling_log_probs": None,
    }  # fmt: skip
    arguments = {
        "delta": None, "steps_per_generation": 1, "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    }  # fmt: skip
    for name, value in options.items():
        (arguments if name in arguments else settings)[name] = value
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    metrics = defaultdict(lambda: defaultdict(list))
    mask = batch.mask.long()
    no_prompt = NoPrompt()
    entropies = torch.zeros_like(log_probs) if entropies is None else entropies
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
        _metrics=metrics,
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=SimpleNamespace(**arguments),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        get_high_entropy_mask=functools.partial(
            trl("get_high_entropy_mask"), SimpleNamespace(accelerator=accelerator)
        ),
        get_off_policy_mask=trl("get_off_policy_mask"),
        get_gamma_weights=torch.no_grad()(trl("get_gamma_weights")),
        max_completion_length=32,
        model=SimpleNamespace(training=True),
        use_vllm=batch.rollout_weights is not None,
        vllm_importance_sampling_correction=True,
        **settings,
    )
    inputs = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_probs,
        "ref_per_token_logps": batch.ref_log_probs,
        "num_items_in_batch": mask.sum(),
    }
    if settings["sampling_log_probs"] is not None:
        inputs["sampling_per_token_logps"] = settings["sampling_log_probs"]
    if batch.rollout_weights is not None:
        inputs["importance_sampling_ratio"] = batch.rollout_weights
    loss = (function or trl("_compute_loss"))(trainer, None, inputs)
    (grad,) = torch.autograd.grad(loss, log_probs)
    return SimpleNamespace(loss=loss.detach(), grad=grad, metrics=metrics["train"])


# (weights of ours, options of TRL, options of ours, what the batch has)
GSPO = {"importance_sampling_level": "sequence"}
KL = {"beta": 0.3}
CORRECTED = {**KL, "use_bias_correction_kl": True}
OURS_CORRECTED = {**KL, "bias_corrected_kl": True}
VESPO = {"surrogate": "vespo", "ratio_level": "sequence_sum"}
TRL_CASES = {
    "grpo": ("grpo", {}, {}, {}),
    "gspo": ("grpo", GSPO, {"ratio_level": "sequence"}, {}),
    "gspo, narrow clip": (
        "grpo",
        {**GSPO, "epsilon_low": 0.03, "epsilon_high": 0.04},
        {"ratio_level": "sequence", "eps_low": 0.03, "eps_high": 0.04},
        {},
    ),
    "gspo, two-sided": (
        "dapo",
        {**GSPO, "delta": 1.1},
        {"ratio_level": "sequence", "delta": 1.1},
        {},
    ),
    "gspo, KL": ("dr_grpo", {**GSPO, **KL}, {"ratio_level": "sequence", **KL}, {"ref": True}),
    "gspo, corrected KL": (
        "grpo",
        {**GSPO, **CORRECTED},
        {"ratio_level": "sequence", **OURS_CORRECTED},
        {"ref": True, "rollout": "token"},
    ),
    # TRL clamps the ratio at epsilon_high itself and has no lower bound.
    "cispo": (
        "dapo",
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"surrogate": "cispo", "eps_low": 1.0, "eps_high": 1.3 - 1},
        {},
    ),
    "cispo, default bound of TRL": (
        "dapo",
        {"loss_type": "cispo"},
        {"surrogate": "cispo", "eps_low": 1.0, "eps_high": 0.2 - 1},
        {"rollout": "token"},
    ),
    "cispo, sequence ratio, corrected KL": (
        "dapo",
        {"loss_type": "cispo", "epsilon_high": 1.05, **GSPO, **CORRECTED},
        {
            "surrogate": "cispo", "eps_low": 1.0, "eps_high": 1.05 - 1, "ratio_level": "sequence",
            **OURS_CORRECTED,
        },
        {"ref": True},
    ),
    "sapo": ("grpo", {"loss_type": "sapo"}, {"surrogate": "sapo"}, {}),
    "vespo": ("dapo", {"loss_type": "vespo", **KL}, {**VESPO, **KL}, {"ref": True}),
    "vespo, settings": (
        "dapo",
        {
            "loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.5,
            "vespo_lambda_neg": 1.5,
        },
        {**VESPO, "surrogate": "vespo(1, 0.5, 2.5, 1.5)"},
        {},
    ),
    "sapo, temperatures": (
        "grpo",
        {"loss_type": "sapo", "sapo_temperature_pos": 0.75, "sapo_temperature_neg": 3.0},
        {"surrogate": "sapo", "sapo_temperature_pos": 0.75, "sapo_temperature_neg": 3.0},
        {"rollout": "token"},
    ),
    "sapo, sequence ratio, KL": (
        "grpo",
        {"loss_type": "sapo", **GSPO, **KL},
        {"surrogate": "sapo", "ratio_level": "sequence", **KL},
        {"ref": True},
    ),
    "luspo": ("luspo", {"loss_type": "luspo"}, {}, {}),
    "luspo, sequence ratio": (
        "luspo",
        {"loss_type": "luspo", **GSPO, **KL},
        {"ratio_level": "sequence", **KL},
        {"ref": True},
    ),
    "corrected KL": ("grpo", CORRECTED, OURS_CORRECTED, {"ref": True}),
    "corrected KL, two-sided": (
        "dapo",
        {**CORRECTED, "delta": 1.3},
        {**OURS_CORRECTED, "delta": 1.3},
        {"ref": True, "rollout": "token"},
    ),
    "corrected KL, sapo": (
        "grpo",
        {**CORRECTED, "loss_type": "sapo"},
        {**OURS_CORRECTED, "surrogate": "sapo"},
        {"ref": True},
    ),
}  # fmt: skip
LENGTHS = [9, 1, 30, 17, 24, 2]


def exact(batch, method: str):
    """The batch in float64, its weights too: those of sequence_weights are rounded to float32."""
    lengths = batch.mask.sum(1).double()
    weights = {
        "grpo": 1 / (len(lengths) * lengths),
        "dapo": torch.ones_like(lengths) / lengths.sum(),
        "dr_grpo": torch.ones_like(lengths) / (len(lengths) * 32),
        "luspo": torch.ones_like(lengths) / len(lengths),
    }[method]
    torch.testing.assert_close(batch.weights.double(), weights, rtol=1e-7, atol=0)
    return batch.map(torch.Tensor.double).replace(weights=weights)


def trl_type(method: str, options: dict) -> dict:
    return {"loss_type": "dapo" if method == "dapo" else method, **options}


def agree(impl, got, expected, scale_of_grad=None) -> None:
    """Against a loss of the same precision: float64 for the reference, else float32."""
    tolerance = 1e-11 if impl == "reference" else BUDGET
    scale = expected.grad.abs().amax().item() if scale_of_grad is None else scale_of_grad
    assert scale > 0
    error = (got.grad.double() - expected.grad.double()).abs().amax().item()
    assert error <= tolerance * scale, f"gradient off by {error:.3g} of {scale:.3g}"
    # The absolute terms of the loss: at most some ten times the largest term of the gradient each.
    budget = tolerance * scale * got.grad.numel()
    assert abs(got.loss.item() - expected.loss.item()) <= budget


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("advantages", ["sequence", "token"])
@pytest.mark.parametrize("case", TRL_CASES)
def test_trl(case, advantages, impl, make_batch, run_loss):
    """Per-token advantages too: a token's derivative then contains those of its sequence."""
    method, theirs, ours, kind = TRL_CASES[case]
    batch = make_batch(
        LENGTHS, 32, method=method, max_length=32, holes=True, advantages=advantages, **kind
    )
    assert (batch.mask.sum(1) > 0).all()  # TRL averages over empty rows too
    wide = exact(batch, method)
    if "sapo_temperature_pos" not in ours and ours.get("surrogate") == "sapo":
        # TRL holds the default 1.05 in float32 whatever the dtype of the loss.
        rounded = {"sapo_temperature_neg": torch.tensor(1.05).item()}
        ours = {**ours, **(rounded if impl == "reference" else {})}
    expected = trl_loss(wide, **trl_type(method, theirs))
    got = run_loss(impl, wide if impl == "reference" else batch, **ours)
    agree(impl, got, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_trl_averages_over_empty_rows(impl, make_batch, run_loss):
    """The edge that differs, as for the "grpo" weights: G counts sequences with tokens here."""
    batch = make_batch([9, 0, 12, 0], 12, method="luspo")
    expected = trl_loss(batch.map(torch.Tensor.double), loss_type="luspo", **GSPO)
    got = run_loss(impl, batch, ratio_level="sequence")
    assert got.loss.item() == pytest.approx(expected.loss.item() * 4 / 2, rel=1e-5)
    torch.testing.assert_close(got.grad.double(), expected.grad * 4 / 2, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_trl_vespo_with_the_ratios_of_the_engine(impl, make_batch, run_loss):
    """They are part of the product and no factor: the old log-probs less their logs."""
    batch = make_batch(LENGTHS, 32, method="dapo", holes=True, rollout="token")
    ratios = batch.rollout_weights.masked_fill(~batch.mask.bool(), 1.0)
    ratios[4, 3] = 0.0  # as token_mask has them: log 1e-8
    wide = exact(batch.replace(rollout_weights=ratios), "dapo")
    expected = trl_loss(wide, loss_type="vespo")
    used = wide if impl == "reference" else batch
    old = used.old_log_probs - ratios.to(used.log_probs.dtype).log().clamp(min=math.log(1e-8))
    got = run_loss(impl, used.replace(old_log_probs=old, rollout_weights=None), **VESPO)
    agree(impl, got, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gmpo(impl, make_batch, run_loss):
    """TRL's and verl's, with tokens clipped on both sides and a sequence of one token."""
    batch = make_batch(LENGTHS, 32, method="grpo", holes=True, ref=True)
    wide = exact(batch, "grpo")
    bounds = {"epsilon_low": 0.05, "epsilon_high": 0.08}
    trl_gmpo = lifted(
        "trl.experimental.gmpo.gmpo_trainer", "GMPOTrainer._compute_loss", ("torch", torch),
        *((tool, lifted("trl.trainer.utils", tool, ("torch", torch)))
          for tool in ("nanmin", "nanmax")),
    )  # fmt: skip
    expected = trl_loss(wide, function=trl_gmpo, **bounds, **KL)
    used = wide if impl == "reference" else batch
    ours = {"ratio_level": "sequence", "surrogate": Gmpo(0.05, 0.08)}
    got = run_loss(impl, used, **ours, **KL, return_metrics=True)
    agree(impl, got, expected)
    metrics = got.metrics.summary()
    for key, name in (("low", "clip_ratio/low_mean"), ("high", "clip_ratio/high_mean")):
        found = metrics[f"clip_fraction_{key}"].item()
        assert found == pytest.approx(expected.metrics[name][0], rel=1e-6) != 0
    # By token, as verl has advantages; with weights of whole sequences.
    theirs = verl_loss("geo_mean", wide, clip_ratio_low=0.05, clip_ratio_high=0.08)
    got = run_loss(impl, used, **ours)
    error = (got.grad.double() - theirs.grad).abs().amax() / theirs.grad.abs().amax()
    assert error.item() <= (1e-7 if impl == "reference" else BUDGET)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("advantages", ["sequence", "token"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_policy_masks(level, advantages, impl, make_batch, run_loss):
    """TRL's entropy mask and off-policy mask drop policy terms and keep the KL."""
    batch = make_batch(LENGTHS, 32, method="grpo", holes=True, ref=True, advantages=advantages)
    generator = torch.Generator().manual_seed(5)
    entropies = torch.rand(batch.mask.shape, generator=generator).to(batch.mask.device)
    wide = exact(batch, "grpo")
    threshold = 0.02
    theirs = {
        "importance_sampling_level": level, "beta": 0.2, "top_entropy_quantile": 0.4,
        "off_policy_mask_threshold": threshold,
    }  # fmt: skip
    expected = trl_loss(wide, entropies, **theirs)
    accelerator = SimpleNamespace(
        gather=lambda x: x, pad_across_processes=lambda x, dim, pad_index: x
    )
    high = trl("get_high_entropy_mask")(
        SimpleNamespace(accelerator=accelerator), entropies, batch.mask.long(), 1 - 0.4
    )
    used = wide if impl == "reference" else batch
    near = off_policy_sequence_mask(
        used.log_probs, used.old_log_probs, used.advantages, used.mask, threshold
    )
    assert near.any() and not near.all() and high[batch.mask].float().mean() < 0.5
    if advantages == "sequence":
        masks = {"entropy_mask": high, "sequence_mask": near}
    else:
        masks = {"entropy_mask": high & near}
    got = run_loss(impl, used, ratio_level=level, beta=0.2, **masks)
    agree(impl, got, expected)
    without = run_loss(impl, used, ratio_level=level, beta=0.2)
    assert (without.grad - got.grad).abs().amax() > 0.1 * got.grad.abs().amax()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_trl_metrics(impl, make_batch, run_loss):
    """Clip fractions, and the KL that TRL logs: the corrected one where it is corrected."""
    batch = make_batch(LENGTHS, 32, method="grpo", holes=True, ref=True)
    wide = batch.map(torch.Tensor.double)
    used = wide if impl == "reference" else batch

    def both(theirs, **ours):
        metrics = run_loss(impl, used, **ours, return_metrics=True).metrics
        return trl_loss(wide, **theirs).metrics, metrics

    theirs, ours = both(CORRECTED, **OURS_CORRECTED)
    summary = ours.summary()
    assert summary["kl_ref"].item() == pytest.approx(theirs["kl"][0], rel=1e-5)
    for name, key in (("clip_ratio/low_mean", "low"), ("clip_ratio/high_mean", "high")):
        assert theirs[name][0] > 0
        assert summary[f"clip_fraction_{key}"].item() == pytest.approx(theirs[name][0], rel=1e-6)

    theirs, ours = both(
        {"loss_type": "cispo", "epsilon_high": 1.3},
        surrogate="cispo", eps_low=1.0, eps_high=1.3 - 1,
    )  # fmt: skip
    expected = theirs["cispo_clip_ratio"][0]
    assert ours.summary()["clip_fraction_high"].item() == pytest.approx(expected, rel=1e-6) != 0

    # TRL counts sequences at this level, we the tokens of the same sequences.
    narrow = {"epsilon_low": 0.03, "epsilon_high": 0.03}
    theirs, ours = both(
        {**GSPO, **narrow}, ratio_level="sequence", eps_low=0.03, eps_high=0.03
    )  # fmt: skip
    log_ratio = ((wide.log_probs - wide.old_log_probs) * wide.mask).sum(1) / wide.mask.sum(1)
    high = (log_ratio.exp() > 1.03) & (wide.advantages > 0)
    assert theirs["clip_ratio/high_mean"][0] == pytest.approx(high.double().mean().item()) != 0
    assert ours.clipped_high.item() == (high[:, None] & wide.mask).sum().item()

    for name in ("clipped_low", "clipped_high", "clipped_dual"):
        sapo = run_loss(impl, used, surrogate="sapo", return_metrics=True).metrics
        assert getattr(sapo, name).item() == 0


@pytest.mark.parametrize("advantages", ["sequence", "token"])
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
def test_off_policy_sequence_mask(layout, advantages, make_batch):
    """TRL's decisions, with tokens that the engine could not score (NaN), and by the formula."""
    for seed, threshold in itertools.product(range(4), (0.01, 0.1)):
        kind = {"holes": layout != "packed", "seed": seed, "advantages": advantages}
        padded = make_batch(LENGTHS, 32, **kind)
        batch = make_batch(LENGTHS, 32, layout=layout, **kind)
        counted = padded.mask.bool()
        unscored = counted & (torch.arange(32, device=counted.device) % 7 == 3)

        def arranged(values, like=batch, counted=counted):
            return values[counted] if layout == "packed" else values.reshape(like.log_probs.shape)

        old = padded.old_log_probs.masked_fill(unscored, math.nan)
        given = padded.advantages if advantages == "token" else padded.advantages[:, None]
        expected = trl("get_off_policy_mask")(
            given, padded.log_probs, old, padded.mask.long(), threshold
        ).bool()
        poisoned = batch.log_probs.masked_fill(~batch.counted(), math.nan)
        got = off_policy_sequence_mask(
            poisoned, arranged(old), batch.advantages, batch.mask, threshold,
            cu_seqlens=batch.cu_seqlens,
        )  # fmt: skip
        assert got.dtype == torch.bool
        if advantages == "token":
            real = batch.counted()
            assert torch.equal(got[real], arranged(expected)[real])
        else:
            assert torch.equal(got, expected[:, 0])


def test_off_policy_sequence_mask_of_nothing(make_batch):
    batch = make_batch([0, 3], 5)
    bad = torch.full_like(batch.advantages, -1.0)
    far = batch.log_probs + 5.0
    got = off_policy_sequence_mask(batch.log_probs, far, bad, batch.mask, 0.5)
    assert got.tolist() == [True, False]
    with pytest.raises(ValueError, match="expected threshold > 0"):
        off_policy_sequence_mask(batch.log_probs, far, bad, batch.mask, 0.0)
    with pytest.raises(TypeError, match="old_log_probs must be a tensor"):
        off_policy_sequence_mask(batch.log_probs, None, bad, batch.mask, 0.5)
    with pytest.raises(ValueError, match="advantages must be"):
        off_policy_sequence_mask(batch.log_probs, far, bad[:1], batch.mask, 0.5)


# -- verl's real losses --------------------------------------------------------------------------


class ActorConfig(SimpleNamespace):
    def get(self, name, default):
        return getattr(self, name, default)


def verl_loss(name: str, batch, **config):
    """verl's loss under loss_agg_mode="seq-mean-token-mean", with our "grpo" weights' scale."""
    functional, algorithms = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    masked_sum = lifted(functional, "masked_sum", ("torch", torch))
    masked_mean = lifted(functional, "masked_mean", ("torch", torch), ("masked_sum", masked_sum))
    tools = (
        ("torch", torch),
        ("verl_F", Hashable(masked_sum=masked_sum, masked_mean=masked_mean)),
        ("ActorConfig", ActorConfig),
        ("AlgoConfig", type(None)),
    )
    agg_loss = lifted(algorithms, "agg_loss", *tools)
    function = lifted(algorithms, f"compute_policy_loss_{name}", *tools, ("agg_loss", agg_loss))
    settings = {
        "clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "tau_pos": 1.0,
        "tau_neg": 1.05, "global_batch_info": {}, **config,
    }  # fmt: skip
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    loss, metrics = function(
        batch.old_log_probs, log_probs, batch.spread(batch.advantages), batch.mask,
        loss_agg_mode="seq-mean-token-mean", config=ActorConfig(**settings),
        rollout_is_weights=batch.rollout_weights,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, log_probs)
    return SimpleNamespace(loss=loss.detach(), grad=grad, metrics=metrics)


class Hashable(SimpleNamespace):
    def __hash__(self):
        return hash(tuple(sorted(vars(self))))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rollout", [None, "token"])
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("gspo", {"clip_ratio": 0.05}, {"ratio_level": "sequence_token", "eps_low": 0.05,
                                        "eps_high": 0.05}),
        ("cispo", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.1},
         {"surrogate": "cispo", "eps_low": 0.3, "eps_high": 0.1}),
        ("sapo", {}, {"surrogate": "sapo"}),
        ("gpg", {}, {"surrogate": "policy_gradient"}),
        ("dppo_tv", {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": 1.2},
         {"surrogate": DppoTV(0.02, 0.03, ratio_cap=1.2)}),
        ("dppo_tv", {}, {"surrogate": "dppo_tv(ratio_cap=20)"}),
        ("dppo_kl", {"clip_ratio": 0.002}, {"surrogate": DppoKL(0.002, 0.002, ratio_cap=20)}),
        ("dro", {"policy_loss": SimpleNamespace(dro_beta=0.3)}, {"surrogate": "dro(0.3)"}),
    ],
)  # fmt: skip
def test_verl(name, theirs, ours, rollout, impl, make_batch, run_loss):
    """Advantages and rollout weights by token: verl's gspo has the gradient of GSPO-token."""
    batch = make_batch(LENGTHS, 32, method="grpo", holes=True, advantages="token", rollout=rollout)
    wide = batch.map(torch.Tensor.double)
    expected = verl_loss(name, wide, **theirs)
    got = run_loss(impl, wide if impl == "reference" else batch, return_metrics=True, **ours)
    # verl divides by the length + 1e-8.
    loose = SimpleNamespace(loss=got.loss, grad=got.grad)
    error = (loose.grad.double() - expected.grad).abs().amax() / expected.grad.abs().amax()
    assert error.item() <= (1e-7 if impl == "reference" else BUDGET)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-6)
    summary = got.metrics.summary()
    if name == "cispo" or name.startswith("dppo"):  # every clipped one, of either sign of A
        clipped = sum(summary[f"clip_fraction_{where}"] for where in ("low", "high", "dual"))
        assert clipped.item() == pytest.approx(expected.metrics["actor/pg_clipfrac"], rel=1e-5)

"""Rollout correction beside the trainers' own code: value and gradient of the loss.

Of TRL, verl, OpenRLHF, AReaL and SkyRL the installed source; of slime, NeMo-RL and ROLL the clones
of TRAINER_SOURCES. Where a trainer's loss is a mean, its normaliser is put into our weights.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import trl.trainer.grpo_trainer as trl_source

import dl_norm
from bench.lift import NotInstalled, read_source
from dl_norm import Reject, RolloutCorrection
from dl_norm.integrations import rollout as settings_of

sys.path.append(str(Path(__file__).parent))
from adapter_tools import ROOT, THEIRS, Lenient, lift, source

IMPLEMENTATIONS = ("triton", "torch")


class Data:
    """Log-probs of three policies, padded; the gap to the rollout differs between sequences."""

    def __init__(self, missing: bool = False):
        random = torch.Generator().manual_seed(7)
        shape = (5, 12)

        def normal(scale):
            return scale * torch.randn(shape, generator=random)

        self.mask = torch.arange(12) < torch.tensor([12, 5, 1, 9, 12])[:, None]
        self.mask[3, 2:4] = False
        self.old = -0.3 - 3 * torch.rand(shape, generator=random)
        gap = torch.tensor([0.0, 0.15, -0.4, -0.03, 0.01])[:, None]
        self.rollout = self.old + gap + normal(0.2)
        self.log_probs = (self.old + normal(0.3)).requires_grad_()
        self.advantages = torch.randn(5, generator=random)
        if missing:
            self.rollout[0, 3] = self.rollout[4, 0] = math.nan
        self.tokens = self.mask.sum()

    def ours(self, impl: str, correction: RolloutCorrection | None, old: bool = True, **options):
        """Of a sum over all tokens."""
        more = {} if correction is None else {"rollout_log_probs": self.rollout}
        return dl_norm.policy_loss(
            self.log_probs, self.old if old else None, self.advantages, self.mask,
            torch.ones(5), impl=impl, rollout_correction=correction, **{**more, **options},
        )  # fmt: skip

    def check(self, theirs: torch.Tensor, correction: RolloutCorrection | None, **options) -> None:
        (expected,) = torch.autograd.grad(theirs, self.log_probs)
        assert expected.abs().max() > 0
        plain = self.ours("torch", None, **{**options, "rollout_mean_weight": None}).detach()
        if correction is not None:
            assert (plain - theirs.detach()).abs() > 1e-3  # the correction is seen
        for impl in IMPLEMENTATIONS:
            loss = self.ours(impl, correction, **options)
            torch.testing.assert_close(loss, theirs, **THEIRS)
            (gradient,) = torch.autograd.grad(loss, self.log_probs)
            torch.testing.assert_close(gradient, expected, **THEIRS)


# -- TRL


@functools.cache
def trl_ratio() -> Any:
    """The statements of GRPOTrainer that make the ratio, as a function."""
    tree = ast.parse(read_source("trl.trainer.grpo_trainer"))
    nodes = [
        node for node in ast.walk(tree) if isinstance(node, ast.If)
        and any(
            isinstance(s, ast.Assign) and getattr(s.targets[0], "id", "") == "per_token_logps_diff"
            for s in node.body
        )
    ]  # fmt: skip
    assert len(nodes) == 1, "TRL has moved: its ratio is made elsewhere"
    function = ast.parse(
        "def ratio(self, old_per_token_logps, sampling_per_token_logps, completion_mask, "
        "tool_mask):\n    pass\n    return vllm_importance_sampling_ratio"
    )
    function.body[0].body[0] = nodes[0]  # type: ignore
    space: dict[str, Any] = {"torch": torch, "math": math}
    exec(compile(ast.fix_missing_locations(function), "trl", "exec"), space)
    return space["ratio"]


@pytest.mark.parametrize("missing", [False, True], ids=["scored", "NaN"])
@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        ("token_truncate", None, 1.15), ("token_truncate", 0.9, 1.2), ("token_mask", 0.8, 1.2),
        ("token_mask", None, 1.1), ("sequence_truncate", 0.5, 1.5),
        ("sequence_mask", None, 3.0), ("sequence_mask", 0.6, None),
    ],
)  # fmt: skip
def test_trl(mode, low, high, missing):
    data = Data(missing)
    trainer = SimpleNamespace(
        use_vllm=True, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    ratio = trl_ratio()(trainer, data.old, data.rollout, data.mask.long(), None)
    log_probs = data.log_probs
    trainer = SimpleNamespace(
        **vars(trainer), accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, log_probs * 0, None),
        _metrics=defaultdict(lambda: defaultdict(list)), _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, steps_per_generation=1), aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        loss_type="dapo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2,
        beta=0.0, off_policy_mask_threshold=None, top_entropy_quantile=1.0,
    )  # fmt: skip
    prompt = data.mask[:, :0].long()
    loss = trl_source.GRPOTrainer._compute_loss(
        trainer, None,
        {
            "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": data.mask.long(),
            "completion_mask": data.mask.long(), "advantages": data.advantages,
            "old_per_token_logps": data.old, "num_items_in_batch": data.tokens,
            "importance_sampling_ratio": ratio,
        },
    )  # fmt: skip
    assert settings_of.trl(SimpleNamespace(**{**vars(trainer), "use_vllm": False})) is None
    data.check(loss * data.tokens, settings_of.trl(trainer))


# -- verl


@functools.cache
def verl_modules() -> tuple[Any, Any]:
    found = sorted(ROOT.glob(".venv-verl/lib/python3*/site-packages/verl"))
    if not found:
        pytest.skip("verl is not there: bash ci/verl_env.sh")
    functional = lift(
        f"{found[0]}/utils/torch_functional.py", "masked_sum", "masked_mean",
        "distributed_masked_mean",
    )  # fmt: skip
    proto = SimpleNamespace(from_dict=lambda tensors: SimpleNamespace(batch=tensors))
    helper = lift(
        f"{found[0]}/trainer/ppo/rollout_corr_helper.py", "SAFETY_BOUND",
        "_parse_rollout_is_threshold",
        "_parse_rollout_rs_thresholds", "compute_rollout_rejection_mask", "compute_rs_metrics",
        "compute_rollout_correction_weights", "compute_is_metrics", "compute_offpolicy_metrics",
        "compute_rollout_correction_and_rejection_mask",
        verl_F=functional, math=math, Optional=Optional, Any=Any, DataProto=proto,
        **_annotated(found[0] / "trainer/ppo/rollout_corr_helper.py"),
    )  # fmt: skip
    core = lift(
        f"{found[0]}/trainer/ppo/core_algos.py", "compute_policy_loss_vanilla",
        "compute_policy_loss_reinforce", verl_F=functional, AlgoConfig=dict,
        agg_loss=lambda loss_mat, loss_mask, loss_agg_mode: (loss_mat * loss_mask).sum(),
    )  # fmt: skip
    return helper, core


def _annotated(file: Path) -> dict[str, Any]:
    """The constants of its source that have annotations."""
    nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.literal_eval(node.value) for node in nodes}  # type: ignore


ALL_RS = (
    "token_k1,token_k2,token_k3,seq_sum_k1,seq_sum_k2,seq_sum_k3,seq_mean_k1,seq_mean_k2,"
    "seq_mean_k3,seq_max_k2,seq_max_k3"
)
VERL = {
    "token TIS": {"rollout_is": "token", "rollout_is_threshold": 1.1},
    "token IcePop": {"rollout_is": "token", "rollout_is_threshold": "0.8_1.2"},
    "token TIS, normalised": {
        "rollout_is": "token", "rollout_is_threshold": 1.1, "rollout_is_batch_normalize": True
    },
    "sequence TIS": {"rollout_is": "sequence", "rollout_is_threshold": 1.3},
    "sequence IcePop, normalised": {
        "rollout_is": "sequence", "rollout_is_threshold": "0.3_3",
        "rollout_is_batch_normalize": True,
    },
    "token TIS, geometric": {
        "rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_rs": "seq_mean_k1",
        "rollout_rs_threshold": "0.95_1.08",
    },
    "sequence TIS, tokens rejected": {
        "rollout_is": "sequence", "rollout_is_threshold": 1.3, "rollout_rs": "token_k1",
        "rollout_rs_threshold": 1.2,
    },
    "all of them": {
        "rollout_is": None, "rollout_rs": ALL_RS,
        "rollout_rs_threshold": "0.7_1.3,0.06,0.05,0.1_4,1,1,0.7_1.3,0.05,0.05,0.2,0.2",
    },
    **{
        name: {"rollout_is": None, "rollout_rs": name, "rollout_rs_threshold": threshold}
        for name, threshold in {
            "token_k2": 0.02, "token_k3": 0.02, "seq_sum_k1": "0.5_2", "seq_sum_k2": 0.15,
            "seq_sum_k3": 0.15, "seq_mean_k2": 0.013, "seq_mean_k3": 0.012, "seq_max_k2": 0.05,
            "seq_max_k3": 0.05,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bypass"),
    [*((name, False) for name in VERL), *((name, True) for name in VERL if " " in name)],
)
def test_verl(name, bypass):
    """Weights and rejections by its helper, the loss by its vanilla loss; in bypass mode its
    REINFORCE with the current policy's weights."""
    data, config = Data(), VERL[name]
    helper, core = verl_modules()
    ahead = data.log_probs.detach() if bypass else data.old
    found, mask, metrics = helper.compute_rollout_correction_and_rejection_mask(
        ahead, data.rollout, data.mask.long(), **config
    )
    weights = None if found is None else found.batch["rollout_is_weights"]
    actor = Lenient(clip_ratio=0.2, get=lambda name, default: default, global_batch_info={})
    advantages = data.advantages[:, None].expand(5, 12)
    correction = settings_of.verl(config)
    options: dict[str, Any] = {}
    if config.get("rollout_is_batch_normalize"):
        mean = dl_norm.rollout_mean_weight(ahead, data.rollout, data.mask, correction)
        options["rollout_mean_weight"] = mean
        factor = metrics["rollout_corr/rollout_is_batch_norm_factor"]
        assert mean.item() == pytest.approx(factor, rel=1e-6)
    if bypass:
        loss, _ = core.compute_policy_loss_reinforce(
            data.rollout, data.log_probs, advantages, mask, config=actor,
            rollout_is_weights=weights,
        )  # fmt: skip
        # -A log pi, as dl_norm has it: CISPO whose clipped ratio is 1.
        options |= {"surrogate": "cispo", "eps_low": 0.0, "eps_high": 0.0, "old": False}
    else:
        loss, _ = core.compute_policy_loss_vanilla(
            data.old, data.log_probs, advantages, mask, config=actor, rollout_is_weights=weights
        )
        options["dual_clip"] = 3.0
    data.check(loss, correction, **options)
    if bypass:
        return
    options.pop("rollout_mean_weight", None)
    _, seen = data.ours("torch", correction, return_metrics=True, **options)
    summary = seen.summary()
    ours = {name: float(summary[f"rollout_{name}"]) for name in ("k1", "k3")}
    theirs = {"k1": metrics["rollout_corr/kl"], "k3": metrics["rollout_corr/k3_kl"]}
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    if config["rollout_is"] == "token" and "rollout_rs" not in config:
        names = {"ess": "eff_sample_size", "weight_max": "max"}
        for mine, other in names.items():
            expected = metrics[f"rollout_corr/rollout_is_{other}"]
            if mine == "weight_max" and correction.mode == "truncate":
                expected = min(expected, correction.high)  # theirs is that before truncation
            assert float(summary[f"rollout_{mine}"]) == pytest.approx(expected, rel=1e-5)


# -- OpenRLHF


@functools.cache
def openrlhf_loss() -> Any:
    folder = source_folder("openrlhf/models")
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))  # named, not used
    package = ModuleType("openrlhf_rollout")
    package.__path__ = [str(folder)]
    patch.setitem(sys.modules, "openrlhf_rollout", package)
    for name in ("utils", "loss"):
        full = f"openrlhf_rollout.{name}"
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)  # type: ignore
        patch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)  # type: ignore
    patch.undo()
    return module


def source_folder(path: str) -> Path:
    folder = ROOT / ".venv-trainers" / path
    if not folder.exists():
        pytest.skip(f"{path} is not there: bash ci/trainers_env.sh")
    return folder


OPENRLHF = {
    "TIS": (("token", "clip", "ratio", (0.8, 1.2)), RolloutCorrection(low=0.8, high=1.2)),
    "ICEPOP": (
        ("token", "mask", "ratio", (0.8, 1.2)), RolloutCorrection(mode="mask", low=0.8, high=1.2)
    ),
    "seq-mask-tis": (
        ("seq", "mask", "ratio", (0.9, 1.1)),
        RolloutCorrection(reject=Reject("k1", "mean", 0.9, 1.1)),
    ),
    "off": (("off", "mask", "ratio", (0.5, 5.0)), None),
}  # fmt: skip


def openrlhf_settings(level, mode, gating, threshold) -> dict[str, Any]:
    return {
        "is_correction_level": level, "is_correction_mode": mode, "is_correction_gating": gating,
        "is_correction_threshold": list(threshold),
    }  # fmt: skip


@pytest.mark.parametrize("name", OPENRLHF)
def test_openrlhf(name):
    """The whole of its loss, and its settings as its command line and its loss hold them."""
    given, expected = OPENRLHF[name]
    data, settings = Data(), openrlhf_settings(*given)
    module = openrlhf_loss().PolicyLoss(**settings)
    for config in (settings, SimpleNamespace(**settings), module):
        assert settings_of.openrlhf(config) == expected
    total = module(
        data.log_probs, data.old, data.advantages[:, None], data.mask.float(), data.rollout,
        batch_num_tokens=1.0,
    )[0]  # fmt: skip
    data.check(total, expected)


@pytest.mark.parametrize(
    ("level", "gating", "high"),
    [
        ("token", "binary_kl", 0.004), ("token", "tv", 0.03), ("seq", "binary_kl", 0.006),
        ("seq", "tv", 0.03),
    ],
)  # fmt: skip
def test_openrlhf_gate(level, gating, high):
    data, settings = Data(), openrlhf_settings(level, "mask", gating, (0.0, high))
    kept = settings_of.openrlhf_gate(settings, data.old, data.rollout, data.mask)
    assert 0 < kept.sum() < data.mask.sum() and not (kept & ~data.mask).any()
    total = openrlhf_loss().PolicyLoss(**settings)(
        data.log_probs, data.old, data.advantages[:, None], data.mask.float(), data.rollout,
        batch_num_tokens=1.0,
    )[0]  # fmt: skip
    data.mask = kept
    data.check(total, RolloutCorrection())


def test_openrlhf_refuses():
    for gating in ("binary_kl", "tv"):
        settings = openrlhf_settings("seq", "mask", gating, (0.0, 0.1))
        openrlhf_loss().PolicyLoss(**settings)
        with pytest.raises(ValueError, match=gating):
            settings_of.openrlhf(settings)
    data = Data()
    settings = openrlhf_settings("token", "mask", "ratio", (0.5, 5.0))
    with pytest.raises(ValueError, match="no mask is needed"):
        settings_of.openrlhf_gate(settings, data.old, data.rollout, data.mask)
    module = openrlhf_loss().PolicyLoss(**settings, policy_loss_type="gspo")
    with pytest.raises(ValueError, match="ratio_level='sequence'"):
        settings_of.openrlhf(module)


# -- AReaL


@functools.cache
def areal_loss() -> Any:
    from dataclasses import dataclass, field

    estimator = lift("areal/utils/data.py", "KLEstimator._compute_approx_kl")
    config = lift(
        "areal/api/cli_args.py",
        "RejectionSamplingConfig",
        keep=("RejectionSamplingConfig",),
        dataclass=dataclass,
        field=field,
    )
    functions = lift(
        "areal/utils/functional/functional.py", "RejectionSamplingResult", "_check_bounds",
        "apply_rejection_sampling", "ppo_actor_loss_fn", keep=("RejectionSamplingResult",),
        dataclass=dataclass,
        KLEstimator=estimator, RejectionSamplingConfig=object,
    )  # fmt: skip
    return SimpleNamespace(config=config.RejectionSamplingConfig, loss=functions.ppo_actor_loss_fn)


def areal_settings(level="token", action="mask", metric="ratio", agg="mean", upper=5.0, lower=None):
    """Its class, which checks them; a sequence's agg is said, a token's has no effect."""
    return areal_loss().config(
        level=level, action=action, metric=metric, agg=agg, upper=upper, lower=lower
    )


AREAL = {
    "its default": {"upper": 1.2},
    "token mask": {"upper": 1.2, "lower": 0.8},
    "token clamp": {"action": "clamp", "upper": 1.1, "lower": 0.9},
    "token clamp above": {"action": "clamp", "upper": 1.1},
    "token k1": {"metric": "kl_k1", "upper": 0.15, "lower": -0.2},
    "token k1 above": {"metric": "kl_k1", "upper": 0.15},
    "token k2": {"metric": "kl_k2", "upper": 0.02},
    "token k3": {"metric": "kl_k3", "upper": 0.02},
    "sequence mask": {"level": "sequence", "upper": 1.05, "lower": 0.9},
    "sequence clamp": {"level": "sequence", "action": "clamp", "upper": 1.05, "lower": 0.9},
    "sequence sum": {"level": "sequence", "agg": "sum", "upper": 1.5, "lower": 0.5},
    "sequence max": {"level": "sequence", "agg": "max", "upper": 1.4},
    "mean k1": {"level": "sequence", "metric": "kl_k1", "upper": 0.05, "lower": -0.1},
    "sum k1": {"level": "sequence", "metric": "kl_k1", "agg": "sum", "upper": 0.3},
    "max k1": {"level": "sequence", "metric": "kl_k1", "agg": "max", "upper": 0.3},
    "mean k2": {"level": "sequence", "metric": "kl_k2", "upper": 0.02},
    "sum k2": {"level": "sequence", "metric": "kl_k2", "agg": "sum", "upper": 0.2},
    "max k2": {"level": "sequence", "metric": "kl_k2", "agg": "max", "upper": 0.06},
    "max k3": {"level": "sequence", "metric": "kl_k3", "agg": "max", "upper": 0.06},
}


def areal_of(data: Data, settings: Any, packed: bool) -> torch.Tensor:
    """Its loss as a sum over the tokens."""
    flat = torch.Tensor.flatten if packed else (lambda stream: stream)
    loss, _ = areal_loss().loss(
        logprobs=flat(data.log_probs), proximal_logprobs=flat(data.old),
        old_logprobs=flat(data.rollout), loss_mask=flat(data.mask), eps_clip=0.2,
        advantages=flat(data.advantages[:, None].expand(5, 12)), rejection_sampling=settings,
        cu_seqlens=torch.arange(6) * 12 if packed else None,
    )  # fmt: skip
    return loss * data.tokens


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", AREAL)
def test_areal(name, packed):
    """The whole of its decoupled loss; tokens without a counted one stay out."""
    data, settings = Data(), areal_settings(**AREAL[name])
    data.check(areal_of(data, settings, packed), settings_of.areal(settings))


@pytest.mark.parametrize("name", ["token mask", "sequence mask", "sequence clamp"])
def test_areal_without_rollout_log_probs(name):
    """A token whose ratio is NaN counts as one of ratio 1, there and here."""
    data, settings = Data(missing=True), areal_settings(**AREAL[name])
    data.check(areal_of(data, settings, False), settings_of.areal(settings))
    assert settings_of.areal(None) is None


@pytest.mark.parametrize("bound", [1e-6, 0.02, 0.5, 3.0, 50.0])
def test_areal_k3_bounds(bound):
    """The bounds of the ratio are where its k3 is the bound."""
    reject = settings_of.areal(areal_settings(metric="kl_k3", upper=bound)).reject[0]
    for ratio in (reject.low, reject.high):
        log = math.log(ratio)
        assert math.expm1(-log) + log == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "kl_k3"}, {"metric": "kl_k3", "agg": "sum"}, {"agg": "max", "lower": 0.5},
        {"metric": "kl_k1", "agg": "max", "lower": -0.5},
        {"metric": "kl_k1", "agg": "max", "lower": 0.0}, {"action": "clamp", "agg": "sum"},
        {"action": "clamp", "agg": "max"}, {"metric": "kl_k2", "lower": 0.1},
    ],
)  # fmt: skip
def test_areal_refuses(changes):
    with pytest.raises(ValueError, match="no counterpart"):
        settings_of.areal(areal_settings(level="sequence", **changes))


# -- SkyRL


SKYRL = {
    "token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.1},
    "sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.3},
    "token, geometric mask": {
        "tis_ratio_type": "token", "token_tis_ratio_clip_high": 2.0,
        "sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.1,
    },
    "product mask": {
        "sequence_mask_metric": "product", "product_mask_low": 0.5, "product_mask_high": 2.0
    },
    "outliers": {
        "tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 5.0,
        "outlier_token_is_threshold_low": 0.75, "outlier_token_is_threshold_high": 1.6,
    },
    "token mask": {
        "tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2,
        "token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 1.3,
        "outlier_token_is_threshold_low": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SKYRL)
def test_skyrl(name):
    utils = "skyrl/backends/skyrl_train/utils"
    torch_utils = lift(f"{utils}/torch_utils.py", "masked_mean", "safe_exp_delta")
    correction = lift(
        f"{utils}/off_policy_correction_utils.py", "off_policy_correction_enabled",
        "compute_tis_ratio", "compute_outlier_token_mask", "compute_token_mask",
        "compute_sequence_mask", "compute_off_policy_correction", "apply_off_policy_correction",
        **vars(torch_utils),
    )  # fmt: skip
    ppo = lift(
        f"{utils}/ppo_utils.py", "reduce_loss", "ppo_policy_loss", **vars(torch_utils),
        **vars(correction),
    )  # fmt: skip
    data = Data()
    config = SimpleNamespace(
        policy_loss_type="regular", eps_clip_low=0.2, eps_clip_high=0.2,
        off_policy_correction=Lenient(**SKYRL[name]),
    )  # fmt: skip
    loss, _ = ppo.ppo_policy_loss(
        data.log_probs, data.old, data.advantages[:, None], config, data.mask.float(), data.rollout
    )
    data.check(loss, settings_of.skyrl(SKYRL[name]))


def test_skyrl_what_has_no_counterpart():
    with pytest.raises(ValueError, match="leaves the masked tokens out"):
        settings_of.skyrl({**SKYRL["token mask"], "tis_ratio_type": "sequence"})


# -- slime


def slime_loss(function: str, data: Data, **args):
    module = lift("slime/slime/backends/megatron_utils/loss.py", function, Any=Any)
    ppo = lift("slime/slime/utils/ppo_utils.py", "compute_policy_loss")
    cut = {
        name: [row[here] for row, here in zip(stream, data.mask, strict=True)]
        for name, stream in (("old", data.old), ("rollout", data.rollout))
    }
    advantages = data.advantages[:, None].expand(5, 12)[data.mask]
    loss, _ = ppo.compute_policy_loss(
        torch.cat(cut["old"]) - data.log_probs[data.mask], advantages, 0.2, 0.2, None
    )
    masks = [torch.ones_like(row) for row in cut["old"]]
    loss, masks, _ = getattr(module, function)(
        SimpleNamespace(**args), pg_loss=loss, train_log_probs=cut["old"],
        rollout_log_probs=cut["rollout"], loss_masks=masks,
    )  # fmt: skip
    return (loss * torch.cat(masks)).sum()


@pytest.mark.parametrize("function", ["vanilla_tis_function", "icepop_function"])
def test_slime(function):
    data = Data()
    mode = "truncate" if function == "vanilla_tis_function" else "mask"
    args = {"tis_clip_low": 0.85, "tis_clip": 1.2}
    loss = slime_loss(function, data, **args)
    path = f"slime.backends.megatron_utils.loss.{function}"
    correction = settings_of.slime({**args, "use_tis": True, "custom_tis_function_path": path})
    assert correction == RolloutCorrection(mode=mode, low=0.85, high=1.2)
    data.check(loss, correction)


@pytest.mark.parametrize(
    ("args", "correction"),
    [
        ({"tis_level": "geometric"}, RolloutCorrection("geometric", high=1.05)),
        (
            {"tis_mode": "clip", "tis_level": "sequence", "tis_lower_bound": 0.7},
            RolloutCorrection("sequence", low=0.7, high=1.05),
        ),
        (
            {"use_rs": True, "rs_level": "geometric", "rs_lower_bound": 0.8, "rs_upper_bound": 1.2,
             "rs_veto_threshold": 0.7},
            RolloutCorrection(high=1.05, reject=Reject("k1", "mean", 0.8, 1.2), veto=0.7),
        ),
        (
            {"tis_mode": "mask", "tis_lower_bound": 0.8},
            RolloutCorrection(mode="mask", low=0.8, high=1.05),
        ),
    ],
)  # fmt: skip
def test_slime_mis(args, correction):
    """Its example of every level, with rejection and veto."""
    names = ("masked_sum", "masked_mean", "masked_min", "masked_max", "metrics_append",
             "calculate_veto_mask", "truncate", "clip", "mask", "compute_mis_weights")  # fmt: skip
    module = lift(
        "slime/examples/train_infer_mismatch_helper/mis.py", *names, Any=Any,
        add_ppl_metrics=lambda *_: None,
    )  # fmt: skip
    data = Data()
    given = Lenient(use_tis=True, tis_mode="truncate", tis_level="token", tis_upper_bound=1.05)
    for name, value in args.items():
        setattr(given, name, value)
    weights, masks, _ = module.compute_mis_weights(
        given, train_log_probs=list(data.old), rollout_log_probs=list(data.rollout),
        loss_masks=list(data.mask.float()),
    )  # fmt: skip
    ratio = (data.log_probs - data.old).exp()
    advantages = data.advantages[:, None]
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    given.custom_tis_function_path = "train_infer_mismatch_helper.mis.compute_mis_weights"
    assert settings_of.slime(given) == correction
    data.check((terms * torch.stack(weights) * torch.stack(masks)).sum(), correction)


# -- NeMo-RL


NEMO = {
    "off": ({"use_importance_sampling_correction": False}, None),
    "untruncated": ({}, RolloutCorrection()),
    "tis": (
        {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.2},
        RolloutCorrection(high=1.2),
    ),
    "icepop": (
        {
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 1.2,
            "truncated_importance_sampling_ratio_min": 0.8,
        },
        RolloutCorrection(mode="mask", low=0.8, high=1.2),
    ),
    "seq-mask-tis": (
        {
            "truncated_importance_sampling_type": "seq-mask-tis",
            "truncated_importance_sampling_ratio": 1.1,
            "truncated_importance_sampling_ratio_min": 0.9,
        },
        RolloutCorrection(reject=Reject("k1", "mean", 0.9, 1.1)),
    ),
}


@pytest.mark.parametrize("name", NEMO)
def test_nemo_rl(name):
    """The whole of its loss."""
    import enum
    from typing import TypedDict

    changes, expected = NEMO[name]
    folder = "RL/nemo_rl/algorithms"
    text = source(f"{folder}/loss/interfaces.py").read_text()
    enums = [
        name
        for name in ("LossType", "LossInputType", "MetricNormalizer")
        if f"class {name}" in text
    ]
    interfaces = lift(f"{folder}/loss/interfaces.py", *enums, enum=enum)
    utils = lift(f"{folder}/utils.py", "masked_mean", "calculate_kl", Optional=Optional)
    theirs = lift(
        f"{folder}/loss/loss_functions.py", "ClippedPGLossFn", **vars(interfaces), **vars(utils),
        LossFunction=object, TypedDict=TypedDict, Optional=Optional,
    )  # fmt: skip
    config = nemo_config(folder)(
        **{
            "reference_policy_kl_penalty": 0.0, "ratio_clip_min": 0.2, "ratio_clip_max": 0.2,
            "use_importance_sampling_correction": True, **changes,
        }
    )  # fmt: skip
    assert settings_of.nemo_rl(config) == expected
    data = Data()

    def shifted(stream):
        return torch.cat([torch.zeros(5, 1), stream.float()], 1)

    loss, _ = theirs.ClippedPGLossFn(config)(
        data.log_probs,
        {
            "token_mask": shifted(data.mask), "sample_mask": torch.ones(5),
            "advantages": shifted(data.advantages[:, None].expand(5, 12)),
            "prev_logprobs": shifted(data.old), "generation_logprobs": shifted(data.rollout),
        },
        torch.tensor(5.0), data.tokens,
    )  # fmt: skip
    data.check(loss * data.tokens, expected)


def nemo_config(folder: str) -> Any:
    pydantic = pytest.importorskip("pydantic")
    tree = ast.parse(source(f"{folder}/loss/loss_functions.py").read_text())
    node = next(n for n in tree.body if getattr(n, "name", "") == "ClippedPGLossConfig")
    space: dict[str, Any] = {"BaseModel": pydantic.BaseModel, "Optional": Optional}
    exec(compile(ast.Module([node], []), "nemo_rl", "exec", dont_inherit=True), space)
    return space["ClippedPGLossConfig"]


# -- ROLL


def roll_module() -> Any:
    functionals = lift(
        "ROLL/roll/utils/functionals.py", "masked_mean", "masked_sum", "agg_loss", Optional=Optional
    )
    segments = lift("ROLL/roll/pipeline/agentic/utils.py", "compute_segment_masked_mean")
    return lift(
        "ROLL/roll/utils/train_infer_corrections.py", "_compute_all_granularity",
        "_infer_global_valid_samples_from_mask", "_infer_global_valid_tokens_from_mask",
        "compute_train_infer_correction", **vars(functionals), **vars(segments), Dict=dict,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "filters", "correction"),
    [
        (("token", 1.2), [], RolloutCorrection(high=1.2)),
        (("sequence", 1.5), [], RolloutCorrection("sequence", high=1.5)),
        (("geometric", None), [], RolloutCorrection("geometric")),
        (
            ("token", 1.5), [("geometric", 0.9, 1.1), ("token", 0.7, 1.6)],
            RolloutCorrection(
                high=1.5, reject=(Reject("k1", "mean", 0.9, 1.1), Reject("k1", low=0.7, high=1.6))
            ),
        ),
        (
            None, [("sequence", 0.8, 1.5)],
            RolloutCorrection("none", reject=Reject("k1", "sum", 0.8, 1.5)),
        ),
    ],
)  # fmt: skip
def test_roll(weight, filters, correction):
    module = roll_module()
    data = Data()
    level, high = weight or ("token", None)
    config = SimpleNamespace(
        is_weight=SimpleNamespace(
            enabled=weight is not None, weight_type=level, upper_bound=high, detach=True
        ),
        filters=[
            SimpleNamespace(
                enabled=True, agg_type=agg, ratio_enabled=True, ratio_low=low, ratio_high=high,
                diff_enabled=False,
            )
            for agg, low, high in filters
        ],
    )  # fmt: skip
    assert settings_of.roll(config) == correction
    weights, keep, _ = module.compute_train_infer_correction(
        config, data.mask.long(), data.old, data.rollout
    )
    ratio = (data.log_probs - data.old).exp()
    advantages = data.advantages[:, None]
    # As its actor worker puts it together.
    terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * weights
    data.check((terms * data.mask * keep).sum(), correction)


_ = NotInstalled  # raised by read_source where TRL is not there

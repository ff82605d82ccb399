"""slime and its fork Miles: advantage step, loss dispatch and scaling around the hooks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_stand_ins import fake_miles, fake_slime, miles_samples, slime_args, slime_batch
from adapter_tools import (
    CLIP,
    LENGTHS,
    THEIRS,
    Lenient,
    Rollout,
    calls,
    check_hook,
    fake,
    lift,
    make_rollout,
    source,
)
from torch import Tensor

from dl_norm.integrations import miles, slime
from dl_norm.integrations import rollout as settings_of

MIS = "train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slime(monkeypatch)
    fake_miles(monkeypatch)


@pytest.mark.parametrize("trainer", [slime, miles])
def test_reducer(rollout: Rollout, trainer: Any) -> None:
    """The token losses as slime has them, NaN where masked: the reducer must not see it."""
    batch = slime_batch(rollout)
    slime.advantages(slime_args(), batch)
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 6)):
        new, old, mask, advantages = (
            torch.cat(batch[name][part])
            for name in ("new_log_probs", "log_probs", "loss_masks", "advantages")
        )
        ratio = (new - old).exp()
        negative = torch.clamp(ratio, 1 - CLIP["eps_low"], CLIP["dual_clip"])
        positive = torch.clamp(ratio, max=1 + CLIP["eps_high"])
        tokens = -torch.where(advantages < 0, negative, positive) * advantages
        reduce = trainer.pg_loss_reducer(
            batch["total_lengths"][part], batch["response_lengths"][part], batch["loss_masks"][part]
        )
        total = total + reduce(tokens.masked_fill(mask == 0, torch.nan))
    rollout.check(total / len(LENGTHS))


@pytest.mark.parametrize("change", ["calculate_per_token_loss", "normalize_advantages", "use_opd"])
def test_advantages_refuse(rollout: Rollout, change: str) -> None:
    args, words = slime_args(**{change: True}), change.replace("_", "[-_]")
    with pytest.raises(ValueError, match=words):
        slime.advantages(args, slime_batch(rollout))
    with pytest.raises(ValueError, match=words):
        miles.rewards(args, miles_samples(rollout))


@pytest.mark.parametrize("trainer", [slime, miles])
@pytest.mark.parametrize(
    "change", ["calculate_per_token_loss", "use_kl_loss", "entropy_coef", "use_opsm"]
)
def test_loss_refuses(rollout: Rollout, trainer: Any, change: str) -> None:
    args, batch = slime_args(**{change: True}), slime_batch(rollout)
    with pytest.raises(ValueError, match=change.replace("_", "[-_]")):
        trainer.policy_loss(args, batch, batch["new_log_probs"], None)


@pytest.mark.parametrize("trainer", [slime, miles])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"custom_tis_function_path": "mine.tis"}, "cannot read as settings"),
        ({"custom_tis_function_path": "mine.mis.compute_mis_weights"}, "cannot read as settings"),
        (
            {
                "custom_tis_function_path": MIS,
                "tis_batch_normalize": True,
                "tis_mode": "mask",
                "tis_upper_bound": 2.0,
            },
            "tis_batch_normalize has a counterpart at the levels token and sequence",
        ),
        (
            {
                "custom_tis_function_path": MIS,
                "tis_batch_normalize": True,
                "tis_upper_bound": 2.0,
                "rollout_log_probs": True,
            },
            "delta_l_mean_weight is missing",
        ),
        ({"use_rollout_logprobs": True}, "nothing to correct"),
        ({}, "rollout_log_probs is missing"),
    ],
)
def test_correction_refuses(
    rollout: Rollout, trainer: Any, changes: dict[str, Any], words: str
) -> None:
    args = slime_args(use_tis=True, **{"tis_clip_low": 0.0, "tis_clip": 2.0, **changes})
    batch = one_sample(rollout, 1)
    if "rollout_log_probs" in changes:
        batch["rollout_log_probs"] = batch["log_probs"]
    with pytest.raises(ValueError, match=words):
        trainer.policy_loss(args, batch, batch["logits"], None)


@pytest.mark.parametrize("name", ["delta_l_options", "delta_l_from_logits"])
def test_options_of_the_fused_loss_want_it(rollout: Rollout, name: str) -> None:
    args = slime_args(**{name: {"eps_low": 0.1}}, loss_type="policy_loss")
    with pytest.raises(ValueError, match=name):
        slime.advantages(args, slime_batch(rollout))
    with pytest.raises(ValueError, match=name):
        miles.rewards(args, miles_samples(rollout))


def test_miles_has_no_loss_from_logits(rollout: Rollout) -> None:
    batch = one_sample(rollout, 1)
    with pytest.raises(ValueError, match="delta_l_from_logits"):
        miles.policy_loss(slime_args(delta_l_from_logits=True), batch, batch["logits"], None)


def test_needs_the_constant(rollout: Rollout) -> None:
    args = slime_args(delta_l_max_length=None)
    with pytest.raises(ValueError, match="delta_l_max_length"):
        slime.advantages(args, slime_batch(rollout))
    with pytest.raises(ValueError, match="delta_l_max_length"):
        miles.rewards(args, miles_samples(rollout))


def test_miles_estimators_and_adapters(rollout: Rollout) -> None:
    samples = miles_samples(rollout)
    with pytest.raises(ValueError, match="advantage_estimator='ppo'"):
        miles.rewards(slime_args(advantage_estimator="ppo"), samples)
    samples[1].adapter = SimpleNamespace(slot=1)
    with pytest.raises(ValueError, match="LoRA"):
        miles.rewards(slime_args(), samples)


def test_siblings_count_once(rollout: Rollout) -> None:
    """slime and Miles divide a step by its rollouts, however many samples one has."""
    results = []
    for sums in (rollout.lengths, torch.tensor([3, 6, 0, 5, 9, 9])):
        batch = slime_batch(rollout) | {"rollout_mask_sums": sums}
        slime.advantages(slime_args(), batch)
        results.append(torch.cat(batch["advantages"]))
    torch.testing.assert_close(results[1], 5 / 6 * results[0])

    samples = miles_samples(rollout)
    _, apart = miles.rewards(slime_args(), samples)
    samples[4].rollout_id = samples[5].rollout_id = 77
    _, together = miles.rewards(slime_args(), samples)
    assert together == pytest.approx([5 / 6 * reward for reward in apart])


def one_sample(rollout: Rollout, row: int) -> dict[str, Any]:
    """A micro-batch of one sample: its mean over samples is that over tokens."""
    batch = slime_batch(rollout)
    part = {name: values[row : row + 1] for name, values in batch.items()}
    return part | {
        "advantages": [torch.full_like(part["kl"][0], part["rewards"][0])],
        "logits": part["new_log_probs"],
        "unconcat_tokens": None,
        "rollout_mask_sums": [mask.sum() for mask in part["loss_masks"]],
    }


# -- the trainers' own code


KEYS = ("response_lengths", "total_lengths", "loss_masks", "log_probs", "advantages")


def log_probs_of(logits: Tensor, **kwargs: Any) -> Any:
    """The logits are log-probs already here: the kernels for them need Megatron."""
    parts = list(logits.split(kwargs["response_lengths"]))
    return {"log_probs": parts, "entropy": [part.detach() for part in parts]}


def step(loss_function: Any, data: dict[str, Any]) -> Tensor:
    """Two micro-batches on two data-parallel ranks, as Megatron adds and averages them."""
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 6)):
        batch = {key: data[key][part] for key in KEYS} | {"unconcat_tokens": None}
        batch["rollout_mask_sums"] = [mask.sum() for mask in batch["loss_masks"]]
        loss, _, log = loss_function(batch, torch.cat(data["new_log_probs"][part]))
        assert {"loss", "pg_loss", "pg_clipfrac", "ppo_kl"} <= set(log["keys"])
        total = total + loss / 2
    return total / 2


MILES_LOSSES = "miles/miles/backends/training_utils/loss_hub/losses.py"


def own_slime() -> Any:
    """slime's advantage step and losses, alone; one rank of two."""
    mpu = SimpleNamespace(
        get_data_parallel_group=lambda: None,
        get_context_parallel_world_size=lambda: 1,
        get_data_parallel_world_size=lambda with_context_parallel: 2,
        is_pipeline_last_stage=lambda: True,
    )

    folder = "slime/slime"
    cp_utils = lift(
        f"{folder}/backends/megatron_utils/cp_utils.py", "get_sum_of_sample_mean", mpu=mpu
    )
    ppo = lift(f"{folder}/utils/ppo_utils.py", "compute_policy_loss", "get_grpo_returns")
    module = lift(
        f"{folder}/backends/megatron_utils/loss.py",
        "compute_advantages_and_returns",
        "get_rollout_top_p_logprob_kwargs",
        "vanilla_tis_function",
        "icepop_function",
        "policy_loss_function",
        "loss_function",
        **vars(cp_utils),
        **vars(ppo),
        mpu=mpu,
        load_function=lift(
            f"{folder}/utils/misc.py", "load_function", importlib=importlib
        ).load_function,
        get_log_probs_and_entropy=lambda *args, **kwargs: (None, log_probs_of(*args, **kwargs)),
        _maybe_capture_log_probs=lambda *args: None,
    )
    module.mpu = mpu
    return module


@pytest.mark.parametrize("hook", ["reducer", "loss"])
def test_slime(rollout: Rollout, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime's own advantage step, loss dispatch and scaling around the hooks."""
    module = own_slime()
    check_hook(module.policy_loss_function, "slime")
    fake(monkeypatch, "megatron.core", mpu=module.mpu)
    fake(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=lambda *args, **kwargs: (None, log_probs_of(*args, **kwargs)),
        get_rollout_top_p_logprob_kwargs=module.get_rollout_top_p_logprob_kwargs,
    )
    path = "dl_norm.integrations.slime"
    args = Lenient(
        **vars(slime_args()),
        custom_advantage_function_path=f"{path}.advantages",
        custom_pg_loss_reducer_function_path=f"{path}.pg_loss_reducer",
        loss_type="policy_loss" if hook == "reducer" else "custom_loss",
        custom_loss_function_path=f"{path}.policy_loss",
        kl_coef=0,
        entropy_coef=0,
        rollout_top_p=1.0,
    )
    data = slime_batch(rollout)
    module.compute_advantages_and_returns(args, data)
    total = step(lambda batch, logits: module.loss_function(args, batch, 2, 6, logits), data)
    # slime 0.3.1 has --eps-clip-c, but its own loss does not read it yet.
    text = source("slime/slime/backends/megatron_utils/loss.py").read_text()
    dual = hook == "loss" or "eps_clip_c=args.eps_clip_c" in text
    rollout.check(total, dual_clip=CLIP["dual_clip"] if dual else None)


@pytest.mark.parametrize(
    "path", ["slime/slime/backends/megatron_utils/loss.py", MILES_LOSSES], ids=["slime", "Miles"]
)
def test_reducer_is_called_as_recorded(path: str) -> None:
    (call,) = calls(path, "custom_pg_loss_reducer_func")
    arguments = [ast.unparse(argument) for argument in call.args]
    assert len(arguments) == 4 and arguments[3] == "args.calculate_per_token_loss", arguments


def test_slime_calls_the_advantage_function_as_recorded() -> None:
    (call,) = calls("slime/slime/backends/megatron_utils/loss.py", "custom_adv_fn")
    assert [ast.unparse(argument) for argument in call.args] == ["args", "rollout_data"]


def load_function() -> Any:
    """Miles' own, which finds a function by its path."""
    return lift(
        "miles/miles/utils/misc.py", "load_function", importlib=importlib, function_registry={}
    ).load_function


def own_miles() -> tuple[Any, Any]:
    """Miles' losses and its advantage step and dispatch, alone; one rank of two."""
    folder = "miles/miles/backends/training_utils"
    size = SimpleNamespace(size=2, group=None)
    state = SimpleNamespace(
        cp=SimpleNamespace(size=1), intra_dp=size, intra_dp_cp=size, effective_dp=size,
        is_pp_last_stage=True, is_ulysses_cp=False,
    )  # fmt: skip
    common = {"get_parallel_state": lambda: state, "Callable": None}
    cp_utils = lift(
        f"{folder}/cp_utils.py",
        "get_sum_of_sample_mean",
        "get_local_response_loss_masks",
        "_slice_loss_mask_for_local_cp",
        "slice_loss_masks_for_local_cp",
        **common,
    )
    math_utils = lift(
        f"{folder}/loss_hub/math_utils.py",
        "compute_ess_ratio_contribution",
        "_LOG_RATIO_EXP_CLAMP",
        "_safe_clamp_log_ratio",
        "_safe_exp_neg_ppo_kl",
        "compute_approx_kl",
        "compute_policy_loss",
        "get_grpo_returns",
        **common,
        **vars(cp_utils),
    )
    corrections = lift(f"{folder}/loss_hub/corrections.py", "vanilla_tis_function")
    losses = lift(
        MILES_LOSSES,
        "policy_loss_function",
        "get_loss_function",
        **common,
        **vars(cp_utils),
        **vars(math_utils),
        load_function=load_function(),
        vanilla_tis_function=corrections.vanilla_tis_function,
        get_log_probs_and_entropy=log_probs_of,
    )
    advantages = lift(f"{folder}/loss_hub/advantages.py", "compute_advantages", **vars(math_utils))
    return losses, lift(
        f"{folder}/loss.py",
        "_detach_rollout_tensor_list",
        "compute_advantages_and_returns",
        "loss_function",
        **common,
        **vars(cp_utils),
        **vars(losses),
        **vars(advantages),
        is_multi_lora_enabled=lambda args: False,
    )


@pytest.mark.parametrize("hook", ["reducer", "loss"])
@pytest.mark.parametrize("backend", ["Megatron", "FSDP"])
def test_miles(rollout: Rollout, hook: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Miles' own reward normalisation, advantages, loss dispatch and scaling around the hooks."""
    losses, module = own_miles()
    check_hook(losses.policy_loss_function, "slime")
    conversion = lift(
        "miles/miles/ray/rollout/train_data_conversion.py",
        "_reward_group_segments",
        "_normalize_rewards_by_rollout",
        "_post_process_rewards",
    )
    fake(monkeypatch, "miles.ray.rollout.train_data_conversion", **vars(conversion))
    name = "miles.backends.training_utils.loss_hub.logit_processors"
    fake(monkeypatch, name, get_log_probs_and_entropy=log_probs_of)

    path = "dl_norm.integrations.miles"
    args = Lenient(
        **vars(slime_args()),
        custom_pg_loss_reducer_function_path=f"{path}.pg_loss_reducer",
        loss_type="policy_loss" if hook == "reducer" else "custom_loss",
        custom_loss_function_path=f"{path}.policy_loss",
        grpo_std_normalization=True,
        rewards_normalization=True,
        kl_coef=0,
        entropy_coef=0,
        qkv_format="thd",
        use_dynamic_global_batch_size=False,
        global_batch_size=len(LENGTHS),
    )
    samples = miles_samples(rollout)
    for sample in samples:
        sample.get_reward_value = lambda args, reward=sample.reward: reward
    raw, normalised = conversion._post_process_rewards(args, samples, None)
    assert raw != normalised
    rollout = replace(rollout, advantages=torch.tensor(normalised))
    data = slime_batch(rollout)
    reward_hook = load_function()(f"{path}.rewards")
    check_hook(reward_hook, "miles rewards")
    _, data["rewards"] = conversion._post_process_rewards(args, samples, reward_hook)
    del data["kl"]
    module.compute_advantages_and_returns(args, data)
    scaling = (True, len(LENGTHS)) if backend == "Megatron" else (False, None)
    total = step(lambda batch, logits: module.loss_function(args, batch, 2, logits, *scaling), data)
    # Miles' FSDP backend adds micro-batches up, Megatron averages them.
    rollout.check(total if backend == "Megatron" else 2 * total)


# -- rollout correction


TIS = {"tis_clip_low": 0.85, "tis_clip": 1.1}
MIS_SETTINGS = {
    "custom_tis_function_path": MIS, "use_rs": False, "tis_mode": "truncate", "tis_level": "token",
    "tis_upper_bound": 1.1,
}  # fmt: skip
CORRECTIONS: dict[str, dict[str, Any]] = {
    "TIS": TIS,
    "IcePop": TIS | {"custom_tis_function_path": "icepop_function"},
    "MIS, sequence": MIS_SETTINGS | {"tis_level": "sequence", "tis_mode": "clip"},
    "MIS, masked tokens": MIS_SETTINGS | {"tis_mode": "mask", "tis_lower_bound": 0.9},
    "MIS, geometric decides": MIS_SETTINGS
    | {"use_rs": True, "rs_level": "geometric", "rs_lower_bound": 0.95, "rs_upper_bound": 1.2},
    "MIS, sequence decides, veto": MIS_SETTINGS
    | {"use_rs": True, "rs_level": "sequence", "rs_veto_threshold": 0.7, "tis_lower_bound": 0.5},
    "MIS, bounds by default": MIS_SETTINGS | {"use_rs": True, "rs_level": "token"},
}
ICEPOP = {
    "slime": "slime.backends.megatron_utils.loss.icepop_function",
    "miles": "miles.backends.training_utils.loss_hub.corrections.icepop_function",
}
EXAMPLES = {
    "slime": "slime/examples/train_infer_mismatch_helper/mis.py",
    "miles": "miles/examples/infra_features/train_infer_mismatch_helper/mis.py",
}
CP_UTILS = {
    "slime": "slime.backends.megatron_utils.cp_utils",
    "miles": "miles.backends.training_utils.cp_utils",
}


def own_losses(trainer: str, patch: pytest.MonkeyPatch) -> Any:
    """The trainer's policy loss, where its own corrections are found by their paths."""
    whole = {"all_gather_with_cp": lambda x, *_: x, "slice_log_prob_with_cp": lambda x, *_: x}
    fake(patch, CP_UTILS[trainer], **whole)  # of one context-parallel rank
    spec = importlib.util.spec_from_file_location("mis", source(EXAMPLES[trainer]))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fake(patch, "train_infer_mismatch_helper.mis", **vars(module))
    module, _, function = ICEPOP[trainer].rpartition(".")
    path = f"{module.replace('.', '/')}.py"
    fake(
        patch, module, **{function: getattr(lift(f"{trainer}/{path}", function, Any=Any), function)}
    )
    if trainer == "slime":
        own = own_slime()
        patch.setattr(
            sys.modules["slime.backends.megatron_utils.loss"], "get_log_probs_and_entropy",
            own.policy_loss_function.__globals__["get_log_probs_and_entropy"],
        )  # fmt: skip
        return own
    name = "miles.backends.training_utils.loss_hub.logit_processors"
    fake(patch, name, get_log_probs_and_entropy=log_probs_of)
    return own_miles()[0]


@pytest.mark.parametrize("trainer", [slime, miles])
@pytest.mark.parametrize("recomputed", [True, False], ids=["old", "no old"])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_correction(
    rollout: Rollout, trainer: Any, kind: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the kernel, against the trainer's own loss with its own function: value, gradient and
    metrics."""
    name = trainer.__name__.rpartition(".")[2]
    own = own_losses(name, monkeypatch)
    settings = dict(CORRECTIONS[kind])
    if kind == "IcePop":
        settings["custom_tis_function_path"] = ICEPOP[name]
    args = Lenient(
        **vars(slime_args()), **settings, use_tis=True, entropy_coef=0, rollout_top_p=1.0,
        qkv_format="thd", skip_actor_forward_only=not recomputed,
        custom_pg_loss_reducer_function_path=f"{trainer.__name__}.pg_loss_reducer",
    )  # fmt: skip
    random = torch.Generator().manual_seed(8)
    gap = torch.tensor([0.0, 0.15, 0.0, -0.3, 0.01, 0.02])[:, None]
    noise = 0.25 * torch.randn(rollout.old.shape, generator=random)
    near = (rollout.old if recomputed else rollout.log_probs.detach()) + gap + noise
    mean = own.policy_loss_function.__globals__["get_sum_of_sample_mean"]
    names = ["total_lengths", "response_lengths", "loss_masks"]
    names += ["rollout_mask_sums"] * (name == "slime")
    losses, changed = [], 0
    for row in range(len(rollout)):
        batch = one_sample(rollout, row)
        batch["rollout_log_probs"] = rollout.cut(near)[row : row + 1]
        if not recomputed:
            del batch["log_probs"]
        means = mean(*(batch[name] for name in names))
        logits = torch.cat(batch["logits"])
        theirs, reported = own.policy_loss_function(args, batch, logits, means)
        loss, metrics = trainer.policy_loss(args, batch, logits, means)
        plain, _ = trainer.policy_loss(
            Lenient(**{**vars(args), "use_tis": False}), batch, logits, means
        )
        changed += (plain - loss).abs().item() > 1e-3
        losses.append((loss, theirs))
        known = {n: reported[n] for n in metrics if n in reported and batch["response_lengths"][0]}
        if batch["response_lengths"][0]:
            assert {"loss", "pg_clipfrac", "ppo_kl", "ois"} <= set(known)
            own_names = {"mis_kl", "mis_k3_kl"} if kind.startswith("MIS") else TIS_METRICS
            assert own_names <= set(known)
        if args.use_rs or args.tis_mode == "mask":  # of what is left, there; of all tokens, here
            for metric in ("ppo_kl", "pg_clipfrac", "train_rollout_logprob_abs_diff"):
                known.pop(metric, None)
        for metric, value in known.items():
            torch.testing.assert_close(metrics[metric], value.float(), **THEIRS, msg=metric)
    assert changed > 2
    ours, theirs = (torch.stack(values).sum() for values in zip(*losses, strict=True))
    torch.testing.assert_close(ours, theirs, **THEIRS)
    expected, gradient = (
        torch.autograd.grad(loss, rollout.log_probs)[0] for loss in (theirs, ours)
    )
    torch.testing.assert_close(gradient, expected, **THEIRS)


TIS_METRICS = {"tis", "tis_clipfrac", "tis_abs", "train_rollout_logprob_abs_diff"}


@pytest.mark.parametrize("trainer", [slime, miles])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_correction_reaches_the_loss(rollout: Rollout, trainer: Any, kind: str) -> None:
    """Over stand-ins: the settings' RolloutCorrection, in the formula's loss of the whole batch."""
    settings = dict(CORRECTIONS[kind])
    if kind == "IcePop":
        settings["custom_tis_function_path"] = ICEPOP[trainer.__name__.rpartition(".")[2]]
    args, batch = Lenient(**vars(slime_args()), **settings, use_tis=True), slime_batch(rollout)
    slime.advantages(args, batch)
    noise = 0.3 * torch.randn(rollout.old.shape, generator=torch.Generator().manual_seed(8))
    batch["rollout_log_probs"] = rollout.cut(rollout.old + noise)
    loss, metrics = trainer.policy_loss(args, batch | {"unconcat_tokens": None},
                                        batch["new_log_probs"], None)  # fmt: skip
    assert TIS_METRICS | {"ois"} <= set(metrics)
    correction = settings_of.slime(args)
    assert correction is not None
    rollout.check(
        loss / len(LENGTHS), rollout_log_probs=rollout.old + noise, rollout_correction=correction
    )


@pytest.mark.parametrize("use_tis", [False, True])
def test_from_logits_is_from_log_probs(
    rollout: Rollout, use_tis: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over stand-ins: packed logits with prompts and padding, and the responses' log-probs."""
    mpu = SimpleNamespace(
        get_context_parallel_world_size=lambda: 1, get_data_parallel_group=lambda: None,
        get_tensor_model_parallel_group=lambda: None,
    )  # fmt: skip
    fake(monkeypatch, "megatron.core", mpu=mpu)
    args, batch = slime_args(use_tis=use_tis, **TIS), slime_batch(rollout)
    slime.advantages(args, batch)
    random = torch.Generator().manual_seed(3)
    totals, lengths = batch["total_lengths"], batch["response_lengths"]
    logits = torch.randn(1, sum(totals) + 2, 11, generator=random).requires_grad_()
    tokens = [torch.randint(11, (n,), generator=random) for n in totals]
    new = [
        rows[total - n - 1 : total - 1].log_softmax(-1).gather(-1, ids[total - n :, None])[:, 0]
        for rows, ids, total, n in zip(
            logits[0, :-2].split(totals), tokens, totals, lengths, strict=True
        )
    ]
    batch |= {"unconcat_tokens": tokens, "log_probs": [part.detach() + 0.1 for part in new]}
    batch["rollout_log_probs"] = [part - 0.1 for part in batch["log_probs"]]
    results = []
    for args.delta_l_from_logits, inputs in ((False, new), (True, logits)):
        loss, metrics = slime.policy_loss(args, batch, inputs, None)
        results.append((loss, torch.autograd.grad(loss, logits, retain_graph=True)[0], metrics))
    (loss, gradient, metrics), (other, other_gradient, others) = results
    torch.testing.assert_close(other, loss, **THEIRS)
    torch.testing.assert_close(other_gradient, gradient, **THEIRS)
    assert gradient.abs().max() > 1e-3 and set(metrics) == set(others)
    for name, value in metrics.items():
        torch.testing.assert_close(others[name], value, **THEIRS, msg=name)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mean_weight_of_the_rollout(
    rollout: Rollout, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a micro-batch is the whole rollout it is slime's; cut into two it stays so."""
    own = own_losses("slime", monkeypatch)
    fake(monkeypatch, "megatron.core", mpu=own.mpu)
    settings = MIS_SETTINGS | {"tis_level": level, "tis_batch_normalize": True}
    args = Lenient(
        **vars(slime_args()), **settings, use_tis=True, entropy_coef=0, rollout_top_p=1.0,
        custom_pg_loss_reducer_function_path="dl_norm.integrations.slime.pg_loss_reducer",
    )  # fmt: skip
    rollout = replace(
        rollout, mask=rollout.mask[[0, 1, 3, 4, 5]], widths=[3, 8, 5, 1, 8],  # slime counts empty
        log_probs=rollout.log_probs.detach()[[0, 1, 3, 4, 5]].requires_grad_(),
        old=rollout.old[[0, 1, 3, 4, 5]], advantages=rollout.advantages[[0, 1, 3, 4, 5]],
    )  # fmt: skip
    batch = slime_batch(rollout)
    random = torch.Generator().manual_seed(8)
    near = rollout.old + 0.3 * torch.randn(rollout.old.shape, generator=random) - 0.1
    batch["rollout_log_probs"] = rollout.cut(near)
    batch["rollout_mask_sums"] = [mask.sum() for mask in batch["loss_masks"]]
    batch["unconcat_tokens"] = [None] * 5
    slime.advantages(args, batch)
    assert (args.delta_l_mean_weight - 1).abs() > 0.02
    mean = own.policy_loss_function.__globals__["get_sum_of_sample_mean"]
    names = ["total_lengths", "response_lengths", "loss_masks", "rollout_mask_sums"]
    means = mean(*(batch[name] for name in names))
    theirs, _ = own.policy_loss_function(args, batch, torch.cat(batch["new_log_probs"]), means)
    ours = torch.zeros(())
    for part in (slice(0, 2), slice(2, 5)):
        micro = {name: values[part] for name, values in batch.items()}
        ours = ours + slime.policy_loss(args, micro, torch.cat(micro["new_log_probs"]), None)[0]
    torch.testing.assert_close(ours, theirs, **THEIRS)
    gradients = [torch.autograd.grad(loss, rollout.log_probs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, **THEIRS)
    # Without the whole rollout's log-probs there is no mean of it.
    del batch["log_probs"]
    with pytest.raises(ValueError, match="log_probs is missing"):
        slime.advantages(args, batch)


# -- from logits


@pytest.mark.parametrize("settings", [{}, {"use_tis": True, **TIS}], ids=["plain", "TIS"])
@pytest.mark.parametrize("recomputed", [True, False], ids=["old", "no old"])
def test_from_logits(
    rollout: Rollout, settings: dict[str, Any], recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slime's own log-probs and loss of packed logits, and ours from the same logits."""
    mpu = SimpleNamespace(
        get_context_parallel_world_size=lambda: 1, get_data_parallel_group=lambda: None,
        get_tensor_model_parallel_group=lambda: None,
    )  # fmt: skip
    ppo = lift(
        "slime/slime/utils/ppo_utils.py", "_maybe_all_reduce", "_get_vocab_parallel_rank_size",
        "_VocabParallelLogProbEntropy", "_calculate_log_probs_and_entropy_chunk",
        "calculate_log_probs_and_entropy", dist=torch.distributed,
    )  # fmt: skip
    rows = lift(
        "slime/slime/backends/megatron_utils/loss.py", "_build_shifted_tokens",
        "_extract_per_sample", "get_log_probs_and_entropy", mpu=mpu, **vars(ppo),
    )  # fmt: skip
    own = own_slime()
    own.policy_loss_function.__globals__["get_log_probs_and_entropy"] = (
        rows.get_log_probs_and_entropy
    )
    fake(monkeypatch, "megatron.core", mpu=mpu)
    random = torch.Generator().manual_seed(1)
    batch = slime_batch(rollout)
    size = sum(batch["total_lengths"]) + 3  # padding behind
    logits = torch.randn(1, size, 13, generator=random).requires_grad_()
    batch["unconcat_tokens"] = [
        torch.randint(13, (n,), generator=random) for n in batch["total_lengths"]
    ]
    batch["rollout_mask_sums"] = [mask.sum() for mask in batch["loss_masks"]]
    slime.advantages(slime_args(), batch)
    args = Lenient(
        **vars(slime_args()), **settings, entropy_coef=0, rollout_top_p=1.0, allgather_cp=False,
        rollout_temperature=0.8, log_probs_chunk_size=-1, skip_actor_forward_only=not recomputed,
        custom_pg_loss_reducer_function_path="dl_norm.integrations.slime.pg_loss_reducer",
        delta_l_from_logits=True,
    )  # fmt: skip
    _, streams = rows.get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"],
    )  # fmt: skip
    near = [
        part.detach() + 0.3 * torch.randn(part.shape, generator=random)
        for part in streams["log_probs"]
    ]
    batch["log_probs"] = near if recomputed else None
    batch["rollout_log_probs"] = [
        part + 0.2 * torch.randn(part.shape, generator=random) for part in near
    ]
    mean = own.policy_loss_function.__globals__["get_sum_of_sample_mean"]
    means = mean(
        batch["total_lengths"], batch["response_lengths"], batch["loss_masks"],
        batch["rollout_mask_sums"], False,
    )  # fmt: skip
    theirs, reported = own.policy_loss_function(args, batch, logits, means)
    loss, metrics = slime.policy_loss(args, batch, logits, means)
    torch.testing.assert_close(loss, theirs, **THEIRS)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, theirs)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], **THEIRS)
    assert set(metrics) <= set(reported)
    # From log-probs it is the same, metrics included.
    args.delta_l_from_logits = False
    fake(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=rows.get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )
    _, others = slime.policy_loss(args, batch, logits, means)
    assert set(others) == set(metrics)
    for name, value in others.items():
        torch.testing.assert_close(metrics[name], value, **THEIRS, msg=name)


@pytest.mark.parametrize(
    ("size", "changes", "totals", "words"),
    [
        (2, {}, 2, "leave it out"),
        (1, {"rollout_top_p": 0.9}, 2, "leave it out"),
        (1, {}, 0, "without a prompt"),
    ],
)
def test_from_logits_refuses(
    rollout: Rollout, size: int, changes: dict[str, Any], totals: int, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mpu = SimpleNamespace(get_context_parallel_world_size=lambda: size)
    fake(monkeypatch, "megatron.core", mpu=mpu)
    args, batch = slime_args(delta_l_from_logits=True, **changes), one_sample(rollout, 1)
    batch["total_lengths"] = [n + totals for n in batch["response_lengths"]]
    with pytest.raises(ValueError, match=words):
        slime.policy_loss(args, batch, torch.zeros(1, 10, 13), None)

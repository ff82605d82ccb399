"""slime and its fork Miles: advantage step, loss dispatch and scaling around the hooks."""

from __future__ import annotations

import ast
import importlib
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
    "change", ["calculate_per_token_loss", "use_kl_loss", "use_tis", "entropy_coef", "use_opsm"]
)
def test_loss_refuses(rollout: Rollout, trainer: Any, change: str) -> None:
    args, batch = slime_args(**{change: True}), slime_batch(rollout)
    with pytest.raises(ValueError, match=change.replace("_", "[-_]")):
        trainer.policy_loss(args, batch, batch["new_log_probs"], None)


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


@pytest.mark.parametrize("hook", ["reducer", "loss"])
def test_slime(rollout: Rollout, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime's own advantage step, loss dispatch and scaling around the hooks."""
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
    check_hook(module.policy_loss_function, "slime")
    fake(monkeypatch, "megatron.core", mpu=mpu)
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
    text = source(f"{folder}/backends/megatron_utils/loss.py").read_text()
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


@pytest.mark.parametrize("hook", ["reducer", "loss"])
@pytest.mark.parametrize("backend", ["Megatron", "FSDP"])
def test_miles(rollout: Rollout, hook: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Miles' own reward normalisation, advantages, loss dispatch and scaling around the hooks."""
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
        "compute_policy_loss",
        "get_grpo_returns",
        **common,
        **vars(cp_utils),
    )
    load = lift(
        "miles/miles/utils/misc.py", "load_function", importlib=importlib, function_registry={}
    ).load_function
    losses = lift(
        MILES_LOSSES,
        "policy_loss_function",
        "get_loss_function",
        **common,
        **vars(cp_utils),
        **vars(math_utils),
        load_function=load,
        get_log_probs_and_entropy=log_probs_of,
    )
    check_hook(losses.policy_loss_function, "slime")
    advantages = lift(f"{folder}/loss_hub/advantages.py", "compute_advantages", **vars(math_utils))
    module = lift(
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
    reward_hook = load(f"{path}.rewards")
    check_hook(reward_hook, "miles rewards")
    _, data["rewards"] = conversion._post_process_rewards(args, samples, reward_hook)
    del data["kl"]
    module.compute_advantages_and_returns(args, data)
    scaling = (True, len(LENGTHS)) if backend == "Megatron" else (False, None)
    total = step(lambda batch, logits: module.loss_function(args, batch, 2, logits, *scaling), data)
    # Miles' FSDP backend adds micro-batches up, Megatron averages them.
    rollout.check(total if backend == "Megatron" else 2 * total)

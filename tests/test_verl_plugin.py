"""dl_norm's plugin in verl 0.9.1: discovery, configuration, both registries, `ppo_loss`.

The checks need verl. Where it is importable they run in this process; else this file is run once by
`.venv-verl/bin/python`, which answers with one outcome per check; else the tests are skipped.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
HERE = importlib.util.find_spec("verl") is not None
VERL_PYTHON = Path(sys.executable) if HERE else ROOT / ".venv-verl" / "bin" / "python"

# What verl asks of any run.
NEEDED = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
)
MAX_LENGTH = 3072  # as in the configuration lines
# Two fp32 evaluations of one formula: exp is good to about 2 ulp and the sums add a few more.
FP32 = 2e-6
# Lengths of two prompts with three samples each; the fourth response is rejected.
LENGTHS = (1, 5, 12, 0, 3, 8)
INDEX = ("a", "a", "a", "b", "b", "b")


def config_lines() -> list[str]:
    """The lines that a user writes, as the module's docstring gives them."""
    source = (ROOT / "dl_norm" / "integrations" / "verl.py").read_text()
    lines = re.findall(r"^ {4}(\+?[a-z_.]+=\S+)$", ast.get_docstring(ast.parse(source)) or "", re.M)
    assert len(lines) == 5, lines
    return lines


@functools.cache
def user_config() -> Any:
    """verl's whole configuration with the user's lines, by hydra as verl's command line does."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*config_lines(), *NEEDED])


def configure(*changes: str) -> Any:
    """The user's configuration with some values changed; composing it anew takes a second."""
    from omegaconf import OmegaConf

    config = copy.deepcopy(user_config())
    for key, value in OmegaConf.from_dotlist(list(changes)).items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_mask(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def factors(lengths: tuple[int, ...], alpha: float) -> Tensor:
    """r_i = B L_i^-alpha / sum_j L_j^-alpha in plain Python."""
    powers = [length**-alpha if length else 0.0 for length in lengths]
    return torch.tensor([len(lengths) * power / sum(powers) for power in powers])


def compute_advantage(*args, **kwargs) -> Any:
    """verl's function of that name, the caller of every estimator.

    Its module imports the whole trainer, so it is compiled from the source on its own.
    """
    import verl
    from verl.trainer.ppo import core_algos

    source = (Path(verl.__file__).parent / "trainer" / "ppo" / "ray_trainer.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "compute_advantage"
    )
    module = ast.parse("from __future__ import annotations")
    module.body.append(function)
    names = {"core_algos": core_algos, "AdvantageEstimator": core_algos.AdvantageEstimator}
    exec(compile(module, "ray_trainer", "exec"), names)
    return names["compute_advantage"](*args, **kwargs)


def rollout_advantages(algorithm: Any) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of a rollout batch, as verl's trainer computes them."""
    import numpy as np
    from verl import DataProto

    mask = make_mask()
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.tensor([1.0, 0.0, 0.75, 1.0, 0.0, 0.25])
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask.long()},
        non_tensors={"uid": np.array(INDEX, dtype=object)},
    )
    data = compute_advantage(
        data,
        adv_estimator=algorithm.adv_estimator,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
        config=algorithm,
    )
    return data.batch["advantages"], data.batch["returns"]


def check_registries() -> None:
    from verl.trainer.ppo import core_algos

    import dl_norm.integrations.verl as plugin

    assert core_algos.get_policy_loss_fn("delta_l") is plugin.compute_policy_loss_delta_l
    for name in ("grpo", "rloo"):
        found = core_algos.get_adv_estimator_fn(f"delta_l_{name}")
        assert found is getattr(plugin, f"compute_delta_l_{name}_advantage")


def check_config() -> None:
    """The user's lines pass through hydra, verl's config classes and verl's validation."""
    from verl.trainer.ppo.utils import need_critic
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.config import ActorConfig

    config = configure()
    validate_config(config, use_reference_policy=False, use_critic=need_critic(config))
    assert config.algorithm.adv_estimator == "delta_l_grpo"
    assert config.algorithm.delta_l_alpha == 0.75
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor, ActorConfig)
    assert actor.policy_loss.loss_mode == "delta_l"
    assert actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert actor.loss_scale_factor == MAX_LENGTH


def readme_block(language: str) -> str:
    """The block of the adapters' page with verl's settings in that language."""
    readme = (ROOT / "dl_norm" / "integrations" / "README.md").read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", readme, re.M | re.S)
    (block,) = (block for block in blocks if "delta_l_grpo" in block)
    return block


def check_readme() -> None:
    """The README's command and its YAML file are the lines that everything here is tested with."""
    from hydra import compose, initialize_config_dir

    command = readme_block("bash").replace("\\\n", " ").split()
    assert command[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    assert command[3:] == config_lines()
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(folder, version_base=None):
        (Path(folder) / "my_run.yaml").write_text(readme_block("yaml"))
        # What --config-dir does: the folder beside verl's own.
        search = ["hydra.searchpath=[pkg://verl.trainer.config]"]
        assert compose("my_run", overrides=[*search, *NEEDED]) == user_config()


def check_estimator(name: str, by_std: bool, alpha: float) -> None:
    """verl's own advantages times the factors, and verl's own returns."""
    lines = (f"algorithm.norm_adv_by_std_in_grpo={by_std}", f"algorithm.delta_l_alpha={alpha}")
    ours, returns = rollout_advantages(
        configure(*lines, f"algorithm.adv_estimator=delta_l_{name}").algorithm
    )
    theirs, their_returns = rollout_advantages(
        configure(*lines, f"algorithm.adv_estimator={name}").algorithm
    )
    assert theirs[:3].abs().amax(1).min() > 0
    torch.testing.assert_close(ours, theirs * factors(LENGTHS, alpha)[:, None], rtol=1e-6, atol=0)
    assert torch.equal(returns, their_returns)


def check_alpha_is_one_by_default() -> None:
    """In a section without the key, in verl's dataclass, and without any configuration."""
    from verl.trainer.config import AlgoConfig

    from dl_norm.integrations.verl import delta_l_factors

    expected = factors(LENGTHS, 1.0)
    for config in (AlgoConfig(adv_estimator="delta_l_grpo"), {}, None):
        torch.testing.assert_close(delta_l_factors(make_mask(), config), expected)


def check_official_vector() -> None:
    """The official code's factors of one rollout that is cut into two mini-batches."""
    from dl_norm.integrations.verl import delta_l_factors

    lengths = (10, 100, 1000, 20, 200, 2000)
    found = delta_l_factors(make_mask(lengths), {"delta_l_alpha": 1.0})
    official = [3.6036036036036037, 0.36036036036036034, 0.036036036036036036]
    official += [1.8018018018018018, 0.18018018018018017, 0.018018018018018018]
    torch.testing.assert_close(found, torch.tensor(official), rtol=1e-6, atol=0)


def check_padding_rows() -> None:
    """verl appends masked rows until the batch divides: the weights of the loss stay the same."""
    from dl_norm.integrations.verl import delta_l_factors

    for lengths in (LENGTHS, (*LENGTHS, 0, 0)):
        found = delta_l_factors(make_mask(lengths)) / (len(lengths) * MAX_LENGTH)
        weights = dl_norm.sequence_weights(torch.tensor(lengths), max_length=MAX_LENGTH)
        torch.testing.assert_close(found, weights, rtol=1e-6, atol=0)


def check_estimator_refuses() -> None:
    refused = {
        ("algorithm.delta_l_alpha=-1",): "alpha",
        ("algorithm.delta_l_alpha=null",): "alpha",
        ("algorithm.delta_l_aplha=0.5",): "delta_l_aplha",
        ("actor_rollout_ref.actor.loss_agg_mode=token-mean",): "seq-mean-token-sum-norm",
        ("actor_rollout_ref.actor.loss_scale_factor=null",): "loss_scale_factor",
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",): "no effect",
    }
    for lines, words in refused.items():
        with pytest.raises((ValueError, TypeError), match=words):
            rollout_advantages(configure(*lines).algorithm)
    rollout_advantages(
        configure(
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",
            "actor_rollout_ref.actor.loss_scale_factor=null",
        ).algorithm
    )


def make_batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Six responses that reach every branch: low, high, dual and log-ratio clamp."""
    random = torch.Generator().manual_seed(20250907)
    mask = make_mask((16, 5, 12, 0, 3, 8))
    mask[0, 2] = mask[2, 7] = False  # holes
    old = -3 * torch.rand(mask.shape, generator=random)
    log_ratio = 0.7 * torch.randn(mask.shape, generator=random)
    log_ratio[0, :2] = torch.tensor([25.0, -25.0])  # beyond the clamp of 20
    batch = {
        "log_probs": (old + log_ratio).to(dtype),
        "old_log_probs": old.to(dtype),
        "advantages": torch.randn(mask.shape, generator=random) * mask,
        "response_mask": mask,
        "rollout_is_weights": 2 * torch.rand(mask.shape, generator=random) * mask,
        "ref_log_prob": (old - 0.3 * torch.rand(mask.shape, generator=random)).to(dtype),
        "entropy": torch.rand(mask.shape, generator=random).to(dtype),
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def run_ppo_loss(
    batch: dict[str, Tensor],
    loss_mode: str,
    *,
    rollout: bool = False,
    extras: bool = False,
    dp_size: int = 2,
    global_batch_size: int | None = 12,
    correction: dict[str, Any] | None = None,
    sampled: bool = False,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient with respect to the log-probs, metrics; `extras`: KL and entropy too.

    `correction`: the actor's section; `sampled`: the batch has the rollout's log-probs.
    """
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    config = configure(
        f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode}",
        f"actor_rollout_ref.actor.use_kl_loss={extras}",
        f"actor_rollout_ref.actor.entropy_coeff={0.01 * extras}",
        "actor_rollout_ref.actor.clip_ratio_high=0.3",
    )
    if correction is not None:
        with_correction(config, "actor_rollout_ref.actor.policy_loss", correction)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    rows, width = batch["response_mask"].shape
    tokens = torch.ones(rows, width, dtype=torch.int64, device=device())
    names = ["old_log_probs", "advantages", "response_mask"]
    names += ["rollout_is_weights"] * rollout + ["ref_log_prob"] * extras
    names += ["rollout_log_probs"] * sampled
    data = tu.get_tensordict(
        {name: batch[name] for name in names}
        | {"prompts": tokens[:, :1], "responses": tokens}
        | {"attention_mask": torch.ones(rows, 1 + width, dtype=torch.int64, device=device())},
        {
            "dp_size": dp_size,
            "batch_num_tokens": int(batch["response_mask"].sum()),
            "global_batch_size": global_batch_size,
        },
    )

    def unpadded(tensor: Tensor) -> Tensor:
        """What a model returns: a value per token of prompt and response, of the token after it."""
        return torch.cat([tensor, tensor[:, :1]], 1).flatten()

    log_probs = batch["log_probs"].clone().requires_grad_()
    output = {"log_probs": unpadded(log_probs)}
    if extras:
        output["entropy"] = unpadded(batch["entropy"])
    loss, metrics = ppo_loss(actor, output, data)
    values = {
        name: metric if isinstance(metric, float) else metric.aggregate()
        for name, metric in metrics.items()
    }
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0], values


def check_ppo_loss(rollout: bool, extras: bool) -> None:
    """verl's own loss with the same advantages: loss, gradient and every metric."""
    batch = make_batch(torch.float32)
    loss, gradient, metrics = run_ppo_loss(batch, "delta_l", rollout=rollout, extras=extras)
    options = {"rollout": rollout, "extras": extras}
    their_loss, their_gradient, their_metrics = run_ppo_loss(batch, "vanilla", **options)
    scale = their_gradient.abs().sum().item()
    assert scale > 0
    torch.testing.assert_close(loss, their_loss, rtol=FP32, atol=FP32 * scale)
    atol = FP32 * their_gradient.abs().max().item()
    torch.testing.assert_close(gradient, their_gradient, rtol=FP32, atol=atol)
    assert metrics.keys() == their_metrics.keys()
    assert all(metrics[f"actor/pg_clipfrac{end}"] > 0 for end in ("", "_lower"))
    for name, value in their_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=FP32, abs=FP32 * scale), name


def with_correction(config: Any, section: str, correction: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        OmegaConf.update(config, f"{section}.rollout_correction", correction, merge=False)
    return config


TOKEN = {"rollout_is": "token", "rollout_is_threshold": 1.2}
# Settings of verl's; the geometric mean and the divergences drop some sequences and keep others.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "token": TOKEN,
    "icepop": {"rollout_is": "token", "rollout_is_threshold": "0.7_1.5"},
    "sequence": {"rollout_is": "sequence", "rollout_is_threshold": 1.3},
    "rejects": {"rollout_rs": "token_k1,seq_mean_k1", "rollout_rs_threshold": "0.5_2,0.9_1.08"},
    "both": TOKEN | {"rollout_rs": "seq_sum_k3,seq_max_k2", "rollout_rs_threshold": "0.4,0.3"},
}


def sampled_batch() -> dict[str, Tensor]:
    """With the rollout's log-probs, near to the old ones and to the current ones."""
    batch = make_batch(torch.float32)
    random = torch.Generator().manual_seed(3)
    shape = batch["response_mask"].shape
    gap = 0.3 * torch.randn(shape, generator=random)
    gap += torch.tensor([0.1, -0.2, 0.05, 0, -0.05, 0.15])[:, None]
    batch["rollout_log_probs"] = batch["old_log_probs"] + gap.to(device())
    return batch


def as_verl(found: tuple, wanted: tuple) -> dict[str, tuple[float, float]]:
    """Loss and gradient agree; the metrics that both have."""
    loss, gradient, metrics = found
    their_loss, their_gradient, their_metrics = wanted
    scale = their_gradient.abs().sum().item()
    assert scale > 0
    torch.testing.assert_close(loss, their_loss, rtol=FP32, atol=FP32 * scale)
    atol = FP32 * their_gradient.abs().max().item()
    torch.testing.assert_close(gradient, their_gradient, rtol=FP32, atol=atol)
    return {n: (metrics[n], their_metrics[n]) for n in metrics if n in their_metrics}


def check_decoupled(name: str) -> None:
    """verl's driver corrects, and its vanilla loss takes the result; ours in the kernel."""
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

    batch = sampled_batch()
    names = ("old_log_probs", "rollout_log_probs")
    tensors = {n: batch[n] for n in names} | {"response_mask": batch["response_mask"].long()}
    proto, their_metrics = compute_rollout_correction_and_add_to_batch(
        DataProto.from_dict(tensors=tensors), CORRECTIONS[name]
    )
    corrected = {**batch, **proto.batch}
    corrected["response_mask"] = corrected["response_mask"].bool()
    rejected = (batch["response_mask"] & ~corrected["response_mask"]).sum()
    assert bool(rejected) == ("rollout_rs" in CORRECTIONS[name])
    weighed = "rollout_is" in CORRECTIONS[name]
    wanted = run_ppo_loss(corrected, "vanilla", rollout=weighed)
    plain = run_ppo_loss(batch, "vanilla")
    found = run_ppo_loss(batch, "delta_l", correction=CORRECTIONS[name], sampled=True)
    assert (plain[1] - wanted[1]).abs().max() > 0.01 * wanted[1].abs().max()
    as_verl(found, wanted)
    for metric in ("rollout_corr/kl", "rollout_corr/k3_kl"):
        assert found[2][metric] == pytest.approx(their_metrics[metric], rel=1e-4)


def check_bypass(name: str, loss_type: str) -> None:
    """verl's bypass_mode loss, in which old_log_probs are the rollout's."""
    batch = sampled_batch()
    # As near as one step apart.
    batch["log_probs"] = batch["old_log_probs"]
    batch["old_log_probs"] = batch["rollout_log_probs"]
    correction = CORRECTIONS[name] | {"bypass_mode": True, "loss_type": loss_type}
    wanted = run_ppo_loss(batch, "bypass_mode", correction=correction)
    found = run_ppo_loss(batch, "delta_l", correction=correction)
    same = as_verl(found, wanted)
    if "rollout_rs" in correction:
        kept = correction | {"rollout_rs": None}
        more = run_ppo_loss(batch, "delta_l", correction=kept)[1]
        assert (more != found[1]).any() and (found[1] != 0).any()
    compared = ["actor/pg_loss"]
    if loss_type == "reinforce":
        compared += ["rollout_corr/kl", "rollout_corr/k3_kl"]
    else:
        compared += [f"actor/{n}" for n in ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")]
        compared += ["rollout_corr/rollout_rs_masked_fraction"] * ("rollout_rs" in correction)
    for metric in compared:
        ours, theirs = same[metric]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), metric


def check_nested() -> None:
    """verl's trainer keeps responses without padding, as jagged tensors: the same loss."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    batch = sampled_batch()
    del batch["rollout_is_weights"]
    lengths = (16, 5, 12, 2, 3, 8)  # the fourth response counts nothing
    rows = range(len(lengths))

    def jagged(rows: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    names = ("old_log_probs", "advantages", "response_mask", "rollout_log_probs")
    data = tu.get_tensordict(
        {name: jagged([batch[name][i, : lengths[i]] for i in rows]) for name in names}
        | {"prompts": jagged([torch.ones(2, dtype=torch.int64) for _ in rows])}
        | {"responses": jagged([torch.ones(n, dtype=torch.int64) for n in lengths])},
        {"dp_size": 2, "batch_num_tokens": 42, "global_batch_size": 12},
    )
    section = "actor_rollout_ref.actor.policy_loss"
    config = configure(
        f"{section}.loss_mode=delta_l", "actor_rollout_ref.actor.clip_ratio_high=0.3"
    )
    actor = with_correction(config, section, CORRECTIONS["both"]).actor_rollout_ref.actor
    log_probs = batch["log_probs"].clone().requires_grad_()
    # A value per token of prompt and response, of the token after it.
    output = [torch.cat([log_probs[i, :1], log_probs[i, : lengths[i]], log_probs[i, :1]])
              for i in rows]  # fmt: skip
    loss, _ = ppo_loss(
        omega_conf_to_dataclass(actor), {"log_probs": torch.cat(output)}, data
    )  # fmt: skip
    wanted = run_ppo_loss(batch, "delta_l", correction=CORRECTIONS["both"], sampled=True)
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=FP32, atol=FP32)
    torch.testing.assert_close(
        torch.autograd.grad(loss, log_probs)[0], wanted[1], rtol=FP32, atol=FP32
    )


def check_finished_weights() -> None:
    """What verl's driver made stays, normalised over the whole batch or not, and a batch with the
    rollout's log-probs alone is not corrected."""
    batch = sampled_batch()
    for rollout in (False, True):
        found = run_ppo_loss(batch, "delta_l", sampled=True, rollout=rollout)
        as_verl(found, run_ppo_loss(batch, "vanilla", sampled=True, rollout=rollout))
    # Another loss is verl's alone, whatever the section says.
    found = run_ppo_loss(batch, "vanilla", sampled=True, correction=TOKEN)
    as_verl(found, run_ppo_loss(batch, "vanilla"))


def check_correction_refuses() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    from dl_norm.integrations import verl as plugin

    batch = sampled_batch()
    reinforce = TOKEN | {"bypass_mode": True, "loss_type": "reinforce"}
    normalised = {"rollout_is_batch_normalize": True}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"correction": TOKEN}, "calculate_log_probs=true"),
        ({"correction": TOKEN, "sampled": True, "rollout": True}, "take one of them out"),
        ({"correction": TOKEN | normalised, "sampled": True}, "whole batch"),
        ({"correction": reinforce | normalised}, "whole batch"),
        ({"correction": reinforce | {"loss_type": "gpg"}}, "loss_type='gpg'"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            run_ppo_loss(batch, "delta_l", **options)
    # The ratio is the weight with PPO's clip, so that there is none to be normalised.
    clipped = reinforce | normalised | {"loss_type": "ppo_clip"}
    run_ppo_loss(batch, "delta_l", correction=clipped)
    plugin.register("delta_l_sapo", surrogate="sapo")
    with pytest.raises(ValueError, match="beside loss_type='reinforce'"):
        run_ppo_loss(batch, "delta_l_sapo", correction=reinforce)
    run_ppo_loss(batch, "delta_l_sapo", correction=TOKEN, sampled=True)

    # Called by another than this module's ppo_loss.
    from verl.utils.config import omega_conf_to_dataclass

    section = "actor_rollout_ref.actor.policy_loss"
    actor = with_correction(configure(), section, TOKEN).actor_rollout_ref.actor
    actor = omega_conf_to_dataclass(actor)
    actor.global_batch_info.update(dp_size=1, global_batch_size=6, loss_scale_factor=MAX_LENGTH)
    with pytest.raises(ValueError, match="ppo_loss"):
        call_loss(actor, batch)
    assert get_policy_loss_fn("delta_l") is plugin.compute_policy_loss_delta_l


def check_readme_correction() -> None:
    """The README's lines are what the loss follows, and what the estimator takes."""
    import shlex

    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    from dl_norm.integrations import verl as plugin

    readme = (ROOT / "dl_norm" / "integrations" / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", readme, re.M | re.S)
    blocks = [block for block in blocks if "policy_loss.rollout_correction" in block]
    wanted = ({"rollout_is_threshold": 2.0}, {"bypass_mode": True, "loss_type": "reinforce"})
    for block, values in zip(blocks, wanted, strict=True):
        lines = shlex.split(block.replace("\\\n", " "))
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=[*config_lines(), *NEEDED, *lines])
        rollout_advantages(config.algorithm)
        OmegaConf.resolve(config)  # as verl's main does
        settings = plugin.rollout.settings(omega_conf_to_dataclass(config.actor_rollout_ref.actor))
        values = values | {"rollout_is": "token"}
        assert {name: settings.get(name) for name in values} == values
        calculated = config.actor_rollout_ref.rollout.calculate_log_probs
        assert calculated or settings.get("bypass_mode")


def check_one_corrects() -> None:
    """The estimator sees the settings of both, and raises where they do not go together."""
    section = "actor_rollout_ref.actor.policy_loss"
    bypass = {"bypass_mode": True}
    rejects = CORRECTIONS["rejects"]
    for driver, actor, words in (
        (TOKEN, TOKEN, "would correct"),
        (rejects, TOKEN, "would correct"),
        ({}, bypass, "the same in both"),
        (bypass, TOKEN, "the same in both"),
        (bypass | rejects, None, "algorithm.rollout_correction}"),
        (bypass | {"loss_type": "reinforce"}, None, "algorithm.rollout_correction}"),
        (bypass, None, None),
        (bypass | rejects, bypass | rejects, None),
        (TOKEN, None, None),
        ({}, TOKEN, None),
    ):
        config = with_correction(configure(), "algorithm", driver)
        if actor is not None:
            with_correction(config, section, actor)
        if words is None:
            rollout_advantages(config.algorithm)
            continue
        with pytest.raises(ValueError, match=words):
            rollout_advantages(config.algorithm)


def check_workers_take_it() -> None:
    """verl's workers, imported after the plugin, build their loss of it."""
    import verl

    from dl_norm.integrations import verl as plugin

    source = (Path(verl.__file__).parent / "workers" / "engine_workers.py").read_text()
    assert "from verl.workers.utils.losses import ppo_loss" in source
    assert "partial(ppo_loss, config=actor_config)" in source
    from verl.workers.utils.losses import ppo_loss

    assert ppo_loss is plugin.ppo_loss


def check_ppo_loss_bf16() -> None:
    """bf16 log-probs: verl in fp32 on the same values, up to the rounding of the gradient."""
    batch = make_batch(torch.bfloat16)
    loss, gradient, _ = run_ppo_loss(batch, "delta_l", rollout=True)
    wide = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in batch.items()
    }
    true_loss, true_gradient, _ = run_ppo_loss(wide, "vanilla", rollout=True)
    assert gradient.dtype == torch.bfloat16
    scale = true_gradient.abs().sum().item()
    torch.testing.assert_close(loss, true_loss, rtol=FP32, atol=FP32 * scale)
    # One rounding to 8 significant bits, and what fp32 differs by.
    torch.testing.assert_close(gradient.float(), true_gradient, rtol=2.0**-8 * 1.001, atol=0)


def check_micro_batches() -> None:
    """Micro-batches add up to the mini-batch, whatever its cut; the reference has the weights."""
    batch = make_batch(torch.float32)
    log_probs = batch["log_probs"].double().requires_grad_()
    weights = torch.full((6,), 2 / (12 * MAX_LENGTH), dtype=torch.float64, device=device())
    names = ("old_log_probs", "advantages", "response_mask")
    expected = dl_norm.reference.policy_loss(
        log_probs, *(batch[name] for name in names), weights, eps_high=0.3, dual_clip=3.0
    )
    assert isinstance(expected, Tensor)
    (expected_gradient,) = torch.autograd.grad(expected, log_probs)
    for cut in ([6], [2, 4], [1, 1, 1, 1, 1, 1]):  # a row alone: empty, of 3 tokens
        parts = zip(*(tensor.split(cut) for tensor in batch.values()), strict=True)
        runs = [run_ppo_loss(dict(zip(batch, part, strict=True)), "delta_l") for part in parts]
        loss = sum(run[0] for run in runs)
        gradient = torch.cat([run[1] for run in runs])
        scale = expected_gradient.abs().sum().item()
        assert abs(loss - expected.item()) <= FP32 * scale
        atol = FP32 * expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=FP32, atol=atol)


def check_masked() -> None:
    """Nothing counted, and NaN wherever nothing counts: loss, gradient and metrics are 0."""
    batch = make_batch(torch.float32)
    batch = {
        name: torch.full_like(t, float("nan")) for name, t in batch.items() if t.is_floating_point()
    }
    batch["response_mask"] = torch.zeros(6, 16, dtype=torch.bool, device=device())
    loss, gradient, metrics = run_ppo_loss(batch, "delta_l", rollout=True)
    assert loss == 0 and not gradient.any() and not any(metrics.values())


def call_loss(
    config: Any,
    batch: dict[str, Tensor],
    mode: str = "seq-mean-token-sum-norm",
    name: str = "delta_l",
) -> Any:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    return get_policy_loss_fn(name)(
        old_log_prob=batch["old_log_probs"],
        log_prob=batch["log_probs"],
        advantages=batch["advantages"],
        response_mask=batch["response_mask"],
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=None,
    )


def squared(log_prob, ratio, advantage):
    """A token loss of a user's own, with a further quantity."""
    return -advantage * ratio * ratio, {"ratio_squared": ratio * ratio}


def check_own_loss() -> None:
    """It is named by its import path, and verl's clip settings are not its."""
    module = ModuleType("my_losses")
    module.squared = squared  # type: ignore[attr-defined]
    sys.modules["my_losses"] = module
    from dl_norm.integrations import verl as plugin

    plugin.register("delta_l_squared", surrogate="my_losses:squared")
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    config.global_batch_info.update(dp_size=1, global_batch_size=6, loss_scale_factor=MAX_LENGTH)
    batch = make_batch(torch.float32)
    loss, metrics = call_loss(config, batch, name="delta_l_squared")
    mask = batch["response_mask"]
    ratio = (batch["log_probs"] - batch["old_log_probs"]).clamp(-20, 20).exp()
    terms = torch.where(mask != 0, -batch["advantages"] * ratio**2, 0.0)
    plain, _ = call_loss(config, {**batch, "old_log_probs": batch["log_probs"]})
    one = torch.where(mask != 0, -batch["advantages"], 0.0)
    torch.testing.assert_close(loss / plain, terms.sum() / one.sum(), rtol=1e-4, atol=1e-6)
    assert metrics["actor/ratio_squared"] > 0


def check_loss_refuses() -> None:
    """What is missing raises: no micro-batch normalises by what it sees."""
    from verl.workers.config import ActorConfig

    batch = make_batch(torch.float32)
    with pytest.raises(ValueError, match="global_batch_size"):
        run_ppo_loss(batch, "delta_l", global_batch_size=None)

    def actor(**info: Any) -> ActorConfig:
        config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
        config.global_batch_info.update(info)
        return config

    given = {"dp_size": 1, "global_batch_size": 6, "loss_scale_factor": MAX_LENGTH}
    call_loss(actor(**given), batch)
    with pytest.raises(ValueError, match="config"):
        call_loss(None, batch)
    for name, words in (
        ("dp_size", "'dp_size'"),
        ("global_batch_size", "'global_batch_size'"),
        ("loss_scale_factor", "padded width"),
    ):
        for changed in ({k: v for k, v in given.items() if k != name}, given | {name: None}):
            with pytest.raises(ValueError, match=words):
                call_loss(actor(**changed), batch)
        with pytest.raises(ValueError, match=name):
            call_loss(actor(**given | {name: 0}), batch)
    for mode in ("token-mean", "token-sum", "seq-mean-token-mean"):
        with pytest.raises(ValueError, match="loss_agg_mode=seq-mean-token-sum-norm"):
            call_loss(actor(**given), batch, mode)
    with pytest.raises(ValueError, match="no effect"):
        call_loss(actor(**given), batch, "seq-mean-token-sum")


def check_no_sync() -> None:
    """The metrics stay on the device, under verl's names; on a GPU nothing waits for it."""
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    config.global_batch_info.update(dp_size=1, global_batch_size=6, loss_scale_factor=MAX_LENGTH)
    batch = make_batch(torch.float32)
    call_loss(config, batch)  # compiles
    if device().type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        _, metrics = call_loss(config, batch)
    finally:
        if device().type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert metrics.keys() == {f"actor/{n}" for n in ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")}
    assert all(isinstance(metric, Tensor) and metric.ndim == 0 for metric in metrics.values())


CHECKS: dict[str, Callable[[], None]] = {
    "registries": check_registries,
    "config": check_config,
    "readme": check_readme,
    **{
        f"estimator-{name}-std={by_std}-alpha={alpha}": functools.partial(
            check_estimator, name, by_std, alpha
        )
        for name, by_std in (("grpo", True), ("grpo", False), ("rloo", True))
        for alpha in (0.0, 0.75, 1.0)
    },
    "alpha-default": check_alpha_is_one_by_default,
    "official-vector": check_official_vector,
    "padding-rows": check_padding_rows,
    "estimator-refuses": check_estimator_refuses,
    **{
        f"ppo-loss-rollout={rollout}-extras={extras}": functools.partial(
            check_ppo_loss, rollout, extras
        )
        for rollout in (False, True)
        for extras in (False, True)
    },
    "ppo-loss-bf16": check_ppo_loss_bf16,
    "micro-batches": check_micro_batches,
    "masked": check_masked,
    "own-loss": check_own_loss,
    "loss-refuses": check_loss_refuses,
    **{f"decoupled-{name}": functools.partial(check_decoupled, name) for name in CORRECTIONS},
    **{
        f"bypass-{name}-{loss_type}": functools.partial(check_bypass, name, loss_type)
        for name in CORRECTIONS
        for loss_type in ("ppo_clip", "reinforce")
    },
    "nested": check_nested,
    "finished-weights": check_finished_weights,
    "correction-refuses": check_correction_refuses,
    "one-corrects": check_one_corrects,
    "readme-correction": check_readme_correction,
    "workers-take-it": check_workers_take_it,
    "no-sync": check_no_sync,
}


def run_checks() -> dict[str, str | None]:
    """One outcome per check: None, or the traceback of what went wrong."""
    import dl_norm.integrations.verl  # noqa: F401  (registers, also without an entry point)

    outcomes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcomes[name] = None
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()
    return outcomes


def run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",  # not the repository, which `python -c` would import from
        env={**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def verl_python() -> Path:
    if not VERL_PYTHON.exists():
        pytest.skip("verl is not installed and .venv-verl does not exist: bash ci/verl_env.sh")
    return VERL_PYTHON


@pytest.fixture(scope="module")
def outcomes(verl_python: Path) -> dict[str, str | None]:
    if HERE:
        return run_checks()
    done = run(verl_python, "-W", "ignore", __file__, PYTHONPATH=str(ROOT))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_check(check: str, outcomes: dict[str, str | None]) -> None:
    problem = outcomes[check]
    assert problem is None, problem


@pytest.fixture(scope="module")
def fresh_python(verl_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with this repository's wheel, which sees verl and PyTorch."""
    folder = tmp_path_factory.mktemp("fresh")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "bench", "tests")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    pip = (sys.executable, "-m", "pip")
    flags = ("--quiet", "--no-deps", "--no-index")
    run(*pip, "wheel", *flags, "--no-build-isolation", "--wheel-dir", folder, tree)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", *flags, "--no-compile", wheel)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", purelib).stdout.strip())
    paths = "import json, sys; print(json.dumps([p for p in sys.path if p.endswith('-packages')]))"
    # Plain lines: .pth files in there, such as one of an editable dl_norm, are not followed.
    (site / "verl.pth").write_text("\n".join(json.loads(run(verl_python, "-c", paths).stdout)))
    return python


NAMES = """
import sys, verl
before = "dl_norm.integrations.verl" in sys.modules
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
import dl_norm
print(before, dl_norm.__file__.startswith(sys.prefix))
names = [*ADV_ESTIMATOR_REGISTRY, *POLICY_LOSS_REGISTRY]
print(*sorted(name for name in names if "delta_l" in name))
"""


def test_installing_is_enough(fresh_python: Path) -> None:
    """`import verl` finds the plugin; both registries hold its names; nothing is complained of."""
    done = run(fresh_python, "-W", "ignore", "-c", NAMES)
    assert done.stdout.splitlines()[-2:] == ["True True", "delta_l delta_l_grpo delta_l_rloo"]
    assert "dl_norm" not in done.stderr


def test_a_failure_is_visible_and_harmless(fresh_python: Path) -> None:
    """verl logs a plugin's failure at DEBUG, where nobody sees it."""
    code = "import sys; sys.modules['verl.trainer.ppo.core_algos'] = None; import verl; print('ok')"
    done = run(fresh_python, "-W", "ignore", "-c", code)
    assert done.stdout.splitlines()[-1] == "ok"
    assert "dl_norm is not available in verl" in done.stderr
    assert "core_algos" in done.stderr


@pytest.mark.parametrize(
    ("version", "words", "names"),
    [
        ("0.8.0", "needs verl >= 0.9, but verl 0.8.0 is installed", ""),
        ("0.10.0", "tested with verl 0.9.1, this is verl 0.10.0", "delta_l"),
    ],
)
def test_other_versions(
    version: str, words: str, names: str, fresh_python: Path, tmp_path: Path
) -> None:
    """verl under another version number: every file a link but the one with the number.

    A version that is too new is imported by way of the plugin, which then loads verl, which asks
    for the plugin while that is half imported.
    """
    where = "import importlib.util; print(importlib.util.find_spec('verl').origin)"
    original = Path(run(fresh_python, "-W", "ignore", "-c", where).stdout.split()[-1]).parent
    copy = tmp_path / "verl"
    (copy / "version").mkdir(parents=True)
    (copy / "version" / "version").write_text(version)
    for path in original.iterdir():
        if path.name != "version":
            (copy / path.name).symlink_to(path)
    first = "import dl_norm.integrations.verl\n" if names else ""
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + first + NAMES
    done = run(fresh_python, "-W", "ignore", "-c", code, tmp_path)
    assert words in done.stderr
    assert done.stdout.splitlines()[-1].partition(" ")[0] == names


if __name__ == "__main__":
    print(json.dumps(run_checks()))

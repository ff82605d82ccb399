"""The adapters inside the trainers' own code.

Trainers pull in dozens of packages and most need a GPU, so single definitions are taken out of
their source and compiled alone: the function that calls the hook, what it divides by, and the
trainer's own loss. Wheels of SkyRL and AReaL are put into `.venv-trainers` by `ci/trainers_env.sh`.
The others have no wheel: clone them into one folder and set TRAINER_SOURCES to it (that script says
how). Without them the tests are skipped.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import enum
import importlib
import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, TypedDict

import pytest
import torch
from torch import Tensor

import dl_norm
from dl_norm.integrations import areal, nemo_rl, prime_rl, skyrl, torchforge

ROOT = Path(__file__).resolve().parents[1]


def sibling(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shared = sibling("test_adapters")
rollout = shared.rollout  # the fixture
ALPHA, M, LENGTHS, T, CLIP = shared.ALPHA, shared.M, shared.LENGTHS, shared.T, shared.CLIP
Rollout, SIGNATURES, fake = shared.Rollout, shared.SIGNATURES, shared.fake
# The trainers' losses are other float32 formulas of the same number.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def source(path: str) -> Path:
    """A file of a wheel, or of a clone."""
    wheel = ROOT / ".venv-trainers" / path
    if path.split("/")[0] in ("skyrl", "areal", "openrlhf"):
        if not wheel.exists():
            pytest.skip(f"{path} is not there: bash ci/trainers_env.sh")
        return wheel
    clones = os.environ.get("TRAINER_SOURCES")
    if not clones:
        pytest.skip("TRAINER_SOURCES is not set: a folder with clones, see ci/trainers_env.sh")
    if not (Path(clones) / path).exists():
        pytest.skip(f"{path} is not in TRAINER_SOURCES={clones}")
    return Path(clones) / path


def lift(path: str, *names: str, keep: tuple[str, ...] = (), **namespace: Any) -> SimpleNamespace:
    """Definitions of a source file ("function", "Class", "Class.method"), compiled alone.

    They see ``namespace``, torch and one another. Decorators are dropped but for those of ``keep``,
    annotations are not evaluated.
    """
    tree = ast.parse(source(path).read_text())
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found[f"{node.name}.{inner.name}"] = inner
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node)
    space = {"torch": torch, "Tensor": Tensor, **namespace}
    for name in names:
        node = found[name]
        if node.name not in keep:
            node.decorator_list = []
        code = compile(
            ast.Module([node], []), path, "exec", flags=__future__.annotations.compiler_flag
        )
        exec(code, space)
    return SimpleNamespace(**{name.split(".")[-1]: space[name.split(".")[-1]] for name in names})


def check_signature(function: Any, name: str) -> None:
    assert shared.plain(function) == SIGNATURES[name]


class Dist:
    """torch.distributed of a single process."""

    ReduceOp = torch.distributed.ReduceOp
    all_reduce = staticmethod(lambda *args, **kwargs: None)
    get_rank = staticmethod(lambda: 0)


# -- SkyRL 0.4.0


def test_skyrl(rollout: Rollout) -> None:
    """SkyRL's own mini-batch division under the mixin; its loss on the same data agrees."""
    utils = "skyrl/backends/skyrl_train/utils"
    torch_utils = lift(f"{utils}/torch_utils.py", "masked_mean", "safe_exp_delta")
    correction = lift(
        f"{utils}/off_policy_correction_utils.py",
        "off_policy_correction_enabled",
        "compute_tis_ratio",
        "compute_off_policy_correction",
        "apply_off_policy_correction",
        **vars(torch_utils),
    )
    ppo = lift(
        f"{utils}/ppo_utils.py",
        "reduce_loss",
        "apply_loss_reduction_to_advantages_minibatch",
        "ppo_policy_loss",
        **vars(torch_utils),
        **vars(correction),
    )
    trainer = lift(
        "skyrl/train/trainer.py",
        "RayPPOTrainer._normalize_advantages",
        apply_loss_reduction_to_advantages_minibatch=(
            ppo.apply_loss_reduction_to_advantages_minibatch
        ),
    )
    check_signature(ppo.ppo_policy_loss, "skyrl")
    check_signature(trainer._normalize_advantages, "skyrl trainer")

    class Data(dict):
        def __getitem__(self, key):
            if isinstance(key, slice):
                return {name: stream[key] for name, stream in self.items()}
            return super().__getitem__(key)

    class SkyRLTrainer:
        _normalize_advantages = trainer._normalize_advantages

    class Trainer(skyrl.DeltaLAdvantages, SkyRLTrainer):
        alpha = ALPHA

    config = shared.skyrl_config(
        off_policy_correction=SimpleNamespace(
            tis_ratio_type=None,
            sequence_mask_metric=None,
            **dict.fromkeys(
                f"{kind}_is_threshold_{end}"
                for kind in ("outlier_token", "token_mask")
                for end in ("low", "high")
            ),
        )
    )
    runner = Trainer()
    algorithm = SimpleNamespace(algorithm=config, micro_train_batch_size_per_gpu=1)
    runner.cfg = SimpleNamespace(trainer=algorithm)
    data = Data(
        advantages=rollout.advantages[:, None] * rollout.mask,
        loss_mask=rollout.mask.float(),
        response_mask=torch.ones_like(rollout.mask),
    )
    boundaries = [(0, 2), (2, 6)]
    data = runner._normalize_advantages(data, boundaries)
    totals = {"ours": torch.zeros(()), "theirs": torch.zeros(())}
    for row in range(6):
        part = slice(row, row + 1)
        args = (rollout.log_probs[part], rollout.old[part], data["advantages"][part])
        masks = {"loss_mask": data["loss_mask"][part]}
        loss, metrics = skyrl.delta_l_policy_loss(*args, config=config, **masks)
        config.policy_loss_type = "dual_clip"
        their_loss, their_metrics = ppo.ppo_policy_loss(*args, config=config, **masks)
        config.policy_loss_type = "delta_l_dual_clip"
        assert metrics == pytest.approx(their_metrics)
        totals = {"ours": totals["ours"] + loss, "theirs": totals["theirs"] + their_loss}
    rollout.check(totals["theirs"] / len(boundaries))
    rollout.check(totals["ours"] / len(boundaries))


SKYRL_PYTHON = Path(os.environ.get("SKYRL_PYTHON", ROOT / ".venv-skyrl" / "bin" / "python"))
# Runs where SkyRL is installed. Rounded alike: two float32 sums of the same terms.
IN_SKYRL = """
import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from skyrl.train.config import AlgorithmConfig
from dl_norm.integrations import skyrl as delta_l

delta_l.register()
assert {"delta_l", "delta_l_dual_clip"} <= set(PolicyLossRegistry.list_available())
random = torch.Generator().manual_seed(1)
old = -3 * torch.rand(4, 9, generator=random)
new = (old + 0.6 * torch.randn(4, 9, generator=random)).requires_grad_()
sampled = old + 0.3 * torch.randn(4, 9, generator=random)
mask = (torch.rand(4, 9, generator=random) < 0.8).float()
advantages = torch.randn(4, 1, generator=random).expand(4, 9) / 160
for ours, theirs in (("delta_l", "regular"), ("delta_l_dual_clip", "dual_clip")):
    for correct in (None, "token", "sequence"):
        results = []
        for name in (ours, theirs):
            config = AlgorithmConfig(
                policy_loss_type=name, loss_reduction="seq_mean_token_sum_norm", max_seq_len=40
            )
            if correct:
                config.off_policy_correction.tis_ratio_type = correct
                config.off_policy_correction.token_mask_is_threshold_low = 0.7
                config.off_policy_correction.token_mask_is_threshold_high = 1.5
            loss, metrics = PolicyLossRegistry.get(name)(
                new, old, advantages, config=config, loss_mask=mask, rollout_logprobs=sampled
            )
            results.append((loss, torch.autograd.grad(loss, new)[0], metrics))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-6, atol=2e-7)
        mine, other = results[0][2], results[1][2]
        assert mine.keys() == other.keys() and all(type(v) is float for v in mine.values())
        # SkyRL counts clipped tokens before its correction masks any, ours after.
        if not correct:
            assert abs(mine["clip_ratio"] - other["clip_ratio"]) < 1e-6
print("agreed")
"""


def test_skyrl_registry() -> None:
    """SkyRL itself: registration, its configuration class, both of its losses, its correction."""
    if not SKYRL_PYTHON.exists():
        pytest.skip("no .venv-skyrl: bash ci/skyrl_env.sh (Python 3.12)")
    done = subprocess.run(
        [str(SKYRL_PYTHON), "-c", IN_SKYRL],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout + done.stderr


# -- AReaL 1.0.4


def test_areal(rollout: Rollout) -> None:
    """AReaL's packing, loss weights and loss scaling around the hook."""
    data_utils = lift("areal/utils/data.py", "pack_tensor_dict", F=torch.nn.functional, Any=Any)
    total = lift("areal/engine/core/train_engine.py", "compute_total_loss_weight", dist=Dist)
    engine = lift(
        "areal/engine/fsdp_engine.py",
        "FSDPEngine._compute_logprobs_and_loss",
    )
    check_areal_hook_is_called_as_recorded()
    hook = areal.DeltaLLoss(alpha=ALPHA, max_length=M, **CLIP)
    micro_batches = [
        data_utils.pack_tensor_dict(
            {
                "attention_mask": torch.arange(T) < torch.tensor(LENGTHS)[rows, None],
                "logprobs": rollout.old[rows],
                "advantages": rollout.advantages[rows, None].expand(-1, T),
                "loss_mask": rollout.mask[rows],
                "new": rollout.log_probs[rows],
            }
        )
        for rows in ([0, 1, 2], [3, 4, 5])
    ]
    weight = total.compute_total_loss_weight(
        SimpleNamespace(mbs=micro_batches), hook.weight, dp_group=None
    )
    this = SimpleNamespace(
        config=SimpleNamespace(is_critic=False, temperature=1.0),
        enable_tree_training=False,
        _compute_logprobs_entropy=lambda logits, inputs, pad: (logits, torch.zeros_like(logits)),
        _get_vocab_min_max_logits=lambda logits, pad: (logits, logits),
    )
    padding = 3  # at the end of a packed micro-batch; the engine cuts it off
    losses = [
        engine._compute_logprobs_and_loss(
            this,
            torch.nn.functional.pad(mb["new"], (0, padding)),
            SimpleNamespace(mb_input=mb, model_inputs=mb, pad_length=padding, ulysses_pad_size=0),
            hook,
            hook.weight,
            weight,
            loss_multiplier=2.0,  # two data-parallel ranks, whose gradients are averaged
        )
        for mb in micro_batches
    ]
    rollout.check(torch.stack(losses).sum() / 2)


def check_areal_hook_is_called_as_recorded() -> None:
    text = source("areal/engine/fsdp_engine.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "loss_fn"
    ]
    shapes = {(len(call.args), tuple(word.arg for word in call.keywords)) for call in calls}
    assert (3, ("vocab_min_logits", "vocab_max_logits")) in shapes


# -- prime-rl


def test_prime_rl(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """prime-rl's compute_loss with the hook from its configuration, and ours in its place."""

    @dataclass
    class CustomLossConfig:
        import_path: str
        kwargs: dict[str, Any] = field(default_factory=dict)

    module = lift(
        "prime-rl/src/prime_rl/trainer/rl/loss.py",
        "LossInputs",
        "LossOutputs",
        "setup_rl_loss_fn",
        "compute_loss",
        keep=("LossInputs", "LossOutputs"),
        dataclass=dataclass,
        field=field,
        CustomLossConfig=CustomLossConfig,
        import_object=lift(
            "prime-rl/src/prime_rl/utils/utils.py", "import_object", importlib=importlib
        ).import_object,
    )
    check_signature(module.compute_loss, "prime-rl compute_loss")
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=module.LossOutputs)
    samples = shared.prime_samples(rollout)
    prime_rl.weight_samples(samples, alpha=ALPHA, max_length=M)
    count = int(rollout.mask.sum())
    micro_batches = ([0, 1, 2], [3, 4, 5])
    config = CustomLossConfig("dl_norm.integrations.prime_rl.delta_l_loss", CLIP)
    functions = module.compute_loss, prime_rl.make_compute_loss(**CLIP)
    for compute_loss in functions:
        total = torch.zeros(())
        for rows in micro_batches:
            streams = {
                "trainer_logprobs": rollout.log_probs,
                "inference_logprobs": rollout.old,
                "loss_mask": rollout.mask,
            }
            loss, metrics = compute_loss(
                **{
                    name: [stream[row, : LENGTHS[row]] for row in rows]
                    for name, stream in streams.items()
                },
                advantages=[torch.tensor(samples[row].advantages[1:]) for row in rows],
                **dict.fromkeys(("ref_logprobs", "rl_weights", "ce_weights", "ref_kl_weights")),
                rl_loss_fn=module.setup_rl_loss_fn(config),
                rl_scale=count,
                ce_scale=1,
                ref_kl_scale=1,
            )
            assert {"is_masked", "is_masked_low"} <= set(metrics)
            total = total + loss
        rollout.check(total)

    # A stream of rl weights, some of them 0, means the same to both.
    weights = (torch.rand(len(LENGTHS), T) * 2).floor() * 0.7
    streams = (rollout.log_probs, rollout.old, None, rollout.old, rollout.mask, weights)
    losses = [
        compute_loss(
            *(stream if stream is None else list(stream) for stream in streams),
            *[None] * 2,
            module.setup_rl_loss_fn(config),
            *[count, 1, 1],
        )[0]
        for compute_loss in functions
    ]
    torch.testing.assert_close(losses[0], losses[1], **TOLERANCE)


# -- slime


class SlimeArgs(SimpleNamespace):
    """slime's namespace; an option that is not set here is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@pytest.mark.parametrize("hook", ["reducer", "loss"])
def test_slime(rollout: Rollout, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime's own advantage step, loss dispatch and scaling around the hooks."""
    mpu = SimpleNamespace(
        get_data_parallel_group=lambda: None,
        get_context_parallel_world_size=lambda: 1,
        get_data_parallel_world_size=lambda with_context_parallel: 2,
        is_pipeline_last_stage=lambda: True,
    )

    def log_probs_of(logits: Tensor, **kwargs: Any) -> Any:
        # The logits are log-probs already here: slime's kernel for them needs Megatron.
        parts = list(logits.split(kwargs["response_lengths"]))
        return None, {"log_probs": parts, "entropy": [part.detach() for part in parts]}

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
        get_log_probs_and_entropy=log_probs_of,
        _maybe_capture_log_probs=lambda *args: None,
    )
    check_signature(module.policy_loss_function, "slime")
    fake(monkeypatch, "megatron.core", mpu=mpu)
    fake(monkeypatch, "slime.backends.megatron_utils.loss", **vars(module))
    monkeypatch.setattr(
        sys.modules["slime.backends.megatron_utils.loss"],
        "get_log_probs_and_entropy",
        log_probs_of,
        raising=False,
    )
    path = "dl_norm.integrations.slime"
    args = SlimeArgs(
        **vars(shared.slime_args()),
        custom_advantage_function_path=f"{path}.advantages",
        custom_pg_loss_reducer_function_path=f"{path}.pg_loss_reducer",
        loss_type="policy_loss" if hook == "reducer" else "custom_loss",
        custom_loss_function_path=f"{path}.policy_loss",
        advantage_estimator="grpo",
        kl_coef=0,
        entropy_coef=0,
        rollout_top_p=1.0,
    )
    data = shared.slime_batch(rollout)
    module.compute_advantages_and_returns(args, data)
    keys = ("response_lengths", "total_lengths", "loss_masks", "log_probs", "advantages")
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 6)):
        batch = {key: data[key][part] for key in keys} | {"unconcat_tokens": None}
        batch["rollout_mask_sums"] = [mask.sum() for mask in batch["loss_masks"]]
        loss, _, log = module.loss_function(
            args, batch, 2, len(LENGTHS), torch.cat(data["new_log_probs"][part])
        )
        assert {"loss", "pg_loss", "pg_clipfrac", "ppo_kl"} <= set(log["keys"])
        total = total + loss / 2  # Megatron divides by the number of micro-batches
    # slime 0.3.1 has --eps-clip-c, but its own loss does not read it yet.
    text = source(f"{folder}/backends/megatron_utils/loss.py").read_text()
    dual = hook == "loss" or "eps_clip_c=args.eps_clip_c" in text
    # Megatron averages over data-parallel ranks.
    rollout.check(total / 2, dual_clip=CLIP["dual_clip"] if dual else None)


def test_slime_signatures() -> None:
    """The reducer and the advantage function are called with what ours take."""
    text = source("slime/slime/backends/megatron_utils/loss.py").read_text()
    calls = {
        node.func.id: [ast.unparse(argument) for argument in node.args]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert len(calls["custom_pg_loss_reducer_func"]) == 4
    assert calls["custom_pg_loss_reducer_func"][3] == "args.calculate_per_token_loss"
    assert calls["custom_adv_fn"] == ["args", "rollout_data"]


# -- NeMo-RL


def test_nemo_rl(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-RL's wrappers call the hook; its own loss, rescaled, has the same gradient."""
    pydantic = pytest.importorskip("pydantic")
    folder = "RL/nemo_rl/algorithms"
    text = source(f"{folder}/loss/interfaces.py").read_text()
    enums = [
        name
        for name in ("LossType", "LossInputType", "MetricNormalizer")  # the last is after 0.7.0
        if f"class {name}" in text
    ]
    interfaces = lift(f"{folder}/loss/interfaces.py", *enums, enum=enum)
    fake(monkeypatch, "nemo_rl.algorithms.loss.interfaces", **vars(interfaces))
    utils = lift(f"{folder}/utils.py", "masked_mean", "calculate_kl", Optional=Optional)
    theirs = lift(
        f"{folder}/loss/loss_functions.py",
        "ClippedPGLossFn",
        **vars(interfaces),
        **vars(utils),
        LossFunction=object,
        TypedDict=TypedDict,
        Optional=Optional,
    )
    # The configuration by hand: pydantic evaluates annotations, which are not kept.
    text = source(f"{folder}/loss/loss_functions.py").read_text()
    node = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "ClippedPGLossConfig")
    space: dict[str, Any] = {"BaseModel": pydantic.BaseModel, "Optional": Optional}
    exec(compile(ast.Module([node], []), "nemo_rl", "exec", dont_inherit=True), space)
    config = space["ClippedPGLossConfig"](**shared.NEMO)
    check_signature(theirs.ClippedPGLossFn.__call__, "nemo-rl")
    estimator = lift(f"{folder}/advantage_estimator.py", "GRPOAdvantageEstimator.compute_advantage")
    check_signature(estimator.compute_advantage, "nemo-rl estimator")
    wrapper = lift(
        f"{folder}/loss/wrapper.py", "wrap_loss_fn_with_input_preparation", Any=Any
    ).wrap_loss_fn_with_input_preparation

    data = shared.nemo_data(rollout)
    counts = data["sample_mask"].sum(), rollout.mask.sum()

    def run(loss_fn: Any) -> Tensor:
        total = torch.zeros(())
        for part in (slice(0, 2), slice(2, 6)):
            micro = {name: stream[part] for name, stream in data.items()}
            loss, metrics = wrapper(
                rollout.log_probs[part],
                micro,
                *counts,
                loss_fn,
                lambda logits, data, **_: ({"next_token_logprobs": logits}, data),
            )
            assert {"loss", "probs_ratio", "gen_kl_error", "token_mult_prob_error"} <= set(metrics)
            total = total + loss
        return total

    rollout.check(run(nemo_rl.DeltaLLossFn(config, max_length=M)))
    # theirs is a sum over tokens / N (with 1e-8 added), ours over G M
    sequences, tokens = counts
    rollout.check(run(theirs.ClippedPGLossFn(config)) * (tokens / (sequences * M)))

    # With the correction for the gap between trainer and sampler.
    config = space["ClippedPGLossConfig"](**shared.NEMO, use_importance_sampling_correction=True)
    data["generation_logprobs"] = data["prev_logprobs"] + 0.3 * data["advantages"].sign()
    ours = run(nemo_rl.DeltaLLossFn(config, max_length=M))
    other = run(theirs.ClippedPGLossFn(config)) * (tokens / (sequences * M))
    torch.testing.assert_close(ours, other, **TOLERANCE)


# -- ROLL


class RollData:
    """ROLL's DataProto as far as training takes it: a batch of tensors that iterates in parts."""

    def __init__(self, batch: dict[str, Tensor], meta_info: dict[str, Any]):
        self.batch = Batch(batch)
        self.meta_info, self.non_tensor_batch = meta_info, {}

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def make_iterator(self, mini_batch_size, epochs, seed=None, dataloader_kwargs=None):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        order = order if (dataloader_kwargs or {}).get("shuffle") else torch.arange(len(self))
        for rows in order.split(mini_batch_size):
            part = {name: stream[rows] for name, stream in self.batch.items()}
            yield RollData(part, self.meta_info)

    def to(self, *_: Any) -> RollData:
        return self

    def prefetch(self) -> None:
        pass


class Batch(dict):
    @property
    def batch_size(self) -> tuple[int]:
        return (len(self["input_ids"]),)


def test_roll(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROLL's worker and its FSDP2 strategy train with the hook: two steps of three rows."""
    folder = "ROLL/roll"
    worker_source = lift(
        f"{folder}/pipeline/base_worker.py",
        "ActorWorker.train_step",
        "ActorWorker.get_old_log_probs_with_cache",
        state_offload_manger=lambda **_: contextlib.nullcontext(),
        OffloadStateType=SimpleNamespace(model_params=0, other_params=1),
        current_platform=SimpleNamespace(device_type="cpu"),
        append_to_dict=lambda metrics, new: metrics.update(new),
        reduce_metrics=None,
        tqdm=lambda iterator, **_: iterator,
        DataProto=lambda meta_info: meta_info,
        flatten_sum=sum,
    )
    strategy_source = lift(
        f"{folder}/distributed/strategy/fsdp2_strategy.py",
        "FSDP2TrainStrategy.train_step",
        append_to_dict=lambda metrics, new: metrics.update(new),
        contextlib=contextlib,
        current_platform=SimpleNamespace(device_type="cpu"),
        defaultdict=defaultdict,
        dist=Dist,
        DataProto=RollData,
        logger=None,
    )
    counts = roll_counts(folder)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 0)

    class ActorWorker:
        train_step = worker_source.train_step
        get_old_log_probs_with_cache = worker_source.get_old_log_probs_with_cache

    roll = shared.import_roll(monkeypatch, ActorWorker)
    check_signature(roll.DeltaLActorWorker.loss_func, "roll")
    check_signature(
        lift(f"{folder}/pipeline/rlvr/actor_worker.py", "ActorWorker.loss_func").loss_func, "roll"
    )

    # The "model": one log-prob per row and position, a parameter.
    table = torch.nn.Parameter(rollout.log_probs.detach().clone())
    worker = type("Worker", (roll.DeltaLActorWorker,), {"alpha": ALPHA})()
    stub = shared.RollActorWorker()
    worker.pipeline_config, worker.worker_config = stub.pipeline_config, stub.worker_config
    worker.pipeline_config.__dict__.update(ppo_epochs=1, seed=1, max_grad_norm=1.0)
    worker.worker_config.__dict__.update(name="actor_train", use_sequence_packing=False)
    worker.worker_name = worker.cluster_name = "actor"
    worker.logger = SimpleNamespace(info=lambda *_: None)
    worker.rank_info = SimpleNamespace(cp_size=1, dp_size=1)
    worker._logprobs_cache = {}
    gradients: list[Tensor] = []

    def step() -> None:
        gradients.append(table.grad.clone())

    strategy = SimpleNamespace(
        **vars(counts),
        worker=worker,
        worker_config=worker.worker_config,
        model=SimpleNamespace(train=lambda: None),
        reduce_scatter_during_grad_accumulation=True,
        param_dtype=torch.bfloat16,
        scaler=None,
        scheduler=SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0]),
        optimizer=SimpleNamespace(
            step=step, zero_grad=lambda set_to_none: setattr(table, "grad", None)
        ),
        get_data_input=lambda data: data,
        _clip_grad_norm=lambda max_norm: torch.ones(()),
        _fsdp2_forward=lambda input_ids, **_: table[input_ids[:, 0]],
        op_compute_log_probs=lambda logits, input_ids, attention_mask: logits,
    )
    for name in ("_get_batch_num_tokens", "_get_global_valid_samples"):
        setattr(strategy, name, getattr(counts, name).__get__(strategy))
    strategy.train_step = strategy_source.train_step.__get__(strategy)
    worker.strategy = strategy

    batch = shared.roll_batch(rollout).batch
    del batch["logits"]
    batch["input_ids"] = torch.arange(len(LENGTHS))[:, None].expand(-1, T + 1)
    batch["attention_mask"] = batch["position_ids"] = batch["input_ids"]
    worker.train_step(RollData(batch, {"loss_mask_keys": ["response_mask"], "forward_args": {}}))
    assert len(gradients) == 2
    _, true_gradient = rollout.true()
    torch.testing.assert_close(sum(gradients) / 2, true_gradient, **shared.TOLERANCE)


def roll_counts(folder: str) -> SimpleNamespace:
    path = f"{folder}/distributed/strategy/strategy.py"
    tree = ast.parse(source(path).read_text())
    owner = next(
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(getattr(inner, "name", "") == "_get_batch_num_tokens" for inner in node.body)
    )
    names = (f"{owner}._get_batch_num_tokens", f"{owner}._get_global_valid_samples")
    return lift(path, *names, dist=Dist, IGNORE_INDEX=-100)


# -- torchforge


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torchforge(rollout: Rollout, backend: str) -> None:
    """torchforge's collate and its trainer's forward and backward, with the compiled hook."""
    app = lift(
        "torchforge/apps/grpo/main.py",
        "collate",
        "simple_grpo_loss",
        compute_logprobs=lift(
            "torchforge/src/forge/util/ops.py", "compute_logprobs", F=torch.nn.functional
        ).compute_logprobs,
    )
    trainer = lift("torchforge/src/forge/actors/trainer/titan.py", "TitanTrainer.forward_backward")
    random = torch.Generator().manual_seed(8)
    vocabulary, pad = 11, 0
    table = torch.randn(len(LENGTHS), T + 2, vocabulary, generator=random).requires_grad_()

    def episode(row: int) -> SimpleNamespace:
        response = torch.randint(1, vocabulary, (T,), generator=random)
        response[LENGTHS[row] :] = pad
        return SimpleNamespace(
            request_tensor=torch.full((2,), row),
            response_tensor=response,
            ref_logprobs=rollout.old[row],
            advantage=float(rollout.advantages[row]),
            pad_id=pad,
        )

    episodes = [episode(row) for row in range(6)]
    ranks = [episodes[:2], episodes[2:]]
    inputs, targets = torchforge.weighted(app.collate, alpha=ALPHA, max_length=M)(ranks)
    added = set(targets[0]) - set(shared.SIGNATURES["torchforge"].replace(",", "").split())
    assert added <= {"weights"}  # the targets are the hook's arguments
    engine = SimpleNamespace(
        model_parts=[lambda tokens: table[tokens[:, 0]]],
        parallel_dims=SimpleNamespace(pp_enabled=False),
        train_context=lambda _: contextlib.nullcontext(),
        maybe_enable_amp=contextlib.nullcontext(),
    )
    this = SimpleNamespace(
        engine=engine,
        loss=torch.compile(torchforge.delta_l_loss, backend=backend, fullgraph=True),
    )
    losses = [
        trainer.forward_backward(this, part, target)
        for part, target in zip(inputs, targets, strict=True)
    ]
    gradient, table.grad = table.grad / len(ranks), None  # FSDP averages

    response = torch.stack([e.response_tensor for e in episodes])
    log_probs = table[:, -T - 1 : -1].double().log_softmax(-1).gather(-1, response[..., None])
    mask = response != pad
    true = dl_norm.reference.policy_loss(
        log_probs[..., 0],
        None,
        rollout.advantages,
        mask,
        dl_norm.sequence_weights(mask.sum(-1), alpha=ALPHA, max_length=M),
        ref_log_probs=rollout.old,
        beta=0.1,
    )
    true.backward()
    torch.testing.assert_close(sum(losses) / len(ranks), true.float(), **TOLERANCE)
    torch.testing.assert_close(gradient, table.grad, **TOLERANCE)

    # Their loss is the same one under GRPO's weights.
    for target in targets:
        lengths = target["padding_mask"].sum(-1)
        weights = dl_norm.sequence_weights(lengths, "grpo") * (lengths > 0).float().mean()
        target["weights"] = weights
    for part, target in zip(inputs, targets, strict=True):
        logits = table[part["tokens"][:, 0]]
        ours = torchforge.delta_l_loss(logits, **target)
        del target["weights"]
        torch.testing.assert_close(ours, app.simple_grpo_loss(logits, **target), **TOLERANCE)

"""DeltaLGRPOTrainer against TRL's own trainer, in real training steps of a tiny Qwen2.

Rollouts come from a `rollout_func` that is a pure function of the prompt and the occurrence of it,
so two trainers, or one and two processes, see the same sequences. Lengths differ a lot (1 to 12
tokens): with equal lengths the aggregations would be indistinguishable.

Run as a script, this file is one process of the two-process test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import inspect
import math
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'dl-norm[trl]'")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also keeps TRL from sending telemetry
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is announced as experimental

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.base_config import _BaseConfig
from trl.trainer.utils import split_tensor_dict

import dl_norm
from dl_norm.integrations import trl as integration
from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer, micro_batch_scale

WORDS = [f"w{i}" for i in range(29)]
VOCABULARY = ["<pad>", "<eos>", "<unk>", *WORDS]
EOS = VOCABULARY.index("<eos>")
MAX_LENGTH = 12
TRL_LOSSES = ("grpo", "dapo", "dr_grpo")


# --- a tiny model, tokenizer, data set and fixed rollouts -----------------------------------------


def save_model(directory: Path, mixture: bool = False) -> str:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(directory)
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # the default 0.02 gives a uniform policy: gradients of no interest
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    if mixture:
        model = MixtralForCausalLM(
            MixtralConfig(**size, num_local_experts=3, router_aux_loss_coef=0.1)
        )
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**size))
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Accelerate collects garbage in every run: 0.2 s, unless what is imported by now is frozen.
    One thread: the tensors are tiny, and threads would only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny-qwen2"))


def fixed_rollouts(prompts, trainer, with_logprobs=False, with_env_mask=False):
    """The k-th completion of a prompt depends on the prompt and k alone."""
    tokenize = trainer.processing_class
    seen: dict[str, int] = {}
    out = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    sampling, masks = [], []
    for prompt in prompts:
        k = seen[prompt] = seen.get(prompt, -1) + 1
        prompt_ids = tokenize(prompt)["input_ids"]
        generator = torch.Generator().manual_seed(1000 * sum(prompt_ids) + k)
        drawn = int(torch.randint(1, MAX_LENGTH + 5, (), generator=generator))
        length = min(drawn, MAX_LENGTH)  # a quarter is truncated
        words = torch.randint(3, len(VOCABULARY), (length,), generator=generator).tolist()
        if length < MAX_LENGTH:
            words[-1] = EOS
        out["prompt_ids"].append(prompt_ids)
        out["completion_ids"].append(words)
        sampling.append((-3 - torch.rand(length, generator=generator)).tolist())
        masks.append(torch.randint(0, 2, (length,), generator=generator).tolist())
    if with_logprobs:
        out["logprobs"] = sampling
    if with_env_mask:
        out["env_mask"] = masks
    return out


def reward(completion_ids, **_):
    return [float((sum(ids) + len(ids)) % 7) for ids in completion_ids]


def prompts(count: int = 64) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"{WORDS[i % 29]} {WORDS[i // 29]}" for i in range(count)]}
    )


class Recorder(TrainerCallback):
    """Gradients of every optimizer step, as the optimizer sees them."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(
            {
                name.removeprefix("module."): p.grad.detach().clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        )


def build(
    cls, path, directory, *, perturb=0.0, rollouts=fixed_rollouts, model=None, rows=64, **options
):
    """A trainer of class `cls`, on the CPU in float32 with SGD and no gradient clipping."""
    config = DeltaLGRPOConfig if issubclass(cls, DeltaLGRPOTrainer) else GRPOConfig
    peft_config = options.pop("peft_config", None)
    options = {
        "max_completion_length": MAX_LENGTH,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "seed": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "output_dir": str(directory),
        **options,
    }
    args = config(**options)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if perturb:  # move the policy away from the reference, which TRL loads from `path`
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(perturb * torch.randn(p.shape, generator=generator))
    recorder = Recorder()
    trainer = cls(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=prompts(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(path),
        rollout_func=rollouts,
        callbacks=[recorder],
        peft_config=peft_config,
    )
    return trainer, recorder


def run(cls, path, directory, *, vllm=False, **options):
    """Train; returns gradients per optimizer step and the log history."""
    trainer, recorder = build(cls, path, directory, **options)
    if vllm:  # the rollouts' log-probs are then used as vLLM's; there is no engine to keep in step
        trainer.use_vllm = True
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    with quiet():
        trainer.train()
    return recorder.gradients, trainer.state.log_history


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


def relative_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference over all parameters, relative to the largest gradient entry."""
    assert got.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 0, "no gradient at all: the comparison would be empty"
    return max(float((got[n] - wanted[n]).abs().max()) for n in wanted) / largest


# --- parity with TRL in training ------------------------------------------------------------------

# One reason each; together every option that the loss honours. "shows": metrics that have to be
# positive somewhere in the run, or the setting would not reach what it is for.
CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean")
SETTINGS = {
    "one micro-batch": dict(),
    "accumulation, window = generation batch": dict(gradient_accumulation_steps=2),
    "window = half a generation batch": dict(
        gradient_accumulation_steps=2, steps_per_generation=4, max_steps=3
    ),
    "window = two generation batches": dict(gradient_accumulation_steps=4, steps_per_generation=2),
    "window and generation batch not aligned": dict(
        gradient_accumulation_steps=2, steps_per_generation=3, num_generations=2, max_steps=3
    ),
    "last window of the epoch is shorter": dict(
        gradient_accumulation_steps=3, steps_per_generation=1, rows=4
    ),
    "ratio away from 1, clipped on both sides": dict(
        num_iterations=3,
        max_steps=3,
        learning_rate=0.5,
        epsilon=0.05,
        epsilon_high=0.1,
        shows=CLIPPED,
    ),
    "two-sided clip": dict(num_iterations=2, delta=1.25, learning_rate=0.5, shows=CLIPPED),
    "two-sided clip below the upper clip": dict(num_iterations=2, delta=1.1, learning_rate=0.5),
    "KL": dict(
        beta=0.3, perturb=0.1, num_iterations=2, use_bias_correction_kl=False, shows=("kl",)
    ),
    "KL with bias correction": dict(
        beta=0.3, perturb=0.1, num_iterations=2, learning_rate=0.3, shows=("kl",)
    ),
    "tool tokens masked": dict(
        rollouts=lambda p, t: fixed_rollouts(p, t, with_env_mask=True),
        gradient_accumulation_steps=2,
    ),
    "truncated completions masked": dict(
        mask_truncated_completions=True,
        gradient_accumulation_steps=2,
        num_generations=8,
        shows=("completions/clipped_ratio",),
    ),
    "vLLM correction per token": dict(
        rollouts=lambda p, t: fixed_rollouts(p, t, with_logprobs=True),
        vllm=True,
        vllm_importance_sampling_mode="token_truncate",
        shows=("sampling/importance_sampling_ratio/mean",),
    ),
    "vLLM correction per sequence, off-policy mask": dict(
        rollouts=lambda p, t: fixed_rollouts(p, t, with_logprobs=True),
        vllm=True,
        vllm_importance_sampling_mode="sequence_truncate",
        off_policy_mask_threshold=0.5,
        shows=("sampling/importance_sampling_ratio/mean",),
    ),
    "entropy mask and bonus": dict(
        top_entropy_quantile=0.5,
        entropy_coef=0.1,
        gradient_accumulation_steps=2,
        shows=("entropy_coef", "entropy"),
    ),
    "off-policy mask": dict(off_policy_mask_threshold=0.01, num_iterations=2, learning_rate=0.5),
    "rewards scaled over the batch": dict(scale_rewards="batch", num_iterations=2),
}
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def assert_same_logs(ours, theirs):
    assert len(ours) == len(theirs)
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.keys() == wanted.keys()
        for name in wanted.keys() - TIMES:
            # float32 sums of up to 100 terms of order 1, of which the loss is a difference
            same = pytest.approx(wanted[name], rel=1e-4, abs=2e-6, nan_ok=True)
            assert got[name] == same, name


@pytest.mark.parametrize("aggregation", TRL_LOSSES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_equals_trl(model_path, tmp_path, setting, aggregation):
    options = dict(SETTINGS[setting])
    shows = options.pop("shows", ())
    theirs, their_logs = run(GRPOTrainer, model_path, tmp_path, loss_type=aggregation, **options)
    ours, our_logs = run(
        DeltaLGRPOTrainer, model_path, tmp_path, aggregation=aggregation, **options
    )
    for name in shows:
        assert any(logs.get(name, 0) > 0 for logs in their_logs), f"{name} is 0 in the whole run"
    assert len(ours) == len(theirs) == options.get("max_steps", 2)
    for got, wanted in zip(ours, theirs, strict=True):
        assert relative_error(got, wanted) < 1e-5  # float32, and the weights drift by rounding
    assert_same_logs(our_logs, their_logs)


@pytest.mark.parametrize("aggregation", TRL_LOSSES)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("advantages", ["per sequence", "per token"])
def test_compute_loss_equals_trl(model_path, tmp_path, aggregation, mode, advantages):
    """The two methods on the same inputs: off-policy, with KL, two-sided clip and masked tokens."""
    options = dict(
        steps_per_generation=2,
        gradient_accumulation_steps=4,
        beta=0.2,
        delta=1.5,
        epsilon_high=0.3,
        rollouts=lambda p, t: fixed_rollouts(p, t, with_env_mask=True),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        perturb=0.1,
    )
    ours, _ = build(DeltaLGRPOTrainer, model_path, tmp_path, aggregation=aggregation, **options)
    theirs, _ = build(
        GRPOTrainer, model_path, tmp_path, loss_type=aggregation, model=ours.model, **options
    )
    ours.model.train(mode == "train")
    batch = ours._generate_and_score_completions([prompts()[i // 4] for i in range(16)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_probs, _, _ = ours._score(ours.model, batch)
    noise = 0.6 * torch.randn(log_probs.shape, generator=generator)
    batch["old_per_token_logps"] = log_probs + noise
    if advantages == "per token":  # TRL's subclasses may provide these
        batch["advantages"] = torch.randn(log_probs.shape, generator=generator)
    if mode == "train":  # the first of the generation batch's two micro-batches
        batch = split_tensor_dict(batch, 2)[0]

    results = []
    for trainer in (ours, theirs):
        trainer.current_gradient_accumulation_steps = 4
        ours.model.zero_grad()
        trainer._metrics[mode].clear()  # one of the two has generated the batch and logged that
        loss = trainer._compute_loss(ours.model, batch)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in ours.model.named_parameters()}
        with quiet():
            trainer.log({})
        results.append((loss.item(), gradients, trainer.state.log_history))
    (loss, gradients, logs), (their_loss, their_gradients, their_logs) = results
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert relative_error(gradients, their_gradients) < 1e-5
    assert_same_logs(logs, their_logs)
    prefix = "" if mode == "train" else "eval_"
    assert all(0 < logs[0][prefix + name] < 1 for name in CLIPPED)


def test_evaluation_equals_trl(model_path, tmp_path):
    options = dict(per_device_eval_batch_size=8, gradient_accumulation_steps=2, beta=0.1)
    logs = []
    for cls, name in ((DeltaLGRPOTrainer, "aggregation"), (GRPOTrainer, "loss_type")):
        trainer, _ = build(cls, model_path, tmp_path, **{name: "dapo"}, **options)
        with quiet():
            metrics = trainer.evaluate(prompts(4))
        logs.append({k: v for k, v in metrics.items() if "runtime" not in k and "second" not in k})
    assert_same_logs(logs[:1], logs[1:])


def test_mixture_of_experts_keeps_its_balancing_loss(tmp_path):
    path = save_model(tmp_path / "model", mixture=True)
    options = dict(gradient_accumulation_steps=2)
    theirs, their_logs = run(GRPOTrainer, path, tmp_path, loss_type="dapo", **options)
    ours, our_logs = run(DeltaLGRPOTrainer, path, tmp_path, aggregation="dapo", **options)
    assert their_logs[0]["aux_loss"] > 0
    for got, wanted in zip(ours, theirs, strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert_same_logs(our_logs, their_logs)


def test_peft_adapters(model_path, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = dict(
        peft_config=peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
        beta=0.1,  # the reference is the model with its adapters off
        gradient_accumulation_steps=2,
    )
    theirs, their_logs = run(GRPOTrainer, model_path, tmp_path, loss_type="dr_grpo", **options)
    ours, our_logs = run(DeltaLGRPOTrainer, model_path, tmp_path, aggregation="dr_grpo", **options)
    assert all("lora" in name for name in ours[0])
    for got, wanted in zip(ours, theirs, strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert_same_logs(our_logs, their_logs)


# --- delta_l against the definition ---------------------------------------------------------------


class Capturing(DeltaLGRPOTrainer):
    """Keeps the generation batches as they are before TRL shuffles and splits them."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batches = []

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append({k: v.clone() for k, v in batch.items() if torch.is_tensor(v)})
        return batch


def full_batch_gradient(path, batch, alpha):
    """The loss of a whole generation batch and its gradient, straight from the definition."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(2, ids[:, -length:, None]).squeeze(2)
    lengths = batch["completion_mask"].sum(1).double()
    weights = lengths**-alpha / (lengths**-alpha).sum() / MAX_LENGTH
    loss = dl_norm.reference.policy_loss(
        log_probs, None, batch["advantages"].double(), batch["completion_mask"], weights
    )
    loss.backward()
    return loss.item(), {n: p.grad.float() for n, p in model.named_parameters()}


def average(gradients):
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}


@pytest.mark.parametrize("alpha", [1.0, 0.75, 0.0])
@pytest.mark.parametrize(
    ("per_generation", "accumulated", "steps"),
    [(1, 1, 1), (4, 4, 1), (4, 2, 2), (2, 4, 1)],
    ids=["one micro-batch", "window = batch", "two windows in a batch", "two batches in a window"],
)
def test_delta_l_is_the_full_batch_gradient(
    model_path, tmp_path, alpha, per_generation, accumulated, steps
):
    """With weights at rest, windows average to generation batches: the mean over as many optimizer
    steps as use up whole batches is the mean of the full-batch gradients.
    """
    trainer, recorder = build(
        Capturing,
        model_path,
        tmp_path,
        alpha=alpha,
        steps_per_generation=per_generation,
        gradient_accumulation_steps=accumulated,
        max_steps=steps,
        learning_rate=0.0,
    )
    with quiet():
        trainer.train()
    expected = [full_batch_gradient(model_path, batch, alpha) for batch in trainer.batches]
    assert len(expected) * per_generation == steps * accumulated
    wanted = average([gradient for _, gradient in expected])
    assert relative_error(average(recorder.gradients), wanted) < 1e-5
    logged = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    loss = sum(loss for loss, _ in expected) / len(expected)
    assert sum(logged) / steps == pytest.approx(loss, rel=1e-4, abs=1e-7)


def test_weights_of_the_whole_batch_survive_shuffle_and_split(model_path, tmp_path):
    trainer, _ = build(
        Capturing,
        model_path,
        tmp_path,
        alpha=0.75,
        steps_per_generation=4,
        num_iterations=2,
        rollouts=lambda p, t: fixed_rollouts(p, t, with_env_mask=True),
    )
    trainer.model.train()
    generation_batch = [prompts()[i // 4] for i in range(16)]
    micro_batches = []
    for _ in range(8):  # two iterations over four micro-batches
        micro_batches.append(trainer._prepare_inputs(generation_batch))
        trainer._step += 1
    (whole,) = trainer.batches
    lengths = (whole["completion_mask"] * whole["tool_mask"]).sum(1)
    assert (lengths < whole["completion_mask"].sum(1)).any(), "the tool mask must matter"
    expected = dl_norm.sequence_weights(lengths, alpha=0.75, max_length=MAX_LENGTH)
    by_row = {
        tuple(row.tolist()): (index, weight)
        for index, (row, weight) in enumerate(
            zip(torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1), expected, strict=True)
        )
    }
    assert len(by_row) == 16, "rows must differ to be recognised"
    for iteration in (micro_batches[:4], micro_batches[4:]):
        order = []
        for micro_batch in iteration:
            rows = torch.cat([micro_batch["prompt_ids"], micro_batch["completion_ids"]], 1)
            for row, weight in zip(rows, micro_batch["sequence_weights"], strict=True):
                index, wanted = by_row[tuple(row.tolist())]
                assert weight == wanted
                order.append(index)
        assert sorted(order) == list(range(16))
        assert order != list(range(16)), "TRL shuffles: this test must see that"


def test_all_completions_masked_gives_zero_loss_and_gradient(model_path, tmp_path):
    def endless(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [[5] * MAX_LENGTH for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    for aggregation in dl_norm.weights.METHODS:
        gradients, logs = run(
            DeltaLGRPOTrainer,
            model_path,
            tmp_path,
            aggregation=aggregation,
            rollouts=endless,
            mask_truncated_completions=True,
        )
        assert logs[0]["loss"] == 0
        assert all((g == 0).all() for g in gradients[0].values())


def test_real_generation_trains(model_path, tmp_path):
    trainer, recorder = build(
        DeltaLGRPOTrainer,
        model_path,
        tmp_path,
        rollouts=None,  # the model writes its own completions
        alpha=0.75,
        max_steps=3,
        gradient_accumulation_steps=2,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with quiet():
        trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert any(loss != 0 for loss in losses)
    assert any((p != before[n]).any() for n, p in trainer.model.named_parameters())
    assert len(recorder.gradients) == 3


def test_micro_batch_scale():
    assert micro_batch_scale(1, 1, 1) == 1.0
    assert micro_batch_scale(8, 4, 2) == 16.0
    assert micro_batch_scale(2, 1, 4) == 0.5


# --- options --------------------------------------------------------------------------------------

FOLLOWED = {
    "beta": "KL term",
    "num_iterations": "old log-probs",
    "epsilon": "lower clip",
    "epsilon_high": "upper clip",
    "delta": "two-sided clip",
    "router_aux_loss_coef": "load-balancing loss",
    "max_completion_length": "M",
    "steps_per_generation": "scale",
    "mask_truncated_completions": "mask, and with it the lengths",
    "top_entropy_quantile": "factor on the token loss",
    "entropy_coef": "bonus",
    "off_policy_mask_threshold": "factor on the token loss",
    "use_bias_correction_kl": "KL term",
    "vllm_importance_sampling_correction": "factor on the token loss",
}
CHECKED = {"loss_type"}
# Used by TRL before the loss: what the model is, what is generated, its reward, its advantage, the
# value of the importance sampling ratio, and what is printed.
BEFORE_THE_LOSS = """
    learning_rate model_init_kwargs trust_remote_code disable_dropout cast_lm_head_to_fp32
    remove_unused_columns num_generations num_generations_eval ds3_gather_for_generation
    shuffle_dataset pad_to_multiple_of generation_batch_size temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm
    vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size reward_weights
    multi_objective_aggregation scale_rewards sync_ref_model ref_model_mixup_alpha
    ref_model_sync_steps max_tool_calling_iterations vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_cap log_completions log_multimodal num_completions_to_print
    log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged
"""
# What TRL's `_compute_loss` reads from itself and its arguments.
READ_BY_TRL = """
    accelerator aux_loss_enabled beta current_gradient_accumulation_steps delta entropy_coef
    entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon_high epsilon_low
    get_gamma_weights get_high_entropy_mask get_off_policy_mask importance_sampling_level loss_type
    max_completion_length model off_policy_mask_threshold router_aux_loss_coef sapo_temperature_neg
    sapo_temperature_pos steps_per_generation top_entropy_quantile use_adaptive_entropy
    use_bias_correction_kl use_vllm vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    vllm_importance_sampling_correction _entropy_bonus_enabled _entropy_window_stats
    _get_per_token_logps_and_entropies _last_world_entropy _metrics
"""
OTHER_VALUE = {  # a value that is not TRL's default, for each refused option
    "importance_sampling_level": "sequence",
    "use_adaptive_entropy": True,
    **dict.fromkeys(integration._REFUSED.keys() - {"importance_sampling_level"}, 0.5),
    **dict.fromkeys(["use_adaptive_entropy"], True),
}


def test_every_option_of_trl_is_followed_refused_or_outside_the_loss():
    groups = [set(FOLLOWED), CHECKED, set(integration._REFUSED), set(BEFORE_THE_LOSS.split())]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not group & other
    own = GRPOConfig.__annotations__.keys()
    inherited = {f.name for f in dataclasses.fields(_BaseConfig)}
    assert set.union(*groups) == set(own)
    assert own <= {f.name for f in dataclasses.fields(GRPOConfig)}
    assert own & inherited == {"learning_rate", "remove_unused_columns"}


def test_nothing_new_in_the_loss_of_trl():
    """A branch added to TRL's loss reads something that is not on the list."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    read = set(re.findall(r"self\.(?:args\.)?(\w+)", source))
    assert read == set(READ_BY_TRL.split())
    batch = set(re.findall(r'inputs(?:\.get\(|\[)"(\w+)"', source)) | {"tool_mask"}
    ours = inspect.getsource(DeltaLGRPOTrainer) + inspect.getsource(integration._loss_mask)
    ignored = {"num_items_in_batch"}  # "dapo" has the token count of the generation batch in x
    assert {key for key in batch if f'"{key}"' not in ours} == ignored


@pytest.fixture
def config(tmp_path):
    def build_config(**options):
        return DeltaLGRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options
        )

    return build_config


@pytest.mark.parametrize("name", integration._REFUSED)
def test_refused_options_raise_at_construction(config, name):
    with pytest.raises(ValueError, match=rf"{name}=.* is not supported: .*(use|leave)"):
        config(**{name: OTHER_VALUE[name]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(aggregation="mean"), "aggregation must be one of delta_l, grpo, dapo, dr_grpo"),
        (dict(alpha=-1.0), "alpha must be a finite number >= 0"),
        (dict(alpha=math.nan), "alpha must be a finite number >= 0"),
        (dict(aggregation="dapo", alpha=0.5), "alpha=0.5 has no meaning for aggregation='dapo'"),
        *(
            (dict(loss_type=loss_type), f"loss_type='{loss_type}' disagrees with aggregation")
            for loss_type in ("bnpo", "cispo", "sapo", "luspo", "vespo", "dapo")
        ),
        (dict(aggregation="grpo", loss_type="dapo"), "loss_type='dapo' disagrees"),
        (dict(max_completion_length=None), "max_completion_length=None, but aggregation"),
        (
            dict(max_completion_length=None, aggregation="dr_grpo"),
            "max_completion_length=None, but aggregation",
        ),
        (dict(delta=0.5), "delta or beta is out of range"),
        (dict(epsilon=1.5), "epsilon, epsilon_high"),
        (dict(epsilon_high=-0.1), "epsilon, epsilon_high"),
        (dict(beta=-0.1), "beta is out of range"),
    ],
)
def test_contradicting_options_raise_at_construction(config, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(aggregation="dapo", loss_type="dapo"),
        dict(aggregation="grpo", max_completion_length=None),
        dict(alpha=0.0),
    ],
)
def test_consistent_options_are_accepted(config, options):
    config(**options)


def test_options_are_checked_again_by_the_trainer(model_path, config):
    args = config()
    args.importance_sampling_level = "sequence"
    with pytest.raises(ValueError, match="importance_sampling_level"):
        DeltaLGRPOTrainer(model_path, reward, args, train_dataset=prompts())


def test_plain_grpo_config_is_refused(model_path, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(TypeError, match="args must be a DeltaLGRPOConfig; got GRPOConfig"):
        DeltaLGRPOTrainer(model_path, reward, args, train_dataset=prompts())


def test_a_batch_without_weights_is_refused(model_path, tmp_path):
    trainer, _ = build(DeltaLGRPOTrainer, model_path, tmp_path)
    with pytest.raises(ValueError, match="must call super"):
        trainer._compute_loss(trainer.model, {})


def import_again():
    """Run the module's code anew under another name, so that the imported one stays as it is."""
    spec = importlib.util.spec_from_file_location("integration_again", integration.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_import_without_trl_names_the_extra(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    with pytest.raises(ImportError, match=re.escape("pip install 'dl-norm[trl]'")):
        import_again()


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "0.29.1"])
def test_import_with_an_unsupported_trl_says_which(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=re.escape(f"trl>=1.16,<1.17, but trl {version}")):
        import_again()


# --- two processes --------------------------------------------------------------------------------

DISTRIBUTED = dict(
    gradient_accumulation_steps=2,
    steps_per_generation=2,
    num_iterations=2,
    learning_rate=0.5,
    epsilon=0.05,
    rollouts=lambda p, t: fixed_rollouts(p, t, with_env_mask=True),
)


def distributed_runs(path, directory, batch_size):
    options = dict(per_device_train_batch_size=batch_size, **DISTRIBUTED)
    results = {"delta_l": run(DeltaLGRPOTrainer, path, directory, alpha=0.75, **options)}
    for name in TRL_LOSSES:
        results[name] = run(DeltaLGRPOTrainer, path, directory, aggregation=name, **options)
        results[f"trl {name}"] = run(GRPOTrainer, path, directory, loss_type=name, **options)
    return results


def test_two_processes_equal_one(model_path, tmp_path):
    """The same rollouts on two gloo processes with DistributedDataParallel and on one process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, model_path, str(tmp_path)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    one = distributed_runs(model_path, tmp_path, batch_size=4)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    two = torch.load(tmp_path / "two.pt")

    for name, (gradients, _) in one.items():
        # The window is the whole generation batch, so the shuffle does not matter. The second step
        # has ratios away from 1; its gradient is taken where the first, rounded, step led.
        for got, wanted in zip(two[name][0], gradients, strict=True):
            assert relative_error(got, wanted) < 2e-5, name
    for name in TRL_LOSSES:
        assert_same_logs(two[name][1], two[f"trl {name}"][1])
    assert any(logs.get("clip_ratio/high_mean", 0) > 0 for logs in two["dapo"][1])


def main(path: str, directory: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in the fixture `fast`
    results = distributed_runs(path, directory, batch_size=2)
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(directory) / "two.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

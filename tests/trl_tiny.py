"""A tiny model, its tokenizer, prompts, fixed rollouts and a trainer, for the TRL tests.

Rollouts come from a `rollout_func` that is a pure function of the prompt and the occurrence of it,
so two trainers, or one and two processes, see the same sequences. Lengths differ a lot (1 to 12
tokens): with equal lengths the aggregations would be indistinguishable.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also keeps TRL from sending telemetry
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is announced as experimental

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer

WORDS = [f"w{i}" for i in range(29)]
VOCABULARY = ["<pad>", "<eos>", "<unk>", *WORDS]
EOS = VOCABULARY.index("<eos>")
MAX_LENGTH = 12
TRL_LOSSES = ("grpo", "dapo", "dr_grpo")


# --- a tiny model, tokenizer, data set and fixed rollouts -----------------------------------------


def save_model(
    directory: Path, model_class=Qwen2ForCausalLM, config_class=Qwen2Config, **changes
) -> str:
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
    options = dict(
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
    model_class(config_class(**{**options, **changes})).save_pretrained(directory)
    return str(directory)


@contextlib.contextmanager
def one_thread():
    """Accelerate collects garbage in every run: 0.2 s, unless what is imported by now is frozen.
    One thread: the tensors are tiny, and threads would only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


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


def train(cls, path, directory, *, vllm=False, **options):
    """A trainer after training, and the recorder of its gradients."""
    trainer, recorder = build(cls, path, directory, **options)
    if vllm:  # the rollouts' log-probs are then used as vLLM's; there is no engine to keep in step
        trainer.use_vllm = True
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    with quiet():
        trainer.train()
    return trainer, recorder


def run(cls, path, directory, **options):
    """Train; returns the gradients of every optimizer step and the log history."""
    trainer, recorder = train(cls, path, directory, **options)
    return recorder.gradients, trainer.state.log_history


_RUNS_OF_TRL: dict = {}


def run_of_trl(key, path, directory, **options):
    """``run`` of TRL's own trainer: once for all tests that compare with the run of this key."""
    if key not in _RUNS_OF_TRL:
        _RUNS_OF_TRL[key] = run(GRPOTrainer, path, directory, **options)
    return _RUNS_OF_TRL[key]


def assert_same_steps(ours, theirs, precision="float32", drift=1):
    """Of two runs: the gradients of their optimizer steps, and their logs.

    ``drift``: factor on the budget of all gradients but the first, which are taken where the first,
    rounded, led.
    """
    gradients, logs = BUDGETS[precision]
    assert len(ours[0]) == len(theirs[0]) > 0
    for i, (got, wanted) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert relative_error(got, wanted) < gradients * (drift if i else 1)
    assert_same_logs(ours[1], theirs[1], **logs)


# Of gradients, relative to the largest; of logs, which are float32 sums of up to 100 terms of order
# 1, of which the loss is a difference. In bfloat16 our log-probs are TRL's, so that nothing differs
# but what falls on the other side of a rounding.
BUDGETS = {
    "float32": (1e-5, dict(rel=1e-4, abs=2e-6)),
    "default": (2**-8, dict(rel=2**-6, abs=1e-3)),
}


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


# --- runs to compare ---

# One reason each; together every option that the loss honours. "shows": metrics that have to be
# positive somewhere in the run, or the setting would not reach what it is for.
CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean")
# How batches are cut and what is counted: what the weights of an aggregation have to follow
CUTS = {
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
    "rewards scaled over the batch": dict(scale_rewards="batch", num_iterations=2),
}
# What becomes of one token: the same under every aggregation
TOKEN_LOSSES = {
    "ratio away from 1, clipped on both sides": dict(
        num_iterations=3,
        max_steps=3,
        learning_rate=0.1,  # larger steps make the third gradient chaotic
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
    "entropy bonus": dict(entropy_coef=0.1, beta=0.1, shows=("entropy_coef",)),
    "adaptive entropy bonus": dict(
        use_adaptive_entropy=True,
        entropy_coef=0.05,
        entropy_coef_delta=0.02,
        entropy_target=2.163,  # above the entropy of two steps and below that of the third
        gradient_accumulation_steps=2,
        max_steps=4,
        shows=("entropy_coef",),
    ),
    "off-policy mask": dict(off_policy_mask_threshold=0.01, num_iterations=2, learning_rate=0.5),
}
SETTINGS = {**CUTS, **TOKEN_LOSSES}
# None: what TRL does where nothing is said, float32 weights under bfloat16 autocast
PRECISIONS = {"float32": dict(bf16=False), "default": dict(bf16=None)}

OFF_POLICY = dict(num_iterations=2, learning_rate=0.5, epsilon=0.05, gradient_accumulation_steps=2)
KL = dict(beta=0.3, perturb=0.1)
VLLM = dict(rollouts=lambda p, t: fixed_rollouts(p, t, with_logprobs=True), vllm=True)
# TRL's token losses and ratios beside the clipped one per token: TRL's loss_type, ours, options of
# both, and what has to be positive somewhere.
SEQUENCE = dict(importance_sampling_level="sequence")
GRPO, LUSPO = dict(aggregation="grpo"), dict(aggregation="luspo")
CISPO = dict(aggregation="dapo", surrogate="cispo", epsilon_high=1.02)
VESPO = dict(aggregation="dapo", surrogate="vespo")
SAPO = dict(aggregation="grpo", surrogate="sapo")
ALL = dict(num_iterations=2, learning_rate=0.5, gradient_accumulation_steps=2)
VARIANTS = {
    "sequence": ("grpo", GRPO, {**OFF_POLICY, **SEQUENCE}, CLIPPED),
    "sequence, two-sided clip, KL": (
        "dapo",
        dict(aggregation="dapo"),
        {**OFF_POLICY, **SEQUENCE, **KL, "delta": 1.2},
        ("kl",),
    ),
    "sequence, KL without correction": (
        "grpo",
        GRPO,
        {**OFF_POLICY, **SEQUENCE, **KL, "use_bias_correction_kl": False},
        ("kl",),
    ),
    "sequence, masks": (
        "grpo",
        GRPO,
        {**OFF_POLICY, **SEQUENCE, **VLLM, "off_policy_mask_threshold": 0.5}
        | dict(top_entropy_quantile=0.6, vllm_importance_sampling_mode="token_truncate"),
        (),
    ),
    "sequence, truncated completions masked": (
        "grpo",
        GRPO,
        {**OFF_POLICY, **SEQUENCE, "mask_truncated_completions": True, "num_generations": 8},
        ("completions/clipped_ratio",),
    ),
    "luspo": ("luspo", LUSPO, {**OFF_POLICY, **SEQUENCE}, CLIPPED),
    "luspo per token, truncated completions masked": (
        "luspo",
        LUSPO,
        {**OFF_POLICY, "mask_truncated_completions": True, "num_generations": 8},
        ("completions/clipped_ratio",),
    ),
    "cispo": ("cispo", CISPO, ALL, ("cispo_clip_ratio",)),
    "cispo, KL, vLLM": (
        "cispo",
        CISPO,
        {**ALL, **KL, **VLLM, "vllm_importance_sampling_mode": "token_truncate"},
        ("kl",),
    ),
    "cispo, sequence": ("cispo", CISPO, {**ALL, **SEQUENCE}, ("cispo_clip_ratio",)),
    "sapo": ("sapo", SAPO, {**ALL, "sapo_temperature_neg": 1.3}, ()),
    "sapo, KL, masks": (
        "sapo",
        SAPO,
        {**ALL, **KL, "top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.01},
        ("kl",),
    ),
    "sapo, sequence": ("sapo", SAPO, {**ALL, **SEQUENCE, "sapo_temperature_pos": 0.9}, ()),
}
VARIANTS |= {
    "vespo, KL": (
        "vespo", VESPO, {**ALL, **KL, "vespo_k_neg": 2.5, "use_bias_correction_kl": False},
        ("kl", "vespo/phi_seq_mean"),
    ),
    "vespo, vLLM": (
        "vespo", VESPO, {**ALL, **VLLM, "vllm_importance_sampling_mode": "token_truncate"},
        ("vespo/phi_seq_mean",),
    ),
}  # fmt: skip
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def assert_same_logs(ours, theirs, *, rel=1e-4, abs=2e-6):
    assert len(ours) == len(theirs)
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.keys() == wanted.keys()
        for name in wanted.keys() - TIMES:
            same = pytest.approx(wanted[name], rel=rel, abs=abs, nan_ok=True)
            assert got[name] == same, name

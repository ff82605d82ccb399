"""Training steps of unsloth's own GRPO trainer with the mixin, against the reference in float64.

    PYTHONPATH=.venv-trainers python tests/unsloth_training.py

A program of its own, since unsloth patches transformers, TRL and torch as a whole and asks for
another TRL than the adapter for TRL. `UNSLOTH_ALLOW_CPU` is unsloth's switch for its own tests; its
trainer is built by the function that it calls itself on a GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.update(
    UNSLOTH_ALLOW_CPU="1",
    UNSLOTH_DISABLE_STATISTICS="1",
    UNSLOTH_COMPILE_DISABLE="1",
    TORCHDYNAMO_DISABLE="1",
    HF_HUB_OFFLINE="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)
os.chdir(tempfile.mkdtemp())  # unsloth writes the trainer that it makes into the current folder
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

# ruff: noqa: E402
import unsloth  # before trl

unsloth.models.rl._patch_trl_rl_trainers_impl("grpo_trainer")

import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

# `trl_tiny` names the adapter for TRL, which does not take this TRL, and is not used here.
other = ModuleType("dl_norm.integrations.trl")
other.DeltaLGRPOConfig = other.DeltaLGRPOTrainer = None  # pyright: ignore
sys.modules[other.__name__] = other

import trl_tiny as tiny

import dl_norm
from dl_norm.integrations.unsloth import KEY, DeltaLWeights

ALPHA = 0.75


class Trainer(DeltaLWeights, GRPOTrainer):
    alpha = ALPHA

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


def train(steps: int, accumulation: int, **options: Any) -> None:
    """The mean gradient of a generation batch's steps is that of the whole batch in one piece."""
    path = tiny.save_model(Path("model"))
    model = AutoModelForCausalLM.from_pretrained(path)
    # What unsloth's loader puts on a model.
    model.for_training = lambda use_gradient_checkpointing=False: model.train()
    model.for_inference = lambda: model.eval()
    recorder = tiny.Recorder()
    args = GRPOConfig(
        output_dir="out", use_cpu=True, bf16=False, fp16=False, report_to="none",
        save_strategy="no", gradient_checkpointing=False, optim="adamw_torch", disable_tqdm=True,
        per_device_train_batch_size=4, num_generations=4, max_completion_length=tiny.MAX_LENGTH,
        steps_per_generation=steps * accumulation, gradient_accumulation_steps=accumulation,
        max_steps=steps, learning_rate=0.0, max_grad_norm=0.0, beta=0.0, **options,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        reward_funcs=tiny.reward,
        args=args,
        train_dataset=tiny.prompts(8),
        processing_class=tiny.PreTrainedTokenizerFast.from_pretrained(path),
        rollout_func=tiny.fixed_rollouts,
        callbacks=[recorder],
    )
    trainer._autocast_enabled, trainer._autocast_dtype = False, None  # unsloth's float32 training
    trainer.train()
    assert len(recorder.gradients) == steps

    batch = trainer.batch
    prompts, completions = batch["prompt_ids"], batch["completion_ids"]
    mask = batch["completion_mask"]
    weights = dl_norm.sequence_weights(mask.sum(1), alpha=ALPHA, max_length=tiny.MAX_LENGTH)
    assert torch.equal(batch[KEY], weights)
    model = model.double().eval()
    model.zero_grad()
    logits = model(
        input_ids=torch.cat([prompts, completions], 1),
        attention_mask=torch.cat([batch["prompt_mask"], (completions != 0).long()], 1),
    ).logits[:, prompts.shape[1] - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    loss = dl_norm.reference.policy_loss(log_probs, None, batch["advantages"], mask, weights)
    loss.backward()
    for name, parameter in model.named_parameters():
        mean = sum(gradients[name].double() for gradients in recorder.gradients) / steps
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        difference = (mean - parameter.grad).abs().max() / scale
        assert difference < 1e-5, (name, difference.item())
    print(f"{options}, {steps} step(s) of {accumulation}: the gradient of the whole batch")


if __name__ == "__main__":
    train(1, 2, loss_type="dapo")
    train(2, 1, loss_type="dr_grpo")

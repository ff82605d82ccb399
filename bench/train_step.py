"""One training step of TRL's GRPO trainer, end to end: tokens per second and peak memory.

python -m bench.train_step                    Qwen2.5-0.5B's shape on a GPU, a small model on a CPU
python -m bench.train_step --shape 1.5b       another shape; --tiny tries the command

A step is loss, backward and AdamW on one rollout batch that is there already: no generation. The
models are randomly initialised alike, and before anything is timed the loss and the gradient norm
of every contestant must agree.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dl_norm
from bench import record, timing
from bench.cases import draw_lengths
from bench.roofline import matmul_dtype
from bench.timing import Clock, Stats

OURS = "dl_norm fused"
# Of the loss and of the gradient's norm, relative. The contestants round bfloat16 logits in
# different places; float32 differs by the order of long sums.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model and the rollout batch it is trained on; half of the response is filled."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    sequences: int
    prompt: int
    response: int
    fill: float = 0.5


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2, 151_936, 8, 128, 1024),  # Qwen2.5-0.5B
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, 8, 128, 1024),  # Qwen2.5-1.5B
    "cpu": Shape(128, 256, 2, 4, 2, 16_384, 8, 16, 112),
    "tiny": Shape(16, 32, 2, 2, 1, 64, 4, 4, 12),
}


def make_model(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def make_batch(shape: Shape, device: torch.device) -> dict[str, Any]:
    """What TRL hands to its loss, on-policy to within the old policy's noise."""
    generator = torch.Generator(device).manual_seed(0)
    rows = shape.sequences
    lengths = draw_lengths(rows, shape.response, shape.fill).to(device)
    mask = (torch.arange(shape.response, device=device) < lengths[:, None]).long()

    def tokens(columns: int) -> Tensor:
        size = (rows, columns)
        return torch.randint(2, shape.vocabulary, size, generator=generator, device=device)

    return {
        "prompt_ids": tokens(shape.prompt),
        "prompt_mask": torch.ones(rows, shape.prompt, dtype=torch.long, device=device),
        "completion_ids": tokens(shape.response) * mask,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator, device=device),
        "old_per_token_logps": None,
        "num_items_in_batch": mask.sum(),
    }


def no_reward(completions: list, **_) -> list[float]:
    return [0.0] * len(completions)


def make_trainer(
    kind: str, model: Any, shape: Shape, folder: str, reward: Callable = no_reward, **settings
) -> Any:
    """kind: "plain" (full logits), "TRL", "dl_norm" or "dl_norm fused". settings: of GRPOConfig."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer

    class FullLogitsTrainer(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask,
                                               logits_to_keep, *_, **__):  # fmt: skip
            outputs = model(
                input_ids=input_ids, attention_mask=attention_mask,
                logits_to_keep=logits_to_keep + 1, use_cache=False,
            )  # fmt: skip
            log_softmax = outputs.logits[:, :-1].float().log_softmax(-1)
            ids = input_ids[:, -logits_to_keep:, None]
            with torch.no_grad():
                entropies = -(log_softmax.exp() * log_softmax).sum(-1)
            return log_softmax.gather(-1, ids)[..., 0], entropies, None

    common = dict(
        output_dir=folder,
        max_completion_length=shape.response,
        per_device_train_batch_size=shape.sequences,
        num_generations=shape.sequences,
        bf16=False,  # the model itself is bfloat16 on a GPU
        use_cpu=model.device.type == "cpu",
        report_to=[],
        beta=0.0,
        **settings,
    )
    if kind in ("plain", "TRL"):
        trainer_class = FullLogitsTrainer if kind == "plain" else GRPOTrainer
        args = GRPOConfig(loss_type="dr_grpo", **common)
    else:
        trainer_class = DeltaLGRPOTrainer
        args = DeltaLGRPOConfig(aggregation="dr_grpo", fused_lm_head=kind == OURS, **common)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    trainer = trainer_class(
        model,
        reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * shape.sequences}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ),
    )
    return trainer


def make_step(trainer: Any, batch: dict[str, Any], learning_rate: float) -> Callable[[], Tensor]:
    """loss, backward, AdamW. Returns the loss; the gradients stay until the next call."""
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    batch = dict(batch)
    if hasattr(trainer.args, "aggregation"):  # what its own generation step would have added
        lengths = batch["completion_mask"].sum(1)
        length = trainer.max_completion_length
        batch["sequence_weights"] = dl_norm.sequence_weights(lengths, "dr_grpo", max_length=length)
        batch["loss_tokens"] = int(lengths.sum())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = trainer._compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        trainer._metrics["train"].clear()
        return loss.detach()

    return step


def gradient_norm(model: Any) -> float:
    return torch.nn.utils.get_total_norm(
        [p.grad.float() for p in model.parameters() if p.grad is not None]
    ).item()


KINDS = {
    "plain": "the model's full logits, float32 log_softmax, TRL's loss",
    "TRL": "GRPOTrainer of TRL 1.16 with its fused head",
    "dl_norm": "DeltaLGRPOTrainer behind TRL's head",
    OURS: "DeltaLGRPOTrainer with fused_lm_head=True",
}


@dataclass
class StepRow:
    kind: str
    loss: float
    gradient_norm: float
    time: Stats
    tokens_per_s: float
    peak_bytes: int
    ratio_to_ours: float = 1.0


def run(shape: Shape, device: torch.device, rounds: int) -> list[StepRow]:
    batch = make_batch(shape, device)
    tokens = int(batch["completion_mask"].sum()) + batch["prompt_mask"].numel()
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            kind: make_trainer(
                kind, make_model(shape, matmul_dtype(device)).to(device), shape, folder
            )
            for kind in KINDS
        }
    # No learning: every round is then the same work on the same model.
    steps = {kind: make_step(trainer, batch, 0.0) for kind, trainer in trainers.items()}
    values = {
        kind: (step().item(), gradient_norm(trainers[kind].model)) for kind, step in steps.items()
    }
    tolerance = TOLERANCE[matmul_dtype(device)]
    for kind, (loss, norm) in values.items():
        plain_loss, plain_norm = values["plain"]
        # The loss of an on-policy step is a sum of terms of both signs: held to their size.
        size = float(batch["advantages"].abs().mean())
        if not (abs(loss - plain_loss) <= tolerance * size
                and abs(norm / plain_norm - 1) <= tolerance):  # fmt: skip
            raise SystemExit(f"{kind}: loss {loss}, gradient norm {norm}; plain: {values['plain']}")
    times = timing.compare(
        {kind: [lambda step=step: step] for kind, step in steps.items()}, clock, rounds=rounds
    )
    return [
        StepRow(
            kind,
            *values[kind],
            time=times[kind],
            tokens_per_s=tokens / times[kind].median,
            peak_bytes=timing.peak_memory(steps[kind], device),
            ratio_to_ours=times[kind].median / times[OURS].median,
        )
        for kind in KINDS
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, help="default: 0.5b on a GPU, cpu on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the command")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = options.shape or ("0.5b" if device.type == "cuda" else "cpu")
    if options.tiny:
        name = "tiny"
    rows = run(SHAPES[name], device, options.rounds)
    report = {
        "suite": "train_step",
        **record.origin(device, record.command_line("bench.train_step", arguments)),
        "shape": {"name": name, **asdict(SHAPES[name])},
        "notes": KINDS,
        "rows": [asdict(row) for row in rows],
    }
    path = record.save(report, f"train_step-{name}", options.results)
    table = Table(
        "", "ms", "p20-p80", "x ours", "tokens/s", "peak MB", title=f"{report['device']}: {name}"
    )
    for row in rows:
        table.add_row(
            row.kind,
            f"{row.time.median * 1e3:.1f}",
            f"{row.time.p20 * 1e3:.1f}-{row.time.p80 * 1e3:.1f}",
            f"{row.ratio_to_ours:.2f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.peak_bytes / 1e6:,.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"written: {path}")
    return path


if __name__ == "__main__":
    main()

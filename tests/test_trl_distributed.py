"""TRL's trainer on two processes, as `accelerate launch` starts them: DDP and FSDP2, on the CPU.

Run as a script, this file is one of the two processes. It saves what the tests compare with one
process: every rollout is a function of its prompt, so both see the same sequences.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'dl-norm[trl]'")
sys.path.append(str(Path(__file__).parent))

import peft
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer
from trl_tiny import (
    TRL_LOSSES,
    assert_same_logs,
    build,
    fixed_rollouts,
    one_thread,
    prompts,
    quiet,
    relative_error,
    save_model,
    train,
)

from dl_norm.integrations.trl import DeltaLGRPOTrainer

OPTIONS = dict(
    num_iterations=2,
    learning_rate=0.1,
    epsilon=0.05,
    max_steps=3,
    rollouts=lambda p, t: fixed_rollouts(p, t, with_env_mask=True),
)
TRAINERS = {
    "delta_l": (DeltaLGRPOTrainer, dict(alpha=0.75)),
    "delta_l, fused": (DeltaLGRPOTrainer, dict(alpha=0.75, fused_lm_head=True)),
    **{name: (DeltaLGRPOTrainer, dict(aggregation=name)) for name in TRL_LOSSES},
    **{f"trl {name}": (GRPOTrainer, dict(loss_type=name)) for name in TRL_LOSSES},
}
# How accelerate's FSDP2 may split the model, and what it computes in.
SHARDED = {
    "untied": dict(),
    "tied": dict(),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "head alone": dict(),
    "two passes": dict(off_policy_mask_threshold=0.01),
    "LoRA": dict(
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ),
    "bf16": dict(),
    "bf16, not fused": dict(fused_lm_head=False),
}


def model_of(name: str) -> str:
    return "tied" if name == "tied" else "untied"


def trained(path, directory, **options):
    """Log history and final parameters of every trainer."""
    results = {}
    for name, (cls, changes) in TRAINERS.items():
        trainer, recorder = train(cls, path, directory, **OPTIONS, **changes, **options)
        parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        results[name] = recorder.gradients, trainer.state.log_history, parameters
    return results


def accumulated(trainer, model, processes: int):
    """Loss and gradients of one window of two micro-batches, off-policy."""
    trainer.current_gradient_accumulation_steps = 2
    rank = trainer.accelerator.process_index
    mine = 16 // processes
    rows = [prompts()[i // 4] for i in range(16)][rank * mine : (rank + 1) * mine]
    model.train()
    total = 0.0
    for _ in range(2):
        inputs = trainer._prepare_inputs(rows)
        if trainer._step == 0:  # move the old policy, in every micro-batch of the generation
            for batch in trainer._buffered_inputs:
                batch["old_per_token_logps"] += 0.3 * batch["completion_ids"].sin()
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        total += loss.detach()
        trainer._step += 1
    gradients = {
        n: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return trainer.accelerator.gather(total).mean(), gradients


def window_options(name: str, batch_size: int, fused: bool):
    return dict(
        alpha=0.75,
        num_iterations=2,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=batch_size,
        rollouts=lambda p, t: fixed_rollouts(p, t, with_env_mask=True),
        **{"fused_lm_head": fused, **SHARDED[name]},
    )


def sharded(directory: Path):
    from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    results = {}
    for name in SHARDED:
        path = directory / model_of(name)
        trainer, _ = build(DeltaLGRPOTrainer, path, directory, **window_options(name, 4, True))
        if name == "head alone":
            fully_shard(trainer.model.lm_head)
            fully_shard(trainer.model)
        else:
            low = torch.bfloat16 if name.startswith("bf16") else None
            policy = MixedPrecisionPolicy(low, reduce_dtype=torch.float32, output_dtype=low)
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
                mixed_precision_policy=policy,
            )
            accelerator = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin),
                mixed_precision="no",
                is_main_process=True,
            )
            fsdp2_prepare_model(accelerator, trainer.model)
        assert isinstance(trainer.model.get_output_embeddings().weight, DTensor)
        results[name] = accumulated(trainer, trainer.model, 2)
    return results


def main(directory: Path) -> None:
    with one_thread(), quiet():
        results = trained(directory / "untied", directory), sharded(directory)
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        torch.save(results, directory / "two.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("untied", "tied"):
        save_model(
            directory / name, Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=name == "tied"
        )
    return directory


@pytest.fixture(scope="module")
def two(directory):
    """What two processes saved."""
    # --cpu would start its processes with mpirun; --multi_gpu does with torchrun, and it is the
    # trainers that choose the CPU, with use_cpu=True.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, __file__, str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return torch.load(directory / "two.pt")


@pytest.fixture(scope="module")
def one(directory):
    with one_thread():
        return trained(directory / "untied", directory, gradient_accumulation_steps=2)


def test_training_equals_one_process(one, two):
    """Three steps: two processes, and one with twice the accumulation."""
    for name, (gradients, _, parameters) in one.items():
        their_gradients, _, their_parameters = two[0][name]
        assert len(gradients) == 3
        assert relative_error(their_gradients[0], gradients[0]) < 1e-5, name
        # The second and third step are taken where the first, rounded, one led.
        assert relative_error(their_parameters, parameters) < 1e-5, name


def test_logs_on_two_processes_equal_trl(two):
    for name in TRL_LOSSES:
        assert_same_logs(two[0][name][1], two[0][f"trl {name}"][1])
    assert any(logs.get("clip_ratio/high_mean", 0) > 0 for logs in two[0]["dapo"][1])


def one_window(directory, name):
    """The loss over logits, in float32, on one process."""
    options = window_options(name, 8, False)
    trainer, _ = build(DeltaLGRPOTrainer, directory / model_of(name), directory, **options)
    with one_thread():
        return accumulated(trainer, trainer.model, 1)


@pytest.mark.parametrize("name", [name for name in SHARDED if not name.startswith("bf16")])
def test_sharded_head(directory, two, name):
    loss, gradients = one_window(directory, name)
    their_loss, their_gradients = two[1][name]
    assert relative_error(their_gradients, gradients) < 1e-5
    # A difference of sums of up to 16 terms of order 1/16.
    assert their_loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)


def test_sharded_head_in_bfloat16(directory, two):
    """As near to float32 as the loss over logits is, in the same mixed precision."""
    loss, gradients = one_window(directory, "bf16")
    (fused_loss, fused), (plain_loss, plain) = two[1]["bf16"], two[1]["bf16, not fused"]
    error = relative_error(plain, gradients)
    assert error < 0.3
    assert relative_error(fused, gradients) < 1.25 * error + 0.01
    assert abs(fused_loss - loss) < 1.25 * abs(plain_loss - loss) + 0.01 * abs(loss)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""verl 0.9.1's FSDP2 engine trains with the plugin: its gradients are the whole batch's.

A rollout of eight responses goes through verl as in a run: its estimator registry, its mini-batch
iterator, its padding removal, `FSDPEngineWithLMHead.train_batch` with `ppo_loss`, on one process
and on two. The truth is the formula of the loss, written out in float64 over the uncut batch and
the same model without verl.

The engine needs verl and a CPU platform, which verl lacks and this file supplies; it is run by the
Python that has verl, once per number of processes.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
HERE = importlib.util.find_spec("verl") is not None
VERL_PYTHON = Path(sys.executable) if HERE else ROOT / ".venv-verl" / "bin" / "python"

ALPHA, MAX_LENGTH = 0.75, 3072  # as in the configuration lines
EPS_LOW, EPS_HIGH, DUAL_CLIP = 0.2, 0.3, 3.0
# The engine computes in fp32. Relative to the largest gradient of the model.
TOLERANCE = 1e-6
PROMPTS = (2, 4, 3, 2, 3, 4, 2, 3)
RESPONSES = (1, 12, 5, 3, 9, 7, 2, 12)
REJECTED = 5  # a response of which no token counts
ROWS = len(RESPONSES)

# name -> (loss, mini-batches, rows per micro-batch, or None for verl's token budget)
RUNS: dict[str, tuple[str, int, int | None]] = {
    "one micro-batch": ("delta_l", 1, 4),
    "two micro-batches": ("delta_l", 1, 2),
    "two mini-batches": ("delta_l", 2, 1),
    "token budget": ("delta_l", 1, None),
    "verl's own loss": ("vanilla", 1, 2),
    "correction in the kernel": ("corrected", 1, 2),
}


def config_lines() -> list[str]:
    """The lines that a user writes, as the module's docstring gives them."""
    source = (ROOT / "dl_norm" / "integrations" / "verl.py").read_text()
    lines = re.findall(r"^ {4}(\+?[a-z_.]+=\S+)$", ast.get_docstring(ast.parse(source)) or "", re.M)
    assert len(lines) == 5, lines
    return lines


def import_verl() -> None:
    """verl with a platform for the CPU, and with this package as a plugin."""
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "dl_norm.integrations.verl"
    # verl patches the value heads of TRL, which its newer versions no longer have.
    sys.modules["trl"] = None  # pyright: ignore[reportArgumentType]
    from verl.plugin.platform import platform_manager
    from verl.plugin.platform.platform_base import PlatformBase

    class CPU(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = torch.cpu

        def current_device(self) -> torch.device:
            return torch.device("cpu")

    CPU.__abstractmethods__ = frozenset()  # the rest is never called
    platform_manager.set_platform(CPU())


def make_model(folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_rollout() -> dict[str, Tensor]:
    """Prompts padded on the left, responses on the right, as verl's rollout gives them."""
    random = torch.Generator().manual_seed(7)
    prompts, responses = torch.tensor(PROMPTS)[:, None], torch.tensor(RESPONSES)[:, None]
    width, length = max(PROMPTS), max(RESPONSES)
    attended = torch.cat(
        [torch.arange(width) >= width - prompts, torch.arange(length) < responses], dim=1
    )
    mask = attended[:, width:].clone()
    mask[1, 3:5] = mask[4, 0] = False  # holes, as tools leave them
    mask[REJECTED] = False
    tokens = torch.randint(1, 32, attended.shape, generator=random) * attended
    shape = mask.shape
    return {
        "input_ids": tokens,
        "prompts": tokens[:, :width],
        "responses": tokens[:, width:],
        "attention_mask": attended.long(),
        "position_ids": (attended.cumsum(1) - 1).clamp(min=0),
        "response_mask": mask.long(),
        "rewards": torch.tensor([1.0, 0.0, 0.75, 0.0, 0.0, 1.0, 0.25, 0.5]),
        "noise": 0.5 * torch.randn(shape, generator=random),
        "rollout_is_weights": 0.5 + torch.rand(shape, generator=random),
    }


def truth(rollout: dict[str, Tensor], folder: Path) -> tuple[Tensor, float, dict[str, Tensor]]:
    """(old log-probs, loss, gradients) of the whole batch, by the formulas, in float64."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    rows = []
    for ids, attended, count in zip(
        rollout["input_ids"], rollout["attention_mask"], RESPONSES, strict=True
    ):
        ids = ids[attended.bool()]
        predicted = model(ids[None]).logits[0, -count - 1 : -1].log_softmax(-1)
        rows.append(predicted.gather(-1, ids[-count:, None])[:, 0])
    log_probs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    old = (log_probs.detach() + rollout["noise"]).float()

    mask, rewards = rollout["response_mask"].double(), rollout["rewards"].double()
    groups = rewards.view(2, -1)  # two prompts of four samples
    spread = groups.std(1, keepdim=True) + 1e-6
    advantages = ((groups - groups.mean(1, keepdim=True)) / spread).view(-1, 1)
    lengths = mask.sum(1)
    powers = torch.where(lengths > 0, lengths.clamp(min=1) ** -ALPHA, 0.0)
    x = powers / powers.sum() / MAX_LENGTH
    assert x.count_nonzero() == ROWS - 1

    ratio = (log_probs - old).exp()
    token_loss = -torch.minimum(
        ratio * advantages, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantages
    )
    capped = torch.minimum(token_loss, -DUAL_CLIP * advantages)
    token_loss = torch.where(advantages < 0, capped, token_loss)
    loss = (x[:, None] * rollout["rollout_is_weights"] * token_loss * mask).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return old, loss.item(), gradients


def make_engine(config: Any, actor: Any) -> Any:
    """The engine as verl's worker builds it."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engine = FSDPEngineWithLMHead(
        model_config=omega_conf_to_dataclass(config.actor_rollout_ref.model),
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    engine.initialize()
    return engine


def compose(folder: Path, loss_mode: str) -> Any:
    from hydra import compose, initialize_config_module

    actor, model = "actor_rollout_ref.actor", "actor_rollout_ref.model"
    section = f"+{actor}.policy_loss.rollout_correction"
    more = [f"{section}.rollout_is=token", f"{section}.rollout_is_threshold=2.0"]
    corrected = loss_mode == "corrected"
    lines = [
        *more * corrected,
        f"{actor}.policy_loss.loss_mode={'delta_l' if corrected else loss_mode}",
        f"{actor}.clip_ratio_low={EPS_LOW}",
        f"{actor}.clip_ratio_high={EPS_HIGH}",
        f"{actor}.clip_ratio_c={DUAL_CLIP}",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_torch_compile=false",
        f"{actor}.ppo_micro_batch_size_per_gpu=1",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"{actor}.optim.lr=0",  # the gradients are compared, after every step
        f"{actor}.optim.clip_grad=1e9",
        f"{model}.path={folder}",
        f"+{model}.load_tokenizer=false",
        f"{model}.enable_gradient_checkpointing=false",
        f"{model}.use_remove_padding=false",  # needs flash attention
        f"+{model}.override_config.attn_implementation=eager",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*config_lines(), *lines])


def train(
    engine: Any,
    actor: Any,
    algorithm: Any,
    rollout: dict[str, Tensor],
    old: Tensor,
    mini_batches: int,
    micro_batch: int | None,
    corrected: bool,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, averaged over the mini-batches of the rollout, of all processes."""
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss  # the plugin's
    from verl.workers.utils.padding import left_right_2_no_padding

    # On the driver: the advantages of the whole rollout, then a part for every process.
    rewards = torch.zeros(rollout["responses"].shape)
    rewards[:, 0] = rollout["rewards"]
    advantages, _ = get_adv_estimator_fn(algorithm.adv_estimator)(
        token_level_rewards=rewards,
        response_mask=rollout["response_mask"],
        index=np.array(["a"] * (ROWS // 2) + ["b"] * (ROWS // 2), dtype=object),
        config=algorithm,
    )
    unsent = ("rewards", "noise")
    tensors = {name: tensor for name, tensor in rollout.items() if name not in unsent}
    if corrected:  # the same weights, to be found in the kernel
        tensors["rollout_log_probs"] = old - tensors.pop("rollout_is_weights").log()
    batch = DataProto.from_dict({**tensors, "old_log_probs": old, "advantages": advantages})
    part = batch.chunk(dist.get_world_size())[dist.get_rank()].to_tensordict()
    part = left_right_2_no_padding(part)

    # In the worker: mini-batches, each cut into micro-batches by the engine.
    rows = ROWS // mini_batches
    losses, gradients = [], {}
    for data in tu.make_iterator(part, rows // dist.get_world_size(), epochs=1, seed=1):
        tu.assign_non_tensor(
            data,
            global_batch_size=rows,
            temperature=1.0,
            use_dynamic_bsz=micro_batch is None,
            micro_batch_size_per_gpu=micro_batch,
            max_token_len_per_gpu=24,
            use_remove_padding=False,
            use_fused_kernels=False,
            calculate_entropy=False,
        )
        with engine.train_mode(zero_grad_on_exit=False):
            output = engine.train_batch(data, partial(ppo_loss, actor))
        metric = output["metrics"]["actor/pg_loss"]
        losses.append(sum(metric.values) if hasattr(metric, "values") else sum(metric))
        for name, parameter in engine.module.named_parameters():
            gradient = parameter.grad.full_tensor().clone() / mini_batches
            gradients[name] = gradients.get(name, 0) + gradient
    loss = torch.tensor(sum(losses) / mini_batches)
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size(), gradients


def check(name: str, engines: dict[str, Any], folder: Path) -> None:
    loss_mode, mini_batches, micro_batch = RUNS[name]
    rollout = make_rollout()
    old, true_loss, true_gradients = truth(rollout, folder)
    config, actor, engine = engines[loss_mode]
    loss, gradients = train(
        engine, actor, config.algorithm, rollout, old, mini_batches, micro_batch,
        loss_mode == "corrected",
    )  # fmt: skip
    assert gradients.keys() == true_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in true_gradients.values())
    worst = max(
        (gradients[name].double() - gradient).abs().max().item()
        for name, gradient in true_gradients.items()
    )
    assert scale > 0
    assert worst <= TOLERANCE * scale, f"{worst / scale:.1e} of the largest gradient"
    assert abs(loss - true_loss) <= TOLERANCE * abs(true_loss), (loss, true_loss)


def main(rank: int, processes: int, folder: Path) -> dict[str, str | None]:
    """One outcome per run: None, or the traceback of what went wrong."""
    torch.set_num_threads(1)
    import_verl()
    from verl.utils.config import omega_conf_to_dataclass

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    if rank == 0:
        make_model(folder)
    dist.barrier()
    engines = {}
    for loss_mode in ("delta_l", "vanilla", "corrected"):
        config = compose(folder, loss_mode)
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        engines[loss_mode] = config, actor, make_engine(config, actor)
    outcomes: dict[str, str | None] = {}
    for name in RUNS:
        try:
            check(name, engines, folder)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    dist.destroy_process_group()
    return outcomes


@pytest.fixture(scope="module", params=[1, 2], ids="processes={}".format)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    if not VERL_PYTHON.exists():
        pytest.skip("verl is not installed and .venv-verl does not exist: bash ci/verl_env.sh")
    folder = tmp_path_factory.mktemp("engine")
    processes = [
        subprocess.Popen(
            [VERL_PYTHON, "-W", "ignore", __file__, str(rank), str(request.param), folder],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]
    try:
        streams = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, streams, strict=True):
        assert process.returncode == 0, f"{out}\n{err}"
    return json.loads(streams[0][0].splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_verl_engine(name: str, outcomes: dict[str, str | None]) -> None:
    problem = outcomes[name]
    assert problem is None, problem


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))

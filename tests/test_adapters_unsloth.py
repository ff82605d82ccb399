"""unsloth: its trainer's compute_loss and its GRPO loss take the weights that the mixin puts there.

Once as the functions that unsloth writes into its trainer, with only the forward pass stood in for,
over steps, micro-batches and processes; and once as that whole trainer, training.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

sys.path.append(str(Path(__file__).parent))

from adapter_stand_ins import UnslothTrainer
from adapter_tools import (
    ALPHA,
    CLIP,
    LENGTHS,
    ROOT,
    TOLERANCE,
    M,
    Rollout,
    T,
    check_hook,
    fake,
    lift,
    make_rollout,
    source,
)
from torch import Tensor

import dl_norm
from dl_norm.integrations import unsloth

PATCHES, ZOO = "unsloth/models/rl_replacements.py", "unsloth_zoo/rl_replacements.py"


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


class Trainer(unsloth.DeltaLWeights, UnslothTrainer):
    alpha = ALPHA


def test_evaluation_is_left_alone(rollout: Rollout) -> None:
    trainer = Trainer(rollout.mask, training=False)
    assert unsloth.KEY not in trainer._generate_and_score_completions(None)


def test_weights_of_unsloth_s_own_raise(rollout: Rollout) -> None:
    trainer = Trainer(rollout.mask)
    base = UnslothTrainer._generate_and_score_completions
    output = base(trainer, None) | {unsloth.KEY: torch.ones(6)}
    UnslothTrainer._generate_and_score_completions = lambda self, inputs: output
    try:
        with pytest.raises(ValueError, match="UNSLOTH_GRPO_LOSS_AGGREGATION"):
            trainer._generate_and_score_completions(None)
    finally:
        UnslothTrainer._generate_and_score_completions = base


def test_a_trainer_that_does_not_read_the_weights_raises(rollout: Rollout) -> None:
    """TRL's own trainer, which unsloth has not patched, would pass over them without a word."""

    class Own(UnslothTrainer):
        def compute_loss(self, model, inputs):
            return inputs.get("advantages", None)

    trainer = type("Mixed", (unsloth.DeltaLWeights, Own), {})(rollout.mask)
    with pytest.raises(ValueError, match=r"import unsloth.*before trl"):
        trainer._generate_and_score_completions(None)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The compute_loss that unsloth writes into its trainer, over unsloth_zoo's loss."""
    fake(
        monkeypatch,
        "unsloth_zoo.temporary_patches.utils",
        torch_compile_with_fallback=lambda **_: lambda function: function,
    )
    zoo = lift(
        ZOO, "grpo_compute_loss", "UnslothEfficientGRPO", math=math, torch_compile_options={}
    )
    helpers = lift(PATCHES, "_unsloth_grpo_accumulation_steps")

    def grpo_accumulated_loss(
        trainer, input_ids, logits_to_keep, completion_mask, advantages, old_logps, ref_logps,
        tool_mask=None, n_chunks=-1, attention_mask=None, **kwargs,
    ):  # fmt: skip
        """What unsloth_zoo's does between the forward pass, a look-up here, and the loss."""
        kwargs["steps_per_generation"] = trainer.args.steps_per_generation
        del kwargs["sampling_per_token_logps"]
        mask = completion_mask if tool_mask is None else completion_mask * tool_mask
        loss, *more = zoo.UnslothEfficientGRPO.apply(
            trainer.log_probs[input_ids[:, -1]], old_logps, ref_logps, None, None,
            input_ids[:, -logits_to_keep:], mask, advantages, trainer.beta, None, 1, kwargs, None,
        )  # fmt: skip
        return loss, *more, mask

    space: dict[str, Any] = {
        "torch": torch,
        "inspect": inspect,
        "detect_logit_transforms": lambda config: defaultdict(float),
        "_unsloth_get_model_config": lambda model: None,
        "_unsloth_grpo_vision_inputs": lambda inputs: {},
        "grpo_accumulated_loss": grpo_accumulated_loss,
        "grpo_compute_loss": zoo.grpo_compute_loss,
        "nanmin": torch.min,
        "nanmax": torch.max,
        **vars(helpers),
    }
    for name in ("grpo_trainer_compute_loss", "grpo_trainer__get_per_token_logps_and_entropies"):
        method = name.removeprefix("grpo_trainer_")
        versions = {"trl_version": Version("1.15.0"), "Version": Version}  # the newest it takes
        text = getattr(lift(PATCHES, name, inspect=inspect, **versions), name)(method, "")
        assert text, f"{PATCHES} has moved: {name} does not patch {method}"
        exec(compile(textwrap.dedent(text), f"<{method} of unsloth>", "exec"), space)
    for name in ("_unsloth_grpo_autocast_unscored", "_unsloth_grpo_refuse_unscored_support"):
        space[name] = lambda trainer: None
    return space


@pytest.mark.parametrize(
    ("processes", "accumulation", "per_generation"), [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 1, 1)]
)
def test_step(
    rollout: Rollout,
    patched: dict[str, Any],
    processes: int,
    accumulation: int,
    per_generation: int,
) -> None:
    """The mean of a generation batch's steps, whose gradients are averaged over processes."""
    trl = importlib.util.find_spec("trl")  # not imported: that takes half a minute
    if trl is None:
        pytest.skip("trl is not installed: pip install 'dl-norm[trl]'")
    utils = lift(
        str(Path(trl.origin).with_name("trainer") / "utils.py"),
        "shuffle_sequence_dict",
        "split_tensor_dict",
    )
    torch.manual_seed(2)
    lengths = rollout.lengths
    padded = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    loss, gradient = torch.zeros(()), torch.zeros(len(LENGTHS), T)
    steps = per_generation // accumulation
    for rank, rows in enumerate(torch.arange(6).chunk(processes)):

        class Real(UnslothTrainer):
            compute_loss = patched["compute_loss"]
            _get_per_token_logps_and_entropies = patched["_get_per_token_logps_and_entropies"]

            def _generate_and_score_completions(self, inputs: Any, rows: Tensor = rows) -> Any:
                return {
                    "prompt_ids": torch.zeros(len(rows), 1, dtype=torch.long),
                    "prompt_mask": torch.ones(len(rows), 1, dtype=torch.long),
                    "completion_ids": rows[:, None].expand(-1, T).contiguous(),
                    "completion_mask": padded[rows],
                    "tool_mask": rollout.mask[rows].long(),
                    "advantages": rollout.advantages[rows],
                    "old_per_token_logps": rollout.old[rows],
                    "num_items_in_batch": lengths.sum(),
                }

        trainer = type("Trainer", (unsloth.DeltaLWeights, Real), {"alpha": ALPHA})(rollout.mask)
        check_hook(type(trainer)._generate_and_score_completions, "unsloth")
        trainer.accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=rank,
            gather=lambda tensor: lengths if tensor.ndim and tensor.dtype == torch.long else tensor,
        )
        trainer.args = SimpleNamespace(
            loss_type="dapo",
            max_completion_length=M,
            steps_per_generation=per_generation,
            temperature=1.0,
            unsloth_num_chunks=1,
            delta=3.0,
        )
        trainer.__dict__.update(
            log_probs=rollout.log_probs,
            current_gradient_accumulation_steps=accumulation,
            epsilon_low=CLIP["eps_low"],
            epsilon_high=CLIP["eps_high"],
            beta=0.0,
            loss_type="dapo",
            use_vllm=False,
            _metrics={"train": defaultdict(list)},
        )
        batch = utils.shuffle_sequence_dict(trainer._generate_and_score_completions(None))
        for micro in utils.split_tensor_dict(batch, per_generation):
            # One by one: unsloth's backward does not multiply by the gradient that comes in.
            part = trainer.compute_loss(trainer.model, micro)
            gradient += torch.autograd.grad(part, rollout.log_probs)[0] / (processes * steps)
            loss += part.detach() / (processes * steps)
    true_loss, true_gradient = rollout.true(dual_clip=None, delta=3.0)
    torch.testing.assert_close(loss, true_loss, **TOLERANCE)
    torch.testing.assert_close(gradient, true_gradient, **TOLERANCE)


def test_training() -> None:
    """unsloth's whole trainer, over the TRL that it asks for: `unsloth_training.py`."""
    source("trl")  # skips where the wheels are not
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("unsloth_training.py"))],
        env=os.environ | {"PYTHONPATH": str(ROOT / ".venv-trainers")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("the gradient of the whole batch") == 2


def test_the_weights_are_ours(rollout: Rollout) -> None:
    weights = Trainer(rollout.mask)._generate_and_score_completions(None)[unsloth.KEY]
    expected = dl_norm.sequence_weights(rollout.lengths, alpha=ALPHA, max_length=M)
    assert torch.equal(weights, expected)
    trainer = type("Shorter", (Trainer,), {"max_length": M // 2})(rollout.mask)
    assert torch.equal(trainer._generate_and_score_completions(None)[unsloth.KEY], 2 * expected)

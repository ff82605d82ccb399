"""DeltaLGRPOTrainer against TRL's own trainer, in real training steps of a tiny Qwen2."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'dl-norm[trl]'")
sys.path.append(str(Path(__file__).parent))

from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict
from trl_tiny import (
    CLIPPED,
    CUTS,
    MAX_LENGTH,
    PRECISIONS,
    SETTINGS,
    TOKEN_LOSSES,
    TRL_LOSSES,
    VARIANTS,
    assert_same_logs,
    assert_same_steps,
    build,
    fixed_rollouts,
    one_thread,
    prompts,
    quiet,
    relative_error,
    run,
    run_of_trl,
    save_model,
)

import dl_norm
from dl_norm.integrations.trl import DeltaLGRPOTrainer


@pytest.fixture(scope="module", autouse=True)
def fast():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny-qwen2"))


# --- parity with TRL in training ------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", TRL_LOSSES)
@pytest.mark.parametrize("cut", CUTS)
def test_training_equals_trl(model_path, tmp_path, cut, aggregation):
    compare(model_path, tmp_path, cut, aggregation, "float32")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setting", TOKEN_LOSSES)
def test_every_token_loss_equals_trl(model_path, tmp_path, setting, precision):
    compare(model_path, tmp_path, setting, "dapo", precision)


def compare(path, directory, setting, aggregation, precision):
    options = {**SETTINGS[setting], **PRECISIONS[precision]}
    shows = options.pop("shows", ())
    key = setting, aggregation, precision
    theirs = run_of_trl(key, path, directory, loss_type=aggregation, **options)
    ours = run(DeltaLGRPOTrainer, path, directory, aggregation=aggregation, **options)
    for name in shows:
        assert any(logs.get(name, 0) > 0 for logs in theirs[1]), f"{name} is 0 in the whole run"
    assert len(ours[0]) == options.get("max_steps", 2)
    assert_same_steps(ours, theirs, precision)


@pytest.mark.parametrize(
    ("variant", "head", "precision"),
    [(variant, head, "float32") for variant in VARIANTS for head in ("logits", "fused head")]
    + [(variant, "logits", "default") for variant in ("cispo, KL, vLLM", "sapo, KL, masks")],
)
def test_other_token_losses_equal_trl(model_path, tmp_path, variant, head, precision):
    loss_type, ours_only, options, shows = VARIANTS[variant]
    theirs_only = {k: v for k, v in ours_only.items() if k not in ("aggregation", "surrogate")}
    options = {**options, **PRECISIONS[precision]}
    theirs = run_of_trl(
        (variant, precision), model_path, tmp_path, loss_type=loss_type, **theirs_only, **options
    )
    fused = dict(fused_lm_head=head == "fused head")
    ours = run(DeltaLGRPOTrainer, model_path, tmp_path, **fused, **ours_only, **options)
    for name in shows:
        assert any(logs.get(name, 0) > 0 for logs in theirs[1]), f"{name} is 0 in the whole run"
    assert len(ours[0]) == 2
    assert_same_steps(ours, theirs, precision, drift=10)


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
    path = save_model(
        tmp_path / "model",
        MixtralForCausalLM,
        MixtralConfig,
        num_local_experts=3,
        router_aux_loss_coef=0.1,
    )
    options = dict(gradient_accumulation_steps=2)
    theirs = run(GRPOTrainer, path, tmp_path, loss_type="dapo", **options)
    ours = run(DeltaLGRPOTrainer, path, tmp_path, aggregation="dapo", **options)
    assert theirs[1][0]["aux_loss"] > 0
    assert_same_steps(ours, theirs)


def test_peft_adapters(model_path, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = dict(
        peft_config=peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
        beta=0.1,  # the reference is the model with its adapters off
        gradient_accumulation_steps=2,
    )
    theirs = run(GRPOTrainer, model_path, tmp_path, loss_type="dr_grpo", **options)
    ours = run(DeltaLGRPOTrainer, model_path, tmp_path, aggregation="dr_grpo", **options)
    assert all("lora" in name for name in ours[0][0])
    assert_same_steps(ours, theirs)


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


@pytest.mark.parametrize("aggregation", ["grpo_per_prompt", "prompt_mean", "balanced", "delta_l"])
@pytest.mark.parametrize("drop", [False, True])
def test_prompts(model_path, tmp_path, aggregation, drop):
    """Weights over the completions of a prompt; and prompts without a signal left out."""
    trainer, _ = build(
        DeltaLGRPOTrainer, model_path, tmp_path, aggregation=aggregation, beta=0.1, perturb=0.1,
        drop_zero_advantage_groups=drop, per_device_train_batch_size=16,
        mask_truncated_completions=True,
    )  # fmt: skip
    alike = prompts()[1]["prompt"]
    trainer.reward_funcs = [
        lambda prompts, completion_ids, **_: [
            0.0 if prompt == alike else float(len(ids) % 3)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
    ]
    trainer.model.train()
    batch = trainer._generate_and_score_completions([prompts()[i // 4] for i in range(16)])
    advantages, lengths = batch["advantages"], batch["completion_mask"].sum(1)
    assert (advantages[4:8] == 0).all() and (lengths == 0).any() and (lengths[4:8] > 0).any()
    of_prompts = torch.arange(16) // 4
    given = {
        "delta_l": {"max_length": MAX_LENGTH},
        "balanced": {"groups": of_prompts, "advantages": advantages},
    }.get(aggregation, {"groups": of_prompts})
    keep = {"keep": of_prompts != 1} if drop else {}
    expected = dl_norm.sequence_weights(lengths, aggregation, **given, **keep)
    torch.testing.assert_close(batch["sequence_weights"], expected)
    assert bool((expected[4:8] == 0).all()) == drop

    # The KL term of a prompt that is left out is left out too.
    batch["ref_per_token_logps"][4:8] += 3
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    batch["ref_per_token_logps"][4:8] -= 3
    assert (loss == trainer._compute_loss(trainer.model, batch)).item() == drop


def test_a_prompt_whose_token_advantages_add_up_to_zero_has_a_signal(
    model_path, tmp_path, monkeypatch
):
    trainer, _ = build(
        DeltaLGRPOTrainer, model_path, tmp_path, drop_zero_advantage_groups=True,
        per_device_train_batch_size=16,
    )  # fmt: skip
    theirs = GRPOTrainer._generate_and_score_completions

    def per_token(self, inputs):
        batch = theirs(self, inputs)
        batch["advantages"] = torch.zeros(batch["completion_ids"].shape)
        batch["advantages"][5, :2] = torch.tensor([1.0, -1.0])
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", per_token)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([prompts()[i // 4] for i in range(16)])
    assert (batch["sequence_weights"] > 0).tolist() == [i // 4 == 1 for i in range(16)]


def test_all_completions_masked_gives_zero_loss_and_gradient(model_path, tmp_path):
    def endless(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [[5] * MAX_LENGTH for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    for aggregation in dl_norm._aggregations.AGGREGATIONS:
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

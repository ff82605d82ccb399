"""`fused_lm_head=True` against TRL's own trainer: the same steps, without the logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'dl-norm[trl]'")
sys.path.append(str(Path(__file__).parent))

import peft
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import GRPOTrainer
from trl_tiny import (
    SETTINGS,
    VOCABULARY,
    assert_same_logs,
    build,
    one_thread,
    prompts,
    relative_error,
    run,
    save_model,
)

from dl_norm.integrations.trl import DeltaLGRPOTrainer

# One for each thing that is between the last hidden state and the logits of real models.
MODELS = {
    "untied": ("Qwen2", {}),
    "tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "softcap": ("Gemma2", dict(final_logit_softcapping=3.0, head_dim=8)),
    "scaled": ("Cohere", dict(logit_scale=0.25)),
    "divided": ("Granite", dict(logits_scaling=4.0)),
    "bias": ("Phi", dict(num_key_value_heads=2)),
}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    return {
        name: save_model(
            tmp_path_factory.mktemp(name),
            getattr(transformers, f"{family}ForCausalLM"),
            getattr(transformers, f"{family}Config"),
            **changes,
        )
        for name, (family, changes) in MODELS.items()
    }


FUSED = dict(fused_lm_head=True, fused_lm_head_chunk_size=5)  # several chunks, of 5 to 9 tokens


def assert_trains_alike(path, directory, aggregation="dapo", **options):
    theirs, their_logs = run(GRPOTrainer, path, directory, loss_type=aggregation, **options)
    ours, our_logs = run(
        DeltaLGRPOTrainer, path, directory, aggregation=aggregation, **FUSED, **options
    )
    assert len(ours) == len(theirs) == options.get("max_steps", 2)
    assert relative_error(ours[0], theirs[0]) < 1e-5
    for got, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert relative_error(got, wanted) < 1e-4  # taken where the first, rounded, one led
    assert_same_logs(our_logs, their_logs)
    return ours


# --- the same training as TRL's -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_head(paths, tmp_path, name):
    gradients = assert_trains_alike(
        paths[name], tmp_path, temperature=0.7, num_iterations=2, gradient_accumulation_steps=2
    )
    if name == "bias":
        assert gradients[0]["lm_head.bias"].abs().max() > 0


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "entropy mask and bonus"])
def test_every_option(paths, tmp_path, setting):
    options = {k: v for k, v in SETTINGS[setting].items() if k != "shows"}
    assert_trains_alike(paths["untied"], tmp_path, **options)


def test_high_entropy_mask(paths, tmp_path):
    assert_trains_alike(
        paths["untied"], tmp_path, top_entropy_quantile=0.5, gradient_accumulation_steps=2
    )


def test_gradient_checkpointing_and_fp32_head(paths, tmp_path):
    assert_trains_alike(
        paths["tied"],
        tmp_path,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        cast_lm_head_to_fp32=True,
    )


def test_lora_on_the_body(paths, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    gradients = assert_trains_alike(
        paths["untied"],
        tmp_path,
        peft_config=config,
        beta=0.1,  # the reference is the model with its adapters off
        gradient_accumulation_steps=2,
    )
    assert all("lora" in name for name in gradients[0])


def test_delta_l_with_and_without_logits(paths, tmp_path):
    options = dict(alpha=0.75, num_iterations=2, gradient_accumulation_steps=2)
    plain, plain_logs = run(DeltaLGRPOTrainer, paths["untied"], tmp_path, **options)
    fused, fused_logs = run(DeltaLGRPOTrainer, paths["untied"], tmp_path, **options, **FUSED)
    for got, wanted in zip(fused, plain, strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert_same_logs(fused_logs, plain_logs)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 weights"])
def test_bfloat16(paths, tmp_path, kind):
    """As near to float32 as TRL is in the same precision."""
    options = dict(gradient_accumulation_steps=2, max_steps=1)
    (truth,), _ = run(GRPOTrainer, paths["untied"], tmp_path, loss_type="dapo", **options)
    errors = []
    for cls, more in (
        (GRPOTrainer, dict(loss_type="dapo")),
        (DeltaLGRPOTrainer, dict(aggregation="dapo", **FUSED)),
    ):
        if kind == "autocast":
            more["bf16"] = True
        else:
            more["model"] = transformers.AutoModelForCausalLM.from_pretrained(
                paths["untied"], dtype=torch.bfloat16
            )
        (gradient,), _ = run(cls, paths["untied"], tmp_path, **options, **more)
        errors.append(relative_error({n: g.float() for n, g in gradient.items()}, truth))
    theirs, ours = errors
    assert 1e-4 < theirs < 0.2, "it must be bfloat16, and still this gradient"
    assert ours < 1.25 * theirs


def test_on_policy_ratio_is_one(paths, tmp_path):
    """Old log-probs come from the code of the loss: they differ by matrix products alone."""
    trainer, _ = build(DeltaLGRPOTrainer, paths["untied"], tmp_path, num_iterations=2, **FUSED)
    trainer.model.train()
    inputs = trainer._prepare_inputs([prompts()[0]] * 4)
    assert inputs["loss_tokens"] == int(inputs["completion_mask"].sum())
    mask, weights = inputs["completion_mask"], inputs["sequence_weights"]
    _, log_probs, _ = trainer._fused_loss(trainer.model, inputs, mask, weights)
    # float32 logits up to 16: an ulp there is 1e-6
    assert (log_probs - inputs["old_per_token_logps"]).abs().max() < 4e-6


# --- what it does not hold ------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("more", [{}, dict(importance_sampling_level="sequence")], ids=str)
def test_no_full_logits(tmp_path, more):
    """With a vocabulary that dwarfs the model, nothing is as large as a third of the logits."""
    vocabulary = 3000
    path = save_model(tmp_path / "model", vocab_size=vocabulary, hidden_size=4)
    trainer, _ = build(DeltaLGRPOTrainer, path, tmp_path, num_iterations=2, **FUSED, **more)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with LargestTensor() as seen:
        inputs = trainer._prepare_inputs([prompts()[0]] * 4)
        trainer._compute_loss(trainer.model, inputs).backward()
    tokens = int(inputs["completion_mask"].sum())
    assert tokens > 30
    assert vocabulary * 4 <= seen.elements < 10 * vocabulary  # the head itself, 9 tokens' logits


# --- what raises ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(target_modules=["q_proj", "lm_head"]), dict(modules_to_save=["lm_head"])]
)
def test_peft_on_the_head_raises(paths, tmp_path, options):
    config = peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **options})
    with pytest.raises(ValueError, match=r"target_modules"):
        build(DeltaLGRPOTrainer, paths["untied"], tmp_path, peft_config=config, **FUSED)


def test_mixture_of_experts_with_balancing_loss_raises(tmp_path):
    path = save_model(
        tmp_path / "model",
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        num_local_experts=3,
        router_aux_loss_coef=0.1,
    )
    with pytest.raises(ValueError, match=r"load-balancing loss \(set router_aux_loss_coef=0.0\)"):
        build(DeltaLGRPOTrainer, path, tmp_path, **FUSED)
    assert_trains_alike(path, tmp_path, router_aux_loss_coef=0.0)


class Doubled(torch.nn.Linear):
    """A head that does more than its weight says; so does any model whose config hides a scale."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Custom(transformers.Qwen2ForCausalLM):
    def forward(self, *args, **options):
        outputs = super().forward(*args, **options)
        outputs.logits = outputs.logits * 1.01
        return outputs


def test_logits_that_are_not_the_heads_raise(paths, tmp_path):
    model = Custom.from_pretrained(paths["untied"])
    with pytest.raises(ValueError, match="the logits of Custom are not its head's"):
        build(DeltaLGRPOTrainer, paths["untied"], tmp_path, model=model, **FUSED)


def test_a_head_that_is_not_linear_raises(paths, tmp_path):
    model = transformers.Qwen2ForCausalLM.from_pretrained(paths["untied"])
    head = Doubled(16, len(VOCABULARY), bias=False)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match=r"needs a torch.nn.Linear head .* is Doubled"):
        build(DeltaLGRPOTrainer, paths["untied"], tmp_path, model=model, **FUSED)
    model.set_output_embeddings(None)
    with pytest.raises(ValueError, match=r"needs a torch.nn.Linear head .* is NoneType"):
        build(DeltaLGRPOTrainer, paths["untied"], tmp_path, model=model, **FUSED)


def test_the_model_generates_as_before(paths, tmp_path):
    trainer, _ = build(
        DeltaLGRPOTrainer,
        paths["softcap"],
        tmp_path,
        rollouts=None,
        max_steps=1,
        num_iterations=2,
        **FUSED,
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(paths["softcap"])
    ids = torch.arange(3, 9)[None]
    assert torch.equal(trainer.model(ids).logits, plain(ids).logits)
    trainer.train()
    assert trainer.state.global_step == 1

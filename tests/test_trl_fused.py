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
    KL,
    SETTINGS,
    VLLM,
    VOCABULARY,
    assert_same_logs,
    assert_same_steps,
    build,
    one_thread,
    prompts,
    relative_error,
    run,
    run_of_trl,
    save_model,
)

from dl_norm.integrations.trl import DeltaLGRPOTrainer
from dl_norm.integrations.trl.fused_head import loss_of_gradient

# One for each thing that is between the last hidden state and the logits of real models.
MODELS = {
    "untied": ("Qwen2", {}),
    "tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "softcap": ("Gemma2", dict(final_logit_softcapping=3.0, head_dim=8)),
    "scaled": ("Cohere", dict(logit_scale=0.25)),
    "divided": ("Granite", dict(logits_scaling=4.0)),
    "bias": ("Phi", dict(num_key_value_heads=2)),
    "experts": ("Mixtral", dict(num_local_experts=3, router_aux_loss_coef=0.1)),
    "shared expert": (
        "Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=12,
            router_aux_loss_coef=0.1,
        ),
    ),
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


def assert_trains_alike(path, directory, theirs=None, **options):
    theirs = theirs or run(GRPOTrainer, path, directory, loss_type="dapo", **options)
    ours = run(DeltaLGRPOTrainer, path, directory, aggregation="dapo", **FUSED, **options)
    assert len(ours[0]) == options.get("max_steps", 2)
    assert_same_steps(ours, theirs, drift=10)
    return ours[0]


# --- the same training as TRL's -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_head(paths, tmp_path, name):
    gradients = assert_trains_alike(
        paths[name], tmp_path, temperature=0.7, num_iterations=2, gradient_accumulation_steps=2
    )
    if name == "bias":
        assert gradients[0]["lm_head.bias"].abs().max() > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_option(paths, tmp_path, setting):
    options = {k: v for k, v in SETTINGS[setting].items() if k != "shows"}
    path, key = paths["untied"], (setting, "dapo", "float32")
    theirs = run_of_trl(key, path, tmp_path, loss_type="dapo", **options)
    assert_trains_alike(path, tmp_path, theirs, **options)


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


def test_balancing_loss_of_experts(paths, tmp_path):
    """With two passes over the head; with one, it is among the kinds of heads above."""
    options = dict(gradient_accumulation_steps=2, importance_sampling_level="sequence")
    balanced = assert_trains_alike(paths["experts"], tmp_path, **options)[0]
    free = assert_trains_alike(paths["experts"], tmp_path, router_aux_loss_coef=0.0, **options)[0]
    routers = [name for name in balanced if name.endswith("gate.weight")]
    assert len(routers) == 2
    for name in routers:  # a hundred times what the comparison with TRL would see
        assert relative_error({name: balanced[name]}, {name: free[name]}) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loss_of_gradient(dtype):
    """Against autograd, for gradients so small that they underflow in float16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 8, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(11, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    grad = 1e-7 * torch.randn(2, 5, generator=generator) * mask
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    log_probs = ((leaves[0] @ leaves[1].T) / 0.7).log_softmax(-1)
    log_probs.gather(2, ids[..., None]).squeeze(2).backward(grad.double())
    scale = 1e5 if dtype == torch.float16 else 1.0  # as a gradient scaler: the results underflow
    (scale * loss_of_gradient(hidden, weight, ids, grad, mask, temperature=0.7)).backward()
    for leaf, wanted in zip((hidden, weight), leaves, strict=True):
        wanted = scale * wanted.grad
        error = (leaf.grad.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 4 * torch.finfo(dtype).eps


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


# In bfloat16: one step, so that what differs is what it rounds.
LOW_PRECISION = {
    "bfloat16 weights": ("untied", dict(bf16=False)),
    "autocast": ("untied", dict()),
    "autocast, KL": ("untied", KL),
    "autocast, softcap, KL": ("softcap", KL),
    "autocast, KL, fp32 head": ("tied", dict(**KL, cast_lm_head_to_fp32=True)),
    "autocast, KL, two passes": ("untied", dict(**KL, importance_sampling_level="sequence")),
    "autocast, vLLM": ("untied", dict(**VLLM, vllm_importance_sampling_mode="sequence_truncate")),
    "autocast, experts": ("experts", dict()),
}


@pytest.mark.parametrize("case", LOW_PRECISION)
def test_bfloat16(paths, tmp_path, case):
    """As near to float32 as TRL is in the same precision, by default that of its trainer."""
    name, more = LOW_PRECISION[case]
    options = dict(gradient_accumulation_steps=2, max_steps=1, **more)
    low = {"bf16": None, **options}  # None: what TRL does where nothing is said
    runs = []
    for cls, kind in (
        (GRPOTrainer, {**options, "bf16": False, "loss_type": "dapo"}),
        (GRPOTrainer, {**low, "loss_type": "dapo"}),
        (DeltaLGRPOTrainer, {**low, "aggregation": "dapo", **FUSED}),
    ):
        if case == "bfloat16 weights" and runs:
            kind["model"] = transformers.AutoModelForCausalLM.from_pretrained(
                paths[name], dtype=torch.bfloat16
            )
        (gradient,), logs = run(cls, paths[name], tmp_path, **kind)
        runs.append(({n: g.float() for n, g in gradient.items()}, logs[0]))
    (truth, true_logs), *low_runs = runs
    theirs, ours = (relative_error(gradient, truth) for gradient, _ in low_runs)
    assert 1e-4 < theirs < 0.2, "it must be bfloat16, and still this gradient"
    assert ours < 1.25 * theirs
    for metric in ("loss", "kl", "aux_loss"):
        if metric in true_logs:
            wanted = true_logs[metric]
            theirs, ours = (abs(logs[metric] - wanted) for _, logs in low_runs)
            assert ours < 1.25 * theirs + 0.01 * abs(wanted), metric


def test_on_policy_ratio_is_one(paths, tmp_path):
    """Old log-probs come from the code of the loss: they differ by matrix products alone."""
    trainer, _ = build(DeltaLGRPOTrainer, paths["untied"], tmp_path, num_iterations=2, **FUSED)
    trainer.model.train()
    inputs = trainer._prepare_inputs([prompts()[0]] * 4)
    assert inputs["loss_tokens"] == int(inputs["completion_mask"].sum())
    mask, weights = inputs["completion_mask"], inputs["sequence_weights"]
    _, _, log_probs, *_ = trainer._fused_loss(trainer.model, inputs, mask, weights)
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

"""Every option of TRL's GRPOConfig is followed, refused or outside the loss; and what raises."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'dl-norm[trl]'")
sys.path.append(str(Path(__file__).parent))

from trl import GRPOConfig, GRPOTrainer
from trl.trainer.base_config import _BaseConfig
from trl_tiny import build, prompts, reward, save_model

from dl_norm.integrations import trl as integration
from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer
from dl_norm.integrations.trl.config import WITHOUT_EFFECT, warnings_of
from dl_norm.integrations.trl.trainer import logger
from dl_norm.surrogates import SURROGATES


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny-qwen2"))


FOLLOWED = {
    "beta": "KL term",
    "num_iterations": "old log-probs",
    "epsilon": "lower clip",
    "epsilon_high": "upper clip",
    "delta": "two-sided clip",
    "router_aux_loss_coef": "load-balancing loss",
    "max_completion_length": "M",
    "steps_per_generation": "scale",
    "mask_truncated_completions": "mask, and with it the lengths",
    "top_entropy_quantile": "factor on the token loss",
    "entropy_coef": "bonus",
    "use_adaptive_entropy": "controller of the bonus",
    "entropy_coef_min": "controller of the bonus",
    "entropy_coef_max": "controller of the bonus",
    "entropy_coef_delta": "controller of the bonus",
    "entropy_target": "controller of the bonus",
    "off_policy_mask_threshold": "factor on the token loss",
    "use_bias_correction_kl": "KL term",
    "importance_sampling_level": "ratio",
    "sapo_temperature_neg": "token loss",
    "sapo_temperature_pos": "token loss",
    "vespo_k_neg": "token loss",
    "vespo_k_pos": "token loss",
    "vespo_lambda_neg": "token loss",
    "vespo_lambda_pos": "token loss",
    "vllm_importance_sampling_correction": "factor on the token loss",
}
CHECKED = {"loss_type"}
# Used by TRL before the loss: what the model is, what is generated, its reward, its advantage, the
# value of the importance sampling ratio, and what is printed.
BEFORE_THE_LOSS = """
    learning_rate model_init_kwargs trust_remote_code disable_dropout cast_lm_head_to_fp32
    remove_unused_columns num_generations num_generations_eval ds3_gather_for_generation
    shuffle_dataset pad_to_multiple_of generation_batch_size temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm
    vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size reward_weights
    multi_objective_aggregation scale_rewards sync_ref_model ref_model_mixup_alpha
    ref_model_sync_steps max_tool_calling_iterations vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_cap log_completions log_multimodal num_completions_to_print
    log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged
"""
# What TRL's `_compute_loss` reads from itself and its arguments.
READ_BY_TRL = """
    accelerator aux_loss_enabled beta current_gradient_accumulation_steps delta entropy_coef
    entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon_high epsilon_low
    get_gamma_weights get_high_entropy_mask get_off_policy_mask importance_sampling_level loss_type
    max_completion_length model off_policy_mask_threshold router_aux_loss_coef sapo_temperature_neg
    sapo_temperature_pos steps_per_generation top_entropy_quantile use_adaptive_entropy
    use_bias_correction_kl use_vllm vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    vllm_importance_sampling_correction _entropy_bonus_enabled _entropy_window_stats
    _get_per_token_logps_and_entropies _last_world_entropy _metrics
"""


def test_every_option_of_trl_is_followed_checked_or_outside_the_loss():
    groups = [set(FOLLOWED), CHECKED, set(BEFORE_THE_LOSS.split())]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not group & other
    own = GRPOConfig.__annotations__.keys()
    inherited = {f.name for f in dataclasses.fields(_BaseConfig)}
    assert set.union(*groups) == set(own)
    assert own <= {f.name for f in dataclasses.fields(GRPOConfig)}
    assert own & inherited == {"learning_rate", "remove_unused_columns"}


def test_nothing_new_in_the_loss_of_trl():
    """A branch added to TRL's loss reads something that is not on the list."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    read = set(re.findall(r"self\.(?:args\.)?(\w+)", source))
    assert read == set(READ_BY_TRL.split())
    batch = set(re.findall(r'inputs(?:\.get\(|\[)"(\w+)"', source)) | {"tool_mask"}
    ours = inspect.getsource(inspect.getmodule(DeltaLGRPOTrainer))
    ignored = {"num_items_in_batch"}  # "dapo" has the token count of the generation batch in x
    assert {key for key in batch if f'"{key}"' not in ours} == ignored


SEQUENCE = dict(importance_sampling_level="sequence")


@pytest.fixture
def config(tmp_path):
    def build_config(**options):
        return DeltaLGRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options
        )

    return build_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(aggregation="mean"),
            "aggregation must be one of delta_l, grpo, dapo, dr_grpo, luspo",
        ),
        *(
            (dict(alpha=alpha), "alpha must be a number from 0 to 16")
            for alpha in (-1, 17, math.nan)
        ),
        (dict(aggregation="dapo", alpha=0.5), "alpha=0.5 has no meaning for aggregation='dapo'"),
        *(
            (dict(loss_type=loss_type), f"loss_type='{loss_type}' disagrees with aggregation")
            for loss_type in ("cispo", "sapo", "luspo", "dapo")
        ),
        (dict(loss_type="delta_l"), "aggregation='delta_l', which is the default: leave loss_type"),
        (dict(loss_type="bnpo"), "'bnpo' is not supported: it divides by the tokens of a micro-"),
        (dict(loss_type="vespo"), "set aggregation='dapo', surrogate='vespo'"),
        (dict(surrogate="vespo", **SEQUENCE), "has no effect with surrogate='vespo', which takes"),
        (dict(surrogate="vespo", epsilon=0.1), "epsilon=0.1 has no effect"),
        (dict(surrogate="vespo", vespo_k_pos=0.0), "expected k_pos > 0"),
        (
            dict(surrogate="vespo", use_vllm=True),
            "'token_truncate' or 'token_mask'; it is 'sequence_mask'",
        ),
        (dict(vespo_k_pos=1.0), "vespo_k_pos=1.0 has no effect with surrogate='clip'"),
        (dict(surrogate="gmpo"), "ratio_level='sequence' or 'sequence_token' alone, got 'token'"),
        (dict(surrogate="dppo_tv", epsilon=0.1), "epsilon=0.1 has no effect"),
        (dict(surrogate="dppo_tv(delta_low=-1)"), "expected delta_low >= 0"),
        (dict(loss_type="ppo"), "loss_type must be one of grpo, dapo, dr_grpo, luspo, cispo, sapo"),
        (dict(aggregation="grpo", loss_type="dapo"), "loss_type='dapo' disagrees"),
        (dict(max_completion_length=None), "max_completion_length=None, but aggregation"),
        (
            dict(max_completion_length=None, aggregation="dr_grpo"),
            "max_completion_length=None, but aggregation",
        ),
        (dict(delta=0.5), "delta > 1 (or None)"),
        (dict(epsilon=1.5), "epsilon, epsilon_high"),
        (dict(epsilon_high=-0.1), "epsilon, epsilon_high"),
        (dict(beta=-0.1), "expected beta >= 0"),
        (dict(importance_sampling_level="word"), "must be one of token, sequence; got 'word'"),
        (dict(surrogate="ppo"), "there is no surrogate 'ppo': take one of clip, cispo, sapo,"),
        (dict(surrogate="cispo"), "needs epsilon_high, the upper bound of the ratio itself"),
        (dict(surrogate="cispo", epsilon_high=5.0, epsilon=0.1), "epsilon=0.1 has no effect"),
        (dict(surrogate="cispo", epsilon_high=5.0, delta=2.0), "delta=2.0 has no effect"),
        (dict(surrogate="sapo", epsilon=0.1), "epsilon=0.1 has no effect"),
        (dict(surrogate="sapo", delta=2.0), "delta=2.0 has no effect"),
        (dict(sapo_temperature_pos=0.9), "sapo_temperature_pos=0.9 has no effect"),
        (dict(loss_type="cispo", surrogate="cispo", epsilon_high=5.0), "set aggregation='dapo'"),
        (dict(entropy_target=0.1), "entropy_target=0.1 has no effect with use_adaptive_entropy"),
        (dict(fused_lm_head=True, fused_lm_head_chunk_size=0), "must be a positive int"),
        (dict(fused_lm_head_chunk_size=64), "fused_lm_head is False"),
    ],
)
def test_contradicting_options_raise_at_construction(config, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(aggregation="dapo", loss_type="dapo"),
        dict(aggregation="grpo", max_completion_length=None),
        dict(alpha=0.0),
        dict(aggregation="dapo", surrogate="cispo", epsilon_high=5.0, loss_type="cispo"),
        dict(aggregation="grpo", surrogate="sapo", loss_type="sapo", sapo_temperature_pos=0.9),
        dict(aggregation="dapo", surrogate="vespo", loss_type="vespo", vespo_k_neg=2.0),
        dict(surrogate="vespo", use_vllm=True, vllm_importance_sampling_mode="token_mask"),
        dict(surrogate="dppo_tv(delta_high=0.15) + drift(0.002)"),
        dict(surrogate="gmpo", aggregation="grpo", **SEQUENCE),
        dict(aggregation="luspo", importance_sampling_level="sequence", loss_type="luspo"),
    ],
)
def test_consistent_options_are_accepted(config, options):
    config(**options)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("alpha", "0.75", "a Python number"),
        ("alpha", None, "a Python number"),
        ("alpha", True, "a Python number"),
        ("aggregation", None, "a string"),
        ("surrogate", 1, "a string"),
        ("loss_type", ["dapo"], "a string or None"),
        ("fused_lm_head", "yes", "True or False"),
        ("fused_lm_head", 1, "True or False"),
        ("fused_lm_head_chunk_size", 64.0, "an int or None"),
        ("fused_lm_head_chunk_size", True, "an int or None"),
        ("epsilon", "0.2", "a Python number"),
        ("epsilon_high", [0.2], "a Python number or None"),
        ("beta", "0", "a Python number"),
    ],
)
def test_wrong_types_raise_at_construction(config, name, value, wanted):
    message = f"{name} must be {wanted}; got {value!r}, a {type(value).__name__}"
    with pytest.raises(TypeError, match=re.escape(message)):
        config(**{name: value})


def test_every_field_of_ours_is_type_checked(config):
    own = set(DeltaLGRPOConfig.__annotations__)
    for name in own:
        with pytest.raises(TypeError, match=rf"^{name} must be"):
            config(**{name: object()})


def test_every_surrogate_says_which_options_have_no_effect():
    assert set(WITHOUT_EFFECT) <= set(SURROGATES)
    assert set().union(*WITHOUT_EFFECT.values()) <= set(FOLLOWED)


def test_moving_from_a_loss_type_takes_one_error(config):
    """What the message says, done, is accepted and is TRL's loss."""
    options = dict(epsilon=0.3, delta=2.0, alpha=0.75)
    with pytest.raises(ValueError) as error:
        config(loss_type="cispo", **options)
    assert "set aggregation='dapo', surrogate='cispo', epsilon_high=5.0 (or" in str(error.value)
    assert str(error.value).endswith("and leave epsilon, delta, alpha unset")
    config(loss_type="cispo", aggregation="dapo", surrogate="cispo", epsilon_high=5.0)
    with pytest.raises(ValueError, match=r"surrogate='sapo', and leave epsilon_high unset$"):
        config(loss_type="sapo", epsilon_high=0.3)
    config(loss_type="sapo", aggregation="grpo", surrogate="sapo")


BY_LENGTH = "weights each sequence by its completion length. For"


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            dict(aggregation="dapo", **SEQUENCE),
            BY_LENGTH,
        ),
        (
            dict(aggregation="dr_grpo", **SEQUENCE),
            BY_LENGTH,
        ),
        (
            dict(aggregation="dapo", surrogate="cispo", epsilon_high=5.0, **SEQUENCE),
            BY_LENGTH,
        ),
        (dict(alpha=0.75, **SEQUENCE), "by its completion length to the power 0.25"),
        (dict(aggregation="luspo"), "'luspo' belongs to importance_sampling_level='sequence'"),
        (dict(aggregation="luspo", **SEQUENCE), None),
        (dict(aggregation="grpo", **SEQUENCE), None),
        (dict(**SEQUENCE), None),
        (dict(alpha=0.75), None),
        (dict(aggregation="dapo"), None),
        (dict(aggregation="dapo", loss_type="dapo", **SEQUENCE), None),  # TRL warns then
    ],
)
def test_warnings_that_trl_keys_on_loss_type(config, options, warning):
    warnings = warnings_of(config(**options))
    assert len(warnings) == (warning is not None)
    assert all(warning in found for found in warnings)


def test_the_trainer_says_what_it_does(model_path, tmp_path, caplog):
    """That the default is DeltaL, once in a process; TRL's warnings, in every trainer."""
    logger.warning_once.cache_clear()
    for _ in range(2):
        build(DeltaLGRPOTrainer, model_path, tmp_path)
        build(DeltaLGRPOTrainer, model_path, tmp_path, aggregation="luspo")
    said = [record.message for record in caplog.records if record.name == logger.name]
    assert sum("aggregation='delta_l' with alpha=1 and M=max_completion" in m for m in said) == 1
    assert sum("aggregation='luspo' belongs to" in m for m in said) == 2
    assert len(said) == 3


def test_options_are_checked_again_by_the_trainer(model_path, config):
    args = config()
    args.vespo_k_pos = 3.0
    with pytest.raises(ValueError, match="vespo_k_pos"):
        DeltaLGRPOTrainer(model_path, reward, args, train_dataset=prompts())


def test_plain_grpo_config_is_refused(model_path, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(TypeError, match="args must be a DeltaLGRPOConfig; got GRPOConfig"):
        DeltaLGRPOTrainer(model_path, reward, args, train_dataset=prompts())


def test_a_batch_without_weights_is_refused(model_path, tmp_path):
    trainer, _ = build(DeltaLGRPOTrainer, model_path, tmp_path)
    with pytest.raises(ValueError, match="must call super"):
        trainer._compute_loss(trainer.model, {})


def import_again():
    """Run the module's code anew under another name, so that the imported one stays as it is."""
    spec = importlib.util.spec_from_file_location("integration_again", integration.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_import_without_trl_names_the_extra(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    message = "pip install 'dl-norm[trl]' (TRL 1.16 needs Python 3.11 or newer; this is 3."
    with pytest.raises(ImportError, match=re.escape(message)):
        import_again()


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "0.29.1"])
def test_import_with_an_unsupported_trl_says_which(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=re.escape(f"trl>=1.16,<1.17, but trl {version}")):
        import_again()


def squared(log_prob, ratio, advantage):
    """A token loss of a user's own, with a further quantity."""
    return -advantage * ratio * ratio, {"ratio_squared": ratio * ratio}


@pytest.mark.parametrize("fused", [False, True])
def test_a_token_loss_of_the_users_own(model_path, tmp_path, monkeypatch, fused):
    """By its import path; what it returns beside the loss is logged."""
    module = ModuleType("my_trl_losses")
    module.squared = squared
    monkeypatch.setitem(sys.modules, "my_trl_losses", module)
    trainer, _ = build(
        DeltaLGRPOTrainer, model_path, tmp_path,
        surrogate="my_trl_losses:squared", fused_lm_head=fused, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert trainer.state.log_history[0]["ratio_squared"] == pytest.approx(1.0, rel=1e-3)
    cpu = {"use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=r"epsilon=0.1 has no effect with surrogate="):
        DeltaLGRPOConfig(str(tmp_path), **cpu, surrogate="my_trl_losses:squared", epsilon=0.1)
    with pytest.raises(ValueError, match="there is no module 'nowhere'"):
        DeltaLGRPOConfig(str(tmp_path), **cpu, surrogate="nowhere:loss")

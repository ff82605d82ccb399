"""NeMo-RL: its wrappers call the hook; its own loss, rescaled, has the same gradient."""

from __future__ import annotations

import ast
import enum
import sys
from pathlib import Path
from typing import Any, Optional, TypedDict

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_runs import nemo_data
from adapter_stand_ins import NEMO, fake_nemo_rl
from adapter_tools import THEIRS, M, Rollout, check_hook, fake, lift, make_rollout, source
from torch import Tensor

from dl_norm.integrations import nemo_rl


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.fixture
def nemo_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nemo_rl(monkeypatch)


@pytest.mark.usefixtures("nemo_modules")
@pytest.mark.parametrize("missing", ["global_valid_seqs", "global_valid_toks"])
def test_needs_both_counts(rollout: Rollout, missing: str) -> None:
    counts = {"global_valid_seqs": torch.tensor(5.0), "global_valid_toks": torch.tensor(20.0)}
    with pytest.raises(ValueError, match=missing):
        nemo_rl.DeltaLLossFn(NEMO, max_length=M)(
            rollout.log_probs, nemo_data(rollout), **(counts | {missing: None})
        )


@pytest.mark.usefixtures("nemo_modules")
@pytest.mark.parametrize(
    "changes",
    [
        {"reference_policy_kl_penalty": 0.01},
        {"use_cispo": True},
        {"sequence_level_importance_ratios": True},
    ],
)
def test_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        nemo_rl.DeltaLLossFn(NEMO | changes, max_length=M)


def test_real(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-RL's wrappers call the hook; its own loss, rescaled, has the same gradient."""
    pydantic = pytest.importorskip("pydantic")
    folder = "RL/nemo_rl/algorithms"
    text = source(f"{folder}/loss/interfaces.py").read_text()
    enums = [
        name
        for name in ("LossType", "LossInputType", "MetricNormalizer")  # the last is after 0.7.0
        if f"class {name}" in text
    ]
    interfaces = lift(f"{folder}/loss/interfaces.py", *enums, enum=enum)
    fake(monkeypatch, "nemo_rl.algorithms.loss.interfaces", **vars(interfaces))
    utils = lift(f"{folder}/utils.py", "masked_mean", "calculate_kl", Optional=Optional)
    theirs = lift(
        f"{folder}/loss/loss_functions.py",
        "ClippedPGLossFn",
        **vars(interfaces),
        **vars(utils),
        LossFunction=object,
        TypedDict=TypedDict,
        Optional=Optional,
    )
    # The configuration by hand: pydantic evaluates annotations, which are not kept.
    text = source(f"{folder}/loss/loss_functions.py").read_text()
    node = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "ClippedPGLossConfig")
    space: dict[str, Any] = {"BaseModel": pydantic.BaseModel, "Optional": Optional}
    exec(compile(ast.Module([node], []), "nemo_rl", "exec", dont_inherit=True), space)
    config = space["ClippedPGLossConfig"](**NEMO)
    check_hook(theirs.ClippedPGLossFn.__call__, "nemo-rl")
    estimator = lift(f"{folder}/advantage_estimator.py", "GRPOAdvantageEstimator.compute_advantage")
    check_hook(estimator.compute_advantage, "nemo-rl estimator")
    wrapper = lift(
        f"{folder}/loss/wrapper.py", "wrap_loss_fn_with_input_preparation", Any=Any
    ).wrap_loss_fn_with_input_preparation

    data = nemo_data(rollout)
    counts = data["sample_mask"].sum(), rollout.mask.sum()

    def run(loss_fn: Any) -> Tensor:
        total = torch.zeros(())
        for part in (slice(0, 2), slice(2, 6)):
            micro = {name: stream[part] for name, stream in data.items()}
            loss, metrics = wrapper(
                rollout.log_probs[part],
                micro,
                *counts,
                loss_fn,
                lambda logits, data, **_: ({"next_token_logprobs": logits}, data),
            )
            assert {"loss", "probs_ratio", "gen_kl_error", "token_mult_prob_error"} <= set(metrics)
            total = total + loss
        return total

    rollout.check(run(nemo_rl.DeltaLLossFn(config, max_length=M)))
    # theirs is a sum over tokens / N (with 1e-8 added), ours over G M
    sequences, tokens = counts
    rollout.check(run(theirs.ClippedPGLossFn(config)) * (tokens / (sequences * M)))

    # With the correction for the gap between trainer and sampler.
    data["generation_logprobs"] = data["prev_logprobs"] + 0.3 * data["advantages"].sign()
    prefix = "truncated_importance_sampling"
    for truncated in ({}, {f"{prefix}_type": "tis", f"{prefix}_ratio": 1.1}):
        config = space["ClippedPGLossConfig"](
            **NEMO, use_importance_sampling_correction=True, **truncated
        )
        ours = run(nemo_rl.DeltaLLossFn(config, max_length=M))
        other = run(theirs.ClippedPGLossFn(config)) * (tokens / (sequences * M))
        torch.testing.assert_close(ours, other, **THEIRS)

"""What TRL's batches may look like when they reach the loss: shapes, dtypes and strides.

`_compute_loss` of both trainers on drawn batches, without a model: TRL's is given the log-probs of
random hidden states, ours the same log-probs, or the hidden states where the head is fused.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'dl-norm[trl]'")
sys.path.append(str(Path(__file__).parent))

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from trl import GRPOTrainer
from trl_tiny import build, one_thread, quiet, save_model

import dl_norm
from dl_norm.integrations.trl import DeltaLGRPOTrainer
from dl_norm.integrations.trl.metrics import loss_record
from dl_norm.integrations.trl.trainer import LOSS_TOKENS, _generation_batch_weights, _loss_mask

VOCABULARY, WIDTH, PROMPT = 13, 6, 2
MAX_LENGTH = 9
# TRL's loss_type: ours, and TRL's upper bound of the ratio
LOSSES = {
    "grpo": ("grpo", "clip", 0.3),
    "dapo": ("dapo", "clip", 0.3),
    "dr_grpo": ("dr_grpo", "clip", 0.3),
    "luspo": ("luspo", "clip", 0.3),
    "cispo": ("dapo", "cispo", 1.2),
    "sapo": ("grpo", "sapo", None),
}


# -- batches ---------------------------------------------------------------------------------------


def spaced(values):
    """Every second element of a buffer, at an offset."""
    wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1] + 1)
    wide[..., 1::2] = values
    return wide[..., 1::2]


def transposed(values):
    return values.t().contiguous().t() if values.dim() == 2 else values


def expanded(values):
    """One row or column for all, without memory of its own: the values change."""
    if values.dim() == 1:
        return values[:1].expand(values.shape)
    return values[:, :1].expand(values.shape)


LAYOUTS = {
    "contiguous": lambda values: values,
    "spaced": spaced,
    "transposed": transposed,
    "expanded": expanded,
}


RATIO_MAX = 1.2


# What a micro-batch of one sequence has under vLLM's "sequence_truncate"
ONE_SEQUENCE = SimpleNamespace(
    shape=(1, 5), lengths=[5], seed=0, loss="dapo", level="token", beta=0.0, corrected_kl=False,
    delta=None, quantile=1.0, threshold=None, mask=(torch.int64, "contiguous"), tool_mask=False,
    old=(torch.float32, "contiguous"), ref=(torch.float32, "contiguous"),
    advantages=((1,), "contiguous"), rollout=((1, 1), "contiguous"),
)  # fmt: skip


@st.composite
def cases(draw):
    """Options of TRL's loss and of a batch."""
    layouts = st.sampled_from(list(LAYOUTS))
    sequences, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shape = (sequences, tokens)
    of_sequence, of_one, of_token = (sequences,), (sequences, 1), shape
    return SimpleNamespace(
        shape=shape,
        lengths=draw(st.lists(st.integers(0, tokens), min_size=sequences, max_size=sequences)),
        seed=draw(st.integers(0, 99)),
        loss=draw(st.sampled_from(list(LOSSES))),
        level=draw(st.sampled_from(["token", "sequence"])),
        beta=draw(st.sampled_from([0.0, 0.3])),
        corrected_kl=draw(st.booleans()),
        delta=draw(st.sampled_from([None, 1.25, 1.5])),
        quantile=draw(st.sampled_from([1.0, 0.5])),
        threshold=draw(st.sampled_from([None, 0.02])),
        mask=draw(st.tuples(st.sampled_from([torch.int64, torch.int32, torch.bool]), layouts)),
        tool_mask=draw(st.booleans()),
        old=draw(st.none() | st.tuples(st.sampled_from([torch.float32, torch.bfloat16]), layouts)),
        ref=draw(st.tuples(st.sampled_from([torch.float32, torch.bfloat16]), layouts)),
        advantages=draw(st.tuples(st.sampled_from([of_sequence, of_one, of_token]), layouts)),
        rollout=draw(st.none() | st.tuples(st.sampled_from([of_one, of_token]), layouts)),
    )


def make_batch(case):
    """TRL's batch, hidden states (B, PROMPT + T, D) and a head."""
    generator = torch.Generator().manual_seed(case.seed)
    normal = functools.partial(torch.randn, generator=generator)
    (sequences, tokens), prompt = case.shape, torch.zeros(case.shape[0], PROMPT, dtype=torch.int64)
    dtype, layout = case.mask
    mask = torch.arange(tokens) < torch.tensor(case.lengths)[:, None]
    if layout == "expanded":
        mask = mask.any(1, keepdim=True).expand(case.shape)
    ids = torch.randint(VOCABULARY, case.shape, generator=generator)
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": ids,
        "completion_mask": LAYOUTS[layout](mask.to(dtype)),
    }
    if case.tool_mask:
        batch["tool_mask"] = torch.randint(2, case.shape, generator=generator)
    hidden, head = normal(sequences, PROMPT + tokens, WIDTH), normal(VOCABULARY, WIDTH)
    with torch.no_grad():
        log_probs, _ = scores(hidden, head, ids)

    def near(spread):
        return log_probs + spread * normal(case.shape)

    old = case.old
    if case.rollout is not None:  # for which TRL always computes them
        old = old or (torch.float32, "contiguous")
    if old is not None:
        batch["old_per_token_logps"] = LAYOUTS[old[1]](near(0.3).to(old[0]))
    if case.beta:
        batch["ref_per_token_logps"] = LAYOUTS[case.ref[1]](near(0.3).to(case.ref[0]))
    shape, layout = case.advantages
    batch["advantages"] = LAYOUTS[layout](normal(shape))
    if case.rollout is not None:
        batch["sampling_per_token_logps"] = LAYOUTS[case.rollout[1]](near(0.1))
    mask = _loss_mask(batch)
    if case.rollout is not None:
        # As TRL computes it; tests/test_rollout_trainers.py holds ours against its own code.
        gap = batch["old_per_token_logps"].float() - batch["sampling_per_token_logps"]
        gap = gap * mask
        per_token = case.rollout[0] == case.shape
        ratio = gap.exp() if per_token else gap.sum(1, keepdim=True).exp()
        batch["importance_sampling_ratio"] = ratio.clamp(max=RATIO_MAX)
    batch["num_items_in_batch"] = mask.sum()
    batch["sequence_weights"] = _generation_batch_weights(
        mask.sum(1), LOSSES[case.loss][0], alpha=1.0, max_length=MAX_LENGTH, keep=None
    )
    batch[LOSS_TOKENS] = int(mask.sum())
    return batch, hidden, head


def scores(hidden, head, ids):
    """Log-probs and entropies of the completion's tokens."""
    all_log_probs = (hidden[:, PROMPT - 1 : -1] @ head.t()).log_softmax(-1)
    entropies = -(all_log_probs.exp() * all_log_probs).sum(-1)
    return all_log_probs.gather(2, ids[..., None]).squeeze(2), entropies.detach()


# -- both trainers, told what a case says ----------------------------------------------------------


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    path = save_model(directory / "model")
    with one_thread(), quiet():
        ours, theirs = (build(cls, path, directory)[0] for cls in (DeltaLGRPOTrainer, GRPOTrainer))
        for trainer in (ours, theirs):
            trainer.current_gradient_accumulation_steps = 1
            trainer.max_completion_length = MAX_LENGTH
            trainer.model.train()
        yield ours, theirs


def configure(trainer, case, fused):
    aggregation, surrogate, epsilon_high = LOSSES[case.loss]
    delta = case.delta if surrogate == "clip" else None
    trainer.beta = trainer.args.beta = case.beta
    trainer.args.use_bias_correction_kl = case.corrected_kl
    trainer.args.delta = delta
    trainer.args.epsilon_high = epsilon_high
    trainer.args.importance_sampling_level = trainer.importance_sampling_level = case.level
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = case.quantile, case.threshold
    trainer.use_vllm = case.rollout is not None
    if case.rollout is not None:
        level = "token" if case.rollout[0] == case.shape else "sequence"
        trainer.vllm_importance_sampling_mode = f"{level}_truncate"
        trainer.vllm_importance_sampling_clip_max = RATIO_MAX
    if isinstance(trainer, DeltaLGRPOTrainer):
        trainer.args.aggregation, trainer.args.surrogate = aggregation, surrogate
        trainer.args.fused_lm_head = fused
    else:
        trainer.loss_type = case.loss
        trainer.epsilon_low = trainer.args.epsilon
        trainer.epsilon_high = trainer.args.epsilon if epsilon_high is None else epsilon_high


def result(trainer, batch, hidden, head):
    """Loss, gradients of hidden states and head, metrics."""
    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, head)]
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        *scores(*leaves, batch["completion_ids"]),
        None,
    )
    trainer._run_model = lambda model, ids, mask, loss_head: loss_head(*leaves, bias=None)
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    metrics = defaultdict(list, trainer._metrics["train"])
    if isinstance(trainer, DeltaLGRPOTrainer):
        metrics.update(trainer._records.pop("train"))
    return loss.detach(), [leaf.grad for leaf in leaves], {k: v[0] for k, v in metrics.items()}


def check(trainers, case, fused):
    batch, hidden, head = make_batch(case)
    results = []
    for trainer in trainers:
        configure(trainer, case, fused)
        results.append(result(trainer, dict(batch), hidden, head))
    (loss, gradients, metrics), (their_loss, their_gradients, their_metrics) = results
    # float32 terms of order 1, some twenty of them
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients, their_gradients, strict=True):
        largest = float(wanted.abs().max())  # where the KL cancels, what cancels is of order 0.1
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * largest + 1e-6)
    assert metrics.keys() == their_metrics.keys()
    if case.shape[1] > 1:  # TRL takes (B, 1) for values of sequences, and averages masked ones too
        for name, wanted in their_metrics.items():
            assert metrics[name] == pytest.approx(wanted, rel=1e-4, abs=1e-5, nan_ok=True), name


DRAWN = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("fused", [False, True], ids=["log-probs", "fused head"])
@settings(max_examples=100, **DRAWN)
@given(case=cases())
def test_drawn_batches(trainers, fused, case):
    check(trainers, case, fused)


@pytest.mark.parametrize("fused", [False, True], ids=["log-probs", "fused head"])
@settings(max_examples=10, **DRAWN)
@given(case=cases())
@example(case=ONE_SEQUENCE)
def test_drawn_batches_in_the_kernels(trainers, monkeypatch, fused, case):
    for name in ("policy_loss", "linear_policy_loss", "token_log_probs"):
        function = getattr(dl_norm, name)
        if not isinstance(function, functools.partial):  # set for an earlier case
            monkeypatch.setattr(dl_norm, name, functools.partial(function, impl="triton"))
    check(trainers, case, fused)


# -- metrics ---------------------------------------------------------------------------------------


class PassesOverTokens(TorchDispatchMode):
    """Operations that read or write a tensor of a number per token."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.names = tokens, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(torch.is_tensor(leaf) and leaf.numel() >= self.tokens for leaf in (*args, result)):
            self.names.append(function.__name__)
        return result


@pytest.mark.parametrize(
    ("loss", "level", "old", "most"),
    [
        ("dapo", "token", False, 0),  # on-policy, as TRL trains by default
        ("sapo", "sequence", True, 0),
        ("cispo", "token", True, 0),
        ("dapo", "token", True, 13),
        ("dapo", "sequence", True, 7),
    ],
)
def test_passes_over_the_tokens_for_metrics(loss, level, old, most):
    """Beside what the loss counts on its way; the KL never takes one."""
    aggregation, surrogate, epsilon_high = LOSSES[loss]
    args = SimpleNamespace(
        aggregation=aggregation, surrogate=surrogate, epsilon=0.2, epsilon_high=epsilon_high,
        delta=None, beta=0.1, importance_sampling_level=level,
    )  # fmt: skip
    log_probs, mask = torch.randn(4, 50), torch.ones(4, 50, dtype=torch.int64)
    _, metrics = dl_norm.policy_loss(
        log_probs, None, torch.ones(4), mask, torch.ones(4), return_metrics=True
    )
    inputs = {"advantages": torch.ones(4)}
    if old:
        inputs["old_per_token_logps"] = log_probs.detach() + 0.1
    with PassesOverTokens(200) as passes:
        record = loss_record(metrics, log_probs, inputs, mask, args)
    assert len(passes.names) <= most, passes.names
    assert record["token_mean", "kl"] is metrics.kl_ref

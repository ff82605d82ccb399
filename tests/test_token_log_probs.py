"""token_log_probs: right, without gradient, and on-policy the ratio is 1."""

from __future__ import annotations

import pytest
import torch

from dl_norm._rows.linear import linear_policy_loss
from dl_norm._rows.logits import logits_policy_loss
from dl_norm._rows.token_log_probs import token_log_probs

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("triton", "torch")


@pytest.fixture
def tensors(device):
    """hidden (4, 9, 16), head (64, 16), token ids, mask: V is whole 16-byte vectors."""

    def make(dtype=torch.float32):
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, 9, 16, generator=random).to(dtype)
        head = torch.randn(64, 16, generator=random).to(dtype)
        ids = torch.randint(64, (4, 9), generator=random)
        mask = torch.rand(4, 9, generator=random) < 0.7
        return [tensor.to(device) for tensor in (hidden, head, ids, mask)]

    return make


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("from_hidden", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_against_float64(tensors, impl, from_hidden, packed, softcap):
    hidden, head, ids, mask = tensors()
    logits = hidden.double() @ head.double().T
    given = hidden if from_hidden else logits.float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    wide = (logits / 0.8).log_softmax(-1)
    expected = wide.gather(-1, ids[..., None])[..., 0] * mask
    expected_entropy = -(wide.exp() * wide).sum(-1) * mask
    if packed:
        given, ids, mask = given.flatten(0, 1), ids.flatten(), mask.flatten()
        expected, expected_entropy = expected.flatten(), expected_entropy.flatten()
    options = {"chunk_size": 8, "lm_head_weight": head} if from_hidden else {}
    log_probs, entropy = token_log_probs(
        given, ids, mask=mask, temperature=0.8, logit_softcap=softcap, entropy=True, impl=impl,
        **options,
    )  # fmt: skip
    assert log_probs.dtype == torch.float32 and not log_probs.requires_grad
    assert (log_probs <= 0).all()
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [8, None])
def test_on_policy_ratio_is_one_to_the_last_bit(tensors, impl, dtype, chunk_size):
    """The same weights and the same chunks: old and new log-probs are the same bits."""
    hidden, head, ids, mask = tensors(dtype)
    old = token_log_probs(hidden, ids, head, mask=mask, chunk_size=chunk_size, impl=impl)
    per_sequence = torch.ones(4, device=ids.device)
    hidden.requires_grad_()
    _, outputs = linear_policy_loss(
        hidden, head, ids, old, per_sequence, mask, per_sequence, chunk_size=chunk_size, impl=impl,
        return_metrics=True,
    )  # fmt: skip
    assert torch.equal(outputs.log_probs, old)
    summary = outputs.metrics.summary()
    assert summary["ratio_max"] == 1 and summary["ratio_mean"] == 1
    assert summary["kl_old_k1"] == 0 and summary["clip_fraction_high"] == 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_on_policy_ratio_over_logits(tensors, impl):
    hidden, head, ids, mask = tensors(torch.bfloat16)
    logits = (hidden @ head.T).requires_grad_()
    old = token_log_probs(logits, ids, mask=mask, impl=impl)
    per_sequence = torch.ones(4, device=ids.device)
    _, outputs = logits_policy_loss(
        logits, ids, old, per_sequence, mask, per_sequence, impl=impl, return_metrics=True
    )
    assert torch.equal(outputs.log_probs, old)
    assert outputs.metrics.summary()["ratio_max"] == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 0.2)])
def test_on_policy_ratio_over_other_chunks(tensors, impl, dtype, bound):
    """Other matrix shapes may round a logit the other way: an ulp of a logit of size up to 16,
    so 2e-6 in float32 and 0.06 in bfloat16 for each of the two logits that matter most."""
    hidden, head, ids, mask = tensors(dtype)
    one = token_log_probs(hidden, ids, head, mask=mask, impl=impl)
    other = token_log_probs(hidden, ids, head, mask=mask, chunk_size=1, impl=impl)
    assert (one - other).abs().max().exp() - 1 <= bound
    exact = [
        token_log_probs(
            hidden, ids, head, mask=mask, chunk_size=size, impl=impl, fp32_logits=True
        )
        for size in (1, None)
    ]  # fmt: skip
    assert (exact[0] - exact[1]).abs().max() <= 2e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"max_tokens": 30}, {"compact": True}])
def test_compaction_without_reading_values(tensors, impl, options, monkeypatch):
    hidden, head, ids, mask = tensors()
    expected = token_log_probs(hidden, ids, head, mask=mask, impl=impl)
    monkeypatch.setattr("dl_norm._rows.chunks.values_are_free", lambda tensor: False)
    result = token_log_probs(hidden, ids, head, mask=mask, impl=impl, **options)
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)
    assert not result[~mask].any()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"bias": torch.zeros(64)}, ValueError, "bias has no effect"),
        ({"chunk_size": 8}, ValueError, "chunk_size has no effect"),
        ({"compact": True}, ValueError, "compact has no effect"),
        ({"mask": torch.ones(3)}, ValueError, "mask must be"),
        ({"temperature": -1.0}, ValueError, "temperature > 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tensors, change, error, match):
    hidden, head, ids, _ = tensors()
    with pytest.raises(error, match=match):
        token_log_probs(hidden @ head.T, ids, **change)

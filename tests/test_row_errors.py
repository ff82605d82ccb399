"""Bad input to the losses over logits and hidden states: what was expected, what came, what to do.

What check_policy_loss_inputs refuses is test_errors.py's, for the same checks; here is what these
entries add, and that they pass their tensors to those checks.
"""

from __future__ import annotations

import pytest
import torch

import dl_norm

SEQUENCES, TOKENS, SIZE, VOCABULARY = 2, 3, 4, 7
SHAPE = (SEQUENCES, TOKENS)


def valid(entry):
    """Arguments that are accepted, by name."""
    random = torch.Generator().manual_seed(0)
    given = {
        "token_ids": torch.randint(VOCABULARY, SHAPE, generator=random),
        "mask": torch.ones(SHAPE, dtype=torch.bool),
    }
    hidden = torch.randn(*SHAPE, SIZE, generator=random)
    head = torch.randn(VOCABULARY, SIZE, generator=random)
    if entry == "logits":
        given["logits"] = hidden @ head.T
    elif entry == "linear":
        given |= {"hidden": hidden, "lm_head_weight": head, "bias": torch.zeros(VOCABULARY)}
    elif entry == "log_probs of hidden":
        given |= {
            "hidden_or_logits": hidden, "lm_head_weight": head, "bias": torch.zeros(VOCABULARY)
        }  # fmt: skip
    else:
        given["hidden_or_logits"] = hidden @ head.T
    if entry in ("logits", "linear"):
        given |= {
            "old_log_probs": torch.zeros(SHAPE),
            "advantages": torch.ones(SEQUENCES),
            "weights": torch.ones(SEQUENCES),
        }
    return given


FUNCTIONS = {
    "logits": dl_norm.logits_policy_loss,
    "linear": dl_norm.linear_policy_loss,
    "log_probs of hidden": dl_norm.token_log_probs,
    "log_probs of logits": dl_norm.token_log_probs,
}
FIRST = {"logits": "logits", "linear": "hidden"}  # else hidden_or_logits


@pytest.mark.parametrize("entry", FUNCTIONS)
def test_what_the_errors_start_from_is_valid(entry):
    FUNCTIONS[entry](**valid(entry))


def packed(given):
    return {
        name: value.flatten(0, 1) if value is not None and value.shape[:2] == SHAPE else value
        for name, value in given.items()
    }


# How to change the first argument, and what is said then.
@pytest.mark.parametrize("entry", FUNCTIONS)
@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda x: x.tolist(), TypeError, "must be a tensor, got list"),
        (
            lambda x: x.double(),
            TypeError,
            r"must be float32, bfloat16 or float16; got torch.float64",
        ),
        (lambda x: x.long(), TypeError, r"got torch.int64: use .float\(\)"),
        (lambda x: x[0, 0], ValueError, r"must be \(B, T, [VD]\), or packed \(N, [VD]\)"),
        (lambda x: x[None], ValueError, r"must be \(B, T, [VD]\), or packed \(N, [VD]\)"),
        (lambda x: x[..., :0], ValueError, "> 0; got"),
    ],
)
def test_logits_and_hidden_states(entry, change, error, match):
    given = valid(entry)
    name = FIRST.get(entry, "hidden_or_logits")
    given[name] = change(given[name])
    with pytest.raises(error, match=match):
        FUNCTIONS[entry](**given)


@pytest.mark.parametrize("entry", FUNCTIONS)
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"token_ids": [[0] * 3] * 2}, TypeError, "token_ids must be a tensor, got list"),
        ({"token_ids": torch.zeros(SHAPE)}, TypeError, "int64 or int32, got torch.float32"),
        ({"token_ids": torch.zeros(2, 2).long()}, ValueError, r"token_ids must be \(2, 3\)"),
        ({"token_ids": torch.zeros(SHAPE).long().to("meta")}, ValueError, "token_ids is on meta"),
        ({"token_ids": torch.full(SHAPE, 7)}, ValueError, r"\[0, V = 7\) where mask != 0, got 7"),
        ({"token_ids": torch.full(SHAPE, -1)}, ValueError, r"where mask != 0, got -1"),
        ({"mask": [[True] * 3] * 2}, TypeError, "mask must be a tensor, got list"),
        ({"mask": torch.ones(2, 2)}, ValueError, r"mask must be \(2, 3\)"),
        ({"mask": torch.ones(SHAPE).to("meta")}, ValueError, "mask is on meta"),
        ({"temperature": 0.0}, ValueError, "temperature > 0 and finite, got temperature=0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature > 0"),
        ({"temperature": torch.ones(())}, TypeError, "temperature must be a number"),
        ({"temperature": True}, TypeError, "temperature must be a number"),
        ({"impl": "cuda"}, ValueError, "impl must be None or one of"),
    ],
)
def test_tokens_and_settings(entry, change, error, match):
    with pytest.raises(error, match=match):
        FUNCTIONS[entry](**{**valid(entry), **change})


@pytest.mark.parametrize("entry", ["linear", "log_probs of hidden"])
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"lm_head_weight": [[0.0]]}, TypeError, "lm_head_weight must be a tensor, got list"),
        ({"lm_head_weight": torch.ones(7, 4).double()}, TypeError, "the dtype of hidden"),
        ({"lm_head_weight": torch.ones(7, 4).half()}, TypeError, "under torch.autocast"),
        ({"lm_head_weight": torch.ones(7, 4).to("meta")}, ValueError, "lm_head_weight is on meta"),
        ({"lm_head_weight": torch.ones(4, 7)}, ValueError, r"must be \(V, D\) and not empty"),
        ({"lm_head_weight": torch.ones(4)}, ValueError, r"must be \(V, D\) and not empty"),
        ({"lm_head_weight": torch.ones(())}, ValueError, r"must be \(V, D\) and not empty"),
        ({"lm_head_weight": torch.ones(0, 4)}, ValueError, r"must be \(V, D\) and not empty"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"bias": torch.zeros(7).half()}, TypeError, "bias must have the dtype of hidden"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must be \(V,\)"),
        ({"bias": torch.zeros(7, 1)}, ValueError, r"bias must be \(V,\)"),
        ({"bias": torch.zeros(7).to("meta")}, ValueError, "bias is on meta, hidden on cpu"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap > 0"),
        ({"logit_softcap": "30"}, TypeError, "logit_softcap must be a number"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be at least 1, got -1"),
        ({"chunk_size": 512.0}, TypeError, "chunk_size must be an int or None, got float"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an int or None, got bool"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be at least 0, got -1"),
        ({"max_tokens": 6.0}, TypeError, "max_tokens must be an int or None, got float"),
        ({"max_tokens": 5}, ValueError, "max_tokens = 5, but 6 tokens count"),
    ],
)
def test_the_head_and_its_chunks(entry, change, error, match):
    with pytest.raises(error, match=match):
        FUNCTIONS[entry](**{**valid(entry), **change})


def test_autocast_takes_no_float64():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="dtype of hidden"):
        dl_norm.linear_policy_loss(
            **{**valid("linear"), "lm_head_weight": torch.ones(7, 4).double()}
        )


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(7)}, {"chunk_size": 8}, {"max_tokens": 8}, {"fp32_logits": True},
        {"compact": True},
    ],
)  # fmt: skip
def test_options_of_the_head_are_refused_for_logits(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} has no effect on logits"):
        dl_norm.token_log_probs(**valid("log_probs of logits"), **change)


@pytest.mark.parametrize("entry", ["logits", "linear"])
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"mask": None}, ValueError, "mask is required for padded"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "must be packed"),
        ({"advantages": None}, TypeError, "advantages must be a tensor, got None"),
        ({"weights": None}, TypeError, "weights must be a tensor, got None"),
        ({"weights": torch.ones(SHAPE)}, ValueError, r"weights must be \(B,\) = \(2,\)"),
        ({"old_log_probs": torch.zeros(2)}, ValueError, "old_log_probs must be"),
        ({"old_log_probs": torch.zeros(SHAPE).requires_grad_()}, ValueError, "requires grad"),
        ({"advantages": torch.ones(2).requires_grad_()}, ValueError, "requires grad"),
        ({"advantages": torch.ones(3)}, ValueError, "advantages must be"),
        ({"rollout_weights": torch.ones(3)}, ValueError, "rollout_weights must be"),
        ({"ref_log_probs": torch.ones(2, 2), "beta": 0.1}, ValueError, "ref_log_probs must be"),
        ({"beta": 0.1}, ValueError, "beta = 0.1 needs ref_log_probs"),
        ({"beta": -0.1}, ValueError, "beta >= 0"),
        ({"eps_low": 2.0}, ValueError, "0 <= eps_low <= 1"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip > 1"),
        ({"delta": 0.5}, ValueError, "delta > 1"),
        ({"log_ratio_clamp": 0.0}, ValueError, "log_ratio_clamp > 0"),
    ],
)
def test_tensors_and_options_of_the_loss(entry, change, error, match):
    with pytest.raises(error, match=match):
        FUNCTIONS[entry](**{**valid(entry), **change})


@pytest.mark.parametrize("entry", ["logits", "linear"])
@pytest.mark.parametrize(
    "offsets, error, match",
    [
        (None, ValueError, "no cu_seqlens"),
        ([0, 3, 6], TypeError, "cu_seqlens must be a tensor"),
        (torch.tensor([0.0, 3.0, 6.0]), TypeError, "cu_seqlens must be int32 or int64"),
        (torch.tensor([0, 3, 5]), ValueError, "must rise from 0 to N = 6"),
        (torch.tensor([0, 4, 3, 6]), ValueError, "without falling"),
    ],
)
def test_offsets(entry, offsets, error, match):
    with pytest.raises(error, match=match):
        FUNCTIONS[entry](**packed(valid(entry)), cu_seqlens=offsets)


def test_in_place_off_a_vector_boundary_is_refused():
    given = valid("logits")
    storage = torch.zeros(2 * 3 * 7 + 1, requires_grad=True) * 1
    given["logits"] = storage[1:].view(2, 3, 7)
    assert given["logits"].is_contiguous()
    with pytest.raises(ValueError, match=r"multiple of 16 bytes.*an offset of 1"):
        dl_norm.logits_policy_loss(**given, in_place=True)

"""Hypothesis: no layout and no dtype of any argument changes a result.

Every tensor argument of every public function is drawn as a view (strided, offset, transposed,
expanded) of a buffer whose other entries are NaN, or a token id far outside, and the result is
compared with that of contiguous copies of the same values.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dl_norm
from dl_norm import Reject, RolloutCorrection
from dl_norm.monitor import variance_proxy

QUICK = settings(
    max_examples=25,
    deadline=None,  # interpreted Triton
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # minutes of shrinking tell little more
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
IMPLEMENTATIONS = ("triton", "torch")
LAYOUTS = ("contiguous", "strided", "offset", "transposed", "expanded")


def garbage(dtype):
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else 99


def laid_out(tensor, layout):
    """A view with these values; "expanded" repeats the first entry of the first dimension."""
    if tensor is None or tensor.ndim == 0:
        return tensor
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "contiguous":
        return tensor.contiguous()
    shape = list(tensor.shape)
    if layout == "strided":
        shape[-1] *= 2
        buffer = tensor.new_full(shape, garbage(tensor.dtype))
        view = buffer[..., ::2]
    elif layout == "offset":
        shape[-1] += 3
        buffer = tensor.new_full(shape, garbage(tensor.dtype))
        view = buffer[..., 1:-2]
    else:
        view = tensor.new_full(shape[::-1], garbage(tensor.dtype))
        view = view.permute(*reversed(range(view.ndim)))
    return view.copy_(tensor)


layouts = st.sampled_from(LAYOUTS)
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
constants = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
masks = st.sampled_from(
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32]
)


@st.composite
def problems(draw, fixed=("cu_seqlens",), expand=True):
    """Arguments of a loss by name: (as drawn, contiguous copies)."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    packed = draw(st.booleans())
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    tokens = (rows * columns,) if packed else (rows, columns)

    def random(shape, dtype):
        return torch.randn(shape, generator=seed).to(dtype)

    def either():
        return draw(st.sampled_from([(rows,), tokens]))

    kept = torch.rand(tokens, generator=seed) < 0.7
    values = {
        "log_probs": -random(tokens, draw(floats)).abs(),
        "old_log_probs": -random(tokens, draw(constants)).abs() if draw(st.booleans()) else None,
        "advantages": random(either(), draw(constants)),
        "mask": kept.to(draw(masks)),
        "weights": torch.rand(rows, generator=seed).to(
            draw(st.sampled_from([torch.float32, torch.float64]))
        ),
    }
    options = {
        "ref_log_probs": -random(tokens, draw(constants)).abs(),
        "rollout_weights": random(either(), draw(constants)).abs(),
        "entropy_mask": (torch.rand(tokens, generator=seed) < 0.6).to(draw(masks)),
        "sequence_mask": (torch.rand(rows, generator=seed) < 0.6).to(draw(masks)),
    }
    values |= {name: value for name, value in options.items() if draw(st.booleans())}
    if "rollout_weights" not in values and draw(st.booleans()):
        values["rollout_log_probs"] = -random(tokens, draw(constants)).abs()
    if packed:
        cuts = sorted(draw(st.integers(0, rows * columns)) for _ in range(rows - 1))
        offsets = torch.tensor([0, *cuts, rows * columns])
        values["cu_seqlens"] = offsets.to(draw(st.sampled_from([torch.int32, torch.int64])))
    views = {}
    for name, value in values.items():
        layout = draw(layouts)
        if layout == "expanded" and name in fixed:
            layout = "strided"
        views[name] = laid_out(value, layout)
    return views, {k: v if v is None else v.contiguous().clone() for k, v in views.items()}


def result(loss, *leaves):
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def leaf(values):
    """A leaf that keeps the layout of ``values``."""
    return values.detach().requires_grad_()


def assert_same(got, expected, rtol=1e-6, atol=1e-7):
    for mine, true in itertools.zip_longest(got, expected):
        torch.testing.assert_close(mine, true, rtol=rtol, atol=atol)


CORRECTION = RolloutCorrection("sequence", high=2.0, reject=Reject("k3", high=1.5))


def correction_of(values):
    if "rollout_log_probs" not in values:
        return {}
    # From logits without old log-probs one token at a time.
    of_token = RolloutCorrection(high=2.0)
    return {"rollout_correction": of_token if values["old_log_probs"] is None else CORRECTION}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(drawn=problems(), options=st.sampled_from(
    [{}, {"surrogate": "cispo"}, {"ratio_level": "sequence"}]
))  # fmt: skip
@QUICK
def test_policy_loss(drawn, options, impl):
    results = []
    for values in drawn:
        beta = 0.1 if "ref_log_probs" in values else 0.0
        log_probs = leaf(values["log_probs"])
        given = {**values, "log_probs": log_probs, **correction_of(values)}
        loss = dl_norm.policy_loss(**given, **options, beta=beta, impl=impl)
        results.append(result(loss, log_probs))
    assert_same(*results)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(drawn=problems(), extra=st.tuples(layouts, layouts, layouts, layouts))
@QUICK
def test_rows(drawn, extra, impl):
    """The losses over logits and hidden states, and the log-probs alone."""
    shape = drawn[0]["log_probs"].shape
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, shape, generator=seed)
    hidden = torch.randn(*shape, 4, generator=seed)
    head, bias = torch.randn(7, 4, generator=seed), torch.randn(7, generator=seed)
    views = [laid_out(t, how) for t, how in zip((ids, hidden, head, bias), extra, strict=True)]
    results = []
    for values, tensors in ((drawn[0], views), (drawn[1], [t.contiguous() for t in views])):
        given = {name: value for name, value in values.items() if name != "log_probs"}
        given |= {"beta": 0.1 if "ref_log_probs" in values else 0.0, "impl": impl}
        given |= correction_of(values)
        ids, hidden, head, bias = tensors
        leaves = leaf(hidden), leaf(head), leaf(bias)
        loss = dl_norm.linear_policy_loss(*leaves[:2], ids, bias=leaves[2], **given)
        outputs = result(loss, *leaves)
        logits = leaf(laid_out(hidden @ head.T + bias, extra[1]))
        outputs += result(dl_norm.logits_policy_loss(logits, ids, **given), logits)
        mask = given["mask"]
        outputs.append(dl_norm.token_log_probs(hidden, ids, head, bias=bias, mask=mask, impl=impl))
        outputs.append(dl_norm.token_log_probs(logits, ids, mask=mask, impl=impl))
        results.append(outputs)
    assert_same(*results, rtol=1e-5, atol=2e-6)  # a matrix product rounds by its layout


@given(drawn=problems())
@QUICK
def test_the_others(drawn):
    """What has no kernel: the reference, the loss of a whole batch, masks, the variance proxy."""
    results = []
    for values in drawn:
        packed = values.get("cu_seqlens")
        tokens = values["log_probs"], values["mask"]
        outputs = [variance_proxy(*tokens, cu_seqlens=packed)]
        outputs.append(dl_norm.sequence_lengths(values["mask"], packed))
        given = {**values, "beta": 0.1 if "ref_log_probs" in values else 0.0}
        given |= correction_of(values)
        if "rollout_log_probs" in values:
            outputs.append(
                dl_norm.rollout_mean_weight(
                    *tokens[:1], values["rollout_log_probs"], values["mask"], CORRECTION,
                    cu_seqlens=packed,
                )
            )  # fmt: skip
        outputs.append(dl_norm.reference.policy_loss(**given))
        del given["weights"]
        outputs.append(
            dl_norm.delta_l_loss(**given, alpha=1.0, max_length=9, group="local", impl="torch")
        )
        if values["old_log_probs"] is not None:
            outputs.append(
                dl_norm.off_policy_sequence_mask(
                    values["log_probs"], values["old_log_probs"], values["advantages"],
                    values["mask"], 0.1, cu_seqlens=packed,
                )
            )  # fmt: skip
        results.append(outputs)
    assert_same(*results)


# The defects that this file was written for, as they were found.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_sequence_with_a_rollout_weight(impl):
    """A micro-batch of one sequence: its (1,) value was expanded with stride 0, and read past."""
    logits = torch.arange(35.0).reshape(1, 5, 7).sin()
    loss = partial(
        dl_norm.logits_policy_loss, logits, torch.arange(5)[None], torch.full((1, 5), -2.0),
        torch.ones(1), torch.ones(1, 5), torch.ones(1),
    )  # fmt: skip
    once = loss(rollout_weights=torch.tensor([0.5]), impl=impl)
    torch.testing.assert_close(once, 0.5 * loss(impl="torch"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_an_entropy_mask_is_per_token_where_there_are_as_many_sequences(impl):
    log_probs, offsets = torch.tensor([-1.0, -2.0]), torch.tensor([0, 0, 2])
    function = dl_norm.reference.policy_loss
    if impl != "reference":
        function = partial(dl_norm.policy_loss, impl=impl)
    loss = function(
        log_probs, log_probs, torch.tensor([5.0, 1.0]), None, torch.ones(2),
        cu_seqlens=offsets, entropy_mask=torch.tensor([False, True]),
    )  # fmt: skip
    assert loss.item() == -1.0  # the second sequence's advantage, once

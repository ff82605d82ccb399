"""What a careless person or another trainer hands over: each is refused in words, or right."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import dl_norm
from dl_norm._log_probs import loss as functional

IMPLEMENTATIONS = ("triton", "torch", "reference")
LENGTHS = torch.tensor([3, 5, 1])


def call(impl="torch", **changes):
    """A loss of three sequences; every argument can be changed."""
    seed = torch.Generator().manual_seed(0)
    values = {
        "log_probs": -torch.rand(3, 5, generator=seed),
        "old_log_probs": -torch.rand(3, 5, generator=seed),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "mask": torch.arange(5) < LENGTHS[:, None],
        "weights": dl_norm.sequence_weights(LENGTHS, max_length=5),
        **changes,
    }
    if impl == "reference":
        return dl_norm.reference.policy_loss(**values)
    return dl_norm.policy_loss(**values, impl=impl)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_refused(dtype):
    """At M = 32,768 and 1,024 sequences most of them would be 0."""
    weights = dl_norm.sequence_weights(LENGTHS, max_length=5).to(dtype)
    with pytest.raises(TypeError, match=r"weights must be .* they underflow in 16 bits"):
        call(weights=weights)


def test_lengths_in_the_place_of_weights():
    with pytest.raises(TypeError, match=r"int64: of lengths make weights: sequence_weights"):
        call(weights=LENGTHS)
    with pytest.raises(ValueError, match="weights are the lengths themselves"):
        call(weights=LENGTHS.float())  # what the first message could be taken to ask for


def test_a_sequence_that_weights_of_another_mask_leave_out():
    weights = dl_norm.sequence_weights(torch.tensor([3, 0, 1]), max_length=5)
    with pytest.warns(UserWarning, match=r"sequences \[1\] have tokens that count but weight 0"):
        call(weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = torch.arange(5) < torch.tensor([3, 0, 1])[:, None]
        call(weights=weights, mask=mask)  # an empty sequence has weight 0


def test_a_micro_batch_of_one_sequence_in_delta_l_loss():
    log_probs = -torch.rand(1, 4)
    given = log_probs, log_probs, torch.ones(1), torch.ones(1, 4)
    with pytest.warns(UserWarning, match="delta_l_loss got one sequence. If it is a micro-batch"):
        dl_norm.delta_l_loss(*given, alpha=1.0, max_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dl_norm.delta_l_loss(*given, alpha=1.0, max_length=8, group="local")


# -- masks ----------------------------------------------------------------------------------------

BAD_MASKS = {
    "additive": (torch.tensor([0.0, -math.inf]), "an additive attention mask"),
    "nan": (torch.tensor([1.0, math.nan]), "nan"),
    "labels": (torch.tensor([17, -100]), "labels"),
    "negative": (torch.tensor([1, -1], dtype=torch.int8), "-1"),
}


@pytest.mark.parametrize("name", ["mask", "entropy_mask"])
@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_mask_that_is_none(kind, name):
    values, message = BAD_MASKS[kind]
    bad = values[(torch.arange(15) == 7).long()].reshape(3, 5)
    with pytest.raises(ValueError, match=f"^{name} must be 0 where .*{message}.*bool mask"):
        call(**{name: bad})
    if name == "mask":
        ids, weights = torch.zeros(3, 5, dtype=torch.int64), torch.ones(3)
        for function in (
            lambda: dl_norm.delta_l_loss(
                -torch.rand(3, 5), None, torch.ones(3), bad, alpha=1.0, max_length=5
            ),
            lambda: dl_norm.logits_policy_loss(
                torch.rand(3, 5, 7), ids, None, torch.ones(3), bad, weights
            ),
            lambda: dl_norm.token_log_probs(torch.rand(3, 5, 7), ids, mask=bad),
        ):
            with pytest.raises(ValueError, match="mask must be 0 where"):
                function()


def test_a_mask_that_is_a_list():
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        dl_norm.delta_l_loss(
            -torch.rand(1, 2), None, torch.ones(1), [[1, 1]], alpha=1.0, max_length=5
        )


# -- shapes, numbers, names -----------------------------------------------------------------------


def test_a_column_names_the_squeeze():
    with pytest.raises(ValueError, match=r"got \(3, 1\): pass advantages.squeeze\(-1\)"):
        call(advantages=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"got \(3, 1\): pass weights.squeeze\(-1\)"):
        call(weights=torch.ones(3, 1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_numbers_of_numpy(impl):
    options = {"eps_high": 0.25, "dual_clip": 3, "beta": 0.5, "log_ratio_clamp": 10}
    reference = {"ref_log_probs": -torch.ones(3, 5)}
    expected = call(impl, **options, **reference)
    given = {name: np.float32(value) for name, value in options.items()}
    given["dual_clip"] = np.int64(3)
    assert torch.equal(call(impl, **given, **reference), expected)
    weights = dl_norm.sequence_weights(LENGTHS, alpha=np.float64(0.5), max_length=np.int64(5))
    assert torch.equal(weights, dl_norm.sequence_weights(LENGTHS, alpha=0.5, max_length=5))


def test_alpha_that_is_a_string_is_named():
    with pytest.raises(TypeError, match=r"alpha must be a number, got str: '0.75'"):
        dl_norm.sequence_weights(LENGTHS, alpha="0.75", max_length=5)


@pytest.mark.parametrize("name", ["return_metrics", "bias_corrected_kl"])
def test_a_flag_that_is_none(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got str: 'yes'"):
        call(**{name: "yes"})


def test_triton_without_triton(monkeypatch):
    monkeypatch.setattr("dl_norm._device.HAS_TRITON", False)
    with pytest.raises(ValueError, match='impl="triton" needs Triton, which is not installed'):
        call("triton")


def test_sparse_input():
    with pytest.raises(TypeError, match=r"log_probs must be a dense tensor.*to_dense"):
        call(log_probs=torch.rand(3, 5).to_sparse())


# -- the default dtype ----------------------------------------------------------------------------


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


OPTIONS = [
    {"dual_clip": 3.0, "beta": 0.1, "eps_low": 0.123},
    {"surrogate": "cispo", "eps_low": 0.123},
    {"surrogate": "sapo", "sapo_temperature_neg": 1.07},
    {"ratio_level": "sequence", "bias_corrected_kl": True, "beta": 0.1},
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_default_dtype_changes_nothing(options, impl, default_dtype):
    """A bound was rounded to it: 0.80078 in the place of 0.8, and another gradient."""
    seed = torch.Generator().manual_seed(3)
    log_probs = -torch.rand(3, 5, generator=seed)
    ref = {"ref_log_probs": -torch.rand(3, 5, generator=seed)} if "beta" in options else {}
    tensors = {"advantages": torch.tensor([1.0, -1.0, 0.5]), **ref}
    tensors["rollout_weights"] = torch.rand(3, generator=seed)
    old = log_probs + torch.tensor([0.0, 0.05, -0.2, 0.131, -0.131])
    weights = dl_norm.sequence_weights(LENGTHS, alpha=0.7, max_length=5)
    mask = torch.arange(5) < LENGTHS[:, None]
    results = []
    for dtype in (torch.float32, default_dtype):
        torch.set_default_dtype(dtype)
        leaf = log_probs.clone().requires_grad_()
        loss, metrics = call(
            impl, log_probs=leaf, old_log_probs=old, weights=weights, mask=mask,
            return_metrics=True, **tensors, **options,
        )  # fmt: skip
        loss.backward()
        results.append([loss, leaf.grad, *vars(metrics).values()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_default_dtype_changes_nothing_in_the_heads(impl, default_dtype):
    seed = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(3, 5, 4, generator=seed), torch.randn(7, 4, generator=seed)
    ids = torch.randint(7, (3, 5), generator=seed)
    old = -2 - torch.rand(3, 5, generator=seed)
    constants = old, torch.tensor([1.0, -1.0, 0.5]), torch.arange(5) < LENGTHS[:, None]
    results = []
    for dtype in (torch.float32, default_dtype):
        torch.set_default_dtype(dtype)
        weights = dl_norm.sequence_weights(LENGTHS, alpha=0.7, max_length=5)
        leaf = hidden.clone().requires_grad_()
        loss, outputs = dl_norm.linear_policy_loss(
            leaf, head, ids, *constants, weights, temperature=0.9, logit_softcap=5.0,
            return_metrics=True, entropy=True, impl=impl,
        )  # fmt: skip
        loss.backward()
        results.append([loss, leaf.grad, outputs.entropy, *vars(outputs.metrics).values()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# -- metrics of positions that do not count -------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_masked_position_is_not_clipped(impl):
    """An upper bound below 1 leaves out the ratio 1 that a masked position has."""
    options = {"surrogate": "cispo", "eps_low": 0.5, "eps_high": -0.1}
    old = torch.full((3, 5), -0.5)
    _, metrics = call(
        impl, log_probs=old.clone(), old_log_probs=old, return_metrics=True, **options
    )
    assert metrics.clipped_high.item() == 4 and metrics.clipped_dual.item() == 5


# -- transforms and tensors without values --------------------------------------------------------


def test_torch_func_is_told_where_to_go():
    function = torch.func.grad(lambda log_probs: call(log_probs=log_probs))
    with pytest.raises(RuntimeError, match=r"cannot run under torch.func.*reference.policy_loss"):
        function(-torch.rand(3, 5))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_batched_gradients_are_told_where_to_go(impl):
    leaf = (-torch.rand(3, 5)).requires_grad_()
    loss = call(impl, log_probs=leaf)
    with pytest.raises(RuntimeError, match="one gradient at a time, not is_grads_batched=True"):
        torch.autograd.grad(loss, leaf, torch.ones(2), is_grads_batched=True)


def test_export_says_what_to_do():
    module = dl_norm.DeltaLLoss(max_length=5)
    arguments = -torch.rand(3, 5), None, torch.ones(3), torch.ones(3, 5)
    with pytest.raises(Exception, match="DeltaLLoss cannot be exported"):
        torch.export.export(module, arguments)


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_tensors_without_values(mode):
    """Shapes flow through every function, forward and backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(make):
        log_probs = make(3, 5).requires_grad_()
        mask = make(3, 5) > 0.5
        weights = dl_norm.sequence_weights(dl_norm.sequence_lengths(mask), max_length=5)
        loss = functional.policy_loss(log_probs, make(3, 5), make(3), mask, weights, impl="torch")
        loss.backward()
        hidden, head = make(3, 5, 4).requires_grad_(), make(7, 4).requires_grad_()
        ids = (make(3, 5) * 7).long()
        head_loss = dl_norm.linear_policy_loss(
            hidden, head, ids, make(3, 5), make(3), mask, weights, impl="torch"
        )
        head_loss.backward()
        assert loss.shape == head_loss.shape == ()
        assert log_probs.grad.shape == (3, 5) and hidden.grad.shape == (3, 5, 4)
        assert head.grad.shape == (7, 4)

    if mode == "meta":
        run(lambda *shape: torch.rand(*shape, device="meta"))
    else:
        with FakeTensorMode():
            run(torch.rand)

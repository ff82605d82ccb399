"""The entropy in the loss over rows of logits, and sum p^2 beside it, against float64 autograd.

Budget: that of test_logits.py, 3e-6 of the largest gradient and of the sum of absolute terms of the
loss; 16-bit gradients add one rounding.
"""

from __future__ import annotations

import numpy
import pytest
import torch

import dl_norm

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("triton", "torch")
BUDGET = 3e-6
ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SIZE, TOKENS, VOCABULARY = 6, 4, 37


def make_batch(device, *, packed=False, dtype=torch.float32, vocabulary=VOCABULARY, weighted=None):
    """``weighted``: entropy weights of their own, by "sequence" or by "token"."""
    random = torch.Generator().manual_seed(3)
    shape = (3, TOKENS)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    given = {
        "logits": (2 * torch.randn(*shape, vocabulary, generator=random)).to(dtype),
        "token_ids": torch.randint(vocabulary, shape, generator=random),
        "old_log_probs": -4 + 0.3 * torch.randn(shape, generator=random),
        "advantages": torch.tensor([1.0, -0.5, 0.0]),  # one without a policy term
        "mask": mask,
        "weights": torch.tensor([0.02, 0.05, 0.01]),
    }
    if weighted == "sequence":
        given["entropy_weights"] = torch.tensor([0.03, 0.01, 0.04])
    if weighted == "token":  # a mask of high entropy leaves some out
        given["entropy_weights"] = torch.rand(shape, generator=random) / 20
        given["entropy_weights"][:, 0] = 0.0
    if packed:
        given = {n: t.flatten(0, 1) if t.ndim > 1 else t for n, t in given.items()}
        given["cu_seqlens"] = torch.arange(4) * TOKENS
    return {name: tensor.to(device) for name, tensor in given.items()}


def truth(batch, coef, *, temperature=1.0, softcap=None, upstream=1.0, **options):
    """Loss, gradient, entropy, sum of squares, scale of the loss; in float64."""
    batch = dict(batch)
    logits = batch.pop("logits").double().requires_grad_()
    ids, entropy_weights = batch.pop("token_ids"), batch.pop("entropy_weights", None)
    z = logits if softcap is None else softcap * (logits / softcap).tanh()
    log_p = (z / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    loss = dl_norm.reference.policy_loss(
        log_p.gather(-1, ids[..., None])[..., 0], **batch, **options
    )
    weights = batch["weights"] if entropy_weights is None else entropy_weights
    if weights.shape != ids.shape:
        weights = weights.repeat_interleave(TOKENS).view(ids.shape)
    bonus = coef * (weights.double() * batch["mask"] * entropy).sum()
    (loss - bonus).backward(torch.full_like(loss, upstream))
    scale = bonus.item() + batch["weights"].sum().item() * TOKENS
    squares = log_p.exp().square().sum(-1)
    return (loss - bonus).detach(), logits.grad, entropy.detach(), squares.detach(), scale


def run(batch, impl, coef, *, upstream=1.0, **options):
    batch = dict(batch)
    logits = batch.pop("logits").clone().requires_grad_()
    given = logits * 1 if options.get("in_place") else logits
    result = dl_norm.logits_policy_loss(given, **batch, entropy_coef=coef, impl=impl, **options)
    loss, *outputs = result if isinstance(result, tuple) else (result,)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), logits.grad, *outputs


def check(got, expected, dtype=torch.float32, smallest=0.0):
    """``smallest``: a gradient to which errors are compared where the true one is smaller."""
    loss, grad = got[:2]
    true_loss, true_grad, *_, scale = expected
    assert abs(loss.double() - true_loss) <= BUDGET * scale
    excess = (grad.double() - true_grad).abs() - ULP[dtype] * true_grad.abs()
    if dtype == torch.float16:
        excess -= 2.0**-24
    assert excess.max() <= BUDGET * max(true_grad.abs().max().item(), smallest)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [None, "sequence", "token"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"in_place": True}], ids=str)
def test_few_cases_against_float64(impl, packed, weighted, options, device, poison_empty):
    batch = make_batch(device, packed=packed, weighted=weighted)
    temperature = {n: v for n, v in options.items() if n == "temperature"}
    check(run(batch, impl, 0.3, **options), truth(batch, 0.3, **temperature))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 1003, 49152, 60001])
def test_shapes_and_dtypes(impl, dtype, vocabulary, device):
    batch = make_batch(device, dtype=dtype, vocabulary=vocabulary)
    upstream = 2.0**16
    got = run(batch, impl, 0.5, upstream=upstream, entropy=True, sum_sq_probs=True)
    _, grad, entropy, squares, scale = expected = truth(batch, 0.5, upstream=upstream)
    counted = batch["mask"]
    assert got[1][2][counted[2]].any() or vocabulary == 1, "advantage 0 has the entropy's gradient"
    # Of one token log p and H are 0, and their rounding errors need not be.
    smallest = upstream * 0.5 * batch["weights"].max().item() if vocabulary == 1 else 0.0
    check(got, (expected[0], grad, scale), dtype, smallest)
    for ours, true in ((got[2].entropy, entropy), (got[2].sum_sq_probs, squares)):
        assert not ours[~counted].any()
        torch.testing.assert_close(ours[counted].double(), true[counted], rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_bonus_with_everything_else(impl, device):
    batch = make_batch(device, weighted="token")
    batch["ref_log_probs"] = batch["old_log_probs"] + 0.2
    batch["entropy_mask"] = batch["token_ids"] % 2 == 0
    options = {"surrogate": "cispo", "beta": 0.2}
    metrics = run(batch, impl, 0.0, **options, return_metrics=True)[2].metrics.summary()
    got = run(batch, impl, 0.1, **options, return_metrics=True)
    check(got, truth(batch, 0.1, **options))
    for name, value in got[2].metrics.summary().items():
        assert value == metrics[name], "metrics are those of the policy"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 8}, {"compact": True}], ids=str)
def test_from_hidden_states(impl, softcap, options, device):
    batch = make_batch(device, weighted="sequence")
    random = torch.Generator().manual_seed(8)
    hidden = torch.randn(3, TOKENS, SIZE, generator=random).to(device)
    head = torch.randn(VOCABULARY, SIZE, generator=random).to(device)
    given = {**batch, "logits": hidden @ head.T}
    expected = truth(given, 0.3, temperature=0.8, softcap=softcap)
    wanted = (
        expected[1] @ head.double(),
        expected[1].flatten(0, 1).T @ hidden.double().flatten(0, 1),
    )
    del batch["logits"]
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = dl_norm.linear_policy_loss(
        *leaves, **batch, entropy_coef=0.3, temperature=0.8, logit_softcap=softcap, chunk_size=3,
        impl=impl, **options,
    )  # fmt: skip
    loss.backward()
    assert abs(loss.double() - expected[0]) <= BUDGET * expected[-1]
    for leaf, true in zip(leaves, wanted, strict=True):
        assert (leaf.grad.double() - true).abs().max() <= 5e-6 * true.abs().max()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_certain_tokens_and_impossible_ones(impl, device):
    """Entropy 0 has gradient 0, and a logit of -inf none: nothing is NaN."""
    batch = make_batch(device)
    logits = torch.full_like(batch["logits"], float("-inf"))
    logits.scatter_(-1, batch["token_ids"][..., None], 1.0)
    logits[0, 0, :2] = 3.0
    batch["logits"] = logits
    _, grad, outputs = run(batch, impl, 0.5, entropy=True, sum_sq_probs=True)
    assert grad.isfinite().all() and outputs.entropy.isfinite().all()
    rest = torch.cat([grad[0, 1:].flatten(), grad[1:].flatten()])
    assert not rest.any()
    assert outputs.sum_sq_probs[2].tolist() == [1.0] * TOKENS


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_reference_that_is_far_off(impl, device):
    """One logit, not among the first, so far above these that sums relative to these are near the
    largest number: those of the entropy and of the squares are beyond it."""
    batch = make_batch(device, vocabulary=20000)
    batch["logits"][..., 17001] = 88.0 + batch["logits"][..., :17000].amax(-1)
    batch["logits"][0, 0, 17002] = batch["logits"][0, 0, 17001] - 1.0
    got = run(batch, impl, 0.5, entropy=True, sum_sq_probs=True)
    _, grad, entropy, squares, scale = expected = truth(batch, 0.5)
    check(got, (expected[0], grad, scale + 88))
    counted = batch["mask"]
    torch.testing.assert_close(
        got[2].entropy[counted].double(), entropy[counted], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        got[2].sum_sq_probs[counted].double(), squares[counted], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_token_log_probs(impl, device):
    batch = make_batch(device)
    logits, ids, mask = batch["logits"], batch["token_ids"], batch["mask"]
    *_, squares, _ = truth(batch, 0.0, temperature=0.8)
    call = {"mask": mask, "temperature": 0.8, "impl": impl}
    log_probs, got = dl_norm.token_log_probs(logits, ids, sum_sq_probs=True, **call)
    three = dl_norm.token_log_probs(logits, ids, sum_sq_probs=True, entropy=True, **call)
    assert torch.equal(three[0], log_probs) and torch.equal(three[2], got)
    torch.testing.assert_close(got[mask].double(), squares[mask], rtol=1e-6, atol=0)
    # The squared norm of the score at the logits / temperature, by its definition.
    score = -(logits / 0.8).softmax(-1)
    score.scatter_add_(-1, ids[..., None], torch.ones_like(score[..., :1]))
    norm = score.square().sum(-1)[mask]
    torch.testing.assert_close((1 - 2 * log_probs.exp() + got)[mask], norm, rtol=1e-5, atol=1e-6)


def test_by_finite_differences(device):
    """The formula of the gradient itself, in NumPy."""
    batch = make_batch(device, weighted="sequence")
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    _, grad = run(batch, "torch", 0.7, temperature=0.6)
    z = batch["logits"].cpu().double().numpy() / 0.6
    p = numpy.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * numpy.log(p)).sum(-1, keepdims=True)
    weights = (batch["entropy_weights"][:, None] * batch["mask"]).cpu().double().numpy()[..., None]
    wanted = 0.7 * weights * p * (numpy.log(p) + entropy) / 0.6
    numpy.testing.assert_allclose(grad.cpu().numpy(), wanted, rtol=0, atol=3e-6 * abs(wanted).max())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_coefficient_of_zero_is_the_loss_without(impl, device):
    batch = make_batch(device, weighted="token")
    with_zero = run(batch, impl, 0.0)
    del batch["entropy_weights"]
    without = run(batch, impl, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(with_zero, without, strict=True))


@pytest.mark.parametrize("coef", [0.1, 0.0])
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"entropy_coef": -0.1}, ValueError, "entropy_coef >= 0"),
        ({"entropy_coef": torch.tensor(0.1)}, TypeError, "entropy_coef must be a number"),
        (
            {"entropy_weights": torch.ones(2)},
            ValueError,
            r"entropy_weights must be \(G,\) = \(3,\)",
        ),
        ({"entropy_weights": torch.ones(3, dtype=torch.bool)}, TypeError, "a mask is to be"),
        ({"entropy_weights": [1.0] * 3}, TypeError, "entropy_weights must be a tensor"),
        ({"entropy_weights": torch.ones(3).requires_grad_()}, ValueError, "is a constant"),
    ],
)
def test_errors(coef, change, error, match):
    batch = make_batch(torch.device("cpu"))
    with pytest.raises(error, match=match):
        dl_norm.logits_policy_loss(**{**batch, "entropy_coef": coef, **change})


def test_policy_loss_has_no_entropy(device):
    batch = make_batch(device)
    with pytest.raises(TypeError, match="entropy_coef"):
        dl_norm.policy_loss(
            batch["old_log_probs"], None, *(batch[n] for n in ("advantages", "mask", "weights")),
            entropy_coef=0.1,
        )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_in_one_graph(impl, device):
    """And another coefficient does not compile again."""
    torch._dynamo.reset()
    batch = make_batch(device, weighted="token")
    del batch["logits"]
    hidden = torch.randn(3, TOKENS, SIZE, device=device)
    head = torch.randn(VOCABULARY, SIZE, device=device, requires_grad=True)

    def step(head, coef):
        log_probs, squares = dl_norm.token_log_probs(
            hidden, batch["token_ids"], head, mask=batch["mask"], sum_sq_probs=True, impl=impl
        )
        loss, outputs = dl_norm.linear_policy_loss(
            hidden, head, **batch, entropy_coef=coef, sum_sq_probs=True, impl=impl
        )
        return loss, outputs.sum_sq_probs, log_probs, squares

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for coef in (0.1, 0.2):
        compiled(head, coef)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for coef in (0.3, 0.05):
            got, expected = compiled(head, coef), step(head, coef)
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
            grads = [torch.autograd.grad(loss[0], head)[0] for loss in (got, expected)]
            torch.testing.assert_close(*grads)

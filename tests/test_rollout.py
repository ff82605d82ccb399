"""Rollout correction: weights made of old and rollout log-probs, in every implementation.

The truth is the reference in float64. Budgets as in test_variants.py: float32 against float64.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys

import pytest
import torch

import dl_norm
from dl_norm import Reject, RolloutCorrection
from dl_norm._log_probs import autograd
from dl_norm._options import make_token_loss

IMPLEMENTATIONS = ("triton", "torch")
NAN, INF, SENTINEL = math.nan, math.inf, -9999.0
GEOMETRIC_DECIDES = RolloutCorrection(reject=Reject("k1", "mean", 0.96, 1.04), unscored=SENTINEL)
CORRECTIONS = {
    "token truncate": RolloutCorrection(high=1.2),
    "token mask": RolloutCorrection(mode="mask", low=0.8, high=1.3, unscored=SENTINEL),
    "sequence truncate": RolloutCorrection("sequence", low=0.5, high=2.0),
    "sequence mask": RolloutCorrection("sequence", "mask", 0.2, 3.0, unscored=SENTINEL),
    "geometric truncate": RolloutCorrection("geometric", low=0.99, high=1.01),
    "geometric mask": RolloutCorrection("geometric", "mask", 0.95, 1.05, unscored=SENTINEL),
    "geometric decides": GEOMETRIC_DECIDES,
    "veto": RolloutCorrection(veto=0.6),
    "rejections of tokens": RolloutCorrection(
        "none", reject=(Reject("k3", high=0.03), Reject("k1", low=0.8)), unscored=SENTINEL
    ),
    "rejections of sequences": RolloutCorrection(
        "sequence", high=5.0, unscored=SENTINEL,
        reject=(
            Reject("k2", "sum", high=1.0), Reject("k3", "mean", high=0.05),
            Reject("k3", "max", high=0.5), Reject("k1", "sum", 0.1, 10.0),
            Reject("k1", "max", high=4.0), Reject("k2", high=0.08),
        ),
    ),
}  # fmt: skip


class Problem:
    """Five sequences, one without a counted token, with what an engine may give for a token."""

    def __init__(self, packed: bool = False, dtype: torch.dtype = torch.float32):
        seed = torch.Generator().manual_seed(3)
        shape = (5, 19)

        def normal(scale: float) -> torch.Tensor:
            return scale * torch.randn(shape, generator=seed)

        old = -3 * torch.rand(shape, generator=seed)
        mask = torch.rand(shape, generator=seed) < 0.8
        mask[:, :4] = True
        mask[2] = False
        rollout = old + normal(0.15) + torch.tensor([0.0, 0.3, 0.0, -0.1, 0.02])[:, None]
        # Not scored, by NaN and by a number; not possible; and what does not count.
        rollout[0, 1], rollout[1, 2], rollout[3, 0] = NAN, SENTINEL, -INF
        rollout[4, 3] = old[4, 3] + 1.1
        for k, garbage in enumerate((NAN, INF, -INF, 1e30)):
            rollout[:, 4 + k :: 4] = torch.where(mask, rollout, garbage)[:, 4 + k :: 4]
        self.log_probs = (old + normal(0.2)).to(dtype)
        self.old, self.rollout, self.mask = old.to(dtype), rollout.to(dtype), mask
        self.advantages = torch.randn(5, generator=seed)
        self.weights = torch.rand(5, generator=seed) * (mask.sum(-1) > 0)
        self.cu_seqlens = None
        if packed:
            self.cu_seqlens = torch.arange(0, 5 * 19 + 1, 19)
            for name in ("log_probs", "old", "rollout", "mask"):
                setattr(self, name, getattr(self, name).reshape(-1))

    def part(self, rows: slice) -> Problem:
        """Sequences of a padded one."""
        part = copy.copy(self)
        for name in ("log_probs", "old", "rollout", "mask", "advantages", "weights"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def run(self, impl: str, with_old: bool = True, **options):
        """Loss, gradient, metrics."""
        log_probs = self.log_probs.detach().clone()
        function, more = dl_norm.reference.policy_loss, {}
        if impl == "reference":
            log_probs = log_probs.double()
        else:
            function, more = dl_norm.policy_loss, {"impl": impl}
        log_probs.requires_grad_()
        old = self.old if with_old else None
        loss, metrics = function(
            log_probs, old, self.advantages, self.mask, self.weights, cu_seqlens=self.cu_seqlens,
            **{"rollout_log_probs": self.rollout, "return_metrics": True, **options}, **more,
        )  # fmt: skip
        loss.backward()
        return loss.detach().float(), log_probs.grad.float(), metrics


def assert_same(got, expected, rtol=3e-5, atol=3e-6):
    for mine, true in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, true, rtol=rtol, atol=atol)
    mine, true = got[2].summary(), expected[2].summary()
    assert mine.keys() == true.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, true[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_value_gradient_and_metrics(name, packed, impl):
    problem = Problem(packed)
    options = {"rollout_correction": CORRECTIONS[name]}
    more = {"entropy_mask": problem.mask & (problem.advantages[0] < 9), "surrogate": "cispo"}
    for variant in (
        {},
        {"with_old": False},
        {"ratio_level": "sequence", "ref_log_probs": problem.old - 0.1, "beta": 0.1},
        {**more, "rollout_mean_weight": torch.tensor(1.7)},
    ):
        expected = problem.run("reference", **options, **variant)
        assert_same(problem.run(impl, **options, **variant), expected)
    weights = expected[2].rollout
    assert weights.weight > 0  # not all is dropped
    assert max(weights.truncated, weights.masked, weights.vetoed) > 0  # and something is done


def test_a_small_batch_by_hand():
    """Two sequences of two tokens: every number of the correction, worked out here."""
    old = torch.tensor([[-1.0, -2.0], [-1.0, -0.5]])
    d = torch.tensor([[0.5, -0.1], [0.3, NAN]])
    mask = torch.ones(2, 2, dtype=torch.bool)

    def weights(correction: RolloutCorrection):
        """Of tokens: with log_prob = old and A = 1 a term is -w."""
        log_probs = old.clone().requires_grad_()
        loss, metrics = dl_norm.policy_loss(
            log_probs, old, torch.ones(2), mask, torch.ones(2), rollout_log_probs=old - d,
            rollout_correction=correction, return_metrics=True,
        )  # fmt: skip
        loss.backward()
        return -log_probs.grad, {k: float(v) for k, v in metrics.summary().items()}

    e = math.exp
    found, seen = weights(RolloutCorrection(high=1.5))
    torch.testing.assert_close(found, torch.tensor([[1.5, e(-0.1)], [e(0.3), 1.0]]))
    total, squares = 1.5 + e(-0.1) + e(0.3) + 1, 1.5**2 + e(-0.2) + e(0.6) + 1
    expected = {
        "weight_mean": total / 4, "weight_max": 1.5, "truncated": 0.25, "masked": 0,
        "vetoed": 0, "unscored": 0.25, "ess": total**2 / squares / 4,
        "k1": -(0.5 - 0.1 + 0.3) / 3,
        "k3": (e(0.5) - 1.5 + e(-0.1) - 0.9 + e(0.3) - 1.3) / 3,
    }  # fmt: skip
    assert {k: seen[f"rollout_{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)

    for correction, rows in (
        (RolloutCorrection(mode="mask", low=0.95, high=1.4), [[0, 0], [e(0.3), 1]]),
        (RolloutCorrection("sequence"), [[e(0.4)] * 2, [e(0.3)] * 2]),
        (RolloutCorrection("geometric"), [[e(0.2)] * 2, [e(0.15)] * 2]),
        (RolloutCorrection("geometric", "mask", 0.5, 1.2), [[0, 0], [e(0.15)] * 2]),
        (RolloutCorrection(reject=Reject("k1", "mean", 0.9, 1.2)), [[0, 0], [e(0.3), 1]]),
        (RolloutCorrection(veto=0.95), [[0, 0], [e(0.3), 1]]),
        (RolloutCorrection("none", reject=Reject("k2", high=0.1)), [[0, 1], [1, 1]]),
        (RolloutCorrection("none", reject=Reject("k2", "sum", high=0.1)), [[0, 0], [1, 1]]),
        (RolloutCorrection("none", reject=Reject("k3", "max", high=0.1)), [[0, 0], [1, 1]]),
    ):
        torch.testing.assert_close(weights(correction)[0], torch.tensor(rows, dtype=torch.float32))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_weight_0_drops_the_term_whatever_its_factors_are(impl):
    """0 * inf: a token without probability, dropped by a mask, a rejection of it and a veto."""
    problem = Problem()
    problem.log_probs[3, 0] = -INF
    for correction in (
        RolloutCorrection(mode="mask", low=0.1, high=4.0, unscored=SENTINEL),
        RolloutCorrection(reject=Reject("k3", high=9.0), unscored=SENTINEL),
        RolloutCorrection(reject=Reject("k1", "max", high=9.0), unscored=SENTINEL),
    ):
        loss, grad, _ = problem.run(impl, rollout_correction=correction, surrogate="cispo")
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sentinel_is_found_in_16_bits(impl, dtype):
    """As the log-probs hold it: -9999 is another number there."""
    problem = Problem(dtype=dtype)
    correction = RolloutCorrection(mode="mask", low=0.8, high=1.3, unscored=SENTINEL)
    _, _, metrics = problem.run(impl, rollout_correction=correction)
    assert metrics.rollout.unscored == 2
    logits = torch.randn(5, 19, 7, requires_grad=True)
    _, seen = dl_norm.logits_policy_loss(
        logits, torch.zeros(5, 19, dtype=torch.int64), None, problem.advantages, problem.mask,
        problem.weights, rollout_log_probs=problem.rollout, rollout_correction=correction,
        return_metrics=True, impl=impl,
    )  # fmt: skip
    assert seen.metrics.rollout.unscored == 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_slices_add_up(name, impl):
    """With the mean weight of the whole batch; metrics too."""
    problem, correction = Problem(), CORRECTIONS[name]
    options = {"rollout_correction": correction}
    if correction.level != "none":
        options["rollout_mean_weight"] = dl_norm.rollout_mean_weight(
            problem.old, problem.rollout, problem.mask, correction
        )
    whole = problem.run(impl, **options)
    first, second = (problem.part(s).run(impl, **options) for s in (slice(0, 2), slice(2, 5)))
    torch.testing.assert_close(first[0] + second[0], whole[0])
    torch.testing.assert_close(torch.cat([first[1], second[1]]), whole[1])
    together = (first[2] + second[2]).summary()
    for name, value in whole[2].summary().items():
        torch.testing.assert_close(together[name], value, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_mean_weight(level, packed):
    """The mean over tokens, or over the sequences that have any, is 1 after the division."""
    problem = Problem(packed)
    correction = RolloutCorrection(level, high=1.3, reject=Reject("k3", high=0.1))
    mean = dl_norm.rollout_mean_weight(
        problem.old, problem.rollout, problem.mask, correction, cu_seqlens=problem.cu_seqlens
    )
    plain = RolloutCorrection(level, high=1.3)  # rejections come after
    options = {"ratio_level": "token", "log_ratio_clamp": None, "rollout_correction": plain}
    ones = copy.copy(problem)
    ones.log_probs, ones.advantages = ones.old, torch.ones(5)
    lengths = dl_norm.sequence_lengths(ones.mask, ones.cu_seqlens)
    used = lengths > 0
    if level == "token":
        ones.weights = used / lengths.sum()
    else:
        ones.weights = torch.where(used, 1 / (lengths * used.sum()), 0.0)
    loss = ones.run("torch", rollout_mean_weight=mean, **options)[0]
    torch.testing.assert_close(-loss, torch.tensor(1.0))
    # Nothing is left: divided by 1.
    nothing = RolloutCorrection(level, "mask", low=9.0)
    none = dl_norm.rollout_mean_weight(
        problem.old, problem.old, problem.mask, nothing, cu_seqlens=problem.cu_seqlens
    )
    assert none == 1


# -- logits and hidden states --------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "with_old"),
    [
        ("token truncate", False), ("token mask", False), ("token mask", True),
        ("sequence mask", True), ("rejections of tokens", False), ("rejections of sequences", True),
        ("geometric truncate", False), ("veto", False),
    ],
)  # fmt: skip
def test_rows(name, with_old, impl):
    """From logits and hidden states: the loss of their log-probs, or words where it cannot be."""
    problem, correction = Problem(), CORRECTIONS[name]
    seed = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 19, 6, generator=seed)
    head = torch.randn(11, 6, generator=seed)
    ids = torch.randint(11, (5, 19), generator=seed)
    old = problem.old if with_old else None
    if not with_old:
        with torch.no_grad():
            now = torch.log_softmax(hidden @ head.T, -1).gather(-1, ids[..., None])[..., 0]
        problem.rollout = problem.rollout - problem.old + now
        problem.rollout[1, 2] = SENTINEL
    arguments = (ids, old, problem.advantages, problem.mask, problem.weights)
    options = {
        "rollout_log_probs": problem.rollout, "rollout_correction": correction,
        "return_metrics": True, "surrogate": "cispo",
    }  # fmt: skip

    def run(function, *inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss, metrics = function(*leaves)
        loss.backward()
        metrics = getattr(metrics, "metrics", metrics)
        return loss.detach().float(), leaves[0].grad.float(), metrics

    def true(logits):
        log_probs = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
        return dl_norm.reference.policy_loss(log_probs, *arguments[1:], **options)

    def from_logits(logits):
        return dl_norm.logits_policy_loss(logits, *arguments, **options, impl=impl)

    def from_hidden(states, weight):
        return dl_norm.linear_policy_loss(states, weight, *arguments, **options, impl=impl)

    of_sequences = correction.level in ("sequence", "geometric") or bool(
        correction.terms().sequence_bounds
    )
    if of_sequences and not with_old:
        with pytest.raises(ValueError, match="without old_log_probs corrects by"):
            from_logits(hidden @ head.T)
        return
    assert_same(run(from_logits, hidden @ head.T), run(true, hidden @ head.T))
    if impl == "torch":  # the same pass over a chunk's logits
        assert_same(run(from_hidden, hidden, head), run(lambda h, w: true(h @ w.T), hidden, head))


def test_dropped_tokens_do_not_go_through_the_head():
    problem = Problem()
    correction = RolloutCorrection("sequence", "mask", 0.2, 3.0, unscored=SENTINEL)
    options = {"rollout_correction": correction, "surrogate": "cispo"}  # which clips no gradient
    dropped = problem.run("torch", **options)[1] == 0
    assert dropped[problem.mask].any()
    assert not dropped.all()
    hidden = torch.randn(5, 19, 6)
    hidden[dropped] = NAN  # a product with it would show
    hidden.requires_grad_()
    loss = dl_norm.linear_policy_loss(
        hidden, torch.randn(11, 6), torch.zeros(5, 19, dtype=torch.int64), problem.old,
        problem.advantages, problem.mask, problem.weights, rollout_log_probs=problem.rollout,
        **options,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


# -- operators, several processes, errors --------------------------------------------------------


@pytest.mark.parametrize("name", ["token mask", "rejections of sequences"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile(impl, name):
    problem = Problem()
    correction = CORRECTIONS[name]

    def step(log_probs, old, rollout):
        loss, metrics = dl_norm.policy_loss(
            log_probs, old, problem.advantages, problem.mask, problem.weights,
            rollout_log_probs=rollout, rollout_correction=correction, return_metrics=True,
            impl=impl,
        )  # fmt: skip
        return loss, metrics.rollout.masked

    results = []
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for function in (step, compiled):
        log_probs = problem.log_probs.clone().requires_grad_()
        loss, masked = function(log_probs, problem.old, problem.rollout)
        loss.backward()
        results.append((loss.detach(), log_probs.grad, masked))
    torch.testing.assert_close(*results)


def test_compile_rows():
    problem, correction = Problem(), CORRECTIONS["sequence mask"]

    def step(logits, old):
        return dl_norm.logits_policy_loss(
            logits, torch.zeros(5, 19, dtype=torch.int64), old, problem.advantages, problem.mask,
            problem.weights, rollout_log_probs=problem.rollout,
            rollout_correction=correction if old is not None else CORRECTIONS["token mask"],
            return_metrics=True,
        )  # fmt: skip

    logits = torch.randn(5, 19, 7)
    for old in (problem.old, None):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        (loss, seen), (expected, true) = compiled(logits, old), step(logits, old)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(seen.metrics.rollout.masked, true.metrics.rollout.masked)


def test_operator():
    """Its schema, and that it makes the records of their parts again."""
    problem = Problem()
    records = dl_norm._batch.make_batch(
        problem.log_probs,
        old_log_probs=problem.old,
        advantages=problem.advantages,
        mask=problem.mask,
        weights=problem.weights,
        rollout_log_probs=problem.rollout,
    )
    terms = make_token_loss(rollout_correction=CORRECTIONS["rejections of sequences"])
    args = autograd.policy_loss_op.arguments(records, terms, True, True)
    torch.library.opcheck(autograd.policy_loss_op.op, tuple(args))


def test_two_processes(run_ranks):
    """The mean weight and the metrics of a batch that two hold."""
    problem, correction = Problem(), RolloutCorrection(high=1.2)
    whole = dl_norm.rollout_mean_weight(problem.old, problem.rollout, problem.mask, correction)
    _, _, metrics = problem.run("torch", rollout_correction=correction)
    for mean, summary in run_ranks(__file__, 2):
        torch.testing.assert_close(mean, whole)
        for name, value in metrics.summary().items():
            torch.testing.assert_close(summary[name], value, msg=name)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RolloutCorrection("word"), ValueError, "level of a RolloutCorrection must be one"),
        (lambda: RolloutCorrection(mode="clip"), ValueError, "truncate"),
        (lambda: RolloutCorrection(low=2.0, high=1.0), ValueError, "0 <= low < high"),
        (lambda: RolloutCorrection(low=-1.0), ValueError, "0 <= low < high"),
        (lambda: RolloutCorrection(high=NAN), ValueError, "0 <= low < high"),
        (lambda: RolloutCorrection(high="2"), TypeError, "must be a number"),
        (lambda: RolloutCorrection("none", high=2.0), ValueError, "has none: drop them"),
        (lambda: RolloutCorrection(veto=2.0), ValueError, r"must be in \[0, 1\]"),
        (lambda: RolloutCorrection(reject="k1"), TypeError, "must be a dl_norm.Reject"),
        (lambda: Reject("k4", high=1.0), ValueError, "statistic of a Reject"),
        (lambda: Reject("k1", "seq", high=1.0), ValueError, "over of a Reject"),
        (lambda: Reject("k2", low=0.1), ValueError, "it has a high alone"),
        (lambda: Reject("k1"), ValueError, "rejects nothing"),
        (lambda: Reject("k1", high=0.9), ValueError, "the interval must hold 1"),
    ],
)
def test_settings_that_make_no_sense(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rollout_correction": None}, ValueError, "needs rollout_correction=RolloutCorrection"),
        ({"rollout_log_probs": None}, ValueError, "rollout_correction needs rollout_log_probs"),
        ({"rollout_correction": "token"}, TypeError, "must be a dl_norm.RolloutCorrection"),
        ({"rollout_weights": torch.ones(5)}, ValueError, "pass one of them"),
        ({"rollout_log_probs": torch.ones(5)}, ValueError, "rollout_log_probs must be"),
        ({"rollout_mean_weight": torch.ones(5)}, ValueError, "must be a 0-dim tensor"),
        ({"rollout_mean_weight": 1.0}, TypeError, "rollout_mean_weight must be a tensor"),
        (
            {"rollout_log_probs": torch.ones(5, 19, requires_grad=True)},
            ValueError,
            "rollout_log_probs requires grad",
        ),
        (
            {
                "rollout_log_probs": None, "rollout_correction": None,
                "rollout_mean_weight": torch.tensor(1.0),
            },
            ValueError,
            "divides the weights that are made of rollout_log_probs",
        ),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(changes, error, words):
    options = {"rollout_correction": RolloutCorrection(), **changes}
    with pytest.raises(error, match=words):
        Problem().run("torch", **options)


def test_metrics_of_two_kinds_do_not_add_up():
    problem = Problem()
    _, _, with_it = problem.run("torch", rollout_correction=RolloutCorrection())
    _, _, without = problem.run("torch", rollout_log_probs=None)
    assert without.rollout is None
    with pytest.raises(ValueError, match="do not add up"):
        with_it + without
    with pytest.raises(ValueError, match="has no mean"):
        dl_norm.rollout_mean_weight(
            problem.old, problem.rollout, problem.mask, RolloutCorrection("none")
        )


def test_settings_are_values():
    """Equal, hashable, picklable; NaN as the sentinel is no sentinel."""
    one, other = (RolloutCorrection(high=2, reject=[Reject("k3", high=1)]) for _ in range(2))
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert RolloutCorrection(unscored=NAN) == RolloutCorrection()
    module = dl_norm.DeltaLLoss(max_length=20, rollout_correction=one, group="local")
    problem = Problem()
    args = (problem.log_probs, problem.old, problem.advantages, problem.mask)
    assert module(*args, rollout_log_probs=problem.rollout).isfinite()


if __name__ == "__main__":  # one rank of test_two_processes
    import torch.distributed as dist

    ranks, rank, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    part = Problem().part(slice(0, 2) if rank == 0 else slice(2, 5))
    correction = RolloutCorrection(high=1.2)
    mean = dl_norm.rollout_mean_weight(
        part.old, part.rollout, part.mask, correction, group=dist.group.WORLD
    )
    metrics = part.run("torch", rollout_correction=correction)[2].all_reduce()
    torch.save((mean, metrics.summary()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_mean_weight_under_another_default_dtype(dtype):
    old = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]])
    mask = torch.tensor([[1, 1], [1, 0]])
    given = old, old - 0.25, mask, dl_norm.RolloutCorrection(high=3.0)
    expected = dl_norm.rollout_mean_weight(*given)
    torch.set_default_dtype(dtype)
    try:
        found = dl_norm.rollout_mean_weight(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and found == expected
    assert expected.item() == pytest.approx(math.exp(0.25))

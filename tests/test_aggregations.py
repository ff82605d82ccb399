# ruff: noqa: RUF001
"""The table of aggregations: its docstring, the two sides that read it, the trainers' own code.

Weights are float64 arithmetic rounded to float32, so half an ulp (6e-8) is all that may be off; the
trainers' code is float32 throughout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dl_norm
from bench import scale
from bench.lift import lift
from dl_norm import theory
from dl_norm._aggregations import AGGREGATIONS, METHODS, Method

ROOT = Path(__file__).resolve().parents[1]
GROUPED = [name for name, row in AGGREGATIONS.items() if row.takes_groups]
HALF_ULP = 6e-8
# Of each prompt another number of sequences; ids in no order; an empty sequence, an empty prompt.
LENGTHS = torch.tensor([10, 7, 0, 300, 1, 64, 64, 0, 0, 2000])
GROUPS = torch.tensor([5, -3, 5, 5, 2**60, -3, -3, 8, 8, 2**60])
ADVANTAGES = torch.tensor([0.5, -1.0, 2.0, -0.1, 0.0, 1.0, 1.0, 0.0, 3.0, 0.7])


def needs(method: str, lengths=LENGTHS, groups=GROUPS, advantages=ADVANTAGES) -> dict:
    """The arguments of a method beside the lengths."""
    row = AGGREGATIONS[method]
    given = {
        "max_length": 50 if row.takes_max_length else None,
        "groups": groups if row.takes_groups else None,
        "advantages": advantages if row.takes_advantages else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def close(got: torch.Tensor, want, rtol=HALF_ULP) -> None:
    want = torch.as_tensor(np.asarray(want), dtype=torch.float64)
    torch.testing.assert_close(got.double().cpu(), want, rtol=rtol, atol=0.0)


# -- the table and what is written about it -------------------------------------------------------


def test_the_types_name_the_rows():
    assert get_args(Method) == tuple(AGGREGATIONS)
    assert set(METHODS) | set(GROUPED) == set(AGGREGATIONS)


FORMULA = re.compile(r'- ``"(\w+)"``: x_i = ([^,.]+?)[,.]\s')


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_the_docstring_has_the_formula(method):
    """The formula of the docstring, evaluated as it stands there."""
    formulas = dict(FORMULA.findall(dl_norm.sequence_weights.__doc__))
    assert set(formulas) == set(AGGREGATIONS)
    full = LENGTHS > 0
    lengths, groups, signs = (t[full] for t in (LENGTHS, GROUPS, ADVANTAGES.sign()))
    own = (groups[:, None] == groups).double()
    same = own * (signs[:, None] == signs)
    names = {
        "L_i": lengths.double(),
        "L_j": lengths.double(),
        "alpha": 0.75,
        "M": 50.0,
        "G": float(full.sum()),
        "P": float(groups.unique().numel()),
        "G_prompt": own.sum(1),
        "G_sign": same.sum(1),
        "sum": torch.sum,
        "sum_prompt": lambda values: own @ values,
        "sum_sign": lambda values: same @ values,
    }
    want = torch.zeros(len(LENGTHS), dtype=torch.float64)
    want[full] = eval(formulas[method].replace("^", "**"), {}, names)
    alpha = {"alpha": 0.75} if method == "delta_l" else {}
    close(dl_norm.sequence_weights(LENGTHS, method, **alpha, **needs(method)), want)


def test_theory_needs_no_torch():
    """The package's own __init__ imports torch; the table and the theory do not."""
    code = (
        "import sys, types\n"
        "sys.modules['torch'] = None\n"
        "package = types.ModuleType('dl_norm'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['dl_norm'] = package\n"
        "from dl_norm import theory\n"
        "print(theory.method_statistics([10, 100], 'dapo').expectation)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "dl_norm")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(2 / 110)


# -- two sides of one table -----------------------------------------------------------------------

batches = st.integers(1, 30).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 100_000), min_size=size, max_size=size),
        st.lists(st.sampled_from([0, 1, 7, -(2**62)]), min_size=size, max_size=size),
        st.lists(st.sampled_from([-2.0, 0.0, 0.1]), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
    )
)


@given(batches, st.sampled_from(list(AGGREGATIONS)))
def test_weights_are_those_of_theory(batch, method):
    lengths, groups, advantages, keep = batch
    options = needs(method, lengths, groups, advantages)
    want = theory.sequence_weights(lengths, method, keep=keep, **options)
    tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    got = dl_norm.sequence_weights(
        torch.tensor(lengths), method, keep=torch.tensor(keep), **tensors
    )
    close(got, want)


@given(batches, st.sampled_from(list(AGGREGATIONS)), st.floats(0, 3), st.floats(-1, 3))
def test_closed_forms_are_those_of_the_weights(batch, method, alpha, beta):
    lengths, groups, advantages, keep = batch
    options = {**needs(method, lengths, groups, advantages), "alpha": alpha, "keep": keep}
    closed = theory.method_statistics(lengths, method, beta=beta, **options)
    weights = theory.sequence_weights(lengths, method, **options)
    direct = theory.aggregation_statistics(weights, theory.power_law(lengths, beta))
    for name in ("expectation", "variance", "cv"):
        want = pytest.approx(getattr(direct, name), rel=1e-12, abs=0, nan_ok=True)
        assert getattr(closed, name) == want


@pytest.mark.parametrize("method", GROUPED)
def test_sampled_gradients(method):
    random = np.random.default_rng(2)
    lengths = np.array([1, 3, 8, 8, 20, 60])
    options = {"groups": [0, 0, 1, 1, 1, 0], "advantages": [1, -1, 1, 1, -1, 1]}
    draws = 120_000
    gradients = 1.0 + np.sqrt(lengths)[:, None] * random.standard_normal((6, draws))
    batch = theory.sequence_weights(lengths, method, **options) @ gradients
    expected = theory.method_statistics(lengths, method, **options)
    assert abs(batch.mean() - expected.expectation) < 4 * np.sqrt(expected.variance / draws)
    # sqrt(2 / draws) = 0.4 %: 1.6 % is 4 standard errors.
    assert batch.var() == pytest.approx(expected.variance, rel=0.016)


def test_bias():
    """Unbiased up to a constant, E the same in every batch, exactly where p = q."""
    draw = np.random.default_rng(0)
    seen = {name: set() for name in AGGREGATIONS}
    for _ in range(5):
        lengths = draw.integers(1, 1000, 12)
        for name in AGGREGATIONS:
            options = needs(name, lengths, np.arange(12) // 4, np.tile([1.0, -1.0], 6))
            expectation = theory.method_statistics(lengths, name, **options).expectation
            seen[name].add(expectation)
    constant = {name for name, values in seen.items() if len(values) == 1}
    assert constant == {"delta_l", "dr_grpo", "luspo"}
    assert constant == {name for name, row in AGGREGATIONS.items() if row.p == row.q}


# -- identities between rows ----------------------------------------------------------------------


def test_equal_prompts_make_grpo(device):
    lengths = torch.tensor([3, 9, 100, 7, 1, 2], device=device)
    groups = torch.tensor([0, 1, 1, 0, 1, 0], device=device)
    got = dl_norm.sequence_weights(lengths, "grpo_per_prompt", groups=groups)
    close(got, dl_norm.sequence_weights(lengths, "grpo").cpu(), 2 * HALF_ULP)
    uneven = dl_norm.sequence_weights(lengths, "grpo_per_prompt", groups=groups.clamp(max=0))
    close(uneven, dl_norm.sequence_weights(lengths, "grpo").cpu(), 2 * HALF_ULP)


def test_one_prompt_of_one_sign_makes_dapo(device):
    lengths = torch.tensor([3, 9, 0, 7], device=device)
    groups = torch.full_like(lengths, 4)
    dapo = dl_norm.sequence_weights(lengths, "dapo")
    assert dl_norm.sequence_weights(lengths, "prompt_mean", groups=groups).equal(dapo)
    got = dl_norm.sequence_weights(lengths, "balanced", groups=groups, advantages=-lengths.float())
    close(got, dapo.cpu(), 2 * HALF_ULP)


def test_a_prompt_of_its_own_for_each_sequence_makes_grpo(device):
    lengths = torch.tensor([3, 9, 0, 7], device=device)
    groups = torch.arange(4, device=device)
    grpo = dl_norm.sequence_weights(lengths, "grpo")
    for method in GROUPED:
        options = needs(method, groups=groups, advantages=torch.ones(4, device=device))
        close(dl_norm.sequence_weights(lengths, method, **options), grpo.cpu(), 2 * HALF_ULP)


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_what_is_not_kept_is_not_there(method, device):
    keep = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool, device=device)
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in needs(method).items()}
    lengths = LENGTHS.to(device)
    got = dl_norm.sequence_weights(lengths, method, keep=keep, **options)
    rest = {k: v[keep] if torch.is_tensor(v) else v for k, v in options.items()}
    assert got[keep].equal(dl_norm.sequence_weights(lengths[keep], method, **rest))
    assert not got[~keep].any()
    assert lengths.equal(LENGTHS.to(device))  # and the caller's lengths are as they were


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_the_order_of_the_sequences_does_not_matter(method):
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    got = dl_norm.sequence_weights(
        LENGTHS[order], method, **needs(method, groups=GROUPS[order], advantages=ADVANTAGES[order])
    )
    want = dl_norm.sequence_weights(LENGTHS, method, **needs(method))[order]
    torch.testing.assert_close(got, want, rtol=HALF_ULP * 2, atol=0.0)


@pytest.mark.parametrize("method", AGGREGATIONS)
@pytest.mark.parametrize("size", [0, 3])
def test_nothing_counts(method, size):
    zeros = torch.zeros(size, dtype=torch.int64)
    options = needs(method, groups=zeros, advantages=zeros.float())
    assert dl_norm.sequence_weights(zeros, method, **options).equal(torch.zeros(size))


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_no_value_is_read(method):
    """Tensors without values stand for a device that must not be waited for; nor does a compiled
    graph break."""
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in needs(method).items()}
    keep = torch.ones(len(LENGTHS), dtype=torch.bool, device="meta")
    got = dl_norm.sequence_weights(LENGTHS.to("meta"), method, keep=keep, **meta)
    assert got.device.type == "meta" and got.shape == LENGTHS.shape
    compiled = torch.compile(
        lambda lengths: dl_norm.sequence_weights(lengths, method, **needs(method)),
        backend="eager",
        fullgraph=True,
    )
    assert compiled(LENGTHS).equal(dl_norm.sequence_weights(LENGTHS, method, **needs(method)))


# -- the trainers' own code -----------------------------------------------------------------------


def rollout():
    """4 prompts of 3 samples in a row, of unequal lengths, holes in the mask."""
    random = torch.Generator().manual_seed(5)
    mask = torch.rand(12, 9, generator=random) < torch.rand(12, 1, generator=random) + 0.1
    mask[torch.arange(12), torch.arange(12) % 9] = True  # none is empty
    return mask, torch.arange(4).repeat_interleave(3)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_mean", "dapo"),
        ("sequence_mean", "grpo"),
        ("seq_mean_token_sum_norm", "dr_grpo"),
        ("prompt_mean", "prompt_mean"),
    ],
)
def test_skyrl(theirs, ours):
    """SkyRL scales the advantages; of ones that leaves x_i."""
    path = ROOT / ".venv-trainers"
    if not (path / "skyrl").exists():
        pytest.skip("SkyRL is not there: bash ci/trainers_env.sh")
    module = "skyrl.backends.skyrl_train.utils.ppo_utils"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        reduce = lift(module, "apply_loss_reduction_to_advantages_minibatch", {"torch": torch})
    mask, groups = rollout()
    ones = torch.ones(mask.shape)
    got = reduce(ones, mask.float(), theirs, 4, 50, [(0, 3), (3, 6), (6, 9), (9, 12)])
    want = dl_norm.sequence_weights(mask.sum(-1), ours, **needs(ours, groups=groups))
    torch.testing.assert_close(got, want[:, None].expand_as(got), rtol=1e-6, atol=0.0)


def unsloth_sample_weight():
    """unsloth's function, out of a wheel or a clone in the folder TRAINER_SOURCES."""
    folder = Path(os.environ.get("TRAINER_SOURCES", ROOT / ".venv-trainers"))
    for root in (folder, folder / "unsloth"):
        if (root / "unsloth/models/rl_replacements.py").exists():
            break
    else:
        pytest.skip(f"unsloth is not in {folder}: see ci/trainers_env.sh")
    module = "unsloth.models.rl_replacements"
    space = {"torch": torch, "os": os}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        for name in ("_unsloth_grpo_sample_weight_mode", "_unsloth_trl_masks_unscorable"):
            space[name] = lift(module, name, space)
        return lift(module, "_unsloth_grpo_sample_weight", space)


@pytest.mark.parametrize("exclude", [False, True], ids=["all", "zero variance left out"])
@pytest.mark.parametrize(("aggregation", "ours"), [("prompt", "prompt_mean"), ("", "dapo")])
def test_unsloth(aggregation, ours, exclude, monkeypatch):
    sample_weight = unsloth_sample_weight()
    monkeypatch.setenv("UNSLOTH_GRPO_LOSS_AGGREGATION", aggregation)
    monkeypatch.setenv("UNSLOTH_GRPO_ZERO_VARIANCE_EXCLUDE", "1" if exclude else "0")
    mask, groups = rollout()
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0])
    trainer = SimpleNamespace(
        args=SimpleNamespace(loss_type="dapo"),
        num_generations=3,
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        reward_weights=torch.ones(1),
        _metrics={"train": {"frac_reward_zero_std_excluded": []}},
    )
    got = sample_weight(trainer, "train", rewards[:, None], mask.long(), None, slice(None))
    if not aggregation and not exclude:
        assert got is None  # off: the trainer's own dapo
        return
    spread = rewards.view(4, 3).amax(1) - rewards.view(4, 3).amin(1)
    keep = (spread > 1e-6).repeat_interleave(3) if exclude else None
    want = dl_norm.sequence_weights(mask.sum(-1), ours, keep=keep, **needs(ours, groups=groups))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)


# -- a constant that keeps a scale ----------------------------------------------------------------


def test_reference_lengths_are_the_means():
    lengths = torch.tensor([10, 100, 0, 1000])
    assert dl_norm.reference_length(lengths) == pytest.approx(3 / 0.111, rel=1e-7)
    assert dl_norm.reference_length(lengths, like="dapo") == pytest.approx(370, rel=1e-7)
    assert dl_norm.reference_length(lengths, like="luspo") == pytest.approx(1, rel=1e-7)
    assert type(dl_norm.reference_length(lengths)) is float


@pytest.mark.parametrize("like", [m for m, row in AGGREGATIONS.items() if not row.takes_max_length])
def test_a_reference_length_keeps_the_scale(like):
    options = needs(like)
    constant = dl_norm.reference_length(LENGTHS, like=like, **options)
    for alpha in (0.0, 0.75, 1.0):
        got = dl_norm.sequence_weights(LENGTHS, alpha=alpha, max_length=constant).sum()
        want = dl_norm.sequence_weights(LENGTHS, like, **options).sum()
        torch.testing.assert_close(got, want, rtol=2e-7, atol=0.0)


def test_a_reference_length_of_each_batch_is_grpo_again():
    """What the docstring warns of; one reference for all batches is unbiased."""
    reference = dl_norm.reference_length(torch.tensor([30, 40]))
    for lengths in (torch.tensor([10, 100, 1000]), torch.tensor([5, 5])):
        own = dl_norm.reference_length(lengths)
        got = dl_norm.sequence_weights(lengths, max_length=own)
        close(got, dl_norm.sequence_weights(lengths, "grpo"), 3 * HALF_ULP)
        once = dl_norm.sequence_weights(lengths, max_length=reference)
        assert once.sum().item() == pytest.approx(1 / reference, rel=2e-7)


def test_reference_length_refuses():
    for like in ("delta_l", "dr_grpo"):
        with pytest.raises(ValueError, match=f"like='{like}' has a max_length.*pass the same"):
            dl_norm.reference_length(LENGTHS, like=like)
    with pytest.raises(ValueError, match="no token"):
        dl_norm.reference_length(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs groups"):
        dl_norm.reference_length(LENGTHS, like="prompt_mean")


def test_the_scale_table_of_the_page():
    """As its command prints it; and what it says is so of the weights themselves."""
    page = (ROOT / "dl_norm" / "weights" / "README.md").read_text()
    assert scale.table() in page
    lengths = scale.lognormal_lengths(3072, 745, 0.8)
    assert lengths.max() == 3072 and lengths.mean() == pytest.approx(745, abs=0.5)
    low, high = np.log(np.quantile(lengths, [0.25, 0.75]))
    assert (high - low) / 1.349 == pytest.approx(0.8, abs=0.01)  # the cut is beyond the quartiles
    sums = {
        method: dl_norm.sequence_weights(
            torch.tensor(lengths).long(), method, max_length=3072 if method == "delta_l" else None
        ).sum()
        for method in ("delta_l", "grpo", "dapo")
    }
    row = f"{sums['dapo'] / sums['delta_l']:.1f}× | 5.3× | {sums['grpo'] / sums['delta_l']:.1f}×"
    assert f"| 3,072 | 745 | {row} |" in page


def test_the_scale_command(capsys, monkeypatch):
    row = ["--max-length", "3072", "--mean", "745", "--sigma", "0.8"]
    monkeypatch.setattr(sys, "argv", ["scale", *row])
    scale.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| 3,072 | 745 | 4.1× | 7.6× |"
    for wrong in (row[:2], [*row[:3], "5000"], [*row[:3], "0"]):
        monkeypatch.setattr(sys, "argv", ["scale", *wrong])
        with pytest.raises(SystemExit):
            scale.main()
        assert "error: " in capsys.readouterr().err


# -- errors ---------------------------------------------------------------------------------------

IDS = torch.tensor([1, 1])
BAD = [
    ("bnpo", {}, ValueError, "'bnpo': it divides .* each micro-batch.*'dapo' is the token mean"),
    ("token-mean", {}, ValueError, "got 'token-mean': that is 'dapo' here"),
    (None, {}, ValueError, "method must be one of delta_l.*got None"),
    (["grpo"], {}, ValueError, "method must be one of"),
    ("prompt_mean", {}, ValueError, r"method='prompt_mean' needs groups: the \(G,\) ids"),
    ("balanced", {"groups": IDS}, ValueError, "method='balanced' needs advantages"),
    ("dapo", {"groups": IDS}, ValueError, "groups have no effect on method='dapo'; omit them"),
    ("prompt_mean", {"groups": IDS, "advantages": torch.ones(2)}, ValueError,
     "advantages have no effect on method='prompt_mean'"),
    ("prompt_mean", {"groups": IDS, "max_length": 3}, ValueError, "max_length=3 has no effect"),
    ("prompt_mean", {"groups": IDS, "alpha": 0.5}, ValueError, "alpha=0.5 has no effect"),
    ("prompt_mean", {"groups": [1, 1]}, TypeError, "groups must be a tensor, got list"),
    ("prompt_mean", {"groups": IDS.float()}, TypeError, "groups must be integer ids.*float32"),
    ("prompt_mean", {"groups": IDS.bool()}, TypeError, "groups must be integer ids.*bool"),
    ("prompt_mean", {"groups": IDS[:1]}, ValueError, r"must be \(G,\) = \(2,\), got \(1,\)$"),
    ("prompt_mean", {"groups": IDS[:, None]}, ValueError, r"got \(2, 1\): pass groups.squeeze"),
    ("prompt_mean", {"groups": IDS.to("meta")}, ValueError, "groups is on meta, lengths on cpu"),
    ("balanced", {"groups": IDS, "advantages": torch.ones(2, 1)}, ValueError,
     r"\(2, 1\): pass advantages.squeeze\(-1\)"),
    ("balanced", {"groups": IDS, "advantages": torch.ones(2, 5)}, ValueError, r"got \(2, 5\)$"),
    ("balanced", {"groups": IDS, "advantages": torch.tensor([1.0, torch.nan])}, ValueError,
     "a sign where there are tokens, got NaN"),
    ("balanced", {"groups": IDS, "advantages": IDS > 0}, TypeError, "real numbers, got torch.bool"),
    ("dapo", {"keep": torch.tensor([1, 0])}, TypeError, "keep must be a bool tensor.*keep != 0"),
    ("dapo", {"keep": torch.tensor([True])}, ValueError, r"keep must be \(G,\) = \(2,\)"),
    ("dapo", {"keep": [True, False]}, TypeError, "keep must be a tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "error", "message"), BAD)
def test_refused(method, options, error, message):
    with pytest.raises(error, match=message):
        dl_norm.sequence_weights(torch.tensor([3, 1]), method, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "prompt_mean"}, ValueError, "prompt mean needs groups"),
        ({"method": "balanced", "groups": [1, 1]}, ValueError, "Balanced needs advantages"),
        ({"method": "prompt_mean", "groups": [1]}, ValueError, "groups must be one per length"),
        ({"method": "bnpo"}, ValueError, "'dapo' is the token mean"),
        ({"keep": [1, 0]}, ValueError, "keep must be True or False per sequence, got int64"),
        ({"method": "balanced", "groups": [1, 1], "advantages": [1.0, np.nan]}, ValueError, "nan"),
        ({"alpha": "0.75"}, TypeError, "alpha must be a number, got str: '0.75'"),
        ({"max_length": True}, TypeError, "max_length must be a number, got bool"),
    ],
)
@pytest.mark.parametrize("function", [theory.sequence_weights, theory.method_statistics])
def test_theory_refuses(function, options, error, message):
    with pytest.raises(error, match=message):
        function([3, 1], **options)


def test_advantages_of_what_does_not_count_may_be_anything():
    advantages = torch.tensor([1.0, torch.nan, -1.0, torch.nan])
    keep = torch.tensor([True, True, True, False])
    got = dl_norm.sequence_weights(
        torch.tensor([4, 0, 6, 3]), "balanced", groups=torch.zeros(4, dtype=torch.int32),
        advantages=advantages, keep=keep,
    )  # fmt: skip
    close(got, [1 / 8, 0, 1 / 12, 0])

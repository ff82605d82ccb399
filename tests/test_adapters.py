"""The adapters over stand-ins for their trainers: the gradient of the whole batch whatever tensors
come, a user's own options, signatures, the table of versions.

`test_adapters_<trainer>.py` does the same with the trainer's own code.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_runs import FIXED, RUNS, WEIGHTED
from adapter_stand_ins import NEMO, slime_args, slime_batch
from adapter_tools import (
    ALPHA,
    LENGTHS,
    ROOT,
    VARIANTS,
    M,
    Rollout,
    check_signature,
    clones,
    commit,
    make_rollout,
    trainers,
    wheel_version,
)

import dl_norm
from dl_norm.integrations import (
    _shared as shared,
)
from dl_norm.integrations import (
    areal,
    miles,
    nemo_rl,
    prime_rl,
    skyrl,
    slime,
)


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


# -- every adapter but TRL's, which has tests of its own


ALL = RUNS | FIXED | WEIGHTED


@dataclasses.dataclass(frozen=True)
class Offset(dl_norm.Surrogate):
    """A user's, with a part that has no advantage."""

    def formula(self, log_prob, ratio, advantage):
        return -advantage * ratio + 0.1 * ratio


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trainer", ALL)
def test_hand_over(
    rollout: Rollout, trainer: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of the whole batch in one piece, whatever kind of tensors come."""
    changed = VARIANTS[variant](rollout)
    changed.check(ALL[trainer](changed, monkeypatch))


@pytest.mark.parametrize("variant", ["strided", "float mask", "one empty response"])
@pytest.mark.parametrize("trainer", RUNS)
def test_hand_over_to_the_kernel(
    rollout: Rollout, trainer: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the Triton kernel, which a CPU does not take of itself."""
    changed = VARIANTS[variant](rollout)
    changed.check(RUNS[trainer](changed, monkeypatch, impl="triton"))


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "sapo", "sapo_temperature_neg": 1.3},
        {"surrogate": "dppo_tv(0.05, 0.05, ratio_cap=20) + cispo"},
    ],
)
@pytest.mark.parametrize("trainer", RUNS)
def test_own_options(
    rollout: Rollout, trainer: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own surrogate, with its settings and without the trainer's, reaches the loss."""
    rollout.check(RUNS[trainer](rollout, monkeypatch, **options), **options)


@pytest.mark.parametrize("surrogate", ["dppo_tv + drift(tau=0.2)", "nll", Offset()])
@pytest.mark.parametrize("trainer", RUNS)
def test_a_term_without_the_advantage(
    rollout: Rollout, trainer: str, surrogate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go unweighted where the weights are on the advantages: refused there, right in the
    adapters that have them in the loss."""
    if trainer.startswith(("areal", "roll")):
        rollout.check(RUNS[trainer](rollout, monkeypatch, surrogate=surrogate), surrogate=surrogate)
        return
    with pytest.raises(ValueError, match="is not twice as large at twice the advantage"):
        RUNS[trainer](rollout, monkeypatch, surrogate=surrogate)


@pytest.mark.parametrize("trainer", RUNS)
def test_own_options_over_the_trainer_s(
    rollout: Rollout, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option of the clipped loss changes that one setting of the trainer's."""
    rollout.check(RUNS[trainer](rollout, monkeypatch, eps_high=0.05), eps_high=0.05)


@pytest.mark.parametrize("trainer", RUNS)
@pytest.mark.parametrize("bad", [{"eps_low": 2.0}, {"epsilon": 0.1}, {"surrogate": "clop"}])
def test_bad_options_raise(
    rollout: Rollout, trainer: str, bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((ValueError, TypeError), match="|".join(map(str, (*bad, *bad.values())))):
        RUNS[trainer](rollout, monkeypatch, **bad)


def test_every_adapter_is_here() -> None:
    """A new module of the folder gets a run, and so all tests above."""
    names = {path.stem for path in (ROOT / "dl_norm" / "integrations").glob("*.py")}
    names -= {"__init__", "_shared", "rollout", "kept", "log_probs", "slime_loss"}
    names -= {"verl_head", "verl_rollout"}
    names -= {name for name in names if name.startswith("trl")}
    covered = {run.rpartition("-")[0].replace("-", "_") for run in ALL}
    assert names == covered


# -- the shared core


def test_factors_are_the_weights(rollout: Rollout) -> None:
    weights = dl_norm.sequence_weights(rollout.lengths, alpha=ALPHA, max_length=M)
    factors = shared.row_factors(rollout.lengths, alpha=ALPHA)
    torch.testing.assert_close(factors / (len(LENGTHS) * M), weights)
    lengths = rollout.lengths.tolist()
    factors = torch.tensor(shared.token_mean_factors(lengths, alpha=ALPHA, max_length=M))
    torch.testing.assert_close(factors / sum(lengths), weights)


def test_packed_is_one_call(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed sequences reach the packed path once, with cu_seqlens."""
    calls = []
    original = dl_norm.policy_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cu_seqlens") is not None:  # not the check of the options
            calls.append(kwargs["cu_seqlens"].tolist())
        return original(*args, **kwargs)

    monkeypatch.setattr(dl_norm, "policy_loss", counted)
    RUNS["prime-rl-packed"](rollout, monkeypatch)
    assert calls == [[0, 3, 11, 11, 16, 17, 25]]


def test_the_trainer_s_mask_is_left_alone(rollout: Rollout) -> None:
    mask = rollout.mask.float() * 2  # float, as SkyRL's and NeMo-RL's
    before = mask.clone(), mask._version
    shared.adapter_loss(rollout.log_probs, rollout.old, rollout.advantages, mask)
    assert torch.equal(mask, before[0]) and mask._version == before[1]


RANK = """
import sys
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
from adapter_stand_ins import import_roll
from adapter_tools import ALPHA, LENGTHS, M, T
from types import SimpleNamespace
import dl_norm
from dl_norm.integrations import _shared as shared

rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
mine = mask[:2] if rank == 0 else mask[2:]
whole = dl_norm.sequence_weights(mask.sum(-1), alpha=ALPHA, max_length=M, group="local")
part = whole[:2] if rank == 0 else whole[2:]

factors = shared.row_factors(mine.sum(-1), alpha=ALPHA, group=dist.group.WORLD)
torch.testing.assert_close(factors / (len(LENGTHS) * M), part)

patch = pytest.MonkeyPatch()
worker = type("Worker", (import_roll(patch).DeltaLActorWorker,), {"alpha": ALPHA})()
# Data parallel: each has its rows. Tensor parallel: both have all of them.
for dp_size, rows, expected in ((2, mine, part), (1, mask, whole)):
    worker.rank_info = SimpleNamespace(dp_size=dp_size)
    torch.testing.assert_close(worker._weights(rows), expected)
dist.destroy_process_group()
"""


def test_weights_over_two_ranks(tmp_path: Path) -> None:
    """slime's and ROLL's weights come from all ranks, however the rows are spread or copied."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(Path(__file__).parent), tmp_path / "store", str(rank)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


# -- what is missing says what to install


def test_missing_trainers_are_named(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "skyrl",
        "prime_rl",
        "slime",
        "megatron",
        "nemo_rl",
        "roll",
        "torchtitan",
        "miles",
    ):
        monkeypatch.setitem(sys.modules, name, None)  # not importable, even if it is installed
    inputs = SimpleNamespace(trainer_logprobs=torch.ones(2))
    for call, words in (
        (skyrl.register, "pip install 'skyrl"),
        (lambda: prime_rl.delta_l_loss(inputs), "needs prime-rl"),
        (lambda: nemo_rl.DeltaLLossFn(NEMO, max_length=M), "needs NeMo-RL"),
        (lambda: slime.advantages(slime_args(), slime_batch(rollout)), "needs slime"),
        (lambda: slime.policy_loss(slime_args(), {}, torch.ones(1), None), "needs slime"),
        (lambda: miles.rewards(slime_args(), []), "needs Miles"),
        (lambda: miles.policy_loss(slime_args(), {}, torch.ones(1), None), "needs Miles"),
        (lambda: importlib.import_module("dl_norm.integrations.roll"), "needs ROLL"),
        (lambda: importlib.import_module("dl_norm.integrations.torchtitan"), "needs torchtitan"),
    ):
        with pytest.raises(ImportError, match=words):
            call()


# -- which versions were checked


# Wheels, as `ci/trainers_env.sh` installs them; verl and TRL have environments of their own.
DISTRIBUTIONS = {
    "SkyRL": "skyrl",
    "AReaL": "areal",
    "OpenRLHF": "openrlhf",
    "torchtitan": "torchtitan",
    "unsloth": "unsloth_zoo",
    "ms-swift": "ms_swift",
}
CLONES = {
    "prime-rl": "prime-rl",
    "slime": "slime",
    "Miles": "miles",
    "NeMo-RL": "RL",
    "ROLL": "ROLL",
    "Megatron-RL": "Megatron-LM",
    "open-instruct": "open-instruct",
}
MOVED = (
    "{name} has moved: {found} is here, and the adapter was checked with {checked} on {date}. Run "
    "the tests of the adapters with it, read what changed in the functions they lift, then put the "
    "version and the date into dl_norm/integrations/README.md"
)


def test_trl_and_verl_are_the_checked_ones() -> None:
    for name, folders in (
        ("trl", sys.path),
        ("verl", [str(path) for path in ROOT.glob(".venv-verl/lib/python3*/site-packages")]),
    ):
        for found in importlib.metadata.distributions(name=name, path=folders):
            check_version({"trl": "TRL"}.get(name, name), found.version)
            break


def check_version(name: str, found: str) -> None:
    line = trainers()[name]
    assert found.startswith(line.version), MOVED.format(
        name=name, found=found, checked=line.version, date=line.date
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_wheel_is_the_checked_one(name: str) -> None:
    found = wheel_version(DISTRIBUTIONS[name])
    if found is None:
        pytest.skip(f"{name} is not here: bash ci/trainers_env.sh")
    check_version(name, found)


@pytest.mark.parametrize("name", CLONES)
def test_clone_is_the_checked_one(name: str) -> None:
    if clones() is None or not (clones() / CLONES[name]).exists():
        pytest.skip(f"{CLONES[name]} is not in TRAINER_SOURCES, see ci/trainers_env.sh")
    check_version(name, commit(clones() / CLONES[name]))


def test_table_of_trainers() -> None:
    """Supported: a wheel that the test command installs. Recipe: a commit and a date."""
    table = trainers()
    script = (ROOT / "ci" / "trainers_env.sh").read_text()
    for name, distribution in DISTRIBUTIONS.items():
        assert table[name].level == "supported" and table[name].is_wheel, name
        assert f"{distribution}=={table[name].version}" in script, name
    for name in CLONES:
        assert table[name].level == "recipe" and re.fullmatch(
            r"[0-9a-f]{8,40}", table[name].version
        )
    assert set(table) == {*DISTRIBUTIONS, *CLONES, "TRL", "verl", "torchforge"}
    assert f"unsloth=={table['unsloth'].version}" in script  # beside unsloth_zoo
    assert f"verl=={table['verl'].version}" in (ROOT / "ci" / "verl_env.sh").read_text()


def test_a_moved_trainer_fails_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above are worth: another version, another signature."""
    with pytest.raises(AssertionError, match=r"SkyRL has moved: 9\.9\.9 is here.*checked with"):
        check_version("SkyRL", "9.9.9")
    with pytest.raises(AssertionError, match=r"\(a, b=1\); the adapter was\s+checked with \(a\)"):
        check_signature(lambda a, b=1: None, "a")


def test_adapters_take_what_was_checked() -> None:
    """Our hooks have the trainers' own parameters; `SIGNATURES` are held against their sources."""
    from adapter_tools import SIGNATURES

    for name, hook in {
        "skyrl": skyrl.delta_l_policy_loss,
        "skyrl trainer": skyrl.DeltaLAdvantages._normalize_advantages,
        "prime-rl compute_loss": prime_rl.make_compute_loss(),
        "slime": slime.policy_loss,
        "slime reducer": slime.pg_loss_reducer,
        "slime advantages": slime.advantages,
        "slime ": miles.policy_loss,
        "slime reducer ": miles.pg_loss_reducer,
        "miles rewards": miles.rewards,
        "nemo-rl": nemo_rl.DeltaLLossFn.__call__,
        "nemo-rl estimator": nemo_rl.WeightedEstimator.compute_advantage,
        "areal": areal.DeltaLLoss.__call__,
        "areal weight": areal.DeltaLLoss.weight,
    }.items():
        check_signature(hook, SIGNATURES[name.strip()])

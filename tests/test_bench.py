"""The benchmark suite itself: its model of bytes, its order, its refusal, its files."""

from __future__ import annotations

import json
import time
import zipfile

import pytest
import torch
from torch import Tensor

from bench import against, contest, head_peers, heads, parity, peers, table, timing
from bench.cases import GPU_CASES, TINY_CASES, Case, Inputs, make_inputs
from bench.contest import OURS, Contestant, NotHere
from bench.lift import NotInstalled, lift, load_module
from bench.one_call import read_csv
from bench.peers import CONTESTANTS
from bench.roofline import Ceilings
from bench.suites import LOG_PROBS, SUITES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contestants(*names: str) -> list[Contestant]:
    return [one for one in CONTESTANTS if one.name in names]


def test_bytes_by_hand() -> None:
    """13 B per position when dense, 8 fill + 5 with padding, 12 when packed."""
    assert Case("", 1024, 8192).bytes_moved() == 13 * 1024 * 8192
    ragged = Case("", 64, 100, fill=0.4)
    tokens = int(ragged.lengths().sum())
    assert ragged.bytes_moved() == 8 * tokens + 5 * 6400
    assert Case("", 64, 100, fill=0.4, packed=True).bytes_moved() == 12 * tokens
    assert Case("", 64, 100).bytes_moved(element_size=2) == (2 * 2 + 2 + 1) * 6400


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_lengths_have_the_fill_they_claim(case: Case) -> None:
    lengths = case.lengths()
    assert lengths.min() >= 1
    assert lengths.max() <= case.max_length
    fill = lengths.double().mean() / case.max_length
    assert fill == pytest.approx(case.fill, rel=0.01)  # rounding to whole tokens
    assert torch.equal(lengths, case.lengths())


def test_packed_case_has_the_tokens_of_its_name() -> None:
    (packed,) = (case for case in GPU_CASES if case.packed)
    assert packed.positions == pytest.approx(3.4e6, rel=0.02)


def test_interleaving() -> None:
    """Every round holds each contestant once, the order changes, and the seed fixes it."""
    names = ["a", "b", "c", "d"]
    order = list(timing.interleave(names, rounds=20))
    rounds = [order[i : i + 4] for i in range(0, 80, 4)]
    assert all(sorted(one) == names for one in rounds)
    assert len({tuple(one) for one in rounds}) > 5
    assert order == list(timing.interleave(names, rounds=20))


def test_compare_rotates_the_buffers_and_drops_the_warm_up() -> None:
    """No set is used twice in a row by neighbours; only the rounds asked for are counted."""
    used: list[int] = []

    def trial(number: int) -> timing.Trial:
        return lambda: lambda: used.append(number)

    trials = {name: [trial(number) for number in range(5)] for name in "ab"}
    stats = timing.compare(trials, timing.Clock(CPU), rounds=7, warmup=2)
    assert used == [i % 5 for i in range(18)]
    assert {name: one.count for name, one in stats.items()} == {"a": 7, "b": 7}
    with pytest.raises(ValueError, match="equally many buffer sets"):
        timing.compare({"a": [trial(0)], "b": []}, timing.Clock(CPU), rounds=1)


def test_clock_and_quantiles() -> None:
    assert 0.01 <= timing.Clock(CPU)(lambda: time.sleep(0.01)) < 1
    stats = timing.Stats.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (stats.median, stats.p20, stats.p80, stats.count) == (3.5, 2.0, 5.0, 6)


def test_peak_memory_by_hand() -> None:
    """Two live megabyte tensors at the highest point, whatever is freed before and after."""
    source = torch.zeros(2**18)  # 1 MiB

    def call() -> Tensor:
        kept = source + 1
        for _ in range(3):
            kept = kept + 1
        return kept[:1].clone()

    assert timing.peak_memory(call, CPU) == pytest.approx(2 * 2**20, rel=0.01)


def test_every_peer_agrees_with_float64() -> None:
    """What is installed passes the same parity check that guards the timings."""
    inputs = make_inputs(TINY_CASES[0], CPU)
    expected = parity.truth(inputs)
    checked = []
    for contestant in CONTESTANTS:
        if contestant.name == "torch.compile":
            continue  # compiles for seconds; bench.table checks it before timing
        try:
            prepared = contest.prepare(contestant, inputs)
            parity.check(prepared, expected)
        except (NotHere, NotInstalled):
            continue
        checked.append(contestant.name)
    assert {OURS, "reference"} <= set(checked)
    for package, names in (("trl", {"TRL", "TRL + metrics"}), ("verl", {"verl", "verl + metrics"})):
        if installed(package):
            assert names <= set(checked)


def installed(package: str) -> bool:
    return peers.versions()[package] != "not installed"


HERE = {  # contestants that can run on a CPU, by the package they need
    "logits": {"": {OURS, "dl_norm copy", "plain"}, "trl": {"TRL"}, "liger-kernel": {"Liger"}},
    "token_log_probs": {"": {OURS, "plain"}, "trl": {"TRL"}},
    "linear": {
        "": {OURS, "dl_norm max_tokens", "plain"},
        "trl": {"TRL"},
        "liger-kernel": {"Liger scaled CE"},
    },
    "cross_entropy": {"": {OURS, "plain"}},
    "entropy": {"": {OURS, "plain"}},
    "precision": {"": {OURS, "dl_norm bfloat16 logits", "dl_norm float32 head", "plain"}},
    "kept": {"": {OURS, "masked logits", "full head"}},
}


@pytest.mark.parametrize("name", HERE)
def test_every_head_peer_agrees_with_float64(name: str) -> None:
    """Twice each, as a benchmark calls them: what overwrites its inputs must restore them."""
    suite = SUITES[name]
    inputs = suite.make_inputs(suite.tiny[0], CPU, 0)
    expected = suite.truth(inputs)
    checked = set()
    for contestant in suite.contestants:
        if contestant.name in ("torch.compile", "Liger chunked"):
            continue  # compile for seconds; bench.table checks them before timing
        try:
            prepared = contest.prepare(contestant, inputs)
        except NotHere:
            continue
        suite.check(prepared, expected)
        suite.check(prepared, expected)
        checked.add(contestant.name)
    for package, names in HERE[name].items():
        assert not names - checked or (package and not installed(package))


def test_truth_of_the_heads_is_autograd_through_the_whole(monkeypatch) -> None:
    """In float64 at once and in pieces of two rows: the same gradients; a wrong one is seen."""
    inputs = heads.make_inputs(heads.tiny_cases("linear")[0], CPU)
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in inputs.leaves)
    exact = heads.HeadInputs(leaves, *inputs.loss_tensors, inputs.tokens)
    monkeypatch.setattr(head_peers, "_plain_log_probs", heads_log_probs)
    loss = head_peers._plain_loss(*exact.leaves, *exact.loss_tensors)
    whole = torch.autograd.grad(loss, leaves)
    monkeypatch.setattr(heads, "CHUNK", 2)
    pieces = heads.truth(inputs)
    assert (loss - pieces.result).abs() <= 1e-7  # weights and old log-probs are float32
    for a, b in zip(whole, pieces.gradients, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=1e-6, atol=1e-9)
    with pytest.raises(parity.Wrong, match="gradient 0 off by"):
        heads.check_gradients(tuple(1.001 * g.float() for g in pieces.gradients), pieces)


def heads_log_probs(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    logits = hidden @ head.t()
    return logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def test_head_models_by_hand() -> None:
    """6 N D V operations and 4 bytes a bfloat16 logit, of counted tokens; the zeros of the others
    where the logits are given."""
    full = heads.HeadCase("", "linear", 8, 1024, 1000, 64)
    assert (full.flops(), full.bytes_moved()) == (6 * 8192 * 64 * 1000, 4 * 8192 * 1000)
    ragged = heads.HeadCase("", "logits", 8, 1024, 1000, fill=0.4)
    assert ragged.flops() == 0
    assert ragged.bytes_moved() == 2 * 1000 * (ragged.tokens + 8192)
    assert heads.HeadCase("", "token_log_probs", 8, 1024, 1000).bytes_moved() == 2 * 8192 * 1000


def prepare_wrong(factor: float, nan_gradient: bool = False):
    def prepare(inputs: Inputs):
        right = peers.reference(inputs)

        def loss() -> Tensor:
            value = right() * factor
            return value * (inputs.log_probs.sum() * float("nan")) if nan_gradient else value

        return loss

    return prepare


@pytest.mark.parametrize(
    "prepare", [prepare_wrong(1.0001), prepare_wrong(1.0, nan_gradient=True)], ids=["scale", "nan"]
)
def test_no_speed_without_parity(prepare) -> None:
    """A contestant that is off by 1e-4, or gives NaN, gets a reason in place of every time."""
    wrong = Contestant("wrong", "", prepare)
    rows = table.measure_case(
        LOG_PROBS, TINY_CASES[0], timing.Clock(CPU), Ceilings(1e9, 1e9, ""),
        [*contestants(OURS), wrong], rounds=1,
    )  # fmt: skip
    refused = [row for row in rows if row.contestant == "wrong"]
    assert len(refused) == 3
    for row in refused:
        assert row.time is row.peak_bytes is row.ratio_to_ours is None
        assert "off by" in (row.refused or "")
    assert all(row.time for row in rows if row.contestant == OURS)


def test_a_tiny_run_writes_what_it_shows(tmp_path, capsys) -> None:
    """The command: JSON with the machine and versions, read back into the same tables."""
    report = table.main(
        ["--tiny", "--device", "cpu", "--rounds", "2", "--results", str(tmp_path), "--markdown",
         "--contestants", OURS, "reference", "--figure", str(tmp_path / "figure.png")]
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert {"device", "date", "command", "versions", "ceilings", "cases", "rows"} <= set(data)
    assert {"python", "torch", "triton", "trl", "verl"} <= set(data["versions"])
    assert data["ceilings"]["copy_bytes_per_s"] > 0
    assert len(data["rows"]) == 2 * 3 * 2  # cases, passes, contestants
    assert all(row["time"]["median"] > 0 and row["time"]["count"] == 2 for row in data["rows"])
    ours = [row for row in data["rows"] if row["contestant"] == OURS]
    assert all(row["ratio_to_ours"] == 1 for row in ours)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    shown = capsys.readouterr().out
    assert "4x48, both" in shown
    assert "| packed 4x48 |" in shown
    assert table.Report.load(path) == report
    assert report.suite == "log_probs"


def test_a_tiny_run_of_another_suite(tmp_path, capsys) -> None:
    report = table.main(
        ["--suite", "linear", "--tiny", "--device", "cpu", "--rounds", "2", "--markdown",
         "--results", str(tmp_path), "--contestants", OURS, "plain"]
    )  # fmt: skip
    (path,) = tmp_path.glob("*-linear-*.json")
    assert table.Report.load(path) == report
    for row in report.rows:
        assert row.time and row.floor and row.peak_bytes
        assert row.of_floor == pytest.approx(row.floor / row.time.median)
        # 3 products of 2 n D V, and the logits' bytes twice
        assert row.flops_model == 6 * report.cases[row.case]["tokens"] * 16 * 64
    assert "TFLOP" in capsys.readouterr().out


def test_a_tiny_training_step(tmp_path, capsys) -> None:
    """TRL's trainer and ours, plain and fused, agree before they are timed; results are written."""
    pytest.importorskip("trl")
    from bench import train_step

    path = train_step.main(
        ["--tiny", "--device", "cpu", "--rounds", "1", "--results", str(tmp_path)]
    )
    data = json.loads(path.read_text())
    assert [row["kind"] for row in data["rows"]] == list(train_step.KINDS)
    for row in data["rows"]:
        assert row["loss"] == pytest.approx(data["rows"][0]["loss"], rel=1e-4, abs=1e-6)
        assert row["gradient_norm"] == pytest.approx(data["rows"][0]["gradient_norm"], rel=1e-4)
        assert row["tokens_per_s"] > 0 and row["peak_bytes"] > 0
    assert "dl_norm fused" in capsys.readouterr().out


def test_tiny_training_curves(tmp_path, capsys) -> None:
    """Four steps from the same weights and random numbers: the curves of all losses are one."""
    pytest.importorskip("trl")
    from bench import train_curves

    path = train_curves.main(["--tiny", "--device", "cpu", "--results", str(tmp_path)])
    curves = json.loads(path.read_text())["curves"]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert all(len(curve) == 4 for own in curves.values() for curve in own.values())
    for name, found in train_curves.distances(curves).items():
        if name == train_curves.CHANCE:
            assert min(found.values()) > 1e-5  # what differs does show
        else:
            assert max(found.values()) < 1e-5, name
            assert train_curves.same_steps(curves, name) == 4
    assert "dl_norm fused" in capsys.readouterr().out


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"unknown .*'no such'"):
        table.main(["--tiny", "--contestants", "no such"])


PACKAGE = """
import not_installed_anywhere

class Trainer:
    @not_installed_anywhere.register
    def loss(self, x: not_installed_anywhere.Tensor) -> not_installed_anywhere.Tensor:
        result = scale * x
        metric = x / 0

        def log():
            raise AssertionError

        log()
        return result, metric
"""


@pytest.mark.parametrize("as_wheel", [False, True])
def test_lift_runs_the_source_without_its_imports(tmp_path, monkeypatch, as_wheel: bool) -> None:
    """From a folder and from a wheel; what is to be cut has to be there to cut."""
    files = {"peer/__init__.py": "raise ImportError", "peer/trainer.py": PACKAGE}
    if as_wheel:
        path = tmp_path / "peer.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in files.items():
                wheel.writestr(name, text)
    else:
        path = tmp_path
        (path / "peer").mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
    monkeypatch.syspath_prepend(str(path))

    arguments: tuple = ("peer.trainer", "Trainer.loss", {"scale": 3})
    loss = lift(*arguments, drop=["metric"], stop_at_inner_function="log:result")
    assert loss(None, 2) == 6
    with pytest.raises(ZeroDivisionError):
        lift(*arguments)(None, 2)
    with pytest.raises(ValueError, match=r"has no Trainer\.gone"):
        lift("peer.trainer", "Trainer.gone", {})
    with pytest.raises(ValueError, match="does not assign"):
        lift(*arguments, drop=["gone"])
    with pytest.raises(ValueError, match="does not define gone"):
        lift(*arguments, stop_at_inner_function="gone:result")
    with pytest.raises(NotInstalled):
        lift("not_installed_anywhere.trainer", "loss", {})


def test_a_module_is_loaded_from_its_file_alone(tmp_path, monkeypatch) -> None:
    """Neither the package's own __init__ runs nor the neighbours it imports from."""
    (tmp_path / "peer" / "kernels").mkdir(parents=True)
    (tmp_path / "peer" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "peer" / "kernels" / "one.py").write_text(
        "def two():\n    from ..utils import half\n    return 4 * half\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_module("peer.kernels.one", {"peer.utils": {"half": 0.5}}).two() == 2
    with pytest.raises(NotInstalled, match="not a file on disk"):
        load_module("peer.kernels.gone", {})


def test_ncu_output_is_read_in_bytes_and_seconds() -> None:
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
        '"0","policy_loss_fwd_kernel","dram__bytes_read.sum","Mbyte","35.5"',
        '"0","policy_loss_fwd_kernel","gpu__time_duration.sum","us","1,022.5"',
    ]
    (measured,) = read_csv(lines).values()
    assert measured["dram__bytes_read.sum"] == 35.5e6
    assert measured["gpu__time_duration.sum"] == pytest.approx(1.0225e-3)


def test_against_another_commit(tmp_path) -> None:
    """Here this tree against itself; and a process has the package of its folder, not another."""
    (row,) = against.compare("", 2, "log_probs, dl_norm torch, 8x128")
    assert row["here"] > 0 and row["ratio"] == row["here"] / row["there"]
    with pytest.raises(ValueError, match="no job has 'nothing' in its name"):
        against.compare("", 1, "nothing")
    (tmp_path / "dl_norm").mkdir()
    (tmp_path / "dl_norm" / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises((RuntimeError, BrokenPipeError)), against.worker(tmp_path) as ask:
        ask("0")

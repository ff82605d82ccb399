"""`python -m dl_norm diagnose`: what it computes, says and refuses; test_diagnose_files.py has the
files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import dl_norm
from dl_norm import theory
from dl_norm.__main__ import main
from dl_norm.diagnose import Columns, RolloutError, Rollouts, diagnose, read_rollouts
from dl_norm.diagnose.analysis import BETA_RANGE, squared_norms
from dl_norm.diagnose.values import MAX_LENGTH

ROWS = [
    {"step": b, "prompt_id": f"p{b}{p}", "completion_length": 3 + 7 * b + 2 * p + 5 * k * k,
     "reward": float(k % 2), "grad_norm": 0.5 * (3 + 7 * b + 2 * p + 5 * k * k) ** 0.6}
    for b in range(3) for p in range(4) for k in range(4)
]  # fmt: skip
LENGTHS = np.array([row["completion_length"] for row in ROWS], dtype=float)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rollouts(tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", ROWS)
    return read_rollouts(tmp_path / "rollouts.jsonl")


class TestNumbers:
    def test_methods_are_means_over_batches(self, rollouts):
        found = diagnose(rollouts, beta=1.0, max_length=100)
        batches = LENGTHS.reshape(3, -1)
        of_batch = {"groups": np.repeat(range(4), 4), "advantages": np.tile([-0.5, 0.5], 8)}
        for row in found.methods:
            alpha = 1.0 if row.alpha is None else row.alpha
            expected = [
                theory.method_statistics(b, row.method, alpha=alpha, max_length=100, **of_batch)
                for b in batches
            ]
            expectations = [s.expectation for s in expected]
            assert row.expectation == pytest.approx(np.mean(expectations))
            assert row.scaled_expectation == pytest.approx(100 * np.mean(expectations))
            assert row.cv == pytest.approx(np.mean([s.cv for s in expected]))
            assert row.swing.ratio == pytest.approx(max(expectations) / min(expectations))
        names = [row.name for row in found.methods]
        assert {"prompt mean", "Balanced", "GRPO per prompt"} < set(names)
        assert names[-2:] == ["DeltaL(0.75)", "DeltaL(1.00)"]
        assert found.methods[-1].excess_noise == 1.0

    def test_exponent_from_norms(self, rollouts):
        found = diagnose(rollouts)
        # |g| = L^0.6 / 2 and |A| = 1/2 everywhere: |g|^2 / A^2 = L^1.2 exactly.
        assert found.exponent.source == "estimated"
        assert found.exponent.beta == pytest.approx(1.2, rel=1e-9)
        assert found.exponent.estimate.groups == 12
        assert found.best_alpha == pytest.approx(1.2, rel=1e-9)

    def test_exponent_without_norms(self, tmp_path):
        np.save(tmp_path / "a.npy", [3, 5, 9])
        found = diagnose(read_rollouts(tmp_path / "a.npy"))
        assert (found.exponent.source, found.exponent.beta) == ("assumed", 1.0)
        assert found.methods[0].swing is None
        # Neither prompts nor rewards in the file: nothing that needs them is shown.
        assert {row.method for row in found.methods} == set(theory.METHODS)
        assert found.advantages is None
        assert found.max_length == 9

    def test_batch_size_cuts_and_drops_the_remainder(self, rollouts):
        assert diagnose(rollouts, batch_size=20).lengths.batches == 2
        assert diagnose(rollouts, batch_size=100).lengths.batches == 1
        with pytest.raises(RolloutError, match="at least 1, got 0"):
            diagnose(rollouts, batch_size=0)

    def test_lengths_and_advantages(self, rollouts):
        found = diagnose(rollouts)
        assert (found.lengths.responses, found.lengths.empty) == (48, 0)
        assert found.lengths.quantiles[0.5] == np.median(LENGTHS)
        assert found.lengths.harmonic_mean == pytest.approx(1 / np.mean(1 / LENGTHS))
        assert found.advantages.without_signal == 0
        odd = np.arange(48) % 2 == 1
        assert found.advantages.mean_length_positive == LENGTHS[odd].mean()
        assert found.advantages.rank_correlation > 0  # the longer of each pair was rewarded


class TestWhatIsSaid:
    """Nothing is assumed or left out in silence."""

    def notes(self, path, rows, **options):
        columns = Columns(**options.pop("columns", {}))
        return diagnose(read_rollouts(write_jsonl(path, rows), columns), **options).notes

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "a.jsonl"

    def without(self, *names):
        return [{k: v for k, v in row.items() if k not in names} for row in ROWS]

    def test_nothing_where_all_is_there(self, path):
        assert self.notes(path, ROWS) == []

    def test_one_batch(self, path):
        (note,) = self.notes(path, self.without("step"))
        assert "No batch column (batch, step, global_step): all 48 responses" in note
        assert "--batch-size" in note
        assert self.notes(path, ROWS, columns={"batch": "none"}) == [], "as asked"
        assert self.notes(path, self.without("step"), batch_size=12) == []

    def test_no_groups(self, path):
        group, norms = self.notes(path, self.without("prompt_id"))
        assert "No group column (group, group_id, prompt_id, " in group
        assert "rewards give no advantages" in group
        assert "the gradient norms are not divided by them" in norms
        (note,) = self.notes(path, self.without("prompt_id", "grad_norm"))
        assert note == group
        assert self.notes(path, self.without("prompt_id", "grad_norm", "reward")) == [], "no use"

    def test_groups_of_one(self, path):
        rows = [{**row, "prompt_id": min(i, 5)} for i, row in enumerate(ROWS)]
        (note,) = self.notes(path, rows, beta=1.0)
        assert "5 of 48 responses are the only one of their group ('prompt_id')" in note

    def test_what_is_in_no_batch(self, path):
        assert self.notes(path, ROWS, batch_size=20) == [
            "8 responses are in no batch: they do not fill one, or theirs is empty."
        ]
        rows = [{**row, "completion_length": 0} if row["step"] == 1 else row for row in ROWS]
        (note,) = self.notes(path, rows)
        assert note.startswith("16 responses are in no batch")
        (note,) = self.notes(path, ROWS, batch_size=10**30)
        assert note == "The one batch has 48 responses, fewer than --batch-size."

    def test_an_alpha_that_cannot_be(self, path):
        (note,) = self.notes(path, ROWS, beta=-1.0)
        assert note == "The best alpha would be beta, -1; alpha lies in 0 to 16."

    def test_columns(self, path):
        rows = [{**row, "other": 0} for row in self.without("reward")]
        found = diagnose(read_rollouts(write_jsonl(path, rows)))
        assert found.sources == {
            "length": "completion_length", "batch": "step", "group": "prompt_id",
            "reward": None, "advantage": None, "norm": "grad_norm",
        }  # fmt: skip
        assert found.unused_columns == ("other",)
        found = diagnose(read_rollouts(path), batch_size=12)
        assert found.sources["batch"] == "every 12 responses"


class TestRanges:
    """Every formula is finite inside of the ranges, and outside there is an error."""

    @pytest.mark.parametrize("beta", [*BETA_RANGE, 0.0])
    @pytest.mark.parametrize("max_length", [None, 1, MAX_LENGTH])
    @pytest.mark.parametrize(
        "lengths", [[1], [1] * 50, [MAX_LENGTH] * 50, [1, MAX_LENGTH], [1] * 50 + [MAX_LENGTH]]
    )
    @pytest.mark.filterwarnings("error")
    def test_finite(self, beta, max_length, lengths):
        rollouts = Rollouts(np.array(lengths * 2, float), np.repeat([0, 1], len(lengths)))
        found = diagnose(rollouts, beta=beta, max_length=max_length).to_dict()
        for row in found["methods"]:
            numbers = [v for k, v in row.items() if k not in ("method", "alpha", "swing")]
            assert all(v is not None and v > 0 for v in [*numbers, *row["swing"].values()][:-1])

    @pytest.mark.filterwarnings("error")
    def test_norms_at_the_edge(self):
        for norms in ([1e-60, 1e60, 1.0, 1.0], [1e60] * 4, [1e-60] * 4):
            rollouts = Rollouts(
                np.array([10.0, 10**9, 10.0, 10**9]), norms=np.array(norms),
                advantages=np.array([1e60, 1e-8, -1e60, 1.0]), groups=np.arange(4),
            )  # fmt: skip
            assert np.isfinite(squared_norms(rollouts)).all()
            assert (squared_norms(rollouts) > 0).all()

    def test_an_estimate_beyond(self, tmp_path):
        rows = [{"length": 100 + i % 2, "grad_norm": 2.0 ** (i % 2), "uid": i} for i in range(20)]
        rollouts = read_rollouts(write_jsonl(tmp_path / "a.jsonl", rows))
        with pytest.raises(RolloutError, match=r"norms give beta = 139, .* -16 to 16: .*--beta"):
            diagnose(rollouts)
        assert diagnose(rollouts, beta=1.0).exponent.source == "given"

    def test_lengths_given_in_code(self):
        for lengths in ([1e300], [0.0, 0.0], []):
            with pytest.raises(RolloutError, match="lengths must lie in 0 to 1,000,000,000"):
                diagnose(Rollouts(np.array(lengths)))


class TestCommand:
    @pytest.fixture
    def path(self, tmp_path):
        write_jsonl(tmp_path / "rollouts.jsonl", ROWS)
        return str(tmp_path / "rollouts.jsonl")

    def test_tables(self, path, capsys, monkeypatch):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "120")
        assert main(["diagnose", path]) == 0
        text = " ".join(capsys.readouterr().out.split())  # where lines break is rich's business
        for words in ("48 responses in 3 batches", "Dr. GRPO", "DeltaL(1.20)", "Best alpha: 1.2",
                      "95% interval 1.20 to 1.20 (12 groups", "rank correlation",
                      "Columns: length = completion_length, batch = step, group = prompt_id, "
                      "reward = reward, advantage = reward less the group's mean, "
                      "norm = grad_norm."):  # fmt: skip
            assert words in text
        assert "Note" not in text

    def test_tables_say_what_is_not_there(self, tmp_path, capsys, monkeypatch):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "120")
        names = [f"[x{i}]" for i in range(20)]
        path = write_jsonl(tmp_path / "a.jsonl", [{"length": 3, **dict.fromkeys(names)}])
        assert main(["diagnose", str(path)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "Not in the file: batch, group, reward, advantage, norm." in text
        assert "Not used: [x0], [x1], " in text
        assert "[x11] and 8 more." in text
        assert "Note: No batch column" in text

    def test_json(self, path, capsys):
        assert main(["diagnose", path, "--json", "--beta", "0.8", "--batch-column", "none"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["best_alpha"] == 0.8
        assert found["exponent"]["source"] == "given"
        assert found["methods"][0]["swing"] is None
        assert found["sources"]["length"] == "completion_length"
        assert found["sources"]["batch"] == "none, as asked"
        assert (found["unused_columns"], found["notes"]) == (["step"], [])

    def test_json_has_the_notes(self, tmp_path, capsys):
        path = write_jsonl(tmp_path / "a.jsonl", [{"length": 3, "x": 1}])
        assert main(["diagnose", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["notes"][0].startswith("No batch column")
        assert found["unused_columns"] == ["x"]
        assert found["sources"]["batch"] is None

    @pytest.mark.parametrize("options", [[], ["--norm-column", "none", "--batch-size", "48"]])
    def test_figure(self, path, tmp_path, capsys, options):
        pytest.importorskip("matplotlib")
        figure = tmp_path / "new" / "figure.png"
        assert main(["diagnose", path, "--json", "--figure", str(figure), *options]) == 0
        assert figure.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--length-column", "x"], "has no column 'x'"),
            *(
                ([f"--beta={value}"], "beta must lie in -16 to 16, got")
                for value in ("100", "16.1", "-17", "nan", "inf", "-inf", "1e400")
            ),
            *(
                (["--max-length", value], "max_length must lie in 1 to 1,000,000,000 tokens, got")
                for value in ("0", "0.5", "-3", "nan", "inf", "1e300")
            ),
            *((["--batch-size", value], "at least 1, got") for value in ("0", "-1")),
            (["--seed", "-1"], "seed must be >= 0, got -1"),
            (["--figure", "figure"], "expected a figure's name to end in one of"),
            (["--figure", "figure.txt"], "figure.txt: expected a figure's name to end in one of"),
            (["--tokens-column", "step", "--length-column", "step"], "give one of them"),
            (["--text-column", "prompt_id"], "needs --tokenizer"),
        ],
    )
    def test_errors_are_one_line_and_status_2(self, path, capsys, options, message):
        assert main(["diagnose", path, "--json", *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert message in captured.err

    def test_missing_package_is_named(self, path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
        assert main(["diagnose", path]) == 2
        assert "pip install 'dl-norm[diagnose]'" in capsys.readouterr().err

    def test_as_a_process(self, path):
        done = run("-m", "dl_norm", "diagnose", path, "--json")
        assert json.loads(done.stdout)["lengths"]["responses"] == 48


class TestWithoutTorch:
    """PyTorch takes seconds to import, and the command needs none of it."""

    @pytest.mark.parametrize("command", [["--version"], ["diagnose", "FILE", "--json"]])
    def test_command(self, tmp_path, command):
        path = write_jsonl(tmp_path / "a.jsonl", ROWS)
        command = [str(path) if word == "FILE" else word for word in command]
        done = run("-X", "importtime", "-m", "dl_norm", *command)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert {"dl_norm", "numpy"} <= imported
        assert not [name for name in imported if name.partition(".")[0] in ("torch", "triton")]
        if command == ["--version"]:
            assert done.stdout == f"dl-norm {dl_norm.__version__}\n"

    def test_every_other_import_has_everything(self, tmp_path):
        """Another program's -m too, and with our name among its arguments; operators are there
        before the first call, which a loaded torch.export program needs."""
        code = (
            "import dl_norm\n"
            "assert all(hasattr(dl_norm, name) for name in dl_norm.__all__), dl_norm\n"
            "assert set(dl_norm.__all__) <= set(dir(dl_norm))\n"
            "import torch; torch.ops.dl_norm.policy_loss_fwd\n"
            "from dl_norm import *\n"
            "assert policy_loss is dl_norm.policy_loss; print('whole')"
        )
        (tmp_path / "program").mkdir()
        for name in ("__init__", "__main__"):
            (tmp_path / "program" / f"{name}.py").write_text(code)
        done = run("-m", "program", "-m", "dl_norm", PYTHONPATH=f"{tmp_path}:{os.getcwd()}")
        assert done.stdout == "whole\nwhole\n"


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done

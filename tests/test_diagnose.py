"""`python -m dl_norm diagnose`: every file format, what it computes, and its errors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from dl_norm import theory
from dl_norm.__main__ import main
from dl_norm.diagnose import Columns, RolloutError, diagnose, read_rollouts

ROWS = [
    {"step": b, "prompt_id": f"p{b}{p}", "completion_length": 3 + 7 * b + 2 * p + 5 * k * k,
     "reward": float(k % 2), "grad_norm": 0.5 * (3 + 7 * b + 2 * p + 5 * k * k) ** 0.6}
    for b in range(3) for p in range(4) for k in range(4)
]  # fmt: skip
LENGTHS = np.array([row["completion_length"] for row in ROWS], dtype=float)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_npy(path, rows):
    kinds = [(k, "U8" if isinstance(v, str) else type(v)) for k, v in rows[0].items()]
    np.save(path, np.array([tuple(row.values()) for row in rows], dtype=kinds))


WRITERS = {
    ".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet, ".npy": write_npy
}  # fmt: skip


@pytest.fixture
def rollouts(tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", ROWS)
    return read_rollouts(tmp_path / "rollouts.jsonl")


@pytest.mark.parametrize("suffix", WRITERS)
def test_formats_hold_the_same(tmp_path, suffix):
    path = tmp_path / f"rollouts{suffix}"
    WRITERS[suffix](path, ROWS)
    found = read_rollouts(path)
    assert found.lengths.tolist() == LENGTHS.tolist()
    assert found.batches.tolist() == [row["step"] for row in ROWS]
    assert found.groups.tolist() == [i // 4 for i in range(len(ROWS))]
    assert found.norms.tolist() == pytest.approx([row["grad_norm"] for row in ROWS])
    assert set(np.unique(found.advantages)) == {-0.5, 0.5}  # reward less the group's mean
    assert found.sources["advantage"] == "reward less the group's mean"


def test_bare_lengths(tmp_path):
    np.save(tmp_path / "flat.npy", LENGTHS.astype(int))
    np.save(tmp_path / "batches.npy", LENGTHS.astype(int).reshape(3, -1))
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(str, LENGTHS.astype(int))))
    for name in ("flat.npy", "batches.npy", "numbers.jsonl"):
        assert read_rollouts(tmp_path / name).lengths.tolist() == LENGTHS.tolist()
    assert (
        read_rollouts(tmp_path / "batches.npy").batches.tolist() == np.repeat(range(3), 16).tolist()
    )


def test_named_columns_and_tokens(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"n": 4, "ids": [1, 2], "step": 0}, {"n": 6, "ids": [3]}])
    found = read_rollouts(tmp_path / "a.jsonl", Columns(length="n", batch="none"))
    assert found.lengths.tolist() == [4, 6]
    assert found.batches is None
    assert read_rollouts(tmp_path / "a.jsonl", Columns(tokens="ids")).lengths.tolist() == [2, 1]


class TestTrlLog:
    """The folder that TRL 1.16 writes with log_completions=True."""

    def write(self, folder, **extra):
        folder.mkdir()
        for step in (1, 2):
            rows = [
                {"step": step, "prompt": [{"role": "user", "content": f"q{i // 2}"}],
                 "completion": [{"role": "assistant", "content": "a b " * (i + step)},
                                {"role": "tool", "content": "not the model's"}],
                 "my_reward": i % 2, **{k: i + 1 for k in extra}, "advantage": i % 2 - 0.5}
                for i in range(4)
            ]  # fmt: skip
            write_parquet(folder / f"completions_{step:05d}.parquet", rows)
        return folder

    def test_with_lengths(self, tmp_path):
        folder = self.write(tmp_path / "completions", completion_length=True)
        found = read_rollouts(folder)
        assert found.lengths.tolist() == [1, 2, 3, 4] * 2
        assert found.batches.tolist() == [0] * 4 + [1] * 4
        assert found.groups.tolist() == [0, 0, 1, 1] * 2
        assert found.advantages.tolist() == [-0.5, 0.5] * 4

    def test_without_lengths_it_says_what_to_do(self, tmp_path):
        with pytest.raises(RolloutError, match=r"--tokenizer.*log_extra"):
            read_rollouts(self.write(tmp_path / "completions"))

    def test_tokenizer_counts_what_the_model_wrote(self, tmp_path):
        pytest.importorskip("transformers")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(
            tmp_path / "tokenizer"
        )
        folder = self.write(tmp_path / "completions")
        found = read_rollouts(folder, tokenizer=str(tmp_path / "tokenizer"))
        assert found.lengths.tolist() == [2, 4, 6, 8, 4, 6, 8, 10]


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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"length": 3}\n{"length": "x"}\n', r"line 2, column 'length': expected a num"),
        ("a.jsonl", '{"length": 3}\n\n{"length": -2}\n', r"line 3, .*'length': .*>= 0, got -2"),
        ("a.jsonl", '{"length": 3}\n{"le', r"line 2: not JSON"),
        ("a.jsonl", '{"length": 3}\n{"other": 4}\n', r"line 2, column 'length': .*got None"),
        ("a.jsonl", '{"length": 2.5}\n', r"line 1, .*a whole number of tokens, got 2.5"),
        ("a.jsonl", '{"length": true}\n', r"line 1, .*a number, got True"),
        ("a.jsonl", "[1]\n", r"line 1: expected an object or a number, got list"),
        ("a.jsonl", '{"x": 1}\n', r"no lengths: .*it has 'x'. Name one with --length-column"),
        ("a.jsonl", '{"token_ids": [1]}\n{"token_ids": 5}\n', r"line 2, .*a list of token ids"),
        ("a.jsonl", '{"length": 0}\n', "every response is empty"),
        ("a.jsonl", "", "no lengths"),
        ("a.jsonl", '{"length": 3, "grad_norm": NaN}\n', r"'grad_norm': expected a finite number"),
        ("a.csv", "length,step\n3,1\n4\n", r"line 3: 1 values for 2 columns"),
        ("a.csv", "length\n3\n\nlong\n", r"line 4, column 'length': expected a number, got 'long'"),
        ("a.csv", "length\n", "has no rows"),
        ("a.csv", "length,length\n3,4\n", r"two columns of one name"),
        ("a.txt", "3\n", r"unknown format '.txt'; expected one of .jsonl"),
        ("a.npy", "3\n", "not an NPY file"),
        ("a.parquet", "3\n", "not a Parquet file"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, text, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(RolloutError, match=message):
        read_rollouts(tmp_path / name)


def test_missing_things(tmp_path, rollouts):
    with pytest.raises(RolloutError, match="no such file"):
        read_rollouts(tmp_path / "none.jsonl")
    with pytest.raises(RolloutError, match=r"without .parquet files"):
        read_rollouts(tmp_path)
    with pytest.raises(RolloutError, match=r"no column 'len'; it has 'step', 'prompt_id'"):
        read_rollouts(tmp_path / "rollouts.jsonl", Columns(length="len"))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2)))
    with pytest.raises(RolloutError, match=r"array of shape \(2, 2, 2\)"):
        read_rollouts(tmp_path / "cube.npy")


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
                      "95% interval 1.20 to 1.20 (12 groups", "rank correlation"):  # fmt: skip
            assert words in text

    def test_json(self, path, capsys):
        assert main(["diagnose", path, "--json", "--beta", "0.8", "--batch-column", "none"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["best_alpha"] == 0.8
        assert found["exponent"]["source"] == "given"
        assert found["methods"][0]["swing"] is None
        assert found["sources"]["length"] == "completion_length"

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
            (["--max-length", "0"], "max_length must be finite and > 0"),
            (["--beta", "nan"], "beta must be finite"),
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
        done = subprocess.run(
            [sys.executable, "-m", "dl_norm", "diagnose", path, "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["lengths"]["responses"] == 48

"""What `python -m dl_norm diagnose` reads: formats, encodings, columns; and which files it refuses,
naming the row. Nothing that a file lacks, or has in half of its rows, goes unsaid."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from dl_norm.diagnose import Columns, RolloutError, diagnose, read_rollouts
from dl_norm.diagnose.text_files import BLOCK_CHARACTERS, BLOCK_ROWS

ROWS = [
    {"step": b, "prompt_id": f"p{b}{p}", "completion_length": 3 + 7 * b + 2 * p + 5 * k * k,
     "reward": float(k % 2), "grad_norm": 0.5 * (3 + 7 * b + 2 * p + 5 * k * k) ** 0.6}
    for b in range(3) for p in range(4) for k in range(4)
]  # fmt: skip
LENGTHS = [row["completion_length"] for row in ROWS]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_arrays(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_jsonl(path, rows, encoding="utf-8", end="\n"):
    path.write_bytes(as_lines(rows).replace("\n", end).encode(encoding))
    return path


def write_json(path, rows, encoding="utf-8"):
    path.write_bytes(json.dumps(rows, indent=2).encode(encoding))


def write_csv(path, rows, encoding="utf-8", delimiter=",", **style):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **style)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_npy(path, rows):
    kinds = [(k, "U8" if isinstance(v, str) else type(v)) for k, v in rows[0].items()]
    np.save(path, np.array([tuple(row.values()) for row in rows], dtype=kinds))


def write_npz(path, rows):
    np.savez(path, **as_arrays(rows))


def pack(path, write, rows):
    write(path.with_suffix(""), rows)
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": write_json,
    "arrays.json": lambda path, rows: path.write_text(json.dumps(as_arrays(rows))),
    "lines.json": write_jsonl,  # as datasets' to_json writes it
    "a.csv": write_csv,
    "a.tsv": partial(write_csv, delimiter="\t"),
    "a.parquet": write_parquet,
    "a.npy": write_npy,
    "a.npz": write_npz,
    "A.CSV": write_csv,
    # marks, encodings, ends of lines, quotes, packing
    "mark.csv": partial(write_csv, encoding="utf-8-sig"),
    "mark.tsv": partial(write_csv, encoding="utf-8-sig", delimiter="\t"),
    "mark.jsonl": partial(write_jsonl, encoding="utf-8-sig"),
    "mark.json": partial(write_json, encoding="utf-8-sig"),
    "utf16.csv": partial(write_csv, encoding="utf-16"),
    "utf16.tsv": partial(write_csv, encoding="utf-16", delimiter="\t"),
    "utf16.jsonl": partial(write_jsonl, encoding="utf-16"),
    "utf32.json": partial(write_json, encoding="utf-32"),
    "windows.jsonl": partial(write_jsonl, end="\r\n"),
    "blank-lines.jsonl": partial(write_jsonl, end="\n\n \n"),
    "unix.csv": partial(write_csv, lineterminator="\n"),
    "quoted.csv": partial(write_csv, quoting=csv.QUOTE_ALL),
    "quoted.tsv": partial(write_csv, quoting=csv.QUOTE_ALL, delimiter="\t"),
    "packed.jsonl.gz": lambda path, rows: pack(path, write_jsonl, rows),
    "packed.json.gz": lambda path, rows: pack(path, write_json, rows),
    "packed.csv.gz": lambda path, rows: pack(path, partial(write_csv, encoding="utf-8-sig"), rows),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_hold_the_same(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    found = read_rollouts(path)
    assert found.lengths.tolist() == LENGTHS
    assert found.batches.tolist() == [row["step"] for row in ROWS]
    assert found.groups.tolist() == [i // 4 for i in range(len(ROWS))]
    assert found.norms.tolist() == pytest.approx([row["grad_norm"] for row in ROWS])
    assert set(np.unique(found.advantages)) == {-0.5, 0.5}  # reward less the group's mean
    assert found.sources["advantage"] == "reward less the group's mean"
    assert (found.unused, found.notes) == ((), ())


def test_bare_lengths(tmp_path):
    lengths = np.array(LENGTHS)
    np.save(tmp_path / "flat.npy", lengths)
    np.save(tmp_path / "batches.npy", lengths.reshape(3, -1))
    np.savez(tmp_path / "length.npz", length=lengths)
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(str, LENGTHS)))
    (tmp_path / "numbers.json").write_text(json.dumps(LENGTHS))
    for name in ("flat.npy", "batches.npy", "length.npz", "numbers.jsonl", "numbers.json"):
        assert read_rollouts(tmp_path / name).lengths.tolist() == LENGTHS, name
    batches = read_rollouts(tmp_path / "batches.npy").batches
    assert batches.tolist() == np.repeat(range(3), 16).tolist()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_many_blocks(tmp_path, suffix):
    """Ids go on from block to block, and an error in a later block names its row."""
    count = 3 * max(BLOCK_ROWS, BLOCK_CHARACTERS // 50)
    rows = [{"step": i // 100, "prompt": f"{i // 7} " * 20, "length": i % 1000 + 1}
            for i in range(count)]  # fmt: skip
    path = tmp_path / f"a{suffix}"
    WRITERS[path.name](path, rows)
    found = read_rollouts(path)
    assert found.lengths.tolist() == [row["length"] for row in rows]
    assert found.batches.tolist() == [row["step"] for row in rows]
    assert found.groups.tolist() == [i // 7 for i in range(count)]
    rows[-2]["length"] = -1
    WRITERS[path.name](path, rows)
    place = {".jsonl": "line", ".json": "item", ".csv": "line", ".parquet": "row"}[suffix]
    number = count - 1 + (suffix == ".csv")
    with pytest.raises(RolloutError, match=rf"a{suffix}, {place} {number}, column 'length': .*-1"):
        read_rollouts(path)


def test_memory_does_not_grow_with_what_is_not_used(tmp_path):
    """30 MB of texts, and token ids of which the numbers are kept."""
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(1000):
            row = {"step": i // 100, "completion_ids": list(range(2000)), "text": "word " * 4000}
            file.write(json.dumps(row) + "\n")
    code = (
        "import resource, sys; from dl_norm.diagnose import read_rollouts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert read_rollouts(sys.argv[1]).lengths.tolist() == [2000] * 1000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 10_000  # KB


class TestColumns:
    def test_named_and_tokens(self, tmp_path):
        rows = [{"n": 4, "ids": [1, 2], "step": 0}, {"n": 6, "ids": [], "step": 0}]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        found = read_rollouts(path, Columns(length="n", batch="none"))
        assert found.lengths.tolist() == [4, 6]
        assert found.batches is None
        assert found.sources == {"length": "n", "batch": "none, as asked"}
        assert found.unused == ("ids", "step")
        assert read_rollouts(path, Columns(tokens="ids")).lengths.tolist() == [2, 0]

    def test_a_named_one_goes_before_a_found_one(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"length": 9, "ids": [1, 2], "x": "a"}])
        assert read_rollouts(path, Columns(tokens="ids")).sources["length"] == "tokens in ids"
        with pytest.raises(RolloutError, match=r"--length-column and --tokens-column both"):
            read_rollouts(path, Columns(tokens="ids", length="length"))
        with pytest.raises(RolloutError, match=r"--text-column needs --tokenizer"):
            read_rollouts(path, Columns(text="x"))

    def test_other_capitalisation(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("Completion Length, STEP, Prompt-ID\n3, 0, a\n5, 1, b\n")
        found = read_rollouts(path)
        assert found.lengths.tolist() == [3, 5]
        assert found.sources == {
            "length": "Completion Length", "batch": "STEP", "group": "Prompt-ID"
        }  # fmt: skip

    def test_numbers_as_text_and_rewards_as_booleans(self, tmp_path):
        rows = [{"length": "3", "prompt_id": 1, "reward": True},
                {"length": "5.0", "prompt_id": 1.0, "reward": False}]  # fmt: skip
        for name in ("a.jsonl", "a.csv"):
            WRITERS[name](tmp_path / name, [{**row, "prompt_id": "1"} for row in rows])
            found = read_rollouts(tmp_path / name)
            assert found.lengths.tolist() == [3, 5]
            assert found.advantages.tolist() == [0.5, -0.5]
        found = read_rollouts(write_jsonl(tmp_path / "a.jsonl", rows))
        assert found.groups.tolist() == [0, 0]
        write_parquet(tmp_path / "a.parquet", [{"length": 3, "reward": True, "uid": 0}])
        assert read_rollouts(tmp_path / "a.parquet").rewards.tolist() == [1]

    def test_unused_columns_may_hold_anything(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"length": 3, "x": None}, {"length": 4, "y": {}}])
        assert read_rollouts(path).lengths.tolist() == [3, 4]

    def test_a_prompt_of_messages_is_a_group(self, tmp_path):
        rows = [{"length": 3, "prompt": [{"role": "user", "content": c}]} for c in "aba"]
        assert read_rollouts(write_jsonl(tmp_path / "a.jsonl", rows)).groups.tolist() == [0, 1, 0]

    def test_an_inner_object_may_have_the_same_names(self, tmp_path):
        rows = [{"length": 3, "info": {"length": 5}}, {"length": 4, "info": {}}]
        assert read_rollouts(write_jsonl(tmp_path / "a.jsonl", rows)).lengths.tolist() == [3, 4]

    def test_a_text_of_any_size_in_csv(self, tmp_path):
        write_csv(tmp_path / "a.csv", [{"text": "x" * 200_000, "length": 3}])
        assert read_rollouts(tmp_path / "a.csv").lengths.tolist() == [3]

    def test_equal_rewards_are_no_advantage(self, tmp_path):
        rows = [{"length": i + 1, "prompt_id": "a", "reward": 1e8 + 0.1} for i in range(3)]
        rewards = [row["reward"] for row in rows]
        assert sum(rewards) / 3 != rewards[0], "a mean that rounds"
        assert read_rollouts(write_jsonl(tmp_path / "a.jsonl", rows)).advantages.tolist() == [0] * 3


class TestFolder:
    def test_in_order_of_numbers(self, tmp_path):
        """verl's rollout_data_dir: a file for each step."""
        for step in (10, 2, 1):
            write_jsonl(tmp_path / f"{step}.jsonl", [{"length": step, "score": 1, "step": step}])
        (tmp_path / ".hidden.csv").write_text("")
        found = read_rollouts(tmp_path)
        assert found.lengths.tolist() == [1, 2, 10]
        assert found.batches.tolist() == [0, 1, 2]
        assert found.notes == ()

    def test_what_is_not_read_is_said(self, tmp_path):
        write_jsonl(tmp_path / "1.jsonl", [{"length": 1}])
        (tmp_path / "notes.txt").write_text("")
        (tmp_path / "older").mkdir()
        assert f"Not read in {tmp_path}: notes.txt, older." in read_rollouts(tmp_path).notes

    @pytest.mark.parametrize("name", ["{}.jsonl", "{}.json", "{}.csv", "{}.parquet", "{}.npz"])
    def test_a_column_that_one_file_lacks(self, tmp_path, name):
        write = WRITERS["a" + name[2:]]
        more = [{"length": 3, "step": 1, "other": 4}]
        for first, second, message in (
            (more, [{"length": 3}], r"2\.\w+.* has no 'step', which .*1\.\w+.* has: .*--batch-c"),
            ([{"length": 3}], more, r"2\.\w+.* has 'step', which .*1\.\w+.* has not: .*none"),
            (more, [{"length": 3, "step": 1, "batch": 2}], r"2\.\w+.* has 'batch', which .*1\.\w+"),
            (more, [{"step": 3}], r"2\.\w+.* has no 'length', which"),
        ):
            write(tmp_path / name.format(1), first)
            write(tmp_path / name.format(2), second)
            with pytest.raises(RolloutError, match=message):
                read_rollouts(tmp_path)
        write(tmp_path / name.format(2), [{"length": 4, "step": 1}])  # what is not used may differ
        assert read_rollouts(tmp_path).lengths.tolist() == [3, 4]

    def test_of_two_formats_or_none(self, tmp_path):
        with pytest.raises(RolloutError, match=r"a folder without .jsonl, .*.npz files"):
            read_rollouts(tmp_path)
        (tmp_path / "a.jsonl").write_text("3\n")
        (tmp_path / "a.csv").write_text("length\n3\n")
        with pytest.raises(RolloutError, match=r"a folder with .csv and .jsonl files"):
            read_rollouts(tmp_path)

    def test_a_type_that_differs(self, tmp_path):
        write_jsonl(tmp_path / "1.jsonl", [{"length": 3, "step": 1}])
        write_jsonl(tmp_path / "2.jsonl", [{"length": 3, "step": "1"}])
        with pytest.raises(RolloutError, match=r"2.jsonl, line 1, .*expected numbers in every row"):
            read_rollouts(tmp_path)


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
        assert found.unused == ("completion", "my_reward")

    def test_without_lengths_it_says_what_to_do(self, tmp_path):
        with pytest.raises(RolloutError, match=r"--tokenizer.*log_extra"):
            read_rollouts(self.write(tmp_path / "completions"))

    def test_tokenizer_counts_what_the_model_wrote(self, tmp_path):
        pytest.importorskip("transformers")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        name = str(tmp_path / "tokenizer")
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(name)
        folder = self.write(tmp_path / "completions")
        found = read_rollouts(folder, tokenizer=name)
        assert found.lengths.tolist() == [2, 4, 6, 8, 4, 6, 8, 10]
        assert found.sources["length"] == f"completion, counted by {name}"
        folder = self.write(tmp_path / "with-lengths", completion_length=True)
        (note,) = read_rollouts(folder, tokenizer=name).notes
        assert note == "--tokenizer is not used: the lengths are completion_length."
        found = read_rollouts(folder, Columns(text="completion"), tokenizer=name)
        assert found.lengths.tolist() == [2, 4, 6, 8, 4, 6, 8, 10]

    def test_lists_of_tokens_in_parquet(self, tmp_path):
        rows = [{"completion_ids": [1] * n} for n in (3, 0, 2)]
        write_parquet(tmp_path / "a.parquet", rows)
        assert read_rollouts(tmp_path / "a.parquet").lengths.tolist() == [3, 0, 2]
        write_parquet(tmp_path / "a.parquet", [*rows, {"completion_ids": None}])
        with pytest.raises(RolloutError, match=r"row 4, .*a list of token ids, got nothing"):
            read_rollouts(tmp_path / "a.parquet")
        write_parquet(tmp_path / "a.parquet", [{"completion_ids": [[1, 2, 3]]}])
        with pytest.raises(RolloutError, match=r"row 1, .*a list of token ids, got \[\[1, 2, 3"):
            read_rollouts(tmp_path / "a.parquet")


HALF = r"has no 'step', which .*line 1 has: .*--batch-column none"
BAD = [
    # lengths
    ("a.jsonl", '{"length": 3}\n{"length": "x"}\n', r"line 2, column 'length': .*tokens.*got 'x'"),
    ("a.jsonl", '{"length": 3}\n\n{"length": -2}\n', r"line 3, column 'length': .*got -2"),
    ("a.jsonl", '{"length": 2.5}\n', r"line 1, .*a whole number of tokens, .*got 2.5"),
    ("a.jsonl", '{"length": 1e300}\n', r"line 1, .*'length': .* 0 to 1,000,000,000, got 1e\+300"),
    ("a.jsonl", '{"length": 3}\n{"length": Infinity}\n', r"line 2, column 'length': .*got inf"),
    ("a.jsonl", '{"length": NaN}\n', r"line 1, column 'length': .*got nan"),
    ("a.jsonl", f'{{"length": 1{"0" * 400}}}\n', r"line 1, column 'length': .*got 1000"),
    ("a.jsonl", f'{{"length": 3}}\n{{"length": 1{"0" * 5000}}}\n', r"line 2: not JSON: Exceeds"),
    ("a.jsonl", '{"length": null}\n', r"line 1, column 'length': .*got nothing"),
    ("a.jsonl", '{"length": true}\n', r"line 1, .*got True"),
    ("a.jsonl", '{"length": [3]}\n', r"line 1, .*got \[3\]"),
    ("a.json", '[{"length": 3}, {"length": 1e300}]', r"item 2, column 'length': .*got 1e\+300"),
    ("a.json", '{"length": [3, -1]}', r"item 2, column 'length': .*got -1"),
    ("a.csv", "length\n1e300\n", r"line 2, column 'length': .*got '1e300'"),
    ("a.csv", "length\n3\ninf\n", r"line 3, column 'length': .*got 'inf'"),
    ("a.csv", "length\n3\n\nlong\n", r"line 4, column 'length': .*got 'long'"),
    ("a.csv", 'length,x\n"1,024",0\n', r"line 2, column 'length': .*got '1,024'"),
    ("a.csv", "length,step\n,0\n", r"line 2, column 'length': .*got ''"),
    ("a.jsonl", '{"length": 0}\n', "every response is empty"),
    ("a.jsonl", '{"token_ids": [1]}\n{"token_ids": 5}\n', r"line 2, .*a list of token ids, got 5"),
    ("a.jsonl", '{"token_ids": [[1, 2]]}\n', r"line 1, .*a list of token ids, got \[\[1, 2\]\]"),
    # other columns
    ("a.jsonl", '{"length": 3, "grad_norm": NaN}\n', r"'grad_norm': .*nan; --norm-column none"),
    ("a.jsonl", '{"length": 3, "grad_norm": -1}\n', r"'grad_norm': .* 0 or 1e-60 to 1e\+60, got"),
    ("a.jsonl", '{"length": 3, "reward": 1e200}\n', r"'reward': .*at most 1e\+60 .*got 1e\+200"),
    ("a.jsonl", '{"length": 3, "advantage": true}\n', r"'advantage': expected a number, .*True"),
    ("a.jsonl", '{"length": 3, "step": null}\n', r"'step': .*got nothing; --batch-column none"),
    ("a.jsonl", '{"length": 3, "step": NaN}\n', r"line 1, column 'step': .*got nan"),
    ("a.jsonl", '{"length": 3, "step": true}\n', r"line 1, column 'step': .*got True"),
    ("a.jsonl", '{"length": 3, "step": 1}\n{"length": 3, "step": "1"}\n', r"line 2, .*got '1'"),
    ("a.csv", "length,prompt_id\n3,a\n3,\n", r"line 3, column 'prompt_id': .*text in every row"),
    # columns that are half there, twice there, or not there
    ("a.jsonl", '{"length": 3}\n{"other": 4}\n', r"line 2 has no 'length', which .*line 1 has"),
    ("a.jsonl", '{"length": 3, "step": 0}\n{"length": 4}\n', f"line 2 {HALF}"),
    ("a.jsonl", '{"length": 4}\n{"length": 3, "step": 0}\n', r"line 2 has 'step', which .*line 1"),
    ("a.jsonl", '{"length": 3, "step": 0}\n4\n', f"line 2 {HALF}"),
    ("a.json", '[{"length": 3, "uid": 0}, {"length": 3}]', r"item 2 has no 'uid', which .*item 1"),
    ("a.jsonl", '{"x": 1}\n', r"no lengths: .*it has 'x'. Name one with --length-column"),
    ("a.csv", "length,length\n3,4\n", r"two columns that may be the length: 'length' and 'length'"),
    ("a.csv", "length,Length\n3,4\n", r"two .*'length' and 'Length'; --length-column names one"),
    ("a.jsonl", '{"length": 3, "length": 4}\n', r"line 1: two values of one name .*'length'"),
    ("a.jsonl", '{"length": 3}\n' * 9 + '{"length": 3, "length": 4}\n', r"line 10: two values of"),
    ("a.json", '[{"length": 3, "length": 4}]', r"a.json: two values of one name .*'length'"),
    # what is no such file
    ("a.jsonl", '{"length": 3}\n{"le', r"line 2: not JSON"),
    ("a.jsonl", '{"length": 3}{"length": 4}\n', r"line 1: not JSON: more than one value"),
    ("a.jsonl", '{"length": 3}, {"length": 4}\n', r"line 1: not JSON: more than one value"),
    ("a.jsonl", '{"length":\n3}\n', r"line 1: not JSON"),
    ("a.jsonl", "[" * 100_000 + "\n", r"line 1: not JSON"),
    ("a.jsonl", '[{"length": 3}]\n', r"line 1: expected an object or a number, got list; .*.json"),
    ("a.jsonl", '{"length": 3}\n"x"\n', r"line 2: expected an object or a number, got str"),
    ("a.json", '{"length": 3}', r"expected an array of objects or an object of arrays"),
    ("a.json", '{"length": {"0": 3}}', r"an object of arrays \(pandas: to_json\(orient='records'"),
    ("a.json", '{"length": [3, 4], "step": [0]}', r"arrays of different lengths: .*'step': 1"),
    ("a.json", '[{"length": 3},', r"a.json: not JSON"),
    ("a.json", '["x"]', r"item 1: expected an object or a number, got str"),
    ("a.csv", "length,step\n3,1\n4\n", r"line 3: 1 values for 2 columns"),
    ("a.csv", "length,step\n3,1,2\n", r"line 2: 3 values for 2 columns"),
    ("a.csv", "3\n5\n", r"line 1: expected the names of the columns, got numbers"),
    ("a.csv", "length;step\n3;1\n", r"line 1: expected columns apart by commas, .*semicolons"),
    ("a.tsv", "length,step\n3,1\n", r"line 1: expected columns apart by tabs, .*has commas"),
    ("a.csv", 'length\n"3"x\n', r"line 2: not CSV"),
    ("a.csv", b"length,prompt\n3,caf\xe9\n", r"line 2: not UTF-8 text"),
    ("a.jsonl", b'{"length": 3}\n{"prompt": "\xff"}\n', r"line 2: not UTF-8 text"),
    ("a.csv", "length\n3\n".encode("utf-16-le"), r"UTF-16 without a byte-order mark"),
    ("a.csv", b"\xff\xfel\x00e\x00n", r"not UTF-16 text"),
    ("a.jsonl.gz", gzip.compress(b'{"length": 3}\n' * 9, mtime=0)[:-9], r"not a whole gzip file"),
    ("a.txt", "3\n", r"unknown format '.txt'; expected one of .jsonl"),
    ("a.parquet.gz", "3\n", r"unknown format '.parquet.gz'; .* or .gz of a text format"),
    ("a", "3\n", r"unknown format ''"),
    ("a.npy", "3\n", "not an NPY or NPZ file"),
    ("a.npz", b"PK\x03\x04", "not an NPY or NPZ file"),
    ("a.parquet", "3\n", "not a Parquet file"),
    # nothing in it
    ("a.jsonl", "", "has no rows"),
    ("a.jsonl", "\n \n", "has no rows"),
    ("a.json", "", "has no rows"),
    ("a.json", "[]", "has no rows"),
    ("a.json", '{"length": []}', "has no rows"),
    ("a.csv", "", "has no rows"),
    ("a.csv", "length\n", "has no rows"),
    ("a.tsv", "length\tstep\n", "has no rows"),
    ("a.npy", "", "not an NPY or NPZ file"),
    ("a.parquet", "", "not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RolloutError, match=message) as error:
        read_rollouts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"length": [3.0, 2.5]}, r"row 2, column 'length': .*got .*2.5"),
        ({"length": [3, 4], "step": [0]}, r"arrays of different lengths: .*'step': 1"),
        ({"length": np.ones((2, 3))}, r"expected \(N,\) values in 'length', got \(2, 3\)"),
        ({"length": np.array([{}])}, r"not an NPY or NPZ file of numbers: Object arrays"),
        ({"length": np.array([3 + 1j])}, r"row 1, column 'length': .*got .*3"),
        ({"length": np.array(["2026-11-24"], "M8[ns]")}, r"row 1, column 'length': .*datetime64"),
        ({"length": np.array([True])}, r"row 1, column 'length': .*True"),
        ({"length": np.array([], int)}, "has no rows"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RolloutError, match=message):
        read_rollouts(tmp_path / "a.npz")


def test_bad_parquet_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def refused(message, *columns, names=("length", "step")):
        pq.write_table(pa.Table.from_arrays(list(map(pa.array, columns)), names), path)
        with pytest.raises(RolloutError, match=message):
            read_rollouts(path)

    path = tmp_path / "a.parquet"
    refused("two columns that may be the length", [1], [2], names=["length", "length"])
    refused("row 2, column 'length': .*got nothing", [1, None], [0, 0])
    refused("row 2, column 'length': .*got .*1e.300", [1, 1e300], [0, 0])
    refused("row 2, column 'step': .*got nothing", [1, 1], [0, None])
    refused("row 1, column 'step': .*got nothing", [1, 1], pa.nulls(2))
    refused("has no rows", pa.array([], pa.int64()), pa.array([], pa.int64()))


def test_missing_things(tmp_path):
    with pytest.raises(RolloutError, match="no such file"):
        read_rollouts(tmp_path / "none.jsonl")
    path = write_jsonl(tmp_path / "rollouts.jsonl", ROWS)
    with pytest.raises(RolloutError, match=r"no column 'len'; it has 'step', 'prompt_id'"):
        read_rollouts(path, Columns(length="len"))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2)))
    with pytest.raises(RolloutError, match=r"array of shape \(2, 2, 2\)"):
        read_rollouts(tmp_path / "cube.npy")


def test_a_mark_leaves_the_first_column(tmp_path):
    """It became a column of another name: the batches one, and beta another number."""
    for encoding in ("utf-8", "utf-8-sig"):
        write_csv(tmp_path / f"{encoding}.csv", ROWS, encoding=encoding)
    found, expected = (
        diagnose(read_rollouts(tmp_path / f"{name}.csv")).to_dict()
        for name in ("utf-8-sig", "utf-8")
    )
    assert found == expected
    assert found["lengths"]["batches"] == 3

"""Which columns of a file are used: by name, decided once and held to by every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

# Names that are looked for, in this order, where no column is named by the user.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "length": (
        "length", "lengths", "completion_length", "response_length", "num_tokens",
        "completion_tokens",
    ),
    "tokens": ("completion_ids", "response_ids", "token_ids", "output_ids"),
    "batch": ("batch", "step", "global_step"),
    "group": ("group", "group_id", "prompt_id", "uid", "prompt", "input"),
    "reward": ("reward", "rewards", "score"),
    "advantage": ("advantage", "advantages"),
    "norm": ("grad_norm", "gradient_norm"),
    "text": ("completion", "completions", "response", "output"),
}  # fmt: skip
LENGTH_KINDS = ("length", "tokens", "text")  # one of these gives the lengths
NONE = "none"  # as a column's name: do not use such a column, whatever the file has


class RolloutError(ValueError):
    """A file that cannot be used: which row, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Columns:
    """Names of columns. None: the first of ``DEFAULTS`` that the file has, in any capitalisation;
    "none": no such column.

    length: tokens that count. tokens: lists of token ids, counted where there is no length.
    batch: which rollout batch. group: which prompt. reward; advantage: one number each. norm: norm
    of the gradient of the summed token losses. text: what the model wrote, counted with a
    tokenizer where there are neither lengths nor tokens. Of the last two and length, one that is
    named here goes before those that are found.
    """

    length: str | None = None
    tokens: str | None = None
    batch: str | None = None
    group: str | None = None
    reward: str | None = None
    advantage: str | None = None
    norm: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Cells:
    """Some rows of one column, as a file holds them."""

    kind: str  # a key of DEFAULTS
    name: str
    values: Sequence[Any]  # a list, or a numpy array
    where: Callable[[int], str]  # what to call a row in an error

    def error(self, row: int, expected: str) -> RolloutError:
        value = self.values[row]
        shown = "nothing" if value is None else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        message = f"{self.where(row)}, column {self.name!r}: expected {expected}, got {shown}"
        if self.kind not in LENGTH_KINDS:
            message += f"; --{self.kind}-column none leaves the column out"
        return RolloutError(message)


@dataclass(frozen=True)
class Block:
    """Some rows of a file, the columns that are used."""

    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str]

    def cells(self, kind: str, name: str) -> Cells:
        return Cells(kind, name, self.columns[name], self.where)


class Selection:
    """The column of each kind, chosen from the names that are seen first.

    Other rows and files may have other names, but must lead to the same choice: a column that only
    some of the rows have is an error.
    """

    def __init__(self, columns: Columns, *, tokenizer: bool = False):
        self.columns = columns
        self.tokenizer = tokenizer
        self.used: dict[str, str] | None = None  # kind -> name of the column
        self.unused: tuple[str, ...] = ()
        self._first = ""
        named = [kind for kind in LENGTH_KINDS if getattr(columns, kind) not in (None, NONE)]
        if len(named) > 1:
            options = " and ".join(f"--{kind}-column" for kind in named)
            raise RolloutError(f"{options} both say where the lengths are: give one of them")
        if named == ["text"] and not tokenizer:
            raise RolloutError("--text-column needs --tokenizer, which counts its tokens")
        self._length_kinds = named or LENGTH_KINDS[: 3 if tokenizer else 2]

    def see(self, names: Sequence[str], where: str) -> dict[str, str]:
        """What is used of the rows at ``where`` that have these columns.

        Raises:
            RolloutError: no lengths, a named column that is not there, two columns that could be
                meant, or names that lead to another choice than the first ones.
        """
        used = self._choose(names, where)
        if self.used is None:
            self._check_first(used, names, where)
            self.used, self._first = used, where
            chosen = set(used.values())
            self.unused = tuple(name for name in names if name not in chosen)
        elif used != self.used:
            raise self._half_there(used, names, where)
        return used

    def _choose(self, names: Sequence[str], where: str) -> dict[str, str]:
        used: dict[str, str] = {}
        for kind in self._length_kinds:
            if name := self._find(kind, names, where):
                used[kind] = name
                break
        for kind in DEFAULTS:
            if kind not in LENGTH_KINDS and (name := self._find(kind, names, where)):
                used[kind] = name
        return used

    def _find(self, kind: str, names: Sequence[str], where: str) -> str | None:
        asked = getattr(self.columns, kind)
        if asked == NONE:
            return None
        if asked is not None:
            found = [name for name in names if name == asked]
        else:
            found = next(filter(None, ([n for n in names if _plain(n) == default]
                                       for default in DEFAULTS[kind])), [])  # fmt: skip
        if len(found) > 1:
            shown = " and ".join(map(repr, found))
            advice = f"; --{kind}-column names one" if len(set(found)) > 1 else ""
            raise RolloutError(f"{where}: two columns that may be the {kind}: {shown}{advice}")
        return found[0] if found else None

    def _check_first(self, used: dict[str, str], names: Sequence[str], where: str) -> None:
        found = ", ".join(map(repr, names)) or "none"
        for kind in (field.name for field in fields(Columns)):
            asked = getattr(self.columns, kind)
            if asked not in (None, NONE) and asked not in names:
                raise RolloutError(f"{where} has no column {asked!r}; it has {found}")
        if any(kind in used for kind in LENGTH_KINDS):
            return
        message = (
            f"{where} has no lengths: expected a column named {', '.join(DEFAULTS['length'])}, or "
            f"a list of tokens named {', '.join(DEFAULTS['tokens'])}; it has {found}. Name one "
            "with --length-column or --tokens-column"
        )
        if text := self._find("text", names, where):
            message += (
                f", or count the tokens of {text!r} with --tokenizer. For exact lengths in TRL's "
                "log, call log_extra('completion_length', [len(ids) for ids in completion_ids]) in "
                "a reward function"
            )
        raise RolloutError(message)

    def _half_there(self, used: dict[str, str], names: Sequence[str], where: str) -> RolloutError:
        before = self.used or {}
        kind = next(kind for kind in DEFAULTS if used.get(kind) != before.get(kind))
        old, new = before.get(kind), used.get(kind)
        if old is not None and old not in names:
            difference = f"{where} has no {old!r}, which {self._first} has"
        else:
            difference = f"{where} has {new!r}, which {self._first} has not"
        if kind in LENGTH_KINDS:
            advice = f"give every row one, or name another with --{kind}-column"
        else:
            advice = f"give every row one, or leave it out with --{kind}-column none"
        return RolloutError(f"{difference}: {advice}")


def repeated(names: Sequence[str]) -> list[str]:
    """Names that occur more than once."""
    return [name for name, times in Counter(names).items() if times > 1]


def _plain(name: str) -> str:
    """A name without what spreadsheets and people change: "Prompt ID" for prompt_id."""
    return name.strip().casefold().replace(" ", "_").replace("-", "_")

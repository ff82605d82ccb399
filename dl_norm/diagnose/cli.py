"""The command line of ``python -m dl_norm diagnose``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from .analysis import diagnose
from .array_files import INSTALL
from .columns import DEFAULTS, Columns
from .rollouts import read_rollouts

DESCRIPTION = """\
What each loss aggregation does to your response lengths: bias, noise, the swing of the gradient's
scale between batches, the effective number of sequences, and the alpha of DeltaL with least
variance."""

EPILOG = """\
FILE is .jsonl, .json, .csv, .tsv, .parquet, .npy ((N,) or (batches, N) lengths), .npz, or a folder
of files of one format, such as TRL's output_dir/completions or verl's rollout_data_dir; text files
may be packed (.jsonl.gz). Columns are found by their names, see the options; "none" leaves one out.
A gradient norm is that of the summed token losses of one response; where advantages are known (a
column, or reward less the group's mean) it is divided by them."""

_HELP = {
    "length": "tokens that count",
    "tokens": "lists of token ids, counted where there is no length",
    "batch": "rollout batch",
    "group": "prompt",
    "reward": "reward",
    "advantage": "advantage",
    "norm": "gradient norm",
    "text": "what the model wrote, for --tokenizer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--beta",
        type=float,
        help="exponent of Var(g) ~ L^beta, -16 to 16 (default: by gradient norms, or 1)",
    )
    parser.add_argument(
        "--max-length", type=float, metavar="M", help="the constant M (default: longest response)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="cut the responses into batches of N, in order (default: the batch column, or one)",
    )
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw it: .png, .svg, .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="Hugging Face tokenizer that counts the tokens of text, in a file without lengths",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    columns = parser.add_argument_group("columns (default: the first of these that is there)")
    for field in fields(Columns):
        names = ", ".join(DEFAULTS[field.name])
        text = f"{_HELP[field.name]} ({names})"
        columns.add_argument(f"--{field.name}-column", metavar="NAME", help=text)


def run(options: argparse.Namespace) -> int:
    """Print the diagnosis; 0, or 2 with a line on stderr for what cannot be used."""
    columns = Columns(**{f.name: getattr(options, f"{f.name}_column") for f in fields(Columns)})
    try:
        rollouts = read_rollouts(options.file, columns, tokenizer=options.tokenizer)
        diagnosis = diagnose(
            rollouts,
            beta=options.beta,
            max_length=options.max_length,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        if options.figure is not None:
            _draw(options.figure, rollouts, diagnosis, options.batch_size)
        if options.json:
            print(json.dumps(diagnosis.to_dict(), indent=1))
        else:
            _print_tables(diagnosis)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_tables(diagnosis) -> None:
    try:
        from rich.console import Console

        from .tables import tables
    except ImportError as error:
        raise ImportError(f"tables need rich: {INSTALL}, or use --json") from error
    console = Console()
    for part in tables(diagnosis):
        console.print(part, highlight=False, markup=False)


def _draw(path: Path, rollouts, diagnosis, batch_size: int | None) -> None:
    try:
        from .figure import save_figure
    except ImportError as error:
        raise ImportError(f"--figure needs matplotlib: {INSTALL}") from error
    save_figure(path, rollouts, diagnosis, batch_size)
    print(f"figure: {path}", file=sys.stderr)

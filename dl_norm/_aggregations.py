r"""Every loss aggregation is a row of one table.

The loss of a batch is sum_i x_i sum_t l_it, and a method is a choice of the weights x_i. All of
them have the form

    x_i = s_c L_i^p / (M^m S_c(q)),    S_c(e) = sum_{j in c} L_j^e

with L_i the counted tokens of sequence i, M a constant and c the cell of the batch that i belongs
to: the whole batch, its prompt, or the sequences of its prompt whose advantage has the same sign.
s_c is the share of the cell: 1/C for each of C cells, or G_c/G for one with G_c of the G sequences.

So bias and variance of every method are the same two expressions (:mod:`dl_norm.theory`), and a new
method is a new row. Here is neither torch nor numpy: both sides read this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "delta_l", "grpo", "dapo", "dr_grpo", "luspo", "grpo_per_prompt", "prompt_mean", "balanced"
]  # fmt: skip
Cell = Literal["batch", "prompt", "prompt and sign"]


@dataclass(frozen=True)
class Aggregation:
    """A row: x_i = s_c L_i^p / (M^m S_c(q))."""

    label: str  # as in papers
    p: int | None  # None: -alpha
    q: int | None  # None: -alpha
    m: int = 0
    cell: Cell = "batch"
    share: Literal["equal", "by size"] = "equal"

    @property
    def takes_alpha(self) -> bool:
        return self.p is None

    @property
    def takes_max_length(self) -> bool:
        return self.m > 0

    @property
    def takes_groups(self) -> bool:
        return self.cell != "batch"

    @property
    def takes_advantages(self) -> bool:
        return self.cell == "prompt and sign"

    def exponents(self, alpha: float) -> tuple[float, float]:
        """p and q."""
        return (-alpha if self.p is None else self.p), (-alpha if self.q is None else self.q)


AGGREGATIONS: dict[Method, Aggregation] = {
    "delta_l": Aggregation("DeltaL", None, None, m=1),
    "grpo": Aggregation("GRPO", -1, 0),
    "dapo": Aggregation("DAPO", 0, 1),
    "dr_grpo": Aggregation("Dr. GRPO", 0, 0, m=1),
    "luspo": Aggregation("LUSPO", 0, 0),
    "grpo_per_prompt": Aggregation("GRPO per prompt", -1, 0, cell="prompt"),
    "prompt_mean": Aggregation("prompt mean", 0, 1, cell="prompt"),
    "balanced": Aggregation("Balanced", 0, 1, cell="prompt and sign", share="by size"),
}

# Those that need to know nothing of a sequence but its length.
METHODS: tuple[Method, ...] = tuple(
    name for name, row in AGGREGATIONS.items() if not row.takes_groups
)

# What other projects have or call it, and what to use here.
_ELSEWHERE = {
    "bnpo": "it divides by the tokens of each micro-batch, so the gradient depends on how the "
    "batch is cut; 'dapo' is the token mean of the whole batch",
    "token_mean": "that is 'dapo' here",
    "token-mean": "that is 'dapo' here",
    "sequence_mean": "that is 'grpo' here",
    "seq-mean-token-mean": "that is 'grpo' here",
    "seq_mean_token_sum_norm": "that is 'dr_grpo' here",
    "seq-mean-token-sum-norm": "that is 'dr_grpo' here",
    "seq-mean-token-sum": "that is 'luspo' here",
    "vl_norm": "that is 'delta_l' here",
}


def aggregation(method: str) -> Aggregation:
    """The row of ``method``.

    Raises:
        ValueError: no such row; for a name of another project, what to use.
    """
    if not isinstance(method, str) or method not in AGGREGATIONS:
        known = _ELSEWHERE.get(method) if isinstance(method, str) else None
        remedy = f": {known}" if known else ""
        raise ValueError(f"method must be one of {', '.join(AGGREGATIONS)}; got {method!r}{remedy}")
    return AGGREGATIONS[method]

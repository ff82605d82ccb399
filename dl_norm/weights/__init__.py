"""Lengths to weights: what a response counts in the loss, over however many processes.

How to move here from another aggregation, and on several processes: README.md beside this file.
"""

from .._aggregations import AGGREGATIONS, METHODS, Method
from .context_parallel import context_parallel_lengths
from .group_sums import Group
from .lengths import sequence_lengths
from .scaling import gradient_scale
from .weighting import reference_length, reweight_advantages, sequence_weights

__all__ = [
    "AGGREGATIONS",
    "Group",
    "METHODS",
    "Method",
    "context_parallel_lengths",
    "gradient_scale",
    "reference_length",
    "reweight_advantages",
    "sequence_lengths",
    "sequence_weights",
]

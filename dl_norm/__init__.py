"""DeltaL Normalization: the policy loss of reinforcement learning with verifiable rewards.

Every loss aggregation is a weight per sequence, known from the lengths before the forward pass;
one kernel serves them all and writes the final gradient in the forward pass.
"""

import sys
from typing import TYPE_CHECKING

from ._version import __version__

# `python -m dl_norm` needs numpy alone, and PyTorch takes seconds to import. While Python looks for
# the __main__ of a package that -m names, "-m" stands before the arguments in argv, and the name in
# orig_argv. Any other import has everything.
_is_command = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__
if TYPE_CHECKING or not _is_command:
    from . import reference
    from ._formula import surrogate
    from ._kept.sets import KeptSets
    from ._kl import KL
    from ._log_probs.loss import delta_l_loss, policy_loss
    from ._log_probs.modules import DeltaLLoss
    from ._log_probs.off_policy import off_policy_sequence_mask
    from ._log_probs.selection import clip_cov_mask, kl_cov_tokens, second_moment_mask
    from ._metrics import PolicyLossMetrics
    from ._rollout import Reject, RolloutCorrection, rollout_mean_weight
    from ._rows.inputs import PolicyLossOutputs
    from ._rows.linear import linear_policy_loss
    from ._rows.logits import logits_policy_loss
    from ._rows.token_log_probs import token_log_probs
    from .surrogates import Surrogate
    from .weights import (
        context_parallel_lengths,
        gradient_scale,
        reference_length,
        reweight_advantages,
        sequence_lengths,
        sequence_weights,
    )

__all__ = [
    "KL",
    "DeltaLLoss",
    "KeptSets",
    "PolicyLossMetrics",
    "PolicyLossOutputs",
    "Reject",
    "RolloutCorrection",
    "Surrogate",
    "__version__",
    "clip_cov_mask",
    "context_parallel_lengths",
    "delta_l_loss",
    "gradient_scale",
    "kl_cov_tokens",
    "linear_policy_loss",
    "logits_policy_loss",
    "off_policy_sequence_mask",
    "policy_loss",
    "reference",
    "reference_length",
    "reweight_advantages",
    "rollout_mean_weight",
    "second_moment_mask",
    "sequence_lengths",
    "sequence_weights",
    "surrogate",
    "token_log_probs",
]

"""DeltaL Normalization: the policy loss of reinforcement learning with verifiable rewards.

Every loss aggregation is a weight per sequence, known from the lengths before the forward pass;
one kernel serves them all and writes the final gradient in the forward pass.
"""

from . import reference
from ._version import __version__
from .context_parallel import context_parallel_lengths
from .formula import surrogate
from .functional import delta_l_loss, policy_loss
from .linear import linear_policy_loss
from .logits import PolicyLossOutputs, logits_policy_loss
from .masks import off_policy_sequence_mask
from .metrics import PolicyLossMetrics
from .modules import DeltaLLoss
from .scaling import gradient_scale
from .token_log_probs import token_log_probs
from .weights import reweight_advantages, sequence_lengths, sequence_weights

__all__ = [
    "DeltaLLoss",
    "PolicyLossMetrics",
    "PolicyLossOutputs",
    "__version__",
    "context_parallel_lengths",
    "delta_l_loss",
    "gradient_scale",
    "linear_policy_loss",
    "logits_policy_loss",
    "off_policy_sequence_mask",
    "policy_loss",
    "reference",
    "reweight_advantages",
    "sequence_lengths",
    "sequence_weights",
    "surrogate",
    "token_log_probs",
]

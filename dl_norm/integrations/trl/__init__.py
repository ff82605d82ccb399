"""TRL's GRPO trainer with the aggregations of this package.

``DeltaLGRPOTrainer`` is ``trl.GRPOTrainer`` with one thing replaced: how the token losses of a
batch become one number. TRL still generates, scores, computes advantages, log-probs, entropies and
the reference's log-probs, and logs the same metrics under the same names. Use it as the original:

    args = DeltaLGRPOConfig(output_dir="out", aggregation="delta_l", alpha=0.75)
    DeltaLGRPOTrainer(model=..., reward_funcs=..., args=args, train_dataset=...).train()

With ``fused_lm_head=True`` the loss goes from the last hidden states straight to their gradient
(``dl_norm.linear_policy_loss``), mostly with three matrix products in the head instead of four.

The weights of the sequences are computed once per generation batch, over all its sequences on all
processes, right after generation, and travel with the sequences through TRL's shuffling and
splitting. No micro-batch ever normalises by what it happens to see.

TRL's other token losses are ``surrogate="cispo"``, ``"sapo"`` and ``"vespo"``; its ratios of whole
sequences and its "luspo" are there too. What TRL does beside the token loss is kept: the KL term
(with or without its bias correction), asymmetric and two-sided clipping, vLLM's importance sampling
correction, off-policy sequence masking, the high-entropy token mask, a constant entropy bonus and
the load-balancing loss of mixtures of experts. What cannot be kept raises ValueError at
construction.
"""

from __future__ import annotations

import importlib.metadata
import sys

from packaging.version import Version

_INSTALL = "pip install 'dl-norm[trl]' (TRL 1.16 needs Python 3.11 or newer; this is {}.{})".format(
    *sys.version_info
)
try:
    _TRL_VERSION = importlib.metadata.version("trl")
except importlib.metadata.PackageNotFoundError as error:
    raise ImportError(
        f"dl_norm.integrations.trl needs the trl package, which is not installed: {_INSTALL}"
    ) from error
# The trainer overrides two private methods, so the range is the versions that were read and tested.
if not Version("1.16") <= Version(_TRL_VERSION) < Version("1.17"):
    raise ImportError(
        f"dl_norm.integrations.trl needs trl>=1.16,<1.17, but trl {_TRL_VERSION} is installed: "
        f"{_INSTALL}"
    )

from .config import DeltaLGRPOConfig  # noqa: E402  (after the version is checked)
from .monitor import VarianceMonitorCallback  # noqa: E402
from .trainer import DeltaLGRPOTrainer  # noqa: E402

__all__ = ["DeltaLGRPOConfig", "DeltaLGRPOTrainer", "VarianceMonitorCallback"]

"""What each aggregation does to response lengths of your own: ``python -m dl_norm diagnose FILE``.

``read_rollouts`` reads a file, ``diagnose`` computes, ``tables`` and ``save_figure`` show.
"""

from .analysis import Diagnosis, diagnose
from .rollouts import Columns, RolloutError, Rollouts, read_rollouts

__all__ = ["Columns", "Diagnosis", "RolloutError", "Rollouts", "diagnose", "read_rollouts"]

"""What each aggregation does to response lengths of your own: ``python -m dl_norm diagnose FILE``.

``read_rollouts`` reads a file, ``diagnose`` computes, ``tables`` and ``save_figure`` show.
"""

from .analysis import Diagnosis, diagnose
from .columns import Columns, RolloutError
from .rollouts import Rollouts, read_rollouts

__all__ = ["Columns", "Diagnosis", "RolloutError", "Rollouts", "diagnose", "read_rollouts"]

"""The one factor that makes a trainer's optimizer step the gradient of the whole batch's loss."""

from __future__ import annotations

import numpy as np

from .._checks import check_number


def gradient_scale(
    *,
    num_processes: int,
    accumulation_steps: int | None = None,
    micro_batches_per_generation: int | None = None,
    gradients_averaged: bool = True,
    loss_divided_by_accumulation: bool = False,
) -> float:
    r"""Factor on every micro-batch's loss, so that an optimizer step has the right gradient.

    The weights x_i of :func:`dl_norm.sequence_weights` belong to one batch of G sequences, whose
    loss is L = sum_{i=1..G} x_i sum_t l_it. The P processes cut it into S micro-batches each, and
    an optimizer step (a window) sees A micro-batches of each process. Micro-batch m of process p
    calls backward on

        l_pm = scale * sum_{i in micro-batch} x_i sum_t l_it

    and what trainers make of these calls differs in two places:

        gradient of the step = (1/R) (1/D) sum_p sum_{m in window} grad l_pm

    - R = P where gradients are **averaged** over processes: DistributedDataParallel, FSDP and
      FSDP2, DeepSpeed, and most trainers on top of them. R = 1 where they are summed
      (``gradients_averaged=False``): FSDP2 after ``set_gradient_divide_factor(1.0)``, or an
      all-reduce of one's own.
    - D = A where the trainer or the engine **divides** each loss by the number of accumulation
      steps (``loss_divided_by_accumulation=True``): ``accelerator.backward``, the plain
      ``transformers.Trainer``, DeepSpeed's ``engine.backward``, Megatron's schedules. D = 1 where
      nobody does: a loop of one's own, TRL's GRPOTrainer, verl's FSDP engine.

    The gradient wanted is (S/A) sum_{i in window} x_i grad sum_t l_it. If the window is the whole
    batch (S = A) that is exactly grad L. With S > A (several steps on one generation, mini-batches)
    the average of the S/A steps that use up the batch is grad L; with S < A (several generations
    in one step) the step is the average of its A/S batches' gradients. Equating the two:

        scale = R D S / A

    S and A enter as S/A (and as D), so they may be counted in any unit of equal parts, such as
    mini-batches, as long as nobody divides by A.

    | trainer                                                  | scale                            |
    |----------------------------------------------------------|----------------------------------|
    | own loop, weights over the window, DDP or FSDP           | P                                |
    | the same through ``accelerator.backward`` or DeepSpeed   | P A                              |
    | gradients summed over processes                          | 1                                |
    | TRL: S = ``steps_per_generation``                        | P S / A                          |
    | verl: S = mini-batches per rollout, A = 1                | P S, with P = ``dp_size``        |
    | context parallel, gradients averaged over data x context | P = data size * context size     |

    Args:
        num_processes: P, processes whose gradients are reduced together: the data-parallel size,
            times the context-parallel size if the reduction spans it (FSDP over both). Tensor and
            pipeline parallel ranks do not count. Required; 1 for a single process.
        accumulation_steps: A, micro-batches of a process in **this** window (the last one of an
            epoch may be shorter). Leave A and S out where the window is the weights' whole batch.
        micro_batches_per_generation: S, micro-batches of a process in the batch over which the
            weights were computed. An S without A raises.
        gradients_averaged: True if gradients are averaged over the processes, False if summed.
        loss_divided_by_accumulation: True if something divides the loss by A afterwards.

    Returns:
        A Python float. Multiply the weights (or the loss) of every micro-batch by it.

    Raises:
        TypeError: a count that is not an int, a switch that is not a bool.
        ValueError: a count below 1; S without A, division by A without A; an A without effect.

    The KL and entropy terms that share the weights take the same factor.
    """
    num_processes = _count(num_processes, "num_processes")
    _check_switch(gradients_averaged, "gradients_averaged")
    _check_switch(loss_divided_by_accumulation, "loss_divided_by_accumulation")
    if accumulation_steps is None:
        needs = {
            "micro_batches_per_generation": micro_batches_per_generation is not None,
            "loss_divided_by_accumulation": loss_divided_by_accumulation,
        }
        for name in (name for name, given in needs.items() if given):
            raise ValueError(
                f"{name} needs accumulation_steps, the micro-batches of a process in one optimizer "
                "step; without it the scale would be that of a single micro-batch"
            )
    else:
        accumulation_steps = _count(accumulation_steps, "accumulation_steps")
        if micro_batches_per_generation is not None:
            micro_batches_per_generation = _count(
                micro_batches_per_generation, "micro_batches_per_generation"
            )
        elif not loss_divided_by_accumulation:
            raise ValueError(
                f"accumulation_steps={accumulation_steps} has no effect alone. If the weights "
                "belong to several windows or to part of one, pass micro_batches_per_generation "
                "too; if the trainer divides the loss by it, loss_divided_by_accumulation=True; "
                "else omit it: the gradients of the micro-batches add up as they are"
            )

    reduction = num_processes if gradients_averaged else 1
    division = accumulation_steps or 1
    windows = (micro_batches_per_generation or division) / division
    return float(reduction * windows * (division if loss_divided_by_accumulation else 1))


def _count(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    count = int(value)
    check_number(count, name, f"{name} >= 1", lambda number: number >= 1)
    return count


def _check_switch(value, name: str) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")

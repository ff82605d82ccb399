"""gradient_scale against what trainers do to a loss, played out in one process; the refusals.

test_distributed.py does the same with real processes.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dl_norm
from dl_norm import context_parallel_lengths, gradient_scale
from dl_norm.weights.group_sums import sum_over

WIDTH = 9
SETTINGS = [
    # processes, micro-batches per window, micro-batches per generation
    (1, 1, 1),
    (1, 3, 3),
    (2, 1, 1),
    (4, 2, 2),
    (2, 2, 6),  # three optimizer steps on one generation
    (3, 1, 2),
    (2, 4, 2),  # one step on two generations
    (2, 2, 3),  # windows across the border of two generations
]


def gradient(model, rows, weights, scale):
    """Of one micro-batch, as backward would leave it."""
    log_probs = torch.log_softmax(model, -1)[rows["tokens"]]
    loss = dl_norm.policy_loss(
        log_probs.float(), rows["old"], rows["advantages"], rows["mask"], weights * scale
    )
    return torch.autograd.grad(loss, model)[0]


def generation(seed, sequences):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, WIDTH + 1, (sequences,), generator=generator)
    batch = {
        "tokens": torch.randint(5, (sequences, WIDTH), generator=generator),
        "old": -1.6 + 0.3 * torch.randn(sequences, WIDTH, generator=generator),
        "advantages": torch.randn(sequences, generator=generator),
        "mask": torch.arange(WIDTH) < lengths[:, None],
    }
    return batch, dl_norm.sequence_weights(lengths, alpha=0.75, max_length=WIDTH)


@pytest.mark.parametrize("averaged", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("divided", [True, False], ids=["divided", "as it is"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_mean_step_is_the_gradient_of_a_whole_batch(setting, divided, averaged):
    """A run of windows that uses up whole generations: the mean of its steps' gradients is the mean
    of the generations' gradients, and each step is that of its window alone.

    float64 parameters, float32 log-probs and weights: what is left are the roundings of the loss,
    6e-8 of each token's gradient, hence 1e-6 of the largest entry.
    """
    processes, accumulation, per_generation = setting
    steps = per_generation // math.gcd(accumulation, per_generation)
    micro_batches = steps * accumulation  # of a process, in the whole run
    model = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model.requires_grad_()
    scale = gradient_scale(
        num_processes=processes,
        accumulation_steps=accumulation,
        micro_batches_per_generation=per_generation,
        gradients_averaged=averaged,
        loss_divided_by_accumulation=divided,
    )

    size = 2
    step = torch.zeros(steps, 5, dtype=torch.float64)
    wanted = []
    for index in range(micro_batches // per_generation):
        batch, weights = generation(index, processes * per_generation * size)
        wanted.append(gradient(model, batch, weights, 1.0))
        slices = torch.arange(len(weights)).view(per_generation, processes, size)
        for micro_batch, process in itertools.product(range(per_generation), range(processes)):
            rows = slices[micro_batch, process]
            grad = gradient(model, {k: v[rows] for k, v in batch.items()}, weights[rows], scale)
            # What the trainer does with it:
            grad = grad / (processes if averaged else 1) / (accumulation if divided else 1)
            step[(index * per_generation + micro_batch) // accumulation] += grad
    expected = torch.stack(wanted).mean(0)
    assert expected.abs().max() > 1e-3
    tolerance = 1e-6 * torch.stack(wanted).abs().max().item()
    torch.testing.assert_close(step.mean(0), expected, rtol=0.0, atol=tolerance)


def test_the_trainers_of_the_table():
    assert gradient_scale(num_processes=8) == 8
    assert gradient_scale(num_processes=8, gradients_averaged=False) == 1
    divided = {"accumulation_steps": 3, "loss_divided_by_accumulation": True}
    assert gradient_scale(num_processes=8, **divided) == 24
    # TRL: num_processes * steps_per_generation / gradient_accumulation_steps.
    trl = {"accumulation_steps": 4, "micro_batches_per_generation": 6}
    assert gradient_scale(num_processes=2, **trl) == 3.0
    # A window of one micro-batch is divided by 1.
    assert gradient_scale(num_processes=2, accumulation_steps=1, **{
        "loss_divided_by_accumulation": True, "micro_batches_per_generation": 5}) == 10  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        ({"micro_batches_per_generation": 4}, "micro_batches_per_generation needs accumulation_st"),
        ({"loss_divided_by_accumulation": True}, "by_accumulation needs accumulation_steps"),
        ({"accumulation_steps": 4}, "no effect alone"),
        ({"accumulation_steps": 0, "loss_divided_by_accumulation": True}, "accumulation_steps=0"),
        ({"accumulation_steps": 2, "micro_batches_per_generation": 0}, "generation=0"),
        ({"num_processes": 0}, "num_processes=0"),
    ],
)
def test_half_given_information_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_scale(**{"num_processes": 2, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"num_processes": None},
        {"num_processes": 2.0},
        {"num_processes": True},
        {"num_processes": 2, "gradients_averaged": None},
        {"num_processes": 2, "accumulation_steps": 1.5, "micro_batches_per_generation": 3},
        {"num_processes": 2, "accumulation_steps": 2, "loss_divided_by_accumulation": 2},
    ],
)
def test_wrong_types_are_refused(options):
    with pytest.raises(TypeError, match=r"must be an int|must be True or False"):
        gradient_scale(**options)


def test_numbers_of_numpy_are_numbers():
    """As a configuration or a shape may hold them."""
    given = {
        "num_processes": np.int64(8),
        "accumulation_steps": np.int32(3),
        "micro_batches_per_generation": np.uint8(6),
        "gradients_averaged": np.True_,
        "loss_divided_by_accumulation": np.bool_(True),
    }
    scale = gradient_scale(**given)
    assert scale == 48 and type(scale) is float


def test_the_number_of_processes_has_no_default():
    with pytest.raises(TypeError, match="num_processes"):
        gradient_scale()


def test_one_process_needs_no_group():
    values = torch.tensor([2.0, 3.0])
    assert not dist.is_initialized()
    for group in (None, "local"):
        assert sum_over(values.clone(), group).equal(values)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert context_parallel_lengths(mask, None).tolist() == [2, 0]
    packed = context_parallel_lengths(None, "local", cu_seqlens=torch.tensor([0, 3, 3]))
    assert packed.tolist() == [3, 0]


@pytest.mark.parametrize("name", ["world", "Local", ""])
def test_a_group_by_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="'local' or None"):
        sum_over(torch.ones(()), name)


@pytest.mark.parametrize("group", [2, object(), [0, 1]])
def test_a_group_of_another_type_is_refused(group):
    with pytest.raises(TypeError, match="process group"):
        sum_over(torch.ones(()), group)


def test_a_group_that_this_process_is_not_in_is_refused():
    """torch.distributed.new_group returns this to processes it leaves out."""
    with pytest.raises(ValueError, match="not in the group"):
        sum_over(torch.ones(()), dist.GroupMember.NON_GROUP_MEMBER)

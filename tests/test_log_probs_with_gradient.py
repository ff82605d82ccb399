"""Log-probs with a gradient, for trainers: against autograd through log_softmax."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_tools import fake

from dl_norm.integrations import miles, nemo_rl, slime
from dl_norm.integrations.log_probs import log_probs

SHAPE, WIDTH, VOCABULARY = (2, 5), 6, 17


class Case:
    def __init__(self, dtype: torch.dtype = torch.float32):
        random = torch.Generator().manual_seed(9)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random)

        self.hidden = normal(*SHAPE, WIDTH).to(dtype).requires_grad_()
        self.weight = normal(VOCABULARY, WIDTH).to(dtype).requires_grad_()
        self.logits = (3 * normal(*SHAPE, VOCABULARY)).to(dtype).requires_grad_()
        self.ids = torch.randint(VOCABULARY, SHAPE, generator=random)
        self.mask = torch.rand(SHAPE, generator=random) < 0.7
        self.upstream, self.of_entropy = normal(*SHAPE), normal(*SHAPE)  # of either sign

    def true(self, logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        log_softmax = (logits.double() / temperature).log_softmax(-1)
        found = log_softmax.gather(-1, self.ids[..., None])[..., 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return found * self.mask, entropy * self.mask


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["log-probs", "entropy", "both"])
@pytest.mark.parametrize("of", ["logits", "hidden", "frozen head"])
def test_gradients(of: str, wanted: str, impl: str) -> None:
    case = Case()
    weight = None if of == "logits" else case.weight
    if of == "frozen head":
        weight = case.weight.detach()
    inputs = case.logits if of == "logits" else case.hidden
    ours = log_probs(
        inputs, case.ids, weight, mask=case.mask, entropy_grad=wanted != "log-probs",
        temperature=0.7, impl=impl,
    )  # fmt: skip
    theirs = case.true(inputs if weight is None else inputs @ weight.T, 0.7)
    leaves = [inputs] if weight is None or of == "frozen head" else [inputs, weight]
    results = []
    for found, entropy in (ours, theirs):
        loss = (found * case.upstream).sum() if wanted != "entropy" else 0.0
        if wanted != "log-probs":
            loss = loss + (entropy * case.of_entropy).sum()
        results.append((found, entropy, torch.autograd.grad(loss, leaves)))
    for mine, other in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=1e-5, atol=1e-5)
    for mine, other in zip(results[0][2], results[1][2], strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-5)


def test_half_precision_and_what_is_kept() -> None:
    """The gradient has the dtype of the logits, and no float32 copy of them waits for it."""
    case = Case(torch.bfloat16)
    sizes = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append((tensor.numel(), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        found, entropy = log_probs(case.logits, case.ids)
    assert not entropy.requires_grad
    assert (case.logits.numel(), torch.bfloat16) in sizes
    assert not any(n >= case.logits.numel() and dtype == torch.float32 for n, dtype in sizes)
    (gradient,) = torch.autograd.grad((found * case.upstream).sum(), case.logits)
    case.mask[:] = True
    expected = torch.autograd.grad(
        (case.true(case.logits, 1.0)[0] * case.upstream).sum(), case.logits
    )[0]
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=1e-3)


def test_no_gradient_and_no_second_one() -> None:
    case = Case()
    assert not log_probs(case.logits.detach(), case.ids)[0].requires_grad
    assert log_probs(case.logits, case.ids, entropy=False)[1] is None
    found, _ = log_probs(case.logits, case.ids)
    (gradient,) = torch.autograd.grad(found.square().sum(), case.logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("trainer", "name", "own", "entropy_grad"),
    [
        (slime, "slime.backends.megatron_utils.loss", "log_prob_keep_mask", "with_entropy_grad"),
        (
            miles, "miles.backends.training_utils.loss_hub.logit_processors", "true_on_policy",
            "entropy_requires_grad",
        ),
    ],
)  # fmt: skip
def test_where_the_trainer_s_own_code_runs(
    trainer: Any, name: str, own: str, entropy_grad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dl-norm does not compute, and a micro-batch without tokens."""
    calls = []

    def original(logits, tokens, tp_group, with_entropy=False, **options):
        calls.append((tokens.shape[0], with_entropy, options))
        return "theirs"

    fake(monkeypatch, name, calculate_log_probs_and_entropy=original)
    trainer.use_kernels(SimpleNamespace())
    calculate = sys.modules[name].calculate_log_probs_and_entropy
    case = Case()
    logits, ids = case.logits[0], case.ids[0]
    mask = torch.ones(logits.shape, dtype=torch.bool)
    assert calculate(logits, ids, None, with_entropy=True, **{own: mask}) == "theirs"
    assert calculate(logits[:0], ids[:0], None) == "theirs"
    assert [call[:2] for call in calls] == [(5, True), (0, False)] and calls[0][2][own] is mask
    found, entropy = calculate(logits, ids, None, **{own: None})
    assert found.shape == (5, 1) and entropy is None and len(calls) == 2
    _, entropy = calculate(logits, ids, None, with_entropy=True, **{own: False})
    assert entropy.requires_grad
    options = {"with_entropy": True, entropy_grad: False, "chunk_size": 2}
    _, entropy = calculate(logits, ids, None, **options)
    assert not entropy.requires_grad and entropy.shape == (5,)


def test_nemo_rl_refuses_uneven_shards() -> None:
    module = SimpleNamespace()
    nemo_rl.use_kernels(module)
    group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    with pytest.raises(ValueError, match="even shards"):
        module.DistributedLogprob.apply(torch.ones(1, 2, 4), torch.ones(1, 2), 5, 9, group)

"""Shared fixtures: batches with a known shape, the implementations behind one call, the truth.

Without a CUDA device the Triton kernels run in Triton's interpreter, which has to be chosen before
dl_norm is imported; with DL_NORM_TEST_TARGET=sm_80, sm_90 or sm_100 they are compiled for that GPU
and their PTX is executed on the CPU (see ci/ptx), with sm_90,plus every approximate instruction
off by its documented maximum (minus, random likewise). On a CUDA machine the same tests run
compiled, on "cuda".
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

TARGET = os.environ.get("DL_NORM_TEST_TARGET")
if TARGET:
    from ci.ptx import driver

    driver.install(*TARGET.split(","))
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dl_norm  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # not as `tests`, which others are called too
from interpreter import patch_once  # noqa: E402
from ranks import run as run_file  # noqa: E402

patch_once()

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests and the modules of a few trainers stay: no collection looks at them again.
    Measuring memory collects, which took longer than what is measured."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list]:
    """run_ranks(__file__, ranks): FILE as a script, see ranks.py; its folder is for meeting in and
    for RANK.pt. Returns what these hold; a second call does not run again."""

    @functools.cache
    def run(file: str, ranks: int) -> list:
        folder = tmp_path_factory.mktemp("gloo")
        run_file(file, ranks, folder, TARGET)
        return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]

    return run


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check looks at a value, as where that would synchronise the device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dl_norm.") and hasattr(module, "values_are_free"):
            monkeypatch.setattr(module, "values_are_free", lambda tensor: False)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of one call, in the order of the arguments of policy_loss."""

    log_probs: Tensor
    old_log_probs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    weights: Tensor
    cu_seqlens: Tensor | None = None
    ref_log_probs: Tensor | None = None
    rollout_weights: Tensor | None = None

    def replace(self, **changes: Tensor | None) -> Batch:
        return dataclasses.replace(self, **changes)

    def args(self) -> tuple[Tensor | None, ...]:
        return self.log_probs, self.old_log_probs, self.advantages, self.mask, self.weights

    def kwargs(self) -> dict[str, Tensor | None]:
        return {
            "cu_seqlens": self.cu_seqlens,
            "ref_log_probs": self.ref_log_probs,
            "rollout_weights": self.rollout_weights,
        }

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """``function`` of every floating point tensor but the mask."""
        changes = {
            name: function(tensor)
            for name, tensor in vars(self).items()
            if tensor is not None and name != "mask" and tensor.is_floating_point()
        }
        return self.replace(**changes)

    def rows(self, index: slice | Tensor) -> Batch:
        """A slice of a padded batch, with its own weights."""
        assert self.cu_seqlens is None
        return self.replace(
            **{name: tensor[index] for name, tensor in vars(self).items() if tensor is not None}
        )

    def counted(self) -> Tensor:
        if self.mask is None:
            return torch.ones_like(self.log_probs, dtype=torch.bool)
        return self.mask != 0

    def spread(self, values: Tensor) -> Tensor:
        """Per-sequence or per-token values as one per token."""
        if values.shape != self.weights.shape:
            return values
        if self.cu_seqlens is None:
            return values[:, None].expand(self.log_probs.shape)
        return values.repeat_interleave(self.cu_seqlens.diff())


@pytest.fixture(scope="session")
def make_batch(device: torch.device) -> Callable[..., Batch]:
    def make(
        lengths: Sequence[int],
        width: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "padded",
        holes: bool = False,
        old: bool = True,
        ref: bool = False,
        advantages: str = "sequence",
        rollout: str | None = None,
        method: str = "delta_l",
        max_length: int = 64,
        mask_dtype: torch.dtype = torch.bool,
        seed: int = 0,
    ) -> Batch:
        """Sequences of the given lengths in rows of ``width`` tokens (default: the longest).

        Ratios are lognormal(0, 0.4): about half of them outside the default clip range, none so
        large that it would hide the error of the others. ``layout``: "padded", "packed" (no
        padding, no mask) or "packed_mask" (the padded rows end to end, under their mask).
        """
        random = torch.Generator().manual_seed(seed)
        count = len(lengths)
        width = max(lengths, default=0) if width is None else width
        shape = (count, width)
        mask = torch.arange(width)[None, :] < torch.tensor(lengths, dtype=torch.int64)[:, None]
        if holes:
            mask &= torch.rand(shape, generator=random) < 0.7
        log_probs = -3.0 * torch.rand(shape, generator=random) - 0.01
        streams = {
            "log_probs": log_probs.to(dtype),
            "old_log_probs": (log_probs + 0.4 * torch.randn(shape, generator=random)).to(dtype),
            "ref_log_probs": (log_probs + 0.3 * torch.randn(shape, generator=random)).to(dtype),
            "advantages": torch.randn(shape, generator=random),
            "rollout_weights": torch.rand(shape, generator=random) + 0.5,
        }
        per_sequence = {
            "advantages": torch.randn(count, generator=random),
            "rollout_weights": torch.rand(count, generator=random) + 0.5,
        }
        if not old:
            del streams["old_log_probs"]
        if not ref:
            del streams["ref_log_probs"]
        for name, kind in (("advantages", advantages), ("rollout_weights", rollout)):
            if kind != "token":
                del streams[name]
            if kind != "sequence":
                del per_sequence[name]
        cu_seqlens = None
        counts = mask.sum(1)
        final_mask: Tensor | None = mask.to(mask_dtype)
        if layout == "packed":
            streams = {name: stream[mask] for name, stream in streams.items()}
            cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            final_mask = None
        elif layout == "packed_mask":
            streams = {name: stream.reshape(-1) for name, stream in streams.items()}
            cu_seqlens = torch.arange(count + 1) * width
            final_mask = mask.to(mask_dtype).reshape(-1)
        else:
            assert layout == "padded"
        constants = {"max_length": max_length} if method in ("delta_l", "dr_grpo") else {}
        weights = dl_norm.sequence_weights(counts, method, **constants)
        tensors: dict[str, Tensor | None] = {
            "old_log_probs": None,
            "mask": final_mask,
            "weights": weights,
            "cu_seqlens": cu_seqlens,
            **streams,
            **per_sequence,
        }
        return Batch(**{name: None if t is None else t.to(device) for name, t in tensors.items()})

    return make


@pytest.fixture(scope="session")
def run_loss() -> Callable[..., SimpleNamespace]:
    def run(
        impl: str,
        batch: Batch,
        *,
        upstream: float = 1.0,
        return_metrics: bool = False,
        **options,
    ) -> SimpleNamespace:
        """Loss, gradient (times ``upstream``) and metrics of "triton", "torch" or "reference"."""
        log_probs = batch.log_probs.detach().requires_grad_()
        batch = batch.replace(log_probs=log_probs)
        if impl == "reference":
            function = dl_norm.reference.policy_loss
        else:
            function, options = dl_norm.policy_loss, {**options, "impl": impl}
        outputs = function(
            *batch.args(), **batch.kwargs(), **options, return_metrics=return_metrics
        )
        loss, metrics = outputs if return_metrics else (outputs, None)
        (grad,) = torch.autograd.grad(loss, log_probs, torch.full_like(loss, upstream))
        return SimpleNamespace(loss=loss.detach(), grad=grad, metrics=metrics)

    return run


@pytest.fixture(scope="session")
def truth(run_loss: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    def compute(batch: Batch, *, upstream: float = 1.0, **options) -> SimpleNamespace:
        """The float64 reference, with the scales that errors are measured against.

        grad_scale: the largest term of any token's gradient, where clipped terms are 0 and the
        two halves of the KL term count apart (they cancel). loss_scale: the sum of the absolute
        token losses, as a sum is known to rounding relative to that and no better.
        """
        wide = batch.map(lambda tensor: tensor.double())
        both = run_loss("reference", wide, upstream=upstream, **options)
        without_kl = {**options, "beta": 0.0}
        policy = run_loss("reference", wide, upstream=upstream, **without_kl)
        grad_scale = policy.grad.abs().amax().item() if policy.grad.numel() else 0.0
        # Weights are positive, so token losses of one sign of A have one sign.
        loss_scale = 0.0
        for positive in (True, False):
            advantages = wide.advantages.masked_fill((wide.advantages > 0) != positive, 0.0)
            part = run_loss("reference", wide.replace(advantages=advantages), **without_kl)
            loss_scale += part.loss.abs().item()
        beta = options.get("beta", 0.0)
        if beta and wide.log_probs.numel():
            kl_terms = (wide.ref_log_probs - wide.log_probs).exp() + 1
            kl_terms = beta * wide.spread(wide.weights) * kl_terms
            kl_terms = kl_terms.masked_fill(~wide.counted(), 0.0)
            grad_scale = max(grad_scale, abs(upstream) * kl_terms.amax().item())
            loss_scale += kl_terms.sum().item()
        return SimpleNamespace(
            loss=both.loss, grad=both.grad, grad_scale=grad_scale, loss_scale=loss_scale
        )

    return compute


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an implementation forgets to write holds NaN (or the largest integer)."""
    if TARGET:
        return  # marked already, and reading it raises

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args, **kwargs) -> Tensor:
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            if tensor.dtype in (torch.int32, torch.int64):
                return tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
        (torch, "empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

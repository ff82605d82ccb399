"""What the tests of the adapters share: a rollout with its truth, code out of a trainer's source,
stand-ins for trainers, and the loss of a whole rollout as each trainer puts it together.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "dl_norm" / "integrations" / "README.md"
ALPHA, M = 0.75, 40
LENGTHS = [3, 8, 0, 5, 1, 8]  # one response is empty
T = max(LENGTHS)
CLIP = {"eps_low": 0.2, "eps_high": 0.3, "dual_clip": 3.0}
# Two float32 sums of the same terms, one with the weights on the advantages.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-7}
# The trainers' losses are other float32 formulas of the same number.
THEIRS = {"rtol": 1e-5, "atol": 1e-6}


# -- a rollout


@dataclass
class Rollout:
    """Responses of a rollout, padded to T."""

    log_probs: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor  # (B,)
    widths: list[int]  # tokens of each response, counted or not

    @property
    def lengths(self) -> Tensor:
        return (self.mask != 0).sum(-1)

    def __len__(self) -> int:
        return len(self.widths)

    def cut(self, stream: Tensor) -> list[Tensor]:
        """The rows of a stream without padding."""
        return [row[:n] for row, n in zip(stream, self.widths, strict=True)]

    def true(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Loss and gradient in float64 of the whole batch in one piece."""
        log_probs = self.log_probs.detach().double().requires_grad_()
        weights = dl_norm.sequence_weights(self.lengths, alpha=ALPHA, max_length=M)
        loss = dl_norm.reference.policy_loss(
            log_probs, self.old.double(), self.advantages, self.mask, weights, **own(options)
        )
        loss.backward()
        return loss.detach().float(), log_probs.grad.float()

    def check(self, loss: Tensor, **options: Any) -> None:
        """``loss`` is that of the whole batch, its gradient by ``log_probs`` included."""
        true_loss, true_gradient = self.true(**options)
        (gradient,) = torch.autograd.grad(loss, self.log_probs)
        assert gradient.dtype == self.log_probs.dtype
        torch.testing.assert_close(loss.detach().float(), true_loss, **TOLERANCE)
        rounded = TOLERANCE if gradient.dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-7}
        torch.testing.assert_close(gradient.float(), true_gradient, **rounded)


def own(options: dict[str, Any]) -> dict[str, Any]:
    """The clip settings of the tests' trainers under a user's own options."""
    return options if "surrogate" in options else {**CLIP, **options}


def make_rollout() -> Rollout:
    random = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), T)
    old = -3 * torch.rand(shape, generator=random)
    log_probs = old + 0.6 * torch.randn(shape, generator=random)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[1, 2:4] = False  # a tool's tokens
    advantages = torch.randn(len(LENGTHS), generator=random)
    return Rollout(log_probs.requires_grad_(), old, mask, advantages, list(LENGTHS))


def _strided(stream: Tensor) -> Tensor:
    """The same values with a row stride and a column stride, as slices of wider tensors have."""
    wide = stream.new_zeros((stream.shape[0], 2 * stream.shape[1] + 3))
    wide[:, 1:-2:2] = stream
    return wide[:, 1:-2:2]


def _streams(rollout: Rollout, change: Callable[[Tensor], Tensor]) -> Rollout:
    new = change(rollout.log_probs.detach()).requires_grad_()
    return replace(rollout, log_probs=new, old=change(rollout.old))


# How trainers hand their tensors over.
VARIANTS: dict[str, Callable[[Rollout], Rollout]] = {
    "as they are": lambda r: r,
    "strided": lambda r: replace(_streams(r, _strided), mask=_strided(r.mask)),
    "bfloat16": lambda r: _streams(r, lambda stream: stream.bfloat16()),
    "int64 mask": lambda r: replace(r, mask=r.mask.long()),
    "float mask": lambda r: replace(r, mask=r.mask.float()),
    "one response": lambda r: Rollout(
        r.log_probs.detach()[1:2].requires_grad_(), r.old[1:2], r.mask[1:2], r.advantages[1:2], [T]
    ),
    "one empty response": lambda r: Rollout(
        r.log_probs.detach()[2:3].requires_grad_(), r.old[2:3], r.mask[2:3], r.advantages[2:3], [0]
    ),
    "nothing counts": lambda r: replace(r, mask=torch.zeros_like(r.mask)),
}


# -- trainers: what was checked, and code out of their sources


@dataclass
class Trainer:
    """A line of the table of trainers in dl_norm/integrations/README.md."""

    name: str
    version: str  # of a wheel, or a commit
    date: str
    level: str  # "supported", "recipe", "retired"

    @property
    def is_wheel(self) -> bool:
        return re.fullmatch(r"[\d.]+", self.version) is not None


def trainers() -> dict[str, Trainer]:
    """The table, by the trainer's name. The first column may be a link."""
    row = re.compile(
        r"^\| \[?(?P<name>[\w.-]+)[^|]*\| (?P<level>\w+) \| `?(?P<version>[\w.]+)`?[^|]*"
        r"\| (?P<date>\d{4}-\d\d-\d\d) \|",
        re.MULTILINE,
    )
    return {match["name"]: Trainer(**match.groupdict()) for match in row.finditer(PAGE.read_text())}


def wheel_version(distribution: str) -> str | None:
    """Of a wheel in `.venv-trainers`, or None."""
    folder = str(ROOT / ".venv-trainers")
    for found in importlib.metadata.distributions(name=distribution, path=[folder]):
        return found.version
    return None


def clones() -> Path | None:
    folder = os.environ.get("TRAINER_SOURCES")
    return Path(folder) if folder else None


def commit(clone: Path) -> str:
    return subprocess.check_output(["git", "-C", clone, "rev-parse", "HEAD"], text=True).strip()


WHEELS = ("skyrl", "areal", "openrlhf", "torchtitan", "trl", "unsloth", "unsloth_zoo", "swift")


def source(path: str) -> Path:
    """A file of a wheel, of a clone ("slime/..." is in the clone `slime`), or anywhere else."""
    if Path(path).is_absolute():
        return Path(path)
    wheel = ROOT / ".venv-trainers" / path
    if path.split("/")[0] in WHEELS:
        if not wheel.exists():
            pytest.skip(f"{path} is not there: bash ci/trainers_env.sh")
        return wheel
    if clones() is None:
        pytest.skip("TRAINER_SOURCES is not set: a folder with clones, see ci/trainers_env.sh")
    if not (clones() / path).exists():
        pytest.skip(f"{path} is not in TRAINER_SOURCES={clones()}")
    return clones() / path


def lift(path: str, *names: str, keep: tuple[str, ...] = (), **namespace: Any) -> SimpleNamespace:
    """Definitions of a source file ("function", "Class", "Class.method", "CONSTANT"), alone.

    They see ``namespace``, torch and one another. Decorators are dropped but for those of ``keep``,
    annotations are not evaluated.
    """
    file = source(path)
    found = _definitions(file)
    space = {"torch": torch, "Tensor": Tensor, **namespace}
    for name in names:
        if name not in found:
            pytest.fail(f"{path} has moved: it has no {name} any more")
        node = copy.deepcopy(found[name])
        if name not in keep:
            node.decorator_list = []
        code = compile(
            ast.Module([node], []), str(file), "exec", flags=__future__.annotations.compiler_flag
        )
        exec(code, space)
    return SimpleNamespace(**{name.split(".")[-1]: space[name.split(".")[-1]] for name in names})


@functools.cache
def _definitions(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found[f"{node.name}.{inner.name}"] = inner
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, node)
    return found


def calls(path: str, name: str) -> list[ast.Call]:
    """The calls of ``name`` in a source file."""
    nodes = ast.walk(ast.parse(source(path).read_text()))
    found = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name]
    if not found:
        pytest.fail(f"{path} has moved: nothing in it calls {name} any more")
    return found


def plain(function: Any) -> str:
    """The parameters without annotations, and without a user's own options."""
    parameters = inspect.signature(function).parameters.values()
    texts = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
    return ", ".join(text for text in texts if text != "**options")


def check_signature(function: Any, checked: str) -> None:
    """A trainer's function has the parameters that the adapter was written for."""
    now = plain(function)
    assert now == checked, (
        f"{function.__qualname__} has moved: its parameters are now ({now}); the adapter was "
        f"checked with ({checked}). Read the trainer's change, then mend the adapter, this "
        "signature and the version in dl_norm/integrations/README.md"
    )


# As read in the versions of the table; the tests of the trainers read them from the source.
SIGNATURES = {
    "skyrl": "log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None",
    "skyrl trainer": "self, data, mini_batch_boundaries, prompt_boundaries=None",
    "prime-rl compute_loss": (
        "trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask, rl_weights, "
        "ce_weights, ref_kl_weights, rl_loss_fn, rl_scale, ce_scale, ref_kl_scale"
    ),
    "slime": "args, batch, logits, sum_of_sample_mean",
    "slime reducer": (
        "total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False"
    ),
    "slime advantages": "args, rollout_data",
    "miles rewards": "args, samples",
    "nemo-rl": "self, next_token_logprobs, data, global_valid_seqs, global_valid_toks",
    "nemo-rl estimator": "self, prompt_ids, rewards, mask, **kwargs",
    "areal": "self, logprobs, entropy, input_data, vocab_min_logits=None, vocab_max_logits=None",
    "areal weight": "self, input_data",
    "roll": "self, data, output_tensor",
    "torchtitan": (
        "self, logits, labels, global_valid_tokens=None, generator_logprobs, advantages, loss_mask"
    ),
    "torchtitan batcher": "self",
    "unsloth": "self, inputs",
    "ms-swift": "self, samples, rewards_per_func, batch_encoded_inputs",
    "megatron": "rollouts, tokenizer, seq_len, request_ledger",
}


def check_hook(function: Any, name: str) -> None:
    check_signature(function, SIGNATURES[name])


class Dist:
    """torch.distributed of a single process."""

    ReduceOp = torch.distributed.ReduceOp
    all_reduce = staticmethod(lambda *args, **kwargs: None)
    get_rank = staticmethod(lambda: 0)


class Lenient(SimpleNamespace):
    """A trainer's namespace of options; one that is not set here is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


# -- modules that are not installed


def fake(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A stand-in for module ``name`` and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            patch.setitem(sys.modules, path, ModuleType(path))
        if depth > 1:
            parent = sys.modules[".".join(parts[: depth - 1])]
            patch.setattr(parent, parts[depth - 1], sys.modules[path], raising=False)
    for key, value in contents.items():
        patch.setattr(sys.modules[name], key, value, raising=False)


def hollow(patch: pytest.MonkeyPatch, *packages: str) -> None:
    """Packages of a wheel whose `__init__` does not run; their other modules are the real ones."""
    for package in packages:
        folder = source(f"{package.replace('.', '/')}")
        module = ModuleType(package)
        module.__path__ = [str(folder)]
        patch.setitem(sys.modules, package, module)
        parent, _, name = package.rpartition(".")
        if parent:
            patch.setattr(sys.modules[parent], name, module, raising=False)


def fresh_import(patch: pytest.MonkeyPatch, name: str) -> Any:
    """Import ``name`` anew; afterwards it is as absent or present as before."""
    patch.setitem(sys.modules, name, None)  # noted as absent first
    del sys.modules[name]
    return importlib.import_module(name)


def forget(package: str) -> None:
    """Drop what was imported of a trainer, stand-ins and real modules alike."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]

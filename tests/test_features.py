"""The table of features: every "yes" of ours names a test that exists, and other claims of
it that can be counted."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "tests" / "FEATURES.md").read_text()
HEADING = "# Beside the others"
PEERS = ("TRL", "verl", "Liger-Kernel", "OpenRLHF", "paper's code")
YES = re.compile(r"\[yes\]\[(?P<name>[\w-]+)\](, .+)?")
DEFINITION = re.compile(r'^\[(?P<name>[\w-]+)\]: (?P<file>\S+) "(?P<tests>[^"]+)"$', re.MULTILINE)


def section(readme: str) -> str:
    return readme.split(HEADING + "\n", 1)[-1].split("\n## ", 1)[0] if HEADING in readme else ""


def rows(text: str) -> list[list[str]]:
    """The cells of the table's lines, header first, without the line under it."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [line for line in cells if not set("".join(line)) <= set("-:")]


@functools.cache
def known_tests(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the tests in a file that are not skipped out of hand, and all its strings."""
    tree = ast.parse(path.read_text())
    bodies = [tree.body]
    bodies += [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name[:4] == "Test"]
    functions = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef)]
    names = {f.name for f in functions if f.name.startswith("test_") and not never_runs(f)}
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return frozenset(names), frozenset(s for s in strings if isinstance(s, str))


def never_runs(function: ast.FunctionDef) -> bool:
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(re.fullmatch(r"pytest\.mark\.(skip|xfail)(\(.*\))?", mark) for mark in marks)


def problems(readme: str) -> list[str]:
    text = section(readme)
    table = rows(text)
    if not table:
        return [f"no table under {HEADING!r}"]
    header, *body = table
    found = [f"no column {peer}" for peer in PEERS if not any(peer in cell for cell in header)]
    if header[1] != "dl-norm":
        found.append("the first column is not dl-norm")
    definitions = {m["name"]: (m["file"], m["tests"]) for m in DEFINITION.finditer(text)}
    used = set()
    for name, *cells in body:
        if len(cells) != len(header) - 1:
            found.append(f"{name}: {len(cells)} cells")
        elif name.startswith("**"):
            found += [f"{name}: a heading with cells"] if any(cells) else []
        elif not all(cells):
            found.append(f"{name}: an empty cell")
        elif match := YES.fullmatch(cells[0]):
            used.add(match["name"])
        elif not re.fullmatch(r"no(, .+)?", cells[0]):
            found.append(f"{name}: {cells[0]!r} is neither a no nor a yes with its test")
    found += [f"[{name}] is not defined" for name in used - definitions.keys()]
    found += [f"[{name}] is not used" for name in definitions.keys() - used]
    for name, (file, tests) in definitions.items():
        path = ROOT / "tests" / file
        if path.parent != ROOT / "tests" or not path.is_file():
            found.append(f"[{name}]: there is no file {file}")
            continue
        known, strings = known_tests(path)
        for test in tests.split(", "):
            function, _, parameter = test.rstrip("]").partition("[")
            if function not in known:
                found.append(f"[{name}]: there is no test {function} in {file}")
            if parameter and parameter not in strings:
                found.append(f"[{name}]: {file} has no {parameter!r}")
    return found


def test_every_yes_has_its_test() -> None:
    assert not problems(README)
    assert len(rows(section(README))) > 25


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| Liger-Kernel 0.8.5 |", "| others |", "no column Liger-Kernel"),
        ("[yes][dual-clip] |", "yes |", "dual clip: 'yes' is neither"),
        ("[yes][dual-clip] |", "[yes][dual-clip] | yes |", "dual clip: 7 cells"),
        ("[yes][dual-clip] | no |", "[yes][dual-clip] |  |", "dual clip: an empty cell"),
        ("[yes][dual-clip]", "no", "[dual-clip] is not used"),
        ("[dual-clip]: ", "[other]: ", "[dual-clip] is not defined"),
        ("test_options[dual_clip]", "test_option[dual_clip]", "there is no test test_option in"),
        ("test_options[dual_clip]", "test_options[quad]", "test_policy_loss.py has no 'quad'"),
        ('test_options[dual_clip]"', 'check"', "there is no test check in"),  # a helper
        ("[dual-clip]: test_policy", "[dual-clip]: test_", "there is no file test_"),
        (HEADING, "# Features", "no table under"),
    ],
)
def test_the_check_sees(old: str, new: str, message: str) -> None:
    assert old in README
    found = problems(README.replace(old, new, 1))
    assert any(message in problem for problem in found), found


def test_versions_are_those_that_are_tested() -> None:
    """The releases in the header are the ones that the tests' environments install."""
    (header, *_) = rows(section(README))
    sources = {
        "verl": ("ci/verl_env.sh", "verl==(.+)"),
        "OpenRLHF": ("ci/trainers_env.sh", r"openrlhf==(\S+)"),
        "TRL": ("pyproject.toml", r'"trl>=([\d.]+),'),
    }
    for peer, (file, pattern) in sources.items():
        found = re.search(pattern, (ROOT / file).read_text())
        assert found is not None, file
        assert f"{peer} {found[1]}" in header


# -- claims that can be counted


class HeadProducts(TorchDispatchMode):
    """Multiplications in matrix products, in units of N D V."""

    def __init__(self, unit: int):
        super().__init__()
        self.unit, self.total = unit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm", "linear", "bmm", "baddbmm", "matmul"):
            a, b = args[1:3] if "add" in name else args[:2]
            assert a.ndim == b.ndim == 2, "a product that this does not count"
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))

    @property
    def products(self) -> float:
        return self.total / self.unit


def head() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(40, (12,), generator=generator)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_products_with_the_head(impl: str, device: torch.device) -> None:
    """Forward, gradient of the hidden states, gradient of the head: once each."""
    hidden, weight, token_ids = (tensor.to(device).detach() for tensor in head())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    offsets = torch.tensor([0, 5, 12], device=device, dtype=torch.int32)
    weights = torch.tensor([0.1, 0.2], device=device)
    advantages = torch.tensor([1.0, -2.0], device=device)
    with HeadProducts(12 * 8 * 40) as counted:
        loss = dl_norm.linear_policy_loss(
            hidden, weight, token_ids, None, advantages, None, weights,
            cu_seqlens=offsets, chunk_size=6, impl=impl,
        )  # fmt: skip
        loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert counted.products == 3


def test_products_with_the_head_of_trl() -> None:
    """The recomputing backward that the fourth product is of; so the count can see one."""
    kernels = pytest.importorskip("trl.kernels")
    hidden, weight, token_ids = head()
    with HeadProducts(12 * 8 * 40) as counted:
        log_probs, *_ = kernels.ChunkedLogProbFunction.apply(
            hidden, weight, None, token_ids, 1.0, 16
        )
        log_probs.sum().backward()
    assert counted.products == 4


class NothingRead(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading values, or shapes that are values."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in self.READS, f"{name} reads values"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_metrics_without_reading_values(layout: str, make_batch, monkeypatch) -> None:
    """As on a GPU, where reading is not free: weights, loss, metrics and backward. That the
    compiled kernels do not wait either only a GPU can show (test_gpu.py)."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dl_norm.") and hasattr(module, "values_are_free"):
            monkeypatch.setattr(module, "values_are_free", lambda tensor: False)
    batch = make_batch([30, 0, 5], layout=layout, ref=True, rollout="token")
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    with NothingRead():
        lengths = dl_norm.sequence_lengths(batch.mask, batch.cu_seqlens)
        weights = dl_norm.sequence_weights(lengths, max_length=100)
        loss, metrics = dl_norm.policy_loss(
            log_probs, *batch.args()[1:4], weights, **batch.kwargs(),
            dual_clip=3.0, beta=0.1, impl="torch", return_metrics=True,
        )  # fmt: skip
        summary = (metrics + metrics).summary()
        (0.5 * loss).backward()
        with pytest.raises(AssertionError, match="reads values"):
            summary["tokens"].item()
    assert summary["tokens"] == 70 and log_probs.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rollout_correction_without_reading_values(layout: str, make_batch, monkeypatch) -> None:
    """Likewise: the mean weight, a correction by sequences and its metrics."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dl_norm.") and hasattr(module, "values_are_free"):
            monkeypatch.setattr(module, "values_are_free", lambda tensor: False)
    batch = make_batch([30, 0, 5], layout=layout)
    correction = dl_norm.RolloutCorrection(
        "sequence", high=2.0, reject=dl_norm.Reject("k3", "max", high=1.0), veto=0.01, unscored=1.0
    )
    rollout = batch.old_log_probs - 0.1
    with NothingRead():
        mean = dl_norm.rollout_mean_weight(
            batch.old_log_probs, rollout, batch.mask, correction, cu_seqlens=batch.cu_seqlens
        )
        _, metrics = dl_norm.policy_loss(
            *batch.args(), **batch.kwargs(), rollout_log_probs=rollout,
            rollout_correction=correction, rollout_mean_weight=mean, impl="torch",
            return_metrics=True,
        )  # fmt: skip
        summary = (metrics + metrics).summary()
    assert summary["rollout_truncated"] == 30 / 35

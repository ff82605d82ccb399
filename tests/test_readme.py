"""Every code block of the pages is run, or names the test that covers it.

A comment right before the fence says which:

    <!-- run: NAME -->              run in the namespace NAME, one after another within a page;
                                    those of trainers are in `readme_trainers.py`
    <!-- covered by: tests/... -->  run by that test (or what a person types to install)

A python block is executed, of a diff block what is left after it; yaml and toml are parsed and bash
is split into words, for the namespace to look at.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from readme_trainers import NAMESPACES, Namespace, namespace, tiny_batch

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^<!-- (?P<how>run|covered by): (?P<what>\S+) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
PAGES = (
    "README.md",
    "dl_norm/integrations/README.md",
    "dl_norm/integrations/skyrl.md",
    "dl_norm/weights/README.md",
    "dl_norm/diagnose/README.md",
    "bench/README.md",
    "tests/FEATURES.md",
)
BLOCKS = [
    {"page": page, **match.groupdict()}
    for page in PAGES
    for match in BLOCK.finditer((ROOT / page).read_text())
]
RUNS = list(dict.fromkeys((b["page"], b["what"]) for b in BLOCKS if b["how"] == "run"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["text"].split("\n")[0][:40])
def test_block_is_marked(block: dict[str, str]) -> None:
    assert block["how"], f"no marker before this {block['language']} block:\n{block['text']}"
    if block["how"] == "run":
        assert block["what"] in NAMESPACES, f"no namespace {block['what']} in {__file__}"
    else:
        assert (ROOT / block["what"]).is_file(), f"{block['what']} does not exist"


@pytest.mark.parametrize(("page", "name"), RUNS)
def test_blocks_run(page: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make = NAMESPACES[name](monkeypatch)
    space = next(make)
    space.update(__name__="readme", page=page, blocks=[])
    for block in BLOCKS:
        if block["page"] == page and block["what"] == name:
            run(block, space)
    with pytest.raises(StopIteration):
        next(make)


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Links of a page lead to files from the folder it is in, and to headings that are there."""
    text = (ROOT / page).read_text()
    for file, anchor in LINK.findall(text):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page} links to {file}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert anchor in anchors, f"{page}: {file} has no heading #{anchor}"


def test_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {Path(name).name for name in re.findall(r"`([\w./]+\.(?:py|sh))`", text)}
    named |= {name for glob in re.findall(r"`(test_\w*\*\.py)`", text) for name in matching(glob)}
    rooms = (
        "dl_norm",
        "dl_norm/integrations",
        "dl_norm/_kept",
        "dl_norm/_log_probs",
        "dl_norm/_rows",
        "dl_norm/surrogates",
        "dl_norm/weights",
        "dl_norm/kernels",
        "bench",
        "tests",
    )
    paths = [path for room in rooms for path in ROOT.glob(f"{room}/*.py")]
    paths += [*ROOT.glob("ci/*.py"), *ROOT.glob("ci/*.sh")]
    assert {path.name for path in paths} - named <= {"__init__.py", "_version.py", "conftest.py"}
    assert named <= {path.name for path in paths}, "files that are gone"


def matching(glob: str) -> list[str]:
    return [path.name for path in ROOT.glob(f"tests/{glob}")]


def test_verl_and_trl_need_environments_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README warns of: verl's engine patches a class that the supported TRL has not."""
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    patches = list(ROOT.glob(".venv-verl/lib/*/site-packages/verl/models/transformers/monkey_*.py"))
    if not patches:
        pytest.skip("verl is not here: bash ci/verl_env.sh")
    wanted = re.findall(r"from (trl[\w.]*) import (\w+)", patches[0].read_text())
    assert wanted
    for module, name in wanted:
        found = importlib.util.find_spec(module)
        assert found is None or not hasattr(importlib.import_module(module), name), module


def run(block: dict[str, str], space: dict[str, Any]) -> None:
    language, text = block["language"], block["text"]
    if language == "diff":
        text = "".join(line[1:] + "\n" for line in text.splitlines() if not line.startswith("-"))
    if language in ("python", "diff"):
        exec(compile(text, f"{block['page']}: {block['what']}", "exec"), space)
    else:
        space["blocks"].append(parse(language, text))


def parse(language: str, text: str) -> Any:
    if language == "yaml":
        return pytest.importorskip("yaml").safe_load(text)
    if language == "toml":
        # Python 3.10 has no tomllib; pytest brings tomli there.
        name = "tomllib" if importlib.util.find_spec("tomllib") else "tomli"
        return importlib.import_module(name).loads(text)
    return shlex.split(text.replace("\\\n", " "))


# -- the package


@namespace
def loop(_) -> Namespace:
    space = tiny_batch()
    del space["weights"], space["dl_norm"]
    yield space
    assert space["log_probs"].grad.abs().sum() > 0


@namespace
def metrics(_) -> Namespace:
    space = tiny_batch()
    space["other"] = dl_norm.policy_loss(
        *(space[name] for name in ("log_probs", "old", "adv", "mask", "weights")),
        return_metrics=True,
    )[1]
    space["group"] = None
    with one_process():
        yield space
    assert space["metrics"].summary()["tokens"] == space["mask"].sum()


@namespace
def moving(_) -> Namespace:
    space = tiny_batch()
    space["lengths"] = space["mask"].sum(-1)
    yield space
    grpo = dl_norm.sequence_weights(space["lengths"], "grpo")
    assert torch.allclose(space["weights"], grpo)  # of the batch that M was taken from


@namespace
def prompts(_) -> Namespace:
    space = tiny_batch()
    space |= {"lengths": space["mask"].sum(-1), "prompt_ids": torch.tensor([7, 7, 3, 3])}
    space |= {"rewards": torch.tensor([0.0, 1.0, 1.0, 1.0]), "samples": 2}
    yield space
    assert (space["weights"] > 0).tolist() == [True, True, False, False]


@namespace
def surrogate(_) -> Namespace:
    space = {**tiny_batch(), "dl_norm": dl_norm, "torch": torch}
    space["weights"] = dl_norm.sequence_weights(space["mask"].sum(-1), max_length=3072)
    yield space
    assert space["loss"].isfinite() and "saturated" in space["metrics"].summary()
    assert "@triton.jit" in space["surrogate"].source()


@namespace
def heads(_) -> Namespace:
    space = tiny_batch()
    head = torch.nn.Linear(6, 20, bias=False)
    hidden = torch.randn(4, 8, 6, requires_grad=True)
    space |= {
        "hidden": hidden,
        "model": SimpleNamespace(lm_head=head),
        "token_ids": torch.randint(20, (4, 8)),
        "advantages": space["adv"],
        "logits": head(hidden),
    }
    space["old_log_probs"] = space["logits"].log_softmax(-1)[..., 0].detach()
    yield space
    args = [space[k] for k in ("token_ids", "old_log_probs", "advantages", "mask", "weights")]
    one = dl_norm.linear_policy_loss(hidden, head.weight, *args)
    assert torch.allclose(space["loss"], one, rtol=1e-5) and one.abs() > 1e-6
    log_probs = space["logits"].log_softmax(-1).gather(-1, space["token_ids"][..., None])[..., 0]
    difference = (space["old"] - log_probs)[space["mask"]]
    assert difference.abs().max() < 1e-5 and not space["old"].requires_grad


@namespace
def monitor(_) -> Namespace:
    batch = tiny_batch()
    logged: list[dict[str, float]] = []
    rows = [(batch["log_probs"][i : i + 2], batch["mask"][i : i + 2]) for i in (0, 2)]
    yield {"micro_batches": rows, "log": logged.append}
    (summary,) = logged
    assert summary["beta_low"] <= summary["beta"] <= summary["beta_high"]


@namespace
def distributed(_) -> Namespace:
    space = tiny_batch()
    log_probs = space["log_probs"]
    space |= {"log_probs": lambda rows: log_probs[rows], "data_size": 1, "context_size": 1}
    space["micro_batches"] = 2
    with one_process():
        space["context_group"] = space["data_group"] = torch.distributed.group.WORLD
        yield space
    assert log_probs.grad.abs().sum() > 0 and space["scale"] == 1


class one_process:
    """torch.distributed with this process alone."""

    def __enter__(self) -> None:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def __exit__(self, *_: Any) -> None:
        torch.distributed.destroy_process_group()

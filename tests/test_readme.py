"""Every code block of the READMEs is run, or names the test that covers it.

A comment right before the fence says which:

    <!-- run: NAME -->              run in the namespace NAME of this file, one after another
    <!-- covered by: tests/... -->  run by that test (or what a person types to install)

A python block is executed, of a diff block what is left after it; yaml and toml are parsed and bash
is split into words, for the namespace to look at.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^<!-- (?P<how>run|covered by): (?P<what>\S+) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
PAGES = ("README.md", "dl_norm/weights/README.md")
BLOCKS = [
    match.groupdict() | {"page": page}
    for page in PAGES
    for match in BLOCK.finditer((ROOT / page).read_text())
]
NAMES = list(dict.fromkeys(block["what"] for block in BLOCKS if block["how"] == "run"))

Namespace = Iterator[dict[str, Any]]
NAMESPACES: dict[str, Callable[..., Namespace]] = {}


def namespace(function: Callable[..., Namespace]) -> Callable[..., Namespace]:
    """Yields what the blocks find defined, then looks at what they made of it."""
    NAMESPACES[function.__name__.replace("_", "-")] = function
    return function


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["text"].split("\n")[0][:40])
def test_block_is_marked(block: dict[str, str]) -> None:
    assert block["how"], f"no marker before this {block['language']} block:\n{block['text']}"
    if block["how"] == "run":
        assert block["what"] in NAMESPACES, f"no namespace {block['what']} in {__file__}"
    else:
        assert (ROOT / block["what"]).is_file(), f"{block['what']} does not exist"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make = NAMESPACES[name](monkeypatch)
    space = next(make)
    space.update(__name__="readme", blocks=[])
    for block in BLOCKS:
        if block["what"] == name:
            run(block, space)
    with pytest.raises(StopIteration):
        next(make)


def test_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {Path(name).name for name in re.findall(r"`([\w./]+\.(?:py|sh))`", text)}
    named |= {name for glob in re.findall(r"`(test_\w*\*\.py)`", text) for name in matching(glob)}
    rooms = (
        "dl_norm",
        "dl_norm/integrations",
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


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def sibling(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


adapters = sibling("test_adapters")  # stand-ins for the trainers


def tiny_batch() -> dict[str, Any]:
    mask = torch.arange(8) < torch.tensor([3, 8, 1, 5])[:, None]
    log_probs = -torch.rand(4, 8)
    return {
        "dl_norm": dl_norm,
        "torch": torch,
        "old": log_probs.clone(),
        "old_log_probs": log_probs.clone(),
        "log_probs": log_probs.requires_grad_(),
        "adv": torch.randn(4),
        "mask": mask,
        "weights": dl_norm.sequence_weights(mask.sum(-1), max_length=3072),
    }


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


# -- the trainers


@namespace
def trl(patch: pytest.MonkeyPatch) -> Namespace:
    """One step of every trainer, of a tiny model on the CPU; M is the 3072 of the snippets."""
    pytest.importorskip("trl")
    tiny = sys.modules.get("trl_tiny") or sibling("trl_tiny")
    from dl_norm.integrations import trl as integration

    config, trainer = integration.DeltaLGRPOConfig, integration.DeltaLGRPOTrainer
    small = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    runs: list[Any] = []
    calls: dict[str, list[Any]] = {"policy_loss": [], "linear_policy_loss": []}
    make_config, make_trainer, train = config.__init__, trainer.__init__, trainer.train

    def fused(*args: Any, **given: Any) -> Any:
        calls["linear_policy_loss"].append(given["weights"])
        return linear_policy_loss(*args, **given)

    def plain(*args: Any, **given: Any) -> Any:
        calls["policy_loss"].append(given["weights"])
        return policy_loss(*args, **given)

    def remember(self: Any) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for seen in calls.values():
            seen.clear()
        train(self)
        moved = any((p != before[name]).any() for name, p in self.model.named_parameters())
        weights = {name: list(seen) for name, seen in calls.items() if seen}
        runs.append((self.args, self.state.log_history[0]["loss"], moved, weights))

    policy_loss, linear_policy_loss = dl_norm.policy_loss, dl_norm.linear_policy_loss
    patch.setattr(dl_norm, "policy_loss", plain)
    patch.setattr(dl_norm, "linear_policy_loss", fused)
    patch.setattr(config, "__init__", lambda self, **o: make_config(self, **small, **o))
    patch.setattr(trainer, "train", remember)
    with tempfile.TemporaryDirectory() as folder, tiny.quiet(), tiny.one_thread():
        patch.chdir(folder)
        model = tiny.save_model(Path(folder) / "model")
        # Nothing to generate with, and a tokenizer that goes by another name than the model.
        tokenizer = tiny.PreTrainedTokenizerFast.from_pretrained(model)
        given = {"rollout_func": tiny.fixed_rollouts, "processing_class": tokenizer}
        patch.setattr(trainer, "__init__", functools.partialmethod(make_trainer, **given))
        space = {"model": model, "reward": tiny.reward, "data": tiny.prompts(8)}
        yield space
    callbacks = space["trainer"].callback_handler.callbacks
    assert any(type(callback).__name__ == "VarianceMonitorCallback" for callback in callbacks)
    assert [args.fused_lm_head for args, *_ in runs] == [False, True]
    for args, loss, moved, weights in runs:
        assert math.isfinite(loss) and loss != 0 and moved
        assert args.alpha == 0.75 and args.aggregation == "delta_l"
        # The loss that ran, once, with weights that add up to 1/M.
        ((name, (used,)),) = weights.items()
        assert name == ("linear_policy_loss" if args.fused_lm_head else "policy_loss")
        assert used.sum().item() == pytest.approx(1 / 3072)


@namespace
def skyrl(patch: pytest.MonkeyPatch) -> Namespace:
    registry: dict[str, Any] = {}
    fake = adapters.fake
    fake(
        patch,
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        PolicyLossRegistry=SimpleNamespace(register=registry.__setitem__),
    )
    fake(patch, "skyrl.train.trainer", RayPPOTrainer=adapters.SkyRLTrainer)
    fake(patch, "skyrl.train.entrypoints.main_base", BasePPOExp=object)
    space: dict[str, Any] = {}
    yield space
    settings = dict(word.split("=") for word in space["blocks"][0])
    names = {name.rpartition(".")[2]: value for name, value in settings.items()}
    assert names["policy_loss_type"] in registry
    config = adapters.skyrl_config(**names | {"max_seq_len": int(names["max_seq_len"])})
    trainer = space["Experiment"]().get_trainer(config)
    batch = tiny_batch()
    data = {"advantages": batch["adv"][:, None].expand(4, 8), "loss_mask": batch["mask"]}
    data = trainer._normalize_advantages(data, [(0, 4)])
    loss, _ = registry[names["policy_loss_type"]](
        batch["log_probs"], batch["old"], data["advantages"], config, batch["mask"]
    )
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def prime_rl(patch: pytest.MonkeyPatch) -> Namespace:
    adapters.fake(patch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    batch = tiny_batch()
    samples = [
        SimpleNamespace(mask=row.tolist(), advantages=[a] * 8, rl_weights=None)
        for row, a in zip(batch["mask"], batch["adv"].tolist(), strict=True)
    ]
    sink = SimpleNamespace(process_batch=lambda: SimpleNamespace(samples=samples))
    space: dict[str, Any] = {"sink": sink}
    yield space
    config = space["blocks"][0]["trainer"]["loss"]
    assert config["type"] == "custom"
    hook = named(config["import_path"])
    losses = [
        hook(
            SimpleNamespace(
                trainer_logprobs=batch["log_probs"][row],
                inference_logprobs=batch["old"][row],
                advantages=torch.tensor(sample.advantages),
                loss_mask=batch["mask"][row],
                loss_weights=None,
            ),
            **config["kwargs"],
        ).loss
        for row, sample in enumerate(space["batch"].samples)
    ]
    loss = torch.stack(losses).sum() / batch["mask"].sum()
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def slime(patch: pytest.MonkeyPatch) -> Namespace:
    mpu = SimpleNamespace(get_data_parallel_group=lambda: None)
    adapters.fake(patch, "megatron.core", mpu=mpu)
    space: dict[str, Any] = {}
    yield space
    reducer, config, loss = space["blocks"]
    options = dict(zip(reducer[::2], reducer[1::2], strict=True))
    options |= dict(zip(loss[::2], loss[1::2], strict=True))
    del options["--custom-config-path"]
    hooks = {name: named(path) for name, path in options.items() if name.startswith("--custom")}
    assert options["--loss-type"] == "custom_loss" and len(hooks) == 3

    batch, lengths = tiny_batch(), [8] * 4
    data = {
        "rewards": batch["adv"].tolist(),
        "response_lengths": lengths,
        "loss_masks": list(batch["mask"].int()),
        "kl": list(torch.zeros(4, 8)),
    }
    args = SimpleNamespace(calculate_per_token_loss=False, **config)
    hooks["--custom-advantage-function-path"](args, data)
    reduce = hooks["--custom-pg-loss-reducer-function-path"](lengths, lengths, data["loss_masks"])
    # At ratio 1 the token loss is -A.
    assert (reduce(-torch.cat(data["advantages"])) / 4).isclose(whole_batch(batch), rtol=1e-5)


@namespace
def nemo_rl(patch: pytest.MonkeyPatch) -> Namespace:
    adapters.fake_nemo_rl(patch)
    created = SimpleNamespace(
        compute_advantage=lambda prompt_ids, rewards, mask: rewards[:, None].expand(mask.shape)
    )
    grpo = ModuleType("nemo_rl.algorithms.grpo")
    patch.setattr(grpo, "_create_advantage_estimator", lambda config: created, raising=False)
    patch.setitem(sys.modules, grpo.__name__, grpo)
    patch.setattr(sys.modules["nemo_rl.algorithms"], "grpo", grpo, raising=False)
    space = {"master_config": SimpleNamespace(loss_fn={"reference_policy_kl_penalty": 0.0})}
    yield space
    batch = tiny_batch()
    token_mask = torch.nn.functional.pad(batch["mask"].int(), (1, 0))
    old = torch.nn.functional.pad(batch["old"], (1, 0))
    estimator = grpo._create_advantage_estimator(space["master_config"])
    data = {
        "token_mask": token_mask,
        "sample_mask": torch.ones(4),
        "advantages": estimator.compute_advantage(None, batch["adv"], token_mask),
        "prev_logprobs": old,
        "generation_logprobs": old,
    }
    loss, _ = space["loss_fn"](batch["log_probs"], data, torch.tensor(4.0), batch["mask"].sum())
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def roll(patch: pytest.MonkeyPatch) -> Namespace:
    adapters.import_roll(patch)
    space: dict[str, Any] = {}
    yield space
    worker = space["MyActorWorker"]
    (config,) = space["blocks"]
    assert config["actor_train"]["worker_cls"] == f"my_worker.{worker.__name__}"
    batch = tiny_batch()
    weights = dl_norm.sequence_weights(batch["mask"].sum(-1), alpha=0.75, max_length=3072)
    assert torch.equal(worker()._weights(batch["mask"]), weights)


@namespace
def torchforge(_) -> Namespace:
    batch = tiny_batch()
    target = {
        "response": torch.zeros(4, 8, dtype=torch.long),
        "ref_logprobs": batch["old"],
        "advantages": batch["adv"][:, None],
        "padding_mask": batch["mask"],
    }
    space = {"collate": lambda batches: ([{}], [target])}
    yield space
    _, (targets,) = space["collate"](None)
    loss = space["loss"](torch.zeros(4, 9, 5), **targets, beta=0.0)
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def areal(_) -> Namespace:
    batch = tiny_batch()
    mb = {
        "loss_mask": batch["mask"],
        "logprobs": batch["old"],
        "advantages": batch["adv"][:, None].expand(4, 8),
    }
    losses = []

    def train_batch(mb: Any, loss_fn: Any, loss_weight_fn: Any) -> None:
        weight = loss_weight_fn(mb)
        losses.append(loss_fn(batch["log_probs"], batch["old"], mb) * weight / weight)

    yield {
        "engine": SimpleNamespace(train_batch=train_batch),
        "mb_inputs": SimpleNamespace(mbs=[mb]),
        "stats_tracker": adapters.StatsTracker(),
    }
    assert losses[0].isclose(whole_batch(batch), rtol=1e-5)


@namespace
def no_hook(_) -> Namespace:
    batch = tiny_batch()
    space = {
        "dl_norm": dl_norm,
        "action_mask": batch["mask"],
        "advantages": batch["adv"],
        "max_length": 3072,
    }
    yield space
    # A trainer's token mean, at ratio 1.
    loss = -(space["advantages"][:, None] * batch["mask"]).sum() / batch["mask"].sum()
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


def whole_batch(batch: dict[str, Any]) -> torch.Tensor:
    """The DeltaL loss that the adapters' snippets set up."""
    weights = dl_norm.sequence_weights(batch["mask"].sum(-1), alpha=0.75, max_length=3072)
    log_probs = batch["log_probs"].detach()
    return dl_norm.policy_loss(log_probs, batch["old"], batch["adv"], batch["mask"], weights)


class one_process:
    """torch.distributed with this process alone."""

    def __enter__(self) -> None:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def __exit__(self, *_: Any) -> None:
        torch.distributed.destroy_process_group()

"""verl 0.9.1's Megatron engine over two gloo processes: its logits processor with our outputs.

The method is verl's, and so are the entropy and sum p^2 that it is compared with. Under verl's
log-probs is Megatron-Core's cross-entropy: it has no wheel for a CPU, so its autograd function is
taken from the clone of TRAINER_SOURCES, and without one the log-probs are held to log_softmax of
the gathered logits alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dl_norm.integrations import verl_head

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)
sys.path.append(str(Path(__file__).parent))

from adapter_tools import ROOT, clones, lift

RANKS, TOKENS, VOCABULARY = 2, 7, 24
VERL = sorted(ROOT.glob(".venv-verl/lib/python3*/site-packages/verl"))
MEGATRON = "Megatron-LM/megatron/core/tensor_parallel"
CASES = {
    "log-probs": (False, False),
    "entropy": (True, False),
    "all": (True, True),
}


def has_megatron() -> bool:
    folder = clones()
    return folder is not None and (folder / MEGATRON).exists()


def make_batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(52)
    of_log_probs = torch.randn(1, TOKENS, generator=random)
    of_entropies = torch.randn(1, TOKENS, generator=random)
    of_log_probs[0, 2] = of_log_probs[0, 5] = of_entropies[0, 5] = 0.0
    return {
        "logits": 3 * torch.randn(1, TOKENS, VOCABULARY, generator=random),
        "label": torch.randint(VOCABULARY, (1, TOKENS), generator=random),
        "temperature": torch.tensor([[1.0, 0.7, 1.0, 1.0, 2.0, 1.0, 0.0]]),
        "of_log_probs": of_log_probs,
        "of_entropies": of_entropies,
    }


class NotCompiled:
    """torch, whose compile leaves a function as it is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def compile(**_: Any) -> Any:
        return lambda function: function


def cross_entropy(group: Any) -> Any:
    """Megatron-Core's, of its repository."""
    utils = lift(f"{MEGATRON}/utils.py", "VocabUtility")
    forward = lift(f"{MEGATRON}/cross_entropy.py", "VocabParallelCrossEntropy")
    function = lift(
        f"{MEGATRON}/cross_entropy.py", "_VocabParallelCrossEntropy", **vars(utils),
        **vars(forward), get_pg_rank=dist.get_rank, get_pg_size=dist.get_world_size,
        get_tensor_model_parallel_group=lambda: group,
    )  # fmt: skip
    return function._VocabParallelCrossEntropy


def verls_engine(log_probs: Any, group: Any) -> type:
    """A class with verl's method."""
    functions = lift(
        f"{VERL[0]}/utils/megatron/tensor_parallel.py", "_VocabParallelEntropy",
        "vocab_parallel_entropy", "vocab_parallel_sum_pi_squared",
        dist=dist, torch=NotCompiled(),
        mpu=SimpleNamespace(get_tensor_model_parallel_group=lambda: group),
    )  # fmt: skip
    method = lift(
        f"{VERL[0]}/workers/engine/megatron/transformer_impl.py",
        "MegatronEngineWithLMHead._lm_head_logits_processor",
        vocab_parallel_entropy=functions.vocab_parallel_entropy,
        vocab_parallel_sum_pi_squared=functions.vocab_parallel_sum_pi_squared,
        vocab_parallel_log_probs_from_logits=log_probs,
    )._lm_head_logits_processor
    config = SimpleNamespace(entropy_from_logits_with_chunking=False)
    return type("Engine", (), {"_lm_head_logits_processor": method, "engine_config": config})


def run(
    engine: type, rank: int, entropy: bool, squares: bool, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What the method returns, and the gradient at this rank's logits."""
    batch = make_batch()
    leaf = batch["logits"].chunk(RANKS, -1)[rank].to(dtype, copy=True).requires_grad_()
    found = engine()._lm_head_logits_processor(  # type: ignore
        leaf * 1, batch["label"], batch["temperature"].clone(), calculate_entropy=entropy,
        calculate_sum_pi_squared=squares, distillation_use_topk=False, distillation_only=False,
        logits_processor_func=None, batch=None, data_format="thd",
    )  # fmt: skip
    loss = (batch["of_log_probs"] * found["log_probs"]).sum()
    if entropy:
        loss = loss + (batch["of_entropies"] * found["entropy"]).sum()
    loss.backward()
    assert leaf.grad is not None
    return {name: value.detach() for name, value in found.items()} | {"gradient": leaf.grad}


def truth(rank: int, entropy: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """In float64, of the gathered logits. A temperature of 0 is one of 1e-8."""
    batch = make_batch()
    leaf = batch["logits"].to(dtype).double().requires_grad_()
    scaled = leaf / batch["temperature"].clamp(min=1e-8).double()[..., None]
    log_softmax = scaled.log_softmax(-1)
    log_probs = log_softmax.gather(-1, batch["label"][..., None])[..., 0]
    entropies = torch.special.entr(log_softmax.exp()).sum(-1)
    loss = (batch["of_log_probs"] * log_probs).sum()
    if entropy:
        loss = loss + (batch["of_entropies"] * entropies).sum()
    loss.backward()
    assert leaf.grad is not None
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropies.detach(),
        "sum_pi_squared": log_softmax.exp().square().sum(-1).detach(),
        "gradient": leaf.grad.chunk(RANKS, -1)[rank],
    }


def worker(_: Any, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    parallel: Any = ModuleType("megatron.core.parallel_state")
    parallel.get_tensor_model_parallel_group = lambda: group
    for name in ("megatron", "megatron.core"):
        sys.modules[name] = ModuleType(name)
    sys.modules[parallel.__name__] = parallel

    results: dict[str, Any] = {}
    theirs = None
    if has_megatron():
        negative = cross_entropy(group).apply
        theirs = verls_engine(lambda logits, labels: -negative(logits, labels, 0.0), group)
    ours = verls_engine(None, group)
    verl_head.use_sharded_head(ours)
    for name, (entropy, squares) in CASES.items():
        results[name] = {
            "ours": run(ours, rank, entropy, squares),
            "truth": truth(rank, entropy),
        }
        if theirs is not None:
            results[name]["theirs"] = run(theirs, rank, entropy, squares)
    results["bfloat16"] = {
        "ours": run(ours, rank, True, False, torch.bfloat16),
        "truth": truth(rank, True, torch.bfloat16),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(run_ranks: Any) -> Any:
    if not VERL:
        pytest.skip("verl is not there: bash ci/verl_env.sh")
    return run_ranks(__file__, RANKS)


@pytest.mark.parametrize("name", CASES)
def test_as_the_engine(name: str, results: Any) -> None:
    for result in results:
        ours, wanted = result[name]["ours"], result[name]["truth"]
        entropy, squares = CASES[name]
        asked = {"log_probs": True, "entropy": entropy, "sum_pi_squared": squares}
        assert ours.keys() == {n for n, yes in asked.items() if yes} | {"gradient"}
        # The token of temperature 0, whose logits are 1e8 times as large.
        normal = make_batch()["temperature"] > 0
        for n, values in ours.items():
            error = (values - wanted[n]).abs()[normal]
            assert error.max() < 3e-6, n
            assert values.isfinite().all(), n
        assert wanted["gradient"][normal].abs().max() > 0.1
        if "theirs" not in result[name]:
            continue
        for n, values in ours.items():
            assert (values - result[name]["theirs"][n]).abs()[normal].max() < 3e-6, n


def test_bfloat16(results: Any) -> None:
    """As a model in 16 bits has them: float32 out, bfloat16 back, where the temperature, whose
    division verl rounds to bfloat16, is 1."""
    whole = make_batch()["temperature"] == 1
    for result in results:
        ours, wanted = result["bfloat16"]["ours"], result["bfloat16"]["truth"]
        for name in ("log_probs", "entropy"):
            assert ours[name].dtype == torch.float32
            assert (ours[name] - wanted[name]).abs()[whole].max() < 3e-6
        assert ours["gradient"].dtype == torch.bfloat16
        # One rounding, which Triton's interpreter makes a truncation.
        torch.testing.assert_close(
            ours["gradient"][whole].double(), wanted["gradient"][whole], rtol=2**-7, atol=1e-6
        )


def test_megatrons_own_was_compared(results: Any) -> None:
    if not has_megatron():
        pytest.skip("Megatron-LM is not among TRAINER_SOURCES")
    assert all("theirs" in result[name] for result in results for name in CASES)


def test_distillation_stays_verls() -> None:
    seen = []

    class Engine:
        def _lm_head_logits_processor(self, logits, label, temperature, **options):
            seen.append((logits, label, temperature, options))
            return "verl's"

    verl_head.use_sharded_head(Engine)
    options = {"calculate_entropy": True, "calculate_sum_pi_squared": False, "batch": "data"}
    for name in ("distillation_use_topk", "distillation_only"):
        given = {**options, name: True}
        assert Engine()._lm_head_logits_processor(1, 2, 3, **given) == "verl's"
        assert seen[-1] == (1, 2, 3, given)


def test_another_class() -> None:
    with pytest.raises(TypeError, match="MegatronEngineWithLMHead"):
        verl_head.use_sharded_head(object)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

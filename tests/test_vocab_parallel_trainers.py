"""A vocabulary over two gloo processes, against the functions that trainers have for it.

Log-probs, entropy, sum p^2 and the gradient at the local logits, from the trainers' own source.
SkyRL's functions are an older form of NeMo-RL's, which are NeMo-Aligner's. Megatron-Core is
imported from its clone. slime's and NeMo-RL's functions run a second time after the adapters'
`use_kernels`.
"""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import pytest
import torch
import torch.distributed as dist

import dl_norm

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)
sys.path.append(str(Path(__file__).parent))

from adapter_tools import ROOT, fake, lift

RANKS, TOKENS, VOCABULARY = 2, 6, 24
SOURCES = {
    "AReaL": ".venv-trainers/areal/utils/functional/vocab_parallel.py",
    "SkyRL": ".venv-trainers/skyrl/backends/skyrl_train/distributed/megatron/model_utils.py",
    "verl": ".venv-verl/lib/python3*/site-packages/verl/utils/megatron/tensor_parallel.py",
}
CLONES = {
    "slime": "slime/slime/utils/ppo_utils.py",
    "NeMo-RL": "RL/nemo_rl/distributed/model_utils.py",
    "Miles": "miles/miles/backends/training_utils/loss_hub/math_utils.py",
    "Megatron-Core": "Megatron-LM/megatron/core/tensor_parallel/cross_entropy.py",
}


def source_of(trainer):
    if trainer in CLONES:
        path = Path(os.environ.get("TRAINER_SOURCES", "/nowhere"), CLONES[trainer])
        return str(path) if path.exists() else None
    found = sorted(ROOT.glob(SOURCES[trainer]))
    return str(found[0]) if found else None


def make_batch():
    random = torch.Generator().manual_seed(51)
    return {
        "logits": 3 * torch.randn(1, TOKENS, VOCABULARY, generator=random),
        "token_ids": torch.randint(VOCABULARY, (1, TOKENS), generator=random),
        "of_log_probs": torch.randn(1, TOKENS, generator=random),  # upstream gradients
        "of_entropies": torch.rand(1, TOKENS, generator=random),
    }


class NotCompiled:
    """torch, whose compile leaves a function as it is."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def compile(**_):
        return lambda function: function


def areal(logits, ids, rank, group):
    path = source_of("AReaL")
    function = lift(path, "_VocabParallelLogProbsEntropy", dist=dist)._VocabParallelLogProbsEntropy
    log_probs, entropy = function.apply(logits, ids, group)
    return {"log_probs": log_probs, "entropy": entropy}


def skyrl(logits, ids, rank, group):
    names = "_compute_distributed_log_softmax", "DistributedLogprob"
    function = lift(source_of("SkyRL"), *names, Any=object).DistributedLogprob
    size = VOCABULARY // RANKS
    return {"log_probs": function.apply(logits, ids, rank * size, (rank + 1) * size, group)}


def verl(logits, ids, rank, group):
    mpu = SimpleNamespace(get_tensor_model_parallel_group=lambda: group)
    names = "_VocabParallelEntropy", "vocab_parallel_entropy", "vocab_parallel_sum_pi_squared"
    space = {"dist": dist, "mpu": mpu, "torch": NotCompiled()}
    functions = lift(source_of("verl"), *names, **space)
    squares = functions.vocab_parallel_sum_pi_squared(logits.detach().clone())
    return {"entropy": functions.vocab_parallel_entropy(logits), "sum_sq_probs": squares}


def megatron(logits, ids, rank, group):
    sys.path.append(str(Path(source_of("Megatron-Core")).parents[3]))
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    losses = vocab_parallel_cross_entropy(
        logits.transpose(0, 1), ids.T.contiguous(), tp_group=group
    )
    return {"log_probs": -losses.T}


def slime(logits, ids, rank, group, change=lambda module: None):
    names = (
        "_maybe_all_reduce", "_get_vocab_parallel_rank_size", "_VocabParallelLogProbEntropy",
        "_calculate_log_probs_and_entropy_chunk", "calculate_log_probs_and_entropy",
    )  # fmt: skip
    module = lift(source_of("slime"), *names, dist=dist)
    change(module)
    log_probs, entropy = module.calculate_log_probs_and_entropy(
        logits[0], ids[0], group, with_entropy=True, with_entropy_grad=True, chunk_size=4
    )
    return {"log_probs": log_probs.T, "entropy": entropy[None]}


def miles(logits, ids, rank, group, change=lambda module: None):
    """On Megatron-Core's fused cross-entropy, whose gradient is bfloat16."""
    sys.path.append(str(Path(source_of("Megatron-Core")).parents[3]))
    torch._dynamo.config.disable = True  # type: ignore
    names = (
        "compute_log_probs", "_VocabParallelEntropy", "compute_entropy_from_logits",
        "calculate_log_probs_and_entropy",
    )  # fmt: skip
    module = lift(source_of("Miles"), *names, dist=dist, torch=NotCompiled())
    change(module)
    log_probs, entropy = module.calculate_log_probs_and_entropy(
        logits[0], ids[0], group, with_entropy=True, entropy_requires_grad=True, chunk_size=4
    )
    return {"log_probs": log_probs.T, "entropy": entropy[None]}


def miles_with_kernels(*arguments):
    from dl_norm.integrations import miles as adapter

    name = "miles.backends.training_utils.loss_hub.logit_processors"
    return miles(*arguments, change=lambda module: patched(module, name, adapter))


def slime_with_kernels(*arguments):
    from dl_norm.integrations import slime as adapter

    name = "slime.backends.megatron_utils.loss"
    return slime(*arguments, change=lambda module: patched(module, name, adapter))


def patched(module, name, adapter):
    """The function of ``module`` as the adapter leaves it in the trainer's module ``name``."""
    import pytest

    before = module.calculate_log_probs_and_entropy
    with pytest.MonkeyPatch.context() as patch:
        fake(patch, name, calculate_log_probs_and_entropy=before)
        adapter.use_kernels(SimpleNamespace())
        module.calculate_log_probs_and_entropy = sys.modules[name].calculate_log_probs_and_entropy
    assert module.calculate_log_probs_and_entropy is not before


def nemo_rl(logits, ids, rank, group, change=lambda module: None, chunk_size=None):
    """Its DTensor policy's; of a next token, so there is a position more."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    module = ModuleType("model_utils")
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    names = (
        "_compute_distributed_log_softmax_with_grad", "_compute_distributed_log_softmax",
        "DistributedLogprob", "ChunkedDistributedLogprob",
        "dtensor_from_parallel_logits_to_logprobs", "get_logprobs_from_vocab_parallel_logits",
    )  # fmt: skip
    space = vars(module)
    space |= vars(lift(
        source_of("NeMo-RL"), *names, Any=object, Optional=Optional, DTensor=DTensor,
        need_top_k_or_top_p_filtering=lambda params: False,
    ))  # fmt: skip
    of_functions = module.dtensor_from_parallel_logits_to_logprobs.__globals__
    change(module)
    of_functions |= {name: space[name] for name in names[2:4]}
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    spread = DTensor.from_local(logits, mesh, [Shard(2)])
    log_probs = module.get_logprobs_from_vocab_parallel_logits(
        spread, torch.nn.functional.pad(ids, (1, 0)), chunk_size=chunk_size
    )
    return {"log_probs": log_probs}


def nemo_rl_with_kernels(*arguments):
    from dl_norm.integrations import nemo_rl as adapter

    return nemo_rl(*arguments, change=adapter.use_kernels)


def nemo_rl_chunked(*arguments):
    return nemo_rl(*arguments, chunk_size=4)


def nemo_rl_chunked_with_kernels(*arguments):
    from dl_norm.integrations import nemo_rl as adapter

    return nemo_rl(*arguments, change=adapter.use_kernels, chunk_size=4)


def slime_loss(batch, rank, group):
    """The adapter's loss of one response, of whole logits or of this rank's: loss, gradient."""
    import pytest

    from dl_norm.integrations import slime as adapter

    mpu = SimpleNamespace(
        get_context_parallel_world_size=lambda: 1, get_tensor_model_parallel_group=lambda: group
    )
    logits = batch["logits"] if group is None else batch["logits"].chunk(RANKS, -1)[rank]
    leaf = logits.clone().requires_grad_()
    args = SimpleNamespace(
        eps_clip=0.2, eps_clip_high=0.2, use_rollout_logprobs=False, calculate_per_token_loss=False,
        delta_l_from_logits=True, rollout_temperature=0.9,
    )  # fmt: skip
    targets = batch["token_ids"].roll(-1, 1)[..., None]
    near = (batch["logits"] / 0.9).log_softmax(-1).gather(-1, targets)[..., 0]
    micro_batch = {
        "total_lengths": [TOKENS], "response_lengths": [4], "unconcat_tokens": batch["token_ids"],
        "log_probs": [near[0, 1:5] - 0.1], "loss_masks": [torch.ones(4)],
        "advantages": [batch["of_log_probs"][0, :4]],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        fake(patch, "megatron.core", mpu=mpu)
        loss, _ = adapter.policy_loss(args, micro_batch, leaf, None)
    loss.backward()
    gradient = leaf.grad if group is not None else leaf.grad.chunk(RANKS, -1)[rank]
    return loss.detach(), gradient


THEIRS = {
    "AReaL": areal, "SkyRL": skyrl, "verl": verl, "Megatron-Core": megatron, "slime": slime,
    "slime, our kernels": slime_with_kernels, "Miles": miles,
    "Miles, our kernels": miles_with_kernels, "NeMo-RL": nemo_rl,
    "NeMo-RL, our kernels": nemo_rl_with_kernels, "NeMo-RL, chunked": nemo_rl_chunked,
    "NeMo-RL, chunked, our kernels": nemo_rl_chunked_with_kernels,
}  # fmt: skip


def worker(_, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    batch = make_batch()
    mine = batch["logits"].chunk(RANKS, -1)[rank].clone()
    results = {}
    for name, function in THEIRS.items():
        if source_of(name.split(",")[0]) is None:
            continue
        leaf = mine.clone().requires_grad_()
        found = function(leaf * 1, batch["token_ids"], rank, dist.group.WORLD)
        loss = leaf.new_zeros(())
        if "log_probs" in found:
            loss = loss + (batch["of_log_probs"] * found["log_probs"]).sum()
        if "entropy" in found:
            loss = loss - 0.7 * (batch["of_entropies"] * found["entropy"]).sum()
        loss.backward()
        results[name] = {n: t.detach() for n, t in found.items()}, leaf.grad

        # Without old log-probs the loss of advantage A has gradient -A at a log-prob.
        leaf = mine.clone().requires_grad_()
        ones = torch.ones(1, TOKENS)
        loss, seen = dl_norm.logits_policy_loss(
            leaf, batch["token_ids"], None, -batch["of_log_probs"] * ("log_probs" in found), ones,
            torch.ones(1), entropy_coef=0.7 * ("entropy" in found),
            entropy_weights=batch["of_entropies"], entropy=True, sum_sq_probs=True,
            tp_group=dist.group.WORLD,
        )  # fmt: skip
        loss.backward()
        results["ours", name] = {n: getattr(seen, n) for n in found}, leaf.grad
    groups = None, dist.group.WORLD
    results["slime, from logits"] = [slime_loss(batch, rank, group) for group in groups]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("trainer", THEIRS)
def test_as_the_trainers_functions(trainer, run_ranks):
    if source_of(trainer.split(",")[0]) is None:
        pytest.skip(f"{trainer} is not there: see ci/trainers_env.sh and ci/verl_env.sh")
    for result in run_ranks(__file__, RANKS):
        theirs, their_grad = result[trainer]
        ours, our_grad = result["ours", trainer]
        for name, wanted in theirs.items():
            assert (ours[name] - wanted).abs().max() < 3e-6, name
        largest = their_grad.abs().max()
        assert largest > 0.1
        budget = largest * 2**-8 if trainer == "Miles" else 3e-6  # it rounds to bfloat16
        assert (our_grad - their_grad).abs().max() < budget


def test_slime_s_loss_from_a_shard_of_the_logits(run_ranks):
    for result in run_ranks(__file__, RANKS):
        (loss, gradient), (our_loss, our_gradient) = result["slime, from logits"]
        assert gradient.abs().max() > 0.1 and (gradient[0, :1] == 0).all()  # a prompt's row
        assert (our_loss - loss).abs() < 3e-6
        assert (our_gradient - gradient).abs().max() < 3e-6


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

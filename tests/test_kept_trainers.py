"""Kept sets as trainers hold them: prime-rl's and slime's own functions, and ours over the same."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from adapter_tools import fake, lift

import dl_norm
from dl_norm.integrations import kept, prime_rl, slime

IMPLEMENTATIONS = ("torch", "triton")
WIDTH, VOCABULARY = 8, 40
# prime-rl's branch with sampling replay: ci/trainers_env.sh.
REPLAY = "prime-rl-replay/src/prime_rl/trainer"


class Case:
    """Packed tokens, of which some have no set and one is outside its own."""

    def __init__(self, tokens: int = 12):
        random = torch.Generator().manual_seed(2)
        self.hidden = torch.randn(1, tokens, WIDTH, generator=random).requires_grad_()
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=random).requires_grad_()
        self.labels = torch.randint(VOCABULARY, (1, tokens), generator=random)
        self.upstream = torch.randn(1, tokens, generator=random)
        self.temperature = 0.5 + torch.rand(1, tokens, generator=random)
        self.sets: list[list[int]] = []
        for t, label in enumerate(self.labels[0].tolist()):
            others = torch.randperm(VOCABULARY, generator=random)[: t % 6].tolist()
            members = sorted({label, *others})
            self.sets.append({3: [], 7: [(label + 1) % VOCABULARY]}.get(t, members))
        self.sets[-1] = []  # its label is made up

    def padded(self) -> Tensor:
        kept_tokens = torch.full((1, len(self.sets), 7), -1, dtype=torch.int32)
        for t, members in enumerate(self.sets):
            kept_tokens[0, t, : len(members)] = torch.tensor(members, dtype=torch.int32)
        return kept_tokens

    def grads(self, log_probs: Tensor) -> tuple[Tensor, ...]:
        loss = (log_probs * self.upstream).sum()
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def check(ours: Any, theirs: Any, case: Case) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    for mine, other in zip(case.grads(ours), case.grads(theirs), strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def own_head() -> Any:
    """prime-rl's head with its kept sets, alone."""
    return lift(
        f"{REPLAY}/models/layers/lm_head.py", "_online_logsumexp_and_weighted_update",
        "kept_replay_mask", "_kept_local_indices", "_SequenceChunkedLogProbEntropyFn",
        "FusedOutputLinear", PrimeLmOutput=dict,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_as_prime_rl_s_head(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused head with the kept sets of a batch, and the same head after replay_kept_sets."""
    name = "prime_rl.trainer.models.layers.lm_head"
    fake(monkeypatch, name, PrimeLmOutput=dict)
    theirs, replaced = own_head().FusedOutputLinear, own_head().FusedOutputLinear
    prime_rl.replay_kept_sets(replaced, impl=impl)
    case, outputs = Case(), []
    for head_class in (theirs, replaced):
        head = head_class(WIDTH, VOCABULARY, 5)
        del head.weight
        head.weight = case.weight
        outputs.append(
            head.forward(case.hidden, case.labels, case.temperature, kept_tokens=case.padded())
        )
    check(outputs[1]["logprobs"], outputs[0]["logprobs"], case)
    whole = torch.tensor([not members or t == 7 for t, members in enumerate(case.sets)])[None]
    entropies = [output["entropy"] for output in outputs]
    torch.testing.assert_close(entropies[1][whole], entropies[0][whole], rtol=1e-5, atol=2e-6)
    assert (entropies[1] < entropies[0])[~whole].all()
    plain = head.forward(case.hidden, case.labels, case.temperature)
    torch.testing.assert_close(
        plain["logprobs"][whole], outputs[1]["logprobs"][whole], rtol=1e-5, atol=2e-6
    )


def test_as_prime_rl_s_logits() -> None:
    """Its function of logits, which a head that is not fused ends in."""
    module = lift(
        f"{REPLAY}/rl/loss.py", "selective_log_softmax", "selective_log_softmax_with_kept",
        kept_replay_mask=own_head().kept_replay_mask,
    )  # fmt: skip
    case = Case()
    logits = case.hidden @ case.weight.T / 0.8
    theirs = module.selective_log_softmax_with_kept(logits, case.labels, case.padded())
    sets = kept.padded_sets(case.padded(), case.labels)
    ours, _ = kept.log_probs(case.hidden, case.weight, case.labels, *sets, temperature=0.8)
    check(ours, theirs, case)


@pytest.mark.parametrize("form", ["padded", "listed"])
def test_as_the_formula(form: str) -> None:
    """-inf outside the set, then log_softmax; all of the vocabulary where there is no set."""
    case = Case()
    if form == "padded":
        case.sets[-1] = case.sets[1]  # not of its label: no set either
        sets, has_set = kept.padded_sets(case.padded(), case.labels)
        whole = {t for t, s in enumerate(case.sets) if case.labels[0, t] not in s}
        hidden, labels = case.hidden, case.labels
    else:  # two responses, of which the second has sets for its first two tokens alone
        members = [s if case.labels[0, t] in s else [int(case.labels[0, t])]
                   for t, s in enumerate(case.sets)]  # fmt: skip
        case.sets, whole = members, set(range(9, 12))
        parts = members[:7], members[7:9]
        ids = [[token for s in part for token in s] for part in parts]
        offsets = [[sum(map(len, part[:r])) for r in range(len(part) + 1)] for part in parts]
        offsets[0] = torch.tensor(offsets[0], dtype=torch.int32)
        sets, has_set = kept.listed_sets(ids, offsets, [7, 5], torch.device("cpu"))
        hidden, labels = case.hidden[0], case.labels[0]
    assert {t for t, yes in enumerate(has_set.flatten().tolist()) if not yes} == whole != set()
    mask = torch.zeros(len(case.sets), VOCABULARY, dtype=torch.bool)
    for t, members in enumerate(case.sets):
        mask[t, members if t not in whole else range(VOCABULARY)] = True
    logits = (case.hidden @ case.weight.T).masked_fill(~mask, -torch.inf)
    true = logits.log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]
    ours, _ = kept.log_probs(hidden, case.weight, labels, sets, has_set)
    check(ours.reshape(true.shape), true, case)


def test_padded_sets_where_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the room of the padding stays, behind the last offset that counts."""
    case = Case()
    exact, has_set = kept.padded_sets(case.padded(), case.labels)
    monkeypatch.setattr(kept, "values_are_free", lambda tensor: False)
    roomy, also = kept.padded_sets(case.padded(), case.labels)
    assert torch.equal(also, has_set)
    assert roomy.ids.shape[0] == case.padded().numel() > exact.ids.shape[0]
    assert torch.equal(roomy.offsets[:-1], exact.offsets[:-1])
    results = [
        kept.log_probs(case.hidden, case.weight, case.labels, sets, has_set)[0]
        for sets in (exact, roomy)
    ]
    assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(*map(case.grads, results), strict=True))


@pytest.mark.parametrize("cut", [False, True], ids=["all recorded", "a tail without sets"])
def test_as_slime(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime's own log-probs of a batch with the keep mask that it builds, from its lists."""
    mpu = SimpleNamespace(
        get_context_parallel_world_size=lambda: 1, get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_group=lambda: None,
    )  # fmt: skip
    ppo = lift(
        "slime/slime/utils/ppo_utils.py", "_maybe_all_reduce", "_get_vocab_parallel_rank_size",
        "_VocabParallelLogProbEntropy", "_calculate_log_probs_and_entropy_chunk",
        "calculate_log_probs_and_entropy", dist=torch.distributed,
    )  # fmt: skip
    names = (
        "_build_shifted_tokens", "_fill_topp_mask_rows", "_build_topp_keep_mask",
        "_extract_per_sample", "get_rollout_top_p_logprob_kwargs", "get_log_probs_and_entropy",
    )  # fmt: skip
    module = lift("slime/slime/backends/megatron_utils/loss.py", *names, mpu=mpu, **vars(ppo))
    case = Case(14)
    responses, prompts = [5, 0, 4], [2, 1, 2]
    totals = [a + b for a, b in zip(responses, prompts, strict=True)]
    tokens = torch.randint(VOCABULARY, (14,)).split(totals)
    lists: dict[str, list[Any]] = {"ids": [], "offsets": []}
    for sample, length in zip(tokens, responses, strict=True):
        recorded = max(length - 2, 0) if cut and length == 5 else length
        sets = [
            sorted({label, (label + 7) % VOCABULARY, (label + r) % VOCABULARY})
            for r, label in enumerate(sample[len(sample) - length :].tolist())
        ][:recorded]
        lists["ids"].append([token for members in sets for token in members])
        lists["offsets"].append([sum(map(len, sets[:r])) for r in range(recorded + 1)])
    lists["ids"][2] = torch.tensor(lists["ids"][2], dtype=torch.int32)
    batch = {
        "rollout_top_p_token_ids": lists["ids"], "rollout_top_p_token_offsets": lists["offsets"],
        "response_lengths": responses,
    }  # fmt: skip
    args = SimpleNamespace(rollout_temperature=0.7, log_probs_chunk_size=4, allgather_cp=False,
                           rollout_top_p=0.9)  # fmt: skip
    _, streams = module.get_log_probs_and_entropy(
        case.hidden @ case.weight.T, args=args, unconcat_tokens=list(tokens), total_lengths=totals,
        response_lengths=responses, **module.get_rollout_top_p_logprob_kwargs(args, batch),
    )  # fmt: skip
    ends = torch.tensor(totals).cumsum(0).tolist()
    rows = [t for end, n in zip(ends, responses, strict=True) for t in range(end - n - 1, end - 1)]
    labels = torch.cat([s[len(s) - n :] for s, n in zip(tokens, responses, strict=True)])
    sets, has_set = slime.kept_sets(batch, case.hidden.device)
    assert (has_set is not None) == cut
    ours, _ = kept.log_probs(
        case.hidden[0, rows], case.weight, labels, sets, has_set, temperature=0.7
    )
    case.upstream = case.upstream[0, : len(rows)]
    check(ours, torch.cat(streams["log_probs"]), case)
    if cut:
        return
    # In the loss itself: the gradient of the log-probs goes through no graph.
    old, advantages = torch.cat(streams["log_probs"]).detach() - 0.1, torch.randn(3)
    cu_seqlens = torch.tensor([0, 5, 5, 9])
    more = torch.ones(9), torch.tensor([0.2, 0.1, 0.3])
    loss = dl_norm.linear_policy_loss(
        case.hidden[0, rows], case.weight, labels, old, advantages, *more, kept=sets,
        temperature=0.7, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    theirs = dl_norm.policy_loss(
        torch.cat(streams["log_probs"]), old, advantages, *more, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    with pytest.raises(ValueError, match="ids is missing"):
        slime.kept_sets({"response_lengths": [1]}, torch.device("cpu"))
    sets, _ = kept.padded_sets(case.padded(), case.labels)
    with pytest.raises(ValueError, match="must be in its kept set"):
        kept.log_probs(case.hidden, case.weight, case.labels, sets)
    fake(monkeypatch, "prime_rl.trainer.models.layers.lm_head", PrimeLmOutput=dict)
    head = type("Head", (torch.nn.Linear,), {})
    prime_rl.replay_kept_sets(head)
    with pytest.raises(ValueError, match="temperature is missing"):
        head(2, 3)(case.hidden, labels=case.labels, kept_tokens=case.padded())


def test_frozen_head_and_masked_tokens() -> None:
    case = Case()
    sets, has_set = kept.padded_sets(case.padded(), case.labels)
    mask = torch.arange(12)[None] % 3 != 0
    found = []
    for weight in (case.weight, case.weight.detach()):
        log_probs, entropy = kept.log_probs(
            case.hidden, weight, case.labels, sets, has_set, mask=mask, compact=False
        )
        assert (log_probs[~mask] == 0).all() and not entropy.requires_grad
        found.append(torch.autograd.grad((log_probs * case.upstream).sum(), case.hidden)[0])
    assert torch.equal(*found) and (found[0][~mask] == 0).all()

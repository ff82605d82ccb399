"""Kept sets where the head is spread over gloo processes, against one process that has all of it.

Budget: 1e-6 of the largest entry, or of the largest above 1 for what is seen; the gradients from
float64, as two float32 results may be off by that much each in opposite directions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dl_norm import KeptSets, linear_policy_loss, token_log_probs

sys.path.append(str(Path(__file__).parent))

from kept_cases import kept_of, make, masked_log_probs, run, truth

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

IMPLEMENTATIONS = ("torch", "triton")
BONUS = {"entropy_coef": 0.3, "temperature": 0.8}
SEEN = {"entropy": True, "sum_sq_probs": True, "return_log_probs": True}
# Words, rows of the padded head (None: shards as torch cuts them), options of the loss.
CASES = {
    "even": (24, None, {"temperature": 0.8, "beta": 0.1}),
    "not divisible": (21, None, {**BONUS, "logit_softcap": 4.0}),
    "ranks without a word": (5, None, BONUS),
    "padded": (21, 32, BONUS),
}
SIZE = 16


def make_case(name):
    """Log-probs down to -8: one of -16 is rounded by 1e-6, and with it the ratio."""
    vocabulary, _, options = CASES[name]
    case = make("cpu", (3, 9), SIZE, vocabulary, seed=5, temperature=0.8,
                softcap=options.get("logit_softcap"))  # fmt: skip
    case.hidden /= 4
    sets = case.sets()
    for word, place in enumerate(case.mask.flatten().nonzero()[:2, 0].tolist()):
        case.token_ids.view(-1)[place] = word  # of a set that the first rank has alone
        sets[place] = [0, 1]
    case.kept = kept_of(sets, "cpu")
    log_probs, *_ = masked_log_probs(case, softcap=options.get("logit_softcap"), temperature=0.8)
    random = torch.Generator().manual_seed(1)
    case.old = (log_probs + 0.3 * torch.randn(log_probs.shape, generator=random)).float()
    case.tensors["ref_log_probs"] = case.old + 0.1
    if not options.get("beta"):
        del case.tensors["ref_log_probs"]
    return case


def shard_of(case, rank, ranks, padded=None):
    """torch.chunk, with the empty chunks that it leaves out; what is in a padding must not
    matter."""
    parts = {}
    for name in ("weight", "bias"):
        whole = getattr(case, name)
        if padded is not None:
            more = whole.new_full((padded - len(whole), *whole.shape[1:]), 9.0)
            whole = torch.cat([whole, more])
        chunks = whole.chunk(ranks)
        parts[name] = (chunks[rank] if rank < len(chunks) else whole[:0]).clone()
    return case.replace(**parts)


def named(found):
    loss, (hidden, weight, bias), seen = found
    return {
        "loss": loss, "hidden": hidden, "weight": weight, "bias": bias,
        **{name: getattr(seen, name) for name in ("log_probs", "entropy", "sum_sq_probs")},
    }  # fmt: skip


def worker(ranks, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.new_group(list(range(ranks)))  # not the default one
    results = {}
    for name, (vocabulary, padded, options) in CASES.items():
        mine = shard_of(make_case(name), rank, ranks, padded)
        for impl in IMPLEMENTATIONS:
            spread = {"tp_group": group, "vocab_size": vocabulary}
            found = run(mine, impl, upstream=3.0, **SEEN, **options, **spread)
            results[name, impl] = named(found)
    results |= other_calls(rank, ranks, group)
    results["traffic"] = traffic(rank, ranks, group)
    results["errors"] = other_sets(rank, ranks, group)
    results["as on a GPU"] = without_looking(rank, ranks, group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def other_calls(rank, ranks, group):
    """Log-probs, the part of a gradient, a frozen head, torch.compile."""
    case = shard_of(make_case("not divisible"), rank, ranks)
    spread = {"tp_group": group, "vocab_size": 21}
    results = {}
    call = {"bias": case.bias, "kept": case.kept, "temperature": 0.8, "logit_softcap": 4.0}
    results["log-probs"] = token_log_probs(
        case.hidden, case.token_ids, case.weight, mask=case.mask, entropy=True, sum_sq_probs=True,
        impl="torch", **call, **spread,
    )  # fmt: skip
    options = CASES["not divisible"][2]
    _, (partial, *_) = run(
        case, "torch", upstream=3.0, **options, **spread, partial_hidden_grad=True
    )
    results["partial"] = partial

    def step(hidden, ids, offsets):
        kept = KeptSets(ids, offsets)
        loss = linear_policy_loss(
            hidden, case.weight, *case.args(), bias=case.bias, kept=kept, **case.tensors, **BONUS,
            **spread,
        )  # fmt: skip
        seen = token_log_probs(
            hidden, case.token_ids, case.weight, mask=case.mask, kept=kept, **spread
        )
        return loss, seen

    hidden = case.hidden.clone().requires_grad_()
    for name, function in {
        "eager": step, "compiled": torch.compile(step, backend="aot_eager", fullgraph=True),
    }.items():  # fmt: skip
        loss, seen = function(hidden, *case.kept)
        results[name] = loss.detach(), *torch.autograd.grad(loss, hidden), seen
    return results


def traffic(rank, ranks, group):
    """Bytes of every collective of one call."""
    case = shard_of(make_case("even"), rank, ranks)
    original, found = dist.all_reduce, {}
    for name, options in {"loss": {}, "everything": {**BONUS, "sum_sq_probs": True}}.items():
        calls = found[name] = []

        def counted(tensor, *arguments, calls=calls, **keywords):
            calls.append(tensor.numel() * tensor.element_size())
            return original(tensor, *arguments, **keywords)

        dist.all_reduce = counted
        try:
            run(case, "torch", **options, tp_group=group)
        finally:
            dist.all_reduce = original
    return found


def other_sets(rank, ranks, group):
    """The messages where the processes have other sets, which are right in themselves."""
    case = shard_of(make_case("even"), rank, ranks)
    sets = case.sets()
    token = next(i for i, members in enumerate(sets) if len(members) > 2)
    own = int(case.token_ids.flatten()[token])
    word = next(word for word in range(24) if word not in sets[token])
    at = next(i for i, member in enumerate(sets[token]) if member != own)
    exchanged = [*sets[token][:at], word, *sets[token][at + 1 :]]
    messages = []
    for changed in ([*sets[token], word], exchanged):
        mine = [*sets]
        if rank:
            mine[token] = changed
        try:
            run(case.replace(kept=kept_of(mine, "cpu")), "torch", tp_group=group)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def without_looking(rank, ranks, group):
    """Where no check looks at a value: the right result, of other sets NaN, of wrong ones too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dl_norm.") and hasattr(module, "values_are_free"):
            module.values_are_free = lambda tensor: False
    found = []
    for name in ("ranks without a word", "even"):
        case = shard_of(make_case(name), rank, ranks)
        options = {**SEEN, **CASES[name][2], "tp_group": group, "vocab_size": CASES[name][0]}
        found.append(named(run(case, "torch", upstream=3.0, **options)))
    sets = case.sets()
    token = next(i for i, members in enumerate(sets) if len(members) > 2)
    for change in ([0] * rank, [sets[token][0]]):  # not the same on all; a word twice
        mine = [*sets]
        mine[token] = [*mine[token], *change]
        loss, _, seen = run(case.replace(kept=kept_of(mine, "cpu")), "torch", **options)
        found.append((loss, seen.log_probs))
    return found


@pytest.fixture(scope="module", params=[2, 4])
def results(request, run_ranks):
    return run_ranks(__file__, request.param)


def joined(results, found, case, padded):
    """What the ranks have found, put together; the same bits where all have all of it."""
    parts = [found(result) for result in results]
    for name in ("loss", "hidden", "log_probs", "entropy", "sum_sq_probs"):
        assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
    whole = dict(parts[0])
    for name in ("weight", "bias"):
        whole[name] = torch.cat([part[name] for part in parts])
        assert not whole[name][len(case.weight) :].any(), "padding has no gradient"
        whole[name] = whole[name][: len(case.weight)]
    return whole


def check(found, case, options):
    loss, grads = truth(case, upstream=3.0, **options)
    softcap, temperature = options.get("logit_softcap"), options["temperature"]
    seen = masked_log_probs(case, torch.float64, softcap, temperature)
    expected = {"loss": loss, **dict(zip(("hidden", "weight", "bias"), grads, strict=True))}
    expected |= dict(zip(("log_probs", "entropy", "sum_sq_probs"), seen, strict=True))
    for name, true in expected.items():
        error = (found[name].double() - true).abs().max()
        least = 1.0 if name in ("log_probs", "entropy", "sum_sq_probs") else 0.0
        assert error <= 1e-6 * max(true.abs().max().item(), least), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_as_one_process(results, name, impl):
    _, padded, options = CASES[name]
    case = make_case(name)
    check(joined(results, lambda r: r[name, impl], case, padded), case, options)


def test_some_ranks_have_none_of_a_set(results):
    """Else the tests above say nothing of them."""
    for name, (vocabulary, _, _) in CASES.items():
        size = -(-vocabulary // len(results))
        sets = [members for members in make_case(name).sets() if len(members) > 1]
        assert any(len({member // size for member in members}) < len(results) for members in sets)
        assert any(len({member // size for member in members}) > 1 for members in sets)


def test_log_probs(results):
    case = make_case("not divisible")
    expected = masked_log_probs(case, torch.float64, 4.0, 0.8)
    for result in results:
        seen = result["not divisible", "torch"]
        assert torch.equal(result["log-probs"][0], seen["log_probs"])
        for ours, true in zip(result["log-probs"], expected, strict=True):
            assert (ours.double() - true).abs().max() <= 1e-6 * max(1.0, true.abs().max().item())


def test_a_partial_gradient_adds_up(results):
    whole = results[0]["not divisible", "torch"]["hidden"]
    total = torch.stack([result["partial"] for result in results]).sum(0)
    assert not torch.equal(results[0]["partial"], whole)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6 * whole.abs().max().item())


def test_compiled(results):
    for result in results:
        for compiled, eager in zip(result["compiled"], result["eager"], strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-12)
        assert all(map(torch.equal, result["compiled"][::2], results[0]["compiled"][::2]))


def test_what_is_communicated(results):
    """Per token 4 bytes of the maximum and 8 of the sums, 4 more for entropy and for squares, and
    one hidden state: nothing an entry. And one check of 7 numbers, twice, a call."""
    tokens = make_case("even").token_ids.numel()
    for result in results:
        for name, sums in {"loss": 2, "everything": 4}.items():
            agreement, maximum, added, hidden = result["traffic"][name]
            assert agreement == 2 * 7 * 8
            assert (maximum, added) == (4 * tokens, 4 * sums * tokens)
            assert hidden == 4 * SIZE * tokens


def test_other_sets_are_refused_everywhere(results):
    for result in results:
        more, exchanged = result["errors"]
        assert "kept.ids from " in more and "kept.ids (a checksum)" in more
        assert "kept.ids from " not in exchanged and "kept.ids (a checksum)" in exchanged


def test_without_looking_at_a_value(results):
    for number, name in enumerate(("ranks without a word", "even")):
        case = make_case(name)
        found = joined(results, lambda r, number=number: r["as on a GPU"][number], case, None)
        check(found, case, CASES[name][2])
    for result in results:
        other, twice = result["as on a GPU"][2:]
        assert other[0].isnan() and twice[0].isnan()
        assert twice[1].isnan().sum() == 1, "the token with the wrong set alone"


if __name__ == "__main__":
    worker(*map(int, sys.argv[1:3]), sys.argv[3])

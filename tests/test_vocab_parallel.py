"""A vocabulary spread over gloo processes: everything against one process that has all of it.

Budget: 1e-6 of the largest entry, or of the largest above 1 for the loss and what is seen. The loss
over hidden states is held to one process in float64, as two float32 results may be off by 6e-7 each
in opposite directions; the rest to one process in float32.
"""

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import dl_norm
from dl_norm._options import make_token_loss
from dl_norm._rows import vocab_parallel
from dl_norm._rows.passes import implementation
from dl_norm._rows.records import RowOutputs, RowSettings, TokenRows, VocabShard

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("torch", "triton")
SEQUENCES, TOKENS, SIZE = 3, 5, 8
HEAD = {"chunk_size": 4, "temperature": 0.8, "eps_high": 0.3}
BONUS = {"entropy_coef": 0.2}
SEEN = {"entropy": True, "sum_sq_probs": True, "return_log_probs": True, "return_metrics": True}
# Words, rows of the padded head (None: shards as torch cuts them), options of the loss.
CASES = {
    "even": (24, None, HEAD),
    "not divisible": (21, None, {**HEAD, **BONUS, "logit_softcap": 4.0}),
    "ranks without a word": (5, None, {**HEAD, **BONUS}),
    "padded": (21, 32, {**HEAD, **BONUS, "fp32_logits": True}),
    "few rows": (24, None, {**HEAD, "max_tokens": 12}),
    "compact, KL": (21, None, {**HEAD, **BONUS, "compact": True, "beta": 0.1}),
    "all count": (24, None, {**HEAD, "all count": True}),
    "plain": (24, None, {"chunk_size": 64, "temperature": 0.8, "nothing seen": True}),
}


def make_batch(vocabulary):
    random = torch.Generator().manual_seed(41)
    shape = (SEQUENCES, TOKENS)
    mask = torch.arange(TOKENS) < torch.tensor([5, 3, 2])[:, None]
    batch = {
        "hidden": torch.randn(*shape, SIZE, generator=random),
        # Log-probs down to -8: one of -16 is rounded by 1e-6, and with it the ratio.
        "lm_head_weight": 0.5 * torch.randn(vocabulary, SIZE, generator=random),
        "bias": torch.randn(vocabulary, generator=random),
        "token_ids": torch.randint(vocabulary, shape, generator=random),
        "advantages": torch.tensor([1.0, -0.7, 0.0]),
        "mask": mask,
        "weights": torch.tensor([0.2, 0.3, 0.5]),
    }
    # Near the log-probs, as old ones are: a ratio of 12 makes 12 times their rounding.
    logits = batch["hidden"] @ batch["lm_head_weight"].T + batch["bias"]
    log_probs = (logits / 0.8).log_softmax(-1).gather(-1, batch["token_ids"][..., None])[..., 0]
    batch["old_log_probs"] = log_probs + 0.3 * torch.randn(shape, generator=random)
    batch["ref_log_probs"] = batch["old_log_probs"] + 0.1
    return batch


def pad(tensor, rows):
    """What is in the padding must not matter."""
    if rows is None:
        return tensor
    return torch.cat([tensor, tensor.new_full((rows - len(tensor), *tensor.shape[1:]), 9.0)])


def shard(tensor, rank, ranks):
    """torch.chunk, with the empty chunks that it leaves out."""
    chunks = tensor.chunk(ranks)
    return (chunks[rank] if rank < len(chunks) else tensor[:0]).clone()


def run(batch, options, impl, **parallel):
    """Loss, outputs and gradients of linear_policy_loss, by name."""
    options = dict(options)
    options = options if options.pop("nothing seen", False) else {**SEEN, **options}
    batch = dict(batch)
    if options.pop("all count", False):
        batch["mask"] = torch.ones_like(batch["mask"])
    leaves = {
        n: batch.pop(n).detach().requires_grad_() for n in ("hidden", "lm_head_weight", "bias")
    }
    if not options.get("beta"):
        del batch["ref_log_probs"]
    result = dl_norm.linear_policy_loss(**leaves, **batch, **options, impl=impl, **parallel)
    loss, outputs = result if isinstance(result, tuple) else (result, None)
    (3 * loss).backward()
    found = {"loss": loss.detach(), **{f"{n}.grad": leaf.grad for n, leaf in leaves.items()}}
    if outputs is not None and outputs.metrics is not None:
        found |= {n: getattr(outputs, n) for n in ("log_probs", "entropy", "sum_sq_probs")}
        found["ratio"] = outputs.metrics.summary()["ratio_max"]
    return found


def truth(batch, options):
    """The same in float64, by autograd."""
    options = {
        n: v for n, v in options.items() if n not in ("chunk_size", "fp32_logits", "compact")
    }
    mask = batch["mask"] | options.pop("all count", False)
    for name in ("max_tokens", "nothing seen"):
        options.pop(name, None)
    leaves = {n: batch[n].double().requires_grad_() for n in ("hidden", "lm_head_weight", "bias")}
    logits = leaves["hidden"] @ leaves["lm_head_weight"].T + leaves["bias"]
    softcap = options.pop("logit_softcap", None)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    log_p = (logits / options.pop("temperature")).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    log_probs = log_p.gather(-1, batch["token_ids"][..., None])[..., 0]
    bonus = options.pop("entropy_coef", 0.0) * (batch["weights"][:, None] * mask * entropy).sum()
    tensors = {n: batch[n] for n in ("old_log_probs", "advantages", "weights")}
    if options.get("beta"):
        tensors["ref_log_probs"] = batch["ref_log_probs"]
    loss, metrics = dl_norm.reference.policy_loss(
        log_probs, mask=mask, **tensors, **options, return_metrics=True
    )
    loss = loss - bonus
    (3 * loss).backward()
    return {
        "loss": loss.detach(), **{f"{n}.grad": leaf.grad for n, leaf in leaves.items()},
        "log_probs": log_probs.detach() * mask, "entropy": entropy.detach() * mask,
        "sum_sq_probs": log_p.detach().exp().square().sum(-1) * mask,
        "ratio": metrics.summary()["ratio_max"],
    }  # fmt: skip


class Counted:
    """What is communicated, and when: (bytes, asynchronous?) of every collective and the waits."""

    def __init__(self, monkeypatched):
        self.calls, self.events = [], []
        self.original = monkeypatched.all_reduce

    def all_reduce(self, tensor, op, group=None, async_op=False):
        self.calls.append((tensor.numel() * tensor.element_size(), async_op))
        work = self.original(tensor, op, group=group, async_op=async_op)
        if not async_op:
            return work
        self.events.append("start")
        counted = self

        class Work:
            def wait(self):
                counted.events.append("wait")
                work.wait()

        return Work()


def worker(ranks, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.new_group(list(range(ranks)))  # not the default one
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    results = {}
    for name, (vocabulary, padded, options) in CASES.items():
        batch = make_batch(vocabulary)
        mine = dict(batch)
        for part in ("lm_head_weight", "bias"):
            mine[part] = shard(pad(batch[part], padded), rank, ranks)
        for impl in IMPLEMENTATIONS if name != "plain" else ("torch",):
            more = {"tp_group": group, "vocab_size": None if name == "even" else vocabulary}
            results[name, impl] = run(mine, options, impl, **more)
    results |= other_entries(rank, ranks, group, mesh)
    results["traffic"] = traffic(rank, ranks, group)
    results["errors"] = errors(rank, ranks, group, mesh)
    results["as on a GPU"] = other_tokens_without_looking(rank, ranks, group)
    results["largest"] = largest_tensor(rank, ranks, group)
    if ranks == 4:
        results |= with_fsdp(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def other_entries(rank, ranks, group, mesh):
    """Logits, log-probs, DTensors, partial gradients, 16 bits."""
    results = {}
    batch = make_batch(21)
    head, bias = (shard(batch[n], rank, ranks) for n in ("lm_head_weight", "bias"))
    ids = batch["token_ids"]
    tokens = {n: batch[n] for n in ("old_log_probs", "advantages", "mask", "weights")}
    spread = {"tp_group": group, "vocab_size": 21}
    logits = batch["hidden"] @ head.T + bias
    for impl in IMPLEMENTATIONS:
        for in_place in (False, True):
            leaf = logits.clone().requires_grad_()
            loss, seen = dl_norm.logits_policy_loss(
                leaf * 1, ids, **tokens, **BONUS, in_place=in_place, entropy=True,
                temperature=0.8, impl=impl, **spread,
            )  # fmt: skip
            loss.backward()
            results["logits", impl, in_place] = loss.detach(), leaf.grad, seen.log_probs
        results["log-probs", impl] = dl_norm.token_log_probs(
            batch["hidden"], ids, head, bias=bias, mask=batch["mask"], entropy=True,
            sum_sq_probs=True, chunk_size=4, impl=impl, **spread,
        )  # fmt: skip
        results["log-probs of logits", impl] = dl_norm.token_log_probs(
            logits, ids, mask=batch["mask"], impl=impl, **spread
        )
        # As old log-probs they make the ratio of the next loss exactly 1.
        call = {"bias": bias, "mask": batch["mask"], "chunk_size": 4, "impl": impl, **spread}
        _, seen = dl_norm.linear_policy_loss(
            batch["hidden"], head, ids, None, batch["advantages"], weights=batch["weights"], **call,
            **BONUS, return_log_probs=True,
        )  # fmt: skip
        alone = dl_norm.token_log_probs(batch["hidden"], ids, head, **call)
        results["same bits", impl] = torch.equal(seen.log_probs, alone)
    tensors = dict(batch)
    for name in ("lm_head_weight", "bias"):
        whole = batch[name].clone()
        tensors[name] = distribute_tensor(whole, mesh, [Shard(0)]).detach()
    found = run(tensors, HEAD, "torch", tp_group=mesh)
    assert isinstance(found["lm_head_weight.grad"], DTensor)
    results["DTensor"] = {
        n: t.to_local() if isinstance(t, DTensor) else t for n, t in found.items()
    }
    columns = distribute_tensor(batch["hidden"] @ batch["lm_head_weight"].T, mesh, [Shard(2)])
    results["DTensor logits"] = dl_norm.token_log_probs(columns, ids, tp_group=mesh)
    mine = {**batch, "lm_head_weight": head, "bias": bias}
    partial = run(dict(mine), HEAD, "torch", **spread, partial_hidden_grad=True)
    results["partial"] = partial["hidden.grad"]
    for dtype in (torch.bfloat16, torch.float16):
        small = {n: t.to(dtype) if n in ("hidden", "lm_head_weight", "bias") else t
                 for n, t in mine.items()}  # fmt: skip
        results[dtype] = run(small, {**HEAD, **BONUS}, "triton", **spread)

    torch._dynamo.reset()

    def step(hidden):
        return dl_norm.linear_policy_loss(hidden, head, ids, **tokens, **BONUS, **spread)

    hidden = batch["hidden"].clone().requires_grad_()
    loss = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden)
    (grad,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(step(hidden), hidden)
    results["compiled"] = grad, expected
    return results


def traffic(rank, ranks, group):
    """What one call communicates, and the order of products and waits."""
    batch = make_batch(24)
    batch["lm_head_weight"], batch["bias"] = (
        shard(batch[n], rank, ranks) for n in ("lm_head_weight", "bias")
    )
    found = {}
    for name, options in {"loss": {}, "entropy": BONUS, "squares": {"sum_sq_probs": True}}.items():
        counted = Counted(dist)
        product = torch.mm

        def mm(*arguments, counted=counted, product=product, **keywords):
            counted.events.append("product")
            return product(*arguments, **keywords)

        torch.mm, dist.all_reduce = mm, counted.all_reduce
        try:
            run(batch, {"chunk_size": 4, "nothing seen": True, **options}, "torch", tp_group=group)
        finally:
            torch.mm, dist.all_reduce = product, counted.original
        found[name] = counted.calls, counted.events
    return found


def errors(rank, ranks, group, mesh):
    """The messages of what is refused, on every rank alike."""
    batch = make_batch(24)
    head = shard(batch["lm_head_weight"], rank, ranks)
    alone = [dist.new_group([r]) for r in range(ranks)][(rank + 1) % ranks]
    other_mesh = init_device_mesh("cpu", (1, ranks))
    wide = distribute_tensor(batch["lm_head_weight"].clone(), mesh, [Shard(1)])
    on_other = distribute_tensor(batch["lm_head_weight"].clone(), other_mesh, [Shard(0), Shard(1)])
    shifted = batch["token_ids"].clone()
    shifted[0, 0] = (shifted[0, 0] + rank) % 24
    fewer = batch["mask"].clone()
    fewer[0, 1] = rank == 0
    refused = {
        "not a group": dict(tp_group="tp"),
        "not a member": dict(tp_group=alone),
        "two dimensions": dict(tp_group=other_mesh),
        "no group": dict(vocab_size=24),
        "no group, partial": dict(partial_hidden_grad=True),
        "vocab_size": dict(tp_group=group, vocab_size=24.0),
        "too few": dict(tp_group=group, vocab_size=2400),
        "bias": dict(tp_group=group, bias=batch["bias"]),
        "columns": dict(tp_group=group, lm_head_weight=wide),
        "another mesh": dict(tp_group=group, lm_head_weight=on_other),
        "other tokens": dict(tp_group=group, token_ids=shifted),
        "other counts": dict(tp_group=group, mask=fewer, compact=True),
        "other sizes": dict(tp_group=group, chunk_size=3 + 5 * rank),
        "other shards": dict(
            tp_group=group,
            lm_head_weight=head[: len(head) - rank],
            token_ids=batch["token_ids"].clamp(max=5),
        ),
        "an id": dict(tp_group=group, token_ids=batch["token_ids"] + 24),
    }
    messages = {}
    tokens = {n: t for n, t in batch.items() if n not in ("bias", "ref_log_probs")}
    for name, change in refused.items():
        try:
            dl_norm.linear_policy_loss(**{**tokens, "lm_head_weight": head, **change})
            messages[name] = None
        except (TypeError, ValueError) as error:
            messages[name] = str(error)
    return messages


def other_tokens_without_looking(rank, ranks, group):
    """The loss where ranks have other tokens and no check looks at a value, as on a GPU."""
    batch = make_batch(24)
    batch["token_ids"][0, 0] = rank
    tokens = {n: t for n, t in batch.items() if n not in ("bias", "ref_log_probs")}
    tokens["lm_head_weight"] = shard(batch["lm_head_weight"], rank, ranks)
    looks = vocab_parallel.values_are_free
    vocab_parallel.values_are_free = lambda tensor: False
    try:
        log_probs = dl_norm.token_log_probs(
            *(tokens[n] for n in ("hidden", "token_ids", "lm_head_weight")), tp_group=group
        )
        return dl_norm.linear_policy_loss(**tokens, tp_group=group), log_probs
    finally:
        vocab_parallel.values_are_free = looks


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_tensor(rank, ranks, group):
    """Elements of the largest tensor of a call, and of the shard of the head."""
    batch = make_batch(400)
    mine = {**batch, **{n: shard(batch[n], rank, ranks) for n in ("lm_head_weight", "bias")}}
    options = {"chunk_size": 3, "all count": True, **BONUS}
    with Largest() as largest:
        run(mine, options, "torch", tp_group=group)
    return largest.elements, mine["lm_head_weight"].numel()


class Policy(nn.Sequential):
    """A body and a head that is called, with the loss in its forward, as trainers do."""

    def __init__(self):
        torch.manual_seed(42)
        super().__init__(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 24, bias=False))


def with_fsdp(rank):
    """Two data-parallel by two tensor-parallel ranks: FSDP2 over the one, the head over the
    other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    batch = make_batch(24)
    rows = slice(0, 2) if mesh.get_local_rank("dp") == 0 else slice(2, 3)
    mine = {n: batch[n][rows] for n in ("token_ids", "old_log_probs", "advantages", "mask")}
    mine["weights"] = 2 * batch["weights"][rows]  # FSDP2 averages
    results = {}
    for name in ("sharded parameter", "gathered in its forward"):
        model = Policy()
        body, head = model
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh["tp"], [Shard(0)]))
        for module in (body, head):
            fully_shard(module, mesh=mesh["dp"])

        def loss_of(hidden, head=head):
            return dl_norm.linear_policy_loss(
                hidden, head.weight, **mine, **HEAD, **BONUS, tp_group=mesh["tp"]
            )

        hidden = body(batch["hidden"][rows])
        if name == "sharded parameter":
            loss = loss_of(hidden)
        else:
            head.forward = loss_of
            loss = head(hidden)
        loss.backward()
        grads = [parameter.grad.full_tensor() for parameter in model.parameters()]
        results["fsdp2", name] = grads
    return results


# --- without processes: the two launches of a part, and the sums added up here ---


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [(40, 40), (0, 37, 30003)])
def test_few_cases_of_parts(parts, dtype, impl, device):
    """Against one pass over whole rows, entropy in the loss and all outputs."""
    random = torch.Generator().manual_seed(7)
    count, vocabulary = 3, sum(parts)
    whole = (3 * torch.randn(count, vocabulary, generator=random)).to(device, dtype)
    ids = torch.tensor([0, vocabulary - 1, 38], device=device)
    values = [torch.rand(count, generator=random).to(device) for _ in range(3)]
    active = torch.tensor([True, True, False], device=device)
    rows = TokenRows(ids, active, *values[:2], entropy_weights=values[2])
    settings = RowSettings(0.7, 5.0, make_token_loss(), True, True, True)
    module = implementation(impl)
    expected, wanted = RowOutputs.zeros(count, settings, device), torch.empty_like(whole)
    module.logits_pass(whole, wanted, rows, 0, settings, expected)

    found, first = [], 0
    for size in parts:
        shard = VocabShard("group", first, vocabulary)
        part = whole[:, first : first + size].clone()
        sums = torch.zeros(5, count, device=device)
        module.row_sums(part, rows, 0, replace(settings, shard=shard), sums)
        found.append((part, shard, sums))
        first += size
    together = combined(
        [sums.double() for *_, sums in found], module.reference_scale(settings), ids, parts
    )
    for part, shard, _ in found:
        outputs = RowOutputs.zeros(count, settings, device)
        grad = torch.full_like(part, torch.nan)
        mine = replace(settings, shard=shard)
        module.logits_pass(part, grad, rows, 0, mine, outputs, together.float())
        for name in ("log_probs", "entropy", "sum_sq_probs", "partials"):
            torch.testing.assert_close(
                getattr(outputs, name), getattr(expected, name), rtol=2e-6, atol=3e-6
            )
        true = wanted[:, shard.first : shard.first + part.shape[1]]
        rounding = 0.0 if dtype == torch.float32 else 2.0**-7
        error = (grad.double() - true.double()).abs() - rounding * true.double().abs()
        assert error.numel() == 0 or error.max() <= 3e-6 * wanted.abs().max()


def combined(all_sums, scale, ids, parts):
    """By the definition of the sums, in float64."""
    reference = torch.stack([sums[0] for sums in all_sums]).amax(0)
    own = torch.zeros_like(reference)
    rest = torch.zeros_like(all_sums[0][2:])
    first = 0
    for sums, size in zip(all_sums, parts, strict=True):
        shift = ((sums[0] - reference) * scale).clamp(min=-300)
        is_here = (ids >= first) & (ids < first + size)
        own += torch.where(is_here, sums[1] + shift, 0.0)
        total, dot, squares = sums[2:]
        terms = total, dot + shift * total, squares * shift.exp2()
        rest += torch.stack(terms) * shift.exp2()
        first += size
    return torch.cat([reference[None], own[None], rest])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_id_that_is_nowhere_has_no_loss(impl, device):
    """On a GPU it cannot raise without a sync: the loss is NaN, whatever it depends on."""
    rows = TokenRows(
        torch.tensor([7, 12], device=device), torch.ones(2, dtype=torch.bool, device=device),
        *(torch.ones(2, device=device) for _ in range(2)),
    )  # fmt: skip
    shard = VocabShard("group", 4, 12)
    settings = RowSettings(terms=make_token_loss(), shard=shard)
    sums = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [8.0, 8.0]], device=device)
    outputs = RowOutputs.zeros(2, settings, device)
    module = implementation(impl)
    module.logits_pass(torch.zeros(2, 4, device=device), None, rows, 0, settings, outputs, sums)
    assert outputs.log_probs[0].isfinite() and outputs.log_probs[1].isnan()
    assert outputs.partials.sum().isnan()


# --- what they found, against one process ---


@pytest.fixture(params=[2, 4], scope="module")
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def results(run_ranks, ranks):
    return run_ranks(__file__, ranks)


def assert_close(got, expected, name=""):
    scale = max(1.0, expected.abs().max().item()) if "grad" not in name else expected.abs().max()
    assert (got - expected).abs().max() <= 1e-6 * scale, name


def joined(results, key, name):
    return torch.cat([result[key][name] for result in results])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_everything_equals_one_process(case, impl, results):
    if case == "plain" and impl == "triton":
        impl = "torch"
    vocabulary, _, options = CASES[case]
    expected = truth(make_batch(vocabulary), options)
    first = results[0][case, impl]
    assert first.keys() >= {"loss", "hidden.grad", "lm_head_weight.grad", "bias.grad"}
    assert len(first) == (4 if case == "plain" else len(expected))
    for name, wanted in ((name, expected[name]) for name in first):
        if name in ("lm_head_weight.grad", "bias.grad"):
            got = joined(results, (case, impl), name)
            assert not got[vocabulary:].any(), "the padding has no gradient"
            got = got[:vocabulary]
        else:
            got = first[name]
            for result in results[1:]:
                assert torch.equal(result[case, impl][name], got), f"{name}: other bits"
        assert_close(got, wanted, name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_and_log_probs(impl, results):
    batch = make_batch(21)
    logits = batch["hidden"] @ batch["lm_head_weight"].T + batch["bias"]
    ids, mask = batch["token_ids"], batch["mask"]
    tokens = {n: batch[n] for n in ("old_log_probs", "advantages", "mask", "weights")}
    leaf = logits.clone().requires_grad_()
    loss, seen = dl_norm.logits_policy_loss(
        leaf, ids, **tokens, **BONUS, entropy=True, temperature=0.8, impl=impl
    )
    loss.backward()
    for in_place in (False, True):
        key = ("logits", impl, in_place)
        grad = torch.cat([result[key][1] for result in results], -1)
        assert_close(grad, leaf.grad, "grad")
        for result in results:
            assert_close(result[key][0], loss.detach())
            assert_close(result[key][2], seen.log_probs)
            assert torch.equal(result[key][0], results[0][key][0])
    wanted = dl_norm.token_log_probs(
        batch["hidden"], ids, batch["lm_head_weight"], bias=batch["bias"], mask=mask, entropy=True,
        sum_sq_probs=True, impl=impl,
    )  # fmt: skip
    for result in results:
        for got, values in zip(result["log-probs", impl], wanted, strict=True):
            assert_close(got, values)
        assert_close(result["log-probs of logits", impl], wanted[0])
        assert result["same bits", impl]


def test_dtensors(results):
    batch = make_batch(21)
    expected = run(make_batch(21), HEAD, "torch")
    for name, wanted in expected.items():
        if name in ("lm_head_weight.grad", "bias.grad"):
            assert_close(joined(results, "DTensor", name), wanted, name)
        else:
            assert_close(results[0]["DTensor"][name], wanted, name)
    logits = batch["hidden"] @ batch["lm_head_weight"].T
    wanted = dl_norm.token_log_probs(logits, batch["token_ids"])
    assert_close(results[0]["DTensor logits"], wanted)


def test_partial_gradients_add_up(results):
    expected = run(make_batch(21), HEAD, "torch")["hidden.grad"]
    assert_close(sum(result["partial"] for result in results), expected, "grad")
    assert (results[0]["partial"] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, results):
    """The log-probs are those of one process, whose logits have the same bits; a gradient at the
    hidden states is rounded on each rank, and their sum once more."""
    batch = make_batch(21)
    small = {n: t.to(dtype) if n in ("hidden", "lm_head_weight", "bias") else t
             for n, t in batch.items()}  # fmt: skip
    expected = run(small, {**HEAD, **BONUS}, "triton")
    eps = torch.finfo(dtype).eps
    for result in results:
        got = result[dtype]
        for name in ("loss", "log_probs", "entropy"):
            assert torch.equal(got[name], results[0][dtype][name])
            assert_close(got[name], expected[name])
        error = (got["hidden.grad"] - expected["hidden.grad"]).abs().max()
        assert error <= len(results) * eps * expected["hidden.grad"].abs().max()
    got = joined(results, dtype, "lm_head_weight.grad")
    error = (got - expected["lm_head_weight.grad"]).abs().max()
    assert error <= 2 * eps * expected["lm_head_weight.grad"].abs().max()


def test_compiled(results):
    for result in results:
        torch.testing.assert_close(*result["compiled"])


def test_bytes_per_token(results):
    """Two vectors, with the entropy one more, with the squares one more, and a hidden state."""
    active = 10
    for name, vectors in {"loss": 3, "entropy": 4, "squares": 4}.items():
        for result in results:
            calls, _ = result["traffic"][name]
            agreement, *rest = calls
            assert agreement[0] <= 128, "once a call, whatever its size"
            # 8 tokens count for the loss alone: those of advantage 0 are left out.
            tokens = 8 if name == "loss" else active
            assert sum(size for size, _ in rest) == tokens * 4 * (vectors + SIZE)


def test_hidden_gradients_are_summed_beside_the_next_products(results):
    """The sum of a chunk is waited for after the products of the last: the two chunks of 8 tokens
    have each a product for the gradients of hidden states and of the head (the logits are
    an addmm)."""
    for result in results:
        _, events = result["traffic"]["loss"]
        chunk = ["product", "start", "product"], ["product", "start"]
        assert events == [*chunk[0], *chunk[1], "wait", "wait"]


def test_ranks_with_other_tokens_have_no_loss(results):
    """Where a check that raises would synchronise."""
    for result in results:
        loss, log_probs = result["as on a GPU"]
        assert loss.isnan() and log_probs.isnan().all()


def test_no_tensor_of_tokens_times_vocabulary(results):
    """Nor of a shard of it: 15 tokens, and a hidden state of 8."""
    for result in results:
        largest, head = result["largest"]
        assert largest == head


ERRORS = {
    "not a group": "tp_group must be a process group of which this process is a member",
    "not a member": "",
    "two dimensions": "tp_group must be a mesh of one dimension, got 2",
    "no group": "vocab_size has no effect without tp_group",
    "no group, partial": "partial_hidden_grad has no effect without tp_group",
    "vocab_size": "vocab_size must be an int",
    "too few": "of 2400 words",
    "bias": "bias must be the shard of this rank",
    "columns": "is not the one dimension with Shard(0)",
    "another mesh": "is not the one dimension with Shard(0)",
    "other tokens": "token_ids with mask != 0 (a checksum) from",
    "other counts": "tokens that go through the head from",
    "other sizes": "tokens of a chunk from",
    "other shards": "vocab_size from",
    "an id": "token_ids must be in [0, V = 24)",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_honoured_is_refused(name, results):
    for result in results:
        message = result["errors"][name]
        assert message is not None and ERRORS[name] in message
        if name == "not a member":
            assert "a member" in message


@pytest.mark.parametrize("name", ["sharded parameter", "gathered in its forward"])
def test_fsdp_and_tensor_parallel(name, run_ranks):
    model = Policy()
    batch = make_batch(24)
    tokens = {n: batch[n] for n in ("old_log_probs", "advantages", "mask", "weights", "token_ids")}
    loss = dl_norm.linear_policy_loss(
        model[0](batch["hidden"]), model[1].weight, **tokens, **HEAD, **BONUS
    )
    loss.backward()
    for result in run_ranks(__file__, 4):
        for got, parameter in zip(result["fsdp2", name], model.parameters(), strict=True):
            assert_close(got, parameter.grad, "grad")


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

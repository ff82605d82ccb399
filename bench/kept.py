"""The head over kept sets: shapes, sets as truncated sampling leaves them, truth, contestants.

Bytes on a GPU, with E entries in sets of two or more of N tokens, D values a row, of b bytes each:
an entry's row of the head is read for its logit and again for d hidden, and the hidden states once
for each of the three steps, of which d head finds them in the L2 cache; d hidden and the whole
gradient of the head are written: b D (2 E + 3 N + V). Of operations there are 6 E D, and a full
head takes 6 N V D. At 8192 tokens, D = 4096, V = 151,936 and 7.4 entries a token these are 2.4 GB,
0.8 ms at the 3.0 TB/s of an H100, half of it for the gradient of the head, and 30.6 TFLOP, 39 ms
at its 790 TFLOP/s. To the 0.8 ms come some 70 operations of PyTorch on a number an entry, which
count, sort and check: 0.15 ms at 2 µs each. tests/test_traffic.py holds the compiled kernels to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dl_norm
import dl_norm.reference
from bench import heads
from bench.cases import EPS_HIGH, EPS_LOW, draw_lengths
from bench.contest import OURS, Contestant, Expected, Loss, Prepared, our_impl
from bench.head_peers import CLIP
from bench.heads import LOG_RATIOS, HeadInputs
from bench.roofline import matmul_dtype
from dl_norm import KeptSets, linear_policy_loss

# prime-rl #2979 has measured, at top-p 0.97 and top-k 512, a mean of 8, a median of 2, a 99th
# percentile of 82, and 45 to 48 % sets of one token. The others are drawn from the lognormal
# distribution that has this mean and percentile.
SINGLE, MU, SIGMA, LARGEST = 0.46, 1.93, 1.19, 512
CHECKED = 32  # tokens of the full head, which a check in float64 would take minutes for


@dataclass(frozen=True)
class KeptCase:
    name: str
    sequences: int
    max_length: int
    vocabulary: int
    hidden: int
    fill: float = 1.0
    scaled_from: str | None = None
    itemsize: int = 2
    frozen: bool = False  # the head, as under LoRA: no gradient of size V x D is written
    momentum: bool = False  # every number of the head's gradient is read, and a momentum written

    def sizes(self) -> Tensor:
        """(tokens,) sizes of the sets of the tokens that count."""
        return draw_sizes(self.tokens, min(LARGEST, self.vocabulary))

    @property
    def tokens(self) -> int:
        return int(self.lengths().sum())

    def lengths(self) -> Tensor:
        return draw_lengths(self.sequences, self.max_length, self.fill)

    def _entries(self) -> int:
        sizes = self.sizes()
        return int(sizes[sizes > 1].sum())

    def _used(self) -> int:
        """Rows of the head with an entry: about as many as there are entries, in a large one."""
        return min(self._entries(), self.vocabulary)

    def bytes_moved(self) -> int:
        rows = 2 * (self._entries() + self.tokens)
        if not self.frozen:
            rows += self.tokens
            # A CPU's rows without an entry are memory that nobody has written.
            rows += self.vocabulary if self.scaled_from is None else self._used()
        if self.momentum:
            rows += 2 * self.vocabulary
        return self.itemsize * self.hidden * rows

    def flops(self) -> int:
        return (4 if self.frozen else 6) * self._entries() * self.hidden


GPU_CASES = (
    KeptCase("8192x4096x151936", 8, 1024, 151_936, 4096),
    KeptCase("8192x4096x151936 frozen head", 8, 1024, 151_936, 4096, frozen=True),
    KeptCase("32768x2048x151936", 32, 1024, 151_936, 2048),
)
_CPU = {"scaled_from": "8192x4096x151936", "itemsize": 4}
CPU_CASES = (
    KeptCase("256x896x151936", 4, 64, 151_936, 896, **_CPU),
    KeptCase("256x896x151936 momentum", 4, 64, 151_936, 896, momentum=True, **_CPU),
    KeptCase("256x896x151936 frozen head", 4, 64, 151_936, 896, frozen=True, **_CPU),
    KeptCase("2048x1024x151936", 8, 256, 151_936, 1024, **_CPU),
    KeptCase("2048x1024x151936 frozen head", 8, 256, 151_936, 1024, frozen=True, **_CPU),
)
TINY_CASES = (
    KeptCase("3x8x64", 3, 8, 64, 16, 0.6, itemsize=4),
    KeptCase("3x8x64 momentum", 3, 8, 64, 16, 0.6, itemsize=4, momentum=True),
    KeptCase("3x8x64 frozen head", 3, 8, 64, 16, 0.6, itemsize=4, frozen=True),
)


def cases_for(device: torch.device) -> tuple[KeptCase, ...]:
    return GPU_CASES if device.type == "cuda" else CPU_CASES


def draw_sizes(tokens: int, largest: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    sizes = (MU + SIGMA * torch.randn(tokens, generator=random)).exp().long().clamp(2, largest)
    return torch.where(torch.rand(tokens, generator=random) < SINGLE, 1, sizes)


@dataclass(frozen=True)
class KeptInputs(HeadInputs):
    kept: KeptSets


def make_inputs(case: KeptCase, device: torch.device, seed: int = 0) -> KeptInputs:
    """Hidden states and a head of which the logits have a standard deviation of 2; sets of tokens
    drawn evenly from the vocabulary, which is the worst for a cache; each token sampled from the
    softmax over its set, under an old policy at one of LOG_RATIOS; ΔL weights with alpha = 1."""
    random = torch.Generator().manual_seed(seed)
    dtype = matmul_dtype(device)
    shape = (case.sequences, case.max_length)
    hidden = torch.randn(*shape, case.hidden, generator=random).to(dtype)
    head = torch.randn(case.vocabulary, case.hidden, generator=random)
    head = (head * 2 / case.hidden**0.5).to(dtype)
    lengths = case.lengths()
    mask = torch.arange(case.max_length) < lengths[:, None]
    sizes = torch.zeros(shape, dtype=torch.int64)
    sizes[mask] = case.sizes()
    offsets = F.pad(sizes.flatten().cumsum(0), (1, 0))
    # Equal steps that go at most once around the vocabulary: no id twice in a set.
    owners = torch.arange(mask.numel()).repeat_interleave(sizes.flatten())
    starts = torch.randint(case.vocabulary, (mask.numel(),), generator=random)
    step = case.vocabulary // min(LARGEST, case.vocabulary)
    ids = (starts[owners] + step * (torch.arange(len(owners)) - offsets[owners])) % case.vocabulary
    kept = KeptSets(ids.to(device), offsets.to(device))
    hidden, head, mask = hidden.to(device), head.to(device), mask.to(device)

    exact = _padded_log_probs(hidden.flatten(0, 1), head, kept, torch.float32)
    columns = torch.zeros(mask.numel(), dtype=torch.int64, device=device)
    counted = mask.flatten()
    drawn = torch.multinomial(exact[counted].exp().cpu(), 1, generator=random)
    columns[counted] = drawn[:, 0].to(device)
    own = exact.gather(1, columns[:, None])[:, 0]
    places = (kept.offsets[:-1] + columns).clamp(max=kept.ids.shape[0] - 1)
    picked = torch.tensor(LOG_RATIOS)[torch.randint(len(LOG_RATIOS), shape, generator=random)]
    weights = dl_norm.sequence_weights(lengths, "delta_l", max_length=case.max_length)
    head.requires_grad_(not case.frozen)
    if case.momentum:
        average = torch.zeros_like(head, requires_grad=False)

        def add(grad: Tensor) -> None:
            average.lerp_(grad, 0.1)

        head.register_hook(add)
    return KeptInputs(
        leaves=(hidden.requires_grad_(), head),
        token_ids=kept.ids[places].view(shape),
        old_log_probs=own.view(shape).masked_fill(~mask, 0.0) - picked.to(device),
        advantages=torch.randn(case.sequences, generator=random).to(device),
        mask=mask,
        weights=weights.to(device),
        tokens=case.tokens,
        kept=kept,
    )


def _padded_log_probs(hidden: Tensor, rows: Tensor, kept: KeptSets, dtype: torch.dtype) -> Tensor:
    """(N, largest set) log-probs over the sets, -inf behind their ends. By rows of the head, of
    which ``kept.ids`` are the numbers."""
    sizes = kept.offsets.diff()
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    columns = torch.arange(len(owners), device=sizes.device) - kept.offsets[owners]
    logits = (hidden[owners].to(dtype) * rows[kept.ids].to(dtype)).sum(-1)
    padded = logits.new_full((len(sizes), int(sizes.max())), -torch.inf)
    return padded.index_put((owners, columns), logits).log_softmax(-1)


def truth(inputs: KeptInputs) -> Expected:
    """In float64 under autograd, from the rows of the head that are in a set."""
    hidden, head = (leaf.detach() for leaf in inputs.leaves)
    used, numbers = inputs.kept.ids.unique(return_inverse=True)
    leaves = hidden.double().requires_grad_(), head[used].double().requires_grad_()
    counted = inputs.mask.flatten()
    padded = _padded_log_probs(
        leaves[0].flatten(0, 1), leaves[1], inputs.kept._replace(ids=numbers), torch.float64
    )
    owners = torch.arange(counted.numel(), device=used.device)
    owners = owners.repeat_interleave(inputs.kept.offsets.diff())
    places = (inputs.kept.ids == inputs.token_ids.flatten()[owners]).nonzero()[:, 0]
    columns = places - inputs.kept.offsets[:-1][counted]
    own = padded[counted].gather(1, columns[:, None])[:, 0]
    log_probs = torch.zeros_like(inputs.mask, dtype=torch.float64).masked_scatter(inputs.mask, own)
    loss = dl_norm.reference.policy_loss(
        log_probs, inputs.old_log_probs.double(), inputs.advantages.double(), inputs.mask,
        inputs.weights.double(), eps_low=EPS_LOW, eps_high=EPS_HIGH,
    )  # fmt: skip
    upstream, hidden_grad, rows_grad = torch.autograd.grad(loss, (log_probs, *leaves))
    scale = upstream.abs().sum().item()
    if not inputs.leaves[1].requires_grad:
        return Expected(loss.detach(), (hidden_grad,), scale)
    head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
    head_grad.index_copy_(0, used, rows_grad.float())
    return Expected(loss.detach(), (hidden_grad, head_grad), scale)


# contestants


def _kept(inputs: KeptInputs) -> Loss:
    options = {**CLIP, "kept": inputs.kept, "impl": our_impl(inputs.mask)}
    return lambda: linear_policy_loss(*inputs.leaves, *inputs.loss_tensors, **options)


def _masked_logits(inputs: KeptInputs) -> Loss:
    outside = torch.ones(
        inputs.mask.numel(), inputs.leaves[1].shape[0], dtype=torch.bool, device=inputs.mask.device
    )
    sizes = inputs.kept.offsets.diff()
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    outside[owners, inputs.kept.ids] = False
    outside[sizes == 0] = False  # a row of -inf alone has NaN as its gradient

    def loss() -> Tensor:
        logits = F.linear(inputs.leaves[0].flatten(0, 1), inputs.leaves[1]).float()
        log_probs = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
        token_ids, *rest = inputs.loss_tensors
        log_probs = log_probs.gather(-1, token_ids.flatten()[:, None]).view(token_ids.shape)
        return dl_norm.reference.policy_loss(log_probs, *rest, **CLIP)

    return loss


@dataclass(frozen=True)
class AnotherPolicy(Prepared):
    """A loss that is not that of the sets, with a check of its own."""

    check: Callable[[], None] = lambda: None


def _full_head(inputs: KeptInputs) -> AnotherPolicy:
    hidden, head = inputs.leaves
    options = {**CLIP, "impl": our_impl(inputs.mask)}
    # On the policy, as the old log-probs are those of the sets.
    token_ids, _, *rest = inputs.loss_tensors

    def loss() -> Tensor:
        return linear_policy_loss(hidden, head, token_ids, None, *rest, **options)

    def check() -> None:
        """The gradient of some hidden states, against the whole softmax in float64."""
        some = inputs.mask.nonzero()[:CHECKED]
        rows = (some[:, 0], some[:, 1])
        few = hidden.detach()[rows].double().requires_grad_()
        log_probs = F.linear(few, head.detach().double()).log_softmax(-1)
        own = log_probs.gather(-1, token_ids[rows][:, None])[:, 0]
        factors = -(inputs.advantages * inputs.weights)[some[:, 0]].double()
        (exact,) = torch.autograd.grad((factors * own).sum(), few)
        (ours,) = torch.autograd.grad(loss(), hidden)
        heads.check_gradients((ours[rows],), Expected(exact, (exact,), 1.0))

    leaves = tuple(leaf for leaf in inputs.leaves if leaf.requires_grad)
    return AnotherPolicy(loss, leaves, check=check)


def check(prepared: Prepared, expected: Expected) -> None:
    if isinstance(prepared, AnotherPolicy):
        prepared.check()
    else:
        heads.check(prepared, expected)


CONTESTANTS = (
    Contestant(OURS, "linear_policy_loss(kept=...)", _kept),
    Contestant(
        "masked logits",
        "all logits, -inf outside the sets by a mask made beforehand, log_softmax, the reference "
        "loss, autograd",
        _masked_logits,
    ),
    Contestant(
        "full head",
        "linear_policy_loss without sets: another policy, the softmax over all of V; checked "
        f"against float64 in the gradients of {CHECKED} hidden states",
        _full_head,
    ),
)

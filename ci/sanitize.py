"""Launch every kernel configuration at small shapes, with nothing else: for compute-sanitizer.

python ci/sanitize.py                 each configuration once
python ci/sanitize.py --repeat 100    each 100 times, and every bit of the results the same
python ci/sanitize.py --list          the names of the configurations
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import dl_norm  # noqa: E402
from ci import sanitize_heads  # noqa: E402

LENGTHS = (37, 0, 64, 1, 23)
# T past a tile of 1024 and 2048 tokens and odd; T a multiple of 16; T = 1.
PADDED_LENGTHS = (2051, 64, 1)
OPTIONS = {
    "plain": {},
    "dual": {"dual_clip": 3.0, "eps_high": 0.3},
    "delta": {"delta": 2.0},
    "no-clamp": {"log_ratio_clamp": None},
}
PRESENT = ("old", "ref", "token-advantages", "rollout", "token-rollout", "metrics")
# name -> tensors that are given, options. Each variant alone, then with everything else.
_ALL = {"old", "ref", "token-advantages", "token-rollout", "entropy-mask", "sequence-mask"}
_CORRECTED = {"bias_corrected_kl": True, "ratio_level": "sequence"}
VARIANTS: dict[str, tuple[set[str], dict]] = {
    "sequence": ({"old"}, {"ratio_level": "sequence"}),
    "sequence-token": ({"old", "token-advantages"}, {"ratio_level": "sequence_token"}),
    "cispo": ({"old"}, {"surrogate": "cispo"}),
    "sapo": ({"old"}, {"surrogate": "sapo"}),
    "dppo-kl, drift": ({"old"}, {"surrogate": "dppo_kl + drift"}),
    "vespo": ({"old", "metrics"}, {"surrogate": "vespo", "ratio_level": "sequence_sum"}),
    "gmpo": ({"old", "metrics"}, {"surrogate": "gmpo", "ratio_level": "sequence"}),
    "corrected-kl": ({"old", "ref"}, {"bias_corrected_kl": True}),
    "entropy-mask": ({"old", "entropy-mask"}, {}),
    "sequence-mask": ({"old", "sequence-mask"}, {}),
    "clip-everything": (_ALL | {"metrics"}, _CORRECTED),
    "cispo-everything": (_ALL | {"metrics"}, {**_CORRECTED, "surrogate": "cispo"}),
    "sapo-everything": (_ALL | {"metrics"}, {**_CORRECTED, "surrogate": "sapo"}),
    "no-old-everything": (_ALL - {"old"}, _CORRECTED),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def configurations() -> Iterator[tuple[str, dict]]:
    """Every combination of layout, dtype and tensors that selects other code, plus each option."""
    layouts = [f"padded-{t}" for t in PADDED_LENGTHS] + ["strided-64", "packed", "packed-mask"]
    flag_sets = [
        frozenset(flags)
        for count in range(len(PRESENT) + 1)
        for flags in itertools.combinations(PRESENT, count)
        if not {"rollout", "token-rollout"} <= set(flags)
    ]
    for layout, dtype in itertools.product(layouts, DTYPES):
        # All combinations of tensors in fp32 for each way of addressing; elsewhere none, one of
        # them, or all that go together.
        every = dtype == torch.float32 and layout in ("padded-2051", "strided-64", "packed-mask")
        for flags in flag_sets:
            if not every and 1 < len(flags) < len(PRESENT) - 1:
                continue
            name = f"{layout} {str(dtype).removeprefix('torch.')} {'+'.join(sorted(flags)) or '-'}"
            yield name, {"layout": layout, "dtype": dtype, "flags": flags, "options": {}}
        for option, values in OPTIONS.items():
            name = f"{layout} {str(dtype).removeprefix('torch.')} option {option}"
            yield (
                name,
                {"layout": layout, "dtype": dtype, "flags": frozenset({"old"}), "options": values},
            )
        for variant, (flags, values) in VARIANTS.items():
            name = f"{layout} {str(dtype).removeprefix('torch.')} variant {variant}"
            yield (
                name,
                {"layout": layout, "dtype": dtype, "flags": frozenset(flags), "options": values},
            )
    for name in ("no-grad", "int-mask", "float-mask", "empty", "scaled"):
        flags = frozenset({"old"})
        yield name, {"layout": name, "dtype": torch.float32, "flags": flags, "options": {}}


def make(layout: str, dtype: torch.dtype, flags: frozenset[str], device: torch.device) -> dict:
    """The arguments of one call, seeded by nothing but the shapes."""
    generator = torch.Generator(device).manual_seed(0)
    packed = layout.startswith("packed")
    width = int(layout.split("-")[1]) if layout.startswith(("padded", "strided")) else 64
    lengths = torch.tensor([min(n, width) for n in LENGTHS], device=device)
    if layout == "padded-2051":
        lengths[0], lengths[2] = 2051, 1500
    if layout == "empty":
        lengths = lengths * 0
    sequences = len(lengths)
    shape = (int(lengths.sum()),) if packed else (sequences, width)

    def tokens(scale: float, to: torch.dtype = dtype) -> Tensor:
        if layout.startswith("strided"):  # a slice, as trainers pass it: neither stride is 1
            wide = torch.randn(
                (sequences, 2 * width + 3), generator=generator, device=device, dtype=torch.float32
            )
            return (scale * wide).to(to)[:, 2 : 2 + 2 * width : 2]
        return (scale * torch.randn(shape, generator=generator, device=device)).to(to)

    mask: Tensor | None = None
    if not packed:
        mask = torch.arange(width, device=device) < lengths[:, None]
    elif layout == "packed-mask":
        mask = torch.rand(shape, generator=generator, device=device) < 0.7
    if layout == "int-mask" and mask is not None:
        mask = mask.long()
    if layout == "float-mask" and mask is not None:
        mask = mask.float()
    arguments: dict = {
        "log_probs": tokens(0.3),
        "old_log_probs": tokens(0.3) if "old" in flags else None,
        "advantages": tokens(1.0, torch.float32)
        if "token-advantages" in flags
        else torch.randn(sequences, generator=generator, device=device),
        "mask": mask,
        "weights": dl_norm.sequence_weights(lengths, max_length=max(width, 1)),
    }
    if packed:
        arguments["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    if "ref" in flags:
        arguments |= {"ref_log_probs": tokens(0.3), "beta": 0.05}
    if "rollout" in flags:
        arguments["rollout_weights"] = torch.rand(sequences, generator=generator, device=device)
    if "token-rollout" in flags:
        arguments["rollout_weights"] = tokens(1.0, torch.float32).abs()
    if "entropy-mask" in flags:
        arguments["entropy_mask"] = tokens(1.0, torch.float32) > 0
    if "sequence-mask" in flags:
        arguments["sequence_mask"] = torch.arange(sequences, device=device) % 3 > 0
    if "metrics" in flags:
        arguments["return_metrics"] = True
    return arguments


def launch(
    layout: str, dtype: torch.dtype, flags: frozenset[str], options: dict, device: torch.device
) -> list[Tensor]:
    """Forward and backward of one configuration; all tensors that came out."""
    arguments = make(layout, dtype, flags, device) | options
    log_probs = arguments.pop("log_probs").requires_grad_(layout != "no-grad")
    result = dl_norm.policy_loss(log_probs, **arguments, impl="triton")
    loss, metrics = result if isinstance(result, tuple) else (result, None)
    outputs = [loss.detach()]
    if metrics is not None:
        outputs += list(metrics.summary().values())
    if loss.requires_grad:
        # 1 leaves the gradient as it is and anything else scales it: both paths of the kernel.
        upstream = torch.full_like(loss, 0.5 if layout == "scaled" else 1.0)
        outputs += torch.autograd.grad(loss, log_probs, upstream)
    return [output.detach().clone() for output in outputs]


def same_bits(first: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip((t.reshape(-1) for t in first), (t.reshape(-1) for t in other), strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--limit", type=int, help="only the first so many configurations")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    every = itertools.chain(
        ((name, functools.partial(launch, **one)) for name, one in configurations()),
        sanitize_heads.configurations(),
    )
    chosen = [(name, run) for name, run in every if options.only in name][: options.limit]
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changed = []
    for name, run in chosen:
        first = run(device=device)
        again = (run(device=device) for _ in range(options.repeat - 1))
        if not all(same_bits(first, other) for other in again):
            changed.append(name)
    if device.type == "cuda":
        torch.cuda.synchronize()
    for name in changed:
        print(f"other bits on another run: {name}")
    print(
        f"{len(chosen)} kernel configurations, {options.repeat} runs each on {device}, "
        f"{len(changed)} not deterministic"
    )
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())

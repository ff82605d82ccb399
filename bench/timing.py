"""Time and memory of calls, compared fairly: interleaved, caches cold, medians with p20 and p80."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
# A trial is set up untimed and returns the call to time.
Trial = Callable[[], Call]

# GPU cycles that the device spins before each timed call, about 1 ms: the host is then ahead of it,
# and the events measure the device's work rather than the time to launch some dozens of kernels.
SPIN_CYCLES = 2_000_000


@dataclass(frozen=True)
class Stats:
    """Seconds."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stats:
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        median, p20, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(quantiles).tolist()
        return cls(median, p20, p80, len(seconds))


class Clock:
    """Seconds of one call.

    kind "device": CUDA events with the host ahead, so launch overhead is hidden as it is inside a
    busy training step. kind "wall": from an idle device until it is idle again. On a CPU both are
    the wall clock.
    """

    def __init__(self, device: torch.device, kind: str = "device"):
        self.device = device
        self.kind = kind if device.type == "cuda" else "wall"

    def __call__(self, call: Call) -> float:
        if self.kind == "wall":
            self.synchronize()
            start = time.perf_counter()
            result = call()
            self.synchronize()
            taken = time.perf_counter() - start
            del result
            return taken
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        begin.record()
        result = call()
        end.record()
        self.synchronize()
        del result
        return begin.elapsed_time(end) / 1000

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def repeat(self, call: Call, rounds: int, warmup: int = 3) -> list[float]:
        for _ in range(warmup):
            call()
        return [self(call) for _ in range(rounds)]


def interleave(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[str]:
    """Each name once per round, in a new seeded order every round: drift and neighbours hit all."""
    order = random.Random(seed)
    for _ in range(rounds):
        yield from order.sample(list(names), len(names))


def compare(
    trials: Mapping[str, Sequence[Trial]],
    clock: Clock,
    *,
    rounds: int,
    warmup: int = 2,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Stats]:
    """Time contestants against each other.

    trials[name] holds one trial per buffer set, equally many for every name. Every timed call, of
    whichever contestant, takes the next buffer set, so that with enough sets its inputs have left
    the cache since they were last touched.
    """
    sets = {len(trials_of_one) for trials_of_one in trials.values()}
    if len(sets) != 1:
        raise ValueError(f"expected equally many buffer sets for all contestants, got {sets}")
    (set_count,) = sets
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for position, name in enumerate(interleave(list(trials), warmup + rounds)):
        call = trials[name][position % set_count]()
        taken = clock(call)
        del call
        if position >= warmup * len(trials):
            seconds[name].append(taken)
        if (position + 1) % len(trials) == 0:
            on_round()
    return {name: Stats.of(values) for name, values in seconds.items()}


def buffer_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many input sets it takes for a set to leave the last cache before its next turn: one, if
    it is itself larger than two caches."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = 32 * 2**20
    return max(1, min(256, -(-2 * cache // max(1, bytes_of_one))))


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that the call allocates at its highest point, over what was there before.

    GPU: the caching allocator's own peak. CPU: the running sum of the allocations and frees that
    the profiler records for the CPU allocator, which every tensor comes from.
    """
    call()  # lazy set-up is not the call's memory
    gc.collect()  # nor are frees of what was there before
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from dl_norm._kept import head_grad  # not at the top: other commits have none (bench.against)

    # Memory of the system as if it were of the allocator, which is what is recorded.
    seen = patch.object(head_grad, "zeros", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    with seen, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # The list of raw events: `recorded.events()` leaves out what an operator allocates inside.
    profiler: Any = recorded.profiler
    raw = profiler.kineto_results.events()
    changes = [event for event in raw if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    level = peak = 0
    for event in changes:
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize(device)
    return sum(str(event.device_type).endswith("CUDA") for event in recorded.events() or [])


def time_graph(call: Call, clock: Clock, *, rounds: int, flush_bytes: int) -> Stats:
    """Replays of the call captured as a CUDA graph, with a write of flush_bytes before each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    scratch = torch.empty(flush_bytes, dtype=torch.uint8, device=clock.device)
    seconds = []
    for _ in range(rounds):
        scratch.zero_()
        seconds.append(clock(graph.replay))
    del kept
    return Stats.of(seconds)


@contextmanager
def count_compiles() -> Iterator[list[str]]:
    """The names of the Triton kernels compiled inside the block, one entry per compilation."""
    from triton import knobs

    compiled: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def note(*, fn, **_):
        compiled.append(fn.name)

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield compiled
    finally:
        knobs.runtime.jit_post_compile_hook = before

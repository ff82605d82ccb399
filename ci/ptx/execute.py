"""Runs a grid: all threads of several CTAs at a time, one basic block after the other.

Threads at the same block run together, the first block of the program first, so that those which
parted at a branch meet again. A register is an array over the threads of these CTAs, or of one
element where all have the same value; inside a block only the threads that are in it have a place
in the arrays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .memory import TAG, Access, Memory, View, check_races
from .parser import Instruction, Program, PtxError, parse
from .translate import MemoryAccess, translate

TOGETHER = 1 << 13  # threads that run at a time

Lanes = np.ndarray | None  # sorted numbers of threads of a chunk; None: all of them
NOBODY = np.zeros(0, np.int64)


class Kernel:
    """A program that is ready to run."""

    def __init__(self, ptx: str, shared_bytes: int):
        self.ptx = ptx
        self.program: Program = parse(ptx)
        self.functions = translate(self.program)
        self.shared_bytes = -(-shared_bytes // 32) * 32
        self.classes = [
            Counter(class_of(instruction) for instruction in block.instructions)
            for block in self.program.blocks
        ]


CLASSES = {
    "bra": "branch", "ret": "branch", "exit": "branch", "mov": "mov", "bar": "barrier",
    "shfl": "warp", "redux": "warp", "cvt": "convert", "createpolicy": "convert", "selp": "integer",
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "tanh"), "special"),
}  # fmt: skip


def class_of(instruction: Instruction) -> str:
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("ld", "st", "ldmatrix", "stmatrix"):
        space = next((m for m in ("param", "shared") if m in modifiers), "global")
        return space if space == "param" else f"{space} {name[:2]}"
    of_floats = "f" in modifiers[-1] if modifiers else False
    if name == "div":
        return "special" if of_floats else "integer"
    return CLASSES.get(name, "float" if of_floats else "integer")


@dataclass
class Launch:
    """What one launch did. Instructions are those that warps issued, by class."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    hits: np.ndarray  # warps that ran each block
    instructions: Counter[str] = field(default_factory=Counter)
    requested: Counter[str] = field(default_factory=Counter)  # bytes that threads asked for
    sectors: Counter[str] = field(default_factory=Counter)  # distinct ones of 32 bytes

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def issued(self) -> int:
        """Without what does not survive ptxas: moves, loads of parameters."""
        return self.instructions.total() - self.instructions["mov"] - self.instructions["param"]


def run(
    kernel: Kernel, grid: tuple[int, int, int], parameters: dict, views: dict[int, View],
    last: int | None = None,
) -> Launch:  # fmt: skip
    """parameters: values by the names in the PTX, pointers as `memory` tags them. last: how many
    programs to run, if not all."""
    hits = np.zeros(len(kernel.functions), np.int64)
    launch = Launch(kernel.program.name, grid, kernel.program.threads, hits)
    step = max(1, TOGETHER // launch.threads)
    start = launch.ctas - min(last or launch.ctas, launch.ctas)
    try:
        with np.errstate(all="ignore"):
            for first in range(start, launch.ctas, step):
                ctas = np.arange(first, min(first + step, launch.ctas))
                Chunk(kernel, launch, parameters, views, ctas).run()
        for view in {id(view.memory): view for view in views.values()}.values():
            check_races(view.memory, launch.threads, view.name)
            for kind, touched in view.memory.sectors.items():
                launch.sectors[kind] += int(np.count_nonzero(touched))
    except PtxError as error:
        raise PtxError(f"{launch.kernel}: {error}") from None
    for classes, count in zip(kernel.classes, hits.tolist(), strict=True):
        launch.instructions += Counter({name: n * count for name, n in classes.items() if count})
    return launch


class Chunk:
    """Some CTAs of a launch while they run; what the functions of blocks are given."""

    def __init__(self, kernel: Kernel, launch: Launch, parameters, views, ctas: np.ndarray):
        self.kernel, self.launch = kernel, launch
        self.parameters, self.views = parameters, views
        self.ctas, self.threads = ctas, launch.threads
        self.size = len(ctas) * self.threads
        self.registers: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(int(ctas[0]))
        self.epochs = np.zeros(len(ctas), np.int64)  # barriers that each CTA has passed
        self.lanes: Lanes = None
        self.everyone = np.arange(self.size)
        x, y, _ = launch.grid
        self.specials = {
            "tid.x": np.tile(np.arange(self.threads, dtype="u4"), len(ctas)),
            "ntid.x": np.array([self.threads], "u4"),
            **{f"nctaid.{d}": np.array([n], "u4") for d, n in zip("xyz", launch.grid, strict=True)},
            **{
                f"ctaid.{d}": value.astype("u4").repeat(self.threads if len(ctas) > 1 else 1)
                for d, value in zip("xyz", (ctas % x, ctas // x % y, ctas // (x * y)), strict=True)
            },
        }
        self.specials["laneid"] = self.specials["tid.x"] % np.uint32(32)

    @cached_property
    def shared(self) -> Memory:
        size = len(self.ctas) * self.kernel.shared_bytes
        return Memory(self.random.integers(0, 256, size, "u1"), np.ones(size, bool), True)

    def run(self) -> None:
        blocks = self.kernel.program.blocks
        pending: dict[int, Lanes] = {0: None}
        waiting: dict[int, np.ndarray] = {}

        def go(block: int, lanes: Lanes) -> None:
            if lanes is not None and lanes.size == 0:
                return
            if lanes is not None and block in pending:
                other = pending[block]
                lanes = None if other is None else np.union1d(other, lanes)
            pending[block] = None if lanes is None or lanes.size == self.size else lanes

        while pending:
            number = min(pending)
            block = blocks[number]
            self.enter(number, pending.pop(number))
            yes, no = self.split(self.kernel.functions[number](self))
            if block.kind == "fall":
                go(number + 1, yes)
            elif block.kind == "barrier":
                for lanes in self.arrive(number, waiting):
                    go(number + 1, lanes)
            else:
                if block.kind == "branch":
                    go(block.target, yes)
                go(number + 1, no)
        if waiting:
            number, lanes = min(waiting.items())
            there = int(np.count_nonzero(lanes // self.threads == lanes[0] // self.threads))
            only = f"{there} of {self.threads} threads of a CTA"
            raise _error(f"barrier that only {only} reach", blocks[number].instructions[-1])
        if "shared" in self.__dict__:
            check_races(self.shared, self.threads, "shared memory")

    # Which threads run.

    def enter(self, block: int, lanes: Lanes) -> None:
        self.lanes = lanes
        self.active = self.size if lanes is None else lanes.size
        if lanes is None:
            self.launch.hits[block] += self.size // 32
        else:
            self.launch.hits[block] += 1 + np.count_nonzero(np.diff(lanes >> 5))

    def split(self, flags: np.ndarray | None) -> tuple[Lanes, Lanes]:
        """Running threads whose flag is set, and the others."""
        if flags is None or flags.all():
            return self.lanes, NOBODY
        if not flags.any():
            return NOBODY, self.lanes
        if self.lanes is None:
            return np.flatnonzero(flags), np.flatnonzero(~flags)
        return self.lanes[flags], self.lanes[~flags]

    def arrive(self, number: int, waiting: dict[int, np.ndarray]) -> list[Lanes]:
        """The threads that a barrier lets go on: of the CTAs whose threads are all at it."""
        if self.lanes is None:
            self.epochs += 1
            return [None]
        lanes = np.union1d(waiting.pop(number, NOBODY), self.lanes)
        cta = lanes // self.threads
        complete = np.bincount(cta, minlength=len(self.ctas)) == self.threads
        self.epochs[complete] += 1
        if not complete[cta].all():
            waiting[number] = lanes[~complete[cta]]
        return [lanes[complete[cta]]]

    def numbers(self, chosen: Lanes = None) -> np.ndarray:
        """Of the running threads, or the chosen ones among them: their place in the chunk."""
        lanes = self.everyone if self.lanes is None else self.lanes
        return lanes if chosen is None else lanes[chosen]

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        if self.lanes is not None and self.lanes.size != 32 * len(np.unique(self.lanes >> 5)):
            raise PtxError("warp-wide instruction with part of a warp")
        if values.size == 1:
            values = np.broadcast_to(values, self.active)
        return values.reshape(-1, 32)

    def check_members(self, members: np.ndarray, known: np.ndarray | bool = True) -> None:
        if not (members == 0xFFFFFFFF).all() or not np.all(known):
            raise PtxError("unknown instruction: warp-wide, for a part of its threads")

    # Registers

    def of_lanes(self, values: np.ndarray) -> np.ndarray:
        return values if self.lanes is None or values.size == 1 else values[self.lanes]

    def get(self, name: str) -> np.ndarray:
        values = self.registers.get(name)
        if values is None:  # nothing wrote it: random bits
            kind = self.kernel.program.registers[name.rstrip("0123456789")]
            bits = self.random.integers(0, 2**63, self.active, "u8")
            return bits % np.uint64(2) != 0 if kind == "?" else bits.astype(kind)
        return self.of_lanes(values)

    def put(self, name: str, values: np.ndarray) -> None:
        if self.lanes is not None:
            old = self.registers.get(name)
            whole = np.empty(self.size, values.dtype)
            if old is not None:
                whole[:] = old
            whole[self.lanes] = values
            values = whole
        self.registers[name] = values

    def special(self, name: str) -> np.ndarray:
        return self.of_lanes(self.specials[name])

    def parameter(self, name: str, offset: int, kind: str) -> np.ndarray:
        return self.parameters[name][offset:][: np.dtype(kind).itemsize].view(kind)

    # Memory

    def load(self, access: MemoryAccess, at: np.ndarray, flags: np.ndarray | None):
        """A list of the vector's elements; anything where the flag is not set."""
        chosen, at = self.choose(access, at, flags)
        if at.size == 0:
            return [np.zeros(1, access.element)] * access.count
        words = np.empty(at.size, f"V{access.width}")
        for part, memory, offsets in self.find(access, at, chosen, None):
            found = memory.load(offsets, access.width)
            if found is None:
                name = "shared memory" if access.space == "shared" else self.name_of(memory)
                raise _error(f"read of {name} that nothing wrote", access.instruction)
            words[part] = found.view(words.dtype)
        elements = words.view(access.element).reshape(-1, access.count).T
        if chosen is not None and at.size > 1:
            whole = np.zeros((access.count, self.active), access.element)
            whole[:, chosen] = elements
            elements = whole
        return list(np.ascontiguousarray(elements))

    def store(self, access: MemoryAccess, at: np.ndarray, flags, values: list) -> None:
        if at.size == 1:
            at = np.broadcast_to(at, self.active)
        chosen, at = self.choose(access, at, flags)
        if at.size == 0:
            return
        elements = np.empty((at.size, access.count), access.element)
        for k, value in enumerate(values):
            elements[:, k] = value if chosen is None or value.size == 1 else value[chosen]
        words = elements.view(f"V{access.width}")[:, 0]
        for part, memory, offsets in self.find(access, at, chosen, words):
            if not memory.store(offsets, access.width, words[part]):
                raise _error(f"store to the input {self.name_of(memory)}", access.instruction)

    def matrix_rows(self, access: MemoryAccess, at: np.ndarray, count: int) -> list[np.ndarray]:
        """Matrices of 8 rows of 16 bytes: thread t says where row t % 8 of matrix t / 8 lies, and
        of every matrix it holds 4 bytes, number t % 4 of row t / 4. Where those are."""
        rows = self.by_warp(at)[:, : 8 * count]
        if (rows % 16).any():
            raise _error("misaligned row of a matrix", access.instruction)
        lane = np.arange(32)
        return [(rows[:, 8 * k + lane // 4] + lane % 4 * 4).reshape(-1) for k in range(count)]

    def choose(
        self, access: MemoryAccess, at: np.ndarray, flags: np.ndarray | None
    ) -> tuple[Lanes, np.ndarray]:
        """The threads whose flag is set (None: all) and their addresses, one if all are equal."""
        if access.space == "shared" and len(self.ctas) > 1:
            at = np.broadcast_to(at, self.active)  # the same address is another in every CTA
        if flags is None or flags.all():
            return None, at
        chosen = np.flatnonzero(flags) if flags.size > 1 else NOBODY
        return chosen, at if at.size == 1 and chosen.size else at[chosen]

    def find(self, access: MemoryAccess, at: np.ndarray, chosen: Lanes, stored: np.ndarray | None):
        """Checks and notes an access: which part of it goes to which memory, and where there."""
        kind = "load" if stored is None else "store"
        count = self.active if chosen is None else chosen.size
        if access.space == "shared":
            limit = self.kernel.shared_bytes
            if at.min() < 0 or at.max() + access.width > limit:
                raise _error(f"out of bounds of {limit} bytes of shared memory", access.instruction)
            if len(self.ctas) > 1:
                at = at + self.numbers(chosen) // self.threads * limit
            found = [(slice(None), self.shared, at)]
        else:
            self.launch.requested[kind] += count * access.width
            found = self.find_views(access, at, kind)
        for part, memory, offsets in found:
            if int(np.bitwise_or.reduce(offsets)) & (access.width - 1):
                raise _error(f"misaligned {kind} of {access.width} bytes", access.instruction)
            if access.space == "global":
                memory.sectors[kind][offsets >> 5] = True
            numbers = self.numbers(chosen)
            memory.log.append(
                Access(
                    offsets, access.width, numbers[part] if at.size > 1 else numbers,
                    int(self.ctas[0]) * self.threads, self.epochs.copy(),
                    None if stored is None else stored[part],
                    access.instruction,
                )
            )  # fmt: skip
            yield part, memory, offsets

    def find_views(self, access: MemoryAccess, at: np.ndarray, kind: str):
        tags = at >> TAG
        everything = [slice(None)] if (tags == tags[0]).all() else [
            np.flatnonzero(tags == tag) for tag in np.unique(tags)
        ]  # fmt: skip
        for part in everything:
            view = self.views.get(int(tags[part][0]))
            if view is None:
                raise _error(f"{kind} through no pointer of a tensor", access.instruction)
            offsets = at[part] - view.origin
            allowed = view.allows(offsets, access.width)
            if not np.all(allowed):
                wrong = offsets[~allowed] - view.low
                raise _error(
                    f"{kind} out of bounds: {access.width} bytes at byte {int(wrong[0])} of "
                    f"{view.name}, which ends at {view.high - view.low}"
                    + (" and has gaps" if view.legal is not None else "")
                    + f", {wrong.size} threads",
                    access.instruction,
                )
            yield part, view.memory, offsets

    def name_of(self, memory: Memory) -> str:
        return "=".join(v.name for v in self.views.values() if v.memory is memory)


def _error(what: str, instruction: Instruction) -> PtxError:
    return PtxError(f"{what}: {instruction}")

"""The memory of a launch: what may be touched, what has been written, who touched what."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .parser import Instruction, PtxError

# A tensor argument's pointer is its number in the upper bits and its address in the lower: an
# address far out of bounds is still known to be derived from that argument.
TAG = 48
# What `mark` fills fresh memory with. As float32, bfloat16 and float16 it is a NaN that no
# arithmetic makes.
UNWRITTEN = np.uint16(0x7FB5)
# Larger tensors are addresses with hardly any memory behind them: their bytes are not looked at.
VIRTUAL = 1 << 30


def mark(tensor: Tensor) -> Tensor:
    """Fills the storage of a new tensor with the words that say "nothing was written here"."""
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided:
        storage = tensor.untyped_storage()
        _raw(storage.data_ptr(), storage.nbytes() // 2 * 2).view("u2")[:] = UNWRITTEN
    return tensor


def _raw(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), "u1")


class Memory:
    """A storage (or the shared memory of some CTAs), from its first touchable byte on.

    fresh: a flag for each byte that nothing wrote; None if there is none. in_place: values may be
    overwritten. Else only fresh memory and zeros may, as what a host allocates for results is one
    or the other.
    """

    def __init__(self, data: np.ndarray, fresh: np.ndarray | None, in_place: bool):
        self.data, self.fresh, self.in_place = data, fresh, in_place
        self.values: np.ndarray | None = None  # flags of bytes that hold a value since before
        self.log: list[Access] = []
        self.sectors = {kind: np.zeros(data.size // 32, bool) for kind in ("load", "store")}

    @staticmethod
    def words(array: np.ndarray, width: int) -> np.ndarray:
        return array.view(f"V{width}" if width > 8 else f"u{width}")

    def any_flag(self, flags: np.ndarray | None, words: np.ndarray, width: int) -> bool:
        return flags is not None and bool(self.words(flags, width)[words].view("u1").any())

    def load(self, at: np.ndarray, width: int) -> np.ndarray | None:
        """The words at these offsets; None if nothing wrote some of them."""
        at = at >> width.bit_length() - 1
        return None if self.any_flag(self.fresh, at, width) else self.words(self.data, width)[at]

    def store(self, at: np.ndarray, width: int, words: np.ndarray) -> bool:
        """False: there are values that were given."""
        at = at >> width.bit_length() - 1
        if self.values is None and not self.in_place:
            self.values = self.data != 0
            if self.fresh is not None:
                self.values &= ~self.fresh
        if self.any_flag(self.values, at, width):
            return False
        if self.fresh is not None:
            flags = self.words(self.fresh, width)
            flags[at] = np.zeros(1, flags.dtype)
        data = self.words(self.data, width)
        data[at] = words.view(data.dtype)
        return True


class Access(NamedTuple):
    """What some threads did at once. epochs: barriers passed, for each CTA of the chunk."""

    offsets: np.ndarray
    width: int
    threads: np.ndarray  # their numbers in the chunk
    first: int  # what to add for those in the grid
    epochs: np.ndarray
    stored: np.ndarray | None  # the words, of a store
    instruction: Instruction


@dataclass
class View:
    """What one argument lets a kernel touch: bytes ``low`` to ``high`` of a memory and of those,
    where there are gaps, the ``legal`` ones.

    in_place: values may be overwritten. extends: the tensor stands for all of its storage from its
    first element on.
    """

    name: str
    tensor: Tensor
    in_place: bool = False
    extends: bool = False
    legal: np.ndarray | None = None

    def __post_init__(self):
        tensor, storage = self.tensor, self.tensor.untyped_storage()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.data_ptr()
        self.end = self.start + (last + 1) * tensor.element_size()
        if self.extends:
            self.end = storage.data_ptr() + storage.nbytes()

    def place(self, memory: Memory, base: int, tag: int) -> None:
        self.memory = memory
        self.origin = (tag << TAG) + base  # what to subtract from a pointer
        self.low, self.high = self.start - base, self.end - base
        if not (self.extends or self.tensor.is_contiguous() or memory.data.size >= VIRTUAL):
            self.legal = np.zeros(memory.data.size, bool)
            self.legal[self.low : self.high] = _elements(self.tensor, self.high - self.low)

    def allows(self, at: np.ndarray, width: int) -> np.ndarray | bool:
        if at.min() < self.low or at.max() + width > self.high:
            return (at >= self.low) & (at + width <= self.high)
        if self.legal is None:
            return True
        words = self.memory.words(self.legal, width)[at >> width.bit_length() - 1]
        return words.view("u1").reshape(-1, width).all(axis=1)


def place(views: dict[int, View]) -> None:
    """Gives views, by tag, their memory. Those of one storage share it."""
    groups: dict[int, list[int]] = {}
    for tag, view in views.items():
        groups.setdefault(view.tensor.untyped_storage().data_ptr(), []).append(tag)
    for tags in groups.values():
        group = [views[tag] for tag in tags]
        base = min(view.start for view in group) // 32 * 32
        size = -(-(max(view.end for view in group) - base) // 32) * 32
        data, fresh = _raw(base, size), None
        if size < VIRTUAL:
            flags = np.zeros(size, bool)
            for view in group:
                part = slice(view.start - base, view.end - base)
                _find_fresh(flags[part], data[part], view.tensor.element_size())
            fresh = flags if flags.any() else None
        in_place = size >= VIRTUAL or any(view.in_place for view in group)
        memory = Memory(data, fresh, in_place)
        for view, tag in zip(group, tags, strict=True):
            view.place(memory, base, tag)


def _elements(tensor: Tensor, size: int) -> np.ndarray:
    """A flag for each byte from the first element to the last: is it of an element."""
    flags = torch.zeros(size // tensor.element_size(), dtype=torch.bool)
    steps = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
    flags.as_strided([n for n, _ in steps], [s for _, s in steps]).fill_(True)
    return flags.numpy().repeat(tensor.element_size())


def _find_fresh(fresh: np.ndarray, data: np.ndarray, size: int) -> None:
    if size == 1:
        return  # every byte may be a value
    marked = (data.view("u2") == UNWRITTEN).reshape(-1, size // 2).all(axis=1)
    if marked.any():
        fresh |= marked.repeat(size)


def check_races(memory: Memory, threads: int, place: str) -> None:
    """Raises if two threads touched the same bytes, one of them writing, with nothing in between
    that orders them: a barrier, in one CTA; nothing does for two CTAs. Threads of a CTA may write
    the same value: so they do where all of them hold it."""
    log = memory.log
    if all(access.stored is None for access in log):
        return
    # A row for each thread of each access, then one for each unit of bytes that it touched.
    number = np.repeat(np.arange(len(log)), [access.threads.size for access in log])
    place_in_chunk = np.concatenate([access.threads for access in log])
    offset = np.concatenate([np.broadcast_to(a.offsets, a.threads.shape) for a in log])
    starts = np.cumsum([0, *(access.epochs.size for access in log[:-1])])
    epoch = np.concatenate([access.epochs for access in log])[
        starts[number] + place_in_chunk // threads
    ]
    thread = place_in_chunk + np.array([access.first for access in log])[number]
    unit = min(access.width for access in log)
    units = np.array([access.width // unit for access in log])[number]
    row = np.repeat(np.arange(number.size), units)
    touched = offset[row] // unit + np.arange(row.size) - (np.cumsum(units) - units)[row]
    order = np.lexsort((epoch[row], thread[row] // threads, touched))
    row, touched = row[order], touched[order]
    thread, epoch, number = thread[row], epoch[row], number[row]
    cta = thread // threads
    write = np.array([access.stored is not None for access in log])[number]
    new = np.diff(touched, prepend=-1) != 0
    for kind, who, starts in (
        ("between CTAs", cta, new),
        ("between threads of a CTA without a barrier", thread,
         new | (np.diff(cta, prepend=-1) != 0) | (np.diff(epoch, prepend=-1) != 0)),
    ):  # fmt: skip
        first = np.flatnonzero(starts)
        several = np.minimum.reduceat(who, first) != np.maximum.reduceat(who, first)
        bad = np.flatnonzero(several & np.logical_or.reduceat(write, first))
        if bad.size and who is thread:
            stored = np.concatenate([_stored(access, unit) for access in log])[order]
            same = np.append(True, (stored[1:] == stored[:-1]).all(axis=1))
            same[first] = True
            harmless = np.logical_and.reduceat(write & same, first)
            bad = bad[~harmless[bad]]
        if bad.size:
            found = slice(first[bad[0]], np.append(first, row.size)[bad[0] + 1])
            guilty = {str(log[n].instruction) for n in number[found].tolist()}
            some = sorted(set(thread[found].tolist()))[:4]
            raise PtxError(
                f"race {kind}: {bad.size} times in {place}, first at byte "
                f"{int(touched[found][0]) * unit}, threads {some}: {' and '.join(sorted(guilty))}"
            )


def _stored(access: Access, unit: int) -> np.ndarray:
    """A row of bytes for each unit that each thread touched."""
    if access.stored is None:
        return np.zeros((access.threads.size * access.width // unit, unit), "u1")
    return np.ascontiguousarray(access.stored).view("u1").reshape(-1, unit)

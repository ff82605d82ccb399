"""Basic blocks into Python functions of NumPy operations."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from . import instructions
from .parser import Address, Block, Immediate, Instruction, Operand, Program, PtxError, Register

# PTX types as NumPy types. 16-bit floats are decoded for arithmetic; "pair": two values a register.
TYPES = {
    "pred": "?", "f16": "u2", "bf16": "u2", "f32": "f4", "f64": "f8", "f16x2": "u4", "bf16x2": "u4",
    "f32x2": "u8",
    **{f"{k}{8 * n}": f"{t}{n}" for k, t in ("bu", "uu", "si") for n in (1, 2, 4, 8)},
}  # fmt: skip
NARROW = ("f16", "bf16")
PAIRS = ("f16x2", "bf16x2", "f32x2")
TABLE: dict[str, tuple[list[str], str, str]] = {}
for _line in instructions.TABLE.strip().split("\n"):
    _names, _signature, _expression = (part.strip() for part in _line.split("|", 2))
    _sources, _result = _signature.split(">")
    _letters = [t for part in _sources.split(",") for t in ([part] if part[1:].isdigit() else part)]
    for _name in _names.split():
        TABLE[_name] = (_letters, _result, _expression)
# What other types would round or err otherwise.
F32_ONLY = {name for name in TABLE if name.startswith("fma") or "approximate" in TABLE[name][2]}
F32_ONLY |= {"lg2.approx"}
SPACES = ("global", "shared", "param")
# What says where a value may be cached, or in which order it is seen: neither is modelled.
HINTS = {"relaxed", "weak", "volatile", "gpu", "cta", "sys", "nc", "ca", "cg", "cs", "lu", "cv",
         "wt", "wb", "L2::cache_hint"}  # fmt: skip
HINTS |= {f"L1::{p}" for p in ("evict_first", "evict_last", "evict_normal", "no_allocate")}


@dataclass(frozen=True)
class MemoryAccess:
    """What execute needs to know of a load or store."""

    instruction: Instruction
    space: str
    width: int  # bytes a thread
    count: int  # elements of the vector
    element: str  # NumPy type


def translate(program: Program) -> list[Callable]:
    """A function of each block: of the running machine, to the flags of its branch or None."""
    homes: dict[str, set[int]] = {}  # register -> blocks that mention it
    for number, block in enumerate(program.blocks):
        for instruction in block.instructions:
            for name in _mentioned(instruction):
                homes.setdefault(name, set()).add(number)
    scope = dict(vars(instructions))
    sources = [
        _Writer(program, homes, scope).function(number, block)
        for number, block in enumerate(program.blocks)
    ]
    text, name = "\n".join(sources), f"<{program.name} {id(program)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), scope)
    return [scope[f"block_{number}"] for number in range(len(program.blocks))]


def _mentioned(instruction: Instruction) -> Iterator[str]:
    stack: list[Operand] = list(instruction.operands)
    while stack:
        operand = stack.pop()
        if isinstance(operand, list):
            stack += operand
        elif isinstance(operand, Address):
            stack.append(operand.base)
        elif isinstance(operand, Register) and "." not in operand.name:
            yield operand.name
    if instruction.predicate:
        yield instruction.predicate


@dataclass
class _Writer:
    """Writes the function of one block. A register that no other block mentions, and that is not
    read before it is written, is a local variable; the others are kept in the machine."""

    program: Program
    homes: dict[str, set[int]]
    scope: dict  # names that the functions find, constants among them
    types: dict[str, str] = field(default_factory=dict)  # local variable -> its NumPy type now
    kept_before: set[str] = field(default_factory=set)
    kept: dict[str, None] = field(default_factory=dict)  # to be written back at the end
    lines: list[str] = field(default_factory=list)
    number: int = 0

    def function(self, number: int, block: Block) -> str:
        self.number = number
        self.lines = [f"def block_{number}(s):"]
        flags = None
        for instruction in block.instructions:
            start = len(self.lines)
            if instruction.name in ("bra", "ret", "exit"):
                flags = self.predicate(instruction)
            elif instruction.name == "bar":
                if instruction.text != "bar.sync 0":
                    raise _unknown(instruction)
            else:
                getattr(self, f"_{instruction.name}", self.table)(instruction)
            if len(self.lines) > start:
                self.lines[start] += f"  # {instruction.text}"
        for name in self.kept:
            value = self.cast(name, self.types[name], self.width(name))
            self.lines.append(f" s.put({name!r}, {value})")
        self.lines.append(f" return {flags}")
        return "\n".join(self.lines)

    def width(self, name: str) -> str:
        return self.program.registers[name.rstrip("0123456789")]

    def read(self, name: str) -> None:
        if name not in self.types:
            self.types[name] = self.width(name)
            self.kept_before.add(name)
            self.lines.append(f" {name} = s.get({name!r})")

    def predicate(self, instruction: Instruction) -> str | None:
        if instruction.predicate is None:
            return None
        self.read(instruction.predicate)
        return ("~" if instruction.negated else "") + instruction.predicate

    def use(self, operand: Operand, kind: str) -> str:
        """An expression for the operand as NumPy type ``kind``."""
        if isinstance(operand, Register):
            if "." in operand.name or operand.name == "laneid":
                return self.cast(f"s.special({operand.name!r})", "u4", kind)
            self.read(operand.name)
            return self.cast(operand.name, self.types[operand.name], kind)
        if operand == "global_smem":
            operand = Immediate(0)
        if not isinstance(operand, Immediate):
            raise PtxError(f"unknown operand {operand}")
        size = np.dtype(kind).itemsize
        name = f"c{size}_{operand.bits & (256**size - 1):x}_{kind.replace('?', 'p')}"
        bits = np.array([operand.bits & (256**size - 1)], f"u{size}")
        self.scope[name] = bits.view(kind) if kind != "?" else bits != 0
        return name

    @staticmethod
    def cast(text: str, have: str, want: str) -> str:
        if have == want:
            return text
        if np.dtype(have).itemsize == np.dtype(want).itemsize:
            return f"{text}.view({want!r})"
        bits = f"u{np.dtype(want).itemsize}"  # of a wider register the low part
        narrowed = f"{text}.astype({bits!r})"
        return narrowed if bits == want else f"{narrowed}.view({want!r})"

    def assign(self, instruction: Instruction, target: Operand, text: str, kind: str) -> None:
        """target = text, a value of NumPy type ``kind``, where the predicate holds."""
        if target == "_":
            return
        if not isinstance(target, Register):
            raise _unknown(instruction)
        name = target.name
        whole = self.width(name)
        size = np.dtype(kind).itemsize
        if size < np.dtype(whole).itemsize:  # extended by its sign, if it has one
            kind = kind[0] + whole[1]
            text = f"({text}).astype({kind!r})"
        elif size > np.dtype(whole).itemsize:
            raise _unknown(instruction)
        if instruction.predicate:
            flags = self.predicate(instruction)
            text = f"np.where({flags}, {text}, {self.use(target, kind)})"
        self.types[name] = kind
        self.lines.append(f" {name} = {text}")
        if self.homes[name] != {self.number} or name in self.kept_before:
            self.kept[name] = None

    # One method a kind of instruction.

    def table(self, instruction: Instruction) -> None:
        modifiers = list(instruction.modifiers)
        kinds = []
        while modifiers and modifiers[-1] in TYPES:
            kinds.insert(0, modifiers.pop())
        flush = "ftz" in modifiers
        name = ".".join((instruction.name, *(m for m in modifiers if m != "ftz")))
        name += ".x" * (len(kinds) == 2)  # another type for the first operand
        target, *sources = instruction.operands
        if name in ("min", "max") and len(sources) == 3:
            name += "3"
        if name not in TABLE or not kinds or (flush and kinds != ["f32"]):
            raise _unknown(instruction)
        letters, result, expression = TABLE[name]
        kind = kinds[0]
        if len(letters) != len(sources) or (name in F32_ONLY and kind not in ("f32", "f32x2")):
            raise _unknown(instruction)
        bits_only = name in ("selp", "and", "or", "xor", "not")
        values = []
        for position, (source, letter) in enumerate(zip(sources, letters, strict=True)):
            its = kinds[-1] if len(kinds) == 2 and position == 0 else kind
            value = self.use(source, self.letter(letter, its))
            if letter == "T" and not bits_only:
                value = self.decoded(value, its)
            values.append(f"flush({value})" if flush else value)
        expression = expression.format(*values, W=repr(self.letter("W", kind)))
        if result == "T" and not bits_only:
            expression = self.encoded(expression, kind)
        expression = f"flush({expression})" if flush else expression
        self.assign(instruction, target, expression, self.letter(result, kind))

    @staticmethod
    def letter(letter: str, kind: str) -> str:
        if letter == "T":
            return TYPES[kind]
        if letter == "W":
            return f"{TYPES[kind][0]}{2 * int(TYPES[kind][1:])}" if TYPES[kind] != "?" else "?"
        return letter

    @staticmethod
    def decoded(value: str, kind: str) -> str:
        if kind in PAIRS:
            return f"from_pair({value}, {kind!r})"
        return f"decode({value}, {kind!r})" if kind in NARROW else value

    @staticmethod
    def encoded(value: str, kind: str) -> str:
        if kind in PAIRS:
            return f"to_pair({value}, {kind!r})"
        return f"encode({value}, {kind!r})" if kind in NARROW else value

    def _setp(self, instruction: Instruction) -> None:
        comparison, *combine, kind = instruction.modifiers
        target, a, b, *other = instruction.operands
        compare = instructions.COMPARE.get(comparison)
        if compare is None or kind not in TYPES or len(combine) != len(other):
            raise _unknown(instruction)
        if comparison == "ne" and "f" not in kind:
            compare = "{0} != {1}"
        values = [self.decoded(self.use(x, TYPES[kind]), kind) for x in (a, b)]
        text = f"({compare.format(*values)})"
        if combine:
            symbol = {"and": "&", "or": "|", "xor": "^"}[combine[0]]
            text = f"{text} {symbol} {self.use(other[0], '?')}"
        if isinstance(target, list):
            self.lines.append(f" both = {text}")
            second = "both[:, 1]" if kind in PAIRS else "~both"
            self.assign(instruction, target[1], second, "?")
            target, text = target[0], "both[:, 0]" if kind in PAIRS else "both"
        self.assign(instruction, target, text, "?")

    def _mov(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        kind = TYPES[instruction.modifiers[-1]]
        if isinstance(target, list):  # unpack
            part = f"u{np.dtype(kind).itemsize // len(target)}"
            whole = self.use(source, kind)
            for k, one in enumerate(target):
                text = f"({whole} >> {8 * k * int(part[1])}).astype({part!r})"
                self.assign(instruction, one, text, part)
        elif isinstance(source, list):  # pack
            part = np.dtype(kind).itemsize // len(source)
            parts = [
                f"{self.use(one, f'u{part}')}.astype({kind!r}) << {8 * k * part}"
                for k, one in enumerate(source)
            ]
            self.assign(instruction, target, " | ".join(parts), kind)
        else:
            if isinstance(source, Register) and source.name in self.types:
                have = self.types[source.name]
                kind = have if np.dtype(have).itemsize == np.dtype(kind).itemsize else kind
            self.assign(instruction, target, self.use(source, kind), kind)

    def _cvt(self, instruction: Instruction) -> None:
        *modifiers, to, source = instruction.modifiers
        target, *operands = instruction.operands
        if modifiers not in ([], ["rn"]) or not {to, source} <= set(TYPES):
            raise _unknown(instruction)
        values = [self.decoded(self.use(o, TYPES[source]), source) for o in operands]
        if to in PAIRS:
            high, low = values
            text = f"to_pair(np.stack(np.broadcast_arrays({low}, {high}), 1), {to!r})"
        elif "f" in to:
            narrow = to in NARROW
            text = self.encoded(f"{values[0]}.astype({'f4' if narrow else TYPES[to]!r})", to)
        elif "f" not in source:
            text = f"{values[0]}.astype({TYPES[to]!r})"
        else:
            raise _unknown(instruction)
        self.assign(instruction, target, text, TYPES[to])

    def _createpolicy(self, instruction: Instruction) -> None:
        self.assign(instruction, instruction.operands[0], "np.zeros(1, 'u8')", "u8")

    def _ld(self, instruction: Instruction) -> None:
        targets, address, *_ = instruction.operands
        if "param" in instruction.modifiers:
            if not isinstance(address, Address) or not isinstance(address.base, str):
                raise _unknown(instruction)
            kind = TYPES[instruction.modifiers[-1]]
            text = f"s.parameter({address.base!r}, {address.offset}, {kind!r})"
            return self.assign(instruction, targets, text, kind)
        access, where = self.access(instruction, address)
        flags = self.predicate(instruction)
        self.lines.append(f" loaded = s.load({access}, {where}, {flags})")
        for k, target in enumerate(targets if isinstance(targets, list) else [targets]):
            self.assign(instruction, target, f"loaded[{k}]", self.scope[access].element)

    def _st(self, instruction: Instruction) -> None:
        address, sources, *_ = instruction.operands
        access, where = self.access(instruction, address)
        kind = self.scope[access].element
        values = [self.use(x, kind) for x in (sources if isinstance(sources, list) else [sources])]
        flags = self.predicate(instruction)
        self.lines.append(f" s.store({access}, {where}, {flags}, [{', '.join(values)}])")

    def _stmatrix(self, instruction: Instruction) -> None:
        address, sources = instruction.operands
        access, rows = self.matrices(instruction, address, sources)
        for k, source in enumerate(sources):
            value = self.use(source, "u4")
            self.lines.append(f" s.store({access}, {rows}[{k}], None, [{value}])")

    def _ldmatrix(self, instruction: Instruction) -> None:
        targets, address = instruction.operands
        access, rows = self.matrices(instruction, address, targets)
        for k, target in enumerate(targets):
            self.assign(instruction, target, f"s.load({access}, {rows}[{k}], None)[0]", "u4")

    def matrices(self, instruction: Instruction, address, registers) -> tuple[str, str]:
        """Names of the access and of the addresses of each matrix's part in a register."""
        opcode = f"sync.aligned.m8n8.x{len(registers)}.shared.b16"
        if instruction.predicate or ".".join(instruction.modifiers) != opcode:
            raise _unknown(instruction)
        access, where = self.access(instruction, address)
        self.lines.append(f" rows = s.matrix_rows({access}, {where}, {len(registers)})")
        return access, "rows"

    def access(self, instruction: Instruction, address: Operand) -> tuple[str, str]:
        """Names of the access and its addresses."""
        space = next((m for m in instruction.modifiers if m in SPACES), None)
        vector = [int(m[1:]) for m in instruction.modifiers if m in ("v2", "v4", "v8")]
        *others, kind = instruction.modifiers
        if instruction.name in ("stmatrix", "ldmatrix"):
            others, kind, vector = [], "b32", []  # one part of a matrix at a time
        if (
            space is None or kind not in TYPES or not isinstance(address, Address)
            or set(others) - HINTS - {space, "v2", "v4", "v8"}
        ):  # fmt: skip
            raise _unknown(instruction)
        count = vector[0] if vector else 1
        element = f"u{np.dtype(TYPES[kind]).itemsize}"
        name = f"access_{len(self.scope)}"
        width = count * int(element[1])
        self.scope[name] = MemoryAccess(instruction, space, width, count, element)
        where = self.use(address.base, "i8" if space == "global" else "u4")
        where += ".astype('i8')" if space == "shared" else ""
        return name, f"{where} + {address.offset}" if address.offset else where


def _unknown(instruction: Instruction) -> PtxError:
    return PtxError(f"unknown instruction: {instruction}")

"""PTX text into basic blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """What a kernel did that it must not, and where in its PTX and its source."""


TERMINATORS = {"bra": "branch", "ret": "exit", "exit": "exit", "bar": "barrier"}
WIDTHS = {"pred": "?", "b16": "u2", "b32": "u4", "b64": "u8", "f32": "u4", "f64": "u8"}


@dataclass(frozen=True)
class Register:
    name: str  # r12; of a special register tid.x


@dataclass(frozen=True)
class Immediate:
    bits: int  # of a float its bit pattern


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


Operand = Register | Immediate | Address | str | list  # str: a symbol


@dataclass(frozen=True)
class Instruction:
    text: str
    where: str  # file and line of the source
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    def __str__(self) -> str:
        return f"`{self.text}` ({self.where})"


@dataclass
class Block:
    """Runs from its first to its last instruction; a branch, exit or barrier can only be the last.

    kind: "branch", "exit", "barrier", or "fall" into ``following``. target: where a branch goes.
    """

    instructions: list[Instruction] = field(default_factory=list)
    kind: str = "fall"
    target: int = -1


@dataclass
class Program:
    name: str
    threads: int
    parameters: dict[str, str]  # name -> PTX type, in order
    registers: dict[str, str]  # prefix -> NumPy type
    blocks: list[Block]


def parse(ptx: str) -> Program:
    """The one kernel of a PTX text."""
    kernel = re.search(r"\.entry (\w+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}\n", ptx, re.S)
    if kernel is None:
        raise PtxError("no kernel in this PTX")
    name, parameters, directives, body = kernel.groups()
    files = dict(re.findall(r'\.file\s+(\d+) "(?:[^"]*/)?([^"/]+)"', ptx))
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", body))
    registers: dict[str, str] = {}
    labels: dict[str, int] = {}
    blocks = [Block()]
    where = "?"
    for line in body.split("\n"):
        for statement in filter(None, map(str.strip, line.split("//")[0].split(";"))):
            if label := re.fullmatch(r"(\$\w+):", statement):
                if label[1] in targets:
                    if blocks[-1].instructions:
                        blocks.append(Block())
                    labels[label[1]] = len(blocks) - 1
            elif location := re.match(r"\.loc\s+(\d+) (\d+)", statement):
                where = f"{files.get(location[1], '?')}:{location[2]}"
            elif declared := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)<\d+>", statement):
                registers[declared[2]] = WIDTHS[declared[1]]
            # What is declared for local memory is often not used; if it is, that is unknown.
            elif not re.match(r"\.(pragma|loc)|\.reg \.b\d+\s+%SP", statement):
                instruction = _instruction(statement, where)
                blocks[-1].instructions.append(instruction)
                if instruction.name in TERMINATORS:
                    blocks[-1].kind = TERMINATORS[instruction.name]
                    blocks.append(Block())
    for block in blocks:
        if block.kind == "branch":
            block.target = labels[str(block.instructions[-1].operands[0])]
    return Program(
        name,
        int(re.findall(r"\.reqntid (\d+)", directives)[0]),
        {p: kind for kind, p in re.findall(r"\.param \.(\w+) .*?(\w+_param_\d+)", parameters)},
        registers,
        blocks,
    )


def _instruction(text: str, where: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
    if match is None:
        raise PtxError(f"unknown instruction: `{text}` ({where})")
    negated, predicate, opcode, operands = match.groups()
    name, *modifiers = opcode.split(".")
    # A vector in braces and an address in brackets are one operand each, whatever is inside.
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+", operands)
    return Instruction(
        re.sub(r"\s+", " ", text), where, name, tuple(modifiers), tuple(map(_operand, parts)),
        predicate, bool(negated),
    )  # fmt: skip


def _operand(text: str) -> Operand:
    if text[0] == "{" or "|" in text:
        return [_operand(part) for part in re.split(r"[\s,|]+", text.strip("{} "))]
    if text[0] == "[":
        base, _, offset = re.sub(r"\s", "", text.strip("[]")).partition("+")
        return Address(_operand(base), int(offset or "0", 0))
    if text[0] == "%":
        return Register(text[1:])
    if literal := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", text):
        return Immediate(int(literal[1], 16))
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return text

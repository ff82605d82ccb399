"""What the machine code of kernels says: registers, spills, widths, what must not be there."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import triton

READ = ("ptx", "cubin", "amdgcn")  # of what Triton keeps of a kernel


def read_machine_code(asms: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each ``asm`` of a kernel that Triton compiled, for whatever targets, as plain data."""
    opcodes = _disassembled([asm for asm in asms if "cubin" in asm])
    return [
        _read_cuda(asm, next(opcodes)) if "cubin" in asm else _read_hip(asm["amdgcn"])
        for asm in asms
    ]


def _read_cuda(asm: Any, opcodes: list[str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    resources = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "spill_bytes": resources["STACK"] + resources.get("LOCAL", 0),
        "local_memory": sorted({op for op in opcodes if re.match(r"LDL|STL", op)}),
        "instructions": len(opcodes),
        "loads": _widths(op for op in opcodes if op.startswith(("LDG", "LD."))),
        "stores": _widths(op for op in opcodes if op.startswith(("STG", "ST."))),
        "atomics": sorted({op for op in opcodes if re.match(r"(ATOM\w*|RED[GS]?)(\.|$)", op)}),
        "fp64": sorted(
            {op for op in opcodes if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\bF64\b", op)}
            | set(re.findall(r"\b[\w.]+\.f64\b[\w.]*", asm["ptx"]))
        ),
    }


def _disassembled(asms: Sequence[Any]):
    """The opcodes of each kernel. The disassembler takes a third of a second to start, and a
    thirtieth for a kernel, so it gets all instructions for one architecture in one file."""
    archs = [re.search(r"^\.target sm_(\w+)", asm["ptx"], re.M)[1] for asm in asms]  # type: ignore
    texts = [_text(asm["cubin"]) for asm in asms]
    found: list[list[str]] = [[] for _ in asms]
    for arch in dict.fromkeys(archs):
        kernels = [i for i, other in enumerate(archs) if other == arch]
        ends = []
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            for i in kernels:
                file.write(texts[i])
                ends.append(file.tell())
            file.flush()
            code = _run(triton.knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}", file.name)
        position = 0
        for address, opcode in re.findall(
            r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.M
        ):
            while int(address, 16) >= ends[position]:
                position += 1
            found[kernels[position]].append(opcode)
    return iter(found)


def _text(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    names = headers[of_names][4]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", names + name)
    )
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _widths(opcodes: Iterable[str]) -> dict[str, int]:
    """Global memory instructions by bits per thread, from opcodes such as LDG.E.U8 or STG.E.128."""
    widths: Counter[str] = Counter()
    for op in opcodes:
        parts = op.split(".")
        sizes = [part.lstrip("US") for part in parts if part.lstrip("US").isdigit()]
        widths[sizes[0] if sizes else "32"] += 1
    return dict(widths)


_HIP_BITS = {
    "ubyte": "8", "sbyte": "8", "byte": "8", "ushort": "16", "sshort": "16", "short": "16",
    "dword": "32", "dwordx2": "64", "dwordx3": "96", "dwordx4": "128",
}  # fmt: skip


def _read_hip(text: str) -> dict[str, Any]:
    opcodes = re.findall(r"^\t([a-z][a-z0-9_]+)", text, re.M)

    def bits(kind: str) -> dict[str, int]:
        pattern = rf"(?:global|buffer|flat)_{kind}_([a-z0-9]+)"
        found = (re.match(pattern, op) for op in opcodes)
        return dict(Counter(_HIP_BITS[match[1]] for match in found if match))

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    return {
        "registers": metadata("vgpr_count"),
        # Scalar registers spill into lanes of a vector register, not into memory: counted apart.
        "spill_bytes": metadata("private_segment_fixed_size") + 4 * metadata("vgpr_spill_count"),
        "scalar_spills": metadata("sgpr_spill_count"),
        "local_memory": sorted({op for op in opcodes if op.startswith("scratch_")}),
        "instructions": len(opcodes),
        "loads": bits("load"),
        "stores": bits("store"),
        "atomics": sorted({op for op in opcodes if "atomic" in op or re.match(r"ds_\w*add", op)}),
        "fp64": sorted({op for op in opcodes if op.startswith("v_") and "f64" in op}),
    }

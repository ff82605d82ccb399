"""What instructions compute: a table, and the functions that its expressions use.

A line of TABLE is: opcodes without types and .ftz | types of the operands > type of the result |
NumPy expression. T is the instruction's type, W the integer twice as wide, S the second type of an
opcode that ends in two, anything else a NumPy type. Operands are arrays of n threads, or of one
element where all threads have the same value. A new instruction is a line.
"""

from __future__ import annotations

import numpy as np

TABLE = """
add add.rn add.x        | TT>T    | {0} + {1}
sub sub.rn sub.x        | TT>T    | {0} - {1}
mul mul.rn mul.lo       | TT>T    | {0} * {1}
mul.wide                | TT>W    | {0}.astype({W}) * {1}.astype({W})
mad.lo                  | TTT>T   | {0} * {1} + {2}
mad.wide                | TTW>W   | {0}.astype({W}) * {1}.astype({W}) + {2}
fma.rn                  | TTT>T   | fma({0}, {1}, {2})
div                     | TT>T    | int_div({0}, {1})
rem                     | TT>T    | {0} - int_div({0}, {1}) * {1}
div.rn                  | TT>T    | {0} / {1}
div.full div.approx     | TT>T    | approximate(wide({0}) / wide({1}), ulps=2)
rcp.approx              | T>T     | approximate(1 / wide({0}), ulps=1)
sqrt.approx             | T>T     | approximate(np.sqrt(wide({0})), relative=2.0**-23)
ex2.approx              | T>T     | approximate(np.exp2(wide({0})), ulps=2, sure={0} == 0)
lg2.approx              | T>T     | lg2({0})
tanh.approx             | T>T     | approximate(np.tanh(wide({0})), relative=2.0**-11)
abs                     | T>T     | np.abs({0})
neg                     | T>T     | -{0}
min                     | TT>T    | minimum({0}, {1})
max                     | TT>T    | maximum({0}, {1})
min3                    | TTT>T   | minimum(minimum({0}, {1}), {2})
max3                    | TTT>T   | maximum(maximum({0}, {1}), {2})
min.NaN                 | TT>T    | np.minimum({0}, {1})
max.NaN                 | TT>T    | np.maximum({0}, {1})
min.NaN.xorsign.abs     | TT>T    | xorsign_minimum({0}, {1})
and                     | TT>T    | {0} & {1}
or                      | TT>T    | {0} | {1}
xor                     | TT>T    | {0} ^ {1}
not                     | T>T     | ~{0}
shl                     | T,u4>T  | shift({0}, {1}, np.left_shift)
shr                     | T,u4>T  | shift({0}, {1}, np.right_shift)
selp                    | TT?>T   | np.where({2}, {0}, {1})
prmt                    | TTT>T   | prmt({0}, {1}, {2})
bfe                     | T,u4,u4>T | bfe({0}, {1}, {2})
popc                    | T>u4    | np.bitwise_count({0}).astype("u4")
shfl.sync.bfly          | u4,u4,u4,u4>u4 | shuffle(s, {0}, {1}, {2}, {3})
redux.sync.add          | T,u4>T  | reduce_warp(s, {0}, {1}, np.add)
redux.sync.max          | T,u4>T  | reduce_warp(s, {0}, {1}, np.fmax)
redux.sync.max.NaN      | T,u4>T  | reduce_warp(s, {0}, {1}, np.maximum)
"""

# Comparisons of setp. The second row: true also where an operand is NaN.
COMPARE = {
    "eq": "{0} == {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}", "lo": "{0} < {1}", "ls": "{0} <= {1}", "hi": "{0} > {1}",
    "hs": "{0} >= {1}", "ne": "({0} < {1}) | ({0} > {1})",
    "neu": "{0} != {1}", "equ": "~(({0} < {1}) | ({0} > {1}))", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip

# Approximate instructions: "exact" rounds correctly; "plus" and "minus" are off by as much as the
# PTX ISA allows, always up or always down; "random" by anything between, a function of the value.
MODES = ("exact", "plus", "minus", "random")
mode = "exact"


def set_mode(name: str) -> None:
    global mode
    if name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {name!r}")
    mode = name


def wide(a):
    return a.astype("f8")


def approximate(exact, ulps=0, relative=0.0, absolute=0.0, sure=None):
    """The float64 ``exact`` as float32, with the error of the mode. What is ``sure`` (a result of
    0, if not given) has none, nor have infinities and NaN."""
    rounded = exact.astype("f4")
    if mode == "exact":
        return rounded
    size = np.abs(exact)
    allowed = ulps * np.spacing(np.abs(rounded)).astype("f8") + relative * size + absolute
    sign = {"plus": 1.0, "minus": -1.0}.get(mode)
    result = (exact + allowed * (_noise(exact) if sign is None else sign)).astype("f4")
    beyond = np.abs(result - exact) > allowed  # by the rounding to float32
    result = np.where(beyond, np.nextafter(result, rounded), result)
    kept = ~np.isfinite(result) | ~np.isfinite(rounded)
    return np.where(kept | ((exact == 0) if sure is None else sure), rounded, result)


def _noise(values):
    """In [-1, 1], by hashing the bits: the same for the same values."""
    bits = values.view("u8") * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
    return (bits >> np.uint64(40)).astype("f8") * 2.0**-23 - 1.0


def lg2(a):
    """Error 2^-22: absolute where 0.5 < a < 2, else relative."""
    near = np.where((a > 0.5) & (a < 2), 2.0**-22, 0.0)
    return approximate(np.log2(wide(a)), relative=2.0**-22 - near, absolute=near, sure=False)


def fma(a, b, c):
    """a * b + c rounded once."""
    if a.dtype == np.float64:
        raise NotImplementedError("fma.f64")
    product = a.astype("f8") * b.astype("f8")  # exact
    c = c.astype("f8")
    total = product + c
    result = total.astype("f4")
    # Rounding twice errs only where float64 lies halfway between two float32.
    half = (total.view("i8") & 0x1FFFFFFF) == 0x10000000
    half |= (np.abs(result) < 2.0**-125) & (total != 0)
    if half.any():
        back = total - product
        error = (product - (total - back)) + (c - back)
        half &= (error != 0) & np.isfinite(error)
        # To odd instead: never halfway, and on the right side of it.
        odd = (total.view("i8") - ((error > 0) != (total > 0))) | 1
        result = np.where(half, odd.view("f8").astype("f4"), result)
    return result


def flush(a):
    """Subnormal numbers as zeros (.ftz)."""
    return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


def from_bf16(bits):
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def to_bf16(a):
    bits = a.view("u4")
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    return np.where(a == a, rounded.astype("u2"), np.uint16(0x7FFF))


def from_pair(a, kind):
    """(n,) registers of two values as (n, 2) float32."""
    a = np.ascontiguousarray(a)
    if kind == "f32x2":
        return a.view("f4").reshape(-1, 2)
    return decode(a.view("u2"), kind.removesuffix("x2")).reshape(-1, 2)


def to_pair(a, kind):
    a = np.ascontiguousarray(a)
    if kind == "f32x2":
        return a.view("u8")[:, 0]
    return np.ascontiguousarray(encode(a, kind.removesuffix("x2"))).view("u4")[:, 0]


def decode(bits, kind):
    return from_bf16(bits) if kind == "bf16" else bits.view("f2").astype("f4")


def encode(a, kind):
    return to_bf16(a) if kind == "bf16" else a.astype("f2").view("u2")


def minimum(a, b):
    if a.dtype.kind != "f":
        return np.minimum(a, b)
    # NaN gives way, -0 < +0: where a == b the bits are those of a, or they are two zeros.
    bits = f"u{a.dtype.itemsize}"
    return np.where(a == b, (a.view(bits) | b.view(bits)).view(a.dtype), np.fmin(a, b))


def maximum(a, b):
    if a.dtype.kind != "f":
        return np.maximum(a, b)
    bits = f"u{a.dtype.itemsize}"
    return np.where(a == b, (a.view(bits) & b.view(bits)).view(a.dtype), np.fmax(a, b))


def xorsign_minimum(a, b):
    """Of the absolute values; negative where one of the two is."""
    size = np.minimum(np.abs(a), np.abs(b))
    return np.where(np.signbit(a) ^ np.signbit(b), -size, size)


def int_div(a, b):
    """Towards zero; by zero: whatever."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient += (quotient * b != a) & ((a < 0) != (b < 0))
    return quotient


def shift(a, by, operation):
    bits = 8 * a.dtype.itemsize
    if by.size == 1 and by[0] < bits:
        return operation(a, a.dtype.type(by[0]))
    shifted = operation(a, np.minimum(by, bits - 1).astype(a.dtype))
    if a.dtype.kind == "i" and operation is np.right_shift:
        return shifted
    return np.where(by < bits, shifted, a.dtype.type(0))


def prmt(a, b, selector):
    """Byte k of the result is byte (selector >> 4 k) & 7 of b:a; bit 3 spreads its sign."""
    both = a.astype("u8") | b.astype("u8") << np.uint64(32)
    result = np.zeros(1, "u4")
    for k in range(4):
        pick = selector >> np.uint32(4 * k)
        byte = (both >> ((pick & np.uint32(7)) * np.uint32(8)).astype("u8")).astype("u1")
        sign = (byte.view("i1") >> 7).view("u1")
        byte = np.where(pick & np.uint32(8), sign, byte)
        result = result | byte.astype("u4") << np.uint32(8 * k)
    return result


def bfe(a, start, length):
    """Bits ``start`` to ``start + length``, of a signed ``a`` with the sign of their last."""
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "u":
        kept = np.where(
            length < bits, (np.uint64(1) << length.astype("u8")) - np.uint64(1), 2**64 - 1
        )
        return shift(a, start, np.right_shift) & kept.astype(a.dtype)
    left = np.maximum(bits - start.astype("i8") - length, 0)
    field = shift(shift(a, left, np.left_shift), left + start, np.right_shift)
    return np.where(length == 0, a.dtype.type(0), field)


# Instructions of whole warps. ``s`` knows which threads run, and that their warps are whole.


def shuffle(s, a, by, limits, members):
    """Of the thread whose number differs by ``by``, in its binary digits."""
    s.check_members(members, limits == 31)
    return s.by_warp(a)[:, np.arange(32) ^ int(by[0])].reshape(-1)


def reduce_warp(s, a, members, operation):
    s.check_members(members)
    return operation.reduce(s.by_warp(a), axis=1, dtype=a.dtype).repeat(32)

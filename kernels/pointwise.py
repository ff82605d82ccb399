"""Functions that Triton's language lacks, to the rounding of float32, for token losses made from
formulas. In plain operations, as libdevice is not there in the interpreter."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x). Where x is small, the rounding of 1 + x is divided out again (HP-15C manual)."""
    rounded = 1.0 + x
    near = tl.log(rounded) * (x / (rounded - 1.0))
    return tl.where(rounded == 1.0, x, tl.where(tl.abs(x) < 1.0, near, tl.log(rounded)))


@triton.jit
def expm1(x):
    """exp(x) - 1. Where x is small, the rounding of exp(x) is divided out again."""
    exp = tl.exp(x)
    near = (exp - 1.0) * (x / tl.log(exp))
    return tl.where(exp == 1.0, x, tl.where(tl.abs(x) < 1.0, near, exp - 1.0))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|), which does not overflow, and the sign of x."""
    minus = expm1(-2.0 * tl.abs(x))
    magnitude = -minus / (2.0 + minus)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def pow(x, y):
    """x ** y, within 1.2e-7 (2 + |y log x|) of itself. A number where x < 0 if y is whole."""
    magnitude = tl.exp(y * tl.log(tl.abs(x)))
    odd = tl.floor(0.5 * y) != 0.5 * y
    signed = tl.where(odd, -magnitude, magnitude)
    of_negative = tl.where(tl.floor(y) == y, signed, float("nan"))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, of_negative, magnitude))

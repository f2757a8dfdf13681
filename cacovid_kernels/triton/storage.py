"""Values inside kernels: what tuples of numbers and pointers hold, and floats as the bits they are stored in.

Floats are loaded and stored as integers, so that rounding is the same everywhere: to nearest even, every NaN of 16
bits the quiet one, as in `csrc/include/cacovid/round.h`.
"""

import torch
import triton
import triton.language as tl

BF16, FP16, FP32, FP64 = (tl.constexpr(kind) for kind in range(4))  # a tuple of names does not compile in Triton 3.6
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_OPEN = tl.constexpr((1 << 62) - 1)


@triton.jit
def number(sealed):
    """int64, what `words.seal` made of it."""
    return (sealed & _OPEN) >> 1


@triton.jit
def number32(sealed):
    """A number below 2^31 as int32: 64-bit division is slow."""
    return number(sealed).to(tl.int32)


@triton.jit
def as_words(pointer, ITEM: tl.constexpr):
    """The pointer, as one to integers of ITEM bytes."""
    WORD: tl.constexpr = tl.int8 if ITEM == 1 else tl.int16 if ITEM == 2 else tl.int32 if ITEM == 4 else tl.int64
    return pointer.to(tl.pointer_type(WORD))


@triton.jit
def pick(pointers, i, ITEM: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Entry i of a tuple, `as_words`; chosen in groups of 8, so that no long chain of choices waits for itself."""
    at = pointers[0].to(tl.int64)
    for first in tl.static_range(0, len(pointers), 8):
        group = pointers[first].to(tl.int64)
        for j in tl.static_range(1, 8):
            if first + j < len(pointers):
                group = tl.where(i == first + j, pointers[first + j].to(tl.int64), group)
        at = tl.where(i >= first, group, at)
    WORD: tl.constexpr = tl.int8 if ITEM == 1 else tl.int16 if ITEM == 2 else tl.int32 if ITEM == 4 else tl.int64
    return tl.multiple_of(at.to(tl.pointer_type(WORD)), ALIGNMENT)


@triton.jit
def widen(bits, KIND: tl.constexpr):
    """float32 (float64 of FP64) of the integers that hold values of a kind."""
    if KIND == BF16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == FP16:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == FP32:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float64, bitcast=True)


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """The integers that hold float32 (float64) values as KIND, rounded to nearest even."""
    if KIND == BF16:
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.int16, bitcast=True)
    elif KIND == FP16:
        return tl.where(x == x, x.to(tl.float16).to(tl.int16, bitcast=True), 0x7E00)
    elif KIND == FP32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int64, bitcast=True)

"""What the stand-alone kernels for mma.sync share.

The INT8 kernels round weights against each tile's own maximum and merge the tile's integer sums in float32
(after SageAttention's kernels in comfy-kitchen). A whole number n below 2^22 rides in the bits of the float32
1.5 * 2^23 + n, so that an integer sum is a float without a conversion instruction.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
LOG2_127 = tl.constexpr(6.9886846867721655)
LOG2_255 = tl.constexpr(7.994353436858858)


@triton.jit
def place(TM: tl.constexpr, WARPS: tl.constexpr):
    """Row of every place, so that a warp holds neighbouring rows."""
    x = tl.arange(0, TM)
    RUN: tl.constexpr = TM // WARPS
    # place 16 * WARPS * r + 16 * w + i is row RUN * w + 16 * r + i
    return (x // 16 % WARPS) * RUN + x // (16 * WARPS) * 16 + x % 16


@triton.jit
def block_sums(p, TM: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] sums of [TM, N] over blocks of rows; rows in the order of `place`."""
    RUN: tl.constexpr = TM // WARPS
    x = tl.reshape(p, [RUN // 16, ROWS, WARPS // ROWS, 16, N])
    x = tl.permute(x, [1, 0, 2, 3, 4])
    return tl.sum(tl.reshape(x, [ROWS, RUN * (WARPS // ROWS) * N]), 1)


@triton.jit
def lanes(p, M: tl.constexpr, N: tl.constexpr):
    return tl.sum(tl.reshape(p, [M, N // 8, 8]), 1)


@triton.jit
def operand_order(b_p, M: tl.constexpr, N: tl.constexpr):
    """Columns in the order in which the registers of a product hold them as its operand."""
    b = tl.reshape(b_p, [M, N // 16, 2, 4, 2])
    b = tl.permute(b, [0, 1, 3, 2, 4])
    return tl.reshape(b, [M, N])


SIGNED = tl.constexpr("""{
.reg .s32 a, b, c, d; .reg .b32 t;
cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
cvt.pack.sat.s8.s32.b32 t, d, c, 0;
cvt.pack.sat.s8.s32.b32 $0, b, a, t;
}""")
UNSIGNED = tl.constexpr("""{
.reg .s32 a, b, c, d; .reg .b32 t;
cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
cvt.pack.sat.u8.s32.b32 t, d, c, 0;
cvt.pack.sat.u8.s32.b32 t, b, a, t;
xor.b32 $0, t, 0x80808080;
}""")


@triton.jit
def weights8(p, M: tl.constexpr, N: tl.constexpr, CS: tl.constexpr, PK: tl.constexpr):
    """Weights as an operand in eight bits: 0 to 127, or 0 to 255 less 128."""
    if PK:
        if PK == 2:
            x = tl.permute(tl.reshape(p, [M, N // 16, 2, 4, 2]), [0, 1, 3, 4, 2])
            x0, x1 = tl.split(x)
            p = tl.reshape(tl.join(x0, x1), [M, N])
        else:
            p = operand_order(p, M, N)
        if CS:
            p8 = tl.inline_asm_elementwise(
                UNSIGNED, "=r,r,r,r,r", [p], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            p8 = tl.inline_asm_elementwise(
                SIGNED, "=r,r,r,r,r", [p], dtype=tl.int8, is_pure=True, pack=4
            )
    else:
        ROUND: tl.constexpr = MAGIC - 128.0 if CS else MAGIC
        p8 = operand_order((p + ROUND).to(tl.int32, bitcast=True).to(tl.int8), M, N)
    return p8


@triton.jit
def dot8(a, b, M: tl.constexpr, N: tl.constexpr):
    return tl.dot(a, b, tl.full([M, N], MAGIC_BITS, tl.int32), out_dtype=tl.int32).to(
        tl.float32, bitcast=True
    )


TYPES = dict(
    O="*bf16",
    LSE="*fp32",
    PREV="*fp32",
    M="*fp32",
    QS="*fp32",
    KS="*fp32",
    VS="*fp32",
    CSUM="*i32",
    IDX="*i32",
    CNT="*i32",
    scale="fp32",
    L="i32",
    NK="i32",
    MAXK="i32",
)


def signature(fn, kind):
    return {n: TYPES.get(n, "*" + kind) for n in fn.arg_names if n in TYPES or n in "QKV"}

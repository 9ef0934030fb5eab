"""Stand-alone attention kernels for mma.sync, with every choice that was tried as a switch.

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
def _scores(bq, p, scale, M: tl.constexpr, N: tl.constexpr):
    return tl.dot(bq, tl.trans(tl.load(p)))


@triton.jit(do_not_specialize=["L", "NK", "MAXK"])
def bf16(
    Q,
    K,
    V,
    O,
    LSE,
    PREV,
    M,
    IDX,
    CNT,
    scale,
    L,
    NK,
    MAXK,
    TM: tl.constexpr,
    TN: tl.constexpr,
    D: tl.constexpr,
    LISTED: tl.constexpr,
    VD: tl.constexpr,
    SUM: tl.constexpr,
    PAIR: tl.constexpr,
    PARTS: tl.constexpr,
    SKEW: tl.constexpr,
    MASS: tl.constexpr,
    WARPS: tl.constexpr,
    HALF: tl.constexpr = 1,
):
    qb = tl.program_id(0)
    h = tl.program_id(1)
    nq = tl.num_programs(0)
    T: tl.constexpr = TN // 2 if PAIR else TN
    ROWS: tl.constexpr = TM // 64
    if MASS:
        rm = qb * TM + place(TM, WARPS)
    else:
        rm = qb * TM + tl.arange(0, TM)
    rd = tl.arange(0, D)
    rn = tl.arange(0, T)
    base = h.to(tl.int64) * L
    cv = tl.arange(0, D // VD)
    bq = tl.load(Q + (base + rm)[:, None] * D + rd[None, :])
    m = tl.full([TM], -float("inf"), tl.float32)
    if SUM == 0:
        l = tl.zeros([TM], tl.float32)
    else:
        l = tl.zeros([TM, 8], tl.float32)
    if MASS:
        prev = tl.load(PREV + base + rm)
        pm = M + (h.to(tl.int64) * (L // 64) + qb * ROWS + tl.arange(0, ROWS)) * NK
    acc = tl.zeros([TM, D // VD], tl.float32)
    acc1 = tl.zeros([TM, D // VD], tl.float32)
    row = (h * (nq // HALF) + qb // HALF).to(tl.int64)
    n = NK
    nt = 0
    if LISTED:
        n = tl.load(CNT + row) * PARTS
        nt = tl.load(IDX + row * MAXK, mask=n > 0, other=0) * PARTS
    sn = tl.zeros([TM, TN], tl.float32)
    if SKEW:
        sn = tl.dot(bq, tl.trans(tl.load(K + (base + nt * TN + rn)[:, None] * D + rd[None, :])))
    for i in tl.range(0, n):
        t = i
        if LISTED:
            t = nt
            nt = (
                tl.load(IDX + row * MAXK + (i + 1) // PARTS, mask=i + 1 < n, other=0) * PARTS
                + (i + 1) % PARTS
            )
        else:
            nt = tl.minimum(i + 1, n - 1)
        pk = K + (base + t * TN + rn)[:, None] * D
        pv = V + (base + t * TN + rn)[:, None] * D
        if SKEW:
            s0 = sn
            sn = tl.dot(bq, tl.trans(tl.load(K + (base + nt * TN + rn)[:, None] * D + rd[None, :])))
        else:
            s0 = tl.dot(bq, tl.trans(tl.load(pk + rd[None, :])))
        if PAIR:
            s1 = tl.dot(bq, tl.trans(tl.load(pk + T * D + rd[None, :])))
            mn = tl.maximum(m, tl.max(tl.maximum(s0, s1), 1) * scale)
        else:
            mn = tl.maximum(m, tl.max(s0, 1) * scale)
        al = tl.exp2(m - mn)
        p0 = tl.exp2(tl.fma(s0, scale, -mn[:, None]))
        p = p0
        if PAIR:
            p1 = tl.exp2(tl.fma(s1, scale, -mn[:, None]))
            p = p0 + p1
        if SUM == 0:
            x = tl.sum(p, 1)
            l = l * al + x
        elif SUM == 1:
            x = lanes(p, TM, T)
            l = l * al[:, None] + x
        if MASS:
            share = tl.exp2(tl.minimum(mn - prev, 16.0))
            if SUM == 0:
                tl.store(pm + t, block_sums((x * share)[:, None], TM, 1, WARPS, ROWS))
            else:
                tl.store(pm + t, block_sums(x * share[:, None], TM, 8, WARPS, ROWS))
        p0 = p0.to(Q.dtype.element_ty)
        if SUM == 2:
            l = tl.dot(p0, tl.full([T, 8], 1, Q.dtype.element_ty), l * al[:, None])
        acc = tl.dot(p0, tl.load(pv + cv[None, :]), acc * al[:, None])
        if PAIR:
            p1 = p1.to(Q.dtype.element_ty)
            if SUM == 2:
                l = tl.dot(p1, tl.full([T, 8], 1, Q.dtype.element_ty), l)
            acc = tl.dot(p1, tl.load(pv + T * D + cv[None, :]), acc)
        if VD == 2:
            acc1 = tl.dot(p0, tl.load(pv + cv[None, :] + D // 2), acc1 * al[:, None])
            if PAIR:
                acc1 = tl.dot(p1, tl.load(pv + T * D + cv[None, :] + D // 2), acc1)
        m = mn
    if SUM == 1:
        l = tl.sum(l, 1)
    if SUM == 2:
        l = tl.max(l, 1)
    tl.store(LSE + base + rm, m + tl.log2(l))
    tl.store(O + (base + rm)[:, None] * D + cv[None, :], (acc / l[:, None]).to(O.dtype.element_ty))
    if VD == 2:
        tl.store(
            O + (base + rm)[:, None] * D + cv[None, :] + D // 2,
            (acc1 / l[:, None]).to(O.dtype.element_ty),
        )


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


@triton.jit
def _add(acc, p8, pv, pc, be, al, TM: tl.constexpr, DS: tl.constexpr, CS: tl.constexpr):
    if CS:
        cs = tl.load(pc)
        o = tl.dot(
            p8, tl.trans(tl.load(pv)), tl.broadcast_to(cs[None, :], [TM, DS]), out_dtype=tl.int32
        ).to(tl.float32, bitcast=True)
    else:
        o = dot8(p8, tl.trans(tl.load(pv)), TM, DS)
    return tl.fma(o, be[:, None], tl.fma(acc, al[:, None], (be * -MAGIC)[:, None]))


@triton.jit(do_not_specialize=["L", "NK", "MAXK"])
def int8(
    Q,
    K,
    V,
    O,
    LSE,
    PREV,
    M,
    QS,
    KS,
    VS,
    CSUM,
    IDX,
    CNT,
    L,
    NK,
    MAXK,
    TM: tl.constexpr,
    TN: tl.constexpr,
    D: tl.constexpr,
    LISTED: tl.constexpr,
    VD: tl.constexpr,
    SUM: tl.constexpr,
    VT: tl.constexpr,
    CS: tl.constexpr,
    PK: tl.constexpr,
    FORCE: tl.constexpr,
    SKEW: tl.constexpr,
    MASS: tl.constexpr,
    WARPS: tl.constexpr,
    HALF: tl.constexpr = 1,
):
    qb = tl.program_id(0)
    h = tl.program_id(1)
    nq = tl.num_programs(0)
    ROWS: tl.constexpr = TM // 64
    if MASS:
        rm = qb * TM + place(TM, WARPS)
    else:
        rm = qb * TM + tl.arange(0, TM)
    rd = tl.arange(0, D)
    rn = tl.arange(0, TN)
    DS: tl.constexpr = D // VD
    cv = tl.arange(0, DS)
    base = h.to(tl.int64) * L
    bq = tl.load(Q + (base + rm)[:, None] * D + rd[None, :])
    sq = tl.load(QS + base + rm)
    if FORCE:
        # in the layout of the scores from the start
        sq = tl.max(
            tl.dot(bq, tl.zeros([D, 8], tl.int8), out_dtype=tl.int32).to(tl.float32) + sq[:, None],
            1,
        )
    m = tl.full([TM], -float("inf"), tl.float32)
    if SUM == 0:
        l = tl.zeros([TM], tl.float32)
    else:
        l = tl.zeros([TM, 8], tl.float32)
    if MASS:
        prev = tl.load(PREV + base + rm)
        pm = M + (h.to(tl.int64) * (L // 64) + qb * ROWS + tl.arange(0, ROWS)) * NK
    acc = tl.zeros([TM, DS], tl.float32)
    acc1 = tl.zeros([TM, DS], tl.float32)
    row = (h * (nq // HALF) + qb // HALF).to(tl.int64)
    n = NK
    nt = 0
    TOP: tl.constexpr = LOG2_255 if CS else LOG2_127
    if LISTED:
        n = tl.load(CNT + row)
        nt = tl.load(IDX + row * MAXK, mask=n > 0, other=0)
    sn = tl.zeros([TM, TN], tl.float32)
    nsk = 0.0
    if SKEW:
        sn = dot8(
            bq, tl.trans(tl.load(K + (base + nt * TN + rn)[:, None] * D + rd[None, :])), TM, TN
        )
        nsk = tl.load(KS + h * NK + nt)
    for i in tl.range(0, n):
        t = i
        if LISTED:
            t = nt
            nt = tl.load(IDX + row * MAXK + i + 1, mask=i + 1 < n, other=0)
        else:
            nt = tl.minimum(i + 1, n - 1)
        if SKEW:
            s = sn
            sk = nsk
            nsk = tl.load(KS + h * NK + nt)
            sn = dot8(
                bq, tl.trans(tl.load(K + (base + nt * TN + rn)[:, None] * D + rd[None, :])), TM, TN
            )
        else:
            sk = tl.load(KS + h * NK + t)
            s = dot8(
                bq, tl.trans(tl.load(K + (base + t * TN + rn)[:, None] * D + rd[None, :])), TM, TN
            )
        c = sq * sk
        mt = (tl.max(s, 1) - MAGIC) * c
        p = tl.exp2(tl.fma(s, c[:, None], (-(mt - TOP) - c * MAGIC)[:, None]))
        mn = tl.maximum(m, mt)
        al = tl.exp2(m - mn)
        be = tl.exp2(mt - mn)
        tile = (h * NK + t).to(tl.int64)
        if SUM == 0:
            x = tl.sum(p, 1)
            l = l * al + x * be
            if MASS:
                share = tl.exp2(tl.minimum(mt - TOP - prev, 16.0))
                tl.store(pm + t, block_sums((x * share)[:, None], TM, 1, WARPS, ROWS))
        elif SUM == 1:
            x = lanes(p, TM, TN)
            l = l * al[:, None] + x * be[:, None]
            if MASS:
                share = tl.exp2(tl.minimum(mt - TOP - prev, 16.0))
                tl.store(pm + t, block_sums(x * share[:, None], TM, 8, WARPS, ROWS))
        p8 = weights8(p, TM, TN, CS, PK)
        if SUM == 3:
            x = dot8(p8, tl.full([TN, 8], 1, tl.int8), TM, 8)
            OFF: tl.constexpr = 128.0 * TN - MAGIC if CS else -MAGIC
            l = tl.fma(x, be[:, None], tl.fma(l, al[:, None], (be * OFF)[:, None]))
            if MASS:
                share = tl.exp2(tl.minimum(mt - TOP - prev, 16.0)) * 0.125
                tl.store(
                    pm + t,
                    block_sums(
                        tl.fma(x, share[:, None], (share * OFF)[:, None]), TM, 8, WARPS, ROWS
                    ),
                )
        if VT:
            be = be * tl.load(VS + tile)
        pv = V + (tile * D + cv)[:, None] * TN + rn[None, :]
        pc = CSUM + tile * D + cv
        acc = _add(acc, p8, pv, pc, be, al, TM, DS, CS)
        if VD >= 2:
            acc1 = _add(acc1, p8, pv + DS * TN, pc + DS, be, al, TM, DS, CS)
        m = mn
    if SUM == 1:
        l = tl.sum(l, 1)
    if SUM == 3:
        l = tl.max(l, 1)
    tl.store(LSE + base + rm, m - TOP + tl.log2(l))
    po = O + (base + rm)[:, None] * D + cv[None, :]
    pw = VS + (tl.num_programs(1) * NK if VT else 0) + h * D + cv
    tl.store(po, (acc / l[:, None] * tl.load(pw)[None, :]).to(O.dtype.element_ty))
    if VD >= 2:
        tl.store(po + DS, (acc1 / l[:, None] * tl.load(pw + DS)[None, :]).to(O.dtype.element_ty))


@triton.jit(do_not_specialize=["L", "NK"])
def masses(
    Q,
    K,
    QS,
    KS,
    LSE,
    M,
    scale,
    L,
    NK,
    TM: tl.constexpr,
    TN: tl.constexpr,
    D: tl.constexpr,
    INT8: tl.constexpr,
    FORCE: tl.constexpr,
    WARPS: tl.constexpr,
):
    qb = tl.program_id(0)
    h = tl.program_id(1)
    rm = qb * TM + place(TM, WARPS)
    rd = tl.arange(0, D)
    rn = tl.arange(0, TN)
    base = h.to(tl.int64) * L
    bq = tl.load(Q + (base + rm)[:, None] * D + rd[None, :])
    lse = tl.load(LSE + base + rm)
    ROWS: tl.constexpr = TM // 64
    COLS: tl.constexpr = TN // 64
    RUN: tl.constexpr = TM // WARPS
    o_row = tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS)
    if INT8:
        sq = tl.load(QS + base + rm)
        if FORCE:
            z = tl.dot(bq, tl.zeros([D, 8], tl.int8), out_dtype=tl.int32).to(tl.float32)
            sq = tl.max(z + sq[:, None], 1)
            lse = tl.max(z + lse[:, None], 1)
    pm = M + ((h.to(tl.int64) * (L // 64) + qb * ROWS) + o_row)[:, None] * NK + o_col[None, :]
    for i in tl.range(0, NK // COLS):
        pk = K + (base + i * TN + rn)[:, None] * D + rd[None, :]
        if INT8:
            c = sq * tl.load(KS + h * NK + i)
            s = dot8(bq, tl.trans(tl.load(pk)), TM, TN)
            p = tl.exp2(tl.fma(s, c[:, None], (-(c * MAGIC) - lse)[:, None]))
        else:
            s = tl.dot(bq, tl.trans(tl.load(pk)))
            p = tl.exp2(tl.fma(s, scale, -lse[:, None]))
        x = tl.reshape(p, [RUN // 16, ROWS, WARPS // ROWS, 16, COLS, 64])
        x = tl.permute(x, [1, 4, 0, 2, 3, 5])
        r = tl.sum(tl.reshape(x, [ROWS, COLS, RUN * (WARPS // ROWS) * 64]), 2)
        tl.store(pm + i * COLS, r)


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


@triton.jit
def column_sums(p, DS: tl.constexpr):
    """[DS] in natural order, of sums stored so that what a lane needs lies together."""
    x = tl.load(p + tl.arange(0, DS))
    return tl.reshape(tl.permute(tl.reshape(x, [4, DS // 8, 2]), [1, 0, 2]), [DS])


@triton.jit
def _add2(
    acc, p0, p1, pv0, pv1, pc0, pc1, be, al, TM: tl.constexpr, DS: tl.constexpr, CS: tl.constexpr
):
    if CS:
        if CS == 2:
            cs = column_sums(pc0, DS) + column_sums(pc1, DS) - MAGIC_BITS
        else:
            cs = tl.load(pc0) + tl.load(pc1) - MAGIC_BITS
        o = tl.dot(
            p0, tl.trans(tl.load(pv0)), tl.broadcast_to(cs[None, :], [TM, DS]), out_dtype=tl.int32
        )
    else:
        o = tl.dot(
            p0, tl.trans(tl.load(pv0)), tl.full([TM, DS], MAGIC_BITS, tl.int32), out_dtype=tl.int32
        )
    o = tl.dot(p1, tl.trans(tl.load(pv1)), o, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    return tl.fma(o, be[:, None], tl.fma(acc, al[:, None], (be * -MAGIC)[:, None]))


@triton.jit(do_not_specialize=["L", "NK", "MAXK"])
def int8p(
    Q,
    K,
    V,
    O,
    LSE,
    PREV,
    M,
    QS,
    KS,
    VS,
    CSUM,
    IDX,
    CNT,
    L,
    NK,
    MAXK,
    TM: tl.constexpr,
    TN: tl.constexpr,
    D: tl.constexpr,
    LISTED: tl.constexpr,
    VD: tl.constexpr,
    CS: tl.constexpr,
    PK: tl.constexpr,
    MASS: tl.constexpr,
    WARPS: tl.constexpr,
    HALF: tl.constexpr = 1,
):
    """Two tiles a turn, which share a maximum and a rescale."""
    qb = tl.program_id(0)
    h = tl.program_id(1)
    nq = tl.num_programs(0)
    ROWS: tl.constexpr = TM // 64
    if MASS:
        rm = qb * TM + place(TM, WARPS)
    else:
        rm = qb * TM + tl.arange(0, TM)
    rd = tl.arange(0, D)
    rn = tl.arange(0, TN)
    DS: tl.constexpr = D // VD
    cv = tl.arange(0, DS)
    base = h.to(tl.int64) * L
    bq = tl.load(Q + (base + rm)[:, None] * D + rd[None, :])
    sq = tl.load(QS + base + rm)
    m = tl.full([TM], -float("inf"), tl.float32)
    l = tl.zeros([TM, 8], tl.float32)
    if MASS:
        prev = tl.load(PREV + base + rm)
        pm = (
            M
            + ((h.to(tl.int64) * (L // 64) + qb * ROWS) + tl.arange(0, ROWS)[:, None]) * NK
            + tl.arange(0, 2)[None, :]
        )
    acc = tl.zeros([TM, DS], tl.float32)
    acc1 = tl.zeros([TM, DS], tl.float32)
    acc2 = tl.zeros([TM, DS], tl.float32)
    acc3 = tl.zeros([TM, DS], tl.float32)
    row = (h * (nq // HALF) + qb // HALF).to(tl.int64)
    n = NK
    nt0 = 0
    nt1 = 0
    TOP: tl.constexpr = LOG2_255 if CS else LOG2_127
    if LISTED:
        n = tl.load(CNT + row)
        nt0 = tl.load(IDX + row * MAXK, mask=n > 0, other=0)
        nt1 = tl.load(IDX + row * MAXK + 1, mask=n > 1, other=0)
    for i in tl.range(0, n // 2 * 2, 2):
        t0 = i
        t1 = i + 1
        if LISTED:
            t0 = nt0
            t1 = nt1
            nt0 = tl.load(IDX + row * MAXK + i + 2, mask=i + 2 < n, other=0)
            nt1 = tl.load(IDX + row * MAXK + i + 3, mask=i + 3 < n, other=0)
        c0 = sq * tl.load(KS + h * NK + t0)
        c1 = sq * tl.load(KS + h * NK + t1)
        s0 = dot8(
            bq, tl.trans(tl.load(K + (base + t0 * TN + rn)[:, None] * D + rd[None, :])), TM, TN
        )
        s1 = dot8(
            bq, tl.trans(tl.load(K + (base + t1 * TN + rn)[:, None] * D + rd[None, :])), TM, TN
        )
        mt = tl.maximum((tl.max(s0, 1) - MAGIC) * c0, (tl.max(s1, 1) - MAGIC) * c1)
        p0 = tl.exp2(tl.fma(s0, c0[:, None], (-(mt - TOP) - c0 * MAGIC)[:, None]))
        p1 = tl.exp2(tl.fma(s1, c1[:, None], (-(mt - TOP) - c1 * MAGIC)[:, None]))
        mn = tl.maximum(m, mt)
        al = tl.exp2(m - mn)
        be = tl.exp2(mt - mn)
        p0 = weights8(p0, TM, TN, CS, PK)
        p1 = weights8(p1, TM, TN, CS, PK)
        ones = tl.full([TN, 8], 1, tl.int8)
        OFF: tl.constexpr = 256.0 * TN - MAGIC if CS else -MAGIC
        if MASS:
            ONE: tl.constexpr = 128.0 * TN - MAGIC if CS else -MAGIC
            x0 = dot8(p0, ones, TM, 8) + ONE
            x1 = dot8(p1, ones, TM, 8) + ONE
            share = tl.exp2(tl.minimum(mt - TOP - prev, 16.0)) * 0.125
            both = tl.join(x0 * share[:, None], x1 * share[:, None])
            RUN: tl.constexpr = TM // WARPS
            both = tl.permute(
                tl.reshape(both, [RUN // 16, ROWS, WARPS // ROWS, 16, 8, 2]), [1, 5, 0, 2, 3, 4]
            )
            tl.store(pm + i, tl.sum(tl.reshape(both, [ROWS, 2, RUN * (WARPS // ROWS) * 8]), 2))
            x = x0 + x1 - OFF
        else:
            x = tl.dot(p0, ones, tl.full([TM, 8], MAGIC_BITS, tl.int32), out_dtype=tl.int32)
            x = tl.dot(p1, ones, x, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        l = tl.fma(x, be[:, None], tl.fma(l, al[:, None], (be * OFF)[:, None]))
        tile0 = (h * NK + t0).to(tl.int64) * D
        tile1 = (h * NK + t1).to(tl.int64) * D
        pv0 = V + (tile0 + cv)[:, None] * TN + rn[None, :]
        pv1 = V + (tile1 + cv)[:, None] * TN + rn[None, :]
        pc0 = CSUM + tile0
        pc1 = CSUM + tile1
        if CS == 1:
            pc0 += cv
            pc1 += cv
        acc = _add2(acc, p0, p1, pv0, pv1, pc0, pc1, be, al, TM, DS, CS)
        if VD >= 2:
            acc1 = _add2(
                acc1, p0, p1, pv0 + DS * TN, pv1 + DS * TN, pc0 + DS, pc1 + DS, be, al, TM, DS, CS
            )
        if VD >= 4:
            acc2 = _add2(
                acc2,
                p0,
                p1,
                pv0 + 2 * DS * TN,
                pv1 + 2 * DS * TN,
                pc0 + 2 * DS,
                pc1 + 2 * DS,
                be,
                al,
                TM,
                DS,
                CS,
            )
            acc3 = _add2(
                acc3,
                p0,
                p1,
                pv0 + 3 * DS * TN,
                pv1 + 3 * DS * TN,
                pc0 + 3 * DS,
                pc1 + 3 * DS,
                be,
                al,
                TM,
                DS,
                CS,
            )
        m = mn
    l = tl.max(l, 1)
    tl.store(LSE + base + rm, m - TOP + tl.log2(l))
    po = O + (base + rm)[:, None] * D + cv[None, :]
    pw = VS + h * D + cv
    tl.store(po, (acc / l[:, None] * tl.load(pw)[None, :]).to(O.dtype.element_ty))
    if VD >= 2:
        tl.store(po + DS, (acc1 / l[:, None] * tl.load(pw + DS)[None, :]).to(O.dtype.element_ty))
    if VD >= 4:
        tl.store(
            po + 2 * DS, (acc2 / l[:, None] * tl.load(pw + 2 * DS)[None, :]).to(O.dtype.element_ty)
        )
        tl.store(
            po + 3 * DS, (acc3 / l[:, None] * tl.load(pw + 3 * DS)[None, :]).to(O.dtype.element_ty)
        )

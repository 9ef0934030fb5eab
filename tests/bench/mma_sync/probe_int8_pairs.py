"""Attention in INT8 for mma.sync that takes two tiles a turn, with choices as switches."""

import triton
import triton.language as tl
from probe_parts import LOG2_127, LOG2_255, MAGIC, MAGIC_BITS, dot8, place, weights8


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
    Q, K, V, O, LSE, PREV, M, QS, KS, VS, CSUM, IDX, CNT, L, NK, MAXK, TM: tl.constexpr,
    TN: tl.constexpr, D: tl.constexpr, LISTED: tl.constexpr, VD: tl.constexpr, CS: tl.constexpr,
    PK: tl.constexpr, MASS: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr = 1,
):  # fmt: skip
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

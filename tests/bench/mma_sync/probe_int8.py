"""Attention in INT8 for mma.sync, with every choice that was tried as a switch."""

import triton
import triton.language as tl
from probe_parts import LOG2_127, LOG2_255, MAGIC, block_sums, dot8, lanes, place, weights8


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
    Q, K, V, O, LSE, PREV, M, QS, KS, VS, CSUM, IDX, CNT, L, NK, MAXK, TM: tl.constexpr,
    TN: tl.constexpr, D: tl.constexpr, LISTED: tl.constexpr, VD: tl.constexpr, SUM: tl.constexpr,
    VT: tl.constexpr, CS: tl.constexpr, PK: tl.constexpr, FORCE: tl.constexpr, SKEW: tl.constexpr,
    MASS: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr = 1,
):  # fmt: skip
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

"""Attention in bfloat16 for mma.sync, and masses alone, with every choice that was tried as a switch."""

import triton
import triton.language as tl
from probe_parts import MAGIC, block_sums, dot8, lanes, place


@triton.jit(do_not_specialize=["L", "NK", "MAXK"])
def bf16(
    Q, K, V, O, LSE, PREV, M, IDX, CNT, scale, L, NK, MAXK, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, LISTED: tl.constexpr, VD: tl.constexpr, SUM: tl.constexpr,
    PAIR: tl.constexpr, PARTS: tl.constexpr, SKEW: tl.constexpr, MASS: tl.constexpr,
    WARPS: tl.constexpr, HALF: tl.constexpr = 1,
):  # fmt: skip
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


@triton.jit(do_not_specialize=["L", "NK"])
def masses(
    Q, K, QS, KS, LSE, M, scale, L, NK, TM: tl.constexpr, TN: tl.constexpr, D: tl.constexpr,
    INT8: tl.constexpr, FORCE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
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

"""Everything that is to be timed: (kind, name, kernel, constants, warps, stages, registers)."""

V = []


def add(kind, name, fn, warps, stages, regs=None, **c):
    V.append(
        {
            "kind": kind,
            "name": name,
            "fn": fn,
            "warps": warps,
            "stages": stages,
            "regs": regs,
            "c": dict(D=128, WARPS=warps, **c),
        }
    )


def bf16(kind, name, tm, w, st, tn=64, pair=1, sum_=1, skew=0, mass=0, regs=None, vd=2):
    listed = kind.startswith("sparse")
    half = 2 if kind == "sparse128_bf16" and tm == 64 else 1
    add(
        kind,
        f"{tm}x{tn} w{w} s{st} pair{pair} sum{sum_}{' skew' if skew else ''}{f' r{regs}' if regs else ''}{'' if vd == 2 else ' vd1'}",
        "bf16",
        w,
        st,
        regs,
        TM=tm,
        TN=tn,
        LISTED=listed,
        VD=vd,
        SUM=sum_,
        PAIR=pair,
        PARTS=64 // tn if listed else 1,
        SKEW=skew,
        MASS=mass,
        HALF=half,
    )


def int8(kind, name, tm, w, st, cs=0, pk=1, skew=0, force=0, mass=0, sum_=3, regs=None):
    listed = kind.startswith("sparse")
    half = 2 if kind == "sparse128_int8" and tm == 64 else 1
    add(
        kind,
        f"{tm} one w{w} s{st} cs{cs} pk{pk} sum{sum_}{' skew' if skew else ''}{' force' if force else ''}{f' r{regs}' if regs else ''}",
        "int8",
        w,
        st,
        regs,
        TM=tm,
        TN=64,
        LISTED=listed,
        VD=2,
        SUM=sum_,
        VT=0,
        CS=cs,
        PK=pk,
        FORCE=force,
        SKEW=skew,
        MASS=mass,
        HALF=half,
    )


def int8p(kind, name, tm, w, st, cs=0, pk=1, mass=0, vd=2, regs=None):
    listed = kind.startswith("sparse")
    half = 2 if kind == "sparse128_int8" and tm == 64 else 1
    add(
        kind,
        f"{tm} pair w{w} s{st} cs{cs} pk{pk}{'' if vd == 2 else f' vd{vd}'}{f' r{regs}' if regs else ''}",
        "int8p",
        w,
        st,
        regs,
        TM=tm,
        TN=64,
        LISTED=listed,
        VD=vd,
        CS=cs,
        PK=pk,
        MASS=mass,
        HALF=half,
    )


for kind in ("dense_bf16", "sparse128_bf16"):
    bf16(kind, "", 128, 4, 3)
    bf16(kind, "", 128, 4, 3, sum_=0)
    bf16(kind, "", 128, 4, 3, tn=32)
    bf16(kind, "", 128, 4, 4, tn=32)
    bf16(kind, "", 128, 8, 3, pair=0)
    bf16(kind, "", 64, 4, 3, pair=0)
    bf16(kind, "", 64, 4, 2, pair=0, regs=168)
    bf16(kind, "", 64, 2, 3)
    bf16(kind, "", 128, 4, 2)
    bf16(kind, "", 128, 4, 3, sum_=2)
    bf16(kind, "", 128, 8, 3, pair=0, skew=1)
    bf16(kind, "", 128, 8, 3, pair=0, sum_=2)
    bf16(kind, "", 128, 4, 3, vd=1)
for a in (
    {"tm": 64, "w": 2, "st": 3},
    {"tm": 64, "w": 2, "st": 2},
    {"tm": 64, "w": 2, "st": 3, "tn": 32},
    {"tm": 64, "w": 4, "st": 3, "pair": 0},
    {"tm": 64, "w": 4, "st": 3, "pair": 1},
    {"tm": 64, "w": 4, "st": 2, "pair": 0, "regs": 168},
    {"tm": 64, "w": 4, "st": 3, "tn": 32, "pair": 0},
    {"tm": 64, "w": 4, "st": 3, "pair": 0, "sum_": 2},
    {"tm": 64, "w": 4, "st": 3, "pair": 0, "skew": 1},
    {"tm": 64, "w": 2, "st": 4, "tn": 32},
):
    bf16("sparse64_bf16", "", **a)
for kind in ("dense_int8", "sparse128_int8"):
    int8(kind, "", 128, 4, 3)
    int8p(kind, "", 128, 8, 3, cs=0)
    int8p(kind, "", 128, 8, 3, cs=2)
    int8p(kind, "", 64, 4, 3, cs=2)
    int8p(kind, "", 64, 4, 3, cs=0)
    int8(kind, "", 128, 8, 3)
    int8(kind, "", 128, 4, 4)
    int8(kind, "", 128, 4, 3, force=1)
    int8p(kind, "", 64, 4, 2, cs=2)
    int8(kind, "", 64, 4, 3)
    int8(kind, "", 128, 8, 3, skew=1)
    int8p(kind, "", 128, 4, 3, cs=0)
    int8(kind, "", 128, 4, 3, cs=1)
    int8(kind, "", 128, 8, 3, cs=1)
    int8(kind, "", 128, 4, 3, pk=0)
    int8(kind, "", 64, 4, 3, regs=168)
    int8(kind, "", 64, 4, 3, regs=128)
    int8(kind, "", 128, 8, 3, regs=128)
    int8p(kind, "", 64, 4, 3, cs=2, regs=168)
    int8p(kind, "", 128, 8, 3, cs=2, pk=0)
    int8p(kind, "", 128, 8, 3, cs=2, vd=1)
for f, a in (
    (int8p, {"tm": 64, "w": 4, "st": 3, "cs": 2}),
    (int8p, {"tm": 64, "w": 4, "st": 2, "cs": 2}),
    (int8p, {"tm": 64, "w": 4, "st": 3, "cs": 0}),
    (int8, {"tm": 64, "w": 4, "st": 3}),
    (int8, {"tm": 64, "w": 4, "st": 3, "cs": 1}),
    (int8, {"tm": 64, "w": 2, "st": 3}),
    (int8, {"tm": 64, "w": 2, "st": 4}),
    (int8, {"tm": 64, "w": 4, "st": 4}),
    (int8p, {"tm": 64, "w": 2, "st": 3, "cs": 0}),
    (int8, {"tm": 64, "w": 4, "st": 3, "regs": 168}),
    (int8, {"tm": 64, "w": 4, "st": 3, "regs": 128}),
    (int8p, {"tm": 64, "w": 4, "st": 3, "cs": 2, "regs": 168}),
):
    f("sparse64_int8", "", **a)
bf16("dense_bf16_masses", "", 128, 4, 3, mass=1)
bf16("dense_bf16_masses", "", 128, 4, 3, mass=1, sum_=0)
bf16("dense_bf16_masses", "", 128, 8, 3, pair=0, mass=1)
bf16("dense_bf16_masses", "", 64, 4, 3, pair=0, mass=1)
int8("dense_int8_masses", "", 128, 4, 3, mass=1)
int8("dense_int8_masses", "", 128, 8, 3, mass=1)
int8p("dense_int8_masses", "", 128, 8, 3, cs=2, mass=1)
int8p("dense_int8_masses", "", 64, 4, 3, cs=2, mass=1)
for i8 in (0, 1):
    kind = "masses_int8" if i8 else "masses_bf16"
    for tm, tn, w, st in (
        (128, 64, 4, 3),
        (256, 64, 4, 3),
        (128, 64, 8, 3),
        (256, 64, 8, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 4),
        (128, 64, 2, 3),
    ):
        if tm == 256 and st == 4 and not i8:
            continue
        add(kind, f"{tm}x{tn} w{w} s{st}", "masses", w, st, None, TM=tm, TN=tn, INT8=i8, FORCE=1)
    for st, regs in ((3, 128), (2, 128), (2, 96)):
        add(
            kind, f"128x64 w4 s{st} r{regs}", "masses", 4, st, regs, TM=128, TN=64, INT8=i8, FORCE=1
        )
ARGS = {
    "bf16": "Q K V O LSE PREV M IDX CNT scale L NK MAXK",
    "int8": "Q K V O LSE PREV M QS KS VS CSUM IDX CNT L NK MAXK",
    "int8p": "Q K V O LSE PREV M QS KS VS CSUM IDX CNT L NK MAXK",
    "masses": "Q K QS KS LSE M scale L NK",
}

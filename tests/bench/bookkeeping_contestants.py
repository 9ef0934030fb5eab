"""What a sparse call costs beside attention: selection, packing, lists, and Python."""

import time

import torch

from sparse_attn.config import AdaSpaConfig
from sparse_attn.kernels.block_masses import block_masses
from sparse_attn.kernels.dense_attention import dense_attention
from sparse_attn.kernels.sparse_attention import sparse_attention
from sparse_attn.kernels.unpack_mask import unpack_mask
from sparse_attn.run_state import Call, RunState
from sparse_attn.schedule import Schedule, StepKind
from sparse_attn.selection import pack, select
from sparse_attn.token_layout import TokenLayout

DENSITY = 0.2
TEXT = 256
CALLS = 200


def sparse_run(q, k, v, scale, config):
    """(a run that has searched, a call of its sparse step)."""
    # not the last sparse step, in which a run measures its recall
    kinds = (StepKind.SEARCH, StepKind.SPARSE, StepKind.SPARSE)
    run = RunState(config, Schedule(kinds, 0, 3, (1.0, 0.7, 0.4)))
    layout = TokenLayout(TEXT, 1, 1, q.shape[2] - TEXT)
    options = {"key": "layer", "layer": 0, "role": "positive", "layout": layout, "scale": scale}

    def dense(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    run.attend(Call(step=0, dense=dense, **options), q, k, v)
    return run, Call(step=1, dense=dense, **options)


def enter_bookkeeping(contest):
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    config = AdaSpaConfig(sparsity=1 - DENSITY, min_tokens=0, cache="gpu")
    layout = TokenLayout(TEXT, 1, 1, q.shape[2] - TEXT)
    lse = dense_attention(q, k, v, scale=scale)[1]
    masses = block_masses(q, k, lse, scale=scale, **config.blocks)
    keep, _ = select(masses, layout, config)
    mask = pack(keep, config)
    lists = unpack_mask(mask.bits, mask.num_k)

    def wrong(counts):
        return float((counts != keep.sum(-1)).sum().item())

    contest.enter("ours, select blocks", lambda: select(masses, layout, config))
    contest.enter("ours, pack their mask", lambda: pack(keep, config))
    contest.enter(
        "ours, unpack a mask at 0.2", lambda: unpack_mask(mask.bits, mask.num_k), None,
        lambda result: wrong(result[1]),
    )  # fmt: skip
    contest.enter(
        "ours, sparse step, kernel alone",
        lambda: sparse_attention(q, k, v, *lists, scale=scale, **config.blocks),
        DENSITY,
    )
    run, call = sparse_run(q, k, v, scale, config)
    contest.enter("ours, sparse step, whole call", lambda: run.attend(call, q, k, v), DENSITY)


def python_ms(device) -> float:
    """Milliseconds of Python and launches per sparse call: a call too small to keep a GPU busy."""
    q, k, v = (torch.randn(1, 2, 1024, 64, device=device).bfloat16() for _ in range(3))
    run, call = sparse_run(q, k, v, 0.125, AdaSpaConfig(min_tokens=0, cache="gpu"))
    for _ in range(CALLS):
        run.attend(call, q, k, v)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        run.attend(call, q, k, v)
    took = time.perf_counter() - start
    run.free()
    return 1000 * took / CALLS

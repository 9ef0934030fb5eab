"""Attention in eight bits for the attention benchmark; quantisation is part of every time."""

import math

from sparse_attn.backends.triton.quantised_attention import low_precision_attention
from tests.bench.contest import error_of, random_lists

# relative L2 error on random data; on data like a model's it is less than half of this
TOLERANCE = 0.1


def enter_low_precision(contest, density=None, block_q=128, precision="int8"):
    """Enter one precision: dense, or sparse over blocks of `block_q` x 64 at a density."""
    q, k, v = contest.q, contest.k, contest.v
    options = {"scale": contest.scale, "precision": precision, "block_q": block_q}
    name = f"ours, {precision} dense, quantisation included"
    indices = None
    if density is not None:
        rows, columns = math.ceil(q.shape[2] / block_q), q.shape[2] // 64
        indices, counts = random_lists(q.shape[1], rows, columns, density, contest.device)
        options |= {"kv_indices": indices, "kv_num_blocks": counts}
        name = f"ours, {precision} sparse {block_q}x64 at {density}"

    contest.enter(
        name,
        lambda: low_precision_attention(q, k, v, **options),
        density or 1.0,
        lambda result: error_of(result[0], q, k, v, block_q, 64, indices),
        TOLERANCE,
    )

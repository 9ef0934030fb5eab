"""Attention in eight bits for the attention benchmark; quantisation is part of every time."""

import math

from sparse_attn.backends.choice import triton_kernels
from tests.bench.contest import error_of, mask_of, random_lists

# relative L2 error on random data; on data like a model's it is less than half of this
TOLERANCE = 0.1


def enter_low_precision(contest, density=None, block_q=128):
    """Enter INT8: dense, or sparse over blocks of `block_q` x 64 at a density."""
    q, k, v = contest.q, contest.k, contest.v
    attend, options = triton_kernels().quantised_attention, {"scale": contest.scale}
    name, indices = "ours, int8 dense, quantisation included", None
    if density is not None:
        rows, columns = math.ceil(q.shape[2] / block_q), q.shape[2] // 64
        indices, _ = random_lists(q.shape[1], rows, columns, density, contest.device)
        options["mask"] = mask_of(indices, columns, block_q)
        name = f"ours, int8 sparse {block_q}x64 at {density}"

    contest.enter(
        name,
        lambda: attend(q, k, v, **options),
        density or 1.0,
        lambda result: error_of(result[0], q, k, v, block_q, 64, indices),
        TOLERANCE,
    )

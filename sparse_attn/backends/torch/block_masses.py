"""Block masses in plain torch: exp(S - LSE) summed by blocks, in float32."""

import torch

from ..permuted import row_scales
from .threads import each_alone

# bytes of a tile of weights: about what the cache of a CPU's core holds
TILE_BYTES = 2 << 20
# the same on other devices: enough work for a GPU, little of its memory
BATCH_BYTES = 256 << 20
# reached only when an earlier LSE is useless; float32 holds a row of blocks of what comes of it
LARGEST_EXPONENT = 60.0
# added to a score, it hides a key
HIDDEN = -1e30


def block_masses(
    q, k, lse, *, block_q, block_k, scale, key_bias=None, renormalise=True, int8=False
):
    """Sum exp(S - lse) by blocks.

    Args:
        q: [B, H, Lq, D]. k: [B, H, Lk, D].
        lse: [B, H, Lq] float32, of this step or an earlier one.
        renormalise: scale every row of blocks to sum to its number of query rows.
        int8: not looked at; the products are of float32.

    Returns:
        [B, H, Nq, Nk] float32.
    """
    B, H, Lq, D = q.shape
    Lk = k.shape[-2]
    num_q, num_k = -(-Lq // block_q), -(-Lk // block_k)
    masses = torch.empty((B, H, num_q, num_k), device=q.device, dtype=torch.float32)
    padded = num_k * block_k
    room = TILE_BYTES if q.device.type == "cpu" else BATCH_BYTES
    step = max(1, room // (padded * 4 * block_q)) * block_q
    # two more columns let the product add the key bias and subtract the LSE; keys that pad the
    # last block weigh nothing
    keys = torch.zeros(padded, D + 2, device=k.device)
    queries = torch.ones(Lq, D + 2, device=q.device)

    def sum_rows(start):
        weights = queries[start : start + step] @ keys.t()
        weights.clamp_(max=LARGEST_EXPONENT).exp_()
        sums = _sum_blocks(weights, block_q, block_k)
        first = start // block_q
        masses[b, h, first : first + len(sums)] = sums

    with each_alone(q.device) as for_each:
        for b in range(B):
            keys[:, D] = HIDDEN
            keys[:Lk, D] = 0.0 if key_bias is None else key_bias[b].clamp(min=HIDDEN)
            keys[:, D + 1] = -1.0
            for h in range(H):
                keys[:Lk, :D] = k[b, h]
                queries[:, :D] = q[b, h].float() * scale
                # a row without a key weighs none
                queries[:, D + 1] = lse[b, h].masked_fill(lse[b, h] < HIDDEN, float("inf"))
                for_each(sum_rows, range(0, Lq, step))
    if renormalise:
        masses *= row_scales(masses, Lq, block_q)
    return masses


def pooled_masses(q, k_mean, log_sizes, lse, *, block_q, scale):
    """Masses of pooled keys k_mean [B, H, N, D], whose weights have the logs log_sizes [B, N]."""
    options = {"scale": scale, "key_bias": log_sizes, "renormalise": False}
    return block_masses(q, k_mean, lse, block_q=block_q, block_k=1, **options)


def _sum_blocks(weights, block_q, block_k):
    """Sum weights [rows, Nk * block_k] to [Nq, Nk]."""
    sums = weights.view(len(weights), -1, block_k).sum(-1)
    sums = torch.nn.functional.pad(sums, (0, 0, 0, -len(sums) % block_q))
    return sums.view(-1, block_q, sums.shape[-1]).sum(1)

"""LSE-cached search: a new mask for the price of QK^T alone (AdaSpa, algorithm 2).

A row's softmax denominator hardly changes over denoising steps, so the LSE kept from the first
search stands in for today's; the masses are renormalised by row, which mends its mean drift.
"""

import torch


def lse_cached_search(
    backend, q, k, lse, *, scale, block_q, block_k, key_bias=None, renormalise=True, int8=False
):  # fmt: skip
    """Measure block masses with the LSE of an earlier step.

    Args:
        backend: a `backends.choice.Backend`.
        q, k: [B, H, L, D]. lse: [B, H, L] float32.
        renormalise: False leaves it to the caller to scale the rows.
        int8: measure with INT8 q and k, where the backend can.

    Returns:
        [B, H, Nq, Nk] float32; every full row of blocks sums to its number of query rows.
    """
    return backend.block_masses(
        q, k, lse, block_q=block_q, block_k=block_k, scale=scale, key_bias=key_bias,
        renormalise=renormalise, int8=int8,
    )  # fmt: skip


def rows_of(tokens: int, block_q: int, device=None) -> torch.Tensor:
    """Query rows of every block, [Nq] float32."""
    return (tokens - torch.arange(0, tokens, block_q, device=device)).clamp(max=block_q).float()

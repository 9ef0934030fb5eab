"""Fused online search: dense attention that also yields exact block masses (AdaSpa, algorithm 1).

With the LSE of an earlier step at hand one pass does both; without it a second pass recomputes
QK^T and sums exp(S - LSE). Either way the dense output is the step's output.
"""


def fused_online_search(
    backend, dense_with_lse, q, k, v, *, scale, block_q, block_k, key_bias=None, previous_lse=None
):  # fmt: skip
    """Run dense attention and measure where its mass lies.

    Args:
        backend: a `backends.choice.Backend`.
        dense_with_lse: dense_with_lse(q, k, v) -> (out, lse), for the case of two passes.
        q, k, v: [B, H, L, D].
        previous_lse: [B, H, L] float32 of an earlier step, or None.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32. masses: [B, H, Nq, Nk] float32.
    """
    blocks = {"block_q": block_q, "block_k": block_k}
    if previous_lse is not None and backend.one_pass_search:
        return backend.attention_with_masses(
            q, k, v, scale=scale, key_bias=key_bias, previous_lse=previous_lse, **blocks
        )
    out, lse = dense_with_lse(q, k, v)
    return out, lse, backend.block_masses(q, k, lse, scale=scale, key_bias=key_bias, **blocks)

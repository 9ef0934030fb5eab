"""Features of tokens: queries and keys projected on their head's principal directions, and places."""

import torch


def features(q, k, centres, directions, places) -> torch.Tensor:
    """(q - centre) @ directions, the same of k, and places; what is not finite becomes 0.

    Args:
        q, k: [B, H, V, D]. centres: [2, B, H, D] float32, of q and of k.
        directions: [2, B, H, D, N] float32. places: [V, P] float32.

    Returns:
        [B, H, V, 2 N + P] float32.
    """
    shape = *q.shape[:3], 2 * directions.shape[-1] + places.shape[-1]
    out = torch.empty(shape, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            parts = [
                (x[b, h].float() - c[b, h]) @ w[b, h]
                for x, c, w in zip((q, k), centres, directions, strict=True)
            ]
            torch.cat([*parts, places], -1, out=out[b, h])
    # a NaN belongs to the search, which answers for it; here it must only keep its place
    return out.nan_to_num_(0.0, 0.0, 0.0)

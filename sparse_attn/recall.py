"""Recall: the share of softmax mass that falls on kept blocks."""

import torch


def recall(masses: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Share of each head's mass on the kept blocks.

    Args:
        masses: [B, H, Nq, Nk] float32 block masses.
        keep: [B, H, Nq, Nk] bool.

    Returns:
        [B, H] float32 in [0, 1]; NaN where a mass is NaN.
    """
    kept = (masses * keep).sum((-1, -2), dtype=torch.float32)
    return kept / masses.sum((-1, -2), dtype=torch.float32)

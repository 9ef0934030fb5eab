"""From block masses and scores to a block mask: text sink, budgets or a recall, row-wise top-k."""

import torch

from ..backends.choice import Backend
from ..block_mask import BlockMask, recall
from ..config import AdaSpaConfig
from ..token_layout import TokenLayout
from .head_adaptive import budget_shift, head_budgets
from .recall_target import row_wise_recall
from .text_sink import count_sinks, sink_blocks


def select(
    backend: Backend,
    masses: torch.Tensor,
    layout: TokenLayout,
    config: AdaSpaConfig,
    scores: torch.Tensor | None = None,
) -> tuple[BlockMask, torch.Tensor]:
    """Choose the blocks to keep. Nothing is read back from the device.

    Args:
        masses: [B, H, Nq, Nk] float32 block masses of `layout` in blocks of `config.block_size`.
        scores: what to rank the blocks of a row by, [B, H, Nq, Nk] float32; None ranks by mass. A
            recall that was asked for is one of masses, and the masses rank there.

    Returns:
        mask: the blocks to keep. recall: [B, H] float32, the share of mass that they hold.
    """
    keep, held = _choose(backend, masses, layout, config, scores)
    return BlockMask.from_dense(keep, **config.blocks), held


def _choose(backend, masses, layout, config, scores):
    """(keep [B, H, Nq, Nk] bool, recall)."""
    B, H, _, Nk = masses.shape
    sinks = count_sinks(layout, config.block_k)
    sink_q = sink_blocks(layout, config.block_q, masses.device)
    sink_k = sink_blocks(layout, config.block_k, masses.device)
    if config.recall:
        keep = row_wise_recall(masses, config.recall, min(sinks + 1, Nk), sink_k, sink_q)
        return keep, recall(masses, keep)
    scores = masses if scores is None else scores
    budget = row_budget(config.density, Nk, sinks)
    budgets = torch.full((B, H), budget, device=masses.device)
    keep, held = backend.row_wise_top_k(scores, masses, budgets, budget, sink_k, sink_q)
    shift = budget_shift(budget, Nk, sinks) if config.head_adaptive else 0
    if shift:
        budgets = head_budgets(held, budget, shift)
        largest = budget + shift
        keep, held = backend.row_wise_top_k(scores, masses, budgets, largest, sink_k, sink_q)
    return keep, held


def row_budget(density: float, num_k: int, num_sinks: int) -> int:
    """Key blocks per row at `density`: the sinks and at least one more, at most all."""
    return min(num_k, max(round(density * num_k), num_sinks + 1, 1))

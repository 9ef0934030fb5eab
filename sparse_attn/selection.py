"""From block masses to a block mask: budgets, text sink, row-wise top-k."""

import torch

from .block_mask import BlockMask
from .config import AdaSpaConfig
from .head_adaptive import budget_shift, head_budgets
from .recall import recall
from .row_wise_top_k import row_budget, row_wise_top_k
from .text_sink import count_sinks, sink_blocks
from .token_layout import TokenLayout


def select(
    masses: torch.Tensor, layout: TokenLayout, config: AdaSpaConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the blocks to keep. Nothing is read back from the device.

    Args:
        masses: [B, H, N, N] float32 block masses of `layout` in blocks of `config.block_size`.

    Returns:
        keep: [B, H, N, N] bool.
        recall: [B, H] float32, the share of mass that `keep` holds.
    """
    B, H, _, N = masses.shape
    sinks = count_sinks(layout, config.block_size)
    sink = sink_blocks(layout, config.block_size, masses.device)
    budget = row_budget(config.density, N, sinks)
    budgets = torch.full((B, H), budget, device=masses.device)
    keep = row_wise_top_k(masses, budgets, budget, sink)
    held = recall(masses, keep)
    shift = budget_shift(budget, N, sinks) if config.head_adaptive else 0
    if shift:
        budgets = head_budgets(held, budget, shift)
        keep = row_wise_top_k(masses, budgets, budget + shift, sink)
        held = recall(masses, keep)
    return keep, held


def pack(keep: torch.Tensor, config: AdaSpaConfig) -> BlockMask:
    return BlockMask.from_dense(keep, block_q=config.block_size, block_k=config.block_size)

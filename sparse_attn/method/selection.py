"""From block masses and scores to a block mask: text sink, budgets or a recall, row-wise top-k."""

import torch

from ..backends.choice import Backend
from ..block_mask import BlockMask, mask_blocks, recall, sum_pool
from ..config import AdaSpaConfig
from ..token_layout import TokenLayout
from .head_adaptive import budget_shift, moved_heads
from .recall_target import row_wise_recall
from .text_sink import count_sinks, sink_blocks


class Selection:
    """Chooses the blocks to keep, some heads after others. Nothing is read back from the device.

    Where heads share out blocks, each is chosen for with the budget of all, with more and with less;
    when all recalls are known, `settle` takes one of the three.

    Args:
        layout: of the sequence whose blocks `config` names; the mask's own may be multiples of them.
        like: [B, H, ...], of the videos and heads that will be added, on their device.
    """

    def __init__(
        self, backend: Backend, layout: TokenLayout, config: AdaSpaConfig, like: torch.Tensor
    ):
        device = like.device
        self.backend, self.config = backend, config
        self.blocks = mask_blocks(layout.tokens, **config.blocks)
        block_q, block_k = self.blocks.values()
        num_q, self.num_k = layout.num_blocks(block_q), layout.num_blocks(block_k)
        self.sink_q = sink_blocks(layout, block_q, device)
        self.sink_k = sink_blocks(layout, block_k, device)
        sinks = count_sinks(layout, block_k)
        self.least = min(sinks + 1, self.num_k)
        budget = row_budget(config.density, self.num_k, sinks)
        shift = budget_shift(budget, self.num_k, sinks) if config.head_adaptive else 0
        self.budgets = (budget, budget + shift, budget - shift) if shift else (budget,)
        shape = len(self.budgets), *like.shape[:2]
        num_bytes = -(-self.num_k // 8)
        self._bits = torch.empty((*shape, num_q, num_bytes), dtype=torch.uint8, device=device)
        self._recall = torch.empty(shape, device=device)
        self._added = 0

    def add(self, masses: torch.Tensor, scores: torch.Tensor | None = None) -> None:
        """Choose for the next heads.

        Args:
            masses: [B, h, Nq, Nk] float32, of the blocks that `config` names.
            scores: what to rank the blocks of a row by, [B, h, Nq, Nk] float32; None ranks by mass.
                A recall that was asked for is one of masses, and the masses rank there.
        """
        scores = None if scores is None else self._together(scores)
        masses = self._together(masses)
        heads = slice(self._added, self._added + masses.shape[1])
        self._added = heads.stop
        scores = masses if scores is None else scores
        for i, budget in enumerate(self.budgets):
            keep, self._recall[i, :, heads] = self._choose(masses, scores, budget)
            self._bits[i, :, heads] = BlockMask.from_dense(keep, **self.blocks).bits

    def _together(self, x):
        """Sums over the blocks of `config` in each block of the mask."""
        return sum_pool(
            x, *(self.blocks[name] // size for name, size in self.config.blocks.items())
        )

    def _choose(self, masses, scores, budget):
        """(keep [B, h, Nq, Nk] bool, recall [B, h])."""
        sinks = self.sink_k, self.sink_q
        if self.config.recall:
            keep = row_wise_recall(masses, self.config.recall, self.least, *sinks)
            return keep, recall(masses, keep)
        budgets = torch.full(masses.shape[:2], budget, device=masses.device)
        return self.backend.row_wise_top_k(scores, masses, budgets, budget, *sinks)

    def settle(self) -> tuple[BlockMask, torch.Tensor]:
        """The mask of all heads, and the share of mass that it holds, [B, H] float32."""
        bits, held = self._bits, self._recall
        if len(self.budgets) == 1:
            bits, held = bits[0], held[0]
        else:
            # 0, 1 or -1, the last of the three
            taken = moved_heads(held[0])
            video, head = (torch.arange(n, device=bits.device) for n in held.shape[1:])
            bits, held = (x[taken, video[:, None], head] for x in (bits, held))
        return BlockMask(bits, self.num_k, **self.blocks), held


def row_budget(density: float, num_k: int, num_sinks: int) -> int:
    """Key blocks per row at `density`: the sinks and at least one more, at most all."""
    return min(num_k, max(round(density * num_k), num_sinks + 1, 1))

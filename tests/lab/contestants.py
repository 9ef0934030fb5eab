"""Ways to choose blocks and to make up for those left out, as one attention override in plain torch.

Written to be obviously right, not fast: a kept block is a mask over tokens, a left-out block is one
more key.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_attn.head_adaptive import budget_shift, head_budgets
from sparse_attn.recall import recall
from sparse_attn.row_wise_top_k import row_budget, row_wise_top_k

BLOCK = 64


@dataclass(frozen=True)
class Contestant:
    """One way to run a sparse step.

    Args:
        score: what blocks are ranked by: "mass" (exact), "error" (exact error that the tail leaves),
            "pooled" (mean query times mean key, at every step), "random".
        order: "raster", or a cube such as (4, 4, 4) whose tokens are neighbours in the sequence.
        tail: "none", or "pooled": one pseudo key per block that is left out, with the block's mean
            key and mean value and weighted by its size.
        searches: steps of the first search and of later ones; a pooled score ignores later ones.
    """

    name: str
    density: float
    score: str = "mass"
    order: tuple[int, int, int] | str = "raster"
    tail: str = "none"
    head_adaptive: bool = False
    searches: tuple[int, ...] = (2,)


def cube_order(grid, cube) -> torch.Tensor:
    """Token numbers of a (T, H, W) grid, cube after cube; cubes at the border may be smaller."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    key = torch.zeros(grid, dtype=torch.long)
    for axis, size, n in zip(axes, cube, grid, strict=True):
        key = key * (-(-n // size)) + axis // size
    for axis, size in zip(axes, cube, strict=True):
        key = key * size + axis % size
    return key.flatten().argsort()


class Attention:
    """The override; one object is one run."""

    def __init__(self, contestant: Contestant, grid):
        self.contestant, self.grid = contestant, grid
        self.calls: dict[int, int] = {}
        self.masks: dict[int, torch.Tensor] = {}
        self.recalls: dict[int, float] = {}
        order = contestant.order
        self.order = None if order == "raster" else cube_order(grid, order)

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        if q.shape[1] != k.shape[1]:
            return func(q, k, v, heads=heads, mask=mask, **kwargs)
        layer = kwargs["transformer_options"]["block_index"]
        step = self.calls[layer] = self.calls.get(layer, -1) + 1
        first = self.contestant.searches[0]
        if step < first:
            return func(q, k, v, heads=heads, mask=mask, **kwargs)
        q4, k4, v4 = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.order is not None:
            self.order = self.order.to(q.device)
            q4, k4, v4 = (x[:, :, self.order] for x in (q4, k4, v4))
        if step in self.contestant.searches or self.contestant.score == "pooled":
            self.masks[layer] = self.search(layer, q4, k4, v4)
        if step == first and self.contestant.score != "pooled":
            # the search's own output is dense
            return func(q, k, v, heads=heads, mask=mask, **kwargs)
        out = self.sparse(q4, k4, v4, self.masks[layer])
        if self.order is not None:
            out = torch.empty_like(out).index_copy_(2, self.order, out)
        return out.transpose(1, 2).flatten(2)

    def search(self, layer, q, k, v):
        """[B, H, N, N] bool, True where the block is kept."""
        contestant = self.contestant
        masses, scores = scores_of(contestant.score, q, k, v)
        blocks = masses.shape[-1]
        budget = row_budget(contestant.density, blocks, 0)
        sink = torch.zeros(blocks, dtype=torch.bool, device=q.device)
        budgets = torch.full(masses.shape[:2], budget, device=q.device)
        keep = row_wise_top_k(scores, budgets, budget, sink)
        if contestant.head_adaptive:
            shift = budget_shift(budget, blocks, 0)
            budgets = head_budgets(recall(masses, keep), budget, shift)
            keep = row_wise_top_k(scores, budgets, budget + shift, sink)
        self.recalls[layer] = recall(masses, keep).mean().item()
        return keep

    def sparse(self, q, k, v, keep):
        length = q.shape[2]
        tokens = keep.repeat_interleave(BLOCK, 3)[..., :length]
        if self.contestant.tail == "pooled":
            k_mean, v_mean, size = means(k), means(v), sizes(length, k.device)
            k, v = torch.cat([k, k_mean], 2), torch.cat([v, v_mean], 2)
            bias = torch.zeros(tokens.shape, device=q.device, dtype=q.dtype)
            bias.masked_fill_(~tokens, float("-inf"))
            tail = size.log().to(q.dtype).expand(keep.shape).masked_fill(keep, float("-inf"))
            bias = torch.cat([bias, tail], -1)
        else:
            bias = tokens
        # head by head and row of blocks by row of blocks would be slow; heads suffice for memory
        outs = []
        for h in range(q.shape[1]):
            rows = bias[:, h].repeat_interleave(BLOCK, 1)[:, :length]
            # the fused kernels want rows of masks aligned to eight
            pad = -rows.shape[-1] % 8
            value = False if rows.dtype == torch.bool else float("-inf")
            padded = F.pad(rows, (0, pad), value=value)[..., : rows.shape[-1]]
            outs.append(
                F.scaled_dot_product_attention(q[:, h], k[:, h], v[:, h], attn_mask=padded)
            )
        return torch.stack(outs, 1)


def means(x):
    """Mean of every block, [B, H, N, D]."""
    total = F.pad(x.float(), (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)).sum(3)
    return (total / sizes(x.shape[2], x.device)[:, None]).to(x.dtype)


def sizes(length, device):
    return (length - torch.arange(0, length, BLOCK, device=device)).clamp(max=BLOCK).float()


def scores_of(kind: str, q, k, v):
    """Exact masses, and the scores to rank by; both [B, H, N, N] float32."""
    masses, errors = [], []
    length, pad = q.shape[2], -q.shape[2] % BLOCK
    scale = q.shape[-1] ** -0.5
    v_mean = means(v).float()
    for h in range(q.shape[1]):
        weights = (q[:, h].float() @ k[:, h].float().mT * scale).softmax(-1)
        weights = F.pad(weights, (0, pad, 0, pad))
        blocks = weights.unflatten(2, (-1, BLOCK))  # [B, L, N, block]
        mass = blocks.sum(3)
        masses.append(mass.unflatten(1, (-1, BLOCK)).sum(2))
        if kind == "error":
            values = F.pad(v[:, h].float(), (0, 0, 0, pad)).unflatten(1, (-1, BLOCK))
            values = values - v_mean[:, h, :, None]
            left = torch.einsum("blnk,bnkd->blnd", blocks, values).norm(dim=-1)
            errors.append(left.unflatten(1, (-1, BLOCK)).sum(2))
    masses = torch.stack(masses, 1)
    if kind == "mass":
        return masses, masses
    if kind == "error":
        return masses, torch.stack(errors, 1)
    if kind == "pooled":
        return masses, (means(q).float() @ means(k).float().mT) * scale
    generator = torch.Generator(q.device).manual_seed(length)
    return masses, torch.rand(masses.shape, device=q.device, generator=generator)

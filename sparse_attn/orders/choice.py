"""Order choice: which order of the tokens each head of a layer runs in.

Heads that look around themselves do best in the order by position, where a block is a piece of
video; heads that look everywhere for something do best in the similar order. A few query blocks of
a head tell which it is: the order wins that leaves the smaller tail error.
"""

import torch

from ..backends.choice import Backend
from ..call import Call
from ..config import AdaSpaConfig
from ..head_groups import head_groups
from ..token_layout import TokenLayout
from .position import video_first
from .similarity import similar_order

SAMPLED_BLOCKS = 24


def find_order(
    backend: Backend, call: Call, config: AdaSpaConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the order of every head. Nothing is read back from the device.

    Returns:
        order: [B, H, L] int32, the token at every place. similar: [B, H] bool, which are similar.
    """
    B, H, L, _ = call.q.shape
    assert call.by_position is not None, "set where averages stand for skipped blocks"
    in_place = call.by_position.expand(B, H, L)
    if config.token_order == "position":
        return in_place, torch.zeros(B, H, dtype=torch.bool, device=call.q.device)
    alike = similar_order(backend, call.q, call.k, call.layout)
    similar = torch.lt(*_errors(backend, call, (alike, in_place), config))
    if call.key_bias is not None:
        # measured even where it is then thrown away: to ask first would wait for the device
        similar &= ~biased_video(call.key_bias, call.layout)
    return torch.where(similar[..., None], alike, in_place), similar


def biased_video(key_bias: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Whether a bias [B, L] weighs the video, [] bool: heads share it, so they need one order."""
    return (key_bias[:, layout.before :][:, : layout.video] != 0).any()


def _errors(backend, call, orders, config) -> list[torch.Tensor]:
    """[B, H] tail error that each order leaves in the sampled query blocks."""
    q = call.q
    places = _sampled_rows(call.layout, config.block_q, q.device)
    tokens = torch.cat([order[..., places] for order in orders], -1).long()
    queries = q.gather(2, tokens[..., None].expand(*tokens.shape, q.shape[-1]))
    # a query's LSE is the same in any order
    _, lse = backend.attention(queries, call.k, call.v, scale=call.scale, key_bias=call.key_bias)
    # permuted keys and values
    groups = list(head_groups(call, copies=2, pair_bytes=0))
    return [
        torch.cat(
            [
                _error(backend, part, rows[:, heads], row_lse[:, heads], order[:, heads], config)
                for heads, part in groups
            ],
            1,
        )
        for order, rows, row_lse in zip(
            orders, queries.split(len(places), 2), lse.split(len(places), 2), strict=True
        )
    ]


def _error(backend, call, rows, lse, order, config) -> torch.Tensor:
    """[B, h] of one order, whose permuted copies go before the next one's are made."""
    permuted = backend.permute(None, call.k, call.v, order, call.key_bias)
    pooled = permuted.pooled
    masses = backend.block_masses(
        rows, permuted.k, lse, **config.blocks, scale=call.scale, key_bias=permuted.key_bias
    )
    pooled_masses = backend.pooled_masses(
        rows, pooled.k_mean, pooled.log_sizes, lse, block_q=config.block_q, scale=call.scale
    )
    left = backend.tail_error(masses, pooled_masses, permuted.v, pooled.v_mean)
    kept = max(1, round(config.density * left.shape[-1]))
    return left.sum((-1, -2)) - left.topk(kept).values.sum((-1, -2))


def _sampled_rows(layout, block_q: int, device) -> torch.Tensor:
    """Rows of up to `SAMPLED_BLOCKS` whole query blocks of the permuted video."""
    blocks = video_first(layout).video // block_q
    if not blocks:
        return torch.arange(layout.tokens, device=device)
    number = min(SAMPLED_BLOCKS, blocks)
    first = torch.arange(number, device=device) * blocks // number * block_q
    return (first[:, None] + torch.arange(block_q, device=device)).flatten()

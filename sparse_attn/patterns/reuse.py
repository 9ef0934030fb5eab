"""Whether a mask that another run has found holds here."""

from typing import NamedTuple

import torch

from ..block_mask import BlockMask
from ..call import Call
from ..config import AdaSpaConfig
from ..method.recall import sample_rows, sampled_recall
from ..orders.choice import biased_video
from ..orders.packed import same_blocks
from .pattern import CarriedLayer, CarriedPattern

# a carried mask may hold this much less of a layer than when it was found
RECALL_LOSS = 0.05
# and this much less than the user asks for: what a sample may err by
SAMPLE_ERROR = 0.02
SAMPLED_ROWS = 64
ONE_ORDER = (
    "another node weighs parts of the video, and the pattern orders each head in its own way"
)


class FittingMask(NamedTuple):
    """A carried mask that holds here.

    Args:
        mask: on the device of the call. order: [B, H, L] int32 of its sequence, there too, or None.
        recall: [H], of a sample of this call's rows.
        similar: [H], share of the batch that is ordered by similarity, or None without an order.
    """

    layer: CarriedLayer
    mask: BlockMask
    recall: torch.Tensor
    order: torch.Tensor | None = None
    similar: torch.Tensor | None = None


def fitting_mask(
    pattern: CarriedPattern, family: str, config: AdaSpaConfig, call: Call
) -> FittingMask | str:
    """Find the mask of a layer, if it holds here what it held when it was found.

    Reads one number from the device, once per layer and run: the choice is due in this call.

    Returns:
        The mask, or the reason why there is none.
    """
    q = call.q
    layer, reason = pattern.find(call, family, config)
    if layer is None:
        return reason
    if (
        layer.order is not None
        and call.key_bias is not None
        and biased_video(call.key_bias, call.layout)
    ):
        return ONE_ORDER
    mask = BlockMask(
        layer.bits.to(q.device), call.layout.num_blocks(config.block_k), **config.blocks
    )
    order = similar = None
    if pattern.pooled:
        in_place = call.by_position
        assert in_place is not None, "set where averages stand for skipped blocks"
        order = in_place.expand(*q.shape[:3])
        if layer.order is not None:
            order = layer.order.to(q.device)
        similar = (~same_blocks(order, in_place.expand_as(order), call.layout)).float().mean(0)
    rows = sample_rows(call.layout.tokens, SAMPLED_ROWS)
    held = sampled_recall(call, mask, rows, order)
    # not (a >= b): also where it is NaN
    if not held.mean() >= layer.mean_recall() - RECALL_LOSS:
        return f"recall more than {RECALL_LOSS} below what the pattern had"
    if config.recall and not held.mean() >= config.recall - SAMPLE_ERROR:
        return f"recall below the {config.recall} asked for"
    return FittingMask(layer, mask, held.mean(0), order, similar)

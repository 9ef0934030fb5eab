"""A block mask as lists of key blocks, which a gather reads."""

import torch
import torch.nn.functional as F

from ...block_mask import BlockMask


def unpack_mask(mask: BlockMask, num_pooled_blocks: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a mask into lists, packed to the left.

    Args:
        num_pooled_blocks: further blocks, Nk and on, that every row gathers: P.

    Returns:
        kv_indices: [B, H, Nq, Nk + P] int32, ascending; entries past the count are not meaningful.
        kv_num_blocks: [B, H, Nq] int32.
    """
    keep = F.pad(mask.to_dense(), (0, num_pooled_blocks), value=True)
    # a stable sort of 0/1 moves the kept blocks left and leaves them ascending
    order = torch.argsort(keep.logical_not().to(torch.uint8), dim=-1, stable=True)
    return order.to(torch.int32), keep.sum(-1, dtype=torch.int32)

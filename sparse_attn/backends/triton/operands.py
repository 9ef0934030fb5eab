"""The tensors of one attention call, checked once and in the form that the kernels read."""

from dataclasses import dataclass

import torch

from ...block_mask import BlockMask
from ...call import empty_output
from ..permuted import Pooled
from . import launch
from .unpack_mask import unpack_mask


@dataclass(frozen=True)
class Operands:
    """What an attention kernel reads and writes; None where a call has none of it.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D]. All with D contiguous and rows on 16 bytes.
        key_bias: [B, Lk] float32.
        mask: None is dense. kv_indices: [B, H, Nq, Nk] int32, its key blocks, ascending, packed
            left. kv_num_blocks: [B, H, Nq] int32, how many of them count; 0 is allowed.
        pooled: contiguous, for each key block of the mask.
        order: [B, H, Lq] int32 with contiguous rows, the token at every place of q.
        out: [B, H, Lq, D] viewed on a contiguous [B, Lq, H, D]. lse: [B, H, Lq] float32.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_bias: torch.Tensor | None
    mask: BlockMask | None
    kv_indices: torch.Tensor | None
    kv_num_blocks: torch.Tensor | None
    pooled: Pooled | None
    order: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, Lq, Lk, D."""
        return *self.q.shape[:3], self.k.shape[2], self.q.shape[3]

    @property
    def order_strides(self) -> tuple[int, int]:
        """Of batch and heads."""
        return (0, 0) if self.order is None else self.order.stride()[:2]

    @property
    def bits(self) -> torch.Tensor | None:
        """[B, H, Nq, ceil(Nk / 8)] uint8 of the mask."""
        return None if self.mask is None else self.mask.bits

    @property
    def pooled_tensors(self) -> tuple:
        """Mean keys, mean values and log sizes."""
        x = self.pooled
        return (None, None, None) if x is None else (x.k_mean, x.v_mean, x.log_sizes)

    @property
    def num_pooled(self) -> int:
        """Pooled keys, N."""
        return 0 if self.pooled is None else self.pooled.k_mean.shape[2]


def operands_of(
    q, k, v, *, key_bias=None, mask: BlockMask | None = None, pooled: Pooled | None = None,
    order=None,
) -> Operands:  # fmt: skip
    """Check a call and make room for its results.

    Raises:
        ValueError: shapes that do not belong together.
    """
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    if k.shape != (B, H, Lk, D) or v.shape != k.shape:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must have one batch, heads and head_dim, got {shapes}.")
    kv_indices = kv_num_blocks = None
    if mask is not None:
        num_q, num_k = -(-Lq // mask.block_q), -(-Lk // mask.block_k)
        if mask.num_k != num_k or mask.bits.shape != (B, H, num_q, -(-num_k // 8)):
            raise ValueError(
                f"The mask must be of {num_q} x {num_k} blocks, got {list(mask.bits.shape)} bytes "
                f"for {mask.num_k} key blocks."
            )
        mask = mask.with_bits(mask.bits.contiguous())
        kv_indices, kv_num_blocks = unpack_mask(mask)
    if pooled is not None:
        if mask is None:
            raise ValueError("Pooled keys need a mask.")
        means = (
            launch.aligned(launch.checked(x, "means", (B, H, mask.num_k, D), q.dtype))
            for x in (pooled.k_mean, pooled.v_mean)
        )
        log_sizes = launch.checked(pooled.log_sizes, "log_sizes", (B, mask.num_k))
        pooled = Pooled(*means, log_sizes)
    return Operands(
        *(launch.aligned(x) for x in (q, k, v)),
        key_bias=launch.checked(key_bias, "key_bias", (B, Lk)),
        mask=mask,
        kv_indices=kv_indices,
        kv_num_blocks=kv_num_blocks,
        pooled=pooled,
        order=None if order is None else launch.checked_order(order, q),
        out=empty_output(q),
        lse=torch.empty((B, H, Lq), device=q.device, dtype=torch.float32),
    )

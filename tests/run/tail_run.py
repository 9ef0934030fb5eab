"""A run with a pooled tail, its inputs and what plain torch makes of them."""

import pytest
import torch

from sparse_attn.backends import reference
from sparse_attn.call import LayerName
from sparse_attn.config import TOKEN_ORDERS
from sparse_attn.orders.position import video_first
from sparse_attn.token_layout import TokenLayout
from tests.run.fakes import (
    SCALE,
    Backend,
    Run,
)

# a grid that rods of 4 x 4 do not divide, text on both sides, a last block that is not full
LAYOUT = TokenLayout(30, 5, 6, 21, 40)
H, D = 2, 16
PERMUTED = video_first(LAYOUT)
NAME = LayerName("positive", "double", 0, 0)
BOTH_ORDERS = pytest.mark.parametrize("token_order", TOKEN_ORDERS)


class TailRun(Run):
    """A run with a pooled tail whose only layer has one key."""

    def __init__(self, kinds, one_pass=False, layout=LAYOUT, carried=None, **config):
        fields = {"tail": "pooled", "token_order": "position", **config}
        super().__init__(kinds, Backend(one_pass), layout=layout, carried=carried, **fields)
        self.statistics.model = "Wan"

    def attend(self, step, qkv, **more):
        out, did = super().attend(step, qkv, **more)
        return out, [what for what in did if what != "host"]

    @property
    def keep(self):
        return self.pattern().mask.to_dense()

    @property
    def order(self):
        return self.state.layers.fetch(self.layer(), torch.device("cpu"))[1]


def tensors(seed=0, batch=1, layout=LAYOUT, dtype=torch.float32):
    """Neighbours in the video are alike; [B, H, L, D] over the host's [B, L, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    L = layout.tokens
    smooth = torch.randn(batch, 8, H, D, generator=generator)
    smooth = smooth.repeat_interleave(-(-L // 8), 1)[:, :L]
    found = []
    for share in (1.0, 1.0, 0.0):
        x = share * smooth + torch.randn(batch, L, H, D, generator=generator)
        found.append(x.to(dtype).transpose(1, 2))
    return found


def dense(q, k, v, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    inputs = (x.double() for x in (q, k, v))
    return reference.attention(*inputs, scale=SCALE, key_bias=bias)[0]


def with_tail(q, k, v, mask, order, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    moved = reference.permute(q.double(), k.double(), v.double(), order, bias)
    return reference.attention(
        moved.q, moved.k, moved.v, scale=SCALE, key_bias=moved.key_bias, mask=mask,
        pooled=moved.pooled, order=order,
    )[0]  # fmt: skip


def tail_error(q, k, v):
    """Of every block pair, of tokens in the mask's order, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    lse = reference.scaled_logits(q, k, SCALE).logsumexp(-1)
    order = torch.arange(k.shape[2]).expand(k.shape[:3])
    pooled = reference.permute(None, k, v, order).pooled
    masses = reference.block_masses(q, k, lse, block_q=64, block_k=64, scale=SCALE)
    pooled_masses = reference.pooled_masses(
        q, pooled.k_mean, pooled.log_sizes, lse, block_q=64, scale=SCALE
    )
    return reference.tail_error(masses, pooled_masses, v, pooled.v_mean)


def padded(batch=1):
    """A bias that hides the last tokens of the text behind the video, and weighs one before it."""
    bias = torch.zeros(batch, LAYOUT.tokens)
    bias[:, -25:] = -1e30
    bias[:, 3] = 1.5
    return bias


def in_order(run, *tensors):
    return [reference.in_order(x, run.order) for x in tensors]

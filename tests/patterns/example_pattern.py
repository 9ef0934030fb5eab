"""A pattern of two layers, as tests of files and of reuse begin with."""

import torch

from sparse_attn.block_mask import BlockMask
from sparse_attn.call import LayerName
from sparse_attn.patterns.pattern import CarriedLayer, CarriedPattern
from sparse_attn.token_layout import TokenLayout

NAME = LayerName("positive", "double", 0, 0)
FAMILY = "Wan"
# 20 text tokens and 620 of video: ten blocks
LAYOUT = TokenLayout(20, 5, 4, 31)


def a_pattern():
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(2):
        keep = torch.rand(1, 3, 10, 10, generator=generator) < 0.4
        keep[..., 0] = True
        bits = BlockMask.from_dense(keep, block_q=64, block_k=64).bits
        layers[NAME._replace(block_index=index)] = CarriedLayer(bits, (0.4,) * 3, (0.9, 0.8, 0.7))
    return CarriedPattern(FAMILY, LAYOUT, "64", layers)

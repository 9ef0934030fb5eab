"""An LSE in eight bits, for what is kept between steps.

Of every `GROUP` tokens that follow each other the smallest is kept, and how many of 255 steps to the
largest every other one lies above it. A row's LSE then errs by half a step at most, r / 510 where the
LSE of its group span r, so that its share of a block's mass errs by a factor of exp(r / 510): 2 % where
it spans 10. From step to step an LSE changes by more.
"""

import torch
import torch.nn.functional as F

GROUP = 256
STEPS = 255
# float16 rounds by less than this share; so no LSE lies outside the range that is kept
MARGIN = 2.0**-10
# float16 holds no less
LOWEST = -6e4
# the least step, at which float16 still rounds by so little
LEAST_STEP = 2.0**-13


def packed_bytes(tokens: int) -> int:
    """Bytes of one head."""
    groups = -(-tokens // GROUP)
    return tokens + tokens % 2 + 4 * groups


def pack(lse: torch.Tensor) -> torch.Tensor:
    """`lse` [B, H, L] float32 as [B, H, bytes] uint8; NaN and infinity make their group NaN.

    A row without any key, -inf or as low as a bias, takes the least value of its group: it has no part
    in a mass, whatever its LSE.
    """
    tokens = lse.shape[-1]
    groups = F.pad(lse, (0, -tokens % GROUP), mode="replicate").unflatten(-1, (-1, GROUP))
    high = groups.amax(-1)
    low = groups.masked_fill(groups < LOWEST, torch.inf).amin(-1).clamp(max=-LOWEST)
    low = (low - MARGIN * low.abs()).half()
    step = ((high - low.float()) * (1 + MARGIN) / STEPS).clamp(min=LEAST_STEP).half()
    levels = (groups - low.float()[..., None]) / step.float()[..., None]
    levels = levels.round_().nan_to_num_(0.0).clamp_(0, STEPS).to(torch.uint8).flatten(-2)
    ranges = torch.stack([low, step], -1).flatten(-2).view(torch.uint8)
    return torch.cat([levels[..., : tokens + tokens % 2], ranges], -1)


def unpack(packed: torch.Tensor, tokens: int) -> torch.Tensor:
    """What was packed, [B, H, L] float32."""
    even = tokens + tokens % 2
    ranges = packed[..., even:].contiguous().view(torch.float16).float()
    low, step = ranges.unflatten(-1, (-1, 2)).unbind(-1)
    levels = F.pad(packed[..., :even], (0, -even % GROUP)).unflatten(-1, (-1, GROUP))
    return torch.addcmul(low[..., None], levels, step[..., None]).flatten(-2)[..., :tokens]

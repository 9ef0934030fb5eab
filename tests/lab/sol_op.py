"""Sol-Attn as comfy-kitchen runs it, for whole generations; needs its `sol_attn` and a GPU."""

import torch
import torch.nn.functional as F
from rivals import means
from rule import AT_TAU

HEAD_DIM = 128
TAU = 1.3


def standing_out(q, k):
    """By how much more than usual blocks weigh, in comfy-kitchen's units, and which are taken anyway."""
    q_mean, k_mean = means(q, 64), means(k, 64)
    k_mean = k_mean - k_mean.mean(2, keepdim=True)
    spread = (q_mean.square() @ k_mean.square().mean(2)[..., None]).sqrt()
    number = torch.arange(q_mean.shape[2], device=q.device)
    near = (number[:, None] - number).abs() <= 1
    return (q_mean @ k_mean.mT) / spread, near


def threshold_for(q, k, density: float):
    """comfy-kitchen's `tau` at which the share `density` of the blocks is exact, and the blocks."""
    stands_out, near = standing_out(q, k)
    low, high = -9.0, 9.0
    for _ in range(40):
        tau = (low + high) / 2
        few = ((stands_out > tau) | near).float().mean() < density
        low, high = (low, tau) if few else (tau, high)
    return tau, (stands_out > tau) | near


class Op:
    """`attend` by the op in one generation, dense up to step `first`; as `rivals.Rival`."""

    def __init__(self, rule, first: int):
        self.rule, self.first = rule, first
        self.steps: dict[int, int] = {}
        self.densities: list[torch.Tensor] = []

    def density(self) -> float:
        return float(torch.stack(self.densities).mean()) if self.densities else 1.0

    def attend(self, layer: int, q, k, v):
        self.steps[layer] = self.steps.get(layer, -1) + 1
        if self.steps[layer] <= self.first:
            return None
        out, share = attend(self.rule, q, k, v)
        self.densities.append(share)
        return out


def attend(rule, q, k, v):
    """The op's output for [B, H, L, D], and the share of blocks it takes exactly."""
    import comfy_kitchen

    scale, width = q.shape[-1] ** -0.5, q.shape[-1]
    if rule.score == AT_TAU:
        stands_out, near = standing_out(q, k)
        options, share = {"tau": TAU}, ((stands_out > TAU) | near).float().mean()
    elif rule.score == "sol op":
        tau, exact = threshold_for(q, k, rule.density)
        options, share = {"tau": tau}, exact.float().mean()
    else:
        options, share = {"topk_ratio": rule.density}, torch.tensor(rule.density, device=q.device)
    # its heads have 128 channels; more of them hold zeros
    wide = [F.pad(x, (0, HEAD_DIM - width)).transpose(1, 2).contiguous() for x in (q, k, v)]
    out = comfy_kitchen.sol_attn(*wide, scale=scale, **options)
    return out.transpose(1, 2)[..., :width].contiguous(), share

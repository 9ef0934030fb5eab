"""The optimiser of the small models' matrices."""

import math

import torch
from networks import precision


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps; all matrices of a shape at once.

    https://kellerjordan.github.io/posts/muon/ ; the scale makes its steps as large as AdamW's.
    """

    def __init__(self, params: list[torch.Tensor], momentum: float = 0.95):
        self.momentum = momentum
        shapes = sorted({tuple(p.shape) for p in params})
        self.groups = [[p for p in params if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in group])
            buffer.lerp_(grad, 1 - self.momentum)
            x = torch.lerp(grad, buffer, self.momentum).to(precision(grad.device))
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = (x.mT if tall else x).float()
            scale = 0.2 * math.sqrt(max(x.shape[1:]))
            torch._foreach_mul_(group, 1 - lr * weight_decay)
            torch._foreach_add_(group, list(x.unbind()), alpha=-lr * scale)

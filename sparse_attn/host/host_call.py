"""One attention call in ComfyUI's own form."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..sentences import Sentence
from .guard import beside

# keeps the sum of a bias and a logit inside float32
LOWEST_BIAS = -1e30


@dataclass(frozen=True, eq=False)
class HostCall:
    """One attention call as ComfyUI made it, and how ComfyUI would serve it.

    Args:
        attention: the host's, or the override that stood before ours.
        q, k, v: [B, L, H * D], or [B, H, L, D] with `skip_reshape`.
        named: the other arguments.
        foreign: whether `attention` is another node's, which may depend on the whole call.
    """

    attention: Callable
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    mask: torch.Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool
    named: dict
    foreign: bool = False

    def as_it_came(self):
        """What the host would return."""
        with beside():
            form = {
                "skip_reshape": self.skip_reshape,
                "skip_output_reshape": self.skip_output_reshape,
            }
            return self.attention(
                self.q, self.k, self.v, self.heads, mask=self.mask, **form, **self.named
            )

    def in_heads(self) -> list[torch.Tensor]:
        """q, k and v as [B, H, L, D]."""
        return [
            x if self.skip_reshape else to_heads(x, self.heads) for x in (self.q, self.k, self.v)
        ]

    def wants_gradients(self) -> bool:
        tensors = self.q, self.k, self.v, self.mask
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def of_conditioning(self, number: int, rows: slice) -> "HostCall":
        """The rows of one conditioning, with options that name this one alone."""
        mask, options = self.mask, dict(self.named["transformer_options"])
        if mask is not None and mask.ndim > 2 and mask.shape[0] > 1:
            mask = mask[rows]
        for name in ("uuids", "cond_or_uncond"):
            options[name] = options[name][number : number + 1]
        named = {**self.named, "transformer_options": options}
        q, k, v = (x[rows] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, mask=mask, named=named)

    def dense(self, heads: int | None = None) -> torch.Tensor:
        """The host's attention of the first `heads`, or of all; [B, H, L, D]."""
        host = self
        if heads is not None:
            q, k, v = (x[:, :heads] for x in self.in_heads())
            form = {"skip_reshape": True, "skip_output_reshape": True}
            host = replace(self, q=q, k=k, v=v, heads=q.shape[1], **form)
        out = host.as_it_came()
        # not every override knows `skip_output_reshape`
        return out if out.ndim == 4 else to_heads(out, host.heads)


def key_bias_of(mask, batch: int, tokens: int) -> tuple[torch.Tensor | None, str]:
    """Read a mask that is the same for every query and head as a bias per key.

    Args:
        mask: None, or [..., 1, L] bool (True is kept) or additive float, up to four dimensions.

    Returns:
        [B, L] float32 or None, and the reason when the mask is of another kind.
    """
    if mask is None:
        return None, ""
    shape = tuple(mask.shape)
    rows = shape[0] if mask.ndim > 2 else 1
    whole = mask.ndim in (2, 3, 4) and all(size == 1 for size in shape[1:-1])
    if mask.ndim == 2:
        whole = shape[0] == 1
    if not whole or shape[-1] != tokens or rows not in (1, batch):
        return None, Sentence("why_mask", shape=str(list(shape)))
    bias = mask.reshape(rows, tokens)
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, LOWEST_BIAS)
    return bias.float().clamp(min=LOWEST_BIAS).expand(batch, tokens), ""


def to_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, H * D] -> [B, H, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

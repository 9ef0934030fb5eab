"""The rivals' rules, in plain torch and in the model's own order of tokens.

A rival runs dense up to the step at which the pack would search, so that all have equally many
dense steps; from then on it keeps as many blocks as the pack's even budget, and all of the text.

    pooled               mean query times mean key, the best of every row, anew at every step
    threshold            the same scores, whatever stands out by a number of standard deviations
    random, radial       blocks by chance; near in space, the nearer the further in time
    mass, tail error     what a block holds of the attention; what its pseudo key would leave of error
    spatial or temporal  near in time or near in space, whichever holds more of a head's attention
"""

import torch
import torch.nn.functional as F
from check_model import block_masses
from rule import Rule

EVERY_STEP = ("pooled", "threshold")
EXACT = ("exact mass", "tail error")
SCORES = (*EVERY_STEP, *EXACT, "random", "radial", "spatial or temporal")
BLOCK = 64
CHUNK_BYTES = 3 << 29


def sizes(length: int, block: int = BLOCK, device=None) -> torch.Tensor:
    """Tokens of every block, [N] float32."""
    return (length - torch.arange(0, length, block, device=device)).clamp(max=block).float()


def blocks_of(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """[..., L, D] -> [..., N, block, D], padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def means(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Mean of every block of [..., L, D], float32."""
    return blocks_of(x.float(), block).sum(-2) / sizes(x.shape[-2], block, x.device)[:, None]


def places(layout, block: int = BLOCK) -> torch.Tensor:
    """Mean (t, h, w) of the video tokens of every block, [N, 3]; NaN for a block without any."""
    sides = (layout.frames, layout.height, layout.width)
    grid = torch.meshgrid(*(torch.arange(n).float() for n in sides), indexing="ij")
    video = torch.stack([axis.flatten() for axis in grid], -1)
    spots = F.pad(video, (0, 0, layout.before, layout.after), value=float("nan"))
    spots = F.pad(spots, (0, 0, 0, -len(spots) % block), value=float("nan"))
    return spots.unflatten(0, (-1, block)).nanmean(1)


def text_blocks(layout, block: int = BLOCK) -> torch.Tensor:
    """[N] bool: blocks that hold a token outside the video."""
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.before : layout.before + layout.video] = False
    return F.pad(text, (0, -len(text) % block)).unflatten(0, (-1, block)).any(1)


def row_chunks(q, per_row: int):
    """Slices of the query rows, whole blocks each, whose logits fit `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (12 * per_row * q.shape[1]) // BLOCK) * BLOCK
    return [slice(start, start + rows) for start in range(0, q.shape[2], rows)]


def best_in_rows(scores, budget: int, sink_k):
    """Keep the `budget` best blocks of every row, those of `sink_k` first."""
    best = scores.masked_fill(sink_k, float("inf")).topk(budget, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def best_of_layer(scores, budget: int, least: int, sink_q, sink_k):
    """Keep the best blocks of a layer, `budget` a row on average and `least` at least.

    Rows of text get none here.
    """
    sure = best_in_rows(scores, least, sink_k) & ~sink_q[:, None]
    ranked = scores.masked_fill(sink_q[:, None], float("-inf")).masked_fill(sure, float("inf"))
    count = scores.shape[1] * (scores.shape[2] - int(sink_q.sum())) * budget
    best = ranked.flatten(1).topk(count, dim=-1).indices
    return torch.zeros_like(sure.flatten(1)).scatter_(-1, best, True).view_as(scores)


def attention(q, k, v, keep, tail: str):
    """[B, H, L, D]: attention over kept blocks, with a pooled tail over one pseudo key per other.

    A pseudo key is a block's mean key and has its mean value and the weight of its size.
    """
    L, scale = q.shape[2], q.shape[-1] ** -0.5
    keys, values = k.float(), v.float()
    if tail == "pooled":
        keys, values = torch.cat([keys, means(k)], 2), torch.cat([values, means(v)], 2)
    out = torch.empty_like(q)
    for rows in row_chunks(q, keys.shape[2]):
        logits = q[:, :, rows].float() @ keys.mT * scale
        kept = keep[:, :, rows.start // BLOCK : -(-rows.stop // BLOCK)]
        kept = kept.repeat_interleave(BLOCK, 2)[:, :, : logits.shape[2]]
        logits[..., :L].masked_fill_(~kept.repeat_interleave(BLOCK, 3)[..., :L], float("-inf"))
        if tail == "pooled":
            logits[..., L:] += sizes(L, device=q.device).log()
            logits[..., L:].masked_fill_(kept, float("-inf"))
        out[:, :, rows] = (logits.softmax(-1) @ values).to(q.dtype)
    return out


def tail_errors(q, k, v):
    """[B, H, N, N]: by how much outputs change where a block's pseudo key stands for the block.

    To first order in that one change: with weights p of the block's keys and p' of its pseudo key, the
    length of sum(p * (v - out)) - p' * (mean v - out), summed over the block's queries.
    """
    scale, length, n = q.shape[-1] ** -0.5, q.shape[2], sizes(q.shape[2], device=q.device)
    key_means, value_means, values = means(k), means(v), blocks_of(v.float())
    found = torch.empty(*q.shape[:2], len(n), len(n), device=q.device)
    step = max(1, row_chunks(q, k.shape[2] + len(n) * v.shape[-1])[0].stop // BLOCK // q.shape[0])
    for batch in range(q.shape[0]):
        for first in range(0, len(n), step):
            rows = q[batch, :, first * BLOCK : (first + step) * BLOCK].float()
            logits = rows @ k[batch].float().mT * scale
            lse = logits.logsumexp(-1, keepdim=True)
            weights = F.pad((logits - lse).exp(), (0, len(n) * BLOCK - length)).unflatten(
                -1, (-1, BLOCK)
            )
            moved = torch.einsum("hrnb,hnbd->hrnd", weights, values[batch])
            out = moved.sum(2, keepdim=True)
            pseudo = (rows @ key_means[batch].mT * scale + n.log() - lse).exp()[..., None]
            mass = weights.sum(-1)[..., None]
            error = moved - mass * out - pseudo * (value_means[batch][:, None] - out)
            error = F.pad(error.norm(dim=-1), (0, 0, 0, -rows.shape[1] % BLOCK))
            summed = error.unflatten(1, (-1, BLOCK)).sum(2)
            found[batch, :, first : first + summed.shape[1]] = summed
    return found


class Rival:
    """`attend` of one rule in one generation, for `models.override`.

    Args:
        first: number of the step up to which attention stays dense, inclusive.
    """

    def __init__(self, rule: Rule, layout, first: int):
        self.rule, self.first = rule, first
        self.sinks, self.spots = text_blocks(layout), places(layout)
        self.steps: dict[int, int] = {}
        self.masks: dict[int, torch.Tensor] = {}
        self.densities: list[torch.Tensor] = []

    def density(self) -> float:
        """Mean share of block pairs kept over the sparse steps and layers."""
        return float(torch.stack(self.densities).mean()) if self.densities else 1.0

    @torch.no_grad()
    def attend(self, layer: int, q, k, v):
        step = self.steps[layer] = self.steps.get(layer, -1) + 1
        every = self.rule.score in EVERY_STEP
        if step > self.first if every else step == self.first:
            self.masks[layer] = self.choose(layer, q, k, v)
        if step <= self.first:
            return None
        self.densities.append(self.masks[layer].float().mean())
        return attention(q, k, v, self.masks[layer], self.rule.tail)

    def choose(self, layer: int, q, k, v) -> torch.Tensor:
        """[B, H, N, N] bool; rows and columns with text keep everything."""
        sinks = self.sinks.to(q.device)
        number = len(sinks)
        budget = max(round(self.rule.density * number), int(sinks.sum()) + 1)
        if self.rule.score in EVERY_STEP:
            scores = means(q) @ means(k).mT * q.shape[-1] ** -0.5
        else:
            scores = self.static(layer, q, k, v, budget)
        if self.rule.score == "threshold":
            spread = scores.std(-1, keepdim=True).clamp(min=1e-6)
            scores = (scores - scores.mean(-1, keepdim=True)) / spread
            least = min(budget, int(sinks.sum()) + 1)
            keep = best_of_layer(scores, budget, least, sinks, sinks)
        else:
            keep = best_in_rows(scores, budget, sinks)
        return keep | sinks[:, None]

    def static(self, layer: int, q, k, v, budget: int) -> torch.Tensor:
        """[B, H, N, N] scores of rules that do not look at every query and key."""
        sinks, spots = self.sinks.to(q.device), self.spots.to(q.device)
        shape = (*q.shape[:2], len(spots), len(spots))
        if self.rule.score in EXACT:
            return tail_errors(q, k, v) if self.rule.score == "tail error" else block_masses(q, k)
        if self.rule.score == "random":
            generator = torch.Generator(q.device).manual_seed(layer)
            return torch.rand(shape, device=q.device, generator=generator)
        apart = (spots[:, None] - spots[None]).nan_to_num().abs()
        in_time, in_space = apart[..., 0], apart[..., 1:].square().sum(-1).sqrt()
        if self.rule.score == "radial":
            # the reach in space halves whenever the distance in time doubles
            reach = 2.0 ** -in_time.clamp(min=1).log2().floor()
            return (-(in_space / reach) - 1e-3 * in_time).expand(shape)
        spatial, temporal = -in_time - 1e-3 * in_space, -in_space - 1e-3 * in_time
        masses, held = block_masses(q, k), []
        for scores in (spatial, temporal):
            keep = best_in_rows(scores.expand(shape), budget, sinks) | sinks[:, None]
            held.append((masses * keep).sum((-1, -2)))
        return torch.where((held[0] > held[1])[..., None, None], spatial, temporal)

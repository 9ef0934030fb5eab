"""From scores to kept blocks: equal counts for every rule, text always kept."""

import torch

from sparse_attn.block_mask import recall
from sparse_attn.method.head_adaptive import budget_shift, head_budgets
from sparse_attn.method.selection import row_budget


def best_in_rows(scores, budgets, sink_k):
    """Keep the `budgets` best blocks of every row; budgets [B, H] or one number."""
    ranked = scores.masked_fill(sink_k, float("inf"))
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    if torch.is_tensor(budgets):
        budgets = budgets[..., None, None]
    return rank < budgets


def best_of_heads(key, budgets, least: int, sink_q, sink_k):
    """Keep the blocks of largest `key` in a head, `budgets` [B, H] a row on average."""
    sure = best_in_rows(key, least, sink_k) & ~sink_q[:, None]
    ranked = key.masked_fill(sink_q[:, None], float("-inf")).masked_fill(sure, float("inf"))
    rank = ranked.flatten(2).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    count = budgets * int((~sink_q).sum())
    return (rank < count[..., None]).view_as(key)


def best_of_layer(key, budget: int, least: int, sink_q, sink_k):
    """Keep the blocks of largest `key` in a layer, `budget` a row on average and `least` at least.

    Rows of text get none here.
    """
    sure = best_in_rows(key, least, sink_k) & ~sink_q[:, None]
    ranked = key.masked_fill(sink_q[:, None], float("-inf")).masked_fill(sure, float("inf"))
    count = key.shape[1] * (key.shape[2] - int(sink_q.sum())) * budget
    best = ranked.flatten(1).topk(count, dim=-1).indices
    keep = torch.zeros_like(sure.flatten(1)).scatter_(-1, best, True)
    return keep.view_as(key)


def share_before(scores):
    """Share of its row's sum that lies on blocks of higher score."""
    ordered, order = scores.clamp(min=0).sort(dim=-1, descending=True)
    before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.zeros_like(before).scatter_(-1, order, before)


def select(rule, scores, masses, sink_q, sink_k, density: float):
    """[B, H, Nq, Nk] bool; rows of text keep everything and are not counted.

    Args:
        scores: [B, H, Nq, Nk] float32, what to rank by.
        masses: exact masses, which the head-adaptive rule needs; None for rules without.
    """
    num_k = scores.shape[-1]
    sinks = int(sink_k.sum())
    budget = row_budget(density, num_k, sinks)
    least = min(budget, max(sinks + 1, budget // 4))
    if rule.score == "threshold":
        deviation = scores.std(-1, keepdim=True).clamp(min=1e-6)
        key = (scores - scores.mean(-1, keepdim=True)) / deviation
        keep = best_of_layer(key, budget, min(budget, sinks + 1), sink_q, sink_k)
    elif rule.budget == "global":
        keep = best_of_layer(scores, budget, least, sink_q, sink_k)
    elif rule.budget == "mass":
        keep = best_of_layer(-share_before(scores), budget, min(budget, sinks + 1), sink_q, sink_k)
    else:
        keep = best_in_rows(scores, budget, sink_k)
    shift = budget_shift(budget, num_k, sinks) if rule.head_adaptive else 0
    if shift:
        budgets = head_budgets(recall(masses, keep), budget, shift)
        if rule.budget == "mass":
            least = min(int(budgets.min()), sinks + 1)
            keep = best_of_heads(-share_before(scores), budgets, least, sink_q, sink_k)
        else:
            keep = best_in_rows(scores, budgets, sink_k)
    return keep | sink_q[:, None]


def static_scores(kind: str, spots_q, spots_k, shape, masses, sink_q, sink_k, density, seed: int):
    """Scores of rules that do not look at the model.

    Args:
        kind: "random", "radial" or "spatial or temporal".
        spots_q, spots_k: mean (t, h, w) of every block, [N, 3].
        shape: [B, H, Nq, Nk]. masses: exact ones, for the choice between spatial and temporal.
    """
    if kind == "random":
        generator = torch.Generator(spots_q.device).manual_seed(seed)
        return torch.rand(shape, device=spots_q.device, generator=generator)
    apart = (spots_q[:, None] - spots_k[None]).nan_to_num().abs()
    in_time, in_space = apart[..., 0], apart[..., 1:].square().sum(-1).sqrt()
    if kind == "radial":
        # the reach in space halves whenever the distance in time doubles
        reach = 2.0 ** -in_time.clamp(min=1).log2().floor()
        return (-(in_space / reach) - 1e-3 * in_time).expand(shape)
    spatial = -in_time - 1e-3 * in_space
    temporal = -in_space - 1e-3 * in_time
    budget = row_budget(density, shape[-1], int(sink_k.sum()))
    held = []
    for scores in (spatial, temporal):
        keep = best_in_rows(scores.expand(shape), budget, sink_k) | sink_q[:, None]
        held.append(recall(masses, keep))
    better = (held[0] > held[1])[..., None, None]
    return torch.where(better, spatial, temporal)

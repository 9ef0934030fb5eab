"""Runs one rule over the sparse steps of a generation; the seeds are a batch.

What a dense search step saw is captured once (`Captured`) and shared by all rules, because up to
and including that step every rule's generation is the dense one.
"""

import clusters
import sol_op
import torch
import torch.nn.functional as F
from orders import arranged, order_of, places, put_back, text_blocks
from rule import Rule
from scores import analyse, grouped, means
from selecting import select, static_scores
from sparse import SparseAttention, masses_with
from tails import Tail, fake_fp8, fake_int8, smooth

from sparse_attn.block_mask import recall
from sparse_attn.method.recall import sample_rows

STATIC = ("random", "radial", "spatial or temporal")
GROUP = 64  # query rows of an analysis; larger blocks are sums of it


class Captured:
    """q, k and v of every layer at a search step, and what was measured on them."""

    def __init__(self, layout):
        self.layout = layout
        self.qkv: dict[int, tuple] = {}
        self.known: dict[tuple, dict] = {}
        self.orders: dict[tuple, torch.Tensor | None] = {}

    def keep(self, layer, q, k, v):
        self.qkv[layer] = tuple(x.contiguous() for x in (q, k, v))

    def fixed(self, name: str, device):
        """An order of all heads; of clusters what they have in common, that text comes last."""
        name = "rods" if name in clusters.NAMES else name
        if (name, device) not in self.orders:
            order = order_of(name, self.layout)
            self.orders[name, device] = None if order is None else order.to(device)
        return self.orders[name, device]

    def order(self, layer: int, name: str):
        """The order at the search."""
        q, k, _ = self.qkv[layer]
        if name not in clusters.NAMES:
            return self.fixed(name, q.device)
        if (name, layer) not in self.orders:
            self.orders[name, layer] = clusters.cluster_order(name, q, k, self.layout)
        return self.orders[name, layer]

    def found(self, layer: int, rule: Rule) -> dict:
        """Scores at the search in the rule's order, measured once for all rules."""
        group = min(GROUP, rule.block_q)
        key = layer, rule.order, group, rule.block_k
        if key not in self.known:
            order = self.order(layer, rule.order)
            qkv = (arranged(x, order) for x in self.qkv[layer])
            self.known[key] = analyse(*qkv, block_q=group, block_k=rule.block_k)
        return grouped(self.known[key], rule.block_q // group)


class Run:
    """`attend` of one rule; call `begin` before every step.

    Args:
        captured: of the search step that precedes the first sparse step.
        first: number of that search step. steps: of the whole schedule.
        record: whether to sample the recall at every sparse step (`recalls[step][layer]`).
    """

    def __init__(self, rule: Rule, captured: Captured, first: int, steps: int, record=False):
        self.rule, self.captured, self.first, self.steps = rule, captured, first, steps
        self.again = {round(share * steps) for share in rule.again}
        self.record, self.recalls = record, {}
        self.sparse: dict[int, SparseAttention] = {}
        self.tails: dict[int, Tail | None] = {}
        self.orders: dict[int, torch.Tensor | None] = {}
        self.founds: dict[int, dict] = {}
        count = max(1, steps - first - 1)
        grades = [rule.grades[i * len(rule.grades) // count] for i in range(count)]
        self.grades = [grade * count / sum(grades) for grade in grades]
        self.chosen: dict[int, float] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.kept_lse: dict[int, torch.Tensor] = {}
        self.held: dict[int, torch.Tensor] = {}
        self.densities: dict[int, torch.Tensor] = {}
        self.total, self.calls = 0.0, 0
        self.searches = 0
        self.sinks = None
        self.first_order: list[torch.Tensor] = []  # share of the heads that took it
        self.step = first

    def begin(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def attend(self, layer: int, q, k, v):
        rule, scale = self.rule, q.shape[-1] ** -0.5
        if rule.quantised:
            k = smooth(k)
            q, k, v = fake_int8(q), fake_int8(k), fake_fp8(v)
        if rule.dense:
            return F.scaled_dot_product_attention(q, k, v)
        if rule.score in sol_op.SCORES:
            out, share = sol_op.attend(rule, q, k, v)
            self.total, self.calls = self.total + share, self.calls + 1
            return out
        if self.sinks is None:
            self.lay_out(q.device)
        fresh = self.look(layer, q, k, v, scale)
        order = self.orders[layer]
        q, k, v = (arranged(x, order) for x in (q, k, v))
        self.prepare(layer, q, k, scale, fresh)
        self.total, self.calls = self.total + self.densities[layer], self.calls + 1
        out, lse = self.sparse[layer](q, k, v, scale)
        if rule.lse == "sparse":
            self.kept_lse[layer] = lse
        if self.tails[layer] is not None:
            out = self.tails[layer].apply(q, k, v, out, lse, scale)
        if self.record:
            self.recalls.setdefault(self.step, {})[layer] = self.sampled(layer, q, k, scale)
        return put_back(out, order)

    def density(self) -> float:
        """Mean share of block pairs kept over the sparse steps and layers."""
        return float(self.total) / self.calls if self.calls else 1.0

    def lay_out(self, device) -> None:
        order = self.captured.fixed(self.rule.order, torch.device("cpu"))
        layout, blocks = self.captured.layout, (self.rule.block_q, self.rule.block_k)
        self.sinks = [text_blocks(layout, order, b).to(device) for b in blocks]
        self.spots = [places(layout, order, b).to(device) for b in blocks]

    def look(self, layer, q, k, v, scale) -> bool:
        """Make sure that the layer has its order and its scores; whether they are new."""
        rule, captured = self.rule, self.captured
        known, again = layer in self.orders, self.step in self.again
        if known and not again and not self.drifted(layer, k):
            return False
        first = not (known or again)
        if first and rule.every_step:
            self.orders[layer] = captured.order(layer, rule.order)
            return True
        candidates = []
        for name in (rule.order, "rods") if rule.choose else (rule.order,):
            if first or name not in clusters.NAMES:
                order = captured.order(layer, name)
            else:
                order = clusters.cluster_order(name, q, k, captured.layout)
            if first:
                found = captured.found(layer, rule.but(rule.name, order=name))
            else:
                found = self.search(layer, *(arranged(x, order) for x in (q, k, v)), scale)
            candidates.append((order, found))
        if rule.choose:
            candidates = [self.better(*candidates)]
        order, found = candidates[0]
        if rule.carried:
            found = {name: x.roll(1, 0) for name, x in found.items()}
            order = order.roll(1, 0) if order is not None and order.ndim == 3 else order
        self.orders[layer], self.founds[layer] = order, found
        if rule.drift:
            then = captured.qkv[layer][1] if first else k
            self.keys[layer] = means(arranged(then, order), rule.block_k)
        self.searches += not first
        return True

    def better(self, one, other) -> tuple:
        """Of two orders with their scores, in every head the one that leaves less."""
        left = []
        for _, found in (one, other):
            keep = select(self.rule, found[self.rule.score], found["mass"], *self.sinks,
                          self.rule.density)  # fmt: skip
            left.append((found[self.rule.score] * ~keep).sum((-1, -2)))
        first = left[0] < left[1]
        self.first_order.append(first.float().mean())

        def mixed(a, b):
            b = b.expand_as(a)
            return torch.where(first.view(*first.shape, *[1] * (a.ndim - 2)), a, b)

        return mixed(one[0], other[0]), {
            name: mixed(x, other[1][name]) for name, x in one[1].items()
        }

    def prepare(self, layer, q, k, scale, fresh: bool) -> None:
        """Make sure that the layer has the mask of this step."""
        rule, density = self.rule, self.wanted(layer)
        if rule.every_step:
            number_q, number_k = means(q, rule.block_q), means(k, rule.block_k)
            found = {"pooled": number_q @ number_k.mT * scale}
            found["threshold"] = found["pooled"]
            return self.choose(layer, found, density, q)
        if fresh or self.chosen.get(layer) != density:
            self.choose(layer, self.founds[layer], density, q)
            self.chosen[layer] = density

    def wanted(self, layer) -> float:
        """The density of this step and layer."""
        layers = self.rule.layers
        weight = layers[layer % len(layers)] if layers else 1.0
        return min(1.0, self.rule.density * self.grades[self.step - self.first - 1] * weight)

    def drifted(self, layer, k) -> bool:
        if not self.rule.drift:
            return False
        now = means(arranged(k, self.orders[layer]), self.rule.block_k)
        then = self.keys[layer]
        spread = (then - then.mean(2, keepdim=True)).norm()
        return bool((now - then).norm() > self.rule.drift * spread)

    def search(self, layer, q, k, v, scale) -> dict:
        rule = self.rule
        if rule.lse == "exact":
            group, tails = min(GROUP, rule.block_q), rule.score in ("deficit", "block tail")
            found = analyse(
                q, k, v, block_q=group, block_k=rule.block_k, scale=scale, tails=tails
            )  # fmt: skip
            return grouped(found, rule.block_q // group)
        if rule.lse == "cached":
            lse = self.founds[layer]["lse"]
        else:
            keep, mass = self.sparse[layer].keep, self.founds[layer]["mass"]
            rows = ((mass * keep).sum(-1) / mass.sum(-1)).clamp(min=1e-6).log()
            rows = rows.repeat_interleave(rule.block_q, -1)[..., : q.shape[2]]
            lse = self.kept_lse[layer] - rows
        masses = masses_with(q, k, lse, rule.block_q, rule.block_k, scale)
        return {"mass": masses, "lse": lse}

    def choose(self, layer, found, density, q) -> None:
        rule, masses = self.rule, found.get("mass")
        if rule.score in STATIC:
            scores = static_scores(
                rule.score, *self.spots, masses.shape, masses, *self.sinks, density, layer
            )
        else:
            scores = found[rule.score]
        keep = select(rule, scores, masses, *self.sinks, density)
        self.sparse[layer] = SparseAttention(keep, rule.block_q, rule.block_k, q.device)
        self.densities[layer] = keep.float().mean()
        if masses is not None and layer not in self.held:
            self.held[layer] = recall(masses, keep).mean()
        has_tail = rule.tail != "none"
        self.tails[layer] = Tail(rule, keep, q.shape[2], found) if has_tail else None

    def sampled(self, layer, q, k, scale):
        """Recall of today's mask on 64 query rows, [B, H] means over the rows."""
        rows = torch.tensor(sample_rows(q.shape[2], 64), device=q.device)
        weights = (q[:, :, rows].float() @ k.float().mT * scale).softmax(-1)
        kept = self.sparse[layer].keep[:, :, rows // self.rule.block_q]
        kept = kept.repeat_interleave(self.rule.block_k, -1)[..., : q.shape[2]]
        return (weights * kept).sum(-1).mean()

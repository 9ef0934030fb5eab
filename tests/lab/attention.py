"""Runs one rule over the sparse steps of a generation; the seeds are a batch.

What a dense search step saw is captured once (`Captured`) and shared by all rules, because up to
and including that step every rule's generation is the dense one.
"""

import torch
import torch.nn.functional as F
from orders import order_of, places, text_blocks
from rule import Rule
from scores import QUICK, SCORES, analyse, grouped, means
from selecting import select, static_scores
from sparse import SparseAttention, masses_with
from tails import Tail, fake_fp8, fake_int8, smooth

from sparse_attn.recall import recall, sample_rows

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

    def order(self, name: str, device):
        if (name, device) not in self.orders:
            order = order_of(name, self.layout)
            self.orders[name, device] = None if order is None else order.to(device)
        return self.orders[name, device]

    def found(self, layer: int, rule: Rule) -> dict:
        """Scores at the search in the rule's order, measured once for all rules."""
        group = min(GROUP, rule.block_q)
        wanted = QUICK if rule.score in (*QUICK, *STATIC) else SCORES
        key = layer, rule.order, group, rule.block_k, wanted
        if key not in self.known:
            q, k, v = self.qkv[layer]
            order = self.order(rule.order, q.device)
            if order is not None:
                q, k, v = (x[:, :, order] for x in (q, k, v))
            self.known[key] = analyse(q, k, v, wanted, block_q=group, block_k=rule.block_k)
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
        self.founds: dict[int, dict] = {}
        self.grade: dict[int, float] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.kept_lse: dict[int, torch.Tensor] = {}
        self.held: dict[int, torch.Tensor] = {}
        self.densities: dict[int, torch.Tensor] = {}
        self.total, self.calls = 0.0, 0
        self.searches = 0
        self.sinks = None
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
        order = self.captured.order(rule.order, q.device)
        if order is not None:
            q, k, v = (x[:, :, order] for x in (q, k, v))
        self.prepare(layer, q, k, v, scale)
        self.total, self.calls = self.total + self.densities[layer], self.calls + 1
        out, lse = self.sparse[layer](q, k, v, scale)
        if rule.lse == "sparse":
            self.kept_lse[layer] = lse
        if self.tails[layer] is not None:
            out = self.tails[layer].apply(q, k, v, out, lse, scale)
        if self.record:
            self.recalls.setdefault(self.step, {})[layer] = self.sampled(layer, q, k, scale)
        if order is not None:
            out = torch.empty_like(out).index_copy_(2, order, out)
        return out

    def density(self) -> float:
        """Mean share of block pairs kept over the sparse steps and layers."""
        return float(self.total) / self.calls if self.calls else 1.0

    def prepare(self, layer, q, k, v, scale) -> None:
        """Make sure that the layer has the mask of this step."""
        rule, progress = self.rule, self.step - self.first - 1
        part = progress * len(rule.grades) // max(1, self.steps - self.first - 1)
        grade = rule.grades[min(part, len(rule.grades) - 1)]
        if self.sinks is None:
            order = self.captured.order(rule.order, torch.device("cpu"))
            layout = self.captured.layout
            blocks = (rule.block_q, rule.block_k)
            self.sinks = [text_blocks(layout, order, b).to(q.device) for b in blocks]
            self.spots = [places(layout, order, b).to(q.device) for b in blocks]
        if rule.every_step:
            number_q, number_k = means(q, rule.block_q), means(k, rule.block_k)
            found = {"pooled": number_q @ number_k.mT * scale}
            found["threshold"] = found["pooled"]
            return self.choose(layer, found, grade, q)
        fresh = layer not in self.founds
        if fresh:
            found = self.captured.found(layer, rule)
            if rule.carried:
                found = {name: x.roll(1, 0) for name, x in found.items()}
            self.founds[layer] = found
            if rule.drift:
                self.keys[layer] = means(self.ordered_keys(layer), rule.block_k)
        elif self.step in self.again or self.drifted(layer, k):
            self.founds[layer] = self.search(layer, q, k, v, scale)
            self.keys[layer] = means(k, rule.block_k)
            self.searches += 1
            fresh = True
        if fresh or self.grade.get(layer) != grade:
            self.choose(layer, self.founds[layer], grade, q)
            self.grade[layer] = grade

    def ordered_keys(self, layer):
        k = self.captured.qkv[layer][1]
        order = self.captured.order(self.rule.order, k.device)
        return k if order is None else k[:, :, order]

    def drifted(self, layer, k) -> bool:
        if not self.rule.drift:
            return False
        then, now = self.keys[layer], means(k, self.rule.block_k)
        spread = (then - then.mean(2, keepdim=True)).norm()
        return bool((now - then).norm() > self.rule.drift * spread)

    def search(self, layer, q, k, v, scale) -> dict:
        rule = self.rule
        if rule.lse == "exact":
            wanted = {rule.score} - set(STATIC) | ({"deficit"} if rule.tail != "none" else set())
            group = min(GROUP, rule.block_q)
            found = analyse(q, k, v, wanted, block_q=group, block_k=rule.block_k, scale=scale)
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

    def choose(self, layer, found, grade, q) -> None:
        rule = self.rule
        weight = rule.layers[layer % len(rule.layers)] if rule.layers else 1.0
        density = min(1.0, rule.density * grade * weight)
        masses = found.get("mass")
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

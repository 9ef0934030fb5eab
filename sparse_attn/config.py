"""What the user asked for: one frozen, validated value that travels whole."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .sentences import Sentence, UserError

MAX_SPARSITY = 0.98
# shares written with a decimal comma
COMMA_SHARES = re.compile(r"\s*[01],\d+([;,]?\s+[01],\d+)*\s*")
LEAST_RECALL, MAX_RECALL = 0.1, 0.999
# queries and keys per block, by what the node calls it
BLOCK_SIZES = {"64": (64, 64), "128": (128, 128), "128x64": (128, 64)}
TOKEN_ORDERS = ("similarity", "position")
# what a setting may be; the first is what an error proposes
CHOICES = {
    "block_size": tuple(BLOCK_SIZES),
    "cache": ("auto", "gpu", "cpu"),
    "dense_attention": ("auto", "host"),
    "precision": ("auto", "bf16", "int8", "fp8"),
    "tail": ("pooled", "none"),
    "token_order": TOKEN_ORDERS,
    "verdict": ("auto", "sparse", "dense"),
}


@dataclass(frozen=True)
class AdaSpaConfig:
    """How much to skip, and when to look for the pattern.

    Args:
        sparsity: share of block pairs that a sparse step skips, in [0, 0.98].
        block_size: tokens per block, a key of `BLOCK_SIZES`.
        warmup: share of the whole schedule that runs dense before the first search, in [0, 1);
            at least one does, unless it is 0 or a recall is asked for on fewer than 5.
        search_points: shares of the schedule at which the pattern is searched again, ascending,
            each in [warmup, 1). One equal to `warmup` is the first search itself.
        head_adaptive: let heads of high recall keep fewer blocks and heads of low recall more.
        dense_layers: attention layers that always run dense; negative numbers count from the end.
        start_percent, end_percent: shares of the schedule outside which every step is dense.
        min_tokens: shorter sequences run dense.
        cache: where masks and LSE live between steps: "gpu", "cpu" or "auto".
        dense_attention: who runs the dense steps: "auto" (fastest exact one) or "host".
        precision: of the attention itself: "int8" for sparse steps, for searches with a kept LSE
            and, where that is fastest, for dense steps and the first search, unless a recall is asked
            for; "bf16" and, for now, "auto" are as the model computes; "fp8", of older graphs, runs
            as "int8".
        recall: share of the attention that every head shall keep, in place of `sparsity`; 0 is off.
        tail: what stands for skipped blocks: "pooled" (their averages, with blocks that are compact
            pieces of the video) or "none" (nothing, with blocks in the model's order).
        token_order: what makes a block, with a tail: "similarity" (tokens that are alike, in every
            head for which that errs less than a compact piece of the video) or "position".
        search_gap: steps that lie at least between two searches; a search point that falls nearer
            to the search before it is left out. In a run's last step one takes place only where
            the pattern is kept for another run and this is 0.
        verdict: whether sparse is faster here: "auto" finds out in the first sparse step, once for each
            shape and settings, and runs the rest dense where it is not; "sparse" and "dense" pin it.
        query_stride: a search measures one of so many query rows, 1 or 4. A first search that knows
            the LSE of the step before may measure all in one pass with its dense attention.
        enabled: False leaves the model as it is.

    Raises:
        UserError: one sentence on what is wrong and what to try.
    """

    sparsity: float = 0.8
    block_size: str = "64"
    warmup: float = 0.12
    search_points: tuple[float, ...] = ()
    head_adaptive: bool = False
    dense_layers: tuple[int, ...] = ()
    start_percent: float = 0.0
    end_percent: float = 1.0
    min_tokens: int = 8192
    cache: str = "auto"
    dense_attention: str = "auto"
    enabled: bool = True
    precision: str = "auto"
    recall: float = 0.0
    tail: str = "pooled"
    token_order: str = "similarity"
    search_gap: int = 0
    verdict: str = "sparse"
    query_stride: int = 1

    def __post_init__(self):
        if not 0.0 <= self.sparsity <= MAX_SPARSITY:
            raise UserError(
                f"`sparsity` must be from 0 to {MAX_SPARSITY}, got {self.sparsity}. "
                "Try 0.8; 0 keeps every block."
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"`{name}` must be one of {', '.join(choices)}, got {value}. Try {choices[0]}."
                )
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(
                f"`warmup` must be a share of the schedule from 0 to below 1, got {self.warmup}. "
                "Try 0.12."
            )
        points = self.search_points
        if any(b <= a for a, b in pairwise(points)):
            raise UserError(
                f"`search_points` must ascend, got {list(points)}. Write them in order: 0.3, 0.6."
            )
        for point in points:
            if not self.warmup <= point < 1.0:
                raise UserError(
                    f"`search_points` must lie from the warm-up ({self.warmup}) to below 1, "
                    f"got {point}. The first search follows the warm-up by itself."
                )
        if self.head_adaptive and self.sparsity < 1 / 3:
            raise UserError(
                f"`head_adaptive` needs a sparsity of at least 0.34, got {self.sparsity}. "
                "Raise the sparsity or switch head-adaptive off."
            )
        if not 0.0 <= self.start_percent < self.end_percent <= 1.0:
            raise UserError(
                "`start_percent` must be at least 0 and below `end_percent`, which is at most 1, "
                f"got {self.start_percent} and {self.end_percent}. Try 0 and 1."
            )
        if self.query_stride not in (1, 4):
            raise UserError(f"`query_stride` must be 1 or 4, got {self.query_stride}. Try 4.")
        if self.min_tokens < 0:
            raise UserError(f"`min_tokens` must be 0 or more, got {self.min_tokens}. Try 8192.")
        if not (self.recall == 0 or LEAST_RECALL <= self.recall <= MAX_RECALL):
            raise UserError(
                f"`recall` must be 0 or from {LEAST_RECALL} to {MAX_RECALL}, got {self.recall}. "
                "Try 0.95; 0 leaves the choice to `sparsity`."
            )
        if self.recall and self.head_adaptive:
            raise UserError(
                "`recall` gives every head the blocks it needs by itself, so `head_adaptive` must "
                "be off. Switch one of them off; the preset Paper is head-adaptive."
            )

    @property
    def search_stride(self) -> int:
        """Of how many query rows a search measures one: all, where a recall is asked for."""
        return 1 if self.recall else self.query_stride

    @property
    def low_precision(self) -> str | None:
        """The low precision that the user asked for, or None."""
        return "int8" if self.precision in ("int8", "fp8") else None

    @property
    def pooled(self) -> bool:
        """Whether averages stand for skipped blocks."""
        return self.tail == "pooled" and not self.why_no_tail

    @property
    def by_similarity(self) -> bool:
        """Whether every search finds an order of its own for each head."""
        return self.pooled and self.token_order == "similarity"

    @property
    def why_no_tail(self) -> str:
        """Why nothing stands for skipped blocks although the user asked, or an empty string."""
        if self.tail == "none" or self.block_k == 64:
            return ""
        return Sentence("why_no_tail", size=self.block_size)

    @property
    def why_no_fp8(self) -> str:
        """Why eight bits are others than the user asked for, or an empty string."""
        return Sentence("why_no_fp8") if self.precision == "fp8" else ""

    @property
    def density(self) -> float:
        """Share of block pairs that a sparse step computes."""
        return 1.0 - self.sparsity

    @property
    def blocks(self) -> dict[str, int]:
        """Tokens per block, as the kernels call them."""
        return {"block_q": self.block_q, "block_k": self.block_k}

    @property
    def block_q(self) -> int:
        """Tokens per query block."""
        return BLOCK_SIZES[self.block_size][0]

    @property
    def block_k(self) -> int:
        """Tokens per key block."""
        return BLOCK_SIZES[self.block_size][1]


# a search costs about half a dense step or more: on a few steps, or soon after another one as in
# the second of two samplers, it would take back too much of the time
SEARCH_GAP = 3
# on the lab's three models closer to the dense video than 0.6, with hardly more flicker
HALFWAY = (0.45,)
# a quarter of the work: it keeps the recall to within 0.003, and whole videos are as close to the dense
# one, on those models that did not choose it, too (tests/lab/README.md)
QUERY_STRIDE = 4
# what no widget decides
NO_WIDGET: dict[str, Any] = {"search_gap": SEARCH_GAP, "query_stride": QUERY_STRIDE}
CUSTOM = AdaSpaConfig(**NO_WIDGET)
PRESETS = {
    "Balanced": replace(CUSTOM, sparsity=0.8, warmup=0.12, search_points=HALFWAY),
    "Quality": replace(CUSTOM, sparsity=0.7, warmup=0.2, search_points=(0.6,)),
    "Fast": replace(CUSTOM, sparsity=0.9, warmup=0.1, search_points=HALFWAY),
    "Paper": AdaSpaConfig(
        sparsity=0.8, warmup=0.2, search_points=(0.6,), head_adaptive=True, tail="none"
    ),
}
# what presets of 0.1.0 had otherwise: its graphs tell it by the values of their widgets alone
PRESETS_OF_0_1 = {"Fast": {"warmup": 0.06}}
PRESET_FIELDS = (
    "sparsity", "block_size", "warmup", "search_points", "head_adaptive", "tail", "token_order",
)  # fmt: skip


def from_preset(preset: str, **fields) -> AdaSpaConfig:
    """Build a config: a preset decides `PRESET_FIELDS`, "Custom" leaves them to the caller.

    Raises:
        UserError: an unknown preset, or a field out of range.
    """
    if preset == "Custom":
        return replace(CUSTOM, **fields)
    if preset not in PRESETS:
        raise UserError(f"`preset` must be one of {[*PRESETS, 'Custom']}, got {preset!r}.")
    chosen = {name: value for name, value in fields.items() if name not in PRESET_FIELDS}
    return replace(PRESETS[preset], **chosen)


def parse_numbers(text: str, kind: type, name: str) -> tuple:
    """Read a comma separated list such as "0.3, 0.6" or "0, 1, -1".

    Raises:
        UserError: an entry is not a number of that kind, or commas stand where points should.
    """
    # the commas of Chinese and Japanese, and semicolons
    plain = re.sub("[\uff0c\u3001\uff1b;]", ",", text)
    entries = [entry.strip() for entry in plain.split(",") if entry.strip()]
    # "0,45" would be the numbers 0 and 45
    if kind is float and COMMA_SHARES.fullmatch(plain):
        meant = [share.replace(",", ".") for share in re.findall(r"[01],\d+", plain)]
        raise UserError(
            f"`{name}` must have points in its numbers, not commas, got {text!r}. "
            f"Write {', '.join(meant)}."
        )
    try:
        return tuple(kind(entry) for entry in entries)
    except ValueError:
        example = "0.3, 0.6" if kind is float else "0, 1, -1"
        raise UserError(
            f"`{name}` must be numbers with commas between them, got {text!r}. Example: {example}."
        ) from None

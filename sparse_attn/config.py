"""What the user asked for: one frozen, validated value that travels whole."""

from dataclasses import dataclass, replace
from itertools import pairwise

MAX_SPARSITY = 0.98
BLOCK_SIZES = (64, 128)
CACHES = ("auto", "gpu", "cpu")
DENSE_CHOICES = ("auto", "host")


@dataclass(frozen=True)
class AdaSpaConfig:
    """How much to skip, and when to look for the pattern.

    Args:
        sparsity: share of block pairs that a sparse step skips, in [0, 0.98].
        block_size: tokens per query block and per key block, 64 or 128.
        warmup: share of the whole schedule that runs dense before the first search, in [0, 1).
        search_points: shares of the schedule at which the pattern is searched again, ascending,
            each in [warmup, 1). One equal to `warmup` is the first search itself.
        head_adaptive: let heads of high recall keep fewer blocks and heads of low recall more.
        dense_layers: attention layers that always run dense; negative numbers count from the end.
        start_percent, end_percent: shares of the schedule outside which every step is dense.
        min_tokens: shorter sequences run dense.
        cache: where masks and LSE live between steps: "gpu", "cpu" or "auto".
        dense_attention: who runs the dense steps: "auto" (fastest exact one) or "host".
        enabled: False leaves the model as it is.

    Raises:
        ValueError: one sentence on what is wrong and what to try.
    """

    sparsity: float = 0.8
    block_size: int = 64
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

    def __post_init__(self):
        if not 0.0 <= self.sparsity <= MAX_SPARSITY:
            raise ValueError(
                f"`sparsity` must be from 0 to {MAX_SPARSITY}, got {self.sparsity}. "
                "Try 0.8; 0 keeps every block."
            )
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"`block_size` must be 64 or 128, got {self.block_size}. Try 64.")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(
                f"`warmup` must be a share of the schedule from 0 to below 1, got {self.warmup}. "
                "Try 0.12."
            )
        points = self.search_points
        if any(b <= a for a, b in pairwise(points)):
            raise ValueError(
                f"`search_points` must ascend, got {list(points)}. Write them in order: 0.3, 0.6."
            )
        for point in points:
            if not self.warmup <= point < 1.0:
                raise ValueError(
                    f"`search_points` must lie from the warm-up ({self.warmup}) to below 1, "
                    f"got {point}. The first search follows the warm-up by itself."
                )
        if self.head_adaptive and self.sparsity < 1 / 3:
            raise ValueError(
                f"`head_adaptive` needs a sparsity of at least 0.34, got {self.sparsity}. "
                "Raise the sparsity or switch head-adaptive off."
            )
        if not 0.0 <= self.start_percent < self.end_percent <= 1.0:
            raise ValueError(
                "`start_percent` must be at least 0 and below `end_percent`, which is at most 1, "
                f"got {self.start_percent} and {self.end_percent}. Try 0 and 1."
            )
        if self.min_tokens < 0:
            raise ValueError(f"`min_tokens` must be 0 or more, got {self.min_tokens}. Try 8192.")
        if self.cache not in CACHES:
            raise ValueError(f"`cache` must be one of {CACHES}, got {self.cache!r}. Try auto.")
        if self.dense_attention not in DENSE_CHOICES:
            raise ValueError(
                f"`dense_attention` must be one of {DENSE_CHOICES}, got {self.dense_attention!r}. "
                "Try auto."
            )

    @property
    def density(self) -> float:
        """Share of block pairs that a sparse step computes."""
        return 1.0 - self.sparsity


PRESETS = {
    "Balanced": AdaSpaConfig(sparsity=0.8, warmup=0.12),
    "Quality": AdaSpaConfig(sparsity=0.7, warmup=0.2),
    "Fast": AdaSpaConfig(sparsity=0.9, warmup=0.06),
    "Paper": AdaSpaConfig(sparsity=0.8, warmup=0.2, search_points=(0.6,), head_adaptive=True),
}
PRESET_FIELDS = ("sparsity", "block_size", "warmup", "search_points", "head_adaptive")


def from_preset(preset: str, **fields) -> AdaSpaConfig:
    """Build a config: a preset decides `PRESET_FIELDS`, "Custom" leaves them to the caller.

    Raises:
        ValueError: an unknown preset, or a field out of range.
    """
    if preset == "Custom":
        return AdaSpaConfig(**fields)
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {[*PRESETS, 'Custom']}, got {preset!r}.")
    chosen = {name: value for name, value in fields.items() if name not in PRESET_FIELDS}
    return replace(PRESETS[preset], **chosen)


def parse_numbers(text: str, kind: type, name: str) -> tuple:
    """Read a comma separated list such as "0.3, 0.6" or "0, 1, -1".

    Raises:
        ValueError: an entry is not a number of that kind.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    try:
        return tuple(kind(entry) for entry in entries)
    except ValueError:
        example = "0.3, 0.6" if kind is float else "0, 1, -1"
        raise ValueError(
            f"`{name}` must be numbers with commas between them, got {text!r}. Example: {example}."
        ) from None

"""The settings that both attention nodes have: their widgets, and the config they make."""

from comfy_api.latest import io

from ..sparse_attn.config import (
    BLOCK_SIZES,
    CACHES,
    DENSE_CHOICES,
    MAX_RECALL,
    MAX_SPARSITY,
    PRECISIONS,
    PRESETS,
    TAILS,
    TOKEN_ORDERS,
    AdaSpaConfig,
    from_preset,
    parse_numbers,
)


def setting_inputs() -> list[io.Input]:
    """The widgets, in the order that saved workflows rely on: new ones go last."""
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, "Custom"],
            default="Balanced",
            tooltip="Quality stays closest to the dense video, Fast skips the most, Paper "
            "is the published method. Custom uses the values below. On three small test models, 20 "
            "steps: skipping 80 % came to 34.0 dB of the dense video and 90 % to 29.4, where the published "
            "method came to 24.9 and 21.8; higher is closer.",
        ),
        io.Float.Input(
            "sparsity",
            default=0.8,
            min=0.0,
            max=MAX_SPARSITY,
            step=0.01,
            tooltip="Share of attention blocks to skip (preset Custom). Higher is faster "
            "and drifts further from the dense video; 0 skips nothing.",
        ),
        io.Combo.Input(
            "block_size",
            options=list(BLOCK_SIZES),
            default="64",
            tooltip="Tokens per block (preset Custom). 64 follows the picture most closely. "
            "128x64 takes 128 queries and 64 keys: faster and half the memory, a little less "
            "close. 128 needs a quarter of the memory.",
        ),
        io.Float.Input(
            "warmup",
            default=0.12,
            min=0.0,
            max=0.9,
            step=0.01,
            tooltip="Share of the steps that run dense first (preset Custom), at least one of 5 and "
            "more unless it is 0. They fix "
            "the composition: more keeps the video closer to dense, less saves more time.",
        ),
        io.String.Input(
            "search_points",
            default="0.45",
            tooltip="When to look for the pattern again, as shares of the schedule such "
            "as 0.45 (preset Custom). Empty looks once, after the warm-up. A search costs "
            "a part of a dense step and holds more memory until then. It is left "
            "out where the last search is less than 3 steps ago, and in the last step: there it "
            "would take back too much of the time.",
        ),
        io.Boolean.Input(
            "head_adaptive",
            default=False,
            advanced=True,
            tooltip="Heads that concentrate keep fewer blocks and heads that do not keep "
            "more, at the same total (preset Custom).",
        ),
        io.String.Input(
            "dense_layers",
            default="",
            advanced=True,
            tooltip="Layers that always run dense, such as 0, 1, -1. Each costs its share "
            "of the speed.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Steps before this share of the schedule run dense.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Steps from this share of the schedule on run dense. 0.9 can calm "
            "flicker at the cost of speed.",
        ),
        io.Int.Input(
            "min_tokens",
            default=8192,
            min=0,
            max=1 << 24,
            advanced=True,
            tooltip="Shorter videos run dense: below this there is little to gain.",
        ),
        io.Combo.Input(
            "cache",
            options=list(CACHES),
            default="auto",
            advanced=True,
            tooltip="Where the pattern lives between steps. CPU frees GPU memory and "
            "copies it back ahead of time; auto moves it when memory is short.",
        ),
        io.Combo.Input(
            "dense_attention",
            options=list(DENSE_CHOICES),
            default="auto",
            advanced=True,
            tooltip="Who runs the dense steps. Auto measures the exact ones on the first "
            "step and takes the fastest; host leaves them to ComfyUI's own setting.",
        ),
        io.Boolean.Input(
            "enabled",
            default=True,
            advanced=True,
            tooltip="Off leaves the model as it is, for a comparison at the same seed.",
        ),
        # the inputs from here on are younger than prompts that people saved: those lack them
        io.Combo.Input(
            "precision",
            optional=True,
            options=list(PRECISIONS),
            default="auto",
            advanced=True,
            tooltip="Precision of the attention in sparse steps, and in dense ones where that is "
            "fastest: int8 and fp8 are faster and less exact, and a second search then measures in "
            "int8; the first never does. bf16, and auto for now, compute as the model does.",
        ),
        io.Float.Input(
            "recall",
            optional=True,
            default=0.0,
            min=0.0,
            max=MAX_RECALL,
            step=0.005,
            tooltip="Ask for a recall instead of a sparsity: 0.95 keeps, in every head, the fewest "
            "blocks that hold 95 % of the attention. How much that skips depends on the video. "
            "0 is off. Not with head_adaptive or the preset Paper.",
        ),
        io.Combo.Input(
            "tail",
            optional=True,
            options=list(TAILS),
            default="pooled",
            tooltip="Pooled lets the average of every skipped block stand in for it (preset "
            "Custom): closer to the dense video, for about a seventh of a sparse call's time "
            "at 80 %. Needs blocks of 64 keys. None leaves skipped blocks out, as the paper does.",
        ),
        io.Combo.Input(
            "token_order",
            optional=True,
            options=list(TOKEN_ORDERS),
            default="similarity",
            advanced=True,
            tooltip="What is put together in a block (preset Custom, only with a tail). Similarity "
            "puts together what looks alike to the model, wherever it is in the video, in every "
            "part of the model for which that works better: closer to the dense video, slower "
            "searches, more memory. Position takes compact pieces of the video.",
        ),
    ]


def config_of(
    preset, sparsity, block_size, warmup, search_points, head_adaptive=False, dense_layers="",
    start_percent=0.0, end_percent=1.0, min_tokens=8192, cache="auto", dense_attention="auto",
    enabled=True, precision="auto", recall=0.0, tail="pooled",
    token_order="similarity",
) -> AdaSpaConfig:  # fmt: skip
    """Read the widgets; those with a default may be missing in workflows of earlier versions.

    Raises:
        ValueError: one sentence on the value that is wrong.
    """
    return from_preset(
        preset,
        sparsity=sparsity,
        block_size=block_size,
        warmup=warmup,
        search_points=parse_numbers(search_points, float, "search_points"),
        head_adaptive=head_adaptive,
        dense_layers=parse_numbers(dense_layers, int, "dense_layers"),
        start_percent=start_percent,
        end_percent=end_percent,
        min_tokens=min_tokens,
        cache=cache,
        dense_attention=dense_attention,
        enabled=enabled,
        precision=precision,
        recall=recall,
        tail=tail,
        token_order=token_order,
    )


def status_of(config: AdaSpaConfig, preset: str, reason: str) -> str:
    """What the node says before the run; `reason` is why the model would run dense."""
    if not config.enabled:
        return "AdaSpa is off"
    if reason:
        return f"AdaSpa will run dense: {reason}"
    asked = f"recall {config.recall}" if config.recall else f"sparsity {config.sparsity:.2f}"
    words = [preset, asked]
    if config.low_precision:
        words.append(config.low_precision)
    if config.why_no_tail:
        words.append(config.why_no_tail)
    return "AdaSpa is ready: " + ", ".join(words)

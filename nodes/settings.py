"""The settings that both attention nodes have: their widgets, and the config they make."""

from collections.abc import Sequence

from comfy_api.latest import io

from ..sparse_attn.config import (
    CHOICES,
    MAX_RECALL,
    MAX_SPARSITY,
    PRESET_FIELDS,
    PRESETS,
    PRESETS_OF_0_1,
    SEARCH_GAP,
    AdaSpaConfig,
    from_preset,
    parse_numbers,
)
from ..sparse_attn.run.handle import RunHandle
from ..sparse_attn.sentences import Sentence, told

# settings that a widget holds as text, and what stands between the commas
LISTS = {"search_points": float, "dense_layers": int}
KINDS = {bool: io.Boolean, float: io.Float, int: io.Int, str: io.String}
# younger than prompts that people saved: those lack them
YOUNGER = ("precision", "recall", "tail", "token_order", "verdict")
# bounds, and for the interface what a widget that is set replaces
MORE = {
    "sparsity": {"min": 0.0, "max": MAX_SPARSITY, "step": 0.01},
    "warmup": {"min": 0.0, "max": 0.9, "step": 0.01},
    "head_adaptive": {"extra_dict": {"replaces": ["recall"]}},
    "start_percent": {"min": 0.0, "max": 1.0, "step": 0.01},
    "end_percent": {"min": 0.0, "max": 1.0, "step": 0.01},
    "min_tokens": {"min": 0, "max": 1 << 24},
    "recall": {
        "min": 0.0, "max": MAX_RECALL, "step": 0.005,
        "extra_dict": {"replaces": ["sparsity", "head_adaptive"]},
    },
}  # fmt: skip


def shown(config: AdaSpaConfig) -> dict:
    """Every setting as its widget holds it."""
    return {
        name: ", ".join(map(str, value)) if name in LISTS else value
        for name, value in vars(config).items()
    }


def shown_presets() -> dict[str, dict]:
    """What each preset puts into the widgets that it decides."""

    def decided(config):
        # it shares the blocks out between the heads itself
        fields = (*PRESET_FIELDS, "recall") if config.head_adaptive else PRESET_FIELDS
        return {name: value for name, value in shown(config).items() if name in fields}

    return {name: decided(config) for name, config in PRESETS.items()}


def setting_inputs() -> list[io.Input]:
    """The widgets, in the order that saved workflows rely on: new ones go last."""
    first = next(iter(PRESETS))
    defaults = {"preset": first, **shown(PRESETS[first]), "verdict": "auto"}
    skipped = {name: f"{config.sparsity:.0%}" for name, config in PRESETS.items()}
    options = {"preset": [*PRESETS, "Custom"], **CHOICES}
    tooltips = {
        "preset": f"How much of the attention is skipped. Balanced ({skipped['Balanced']}) is "
        f"for most videos, Quality ({skipped['Quality']}) stays closest to the dense video, Fast "
        f"({skipped['Fast']}) saves the most time, Paper is the published method. Custom uses "
        "the values below.",
        "sparsity": "Share of attention blocks to skip (preset Custom). Higher is faster and "
        "drifts further from the dense video; 0 skips nothing.",
        "block_size": "Tokens per block (preset Custom). 64 follows the picture most closely. "
        "128x64 takes 128 queries and 64 keys: faster and half the memory, a little less close. "
        "128 needs a quarter of the memory.",
        "warmup": "Share of the steps that run dense first (preset Custom), at least one unless "
        "it is 0. They fix the composition: more keeps the video closer to dense, less saves "
        "more time.",
        "search_points": "When to look for the pattern again, as shares of the schedule such as "
        f"{defaults['search_points']} (preset Custom). Empty looks once, after the warm-up. A "
        "search costs a part of a dense step and holds more memory until then. It is left out "
        f"where the last search is less than {SEARCH_GAP} steps ago, and in the last step: there "
        "it would cost more than it gains.",
        "head_adaptive": "Heads that concentrate keep fewer blocks and heads that do not keep "
        "more, at the same total (preset Custom). Not with recall.",
        "dense_layers": "Layers that always run dense, such as 0, 1, -1. Each costs its share "
        "of the speed.",
        "start_percent": "Steps before this share of the schedule run dense.",
        "end_percent": "Steps from this share of the schedule on run dense. 0.9 can calm "
        "flicker at the cost of speed.",
        "min_tokens": "Shorter videos run dense: below this there is little to gain.",
        "cache": "Where the pattern lives between steps. CPU frees GPU memory and copies it "
        "back ahead of time; auto moves it when memory is short.",
        "dense_attention": "Who runs the dense steps. Auto measures the exact ones on the first "
        "step and takes the fastest; host leaves them to ComfyUI's own setting.",
        "enabled": "Off leaves the model as it is, for a comparison at the same seed.",
        "precision": "Precision of the attention in sparse steps, and in dense ones where that "
        "is fastest: int8 is faster and less exact, and searches then measure in int8, too. fp8, of "
        "older graphs, runs as int8. bf16 computes as the model does, and so does auto.",
        "recall": "Ask for a recall instead of a sparsity: 0.95 keeps, in every head, the "
        "fewest blocks that hold 95 % of the attention. How much that skips depends on the "
        "video. 0 is off. Not with head_adaptive or the preset Paper.",
        "tail": "Pooled lets the average of every skipped block stand in for it (preset "
        "Custom): closer to the dense video, for about a seventh of a sparse call's time at "
        "80 %. Needs blocks of 64 keys. None leaves skipped blocks out, as the paper does.",
        "token_order": "What is put together in a block (preset Custom, only with a tail). "
        "Similarity puts together what looks alike to the model, wherever it is in the video, "
        "in every part of the model for which that works better: closer to the dense video, "
        "slower searches, more memory. Position takes compact pieces of the video.",
        "verdict": "Whether sparse is faster here. Auto finds out in the first sparse step, "
        "once for each size and setting until ComfyUI restarts; where sparse is not at least "
        "10 % faster, the rest runs dense. Sparse and dense pin the answer: then a rerun is equal "
        "bit for bit.",
    }

    def setting(name: str, tooltip: str) -> io.Input:
        default, more = defaults[name], dict(MORE.get(name, {}))
        if name == "preset":
            # for the interface, which shows them in the other widgets
            more["extra_dict"] = {"presets": shown_presets(), "earlier": PRESETS_OF_0_1}
        if name in options:
            more["options"] = list(options[name])
        kind = io.Combo if name in options else KINDS[type(default)]
        # the interface folds all but these
        advanced = name not in ("preset", "enabled")
        optional = name in YOUNGER
        return kind.Input(
            name, default=default, tooltip=tooltip, advanced=advanced, optional=optional, **more
        )

    return [setting(*row) for row in tooltips.items()]


def config_of(preset: str, **settings) -> AdaSpaConfig:
    """Read the widgets; younger ones may be missing in workflows of earlier versions.

    Raises:
        UserError: one sentence on the value that is wrong.
    """
    for name in LISTS.keys() & settings.keys():
        settings[name] = parse_numbers(settings[name], LISTS[name], name)
    return from_preset(preset, **{"verdict": "auto", **settings})


def describe(handle: RunHandle, hidden, preset: str) -> None:
    """Tell a handle what is written with the videos of its runs."""
    handle.node, handle.preset = str(hidden.unique_id), preset
    handle.metadata = hidden.extra_pnginfo


def check(settings: dict) -> bool:
    """Refuse before the queue what would fail when the node executes; True if all is well.

    It raises, for ComfyUI would repeat a returned sentence for each of the settings.

    Args:
        settings: None where another node supplies a value, which is known only then.

    Raises:
        UserError: one sentence on the value that is wrong.
    """
    if None not in settings.values():
        config_of(**settings)
    return True


def answer(config: AdaSpaConfig, settings: dict, reason: str) -> dict:
    """What the interface gets before the run: a line, and the settings that it speaks of.

    Args:
        reason: why the model would run dense, or an empty string.
    """
    said = _ready(config, settings["preset"], reason)
    return {**spoken(said), "settings": [settings]}


def spoken(said: Sequence[str]) -> dict:
    """What the interface shows on a node that has executed: lines, and how to say them."""
    return {"text": ["\n".join(said)], "said": [[told(line) for line in said]]}


def _ready(config: AdaSpaConfig, preset: str, reason: str) -> list[str]:
    if not config.enabled:
        return [Sentence("off")]
    if reason:
        return [Sentence("unknown_model", why=reason)]
    if config.recall:
        said = [Sentence("ready_recall", preset=preset, recall=str(config.recall))]
    else:
        said = [Sentence("ready", preset=preset, sparsity=f"{config.sparsity:.2f}")]
    if config.low_precision:
        said.append(Sentence("low_precision", precision=config.low_precision))
    return [*said, *([config.why_no_tail] if config.why_no_tail else [])]

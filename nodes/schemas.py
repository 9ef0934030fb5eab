"""The frames of nodes that are alike: those that install AdaSpa, and those behind them."""

from comfy_api.latest import io

from .settings import setting_inputs
from .sockets import AdaSpaRun


def attention_schema(
    node_id: str, name: str, description: str, aliases: str, inputs: list, outputs: list
) -> io.Schema:
    """The schema of a node that installs AdaSpa: between its own sockets lie the settings.

    Args:
        name: that people read. aliases: by which they find it, with commas between them.
    """
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category="model/patch",
        description=description,
        search_aliases=aliases.split(", "),
        inputs=[*inputs, *setting_inputs()],
        outputs=[*outputs, AdaSpaRun.Output("adaspa", display_name="adaspa")],
        hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        # two nodes with equal settings must not share one handle through ComfyUI's cache
        not_idempotent=True,
    )


def pattern_schema(
    verb: str, description: str, *widgets: io.Input, outputs: tuple[io.Output, ...] = ()
) -> io.Schema:
    """The schema of the node that does `verb` to a pattern.

    Args:
        widgets: what the user decides.
        outputs: what follows the model.
    """
    return io.Schema(
        node_id=f"AdaSpa{verb}Pattern",
        display_name=f"AdaSpa {verb} Pattern",
        category="model/patch",
        description=f"Place it between AdaSpa and the sampler. {description}",
        search_aliases=["AdaSpa pattern", f"{verb.lower()} sparse pattern"],
        inputs=[
            io.Model.Input("model", tooltip="From the AdaSpa node."),
            AdaSpaRun.Input("adaspa", tooltip="From the same AdaSpa node."),
            *widgets,
        ],
        outputs=[io.Model.Output(display_name="model"), *outputs],
        hidden=[io.Hidden.unique_id],
    )

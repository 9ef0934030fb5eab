"""The frame of the nodes that stand between AdaSpa and the sampler."""

from comfy_api.latest import io

from .sockets import AdaSpaRun


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

"""AdaSpa for Raylight: the settings of AdaSpa Attention for a video that several GPUs share."""

import importlib.util
from pathlib import Path

from comfy_api.latest import io

from ..sparse_attn.host.raylight import install_on
from ..sparse_attn.run.handle import METADATA
from .own_errors import otherwise, without_adaspa
from .schemas import attention_schema
from .settings import answer, check, config_of, describe

RayActors = io.Custom("RAY_ACTORS")


def is_installed() -> bool:
    """Whether Raylight is among the custom nodes, loaded already or not."""
    import folder_paths

    if importlib.util.find_spec("raylight") is not None:
        return True
    folders = map(Path, folder_paths.get_folder_paths("custom_nodes"))
    return any(
        (pack / "src" / "raylight").is_dir()
        for folder in folders
        if folder.is_dir()
        for pack in folder.iterdir()
    )


class AdaSpaRaylight(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return attention_schema(
            "AdaSpaRaylight",
            "AdaSpa for Raylight",
            "AdaSpa for a video that several GPUs share. Place it between Raylight's loader and its "
            "sampler.",
            "AdaSpa several GPUs, multi GPU, ulysses, raylight",
            [RayActors.Input("ray_actors", tooltip="From Raylight's loader, after its LoRAs.")],
            [RayActors.Output("ray_actors", display_name="ray_actors")],
        )

    @classmethod
    def validate_inputs(cls, ray_actors=None, **settings) -> bool:
        return check(settings)

    @classmethod
    @otherwise(lambda said, ray_actors, **_: without_adaspa(said, ray_actors))
    def execute(cls, ray_actors, **settings) -> io.NodeOutput:
        config = config_of(**settings)
        handle = install_on(ray_actors["workers"], config, cls.hidden.unique_id)
        describe(handle, cls.hidden, settings["preset"])
        if handle.metadata is not None:
            # a thread fills it, perhaps while another node walks through the rest
            handle.metadata.setdefault(METADATA, [])
        return io.NodeOutput(ray_actors, handle, ui=answer(config, settings, ""))

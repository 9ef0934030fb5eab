"""AdaSpa Save Pattern: writes what a run found, for another run of the same size."""

from functools import partial

from comfy_api.latest import io, ui

from ..sparse_attn.host.pattern_requests import save_after_run
from .pattern_files import FOLDER, checked_name, free_path
from .pattern_schema import pattern_schema


class AdaSpaSavePattern(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return pattern_schema(
            "Save",
            "When the sampler is done, the pattern that AdaSpa found is written into the output "
            "folder; AdaSpa Load Pattern lets another run of the same size begin with it.",
            io.String.Input(
                "name",
                default="pattern",
                tooltip="Name of the file in the folder adaspa of ComfyUI's output folder. A "
                "file of that name is kept, and the new one gets a number.",
            ),
        )

    @classmethod
    def execute(cls, model, adaspa, name="pattern") -> io.NodeOutput:
        name = checked_name(name)
        patched = save_after_run(model, adaspa, partial(free_path, name))
        text = f"The pattern will be written to {FOLDER}/{name} in the output folder"
        return io.NodeOutput(patched, ui=ui.PreviewText(text))

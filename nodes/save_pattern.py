"""AdaSpa Save Pattern: writes what a run found, for another run of the same size."""

from comfy_api.latest import io

from ..sparse_attn.host.pattern_requests import SaveRequest, save_after_run
from ..sparse_attn.patterns.file import save
from ..sparse_attn.sentences import Sentence
from .own_errors import otherwise
from .pattern_files import FOLDER, checked_name, folders
from .schemas import pattern_schema
from .settings import spoken


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
            # younger than prompts that people saved: those lack it
            io.Boolean.Input(
                "every_sampler",
                optional=True,
                default=False,
                advanced=True,
                tooltip="Where several samplers of a workflow use this model, only the first of them "
                "writes its pattern. On writes a file for each; they are hundreds of megabytes "
                "for a long video.",
            ),
        )

    @classmethod
    def validate_inputs(cls, name=None):
        # raises; what another node supplies is known only later
        return name is None or bool(checked_name(name))

    @classmethod
    @otherwise(lambda said, model, **_: io.NodeOutput(model, ui=spoken([said])))
    def execute(cls, model, adaspa, name="pattern", every_sampler=False) -> io.NodeOutput:
        name = checked_name(name)
        if adaspa is not None and adaspa.failed:
            return io.NodeOutput(model, ui=spoken([adaspa.failed]))

        def write(pattern):
            return save(pattern, folders()["output"], name)

        request = SaveRequest(write, cls.hidden.unique_id, every_sampler)
        patched = save_after_run(model, adaspa, request)
        text = Sentence("will_write", file=f"{FOLDER}/{name}")
        return io.NodeOutput(patched, ui=spoken([text]))

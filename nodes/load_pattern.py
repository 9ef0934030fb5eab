"""AdaSpa Load Pattern: a run begins with the pattern of an earlier one."""

from comfy_api.latest import io

from ..sparse_attn.host.pattern_requests import begin_with
from ..sparse_attn.patterns.file import load
from ..sparse_attn.sentences import Sentence, UserError
from .own_errors import otherwise
from .pattern_files import listed
from .schemas import pattern_schema
from .settings import spoken
from .sockets import AdaSpaRun


class AdaSpaLoadPattern(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return pattern_schema(
            "Load",
            "The run begins with a saved pattern and needs no search. Where the pattern does not "
            "fit the model, the size or the video, the run searches as usual, and the report says "
            "why.",
            io.Combo.Input(
                "file",
                options=list(listed()),
                tooltip="A pattern in the folder adaspa of ComfyUI's output or input folder. "
                "It decides how much is skipped, whatever sparsity is set to.",
            ),
            outputs=(AdaSpaRun.Output("adaspa", display_name="adaspa"),),
        )

    @classmethod
    def fingerprint_inputs(cls, file="", **inputs):
        try:
            stat = listed()[file].stat()
        except (KeyError, OSError):
            return None
        return stat.st_mtime_ns, stat.st_size

    @classmethod
    @otherwise(lambda said, model, adaspa, **_: io.NodeOutput(model, adaspa, ui=spoken([said])))
    def execute(cls, model, adaspa, file) -> io.NodeOutput:
        path = listed().get(file)
        if path is None:
            raise UserError(
                f"There is no pattern {file!r} that can be read; choose one from the list."
            )
        if adaspa is not None and adaspa.failed:
            return io.NodeOutput(model, adaspa, ui=spoken([adaspa.failed]))
        pattern = load(path)
        text = Sentence(
            "loaded", model=pattern.family, layout=pattern.layout.describe(),
            density=f"{pattern.density():.2f}", recall=f"{pattern.recall():.2f}",
        )  # fmt: skip
        patched = begin_with(model, adaspa, pattern)
        return io.NodeOutput(patched, adaspa, ui=spoken([text]))

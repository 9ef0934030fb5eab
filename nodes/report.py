"""AdaSpa Report: what the last run did, as text and as a picture."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..sparse_attn.host.install import fingerprint
from ..sparse_attn.run.report import seconds
from ..sparse_attn.run.verdict import named, numbers
from ..sparse_attn.sentences import Sentence
from .own_errors import blank, otherwise
from .report_picture import draw
from .settings import spoken
from .sockets import AdaSpaRun


class AdaSpaReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        drawn = {"default": 0, "min": 0, "max": 999}
        return io.Schema(
            node_id="AdaSpaReport",
            display_name="AdaSpa Report",
            category="model/patch",
            description=(
                "Place it after the sampler. Shows what AdaSpa did in the run: density and recall "
                "by layer and head, the pattern of one head, seconds spent and saved."
            ),
            search_aliases=["sparse attention report", "AdaSpa statistics", "recall", "density"],
            inputs=[
                io.Latent.Input("samples", tooltip="The sampler's output; it passes through."),
                AdaSpaRun.Input(
                    "adaspa",
                    optional=True,
                    tooltip="From the AdaSpa node; empty when that node is bypassed.",
                ),
                io.Int.Input("layer", **drawn, tooltip="The layer whose pattern is drawn."),
                io.Int.Input("head", **drawn, tooltip="The head whose pattern is drawn."),
            ],
            outputs=[
                io.Latent.Output(display_name="samples"),
                io.Image.Output(display_name="picture"),
                io.String.Output(display_name="text"),
            ],
            is_output_node=True,
        )

    @classmethod
    @otherwise(
        lambda said, samples, **_: io.NodeOutput(samples, blank(), str(said), ui=spoken([said])),
    )
    def execute(cls, samples, layer, head, adaspa=None) -> io.NodeOutput:
        runs, told = [], True
        if adaspa is not None:
            runs, told = adaspa.runs_behind(fingerprint(samples["samples"]))
        off = adaspa is not None and not adaspa.config.enabled
        lines = [line for run in runs for line in run.lines()]
        said = [line for run in runs for line in _said(run)]
        if not runs:
            failed = None if adaspa is None else adaspa.failed
            lines = said = [failed or Sentence("off" if off else "not_run")]
        elif not told:
            for each in (lines, said):
                each.insert(0, Sentence("not_its_samples"))
        text = "\n".join(lines)
        picture = (
            np.asarray(draw(runs[-1] if runs else None, layer, head, lines), dtype=np.float32) / 255
        )
        image = torch.from_numpy(picture)[None]
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **spoken(said), "text": [text]}
        if adaspa is not None and runs:
            # the node of a cached model has the metadata of an earlier prompt
            adaspa.note(cls.hidden.extra_pnginfo)
            shown["adaspa"] = [run.as_dict() for run in runs]
        return io.NodeOutput(samples, image, text, ui=shown)


def _said(run) -> list[str]:
    """The lines of a run that have other languages: its figures, too, which the text has in one line."""
    verdict, rest = named(run), run.lines()[1:]
    if not run.patterns:
        return [*verdict, *rest]
    steps = run.schedule.until(run.stopped_at).describe().split(" ", 1)[1]
    figures = [*numbers(run), Sentence("line_steps", steps=steps)]
    saved = run.timing.saved()
    if saved is not None:
        code = "line_saved" if saved >= 0 else "line_lost"
        figures.append(Sentence(code, time=seconds(abs(saved))))
    return [*verdict, *figures, *rest[1:]]

"""AdaSpa Compare: the dense and the sparse video of one seed, side by side and in numbers."""

import torch
from comfy_api.latest import io

from ..sparse_attn.run.report import seconds
from ..sparse_attn.sentences import Sentence, UserError
from ..sparse_attn.video_metrics import ALIKE, mean_squared_error, psnr, ssim
from .compare_preview import preview
from .own_errors import blank, noted, otherwise
from .settings import spoken
from .sockets import AdaSpaRun

AMPLIFIED = 8
# a number that every node downstream can take, for videos without any difference
IDENTICAL = 100.0
FLOOR = (
    "Small differences are normal: two exact attention kernels already round differently, and "
    "sampling carries that on into another, equally good video. To see that floor on your machine, "
    "compare two dense runs of this seed with different attention settings. Look for lost detail, "
    "flicker and doubled shapes rather than at the numbers alone."
)


class AdaSpaCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaCompare",
            display_name="AdaSpa Compare",
            category="model/patch",
            description=(
                "Compares two videos of one seed: one with AdaSpa, one without. Shows them side "
                "by side, where they differ, and by how much."
            ),
            search_aliases=["AdaSpa compare", "psnr", "ssim", "side by side", "video difference"],
            inputs=[
                io.Image.Input("dense", tooltip="Frames of the run without AdaSpa."),
                io.Image.Input(
                    "sparse", tooltip="Frames of the run with AdaSpa, with the same seed."
                ),
                AdaSpaRun.Input(
                    "off",
                    optional=True,
                    tooltip="From the AdaSpa node of the run without it, whose *enabled* is off.",
                ),
                AdaSpaRun.Input(
                    "on", optional=True, tooltip="From the AdaSpa node of the run with it."
                ),
            ],
            outputs=[
                io.Image.Output("side_by_side", display_name="side_by_side"),
                io.Image.Output(
                    "difference",
                    display_name="difference",
                    tooltip=f"The difference of the two videos, {AMPLIFIED} times as strong as it "
                    "is; black is equal.",
                ),
                io.Float.Output(
                    "psnr",
                    display_name="psnr",
                    tooltip=f"In dB, higher is more alike; {IDENTICAL:.0f} for equal videos.",
                ),
                io.String.Output("text", display_name="text"),
            ],
            is_output_node=True,
        )

    @classmethod
    @otherwise(
        lambda said, *_, **__: io.NodeOutput(blank(), blank(), 0.0, str(said), ui=spoken([said]))
    )
    def execute(cls, dense, sparse, off=None, on=None) -> io.NodeOutput:
        if dense.shape != sparse.shape:
            raise UserError(
                f"`dense` and `sparse` must be alike in frames and size, got {_size(dense)} and "
                f"{_size(sparse)}. Compare two runs of one workflow."
            )
        side_by_side = torch.cat((dense, sparse), dim=2)
        difference = torch.empty_like(dense)
        errors, likeness = [], []
        # frame by frame: a long video is gigabytes
        for i, (a, b) in enumerate(zip(dense, sparse, strict=True)):
            difference[i] = ((a - b).abs() * AMPLIFIED).clamp(max=1)
            errors.append(mean_squared_error(a, b))
            likeness.append(ssim(a, b))
        mean = sum(errors) / len(errors)
        said = [*_times(off, on), *_alike(mean, errors, likeness)]
        text = "\n".join([*said, _size(dense), *([FLOOR] if mean else [])])
        value = min(psnr(mean), IDENTICAL)
        shown = {}
        try:
            shown["adaspa_compare"] = [preview(dense, sparse)]
        except Exception as error:
            # as on a full disk: the numbers are there all the same
            said.append(noted(error))
        return io.NodeOutput(side_by_side, difference, value, text, ui={**spoken(said), **shown})


def _alike(mean: float, errors: list[float], likeness: list[float]) -> list[Sentence]:
    """How alike two videos are, by the mean squared error and the SSIM of each frame."""
    if not mean:
        return [Sentence("equal")]
    decibels, similar = psnr(mean), sum(likeness) / len(likeness)
    code = next(c for c, (db, least) in ALIKE.items() if decibels >= db and similar >= least)
    worst = max(range(len(errors)), key=errors.__getitem__)
    return [
        Sentence(code, psnr=f"{decibels:.2f}", ssim=f"{similar:.4f}"),
        Sentence("least_alike", frame=str(worst)),
    ]


def _times(off, on) -> list[Sentence]:
    """What both runs took, where both nodes are wired and their samplers were timed."""
    runs = [handle.recent() if handle is not None else [] for handle in (off, on)]
    if not all(runs) or any(run.took is None for run in (*runs[0], *runs[1])):
        return []
    took = [sum(run.took for run in part) for part in runs]
    values = {"off": seconds(took[0]), "on": seconds(took[1]), "preset": on.preset or "AdaSpa"}
    equal = [run.sampled for run in runs[0]] == [run.sampled for run in runs[1]]
    if not equal or off.config.enabled:
        return [Sentence("not_alike", **values)]
    return [Sentence("timed", **values, gain=f"{took[0] / took[1]:.1f}x")]


def _size(video) -> str:
    frames, height, width, channels = video.shape
    return f"{frames} frame(s) of {width} x {height} in {channels} channels"

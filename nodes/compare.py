"""AdaSpa Compare: the dense and the sparse video of one seed, side by side and in numbers."""

import math

import torch
from comfy_api.latest import io, ui

from ..sparse_attn.video_metrics import mean_squared_error, psnr, ssim

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
    def execute(cls, dense, sparse) -> io.NodeOutput:
        if dense.shape != sparse.shape:
            raise ValueError(
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
        text = _describe(dense, errors, likeness)
        value = min(psnr(sum(errors) / len(errors)), IDENTICAL)
        return io.NodeOutput(side_by_side, difference, value, text, ui=ui.PreviewText(text))


def _describe(video, errors, likeness) -> str:
    whole = psnr(sum(errors) / len(errors))
    if math.isinf(whole):
        return f"{_size(video)}: equal in every pixel, SSIM 1.0000"
    worst = max(range(len(errors)), key=errors.__getitem__)
    lines = [
        f"{_size(video)}: PSNR {whole:.2f} dB, SSIM {sum(likeness) / len(likeness):.4f}",
        f"Least alike: frame {worst}, PSNR {psnr(errors[worst]):.2f} dB, SSIM "
        f"{likeness[worst]:.4f}",
        FLOOR,
    ]
    return "\n".join(lines)


def _size(video) -> str:
    frames, height, width, channels = video.shape
    return f"{frames} frame(s) of {width} x {height} in {channels} channels"

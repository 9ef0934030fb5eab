"""A run of every video model, and what must become of its attention calls."""

from dataclasses import dataclass, field

import torch

from sparse_attn.token_layout import TokenLayout
from tests.host.host_fixtures import CROSS_ATTENTION

TEXT = 7


def noise(*shape, seed=6):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ClipVision:
    def __init__(self, tokens=257, width=1280):
        self.last_hidden_state = self.penultimate_hidden_states = noise(1, tokens, width)


def not_video(tokens, whole):
    return f"{tokens:,} tokens are not the {whole:,} of this model's video sequence"


@dataclass
class Case:
    """A model and a run of it.

    Args:
        shapes: of the latents: video, and audio where the model makes both.
        layout: what its sequence must be.
        taken: calls per call of the model that are ours.
        declined: calls that are not, by reason.
        extra: entries of the conditioning.
        mask: shows which part of the latent is to be made; guide frames are not.
    """

    model: str
    shapes: tuple
    layout: TokenLayout
    taken: int
    declined: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)
    mask: torch.Tensor | None = None


VIDEO = ((1, 16, 3, 16, 24),)
ONE_FRAME = noise(1, 16, 1, 16, 24)
TEXT_MASK = {"attention_mask": torch.ones(1, TEXT, dtype=torch.int64)}


def wan(model, before=0, after=0, taken=2, crossings=2, **extra):
    layout = TokenLayout(before, 3, 8, 12, after)
    return Case(model, VIDEO, layout, taken, {CROSS_ATTENTION: crossings}, extra)


def hunyuan(model, before=0, **extra):
    layout = TokenLayout(TEXT + before, 3, 8, 12)
    refiner = {not_video(TEXT, layout.tokens): 2}
    return Case(model, VIDEO, layout, 3, refiner, extra)


def guided(frames, strength=1.0, coarse=False):
    """Guide frames behind four frames of 8 x 12, as the guide nodes of LTX append them."""
    mask = torch.ones(1, 1, 4 + frames, 8, 12)
    mask[:, :, 4:] = -1.0 if coarse else 0.0
    if coarse:
        mask[:, :, 4:, ::2, ::2] = 0.0
    tokens = 96 * frames
    entry = {
        "pre_filter_count": tokens, "strength": strength, "pixel_mask": None,
        "latent_shape": [frames, 8, 12],
    }  # fmt: skip
    extra = {
        **TEXT_MASK, "keyframe_idxs": torch.zeros(1, 3, tokens, 2),
        "guide_attention_entries": [entry],
    }  # fmt: skip
    return {"extra": extra, "mask": mask}


def ltx(frames=0, after=0, taken=2, declined=None, **more):
    shapes = ((1, 16, 4 + frames, 8, 12),)
    declined = {CROSS_ATTENTION: 2, **(declined or {})}
    layout = TokenLayout(0, 4, 8, 12, after)
    return Case("ltxv", shapes, layout, taken, declined, **{"extra": TEXT_MASK, **more})


def ltx_2(audio, declined):
    # per block: text to video and to audio, audio to video and back, and audio to itself
    declined = {CROSS_ATTENTION: 8, **declined}
    shapes = ((1, 16, 4, 8, 12), (1, 8, audio, 16))
    return Case("ltxav", shapes, TokenLayout(0, 4, 8, 12), 2, declined)


def kandinsky(model):
    declined = {CROSS_ATTENTION: 2, not_video(TEXT, 288): 1}
    return Case(model, VIDEO, TokenLayout(0, 3, 8, 12), 2, declined)


def minimax(before, **extra):
    shapes = ((1, 24, 3, 16, 24), (1, 32, 2, 10))
    # text, then ten audio frames in stereo
    layout = TokenLayout(TEXT + before + 20, 3, 8, 12)
    return Case("minimax", shapes, layout, 2, extra=extra)


def picture(frame=None):
    at = {"resolved_frame_index": 0} if frame is None else {"resolved_frame_index": frame}
    return {**at, "latent": noise(1, 24, 1, 16, 24)}


CASES = {
    "wan": wan("wan"),
    # as Phantom's node sets it: one frame for each picture of a subject
    "wan-phantom": wan("wan", after=192, time_dim_concat=noise(1, 16, 2, 16, 24, seed=7)),
    "wan-in-context": wan("wan", after=96, context_latents=[ONE_FRAME]),
    "vace": wan("vace", taken=3, crossings=3, vace_frames=[noise(1, 32, 3, 16, 24)]),
    "vace-two-contexts": wan(
        "vace", taken=4, crossings=4, vace_frames=[noise(1, 32, 3, 16, 24, seed=i) for i in (0, 1)]
    ),
    "camera": wan("camera", camera_conditions=noise(1, 6, 3, 128, 192)),
    "speech": wan(
        "speech", after=96 + 96 + 24 + 4 * 6,
        reference_latents=[ONE_FRAME], reference_motion=noise(1, 16, 19, 16, 24),
        audio_embed=noise(1, 25, 32, 12),
    ),
    # every frame reads its own audio, in a cross-attention of its own
    "humo": wan(
        "humo", after=96, crossings=4,
        reference_latents=[ONE_FRAME], audio_embed=noise(1, 3, 8, 5, 1280),
    ),
    "animate": wan(
        "animate", taken=5, crossings=10, clip_vision_output=ClipVision(),
        pose_video_latent=noise(1, 16, 2, 16, 24), face_video_pixels=noise(1, 3, 8, 16, 16),
    ),
    "animate-2": wan("animate_2", crossings=4, clip_vision_output=ClipVision()),
    # poses of half the width and height
    "scail": wan(
        "scail", before=96, after=72, crossings=4, clip_vision_output=ClipVision(),
        reference_latents=[ONE_FRAME], pose_video_latent=noise(1, 16, 3, 8, 12),
    ),
    "scail_2": wan(
        "scail_2", before=96, after=72, crossings=4, clip_vision_output=ClipVision(),
        reference_latents=[ONE_FRAME], pose_video_latent=noise(1, 16, 3, 8, 12),
    ),
    "dancer": wan(
        "dancer", crossings=4, audio_embed=noise(1, 24, 35),
        clip_vision_output=ClipVision(), clip_vision_output_ref=ClipVision(),
    ),
    "causal": wan("causal"),
    "hunyuan-i2v": hunyuan(
        "hunyuan_i2v", guiding_frame_index=0, concat_latent_image=noise(*VIDEO[0])
    ),
    "hunyuan-reference": hunyuan(
        "hunyuan", 96, guiding_frame_index=0, ref_latent=ONE_FRAME
    ),
    "cogvideox": Case("cogvideox", VIDEO, TokenLayout(TEXT, 3, 8, 12), 2),
    # five frames are padded to six, and patches are two frames deep
    "cogvideox-1.5": Case(
        "cogvideox_15", ((1, 16, 5, 16, 24),), TokenLayout(TEXT, 3, 8, 12), 2
    ),
    "ltx": ltx(),
    "ltx-guide": ltx(1, 96, **guided(1)),
    "ltx-coarse-guides": ltx(2, 48, **guided(2, coarse=True)),
    "ltx-2": ltx_2(20, {not_video(20, 384): 2}),
    # as many audio tokens as video tokens: only the heads tell the streams apart
    "ltx-2-long-audio": ltx_2(
        384, {CROSS_ATTENTION: 4, "heads of 32, and the video's have 64": 6}
    ),
    "mochi": Case(
        "mochi", ((1, 12, 3, 16, 24),), TokenLayout(0, 3, 8, 12, 5), 2,
        extra={"attention_mask": torch.tensor([[True] * 5 + [False] * 2])},
    ),
    "cosmos": wan("cosmos"),
    "predict2": wan("predict2"),
    "kandinsky-lite": kandinsky("kandinsky_lite"),
    "kandinsky-pro": kandinsky("kandinsky_pro"),
    "minimax": minimax(0),
    "minimax-keyframes": minimax(
        192, minimax_keyframes=[picture(0), picture(8)], minimax_frame_count=9
    ),
    "minimax-references": minimax(
        24 + 8,
        minimax_refs=[
            {"kind": "image", "latent_h": 8, "latent_w": 12, "latent": noise(1, 24, 1, 8, 12)},
            {"kind": "audio", "ref_audio_t": 4, "audio_latent": noise(1, 32, 2, 4)},
        ],
    ),
}  # fmt: skip

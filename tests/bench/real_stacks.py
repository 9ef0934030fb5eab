"""A few layers of ComfyUI's own video models, at their real width and length, on random weights."""

import functools
from dataclasses import dataclass, field, replace

import comfy.latent_formats
import comfy.memory_management
import comfy.model_patcher
import comfy.nested_tensor
import comfy.ops
import comfy.supported_models
import torch

CROSS_ATTENTION = "cross-attention or grouped heads"
QK_NORMS = ("norm_q", "norm_k", "q_norm", "k_norm", "query_norm", "key_norm")


@dataclass(frozen=True)
class Stack:
    """Layers of a model, and a video for them.

    Args:
        video: what the latent would become, for people.
        kind: class of comfy.supported_models. settings: of its diffusion model, at real width.
        heads, head_dim: of the attention over the video.
        shapes: of the latents: video, and audio where the model makes both.
        text: tokens and width of the prompt as the text encoder leaves it.
        layers, of_layers: attention layers over the video here, and in the whole model.
        declined: other attention calls of each model call that reach the override, by reason; "text"
            and "audio" stand for streams of that many tokens.
        small: settings in place of the real ones, to try the script. narrow: width of its prompt.
        extra: entries of the conditioning.
    """

    name: str
    video: str
    kind: str
    settings: dict
    heads: int
    head_dim: int
    shapes: tuple
    text: tuple[int, int]
    layers: int
    of_layers: int
    declined: dict
    small: dict
    narrow: int
    extra: dict = field(default_factory=dict)

    def declined_calls(self, shapes, tokens: int) -> dict:
        """`declined` in the words of the statistics, for a video of `tokens` tokens."""
        beside = {"text": self.text[0], "audio": max(shapes[-1])}
        return {
            f"{beside[why]:,} tokens are not the {tokens:,} of this model's video sequence"
            if why in beside
            else why: count
            for why, count in self.declined.items()
        }

    def short_shapes(self) -> tuple:
        """Latents of a short video, to warm up what does not depend on its length."""
        frames = 6 if len(self.shapes) == 1 else 5
        video = (*self.shapes[0][:2], frames, 24, 32)
        if len(self.shapes) == 1:
            return (video,)
        # the audio's time is the longest of its axes
        audio = tuple(20 if size == max(self.shapes[1]) else size for size in self.shapes[1])
        return video, audio


_PICTURE = {
    "kind": "image", "latent_h": 48, "latent_w": 84,
    "latent": torch.randn(1, 24, 1, 48, 84, generator=torch.Generator().manual_seed(2)),
}  # fmt: skip
_LTX_SMALL = {
    "num_attention_heads": 2, "cross_attention_dim": 256, "audio_num_attention_heads": 2,
    "audio_cross_attention_dim": 128, "caption_channels": 256,
}  # fmt: skip

STACKS = {
    "wan": Stack(
        "Wan 2.2 14B", "1280x720, 81 frames", "WAN21_T2V",
        {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "ffn_dim": 13824,
            "num_heads": 40, "num_layers": 2, "text_dim": 4096, "in_dim": 16, "out_dim": 16,
        },
        40, 128, ((1, 16, 21, 90, 160),), (512, 4096), 2, 40, {CROSS_ATTENTION: 2},
        {"dim": 256, "ffn_dim": 256, "num_heads": 2, "text_dim": 64}, 64,
    ),
    "minimax": Stack(
        "MiniMax-H3", "1344x768, 243 frames, one reference picture", "MiniMaxH3",
        {"image_model": "minimax_h3", "num_layers": 2},
        56, 128, ((1, 24, 72, 48, 84), (1, 32, 2, 405)), (512, 5120), 2, 50, {},
        {
            "hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 256, "text_dim": 64,
            "timestep_input_dim": 32, "time_embed_hidden_size": 64, "time_embed_dim": 64,
        }, 64,
        {"minimax_refs": [_PICTURE]},
    ),
    "cogvideox": Stack(
        "CogVideoX1.5 5B", "1360x768, 161 frames", "CogVideoX_T2V",
        {
            "image_model": "cogvideox", "num_attention_heads": 48, "attention_head_dim": 64,
            "in_channels": 16, "time_embed_dim": 512, "text_embed_dim": 4096, "num_layers": 2,
            "use_rotary_positional_embeddings": True, "patch_size_t": 2,
        },
        48, 64, ((1, 16, 41, 96, 170),), (226, 4096), 2, 42, {},
        {"num_attention_heads": 4, "text_embed_dim": 64, "time_embed_dim": 64}, 64,
    ),
    "ltx": Stack(
        "LTX-2", "1920x1088, 481 frames with sound", "LTXAV",
        {"image_model": "ltxav", "num_layers": 2, "connector_num_layers": 1},
        32, 128, ((1, 128, 61, 34, 60), (1, 8, 501, 16)), (1024, 7680), 2, 48,
        {CROSS_ATTENTION: 8, "audio": 2}, _LTX_SMALL, 512,
    ),
    "hunyuan": Stack(
        "HunyuanVideo", "1280x720, 129 frames", "HunyuanVideo",
        {
            "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16,
            "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
            "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56],
            "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True,
            "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
            "vision_in_dim": None, "meanflow_sum": False,
        },
        24, 128, ((1, 16, 33, 90, 160),), (256, 4096), 2, 60, {"text": 2},
        {"hidden_size": 256, "num_heads": 2, "context_in_dim": 64}, 64,
    ),
    "kandinsky": Stack(
        "Kandinsky 5 pro", "768x512, 241 frames", "Kandinsky5",
        {
            "image_model": "kandinsky5", "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024,
            "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 2,
            "axes_dims": (32, 48, 48),
        },
        32, 128, ((1, 16, 61, 64, 96),), (256, 3584), 2, 60, {CROSS_ATTENTION: 2, "text": 1},
        {"model_dim": 256, "ff_dim": 256, "time_dim": 64, "in_text_dim": 64}, 64,
    ),
}  # fmt: skip
STACKS["wan480"] = replace(
    STACKS["wan"], video="832x480, 81 frames", shapes=((1, 16, 21, 60, 104),)
)


def build(stack: Stack, device, *, small=False, seed=0, shift=0.0):
    """ComfyUI's model on the device from the start, as a ModelPatcher.

    Args:
        seed: of the weights. shift: share of its size by which each weight differs from that seed's.
    """
    settings = {**stack.settings, **(stack.small if small else {})}
    config = getattr(comfy.supported_models, stack.kind)(settings)
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model({}, device=device)
    diffusion = model.diffusion_model.to(device).eval()
    _fill(diffusion, torch.Generator(device).manual_seed(seed))
    if shift:
        generator = torch.Generator(device).manual_seed(seed + 1)
        for weight in diffusion.parameters():
            if weight.ndim > 1:
                noise = torch.empty_like(weight.data).normal_(0, 1, generator=generator)
                weight.data.add_(noise * weight.data.std() * shift)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def offloaded(patcher):
    """The same model with its weights in the CPU's memory, of which ComfyUI loads what it has room for."""
    cpu = torch.device("cpu")
    patcher.model.to(cpu).device = cpu
    return comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, cpu)


def paged(patcher):
    """The same model, whose weights ComfyUI pages in from the CPU's memory (DynamicVRAM) from now on.

    comfy-aimdo must have been begun before anything of ComfyUI, as its `main.py` does.
    """
    from comfy_aimdo import control

    device, cpu = patcher.load_device, torch.device("cpu")
    if not control.init_devices([device.index or 0]):
        raise RuntimeError("comfy-aimdo does not work here.")
    control.set_log_warning()
    dynamic = comfy.model_patcher.ModelPatcherDynamic
    comfy.model_patcher.CoreModelPatcher = dynamic
    comfy.memory_management.aimdo_enabled = True
    patcher.model.to(cpu).device = cpu
    return dynamic(patcher.model, load_device=device, offload_device=cpu)


def _fill(diffusion, generator):
    """Weights under which activations neither vanish nor explode, and attention is uneven."""
    for name, weight in diffusion.named_parameters():
        size = 0.02 if weight.ndim < 2 else weight[0].numel() ** -0.5
        if "time_projection" in name or name.endswith("modulation"):
            # a trained Wan changes little from step to step, random functions of time altogether
            size = 0.5 if name.endswith("modulation") else size * 0.1
        weight.data.normal_(0, size, generator=generator)
        if "norm" in name and name.endswith(("scale", "weight")) and weight.ndim == 1:
            weight.data.add_(1)
            if any(part in name for part in QK_NORMS):
                # trained models sharpen their logits here
                weight.data.mul_(1.8)
    for name, buffer in diffusion.named_buffers():
        if name.endswith("inv_freq"):
            # ComfyUI leaves it to the checkpoint
            share = torch.arange(len(buffer), device=buffer.device) / len(buffer)
            buffer.copy_(10000.0**-share)


@functools.cache
def noise(shapes, seed=0):
    """Noise whose neighbours are alike, as in a video: of white noise all blocks weigh the same."""
    parts = []
    for number, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed + number)
        fine = torch.randn(shape, generator=generator)
        if len(shape) == 5:
            coarse = [-(-size // step) for size, step in zip(shape[2:], (3, 8, 8), strict=True)]
            smooth = torch.randn(*shape[:2], *coarse, generator=generator)
            smooth = torch.nn.functional.interpolate(smooth, shape[2:], mode="trilinear")
            fine = 0.3 * fine + smooth / smooth.std()
        parts.append(fine / fine.std())
    return _pack(parts)


def empty(shapes):
    return _pack([torch.zeros(shape) for shape in shapes])


def _pack(parts):
    return parts[0] if len(parts) == 1 else comfy.nested_tensor.NestedTensor(parts)


def conditioning(stack: Stack, small: bool):
    generator = torch.Generator().manual_seed(1)
    tokens, width = stack.text
    text = torch.randn(1, tokens, stack.narrow if small else width, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, 768, generator=generator), **stack.extra}]]

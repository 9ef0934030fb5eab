"""ComfyUI's model classes that are trained here, their first weights, and files of weights."""

import json
import lzma
import sys
from functools import partial
from pathlib import Path

import numpy as np
import procedural_video as video
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
# ComfyUI knows HunyuanVideo, as against its image models, by a pooled text vector of this width
POOLED_DIM = 768
_generator = torch.Generator().manual_seed(0)
POOLED_SIGNS = torch.randint(0, 2, (video.TEXT_DIM, POOLED_DIM), generator=_generator) * 2.0 - 1.0


def pooled(text: torch.Tensor) -> torch.Tensor:
    """[..., POOLED_DIM] float32 from [..., words, TEXT_DIM]: every word hashed to signs, and added.

    HunyuanVideo gets such a vector beside its text from CLIP, and every layer is modulated by it:
    what tells each token of the video about the whole sentence.
    """
    text = text.float()
    words = text.any(-1, keepdim=True).sum(-2)
    hashed = (text @ POOLED_SIGNS.to(text.device)).sign()
    return hashed.sum(-2) / words.clamp(min=1).sqrt()


def prepare(comfyui: str, training: bool) -> None:
    """Makes `import comfy` work without starting ComfyUI."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    # before ComfyUI's folder, which may hold a `tests` too
    from tests.tools import torchvision_shim

    if comfyui not in sys.path:
        sys.path.insert(0, comfyui)
    torchvision_shim.install()
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.model_management

    comfy.model_management.in_training = training


def precision(device) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def wan(args, in_dim: int = 16, **common) -> torch.nn.Module:
    """Self-attention over the video, cross-attention to the text.

    Args:
        in_dim: channels, 36 where 4 say which frames are known and 16 hold them.
    """
    import comfy.ldm.wan.model
    import comfy.ops

    model = comfy.ldm.wan.model.WanModel(
        model_type="t2v", dim=args.heads * args.head_dim, ffn_dim=args.ffn, num_heads=args.heads,
        num_layers=args.layers, text_dim=video.TEXT_DIM, in_dim=in_dim, out_dim=16,
        operations=comfy.ops.disable_weight_init, **common,
    )  # fmt: skip
    # the first block's input lies in memory as every other's: one compilation serves all
    model.patch_embedding.register_forward_hook(
        lambda module, inputs, out: out.contiguous(memory_format=torch.channels_last_3d)
    )
    return model


def hunyuan(args, **common) -> torch.nn.Module:
    """One sequence of text and video; `args.double` of the layers are double blocks.

    The loader derives all sizes from the width: heads of 128, a feed-forward of four widths.
    """
    import comfy.ldm.flux.layers as layers
    import comfy.ldm.hunyuan_video.model
    import comfy.ops

    class Operations(comfy.ops.disable_weight_init):
        class LayerNorm(comfy.ops.disable_weight_init.LayerNorm):
            # blocks add to their input in place, which autograd needs unchanged
            def forward(self, x):
                return super().forward(x.clone())

    class Double(layers.DoubleStreamBlock):
        def forward(self, img, txt, vec, pe, transformer_options, **kwargs):
            return super().forward(
                img.clone(), txt.clone(), vec, pe, transformer_options=transformer_options
            )

    class Single(layers.SingleStreamBlock):
        def forward(self, x, vec, pe, transformer_options, **kwargs):
            return super().forward(x.clone(), vec, pe, transformer_options=transformer_options)

    if args.head_dim != 128:
        raise ValueError("ComfyUI loads HunyuanVideo with heads of 128 only.")
    model = comfy.ldm.hunyuan_video.model.HunyuanVideo(
        image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=POOLED_DIM,
        context_in_dim=video.TEXT_DIM, hidden_size=args.heads * args.head_dim, mlp_ratio=4.0,
        num_heads=args.heads, depth=args.double, depth_single_blocks=args.layers - args.double,
        axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True,
        guidance_embed=False, byt5=False, meanflow=False, use_cond_type_embedding=False,
        vision_in_dim=None, meanflow_sum=False, operations=Operations, **common,
    )  # fmt: skip
    for block in model.double_blocks:
        block.__class__ = Double
    for block in model.single_blocks:
        block.__class__ = Single
    return model


FAMILIES = {"wan": wan, "wan i2v": partial(wan, in_dim=36), "hunyuan": hunyuan}


def attention_blocks(model) -> list[torch.nn.Module]:
    """The blocks that attend over the video, in the order in which they run."""
    if hasattr(model, "double_blocks"):
        return [*model.double_blocks, *model.single_blocks]
    return list(model.blocks)


def build(args, device) -> torch.nn.Module:
    model = FAMILIES[args.family](args, device=device, dtype=precision(device))
    width = args.heads * args.head_dim
    generator = torch.Generator().manual_seed(args.seed)
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            value = torch.zeros(p.shape)
            if "norm" in name and name.endswith("weight"):
                # sharper self-attention from the start
                value += args.qk_gain if ".norm_" in name or "_norm." in name else 1.0
            elif name.endswith("mod.lin.bias") or name.endswith("modulation.lin.bias"):
                value.unflatten(0, (-1, 3, width))[:, 2] = args.gate
        elif name.startswith(("head.head", "final_layer.linear")):
            value = torch.zeros(p.shape)
        elif name.endswith("modulation"):
            value = value * width**-0.5
            if name.startswith("blocks."):
                value[:, 2::3] += args.gate
        else:
            small = 0.3 if "time_projection" in name or "mod" in name else 1.0
            value = value * small * p[0].numel() ** -0.5
        p.data.copy_(value)
    return model


def metadata(args) -> dict[str, str]:
    """What ComfyUI's loader cannot read off the shapes of a Wan model."""
    config = {"num_heads": args.heads, "text_dim": video.TEXT_DIM}
    return {"config": json.dumps({"transformer": config})} if args.family.startswith("wan") else {}


# Matrices from this size on are stored in few bits, in groups along a row that share a scale.
LARGE = 2**16
GROUP = 64


def is_large(value: torch.Tensor) -> bool:
    return value.ndim == 2 and value.numel() >= LARGE and value.shape[1] % GROUP == 0


def codes(value: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed whole numbers [..., columns] and float16 scales [..., columns / GROUP] of float32 rows.

    The largest of a group becomes 2**(bits - 1) - 1; number * scale is the stored weight.
    """
    top = 2 ** (bits - 1) - 1
    groups = value.unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / top).clamp(min=2**-24).half()
    numbers = (groups / scales.float()[..., None]).round().clamp(-top, top)
    return numbers.flatten(-2), scales


def decoded(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weights that `codes` stand for."""
    return (numbers.float().unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)


def rounded(value: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of float32 rows after they were stored."""
    return decoded(*codes(value, bits))


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, columns] signed numbers below 2**(bits - 1) -> uint8 [rows, columns * bits / 8]."""
    unsigned = (numbers.numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    places = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(places.reshape(len(unsigned), -1), -1, bitorder="little"))


def unpacked(stored: torch.Tensor, columns: int) -> torch.Tensor:
    """[rows, columns] int16, the numbers that `packed` got."""
    bits = 8 * stored.shape[1] // columns
    places = np.unpackbits(stored.numpy(), axis=-1, bitorder="little")
    places = places.reshape(len(stored), columns, bits).astype(np.int16)
    return torch.from_numpy(places @ (1 << np.arange(bits, dtype=np.int16)) - 2 ** (bits - 1))


def save(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str], bits: int) -> None:
    """bf16, or with at most 8 bits large matrices packed under NAME, their scales NAME.scales.

    A path that ends with .xz gets a file that is compressed, too.
    """
    stored = {}
    for name, value in state.items():
        value = value.detach().float().cpu()
        if bits <= 8 and is_large(value):
            numbers, stored[f"{name}.scales"] = codes(value, bits)
            stored[name] = packed(numbers, bits)
        else:
            stored[name] = value.bfloat16()
    data = safetensors.torch.save(stored, metadata or None)
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)


def content(path: Path) -> bytes:
    """Of a file of safetensors; one that ends with .xz is unpacked."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def header(data: bytes) -> dict:
    """Of a file of safetensors: what lies where, and under `__metadata__` what was told beside it."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """The bf16 state that `save` stored, and its metadata."""
    data = content(path)
    stored, found = safetensors.torch.load(data), header(data).get("__metadata__")
    for name in [name for name in stored if name.endswith(".scales")]:
        scales, name = stored.pop(name), name.removesuffix(".scales")
        numbers = unpacked(stored[name], scales.shape[1] * GROUP)
        stored[name] = decoded(numbers, scales).bfloat16()
    return stored, found

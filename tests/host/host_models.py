"""Tiny checkpoints of random weights that ComfyUI's stock loader takes for the real families."""

import json
from pathlib import Path

import torch

TEXT_DIM = 64
# by this width ComfyUI knows HunyuanVideo 1.5
VISION_DIM = 1152


def wan(**options):
    from comfy.ldm.wan.model import WanModel

    settings = {
        "model_type": "t2v", "dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2,
        "text_dim": TEXT_DIM, "in_dim": 16, "out_dim": 16,
    }  # fmt: skip
    return WanModel(**{**settings, **options}, **_common())


HUNYUAN = {
    "image_model": "hunyuan_video", "out_channels": 16, "vec_in_dim": 768,
    "context_in_dim": TEXT_DIM, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256,
    "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False,
    "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}  # fmt: skip


def hunyuan_video(**options):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    return HunyuanVideo(**{**HUNYUAN, "in_channels": 16, **options}, **_common())


# what the 1.5 release differs in: text of three sources, patches of one, no single blocks
HUNYUAN_15 = {
    "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "patch_size": [1, 1, 1],
    "depth": 2, "depth_single_blocks": 0, "guidance_embed": False, "byt5": True,
    "use_cond_type_embedding": True, "vision_in_dim": VISION_DIM, "meanflow_sum": True,
}  # fmt: skip

# name: (maker, its options, what the file's metadata must say for the loader to see the sizes)
MODELS = {
    "wan_t2v": (wan, {}, {"num_heads": 2, "text_dim": TEXT_DIM}),
    "wan_h64": (wan, {"num_heads": 4}, {"num_heads": 4, "text_dim": TEXT_DIM}),
    "wan_h32": (wan, {"num_heads": 8}, {"num_heads": 8, "text_dim": TEXT_DIM}),
    "wan_i2v": (
        wan,
        {"model_type": "i2v", "in_dim": 36},
        {"num_heads": 2, "text_dim": TEXT_DIM},
    ),
    "wan_reference": (
        wan,
        {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        {"num_heads": 2, "text_dim": TEXT_DIM},
    ),
    "hunyuan": (hunyuan_video, {}, None),
    "hunyuan_15": (hunyuan_video, HUNYUAN_15, None),
}


def write_models(folder: Path, names=tuple(MODELS)) -> dict[str, Path]:
    """Write tiny checkpoints; returns their paths by name."""
    from safetensors.torch import save_file

    paths = {}
    for seed, name in enumerate(names):
        maker, options, metadata = MODELS[name]
        config = None if metadata is None else {"config": json.dumps({"transformer": metadata})}
        paths[name] = folder / f"tiny_{name}.safetensors"
        save_file(random_weights(maker(**options), seed), paths[name], metadata=config)
    return paths


def random_weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights under which activations neither vanish nor explode, and attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in model.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            value = torch.ones(like.shape)
        elif like.ndim == 1:
            value = torch.randn(like.shape, generator=generator) * 0.01
        else:
            size = like.shape[-1] ** -0.5 if like.ndim == 2 else 0.05
            value = torch.randn(like.shape, generator=generator) * size
        if name.endswith(
            ("norm_q.weight", "norm_k.weight", "query_norm.weight", "key_norm.weight")
        ):
            # trained models sharpen their logits here; without it every block weighs the same
            value = value * 1.8
        weights[name] = value.to(torch.float32).contiguous()
    return weights


def _common():
    import comfy.ops

    # no layer initialises itself: the weights are replaced anyway
    return {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}

"""Tiny models of random weights, one per family: ComfyUI's own classes, on its own way to them.

Most are too small, or too unlike any release, for ComfyUI to tell from their weights what they are,
so the settings it would have read are given here; everything after that is ComfyUI's.
"""

import pytest
import torch

from tests.host.host_models import HUNYUAN, TEXT_DIM, random_weights

_WAN = {
    "image_model": "wan2.1", "dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2,
    "text_dim": TEXT_DIM, "in_dim": 16, "out_dim": 16,
}  # fmt: skip
_SCAIL = {**_WAN, "in_dim": 20}
_LTX = {
    "in_channels": 16, "cross_attention_dim": 128, "attention_head_dim": 64,
    "num_attention_heads": 2, "caption_channels": TEXT_DIM, "num_layers": 2,
}  # fmt: skip
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256, "num_blocks": 2,
    "num_heads": 2, "crossattn_emb_channels": TEXT_DIM, "pos_emb_cls": "rope3d",
    "use_adaln_lora": True, "adaln_lora_dim": 32, "extra_per_block_abs_pos_emb": True,
}  # fmt: skip
_COSMOS_1 = {
    "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
_COG = {
    "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 16, "time_embed_dim": 64,
    "text_embed_dim": TEXT_DIM, "num_layers": 2,
}  # fmt: skip

# name: (class of comfy.supported_models, settings of the diffusion model)
MODELS = {
    "wan": ("WAN21_T2V", {**_WAN, "model_type": "t2v"}),
    "vace": (
        "WAN21_Vace", {**_WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}
    ),
    "camera": (
        "WAN22_Camera", {**_WAN, "model_type": "camera_2.2", "in_dim_control_adapter": 6}
    ),
    "speech": ("WAN22_S2V", {**_WAN, "model_type": "s2v", "audio_dim": 32}),
    "humo": ("WAN21_HuMo", {**_WAN, "model_type": "humo"}),
    "animate": ("WAN22_Animate", {**_WAN, "model_type": "animate", "num_layers": 5}),
    "animate_2": ("WAN_Animate2", {**_WAN, "model_type": "animate2", "in_dim": 36}),
    "scail": ("WAN21_SCAIL", {**_SCAIL, "model_type": "i2v"}),
    "scail_2": ("WAN21_SCAIL2", {**_SCAIL, "model_type": "i2v"}),
    "dancer": (
        "WAN22_WanDancer",
        {**_WAN, "model_type": "wandancer", "music_dim": 256},
    ),
    "causal": ("WAN21_CausalAR_T2V", {**_WAN, "model_type": "t2v"}),
    "hunyuan": ("HunyuanVideo", {**HUNYUAN, "in_channels": 16}),
    "hunyuan_i2v": ("HunyuanVideoI2V", {**HUNYUAN, "in_channels": 33}),
    "cogvideox": ("CogVideoX_T2V", {**_COG, "use_rotary_positional_embeddings": True}),
    "cogvideox_15": (
        "CogVideoX_T2V",
        {**_COG, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 64},
    ),
    "ltxv": ("LTXV", {**_LTX, "image_model": "ltxv"}),
    "ltxav": (
        "LTXAV",
        {
            **_LTX, "image_model": "ltxav", "cross_attention_dim": 128,
            "audio_in_channels": 128, "audio_cross_attention_dim": 64,
            "audio_attention_head_dim": 32, "audio_num_attention_heads": 2,
            "connector_attention_head_dim": 32, "connector_num_attention_heads": 2,
            "connector_num_layers": 1,
        },
    ),
    "mochi": (
        "GenmoMochi",
        {
            "depth": 2, "patch_size": 2, "num_heads": 12, "hidden_size_x": 1536,
            "hidden_size_y": 128, "learn_sigma": False, "in_channels": 12, "qk_norm": True,
            "qkv_bias": False, "out_bias": True, "use_t5": True, "t5_feat_dim": TEXT_DIM,
        },
    ),
    "cosmos": ("CosmosT2V", {**_COSMOS, **_COSMOS_1}),
    "predict2": (
        "CosmosT2IPredict2", {**_COSMOS, "extra_per_block_abs_pos_emb": False}
    ),
    "kandinsky_lite": (
        "Kandinsky5",
        {
            "in_text_dim": TEXT_DIM, "time_dim": 64, "model_dim": 128, "ff_dim": 128,
            "visual_embed_dim": 132, "patch_size": (1, 2, 2), "num_text_blocks": 1,
            "num_visual_blocks": 2, "axes_dims": (16, 24, 24),
        },
    ),
    "kandinsky_pro": (
        "Kandinsky5",
        {
            "in_text_dim": TEXT_DIM, "time_dim": 64, "model_dim": 256, "ff_dim": 128,
            "visual_embed_dim": 132, "patch_size": (1, 2, 2), "num_text_blocks": 1,
            "num_visual_blocks": 2, "axes_dims": (32, 48, 48),
        },
    ),
    "minimax": (
        "MiniMaxH3",
        {
            "hidden_size": 256, "num_layers": 2, "token_refiner_num_layers": 2,
            "num_attention_heads": 2, "attention_head_dim": 128, "ffn_hidden_size": 256,
            "text_dim": TEXT_DIM, "timestep_input_dim": 32, "time_embed_hidden_size": 64,
            "time_embed_dim": 64,
        },
    ),
}  # fmt: skip


def build(name: str):
    """Return a ModelPatcher; skips where this ComfyUI does not have the model."""
    import comfy.model_patcher
    import comfy.supported_models

    kind, settings = MODELS[name]
    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    config = getattr(comfy.supported_models, kind)(dict(settings))
    config.set_inference_dtype(torch.float32, None)
    with pytest.MonkeyPatch.context() as patch:
        if name == "mochi":
            _narrow_mochi(patch)
        model = config.get_model({}, device="cpu")
    diffusion = model.diffusion_model
    diffusion.load_state_dict(random_weights(diffusion, 1))
    if name == "animate":
        # its face reader takes pictures of 512 x 512 only, and minutes on a CPU
        diffusion.motion_encoder.get_motion = lambda faces: faces.flatten(1)[:, :512]
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def _narrow_mochi(patch):
    """Its multilayer perceptrons have a fixed width of 12,288."""
    from comfy.ldm.genmo.joint_model import asymm_models_joint

    wide = asymm_models_joint.FeedForward

    def narrow(**settings):
        return wide(**{**settings, "hidden_size": 256})

    patch.setattr(asymm_models_joint, "FeedForward", narrow)

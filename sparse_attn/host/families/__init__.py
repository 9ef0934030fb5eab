"""Where text and video tokens lie, one rule per model family.

A rule reads the latent's shape and the model's inputs and says what the self-attention sequence
looks like. A call whose token count or head width differs is not ours. Add a family with one row of
FAMILIES: name, rule for the tokens, blocks by kind, width of a head.
"""

from ...sentences import Sentence
from . import joint, ltx, video_only, wan
from .family import Family, listed_in

_BLOCKS = listed_in("blocks")
_WAN = (_BLOCKS, lambda model: model.dim // model.num_heads)
_LTX = (ltx.layout, listed_in("transformer_blocks"), lambda model: model.attention_head_dim)
_COSMOS = (
    video_only.cosmos, video_only.cosmos_blocks,
    lambda model: model.model_channels // model.num_heads,
)  # fmt: skip

# class of the diffusion model -> its family
FAMILIES = {
    # [reference image] video [frames of Phantom's subjects] [in-context videos]
    "WanModel": Family("Wan", wan.layout, *_WAN),
    # video; a VACE block follows a main block and shares its number
    "VaceWanModel": Family(
        "Wan VACE", wan.layout, *_WAN, beside=wan.vace_blocks, beside_times=wan.vace_contexts
    ),
    # video
    "CameraWanModel": Family("Wan camera", wan.layout, *_WAN),
    # video [reference] [earlier frames, the older the coarser]
    "WanModel_S2V": Family("Wan speech to video", wan.speech, *_WAN),
    # video [references]
    "HumoWanModel": Family("HuMo", wan.with_reference_last, *_WAN),
    # [reference image] video
    "AnimateWanModel": Family("Wan Animate", wan.layout, *_WAN),
    # video; declined while a pose branch runs
    "WanAnimate2Model": Family("Wan Animate 2", wan.animate_2, *_WAN),
    # [references] video [poses, of full or half size]
    "SCAILWanModel": Family("SCAIL", wan.pose, *_WAN),
    "SCAIL2WanModel": Family("SCAIL 2", wan.pose, *_WAN),
    # [reference image] video
    "WanDancerModel": Family("WanDancer", wan.layout, *_WAN),
    # video; declined while it runs frame by frame from a KV cache
    "CausalWanModel": Family("causal Wan", wan.causal, *_WAN),
    # [vision] [byT5] text [reference] video; single blocks count on after double ones
    "HunyuanVideo": Family(
        "HunyuanVideo", joint.hunyuan_video, joint.hunyuan_blocks,
        lambda model: model.hidden_size // model.num_heads, segments=joint.hunyuan_segments,
    ),
    # text video
    "CogVideoXTransformer3DModel": Family(
        "CogVideoX", joint.cogvideox, _BLOCKS, lambda model: model.attention_head_dim
    ),
    # video [guide frames, without masked tokens]
    "LTXVModel": Family("LTX-Video", *_LTX),
    "LTXAVModel": Family("LTX-2", *_LTX),
    # video text
    "AsymmDiTJoint": Family("Mochi", joint.mochi, _BLOCKS, lambda model: model.head_dim),
    # video
    "GeneralDIT": Family("Cosmos 1", *_COSMOS, segments=video_only.cosmos_segments),
    "MiniTrainDIT": Family("Cosmos Predict2", *_COSMOS, segments=video_only.predict2_segments),
    "Anima": Family("Anima", *_COSMOS, segments=video_only.predict2_segments),
    # video
    "Kandinsky5": Family(
        "Kandinsky 5", video_only.kandinsky, listed_in("visual_transformer_blocks"),
        lambda model: model.visual_transformer_blocks[0].self_attention.head_dim,
    ),
    # video [first image]; audio has tokens of its own. Written from its source, not run
    "Kandinsky6NativeAVDiT": Family(
        "Kandinsky 6", video_only.kandinsky_6, video_only.kandinsky_6_blocks,
        lambda model: video_only.kandinsky_6_blocks(model)["double"][0].head_dim,
    ),
    # video; audio has blocks of its own. Written from its source, not run
    "Prism": Family(
        "Prism", video_only.prism, video_only.prism_blocks,
        lambda model: model.video_dit.head_dim, beside=video_only.prism_low_noise, by_turns=True,
    ),
    # text [references] audio video
    "MiniMaxH3Model": Family(
        "MiniMax-H3", joint.minimax_h3, _BLOCKS, lambda model: model.blocks[0].attn.head_dim
    ),
}  # fmt: skip

# video models that cannot be served, and why
NOT_SERVED = {
    "NaDiT": "SeedVR2 attends in small windows, out of the reach of attention overrides",
}


def family_of(model) -> tuple[Family | None, str]:
    """Return the family of a diffusion model, or None and the reason there is none."""
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        return None, NOT_SERVED.get(name, Sentence("why_not_a_video_model", name=name))
    if name == "MiniMaxH3Model" and joint.is_fast_h3(model):
        return None, Sentence("why_fast_h3")
    patch_size = getattr(model, "patch_size", None)
    if isinstance(patch_size, list | tuple) and len(patch_size) == 2:
        return None, Sentence("why_images", name=name)
    return family, ""

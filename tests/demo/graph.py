"""The demo's workflow, in the format of ComfyUI's HTTP API."""

MODEL = "tiny_wan.safetensors"
PROMPT = "a large red star moving left slowly over a navy gradient"


# Plain torch searches in a second pass, and orders by similarity in some more: one search, by
# position, leaves more of the time that sparse steps save.
ON_A_CPU = {"search_points": "", "token_order": "position"}


def graph(
    *, preset: str, enabled: bool, prompt: str = PROMPT, seed: int = 1, steps: int = 20,
    width: int = 416, height: int = 320, length: int = 61, settings: dict | None = None,
) -> dict:  # fmt: skip
    """Loader -> AdaSpa -> sampler -> report and frames; cfg 1, so one pass per step.

    Args:
        settings: widgets that the preset "Custom" takes.
    """
    workflow = {
        "model": node("UNETLoader", unet_name=MODEL, weight_dtype="default"),
        "adaspa": node(
            "AdaSpaAttention", model=["model", 0], preset=preset, sparsity=0.8, block_size="64",
            warmup=0.12, search_points="0.45", head_adaptive=False, dense_layers="",
            start_percent=0.0, end_percent=1.0, min_tokens=4096, cache="auto",
            dense_attention="auto", enabled=enabled, precision="auto", recall=0.0,
            tail="pooled", token_order="similarity", verdict="auto",
        ),
        "prompt": node("AdaSpaTinyPrompt", text=prompt),
        "nothing": node("AdaSpaTinyPrompt", text=""),
        "latent": node(
            "EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1
        ),
        "sampler": node(
            "KSampler", model=["adaspa", 0], positive=["prompt", 0], negative=["nothing", 0],
            latent_image=["latent", 0], seed=seed, steps=steps, cfg=1.0, sampler_name="euler",
            scheduler="simple", denoise=1.0,
        ),
        "report": node(
            "AdaSpaReport", samples=["sampler", 0], adaspa=["adaspa", 1], layer=3, head=0
        ),
        "frames": node("AdaSpaTinyDecode", samples=["report", 0], scale=4),
        "save": node("SaveImage", images=["frames", 0], filename_prefix="demo"),
    }  # fmt: skip
    workflow["adaspa"]["inputs"] |= settings or {}
    return workflow


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}

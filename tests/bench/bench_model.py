"""Steps of ComfyUI's own HunyuanVideo, sampled through the node's patch, on random weights.

    python tests/bench/bench_model.py --out results.json

Times one dense step with the host's default attention, then a short run in which every kind of step
occurs, and composes a run of 50 steps from the measured ones. Random weights say nothing of quality.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.tools import comfy_inprocess

comfy_inprocess.start()

import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.hunyuan_video.model import HunyuanVideo  # noqa: E402

from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.host.install import install  # noqa: E402
from tests.bench.record import facts  # noqa: E402

LARGE = {"hidden_size": 3072, "num_heads": 24, "depth": 20, "depth_single_blocks": 40, "context_in_dim": 4096}
SMALL = {"hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "context_in_dim": 64}
# dense, dense with LSE, search, sparse, LSE-cached search, sparse
STEPS, WARMUP, POINTS = 6, 2 / 6, (4 / 6,)
# AdaSpa's schedule: 0-9 dense, 10 search, 11-29 sparse, 30 search, 31-49 sparse
RUN = {"dense": 9, "dense_with_lse": 1, "search": 1, "search_again": 1, "sparse": 38}


def build(sizes, device) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's model with random weights, on the device from the start."""
    parameters = dict(
        image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=768, mlp_ratio=4.0,
        axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True,
        byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None,
        meanflow_sum=False, **sizes,
    )  # fmt: skip
    shapes = HunyuanVideo(
        device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init, **parameters
    ).state_dict()
    config = comfy.model_detection.model_config_from_unet(shapes, "")
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model(shapes, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        # weights of norms stay near one, so that logits have the size they have in a real model
        weight.data.normal_(0, 0.02, generator=generator)
        if "norm" in name and name.endswith(("scale", "weight")) and weight.ndim == 1:
            weight.data.add_(1)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def sample(patcher, shape, context_dim: int, steps: int) -> float:
    """Sample once; seconds of the whole run."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 256, context_dim, generator=generator)
    condition = [[text, {"pooled_output": torch.randn(1, 768, generator=generator)}]]
    latent = torch.zeros(shape)
    noise = torch.randn(shape, generator=generator)
    start = time.perf_counter()
    comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", condition, condition, latent,
        denoise=1.0, disable_pbar=True, seed=0,
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two layers and few tokens, to try the script")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = comfy.model_management.get_torch_device()
    sizes = SMALL if options.small else LARGE
    shape = (1, 16, 5, 24, 32) if options.small else (1, 16, 33, 90, 160)

    torch.set_grad_enabled(False)
    patcher = build(sizes, device)
    context = sizes["context_in_dim"]
    print(f"built {sum(p.numel() for p in patcher.model.parameters()) / 1e9:.2f} B parameters", flush=True)
    sample(patcher, (1, 16, 2, 16, 16), context, 1)  # loads and warms what does not depend on length
    host = sample(patcher, shape, context, 1)
    print(f"one step, host's default attention: {host:.2f} s", flush=True)

    config = AdaSpaConfig(
        sparsity=options.sparsity, warmup=WARMUP, search_points=POINTS, min_tokens=0, cache="gpu"
    )
    # a short run compiles the kernels; the measured run then starts warm
    warm, _ = install(patcher, config)
    sample(warm, (1, 16, 5, 24, 32), context, STEPS)
    adaspa, handle = install(patcher, config)
    sample(adaspa, shape, context, STEPS)
    statistics = handle.latest()
    print("\n".join(statistics.lines()), flush=True)

    order = ["dense", "dense_with_lse", "search", "sparse", "search_again", "sparse_again"]
    steps = dict(zip(order, (took for _, took in statistics.steps), strict=True))
    composed = sum(count * steps[kind] for kind, count in RUN.items())
    dense = 50 * min(host, steps["dense_with_lse"])
    result = {
        "what": "seconds per denoising step of ComfyUI's HunyuanVideo, random weights",
        "tokens": statistics.tokens,
        "layers": sizes["depth"] + sizes["depth_single_blocks"],
        "host_default_step": host,
        "steps": steps,
        "run_of_50": {
            "schedule": RUN,
            "adaspa_seconds": composed,
            "speed_up_over_host_default": 50 * host / composed,
            "speed_up_over_fastest_dense": dense / composed,
        },
        "statistics": statistics.as_dict(),
        **facts(),
    }
    print(json.dumps({k: result[k] for k in ("host_default_step", "steps", "run_of_50")}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

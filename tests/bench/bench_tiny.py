"""The demo's generation in process on this machine: dense and every preset, same seed.

    python tests/bench/bench_tiny.py --out results.json

For GPUs on machines where no server can run; needs COMFYUI_PATH.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny_model")]

from tests.tools import comfy_inprocess  # noqa: E402

comfyui = os.environ["COMFYUI_PATH"]
comfy_inprocess.start(comfyui)

import check_model  # noqa: E402
import procedural_video as video  # noqa: E402

from sparse_attn.config import PRESETS, from_preset  # noqa: E402
from sparse_attn.host.install import install  # noqa: E402
from tests.bench.record import facts  # noqa: E402

LATENT = (16, 40, 52)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = check_model.load(ROOT / "tests/tiny_model/tiny_wan.safetensors.xz", comfyui)

    def sample(patcher, prompt, seed):
        start = time.perf_counter()
        latent = check_model.generate(patcher, [prompt], LATENT, options.steps, seed)
        return video.decode(latent)[0], time.perf_counter() - start

    prompts = check_model.FIXED_PROMPTS
    sample(model, prompts[0], 0)
    dense = [sample(model, prompt, seed) for seed, prompt in enumerate(prompts)]
    rows = []
    for name in PRESETS:
        patched, handle = install(model, from_preset(name, min_tokens=4096))
        sample(patched, prompts[0], 0)
        videos = [sample(patched, prompt, seed) for seed, prompt in enumerate(prompts)]
        psnrs = [check_model.psnr(a, b) for (a, _), (b, _) in zip(dense, videos, strict=True)]
        rows.append(
            {
                "preset": name,
                "psnr": psnrs,
                "mean_psnr": sum(psnrs) / len(psnrs),
                "seconds": [took for _, took in videos],
                **handle.latest().as_dict(),
            }
        )
        print(name, rows[-1]["mean_psnr"], psnrs, handle.latest().summary(), flush=True)
    print("\n".join(handle.latest().lines()))
    result = {
        "what": "PSNR in dB of sparse against dense generations of tests/tiny_model, by preset",
        "prompts": prompts,
        "dense_seconds": [took for _, took in dense],
        "rows": rows,
        **facts(),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Samples the tiny model through ComfyUI's stock loader and sampler, and says how good it is.

    python tests/tiny_model/check_model.py --comfyui PATH --out OUT [--model FILE]

Contact sheets and an animation go to OUT. Numbers: how often colour, shape, direction and speed
read back from the video match the prompt; the attention recall of an exact row-wise top-k at a
fifth of the schedule; and how close a run with a block mask stays to the dense one.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import networks
import procedural_video as video
import torch
import torch.nn.functional as F

BLOCK = 64
DENSITIES = (0.2, 0.1)
FIXED_PROMPTS = (
    "a large red star moving left slowly over a navy gradient",
    "a small yellow circle moving right quickly over forest checks camera panning left",
    "a large white ring moving up slowly and a small pink circle moving right slowly over plain plum",
    "a large cyan spinning square moving right slowly over brown stripes",
    "a large green spinning triangle moving down quickly over a slate gradient camera panning right",
    "a small orange star moving up quickly and a large blue square moving left slowly over teal stripes",
)
RICH_PROMPTS = (
    "a large striped red star moving left slowly over navy clouds",
    "a small yellow circle moving right quickly over forest checks camera panning left",
    "a large dotted white ring moving up slowly and a small pink circle moving right slowly over plain plum",
    "a large dotted cyan spinning square moving right slowly over brown stripes camera panning up",
    "a large green triangle moving down quickly over slate clouds camera panning right",
    "a small striped orange star moving up quickly and a large blue square moving left slowly over teal clouds",
)


def load(path: Path, comfyui: str):
    """The model as the stock UNETLoader gives it."""
    networks.prepare(comfyui, training=False)
    import comfy.sd

    state, metadata = networks.read(path)
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)


def generate(
    model, prompts, size, steps: int, seed: int, override=None, noise=None
) -> torch.Tensor:
    """Model-space latents [N, 16, T, H, W] from euler, simple, cfg 1.

    Args:
        override: an `optimized_attention_override`, or None.
        noise: [N, 16, T, H, W], None for what ComfyUI draws from the seed.
    """
    import comfy.sample

    clone = model.clone()
    if override is not None:
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
    latent = torch.zeros(len(prompts), 16, *size)
    noise = comfy.sample.prepare_noise(latent, seed) if noise is None else noise
    text = torch.stack([video.embed_prompt(p) for p in prompts])
    empty = torch.stack([video.embed_prompt("")] * len(prompts))
    positive, negative = ([[x, {"pooled_output": networks.pooled(x)}]] for x in (text, empty))
    out = comfy.sample.sample(
        clone, noise, steps, 1.0, "euler", "simple", positive, negative, latent,
        denoise=1.0, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return model.get_model_object("latent_format").process_in(out.float().cpu())


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, H * D] -> [B, H, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def block_masses(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H, Nq, Nk] float32 from [B, H, L, D]; a full row of blocks sums to its query rows."""
    pad = -q.shape[2] % BLOCK
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head].float() @ k[:, head].float().mT * q.shape[-1] ** -0.5
        weights = F.pad(scores.softmax(-1), (0, pad, 0, pad))
        heads.append(weights.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).sum((2, 4)))
    return torch.stack(heads, 1)


def keep_largest(masses: torch.Tensor, density: float) -> torch.Tensor:
    """Row-wise top-k of block masses as a bool mask of the same shape."""
    count = max(1, round(density * masses.shape[-1]))
    best = masses.topk(count, dim=-1).indices
    return torch.zeros_like(masses, dtype=torch.bool).scatter_(-1, best, True)


def over_video(attend, text: int = 0):
    """An `optimized_attention_override` that hands self-attention over the video to `attend`.

    `attend(layer, q, k, v)` gets and returns [B, H, L, D], or returns None where the host shall
    attend. A layer is a block's type, if the model says it, and its index; `text` tokens come
    before the video.
    """

    def attention(func, q, k, v, heads, mask=None, **kwargs):
        options = kwargs.get("transformer_options") or {}
        index = options.get("block_index")
        q4, k4, v4 = (x if kwargs.get("skip_reshape") else split(x, heads) for x in (q, k, v))
        # the text refiner and cross-attention are not over the video
        ours = index is not None and q4.shape[2] == k4.shape[2] > text
        out = attend((options.get("block_type", ""), index), q4, k4, v4) if ours else None
        if out is None:
            return func(q, k, v, heads=heads, mask=mask, **kwargs)
        return out.transpose(1, 2).flatten(2)

    return attention


class Probe:
    """Looks at one step's attention and, if asked to, masks every later one."""

    def __init__(self, search_step: int, sparsity: float | None = None):
        self.search_step, self.sparsity = search_step, sparsity
        self.calls: dict[tuple, int] = {}
        self.recalls: dict[tuple, dict[float, list[float]]] = {}
        self.masks: dict[tuple, torch.Tensor] = {}

    def __call__(self, layer, q, k, v):
        step = self.calls[layer] = self.calls.get(layer, -1) + 1
        if step == self.search_step:
            masses = block_masses(q, k)
            whole = masses.sum((0, 2, 3))
            self.recalls[layer] = {}
            for density in DENSITIES:
                kept = torch.where(keep_largest(masses, density), masses, 0.0).sum((0, 2, 3))
                self.recalls[layer][density] = (kept / whole).tolist()
            if self.sparsity is not None:
                keep = keep_largest(masses, 1 - self.sparsity)
                rows = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
                self.masks[layer] = rows[..., : q.shape[2], : q.shape[2]]
        if step > self.search_step and self.sparsity is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[layer])
        return None


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.clamp(0, 1) - b.clamp(0, 1)).square().mean()
    return round(-10 * float(error.clamp(min=1e-10).log10()), 2)


def contact_sheet(frames: torch.Tensor, path: Path, columns: int = 6, scale: int = 2) -> None:
    """One row per video of [N, 3, F, Y, X], `columns` frames each."""
    from PIL import Image

    picks = torch.linspace(0, frames.shape[2] - 1, columns).round().long()
    rows = [torch.cat(list(v[:, picks].unbind(1)), -1) for v in F.pad(frames, (1, 1, 1, 1))]
    sheet = (torch.cat(rows, -2).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(sheet)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC).save(path)


def animation(frames: torch.Tensor, path: Path, columns: int = 3, scale: int = 2) -> None:
    """All videos of [N, 3, F, Y, X] side by side at 12 frames a second."""
    from PIL import Image

    rows = [torch.cat(list(chunk), -1) for chunk in frames.split(columns)]
    whole = (torch.cat(rows, -2).clamp(0, 1) * 255).byte().permute(1, 2, 3, 0).numpy()
    images = [Image.fromarray(x) for x in whole]
    images = [im.resize((im.width * scale, im.height * scale)) for im in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=83, loop=0)


def score(model, size, steps: int, count: int, rich: bool, out: Path) -> dict[str, float]:
    """Share of one-thing prompts whose video reads back as the prompt says; a sheet of them all."""
    rng = random.Random(1234)
    scenes = []
    while len(scenes) < count:
        scene = video.random_scene(rng, video.FRAMES_PER_LATENT * size[0], size[2] / size[1], rich)
        scenes += [scene] if len(scene.things) == 1 else []
    right = dict.fromkeys(("colour", "shape", "direction", "speed"), 0)
    sheet = []
    for part in [scenes[i : i + 8] for i in range(0, count, 8)]:
        frames = video.decode(generate(model, [video.prompt(s) for s in part], size, steps, 77))
        sheet.append(frames[:, :, :: max(1, frames.shape[2] // 4)])
        for scene, clip in zip(part, frames, strict=True):
            found = video.describe(clip)
            for key in right:
                right[key] += bool(found) and found[0][key] == getattr(scene.things[0], key)
    sheet = torch.cat(sheet)
    # two videos in a row
    contact_sheet(torch.cat((sheet[::2], sheet[1::2]), 2), out / "scored.png", 2 * sheet.shape[2])
    return {key: round(n / count, 3) for key, n in right.items()}


def check(
    path: Path, comfyui: str, setting: str, out: Path, scored: int = 48, rich: bool = False,
    prompts: list[str] | None = None,
) -> dict:  # fmt: skip
    *size, steps = (int(n) for n in setting.split("x"))
    began = time.monotonic()
    model = load(path, comfyui)
    result: dict = {"size": size, "steps": steps, "block": BLOCK}

    def note(**found) -> None:
        result.update(found)
        print(json.dumps(found), f"check {time.monotonic() - began:.1f} s", flush=True)

    prompts = prompts or (RICH_PROMPTS if rich else FIXED_PROMPTS)
    latents = generate(model, prompts, size, steps, seed=7)
    dense = video.decode(latents)
    contact_sheet(dense, out / "dense.png")
    animation(dense, out / "dense.gif")
    note(prompts=list(prompts), latent_std=round(float(latents.std()), 3))

    if scored:
        note(read_back=score(model, size, steps, scored, rich, out), read_back_videos=scored)
    search = round(0.2 * steps)
    recalls, distances, sparse = {density: [] for density in DENSITIES}, [], []
    for i, prompt in enumerate(prompts[: 6 if torch.cuda.is_available() else 1]):
        alone = video.decode(generate(model, [prompt], size, steps, seed=100 + i))
        probe = Probe(search, sparsity=0.7)
        attention = over_video(probe, video.TEXT_TOKENS)
        sparse.append(video.decode(generate(model, [prompt], size, steps, 100 + i, attention)))
        distances.append(psnr(alone, sparse[-1]))
        for density, found in recalls.items():
            found.append([by_density[density] for by_density in probe.recalls.values()])
    contact_sheet(torch.cat(sparse), out / "sparse.png")
    # [layers, heads]
    tables = {density: torch.tensor(found).mean(0) for density, found in recalls.items()}
    note(
        recall={str(density): round(float(t.mean()), 4) for density, t in tables.items()},
        recall_by_layer_and_head={
            str(density): [[round(r, 3) for r in row] for row in table.tolist()]
            for density, table in tables.items()
        },
        psnr_at_sparsity_07=distances,
        search_step=search,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    parser.add_argument("--model", type=Path, default=here / "tiny_wan.safetensors.xz")
    parser.add_argument("--setting", default="16x40x52x30", help="TxHxWxSTEPS in latent sizes")
    parser.add_argument("--scored", type=int, default=0, help="videos to read back")
    parser.add_argument("--rich", action="store_true", help="for models trained on rich scenes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = check(args.model, args.comfyui, args.setting, args.out, args.scored, args.rich)
    (args.out / "check.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Trains the tiny Wan model on procedural video within a time budget, then checks it.

    python tests/tiny_model/train.py --comfyui PATH --minutes 8 --out OUT

Flow matching as ComfyUI samples it: x = (1 - sigma) * video + sigma * noise, the model is told
1000 * sigma and predicts noise - video. Weights are bf16 on the GPU over float32 masters; what
is saved is a moving average of the masters.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

import procedural_video as video
import safetensors.torch
import torch
import torch.nn.functional as F

# latent frames, height, width, batch, share of the time: 1,040, 3,024 and 8,320 tokens
STAGES = "8x20x26x96:0.30,12x28x36x32:0.22,16x40x52x12:0.48"


def import_wan(comfyui: str):
    """ComfyUI's model class and its plain layers, without starting ComfyUI."""
    sys.path.insert(0, comfyui)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.ldm.wan.model
    import comfy.model_management
    import comfy.ops

    return comfy.ldm.wan.model.WanModel, comfy.ops.disable_weight_init, comfy.model_management


def precision(device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(args, device) -> torch.nn.Module:
    wan, operations, _ = import_wan(args.comfyui)
    model = wan(
        model_type="t2v", dim=args.width, ffn_dim=args.ffn, num_heads=args.width // 64,
        num_layers=args.layers, text_dim=video.TEXT_DIM, in_dim=16, out_dim=16,
        device=device, dtype=precision(device), operations=operations,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed)
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, generator=generator)
        if name.endswith("norm_q.weight") or "norm_k" in name or name.endswith("norm3.weight"):
            value = torch.ones(p.shape)
        elif name.startswith("head.head"):
            value = torch.zeros(p.shape)
        elif name.endswith("modulation"):
            value = value * args.width**-0.5
        elif p.ndim >= 2:
            small = 0.3 if name.startswith("time_projection") else 1.0
            value = value * small * p[0].numel() ** -0.5
        else:
            value = torch.zeros(p.shape)
        p.data.copy_(value)
    return model


class Data:
    """Endless batches of latents and text, drawn anew each time."""

    def __init__(self, seed: int, device):
        self.rng = random.Random(seed)
        self.device = device
        self.rows: dict[tuple[str, int], int] = {}
        self.table = torch.zeros(1, video.TEXT_DIM, device=device)

    def text(self, prompts: list[str]) -> torch.Tensor:
        """[N, TEXT_TOKENS, TEXT_DIM]; the same rows as `embed_prompt`, looked up on the device."""
        ids = torch.zeros(len(prompts), video.TEXT_TOKENS, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate(video.words_of(prompt)):
                if word not in self.rows:
                    self.rows[word] = len(self.table)
                    row = torch.tensor([video.word_vector(*word)], device=self.device)
                    self.table = torch.cat((self.table, row))
                ids[i, j] = self.rows[word]
        return self.table[ids.to(self.device)]

    def batch(self, count: int, frames: int, height: int, width: int):
        """Latents [N, 16, T, H, W] and text; one prompt in ten is empty."""
        pixels = video.FRAMES_PER_LATENT * frames, 2 * height, 2 * width
        scenes = [video.random_scene(self.rng, pixels[0], width / height) for _ in range(count)]
        prompts = [video.prompt(s) if self.rng.random() > 0.1 else "" for s in scenes]
        return video.encode(video.render(scenes, *pixels, device=self.device)), self.text(prompts)


def draw_sigma(count: int, shift: float, device) -> torch.Tensor:
    """Mostly where the shifted schedule spends its steps, with some of every noise level."""
    s = torch.sigmoid(1.2 * torch.randn(count, device=device))
    s = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), s)
    return shift * s / (1 + (shift - 1) * s)


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps; all matrices of a shape at once.

    https://kellerjordan.github.io/posts/muon/ ; the scale makes its steps as large as AdamW's.
    """

    def __init__(self, params: list[torch.Tensor], momentum: float = 0.95):
        self.momentum = momentum
        shapes = sorted({tuple(p.shape) for p in params})
        self.groups = [[p for p in params if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in group])
            buffer.lerp_(grad, 1 - self.momentum)
            x = torch.lerp(grad, buffer, self.momentum).to(precision(grad.device))
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = (x.mT if tall else x).float()
            scale = 0.2 * math.sqrt(max(x.shape[1:]))
            torch._foreach_mul_(group, 1 - lr * weight_decay)
            torch._foreach_add_(group, list(x.unbind()), alpha=-lr * scale)


def plain_attention(func, q, k, v, heads, mask=None, **kwargs):
    """ComfyUI's attention override: SDPA without the host's bookkeeping, so that it compiles."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Trainer:
    def __init__(self, args, device):
        self.args, self.device = args, device
        self.model = build(args, device)
        _, _, management = import_wan(args.comfyui)
        management.in_training = True
        if args.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self.weights = list(self.model.parameters())
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.weights]
        self.average = [p.detach().clone() for p in self.masters]
        names = [name for name, _ in self.model.named_parameters()]
        matrix = [n.startswith("blocks.") and n.endswith(".weight") and p.ndim == 2
                  for n, p in zip(names, self.weights, strict=True)]  # fmt: skip
        for_muon, for_adam = [], []
        for master, is_matrix in zip(self.masters, matrix, strict=True):
            (for_muon if is_matrix and args.optimizer == "muon" else for_adam).append(master)
        self.muon = Muon(for_muon)
        self.adam = torch.optim.AdamW(for_adam, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.steps = 0

    def loss(self, latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(latent)
        sigma = draw_sigma(len(latent), self.args.shift, self.device)
        s = sigma[:, None, None, None, None]
        options, dtype = {"optimized_attention_override": plain_attention}, precision(self.device)
        out = self.model(
            torch.lerp(latent, noise, s).to(dtype), 1000 * sigma, text.to(dtype),
            transformer_options=options,
        )  # fmt: skip
        return F.mse_loss(out.float(), noise - latent)

    def step(self, latent, text, rate: float) -> torch.Tensor:
        loss = self.loss(latent, text)
        loss.backward()
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.empty_like(master)
        grads = [m.grad for m in self.masters]
        torch._foreach_copy_(grads, [w.grad for w in self.weights])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / norm.clamp(min=1.0)))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        if self.muon.groups:
            self.muon.step(rate, weight_decay=0.02)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
            keep = min(self.args.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, self.masters, 1 - keep)
        for weight in self.weights:
            weight.grad = None
        self.steps += 1
        return loss.detach()

    def save(self, path: Path) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        state = {n: p.bfloat16().cpu() for n, p in zip(names, self.average, strict=True)}
        config = {"num_heads": self.args.width // 64, "text_dim": video.TEXT_DIM}
        metadata = {"config": json.dumps({"transformer": config})}
        safetensors.torch.save_file(state, path, metadata=metadata)


def learning_rate(args, progress: float) -> float:
    """Short warm-up, flat, then down to nothing."""
    return args.lr * min(1.0, progress / 0.02, (1 - progress) / 0.6 + 0.002)


def train(args, device, started: float) -> tuple[Trainer, list[dict]]:
    torch.manual_seed(args.seed)
    trainer, data = Trainer(args, device), Data(args.seed, device)
    budget, log, done_share, saved = 60 * args.minutes, [], 0.0, started
    for stage in args.stages.split(","):
        size, share = stage.split(":")
        frames, height, width, count = (int(n) for n in size.split("x"))
        tokens = frames * (height // 2) * (width // 2)
        done_share += float(share)
        losses, first, clock = [], trainer.steps, time.monotonic()
        while time.monotonic() - started < budget * done_share:
            progress = (time.monotonic() - started) / budget
            batch = data.batch(count, frames, height, width)
            losses.append(trainer.step(*batch, learning_rate(args, progress)))
            # the first four steps of a stage hold its compilation
            if len(losses) < args.log_every and trainer.steps != first + 4:
                continue
            row = {
                "seconds": round(time.monotonic() - started, 1),
                "tokens": tokens,
                "step": trainer.steps,
                "loss": round(float(torch.stack(losses).mean()), 5),
                "ms_per_step": round(1000 * (time.monotonic() - clock) / len(losses), 1),
            }
            log.append(row)
            print(json.dumps(row), flush=True)
            losses, clock = [], time.monotonic()
            if time.monotonic() - saved > 60:
                trainer.save(args.out / "tiny_wan.safetensors")
                saved = clock = time.monotonic()
    return trainer, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for training, checks come on top"
    )
    parser.add_argument("--stages", default=STAGES, help="TxHxWxBATCH:SHARE,... in latent sizes")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=640)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--shift", type=float, default=6.0, help="of the noise levels in training")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", default="16x40x52x30", help="TxHxWxSTEPS to sample, empty: none")
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    trainer, log = train(args, device, started)
    path = args.out / "tiny_wan.safetensors"
    trainer.save(path)
    settings = {k: v for k, v in vars(args).items() if k not in ("comfyui", "out")}
    result = {
        "settings": settings,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in trainer.weights),
        "training_seconds": round(time.monotonic() - started, 1),
        "log": log,
    }
    report = args.out / "training.json"
    report.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "log"}), flush=True)
    if args.check:
        del trainer
        import check_model

        result["check"] = check_model.check(path, args.comfyui, args.check, args.out)
        report.write_text(json.dumps(result, indent=1))
        print(f"all done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

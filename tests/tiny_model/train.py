"""Trains a small model on procedural video within a time budget, then checks it.

    python tests/tiny_model/train.py --comfyui PATH --minutes 8 --out OUT

Without more options that is the tiny model. `--family`, `--heads`, `--head-dim` and `--layers` make
others, `--rich` adds textures, `--world rendered` is solid things under a moving camera, `--resume` goes on from saved weights with a new optimiser.

Flow matching as ComfyUI samples it: x = (1 - sigma) * video + sigma * noise, the model is told
1000 * sigma and predicts noise - video. Weights are bf16 on the GPU over float32 masters; what
is saved is a moving average of the masters. With `--bits` below 16 the last stage computes with
weights as rounded as the saved ones will be, and its gradients go to the masters unrounded.
"""

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path

import networks
import torch
import torch.nn.functional as F
from muon import Muon
from networks import precision
from torch.nn.attention import sdpa_kernel
from training_attention import fastest_backends, plain_attention
from training_data import WORLDS, Stage, batches, stages

# 1,040, 3,024 and 8,320 tokens
STAGES = "8x20x26x96:0.30,12x28x36x32:0.22,16x40x52x12:0.48"


def draw_sigma(count: int, shift: float, device) -> torch.Tensor:
    """Mostly where the shifted schedule spends its steps, with some of every noise level."""
    s = torch.sigmoid(1.2 * torch.randn(count, device=device))
    s = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), s)
    return shift * s / (1 + (shift - 1) * s)


class Trainer:
    def __init__(self, args, device):
        self.args, self.device = args, device
        networks.prepare(args.comfyui, training=True)
        self.model = networks.build(args, device)
        if args.resume:
            self.model.load_state_dict(networks.read(args.resume)[0])
        if args.compile:
            for block in networks.attention_blocks(self.model):
                block.compile(dynamic=False)
        names = [name for name, _ in self.model.named_parameters()]
        self.weights = list(self.model.parameters())
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.weights]
        self.average = [p.detach().clone() for p in self.masters]
        for_muon, for_adam = [], []
        for name, master in zip(names, self.masters, strict=True):
            is_matrix = "blocks." in name and master.ndim == 2 and "mod" not in name.lower()
            (for_muon if is_matrix and args.optimizer == "muon" else for_adam).append(master)
        self.bits = 16
        large = [i for i, master in enumerate(self.masters) if networks.is_large(master)]
        shapes = {self.masters[i].shape for i in large}
        self.large = [[i for i in large if self.masters[i].shape == shape] for shape in shapes]
        self.muon = Muon(for_muon)
        self.adam = torch.optim.AdamW(
            for_adam, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.steps = 0

    def loss(self, latent: torch.Tensor, text: torch.Tensor, shift: float) -> torch.Tensor:
        noise = torch.randn_like(latent)
        sigma = draw_sigma(len(latent), shift, self.device)
        s = sigma[:, None, None, None, None]
        dtype = precision(self.device)
        inputs = [torch.lerp(latent, noise, s).to(dtype), 1000 * sigma, text.to(dtype)]
        if self.args.family == "hunyuan":
            inputs.append(networks.pooled(text).to(dtype))
        options = {"optimized_attention_override": plain_attention}
        out = self.model(*inputs, transformer_options=options)
        return F.mse_loss(out.float(), noise - latent)

    def step(self, latent, text, rate: float, shift: float) -> torch.Tensor:
        loss = self.loss(latent, text, shift)
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
        self.publish(self.masters, self.bits)
        with torch.no_grad():
            keep = min(self.args.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, self.masters, 1 - keep)
        for weight in self.weights:
            weight.grad = None
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def publish(self, values: list[torch.Tensor], bits: int) -> None:
        """Makes float32 values the weights that the model computes with, large ones rounded."""
        torch._foreach_copy_(self.weights, values)
        for group in self.large if bits <= 8 else ():
            stored = networks.rounded(torch.stack([values[i] for i in group]), bits)
            torch._foreach_copy_([self.weights[i] for i in group], list(stored.unbind()))

    def held_out(self, stage: Stage, bits: int, count: int = 12) -> float:
        """Mean loss of the averaged weights over scenes that no training draws."""
        self.publish(self.average, bits)
        torch.manual_seed(1)
        found = batches(self.args, stage, self.device, seed="held out", workers=0)
        losses = [self.loss(*next(found), stage.shift).detach() for _ in range(count)]
        return round(float(torch.stack(losses).mean()), 6)

    def save(self, path: Path, bits: int) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        state = dict(zip(names, self.average, strict=True))
        networks.save(state, path, networks.metadata(self.args), bits)


def learning_rate(args, step: int, progress: float) -> float:
    """Short warm-up, flat, then down to nothing; `progress` is the share of the time."""
    return args.lr * min(1.0, (step + 1) / 100, (1 - progress) / 0.6 + 0.002)


def train(args, device, started: float) -> tuple[Trainer, list[dict]]:
    torch.manual_seed(args.seed)
    trainer = Trainer(args, device)
    budget, log, done_share, saved = 60 * args.minutes, [], 0.0, started
    for stage in stages(args):
        done_share += stage.share
        losses, first, clock = [], trainer.steps, time.monotonic()
        if stage == stages(args)[-1]:
            trainer.bits = args.bits
        for batch in batches(args, stage, device):
            elapsed = time.monotonic() - started
            if elapsed >= budget * done_share:
                break
            rate = learning_rate(args, trainer.steps, elapsed / budget)
            losses.append(trainer.step(*batch, rate, stage.shift))
            # the first four steps of a stage hold its compilation
            if len(losses) < args.log_every and trainer.steps != first + 4:
                continue
            row = {
                "seconds": round(time.monotonic() - started, 1),
                "tokens": stage.tokens,
                "step": trainer.steps,
                "loss": round(float(torch.stack(losses).mean()), 5),
                "ms_per_step": round(1000 * (time.monotonic() - clock) / len(losses), 1),
            }
            log.append(row)
            print(args.name, json.dumps(row), flush=True)
            losses, clock = [], time.monotonic()
            if time.monotonic() - saved > 60:
                trainer.save(args.out / f"{args.name}_8bit.safetensors", 8)
                saved = clock = time.monotonic()
    return trainer, log


def fewest_bits(trainer: Trainer, args, stage: Stage) -> tuple[int, dict[int, float]]:
    """The fewest bits a weight, from `args.bits` on, that cost at most 1 % of held-out loss."""
    losses = {bits: trainer.held_out(stage, bits) for bits in (16, 8, 6, 5, 4) if bits >= args.bits}
    good = [bits for bits, loss in losses.items() if loss <= 1.01 * losses[16]]
    return min(good), losses


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for training, checks come on top"
    )
    parser.add_argument(
        "--stages", default=STAGES, help="TxHxWxBATCH:SHARE[:SHIFT[:PLAIN]],... in latent sizes"
    )
    parser.add_argument("--name", default="tiny_wan", help="of the file of weights")
    parser.add_argument("--family", choices=("wan", "hunyuan"), default="wan")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--double", type=int, default=2, help="double blocks of hunyuan's layers")
    parser.add_argument("--ffn", type=int, default=640, help="wan only")
    parser.add_argument("--qk-gain", type=float, default=1.0, help="of new weights")
    parser.add_argument("--gate", type=float, default=0.0, help="of new weights")
    parser.add_argument("--resume", type=Path, help="weights to go on from")
    parser.add_argument("--world", choices=tuple(WORLDS), default="shapes")
    parser.add_argument("--rich", action="store_true", help="textures, clouds, pans up and down")
    parser.add_argument(
        "--bits", type=int, choices=(4, 5, 6, 8, 16), default=16,
        help="a weight in the saved file, or as many more as the held-out loss asks for",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--again", type=int, default=0, help="old batches after every new one")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--shift", type=float, default=6.0, help="of the noise levels in training")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", default="16x40x52x30", help="TxHxWxSTEPS to sample, empty: none")
    parser.add_argument("--scored", type=int, default=48, help="videos to read back in the check")
    return parser


def main() -> None:
    args = parser().parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    backends = fastest_backends(args.heads, args.head_dim, stages(args)[-1].tokens, device)
    with sdpa_kernel(backends, set_priority=True):
        trainer, log = train(args, device, started)
    path = args.out / f"{args.name}.safetensors.xz"
    with sdpa_kernel(backends, set_priority=True):
        trainer.save(args.out / f"{args.name}_8bit.safetensors", 8)
        bits, held_out = fewest_bits(trainer, args, stages(args)[-1])
    trainer.save(path, bits)
    settings = {k: v for k, v in vars(args).items() if k not in ("comfyui", "out", "resume")}
    settings["resumed"] = args.resume is not None
    result = {
        "settings": settings,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in trainer.weights),
        "attention": backends[0].name,
        "training_seconds": round(time.monotonic() - started, 1),
        "held_out_loss_by_bits": held_out,
        "bits": bits,
        "bytes": path.stat().st_size,
        "log": log,
    }
    report = args.out / "training.json"
    report.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "log"}), flush=True)
    if args.check:
        del trainer
        import check_model

        prompts = None
        if args.world != "shapes":  # which nobody reads back
            drawn = (random.Random(1000 + i) for i in range(6))
            world = WORLDS[args.world]
            prompts = [world.prompt(world.random_scene(rng, 32, 1.3)) for rng in drawn]
            args.scored = 0
        result["check"] = check_model.check(
            path, args.comfyui, args.check, args.out, args.scored, args.rich, prompts
        )
        report.write_text(json.dumps(result, indent=1))
        print(f"all done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

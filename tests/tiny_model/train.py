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
import math
import os
import platform
import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import networks
import procedural_video as video
import rendered_video
import torch
import torch.nn.functional as F
from networks import precision
from torch.nn.attention import SDPBackend, sdpa_kernel

WORLDS = {"shapes": video, "rendered": rendered_video}
POOL = 32  # batches
# 1,040, 3,024 and 8,320 tokens
STAGES = "8x20x26x96:0.30,12x28x36x32:0.22,16x40x52x12:0.48"


@dataclass(frozen=True)
class Stage:
    """A part of the training with videos of one size.

    Args:
        frames, height, width: of the latents.
        count: videos per step.
        share: of the whole time.
        shift: of the noise levels.
        plain: share of scenes without textures and clouds where the others have them.
    """

    frames: int
    height: int
    width: int
    count: int
    share: float
    shift: float
    plain: float = 0.0

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // 2) * (self.width // 2)


def stages(args) -> list[Stage]:
    found = []
    for stage in args.stages.split(","):
        size, *rest = stage.split(":")
        share, shift, plain = (*map(float, rest), *(args.shift, 0.0)[len(rest) - 1 :])
        found.append(Stage(*(int(n) for n in size.split("x")), share, shift, plain))
    return found


class Data(torch.utils.data.IterableDataset):
    """Endless batches of scenes and their text, drawn anew each time.

    Args:
        count: scenes per batch.
        frames, aspect: of the video, in pixels.
        plain: share of scenes that are not rich all the same.
        world: whose scenes, a key of `WORLDS`.
    """

    def __init__(
        self, seed: int, rich: bool, count: int, frames: int, aspect: float, plain: float = 0.0,
        world: str = "shapes",
    ):  # fmt: skip
        self.world = WORLDS[world]
        self.seed, self.rich, self.count, self.plain = seed, rich, count, plain
        self.frames, self.aspect = frames, aspect
        self.rows: dict[tuple[str, int], int] = {}
        self.table = torch.zeros(1, video.TEXT_DIM, dtype=torch.int8)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {self.count} {worker.id if worker else 0}")
        while True:
            yield self.batch(rng)

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """What `paint` needs, and text; one prompt in ten is empty."""
        scenes = []
        for _ in range(self.count):
            rich = self.rich and (not self.plain or rng.random() >= self.plain)
            scenes.append(self.world.random_scene(rng, self.frames, self.aspect, rich))
        prompts = [self.world.prompt(s) if rng.random() > 0.1 else "" for s in scenes]
        return self.world.parameters(scenes), self.text(prompts)

    def text(self, prompts: list[str]) -> torch.Tensor:
        """[N, TEXT_TOKENS, TEXT_DIM] int8, the same signs as `embed_prompt`."""
        ids = torch.zeros(len(prompts), video.TEXT_TOKENS, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate(video.words_of(prompt)):
                if word not in self.rows:
                    self.rows[word] = len(self.table)
                    row = torch.tensor([video.word_vector(*word)], dtype=torch.int8)
                    self.table = torch.cat((self.table, row))
                ids[i, j] = self.rows[word]
        return self.table[ids]


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


def plain_attention(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    """ComfyUI's attention override: SDPA without the host's bookkeeping, so that it compiles."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def fastest_backends(heads: int, head_dim: int, tokens: int, device) -> list[SDPBackend]:
    """cuDNN's attention first where it agrees with flash attention and is faster."""
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        return [flash, *others]
    qkv = torch.randn(4, tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
    qkv.requires_grad_()
    found, seconds = {}, {}
    for backend in (flash, cudnn):
        try:
            with sdpa_kernel(backend):
                for _ in range(3):
                    torch.cuda.synchronize()
                    began = time.monotonic()
                    out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
                    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
                    torch.cuda.synchronize()
                    seconds[backend] = time.monotonic() - began
                found[backend] = torch.cat((out.flatten(), grad.flatten())).float()
        except RuntimeError as error:
            print(f"{backend.name}: {error}", flush=True)
    print({b.name: round(1000 * s, 2) for b, s in seconds.items()}, "ms", flush=True)
    if len(found) < 2:
        return [*found, *others]
    error = (found[cudnn] - found[flash]).norm() / found[flash].norm()
    agree = bool(error < 0.02) and seconds[cudnn] < seconds[flash]
    return [cudnn, flash, *others] if agree else [flash, *others]


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


def batches(args, stage: Stage, device, seed=None, workers: int | None = None):
    """Endless latents [N, 16, T, H, W] and text of one stage.

    In training `args.again` of the last `POOL` batches follow every new one, where drawing takes as
    long as learning.
    """
    pixels = video.FRAMES_PER_LATENT * stage.frames, 2 * stage.height, 2 * stage.width
    aspect = stage.width / stage.height
    again = 0 if seed else args.again
    seed, workers = seed or args.seed, args.workers if workers is None else workers
    data = Data(seed, args.rich, stage.count, pixels[0], aspect, stage.plain, args.world)
    kept, rng = deque(maxlen=POOL), random.Random(seed)
    for scenes, text in torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers):
        drawn = data.world.paint(scenes.to(device), *pixels)
        kept.append((video.encode(drawn), text.to(device)))
        yield kept[-1]
        yield from (rng.choice(kept) for _ in range(again))


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

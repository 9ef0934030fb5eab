"""Trains a model that continues natural-looking clips, in pieces, and says whether it only remembers.

    python tests/lab/natural_clips.py --out .adaspa/natural/clips.zip
    python tests/lab/train_natural.py --comfyui PATH --clips .adaspa/natural/clips.zip \
        --minutes 9 --of 27 --state .adaspa/natural/state --out OUT

ComfyUI's Wan class with the 20 channels of its image-to-video models: 4 say which latent frames are known,
16 hold them, and the last of them in place of those that follow. What is drawn is the difference to that
last frame: a clip that stands still is zero. The network, the optimisers and the loss are those of `tests/tiny_model/train.py`; text stays
empty. A further call with the same `--state` goes on: masters in bf16 and their average in 8 bits are kept,
in files below 16 MB; moments begin anew. `training.json` has the loss on clips that are trained on and on those
held out; `--check` samples continuations of held-out clips and compares them with two plain guesses and
with the nearest clip of the training (`continuation.py`). Weights and record are written every four
minutes, for a call that is cut short.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import networks  # noqa: E402
import procedural_video as video  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import train  # noqa: E402
from continuation import check, conditions  # noqa: E402
from natural_clips import Clips  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402

from tests.bench.record import facts  # noqa: E402

# 20,480 tokens at the end
STAGES = "1x64x64x64:0.15:3,5x64x64x16:0.35:6,20x64x64x4:0.5:10"
KNOWN = (2, 4, 4, 4, 10)  # latent frames that may be given; none one time in twenty
SHARD = 15_000_000  # bytes of a file of the state


def weights_of(known: torch.Tensor, frames: int) -> torch.Tensor:
    """[N, T] of mean 1: frames count the less the further they lie behind those that are given.

    What comes next can be learned; what comes much later nobody can know.
    """
    ahead = torch.arange(frames, device=known.device) - known[:, None] + 1
    weights = torch.where(ahead > 0, 1 / (1 + ahead / 4), 0.1)
    return weights / weights.mean(1, keepdim=True)


def without_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the same model where no text is ever given.

    Cross-attention then adds the same to every token, which its last bias can hold: its matrices are
    zeros, which take no room in a compressed file.
    """
    state = dict(state)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    empty = torch.zeros_like(state["text_embedding.0.weight"][0])
    text = F.gelu(linear("text_embedding.0", empty), approximate="tanh")
    text = linear("text_embedding.2", text)
    for last in [name for name in state if name.endswith("cross_attn.o.weight")]:
        block = last.removesuffix(".o.weight")
        added = linear(f"{block}.o", linear(f"{block}.v", text))
        for name in [f"{block}.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")]:
            state[name] = torch.zeros_like(state[name])
        state[f"{block}.o.bias"] = added
    return state


class Trainer(train.Trainer):
    def loss(self, latent: torch.Tensor, known: torch.Tensor, shift: float) -> torch.Tensor:
        found = conditions(latent, known)
        latent = latent - found[:, 4:]
        noise = torch.randn_like(latent)
        sigma = train.draw_sigma(len(latent), shift, self.device)
        noisy = torch.lerp(latent, noise, sigma[:, None, None, None, None])
        dtype = networks.precision(self.device)
        inputs = torch.cat((noisy, found), 1).to(dtype)
        text = torch.zeros(len(latent), video.TEXT_TOKENS, video.TEXT_DIM).to(inputs)
        options = {"optimized_attention_override": train.plain_attention}
        out = self.model(inputs, 1000 * sigma, text, transformer_options=options)
        error = (out.float() - noise + latent).square().mean((1, 3, 4))
        return (error * weights_of(known, latent.shape[2])).mean()

    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def keep(self, folder: Path, told: dict) -> None:
        """Writes what `go_on` reads: `told`, masters in bf16, the average in 8 bits."""
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[dict] = [{}]
        for name, master in zip(self.names(), self.masters, strict=True):
            if sum(t.nbytes for t in shards[-1].values()) + 2 * master.numel() > SHARD:
                shards.append({})
            shards[-1][name] = master.detach().bfloat16().cpu()
        half = len(self.masters) // 2
        average = dict(zip(self.names(), self.average, strict=True))
        for number, part in enumerate((self.names()[:half], self.names()[half:])):
            path = folder / f"average-{number}.safetensors"
            networks.save({name: average[name] for name in part}, path, {}, 8)
        for number, shard in enumerate(shards):
            safetensors.torch.save_file(shard, folder / f"masters-{number}.safetensors")
        (folder / "state.json").write_text(json.dumps({"steps": self.steps, **told}))

    @torch.no_grad()
    def go_on(self, folder: Path) -> dict:
        """Takes up what `keep` wrote, and returns what it was told."""
        masters, average = {}, {}
        for path in sorted(folder.glob("masters-*.safetensors")):
            masters |= safetensors.torch.load_file(path)
        for path in sorted(folder.glob("average-*.safetensors")):
            average |= networks.read(path)[0]
        for name, master, mean in zip(self.names(), self.masters, self.average, strict=True):
            master.copy_(masters[name])
            mean.copy_(average[name])
        self.publish(self.masters, self.bits)
        told = json.loads((folder / "state.json").read_text())
        self.steps = told["steps"]
        return told

    def save(self, path: Path, bits: int) -> None:
        average = dict(zip(self.names(), self.average, strict=True))
        networks.save(without_text(average), path, networks.metadata(self.args), bits)

    def loss_on(self, clips: Clips, stage: train.Stage, count: int) -> float:
        """Of the averaged weights on the middles of clips, with the same noise every time.

        In batches of the training's size and with gradients, for which blocks are compiled already.
        """
        self.publish(self.average, self.bits)
        found = []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            long = clips.of_length(pixels(stage)[0])
            for first in range(0, count, stage.count):
                chosen = [long[n % len(long)] for n in range(first, first + stage.count)]
                windows = torch.stack([clips.window(number, *pixels(stage)) for number in chosen])
                known = torch.full((stage.count,), min(4, stage.frames // 2))
                known = known.to(self.device)
                latent = video.encode(windows.to(self.device))
                found.append(float(self.loss(latent, known, stage.shift).detach()))
        self.publish(self.masters, self.bits)
        return round(sum(found) / len(found), 5)


def pixels(stage: train.Stage) -> tuple[int, int, int]:
    return video.FRAMES_PER_LATENT * stage.frames, 2 * stage.height, 2 * stage.width


def batch(clips: Clips, stage: train.Stage, rng: random.Random, device):
    """Latents [N, 16, T, H, W] of windows of random clips, and how many frames are known."""
    long = clips.of_length(pixels(stage)[0])
    chosen = [rng.choice(long) for _ in range(stage.count)]
    windows = torch.stack([clips.window(number, *pixels(stage), rng) for number in chosen])
    known = [0 if rng.random() < 0.05 else rng.choice(KNOWN) for _ in chosen]
    known = torch.tensor([min(k, stage.frames // 2) for k in known], device=device)
    return video.encode(windows.to(device)), known


def run(args, device) -> tuple[Trainer, dict]:
    """Trains until the minutes of this call are over; `told` has the log of all calls."""
    began = time.monotonic()
    torch.manual_seed(args.seed)
    trainer = Trainer(args, device)
    told: dict = {"seconds": 0.0, "log": []}
    if (args.state / "state.json").is_file():
        told = trainer.go_on(args.state)
    before, losses = told["seconds"], []
    rng = random.Random(f"{args.seed} {trainer.steps}")
    clips, others = (Clips(args.clips, part).to(device) for part in ("train", "held out"))
    stages = train.stages(args)
    clock = saved = time.monotonic()
    while (spent := time.monotonic() - began) < 60 * args.minutes and trainer.steps < args.steps:
        progress = min((before + spent) / (60 * args.of), 1.0)
        ends = [sum(s.share for s in stages[: i + 1]) for i in range(len(stages))]
        stage = next((s for s, end in zip(stages, ends, strict=True) if progress < end), stages[-1])
        if stage == stages[-1]:
            trainer.bits = args.bits
        rate = train.learning_rate(args, trainer.steps, progress)
        losses.append(trainer.step(*batch(clips, stage, rng, device), rate, stage.shift))
        if len(losses) == args.log_every:
            row = {
                "seconds": round(before + spent, 1), "step": trainer.steps, "tokens": stage.tokens,
                "loss": round(float(torch.stack(losses).mean()), 5),
                "ms_per_step": round(1000 * (time.monotonic() - clock) / len(losses), 1),
                "trained_on": trainer.loss_on(clips, stage, args.looked_at),
                "held_out": trainer.loss_on(others, stage, args.looked_at),
            }  # fmt: skip
            told["log"].append(row)
            print(json.dumps(row), flush=True)
            losses, clock = [], time.monotonic()
        if time.monotonic() - saved > 60 * args.save_every:
            told["seconds"] = round(before + time.monotonic() - began, 1)
            write(args, trainer, told)
            saved = time.monotonic()
    told["seconds"] = round(before + time.monotonic() - began, 1)
    trainer.keep(args.state, told)
    return trainer, told


def write(args, trainer: Trainer, told: dict) -> tuple[Path, dict]:
    """The averaged weights as they are now, and the record beside them, which is returned."""
    path = args.out / "natural.safetensors.xz"
    trainer.save(path, args.bits)
    paths = ("comfyui", "clips", "out", "state", "resume")
    settings = {k: str(v) for k, v in vars(args).items() if k not in paths}
    record = {
        "settings": settings, "parameters": sum(m.numel() for m in trainer.masters), **told,
        "steps": trainer.steps, "bytes": path.stat().st_size, **facts(),
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return path, record


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument(
        "--state", type=Path, required=True, help="folder to go on from, and to keep"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and record")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call's training")
    parser.add_argument("--of", type=float, default=27.0, help="minutes of all calls together")
    parser.add_argument("--resume", type=Path, help="weights to begin with where there is no state")
    parser.add_argument("--steps", type=int, default=10**9, help="stop at this one")
    parser.add_argument("--stages", default=STAGES, help="as of tests/tiny_model/train.py")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--bits", type=int, choices=(4, 5, 6, 8, 16), default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes")
    parser.add_argument("--looked-at", type=int, default=16, help="clips per held-out loss")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--sampled", type=int, default=20, help="steps of a check's samples")
    parser.set_defaults(
        family="wan i2v",
        head_dim=128,
        qk_gain=1.3,
        gate=0.3,
        optimizer="muon",
        shift=6.0,
    )
    return parser


def main():
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    tokens = train.stages(args)[-1].tokens
    with sdpa_kernel(
        train.fastest_backends(args.heads, args.head_dim, tokens, device), set_priority=True
    ):
        trainer, told = run(args, device)
        path, record = write(args, trainer, told)
    if args.check:
        size = pixels(train.stages(args)[-1])
        record["check"] = check(path, args.comfyui, args.clips, size, args.sampled, args.out)
        (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

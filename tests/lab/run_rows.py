"""How much less the blocks hold that are chosen more cheaply, on real q and k.

    python tests/lab/run_rows.py --comfyui PATH --models tiny wan128 joint --out OUT/rows.json

Samples until the first search, then chooses the blocks of every layer by all rows, by samples, and in cells of
several blocks as in very long videos, and weighs each choice by the masses of all rows; of blocks in twos also
by the output, with means of 64 and of 128 tokens. Rows of text, which keep everything, do not count.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import torch  # noqa: E402
from contestants import TWO  # noqa: E402
from models import MODELS  # noqa: E402
from rule import SCHEDULES  # noqa: E402
from run_lab import latent_size  # noqa: E402

from sparse_attn.block_mask import BlockMask  # noqa: E402
from sparse_attn.method import selection  # noqa: E402
from sparse_attn.method.query_sample import query_sample  # noqa: E402
from sparse_attn.method.text_sink import sink_blocks  # noqa: E402
from sparse_attn.orders.choice import find_order  # noqa: E402
from sparse_attn.orders.position import video_first  # noqa: E402
from tests.bench.record import facts  # noqa: E402


def in_line(tokens: int, stride: int, device) -> torch.Tensor:
    """The first row of every `stride`, as `query_sample` would be without its offsets."""
    return torch.arange(0, tokens, stride, device=device)


SAMPLES = {
    "one of two": (query_sample, 2), "one of four": (query_sample, 4),
    "one of eight": (query_sample, 8), "one of four, in line": (in_line, 4),
}  # fmt: skip
# rows and columns of blocks that are kept or skipped together
CELLS = {
    "all rows, blocks in twos": (2, 2), "all rows, rows of blocks in fours": (4, 1),
    "all rows, columns of blocks in fours": (1, 4), "all rows, rows of blocks in twos": (2, 1),
}  # fmt: skip


def chosen_by(backend, call, config, lse) -> list[dict]:
    """What blocks chosen in each way hold of a call; `lse` is [B, H, L], in the tokens' order."""
    order, _ = find_order(backend, call, config)
    layout = video_first(call.layout)
    moved = backend.permute(call.q, call.k, call.v, order, call.key_bias)
    lse = lse.float().gather(-1, order.long())
    video = ~sink_blocks(layout, config.block_q, lse.device)

    def measure(places, block_q):
        q, rows = moved.q[:, :, places], lse[:, :, places]
        options = {"block_q": block_q, "scale": call.scale}
        masses = backend.block_masses(
            q, moved.k, rows, block_k=config.block_k, key_bias=moved.key_bias, **options
        )
        means = backend.pooled_masses(
            q, moved.pooled.k_mean, moved.pooled.log_sizes, rows, **options
        )
        return masses, backend.tail_error(masses, means.clone(), moved.v, moved.pooled.v_mean)

    def kept(masses, scores, cell=(1, 1)):
        sizes = {"block_q": cell[0] * config.block_q, "block_k": cell[1] * config.block_k}
        with mock.patch.object(selection, "mask_blocks", lambda *_, **__: sizes):
            chosen = selection.Selection(backend, layout, config, lse)
        chosen.add(masses, scores)
        return chosen.settle()[0].of_blocks(layout.tokens, **config.blocks).to_dense()

    def held(weights, keep):
        """[B, H] share of `weights` on kept blocks."""
        weights, keep = weights[:, :, video], keep[:, :, video]
        return (weights * keep).sum((-1, -2)) / weights.sum((-1, -2))

    def error(keep, size):
        """Of the video's output beside dense attention, of a mask in blocks of `size` and their means."""
        keep = keep[:, :, :: size // 64, :: size // 64]
        mask = BlockMask.from_dense(keep, block_q=size, block_k=size)
        sparse = {"mask": mask, "pooled": moved.pooled.of_blocks(layout.tokens, size)}
        options = {"scale": call.scale, "key_bias": moved.key_bias}
        dense, out = (
            backend.attention(moved.q, moved.k, moved.v, **options, **some)[0].float()
            for some in ({}, sparse)
        )
        apart = (out - dense)[:, :, : layout.video].norm() / dense[:, :, : layout.video].norm()
        return apart.item()

    tokens = call.layout.tokens
    exact, scores = measure(torch.arange(tokens), config.block_q)
    best = kept(exact, scores)
    ways = {name: (exact, scores, cell) for name, cell in CELLS.items()}
    for name, (sample, stride) in SAMPLES.items():
        ways[name] = measure(sample(tokens, stride, lse.device), config.block_q // stride)
    rows = []
    for name, found in ways.items():
        masses, keep = found[0], kept(*found)
        less = held(exact, best) - held(exact, keep)
        rows.append(
            {
                "layer": call.layer,
                "sample": name,
                "tokens": tokens,
                # by tokens of a mean
                "errors": {
                    size: error(keep, size)
                    for size in ((64, 128) if found[2:] == ((2, 2),) else ())
                },
                "recall": held(exact, best).mean().item(),
                "less": less.mean().item(),
                "less_worst_head": less.max().item(),
                "told_more": (held(masses, keep) - held(exact, keep)).mean().item(),
                "tail_error_more": ((1 - held(scores, keep)) / (1 - held(scores, best)))
                .sub(1)
                .mean()
                .item(),
            }
        )
    return rows


def of_model(name: str, schedule: str, options) -> list[dict]:
    import generation

    from sparse_attn.run import serving

    subject = generation.subject(
        name, options.comfyui, options.seeds, options.latent, options.clips
    )
    # knows ComfyUI, which the subject has started
    from sparse_attn.host.install import install

    config = TWO.but("all rows", density=options.density).config(schedule)
    search, rows = serving.fused_online_search, []

    def searched(backend, call, config, previous_lse, dense):
        found = search(backend, call, config, None, dense)
        rows.extend(chosen_by(backend, call, config, found.lse))
        if call.layer == subject.spec.layers - 1:
            # no error that the node would answer by going on dense
            raise KeyboardInterrupt
        return found

    serving.fused_online_search = searched
    try:
        subject.sample(install(subject.model, config)[0], SCHEDULES[schedule][0])
    except KeyboardInterrupt:
        return [{"model": name, "schedule": schedule, **row} for row in rows]
    finally:
        serving.fused_online_search = search
    raise RuntimeError("Not every layer searched.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["tiny"])
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="8")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--latent", type=latent_size, help="TxHxW instead of the models' own")
    parser.add_argument("--clips", type=Path, help="file of natural_clips.py, for natural")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows += of_model(name, options.schedule, options)
        result = {
            "what": "recall of blocks chosen more cheaply, beside that of blocks chosen by all rows",
            "rows": rows,
            **facts(),
        }
        options.out.write_text(json.dumps(result) + "\n")
        print(f"{name}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()

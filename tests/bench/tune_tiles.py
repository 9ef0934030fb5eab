"""Tries the tiles of `tuned.candidates` on this card, and keeps those that win.

    python run.py bench --tune [--user-directory FOLDER]

Most of its time goes into compiling. Nothing else measures or changes tiles.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sparse_attn.backends import choice, tiles, tuned  # noqa: E402
from tests.bench.contest import mask_of, random_lists, stand_in  # noqa: E402
from tests.tools import comfyui_source  # noqa: E402

# a tile must win by so much, and its output differ by no more than rounding does, relative
LEAST_GAIN, TOLERANCE = 0.03, 0.02
ROUNDS = 3


def user_directory(named: Path | None) -> Path | None:
    """The folder of ComfyUI's user: the one named, else that of the ComfyUI around this pack."""
    if named is not None:
        return named
    comfyui = comfyui_source.locate(ROOT, os.environ)
    return None if comfyui is None else comfyui / "user"


def calls(q, k, v, backend: choice.Backend) -> dict[str, Callable[[], torch.Tensor]]:
    """A call that tells how good each kernel's tile is, on tensors [1, H, L, 128]."""
    scale, blocks = q.shape[-1] ** -0.5, -(-q.shape[2] // 64)
    indices, _ = random_lists(q.shape[1], blocks, blocks, 0.2, str(q.device))
    mask = mask_of(indices, blocks, 64)
    lse = backend.attention(q, k, v, scale=scale)[1]
    with_masses = backend.attention_with_masses
    assert with_masses is not None, "the kernels have it"

    def dense():
        _, _, masses = with_masses(q, k, v, scale=scale, previous_lse=lse, block_q=64, block_k=64)
        return torch.cat([backend.attention(q, k, v, scale=scale)[0].flatten(), masses.flatten()])

    found = {
        "attention 64": lambda: backend.attention(q, k, v, scale=scale, mask=mask)[0],
        "attention 128": dense,
        "block_masses": lambda: backend.block_masses(
            q, k, lse, scale=scale, block_q=64, block_k=64
        ),
    }
    quantised = backend.quantised_attention
    if quantised is not None:
        found["quantised_attention"] = lambda: quantised(q, k, v, scale=scale, mask=mask)[0]
    return found


def tune(
    card: tiles.Card, asked: dict[str, Callable], milliseconds: Callable, say: Callable = print
) -> dict[str, tiles.Tile]:
    """The tiles that are faster on a card than the table's, by kernel.

    Args:
        asked: calls by kernel. milliseconds: milliseconds(call) -> what it takes.
    """
    won = {}
    for name, call in asked.items():
        tiles.use(card, {}, "")
        right, first = call().float(), milliseconds(call)
        best = first * (1 - LEAST_GAIN)
        say(f"{name}: {first:.2f} ms with the table's tile")
        for tile in tuned.candidates()[name]:
            tiles.use(card, {name: tile}, "")
            try:
                error = ((call().float() - right).norm() / right.norm()).item()
                took = milliseconds(call)
            except Exception as reason:
                # such as more shared memory than the card has
                say(f"  {tile}: {str(reason).splitlines()[0][:80] or type(reason).__name__}")
                continue
            say(f"  {tile}: {took:.2f} ms, differs by {error:.4f}")
            if error < TOLERANCE and took < best:
                won[name], best = tile, took
    tiles.use(card, won, tuned.USED if won else "")
    return won


def on_gpu(call: Callable) -> float:
    """The least milliseconds of a call that has run before."""
    took = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - start))
    return min(took)


def main() -> int:
    from tests.bench.bench_card import SHAPES, heads_for

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--user-directory", type=Path)
    args = parser.parse_args()
    stand_in()
    folder, card = user_directory(args.user_directory), tiles.card_of()
    if not torch.cuda.is_available() or choice.why_no_triton() or isinstance(card, str):
        print("This needs an NVIDIA GPU that torch can use, and Triton.")
        return 1
    if folder is None:
        print("This pack lies in no ComfyUI; name its folder of users with --user-directory.")
        return 1
    if card in tiles.MEASURED:
        print("The table was measured on a card of this kind; there is nothing to tune.")
        return 0
    layout, heads, dim = SHAPES["wan-33k"]
    some = heads_for(layout, heads, dim)
    qkv = torch.randn(3, 1, some, layout.tokens, dim, device="cuda", dtype=torch.bfloat16)
    won = tune(card, calls(*qkv, choice.triton_kernels()), on_gpu)
    file = folder / tuned.FILE
    tuned.write(file, card, won)
    print(f"{len(won)} of {len(tuned.candidates())} tiles changed; they are kept in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

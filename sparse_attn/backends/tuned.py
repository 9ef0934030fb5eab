"""Tiles that `run.py bench --tune` found fastest on a card: a file for one card, Triton and pack.

Nothing is measured here, and a file for others or with other tiles than `candidates` changes nothing.
"""

import hashlib
import json
import os
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path

from . import tiles

# in the folder of ComfyUI's user
FILE = "adaspa_tiles.json"
USED = "tiles tuned on this card"


def candidates() -> dict[str, list[tiles.Tile]]:
    """What may be tried for each kernel on an NVIDIA card in place of the table's tile.

    Pairs of key tiles of 64 keys at most, which masses need, and 16 or 32 rows a warp.
    """
    Tile, found = tiles.Tile, {}
    for rows in (64, 128):
        some = product((16, 32), (rows // 32, rows // 16), (2, 3))
        found[f"attention {rows}"] = [Tile(rows, *one) for one in some]
    some = list(product((2, 3), (None, 128, 168)))
    found["quantised_attention"] = [Tile(64, 64, 4, *one) for one in some]
    found["block_masses"] = [Tile(128, 64, 4, *one) for one in some]
    found["block_masses"] += [Tile(256, 64, 4, stages) for stages in (2, 3)]
    return found


@cache
def _kernels() -> str:
    """Tells this version of the kernels from others."""
    folder = Path(__file__).parent
    digest = hashlib.sha256((folder / "tiles.py").read_bytes())
    for path in sorted((folder / "triton").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def made_for(card: tiles.Card) -> dict:
    """What a file must say to be of use here; by the name that people read."""
    triton = import_module("triton")
    return {"card": list(card), "Triton": triton.__version__, "version of the pack": _kernels()}


def write(path: Path, card: tiles.Card, found: dict[str, tiles.Tile]) -> None:
    """Keep tiles by kernel."""
    kept = {name: list(vars(tile).values()) for name, tile in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"for": made_for(card), "tiles": kept}, indent=1), "utf-8")
    os.replace(part, path)


def use(path: Path, card: tiles.Card) -> str:
    """Use the tiles of a file on a card from now on, or the table's where there is none.

    Returns:
        What to say of them, or an empty string without a file.
    """
    found, said = {}, ""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        text = None
    except (OSError, ValueError) as error:
        text, said = None, _not_used(f"{path.name} cannot be read ({error})")
    if text is not None:
        found, why_not = _read(text, card)
        said = _not_used(why_not) if why_not else USED
    tiles.use(card, found, said)
    return said


def _not_used(why: str) -> str:
    return f"tuned tiles are not used: {why}"


def _read(text: str, card: tiles.Card) -> tuple[dict[str, tiles.Tile], str]:
    """The tiles of a file, and why none of them is used or an empty string."""
    try:
        kept = json.loads(text)
        for name, here in made_for(card).items():
            if kept["for"][name] != here:
                return {}, f"they are of another {name}"
        found = {name: tiles.Tile(*values) for name, values in kept["tiles"].items()}
        allowed = candidates()
        if all(tile in allowed[name] for name, tile in found.items()):
            return found, ""
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        pass
    return {}, "their file is damaged"

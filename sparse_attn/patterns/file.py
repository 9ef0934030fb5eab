"""Pattern files: written whole or not at all, and checked whole before anything is used."""

import json
import os
import re
import zlib
from itertools import count
from pathlib import Path
from uuid import uuid4

import torch

from ..call import LayerName
from ..config import BLOCK_SIZES
from ..orders.position import serpentine_order
from ..sentences import UserError
from ..token_layout import TokenLayout
from .pattern import CarriedLayer, CarriedPattern

SUFFIX = ".safetensors"
# 1: tokens as every model has them, or in rods. 2: orders for each head as well. 3: the checksum
# covers the whole file, before only masks and orders
FORMAT, VERSION = "adaspa pattern", 3
CHECKED_WHOLE = 3
# what stands for skipped blocks -> the order of the video's tokens: (t, h, w), as every model of
# today has them; "rods", that of `orders.position.serpentine_order`; one a head, which the file holds
ORDERS = {"none": ("raster",), "pooled": ("rods", "similarity")}
# earlier files call the blocks of models that publish no number so, in running order
COUNTED = "counted"
NO_PATTERN = "is not an AdaSpa pattern file; choose one that AdaSpa Save Pattern wrote."
LONGEST_WORD = 100


def save(pattern: CarriedPattern, folder: Path, name: str) -> Path:
    """Write a pattern as safetensors; the file appears whole or not at all.

    Args:
        name: of the file, without its ending. Where that is taken, the name gets a number: of any
            number of threads and processes that save at once, each writes a file of its own.

    Returns:
        The path of the new file.

    Raises:
        ValueError: the pattern is empty. OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    if not pattern.layers:
        raise ValueError("there is no pattern to save, because no layer ran sparse")
    tensors, metadata = _contents(pattern)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{uuid4().hex}.part"
    try:
        part.touch()
        # the library's file is for its owner alone; this one is as readable as any other
        mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata)
        part.chmod(mode)
        endings = (f"_{number:05}_" if number else "" for number in count())
        paths = (folder / f"{name}{ending}{SUFFIX}" for ending in endings)
        return next(path for path in paths if _publish(part, path))
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> CarriedPattern:
    """Read and check a pattern file.

    Raises:
        UserError: one sentence on what is wrong with the file.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata)
            # a copy, so that the file is not kept open
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return _build(metadata, tensors).named(name)
    except _Unreadable as error:
        why = str(error)
    except (SafetensorError, OSError) as error:
        why = f"cannot be read ({_plain(error)}); save the pattern again."
    except KeyError as error:
        why = f"is damaged ({_plain(error.args[0])} is missing); save the pattern again."
    except (MemoryError, torch.OutOfMemoryError):
        # says nothing of the file
        raise
    except Exception as error:
        # a file of anyone's making can be wrong in ways that no list has
        why = f"is damaged ({_plain(error)}); save the pattern again."
    raise UserError(f"{name!r} {why}")


class _Unreadable(ValueError):
    """What is said of a file that is none of ours, or of a later version."""


# ---- writing


def _contents(pattern: CarriedPattern) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a pattern's file."""
    layers, tensors = [], {}
    for number, (name, layer) in enumerate(pattern.layers.items()):
        tensors[_mask_name(number)] = layer.bits.contiguous()
        if layer.order is not None:
            tensors[_order_name(number)] = layer.order.contiguous()
        layers.append(
            [*name, [round(d, 4) for d in layer.density], [round(r, 4) for r in layer.recall]]
        )
    layout = pattern.layout
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "family": pattern.family,
        "grid": json.dumps([layout.frames, layout.height, layout.width]),
        "before": str(layout.before),
        "after": str(layout.after),
        "block_size": pattern.block_size,
        "order": pattern.order,
        "tail": pattern.tail,
        "density": f"{pattern.density():.4f}",
        "recall": f"{pattern.recall():.4f}",
        "layers": json.dumps(layers, separators=(",", ":")),
    }
    return tensors, {**metadata, "crc32": checksum(metadata, tensors)}


def _publish(part: Path, path: Path) -> bool:
    """Give a written file its name; False where another file has it, which stays as it is."""
    try:
        os.link(part, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        # a file system without links: an empty file holds the name until the full one is there
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        try:
            os.replace(part, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return True


def checksum(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of everything that a file of format 3 says, its own entry aside."""
    said = [sorted((key, value) for key, value in metadata.items() if key != "crc32")]
    said += [[name, str(x.dtype), list(x.shape)] for name, x in sorted(tensors.items())]
    found = zlib.crc32(json.dumps(said).encode())
    for _, x in sorted(tensors.items()):
        found = _checksum(x, found)
    return str(found)


def _checksum(x: torch.Tensor, before: int) -> int:
    # views need no copy of what may be hundreds of megabytes
    return zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy().data, before)


# ---- reading


def _check_format(metadata) -> None:
    version = metadata.get("version", "")
    if metadata.get("format") != FORMAT or not re.fullmatch("[0-9]{1,9}", version):
        raise _Unreadable(NO_PATTERN)
    if int(version) > VERSION:
        raise _Unreadable(
            f"was written by a newer AdaSpa (format {version}, this one reads {VERSION}); "
            "update AdaSpa."
        )


def _build(metadata, tensors) -> CarriedPattern:
    whole = int(metadata["version"]) >= CHECKED_WHOLE
    if whole and checksum(metadata, tensors) != metadata["crc32"]:
        raise ValueError("it is not what was written")
    # the first files do not name a tail
    tail = metadata.get("tail", "none")
    if tail not in ORDERS:
        raise ValueError(f"tail {_shown(tail)} is not one of {', '.join(ORDERS)}")
    if metadata["order"] not in ORDERS[tail]:
        raise ValueError(
            f"token order {_shown(metadata['order'])} is not {' or '.join(ORDERS[tail])}"
        )
    block_size = metadata["block_size"]
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {_shown(block_size)} instead of {', '.join(BLOCK_SIZES)}")
    family = _word(metadata["family"])
    layout = _layout(metadata)
    listed = json.loads(metadata["layers"])
    masks = sum(name.startswith("mask.") for name in tensors)
    if not isinstance(listed, list) or len(listed) != masks or not listed:
        raise ValueError(f"{masks} masks for other layers")
    orders = len(tensors) - masks
    if bool(orders) != (metadata["order"] == "similarity") or orders > masks:
        raise ValueError(f"{orders} token orders of {masks} masks by {metadata['order']}")
    layers, found = {}, 0
    for number, entry in enumerate(listed):
        name, density, recall = _entry(entry)
        if name.block_type == COUNTED and not whole:
            name = name._replace(block_type="double")
        if name in layers:
            raise ValueError(f"two masks of one layer, {' '.join(map(str, name))}")
        bits, order = tensors[_mask_name(number)], tensors.get(_order_name(number))
        _check_mask(bits, layout, BLOCK_SIZES[block_size])
        if not len(density) == len(recall) == bits.shape[1]:
            raise ValueError("its numbers per head do not fit its masks")
        if order is not None:
            _check_order(order, bits, layout)
        for x in (bits, order):
            found = found if x is None or whole else _checksum(x, found)
        layers[name] = CarriedLayer(bits, density, recall, order)
    if not whole and str(found) != metadata["crc32"]:
        raise ValueError("its masks are not those that were written")
    return CarriedPattern(family, layout, block_size, layers, pooled=tail == "pooled")


def _layout(metadata) -> TokenLayout:
    sizes = json.loads(metadata["grid"])
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(map(_is_count, sizes)):
        raise ValueError(f"a grid of {_shown(metadata['grid'])}")
    before, after = metadata["before"], metadata["after"]
    for number in (before, after):
        if not re.fullmatch("[0-9]{1,9}", number):
            raise ValueError(f"{_shown(number)} tokens beside the video")
    if not all(sizes):
        raise ValueError("its grid is not positive")
    frames, height, width = sizes
    return TokenLayout(int(before), frames, height, width, int(after))


def _entry(entry) -> tuple[LayerName, tuple[float, ...], tuple[float, ...]]:
    """What the list of layers says of one: its name, and density and recall by head."""
    if not isinstance(entry, list) or len(entry) != len(LayerName._fields) + 2:
        raise ValueError(f"a layer of {_shown(entry)}")
    *name, density, recall = entry
    name = LayerName(*name)
    if not all(map(_is_count, (name.block_index, name.occurrence))):
        raise ValueError(f"a layer of {_shown(entry)}")
    for numbers in (density, recall):
        if not isinstance(numbers, list) or not all(type(x) in (int, float) for x in numbers):
            raise ValueError(f"{_shown(numbers)} instead of a number per head")
        if not all(0 <= x <= 1.001 for x in numbers):
            raise ValueError("a density or recall outside 0 to 1")
    name = name._replace(role=_word(name.role), block_type=_word(name.block_type))
    return name, tuple(map(float, density)), tuple(map(float, recall))


def _check_mask(bits, layout, block_size) -> None:
    rows, blocks = (layout.num_blocks(size) for size in block_size)
    if bits.dtype != torch.uint8:
        raise ValueError(f"a mask of {bits.dtype} instead of uint8")
    if bits.ndim != 4 or tuple(bits.shape[2:]) != (rows, -(-blocks // 8)) or not bits.numel():
        raise ValueError(f"a mask of shape {list(bits.shape)} for {rows} x {blocks} blocks")
    if (bits.amax(-1) == 0).any():
        raise ValueError("a mask that leaves a part of the video without attention")
    if blocks % 8 and (bits[..., -1] >> (blocks % 8)).any():
        raise ValueError("a mask that lists blocks behind the last")


def _check_order(order, bits, layout) -> None:
    """Refuse an order that is not one of all tokens, the extra ones behind the video."""
    shape = *bits.shape[:2], layout.tokens
    if order.dtype != torch.int32 or order.shape != shape:
        raise ValueError(f"a token order of shape {list(order.shape)}, {order.dtype}")
    if order.min() < 0 or order.max() >= layout.tokens:
        raise ValueError("a token order with tokens that there are not")
    met = torch.zeros(shape, dtype=torch.bool).scatter_(-1, order.long(), True)
    extra = serpentine_order(layout, order.device)[layout.video :]
    if not met.all() or not torch.equal(order[..., layout.video :], extra.expand(*shape[:2], -1)):
        raise ValueError("a token order that is not one of all tokens")


def _is_count(x) -> bool:
    return type(x) is int and 0 <= x < 10**9


def _word(x) -> str:
    if not isinstance(x, str) or not x.isprintable() or not 0 < len(x) <= LONGEST_WORD:
        raise ValueError(f"a name of {_shown(x)}")
    return x


def _mask_name(number: int) -> str:
    return f"mask.{number:05}"


def _order_name(number: int) -> str:
    return f"order.{number:05}"


def _shown(x) -> str:
    """A value of a file for people: its characters are anyone's, and so is its length."""
    text = repr(x)
    return text if len(text) <= LONGEST_WORD else f"{text[: LONGEST_WORD - 3]}..."


def _plain(text) -> str:
    """The first line of a text, without what no console and no UTF-8 message can hold."""
    lines = str(text).splitlines() or [type(text).__name__]
    return lines[0].encode("utf-8", "backslashreplace").decode()

"""Pattern files: written whole or not at all, and checked whole before anything is used."""

import json
import os
import zlib
from pathlib import Path

import torch

from ..call import LayerName
from ..config import BLOCK_SIZES
from ..orders.position import rods
from ..token_layout import TokenLayout
from .pattern import CarriedLayer, CarriedPattern

FORMAT, VERSION = "adaspa pattern", 2
# what stands for skipped blocks -> the order of the video's tokens: (t, h, w), as every model of
# today has them, that of `orders.position.rods`, or one for each head, which the file holds
ORDERS = {"none": ("raster",), "pooled": ("rods", "similarity")}
NO_PATTERN = "is not an AdaSpa pattern file; choose one that AdaSpa Save Pattern wrote"


def save(pattern: CarriedPattern, path: Path) -> None:
    """Write a pattern as safetensors; the file appears whole or not at all.

    Raises:
        ValueError: the pattern is empty. OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    if not pattern.layers:
        raise ValueError("there is no pattern to save, because no layer ran sparse")
    layers, tensors, checksum = [], {}, 0
    for number, (name, layer) in enumerate(pattern.layers.items()):
        bits = layer.bits.contiguous()
        tensors[_tensor_name(number)] = bits
        checksum = _checksum(bits, checksum)
        if layer.order is not None:
            tensors[_order_name(number)] = order = layer.order.contiguous()
            checksum = _checksum(order, checksum)
        layers.append([*name, [round(d, 4) for d in layer.density],
                       [round(r, 4) for r in layer.recall]])  # fmt: skip
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
        "crc32": str(checksum),
        "layers": json.dumps(layers, separators=(",", ":")),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> CarriedPattern:
    """Read and check a pattern file.

    Raises:
        ValueError: one sentence on what is wrong with the file.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{name} {NO_PATTERN}.")
            _check_version(metadata, name)
            # a copy, so that the file is not kept open
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{name} cannot be read ({_first_line(error)}); save the pattern again."
        ) from None
    try:
        pattern = _build(metadata, tensors)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{name} is damaged ({why}); save the pattern again.") from None
    return pattern.named(name)


def _check_version(metadata, name):
    version = metadata.get("version", "")
    if not version.isdigit():
        raise ValueError(f"{name} {NO_PATTERN}.")
    if int(version) > VERSION:
        raise ValueError(
            f"{name} was written by a newer AdaSpa (format {version}, this one reads {VERSION}); "
            "update AdaSpa."
        )


def _build(metadata, tensors) -> CarriedPattern:
    # files of earlier versions do not name a tail
    tail = metadata.get("tail", "none")
    if tail not in ORDERS:
        raise ValueError(f"tail {tail!r} is not one of {', '.join(ORDERS)}")
    if metadata["order"] not in ORDERS[tail]:
        raise ValueError(f"token order {metadata['order']!r} is not {' or '.join(ORDERS[tail])}")
    frames, height, width = json.loads(metadata["grid"])
    layout = TokenLayout(int(metadata["before"]), frames, height, width, int(metadata["after"]))
    sizes = frames, height, width
    if not all(isinstance(n, int) and n > 0 for n in sizes) or min(layout.before, layout.after) < 0:
        raise ValueError("its grid is not positive")
    block_size = metadata["block_size"]
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {block_size} instead of {', '.join(BLOCK_SIZES)}")
    listed = json.loads(metadata["layers"])
    masks = sum(name.startswith("mask.") for name in tensors)
    if len(listed) != masks or not listed:
        raise ValueError(f"{masks} masks for {len(listed)} layers")
    orders = len(tensors) - masks
    if bool(orders) != (metadata["order"] == "similarity") or orders > masks:
        raise ValueError(f"{orders} token orders of {masks} masks by {metadata['order']}")
    rows, blocks = (layout.num_blocks(size) for size in BLOCK_SIZES[block_size])
    layers, checksum = {}, 0
    for number, (role, kind, index, occurrence, density, recall) in enumerate(listed):
        bits = tensors[_tensor_name(number)]
        checksum = _checksum(bits, checksum)
        if bits.dtype != torch.uint8:
            raise ValueError(f"a mask of {bits.dtype} instead of uint8")
        if bits.ndim != 4 or tuple(bits.shape[2:]) != (rows, -(-blocks // 8)):
            raise ValueError(f"a mask of shape {list(bits.shape)} for {rows} x {blocks} blocks")
        if not len(density) == len(recall) == bits.shape[1] > 0 or not len(bits):
            raise ValueError("its numbers per head do not fit its masks")
        if not all(0 <= float(x) <= 1.001 for x in (*density, *recall)):
            raise ValueError("a density or recall outside 0 to 1")
        if (bits.amax(-1) == 0).any():
            raise ValueError("a mask that leaves a part of the video without attention")
        order = tensors.get(_order_name(number))
        if order is not None:
            checksum = _checksum(order, checksum)
            _check_order(order, bits, layout)
        if blocks % 8 and (bits[..., -1] >> (blocks % 8)).any():
            raise ValueError("a mask that lists blocks behind the last")
        layer_name = LayerName(str(role), str(kind), int(index), int(occurrence))
        layers[layer_name] = CarriedLayer(bits, tuple(density), tuple(recall), order)
    if str(checksum) != metadata["crc32"]:
        raise ValueError("its masks are not those that were written")
    pooled = tail == "pooled"
    return CarriedPattern(metadata["family"], layout, block_size, layers, pooled=pooled)


def _check_order(order, bits, layout) -> None:
    """Refuse an order that is not one of all tokens, the extra ones behind the video."""
    shape = *bits.shape[:2], layout.tokens
    if order.dtype != torch.int32 or order.shape != shape:
        raise ValueError(f"a token order of shape {list(order.shape)}, {order.dtype}")
    if order.min() < 0 or order.max() >= layout.tokens:
        raise ValueError("a token order with tokens that there are not")
    met = torch.zeros(shape, dtype=torch.bool).scatter_(-1, order.long(), True)
    extra = rods(layout, order.device)[layout.video :]
    if not met.all() or not torch.equal(order[..., layout.video :], extra.expand(*shape[:2], -1)):
        raise ValueError("a token order that is not one of all tokens")


def _tensor_name(number: int) -> str:
    return f"mask.{number:05}"


def _order_name(number: int) -> str:
    return f"order.{number:05}"


def _checksum(bits, before: int) -> int:
    # a memory view needs no copy of what may be hundreds of megabytes
    return zlib.crc32(memoryview(bits.contiguous().view(torch.uint8).numpy()).cast("B"), before)


def _first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Frames of two videos for the view with a slider, in ComfyUI's temporary folder."""

from pathlib import Path
from uuid import uuid4

import folder_paths
import numpy as np
import torch
from PIL import Image

# of long videos some frames from all over are shown, large ones smaller
MOST_FRAMES, WIDEST = 24, 1024


def preview(dense: torch.Tensor, sparse: torch.Tensor) -> dict:
    """Write frames of both videos [N, Y, X, C].

    Returns:
        frames: their numbers. dense, sparse: their files, as ComfyUI's `/view` takes them.
    """
    count = len(dense)
    chosen = sorted({round(i * (count - 1) / (MOST_FRAMES - 1)) for i in range(MOST_FRAMES)})
    folder, name = Path(folder_paths.get_temp_directory()), uuid4().hex[:12]
    folder.mkdir(parents=True, exist_ok=True)

    def write(video, kind):
        files = []
        for i in chosen:
            file = f"adaspa_compare_{name}_{kind}_{i:04d}.webp"
            _picture(video[i]).save(folder / file, quality=95, method=2)
            files.append({"filename": file, "subfolder": "", "type": "temp"})
        return files

    return {"frames": chosen, "dense": write(dense, "dense"), "sparse": write(sparse, "sparse")}


def _picture(frame: torch.Tensor) -> Image.Image:
    pixels = (frame[..., :3].float().cpu().numpy().clip(0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((WIDEST, WIDEST))
    return image

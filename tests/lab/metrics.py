"""How close videos are to the dense ones, and whether they still show what was asked for."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import perceptual
import torch

from sparse_attn.video_metrics import psnr, ssim

WORDS = ("shape", "direction", "speed")


def likeness(dense: torch.Tensor, other: torch.Tensor) -> dict[str, list[float]]:
    """Per video of [n, 3, F, Y, X] in [0, 1]: PSNR (dB), SSIM, flicker, and if its network is there
    the perceptual distance of frames ("perceptual") and of their changes ("changes").

    Flicker is the mean difference between the two videos' changes from frame to frame, in 1/255.
    """
    error = (dense.double() - other.double()).square().mean((1, 2, 3, 4)).tolist()
    change = (dense.diff(dim=2) - other.diff(dim=2)).abs().mean((1, 2, 3, 4)) * 255
    # frames as channels: SSIM is a mean over channels
    pairs = zip(dense, other, strict=True)
    frames = [[x.flatten(0, 1).movedim(0, -1) for x in pair] for pair in pairs]
    found = {
        "psnr": [psnr(max(e, 1e-10)) for e in error],
        "ssim": [ssim(a, b) for a, b in frames],
        "flicker": change.tolist(),
    }
    if perceptual.weights_file():
        apart = [perceptual.distance(a, b) for a, b in zip(dense, other, strict=True)]
        found["perceptual"], found["changes"] = map(list, zip(*apart, strict=True))
    return found


def read_back(scene, clip) -> float:
    """Share of what was asked for that a [3, F, Y, X] uint8 video shows.

    A thing is looked for by its colour; one that is not found has no word right.
    """
    import procedural_video as video

    found = {thing["colour"]: thing for thing in video.describe(torch.from_numpy(clip) / 255)}
    right = []
    for thing in scene.things:
        seen = found.get(thing.colour)
        right.append(seen is not None)
        right += [seen is not None and seen[word] == getattr(thing, word) for word in WORDS]
    return sum(right) / len(right)


class Readers:
    """Reads videos back in other processes while the device goes on.

    Make one before anything touches CUDA: the processes are forks.
    """

    def __init__(self):
        workers = max(1, (os.cpu_count() or 2) - 2)
        self.pool = ProcessPoolExecutor(workers, get_context("fork"), torch.set_num_threads, (1,))
        self.pool.submit(os.getpid).result()

    def read(self, scenes, videos: torch.Tensor) -> list:
        """Futures of the task scores, one per video."""
        clips = (videos * 255).round().byte().cpu().numpy()
        return [
            self.pool.submit(read_back, scene, clip)
            for scene, clip in zip(scenes, clips, strict=True)
        ]

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)

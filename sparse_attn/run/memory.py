"""What happens where memory runs out: the work is dropped whole, and the caller does without."""

from contextlib import suppress

import torch


def until_out_of_memory() -> suppress:
    """Run the body, and go on behind it where memory runs out.

    Nothing that the body's calls held is left then: the traceback, which holds their frames and with
    them their tensors, is gone.
    """
    return suppress(torch.OutOfMemoryError)

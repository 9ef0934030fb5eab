"""Threads of a CPU, each of which computes whole tiles alone."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def each_alone(device):
    """Yield for_each(work, tiles), which calls work(tile) for every tile; on a CPU, in threads.

    A tile is too little work to share: the threads would wait for each other after each product.
    So each thread computes whole tiles, alone.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:

        def for_each(work: Callable, tiles: Iterable):
            deque(map(work, tiles), maxlen=0)

        yield for_each
        return

    def for_each(work: Callable, tiles: Iterable):
        # one task per thread: one per tile would wake the waiting caller after each
        rest = deque(tiles)

        # threads do not inherit the caller's inference mode
        @torch.inference_mode()
        def take_turns(_):
            while rest:
                try:
                    tile = rest.popleft()
                except IndexError:
                    return
                work(tile)

        deque(pool.map(take_turns, range(threads)), maxlen=0)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield for_each
    finally:
        # the last number set is also that of every thread yet to start
        torch.set_num_threads(threads)

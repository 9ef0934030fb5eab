"""What travels with one sampling: in the options of its model's calls, and in its sampler's callback."""

from collections.abc import Callable


class Uncopied:
    """Stays itself where options are copied, by nodes that change some of them for the same sampling."""

    def __deepcopy__(self, memo):
        return self


def listener(note: Callable, failed: Callable[[Exception], None], callback: Callable | None):
    """What a sampler calls with what it says of a step: `note` comes before its own `callback`.

    Args:
        failed: failed(error), called with what `note` raises.
    """

    def told(*said, **more):
        try:
            note(*said)
        except Exception as error:
            failed(error)
        if callback is not None:
            callback(*said, **more)

    return told

"""Nothing of ours ends a run: after an error what the host was about to do goes on without us."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..run.state import RunState
from .status import log

# on an error that came out of another's attention
BESIDE = "_adaspa_beside"


@contextmanager
def beside() -> Iterator[None]:
    """Mark an error of the attention that would serve without us, which may not be ours."""
    try:
        yield
    except Exception as error:
        setattr(error, BESIDE, True)
        raise


def go_on_without_us(error: Exception, run: RunState | None = None) -> None:
    """Log an error of ours, and let its run be dense from here on.

    Raises:
        InterruptProcessingException: `error`, where it is the host's own interrupt.
    """
    import comfy.model_management

    if isinstance(error, comfy.model_management.InterruptProcessingException):
        raise error
    log.warning("AdaSpa: an error that nobody expected; the host goes on alone", exc_info=error)
    if run is not None:
        run.give_up(error, beside=hasattr(error, BESIDE))

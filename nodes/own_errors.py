"""An error of ours in a node costs what the node does, and no more: the prompt goes on."""

from collections.abc import Callable
from functools import wraps

import torch
from comfy_api.latest import io

from ..sparse_attn.config import AdaSpaConfig
from ..sparse_attn.host.guard import go_on_without_us
from ..sparse_attn.run.handle import RunHandle
from ..sparse_attn.run.state import MOST_OF_AN_ERROR
from ..sparse_attn.sentences import Sentence, UserError
from .settings import spoken


def otherwise(without_us: Callable[..., io.NodeOutput]):
    """Give what a node does an alternative; what the user can mend still ends the prompt.

    Args:
        without_us: without_us(said, **inputs) -> what stands in after an error that nobody expected.
    """

    def decorate(execute):
        @wraps(execute)
        def guarded(cls, *args, **inputs):
            try:
                return execute(cls, *args, **inputs)
            except UserError:
                raise
            except Exception as error:
                said = noted(error)
            return without_us(said, *args, **inputs)

        return guarded

    return decorate


def noted(error: Exception) -> Sentence:
    """Log an error of ours, and say it; the host's own interrupt is raised again."""
    go_on_without_us(error)
    return Sentence("node_failed", why=repr(error)[:MOST_OF_AN_ERROR])


def without_adaspa(said: Sentence, *models) -> io.NodeOutput:
    """The outputs of a node that has installed nothing: its models as they came."""
    handle = RunHandle(AdaSpaConfig())
    handle.failed = said
    return io.NodeOutput(*models, handle, ui=spoken([said]))


def blank() -> torch.Tensor:
    """The picture of a node that has none, [1, Y, X, C]."""
    return torch.ones(1, 64, 64, 3)

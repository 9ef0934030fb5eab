"""LTX-Video and LTX-2: guide frames stand behind the video, and audio in a stream of its own."""

from ...sentences import Sentence
from ...token_layout import TokenLayout


def layout(model, latent_shape, inputs) -> TokenLayout | str:
    """Video + [guide frames, without the tokens that their mask removes]; patches of one."""
    frames, height, width = latent_shape[-3:]
    positions = inputs.get("keyframe_idxs")
    guides = 0 if positions is None else positions.shape[2]
    if not guides:
        return TokenLayout(0, frames, height, width)
    if guides % (height * width):
        return f"{guides:,} guide tokens are not whole frames of {height}x{width}"
    frames -= guides // (height * width)
    # negative where a guide of lower resolution has no pixel; the model drops such tokens
    removed = (inputs["denoise_mask"][0] < 0).any(0)
    if tuple(removed.shape) != tuple(latent_shape[-3:]):
        return Sentence("why_guide_shape", shape=str(list(removed.shape)))
    in_video, in_guides = (int(part.sum()) for part in (removed[:frames], removed[frames:]))
    if in_video:
        return Sentence("why_guide_removes")
    return TokenLayout(0, frames, height, width, guides - in_guides)

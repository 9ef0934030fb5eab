"""Where video tokens lie in a sequence, and which tokens around them are not video."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """One sequence: `before` extra tokens, then the video in (t, h, w) order, then `after` more.

    Extra tokens are text, references or anything else that is not the video grid; they stay exact.

    Args:
        before: tokens in front of the video.
        frames, height, width: the video's grid, in tokens.
        after: tokens behind the video.
    """

    before: int
    frames: int
    height: int
    width: int
    after: int = 0

    @property
    def video(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.before + self.video + self.after

    def num_blocks(self, block_size: int) -> int:
        return -(-self.tokens // block_size)

    def describe(self) -> str:
        extra = self.before + self.after
        grid = f"{self.frames}x{self.height}x{self.width}"
        return f"{self.tokens:,} tokens ({grid} video" + (f", {extra:,} other)" if extra else ")")

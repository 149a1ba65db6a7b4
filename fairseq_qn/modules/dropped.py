"""What stands in for a module that was left out of a file."""

from __future__ import annotations

from torch import nn

from fairseq_qn.errors import UnsupportedError


class DroppedError(UnsupportedError, AttributeError):
    """A module that was left out of the file is asked for something. hasattr says no."""


class Dropped(nn.Module):
    """In place of a module that was left out of the file: calls and reads raise DroppedError."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: object, **kwargs: object) -> None:
        """Raises DroppedError."""
        raise DroppedError(
            f"{self.name}: was left out of the file when it was saved; save it without drop to use it"
        )

    __iter__ = __len__ = __getitem__ = forward

    def __getattr__(self, attribute: str) -> object:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return self.forward()

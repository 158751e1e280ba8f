"""The error of every loader."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A folder that cannot be loaded as it is. The message names the file and says what to do."""

"""Defaults of settings that commands name without the settings, which take longer to import than such a command to run."""

from typing import Final

BEHIND_SECONDS: Final = 900.0
"""Longer than this no shard should wait, by default."""

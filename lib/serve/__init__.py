"""Files to OpenAI-compatible HTTP; needs no torch (notebook 04)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {"server": "running serve", "bundle": "Reader open_bundle",
    "lib.client": "ask ask_all connect question"})

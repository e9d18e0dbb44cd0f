"""From a budget of bytes to files that run (notebook 05)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "packed": "load_deployed save_packed", "deployment": "deploy shipped"})

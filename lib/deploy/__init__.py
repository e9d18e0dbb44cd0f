"""From a budget of bytes to files that run (notebook 05)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "packed": "deploy_packed known_configurations load_deployed save_packed", "gguf": "deploy_gguf"
})

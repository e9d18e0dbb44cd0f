"""From LoRA to the edge: the thin library behind the notebooks."""

import logging

# bitsandbytes reports an optional kernel it lacks while it is being imported.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

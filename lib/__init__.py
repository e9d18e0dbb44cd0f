"""From LoRA to the edge: the thin library behind the notebooks."""

import logging
import warnings

# bitsandbytes reports an optional kernel it lacks while it is being imported.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
# A notebook without widgets draws plain progress bars, which is what we want.
warnings.filterwarnings("ignore", message="IProgress not found")

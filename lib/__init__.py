"""From LoRA to the edge: the thin library behind the notebooks."""

import logging
import sys
import warnings

if sys.version_info < (3, 11):  # noqa: UP036 (older ones stop here, with one line)
    print("error: this is Python {}.{}, the course needs 3.11 to 3.13: make an environment "
          "with one of these".format(*sys.version_info[:2]), file=sys.stderr)
    sys.exit(2)

# bitsandbytes reports an optional kernel it lacks while it is being imported.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
# A notebook without widgets draws plain progress bars, which is what we want.
warnings.filterwarnings("ignore", message="IProgress not found")

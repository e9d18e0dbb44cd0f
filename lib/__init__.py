"""From LoRA to the edge: the thin library behind the notebooks."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 (older ones stop here, with one line)
    print("error: the course needs Python 3.11 to 3.13, this is {}.{}: make an environment with "
          "one of these".format(*sys.version_info[:2]), file=sys.stderr)
    sys.exit(2)

# By default threads wait in a loop: beside a busy program a step takes 3 to 6 times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# On import, bitsandbytes reports an optional kernel that is missing.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
# On import, jsonschema reads this grammar for seconds, for a format that nothing here checks.
sys.modules.setdefault("rfc3987_syntax", None)
# Without widgets a notebook draws plain progress bars, which is what we want.
warnings.filterwarnings("ignore", message="IProgress not found")


def exports(package: str, modules: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__`, importing at first use, and `__all__`, from {module: "its names"}."""
    homes = {name: module if "." in module else f"{package}.{module}"
             for module, names in modules.items() for name in names.split()}

    def lookup(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return lookup, sorted(homes)

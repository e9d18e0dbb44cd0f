"""Running and teaching the course: notebooks, exercises, the doctor."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "notebook": "Measurements check differs run_directory start"})

"""Running and teaching the course: notebooks, exercises, the doctor, the site."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "exercises": "check differs",
    "opening": "Measurements run_directory start",
})

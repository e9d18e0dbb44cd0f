"""The README's picture: one adapter at many configurations, and quality against bytes."""

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from data.evidence.compare import rows
from lib.evaluate.scores import COLOURS, use_style
from lib.files import ROOT, read_json, replacing

PICTURE = ROOT / "data" / "results" / "picture.png"
METHODS = {"base": "no adapter", "lora": "one plain adapter for all",
           "dedicated": "one for each", "coa": "CoA-LoRA",
           "long": "CoA-LoRA, 2.6 times the steps"}
FILES = {"16 bits": ("pipeline", "dequantized"), "LLM.int8": ("pipeline", "int8"),
         "NF4, rounded again": ("pipeline", "nf4"), "GGUF Q8_0": ("edge", "Q8_0"),
         "GGUF Q4_1": ("edge", "Q4_1"), "GGUF mixed, 80 MB": ("mixed", "80"),
         "CoA-LoRA, packed": ("packed", "65")}


def drawn_numbers(folder: Path) -> dict[str, Any]:
    """The numbers of the picture: the points of each method, and of each file."""
    stored = {path.stem: read_json(path)["result"] for path in folder.glob("*.json")
              if path.stem in {part for part, _ in FILES.values()}}
    measured = read_json(folder / "coa" / "sensors-coa-0.json")["result"]["plans"]
    greedy = [name for name in measured if "greedy" in name]
    curves: dict[str, list[tuple[float, float]]] = {}
    for method in METHODS:
        points = []
        for name in greedy:
            if seeds := [*rows("sensors", method, name, folder / "coa").values()]:
                points.append((seeds[0]["bits"], statistics.mean(r["loss"] for r in seeds)))
        curves[method] = sorted(points)
    files = {}
    for label, (part, name) in FILES.items():
        if part in stored:
            row = stored[part][name]
            files[label] = (row["mb"], *(row["test"][key] for key in ("share", "low", "high")))
    return {"curves": curves, "files": files}


def digest(numbers: dict[str, Any]) -> str:
    """Short SHA-256 of the numbers, stored in the picture to tell whether it is up to date."""
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def stamp(picture: Path = PICTURE) -> str:
    """The digest that the picture has in its metadata."""
    with Image.open(picture) as image:
        return image.text.get("Description", "")


def draw(folder: Path, picture: Path = PICTURE) -> None:
    """Draw what is stored in `folder`."""
    numbers = drawn_numbers(folder)
    with plt.rc_context():
        use_style()
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), dpi=110)
        _curves(left, numbers["curves"])
        _files(right, numbers["files"])
        with replacing(picture) as part:
            figure.savefig(part, format="png", metadata={"Description": digest(numbers)})
        plt.close(figure)


def _curves(axes: Axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    for (method, points), mark, colour in zip(curves.items(), "xs^oD",
                                              [*COLOURS[3::-1], COLOURS[6]], strict=True):
        if points:
            axes.semilogy(*zip(*points, strict=True), marker=mark, color=colour,
                          ms=4, label=METHODS[method])
    axes.set(xlabel="bits a weight", ylabel="held-out loss (nats)",
             title="One adapter, configurations never trained on")
    axes.legend(fontsize=8, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.83))


def _files(axes: Axes, files: dict[str, tuple[float, float, float, float]]) -> None:
    for (label, (mb, share, low, high)), mark, colour in zip(files.items(), "osDP^vX", COLOURS,
                                                             strict=False):
        axes.errorbar(mb, 100 * share, yerr=[[100 * (share - low)], [100 * (high - share)]],
                      marker=mark, ls="", capsize=4, color=colour, label=label)
    axes.set(xlabel="file (MB)", ylabel="right answers (%)", ylim=(0, 102),
             title="Trained models, stored in several ways")
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    axes.legend(fontsize=9, loc="center right")

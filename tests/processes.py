"""`python -m lib` with eyes: `accelerate launch` runs this file for test_scale.py.

The command is run twice. The first run is stopped after its first checkpoint,
the second goes on from there.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lib.train.training
from lib.__main__ import main
from lib.train.training import CourseTrainer


def trainable(trainer: CourseTrainer) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def watch(patch: pytest.MonkeyPatch, file: Path) -> None:
    """At the end of a run, write its first step's gradient, before it is clipped, and weights."""
    seen: dict[str, Any] = {}
    clip, run = CourseTrainer._clip_grad_norm, lib.train.training.run_trainer

    def clipped(self: CourseTrainer, model: Any) -> Any:
        for name, parameter in trainable(self).items():
            seen.setdefault(f"gradient.{name}", parameter.grad.clone())
        return clip(self, model)

    def ran(trainer: CourseTrainer, *args: Any, **options: Any) -> Any:
        result = run(trainer, *args, **options)
        save_file(seen | {f"weight.{n}": p.data for n, p in trainable(trainer).items()}, file)
        return result

    patch.setattr(CourseTrainer, "_clip_grad_norm", clipped)
    patch.setattr(lib.train.training, "run_trainer", ran)


def run_twice(folder: Path, rank: int, command: list[str]) -> None:
    """Train in this process, one of several, and write what it saw."""
    # As if each had timed the products and found another winner.
    os.environ["COURSE_DTYPE"] = ("float32", "bfloat16")[rank]
    patch = pytest.MonkeyPatch()
    watch(patch, folder / f"{rank}.safetensors")
    facts: dict[str, Any] = {"written": [], "status": []}
    patch.setattr(lib.train.training, "CHECKPOINT_EVERY", 2)
    save = CourseTrainer._save_checkpoint

    def saved(self: CourseTrainer, *args: Any) -> None:
        save(self, *args)
        step = self.state.global_step
        if rank == 0 and step < self.state.max_steps:
            file = Path(self.args.output_dir) / f"checkpoint-{step}" / "state.safetensors"
            facts["written"].append([step, load_file(file)["rng"].numel()])
        if not facts["status"]:
            raise KeyboardInterrupt

    def locate(model: str) -> str:
        """Preparing the base takes the first process a while."""
        facts["first"] = not (folder / "prepared").exists()
        time.sleep(0.2 if rank == 0 else 0)
        (folder / "prepared").touch()
        return model

    patch.setattr(CourseTrainer, "_save_checkpoint", saved)
    patch.setattr(lib.train.training, "locate", locate)
    facts["status"].append(main(command))
    (folder / "prepared").unlink(missing_ok=True)
    facts["status"].append(main(command))
    facts["dtype"] = os.environ["COURSE_DTYPE"]
    (folder / f"{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run_twice(Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2:])

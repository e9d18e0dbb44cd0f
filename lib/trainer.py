"""TRL's SFTTrainer with a lean loss and checkpoints without pickle."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTTrainer

from lib.artifacts import read_json, verified, writing
from lib.tasks import answer_loss


class CourseTrainer(SFTTrainer):
    """SFTTrainer with a lean loss and checkpoints without pickle."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        total, tokens = answer_loss(model, inputs["input_ids"], inputs["labels"])
        return total / (tokens if num_items_in_batch is None else num_items_in_batch)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainable weights, Adam moments, random state; one directory, renamed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in self._trainable().items():
            tensors[f"weight.{name}"] = parameter.data
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        with writing(folder, scheduler=self.lr_scheduler.state_dict()) as part:
            save_file({k: t.contiguous() for k, t in tensors.items()},
                      part / "state.safetensors")
            self.state.save_to_json(str(part / "trainer_state.json"))
        for old in Path(self.args.output_dir).glob("checkpoint-*"):
            if old != folder:
                shutil.rmtree(old)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(checkpoint) / "state.safetensors")
        for name, parameter in self._trainable().items():
            parameter.data.copy_(state[f"weight.{name}"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_file(Path(checkpoint) / "state.safetensors")
        for name, parameter in self._trainable().items():
            self.optimizer.state[parameter] = {
                key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        scheduler = read_json(Path(checkpoint) / "manifest.json")["scheduler"]
        self.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, scheduler["_last_lr"],
                               strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            torch.set_rng_state(load_file(Path(checkpoint) / "state.safetensors")["rng"])


class Progress(TrainerCallback):
    """A plain line now and then: step, loss, seconds left. Silent if not wanted."""

    def __init__(self, every: int) -> None:
        self.every, self.start, self.first = every, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        step, total = state.global_step, state.max_steps
        if "loss" not in (logs or {}) or (step % self.every and step != total):
            return
        pace = (time.monotonic() - self.start) / max(1, step - self.first)
        print(f"step {step:4d}/{total}  loss {logs['loss']:.3f}  "
              f"about {pace * (total - step):.0f} s left", flush=True)


def last_checkpoint(work: Path) -> Path | None:
    """Newest whole checkpoint; leftovers of a killed write are ignored."""
    found = [p for p in work.glob("checkpoint-*") if (p / "manifest.json").is_file()]
    if not found:
        return None
    last = max(found, key=lambda p: int(p.name.split("-")[1]))
    verified(last)
    print(f"resuming from step {last.name.split('-')[1]}", file=sys.stderr)
    return last

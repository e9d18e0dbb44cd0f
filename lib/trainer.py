"""TRL's SFTTrainer with a lean loss and checkpoints without pickle."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTTrainer

from lib.artifacts import read_json, verified, write_json, writing
from lib.processes import first
from lib.scratch import parents, saving, scratch
from lib.tasks import answer_loss

IDENTITY = "identity.json"
# Seconds after which a reader wonders whether anything happens.
SILENCE = 45.0


class CourseTrainer(SFTTrainer):
    """SFTTrainer with a lean loss and checkpoints without pickle."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        total, tokens = answer_loss(model, inputs["input_ids"], inputs["labels"])
        if num_items_in_batch is None:
            return total / tokens
        # It counts the tokens of all processes, whose gradients will be averaged.
        return total * self.accelerator.num_processes / num_items_in_batch

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainable weights, Adam moments, random states; one directory, renamed."""
        # Weights and moments are the same everywhere, random states are not.
        rng = self.accelerator.gather(torch.get_rng_state().to(self.args.device))
        if first():
            self._write_checkpoint(rng.cpu())
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, rng: torch.Tensor) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        tensors = {"rng": rng}
        for name, parameter in self._trainable().items():
            tensors[f"weight.{name}"] = parameter.data
            for key, value in self.optimizer.state[parameter].items():
                # bitsandbytes has an int for the step, and one code table for all.
                tensors[f"{key}.{name}"] = (value.clone() if key.startswith("qmap")
                                            else torch.as_tensor(value))
        with writing(folder, scheduler=self.lr_scheduler.state_dict()) as part:
            save_file({k: t.contiguous() for k, t in tensors.items()}, part / "state.safetensors")
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
        kinds = {key.partition(".")[0] for key in state} - {"weight", "rng"}
        for name, parameter in self._trainable().items():
            found = {kind: state[f"{kind}.{name}"].to(parameter.device)
                     for kind in kinds if f"{kind}.{name}" in state}
            self.optimizer.state[parameter] = {
                kind: t.item() if t.dtype == torch.int64 else t for kind, t in found.items()}
        scheduler = read_json(Path(checkpoint) / "manifest.json")["scheduler"]
        self.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, scheduler["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = load_file(Path(checkpoint) / "state.safetensors")["rng"]
            torch.set_rng_state(
                states.view(self.args.world_size, -1)[self.args.process_index].clone())


class Progress(TrainerCallback):
    """A plain line every so many steps, and where they are slow every `SILENCE` seconds."""

    def __init__(self, every: int) -> None:
        self.every, self.start, self.said, self.first = every, 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = self.said = time.monotonic()
        self.first = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        step, total, now = state.global_step, state.max_steps, time.monotonic()
        due = step % self.every == 0 or step == total or now - self.said > SILENCE
        if not first() or "loss" not in (logs or {}) or not due:
            return
        pace, self.said = (now - self.start) / max(1, step - self.first), now
        print(f"step {step:4d}/{total}  loss {logs['loss']:.3f}  "
              f"about {pace * (total - step):.0f} s left", flush=True)


def last_checkpoint(work: Path) -> Path | None:
    """Newest whole checkpoint; leftovers of a killed write are ignored."""
    found = [p for p in work.glob("checkpoint-*") if (p / "manifest.json").is_file()]
    if not found:
        return None
    last = max(found, key=lambda p: int(p.name.split("-")[1]))
    verified(last)
    if first():
        print(f"resuming from step {last.name.split('-')[1]}", file=sys.stderr)
    return last


@contextlib.contextmanager
def work_directory(out: Path | None, identity: dict[str, Any],
                   processes: PartialState) -> Iterator[Path]:
    """Where checkpoints live: beside `out`, kept if the run is cut short.

    What is there goes on only if it is of the same `identity` (settings, model,
    records) and of as many processes. The first process keeps house for all.
    """
    if out is None:
        with scratch() as work, saving(work):
            yield work
        return
    out = Path(out)
    work = out.with_name(f".{out.name}.work")
    if processes.num_processes > 1:
        identity = identity | {"processes": processes.num_processes}
    with saving(work), parents(work):
        if first():
            _begin(work, identity)
        processes.wait_for_everyone()
        done = False
        try:
            yield work
            processes.wait_for_everyone()
            done = True
        finally:
            # Kept only for a run that was cut short and has something to resume from.
            if first() and (done or not any(work.glob("checkpoint-*"))):
                _discard(work)


def _begin(work: Path, identity: dict[str, Any]) -> None:
    """An empty work directory, or the one that a run like this has left."""
    key = work / IDENTITY
    if not key.is_file() or read_json(key) != json.loads(json.dumps(identity)):
        _discard(work)
    work.mkdir(exist_ok=True)
    write_json(key, identity)


def _discard(work: Path) -> None:
    """Remove a work directory; without its identity, what a kill has left of it is no more used."""
    (work / IDENTITY).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)

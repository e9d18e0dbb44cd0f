"""Full fine-tuning, LoRA and QLoRA: TRL's SFTTrainer with a faster step and safe checkpoints."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from lib.base import quantized_config
from lib.base.embedded import EMBEDDED, locate
from lib.base.model import best_dtype, context, hold_memory, load_model, load_tokenizer, machine
from lib.base.records import IGNORED, Record, encode
from lib.errors import UserError, require
from lib.evaluate.scores import answer_loss, batch_losses, peak_memory
from lib.files import read_json, require_free, scratch, sha256, verified, write_json, writing
from lib.host import is_main_process, is_sharded, process_count
from lib.settings import TrainSettings, seed_everything
from lib.train.lora import count_trainable, fused, lora_config, make_portable

CHECKPOINT_EVERY = 50  # steps
RANK = os.environ.get("RANK", "0")  # of this process among those that train together
SILENCE = 45.0  # seconds after which a reader wonders whether the run is stuck
LARGEST_HELD = 32 << 20  # bytes; holding larger blocks: 6 % faster, a third more memory


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained model and figures of its run; memory in MB (10^6 bytes)."""

    model: PreTrainedModel | PeftModel
    losses: tuple[float, ...]
    seconds: float
    peak_mb: float
    trainable: int
    parameters: int
    optimizer_mb: float
    validation: dict[int, float]  # held-out loss by step


class CourseTrainer(SFTTrainer):
    """SFTTrainer with a lean loss and checkpoints of tensors: "weight.NAME", ..., and "rng"."""

    run = ""  # a hash of everything that determines the result

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        total, _ = answer_loss(model, inputs["input_ids"], inputs["labels"])
        # This number covers all processes, and their gradients will be averaged.
        return total * self.accelerator.num_processes / num_items_in_batch

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.control.should_training_stop:
            return  # resumed from there, the trainer would first go one step further
        # Weights and moments are the same in every process, random states are not.
        tensors = {"rng": self.accelerator.gather(torch.get_rng_state().to(self.args.device))}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                tensors[f"weight.{name}"] = parameter.data
                for key, value in self.optimizer.state[parameter].items():
                    # bitsandbytes counts steps in an int, and shares one "qmap" table.
                    tensors[f"{key}.{name}"] = (value.clone() if key.startswith("qmap")
                                                else torch.as_tensor(value))
        folder = (work := Path(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if is_main_process():
            with writing(folder, run=self.run, scheduler=self.lr_scheduler.state_dict()) as part:
                whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(whole, part / "state.safetensors")
                self.state.save_to_json(str(part / "trainer_state.json"))
            for old in set(work.glob("checkpoint-*")) - {folder}:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Weights are loaded together with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in load_file(Path(checkpoint) / "state.safetensors").items():
            key, _, owner = name.partition(".")
            if key == "weight":
                parameters[owner].data.copy_(tensor)
            elif key != "rng":
                self.optimizer.state[parameters[owner]][key] = (
                    tensor.item() if tensor.dtype == torch.int64 else tensor.to(self.args.device))
        scheduler = read_json(Path(checkpoint) / "manifest.json")["scheduler"]
        self.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, scheduler["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = load_file(Path(checkpoint) / "state.safetensors")["rng"]
            torch.set_rng_state(states.chunk(self.args.world_size)[self.args.process_index].clone())


class Progress(TrainerCallback):
    """A line every `every` steps, and more often where these take longer than `SILENCE`."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step, self.time = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        step, total, seconds = state.global_step, state.max_steps, time.monotonic() - self.time
        due = step % self.every == 0 or step == total or seconds > SILENCE
        if due and is_main_process() and (loss := (logs or {}).get("loss")) is not None:
            left = seconds / (step - self.step) * (total - step)
            print(f"step {step:4d}/{total}  loss {loss:.3f}  about {left:.0f} s left", flush=True)
            self.step, self.time = step, time.monotonic()


class Validation(TrainerCallback):
    """Held-out loss every few steps: the best weights are kept, and a run without gain stops."""

    def __init__(self, held: Dataset, settings: TrainSettings, work: Path, log: Any) -> None:
        self.held, self.settings, self.log = held, settings, log
        self.every = settings.eval_every or max(1, settings.steps // 10)
        self.best = work / f"best-{RANK}.safetensors"

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        for module in model.modules():  # in evaluation NF4 layers without an adapter would be
            module.training = hasattr(module, "compute_dtype")  # packed, and lose their gradient
        pairs = ((row["input_ids"], row["labels"]) for row in self.held)
        sums, counts = zip(*batch_losses(model, pairs, 16), strict=True)
        model.train()
        # In the state's history, so that a resumed run has it.
        self.log({"validation": sum(sums) / sum(counts)})
        control.should_log = True  # the step's own loss is still to be logged
        losses = [row["validation"] for row in state.log_history if "validation" in row]
        if losses[-1] == min(losses):
            save_file({name: p.data.contiguous() for name, p in model.named_parameters()
                       if p.requires_grad}, self.best)
        if is_main_process():
            print(f"step {state.global_step:4d}  held-out loss {losses[-1]:.3f}"
                  + ", the best so far" * (losses[-1] == min(losses)), flush=True)
        stale = len(losses) - 1 - losses.index(min(losses))
        control.should_training_stop |= 0 < self.settings.patience <= stale

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        for name, tensor in (load_file(self.best) if self.best.is_file() else {}).items():
            model.get_parameter(name).data.copy_(tensor)  # an error where it has none


def base_for(mode: str, name: str) -> PreTrainedModel:
    """The base model for `mode`: in NF4 ("qlora"), or in full precision."""
    if mode == "qlora":
        return load_model(name, quantization_config=quantized_config())
    # A step of Adam is often smaller than bfloat16 can add to a weight.
    return load_model(name, dtype=torch.float32 if mode == "full" else None)


def make_trainer(model: PreTrainedModel, tokenizer: Any, records: Iterable[Record],
                 settings: TrainSettings, *, work: Path, say_every: int = 0,
                 held: Iterable[Record] | None = None) -> SFTTrainer:
    """The trainer for a model without an adapter, which it adds."""
    on_gpu, known = torch.cuda.is_available(), get_available_reporting_integrations()
    require(settings.report_to in ("none", *known), f"report to {settings.report_to!r}: install "
            f"it first, or use one of {', '.join(('none', *known))}")
    args = SFTConfig(output_dir=str(work), max_steps=settings.steps, seed=settings.seed,
        per_device_train_batch_size=settings.batch_size // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        # Rounded down: the first step of the warm-up has rate zero, so it is lost.
        warmup_steps=int(settings.warmup * settings.steps),
        # In a short run Adam must soon forget the large first gradients, and clip them.
        adam_beta2=0.95, max_grad_norm=0.5,
        # The state of paged_adamw_8bit cannot be saved under FSDP (peft's guide).
        optim="paged_adamw_8bit" if on_gpu and not is_sharded() else "adamw_torch_fused",
        max_length=settings.max_length, dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not on_gpu, bf16=settings.mode == "full" and best_dtype() == torch.bfloat16,
        gradient_checkpointing=on_gpu, dataloader_pin_memory=on_gpu,
        # peft's guide to FSDP with QLoRA uses the reentrant kind.
        gradient_checkpointing_kwargs={"use_reentrant": True} if is_sharded() else None,
        # Our checkpoints hold whole tensors, which no process has under FSDP.
        save_strategy="no" if is_sharded() else "steps", save_steps=CHECKPOINT_EVERY,
        ddp_find_unused_parameters=False, report_to=settings.report_to, disable_tqdm=True,
        logging_steps=1, logging_nan_inf_filter=False)
    require(settings.max_length <= context(model), f"--max-length {settings.max_length} is above "
            f"the model's context: use {context(model)} or less")
    learned, validated = tokenised(tokenizer, records, settings, work), None
    if held is not None:
        require(not settings.eval_share, "two validation sets: omit --eval-data or --eval-share")
        validated = tokenised(tokenizer, held, settings, work / "held")
    elif settings.eval_share:
        # Evenly spread; int(i * share) counts those before row i.
        share, rows = settings.eval_share, range(len(learned))
        held_rows = [i for i in rows if int((i + 1) * share) > int(i * share)]
        require(held_rows, f"{len(rows)} records have no share of {share}: give more")
        validated = learned.select(held_rows)
        learned = learned.select(sorted({*rows} - {*held_rows}))
    require(validated or not (settings.patience or settings.eval_every),
            "nothing to validate with: add --eval-data or --eval-share")
    trainer = (SFTTrainer if settings.plain else CourseTrainer)(
        model=model, args=args, processing_class=tokenizer, train_dataset=learned,
        peft_config=None if settings.mode == "full" else lora_config(model, settings))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # in bfloat16, as TRL leaves it, small Adam steps vanish
            parameter.data = parameter.data.float()
    trainer.model_accepts_loss_kwargs |= not settings.plain  # our loss divides by their count
    trainer.remove_callback(PrinterCallback)
    if validated is not None:
        require(not is_sharded(), "FSDP cannot validate: use `python -m lib evaluate` afterwards")
        trainer.add_callback(Validation(validated, settings, work, trainer.log))
    if say_every:
        trainer.add_callback(Progress(say_every))
        if is_main_process():
            times = settings.steps / math.ceil(len(learned) / settings.batch_size / process_count())
            print(f"{len(learned)} records to learn, {float(f'{times:.2g}'):g} passes over them",
                  preview(tokenizer, **trainer.train_dataset[0]), sep="\n", flush=True)
    return trainer


def tokenised(tokenizer: Any, records: Iterable[Record], settings: Any, work: Path) -> Dataset:
    """Records as token ids and labels, in a file of `work` that is read as needed."""
    work.mkdir(parents=True, exist_ok=True)
    file, count = work / f"tokens-{RANK}.arrow", 0
    with ArrowWriter(path=str(file)) as writer:
        for count, record in enumerate(tqdm(records, "records read", disable=None, delay=5), 1):
            where = getattr(records, "where", f"record {count}")
            require(settings.learn == "all" or "text" not in record, f"{where} is plain text, of "
                    "which all is learned: leave --learn out")
            ids, labels = encode(tokenizer, record, learn=settings.learn, where=where)
            # A model that never sees an end does not stop.
            require(len(ids) <= settings.max_length, f"{where} has {len(ids)} tokens and would be "
                    f"cut off: raise --max-length {settings.max_length}, or shorten it")
            writer.write({"input_ids": ids, "labels": labels})
        require(count, "there are no records to train on: give at least one")
        writer.finalize()
    return Dataset.from_file(str(file))


def preview(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """One example as it is trained on: what is read, and what is learned."""
    parts = []
    for learned, group in itertools.groupby(zip(input_ids, labels, strict=True),
                                            lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"  {'learned' if learned else 'prompt '} {text!r}")
    return "\n".join(["the first example, as the model sees it:", *parts])


def train(records: Iterable[Record], settings: TrainSettings, *, model: str = "embedded",
          out: Path | None = None, say_every: int = 0, held: Iterable[Record] | None = None,
          base: PreTrainedModel | None = None, adapt: Callable[[SFTTrainer], Any] = id,
          identity: Sequence[Any] = (), facts: Callable[[], dict[str, Any]] = dict) -> TrainResult:
    """Train on records; save the adapter ("full": the model) and its losses to `out` if given.
    Started again with the same settings and records, a killed run resumes from its checkpoint.
    `model` is "embedded", a hub id, or a local directory; `say_every` the steps between lines of
    progress; `held` is for validation. UserError for records, model or settings that do not fit.
    Other ways to train give the loaded `base`, change the trainer by `adapt`, say what else
    determines the result (`identity`), and what else the manifest says (`facts`)."""
    seed_everything(settings.seed)
    if model != EMBEDDED and Path(model).is_dir():
        model = str(Path(model).resolve())  # it is stored, and read from any folder
    if out is not None:
        require_free(out, model, settings=settings)
    processes = join()
    with processes.local_main_process_first():
        locate(model)  # the first process creates the embedded model's files
    tokenizer = load_tokenizer(model, template=settings.template)
    with work_directory(out, processes) as work:
        loaded = base or base_for(settings.mode, model)
        own = getattr(getattr(loaded, "hf_quantizer", None), "pre_quantized", False)
        require(not own, f"{model} is quantised already: name the one that it was made from")
        trainer = make_trainer(loaded, tokenizer, records, settings, work=work,
                               say_every=say_every, held=held)
        adapt(trainer)
        files = [(f.name, f.stat().st_mtime_ns) for f in sorted(Path(model).glob("*.safetensors"))]
        every = [dataclasses.asdict(settings), model, files, processes.num_processes, bool(held),
                 *identity, *map(sha256, sorted(work.rglob(f"tokens-{RANK}.arrow")))]
        trainer.run = hashlib.sha256(json.dumps(every).encode()).hexdigest()
        result = run_trainer(trainer, settings, resume=last_checkpoint(work, trainer.run))
        # FSDP leaves each process a part of the weights: all must take part in joining them.
        whole = trainer.accelerator.get_state_dict(trainer.model) if is_sharded() else None
        if out is None or not is_main_process():
            return result
        source = getattr(records, "source", "")  # found from any folder, as the base is
        with writing(out, **facts() | {"base": model}, settings=dataclasses.asdict(settings),
                     machine=machine(), processes=process_count(), seconds=round(result.seconds, 1),
                     data=os.path.abspath(source) if os.path.isfile(source) else source) as part:
            if settings.mode == "full":
                result.model.save_pretrained(part, state_dict=whole)
            else:
                # The vocabulary has its old size, so peft need not look for the base's files.
                result.model.save_pretrained(part, state_dict=whole, save_embedding_layers=False)
                make_portable(part, model)
                (part / "README.md").unlink(missing_ok=True)
            tokenizer.save_pretrained(part)  # with the template that it was trained in
            write_json(part / "losses.json", list(result.losses))
            if result.validation:
                write_json(part / "validation.json", result.validation)
            draw_losses(result, part / "losses.png")
            if (work / "runs").is_dir():  # of tensorboard
                shutil.copytree(work / "runs", part / "runs")
    return result


def draw_losses(result: TrainResult, file: Path) -> None:
    """The curve of a run's losses."""
    from matplotlib.figure import Figure  # which needs no window; here, because it takes a second
    axes = (figure := Figure(figsize=(7, 3.6), layout="constrained")).subplots()
    axes.plot(range(1, len(result.losses) + 1), result.losses, label="training")
    if result.validation:
        axes.plot(*zip(*result.validation.items(), strict=True), "o-", label="held-out")
    axes.set(xlabel="step", ylabel="loss, nats a token", yscale="log")
    axes.legend()
    figure.savefig(file)


@contextlib.contextmanager
def work_directory(out: Path | None, processes: PartialState) -> Iterator[Path]:
    """The folder for checkpoints: beside `out`, of one run, kept if the block is interrupted."""
    if out is None:
        with scratch() as work:
            yield work
        return
    work, done = out.with_name(f".{out.name}.work"), False
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / f"lock-{RANK}", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run trains into {out}: wait, or choose another --out") from None
    except OSError:  # of a file system without locks
        pass
    try:
        yield work
        processes.wait_for_everyone()
        done = True
    finally:
        if is_main_process() and (done or not any(work.glob("checkpoint-*"))):
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def last_checkpoint(work: Path, run: str) -> Path | None:
    """The newest checkpoint of the same run, verified; None without one."""
    steps = [int(folder.name.removeprefix("checkpoint-")) for folder in work.glob("checkpoint-*")
             if verified(folder).get("run") == run]
    if is_main_process() and (steps or any(work.glob("checkpoint-*"))):
        print(f"resuming from step {max(steps)}" if steps else "starting again: the checkpoint is "
              "of a run with other settings, records, model or date", file=sys.stderr)
    return work / f"checkpoint-{max(steps)}" if steps else None


def run_trainer(trainer: SFTTrainer, settings: TrainSettings,
                resume: Path | None = None) -> TrainResult:
    """Run a trainer and measure it. UserError if it did not learn."""
    trainer.model.train()
    trainable, parameters = count_trainable(trainer.model)
    # The fused step reads A and B without FSDP's hooks, which would gather them.
    stock = settings.plain or is_sharded()
    hold_memory(LARGEST_HELD)
    try:
        with contextlib.nullcontext() if stock else fused(trainer.model), peak_memory() as peak:
            done = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        hold_memory()
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    if not all(map(math.isfinite, losses)):
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)  # nothing to resume from
    for step, loss in enumerate(losses, 1):
        require(math.isfinite(loss), f"the loss became {loss} at step {step}: lower the learning "
                "rate" + ", or replace the model, whose weights may be damaged" * (step == 1))
    # A plain adapter's B starts at zero.
    norms = [p.norm().item() for n, p in trainer.model.named_parameters() if "lora_B" in n]
    require(is_sharded() or not norms or max(norms) > 0, "the adapter did not move: take more "
            "steps, or change the learning rate or the warm-up")
    states = trainer.optimizer.state.values() if trainer.optimizer else ()
    moments = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    held = {r["step"]: r["validation"] for r in trainer.state.log_history if "validation" in r}
    return TrainResult(trainer.model.eval(), losses, done.metrics["train_runtime"], peak["mb"],
                       trainable, parameters, sum(t.nbytes for t in moments) / 1e6, held)


def join() -> PartialState:
    """Meet the other processes, and compute in the `best_dtype` of the first one."""
    state = PartialState(cpu=not torch.cuda.is_available())
    require(state.num_processes == process_count(), f"WORLD_SIZE is {process_count()}, but "
            f"{state.num_processes} came together: start them with `accelerate launch`")
    if state.num_processes > 1:
        wide = broadcast(torch.tensor(int(best_dtype() == torch.float32), device=state.device))
        os.environ["COURSE_DTYPE"] = "float32" if wide else "bfloat16"
        best_dtype.cache_clear()
    return state

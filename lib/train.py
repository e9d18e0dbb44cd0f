"""Training: full fine-tuning, LoRA and QLoRA through TRL's SFTTrainer.

The trainer is the stock one but for its step and its checkpoints (see
`lib.trainer`). A killed run resumes when it is started again.
"""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from lib.artifacts import require_free, write_json, writing
from lib.base_model import best_dtype, hold_memory, load_model, load_tokenizer, machine, quiet
from lib.embedded import locate, place
from lib.errors import require
from lib.fused import fused
from lib.lora import count_trainable, lora_config, make_portable
from lib.measure import peak_memory
from lib.processes import count, first, join, sharded
from lib.profiles import TrainSettings, seed_everything
from lib.records import Record, check_record
from lib.tasks import IGNORED, chat
from lib.trainer import CourseTrainer, Progress, last_checkpoint, work_directory

CHECKPOINT_EVERY = 50
# Bytes. Batches differ in length, so blocks that are larger seldom fit where one was: kept,
# they made a step of 16 examples 6 % quicker in a trial, and took a third more memory.
LARGEST_HELD = 32 << 20


@dataclass(frozen=True)
class TrainResult:
    """What a run gave, beside the files it wrote."""

    model: PreTrainedModel | PeftModel
    losses: tuple[float, ...]
    seconds: float
    peak_mb: float
    trainable: int
    parameters: int
    optimizer_mb: float


def quantized_config() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computing in the machine's best dtype.

    FSDP cuts up floating-point tensors of one dtype only, so there the codes
    are stored as if they were numbers of that dtype (the bytes are the same).
    """
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=best_dtype(),
        bnb_4bit_quant_storage=best_dtype() if sharded() else torch.uint8)


def base_for(mode: str, name: str) -> PreTrainedModel:
    """The base model as `mode` wants it: NF4, or full precision.

    Full fine-tuning keeps float32 weights, because an Adam step is often
    smaller than bfloat16 can add to a weight.
    """
    if mode == "qlora":
        return load_model(name, quantization_config=quantized_config())
    return load_model(name, dtype=torch.float32 if mode == "full" else None)


def to_dataset(records: Sequence[Record]) -> Dataset:
    """Prompt and completion as chat messages: TRL then trains on the answer only."""
    return Dataset.from_list([
        {"prompt": chat(r["instruction"]),
         "completion": chat(r["instruction"], r["response"])[1:]} for r in records])


def make_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[Record],
    settings: TrainSettings,
    *,
    work: Path,
    say_every: int = 0,
) -> SFTTrainer:
    """The trainer for a plain model; it adds the adapter itself."""
    adapter = None if settings.mode == "full" else lora_config(model, settings)
    on_gpu = torch.cuda.is_available()
    mixed = settings.mode == "full" and best_dtype() == torch.bfloat16
    args = SFTConfig(
        output_dir=str(work), max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        # Rounded down: the first warm-up step has rate zero, a lost step of a few.
        warmup_steps=int(settings.warmup * settings.steps), weight_decay=0.0, logging_steps=1,
        # The first steps have large gradients; over a short run Adam must
        # forget them (beta2), and they must not throw the weights far (norm).
        adam_beta2=0.95, max_grad_norm=0.5,
        # peft's guide: paged_adamw_8bit cannot be saved under FSDP.
        optim="paged_adamw_8bit" if on_gpu and not sharded() else "adamw_torch_fused",
        max_length=settings.max_length, packing=False, completion_only_loss=True,
        # Not grouped by length: the sampler then goes from long examples to
        # short ones, and here length tells the machine. The model follows.
        train_sampling_strategy="random",
        use_cpu=not on_gpu, bf16=mixed, gradient_checkpointing=on_gpu,
        # The reentrant kind is the one that peft's guide to FSDP with QLoRA uses.
        gradient_checkpointing_kwargs={"use_reentrant": True} if sharded() else None,
        ddp_find_unused_parameters=False,
        # Our checkpoints hold whole tensors, which no process has under FSDP.
        save_strategy="no" if sharded() else "steps", save_steps=CHECKPOINT_EVERY,
        report_to="none", logging_nan_inf_filter=False, seed=settings.seed, disable_tqdm=True,
        dataloader_pin_memory=on_gpu)
    trainer = (SFTTrainer if settings.plain else CourseTrainer)(
        model=model, args=args, train_dataset=to_dataset(records),
        processing_class=tokenizer, peft_config=adapter)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL turns a QLoRA adapter to bf16, where small Adam steps vanish.
            parameter.data = parameter.data.float()
    for callback in trainer.callback_handler.callbacks[:]:
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    if say_every:
        trainer.add_callback(Progress(say_every))
    _check_labels(trainer, tokenizer.eos_token_id)
    return trainer


def _check_labels(trainer: SFTTrainer, end: int) -> None:
    """The end token is learned and the prompt is not."""
    rows = trainer.train_dataset["labels"]
    whole = sum(end in labels for labels in rows)
    require(whole, "no answer ends: raise --max-length, or let the template end it")
    require(whole == len(rows), f"{len(rows) - whole} of {len(rows)} answers are cut off: "
            "raise --max-length or shorten them")
    require(rows[0][0] == IGNORED, "the loss covers the prompt: give prompt and completion")


def train(
    records: Sequence[Record],
    settings: TrainSettings,
    *,
    model: str = "embedded",
    out: Path | None = None,
    say_every: int = 0,
) -> TrainResult:
    """Train on instruction-response records; save to `out` if given.

    A run that was killed resumes from its last checkpoint when it is started
    again with the same settings and data. With `out`, an adapter is saved
    alone (`full` saves the model), with `losses.json` beside it.

    Raises:
        UserError: bad settings, records or model; see `lib.errors`.
    """
    quiet()
    seed_everything(settings.seed)
    require(records, "no records to train on: give at least one")
    for number, record in enumerate(records, 1):
        check_record(record, f"record {number}")
    if out is not None:
        require_free(Path(out), place(model))
    processes = join()
    with processes.local_main_process_first():
        locate(model)  # one makes the embedded model's files, the others find them
    tokenizer = load_tokenizer(model)
    base = base_for(settings.mode, model)
    if settings.mode != "full":
        lora_config(base, settings)  # a mistake shows before anything is written
    identity = {"settings": dataclasses.asdict(settings), "model": model,
                "records": [[r["instruction"], r["response"]] for r in records]}
    with work_directory(out, identity, processes) as work:
        trainer = make_trainer(base, tokenizer, records, settings, work=work, say_every=say_every)
        result = run_trainer(trainer, settings, resume=last_checkpoint(work))
        whole = trainer.accelerator.get_state_dict(trainer.model) if sharded() else None
        if out is not None and first():
            save_result(result, out, settings, model, whole=whole)
    return result


def run_trainer(trainer: SFTTrainer, settings: TrainSettings,
                resume: Path | None = None) -> TrainResult:
    """Run a prepared trainer and measure it."""
    trainer.model.train()
    trainable, parameters = count_trainable(trainer.model)
    # The fused step reads A and B past FSDP's hooks, which would not have joined them.
    stock = settings.plain or sharded()
    step = contextlib.nullcontext() if stock else fused(trainer.model)
    start = time.monotonic()
    hold_memory(LARGEST_HELD)
    try:
        with step, peak_memory() as peak:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        hold_memory()
    seconds = time.monotonic() - start
    losses = tuple(e["loss"] for e in trainer.state.log_history if "loss" in e)
    if not all(math.isfinite(x) for x in losses):
        for checkpoint in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)  # nothing to go on from
    require(math.isfinite(next(iter(losses), 0.0)), "the loss is no number from the start: "
            "the model's weights are damaged, take it anew")
    require(all(math.isfinite(x) for x in losses),
            f"the loss became {losses[-1]}: lower the learning rate")
    state = trainer.optimizer.state.values() if trainer.optimizer else ()
    moved = sum(t.numel() * t.element_size() for s in state for t in s.values()
                if isinstance(t, torch.Tensor))
    _check_trained(trainer.model)
    return TrainResult(trainer.model.eval(), losses, seconds, peak["mb"],
                       trainable, parameters, moved / 1e6)


def _check_trained(model: torch.nn.Module) -> None:
    """B starts at zero; if it still is, the adapter silently did not train."""
    norms = [p.norm().item() for n, p in model.named_parameters() if "lora_B" in n]
    require(not norms or max(norms) > 0, "the adapter did not move: raise the learning rate")


def save_result(result: TrainResult, out: Path, settings: TrainSettings, model: str, *,
                whole: dict[str, torch.Tensor] | None = None) -> None:
    """Adapter (or full model) and its loss history, whole or not at all.

    `whole` is the state of a model that FSDP has cut up.
    """
    with writing(out, settings=dataclasses.asdict(settings), base=model, processes=count(),
                 machine=machine(), seconds=round(result.seconds, 1)) as part:
        # The vocabulary is never resized: peft need not look for the base's files.
        options = {"save_embedding_layers": False} if settings.mode != "full" else {}
        result.model.save_pretrained(part, state_dict=whole, **options)
        if settings.mode == "full":  # else nothing could load it
            load_tokenizer(model).save_pretrained(part)
        if (part / "adapter_config.json").is_file():
            make_portable(part, model)
            (part / "README.md").unlink(missing_ok=True)
        write_json(part / "losses.json", list(result.losses))

"""Training: what is learned, saved and resumed, and never pickled."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import bitsandbytes as bnb
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from lib.base.model import MODULE_KINDS, best_dtype, load_model, quantized_config
from lib.base.records import IGNORED, Record, encode, sensors
from lib.errors import UserError
from lib.evaluate.scores import held_out_loss
from lib.files import read_json, sha256, verified, write_json
from lib.settings import TrainSettings
from lib.train import training
from lib.train.lora import load_adapter
from lib.train.training import (
    CourseTrainer,
    TrainResult,
    base_for,
    last_checkpoint,
    make_trainer,
    run_trainer,
    train,
)

pytestmark = pytest.mark.usefixtures("float32")

# Twelve short examples of unequal length: three batches an epoch.
RECORDS: list[Record] = [
    {"instruction": "Unit?" + " again" * (i % 5), "response": f"It is {i} {'x' * (i % 4)}."}
    for i in range(12)]
MODES = ("lora", "qlora", "full")
SETTINGS = {
    # With dropout, so that a resumed run needs the random state.
    "lora": TrainSettings(mode="lora", steps=8, batch_size=4, rank=4, learning_rate=2e-2,
                          dropout=0.1),
    "qlora": TrainSettings(mode="qlora", steps=8, batch_size=4, rank=4, learning_rate=2e-2),
    "full": TrainSettings(mode="full", steps=8, batch_size=4, learning_rate=3e-3)}
WEIGHTS = {"lora": "adapter_model.safetensors", "qlora": "adapter_model.safetensors",
           "full": "model.safetensors"}
Run = tuple[TrainResult, Path]


@pytest.fixture(scope="module")
def undisturbed(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory,
                float32: None) -> Callable[[str], Run]:
    """The result of a mode's whole run, computed once for all tests."""
    runs: dict[str, Run] = {}

    def get(mode: str) -> Run:
        if mode not in runs:
            out = tmp_path_factory.mktemp("runs") / mode
            place = os.path.relpath(tiny_directory)  # as typed; what is stored is absolute
            runs[mode] = train(RECORDS, SETTINGS[mode], model=place, out=out), out
        return runs[mode]

    return get


@pytest.fixture(autouse=True)
def _checkpoint_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)


def files(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("*") if p.is_file()]


def no_pickle(directory: Path) -> bool:
    """No file is a pickle or a zip of pickles."""
    return not any(re.match(rb"PK|\x80[\x02-\x05]", p.read_bytes()[:2]) for p in files(directory))


def interrupt(monkeypatch: pytest.MonkeyPatch, out: Path, mode: str, model: str,
              step: int = 2) -> Path:
    """Start a run, press Ctrl-C after the checkpoint of a step; its work folder."""
    save = CourseTrainer._save_checkpoint

    def stop(self: CourseTrainer, model: Any, trial: Any) -> None:
        save(self, model, trial)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CourseTrainer, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RECORDS, SETTINGS[mode], model=model, out=out)
    assert not out.exists()
    return out.with_name(f".{out.name}.work")


def ordered_trainer(model: Any, tokenizer: Any, settings: TrainSettings, work: Path) -> Any:
    """A trainer that sees the records in their order."""
    trainer = make_trainer(model, tokenizer, RECORDS, settings, work=work)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.args.save_strategy = "no"
    return trainer


def test_two_runs_do_not_share_a_folder(tiny_directory: str, tmp_path: Path) -> None:
    """They would write one file of tokens, and each would delete the other's checkpoints."""
    out, work = tmp_path / "out", tmp_path / ".out.work"
    work.mkdir()
    with FileLock(work / "lock-0"), pytest.raises(UserError, match="another run trains into .*out"):
        train(RECORDS, SETTINGS["lora"], model=tiny_directory, out=out)
    assert [p.name for p in work.iterdir()] == ["lock-0"]
    short = dataclasses.replace(SETTINGS["lora"], steps=1)
    train(RECORDS[:2], short, model=tiny_directory, out=out)
    assert not work.exists()


@pytest.mark.parametrize("mode", MODES)
def test_loss_falls_and_the_artifact_is_whole(undisturbed: Callable[[str], Run],
                                              mode: str) -> None:
    result, out = undisturbed(mode)
    assert len(result.losses) == 8 and result.losses[-1] < result.losses[0] - 0.5
    assert verified(out)["settings"] == dataclasses.asdict(SETTINGS[mode])
    assert json.loads((out / "losses.json").read_text()) == list(result.losses)
    names = {p.name for p in files(out)}
    if mode == "full":
        assert names == {"config.json", "generation_config.json", "losses.json", "losses.png",
                         "manifest.json", "model.safetensors", "chat_template.jinja",
                         "tokenizer.json", "tokenizer_config.json"}
        assert result.trainable == result.parameters
    else:
        assert names == {"adapter_config.json", "adapter_model.safetensors", "losses.json",
                         "losses.png", "manifest.json", "chat_template.jinja", "tokenizer.json",
                         "tokenizer_config.json"}
        assert result.trainable == sum(t.numel() for t in load_file(out / WEIGHTS[mode]).values())
    assert no_pickle(out)
    assert [p.name for p in out.parent.iterdir()] == [mode]  # the checkpoints are gone
    assert result.seconds > 0 and result.peak_mb > 100
    # Two float32 moments for each trainable parameter, and a few counters.
    assert result.optimizer_mb == pytest.approx(8e-6 * result.trainable, rel=0.02)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_the_adapter_moved_and_the_base_did_not(undisturbed: Callable[[str], Run],
                                                mode: str, tiny_directory: str) -> None:
    result, out = undisturbed(mode)
    assert not result.model.training
    saved = load_file(out / WEIGHTS[mode])
    assert {t.dtype for t in saved.values()} == {torch.float32}
    norms = [t.norm() for n, t in saved.items() if "lora_B" in n]
    assert len(norms) == 14 and min(norms) > 0
    base = base_for(mode, tiny_directory)
    original = {f"base_model.model.{n}": p for n, p in base.named_parameters()}
    trained = {n.replace("base_layer.", ""): p for n, p in result.model.named_parameters()
               if "lora_" not in n}
    assert trained.keys() == original.keys()
    for name, parameter in trained.items():
        assert torch.equal(parameter, original[name]), name
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        loaded = load_adapter(base, out)(input_ids=ids).logits
        ours = result.model(input_ids=ids).logits
    torch.testing.assert_close(ours, loaded, rtol=1e-5, atol=1e-5)
    assert (loaded - untrained).abs().max() > 0.1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(tiny_directory).resolve())
    assert verified(out)["base"] == config["base_model_name_or_path"]
    assert config["target_modules"] == sorted(MODULE_KINDS)  # peft keeps a set, in no order


def test_saved_full_model_reloads(undisturbed: Callable[[str], Run], tiny_directory: str) -> None:
    result, out = undisturbed("full")
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        again = load_model(str(out), dtype=torch.float32)
        assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)
    ours, base = (AutoTokenizer.from_pretrained(p) for p in (out, tiny_directory))
    assert ours.get_vocab() == base.get_vocab()


def test_same_seed_same_file_other_seed_other_file(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path
) -> None:
    hashes = [sha256(undisturbed("qlora")[1] / WEIGHTS["qlora"])]
    for seed in (0, 1):
        torch.manual_seed(99)  # what happened before must not matter
        train(RECORDS, dataclasses.replace(SETTINGS["qlora"], seed=seed), model=tiny_directory,
              out=tmp_path / str(seed))
        hashes.append(sha256(tmp_path / str(seed) / WEIGHTS["qlora"]))
    assert hashes[0] == hashes[1] != hashes[2]


# Interrupted runs


@pytest.mark.parametrize(("mode", "step"), [("lora", 2), ("qlora", 4), ("full", 2), ("qlora", 6)])
def test_resumed_equals_undisturbed(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str, step: int
) -> None:
    """Stopped inside the first epoch, inside the second, and between two."""
    result, whole = undisturbed(mode)
    out = tmp_path / "out"
    work = interrupt(monkeypatch, out, mode, tiny_directory, step)
    assert [p.name for p in work.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert no_pickle(work)
    # A kill in the middle of the next checkpoint leaves such a folder.
    (work / f".checkpoint-{step + 2}.abc.part").mkdir()
    capsys.readouterr()
    again = train(RECORDS, SETTINGS[mode], model=tiny_directory, out=out)
    assert f"resuming from step {step}" in capsys.readouterr().err
    assert again.losses == result.losses
    assert sha256(out / WEIGHTS[mode]) == sha256(whole / WEIGHTS[mode])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("where", "error"), [
    ("lib.train.training.answer_loss", KeyboardInterrupt()),  # before the first checkpoint
    ("lib.train.training.save_file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ("peft.peft_model.safe_save_file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))])
def test_the_run_after_a_failure(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(error)):
            train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=out)
    # Checkpoints stay if only the saving of the result failed.
    assert [p.name for p in tmp_path.iterdir()] == [".out.work"] * ("peft" in where)
    train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=out)
    assert sha256(out / WEIGHTS["qlora"]) == sha256(undisturbed("qlora")[1] / WEIGHTS["qlora"])


def test_only_the_same_run_resumes(tiny_directory: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        """Raised where a run starts; names the checkpoint."""

    def start(trainer: Any, settings: TrainSettings, resume: Path | None = None) -> None:
        raise Started(resume.name if resume else "afresh")

    work = interrupt(monkeypatch, tmp_path / "out", "qlora", tiny_directory)
    monkeypatch.setattr(training, "run_trainer", start)
    same = SETTINGS["qlora"]
    for records, settings, expected in [
            (RECORDS, same, "checkpoint-2"),
            (RECORDS, dataclasses.replace(same, learning_rate=1e-2), "afresh"),
            (RECORDS, dataclasses.replace(same, seed=5), "afresh"),
            (RECORDS[::-1], same, "afresh"),
            ([*RECORDS[:-1], RECORDS[-1] | {"response": "No."}], same, "afresh"),
            # The same texts in the same order, but questions and answers swapped.
            ([{"response": r["instruction"], "instruction": r["response"]} for r in RECORDS],
             same, "afresh")]:
        with pytest.raises(Started, match=expected):
            train(records, settings, model=tiny_directory, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        two = SimpleNamespace(num_processes=2, local_main_process_first=contextlib.nullcontext)
        patch.setattr(training, "join", lambda: two)
        with pytest.raises(Started, match="afresh"):
            train(RECORDS, same, model=tiny_directory, out=tmp_path / "out")
    state = work / "checkpoint-2" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(UserError, match=r"state.safetensors is missing or damaged"):
        train(RECORDS, same, model=tiny_directory, out=tmp_path / "out")


def test_checkpoints_of_8_bit_adam(tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                                   tmp_path: Path) -> None:
    """The optimizer of a GPU counts in an int and shares its code table among weights."""
    trainer = make_trainer(tiny, tokenizer, RECORDS, SETTINGS["lora"], work=tmp_path)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = bnb.optim.AdamW8bit(weights, lr=0.1, min_8bit_size=256)
    trainer.create_scheduler(num_training_steps=4)

    def step() -> list[Tensor]:
        for weight in weights:
            weight.grad = weight.data.sin() + 1
        trainer.optimizer.step()
        return [weight.detach().clone() for weight in weights]

    step()
    trainer._save_checkpoint(None, None)
    after = step()
    dtypes = {t.dtype for t in trainer.optimizer.state[weights[0]].values()
              if isinstance(t, Tensor)}
    assert dtypes == {torch.uint8, torch.float32}
    trainer.optimizer.state.clear()
    trainer._load_optimizer_and_scheduler(str(last_checkpoint(tmp_path, "")))
    assert trainer.optimizer.state[weights[0]]["step"] == 1
    assert all(map(torch.equal, step(), after))


# The step


def test_labels_and_batches(tiny_directory: str, tmp_path: Path,
                            tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL tokenises as `encode`, which scores the model; batches are not sorted by length."""
    records = sensors("train", 320)
    trainer = make_trainer(load_model(tiny_directory), tokenizer, records,
                           TrainSettings(steps=20, batch_size=16), work=tmp_path)
    for row, record in zip(trainer.train_dataset, records, strict=True):
        ids, labels = encode(tokenizer, record)
        assert row["input_ids"] == ids and row["labels"] == labels
        assert labels[-1] == tokenizer.eos_token_id and labels[0] == IGNORED
    batches = list(trainer.get_train_dataloader())
    ids, labels = batches[0]["input_ids"], batches[0]["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [1] * 16
    # Padding is never a label, and on the right.
    assert (labels[ids == tokenizer.pad_token_id] == IGNORED).all()
    assert (ids[:, 0] != tokenizer.pad_token_id).all()
    # In these records the length reveals the machine: sorted batches made a model forget half.
    lengths = torch.stack([b["attention_mask"].sum(1).float().mean() for b in batches])
    correlation = torch.corrcoef(torch.stack([lengths, torch.arange(20.0)]))[0, 1].item()
    assert len(lengths) == 20 and abs(correlation) < 0.5


def test_a_record_that_is_cut_off_is_refused(tiny: PreTrainedModel, tmp_path: Path,
                                             tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that never sees an end does not stop."""
    records = [*RECORDS, {"instruction": "Tell all.", "response": "word " * 200}]
    settings = dataclasses.replace(SETTINGS["lora"], max_length=60)
    with pytest.raises(UserError, match="record 13 has 2.. tokens and would be cut off: raise"):
        make_trainer(tiny, tokenizer, records, settings, work=tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_our_step_has_the_losses_of_the_plain_one(
    mode: str, tiny_directory: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    losses = []
    for plain in (True, False):
        torch.manual_seed(0)
        settings = dataclasses.replace(SETTINGS[mode], steps=5, dropout=0.0, plain=plain)
        trainer = ordered_trainer(base_for(mode, tiny_directory), tokenizer, settings, tmp_path)
        assert isinstance(trainer, CourseTrainer) is not plain
        losses.append(run_trainer(trainer, settings).losses)
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0][-1] < 0.95 * losses[0][0]  # they moved, so equal losses mean something


def test_parts_of_a_batch_add_up_to_the_batch(tiny_directory: str) -> None:
    """Accumulation weighs every token alike, whichever part it is in."""
    whole = dataclasses.replace(SETTINGS["lora"], dropout=0.0)
    parts = dataclasses.replace(whole, accumulate=2)
    first, second = (train(RECORDS, s, model=tiny_directory) for s in (whole, parts))
    assert first.losses == pytest.approx(second.losses, rel=1e-3)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute in bfloat16, as most machines do."""
    monkeypatch.setenv("COURSE_DTYPE", "bfloat16")
    best_dtype.cache_clear()
    yield
    best_dtype.cache_clear()


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_is_float32(mode: str, tiny_directory: str, tmp_path: Path,
                                    tokenizer: PreTrainedTokenizerBase) -> None:
    """In bfloat16 a small step of Adam would be rounded to nothing."""
    settings = dataclasses.replace(SETTINGS[mode], batch_size=1, steps=1, warmup=0.0)
    trainer = ordered_trainer(base_for(mode, tiny_directory), tokenizer, settings, tmp_path)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert {p.dtype for p in trained} == {torch.float32}
    assert mode != "lora" or frozen == {torch.bfloat16}
    if mode != "qlora":
        return  # a bfloat16 step takes a minute where the processor lacks such products
    before = [p.detach().clone() for p in trained]
    run_trainer(trainer, settings)
    moments = trainer.optimizer.state[trained[0]]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
    assert not all(map(torch.equal, before, trained))


def test_the_modes_of_a_run(tiny_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode the 4-bit kernel has no gradient. Large blocks are given back during
    the run alone, even if it fails: holding them took a third more memory."""
    modes: list[bool] = []
    held: list[int | None] = []

    def watch(model: Any, *_: Any) -> None:
        modes.append(model.training)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "answer_loss", watch)
    monkeypatch.setattr(training, "hold_memory", lambda largest=None: held.append(largest))
    with pytest.raises(KeyboardInterrupt):
        train(RECORDS, SETTINGS["qlora"], model=tiny_directory)
    assert modes == [True] and held == [training.LARGEST_HELD, None]


def test_validation_leaves_the_base_in_training_mode(tiny_directory: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs bitsandbytes packs its layers in evaluation, and they lose their gradient."""
    modes: list[tuple[set[bool], set[bool]]] = []
    real = training.batch_losses

    def watch(model: Any, *inputs: Any) -> Any:
        layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        modes.append(({m.training for m in layers}, {m.training for m in dropouts}))
        return real(model, *inputs)

    monkeypatch.setattr(training, "batch_losses", watch)
    settings = dataclasses.replace(SETTINGS["qlora"], steps=1, targets="q_proj", dropout=0.1)
    train(RECORDS, settings, model=tiny_directory, held=HELD)
    assert modes == [({True}, {False})]


@pytest.mark.parametrize("first", [0, 1])
def test_a_loss_that_is_not_a_number(tiny_directory: str, tmp_path: Path, first: int,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = training.answer_loss, itertools.count()

    def bad(*inputs: Any) -> tuple[Tensor, int]:
        total, tokens = real(*inputs)
        return total * (float("nan") if next(steps) >= first else 1), tokens

    monkeypatch.setattr(training, "answer_loss", bad)
    settings = dataclasses.replace(SETTINGS["lora"], steps=2)
    with pytest.raises(UserError, match=f"nan at step {first + 1}: lower the learning") as caught:
        train(RECORDS, settings, model=tiny_directory, out=tmp_path / "out")
    assert ("replace the model" in str(caught.value)) == (first == 0)
    assert not list(tmp_path.iterdir())  # a checkpoint would resume the failure


def test_an_adapter_that_did_not_move(tiny_directory: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    settings = dataclasses.replace(SETTINGS["lora"], steps=1)
    with pytest.raises(UserError, match="did not move"):
        train(RECORDS, settings, model=tiny_directory)


@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_base_is_refused(mode: str, tiny_directory: str, tmp_path: Path,
                                     tokenizer: PreTrainedTokenizerBase) -> None:
    """It would train, and no converter takes it: the adapter could not be exported."""
    load_model(tiny_directory, quantization_config=quantized_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is quantised already: name the one that it was made"):
        train(RECORDS, SETTINGS[mode], model=str(tmp_path))


def test_of_plain_text_no_last_turn_is_learned(tiny_directory: str) -> None:
    settings = dataclasses.replace(SETTINGS["lora"], learn="last")
    with pytest.raises(UserError, match="record 1 is plain text, of which all is learned"):
        train([{"text": "a b c"}], settings, model=tiny_directory)


def test_no_records() -> None:
    with pytest.raises(UserError, match="at least one"):
        train([], SETTINGS["lora"])


def test_a_short_run_trains_and_leaves_nothing(tiny_directory: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate rises from zero, but the only step must not be lost."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(SETTINGS["lora"], steps=1)
    assert len(train(RECORDS, settings, model=tiny_directory).losses) == 1
    assert list(tmp_path.iterdir()) == []


def test_models_that_take_no_count_of_tokens(tiny_directory: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gemma 3n and 4 the trainer would pass none to our loss."""
    wanted = train(RECORDS, SETTINGS["lora"], model=tiny_directory).losses
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    assert train(RECORDS, SETTINGS["lora"], model=tiny_directory).losses == wanted


@pytest.mark.parametrize(("every", "silence", "expected"), [
    (2, 45.0, [2, 3]), (3, 0.0, [1, 2, 3]), (0, 0.0, [])])
def test_progress(tiny_directory: str, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch, every: int, silence: float,
                  expected: list[int]) -> None:
    """A plain line every few steps, and more often if they are slow."""
    monkeypatch.setattr(training, "SILENCE", silence)
    train(RECORDS, dataclasses.replace(SETTINGS["lora"], steps=3), model=tiny_directory,
          say_every=every)
    said = capsys.readouterr().out.splitlines()
    lines = [re.fullmatch(r"step +(\d)/3  loss \d+\.\d+  about \d+ s left", line)
             for line in said[4 * bool(every):]]
    assert not every or said[0] == f"{len(RECORDS)} records to learn, " + (
        f"{3 / math.ceil(len(RECORDS) / SETTINGS['lora'].batch_size):.2g} passes over them")
    assert not every or said[2:4] == ["  prompt  '### Instruction:\\nUnit?\\n\\n### Response:\\n'",
                                      "  learned 'It is 0 .<|im_end|>'"]
    assert [line and int(line[1]) for line in lines] == expected


# Validation


def validated(**options: Any) -> TrainSettings:
    return dataclasses.replace(
        SETTINGS["lora"], **{"eval_every": 2, "learning_rate": 5e-2} | options)


class Listener(TrainerCallback):
    """Notes what a tracker would get."""

    def __init__(self, logged: list[dict[str, float]]) -> None:
        self.logged = logged

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        self.logged.append(logs)


HELD: list[Record] = [
    {"instruction": "Unit? again", "response": f"It is {i} xx."} for i in range(3)]


def test_the_best_weights_are_kept(tiny_directory: str, tmp_path: Path,
                                   tokenizer: PreTrainedTokenizerBase) -> None:
    logged: list[dict[str, float]] = []

    def adapt(trainer: CourseTrainer) -> None:
        (Path(trainer.args.output_dir) / "runs" / "one").mkdir(parents=True)  # as tensorboard does
        trainer.add_callback(Listener(logged))

    result = train(RECORDS, validated(), model=tiny_directory, out=tmp_path / "out", held=HELD,
                   adapt=adapt)
    assert (tmp_path / "out" / "runs" / "one").is_dir()
    assert [row["validation"] for row in logged if "validation" in row] == [
        *result.validation.values()]
    assert sum("loss" in row for row in logged) == len(result.losses) == 8
    assert [*result.validation] == [2, 4, 6, 8]
    best = min(result.validation.values())
    model = load_adapter(load_model(tiny_directory), tmp_path / "out")
    assert held_out_loss(model, tokenizer, HELD) == pytest.approx(best, rel=1e-4)
    stored = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert [*stored.values()] == [*result.validation.values()]


def test_a_share_is_held_out_and_a_run_without_gain_stops(tiny_directory: str) -> None:
    settings = validated(eval_share=0.25, eval_every=1, patience=2, learning_rate=0.9, steps=30)
    losses = [*train(RECORDS, settings, model=tiny_directory).validation.values()]
    assert len(losses) < 30 and losses.index(min(losses)) == len(losses) - 3


def test_a_resumed_run_has_the_same_validation(tiny_directory: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for stopped in (False, True):
        out = tmp_path / f"{stopped}"
        with monkeypatch.context() as patch:
            if stopped:
                save = CourseTrainer._save_checkpoint

                def stop(self: CourseTrainer, *args: Any, save: Any = save) -> None:
                    save(self, *args)
                    raise KeyboardInterrupt

                patch.setattr(CourseTrainer, "_save_checkpoint", stop)
                with pytest.raises(KeyboardInterrupt):
                    train(RECORDS, validated(), model=tiny_directory, out=out, held=HELD)
        runs.append(train(RECORDS, validated(), model=tiny_directory, out=out, held=HELD))
    assert runs[0].validation == runs[1].validation and runs[0].losses == runs[1].losses


def test_a_run_stopped_at_its_end_takes_no_further_step(
        tiny_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed from its last step in mid-epoch, transformers' loop would take one more."""
    settings = dataclasses.replace(SETTINGS["lora"], steps=2, batch_size=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "draw_losses", Mock(side_effect=KeyboardInterrupt))
        train(RECORDS, settings, model=tiny_directory, out=tmp_path / "out")
    result = train(RECORDS, settings, model=tiny_directory, out=tmp_path / "out")
    assert len(result.losses) == 2


def test_a_model_with_values_for_sampling_is_saved(tiny_directory: str, tmp_path: Path) -> None:
    """Many have them without `do_sample`, and transformers does not save such a configuration."""
    model = shutil.copytree(tiny_directory, tmp_path / "model")
    write_json(model / "generation_config.json", {"temperature": 0.6, "top_p": 0.9})
    train(RECORDS, TrainSettings(mode="full", steps=1, batch_size=2), model=str(model),
          out=tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["temperature"] == 0.6


@pytest.mark.parametrize(("options", "held", "message"), [
    ({"patience": 2}, None, "nothing to validate with"),
    ({"eval_share": 0.5}, HELD, "two validation sets: omit"),
    ({"eval_share": 0.05}, None, "12 records have no share of 0.05")])
def test_validation_that_makes_no_sense(tiny_directory: str, options: dict[str, Any], message: str,
                                        held: list[Record] | None) -> None:
    with pytest.raises(UserError, match=message):
        train(RECORDS, validated(**options), model=tiny_directory, held=held)

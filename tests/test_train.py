"""lib.train and lib.trainer: what is learned, saved, resumed, and never pickled."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import lib.train
import lib.trainer
from lib.artifacts import sha256, verified
from lib.base_model import best_dtype, load_model
from lib.errors import UserError
from lib.lora import lora_config
from lib.profiles import TrainSettings
from lib.tasks import IGNORED, Record, encode, sensors
from lib.train import TrainResult, base_for, make_trainer, run_trainer, train
from lib.trainer import CourseTrainer

pytestmark = pytest.mark.usefixtures("float32", "cheap_tokenizer")

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
    "full": TrainSettings(mode="full", steps=8, batch_size=4, learning_rate=3e-3),
}
WEIGHTS = {"lora": "adapter_model.safetensors", "qlora": "adapter_model.safetensors",
           "full": "model.safetensors"}
Run = tuple[TrainResult, Path]


@pytest.fixture(scope="module")
def undisturbed(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory,
                float32: None, cheap_tokenizer: None) -> Callable[[str], Run]:
    """The result of a mode's whole run, made once for all tests."""
    made: dict[str, Run] = {}

    def get(mode: str) -> Run:
        if mode not in made:
            out = tmp_path_factory.mktemp("runs") / mode
            made[mode] = train(RECORDS, SETTINGS[mode], model=tiny_directory, out=out), out
        return made[mode]

    return get


@pytest.fixture(autouse=True)
def _checkpoint_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.train, "CHECKPOINT_EVERY", 2)


def files(directory: Path) -> list[Path]:
    """Every file below a directory."""
    return [p for p in directory.rglob("*") if p.is_file()]


def no_pickle(directory: Path) -> bool:
    """No file that is a pickle or a zip of pickles, by name or by content."""
    return not any(
        p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        or p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        for p in files(directory))


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C as soon as the checkpoint of `step` is written."""
    real = CourseTrainer._save_checkpoint

    def save(self: CourseTrainer, model: Any, trial: Any) -> None:
        real(self, model, trial)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(CourseTrainer, "_save_checkpoint", save)


def interrupted(monkeypatch: pytest.MonkeyPatch, out: Path, mode: str, model: str,
                step: int = 2) -> Path:
    """Start a run that is stopped after a checkpoint; its work directory."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(RECORDS, SETTINGS[mode], model=model, out=out)
    assert not out.exists()
    return out.with_name(f".{out.name}.work")


def plain_trainer(model: Any, tokenizer: Any, settings: TrainSettings, work: Path) -> Any:
    """A trainer that sees the records in their order."""
    trainer = make_trainer(model, tokenizer, RECORDS, settings, work=work)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.args.save_strategy = "no"
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_loss_falls_and_the_artifact_is_whole(undisturbed: Callable[[str], Run],
                                              mode: str) -> None:
    result, out = undisturbed(mode)
    assert len(result.losses) == 8
    assert result.losses[-1] < result.losses[0] - 0.5
    manifest = verified(out)
    assert manifest["settings"] == dataclasses.asdict(SETTINGS[mode])
    assert json.loads((out / "losses.json").read_text()) == list(result.losses)
    names = {p.name for p in files(out)}
    if mode == "full":
        assert names == {"config.json", "generation_config.json", "losses.json",
                         "manifest.json", "model.safetensors", "chat_template.jinja",
                         "tokenizer.json", "tokenizer_config.json"}
        assert result.trainable == result.parameters
    else:
        assert names == {"adapter_config.json", "adapter_model.safetensors",
                         "losses.json", "manifest.json"}
        assert result.trainable == sum(t.numel() for t in load_file(
            out / "adapter_model.safetensors").values())
    assert no_pickle(out)
    # Nothing beside it: the checkpoints are gone.
    assert [p.name for p in out.parent.iterdir()] == [mode]


def test_measured_figures_are_plausible(undisturbed: Callable[[str], Run]) -> None:
    lora, full = undisturbed("lora")[0], undisturbed("full")[0]
    assert 0 < lora.seconds < 300 and lora.peak_mb > 100
    # Two float32 moments for each trainable parameter, and a few counters.
    for result in (lora, full):
        assert result.optimizer_mb == pytest.approx(8e-6 * result.trainable, rel=0.02)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_the_adapter_moved_and_the_base_did_not(undisturbed: Callable[[str], Run],
                                                mode: str, tiny_directory: str) -> None:
    result, out = undisturbed(mode)
    saved = load_file(out / "adapter_model.safetensors")
    norms = [t.norm() for n, t in saved.items() if "lora_B" in n]
    assert len(norms) == 14 and min(norms) > 0
    fresh = dict(base_for(mode, tiny_directory).named_parameters())
    count = 0
    for name, parameter in result.model.base_model.model.named_parameters():
        if "lora_" not in name:
            original = fresh[name.replace("base_layer.", "")]
            assert torch.equal(parameter, original), name
            count += 1
    assert count == len(fresh)


def test_same_seed_same_file_other_seed_other_file(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path
) -> None:
    _, out = undisturbed("qlora")
    hashes = []
    for seed in (0, 1):
        settings = dataclasses.replace(SETTINGS["qlora"], seed=seed)
        torch.manual_seed(99)  # what happened before must not matter
        train(RECORDS, settings, model=tiny_directory, out=tmp_path / str(seed))
        hashes.append(sha256(tmp_path / str(seed) / "adapter_model.safetensors"))
    assert hashes[0] == sha256(out / "adapter_model.safetensors") != hashes[1]


@pytest.mark.parametrize(("mode", "step"), [
    ("lora", 2), ("lora", 4), ("qlora", 4), ("full", 2), ("qlora", 6)])
def test_resumed_equals_undisturbed(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str, step: int
) -> None:
    """Stopped inside the first epoch, inside the second, and between two."""
    result, whole = undisturbed(mode)
    out = tmp_path / "out"
    work = interrupted(monkeypatch, out, mode, tiny_directory, step)
    assert [p.name for p in work.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert no_pickle(work) and len(files(work)) >= 3
    # What a kill in the middle of the next checkpoint leaves is no obstacle.
    (work / f".checkpoint-{step + 2}.abc").mkdir()
    (work / f".checkpoint-{step + 2}.abc" / "state.safetensors").write_bytes(b"half")
    capsys.readouterr()
    again = train(RECORDS, SETTINGS[mode], model=tiny_directory, out=out)
    assert f"resuming from step {step}" in capsys.readouterr().err
    assert again.losses == result.losses
    assert sha256(out / WEIGHTS[mode]) == sha256(whole / WEIGHTS[mode])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_stopped_before_the_first_checkpoint(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(lib.trainer, "answer_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=out)
    assert not out.exists()
    train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=out)
    _, whole = undisturbed("qlora")
    assert sha256(out / WEIGHTS["qlora"]) == sha256(whole / WEIGHTS["qlora"])


class Began(Exception):
    """Raised instead of training; says from which checkpoint."""


@pytest.fixture
def only_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `train` stop where it would start or resume."""
    def begin(trainer: Any, settings: TrainSettings, resume: Path | None = None) -> None:
        raise Began(resume.name if resume else "afresh")

    monkeypatch.setattr(lib.train, "run_trainer", begin)
    monkeypatch.setattr(lib.train, "base_for", lambda *_: None)
    monkeypatch.setattr(lib.train, "lora_config", lambda *_: None)
    monkeypatch.setattr(lib.train, "make_trainer", lambda *_, **__: None)


@pytest.fixture
def stopped(tiny_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The target of a run that was stopped after step 2."""
    interrupted(monkeypatch, tmp_path / "out", "qlora", tiny_directory)
    return tmp_path / "out"


def test_the_same_resumes_and_anything_else_starts_afresh(
    stopped: Path, only_begin: None, tiny_directory: str
) -> None:
    same = SETTINGS["qlora"]
    kept = stopped.with_name("kept")
    shutil.copytree(stopped.with_name(".out.work"), kept)

    def begins(records: list[Record], settings: TrainSettings) -> str:
        shutil.rmtree(stopped.with_name(".out.work"), ignore_errors=True)
        shutil.copytree(kept, stopped.with_name(".out.work"))
        with pytest.raises(Began) as caught:
            train(records, settings, model=tiny_directory, out=stopped)
        return str(caught.value)

    assert begins(RECORDS, same) == "checkpoint-2"
    other = dataclasses.replace(same, learning_rate=1e-2)
    assert begins(RECORDS, other) == "afresh"
    assert begins(RECORDS, dataclasses.replace(same, seed=5)) == "afresh"
    assert begins(RECORDS[::-1], same) == "afresh"
    changed = [*RECORDS[:-1], RECORDS[-1] | {"response": "No."}]
    assert begins(changed, same) == "afresh"
    # Questions and answers swapped: the same values in the same order.
    swapped = [{"response": r["instruction"], "instruction": r["response"]} for r in RECORDS]
    assert begins(swapped, same) == "afresh"


def test_a_damaged_checkpoint_is_named(stopped: Path, only_begin: None,
                                       tiny_directory: str) -> None:
    state = stopped.with_name(".out.work") / "checkpoint-2" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(UserError, match="state.safetensors is missing or damaged"):
        train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=stopped)


def test_without_out_nothing_is_left(tiny_directory: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(SETTINGS["lora"], steps=2)
    assert len(train(RECORDS, settings, model=tiny_directory).losses) == 2
    assert list(tmp_path.iterdir()) == []


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["lib.trainer.save_file", "peft.peft_model.safe_save_file"])
def test_full_disk_and_the_next_run_works(
    undisturbed: Callable[[str], Run], tiny_directory: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(where, full_disk)
        with pytest.raises(UserError, match="free some space") as caught:
            train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=out)
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {".out.work"}
    assert no_pickle(tmp_path)
    train(RECORDS, SETTINGS["qlora"], model=tiny_directory, out=out)
    _, whole = undisturbed("qlora")
    assert sha256(out / WEIGHTS["qlora"]) == sha256(whole / WEIGHTS["qlora"])


def test_a_loss_that_is_no_number_is_said(tiny_directory: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    real = lib.trainer.answer_loss

    steps = itertools.count()

    def bad(*inputs: Any) -> tuple[Tensor, int]:
        total, tokens = real(*inputs)
        return total * (float("nan") if next(steps) else 1), tokens

    monkeypatch.setattr(lib.trainer, "answer_loss", bad)
    settings = dataclasses.replace(SETTINGS["lora"], steps=2)
    with pytest.raises(UserError, match="the loss became nan: lower the learning rate"):
        train(RECORDS, settings, model=tiny_directory, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())  # nor a checkpoint: there is nothing to go on from


def test_an_adapter_that_did_not_move_is_said(tiny_directory: str) -> None:
    model = get_peft_model(load_model(tiny_directory), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="did not move"):
        lib.train._check_trained(model)


@pytest.mark.parametrize("steps", [1, 0])
def test_only_a_run_gives_large_blocks_back(tiny_directory: str, steps: int,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, they made a third of a run's peak; what follows a run holds all again."""
    held: list[int | None] = []
    monkeypatch.setattr(lib.train, "hold_memory", lambda largest=None: held.append(largest))
    if not steps:
        monkeypatch.setattr(CourseTrainer, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) if not steps else contextlib.nullcontext():
        train(RECORDS, dataclasses.replace(SETTINGS["lora"], steps=1), model=tiny_directory)
    assert held == [lib.train.LARGEST_HELD, None]


def test_no_records() -> None:
    with pytest.raises(UserError, match="at least one"):
        train([], SETTINGS["lora"])


def test_labels_are_encodes(tiny_directory: str, tmp_path: Path,
                            tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL's own tokenising agrees with what scores the model."""
    records = sensors("train", 20)
    trainer = make_trainer(load_model(tiny_directory), tokenizer, records,
                           SETTINGS["lora"], work=tmp_path)
    assert len(trainer.train_dataset) == 20
    for row, record in zip(trainer.train_dataset, records, strict=True):
        ids, labels = encode(tokenizer, record)
        assert row["input_ids"] == ids and row["labels"] == labels
        assert labels[-1] == tokenizer.eos_token_id and labels[0] == IGNORED
    batch = next(iter(trainer.get_train_dataloader()))
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1] * 4
    # Padding is never a label, and on the right.
    assert (batch["labels"][batch["input_ids"] == tokenizer.pad_token_id] == IGNORED).all()
    assert (batch["input_ids"][:, 0] != tokenizer.pad_token_id).all()


LONG = {"instruction": "Tell all.", "response": "word " * 200}


@pytest.mark.parametrize(("records", "length"), [
    (RECORDS, 8),  # not even the prompts fit
    (RECORDS, 18),
    ([LONG, *RECORDS], 60),
    ([*RECORDS, LONG], 60),
], ids=["all", "some", "the first", "the last"])
def test_an_answer_that_is_cut_off_is_said(
    records: list[Record], length: int, tiny_directory: str, tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase
) -> None:
    """An end that is not learned is an answer that never ends."""
    settings = dataclasses.replace(SETTINGS["lora"], max_length=length)
    with pytest.raises(UserError, match="max_length|max-length"):
        make_trainer(load_model(tiny_directory), tokenizer, records, settings, work=tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_our_step_has_the_losses_of_the_plain_one(
    mode: str, tiny_directory: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = dataclasses.replace(SETTINGS[mode], steps=5, dropout=0.0)
    losses = []
    for plain in (True, False):
        torch.manual_seed(0)
        one = dataclasses.replace(settings, plain=plain)
        trainer = plain_trainer(base_for(mode, tiny_directory), tokenizer, one, tmp_path)
        assert isinstance(trainer, CourseTrainer) is not plain
        losses.append(run_trainer(trainer, one).losses)
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0][-1] < 0.95 * losses[0][0]  # they moved, so equal losses mean something


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
    """In bfloat16 a small Adam step would round to nothing."""
    settings = dataclasses.replace(SETTINGS[mode], batch_size=1, steps=1, warmup=0.0)
    trainer = plain_trainer(base_for(mode, tiny_directory), tokenizer, settings, tmp_path)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert trained and {p.dtype for p in trained} == {torch.float32}
    if mode == "lora":
        assert frozen == {torch.bfloat16}
    if mode != "qlora":
        return  # a bfloat16 step takes a minute where the processor has no such products
    before = [p.detach().clone() for p in trained]
    run_trainer(trainer, settings)
    assert {p.dtype for p in trained} == {torch.float32}
    moments = trainer.optimizer.state[trained[0]]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_saved_adapter_in_stock_peft(undisturbed: Callable[[str], Run], mode: str,
                                     tiny_directory: str) -> None:
    result, out = undisturbed(mode)
    saved = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    ids = torch.arange(100, 120)[None]
    stock_model = PeftModel.from_pretrained(base_for(mode, tiny_directory), str(out)).eval()
    with torch.no_grad():
        untrained = base_for(mode, tiny_directory)(input_ids=ids).logits
        stock = stock_model(input_ids=ids).logits
        ours = result.model(input_ids=ids).logits
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert (stock - untrained).abs().max() > 0.1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_directory


def test_saved_full_model_reloads(undisturbed: Callable[[str], Run],
                                  tiny_directory: str) -> None:
    result, out = undisturbed("full")
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        again = load_model(str(out), dtype=torch.float32)
        assert torch.equal(again(input_ids=ids).logits, expected)
    # Its words are its own, without the base's folder: `export --model` and others need them.
    words, base = (AutoTokenizer.from_pretrained(p) for p in (out, tiny_directory))
    assert words.get_vocab() == base.get_vocab()


def test_4bit_backward_is_right(tiny_directory: str) -> None:
    """Pitfall 11: bitsandbytes' own backward against the dequantised weights."""
    quantized, plain = base_for("qlora", tiny_directory), load_model(tiny_directory)
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.weight.quant_state.nested  # double quantisation
        assert layer.weight.quant_state.quant_type == "nf4"
        plain.get_submodule(name).weight.data = dequantize_4bit(
            layer.weight.data, layer.weight.quant_state).float()
    ids = torch.randint(3, 49152, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (quantized, plain):
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora_config(plain, SETTINGS["qlora"])).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters()
                          if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, theirs in gradients[1].items():
        error = (gradients[0][name] - theirs).abs().max()
        assert error <= 1e-4 * theirs.abs().max() and theirs.abs().max() > 0, name


def test_training_is_in_training_mode(tiny_directory: str, tmp_path: Path,
                                      tokenizer: PreTrainedTokenizerBase,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 27: in evaluation mode the 4-bit kernel would have no gradient."""
    modes = []
    real = lib.trainer.answer_loss

    def watch(model: Any, *inputs: Any) -> tuple[Tensor, int]:
        modes.append(model.training)
        return real(model, *inputs)

    monkeypatch.setattr(lib.trainer, "answer_loss", watch)
    settings = dataclasses.replace(SETTINGS["qlora"], steps=2)
    trainer = plain_trainer(base_for("qlora", tiny_directory), tokenizer, settings, tmp_path)
    assert modes == []
    assert not run_trainer(trainer, settings).model.training
    assert modes == [True, True]


def test_a_single_step_trains(tiny_directory: str) -> None:
    """The learning rate rises from zero, but the first step must not be lost."""
    result = train(RECORDS, dataclasses.replace(SETTINGS["lora"], steps=1),
                   model=tiny_directory)
    assert len(result.losses) == 1


def test_progress_is_a_plain_line_now_and_then(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS["lora"], steps=3)
    train(RECORDS, settings, model=tiny_directory, say_every=2)
    lines = capsys.readouterr().out.splitlines()
    assert [re.split("  loss ", line)[0] for line in lines] == ["step    2/3", "step    3/3"]
    assert all(re.search(r"  loss \d+\.\d+  about \d+ s left$", line) for line in lines)
    train(RECORDS, dataclasses.replace(settings, steps=2), model=tiny_directory)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(lib.trainer, "SILENCE", 0.0)  # every step is a slow one now
    train(RECORDS, settings, model=tiny_directory, say_every=3)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(("change", "message"), [
    ({"mode": "magic"}, "mode 'magic'"), ({"rank": 0}, "rank 0"), ({"steps": 0}, "steps 0"),
    ({"steps": -1}, "steps -1"), ({"batch_size": 0}, "batch size 0"),
    ({"alpha": 0}, "alpha 0"), ({"dropout": 1.0}, "dropout 1.0"),
    ({"dropout": -0.1}, "dropout -0.1"), ({"learning_rate": 0.0}, "learning rate 0.0"),
    ({"learning_rate": float("nan")}, "learning rate nan"),
    ({"learning_rate": float("inf")}, "learning rate inf"),
    ({"warmup": -0.1}, "warmup -0.1"), ({"warmup": 2.0}, "warmup 2.0"),
    ({"max_length": 0}, "max length 0"), ({"max_length": -5}, "max length -5"),
    ({"seed": -1}, "seed -1"), ({"seed": 2**32}, "seed 4294967296"),
])
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(**change)


def test_batches_are_not_sorted_by_length(
    tiny_directory: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Length tells the machine; sorted batches made a model forget half of them."""
    records = sensors("train", 320)
    trainer = make_trainer(load_model(tiny_directory), tokenizer, records,
                           TrainSettings(steps=20, batch_size=16), work=tmp_path)
    lengths = torch.tensor([batch["attention_mask"].sum(1).float().mean().item()
                            for batch in trainer.get_train_dataloader()])
    steps = torch.arange(len(lengths), dtype=torch.float)
    correlation = torch.corrcoef(torch.stack([lengths, steps]))[0, 1].item()
    assert len(lengths) == 20 and abs(correlation) < 0.5


def test_parts_of_a_batch_add_up_to_the_batch(tiny_directory: str) -> None:
    """Accumulation weighs every token alike, whatever part it came in."""
    whole = dataclasses.replace(SETTINGS["lora"], dropout=0.0)
    parts = dataclasses.replace(whole, accumulate=2)
    first, second = (train(RECORDS, s, model=tiny_directory) for s in (whole, parts))
    assert first.losses == pytest.approx(second.losses, rel=1e-3)

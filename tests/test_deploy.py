"""From a budget to files: sizes, what is read back, and bad budgets."""

import json
from pathlib import Path

import pytest
import torch
from conftest import with_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lib import deploy as module
from lib.artifacts import sha256, verified
from lib.base_model import load_tokenizer
from lib.coa import CoaLora
from lib.configuration import KINDS, LEVELS, Configuration, Level
from lib.deploy import deploy_packed, load_deployed
from lib.deploy_gguf import deploy_gguf
from lib.errors import UserError
from lib.packing import PackedLinear
from lib.surrogate import numbers
from lib.switchable import Switchable
from lib.tasks import held_out_loss, sensors

pytestmark = pytest.mark.usefixtures("float32")
# Two blocks of width 64 and 49,152 rows of embedding: 3.3 MB in 8 bits.
LOW, HIGH = Level(2, 2, "bf16", 64, 256), Level(8, 8, "bf16", 16, 256)


@pytest.fixture(scope="module")
def folder(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and a front of three plans for the tiny model."""
    root = tmp_path_factory.mktemp("data")
    base = Switchable.load(tiny_directory)
    plans = [Configuration.uniform(base.layers, level) for level in (LOW, Level(), HIGH)]
    coa = CoaLora(with_adapter(base.model, target_modules=list(KINDS)), base)
    torch.nn.init.normal_(coa.network.network[-1].weight, std=0.1)
    coa.save_pretrained(root / "adapters/sensors_coa")
    root.joinpath("fronts").mkdir()
    root.joinpath("fronts/sensors.json").write_text(json.dumps({
        "base_hash": base.fingerprint,
        "adapter": sha256(root / "adapters/sensors_coa/manifest.json"), "front": [
            {"bits": p.bits, "loss": loss, "levels": " ".join(map(str, numbers(p).tolist()))}
            for p, loss in zip(plans, (9.0, 5.0, 4.0), strict=True)]}))
    return root


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def run(folder: Path, model: str, budget: float, out: Path) -> module.Deployed:
    return deploy_packed("sensors", budget, out, examples=2, model=model, folder=folder)


@pytest.mark.parametrize("budget", [6.0, 7.6, 8.5])
def test_the_size_stays_under_the_budget_and_near_the_prediction(
        folder: Path, tiny_directory: str, tmp_path: Path, budget: float) -> None:
    done = run(folder, tiny_directory, budget, tmp_path / "out")
    assert done.actual_mb == pytest.approx(size(tmp_path / "out") / 1e6)
    assert done.actual_mb <= done.predicted_mb <= budget
    assert done.predicted_mb - done.actual_mb < 0.16
    verified(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_the_model_in_16_bits_has_its_adapter_once(
        folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    """Loaded, the adapter is among the model's parameters; as a file, it is counted anyway."""
    out = tmp_path / "out"
    run(folder, tiny_directory, 8.5, out)
    files = size(out / "adapter") + sum(
        f.stat().st_size for f in out.glob("*.json") if "tokenizer" in f.name or "config" in f.name)
    numbers = Switchable.load(tiny_directory).model.num_parameters()
    adapter = 2 * sum(t.numel() for t in load_file(
        out / "adapter" / "adapter_model.safetensors").values())
    whole = 2 * numbers + files + module.HEADERS
    with pytest.raises(UserError, match="hold the model in 16 bits"):
        run(folder, tiny_directory, (whole + adapter / 2) / 1e6, tmp_path / "large")


def test_a_head_of_its_own_is_refused(folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    """It would be read back as random numbers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    load_tokenizer(tiny_directory).save_pretrained(tmp_path / "untied")
    for way in (deploy_packed, deploy_gguf):
        with pytest.raises(UserError, match="tied"):
            way("sensors", 8.5, tmp_path / "out", model=str(tmp_path / "untied"), folder=folder)
    assert not (tmp_path / "out").exists()


def test_a_larger_budget_buys_a_lower_loss(folder: Path, tiny_directory: str,
                                           tmp_path: Path) -> None:
    done = [run(folder, tiny_directory, b, tmp_path / f"{b}") for b in (6.0, 8.5)]
    # At 6 MB only the 4-bit embedding fits; at 8.5 the better of the two is taken.
    assert (done[0].embedding, done[0].considered, done[1].considered) == ("4 bits", 3, 3)
    assert done[1].loss <= done[0].loss


def test_what_is_read_back_is_what_was_measured(
        folder: Path, tiny_directory: str, tmp_path: Path,
        tokenizer: PreTrainedTokenizerBase) -> None:
    done = run(folder, tiny_directory, 8.5, tmp_path / "out")
    held = sensors("validation", 48)
    small, plain = (load_deployed(tmp_path / "out", packed_layers=p) for p in (True, False))
    assert sum(isinstance(m, PackedLinear) for m in small.modules()) == 14
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    for model in (small, plain):
        # The adapter is stored in float16.
        assert held_out_loss(model, tokenizer, held) == pytest.approx(done.loss, rel=1e-3)


def test_the_missing_size_is_enough(folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(folder, tiny_directory, 1.0, tmp_path / "out")
    more = float(str(error.value).split("give ")[1].split()[0])
    assert run(folder, tiny_directory, 1.0 + more, tmp_path / "out").plan.levels[0] == LOW
    with pytest.raises(UserError, match="MB more"):
        run(folder, tiny_directory, 0.8 + more, tmp_path / "other")


def test_damaged_files_are_named(folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    run(folder, tiny_directory, 8.5, tmp_path / "out")
    file = tmp_path / "out/rest.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="rest.safetensors is missing or damaged"):
        load_deployed(tmp_path / "out")
    with pytest.raises(UserError, match="no artifact of this course"):
        load_deployed(tmp_path)


def test_level_numbers_are_places_in_the_grid(folder: Path) -> None:
    rows = json.loads((folder / "fronts/sensors.json").read_text())["front"]
    assert [LEVELS[int(row["levels"].split()[0])] for row in rows] == [LOW, Level(), HIGH]

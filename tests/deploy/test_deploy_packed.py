"""From a budget to files: sizes, what is read back, and bad budgets."""

import json
from pathlib import Path

import pytest
import torch
from conftest import with_adapter
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lib.base.model import load_tokenizer
from lib.base.records import sensors
from lib.coa.adapter import CoaLora
from lib.coa.configuration import MODULE_KINDS, Configuration, Switchable
from lib.deploy import packed as module
from lib.deploy.gguf import deploy_gguf
from lib.deploy.packed import deploy_packed, load_deployed
from lib.errors import UserError
from lib.evaluate.scores import held_out_loss
from lib.files import sha256, verified
from lib.quantize.formats import Format, PackedLinear

pytestmark = pytest.mark.usefixtures("float32")
# Two blocks of width 64 and 49,152 rows of embedding: 3.3 MB in 8 bits.
LOW, HIGH = Format(2, 2, "bf16", 64, 256), Format(8, 8, "bf16", 16, 256)


@pytest.fixture(scope="module")
def folder(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and a front of three plans for the tiny model."""
    root = tmp_path_factory.mktemp("data")
    base = Switchable.load(tiny_directory)
    plans = [Configuration.uniform(base.layers, level) for level in (LOW, Format(), HIGH)]
    coa = CoaLora(with_adapter(base.model, target_modules=list(MODULE_KINDS)), base)
    torch.nn.init.normal_(coa.network.network[-1].weight, std=0.1)
    coa.save_pretrained(root / "adapters/sensors_coa")
    root.joinpath("fronts").mkdir()
    root.joinpath("fronts/sensors.json").write_text(json.dumps({
        "base_hash": base.fingerprint,
        "adapter": sha256(root / "adapters/sensors_coa/manifest.json"), "front": [
            {"loss": loss, "configuration": p.to_json()}
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
    assert run(folder, tiny_directory, 1.0 + more, tmp_path / "out").actual_mb <= 1.0 + more
    with pytest.raises(UserError, match="MB more"):
        run(folder, tiny_directory, 0.8 + more, tmp_path / "other")


def test_damaged_files_are_named(folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    run(folder, tiny_directory, 8.5, tmp_path / "out")
    file = tmp_path / "out/rest.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="rest.safetensors is missing or damaged"):
        load_deployed(tmp_path / "out")
    with pytest.raises(UserError, match="not an artifact of this course"):
        load_deployed(tmp_path)

"""From a budget to a server's files: types under a budget, the better of two ways."""

from pathlib import Path

import gguf
import pytest
import torch
from conftest import saved_adapter
from transformers import LlamaForCausalLM, PreTrainedModel

from lib import deploy_gguf as module
from lib.artifacts import verified
from lib.base_model import load_model
from lib.bundle import open_bundle
from lib.configuration import KINDS, block_linears
from lib.deploy_gguf import CHOICES, HEAD, deploy_gguf, type_plan
from lib.errors import UserError
from lib.tasks import Record, Score

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def folder(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny model, where `deploy` looks for it."""
    root = tmp_path_factory.mktemp("data")
    saved_adapter(load_model(tiny_directory, dtype=torch.float32),
                  root / "adapters/sensors_qlora", target_modules=list(KINDS))
    return root


def felt(model: PreTrainedModel, **more: float) -> dict[str, float]:
    return {name: 1.0 for name in (*block_linears(model), HEAD)} | more


def test_types_follow_what_is_felt(tiny: LlamaForCausalLM) -> None:
    total = sum(tiny.get_submodule(name).weight.numel() for name in felt(tiny))
    plan, size = type_plan(tiny, felt(tiny), total * 4.5 / 8 + 1)
    assert {*plan.values()} == {"Q4_0"} and size == total * 4.5 / 8
    strong = "model.layers.1.mlp.down_proj"
    plan, size = type_plan(tiny, felt(tiny, **{strong: 1e9}), total * 4.52 / 8)
    assert plan[strong] == "Q8_0" and size <= total * 4.52 / 8
    plan, _ = type_plan(tiny, felt(tiny), total * 9 / 8)
    assert {*plan.values()} == {"Q8_0"}
    with pytest.raises(UserError, match="below the smallest file: give .* MB more"):
        type_plan(tiny, felt(tiny), total * 4.4 / 8)


@pytest.mark.parametrize("better", ["folded", "beside"])
def test_the_better_way_is_kept_under_the_budget(
        folder: Path, tiny_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        better: str) -> None:
    asked = []

    def scored(path: Path, records: list[Record], name: str) -> Score:
        asked.append((path.name, name, len(records)))
        open_bundle(path)  # what a server checks before it starts
        return Score((path.name == better,), ("",))

    monkeypatch.setattr(module, "served_score", scored)
    out = tmp_path / "out"
    done = deploy_gguf("sensors", 5.2, out, model=tiny_directory, folder=folder)
    assert asked == [("folded", "", 32), ("beside", "sensors", 32)]
    assert done.way == better
    assert done.actual_mb <= done.predicted_mb <= 5.2
    assert done.predicted_mb - done.actual_mb < 0.5
    assert sum(done.types.values()) == 15 and {*done.types} == {*CHOICES}
    assert ("sensors.gguf" in {f.name for f in out.iterdir()}) == (better == "beside")
    assert verified(out)["model"] == "model.gguf"
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds - {"F32"} == {kind for kind, n in done.types.items() if n}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_scores_come_from_a_server(folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    done = deploy_gguf("sensors", 5.2, tmp_path / "out", examples=2, model=tiny_directory,
                       folder=folder)
    assert {*done.scores} == {"folded", "beside"}
    assert all(len(score.texts) == 2 for score in done.scores.values())

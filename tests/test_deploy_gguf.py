"""From a budget to a server's files: types under a budget, the better of two ways."""

import re
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
from lib.deploy_gguf import CHOICES, HEAD, deploy_gguf, type_errors, type_plan
from lib.errors import UserError
from lib.quantize import rounded
from lib.tasks import Record, Score

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def folder(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny model, where `deploy` looks for it."""
    root = tmp_path_factory.mktemp("data")
    saved_adapter(load_model(tiny_directory, dtype=torch.float32),
                  root / "adapters/sensors_qlora", target_modules=list(KINDS))
    return root


def planned(tiny: PreTrainedModel, bits: float, **felt: float) -> tuple[dict[str, str], float]:
    """The plan of the tiny model's matrices at so many bits a weight; sensitivities by name."""
    whole = {name: tiny.get_submodule(name).weight for name in (*block_linears(tiny), HEAD)}
    sizes = {name: weight.numel() for name, weight in whole.items()}
    errors = {name: type_errors(weight.data, felt.get(name, 1.0))
              for name, weight in whole.items()}
    plan, size = type_plan(sizes, errors, sum(sizes.values()) * bits / 8)
    return plan, 8 * size / sum(sizes.values())


def test_types_follow_what_is_felt(tiny: LlamaForCausalLM) -> None:
    plan, bits = planned(tiny, 4.501)
    assert {*plan.values()} == {"Q4_0"} and bits == 4.5
    strong = "model.layers.1.mlp.down_proj"
    plan, bits = planned(tiny, 5.2, **{strong: 1e9})
    assert plan[strong] == "Q8_0" and bits <= 5.2
    assert {*planned(tiny, 9)[0].values()} == {"Q8_0"}


def test_an_error_that_the_outputs_do_not_see_counts_less() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    seen = torch.diag(torch.tensor([1.0] * 32 + [1e-3] * 32))
    fed = weight.clone()
    fed[:, 32:] += 1  # large, and in directions that the inputs lack
    plain, ours = (type_errors(weight, 2.0, *more) for more in ((), (fed, seen)))
    assert ours[1] == plain[1] == 2 * float((rounded(weight, "Q8_0") - weight).square().sum())
    assert ours[0] < 1e-2 * plain[0]
    blind = type_errors(weight, 2.0, rounded(weight, "Q4_0"), seen)
    assert blind == pytest.approx(plain)


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


def test_the_smallest_file_has_the_adapter_inside(
        folder: Path, tiny_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scored(path: Path, *_: object) -> Score:
        asked.append(path.name)
        return Score((True,), ("",))

    monkeypatch.setattr(module, "served_score", scored)

    def deploy(budget: float) -> float:
        return deploy_gguf("sensors", budget, tmp_path / "out", model=tiny_directory,
                           folder=folder).actual_mb

    with pytest.raises(UserError, match="below the smallest file, .* MB: give") as small:
        deploy(0.5)
    least = float(re.search(r"file, ([\d.]+) MB", str(small.value))[1])
    with pytest.raises(UserError, match="give 0.[12] MB more"):
        deploy(least - 0.1)
    assert deploy(least + 0.05) <= least + 0.05 and asked == ["folded"]

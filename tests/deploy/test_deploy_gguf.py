"""From a budget to a server's files: types under a budget."""

import re
from pathlib import Path

import gguf
import pytest
import torch
from conftest import saved_adapter
from transformers import LlamaForCausalLM, PreTrainedModel

from lib.base.model import load_model
from lib.coa.configuration import MODULE_KINDS, block_linears
from lib.deploy import gguf as module
from lib.deploy.gguf import CHOICES, HEAD, deploy_gguf, encode_within, type_errors
from lib.errors import UserError
from lib.evaluate.scores import Score
from lib.files import verified
from lib.quantize.correction import encode_with_feedback
from lib.quantize.formats import encode, round_trip

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def folder(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny model, where `deploy` looks for it."""
    root = tmp_path_factory.mktemp("data")
    saved_adapter(load_model(tiny_directory, dtype=torch.float32),
                  root / "adapters/sensors_qlora", target_modules=list(MODULE_KINDS))
    return root


def types_at(tiny: PreTrainedModel, bits: float, **felt: float) -> tuple[dict[str, str], float]:
    """Types of the tiny model's matrices, and their bits a weight; sensitivities by name."""
    matrices = {name: tiny.get_submodule(name).weight.data
                for name in (*block_linears(tiny), HEAD)}
    total = sum(weight.numel() for weight in matrices.values())
    encoded, size = encode_within(total * bits / 8, matrices,
                                  {name: felt.get(name, 1.0) for name in matrices}, {})
    assert sum(data.nbytes for _, data in encoded.values()) == size
    return {name: gguf_type for name, (gguf_type, _) in encoded.items()}, 8 * size / total


def test_types_follow_what_is_felt(tiny: LlamaForCausalLM) -> None:
    types, bits = types_at(tiny, 4.501)
    assert {*types.values()} == {"Q4_0"} and bits == 4.5
    strong = "model.layers.1.mlp.down_proj"
    types, bits = types_at(tiny, 5.2, **{strong: 1e9})
    assert types[strong] == "Q8_0" and bits <= 5.2
    assert {*types_at(tiny, 9)[0].values()} == {"Q8_0"}


def test_rounding_with_feedback_is_what_is_written(tiny: LlamaForCausalLM) -> None:
    name = "model.layers.0.mlp.down_proj"
    weight = tiny.get_submodule(name).weight.data
    x = torch.randn(300, weight.shape[1]) @ torch.randn(weight.shape[1], weight.shape[1])
    root = torch.linalg.cholesky(x.T @ x / 300 + torch.eye(weight.shape[1]))
    encoded, _ = encode_within(weight.numel() * 4.6 / 8, {name: weight}, {name: 1.0},
                               {name: root})
    expected = encode_with_feedback({name: weight}, {name: root})[name]
    assert encoded[name][0] == "Q4_0" and (encoded[name][1] == expected).all()
    assert (expected != encode(weight, "Q4_0")).any()


def test_an_error_that_the_outputs_do_not_see_counts_less() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    seen = torch.diag(torch.tensor([1.0] * 32 + [1e-3] * 32))
    far = torch.cat([weight[:, :32], weight[:, 32:] + 1], 1)  # in directions the inputs lack
    near = torch.cat([weight[:, :32] + 1, weight[:, 32:]], 1)
    plain = type_errors(weight, 2.0)
    assert plain[1] == 2 * float((round_trip(weight, "Q8_0") - weight).square().sum())
    unseen, same, felt = (type_errors(weight, 2.0, encode(other, "Q4_0"), seen)
                          for other in (far, weight, near))
    assert unseen[1] == plain[1] and same == pytest.approx(plain)
    assert felt[0] > 20 * plain[0] > 10 * unseen[0]


def test_the_files_keep_the_budget_and_a_server_scores_them(
        folder: Path, tiny_directory: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = deploy_gguf("sensors", 5.2, out, examples=2, model=tiny_directory, folder=folder)
    assert len(done.score.texts) == 2
    assert done.actual_mb <= done.predicted_mb <= 5.2
    assert done.predicted_mb - done.actual_mb < 0.5
    assert sum(done.types.values()) == 15 and {*done.types} == {*CHOICES}
    assert verified(out)["model"] == "model.gguf"
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds - {"F32"} == {kind for kind, n in done.types.items() if n}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_smallest_file(folder: Path, tiny_directory: str, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "served_score", lambda *_: Score((True,), ("",)))

    def deploy(budget: float) -> float:
        return deploy_gguf("sensors", budget, tmp_path / "out", model=tiny_directory,
                           folder=folder).actual_mb

    with pytest.raises(UserError, match="the smallest files take .* MB: give") as small:
        deploy(0.5)
    least = float(re.search(r"files take ([\d.]+) MB", str(small.value))[1])
    with pytest.raises(UserError, match="give 0.[12] MB more"):
        deploy(least - 0.1)
    assert deploy(least + 0.05) <= least + 0.05

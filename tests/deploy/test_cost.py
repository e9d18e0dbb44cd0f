"""Measured limits of a device: memory and time a token."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_deploy_gguf import folder as gguf_folder  # noqa: F401
from test_deploy_packed import folder as packed_folder  # noqa: F401 - fixtures

from lib.deploy import cost as module
from lib.deploy.cost import Cost, cost, deploy_within
from lib.deploy.gguf import deploy_gguf
from lib.deploy.packed import deploy_packed
from lib.errors import UserError

pytestmark = pytest.mark.usefixtures("float32")


@dataclass(frozen=True)
class Made:
    actual_mb: float


class Device:
    """Files as large as the budget; memory is 100 MB more, a token takes 0.1 ms for each MB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, least: float = 1.0) -> None:
        self.budgets: list[float] = []
        self.least = least
        monkeypatch.setattr(module, "cost", lambda *_: Cost(
            self.budgets[-1] + 100, self.budgets[-1] / 10))

    def deploy(self, task: str, budget_mb: float, out: Path, **_: Any) -> Made:
        if budget_mb < self.least:
            raise UserError("the budget is below the smallest file")
        self.budgets.append(budget_mb)
        out.mkdir()
        return Made(budget_mb)


def test_what_fits_at_once_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    made, found = deploy_within(device.deploy, "sensors", 80, tmp_path / "out", Cost(180, 8))
    assert (made.actual_mb, found, device.budgets) == (80, Cost(180, 8), [80])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("limits", "expected"), [
    (Cost(160, math.inf), 60), (Cost(math.inf, 4), 40), (Cost(150, 7), 50)])
def test_files_shrink_until_they_keep_within(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: Cost, expected: float) -> None:
    device = Device(monkeypatch)
    made, found = deploy_within(device.deploy, "sensors", 80, tmp_path / "out", limits)
    assert made.actual_mb == pytest.approx(expected)
    assert found.memory_mb <= limits.memory_mb and found.token_ms <= limits.token_ms
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_limits_that_nothing_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, least=70)
    with pytest.raises(UserError, match=r"no known files keep within 120 MB .* took 180 MB of "
                       r"memory and 8.0 ms a token \(the budget is below"):
        deploy_within(device.deploy, "sensors", 80, tmp_path / "out", Cost(120, math.inf))
    device = Device(monkeypatch)
    monkeypatch.setattr(module, "cost", lambda *_: Cost(500, 9))
    with pytest.raises(UserError, match="in 6 tries: the last took 500 MB"):
        deploy_within(device.deploy, "sensors", 80, tmp_path / "out", Cost(499.5, 9))
    assert device.budgets == [80, 79, 78, 77, 76, 75] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("limits", [Cost(0, 5), Cost(5, -1), Cost(math.nan, 5)])
def test_limits_that_make_no_sense(tmp_path: Path, limits: Cost) -> None:
    with pytest.raises(UserError, match="use numbers above 0"):
        deploy_within(deploy_packed, "sensors", 80, tmp_path / "out", limits)
    with pytest.raises(UserError, match="unknown task"):
        deploy_within(deploy_packed, "poems", 80, tmp_path / "out", Cost(5, 5))


def test_packed_files_are_measured(packed_folder: Path, tiny_directory: str,  # noqa: F811
                                   tmp_path: Path) -> None:
    made, found = deploy_within(deploy_packed, "sensors", 8.5, tmp_path / "out", Cost(9e9, 9e9),
                                examples=2, model=tiny_directory, folder=packed_folder)
    assert found.memory_mb > made.actual_mb and found.token_ms > 0
    assert (tmp_path / "out" / "layers.safetensors").is_file()


def test_served_files_are_measured(gguf_folder: Path, tiny_directory: str,  # noqa: F811
                                   tmp_path: Path) -> None:
    made, found = deploy_within(deploy_gguf, "sensors", 5.2, tmp_path / "out", Cost(9e9, 9e9),
                                examples=2, model=tiny_directory, folder=gguf_folder)
    assert found.memory_mb > made.actual_mb and found.token_ms > 0


def test_files_that_do_not_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be run"):
        cost(tmp_path, "sensors")

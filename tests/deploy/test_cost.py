"""Measured limits of a device: memory and time a token."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_deploy_gguf import folder as gguf_folder  # noqa: F401
from test_deploy_packed import folder as packed_folder  # noqa: F401 - fixtures

from lib.deploy import cost as module
from lib.deploy.cost import Cost, deploy_within
from lib.deploy.gguf import deploy_gguf
from lib.deploy.packed import deploy_packed
from lib.errors import UserError

pytestmark = pytest.mark.usefixtures("float32")


def test_limits_are_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deploy(task: str, budget_mb: float, out: Path) -> SimpleNamespace:
        out.mkdir()
        return SimpleNamespace(actual_mb=budget_mb)

    monkeypatch.setattr(module, "cost", lambda *_: Cost(180, 8))
    for limits in (Cost(179, math.inf), Cost(math.inf, 7.9)):
        with pytest.raises(UserError, match="take 180 MB of memory and 8.0 ms a token.*: lower"):
            deploy_within(deploy, "sensors", 80, tmp_path / "out", limits)
        assert not list(tmp_path.iterdir())
    made, spent = deploy_within(deploy, "sensors", 80, tmp_path / "out", Cost(180, 8))
    assert (made.actual_mb, spent) == (80, Cost(180, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


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

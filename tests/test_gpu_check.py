"""The rows of gpu_check.py, from what trainings and programs would leave on a real device."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu_check
from gpu_check import Session, Training


class FakeSession(Session):
    """A session on a real device whose trainings leave what `trained` tells."""

    cuda = True
    trained: ClassVar[dict[str, dict[str, Any]]] = {}

    def train(self, name: str, *overrides: str, launcher: tuple[str, ...] = ()) -> Training:
        left: dict[str, Any] = {"weights": b"w", "loss": 0.5, "output": "", "probe": {}} | self.trained.get(
            name, {}
        )
        run = self.folder / name
        (run / "model").mkdir(parents=True)
        (run / "model" / "model.safetensors").write_bytes(left["weights"])
        lines = [
            {"phase": "train", "step": 100 * epoch, "loss": left["loss"] / epoch, "slices_per_second": 1000.0}
            for epoch in (1, 2)
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        probe = {"first_step_seconds": 9.0, "graphs": 2, "graph_breaks": 0} | left["probe"]
        return Training(run, left["output"], probe, 10.0)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    monkeypatch.setattr(FakeSession, "trained", {})
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(gpu_check, "run_program", lambda *command: "")
    return FakeSession(torch.device("cuda", 0), tmp_path)


@pytest.mark.parametrize(
    ("check", "trained", "failed"),
    [
        (gpu_check.check_caches, {}, set()),
        (gpu_check.check_caches, {"device": {"weights": b"other"}}, {"weights with each cache"}),
        (gpu_check.check_demo, {}, set()),
        (gpu_check.check_demo, {"demo": {"probe": {"graph_breaks": 1}}}, {"torch.compile"}),
        (gpu_check.check_demo, {"demo": {"probe": {"graphs": 0}}}, {"torch.compile"}),
        (gpu_check.check_demo, {"demo": {"output": "WON'T CONVERT forward"}}, {"torch.compile"}),
        (gpu_check.check_demo, {"fp16": {"loss": 0.53}}, {"loss of epoch 1, fp16"}),
        (gpu_check.check_demo, {"bf16": {"loss": float("nan")}}, {"loss of epoch 1, bf16"}),
        (gpu_check.check_two_devices, {}, set()),
        (gpu_check.check_two_devices, {"two": {"loss": 0.502}}, {"loss of epoch 1, two devices"}),
    ],
)
def test_a_value_that_is_not_as_expected_fails(
    session: FakeSession, check: Any, trained: dict[str, Any], failed: set[str]
) -> None:
    session.trained.update(trained)
    assert {row.name for row in check(session) if row.passed is False} == failed


@pytest.mark.parametrize(
    ("reserved", "synchronizations", "passed"),
    [
        ([9, 9, 12, 12, 12, 12], [90, 90, 90, 90, 90, 20], [True, True]),
        ([9, 9, 12, 12, 14, 14], [90, 90, 90, 90, 90, 20], [False, True]),
        ([9, 9, 12, 12, 12, 12], [20, 20, 20, 20, 20, 101], [True, False]),
    ],
)
def test_growing_memory_and_a_synchronization_in_every_step_fail(
    session: FakeSession, reserved: list[int], synchronizations: list[int], passed: list[bool]
) -> None:
    probe = {"reserved": [value * 2**20 for value in reserved], "synchronizations": synchronizations}
    session.trained["memory-epochs"] = {"probe": probe}
    assert [row.passed for row in gpu_check.check_memory(session)] == passed


@pytest.mark.parametrize(("device", "passed"), [(1100, True), (500, False)])
def test_the_device_cache_must_not_be_slower(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, device: int, passed: bool
) -> None:
    def run_program(*command: str) -> str:
        rates = {"limit": [2000.0], "device": [device], "memory": [1000.0]}
        Path(command[-1]).write_text(json.dumps({"works": {"RACOON 16, batch 64, fp32": rates}}))
        return ""

    monkeypatch.setattr(gpu_check, "run_program", run_program)
    rows = list(gpu_check.check_throughput(session))
    assert [row.passed for row in rows] == [passed, None]


def test_a_program_that_fails_is_one_row_and_the_other_checks_run(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_program(*command: str) -> str:
        raise gpu_check.ProgramError("evaluation.py: exit status 2\ncause")

    monkeypatch.setattr(gpu_check, "run_program", run_program)
    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.check_evaluation, gpu_check.check_caches])
    assert [row.passed for row in gpu_check.check_all(session)] == [False, True]
    out, err = capsys.readouterr()
    assert "| evaluation.py: exit status 2 | **FAILED** |" in out
    assert "cause" in err


def test_without_an_accelerator_the_exit_status_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.startswith("There is no accelerator that torch")

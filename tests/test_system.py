"""Resources of the host: memory limits of control groups."""

from pathlib import Path

import pytest

import system


@pytest.mark.parametrize(
    ("free", "limits", "available"),
    [
        (10**9, {}, 10**9),
        (10**9, {"slurm/job_7/memory.max": "max", "slurm/memory.max": "max"}, 10**9),
        (10**9, {"slurm/job_7/memory.max": "max", "slurm/memory.max": "500000"}, 499_000),
        (10**9, {"slurm/job_7/memory.max": "300000", "slurm/memory.max": "500000"}, 299_000),
        (10**9, {"memory/slurm/job_7/memory.limit_in_bytes": "300000"}, 298_000),
        (10**9, {"memory/slurm/job_7/memory.limit_in_bytes": str(2**63 - 4096)}, 10**9),
        (100, {"slurm/job_7/memory.max": "300000"}, 100),
    ],
)
def test_available_memory_respects_control_groups(
    free: int, limits: dict[str, str], available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = free

    groups = tmp_path / "cgroup"
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("5:memory:/slurm/job_7\n1:cpu,cpuacct:/\n0::/slurm/job_7\n")
    for name, limit in limits.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(limit + "\n")
        (groups / name).with_name("memory.stat").write_text("anon 1000\ntotal_rss 2000\nfile 500000\n")
    monkeypatch.setattr(system.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(system, "PROC", tmp_path)
    monkeypatch.setattr(system, "CGROUPS", groups)
    assert system.available_memory() == available

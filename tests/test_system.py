"""Limits of the host and rank variables of the launch."""

import system

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "LAUNCH_SECONDS"),
    *("SLURM_CPUS_PER_TASK", "SLURM_LOCALID"),
    *(name for names in system.RANK_VARIABLES.values() for name in names),
    *(name for names in system.LOCAL_RANK_VARIABLES.values() for name in names),
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


# Cores


def test_slurm_and_affinity_limit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10**6)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert system.available_cores() == 1
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert system.available_cores() <= 2


def write_cgroup(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, **files: str) -> None:
    """A /proc/self/cgroup of this `line`, and files of cgroups, in whose names `__` stands for `/`."""
    (folder / "self").mkdir()
    (folder / "self" / "cgroup").write_text(line)
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(system, "PROC", folder)
    monkeypatch.setattr(system, "CGROUPS", folder)


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 10**6)]
)
def test_the_cgroup_above_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10**6)), raising=False)
    files = {"jobs__cpu.max": f"{quota}\n", "jobs__mine__memory.max": "max\n"}
    write_cgroup(tmp_path, monkeypatch, "4:memory:/else\n0::/jobs/mine\n", **files)
    assert system.available_cores() == cores


# Memory: cached files count as free


def test_a_cgroup_of_version_2_limits_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"jobs__memory.max": "1048576\n", "jobs__memory.stat": "anon 1000\nfile 900000\n"}
    write_cgroup(tmp_path, monkeypatch, "0::/jobs\n", **files)
    assert system.available_memory() == 1048576 - 1000


def test_a_cgroup_of_version_1_limits_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {
        "memory__jobs__memory.limit_in_bytes": "1048576\n",
        "memory__jobs__memory.stat": "cache 900000\ntotal_rss 1000\n",
    }
    write_cgroup(tmp_path, monkeypatch, "7:cpu,memory:/jobs\n", **files)
    assert system.available_memory() == 1048576 - 1000


def test_without_cgroups_the_host_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "PROC", tmp_path)
    assert system.available_memory() > 2**20
    assert system.available_cores() >= 1


# Ranks

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
CRAY = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}


@pytest.mark.parametrize("variables", [OPEN_MPI, INTEL_MPI, CRAY])
def test_ranks_of_mpi_are_adopted(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    system.setup_ranks()
    assert (system.rank(), system.world_size(), system.local_world_size()) == (3, 4, 2)
    assert os.environ["LOCAL_RANK"] == "1"


def test_srun_gives_the_local_rank_that_mpich_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    system.setup_ranks()
    assert os.environ["LOCAL_RANK"] == "1"


def test_the_launchers_ranks_come_before_those_of_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    system.setup_ranks()
    assert (system.rank(), system.world_size(), os.environ["LOCAL_RANK"]) == (0, 2, "0")


def test_one_task_of_slurm_has_no_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "0")
    system.setup_ranks()
    assert "LOCAL_RANK" not in os.environ


COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, r"RANK is set \(1\), but WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK is 5, but LOCAL_WORLD_SIZE is 2"),
        ({"RANK": "one"}, "environment variable RANK: found 'one', allowed: an integer of at least 0"),
        ({"RANK": "-1"}, "environment variable RANK: found '-1'"),
        ({"WORLD_SIZE": ""}, "environment variable WORLD_SIZE: found ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0', allowed: an integer of at least 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: found '9{40}', allowed"),
        ({"LOCAL_WORLD_SIZE": "all"}, "environment variable LOCAL_WORLD_SIZE: found 'all'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: found 70000, allowed: up to 65535"),
        ({"MASTER_PORT": "any"}, "environment variable MASTER_PORT: found 'any'"),
    ],
)
def test_ranks_that_are_invalid_or_incomplete(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    for name, value in (COMPLETE | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        system.setup_ranks()


def test_complete_ranks_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    system.setup_ranks()
    assert system.world_size() == int(COMPLETE["WORLD_SIZE"])


@pytest.mark.parametrize("value", ["soon", "", "0", "-1", "nan", "inf"])
def test_launch_seconds_that_are_invalid(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LAUNCH_SECONDS", value)
    with pytest.raises(ValueError, match=f"LAUNCH_SECONDS: found '{value}', allowed: a number of seconds"):
        system.launch_seconds()


def test_cores_of_slurm_that_are_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8(x2)")
    with pytest.raises(ValueError, match=r"SLURM_CPUS_PER_TASK: found '8\(x2\)'"):
        system.available_cores()


@pytest.mark.parametrize(
    ("numbers", "text"), [([], "none"), ([4], "4"), ([0, 1, 2], "0-2"), ([7, 0, 2, 3], "0, 2-3, 7")]
)
def test_format_ranges(numbers: list[int], text: str) -> None:
    assert system.format_ranges(numbers) == text

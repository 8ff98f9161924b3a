"""Limits of the host, rank variables of the launch, OpenMP, atomic writes and JSON lines."""

import system
from system import UserError

import ast
import os
import runpy
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    ("files", "cores"),
    [
        ({"jobs__cpu.max": "250000 100000\n"}, 2),
        ({"jobs__cpu.max": "50000 100000\n"}, 1),
        ({"jobs__cpu.max": "max 100000\n", "jobs__mine__memory.max": "max\n"}, 10**6),
        ({"cpu__pod__cpu.cfs_quota_us": "300000\n", "cpu__pod__cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu__pod__cpu.cfs_quota_us": "-1\n", "cpu__pod__cpu.cfs_period_us": "100000\n"}, 10**6),
        # In a container the folders of the host's cgroups are missing.
        ({"cpu__cpu.cfs_quota_us": "50000\n", "cpu__cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_cgroup_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10**6)), raising=False)
    write_cgroup(tmp_path, monkeypatch, "4:cpu,cpuacct:/pod/mine\n0::/jobs/mine\n", **files)
    assert system.available_cores() == cores


@pytest.mark.parametrize("line", ["7:pids:/pod\n", "0::/pids/pod\n"])
def test_limits_on_threads_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    write_cgroup(tmp_path, monkeypatch, line, **{"pids__pod__pids.max": "12\n", "pids__pids.max": "max\n"})
    assert f"{tmp_path}/pids/pod/pids.max 12" in system.thread_limits()
    assert "max max" not in system.thread_limits()


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
        ({"WORLD_SIZE": None}, r"RANK is 1, but WORLD_SIZE is not set\. Set RANK, WORLD_SIZE, or start"),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": None, "LOCAL_RANK": None}, "WORLD_SIZE is 2, but RANK and LOCAL_RANK is not set"),
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
    with pytest.raises(UserError, match=message):
        system.setup_ranks()


def test_complete_ranks_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    system.setup_ranks()
    assert system.world_size() == int(COMPLETE["WORLD_SIZE"])


def test_cores_of_slurm_that_are_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8(x2)")
    with pytest.raises(UserError, match=r"SLURM_CPUS_PER_TASK: found '8\(x2\)'"):
        system.available_cores()


@pytest.mark.parametrize(
    ("numbers", "text"), [([], "none"), ([4], "4"), ([0, 1, 2], "0-2"), ([7, 0, 2, 3], "0, 2-3, 7")]
)
def test_format_ranges(numbers: list[int], text: str) -> None:
    assert system.format_ranges(numbers) == text


# OpenMP


def spin_count(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str | None:
    """GOMP_SPINCOUNT after the import, in this environment."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "system.py"))
    return os.environ.get("GOMP_SPINCOUNT")


def test_spinning_is_limited_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spin_count(monkeypatch) == str(system.SPIN_COUNT)
    assert spin_count(monkeypatch, GOMP_SPINCOUNT="7") == "7"
    assert spin_count(monkeypatch, OMP_WAIT_POLICY="active") is None


@pytest.mark.parametrize(
    "program", ["trainer.py", "evaluation.py", "experiments/repeat.py", "experiments/sweep.py"]
)
def test_programs_import_it_first(program: str) -> None:
    tree = ast.parse((ROOT / program).read_text())
    modules = [node.names[0].name for node in tree.body if isinstance(node, ast.Import)]
    modules += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert next(name for name in modules if name not in sys.stdlib_module_names) == "system"


@pytest.mark.parametrize("program", ["trainer.py", "evaluation.py", "datasets", "training/checkpoint"])
def test_programs_find_their_modules(program: str, tmp_path: Path) -> None:
    """From another folder that has modules of the same names, and where Python adds no folder by itself."""
    for name in ("config.py", "system.py", "training.py"):
        (tmp_path / name).write_text("raise SystemExit('another project')")
    command = [sys.executable, str(ROOT / program)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONSAFEPATH": "1"}, check=False, stderr=subprocess.PIPE
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"usage: ")


@pytest.mark.parametrize(
    "program", ["trainer.py", "evaluation.py", "experiments/repeat.py", "experiments/sweep.py"]
)
def test_help_does_not_wait_for_torch(program: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / program), "--help"]
    done = subprocess.run(command, check=True, capture_output=True)
    assert done.stdout.startswith(b"usage: ")
    assert b"argparse" in done.stderr
    assert b"torch" not in done.stderr


# Files


def test_a_write_replaces_the_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    system.write_atomically(path, "old")
    system.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    system.write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as error:
        system.write_atomically(path, "new")
    assert error.value.filename == f"{path}.part"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_symbolic_link_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / "file.part").symlink_to(target)
    system.write_atomically(tmp_path / "file", "new")
    assert target.read_text() == "untouched"
    assert (tmp_path / "file").read_text() == "new"


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        system.write_atomically(tmp_path / "file", "new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_damaged_lines_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.jsonl"
    system.append_json_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b"17\n\xff\n" + b"[" * 100_000 + b'\n{"a": 2}\n{"a":')
    assert system.read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert [f"line {n}" in caplog.text for n in range(1, 7)] == [False, True, True, True, False, True]


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lines")
    with pytest.raises(OSError, match="not a regular file"):
        system.read_json_lines(tmp_path / "lines")


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert system.read_json_lines(tmp_path / "absent.jsonl") == []


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    assert system.existing_parent(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "link").symlink_to("/no/such/scratch")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"link is a link to /no/such/scratch, which does not exist"):
        system.existing_parent(tmp_path / "link" / "runs")
    with pytest.raises(UserError, match=r"file is not a folder"):
        system.existing_parent(tmp_path / "file" / "runs")

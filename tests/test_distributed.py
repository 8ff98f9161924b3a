"""One process's memory, threads and signals, and what several compare before they start."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.distributed_c10d import Backend, BackendConfig

import distributed
from distributed import launch, process

ROOT = str(Path(__file__).parents[1])
SET_BY_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK"),
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    environment, threads = dict(os.environ), torch.get_num_threads()
    terminate = signal.getsignal(signal.SIGTERM)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, terminate)


def python(program: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    program = """
import resource, torch
from distributed import process

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(32, 1024, 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
process.keep_freed_memory()
faults()
print(default, faults())
"""
    default, kept = map(int, python(program).communicate()[0].split())
    assert kept < default / 10


# Threads


def test_a_process_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "available_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    distributed.setup_process()
    assert torch.get_num_threads() == 3
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_no_process_is_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "available_cores", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    distributed.setup_process()
    assert torch.get_num_threads() == 1


def test_threads_that_the_user_chose_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(process, "available_cores", lambda: 64)
    distributed.setup_process()
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
@pytest.mark.parametrize(
    ("environment", "flags", "chosen"),
    [
        ({}, [], False),
        ({"OMP_NUM_THREADS": "1"}, [], True),
        ({}, ["--num_cpu_threads_per_process", "3"], True),
    ],
)
def test_the_launchers_threads_are_not_the_users(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: list[str], chosen: bool
) -> None:
    with subprocess.Popen(["sh", "-c", "read x", *flags], env=environment, stdin=subprocess.PIPE) as launcher:
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert process.threads_were_chosen() is chosen
        launcher.communicate(b"\n")


def test_slurm_and_affinity_limit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10**6)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert process.available_cores() == 1
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert process.available_cores() <= 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 10**6)]
)
def test_a_control_group_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cores: int
) -> None:
    (tmp_path / "jobs" / "mine").mkdir(parents=True)
    (tmp_path / "jobs" / "cpu.max").write_text(f"{quota}\n")
    (tmp_path / "cgroup").write_text("4:memory:/else\n0::/jobs/mine\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10**6)), raising=False)
    monkeypatch.setattr(process, "CGROUPS", tmp_path)
    monkeypatch.setattr(process, "CGROUP_OF_SELF", tmp_path / "cgroup")
    assert process.available_cores() == cores


# What a launch silently does not do


def test_a_lone_process_of_a_multi_cpu_launch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="asked for several processes and started one"):
        distributed.setup_process()


def test_programs_that_srun_started_side_by_side_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.warns(UserWarning, match="4 programs that do not know each other"):
        distributed.setup_process()


def test_cpu_processes_of_torchrun_become_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.setup_process()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_ranks_of_mpirun_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    distributed.setup_process()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_wish(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with distributed.StopSignals() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_another_reason_to_stop() -> None:
    stop = distributed.StopSignals()
    stop.request("max_minutes")
    stop.request("later")
    assert stop.agreed()
    assert stop.name == "max_minutes"


def test_a_second_interrupt_ends_at_once() -> None:
    program = """
import time
from distributed import process
with process.StopSignals() as stop:
    print("ready", flush=True)
    while not stop.agreed():
        time.sleep(0.01)
    print(stop.name, flush=True)
    time.sleep(60)
"""
    with python(program) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "SIGINT\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == -signal.SIGINT


def test_a_vote_of_one_process_is_immediate() -> None:
    vote = distributed.Vote()
    assert [vote(wish) for wish in (False, True, False)] == [False, True, False]


# Several processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, r"of 2 processes 1 did not come; the others are on "), (1, "could not meet the others")],
)
def test_a_missing_process_is_told_with_address_and_host(
    monkeypatch: pytest.MonkeyPatch, rank: int, message: str
) -> None:
    port = free_port()
    meeting = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in meeting.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(launch, "LAUNCH_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(distributed.LaunchError, match=message) as error:
        distributed.init_process_group()
    assert time.monotonic() - started < 30
    assert f"127.0.0.1:{port}" in str(error.value)
    assert socket.gethostname() in str(error.value)


def test_what_hangs_ends_with_status_2() -> None:
    program = """
import time
from distributed import launch
with launch.deadline(60, launch.LaunchError("too late")):
    pass
with launch.deadline(0.1, launch.LaunchError("no answer")):
    time.sleep(60)
"""
    child = python(program)
    assert child.communicate(timeout=60)[1] == "LaunchError: no answer\n"
    assert child.returncode == 2


def test_hosts_and_devices_are_each_joined_by_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined() -> dict[str, str]:
        return dict(BackendConfig(Backend(launch.backends())).device_backend_map)

    for device, of_device in {"cuda": "nccl", "xpu": "xccl"}.items():
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=device: torch.device(kind))
        assert joined() == {"cpu": "gloo", device: of_device}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert joined() == {"cpu": "gloo"}


def test_one_process_of_a_launcher_is_joined_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    distributed.init_process_group()
    assert Accelerator().distributed_type == DistributedType.NO
    assert not torch.distributed.is_initialized()


def test_gloo_uses_the_network_of_the_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.choose_network("127.0.0.1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    launch.choose_network("127.0.0.1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("local", "network"), [("2", "ib0"), ("4", "lo")])
def test_other_hosts_are_not_sought_within_this_one(
    local: str, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where /etc/hosts gives a host's own name the address 127.0.1.1."""
    ways = {"node7": "127.0.0.1", "192.0.2.1": "10.0.0.7"}
    addresses = {"lo": [SimpleNamespace(address="127.0.0.1")], "ib0": [SimpleNamespace(address="10.0.0.7")]}
    monkeypatch.setattr(launch, "address_towards", lambda host, port: ways[host])
    monkeypatch.setattr(launch.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    launch.choose_network("node7", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == network


def report(host: str, **changes: Any) -> dict[str, Any]:
    return {
        "host": host,
        "trouble": "",
        "mark": host,
        "torch": "2.13.0",
        "train_params.lr": "0.001",
    } | changes


def test_equal_processes_fit_together() -> None:
    launch.raise_if_different([report("a"), report("a"), report("b")])


def test_what_differs_is_named_with_its_hosts() -> None:
    reports = [
        report("a"),
        report("a"),
        report("b", torch="2.12.1"),
        report("c", **{"train_params.lr": "0.1"}),
    ]
    with pytest.raises(distributed.LaunchError) as error:
        launch.raise_if_different(reports)
    assert "torch: 2.13.0 on a, c (process 0-1, 3); 2.12.1 on b (process 2)" in str(error.value)
    assert "train_params.lr: 0.001 on a, b (process 0-2); 0.1 on c (process 3)" in str(error.value)


def test_every_trouble_is_named_with_its_host() -> None:
    with pytest.raises(distributed.LaunchError, match=r"process 1 on b has no data file z1\.h5"):
        launch.raise_if_different([report("a"), report("b", trouble="has no data file z1.h5")])


@pytest.mark.parametrize(
    ("ranks", "text"), [([], ""), ([4], "4"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7")]
)
def test_ranks_in_short(ranks: list[int], text: str) -> None:
    assert launch.numbers(ranks) == text


def test_the_hash_of_the_code_follows_the_code(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "models" / "racoon.py").write_text("kernel = 4")
    before = launch.code_hash(tmp_path)
    (tmp_path / "tests" / "test_models.py").write_text("assert True")
    assert launch.code_hash(tmp_path) == before
    (tmp_path / "models" / "racoon.py").write_text("kernel = 2")
    assert launch.code_hash(tmp_path) != before


# One process


@pytest.fixture
def settings(tmp_path: Path, universe: Path) -> dict[str, dict[str, Any]]:
    return {
        "model_params": {"name": "run"},
        "data_params": {"datafile": str(universe), "synthetic": None},
        "train_params": {"log_dir": str(tmp_path / "runs" / "deep")},
    }


def test_preflight_of_one_process(settings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    line = distributed.preflight(Accelerator(cpu=True), settings)
    assert line.startswith(f"1 process ({socket.gethostname()}: 0), cpu, torch {torch.__version__}")
    assert list(tmp_path.iterdir()) == []


def test_preflight_needs_the_data(settings: dict[str, dict[str, Any]]) -> None:
    settings["data_params"]["datafile"] = "nowhere.h5"
    with pytest.raises(distributed.LaunchError, match=r"has no data file nowhere\.h5"):
        distributed.preflight(Accelerator(cpu=True), settings)
    settings["data_params"]["synthetic"] = {"size": 64}
    distributed.preflight(Accelerator(cpu=True), settings)


def test_preflight_needs_a_folder_that_can_be_written(settings: dict[str, dict[str, Any]]) -> None:
    settings["train_params"]["log_dir"] = "/proc/runs"
    with pytest.raises(distributed.LaunchError, match="cannot write /proc"):
        distributed.preflight(Accelerator(cpu=True), settings)


def test_alone_an_error_is_its_own() -> None:
    def fail() -> None:
        with distributed.raise_on_all_ranks():
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()


def test_what_all_raise_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(error: Exception) -> str:
        launch.tell(error)
        return capsys.readouterr().err

    assert told(distributed.LaunchError("odd")) == "LaunchError: odd\n"
    monkeypatch.setenv("RANK", "1")
    assert told(distributed.LaunchError("odd")) == ""
    assert told(distributed.LaunchError("lost", on_all_ranks=False)) == "LaunchError: lost\n"
    assert told(OSError("full")) == "OSError: full\n"

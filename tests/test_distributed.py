"""Set-up, signals, rendezvous, preflight and errors of the ranks of a launch."""

import system
from system import UserError

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.distributed_c10d import Backend, BackendConfig

from training import distributed
from training.distributed import collectives, devices, launch, process

ROOT = Path(__file__).parents[1]
SET_BY_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND", "OMP_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "MIOPEN_USER_DB_PATH"),
    *("PYTORCH_MIOPEN_SUGGEST_NHWC", "PYTORCH_MIOPEN_SUGGEST_NHWC_BATCHNORM"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK"),
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    program = """
import resource, torch
from training.distributed import process

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
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    default, kept = map(int, done.stdout.split())
    assert kept < default / 10


# Threads


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(12, 4, 3), (2, 3, 1)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int) -> None:
    monkeypatch.setattr(system, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    distributed.setup_process()
    assert torch.get_num_threads() == threads
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_ranks_that_a_script_starts_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/clusters.md says, without LOCAL_WORLD_SIZE."""
    hosts = [socket.gethostname(), "other", socket.gethostname(), "other"]
    monkeypatch.setattr(system, "available_cores", lambda: 6)
    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "require_equal", lambda values: hosts)
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    distributed.setup_process()
    distributed.init_process_group()
    assert torch.get_num_threads() == 3
    assert system.local_world_size() == 2


def test_a_limit_on_threads_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(system, "thread_limits", lambda: "ulimit -u 20")
    assert distributed.run_program(distributed.setup_process) == 2
    assert "error: cannot start another thread; limits here: ulimit -u 20\n" in capsys.readouterr().err


def test_threads_set_by_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(system, "available_cores", lambda: 64)
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
def test_threads_set_by_the_launcher_are_not_the_users(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: list[str], chosen: bool
) -> None:
    with subprocess.Popen(["sh", "-c", "read x", *flags], env=environment, stdin=subprocess.PIPE) as launcher:
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        while not Path(f"/proc/{launcher.pid}/cmdline").read_bytes().startswith(b"sh\0"):
            time.sleep(0.01)  # the kernel shows the program and its environment shortly after Popen returns
        assert process.threads_set_by_user() is chosen
        launcher.communicate(b"\n")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
@pytest.mark.parametrize(
    ("flags", "source"),
    [
        (["launch", "--config_file", "old.yaml"], "mixed_precision of old.yaml"),
        (
            ["launch", "--config_file", "old.yaml", "--mixed_precision", "fp16"],
            "--mixed_precision of accelerate launch",
        ),
        (["launch"], "mixed_precision of default.yaml"),
        ([], "environment variable ACCELERATE_MIXED_PRECISION"),
    ],
)
def test_a_setting_of_the_launcher_is_named_with_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("default.yaml", "old.yaml"):
        Path(name).touch()
    monkeypatch.setattr(launch, "default_config_file", "default.yaml")
    command, pipe = ["sh", "-c", "echo; read x", *flags], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()  # it runs
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        assert launch.name_setting("mixed_precision") == source
        launcher.communicate(b"\n")


# Launches without effect, which launchers do not report


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "was to start several processes but started one",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 independent processes"),
    ],
)
def test_one_process_instead_of_several_warns(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    text: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.setup_process()
    assert text in capsys.readouterr().err


def test_cpu_ranks_become_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    distributed.setup_process()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "one"), ("WORLD_SIZE", "2"), ("SLURM_CPUS_PER_TASK", "4,4")],
)
def test_an_invalid_launch_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        distributed.setup_process()


# Signals


@pytest.mark.parametrize("number", distributed.SIGNALS)
def test_a_signal_requests_a_stop_and_others_do_not_change_the_end(number: signal.Signals) -> None:
    with distributed.StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == number.name
    for other in set(distributed.SIGNALS) - {signal.SIGINT}:
        os.kill(os.getpid(), other)


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with distributed.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested


def test_the_time_limit_requests_a_stop() -> None:
    assert not distributed.StopSignals(minutes=1).requested
    assert distributed.StopSignals(minutes=0).reason == "max_minutes"


def python(program: str) -> subprocess.Popen[str]:
    """A program in another interpreter: a fork of this process, which has threads, could deadlock."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


INTERRUPTED = """
import time
from training import distributed
with distributed.StopSignals() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.reason, flush=True)
    time.sleep(60)
"""


def test_a_second_interrupt_ends_at_once() -> None:
    with python(INTERRUPTED) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "SIGINT\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == -signal.SIGINT


def test_flags_of_one_rank_are_immediate() -> None:
    flags = distributed.AnyRankFlags()
    assert [flags(stop, True) for stop in (False, True, False)] == [
        (False, True),
        (True, True),
        (False, True),
    ]


# Settings of the launcher


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXED_PRECISION", "fp8", "ACCELERATE_MIXED_PRECISION: found 'fp8', allowed: no, fp16, bf16"),
        ("MIXED_PRECISION", "BF16", "found 'BF16', allowed"),  # Accelerate would not use it
        ("USE_FSDP", "true", "FSDP is not supported"),
        ("USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("USE_FSDP", "maybe", "ACCELERATE_USE_FSDP: found 'maybe', allowed: true or false"),
        ("USE_CPU", "maybe", "ACCELERATE_USE_CPU: found 'maybe'"),
        ("DYNAMO_BACKEND", "FOO", "DYNAMO_BACKEND: found 'foo', allowed: no, eager, .*inductor"),
        ("GRADIENT_ACCUMULATION_STEPS", "two", "GRADIENT_ACCUMULATION_STEPS: found 'two'"),
    ],
)
def test_settings_of_the_launcher_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=message):
        distributed.init_process_group()


def test_tpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_torch_xla_available", lambda: True)
    with pytest.raises(UserError, match="TPUs are not supported"):
        distributed.init_process_group()


def test_settings_of_the_launcher_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "True",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_DOWNCAST_BF16": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    distributed.init_process_group()
    accelerator = Accelerator()
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("bf16", 4)


# Devices


class Gpu:
    """A device module like torch.cuda."""

    def get_device_name(self, device: torch.device) -> str:
        return "NVIDIA H100"

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 60 * 2**30, 80 * 2**30


def test_the_first_sum_over_devices_has_a_deadline_and_names_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[float] = []

    @contextmanager
    def deadline(seconds: float, error: Exception) -> Iterator[None]:
        limits.append(seconds)
        yield
        limits.clear()

    def all_reduce(*arguments: Any, **options: Any) -> None:
        assert limits == [50]
        raise RuntimeError(
            "NCCL error in: x.cpp:1\nncclSystemError: a call failed.\nLast error:\nno route to host\n"
        )

    monkeypatch.setattr(launch, "deadline", deadline)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(UserError) as error:
        launch.sum_over_devices(Accelerator(cpu=True))
    assert str(error.value).startswith(f"rank 3 on {socket.gethostname()}: device cpu does not reach")
    assert "NCCL error in: x.cpp:1 ... no route to host" in str(error.value)


def test_the_hardware_of_a_cpu() -> None:
    line = distributed.describe_hardware(Accelerator(cpu=True))
    assert re.fullmatch(r"cpu \(.+\), \d+\.\d GiB of memory free, float32, \d+ CPU threads?", line)


@pytest.mark.parametrize(
    ("precision", "capability", "hip", "text"),
    [
        ("no", (8, 0), None, "float32 (TF32 in convolutions)"),
        ("no", (7, 5), None, "float32"),
        ("no", (9, 4), "6.2", "float32"),
        ("bf16", (9, 0), None, "bfloat16 mixed precision"),
    ],
)
def test_the_hardware_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int], hip: str | None, text: str
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: Gpu())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda:1"), mixed_precision=precision)
    line = distributed.describe_hardware(accelerator)
    assert line.startswith(f"cuda:1 (NVIDIA H100), 60.0 of 80.0 GiB of memory free, {text}, ")


def test_the_hardware_of_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    accelerator: Any = SimpleNamespace(device=torch.device("mps"), mixed_precision="no")
    line = distributed.describe_hardware(accelerator)
    assert re.fullmatch(r"mps \(.+\), memory shared with the CPU, float32, \d+ CPU threads?", line)


@pytest.fixture
def unused_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for GPUs that finds none."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.\nUpdate it.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.usefixtures("unused_gpu")
def test_a_torch_for_gpus_without_gpu_warns_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    devices.warn_of_unused_accelerator()
    pattern = r"warning: .* uses the CPU: .* built for CUDA 12\.8, but The NVIDIA driver .* too old\.\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)


@pytest.mark.usefixtures("unused_gpu")
@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "-1,-1"), ("CUDA_VISIBLE_DEVICES", "")],
)
def test_a_cpu_that_the_user_chose_does_not_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    devices.warn_of_unused_accelerator()
    assert capsys.readouterr().err == ""


def test_a_torch_for_cpus_beside_a_gpu_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, name, None)
    monkeypatch.setattr(devices, "GPU_FILES", (str(tmp_path),))
    devices.warn_of_unused_accelerator()
    assert re.search("the host has a GPU .* built without GPU support", capsys.readouterr().err)


def test_a_torch_for_gpus_without_a_driver_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.device_type() == "cpu"
    assert launch.backends() == "cpu:gloo"


def test_rocm_uses_channels_last_kernels_and_a_kernel_database_per_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("PYTORCH_MIOPEN_SUGGEST_NHWC", "PYTORCH_MIOPEN_SUGGEST_NHWC_BATCHNORM", "MIOPEN_USER_DB_PATH")
    monkeypatch.setattr(torch.version, "hip", None)
    devices.configure_miopen()
    assert not set(names) & os.environ.keys()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    devices.configure_miopen()
    first = os.environ.pop("MIOPEN_USER_DB_PATH")
    devices.configure_miopen()
    assert Path(first).is_dir()
    assert os.environ["MIOPEN_USER_DB_PATH"] != first
    assert [os.environ[name] for name in names[:2]] == ["1", "1"]
    monkeypatch.setenv("MIOPEN_USER_DB_PATH", "/scratch/mine")
    devices.configure_miopen()
    assert os.environ["MIOPEN_USER_DB_PATH"] == "/scratch/mine"


# Streams

STREAMS = """
import sys
from training.distributed.process import setup_streams
setup_streams()
for stream in (sys.stdout, sys.stderr) * 2:
    stream.write("part")
    stream.flush()
    print("x", file=stream)
print(open(sys.argv[1], "w").fileno(), file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_continues_without_its_streams(tmp_path: Path, redirection: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as when `| head` has seen enough
    shell = [
        "sh",
        "-c",
        f'exec "$@" {redirection}',
        "sh",
        sys.executable,
        "-c",
        STREAMS,
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        shell, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, check=False
    )
    os.close(writer)
    assert done.returncode == 0
    assert int((tmp_path / "out").read_text()) > 2


# Rendezvous


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_reported_with_address_and_host(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    port = free_port()
    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (variables | {"LAUNCH_SECONDS": 1}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError) as error:
        distributed.init_process_group()
    where = f"rank {rank} on {socket.gethostname()} did not connect to all 2 ranks at 127.0.0.1:{port}"
    assert str(error.value).startswith(where)
    if rank == 0:
        assert "1/2 clients joined" in str(error.value)


LATE = """
import time
from system import UserError
from training.distributed.process import deadline
with deadline(60, UserError("too late")):
    pass
with deadline(0.1, UserError("no answer")):
    time.sleep(60)
"""


def test_a_body_that_exceeds_its_deadline_ends_with_status_2() -> None:
    with python(LATE) as child:
        _, output = child.communicate(timeout=60)
    assert child.returncode == 2
    assert output == "error: no answer\n"


def test_hosts_and_devices_have_a_backend_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def backends() -> dict[str, str]:
        return dict(BackendConfig(Backend(launch.backends())).device_backend_map)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for device, of_device in {"cuda": "nccl", "xpu": "xccl"}.items():
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=device: torch.device(kind))
        assert backends() == {"cpu": "gloo", device: of_device}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert backends() == {"cpu": "gloo"}


def test_one_process_of_a_launcher_makes_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    distributed.init_process_group()
    assert Accelerator().distributed_type == DistributedType.NO
    assert not torch.distributed.is_initialized()


def test_gloo_uses_the_network_of_the_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.choose_network("127.0.0.1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    launch.choose_network("127.0.0.1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("local", "network"), [("2", "ib0"), ("4", "lo")])
def test_other_hosts_are_not_reached_by_the_loopback(
    local: str, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some /etc/hosts give a host's own name the address 127.0.1.1."""
    routes = {"node7": "127.0.0.1", "192.0.2.1": "10.0.0.7"}
    addresses = {"lo": [SimpleNamespace(address="127.0.0.1")], "ib0": [SimpleNamespace(address="10.0.0.7")]}
    monkeypatch.setattr(launch, "address_towards", lambda host, port: routes[host])
    monkeypatch.setattr(launch.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    launch.choose_network("node7", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == network


def test_differences_are_named_with_hosts_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[tuple[str, dict[str, Any]]] = [
        ("a", {"torch": "2.13.0", "lr": 0.001}),
        ("a", {"torch": "2.13.0", "lr": 0.001}),
        ("b", {"torch": "2.12.1", "lr": 0.001}),
        ("c", {"torch": "2.13.0", "lr": 0.1}),
    ]

    def require_equal(count: int) -> list[str]:
        reports = [{"host": host, "values": values} for host, values in ranks[:count]]
        monkeypatch.setattr(collectives, "all_gather_json", lambda value: reports)
        return distributed.require_equal(ranks[0][1])

    assert require_equal(2) == ["a", "a"]
    with pytest.raises(UserError) as error:
        require_equal(4)
    assert "\n  torch: 2.13.0 on a, c (ranks 0-1, 3); 2.12.1 on b (rank 2)" in str(error.value)
    assert "\n  lr: 0.001 on a, b (ranks 0-2); 0.1 on c (rank 3)" in str(error.value)
    assert error.value.on_all_ranks


@pytest.mark.parametrize(
    ("file", "content", "same"),
    [
        ("models/racoon.py", "# five before\nkernel  =  4", True),
        ("models/racoon.py", '"""A network."""\nkernel = 4', True),
        ("models/racoon.py", "kernel = 2", False),
        ("models/new.py", "kernel = 2", False),
        ("trainer.py", "epochs = 2", False),
        ("training/logger.py", "width = 80", True),
        ("datasets/preparation/pack.py", "width = 80", True),
        ("analysis/report.py", "width = 80", True),
        ("tests/test_models.py", "width = 80", True),
        ("README.md", "Text", True),
    ],
)
def test_the_hash_of_the_code_is_that_of_what_computes(
    tmp_path: Path, file: str, content: str, same: bool
) -> None:
    hashes = []
    for root, changes in ((tmp_path / "a", {}), (tmp_path / "b", {file: content})):
        files = {
            "trainer.py": "epochs = 1",
            "models/racoon.py": '"""Racoon."""\nkernel = 4  # cells',
        } | changes
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        hashes.append(distributed.code_hash(root))
    assert (hashes[0] == hashes[1]) == same


# Preflight


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


def test_preflight_names_a_folder_without_write_permission(settings: dict[str, dict[str, Any]]) -> None:
    settings["train_params"]["log_dir"] = "/proc/runs"
    with pytest.raises(UserError, match="cannot write to /proc"):
        distributed.preflight(Accelerator(cpu=True), settings)


# Errors


def test_one_rank_raises_its_own_error() -> None:
    def fail() -> None:
        with distributed.raise_on_all_ranks():
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()


def test_an_error_of_all_ranks_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(error: Exception) -> str:
        process.print_error(error)
        return capsys.readouterr().err

    assert printed(UserError("odd", on_all_ranks=True)) == "error: odd\n"
    monkeypatch.setenv("RANK", "1")
    assert printed(UserError("odd", on_all_ranks=True)) == ""
    assert printed(UserError("lost")) == "error: lost\n"
    assert printed(OSError("full")) == "error: full\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (OSError("disk full"), 2, "error: disk full\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore"),
            2,
            "error: out of memory: CUDA out of memory.\n",
        ),
        (MemoryError(), 2, "reduce train_params.batch_size"),
    ],
)
def test_errors_that_users_can_fix_have_status_2(
    capsys: pytest.CaptureFixture[str], error: Exception | None, status: int, message: str
) -> None:
    def program() -> None:
        if error:
            raise error

    assert distributed.run_program(program) == status
    assert message in capsys.readouterr().err


def test_a_bug_is_raised() -> None:
    def program() -> None:
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        distributed.run_program(program)

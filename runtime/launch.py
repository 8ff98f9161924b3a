"""Several processes: they meet, compare what each of them has, and fail together or not at all.

Nothing here hangs: a process that is missing, or that differs, ends all of them with a LaunchError.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

LAUNCH_SECONDS = float(os.environ.get("LAUNCH_SECONDS", "50"))
"""How long processes wait for one another at the start; raise it where importing torch takes minutes."""

RUN_SECONDS = 1800.0
"""Longest wait for another process after the start: the main process may write or verify files meanwhile."""


class LaunchError(ValueError):
    """The processes of a launch cannot work together."""

    def __init__(self, message: str, *, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        """Whether every process raises it, with the same words."""


def tell(error: Exception) -> None:
    """Print `error` on standard error: once per launch, not once per process, what all raise alike."""
    if os.environ.get("RANK", "0") == "0" or not getattr(error, "everywhere", False):
        # One write, so that the lines of several processes do not mix.
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()


def in_words(error: Exception) -> LaunchError | None:
    """What the user can do about an error of torch, which is told in its text alone; None for any other."""
    text = str(error)
    if dist.is_initialized() and any(
        word in text
        for word in (
            *("closed by peer", "reset by peer", "Broken pipe"),
            *("closed by remote peer", "remote process exited"),
        )
    ):
        return LaunchError("another process ended; its message says why", everywhere=False)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return LaunchError(
            f"there is not enough memory: {text.splitlines()[0] if text else 'malloc failed'}\n"
            "allowed: a smaller model_params.layer_param or train_params.batch_size, more "
            "train_params.gradient_accumulation_steps, or data_params.cache disk",
            everywhere=False,
        )
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        return LaunchError(
            f"the network cannot be compiled: {text.splitlines()[0]}\n"
            "allowed: train_params.compile auto or false, or what is missing",
            everywhere=False,
        )
    return None


def exit_status(work: Callable[[], None], mistakes: tuple[type[Exception], ...]) -> int:
    """Do `work`. Returns 0, or 2 after telling an error that users can mend: of `mistakes`, or `in_words`."""
    told: Exception | None
    try:
        work()
        return 0
    except mistakes as error:
        told = error
    except Exception as error:
        told = in_words(error) if isinstance(error, RuntimeError | MemoryError) else None
        if told is None:
            if dist.is_initialized():
                traceback.print_exc()
                leave(1)
            raise
    tell(told)
    if dist.is_initialized() and not getattr(told, "everywhere", False):
        leave(2)
    return 2


def leave(status: int) -> NoReturn:
    """End at once. At an orderly end NCCL would wait for the others, who wait for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def outlive_launcher() -> None:
    """Ignore SIGTERM from now on, because this process ends by itself, and all others with it.

    When the first has ended, torchrun and accelerate send SIGTERM to the rest, whose status would be lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def connect() -> None:
    """Meet the other processes, if there are any; to be called before the Accelerator is made.

    Raises:
        LaunchError: on every process, after LAUNCH_SECONDS, if one is missing or cannot be reached.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        os.environ.pop("LOCAL_RANK", None)  # or Accelerate joins the process to itself, by its device alone
        return
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=LAUNCH_SECONDS)
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    # torchrun and accelerate keep the store themselves.
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def alone(found: str) -> LaunchError:
        return LaunchError(
            f"process {rank} of {processes} on {socket.gethostname()} could not meet the others\n"
            f"  meeting point: {host}:{port} (MASTER_ADDR:MASTER_PORT)\n  found: {found}\n"
            "  needed: hosts that reach each other at that address and, from any port to any other, on the\n"
            "  networks that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name",
            everywhere=False,
        )

    with deadline(LAUNCH_SECONDS + 10, alone("no answer")):
        try:
            choose_network(host, port)
            server = dist.TCPStore(host, port, processes, keeps, timeout=limit, wait_for_workers=False)
            # After a worker died torchrun starts all anew, with the same store and what was said in it.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
            missing = await_all(store, rank, processes)
            if not missing:
                dist.init_process_group(
                    backends(), store=store, rank=rank, world_size=processes, timeout=limit
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise alone(str(error).splitlines()[0]) from error
    if missing:
        outlive_launcher()
        raise LaunchError(f"{missing}\n  meeting point: {host}:{port} (MASTER_ADDR:MASTER_PORT)")
    # From now on one process may keep the others waiting for longer.
    set_timeout(timedelta(seconds=RUN_SECONDS))
    # Its threads must end before the interpreter does, or the process may abort at exit.
    atexit.register(dist.destroy_process_group)


def backends() -> str:
    """What joins the processes: gloo the hosts' memories, and NCCL (or what the device has) the devices."""
    device = torch.accelerator.current_accelerator()
    if device is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@contextmanager
def deadline(seconds: float, error: LaunchError) -> Iterator[None]:
    """End the process with `error` and status 2 if what is inside takes longer, wherever it hangs.

    Gloo waits without limit for a process that fails to connect to it.
    """

    def end() -> None:
        tell(error)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def choose_network(host: str, port: int) -> None:
    """Let gloo use the network that leads to the meeting point.

    By itself it takes the one that the host's own name stands for, which may reach no other host.
    """
    own = address_towards(host, port)
    processes = os.environ["WORLD_SIZE"]
    if own.startswith("127.") and os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        # The name of the first host often means 127.0.1.1 there, where the other hosts cannot reach it.
        with suppress(OSError):
            own = address_towards("192.0.2.1", port)  # an address of nobody: by the default route
    for name, addresses in psutil.net_if_addrs().items():
        if own in (one.address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def address_towards(host: str, port: int) -> str:
    """The address of this host on the network that leads to another. Sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
    return own


def await_all(store: dist.Store, rank: int, processes: int) -> str:
    """Wait until all processes are there. Returns what to tell, the same on all, if some never came."""
    store.set(f"here/{rank}", socket.gethostname())
    if rank == 0:
        end = time.monotonic() + LAUNCH_SECONDS
        missing = list(range(processes))
        while missing := [other for other in missing if not store.check([f"here/{other}"])]:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        hosts = sorted({store.get(f"here/{n}").decode() for n in range(processes) if n not in missing})
        found = f"of {processes} processes {numbers(missing)} did not come; the others are on "
        store.set("missing", found + ", ".join(hosts) if missing else "")
    store.wait(["missing"], timedelta(seconds=LAUNCH_SECONDS + 5))
    return store.get("missing").decode()


def gather(report: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The JSON-able `report` of every process, in their order, on every process, within `seconds`."""
    if not dist.is_initialized():
        return [dict(report)]
    text = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
    limit = timedelta(seconds=seconds)
    try:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, torch.tensor([len(text)]), async_op=True).wait(limit)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(texts, padded, async_op=True).wait(limit)
    except RuntimeError as error:
        raise LaunchError(
            f"process {dist.get_rank()} on {socket.gethostname()} lost the others\n"
            f"  found: {str(error).splitlines()[0]}",
            everywhere=False,
        ) from error
    rows = zip(texts, lengths, strict=True)
    return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in rows]


@contextmanager
def together() -> Iterator[None]:
    """What fails inside on any process fails on all: there with its own error, elsewhere with a LaunchError.

    Whatever reads or writes files where several processes could see different things belongs inside.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    report = {"host": socket.gethostname(), "error": f"{type(mine).__name__}: {mine}" if mine else ""}
    reports = gather(report, RUN_SECONDS)
    failed = [(rank, other) for rank, other in enumerate(reports) if other["error"]]
    if failed:
        outlive_launcher()
    if mine:
        vars(mine)["everywhere"] = all(other["error"] == report["error"] for other in reports)
        raise mine
    if failed:
        rank, other = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise LaunchError(f"process {rank} on {other['host']}{more}: {other['error']}")


def preflight(accelerator: Accelerator, config: Mapping[str, Any]) -> str:
    """Compare all processes before the first step. Returns a line that says what runs where.

    `config` is the resolved configuration, {section: {key: value}}.

    Raises:
        LaunchError: on every process, within a minute, naming what is wrong or differs and on which hosts.
    """
    check_device(accelerator)
    report = describe(accelerator, config)
    folder = existing(Path(config["train_params"]["log_dir"]))
    mark: Path | None = None
    try:
        mark = Path(tempfile.mkstemp(prefix=".preflight-", dir=folder)[1])
    except OSError as error:
        report["trouble"] = report["trouble"] or f"cannot write {folder}: {error.strerror}"
    try:
        reports = gather(report | {"mark": str(mark or "")}, LAUNCH_SECONDS)
        # Every process looks for the file of the main one: is the folder the same?
        sees = gather({"mark": Path(reports[0]["mark"]).exists()}, LAUNCH_SECONDS)
    finally:
        if mark:
            mark.unlink()
    for other, seen in zip(reports, sees, strict=True):
        if not seen["mark"] and not other["trouble"]:
            other["trouble"] = f"does not see the run folder of {reports[0]['host']}: {folder} is not shared"
    require_equal(reports)
    processes = len(reports)
    hosts = {host: [n for n, r in enumerate(reports) if r["host"] == host] for host in hosts_of(reports)}
    places = ", ".join(f"{host}: {numbers(ranks)}" for host, ranks in hosts.items())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return (
        f"{processes} process{'es' if processes > 1 else ''} ({places}), {reports[0]['device']}, "
        f"torch {reports[0]['torch']}, accelerate {reports[0]['accelerate']}, "
        f"configuration {digest}, code {reports[0]['code']}"
    )


def check_device(accelerator: Accelerator) -> None:
    """Sum one number over all processes on their devices, within LAUNCH_SECONDS."""
    if not dist.is_initialized():
        return
    ones = torch.ones(1, device=accelerator.device)
    try:
        dist.all_reduce(ones, async_op=True).wait(timedelta(seconds=LAUNCH_SECONDS))
        total = int(ones.item())
    except RuntimeError as error:
        raise LaunchError(
            f"process {dist.get_rank()} on {socket.gethostname()}: its device {accelerator.device} does not "
            f"reach the others'\n  found: {str(error).splitlines()[0]}",
            everywhere=False,
        ) from error
    if total != dist.get_world_size():
        raise LaunchError(f"a sum of ones over {dist.get_world_size()} processes gave {total}")


def describe(accelerator: Accelerator, config: Mapping[str, Any]) -> dict[str, Any]:
    """What this process has. All but `host` and `trouble` should be the same everywhere."""
    data, trouble = config["data_params"], ""
    try:
        with open(data["datafile"], "rb") as file:
            size = f"{file.seek(0, os.SEEK_END)} bytes"
    except FileNotFoundError:
        size = "absent"
        if not data.get("synthetic"):
            trouble = f"has no data file {data['datafile']}"
    except OSError as error:
        size, trouble = "unreadable", f"cannot read the data file: {error}"
    return {
        "host": socket.gethostname(),
        "trouble": trouble,
        "device": accelerator.device.type,
        "mixed precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "code": code_hash(Path(__file__).parents[1]),
        "data file": size,
    } | {f"{section}.{key}": repr(value) for section, keys in config.items() for key, value in keys.items()}


def compare(mine: Mapping[str, Any]) -> None:
    """Raise a LaunchError on all processes, naming hosts and values, unless `mine` is the same on all."""
    report = {"host": socket.gethostname(), "trouble": "", **mine}
    require_equal(gather(report, RUN_SECONDS))


def require_equal(reports: Sequence[Mapping[str, Any]]) -> None:
    """Raise a LaunchError that names every trouble and every difference with its hosts."""
    lines = [
        f"process {rank} on {report['host']} {report['trouble']}"
        for rank, report in enumerate(reports)
        if report["trouble"]
    ]
    for key in reports[0].keys() - {"host", "trouble", "mark"}:
        values: dict[Any, list[int]] = {}
        for rank, report in enumerate(reports):
            values.setdefault(report.get(key), []).append(rank)
        if len(values) > 1:
            found = (
                f"{value} on {', '.join(hosts_of([reports[n] for n in ranks]))} (process {numbers(ranks)})"
                for value, ranks in values.items()
            )
            lines.append(f"{key}: {'; '.join(found)}")
    if lines:
        outlive_launcher()
        raise LaunchError("the processes of this launch do not fit together\n  " + "\n  ".join(sorted(lines)))


def code_hash(root: Path) -> str:
    """Hash of the Python files of this checkout, without its tests and whatever was installed inside it."""
    digest = hashlib.sha256()
    for path in sorted((*root.glob("*.py"), *root.glob("[a-z]*/*.py"))):
        if path.parent.name not in ("tests", "benchmarks"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def hosts_of(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The hosts of `reports`, in order, each once."""
    return list(dict.fromkeys(report["host"] for report in reports))


def numbers(ranks: Sequence[int]) -> str:
    """Ascending process numbers in short: 0-3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

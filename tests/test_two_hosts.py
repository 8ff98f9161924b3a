"""Two hosts, emulated by two network namespaces and a cable: a run survives the loss of one."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer, Launcher

ROOT = Path(__file__).parents[1]
HOSTS = ("alpha", "beta")
EPOCHS = 3


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    """The network namespace of each host; their addresses are 10.213.7.1 and 10.213.7.2."""
    if not shutil.which("ip"):
        pytest.skip("ip (iproute2) is not installed")
    namespaces = {host: f"{host}-{os.getpid()}" for host in HOSTS}
    try:
        try:
            for namespace in namespaces.values():
                ip(f"netns add {namespace}")
            first, second = namespaces.values()
            ip(f"link add cable netns {first} type veth peer name cable netns {second}")
            for number, namespace in enumerate(namespaces.values(), 1):
                ip(f"-n {namespace} address add 10.213.7.{number}/24 dev cable")
                ip(f"-n {namespace} link set cable up")
                ip(f"-n {namespace} link set lo up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield namespaces
    finally:
        for namespace in namespaces.values():
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


# trainer.py, which once, at its 12th step, waits for the loss of its host.
PROGRAM = """
import os, pathlib, sys, time, trainer
train_step, steps, lost = trainer.train_step, [], pathlib.Path(__file__).with_name("lost")
def step(run, batch, lr):
    steps.append(batch)
    if len(steps) == 12 and os.environ["RANK"] == "1" and not lost.exists():
        lost.touch()
        time.sleep(600)
    return train_step(run, batch, lr)
trainer.train_step = step
sys.exit(trainer.main())
"""


@pytest.fixture
def launch(
    fork_server: ForkServer, namespaces: dict[str, str], experiment: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[[int], dict[str, Launcher]]]:
    """Gives the command of multi_node.yaml on both hosts, with one rank each."""
    path = experiment(axes=[0], epochs=EPOCHS, save_every_steps=2, batch_size=48)
    (tmp_path / "program.py").write_text(PROGRAM)
    started: list[Launcher] = []

    def start(port: int) -> dict[str, Launcher]:
        command = ["accelerate", "launch", "--config_file", f"{ROOT}/accelerate_configs/multi_node.yaml"]
        command += ["--num_processes", "2", "--main_process_ip", "10.213.7.1"]
        command += ["--main_process_port", str(port), "--rdzv_conf", "timeout=50"]
        hosts = {}
        for rank, (host, namespace) in enumerate(namespaces.items()):
            hosts[host] = fork_server.launch(
                *(*command, "--machine_rank", str(rank), str(tmp_path / "program.py"), str(path)),
                out=tmp_path / f"{host}-{port}",
                host=(namespace, host),
                PYTHONPATH=str(ROOT),
            )
        started.extend(hosts.values())
        return hosts

    yield start
    for launcher in started:
        launcher.kill()


def test_a_run_resumes_after_a_host_is_lost(
    launch: Callable[[int], dict[str, Launcher]], tmp_path: Path
) -> None:
    first = launch(29511)
    first["beta"].wait_for((tmp_path / "lost").exists)
    first["beta"].kill()
    assert first["alpha"].wait() != 0
    assert "2 processes (alpha: 0, beta: 1), cpu" in first["alpha"].output

    second = launch(29512)
    for host in reversed(HOSTS):
        assert second[host].wait() == 0, second[host].output
    assert re.search("resumed from", second["alpha"].output)
    metrics = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if line["phase"] == "train"]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))

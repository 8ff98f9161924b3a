"""Two hosts, emulated by two network namespaces and a cable: a run survives the loss of one."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer

HOSTS = ("alpha", "beta")


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


def test_a_run_resumes_after_a_host_is_lost(
    fork_server: ForkServer, namespaces: dict[str, str], experiment: Callable[..., Path], tmp_path: Path
) -> None:
    epochs = 3
    arguments = [str(experiment(axes=[0], epochs=epochs, save_every_steps=2, batch_size=48))]
    launch = {
        "world_size": 2,
        "hosts": [[namespace, host] for host, namespace in namespaces.items()],
        "environment": {"MASTER_ADDR": "10.213.7.1"},
    }
    first, second = tmp_path / "first", tmp_path / "second"
    fatal_step = {"send": ["SIGKILL", "trainer.train_step", 11], "rank": 1}
    assert fork_server.train(arguments, first, **launch, **fatal_step, grace=60) == [2, -signal.SIGKILL]
    assert "2 processes (alpha: 0, beta: 1), cpu" in first.read_text()
    assert "error: another rank ended; see its error" in first.read_text()

    assert fork_server.train(arguments, second, **launch) == [0, 0], second.read_text()
    assert "resumed from" in second.read_text()
    metrics = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if line["phase"] == "train"]
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))

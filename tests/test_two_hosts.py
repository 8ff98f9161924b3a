"""Two hosts, as two network namespaces with a cable between them: a run survives the loss of one."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
HOSTS = ("alpha", "beta")
EPOCHS = 8


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[dict[str, str]]:
    """The namespace of each host. Their addresses are 10.213.7.1 and 10.213.7.2, their cards `cable`."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("ip (iproute2) or unshare (util-linux) is not installed")
    spaces = {host: f"{host}-{os.getpid()}" for host in HOSTS}
    try:
        try:
            for space in spaces.values():
                ip("netns", "add", space)
            first, second = spaces.values()
            ip(
                "link",
                "add",
                "cable",
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                second,
            )
            for number, space in enumerate(spaces.values(), 1):
                ip("-n", space, "address", "add", f"10.213.7.{number}/24", "dev", "cable")
                ip("-n", space, "link", "set", "cable", "up")
                ip("-n", space, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield spaces
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def on_host(space: str, host: str) -> list[str]:
    """What to put before a command that is to run on `host`."""
    return ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]


class Launch:
    """The command of multi_node.yaml, given on both hosts; one process each."""

    def __init__(self, spaces: dict[str, str], port: int, experiment: Path) -> None:
        launch = [str(Path(sys.executable).parent / "accelerate"), "launch"]
        launch += ["--config_file", str(ROOT / "accelerate_configs" / "multi_node.yaml")]
        launch += [
            "--num_processes",
            "2",
            "--main_process_ip",
            "10.213.7.1",
            "--main_process_port",
            str(port),
        ]
        launch += ["--rdzv_conf", "timeout=50"]
        self.hosts = {
            host: subprocess.Popen(
                [*on_host(space, host), *launch, "--machine_rank", str(rank), "trainer.py", str(experiment)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank, (host, space) in enumerate(spaces.items())
        }

    def ends(self, host: str) -> tuple[int, str]:
        output, _ = self.hosts[host].communicate(timeout=300)
        return self.hosts[host].returncode, output

    def kill(self, host: str) -> None:
        """All of a host at once, as when its power fails."""
        launcher = psutil.Process(self.hosts[host].pid)
        for process in [*launcher.children(recursive=True), launcher]:
            process.kill()

    def close(self) -> None:
        for host, launcher in self.hosts.items():
            with launcher:
                if launcher.poll() is None:
                    self.kill(host)


@pytest.fixture
def launch(network: dict[str, str], experiment: Callable[..., Path]) -> Iterator[Callable[[int], Launch]]:
    path = experiment(axes=[0], epochs=EPOCHS, save_every_steps=2, batch_size=48)
    launches = []

    def start(port: int) -> Launch:
        launches.append(Launch(network, port, path))
        return launches[-1]

    yield start
    for one in launches:
        one.close()


def test_a_run_goes_on_after_a_host_is_lost(launch: Callable[[int], Launch], tmp_path: Path) -> None:
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    first = launch(29511)
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        for host in HOSTS:
            assert first.hosts[host].poll() is None, first.ends(host)[1]
        time.sleep(0.02)
    first.kill("beta")
    status, output = first.ends("alpha")
    assert status != 0
    assert "2 processes (alpha: 0, beta: 1), cpu" in output
    before = len(metrics.read_text().splitlines())

    second = launch(29512)
    for host in reversed(HOSTS):
        status, output = second.ends(host)
        assert status == 0, output
    assert not re.search(rf"epoch +1/{EPOCHS} ", output)  # not from the beginning
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert before < len(lines)
    assert [line["epoch"] for line in lines if line["phase"] == "train"] == list(range(1, EPOCHS + 1))

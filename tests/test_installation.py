"""What `make venv` and pip install."""

import configparser
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def commands(*arguments: str) -> str:
    """What `make` would run to create .venv."""
    command = ["make", "--dry-run", "--always-make", "venv", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_make_venv_installs_pinned_versions() -> None:
    found = commands()
    assert "--requirement requirements.txt" in found
    assert "--constraint" not in found


def test_an_environment_on_top_of_another_keeps_its_torch() -> None:
    found = commands("VENV_OPTIONS=--system-site-packages")
    assert "-m venv --system-site-packages .venv" in found
    assert "requirements.txt" not in found, "it pins torch"
    assert found.index("> .venv/torch.txt") < found.index("--constraint .venv/torch.txt")


def allowed() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    lines += [line for extra in setup["options.extras_require"].values() for line in extra.split("\n")]
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("requirement", allowed(), ids=str)
def test_pinned_versions_are_allowed(requirement: Requirement) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    if requirement.name in pinned:
        assert pinned[requirement.name] in requirement.specifier

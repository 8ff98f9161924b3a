"""Atomic writes and JSON lines."""

import system

import os
import stat
from pathlib import Path

import pytest


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

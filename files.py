"""Files that survive a crash: atomic writes, fsync, JSON lines. Any module may import this one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`: after a crash it holds the old bytes or the new ones.

    The temporary file `NAME.part` is created exclusively, so a symbolic link of that name is never followed.
    Raises OSError, with `path` unchanged.
    """
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)  # left by a process that was killed
    try:
        write_new(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet and flush it to disk. Raises OSError that names `path`."""
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_directory(folder: Path) -> None:
    """Make the names in `folder` as durable as the files themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a JSON-lines file and flush it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, in order; empty if there is no such file.

    Skips lines that are not JSON objects, such as the last line of a process that was killed, with a warning.
    Raises OSError if it is not a regular file: opening a pipe would block.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise OSError(f"{path}: not a regular file. Remove it.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            json.dumps(record, allow_nan=False)  # Python reads NaN and infinity, which are not JSON
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            log.warning("%s: line %d is damaged and skipped", path, number)
    return records


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file atomically."""
    write_atomically(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest directory above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())

"""Logs of training steps, as JSON lines."""

import json
from pathlib import Path
from typing import Any

from gavamoe.errors import InputError

MAX_LOG_BYTES = 64 * 2**20


def read_log(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines log; a last line that was cut off by a crash is left out. [] without the file."""
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_LOG_BYTES:
        raise InputError(f"{path}: larger than the {MAX_LOG_BYTES} bytes that is read of a log")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
    return [line for line in entries if isinstance(line, dict)]

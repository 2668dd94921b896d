"""A child process of a campaign, and what it has reported so far."""

from __future__ import annotations

import collections
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ERROR_CHARACTERS_MAX = 4000
"""Of its standard error, the end is shown."""


class Process:
    """A child with its reports. Always killed and reaped at the end of its scope."""

    def __init__(self, arguments: dict[str, Any], errors: Path) -> None:
        self._errors = errors
        self._pending = b""
        self._lines: collections.deque[bytes] = collections.deque()
        with errors.open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "cascade_aio.testing.crashes", "child", json.dumps(arguments)],
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.child.stdout is not None
        self.child.stdout.close()

    @property
    def ended(self) -> bool:
        return self.child.poll() is not None

    def kill(self) -> int:
        """SIGKILL, if it has not ended; what was reported before can still be read. The exit code."""
        if not self.ended:
            self.child.kill()
        return self.child.wait()

    def events(self, until_s: float) -> Iterator[list[Any]]:
        """Reports as they come, until ``until_s`` on the monotonic clock or the end of the child."""
        assert self.child.stdout is not None
        pipe = self.child.stdout.fileno()
        while True:
            while self._lines:
                yield json.loads(self._lines.popleft())
            ready, _, _ = select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))
            if not ready:
                return
            data = os.read(pipe, 1 << 16)
            if not data:
                return
            *lines, self._pending = (self._pending + data).split(b"\n")
            self._lines.extend(lines)

    def error_text(self) -> str:
        """The end of what it wrote to standard error."""
        return self._errors.read_text(errors="replace")[-ERROR_CHARACTERS_MAX:]

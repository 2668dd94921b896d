"""What the tests with a real vLLM share: engines in processes, HTTP servers, node services, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt

PROMPT_TOKENS = 512
SERVED_SHARE_MIN = 0.96
SERVED_TOKENS_MIN = int(SERVED_SHARE_MIN * PROMPT_TOKENS)
BLOCK_TOKENS = 32

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "vllm"
ANSWER = "@answer "
PATIENCE_S = 280
"""For one start or answer of vLLM on a busy machine; nothing depends on it being shorter."""

STRAGGLERS_S = 20
"""For what the processes of a session do after its leader has ended."""

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
}


def transfer(**tier: Any) -> dict[str, Any]:
    """``kv-transfer-config`` with one secondary tier."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_spec",
            "cpu_bytes_to_use": 256 << 20,
            "block_size": 32,
            "secondary_tiers": [tier],
        },
    }


def cascade_tier(**settings: Any) -> dict[str, Any]:
    """A ``CascadeTier`` with a small store, or on a service."""
    small = {} if "service" in settings else {"shm_bytes": "128MiB"}
    return {"type": "CascadeTier", "module_path": "cascade_aio.integrations.vllm", **small, **settings}


def prompt_of(tokens: int, seed: int) -> list[int]:
    """As the example makes them."""
    return [(number * 7919 + 13 + seed * 104729) % 31991 for number in range(tokens)]


def damage(root: Path) -> int:
    """Zero some bytes in the payload of every block of the root, behind its back; returns how many."""
    count = 0
    for path in root.glob("writers/*/*.seg"):
        content = bytearray(path.read_bytes())
        header = fmt.decode_segment_header(memoryview(content), path=str(path))
        assert header is not None
        at = PAGE_BYTES
        while content[at : at + len(fmt.RECORD_MAGIC)] == fmt.RECORD_MAGIC:
            record = fmt.decode_record(memoryview(content)[at:], header.identity, path=str(path), offset=at)
            assert record is not None
            if record.kind == fmt.BLOCK:
                middle = (at + record.header_pages * PAGE_BYTES + record.end) // 2
                content[middle : middle + 64] = bytes(64)
                count += 1
            at = record.end
        path.write_bytes(content)
    return count


def remove_arena(arena: Path) -> None:
    """What a service keeps in shared memory for the next one."""
    for path in arena.parent.glob(f"{arena.name}*"):
        path.unlink()


class Process:
    """A child whose output is kept; killed with its whole session at the end."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
            **options,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.lines.append(line.rstrip("\n"))
            self._new.put(self.lines[-1])
        self._new.put(None)

    def wait_line(self, start: str) -> str:
        """The rest of the next line that begins with ``start``."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            line = self._new.get(timeout=max(0.1, end_s - time.monotonic()))
            assert line is not None, f"the process ended: {self.log[-4000:]}"
            if line.startswith(start):
                return line.removeprefix(start)

    def say(self, text: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(text + "\n")
        self._child.stdin.flush()

    def crash(self) -> None:
        """SIGKILL to every process of its session but Python's resource trackers, which then clean up and end."""
        for process_id in _session(self.pid):
            command = Path(f"/proc/{process_id}/cmdline").read_bytes()
            if b"resource_tracker" not in command:
                os.kill(process_id, signal.SIGKILL)
        self.end()

    def end(self, number: signal.Signals | None = None) -> None:
        """Wait for the end, after a signal to the process itself, if any; then nothing of its session is left."""
        if number is not None:
            self._child.send_signal(number)
        try:
            self._child.wait(PATIENCE_S)
            end_s = time.monotonic() + STRAGGLERS_S
            while _session(self.pid) and time.monotonic() < end_s:
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._reader.join(PATIENCE_S)
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _session(leader: int) -> list[int]:
    """Living processes of the session, the leader first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state != "Z":
                    found.append(int(entry.name))
    return sorted(found, key=lambda number: number != leader)


@contextlib.contextmanager
def process(command: list[str], **options: Any) -> Iterator[Process]:
    child = Process(command, **options)
    try:
        yield child
    finally:
        if child.running:
            child.end(signal.SIGKILL)


@contextlib.contextmanager
def engine(model: Path, config: dict[str, Any], **options: Any) -> Iterator[Engine]:
    """An engine without a server; ends in order when the scope does."""
    with process(
        [sys.executable, str(HERE / "vllm_child.py"), str(model), json.dumps(config), json.dumps(options)]
    ) as child:
        child.wait_line(ANSWER)
        yield Engine(child)
        child.say("")
        child.end()


class Engine:
    def __init__(self, child: Process) -> None:
        self._child = child

    @property
    def log(self) -> str:
        return self._child.log

    def ask(self, tokens: int, seed: int = 0) -> dict[str, Any]:
        self._child.say(json.dumps([tokens, seed]))
        answer: dict[str, Any] = json.loads(self._child.wait_line(ANSWER))
        return answer

    def forget(self, *, connector: bool) -> None:
        """The engine's own prefix cache, and what its connector stored so far."""
        self._child.say(json.dumps(connector))
        assert json.loads(self._child.wait_line(ANSWER)) is True


class Server:
    """An OpenAI HTTP server of vLLM: three processes."""

    def __init__(self, child: Process, port: int) -> None:
        self.child = child
        self._url = f"http://127.0.0.1:{port}"

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """Greedy tokens and how many of the prompt's were loaded or cached."""
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "detokenize": False,
        }
        answer = json.loads(self._get("/v1/completions", body))
        details = answer["usage"].get("prompt_tokens_details") or {}
        return {"tokens": answer["choices"][0]["token_ids"], "cached_tokens": details.get("cached_tokens") or 0}

    def metric(self, name: str) -> float:
        """The sum over all labels; 0 where the server does not have it."""
        lines = self._get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def _get(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            text: str = response.read().decode()
        return text

    def wait_ready(self) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while True:
            assert self.child.running, self.child.log[-4000:]
            try:
                self._get("/health")
                return
            except OSError:
                assert time.monotonic() < end_s, self.child.log[-4000:]
                time.sleep(0.5)


@contextlib.contextmanager
def server(model: Path, config: dict[str, Any]) -> Iterator[Server]:
    """Killed at the end of the scope if it still runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    options = ["--served-model-name", "model", "--host", "127.0.0.1", "--skip-tokenizer-init", "--enforce-eager"]
    cache = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "8192", "--enable-prompt-tokens-details"]
    with process([*command, *options, *cache, "--kv-transfer-config", json.dumps(config)]) as child:
        running = Server(child, port)
        running.wait_ready()
        yield running


@contextlib.contextmanager
def node_service(root: Path) -> Iterator[tuple[Process, str]]:
    """``cascade-aio serve`` and its socket."""
    path = str(root.parent / "s")
    serve = [sys.executable, "-m", "cascade_aio", "serve", str(root), "--shm", "128MiB", "--socket", path]
    with process(serve) as child:
        end_s = time.monotonic() + PATIENCE_S
        while not os.path.exists(path):
            assert child.running, child.log
            assert time.monotonic() < end_s, child.log
            time.sleep(0.05)
        yield child, path
        if child.running:
            child.end(signal.SIGTERM)

"""The status page and the metrics: what they show, and that they only show."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import importlib.resources
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cascade_aio.config import make_config
from cascade_aio.daemon import ServiceConfig, connect
from cascade_aio.daemon.running import run_service
from cascade_aio.daemon.samples import Forest, Sampler
from cascade_aio.daemon.service import Service
from cascade_aio.errors import ConfigError
from cascade_aio.testing.store import block_bytes, eventually
from tests.service.conftest import KEYS, running

pytest.importorskip("starlette", reason="the extra 'service' is not installed: pip install 'cascade_aio[service]'")
pytest.importorskip("uvicorn", reason="the extra 'service' is not installed: pip install 'cascade_aio[service]'")
parser = pytest.importorskip(
    "prometheus_client.parser", reason="the extra 'service' is not installed: pip install 'cascade_aio[service]'"
)

from cascade_aio.daemon.page import UNHEALTHY_SECONDS, illness, listening, page  # noqa: E402

BROWSER_SECONDS_MAX = 120
ANSWER_SECONDS_MAX = 60


@contextlib.asynccontextmanager
async def shown(service: Service) -> AsyncIterator[str]:
    """The page of a service, at a free port."""
    with listening("127.0.0.1:0") as listener:
        async with page(service.node, listener) as url:
            yield url


def fetch(url: str) -> tuple[int, str, str]:
    """(status, content type, body)."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS_MAX) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", ""


def metrics(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_tell_what_happened(tmp_path: Path) -> None:
    async with (
        running(tmp_path / "kv") as service,
        shown(service) as url,
        connect(service.socket_path) as store,
    ):
        name = await store.put(*block_bytes(1), prefix=KEYS[0])
        await store.put(*block_bytes(1), prefix=KEYS[1])
        async with store.get(name):
            pass
        assert not await store.contains(KEYS[5])

        async def told() -> bool:
            _, kind, text = await asyncio.to_thread(fetch, url + "metrics")
            assert kind.startswith("text/plain")
            found = metrics(text)
            assert ("cascade_misses_total", ()) in found
            assert found[("cascade_tier_capacity_bytes", (("tier", "shm"),))] == 16 << 20
            return (
                found[("cascade_puts_total", ())] == 2
                and found[("cascade_dedup_bytes_total", ())] == 70_000 + 65_536
                and found[("cascade_clients", ())] == 1
                and found[("cascade_request_seconds_count", (("request", "Seal"),))] == 2
            )

        await eventually(told)


async def test_the_page_is_complete_and_read_only(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, shown(service) as url:
        assert url.startswith("http://127.0.0.1:")
        status, kind, html = await asyncio.to_thread(fetch, url)
        assert (status, kind) == (200, "text/html; charset=utf-8")
        _, _, script = await asyncio.to_thread(fetch, url + "status.js")
        for text in (html, script.replace("http://www.w3.org/2000/svg", "")):
            assert "http" not in text, "an asset from elsewhere"
        assert "innerHTML" not in script
        _, _, raw = await asyncio.to_thread(fetch, url + "status.json")
        snapshot = json.loads(raw)
        assert [tier["tier"] for tier in snapshot["tiers"]] == ["shm", "disk"]
        assert snapshot["prefixes"]["roots"] == []
        assert (await asyncio.to_thread(fetch, url + "nothing"))[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            request = urllib.request.Request(url, data=b"x", method=method)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                await asyncio.to_thread(urllib.request.urlopen, request, timeout=ANSWER_SECONDS_MAX)
            with refusal.value:
                assert refusal.value.code == 405


async def test_events_follow_the_store(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, shown(service) as url:

        def read_two() -> list[dict[str, Any]]:
            snapshots = []
            with urllib.request.urlopen(url + "events", timeout=ANSWER_SECONDS_MAX) as response:
                for line in response:
                    if line.startswith(b"data: "):
                        snapshots.append(json.loads(line[6:]))
                    if len(snapshots) == 2:
                        break
            return snapshots

        first, second = await asyncio.to_thread(read_two)
        assert second["time"] > first["time"]
        assert len(second["history"]) > len(first["history"])


async def test_prefixes_are_a_tree_of_ids(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        ids = [await store.put(*block_bytes(i), prefix=KEYS[i], parent=KEYS[i - 1] if i else None) for i in range(3)]
        await store.put(*block_bytes(9))
        sampler = Sampler(service.node)
        task = asyncio.ensure_future(sampler.run())
        await eventually(lambda: sampler.latest["prefixes"]["roots"])
        task.cancel()
        chain, single = sampler.latest["prefixes"]["roots"]
        assert (chain["block"], chain["blocks"], chain["run"]) == (str(ids[0]), 3, 3)
        assert chain["bytes"] == 3 * (70_000 + 65_536)
        assert single["blocks"] == 1
        text = json.dumps(sampler.latest, default=str)
        assert all(str(key) not in text for key in KEYS), "prefix keys are nobody's business"


def test_sums_over_subtrees() -> None:
    parents = {0: -1, 1: 0, 2: 0, 3: 1, 4: 99, 5: 6, 6: 5}  # 4: its parent is gone; 5 and 6: a cycle
    forest = Forest(parents, dict.fromkeys(parents, 10))
    assert forest.largest(-1, 5) == [0, 4]
    assert (forest.blocks[0], forest.bytes[1]) == (4, 20)
    tree = forest.tree(0, 4)
    assert [child["row"] for child in tree["children"]] == [1, 2]


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999", ":http"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="http="):
        ServiceConfig(http=address)


async def test_an_address_in_use_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with listening("127.0.0.1:0") as listener:
        config = make_config(tmp_path / "kv", shm_bytes="16MiB", arena=f"cascade-test-{uuid.uuid4().hex[:12]}")
        taken = ServiceConfig(http=f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ConfigError, match="another address"):
            await run_service(config, taken, on_ready=lambda service: None)
    assert not (tmp_path / "kv").exists()
    assert not list(Path("/dev/shm").glob(f"{config.arena}*"))


async def test_health_is_told_to_who_would_start_it_again(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, shown(service) as url:
        assert await asyncio.to_thread(fetch, url + "healthz") == (200, "text/plain; charset=utf-8", "ok\n")
        service.node.store.parts.context.fail(RuntimeError("on purpose"))
        latest = Sampler(service.node).latest
        assert "on purpose" in (illness(latest, latest["taken_s"]) or "")

        async def ill() -> bool:
            return (await asyncio.to_thread(fetch, url + "healthz"))[0] == 503

        await eventually(ill)


def test_a_service_that_answers_nobody_is_ill() -> None:
    latest = {"failure": None, "taken_s": 100.0}
    assert illness(latest, 100.0 + UNHEALTHY_SECONDS) is None
    assert illness(latest, 101.0 + UNHEALTHY_SECONDS) == "the service has not answered for 11 s\n"


def browser() -> str:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    return chromium


class DyingPage(http.server.BaseHTTPRequestHandler):
    """The page's own files, one event, and then nothing any more."""

    snapshot: ClassVar[bytes]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kinds = {"/": ("status.html", "text/html"), "/status.js": ("status.js", "text/javascript")}
        if self.path in kinds:
            name, kind = kinds[self.path]
            self._answer(kind, (importlib.resources.files("cascade_aio.daemon") / "assets" / name).read_bytes())
        elif self.path == "/events" and self.asked.count("/events") == 1:
            self._answer("text/event-stream", b"data: " + self.snapshot + b"\n\n")
        else:
            self.send_error(503)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


async def test_a_browser_says_that_the_connection_is_dead(tmp_path: Path) -> None:
    """It shows what it heard last, and that nothing comes any more."""
    chromium = browser()
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        await store.put(*block_bytes(1))
        DyingPage.snapshot = json.dumps(Sampler(service.node).latest, default=str).encode()
        DyingPage.asked = []
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), DyingPage) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                url = f"http://127.0.0.1:{server.server_address[1]}/"
                dom = await asyncio.to_thread(_dump, chromium, url, tmp_path / "browser")
            finally:
                await asyncio.to_thread(server.shutdown)
                await asyncio.to_thread(thread.join)
    assert "/events" in DyingPage.asked
    assert "1 blocks" in dom
    assert "connection lost" in dom
    assert 'class="dead"' in dom


@pytest.mark.parametrize("blocks", [0, 40])
async def test_a_browser_draws_it(tmp_path: Path, blocks: int) -> None:
    """An empty and a full store in headless Chromium."""
    chromium = browser()
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        for i in range(blocks):
            await store.put(*block_bytes(i, 300_000, 300_000), prefix=KEYS[0] if i == 0 else None)
        async with shown(service) as url:
            url_json = url + "status.json"

            async def sampled() -> bool:
                _, _, raw = await asyncio.to_thread(fetch, url_json)
                return len(json.loads(raw)["prefixes"]["roots"]) == min(blocks, 20)

            await eventually(sampled)
            dom = await asyncio.to_thread(_dump, chromium, url + "?once", tmp_path / "browser")
    assert f"{blocks} blocks" in dom
    assert "one look" in dom
    assert ("no blocks yet" in dom) == (blocks == 0)


def _dump(chromium: str, url: str, profile: Path) -> str:
    """The document that Chromium makes of ``url``."""
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", url],
        capture_output=True, text=True, timeout=BROWSER_SECONDS_MAX, check=True,
    )  # fmt: skip
    return done.stdout

"""Realistic KV bytes in a file: float16, a scale per layer, outlier channels in the keys; seeded, resumable.

Key and value of a block are each cut into the model's layers. Values are normal with a scale of their layer (spread
like a log-normal); keys have, in addition, a scale per channel of the head, with a few channels an order of magnitude
larger, as rotary-embedding models show. Neither constant nor white: a compressor finds a little, as in real caches.
Block ``i`` depends on seed and ``i`` alone, so an interrupted file is continued and ends the same.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bench import machine
from bench.results import BenchError
from cascade_aio.workload import LLAMA_70B

FORMAT = 1
MANIFEST = "manifest.json"
CONTENT = "kv.bin"
LAYERS = LLAMA_70B.layers
CHANNELS = LLAMA_70B.head_dim
LAYER_SPREAD = 0.6
"""Standard deviation of the logarithm of a layer's scale."""
OUTLIER_CHANNELS = 4
OUTLIER_SCALE = 8.0
FLOAT16_MAX = 60_000.0


def make_block(block_bytes: int, seed: int, index: int) -> npt.NDArray[np.float16]:
    """Block ``index``: ``block_bytes / 2`` finite float16 values, key half first."""
    random = np.random.Generator(np.random.SFC64([seed, index]))
    model = np.random.Generator(np.random.PCG64(seed))  # scales are of the model, not of the block
    half = block_bytes // 4
    values = np.empty((2, half), np.float16)
    for part, of_key in enumerate((True, False)):
        scales = np.exp(model.normal(0.0, LAYER_SPREAD, LAYERS)).astype(np.float32)
        channels = np.ones(CHANNELS, np.float32)
        if of_key:
            channels[model.choice(CHANNELS, OUTLIER_CHANNELS, replace=False)] = OUTLIER_SCALE
        numbers = random.standard_normal(half, dtype=np.float32)
        whole = half // CHANNELS * CHANNELS
        numbers[:whole].reshape(-1, CHANNELS)[:] *= channels
        for layer in range(LAYERS):
            numbers[half * layer // LAYERS : half * (layer + 1) // LAYERS] *= scales[layer]
        np.clip(numbers, -FLOAT16_MAX, FLOAT16_MAX, out=numbers)
        values[part] = numbers
    return values.reshape(-1)


def generate(
    folder: pathlib.Path, block_bytes: int, blocks: int, seed: int, progress: Callable[[int, int], None]
) -> pathlib.Path:
    """Write (or finish) the file of ``blocks`` blocks in ``folder`` and return it; ``progress`` gets (done, all).

    Blocks generated on all cores, one file, appended in order. Raises ``BenchError`` if the folder holds other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT,
        "dtype": "float16",
        "layers": LAYERS,
        "head_dim": CHANNELS,
        "block_bytes": block_bytes,
        "seed": seed,
    }
    _claim(folder / MANIFEST, manifest)
    path = folder / CONTENT
    with path.open("ab") as file:
        done = min(file.tell() // block_bytes, blocks)
        if file.tell() < blocks * block_bytes:
            file.truncate(done * block_bytes)
        progress(done, blocks)
        with ThreadPoolExecutor(machine.cores()) as pool:
            ahead = 2 * machine.cores()
            jobs = {
                index: pool.submit(make_block, block_bytes, seed, index)
                for index in range(done, min(done + ahead, blocks))
            }
            for index in range(done, blocks):
                block = jobs.pop(index).result()
                if index + ahead < blocks:
                    jobs[index + ahead] = pool.submit(make_block, block_bytes, seed, index + ahead)
                file.write(block.data.cast("B"))
                progress(index + 1, blocks)
        file.flush()
        os.fsync(file.fileno())
    return path


def find(folder: pathlib.Path, needed_bytes: int) -> pathlib.Path:
    """The content file in ``folder``. Raises ``BenchError`` if there is none or it is too small."""
    path = folder / CONTENT
    if not path.exists() or not (folder / MANIFEST).exists():
        raise BenchError(f"{folder} holds no generated data: run `python -m bench generate --out {folder}`")
    if path.stat().st_size < needed_bytes:
        have, need = path.stat().st_size >> 20, needed_bytes >> 20
        raise BenchError(f"{folder} holds {have} MiB and {need} MiB are needed: generate more blocks")
    return path


def _claim(path: pathlib.Path, manifest: dict[str, object]) -> None:
    if path.exists():
        found = json.loads(path.read_text())
        if found != manifest:
            raise BenchError(f"{path.parent} holds data of another kind ({found}): name another folder")
        return
    if any(path.parent.iterdir()):
        raise BenchError(f"{path.parent} is not empty and holds no generated data: name another folder")
    path.write_text(json.dumps(manifest) + "\n")

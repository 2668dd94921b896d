"""Settings: sizes as people write them, one frozen ``StoreConfig``, and where its values come from.

Inside the package a configuration is always a valid, frozen ``StoreConfig``: it cannot be built
otherwise. At the edge ``load_config`` merges arguments, ``CASCADE_*`` variables and a TOML file, in
this order, over the defaults; ``make_config`` takes arguments only. Both accept sizes as text.
Errors name the key, where its value came from, and the cure.

pydantic is imported inside ``load_config`` only: an embedded store that is configured by arguments
never pays for it. This module must not know any tier, file or ring.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal

from cascade_aio.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

ALIGNMENT_BYTES = 4096
"""Sizes on the data path are multiples of it (O_DIRECT on 4K-sector disks, pages)."""
STRIPE_ALIGNMENT_BYTES = 64 * KIB
"""Lustre takes stripe sizes in multiples of 64 KiB."""
SIZE_BYTES_MAX = 1 << 62
"""Larger than any medium; keeps sums of sizes within 64 bits."""
SHM_BYTES_MIN = MIB
ARENA_NAME_BYTES_MAX = 200
"""Leaves room for a suffix within the 255 bytes that file systems take."""
ENVIRONMENT_PREFIX = "CASCADE_"
CONFIG_FILE_VARIABLE = "CASCADE_CONFIG"
FOREIGN_VARIABLES = (CONFIG_FILE_VARIABLE, "CASCADE_TEST_", "CASCADE_BENCH_", "CASCADE_EXTRAS")
"""Beginnings of variables of ours that are no settings of a store: tests, benchmarks, set-up."""

_UNIT_BYTES = {
    "": 1,
    "b": 1,
    **{prefix: 1024**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE_PATTERN = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_SIZE_CURE = "write a size such as 67108864, '64MiB', '1.5 TiB' or '64 GB'"


def parse_size(size: int | str) -> int:
    """Bytes named by ``size``: an int, or text such as ``"64GiB"``, ``"64 GB"`` (decimal), ``"512k"``.

    One letter is binary (``k`` = 1024), ``…iB`` is binary, ``…B`` is decimal, as in GNU tools; case
    does not matter. Fractions of a unit are allowed, fractions of a byte are cut off. Raises
    ``ConfigError`` for anything else, also for negative sizes and bools.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"{size!r} is not a size; {_SIZE_CURE}")
    if isinstance(size, str):
        match = _SIZE_PATTERN.fullmatch(size)
        unit_bytes = _UNIT_BYTES.get(match[2].lower()) if match else None
        if match is None or unit_bytes is None:
            raise ConfigError(f"{size[:80]!r} is not a size; {_SIZE_CURE}")
        size = int(Decimal(match[1].replace("_", "")) * unit_bytes)
    if not 0 <= size <= SIZE_BYTES_MAX:
        raise ConfigError(f"a size must be between 0 and 2**62 bytes, not {size}; {_SIZE_CURE}")
    return size


def format_size(size_bytes: int) -> str:
    """``size_bytes`` in the largest binary unit that keeps it at 1 or above, such as ``"1.5 GiB"``."""
    for unit, unit_bytes in (("PiB", 1024 * TIB), ("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= unit_bytes:
            return f"{size_bytes / unit_bytes:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{size_bytes} B"


@dataclasses.dataclass(frozen=True, slots=True)
class StoreConfig:
    """All settings of one embedded store; building one validates it (``ConfigError`` names the key)."""

    root: str
    """Directory of the segment files; may be shared between processes and nodes."""
    shm_bytes: int = GIB
    """Size of the arena, reserved at open."""
    gpu_bytes: int | None = None
    """Size of the arena in the memory of each of ``gpu_devices``; ``None``: no GPU tier, and CUDA is never touched."""
    gpu_devices: tuple[int, ...] = (0,)
    """Devices with an arena, as CUDA counts them; text such as ``"0,1"`` and a single number will do."""
    disk_bytes: int | None = None
    """Budget of the segment files of this writer, never exceeded; ``None``: what the file system has."""
    when_full: Literal["evict", "refuse"] = "evict"
    """A file system without room: ``evict`` the coldest blocks, or ``refuse`` (``flush`` raises ``TierFullError``)."""
    compaction_bandwidth: int = 256 * MIB
    """Bytes per second that compaction copies at leisure; 0: no compaction, what is live in a victim is evicted."""
    arena: str | None = None
    """Name of the arena file in ``shm_dir``; ``None``: derived from user and root, see ``arena_name``."""
    shm_dir: str = "/dev/shm"
    io_backend: Literal["auto", "uring", "threads"] = "auto"
    """``auto`` falls back to threads and says so; ``uring`` fails at open where it is not available."""
    digest: Literal["sha256", "blake3"] = "sha256"
    """What block ids are made of; fixed for a root once it has blocks."""
    segment_bytes: int = GIB
    """A segment file is sealed when it has grown to this."""
    request_bytes_max: int = 4 * MIB
    """Larger reads and writes are split into requests of at most this size."""
    requests_in_flight_max: int = 64
    bytes_in_flight_max: int = 128 * MIB
    tail_bytes_max: int | None = None
    """Puts wait while more than this is not on stable storage yet; ``None``: half of the arena."""
    tail_seconds_max: float = 1.0
    """What was put is written and synced after so long without a flush."""
    put_wait_seconds_max: float = 30.0
    """How long a put or get waits for arena room before ``TierFullError``."""
    scrub_bandwidth: int | None = None
    """Bytes per second at which own segments are read again and again in search of damage; ``None``: not at all."""
    adopt_seconds: float | None = 60.0
    """How often writers of the root that died are looked for and their segments adopted; ``None``: only on request."""
    read_seconds_max: float | None = 30.0
    """Deadline of a disk read; a late block is a miss. ``None``: no deadline."""
    remote_seconds_max: float = 2.0
    """With a communicator: a rank that does not answer for so long is left alone for a while, and the disk serves."""
    stall_seconds_max: float = 30.0
    """A write or sync that takes longer: the storage hangs. ``flush`` fails then, and closing gives up."""
    workers: int | None = None
    """Threads that copy, digest and checksum; ``None``: the CPUs this process may use."""
    stripe_count: int = 16
    """Lustre stripes of new segment files; -1: all targets."""
    stripe_bytes: int = 4 * MIB
    stripe: Literal["auto", "off"] = "auto"
    index_blocks_max: int = 1 << 23
    """Blocks the index may hold, those of other writers of the root included; reserves address space, not memory."""
    eviction: Literal["hit-density", "prefix-lru"] = "hit-density"
    """Which blocks leave a full tier: ``hit-density`` learns when blocks come back, ``prefix-lru`` is cheaper."""
    read_only: bool = False
    """Only look: the root must exist, nothing in it is written, locked, recovered or created."""
    may_lose_unflushed: bool = False
    """Evict unwritten blocks from the arena without writing them."""
    warm_restart: bool = False
    """Keep the arena when the store is closed or its process dies, and start the next time with what it holds."""
    register_buffers: bool = True
    """Register the arena with io_uring where the memlock limit allows."""

    def __post_init__(self) -> None:
        validate_config(self)


@dataclasses.dataclass(frozen=True, slots=True)
class _Range:
    """Allowed values of a number: ``minimum <= n <= maximum``, and a multiple of ``multiple``."""

    minimum: float
    maximum: float
    multiple: int = 1
    optional: bool = False
    size: bool = False
    unit: str = ""


_RANGES = {
    "shm_bytes": _Range(SHM_BYTES_MIN, SIZE_BYTES_MAX, ALIGNMENT_BYTES, size=True),
    "gpu_bytes": _Range(MIB, SIZE_BYTES_MAX, ALIGNMENT_BYTES, optional=True, size=True),
    "disk_bytes": _Range(MIB, SIZE_BYTES_MAX, optional=True, size=True),
    "compaction_bandwidth": _Range(0, SIZE_BYTES_MAX, size=True),
    "segment_bytes": _Range(MIB, 64 * GIB, ALIGNMENT_BYTES, size=True),
    "request_bytes_max": _Range(ALIGNMENT_BYTES, GIB, ALIGNMENT_BYTES, size=True),
    "requests_in_flight_max": _Range(1, 4096),
    "bytes_in_flight_max": _Range(ALIGNMENT_BYTES, SIZE_BYTES_MAX, size=True),
    "tail_bytes_max": _Range(MIB, SIZE_BYTES_MAX, optional=True, size=True),
    "tail_seconds_max": _Range(0.001, 3600, unit=" seconds"),
    "put_wait_seconds_max": _Range(0, 86400, unit=" seconds"),
    "scrub_bandwidth": _Range(1, SIZE_BYTES_MAX, optional=True, size=True),
    "adopt_seconds": _Range(0.01, 86400, optional=True, unit=" seconds"),
    "remote_seconds_max": _Range(0.01, 3600, unit=" seconds"),
    "stall_seconds_max": _Range(0.01, 86400, unit=" seconds"),
    "read_seconds_max": _Range(0.001, 86400, optional=True, unit=" seconds"),
    "workers": _Range(1, 256, optional=True),
    "index_blocks_max": _Range(1024, 1 << 30),
    "stripe_count": _Range(-1, 2000),
    "stripe_bytes": _Range(STRIPE_ALIGNMENT_BYTES, 4 * GIB - STRIPE_ALIGNMENT_BYTES, STRIPE_ALIGNMENT_BYTES, size=True),
}
_CHOICES = {
    name: typing.get_args(hint)
    for name, hint in typing.get_type_hints(StoreConfig).items()
    if typing.get_origin(hint) is Literal
}
SWITCHES = ("read_only", "may_lose_unflushed", "register_buffers", "warm_restart")
CONFIG_KEYS = tuple(field.name for field in dataclasses.fields(StoreConfig))


def validate_config(config: StoreConfig) -> None:
    """Raise ``ConfigError`` for the first key whose value cannot work, with what to write instead.

    Every message starts with ``key=``.
    """
    for name in ("root", "shm_dir"):
        path = getattr(config, name)
        if not isinstance(path, str) or not path or "\0" in path:
            raise ConfigError(f"{name}={path!r} must be the path of a directory")
    if not os.path.isabs(config.shm_dir):
        raise ConfigError(f"shm_dir={config.shm_dir!r} must be an absolute path, usually /dev/shm")
    _validate_arena(config.arena)
    _validate_devices(config.gpu_devices)
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)!r} is unknown; use one of {', '.join(allowed)}")
    for name in SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r} must be true or false")
    for name, limits in _RANGES.items():
        _validate_number(name, getattr(config, name), limits)
    if config.stripe_count == 0:
        raise ConfigError("stripe_count=0 must be at least 1, or -1 for all targets; stripe='off' leaves files plain")
    if config.bytes_in_flight_max < config.request_bytes_max:
        raise ConfigError(
            f"bytes_in_flight_max={config.bytes_in_flight_max} must be at least "
            f"request_bytes_max={config.request_bytes_max}; raise the one or lower the other"
        )


def _validate_arena(name: object) -> None:
    if name is None:
        return
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"arena={name!r} must be a file name without slashes; shm_dir sets its directory")
    if len(os.fsencode(name)) > ARENA_NAME_BYTES_MAX:
        raise ConfigError(f"arena={name[:40]!r}… is longer than {ARENA_NAME_BYTES_MAX} bytes; choose a shorter name")


def _validate_devices(devices: object) -> None:
    numbers = devices if isinstance(devices, tuple) else ()
    if not numbers or len(set(numbers)) < len(numbers) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ConfigError(f"gpu_devices={devices!r:.100} must be numbers of devices, each once, such as '0' or '0,1'")


def _validate_number(name: str, number: Any, limits: _Range) -> None:
    if number is None and limits.optional:
        return
    kinds = (int, float) if limits.unit else (int,)
    if isinstance(number, bool) or not isinstance(number, kinds):
        what = "a number of seconds" if limits.unit else "a whole number"
        raise ConfigError(f"{name}={number!r} must be {what}")
    if not (math.isfinite(number) and limits.minimum <= number <= limits.maximum):
        if limits.size:
            least, most = format_size(int(limits.minimum)), format_size(int(limits.maximum))
        else:
            least, most = f"{limits.minimum:g}", f"{limits.maximum:g}"
        raise ConfigError(f"{name}={number} must be between {least} and {most}{limits.unit}")
    if limits.multiple > 1 and number % limits.multiple:
        nearest = max(int(limits.minimum), int(number) // limits.multiple * limits.multiple)
        raise ConfigError(f"{name}={number} must be a multiple of {limits.multiple}; use {nearest}")


def coerce_setting(name: str, setting: Any) -> Any:
    """Text to what ``StoreConfig`` wants, where text is allowed; everything else unchanged.

    A size in text is rounded down to the alignment of its key ("1 GB" is no multiple of a page);
    an int must be exact.
    """
    limits = _RANGES.get(name)
    if isinstance(setting, os.PathLike):
        return os.fspath(setting)
    if name == "gpu_devices":
        return _coerce_devices(setting)
    if limits is None or not isinstance(setting, str):
        return setting
    if limits.optional and setting.strip().lower() == "none":
        return None
    if limits.size:
        size = parse_size(setting)
        return size - size % limits.multiple if size >= limits.minimum else size  # too small: refused as it is
    try:
        return float(setting) if limits.unit else int(setting)
    except ValueError:
        return setting


def _coerce_devices(setting: Any) -> Any:
    """A tuple of numbers, from a sequence, one number, or text as people and ``str`` write them."""
    if isinstance(setting, str):
        words = setting.strip().strip("()[]").replace(",", " ").split()
        return tuple(int(word) for word in words) if all(word.isdecimal() for word in words) else setting
    if isinstance(setting, int):
        return (setting,)
    return tuple(setting) if isinstance(setting, list) else setting


def check_keys(keys: Iterable[str], source: str) -> None:
    """Raise ``ConfigError`` for the first of ``keys`` that is no setting, with the nearest that is one."""
    for key in keys:
        if key not in CONFIG_KEYS:
            close = difflib.get_close_matches(key, CONFIG_KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(CONFIG_KEYS)}"
            raise ConfigError(f"{source}: {key} is no setting; {hint}")


def make_config(root: str | os.PathLike[str], **options: Any) -> StoreConfig:
    """A configuration from arguments alone; sizes may be text. Raises ``ConfigError`` for a wrong one."""
    check_keys(options, "arguments")
    values: dict[str, Any] = {"root": root, **options}
    for key, setting in values.items():
        try:
            values[key] = coerce_setting(key, setting)
        except ConfigError as error:
            raise ConfigError(f"{key}={setting!r}: {error}") from None
    return StoreConfig(**values)


def load_config(
    arguments: Mapping[str, Any] | None = None,
    *,
    config_file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    default_root: str | None = None,
) -> StoreConfig:
    """The configuration from ``arguments``, then ``CASCADE_*`` variables, a TOML file, the defaults.

    An argument that is ``None`` counts as not given. The file is ``config_file`` or the one that
    ``CASCADE_CONFIG`` names; its keys are the fields of ``StoreConfig`` at top level. ``environment``
    defaults to ``os.environ``; ``default_root`` is used where no source names a root. Raises
    ``ConfigError`` naming key, source and allowed values. Blocks while it reads the file.
    """
    from cascade_aio._settings import SettingsSchema, merge_sources  # pydantic: slow to import, not always needed

    schema = SettingsSchema(CONFIG_KEYS, SWITCHES, ENVIRONMENT_PREFIX, coerce_setting, check_keys)
    variables = os.environ if environment is None else environment
    given = {key: setting for key, setting in (arguments or {}).items() if setting is not None}
    path = config_file if config_file is not None else variables.get(CONFIG_FILE_VARIABLE) or None
    merged = merge_sources(schema, given, _own_variables(variables), None if path is None else os.fspath(path))
    values = merged.values
    if default_root is not None:
        values.setdefault("root", default_root)
    if "root" not in values:
        raise ConfigError("root is not set; give it as an argument, CASCADE_ROOT or root in the configuration file")
    try:
        return StoreConfig(**values)
    except ConfigError as error:
        key = str(error).partition("=")[0]
        raise ConfigError(f"{merged.origins.get(key, 'defaults')}: {error}") from None


def _own_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The ``CASCADE_*`` variables that are meant as settings; an unknown one is an error, as in the file."""
    return {
        name: text
        for name, text in variables.items()
        if name.startswith(ENVIRONMENT_PREFIX) and not name.startswith(FOREIGN_VARIABLES)
    }


def arena_name(config: StoreConfig) -> str:
    """Name of the arena file in ``config.shm_dir``: the configured one, or one per user and root.

    Two spellings of one root (relative, through a link) give one name. An arena that is kept has another, so
    that an embedded store beside a service that is down does not take its place.
    """
    if config.arena is not None:
        return config.arena
    identity = hashlib.sha256(os.fsencode(os.path.realpath(config.root))).hexdigest()
    return f"cascade-{os.getuid()}-{identity[:16]}{'-kept' if config.warm_restart else ''}"

"""The edge of ``config``: arguments, environment variables and a TOML file, merged by pydantic-settings.

pydantic finds and orders the values and reads switches; what a setting is, and which values it may
take, is said by the caller (``SettingsSchema``), so a wrong value is judged in one place wherever it
came from. Knows no setting by name. Imported by ``config.load_config`` only, because pydantic is
slow to import. Blocks while it reads the file.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cascade_aio.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class SettingsSchema:
    """Which settings there are. ``coerce(key, setting)`` turns text into what the setting wants;
    ``check_keys(keys, source)`` raises ``ConfigError`` for a key that is none."""

    keys: tuple[str, ...]
    switches: tuple[str, ...]
    variable_prefix: str
    coerce: Callable[[str, Any], Any]
    check_keys: Callable[[Iterable[str], str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Merged:
    """The settings that some source gave, and which source that was (a variable, a file, "arguments")."""

    values: dict[str, Any]
    origins: dict[str, str]


class _Environment(EnvSettingsSource):
    """The variables of a mapping instead of those of the process."""

    def __init__(self, model: type[BaseSettings], variables: Mapping[str, str]) -> None:
        self._variables = {name.lower(): text for name, text in variables.items()}
        super().__init__(model)

    def _load_env_vars(self) -> Mapping[str, str]:
        return self._variables


def merge_sources(
    schema: SettingsSchema, arguments: Mapping[str, Any], variables: Mapping[str, str], path: str | None
) -> Merged:
    """Merge, the first source wins. ``path`` names the TOML file, ``None``: no file. Raises ``ConfigError``."""
    model = _settings_model(schema)
    prefix = schema.variable_prefix
    schema.check_keys(arguments, "arguments")
    for name in variables:
        schema.check_keys([name.removeprefix(prefix).lower()], f"variable {name}")
    sources: dict[str, PydanticBaseSettingsSource] = {
        "arguments": InitSettingsSource(model, init_kwargs=dict(arguments)),
        "environment": _Environment(model, variables),
    }
    if path is not None:
        sources[path] = _read_file(model, schema, path)
    origins: dict[str, str] = {}
    for source_name, source in sources.items():
        for key in source():
            origins.setdefault(key, f"{prefix}{key.upper()}" if source_name == "environment" else source_name)

    class FromSources(model):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(cls, *_: Any, **__: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(sources.values())

    try:
        settings = FromSources()
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{origins.get(key, 'settings')}: {key}={first['input']!r}: {reason}") from None
    return Merged({key: getattr(settings, key) for key in settings.model_fields_set}, origins)


def _settings_model(schema: SettingsSchema) -> type[BaseSettings]:
    fields: dict[str, Any] = {}
    for key in schema.keys:
        setting_type: Any = bool if key in schema.switches else Any
        fields[key] = Annotated[setting_type, BeforeValidator(functools.partial(schema.coerce, key))], None

    class Base(BaseSettings):
        model_config = SettingsConfigDict(extra="forbid", env_prefix=schema.variable_prefix, validate_default=False)

    return create_model("Settings", __base__=Base, **fields)


def _read_file(model: type[BaseSettings], schema: SettingsSchema, path: str) -> TomlConfigSettingsSource:
    try:
        with open(path, "rb") as file:
            schema.check_keys(tomllib.load(file), path)
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}; check the path and its mode") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}") from None
    return TomlConfigSettingsSource(model, toml_file=path)

"""The edge of ``config``: arguments, ``CASCADE_*`` variables and a TOML file, merged by pydantic-settings.

The settings model is made from ``StoreConfig`` itself, so fields and defaults are written once.
pydantic finds and orders the values and reads switches; ranges are judged by ``StoreConfig``, so a
wrong value gets the same message wherever it came from, with its source in front. Imported by
``config.load_config`` only. Blocks while it reads the file.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
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

from cascade_aio.config import (
    CONFIG_FILE_VARIABLE,
    CONFIG_KEYS,
    ENVIRONMENT_PREFIX,
    FOREIGN_VARIABLE_PREFIXES,
    SWITCHES,
    StoreConfig,
    check_keys,
    coerce_setting,
)
from cascade_aio.errors import ConfigError


class _Sourced(BaseSettings):
    """Takes exactly the sources that ``merge_sources`` prepared, none that pydantic-settings would add."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix=ENVIRONMENT_PREFIX, validate_default=False)


def _field(key: str) -> tuple[Any, Any]:
    setting_type: Any = bool if key in SWITCHES else Any
    return Annotated[setting_type, BeforeValidator(functools.partial(coerce_setting, key))], None


_FIELDS: dict[str, Any] = {key: _field(key) for key in CONFIG_KEYS}
_StoreSettings: type[_Sourced] = create_model("_StoreSettings", __base__=_Sourced, **_FIELDS)


class _Environment(EnvSettingsSource):
    """The variables of a mapping instead of those of the process."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name.lower(): text for name, text in variables.items()}
        super().__init__(_StoreSettings)

    def _load_env_vars(self) -> Mapping[str, str]:
        return self._variables


def merge_sources(
    arguments: Mapping[str, Any], variables: Mapping[str, str], path: str | None, default_root: str | None
) -> StoreConfig:
    """See ``config.load_config``; ``path`` names the TOML file, ``None`` for no file."""
    check_keys(arguments, "arguments")
    sources: dict[str, PydanticBaseSettingsSource] = {
        "arguments": InitSettingsSource(_StoreSettings, init_kwargs=dict(arguments)),
        "environment": _Environment(_own_variables(variables)),
    }
    if path is not None:
        sources[path] = _read_file(path)
    origins: dict[str, str] = {}
    for source_name, source in sources.items():
        for key in source():
            origins.setdefault(
                key, f"{ENVIRONMENT_PREFIX}{key.upper()}" if source_name == "environment" else source_name
            )

    class Merged(_StoreSettings):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(cls, *_: Any, **__: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(sources.values())

    try:
        settings = Merged()
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{origins.get(key, 'settings')}: {key}={first['input']!r}: {reason}") from None
    values = {key: getattr(settings, key) for key in settings.model_fields_set}
    if default_root is not None:
        values.setdefault("root", default_root)
    if "root" not in values:
        raise ConfigError("root is not set; give it as an argument, CASCADE_ROOT or root in the configuration file")
    try:
        return StoreConfig(**values)
    except ConfigError as error:
        key = str(error).partition("=")[0]
        raise ConfigError(f"{origins.get(key, 'defaults')}: {error}") from None


def _own_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The ``CASCADE_*`` variables that are settings; an unknown one is an error, as in the file."""
    own = {
        name: text
        for name, text in variables.items()
        if name.startswith(ENVIRONMENT_PREFIX)
        and name != CONFIG_FILE_VARIABLE
        and not name.startswith(FOREIGN_VARIABLE_PREFIXES)
    }
    for name in own:
        check_keys([name.removeprefix(ENVIRONMENT_PREFIX).lower()], f"variable {name}")
    return own


def _read_file(path: str) -> TomlConfigSettingsSource:
    try:
        with open(path, "rb") as file:
            check_keys(tomllib.load(file), path)
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}; check the path and its mode") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}") from None
    return TomlConfigSettingsSource(_StoreSettings, toml_file=path)

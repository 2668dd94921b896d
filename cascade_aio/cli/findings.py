"""What a check of ``doctor`` reports."""

from __future__ import annotations

import dataclasses
from typing import Literal

Level = Literal["ok", "note", "warning", "fatal"]
"""``note``: a feature is absent that most do without; ``warning``: slower or smaller than it could be;
``fatal``: a store cannot work."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: ``found`` is the fact, ``meaning`` what follows from it, ``cure`` what to do."""

    check: str
    level: Level
    found: str
    meaning: str
    cure: str = ""

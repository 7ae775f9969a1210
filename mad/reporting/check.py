"""One check of `mad doctor`: a function that returns a `Check`; one that raises has failed, with the exception as its finding.

PASS: fine. WARN: it runs, with the limit that is told. FAIL: it would not run, or not rightly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL"]
REINSTALL = "pip install -c envs/constraints.txt -e . (in the project's folder, Python 3.11)"


@dataclass(frozen=True)
class Check:
    """What one check found; `mend` is empty where nothing needs mending."""

    name: str
    status: Status
    finding: str
    mend: str = ""


def guarded(name: str, mend: str, check: Callable[[], Check]) -> Check:
    """The check's own result, or a FAIL with the exception that it raised and `mend`."""
    try:
        return check()
    except Exception as error:  # whatever broke is the finding
        return Check(name, "FAIL", f"{type(error).__name__}: {error}", mend)

"""The command `mad`. Only here are errors turned into text; everything below raises them."""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import suppress

from mad.cli import stages, tools
from mad.cli.base import app
from mad.cli.tools import tiles_show
from mad.files import MadError

__all__ = ["app", "main", "stages", "tiles_show", "tools"]


OPEN_FILES = 65_536


def main() -> None:
    """Entry point: a fault of the input is one readable message and exit code 2."""
    # Waiting threads sleep; by default they spin, and take the time of those they wait for where a core is shared. Read when
    # torch is loaded, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # every memory-mapped slide is an open file; 1,024 is usual
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    with suppress(ValueError, OSError):  # some systems grant less than the limit that they tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # leave through every `finally`: no temporary file stays behind
    try:
        app()
    except MadError as error:
        print(f"mad: {error}", file=sys.stderr)
        sys.exit(2)

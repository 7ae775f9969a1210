"""A file server for the viewer, on this machine alone."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mad.files import MadError, Pathlike


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many small tiles
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".geojson": "application/geo+json"}

    def log_message(self, format: str, *args: Any) -> None:
        """Tiles are many: nothing is printed."""


def open_server(folder: Pathlike, port: int = 0) -> ThreadingHTTPServer:
    """A server of a viewer's folder, listening on 127.0.0.1; `serve_forever` answers. Port 0 is any that is free.

    Raises:
        MadError: there is no viewer in the folder, or the port is taken.
    """
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise MadError(f"{folder}: no viewer there (no index.html); `snakemake --cores 2 viewer` makes one")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise MadError(f"port {port} cannot be used ({error}); name another with --port") from None

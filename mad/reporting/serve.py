"""A file server for the viewer, on this machine alone."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mad.files import MadError, Pathlike

HOSTS = {"localhost", "127.0.0.1", "::1"}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many small tiles
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".geojson": "application/geo+json"}

    def send_head(self) -> Any:
        """A page of another site, whose name was made to lead here (DNS rebinding), sends that name: it is refused."""
        if not _is_ours(self.headers.get("Host", "")):
            self.send_error(403, "this server answers to localhost alone")
            return None
        if "\0" in self.translate_path(self.path):
            self.send_error(404, "File not found")
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        """Tiles are many: nothing is printed."""


def _is_ours(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in HOSTS
    except ValueError:
        return False


def open_server(folder: Pathlike, port: int = 0) -> ThreadingHTTPServer:
    """A server of a viewer's folder, listening on 127.0.0.1; `serve_forever` answers. Port 0 is any that is free.

    Raises:
        MadError: there is no viewer in the folder, or the port is taken.
    """
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise MadError(f"{folder}: no viewer there (no index.html); `snakemake --cores 2 viewer` makes one")
    try:
        return _Server(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise MadError(f"port {port} cannot be used ({error}); name another with --port") from None

"""Serves the report of WORKDIRs to a browser on this machine, anew as measurements arrive.

The process that trains knows nothing of it: files are all that is read. A page asks once in two
seconds for the version of what it shows and loads itself again where there is a newer one.
"""

from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from ncjax.errors import InputError
from ncjax.report import page

# No other machine reaches it.
HOST = "127.0.0.1"

_NOTHING_YET = b"""<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>ncjax</title><p>Nothing has been measured yet; this page looks again every two seconds."""


class Server(ThreadingHTTPServer):
    """Serves one report under `address`.

    Args:
      files: what the report is read from; it is rendered again when one of them changes.
      read: returns the histories that are shown, or raises InputError where there are none to
        read at the moment; then what was shown before stays.
      port: 0: one that is free.
    """

    daemon_threads = True

    def __init__(self, files: Sequence[Path], read: Callable[[], list[page.Source]], port: int = 0):
        self._files, self._read, self._lock = files, read, Lock()
        self._seen, self._rendered = "", _NOTHING_YET
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def newest(self) -> tuple[str, bytes]:
        """Returns the version of the files that can be read, and their report."""
        with self._lock:
            version = "-".join(map(_changed_at, self._files))
            if version != self._seen:
                try:
                    rendered = page.render(self._read(), version).encode()
                except (InputError, OSError):
                    # A killed run may have left a history that the next one replaces.
                    return self._seen, self._rendered
                self._seen, self._rendered = version, rendered
            return self._seen, self._rendered


class _Handler(BaseHTTPRequestHandler):
    """Answers `/` with the report and `/version` with its version."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        # A page of another site, whose name leads here, would send that name.
        if self.headers.get("Host") not in (
            f"{HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            self.send_error(403)
        elif self.path == "/":
            self._send("text/html; charset=utf-8", self.server.newest()[1])
        elif self.path == "/version":
            self._send("text/plain", self.server.newest()[0].encode())
        else:
            self.send_error(404)

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line for each request would bury the address."""


def _changed_at(file: Path) -> str:
    try:
        return str(file.stat().st_mtime_ns)
    except OSError:
        return "none"

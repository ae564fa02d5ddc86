"""A file server for finished pages: this machine only, reading only, one folder only."""

import logging
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from circuitmill.errors import ConfigError, StoreError

_log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
"""The only address it listens on; nothing on the page is meant for other machines."""
PAGE = "index.html"

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".jsonl": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".yaml": "text/plain; charset=utf-8",
    ".log": "text/plain; charset=utf-8",
}
"""By suffix; anything else is sent as bytes to be saved."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def resolve(root: Path, target: str) -> Path | None:
    """The file or folder a request names, None if it is not there or not inside `root`.

    Percent escapes are decoded once, as a file name would be; the result is resolved through symbolic links and must
    still lie inside the folder, so `..`, absolute paths, escaped separators and links that lead outside all end here.

    Args:
        root: Resolved folder.
        target: Request target, as received.
    """
    path = unquote(urlsplit(target).path, errors="surrogateescape")
    if "\0" in path or "\\" in path or not path.startswith("/"):
        return None
    try:
        found = (root / path.lstrip("/")).resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    if not found.is_relative_to(root) or (found.is_file() and path.endswith("/")):
        return None
    return found if found.is_file() or found.is_dir() else None


def reports(root: Path) -> list[str]:
    """Pages below a results folder, as paths from it."""
    return [path.relative_to(root).as_posix() for path in sorted(root.glob(f"**/report/{PAGE}"))]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; everything else is refused."""

    server: "FolderServer"
    server_version = "circuitmill"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Send a file."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Send what GET would, without the content."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        # A page of another site may not reach this server under its own name (DNS rebinding).
        if self.headers.get("Host") not in self.server.own_names:
            self._text(HTTPStatus.FORBIDDEN, "wrong host\n", body=body)
            return
        root = self.server.root
        found = resolve(root, self.path)
        if found is not None and found.is_dir():
            if not urlsplit(self.path).path.endswith("/"):
                self._redirect(quote("/" + found.relative_to(root).as_posix() + "/"))
                return
            pages = [] if (found / PAGE).is_file() else reports(found) if found == root else None
            if pages is not None and len(pages) == 1:
                self._redirect("/" + quote(pages[0]))
                return
            if pages:
                self._text(HTTPStatus.OK, _listing(pages), body=body, kind=CONTENT_TYPES[".html"])
                return
            found = resolve(root, "/" + quote((found / PAGE).relative_to(root).as_posix()))
        if found is None or not found.is_file():
            self._text(HTTPStatus.NOT_FOUND, "no such file\n", body=body)
            return
        self._file(found, body=body)

    def _file(self, path: Path, *, body: bool) -> None:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            self._head(HTTPStatus.OK, CONTENT_TYPES.get(path.suffix, "application/octet-stream"), size)
            if body:
                left = size
                while left and (block := file.read(min(left, 1 << 20))):
                    left -= len(block)
                    self.wfile.write(block)

    def _text(self, status: HTTPStatus, text: str, *, body: bool, kind: str = CONTENT_TYPES[".txt"]) -> None:
        payload = text.encode()
        self._head(status, kind, len(payload))
        if body:
            self.wfile.write(payload)

    def _redirect(self, location: str) -> None:
        self.send_response(HTTPStatus.FOUND)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _head(self, status: HTTPStatus, kind: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are of interest only when something is looked for."""
        _log.debug(format, *args)


def _listing(pages: list[str]) -> str:
    from html import escape

    items = "".join(f'<li><a href="/{escape(quote(page))}">{escape(page)}</a></li>' for page in pages)
    return f"<!doctype html><meta charset=utf-8><title>circuitmill</title><h1>Reports</h1><ul>{items}</ul>\n"


class FolderServer(ThreadingHTTPServer):
    """Serves one folder on the loopback address.

    Raises:
        StoreError: not a folder.
        ConfigError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        if not folder.is_dir():
            raise StoreError("a folder of results", found="no such folder", where=folder, fix="name results/<run>")
        self.root = folder.resolve()
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "a free port from 0 to 65535", found=error, where=f"--port {port}", fix="take another, or 0"
            ) from error
        self.own_names = {f"{name}:{self.port}" for name in (ADDRESS, "localhost")}
        if self.port == 80:
            self.own_names |= {ADDRESS, "localhost"}

    def server_bind(self) -> None:
        """Bind without asking a name service who we are."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def port(self) -> int:
        """The port it listens on, also when 0 asked for any."""
        return self.server_address[1]

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://{ADDRESS}:{self.port}/"


def serve(folder: Path, port: int) -> None:
    """Serve a folder until interrupted.

    Args:
        port: 0 takes a free one.

    Raises:
        StoreError: not a folder.
        ConfigError: the port is taken.
    """
    with FolderServer(folder, port) as server:
        _log.info("serving %s at %s (stop with Ctrl-C)", server.root, server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            _log.info("stopped")

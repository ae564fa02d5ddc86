import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.viz.conftest import Site

from circuitmill.errors import ConfigError, StoreError
from circuitmill.viz.serve import ADDRESS, FolderServer, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results beside a secret, with links that lead inside and outside."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "demo-other").mkdir()
    (tmp_path / "demo-other" / "index.html").write_text("secret")
    root = tmp_path / "demo"
    report = root / "main" / "report"
    report.mkdir(parents=True)
    (report / "index.html").write_text("<p>page</p>")
    (report / "a b.js").write_text("1")
    (report / "weights.bin").write_bytes(bytes(range(256)) * 8192)
    (root / "inside").symlink_to(report / "index.html")
    (root / "outside").symlink_to(tmp_path / "secret.txt")
    (root / "outside-folder").symlink_to(tmp_path)
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with FolderServer(folder, 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(timeout=5)


def ask(server: FolderServer, target: str, method: str = "GET", host: str | None = None):
    """Status, headers and body; the target goes out exactly as given."""
    connection = http.client.HTTPConnection(ADDRESS, server.port, timeout=5)
    connection.putrequest(method, target, skip_host=True)
    connection.putheader("Host", host or f"{ADDRESS}:{server.port}")
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def test_files_come_with_their_type_and_whole(server: FolderServer, folder: Path) -> None:
    status, headers, body = ask(server, "/main/report/index.html?x=1#y")
    assert (status, body) == (200, b"<p>page</p>")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    status, headers, body = ask(server, "/main/report/weights.bin")
    assert headers["Content-Type"] == "application/octet-stream"
    assert body == (folder / "main/report/weights.bin").read_bytes()
    assert ask(server, "/main/report/a%20b.js")[1]["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "target",
    [
        "/../secret.txt",
        "/main/../../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "/%2e%2e%2fsecret.txt",
        "/main/report/%2e%2e/%2e%2e/%2e%2e/secret.txt",
        "/..%5csecret.txt",
        "/%252e%252e/secret.txt",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/outside",
        "/outside-folder/secret.txt",
        "/outside-folder/",
        "/../demo-other/index.html",
        "/main/report/index.html%00.txt",
        "/main/report/index.html/",
        "/missing",
        "/main/",
        "/%ff%fe",
        "secret.txt",
        "/" + "a" * 5000,
    ],
)
def test_nothing_outside_the_folder_is_reached(server: FolderServer, target: str) -> None:
    status, _, body = ask(server, target)
    assert status in (404, 414) and b"secret" not in body and b"root:" not in body


def test_absolute_paths_of_the_machine_are_not_reached(server: FolderServer, folder: Path) -> None:
    secret = folder.parent / "secret.txt"
    assert ask(server, f"/{secret}")[0] == 404
    assert ask(server, f"file://{secret}")[0] == 404


def test_links_inside_the_folder_are_followed(server: FolderServer) -> None:
    assert ask(server, "/inside")[2] == b"<p>page</p>"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_writing_is_refused(server: FolderServer, folder: Path, method: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert ask(server, "/main/report/index.html", method)[0] == 501
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_head_sends_no_content(server: FolderServer) -> None:
    status, headers, body = ask(server, "/main/report/index.html", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, "11", b"")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1"])
def test_requests_under_another_name_are_refused(server: FolderServer, host: str) -> None:
    status, _, body = ask(server, "/main/report/index.html", host=host)
    assert (status, body) == (403, b"wrong host\n")


def test_the_root_leads_to_the_only_report(server: FolderServer) -> None:
    status, headers, _ = ask(server, "/")
    assert (status, headers["Location"]) == (302, "/main/report/index.html")


def test_the_root_lists_several_reports(server: FolderServer, folder: Path) -> None:
    other = folder / "a<b" / "report"
    other.mkdir(parents=True)
    (other / "index.html").write_text("other")
    status, _, body = ask(server, "/")
    assert status == 200 and b"a&lt;b/report" in body and b"a<b" not in body
    assert b"main/report/index.html" in body


def test_folders_get_their_slash_and_then_their_page(server: FolderServer) -> None:
    status, headers, _ = ask(server, "/main/report")
    assert (status, headers["Location"]) == (302, "/main/report/")
    assert ask(server, "/main/report/")[2] == b"<p>page</p>"


def test_redirects_stay_on_this_server(server: FolderServer) -> None:
    status, headers, _ = ask(server, "//main/report")
    assert status == 302 and headers["Location"] == "/main/report/"


def test_only_the_loopback_address_listens(server: FolderServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_missing_folder_and_taken_port_are_clear_errors(server: FolderServer, folder: Path) -> None:
    with pytest.raises(StoreError, match=r"no such folder[\s\S]*name results/<run>"):
        FolderServer(folder / "missing", 0)
    with pytest.raises(ConfigError, match=r"a free port[\s\S]*take another, or 0"):
        FolderServer(folder, server.port)
    with pytest.raises(ConfigError, match="a free port"):
        FolderServer(folder, 70_000)


def test_resolve_keeps_to_the_folder_without_a_server(folder: Path) -> None:
    root = folder.resolve()
    assert resolve(root, "/main/report/index.html") == root / "main/report/index.html"
    assert resolve(root, "/outside") is None
    assert resolve(root, "/") == root


def test_a_whole_site_is_served(site: Site) -> None:
    with FolderServer(site.results, 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        for path in site.report.rglob("*"):
            if path.is_file():
                target = "/" + path.relative_to(site.results).as_posix()
                assert ask(running, target)[2] == path.read_bytes()
        running.shutdown()

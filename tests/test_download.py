"""Downloads from a loopback server: verified, resumed, limited, once among several processes, complete or absent."""

import hashlib
import http.server
import multiprocessing
import re
import threading

import pytest

from fastcifar.data import DataError, load
from fastcifar.data.download import download

CONTENT = bytes(range(256)) * 4_000
MD5 = hashlib.md5(CONTENT).hexdigest()
LOOPBACK = ("http",)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/file")
            self.end_headers()
            return
        if self.path == "/absent":
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match.group(1)) if match and server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = server.cut_at or len(CONTENT)
        server.cut_at = None
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests, running.ranges, running.cut_at = [], True, None
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def fetch(server, target, path="/file", md5=MD5, size_limit=2**21, **options):
    options = {"schemes": LOOPBACK, "notify": lambda text: None, **options}
    return download(server.url + path, target, md5=md5, size_limit=size_limit, **options)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_download_is_complete_and_not_repeated(server, tmp_path):
    target = fetch(server, tmp_path / "new" / "file")
    assert target.read_bytes() == CONTENT
    fetch(server, target)
    assert len(server.requests) == 1 and leftovers(target.parent) == ["file"]


@pytest.mark.parametrize("ranges", [True, False], ids=["server resumes", "server starts anew"])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.ranges, server.cut_at = ranges, 300_000
    with pytest.raises(DataError, match="300000 of 1024000"):
        fetch(server, tmp_path / "file")
    assert leftovers(tmp_path) == ["file.part"]
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-"] and leftovers(tmp_path) == ["file"]


def test_a_complete_part_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_part_is_not_believed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match="not the published"):
        fetch(server, tmp_path / "file")
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(DataError, match="nothing was kept"):
        fetch(server, tmp_path / "file", md5="0" * 32)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("path", ["/file", "/endless"], ids=["announced", "not announced"])
def test_too_much_is_refused(server, tmp_path, path):
    with pytest.raises(DataError, match="more than the 1000"):
        fetch(server, tmp_path / "file", path=path, size_limit=1000)
    assert leftovers(tmp_path) == []


def test_an_existing_file_with_another_hash_is_replaced(server, tmp_path):
    (tmp_path / "file").write_bytes(b"damaged")
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_only_https_unless_told_otherwise(server, tmp_path):
    with pytest.raises(DataError, match="only https is allowed"):
        fetch(server, tmp_path / "file", schemes=("https",))
    with pytest.raises(DataError, match="ftp://127.0.0.1/file: only http"):
        fetch(server, tmp_path / "file", path="/elsewhere")
    assert leftovers(tmp_path) == []


def test_errors_say_what_to_do(server, tmp_path):
    with pytest.raises(DataError, match=r"cannot download .*Not Found.* fetch it by hand to .*file"):
        fetch(server, tmp_path / "file", path="/absent")
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="fetch it by hand"):
        fetch(server, tmp_path / "file")


def _fetch_in_process(url, target):
    download(url, target, md5=MD5, size_limit=2**21, schemes=LOOPBACK, notify=lambda text: None)


def test_four_processes_download_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    target = tmp_path / "file"
    processes = [context.Process(target=_fetch_in_process, args=(server.url + "/file", target)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert target.read_bytes() == CONTENT and len(server.requests) == 1


def test_auto_falls_back_when_there_is_no_connection(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise DataError("cannot download")

    monkeypatch.setattr(load, "fetch", unreachable)
    told = []
    assert load.load_dataset("auto", tmp_path, notify=told.append).synthetic and told == ["cannot download"]
    with pytest.raises(DataError, match="cifar10 is not in .*, and cannot download"):
        load.load_dataset("cifar10", tmp_path)

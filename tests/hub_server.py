"""A model hub on this computer: the few addresses that huggingface_hub 2.4 asks for downloads, and a stand-in for its HfApi."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

COMMIT = "1" * 40
#: What the library for HTTP raises where there is no network, of whichever name that library is.
ConnectError = sys.modules[HTTPError.__module__.partition(".")[0]].ConnectError


class FakeHub:
    """In place of HfApi: records the calls."""

    def __init__(self, refuses=None, private=None, unreachable=None):
        self.refuses, self.private, self.unreachable, self.calls = refuses, private, unreachable, []

    def __call__(self):
        return self

    def _answer(self, name, answer=None):
        self.calls.append(name)
        if self.unreachable == name:
            raise ConnectError("[Errno -2] Name or service not known\nmore")
        if self.refuses == name:
            raise HfHubHTTPError(f"403 of {name}\nmore", response=SimpleNamespace(headers={}, status_code=403, request=None))
        return answer

    def whoami(self):
        return self._answer("whoami")

    def repo_info(self, repository):
        self._answer("repo_info")
        if self.private is None:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, status_code=404, request=None))
        return SimpleNamespace(private=self.private)

    def create_repo(self, repository, *, private, exist_ok):
        self.private = private if self.private is None else self.private
        return self._answer("create_repo")

    def upload_folder(self, **options):
        self.options = options
        return self._answer("upload_folder", SimpleNamespace(repo_url="the page"))


@contextmanager
def serve_model(name: str, folder: Path) -> Iterator[str]:
    """Serve a directory as the only repository of a hub; yields the hub's address."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/{name}/resolve/") and path.rpartition("/")[2] in files:
                body = files[path.rpartition("/")[2]]
                self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            elif "/tree/" in path:
                tree = [
                    {"type": "file", "path": each, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for each, body in files.items()
                ]
                self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith(f"/api/models/{name}"):
                info = {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": each} for each in files],
                    "tags": [],
                    "private": False,
                }
                self.answer(json.dumps(info).encode(), Content_Type="application/json")
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()

"""A package index with tiny stand-ins for everything trainerd requires, so that installing is real and takes seconds.

Serves /pypi (what PyPI would give) and /whl/<build> (PyTorch's own index) from memory; `hold` keeps one wheel back until the
client goes away, as a network that died in the middle of a download does.
"""

from __future__ import annotations

import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

TORCH = "2.13.0"
_IMPORTED_AS = {"nvidia-ml-py": "pynvml", "ruamel.yaml": "ruamel_yaml"}


def wheel(name: str, version: str, source: str = "") -> bytes:
    """A wheel with one module in it."""
    module, distribution = _IMPORTED_AS.get(name, name), re.sub(r"[-.]", "_", name)
    info = f"{distribution}-{version}.dist-info"
    written = BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr(f"{module}/__init__.py", source)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return written.getvalue()


def torch_source(local: str, gpu: str | None) -> str:
    return (
        f"__version__ = '{TORCH}{local}'\nclass cuda:\n    is_available = staticmethod(lambda: {gpu is not None})\n"
        f"    get_device_name = staticmethod(lambda index: {gpu!r})\n"
    )


class StubIndex:
    """The index, served on a port of this machine until close()."""

    def __init__(self, pyproject: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.hold: str | None = None
        self.holding = threading.Event()
        text = pyproject.read_text("utf-8")
        required = re.findall(r'^  "([A-Za-z0-9._-]+)[>=<]', text[: text.index("[project.optional-dependencies]")], re.MULTILINE)
        for name in required:
            self.add("pypi", name, "999.0")
        self.files = {path: body for path, body in self.files.items() if not path.startswith("/pypi/torch/")}
        self.add("pypi", "torch", TORCH, torch_source("", None))
        for build, gpu in (("cpu", None), ("cu126", "Stub GTX"), ("cu130", "Stub RTX")):
            self.add(f"whl/{build}", "torch", f"{TORCH}+{build}", torch_source(f"+{build}", gpu))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, index: str, name: str, version: str, source: str = "") -> None:
        distribution = re.sub(r"[-.]", "_", name)
        folder = f"/{index}/{re.sub('[._]', '-', name)}/"
        self.files[f"{folder}{distribution}-{version}-py3-none-any.whl"] = wheel(name, version, source)

    def page(self, folder: str) -> bytes:
        """The links of one package's page; empty when there is no such package."""
        names = [path for path in self.files if folder.endswith("/") and path.startswith(folder)]
        return "".join(f'<a href="{n.replace("+", "%2B")}">{n.rsplit("/", 1)[1]}</a>\n' for n in names).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.replace("%2B", "+")
                if index.hold and index.hold in path:
                    index.holding.set()
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    self.rfile.read()  # until the client is gone
                    return
                body = index.files.get(path) or index.page(path)
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        return Handler

"""Serve a folder of `adalink export web` on this machine, with the headers that threads of WebAssembly need.

python examples/web/serve.py FOLDER [--port 8000]
"""

from __future__ import annotations

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

# Pages that are isolated from others may share memory between threads. The policy holds for the worker too.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src data:",
}


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, as modules of JavaScript where they are."""

    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Add the headers."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()


def make_server(folder: str, port: int) -> ThreadingHTTPServer:
    """A server for one folder, on 127.0.0.1; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=folder))


def main() -> None:
    """Serve until Ctrl+C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with make_server(options.folder, options.port) as server:
        print(f"http://localhost:{server.server_port}")
        server.serve_forever()


if __name__ == "__main__":
    main()

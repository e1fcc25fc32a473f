"""A real FTP server for tests, in a thread."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it stands on asyncore
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.ioloop import IOLoop
    from pyftpdlib.servers import FTPServer


class Ftp:
    """Serves a directory to everybody, who may do anything there. `url`: ftp://localhost:port."""

    def __init__(self, root: Path, port: int = 0) -> None:
        authorizer = DummyAuthorizer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # anonymous may write
            authorizer.add_anonymous(str(root), perm="elradfmw")

        class Handler(FTPHandler):
            pass

        Handler.authorizer = authorizer
        self._loop = IOLoop()
        self._server = FTPServer(("127.0.0.1", port), Handler, ioloop=self._loop)
        self.port: int = self._server.address[1]
        self.url = f"ftp://localhost:{self.port}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._loop.loop(timeout=0.05, blocking=False)
        self._server.close_all()

    def close(self) -> None:
        """Ends it with all of its connections."""
        self._stop.set()
        self._thread.join()


__all__ = ("FTPHandler", "Ftp")

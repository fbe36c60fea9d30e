"""An S3 server on loopback that crashes during an upload and restarts with its objects."""

import logging
import socket
import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class CrashingStore:
    """A moto server; its objects live in this process, so they survive a crash."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.application = DomainDispatcherApplication(create_backend_app)
        self.port = 0
        self.crash_on_upload: str | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """Return variables for clients, with few retries to keep tests short."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def start(self) -> None:
        """Start, or restart on the same port."""
        self.crash_on_upload = None
        self.server: Any = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self.server.port
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        if (
            environ["REQUEST_METHOD"] == "PUT"
            and self.crash_on_upload
            and self.crash_on_upload in request
        ):
            self.crash_on_upload = None
            threading.Thread(target=self.stop).start()
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)  # half of the body was read
            raise ConnectionAbortedError
        return self.application(environ, start_response)

"""A real `transformers serve` on loopback, for the tests of sampling and of judging: started, stopped, killed and
started again on the same port."""
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import warm

BIN = Path(sys.executable).parent


def free_port() -> int:
    "A port of loopback that nobody listens on just now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Serve:
    """`transformers serve FOLDER` as a child process. `url` is its base address (…/v1), `model` the name it answers to.

    with Serve(folder) as server: …      starts it, waits until it answers, stops it at the end
    server.kill(); server.start()        a crash (SIGKILL) and a restart on the same port
    """

    def __init__(self, folder, *options: str, port: int | None = None, threads: int = 2, wait: float = 120, log=None):
        self.folder, self.options, self.port = str(folder), options, port or free_port()
        self.threads, self.wait, self.log, self.process = threads, wait, log or os.devnull, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def model(self) -> str:
        return self.folder

    def start(self, wait: bool = True) -> "Serve":
        "Start the process; with `wait`, return only when it answers."
        if self.process is not None and self.process.poll() is None:
            raise RuntimeError("the server runs already")
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}
        # a fork has a process group of its own, so that a kill reaches whatever it may have started
        self.process = warm.start(BIN / "transformers", "serve", self.folder, "--host", "127.0.0.1", "--port",
                                  self.port, *self.options, cwd=Path.cwd(), env=env, out=Path(self.log))
        if wait:
            self.wait_until_healthy()
        return self

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + self.wait
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"transformers serve ended with {self.process.returncode}; see {self.log}")
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"transformers serve did not answer within {self.wait} s; see {self.log}")
            time.sleep(0.1)

    def _end(self, sign: int, patience: float) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(patience)
            except ProcessLookupError:
                pass
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self.process = None

    def stop(self) -> None:
        "Ask it to end, and make it end after five seconds."
        self._end(signal.SIGTERM, 5)

    def kill(self) -> None:
        "What a crash looks like to its clients: SIGKILL, connections cut in the middle."
        self._end(signal.SIGKILL, 5)

    def __enter__(self) -> "Serve":
        return self.start()

    def __exit__(self, *exc) -> None:
        self.stop()


def need_server():
    "Skip where `transformers serve` cannot run: fastapi, uvicorn and openai belong to the extras dev and server."
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'lire_nb[server,dev]'")

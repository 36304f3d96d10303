"""Fresh processes without the start of Python: forks of one process that has imported the libraries, and nothing of
this package.

`run` answers as `subprocess.run` does, `start` as `subprocess.Popen`, `ranks` as torchrun. A fork ends as any process
does (exit code, signal, traceback, functions at exit); what it imports of `lire_nb` it imports itself.
As a script: read one request a line from stdin, fork, say how the fork ended.
"""
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

# What a command or a notebook imports sooner or later. Not matplotlib: it looks at the environment of its notebook.
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed.fsdp", "datasets", "transformers.trainer",
             "transformers.pipelines", "transformers.models.llama.modeling_llama",
             "transformers.models.bert.modeling_bert", "transformers.modeling_gguf_pytorch_utils",
             "transformers.integrations.ggml", "transformers.conversion_mapping",
             "accelerate", "evaluate", "peft", "pandas", "scipy.stats", "nbdev.test")
# What libraries read when they are imported; all else of an environment is a fork's own.
AT_IMPORT = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def run(program: str | Path, *arguments, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    "`python -m program arguments`, or `python program arguments` for a path, forked; `seconds` of the processor."
    with start(program, *arguments, cwd=cwd, env=env) as fork:
        done = subprocess.CompletedProcess([program, *arguments], fork.wait(), *fork.said())
        done.seconds = fork.seconds
        return done


def ranks(count: int, script: Path, *arguments, env: dict[str, str], timeout: float) -> None:
    "What torchrun does on one machine: `count` forks of a script that find each other; all must end well."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**env, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}
    forks = [start(script, *arguments, cwd=Path.cwd(), env={**common, "RANK": str(n), "LOCAL_RANK": str(n)})
             for n in range(count)]
    try:
        until = time.monotonic() + timeout
        while None in (codes := [fork.poll() for fork in forks]) and not any(codes):
            assert time.monotonic() < until, f"no end within {timeout} s"
            time.sleep(0.02)
        assert not any(codes), "\n".join(fork.said()[1][-4000:] for fork in forks)
    finally:
        for fork in forks:
            fork.__exit__()


def start(program: str | Path, *arguments, cwd: Path, env: dict[str, str], out: Path | None = None) -> "Fork":
    "A fork that runs beside this process; what it says is kept, or appended to the file `out`."
    return Fork({"program": str(program), "script": isinstance(program, Path),
                 "arguments": [str(a) for a in arguments], "cwd": str(cwd), "env": env}, out)


class Fork:
    "The part of `subprocess.Popen` that tests use; it leads a process group of its own."

    def __init__(self, request: dict, out: Path | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err, self._end = (Path(self._folder.name, name) for name in ("out", "err", "end"))
        self._out, self._err = (out, out) if out else (self._out, self._err)
        zygote, self.returncode = _warm(), None
        zygote.stdin.write(json.dumps({**request, "out": str(self._out), "err": str(self._err),
                                       "end": str(self._end)}) + "\n")
        zygote.stdin.flush()
        self.pid = int(zygote.stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None and self._end.exists():
            self.returncode, self.seconds = json.loads(self._end.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if _warm().poll() is not None:
                raise RuntimeError("the process that forks has ended")
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may end between the look and the signal
                os.kill(self.pid, sign)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> tuple[str, str]:
        "Everything so far, on standard output and standard error."
        return tuple(p.read_text(encoding="utf-8") if p.exists() else "" for p in (self._out, self._err))

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *exc) -> None:
        self.kill()
        self.wait(timeout=60)
        self._folder.cleanup()


@cache
def _warm() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, __file__], env={**os.environ, **AT_IMPORT}, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # the end of its input ends it
    return process


def serve(libraries: tuple[str, ...]) -> dict | None:
    "Fork for each request, and once more for who waits for it: the request, in the fork; None at the end of the input."
    for name in libraries:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # what is not installed is imported by no test either
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those who wait have ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end their forks
    for line in sys.stdin:
        request = json.loads(line)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if not child:
                return request
            os.write(1, f"{child}\n".encode())
            os.close(1)
            wait_for(child, Path(request["end"]))
    return None


def wait_for(child: int, end: Path) -> None:
    _, status, used = os.wait4(child, 0)
    draft = end.with_suffix(".draft")
    try:
        draft.write_text(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]))
        draft.rename(end)
    finally:  # its folder may be gone, with whoever asked
        os._exit(0)


def become(request: dict) -> None:
    "The rest of this process is the program that is asked for."
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                               (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        opened = os.open(path, mode)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    threads = os.environ.get("OMP_NUM_THREADS", AT_IMPORT["OMP_NUM_THREADS"])
    if threads != AT_IMPORT["OMP_NUM_THREADS"]:  # once torch was told a number, a fork of a fork may find no thread pool
        importlib.import_module("torch").set_num_threads(int(threads))
    os.chdir(request["cwd"])
    sys.argv = [request["program"], *request["arguments"]]
    if request["script"]:
        sys.path[0] = str(Path(request["program"]).parent)
        runpy.run_path(request["program"], run_name="__main__")
    else:
        sys.path[0] = request["cwd"]
        runpy.run_module(request["program"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if (request := serve(LIBRARIES)) is not None:
        become(request)

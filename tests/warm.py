"""Fresh processes without the start of Python: forks of one process that has imported the libraries, and nothing of
this package.

`run` answers as `subprocess.run` does. A fork ends as any process does (exit code, traceback, functions at exit); what
it imports of `lire_nb` it imports itself.
As a script: read one request a line from stdin, fork, say how the fork ended.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# What a command or a notebook imports sooner or later. Not matplotlib: it looks at the environment of its notebook.
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed.fsdp", "datasets", "transformers.trainer",
             "transformers.pipelines", "transformers.models.llama.modeling_llama",
             "transformers.models.bert.modeling_bert", "transformers.modeling_gguf_pytorch_utils",
             "transformers.integrations.ggml", "transformers.conversion_mapping",
             "accelerate", "evaluate", "peft", "pandas", "scipy.stats", "nbdev.test")


def run(program: str | Path, *arguments, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """`python -m program arguments`, or `python program arguments` for a path, forked; each environment has a process
    of its own, since libraries read it at import."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"program": str(program), "script": isinstance(program, Path),
                   "arguments": [str(a) for a in arguments], "cwd": str(cwd), "out": str(out), "err": str(err)}
        warm = _warm(tuple(sorted(env.items())))
        warm.stdin.write(json.dumps(request) + "\n")
        warm.stdin.flush()
        answer = json.loads(warm.stdout.readline())
        done = subprocess.CompletedProcess([program, *arguments], answer["code"], out.read_text(encoding="utf-8"),
                                           err.read_text(encoding="utf-8"))
        done.seconds = answer["seconds"]  # of the processor
        return done


@cache
def _warm(env: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, __file__], env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    atexit.register(process.communicate)  # the end of its input ends it
    return process


def serve(libraries: tuple[str, ...]) -> dict | None:
    "Fork for each request and wait for the fork: the request, in the fork; None at the end of the input."
    for name in libraries:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # what is not installed is imported by no test either
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of this process
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            return request
        _, status, used = os.wait4(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}),
              flush=True)


def become(request: dict) -> None:
    "The rest of this process is the program that is asked for."
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY | os.O_CREAT),
                               (2, request["err"], os.O_WRONLY | os.O_CREAT)):
        opened = os.open(path, mode)
        os.dup2(opened, number)
        os.close(opened)
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

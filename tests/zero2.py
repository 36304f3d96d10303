"""DeepSpeed ZeRO-2 for real, on two processes of a CPU with gloo: .ci/deepspeed runs this in a set-up of its own.

The start file is data/configs/eight_gpus_zero2.yaml with two processes; a tiny policy is trained for six steps. What is
shown: the weights are those of one process; a run that computes in bfloat16 saves the float32 weights that its optimizer
changed; a run that is killed goes on, bit for bit; one process does not go on from what two wrote."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_policy import make_start

from lire_nb.lists import save_lists
from lire_nb.records import make_record

HERE = Path(__file__).parent
WORDS = [" good", " bad", " dull and long", " fine", " odd"]
LISTS = [make_record(f"film {n} was", WORDS[: 2 + n % 4], rewards=[1.0, -0.5, 0.25, 0.0, 0.7][: 2 + n % 4],
                     id=f"film-{n:02}") for n in range(11)]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def train(place: Path, out: str, batch: int, *settings: str) -> list[str]:
    pairs = ("learning_rate=5e-3", "max_steps=6", f"per_device_train_batch_size={batch}", *settings)
    return ["-m", "lire_nb.cli", "train", "--lists", "lists.jsonl", "--policy", "start", "--out", out,
            *(part for pair in pairs for part in ("--set", pair))]


def launch(place: Path, config: str, *command: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *command],
                            cwd=place, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finished(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=400)
    assert (process.returncode == 0) == (code == 0), said[-6000:]
    return said


def weights(folder: Path) -> torch.Tensor:
    found = load_file(folder / "model.safetensors")
    assert {w.dtype for w in found.values()} == {torch.float32}, {n: w.dtype for n, w in found.items()}
    return torch.cat([found[name].flatten() for name in sorted(found)])


def main(place: Path) -> None:
    make_start(place / "start", dropout=0.1)
    save_lists(LISTS, place / "lists.jsonl")
    text = (HERE.parent / "data/configs/eight_gpus_zero2.yaml").read_text().replace(
        "num_processes: 8", "num_processes: 2\nmain_process_port: 0")
    (place / "bf16.yaml").write_text(text)
    (place / "exact.yaml").write_text(text.replace("mixed_precision: bf16", "mixed_precision: 'no'"))

    still = tempfile.mkdtemp(dir=place)
    make_start(Path(still) / "start", dropout=0.0)
    save_lists(LISTS, Path(still) / "lists.jsonl")
    subprocess.run([sys.executable, *train(Path(still), "one", 4, "bf16=no")], cwd=still, env=ENV, check=True,
                   stdout=subprocess.DEVNULL)
    finished(launch(Path(still), str(place / "exact.yaml"), *train(place, "two", 2, "bf16=no")))
    apart = float((weights(Path(still, "one")) - weights(Path(still, "two"))).abs().max())
    assert apart < 1e-5, apart
    print(f"one process and two: weights {apart:.1e} apart", flush=True)

    finished(launch(place, "bf16.yaml", *train(place, "bf16", 2, "bf16=yes")))
    policy = weights(place / "bf16")
    lost = float((policy != policy.to(torch.bfloat16).float()).float().mean())
    assert lost > 0.5, "the weights are float32 copies of bfloat16 ones"
    print(f"bfloat16: float32 weights are saved, {lost:.0%} of them have more bits than bfloat16", flush=True)

    exact = train(place, "whole", 2, "bf16=no", "save_steps=1")
    finished(launch(place, "exact.yaml", *exact))
    killed = [part if part != "whole" else "killed" for part in exact]
    process, began = launch(place, "exact.yaml", *killed), time.monotonic()
    while not (place / "killed.partial/checkpoint-2/manifest.json").is_file():
        assert process.poll() is None and time.monotonic() - began < 300, process.stdout.read()[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for child in workers(place):
        os.kill(child, signal.SIGKILL)
    assert not (place / "killed").exists()
    alone = subprocess.run([sys.executable, *killed], cwd=place, env=ENV, capture_output=True, text=True)
    assert alone.returncode == 2 and "written by 2 processes" in alone.stderr, alone.stderr[-4000:]
    print(f"one process: {alone.stderr.strip().splitlines()[-1]}", flush=True)
    finished(launch(place, "exact.yaml", *killed))
    same = all((place / "whole" / f).read_bytes() == (place / "killed" / f).read_bytes()
               for f in ("model.safetensors", "training.jsonl"))
    assert same, "killed and gone on: other weights, or another log"
    print("killed after step 2 and started again: the same bytes", flush=True)


def workers(place: Path) -> list[int]:
    """Processes that still work in this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if Path(os.readlink(link)) == place and int(link.parent.name) != os.getpid():
                found.append(int(link.parent.name))
        except OSError:
            pass
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder).resolve())

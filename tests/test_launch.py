"""A checkpoint goes on only as it was launched; a file that asks for an engine that would not run is refused."""
import json
import os
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file
from tiny_policy import make_start

from lire_nb.base.errors import LireError
from lire_nb.enhancement import train_policy
from lire_nb.launch import launched_as
from lire_nb.models import load_policy, loading
from lire_nb.records import make_record
from lire_nb.resume import read_manifest
from lire_nb.training import LIREConfig, LIRETrainer

LISTS = [make_record(f"film {n} was", [" good", " bad"], [1.0, 0.0], id=f"{n:02}") for n in range(8)]
SETTINGS = dict(use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2, save_steps=1, per_device_train_batch_size=2)
SHARED = dict(use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2, learning_rate=5e-3, save_strategy="no")
HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("launch") / "start", dropout=0.0)


def trainer(start, folder, **settings):
    model, tokenizer = load_policy(start)
    return LIRETrainer(model, LIREConfig(str(folder), **{**SETTINGS, **settings}), LISTS, processing_class=tokenizer)


def test_another_step_than_the_checkpoints(start, tmp_path):
    first = trainer(start, tmp_path)
    first.train()
    assert read_manifest(tmp_path / "checkpoint-1")["launched_as"] == launched_as(first.args)
    with pytest.raises(LireError, match="1 process, 4 lists a step would go on with other steps"):
        trainer(start, tmp_path, gradient_accumulation_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(start, tmp_path, per_device_train_batch_size=1,
            gradient_accumulation_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("variables, words", [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "one process, on a CPU would run"),
    ({"ACCELERATE_USE_FSDP": "true"}, "one process, on a CPU would run")], ids=["fsdp", "sharded"])
def test_an_engine_that_would_not_run(start, tmp_path, monkeypatch, variables, words):
    """Said before the policy is loaded, and nothing is left."""
    import lire_nb.enhancement

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lire_nb.enhancement, "load_policy", None)
    with pytest.raises(LireError, match=words):
        train_policy(start, LISTS, tmp_path / "policy", **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_what_was_asked_of_loading_is_trained_and_saved(start, tmp_path):
    with loading("bfloat16"):
        folder = train_policy(start, LISTS, tmp_path / "policy", **{**SETTINGS, "save_strategy": "no"})
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_each_process_reads_its_share(start):
    """The weights of one process. A forward pass leaves the last norm whole, and `shared_out` puts it back."""
    place = start.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    train_policy(start, LISTS, place / "alone", **SHARED, per_device_train_batch_size=4)
    warm.ranks(2, HERE / "shared_while_read.py", place, env=env, timeout=120)
    states = {name: load_file(place / name / "model.safetensors") for name in ("start", "alone", "shared")}
    apart = lambda a, b: {n: float((states[a][n] - states[b][n]).abs().max()) for n in states[a]}  # noqa: E731
    assert max(apart("alone", "shared").values()) < 1e-5 < min(apart("alone", "start").values())
    found = [json.loads((place / f"shared-{n}.json").read_text()) for n in (0, 1)]
    assert all(one["all"] for one in found)
    assert [one["whole"] for one in found] == 2 * [[[], found[0]["whole"][1], []]] and found[0]["whole"][1]
    assert sum(one["bytes"] for one in found) == sum(w.nbytes for w in states["start"].values())


def test_sharded_loading_asks_for_processes_and_no_checkpoints(start, tmp_path):
    with pytest.raises(LireError, match="one process reads all weights"):
        train_policy(start, LISTS, tmp_path / "policy", sharded=True, **SHARED)

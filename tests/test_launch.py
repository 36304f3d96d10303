"""A checkpoint goes on only as it was launched; a file that asks for an engine that would not run is refused."""
from pathlib import Path

import pytest
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
    import torch
    from safetensors.torch import load_file

    with loading("bfloat16"):
        folder = train_policy(start, LISTS, tmp_path / "policy", **{**SETTINGS, "save_strategy": "no"})
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}

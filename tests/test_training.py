"""Training that can be believed: layouts that should be equal are, and what goes wrong stops before the weights are
touched."""
import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from failing import FailAt, Failure
from tiny_policy import make_start
from transformers import EarlyStoppingCallback, TrainerCallback

from lire_nb import path_check
from lire_nb.base.errors import LireError
from lire_nb.enhancement import train_policy
from lire_nb.lab.extend import check_loss
from lire_nb.logprobs import dataset_logps
from lire_nb.models import load_policy
from lire_nb.records import make_record
from lire_nb.resume import ExactTrainer, Stopped, checkpoints, last_checkpoint
from lire_nb.rivals import get_loss, LOSSES
from lire_nb.training import LIREConfig, LIRETrainer, ListSampler, prepare_lists

HERE = Path(__file__).parent
WORDS = [" good", " bad", " dull and long", " fine", " odd"]
LISTS = [make_record(f"film {n} was", WORDS[: 2 + n % 4], rewards=[1.0, -0.5, 0.25, 0.0, 0.7][: 2 + n % 4],
                     id=f"film-{n:02}") for n in range(11)]
BASE = dict(learning_rate=5e-3, bf16=False, use_cpu=True, disable_tqdm=True, report_to="none", logging_steps=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("policies")
    make_start(place / "start", dropout=0.0)
    make_start(place / "start-dropout")
    return place


def loaded(policy):
    """A fresh copy of a policy that was read once. Copies share what the check of paths found, which is looked up by
    all that it depends on."""
    if policy not in READ:
        READ[policy] = load_policy(policy), {}
    (model, tokenizer), found = READ[policy]
    model = copy.deepcopy(model)
    path_check._CHECKS[model] = found
    return model, tokenizer


READ = {}


def trainer(policy, folder, lists=LISTS, eval_lists=None, **settings):
    options = {name: settings.pop(name) for name in ("callbacks", "peft_config", "ref_model") if name in settings}
    model, tokenizer = loaded(policy)
    return LIRETrainer(model, LIREConfig(**{"output_dir": str(folder), "save_strategy": "no", **BASE, **settings}),
                       lists, eval_lists, processing_class=tokenizer, **options)


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def course(one) -> tuple[list[dict], torch.Tensor]:
    one.train()
    timed = ("runtime", "per_second", "preparation")
    return [{k: v for k, v in h.items() if not any(t in k for t in timed)} for h in one.state.log_history
            if "total_flos" not in h], flat(one.model)


# What a loss is called with.


def watched(reads):
    "A loss of one's own that writes down which tables it is called with."
    def anchored(logps, rewards, mask=None, *, beta=0.1, ref_logps=reads, lengths=None):
        seen.append((ref_logps is not None, lengths is not None))
        score = logps if ref_logps is None else logps - ref_logps
        weights = (beta * score).masked_fill(~mask, -1e9).softmax(-1)
        return -(weights * rewards.masked_fill(~mask, 0)).sum(-1)

    seen = []
    return anchored, seen


def test_a_loss_is_checked_with_the_tables_that_it_is_trained_with(place, tmp_path, monkeypatch):
    loss, seen = watched(None)
    monkeypatch.setitem(LOSSES, "anchored", check_loss(replace(get_loss(loss), name="anchored")))
    config = dict(loss_type="anchored", max_steps=2)
    assert LIREConfig(str(tmp_path), **BASE, **config).asks_ref()
    one = trainer(place / "start", tmp_path, **config)
    checked = len(seen)
    one.train()
    assert set(seen) == {(True, True)} and len(seen) > checked > 3
    loss.needs_ref = False  # what it says goes before
    seen.clear()
    one = trainer(place / "start", tmp_path, loss_type=loss, max_steps=2)
    one.train()
    assert set(seen) == {(False, True)} and "ref_logps" not in one.train_dataset.column_names


def test_a_loss_that_cannot_do_without_a_reference_gets_one(place, tmp_path):
    def strict(logps, rewards, mask, ref_logps):
        return -(torch.sigmoid(logps - ref_logps) * rewards.masked_fill(~mask, 0)).masked_fill(~mask, 0).sum(-1)

    one = trainer(place / "start", tmp_path, loss_type=strict, max_steps=1)
    one.train()
    first = next(h for h in one.state.log_history if "loss" in h)
    by_hand = sum(0.5 * sum(LISTS[i]["rewards"]) for i in [i for _, i in ListSampler(11, seed=42)][:4]) / 4
    assert first["loss"] == pytest.approx(-by_hand, rel=1e-4)  # the policy is its own reference: σ(0) is a half


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_tables_of_our_losses_follow_their_settings(name):
    spec = LOSSES[name]
    for score in ("sum", "token", "ratio", "token_ratio") if "score" in spec.settings else (None,):
        settings = {} if score is None else {"score": score}
        if name != "offline_pg" or score in ("ratio", "token_ratio"):
            one = torch.ones(1, 2)
            tables = {key: one for key in spec.tables(**settings)}
            assert ("ref_logps" in tables) is str(score).endswith("ratio")
            assert torch.isfinite(spec.call(-one, one, one > 0, tables, settings)).all()


# Layouts that are equal.


@pytest.mark.parametrize("batch, accumulation", [(2, 2), (1, 4), (3, 2)])
def test_batch_times_accumulation(place, tmp_path, batch, accumulation):
    """b × a is one batch of a·b, with candidates drawn anew in each epoch and a last step that is not full."""
    settings = dict(num_train_epochs=2, num_candidates=3, data_seed=3)
    size = batch * accumulation
    log, whole = course(trainer(place / "start", tmp_path, per_device_train_batch_size=size, **settings))
    again, parts = course(trainer(place / "start", tmp_path, per_device_train_batch_size=batch,
                                  gradient_accumulation_steps=accumulation, **settings))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert len(log) == len(again) and all(abs(a["loss"] - b["loss"]) < 1e-6 for a, b in zip(log, again))


@pytest.mark.parametrize("loss_type", ["lire", "dpo"])
def test_both_paths_train_the_same_policy(place, tmp_path, loss_type):
    """Twenty steps by padding and by sharing the prompt: the losses and the weights stay together."""
    settings = dict(max_steps=20, num_train_epochs=99, loss_type=loss_type)
    (padded, by_padding), (shared,
                           by_sharing) = (course(trainer(place / "start", tmp_path, logps_impl=impl, **settings))
                                          for impl in ("padded", "shared"))
    start = flat(load_policy(place / "start")[0])
    assert len(padded) == len(shared) == 20 and all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(padded, shared))
    assert (by_sharing - by_padding).norm() < 1e-3 * (by_padding - start).norm()


def test_paths_are_checked_before_the_first_step(place, tmp_path, caplog):
    """What cannot share is said at the start: by name an error, by itself a line."""
    from transformers import AutoModelForCausalLM, BloomConfig

    _, tokenizer = load_policy(place / "start")
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(LireError, match="logps_impl.*BloomForCausalLM"):
        LIRETrainer(bloom, LIREConfig(**{"output_dir": str(tmp_path), **BASE, "logps_impl": "shared"}), LISTS,
                    processing_class=tokenizer)
    assert "takes no position_ids" in caplog.text
    LIRETrainer(bloom, LIREConfig(**{"output_dir": str(tmp_path), **BASE, "max_steps": 1, "save_strategy": "no"}),
                LISTS, processing_class=tokenizer).train()


def test_reference_log_probs_are_kept(place, tmp_path, monkeypatch):
    from lire_nb import logprobs

    settings = dict(loss_type="dpo", max_steps=2, reference_cache=str(tmp_path / "cache"))
    log, weights = course(trainer(place / "start", tmp_path / "a", **settings))
    [file] = (tmp_path / "cache").iterdir()
    assert len(file.read_text().splitlines()) == len(LISTS)
    monkeypatch.setattr(logprobs, "dataset_logps", None)  # not asked again
    again, same = course(trainer(place / "start", tmp_path / "b", lists=LISTS, **settings))
    assert torch.equal(weights, same) and log == again


def test_a_prompt_without_room_for_an_answer_is_named(place, tmp_path):
    long = make_record("x" * 200, WORDS[:2], rewards=[1.0, 0.0], id="too-long")  # the policy reads 128 tokens
    with pytest.raises(LireError, match="'too-long'.*no room"):
        trainer(place / "start", tmp_path, lists=[*LISTS, long])
    trainer(place / "start", tmp_path, lists=[*LISTS, long], max_prompt_length=100)


def test_gradient_checkpointing_changes_nothing(place, tmp_path):
    for policy in ("start", "start-dropout"):
        _, without = course(trainer(place / policy, tmp_path, max_steps=3))
        _, with_it = course(trainer(place / policy, tmp_path, max_steps=3, activation_checkpointing=True))
        torch.testing.assert_close(with_it, without, rtol=1e-6, atol=1e-7)


def test_the_same_seed_gives_the_same_files(place, tmp_path):
    from peft import LoraConfig

    for name, options in (("full", {}),
                          ("lora",
                           {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)})):
        for k in (1, 2):
            torch.manual_seed(k)  # whatever was drawn before must not matter
            train_policy(place / "start-dropout", LISTS, tmp_path / f"{name}-{k}", seed=5, max_steps=3,
                         trainer_options=options, **BASE | {"report_to": "none"})
        files = [{p.name: p.read_bytes() for p in (tmp_path / f"{name}-{k}").iterdir() if p.is_file()} for k in (1, 2)]
        assert files[0] == files[1] and ("adapter_model.safetensors" if options else "model.safetensors") in files[0]
        assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


def test_a_merged_adapter_gives_the_same_logps(place, tmp_path):
    from peft import LoraConfig

    one = trainer(place / "start", tmp_path, max_steps=4, learning_rate=5e-2,
                  peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    start = dataset_logps(one.model, one.processing_class, LISTS)
    one.train()
    adapted = dataset_logps(one.model, one.processing_class, LISTS)
    merged = dataset_logps(one.model.merge_and_unload(), one.processing_class, LISTS)
    for (a, _), (b, _), (c, _) in zip(adapted, merged, start):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-4)
        assert (torch.tensor(a) - torch.tensor(c)).abs().max() > 1e-2


@pytest.fixture(scope="module")
def two(place) -> list[dict]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    warm.ranks(2, HERE / "two_processes.py", place, env=env, timeout=300)
    return [json.loads((place / f"rank-{n}.json").read_text()) for n in (0, 1)]


def test_two_processes_give_what_one_gives(two, place, tmp_path):
    """Losses, metrics, weights over five steps, and an evaluation; two processes cannot share 11 lists evenly."""
    one = trainer(place / "start", tmp_path, eval_lists=LISTS[:7], max_steps=5, per_device_train_batch_size=2,
                  gradient_accumulation_steps=2, per_device_eval_batch_size=2)
    log, weights = course(one)
    evaluated = one.evaluate()
    assert two[0]["course"] == two[1]["course"]
    for a, b in zip(log, two[0]["course"]["log"], strict=True):
        assert all(abs(a[k] - b[k]) < 1e-5 for k in b), (a, b)
    torch.testing.assert_close(torch.tensor(two[0]["course"]["weights"]), weights, rtol=0, atol=1e-5)
    assert all(abs(evaluated[f"eval_{k}"] - v) < 1e-5 for k, v in two[0]["course"]["eval"].items())


@pytest.mark.parametrize("what, ids", [("loss", 1), ("gradient", 2)])
def test_all_processes_stop_with_one_line(two, what, ids):
    """What is not finite on process 1 alone stops both, before the weights are touched, and names the lists."""
    first, second = (rank[what] for rank in two)
    assert (first["error"] == second["error"] and first["error"].startswith(f"{what} of ") and first["untouched"]
            and second["untouched"])
    assert sum(f"'{i}'" in first["error"] for i in first["ids"]) == ids


def test_sigterm_to_one_process_stops_all_at_the_same_step(two):
    for rank in two:
        said = "stopped by SIGTERM after step 3 of 5; a checkpoint is kept, start again to go on"
        assert rank["stopped"] == {"stopped": said, "kept": ["checkpoint-3"], "equal": True}


def test_only_the_main_process_samples_and_scores(two):
    assert [rank["enhanced"]["calls"] for rank in two] == [[12, 12],
                                                           []] and all(rank["enhanced"]["whole"] for rank in two)


# As if it had never stopped.


LAYOUTS = {
    "accumulation": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=1),
    "log by epoch, evaluate by epoch": dict(save_steps=1, logging_strategy="epoch", eval_strategy="epoch"),
    "length groups, drawn candidates": dict(save_steps=1, train_sampling_strategy="group_by_length", num_candidates=3,
                                            logging_steps=2),
    "the best": dict(save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
                     metric_for_best_model="eval_expected_reward", save_total_limit=1),
    "ends within an epoch": dict(save_steps=1, max_steps=4),
    "reference": dict(save_steps=2, loss_type="dpo", optim="sgd"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_anywhere_is_exact(place, tmp_path, name):
    """Fail at every step, go on from the last checkpoint: the same weights and the same log, with dropout."""
    settings = {"save_strategy": "steps", "num_train_epochs": 2, "lr_scheduler_type": "linear", "eval_lists": LISTS[:3],
                **LAYOUTS[name]}
    log, weights = course(trainer(place / "start-dropout", tmp_path / "whole", **settings))
    steps = max(h["step"] for h in log)
    assert steps >= 4
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        with pytest.raises(Failure):
            trainer(place / "start-dropout", folder, callbacks=[FailAt(step)], **settings).train()
        one = trainer(place / "start-dropout", folder, **settings)
        there = last_checkpoint(folder)
        one.train(resume_from_checkpoint=str(there) if there else None)
        assert torch.equal(flat(one.model), weights), step
        again = [{k: h[k] for k in h if "runtime" not in k and "per_second" not in k and "preparation" not in k}
                 for h in one.state.log_history if "total_flos" not in h]
        assert again == log, step


def test_a_checkpoint_of_the_last_step_trains_no_more(place, tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=4)  # within the second epoch
    one = trainer(place / "start-dropout", tmp_path, **settings)
    one.train()
    two = trainer(place / "start-dropout", tmp_path, **settings)
    two.train(resume_from_checkpoint=True)
    assert (last_checkpoint(tmp_path).name == "checkpoint-4" and two.state.global_step == 4
            and torch.equal(flat(one.model), flat(two.model)))


def test_half_written_and_damaged_checkpoints_are_never_taken(place, tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=4)
    trainer(place / "start", tmp_path, **settings).train()
    names = {p.name for p in last_checkpoint(tmp_path).iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "manifest.json"} <= names and "training_args.bin" not in names
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()  # killed before the end
    content = (tmp_path / "checkpoint-3" / "optimizer.pt").read_bytes()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(content[:100] + b"x" + content[101:])
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(LireError, match="optimizer.pt is altered"):
        trainer(place / "start", tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert last_checkpoint(tmp_path, clean=True).name == "checkpoint-2" and [p.name for p in checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-1",
    ]
    with pytest.raises(LireError, match="no whole checkpoint"):
        trainer(place / "start", tmp_path,
                **settings | {"output_dir": str(tmp_path / "nothing")}).train(resume_from_checkpoint=True)

# A checkpoint goes on as it was begun, or not at all.

STEPS = dict(save_strategy="steps", save_steps=1, max_steps=3, temperature=5.0)


@pytest.fixture(scope="module")
def begun(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    trainer(place / "start", folder / "lire", **STEPS).train()
    trainer(place / "start", folder / "dpo", **STEPS | {"temperature": None, "loss_type": "dpo"}).train()
    return folder


def goes_on(place, begun, tmp_path, name="lire", start="start", **changed):
    settings = STEPS | ({"temperature": None, "loss_type": "dpo"} if name == "dpo" else {})
    one = trainer(place / start, tmp_path, **settings | changed)
    one.train(resume_from_checkpoint=str(begun / name / "checkpoint-1"))
    return one.state.global_step


def graded(value):
    return [make_record(r["prompt"], r["completions"], rewards=[value, *r["rewards"][1:]], id=r["id"]) for r in LISTS]


OTHERWISE = {
    "learning rate": (dict(learning_rate=1e-3), "learning_rate: 0.005 there, 0.001 now"),
    "temperature": (dict(temperature=6.0), "temperature: 5.0 there, 6.0 now"),
    "loss": (dict(temperature=None, loss_type="rrhf"), "loss_type: 'lire' there, 'rrhf' now"),
    "schedule": (dict(lr_scheduler_type="linear"), "lr_scheduler_type: 'cosine' there, 'linear' now"),
    "optimizer": (dict(weight_decay=0.1), "weight_decay: 0.0 there, 0.1 now"),
    "seed": (dict(seed=7), "seed: 42 there, 7 now"),
    "a term beside the loss": (dict(sft_weight=0.5), "sft_weight: 0.0 there, 0.5 now"),
    "candidates": (dict(num_candidates=2), "num_candidates: nothing there, 2 now"),
    "fewer lists": (dict(lists=LISTS[:-1]), "other lists"),
    "another order": (dict(lists=LISTS[::-1]), "other lists"),
    "other rewards": (dict(lists=graded(0.9)), "other lists"),
    "shorter answers": (dict(max_completion_length=2), "other lists"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_training_does_not_go_on_from_a_checkpoint(place, begun, tmp_path, name):
    changed, said = OTHERWISE[name]
    with pytest.raises(LireError, match="another training would go on from here") as e:
        goes_on(place, begun, tmp_path, **changed)
    assert said in str(e.value) and "resume_from_checkpoint" in str(e.value)


def test_what_does_not_decide_the_steps_may_change(place, begun, tmp_path):
    assert goes_on(place, begun, tmp_path, max_steps=4, logging_steps=2, candidates_at_once=1, save_steps=2) == 4


def test_a_loss_with_a_reference_goes_on_with_its_start_alone(place, begun, tmp_path):
    """The common slip: the checkpoint itself is given as the model, and becomes its own reference."""
    assert goes_on(place, begun, tmp_path, "dpo") == 3
    moved = begun / "dpo" / "checkpoint-3"
    with pytest.raises(LireError, match="the reference log-probs have a mean of"):
        goes_on(place, begun, tmp_path, "dpo", start=moved)


def test_another_reference_model_is_another_training(place, begun, tmp_path):
    other = load_policy(place / "start")[0]
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LireError, match="the reference log-probs have a mean of"):
        goes_on(place, begun, tmp_path, "dpo", ref_model=other)


def test_reference_log_probs_may_differ_as_number_formats_do():
    """Noise of bfloat16 passes, values that another model has with the same mean do not."""
    from lire_nb.resume import _apart
    draw = torch.Generator().manual_seed(0)
    there = -80 + 30 * torch.randn(64, generator=draw, dtype=torch.float64).numpy()
    noise = torch.randn(64, generator=draw, dtype=torch.float64).numpy()
    noise -= noise.mean()
    told = lambda values, shift=1.0: np.array([values.mean() * shift, *values])  # noqa: E731
    assert not _apart(told(there), told(there * (1 + 0.003 * noise), 1.0007))
    assert _apart(told(there), told(there + 0.02 * abs(there).mean() * noise))
    assert _apart(told(there), told(there, 1.004))


def test_a_loss_of_ones_own_goes_on_with_its_code_alone(place, tmp_path, begun):
    def own(weight):
        def loss(logps, rewards, mask=None):
            seen.append(float(logps.detach().sum()))
            return -weight * ((logps.masked_fill(~mask, -1e9) / 5).softmax(-1) * rewards.masked_fill(~mask, 0)).sum(-1)

        seen = []
        return loss

    settings = STEPS | {"temperature": None}
    trainer(place / "start", tmp_path, **settings, loss_type=own(1.0)).train()
    there = str(tmp_path / "checkpoint-1")
    again = trainer(place / "start", tmp_path / "again", **settings, loss_type=own(1.0))
    again.train(resume_from_checkpoint=there)
    assert again.state.global_step == 3
    checked = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["decided"]["settings"]["loss_type"]
    assert checked.startswith("loss-")
    with pytest.raises(LireError, match="loss_type"):
        trainer(place / "start", tmp_path / "other", **settings, loss_type=own(2.0)).train(resume_from_checkpoint=there)


ADAPTERS = {
    "its scale": (dict(lora_alpha=32), "lora_alpha: 8 there, 32 now"),
    "its dropout": (dict(lora_dropout=0.1), "lora_dropout: 0.0 there, 0.1 now"),
    "its way of scaling": (dict(use_rslora=True), "use_rslora: false there, true now"),
}


def test_an_adapter_goes_on_as_it_is_on_its_base_alone(place, tmp_path):
    """A checkpoint of an adapter holds its weights alone: what they are multiplied with and added to is not in it."""
    from peft import LoraConfig

    def one(folder, start="start", resume=None, **changed):
        config = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0,
                               **changed})
        found = trainer(place / start, tmp_path / folder, peft_config=config, **STEPS)
        found.train(resume_from_checkpoint=resume and str(resume))
        return flat(found.model)

    whole, there = one("whole"), tmp_path / "whole" / "checkpoint-1"
    assert torch.equal(one("again", resume=there), whole)
    for name, (changed, said) in ADAPTERS.items():
        with pytest.raises(LireError, match="another training would go on from here") as e:
            one(name, resume=there, **changed)
        assert said in str(e.value)
    moved = load_policy(place / "start")[0]
    with torch.no_grad():
        moved.get_input_embeddings().weight.mul_(1.01)
    moved.save_pretrained(tmp_path / "moved")
    load_policy(place / "start")[1].save_pretrained(tmp_path / "moved")
    with pytest.raises(LireError, match="base: "):
        one("other", tmp_path / "moved", resume=there)


def test_another_dropout_is_another_training(place, begun, tmp_path):
    with pytest.raises(LireError, match="dropout"):
        goes_on(place, begun, tmp_path, start="start-dropout")


def test_a_checkpoint_of_an_older_version_still_goes_on(place, begun, tmp_path):
    shutil.copytree(begun / "lire" / "checkpoint-1", tmp_path / "old" / "checkpoint-1")
    path = tmp_path / "old" / "checkpoint-1" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("decided")
    path.write_text(json.dumps(manifest))
    assert goes_on(place, tmp_path, tmp_path / "new", name="old", learning_rate=1e-3) == 3


def test_the_older_checkpoint_stays_until_the_newer_is_whole(place, tmp_path, monkeypatch):
    """A failure while checkpoint-2 is written leaves checkpoint-1, though only one is kept."""
    from lire_nb import resume as training

    original = ExactTrainer._save_pending

    def failing(self, folder):
        if folder.name == "checkpoint-2":
            raise OSError(28, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(training.ExactTrainer, "_save_pending", failing)
    with pytest.raises(LireError, match="checkpoint-2: cannot be written.*No space left"):
        trainer(place / "start", tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=4).train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"] and last_checkpoint(tmp_path) is not None


def test_train_policy_goes_on_with_an_adapter_and_early_stopping(place, tmp_path):
    """The state of a callback is part of the checkpoint."""
    from peft import LoraConfig

    settings = {**BASE, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 4,
                "load_best_model_at_end": True, "metric_for_best_model": "eval_expected_reward",
                "greater_is_better": False}
    options = {"eval_dataset": LISTS[:3]}
    for name, fail in (("whole", None), ("broken", 2)):
        callbacks = lambda: [EarlyStoppingCallback(3), *([FailAt(fail)] if fail else [])]  # noqa: E731
        peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)}
        if fail:
            with pytest.raises(Failure):
                train_policy(place / "start", LISTS, tmp_path / name, callbacks=callbacks(),
                             trainer_options=options | peft, **settings)
            assert last_checkpoint(tmp_path / "broken.partial").name == "checkpoint-1"
        fail = None
        train_policy(place / "start", LISTS, tmp_path / name, callbacks=callbacks(), trainer_options=options | peft,
                     **settings)
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) < 12  # it did stop early
    assert (tmp_path / "whole" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "broken" / "adapter_model.safetensors"
    ).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_checkpoints_by_the_clock(place, tmp_path, monkeypatch):
    one = trainer(place / "start", tmp_path, save_strategy="steps", save_steps=1000, save_minutes=1e-9, max_steps=2,
                  num_train_epochs=1)
    one.train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]


def test_sigterm_without_checkpoints_says_so(place, tmp_path):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 1 of 3; no checkpoint") as stopped:
        train_policy(place / "start", LISTS, tmp_path / "policy", callbacks=[Terminate()], max_steps=3,
                     save_strategy="no", **BASE)
    assert stopped.value.code == 143 and list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is before


# What is not finite.


@pytest.mark.parametrize("what", ["loss", "gradient", "reward"])
def test_what_is_not_finite_stops_before_the_weights(place, tmp_path, what):
    """At the third step, in one list of the second micro-batch."""
    before = {}

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            before["weights"] = flat(model).clone()

    one = trainer(place / "start", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                  num_train_epochs=2, callbacks=[Remember()])
    original, collate, met = one.list_losses, one.data_collator, []

    def list_losses(model, inputs):
        losses, metrics = original(model, inputs)
        met.extend(inputs["ids"])
        if what == "reward" or met.count("film-05") < 2:
            return losses, metrics
        # the root of zero has an infinite slope
        spoil = float("nan") if what == "loss" else ((losses.detach() - losses).sqrt() * 0).sum()
        return torch.stack([loss + spoil * (i == "film-05") for i, loss in zip(inputs["ids"], losses)]), metrics

    def spoilt_rewards(rows):
        batch = collate(rows)
        met.extend(batch["ids"])
        if "film-05" in batch["ids"] and met.count("film-05") == 3:  # counted here and by the loss
            batch["rewards"][batch["ids"].index("film-05"), 0] = float("inf")
        return batch

    one.list_losses = list_losses
    if what == "reward":
        one.data_collator = spoilt_rewards
    with pytest.raises(LireError, match="film-05") as e:
        one.train()
    assert (
        torch.equal(before["weights"], flat(one.model))
        and str(e.value).startswith(f"{what} of ")
        and len(str(e.value).splitlines()) == 1
    )
    assert one.state.global_step >= 3  # the second epoch


def test_a_reward_that_float32_cannot_hold_is_named(place, tmp_path):
    with pytest.raises(LireError, match="film-x.*1e\\+300"):
        trainer(place / "start", tmp_path, lists=[make_record("film was", [" a", " b"], [1e300, 0.0], id="film-x")])


def test_weights_in_float16_are_not_trained(place, tmp_path):
    "Their first step is infinite; an adapter in float32 on them is trained."
    from peft import LoraConfig

    model, tokenizer = load_policy(place / "start", device="cpu", dtype=torch.float16)
    args = LIREConfig(output_dir=str(tmp_path), save_strategy="no", **BASE)
    with pytest.raises(LireError, match="float16 cannot be trained.*fp16=True"):
        LIRETrainer(model, args, LISTS, processing_class=tokenizer)
    LIRETrainer(model, args, LISTS, processing_class=tokenizer, peft_config=LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


# What a step reads, and what an evaluation takes.


def test_length_groups_need_less_padding(place, tmp_path):
    lists = [make_record("film " * (1 + 7 * (n % 4)), [" good" * (1 + n % 4), " bad"], rewards=[1.0, 0.0], id=f"{n:03}")
             for n in range(64)]

    def padding(order):
        one = trainer(place / "start", tmp_path, lists=lists, per_device_train_batch_size=8,
                      train_sampling_strategy=order)
        batches = list(one.get_train_dataloader())
        assert sorted(i for b in batches for i in b["ids"]) == [r["id"] for r in lists]
        return sum(int(b["prompt_ids"].numel() - b["prompt_lengths"].sum()) for b in batches)

    assert padding("group_by_length") < padding("random") / 2


def test_workers_read_the_same_steps(place, tmp_path):
    """The epoch travels with the index, so that worker processes draw the same candidates."""
    def read(workers):
        one = trainer(place / "start", tmp_path, num_candidates=2, dataloader_num_workers=workers,
                      dataloader_persistent_workers=workers > 0)
        loader, steps = one.get_train_dataloader(), []
        for one._sampler.epoch in (0, 1):
            steps += [(b["ids"], b["rewards"].nan_to_num(9).tolist()) for b in loader]
        return steps

    assert read(0) == read(1)


def test_evaluation_of_other_lists(place, tmp_path):
    """Raw lists, a dict of them, any prefix; fillers and the last smaller batch do not distort the mean."""
    one = trainer(str(place / "start"), tmp_path, per_device_eval_batch_size=4,
                  eval_lists={"a": LISTS[:6], "b": LISTS[6:]})
    prepared = prepare_lists(LISTS, one.processing_class, one.args)
    with torch.no_grad():
        losses = torch.cat([one.list_losses(one.model.eval(), one.data_collator([row]))[0] for row in prepared])
    assert one.evaluate(LISTS,
                        metric_key_prefix="held_out")["held_out_loss"] == pytest.approx(losses.mean().item(), abs=2e-6)
    assert one.evaluate()["eval_b_loss"] == pytest.approx(losses[6:].mean().item(), abs=2e-6)
    found = one.evaluate({"x": LISTS[:2], "y": prepared.select([2, 3])}, metric_key_prefix="test")
    assert found["test_y_loss"] == pytest.approx(losses[2:4].mean().item(),
                                                 abs=2e-6) and "test_x_expected_reward" in found
    one.train()
    assert not [k for h in one.state.log_history if "loss" in h for k in h if k.startswith(("eval_", "test_"))]


def test_late_lists_need_the_reference_model(place, tmp_path):
    from peft import LoraConfig

    start, _ = load_policy(place / "start")
    given = trainer(place / "start", tmp_path, loss_type="dpo", max_steps=2, ref_model=start, eval_lists=LISTS[:3])
    given.train()
    assert given.evaluate(LISTS[:3], metric_key_prefix="late")["late_loss"] == given.evaluate()["eval_loss"]
    adapter = trainer(place / "start", tmp_path, loss_type="dpo", max_steps=2,
                      peft_config=LoraConfig(r=2, target_modules=["q_proj"]), eval_lists=LISTS[:3])
    adapter.train()
    assert adapter.evaluate(LISTS[:3], metric_key_prefix="late")["late_loss"] == adapter.evaluate()["eval_loss"]
    without = trainer(place / "start", tmp_path, loss_type="dpo", max_steps=2)
    without.train()
    with pytest.raises(LireError, match="ref_model"):
        without.evaluate(LISTS[:3])


def test_a_path_and_bf16_and_callbacks(place, tmp_path):
    seen = []

    class Count(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("expected_reward"))

    one = LIRETrainer(place / "start",
                      LIREConfig(**{"output_dir": str(tmp_path), "save_strategy": "no", "max_steps": 2, **BASE,
                                    "bf16": True}), LISTS, callbacks=[Count()])
    one.train()
    assert len([s for s in seen if s is not None]) >= 2 and one.args.bf16

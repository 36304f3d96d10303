"""An adapter's folder is its base with the adapter on it, everywhere; trained further it goes on from there, and what
is saved loads back as what was trained."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_policy import make_start

from lire_nb.adapters import merge_adapter, merged_policy, put_adapter
from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.enhancement import self_enhance, train_policy
from lire_nb.identity import policy_identity
from lire_nb.lists import save_lists
from lire_nb.logprobs import dataset_logps
from lire_nb.models import load_policy, Policy
from lire_nb.records import make_record
from lire_nb.sampling import sample_lists, SamplingSettings
from lire_nb.training import LIREConfig, LIRETrainer

LISTS = [make_record(f"film {i} was", [" good", " bad", " so so"], rewards=[1.0, 0.0, 0.5], id=str(i))
         for i in range(3)]
LATE = [make_record("book was", [" fine", " dull"], rewards=[1.0, 0.0], id="late")]
TRAINING = dict(bf16=False, use_cpu=True, per_device_train_batch_size=2, num_train_epochs=3.0, learning_rate=5e-2)
STILL = {**TRAINING, "learning_rate": 0.0, "num_train_epochs": 1.0}


def lora(rank=4, **options) -> LoraConfig:
    return LoraConfig(**{"r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"],
                         "task_type": "CAUSAL_LM", **options})


def logps(policy, lists=LISTS) -> list:
    """Summed log-probs under a folder, or a model in memory."""
    model, tokenizer = load_policy(policy, device="cpu") if isinstance(policy, (str, Path)) else policy
    return [v for row, _ in dataset_logps(model, tokenizer, lists) for v in row]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, and r1: an adapter trained on it."""
    folder = tmp_path_factory.mktemp("adapters")
    make_start(folder / "base", dropout=0.0)
    train_policy(folder / "base", LISTS, folder / "r1", trainer_options={"peft_config": lora()}, **TRAINING)
    return folder


def test_12_an_adapter_folder_loads_as_its_base_with_the_adapter(place):
    model, _ = load_policy(place / "r1", device="cpu")
    assert isinstance(model, PeftModel) and not model.training
    assert max(abs(a - b) for a, b in zip(logps(place / "r1"), logps(place / "base"))) > 0.1
    with model.disable_adapter():
        assert logps((model, load_policy(place / "base")[1])) == logps(place / "base")


@pytest.mark.parametrize("asked", [{}, {"target_modules": None}])
def test_12_trained_further_with_no_learning_rate_it_is_what_it_was(place, tmp_path, asked):
    train_policy(place / "r1", LISTS, tmp_path / "r2", trainer_options={"peft_config": lora(**asked)}, **STILL)
    assert logps(tmp_path / "r2") == logps(place / "r1")
    assert json.loads((tmp_path / "r2" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        (place / "base").resolve()
    )


def test_12_trained_further_it_moves_on_from_there(place, tmp_path):
    train_policy(place / "r1", LISTS, tmp_path / "r2", trainer_options={"peft_config": lora()},
                 **{**TRAINING, "learning_rate": 1e-4, "num_train_epochs": 1.0})
    near, far = (max(abs(a - b) for a, b in zip(logps(tmp_path / "r2"), logps(place / name)))
                 for name in ("r1", "base"))
    assert 0 < near < far / 5


def test_12_the_command_line_goes_on_from_an_adapter(place, tmp_path, capfd):
    save_lists(LISTS, tmp_path / "l.jsonl")
    command = ["train", "--lists", str(tmp_path / "l.jsonl"), "--policy", str(place / "r1"), "--set", "learning_rate=0",
               "--set", "max_steps=1", "--set", "use_cpu=true"]
    assert main([*command, "--lora-rank", "4", "--out", str(tmp_path / "r2")]) == 0
    assert logps(tmp_path / "r2") == logps(place / "r1")
    capfd.readouterr()
    for more, words in ((("--lora-rank", "2"), ("r: 4 there, 2 now", "--merge-adapter")),
                        (("--lora-rank", "4", "--lora-alpha", "9"), ("lora_alpha",)),
                        (("--lora-rank", "4", "--lora-targets", "k_proj"), ("target_modules",)),
                        ((), ("--merge-adapter", "--lora-rank 4"))):
        assert main([*command, *more, "--out", str(tmp_path / "no")]) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lire ")]
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not [p for p in tmp_path.iterdir() if "no" in p.name]
    assert main([*command, "--merge-adapter", "--out",
                 str(tmp_path / "full")]) == 0 and (tmp_path / "full" / "model.safetensors").is_file()
    torch.testing.assert_close(torch.tensor(logps(tmp_path / "full")), torch.tensor(logps(place / "r1")), rtol=1e-5,
                               atol=1e-4)


class Keep:
    """The log-probs of the policy in memory when training ends."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Kept(TrainerCallback):
            def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
                self.logps = logps((model, processing_class))

        return Kept()


@pytest.mark.parametrize("merge, asked", [
    (False, {}), (True, None), (True, {"rank": 2}), (True, {"target_modules": ["o_proj"]}), (True, {"use_dora": True}),
    (True, {"use_rslora": True, "lora_alpha": 8}),
])
def test_12_what_is_saved_loads_back_as_what_was_trained(place, tmp_path, merge, asked):
    keep = Keep()
    options = {"trainer_options": {"peft_config": lora(**asked)}} if asked is not None else {}
    train_policy(place / "r1", LISTS, tmp_path / "here" / "r2", callbacks=[keep], merge_adapter=merge, **options,
                 **{**TRAINING, "num_train_epochs": 1.0})
    shutil.move(tmp_path / "here", tmp_path / "moved")
    assert logps(tmp_path / "moved" / "r2") == keep.logps


@pytest.mark.parametrize("kind",
                         [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 8}, {"init_lora_weights": "gaussian"},
                          {"modules_to_save": ["lm_head"]}])
def test_12_kinds_of_adapters_are_trained_further_and_load_back(place, tmp_path, kind):
    train_policy(place / "base", LISTS, tmp_path / "r1", trainer_options={"peft_config": lora(**kind)}, **TRAINING)
    train_policy(tmp_path / "r1", LISTS, tmp_path / "r2", trainer_options={"peft_config": lora(**kind)}, **STILL)
    assert logps(tmp_path / "r2") == logps(tmp_path / "r1") != logps(place / "base")


def test_12_full_training_of_an_adapter_and_merging_of_a_full_policy_are_refused(place, tmp_path):
    with pytest.raises(LireError, match="is an adapter.*merge_adapter=True"):
        train_policy(place / "r1", LISTS, tmp_path / "no", **STILL)
    with pytest.raises(LireError, match="has no adapter to merge"):
        train_policy(place / "base", LISTS, tmp_path / "no", merge_adapter=True, **STILL)
    with pytest.raises(LireError, match="another adapter already.*r: 4 there, 3 now"):
        self_enhance(place / "r1", [{"id": "a", "prompt": "film"}], lambda p, c: [0.0] * len(c), tmp_path / "no",
                     trainer_options={"peft_config": lora(3)})
    with pytest.raises(LireError, match="another adapter already"):
        LIRETrainer(place / "r1", LIREConfig(output_dir=str(tmp_path / "t"), report_to="none", **STILL), LISTS,
                    peft_config=lora(3))
    assert not (tmp_path / "no").exists()


def test_12_an_adapter_that_cannot_be_loaded_is_said_in_a_line(place, tmp_path):
    from lire_nb.models import resolve_model

    folder = shutil.copytree(place / "r1", tmp_path / "r1")
    said = json.loads((folder / "adapter_config.json").read_text())

    def fails(words, **values):
        (folder / "adapter_config.json").write_text(json.dumps({**said, **values}))
        for use in (load_policy, policy_identity,
                    lambda f: train_policy(f, LISTS, tmp_path / "no", trainer_options={"peft_config": lora()},
                                           **STILL)):
            with pytest.raises(LireError, match=words) as e:
                use(folder)
            assert "remedy" in str(e.value) and str(folder) in str(e.value)

    fails("base of this adapter cannot be had.*gone", base_model_name_or_path=str(tmp_path / "gone"))
    fails("not the configuration of an adapter", base_model_name_or_path=None)
    fails("an adapter itself", base_model_name_or_path=str(place / "r1"))
    (folder / "adapter_config.json").write_text(json.dumps(said))
    wide = make_start(tmp_path / "wide", dropout=0.0)
    (wide / "config.json").write_text((wide / "config.json").read_text().replace('"num_key_value_heads": 1',
                                                                                 '"num_key_value_heads": 2'))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LireError, match="adapter_model.safetensors"):
        resolve_model(folder)
    shutil.copy(place / "base" / "model.safetensors", folder)
    with pytest.raises(LireError, match="an adapter and a full model"):
        resolve_model(folder)


def test_12_an_adapter_is_told_apart_by_alpha_and_by_its_base(place, tmp_path):
    folder = shutil.copytree(place / "r1", tmp_path / "r1")
    before = policy_identity(folder)
    assert before == policy_identity(place / "r1")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert policy_identity(folder) != before
    shutil.copytree(place / "base", tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps({**config,
                                                            "base_model_name_or_path": str(tmp_path / "base")}))
    assert policy_identity(folder) == before
    make_start(tmp_path / "base", dropout=0.0, seed=5)
    assert policy_identity(folder) != before


def test_a_policy_is_one_value_at_every_door(place, tmp_path, monkeypatch):
    """Made once, it stands where a name or a folder stands."""
    policy, calls = Policy.of(place / "r1"), []
    assert Policy.of(policy) is policy and Policy.of(str(place / "r1")) == policy
    assert Path(policy.base.folder) == place / "base" and policy.base.adapter is None and policy.base.base is None
    monkeypatch.setattr("lire_nb.models._content_hash", lambda path: calls.append(path.name) or path.name)
    assert policy.fingerprint == policy_identity(policy) and len(set(calls)) < len(calls) < 20  # and that of the base
    monkeypatch.undo()
    assert policy_identity(policy) == policy_identity(place / "r1") == Policy.of(place / "r1").fingerprint
    assert logps(policy.load(device="cpu")) == logps(place / "r1") and load_policy(pair := policy.load()) is pair
    settings = SamplingSettings(max_new_tokens=3)
    drawn = [sample_lists(one, ["film"], 2, settings=settings, progress=False)["completions"]
             for one in (policy, place / "r1")]
    assert drawn[0] == drawn[1]
    train_policy(policy, LISTS, tmp_path / "r2", trainer_options={"peft_config": lora()}, **STILL)
    assert logps(tmp_path / "r2") == logps(place / "r1")
    trainer = LIRETrainer(policy, LIREConfig(output_dir=str(tmp_path), report_to="none", **STILL), LISTS)
    assert isinstance(trainer.model, PeftModel)


def test_12_rounds_of_self_enhancement_go_on_with_one_adapter(place, tmp_path):
    prompts = [{"id": str(i), "prompt": f"film {i} was", "meta": {}} for i in range(3)]
    policies = self_enhance(place / "base", prompts, lambda p, c: [float(sum(map(ord, x)) % 7) for x in c],
                            tmp_path / "run", evolve=2, num_candidates=3, settings=SamplingSettings(max_new_tokens=5),
                            progress=False, training={**TRAINING, "temperature": 20.0},
                            trainer_options={"peft_config": lora()})
    base, first, second = (logps(p) for p in (place / "base", *policies))
    assert base != first and first != second, (base, first, second)
    assert [json.loads((p / "adapter_config.json").read_text())["base_model_name_or_path"]
            for p in policies] == [str((place / "base").resolve())] * 2
    sampled = [json.loads((p.parent / "manifest.json").read_text())["sampled_by"]["fingerprint"] for p in policies]
    assert sampled == [policy_identity(place / "base"), policy_identity(policies[0])]


# line 13: the reference is the policy at the start

def dpo(model, place, **options):
    tokenizer = load_policy(place / "base")[1]
    args = LIREConfig(output_dir=str(place / "trainer"), loss_type="dpo", report_to="none", save_strategy="no",
                      **{**STILL, **options.pop("args", {})})
    return LIRETrainer(model, args, LISTS, processing_class=tokenizer, **options)


@pytest.mark.parametrize("name", ["r1", "base"])
@pytest.mark.parametrize("memory", [True, False])
def test_13_the_reference_of_late_lists_is_the_policy_at_the_start(place, name, memory):
    model = load_policy(place / name, device="cpu")[0] if memory else place / name
    trainer = dpo(model, place, peft_config=lora(), eval_dataset=LATE)
    assert trainer.evaluate(LATE)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    for lists in (LATE, LISTS, None):
        assert trainer.evaluate(lists)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind",
                         [{}, {"use_dora": True}, {"init_lora_weights": False}, {"modules_to_save": ["lm_head"]}])
def test_13_after_training_early_and_late_lists_agree(place, tmp_path, kind):
    trainer = dpo(place / "base", place, peft_config=lora(**kind), eval_dataset=LATE,
                  args={"learning_rate": 5e-2, "reference_cache": str(tmp_path)})
    trainer.train()
    early, late = trainer.evaluate()["eval_loss"], trainer.evaluate(LATE)["eval_loss"]
    assert early == pytest.approx(late, abs=1e-5) and abs(early - math.log(2)) > 1e-4


def test_13_a_trained_adapter_is_its_own_reference_after_training(place, tmp_path):
    trainer = dpo(place / "r1", place, eval_dataset=LATE, args={"learning_rate": 1e-2})
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(LATE)["eval_loss"], abs=1e-5)
    tokenizer = load_policy(place / "r1")[1]
    from lire_nb.logprobs import policy_at_start

    with policy_at_start(trainer.model):
        assert logps((trainer.model, tokenizer)) == logps(place / "r1")
    assert logps((trainer.model, tokenizer)) != logps(place / "r1")


@pytest.mark.parametrize("name", ["r1", "base"])
def test_13_a_reference_by_name_is_loaded(place, name):
    early = dpo(place / "base", place, ref_model=str(place / name), eval_dataset=LATE)
    given = dpo(place / "base", place, ref_model=load_policy(place / name, device="cpu")[0], eval_dataset=LATE)
    assert early.evaluate()["eval_loss"] == given.evaluate()["eval_loss"] == early.evaluate(LATE)["eval_loss"]


def test_13_full_fine_tuning_with_late_lists_still_needs_a_reference(place):
    trainer = dpo(place / "base", place)
    assert trainer.evaluate(LATE)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    with pytest.raises(LireError, match="the policy at the start is gone.*ref_model"):
        trainer.evaluate(LATE)


def test_13_the_kl_to_the_start_of_a_trained_adapter_begins_at_zero(place):
    from lire_nb.watching import EvaluationCallback

    watch = EvaluationCallback([{"id": str(i), "prompt": f"film {i} was", "meta": {}} for i in range(2)],
                               {"length": lambda p, c: [float(len(x)) for x in c]},
                               settings=SamplingSettings(max_new_tokens=4), every=1)
    trainer = dpo(place / "r1", place, callbacks=[watch], args={"learning_rate": 5e-2})
    trainer.train()
    kls = [log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log]
    assert kls[0] == 0 and kls[-1] > 1e-4


def test_13_a_peft_model_in_memory_with_a_trained_adapter(place):
    """As trl#1340: loaded by peft itself, learning rate 0; the base as reference gave 0.587 in the place of log 2."""
    base, tokenizer = load_policy(place / "base", device="cpu")
    trainer = dpo(PeftModel.from_pretrained(base, place / "r1", is_trainable=True), place)
    trainer.train()
    assert trainer.evaluate(LATE)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    with trainer.model.disable_adapter():
        assert max(abs(a - b)
                   for a, b in zip(logps((trainer.model, tokenizer), LATE), logps(place / "r1", LATE))) > 1e-3


def _related(place, how):
    """(the trained model, one that would move along with it)"""
    model = load_policy(place / ("base" if how in ("itself", "its layers", "its values") else "r1"), device="cpu")[0]
    if how == "the base inside":  # its layers hold the adapter
        return model, model.get_base_model()
    if how == "its layers":
        other = load_policy(place / "base", device="cpu")[0]
        other.model.layers = model.model.layers
        return model, other
    if how == "its values":  # other parameters in one place of memory
        other = load_policy(place / "base", device="cpu")[0]
        other.load_state_dict(model.state_dict(), assign=True)
        return model, other
    return model, model


@pytest.mark.parametrize("how", ["itself", "itself with an adapter", "the base inside", "its layers", "its values"])
def test_a_reference_that_is_trained_along_is_refused(place, how):
    from lire_nb.watching import EvaluationCallback

    model, other = _related(place, how)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(LireError, match="ref_model.*would move along"):
        dpo(model, place, ref_model=other)
    scored = []
    watch = EvaluationCallback([{"id": str(i), "prompt": f"film {i} was", "meta": {}} for i in range(2)],
                               {"length": lambda p, c: scored.append(0) or [float(len(x)) for x in c]},
                               settings=SamplingSettings(max_new_tokens=4), start=other, max_kl=0.5)
    trainer = dpo(model, place, callbacks=[watch])
    with pytest.raises(LireError, match="start.*would move along"):
        trainer.train()
    assert not scored and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_full_model_that_would_get_the_adapter_is_no_reference(place):
    model = load_policy(place / "base", device="cpu")[0]
    with pytest.raises(LireError, match="ref_model.*would move along"):
        dpo(model, place, ref_model=model, peft_config=lora())
    assert not any("lora" in name for name, _ in model.named_modules())  # refused before the adapter was put in


def test_a_reference_may_share_what_is_not_trained(place):
    model, other = (load_policy(place / "base", device="cpu")[0] for _ in range(2))
    other.model.embed_tokens = model.model.embed_tokens.requires_grad_(False)
    trainer = dpo(model, place, ref_model=other, args={"learning_rate": 5e-2, "num_train_epochs": 2.0})
    trainer.train()
    policy, tokenizer = trainer.model.eval(), load_policy(place / "base")[1]
    (new, bad), (old, old_bad) = logps((policy, tokenizer), LATE), logps(place / "base", LATE)
    margin = trainer.args.loss_settings()["beta"] * ((new - bad) - (old - old_bad))
    assert trainer.evaluate(LATE)["eval_loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-5)


# where an adapter's base lies, and whether it is still the one that was trained on

def by_hand(base: Path, adapter: Path, ids=((5, 6, 7),)) -> torch.Tensor:
    """Logits of a base with a LoRA adapter of scale 1 added to its weights by hand, from the files alone."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, parts = AutoModelForCausalLM.from_pretrained(base), load_file(adapter / "adapter_model.safetensors")
    for key in parts:
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", "")
            model.get_submodule(name).weight.data += parts[key.replace("lora_A", "lora_B")] @ parts[key]
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits


def logits(policy, ids=((5, 6, 7),)) -> torch.Tensor:
    with torch.no_grad():
        return load_policy(policy, device="cpu")[0](torch.tensor(ids)).logits


def base_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def randomly(folder: Path, seed: int = 9) -> Path:
    """An adapter that does something, in the place of one without effect."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    parts = {name: 0.3 * torch.randn(t.shape, generator=generator)
             for name, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(parts, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def saved(base, folder: Path, **options) -> Path:
    """What a trainer of the notebooks saves, with no step taken, and then with parts that do something."""
    args = LIREConfig(output_dir=str(folder.parent / "out"), report_to="none", **STILL)
    LIRETrainer(base, args, LISTS, peft_config=lora(**options)).save_model(str(folder))
    return randomly(folder)


def test_a_folder_of_the_same_name_where_one_stands_is_not_the_base(place, tmp_path, monkeypatch):
    """The base of an adapter on a merged one lies in its own folder, under the name `base`."""
    train_policy(place / "r1", LISTS, tmp_path / "r2", trainer_options={"peft_config": lora(2)}, merge_adapter=True,
                 **STILL)
    randomly(tmp_path / "r2")
    assert base_of(tmp_path / "r2") == "base"
    monkeypatch.chdir(place)  # here lies another ./base
    assert Path(Policy.of(tmp_path / "r2").base.folder) == tmp_path / "r2" / "base"
    torch.testing.assert_close(logits(tmp_path / "r2"), by_hand(tmp_path / "r2" / "base", tmp_path / "r2"), rtol=1e-4,
                               atol=1e-4)
    assert (logits(tmp_path / "r2") - by_hand(place / "base", tmp_path / "r2")).abs().max() > 1e-2


@pytest.mark.parametrize("named", ["base", "./base", "models/base", ""])
def test_a_relative_base_is_looked_up_in_the_adapters_folder_alone(place, tmp_path, monkeypatch, named):
    folder = shutil.copytree(place / "r1", tmp_path / "elsewhere" / "r1")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    make_start(tmp_path / "here" / "base", seed=5), make_start(tmp_path / "here" / "models" / "base", seed=5)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LireError, match="base of this adapter cannot be had.*whole path"):
        load_policy(folder)
    if named:
        shutil.copytree(place / "base", folder / named)
        assert logps(folder) == logps(place / "r1")


def test_a_trainer_saves_the_whole_path_of_a_base_named_from_here(place, tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 5)):
        make_start(tmp_path / name / "start", dropout=0.0, seed=seed)
    monkeypatch.chdir(tmp_path / "a")
    folder = saved("start", tmp_path / "a" / "pol")
    assert base_of(folder) == str((tmp_path / "a" / "start").resolve())
    monkeypatch.chdir(tmp_path / "b")
    torch.testing.assert_close(logits(folder), by_hand(tmp_path / "a" / "start", folder), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_and_an_adapter_trained_further_name_the_same_base(place, tmp_path, monkeypatch):
    """The base inside an adapter's folder is named from there; saved elsewhere it is the same one."""
    train_policy(place / "r1", LISTS, tmp_path / "r2", trainer_options={"peft_config": lora(2)}, merge_adapter=True,
                 **STILL)
    monkeypatch.chdir(tmp_path)
    args = LIREConfig(output_dir="out", report_to="none", save_strategy="steps", save_steps=1, max_steps=1, **STILL)
    trainer = LIRETrainer("r2", args, LISTS, peft_config=lora(2))
    trainer.train()
    trainer.save_model("r3")
    for folder in (tmp_path / "r3", tmp_path / "out" / "checkpoint-1"):
        assert base_of(folder) == str((tmp_path / "r2" / "base").resolve())
        assert logps(folder) == logps(tmp_path / "r2")


def test_an_adapter_on_a_model_merged_in_memory_names_no_base(place, tmp_path):
    """The folder that the merged model came from holds other weights."""
    model, tokenizer = load_policy(place / "r1", device="cpu")
    put_adapter(merged_policy(model), lora()).save_pretrained(tmp_path / "r2")
    tokenizer.save_pretrained(tmp_path / "r2")
    assert base_of(tmp_path / "r2") is None
    with pytest.raises(LireError, match="base_model_name_or_path"):
        load_policy(tmp_path / "r2")


def test_an_adapter_whose_base_was_trained_anew_is_refused(place, tmp_path, capfd):
    make_start(tmp_path / "p1", dropout=0.0)
    folder, policy = saved(tmp_path / "p1", tmp_path / "r1"), str(tmp_path / "r1")
    before = logits(folder)
    (tmp_path / "prompts.txt").write_text("film 1 was\nbook 2 was\n")
    shutil.copytree(tmp_path / "p1", tmp_path / "kept")
    make_start(tmp_path / "p1", dropout=0.0, seed=5)
    says = "another model than it was trained on.*put them back, or train the adapter again"
    for use in (load_policy, lambda p: merge_adapter(p, tmp_path / "full"), lambda p: train_policy(
            p, LISTS, tmp_path / "no", trainer_options={"peft_config": lora()}, **STILL)):
        with pytest.raises(LireError, match=says):
            use(policy)
    for command in (["evaluate", "--prompts", str(tmp_path / "prompts.txt"), "--system", f"start={tmp_path / 'kept'}",
                     "--system", f"r1={policy}", "--judge", "len=length", "--out", str(tmp_path / "ev")],
                    ["merge", "--policy", policy, "--out", str(tmp_path / "full")]):
        assert main(command) == 2 and "another model than it was trained on" in capfd.readouterr().err
    assert not (tmp_path / "full").exists() and not (tmp_path / "no").exists()
    shutil.rmtree(tmp_path / "p1")
    (tmp_path / "kept").rename(tmp_path / "p1")  # put back: other times and inodes, the same weights
    assert torch.equal(logits(folder), before)
    (tmp_path / "p1" / "chat_template.jinja").write_text("{{ messages[0].content }}")  # not of the base's weights
    assert torch.equal(logits(folder), before)
    (folder / "lire_base.json").unlink()  # of another program, or of an older version
    make_start(tmp_path / "p1", dropout=0.0, seed=5)
    assert not torch.equal(logits(folder), before)
    (folder / "lire_base.json").write_text("[]")
    with pytest.raises(LireError, match="lire_base.json.*cannot be read"):
        load_policy(folder)


def test_a_base_that_is_trained_anew_while_its_adapter_is_trained_is_noticed(place, tmp_path):
    make_start(tmp_path / "p1", dropout=0.0)
    args = LIREConfig(output_dir=str(tmp_path / "out"), report_to="none", **STILL)
    trainer = LIRETrainer(tmp_path / "p1", args, LISTS, peft_config=lora())
    make_start(tmp_path / "p1", dropout=0.0, seed=5)
    trainer.save_model(str(tmp_path / "r1"))
    with pytest.raises(LireError, match="another model than it was trained on"):
        load_policy(tmp_path / "r1")


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_on_a_base_of_other_layers_is_refused(place, tmp_path, layers):
    """Also one that another program saved: tensors without a place are as wrong as places without a tensor."""
    from transformers import AutoModelForCausalLM

    folder, model = shutil.copytree(place / "r1", tmp_path / "r1"), load_policy(place / "base")[0]
    (folder / "lire_base.json").unlink()
    model.config.num_hidden_layers = layers
    model.config.layer_types = None
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config,
                                                            "base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(LireError, match="cannot be put on its base.*" + ("no place" if layers == 1 else "missing")):
        load_policy(folder)


def test_an_adapter_on_an_asset_names_the_asset_and_not_its_cache(place, tmp_path, monkeypatch):
    from lire_nb.adapters import name_base

    monkeypatch.setenv("LIRE_NB_CACHE", str(tmp_path / "cache"))
    make_start(tmp_path / "cache" / "smollm2-0123456789ab", dropout=0.0)
    model = put_adapter(load_policy(tmp_path / "cache" / "smollm2-0123456789ab", device="cpu")[0], lora())
    model.save_pretrained(tmp_path / "r1")
    name_base(tmp_path / "r1", model)
    assert base_of(tmp_path / "r1") == "smollm2" and not (tmp_path / "r1" / "lire_base.json").exists()


# adapters that would not come back, said before they are trained

@pytest.mark.parametrize("first", ["pissa_niter_1", "pissa_niter_16", "corda", "lora_ga"])
def test_first_weights_that_no_load_repeats_are_refused_before_training(place, tmp_path, first):
    from lire_nb.adapters import check_adapter

    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": first}
    args = LIREConfig(output_dir=str(tmp_path / "t"), report_to="none", **STILL)
    asked = settings if first != "pissa_niter_1" else lora(init_lora_weights=first)
    for use in (lambda: train_policy(place / "base", LISTS, tmp_path / "no", trainer_options={"peft_config": asked}),
                lambda: LIRETrainer(place / "base", args, LISTS, peft_config=asked),
                lambda: check_adapter(place / "base", asked)):
        with pytest.raises(LireError, match=f"what loads back is not what was trained.*{first}.*exact"):
            use()
    assert not (tmp_path / "no").exists()


def test_an_adapter_of_random_first_weights_is_not_trained_further(place, tmp_path):
    from peft import get_peft_model

    model, tokenizer = load_policy(place / "base", device="cpu")
    model = get_peft_model(model, lora(init_lora_weights="pissa_niter_4"))
    with pytest.raises(LireError, match="what loads back is not what was trained"):
        put_adapter(model)
    model.save_pretrained(tmp_path / "r1"), tokenizer.save_pretrained(tmp_path / "r1")
    for use in (load_policy, lambda f: train_policy(f, LISTS, tmp_path / "no",
                                                    trainer_options={"peft_config": lora()}, **STILL)):
        with pytest.raises(LireError, match="what loads back is not what was trained"):
            use(tmp_path / "r1")


@pytest.mark.parametrize("first", [True, "gaussian", "orthogonal", "olora", "pissa", "mica"])
def test_first_weights_that_are_allowed_load_back(place, tmp_path, first):
    """Trained as in `LIRETrainer`, and loaded by peft itself, twice, with other random numbers around."""
    from transformers import AutoModelForCausalLM

    keep, ids = {}, torch.tensor([[5, 6, 7, 8]])
    model = put_adapter(load_policy(place / "base", device="cpu")[0], lora(init_lora_weights=first))
    for name, weight in model.named_parameters():
        weight.data += 0.1 * weight.requires_grad
    with torch.no_grad():
        keep = model.eval()(ids).logits
        model.save_pretrained(tmp_path / "r1")
        for seed in (5, 6):
            torch.manual_seed(seed)
            plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), tmp_path / "r1")
            assert torch.equal(plain.eval()(ids).logits, keep)


@pytest.mark.parametrize("names, active", [(["default", "two"], "two"), (["default", "two"], "default"),
                                           (["two"], "two")])
def test_a_model_of_several_adapters_or_of_a_named_one_is_refused_before_training(place, tmp_path, names, active):
    """Only `default` is saved where it loads back; the one that was asked for loads from a folder of its own."""
    from peft import get_peft_model

    base, tokenizer = load_policy(place / "base", device="cpu")
    model = get_peft_model(base, lora(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(init_lora_weights=False))
    model.set_adapter(active)
    args = LIREConfig(output_dir=str(tmp_path / "t"), report_to="none", **STILL)
    with pytest.raises(LireError, match="several adapters, or one of another name.*selected_adapters"):
        LIRETrainer(model, args, LISTS, processing_class=tokenizer)
    model.save_pretrained(tmp_path / "out", selected_adapters=[active])  # the remedy
    folder = tmp_path / "out" / ("" if active == "default" else active)
    assert logps(folder) == logps((model.eval(), tokenizer))
    LIRETrainer(folder, args, LISTS)


# a policy is what its folder holds now

def test_a_policy_made_before_its_folder_was_trained_anew_is_the_new_one(place, tmp_path):
    from lire_nb.evaluation import evaluate_systems

    make_start(tmp_path / "start", dropout=0.0)
    make_start(tmp_path / "p1", dropout=0.0, seed=3)
    policy, prompts = Policy.of(tmp_path / "p1"), [{"prompt": f"film {i} was"} for i in range(3)]
    judge = {"ord": lambda p, c: [float(sum(map(ord, x))) for x in c]}

    def rows(folder, system):
        found = evaluate_systems(tmp_path / folder, {"start": str(tmp_path / "start"), "new": system}, prompts, judge,
                                 settings=SamplingSettings(max_new_tokens=4), progress=False)
        return [(row["system"], row["metric"], row["value"]) for row in found]

    before, first = policy.fingerprint, rows("run", policy)
    make_start(tmp_path / "p1", dropout=0.0, seed=8)
    assert policy.fingerprint == policy_identity(tmp_path / "p1") != before
    with pytest.raises(LireError, match="another configuration"):
        rows("run", policy)
    assert rows("new", policy) == rows("named", str(tmp_path / "p1")) != first


def test_a_policy_whose_folder_became_an_adapter_is_one(place, tmp_path):
    policy = Policy.of(make_start(tmp_path / "p1", dropout=0.0))
    assert policy.adapter is None and policy.base is None
    shutil.rmtree(tmp_path / "p1"), shutil.copytree(place / "r1", tmp_path / "p1")
    assert logps(policy.load(device="cpu")) == logps(place / "r1") and policy.base == Policy.of(place / "base")
    with pytest.raises(LireError, match="is an adapter"):
        train_policy(policy, LISTS, tmp_path / "no", **STILL)


def test_a_folder_that_is_gone_is_what_it_was_and_a_hub_is_asked_once(place, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("lire_nb.models._hub_file", lambda name, file: asked.append(file))
    policy = Policy.of("nobody/nothing")
    assert [policy.adapter, policy.fingerprint, policy.adapter, policy.fingerprint] == [None, "nobody/nothing"] * 2
    assert len(asked) == len({*asked}) + 1  # one of the two files is asked for by both questions
    policy = Policy.of(shutil.copytree(place / "base", tmp_path / "base"))
    before = policy.fingerprint
    shutil.rmtree(tmp_path / "base")
    assert policy.fingerprint == before == policy_identity(place / "base")

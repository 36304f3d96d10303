"""What is reused is what is asked for: everything on disk is told apart by content, a difference is one line, and one
command writes to a folder at a time."""
import collections
import copy
import decimal
import fractions
import functools
import importlib.util
import json
import operator
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from tiny_policy import make_start
from transformers import AutoModelForCausalLM

from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.enhancement import self_enhance, train_policy
from lire_nb.evaluation import evaluate_systems
from lire_nb.identity import claim_folder, policy_identity, reward_identity, value_identity
from lire_nb.lists import save_lists
from lire_nb.logprobs import reference_logps
from lire_nb.models import load_policy, model_fingerprint
from lire_nb.records import make_record
from lire_nb.sampling import SamplingSettings

SHORT = SamplingSettings(max_new_tokens=4)
PROMPTS = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}} for i in range(3)]
LISTS = [make_record(f"film {i} was", [" good", " bad"], rewards=[1.0, 0.0], id=str(i)) for i in range(3)]
TRAINING = dict(learning_rate=1e-2, bf16=False, use_cpu=True, per_device_train_batch_size=2, num_train_epochs=1.0)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def short(prompts, completions):
    return [-float(len(c)) for c in completions]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("policy") / "start")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lire(capfd, *arguments) -> tuple[int, str]:
    """Exit code and the last line that the command wrote to stderr."""
    code = main([str(a) for a in arguments])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lire ")]
    assert code == 0 or len(lines) == 1, lines
    return code, lines[-1] if lines else ""


def refused(capfd, folder: Path, command: tuple, *words: str) -> None:
    """Exit code 2, one short line with these words, nothing overwritten."""
    before = files(folder)
    code, line = lire(capfd, *command)
    assert code == 2 and len(line) < 700, (code, line)
    for word in words:
        assert word in line, line
    assert files(folder) == before


def change_file(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# line 11: policies

@pytest.mark.parametrize("file, values", [
    ("config.json", {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}),
    ("generation_config.json", {"eos_token_id": [0, 5]}),
    ("tokenizer_config.json", {"chat_template": "{{ messages }}"}), ("tokenizer_config.json", {"eos_token": "a"}),
    ("tokenizer_config.json", {"add_bos_token": True}),
])
def test_11_a_policy_is_its_configuration_and_tokenizer_too(tmp_path, file, values):
    folder = make_start(tmp_path / "start")
    before = policy_identity(folder)
    change_file(folder / file, **values)
    assert policy_identity(folder) != before


@pytest.mark.parametrize("file",
                         ["chat_template.jinja", "special_tokens_map.json", "merges.txt",
                          "model-00002-of-00002.safetensors"])
def test_11_a_new_file_that_is_read_makes_another_policy(tmp_path, file):
    folder = make_start(tmp_path / "start")
    before = policy_identity(folder)
    (folder / file).write_text("{}")
    assert policy_identity(folder) != before


def test_11_a_policy_is_not_its_path_nor_the_version_that_wrote_it(tmp_path):
    folder = make_start(tmp_path / "start")
    before = policy_identity(folder)
    change_file(folder / "config.json", transformers_version="5.0", _name_or_path="elsewhere")
    (folder / "training.jsonl").write_text("{}\n")
    folder.rename(tmp_path / "moved")
    assert policy_identity(tmp_path / "moved") == before


@pytest.mark.parametrize("name, value",
                         [("rope_parameters", {"rope_theta": 7.0, "rope_type": "default"}), ("sliding_window", 8),
                          ("final_logit_softcapping", 5.0), ("attn_logit_softcapping", 5.0)])
def test_11_a_model_in_memory_is_its_configuration_too(start, name, value):
    model, tokenizer = load_policy(start, device="cpu")
    before = model_fingerprint(model, tokenizer)
    setattr(model.config, name, value)
    assert model_fingerprint(model, tokenizer) != before


def test_11_the_reference_cache_tells_windows_and_alpha_apart(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig

    _, tokenizer = load_policy(make_start(tmp_path / "start"), device="cpu")
    sizes = dict(vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1)

    def wide(window):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MistralConfig(**sizes, sliding_window=window)).eval()

    def scaled(alpha):
        torch.manual_seed(0)
        return get_peft_model(wide(4096),
                              LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"],
                                         init_lora_weights=False, task_type="CAUSAL_LM")).eval()

    for one, other in ((wide(4096), wide(4)), (scaled(2), scaled(64))):
        cached = [reference_logps(m, tokenizer, LISTS, tmp_path / "cache") for m in (one, other)]
        assert cached[1] == reference_logps(other, tokenizer, LISTS) != cached[0]
    model = scaled(64)
    adapted = reference_logps(model, tokenizer, LISTS, tmp_path / "cache")
    with model.disable_adapter():
        assert reference_logps(model, tokenizer, LISTS,
                               tmp_path / "cache") == reference_logps(model, tokenizer, LISTS) != adapted


# line 11: rewards, judges, losses

def edited(source: str, name: str = "reward", **space):
    """The function or object that a module of this source defines."""
    exec(compile(source, "<own>", "exec"), space)  # noqa: S102
    return space[name]


PLAIN = "def reward(prompts, completions):\n    return [1.0 * len(c) for c in completions]\n"


@pytest.mark.parametrize("one, other", [
    (PLAIN, PLAIN.replace("1.0", "2.0")),
    (PLAIN, PLAIN.replace("len(c)", "c.count('a')")),
    ("reward = lambda p, c: [len(x) for x in c]", "reward = lambda p, c: [-len(x) for x in c]"),
    ("SCALE = 1\n" + PLAIN.replace("1.0", "SCALE"), "SCALE = 2\n" + PLAIN.replace("1.0", "SCALE")),
    ("def of(x): return len(x)\n" + PLAIN.replace("len(c)", "of(c)"),
     "def of(x): return -len(x)\n" + PLAIN.replace("len(c)", "of(c)")),
    ("WORDS = {'good': 1}\ndef reward(p, c): return [sum(WORDS.get(w, 0) for w in x.split()) for x in c]",
     "WORDS = {'bad': 1}\ndef reward(p, c): return [sum(WORDS.get(w, 0) for w in x.split()) for x in c]"),
    ("def reward(p, c, scale=1): return [scale * len(x) for x in c]",
     "def reward(p, c, scale=2): return [scale * len(x) for x in c]"),
    ("def make(k): return lambda p, c: [k * len(x) for x in c]\nreward = make(1)",
     "def make(k): return lambda p, c: [k * len(x) for x in c]\nreward = make(2)"),
    ("class R:\n    def __call__(self, p, c): return [1 for x in c]\nreward = R()",
     "class R:\n    def __call__(self, p, c): return [2 for x in c]\nreward = R()"),
    ("class R:\n    k = 1\n    def __call__(self, p, c): return [self.k for x in c]\nreward = R()",
     "class R:\n    k = 2\n    def __call__(self, p, c): return [self.k for x in c]\nreward = R()"),
    ("class R:\n    def one(self, x): return 1\n    def __call__(self, p, c): return [self.one(x) for x in c]\nreward "
     "= R()",
     "class R:\n    def one(self, x): return 2\n    def __call__(self, p, c): return [self.one(x) for x in c]\nreward "
     "= R()"),
    ("class B:\n    def one(self, x): return 1\nclass R(B):\n    def __call__(self, p, c): return [self.one(x) for x "
     "in c]\nreward = R()",
     "class B:\n    def one(self, x): return 2\nclass R(B):\n    def __call__(self, p, c): return [self.one(x) for x "
     "in c]\nreward = R()"),
])
def test_11_an_edited_reward_is_another_reward(one, other):
    assert reward_identity(edited(one)) == reward_identity(edited(one)) != reward_identity(edited(other))
    assert reward_identity(edited(one)) == reward_identity(edited("\n\n" + one + "\n# a comment"))


class Scaled:
    def __init__(self, scale, weights=None, api_key=None):
        self._scale, self.calls, self.seen, self.api_key = scale, 0, {}, api_key
        self.net = weights

    def __call__(self, prompts, completions):
        self.calls += 1
        for c in completions:
            self.seen[c] = self._scale * len(c)
        return [self.seen[c] for c in completions]

    def score(self, prompts, completions):
        return self(prompts, completions)


def net(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(2, 1)


@pytest.mark.parametrize("make", [
    lambda k: Scaled(k), lambda k: Scaled(k).score, lambda k: Scaled(0, net(k)),
    lambda k: Scaled(0, torch.tensor([float(k)])),
    lambda k: functools.partial(short, k), lambda k: functools.partial(Scaled(1), scale=k),
    lambda k: [Scaled(k)].__getitem__(0),
])
def test_11_the_state_of_a_reward_counts_and_what_it_notes_down_does_not(make):
    assert reward_identity(make(1)) == reward_identity(make(1)) != reward_identity(make(2))
    reward = Scaled(1, api_key="a")
    before = reward_identity(reward)
    reward(["p"], ["abc"])
    assert reward_identity(reward) == before == reward_identity(Scaled(1, api_key="b"))  # a key is no part of a reward


@pytest.fixture(scope="module")
def elsewhere() -> list[str]:
    """What another process, which orders sets in another way, says of rewards and of states: a line each."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import test_faults_identity as t; "
            "print([t.reward_identity(r) for r in (t.short, t.Scaled(3), t.Scaled(1).score)]); print(t.several())")
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], env={**ENV, "PYTHONHASHSEED": "7"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.splitlines()


def test_11_a_reward_is_the_same_in_another_process(elsewhere):
    assert elsewhere[0] == str([reward_identity(r) for r in (short, Scaled(3), Scaled(1).score)])


def test_11_the_address_of_a_reward_counts_with_its_query_and_without_secrets():
    from lire_nb.rewards import ServerReward

    one = reward_identity(ServerReward("http://127.0.0.1:1/score?judge=a", name="r"))
    assert one != reward_identity(ServerReward("http://127.0.0.1:1/score?judge=b", name="r"))
    assert one == reward_identity(ServerReward("http://127.0.0.1:1/score?judge=a", name="r",
                                               headers={"Authorization": "Bearer sk-1"}, batch_size=3))
    keys = [reward_identity(ServerReward(f"http://127.0.0.1:1/score?judge=a&api_key={k}")) for k in ("sk-1", "sk-2")]
    assert keys[0] == keys[1] and "sk-" not in keys[0]


def test_11_a_password_in_an_address_of_a_policy_is_refused(tmp_path, capfd):
    (tmp_path / "p.txt").write_text("One.\nTwo.\n")
    refused(capfd, tmp_path,
            ("sample", "--prompts", tmp_path / "p.txt", "--policy", "http://me:hush@127.0.0.1:9/v1#m", "--out",
             tmp_path / "c.jsonl"), "password")
    assert not any(b"hush" in body for body in files(tmp_path).values())


def test_11_a_run_does_not_go_on_with_another_reward(tmp_path, start):
    def by(sign):
        return lambda prompts, completions: [sign * float(len(c)) for c in completions]

    options = dict(num_candidates=2, settings=SHORT, progress=False, training=TRAINING)
    self_enhance(start, PROMPTS, by(1), tmp_path / "run", evolve=1, **options)
    before = files(tmp_path / "run")
    self_enhance(start, PROMPTS, by(1), tmp_path / "run", evolve=1, **options)
    for change in (dict(reward=by(-1)), dict(prompts=[{**PROMPTS[0], "prompt": "film 0 is"}, *PROMPTS[1:]]),
                   dict(prompts=[{**PROMPTS[0], "meta": {"chat": False}}, *PROMPTS[1:]])):
        with pytest.raises(LireError, match="another configuration.*there.*now") as e:
            self_enhance(start, change.get("prompts", PROMPTS), change.get("reward", by(1)), tmp_path / "run", evolve=1,
                         **options)
        assert len(str(e.value)) < 500 and files(tmp_path / "run") == before


def test_41_an_edited_loss_is_another_training(tmp_path, start):
    from lire_nb import rivals as losses
    from lire_nb.lab.plans import config_key

    space = {"LossSpec": losses.LossSpec}
    source = "def own(logps, rewards, mask=None, **kwargs):\n    return -(logps * rewards).sum(-1) * 1.0\n"
    config = {"kind": "train", "method": "own", "training": {"loss_type": "own"}}
    keys = []
    for text in (source, source, source.replace("1.0", "2.0")):
        losses.LOSSES["own"] = losses.LossSpec("own", edited(text, "own", **space))
        try:
            keys.append(config_key(config))
        finally:
            del losses.LOSSES["own"]
    assert keys[0] == keys[1] != keys[2]
    assert config_key({"kind": "train",
                       "training": {"loss_type": "lire"}}) == config_key({"training": {"loss_type": "lire"},
                                                                          "kind": "train"})


SIGN = -1.0


def own_loss(logps, rewards, mask=None, **kwargs):
    return SIGN * (logps * rewards).sum(-1)


def test_41_a_partial_training_with_another_own_loss_is_refused(tmp_path, start, monkeypatch):
    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise InterruptedError

    settings = {**TRAINING, "save_steps": 1, "per_device_train_batch_size": 1}
    with pytest.raises(InterruptedError):
        train_policy(start, LISTS, tmp_path / "policy", loss_type=own_loss, callbacks=[Fail()], **settings)
    with monkeypatch.context() as patch, pytest.raises(LireError, match="another configuration.*loss_type"):
        patch.setattr(sys.modules[__name__], "SIGN", 1.0)
        train_policy(start, LISTS, tmp_path / "policy", loss_type=own_loss, **settings)
    train_policy(start, LISTS, tmp_path / "policy", loss_type=own_loss, **settings)


def test_11_results_of_a_policy_folder_that_was_trained_anew_do_not_count(tmp_path):
    from lire_nb.lab.plans import config_key

    folder = make_start(tmp_path / "policy")
    config = {"kind": "train", "source": {"policy": str(folder)}}
    before = config_key(config)
    make_start(folder, seed=1)
    assert config_key(config) != before


# line 11: commands

def test_11_evaluations_are_checked_before_they_are_used(tmp_path, start):
    other = make_start(tmp_path / "other", seed=1)
    trained = make_start(tmp_path / "trained", seed=2)
    systems, judges = {"start": start, "new": trained}, {"short": short}
    options = dict(num_samples=1, settings=SHORT, progress=False)
    run = tmp_path / "run"
    figures = evaluate_systems(run, systems, PROMPTS, judges, **options)
    before = files(run)
    assert evaluate_systems(run, systems, PROMPTS, judges, **options) == figures
    longer = {"short": lambda prompts, completions: [float(len(c)) for c in completions]}
    for changed in ((systems | {"new": other}, PROMPTS, judges, {}),
                    ({"start": other, "new": trained}, PROMPTS, judges, {}),
                    ({"start": trained, "new": start}, PROMPTS, judges, {}),
                    (systems, PROMPTS[:2], judges, {}),
                    (systems, [{**PROMPTS[0], "prompt": "film 0 is"}, *PROMPTS[1:]], judges, {}),
                    (systems, PROMPTS, longer, {}),
                    (systems, PROMPTS, judges | {"long": longer["short"]}, {}), (systems, PROMPTS, judges, {"seed": 1}),
                    (systems, PROMPTS, judges, {"num_samples": 2}),
                    (systems, PROMPTS, judges, {"settings": SamplingSettings(max_new_tokens=3)}),
                    (systems, PROMPTS, judges, {"max_prompt_length": 5})):
        with pytest.raises(LireError, match="another configuration.*there.*now.*delete evaluation/"):
            evaluate_systems(run, *changed[:3], **{**options, **changed[3]})
        assert files(run) == before
    make_start(trained, seed=3)  # trained anew into the same folder
    with pytest.raises(LireError, match="policy.*there.*now.*delete evaluation/new.jsonl"):
        evaluate_systems(run, systems, PROMPTS, judges, **options)
    (run / "evaluation" / "new.jsonl").unlink()
    anew = evaluate_systems(run, systems, PROMPTS, judges, **options)
    assert anew != figures and evaluate_systems(tmp_path / "fresh", systems, PROMPTS, judges, **options) == anew


def test_11_commands_notice_a_policy_trained_anew_and_an_edited_prompt(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = make_start(tmp_path / "policy")
    Path("p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    save_lists(LISTS, "lists.jsonl")
    quick = ("--max-new-tokens", "3")
    commands = {
        "sample": ("sample", "--prompts", "p.jsonl", "--policy", policy, "--num-candidates", "2", *quick, "--out",
                   "c.jsonl"),
        "train": ("train", "--lists", "lists.jsonl", "--policy", policy, "--set", "max_steps=1", "--set",
                  "use_cpu=true", "--out", "trained"),
        "enhance": ("enhance", "--prompts", "p.jsonl", "--reward", "length", "--policy", policy, "--evolve", "1",
                    "--num-candidates", "2", *quick, "--set", "max_steps=1", "--out", "run"),
    }
    for command in commands.values():
        assert lire(capfd, *command)[0] == 0
        before = files(tmp_path)
        assert lire(capfd, *command)[0] == 0 and files(tmp_path) == before
    prompts = Path("p.jsonl").read_text()
    Path("p.jsonl").write_text(prompts.replace("film 0 was", "film 0 is"))
    for name in ("sample", "enhance"):
        refused(capfd, tmp_path, commands[name], "prompts.p0", "remedy")
    Path("p.jsonl").write_text(prompts)
    make_start(policy, seed=1)
    for command in commands.values():
        refused(capfd, tmp_path, command, "fingerprint", "there", "now", "remedy")


def test_11_a_backbone_trained_anew(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_start(tmp_path / "backbone", dropout=0.0)
    save_lists(LISTS, "lists.jsonl")
    command = ("train-reward", "--lists", "lists.jsonl", "--backbone", "./backbone", "--out", "reward")
    assert lire(capfd, *command)[0] == 0
    make_start(tmp_path / "backbone", dropout=0.0, seed=1)
    refused(capfd, tmp_path, command, "backbone", "there", "now")


def test_11_a_folder_of_the_first_version_is_refused_in_a_line(tmp_path, capfd, start, monkeypatch):
    """As 0.1.0 wrote them: without what they were made from."""
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    sampling = {"max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop": []}
    old = {"output": "c.jsonl", "policy": str(start), "prompts": [p["id"] for p in PROMPTS], "num_candidates": 2,
           "sampling": sampling, "seed": 0}
    Path("c.jsonl.config.json").write_text(json.dumps(old))
    save_lists(LISTS, "c.jsonl")
    sample = ("sample", "--prompts", "p.jsonl", "--policy", start, "--num-candidates", "2", "--max-new-tokens", "3",
              "--out", "c.jsonl")
    refused(capfd, tmp_path, sample, "c.jsonl.config.json", "older version", "remedy")
    Path("run", "round-1").mkdir(parents=True)
    Path("run",
         "enhancement.json").write_text(json.dumps({"policy": str(start), "fingerprint": "0" * 16,
                                                    "reward": "longer_wins",
                                                    "prompts": [[p["id"], p["prompt"]] for p in PROMPTS]}))
    save_lists(LISTS, Path("run", "round-1", "candidates.jsonl"))
    refused(capfd, tmp_path,
            ("enhance", "--prompts", "p.jsonl", "--reward", "length", "--policy", start, "--out", "run"),
            "enhancement.json", "older version")
    Path("eval", "evaluation").mkdir(parents=True)
    Path("eval", "evaluation", "start.jsonl").write_text("{}\n")
    Path("eval", "config.json").write_text(json.dumps({"systems": {"start": str(start)}}))
    refused(capfd, tmp_path,
            ("evaluate", "--prompts", "p.jsonl", "--system", f"start={start}", "--judge", "l=length", "--out", "eval"),
            "config.json", "older version")
    Path("eval", "config.json").unlink()
    with pytest.raises(LireError, match="start.config.json.*cannot be read"):
        evaluate_systems("eval", {"start": start}, PROMPTS, {"l": short})
    assert Path("eval", "evaluation", "start.jsonl").read_text() == "{}\n"


# lines 24 and 25

@pytest.mark.parametrize("twice", [("--system", "new=policy"), ("--judge", "l=vader")])
def test_24_a_name_given_twice_is_refused(tmp_path, capfd, start, twice):
    (tmp_path / "p.txt").write_text("One.\nTwo.\n")
    command = ("evaluate", "--prompts", tmp_path / "p.txt", "--system", f"new={start}", "--judge", "l=length", *twice,
               "--out", tmp_path / "run")
    refused(capfd, tmp_path, command, twice[0], "given twice", "rename")


def test_25_evaluate_with_one_prompt_fails_before_it_samples_and_claims_nothing(tmp_path, capfd, start, monkeypatch):
    (tmp_path / "p.txt").write_text("One.\nTwo.\n")
    def command(*more):
        return ("evaluate", "--prompts", tmp_path / "p.txt", "--system", f"start={start}", "--judge",
                "l=length", "--max-new-tokens", "2", *more, "--out", tmp_path / "run")

    with monkeypatch.context() as patch:
        patch.setattr("lire_nb.sampling.sample_lists", lambda *a, **k: pytest.fail("sampled"))
        refused(capfd, tmp_path, command("--limit", "1"), "2 or more")
        with pytest.raises(LireError, match="2 or more"):
            evaluate_systems(tmp_path / "api", {"start": start}, PROMPTS[:1], {"l": short})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.txt"]


def test_25_a_prompt_that_counts_twice_under_two_ids_is_said(tmp_path, start, caplog):
    options = dict(settings=SamplingSettings(max_new_tokens=2), num_samples=1, progress=False)
    for prompts, said in ((PROMPTS, 0), ([*PROMPTS, {**PROMPTS[0], "id": "another"}], 1)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            evaluate_systems(tmp_path / str(said), {"start": start}, prompts, {"l": short}, **options)
        assert sum("1 of 4 prompts repeat another one" in r.getMessage() for r in caplog.records) == said


def test_25_a_run_that_failed_before_its_first_result_does_not_block_the_corrected_command(tmp_path, capfd, start):
    def broken(prompts, completions):
        raise RuntimeError("no")

    claim_folder(tmp_path / "claimed", {"seed": 0}, made=["*.jsonl"])
    claim_folder(tmp_path / "claimed", {"seed": 1}, made=["*.jsonl"])
    with pytest.raises(LireError, match="broken"):
        evaluate_systems(tmp_path / "eval", {"start": start}, PROMPTS, {"l": broken}, num_samples=1, settings=SHORT,
                         progress=False)
    assert evaluate_systems(tmp_path / "eval", {"start": start}, PROMPTS, {"l": short}, num_samples=1, settings=SHORT,
                            progress=False)
    options = dict(evolve=1, num_candidates=2, settings=SHORT, progress=False, training=TRAINING)
    from lire_nb import enhancement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enhancement, "sample_lists", lambda *a, **k: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError):
            self_enhance(start, PROMPTS, short, tmp_path / "run", seed=1, **options)
    self_enhance(start, PROMPTS, short, tmp_path / "run", seed=2, **options)


# line 27

TWO = """
import sys, time
from pathlib import Path
from lire_nb.enhancement import self_enhance
from lire_nb.base.errors import LireError
from lire_nb.sampling import SamplingSettings
def slow(prompts, completions):
    time.sleep(float(sys.argv[3]))
    return [float(len(c)) for c in completions]
prompts = [{"id": str(i), "prompt": f"film {i} was", "meta": {}} for i in range(2)]
Path(sys.argv[4]).touch()
while not Path(sys.argv[5]).exists():
    time.sleep(0.001)
began = time.monotonic()
try:
    self_enhance(sys.argv[1], prompts, slow, sys.argv[2], evolve=2, num_candidates=2,
                 settings=SamplingSettings(max_new_tokens=2), progress=False,
                 training=dict(bf16=False, use_cpu=True, save_steps=1, per_device_train_batch_size=1))
except LireError as e:
    print(f"{time.monotonic() - began:.2f} {e}", flush=True)
    sys.exit(2)
print("done", flush=True)
"""


def race(start: Path, folder: Path, pause: float = 0.3) -> tuple[list[int], list[str]]:
    """Two processes begin to enhance in one folder at the same moment: their exit codes and last lines."""
    place = folder.with_name(f"{folder.name}-race")
    both = [enhancing(start, folder, pause, place, n) for n in range(2)]
    wait_until(lambda: all((place / f"ready-{n}").exists() for n in range(2)), both)
    (place / "go").touch()
    codes = [process.wait(timeout=120) for process in both]
    return codes, [process.said()[0].strip().splitlines()[-1] for process in both]


def enhancing(start: Path, folder: Path, pause: float, place: Path, number: int) -> warm.Fork:
    """A process that says ready-N in a place, and begins there to enhance as soon as it finds `go`."""
    place.mkdir(exist_ok=True)
    (place / "two.py").write_text(TWO)
    return warm.start(place / "two.py", start, folder, pause, place / f"ready-{number}", place / "go", cwd=place,
                      env=ENV)


def wait_until(there, processes: list[warm.Fork]) -> None:
    until = time.monotonic() + 120
    while not there():
        assert all(p.poll() is None for p in processes) and time.monotonic() < until, [p.said() for p in processes]
        time.sleep(0.01)


def check_race(start: Path, folder: Path) -> None:
    codes, said = race(start, folder)
    assert sorted(codes) == [0, 2], (codes, said)
    line = said[codes.index(2)]
    assert float(line.split()[0]) < 1 and "at work there" in line and "remedy" in line, line
    assert (folder / "round-2" / "policy"
            / "model.safetensors").is_file() and not list(folder.rglob("*.partial")) and not list(folder.rglob(".*"))


def test_27_of_two_runs_in_one_folder_one_works_and_the_other_says_so(tmp_path, start):
    check_race(start, tmp_path / "run")


def test_27_the_lock_of_a_killed_process_does_not_block(tmp_path, start):
    process = enhancing(start, tmp_path / "run", 60, tmp_path / "one", 0)
    (tmp_path / "one" / "go").touch()
    wait_until((tmp_path / "run" / "round-1" / "candidates.jsonl").exists, [process])
    busy = dict(evolve=2, num_candidates=2, settings=SamplingSettings(max_new_tokens=2), progress=False)
    with pytest.raises(LireError, match="at work there"):
        self_enhance(start, PROMPTS, short, tmp_path / "run", **busy)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(LireError, match="another configuration"):  # of a reward that is not ours; the lock is free
        self_enhance(start, PROMPTS, short, tmp_path / "run", **busy)


def test_27_every_writer_holds_a_lock(tmp_path, start):
    from lire_nb.base.files import one_writer
    from lire_nb.servers import Journal

    code = "import sys, time\nfrom lire_nb.base.files import one_writer, take_lock\n"
    code += ("kept = [one_writer(p, inside=i == '1') for p, i in zip(sys.argv[1::2], sys.argv[2::2])]\n[k.__enter__() "
             "for k in kept]\nlock = take_lock('j.jsonl.lock')\nprint('held', flush=True)\ntime.sleep(60)")
    places = {"run": "1", "policy": "0", "eval": "1"}
    holder = subprocess.Popen([sys.executable, "-c", code, *(x for pair in places.items() for x in pair)], env=ENV,
                              stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        for begin in (lambda: self_enhance(start, PROMPTS, short, tmp_path / "run"),
                      lambda: train_policy(start, LISTS, tmp_path / "policy", **TRAINING),
                      lambda: evaluate_systems(tmp_path / "eval", {"start": start}, PROMPTS, {"l": short}),
                      lambda: Journal(tmp_path / "j.jsonl")):
            began = time.monotonic()
            with pytest.raises(LireError, match="at work there|in use by another process"):
                begin()
            assert time.monotonic() - began < 1
        # another process of the same accelerate launch waits for the main one
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "1")
            with one_writer(tmp_path / "run"):
                pass
    finally:
        holder.kill()
        holder.wait()
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add({"a": 1})
    assert train_policy(start, LISTS, tmp_path / "policy", **TRAINING).is_dir()


# what state counts

class Holder:
    """A reward that holds something under any name."""

    def __init__(self, **state):
        vars(self).update(state)

    def __call__(self, prompts, completions):
        return [0.0 for c in completions]


def held(value):
    return reward_identity(Holder(inside=value))


def layers(activation):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 1), activation)


class OwnLayer(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


class Words(dict):
    def __call__(self, prompts, completions):
        return [self.get(c, self.other) for c in completions]

    def __init__(self, other):
        self.other = other


@pytest.mark.parametrize("make", [
    lambda k: types.SimpleNamespace(w=[float(k)]), lambda k: collections.deque([k]), lambda k: fractions.Fraction(k, 3),
    lambda k: decimal.Decimal(k), lambda k: operator.itemgetter(k),
    lambda k: operator.methodcaller("count", str(k)), lambda k: {"a": k}.get, lambda k: re.compile("ab"[k - 1]).findall,
    lambda k: types.MappingProxyType({"a": k}),
    lambda k: collections.defaultdict((int, str)[k - 1]), lambda k: layers((torch.nn.ReLU(), torch.nn.Tanh())[k - 1]),
    OwnLayer, lambda k: torch.nn.Sequential(OwnLayer(k)), Words,
    lambda k: collections.UserDict(a=[k]), lambda k: bytearray([k]), lambda k: random.Random(k),
    lambda k: collections.Counter(a=k), lambda k: net(k),
])
def test_11_state_of_libraries_and_of_python_counts(make):
    assert held(make(1)) == held(make(1)) != held(make(2))
    assert reward_identity(functools.partial(short, make(1))) != reward_identity(functools.partial(short, make(2)))


@pytest.mark.parametrize("name", ["token", "key", "sort_key", "header", "headers", "sig", "auth", "secret"])
def test_11_a_name_like_that_of_a_secret_hides_nothing(name):
    from lire_nb.enhancement import settings_identity

    one, other = (reward_identity(Holder(**{name: v})) for v in ("hush-a", "hush-b"))
    assert one != other and "hush" not in one
    said = json.dumps(settings_identity({"hub_token": "hush", "learning_rate": 0.1}))
    assert "hush" not in said and "0.1" in said


def test_11_a_pipeline_and_a_word_list_of_a_library_count(start):
    from transformers import TextClassificationPipeline

    from lire_nb.rewards import VaderReward

    def pipe(seed):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(start)
        tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForSequenceClassification.from_pretrained(start)
        model.config.pad_token_id = 0
        torch.nn.init.normal_(model.score.weight)
        return TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")

    one = pipe(1)
    before = held(one)
    one("a film")
    assert held(one) == before == held(pipe(1)) != held(pipe(2))
    pytest.importorskip("vaderSentiment")
    one, other = VaderReward(), VaderReward()
    assert reward_identity(one) == reward_identity(other)
    other.analyzer.lexicon["film"] = 4.0
    assert reward_identity(one) != reward_identity(other) and held(one.analyzer) != held(other.analyzer)


class Written:
    def __init__(self, scale, table=None):
        self.scale, self.table, self.calls, self.noted = scale, table or {}, 0, []

    def __call__(self, prompts, completions):
        self.scale *= 1.5
        self.calls = self.calls + 1
        self.noted.append(len(completions))
        for c in completions:
            self.table.setdefault(c, len(c))
        return [self.scale * self.table[c] for c in completions]


def test_11_what_scoring_changes_counts_with_its_first_value(caplog):
    assert len({reward_identity(r) for r in (Written(1), Written(2), Written(1, {"a": 3}))}) == 3
    reward = Written(1)
    before = reward_identity(reward)
    reward(["p"], ["abc"])
    assert reward_identity(reward) == before == reward_identity(Written(1))
    assert "scale of Written" in caplog.text and "calls" not in caplog.text
    noted = Written(1)
    noted.calls, noted.noted = 7, [1]  # never read for a score
    assert reward_identity(noted) == before


def test_11_a_path_kept_as_text_counts_by_what_the_file_holds(tmp_path):
    for name, text in (("a.txt", "good"), ("b.txt", "good"), ("c.txt", "bad")):
        (tmp_path / name).write_text(text)
    a, b, c = (held(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b != c
    (tmp_path / "a.txt").write_text("bad")
    assert held(str(tmp_path / "a.txt")) == c


def test_11_what_cannot_be_described_is_marked_and_said_once(caplog):
    assert held(x for x in "a") == held(x for x in "b") != held(None)
    assert caplog.text.count("generator cannot be read") <= 1

    class Hostile:
        def __reduce_ex__(self, protocol):
            raise OSError("no")

        def __getattr__(self, name):
            raise KeyError(name)

    assert held(Hostile()) == held(Hostile())


def test_11_state_is_the_same_in_another_process(elsewhere):
    assert elsewhere[1] == str(several())


def several():
    things = [types.SimpleNamespace(w={"a", "b", "c"}), collections.deque([1]), str.lower, {"a": 1}.get,
              layers(torch.nn.ReLU()), operator.itemgetter(1), Words(1), threading.Lock(), fractions.Fraction(1, 3)]
    return [held(thing) for thing in things]


def test_11_a_method_of_a_type_may_be_a_default():
    def reward(p, c, norm=str.lower):
        return [float(len(norm(x))) for x in c]

    def other(p, c, norm=str.upper):
        return [float(len(norm(x))) for x in c]

    other.__qualname__ = reward.__qualname__
    assert reward_identity(reward).partition("-")[2] != reward_identity(other).partition("-")[2]


def test_26_all_linear_is_the_same_adapter_in_the_second_round(tmp_path, start):
    from peft import LoraConfig

    from lire_nb.adapters import check_adapter

    asked = dict(r=2, lora_alpha=4, task_type="CAUSAL_LM")
    options = {"trainer_options": {"peft_config": LoraConfig(target_modules="all-linear", **asked)}}
    found = self_enhance(start, PROMPTS, short, tmp_path / "run", evolve=2, num_candidates=2, settings=SHORT,
                         progress=False, training=TRAINING, **options)
    assert len(found) == 2
    some = train_policy(start, LISTS, tmp_path / "some",
                        trainer_options={"peft_config": LoraConfig(target_modules=["q_proj"], **asked)}, **TRAINING)
    with pytest.raises(LireError, match="another adapter.*target_modules"):
        check_adapter(some, options["trainer_options"]["peft_config"])


def test_25_what_the_start_was_measured_with_is_claimed(tmp_path, start):
    from lire_nb.enhancement import StopRule

    def fail(prompts, completions):
        raise InterruptedError

    options = dict(evolve=1, num_candidates=2, settings=SHORT, progress=False, training=TRAINING)
    with pytest.raises(Exception):  # noqa: B017  the first round is interrupted
        self_enhance(start, PROMPTS, fail, tmp_path / "run", stop=StopRule(PROMPTS, gold=short, num_samples=1),
                     **options)
    assert (tmp_path / "run" / "stop.json").exists()
    for path in (tmp_path / "run").glob("round-*/*"):
        path.unlink()
    with pytest.raises(LireError, match="another configuration.*stop.*there.*now"):
        self_enhance(start, PROMPTS, fail, tmp_path / "run", stop=StopRule(PROMPTS, gold=short, num_samples=2),
                     **options)

def test_11_a_template_that_writes_the_date_makes_other_prompts_tomorrow(tmp_path, start, monkeypatch):
    """The prompts of two days are not compared as if they were the same."""
    from lire_nb import evaluation

    model, tokenizer = load_policy(start)
    asked = [{**p, "prompt": [{"role": "user", "content": p["prompt"]}]} for p in PROMPTS]
    for template, dated in (("{{ messages[0].content }}", False), ("{{ strftime_now('%d') }}{{ messages[0].content }}", True)):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
        run, systems = tmp_path / str(dated), {"start": (model, tokenizer)}
        monkeypatch.setattr(evaluation, "time", SimpleNamespace(strftime=lambda form: "2026-01-01"))
        evaluate_systems(run, systems, asked, {"l": short}, settings=SHORT, num_samples=1, progress=False)
        monkeypatch.setattr(evaluation, "time", SimpleNamespace(strftime=lambda form: "2026-01-02"))
        with pytest.raises(LireError, match="date in the chat template") if dated else nullcontext():
            evaluate_systems(run, systems, asked, {"l": short}, settings=SHORT, num_samples=1, progress=False)


@pytest.mark.parametrize("dated", ["start", "second", "third"])
def test_a_template_of_any_system_may_write_the_date(tmp_path, start, monkeypatch, dated):
    """Its rows are of one day; those of systems that do not read it, and are not compared with it, stay."""
    from lire_nb import evaluation

    model, tokenizer = load_policy(start)
    asked = [{**p, "prompt": [{"role": "user", "content": p["prompt"]}]} for p in PROMPTS[:2]]
    systems = {}
    for name in ("start", "second", "third"):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = "{{ strftime_now('%d') }}" * (name == dated) + "{{ messages[0].content }}"
        systems[name] = model, tokenizer
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(strftime=lambda form: "2026-01-01"))
    run = functools.partial(evaluate_systems, tmp_path / "run", prompts=asked, judges={"l": short}, settings=SHORT, num_samples=1,
                  progress=False)
    run(systems=systems)
    run(systems=systems)
    told = {path.name.partition(".")[0] for path in (tmp_path / "run" / "evaluation").glob("*.config.json")
            if "2026-01-01" in path.read_text()}
    assert told == ({"start", "second", "third"} if dated == "start" else {dated})
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(strftime=lambda form: "2026-01-02"))
    with pytest.raises(LireError, match="date in the chat template"):
        run(systems=systems)


if __name__ == "__main__":  # the whole trial: python tests/test_faults_identity.py 10
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        for number in range(int(sys.argv[1])):
            check_race(make_start(Path(place, "start")), Path(place, f"run-{number}"))
            print(f"{number + 1}: one worked, the other said so")


# a file of one's own that is called like a library
OWN = """import dataclasses, functools
SCALE = 1
def reward(prompts, completions): return [SCALE * len(c) for c in completions]
class Counted:
    def __call__(self, prompts, completions): return [SCALE * len(c) for c in completions]
@dataclasses.dataclass
class Weighed:
    scale: float = SCALE
class Base:
    weight = SCALE
counted, method, weighed, base = Counted(), Counted().__call__, Weighed(), Base()
part = functools.partial(reward, completions=[])
"""


@pytest.mark.parametrize("stem", ["evaluate", "statistics", "token", "types", "code", "time", "lire_nb.losses"])
def test_a_file_called_like_a_library_is_the_users(tmp_path, stem):
    """Its edit counts, for a function, a class, their objects and a partial; its identity is that of any other name."""
    import evaluate  # noqa: F401

    from lire_nb.lab.extend import named_function

    shapes = ["reward", "Counted", "counted", "method", "Weighed", "weighed", "Base", "base", "part"]

    def found(name, scale):
        path = tmp_path / f"{name}.py"
        path.write_text(OWN.replace("SCALE = 1", f"SCALE = {scale}"))
        loaded = named_function(f"{path}:reward").__globals__
        return {shape: value_identity(loaded[shape]) for shape in shapes}

    first, other, edited = found(stem, 1), found("nobodys_name", 1), found(stem, 22)
    assert first == other
    assert [shape for shape in shapes if first[shape] == edited[shape]] == []


def test_a_function_of_a_file_that_was_loaded_by_hand_is_the_users(tmp_path):
    """Whoever loads the file under the library's own name is told apart as well: the code's place decides."""
    def found(text):
        path = tmp_path / "statistics.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("statistics", path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        through = types.FunctionType(compile("def f(): return m.mean([1])", "<f>", "exec").co_consts[0], {"m": module})
        return [value_identity(v) for v in (module.mean, module.Mean, module.Mean(), through)]

    before, after = (found(f"def mean(x): return {k}\nclass Mean:\n    def __call__(self, x): return {k}\n")
                     for k in (1, 22))
    assert not set(before) & set(after)
    assert value_identity(statistics.mean) == value_identity(statistics.mean) != before[0]


def test_what_a_library_and_this_package_made_stays_theirs():
    "Wrapped by another library, generated, or in C: by name, as before."
    from lire_nb.identity import _origin, is_ours
    from lire_nb.rivals import LOSSES

    theirs = [statistics.mean, torch.no_grad, torch.nn.Linear, torch.nn.functional.softmax, collections.OrderedDict,
              fractions.Fraction, json, os, dict, int, AutoModelForCausalLM]
    assert {_origin(one) for one in theirs} == {"library"}
    assert all(is_ours(spec.fn) for spec in LOSSES.values()) and _origin(SamplingSettings) == "ours"
    assert not is_ours(short) and not is_ours(functools.partial(statistics.mean))


def test_the_command_refuses_a_reward_that_was_edited(tmp_path, monkeypatch, capfd):
    """As it stands in the file evaluate.py: the second run of the same command says what differs."""
    monkeypatch.chdir(tmp_path)
    save_lists(LISTS, "a.jsonl")
    command = ["score", "--lists", "a.jsonl", "--reward", "evaluate.py:reward", "--out", "sc.jsonl"]
    Path("evaluate.py").write_text(OWN)
    assert lire(capfd, *command)[0] == 0
    Path("evaluate.py").write_text(OWN.replace("SCALE *", "-SCALE *"))
    code, line = lire(capfd, *command)
    assert code != 0 and "reward" in line


# what a reward reads where it runs: modules that it imports there, modules as values, files that its code names
READS = {
    "imported": "def reward(p, c):\n    import own_help\n    return [own_help.points(x) for x in c]",
    "imported_from": "def reward(p, c):\n    from own_help import points\n    return [points(x) for x in c]",
    "imported_below": "def reward(p, c):\n    import own_pack.deep\n    return [own_pack.deep.points(x) for x in c]",
    "imported_by_name": "def reward(p, c):\n    import importlib\n    m = importlib.import_module('own_help')\n"
                        "    return [getattr(m, 'po' + 'ints')(x) for x in c]",
    "imported_by_a_method": "class R:\n    def __call__(self, p, c):\n        import own_help as h\n"
                            "        return [h.points(x) for x in c]\nreward = R()",
    "by_getattr": "import own_help\ndef reward(p, c): return [getattr(own_help, 'po' + 'ints')(x) for x in c]",
    "as_an_attribute": "import own_help\nclass R:\n    def __init__(self): self.m = own_help\n"
                       "    def __call__(self, p, c): return [self.m.points(x) for x in c]\nreward = R()",
    "dotted": "import own_pack.deep\ndef reward(p, c): return [own_pack.deep.points(x) for x in c]",
    "constant": "import json\ndef reward(p, c): return [json.load(open('w.json')) * len(x) for x in c]",
    "joined": "import json, os\ndef reward(p, c):\n    w = json.load(open(os.path.join('gold', 'deep', 'w.json')))\n"
              "    return [w * len(x) for x in c]",
    "divided": "import json\nfrom pathlib import Path\ndef reward(p, c):\n"
               "    return [json.loads((Path('gold') / 'deep' / 'w.json').read_text()) * len(x) for x in c]",
    "beside": "import json, os\nHERE = os.path.dirname(os.path.abspath(__file__))\ndef reward(p, c):\n"
              "    return [json.load(open(f'{HERE}/w.json')) * len(x) for x in c]",
    "kept_as_text": "import json\nclass R:\n    def __init__(self, at): self.at = at\n    def __call__(self, p, c):\n"
                    "        return [json.load(open(self.at + '/w.json')) * len(x) for x in c]\nreward = R('gold/deep')",
    "kept_as_a_path": "import json\nfrom pathlib import Path\nclass R:\n    def __init__(self): self.at = Path('gold')\n"
                      "    def __call__(self, p, c):\n        file, = self.at.rglob('*.json')\n"
                      "        return [json.loads(file.read_text()) * len(x) for x in c]\nreward = R()",
    "weights": "class R:\n    at = 'kept'\n    def __call__(self, p, c):\n        import glob\n"
               "        return [float(open(glob.glob(self.at + '/*')[0]).read()) * len(x) for x in c]\nreward = R()",
}


def _set(factor):
    """Everything that the rewards above read, with another factor."""
    for folder in ("own_pack", "gold/deep", "kept"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("own_pack/__init__.py").touch()
    for name in ("own_help.py", "own_pack/deep.py"):
        Path(name).write_text(f"def points(x): return {factor} * len(x)\n")
    for name in ("w.json", "gold/deep/w.json", "kept/w.safetensors"):
        Path(name).write_text(str(factor))


def _read_anew(place):
    """(the identity, a score) as another process would find them."""
    from lire_nb.lab.extend import named_function

    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    reward = named_function(f"{place / 'reads.py'}:reward")
    before = value_identity(reward)
    score = reward(["q"], ["abc"])[0]
    assert value_identity(reward) == before  # also after it has imported and read
    return before, score


@pytest.fixture
def reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize("how", READS)
def test_what_a_reward_reads_where_it_runs_counts(reads, how):
    (reads / "reads.py").write_text(READS[how] + "\n")
    found = []
    for factor in (1, 22, 1):
        _set(factor)
        found.append(_read_anew(reads))
    assert found[0] == found[2] and [score for _, score in found] == [3, 66, 3]
    assert found[0][0] != found[1][0]


NOTES = ["open('log.txt', 'a').write('x')", "open(os.path.join('gold', 'log.txt'), mode='w').write('x' * len(c[0]))",
         "at = Path('log.txt'); at.write_text(str(time.time()))", "(NOTED / 'n.txt').open('a').write('x')",
         "[json.dumps(x) for x in c]", "import statistics, torch, numpy.random"]


@pytest.mark.parametrize("line", NOTES)
def test_what_a_reward_writes_down_leaves_it_the_same(reads, line):
    """As it was before such files were looked at: the text counts, and not what is in the file."""
    _set(1)
    Path("noted").mkdir()
    Path("noted/n.txt").write_text("first")
    (reads / "reads.py").write_text("import json, os, time\nfrom pathlib import Path\nNOTED = Path('noted')\n"
                                    f"def reward(p, c):\n    {line}\n    return [len(x) for x in c]\n")
    Path("log.txt").touch(), Path("gold/log.txt").touch()
    first = _read_anew(reads)
    assert _read_anew(reads) == first
    if "NOTED" not in line:
        Path("noted/n.txt").write_text("second")
        assert _read_anew(reads) == first


def test_a_folder_in_which_the_work_happens_is_its_path(reads, monkeypatch, caplog):
    from lire_nb import identity

    Path("many").mkdir()
    for k in range(3):
        Path(f"many/{k}").write_text("x")
    before = value_identity(reads), value_identity(reads.parent)
    inside = value_identity(Path("many"))
    Path("many/3").write_text("y")
    assert (value_identity(reads), value_identity(reads.parent)) == before and value_identity(Path("many")) != inside
    monkeypatch.setattr(identity, "_MOST_FILES", 3)
    large = value_identity(Path("many"))
    Path("many/3").write_text("z")
    assert value_identity(Path("many")) == large and "the folder many" in caplog.text

"""The online rival: the budget to the last completion, the same texts as in sampling, the same result for the same
seed."""
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_policy import make_start

pytest.importorskip("trl", reason="needs the extra peers")

from lire_nb.base.errors import LireError  # noqa: E402
from lire_nb.enhancement import self_enhance  # noqa: E402
from lire_nb.lab.trl_online import OnlineReward, encode_prompts, generation_budget, train_online  # noqa: E402
from lire_nb.models import load_policy  # noqa: E402
from lire_nb.sampling import LocalSampler, SamplingSettings  # noqa: E402

PROMPTS = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}} for i in range(6)]
SETTINGS = SamplingSettings(max_new_tokens=6)
RUN = dict(num_candidates=3, lists_per_step=2, settings=SETTINGS, training={"learning_rate": 0.02}, progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("policies") / "start", dropout=0.1)


class Counting:
    """The share of letters of the second half of the alphabet; remembers what it was asked."""
    name = "late letters"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions):
        self.asked += list(zip(prompts, completions, strict=True))
        return [sum(c > "m" for c in text) / max(len(text), 1) for text in completions]


@pytest.mark.parametrize("method, more",
                         [("rloo", {}), ("grpo", {"beta": 0.02}),
                          ("rloo", {"num_iterations": 2, "gradient_accumulation_steps": 3})])
def test_budget_improvement_and_records(start, tmp_path, method, more):
    reward = Counting()
    folder = train_online(start, PROMPTS, reward, tmp_path / "run", method=method, generations=180,
                          **{**RUN, "training": {"learning_rate": 0.03, **more}})
    assert len(reward.asked) == 180 == json.loads((folder / "online.json").read_text())["about"]["scored"]
    assert {p for p, _ in reward.asked} == {p["prompt"] for p in PROMPTS}
    assert all(1 <= len(c) <= 6 for _, c in reward.asked), "no empty completion, none too long"
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 31 if "num_iterations" not in more else 61))
    assert all(row["seconds"] > 0 for row in log) and sum({"reward", "kl"} <= row.keys() for row in log) == 30, (
        "one line of rewards for each step that sampled"
    )
    first, last = (sum(Counting()(*zip(*part))) / 60 for part in (reward.asked[:60], reward.asked[-60:]))
    assert last > first + 0.1, (first, last)
    load_policy(folder)
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json",
                                                  "training.jsonl", "online.json"}
    assert not list(folder.glob("*.bin")) and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_budget_is_that_of_self_enhancement(start, tmp_path):
    """Completions scored by two rounds, and by an online run of the same budget."""
    offline, online, twice = Counting(), Counting(), [*PROMPTS, PROMPTS[0]]
    training = {"max_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True}
    self_enhance(start, twice, offline, tmp_path / "run", evolve=2, num_candidates=3, settings=SETTINGS,
                 training=training, progress=False)
    train_online(start, twice, online, tmp_path / "online", generations=generation_budget(twice, 2, 3), **RUN)
    assert len(offline.asked) == len(online.asked) == 36


def test_the_same_seed_gives_the_same_policy(start, tmp_path):
    for k, seed in enumerate((3, 3, 4)):
        torch.manual_seed(k)  # whatever was drawn before must not matter
        train_online(start, PROMPTS, Counting(), tmp_path / str(k), seed=seed, **RUN)
    files = [(tmp_path / str(k) / "model.safetensors").read_bytes() for k in range(3)]
    assert files[0] == files[1] != files[2]


def test_prompts_and_texts_are_those_of_sampling(start):
    """Encoded as `LocalSampler` does, cut on the left; decoded as it does, with the end-of-text token."""
    model, tokenizer = load_policy(start)
    sampler = LocalSampler(model, tokenizer, max_prompt_length=9, progress=False)
    chats = [*PROMPTS, {"id": "c", "prompt": [{"role": "user", "content": "hello there"}], "meta": {}}]
    encoded = encode_prompts(chats, tokenizer, 9)
    assert list(encoded.values()) == sampler._encode([r["prompt"] for r in chats])
    reward = Counting()
    ask = OnlineReward(reward, PROMPTS, encoded, tokenizer, 2)
    ids = [tokenizer(" ab")["input_ids"] + [tokenizer.eos_token_id], tokenizer("xyz")["input_ids"]]
    assert ask([PROMPTS[1]["prompt"]] * 2, None, ids, index=[1, 1]) == [0.0, 1.0] and ask.scored == 2
    assert reward.asked == [(PROMPTS[1]["prompt"], " ab"), (PROMPTS[1]["prompt"], "xyz")]


def test_rows_without_a_token_are_not_drawn(start, tmp_path, monkeypatch):
    "A model may have more rows than there are tokens: sampling here leaves them out, and so does TRL's."
    model, tokenizer = load_policy(start)
    model.resize_token_embeddings(len(tokenizer) + 40)  # three tokens in ten would be of them
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    drawn, call = [], OnlineReward.__call__

    def noting(self, *args, completion_ids, **columns):
        drawn.extend(t for ids in completion_ids for t in ids)
        return call(self, *args, completion_ids=completion_ids, **columns)

    monkeypatch.setattr(OnlineReward, "__call__", noting)
    train_online(tmp_path / "wide", PROMPTS, Counting(), tmp_path / "run", **RUN)
    assert len(drawn) > 60 and max(drawn) < len(tokenizer)


def test_a_reward_that_fails_names_the_list_and_leaves_nothing(start, tmp_path):
    with pytest.raises(LireError, match="list 'p"):
        train_online(start, PROMPTS, lambda prompts, completions: [float("nan")] * len(completions), tmp_path / "run",
                     **RUN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, word", [
    ({"method": "ppo"}, "rloo or grpo"), ({"generations": 20}, "18 or 24"), ({"lists_per_step": 7}, "at most 6"),
    ({"num_candidates": 1}, "2 or more"),
    ({"settings": SamplingSettings(temperature=0)}, "above 0"),
    ({"settings": SamplingSettings(stop=("x",))}, "no stop strings"),
    ({"training": {"max_steps": 3}}, "generations"), ({"training": {"learning_rat": 3}}, "learning_rate"),
    ({"training": {"gradient_accumulation_steps": 4}}, "a divisor of 6")])
def test_what_is_refused(start, tmp_path, change, word):
    with pytest.raises(LireError, match=word):
        train_online(start, PROMPTS, Counting(), tmp_path / "run", **{**RUN, **change})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run(start, tmp_path, caplog):
    folder = train_online(start, PROMPTS, Counting(), tmp_path / "run", **RUN)
    reward = Counting()
    with caplog.at_level("WARNING"):
        assert train_online(start, PROMPTS[::-1], reward, folder, **RUN) == folder
    assert "is there already" in caplog.text and reward.asked == []
    with pytest.raises(LireError, match="another configuration.*num_candidates"):
        train_online(start, PROMPTS, Counting(), folder, **{**RUN, "num_candidates": 2})
    (folder / "online.json").unlink()
    with pytest.raises(LireError, match="was not made by train_online"):
        train_online(start, PROMPTS, Counting(), folder, **RUN)


def test_without_trl_and_with_several_processes(start, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LireError, match="WORLD_SIZE"):
        train_online(start, PROMPTS, Counting(), tmp_path / "run", **RUN)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(LireError, match=r"pip install 'lire_nb\[peers\]'"):
        train_online(start, PROMPTS, Counting(), tmp_path / "run", **RUN)


def test_an_adapter(start, tmp_path):
    from lire_nb.lab.memory import lora_config

    folder = train_online(start, PROMPTS, Counting(), tmp_path / "run", peft_config=lora_config(4, 8), **RUN)
    assert (folder / "adapter_model.safetensors").is_file()
    load_policy(folder)

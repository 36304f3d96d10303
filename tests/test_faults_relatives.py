"""Relatives of the reported faults: what else was wrong in silence, found by attack."""
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny_policy
from lire_nb import LIREConfig, LIRETrainer, load_lists, score_lists
from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.evaluation import judge_policy
from lire_nb.models import load_policy
from lire_nb.preferences import preferences, share_interval, system_difference, win_matrix
from lire_nb.records import make_record
from lire_nb.sampling import sample_lists, SamplingSettings
from lire_nb.statistics import bootstrap_interval, crossed_interval, paired_difference, wilson_interval
from lire_nb.uncertain_rewards import RewardEnsemble


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny_policy.make_start(tmp_path_factory.mktemp("start") / "start", dropout=0.0, seed=0)


def chat(text):
    return [{"role": "user", "content": text}]


def appends(prompts, completions):
    found = []
    for prompt, text in zip(prompts, completions):
        prompt.append({"role": "assistant", "content": text})
        found.append(float(len(prompt)))
    return found


def test_a_reward_that_changes_its_prompts_changes_nothing_else():
    lists = [make_record(chat("hi"), ["a", "b"], id="1"), make_record(chat("you"), ["c"], id="2")]
    before = json.dumps(lists)
    scored = score_lists(lists, appends)
    assert [row["rewards"] for row in scored] == [[2.0, 2.0], [2.0]] and json.dumps(lists) == before
    assert [row["prompt"] for row in scored] == [chat("hi"), chat("you")]
    prompts = [r["prompt"] for r in lists]
    assert RewardEnsemble([appends, appends], k=0.0)(prompts, ["a", "b"]) == [2.0, 2.0] and prompts == [chat("hi"), chat("you")]


def test_a_judge_that_changes_its_prompts_changes_no_other_judge(start):
    sees = lambda prompts, completions: [float(len(p)) for p in prompts]  # noqa: E731
    rows = judge_policy(str(start), [{"id": "1", "prompt": chat("hi")}], {"first": appends, "second": sees},
                        start=str(start), settings=SamplingSettings(max_new_tokens=2), progress=False)
    assert rows[0]["scores"] == {"first": [2.0, 2.0], "second": [1.0, 1.0]} and rows[0]["prompt"] == chat("hi")


def test_a_reward_in_the_order_of_trl_is_asked_by_name():
    def trl(completions, prompts, **more):
        return [float(len(text)) for text in completions]

    def truth(completions, ground_truth=None, **more):
        return [float(len(text)) for text in completions]

    def ours(prompts, completions):
        return [float(len(text)) for text in completions]

    for reward in (trl, truth, ours):
        assert score_lists([make_record("a long prompt", ["x", "four"], id="1")], reward)[0]["rewards"] == [1.0, 4.0]
    with pytest.raises(LireError, match="takes the answers first.*responses, prompts"):
        score_lists([make_record("p", ["x"], id="1")], lambda responses, prompts: [0.0 for _ in responses])


def test_what_float32_cannot_tell_apart_is_a_tie():
    base = np.linspace(0.5, 4, 30)
    noise = base * (1 + 2e-7 * np.resize([0, 1, 1], 30))
    assert preferences([[x] for x in noise], [[x] for x in base]) == [0.5] * 30
    found = paired_difference(noise, base)
    assert found.value == 0 and found.method == "no spread"
    assert preferences([[1.0001]], [[1.0]]) == [1.0]  # what can be told apart still is
    rows = lambda lists: [{"id": str(i), "scores": {"g": own}} for i, own in enumerate(lists)]  # noqa: E731
    turned = {"old": rows([[0.1, 0.2, 0.3]] * 30), "new": rows([[0.3, 0.2, 0.1], [0.1, 0.2, 0.3]] * 15)}
    assert system_difference(turned, "new", "old", "g")[:3] == (0, 0, 0)
    third = share_interval([1 / 3] * 15 + [1 - 2 / 3] * 15)
    assert third.method == "wilson" and third.high - third.low > 0.2


def test_rows_of_other_prompts_are_not_compared():
    rows = lambda name: [{"id": str(i), "prompt": f"{name} {i}", "scores": {"g": [float(i)]}} for i in range(4)]  # noqa: E731
    for compare in (win_matrix, lambda both: system_difference(both, "b", "a", "g")):
        with pytest.raises(LireError, match="4 prompts are not the same in both"):
            compare({"a": rows("left"), "b": rows("right")})
    win_matrix({"a": rows("left"), "b": rows("left")})


@pytest.mark.parametrize("row", [
    {"question": "Which?", "choices": ["stone", "apple"], "chosen": "B", "rejected": "A"},
    {"prompt": "Which?", "options": {"A": "stone"}, "completions": ["B", "A"], "rewards": [1, 0]},
    {"instruction": "Explain", "code": "def f(): pass", "output_1": "a", "output_2": "b", "preference": 1},
    {"prompt": "q", "chosen": "a", "rejected": "b", "chat_history": chat("x")},
    {"prompt": "q", "chosen": "a", "rejected": "b", "functions": [{"name": "f"}]},
    {"prompt": "q", "chosen": "a", "rejected": "b", "system_instruction": "be nice"}])
def test_what_belongs_to_a_prompt_is_not_lost(row):
    with pytest.raises(LireError, match="belongs to the prompt and would be lost"):
        load_lists([row])


def test_choices_that_the_prompt_holds_are_in_nobodys_way():
    row = {"question": "Which? A stone B apple", "choices": ["stone", "apple"], "chosen": "B", "rejected": "A"}
    assert load_lists([row])[0]["prompt"] == row["question"]
    assert load_lists([{"prompt": "q", "chosen": "a", "rejected": "b", "chat_history": []}])[0]["prompt"] == "q"


def scored(count=6):
    return [make_record(f"Question {i} is", [" ok", " a long answer"], [1.0, 0.0], id=str(i)) for i in range(count)]


def trained(start, folder, lists, eval_lists=None, resume=None, **settings):
    own = dict(output_dir=str(folder), learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
               report_to="none", disable_tqdm=True, temperature=20.0, save_strategy="steps", save_steps=2)
    model, tokenizer = load_policy(str(start))
    trainer = LIRETrainer(model, LIREConfig(**own | settings), lists, eval_lists, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_held_out_prompts_that_are_trained_on_are_counted(start, tmp_path, caplog):
    lists = scored()
    again = [dict(r, id=f"again {i}", prompt=r["prompt"].upper() + "!") for i, r in enumerate(lists[:2])]
    with caplog.at_level(logging.WARNING):
        trained(start, tmp_path / "a", lists[:4], [*again, *lists[4:]], max_steps=1)
    assert any("2 of the 4 prompts that are held out are trained on as well" in line for line in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trained(start, tmp_path / "b", lists[:4], lists[4:], max_steps=1)
    assert not any("held out" in line for line in caplog.messages)


def test_a_training_that_goes_on_for_longer_is_told(start, tmp_path, caplog):
    trained(start, tmp_path, scored(), num_train_epochs=1)
    with caplog.at_level(logging.WARNING):
        trained(start, tmp_path, scored(), num_train_epochs=2, resume=str(tmp_path / "checkpoint-2"))
    assert any("were of a training of 3 steps, and this one has 6" in line for line in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trained(start, tmp_path, scored(), num_train_epochs=1, resume=str(tmp_path / "checkpoint-2"))
    assert not any("steps, and this one" in line for line in caplog.messages)
    with pytest.raises(LireError, match="dataloader_drop_last"):
        trained(start, tmp_path, scored(), num_train_epochs=1, dataloader_drop_last=True,
                resume=str(tmp_path / "checkpoint-2"))


def test_an_output_that_was_changed_is_not_taken_for_the_one_that_was_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("lists.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scored()))
    Path("judge.py").write_text("def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    command = "score --lists lists.jsonl --reward judge.py:length --out out.jsonl".split()
    assert main(command) == 0 and main(command) == 0
    kept = Path("out.jsonl").read_text()
    Path("out.jsonl").write_text("".join(kept.splitlines(keepends=True)[:2]))
    capsys.readouterr()
    assert main(command) == 2 and "no longer what this command wrote" in capsys.readouterr().err
    Path("out.jsonl").write_text(kept)
    assert main(command) == 0


def test_sampling_leaves_the_mode_of_a_model(start):
    model, tokenizer = load_policy(str(start))
    model.train()
    model.model.layers[0].eval()
    sample_lists((model, tokenizer), ["Question 0 is"], 2, settings=SamplingSettings(max_new_tokens=2), progress=False)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_candidates_that_can_only_be_one_text_are_told(start, caplog):
    for count, temperature, told in ((3, 0.0, True), (1, 0.0, False), (3, 1.0, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            lists = sample_lists(str(start), ["Question 0 is"], count, progress=False,
                                 settings=SamplingSettings(max_new_tokens=2, temperature=temperature))
        assert any("are one text" in line for line in caplog.messages) == told
        assert not told or len(set(lists[0]["completions"])) == 1


def test_statistics_of_what_says_nothing():
    assert np.isnan(crossed_interval(np.array([[1.0], [2.0], [3.0]]))[1:3]).all()
    with pytest.raises(LireError, match="finite"):
        crossed_interval(np.array([[1.0, np.nan], [2.0, 3.0]]))
    for confidence in (95, -1, 1.0, 0):
        for interval in (lambda: bootstrap_interval([1.0, 2.0, 3.0], confidence=confidence),
                         lambda: wilson_interval(0.5, 3, confidence)):
            with pytest.raises(LireError, match="confidence"):
                interval()
    for share, count in ((0.5, 0), (50, 100), (-0.1, 5)):
        with pytest.raises(LireError, match="share"):
            wilson_interval(share, count)


def test_a_judge_that_gives_no_number_is_told_before_anything_is_drawn(start, monkeypatch):
    from lire_nb import evaluation

    monkeypatch.setattr(evaluation, "sample_lists", lambda *a, **k: pytest.fail("drawn before the judge was tried"))
    with pytest.raises(LireError, match="not a number"):
        judge_policy(str(start), [{"id": "1", "prompt": "p"}], {"g": lambda prompts, completions: [None] * len(prompts)},
                     start=str(start), progress=False)

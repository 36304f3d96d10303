"""What a researcher brings along: tables, data sets of the hub, tools in prompts, held-out lists, a card, a full model
of an adapter."""
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_policy import make_start

from lire_nb import LIREConfig, LIRETrainer, load_lists, make_record
from lire_nb.adapters import merge_adapter
from lire_nb.base.errors import LireError, ListError
from lire_nb.cards import closing_lines, read_card
from lire_nb.conversations import encode_completion, encode_prompt, render_prompt
from lire_nb.enhancement import train_policy
from lire_nb.models import load_policy
from lire_nb.records import prompt_id

QUICK = dict(learning_rate=1e-2, bf16=False, use_cpu=True, per_device_train_batch_size=2, num_train_epochs=2.0,
             disable_tqdm=True, reward_transform="zscore", temperature=5.0)
LISTS = [make_record(f"film {i} was", [" good", " bad", " so so"], rewards=[1.0, 0.0, 0.4 + i / 10], id=f"l{i}",
                     sources=["human", "policy:round-1", "policy:round-1"]) for i in range(6)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("extend") / "start", dropout=0.0)


# tools

WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TALK = [{"role": "user", "content": "Is it warm in Rome?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": '{"degrees": 31}'}]
# as families with tools write them: the list in the system turn, calls in marks, results in a user turn
TEMPLATE = """{% if tools %}<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% elif m.tool_calls %}<|im_start|>assistant
{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def chat():
    from lire_nb.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_tools_are_the_tokens_of_the_template(chat):
    """The oracle is `apply_chat_template` with `tools=`, of the conversation with and without its answer."""
    row = {"messages": TALK, "tools": json.dumps([WEATHER]), "chosen": [{"role": "assistant", "content": "Yes, warm."}],
           "rejected": [{"role": "assistant", "content": "No."}]}
    record = load_lists([{**row, "prompt": row.pop("messages")}])[0]
    whole = [*TALK, {"role": "assistant", "content": "Yes, warm."}]
    for messages, ids in (
            (TALK, encode_prompt(record["prompt"], chat, 999)[0]),
            (whole, encode_prompt(record["prompt"], chat, 999)[0] + encode_completion(
                record["prompt"], record["completions"][0], chat))):
        expected = chat.apply_chat_template(messages, tools=[WEATHER], add_generation_prompt=messages is TALK)["input_ids"]
        assert ids == expected[: len(ids)] and len(expected) - len(ids) <= (messages is whole)  # its closing line feed
    bare = chat.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert render_prompt(record["prompt"], chat) != bare and render_prompt(TALK, chat) == bare


def test_content_may_be_missing_where_a_tool_is_called(chat):
    silent = [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, TALK[2]]
    for content in ({}, {"content": None}):
        messages = [TALK[0], {**silent[1], **content}, TALK[2]]
        assert render_prompt(messages, chat) == chat.apply_chat_template(silent, add_generation_prompt=True,
                                                                         tokenize=False)


def test_tools_stay_where_a_long_prompt_is_cut(chat):
    long = [{"role": "user", "content": "word " * 300, "tools": [WEATHER]}, *TALK[1:]]
    ids, cut = encode_prompt(long, chat, 160)
    text = chat.decode(ids)
    assert cut and len(ids) <= 160 and '"weather"' in text.split("<|im_end|>")[0] and text.endswith("assistant\n")


def test_what_a_template_leaves_out_and_what_has_no_place(chat):
    from lire_nb.models import load_tokenizer

    plain = load_tokenizer("smollm2")  # its template knows no tools
    with pytest.raises(LireError, match="leaves out the tools|refuses"):
        render_prompt([{**TALK[0], "tools": [WEATHER]}], plain)
    plain.chat_template = None
    with pytest.raises(ListError, match="no place in a transcript"):
        render_prompt(TALK, plain)
    with pytest.raises(ListError, match="an answer that calls a tool is not a text"):
        load_lists([{"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": [{"role": "assistant", "content": "No."}]}])
    with pytest.raises(ListError, match="tools beside a text"):
        load_lists([{"prompt": "Is it warm?", "completions": ["yes"], "rewards": [1.0], "tools": [WEATHER]}])
    with pytest.raises(ListError, match="unknown key"):
        make_record([{"role": "user", "content": "a", "tool_call_id": "1"}], ["b"])


def test_other_tools_are_another_prompt():
    rows = [{"prompt": TALK[:1], "completion": "x", "reward": 1.0, "tools": tools}
            for tools in ([WEATHER], [{**WEATHER, "strict": None}], [{"name": "clock"}])]
    lists = load_lists(rows)
    assert [len(r["completions"]) for r in lists] == [2, 1]  # a null carries nothing
    assert all(r["id"] == prompt_id(r["prompt"]) for r in lists)


# what is given in memory, and the hub


def test_the_trainer_takes_tables_and_raw_pairs(start, tmp_path):
    """The same pairs as a table, as rows of TRL (conversational and not, the prompt said or not) give the same losses."""
    model, tokenizer = load_policy(start, device="cpu")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}" \
                              "{% if add_generation_prompt %}a:{% endif %}"
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    texts = [("one?", "yes", "no"), ("two?", "no", "yes")]
    kinds = {
        "messages": [{"prompt": turn("user", q), "chosen": turn("assistant", a), "rejected": turn("assistant", b)}
                     for q, a, b in texts],
        "implicit": [{"chosen": turn("user", q) + turn("assistant", a), "rejected": turn("user", q) + turn("assistant", b)}
                     for q, a, b in texts],
    }
    kinds["table"] = pd.DataFrame(kinds["messages"])
    args = LIREConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", loss_type="dpo", save_strategy="no")
    losses = {name: LIRETrainer(model, args, rows, rows, processing_class=tokenizer).evaluate()
              for name, rows in kinds.items()}
    assert len({round(found["eval_loss"], 6) for found in losses.values()}) == 1
    plain = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in texts]
    assert LIRETrainer(model, args, pd.DataFrame(plain), processing_class=tokenizer).train_dataset["rewards"][0] == [1, 0]


def test_off_line_the_hub_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ListError, match="cannot be loaded from the hub") as found:
        load_lists("nobody/nothing-of-this-name")
    assert "\n" not in str(found.value) and "off line" in str(found.value)


# figures of pairs


def test_figures_of_pairs_are_those_of_trl(start, tmp_path):
    """By hand from log-probs: DPO's implicit rewards β(log π − log π_ref), SimPO's β · log π per token."""
    from lire_nb import ListCollator, list_logps, tokenize_list
    from lire_nb.logprobs import to_device  # noqa: F401

    model, tokenizer = load_policy(start, device="cpu")
    other, _ = load_policy(make_start(tmp_path / "other", dropout=0.0, seed=1), device="cpu")
    batch = ListCollator(tokenizer.pad_token_id)([tokenize_list(r, tokenizer) for r in LISTS])
    with torch.no_grad():
        (ours, lengths), (theirs, _) = list_logps(model, batch), list_logps(other, batch)
    for loss, u, settings in (("dpo", 0.3 * (ours - theirs), {"beta": 0.3}),
                              ("simpo", 2.5 * ours / lengths, {"beta": 2.5, "gamma": 0.5})):
        args = LIREConfig(str(tmp_path / loss), bf16=False, use_cpu=True, report_to="none", loss_type=loss, **settings)
        trainer = LIRETrainer(model, args, LISTS, LISTS, processing_class=tokenizer,
                              ref_model=other if loss == "dpo" else None)
        seen = trainer.evaluate()
        rewards = torch.tensor([r["rewards"] for r in LISTS])
        best, worst = (u.gather(1, place[:, None])[:, 0] for place in (rewards.argmax(1), rewards.argmin(1)))
        expected = {"chosen": best.mean(), "rejected": worst.mean(), "margins": (best - worst).mean(),
                    "accuracies": (best > worst).float().mean()}
        for name, value in expected.items():
            assert seen[f"eval_rewards/{name}"] == pytest.approx(float(value), abs=1e-4), (loss, name)


# a training with held-out lists


def test_early_stopping_keeps_the_best_and_goes_on_exactly(start, tmp_path, request):
    """A learning rate that ruins the policy: the best held-out loss is not the last. A run that was stopped by Ctrl-C
    after two steps, and started again, ends with the same bytes."""
    from transformers import TrainerCallback

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may be told to ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    options = {"trainer_options": {"eval_dataset": LISTS[4:]}, "patience": 2}
    how = QUICK | dict(learning_rate=0.3, num_train_epochs=12.0, eval_strategy="epoch", eval_on_start=True)
    whole = train_policy(start, LISTS[:4], tmp_path / "whole", **options, **how)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C after step 4"):
        train_policy(start, LISTS[:4], tmp_path / "again", callbacks=[Stop()], **options, **how)
    again = train_policy(start, LISTS[:4], tmp_path / "again", **options, **how)
    for name in ("model.safetensors", "training.jsonl", "eval.jsonl", "lire_config.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name

    looks = [json.loads(line) for line in (whole / "eval.jsonl").read_text().splitlines()]
    losses = [look["eval_loss"] for look in looks]
    assert looks[0]["step"] == 0 and len(looks) < 13, "it did not stop early"
    assert losses.index(min(losses[1:])) == len(losses) - 3  # two evaluations without a new best
    model, tokenizer = load_policy(whole, device="cpu")
    args = LIREConfig(str(tmp_path / "x"), **QUICK)
    assert LIRETrainer(model, args, LISTS, LISTS[4:], processing_class=tokenizer).evaluate()["eval_loss"] == pytest.approx(
        min(losses[1:]), abs=1e-5)
    with pytest.raises(LireError, match="nothing to evaluate on"):
        train_policy(start, LISTS, tmp_path / "none", patience=1, **QUICK)

    best = looks[losses.index(min(losses[1:]))]
    kept, card = read_card(whole).kept, (whole / "README.md").read_text()
    assert kept == read_card(again).kept and kept["step"] == best["step"] < looks[-1]["step"] == read_card(whole).steps
    assert (kept["value"], kept["start"], kept["looks"]) == (best["eval_loss"], losses[0], len(looks) - 1)
    said = f"step {best['step']} is kept, the best of {len(looks) - 1} looks by eval"
    assert said in closing_lines(whole)[0] and said.replace("_", r"\_") in card and "up to step" in card
    moved = {title: ends for title, *ends in read_card(whole).moved}
    assert moved["held-out loss"] == [losses[0], best["eval_loss"]]


def test_a_start_that_was_better_than_every_look_is_said(start, tmp_path):
    """Held-out rewards are the reverse of those that are learned, so every step is worse than the start."""
    reverse = [{**r, "rewards": [-x for x in r["rewards"]]} for r in LISTS[:4]]
    how = QUICK | dict(learning_rate=0.05, num_train_epochs=6.0, eval_strategy="epoch", eval_on_start=True)
    out = train_policy(start, LISTS[:4], tmp_path / "out", trainer_options={"eval_dataset": reverse}, patience=1, **how)
    looks = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert len(looks) == 3 and min(look["eval_loss"] for look in looks) == looks[0]["eval_loss"]
    line = f"the start was better than each of them ({looks[0]['eval_loss']:.4g})"
    assert read_card(out).kept["start_better"] and line in closing_lines(out)[0] and line in (out / "README.md").read_text()
    plain = train_policy(start, LISTS[:4], tmp_path / "plain", **QUICK)
    assert read_card(plain).kept is None and "kept" not in closing_lines(plain)[0]


@pytest.mark.parametrize("settings, words", [
    ({"eval_strategy": "no"}, "eval_strategy"), ({"load_best_model_at_end": False}, "load_best_model_at_end"),
    ({"metric_for_best_model": "nonsense"}, "no figure of an evaluation.*eval_expected_reward"),
    ({"metric_for_best_model": "eval_accuracies"}, "no figure of an evaluation"),
    ({"metric_for_best_model": "optimism"}, "no figure of an evaluation")])
def test_early_stopping_says_first_what_it_cannot_watch(start, tmp_path, settings, words):
    with pytest.raises(LireError, match=words) as found:
        train_policy(start, LISTS[:4], tmp_path / "out", trainer_options={"eval_dataset": LISTS[4:]}, patience=1,
                     **QUICK | settings)
    assert len(str(found.value)) < 900 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [
    {"loss_type": "dpo"}, {"loss_type": "sft"}, {"loss_type": "lire", "optimism": 0.1}, {"loss_type": "simpo"}])
def test_the_figures_that_may_be_watched_are_those_of_an_evaluation(start, tmp_path, settings):
    from lire_nb.training import _figures

    model, tokenizer = load_policy(start, device="cpu")
    plain = {name: value for name, value in QUICK.items() if name not in ("temperature", "reward_transform")}
    args = LIREConfig(str(tmp_path), **plain, **settings)
    found = LIRETrainer(model, args, LISTS[:4], LISTS[4:], processing_class=tokenizer).evaluate()
    names = {name.removeprefix("eval_") for name in found if "runtime" not in name and "per_second" not in name}
    assert names - {"epoch", "model_preparation_time"} <= set(_figures(args))
    assert set(_figures(args)) - names <= {"kendall"}  # all tied at the start of dpo


# cards, and an adapter as a full model


def test_card_and_full_model_of_an_adapter(start, tmp_path):
    from huggingface_hub import ModelCard

    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    adapter = train_policy(start, LISTS, tmp_path / "adapter", trainer_options={"peft_config": lora}, **QUICK)
    text = (adapter / "README.md").read_text()
    assert ModelCard(text).data.library_name == "peft" and "LoRA of rank 2" in text and "2405.13516" in text
    assert "6 lists of 3 candidates, 18 of 18 scored" in text and str(tmp_path) not in text and "human (6)" in text
    assert read_card(adapter).steps == 6 and "temperature 5" in text
    first, moved, place, after = closing_lines(adapter)
    assert "trained start (LoRA of rank 2) with lire, T = 5.0" in first and "expected reward" in moved
    assert str(adapter) in place and "lire merge" in after

    error = merge_adapter(adapter, tmp_path / "full")
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        ours, theirs = (load_policy(f, device="cpu")[0](ids).logits for f in (tmp_path / "full", adapter))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert error < 1e-5 and not (tmp_path / "full" / "adapter_config.json").exists()
    assert ModelCard((tmp_path / "full" / "README.md").read_text()).data.library_name == "transformers"


def test_a_merge_that_went_wrong_leaves_nothing(start, tmp_path, monkeypatch):
    """A merge that forgets the adapter is seen by its logits."""
    from lire_nb import adapters

    lora = {"r": 2, "target_modules": ["q_proj"]}
    adapter = train_policy(start, LISTS, tmp_path / "adapter", trainer_options={"peft_config": lora},
                           **QUICK | {"learning_rate": 0.3})
    monkeypatch.setattr(adapters, "merged_policy", lambda model: model.unload())
    with pytest.raises(LireError, match="computes something else"):
        merge_adapter(adapter, tmp_path / "full")
    assert not (tmp_path / "full").exists() and not list(tmp_path.glob(".full*"))


# tables with what was given


def test_a_table_with_policy_loss_and_task(tmp_path, monkeypatch):
    """Kept by content: moved files and a second start run nothing; another weight, or an edit of the loss, is another
    row; what runs is the function, and no row holds a path."""
    from lire_nb.lab import extend, runner
    from lire_nb.lab.experiments import stand_in
    from lire_nb.lab.results import Results
    from lire_nb.lab.runner import reproduce
    from lire_nb.lists import save_lists

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extend, "plan", few := lambda *a, **k: [
        r for r in plan(*a, **k) if r.labels["method"] in ("start", "lire") and r.labels["stage"] == "final"])
    from lire_nb.lab.plans import config_key, plan

    monkeypatch.setattr(runner, "plan", few)
    ran = []

    def run(config, work, keep):  # the page runs real ones
        ran.append(config)
        two = [[1.0], [float(len(ran))]]
        return {"ids": "x", "scores": {"proxy": two, "gold": two}, "tokens": two, "logps": two, "start_logps": two,
                "ended": two, "examples": [], "seconds": {"total": 0.1}}

    monkeypatch.setattr(runner, "run_experiment", run)
    source = "def mine(logps, rewards, mask=None):\n    return -(logps * rewards * mask).sum(-1) * {scale}\n"
    Path("one.py").write_text(source.format(scale=0.1))
    stand_in("smollm2", "policy", seed=3)
    save_lists([make_record([{"role": "user", "content": f"What is {n} plus {n}?"}], [f"It is {2 * n}.", "No idea."],
                            rewards=[1.0, 0.0]) for n in range(40)], "sums.jsonl")
    how = dict(scale="smoke", work="work", jobs=1, say=lambda line: None)
    asked = dict(policy="policy", loss="one.py:mine", task="sums.jsonl")
    assert reproduce(["sentiment"], **how, **asked) == 2
    rows = Results(Path("runs/reproduce/smoke/results")).rows
    text = json.dumps(list(rows.values()))
    assert len(rows) == 2 and "sums.jsonl" not in text and str(tmp_path) not in text
    assert {r["config"]["method"] for r in rows.values()} == {"start", "given"}
    assert [c["source"]["policy"] for c in ran] == ["policy"] * 2 and ran[1]["training"]["loss_type"] == "one.py:mine"
    assert Path(ran[1]["paths"]["given"]).read_bytes() == Path("sums.jsonl").read_bytes() and "given" not in ran[1]
    Path("policy").rename("moved"), Path("sums.jsonl").rename("elsewhere.jsonl"), Path("one.py").rename("two.py")
    asked = dict(policy="moved", loss="two.py:mine", task="elsewhere.jsonl")
    assert reproduce(["sentiment"], **how, **asked) == 0
    table = extend.given_table(extend.given_runs("sentiment", extend.Given(**asked), "smoke"))
    assert list(table.index) == ["start", "two.py:mine"]
    Path("three.py").write_text(source.format(scale=0.2))
    keys = {config_key(extend.change(few("sentiment", "smoke")[1].config, extend.Given(**asked | new)))
            for new in ({}, {"loss": "three.py:mine"}, {"policy": str(stand_in("smollm2", "other", seed=4))})}
    assert len(keys) == 3


# what a type checker sees


def test_type_checkers_see_the_names_at_the_top():
    """They are lazy at run time; the stub beside names each from its own home."""
    import ast

    import lire_nb

    stub = Path(lire_nb.__file__).with_suffix(".pyi")
    body = ast.parse(stub.read_text(encoding="utf-8")).body
    homes = {name: module for module, names in lire_nb._HOMES.items() for name in names}
    found = {one.asname: node.module for node in body if isinstance(node, ast.ImportFrom) for one in node.names
             if one.asname == one.name}  # a public name, says PEP 484
    found |= {node.name: homes[node.name] for node in body if isinstance(node, ast.FunctionDef)}
    assert found == homes
    assert stub.with_name("py.typed").is_file() and "*.pyi" in (stub.parents[1] / "setup.py").read_text()


# what stood in a scientist's way

def test_judges_of_a_course_are_trained_before_the_policy_is_looked_at(tmp_path, monkeypatch):
    "A look takes no gradients: a judge that would be trained in it failed."
    from lire_nb.lab import experiments
    from lire_nb.lab.plans import plan

    class Made(Exception):
        pass

    def make(draft, spec):
        raise Made(torch.is_grad_enabled())

    monkeypatch.setattr(experiments, "_make_reward", make)
    course = next(r for r in plan("overoptimization", "smoke", find=lambda c: {"scores": {"proxy": [[0.0]]}})
                  if r.config["kind"] == "course")
    with pytest.raises(Made, match="True"):
        experiments.run_experiment(course.config, tmp_path)


def test_a_given_table_that_has_only_begun_or_cannot_be_judged_is_told():
    from lire_nb.lab.extend import given_table

    begun = pd.DataFrame([{"stage": "reward", "method": "proxy", "result": {"accuracy": 0.7}}])
    assert given_table(begun) is None
    flat = {"points": [{"scores": {"gold": [[0.0, 0.0]], "proxy": [[0.0, 0.0]]}}],
            "judges": {"gold": {"accuracy": 0.5, "lists": 8}}}
    blind = pd.DataFrame([{"stage": "final", "method": "start", "seed": 0, "key": "a", "result": flat, "config": {}}])
    assert "less than 0.2" in given_table(blind).loc["seed 0", "its judge"]


@pytest.mark.parametrize("asked, says", [
    ({"jobs": 0}, "--jobs"), ({"accept": "zzz"}, "no row has this code"), ({"scale": "evidence"}, "not run at this scale"),
    ({"task": "broken"}, "broken.jsonl:2"), ({"task": "few"}, "too few lists for this scale")])
def test_what_a_table_cannot_do_is_said_before_the_work(asked, says, tmp_path):
    from lire_nb.lab.runner import reproduce

    good = [json.dumps({"id": f"l{i}", "prompt": f"film {i} was", "completions": [" a", " b"], "rewards": [0, 1]})
            for i in range(3)]
    (tmp_path / "few.jsonl").write_text("\n".join(good))
    (tmp_path / "broken.jsonl").write_text("\n".join([good[0], '{"id": "x", "completions": ["a"], "rewards": [1]}']))
    if "task" in asked:
        asked = {"task": tmp_path / f"{asked['task']}.jsonl"}
    with pytest.raises(LireError, match=says) as caught:
        reproduce(["sentiment"], **{"scale": "smoke", **asked}, results=tmp_path / "rows", work=tmp_path / "work")
    assert "\n" not in str(caught.value) and not list((tmp_path / "rows").glob("*.jsonl"))


@pytest.mark.parametrize("old, new, says", [("cap = ", "cap = oops ", "cannot be read"),
                                            ("margin = ", "margni = ", "rule.margin")])
def test_a_broken_protocol_is_said_with_its_file(old, new, says, monkeypatch, tmp_path):
    from lire_nb.lab import plans, protocol

    told = plans.data_path("protocol.toml").read_text().replace(old, new, 1)
    (tmp_path / "protocol.toml").write_text(told)
    monkeypatch.setattr(plans, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(LireError, match=says) as caught:
        protocol._read_protocol()
    assert "protocol.toml" in str(caught.value)


def test_a_loss_that_was_edited_is_read_anew(tmp_path, monkeypatch):
    """In one process, as in a notebook: what the file says now counts, also under its whole path."""
    from lire_nb.options import settings_of
    from lire_nb.rivals import LOSSES

    monkeypatch.chdir(tmp_path)
    names = ("edited.py:loss", str(tmp_path / "edited.py:loss"))
    for sign in ("-", "+", "-"):
        Path("edited.py").write_text("def loss(logps, rewards, mask=None):\n"
                                     f"    return {sign}(logps * rewards).where(mask, 0).sum(-1)\n")
        for name in names:
            assert settings_of([f"loss_type={name}"])["loss_type"] == name
            logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
            LOSSES[name].fn(logps, torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)).sum().backward()
            assert logps.grad.tolist() == [[float(f"{sign}1"), float(f"{sign}3")]]
    for name in names:
        del LOSSES[name]

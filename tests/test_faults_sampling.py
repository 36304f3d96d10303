"""What was drawn is what is trained and judged: a test for each fault of sampling, and relatives."""
import json
import logging
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from lire_nb.base.errors import LireError
from lire_nb.enhancement import StopRule, self_enhance
from lire_nb.evaluation import compare_systems, judge_policy
from lire_nb.lists import load_lists
from lire_nb.logprobs import dataset_logps
from lire_nb.sampling import LocalSampler, SamplingSettings, ServerSampler, derive_seed, sample_lists
from lire_nb.shared_prompt import tokenize_list
from lire_nb.watching import EvaluationCallback

sys.path.insert(0, str(Path(__file__).parent))
import tokenizer_kinds as kinds  # noqa: E402
from test_sampling import FAST, Pretend, completed  # noqa: E402
from tiny_policy import make_start  # noqa: E402

KINDS = ["letters", "bytes_chatml", "bytes_bos", "bytes_bos_eos", "metaspace_llama2", "unigram_eos", "gemma",
         "phi_left"]
TALK = [{"role": "user", "content": "Is it a prime?"}]


def policy_of(tokenizer, seed=0, family=tf.LlamaConfig, **settings):
    torch.manual_seed(seed)
    ends = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = dict(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=2, initializer_range=0.25,
                 max_position_embeddings=256, **{f"{k}_token_id": v for k, v in ends.items()})
    return tf.AutoModelForCausalLM.from_config(family(**(shape | settings))).eval()


@torch.no_grad()
def forward_logp(model, prompt_ids, ids):
    "The oracle: one plain forward pass over one row."
    logps = model(torch.tensor([[*prompt_ids, *ids]])).logits[0].float().log_softmax(-1)
    return float(sum(logps[len(prompt_ids) + k - 1, t] for k, t in enumerate(ids)))


def prompt_ids_of(record, tokenizer):
    return tokenize_list({**record, "meta": {}}, tokenizer)["prompt_ids"]


def refused(call, *words):
    with pytest.raises(LireError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text
    return text


# --- 1: what was drawn travels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_01_drawn_tokens_and_logps_are_those_of_a_plain_forward_pass(kind, share):
    tokenizer = getattr(kinds, kind)()
    model = policy_of(tokenizer)
    others = [i for i in range(5, 40) if i != tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [*others, tokenizer.eos_token_id]  # several ends, ordinary tokens among them
    model.generation_config.suppress_tokens = [20, 21]  # a model's own settings must not bend scores on either route
    settings = SamplingSettings(max_new_tokens=12, temperature=0.7, top_k=40, top_p=0.95)
    local = LocalSampler(model, tokenizer, progress=False, share_prompt=share)
    lists = sample_lists(local, ["The film opens in", TALK], 8, settings=settings, seed=3)
    ended = 0
    for record in lists:
        prompt, meta = prompt_ids_of(record, tokenizer), record["meta"]
        assert len(meta["token_ids"]) == len(meta["logps"]) == 8 and len(meta["tokenizer"]) == 16
        for text, ids, logp, reason in zip(record["completions"], meta["token_ids"], meta["logps"],
                                           meta["finish_reasons"]):
            stopped = ids[-1] in model.generation_config.eos_token_id
            assert (reason == "stop") >= stopped and (len(ids) == 12 or reason == "stop") and text
            assert abs(logp - forward_logp(model, prompt, ids)) < 1e-4
            ended += stopped
    assert ended


@pytest.mark.parametrize("kind", ["metaspace_llama2", "bytes_chatml", "bytes_bos", "gemma"])
def test_01_training_and_measuring_read_the_drawn_end(kind):
    "Ends [a, b] where the tokenizer names b: the last token of those that drew a stays a."
    tokenizer = getattr(kinds, kind)()
    model = policy_of(tokenizer)
    other = next(i for i in sorted(tokenizer.added_tokens_decoder, reverse=True)
                 if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id))
    model.generation_config.eos_token_id = [other, tokenizer.eos_token_id]
    with torch.no_grad():
        model.get_output_embeddings().weight[other] *= 6
    lists = list(sample_lists((model, tokenizer), [f"The film {c}" for c in "abcd"], 8,
                              settings=SamplingSettings(max_new_tokens=20), progress=False))
    last = Counter()
    for record, (logps, _) in zip(lists, dataset_logps(model, tokenizer, lists)):
        trained = tokenize_list(record, tokenizer)["completion_ids"]
        assert trained == record["meta"]["token_ids"]
        np.testing.assert_allclose(logps, record["meta"]["logps"], atol=1e-4)
        last.update(ids[-1] for ids, reason in zip(trained, record["meta"]["finish_reasons"]) if reason == "stop")
    assert last[other] > 0


def test_01_texts_that_tokenize_otherwise_are_measured_as_drawn():
    tokenizer = kinds.bytes_chatml()
    model, start = policy_of(tokenizer), policy_of(tokenizer, 1)
    rows = judge_policy((model, tokenizer), [{"id": str(i), "prompt": TALK} for i in range(6)],
                        {"n": lambda p, c: [float(len(x)) for x in c]}, start=(start, tokenizer),
                        num_samples=8, settings=SamplingSettings(max_new_tokens=16), progress=False, exact_kl=True)
    lists = list(sample_lists((model, tokenizer), [{"id": str(i), "prompt": TALK} for i in range(6)], 8,
                              settings=SamplingSettings(max_new_tokens=16), progress=False))
    others = 0
    for row, record in zip(rows, lists):
        assert row["completions"] == record["completions"]
        prompt = prompt_ids_of(record, tokenizer)
        for j, ids in enumerate(record["meta"]["token_ids"]):
            again = tokenize_list({**record, "completions": [record["completions"][j]], "rewards": [None],
                                   "meta": {"finish_reasons": [row["finish_reasons"][j]]}}, tokenizer)
            others += again["completion_ids"][0] != ids
            assert row["tokens"][j] == len(ids)
            assert abs(row["logps"][j] - forward_logp(model, prompt, ids)) < 1e-4
            assert abs(row["start_logps"][j] - forward_logp(start, prompt, ids)) < 1e-4
    assert others > 10


def test_01_a_stop_string_leaves_the_tokens_that_say_the_text_or_none():
    tokenizer = kinds.bytes_chatml()
    model = policy_of(tokenizer)
    plain = list(sample_lists((model, tokenizer), ["The film"] * 4, 8, settings=SamplingSettings(max_new_tokens=16),
                              progress=False))
    letters = Counter("".join(t for r in plain for t in r["completions"])).most_common(6)
    stop = tuple(c for c, _ in letters if c != "\ufffd")[:3]
    lists = list(sample_lists((model, tokenizer), ["The film"] * 4, 8,
                              settings=SamplingSettings(max_new_tokens=16, stop=stop), progress=False))
    seen = Counter()
    for before, after in zip(plain, lists):
        for j, ids in enumerate(after["meta"]["token_ids"]):
            text, was = after["completions"][j], before["meta"]["token_ids"][j]
            assert not any(s in text for s in stop)
            if ids is None:
                assert after["meta"]["logps"][j] is None
                assert not text or all(tokenizer.decode(was[:k]) != text for k in range(len(was) + 1))
            else:
                assert ids == was[: len(ids)] and abs(after["meta"]["logps"][j]
                                                      - forward_logp(model, prompt_ids_of(after, tokenizer),
                                                                     ids)) < 1e-4
            seen[ids is None, bool(text)] += 1
    assert seen[False, True] and seen[True, False]


def test_01_a_list_that_was_edited_or_is_of_another_tokenizer_is_read_from_its_text():
    tokenizer, other = kinds.bytes_bos(), kinds.letters()
    model = policy_of(tokenizer)
    [record] = sample_lists((model, tokenizer), ["The film"], 2, settings=SamplingSettings(max_new_tokens=5),
                            progress=False)
    edited = {**record, "completions": ["Yes.", record["completions"][1]]}
    first, second = tokenize_list(edited, tokenizer)["completion_ids"]
    assert tokenizer.decode(first, skip_special_tokens=True) == "Yes." and second == record["meta"]["token_ids"][1]
    assert tokenize_list(record, other)["completion_ids"] != record["meta"]["token_ids"]


def test_01_given_columns_of_given_candidates_do_not_reach_the_sampled_ones():
    tokenizer = kinds.letters()
    given = {"id": "a", "prompt": "The film", "completions": ["x", "y"], "rewards": [1.0, 0.0],
             "meta": {"finish_reasons": ["stop", "length"], "grades": [3, 4], "topic": "film",
                      "pair": {"kept": [1, 2]}}}
    [record] = sample_lists((policy_of(tokenizer), tokenizer), [given], 2, settings=SamplingSettings(max_new_tokens=4),
                            progress=False)
    meta = record["meta"]
    assert "grades" not in meta and meta["topic"] == "film" and meta["pair"] == {"kept": [1, 2]}


# --- 7: one limit of prompts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("policies") / "start", dropout=0.0)


def long_prompts(count=3):
    return [{"id": f"p{i}", "prompt": f"{i} {'The film was long. ' * 4}Its end"} for i in range(count)]


def test_07_self_enhancement_samples_and_measures_with_the_limit_of_training(start, tmp_path, monkeypatch):
    seen, sample = [], LocalSampler.sample
    monkeypatch.setattr(LocalSampler, "sample", lambda self, *a,
                        **k: seen.append(self.max_prompt_length) or sample(self, *a, **k))
    settings = SamplingSettings(max_new_tokens=4)
    stop = StopRule(long_prompts(4)[3:] * 1 + [{"id": "q", "prompt": "The film"}], max_kl=1e9, settings=settings)
    self_enhance(start, long_prompts(), lambda p, c: [float(len(set(t))) for t in c], tmp_path / "run", evolve=1,
                 num_candidates=3, settings=settings,
                 training={"max_prompt_length": 30, "use_cpu": True}, stop=stop, progress=False)
    assert set(seen) == {30}
    here = sample_lists(str(start), long_prompts(), 3, settings=settings, seed=derive_seed(0, 1, "sample"),
                        max_prompt_length=30, progress=False)
    there = load_lists(tmp_path / "run" / "round-1" / "candidates.jsonl")
    assert [r["completions"] for r in there] == [r["completions"] for r in here]


def test_07_the_command_line_knows_the_limit(start, tmp_path, monkeypatch):
    from lire_nb.cli import main
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in long_prompts()))
    common = ["sample", "--prompts", "p.jsonl", "--policy", str(start), "--num-candidates", "2", "--max-new-tokens",
              "3"]
    assert main([*common, "--max-prompt-length", "20", "--out", "short.jsonl"]) == 0
    here = sample_lists(str(start), long_prompts(), 2, settings=SamplingSettings(max_new_tokens=3),
                        max_prompt_length=20, progress=False)
    assert [r["completions"] for r in load_lists("short.jsonl")] == [r["completions"] for r in here]
    assert json.loads(Path("short.jsonl.config.json").read_text())["max_prompt_length"] == 20
    assert main([*common, "--max-prompt-length", "0", "--out",
                 "none.jsonl"]) == 2 and not Path("none.jsonl.config.json").exists()
    from lire_nb.cli import limit_of
    from lire_nb.tasks import load_task
    assert limit_of("summarization:test") == load_task("summarization").max_prompt_length and limit_of("p.jsonl") == 256


def test_07_the_callback_takes_the_limit_of_its_trainer():
    tokenizer = kinds.letters()
    model = policy_of(tokenizer)
    watch = EvaluationCallback(long_prompts(), {"n": lambda p, c: [float(len(t)) for t in c]},
                               start=policy_of(tokenizer, 1), settings=SamplingSettings(max_new_tokens=3))

    class Arguments:
        max_prompt_length, bf16 = 25, False
    state = type("State", (), {"global_step": 1, "log_history": []})()
    watch.on_train_begin(Arguments, state, None, model=model, processing_class=tokenizer)
    assert watch.max_prompt_length == 25
    figures = watch.measure(model, tokenizer)
    assert math.isfinite(figures["eval_kl"]) and figures["eval_length"] <= 3


# --- 10: KL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(temperature=0.5), dict(temperature=0.0), dict(top_k=2), dict(top_p=0.5)])
def test_10_the_stop_rule_measures_plain_samples(start, tmp_path, settings):
    other = make_start(tmp_path / "other", dropout=0.0, seed=5)
    prompts = [{"id": c, "prompt": f"The {c}"} for c in "abcd"]
    plain, bent = (StopRule(prompts, max_kl=1.0,
                            settings=SamplingSettings(max_new_tokens=6, **s)).measure(other, start)["kl"]
                   for s in ({}, settings))
    assert plain == bent > 0
    assert StopRule(prompts, max_kl=1.0,
                    settings=SamplingSettings(max_new_tokens=6, **settings)).measure(start, start)["kl"] == 0


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), "3"])
def test_10_a_limit_of_zero_is_refused(limit):
    refused(lambda: StopRule([{"id": "a", "prompt": "x"}], max_kl=limit), "max_kl", "above 0")


def test_10_stop_kl_0_on_the_command_line(start, tmp_path, monkeypatch, capsys):
    from lire_nb.cli import main
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("The film\nA film\n")
    assert main(["enhance", "--prompts", "p.txt", "--reward", "length", "--policy", str(start), "--stop-kl", "0",
                 "--stop-prompts", "p.txt", "--out", "run"]) == 2
    assert "max_kl" in capsys.readouterr().err and not Path("run").exists()


def test_10_a_start_with_another_tokenizer_has_a_perplexity_of_its_own_and_no_kl(caplog):
    tokenizer, other = kinds.bytes_bos(), kinds.letters()
    # nearly uniform: perplexity ≈ number of tokens
    model, start = policy_of(tokenizer), policy_of(other, 1, initializer_range=0.02)
    with torch.no_grad():  # texts that both can write
        model.get_output_embeddings().weight[[i for i in range(len(tokenizer))
                                              if not all(c in other.get_vocab() for c in tokenizer.decode([i]))]] = 0
        model.get_output_embeddings().weight[[i for i in range(len(tokenizer)) if len(tokenizer.decode([i])) > 1
                                              and tokenizer.decode([i]).isalpha()]] *= 8
    options = dict(start=(start, other), num_samples=4, settings=SamplingSettings(max_new_tokens=8), progress=False)
    with caplog.at_level(logging.WARNING):
        rows = judge_policy((model, tokenizer), [{"id": str(i), "prompt": "The film"} for i in range(4)],
                            {"n": lambda p, c: [0.0] * len(c)}, **options)
    assert sum("another tokenizer" in r.getMessage() for r in caplog.records) == 1
    logps, counts = [], []
    for row in rows:
        plain = {**{k: row[k] for k in ("id", "prompt", "completions")}, "rewards": [None] * 4,
                 "meta": {"finish_reasons": row["finish_reasons"]}}
        tokens = tokenize_list(plain, other, max_completion_length=10_000)
        counts += map(len, tokens["completion_ids"])
        logps += [forward_logp(start, tokens["prompt_ids"], ids) for ids in tokens["completion_ids"]]
    found = {f["metric"]: f["value"] for f in compare_systems({"policy": rows})}
    assert found["KL to start"] is None and "log-ratio to start" not in found
    assert math.isclose(found["perplexity under start"], math.exp(-sum(logps) / sum(counts)), rel_tol=1e-4)
    assert sum(counts) != sum(sum(r["tokens"]) for r in rows)


def test_10_a_policy_is_at_zero_from_itself_even_when_loaded_twice(start):
    rows = judge_policy(str(start), [{"id": c, "prompt": f"The {c}"} for c in "abc"],
                        {"n": lambda p, c: [0.0] * len(c)}, start=Path(start),
                        settings=SamplingSettings(max_new_tokens=6), progress=False)
    assert all(r["logps"] == r["start_logps"] for r in rows)
    tokenizer = kinds.letters()
    rows = judge_policy((policy_of(tokenizer), tokenizer),
                        [{"id": "a", "prompt": "The film"}] * 1 + [{"id": "b", "prompt": "A"}],
                        {"n": lambda p, c: [0.0] * len(c)},
                        start=(policy_of(tokenizer), kinds.letters()), settings=SamplingSettings(max_new_tokens=6),
                        progress=False, exact_kl=True)
    assert all(r["logps"] == r["start_logps"] and r["tokens"] == r["start_tokens"] for r in rows)


def test_10_rows_written_before_there_were_start_tokens_still_count():
    old = [{"id": str(i), "prompt": "p", "completions": ["x"], "finish_reasons": ["stop"], "scores": {"n": [1.0]},
            "tokens": [4], "logps": [-2.0], "start_logps": [-4.0]} for i in range(3)]
    found = {f["metric"]: f["value"] for f in compare_systems({"one": old})}
    assert found["KL to start"] == 2.0 and math.isclose(found["perplexity under start"], math.e)


# --- 25: checked before the work -----------------------------------------------------------------------------------


class Counting:
    "A sampler that counts what it is asked."
    asked = 0

    def sample(self, prompts, num_candidates, settings, seed):
        self.asked += len(prompts)
        raise AssertionError("sampled")


@pytest.mark.parametrize("bad",
                         [[{"role": "human", "content": "hi"}], "", 5, None, [{"role": "user"}], {"prompt": 5},
                          {"text": "x"}])
def test_25_the_hundredth_prompt_is_looked_at_before_the_first_is_sampled(bad):
    sampler = Counting()
    refused(lambda: sample_lists(sampler, [*(f"Prompt {i}" for i in range(99)), bad], 2), "100")
    assert sampler.asked == 0


def test_25_templates_and_lengths_too():
    tokenizer = kinds.gemma()
    model = policy_of(tokenizer)
    model.forward = None  # whoever samples now, fails
    bad = [{"role": "system", "content": "Be brief."}, *TALK]
    refused(lambda: sample_lists((model, tokenizer), [*[TALK] * 5, {"id": "the-last", "prompt": bad}], 2,
                                 progress=False), "the-last", "System role not supported")
    refused(lambda: sample_lists((model, tokenizer), [TALK, {"id": "too-long", "prompt": "zx " * 200}], 2,
                                 max_prompt_length=250, progress=False), "too-long", "256")


def test_25_self_enhancement_looks_at_the_prompts_of_its_stop_rule(start, tmp_path):
    bad = [{"id": "fine", "prompt": "x"}, {"id": "bad", "prompt": [{"role": "human", "content": "x"}]}]
    refused(lambda: self_enhance(start, long_prompts(), lambda p, c: [0.0] * len(c), tmp_path / "run",
                                 stop=StopRule(bad, max_kl=1.0)), "human")
    assert not (tmp_path / "run").exists()


# --- 26: one bad answer --------------------------------------------------------------------------------------------

BAD = {
    "null": (200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}),
    "empty": (200, {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}),
    "refused": (200, {"choices": [{"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"}]}),
    "filtered": (200, {"choices": [{"message": {"content": "So"}, "finish_reason": "content_filter"}]}),
    "tool": (200, {"choices": [{"message": {"content": None, "tool_calls": []}, "finish_reason": "tool_calls"}]}),
    "nothing": (200, {"choices": []}),
    "too long": (400, '{"error": "maximum context length is 4096 tokens"}'),
    "broken": (500, "boom"),
}


def talk(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("what", BAD)
def test_26_one_bad_answer_does_not_stop_the_others(what, tmp_path, caplog):
    pytest.importorskip("openai")
    good, mended = completed("yes", chat=True), []

    def reply(path, body):
        bad = body["messages"][0]["content"] in ("bad", "half" if body["seed"] % 2 else "bad")
        return BAD[what] if bad and not mended else good

    prompts = [{"id": name, "prompt": talk(name)} for name in ("one", "bad", "two", "half")]
    options = dict(journal=tmp_path / "j.jsonl", progress=False, patience=9, max_retries=0)
    run = lambda: sample_lists(server.url, prompts, 4, **options)  # noqa: E731
    with Pretend(reply) as server, caplog.at_level(logging.WARNING, logger="lire_nb"):
        lists = run()
        counts = {r["id"]: len(r["completions"]) for r in lists}
        assert counts["one"] == counts["two"] == 4 and "bad" not in counts and counts.get("half", 0) < 4
        assert all(t for r in lists for t in r["completions"])
        said = [r.getMessage() for r in caplog.records if "not answered" in r.getMessage()]
        assert len(said) == 1 and "'bad'" in said[0] and "no list for 'bad'" in said[0]
        failed = 16 - sum(counts.values())
        before = len(server.received)
        mended.append(True)
        again = run()
        assert len(server.received) - before == failed  # only the failed ones
        assert [len(r["completions"]) for r in again] == [4] * 4 and "failed" not in again[1]["meta"]


def test_26_where_nobody_answers_the_first_reason_is_said(tmp_path):
    pytest.importorskip("openai")
    with Pretend(lambda path, body: BAD["null"]) as server:
        refused(lambda: sample_lists(server.url, [talk("a"), talk("b")], 2, journal=tmp_path / "j.jsonl", **FAST),
                "not a completion", "null")
        began = len(server.received)
        refused(lambda: sample_lists(server.url, [talk(str(i)) for i in range(300)], 4, **FAST), "not a completion")
        assert len(server.received) - began < 120  # not all 1,200


def test_26_the_command_names_the_gaps_and_fills_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    from lire_nb.cli import main
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text("".join(json.dumps({"id": n, "prompt": talk(n)}) + "\n" for n in ("one", "bad")))
    mended = []
    with Pretend(lambda path,
                 body: BAD["null"] if body["messages"][0]["content"] == "bad"
                 and not mended else completed("yes", chat=True)) as server:
        command = ["sample", "--prompts", "p.jsonl", "--policy", server.url, "--num-candidates", "3", "--out",
                   "c.jsonl"]
        assert main(command) == 0
        assert "3 of 6 candidates were not answered" in capsys.readouterr().out
        assert [r["id"] for r in load_lists("c.jsonl")] == ["one"]
        mended.append(True)
        assert main(command) == 0
        assert [len(r["completions"])
                for r in load_lists("c.jsonl")] == [3, 3] and not Path("c.jsonl.journal.jsonl").exists()


def test_04_a_prefill_is_continued_by_a_server_or_refused():
    pytest.importorskip("openai")
    begun = [*TALK, {"role": "assistant", "content": "Sure, it is"}]
    with Pretend(lambda path, body: completed(" a prime.", chat="chat" in path), owner="vllm") as server:
        assert sample_lists(server.url, [begun], 1, **FAST)[0]["completions"] == [" a prime."]
        body = server.received[0][1]
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    with Pretend(lambda path, body: completed(" a prime.", chat="chat" in path)) as server:
        refused(lambda: sample_lists(server.url, [TALK, {"id": "begun", "prompt": begun}], 1, **FAST), "begun",
                "completions")
        assert not server.received
        sampler = ServerSampler(server.url, api="completions", **FAST)
        assert sampler.sample([begun, TALK], 1, SamplingSettings(), 0)[0][0].text == " a prime."
        assert {body["prompt"][-11:] for _, body, _ in server.received} == {"Sure, it is", "\nAssistant:"}


def test_03_a_served_transcript_is_stored_as_it_is_read():
    pytest.importorskip("openai")
    with Pretend(lambda path, body: completed(" Yes.")) as server:
        assert ServerSampler(server.url, api="completions", **FAST).sample([TALK], 1, SamplingSettings(),
                                                                           0)[0][0].text == "Yes."
        assert ServerSampler(server.url, **FAST).sample(["Say"], 1, SamplingSettings(), 0)[0][0].text == " Yes."


# --- 29: limits said before the work -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False, None])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_29_prompt_and_new_tokens_beyond_the_context(family, share):
    tokenizer = kinds.letters()
    model = policy_of(tokenizer, max_position_embeddings=40) if family == "llama" else tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=len(tokenizer), n_embd=24, n_layer=1, n_head=2, n_positions=40, bos_token_id=0,
                      eos_token_id=0)).eval()
    local, prompt = LocalSampler(model, tokenizer, progress=False, share_prompt=share), "a" * 30
    refused(lambda: sample_lists(local, ["b", {"id": "long", "prompt": prompt}], 2,
                                 settings=SamplingSettings(max_new_tokens=11)), "long", 30, 11, 41, 40)
    assert sample_lists(local, ["b", prompt], 2, settings=SamplingSettings(max_new_tokens=10)).num_rows == 2


@pytest.mark.parametrize("options",
                         [{"max_prompt_length": 100.5}, {"max_prompt_length": 0}, {"max_prompt_length": "9"},
                          {"batch_size": 0}])
def test_29_limits_are_whole_numbers(options):
    tokenizer = kinds.letters()
    refused(lambda: sample_lists((policy_of(tokenizer), tokenizer), ["a"], 2, progress=False, **options), *options)


@pytest.mark.parametrize("settings",
                         [{"max_new_tokens": 2.5}, {"top_k": 1.5}, {"temperature": "hot"},
                          {"temperature": float("inf")}, {"temperature": float("nan")}, {"max_new_tokens": True}])
def test_29_settings_of_the_wrong_kind(settings):
    refused(lambda: SamplingSettings(**settings), *settings)


def test_29_a_tokenizer_without_pad_and_end():
    tokenizer = kinds.letters()
    model = policy_of(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    for share in (True, False):
        local = LocalSampler(model, tokenizer, progress=False, share_prompt=share)
        lists = sample_lists(local, ["The film", "A"], 2, settings=SamplingSettings(max_new_tokens=4))
        assert {r for x in lists for r in x["meta"]["finish_reasons"]} == {"length"}


# --- 33: passwords -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address",
                         ["http://user:secret@127.0.0.1:9/v1", "https://secret@host/v1#m",
                          "http://user:se#cret@host/v1", "http://host/v1?key=secret"])
def test_33_a_password_in_an_address_is_refused_and_written_nowhere(address, tmp_path, monkeypatch, capsys):
    from lire_nb.cli import main
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("The film\n")
    said = refused(lambda: sample_lists(address, ["a"]), "password")
    assert "secret" not in said and "cret" not in said.replace("secret", "")
    assert main(["sample", "--prompts", "p.txt", "--policy", address, "--out", "c.jsonl"]) == 2
    assert "cret@" not in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["p.txt"]


def test_37_how_a_text_is_meant_can_be_said(caplog):
    tokenizer = kinds.bytes_chatml()
    pair = (policy_of(tokenizer), tokenizer)

    def draw(**options):
        return list(sample_lists(pair, ["Is it?", "Why?"], 2, settings=SamplingSettings(max_new_tokens=3),
                                 progress=False, **options))

    with caplog.at_level(logging.WARNING, logger="lire_nb"):
        draw()
        assert sum("chat" in r.getMessage() for r in caplog.records) == 1
        caplog.clear()
        asked, meant = draw(chat=True), draw(chat=False)
        assert not caplog.records
    assert asked[0]["prompt"] == talk("Is it?") and meant[0]["prompt"] == "Is it?" and meant[0]["meta"]["chat"] is False


@pytest.mark.parametrize("word, ours", [("eos_token", "stop"), ("MAX_TOKENS", "length"), ("stop_sequence", "stop_string"),
                                        ("end_turn", "stop"), ("stop", "stop"), ("length", "length")])
def test_how_another_engine_says_that_it_ended(word, ours):
    from lire_nb.handover import read_choice
    from lire_nb.sampling import _read_answer

    chat = json.dumps({"choices": [{"message": {"content": "So"}, "finish_reason": word}]})
    assert _read_answer(chat, True, None)["finish_reason"] == ours
    assert read_choice({"text": "So", "finish_reason": word})["finish"] == ours


@pytest.mark.parametrize("word, calls", [("tool_calls", {"tool_calls": [{"function": {"name": "look"}}]}),
                                         ("stop", {"tool_calls": [{"function": {"name": "look"}}]}),
                                         ("function_call", {"function_call": {"name": "look", "arguments": "{}"}}),
                                         ("tool_use", {}), ("tool_calls", {})])
def test_an_answer_that_calls_tools_is_no_text(word, calls):
    from lire_nb.handover import read_choice
    from lire_nb.sampling import _read_answer

    message = {"content": "I look it up.", **calls}
    with pytest.raises(ValueError, match="calls tools" if calls else word):
        _read_answer(json.dumps({"choices": [{"message": message, "finish_reason": word}]}), True, None)
    if not calls:
        with pytest.raises(ValueError, match=word):
            read_choice({"text": "I look it up.", "finish_reason": word})

"""Servers that sample for self-enhancement and evaluation: handed over, verified, refused, killed. The server is a stub
on loopback (stub_engine.py); tests/real_vllm.py does the same with vLLM."""
import importlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from handover_client import OPTIONS, PROMPTS, vowels
from scipy import stats
from stub_engine import StubEngine
from test_ranks import close
from tiny_policy import make_start

from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.conversations import drawn_tokens, tokenizer_fingerprint
from lire_nb.enhancement import self_enhance
from lire_nb.evaluation import evaluate_systems
from lire_nb.handover import Engine, EngineSampler, served_folder
from lire_nb.lists import load_lists
from lire_nb.models import load_policy, Policy
from lire_nb.resume import read_manifest
from lire_nb.rewards import RewardError, ServedReward
from lire_nb.sampling import sample_lists, SamplingSettings

pytest.importorskip("openai")
HERE, TEXTS, N = Path(__file__).parent, [p["prompt"] for p in PROMPTS], len(PROMPTS)
FAST = dict(progress=False, patience=20, wait=20)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    "A policy, and one that is near it."
    folder = tmp_path_factory.mktemp("starts")
    for name, seed in (("a", 0), ("b", 1)):
        model, tokenizer = load_policy(make_start(folder / name, dropout=0.0), device="cpu")
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:  # not almost uniform
                    weight.mul_(8).add_(0.02 * seed * torch.randn_like(weight))
        model.save_pretrained(folder / name)
    return folder / "a", folder / "b"


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr("lire_nb.handover._LENGTH", 8)


def said(call, *words):
    with pytest.raises(LireError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and "remedy: " in text and "allowed: " in text
    for word in words:
        assert word in text, text
    return text


def test_two_rounds_with_a_hand_over(starts, tmp_path):
    """Every round is sampled by the policy of the round before, M answers a request, the drawn tokens with them."""
    with StubEngine(starts[1]) as server:  # of something else at first
        engine = Engine(server.url, server.load, **FAST)
        policies = self_enhance(starts[0], PROMPTS, vowels, tmp_path / "run", sampler=engine, **OPTIONS)
        assert server.loads == [str(starts[0]), str(policies[0])]
        asked = server.sampled(4)
        assert len(asked) == 2 * N and all(b["n"] == 3 for b in asked)  # in two rounds; nobody asked twice
        assert len({(tuple(b["prompt"]), b["seed"]) for b in asked}) == 2 * N
        for body in server.received:
            assert (body["top_k"], body["top_p"], body["min_p"]) == (0, 1.0, 0.0) and "seed" in body
            assert body["temperature"] in (1.0, 2.0) and body["repeat_penalty"] == 1.0
        tokenizer = Policy.of(starts[0]).tokenizer()
        for number, own in ((1, starts[0]), (2, policies[0])):
            server.load(own)  # an oracle: the stub draws the same again from the folder that the round names
            lists = load_lists(tmp_path / "run" / f"round-{number}" / "candidates.jsonl")
            for r in lists:
                again = next(server.answer(b) for b in asked[N * (number - 1) : N * number]
                             if tokenizer.decode(b["prompt"]) == r["prompt"])["choices"]
                kept = [c["token_ids"] for c in again if c["token_ids"][0] != 0]
                assert [ids for ids in r["meta"]["token_ids"]][: len(kept)] == kept
                assert r["meta"]["logps"] == [None] * 3 and r["sources"] == [f"policy:round-{number}"] * 3
            assert read_manifest(tmp_path / "run" / f"round-{number}")["sampled_by"]["sampler"] == "server"
        left = {p.name for p in (tmp_path / "run").rglob("*")}
        assert not [name for name in left if "journal" in name and not name.endswith(".lock") or "served" in name], left
        count = len(server.received)
        self_enhance(starts[0], PROMPTS, vowels, tmp_path / "run", sampler=server.url, **OPTIONS)
        assert len(server.received) == count
    said(lambda: self_enhance(starts[0], PROMPTS, vowels, tmp_path / "run", **OPTIONS), "sampler")


def test_what_a_server_drew_is_what_is_trained_on(starts, caplog):
    "Its token ids travel with the candidates, and with them whose they are."
    with StubEngine(starts[0]) as server:
        sampler = Engine(server.url, **FAST).serve(starts[0], TEXTS)
        lists = sample_lists(sampler, PROMPTS, 3, settings=SamplingSettings(max_new_tokens=4), seed=0, progress=False)
    tokenizer = Policy.of(starts[0]).tokenizer()
    assert all(r["meta"]["tokenizer"] == tokenizer_fingerprint(tokenizer) for r in lists)
    shifted = {**lists[0], "meta": {**lists[0]["meta"], "token_ids": [[*reversed(ids)] for ids in
                                                                      lists[0]["meta"]["token_ids"]]}}
    assert all(drawn_tokens(r, tokenizer)[j] == ids for r in lists for j, ids in enumerate(r["meta"]["token_ids"]))
    assert drawn_tokens(shifted, tokenizer) != drawn_tokens(lists[0], tokenizer)


def test_the_old_weights_served_on_are_caught_before_a_candidate_is_accepted(starts, tmp_path):
    with StubEngine(starts[0]) as server:
        engine = Engine(server.url, lambda folder, url: None, **FAST)
        said(lambda: self_enhance(starts[0], PROMPTS, vowels, tmp_path / "run", sampler=engine, **OPTIONS),
             "still serves the last policy", server.url, "of the way", "nats a token")
        assert len(server.sampled(4)) == N  # of round 1
        left = sorted(p.name for p in (tmp_path / "run" / "round-2").iterdir() if not p.name.endswith(".lock"))
        assert left == []
        server.load(tmp_path / "run" / "round-1" / "policy")  # by hand: the run goes on
        self_enhance(starts[0], PROMPTS, vowels, tmp_path / "run", sampler=server.url, **OPTIONS)
        assert len(server.sampled(4)) == 2 * N


def test_half_of_the_new_weights_are_caught(starts, tmp_path):
    a, b = (load_policy(folder, device="cpu")[0] for folder in starts)
    with torch.no_grad():
        for mine, theirs in zip(a.model.layers.parameters(), b.model.layers.parameters()):
            theirs.copy_(mine)  # the embeddings are new, the layers old
    b.save_pretrained(tmp_path / "half")
    Policy.of(starts[0]).tokenizer().save_pretrained(tmp_path / "half")
    with StubEngine(tmp_path / "half") as server:
        said(lambda: Engine(server.url, tolerance=5.0, **FAST).serve(starts[1], TEXTS, last=starts[0]),
             "of the way")


@pytest.mark.parametrize("faults, words", [
    ({"top_k": 10}, ["does not draw as it was asked", "top_k 0"]),
    ({"temperature": 0.4}, ["other weights|does not draw as it was asked"]),
    ({"seed": True}, ["ignores the seed"]), ({"fixed_seed": 7}, ["ignores the seed|does not draw", "seed|draw"]),
    ({"logprobs": None}, ["gives no log-probs", "vLLM"]),
    ({"reads": 3}, ["reads another prompt", "3 tokens"]),
    ({"cut": 2}, ["cuts answers", "2 tokens", "8 tokens, as asked"]),
    ({"more": 30}, ["writes on beyond what was asked", "tokens, as asked"]),
    ({"ignore_eos": True}, ["goes on after an end of text"]),
    ({"own_stop": "aeiou"}, ["stops where nobody asked it to", "stop strings"]),
    ({"later": 0.0}, ["does not draw as it was asked", "tokens of whole answers"]),
    ({"alike": True}, ["gives one answer several times|does not draw|ignores the seed"]),
    ({"cuts_prompt": 3}, ["other weights"]),
])
def test_a_server_that_does_something_else_is_refused(starts, faults, words):
    with StubEngine(starts[0], **faults) as server:
        loads = []
        engine = Engine(server.url, lambda folder, url: loads.append(folder), **FAST)
        text = said(lambda: engine.serve(starts[0], TEXTS))
        assert all(any(w in text for w in word.split("|")) for word in words), text
        assert not server.sampled(4) and (not loads or "other weights" in text)  # loading again mends no setting


def test_a_penalty_on_what_was_said_is_seen(starts, monkeypatch):
    "It moves the probabilities of few tokens; that these come too seldom shows."
    monkeypatch.setattr("lire_nb.handover._LENGTH", 24)
    monkeypatch.setattr("lire_nb.handover._EACH", 8)
    with StubEngine(starts[0]) as server:
        Engine(server.url, **FAST).serve(starts[0], TEXTS)
        server.faults["penalty"] = 9.0
        said(lambda: Engine(server.url, **FAST).serve(starts[0], TEXTS), "does not draw as it was asked", "no penalties")


def test_the_runs_own_cut_is_obeyed_or_refused(starts):
    settings = SamplingSettings(max_new_tokens=4, top_k=5, temperature=0.7)
    with StubEngine(starts[0]) as server:
        drawn = Engine(server.url, **FAST).serve(starts[0], TEXTS, settings).sample(TEXTS, 3, settings, 0)
        assert len(drawn) == N
        server.faults["top_k"] = 0
        said(lambda: Engine(server.url, **FAST).serve(starts[0], TEXTS, settings), "top_k 5")


def test_what_a_stop_string_ended_has_no_end_whatever_the_server_calls_it():
    "vLLM says \"stop\" and names the string; the ids stop before it."
    from lire_nb.handover import read_choice

    choice = {"text": "ab", "finish_reason": "stop", "token_ids": [1, 2]}
    assert read_choice(choice | {"stop_reason": "\n"})["finish"] == "stop_string"
    assert read_choice(choice | {"matched_stop": "\n"})["finish"] == "stop_string"
    assert [read_choice(choice | more)["finish"] for more in ({}, {"stop_reason": None}, {"stop_reason": 0})] == ["stop"] * 3


@pytest.mark.parametrize("ids", [[-3] * 6, [2**40] * 6])
def test_numbers_that_are_no_tokens_are_no_answer(ids):
    from lire_nb.handover import read_choice

    with pytest.raises(ValueError, match="token ids"):
        read_choice({"text": "abc", "finish_reason": "length", "token_ids": ids})


def test_the_longest_prompts_are_among_the_probes(starts):
    "A server that cuts prompts is found by those that it cuts."
    texts = [f"{'long ' * (i == 11)}film {i}" for i in range(16)]
    with StubEngine(starts[0]) as server:
        probe = Engine(server.url, **FAST).serve(starts[0], texts).probe
        longest = max(probe.prompts, key=len)
        assert len(probe.prompts) == 8 and len(longest) == len(Policy.of(starts[0]).tokenizer()(texts[11])["input_ids"])


def test_a_server_that_takes_no_n_is_asked_for_the_rest(starts, monkeypatch):
    monkeypatch.setattr("lire_nb.handover._DRAWS", 40)
    with StubEngine(starts[0], n=1) as server:
        engine = Engine(server.url, **FAST)
        drawn = engine.serve(starts[0], TEXTS[:2]).sample(TEXTS[:2], 3, SamplingSettings(max_new_tokens=4), 0)
        assert [len(row) for row in drawn] == [3, 3]
        asked = server.sampled(4)
        assert len(asked) >= 6 and len({b["seed"] for b in asked}) == len(asked)


def test_equal_in_distribution_to_local_sampling(starts):
    """First tokens by chi², and the mean log-prob of whole answers."""
    settings, (model, tokenizer) = SamplingSettings(max_new_tokens=3), load_policy(starts[0], device="cpu")
    with StubEngine(starts[0]) as server:
        sampler = Engine(server.url, **FAST).serve(starts[0], TEXTS[:1], settings)
        [theirs] = sampler.sample(TEXTS[:1], 600, settings, 0)
    ours = sample_lists((model, tokenizer), TEXTS[:1], 600, settings=settings, seed=1, progress=False)[0]
    counts = np.zeros((2, 96))
    for row, ids in ((0, [c.token_ids for c in theirs]), (1, ours["meta"]["token_ids"])):
        for one in ids:
            counts[row, one[0]] += 1
    common = counts.sum(0) >= 10
    table = np.c_[counts[:, common], counts[:, ~common].sum(1)]
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3
    assert (counts[:, 0] == 0).all()  # no answer begins with its end

    def logp(ids):
        rows = torch.tensor([[*tokenizer(TEXTS[0])["input_ids"], *ids]])
        with torch.no_grad():
            logps = model(rows).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        return float(logps.gather(1, rows[0, -len(ids) :, None]).sum())

    means = [np.array([logp(ids) for ids in rows[:200]]) for rows in ([c.token_ids for c in theirs],
                                                                       ours["meta"]["token_ids"])]
    assert stats.ttest_ind(*means).pvalue > 1e-3


def crash(server, at, folder):
    "At its `at`-th request for the run the server is cut off, and soon back with the weights of a folder."
    seen = []

    def hook(count):
        if server.received[-1]["max_tokens"] == 4:
            seen.append(1)
        if len(seen) == at and not server.faults.get("crashed"):
            server.faults["crashed"] = True
            server.stop()
            threading.Thread(target=lambda: (time.sleep(0.8), server.load(folder), server.start()), daemon=True).start()
            raise ConnectionAbortedError

    server.hook, server.server.handle_error = hook, lambda *args: None


def test_a_server_that_was_killed_comes_back_as_the_same_or_is_refused(starts, tmp_path):
    for back, fine in ((starts[0], True), (starts[1], False)):
        with StubEngine(starts[0]) as server:
            patient = {**FAST, "patience": 90, "wait": 90}  # a busy machine reads the weights slowly
            sampler = Engine(server.url, max_in_flight=1, **patient).serve(starts[0], TEXTS,
                                                                           journal=tmp_path / "journal")
            crash(server, 3, back)
            settings = SamplingSettings(max_new_tokens=4)
            if fine:
                drawn = sampler.sample(TEXTS, 3, settings, 0)
                asked = server.sampled(4)
                assert all(len(row) == 3 for row in drawn)
                answered = [b for k, b in enumerate(asked) if k != 2]  # the third was cut off
                assert len(answered) == N == len({tuple(b["prompt"]) for b in answered})
                assert len((tmp_path / "journal").read_text().splitlines()) == N
                (tmp_path / "journal").unlink()
            else:
                said(lambda: sampler.sample(TEXTS, 3, settings, 0), "serves other weights")
                assert len(server.sampled(4)) == 3  # nothing was asked of the wrong one


SIX = SamplingSettings(max_new_tokens=6)


def swaps(server, at, folder, back=None):
    "From the `at`-th request of the run on, which is none of a probe, the server has other weights; `back`: until then."
    def hook(count):
        asked = len(server.sampled(6))
        if asked in (at, back):
            server.load(folder if asked == at else back_to)

    back_to = server.loads[-1] if server.loads else server.first
    server.hook = hook


def test_weights_that_change_without_an_outage_are_caught_at_the_end(starts, tmp_path, monkeypatch):
    """The answers of the other weights are forgotten, also where the old ones are back in the end; the rest is kept."""
    monkeypatch.setattr("lire_nb.handover._GROUP", 12)  # two requests of six tokens
    texts = [f"film {n} was" for n in range(12)]
    for back in (None, 9):
        journal = tmp_path / f"journal-{back}"
        with StubEngine(starts[0]) as server:
            engine = Engine(server.url, max_in_flight=1, **FAST)
            sampler = engine.serve(starts[0], texts, SIX, journal=journal)
            swaps(server, 5, starts[1], back)
            said(lambda: sampler.sample(texts, 3, SIX, 0), "answered with other weights", server.url, "of 12 requests")
            kept = {json.loads(line)["key"] for line in journal.read_text().splitlines()}
            assert (3 <= len(kept) <= 4) if back is None else 6 <= len(kept) <= 8
            server.hook = lambda count: None
            server.load(starts[0])
            before = len(server.sampled(6))
            drawn = engine.serve(starts[0], texts, SIX, journal=journal).sample(texts, 3, SIX, 0)
            assert len(server.sampled(6)) - before == 12 - len(kept)
        with StubEngine(starts[0]) as server:
            fresh = Engine(server.url, **FAST).serve(starts[0], texts, SIX).sample(texts, 3, SIX, 0)
        assert drawn == fresh


def test_few_answers_of_other_weights_at_the_end_stand_out(starts, tmp_path):
    "In a group of many tokens they would be lost."
    texts, journal = [f"film {n} was" for n in range(40)], tmp_path / "journal"
    with StubEngine(starts[0]) as server:
        engine = Engine(server.url, max_in_flight=1, **FAST)
        sampler = engine.serve(starts[0], texts, SIX, journal=journal)
        swaps(server, 38, starts[1])
        said(lambda: sampler.sample(texts, 3, SIX, 0), "answered with other weights", "3 of 40 requests")
        assert len(journal.read_text().splitlines()) == 37


@pytest.mark.parametrize("settings", [SamplingSettings(6, temperature=0.7), SamplingSettings(6, top_k=8),
                                      SamplingSettings(6, temperature=1.5, top_k=20)])
def test_a_server_that_says_log_probs_after_temperature_and_cuts(starts, tmp_path, settings):
    "As SGLang does: taken, and other weights are seen as well."
    with StubEngine(starts[0], processed=True) as server:
        engine = Engine(server.url, **FAST)
        sampler = engine.serve(starts[0], TEXTS, settings, last=starts[1])
        assert len(sampler.sample(TEXTS, 3, settings, 0)) == N
        server.load(starts[1])
        said(lambda: sampler.sample(TEXTS, 3, settings, 1), "answered with other weights")


def test_a_rounding_server_is_taken_at_temperature_0(starts, tmp_path):
    "One token in a near tie is another; its answers are alike, as they should be."
    model, tokenizer = load_policy(starts[0], device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.004 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "rough")
    tokenizer.save_pretrained(tmp_path / "rough")
    for settings in (SIX, SamplingSettings(6, temperature=0.0)):
        with StubEngine(tmp_path / "rough") as server:
            sampler = Engine(server.url, **FAST).serve(starts[0], TEXTS, settings)
            assert len(sampler.sample(TEXTS, 3, settings, 0)) == N


def test_special_tokens_that_the_model_does_not_have_are_not_sent(starts, tmp_path):
    shutil.copytree(starts[0], tmp_path / "more")
    tokenizer = Policy.of(tmp_path / "more").tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[PAD]"]})
    tokenizer.save_pretrained(tmp_path / "more")
    assert len(Policy.of(tmp_path / "more").tokenizer()) == 97
    with StubEngine(tmp_path / "more", strict=True) as server:
        Engine(server.url, **FAST).serve(tmp_path / "more", TEXTS)


def test_answers_that_a_killed_run_kept_are_looked_at_too(starts, tmp_path):
    "The server changes its weights, then dies, and so does the client: nobody has looked at what was kept."
    texts, journal = [f"film {n} was" for n in range(6)], tmp_path / "journal"
    with StubEngine(starts[0]) as server:
        sampler = Engine(server.url, max_in_flight=1, **FAST | {"patience": 0.1}).serve(starts[0], texts, SIX, journal=journal)
        swaps(server, 2, starts[1])
        old = server.hook

        def then_dies(count):
            old(count)
            if len(server.sampled(6)) == 5:
                server.faults["gone"] = True
                raise ConnectionAbortedError

        server.hook, server.server.handle_error = then_dies, lambda *args: None
        with pytest.raises(LireError, match="does not answer"):
            sampler.sample(texts, 3, SIX, 0)
        assert len(journal.read_text().splitlines()) == 4
        server.hook = lambda count: None
        server.load(starts[0])
        engine = Engine(server.url, **FAST)
        said(lambda: engine.serve(starts[0], texts, SIX, journal=journal).sample(texts, 3, SIX, 0), "answered with other weights")
        drawn = engine.serve(starts[0], texts, SIX, journal=journal).sample(texts, 3, SIX, 0)
    with StubEngine(starts[0]) as server:
        assert drawn == Engine(server.url, **FAST).serve(starts[0], texts, SIX).sample(texts, 3, SIX, 0)


def test_special_tokens_are_not_drawn_by_servers_either(starts, tmp_path):
    "Three letters are special: a server is told so, and where it does not listen its answer is drawn again."
    folder = tmp_path / "special"
    shutil.copytree(starts[0], folder)
    tokenizer = Policy.of(folder).tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["e", "t", "a"]})
    tokenizer.save_pretrained(folder)
    never = set(Policy.of(folder).tokenizer().convert_tokens_to_ids(["e", "t", "a"]))
    for faults in ({}, {"unbiased": True}):
        with StubEngine(folder, **faults) as server:
            drawn = Engine(server.url, **FAST).serve(folder, TEXTS, SIX).sample(TEXTS, 8, SIX, 0)
            assert all(set(body["logit_bias"]) == set(map(str, never)) for body in server.received)
        assert not never & {t for row in drawn for c in row for t in c.token_ids}


def test_where_an_end_is_likely_first_only_a_server_that_can_exclude_it_is_taken(starts, tmp_path):
    "It is excluded before the cut here; a server that is asked again cuts before."
    model, tokenizer = load_policy(starts[0], device="cpu")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1].clone()))
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(TEXTS[0])["input_ids"]])).logits[0, -1]
        weight, goal = model.lm_head.weight.clone(), logits.max() + 1
        weight[0] = seen[0] * goal / (seen[0] @ seen[0])
        model.lm_head.weight = torch.nn.Parameter(weight)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    for settings in (SamplingSettings(4, top_k=3), SamplingSettings(4, top_p=0.6), SamplingSettings(4, temperature=0.0)):
        with StubEngine(tmp_path / "ends") as server:
            said(lambda: Engine(server.url, **FAST).serve(tmp_path / "ends", TEXTS[:1], settings),
                 "cannot be told that an answer has a token before its end", "vLLM", "an end comes first with")
            assert len(server.received) == 1  # the probe of the weights alone
        with StubEngine(tmp_path / "ends", owner="vllm") as server:
            if settings.top_p == 1:  # the stub does not know it
                Engine(server.url, **FAST).serve(tmp_path / "ends", TEXTS[:1], settings)
    with StubEngine(tmp_path / "ends") as server:  # nothing is cut: it is asked again
        Engine(server.url, **FAST).serve(tmp_path / "ends", TEXTS[:1])


def test_a_probe_asks_for_no_more_than_there_is_room(starts, monkeypatch):
    monkeypatch.setattr("lire_nb.handover.context_of", lambda model: 40)
    with StubEngine(starts[0]) as server:
        Engine(server.url, **FAST).serve(starts[0], ["a" * 36], SamplingSettings(2))
        assert {body["max_tokens"] for body in server.received} == {1, 4}


@pytest.mark.parametrize("options", [dict(wait="10"), dict(tolerance=True), dict(timeout=0), dict(max_in_flight=2.0),
                                     dict(extra_body={"temperature": 0.5}), dict(extra_body={"n": 1, "top_p": None})])
def test_what_an_engine_is_given_is_checked(options):
    said(lambda: Engine("http://127.0.0.1:1/v1", **options), next(iter(options)))
    said(lambda: Engine(["http://127.0.0.1:1/v1"] * 2), "given twice")
    Engine("http://127.0.0.1:1/v1", extra_body={"min_p": None, "priority": 3})


def test_a_client_that_was_killed_asks_for_the_rest(starts, tmp_path):
    """SIGKILL in the middle of sampling: what was answered is neither lost nor asked again."""
    journal = tmp_path / "run" / "round-1" / "candidates.journal"
    with StubEngine(starts[0]) as server:
        server.hook = lambda count: time.sleep(0.3 if server.received[-1]["max_tokens"] == 4 else 0)
        with warm.start(HERE / "handover_client.py", starts[0], tmp_path / "run", server.url, cwd=HERE,
                        env={**os.environ, "HF_HUB_OFFLINE": "1"}) as client:
            until = time.monotonic() + 60
            while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
                assert client.poll() is None and time.monotonic() < until, client.said()
                time.sleep(0.01)
            client.send_signal(signal.SIGKILL)
            client.wait()
        kept, server.hook = journal.read_text().splitlines(), lambda count: None
        before = len(server.sampled(4))
        assert 2 <= len(kept) < N
        engine = Engine(server.url, server.load, **FAST)
        self_enhance(starts[0], PROMPTS, vowels, tmp_path / "run", sampler=engine, **OPTIONS)
        assert len(server.sampled(4)) - before == N - len(kept) + N  # the rest of round 1, and round 2
        lists = load_lists(tmp_path / "run" / "round-1" / "candidates.jsonl")
        texts = {tuple(one["text"] for one in json.loads(line)["answer"]) for line in kept}
        assert texts <= {tuple(r["completions"]) for r in lists}


def test_two_servers_share_the_work(starts):
    with StubEngine(starts[0]) as one, StubEngine(starts[1]) as two:
        two_load = lambda folder, url: (two if url == two.url else one).load(folder)  # noqa: E731
        sampler = Engine([one.url, two.url], two_load, **FAST).serve(starts[0], TEXTS)
        assert isinstance(sampler, EngineSampler) and (one.loads, two.loads) == ([], [str(starts[0])])
        drawn = sampler.sample(TEXTS, 2, SamplingSettings(max_new_tokens=4), 0)
        assert len(one.sampled(4)) == len(two.sampled(4)) == N / 2 and all(len(row) == 2 for row in drawn)


def test_an_adapter_is_handed_over_merged(starts, tmp_path):
    from peft import get_peft_model, LoraConfig

    model, tokenizer = load_policy(starts[0], device="cpu")
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False,
                                     task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    policy, ids = Policy.of(tmp_path / "adapter"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = load_policy(served_folder(policy, tmp_path), device="cpu")[0](ids).logits
        torch.testing.assert_close(whole, policy.load(device="cpu")[0](ids).logits)
        assert not torch.allclose(whole, load_policy(starts[0], device="cpu")[0](ids).logits, atol=1e-3)
    assert served_folder(Policy.of(starts[0]), tmp_path) == str(starts[0])
    with StubEngine(starts[0]) as server:  # the copy goes when the answers are there
        evaluate_systems(tmp_path / "run", {"start": str(starts[0]), "new": str(tmp_path / "adapter")}, PROMPTS[:3],
                         {"vowels": vowels}, settings=SamplingSettings(max_new_tokens=4), progress=False,
                         samplers={"new": Engine(server.url, server.load, **FAST)})
        assert [f"served-{policy.fingerprint}" in folder for folder in server.loads] == [True]
    assert not [*(tmp_path / "run").rglob("served-*")]


def test_evaluation_draws_from_servers(starts, tmp_path):
    systems, settings = dict(zip(("start", "new"), map(str, starts))), SamplingSettings(max_new_tokens=4)
    with StubEngine(starts[1]) as server:
        run = lambda **more: evaluate_systems(tmp_path / "run", systems, PROMPTS, {"vowels": vowels},  # noqa: E731
                                              settings=settings, progress=False, **more)
        run(samplers={"new": Engine(server.url, **FAST)})
        assert len(server.sampled(4)) == N and all(b["n"] == 2 for b in server.sampled(4))
        rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation" / "new.jsonl").read_text().splitlines()]
        assert all(x < 0 for r in rows for x in r["logps"] + r["start_logps"])
        configs = [json.loads((tmp_path / "run" / "evaluation" / f"{name}.config.json").read_text()) for name in systems]
        assert "sampler" not in configs[0] and configs[1]["sampler"] == "server"
        count = len(server.received)
        run(samplers={"new": server.url})
        assert len(server.received) == count
    said(lambda: run(samplers={"gold": "http://127.0.0.1:1/v1"}), "no system of this name", "gold")
    said(run, "sampler: 'server' there, nothing now")


def test_every_system_is_told_from_the_others(starts, tmp_path):
    "A round that is most of the way to the next, and the next one itself: the command runs for each, and none is taken."
    a, b = (load_policy(folder, device="cpu")[0] for folder in starts)
    with torch.no_grad():
        for mine, theirs in zip(a.parameters(), b.parameters()):
            theirs.copy_(mine + 0.85 * (theirs - mine))
    near = tmp_path / "near"
    b.save_pretrained(near)
    Policy.of(starts[0]).tokenizer().save_pretrained(near)
    systems = {"start": str(starts[0]), "r1": str(near), "r2": str(starts[1])}
    more = dict(settings=SamplingSettings(max_new_tokens=4), progress=False)
    with StubEngine(near) as server:
        engine = Engine(server.url, server.load, **FAST)
        judged = lambda name, **by: evaluate_systems(  # noqa: E731
            tmp_path / name, systems, PROMPTS, {"vowels": vowels}, samplers=by, **more)
        judged("one", r1=engine, r2=engine)
        assert server.loads == [str(starts[1])]  # r1 was there
        judged("two", start=Engine(server.url, server.load, **FAST))
        assert server.loads[1:] == [str(starts[0])]
        said(lambda: judged("three", r1=server.url), "of the way")


def test_an_engine_remembers_what_it_handed_over(starts, tmp_path):
    with StubEngine(starts[1]) as server:
        engine = Engine(server.url, lambda folder, url: None, tolerance=5.0, **FAST)
        engine.serve(starts[1], TEXTS)
        said(lambda: engine.serve(starts[0], TEXTS), "still serves", str(starts[1]))


def test_one_two_and_three_processes_evaluate_with_servers_alike(starts, tmp_path, monkeypatch):
    """The same requests, rows and figures. A server that dies ends both of two processes with one line; they go on after
    what it answered."""
    for folder in starts:
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))

    def run(count):
        environment = {"HF_HUB_OFFLINE": "1", "SERVER": server.url.removesuffix("/v1")}
        if count > 1:
            warm.ranks(count, HERE / "share_processes.py", tmp_path, "served", env=os.environ | environment, timeout=120)
            return
        for name, value in (environment | {"RANK": "0", "WORLD_SIZE": "1"}).items():
            monkeypatch.setenv(name, value)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, bool)
        importlib.import_module("share_processes").served(tmp_path)

    def rows(count):
        made = tmp_path / f"served-{count}"
        return {p.name: [json.loads(line) for line in p.read_text().splitlines()]
                for p in [*(made / "evaluation").glob("*.jsonl"), made / "metrics.jsonl"]}

    with StubEngine(starts[1]) as server:
        asked = []
        for count in (1, 3):
            run(count)
            asked.append((sorted(map(json.dumps, server.received)), server.scored[:]))
            server.received.clear()
            server.scored.clear()
        assert asked[0] == asked[1] and sum(json.loads(b)["max_tokens"] == 4 for b in asked[0][0]) == N
        server.hook, server.server.handle_error = lambda count: dies(server, 3, tmp_path), lambda *args: None
        run(2)
        assert len(server.sampled(4)) == N + 1  # the third was cut off
        found = [json.loads((tmp_path / f"served-2-{rank}.json").read_text())["served"]["found"] for rank in (0, 1)]
    assert [[code for code, _ in rank] for rank in found] == [[2, 0]] * 2
    [line] = [line for rank in found for line in rank[0][1].splitlines() if line.startswith("lire evaluate: ")]
    assert server.url in line and "does not answer" in line and "remedy: " in line
    one = rows(1)
    assert one.keys() == {"a.jsonl", "b.jsonl", "metrics.jsonl"}
    close(one, rows(2))
    close(one, rows(3))
    assert not [p for p in (tmp_path / "served-2").rglob("*") if p.suffix in (".journal", ".parts")]


def dies(server, at, place):
    "At its `at`-th request for the run the server is gone, and comes back when both processes have ended."
    if len(server.sampled(4)) == at and not server.loads:
        def comes_back():
            while not all((place / f"ended-{rank}").exists() for rank in (0, 1)):
                time.sleep(0.02)
            server.loads.append("the same")
            server.start()
            (place / "again").touch()

        server.stop()
        threading.Thread(target=comes_back, daemon=True).start()
        raise ConnectionAbortedError


def test_a_served_reward_is_the_model_that_it_should_be(tmp_path):
    asked, length = [], lambda prompts, texts: [float(len(t)) for t in texts]

    def address(prompts, texts):
        asked.append(len(texts))
        if len(asked) == 3:
            raise OSError("killed")
        return length(prompts, texts)

    prompts, texts = ["p"] * 80, ["x" * (k % 7) for k in range(80)]
    with pytest.raises(OSError):
        ServedReward(address, length, journal=tmp_path / "scores")(prompts, texts)
    first = len(asked)
    assert ServedReward(address, length, journal=tmp_path / "scores")(prompts, texts) == length(prompts, texts)
    assert sum(asked[1:first]) - 32 + sum(asked[first + 1 :]) <= 80 + 32
    with pytest.raises(RewardError, match="scores otherwise"):
        ServedReward(lambda p, t: [-x for x in length(p, t)], length)(prompts, texts)
    with pytest.raises(RewardError, match="not finite"):
        ServedReward(lambda p, t: [float("nan") for _ in t], length)(prompts, texts)
    assert asked[0] == len(set(texts))  # all different ones


def test_a_served_reward_is_looked_at_until_the_end(tmp_path):
    "It changes behind the first look, gives a score too many, or another list's name would be said."
    length, calls = lambda prompts, texts: [float(len(t)) for t in texts], []  # noqa: E731
    prompts, texts = ["p"] * 320, ["x" * (k % 7) for k in range(320)]

    def changes(prompts, texts):
        calls.append(len(texts))
        return length(prompts, texts) if len(calls) < 8 else [3.0 for _ in texts]

    with pytest.raises(RewardError, match="scores otherwise.*parts"):
        ServedReward(changes, length, journal=tmp_path / "scores")(prompts, texts)
    kept = len((tmp_path / "scores").read_text().splitlines())
    assert 0 < kept < 10
    calls.clear()
    again = ServedReward(lambda p, t: calls.append(len(t)) or length(p, t), length, journal=tmp_path / "scores")
    assert again(prompts, texts) == length(prompts, texts) and len(calls) == 1 + 10 - kept
    for more in (lambda s: s[:-1], lambda s: [*s, 0.0]):
        with pytest.raises(RewardError, match="wrong number of scores"):
            ServedReward(lambda p, t: more(length(p, t)) if len(t) > 16 else length(p, t), length)(prompts, texts)
    same = ServedReward(lambda p, t: [3.01] * len(t), lambda p, t: [3.0] * len(t))  # as bfloat16 says 3.0
    assert same(prompts, texts) == [3.01] * 320

    rng = np.random.default_rng(0)  # a twentieth of a standard deviation is allowed, and this is a fiftieth
    for count in (1, 2, 5, 8, 31, 33, 64):
        for _ in range(20):
            words = ["x" * int(k) for k in rng.integers(60, 200, count)]
            rough = ServedReward(lambda p, t: [x + rng.normal(0, 1) for x in length(p, t)], length)
            assert len(rough(["p"] * count, words)) == count
    low = lambda p, t: [-1500 + len(x) / 57 for x in t]  # noqa: E731
    for wrong in (lambda p, t: [-1500.0] * len(t), lambda p, t: [-1500 + rng.normal() for _ in t]):
        with pytest.raises(RewardError, match="scores otherwise"):
            ServedReward(wrong, low)(["p"] * 64, ["x" * int(k) for k in rng.integers(1, 200, 64)])

    def far(prompts, texts):
        if len(texts) == 32:
            error = RewardError("no number")
            error.span = (4, 5)
            raise error
        return length(prompts, texts)

    with pytest.raises(RewardError) as failed:
        ServedReward(far, length)(prompts[:72], ["a"] * 32 + texts[:40])
    assert failed.value.span in ((4, 5), (36, 37))


@pytest.mark.parametrize("options, words", [
    (["--sampler", "start=http://127.0.0.1:1/v1"], ["--sampler", "policy"]),
    (["--sampler", "http://127.0.0.1:1/v1"], ["--sampler"]),
    (["--sampler", "policy=ftp://x"], ["not an address"]),
    (["--sampler", "policy=http://127.0.0.1:1/v1", "--hand-over", "restart"], ["{folder}"]),
    (["--hand-over", "restart {folder}"], ["has no effect without --sampler"]),
    (["--sampler", "policy=http://127.0.0.1:1/v1", "--tolerance", "0"], ["tolerance", "above 0"]),
    (["--scorer", "gold=http://127.0.0.1:1"], ["--scorer", "reward"]),
    (["--sampler", "policy=http://127.0.0.1:1/v1"], ["does not answer", "start it"]),
    (["--dtype", "float16"], ["--dtype", "cannot be trained", "fp16=true"]),
])
def test_what_a_user_can_get_wrong_on_the_command_line_is_one_line(starts, tmp_path, capsys, options, words):
    (tmp_path / "prompts.txt").write_text("film one was\nfilm two was\n")
    code = main(["enhance", "--prompts", str(tmp_path / "prompts.txt"), "--reward", "length", "--policy", str(starts[0]),
                 "--set", "use_cpu=true", "--set", "bf16=false", "--out", str(tmp_path / "run"), *options])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and all(word in text for word in words), text


@pytest.mark.parametrize("servers", [[], 5, None, [None], "nonsense", "http://me:secret@localhost/v1"])
def test_what_is_no_address_is_refused(servers):
    assert "secret" not in said(lambda: Engine(servers))


def test_a_command_is_told_the_folder(starts, tmp_path):
    """A command of the shell: quoted, its words kept in a log, its failure and its silence in one line."""
    from lire_nb.handover import run_command

    odd = tmp_path / "a folder; of 'mine'"
    run_command("printf %s {folder} > " + str(tmp_path / "told"), str(odd), "http://127.0.0.1:1/v1", tmp_path, 10)
    assert (tmp_path / "told").read_text() == str(odd)
    said(lambda: run_command("sleep 5; echo {folder}", "x", "y", tmp_path, 0.1), "no end within 0.1 s", "background")
    said(lambda: run_command(f"sleep 1; touch {tmp_path}/late; sleep 9", "x", "y", tmp_path, 0.3), "no end within")
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()  # what it had started is gone with it
    said(lambda: run_command(lambda folder, url: 1 / 0, "x", "y", tmp_path, 1), "hand-over failed", "ZeroDivisionError")
    began = time.monotonic()
    run_command("sleep 20 & echo {folder}", "x", "y", tmp_path, 10)  # a server in the background
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("word, ends, ids", [("eos_token", "stop", (1, 2, 0)), ("stop_sequence", "stop_string", None),
                                             ("max_tokens", "length", (1, 2))])
def test_an_end_is_added_only_where_the_model_drew_one(word, ends, ids):
    "A server that leaves the end of text out of its ids, and one that was stopped by a string nobody asked for."
    from types import SimpleNamespace

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    from lire_nb.handover import EngineSampler, read_choice, Vocabulary
    from lire_nb.sampling import SamplingSettings

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(["<eos>", "a", "b", "[UNK]"])}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="[UNK]")
    one = read_choice({"text": "a b", "finish_reason": word, "token_ids": [1, 2]}, tokenizer)
    found = EngineSampler._completion(SimpleNamespace(words=Vocabulary(tokenizer, (0,))), "a", one,
                                      SamplingSettings(max_new_tokens=2 if ends == "length" else 8))
    assert (found.finish_reason, found.token_ids) == (ends, ids)

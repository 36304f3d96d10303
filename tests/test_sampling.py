"""Sampling proved: the shared prompt against plain generation, the drawn tokens against the exact distribution, and a
real server that is killed."""
import contextlib
import http.server
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as tf
import warm
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lire_nb import sampling, servers
from lire_nb.base.errors import LireError
from lire_nb.sampling import Completion, LocalSampler, SamplingSettings, ServerSampler, sample_lists
from lire_nb.servers import TryLater, run_requests

sys.path.insert(0, os.path.dirname(__file__))
from serving import Serve, free_port, need_server  # noqa: E402

WORDS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
PROMPTS = ["abc", "the quick brown fox jumps", "Hello, World.", "the quick brown fox jumps", "z"]


def tiny_tokenizer():
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: i for i, c in enumerate(WORDS, 3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>",
                                      eos_token="<eos>")


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8,
             max_position_embeddings=256, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "Llama": lambda: tf.LlamaConfig(**SMALL),
    "GPT-2": lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                                   initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "Qwen3": lambda: tf.Qwen3Config(**SMALL),
    "Mistral, window 6": lambda: tf.MistralConfig(**SMALL, sliding_window=6),
    "Gemma 2, window 5": lambda: tf.Gemma2Config(**SMALL, query_pre_attn_scalar=8, sliding_window=5),
    "Gemma 3, window 5": lambda: tf.Gemma3TextConfig(**SMALL, query_pre_attn_scalar=8, sliding_window=5,
                                                     layer_types=["sliding_attention", "full_attention"]),
    "Bloom": lambda: tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3,
                                    pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "LFM2, convolutions": lambda: tf.Lfm2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"},
                                                layer_types=["conv", "full_attention"]),
    "Mamba": lambda: tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8,
                                    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
SHARED = [name for name in FAMILIES if name not in ("Mamba", "LFM2, convolutions")]


def tiny_model(family="Llama", seed=0):
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def sampler(model, **options):
    return LocalSampler(model, tiny_tokenizer(), progress=False, **options)


def eager_to_end(model, bonus):
    "The same model with end-of-text more likely at every step."
    head = model.get_output_embeddings()
    wrapped = head.forward
    bias = torch.zeros(64)
    bias[2] = bonus
    head.forward = lambda x: wrapped(x) + bias
    return model


# --- the prompt once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHARED)
def test_greedy_tokens_are_those_of_plain_generate(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    local = sampler(model)
    got = local.sample(PROMPTS, 2, SamplingSettings(max_new_tokens=12, temperature=0), 0)
    assert local.share_prompt
    for prompt, (first, second) in zip(PROMPTS, got):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=1,
                             suppress_tokens=[0, 1, *range(len(WORDS) + 3, 64)],
                             pad_token_id=0)[0, ids.shape[1] :].tolist()
        ended = out[-1] == 2
        assert first == second == Completion(tokenizer.decode([t for t in out if t != 2]),
                                             "stop" if ended else "length")


@pytest.mark.parametrize("family", SHARED)
def test_probabilities_are_those_of_the_plain_model(family):
    """Teacher-forced through the repeated, reordered cache, past every window; against one row at a time without a
    cache."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    rows = [tokenizer(p)["input_ids"] for p in PROMPTS]
    with torch.no_grad():
        decoding = sampling._Decoding(model, rows, 3, 0)
        rows = [r for r in rows for _ in range(3)]
        for step in range(10):
            plain = torch.stack([model(torch.tensor([r]), use_cache=False).logits[0, -1] for r in rows])
            torch.testing.assert_close(decoding.scores.softmax(-1), plain.softmax(-1), rtol=1e-4, atol=1e-6)
            if step in (2, 5):  # some rows leave
                keep = torch.arange(0, len(rows), 2)
                decoding.choose(keep)
                rows = [rows[k] for k in keep.tolist()]
            tokens = [3 + (7 * step + 11 * k) % 60 for k in range(len(rows))]
            rows = [[*r, t] for r, t in zip(rows, tokens)]
            decoding.append(torch.tensor(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_draw_the_same(family):
    model, settings = tiny_model(family), SamplingSettings(max_new_tokens=10, temperature=0.9, top_k=30, top_p=0.9)
    plain = sampler(model, share_prompt=False).sample(PROMPTS, 3, settings, 7)
    assert sampler(model).sample(PROMPTS, 3, settings, 7) == plain
    assert len({c.text for row in plain for c in row}) > 10


def test_a_model_without_a_shared_cache_falls_back_with_one_line(caplog):
    local = sampler(tiny_model("Mamba"))
    with caplog.at_level(logging.WARNING, logger="lire_nb"):
        for _ in range(2):
            local.sample(PROMPTS, 2, SamplingSettings(max_new_tokens=3), 0)
    lines = [r.getMessage() for r in caplog.records if "cannot share prompts" in r.getMessage()]
    assert len(lines) == 1 and "MambaForCausalLM" in lines[0] and local.share_prompt is False


def test_a_model_that_counts_positions_wrongly_is_found_out():
    """A GPT-2 that ignores position_ids would be silently wrong with left padding: the check sees it. (Rotary positions
    are relative and would not mind.)"""
    model = tiny_model("GPT-2")
    forward = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert "standard deviations" in sampling.cannot_share_prompts(model, tiny_tokenizer())
    assert sampling.cannot_share_prompts(tiny_model(), tiny_tokenizer()) == ""


def test_bfloat16_passes_its_own_check():
    assert sampling.cannot_share_prompts(tiny_model().to(torch.bfloat16), tiny_tokenizer()) == ""


# --- the right distribution ----------------------------------------------------------------------------------------


UNWRITTEN = (0, 1, *range(len(WORDS) + 3, 64))  # tokens without a text: padding, beginning, and what only the model has


def exact_next(scores, *, temperature=1.0, top_k=0, top_p=1.0, forbidden=UNWRITTEN):
    "The distribution to draw from, written out again without the library: temperature, then top-k, then top-p."
    p = scores.double().clone()
    p[list(forbidden)] = -torch.inf
    p = (p / temperature).softmax(-1)
    if top_k:
        p[p < p.sort().values[-top_k]] = 0
        p /= p.sum()
    if top_p < 1:
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("options",
                         [{}, {"temperature": 1.5, "top_p": 0.7}, {"temperature": 1.3, "top_k": 12},
                          {"top_k": 20, "top_p": 0.8}])
def test_drawn_tokens_follow_the_exact_distribution(options, share):
    """First and second token of 6,000 completions of one prompt; the second one's exact distribution is a mixture over
    the first."""
    model, tokenizer, count = tiny_model(), tiny_tokenizer(), 6000
    ids = tokenizer("the fox")["input_ids"]
    with torch.no_grad():
        # one token at least
        first = exact_next(model(torch.tensor([ids])).logits[0, -1], **options, forbidden=(*UNWRITTEN, 2))
        following = model(torch.tensor([[*ids, t] for t in range(64)])).logits[:, -1]
    # the end, where it is drawn first, is forbidden; after it nothing follows
    second = sum(p * exact_next(scores, **options) for p, scores in zip(first, following))
    [drawn] = sampler(model, batch_size=count, share_prompt=share).sample(["the fox"], count,
                                                                          SamplingSettings(max_new_tokens=2, **options),
                                                                          11)
    place = {c: i for i, c in enumerate(WORDS, 3)}
    for position, exact in enumerate((first, second)):
        seen = Counter(place[c.text[position]] if len(c.text) > position else 2 for c in drawn)
        assert all(exact[t] > 0 for t in seen), "a token of probability zero was drawn"
        common = [t for t in range(64) if exact[t] * count >= 5]
        observed, expected = [seen[t] for t in common], [exact[t].item() * count for t in common]
        if (rest := count - sum(expected)) > 5:
            observed, expected = [*observed, count - sum(observed)], [*expected, rest]
        assert len(observed) >= 5
        total = sum(expected)
        assert stats.chisquare(observed, [e * sum(observed) / total for e in expected]).pvalue > 1e-3


def test_the_random_numbers_are_uniform_and_unrelated():
    numbers = sampling.uniform_numbers(3, [[i] for i in range(200)], [[0, 1]] * 200, 25)
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    for a, b in ((numbers[0::2], numbers[1::2]), (numbers[:-2], numbers[2:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(stats.pearsonr(a.flatten(), b.flatten()).statistic) < 4 / a.numel() ** 0.5


def test_other_candidates_do_not_matter():
    "Neither M, nor the batch, nor the order changes a candidate; a prompt that comes twice goes on counting."
    model, settings = tiny_model(), SamplingSettings(max_new_tokens=8)
    four = sampler(model).sample(["abc", "xyz"], 4, settings, 5)
    assert [row[:2] for row in four] == sampler(model).sample(["abc", "xyz"], 2, settings, 5)
    assert four == [sampler(model, batch_size=1).sample([p], 4, settings, 5)[0] for p in ("abc", "xyz")]
    assert four[::-1] == sampler(model, batch_size=4).sample(["xyz", "abc"], 4, settings, 5)
    twice = sampler(model).sample(["abc", "xyz", "abc"], 2, settings, 5)
    assert twice[0] + twice[2] == four[0]
    assert four != sampler(model).sample(["abc", "xyz"], 4, settings, 6)


def test_the_callers_random_numbers_are_left_alone():
    model = tiny_model()
    state = torch.random.get_rng_state()
    sampler(model).sample(["abc"], 2, SamplingSettings(max_new_tokens=2), 0)
    assert torch.equal(state, torch.random.get_rng_state())


# --- rows that end -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_rows(model):
    "How many rows went through the model, call by call."
    rows = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])),
                                             with_kwargs=True)
    yield rows
    handle.remove()


def test_rows_that_have_ended_leave_the_batch_and_change_nobody_else():
    model = eager_to_end(tiny_model(), 4.0)
    local, settings = sampler(model), SamplingSettings(max_new_tokens=30)
    local.sample(["a"], 1, settings, 0)  # the check is behind us
    prompts = [f"prompt {c}" for c in "abcdefgh"]
    with counted_rows(model) as rows:
        together = local.sample(prompts, 4, settings, 0)
    alone = [[sampler(model, share_prompt=True).sample([p], 4, settings, 0)[0][j] for j in range(4)] for p in prompts]
    single = [sampler(model, share_prompt=False, batch_size=1).sample([p], 4, settings, 0)[0] for p in prompts]
    assert together == alone == single
    assert rows[0] == 8 and rows[1] == 32 and rows == [rows[0],
                                                       *sorted(rows[1:], reverse=True)] and len(set(rows[1:])) > 3
    lengths = [len(c.text) + (c.finish_reason == "stop") for row in together for c in row]
    assert len({c.finish_reason for row in together for c in row}) == 2 or max(lengths) < 30
    assert sum(rows[1:]) < 0.7 * 32 * max(lengths)


def test_a_stop_string_ends_a_row_at_once():
    model, settings = tiny_model(), SamplingSettings(max_new_tokens=40)
    local = sampler(model)
    local.sample(["a"], 1, settings, 0)  # the check is behind us
    with counted_rows(model) as without:
        whole = local.sample(PROMPTS, 4, settings, 2)
    letters = Counter("".join(c.text for row in whole for c in row))
    stop = (whole[0][0].text[5:7], letters.most_common(1)[0][0])
    with counted_rows(model) as rows:
        stopped = local.sample(PROMPTS, 4, SamplingSettings(max_new_tokens=40, stop=stop), 2)
    for before, after in zip(sum(whole, []), sum(stopped, [])):
        cut, found = sampling._cut_at_stop(before.text, stop)
        assert after == Completion(cut, "stop_string" if found else before.finish_reason)
    assert stopped[0][0].finish_reason == "stop_string"
    assert sum(rows) < 0.6 * sum(without)


def test_several_end_tokens_all_end_a_row():
    model = tiny_model()
    model.generation_config.eos_token_id = [2, *range(10, 30)]
    for row in sampler(model).sample(PROMPTS, 4, SamplingSettings(max_new_tokens=30), 0):
        for c in row:
            assert c.text and not set(c.text) & set(WORDS[7:27]) and c.finish_reason in ("stop", "length")


def test_a_policy_of_nan_is_one_clear_error():
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(LireError, match="no probabilities.*float32"):
        sampler(model, share_prompt=True).sample(["abc"], 2, SamplingSettings(max_new_tokens=2), 0)


# --- requests ------------------------------------------------------------------------------------------------------


def test_requests_in_flight_are_bounded_and_all_answered(tmp_path):
    running, most, guard = 0, 0, threading.Lock()

    def ask(n):
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with guard:
            running -= 1
        return n * n

    answers = run_requests({str(n): n for n in range(100)}, ask, journal=tmp_path / "j.jsonl", max_in_flight=7,
                           progress=False)
    assert answers == {str(n): n * n for n in range(100)} and list(answers) == [str(n) for n in range(100)]
    assert most == 7 and len((tmp_path / "j.jsonl").read_text().splitlines()) == 100


def test_an_error_stops_the_run_and_keeps_what_was_answered(tmp_path):
    asked = []

    def ask(n):
        asked.append(n)
        if n == 20:
            raise LireError("refused")
        return n

    requests = {str(n): n for n in range(400)}
    with pytest.raises(LireError, match="refused"):
        run_requests(requests, lambda n: time.sleep(0.01) or ask(n), journal=tmp_path / "j.jsonl", max_in_flight=4,
                     progress=False)
    kept = (tmp_path / "j.jsonl").read_text().splitlines()
    assert len(kept) == len(asked) - 1 < 60
    asked.clear()
    run_requests(requests, lambda n: asked.append(n), journal=tmp_path / "j.jsonl", progress=False)
    assert len(asked) == 400 - len(kept) and 20 in asked


def test_patience_ends_and_says_so(caplog):
    calls = []

    def ask(request):
        calls.append(request)
        raise TryLater("nobody there")

    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="lire_nb"), pytest.raises(LireError,
                                                                           match="gave up: nobody there.*same command "
                                                                                 "again"):
        run_requests({"a": 1, "b": 2}, ask, patience=0.5, first_wait=0.05, progress=False)
    assert 0.1 < time.monotonic() - began < 3 and 4 <= len(calls) <= 30
    assert sum("trying again" in r.getMessage() for r in caplog.records) == 1  # once an outage, not once a request


def test_a_journal_with_a_foreign_line_and_a_busy_journal(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"key": "a", "answer": 1}\nhello\n')
    with pytest.raises(LireError, match=r"j.jsonl:2: not a line of a journal; got .*remove this line"):
        servers.Journal(tmp_path / "j.jsonl")
    with servers.Journal(tmp_path / "k.jsonl"), pytest.raises(LireError,
                                                              match="k.jsonl: journal: in use by another process"):
        servers.Journal(tmp_path / "k.jsonl")


@pytest.mark.parametrize("torn", ['{"key": "b", "ans', '{"key": "b", "answer": 2}', "\u00e9"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"key": "a", "answer": 1}\n' + torn.encode()[:-1])
    assert run_requests({"a": 0, "b": 0}, lambda _: 3, journal=path, progress=False) == {"a": 1, "b": 3}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"key": "a", "answer": 1},
                                                                            {"key": "b", "answer": 3}]


# --- servers -------------------------------------------------------------------------------------------------------


class Pretend:
    "A tiny server on loopback: `reply(path, body)` gives (status, value or text)."

    def __init__(self, reply, models=("tiny",), owner=None, paths=()):
        self.received, outer = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                known = {"/v1/models": {"data": [{"id": m, "owned_by": owner} for m in models]},
                         "/openapi.json": {"paths": dict.fromkeys(paths, {})}}
                self.send(200 if self.path in known else 404, known.get(self.path, {}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received.append((self.path, body, self.headers))
                self.send(*reply(self.path, body))

            def send(self, status, value, headers=()):
                data = (value if isinstance(value, str) else json.dumps(value)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for header in headers:
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


def completed(text, finish="stop", chat=False):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": finish}
                             if chat else {"text": text, "finish_reason": finish}]}


FAST = dict(progress=False, patience=1.0, max_retries=1)


def test_text_is_completed_and_messages_are_chatted():
    pytest.importorskip("openai")
    messages = [{"role": "user", "content": "Hi"}]
    with Pretend(lambda path, body: completed(" yes\n\nHuman: no", chat="chat" in path)) as server:
        lists = sample_lists(server.url, ["Say", messages], 2, settings=SamplingSettings(stop=("\n\nHuman:",), top_k=5),
                             batch_size=64, **FAST)
        assert [r["completions"] for r in lists] == [[" yes"]
                                                     * 2] * 2 and lists[0]["meta"]["finish_reasons"] == ["stop_string"] * 2
        paths = Counter(path for path, *_ in server.received)
        assert paths == {"/v1/completions": 2, "/v1/chat/completions": 2}
        bodies = [body for _, body, _ in server.received]
        assert all(b["model"] == "tiny" and b["stop"] == ["\n\nHuman:"] and b["top_k"] == 5 and b["max_tokens"] == 32
                   for b in bodies)
        assert len({b["seed"] for b in bodies}) == 4
        server.received.clear()
        ServerSampler(server.url, api="chat", **FAST).sample(["Say"], 1, SamplingSettings(), 0)
        ServerSampler(server.url, api="completions", extra_body={"seed": None, "min_p": 0.1},
                      **FAST).sample([messages], 1, SamplingSettings(), 0)
        (chat, chat_body, _), (plain, plain_body, _) = server.received
        assert (
            chat.endswith("/chat/completions")
            and chat_body["messages"] == [{"role": "user", "content": "Say"}]
            and chat_body["top_k"] == 0 and chat_body["min_p"] == 0  # off, and said so: some servers cut by themselves
        )
        assert plain_body["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
        assert plain_body["min_p"] == 0.1 and "seed" not in plain_body


def test_servers_that_need_other_fields_are_recognized():
    pytest.importorskip("openai")
    with Pretend(lambda path, body: completed("x"), owner="vllm") as server:
        ServerSampler(server.url, **FAST).sample(["Say"], 1, SamplingSettings(), 0)
        assert server.received[0][1]["top_k"] == -1 and server.received[0][1]["repetition_penalty"] == 1.0
    with Pretend(lambda path, body: completed("x"), paths=["/load_model"]) as server:
        ServerSampler(server.url, "m", **FAST).sample(["Say"], 1, SamplingSettings(top_k=3), 0)
        body = server.received[0][1]
        said = json.loads(body["generation_config"])
        assert "top_k" not in body and said["top_k"] == 3 and said["do_sample"]


def test_a_server_that_cuts_by_itself_is_told_not_to_and_one_that_knows_no_cut_is_asked_without():
    pytest.importorskip("openai")
    with Pretend(lambda path, body: completed("x"), owner="llamacpp") as server:
        ServerSampler(server.url, **FAST).sample(["Say"], 1, SamplingSettings(), 0)
        body = server.received[0][1]
        assert (body["top_k"], body["min_p"], body["repeat_penalty"]) == (0, 0, 1)

    def strict(path, body):
        return (400, '{"error": "unknown field"}') if {"top_k", "min_p"} & body.keys() else completed("x")

    with Pretend(strict) as server:
        [[a, b]] = ServerSampler(server.url, max_in_flight=1, **FAST).sample(["Say"], 2, SamplingSettings(), 0)
        assert a.text == b.text == "x" and len(server.received) == 3  # refused once, not once a request
        said(lambda: ServerSampler(server.url, **FAST).sample(["Say"], 1, SamplingSettings(top_k=5), 0), "400",
             "unknown field")


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-mine")
    with Pretend(lambda path, body: completed("x")) as server:
        sample_lists(server.url, ["Say"], 2, journal=tmp_path / "j.jsonl", **FAST)
        assert server.received[0][2]["Authorization"] == "Bearer secret-of-mine"
    assert "secret" not in (tmp_path / "j.jsonl").read_text()


def test_a_full_server_is_waited_for():
    pytest.importorskip("openai")
    answers = iter([(429, {}), (503, {}), (500, {}), completed("x")])
    with Pretend(lambda path, body: next(answers)) as server:
        [[c]] = ServerSampler(server.url, progress=False, patience=30,
                              max_retries=1).sample(["Say"], 1, SamplingSettings(), 0)
        assert c == Completion("x", "stop") and len(server.received) == 4


def said(call, *words):
    with pytest.raises(LireError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and "remedy: " in text
    for word in words:
        assert word in text, text
    return text


def test_what_a_user_can_get_wrong_is_one_line(tmp_path):
    pytest.importorskip("openai")
    port, began = free_port(), time.monotonic()
    said(lambda: sample_lists(f"http://127.0.0.1:{port}/v1#m", ["Say"]), str(port), "does not answer", "start it")
    assert time.monotonic() - began < 10  # said at once, not after five minutes of patience
    for reply, words in {
        (404, '{"error": "The model `m` does not exist"}'): ("404", "does not exist", "name the model"),
        (401, '{"error": "bad key"}'): ("401", "bad key", "OPENAI_API_KEY"),
        (500, "boom"): ("gave up", "500", "boom"),
        (200, "<html>hello</html>"): ("not a completion", "<html>hello</html>", "/v1"),
        (200, '{"choices": []}'): ("not a completion", "choices"),
        (200, '{"choices": [{"text": 5, "finish_reason": "stop"}]}'): ("not a completion",),
        (200, '{"choices": [{"text": "x", "finish_reason": "content_filter"}]}'): ("not a completion",
                                                                                   "content_filter"),
    }.items():
        with Pretend(lambda path, body, reply=reply: reply) as server:
            said(lambda: sample_lists(f"{server.url}#m", ["Say"], 2, journal=tmp_path / "j.jsonl", **FAST), server.url,
                 *words)
        assert not (tmp_path / "j.jsonl").read_bytes()
    with Pretend(lambda path, body: completed("x"), models=("a", "b")) as server:
        said(lambda: sample_lists(server.url, ["Say"], **FAST), "which model?", "a, b", "#MODEL")
    said(lambda: ServerSampler("http://127.0.0.1:1/v1", api="chatty"), "chatty", "completions")


# --- a real server, killed -----------------------------------------------------------------------------------------

CLIENT = """
import sys
from lire_nb.sampling import SamplingSettings, sample_lists
sample_lists(sys.argv[1], sys.argv[3:], 4, settings=SamplingSettings(max_new_tokens=4), journal=sys.argv[2],
             max_in_flight=16, progress=False)
"""


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path, count, alive):
    end = time.monotonic() + 120
    while lines(path) < count:
        assert alive() and time.monotonic() < end, f"{lines(path)} of {count} answers"
        time.sleep(0.02)


def few_layers(folder: Path) -> Path:
    "SmolLM2 without all but its first four layers: its tokenizer, its template, a quick answer."
    from lire_nb.models import load_policy

    model, tokenizer = load_policy("smollm2", device="cpu")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:4], 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_200_candidates_survive_a_killed_client_and_a_killed_server(tmp_path, monkeypatch):
    need_server()
    from lire_nb.models import load_policy

    folder, journal = few_layers(tmp_path / "few-layers"), tmp_path / "answers.jsonl"
    prompts = [f"Film number {n} is about" for n in range(50)]
    asked, ask = Counter(), ServerSampler._ask
    with Serve(folder, threads=1, log=tmp_path / "server.log") as server:
        address = f"{server.url}#{server.model}"
        (tmp_path / "client.py").write_text(CLIENT)
        with warm.start(tmp_path / "client.py", address, journal, *prompts, cwd=tmp_path,
                        env={**os.environ, "HF_HUB_OFFLINE": "1"}) as client:
            wait_for(journal, 40, lambda: client.poll() is None)
            client.send_signal(signal.SIGKILL)
        first = [json.loads(line)["key"] for line in journal.read_text().splitlines()]  # a line is written in one piece
        assert 40 <= len(first) < 200

        def counted(self, path, body):
            answer = ask(self, path, body)
            asked[(body.get("prompt"), body["seed"])] += 1
            return answer

        monkeypatch.setattr(ServerSampler, "_ask", counted)

        def crash():
            wait_for(journal, 110, lambda: True)
            server.kill()
            time.sleep(1)
            server.start(wait=False)

        saboteur = threading.Thread(target=crash)
        saboteur.start()
        settings = SamplingSettings(max_new_tokens=4)
        lists = sample_lists(address, prompts, 4, settings=settings, journal=journal, max_in_flight=16, progress=False)
        saboteur.join()
        keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == 200 and set(first) <= set(keys)  # nothing lost, nothing twice
        assert len(asked) == sum(asked.values()) == 200 - len(first)  # what the killed client had is not asked again
        assert [len(r["completions"]) for r in lists] == [4] * 50 and [r["prompt"] for r in lists] == prompts
        assert {reason for r in lists for reason in r["meta"]["finish_reasons"]} <= {"stop", "length"}
        # it samples: the server's own default would be greedy, four times the same in all fifty; few tokens are so by chance
        assert sum(len(set(r["completions"])) == 1 for r in lists) < 5
        asked.clear()
        again = sample_lists(address, prompts, 4, settings=settings, journal=journal, progress=False)
        assert not asked and again[:] == lists[:]
        said(lambda: sample_lists(f"{server.url}#no-such-model", prompts[:1], 1, **FAST), "no-such-model",
             "name the model")
        # greedily, the server writes what the same model writes here; the chat API applies the model's template
        greedy, messages = SamplingSettings(max_new_tokens=6, temperature=0), [{"role": "user", "content": "Say yes."}]
        there, here = (sample_lists(policy, [prompts[0], messages], 1, settings=greedy, progress=False)
                       for policy in (address, load_policy(folder, device="cpu")))
        assert there["completions"][0] == here["completions"][0]
        assert there["completions"][1][0].strip() == here["completions"][1][0].strip()

"""Faults of text and tokens: one fact with two homes. The numbers are those of the list of faults."""
import copy
import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tokenizer_kinds import CHATML, FORGETS, GEMMA, KINDS, PHI, _bytes, _fast, _framed  # noqa: E402

from lire_nb import layouts  # noqa: E402
from lire_nb.base.errors import LireError  # noqa: E402
from lire_nb.conversations import end_token, list_table, render_prompt, tokenizer_fingerprint  # noqa: E402
from lire_nb.lab.trl_online import encode_prompts  # noqa: E402
from lire_nb.lists import load_lists, to_rrhf  # noqa: E402
from lire_nb.models import in_float32, load_tokenizer  # noqa: E402
from lire_nb.records import make_record  # noqa: E402
from lire_nb.rewards import RewardModel, ScalarHeadModel, score_lists, train_reward_model  # noqa: E402
from lire_nb.sampling import _completion, LocalSampler, SamplingSettings  # noqa: E402
from lire_nb.shared_prompt import ListCollator, padded_rows, tokenize_list  # noqa: E402


def U(text):
    return {"role": "user", "content": text}


def A(text):
    return {"role": "assistant", "content": text}


def S(text):
    return {"role": "system", "content": text}


def judge(tokenizer, cls=RewardModel, **options):
    return cls(SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer)), device="cpu"), tokenizer, **options)


def judged(tokenizer, prompt, completion, **options):
    batch = judge(tokenizer, **options).encode([prompt], [completion])
    return batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()


def trained(tokenizer, prompt, completion="Yes.", **limits):
    return tokenize_list(make_record(prompt, [completion], [1.0]), tokenizer, **limits)


# 1: the end token


@pytest.mark.parametrize("kind, end",
                         [("gemma", "<end_of_turn>"), ("bytes_chatml", "<|im_end|>"), ("phi_left", "<|end|>"),
                          ("metaspace_llama2", "</s>")])
def test_01_an_answer_ends_as_the_template_ends_it(kind, end):
    tokenizer = KINDS[kind]()
    for prompt in ([U("Hello")], [U("a"), A("b"), U("c")], [U("Hello"), A("Well, ")]):
        assert tokenizer.convert_ids_to_tokens(trained(tokenizer, prompt, "Good.")["completion_ids"][0][-1]) == end


def test_01_an_answer_to_plain_text_ends_with_the_end_of_text():
    tokenizer = KINDS["gemma"]()
    assert trained(tokenizer, "Hello", " Good.")["completion_ids"][0][-1] == tokenizer.eos_token_id
    cut = make_record([U("Hello")], ["Good."], [1.0], meta={"finish_reasons": ["length"]})
    assert tokenizer.decode(tokenize_list(cut, tokenizer)["completion_ids"][0]) == "Good."


def test_01_drawn_tokens_are_read_as_they_were_drawn():
    C = importlib.import_module("lire_nb.conversations")
    tokenizer = KINDS["bytes_chatml"]()
    # not as the tokenizer would write it, and another end
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "Yes."] + [tokenizer.eos_token_id]
    meta = {"token_ids": [letters, None, letters], "finish_reasons": ["stop"] * 3,
            "tokenizer": C.tokenizer_fingerprint(tokenizer)}
    record = make_record([U("hi")], ["Yes.", "No.", "edited"], [1, 0, 0], meta=meta)
    tokens = tokenize_list(record, tokenizer)
    assert tokens["completion_ids"][0] == letters and tokens["retokenized"] == 1
    other = tokenize_list(record | {"meta": meta | {"tokenizer": "0" * 16}}, tokenizer)
    assert other["completion_ids"][0] != letters and tokenizer.decode(other["completion_ids"][0]) == "Yes.<|im_end|>"
    assert other["retokenized"] == 2


# 2: the start token


@pytest.mark.parametrize("prompt", ["Once upon", [U("hi")], [S("Be brief."), U("hi")], [U("hi"), A("Well")]])
def test_02_a_model_without_template_gets_its_start_token(prompt):
    tokenizer = KINDS["bytes_bos"]()
    for ids in (trained(tokenizer, prompt)["prompt_ids"], LocalSampler(None, tokenizer)._encode([prompt])[0],
                judged(tokenizer, prompt, "Yes.")):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_02_a_rendered_text_gets_no_second_start_token():
    for kind in ("bytes_bos", "metaspace_llama2"):
        tokenizer = KINDS[kind]()
        for ids in (trained(tokenizer, "<s>[INST] q [/INST]")["prompt_ids"],
                    LocalSampler(None, tokenizer)._encode(["<s>[INST] q [/INST]"])[0]):
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_02_a_long_prompt_keeps_its_start_token():
    tokenizer = KINDS["bytes_bos"]()
    for prompt in ("a b " * 50, [U("a b " * 50)], [S("Be brief."), U("a b " * 50)]):
        ids = trained(tokenizer, prompt, max_prompt_length=40)["prompt_ids"]
        assert (
            ids == LocalSampler(None, tokenizer, max_prompt_length=40)._encode([prompt])[0]
            and len(ids) <= 40
            and ids[0] == tokenizer.bos_token_id
        )


# 3: the boundary


@pytest.mark.parametrize("text",
                         ["\n\nHuman: hi\n\nAssistant: Yes.", "\n\nHuman: hi\n\nAssistant:\nYes.",
                          "\n\nHuman:  hi \n\nAssistant: No.\n\nHuman: why?\n\nAssistant: \n Yes."])
@pytest.mark.parametrize("kind", ["letters", "bytes_bos"])
def test_03_a_transcript_is_trained_as_it_stands_in_the_file(kind, text):
    tokenizer = KINDS[kind]()
    (record,) = load_lists([{"chosen": text, "rejected": text + " no"}])
    tokens = tokenize_list(record, tokenizer)
    for ids, whole in zip(tokens["completion_ids"], (text, text + " no")):
        assert tokenizer.decode(tokens["prompt_ids"]
                                + ids).removeprefix("<s>").removesuffix(tokenizer.eos_token) == whole


@pytest.mark.parametrize("row, whole", [
    ({"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
     "\n\nHuman: hi\n\nAssistant: Yes."),
    ({"query": "\n\nHuman: hi\n\nAssistant:", "responses": [" Yes."], "scores": [1]},
     "\n\nHuman: hi\n\nAssistant: Yes."),
    ({"info": {"post": "A cat came back.", "id": "t"}, "summaries": [{"text": " Cat back."}, {"text": " Dog."}],
      "choice": 0}, "A cat came back. Cat back."),
    ({"prompt": "2+2=", "completions": ["4"]}, "2+2=4"), ({"prompt": "2+2=", "completions": [" 4"]}, "2+2= 4")])
def test_03_every_layout_is_trained_as_it_stands_in_the_file(row, whole):
    tokenizer = KINDS["letters"]()
    tokens = tokenize_list(load_lists([row])[0], tokenizer)
    assert tokenizer.decode(tokens["prompt_ids"] + tokens["completion_ids"][0][:-1]) == whole


def test_03_rrhf_is_written_with_the_space(tmp_path):
    import json

    lists = [make_record([U("hi")], ["Yes.", "\nNo.", " two", ""], [1, 0, 0, None]), make_record("hi", ["Yes."]),
             make_record([U("q"), A("Sure")], [", it is"])]
    rows = [json.loads(line) for line in to_rrhf(lists, tmp_path / "x.jsonl").read_text().splitlines()]
    assert rows[0]["query"] + rows[0]["responses"][0] == "\n\nHuman: hi\n\nAssistant: Yes."
    assert rows[0]["responses"][1] == "\nNo."
    assert rows[1]["query"] + rows[1]["responses"][0] == "hiYes."
    assert rows[2]["query"] + rows[2]["responses"][0] == "\n\nHuman: q\n\nAssistant: Sure, it is"
    assert list(load_lists(tmp_path / "x.jsonl")) == lists


# 4: a begun answer


@pytest.mark.parametrize("kind", ["bytes_chatml", "gemma", "phi_left", "metaspace_llama2", "letters"])
@pytest.mark.parametrize("begun", ["Sure, it is", "Sure, it is ", "1.\n", " {"])
def test_04_a_begun_answer_is_continued(kind, begun):
    tokenizer = KINDS[kind]()
    prompt = [U("q"), A(begun)]
    text = render_prompt(prompt, tokenizer)
    assert text.endswith(begun) and text.count("ssistant") + text.count("model") <= 1
    ids = LocalSampler(None, tokenizer)._encode([prompt])[0]
    assert ids == trained(tokenizer, prompt)["prompt_ids"] and tokenizer.decode(ids).endswith(begun)
    if tokenizer.chat_template:
        assert judged(tokenizer, prompt, "so") == tokenizer.apply_chat_template([U("q"), A(begun + "so")])["input_ids"]


# 5: reward models read what policies read


@pytest.mark.parametrize("kind", ["bytes_chatml", "gemma", "phi_left", "metaspace_llama2"])
def test_05_a_reward_model_reads_the_whole_conversation(kind):
    tokenizer = KINDS[kind]()
    for prompt in ([U("hi")], [U("hi"), A("yes?"), U("no")]):
        whole = tokenizer.apply_chat_template([*prompt, A("Yes.")])["input_ids"]
        assert judged(tokenizer, prompt, "Yes.") == whole == judged(tokenizer, prompt, "Yes.", cls=ScalarHeadModel)


@pytest.mark.parametrize("kind", ["bytes_bos", "bytes_bos_eos", "unigram_eos", "letters"])
def test_05_without_template_it_reads_the_policys_text(kind):
    tokenizer = KINDS[kind]()
    for prompt, completion, whole in (("2 two", " three", "2 two three"), ("2 two", "three", "2 twothree"),
                                      ([U("hi")], "Yes.", "\n\nHuman: hi\n\nAssistant: Yes.")):
        assert judged(tokenizer, prompt, completion) == tokenizer(whole)["input_ids"]


def test_05_too_long_a_conversation_keeps_its_head():
    for kind in ("gemma", "bytes_bos", "bytes_bos_eos"):
        tokenizer = KINDS[kind]()
        for prompt in ([U("a b " * 50)], [U("a b " * 50), A("yes"), U("c")], "a b " * 50):
            ids, start = judged(tokenizer, prompt, "Yes.", max_length=50), tokenizer.bos_token_id
            assert len(ids) <= 50 and ids[0] == start and "Yes." in tokenizer.decode(ids)
            assert "c" not in str(prompt) or len(prompt) < 3 or "yes" in tokenizer.decode(ids)


def test_05_a_pad_beyond_the_vocabulary_is_not_looked_up():
    tokenizer = KINDS["phi_left"]()
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=tokenizer.pad_token_id), device="cpu")
    batch = RewardModel(model, tokenizer).encode([[U("hi")], [U("hi, how are you?")]], ["Yes."] * 2)
    assert batch["input_ids"].max() < tokenizer.pad_token_id
    assert not batch["attention_mask"][0, -1]  # padded on the right
    one, two = (tokenize_list(make_record([U(text)], ["Yes."], [1.0]), tokenizer)
                for text in ("hi", "hi, how are you?"))
    rows = padded_rows(ListCollator(tokenizer.pad_token_id)([one, two]))
    assert rows["input_ids"].max() < tokenizer.pad_token_id


CLOSING = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
           "{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.mark.parametrize("kind", ["bytes_bos", "bytes_bos_eos"])
@pytest.mark.parametrize("own", ["none", "eos", "another", "beyond"])
@in_float32()  # the oracle is, also where bfloat16 is fast
def test_05_a_decoder_reads_the_token_that_it_reads_for_one_row(kind, own, tmp_path):
    """The model of transformers, asked about one text at a time, is the oracle: what fills a batch is no matter of it."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    tokenizer = copy.deepcopy(KINDS[kind]())
    tokenizer.chat_template, tokenizer.pad_token = CLOSING, None
    pad = {"none": None, "eos": tokenizer.eos_token_id, "another": 7, "beyond": -1}[own]
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, num_labels=1,
        pad_token_id=None, initializer_range=0.5)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    reward, bare = RewardModel.load(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path)
    texts = ["Yes.", "No, it is a town.", "Sure"]
    for prompt in ([U("hi")], "The "):
        rows = [tokenizer.apply_chat_template([*prompt, A(t)], tokenize=True, return_dict=False)
                if isinstance(prompt, list) else tokenizer(prompt + t)["input_ids"] for t in texts]
        with torch.no_grad():
            expected = [bare(torch.tensor([row])).logits.item() for row in rows]
        assert reward([prompt] * 3, texts) == pytest.approx(expected, abs=1e-5)
    assert reward.model.config.pad_token_id == bare.config.pad_token_id  # it is saved as it came


def test_05_what_a_reward_model_cuts_is_said_and_what_it_cannot_read_is_refused(tmp_path, caplog):
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    tokenizer = KINDS["bytes_bos"]()
    for labels in (1, 2):
        AutoModelForSequenceClassification.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=300, num_labels=labels)).save_pretrained(tmp_path / str(labels))
        tokenizer.save_pretrained(tmp_path / str(labels))
    reward = RewardModel.load(tmp_path / "1")
    assert reward.max_length == 300  # its context, not a number of ours
    lists = [make_record(f"{n}", ["a " * 10, "b " * 400], [1.0, 0.0], id=str(n)) for n in range(3)]
    with caplog.at_level(logging.WARNING):
        score_lists(lists, reward)
        score_lists(lists, reward)
    said = [r.getMessage() for r in caplog.records if "max_length" in r.getMessage()]
    assert len(said) == 1 and "3 of 6 texts" in said[0]
    with pytest.raises(LireError, match="up to 300 tokens"):
        RewardModel.load(tmp_path / "1", max_length=301)
    with caplog.at_level(logging.WARNING):
        reward = train_reward_model(lists, tmp_path / "1", max_length=1000, progress=False)
    assert reward.max_length == 300 and "cannot read 1000 tokens" in caplog.text
    with pytest.raises(LireError, match="2 labels"):
        RewardModel.load(tmp_path / "2")


# a header between the opened turn and a written answer

THINKS = ("{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% if loop.last %}<think>\n\n"
          "</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% else %}"
          "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHANNEL = ("{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant[final]{{ m['content'] }}<|im_end|>\n"
           "{% else %}<|im_start|>{{ m['role'] }}[message]{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize("template", [THINKS, CHANNEL])
def test_03_a_written_answer_has_the_header_of_the_template(template):
    tokenizer = copy.deepcopy(KINDS["bytes_chatml"]())
    tokenizer.chat_template = template
    prompt = [U("2+2?")]
    whole = tokenizer.apply_chat_template([*prompt, A("Four.")], tokenize=False)
    row = trained(tokenizer, prompt, "Four.")
    text = tokenizer.decode(row["prompt_ids"] + row["completion_ids"][0])
    assert whole.startswith(text) and whole.removeprefix(text).isspace()
    assert tokenizer.decode(judged(tokenizer, prompt, "Four.")) == whole


def test_03_an_answer_that_brings_its_thoughts_gets_no_second_header():
    tokenizer = copy.deepcopy(KINDS["bytes_chatml"]())
    tokenizer.chat_template = THINKS
    row = trained(tokenizer, [U("2+2?")], "<think>\nAdd.\n</think>\n\nFour.")
    assert tokenizer.decode(row["completion_ids"][0]) == "<think>\nAdd.\n</think>\n\nFour.<|im_end|>"


def test_03_a_question_that_opens_more_than_conversations_have_is_said_once(caplog):
    tokenizer = copy.deepcopy(KINDS["bytes_chatml"]())
    assert "<think>" in OPENS
    tokenizer.chat_template = OPENS
    with caplog.at_level(logging.WARNING):
        trained(tokenizer, [U("a")])
        trained(tokenizer, [U("b")])
    assert [("<think>" in r.getMessage()) for r in caplog.records] == [True]


# how it ended


@pytest.mark.parametrize("word, ends", [("stop", True), ("eos_token", True), ("end_turn", True), ("STOP", True), (None, True),
                                        ("length", False), ("MAX_TOKENS", False), ("stop_sequence", False)])
def test_09_engines_words_for_an_end(word, ends):
    tokenizer = KINDS["bytes_chatml"]()
    record = make_record([U("hi")], ["Yes."], [1.0], meta={"finish_reasons": [word]})
    row = tokenize_list(record, tokenizer)["completion_ids"][0]
    assert (row[-1] == end_token(record["prompt"], tokenizer)) == ends


def test_09_an_unknown_word_for_an_end_is_refused_at_every_door(tmp_path):
    for bad in (lambda: make_record("q", ["a"], meta={"finish_reasons": ["content_filter"]}),
                lambda: load_lists([{"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0],
                                     "finish_reasons": ["stop", "because"]}])):
        with pytest.raises(LireError, match="unknown ending"):
            bad()
    unchecked = {"id": "1", "prompt": "q", "completions": ["a"], "rewards": [1.0], "meta": {"finish_reasons": ["because"]}}
    with pytest.raises(LireError, match="unknown ending"):
        tokenize_list(unchecked, KINDS["bytes_bos"]())


def test_09_what_stop_strings_ended_ends_alike():
    """Whether the string began inside a token, where the drawn ids cannot be used, or at its edge."""
    tokenizer = KINDS["bytes_chatml"]()
    prompt, end = [U("hi")], end_token([U("hi")], tokenizer)
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "Yes"]
    settings = SamplingSettings(max_new_tokens=9, stop=("e",))
    found = [_completion(prompt, [(i, -1.0) for i in ids], tokenizer, settings, [end])
             for ids in (letters, [*letters[:1], end])]
    assert [c.finish_reason for c in found] == ["stop_string", "stop"]
    meta = {"finish_reasons": ["stop_string"] * 3, "token_ids": [letters[:1], None, None],
            "tokenizer": tokenizer_fingerprint(tokenizer)}
    rows = tokenize_list(make_record(prompt, ["Y", "Yet", ""], [1, 0, 0], meta=meta), tokenizer)["completion_ids"]
    assert rows[0] == letters[:1] and end not in rows[1] and rows[2] == [end]  # an empty answer says its end alone


# 6: two renderers


def test_06_what_is_measured_is_what_is_trained():
    tokenizer = KINDS["bytes_bos"]()
    for prompt in ([S("Be brief."), U("hi")], [U("hi"), A("Well")], "hi"):
        record = make_record(prompt, ["Yes.", "no"], [1, 0])
        table, tokens = list_table([record], tokenizer), tokenize_list(record, tokenizer)
        assert table["prompt_length"][0] == len(tokens["prompt_ids"])
        assert table["completion_lengths"][0] == [len(ids) for ids in tokens["completion_ids"]]


def test_06_a_system_turn_is_written_and_read_as_one():
    talk = [S("Be brief."), U("hi"), A("yes"), U("no")]
    text = "\n\nSystem: Be brief.\n\nHuman: hi\n\nAssistant: yes\n\nHuman: no"
    assert render_prompt(talk) == text + "\n\nAssistant:" and layouts.join_transcript(talk) == text
    assert layouts.parse_transcript(layouts.join_transcript(talk)) == talk


# 7: the prompt limit keeps the head


@pytest.mark.parametrize("template, header",
                         [(CHATML, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
                          (PHI, "<|system|>\nBe brief.<|end|>\n<|user|>\n")])
def test_07_a_cut_prompt_keeps_its_head(template, header):
    tokenizer = KINDS["bytes_chatml"]() if template == CHATML else KINDS["phi_left"]()
    prompt = [S("Be brief."), U("one two " * 60), A("three"), U("four?")]
    ids = trained(tokenizer, prompt, max_prompt_length=110)["prompt_ids"]
    text = tokenizer.decode(ids)
    assert 100 <= len(ids) <= 110 and text.startswith(header)
    assert text.endswith(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)[-60:])
    assert list(encode_prompts([{"id": "r", "prompt": prompt}], tokenizer,
                               110).values()) == [ids] == LocalSampler(None, tokenizer,
                                                                       max_prompt_length=110)._encode([prompt])


# 8: tokenizers that add an end of text


@pytest.mark.parametrize("kind", ["bytes_bos_eos", "unigram_eos"])
def test_08_an_added_end_is_no_part_of_a_prompt_nor_of_a_cut_answer(kind):
    tokenizer = KINDS[kind]()
    record = make_record("one two", [" three"] * 2, [1, 0], meta={"finish_reasons": ["length", "stop"]})
    tokens = tokenize_list(record, tokenizer)
    assert (
        LocalSampler(None, tokenizer)._encode(["one two"])
        == [tokens["prompt_ids"]]
        == list(encode_prompts([record], tokenizer).values())
    )
    assert tokenizer.eos_token_id not in tokens["prompt_ids"]
    assert [ids.count(tokenizer.eos_token_id) for ids in tokens["completion_ids"]] == [0, 1]


# 28: a template that refuses


@pytest.mark.parametrize("template", [GEMMA, FORGETS])
def test_28_a_template_that_refuses_names_the_list_everywhere(template):
    tokenizer = _fast(_framed(_bytes(), "<bos> $A", bos="<bos>", eos="<eos>"), template, bos_token="<bos>",
                      eos_token="<eos>", pad_token="<eos>")
    record = make_record([S("Be brief."), U("hi")], ["Yes."], [1.0], id="list-7")
    asked = []

    class Model(torch.nn.Module):
        config, device = SimpleNamespace(vocab_size=len(tokenizer)), torch.device("cpu")

        def forward(self, **inputs):
            asked.append(inputs)

    reward = RewardModel(Model(), tokenizer)
    fine = make_record([U("hi")], ["Yes."], [1.0])
    for work in (lambda: tokenize_list(record, tokenizer), lambda: encode_prompts([fine, record], tokenizer),
                 lambda: score_lists([fine, record], reward), lambda: list_table([record], tokenizer)):
        with pytest.raises(LireError) as caught:
            work()
        assert "'list-7'" in str(caught.value) and "system" in str(caught.value).lower()
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(LireError, match="chat template"):
        LocalSampler(None, tokenizer)._encode([record["prompt"]])
    assert not asked


# 29: what cannot be a prompt, a limit or a tokenizer


@pytest.mark.parametrize("limit", [100.5, "100", None, True, -1])
def test_29_a_limit_is_a_number_of_tokens(limit):
    tokenizer = KINDS["bytes_bos"]()
    for work in (lambda: trained(tokenizer, "a b c", max_prompt_length=limit),
                 lambda: LocalSampler(None, tokenizer, max_prompt_length=limit)._encode(["a b c"]),
                 lambda: encode_prompts([{"id": "r", "prompt": "a b c"}], tokenizer, limit)):
        with pytest.raises(LireError, match="max_prompt_length: not a number of tokens"):
            work()
    with pytest.raises(LireError, match="max_completion_length: not a number of tokens"):
        trained(tokenizer, "a b c", max_completion_length=limit)


@pytest.mark.parametrize("prompt",
                         [5, None, [], [5], [{"role": "human", "content": "hi"}], [{"role": "user"}],
                          [{"role": "user", "content": 5}]])
def test_29_what_is_no_prompt_is_refused_in_one_line(prompt):
    for tokenizer in (KINDS["bytes_bos"](), KINDS["bytes_chatml"]()):
        for work in (lambda: LocalSampler(None, tokenizer)._encode([prompt]),
                     lambda: encode_prompts([{"id": "r", "prompt": prompt}], tokenizer),  # noqa: B023
                     lambda: judged(tokenizer, prompt, "Yes."), lambda: render_prompt(prompt, tokenizer)):  # noqa: B023
            with pytest.raises(LireError, match="prompt") as caught:
                work()
            assert len(str(caught.value).splitlines()) == 1


def test_29_a_tokenizer_without_pad_and_end_is_refused_and_one_without_pad_is_not(tmp_path):
    _fast(_bytes()).save_pretrained(tmp_path / "none")
    (tmp_path / "none" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "none" / "model.safetensors").write_bytes(b"")
    with pytest.raises(LireError, match="no end-of-text token and no padding token.*eos_token"):
        load_tokenizer(tmp_path / "none")
    tokenizer = _fast(_bytes())
    with pytest.raises(LireError, match="no token ends an answer.*eos_token"):
        trained(tokenizer, "a")
    cut = [tokenize_list(make_record(p, [" b"], [1.0], meta={"finish_reasons": ["length"]}), tokenizer)
           for p in ("a", "a b c")]
    assert ListCollator(tokenizer.pad_token_id)(cut)["prompt_ids"].shape[0] == 2


# 37: text prompts and the chat template


def test_37_text_prompts_before_a_chat_template_are_said_once(caplog):
    C = importlib.import_module("lire_nb.conversations")
    records = [make_record("Why is the sky blue?", ["a"]), make_record("b", ["a"], meta={"chat": False}),
               make_record([U("hi")], ["a"]), make_record("<|im_start|>user\nhi", ["a"])]
    with caplog.at_level(logging.WARNING):
        assert C.warn_text_prompts(records, KINDS["bytes_chatml"]()) == 1
        assert len(caplog.records) == 1 and "1 of 4 prompts" in caplog.text and "chat=True" in caplog.text
        assert "chat=False" in caplog.text
        assert (
            C.warn_text_prompts(records[1:], KINDS["bytes_chatml"]())
            == 0
            == C.warn_text_prompts(records, KINDS["letters"]())
            and len(caplog.records) == 1
        )


def test_37_a_task_states_whether_its_prompts_are_plain_text(tmp_path):
    from lire_nb.lists import save_lists
    from lire_nb.tasks import load_task

    path = save_lists([make_record(f"A post about cat {i}.", ["A cat."], [1.0]) for i in range(9)],
                      tmp_path / "posts.jsonl")
    for chat, said in ((False, " A cat."), (True, "A cat.")):
        task = load_task("summarization", path=path, chat=chat)
        records = [r for lists in task.reward_lists.values() for r in lists]
        # after "TL;DR:" stands a space, in a turn of its own none
        assert {c for r in records for c in r["completions"]} == {said}
        assert all(r["meta"].get("chat") is (None if chat else False) for r in records)


# 38: what an attacker found afterwards


def ending_in_a_dash(tmp_path):
    """A random policy that may end at an ordinary letter, and another one to compare with."""
    import tiny_policy

    from lire_nb.models import load_policy

    pairs = [load_policy(str(tiny_policy.make_start(tmp_path / f"p{seed}", 0.0, seed)), device="cpu")
             for seed in (0, 1)]
    for model, _ in pairs:
        model.generation_config.eos_token_id = [0, pairs[0][1].convert_tokens_to_ids("-")]
        model.float().eval()
    return pairs


@pytest.mark.parametrize("kind, end", [("letters", "-"), ("bytes_chatml", "Ċ"), ("bytes_bos", ".")])
@pytest.mark.parametrize("prompt", ["hi", [U("hi")]])
def test_38_an_end_that_is_an_ordinary_token_is_trained_as_drawn(kind, end, prompt):
    C = importlib.import_module("lire_nb.conversations")
    tokenizer = KINDS[kind]()
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("n", "o", end)]
    meta = {"token_ids": [ids, ids, ids, ids[-1:]], "tokenizer": C.tokenizer_fingerprint(tokenizer),
            "finish_reasons": ["stop", "stop", "length", "stop"]}
    tokens = tokenize_list(make_record(prompt, ["no", "edited", "no", ""], [1, 0, 0, 0], meta=meta), tokenizer)
    assert tokens["completion_ids"][0] == ids and tokens["completion_ids"][3] == ids[-1:] and tokens["retokenized"] == 2
    assert ids not in tokens["completion_ids"][1:3]


def test_38_the_kl_is_measured_on_the_tokens_that_were_drawn(tmp_path):
    import math

    from lire_nb.logprobs import sampled_logps
    from lire_nb.sampling import SamplingSettings, sample_lists

    policy, start = ending_in_a_dash(tmp_path)
    with torch.no_grad():
        policy[0].get_output_embeddings().weight[14] *= 20  # "-" is drawn now and then
    prompts = [{"id": str(i), "prompt": f"q{i}"} for i in range(6)]
    lists = list(sample_lists(policy, prompts, 4, settings=SamplingSettings(max_new_tokens=24), seed=0, progress=False))
    dash = policy[1].convert_tokens_to_ids("-")
    assert sum(ids[-1] == dash for r in lists for ids in r["meta"]["token_ids"]) >= 3

    def alone(pair, prompt, ids):
        before = pair[1](prompt, add_special_tokens=False)["input_ids"]
        logps = pair[0](torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return logps[range(len(ids)), ids].sum().item()

    for record, found in zip(lists, sampled_logps(policy, start, lists)):
        for j, ids in enumerate(record["meta"]["token_ids"]):
            assert found["tokens"][j] == found["start_tokens"][j] == len(ids)
            assert math.isclose(found["logps"][j], alone(policy, record["prompt"], ids), abs_tol=1e-3)
            assert math.isclose(found["start_logps"][j], alone(start, record["prompt"], ids), abs_tol=1e-3)


def test_38_texts_that_were_tokenized_again_are_compared_on_the_same_tokens(tmp_path):
    from copy import deepcopy

    from lire_nb.conversations import tokenizer_fingerprint
    from lire_nb.logprobs import sampled_logps

    policy, start = ending_in_a_dash(tmp_path)
    meta = {"token_ids": [policy[1]("abcdef")["input_ids"] + [0], None], "logps": [-12.5, None],
            "finish_reasons": ["stop", "stop"], "tokenizer": tokenizer_fingerprint(policy[1])}
    edited = make_record([U("q")], ["abc", "de"], id="edited", meta=meta)
    other = deepcopy(start[1])  # the same tokens, another template: it would close the answer with another one
    other.chat_template = "{% for m in messages %}<{{ m['content'] }}~{% endfor %}"
    other.add_tokens([])
    [found] = sampled_logps(policy, (policy[0], other), [edited])
    assert found["same_tokenizer"] and found["tokens"] == found["start_tokens"] == [5, 4] and found["logps"][0] != -12.5
    [same] = sampled_logps(policy, (deepcopy(policy[0]), deepcopy(policy[1])), [edited])
    assert same["logps"] == same["start_logps"]


IGNORES = "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template",
                         [IGNORES, IGNORES + "{{ '<|endoftext|>' }}",
                          IGNORES.replace("<|im_end|>\n", "<|im_end|>{% if not loop.last %}{{ '\\n' }}{% endif %}")])
@pytest.mark.parametrize("prompt",
                         [[U("hi")], [S("Be brief."), U("hi")], [U("a"), A("b"), U("c")], [U("hi"), A("Well")]])
def test_39_a_template_that_ignores_the_question_for_an_answer(template, prompt):
    tokenizer = _fast(_bytes(), template, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    text = render_prompt(prompt, tokenizer)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n"
                         + begun) and text.count("assistant") == 1 + str(prompt[:-1]).count("assistant")
    tokens = trained(tokenizer, prompt)
    assert tokens["prompt_ids"] == LocalSampler(None, tokenizer)._encode([prompt])[0]
    read = judged(tokenizer, prompt, "Yes.")
    both = tokens["prompt_ids"] + tokens["completion_ids"][0]
    assert both == read[: len(both)] and tokenizer.decode(both).endswith("Yes.<|im_end|>")


# 40: a long begun answer


@pytest.mark.parametrize("kind", ["bytes_chatml", "phi_left", "gemma", "letters", "bytes_bos"])
def test_40_a_long_begun_answer_is_cut_behind_its_header(kind):
    tokenizer = KINDS[kind]()
    for closed in ([U("Write.")], [U("one two " * 60)], [U("one"), A("two " * 60), U("Write.")],
                   [S("Be brief."), U("Write.")]):
        if kind == "gemma" and closed[0]["role"] == "system":
            continue
        limit = 40 if kind != "letters" and len(closed) == 1 else 70
        prompt = [*closed, A("pre " * 60)]
        ids = trained(tokenizer, prompt, max_prompt_length=limit)["prompt_ids"]
        text = tokenizer.decode(ids)
        header = render_prompt(closed, tokenizer)[-12:]
        text = text.removeprefix("<s>")
        assert limit - 4 <= len(ids) <= limit and text.count(header) == 1
        assert text.startswith(render_prompt([*closed, A("pre")], tokenizer)[:8])
        user, answer = text.split(header)
        assert tokenizer.chat_template or answer[0] == " "
        assert len(answer) > 8 and answer.strip() in "pre " * 60 and answer.endswith("pre ") and "pre " not in user
        assert len(closed[0]["content"]) > 10 or len(closed) > 1 or "Write." in user
        assert "two" not in user or len(closed) == 1
        assert ids == LocalSampler(None, tokenizer, max_prompt_length=limit)._encode([prompt])[0]


def test_40_a_reward_model_reads_a_long_answer_behind_its_header():
    for kind in ("bytes_chatml", "bytes_bos"):
        tokenizer = KINDS[kind]()
        for prompt, said in (([U("Write."), A("pre " * 60)], "Yes."), ([U("Write.")], "no " * 60 + "Yes.")):
            text = tokenizer.decode(judged(tokenizer, prompt, said, max_length=60))
            assert "Write." in text and text.count("ssistant") == 1
            assert text.rstrip("\n").removesuffix("<|im_end|>").endswith("Yes.")

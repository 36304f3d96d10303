"""What is trained is what was sampled and what is judged: random conversations in eight kinds of tokenizers."""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from tokenizer_kinds import FORGETS, KINDS, WORDS, _bytes, _fast  # noqa: E402

from lire_nb import conversations as C  # noqa: E402
from lire_nb.base.errors import LireError
from lire_nb.layouts import join_transcript, parse_transcript, spaced, unspaced
from lire_nb.records import make_record  # noqa: E402
from lire_nb.rewards import RewardModel  # noqa: E402
from lire_nb.sampling import LocalSampler  # noqa: E402
from lire_nb.shared_prompt import tokenize_list  # noqa: E402

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
U, A, S = ({"role": role, "content": None} for role in ("user", "assistant", "system"))
said = st.text(st.sampled_from(sorted({c for w in WORDS for c in w})), max_size=14)
spoken = said.filter(str.strip)


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


@st.composite
def prompts(draw):
    """Text, or turns that begin with a user behind an optional system turn; some end with a begun answer."""
    if draw(st.booleans()):
        return draw(spoken)
    head = [turn("system", draw(spoken))] if draw(st.booleans()) else []
    talk = [turn(("user", "assistant")[i % 2], draw(spoken)) for i in range(draw(st.integers(1, 4)))]
    return head + talk


def transcript(messages: list[dict]) -> str:
    """Written by another hand than the package's."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[m['role']]}:" + ("" if not m["content"]
                                                 or m["content"][0].isspace() else " ") + m["content"]
                   for m in messages)


def decoded(tokenizer, ids: list[int]) -> str:
    """The text of ids, without what some kinds put before a text or behind a start token."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removeprefix("<s>").removeprefix("<bos>")


def readers(tokenizer, prompt, completion):
    record = make_record(prompt, [completion], [1.0], meta={"finish_reasons": ["length"]})
    try:
        trained = tokenize_list(record, tokenizer, max_prompt_length=10_000, max_completion_length=10_000)
    except LireError as e:
        assert "template refuses" in str(e) or "no token" in str(e), e
        return None
    (sampled,) = LocalSampler(None, tokenizer, max_prompt_length=10_000)._encode([prompt])
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer)), device="cpu")
    judged = RewardModel(model, tokenizer, max_length=10_000).encode([prompt], [completion])["input_ids"][0].tolist()
    return trained["prompt_ids"], trained["completion_ids"][0], sampled, judged


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(prompt=prompts(), completion=spoken)
def test_sampler_trainer_and_reward_model_read_the_rendered_text(kind, prompt, completion):
    tokenizer = KINDS[kind]()
    found = readers(tokenizer, prompt, completion)
    templated = not isinstance(prompt, str) and tokenizer.chat_template
    if found is None:
        assert kind == "gemma" and templated and prompt[0]["role"] == "system"
        return
    trained, answer, sampled, judged = found
    assert trained == sampled and len(trained) >= 1
    begun = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
    if isinstance(prompt, str):
        before, whole = prompt, prompt + completion
    elif not templated:
        before = transcript(prompt) if begun else transcript(prompt) + "\n\nAssistant:"
        whole = before + completion if begun else transcript([*prompt, turn("assistant", completion)])
    elif begun:
        before, whole = C.render_prompt(prompt, tokenizer), C.render_prompt(prompt, tokenizer) + completion
        assert before.endswith(prompt[-1]["content"])
    else:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = before + ("" if kind != "metaspace_llama2" or completion[0].isspace() else " ") + completion
    assert C.render_prompt(prompt, tokenizer) == before
    for ids, text in ((trained, before), (trained + answer, whole)):
        # a space before a text, or behind a start token, is theirs
        if kind in ("bytes_bos_eos", "metaspace_llama2", "unigram_eos"):
            assert decoded(tokenizer, ids).replace("<s> ", "<s>").lstrip(" ") == text.removeprefix("<s>").replace(
                "<s> ", "<s>"
            ).lstrip(" ")
        else:
            assert decoded(tokenizer, ids) == text.removeprefix("<bos>")
    if templated:
        said = [*prompt[:-1],
                turn("assistant",
                     prompt[-1]["content"] + completion)] if begun else [*prompt, turn("assistant", completion)]
        assert judged == tokenizer.apply_chat_template(said)["input_ids"]
    else:
        assert judged == tokenizer(whole)["input_ids"]
    assert sum(i == tokenizer.bos_token_id for i in trained[:2]) <= 1


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(prompt=prompts(), completion=spoken, ended=st.booleans())
def test_reading_drawn_ids_undoes_writing_them(kind, prompt, completion, ended):
    tokenizer = KINDS[kind]()
    glue = C._glue(prompt, tokenizer) if kind != "gemma" else ""
    assume(kind != "gemma" or isinstance(prompt, str) or prompt[0]["role"] != "system")
    # " a" after "Assistant:" is written, and so read, as "a"
    assume(unspaced(spaced(completion, glue), glue) == completion)
    ids = C.encode_completion(prompt, completion, tokenizer, ended=ended)
    assert C.completion_text(prompt, ids, tokenizer) == completion
    assert (ids[-1] in C.end_tokens(tokenizer)) == ended
    record = make_record(prompt, [completion],
                         meta={"token_ids": [ids], "finish_reasons": ["stop" if ended else "length"],
                               "tokenizer": C.tokenizer_fingerprint(tokenizer)})
    assert C.drawn_tokens(record, tokenizer) == [ids]
    assert C.drawn_tokens(record | {"completions": [completion + "."]}, tokenizer) == [None]


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(prompt=prompts(), limit=st.integers(1, 60))
@example(prompt=[turn("user", "b")], limit=4)  # a letter of <bos>
def test_a_prompt_that_is_cut_keeps_head_and_end(kind, prompt, limit):
    tokenizer = KINDS[kind]()
    assume(kind != "gemma" or isinstance(prompt, str) or prompt[0]["role"] != "system")
    whole, _ = C.encode_prompt(prompt, tokenizer, 10_000)
    ids, cut = C.encode_prompt(prompt, tokenizer, limit)
    assert cut == (len(whole) > limit) and 1 <= len(ids) <= limit
    assert ids[-1] == whole[-1] and (cut or ids == whole)
    if limit > 3 and tokenizer.bos_token_id in whole[:1]:
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["b", "user", "start", "m", "assistant"])
def test_a_word_of_the_template_is_no_sign_of_where_the_talk_begins(kind, word):
    """The header that is kept is that of the same talk in other words."""
    tokenizer = KINDS[kind]()
    whole, other = (C.encode_prompt([turn("user", said)], tokenizer, 10_000)[0] for said in (word, "Zz"))
    header = os.path.commonprefix([tokenizer.decode(whole), tokenizer.decode(other)]).rstrip()
    for limit in range(len(tokenizer.encode(header, add_special_tokens=False)) + 2, len(whole)):
        cut, _ = C.encode_prompt([turn("user", word)], tokenizer, limit)
        assert tokenizer.decode(cut).startswith(header), limit


@FEW
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), said), min_size=1, max_size=5))
def test_transcripts_are_written_and_read_without_loss(turns):
    messages = [turn(role, text) for role, text in turns]
    text = join_transcript(messages)
    assert text == transcript(messages) and join_transcript(parse_transcript(text)) == text
    if all(unspaced(spaced(m["content"])) == m["content"] for m in messages):
        assert parse_transcript(text) == messages


def test_a_conversation_loses_whole_turns_first_and_stays_well_formed():
    tokenizer = KINDS["bytes_chatml"]()
    talk = [turn("system", "Be brief."), turn("user", "one " * 20 + "one"), turn("assistant", "two " * 20 + "two"),
            turn("user", "three three")]
    size = lambda p: len(C.encode_prompt(p, tokenizer, 10_000)[0])  # noqa: E731
    for limit in range(size(talk), 8, -1):
        text = tokenizer.decode(C.encode_prompt(talk, tokenizer, limit)[0])
        if limit >= size([talk[0], turn("user", "e"), *talk[2:]]):
            assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
            assert "two two" in text and text.endswith("three three<|im_end|>\n<|im_start|>assistant\n")
        elif limit >= size([talk[0], turn("user", "e")]):
            assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
            assert "two" not in text and text.endswith("e<|im_end|>\n<|im_start|>assistant\n")
        else:
            assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")


def test_a_template_that_forgets_the_system_turn_is_refused():
    tokenizer = _fast(_bytes(), FORGETS, eos_token="</s>", pad_token="</s>")
    for talk in ([turn("system", "a"), turn("user", "a cat")],
                 [turn("system", "Be brief."), turn("user", "hi"), turn("assistant", "yes")]):
        for ask in (lambda: C.encode_prompt(talk, tokenizer, id="r7"),
                    lambda: C.render_conversation(talk, "x", tokenizer, id="r7")):  # noqa: B023
            with pytest.raises(LireError, match="leaves out the system turn") as caught:
                ask()
            assert "'r7'" in str(caught.value) and "\n" not in str(caught.value)
    assert C.render_prompt([turn("user", "a cat")], tokenizer) == "[user]a cat</s>[assistant]"

"""Conversations as candidates: the agent's turns alone are predicted, in every path, as a plain forward pass says."""
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from lire_nb.base.errors import LireError, ListError
from lire_nb.conversations import candidate_tokens, completion_ids, tokenizer_fingerprint
from lire_nb.logprobs import dataset_logps, list_logps, reference_logps, sampled_logps
from lire_nb.long_lists import list_logps_in_parts
from lire_nb.models import load_tokenizer
from lire_nb.multi_turn import (
    conversation_record, conversation_rewards, HigherScore, mixed_reference, PolicyUser, sample_conversations,
    ScriptedUser,
)
from lire_nb.records import make_record, merge_lists, select_candidates
from lire_nb.rewards import score_lists
from lire_nb.sampling import LocalSampler, sample_lists, SamplingSettings
from lire_nb.shared_prompt import ListCollator, tokenize_list
from lire_nb.training import LIREConfig, LIRETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = {"max_prompt_length": 200, "max_completion_length": 200}
ASK = [{"role": "user", "content": "Name a prime."}]
BRIEF = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"},
         {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Name a film that you like."}]


def tiny(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
                         bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.5)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


@pytest.fixture
def model():
    return tiny()


def lists():
    """Ragged: one to three answers in a conversation, and a list of single answers in the same batch."""
    return [
        conversation_record(ASK, [["97.", "Why is that so?", "It has no divisors."], ["Seven, of course."],
                                  ["2", "Larger!", "11", "Larger, I said:\n\nmuch.", "101, then."]], [1.0, 0.5, 0.2]),
        conversation_record(BRIEF, [["Alien", "Why?", ""], ["Heat.", "It is long. Is it good?", "Yes."]], [0.0, 1.0]),
        make_record(ASK, ["Two.", "Five is one."], [1.0, 0.0], id="single"),
    ]


def by_hand(tokenizer, record, j):
    """Ids of prompt and conversation by the template alone, and the places of the agent's tokens after the prompt."""
    turns = (record["meta"].get("turns") or [None] * len(record["completions"]))[j]
    after = turns or [{"role": "assistant", "content": record["completions"][j]}]
    text = tokenizer.apply_chat_template([*record["prompt"], *after], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{what}|>") for what in ("start", "end"))
    header = [start, *tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
    opened = [i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header]
    own = opened[len(opened) - (len(after) + 1) // 2 :]  # the prompt may hold answers too
    return ids, [k for first in own for k in range(first, ids.index(end, first) + 1)]


def plain_logps(model, tokenizer, records):
    table = torch.zeros(len(records), max(len(r["completions"]) for r in records))
    for b, record in enumerate(records):
        for j in range(len(record["completions"])):
            ids, own = by_hand(tokenizer, record, j)
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            table[b, j] = torch.stack([logps[k - 1, ids[k]] for k in own]).sum()
    return table


def batch_of(tokenizer, records, **options):
    return ListCollator(tokenizer.pad_token_id)([tokenize_list(r, tokenizer, **LONG | options) for r in records])


def values_and_gradients(model, table):
    weights = torch.linspace(-1, 2, table.numel()).reshape(table.shape)
    grads = torch.autograd.grad((table * weights).sum(), list(model.parameters()))
    return table.detach(), torch.cat([g.flatten() for g in grads])


PATHS = {
    "padded": lambda model, batch: list_logps(model, batch, impl="padded")[0],
    "shared": lambda model, batch: list_logps(model, batch, impl="shared")[0],
    "shared, in parts": lambda model, batch: list_logps_in_parts(model, batch, 2, impl="shared")[0],
    "padded, in parts": lambda model, batch: list_logps_in_parts(model, batch, 3, impl="padded")[0],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_each_conversation_alone_by_a_plain_forward_pass(path, checkpointing, model, tokenizer):
    values, gradient = values_and_gradients(model, plain_logps(model, tokenizer, lists()))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found, own = values_and_gradients(model, PATHS[path](model, batch_of(tokenizer, lists())))
    assert_close(found, values, rtol=1e-4, atol=1e-4)
    assert float((own - gradient).norm()) <= 1e-4 * float(gradient.norm())


def test_what_the_user_says_is_read_and_not_predicted(model, tokenizer):
    """Another word of the user's changes later answers, never the sum by its own probability; lengths count the
    agent's tokens."""
    one, other = (conversation_record(ASK, [["97.", said, "Yes."]]) for said in ("Why?", "Sure?"))
    tokens = tokenize_list(one, tokenizer, **LONG)
    ids, own = by_hand(tokenizer, one, 0)
    start = len(tokens["prompt_ids"])
    assert tokens["prompt_ids"] + tokens["completion_ids"][0] == ids[: own[-1] + 1]
    assert [start + k for k, said in enumerate(tokens["agent"][0]) if said] == own
    with torch.no_grad():
        _, lengths, per_token = list_logps(model, batch_of(tokenizer, [one]), per_token=True)
        _, _, others = list_logps(model, batch_of(tokenizer, [other]), per_token=True)
    assert lengths.tolist() == [[len(own)]] and len(per_token) == len(own)
    first = tokens["agent"][0].index(False)  # the first answer was there before
    assert_close(per_token[:first], others[:first])
    assert not torch.allclose(per_token[first:], others[first:])


def test_single_answers_written_as_turns_are_single_answers(model, tokenizer, tmp_path):
    plain = make_record(ASK, ["Two.", "Five is one."], [1.0, 0.0])
    turned = conversation_record(ASK, [["Two."], ["Five is one."]], [1.0, 0.0])
    one, two = (tokenize_list(r, tokenizer, **LONG) for r in (plain, turned))
    assert one == two and "agent" not in one and "agent" not in batch_of(tokenizer, [plain, turned])
    both = [dataset_logps(model, tokenizer, [r], impl=impl) for impl in ("padded", "shared") for r in (plain, turned)]
    assert both[0] == both[1] and both[2] == both[3]
    reference_logps(model, tokenizer, [plain], tmp_path)
    kept = next(tmp_path.iterdir()).read_bytes()
    reference_logps(model, tokenizer, [turned], tmp_path)
    assert next(tmp_path.iterdir()).read_bytes() == kept  # the same key


def test_a_conversation_has_another_key_than_the_same_row_as_one_answer(model, tokenizer, tmp_path):
    """Equal ids, another mask: the log-probs differ, so the cache must not take one for the other."""
    record = conversation_record(ASK, [["97.", "Why?", "So."]])
    (ids,), _ = completion_ids(record, tokenizer)
    answer = make_record(ASK, ["any"], meta={"token_ids": [ids], "tokenizer": tokenizer_fingerprint(tokenizer)})
    assert tokenize_list(answer, tokenizer, answers=[ids])["completion_ids"] == [ids]
    first = reference_logps(model, tokenizer, [record], tmp_path)
    assert reference_logps(model, tokenizer, [record], tmp_path) == first
    assert len(next(tmp_path.iterdir()).read_text().splitlines()) == 1
    whole = dataset_logps(model, tokenizer, [answer], answers=[[ids]])[0][0]
    assert whole[0] < first[0][0] - 1


@pytest.mark.parametrize("limit", range(1, 40))
def test_a_cut_conversation_ends_with_a_prediction_that_was_made(limit, tokenizer):
    record = lists()[0]
    whole = tokenize_list(record, tokenizer, **LONG)
    cut = tokenize_list(record, tokenizer, **LONG | {"max_completion_length": limit})
    rows = zip(whole["completion_ids"], whole["agent"], cut["completion_ids"],
               cut.get("agent") or [[True] * len(c) for c in cut["completion_ids"]])
    for ids, own, kept, kept_own in rows:
        assert 1 <= len(kept) <= limit and kept == ids[: len(kept)] and kept_own == own[: len(kept)] and kept_own[-1]
        assert not any(own[len(kept) : limit])  # nothing of the agent's within the limit was lost
    assert cut["cut"][1] == sum(len(ids) > limit for ids in whole["completion_ids"])


def test_columns_travel(tokenizer):
    one, two = lists()[0], conversation_record(ASK, [["97.", "Why is that so?", "It has no divisors."], ["1"]],
                                               [0.0, 0.0])
    (merged,) = merge_lists([one, two])
    assert len(merged["completions"]) == 4 and merged["rewards"][0] == 0.5
    assert merged["meta"]["turns"][:3] == one["meta"]["turns"]
    chosen = select_candidates(merged, [3, 0])
    assert chosen["meta"]["turns"] == [two["meta"]["turns"][1], one["meta"]["turns"][0]]
    text = one["completions"][0]
    (both,) = merge_lists([one, make_record(ASK, [text], [0.0])])  # the same text as one answer is another candidate
    assert both["completions"].count(text) == 2 and both["meta"]["turns"][-1] is None


def trained(tmp_path, tokenizer, impl, records, **settings):
    model = tiny()
    args = LIREConfig(output_dir=str(tmp_path / impl), max_steps=1, per_device_train_batch_size=3, learning_rate=1e-2,
                      logps_impl=impl, bf16=False, save_strategy="no", **LONG | {"temperature": 5.0} | settings)
    trainer = LIRETrainer(model, args, train_dataset=records, processing_class=tokenizer)
    trainer.train()
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    return loss, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dpo", "temperature": None}, {"loss_type": "simpo", "temperature": None},
                                      {"num_candidates": 2, "candidates_at_once": 2}])
def test_a_training_step_is_the_same_on_both_paths(settings, tmp_path, tokenizer):
    records = lists()[::-1]  # the first list of the table has no turns
    padded, shared = (trained(tmp_path, tokenizer, impl, records, **settings) for impl in ("padded", "shared"))
    assert_close(torch.tensor(padded[0]), torch.tensor(shared[0]), rtol=1e-4, atol=1e-6)
    assert_close(padded[1], shared[1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(padded[1], torch.cat([p.detach().flatten() for p in tiny().parameters()]))


def settings(n=6, **other):
    return SamplingSettings(max_new_tokens=n, **other)


LINES = ScriptedUser(["Why?", "Really, so?"])


def drawn(model, tokenizer, prompts=(ASK, BRIEF), count=3, user=LINES, seed=0, n=6, **options):
    options = {"max_turns": 3, "progress": False, "settings": settings(n)} | options
    return list(sample_conversations((model, tokenizer), list(prompts), count, user, seed=seed, **options))


def test_the_first_turn_is_what_sample_lists_draws(model, tokenizer):
    plain = list(sample_lists((model, tokenizer), [ASK, BRIEF], 3, settings=settings(), seed=5, progress=False))
    talks = drawn(model, tokenizer, seed=5, max_turns=1)
    for one, talk in zip(plain, talks):
        assert talk["completions"] == one["completions"]
        for name in ("token_ids", "logps", "finish_reasons", "tokenizer"):
            assert talk["meta"][name] == one["meta"][name]


def test_a_later_turn_is_what_sample_lists_would_draw_there(model, tokenizer):
    """Candidate j's turn is the draw number j of the conversation so far, under the same seed."""
    found = 0
    for record in drawn(model, tokenizer, seed=3):
        for j, talk in enumerate(record["meta"]["turns"]):
            for k in range(2, len(talk), 2):
                before = [{m: t[m] for m in ("role", "content")} for t in talk[:k]]
                drawn_ids = record["meta"]["token_ids"][j][: record["meta"]["agent_spans"][j][k // 2][0]]
                if conversation_record(record["prompt"], [before[:-1]]) and drawn_ids == candidate_tokens(
                        conversation_record(record["prompt"], [[*talk[:k], {"role": "assistant", "content": "x"}]]),
                        tokenizer)[0][0][: len(drawn_ids)]:  # where the text is read as it was drawn
                    (alone,) = sample_lists((model, tokenizer), [[*record["prompt"], *before]], j + 1,
                                            settings=settings(), seed=3, progress=False)
                    assert alone["completions"][j] == talk[k]["content"]
                    found += 1
    assert found >= 2


def assert_drawn_alike(one, other):
    """All columns; the log-probs, which other rows of a batch disturb in the last digits, to 1e-4."""
    logps = [torch.tensor(r["meta"]["logps"]) for r in (one, other)]
    assert_close(*logps, rtol=0, atol=1e-4)
    assert [r | {"meta": r["meta"] | {"logps": None}} for r in (one,)] == [other | {"meta": other["meta"] | {
        "logps": None}}]


def test_a_conversation_depends_on_seed_prompt_and_number_alone(model, tokenizer):
    together, again = drawn(model, tokenizer), drawn(model, tokenizer)
    assert together == again and drawn(model, tokenizer, seed=1) != together
    assert_drawn_alike(drawn(model, tokenizer, [BRIEF], batch_size=1)[0], together[1])
    fewer = drawn(model, tokenizer, count=2)
    assert [r["completions"] for r in fewer] == [r["completions"][:2] for r in together]
    twice = drawn(model, tokenizer, [ASK, ASK], 2)
    assert [*twice[0]["completions"], *twice[1]["completions"]] == drawn(model, tokenizer, [ASK], 4)[0]["completions"]


def test_what_is_trained_is_what_was_sampled(model, tokenizer):
    """Ids, and their log-probs under the policy: the sampler's, found again by the two paths and by a plain pass."""
    records = drawn(model, tokenizer, n=9)
    assert any(m.get("finish_reason") == "length" for r in records for talk in r["meta"]["turns"] for m in talk)
    for record in records:
        rows, spans, again = candidate_tokens(record, tokenizer)
        assert again == 0 and rows == record["meta"]["token_ids"] and spans == record["meta"]["agent_spans"]
        tokens = tokenize_list(record, tokenizer, **LONG)
        assert tokens["completion_ids"] == rows
        for j, ids in enumerate(rows):
            said = [ids[start:end] for start, end in spans[j]]
            assert sum(said, []) == [i for i, own in zip(ids, tokens["agent"][j]) if own]
            logits = model(torch.tensor([tokens["prompt_ids"] + ids])).logits[0].log_softmax(-1)
            start = len(tokens["prompt_ids"])
            alone = sum(float(logits[start + k - 1, i].detach()) for k, i in enumerate(ids) if tokens["agent"][j][k])
            assert record["meta"]["logps"][j] == pytest.approx(alone, abs=1e-3)
    (found,) = {json.dumps(one["same_tokenizer"]) for one in sampled_logps((model, tokenizer), (tiny(1), tokenizer),
                                                                          records)}
    assert found == "true"


def test_an_edited_conversation_is_read_anew(model, tokenizer):
    (record,) = drawn(model, tokenizer, [ASK], 1)
    talk = [*record["meta"]["turns"][0]]
    talk[1] = {"role": "user", "content": "Something else."}
    edited = conversation_record(ASK, [talk], meta={k: v for k, v in record["meta"].items() if k != "turns"})
    assert candidate_tokens(edited, tokenizer)[2] == 1


def test_users(model, tokenizer):
    rules = ScriptedUser(rules={r"\d": "Is it prime?", "": "Say a number!"})
    assert rules([{"role": "assistant", "content": "97"}], 1) == "Is it prime?"
    assert rules([{"role": "assistant", "content": "none"}], 2) == "Say a number!"
    ending = ScriptedUser(["More!"], rules={"stop": None})
    assert ending([{"role": "assistant", "content": "I stop"}], 1) is None
    assert ending([{"role": "assistant", "content": "on"}], 1) == "More!" and ending([{"role": "assistant",
                                                                                      "content": "on"}], 2) is None
    talks = drawn(model, tokenizer, user=ScriptedUser(["Go on."]))
    assert {len(talk) for r in talks for talk in r["meta"]["turns"]} == {3}
    user = PolicyUser((tiny(1), tokenizer), settings(5), instruction="You ask.")
    one, two = (drawn(model, tokenizer, user=user, max_turns=2) for _ in range(2))
    assert one == two
    assert_drawn_alike(drawn(model, tokenizer, [BRIEF], user=user, max_turns=2)[0], one[1])
    assert len({talk[1]["content"] for r in one for talk in r["meta"]["turns"] if len(talk) > 1}) > 1


def test_a_sampler_that_gives_texts_alone(tokenizer):
    """As a server does: no ids, the turns as they were said."""
    from lire_nb.sampling import Completion

    class Served:
        def sample(self, prompts, num_candidates, settings, seed):
            said = lambda p, k: Completion(f"{len(p)} {k} {seed % 97}", "length" if k else "stop")  # noqa: E731
            return [[said(p, k) for k in range(num_candidates)] for p in prompts]

    first, second = (list(sample_conversations(Served(), [ASK], 2, LINES, max_turns=2, seed=4)) for _ in range(2))
    assert first == second
    (record,) = first
    assert record["meta"]["token_ids"] == [None, None] and record["meta"]["logps"] == [None, None]
    assert [m["content"] for m in record["meta"]["turns"][0]][1] == "Why?"
    assert record["meta"]["turns"][1][0]["finish_reason"] == "length"
    rows, spans, _ = candidate_tokens(record, tokenizer)
    ends = [rows[j][spans[j][0][1] - 1] == tokenizer.convert_tokens_to_ids("<|im_end|>") for j in range(2)]
    assert ends == [True, False]  # the second answer was cut: its end is the template's


@pytest.mark.parametrize("why, closed", [("stop", True), ("length", False), ("stop_string", False)])
def test_what_a_turn_learns_is_what_a_single_answer_with_its_ending_learns(tokenizer, why, closed):
    "A sampler that gives texts alone: a turn in the middle, the last one, and a list of single answers agree."
    from lire_nb.sampling import Completion

    class Served:
        def sample(self, prompts, num_candidates, settings, seed):
            return [[Completion("yes", why)] * num_candidates for _ in prompts]

    [talk] = sample_conversations(Served(), [ASK], 1, LINES, max_turns=2)
    [single] = sample_lists(Served(), [ASK], 1)
    rows, spans, _ = candidate_tokens(talk, tokenizer)
    alone, _, _ = candidate_tokens(single, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, parts, one in zip(rows, spans, alone):
        assert all(row[a:b] == one for a, b in parts) and (one[-1] == end) is closed
    assert talk["meta"]["turns"][0][0].get("finish_reason") == (None if closed else why)


def test_a_user_whose_template_knows_no_system_turn(model, tokenizer):
    """User's turns first, in strict alternation: the instruction can be one of them."""
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    with pytest.raises(LireError, match="instruction_role"):
        PolicyUser((tiny(1), strict), settings(5), instruction="You ask.", instruction_role="tool")
    user = PolicyUser((tiny(1), strict), settings(5), instruction="You ask.", instruction_role="user")
    talks = drawn(model, tokenizer, user=user, max_turns=2)
    assert any(len(talk) == 3 for r in talks for talk in r["meta"]["turns"])


def test_rewards_are_mean_win_rates():
    record = conversation_record(ASK, [["a"], ["bb", "?", "b"], ["ccc"]])
    second = lambda a, b: 0.25 if a[-1]["content"] < b[-1]["content"] else 0.9  # noqa: E731, in both orders
    (scored,) = conversation_rewards([record], second)
    win = lambda a, b: (second(a, b) + 1 - second(b, a)) / 2  # noqa: E731
    ends = [[{"content": c}] for c in ("a", "b", "ccc")]
    expected = [sum(win(ends[j], ends[k]) for k in range(3) if k != j) / 2 for j in range(3)]
    assert scored["rewards"] == pytest.approx(expected) and sum(scored["rewards"]) == pytest.approx(1.5)
    (ranked,) = conversation_rewards([record], HigherScore(lambda talk: len(talk)))
    assert ranked["rewards"] == [0.25, 1.0, 0.25]
    (alone,) = conversation_rewards([conversation_record(ASK, [["a"]])], second)
    assert alone["rewards"] == [None]


def test_a_reward_reads_the_whole_conversation():
    "Prompt and user before the agent's last turn, also where one list holds single answers and where scores are missing."
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions))
        return [float(len(text)) for text in completions]

    talk = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because."}]
    opening = [{"role": "user", "content": "Greet me."}]
    whole = conversation_record(opening, [["Hello.", "Why?", "Because."], ["Hi."]], id="t")
    plain = make_record("film", [" good", " bad"], id="s")
    scored = score_lists([whole, plain], reward)
    assert seen == [([*opening, *talk[:2]], "Because."), (opening, "Hi."), ("film", " good"), ("film", " bad")]
    assert [r["rewards"] for r in scored] == [[8.0, 3.0], [5.0, 4.0]]
    assert scored[0]["completions"] == whole["completions"] and scored[0]["meta"] == whole["meta"]


def test_the_regression_with_a_mixed_reference_ends_at_the_papers_policy():
    """Over five answers: fitted logits against the closed form, whatever the rewards."""
    from lire_nb.rivals import regression_loss

    generator = torch.Generator().manual_seed(3)
    start, last, q = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    start, last = start.log_softmax(-1), last.log_softmax(-1)
    for alpha, t in ((0.5, 0), (0.5, 3), (2.0, 7)):
        eta = 2 / (alpha * (t + 2))
        expected = (start.exp() ** (alpha * eta) * last.exp() ** (1 - alpha * eta) * (eta * q).exp())
        expected = expected / expected.sum()
        reference = mixed_reference(start, last, alpha, t)
        theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        fit = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16,
                                line_search_fn="strong_wolfe")

        def closure():
            fit.zero_grad()
            loss = regression_loss(theta.log_softmax(-1)[None], q[None], ref_logps=reference[None], beta=1 / eta).sum()  # noqa: B023
            loss.backward()
            return loss

        fit.step(closure)
        assert_close(theta.detach().softmax(-1), expected, rtol=1e-5, atol=1e-7)


TALK = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(("talk", "says"), [
    (TALK[:2], "the user has the last word"), (TALK[1:], "a turn out of order"), ([], "no turns"),
    ([TALK[0], TALK[2]], "a turn out of order"), ("text", "no turns"), (3, "no turns"),
    ([TALK[0], {"role": "system", "content": "x"}, TALK[2]], "a turn out of order"),
    ([TALK[0], {"role": "user"}, TALK[2]], "not a chat message"), ([TALK[0], 4, TALK[2]], "not a chat message"),
    ([TALK[0] | {"content": None}], "not a string"), ([TALK[0] | {"score": 1}], "unknown key"),
    ([TALK[0] | {"finish_reason": "done"}], "no way to end a turn"), (float("nan"), "no turns"),
])
def test_turns_that_are_no_conversation(talk, says):
    with pytest.raises(ListError, match=says) as e:
        conversation_record(ASK, [TALK, talk], id="here")
    assert "turns[1]" in str(e.value) and "here" in str(e.value) and "\n" not in str(e.value)
    if isinstance(talk, list):  # the same when a file is read
        broken = make_record(ASK, ["a", "b"]) | {"meta": {"turns": [None, talk]}}
        with pytest.raises(ListError, match=says):
            merge_lists([broken])


@pytest.mark.parametrize("wrong", [
    lambda: conversation_record("a text", [["a"]]), lambda: conversation_record(ASK + TALK[:1], [["a"]]),
    lambda: conversation_record(ASK, []), lambda: conversation_record(ASK, [["a"]], [1.0, 2.0]),
    lambda: conversation_record(ASK, [["a"]], [float("nan")]), lambda: conversation_record(ASK, "ab"),
    lambda: ScriptedUser([]), lambda: ScriptedUser("one text"), lambda: ScriptedUser([""]),
    lambda: ScriptedUser(rules={"(": "x"}), lambda: ScriptedUser([3]),
    lambda: mixed_reference(torch.zeros(2), torch.zeros(3), 1.0, 0), lambda: mixed_reference([0.0], [0.0], 0.0, 1),
    lambda: mixed_reference([0.0], [0.0], 1.0, -1), lambda: mixed_reference([float("nan")], [0.0], 1.0, 1),
    lambda: mixed_reference([0.0], [0.0], 1.0, 1, eta=2.0), lambda: mixed_reference([0.0], [0.0], 1.0, 1, eta="a"),
    lambda: mixed_reference(None, None, 1.0, 1), lambda: mixed_reference([[0.0], [0.0, 1.0]], [0.0], 1.0, 1),
    lambda: HigherScore(3), lambda: conversation_rewards([conversation_record(ASK, [["a"], ["b"]])], "longer"),
    lambda: conversation_rewards(conversation_record(ASK, [["a"], ["b"]]), lambda a, b: 0.5),
    lambda: conversation_rewards([conversation_record(ASK, [["a"], ["b"]])], lambda a, b: 2.0),
    lambda: conversation_rewards([conversation_record(ASK, [["a"], ["b"]])], lambda a, b: float("nan")),
    lambda: conversation_rewards([conversation_record(ASK, [["a"], ["b"]])], lambda a, b: "better"),
    lambda: conversation_rewards([], lambda a, b: 0.5),
    lambda: conversation_rewards([conversation_record(ASK, [["a"], ["b"]])], HigherScore(lambda talk: None)),
])
def test_bad_input_is_one_line(wrong):
    with pytest.raises(LireError) as e:
        wrong()
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_a_policy_that_has_no_part_in_a_mixture_is_not_asked():
    never, some = torch.tensor([-torch.inf, -1.0]), torch.tensor([-2.0, -3.0])
    assert mixed_reference(never, some, 1.0, 1, eta=0.0).tolist() == [-2.0, -3.0]
    assert mixed_reference(some, never, 1.0, 1, eta=1.0).tolist() == [-2.0, -3.0]


def test_bad_input_of_sampling(model, tokenizer):
    pair = model, tokenizer
    for prompts, count, user, options in (
            (["a text"], 2, LINES, {}), ([ASK + TALK[:1]], 2, LINES, {}), ([], 2, LINES, {}), ([ASK], 0, LINES, {}),
            ([ASK], 2, None, {}), ([ASK], 2, LINES, {"max_turns": 0}), ([ASK], 2, LINES, {"max_turns": 1.5}),
            ([ASK], 2, lambda talk, turn: 7, {}), ([ASK], 2, lambda talk, turn: "  ", {})):
        with pytest.raises(LireError):
            list(sample_conversations(pair, prompts, count, user, settings=settings(3), progress=False, **options))


def test_a_conversation_that_outgrows_the_model_ends(tokenizer, caplog):
    torch.manual_seed(0)
    config = tiny().config
    config.max_position_embeddings = 60
    small = AutoModelForCausalLM.from_config(config).eval()
    records = drawn(small, tokenizer, [ASK], 2, user=lambda talk, turn: "word " * 30, n=4, max_turns=4)
    assert {len(talk) for talk in records[0]["meta"]["turns"]} == {1} and "no room" in caplog.text
    assert LocalSampler(small, tokenizer).tokenizer is tokenizer


def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path, tokenizer):
    def train(folder, resume=None):
        model = tiny()
        args = LIREConfig(output_dir=str(folder), max_steps=3, per_device_train_batch_size=1, learning_rate=1e-2,
                          temperature=5.0, bf16=False, save_steps=1, num_candidates=2, **LONG)
        LIRETrainer(model, args, train_dataset=lists(), processing_class=tokenizer).train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = train(tmp_path / "run")
    assert torch.equal(train(tmp_path / "again", str(tmp_path / "run" / "checkpoint-1")), whole)

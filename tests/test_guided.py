"""Guided sampling proved: width 1 is plain sampling, a slow search of plain model calls finds the same, and best-of-n is
that of every combination."""
import hashlib
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_policy import make_start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.guided import best_of_n, guided_lists, guided_report
from lire_nb.lists import load_lists, save_lists
from lire_nb.records import make_record, select_candidates
from lire_nb.rewards import RewardError
from lire_nb.sampling import LocalSampler, sample_lists, SamplingSettings

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.!"
PROMPTS = ["abc", "the quick brown fox jumps", "Hello World.", "the quick brown fox jumps", "z"]
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
HEADS = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=256)
FAMILIES = {
    "Llama": lambda: tf.LlamaConfig(**SMALL, **HEADS),
    "Mistral, window 6": lambda: tf.MistralConfig(**SMALL, **HEADS, sliding_window=6),
    "Mamba, which cannot share": lambda: tf.MambaConfig(**SMALL, state_size=8),
}


def tokenizer():
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: i for i, c in enumerate(WORDS, 3)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def policy(family="Llama", ends=2.0):
    """A random model; `ends` makes the end of an answer more likely at every step."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    head = model.get_output_embeddings()
    plain, bias = head.forward, torch.zeros(64)
    bias[2], bias[WORDS.index(".") + 3] = ends, 4.0
    head.forward = lambda x: plain(x) + bias
    return model, tokenizer()


def taste(prompts, texts):
    """A guide that knows nothing: a number made from the letters, whole, for meta keeps a fraction to its last but one
    digit."""
    return [float(int(hashlib.sha256(f"{p}|{t}".encode()).hexdigest()[:6], 16) % 1024) for p, t in zip(prompts, texts)]


def drawn(lists):
    return [(r["id"], r["completions"], r["meta"]["token_ids"], r["meta"]["finish_reasons"]) for r in lists]


# --- width 1 is plain sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [1, 4, "sentence"])
def test_width_one_is_plain_sampling(family, step):
    pair, settings = policy(family), SamplingSettings(max_new_tokens=10)
    common = dict(settings=settings, seed=5, chat=False, progress=False)
    plain = sample_lists(pair, PROMPTS, 2, **common)
    guided = guided_lists(pair, PROMPTS, 2, taste, step=step, width=1, backtrack=2, **common)
    assert drawn(guided) == drawn(plain)
    for one, other in zip(guided, plain):
        np.testing.assert_allclose(one["meta"]["logps"], other["meta"]["logps"], atol=1e-4)
        assert one["meta"]["generated_tokens"] == [len(ids) for ids in other["meta"]["token_ids"]]
    reasons = {reason for r in plain for reason in r["meta"]["finish_reasons"]}
    assert reasons == {"stop", "length"}, "both endings are met"


@pytest.mark.parametrize("settings", [
    SamplingSettings(12, stop=(".", "ab")), SamplingSettings(12, stop=("e", "Z!"), top_k=20),
    SamplingSettings(9, temperature=0.7, top_k=5), SamplingSettings(9, temperature=1.5, top_p=0.8),
    SamplingSettings(9, temperature=0), SamplingSettings(1)], ids=str)
def test_width_one_with_every_setting_and_batch(settings):
    pair, common = policy(), dict(settings=settings, seed=1, chat=False, progress=False)
    plain = sample_lists(pair, PROMPTS, 3, **common)
    for step, batch_size in ((4, 3), ("sentence", 128)):
        guided = guided_lists(pair, PROMPTS, 3, taste, step=step, width=1, batch_size=batch_size, **common)
        assert drawn(guided) == drawn(plain)


def test_a_guide_without_an_opinion_leaves_plain_sampling():
    """Of equal continuations the first is kept, which uses the numbers of plain sampling."""
    pair, common = policy(), dict(settings=SamplingSettings(10), seed=2, chat=False, progress=False)
    plain = sample_lists(pair, PROMPTS, 2, **common)
    same = guided_lists(pair, PROMPTS, 2, lambda p, t: [0.5] * len(t), step=2, width=3, backtrack=2, **common)
    assert drawn(same) == drawn(plain)
    assert all(b == 0 for r in same for b in r["meta"]["backtracks"])


# --- the same search, slowly -----------------------------------------------------------------------------------------


def slow_search(pair, prompt, number, step, width, budget, limit, seed):
    """One row at a time, no cache, no code of the package: (tokens, text, step scores, tokens drawn, ways back)."""
    model, words = pair
    ids = words(prompt)["input_ids"]

    def continued(prefix, key):
        digest = hashlib.sha256(repr((seed, ids, key)).encode()).digest()
        numbers = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:8], "big") >> 1)).random(limit)
        row = list(prefix)
        while True:
            with torch.no_grad():
                chances = model(torch.tensor([ids + row]), use_cache=False).logits[0, -1].softmax(-1)
            chances[[0, 1, *range(len(WORDS) + 3, 64)]] = 0.0
            if not row:
                chances[2] = 0.0
            heap = chances.cumsum(0)
            row.append(int((heap <= numbers[len(row)] * heap[-1]).sum()))
            if row[-1] == 2 or len(row) == limit:
                return row, True
            new = words.decode(row[len(prefix):])
            if len(row) - len(prefix) == step or step == "sentence" and re.search(r"[a-zA-Z].*[.!] *$", new):
                return row, False

    def text(row):
        return words.decode([t for t in row if t != 2])

    at, scores, is_plain, untried, event, count, back = [], [], True, [], 0, 0, 0
    while True:  # one settled step after another
        seen = []  # (best score, its draw) of every step tried here
        while True:
            kids = []
            for w in range(width):
                row, over = continued(at, number if is_plain and w == 0 else (number, event, w))
                count += len(row) - len(at)
                kids.append((taste([prompt], [text(row)])[0], row, over, is_plain and w == 0))
            event += 1
            kids.sort(key=lambda kid: kid[0], reverse=True)
            seen.append((kids, scores))
            top = max(kids[0][0] for kids, _ in seen)
            if back < budget and untried and untried[0][0] > top:
                back += 1
                (score, at, over, is_plain), untried = untried[0], untried[1:]
                scores = [*scores[:-1], score]
                if over:
                    return at, text(at), scores, count, back
                continue
            kids, scores = next(one for one in seen if one[0][0][0] == top)
            (score, at, over, is_plain), untried = kids[0], kids[1:]
            scores = [*scores, score]
            if over:
                return at, text(at), scores, count, back
            break


@pytest.mark.parametrize("step, width, budget", [(2, 3, 0), (2, 3, 2), (3, 2, 5), ("sentence", 3, 2), (99, 4, 1)])
def test_a_slow_search_finds_the_same(step, width, budget):
    pair, limit = policy(ends=0.5), 12
    prompts = ["abc", "Hello World.", "z"]
    lists = guided_lists(pair, prompts, 3, taste, step=step, width=width, backtrack=budget,
                         settings=SamplingSettings(limit), seed=4, chat=False, progress=False)
    went_back = 0
    for prompt, record in zip(prompts, lists):
        meta = record["meta"]
        for number in range(3):
            ids, text, scores, count, back = slow_search(pair, prompt, number, step, width, budget, limit, 4)
            assert meta["token_ids"][number] == ids and record["completions"][number] == text
            assert meta["step_scores"][number] == scores
            assert (meta["generated_tokens"][number], meta["backtracks"][number]) == (count, back)
            went_back += back
    assert (went_back > 0) == (budget > 0 and step != 99), "the way back was walked"


def test_the_budget_is_kept_and_spent():
    pair = policy(ends=-3.0)
    spent = [[b for r in guided_lists(pair, PROMPTS, 3, taste, step=2, width=3, backtrack=budget, seed=0, chat=False,
                                      settings=SamplingSettings(12), progress=False) for b in r["meta"]["backtracks"]]
             for budget in (0, 1, 3)]
    assert [max(b) for b in spent] == [0, 1, 3]


def test_a_way_back_as_foreseen():
    """The guide hates all that goes on from its favorite, and thinks of the others as of their beginnings: the search
    goes back once, to the second choice, and stays there."""
    pair, texts = policy(ends=-9.0), []

    def guide(prompts, asked):
        texts.append(list(asked))
        first = sorted(texts[0])  # what was drawn at first; the last in the alphabet is liked best
        return [-1.0 if len(t) > 3 and t[:3] == first[-1] else float(first.index(t[:3])) for t in asked]

    [record] = guided_lists(pair, ["abc"], 1, guide, step=3, width=3, backtrack=1, settings=SamplingSettings(6), seed=1,
                            chat=False, progress=False)
    liked = sorted(texts[0])
    assert len(set(liked)) == 3 and all(t.startswith(liked[2]) for t in texts[1])
    assert all(t.startswith(liked[1]) for t in texts[2]) and len(texts) == 3
    assert record["completions"][0] == texts[2][0] and record["meta"]["step_scores"] == [[1.0, 1.0]]
    assert record["meta"]["generated_tokens"] == [27] and record["meta"]["scored_prefixes"] == [9]


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched():
    return guided_lists(policy(), PROMPTS, 2, taste, step="sentence", width=3, backtrack=2, seed=3, chat=False,
                        settings=SamplingSettings(14, stop=("!",)), keep_trees=True, progress=False)


def test_scores_belong_to_their_prefixes(searched):
    for record in searched:
        for text, ends, scores in zip(record["completions"], record["meta"]["step_ends"],
                                      record["meta"]["step_scores"]):
            assert ends == sorted(ends) and ends[-1] == len(text)
            assert scores == taste([record["prompt"]] * len(ends), [text[:end] for end in ends])
    assert max(len(s) for r in searched for s in r["meta"]["step_scores"]) > 1


def test_every_token_is_counted(searched):
    for record in searched:
        meta = record["meta"]
        for tree, count, asked in zip(meta["trees"], meta["generated_tokens"], meta["scored_prefixes"]):
            assert sum(node["tokens"] for node in tree) == count and len(tree) == asked
            parents = {node["parent"] for node in tree}
            assert len(tree) == 3 * len(parents), "three continuations of everything that was gone on from"
        assert meta["generated_tokens"][0] >= len(meta["token_ids"][0] or [])


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_neighbors_and_batches_do_not_matter(searched, batch_size):
    again = guided_lists(policy(), PROMPTS[::-1], 2, taste, step="sentence", width=3, backtrack=2, seed=3, chat=False,
                         settings=SamplingSettings(14, stop=("!",)), progress=False, batch_size=batch_size)
    alone = [{key: value for key, value in r["meta"].items() if key not in ("trees", "logps")} for r in searched]
    # the prompt that is there twice counts on in the order in which it comes
    for record in again:
        if record["prompt"] != PROMPTS[1]:
            own = searched[PROMPTS.index(record["prompt"])]
            meta = {key: value for key, value in record["meta"].items() if key != "logps"}
            assert record["completions"] == own["completions"] and meta in alone


def test_columns_travel_with_their_candidate(searched, tmp_path):
    save_lists(searched, tmp_path / "lists.jsonl")
    for record, before in zip(load_lists(tmp_path / "lists.jsonl"), searched):
        one = select_candidates(record, [1])["meta"]
        for name in ("step_scores", "step_ends", "generated_tokens", "scored_prefixes", "backtracks", "trees"):
            assert one[name] == [before["meta"][name][1]]
        assert one["sampling"] == before["meta"]["sampling"] and one["sampling"]["width"] == 3


# --- beside best-of-n ------------------------------------------------------------------------------------------------


def test_best_of_n_is_that_of_all_combinations():
    draw = np.random.default_rng(0)
    for trial in range(20):
        size = int(draw.integers(1, 7))
        values, scores = draw.normal(size=size), draw.integers(0, 4, size)  # ties
        for n in range(1, size + 1):
            best = [np.mean([values[i] for i in c if scores[i] == max(scores[j] for j in c)])
                    for c in itertools.combinations(range(size), n)]
            assert math.isclose(best_of_n(values, scores, n), np.mean(best), abs_tol=1e-12)
            if n < size:
                mixed = 0.75 * best_of_n(values, scores, n) + 0.25 * best_of_n(values, scores, n + 1)
                assert math.isclose(best_of_n(values, scores, n + 0.25), mixed, abs_tol=1e-12)


def listed(prompt, texts, counts=None, tokens=4):
    """Texts "0.5" score themselves."""
    meta = {"token_ids": [[5] * tokens for _ in texts]} | ({"generated_tokens": counts} if counts else {})
    return make_record(prompt, texts, meta=meta)


def value(prompts, texts):
    return [float(t) for t in texts]


def test_report_by_hand():
    plain = [listed("a", ["1", "2", "3"]), listed("b", ["0", "0", "6"], tokens=8)]
    guided = [listed("b", ["4"], [12]), listed("a", ["3", "2"], [6, 10])]  # in another order
    [row] = guided_report(guided, plain, value)
    a, b = (2 + 3 + 3) / 3, (2 + (0 + 6 + 6) / 3) / 2  # best of 2; best of 1.5
    assert (row["n"], row["tokens"], row["plain"], row["guided"]) == (1.75, 10.0, 2.0, 3.25)
    assert math.isclose(row["best_of_n"], (a + b) / 2) and math.isclose(row["difference"], 3.25 - (a + b) / 2)
    assert row["low"] < row["difference"] < row["high"] and row["method"] == "t"


def test_report_chooses_by_the_guide_and_values_by_the_judge():
    rows = guided_report([listed("a", ["1"], [8])], [listed("a", ["1", "2", "3"])], value,
                         {"itself": value, "against": lambda p, t: [-float(x) for x in t]})
    assert [row["judge"] for row in rows] == ["itself", "against"]
    assert math.isclose(rows[0]["best_of_n"], 8 / 3) and math.isclose(rows[1]["best_of_n"], -8 / 3)
    assert rows[0]["low"] is None and rows[0]["prompts"] == 1  # one prompt has no interval


def test_report_asks_for_a_score_of_every_answer():
    class Abstains:
        abstains = True

        def __call__(self, prompts, texts):
            return [None if t == "2" else float(t) for t in texts]

    guided, plain = [listed("a", ["1"], [8])], [listed("a", ["1", "2", "3"])]
    with pytest.raises(LireError, match="without a score"):
        guided_report(guided, plain, value, {"judge": Abstains()})
    with pytest.raises(LireError, match="without a score"):
        guided_report(guided, plain, Abstains())
    with pytest.raises(LireError, match="judges"):
        guided_report(guided, plain, value, [value])


@pytest.mark.parametrize("guided, plain, says", [
    ([listed("a", ["1"], [40])], [listed("a", ["1", "2"])], "10 or more"),
    ([listed("a", ["1"], [8])], [listed("b", ["1", "2"])], "not the same prompts"),
    ([listed("a", ["1"])], [listed("a", ["1", "2"])], "tokens were not counted"),
    ([listed("a", ["1"], [8])], [make_record("a", ["1", "2"])], "tokens are not known"),
    ([], [], "no list"),
])
def test_report_says_what_is_wrong(guided, plain, says):
    with pytest.raises(LireError, match=re.escape(says)):
        guided_report(guided, plain, value)


@pytest.mark.parametrize("values, scores, n", [([1, 2], [1], 1), ([1, 2], [1, 2], 0.5), ([1, 2], [1, 2], 3),
                                               ([1, math.nan], [1, 2], 1), ([], [], 1), ([1, 2], [1, 2], math.nan)])
def test_best_of_n_says_what_is_wrong(values, scores, n):
    with pytest.raises(LireError):
        best_of_n(values, scores, n)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide, says", [
    (lambda p, t: [0.0] * (len(t) - 1), "wrong number of scores"), (lambda p, t: [math.nan] * len(t), "not finite"),
    (lambda p, t: ["good"] * len(t), "not a number"), (lambda p, t: 1 / 0, "ZeroDivisionError"),
    (lambda p, t: None, "TypeError")])
def test_a_guide_that_answers_wrongly_is_named_with_its_prompt(guide, says):
    with pytest.raises(RewardError, match=says) as error:
        guided_lists(policy(), [{"id": "mine", "prompt": "abc"}], 1, guide, step=2, chat=False, progress=False)
    assert "'mine'" in str(error.value)


def test_of_many_prompts_the_one_is_named():
    guide = lambda prompts, texts: [math.nan if p == "z" else 0.0 for p in prompts]  # noqa: E731
    prompts = [{"id": f"list-{k}", "prompt": p} for k, p in enumerate(["abc", "z", "Hello"])]
    with pytest.raises(RewardError, match="list-1.*finite number"):
        guided_lists(policy(), prompts, 2, guide, step=2, chat=False, progress=False)


class Served:
    """A sampler that is no local model."""

    def sample(self, prompts, num_candidates, settings, seed):
        raise AssertionError("was asked")


@pytest.mark.parametrize("bad, says", [
    (dict(step=0), "step"), (dict(step=2.5), "step"), (dict(step="word"), "step"), (dict(step=True), "step"),
    (dict(width=0), "width"), (dict(width=2.0), "width"), (dict(width=None), "width"),
    (dict(backtrack=-1), "backtrack"), (dict(backtrack="2"), "backtrack"), (dict(guide="vader"), "not a reward"),
    (dict(settings={"max_new_tokens": 3}), "SamplingSettings"), (dict(num_candidates=0), "num_candidates"),
    (dict(settings=SamplingSettings(temperature=0)), "nothing to choose from"), (dict(prompts=[]), "no prompt"),
    (dict(policy="http://127.0.0.1:1/v1"), "step by step"), (dict(policy=Served()), "step by step"),
    (dict(settings=SamplingSettings(300)), "too long for the model")])
def test_bad_options_are_said_before_the_work(bad, says):
    def unasked(prompts, texts):
        raise AssertionError("the guide was asked")

    good = dict(policy=policy(), prompts=["abc"], num_candidates=1, guide=unasked, chat=False)
    with pytest.raises(LireError, match=says):
        guided_lists(**{**good, **bad})


def test_a_sampler_of_ones_own_is_taken():
    model, words = policy()
    local = LocalSampler(model, words, batch_size=2, progress=False)
    common = dict(step=2, settings=SamplingSettings(6), chat=False)
    assert (drawn(guided_lists(local, PROMPTS, 1, taste, **common))
            == drawn(guided_lists((model, words), PROMPTS, 1, taste, progress=False, **common)))


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    start, prompts = make_start(tmp_path / "start"), tmp_path / "prompts.txt"
    prompts.write_text("One day\nA film\n")
    common = ["sample", "--prompts", str(prompts), "--policy", str(start), "--max-new-tokens", "6",
              "--num-candidates", "2"]
    guided = [*common, "--guide", "length", "--step", "2", "--width", "3", "--out", str(tmp_path / "guided.jsonl")]
    assert main([*common, "--out", str(tmp_path / "plain.jsonl")]) == 0 and main(guided) == 0
    configs = [json.loads((tmp_path / f"{name}.jsonl.config.json").read_text()) for name in ("plain", "guided")]
    assert not {"guide", "step", "width", "backtrack"} & configs[0].keys()
    assert (configs[1]["step"], configs[1]["width"], configs[1]["backtrack"]) == (2, 3, 0)
    made = [r["meta"] for r in load_lists(tmp_path / "guided.jsonl")]
    assert [len(m["step_scores"][0]) for m in made] == [3, 3] and made[0]["generated_tokens"] == [18, 18]
    capsys.readouterr()
    assert main(guided) == 0 and "is there already" in capsys.readouterr().out
    assert main([*guided[:-4], "--width", "2", *guided[-2:]]) == 2
    assert "folder holds" in capsys.readouterr().err  # made from something else
    for wrong, says in ((["--width", "3"], "without a guide"), (["--guide", "length"], "needs a width"),
                        (["--guide", "length", "--width", "3", "--step", "0"], "not a step"),
                        (["--guide", "length", "--width", "3", "--policy", "http://127.0.0.1:1/v1"], "step by step")):
        kept = [a for a in common if a not in ("--policy", str(start))] if "--policy" in wrong else common
        assert main([*kept, *wrong, "--out", str(tmp_path / "wrong.jsonl")]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1 and not (tmp_path / "wrong.jsonl.config.json").exists()

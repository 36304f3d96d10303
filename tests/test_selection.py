"""Selection: sizes, seeds, what is kept, what travels, and covering a pool against every subset of it."""
import math
from itertools import combinations

import numpy as np
import pytest

from lire_nb import make_record, select
from lire_nb.base.errors import LireError
from lire_nb.selection import Categories, cover, learn_categories, WAYS

POINTS = np.random.default_rng(7).normal(size=(60, 3))


def embed(texts):
    return np.array([POINTS[int(t.split()[-1])] for t in texts])


def pool(name: str, count: int = 10, scored: bool = True, first: int = 0) -> dict:
    numbers = [first + k for k in range(count)]
    rewards = [round(math.sin(3.0 * k + len(name)), 3) for k in numbers] if scored else None
    return make_record(f"Question {name}", [f" answer {k}" for k in numbers], rewards, [f"policy:{k}" for k in numbers],
                       id=name, meta={"token_ids": [[k] for k in numbers], "note": "of the prompt"})


LISTS = [pool("a"), pool("bb", 13, first=9), pool("ccc", 10, first=30), pool("dddd", 12, first=45)]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_as_many_as_asked_for_from_the_pool_with_all_that_is_theirs(how, count):
    for before, after in zip(LISTS, select(LISTS, count, how, embed=embed)):
        rows = {c: j for j, c in enumerate(before["completions"])}
        places = [rows[c] for c in after["completions"]]
        assert places == sorted(set(places)) and len(places) == count
        for name in ("rewards", "sources"):
            assert after[name] == [before[name][j] for j in places]
        assert after["meta"] == {"token_ids": [before["meta"]["token_ids"][j] for j in places], "note": "of the prompt"}
        assert (after["id"], after["prompt"]) == (before["id"], before["prompt"])


@pytest.mark.parametrize("how", WAYS)
def test_the_seed_decides_and_the_order_of_lists_does_not(how):
    one = select(LISTS, 4, how, seed=3, embed=embed)
    assert select(LISTS, 4, how, seed=3, embed=embed) == one == select(LISTS[::-1], 4, how, seed=3, embed=embed)[::-1]
    if how != "category":  # its kinds are those of all lists
        assert one == [select(r, 4, how, seed=3, embed=embed) for r in LISTS]
    if how == "random":
        assert one != select(LISTS, 4, how, seed=4, embed=embed)


def test_categories_learned_before_make_a_list_independent_of_the_others():
    values = learn_categories(LISTS, 4, embed=embed)
    alone = [select(r, 4, "category", seed=3, embed=embed, values=values) for r in LISTS]
    assert alone == select(LISTS, 4, "category", seed=3, embed=embed, values=values)


@pytest.mark.parametrize("how", ["best_worst", "kmedoids"])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_the_best_and_the_worst_are_kept(how, count):
    for before, after in zip(LISTS, select(LISTS, count, how, embed=embed)):
        assert {max(before["rewards"]), min(before["rewards"])} <= set(after["rewards"])


def test_a_random_choice_is_uniform():
    """Each of 10 candidates is among 3 of them in 3 of 10 draws: chi-square of 2,000 draws below its 99.9 % point."""
    counts = np.zeros(10)
    for seed in range(2000):
        counts[[int(c.split()[-1]) for c in select(LISTS[0], 3, seed=seed)["completions"]]] += 1
    assert ((counts - 600) ** 2 / 600).sum() / (1 - 3 / 10) * 9 / 10 < 27.9


def cost(points, members):
    return sum(min(math.dist(x, points[j]) for j in members) for x in points)


def test_cover_against_every_subset():
    """Never better than the best subset (else one of the two is wrong), nearly always as good."""
    rng, exact = np.random.default_rng(1), 0
    for trial in range(60):
        points, kept = rng.normal(size=(10, 2)), [0, 3][: trial % 3]
        free = [j for j in range(10) if j not in kept]
        best = min(cost(points, [*kept, *more]) for more in combinations(free, 4 - len(kept)))
        found = cover(points, 4, kept)
        assert set(kept) <= set(found) and len(set(found)) == 4
        assert best - 1e-9 <= cost(points, found) <= 1.25 * best
        exact += cost(points, found) < best + 1e-9
        swaps = [cost(points, {*found} - {out} | {j}) for out in {*found} - {*kept} for j in free if j not in found]
        assert min(swaps) >= cost(points, found) - 1e-9  # no exchange is left
    assert exact >= 54, exact


def test_cover_takes_one_of_each_clump_and_no_copy_where_there_are_others():
    clumps = np.repeat(np.array([[0.0, 0], [9, 0], [0, 9], [9, 9]]), [9, 1, 3, 1], axis=0)
    assert len(np.unique(clumps[cover(clumps, 4)], axis=0)) == 4
    assert cover(np.zeros((5, 2)), 3) == [0, 1, 2]  # nothing but copies


def test_kmedoids_without_rewards_covers_alone():
    record = pool("a", scored=False)
    points = embed(record["completions"])
    found = select(record, 3, "kmedoids", embed=embed)
    best = min(cost(points, some) for some in combinations(range(10), 3))
    members = [record["completions"].index(c) for c in found["completions"]]
    assert cost(points, members) == pytest.approx(best)


def test_the_worth_of_a_kind_by_hand():
    """Two kinds, told apart by their point; rewards are taken within their list, so a generous prompt counts nothing."""
    place = lambda texts: np.array([[float("good" in t)] for t in texts])  # noqa: E731
    lists = [make_record("p", [" good", " bad"], [11.0, 9.0], id="p"), make_record("q", [" good", " bad", " bad"],
                                                                                  [0.0, 0.0, 3.0], id="q")]
    values = learn_categories(lists, 5, embed=place)
    good, bad = values.kinds(np.array([[1.0], [0.0]]))
    gains = {"good": [1.0, -1.0], "bad": [-1.0, -1.0, 2.0]}
    sigma = math.sqrt(sum(g * g for row in gains.values() for g in row) / 5)
    for kind, name in ((good, "good"), (bad, "bad")):
        n = len(gains[name])
        assert values.means[kind] == pytest.approx(sum(gains[name]) / n / sigma)
        assert values.worth()[kind] == pytest.approx(sum(gains[name]) / n / sigma + math.sqrt(2 * math.log(5) / n))


def test_a_list_is_filled_kind_by_kind_and_the_best_of_a_kind_first():
    place = lambda texts: np.array([[float(t.split()[0])] for t in texts])  # noqa: E731
    values = Categories(np.array([[0.0], [1.0], [2.0]]), np.array([0.0, 2.0, 1.0]), np.array([9, 9, 9]))
    record = make_record("p", ["0 a", "0 b", "1 a", "1 b", "1 c", "2 a"], [9.0, 8.0, 1.0, 3.0, 2.0, 0.0])
    for count, expected in ((2, "1 b,2 a"), (3, "0 a,1 b,2 a"), (4, "0 a,1 b,1 c,2 a"), (5, "0 a,0 b,1 b,1 c,2 a")):
        found = select(record, count, "category", embed=place, values=values)
        assert ",".join(found["completions"]) == expected
    never = Categories(values.centers, values.means, np.array([9, 9, 0]))
    assert "2 a" in select(record, 2, "category", embed=place, values=never)["completions"]


@pytest.mark.parametrize("change, says", [
    ({"count": 11}, "list 'a': fewer candidates than asked for"), ({"count": 1}, "too few"),
    ({"count": 2.0}, "not a whole number"), ({"count": True}, "not a whole number"), ({"count": None}, "not a whole"),
    ({"how": "best"}, "unknown way"), ({"how": None}, "unknown way"), ({"pool": []}, "no list"),
    ({"pool": [pool("a", scored=False)], "how": "best_worst"}, "list 'a': best_worst chooses by rewards"),
    ({"pool": [pool("a", scored=False)], "how": "category"}, "list 'a': category chooses by rewards"),
    ({"pool": {**pool("a"), "rewards": [math.nan] * 10}}, "not a finite number"),
    ({"pool": {"id": "a"}}, "missing field"), ({"pool": {**pool("a"), "rewards": [1.0]}}, "unequal lengths"),
    ({"how": "kmedoids", "embed": lambda texts: [[math.nan]] * len(texts)}, "not one point for each text"),
    ({"how": "kmedoids", "embed": lambda texts: [1.0] * len(texts)}, "not one point for each text"),
    ({"values": 3, "how": "category"}, "not categories"), ({"seed": -1}, "seed"),
    ({"values": Categories(np.zeros((1, 2)), np.zeros(1), np.ones(1)), "how": "category"}, "another embedding"),
    ({"values": Categories(np.zeros((1, 3)), np.zeros(1), np.ones(1))}, "has no effect here"),
])
def test_bad_input_is_one_line(change, says):
    options = {"pool": LISTS[:1], "count": 3, "embed": embed} | change
    with pytest.raises(LireError, match=says) as e:
        select(options.pop("pool"), options.pop("count"), **options)
    assert "\n" not in str(e.value)


def test_the_command_line_chooses(tmp_path, monkeypatch):
    """Random from samples, by rewards from scores; what is missing is one line before the work."""
    from tiny_policy import make_start

    from lire_nb.cli import main
    from lire_nb.lists import load_lists

    monkeypatch.chdir(tmp_path)
    make_start(tmp_path / "start")
    (tmp_path / "p.txt").write_text("film one\nfilm two\n")
    ask = ["sample", "--policy", "./start", "--prompts", "p.txt", "--max-new-tokens", "4", "--num-candidates", "3"]
    assert main([*ask, "--pool-size", "6", "--select", "random", "--out", "three.jsonl"]) == 0
    assert main([*ask[:-1], "6", "--out", "six.jsonl"]) == 0
    three, six = load_lists("three.jsonl"), load_lists("six.jsonl")
    assert list(three) == select(six, 3, "random")
    score = ["score", "--lists", "six.jsonl", "--reward", "length"]
    assert main([*score, "--select", "best_worst", "--num-candidates", "3", "--out", "kept.jsonl"]) == 0
    lengths = [[float(len(c)) for c in r["completions"]] for r in six]
    for before, after in zip(lengths, load_lists("kept.jsonl")):
        assert len(after["rewards"]) == 3 and {max(before), min(before)} <= set(after["rewards"])
    assert main([*ask, "--pool-size", "6", "--select", "best_worst", "--out", "x.jsonl"]) == 2
    assert main([*ask, "--pool-size", "2", "--select", "random", "--out", "x.jsonl"]) == 2
    assert main([*ask, "--pool-size", "6", "--out", "x.jsonl"]) == 2
    assert main([*score, "--select", "random", "--out", "x.jsonl"]) == 2
    from lire_nb.lists import save_lists

    mixed = [dict(six[0]), select(dict(six[1]), 2, "random")]
    save_lists(mixed, "mixed.jsonl")
    short = ["score", "--lists", "mixed.jsonl", "--reward", "length", "--select", "random", "--num-candidates", "3"]
    assert main([*short, "--out", "x.jsonl"]) == 2  # one pool is too small
    assert not (tmp_path / "x.jsonl").exists()
    mixed[1]["meta"] = mixed[1]["meta"] | {"failed": {"2": "no answer"}}
    save_lists(mixed, "mixed.jsonl")
    assert main([*short, "--out", "lost.jsonl"]) == 0  # what a server did not answer is another matter
    assert [len(r["completions"]) for r in load_lists("lost.jsonl")] == [3, 2]


@pytest.mark.parametrize("embed, says", [
    ("minilm", "cannot be called"), (7, "cannot be called"), (lambda texts: ["a"] * len(texts), "not one point"),
    (lambda texts: [[1.0], [1.0, 2.0]][:len(texts)], "not one point"), (lambda texts: np.zeros((len(texts), 0)), "not one")])
def test_an_embedding_that_gives_no_points(embed, says):
    record = {"id": "x", "prompt": "q", "completions": ["a", "b", "c"], "rewards": [1.0, 2.0, 3.0],
              "sources": ["m"] * 3, "meta": {}}
    with pytest.raises(LireError, match=says):
        select(record, 2, "kmedoids", embed=embed)


def test_an_embedding_may_give_tensors():
    import torch

    record = {"id": "x", "prompt": "q", "completions": ["a", "b", "c", "d"], "rewards": [None] * 4,
              "sources": ["m"] * 4, "meta": {}}
    points = torch.tensor([[0.0], [0.1], [5.0], [5.1]], dtype=torch.bfloat16, requires_grad=True)
    kept = select(record, 2, "kmedoids", embed=lambda texts: points[[ord(t) - 97 for t in texts]])
    assert len({*kept["completions"]} & {"a", "b"}) == 1

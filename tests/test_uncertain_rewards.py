"""Feasible rewards against longest paths and vertices found by brute force; ensembles, mixtures and shifts by hand."""
import itertools
import math

import numpy as np
import pytest
import torch

from lire_nb.base.errors import LireError
from lire_nb.feasible_rewards import lp_rewards
from lire_nb.records import make_record, merge_lists
from lire_nb.rewards import RewardError, score_lists
from lire_nb.rivals import LOSSES
from lire_nb.uncertain_rewards import (
    contrastive_rewards, mix_rewards, prompt_means, RewardEnsemble, train_reward_ensemble,
)


def ends(record: dict) -> np.ndarray:
    return np.array([record["meta"]["reward_low"], record["meta"]["reward_high"]]).T


def pair(better: str, worse: str, id: str) -> dict:
    return make_record("q", [better, worse], rewards=[1, 0], id=id)


# ---------------------------------------------------------------- linear programs


def by_paths(rewards: list, margin: float) -> np.ndarray:
    "The interval by longest chains: so many must lie below, so many above."
    below = [len({r for r in rewards if r < own}) for own in rewards]
    above = [len({r for r in rewards if r > own}) for own in rewards]
    return np.array([[b * margin, 1 - a * margin] for b, a in zip(below, above)])


@pytest.mark.parametrize("seed", range(8))
def test_intervals_are_those_of_the_chains(seed):
    draw = np.random.default_rng(seed)
    rewards = draw.integers(0, 4, size=draw.integers(2, 7)).tolist()
    if len(set(rewards)) < 2:
        rewards[0] += 1
    record = make_record("q", [f"a{i}" for i in range(len(rewards))], rewards, id="x")
    found = lp_rewards([record], margin=0.13)[0]
    # a candidate with equal grades everywhere else is still compared with those of other grades
    np.testing.assert_allclose(ends(found), by_paths(rewards, 0.13), atol=1e-6)
    for i, j in itertools.permutations(range(len(rewards)), 2):
        if rewards[i] > rewards[j]:
            assert found["rewards"][i] >= found["rewards"][j] + 0.13 - 1e-6
    assert all(low <= r <= high for r, (low, high) in zip(found["rewards"], ends(found)))


def test_slack_against_a_grid():
    "Three candidates in a circle with one vote twice: least slack and intervals by trying every point of a grid."
    votes = [(0, 1), (1, 2), (2, 0), (0, 1)]
    names, margin, steps = "abc", 0.25, 21
    grid = np.array(list(itertools.product(np.linspace(0, 1, steps), repeat=3)))
    cost = sum(np.maximum(0, margin - (grid[:, i] - grid[:, j])) for i, j in votes)
    best = grid[cost <= cost.min() + 1e-9]
    found = lp_rewards([pair(names[i], names[j], str(n)) for n, (i, j) in enumerate(votes)], margin=margin, slack=True)
    assert sum(r["meta"]["reward_slack"] for r in found) == pytest.approx(cost.min(), abs=1e-6)
    for record in found:
        for text, (low, high) in zip(record["completions"], ends(record)):
            column = best[:, names.index(text)]
            np.testing.assert_allclose([low, high], [column.min(), column.max()], atol=1e-6)


def test_the_error_names_the_circle_and_nothing_else():
    lists = [pair("a", "b", "one"), pair("b", "c", "two"), pair("c", "a", "three"), pair("d", "a", "four"),
             pair("d", "b", "five")]
    with pytest.raises(LireError, match="3 comparisons contradict each other") as error:
        lp_rewards(lists)
    assert all(f"'{id}'" in str(error.value) for id in ("one", "two", "three"))
    assert not any(f"'{id}'" in str(error.value) for id in ("four", "five"))
    assert lp_rewards([lists[n] for n in (0, 1, 3, 4)])  # without one of the three there is no contradiction


def test_a_demonstration_stands_on_top_and_columns_travel():
    record = make_record("q", ["a", "b", "c"], [None, 1, 0], ["human", "m", "m"], id="d")
    done = lp_rewards([record], margin=0.2)[0]
    np.testing.assert_allclose(ends(done), [[0.2, 1], [0.2, 1], [0, 0.8]], atol=1e-6)
    assert len(merge_lists([done, make_record("q", ["e"], [0.5], id="d")])[0]["meta"]["reward_low"]) == 4
    against = [record, pair("b", "a", "p")]
    with pytest.raises(LireError, match="contradict"):  # the demonstration lost a comparison
        lp_rewards(against)


def test_nobody_spoke_of_it():
    record = make_record("q", ["a", "b", "c"], [1, 0, None], id="x")
    done = lp_rewards([record])[0]
    assert done["rewards"][2] is None and ends(done)[2].tolist() == [0, 1]


def test_features_in_one_dimension_by_hand():
    "R = w·x + b within [0, 1] over x in 0 … 2, and w ≥ margin: the middle lies between margin and 1 − margin."
    lists = [make_record("p", ["2", "1"], [1, 0], id="p"), make_record("r", ["0"], id="r")]
    done = lp_rewards(lists, margin=0.3, features=lambda p, c: [[float(x)] for x in c])
    np.testing.assert_allclose(ends(done[0]), [[0.6, 1], [0.3, 0.7]], atol=1e-6)
    np.testing.assert_allclose(ends(done[1]), [[0, 0.4]], atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.0, 5.0), (0.0, 1e-6), (0.0, 1e6), (7.0, 7.0 + 1e-3)])
def test_the_units_of_the_bounds_do_not_matter(bounds):
    "The same program in other units has the same solution in those units."
    size, record = bounds[1] - bounds[0], make_record("q", ["a", "b", "c"], [2, 1, 0], id="x")
    found = lp_rewards([record], margin=0.2 * size, bounds=bounds)[0]
    np.testing.assert_allclose((ends(found) - bounds[0]) / size, [[0.4, 1], [0.2, 0.8], [0, 0.6]], atol=1e-5)
    with pytest.raises(LireError, match="do not fit"):
        lp_rewards([record], margin=0.6 * size, bounds=bounds)
    with pytest.raises(LireError, match="contradict"):
        lp_rewards([pair("a", "b", "1"), pair("b", "a", "2")], margin=1e-4 * size, bounds=bounds)
    circle = [pair("a", "b", "1"), pair("b", "a", "2")]
    paid = lp_rewards(circle, margin=0.2 * size, bounds=bounds, slack=True)
    assert sum(r["meta"]["reward_slack"] for r in paid) == pytest.approx(0.4 * size, rel=1e-4)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e6])
def test_the_units_of_the_features_do_not_matter(size):
    record = make_record("q", ["a", "b"], [1, 0], id="x")
    found = lp_rewards([record], features=[[size], [0.0]], largest_weight=1 / size)
    np.testing.assert_allclose(ends(found[0]), [[0.1, 1], [0, 0.9]], atol=1e-5)
    with pytest.raises(LireError, match="do not fit.*raise largest_weight"):
        lp_rewards([record], features=[[size], [0.0]], largest_weight=0.05 / size)


def test_one_text_has_one_description():
    lists = [make_record("q", ["a", "b"], [1, 0], id="x"), make_record("q", ["a", "c"], [1, 0], id="y")]
    with pytest.raises(LireError, match="two descriptions"):
        lp_rewards(lists, features=[[1.0], [0.0], [2.0], [0.0]])


@pytest.mark.parametrize("options, word", [
    ({"margin": -1}, "margin"), ({"margin": "much"}, "margin"), ({"bounds": (0, math.inf)}, "bounds"),
    ({"take": None}, "take"), ({"slack": 1}, "slack"), ({"features": "all"}, "features"),
    ({"features": [[math.nan]] * 2}, "features"), ({"features": [[1.0], [1.0, 2.0]]}, "features"),
    ({"largest_weight": 0}, "largest_weight"), ({"margin": 4e-8}, "margin"),
    ({"margin": 1e-3, "bounds": (0, 1e3)}, "margin")])
def test_bad_options(options, word):
    with pytest.raises(LireError, match=word):
        lp_rewards([pair("a", "b", "x")], **options)


@pytest.mark.parametrize("lists", [[], [make_record("q", ["a"], [1.0])], [make_record("q", ["a", "b"], [1.0, 1.0])]])
def test_nothing_compared(lists):
    with pytest.raises(LireError, match="nothing is compared"):
        lp_rewards(lists)


# ---------------------------------------------------------------- ensembles


def words(prompts, completions):
    return [float(len(c.split())) for c in completions]


def letters(prompts, completions):
    return [float(len(c)) for c in completions]


TEXTS = (["q"] * 3, ["a", "bb c", "d e f"])


def test_one_member_is_itself():
    for k in (0.0, 0.7, 9.0):
        assert RewardEnsemble([letters], k=k)(*TEXTS) == letters(*TEXTS)
    calm = RewardEnsemble([letters], k=3).calibrate([make_record("q", TEXTS[1])])
    assert calm(*TEXTS) == letters(*TEXTS)


def test_mean_less_doubt_by_hand():
    a, b = np.array(words(*TEXTS)), np.array(letters(*TEXTS))
    np.testing.assert_allclose(RewardEnsemble([words, letters], k=0.5)(*TEXTS), (a + b) / 2 - 0.5 * np.abs(a - b) / 2)


def test_confidence_weighs():
    class Sure:
        def __init__(self, value, nats):
            self.value, self.nats = value, nats

        def __call__(self, prompts, completions):
            return [self.value] * len(completions)

        def confidence(self, prompts, completions):
            return [self.nats] * len(completions)

    def score(*members):
        return RewardEnsemble(members, k=0, by_confidence=True)(["q"], ["a"])[0]

    assert score(Sure(1.0, 3.0), Sure(5.0, 1.0)) == pytest.approx(2.0)
    assert score(Sure(1.0, 0.0), Sure(5.0, 0.0)) == pytest.approx(3.0)  # nobody is sure


@pytest.mark.parametrize("members, options, word", [
    ([], {}, "rewards"), (None, {}, "rewards"), ([3], {}, "rewards"), ([words], {"k": -1}, "k"),
    ([words], {"k": math.nan}, "k"), ([words], {"scales": [(1, 0), (1, 0)]}, "scales"),
    ([words], {"by_confidence": True}, "by_confidence")])
def test_no_ensemble(members, options, word):
    with pytest.raises(LireError, match=word):
        RewardEnsemble(members, **options)


def test_a_bad_member_is_named():
    def short(prompts, completions):
        return [1.0]

    with pytest.raises(RewardError, match="member 'short'"):
        score_lists([make_record("q", ["a", "b"])], RewardEnsemble([words, short]))


# ---------------------------------------------------------------- mixtures and shifts


def test_mixture_by_hand():
    record = make_record("q", ["a", "b", "c"], [3, 1, 2], meta={"one": [0, 5, 1], "two": [9.0, 9.0, 9.0]})
    assert mix_rewards([record], {"rewards": 1, "one": 1}, "rank")[0]["rewards"] == [0.5, 0.5, 0.5]
    alone = mix_rewards([record], {"one": 2}, "zscore")[0]["rewards"]
    with_mute = mix_rewards([record], {"one": 1, "two": 1}, "zscore")[0]["rewards"]  # two has one opinion about all
    np.testing.assert_allclose(with_mute, np.array(alone) / 2)


@pytest.mark.parametrize("how", ["zscore", "rank"])
def test_what_a_sum_rounds_is_no_opinion(how):
    "0.1 + 0.2 is not 0.3: a judge who says both means one thing."
    mute, noisy = ([0.3, x, 0.3] for x in (0.3, 0.1 + 0.2))
    assert mute != noisy
    one, two = (mix_rewards([make_record("q", ["a", "b", "c"], [2.0, 1.9, 0.0], meta={"v": v})],
                            {"rewards": 1, "v": 1}, how)[0]["rewards"] for v in (mute, noisy))
    assert one == two


def test_rounding_has_no_vote_in_an_ensemble_or_among_kinds():
    from lire_nb.selection import learn_categories

    noisy = [0.3, 0.1 + 0.2, 0.3]
    record = make_record("q", ["a", "b", "c"], noisy, id="x")
    with pytest.raises(LireError, match="the same score"):
        RewardEnsemble([lambda p, c: [0.0, 1.0, 2.0], lambda p, c: noisy]).calibrate([record])
    kinds = learn_categories([record], 2, embed=lambda texts: [[float(ord(t))] for t in texts])
    assert np.abs(kinds.means).max() < 1e-9


def test_only_the_ratio_of_weights_counts():
    record = make_record("q", ["a", "b"], [1, 2], meta={"one": [5, 1]})
    large, small = (mix_rewards([record], {"rewards": w, "one": w}, "none")[0]["rewards"] for w in (1.5e308, 1.0))
    assert large == small == [3.0, 1.5]


@pytest.mark.parametrize("weights, how, word", [
    ({}, "rank", "weights"), ({"one": 0}, "rank", "weights"), ({"one": 1}, "mean", "how"), ({"no": 1}, "rank", "no"),
    ({"text": 1}, "rank", "text"), (["one"], "rank", "weights")])
def test_bad_mixtures(weights, how, word):
    record = make_record("q", ["a", "b"], [1, 2], meta={"one": [1, 2], "text": ["x", "y"]})
    with pytest.raises(LireError, match=word):
        mix_rewards([record], weights, how)


def test_means_and_shift():
    lists = [make_record("q", ["a", "b"], [1.0, None], id="x"), make_record("q", ["c"], [4.0], id="x")]
    assert prompt_means(lists) == {"x": 2.5}
    assert contrastive_rewards(lists, lists)["rewards"][:] == [[-1.5, None], [1.5]]
    for bad in ({}, {"x": None}, {"x": math.nan}, None, 3.0, "file"):
        with pytest.raises(LireError, match="no baseline"):
            contrastive_rewards(lists, bad)
    with pytest.raises(LireError, match="another prompt under this id"):
        contrastive_rewards(lists, [make_record("another", ["a"], [1.0], id="x")])
    with pytest.raises(LireError, match="not a record"):
        contrastive_rewards(lists, [1, 2])


def test_an_ensemble_that_cannot_be_is_said_before_its_members_are_trained(monkeypatch):
    monkeypatch.setattr("lire_nb.uncertain_rewards.train_reward_model", lambda *a, **k: pytest.fail("trained"))
    lists = [make_record("q", ["a", "b"], [1, 0])]
    for options, word in (({"k": -1}, "k"), ({"k": "x"}, "k"), ({"by_confidence": True}, "latent")):
        with pytest.raises(LireError, match=word):
            train_reward_ensemble(lists, **options)


@pytest.mark.parametrize("text", ["{", "[]", '{"members": 2}', '{"members": 1, "scales": 3}'])
def test_a_broken_ensemble_file_is_named(tmp_path, text):
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(LireError, match="ensemble.json"):
        RewardEnsemble.load(tmp_path)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_shift_of_a_prompt_leaves_the_gradient(name):
    "In dyadic numbers, so that subtracting is exact; the default of every loss."
    if name == "lipo":
        pytest.skip("reads rewards in [0, 1] unless told to rank them; see the page")
    torch.manual_seed(0)
    logps, ref = torch.randn(3, 4, dtype=torch.float64) - 9, torch.randn(3, 4, dtype=torch.float64) - 9
    rewards = torch.randint(0, 64, (3, 4)).double() / 64

    def gradient(r):
        x = logps.clone().requires_grad_()
        loss = LOSSES[name].fn(x, r, ref_logps=ref, lengths=torch.full_like(x, 5.0)).sum()
        return torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(gradient(rewards - torch.tensor([[0.5], [-2.0], [8.0]])), gradient(rewards),
                               rtol=1e-12, atol=1e-14)

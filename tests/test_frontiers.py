"""Rules for comparing at an equal distance: against enumeration, drawing, and worlds whose answer is known."""
import itertools
import math

import numpy as np
import pytest

from lire_nb.base.errors import LireError
from lire_nb.frontiers import (
    best_of_n_course, best_of_n_kl, best_of_n_weights, check_judge, choose_under_cap, common_distance, gain_at_distance,
    spread_gains, win_probability, within_spread,
)


def by_enumeration(values, scores, n):
    "The mean over all subsets of n, and over all best ones of each."
    found = []
    for picked in itertools.combinations(range(len(values)), n):
        top = max(scores[i] for i in picked)
        best = [values[i] for i in picked if scores[i] == top]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@pytest.mark.parametrize("levels", [2, 3, 100])  # few levels: many ties
def test_best_of_n_is_the_mean_over_all_subsets(levels):
    draw = np.random.default_rng(levels)
    for K in (1, 2, 5, 8):
        scores, values = draw.integers(levels, size=K).astype(float), draw.normal(size=K)
        for n in range(1, K + 1):
            weights = best_of_n_weights(scores, n)
            assert math.isclose(weights.sum(), 1) and (weights >= 0).all()
            assert math.isclose(weights @ values, by_enumeration(values, scores, n), abs_tol=1e-12)


def test_best_of_n_is_unbiased_over_worlds():
    """The expected gold of the best of 3 by proxy, where both take two values: by all outcomes, and by the estimator
    from 5 samples, averaged over all samples that can be drawn."""
    outcomes = [(0.0, 1.0, 0.5), (1.0, -1.0, 0.2), (1.0, 2.0, 0.3)]  # proxy, gold, chance
    truth = 0.0
    for picked in itertools.product(outcomes, repeat=3):
        chance = math.prod(p for *_, p in picked)
        top = max(s for s, *_ in picked)
        best = [g for s, g, _ in picked if s == top]
        truth += chance * sum(best) / len(best)
    estimated = sum(math.prod(p for *_, p in picked)
                    * float(best_of_n_weights([s for s, *_ in picked], 3) @ [g for _, g, _ in picked])
                    for picked in itertools.product(outcomes, repeat=5))
    assert math.isclose(truth, estimated)


def test_the_bound_of_best_of_n_holds_and_is_reached():
    draw = np.random.default_rng(0)
    for answers, levels in ((2, 2), (5, 3), (30, 30), (1000, 1000)):
        chances = draw.dirichlet(np.ones(answers)) if answers < 1000 else np.full(answers, 1 / answers)
        scores = draw.permutation(answers) % levels
        for n in (1, 2, 7, 16):
            exact = 0.0
            for level in range(levels):  # P(best is in this level)·log(P(best)/P(level)): inside it, chances as before
                upto, below = chances[scores <= level].sum(), chances[scores < level].sum()
                best = upto**n - below**n
                exact += best * math.log(best / (upto - below)) if best > 0 else 0.0
            assert exact <= best_of_n_kl(n) + 1e-9
            if answers == 1000:
                assert best_of_n_kl(n) - exact < 0.02


def test_course_of_best_of_n_starts_at_nothing_and_rises_with_n():
    draw = np.random.default_rng(1)
    gold = draw.normal(size=(50, 8))
    course = best_of_n_course(gold, gold, counts=(1, 2, 4, 8), unit=2.0)
    assert course[0][0] == 0 and np.allclose(course[0][1], 0)
    means = [g.mean() for _, g in course]
    assert means == sorted(means) and np.allclose(course[-1][1], (gold.max(1) - gold.mean(1)) / 2)


def test_gain_is_exact_where_it_is_linear_in_the_root():
    kls = [0.3, 2.0, 5.5, 11.0]
    course = [(k, 0.25 * math.sqrt(k)) for k in kls]
    for kl in np.linspace(0, 11, 23):
        assert math.isclose(gain_at_distance(course, float(kl)).gain, 0.25 * math.sqrt(kl), abs_tol=1e-12)
    assert np.isnan(gain_at_distance(course, 11.1).gain) and "not reached (at most 11.0)" in str(
        gain_at_distance(course, 11.1))
    rows = gain_at_distance([(k, np.full(4, g)) for k, g in course], 20.0).gain
    assert rows.shape == (4,) and np.isnan(rows).all()


def test_a_course_that_returns_is_read_on_its_way_out():
    course = [(4.0, 1.0), (1.0, 0.2), (9.0, 3.0)]
    assert gain_at_distance(course, 4.0).gain == 1.0
    assert math.isclose(gain_at_distance(course, 1.0).gain, 0.5)
    assert math.isclose(gain_at_distance(course, 6.25).gain, 0.2 + (2.5 - 1) / 2 * 2.8)


def test_a_distance_below_zero_is_that_of_the_start():
    "An estimate from samples may lie below zero."
    assert gain_at_distance([(-0.1, 0.3), (1.0, 0.5), (2.0, 0.6)], 0.0).gain == 0.0
    assert common_distance([[(-0.1, 0.3), (-0.2, 0.1), (-0.1, 0.0)]], 4.0) == 0.0


@pytest.mark.parametrize("points", [[], [(1, 2)] * 2, [(1, 2), (3, math.nan), (4, 5)], [(1, 2, 3)] * 3, "abc",
                                    [1, 2, 3], [(1, [1.0, 2.0]), (2, [1.0]), (3, [1.0, 2.0])]])
def test_bad_courses(points):
    with pytest.raises(LireError, match="three or more"):
        gain_at_distance(points, 1.0)


@pytest.mark.parametrize("kl", [-1.0, math.nan, math.inf, "4"])
def test_bad_distances(kl):
    with pytest.raises(LireError, match="from 0 up"):
        gain_at_distance([(1, 1), (2, 2), (3, 3)], kl)


def point(proxy, kl, **settings):
    return {"settings": settings, "proxy": proxy, "kl": kl}


def test_choice_is_what_a_look_at_the_table_says():
    points = [point(proxy, kl, lr=lr, loss_kwargs={"margin": margin})
              for proxy, kl, lr, margin in ((0.1, 1.0, 1e-5, 1.0), (0.4, 6.0, 3e-5, 1.0), (0.4, 5.0, 3e-5, 10.0),
                                            (0.9, 8.1, 1e-4, 3.0))]
    found = choose_under_cap(points, 8.0)
    assert (found.index, found.proxy, found.kl, found.over) == (2, 0.4, 5.0, False)  # the nearer of two equals
    assert found.edges == {"margin": 10.0} and math.isnan(found.error)
    assert choose_under_cap(points, 100).edges == {"lr": 1e-4}
    assert choose_under_cap(points, 0.2)[:1] == (0,) and choose_under_cap(points, 0.2).over


def test_words_and_switches_have_no_edge():
    points = [point(0.1, 1.0, T="auto", on=True, lr=1.0), point(0.2, 1.0, T=5.0, on=False, lr=1.0)]
    assert choose_under_cap(points, 8.0).edges == {}


def test_noise_of_a_choice_is_that_of_scipy():
    from scipy import stats

    draw = np.random.default_rng(2)
    base = draw.normal(size=40)
    tried = [base + shift + draw.normal(0, 0.3, 40) for shift in (0.0, 0.1, 0.5, 0.52)]
    found = choose_under_cap([point(v, 1.0, i=float(i)) for i, v in enumerate(tried)], 8.0)
    same = [i for i, v in enumerate(tried) if i != found.index and stats.ttest_rel(tried[found.index], v).pvalue >= 0.05]
    assert found.near == same and 0 not in same and len(same) == 1
    assert math.isclose(found.error, stats.sem(tried[found.index]))


def test_of_equals_within_an_error_the_furthest_is_taken():
    """By scipy's paired t statistic, drawn many times; the best itself is always allowed, and nothing beyond the cap."""
    from scipy import stats

    draw, moved = np.random.default_rng(5), 0
    for _ in range(200):
        base = draw.normal(size=32)
        tried = [base + draw.normal(0, 0.2, 32) + draw.normal(0, 0.05) for _ in range(9)]
        kls = draw.uniform(0.1, 12, 9)
        points = [point(v, float(kl), i=float(i)) for i, (v, kl) in enumerate(zip(tried, kls))]
        under = [i for i in range(9) if kls[i] <= 8]
        best = max(under, key=lambda i: tried[i].mean())
        equals = [i for i in under if i == best or stats.ttest_rel(tried[best], tried[i]).statistic <= 1.0]
        found = choose_under_cap(points, 8.0, within=1.0)
        assert found.index == max(equals, key=lambda i: kls[i]) and choose_under_cap(points, 8.0).index == best
        moved += found.index != best
    assert 20 < moved < 180
    alone = [point(0.9, 1.0, i=1.0), point(0.8, 5.0, i=2.0)]  # means without prompts: nothing is as good as the best
    assert choose_under_cap(alone, 8.0, within=3.0).index == 0
    for wrong in (-1, math.nan, math.inf, "1"):
        with pytest.raises(LireError, match="standard errors"):
            choose_under_cap(alone, 8.0, within=wrong)


@pytest.mark.parametrize("points, cap", [([], 8.0), ([point(0.1, 1.0)], 0), ([point(0.1, 1.0)], math.nan),
                                         ([point([], 1.0)], 8), ([point(0.1, None)], 8), ([{"settings": {}}], 8)])
def test_bad_searches(points, cap):
    with pytest.raises(LireError):
        choose_under_cap(points, cap)


def test_win_probability_by_hand():
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    found = win_probability([[1.0, 2.0], [0.0]], [[0.5], [3.0, 0.0]])
    assert np.allclose(found, [(sigmoid(0.5) + sigmoid(1.5)) / 2, (sigmoid(-3) + 0.5) / 2])


def test_spread_within_ignores_the_level_of_prompts():
    draw = np.random.default_rng(5)
    scores = [draw.normal(level, 0.4, size) for level, size in ((0, 3), (50, 2), (-9, 7), (4, 1))]
    by_hand = sum(((s - s.mean()) ** 2).sum() for s in scores) / (2 + 1 + 6)
    assert math.isclose(within_spread(scores), math.sqrt(by_hand))
    shifted = [s + 100 * i for i, s in enumerate(scores)]
    new = [s + 0.2 for s in scores]
    assert np.allclose(spread_gains(new, scores), 0.2 / math.sqrt(by_hand))
    assert math.isclose(within_spread(shifted), within_spread(scores))
    with pytest.raises(LireError, match="no spread"):
        spread_gains([[1.0, 1.0]], [[0.0, 0.0]])


def test_a_judge_fails_for_either_reason_and_says_so():
    draw = np.random.default_rng(6)
    scores = draw.normal(size=(40, 4)) * 0.5
    assert check_judge(scores, 0.75, 120).fails == ""
    both = check_judge(scores * 0.1, 0.52, 120)
    assert "spread" in both.fails and "coin" in both.fails and 0.5 < both.certainty < 0.52
    with pytest.raises(LireError, match="two samples"):
        check_judge(scores[:, :1], 0.75, 120)


@pytest.mark.parametrize("bad", [[], [[]], [[math.nan, 1.0]], [[None, 1.0]]])
def test_bad_scores(bad):
    with pytest.raises(LireError):
        within_spread(bad)

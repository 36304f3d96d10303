"""The rule by which claims are decided: what it promises, in simulated worlds, and its parts against scipy and by hand."""
import math

import numpy as np
import pytest
from scipy import integrate, stats

from lire_nb import decisions, frontiers, proxy, uncertain_rewards
from lire_nb.base.errors import LireError
from lire_nb.decisions import MARGIN, decide, estimate, holm, seeds_needed, sign_power, tie_power, trend

# run-to-run spread, share of it that is noise of the evaluation: measured in dialogue, summarization, sentiment
MEASURED = [(0.162, 0.09), (0.101, 0.22), (0.081, 0.61)]
SETS = 2000


def sets_of_runs(spread, noise, seeds, opponents, truth, draw, heavy=False):
    "Differences of one method to its opponents: all share its runs, every evaluation has noise of its own."
    z = (lambda size: draw.standard_t(5, size) / (5 / 3) ** 0.5) if heavy else (lambda size: draw.normal(size=size))
    run = lambda: z(seeds) * spread * (1 - noise) ** 0.5 + z(seeds) * spread * noise**0.5  # noqa: E731
    ours = run() + truth
    return {k: ours - run() for k in range(opponents)}


@pytest.mark.parametrize("spread, noise, seeds, heavy", [
    (*MEASURED[0], 5, False), (*MEASURED[1], 8, False), (*MEASURED[2], 5, True)])
def test_without_a_difference_a_false_answer_is_rare(spread, noise, seeds, heavy):
    draw = np.random.default_rng(7)
    sets = [decide(sets_of_runs(spread, noise, seeds, 7, 0.0, draw, heavy), plan=False) for _ in range(SETS)]
    false = np.mean([any(d.verdict in ("supported", "contradicted") for d in one.values()) for one in sets])
    assert false <= 0.05


@pytest.mark.parametrize("truth", [MARGIN, -MARGIN])
def test_at_the_margin_a_tie_is_rare(truth):
    draw = np.random.default_rng(8)
    sets = [decide(sets_of_runs(*MEASURED[2], 8, 7, truth, draw), plan=False) for _ in range(SETS)]
    assert np.mean([any(d.verdict == "tie" for d in one.values()) for one in sets]) <= 0.05


def test_small_spread_gives_ties_and_large_differences_are_seen():
    draw = np.random.default_rng(9)
    equal = [decide(sets_of_runs(0.04, 0.2, 8, 7, 0.0, draw)) for _ in range(100)]
    assert np.mean([d.verdict == "tie" for one in equal for d in one.values()]) > 0.9
    better = [decide(sets_of_runs(0.1, 0.2, 8, 7, 0.6, draw)) for _ in range(100)]
    assert np.mean([d.verdict == "supported" for one in better for d in one.values()]) > 0.95
    worse = [decide(sets_of_runs(0.1, 0.2, 8, 7, -0.6, draw)) for _ in range(100)]
    assert np.mean([d.verdict == "contradicted" for one in worse for d in one.values()]) > 0.95


@pytest.mark.parametrize("seeds, by_prompt", [(5, 0.0), (5, 0.15), (8, 0.05)])
def test_coverage(seeds, by_prompt):
    draw, held = np.random.default_rng(10), []
    for _ in range(1500):
        table = (draw.normal(0, 0.03**0.5, (seeds, 1)) + draw.normal(0, by_prompt**0.5, (1, 64))
                 + draw.normal(0, 0.4**0.5, (seeds, 64)) + 0.3)
        found = estimate(table).interval()
        held.append(found.low <= 0.3 <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_one_value_per_seed_is_student_of_scipy():
    values = np.random.default_rng(0).normal(0.3, 1, 9)
    found = estimate(values)
    theirs = stats.ttest_1samp(values, 0)
    assert np.allclose(found.interval()[1:], theirs.confidence_interval())
    assert math.isclose(2 * min(found.beyond(0), 1 - found.beyond(0)), theirs.pvalue)
    one = decide({"a": values})["a"]
    assert math.isclose(one.p, theirs.pvalue) and one.seeds == 9


def test_variance_by_hand():
    "The mean squares of a small two-way table, with sums written out."
    table = [[1.0, 2.0, 4.0], [0.0, 3.0, 5.0]]
    S, N, mean = 2, 3, 15 / 6
    rows, columns = [7 / 3, 8 / 3], [0.5, 2.5, 4.5]
    ms_seed = sum(N * (r - mean) ** 2 for r in rows) / (S - 1)
    ms_prompt = sum(S * (c - mean) ** 2 for c in columns) / (N - 1)
    rest = sum((table[s][n] - rows[s] - columns[n] + mean) ** 2 for s in range(S) for n in range(N)) / 2
    found = estimate(table)
    assert math.isclose(found.error**2, (ms_seed + ms_prompt - rest) / 6)
    freedom = (ms_seed + ms_prompt - rest) ** 2 / (ms_seed**2 + ms_prompt**2 / 2 + rest**2 / 2)
    assert math.isclose(found.freedom, max(freedom, 1))


def test_holm_is_closed_testing():
    "Holm's answer at any level is that of testing all intersections by Bonferroni."
    from itertools import combinations

    draw = np.random.default_rng(3)
    for _ in range(30):
        p = draw.uniform(0, 0.1, 5)
        for k in range(5):
            holding = [set(c) for size in range(1, 6) for c in combinations(range(5), size) if k in c]
            closed = max(min(len(c) * min(p[i] for i in c), 1) for c in holding)
            assert math.isclose(holm(p)[k], closed)


def test_few_seeds_decide_nothing_and_cost_the_others_nothing():
    values = np.random.default_rng(1).normal(0.4, 0.2, 6)
    alone = decide({"a": values})["a"]
    beside = decide({"a": values, "b": [9.0, 9.1, 9.2], "c": [5.0]})
    assert beside["a"] == alone
    assert beside["b"].verdict == beside["c"].verdict == "too few seeds" and math.isnan(beside["b"].low)
    assert decide({}) == {}
    assert decide({"a": values}, together=4)["a"].p == pytest.approx(min(1, 4 * alone.p))


def test_equal_values():
    assert decide({"a": [0.0] * 6})["a"].verdict == "tie"
    assert decide({"a": [0.5] * 6})["a"].verdict == "supported"
    assert decide({"a": np.full((6, 4), -0.5)})["a"].verdict == "contradicted"


@pytest.mark.parametrize("values", [[], [math.nan] * 6, [[[1.0]]], "abc", [[1, 2], [3]], [math.inf, 1.0], None])
def test_bad_values(values):
    with pytest.raises(LireError, match="finite numbers"):
        decide({"a": values})


@pytest.mark.parametrize("bad", [{"margin": -1}, {"margin": math.nan}, {"level": 0}, {"level": 1}, {"margin": "0.2"}])
def test_bad_settings(bad):
    with pytest.raises(LireError, match="out of range"):
        decide({"a": [0.1] * 6}, **bad)


@pytest.mark.parametrize("difference, spread, seeds", [(0.2, 0.2, 8), (0.0, 0.15, 6), (-0.3, 0.25, 12)])
def test_powers_against_simulated_runs(difference, spread, seeds):
    draw = np.random.default_rng(4)
    tables = draw.normal(difference, spread, (20000, seeds))
    means, errors = tables.mean(1), tables.std(1, ddof=1) / seeds**0.5
    seen = np.mean(np.abs(means) > stats.t.ppf(0.975, seeds - 1) * errors)
    tied = np.mean(np.abs(means) + stats.t.ppf(0.95, seeds - 1) * errors < MARGIN)
    assert abs(seen - sign_power(difference, spread, seeds)) < 0.012
    assert abs(tied - tie_power(difference, spread, seeds)) < 0.012


def test_powers_are_those_of_the_noncentral_t_and_numbers_far_out_too():
    for seeds in (2, 3, 5, 8, 30):
        for shift in (0.0, 0.5, 2.0, 4.0):
            bound = stats.t.ppf(0.975, seeds - 1)
            exact = 1 - integrate.quad(lambda x: stats.nct.pdf(x, seeds - 1, shift), -bound, bound)[0]
            assert abs(sign_power(shift / seeds**0.5, 1.0, seeds) - exact) < 1e-3, (seeds, shift)
    for difference in np.geomspace(0.01, 50, 60):  # scipy's own tails are NaN at many of these
        powers = [sign_power(difference, 0.1, s, 0.01) for s in (3, 5, 8, 20)]
        assert all(0 <= p <= 1 for p in powers) and powers == sorted(powers)
    assert seeds_needed(1.0, 0.16) == seeds_needed(0.5, 0.04) == 5


@pytest.mark.parametrize("plan", [(0.1, 0.1, 1), (0.1, 0.1, 0), (math.nan, 0.1, 8), (0.1, math.nan, 8), (0.1, -1.0, 8),
                                  (0.1, math.inf, 8)])
def test_bad_plans(plan):
    for power in (sign_power, tie_power):
        with pytest.raises(LireError, match="plan for|no spread"):
            power(*plan)
    if plan[2] > 1:
        with pytest.raises(LireError, match="no difference"):
            seeds_needed(*plan[:2])


def test_seeds_needed_is_the_first_that_suffices():
    for difference, spread in ((0.3, 0.2), (0.0, 0.2), (0.1, 0.15), (-0.4, 0.6)):
        chance = [max(sign_power(difference, spread, s), tie_power(difference, spread, s)) for s in range(5, 201)]
        first = next((s for s, c in zip(range(5, 201), chance) if c >= 0.8), None)
        assert seeds_needed(difference, spread) == first
    assert seeds_needed(MARGIN, 5.0) is None


def test_trend_uses_whole_seeds_only():
    x = np.array([1.0, 2.0, 4.0])
    values = np.array([[0.0, 1.0, 3.0], [5.0, math.nan, 2.0], [1.0, 1.5, 2.5]])
    assert np.allclose(trend(x, values), [1.0, 0.5])
    with pytest.raises(LireError, match="no line"):
        trend([1, 1], [[0.0, 1.0]])
    with pytest.raises(LireError, match="no line"):
        trend([1, 2, 3], [[0.0, 1.0]])


@pytest.mark.parametrize("call, says", [
    (lambda: decisions.decide([[0.1, 0.2]]), "claims without names"),
    (lambda: decisions.trend([1, 2], [[1, 2], [1]]), "unequal numbers of points"),
    (lambda: decisions.seeds_needed(math.nan, 0.1), "no difference to plan for"),
    (lambda: decisions.holm([0.1, math.nan]), "not p-values"),
    (lambda: frontiers.best_of_n_course([[0.0, 1.0]], [[0.0, 1.0]], [2], unit=0.0), "unit"),
    (lambda: frontiers.check_judge([[0.0, 1.0]], 1.2, 10), "no accuracy"),
    (lambda: frontiers.check_judge([[0.0, 1.0]], 0.7, 0), "no accuracy"),
    (lambda: proxy.calibration([], bins=0), "bins"),
    (lambda: proxy.graded_pairs([{"id": "a", "grades": [1, 2], "scores": [0.1, math.nan]}]), "row 'a': not finite"),
    (lambda: uncertain_rewards.contrastive_rewards([], "start.jsonl"), "no baseline"),
])
def test_what_cannot_be_judged_is_said(call, says):
    with pytest.raises(LireError, match=says):
        call()


def test_a_distance_may_be_any_real_number():
    points = [(1.0, 0.1), (4.0, 0.2), (9.0, 0.3)]
    assert frontiers.gain_at_distance(points, np.float32(4)).gain == pytest.approx(0.2)

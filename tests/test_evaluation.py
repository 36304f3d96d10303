"""Evaluation people can believe: published figures come out, intervals cover, KL is exact, looking changes nothing."""
import csv
import json
import math
import random
import time
from itertools import product
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from scipy import optimize, stats
from scipy.special import expit, xlogy
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    TrainerCallback,
)

from lire_nb.base.errors import LireError
from lire_nb.evaluation import (
    KLDivergence,
    LengthControlledWinRate,
    MeanReward,
    PairAccuracy,
    Perplexity,
    RankingAgreement,
    WinRate,
    compare_systems,
    distinct_n,
    judge_policy,
    self_bleu,
    text_kl,
    token_kl,
)
from lire_nb.judges.verdicts import load_verdicts
from lire_nb.logprobs import dataset_logps, list_logps
from lire_nb.preferences import (
    judge_agreement,
    leaderboard,
    length_controlled_win_rate,
    length_slope,
    preferences,
    win_matrix,
    win_rate,
)
from lire_nb.records import make_record
from lire_nb.sampling import SamplingSettings
from lire_nb.shared_prompt import ListCollator, padded_rows
from lire_nb.statistics import bootstrap_interval, paired_difference
from lire_nb.training import LIREConfig, LIRETrainer
from lire_nb.watching import EvaluationCallback, Onlooker, undisturbed

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PUBLISHED = SHARED / "alpaca_eval_leaderboard.csv"
needs_shared = pytest.mark.skipif(not PUBLISHED.is_file(),
                                  reason="the AlpacaEval verdicts are not beside this project (../shared/data)")


# Published figures


@pytest.fixture(scope="module")
def verdicts():
    return load_verdicts(SHARED / "alpaca_eval_preferences.csv")


@pytest.fixture(scope="module")
def published():
    with open(PUBLISHED) as f:
        return {row["model"]: row for row in csv.DictReader(f)}


@needs_shared
def test_published_figures_come_out(verdicts, published):
    table = {line["system"]: line for line in leaderboard(verdicts, resamples=9)}
    assert len(table) == 10 and len(published) == 9 and set(published) <= set(table)
    for name, row in published.items():
        ours = table[name]
        for key in ("win_rate", "standard_error", "discrete_win_rate"):
            assert abs(100 * ours[key] - float(row[key])) <= 1e-9, (name, key)
        assert (ours["wins"], ours["losses"], ours["ties"],
                ours["prompts"] - ours["not_judged"]) == tuple(int(row[k])
                                                               for k in ("n_wins", "n_wins_base", "n_draws",
                                                                         "n_total")), name
        assert int(ours["mean_length"]) == int(row["avg_length"]), name


@needs_shared
def test_missing_preferences_are_not_judged_in_every_spelling(verdicts, tmp_path):
    "AlpacaEval leaves such prompts out; a file may drop the row, leave the cell empty or write NaN."
    with open(SHARED / "alpaca_eval_preferences.csv") as f:
        rows = [r for r in csv.DictReader(f) if r["model"] == "vicuna-7b"]
    without = leaderboard(load_verdicts(rows[3:]), resamples=9)[0]
    ids = [r["prompt_id"] for r in rows]
    for spelling in ("", "nan", "NaN", None):
        changed = [{**r, "preference": spelling} for r in rows[:3]] + rows[3:]
        if spelling is None:
            path = tmp_path / "v.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in changed))
        else:
            path = tmp_path / "v.csv"
            with open(path, "w", newline="") as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(changed)
        found, report = load_verdicts(path, ids=ids, return_report=True)
        line = leaderboard(found, resamples=9)[0]
        assert (line["not_judged"], report.not_judged, report.missing) == (3, 3, {})
        assert {k: v for k, v in line.items() if k not in ("prompts", "not_judged", "mean_length")} == {
            k: v for k, v in without.items() if k not in ("prompts", "not_judged", "mean_length")
        }
    assert load_verdicts(rows[3:], ids=ids, return_report=True)[1].missing == {"vicuna-7b": 3}


def test_a_leaderboard_asks_the_same_of_both_rates():
    """Confidence, seed and resamples reach the length-controlled interval as well."""
    draw = np.random.default_rng(0)
    rows = [{"id": str(i), "system": "new", "baseline": "old", "preference": float(draw.choice([0, 0.5, 1])),
             "length": float(draw.integers(50, 200)), "baseline_length": float(draw.integers(50, 200))}
            for i in range(60)]
    bounds = lambda **options: [leaderboard(rows, length_control=True, **options)[0][f"length_controlled_{side}"]  # noqa: E731
                                for side in ("low", "high")]
    wide, narrow = bounds(), bounds(confidence=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bounds(seed=1) != wide != bounds(resamples=99)


def test_annotation_files_of_alpaca_eval_load_without_a_mapping(tmp_path):
    answers = [("Name a colour.", "Red.", "Blue, like the sky.", 1.25), ("Name a fruit.", "A pear.", "Fig", 2.0),
               ("Count.", "One.", "One.", 1.5), ("Add.", "3", "4", None)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([{"instruction": i, "output_1": a, "generator_1": "base", "output_2": b,
                                 "generator_2": "sys", "annotator": "x", "preference": p} for i, a, b, p in answers]))
    found = load_verdicts(path)
    assert [(v["preference"], v["length"], v["baseline_length"])
            for v in found] == [(0.25, 19, 4), (1.0, 3, 7), (0.5, 4, 4), (None, 1, 1)]
    line = leaderboard(found)[0]
    assert (line["wins"], line["ties"], line["losses"], line["not_judged"]) == (1, 1, 1, 1) and math.isclose(
        line["win_rate"], 1.75 / 3
    )


FAULTS = {
    "an unknown prompt": {"prompt_id": "who"}, "a missing side": {"baseline": ""},
    "more than one verdict for a prompt": {"prompt_id": "p1"},
    "a verdict in a foreign notation": {"preference": "draw"}, "a preference out of range": {"preference": "0.5"},
    "not a length": {"model_chars": "long"},
}


def table_with(changes: dict | None) -> list[dict]:
    rows = [{"prompt_id": f"p{i}", "model": "m", "baseline": "b", "preference": str(1 + i % 3 / 2), "model_chars": "10",
             "baseline_chars": "20"} for i in range(9)]
    return rows[:5] + ([{**rows[5], "prompt_id": "p99", **changes}] if changes else []) + rows[5:]


@pytest.mark.parametrize("reason", FAULTS)
def test_every_fault_is_named_with_its_line_and_never_a_win(reason, tmp_path):
    path = tmp_path / "verdicts.csv"
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, table_with(None)[0])
        writer.writeheader()
        writer.writerows(table_with(FAULTS[reason]))
    ids = [f"p{i}" for i in (*range(9), 99)]
    with pytest.raises(LireError) as e:
        load_verdicts(path, ids=ids)
    assert (e.value.reason == reason and e.value.line == 7 and str(path) in str(e.value) and e.value.remedy
            and "\n" not in str(e.value))
    kept, report = load_verdicts(path, ids=ids, on_error="quarantine", return_report=True)
    lost = 2 if "more than one" in reason else 1
    assert (report.rows == 10 == report.good_rows + report.quarantined_rows and report.quarantined_rows == lost
            and report.reasons == {reason: lost})
    written = [json.loads(line) for line in open(f"{path}.quarantine.jsonl")]
    assert len(written) == lost and all(reason in w["reason"] for w in written) and 7 in [w["line"] for w in written]
    clean = load_verdicts(table_with(None))
    assert kept == [v for v in clean if lost == 1 or v["id"] != "p1"]
    assert sum(v["preference"] for v in kept) <= sum(v["preference"] for v in clean)


@pytest.mark.parametrize("word", ["tie", "draw", "both", "0", 0, 0.5, "A", True, -1, 2.0000001, float("inf"), [1]])
def test_a_foreign_verdict_is_never_guessed(word):
    row = {**table_with(None)[0], "preference": word}
    with pytest.raises(LireError):
        load_verdicts([row])
    if not isinstance(word, list):
        assert (
            load_verdicts([row], values={word: 1.5})[0]["preference"] == 0.5
            and load_verdicts([row], values={word: None})[0]["preference"] is None
        )


@pytest.mark.parametrize("mapping",
                         [{"preference": "pref"}, {"verdict": "preference"},
                          {"id": "prompt_id", "system": "model", "baseline": "baseline"}])
def test_a_mapping_that_does_not_fit_is_no_table_without_verdicts(mapping):
    with pytest.raises(LireError, match="the mapping does not fit"):
        load_verdicts(table_with(None),
                      mapping={"id": "prompt_id", "system": "model", "baseline": "baseline", **mapping})
    found = load_verdicts([{"n": 0, "s": "new", "b": "old", "p": 2}],
                          mapping={"id": "n", "system": "s", "baseline": "b", "preference": "p"})
    assert found == [{"id": "0", "system": "new", "baseline": "old", "preference": 1.0, "length": None,
                      "baseline_length": None}]


def test_damaged_files_are_one_error_or_all_accounted_for(tmp_path):
    good = [json.dumps(r).encode() for r in table_with(None)]
    generator = random.Random(0)
    for _ in range(200):
        lines = list(good)
        for _ in range(generator.randint(1, 3)):
            i = generator.randrange(len(lines))
            lines[i] = generator.choice([lines[i][: generator.randrange(len(lines[i]))], b"\xff\xfe", b"[]", b"null",
                                         b"{}", lines[i].replace(b'"1', b'"9'), lines[i] + b"}",
                                         b'{"model": NaN, "preference": []}'])
        path = tmp_path / "v.jsonl"
        path.write_bytes(b"\n".join(lines))
        try:
            kept, report = load_verdicts(path, on_error="quarantine", return_report=True)
        except LireError as e:
            assert str(path) in str(e)
            continue
        assert report.rows == len(kept) + report.quarantined_rows and all(v["preference"] is None
                                                                          or 0 <= v["preference"] <= 1 for v in kept)


# Win rates


def test_win_rate_keeps_its_parts():
    values = np.random.default_rng(0).choice([0, 0.25, 0.5, 0.7, 1], 60)
    found = win_rate(values)
    assert math.isclose(found["standard_error"],
                        stats.sem(values)) and math.isclose(found["discrete_win_rate"],
                                                            (found["wins"] + found["ties"] / 2) / 60)
    assert found["wins"] + found["ties"] + found["losses"] == 60 and found["low"] <= found["win_rate"] <= found["high"]
    assert math.isclose(found["p_value"], stats.wilcoxon(values - 0.5, zero_method="wilcox").pvalue)


def test_the_signed_rank_p_value_is_uniform_where_nobody_is_better():
    generator = np.random.default_rng(1)
    p = [win_rate(generator.beta(2, 2, 60), resamples=9)["p_value"] for _ in range(400)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean([win_rate(generator.beta(3, 2, 60), resamples=9)["p_value"] < 0.05 for _ in range(100)]) > 0.8


@pytest.mark.parametrize("call", [
    lambda: preferences([[1.0]], [[1.0], [2.0]]), lambda: preferences([[]], [[1.0]]),
    lambda: preferences([[None]], [[1.0]]), lambda: win_rate([0.5, None]), lambda: win_rate([0.5, 1.01]),
    lambda: paired_difference([1.0], [1.0, 2.0]), lambda: length_controlled_win_rate([0.5, 1.0], [1, 2], [1]),
    lambda: judge_agreement({"a": [1, 0], "b": [1]}), lambda: judge_agreement({"a": [1, 0]}),
    lambda: WinRate().compute(predictions=[[1.0]], references=[]),
    lambda: KLDivergence().compute(predictions=[[1.0], [1.0]], references=[[1.0]]),
    lambda: Perplexity().compute(predictions=[1.0, 2.0], references=[1.0]),
    lambda: PairAccuracy().compute(predictions=[[1.0, 2.0]], references=[[1.0]]),
    lambda: LengthControlledWinRate().compute(predictions=[1.0, 0.0], lengths=[1.0, 2.0], reference_lengths=[1.0]),
])
def test_unequal_numbers_and_values_that_are_no_verdicts_stop(call):
    with pytest.raises(LireError) as e:
        call()
    assert e.value.remedy and e.value.allowed


def test_win_matrix_is_antisymmetric_and_agrees_with_win_rate():
    generator = np.random.default_rng(0)
    rows = {name: [{"id": str(i),
                    "scores": {"a": list(generator.normal(q, 1, 2)), "b": [float(generator.integers(0, 3))]}}
                   for i in range(40)] for name, q in (("x", 0), ("y", 0.5), ("z", 1))}
    cells = {(c["judge"], c["system"], c["opponent"]): c for c in win_matrix(rows, resamples=99)}
    assert len(cells) == 12
    for (judge, one, other), cell in cells.items():
        direct = win_rate(preferences([r["scores"][judge] for r in rows[one]],
                                      [r["scores"][judge] for r in rows[other]]), resamples=99)
        back = cells[judge, other, one]
        assert math.isclose(cell["win_rate"], direct["win_rate"]) and (cell["wins"], cell["ties"], cell["losses"]) == (
            direct["wins"],
            direct["ties"],
            direct["losses"],
        )
        assert math.isclose(cell["low"] + back["high"],
                            1) and math.isclose(cell["discrete_win_rate"] + back["discrete_win_rate"],
                                                1) and math.isclose(cell["p_value"], direct["p_value"])
    with pytest.raises(LireError):
        win_matrix({**rows, "z": rows["z"][::-1]})


# Length control


def test_the_fit_is_the_maximum_of_the_stated_likelihood():
    generator = np.random.default_rng(0)
    y, a, b = generator.random(80), generator.gamma(3, 50, 80), generator.gamma(3, 60, 80)
    delta = a - b
    x = np.tanh(delta / np.std(delta, ddof=1))

    def loss(v):
        q = expit(v[0] + v[1] * x)
        return -(xlogy(y, q) + xlogy(1 - y, 1 - q)).sum() + 0.005 * (v**2).sum()

    oracle = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x
    ours = length_controlled_win_rate(y, a, b, resamples=5)
    assert np.allclose([ours["theta"], ours["slope"]], oracle,
                       atol=1e-5) and math.isclose(ours["win_rate"], expit(ours["theta"]))
    systems = [(y, a, b), (generator.random(50) ** 2, generator.gamma(3, 50, 50), generator.gamma(3, 60, 50))]
    xs = [np.tanh((a - b) / np.std(np.asarray(a) - b, ddof=1)) for _, a, b in systems]

    def joint(v):
        return sum(-(xlogy(y, q) + xlogy(1 - y, 1 - q)).sum()
                   for (y, _, _), x, t in zip(systems, xs, v[1:]) for q in [expit(t + v[0] * x)]) + 0.005 * (v**2).sum()

    oracle = optimize.minimize(joint, np.zeros(3), tol=1e-12).x
    slope = length_slope(systems)
    assert math.isclose(slope, oracle[0], abs_tol=1e-5)
    assert all(abs(length_controlled_win_rate(*s, slope=slope, resamples=5)["theta"] - t) < 1e-5
               for s, t in zip(systems, oracle[1:]))


def test_a_system_that_wins_everything_still_has_a_figure():
    found = length_controlled_win_rate([1.0] * 30, range(30), range(30, 0, -1), resamples=50)
    assert 0.9 < found["win_rate"] < 1 and math.isfinite(found["slope"]) and found["low"] <= found["win_rate"]


@needs_shared
def test_distance_of_the_length_controlled_figures_from_the_published_ones(verdicts, published):
    """21_preferences states these distances and why they are there; both are measured here."""
    groups = {name: [v for v in verdicts if v["system"] == name] for name in published}
    columns = {name: tuple([v[key] for v in group] for key in ("preference", "length", "baseline_length"))
               for name, group in groups.items()}
    slope = length_slope(columns.values())
    theirs = np.array([float(row["length_controlled_winrate"]) for row in published.values()])
    raw = np.array([float(row["win_rate"]) for row in published.values()])
    found = {}
    for kind, phi in (("own", None), ("shared", slope)):
        lc = [length_controlled_win_rate(*columns[name], slope=phi, resamples=99) for name in published]
        values = 100 * np.array([one["win_rate"] for one in lc])
        found[kind] = np.abs(values - theirs)
        assert all(100 * one["low"] <= v <= 100 * one["high"]
                   for one, v in zip(lc, values)) and (values > theirs).all() and (theirs > raw).all()
        print(f"{kind}: mean {found[kind].mean():.2f}, largest {found[kind].max():.2f} "
              f"({list(published)[found[kind].argmax()]}), Spearman {stats.spearmanr(values, theirs).statistic:.3f}",
              dict(zip(published, values.round(2))))
        assert stats.spearmanr(values, theirs).statistic > (0.94 if kind == "shared" else 0.87)
    shorter = np.mean([a < b for _, one, other in columns.values() for a, b in zip(one, other)])
    print(f"slope {slope:.2f}, shorter {shorter:.3f}")
    assert abs(shorter - 0.94) < 0.005 and abs(slope - 2.5) < 0.05
    # as the notebook says
    for kind, mean, largest, name in (("shared", 6.0, 14.4, "claude-2.1_concise"), ("own", 9.8, 27.2, "gpt4_gamed")):
        assert (
            abs(found[kind].mean() - mean) < 0.06
            and abs(found[kind].max() - largest) < 0.06
            and list(published)[found[kind].argmax()] == name
        )


# Coverage


def experiment(generator, prompts=200, samples=4):
    "Scores of two policies on the same prompts; samples of a prompt share its luck. The true gain is 0.2."
    luck = generator.normal(0, 1, (prompts, 1))
    return luck + generator.normal(0, 1, (prompts, samples)) + 0.2, luck + generator.normal(0, 1, (prompts, samples))


ESTIMATES = {
    "mean reward": (lambda new, old: bootstrap_interval(new.mean(1), resamples=999), 0.2),
    "paired difference": (lambda new, old: paired_difference(new.mean(1), old.mean(1), resamples=999), 0.2),
    "win rate": (lambda new, old: bootstrap_interval(((new[:, :, None] > old[:, None, :]).mean((1, 2))), resamples=999),
                 float(stats.norm.cdf(0.2 / math.sqrt(2)))),
}


def covers(interval, truth, draw, simulations=1000) -> float:
    generator = np.random.default_rng(0)
    return float(np.mean([i.low <= truth <= i.high for i in (interval(*draw(generator)) for _ in range(simulations))]))


@pytest.mark.parametrize("name", ESTIMATES)
def test_intervals_cover_the_truth(name):
    interval, truth = ESTIMATES[name]
    covered = covers(interval, truth, experiment)
    print(f"{name}: {covered:.3f}")
    assert 0.93 < covered < 0.97


def test_intervals_from_rows_do_not():
    covered = covers(lambda new, old: bootstrap_interval(new.ravel(), resamples=399), 0.2, lambda g: experiment(g, 100))
    print(f"rows: {covered:.3f}")
    assert covered < 0.85


def test_length_controlled_intervals_cover_the_truth():
    def draw(generator, prompts=200):
        delta = generator.normal(80, 200, prompts)
        return (generator.random(prompts) < expit(-0.4 + 1.2 * np.tanh(delta / 200))).astype(float), delta

    generator, hits, raw = np.random.default_rng(0), [], []
    for _ in range(1000):
        y, delta = draw(generator)
        found = length_controlled_win_rate(y, delta, np.zeros(200), resamples=199)
        hits.append(found["low"] <= expit(-0.4) <= found["high"])
        raw.append(y.mean())
    print(f"length-controlled: {np.mean(hits):.3f}")
    assert 0.93 < np.mean(hits) < 0.97 and np.mean(raw) > expit(-0.4) + 0.03


# KL


SMALL = dict(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, initializer_range=0.4,
             max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "llama": LlamaConfig(**SMALL), "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
                       initializer_range=0.4), "qwen3": Qwen3Config(**SMALL),
}


def model_of(config, seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def batch_of(completions, prompt=(1, 4)):
    return ListCollator(0)([{"id": "one", "prompt_ids": list(prompt), "completion_ids": completions,
                             "rewards": [0.0] * len(completions)}])


def all_texts(length=4, end=2):
    others = [i for i in range(8) if i != end]
    return [[*t, end] for n in range(length) for t in product(others, repeat=n)] + [
        list(t) for t in product(others, repeat=length)
    ]


def by_row(values, batch):
    lengths = batch["completion_lengths"]
    return torch.zeros(len(lengths),
                       dtype=torch.double).index_add(0, torch.repeat_interleave(torch.arange(len(lengths)), lengths),
                                                     values.double())


def test_sampled_kl_and_per_token_kl_agree_with_all_sequences_listed():
    policy, start, texts = model_of(FAMILIES["llama"], 0), model_of(FAMILIES["llama"], 1), all_texts()
    batch = batch_of(texts)
    with torch.no_grad():
        logp, logp0 = (list_logps(m, batch)[0][0].double() for m in (policy, start))
    p = logp.exp()
    assert abs(float(p.sum()) - 1) < 1e-5 and len(texts) == 2801
    exact = float((p * (logp - logp0)).sum())
    sums = by_row(token_kl(policy, start, batch), batch)
    assert abs(float((p * sums).sum()) - exact) < 1e-4 * max(1, exact)
    drawn = torch.multinomial(p, 2000, replacement=True, generator=torch.Generator().manual_seed(0))
    for name, values in (("log-ratio", (logp - logp0)[drawn]), ("per-token sum", sums[drawn])):
        error = float(values.std() / math.sqrt(2000))
        print(f"exact {exact:.4f}; {name} {float(values.mean()):.4f} ± {error:.4f}")
        assert abs(float(values.mean()) - exact) < 3 * error
        interval = bootstrap_interval(values.numpy())
        assert interval.low < exact < interval.high
    assert sums[drawn].std() < (logp - logp0)[drawn].std()


@pytest.mark.parametrize("family", FAMILIES)
def test_per_token_kl_is_that_of_the_full_distributions(family):
    policy, start = model_of(FAMILIES[family], 0), model_of(FAMILIES[family], 1)
    generator = torch.Generator().manual_seed(0)
    lists = [{"id": str(b), "prompt_ids": torch.randint(3, 8, (p,), generator=generator).tolist(),
              "rewards": [0.0] * len(rs),
              "completion_ids": [torch.randint(3, 8, (r,), generator=generator).tolist() for r in rs]}
             for b, (p, rs) in enumerate([(7, [3, 1, 9]), (2, [5]), (11, [4, 6])])]
    oracle = []
    with torch.no_grad():
        for one in lists:
            for ids in one["completion_ids"]:
                new, old = (m(torch.tensor([one["prompt_ids"] + ids])).logits[0].double().log_softmax(-1)
                            for m in (policy, start))
                oracle += (new.exp() * (new - old)).sum(-1)[len(one["prompt_ids"]) - 1 : -1].tolist()
    for chunk in (4, 1000):
        found = token_kl(policy, start, ListCollator(0)(lists), chunk=chunk)
        torch.testing.assert_close(found.double(), torch.tensor(oracle, dtype=torch.double), rtol=1e-4, atol=1e-5)
    assert min(oracle) >= 0 and max(oracle) > 0.05 and "forward" not in vars(policy.get_output_embeddings())
    assert token_kl(policy, policy, ListCollator(0)(lists)).abs().max() < 1e-6


class MostRows(TorchDispatchMode):
    "The most rows of vocabulary size in any float32 result."
    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t) and t.dtype == torch.float32 and t.dim() >= 2 and t.shape[-1] == 97:
                self.rows = max(self.rows, t.numel() // 97)
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_tensor_of_all_tokens_times_vocabulary(family):
    config = type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), "vocab_size": 97})
    policy, start = model_of(config, 0), model_of(config, 1)
    batch = batch_of([[5] * 30] * 8)
    with MostRows() as watch:
        token_kl(policy, start, batch, chunk=25)
    assert watch.rows == 25 < len(padded_rows(batch)["index"])


def test_an_adapter_switched_off_is_the_start():
    from peft import LoraConfig, get_peft_model

    start = model_of(FAMILIES["llama"], 0)
    policy = get_peft_model(model_of(FAMILIES["llama"], 0), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    batch = batch_of([[3, 4, 5, 2], [6, 7]])
    assert token_kl(policy, None, batch).abs().max() < 1e-6
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 1)
    torch.testing.assert_close(token_kl(policy, None, batch), token_kl(policy, start, batch), rtol=1e-4, atol=1e-6)
    assert token_kl(policy, None, batch).max() > 1e-3
    with pytest.raises(LireError, match="no start policy"):
        token_kl(start, None, batch)
    with pytest.raises(LireError, match="different vocabularies"):
        token_kl(start, model_of(LlamaConfig(**{**SMALL, "vocab_size": 9}), 0), batch)


# Judging with a real sampler: a policy over eight words


WORDS = ["<pad>", "<s>", "</s>", "The", "film", "good", "bad", "dull"]


@pytest.fixture(scope="module")
def words():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def letters(prompts, completions):
    return [float(len(c)) for c in completions]


def test_kl_of_judged_rows_is_that_of_all_sequences_the_sampler_can_draw(words):
    """The sampler draws at least one word and no control token but the end: its law is listed in full, and the rows'
    mean must meet it."""
    policy, start = model_of(FAMILIES["llama"], 0), model_of(FAMILIES["llama"], 1)
    texts = [t for t in ([*t, 2] for n in range(1, 3)
                         for t in product(range(3, 8), repeat=n))] + [list(t) for t in product(range(3, 8), repeat=3)]
    prompt = words("The film")["input_ids"]
    batch, law = batch_of(texts, prompt), {}
    with torch.no_grad():
        logp, logp0 = (list_logps(m, batch)[0][0].double() for m in (policy, start))
        for t in texts:
            logits = policy(torch.tensor([prompt + t])).logits[0, len(prompt) - 1 : -1].double()
            logits[:, [0, 1]] = -torch.inf
            logits[0, 2] = -torch.inf
            law[tuple(t)] = float(logits.log_softmax(-1).gather(1, torch.tensor(t)[:, None]).sum().exp())
    q = torch.tensor([law[tuple(t)] for t in texts])
    assert abs(float(q.sum()) - 1) < 1e-5
    truth = float((q * (logp - logp0)).sum())
    settings = SamplingSettings(max_new_tokens=3)
    rows = judge_policy((policy, words), [{"id": str(i), "prompt": "The film"} for i in range(60)],
                        {"letters": letters}, start=(start, words), num_samples=32, settings=settings, exact_kl=True,
                        progress=False)
    ratios = np.array([np.subtract(r["logps"], r["start_logps"]) for r in rows]).ravel()
    error = ratios.std() / math.sqrt(len(ratios))
    print(f"listed {truth:.4f}, judged {ratios.mean():.4f} ± {error:.4f}")
    assert abs(ratios.mean() - truth) < 4 * error
    seen = {(c, f): n for r in rows for c, f, n in zip(r["completions"], r["finish_reasons"], r["tokens"])}
    assert all(n == len(c.split()) + (f == "stop") for (c, f), n in seen.items()) and len(seen) > 50
    lists = [make_record(r["prompt"], r["completions"], id=r["id"], meta={"finish_reasons": r["finish_reasons"]})
             for r in rows[:3]]
    for r, kls in zip(rows, text_kl((policy, words), (start, words), lists, max_completion_length=4, batch_size=2)):
        assert np.allclose(r["token_kl"], [np.mean(k) for k in kls], atol=1e-6) and [len(k) for k in kls] == r["tokens"]


def test_a_stop_string_is_not_an_end_that_the_policy_chose(words):
    policy, start = model_of(FAMILIES["llama"], 0), model_of(FAMILIES["llama"], 1)
    options = dict(start=(start, words), num_samples=8, progress=False, exact_kl=True)
    prompts = [{"id": str(i), "prompt": "The film"} for i in range(6)]
    rows = judge_policy((policy, words), prompts, {"letters": letters},
                        settings=SamplingSettings(max_new_tokens=6, stop=(" bad", " dull")), **options)
    assert any(f == "stop" for r in rows for f in r["finish_reasons"]) and any(c == "" for r in rows
                                                                               for c in r["completions"])
    for r in rows:
        for j, text in enumerate(r["completions"]):
            assert "bad" not in text and r["tokens"][j] == len(text.split())
            if not text:
                assert r["logps"][j] == r["start_logps"][j] == r["token_kl"][j] == 0
                continue
            alone = make_record("The film", [text], meta={"finish_reasons": ["length"]})
            assert math.isclose(dataset_logps(policy, words, [alone])[0][0][0], r["logps"][j], abs_tol=1e-4)
    assert {f["metric"] for f in compare_systems({"one": rows})} >= {"KL to start", "KL per token"}


@pytest.mark.parametrize("settings", [dict(temperature=0.7), dict(temperature=0.0), dict(top_p=0.8), dict(top_k=3)])
def test_samples_of_another_distribution_do_not_give_a_kl(words, settings):
    policy, start = model_of(FAMILIES["llama"], 0), model_of(FAMILIES["llama"], 1)
    rows = {name: judge_policy((m, words), [{"id": str(i), "prompt": "The film"} for i in range(4)],
                               {"letters": letters}, start=(start, words),
                               settings=SamplingSettings(max_new_tokens=3, **settings), progress=False)
            for name, m in (("start", start), ("policy", policy))}
    found = {(f["system"], f["metric"]): f for f in compare_systems(json.loads(json.dumps(rows)))}
    assert found["policy",
                 "KL to start"]["value"] is None and math.isfinite(found["policy", "log-ratio to start"]["value"])
    # files written before the settings were kept
    old = {name: [{k: v for k, v in r.items() if k != "sampling"} for r in own] for name, own in rows.items()}
    assert ({f["metric"] for f in compare_systems(old)} >= {"KL to start"}
            and "log-ratio to start" not in {f["metric"] for f in compare_systems(old)})


# Metrics against plain loops


def test_ranking_metrics_agree_with_plain_loops():
    generator = random.Random(0)
    scores = [[generator.choice([0, 1, 2, 3, 4]) / 2 for _ in range(generator.randint(2, 6))] for _ in range(60)]
    grades = [[generator.choice([None, 0.0, 1.0, 2.0, 3.0]) for _ in s] for s in scores]
    accuracies, taus = [], []
    for s, g in zip(scores, grades):
        pairs = [(s[i] - s[j], g[i] - g[j]) for i in range(len(s)) for j in range(i) if g[i] is not None
                 and g[j] is not None]
        ordered = [(a, b) for a, b in pairs if b]
        if ordered:
            accuracies.append(sum(1 if a * b > 0 else 0.5 if a == 0 else 0 for a, b in ordered) / len(ordered))
        untied = math.sqrt(sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs))
        if untied:
            taus.append(sum(np.sign(a * b) for a, b in pairs) / untied)
    for metric, oracle in ((PairAccuracy(), accuracies), (RankingAgreement(), taus)):
        found = metric.compute(predictions=scores, references=grades)
        assert (
            math.isclose(found["value"], np.mean(oracle), abs_tol=1e-12)
            and found["prompts"] == len(oracle)
            and found["undefined"] == 60 - len(oracle)
        )
        assert found["low"] < found["value"] < found["high"] and math.isclose(found["standard_error"],
                                                                              stats.sem(oracle))


def test_variety_measures_have_their_limits():
    assert distinct_n(["a b c", "d e f"], 2) == 1 and distinct_n(["a b c"] * 4,
                                                                 2) == 0.25 and distinct_n(["A, a"], 1) == 2 / 3
    assert math.isclose(self_bleu(["one two three four five"] * 3),
                        1) and self_bleu(["one two three four five", "six seven eight nine ten"]) < 0.05
    half = self_bleu(["one two three four five six", "one two three nine ten eleven"])
    assert self_bleu(["one two three four five", "six seven eight nine ten"]) < half < 1


def test_the_figures_of_systems_are_those_of_the_metrics_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    rows = {name: [{"id": str(i), "scores": {"gold": list(generator.normal(q, 1, 2))}, "tokens": [3, 4],
                    "finish_reasons": ["stop", "length"], "logps": list(generator.normal(-9, 1, 2)),
                    "start_logps": list(generator.normal(-10, 1, 2))} for i in range(30)]
            for name, q in (("start", 0.0), ("new", 0.5))}
    found = {(f["system"], f["metric"]): f for f in compare_systems(rows, seed=3)}
    column = lambda name, key: [r["scores"]["gold"] if key == "gold" else r[key] for r in rows[name]]  # noqa: E731
    sums = {"predictions": [sum(v) for v in column("new", "start_logps")], "references": [7] * 30}
    for metric, own in (
        ("reward", MeanReward.of(predictions=column("new", "gold"), seed=3)),
        ("win rate", WinRate.of(predictions=column("new", "gold"), references=column("start", "gold"), seed=3)),
        ("KL to start", KLDivergence.of(predictions=column("new", "logps"), references=column("new", "start_logps"),
                                        seed=3)),
        ("perplexity under start", Perplexity.of(**sums, seed=3)),
    ):
        assert [found["new", metric][k] for k in ("value", "low", "high", "method")] == list(own.values())[:4], metric
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    by_files = WinRate().compute(predictions=column("new", "gold"), references=column("start", "gold"), seed=3)
    assert by_files["low"] == found["new", "win rate"]["low"] and (tmp_path / "cache").exists()
    broken = {**rows, "new": [{**rows["new"][0], "scores": {"gold": [1.0, math.nan]}}, *rows["new"][1:]]}
    with pytest.raises(LireError, match="finite"):
        compare_systems(broken)


# Looking on while a policy trains


def trained(words, folder, callback=None, lora=False, also=(), **settings):
    config = LlamaConfig(**{**SMALL, "attention_dropout": 0.2})
    policy = model_of(config, 0)
    options = dict(output_dir=str(folder), learning_rate=5e-3, num_train_epochs=3, per_device_train_batch_size=2,
                   gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True, bf16=False,
                   use_cpu=True, report_to="none", temperature=1.0, seed=3, logging_steps=1)
    extra = {}
    if lora:
        from peft import LoraConfig

        torch.manual_seed(0)
        extra["peft_config"] = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
    lists = [make_record("The film", [" good", " bad film", " dull"], rewards=[1.0, 0.2, 0.0], id=str(i))
             for i in range(10)]
    trainer = LIRETrainer(policy, LIREConfig(**(options | settings)), lists, processing_class=words,
                          callbacks=list(also), **extra)
    if callback is not None:
        callback.attach(trainer)
    trainer.train()
    return trainer


def watch(**options):
    held_out = [{"id": str(i), "prompt": "The film"} for i in range(6)]
    return EvaluationCallback(held_out, {"letters": letters},
                              **({"every": 1, "settings": SamplingSettings(max_new_tokens=3)} | options))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("every", [2, "epoch"])
def test_looking_on_changes_no_bit(words, tmp_path, lora, every):
    alone = trained(words, tmp_path, lora=lora)
    start = None if lora else model_of(LlamaConfig(**SMALL), 0)
    seen = trained(words, tmp_path, watch(every=every, start=start, num_samples=3), lora=lora)
    assert all(torch.equal(a, b) for a, b in zip(alone.model.state_dict().values(), seen.model.state_dict().values()))
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (alone, seen)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    history = [h for h in seen.state.log_history if "eval_kl" in h]
    assert [h["step"] for h in history] == ([0, 2, 4, 6, 8] if every == 2 else [0, 3, 6, 9])
    assert abs(history[0]["eval_kl"]) < 1e-6 < history[-1]["eval_kl"] and {"eval_letters_reward",
                                                                           "eval_letters_reward_se", "eval_kl_se",
                                                                           "eval_length"} <= set(history[0])


def test_an_onlooker_looks_before_the_first_step_and_every_so_many(words, tmp_path):
    class Steps(Onlooker):
        seen, modes = [], []

        def measure(self, model, tokenizer):
            self.modes.append((torch.is_grad_enabled(), tokenizer is words))
            model.eval()
            return {"drawn": float(torch.rand(1))}

        def keep(self, found, state, control):
            self.seen.append((state.global_step, found["drawn"]))

    alone, seen = trained(words, tmp_path), trained(words, tmp_path, also=[look := Steps(every=4)])
    assert [step for step, _ in look.seen] == [0, 4, 8] and set(look.modes) == {(False, True)}
    assert all(torch.equal(a, b) for a, b in zip(alone.model.state_dict().values(), seen.model.state_dict().values()))
    from lire_nb.lab.experiments import _Course

    assert issubclass(_Course, Onlooker) and issubclass(EvaluationCallback, Onlooker)


def test_modes_and_random_states_come_back(words):
    model = model_of(FAMILIES["llama"], 0).train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    with undisturbed(model):
        watch(start=None).measure(model, words)
        model.eval(), torch.rand(5), np.random.rand(5), random.random()
    after = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert [m.training for m in model.modules()] == modes and after == (torch.rand(1), np.random.rand(),
                                                                        random.random())
    with pytest.raises(RuntimeError), undisturbed(model):
        model.eval()
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


class Tracker(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_trackers_get_the_figures_and_the_log_has_them_without_attach(words, tmp_path):
    tracker = Tracker()
    trained(words, tmp_path, watch(start=model_of(FAMILIES["llama"], 0), every="epoch"), also=[tracker])
    assert sum("eval_letters_reward" in log for log in tracker.logs) == 4
    member = watch(start=model_of(FAMILIES["llama"], 0), every="epoch")
    trainer = trained(words, tmp_path, also=[member])
    assert [h["step"] for h in trainer.state.log_history if "eval_kl" in h] == [0, 3, 6, 9]


def test_it_stops_at_the_kl_or_when_patience_is_over(words, tmp_path):
    start = model_of(FAMILIES["llama"], 0)
    free = trained(words, tmp_path, watch(start=start))
    curve = {h["step"]: h["eval_kl"] for h in free.state.log_history if "eval_kl" in h}
    limit = curve[4] * 0.999
    first = next(step for step, kl in curve.items() if kl > limit)
    callback = watch(start=start, max_kl=limit)
    assert trained(words, tmp_path, callback).state.global_step == first < 9 and "KL" in callback.stopped
    flat = EvaluationCallback([{"id": str(i), "prompt": "The film"} for i in range(3)],
                              {"flat": lambda p, c: [1.0] * len(c), "rising": letters}, every=2, patience=3,
                              watch="flat", settings=SamplingSettings(max_new_tokens=2))
    stopped = trained(words, tmp_path, flat)
    assert stopped.state.global_step == 6 and "flat" in flat.stopped
    again = EvaluationCallback([{"id": str(i), "prompt": "The film"} for i in range(3)],
                               {"flat": lambda p, c: [1.0] * len(c)}, every=2, patience=3,
                               settings=SamplingSettings(max_new_tokens=2))
    # a run that goes on from a checkpoint has the log, and decides alike
    assert again._reason_to_stop({}, stopped.state) == flat.stopped


@pytest.mark.parametrize("options",
                         [dict(every=0), dict(every="step"), dict(max_kl=0.0), dict(patience=0), dict(watch="gold"),
                          dict(max_kl=1.0, settings=SamplingSettings(top_k=2))])
def test_the_callback_refuses_what_it_cannot_do(options):
    with pytest.raises(LireError) as e:
        watch(**options)
    assert e.value.remedy


def test_looking_on_is_quick_to_say_that_there_is_no_start(words, tmp_path):
    began = time.monotonic()
    with pytest.raises(LireError, match="no start policy"):
        trained(words, tmp_path, watch(max_kl=1.0))
    assert time.monotonic() - began < 20

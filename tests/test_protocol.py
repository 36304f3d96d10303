"""The protocol: its file is whole, plans follow it, the rule errs as rarely as it says, rows keep their texts."""
import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from lire_nb.base.errors import LireError
from lire_nb.decisions import decide
from lire_nb.lab import claims, courses, plans, protocol, results, texts
from lire_nb.lab.plans import GRIDS, SCALES, TABLES, Run, plan, read_experiment

RULE, EVIDENCE = protocol.PROTOCOL["rule"], SCALES["evidence"]


def course(kl_at_end: float, gain_per_root: float = 1.0) -> dict:
    kls = [kl_at_end / 3, 2 * kl_at_end / 3, kl_at_end]
    return {"points": [{"scores": {"proxy": [[gain_per_root * k**0.5]] * 4}, "logps": [[k]] * 4,
                        "start_logps": [[0.0]] * 4} for k in kls]}

READ_PILOT = protocol._pilot.__wrapped__


@pytest.fixture(autouse=True)
def no_pilot(monkeypatch):
    "What a pilot raised since is no part of the rules."
    monkeypatch.setattr(protocol, "_pilot", lambda: {})


def test_every_method_has_a_grid_of_six_and_its_place():
    methods = sum((protocol.PROTOCOL["methods"][k] for k in ("many", "few")), [])
    assert len(set(methods)) == len(methods) and set(methods) == protocol.PROTOCOL["grids"].keys() <= GRIDS.keys()
    for method in methods:
        found = [*protocol.tried_settings(method), *protocol.tried_settings(method, 1.0)]
        assert len(found) == (1 if method == "lire_paper" else 6), method
        assert len({str(s) for s in found}) == len(found)
    named = {m for f in protocol.PROTOCOL["families"] for m in (f["method"], *f["opponents"])}
    assert named <= {*methods, "best_of_n"}


def test_claims_name_one_opponent_each_and_decide_where_seeds_suffice():
    found = claims.matched_claims()
    assert len({c.text for c in found}) == len(found) and all(c.table in TABLES for c in found)
    for family in protocol.PROTOCOL["families"]:
        for method in (family["method"], *family["opponents"]):
            assert method == "best_of_n" or protocol.seeds_of("dialogue", method, 8) >= 5


def test_the_search_takes_the_rate_first_and_stops_at_the_cap():
    asked = []

    def find(config):  # further with the rate; the gain for a distance is larger at β = 0.3
        asked.append(config)
        beta = config["training"]["beta"]
        return course(3e5 * config["training"]["learning_rate"], 2.0 if beta == 0.3 else 1.0)

    runs, best = protocol.trial_search("dialogue", "dpo", EVIDENCE, find)
    assert best["beta"] == 0.3  # and at 8 nats or less all rates gain alike
    betas = [r.config["training"]["beta"] for r in runs]
    assert betas == [0.1] * 3 + [0.01, 0.03, 0.3]
    assert {r.config["training"]["learning_rate"] for r in runs[3:]} == {best["learning_rate"]}
    assert all(r.config["judge"]["judges"] == ["proxy"] and r.config["stop"] == 1.5 * RULE["cap"] for r in runs)
    unfinished, none = protocol.trial_search("dialogue", "dpo", EVIDENCE, lambda config: None)
    assert len(unfinished) == 3 and none is None


def test_search_and_final_runs_share_no_prompt_that_taught_the_proxy():
    from lire_nb.lab.experiments import prompts_of
    from lire_nb.lab.trials import judge_lists, judge_spec
    from lire_nb.tasks import load_task

    task, config = load_task("summarization"), protocol.trial(EVIDENCE, "summarization", "lire", 4, {}).config()
    learn, left, _ = judge_lists(task, judge_spec(config, "summarization", "proxy"))
    judged = {p["id"] for p in prompts_of(task, "validation", EVIDENCE["tasks"]["summarization"]["validation"])}
    assert not judged & {r["id"] for r in learn + left} and not {r["id"] for r in learn} & {r["id"] for r in left}
    golds = [{r["id"] for r in judge_lists(task, judge_spec({**config, "seed": s}, "summarization", "gold"))[0]}
             for s in range(8)]
    assert len({frozenset(g) for g in golds}) == protocol.PROTOCOL["judges"]["golds"]


def test_plans_are_read_back_and_counted():
    find = lambda config: protocol.SUPPOSED  # noqa: E731
    whole = {name: plan(name, "evidence", find=find) for name in TABLES if name.startswith("matched_")}
    for runs in whole.values():
        for run in runs:
            assert read_experiment(run.config).config() == run.config
            assert math.isfinite(protocol.cost_of(run)) and run.labels["protocol"] == protocol.protocol_hash()
    finals = [r for r in whole["matched_dialogue"] if r.labels["stage"] == "final"]
    counts = pd.Series([r.labels["method"] for r in finals]).value_counts()
    assert counts["lire"] == 8 and counts["simpo"] == 5
    named, by = protocol.PROTOCOL["seeds"]["raised"], protocol.PROTOCOL["methods"]
    groups = (named, set(by["many"]) - set(named), by["few"])
    order = [next(i for i, g in enumerate(groups) if r.labels["method"] in g) for r in finals if
             r.labels["method"] != "start"]
    assert order == sorted(order) and set(order) == {0, 1, 2}, "what most claims are about comes first"
    for group in groups:  # whole seeds first
        seeds = [r.labels["seed"] for r in finals if r.labels["method"] in group]
        assert seeds == sorted(seeds)
    last = max(i for i, r in enumerate(finals) if r.labels["method"] == "lire")
    later = [r.config for r in whole["matched_dialogue"] if r.labels["method"] not in (*named, "start")]
    waiting = protocol.trial_plan("dialogue", EVIDENCE, 8,
                                  lambda c: None if c == finals[last].config or c in later[1:] else find(c))
    methods = [r.labels["method"] for r in waiting]
    assert "lire" in methods and methods.count("sft") == 1, "they wait for the claims' methods, but for what is there"
    assert set(methods) == {"start", "sft", *named}
    assert protocol.family_plan({n: v for n, v in EVIDENCE.items() if n != "family"}, 8, find) == []
    other = protocol.family_plan(EVIDENCE, 8, find)
    assert {r.config["source"]["policy"] for r in other if r.labels["stage"] == "final"} == {"gemma3"}
    assert {r.config["source"]["policy"] for r in other if r.labels["stage"] == "search"} == {"smollm2"}
    assert {r.labels["seed"] for r in other if r.labels["stage"] == "final"} == {0, 1, 2}


def test_a_changed_protocol_is_said_in_one_line():
    rows = [{"labels": {"protocol": "0123abcd"}}, {"labels": {"protocol": protocol.protocol_hash()}}, {"labels": {}}]
    said = protocol.changed_protocol(rows)
    assert "after 1 rows" in said and "0123abcd" in said and "git checkout" in said and "\n" not in said
    assert protocol.changed_protocol(rows[1:]) == ""
    old, tables = next(iter(protocol.PROTOCOL["amended"].items()))
    kept = [{"table": tables[0], "labels": {"protocol": old}}, {"table": "matched_dialogue", "labels": {"protocol": old}}]
    assert protocol.changed_protocol(kept[:1]) == "" and "after 1 rows" in protocol.changed_protocol(kept)


def test_the_tasks_that_came_later_search_by_a_rule_of_their_own():
    """More answers to a prompt, and the furthest of those within an error of the best; film reviews as before."""
    draw = np.random.default_rng(0).normal(size=(32, 1))
    course = lambda values, kl: {"points": [{"scores": {"proxy": values.tolist()}, "logps": [[kl]] * 32,  # noqa: E731
                                             "start_logps": [[0.0]] * 32}]}
    best, other = draw + 0.02, draw + np.random.default_rng(1).normal(0, 0.2, (32, 1))
    results, settings = [course(best, 2.0), course(other, 6.0)], [{"learning_rate": 1.0}, {"learning_rate": 2.0}]
    assert best.mean() > other.mean()
    scale, known = plans.SCALES["evidence"], {"sentiment": (0, 1), "dialogue": (1, 4), "summarization": (1, 4)}
    for task, (taken, samples) in known.items():
        assert protocol.chosen_point(results, settings, task)[0] == taken
        searched, _ = protocol.trial_search(task, "dpo", scale, lambda config: None)
        assert {run.config["judge"]["samples"] for run in searched} == {samples}
        final = protocol.trial(scale, task, "dpo", 0, {"learning_rate": 1.0})
        assert final.config()["judge"]["samples"] == 1


def test_hours_are_the_median_of_rows_of_the_same_sort():
    runs = [r for r in protocol.trial_plan("dialogue", EVIDENCE, 8, lambda config: protocol.SUPPOSED)
            if r.labels["method"] == "dpo" and r.labels["stage"] == "final"]
    rows = [{"config": run.config, "result": {"seconds": {"total": s}}} for run, s in zip(runs, (100, 200, 900))]
    assert protocol.hours_left(runs, rows) == pytest.approx(len(runs) * 200 / 3600)
    assert protocol.hours_left(runs) == pytest.approx(sum(map(protocol.cost_of, runs)) / 3600)
    assert protocol.hours_left([]) == 0


# ---------------------------------------------------------------- the whole rule, in simulated rows

SETS = 2000
SPREAD = {"dialogue": (0.162, 0.09), "summarization": (0.101, 0.22), "sentiment": (0.081, 0.61)}  # run to run; noise


def family_of(draw, spread: float, noise: float, seeds: int, opponents: int, truth: float = 0.0) -> dict:
    "Gains at equal distance of one method minus its opponents', as `claims` hands them to the rule."
    run = lambda: draw.normal(0, spread, seeds)  # noqa: E731  noise of the judging is part of the spread
    ours = run() + truth
    return {k: ours - run() for k in range(opponents)}


@pytest.mark.parametrize("task, seeds", [("summarization", 8)])  # others in test_decisions
def test_without_a_difference_any_false_answer_is_rare(task, seeds):
    draw, wrong = np.random.default_rng(11), 0
    largest = max(len(f["opponents"]) for f in protocol.PROTOCOL["families"])
    for _ in range(SETS):
        found = decide(family_of(draw, *SPREAD[task], seeds, largest), margin=RULE["margin"], level=RULE["level"],
                       plan=False)
        wrong += any(d.verdict in ("supported", "contradicted") for d in found.values())
    assert wrong / SETS <= 0.05


@pytest.mark.parametrize("task, truth, least", [("dialogue", 0.4, 0.75), ("summarization", 0.25, 0.75),
                                                ("sentiment", 0.2, 0.75)])
def test_power_of_eight_seeds(task, truth, least):
    """What a family of seven opponents sees with eight seeds, four times in five or nearly."""
    draw = np.random.default_rng(12)
    seen = [d.verdict == "supported" for _ in range(150)
            for d in decide(family_of(draw, *SPREAD[task], 8, 7, truth), plan=False).values()]
    assert np.mean(seen) >= least


def invented_frame(slopes: dict, seeds: int, draw, prompts: int = 24, failing: tuple = ()) -> pd.DataFrame:
    "Rows of a table as `load_runs` gives them; prompts differ in level, which no judge of answers may count."
    rows, level = [], draw.normal(0, 2, (prompts, 1))

    def point(gain, kl, samples=1):
        scores = (level + gain + draw.normal(0, 1, (prompts, samples))).tolist()
        return {"scores": {"gold": scores, "proxy": scores}, "logps": [[kl]] * prompts,
                "start_logps": [[0.0]] * prompts}

    for seed in range(seeds):
        start = point(0, 0, 8)
        if seed in failing:  # a judge to whom all answers to a prompt are alike
            start["scores"]["gold"] = [[level[i, 0] + 0.01 * k for k in range(8)] for i in range(prompts)]
        rows.append({"method": "start", "seed": seed, "stage": "final", "key": f"s{seed}",
                     "result": {"points": [start], "judges": {"gold": {"accuracy": 0.8, "lists": 90}}}})
        rows += [{"method": m, "seed": seed, "stage": "final", "key": f"{m}{seed}",
                  "result": {"points": [point(slope * kl**0.5, kl) for kl in (2.0, 5.0, far)]}}
                 for m, (slope, far) in slopes.items()]
    frame = pd.DataFrame(rows)
    frame.attrs = {"table": "matched_dialogue", "scale": "evidence"}
    return frame


def test_gains_are_read_where_both_have_been(monkeypatch):
    """DPO goes twice as far for a larger gain at its end; at equal distance LIRE gains more."""
    frame = invented_frame({"lire": (0.5, 7.0), "dpo": (0.35, 20.0)}, 8, np.random.default_rng(0))
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    claim = next(c for c in claims.matched_claims() if c.text == "LIRE gains more than DPO at equal distance, dialogue")
    found = claims.measure_claims([claim], results.Results("nowhere"))[claim.text]
    decides, beside, *_ = found.quantities
    assert found.verdict == "supported" and beside.interval.value == 7.0
    starts = courses.starts_by_seed(frame)
    unit = np.mean([s.unit for s in starts.values()])
    scale = np.mean([s.margin for s in starts.values()]) / 0.2
    assert decides.interval.value == pytest.approx(0.15 * 7**0.5 / unit / scale, abs=0.15)
    # a fifth of the total spread: variance 4 over prompts, 1 within
    assert np.mean([s.margin * s.unit for s in starts.values()]) == pytest.approx(0.2 * 5**0.5, rel=0.25)


def test_a_claim_waits_for_all_its_seeds(monkeypatch):
    """Seven seeds that are far apart decide nothing before the eighth, of the opponent as of the method."""
    text = "LIRE gains more than DPO at equal distance, dialogue"
    claim = next(c for c in claims.matched_claims() if c.text == text)
    whole = invented_frame({"lire": (0.9, 7.0), "dpo": (0.1, 9.0)}, 8, np.random.default_rng(3))
    for missing in ("lire7", "dpo7", "s7"):
        frame = whole[whole["key"] != missing]
        frame.attrs = whole.attrs
        monkeypatch.setattr(courses, "load_runs", lambda table, results, scale, frame=frame: frame)
        assert claims.measure_claims([claim], results.Results("nowhere"))[text].verdict == "not measured"
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: whole)
    assert claims.measure_claims([claim], results.Results("nowhere"))[text].verdict == "supported"


@pytest.mark.parametrize("slopes, verdict, why", [
    ({"lire": (0.0, 7.0), "dpo": (0.0, 9.0)}, "undecided", "neither has surely gained"),  # equal, since both stayed
    ({"lire": (0.5, 7.0), "dpo": (0.5, 9.0)}, "tie", "smaller than what matters"),
    ({"lire": (0.9, 0.2), "dpo": (0.1, 9.0)}, "undecided", "0.2 nats from the start"),
])
def test_methods_that_stayed_at_the_start_are_no_tie(monkeypatch, slopes, verdict, why):
    frame = invented_frame(slopes, 8, np.random.default_rng(5), prompts=200)
    for _, run in frame.iterrows():  # a course that ends where it says
        if run["method"] != "start":
            points, far = run["result"]["points"], slopes[run["method"]][1]
            for point, share in zip(points, (0.3, 0.6, 1.0)):
                point["logps"] = [[far * share]] * 200
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    monkeypatch.setitem(RULE, "margin", 0.3)
    text = "LIRE gains more than DPO at equal distance, dialogue"
    claim = next(c for c in claims.matched_claims() if c.text == text)
    found = claims.measure_claims([claim], results.Results("nowhere"))[text]
    assert found.verdict == verdict and why in found.sentence, found


def test_a_family_is_corrected_as_a_whole_from_its_first_claim_on(monkeypatch):
    """The rows of two opponents come first; what they say does not change when the other five are there."""
    frame = invented_frame({"lire": (0.5, 7.0), "dpo": (0.35, 20.0)}, 8, np.random.default_rng(0))
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    family = [c for c in claims.matched_claims()  # best-of-n has its values in the start's rows
              if c.family == "LIRE against the others, dialogue" and "best-of-n" not in c.text]
    text = "LIRE gains more than DPO at equal distance, dialogue"
    asked = courses.at_distance("matched_dialogue", "lire", "dpo", results.Results("nowhere"))
    alone = decide({text: asked.values})[text]
    said = claims.measure_claims(family, results.Results("nowhere"))[text].sentence
    assert f"p = {min(1, len(family) * alone.p):.2g}, corrected for {len(family)} claims" in said


def test_a_judge_that_fails_for_every_seed_is_the_reason(monkeypatch):
    frame = invented_frame({"lire": (0.5, 9.0), "dpo": (0.1, 9.0)}, 8, np.random.default_rng(1), failing=tuple(range(8)))
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    claim = next(c for c in claims.matched_claims() if c.text == "LIRE gains more than DPO at equal distance, dialogue")
    found = claims.measure_claims([claim], results.Results("nowhere"))[claim.text]
    assert found.verdict == "not measured" and "no judge of its seeds can tell" in found.sentence


def test_a_seed_twice_is_refused_not_chosen_from():
    frame = invented_frame({"lire": (0.5, 7.0)}, 2, np.random.default_rng(0))
    twice = pd.concat([frame, frame[frame["method"] == "lire"].assign(key=["a", "b"])])
    with pytest.raises(LireError, match="two settings of one method"):
        courses.courses_of(twice[twice["method"] == "lire"], courses.starts_by_seed(frame))


def test_a_judge_that_cannot_tell_answers_apart_decides_nothing(monkeypatch):
    frame = invented_frame({"lire": (0.5, 9.0), "dpo": (0.1, 9.0)}, 8, np.random.default_rng(1), failing=(1, 4, 6, 7))
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    claim = next(c for c in claims.matched_claims() if c.text == "LIRE gains more than DPO at equal distance, dialogue")
    found = claims.measure_claims([claim], results.Results("nowhere"))[claim.text]
    assert found.verdict == "too few seeds" and found.quantities[0].seeds == 4


def test_best_of_n_stands_beside_at_the_distance_that_it_reaches(monkeypatch):
    frame = invented_frame({"lire": (0.1, 9.0)}, 8, np.random.default_rng(2))
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    claim = next(c for c in claims.matched_claims()
                 if c.text == "LIRE gains more than best-of-n at equal distance, dialogue")
    found = claims.measure_claims([claim], results.Results("nowhere"))[claim.text]
    assert found.verdict == "contradicted" and found.quantities[1].interval.value == pytest.approx(math.log(8) - 7 / 8)


# ---------------------------------------------------------------- what lies beside the rows


def test_the_judges_of_the_stored_rows_are_there():
    """Each with the accuracy that the rows say, found by its name, and no path of a machine in it."""
    from lire_nb.base.errors import data_path
    from lire_nb.lab.trials import judge_spec

    kept = {path.parent.name.partition("-")[0]: path.parent for path in data_path("trials").glob("judges/*/spec.json")}
    rows = [row for row in results.Results(data_path("results")).rows.values() if row["config"]["kind"] == "trial"]
    assert rows and kept
    for row in rows:
        for name, known in row["result"]["judges"].items():
            spec = judge_spec(row["config"], row["config"]["judge"]["task"], name)
            folder = kept[plans.config_key(spec)]
            assert json.loads((folder / "spec.json").read_text()) == spec
            found = json.loads((folder / "held_out.json").read_text())
            assert {**found, "member": spec["member"]} == known
    for config in data_path("trials").glob("judges/*/adapter_config.json"):
        assert json.loads(config.read_text())["base_model_name_or_path"] == EVIDENCE["backbone"]


# ---------------------------------------------------------------- texts


def test_texts_lie_beside_their_row_and_can_be_judged_again(tmp_path):
    store = results.Results(tmp_path)
    point = {"step": 3, "ids": ["a"], "prompts": [[{"role": "user", "content": "Hé?"}]],
             "completions": [["x\u2028", ""]], "token_ids": [[[1, 2], []]]}
    run = Run("toy", {"kind": "train", "seed": 1})
    row = store.append(run, {"points": [], "texts": [point], "seconds": {"total": 1}}, {"date": "2026-01-01"})
    assert "texts" not in row["result"] and "texts" not in results.Results(tmp_path).rows[run.key]["result"]
    found = texts.judge_texts(tmp_path, lambda prompts, completions: [len(p[0]["content"]) + len(c)
                                                                      for p, c in zip(prompts, completions)])
    assert found["score"].tolist() == [5.0, 3.0] and set(found["key"]) == {run.key}
    assert [list(ids) for ids in texts.read_texts(tmp_path)["token_ids"]] == [[1, 2], []]
    for bad in (lambda p, c: [1.0], lambda p, c: [math.inf] * len(c)):
        with pytest.raises(LireError, match="finite score"):
            texts.judge_texts(tmp_path, bad)


# ---------------------------------------------------------------- the linear judge


def test_linear_judge_finds_the_minimum_of_its_loss():
    """Against plain gradient descent, written out without sparse matrices."""
    from lire_nb.linear_judge import train_linear_judge
    from lire_nb.records import make_record

    draw = np.random.default_rng(0)
    words = ["good", "bad", "fine", "poor", "so", "very"]
    lists = [make_record(f"q{i}", [" ".join(draw.choice(words, 4)) for _ in range(3)], rewards=[2.0, 1.0, None])
             for i in range(12)]
    judge = train_linear_judge(lists, penalty=0.1, least=1)
    rows = [judge.rows([r["prompt"]] * 2, r["completions"][:2]).toarray() for r in lists]
    apart = np.array([a - b for a, b in rows])
    w = np.zeros(apart.shape[1])
    for _ in range(4000):
        w -= 0.5 * (-(apart / (1 + np.exp(apart @ w))[:, None]).mean(0) + 0.1 * w)
    assert np.allclose(w, judge.weights, atol=1e-4)
    assert judge(["q"], [""]) == [0.0]


# ---------------------------------------------------------------- what the file says is what happens


@pytest.mark.parametrize("change, says", [
    (lambda p: p["seeds"].update(fwe=3), "seeds.fwe"),
    (lambda p: p["judges"].pop("golds"), "judges.golds"),
    (lambda p: p["rule"].update(presicion="float32"), "rule.presicion"),
    (lambda p: p["grids"]["dpo"].update(raets=[1e-5]), "grids.dpo.raets"),
    (lambda p: p["families"][0].update(opponent=[]), "families.opponent"),
    (lambda p: p.update(trend=[]), "trend"),
    (lambda p: p["methods"]["many"].append("dop"), "dop"),
    (lambda p: p["trends"][0].update(form=2.0), "trends.form"),
    (lambda p: p["pairs"][1].pop("less"), "pairs.less"),
    (lambda p: p["families"][1]["opponents"].append("lire_anchord"), "lire_anchord"),
])
def test_a_misspelt_name_of_the_protocol_is_said(monkeypatch, change, says):
    found = copy.deepcopy(protocol.PROTOCOL)
    change(found)
    monkeypatch.setattr(protocol, "read_settings", lambda name: found)
    with pytest.raises(LireError, match=says) as e:
        protocol._read_protocol()
    assert "data/protocol.toml" in str(e.value) and len(str(e.value)) < 900
    monkeypatch.setattr(protocol, "read_settings", lambda name: protocol.PROTOCOL)
    assert protocol._read_protocol() == protocol.PROTOCOL


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "grids.toml").write_text("[dpo\n")
    monkeypatch.setattr(plans, "data_path", lambda name: tmp_path / name)
    for name in ("grids.toml", "scales/none.toml"):
        with pytest.raises(LireError, match=name):
            plans.read_settings(name)


def test_trials_compute_in_float32_also_where_bfloat16_is_fast(monkeypatch):
    from lire_nb.lab import experiments
    from lire_nb.models import compute_dtype
    from lire_nb.training import LIREConfig

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    seen = []

    def kind(config, work, keep):
        seen.append((compute_dtype("cpu"), LIREConfig(use_cpu=True).bf16))
        return {}

    monkeypatch.setitem(experiments.KINDS, "trial", kind)
    monkeypatch.setitem(experiments.KINDS, "rounds", kind)
    trial = protocol.trial(EVIDENCE, "sentiment", "lire", 0, {})
    rounds = next(r for r in protocol.rounds_plan(EVIDENCE, 1, lambda config: protocol.SUPPOSED)
                  if r.config["kind"] == "rounds")
    for config in (trial.config(), rounds.config, {**trial.config(), "precision": "auto"}):
        experiments.run_experiment(config, "nowhere")
    assert seen == [(torch.float32, False)] * 2 + [(torch.bfloat16, True)] and compute_dtype("cpu") is torch.bfloat16
    with pytest.raises(LireError, match="float32"):
        read_experiment({**trial.config(), "precision": "float8"})


def test_what_came_with_the_rows_is_not_made_again(tmp_path, monkeypatch):
    """A judge from data/ scores as it did where it was made; only what it lacks is made."""
    from lire_nb.lab import trials
    from lire_nb.tasks import load_task

    config = protocol.trial(SCALES["smoke"], "sentiment", "lire", 0, {}).config()
    texts = (["Movie review:\n"] * 2, ["a fine film", "a dull one"])
    before, known = trials.trial_judges(config, "sentiment", tmp_path / "first")
    folders = list((tmp_path / "first" / "judges").iterdir())
    (tmp_path / "data").mkdir()
    (tmp_path / "first" / "judges").rename(tmp_path / "data" / "judges")
    monkeypatch.setattr(trials, "data_path", lambda name: tmp_path / "data" if name == "trials" else None)
    monkeypatch.setattr(trials, "_make_judge", lambda *given: pytest.fail("made again"))
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    after, again = trials.trial_judges(config, "sentiment", tmp_path / "second")
    assert torch.equal(torch.rand(1), drawn), "loading a judge draws nothing"
    assert again == known and not (tmp_path / "second").exists()
    for name in ("proxy", "gold", "linear"):
        assert before[name](*texts) == after[name](*texts)
    size = sum(f.stat().st_size for f in (tmp_path / "data" / "judges").rglob("adapter_model.safetensors"))
    assert len(folders) >= 3 and size < 2e6 and load_task("sentiment")


def test_the_start_is_asked_once_about_the_lists_of_all_trials(tmp_path, monkeypatch):
    """A second trial reads the start's log-probs where the first one left them, and ends where it would end alone."""
    from lire_nb import logprobs
    from lire_nb.lab import experiments

    def result(method, place):
        config = protocol.trial(SCALES["smoke"], "sentiment", method, 0, {"learning_rate": 1e-3}).config()
        return {k: v for k, v in experiments.run_experiment(config, tmp_path / place).items() if k != "seconds"}

    asked, measure = [], logprobs.dataset_logps
    monkeypatch.setattr(logprobs, "dataset_logps", lambda *a, **k: asked.append(1) or measure(*a, **k))
    first = result("dpo", "one")
    alone, kept = len(asked), [*(tmp_path / "one" / "reference").rglob("*.jsonl")]
    assert result("dpo", "one") == first and len(asked) == 2 * alone - 1 and len(kept) == 1
    (tmp_path / "two").mkdir()
    for shared in ("judges", "scored", "samples"):
        if (tmp_path / "one" / shared).exists():
            (tmp_path / "two" / shared).symlink_to(tmp_path / "one" / shared)
    assert result("lire", "two") and not (tmp_path / "two" / "reference").exists()


@pytest.mark.parametrize("margin, level, expected", [(0.2, 0.05, "supported"), (0.4, 0.05, "tie"),
                                                     (0.2, 1e-12, "undecided")])
def test_margin_and_level_are_those_of_the_file(monkeypatch, margin, level, expected):
    frame = invented_frame({"lire": (0.5, 7.0), "dpo": (0.35, 20.0)}, 8, np.random.default_rng(0))
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    monkeypatch.setitem(RULE, "margin", margin)
    monkeypatch.setitem(RULE, "level", level)
    claim = next(c for c in claims.matched_claims() if c.text == "LIRE gains more than DPO at equal distance, dialogue")
    found = claims.measure_claims([claim], results.Results("nowhere"))[claim.text]
    assert found.verdict == expected
    # a margin is a share of a standard deviation, so it changes no value
    assert found.quantities[0].interval.value == pytest.approx(0.155, abs=0.06)


def test_a_pair_of_settings_is_read_in_the_same_unit_as_two_methods(monkeypatch):
    """Rows that differ in their labels alone: `between` finds what `at_distance` finds."""
    frame = invented_frame({"lire": (0.5, 7.0), "dpo": (0.35, 20.0)}, 8, np.random.default_rng(3))
    frame = frame.assign(setting="pool", value=frame["method"])
    monkeypatch.setattr(courses, "load_runs", lambda table, results, scale: frame)
    store = results.Results("nowhere")
    _, one, far, *_ = courses.at_distance("any", "lire", "dpo", store)
    _, other, again, *_ = courses.between("any", ["pool", "lire"], ["pool", "dpo"], store)
    assert np.allclose(one, other) and far == again == 7.0


def test_seeds_are_those_of_the_file(monkeypatch):
    seeds = protocol.PROTOCOL["seeds"]
    assert EVIDENCE["seeds"] == seeds["many"] and seeds["few"] >= 5
    wishes = {"dialogue": {"lire": 99, "rrhf": 11, "dpo": 10}}
    monkeypatch.setattr(protocol, "_pilot", lambda: wishes)
    found = {m: protocol.seeds_of("dialogue", m, seeds["many"]) for m in ("lire", "dpo", "rrhf", "simpo")}
    assert found == {"lire": seeds["most"], "dpo": 10, "rrhf": seeds["many"], "simpo": seeds["few"]}
    assert protocol.seeds_of("sentiment", "lire", seeds["many"]) == seeds["many"]


# ---------------------------------------------------------------- no row is lost at the end


def test_a_policy_that_writes_nothing_is_a_row(tmp_path):
    """No text has two tokens, so there is no share of pairs; the row can be stored all the same."""
    from lire_nb.lab.trials import _columns

    lists = [{"id": "a", "prompt": "p", "completions": [""], "meta": {"finish_reasons": ["stop"], "token_ids": [[0]]}}]
    found = _columns(lists, {"gold": [[0.0]]}, [{"tokens": [1], "logps": [-0.1], "start_logps": [-2.0]}])
    assert found["distinct_2"] is None and found["degenerate"] == 0.0
    point = {"step": 1, **found}
    row = results.Results(tmp_path).append(Run("toy", {"kind": "trial"}), {"points": [point], "texts": [{
        "step": 1, **point.pop("texts")}]}, {"date": "2026-01-01"})
    assert results.Results(tmp_path).rows[row["key"]]["result"]["points"][0]["distinct_2"] is None
    assert texts.read_texts(tmp_path)["completion"].tolist() == [""]


def test_a_number_that_is_not_finite_costs_its_own_run_alone(tmp_path, monkeypatch):
    from lire_nb.lab import runner

    runs = plan("matched_sentiment", "smoke")[:1]
    twin = Run(runs[0].table, {**runs[0].config, "seed": 1}, {**runs[0].labels, "seed": 1})
    monkeypatch.setattr(runner, "plan", lambda *a, **k: [*runs, twin])
    monkeypatch.setattr(runner, "run_experiment", lambda config, work, keep: {
        "x": math.nan if config["seed"] == 0 else 1.0, "seconds": {"total": 0.0}})
    said = []
    with pytest.raises(LireError, match="1 runs failed; 1 are kept"):
        runner.reproduce(["matched_sentiment"], "smoke", results=tmp_path / "r", work=tmp_path / "w", jobs=1,
                         say=said.append)
    assert any("not finite" in line for line in said)
    assert list(results.Results(tmp_path / "r").rows) == [twin.key]


def test_a_search_that_breaks_keeps_its_points_and_a_final_run_does_not():
    from lire_nb.lab.trials import _broken

    class Breaks:
        def train(self):
            raise LireError("loss of list 3: not finite")

    assert "list 3" in _broken(Breaks(), search=True)
    with pytest.raises(LireError, match="list 3"):
        _broken(Breaks(), search=False)
    broke = {"points": []}
    find = lambda config: broke if config["training"]["learning_rate"] > 5e-5 else course(6.0)  # noqa: E731
    runs, best = protocol.trial_search("dialogue", "dpo", EVIDENCE, find)
    assert len(runs) == 6 and best["learning_rate"] <= 5e-5
    assert protocol.trial_search("dialogue", "dpo", EVIDENCE, lambda config: broke) == (runs[:3], None)


@pytest.mark.parametrize("mean, spread, prompts", [(0.0, 0.12, 0.0), (0.5, 0.3, 0.0), (0.15, 0.1, 0.0), (0.0, 0.4, 0.0),
                                                   (0.3, 0.05, 0.9), (0.05, 0.03, 0.3)])
def test_the_power_of_a_pilot_is_what_the_rule_then_decides(mean, spread, prompts, monkeypatch):
    """`prompts` is the standard deviation of a difference over 60 prompts, the same for every seed."""
    draw, N = np.random.default_rng(0), 60
    means = mean + spread * np.array([-1.0, 0.0, 1.0])  # mean and standard deviation of three seeds
    of_prompt = draw.normal(0, 1, N)
    of_prompt = prompts * (of_prompt - of_prompt.mean()) / of_prompt.std(ddof=1)

    def noise(S: int) -> np.ndarray:  # of a seed and prompt; no seed's mean has some
        found = draw.normal(0, 0.4, (S, N))
        return found - found.mean(1, keepdims=True)

    def values(means: np.ndarray) -> np.ndarray:
        return means[:, None] + of_prompt + noise(len(means)) if prompts else means

    claim = {"method": "lire", "opponent": "dpo", "far": 4.0, "together": 4, "values": values(means),
             "reach": np.array([0.9, 1.0, 1.1])}
    monkeypatch.setattr(courses, "_pilot_claims", lambda runs, starts: [claim])
    runs = pd.DataFrame()
    runs.attrs = {"table": "matched_dialogue", "scale": "evidence"}
    found = courses.pilot_power(runs, {}).iloc[0]
    assert found["seeds"] == 8 and found[["pilot", "shared spread"]].tolist() == pytest.approx([mean, spread], abs=0.006)
    if prompts:
        assert found["prompts"] == pytest.approx(prompts / N**0.5, abs=0.02)

    def decided(truth, pilot=(), n: int = 600) -> dict:  # verdict -> its share
        told = [decide({"c": values(np.append(pilot, draw.normal(t, spread, 8 - len(pilot))))}, margin=RULE["margin"],
                       level=RULE["level"], plan=False, together=4)["c"].verdict for t in np.broadcast_to(truth, n)]
        return pd.Series(told).value_counts(normalize=True).reindex(["supported", "contradicted", "tie", "undecided"],
                                                                    fill_value=0.0)

    either = 1 - decided(draw.normal(mean, spread / 3**0.5, 600), means)["undecided"]
    assert abs(found["verdict"] - either) < 0.07, (found["verdict"], either)
    if not prompts:  # drawn anew with the seeds, the same prompts would shift a difference that is zero
        assert abs(found["tie, if equal"] - decided(0.0)["tie"]) < 0.06
        if np.isfinite(found["seen from"]):
            assert 0.74 < decided(found["seen from"])["supported"] < 0.9  # rounded up to a hundredth
    claim["reach"] = np.array([0.19, 0.2, 0.21])  # no tie is told where nobody surely gained the margin
    assert courses.pilot_power(runs, {}).iloc[0]["tie, if equal"] == 0


@pytest.mark.parametrize("mean, spread, reach, verdict, because", [
    (-0.1, 0.02, 0.1, "contradicted", "though by less than what matters"),  # a sure sign, where nobody gained the margin
    (0.1, 0.02, 0.1, "supported", "though by less than what matters"), (-0.1, 0.02, 0.9, "tie", "surely smaller"),
    (0.0, 0.05, 0.9, "tie", "surely smaller"), (0.0, 0.05, 0.1, "undecided", "a tie would say nothing"),
    (0.5, 0.05, 0.1, "supported", "above zero (p")])
def test_where_a_tie_would_say_nothing_a_sure_sign_is_told(mean, spread, reach, verdict, because):
    """The verdict that the pilot's power counts on: sign or tie where a tie can be told, the sign alone elsewhere."""
    values = mean + spread * np.array([-1.2, -0.8, -0.4, 0.0, 0.0, 0.4, 0.8, 1.2])
    quantity = claims._deciding("gain", values)._replace(reach=reach + 0.02 * np.array([-1, 1] * 4)[:, None])
    found = decide({"c": values, "d": values}, margin=0.2, level=0.05)["c"]
    told, reason = claims._unless_near(found, quantity, 2, margin=0.2, level=0.05)
    assert told.verdict == verdict and because in reason
    doubted, why = claims._unless_near(found, quantity._replace(doubt="hardly trained"), 2, margin=0.2, level=0.05)
    assert doubted.verdict == "undecided" and why == "hardly trained"


def test_a_pilot_needs_its_rows():
    runs = pd.DataFrame({"stage": ["final"], "method": ["start"], "seed": [0], "key": ["s0"]})
    runs.attrs = {"table": "matched_dialogue", "scale": "evidence"}
    with pytest.raises(LireError, match="no pilot yet"):
        courses.pilot_power(runs, {})


def test_a_setting_that_is_a_word_stands_in_the_tables():
    assert results._tried({"learning_rate": 1e-4, "temperature": "auto"}) == "learning rate 0.0001, temperature auto"


def test_a_raised_method_has_the_start_of_each_of_its_seeds(monkeypatch):
    monkeypatch.setattr(protocol, "_pilot", lambda: {"dialogue": {"lire": 11, "dpo": 40, "sft": 12}})
    seeds = {m: protocol.seeds_of("dialogue", m, 8) for m in ("lire", "dpo", "sft", "start", "simpo")}
    assert seeds == {"lire": 11, "dpo": 12, "sft": 8, "start": 12, "simpo": 5}
    assert protocol.seeds_of("dialogue", "start", 2) == 2 and protocol.seeds_of("summarization", "start", 8) == 8


@pytest.mark.parametrize("said", [
    {"dialog": {"lire": 12}}, {"sentiment": {"lire": 12}}, {"dialogue": 12}, {"dialogue": {"sft": 12}},
    {"dialogue": {"lire": 13}}, {"dialogue": {"lire": 8}}, {"dialogue": {"lire": 12.0}}])
def test_a_pilot_raises_what_the_protocol_allows_and_nothing_else(monkeypatch, said):
    monkeypatch.setattr(protocol, "read_settings", lambda name: {"dialogue": {"dpo": 9}})
    assert READ_PILOT() == {"dialogue": {"dpo": 9}}
    monkeypatch.setattr(protocol, "read_settings", lambda name: said)
    with pytest.raises(LireError, match="pilot.toml"):
        READ_PILOT()


def test_each_seed_is_told_in_the_unit_of_its_own_judge():
    frame = invented_frame({"lire": (0.5, 7.0), "dpo": (0.2, 9.0)}, 8, np.random.default_rng(1))
    for run in frame.to_dict("records"):  # a judge with larger numbers says the same
        for point in run["result"]["points"]:
            point["scores"]["gold"] = (np.array(point["scores"]["gold"]) * 2.0 ** run["seed"]).tolist()
    plain = invented_frame({"lire": (0.5, 7.0), "dpo": (0.2, 9.0)}, 8, np.random.default_rng(1))
    # other prompts that differ more: the same gain is less of all the spread
    apart = {run["seed"]: run["result"]["points"][0] for run in plain.to_dict("records") if run["method"] == "start"}
    sides = [[courses.courses_of(results.final_runs(f, method=m), courses.starts_by_seed(f)) for m in ("lire", "dpo")]
             for f in (frame, plain)]
    found = [courses._asked("", side, courses.starts_by_seed(f), lambda g: g[0] - g[1]).values
             for side, f in zip(sides, (frame, plain))]
    np.testing.assert_allclose(*found, rtol=1e-9)
    gains, _ = courses.at_common_distance(sides[1])
    for row, seed in zip(found[1], range(8)):
        scores = np.array(apart[seed]["scores"]["gold"])
        unit = np.sqrt(scores.var(1, ddof=1).mean())
        np.testing.assert_allclose(row, (gains[0, seed] - gains[1, seed]) * unit / scores.std(), rtol=1e-9)


def test_what_was_read_is_read_again_after_a_row_is_added(tmp_path):
    store = results.Results(tmp_path)
    assert [store.once("x", lambda n=n: n) for n in (1, 2)] == [1, 1]
    store._take({"key": "k", "date": "2026-01-01", "code": "c", "config": {"kind": "trial"}})
    assert store.once("x", lambda: 3) == 3


def test_a_table_with_two_settings_of_one_method_is_not_one_row():
    frame = invented_frame({"lire": (0.5, 7.0)}, 3, np.random.default_rng(2))
    twice = pd.concat([frame, frame[frame["method"] == "lire"].assign(key="other" + frame["key"])])
    with pytest.raises(LireError, match="two settings"):
        courses.judged_table(twice, courses.starts_by_seed(frame))
    deaf = {seed: s._replace(fails="all alike") for seed, s in courses.starts_by_seed(frame).items()}
    assert courses.judged_table(frame, deaf).empty

"""Every rival against a second implementation, against identities, and against TRL on the same log-probs."""
import inspect
import math
import pickle
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from losses_oracle import ORACLES as FIRST
from losses_oracle import candidates
from rivals_oracle import ORACLES
from test_losses import INF, NAN, FixedLogps, call, pack, random_list
from torch.testing import assert_close

from lire_nb.losses import lire_loss, list_metrics, scored_mask
from lire_nb.rivals import LOSSES, get_loss, kto_loss, lipo_loss, loss_card, offline_pg_loss, qrpo_loss

RIVALS = {name: spec for name, spec in LOSSES.items() if name not in FIRST}  # test_losses has the others
SCORES = ("sum", "token", "ratio", "token_ratio")
CONFIGS = [
    *(("infonca", {"direction": d, "alpha": a}) for d in ("forward", "reverse") for a in (1.0, 3.0)),
    *((name, {"score": s}) for name in ("infonca", "nca", "regression", "odpo", "kto", "apo", "dpo", "lire", "simpo")
      for s in SCORES),
    ("nca", {"alpha": 0.5, "beta": 0.3}), ("regression", {"reward_transform": "zscore", "beta": 0.02}),
    ("regression", {"huber": 0.7}), ("lipo", {"reward_transform": "rank"}),
    ("lipo", {"reward_transform": "minmax", "beta": 0.3}),
    ("lipo", {"reward_transform": "rank", "weights": "equal"}),
    *(("offline_pg", {"variant": v, "score": s}) for v in ("clip", "topr", "asymre") for s in ("ratio", "token_ratio")),
    ("offline_pg", {"clip": 0.3, "beta": 0.2, "score": "token_ratio"}),
    ("offline_pg", {"variant": "asymre", "delta": 0.0}),
    ("awr", {}), ("awr", {"beta": 0.3, "score": "token"}), ("simpo", {"pairs": "all", "gamma": 0.3}),
    ("odpo", {"pairs": "all", "variant": "linear", "alpha": 0.4}), ("odpo", {"pairs": "all"}), ("qrpo", {}),
    ("qrpo", {"beta": 0.05}),
    ("swepo", {}), ("swepo", {"alpha": 0.2, "beta": 0.5}), ("kto", {"z": 1.5, "desirable_weight": 2.0}),
    ("kto", {"threshold": 0.2, "undesirable_weight": 0.5}), ("apo", {"variant": "down"}),
    ("apo", {"variant": "down", "threshold": 0.3}),
    *(("plackett_luce_dpo", {"top_k": k, "rho": r}) for k in (1, 2, None) for r in (0.0, 0.3)),
    *(("dpo", {"variant": v, "score": "token_ratio"}) for v in ("ipo", "hinge")),
    *(("lire", {"temperature": "auto", "score": s, "reward_transform": "none"}) for s in SCORES),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}" for name, options in CONFIGS]


def given(name, options):
    "KTO's z comes from the other lists of a batch unless it is given; the oracle reads one list."
    return {"z": 0.0, **options} if name == "kto" else options


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
def test_agrees_with_plain_python_on_200_random_ragged_lists(name, options):
    rng, compared = random.Random(f"{name} {sorted(map(str, options.items()))}"), 0
    for _ in range(25):
        lists = [random_list(rng) for _ in range(8)]
        (logps, rewards, refs, lengths), mask, places = pack(lists, rng)
        value, grad = call(name, logps, rewards, refs, lengths, scored_mask(rewards, mask), **given(name, options))
        for b, one in enumerate(lists):
            scored = [k for k in range(len(one[0])) if not math.isnan(one[1][k])]
            dual = ORACLES[name](candidates(*[[column[k] for k in scored] for column in one]), **options)
            wanted = [0.0] * logps.shape[1]
            for k, partial in zip(scored, dual.partials):
                wanted[places[b][k]] = partial
            size = max(map(abs, wanted))
            worst = max(abs(got - want) for got, want in zip(grad[b].tolist(), wanted))
            assert abs(value[b].item() - dual.value) <= 1e-9 * max(abs(dual.value), 1e-3), (b, one)
            assert worst <= 1e-9 * max(size, 1e-6), (b, one, grad[b], wanted)
            compared += 1
    assert compared >= 200


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_nothing_overflows(name, options, dtype):
    logps = torch.tensor([[-1e4, -1.0, -9e3, -1e4], [-1e4] * 4], dtype=dtype)
    refs = torch.tensor([[-1e4 + 3, -1.5, -9e3, -1e4], [-1e4] * 4], dtype=dtype)
    lengths = torch.tensor([[1000, 1, 4000, 900], [3000, 4000, 5000, 6000]])
    extremes = ([1.0, 0.0, NAN, -1.0], [0.0, 1.0, 2.0, 1.0])
    for rewards in extremes:
        both = torch.tensor([rewards] * 2)
        value, grad = call(name, logps, both, refs, lengths, scored_mask(both), **given(name, options))
        assert value.dtype == torch.float32 and value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", RIVALS)
def test_one_candidate_and_tied_lists(name):
    "No preference comes from nothing. InfoNCA and NCA hold a tied list level, and say so on their cards."
    more = {"reward_transform": "rank"} if name == "lipo" else {"delta": 0.0} if name == "offline_pg" else {}
    logps, refs = torch.tensor([[-3.0, -5.0, -4.0], [-3.5, -4.0, -4.0]]).split(1)
    lengths = torch.tensor([[3, 4, 5]])
    _, tied = call(name, logps, torch.full((1, 3), 0.3), refs, lengths, **more)
    if name in ("lipo", "simpo", "odpo", "swepo", "kto", "apo"):
        assert tied.tolist() == [[0, 0, 0]]
    _, alone = call(name, logps[:, :1], torch.tensor([[1.0]]), refs[:, :1], lengths[:, :1], **more)
    if name not in ("nca", "awr", "offline_pg"):
        assert alone.tolist() == [[0]]


def test_every_rival_has_its_card_and_refuses_what_it_cannot_read():
    logps, rewards = torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    for name, spec in RIVALS.items():
        assert spec.formula and spec.source and spec.optimum and spec.pitfall and get_loss(name) is LOSSES[name] is spec
        if spec.needs_ref:
            with pytest.raises(ValueError, match="ref_logps is None"):
                spec.fn(logps, rewards, lengths=torch.tensor([[2, 3, 4]]))
        with pytest.raises(ValueError, match="score is 'words': it must be one of"):
            spec.fn(logps, rewards, ref_logps=logps, lengths=torch.tensor([[2, 3, 4]]), score="words")
    with pytest.raises(ValueError, match=r"rewards\[0, 1\] of lipo_loss is 1.5: it must lie in \[0, 1\]"):
        lipo_loss(logps, torch.tensor([[0.0, 1.5, 0.5]]), ref_logps=logps)
    with pytest.raises(ValueError, match="variant is 'ppo'"):
        offline_pg_loss(logps, rewards, ref_logps=logps, variant="ppo")
    for bad in (NAN, INF):
        with pytest.raises(ValueError, match="finite"):
            lire_loss(logps, torch.tensor([[bad, 0.0, 1.0]]))
    with pytest.raises(ValueError, match="temperature is 'cold': it must be a finite number > 0, or 'auto'"):
        lire_loss(logps, rewards, temperature="cold")
    with pytest.raises(ValueError, match="lire_loss with score='ratio' needs the reference"):
        lire_loss(logps, rewards, score="ratio")


def test_a_card_says_what_the_code_does():
    for name, spec in LOSSES.items():
        card = loss_card(name)
        facts = [spec.source, spec.pitfall, spec.optimum, *(f"`{k}={v!r}`" for k, v in spec.settings.items())]
        assert all(fact in card for fact in facts) and spec.formula in card.replace(r"\|", "|")
        assert {line.replace(r"\|", "").count("|") for line in card.splitlines()} == {3}, "a cell is broken in two"
    assert len(loss_card().splitlines()) == 2 + len(LOSSES) and "pitfall" in loss_card("lire", "dpo").splitlines()[0]


def test_one_head_for_all_is_a_function_like_any_other():
    assert pickle.loads(pickle.dumps(kto_loss)) is kto_loss and "arXiv 2402.01306" in kto_loss.__doc__
    for spec in LOSSES.values():
        with pytest.raises(TypeError, match="nonsense"):
            spec.fn(torch.zeros(1, 2), torch.zeros(1, 2), ref_logps=torch.zeros(1, 2), nonsense=1)


def test_reverse_infonca_pushes_down_what_is_hopeless():
    "A share q that rounds to 0 is the smallest number, not one without a say."
    logps, rewards = torch.tensor([[-3.0, -3.0]]), torch.tensor([[0.0, -200.0]])
    value, grad = call("infonca", logps, rewards, logps, None, direction="reverse")
    assert value.item() > 10 and grad[0, 1] > 0 > grad[0, 0]


def test_every_rival_keeps_the_rules_of_all_losses():
    "One signature, a nan log-prob of a real candidate is seen, and rewards and reference are data."
    for name, spec in RIVALS.items():
        parameters = inspect.signature(spec.fn).parameters
        assert list(parameters)[:3] == ["logps", "rewards", "mask"]
        assert {"ref_logps", "lengths", "score"} <= set(parameters)
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
        more = {"reward_transform": "minmax"} if name == "lipo" else {"z": 0.0} if name == "kto" else {}
        logps, rewards = torch.tensor([[NAN, -1.0], [-2.0, -1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        value, _ = call(name, logps, rewards, torch.zeros(2, 2), torch.ones(2, 2), **more)
        assert value[0].isnan() and value[1].isfinite(), name
        logps, rewards, refs = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
        loss = spec.fn(logps, rewards, ref_logps=refs, lengths=torch.ones(2, 3), **more)
        assert torch.autograd.grad(loss.sum(), (rewards, refs), allow_unused=True) == (None, None), name


def test_asks_ref_follows_the_settings():
    for name, settings, asked in (
        ("lire", {}, False), ("lire", {"score": "ratio"}, True), ("dpo", {"score": "sum"}, False),
        ("offline_pg", {}, True), ("offline_pg", {"variant": "asymre"}, False), ("rrhf", {}, False),
        ("simpo", {}, False), ("simpo", {"score": "token_ratio"}, True),
    ):
        assert LOSSES[name].asks_ref(**settings) is asked, (name, settings)


def test_auto_temperature_is_the_spread_and_lists_without_one_teach_nothing():
    logps, rewards = torch.tensor([[-30.0, -50.0, -90.0], [-7.0, -7.0, -7.0]]), torch.tensor([[1.0, 0.0, 2.0]] * 2)
    sd = logps[0].std(correction=0).item()
    value, grad = call("lire", logps, rewards, None, None, temperature="auto", reward_transform="none")
    by_hand, by_hand_grad = call("lire", logps, rewards, None, None, temperature=sd, reward_transform="none")
    assert_close(value[0], by_hand[0])
    assert_close(grad[0], by_hand_grad[0])
    assert grad[1].tolist() == [0, 0, 0] and value[1].item() == -1.0
    seen = list_metrics(logps, rewards, temperature="auto")
    assert_close(seen["expected_reward"], -value)
    # At the first step every ratio is zero; the unit is still that of the log-probs.
    _, first = call("lire", logps[:1], rewards[:1], logps[:1], None, temperature="auto", score="ratio",
                    reward_transform="none")
    assert first.abs().max() > 1e-3


def test_kto_reads_the_other_lists_for_its_reference_point():
    logps = torch.tensor([[-3.0, -5.0], [-2.0, -1.0], [-9.0, -8.0]])
    refs = torch.tensor([[-4.0, -7.0], [-2.5, -3.0], [-8.0, -9.5]])
    rewards = torch.tensor([[1.0, 0.0]] * 3)
    together = kto_loss(logps, rewards, ref_logps=refs)
    for b in range(3):
        others = [k for k in range(3) if k != b]
        z = max(0.0, (logps - refs)[others].mean().item())
        assert_close(together[b : b + 1],
                     kto_loss(logps[b : b + 1], rewards[b : b + 1], ref_logps=refs[b : b + 1], z=z))


def test_qrpo_reads_the_quantile_of_the_start_rewards():
    logps, refs = torch.tensor([[-3.0, -5.0]], dtype=torch.float64), torch.tensor([[-4.0, -4.0]], dtype=torch.float64)
    start = torch.tensor([[0.1, 0.4, NAN, 0.9]])
    ours = qrpo_loss(logps, torch.tensor([[0.5, 0.4]]), ref_logps=refs, start_rewards=start)
    level = 1e-3 * math.log(1e-3) + 1
    assert_close(ours.item(), sum((2 / 3 - level - 1e-3 * d) ** 2 for d in (1.0, -1.0)) / 2)


# ---------------------------------------------------------------- peers
PAIRS = {
    "ipo": ("dpo", {"variant": "ipo", "score": "token_ratio"}), "sigmoid_norm": ("dpo", {"score": "token_ratio"}),
    "nca_pair": ("nca", {"alpha": 1e-3}), "exo_pair": ("infonca", {"direction": "reverse"}),
    "apo_zero": ("apo", {"variant": "zero"}), "apo_down": ("apo", {"variant": "down"}),
}


@pytest.mark.parametrize("theirs", PAIRS)
def test_is_TRLs_loss_on_the_same_log_probs(theirs):
    trl = pytest.importorskip("trl", reason="trl is not installed; it is in the peers extra")
    if "fused_lm_head" not in inspect.getsource(getattr(trl.DPOTrainer, "_compute_loss", FixedLogps)):
        pytest.skip(f"trl {trl.__version__} takes its log-probs elsewhere; this comparison is written for 1.16")
    (name, options), rng, smoothing = PAIRS[theirs], random.Random(3), 0.1 if theirs == "exo_pair" else 0.0
    if theirs == "exo_pair":
        options = options | {"alpha": 1 / math.log(0.9 / 0.1)}  # q = (1 − ε, ε) for rewards 1 and 0
    for _ in range(10):
        pair, refs = ([rng.gauss(-60, 8) for _ in range(2)] for _ in range(2))
        model, trainer = FixedLogps(torch.tensor(pair, dtype=torch.float64)), object.__new__(trl.DPOTrainer)
        same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        vars(trainer).update(
            model=model, beta=0.2, loss_types=[theirs], loss_weights=[1.0], label_smoothing=smoothing,
            use_weighting=False, ld_alpha=None,
            f_divergence_type="reverse_kl", precompute_ref_logps=True, aux_loss_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, accelerator=same)
        reference = torch.tensor(refs, dtype=torch.float64)
        inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long),
                  "attention_mask": torch.ones(2, 5, dtype=torch.long),
                  "completion_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2), "ref_chosen_logps": reference[:1],
                  "ref_rejected_logps": reference[1:]}
        loss = trainer.compute_loss(model, inputs)
        (grad,) = torch.autograd.grad(loss, model.logps)
        value, ours = call(name, model.logps[None], torch.tensor([[1.0, 0.0]]), reference[None], torch.tensor([[3, 3]]),
                           beta=0.2, **options)
        # TRL keeps ε of EXO in float32.
        close = {"rtol": 1e-6, "atol": 1e-8} if theirs == "exo_pair" else {"rtol": 1e-10, "atol": 1e-12}
        assert_close(value[0], loss.detach(), **close)
        assert_close(ours[0], grad, **close)


def test_simpo_is_TRLs_loss_on_the_same_log_probs():
    pytest.importorskip("trl", reason="trl is not installed; it is in the peers extra")
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this version of trl has no CPO trainer")
    trainer = object.__new__(cpo.CPOTrainer)
    vars(trainer).update(loss_type="simpo", simpo_gamma=0.8, beta=2.5, alpha=0.0, label_smoothing=0.0,
                         accelerator=SimpleNamespace(device="cpu"))
    logps = torch.tensor([[-30.0, -44.0], [-20.0, -9.0]], dtype=torch.float64)
    lengths = torch.tensor([[20, 31], [9, 8]])
    theirs = trainer.cpo_loss(*(logps / lengths).T)[0]
    assert_close(LOSSES["simpo"].fn(logps, torch.tensor([[1.0, 0.0]] * 2), lengths=lengths, beta=2.5, gamma=0.8),
                 theirs)


def test_kto_is_TRLs_loss_on_the_same_log_probs():
    trl = pytest.importorskip("trl", reason="trl is not installed; it is in the peers extra")
    if "fused_lm_head" not in inspect.getsource(getattr(trl.KTOTrainer, "_compute_loss", FixedLogps)):
        pytest.skip(f"trl {trl.__version__} takes its log-probs elsewhere; this comparison is written for 1.16")
    rng, zs = random.Random(5), []
    for _ in range(10):
        own, refs, other = (torch.tensor([rng.gauss(-60, 8) for _ in range(4)], dtype=torch.float64) for _ in range(3))
        model, trainer = FixedLogps(own), object.__new__(trl.KTOTrainer)
        vars(trainer).update(
            model=model, beta=0.2, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.3,
            precompute_ref_logps=True,
            calculate_KL=True, aux_loss_enabled=False, _compute_kl_logps=lambda model, batch: other,
            _total_train_tokens=0, _tp_size=1,
            _metrics=defaultdict(lambda: defaultdict(list)),
            accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x))
        inputs = {"input_ids": torch.zeros(4, 5, dtype=torch.long),
                  "attention_mask": torch.ones(4, 5, dtype=torch.long),
                  "completion_mask": torch.tensor([[0, 0, 1, 1, 1]] * 4),
                  "label": torch.tensor([True, False, True, False]),
                  "ref_logps": refs, "ref_KL_logps": refs}
        loss = trainer._compute_loss(model, inputs, return_outputs=False)
        (grad,) = torch.autograd.grad(loss, model.logps)
        zs.append(max(0.0, (other - refs).mean().item()))
        value, ours = call("kto", model.logps[None], torch.tensor([[1.0, -1.0, 2.0, -0.5]]), refs[None], None, beta=0.2,
                           threshold=0.0, undesirable_weight=1.3, z=zs[-1])
        assert_close(value[0], loss.detach(), rtol=1e-10, atol=1e-12)
        assert_close(ours[0], grad, rtol=1e-10, atol=1e-12)
    assert min(zs) == 0 < max(zs)


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_of_equal_rewards_teaches_where_the_card_says_so(name):
    """By the gradient at scores that differ from the reference's, beside that of a list with different rewards."""
    spec, draw = LOSSES[name], torch.Generator().manual_seed(0)
    logps = (-20 - 5 * torch.rand(1, 4, generator=draw, dtype=torch.float64)).requires_grad_()
    ref = -20 - 5 * torch.rand(1, 4, generator=draw, dtype=torch.float64)
    given = {"ref_logps": ref} if spec.needs_ref else {}
    given |= {"lengths": torch.tensor([[7, 9, 11, 5]])} if spec.needs_lengths else {}
    given |= {"beta": 0.0} if name == "offline_pg" else {}  # whose β is the weight of a distance

    def slope(*rewards: float) -> float:
        loss = spec.fn(logps, torch.tensor([rewards], dtype=torch.float64), **given).sum()
        return torch.autograd.grad(loss, logps)[0].abs().max().item() if loss.requires_grad else 0.0

    teaches = slope(0.5, 0.5, 0.5, 0.5) > 0.02 * slope(1.0, 0.6, 0.3, 0.0)
    assert teaches == (spec.ties or spec.uses == "best")

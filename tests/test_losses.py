"""lire_nb.losses against a second implementation, against identities, and against TRL."""
import ast
import inspect
import math
import random
import subprocess
import sys
from collections import defaultdict
from decimal import Decimal, getcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_oracle import ORACLES, candidates, probs
from torch.testing import assert_close

import lire_nb.losses
from lire_nb import rivals as losses
from lire_nb.losses import lire_loss, list_metrics, list_probs, scored_mask, transform_rewards
from lire_nb.rivals import LOSSES as EVERY
from lire_nb.rivals import LossSpec, get_loss

NAN, INF = float("nan"), float("inf")
LOSSES = {name: EVERY[name] for name in ORACLES}  # those of 10_losses; test_rivals has the others
TRANSFORMS = ("softmax", "none", "zscore", "rank")
# Every loss with its defaults, and every option at least once away from them.
CONFIGS = [
    *(("lire", {"temperature": 2.0, "reward_transform": how}) for how in TRANSFORMS),
    ("lire", {"temperature": 0.7, "reward_transform": "none", "sft_weight": 0.3}),
    ("lire", {"temperature": 5.0, "reward_transform": "softmax", "sft_weight": 0.01, "sft_normalize": "sum"}),
    ("lire", {"temperature": 0.25, "reward_transform": "zscore", "length_normalize": True}),
    ("sft", {}),
    ("sft", {"sft_normalize": "sum"}),
    *(("dpo", {"pairs": pairs, "variant": variant}) for pairs in ("best_worst", "all")
      for variant in ("sigmoid", "ipo", "hinge")),
    ("dpo", {"beta": 0.5}),
    ("plackett_luce_dpo", {}),
    ("plackett_luce_dpo", {"beta": 0.5}),
    ("slic", {}),
    ("slic", {"pairs": "all", "margin": 4.0}),
    ("slic", {"sft_weight": 0.2}),
    ("rrhf", {}),
    ("rrhf", {"sft_weight": 0.01, "sft_normalize": "sum"}),
    ("pro", {}),
    ("pro", {"reward_gaps": False, "sft_weight": 0.5, "sft_normalize": "token"}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}" for name, options in CONFIGS]


def random_list(rng: random.Random):
    """One list as plain Python: log-probs, rewards, reference log-probs, lengths. Every third has ties, every fifth may
    have unscored candidates, never all."""
    m = rng.randint(1, 8)
    centre = rng.uniform(-80, -10)
    logps = [rng.gauss(centre, 3) for _ in range(m)]
    rewards = [rng.choice((-1.0, 0.0, 0.5, 2.0))
               for _ in range(m)] if rng.random() < 1 / 3 else [rng.gauss(0, 1.5) for _ in range(m)]
    if rng.random() < 1 / 5:
        scored = rng.randrange(m)
        rewards = [NAN if k != scored and rng.random() < 0.4 else r for k, r in enumerate(rewards)]
    refs = [s + rng.gauss(0, 4) for s in logps]
    return logps, rewards, refs, [max(1, round(-s / rng.uniform(0.8, 3))) for s in logps]


def pack(lists, rng: random.Random):
    "Tensors of a ragged batch: every list spread over random places of a wider row, garbage in the rest."
    width = max(len(logps) for logps, *_ in lists) + rng.randint(0, 3)
    places = [sorted(rng.sample(range(width), len(logps))) for logps, *_ in lists]

    def tensor(k):
        rows = [[rng.choice((NAN, INF, -INF, 1e300, 0.0)) for _ in range(width)] for _ in lists]
        for row, where, one in zip(rows, places, lists):
            for place, value in zip(where, one[k]):
                row[place] = float(value)
        return torch.tensor(rows, dtype=torch.float64)

    mask = torch.zeros(len(lists), width, dtype=torch.bool)
    for b, where in enumerate(places):
        mask[b, where] = True
    return [tensor(k) for k in range(4)], mask, places


def value_and_grad(fn, logps, *args, **kwargs):
    leaf = logps.detach().clone().requires_grad_()
    value = fn(leaf, *args, **kwargs)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


def call(name, logps, rewards, refs, lengths, mask=None, **options):
    return value_and_grad(EVERY[name].fn, logps, rewards, mask, ref_logps=refs, lengths=lengths, **options)


# ---------------------------------------------------------------- a second implementation
@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
def test_agrees_with_plain_python_on_240_random_ragged_lists(name, options):
    "A missing reward, left out with scored_mask, is a candidate that the plain lists do not have."
    rng = random.Random(f"{name} {sorted(options.items())}")
    compared = missing = 0
    for _ in range(30):
        lists = [random_list(rng) for _ in range(8)]
        (logps, rewards, refs, lengths), mask, places = pack(lists, rng)
        value, grad = call(name, logps, rewards, refs, lengths, scored_mask(rewards, mask), **options)
        for b, one in enumerate(lists):
            scored = [k for k in range(len(one[0])) if not math.isnan(one[1][k])]
            dual = ORACLES[name](candidates(*[[column[k] for k in scored] for column in one]), **options)
            assert abs(value[b].item() - dual.value) <= 1e-9 * abs(dual.value) + 1e-300
            wanted = [0.0] * logps.shape[1]
            for k, partial_ in zip(scored, dual.partials):
                wanted[places[b][k]] = partial_
            size = max(map(abs, wanted))
            worst = max(abs(got - want) for got, want in zip(grad[b].tolist(), wanted))
            # On an all-tied list the plain sums leave a rounding error, where the module is exactly zero.
            assert worst <= 1e-9 * size or (size < 1e-15 and not grad[b].any())
            compared += 1
            missing += len(scored) < len(one[0])
    assert compared >= 200 and missing >= 10


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_metrics_agree_with_plain_python_and_scipy(seed):
    from scipy.stats import kendalltau

    rng = random.Random(seed)
    lists = [random_list(rng) for _ in range(3)]
    (logps, rewards, *_), mask, _ = pack(lists, rng)
    seen = list_metrics(logps, rewards, scored_mask(rewards, mask), temperature=1.5)
    for b, one in enumerate(lists):
        scored = [k for k in range(len(one[0])) if not math.isnan(one[1][k])]
        s, r, f, n = [[column[k] for k in scored] for column in one]
        p = [d.value for d in probs(candidates(s, r, f, n), 1.5)]
        assert math.isclose(seen["expected_reward"][b], sum(a * c for a, c in zip(p, r)), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(seen["entropy"][b], -sum(a * math.log(a) for a in p if a), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(seen["best_weight"][b], sum(a for a, c in zip(p, r) if c == max(r)), rel_tol=1e-9)
        assert seen["no_signal"][b] == float(len(set(r)) < 2)
        tau = kendalltau(s, r).statistic if len(set(r)) > 1 else NAN
        assert math.isclose(seen["kendall"][b], tau, rel_tol=1e-9,
                            abs_tol=1e-12) or (math.isnan(tau) and math.isnan(seen["kendall"][b]))


def test_gradient_keeps_its_digits_where_P_has_settled():
    "One answer holds all but e^-25 of the belief; 60-digit arithmetic says what the gradient is."
    getcontext().prec = 60
    s, r, T = (-10.0, -60.0, -64.0), (0.3, 1.1, -0.7), 2
    weights = [((Decimal(v) - Decimal(s[0])) / T).exp() for v in s]
    p = [w / sum(weights) for w in weights]
    exact = [-pj * sum(pk * (Decimal(rj) - Decimal(rk)) for pk, rk in zip(p, r)) / T for pj, rj in zip(p, r)]
    logps, rewards = torch.tensor([s, r], dtype=torch.float64).split(1)
    _, grad = value_and_grad(lire_loss, logps, rewards, temperature=2.0, reward_transform="none")
    for got, want in zip(grad[0].tolist(), exact):
        assert abs(Decimal(got) / want - 1) < Decimal("1e-13")


def test_plackett_luce_keeps_its_digits_where_a_stage_is_nearly_certain():
    "The first of three leads by 60 and 80 nats of implicit reward; the other two are tied."
    logps = torch.tensor([[-10.0, -610.0, -810.0]], dtype=torch.float64)
    rewards, refs = torch.tensor([[2.0, 1.0, 1.0]]), torch.zeros(1, 3)
    value, grad = call("plackett_luce_dpo", logps, rewards, refs, None)
    odds = math.exp(-60) + math.exp(-80)
    assert_close(value.item(), odds, rtol=1e-12, atol=0)
    expected = torch.tensor([[-odds, math.exp(-60), math.exp(-80)]], dtype=torch.float64) * 0.1
    assert_close(grad, expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- properties, from B = 1, M = 1 up
@st.composite
def batches(draw, min_m=1, max_m=6, scored=False):
    """float64 tensors (logps, rewards, refs, lengths) and a mask; no garbage, nan for a missing reward, at least one
    scored in a list."""
    b, m = draw(st.integers(1, 4)), draw(st.integers(min_m, max_m))
    rng = random.Random(draw(st.integers(0, 2**32)))

    def grid(make):
        return torch.tensor([[make() for _ in range(m)] for _ in range(b)], dtype=torch.float64)

    logps = grid(lambda: rng.gauss(-30, 5))
    levels = draw(st.sampled_from((1, 2, 4, 1000)))  # few levels: many ties
    missing = 0.0 if scored else draw(st.sampled_from((0.0, 0.3)))
    rewards = grid(lambda: rng.randrange(levels) / 10 - 0.4)
    mask = torch.tensor([[rng.random() < 0.7 for _ in range(m)] for _ in range(b)])
    gone = torch.tensor([[rng.random() < missing for _ in range(m)] for _ in range(b)])
    there = rng.randrange(m)
    mask[:, there], gone[:, there] = True, False
    rewards[gone] = NAN
    return logps, rewards, grid(lambda: rng.gauss(-30, 5)), grid(lambda: rng.randint(1, 40)), mask


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
@given(batch=batches(), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_order_padding_and_missing_rewards(name, options, batch, seed):
    *tensors, mask = batch
    kept = scored_mask(tensors[1], mask)
    value, grad = call(name, *tensors, kept, **options)
    assert value.shape == mask.shape[:1] and grad.shape == mask.shape
    assert value.isfinite().all() and grad.isfinite().all()
    assert not grad[~kept].any()  # nothing for padding and unscored candidates

    order = torch.tensor(random.Random(seed).sample(range(mask.shape[1]), mask.shape[1]))
    moved_value, moved_grad = call(name, *[t[:, order] for t in tensors], kept[:, order], **options)
    assert_close(moved_value, value, rtol=1e-11, atol=1e-12)
    assert_close(moved_grad, grad[:, order], rtol=1e-11, atol=1e-12)

    garbage = [torch.where(mask, t, bad) for t, bad in zip(tensors, (NAN, INF, -INF, NAN))]
    padded = [torch.cat([t, t.new_full((len(t), 2), bad)], 1) for t, bad in zip(garbage, (-INF, NAN, INF, 0.0))]
    wide = scored_mask(padded[1], torch.cat([mask, mask.new_zeros(len(mask), 2)], 1))
    pad_value, pad_grad = call(name, *padded, wide, **options)
    assert_close(pad_value, value, rtol=1e-12, atol=1e-13)
    assert_close(pad_grad[:, : mask.shape[1]], grad, rtol=1e-12, atol=1e-13)
    assert not pad_grad[:, mask.shape[1] :].any()

    # Neither padding nor missing rewards: the same lists, cut down to what they have, one at a time and without a mask.
    for b, row in enumerate(kept):
        short_value, short_grad = call(name, *[t[b : b + 1, row] for t in tensors], **options)
        assert_close(short_value, value[b : b + 1], rtol=1e-12, atol=1e-13)
        assert_close(short_grad[0], grad[b, row], rtol=1e-12, atol=1e-13)


@given(batch=batches(scored=True), shift=st.floats(-100, 100), scale=st.floats(0.01, 100), T=st.floats(0.1, 50))
@settings(max_examples=100, deadline=None)
def test_lire_identities(batch, shift, scale, T):
    logps, rewards, _, _, mask = batch
    value, grad = value_and_grad(lire_loss, logps, rewards, mask, temperature=T, reward_transform="none")
    # the derived gradient
    p = list_probs(logps, mask, temperature=T)
    expected = (p * rewards).sum(-1, keepdim=True)
    assert_close(grad, -p * (rewards - expected) / T, rtol=1e-9, atol=1e-12)
    # shift and scale of the rewards
    shifted, shifted_grad = value_and_grad(lire_loss, logps, rewards + shift, mask, temperature=T,
                                           reward_transform="none")
    assert_close(shifted, value - shift, rtol=1e-10, atol=1e-10)
    assert_close(shifted_grad, grad, rtol=1e-9, atol=1e-11 / T)
    scaled, scaled_grad = value_and_grad(lire_loss, logps, rewards * scale, mask, temperature=T,
                                         reward_transform="none")
    assert_close(scaled, value * scale, rtol=1e-9, atol=1e-11)
    assert_close(scaled_grad, grad * scale, rtol=1e-9, atol=1e-11)
    # the log-probs count only relative to each other
    assert_close(lire_loss(logps + shift, rewards, mask, temperature=T, reward_transform="none"), value, rtol=1e-9,
                 atol=1e-10 / T)
    # limits of T
    mean = (rewards * mask).sum(-1) / mask.sum(-1)
    assert_close(lire_loss(logps, rewards, mask, temperature=1e12, reward_transform="none"), -mean, rtol=1e-9,
                 atol=1e-9)
    top = logps.masked_fill(~mask, -INF).argmax(-1, keepdim=True)
    assert_close(lire_loss(logps, rewards, mask, temperature=1e-9, reward_transform="none"),
                 -rewards.gather(-1, top).squeeze(-1))
    assert_close(list_probs(logps, mask, temperature=1e12), mask.double() / mask.sum(-1, keepdim=True), rtol=1e-9,
                 atol=0)


@pytest.mark.parametrize("how", TRANSFORMS)
@given(batch=batches(), level=st.floats(-1e3, 1e3))
@settings(max_examples=40, deadline=None)
def test_tied_lists_and_single_candidates_give_an_exactly_zero_gradient(how, batch, level):
    logps, rewards, refs, lengths, mask = batch
    mask, tied = scored_mask(rewards, mask), torch.where(rewards.isnan(), NAN, level)
    assert not value_and_grad(lire_loss, logps, tied, mask, reward_transform=how)[1].any()
    assert not value_and_grad(lire_loss, logps[:, :1], refs[:, :1], reward_transform=how)[1].any()
    for name in ("dpo", "plackett_luce_dpo", "slic"):
        value, grad = call(name, logps, tied, refs, lengths, mask)
        assert not value.any() and not grad.any()
    for name in ("rrhf", "pro"):
        value, grad = call(name, logps, tied, refs, lengths, mask, sft_weight=0.0)
        assert not value.any() and not grad.any()


@given(batch=batches(min_m=2, max_m=2, scored=True), T=st.floats(0.1, 50))
@settings(max_examples=60, deadline=None)
def test_pairwise_forms(batch, T):
    logps, rewards, refs, lengths, _ = batch
    loss = lire_loss(logps, rewards, temperature=T, reward_transform="none")
    gap = rewards[:, 0] - rewards[:, 1]
    assert_close(loss, -gap * torch.sigmoid((logps[:, 0] - logps[:, 1]) / T) - rewards[:, 1], rtol=1e-11, atol=1e-12)
    dpo, _ = call("dpo", logps, rewards, refs, lengths)
    assert_close(call("dpo", logps, rewards, refs, lengths, pairs="all")[0], dpo, rtol=1e-12, atol=0)
    assert_close(call("plackett_luce_dpo", logps, rewards, refs, lengths)[0], dpo, rtol=1e-12, atol=1e-14)


def test_losses_match_the_values_worked_by_hand():
    logps = torch.tensor([[-4.0, -2.0]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    sigmoid = 1 / (1 + math.e)  # σ(−1): a margin of −2 at T = 2
    assert_close(lire_loss(logps, rewards, temperature=2.0, reward_transform="none").item(), -sigmoid)
    softmax = [math.e / (1 + math.e), 1 / (1 + math.e)]
    assert_close(lire_loss(logps, rewards, temperature=2.0, reward_transform="softmax").item(),
                 -(sigmoid * softmax[0] + (1 - sigmoid) * softmax[1]))
    assert call("slic", logps, rewards, None, None)[0].item() == 3.0
    assert_close(call("dpo", logps, rewards, 0 * logps, None)[0].item(), math.log(1 + math.exp(0.2)))


@pytest.mark.parametrize("how", ("zscore", "rank"))
@given(batch=batches(), scale=st.sampled_from((1e-3, 0.5, 64.0, 1e4)), shift=st.sampled_from((-2.0, 0.0, 8.0)))
@settings(max_examples=40, deadline=None)
def test_zscore_and_rank_do_not_see_units(how, batch, scale, shift):
    _, rewards, _, _, mask = batch
    rewards = (rewards * 10).round()  # ties stay ties under the change of units
    transform = partial(transform_rewards, mask=scored_mask(rewards, mask), reward_transform=how)
    assert_close(transform(rewards * scale + shift), transform(rewards), rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- numbers of every size and kind
@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
def test_gradcheck(name, options):
    rng = random.Random(5)
    (logps, rewards, refs, lengths), mask, _ = pack([random_list(rng) for _ in range(6)], rng)
    logps = torch.where(mask, logps, 0.0).requires_grad_()
    loss = partial(LOSSES[name].fn, rewards=rewards, mask=scored_mask(rewards, mask), ref_logps=refs, lengths=lengths,
                   **options)
    assert torch.autograd.gradcheck(loss, (logps,), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_is_computed_in_float32(name, options, dtype):
    rng = random.Random(6)
    (logps, rewards, refs, lengths), mask, _ = pack([random_list(rng) for _ in range(6)], rng)
    low, mask = torch.where(mask, logps, 0.0).to(dtype), scored_mask(rewards, mask)
    value, grad = call(name, low, rewards.float(), refs.float(), lengths.float(), mask, **options)
    wide, wide_grad = call(name, low.float(), rewards.float(), refs.float(), lengths.float(), mask, **options)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_close(value, wide, rtol=0, atol=0)
    assert_close(grad, wide_grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_nothing_overflows(name, options, dtype):
    logps = torch.tensor([[-1e4, -1.0, -9e3, -1e4], [-1e4, -1e4, -1e4, -1e4]], dtype=dtype)
    lengths = torch.tensor([[1, 1, 4000, 2], [3, 4, 5, 6]])
    for rewards in ([1.0, 0.0, NAN, -1.0], [0.0, 1.0, 2.0, 1.0], [300.0, -300.0, 0.0, 0.0]):
        both = torch.tensor([rewards] * 2)
        value, grad = call(name, logps, both, -logps.flip(-1), lengths, scored_mask(both), **options)
        assert value.isfinite().all() and grad.isfinite().all()


def test_very_small_temperatures_and_huge_rewards():
    logps = torch.tensor([[-1e4, -3.0, -5.0]])
    assert list_probs(logps, temperature=1e-30).tolist() == [[0, 1, 0]]
    # the quotients alone would overflow
    assert list_probs(torch.tensor([[-1e4, -9999.0]]), temperature=1e-36).tolist() == [[0, 1]]
    for how in TRANSFORMS:
        value, grad = value_and_grad(lire_loss, logps, torch.tensor([[1e30, -1e30, 0.0]]), reward_transform=how)
        assert value.isfinite().all() and grad.isfinite().all()
    assert_close(transform_rewards(torch.tensor([[1e30, -1e30]]), reward_transform="zscore"),
                 torch.tensor([[1.0, -1.0]]))


def test_a_nan_log_prob_of_a_real_candidate_is_not_hidden():
    logps = torch.tensor([[NAN, -1.0], [-2.0, -1.0]])
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for name in LOSSES:
        value, _ = call(name, logps, rewards, torch.zeros(2, 2), torch.ones(2, 2))
        assert value[0].isnan() and value[1].isfinite(), name


def test_rewards_and_reference_are_data_without_gradient():
    logps, rewards, refs = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    for name in LOSSES:
        loss = LOSSES[name].fn(logps, rewards, ref_logps=refs, lengths=torch.ones(2, 3))
        assert torch.autograd.grad(loss.sum(), (rewards, refs), allow_unused=True) == (None, None)


# ---------------------------------------------------------------- the registry
def test_all_losses_share_one_signature():
    for name, spec in LOSSES.items():
        parameters = inspect.signature(spec.fn).parameters
        assert list(parameters)[:3] == ["logps", "rewards", "mask"] and spec.name == name
        assert {"ref_logps", "lengths"} <= set(parameters)
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
        with pytest.raises(TypeError, match="nonsense"):
            spec.fn(torch.zeros(1, 2), torch.zeros(1, 2), nonsense=1)
        assert spec.formula and spec.source and spec.uses in ("values", "order", "best")


@pytest.mark.parametrize("name", LOSSES)
def test_flags_say_what_is_needed(name):
    spec, logps = LOSSES[name], torch.tensor([[-3.0, -1.0, -2.0]])
    rewards = torch.tensor([[0.0, 2.0, 1.0]])
    needed = {"ref_logps": spec.needs_ref, "lengths": spec.needs_lengths}
    extra = {"ref_logps": torch.full((1, 3), -2.0), "lengths": torch.tensor([[3, 4, 5]])}
    spec.fn(logps, rewards, **{k: extra[k] for k, flag in needed.items() if flag})
    for argument, flag in needed.items():
        given_ = {k: v for k, v in extra.items() if k != argument}
        if flag:
            with pytest.raises(ValueError, match=argument):
                spec.fn(logps, rewards, **given_)
        else:
            assert_close(spec.fn(logps, rewards, **given_), spec.fn(logps, rewards, **extra), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=IDS)
def test_uses_says_what_is_read_of_the_rewards(name, options):
    logps = torch.tensor([[-9.2, -8.1, -10.4, -7.7, -9.9]], dtype=torch.float64)
    refs, lengths = logps.flip(-1), torch.tensor([[3, 1, 4, 2, 5]])
    rewards = torch.tensor([[0.1, 0.9, -0.3, 0.4, 0.2]], dtype=torch.float64)
    same_order = torch.tensor([[0.0, 5.0, -7.0, 3.0, 1.0]], dtype=torch.float64)
    same_best = torch.tensor([[-3.0, 5.0, 1.0, 3.0, 0.0]], dtype=torch.float64)
    base = call(name, logps, rewards, refs, lengths, **options)[0]
    ordered, best = (call(name, logps, other, refs, lengths, **options)[0] for other in (same_order, same_best))
    uses = LOSSES[name].uses
    if options.get("reward_transform") == "rank" or options.get("reward_gaps") is False:
        uses = "order"
    assert torch.equal(base, ordered) is (uses != "values")
    if uses != "order":  # a pair loss may happen not to change
        assert torch.equal(base, best) is (uses == "best")


def test_get_loss():
    assert get_loss("dpo") is LOSSES["dpo"] and get_loss(LOSSES["pro"]) is LOSSES["pro"]

    def mine(logps, rewards, mask=None, *, ref_logps=None):
        return -logps.sum(-1)

    assert get_loss(mine) == LossSpec("mine", mine)
    mine.needs_ref = True
    assert get_loss(mine).needs_ref and not get_loss(mine).needs_lengths
    assert get_loss(partial(lire_loss, temperature=1.0)).name == "partial"
    for wrong in ("LIRE", "ppo", 3, None):
        with pytest.raises(ValueError, match="'plackett_luce_dpo'.*callable"):
            get_loss(wrong)


# ---------------------------------------------------------------- bad input
X, R, L = torch.tensor([[-3.0, -1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[4, 5]])


@pytest.mark.parametrize(
    ("call_it", "words"),
    [
        (lambda: lire_loss(X, R[:, :1]), ["rewards", "(1, 1)", "(1, 2)"]),
        (lambda: lire_loss(X[0], R[0]), ["logps", "(2,)", "(B, M)"]),
        (lambda: lire_loss(X[:0], R[:0]), ["logps", "(0, 2)", "B ≥ 1"]),
        (lambda: lire_loss(X.long(), R), ["logps", "int64", "float"]),
        (lambda: lire_loss(X, [[1.0, 0.0]]), ["rewards", "list", "torch.Tensor"]),
        (lambda: lire_loss(X, R, torch.tensor([True, True])), ["mask", "(2,)", "(1, 2)"]),
        (lambda: lire_loss(X, R, torch.ones(1, 2)), ["mask", "float32", "torch.bool"]),
        (lambda: lire_loss(X, R, lengths=L[0]), ["lengths", "(2,)", "(1, 2)"]),
        (lambda: lire_loss(X, R, ref_logps=X[:, :1]), ["ref_logps", "(1, 1)", "(1, 2)"]),
        (lambda: lire_loss(X.T, R.T, torch.tensor([[True], [False]])), ["mask[1]", "all False", "at least one"]),
        (lambda: list_probs(X, torch.zeros(1, 2, dtype=torch.bool)), ["mask[0]", "all False"]),
        (lambda: lire_loss(X, torch.tensor([[1.0, INF]]), scored_mask(torch.tensor([[1.0, INF]]))),
         ["rewards[0, 1]", "inf", "finite"]),
        (lambda: lire_loss(X.T, R.T * NAN, scored_mask(R.T * NAN)),
         ["mask[0]", "all False", "at least one", "leave out"]),
        (lambda: scored_mask([[1.0, NAN]]), ["rewards", "list", "torch.Tensor"]),
        (lambda: scored_mask(R[0]), ["rewards.shape", "(2,)", "(B, M)"]),
        (lambda: scored_mask(R, torch.tensor([True, True])), ["mask.shape", "(2,)", "(1, 2)", "like rewards"]),
        (lambda: scored_mask(R, torch.ones(1, 2)), ["mask.dtype", "float32", "torch.bool"]),
        (lambda: scored_mask(R, torch.zeros(1, 2, dtype=torch.bool)), ["mask[0]", "all False"]),
        (lambda: transform_rewards(R[0]), ["rewards.shape", "(2,)", "(B, M)"]),
        (lambda: lire_loss(X, torch.tensor([[1e39, 0.0]], dtype=torch.float64)), ["rewards[0, 0]", "inf", "finite"]),
        *((lambda T=T: lire_loss(X, R, temperature=T), ["temperature", repr(T), "> 0"])
          for T in (0, -1.0, NAN, INF, "2", True)),
        (lambda: list_probs(X, temperature=0.0), ["temperature", "0.0", "> 0"]),
        (lambda: list_metrics(X, R, temperature=-1), ["temperature", "-1", "> 0"]),
        (lambda: lire_loss(X, R, reward_transform="log"),
         ["reward_transform", "'log'", "'softmax', 'none', 'zscore', 'rank'"]),
        (lambda: lire_loss(X, R, reward_transform=None), ["reward_transform", "None", "'softmax'"]),
        (lambda: transform_rewards(R, reward_transform="log"), ["reward_transform", "'log'", "'zscore'"]),
        (lambda: lire_loss(X, R, sft_weight=-0.1), ["sft_weight", "-0.1", "≥ 0"]),
        (lambda: lire_loss(X, R, sft_weight=1.0), ["lengths", "None", "token"]),
        (lambda: lire_loss(X, R, sft_normalize="mean"), ["sft_normalize", "'mean'", "'token', 'sum'"]),
        (lambda: lire_loss(X, R, length_normalize=True), ["lengths", "None"]),
        (lambda: lire_loss(X, R, length_normalize=True, lengths=torch.tensor([[3, 0]])),
         ["lengths[0, 1]", "0", "at least 1"]),
        (lambda: losses.sft_loss(X, R, sft_normalize="words", lengths=L), ["sft_normalize", "'words'", "'token'"]),
        (lambda: losses.dpo_loss(X, R), ["ref_logps", "None", "dpo_loss"]),
        (lambda: losses.dpo_loss(X, R, ref_logps=X, beta=0), ["beta", "0", "> 0"]),
        (lambda: losses.dpo_loss(X, R, ref_logps=X, pairs="some"), ["pairs", "'some'", "'best_worst', 'all'"]),
        (lambda: losses.dpo_loss(X, R, ref_logps=X, variant="kto"), ["variant", "'kto'", "'sigmoid', 'ipo', 'hinge'"]),
        (lambda: losses.plackett_luce_dpo_loss(X, R), ["ref_logps", "None", "plackett_luce_dpo_loss"]),
        (lambda: losses.slic_loss(X, R, margin=-1), ["margin", "-1", "≥ 0"]),
        (lambda: losses.rrhf_loss(X, R), ["lengths", "None", "rrhf_loss"]),
        (lambda: losses.pro_loss(X, R), ["lengths", "None", "pro_loss"]),
    ],
)
def test_bad_input_names_argument_value_and_what_is_allowed(call_it, words):
    with pytest.raises(ValueError) as caught:
        call_it()
    for word in words:
        assert word in str(caught.value)


REWARD_READERS = {
    **{id_: partial(call, name, **options) for id_, (name, options) in zip(IDS, CONFIGS)},
    **{f"transform-{how}": lambda logps, rewards, refs, lengths, mask=None,
       how=how: transform_rewards(rewards, mask, reward_transform=how) for how in TRANSFORMS},
    "metrics": lambda logps, rewards, refs, lengths, mask=None: list_metrics(logps, rewards, mask),
}


@pytest.mark.parametrize("reader", REWARD_READERS.values(), ids=REWARD_READERS)
@pytest.mark.parametrize("bad", (NAN, INF, -INF))
def test_a_reward_that_is_not_masked_must_be_finite(reader, bad):
    logps, lengths = torch.tensor([[-3.0, -1.0, -2.0]] * 2), torch.tensor([[4, 5, 6]] * 2)
    rewards = torch.tensor([[1.0, 0.0, bad], [0.5, bad, 2.0]])
    behind_one = torch.tensor([[True, True, False], [True, True, True]])
    for mask, place in ((None, "[0, 2]"), (behind_one, "[1, 1]")):
        with pytest.raises(ValueError) as caught:
            reader(logps, rewards, logps, lengths, mask)
        assert f"rewards{place} is {bad}: it must be a finite number" in str(caught.value)
        assert "mask = scored_mask(rewards, mask)" in str(caught.value)
    reader(logps, rewards, logps, lengths, behind_one & rewards.isfinite())


def test_scored_mask():
    rewards = torch.tensor([[1.0, NAN, INF, NAN], [NAN, NAN, -INF, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, True, False]])
    assert scored_mask(rewards).tolist() == [[True, False, True, False], [False, False, True, True]]
    assert scored_mask(rewards, mask).tolist() == [[True, False, True, False], [False, False, True, False]]
    # nothing scored: the loss will name the row
    assert scored_mask(rewards[:, :2]).tolist() == [[True, False], [False, False]]
    assert scored_mask(torch.tensor([[1, 2]])).all()  # integers are never missing


def test_both_modules_need_only_torch_and_the_standard_library():
    for module in (lire_nb.losses, losses):
        found = [node for node in ast.walk(ast.parse(inspect.getsource(module)))
                 if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {"." * getattr(node, "level", 0) + (getattr(node, "module", None) or node.names[0].name)
                 for node in found}
        inside = {name for name in names if name.startswith((".", "lire_nb"))}
        assert inside <= {".base.errors", "lire_nb.losses"}
        assert {name.split(".")[0] for name in names - inside} - set(sys.stdlib_module_names) == {"torch"}
    code = "from lire_nb.losses import *; lire_loss; import sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- TRL
@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is not installed; it is in the peers extra")


class FixedLogps(torch.nn.Module):
    """Stands where TRL expects a model with its fused head, and answers with given log-probs, spread over three
    completion tokens."""

    def __init__(self, logps):
        super().__init__()
        self.logps = torch.nn.Parameter(logps)

    def forward(self, input_ids, **kwargs):
        share = self.logps.new_tensor([0.0, 0.5, 0.25, 0.25])  # the first predicted token still belongs to the prompt
        zeros = torch.zeros_like(self.logps[:, None] * share)
        return SimpleNamespace(log_probs=self.logps[:, None] * share, entropy=zeros, mean_logits=zeros,
                               is_top1=zeros.bool(), aux_loss=None)


@pytest.mark.parametrize(("variant", "beta"), [("sigmoid", 0.1), ("sigmoid", 0.5), ("hinge", 0.1)])
def test_dpo_is_TRLs_loss_on_the_same_log_probs(trl, variant, beta):
    """Drives the loss code of TRL's DPOTrainer, without a model, in float64: one pair at a time, as TRL averages over a
    batch."""
    if "fused_lm_head" not in inspect.getsource(getattr(trl.DPOTrainer, "_compute_loss", FixedLogps)):
        pytest.skip(f"trl {trl.__version__} takes its log-probs elsewhere; this comparison is written for 1.16, the "
                    "next one for any")
    def same(x):
        return x

    rng = random.Random(8)
    for _ in range(20):
        pair, refs = ([rng.gauss(-60, 15) for _ in range(2)] for _ in range(2))
        model = FixedLogps(torch.tensor(pair, dtype=torch.float64))
        trainer = object.__new__(trl.DPOTrainer)
        vars(trainer).update(
            model=model, beta=beta, loss_types=[variant], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
            ld_alpha=None,
            f_divergence_type="reverse_kl", precompute_ref_logps=True, aux_loss_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0, _tp_size=1,
            accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        )
        reference = torch.tensor(refs, dtype=torch.float64)
        inputs = {
            "input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2), "ref_chosen_logps": reference[:1],
            "ref_rejected_logps": reference[1:],
        }
        theirs = trainer.compute_loss(model, inputs)
        (their_grad,) = torch.autograd.grad(theirs, model.logps)
        options = {"variant": variant, "beta": beta, "pairs": rng.choice(("best_worst", "all"))}
        ours, our_grad = call("dpo", model.logps[None], torch.tensor([[1.0, 0.0]]), reference[None], None, **options)
        assert_close(ours[0], theirs.detach(), rtol=1e-12, atol=1e-14)
        assert_close(our_grad[0], their_grad, rtol=1e-12, atol=1e-14)


def test_dpo_is_TRLs_loss_in_a_real_DPOTrainer(trl, tmp_path):
    """A small random Llama as policy, another as reference: TRL's log-probs and loss against ours, in value and every
    parameter's gradient."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["how", "do", "plants", "grow", "with", "water", "and", "light", "slowly", "in", "rich", "soil", "fast"]
    vocab = {word: k for k, word in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2,
                         pad_token_id=0, eos_token_id=2, bos_token_id=None, initializer_range=0.5)
    policy, reference = [(torch.manual_seed(seed), LlamaForCausalLM(config))[1] for seed in (1, 2)]
    data = Dataset.from_list([
        {"prompt": "how do plants grow", "chosen": " with water and light", "rejected": " fast"},
        {"prompt": "do plants grow fast", "chosen": " slowly", "rejected": " in rich soil and water and light"},
        {"prompt": "how", "chosen": " in soil with light", "rejected": " water water water"},
    ])
    args = trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, report_to=[], beta=0.3, use_cpu=True,
                         bf16=False)
    trainer = trl.DPOTrainer(model=policy, ref_model=reference, args=args, train_dataset=data,
                             processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    policy.eval()
    theirs = trainer.compute_loss(policy, inputs)
    their_grads = torch.autograd.grad(theirs, list(policy.parameters()), allow_unused=True)

    def sequence_logps(model):
        logits = LlamaForCausalLM.forward(model, input_ids=inputs["input_ids"],
                                          attention_mask=inputs["attention_mask"]).logits
        tokens = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
        return (tokens * inputs["completion_mask"][:, 1:]).sum(-1).reshape(2, 3).T  # TRL: all chosen, then all rejected

    rewards = torch.tensor([[1.0, 0.0]] * 3)
    ours = losses.dpo_loss(sequence_logps(policy), rewards, ref_logps=sequence_logps(reference), beta=0.3)
    assert (ours - math.log(2)).abs().min() > 0.01  # the two models do disagree
    assert_close(ours.mean(), theirs, rtol=1e-5, atol=1e-6)
    our_grads = torch.autograd.grad(ours.mean(), list(policy.parameters()), allow_unused=True)
    for mine, other in zip(our_grads, their_grads):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert_close(mine, other, rtol=1e-4, atol=1e-6)

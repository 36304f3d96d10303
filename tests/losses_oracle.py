"""Every loss a second time: float64, plain Python loops, no torch. Written from the formulas, to be slow and easy to
check.

A list is a Python list of candidates that are real and scored; there is no mask here. The gradient comes from dual
numbers: a value together with its partial derivatives by each candidate's log-prob.
"""
import math
from dataclasses import dataclass


class Dual:
    "A number and its partial derivatives."

    def __init__(self, value, partials):
        self.value, self.partials = value, partials

    def _chain(self, value, slope):
        return Dual(value, [slope * p for p in self.partials])

    def _lift(self, other):
        return other if isinstance(other, Dual) else Dual(float(other), [0.0] * len(self.partials))

    def __add__(self, other):
        other = self._lift(other)
        return Dual(self.value + other.value, [a + b for a, b in zip(self.partials, other.partials)])

    def __mul__(self, other):
        other = self._lift(other)
        return Dual(self.value * other.value,
                    [a * other.value + self.value * b for a, b in zip(self.partials, other.partials)])

    def __truediv__(self, other):
        other = self._lift(other)
        quotient = self.value / other.value
        return Dual(quotient, [(a - quotient * b) / other.value for a, b in zip(self.partials, other.partials)])

    def __neg__(self):
        return self._chain(-self.value, -1.0)

    def __sub__(self, other):
        return self + (-self._lift(other))

    def __rsub__(self, other):
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def exp(self):
        e = math.exp(self.value)
        return self._chain(e, e)

    def log1p(self):
        return self._chain(math.log1p(self.value), 1.0 / (1.0 + self.value))

    def positive_part(self):
        return self if self.value > 0 else self._chain(0.0, 0.0)


@dataclass
class Candidate:
    s: Dual  # log-prob
    reward: float
    ref: float
    length: int


def candidates(logps, rewards, refs, lengths):
    "Candidates with a unit partial derivative each."
    n = len(logps)
    duals = [Dual(s, [float(i == j) for j in range(n)]) for i, s in enumerate(logps)]
    return [Candidate(*fields) for fields in zip(duals, rewards, refs, lengths)]


def zero(cands):
    return Dual(0.0, [0.0] * len(cands))


def total(cands, terms):
    out = zero(cands)
    for term in terms:
        out = out + term
    return out


def transform(rewards, how):
    n = len(rewards)
    if how == "none":
        return list(rewards)
    if how == "softmax":
        e = [math.exp(r - max(rewards)) for r in rewards]
        return [v / math.fsum(e) for v in e]
    if how == "zscore":
        mean = math.fsum(rewards) / n
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / n)
        return [(r - mean) / std if len(set(rewards)) > 1 else 0.0 for r in rewards]
    if how == "rank":
        out = []
        for r in rewards:
            places = [k for k, other in enumerate(sorted(rewards)) if other == r]
            out.append(sum(places) / len(places) / (n - 1) if n > 1 else 0.0)
        return out
    raise KeyError(how)


def sft(cands, normalize="token"):
    top = max(c.reward for c in cands)
    best = [c for c in cands if c.reward == top]
    return total(cands, [-(c.s / (c.length if normalize == "token" else 1.0)) for c in best]) / len(best)


def probs(cands, temperature, length_normalize=False):
    scores = [c.s / (c.length if length_normalize else 1.0) / temperature for c in cands]
    top = max(v.value for v in scores)
    weights = [(v - top).exp() for v in scores]
    norm = total(cands, weights)
    return [w / norm for w in weights]


def lire(cands, temperature=2.0, reward_transform="softmax", sft_weight=0.0, sft_normalize="token",
         length_normalize=False):
    values = transform([c.reward for c in cands], reward_transform)
    loss = -total(cands, [p * v for p, v in zip(probs(cands, temperature, length_normalize), values)])
    return loss + sft_weight * sft(cands, sft_normalize)


def ordered_pairs(cands, pairs):
    top, bottom = max(c.reward for c in cands), min(c.reward for c in cands)
    for a in cands:
        for b in cands:
            if a.reward > b.reward and (pairs == "all" or (a.reward == top and b.reward == bottom)):
                yield a, b


def pair_mean(cands, pairs, penalty):
    terms = [penalty(a, b) for a, b in ordered_pairs(cands, pairs)]
    return total(cands, terms) / len(terms) if terms else zero(cands)


def dpo(cands, beta=0.1, pairs="best_worst", variant="sigmoid"):
    def penalty(a, b):
        m = (a.s - a.ref) - (b.s - b.ref)
        if variant == "sigmoid":
            return (-(beta * m)).exp().log1p()
        if variant == "ipo":
            return (m - 0.5 / beta) * (m - 0.5 / beta)
        return (1.0 - beta * m).positive_part()

    return pair_mean(cands, pairs, penalty)


def contrast(cands, mine, others):
    "−log( e^mine / (e^mine + Σ e^other) )"
    return total(cands, [(other - mine).exp() for other in others]).log1p()


def plackett_luce_dpo(cands, beta=0.1):
    terms = []
    for a in cands:
        worse = [c for c in cands if c.reward < a.reward]
        terms.append(contrast(cands, beta * (a.s - a.ref), [beta * (c.s - c.ref) for c in worse]))
    return total(cands, terms)


def slic(cands, margin=1.0, pairs="best_worst", sft_weight=0.0, sft_normalize="token"):
    loss = pair_mean(cands, pairs, lambda a, b: (margin - a.s + b.s).positive_part())
    return loss + sft_weight * sft(cands, sft_normalize)


def rrhf(cands, sft_weight=1.0, sft_normalize="token"):
    wrong = [(b.s / b.length - a.s / a.length).positive_part() for a, b in ordered_pairs(cands, "all")]
    return total(cands, wrong) + sft_weight * sft(cands, sft_normalize)


def pro(cands, reward_gaps=True, sft_weight=0.05, sft_normalize="sum"):
    terms = []
    for a in cands:
        worse = [c for c in cands if c.reward < a.reward]
        if worse:
            gaps = [a.reward - c.reward if reward_gaps else 1.0 for c in worse]
            terms.append(contrast(cands, a.s / a.length * max(gaps), [c.s / c.length * g for c, g in zip(worse, gaps)]))
    return total(cands, terms) + sft_weight * (len(cands) - 1) ** 2 * sft(cands, sft_normalize)


ORACLES = {"lire": lire, "sft": lambda cands, sft_normalize="token": sft(cands, sft_normalize), "dpo": dpo,
           "plackett_luce_dpo": plackett_luce_dpo, "slic": slic, "rrhf": rrhf, "pro": pro}

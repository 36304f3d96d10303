"""The losses of 11_rivals a second time: float64, plain Python loops over candidates, gradients by dual numbers."""
import math

from losses_oracle import contrast, pair_mean, total, transform, zero


def score(c, how):
    "s, s/n, s − r or (s − r)/n of one candidate."
    s = c.s - c.ref if how.endswith("ratio") else c.s
    return s / c.length if how.startswith("token") else s


def log_sigmoid(d):
    "−log(1 + e^−d), on whichever side is stable."
    return -((-d).exp().log1p()) if d.value > 0 else d - d.exp().log1p()


def sigmoid(d):
    return log_sigmoid(d).exp()


def us(cands, beta, how):
    return [beta * score(c, how) for c in cands]


def spread(values):
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def softmax(values, temperature=1.0):
    e = [math.exp((v - max(values)) / temperature) for v in values]
    return [v / math.fsum(e) for v in e]


def log_softmax(cands, values):
    top = max(v.value for v in values)
    norm = total(cands, [(v - top).exp() for v in values])
    return [v - top - (norm - 1.0).log1p() for v in values]


def lire(cands, temperature="auto", reward_transform="zscore", score_="sum"):
    values = [score(c, score_) for c in cands]
    own = [score(c, score_.replace("ratio", "").strip("_") or "sum").value for c in cands]
    if temperature == "auto":
        temperature = spread(own) if len(set(own)) > 1 else None
    if temperature is None:
        return zero(cands) - math.fsum(transform([c.reward for c in cands], reward_transform)) / len(cands)
    top = max(v.value for v in values)
    weights = [((v - top) / temperature).exp() for v in values]
    rewards = transform([c.reward for c in cands], reward_transform)
    return -total(cands, [w * r for w, r in zip(weights, rewards)]) / total(cands, weights)


def infonca(cands, beta=0.1, alpha=1.0, direction="forward", score="ratio"):
    q, m = softmax([c.reward for c in cands], alpha), log_softmax(cands, us(cands, beta, score))
    if direction == "forward":
        return -total(cands, [p * v for p, v in zip(q, m)])
    return total(cands, [v.exp() * (v - math.log(p)) for p, v in zip(q, m)])


def nca(cands, beta=0.1, alpha=1.0, score="ratio"):
    q, u = softmax([c.reward for c in cands], alpha), us(cands, beta, score)
    lifted = total(cands, [p * log_sigmoid(v) for p, v in zip(q, u)])
    return -lifted - total(cands, [log_sigmoid(-v) for v in u]) / len(cands)


def regression(cands, beta=0.1, reward_transform="none", huber=None, score="ratio"):
    rewards, u, n = transform([c.reward for c in cands], reward_transform), us(cands, beta, score), len(cands)
    if n == 1:
        return zero(cands)
    u_mean, r_mean, terms = total(cands, u) / n, math.fsum(rewards) / n, []
    for v, r in zip(u, rewards):
        e = v - u_mean - (r - r_mean)
        size = e if e.value >= 0 else -e
        terms.append(e * e * 0.5 if huber is None or size.value <= huber else huber * (size - huber / 2))
    return total(cands, terms) / (n - 1)


def lipo(cands, beta=0.05, reward_transform="rank", weights="lambda", score="ratio"):
    u = us(cands, beta, score)
    if weights == "equal":
        return pair_mean(cands, "all", lambda a, b: -log_sigmoid(u[cands.index(a)] - u[cands.index(b)]))
    raw = [c.reward for c in cands]
    if reward_transform == "rank":
        values = transform(raw, "rank")
    else:
        values = [(r - min(raw)) / (max(raw) - min(raw)) if max(raw) > min(raw) else 0.5 for r in raw]
    order = sorted(range(len(cands)), key=lambda k: (-u[k].value, raw[k]))
    terms = []
    for i, a in enumerate(cands):
        for j, b in enumerate(cands):
            if a.reward > b.reward:
                places = []
                for k in (i, j):
                    same = [p + 1 for p, o in enumerate(order) if (u[o].value, raw[o]) == (u[k].value, raw[k])]
                    places.append(sum(same) / len(same))
                cost = abs(2 ** values[i] - 2 ** values[j]) * abs(1 / math.log(1 + places[0]) - 1
                                                                  / math.log(1 + places[1]))
                terms.append(cost * -log_sigmoid(u[i] - u[j]))
    return total(cands, terms)


def offline_pg(cands, variant="clip", beta=0.01, clip=0.01, delta=0.1, score="ratio"):
    rewards, terms = [c.reward for c in cands], []
    mean, sd = math.fsum(rewards) / len(rewards), spread(rewards)
    for c in cands:
        own = c.s / c.length if score == "token_ratio" else c.s
        log_rho = (c.s - c.ref) / (c.length if score == "token_ratio" else 1.0)
        A = 0.0 if sd == 0 else (c.reward - mean) / (sd + 0.01)
        if variant == "asymre":
            terms.append(-((0.0 if sd == 0 else c.reward - mean) + delta) * own)
        elif variant == "topr":
            terms.append(-A * own if A > 0 else -A * min(1.0, math.exp(log_rho.value)) * own)
        else:
            rho = log_rho.exp()
            edge = min(max(rho.value, 1 - clip), 1 + clip)
            clipped = rho if edge == rho.value else zero(cands) + edge
            low = rho * A if rho.value * A <= clipped.value * A else clipped * A
            terms.append(-low + beta * ((-log_rho).exp() + log_rho - 1.0))
    return total(cands, terms)


def awr(cands, beta=1.0, score="sum"):
    how = score
    return -total(cands,
                  [w * globals()["score"](c, how) for w, c in zip(softmax([c.reward for c in cands], beta), cands)])


def _pairs(cands, u, pairs, penalty):
    return pair_mean(cands, pairs, lambda a, b: penalty(u[cands.index(a)] - u[cands.index(b)], a.reward - b.reward))


def simpo(cands, beta=2.0, gamma=1.0, pairs="best_worst", score="token"):
    return _pairs(cands, us(cands, beta, score), pairs, lambda m, gap: -log_sigmoid(m - gamma))


def odpo(cands, beta=0.1, alpha=1.0, variant="log", pairs="best_worst", score="ratio"):
    return _pairs(cands, us(cands, beta, score), pairs,
                  lambda m, gap: -log_sigmoid(m - alpha * (math.log(gap) if variant == "log" else gap)))


def qrpo(cands, beta=1e-3, score="ratio", start=None):
    u, terms = us(cands, beta, score), []
    for j, c in enumerate(cands):
        others = start if start is not None else [o.reward for k, o in enumerate(cands) if k != j]
        if others:
            q = sum(o <= c.reward for o in others) / len(others)
            e = u[j] - (q - beta * (math.log(beta) + 1 / beta))
            terms.append(e * e)
    return total(cands, terms) / max(1, len(terms))


def swepo(cands, beta=0.1, alpha=1.0, score="ratio"):
    mean = math.fsum(c.reward for c in cands) / len(cands)
    if len({c.reward for c in cands}) == 1:
        return zero(cands)
    weighed = [(v + alpha * abs(c.reward - mean), c.reward > mean) for v, c in zip(us(cands, beta, score), cands)]
    top = max(v.value for v, _ in weighed)
    upper = total(cands, [(v - top).exp() for v, good in weighed if good])
    lower = total(cands, [(v - top).exp() for v, good in weighed if not good])
    return (lower / upper).log1p()


def _sides(cands, threshold):
    t = math.fsum(c.reward for c in cands) / len(cands) if threshold == "mean" else threshold
    if threshold == "mean" and len({c.reward for c in cands}) == 1:
        return [], []
    return [k for k, c in enumerate(cands) if c.reward > t], [k for k, c in enumerate(cands) if c.reward < t]


def kto(cands, beta=0.1, threshold="mean", z=0.0, desirable_weight=1.0, undesirable_weight=1.0, score="ratio"):
    good, bad = _sides(cands, threshold)
    u = us(cands, beta, score)
    terms = [desirable_weight * (1.0 - sigmoid(u[k] - beta * z)) for k in good]
    terms += [undesirable_weight * (1.0 - sigmoid(beta * z - u[k])) for k in bad]
    return total(cands, terms) / max(1, len(terms))


def apo(cands, beta=0.1, threshold="mean", variant="zero", score="ratio"):
    good, bad = _sides(cands, threshold)
    u = us(cands, beta, score)
    mean = lambda terms: total(cands, terms) / max(1, len(terms))  # noqa: E731
    if variant == "zero":
        return mean([1.0 - sigmoid(u[k]) for k in good]) + mean([sigmoid(u[k]) for k in bad])
    return mean([sigmoid(u[k]) for k in good]) + mean([1.0 - sigmoid(u[i] - u[j]) for i in good for j in bad])


def plackett_luce(cands, beta=0.1, top_k=None, rho=0.0, score="ratio"):
    u = us(cands, beta, score)

    def order_loss(worth):
        terms = []
        for i in range(len(cands)):
            if top_k is None or sum(w > worth[i] for w in worth) < top_k:
                terms.append(contrast(cands, u[i], [u[j] for j in range(len(cands)) if worth[j] < worth[i]]))
        return total(cands, terms)

    loss = order_loss([c.reward for c in cands])
    return (1 - rho) * loss + rho * order_loss([-v.value for v in u]) if rho else loss


def dpo(cands, beta=0.1, pairs="best_worst", variant="sigmoid", score="ratio"):
    def penalty(m, gap):
        if variant == "sigmoid":
            return -log_sigmoid(m)
        return (m / beta - 0.5 / beta) * (m / beta - 0.5 / beta) if variant == "ipo" else (1.0 - m).positive_part()

    return _pairs(cands, us(cands, beta, score), pairs, penalty)


ORACLES = {"infonca": infonca, "nca": nca, "regression": regression, "lipo": lipo, "offline_pg": offline_pg, "awr": awr,
           "simpo": simpo, "odpo": odpo, "qrpo": qrpo, "swepo": swepo, "kto": kto, "apo": apo,
           "plackett_luce_dpo": plackett_luce, "dpo": dpo,
           "lire": lambda cands, score="sum", **options: lire(cands, score_=score, **options)}

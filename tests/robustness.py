"""How rewards stand flipped labels: `python tests/robustness.py embed FOLDER` makes embeddings of the graded answers once,
`python tests/robustness.py heads FOLDER` and `… lists` write rows to data/results/robustness.jsonl; `… models` and
`… policies` take hours, keep each row as it comes, and go on where they stopped.

Every pair of different grades of a training list is a label, and a share of the labels is flipped, each by itself. What
learned from them is judged by the true grades: pair accuracy, one value for each list.

- heads: linear rewards on frozen embeddings, trained on the training lists, judged on the test lists. What a method can
  be set to is chosen on the validation lists, whose labels are flipped as well.
- lists: no features; the flipped labels of a list alone, judged on the same list. Can its order be recovered?
- models: whole reward models trained from MiniLM on two labels of each training list, with and without smoothing, and
  ensembles of three, judged on the test lists.
- policies: SmolLM2 trained with Plackett–Luce DPO on the order that the flipped labels of a list give (by wins), with
  `rho` against wrong orders; its implicit reward, β times the log-ratio to the start, is judged on the test lists.
"""
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "results" / "robustness.jsonl"
TASKS, FLIPPED, SEEDS = ("dialogue", "summarization"), (0.0, 0.1, 0.2, 0.4), 5
HEAD_SEEDS = 3
SMOOTHING, MEMBERS, RIDGES, MARGINS = 0.1, 8, (0.1, 1.0, 10.0, 100.0), (0.01, 0.02, 0.05, 0.1)
LENGTHS = {"dialogue": 160, "summarization": 128}  # tokens of a conversation; a longer one loses its beginning
EPOCHS, LABELS_A_LIST, ENSEMBLE = 2, 2, 3  # of reward models that are trained whole
RHOS, BETA, POLICY_LISTS = (0.0, 0.1, 0.2), 0.1, 64
DIMENSIONS = 32  # principal components of the embeddings


def graded(task: str) -> dict[str, list[dict]]:
    "The lists of a task by split: 60 % training, 10 % validation, 30 % test, by a hash of the prompt."
    from lire_nb.tasks import load_task

    return {split: [dict(r) for r in rows] for split, rows in load_task(task).reward_lists.items()}


def embed(folder: str) -> None:
    "MiniLM's mean over the conversation beside its mean over the answer alone, 768 numbers each; goes on where it was."
    import torch

    from lire_nb.conversations import encode_conversation
    from lire_nb.models import load_reward_backbone

    model, tokenizer = load_reward_backbone("minilm", device="cpu")
    pad = tokenizer.pad_token_id

    @torch.no_grad()
    def mean_state(rows: list[list[int]]) -> np.ndarray:
        found = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for part in (order[i : i + 32] for i in range(0, len(order), 32)):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in part], True, pad)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(rows[i])) for i in part], True)
            states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found |= zip(part, means.numpy())
        return np.stack([found[i] for i in range(len(rows))])

    for task in TASKS:
        for split, lists in graded(task).items():
            made = Path(folder, f"{task}-{split}.npy")
            if made.exists():
                continue
            texts = [(r["prompt"], c) for r in lists for c in r["completions"]]
            whole = [encode_conversation(p, c, tokenizer, LENGTHS[task]) for p, c in texts]
            alone = [encode_conversation("", c, tokenizer, LENGTHS[task]) for _, c in texts]
            found = np.hstack([mean_state(whole), mean_state(alone)])
            np.save(made.with_suffix(".part.npy"), found)
            made.with_suffix(".part.npy").replace(made)
            print(made.name, found.shape, flush=True)


def labels(lists: list[dict], flipped: float, draw: np.random.Generator) -> list[list[tuple[int, int]]]:
    "For each list its ordered pairs (better, worse), each turned round with probability `flipped`."
    pairs = [[(i, j) for i, a in enumerate(r["rewards"]) for j, b in enumerate(r["rewards"]) if a > b] for r in lists]
    return [[(j, i) if draw.random() < flipped else (i, j) for i, j in own] for own in pairs]


def accuracy(lists: list[dict], scores: list) -> list[float]:
    "Share of true pairs in the right order, ties a half; a value for each list."
    found = []
    for record, s in zip(lists, scores):
        pairs = [(s[i], s[j]) for i, a in enumerate(record["rewards"]) for j, b in enumerate(record["rewards"]) if a > b]
        found.append(float(np.mean([(1 + np.sign(x - y)) / 2 for x, y in pairs])))
    return found


def differences(blocks: list[np.ndarray], noisy: list, which=None) -> tuple[np.ndarray, np.ndarray]:
    "Feature differences of all labels, and the weight of each: lists count equally."
    chosen = [n for n in (range(len(blocks)) if which is None else which) if noisy[n]]
    X = np.concatenate([blocks[n][[i for i, _ in noisy[n]]] - blocks[n][[j for _, j in noisy[n]]] for n in chosen])
    return X, np.concatenate([np.full(len(noisy[n]), 1 / len(noisy[n])) for n in chosen])


def bradley_terry(X: np.ndarray, weight: np.ndarray, ridge: float, smoothing: float = 0.0) -> np.ndarray:
    "Weights that minimize the logistic loss with ridge; smoothing: the share of labels believed to be flipped."
    def loss(w):
        m = X @ w
        value = -(weight * ((1 - smoothing) * log_expit(m) + smoothing * log_expit(-m))).sum() + ridge * w @ w / 2
        return value, X.T @ (weight * (expit(m) - (1 - smoothing))) + ridge * w

    return minimize(loss, np.zeros(X.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def as_pairs(lists: list[dict], noisy: list) -> list[dict]:
    "Each label as a list of two, as a person would give it."
    return [{"id": f"{r['id']}:{k}", "prompt": r["prompt"], "completions": [r["completions"][i], r["completions"][j]],
             "rewards": [1.0, 0.0], "sources": ["unknown"] * 2, "meta": {}}
            for r, own in zip(lists, noisy) for k, (i, j) in enumerate(own)]


def lp_head(blocks, lists, noisy, margin: float) -> np.ndarray:
    "Weights of `lp_rewards` with features: read off the rewards that it gives to a simplex of texts."
    from lire_nb.feasible_rewards import lp_rewards

    d = blocks[0].shape[1]
    scale = max(np.abs(b).max() for b in blocks)
    pairs = as_pairs(lists, noisy)
    at = {r["id"]: n for n, r in enumerate(lists)}
    rows = []
    for p in pairs:
        n, k = p["id"].rsplit(":", 1)
        rows += [blocks[at[n]][j] for j in noisy[at[n]][int(k)]]
    done = lp_rewards(pairs, margin=margin, slack=True, take="any", features=np.array(rows) / scale)
    rewards = np.array([x for r in done for x in r["rewards"]])
    design = np.hstack([np.array(rows), np.ones((len(rows), 1))])  # the rewards are linear in the rows
    return np.linalg.lstsq(design, rewards, rcond=None)[0][:d]


def heads(folder: str) -> list[dict]:
    "Rows of linear rewards on frozen embeddings."
    rows = []
    for task in TASKS:
        lists = graded(task)
        tables = {split: np.load(Path(folder, f"{task}-{split}.npy")) for split in lists}
        train, blocks = tables["train"], {}
        mean = train.mean(0)
        axes = np.linalg.svd(train - mean, full_matrices=False)
        turn = axes[2][:DIMENSIONS].T / axes[1][:DIMENSIONS] * np.sqrt(len(train))  # components of variance 1
        for split, own in lists.items():
            ends = np.cumsum([len(r["completions"]) for r in own])[:-1]
            blocks[split] = np.split((tables[split] - mean) @ turn, ends)
        for flipped in FLIPPED:
            for seed in range(HEAD_SEEDS):
                rows += [{"study": "heads", "task": task, "flipped": flipped, "seed": seed, **row}
                         for row in _heads(lists, blocks, flipped, seed)]
                print(task, flipped, seed, {r["method"]: round(float(np.mean(r["accuracy"])), 3)
                                            for r in rows if (r["task"], r["flipped"], r["seed"]) == (task, flipped, seed)},
                      flush=True)
    return rows


def _heads(lists, blocks, flipped: float, seed: int) -> list[dict]:
    "All methods on the same flipped labels."
    draw = np.random.default_rng([seed, int(100 * flipped)])
    noisy = {split: labels(lists[split], flipped, draw) for split in ("train", "validation")}
    X, weight = differences(blocks["train"], noisy["train"])
    V, v = differences(blocks["validation"], noisy["validation"])

    def agreement(w) -> float:
        return float((v * ((V @ w > 0) + (V @ w == 0) / 2)).sum() / v.sum())

    def chosen(fit, options):
        tried = {option: fit(option) for option in options}
        option = max(options, key=lambda o: agreement(tried[o]))
        return option, tried[option]

    def members(ridge):
        picks = [draw.integers(len(blocks["train"]), size=len(blocks["train"])) for _ in range(MEMBERS)]
        return np.stack([bradley_terry(*differences(blocks["train"], noisy["train"], pick), ridge) for pick in picks])

    ridge, plain = chosen(lambda o: bradley_terry(X, weight, o), RIDGES)
    found = {"Bradley–Terry": (ridge, lambda b: b @ plain)}
    option, smooth = chosen(lambda o: bradley_terry(X, weight, o, SMOOTHING), RIDGES)
    found["smoothing 0.1"] = (option, lambda b: b @ smooth)
    several = members(ridge)  # (members, d)
    for k in (0.0, 1.0):
        found[f"ensemble, k = {k:g}"] = (
            ridge, lambda b, k=k: (b @ several.T).mean(1) - k * (b @ several.T).std(1))
    margin, linear = chosen(lambda o: lp_head(blocks["train"], lists["train"], noisy["train"], o), MARGINS)
    found["linear program"] = (margin, lambda b: b @ linear)
    return [{"method": name, "setting": setting, "accuracy": accuracy(lists["test"], [score(b) for b in blocks["test"]])}
            for name, (setting, score) in found.items()]


def tabular(record: dict, noisy: list) -> dict[str, np.ndarray]:
    "Scores of one list's candidates from its flipped labels alone."
    from lire_nb.feasible_rewards import lp_rewards

    M = len(record["rewards"])
    X = np.zeros((len(noisy), M))
    for row, (i, j) in zip(X, noisy):
        row[i], row[j] = 1, -1
    ends = {}
    for r in lp_rewards(as_pairs([record], [noisy]), slack=True):
        for text, *end in zip(r["completions"], r["meta"]["reward_low"], r["meta"]["reward_high"], strict=True):
            ends[text] = end
    values = np.array([ends.get(text, [0.0, 1.0]) for text in record["completions"]])
    return {"Bradley–Terry": np.round(bradley_terry(X, np.ones(len(X)), 0.1), 6),
            "linear program, middle": values.mean(1), "linear program, low": values[:, 0],
            "wins": X.sum(0)}


def lists_alone() -> list[dict]:
    "Rows of the study without features, with the mean width of the intervals."
    rows = []
    for task in TASKS:
        lists = graded(task)["test"]
        for flipped in FLIPPED:
            for seed in range(SEEDS):
                noisy = labels(lists, flipped, np.random.default_rng([seed, int(100 * flipped), 1]))
                found = [tabular(r, own) for r, own in zip(lists, noisy)]
                rows += [{"study": "lists", "task": task, "flipped": flipped, "seed": seed, "method": method,
                          "accuracy": accuracy(lists, [f[method] for f in found])} for method in found[0]]
            print(task, flipped, {r["method"]: round(float(np.mean(r["accuracy"])), 3) for r in rows[-4:]}, flush=True)
    return rows


def models() -> None:
    "Rows of reward models that are trained whole, on the dialogue task; those that are there are not made again."
    from lire_nb.rewards import train_reward_model

    lists = graded("dialogue")
    texts = [[r["prompt"]] * len(r["completions"]) for r in lists["test"]]
    for draw in range(HEAD_SEEDS):
        for flipped in FLIPPED:
            if all(known("models", flipped, draw, name) for name in ("plain", f"smoothing {SMOOTHING}")):
                continue
            rng = np.random.default_rng([draw, int(100 * flipped), 2])
            noisy = labels(lists["train"], flipped, rng)
            noisy = [[own[k] for k in rng.permutation(len(own))[:LABELS_A_LIST]] for own in noisy]
            pairs, scores = as_pairs(lists["train"], noisy), []
            for member in range(ENSEMBLE + 1):
                start = time.process_time()
                reward = train_reward_model(
                    pairs, epochs=EPOCHS, max_length=LENGTHS["dialogue"], seed=10 * draw + member, progress=False,
                    label_smoothing=SMOOTHING if member == ENSEMBLE else 0.0)
                scores.append([reward(p, r["completions"]) for p, r in zip(texts, lists["test"])])
                print(flipped, draw, member, round(float(np.mean(accuracy(lists["test"], scores[-1]))), 3),
                      f"{time.process_time() - start:.0f} s", flush=True)
            members = [np.stack(own) for own in zip(*scores[:ENSEMBLE])]
            found = {"plain": scores[0], f"smoothing {SMOOTHING}": scores[ENSEMBLE],
                     **{f"ensemble, k = {k:g}": [m.mean(0) - k * m.std(0) for m in members] for k in (0.0, 1.0)}}
            keep([{"study": "models", "task": "dialogue", "flipped": flipped, "seed": draw, "method": name,
                   "accuracy": accuracy(lists["test"], own)} for name, own in found.items()], "rewards.train_reward_model")


def policies() -> None:
    "Rows of Plackett–Luce DPO with `rho`; those that are there are not made again."
    import tempfile

    from lire_nb.enhancement import train_policy
    from lire_nb.logprobs import dataset_logps
    from lire_nb.models import load_policy

    lists = graded("dialogue")
    start = dataset_logps(*load_policy("smollm2"), lists["test"])
    for draw in range(HEAD_SEEDS):
        for flipped in FLIPPED:
            noisy = labels(lists["train"], flipped, np.random.default_rng([draw, int(100 * flipped), 3]))
            ordered = [{**r, "rewards": [float(sum(i == j for i, _ in own)) for j in range(len(r["rewards"]))]}
                       for r, own in zip(lists["train"][:POLICY_LISTS], noisy)]
            for rho in (rho for rho in RHOS if not known("policies", flipped, draw, f"rho {rho:g}")):
                with tempfile.TemporaryDirectory() as folder:
                    made = train_policy("smollm2", ordered, Path(folder, "policy"), seed=draw, rho=rho, beta=BETA,
                                        loss_type="plackett_luce_dpo", learning_rate=1e-4, num_train_epochs=1,
                                        per_device_train_batch_size=4, disable_tqdm=True)
                    end = dataset_logps(*load_policy(made), lists["test"])
                scores = [np.subtract(a, b) for (a, _), (b, _) in zip(end, start)]
                row = {"study": "policies", "task": "dialogue", "flipped": flipped, "seed": draw,
                       "method": f"rho {rho:g}", "accuracy": accuracy(lists["test"], scores)}
                print(flipped, draw, rho, round(float(np.mean(row["accuracy"])), 3), flush=True)
                keep([row], "rivals.plackett_luce_dpo_loss")


def known(study: str, flipped: float, seed: int, method: str) -> bool:
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()] if TABLE.exists() else []
    return any((r["study"], r["flipped"], r["seed"], r["method"]) == (study, flipped, seed, method) for r in rows)


def keep(rows: list[dict], definition: str) -> None:
    "Append rows, whole or not at all."
    from lire_nb.base.versions import version
    from lire_nb.cli import machine

    about = machine()
    rows = [{**row, "accuracy": [round(x, 4) for x in row["accuracy"]], "code": version(definition),
             "date": about["date"], "machine": {k: v for k, v in about.items() if k != "date"}} for row in rows]
    before = TABLE.read_text() if TABLE.exists() else ""
    draft = TABLE.with_suffix(".tmp")
    draft.write_text(before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    draft.replace(TABLE)


def main(study: str, *folder: str) -> None:
    "Run a study; its rows replace the older ones of the same study, or, of a long study, join them."
    if study in ("embed", "models", "policies"):
        return {"embed": embed, "models": models, "policies": policies}[study](*folder)
    start = time.perf_counter()
    rows = {"heads": heads, "lists": lists_alone}[study](*folder)
    from lire_nb.base.versions import version
    from lire_nb.cli import machine

    about = machine()
    code = version("feasible_rewards.lp_rewards")
    kept = [json.loads(line) for line in TABLE.read_text().splitlines()] if TABLE.exists() else []
    kept = [row for row in kept if row["study"] != study]
    rounded = [{k: [round(x, 4) for x in v] if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    seconds = round(time.perf_counter() - start, 1)
    made = [{**row, "code": code, "date": about["date"],
             "machine": {k: v for k, v in about.items() if k != "date"}, "seconds": seconds} for row in rounded]
    TABLE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *made]))
    print(f"{len(made)} rows in {seconds} s")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Lists of any length in the memory of a few candidates: the gradient of one pass, with each prompt computed once.
About 30 seconds on one thread."""
import json
import logging
import os
from pathlib import Path

import long_processes
import peft
import pytest
import torch
import warm
from long_processes import loss_of
from test_logprobs import FALLBACK, SHARED, lists_of, tiny
from tiny_policy import make_start

from lire_nb import long_lists, shared_prompt
from lire_nb.base.errors import LireError
from lire_nb.logprobs import list_logps
from lire_nb.long_lists import list_logps_in_parts
from lire_nb.models import load_policy
from lire_nb.path_check import check_paths
from lire_nb.records import make_record
from lire_nb.shared_prompt import ListCollator
from lire_nb.training import _check_sharded, LIREConfig, LIRETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
SIZES = [(9, (3, 1, 9, 2, 2)), (2, (5,)), (11, (4, 6, 1)), (3, (1, 1))]


def batch_of(sizes=SIZES):
    return ListCollator()([one | {"rewards": [0.3 * j % 1 for j in range(len(one["completion_ids"]))]}
                           for one in lists_of(sizes)])


def gradient(model, logps_of, loss=loss_of, batch=None, seed=0):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    batch = batch or batch_of()
    value = loss(logps_of(batch)[0], batch)
    value.backward()
    return float(value.detach()), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
                                             for p in model.parameters()])


def off(a, b) -> float:
    return float((a[1] - b[1]).norm() / b[1].norm()) + abs(a[0] - b[0])


class Read:
    "Counts the tokens that a model embeds. Not by a hook: it would be another state of the model, to be checked again."

    def __init__(self, model):
        self.own, self.rows, self.forward = model.get_input_embeddings(), [], torch.nn.Embedding.forward

    def __enter__(self):
        def forward(module, ids):
            if module is self.own:
                self.rows.append(ids.numel())
            return self.forward(module, ids)

        torch.nn.Embedding.forward = forward
        return self

    def __exit__(self, *error):
        torch.nn.Embedding.forward = self.forward


@pytest.mark.parametrize("family",
                         ["llama", "mistral-window", "mixtral", "gemma2", "gemma3", "qwen2-window", "gpt2", "opt",
                          "cohere2", "granite"])
def test_the_gradient_of_one_pass_with_each_prompt_once(family):
    model = tiny(SHARED[family]())
    plain = gradient(model, lambda b: list_logps(model, b, impl="shared"))
    for k in (1, 3):
        assert off(gradient(model, lambda b: list_logps_in_parts(model, b, k, impl="shared")), plain) < 1e-4
    if type(model.get_input_embeddings()).forward is not torch.nn.Embedding.forward:
        return  # Gemma scales what it embeds, in a class of its own
    with Read(model) as read, torch.no_grad():
        list_logps_in_parts(model, batch_of(), 2, impl="shared")
    prompts, answers = sum(p for p, _ in SIZES), sum(r - 1 for _, rs in SIZES for r in rs)
    assert sum(read.rows) == prompts + answers


@pytest.mark.parametrize("family", ["bloom", "gpt-neo", "mamba", "gpt-oss", "lfm2"])
def test_models_that_cannot_keep_prompts_stay_exact(family):
    model = tiny(FALLBACK[family]())
    plain = gradient(model, lambda b: list_logps(model, b))
    assert off(gradient(model, lambda b: list_logps_in_parts(model, b, 2)), plain) < 1e-4


def test_a_prompt_is_read_twice_whatever_the_number_of_candidates():
    "Once for the scores, once for the gradient: not once for every few candidates."
    model = tiny(SHARED["llama"]())
    check_paths(model)
    batch = batch_of([(40, (4,) * 12)])
    with Read(model) as read:
        gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared"), batch=batch)
    assert sum(read.rows) == 2 * (40 + 12 * 3)


def test_what_waits_for_the_gradient_does_not_grow_with_the_list():
    "Of 40 further candidates of 20 tokens: less than one candidate keeps in one pass."
    model, kept = tiny(SHARED["llama"]()), {}
    check_paths(model)
    for way, M in [("one", 1), ("one", 2), ("parts", 8), ("parts", 48)]:
        batch, seen = batch_of([(30, (20,) * M)]), {}

        def keep(t):
            seen[t.untyped_storage().data_ptr()] = t  # alive, so that no place is taken twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logps = list_logps(model, batch,
                               impl="shared") if way == "one" else list_logps_in_parts(model, batch, 2, impl="shared")
        kept[way, M] = sum(t.untyped_storage().nbytes() for t in seen.values())
        del logps
    assert kept["parts", 48] - kept["parts", 8] < kept["one", 2] - kept["one", 1]


def test_longrope_across_its_limit_takes_the_prompt_again(caplog):
    """Below the limit prompts are kept; across it a prompt alone would be turned by other frequencies than its
    candidates."""
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0, rope_theta=1e4,
                original_max_position_embeddings=12)
    config = SHARED["llama"]()
    model = tiny(type(config)(**config.to_dict() | {"rope_parameters": rope, "rope_scaling": None}))
    plain = gradient(model, lambda b: list_logps(model, b, impl="shared"))
    for _ in range(2):
        assert off(gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared")), plain) < 1e-4
    assert sum("computed again for every few candidates" in r.message for r in caplog.records) == 1


def test_an_error_in_kept_prompts_is_found_by_the_check(monkeypatch, caplog):
    right = shared_prompt.keep_prompts

    def wrong(model, row):
        first, kept = right(model, row)
        return first, shared_prompt.Kept(kept.lengths, {m: (k.flip(2), v) for m, (k, v) in kept.layers.items()})

    model = tiny(SHARED["llama"]())
    plain = gradient(model, lambda b: list_logps(model, b, impl="padded"))
    monkeypatch.setattr(shared_prompt, "keep_prompts", wrong)
    check = check_paths(model, again=True)
    assert check.shared and "relative error" in check.not_kept
    assert off(gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared")), plain) < 1e-4
    assert "computed again for every few candidates" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_with_gradient_checkpointing(reentrant, caplog):
    model = tiny(SHARED["gemma3"]())
    plain = gradient(model, lambda b: list_logps(model, b, impl="shared"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    assert off(gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared")), plain) < 1e-4
    assert ("use_reentrant=True" in caplog.text) == reentrant


@pytest.mark.parametrize("family, dropout",
                         [("llama", {"attention_dropout": 0.3}),
                          ("gpt2", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2})])
def test_dropout_draws_the_same_masks_in_both_passes(family, dropout, monkeypatch):
    "In parts that keep everything there is one pass, and so one set of masks: its gradient is the right one."
    config = SHARED[family]()
    for name, value in dropout.items():
        setattr(config, name, value)
    model = tiny(config)
    check_paths(model)
    model.train()
    again = gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared"))
    monkeypatch.setattr(long_lists, "checkpoint", lambda function, *args, **kwargs: function(*args))
    once = gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared"))
    assert off(again, once) < 1e-4
    # there are masks
    assert off(gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared"), seed=1), once) > 1e-2


def test_lora_and_frozen_layers():
    for targets in (["q_proj", "v_proj"], ["o_proj"], "all-linear"):
        model = peft.get_peft_model(tiny(SHARED["llama"]()),
                                    peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets,
                                                    init_lora_weights=False))
        plain = gradient(model, lambda b: list_logps(model, b, impl="shared"))
        assert plain[1].norm() > 0
        assert off(gradient(model, lambda b: list_logps_in_parts(model, b, 2, impl="shared")), plain) < 1e-4


def test_accumulated_and_with_any_loss():
    "Two batches one after the other, under a loss that looks at all candidates of a list together."
    model = tiny(SHARED["qwen3"]())

    def loss(logps, batch):
        return (logps.masked_fill(~batch["mask"], 0).std(1) * logps.exp().sum(1).sqrt()).sum()

    def both(logps_of):
        model.zero_grad()
        for sizes in (SIZES, [(7, (2, 3, 4)), (5, (6, 1))]):
            batch = batch_of(sizes)
            loss(logps_of(batch)[0], batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = both(lambda b: list_logps(model, b, impl="shared"))
    assert (both(lambda b: list_logps_in_parts(model, b, 2, impl="shared")) - plain).norm() < 1e-4 * plain.norm()


def test_mixed_precision_adds_up_in_float32():
    """Sixty parts: were their gradients added in 16 bits, in weights or in kept keys, they would be further from
    float32 than one pass is."""
    model = tiny(SHARED["llama"]())
    batch, errors = batch_of([(20, (4,) * 60)]), {}
    exact = gradient(model, lambda b: list_logps(model, b, impl="shared"), batch=batch)
    for way, logps_of in {"one": lambda b: list_logps(model, b, impl="shared"),
                          "parts": lambda b: list_logps_in_parts(model, b, 1, impl="shared")}.items():
        def half(b, logps_of=logps_of):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return logps_of(b)

        errors[way] = off(gradient(model, half, batch=batch), exact)
    assert errors["parts"] < 1.2 * errors["one"]


def test_odd_batches():
    "One token each, one candidate each, more at once than there are, no gradient, float64."
    for sizes in ([(5, (1, 1, 1))], [(4, (3,)), (6, (2,)), (1, (1,))], [(1, (2, 1, 3))]):
        model, batch = tiny(SHARED["mistral-window"]()).double(), batch_of(sizes)
        plain = gradient(model, lambda b: list_logps(model, b, impl="padded"), batch=batch, loss=lambda logps,
                         b: (logps * logps).sum())
        for k in (1, 2, 9):
            assert off(gradient(model, lambda b: list_logps_in_parts(model, b, k, impl="shared"), batch=batch,
                                loss=lambda logps, b: (logps * logps).sum()), plain) < 1e-6
        with torch.no_grad():
            (a, lengths), (b, others) = list_logps_in_parts(model, batch, 1, impl="shared"), list_logps(model, batch)
        assert not a.requires_grad and torch.allclose(a, b) and torch.equal(lengths, others)


# The setting.

def trainer(place, **settings):
    words = [" good", " bad", " dull and long", " fine", " odd", " so so", " great"]
    lists = [make_record(f"film {n} was", words[: 2 + n % 6],
                         rewards=[1.0, -0.5, 0.25, 0.0, 0.7, 0.1, 0.9][: 2 + n % 6], id=f"film-{n:02}")
             for n in range(11)]
    model, tokenizer = load_policy(place / "start")
    args = LIREConfig(**{"output_dir": str(place / "out"), "learning_rate": 1e-2, "max_steps": 3,
                         "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "disable_tqdm": True,
                         "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "optim": "sgd",
                         **settings})
    return LIRETrainer(model, args, lists, lists[:4], processing_class=tokenizer)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    make_start(folder / "start", dropout=0.0)
    return folder


def weights_of(one) -> torch.Tensor:
    one.train()
    return torch.cat([p.detach().flatten() for p in one.model.parameters()])


@pytest.fixture(scope="module")
def plain_weights(place):
    return weights_of(trainer(place))


def by_hand(logps, rewards, mask, **_):
    return -(logps.masked_fill(~mask, -1e9).softmax(1) * rewards.masked_fill(~mask, 0)).sum(1)


def test_a_training_in_parts_ends_at_the_same_weights(place, plain_weights):
    assert (weights_of(trainer(place, candidates_at_once=2)) - plain_weights).abs().max() < 1e-5
    apart = [weights_of(trainer(place, loss_type=by_hand, candidates_at_once=k)) for k in (None, 3)]
    assert (apart[0] - apart[1]).abs().max() < 1e-5 and (apart[0] - plain_weights).abs().max() > 1e-4


def test_auto_decides_once_before_the_first_step(place, plain_weights, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lire_nb")
    for free, few in ((300_000, True), (10**11, False), (0, True)):
        caplog.clear()
        monkeypatch.setattr(long_lists, "free_bytes", lambda device: free)
        one = trainer(place, candidates_at_once="auto")
        assert (weights_of(one) - plain_weights).abs().max() < 1e-5
        one.evaluate()
        lines = [r.getMessage() for r in caplog.records if "candidates_at_once" in r.getMessage()]
        assert len(lines) == 1
        found, largest = (int(word) for word in lines[0].replace(";", " ").split() if word.isdigit())
        assert largest == 19 and (found < largest) == few and (found == 1) == (free == 0)


def test_auto_draws_no_random_number(place, tmp_path):
    "A probe with dropout would otherwise move every mask of the training."
    make_start(tmp_path / "start", dropout=0.3)
    assert torch.equal(weights_of(trainer(tmp_path, candidates_at_once="auto")),
                       weights_of(trainer(tmp_path, candidates_at_once=1000)))


def test_auto_in_an_evaluation_without_training(place, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lire_nb")
    monkeypatch.setattr(long_lists, "free_bytes", lambda device: 0)
    found = trainer(place, candidates_at_once="auto").evaluate()
    assert abs(found["eval_loss"]
               - trainer(place).evaluate()["eval_loss"]) < 1e-5 and "candidates_at_once: 1 " in caplog.text


@pytest.mark.parametrize("given, read", [("auto", "auto"), ("none", None), (None, None), (3, 3), ("4", 4), (4.0, 4)])
def test_the_setting_is_read(tmp_path, given, read):
    assert LIREConfig(output_dir=str(tmp_path), candidates_at_once=given).candidates_at_once == read


@pytest.mark.parametrize("wrong", ["many", "2.5", 2.5, 0, "0", -1, True, "Auto ", [2]])
def test_the_setting_is_refused_in_one_line(tmp_path, wrong):
    with pytest.raises(LireError, match="^candidates_at_once: .*; allowed: .*; remedy: .*") as e:
        LIREConfig(output_dir=str(tmp_path), candidates_at_once=wrong)
    assert "\n" not in str(e.value)
    with pytest.raises(LireError, match="^candidates_at_once: "):
        list_logps_in_parts(None, {}, wrong)


# Two processes.

def test_two_processes_give_the_gradient_of_one_pass(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    warm.ranks(2, HERE / "long_processes.py", tmp_path, env=env, timeout=200)
    both = [json.loads((tmp_path / f"rank-{n}.json").read_text()) for n in (0, 1)]
    model = long_processes.start()
    # each process took its batch twice, and DDP takes the mean of the two
    plain = sum(gradient(model, lambda b: list_logps(model, b, impl="shared"), batch=long_processes.share(n))[1]
                for n in (0, 1))
    for way, tolerance in (("whole", 1e-4), ("half", 2e-2)):
        assert both[0][way] == both[1][way]
        assert (torch.tensor(both[0][way], dtype=torch.float64) - plain).norm() < tolerance * plain.norm()


def test_auto_is_decided_once_for_a_run_that_goes_on(tmp_path, monkeypatch):
    "Another number of candidates would draw other dropout masks."
    make_start(tmp_path / "start", dropout=0.3)
    settings = dict(candidates_at_once="auto", save_strategy="steps", save_steps=1)
    monkeypatch.setattr(long_lists, "free_bytes", lambda device: 300_000)
    whole = weights_of(trainer(tmp_path, **settings))
    first = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
    monkeypatch.setattr(long_lists, "free_bytes", lambda device: 0)
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(first))
    assert torch.equal(torch.cat([p.detach().flatten() for p in again.model.parameters()]), whole)


def test_sharded_weights_are_refused_before_the_first_step(place, monkeypatch):
    one = trainer(place, candidates_at_once=2)
    monkeypatch.setattr(type(one.accelerator), "num_processes", property(lambda self: 2))
    one.is_fsdp_enabled = True
    with pytest.raises(LireError, match="^candidates_at_once: not possible with sharded weights") as e:
        _check_sharded(one)
    assert "\n" not in str(e.value)

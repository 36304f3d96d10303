"What a GPU would feel, counted with pretended tensors; and the check for a GPU, run dry on the CPU."
import json

import pytest
import torch
from pretended import on_device, Pretended, Watch
from tiny_policy import make_start
from transformers import LlamaConfig, LlamaForCausalLM

import lire_nb.logprobs as logprobs
import lire_nb.shared_prompt as shared_prompt
from lire_nb.lab.bench import bench_batch, Point
from lire_nb.models import load_policy
from lire_nb.path_check import PathCheck, to_device
from lire_nb.records import make_record
from lire_nb.shared_prompt import at_hand, AtHand, for_a_while
from lire_nb.training import LIREConfig, LIRETrainer, TrainingCollator

RAGGED = [{"id": str(b), "prompt_ids": list(range(3, 3 + p)), "completion_ids": [[5 + k] * n for k, n in enumerate(ns)],
           "rewards": [float(k) for k in range(len(ns))]} for b, (p, ns) in enumerate(((9, (3, 1, 4)), (5, (2, 6))))]

TEXTS = [" good", " bad", " of no interest"]
LISTS = [make_record(f"film {n} was", TEXTS[: 2 + n % 2], rewards=[1.0, -0.5, 0.25][: 2 + n % 2], id=f"film-{n}")
         for n in range(4)]


def model_of(layers: int, **settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2, **settings))


@pytest.fixture
def policy(tmp_path):
    return load_policy(make_start(tmp_path / "start", dropout=0.0))


@pytest.fixture(autouse=True)
def believed(monkeypatch):
    "The self-check looks at numbers on purpose, once for a model."
    sure = lambda *args, **kwargs: PathCheck("chunks", True, "")  # noqa: E731
    monkeypatch.setattr(logprobs, "verified", sure)


def measured(model, batch, way):
    values = logprobs.list_logps(model, batch, impl=way)[0]
    return values, torch.autograd.grad(values.sum(), model.model.embed_tokens.weight)[0]


@pytest.mark.parametrize("way", ["padded", "shared"])
def test_values_and_gradients_on_a_device_without_a_wait(way):
    batch = TrainingCollator()(RAGGED)
    plain, gradient = measured(model_of(2), batch, way)
    with Watch() as seen:
        found, theirs = measured(on_device(model_of(2)), to_device(batch, "cuda"), way)
    torch.testing.assert_close(found.real_one, plain.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.real_one, gradient, rtol=1e-4, atol=1e-6)
    assert sum(seen.waits.values()) <= 2 * (way == "padded"), seen.waits  # transformers asks whether the mask has a pad


def operations_of_a_layer(way: str, switch: str | None = None, dtype=torch.float32) -> int:
    counts = []
    for layers in (1, 2):
        batch, model = bench_batch(Point(20, 6, 3, 2), 300), model_of(layers).to(dtype)
        switched = [(shared_prompt, name, name == switch) for name in ("FLEX", "DENSE") if switch]
        with Watch() as seen, torch.no_grad(), for_a_while(*switched):
            logprobs.list_logps(on_device(model), to_device(batch, "cuda"), impl=way)
        counts.append(sum(seen.operations.values()))
    return counts[1] - counts[0]


def test_operations_of_a_layer(monkeypatch):
    "A dense mask and FlexAttention are one kernel; in blocks there are some more. Short rows take the dense mask."
    def one_kernel(query, key, value, block_mask, scale, enable_gqa):
        Watch.active[-1].operations["flex"] += 1
        return Pretended(torch.zeros(query.shape))

    monkeypatch.setattr(shared_prompt, "_flex_function", lambda compiled: one_kernel)
    monkeypatch.setattr(shared_prompt, "create_block_mask", lambda *args, **kwargs: None)
    padded, blocks, flex, dense = (operations_of_a_layer(*how) for how in (
        ("padded",), ("shared", "neither"), ("shared", "FLEX"), ("shared", "DENSE")))
    assert max(flex, dense) <= 1.15 * padded and padded < blocks <= 1.5 * padded, (padded, blocks, flex, dense)
    half = [operations_of_a_layer(way, dtype=torch.bfloat16) for way in ("padded", "shared")]
    assert half[1] <= 1.15 * half[0], half  # chosen by itself


@pytest.mark.parametrize("window", [None, 4])
def test_a_dense_mask_gives_what_the_blocks_give(window):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, use_sliding_window=window is not None, max_window_layers=1))
    batch = TrainingCollator()(RAGGED)
    found = {}
    for dense in (False, True):
        with for_a_while((shared_prompt, "DENSE", dense)):
            values = logprobs.list_logps(model, batch, impl="shared")[0]
        model.zero_grad()
        values.square().sum().backward()
        found[dense] = values.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
    plain = logprobs.list_logps(model, batch, impl="padded")[0].detach()
    torch.testing.assert_close(found[True][0], plain, rtol=1e-5, atol=1e-5)
    for name, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("P, N, R, heads, dense", [(150, 3, 150, 9, True), (1024, 3, 1024, 9, False),
                                                   (200, 4, 100, 64, True), (2000, 2, 120, 64, False),
                                                   (8000, 2, 30, 9, False)])  # a long prompt is no short row
def test_a_dense_mask_is_for_rows_where_launches_cost_more(P, N, R, heads, dense):
    layout = torch.stack([torch.zeros(P + N * R, dtype=torch.long),
                          torch.cat([torch.full((P,), -1), torch.arange(N).repeat_interleave(R)]),
                          torch.cat([torch.arange(P), *(torch.arange(P, P + R) for _ in range(N))])])
    plan = shared_prompt._Plan(layout)
    query = Pretended(torch.zeros(1, 1, 1, 1)).expand(1, heads, P + N * R, 64)  # float32, as rotated under autocast
    value = Pretended(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))
    assert shared_prompt._wants_dense(plan, query, value, None) == dense
    assert not shared_prompt._wants_dense(plan, query, value, 30.0)  # a soft cap needs the scores themselves
    assert not shared_prompt._wants_dense(plan, query, query, None)  # float32: slow where all is multiplied
    assert not shared_prompt._wants_dense(plan, torch.zeros(1, 1, P + N * R, 64), torch.zeros(1), None)  # on a CPU


def test_waits_of_a_micro_batch(policy, tmp_path):
    args = LIREConfig(output_dir=str(tmp_path), temperature=2.0, logps_impl="shared", report_to="none", bf16=False)
    trainer = LIRETrainer(policy[0], args, LISTS, processing_class=policy[1])
    rows = [trainer.train_dataset[k] for k in range(4)]
    collate = TrainingCollator(0, "packed")
    plain = trainer.compute_loss(trainer.model, TrainingCollator()(rows), num_items_in_batch=torch.tensor(4.0))
    with Watch() as seen:
        batch, model = collate(rows), on_device(trainer.model)
        batch = {k: v.to("cuda") if torch.is_tensor(v) else v for k, v in batch.items()}  # as accelerate does
        assert isinstance(batch["host"], AtHand) and not at_hand(batch)["mask"].is_cuda
        items = torch.tensor(4.0).to("cuda")
        seen.waits.clear()
        loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
        loss.backward()
    assert isinstance(loss, Pretended) and sum(seen.waits.values()) <= 6, seen.waits
    torch.testing.assert_close(loss.detach().real_one, plain.detach())


def test_sampling_does_not_wait_for_each_token(policy):
    from lire_nb.sampling import LocalSampler, SamplingSettings

    asked = (["one", "two prompts"], 3, SamplingSettings(max_new_tokens=17), 5)
    plain = LocalSampler(*policy, progress=False, share_prompt=True).sample(*asked)
    with Watch() as seen:
        model = on_device(policy[0])
        model.__class__ = type("Device", (type(model),), {"device": property(lambda self: torch.device("cuda", 0))})
        drawn = LocalSampler(model, policy[1], progress=False, share_prompt=True).sample(*asked)
    assert [[c.token_ids for c in row] for row in drawn] == [[c.token_ids for c in row] for row in plain]
    looks = sum(n for (_, where), n in seen.waits.items() if where != "elsewhere")
    assert looks <= 3 * 3 + 2, seen.waits  # 17 tokens in three looks: tokens, log-probs, totals; and the prompt's mask


def test_flex_without_copies_is_exact_and_never_has_to_give_a_gradient_on_a_cpu():
    batch, model = TrainingCollator()(RAGGED), model_of(2)
    blocks, gradient = measured(model, batch, "shared")
    with for_a_while((shared_prompt, "FLEX", True)):
        with torch.no_grad():
            flex = logprobs.list_logps(model, batch, impl="shared")[0]
        again = measured(model, batch, "shared")[1]
    torch.testing.assert_close(flex, blocks.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("width, path", [(576, "padded"), (4096, "shared")])
def test_auto_knows_what_waits_for_launches(width, path):
    batch = to_device(bench_batch(Point(192, 48, 6, 4), 300), "cpu")
    model = model_of(1)
    model.config.hidden_size = width
    assert logprobs.worth_sharing(model, batch)  # on a CPU fewer tokens are always less work
    with Watch():
        assert logprobs.worth_sharing(model, to_device(batch, "cuda")) == (path == "shared")


def test_the_check_of_a_gpu_runs_dry(tmp_path, capsys):
    import gpu_check

    out = tmp_path / "gpu.jsonl"
    assert gpu_check.main(["--out", str(out), "--device", "cpu", "--tiny", "--models", "135m"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["what"] for r in rows][0] == "machine" and rows[-1]["good"]
    assert {r["way"] for r in rows if r["what"] == "step"} == {"authors", "padded", "shared", "dense"}
    assert not [r for r in rows if "error" in r and r["what"] != "trl"], rows
    assert all(r["code"] == gpu_check.CODE for r in rows)
    assert gpu_check.main(["--out", str(out)]) == 2 or torch.cuda.is_available()

"""`make gpu-check`: is the package right on this GPU, and how fast is each way? Random weights made here by
configuration, no assets, no network; rows are appended to data/results/gpu.jsonl as they come.

First correctness, in float64 and in bfloat16: every way against a plain forward pass in float64 on the CPU. Then one
gradient step of the authors' way, the padded path, and the shared path in blocks, by FlexAttention and with a dense
mask, on models of 135 M, 1 B and 7 B parameters (of the last, one matrix a layer is trained, as an adapter costs);
TRL's DPO at M = 2 where it is installed; sampling; and memory. What does not fit into the budget of seconds is left
out, and said.
"""
import argparse
import copy
import gc
import json
import os
import random
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
try:
    import datasets  # noqa: F401
except ImportError:  # nothing here reads a table, but the modules name its classes
    stand_in = types.ModuleType("datasets")
    stand_in.__getattr__ = lambda name: type(name, (), {"__init__": lambda self, *args, **kwargs: None})
    sys.modules["datasets"] = stand_in

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import lire_nb.shared_prompt as shared_prompt  # noqa: E402
from lire_nb.lab.bench import authors_logps, bench_batch, forward_flops, layer_parameters, Point  # noqa: E402
from lire_nb.logprobs import list_logps, path_of  # noqa: E402
from lire_nb.losses import lire_loss  # noqa: E402
from lire_nb.path_check import check_paths, to_device  # noqa: E402
from lire_nb.shared_prompt import for_a_while, ListCollator  # noqa: E402

CODE = "gpu-check 1"  # raise it when a field changes its meaning
SIZES = {  # layers, hidden, intermediate, heads, key heads, vocabulary, tied
    "135m": (30, 576, 1536, 9, 3, 49152, True),
    "1b": (22, 2048, 5632, 32, 4, 32000, False),
    "7b": (32, 4096, 11008, 32, 32, 32000, False),
}
POINTS = (Point(192, 48, 6, 4), Point(512, 64, 8, 2), Point(2048, 256, 8, 1), Point(4096, 1024, 8, 1))
TINY = Point(12, 5, 3, 2), Point(40, 6, 4, 1)


def packed(model, batch, route: str | None = None):
    "The shared path by one of its routes: in blocks, by FlexAttention, or with a dense mask."
    with for_a_while((shared_prompt, "FLEX", route == "flex"), (shared_prompt, "DENSE", route == "dense")):
        return list_logps(model, batch, impl="shared")[0]


WAYS = {"authors": authors_logps, "padded": lambda model, batch: list_logps(model, batch, impl="padded")[0],
        "shared": packed, **{route: partial(packed, route=route) for route in ("flex", "dense")}}
DENSE_UP_TO = 4096  # tokens of a packed row: beyond, nobody would take the dense mask


class Check:
    "The device, the clock, and the file that rows go to."

    def __init__(self, args):
        self.device, self.budget, self.out = torch.device(args.device), args.budget, Path(args.out)
        self.cuda, self.tiny, self.began = self.device.type == "cuda", args.tiny, time.monotonic()
        self.gpu = torch.cuda.get_device_name() if self.cuda else "no GPU"
        self.ways = [way for way in WAYS if self.cuda or way != "flex"]  # it has no gradient on a CPU

    def put(self, what: str, **row) -> None:
        row = {"what": what, **row, "gpu": self.gpu, "code": CODE, "at": round(time.monotonic() - self.began, 1)}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if k not in ("gpu", "code")},
              flush=True)

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clean(self, model=None) -> None:
        if model is not None:
            model.zero_grad(set_to_none=True)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def attempt(self, what: str, function, **row) -> None:
        "Whatever fails is a row of its own, and the rest goes on."
        try:
            function()
        except Exception as error:
            self.put(what, **row, error=f"{type(error).__name__}: {error}"[:300])


def make_model(check: Check, layers, hidden, wide, heads, keys, vocabulary, tied, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=tied,
                         max_position_embeddings=8192)
    with torch.device(check.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def ragged_lists(seed: int = 1) -> list[dict]:
    draw = random.Random(seed)
    ids = lambda most: [draw.randrange(3, 1000) for _ in range(draw.randint(1, most))]  # noqa: E731
    lists = [{"id": str(b), "prompt_ids": ids(90), "completion_ids": [ids(40) for _ in range(draw.randint(1, 6))]}
             for b in range(5)]
    return [{**one, "rewards": [float(j) for j in range(len(one["completion_ids"]))]} for one in lists]


def plain_logps(model, lists: list[dict]) -> torch.Tensor:
    "Each candidate alone, with nothing of the package."
    found = []
    for one in lists:
        for ids in one["completion_ids"]:
            row, start = one["prompt_ids"] + ids, len(one["prompt_ids"])
            logps = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            found.append(logps[torch.arange(start - 1, len(row) - 1), torch.tensor(ids)].sum())
    return torch.stack(found)


def mixture_gradient(values: torch.Tensor, model) -> torch.Tensor:
    weights = torch.linspace(-1, 1, len(values), device=values.device)
    return torch.autograd.grad((values * weights).sum(), model.get_input_embeddings().weight)[0].double().cpu()


def right(check: Check) -> bool:
    "Values, and the gradient at the embeddings."
    model, lists, good = make_model(check, 4, 256, 512, 8, 4, 1000, False).train(), ragged_lists(), []
    oracle = copy.deepcopy(model).to("cpu", torch.float64)
    truth = plain_logps(oracle, lists)
    gradient, truth = mixture_gradient(truth, oracle), truth.detach()
    found = check_paths(model)
    check.put("self-check", head=found.head, shared=found.shared, reason=found.reason, seconds=found.seconds)
    batch = to_device(ListCollator()(lists), check.device)
    away = lambda a, b: float((a - b).norm() / b.norm())  # noqa: E731

    def one(way, dtype, limits):
        half = dtype == torch.bfloat16
        cast = model if half else copy.deepcopy(model).to(dtype)
        with torch.autocast(check.device.type, dtype=torch.bfloat16, enabled=half):
            values = WAYS[way](cast, batch)[batch["mask"]]
        errors = away(values.detach().double().cpu(), truth), away(mixture_gradient(values, cast), gradient)
        good.append(errors[0] < limits[0] and errors[1] < limits[1])
        check.put("right", way=way, dtype=str(dtype)[6:], value_error=errors[0], gradient_error=errors[1],
                  good=good[-1])

    for way in check.ways:  # transformers turns positions in float32, in a float64 model as well
        for dtype, limits in ((torch.float64, (1e-6, 1e-5)), (torch.bfloat16, (2e-2, 0.15))):
            if way == "flex" and dtype == torch.float64:
                dtype, limits = torch.float32, (1e-5, 1e-3)  # it has no float64 on a GPU
            check.attempt("right", lambda: one(way, dtype, limits), way=way, dtype=str(dtype)[6:])
    return all(good) and len(good) == 2 * len(check.ways)


def step(check: Check, model, batch, way: str) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast(check.device.type, dtype=torch.bfloat16):
        logps = WAYS[way](model, batch)
    lire_loss(logps, batch["rewards"], batch["mask"]).mean().backward()


def steps(check: Check, model, name: str, point: Point, repeats: int) -> None:
    "Median seconds and peak memory of a gradient step, of each way in turn."
    batch = bench_batch(point, model.config.vocab_size, device=check.device)
    sizes = dict(P=point.P, R=point.R, M=point.M, lists=point.lists)
    parameters = layer_parameters(model)

    def one(way):
        began = time.perf_counter()
        step(check, model, batch, way)
        check.wait()
        first = time.perf_counter() - began
        if check.cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if check.cuda else 0
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            step(check, model, batch, way)
            check.wait()
            seconds.append(time.perf_counter() - began)
        middle = statistics.median(seconds)
        flops = 3 * forward_flops(model.config, parameters, point, "shared" if way in ("flex", "dense") else way)
        check.put("step", model=name, **sizes, way=way, seconds=middle, low=min(seconds), high=max(seconds),
                  first_seconds=first, tflops=flops / middle / 1e12, auto=path_of(model, batch, "auto"),
                  peak_gib=(torch.cuda.max_memory_allocated() - before) / 2**30 if check.cuda else None)

    for way in check.ways:
        if way == "dense" and point.lists * (point.P + point.M * point.R) > DENSE_UP_TO:
            continue
        if check.left() < 20 and not check.tiny:
            return check.put("step", model=name, **sizes, way=way, error="left out: no time")
        check.attempt("step", lambda: one(way), model=name, **sizes, way=way)
        check.clean(model)


def sampling(check: Check, model, name: str, rows: int) -> None:
    "Tokens drawn a second, four candidates to a prompt of 192 tokens."
    from lire_nb.sampling import _Decoding, draw_tokens

    draw, count = torch.Generator().manual_seed(0), 4 if check.tiny else 32
    prompts = [torch.randint(3, model.config.vocab_size, (12 if check.tiny else 192,), generator=draw).tolist()
               for _ in range(rows // 4)]
    uniform = torch.rand(rows, count, generator=draw).to(check.device)
    totals = []
    with torch.no_grad():
        decoding = _Decoding(model, prompts, 4, 0)
        check.wait()
        began = time.perf_counter()
        for k in range(count):
            decoding.append(draw_tokens(decoding.scores.float(), uniform[:, k], totals))
        check.wait()
    seconds = (time.perf_counter() - began) / count
    check.put("sampling", model=name, rows=rows, seconds_a_token=seconds, tokens_per_second=rows / seconds)


def trl_pairs(check: Check, model, name: str, repeats: int) -> None:
    "One DPO step over pairs by TRL's own forward pass, beside ours; without its wheel, a line says so."
    try:
        from trl.trainer.dpo_trainer import DPOTrainer  # noqa: F401
        from trl import __version__ as version
    except ImportError as error:
        return check.put("trl", model=name, error=f"not installed: {error}"[:200])
    point = Point(12, 5, 2, 2) if check.tiny else Point(192, 48, 2, 8)
    batch = bench_batch(point, model.config.vocab_size, device=check.device)

    def theirs():  # as its loss reads a batch: padded rows, logits at the completions, log-softmax of the chosen tokens
        rows = shared_prompt.padded_rows(batch)
        from trl.trainer.utils import selective_log_softmax
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
        tokens = selective_log_softmax(logits[:, :-1], rows["input_ids"][:, 1:])
        counted = torch.zeros_like(rows["input_ids"], dtype=torch.bool).flatten()
        counted = counted.index_fill(0, rows["index"], True).view_as(rows["input_ids"])[:, :-1]
        return (tokens * counted).sum(1).view(point.lists, 2)

    def timed(way, logps_of):
        seconds = []
        for _ in range(repeats + 1):
            check.wait()
            began = time.perf_counter()
            model.zero_grad(set_to_none=True)
            with torch.autocast(check.device.type, dtype=torch.bfloat16):
                logps = logps_of()
            torch.nn.functional.softplus(-(logps[:, 0] - logps[:, 1])).mean().backward()
            check.wait()
            seconds.append(time.perf_counter() - began)
        check.put("trl", model=name, P=point.P, R=point.R, M=2, lists=point.lists, way=way, trl=version,
                  seconds=statistics.median(seconds[1:]))

    ours = {f"ours, {way}": lambda way=way: WAYS[way](model, batch) for way in ("padded", "shared")}
    for way, logps_of in {"trl's log-softmax": theirs, **ours}.items():
        check.attempt("trl", lambda: timed(way, logps_of), model=name, way=way)
        check.clean(model)


def models(check: Check, names: list[str]) -> None:
    for name in names:
        if check.left() < 40 and not check.tiny:
            check.put("model", model=name, error="left out: no time")
            continue
        large = name == "7b" and not check.tiny
        sizes = (2, 64, 96, 4, 2, 500, False) if check.tiny else SIZES[name]

        def one():
            model = make_model(check, *sizes, dtype=torch.bfloat16 if large else torch.float32).train()
            check_paths(model)
            if large:
                for key, p in model.named_parameters():
                    p.requires_grad_(key.endswith("q_proj.weight"))
            for point in TINY if check.tiny else POINTS[: 3 if name == "135m" else 4]:
                steps(check, model, name, point, 1 if check.tiny else 3 if large else 5)
            if not large:
                trl_pairs(check, model, name, 1 if check.tiny else 5)
            if check.left() > 15:
                sampling(check, model.eval(), name, 8 if check.tiny else 128)

        check.attempt("model", one, model=name)
        check.clean()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parents[1] / "data/results/gpu.jsonl"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--budget", type=float, default=400, help="seconds")
    parser.add_argument("--tiny", action="store_true", help="a dry run with tiny models, on any device")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA GPU; --device cpu --tiny --out FILE tries the script out",
              file=sys.stderr)
        return 2
    check = Check(args)
    check.put("machine", torch=torch.__version__, transformers=transformers.__version__,
              python=sys.version.split()[0], day=time.strftime("%Y-%m-%d"))
    good = right(check)
    if good:
        models(check, args.models.split(","))
    else:
        check.put("stopped", error="a way is wrong on this device, so nothing was timed")
    check.put("done", good=good)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

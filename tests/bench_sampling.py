"""How fast candidates are sampled: the shared prompt against every candidate with its own prompt, and against one call
of generate per prompt. SmolLM2, 64 prompts of the sentiment task, 4 candidates of 32 tokens each. A script:

    python tests/bench_sampling.py [repeats]
"""
import statistics
import sys
import time

import torch

from lire_nb.models import compute_dtype, load_policy
from lire_nb.sampling import LocalSampler, SamplingSettings
from lire_nb.tasks import load_task


def old_batch(model, tokenizer, prompts, candidates, tokens, batch_size):
    """Batches of like length, every candidate with its own prompt: one call of generate a batch."""
    encoded = sorted((tokenizer(p)["input_ids"] for p in prompts), key=len)
    step = batch_size // candidates
    for start in range(0, len(encoded), step):
        chunk = [e for e in encoded[start : start + step] for _ in range(candidates)]
        width = max(map(len, chunk))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(e)) + e for e in chunk])
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in chunk])
        model.generate(ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0, top_p=1.0,
                       temperature=1.0, max_new_tokens=tokens,
                       min_new_tokens=1, pad_token_id=tokenizer.pad_token_id)


def one_by_one(model, tokenizer, prompts, candidates, tokens):
    """One call of generate a prompt, num_return_sequences candidates."""
    for prompt in prompts:
        model.generate(**tokenizer(prompt, return_tensors="pt").to(model.device), do_sample=True, top_k=0, top_p=1.0,
                       temperature=1.0, max_new_tokens=tokens,
                       min_new_tokens=1, num_return_sequences=candidates, pad_token_id=tokenizer.pad_token_id)


def bench_sampling(repeats: int = 3, *, policy="smollm2", prompts: int = 64, candidates: int = 4, tokens: int = 32,
                   batch_size: int = 128) -> list[dict]:
    """One row a way: median, least and most seconds of `repeats` interleaved runs, tokens a second, and how often
    faster than one call a prompt."""
    model, tokenizer = load_policy(policy, dtype=compute_dtype())
    texts = [p["prompt"] for p in load_task("sentiment").prompts["test"][:prompts]]
    settings = SamplingSettings(max_new_tokens=tokens)
    shared = LocalSampler(model, tokenizer, batch_size, progress=False)
    ways = {
        "prompt shared": lambda seed: shared.sample(texts, candidates, settings, seed),
        "prompt in every row, batched": lambda seed: old_batch(model, tokenizer, texts, candidates, tokens, batch_size),
        "one call a prompt": lambda seed: one_by_one(model, tokenizer, texts, candidates, tokens),
    }
    seconds = {way: [] for way in ways}
    shared.sample(texts[:2], candidates, settings, 0)  # warm
    for repeat in range(repeats):
        for way, run in ways.items():
            torch.manual_seed(repeat)
            start = time.perf_counter()
            run(repeat)
            seconds[way].append(time.perf_counter() - start)
    base = statistics.median(seconds["one call a prompt"])
    return [{"way": way, "seconds": round(statistics.median(s), 2), "least": round(min(s), 2), "most": round(max(s), 2),
             "tokens_per_second": round(prompts * candidates * tokens / statistics.median(s)),
             "faster": round(base / statistics.median(s), 2),
             "least_faster_in_a_repeat": round(min(b / a for a, b in zip(s, seconds["one call a prompt"])), 2),
             "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "repeats": repeats}
            for way, s in seconds.items()]


def main():
    for row in bench_sampling(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        print(f"{row['way']:30}{row['seconds']:8.2f} s ({row['least']:.2f} … "
              f"{row['most']:.2f}){row['tokens_per_second']:7,} tokens/s{row['faster']:7.2f}×, at least "
              f"{row['least_faster_in_a_repeat']:.2f}×   {row['dtype']}, {row['threads']} threads")


if __name__ == "__main__":
    main()

"""One self-enhancement run that samples from a server: to be killed. handover_client.py START RUN URL"""
import sys
from pathlib import Path

from lire_nb.enhancement import self_enhance
from lire_nb.handover import Engine
from lire_nb.sampling import SamplingSettings

PROMPTS = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}} for i in range(4)]
OPTIONS = dict(evolve=2, num_candidates=3, settings=SamplingSettings(max_new_tokens=4), progress=False,
               training=dict(learning_rate=5e-2, bf16=False, use_cpu=True, per_device_train_batch_size=2,
                             lr_scheduler_type="constant"))


def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) - len(text) / 10 for text in completions]


if __name__ == "__main__":
    start, run, url = sys.argv[1:]
    self_enhance(Path(start), PROMPTS, vowels, run, sampler=Engine(url, max_in_flight=1, progress=False), **OPTIONS)

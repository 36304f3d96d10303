"""What one of two processes does, for test_launch.py: a policy of which each process reads its share of the weights."""
import json
import os
import sys
from pathlib import Path

import torch
from test_launch import LISTS, SHARED
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from lire_nb.enhancement import train_policy
from lire_nb.launch import shared_out
from lire_nb.models import load_policy
from lire_nb.training import LIRETrainer


def main(place: Path) -> None:
    torch.set_num_threads(1)
    found, step = {}, LIRETrainer.training_step

    def training_step(self, model, *args, **kwargs):
        held = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        found["bytes"], found["all"] = sum(t.nbytes for t in held), len(held) == len(list(model.parameters()))
        return step(self, model, *args, **kwargs)

    LIRETrainer.training_step = training_step
    train_policy(place / "start", LISTS, place / "shared", sharded=True, **SHARED, per_device_train_batch_size=2)
    model, _ = load_policy(place / "start", distributed_config=DistributedConfig(fsdp_size=2))
    whole = lambda: [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]  # noqa: E731
    found["whole"] = [whole()]
    model(input_ids=torch.tensor([[1, 2, 3]]))
    found["whole"] += [whole(), shared_out(model) and whole()]
    (place / f"shared-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What one of two processes does, for test_scale.py: a policy trained with its weights shared out by FSDP2, on CPU with
gloo. accelerate launch --config_file X sharded_processes.py PLACE

accelerate takes FSDP for accelerators only: on a CPU it says MULTI_CPU and leaves ACCELERATE_USE_FSDP unread
(accelerate/state.py). The one line that decides is told otherwise here;
the wrapping, the collectives, the clipping and the saving are those of a machine with GPUs."""
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from lire_nb.enhancement import train_policy
from lire_nb.lab.memory import lora_config
from lire_nb.lists import load_lists
from lire_nb.training import LIRETrainer

SETTINGS = dict(learning_rate=5e-3, max_steps=4, bf16=False, use_cpu=True, per_device_train_batch_size=2,
                disable_tqdm=True)
known = PartialState.__init__


def as_if_on_gpus(self, *args, **kwargs):
    fresh = not PartialState._shared_state
    known(self, *args, **kwargs)
    if fresh:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(place: Path) -> None:
    torch.set_num_threads(1)
    PartialState.__init__ = as_if_on_gpus
    found, step = {}, LIRETrainer.training_step

    def training_step(self, model, *args, **kwargs):
        held = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, DTensor)]
        found["lora" if hasattr(model, "peft_config") else "full"] = {
            "type": str(self.accelerator.distributed_type), "class": type(model).__name__,
            "sharded": len(held) == len(list(model.parameters())),
            "weights": sum(t.nbytes for t in held), "optimizer": sum(t.to_local().nbytes for t in states)}
        return step(self, model, *args, **kwargs)

    LIRETrainer.training_step = training_step
    lists = load_lists(place / "lists.jsonl")
    train_policy(place / "start", lists, place / "sharded", save_steps=2, **SETTINGS)
    train_policy(place / "start", lists, place / "sharded-lora", trainer_options={"peft_config": lora_config(rank=4)},
                 **SETTINGS)
    rank = PartialState().process_index
    (place / f"sharded-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What each of two processes does, for test_faults_long.py: its own lists, in parts, under DDP. python -m
torch.distributed.run --nproc_per_node 2 long_processes.py PLACE"""
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lire_nb.long_lists import list_logps_in_parts
from lire_nb.losses import lire_loss
from lire_nb.path_check import check_paths
from lire_nb.shared_prompt import ListCollator


def start() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96))


def share(rank: int) -> dict:
    "The batch of a process: lists of several lengths."
    draw = torch.Generator().manual_seed(rank)
    ids = lambda n: torch.randint(3, 97, (n,), generator=draw).tolist()  # noqa: E731
    return ListCollator()([{"id": f"{rank}-{b}", "prompt_ids": ids(p), "completion_ids": [ids(r) for r in rs],
                            "rewards": [0.3 * j % 1 for j in range(len(rs))]}
                           for b, (p, rs) in enumerate([(9 + rank, (3, 1, 9, 2, 2)), (4, (5, 2)), (3, (1, 1, 4))])])


def loss_of(logps, batch):
    return lire_loss(logps, batch["rewards"], batch["mask"]).mean()


def main(place: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), {}
    for way, dtype in (("whole", None), ("half", torch.bfloat16)):
        model, batch = start(), share(rank)
        check_paths(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for step in range(2):  # accumulation: the first gradient is shared out with the second
            with wrapped.no_sync() if step == 0 else nullcontext(), torch.autocast("cpu", dtype=dtype,
                                                                                   enabled=dtype is not None):
                logps = list_logps_in_parts(wrapped, batch, 2, impl="shared")[0]
            with wrapped.no_sync() if step == 0 else nullcontext():
                loss_of(logps, batch).backward()
        found[way] = torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()
    (place / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

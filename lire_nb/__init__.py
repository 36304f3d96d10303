"""List-wise reward enhancement (LIRE): align language models from lists of candidates."""
__version__ = "0.2.0"

import sys
from typing import TYPE_CHECKING

_HOMES = {
    "base.errors": ("LireError",),
    "losses": ("lire_loss",),
    "rivals": ("get_loss",),
    "records": ("lists_dataset", "make_record", "merge_lists"),
    "conversations": ("render_prompt",),
    "lists": ("load_lists", "save_lists"),
    "tasks": ("load_task",),
    "models": ("Policy", "load_policy", "load_tokenizer"),
    "sampling": ("sample_lists",),
    "selection": ("select",),
    "rewards": ("RewardModel", "score_lists", "train_reward_model"),
    "feasible_rewards": ("lp_rewards",),
    "shared_prompt": ("ListCollator", "tokenize_list"),
    "logprobs": ("dataset_logps", "list_logps"),
    "temperature": ("suggest_temperature",),
    "training": ("LIREConfig", "LIRETrainer"),
    "enhancement": ("self_enhance", "train_policy"),
    "preferences": ("win_rate",),
    "evaluation": ("evaluate_systems",),
    "lab.report": ("report",),
}
__all__ = [name for names in _HOMES.values() for name in names]

if TYPE_CHECKING:  # what type checkers read; the same names as in _HOMES, which a test compares
    from .base.errors import LireError as LireError
    from .losses import lire_loss as lire_loss
    from .rivals import get_loss as get_loss
    from .records import (
        lists_dataset as lists_dataset, make_record as make_record, merge_lists as merge_lists,
    )
    from .conversations import render_prompt as render_prompt
    from .lists import load_lists as load_lists, save_lists as save_lists
    from .tasks import load_task as load_task
    from .models import (
        Policy as Policy, load_policy as load_policy, load_tokenizer as load_tokenizer,
    )
    from .sampling import sample_lists as sample_lists
    from .selection import select as select
    from .rewards import (
        RewardModel as RewardModel, score_lists as score_lists, train_reward_model as train_reward_model,
    )
    from .feasible_rewards import lp_rewards as lp_rewards
    from .shared_prompt import ListCollator as ListCollator, tokenize_list as tokenize_list
    from .logprobs import dataset_logps as dataset_logps, list_logps as list_logps
    from .temperature import suggest_temperature as suggest_temperature
    from .training import LIREConfig as LIREConfig, LIRETrainer as LIRETrainer
    from .enhancement import self_enhance as self_enhance, train_policy as train_policy
    from .preferences import win_rate as win_rate
    from .evaluation import evaluate_systems as evaluate_systems
    from .lab.report import report as report


def __getattr__(name):
    # Lazy, so that `import lire_nb` stays fast and `lire_nb.losses` needs torch only.
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'lire_nb' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"lire_nb.{home}"), name)


class _Gone:
    "Asked by Python when no file has a module's name: says where the names of a module that is gone are now."

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith("lire_nb.") and not name.startswith("lire_nb.base"):
            from lire_nb.base.errors import gone

            if error := gone(name):
                raise error


if _Gone not in sys.meta_path:
    sys.meta_path.append(_Gone)

"""List-wise reward enhancement (LIRE): align language models from lists of candidates."""
__version__ = "0.2.0"

import sys

# __init__.pyi names the same for type checkers; a test compares the two.
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
    "lab.compare": ("compare",),
}
__all__ = [name for names in _HOMES.values() for name in names]


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

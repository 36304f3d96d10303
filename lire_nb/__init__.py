"""List-wise reward enhancement (LIRE): align language models from lists of candidates."""
__version__ = "0.1.0"

_HOMES = {
    "losses": ("get_loss", "lire_loss"),
    "lists": ("LireError", "lists_dataset", "load_lists", "make_record", "merge_lists", "save_lists"),
    "conversations": ("render_prompt",),
    "tasks": ("load_task",),
    "models": ("load_policy", "load_tokenizer"),
    "sampling": ("sample_lists",),
    "rewards": ("RewardModel", "score_lists", "train_reward_model"),
    "logprobs": ("ListCollator", "dataset_logps", "list_logps", "tokenize_list"),
    "temperature": ("suggest_temperature",),
    "training": ("LIREConfig", "LIRETrainer"),
    "enhancement": ("self_enhance", "train_policy"),
    "evaluation": ("evaluate_systems", "win_rate"),
    "reporting": ("report",),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name):
    # Lazy, so that `import lire_nb` stays fast and `lire_nb.losses` needs torch only.
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'lire_nb' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"lire_nb.{home}"), name)

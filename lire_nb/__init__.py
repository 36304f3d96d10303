"""List-wise reward enhancement (LIRE): align language models from lists of candidates."""
__version__ = "0.1.0"

__all__ = ["LIREConfig", "LIRETrainer", "suggest_temperature"]

_HOMES = {"LIREConfig": "training", "LIRETrainer": "training", "suggest_temperature": "temperature"}


def __getattr__(name):
    # Lazy, so that `import lire_nb` stays fast and `lire_nb.losses` needs torch only.
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(f"lire_nb.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lire_nb' has no attribute {name!r}")

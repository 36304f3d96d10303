"""List-wise reward enhancement (LIRE): align language models from lists of candidates."""
__version__ = "0.1.0"

__all__ = ["LIREConfig", "LIRETrainer"]


def __getattr__(name):
    # Lazy, so that `import lire_nb` stays fast and `lire_nb.losses` needs torch only.
    if name in __all__:
        from lire_nb import training

        return getattr(training, name)
    raise AttributeError(f"module 'lire_nb' has no attribute {name!r}")

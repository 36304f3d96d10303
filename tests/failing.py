"""A training that fails at a step, as nobody expects."""
from transformers import TrainerCallback


class Failure(Exception):
    """Nobody expects it."""


class FailAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Failure

"The names at the top, which are lazy at run time, for type checkers."
from typing import Any, Literal, overload

from datasets import Dataset

from .base.errors import LireError as LireError
from .losses import lire_loss as lire_loss
from .rivals import get_loss as get_loss
from .records import (
    lists_dataset as lists_dataset, make_record as make_record, merge_lists as merge_lists,
)
from .conversations import render_prompt as render_prompt
from .lists import LoadReport, save_lists as save_lists
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
from .lab.compare import compare as compare
from .lab.report import report as report

__version__: str
__all__: list[str]


@overload
def load_lists(source: Any, mapping: dict | None = ..., on_error: str = ..., *, quarantine: Any = ...,
               chat: bool | None = ..., split: str | None = ..., return_report: Literal[False] = ...) -> Dataset: ...
@overload
def load_lists(source: Any, mapping: dict | None = ..., on_error: str = ..., *, quarantine: Any = ...,
               chat: bool | None = ..., split: str | None = ...,
               return_report: Literal[True]) -> tuple[Dataset, LoadReport]: ...

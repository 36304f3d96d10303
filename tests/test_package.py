"""The names at the top of the package: the stable ones, found when they are asked for."""
import subprocess
import sys

import pytest

import lire_nb

STABLE = """LIREConfig LIRETrainer lire_loss get_loss make_record load_lists save_lists merge_lists load_task
load_policy Policy sample_lists train_reward_model score_lists list_logps tokenize_list self_enhance
evaluate_systems win_rate compare report LireError RewardModel train_policy dataset_logps lists_dataset
render_prompt load_tokenizer ListCollator suggest_temperature lp_rewards select""".split()


def test_the_stable_names_are_there():
    assert set(STABLE) == set(lire_nb.__all__)
    for name in STABLE:
        assert getattr(lire_nb, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lire'"):
        lire_nb.lire


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, lire_nb; assert not {'torch', 'transformers', 'datasets', 'nbdev'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

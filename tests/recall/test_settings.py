"""The command line of a study, and the studies that are kept."""

import pytest

from dla_train.config import ConfigError
from dla_train.recall.command import main
from dla_train.recall.settings import compose


def test_settings_of_the_command_line_win_over_the_study():
    study = compose(["study=paired_token", "seeds=[3]", "steps=7", "optim.warmup_steps=1"])
    assert (study.seeds, study.steps, study.optim["warmup_steps"]) == ([3], 7, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepz=3"], "stepz is not a setting of a study; did you mean steps"),
        (["memories.dla_content.routing=qk"], r"not in the study's file; write \+memories.dla_content.routing=VALUE"),
        (["study=none_such"], "none_such"),
        (["seeds=[]"], "seeds=.* at least one"),
        (["seeds=[1,1]"], "each once"),
        (["seeds=[1000]", "tuning_seeds=[1000,1001]"], r"tuning_seeds=.* has \[1000\], which are of seeds too"),
        (["tuning_seeds=[]"], "tuning_seeds=.* at least one"),
        (["seeds=[-1]"], "has one below 0"),
        (["rates.mamba2_single=0"], "rates.mamba2_single=0.0 must be above 0"),
        (["learning_rates=[0.0]"], "at least one rate above 0"),
        (["easy=needles_5"], "easy=needles_5 is none of parts"),
        (["baseline=none_such"], "baseline=none_such is none of memories"),
        (["+weights.needles_5=1"], "weights.needles_5 is none of parts"),
        (["+weights.needles_4=-1"], "weights=.* at least 0"),
        (["+weights.needles_4=0"], "one of them above"),
        (["batch_rows=0"], "batch_rows=0 is below 1"),
        (["goal_accuracy=0"], "goal_accuracy=0"),
        (["decay_rate=0"], "decay_rate=0"),
        (["step_size=-1"], "step_size=-1.0 must be above 0"),
        (["+optim.lr=1"], "optim.lr is filled in"),
        (["+model.backbone=mamba2"], "model.backbone is filled in"),
    ],
)
def test_a_mistake_is_named(words, message):
    with pytest.raises(ConfigError, match=message):
        compose(words)


@pytest.mark.parametrize("words", [["stepz=3"], ["render"], ["render", "/nowhere"], ["task.name=mqr"]])
def test_the_program_explains_a_mistake_in_one_line(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("dla-recall: error: ")


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0
    assert "learning_rates" in capsys.readouterr().out

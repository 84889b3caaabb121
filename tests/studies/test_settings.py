"""Settings of a run are read by its task and model, or refused."""

import pytest

from matrigami.studies import RunConfig, build_model, load_task
from matrigami.studies._config import OF_DATA
from matrigami.studies._size import task_size
from matrigami.studies.tasks import TASKS, Shape


def run(dataset, model="mlp", **changes):
    return RunConfig(
        dataset, model, "dense", 16, seed=0, lr=3e-3, epochs=1, batch_size=8, **changes
    )


VALUES = {
    "augment": True,
    "shuffle_pixels": True,
    "mixup": 0.5,
    "label_smoothing": 0.1,
    "samples_per_epoch": 64,
    "context": 64,
    "vocabulary": 70,
    "side": 4,
}
"""Settings of data, none at its default."""


@pytest.mark.parametrize("name", ["digits", "cifar100", "teacher_small", "tinyshakespeare"])
@pytest.mark.parametrize("setting", OF_DATA)
def test_a_setting_is_read_by_a_task_or_refused(setting, name):
    asked = run(name, **{setting: VALUES[setting]})
    if setting in TASKS[name].settings:
        TASKS[name].check(asked)
        return
    for plan in (load_task, task_size):  # before any data are read
        with pytest.raises(ValueError, match=f"{setting} = .* means nothing for task {name}"):
            plan(asked)


@pytest.mark.parametrize(("model", "read"), [("mlp", ()), ("gpt", ("heads",))])
def test_a_setting_is_read_by_a_model_or_refused(model, read):
    shape = Shape(8, 1, 5, is_text=model == "gpt")
    for setting, value in {"heads": 4, "patch": 2}.items():
        asked = run("any", model, **{setting: value})
        if setting in read:
            build_model(asked, shape)
        else:
            with pytest.raises(ValueError, match=f"means nothing for model {model}"):
                build_model(asked, shape)

"""What TensorBoard reads after the timeline's calls."""

import subprocess
import sys
from pathlib import Path

import pytest
from bonn_qat_tensorboard import TensorBoardObserver

from bonn_qat import plugins
from bonn_qat.training.recipe import Recipe

RECIPE = Recipe.default("digits")


@pytest.fixture
def hook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pm = plugins.create_manager(entry_points=False)
    pm.register(TensorBoardObserver())
    pm.check_pending()
    return pm.hook


def run(hook, epochs, *, ends=True):
    hook.bonn_qat_before_run(recipe=RECIPE, model=None, run_id="a")
    for epoch in range(1, epochs + 1):
        metrics = {"epoch": float(epoch), "test/top1": 10.0 * epoch}
        hook.bonn_qat_after_epoch(recipe=RECIPE, epoch=epoch, metrics=metrics, time=1000.0 + epoch)
    if ends:
        hook.bonn_qat_after_run(recipe=RECIPE, result=None)


def curve(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(point.step, point.value, point.wall_time) for point in events.Scalars("test/top1")]


def test_each_epoch_is_a_point_with_its_time(hook):
    run(hook, 2)
    assert curve(Path("tensorboard", RECIPE.name)) == [(1, 10.0, 1001.0), (2, 20.0, 1002.0)]


def test_a_resumed_run_has_each_epoch_once_though_its_process_was_killed(hook):
    run(hook, 2, ends=False)
    run(hook, 3)  # tells the first two again
    assert [step for step, *_ in curve(Path("tensorboard", RECIPE.name))] == [1, 2, 3]


def test_the_runs_of_a_comparison_lie_in_its_directory(hook, tmp_path):
    directory = tmp_path / "results"
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    run(hook, 1)
    hook.bonn_qat_after_comparison(directory=directory, page=directory / "report.html")
    run(hook, 1)
    folders = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("events.out*"))
    assert folders == [f"results/tensorboard/{RECIPE.name}", f"tensorboard/{RECIPE.name}"]


def test_a_folder_that_cannot_be_made_costs_one_warning(hook):
    Path("tensorboard").write_text("a file")
    with pytest.warns(RuntimeWarning, match="TensorBoard: .*the training continues") as caught:
        run(hook, 2)
    assert len(caught) == 1


def test_loading_the_plugin_loads_no_tensorboard():
    code = "import sys, bonn_qat_tensorboard; sys.exit('tensorboard' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_observer_is_found_by_its_entry_point(monkeypatch):
    monkeypatch.setenv("BONN_QAT_PLUGINS", "tensorboard")
    assert isinstance(plugins.create_manager().get_plugin("tensorboard"), TensorBoardObserver)

"""What stands in the files after the timeline's calls."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from bonn_qat_csv import CsvObserver

from bonn_qat import plugins
from bonn_qat.training.recipe import Recipe

RECIPE = Recipe.default("digits")
NAME = f"{RECIPE.name}.csv"


@pytest.fixture
def hook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pm = plugins.create_manager(entry_points=False)
    pm.register(CsvObserver())
    pm.check_pending()
    return pm.hook


def run(hook, epochs, recipe=RECIPE):
    hook.bonn_qat_before_run(recipe=recipe, model=None, run_id="a")
    for epoch in range(1, epochs + 1):
        metrics = {"epoch": float(epoch), "test/top1": 1 / 3, **({"train/feature": 0.5} if epoch > 1 else {})}
        hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics=metrics, time=1000.5 + epoch)
    hook.bonn_qat_after_run(recipe=recipe, result=None)


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_epoch_is_a_row_with_every_metric_exactly(hook):
    run(hook, 2)
    first, second = rows(NAME)
    assert first == {"time": "1001.5", "epoch": "1.0", "test/top1": repr(1 / 3), "train/feature": ""}
    assert float(second["train/feature"]) == 0.5


def test_a_resumed_run_has_each_epoch_once(hook):
    run(hook, 2)
    run(hook, 3)  # tells the first two again
    assert [row["epoch"] for row in rows(NAME)] == ["1.0", "2.0", "3.0"]


def test_the_runs_of_a_comparison_lie_beside_their_results(hook, tmp_path):
    inner = tmp_path / "study" / "wide"
    hook.bonn_qat_before_comparison(directory=inner.parent, recipes=[])
    hook.bonn_qat_before_comparison(directory=inner, recipes=[])
    run(hook, 1)
    run(hook, 1, replace(RECIPE, seed=1))
    hook.bonn_qat_after_comparison(directory=inner, page=inner / "report.html")
    hook.bonn_qat_after_comparison(directory=inner.parent, page=inner / "report.html")
    run(hook, 2)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.csv"))] == [
        NAME, f"study/wide/runs/{NAME}", f"study/wide/runs/{replace(RECIPE, seed=1).name}.csv",
    ]  # fmt: skip
    assert len(rows(inner / "runs" / NAME)) == 1


def test_a_file_that_cannot_be_written_costs_one_warning(hook):
    Path(NAME).mkdir()
    with pytest.warns(RuntimeWarning, match=f"cannot write {NAME}.*the training continues") as caught:
        run(hook, 2)
    assert len(caught) == 1


def test_the_observer_is_found_by_its_entry_point(monkeypatch):
    monkeypatch.setenv("BONN_QAT_PLUGINS", "csv")
    assert isinstance(plugins.create_manager().get_plugin("csv"), CsvObserver)

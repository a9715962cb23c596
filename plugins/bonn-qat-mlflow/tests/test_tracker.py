"""What the store holds after the timeline's calls, by a real database."""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from bonn_qat_mlflow import unsent
from bonn_qat_mlflow.flat import flatten
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.tracker import TRACKER, Tracker
from bonn_qat_mlflow.where import masked

from bonn_qat import plugins

# MLflow's own models, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@dataclass(frozen=True)
class FakeRecipe:
    scheme: str = "bonn"
    seed: int = 0
    content: dict = field(default_factory=dict)

    @property
    def name(self):
        return f"{self.scheme}-seed{self.seed}"

    def to_dict(self):
        stages = [{"share": 0.8, "regularizers": {"kernel": 1e-4}}, {"share": 0.2, "regularizers": {}}]
        return {"model": "wrn10", "scheme": self.scheme, "data": "digits", "seed": self.seed, "lr": 0.1,
                "skip": ["stem", "*.conv1"], "stages": stages, **self.content}  # fmt: skip


REPORT = {
    "name": "bonn-seed0",
    "seconds": 2.5,
    "size": {"mbit": 0.5},
    "environment": {"torch": "2", "commit": "abc"},
    "epochs": [],
}


@pytest.fixture
def tracker():
    return Tracker(Sender(patience=120.0))


@pytest.fixture
def hook(tracker):
    """The hooks of a manager whose only observer is a fresh tracker."""
    pm = plugins.create_manager(entry_points=False)
    pm.register(tracker)
    pm.check_pending()
    return pm.hook


def client_of(directory):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db")


def runs_in(directory, experiment="digits", client=None):
    client = client or client_of(directory)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_name: run for run in found}


def one_run(hook, recipe, report=REPORT, epochs=2):
    hook.bonn_qat_before_run(recipe=recipe, model=None, run_id="")
    for epoch in range(1, epochs + 1):
        hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics={"train/loss": 1 / epoch, "scale/a.b": 0.5})
    hook.bonn_qat_after_run(recipe=recipe, result=report)


def page_in(directory):
    page = directory / "report.html"
    page.write_text("<p>done</p>")
    return page


def test_a_comparison_is_a_parent_run_with_a_child_per_recipe(hook, directory):
    recipes = [FakeRecipe(), FakeRecipe("xnor", 1)]
    hook.bonn_qat_before_comparison(directory=directory, recipes=recipes)
    for recipe in recipes:
        one_run(hook, recipe)
    hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))

    client, runs = client_of(directory), runs_in(directory)
    assert set(runs) == {"digits", "bonn-seed0", "xnor-seed1"}
    parent, child = runs["digits"], runs["xnor-seed1"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    tags = {key: child.data.tags[key] for key in ("scheme", "seed", "backbone", "data", "commit", "environment.torch")}
    assert tags == {"scheme": "xnor", "seed": "1", "backbone": "wrn10", "data": "digits", "commit": "abc",
                    "environment.torch": "2"}  # fmt: skip
    assert child.data.params["skip"] == "stem, *.conv1"
    assert child.data.params["stages.0.regularizers.kernel"] == "0.0001"
    assert child.data.metrics["size/mbit"] == 0.5
    history = client.get_metric_history(child.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    logged = directory / "mlartifacts" / child.info.run_id / "artifacts" / "xnor-seed1.json"
    assert json.loads(logged.read_text()) == REPORT
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["report.html"]


def test_a_comparison_that_goes_on_stays_one_parent_run(hook, tracker, directory):
    for recipe in (FakeRecipe(), FakeRecipe(seed=1)):
        hook.bonn_qat_before_comparison(directory=directory, recipes=[recipe])
        tracker.flush()
        assert runs_in(directory)["digits"].info.status == "RUNNING"
        one_run(hook, recipe)
        hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))
    assert set(runs_in(directory)) == {"digits", "bonn-seed0", "bonn-seed1"}
    assert len(client_of(directory).search_runs([runs_in(directory)["digits"].info.experiment_id])) == 3


def test_a_run_without_a_report_has_failed_and_so_has_its_comparison(hook, directory):
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    one_run(hook, FakeRecipe(), report=None)
    one_run(hook, FakeRecipe(seed=1))
    hook.bonn_qat_after_comparison(directory=directory, page=directory / "none.html")
    status = {name: run.info.status for name, run in runs_in(directory).items()}
    assert status == {"digits": "FAILED", "bonn-seed0": "FAILED", "bonn-seed1": "FINISHED"}


def test_a_comparison_within_another_is_a_child_in_the_others_store(hook, tracker, directory):
    parts = [directory / "small", directory / "small" / "search" / "lr0.1"]
    for _ in range(2):  # the second time the study goes on
        hook.bonn_qat_before_comparison(directory=directory, recipes=[])
        for part in parts:
            part.mkdir(parents=True, exist_ok=True)
            hook.bonn_qat_before_comparison(directory=part, recipes=[FakeRecipe()])
            tracker.flush()
            assert client_of(directory).get_run(runs_in(directory)["digits"].info.run_id).info.status == "RUNNING"
        one_run(hook, FakeRecipe())
        for part in reversed(parts):
            hook.bonn_qat_after_comparison(directory=part, page=page_in(part))
        one_run(hook, FakeRecipe("xnor"))
        hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))

    client, runs = client_of(directory), runs_in(directory)
    above = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    by_name = {name: run.info.run_id for name, run in runs.items()}
    assert above == {
        "digits": None,
        "small": by_name["digits"],
        "search/lr0.1": by_name["small"],
        "bonn-seed0": by_name["search/lr0.1"],
        "xnor-seed0": by_name["digits"],
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(client.search_runs([runs["digits"].info.experiment_id])) == 3 + 2 * 2
    assert [item.path for item in client.list_artifacts(by_name["small"])] == ["report.html"]
    assert [path.relative_to(directory).as_posix() for path in directory.rglob("mlflow.db")] == ["mlflow.db"]


def test_a_study_fails_with_one_of_its_comparisons(hook, directory):
    inner = directory / "wide"
    inner.mkdir()
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    hook.bonn_qat_before_comparison(directory=inner, recipes=[])
    one_run(hook, FakeRecipe(), report=None)
    hook.bonn_qat_after_comparison(directory=inner, page=page_in(inner))
    hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))
    status = {name: run.info.status for name, run in runs_in(directory).items()}
    assert status == {"digits": "FAILED", "wide": "FAILED", "bonn-seed0": "FAILED"}


def test_a_comparison_of_whose_end_nobody_told_has_failed_and_takes_no_more_runs(hook, directory):
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    hook.bonn_qat_before_comparison(directory=directory / "wide", recipes=[])
    hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))
    assert {name: run.info.status for name, run in runs_in(directory).items()} == {"digits": "FAILED", "wide": "FAILED"}
    one_run(hook, FakeRecipe())
    assert "mlflow.parentRunId" not in runs_in(directory, "bonn-qat")["bonn-seed0"].data.tags


def test_runs_that_are_open_at_once_are_kept_apart(hook, directory):
    first, second = FakeRecipe(), FakeRecipe("xnor")
    hook.bonn_qat_before_comparison(directory=directory, recipes=[first, second])
    for recipe in (first, second):
        hook.bonn_qat_before_run(recipe=recipe, model=None, run_id="")
    for epoch in (1, 2):
        for recipe, loss in ((second, 0.5), (first, 0.25)):
            hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics={"train/loss": loss / epoch})
    hook.bonn_qat_after_run(recipe=second, result=None)
    hook.bonn_qat_after_run(recipe=first, result=REPORT)
    hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))
    client, runs = client_of(directory), runs_in(directory)
    losses = {name: [metric.value for metric in client.get_metric_history(runs[name].info.run_id, "train/loss")]
              for name in ("bonn-seed0", "xnor-seed0")}  # fmt: skip
    assert losses == {"bonn-seed0": [0.25, 0.125], "xnor-seed0": [0.5, 0.25]}
    status = {name: run.info.status for name, run in runs.items()}
    assert status == {"digits": "FAILED", "bonn-seed0": "FINISHED", "xnor-seed0": "FAILED"}


def test_an_interrupted_run_is_killed(hook, directory):
    recipe = FakeRecipe()

    def interrupted():
        try:
            hook.bonn_qat_before_comparison(directory=directory, recipes=[recipe])
            hook.bonn_qat_before_run(recipe=recipe, model=None, run_id="")
            raise KeyboardInterrupt
        finally:
            hook.bonn_qat_after_run(recipe=recipe, result=None)
            hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {run.info.status for run in runs_in(directory).values()} == {"KILLED"}


def test_a_run_outside_a_comparison_goes_to_mlflows_own_default(hook, directory):
    one_run(hook, FakeRecipe())
    run = runs_in(directory, "bonn-qat")["bonn-seed0"]
    assert run.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run.data.tags


def test_a_tracking_uri_that_is_set_is_honoured(hook, directory, tmp_path, monkeypatch):
    (directory / "mlflow.db").rename(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    one_run(hook, FakeRecipe())
    hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))
    assert set(runs_in(tmp_path, "mine")) == {"digits", "bonn-seed0"}
    assert not (directory / "mlflow.db").exists()


def test_the_programs_own_run_becomes_the_parent_and_stays_active(hook, directory):
    import mlflow

    experiment = client_of(directory).create_experiment("mine")
    with mlflow.start_run(experiment_id=experiment) as mine:
        one_run(hook, FakeRecipe())
        assert mlflow.active_run().info.run_id == mine.info.run_id
    assert runs_in(directory, "mine")["bonn-seed0"].data.tags["mlflow.parentRunId"] == mine.info.run_id


def test_a_store_out_of_reach_warns_once_and_the_training_goes_on(hook, directory, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at/all")
    with pytest.warns(RuntimeWarning, match="nowhere.*the training goes on.*mlflow-unsent.jsonl") as caught:
        two_comparisons(hook, directory)
    assert len(caught) == 1
    content = unsent.check(directory / unsent.NAME)
    assert len(content.runs) == 3
    assert content.stores == {"nowhere://at/all"}


def two_comparisons(hook, directory):
    for recipe in (FakeRecipe(), FakeRecipe(seed=1)):
        hook.bonn_qat_before_comparison(directory=directory, recipes=[])
        one_run(hook, recipe)
        hook.bonn_qat_after_comparison(directory=directory, page=page_in(directory))
    one_run(hook, FakeRecipe())


def told_and_flushed(hook, tracker, recipe, metrics):
    hook.bonn_qat_after_epoch(recipe=recipe, epoch=1, metrics=metrics)
    tracker.flush()


def test_what_the_store_refuses_costs_only_itself(hook, tracker, directory):
    recipe = FakeRecipe()
    hook.bonn_qat_before_run(recipe=recipe, model=None, run_id="")
    tracker.flush()
    with pytest.warns(RuntimeWarning, match="ValueError"):
        told_and_flushed(hook, tracker, recipe, {"train/loss": "much"})
    hook.bonn_qat_after_epoch(recipe=recipe, epoch=2, metrics={"train/loss": float("nan"), "scale/a[0]": 1.0})
    hook.bonn_qat_after_run(recipe=recipe, result=REPORT)
    run = runs_in(directory, "bonn-qat")["bonn-seed0"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["scale/a_0_"] == 1.0
    assert not (directory / unsent.NAME).exists()


def test_artifacts_that_cannot_be_stored_cost_themselves_alone(hook, directory, monkeypatch):
    from mlflow import MlflowClient

    def no_credentials(self, *arguments):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(MlflowClient, "log_dict", no_credentials)
    monkeypatch.setattr(MlflowClient, "log_artifact", no_credentials)
    with pytest.warns(RuntimeWarning, match="no credentials") as caught:
        two_comparisons(hook, directory)
    assert len(caught) == 1
    assert {run.info.status for run in runs_in(directory).values()} == {"FINISHED"}
    assert not (directory / unsent.NAME).exists()


def test_long_recipes_and_many_layers_are_logged_in_batches(hook, directory):
    recipe = FakeRecipe(content={"options": {f"o{i}": i for i in range(230)}})
    hook.bonn_qat_before_run(recipe=recipe, model=None, run_id="")
    hook.bonn_qat_after_epoch(recipe=recipe, epoch=1, metrics={f"scale/l{i}": i / 7 for i in range(1100)})
    hook.bonn_qat_after_run(recipe=recipe, result=REPORT)
    data = runs_in(directory, "bonn-qat")["bonn-seed0"].data
    assert data.params["options.o229"] == "229"
    assert data.metrics["scale/l1099"] == 1099 / 7


def test_flatten_joins_lists_leaves_out_what_is_empty_and_mends_names():
    content = {"skip": ("a", "b"), "none": [], "empty": {}, "stages": [{"share": 1.0}], "a": {"b*": True}}
    assert flatten(content) == {"skip": "a, b", "stages.0.share": "1.0", "a.b_": "True"}


def test_the_tracker_is_found_by_its_entry_point(monkeypatch):
    monkeypatch.setenv("BONN_QAT_PLUGINS", "mlflow")
    pm = plugins.create_manager()
    assert isinstance(pm.get_plugin("mlflow"), Tracker)


def test_neither_loading_the_plugin_nor_its_hooks_load_mlflow(monkeypatch):
    """The thread does, and here it has a store of its own."""
    monkeypatch.setenv("BONN_QAT_PLUGINS", "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    code = """
import pathlib, sys
from types import SimpleNamespace
from bonn_qat import plugins
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.tracker import Tracker
print(*plugins.manager().hook.bonn_qat_describe(directory=pathlib.Path("/results")))
tracker = Tracker(Sender(lambda *place: SimpleNamespace(take=lambda event: print(type(event).__name__))))
recipe = SimpleNamespace(name="a", to_dict=dict)
tracker.bonn_qat_before_run(recipe, "")
tracker.bonn_qat_after_epoch(recipe, 1, {})
tracker.bonn_qat_after_run(recipe, None)
sys.exit("mlflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "MLflow: sqlite:////results/mlflow.db, experiment mine", "RunBegan", "EpochEnded", "RunEnded",
    ]  # fmt: skip


def test_the_line_names_store_and_experiment_and_hides_what_is_secret(hook, directory, monkeypatch):
    import mlflow

    assert hook.bonn_qat_describe(directory=directory) == [
        f"MLflow: sqlite:///{directory}/mlflow.db, experiment digits"
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p@ss:w@server:5000/x")
    assert hook.bonn_qat_describe(directory=directory) == ["MLflow: https://me:***@server:5000/x, experiment digits"]
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://other")
    assert hook.bonn_qat_describe(directory=directory) == ["MLflow: http://other, experiment digits"]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////a:b/c@d.db", "sqlite:////a:b/c@d.db"),
        ("postgresql://user:p/w@host/runs", "postgresql://user:***@host/runs"),
        ("postgresql://user@host/runs", "postgresql://user@host/runs"),
        ("https://token@host", "https://***@host"),
        ("mysql://host/runs?user=u&password=p#x", "mysql://host/runs?user=u&password=***#x"),
        ("failed at http://u:p@h/api and http://h/api", "failed at http://u:***@h/api and http://h/api"),
    ],
)
def test_what_may_be_a_secret_is_masked(uri, shown):
    assert masked(uri) == shown


def test_the_line_can_be_sent_to_the_processes_of_a_comparison():
    sent = pickle.loads(pickle.dumps(TRACKER.bonn_qat_describe))
    assert sent is Tracker.bonn_qat_describe


def test_making_a_store_says_nothing_and_makes_nothing_else(new_store):
    path, said = new_store
    assert said == ""
    assert [file.name for file in path.iterdir()] == ["mlflow.db"]

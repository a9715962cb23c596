"""What the store holds after the timeline's calls, by a real database."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bonn_qat_mlflow.flat import flatten
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.tracker import Tracker
from bonn_qat_mlflow.where import masked

from bonn_qat import plugins

# MLflow's own models, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def hook():
    """The hooks of a manager whose only observer is a fresh tracker."""
    pm = plugins.create_manager(entry_points=False)
    pm.register(Tracker(Sender(patience=600.0, short=600.0)))
    pm.check_pending()
    return pm.hook


@pytest.fixture
def rehearsal(hook, rehearsed):
    return rehearsed.Rehearsal(hook)


def client_of(directory):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db")


def runs_in(directory, experiment="digits"):
    client = client_of(directory)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_name: run for run in found}


def test_a_comparison_is_a_parent_run_with_a_child_per_recipe(rehearsal, directory, rehearsed):
    one, two = rehearsed.recipe(), rehearsed.recipe(1)
    rehearsal.whole(directory, one, two)
    client, runs = client_of(directory), runs_in(directory)
    assert set(runs) == {"digits", one.name, two.name}
    parent, child = runs["digits"], runs[two.name]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    expected = {
        "mlflow.parentRunId": parent.info.run_id, "scheme": "bonn", "seed": "1", "backbone": one.model,
        "data": "digits", "environment.torch": "2", "mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "abc", "mlflow.source.git.dirty": "True",
    }  # fmt: skip
    assert child.data.tags.items() >= expected.items()
    assert child.data.tags["mlflow.user"]
    assert child.data.params["skip"] == "stem, *.conv1"
    assert child.data.metrics["mbit"] == 0.5
    (data,) = child.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("digits", "train")
    history = client.get_metric_history(child.info.run_id, "train/loss")
    times = [(metric.step, metric.value, metric.timestamp) for metric in history]
    assert times == [(1, 1.0, 1_700_000_010_000), (2, 0.5, 1_700_000_020_000)]
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["report.html"]
    assert {item.path for item in client.list_artifacts(child.info.run_id)} == {
        f"{two.name}.json", f"{two.name}.safetensors",
    }  # fmt: skip


def test_a_new_experiment_is_one_of_model_training_and_shows_accuracy_first(rehearsal, directory, rehearsed):
    client = client_of(directory)
    rehearsal.whole(directory, rehearsed.recipe())
    tags = client.get_experiment_by_name("digits").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == "test/top1"
    run = client.search_runs(["1"], "params.scheme != ''")[0]
    columns = json.loads(tags["mlflow.sharedViewState.bonn_qat"])["selectedColumns"]
    assert columns == ["metrics.`test/top1`", "params.`scheme`"]
    assert "test/top1" in run.data.metrics
    assert "scheme" in run.data.params


def test_an_experiment_of_the_users_stays_what_it_is(rehearsal, directory, rehearsed):
    client = client_of(directory)
    client.create_experiment("digits", tags={"mlflow.experimentKind": "genai_development"})
    rehearsal.whole(directory, rehearsed.recipe())
    assert client.get_experiment_by_name("digits").tags["mlflow.experimentKind"] == "genai_development"


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_metrics_of_layers_are_logged_if_asked(value, rehearsal, directory, rehearsed, monkeypatch):
    if value is not None:
        monkeypatch.setenv("BONN_QAT_MLFLOW_LAYERS", value)
    rehearsal.whole(directory, rehearsed.recipe())
    logged = set(runs_in(directory)["bonn-scheme-seed0"].data.metrics)
    assert logged & {"scale/a.b", "flips/a.b"} == ({"scale/a.b", "flips/a.b"} if value == "1" else set())
    assert logged >= {"test/top1", "train/loss", "lr", "flips"}


def test_a_comparison_that_goes_on_stays_one_parent_run(rehearsal, directory, rehearsed):
    for seed in (0, 1):
        rehearsal.whole(directory, rehearsed.recipe(seed))
    assert len(rehearsed.rows(directory, "SELECT 1 FROM runs")) == 3
    assert rehearsed.stored(directory)["runs"][-1] == ("digits", "FINISHED")


def test_a_run_without_a_result_has_failed_and_so_have_its_comparison_and_its_study(rehearsal, directory, rehearsed):
    one, two, inner = rehearsed.recipe(), rehearsed.recipe(1), directory / "wide"
    with rehearsal.comparison(directory), rehearsal.comparison(inner, one, two):
        rehearsal.run(one, inner, failure="the loss is NaN")
        rehearsal.run(two, inner)
    found = rehearsed.stored(directory)
    assert found["runs"] == [(one.name, "FAILED"), (two.name, "FINISHED"), ("digits", "FAILED"), ("wide", "FAILED")]
    assert [found["tags"][name].get("mlflow.parentRunId") for name in (one.name, "wide")] == ["wide", "digits"]
    assert not list(inner.glob("mlflow.db"))


def test_a_comparison_with_runs_in_another_process_is_running(rehearsal, directory, rehearsed):
    one, two = rehearsed.recipe(), rehearsed.recipe(1)
    with rehearsal.comparison(directory, one, two):
        rehearsal.run(one, directory)
    assert rehearsed.stored(directory)["runs"] == [(one.name, "FINISHED"), ("digits", "RUNNING")]
    rehearsal.run(two, directory)  # outside a comparison for this one
    rehearsal.whole(directory, one, two)
    assert rehearsed.stored(directory)["runs"][-1] == ("digits", "FINISHED")


def test_a_run_outside_a_comparison_goes_to_mlflows_own_default(rehearsal, directory, rehearsed):
    rehearsal.run(rehearsed.recipe())
    run = runs_in(directory, "bonn-qat")["bonn-scheme-seed0"]
    assert run.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run.data.tags
    rehearsed.Rehearsal().run(rehearsed.recipe(), directory / "written")
    (logged,) = (directory / "mlruns").rglob("bonn-scheme-seed0.json")
    path = directory / "written" / "runs" / "bonn-scheme-seed0.json"
    assert logged.read_bytes() == path.read_bytes()


def test_an_earlier_job_never_sees_what_the_run_became(rehearsed, directory):
    """The sender's thread may be at an epoch's job when the run ends: a run called complete would lose its files."""
    jobs, logged = [], []
    store = SimpleNamespace(log_run=lambda run: logged.append((run.status, run.result is not None, len(run.epochs))))
    sender = SimpleNamespace(put=lambda _place, _key, job: jobs.append(job), wait=lambda *_args, **_options: None)
    pm = plugins.create_manager(entry_points=False)
    pm.register(Tracker(sender))
    rehearsed.Rehearsal(pm.hook).run(rehearsed.recipe())
    for job in jobs:
        job(store)
    assert logged == [("RUNNING", False, 0), ("RUNNING", False, 1), ("RUNNING", False, 2), ("FINISHED", True, 2)]


def test_a_tracking_uri_that_is_set_is_honoured(rehearsal, directory, tmp_path, monkeypatch, rehearsed):
    (directory / "mlflow.db").rename(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    rehearsal.whole(directory, rehearsed.recipe())
    assert set(runs_in(tmp_path, "mine")) == {"digits", "bonn-scheme-seed0"}
    assert not (directory / "mlflow.db").exists()


def test_the_programs_own_run_becomes_the_parent_and_stays_active(rehearsal, directory, rehearsed):
    import mlflow

    experiment = client_of(directory).create_experiment("mine")
    with mlflow.start_run(experiment_id=experiment) as mine:
        rehearsal.run(rehearsed.recipe())
        assert mlflow.active_run().info.run_id == mine.info.run_id
    assert runs_in(directory, "mine")["bonn-scheme-seed0"].data.tags["mlflow.parentRunId"] == mine.info.run_id


def test_a_metric_that_is_no_number_costs_its_epoch_alone(hook, directory, rehearsed):
    one = rehearsed.recipe()
    hook.bonn_qat_before_run(recipe=one, model=None, run_id="")
    with pytest.warns(RuntimeWarning, match="ValueError"):
        hook.bonn_qat_after_epoch(recipe=one, epoch=1, metrics={"train/loss": "much"}, time=1.0)
    hook.bonn_qat_after_epoch(recipe=one, epoch=2, metrics={"train/loss": float("inf"), "train/a[0]": 1.0}, time=1.0)
    hook.bonn_qat_after_run(recipe=one, result=None)
    run = runs_in(directory, "bonn-qat")[one.name]
    assert run.info.status == "FAILED"
    assert run.data.metrics["train/a_0_"] == 1.0


def test_artifacts_that_cannot_be_stored_cost_themselves_alone_until_sync(rehearsal, directory, monkeypatch, rehearsed):
    from bonn_qat_mlflow.__main__ import main
    from mlflow import MlflowClient

    def no_credentials(self, *arguments):
        raise RuntimeError("no credentials")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", no_credentials)
        with pytest.warns(RuntimeWarning, match="no credentials") as caught:
            rehearsal.whole(directory, rehearsed.recipe())
    assert len(caught) == 1
    found = rehearsed.stored(directory)
    assert {status for _, status in found["runs"]} == {"FINISHED"}
    assert not found["artifacts"]
    assert main(["sync", str(directory)]) == 0
    assert len(rehearsed.stored(directory)["artifacts"]) == 3


def test_what_the_store_refuses_costs_only_itself(rehearsal, directory, monkeypatch, rehearsed):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    one = rehearsed.recipe(model_options={"x": "x" * 7000})
    with pytest.warns(RuntimeWarning, match="refused") as caught:
        rehearsal.whole(directory, one)
    assert len([warning for warning in caught if warning.category is RuntimeWarning]) == 1
    run = runs_in(directory)[one.name]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["epoch"] == 2


def test_long_recipes_and_many_layers_are_logged_completely(hook, directory, rehearsed, monkeypatch):
    monkeypatch.setenv("BONN_QAT_MLFLOW_LAYERS", "1")
    one = rehearsed.recipe(model_options={f"o{i}": i for i in range(230)})
    hook.bonn_qat_before_run(recipe=one, model=None, run_id="")
    hook.bonn_qat_after_epoch(recipe=one, epoch=1, metrics={f"scale/l{i}": i / 7 for i in range(1100)}, time=1.0)
    hook.bonn_qat_after_run(recipe=one, result=None)
    data = runs_in(directory, "bonn-qat")[one.name].data
    assert data.params["model_options.o229"] == "229"
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
tracker = Tracker(Sender(lambda place: SimpleNamespace(log_run=lambda run: print(run.status, len(run.epochs)))))
recipe = SimpleNamespace(name="a", to_dict=dict)
tracker.bonn_qat_before_run(recipe, "")
tracker.bonn_qat_after_epoch(recipe, 1, {}, 1.0)
tracker.bonn_qat_after_run(recipe, None)
sys.exit("mlflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    described, *_, last = done.stdout.splitlines()
    assert described == "MLflow: sqlite:////results/mlflow.db, experiment mine"
    assert last == "FAILED 1"


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


def test_making_a_store_says_nothing_and_makes_nothing_else(new_store):
    path, said = new_store
    assert said == ""
    assert sorted(file.name for file in path.iterdir()) == [".mlflow.lock", "mlflow.db"]

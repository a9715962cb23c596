"""Search for BONN's learning rate, lambda and theta with Optuna; each trial is a run in MLflow.

    pip install -e '.[compare,search]' -e plugins/bonn-qat-mlflow
    python examples/search_optuna.py --trials 12 --storage sqlite:///search.db

Trials are judged by images held out of the training set; only the best one sees the test set, at the end. With
--storage, running the same command again continues the search, and several processes share it. In MLflow the trials are
child runs of one run: mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace

import mlflow
import optuna
import pluggy

from bonn_qat import Recipe, hookimpl, load_data, plugins, train
from bonn_qat.errors import TrainingDiverged
from bonn_qat.training.network import build

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trials", type=int, default=12)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--storage", help="an Optuna database, such as sqlite:///search.db")
arguments = parser.parse_args()


class Reporter:
    """Reports the accuracy of each epoch to Optuna, and stops a run that Optuna prunes."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    @hookimpl(trylast=True)  # MLflow logs the epoch first
    def bonn_qat_after_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """``test/top1`` is measured on the held-out images here."""
        self.trial.report(metrics["test/top1"], epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def accuracy(recipe: Recipe, pm: pluggy.PluginManager) -> float:
    """Train by the recipe; the accuracy in percent."""
    digits = load_data(recipe.data, validation_images=recipe.validation_images)
    return train(build(recipe, digits, pm), recipe, digits, pm=pm).top1


def suggested(trial: optuna.trial.BaseTrial) -> Recipe:
    """The recipe with the values that Optuna suggests."""
    losses = {
        "kernel": trial.suggest_float("lambda", 1e-6, 1e-2, log=True),
        "feature": trial.suggest_float("theta", 1e-5, 1e-1, log=True),
    }
    lr = trial.suggest_float("lr", 1e-2, 1.0, log=True)
    return replace(Recipe.default("digits"), epochs=arguments.epochs, seed=arguments.seed, lr=lr, scheme_options=losses)


def objective(trial: optuna.Trial) -> float:
    """Accuracy on 300 held-out images; a run that diverges counts as pruned."""
    pm = plugins.create_manager()
    pm.register(Reporter(trial))
    try:
        return accuracy(replace(suggested(trial), validation_images=300), pm)
    except TrainingDiverged as error:
        raise optuna.TrialPruned from error


study = optuna.create_study(
    storage=arguments.storage, study_name="bonn", load_if_exists=True, direction="maximize",
    sampler=optuna.samplers.TPESampler(seed=arguments.seed), pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
)  # fmt: skip
with mlflow.start_run(run_name="search"):
    study.optimize(objective, n_trials=arguments.trials)
    mlflow.log_params(study.best_params)
    final = accuracy(suggested(study.best_trial), plugins.manager())
print(f"accuracy: {final:.2f} % of 359 test images, with {study.best_params}")

"""Search learning rate, lambda and theta of BONN with Optuna, each trial a run in MLflow.

    pip install -e '.[compare,search]' -e plugins/bonn-qat-mlflow
    python examples/search_optuna.py --trials 12 --storage sqlite:///search.db

The search sees images that are held out of the training set; the test set is for the best trial, at the end. With a
storage the same command goes on with the search, and several at once share it. In MLflow's store the trials are
children of one run: mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace

import mlflow
import optuna
import pluggy

from bonn_qat import hookimpl, plugins
from bonn_qat.errors import TrainingDiverged
from bonn_qat.training import data
from bonn_qat.training.network import build
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trials", type=int, default=12)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--storage", help="a database of Optuna's, such as sqlite:///search.db")
arguments = parser.parse_args()


class Reporter:
    """Tells Optuna the accuracy of each epoch, and ends a run that is not worth going on."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    @hookimpl(trylast=True)  # MLflow logs the epoch first
    def bonn_qat_after_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """In the test set's place are the images that were held out."""
        self.trial.report(metrics["test/top1"], epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def accuracy(recipe: Recipe, pm: pluggy.PluginManager) -> float:
    """What training by the recipe gives, in percent."""
    digits = data.load(recipe.data, validation_images=recipe.validation_images)
    return train(build(recipe, digits, pm), recipe, digits, pm=pm).top1


def suggested(trial: optuna.trial.BaseTrial) -> Recipe:
    """The recipe of a trial."""
    losses = {
        "kernel": trial.suggest_float("lambda", 1e-6, 1e-2, log=True),
        "feature": trial.suggest_float("theta", 1e-5, 1e-1, log=True),
    }
    lr = trial.suggest_float("lr", 1e-2, 1.0, log=True)
    return replace(Recipe.default("digits"), epochs=arguments.epochs, seed=arguments.seed, lr=lr, scheme_options=losses)


def objective(trial: optuna.Trial) -> float:
    """Accuracy on 300 held-out images; a run that diverges counts as one that was ended."""
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

"""MLflow: a server or a database, as `MLFLOW_TRACKING_URI` says."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

# MLflow reports its use to its makers, from its import on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from lorica.tracking.base import PROJECT, TrackedRun

TAG = "lorica.run"


class MLflow:
    """One MLflow run for each run of Lorica; `MLFLOW_EXPERIMENT_NAME` names an experiment."""

    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if known is None else known.experiment_id
        found = self._client.search_runs([place], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(place, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)) for key, value in run.settings.items()]
        self._client.log_batch(self._run, params=parameters, tags=[RunTag(TAG, run.id)])

    def log(self, metrics: Mapping[str, float], round_number: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, value, now, round_number) for name, value in metrics.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")

"""TensorBoard: event files in the folder `tensorboard` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from lorica.tracking.base import TrackedRun


class TensorBoard:
    """Show them with `tensorboard --logdir runs`."""

    def __init__(self, run: TrackedRun) -> None:
        # A killed process may have written a round that the run now repeats: TensorBoard then drops it.
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.finished + 1)
        if run.finished == -1:
            table = "".join(f"| {key} | {value} |\n" for key, value in run.settings.items())
            self._writer.add_text("configuration", f"| key | value |\n|---|---|\n{table}")

    def log(self, metrics: Mapping[str, float], round_number: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()

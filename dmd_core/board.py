"""The curves of a run for TensorBoard."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .drive import Progress

if TYPE_CHECKING:
    from .headless import Job


class board:
    """TensorBoard event files in the run folder, where tensorboard is installed; nothing otherwise."""

    def __init__(self, job: "Job"):
        self.job = job
        self.writer: Any = None

    def __enter__(self) -> Callable[[Progress], None]:
        if self.job.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return lambda progress: None
            self.writer = SummaryWriter(str(self.job.run.path / "tensorboard"))
        return self.write

    def write(self, progress: Progress) -> None:
        if self.writer is not None:
            values: Mapping[str, float] = progress.report.losses | {
                f"norm/{k}": v for k, v in progress.report.norms.items()
            }
            for name, value in values.items():
                self.writer.add_scalar(name, value, progress.step)

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()

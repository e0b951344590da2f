"""What a run folder holds: curves, contact sheet, figures; any snapshot can be taken, old ones deleted."""

import shutil
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..dmd_core.drive import best_snapshot, describe
from ..dmd_core.runs import Run, delete_run, runs, step_of
from ..dmd_core.snapshots import read_measures
from .students import BEST, Student, curves_of, find_run, find_snapshot, image_of, loss_map, mark_of, root, sheet_of

NONE = "no run yet"
SHOW, DROP, THIN, DELETE = "show", "delete this snapshot", "keep the newest state alone", "delete the whole run"


def report(run: Run) -> str:
    """The run's own report, and a line per snapshot."""
    path = run.path / "report.txt"
    lines = [path.read_text(encoding="utf-8").rstrip()] if path.is_file() else [f"Run {run.name}: no report yet."]
    chosen = best_snapshot(run)
    for snapshot in run.snapshots():
        measures = read_measures(snapshot)
        mark = " <- best" if snapshot == chosen else ""
        lines.append(f"  {step_of(snapshot)}: {describe(measures) if measures else 'not judged'}{mark}")
    size = sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file())
    return "\n".join([*lines, f"{run.path}: {size / 2**20:.1f} MB"])


def change(run: Run, action: str, snapshot: str) -> None:
    """Deletes what the action says; a run that somebody trains right now is refused."""
    with run.locked():
        if action == DROP:
            shutil.rmtree(find_snapshot(run, snapshot))
        elif action == THIN:
            for path in run.states()[1:]:
                path.unlink()


class InspectRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_InspectRun",
            display_name="Inspect Run",
            category="DMD/train",
            description="Shows a training run: curves, contact sheet, figures of every snapshot. Gives any snapshot as "
            "LORA_MODEL. Deletes what is not wanted any more.",
            search_aliases=["training curves", "snapshots", "contact sheet", "run folder", "delete run", "dmd"],
            inputs=[
                io.Combo.Input("run", options=[*runs(root()), NONE], tooltip="A folder in output/dmd."),
                io.String.Input("snapshot", default=BEST, tooltip="best, last, or the update of a snapshot."),
                io.Combo.Input(
                    "action",
                    options=[SHOW, DROP, THIN, DELETE],
                    default=SHOW,
                    tooltip="Deleting cannot be undone. Set it back to show afterwards.",
                ),
                io.String.Input(
                    "run_name",
                    optional=True,
                    force_input=True,
                    tooltip="In place of the choice: the output run of a training, so that it is shown when it ends.",
                ),
            ],
            outputs=[
                io.Image.Output("curves", display_name="curves", tooltip="Every loss and measure over the updates."),
                io.Image.Output("sheet", display_name="sheet", tooltip="Teacher and student on the same prompts."),
                io.LoraModel.Output("lora", display_name="lora", tooltip="The snapshot, for Load LoRA Model."),
                io.LossMap.Output("loss", display_name="loss", tooltip="Every loss of the run, for Plot Loss Graph."),
                io.String.Output("report", display_name="report", tooltip="What happened, in plain words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, run: Any = None, run_name: Any = None, **_inputs: Any) -> str:
        return mark_of(run_name or run)

    @classmethod
    def execute(cls, run: str, snapshot: str = BEST, action: str = SHOW, run_name: str = "") -> io.NodeOutput:
        run = run_name or run
        folder = find_run(run)
        if action == DELETE:
            delete_run(root(), run)
            text = f"The run {run!r} is deleted."
            return io.NodeOutput(*[ExecutionBlocker(None)] * 4, text, ui=ui.PreviewText(text))
        change(folder, action, snapshot)
        text = report(folder)
        chosen = find_snapshot(folder, BEST if action == DROP else snapshot)
        curves, sheet = image_of(curves_of(folder)), image_of(sheet_of(folder, chosen))
        shown = {**ui.PreviewImage(sheet).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(curves, sheet, Student.at(folder, chosen).lora(), loss_map(folder), text, ui=shown)

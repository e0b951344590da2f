"""The run folder and the generator that drives a run: names, lock, states, cancelling, kills."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path, PureWindowsPath

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dmd_core import runs
from dmd_core.drive import DriveConfig, best_snapshot, drive
from dmd_core.runs import Run, Unwritable, check_name, delete_run, locate, open_run, step_of
from dmd_core.snapshots import Gallery, Measures, best, brightness, measure, read_measures, saturation
from dmd_core.train import NonFinite, Player, TrainConfig
from dmd_core.trainstate import TrainState

ROOT = Path(__file__).resolve().parents[1]


class Tug:
    """A critic that fits the data and a student that follows it, two updates to one."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.nets = {k: nn.Linear(3, 3) for k in ("critic", "student")}
        for p in (p for n in self.nets.values() for p in n.parameters()):
            p.data = torch.randn(p.shape, generator=g)
        self.players = {k: Player(dict(n.named_parameters()), 1e-2, ema=0.9) for k, n in self.nets.items()}
        self.calls, self.at, self.what = 0, None, None

    def turns(self, step):
        return ("critic", "critic", "student")

    def terms(self, player, batch, rng):
        self.calls += 1
        if self.calls == self.at:
            self.what()
        x = batch + 0.1 * torch.randn(batch.shape, generator=rng)
        target = self.nets["critic"](x).detach() if player == "student" else batch
        loss = (self.nets[player](x) - target).square().mean()
        return {"fit": loss * float("nan") if self.calls == self.at else loss}


def data():
    for i in count():
        yield torch.randn(4, 3, generator=torch.Generator().manual_seed(i))


CONFIG = TrainConfig(steps=12)
OFTEN = DriveConfig(save_every=3, save_minutes=0, snapshot_every=0, preview_every=0)


def go(objective, run, settings=OFTEN, config=CONFIG, until=None, **more):
    reports = []
    with_drive = drive(objective, data(), config, run, settings, **more)
    for progress in with_drive:
        reports.append(progress)
        if progress.step == until:
            with_drive.close()
            break
    return reports


def weights(objective):
    return {f"{k}.{n}": p.detach().clone() for k, pl in objective.players.items() for n, p in pl.params.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    whole = Tug()
    go(whole, Run(tmp_path_factory.mktemp("whole") / "run"))
    return weights(whole)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["..", ".", "", " a", "a ", "a.", ".hidden", "a/b", "a\\b", "/etc", "C:", "C:\\x", "c:x", "a:b", "a*", "a?"]
        + ['a"', "a<", "a|", "a\0", "a\n", "CON", "con.txt", "Nul", "COM1", "lpt9.x", "CONIN$", "x" * 81, "\\\\srv\\s"],
    )
    def test_names_that_are_no_single_safe_folder_are_refused(self, name, tmp_path):
        with pytest.raises(ValueError, match="run name"):
            locate(tmp_path, name)

    @pytest.mark.parametrize("name", ["a", "my run 1", "Übung_4-step", "v1.2", "console", "command"])
    def test_plain_names_are_one_part_of_a_windows_path_too(self, name, tmp_path):
        path = PureWindowsPath("D:/out") / check_name(name)
        assert (path.parent, path.name) == (PureWindowsPath("D:/out"), name)
        assert locate(tmp_path, name) == tmp_path / name

    def test_links_out_of_the_root_are_refused(self, tmp_path):
        (tmp_path / "root").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "root" / "sly").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="link"):
            open_run(tmp_path / "root", "sly")
        (tmp_path / "root" / "run").mkdir()
        (tmp_path / "root" / "run" / "states").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="link"):
            open_run(tmp_path / "root", "run")

    @pytest.mark.parametrize("inside", ["lock", "curves.jsonl", "run.json", ".report.txt.part", "states/newest"])
    def test_a_run_with_a_link_anywhere_inside_is_refused(self, inside, tmp_path):
        """A line of the curves, or a file written aside, would land in what the link names."""
        victim = tmp_path / "victim"
        victim.write_text("mine")
        link = tmp_path / "root" / "run" / inside
        link.parent.mkdir(parents=True)
        link.symlink_to(victim)
        with pytest.raises(ValueError, match="is a link"):
            open_run(tmp_path / "root", "run")
        assert victim.read_text() == "mine"
        link.unlink()
        assert open_run(tmp_path / "root", "run")  # control

    def test_auto_finds_the_run_again_and_new_counts_up(self, tmp_path):
        (tmp_path / "a").mkdir()
        assert open_run(tmp_path, "a").path == tmp_path / "a"
        assert open_run(tmp_path, "a", "new").path == tmp_path / "a_2"
        assert open_run(tmp_path, "b", "new").path == tmp_path / "b"
        with pytest.raises(ValueError, match="'auto'"):
            open_run(tmp_path, "a", "maybe")

    def test_only_a_run_that_nobody_uses_is_deleted(self, tmp_path):
        (tmp_path / "photos").mkdir()
        with pytest.raises(ValueError, match="holds no run"):
            delete_run(tmp_path, "photos")
        run = open_run(tmp_path, "a")
        go(Tug(), run, until=2)
        with run.locked(), pytest.raises(ValueError, match="in use"):
            delete_run(tmp_path, "a")
        assert runs.runs(tmp_path) == ["a"]
        delete_run(tmp_path, "a")
        assert not run.path.exists()
        assert (tmp_path / "photos").exists()


class TestLock:
    def test_a_second_run_in_one_folder_is_told_who_works_there(self, tmp_path):
        steps = drive(Tug(), data(), CONFIG, Run(tmp_path / "r"), OFTEN)
        next(steps)
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .* since"):
            go(Tug(), Run(tmp_path / "r"))
        steps.close()
        assert go(Tug(), Run(tmp_path / "r"))[-1].step == 12

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_the_lock_of_a_killed_process_is_no_obstacle(self, tmp_path):
        child = in_child(lambda: go_forever(tmp_path / "r"))
        wait_for(lambda: (tmp_path / "r" / "states").exists())
        with pytest.raises(ValueError, match="in use"), Run(tmp_path / "r").locked():
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert str(child) in (tmp_path / "r" / "lock").read_text()
        with Run(tmp_path / "r").locked():
            pass

    def test_one_run_object_may_enter_twice(self, tmp_path):
        run = Run(tmp_path / "r")
        with run.locked(), run.locked():
            pass
        with run.locked():
            pass


def in_child(work):
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def go_forever(path):
    while True:
        shutil.rmtree(path / "states", ignore_errors=True)
        go(Tug(), Run(path), config=TrainConfig(steps=400))


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestFolder:
    def test_it_holds_the_last_states_and_one_line_per_step(self, tmp_path):
        run = Run(tmp_path / "r")
        progress = go(Tug(), run, replace(OFTEN, keep=2))
        assert [step_of(p) for p in run.states()] == [12, 9]
        assert [r["step"] for r in run.history()] == list(range(1, 13))
        line = run.history()[-1]
        assert line["counters"] == {"critic": 24, "student": 12}
        assert set(line["losses"]) == {"critic/fit", "student/fit"}
        assert set(line["norms"]) == {"critic", "student"}
        assert line["seconds"] > 0
        assert [p.step for p in progress if p.saved] == [3, 6, 9, 12]
        text = (run.path / "report.txt").read_text()
        first = text.splitlines()[0]
        assert first.startswith("Run r: finished. 12 of 12 updates in 0.0 minutes. Best snapshot: update 12, the last")
        assert first.endswith("No alarms.")
        assert not list(run.path.rglob("*.part"))

    def test_order_comes_from_steps_not_from_clocks(self, tmp_path, monkeypatch):
        """A clock that goes back, and files whose dates say the opposite of their names."""
        run, clock = Run(tmp_path / "r"), count(2e9, -1000)
        for name in ("time", "monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: next(clock))
        go(Tug(), run, until=9)
        for path in run.states():
            os.utime(path, (2e9 - step_of(path), 2e9 - step_of(path)))
        whole = Tug()
        said = []
        go(whole, run, say=said.append)
        assert said == ["run 'r' goes on at step 9 of 12"]

    def test_a_run_with_all_its_steps_says_that_nothing_was_trained(self, tmp_path):
        run, said = Run(tmp_path / "r"), []
        go(Tug(), run)
        before = run.history()
        assert go(Tug(), run, say=said.append) == []
        assert said[0] == (
            "run 'r' has all its steps, 12 of 12: nothing was trained; give it more steps, or set resume to new"
        )
        assert run.history() == before

    def test_curves_of_a_resumed_run_have_each_step_once(self, tmp_path):
        run = Run(tmp_path / "r")
        go(Tug(), run, until=8)
        run.states()[0].unlink()  # the state of step 8: lines 7 and 8 are ahead now
        with open(run.path / "curves.jsonl", "a") as file:
            file.write('{"step": 9, "los')  # torn by a kill
        go(Tug(), run)
        assert [r["step"] for r in run.history()] == list(range(1, 13))
        assert len((run.path / "curves.jsonl").read_text().splitlines()) == 12

    @pytest.mark.parametrize("harm", ["truncated", "flipped", "swapped", "foreign", "pickle", "empty"])
    def test_a_bad_newest_state_is_refused_and_the_previous_one_used(self, tmp_path, harm, expected):
        run = Run(tmp_path / "r")
        go(Tug(), run, until=9)
        newest, previous = run.states()[:2]
        raw = bytearray(newest.read_bytes())
        if harm == "foreign":
            other = Run(tmp_path / "other")
            go(Tug(), other, until=9)
            raw = bytearray(other.states()[0].read_bytes())
        raw[-5] ^= harm == "flipped"
        made = {"truncated": raw[:-64], "swapped": previous.read_bytes(), "pickle": b"\x80\x04K\x01.", "empty": b""}
        newest.write_bytes(made.get(harm, raw))
        said, objective = [], Tug()
        go(objective, run, say=said.append)
        assert newest.name in said[0]
        assert "refused" in said[0]
        assert f"going on from {previous.name}" in said[1]
        assert same(weights(objective), expected)

    def test_no_usable_state_stops_instead_of_starting_over(self, tmp_path):
        run = Run(tmp_path / "r")
        go(Tug(), run, until=6)
        for path in run.states():
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"none of the 2 states .* Start a new run"):
            go(Tug(), run)
        run = Run(tmp_path / "q")
        go(Tug(), run, until=6)
        with pytest.raises(ValueError, match="other settings"):
            go(Tug(), run, config=TrainConfig(steps=12, clip=0.5))

    def test_more_steps_go_on(self, tmp_path):
        run = Run(tmp_path / "r")
        go(Tug(), run)
        assert go(Tug(), run) == []
        assert [p.step for p in go(Tug(), run, config=TrainConfig(steps=14))] == [13, 14]

    def test_damaged_settings_do_not_stop_a_run(self, tmp_path):
        run = Run(tmp_path / "r")
        go(Tug(), run, until=6)
        (run.path / "run.json").write_text("{")
        assert go(Tug(), run)[0].step == 7


class Cancelled(BaseException):
    """As a host raises it."""


class TestStopping:
    def test_closing_between_steps_saves_that_step(self, tmp_path, expected):
        run = Run(tmp_path / "r")
        go(Tug(), run, until=5)
        assert step_of(run.states()[0]) == 5
        assert "cancelled" in (run.path / "report.txt").read_text()
        objective = Tug()
        go(objective, run)
        assert same(weights(objective), expected)

    @pytest.mark.parametrize(("sharded", "kept"), [(False, 5), (True, 3)])
    def test_the_report_says_which_state_a_cancelled_run_has(self, tmp_path, monkeypatch, sharded, kept):
        class Shards(TrainState):
            def __init__(self, *given):
                super().__init__(*given)
                self.sharded = sharded

        monkeypatch.setattr("dmd_core.drive.TrainState", Shards)
        run = Run(tmp_path / "r")
        go(Tug(), run, replace(OFTEN, snapshot_every=2), until=5)
        assert step_of(run.states()[0]) == kept
        said = f"cancelled; the last good state, of step {kept}, is kept; start it again to go on. 5 of 12 updates"
        assert said in (run.path / "report.txt").read_text()

    @pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, RuntimeError])
    def test_an_exception_at_the_yield_saves_and_passes(self, tmp_path, error, expected):
        run = Run(tmp_path / "r")
        steps = drive(Tug(), data(), CONFIG, run, OFTEN)
        for _ in range(4):
            next(steps)
        with pytest.raises(error):
            steps.throw(error())
        assert step_of(run.states()[0]) == 4
        objective = Tug()
        go(objective, run)
        assert same(weights(objective), expected)

    def test_a_cancel_inside_a_step_before_its_first_update_is_exact(self, tmp_path, expected):
        run, objective = Run(tmp_path / "r"), Tug()

        def cancel():
            raise Cancelled

        objective.at, objective.what = 4 * 3 + 1, cancel
        with pytest.raises(Cancelled):
            go(objective, run)
        assert step_of(run.states()[0]) == 4
        objective = Tug()
        go(objective, run)
        assert same(weights(objective), expected)

    def test_a_cancel_between_the_updates_of_a_step_keeps_a_sound_state(self, tmp_path, expected):
        run, objective = Run(tmp_path / "r"), Tug()

        def cancel():
            raise Cancelled

        objective.at, objective.what = 4 * 3 + 2, cancel
        with pytest.raises(Cancelled):
            go(objective, run)
        assert [step_of(p) for p in run.states()] == [4, 3]
        assert runs.peek(run.states()[0])["whole"] is False
        assert go(Tug(), run)[-1].step == 12
        # where the last whole step is on disk already, that one is kept
        run, objective = Run(tmp_path / "q"), Tug()
        objective.at, objective.what = 3 * 3 + 2, cancel
        with pytest.raises(Cancelled):
            go(objective, run)
        objective = Tug()
        go(objective, run)
        assert same(weights(objective), expected)

    def test_a_nan_keeps_the_last_good_state_and_says_where(self, tmp_path):
        run, objective = Run(tmp_path / "r"), Tug()
        objective.at, objective.what = 4 * 3 + 3, lambda: None
        with pytest.raises(NonFinite, match=r"student/fit.* step 4.* of step 3, is kept"):
            go(objective, run)
        assert [step_of(p) for p in run.states()] == [3]
        assert "NaN" in (run.path / "report.txt").read_text()

    def test_out_of_memory_saves_and_names_three_things(self, tmp_path):
        run, objective = Run(tmp_path / "r"), Tug()

        def full():
            raise torch.OutOfMemoryError("CUDA out of memory")

        objective.at, objective.what = 4 * 3 + 1, full
        with pytest.raises(torch.OutOfMemoryError, match=r"step 4.*batch of 1.*checkpointing.*smaller picture"):
            go(objective, run)
        assert step_of(run.states()[0]) == 4

    def test_the_time_limit_hands_back_and_the_next_start_goes_on(self, tmp_path, expected):
        run = Run(tmp_path / "r")
        first = go(Tug(), run, replace(OFTEN, stop_minutes=1e-9))
        assert [p.step for p in first] == [1]
        assert "stopped after" in first[0].stop
        objective = Tug()
        assert go(objective, run)[0].step == 2
        assert same(weights(objective), expected)

    def test_saves_come_by_the_clock_too(self, tmp_path):
        assert all(p.saved for p in go(Tug(), Run(tmp_path / "r"), replace(OFTEN, save_every=99, save_minutes=1e-9)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestDisk:
    def result(self, child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def test_a_full_disk_is_said_and_loses_nothing(self, tmp_path, expected):
        run = Run(tmp_path / "r")
        go(Tug(), run, until=6)
        before = {p.name: p.read_bytes() for p in run.states()}

        def starve():
            limit = run.states()[0].stat().st_size - 200
            # small files still fit, a state does not
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                go(Tug(), run)
            except Unwritable as error:
                text = str(error)
                # whichever grows past the limit first: the length of the log's lines depends on the clock
                what = "step 9 was not saved" in text or "a line of curves.jsonl was not written" in text
                ok = what and "step 6" in text and "Free disk space" in text
                os._exit(0 if ok else 3)
            os._exit(4)

        assert self.result(in_child(starve)) == 0
        assert {p.name: p.read_bytes() for p in run.states()} == before
        assert not list(run.path.rglob("*.part"))
        objective = Tug()
        go(objective, run)
        assert same(weights(objective), expected)

    def test_a_read_only_folder_is_said(self):
        folder = Path(tempfile.mkdtemp())  # not below pytest's, which others may not enter
        try:
            run = Run(folder / "r")
            go(Tug(), run, until=3)
            before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)

            def locked_out():
                if os.getuid() == 0:
                    os.setuid(65534)  # root may write everywhere
                try:
                    go(Tug(), run)
                except Unwritable as error:
                    os._exit(0 if "make the folder writable" in str(error) and "step 3" in str(error) else 3)
                os._exit(4)

            assert self.result(in_child(locked_out)) == 0
            assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before
        finally:
            folder.chmod(0o755)
            for path in folder.rglob("*"):
                path.chmod(0o755)
            shutil.rmtree(folder)


# --- kills


def test_what_a_killed_run_left_beside_its_files_is_cleared_when_it_goes_on(tmp_path):
    run = Run(tmp_path / "r")
    go(Tug(), run, replace(OFTEN, snapshot_every=4, preview_every=4), until=9)
    newest = run.states()[0]
    kept = newest.read_bytes()
    pair = "pairs/.pairs_000001.safetensors.part/part"
    for name in (f"states/.{newest.name}.part/part", "snapshots/.step_00000012.part/sheet.png", pair):
        (run.path / name).parent.mkdir(parents=True)
        (run.path / name).touch()
    files = (".report.txt.part", "previews/.latest.png.part", "lora/.r_00001.safetensors.77.part")
    for name in (*files, "model/.r_00001.safetensors.77.part", "sliders/.01.safetensors.part"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    assert len(run.leftovers()) == 8
    run.cut(9)
    assert newest.read_bytes() == kept
    assert not list(run.path.rglob("*.part"))


# --- snapshots


def pictures(seed, n=16, dark=1.0, grey=0.0, alike=0.0):
    g = torch.Generator().manual_seed(seed)
    base = torch.rand(n, 3, 1, 1, generator=g) * 2 - 1
    images = (base + 0.1 * torch.randn(n, 3, 16, 16, generator=g)).clamp(-1, 1)
    images = images.lerp(images.mean(0, keepdim=True), alike).lerp(images.mean(1, keepdim=True), grey)
    return (images + 1) * dark - 1


def gallery(student):
    return Gallery([f"prompt {i}" for i in range(16)], student, lambda: pictures(0))


class TestSnapshots:
    def test_each_is_a_folder_with_student_sheet_and_figures(self, tmp_path):
        run, objective = Run(tmp_path / "r"), Tug()
        go(objective, run, replace(OFTEN, snapshot_every=4, keep_snapshots=2), gallery=gallery(lambda: pictures(0)))
        assert [step_of(p) for p in run.snapshots()] == [4, 8, 12]  # the two last and the best: of equals the first
        assert {p.name for p in run.snapshots()[0].iterdir()} == {"student.safetensors", "sheet.png", "measures.json"}
        assert step_of(best_snapshot(run)) == 4
        assert read_measures(run.snapshots()[0]).fidelity == pytest.approx(1.0)
        from safetensors.torch import load_file

        state = TrainState(Tug(), CONFIG)
        run.load(run.states()[0], state)
        assert same(load_file(run.snapshots()[-1] / "student.safetensors"), state.ema["student"])
        assert (run.path / "curves.png").stat().st_size > 0

    def test_pictures_are_drawn_with_the_average_and_training_does_not_notice(self, tmp_path, expected):
        seen, objective = [], Tug()

        def draw():
            seen.append(weights(objective)["student.weight"])
            return pictures(0)

        go(objective, Run(tmp_path / "r"), replace(OFTEN, snapshot_every=5), gallery=gallery(draw))
        assert same(weights(objective), expected)
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[-1], weights(objective)["student.weight"])

    def test_the_teacher_is_drawn_once_per_run(self, tmp_path):
        drawn = []

        def teacher():
            drawn.append(1)
            return pictures(0)

        own = replace(gallery(lambda: pictures(1)), teacher=teacher)
        run = Run(tmp_path / "r")
        go(Tug(), run, replace(OFTEN, snapshot_every=3), gallery=own, until=6)
        go(Tug(), run, replace(OFTEN, snapshot_every=3), gallery=own)
        assert len(drawn) == 1

    def test_fidelity_and_diversity_tell_what_they_should(self):
        from dmd_core.snapshots import Reference

        reference = Reference.of(gallery(None))

        def of(images):
            return measure(images, gallery(None), reference)

        equal, other, alike = of(pictures(0)), of(pictures(5)), of(pictures(0, alike=0.9))
        assert (equal.fidelity, equal.diversity) == (pytest.approx(1), pytest.approx(1))
        assert abs(other.fidelity) < 0.25
        assert other.diversity == pytest.approx(1, abs=0.25)
        assert alike.diversity < 0.2
        assert brightness(pictures(0, dark=0.3)).mean() < 0.5 * brightness(pictures(0)).mean()
        assert saturation(pictures(0, grey=1.0)).mean() < 0.1 * saturation(pictures(0)).mean()

    def test_the_best_is_the_most_faithful_of_the_diverse_and_of_equals_the_first(self):
        def row(fidelity, diversity):
            return Measures(fidelity, diversity, 0.5, 0.5, (0.5, 0.1), (0.5, 0.1))

        assert best([]) is None
        assert best([row(0.2, 1.0), row(0.5, 0.9), row(0.5, 0.9), row(0.4, 1.1)]) == 1
        assert best([row(0.9, 0.3), row(0.3, 0.85)]) == 1  # faithful, but all alike
        assert best([row(0.9, 0.3), row(0.8, 0.7)]) == 1  # none is diverse: the smaller miss counts
        assert best([row(0.9, 2.0), row(0.1, 1.2)]) == 1


def test_a_preview_is_handed_on_and_kept(tmp_path):
    from PIL import Image

    run = Run(tmp_path / "r")
    made = go(Tug(), run, replace(OFTEN, preview_every=5), preview=lambda: Image.new("RGB", (4, 4)))
    assert [p.step for p in made if p.preview is not None] == [1, 5, 10]  # the first says that all is well
    assert (run.path / "previews" / "latest.png").exists()


def test_a_preview_shows_the_average_that_will_be_kept_and_leaves_training_alone(tmp_path):
    from PIL import Image

    def trained(name, **options):
        tug, seen = Tug(), []
        weight = tug.nets["student"].weight

        def look():
            seen.append(weight.detach().clone())
            return Image.new("RGB", (4, 4))

        settings = replace(OFTEN, snapshot_every=10, **options)
        go(tug, Run(tmp_path / name), settings, preview=look)
        return weight.detach().clone(), seen

    live, seen = trained("r", preview_every=5)
    kept = load_file(Run(tmp_path / "r").snapshots()[0] / "student.safetensors")["weight"]  # of step 10 too
    assert torch.equal(seen[-1], kept)
    assert not torch.equal(seen[-1], live)  # control: they differ
    assert torch.equal(live, trained("without", preview_every=0)[0])


def test_the_lock_holds_between_processes(tmp_path):
    code = (
        "import sys, time, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('dmd_core', r'{ROOT}/dmd_core/__init__.py')\n"
        "m = importlib.util.module_from_spec(spec); sys.modules['dmd_core'] = m; spec.loader.exec_module(m)\n"
        "from dmd_core.runs import Run\n"
        "from pathlib import Path\n"
        "try:\n    Run(Path(sys.argv[1])).locked().__enter__()\nexcept ValueError as e:\n    print(e)\n"
    )
    run = Run(tmp_path / "r")
    with run.locked():
        out = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=300)
    assert f"in use by process {os.getpid()}" in out.stdout, out.stderr


def test_numbers_that_json_lacks_become_null():
    assert json.loads(json.dumps(runs.finite({"a": float("nan"), "b": [float("inf"), 1.0]}))) == {
        "a": None,
        "b": [None, 1.0],
    }

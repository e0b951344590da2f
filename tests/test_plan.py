"""What is said before and during a run: plan, teacher probe, alarms, prompts. Each with a control."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import ring
from torch import nn

from dmd_core import alarms, plan, probe
from dmd_core.conditioning import Cond
from dmd_core.denoiser import Guided
from dmd_core.plan import GIB, Plan
from dmd_core.prompts import PromptCache, fingerprint, parse_prompts, read_prompts
from dmd_core.samplers import sample_euler
from dmd_core.schedule import Discrete, Flow
from dmd_core.snapshots import Measures
from dmd_core.train import Player, TrainConfig


class Fit:
    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Linear(8, 8)
            self.own = nn.Parameter(torch.randn(8, 8))
        self.net.requires_grad_(False)
        self.players = {"student": Player({"own": self.own}, 1e-2, ema=0.9)}

    def turns(self, step):
        return ("student",)

    def terms(self, player, batch, rng):
        return {"fit": (self.net(batch @ self.own) - batch).square().mean()}


def ones():
    while True:
        yield torch.ones(4, 8)


class TestPlan:
    def test_it_measures_two_steps_and_takes_them_back(self):
        objective = Fit()
        before = objective.own.detach().clone()
        made = plan.plan(objective, ones(), TrainConfig(steps=500), objective.net, batch=4)
        assert torch.equal(objective.own, before)
        assert objective.own.grad is None
        assert made.trained == made.averages == 64 * 4
        assert made.base == (64 + 8) * 4
        assert made.fp8 == (64 + 8) * 3
        assert 2 * 64 * 4 <= made.optimizer <= 2 * 64 * 4 + 8  # two moments and a step counter
        assert 0 < made.hours == 500 * made.seconds_per_step / 3600
        assert made.peak is None
        assert "A CPU does not count activations" in made.words()
        assert made.fits() == {12: None, 16: None, 24: None}

    def sized(self, **given):
        some = {"device": "H", "steps": 1000, "seconds_per_step": 9.0, "averages": 0, "peak": None}
        return Plan(**(some | {"base": 5 * GIB, "fp8": 2 * GIB, "trained": GIB, "optimizer": 2 * GIB} | given))

    def test_a_peak_is_held_against_the_cards(self):
        assert self.sized(peak=13.0 * GIB).fits() == {12: False, 16: True, 24: True}
        assert self.sized(peak=15.5 * GIB).fits() == {12: False, 16: False, 24: True}
        assert self.sized(peak=math.inf).fits() == dict.fromkeys((12, 16, 24), False)
        assert self.sized(base=20 * GIB).fits() == {12: False, 16: False, 24: False}  # parameters alone say no
        assert "2.5 hours" in self.sized().words()

    def test_advice_names_what_is_not_done_yet(self):
        def of(config, peak=20.0, **more):
            return " ".join(plan.advice(self.sized(peak=peak * GIB), config, **more))

        plain = of(TrainConfig(), checkpointing=False, batch=4)
        assert "checkpointing" in plain
        assert "bf16" in plain
        assert "batch 1 with accumulate x 4" in plain
        assert "'adamw8bit': about 1.50 GB less" in plain
        done = of(TrainConfig(precision="bf16", optimizer="adamw8bit"), checkpointing=True, batch=1)
        assert not any(w in done for w in ("checkpointing", "'bf16'", "accumulate", "adamw8bit"))
        assert of(TrainConfig(), peak=4.0, checkpointing=False, batch=4) == ""

    def test_what_saves_less_than_half_a_gigabyte_is_not_advised(self):
        def of(**given):
            return " ".join(plan.advice(self.sized(**given), TrainConfig(), False, 4))

        small = {"trained": GIB // 100, "optimizer": GIB // 50, "fp8": 0}
        assert of(**small, base=GIB // 10) == "", "nothing of a small model is worth it"
        told = of(**small)  # the control: a base of 5 GB, its activations not known
        assert "checkpointing" in told
        assert "smaller picture" in told
        assert not any(w in told for w in ("adamw8bit", "rank", "fp8"))
        measured = of(base=20 * GIB, peak=23.2 * GIB)  # nearly all of it kept
        assert not any(w in measured for w in ("checkpointing", "bf16", "accumulate", "smaller picture"))
        assert all(w in measured for w in ("adamw8bit", "rank", "an fp8 base: up to 2.00 GB less"))

    def test_whole_copies_are_not_told_to_take_an_fp8_base(self):
        """Which they would be refused."""
        for copies, word in ((0, "an fp8 base"), (2, "LoRA sets instead of whole copies")):
            told = " ".join(plan.advice(self.sized(peak=20.0 * GIB, copies=copies), TrainConfig(), True, 1))
            assert word in told
            assert ("fp8" in told) == (copies == 0)

    def test_out_of_memory_is_a_finding_not_a_crash(self):
        objective = Fit()
        before = objective.own.detach().clone()

        def full(*_):
            raise torch.OutOfMemoryError("no")

        objective.terms = full
        made = plan.plan(objective, ones(), TrainConfig(steps=5), objective.net)
        assert made.peak == math.inf
        assert "more than this" in made.words()
        assert torch.equal(objective.own, before)

    @pytest.mark.gpu
    def test_cuda_counts_the_peak(self):
        objective = Fit()
        objective.net.cuda()
        objective.own = nn.Parameter(objective.own.detach().cuda())
        objective.players = {"student": Player({"own": objective.own}, 1e-2)}
        batches = iter(lambda: torch.ones(1 << 20, 8, device="cuda"), None)
        made = plan.plan(objective, batches, TrainConfig(steps=5), objective.net)
        assert made.peak > 2 * (1 << 20) * 8 * 4


# --- the probe: an exact mixture is a true teacher, the others are made from it


class FewStep:
    """A consistency model of the oracle: every call goes all the way."""

    def __init__(self, inner):
        self.inner, self.schedule = inner, inner.schedule

    def __call__(self, x, sigma, cond):
        t = float(sigma[0])
        return sample_euler(self.inner, x, torch.linspace(t, 0, 9), cond)


SCHEDULES = {"flow": Flow(), "vp": Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)}
PROMPTS, NEGATIVE = torch.tensor([0, 3, 5, 6]), torch.tensor([-1])


def probed(model, steps=24):
    return probe.probe(model, PROMPTS, NEGATIVE, (2,), noises=8, steps=steps)


class TestProbe:
    @pytest.mark.parametrize("kind", list(SCHEDULES))
    def test_an_exact_teacher_is_accepted(self, kind):
        found = probed(ring(SCHEDULES[kind]))
        assert found.variety < 0.2
        assert found.overshoot == pytest.approx(1, abs=0.15)
        assert found.response[0] > 0.5
        assert found.seconds_per_call > 0
        assert probe.complaints(found, 4.0) == []

    @pytest.mark.parametrize("kind", list(SCHEDULES))
    @pytest.mark.parametrize("scale", [2.5, 5.0])
    def test_built_in_guidance_is_refused_on_top_of_guidance_only(self, kind, scale):
        oracle = ring(SCHEDULES[kind])

        class Distilled(Guided):
            def __call__(self, x, sigma, cond):
                return self.inner(x, sigma, cond) if (cond < 0).all() else super().__call__(x, sigma, cond)

        found = probed(Distilled(oracle, scale, NEGATIVE.expand(4)))
        assert found.overshoot > probe.OVERSHOOT
        with pytest.raises(ValueError, match="built into it"):
            probe.refuse(found, 4.0)
        probe.refuse(found, 1.0)

    def test_a_few_step_model_is_refused_whatever_the_guidance(self):
        found = probed(FewStep(ring(Flow())), steps=8)
        assert found.variety > 0.8
        for guidance in (1.0, 4.0):
            with pytest.raises(ValueError, match="in one step"):
                probe.refuse(found, guidance)

    def test_a_deaf_model_is_refused_unless_guidance_is_off(self):
        oracle = ring(Flow())

        class Deaf:
            schedule = oracle.schedule

            def __call__(self, x, sigma, cond):
                return oracle(x, sigma)

        found = probed(Deaf())
        assert any("does not respond" in r for r in probe.complaints(found, 4.0))
        assert probe.complaints(found, 1.0) == []


# --- alarms


def history(n, **series):
    return [{"step": i + 1, "losses": {k.replace("_", "/"): f(i) for k, f in series.items()}} for i in range(n)]


def wobble(i):
    return 0.2 * math.sin(i * 1.7)


class TestAlarms:
    def test_a_critic_that_falls_behind(self):
        sick = history(400, critic_denoise=lambda i: 1 + wobble(i) + max(0, i - 200) / 100)
        assert "critic falls behind" in alarms.alarms(sick)[0]
        for healthy in (lambda i: 1 + wobble(i), lambda i: 3 / (1 + i / 20) + 1 + wobble(i)):
            assert alarms.alarms(history(400, critic_denoise=healthy)) == []
        assert alarms.alarms(sick[:25]) == []  # too early to tell

    def test_a_discriminator_that_wins(self):
        def of(accuracy, gap, n=200):
            return alarms.alarms(history(n, critic_accuracy=lambda i: accuracy, critic_gap=lambda i: gap))

        assert "the discriminator wins" in of(0.99, 20.0)[0]
        assert "cannot tell" in of(0.5, 0.01)[0]
        assert of(0.75, 2.0) == []
        assert of(0.99, 20.0, n=60) == []

    def test_a_loss_that_is_no_number(self):
        assert "student/dmd" in alarms.alarms(history(3, student_dmd=lambda i: None if i == 2 else 1.0))[0]
        assert "student/dmd" in alarms.alarms(history(3, student_dmd=lambda i: math.inf if i == 2 else 1.0))[0]
        assert alarms.alarms(history(3, student_dmd=lambda i: 1.0)) == []

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"brightness": 0.2}, "brightness"),
            ({"saturation": 0.9}, "saturation"),
            ({"diversity": 0.4}, "look alike"),
            ({"diversity": 1.9}, "fall apart"),
        ],
    )
    def test_samples_that_leave_the_teachers_range(self, change, word):
        healthy = Measures(0.6, 0.95, 0.48, 0.35, (0.5, 0.1), (0.3, 0.1))
        assert alarms.alarms([], [healthy]) == []
        found = alarms.alarms([], [healthy, replace(healthy, **change)])
        assert len(found) == 1
        assert word in found[0]
        assert alarms.alarms([], [replace(healthy, **change), healthy]) == []  # the newest counts


# --- prompts


class TestPrompts:
    def test_lines_without_comments_gaps_and_repetitions(self, tmp_path):
        text = "\ufeff# mine\r\na cat\r\n\r\n  a dog \r\na cat\n#b\nein Hündchen\n"
        assert parse_prompts(text) == ["a cat", "a dog", "ein Hündchen"]
        (tmp_path / "p.txt").write_bytes(text.encode())
        assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog", "ein Hündchen"]

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b"", "no prompts"),
            (b"# only\n\n", "no prompts in 3 lines"),
            (b"a\nb\xff", r"not UTF-8 text \(line 2\)"),
            (b"\x7fELF\x00\x01", "control characters"),
        ],
    )
    def test_files_that_hold_none_are_named(self, tmp_path, raw, message):
        (tmp_path / "p.txt").write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "p.txt")
        with pytest.raises(ValueError, match="cannot be read"):
            read_prompts(tmp_path / "none.txt")

    def encoder(self):
        self.asked = []

        def encode(prompts):
            self.asked += prompts
            rows = []
            for p in prompts:
                g = torch.Generator().manual_seed(len(p))
                cross = torch.zeros(1, 8, 4)
                cross[:, : len(p)] = torch.randn(1, 8, 4, generator=g)[:, : len(p)]
                mask = (torch.arange(8) < len(p))[None]
                rows.append(
                    Cond(cross, torch.randn(1, 3, generator=g), {"mask": mask, "size": torch.full((1, 2), 3001.0)})
                )
            from dmd_core.conditioning import cat

            return cat(rows)

        return encode

    def test_each_is_encoded_once_and_kept_at_its_true_length(self, tmp_path):
        encode, cache = self.encoder(), PromptCache(tmp_path, "clip")
        first = cache.encode(["cat", "horse"], encode)
        again = cache.encode(["horse", "cat", "ox"], encode)
        assert self.asked == ["cat", "horse", "ox"]
        assert first.cross.shape == (2, 5, 4)
        torch.testing.assert_close(again.cross[0], first.cross[1])
        torch.testing.assert_close(first.cross[1], encode(["horse"]).cross[0, :5], atol=2e-3, rtol=1e-3)
        assert first.cross.dtype == torch.float32
        assert first.extras["mask"].sum(1).tolist() == [3, 5]
        assert first.extras["size"].tolist() == [[3001.0] * 2] * 2  # fp16 would round it
        assert cache.read("cat").cross.shape == (1, 3, 4)
        assert cache.path("cat").stat().st_size < 1500

    def test_another_encoder_another_entry(self, tmp_path):
        encode = self.encoder()
        PromptCache(tmp_path, "clip").encode(["cat"], encode)
        with pytest.raises(ValueError, match="1 prompts are not in the cache"):
            PromptCache(tmp_path, "t5").encode(["cat"])
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        assert fingerprint([a]) == fingerprint([a]) != fingerprint([b])
        assert fingerprint([a], 512) != fingerprint([a], 1024)

    @pytest.mark.parametrize("harm", ["truncated", "flipped", "other"])
    def test_a_damaged_entry_is_made_again(self, tmp_path, harm):
        encode, cache = self.encoder(), PromptCache(tmp_path, "clip")
        wanted = cache.encode(["cat", "ox"], encode)
        raw = bytearray(cache.path("cat").read_bytes())
        raw[-1] ^= harm == "flipped"
        made = {"truncated": raw[:-3], "other": cache.path("ox").read_bytes()}.get(harm, raw)
        cache.path("cat").write_bytes(made)
        assert cache.read("cat") is None
        torch.testing.assert_close(cache.encode(["cat", "ox"], encode).cross, wanted.cross)
        assert self.asked == ["cat", "ox", "cat"]

    def test_what_overflows_fp16_is_kept_wider(self, tmp_path):
        cache = PromptCache(tmp_path, "big")
        wide = Cond(torch.full((1, 2, 3), 1e6))
        torch.testing.assert_close(cache.encode(["x"], lambda p: wide).cross, wide.cross)

    def test_an_encoder_that_loses_rows_is_caught(self, tmp_path):
        with pytest.raises(ValueError, match="1 rows for 2 prompts"):
            PromptCache(tmp_path, "odd").encode(["a", "b"], lambda p: Cond(torch.ones(1, 2, 3)))

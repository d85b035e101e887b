"""The sweep of tests/peers.py finds what it is for: a difference that is not known."""

import pytest
import torch

pytest.importorskip("diffusers")
import sweep

import fastdiff.integrations.diffusers as ours


def test_a_new_difference_is_red(monkeypatch, capsys):
    assert sweep.sweep(4, 3, ["EulerDiscreteScheduler", "UniPCMultistepScheduler"]) == 0
    step = ours.EulerDiscreteScheduler.step

    def wrong(self, *arguments, **options):
        done = step(self, *arguments, **options)
        done["prev_sample"] = done.prev_sample * 1.001
        done.__dict__["prev_sample"] = done["prev_sample"]
        return done

    wrong.__signature__ = sweep.inspect.signature(step)
    monkeypatch.setattr(ours.EulerDiscreteScheduler, "step", wrong)
    assert sweep.sweep(4, 3, ["EulerDiscreteScheduler"]) == 1
    assert "NEW KIND: differ: case" in capsys.readouterr().out


@pytest.mark.parametrize("name", ours.SCHEDULERS)
def test_every_class_runs(name):
    assert sweep.sweep(1, 2, [name]) == 0


def test_lists_nan_and_errors_are_told_apart(monkeypatch):
    case = sweep.draw("EulerDiscreteScheduler", 1, 3)
    case.config, case.lists, case.begin, case.options = {}, {"num_inference_steps": 5}, 0, {}
    assert sweep.run(case).outcome == "equal"
    cls, made = ours.EulerDiscreteScheduler, ours.EulerDiscreteScheduler.set_timesteps

    def longer(self, *arguments, **options):
        made(self, *arguments, **options)
        self.sigmas[1] *= 1 + 1e-6

    monkeypatch.setattr(cls, "set_timesteps", longer)
    assert sweep.run(case).list_kind == "new"
    monkeypatch.undo()
    monkeypatch.setattr(cls, "_plan", lambda self, *options: (_ for _ in ()).throw(ValueError("a new reason")))
    assert sweep.run(case).outcome == "only ours raises"
    assert sweep.kind_of(case) is None
    monkeypatch.undo()
    step = cls.step

    def broken(self, *arguments, **options):
        done = step(self, *arguments, **options)
        done.prev_sample.fill_(torch.nan)
        return done

    broken.__signature__ = sweep.inspect.signature(step)
    monkeypatch.setattr(cls, "step", broken)
    assert (sweep.run(case).outcome, sweep.kind_of(case), case.message) == ("differ", None, "NaN in ours at state 0")


def test_a_run_in_float64_draws_the_noise_of_float32():
    case = sweep.draw("DDPMScheduler", 0, 3)
    case.config, case.lists, case.begin, case.options = {}, {"num_inference_steps": 5}, 0, {}
    narrow = sweep.states(sweep.pair_of(case)[0], case, False)
    both = sweep.pair_of(case)[:2]
    with sweep.float64(both[0]):
        wide = [sweep.states(scheduler, case, True) for scheduler in both]
    assert wide[0][0]["prev_sample"].dtype == torch.float64
    assert sweep.apart(narrow, wide[0], 1e-4)[0] < 0
    assert sweep.apart(*wide, 1e-6)[0] < 0

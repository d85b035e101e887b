"""Other projects' own tests, run with fastdiff in their classes' place.

    python tests/peers.py --diffusers CHECKOUT [arguments for pytest]
    python tests/peers.py --sweep N [--seed S]   # random configurations beside the installed diffusers; no checkout

CHECKOUT is a source tree of diffusers near the installed version; its tests of the schedulers that fastdiff has
run against the installed diffusers, with fastdiff's classes under diffusers' names. Nothing in it is changed. A test is
left out only by name, with a reason, in ``EXCLUDED``.
"""

import argparse
import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FILES = (
    "ddpm", "ddim", "ddim_inverse", "pndm", "euler", "euler_ancestral", "heun", "lms", "dpm_multi", "dpm_single",
    "unipc", "deis", "edm_euler", "lcm", "tcd",
)  # fmt: skip

_BETAS = "betas up to 2: ᾱ is 0 from the middle of the list on, σ infinite; fastdiff refuses such a list"
_THOUSAND = "1000 rounded steps visit a timestep twice, where theirs goes on with NaN; fastdiff refuses such a list"
_RISING = "the list of all 1000 timesteps has σ that rise, since ᾱ's last entry was set to 2**-24; fastdiff refuses it"
_PRK = "steps its Runge–Kutta start from timesteps that are not the list's first; fastdiff refuses"

# By the file's and the test's name.
EXCLUDED = {
    **dict.fromkeys(
        ("ddpm.py::DDPMSchedulerTest::test_betas", "ddim.py::DDIMSchedulerTest::test_betas",
         "ddim_inverse.py::DDIMInverseSchedulerTest::test_betas", "pndm.py::PNDMSchedulerTest::test_betas",
         "lcm.py::LCMSchedulerTest::test_betas", "tcd.py::TCDSchedulerTest::test_betas"), _BETAS),
    **dict.fromkeys(
        ("dpm_multi.py::DPMSolverMultistepSchedulerTest::test_timesteps",
         "dpm_single.py::DPMSolverSinglestepSchedulerTest::test_timesteps",
         "unipc.py::UniPCMultistepSchedulerTest::test_timesteps",
         "unipc.py::UniPCMultistepScheduler1DTest::test_timesteps",
         "deis.py::DEISMultistepSchedulerTest::test_timesteps"), _THOUSAND),
    **dict.fromkeys(
        ("euler.py::EulerDiscreteSchedulerTest::test_rescale_betas_zero_snr",
         "euler_ancestral.py::EulerAncestralDiscreteSchedulerTest::test_rescale_betas_zero_snr"), _RISING),
    **dict.fromkeys(
        [f"pndm.py::PNDMSchedulerTest::test_{name}" for name in (
            "inference_steps", "prediction_type", "schedules", "step_shape", "steps_offset", "time_indices",
            "timesteps")], _PRK),
    "ddpm.py::DDPMSchedulerTest::test_full_loop_with_noise":
        "its stored sum has float32's error in 1 − ᾱ at t = 1 (2e-5); fastdiff's is that of float64 arithmetic",
    "ddpm.py::DDPMSchedulerTest::test_rescale_betas_zero_snr":
        "a prediction of ε where ᾱ is 0, which says nothing of x_0; fastdiff refuses it, theirs divides by 0",
    "ddpm.py::DDPMSchedulerTest::test_variance_type": 'variance_type="other" is refused; theirs reads fixed_small',
    "lms.py::LMSDiscreteSchedulerTest::test_full_loop_with_noise":
        "begins in mid-list with coefficients of outputs that it does not have; fastdiff begins at order 1",
}  # fmt: skip
if importlib.util.find_spec("torchsde") is None:
    EXCLUDED |= {
        f"{name}::test_compatibles": "theirs makes every compatible scheduler, one of which needs torchsde"
        for name in (
            "ddpm.py::DDPMSchedulerTest", "ddim.py::DDIMSchedulerTest", "pndm.py::PNDMSchedulerTest",
            "euler.py::EulerDiscreteSchedulerTest", "euler_ancestral.py::EulerAncestralDiscreteSchedulerTest",
            "heun.py::HeunDiscreteSchedulerTest", "lms.py::LMSDiscreteSchedulerTest",
            "dpm_multi.py::DPMSolverMultistepSchedulerTest", "dpm_single.py::DPMSolverSinglestepSchedulerTest",
            "unipc.py::UniPCMultistepSchedulerTest", "unipc.py::UniPCMultistepScheduler1DTest",
            "deis.py::DEISMultistepSchedulerTest",
        )
    }  # fmt: skip


class Replacing:
    """Put fastdiff's schedulers under diffusers' names before a test module imports them, and leave out EXCLUDED."""

    def __init__(self) -> None:
        self.left_out: set[str] = set()

    def pytest_configure(self) -> None:
        import diffusers

        from fastdiff.integrations.diffusers import SCHEDULERS

        for name, ours in SCHEDULERS.items():
            setattr(diffusers, name, ours)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            name = item.nodeid.split("tests/schedulers/test_scheduler_")[-1]
            (self.left_out.add(name) if name in EXCLUDED else kept.append(item))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in sorted(self.left_out):
            terminalreporter.write_line(f"left out: {name}: {EXCLUDED[name]}")
        for name in sorted(EXCLUDED.keys() - self.left_out):
            terminalreporter.write_line(f"not found, though it is to be left out: {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, metavar="CHECKOUT", help="a source tree of diffusers")
    parser.add_argument("--sweep", type=int, metavar="N", help="N random configurations of every class")
    parser.add_argument("--seed", type=int, metavar="S", help="the sweep's seed; drawn and printed unless given")
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="the sweep's classes, all unless given")
    options, rest = parser.parse_known_args()
    if options.sweep is not None:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integrations")]
        from sweep import sweep

        seed = random.randrange(1 << 16) if options.seed is None else options.seed
        return sweep(options.sweep, seed, options.only)
    if options.diffusers is None:
        parser.error("one of --diffusers and --sweep is needed")
    checkout = options.diffusers.resolve()
    files = [checkout / "tests" / "schedulers" / f"test_scheduler_{name}.py" for name in FILES]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        parser.error(f"not a checkout of diffusers: there is no {missing[0]}")
    sys.path[0] = str(ROOT)  # fastdiff; this folder's own modules are no business of theirs
    os.chdir(checkout)
    plugin = Replacing()
    return int(pytest.main([*map(str, files), "-q", "-p", "no:cacheprovider", *rest], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())

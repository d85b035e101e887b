"""Curves of schedules and plans, read back from matplotlib's figures."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, plots, samplers

pytest.importorskip("matplotlib")


def curves(axes: object) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]


def test_a_table_s_curves_are_its_numbers() -> None:
    schedule = NoiseSchedule.cosine(50)
    signal, ratio, betas = schedule.plot().axes
    np.testing.assert_allclose(curves(signal)[0], schedule.alphas, rtol=1e-12)
    np.testing.assert_allclose(curves(signal)[1], schedule.sigmas, rtol=1e-12)
    bar = schedule.alphas_cumprod.numpy()
    snr = 0.5 * np.log(bar / (1 - bar))
    np.testing.assert_allclose(curves(ratio)[0], snr, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(curves(betas)[0], schedule.betas, rtol=1e-12)
    assert signal.get_lines()[0].get_xdata()[[0, -1]].tolist() == [0, 1]


def test_schedules_stand_beside_each_other() -> None:
    figure = NoiseSchedule.linear().plot(FlowSchedule(3.0), NoiseSchedule.cosine())
    assert [len(curves(axes)) for axes in figure.axes] == [6, 3, 2]  # a flow has no β
    flow = curves(figure.axes[0])[2:4]
    np.testing.assert_allclose(flow[0] + flow[1], 1, rtol=1e-12)
    u = np.linspace(1, 0, 200, endpoint=False)[::-1]
    np.testing.assert_allclose(flow[1], 3 * u / (1 + 2 * u), rtol=1e-12)  # Esser et al. 2024, Equation 23
    assert len(figure.axes[0].get_legend().get_texts()) == 3


def test_edm_goes_evenly_in_log_sigma() -> None:
    signal, ratio = EDMSchedule().plot().axes
    sigmas = curves(signal)[1]
    assert sigmas[[0, -1]].tolist() == pytest.approx([0.002, 80.0])
    np.testing.assert_allclose(np.diff(np.log(sigmas)), np.log(80 / 0.002) / 200, rtol=1e-9)
    np.testing.assert_allclose(curves(ratio)[0], -np.log(sigmas), atol=1e-12)
    assert signal.get_yscale() == "log"


def test_zero_terminal_snr_leaves_a_gap() -> None:
    schedule = NoiseSchedule.linear(20).rescale_zero_terminal_snr()
    assert np.isnan(curves(schedule.plot().axes[1])[0][-1])


def test_a_plan_s_levels_coefficients_and_noise() -> None:
    plan = samplers.ddpm(NoiseSchedule.linear(), 8)
    level, terms, noise = plan.plot().axes
    np.testing.assert_array_equal(curves(level)[0], [row.sigma for row in plan])
    named = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in terms.get_lines()}
    np.testing.assert_array_equal(named["x0"], [row.x.get("x0", np.nan) for row in plan])
    assert [bar.get_height() for bar in noise.patches] == [row.x.get("z", 0.0) for row in plan]
    assert "8 rows, 8 network calls" in level.get_title()


def test_notebooks_display_the_figure() -> None:
    figure = plots.plan(samplers.ddim(NoiseSchedule.linear(), 4))
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:
        assert (picture.format, picture.size) == ("PNG", (800, 800))


def test_pyplot_is_left_alone() -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    plots.schedule(NoiseSchedule.linear(5))
    assert ("matplotlib.pyplot" in sys.modules) == loaded


@pytest.mark.parametrize("bad", [(), ("cosine",), (NoiseSchedule.linear(), 3)])
def test_only_schedules_are_plotted(bad: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="takes one or more schedules"):
        plots.schedule(*bad)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (NoiseSchedule.linear(5).plot, samplers.ddim(NoiseSchedule.linear(), 4).plot):
        with pytest.raises(ImportError, match=r'matplotlib: pip install "fastdiff-torch\[plot\]"'):
            plot()


@pytest.mark.parametrize(
    "code",
    [
        "fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 4).plot()",
        "fastdiff.NoiseSchedule.linear(5).plot()",
        "from fastdiff.plan.plot import save_plot",
        "fastdiff.plots.plan",
        "fastdiff.reproduce",
        "fastdiff.read_recipe",
    ],
)
@pytest.mark.slow
def test_each_may_come_first_in_a_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import fastdiff\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

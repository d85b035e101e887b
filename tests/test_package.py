"""What importing fastdiff costs and needs, which backend serves, and what the extension is linked with."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.ops import backend as backends

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {
    "triton", "diffusers", "transformers", "accelerate", "sklearn", "scipy", "matplotlib", "typer", "click", "tqdm",
    "PIL", "hypothesis", "pytest", "torchvision",
}  # fmt: skip


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env={**os.environ, **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_no_optional_package():
    out = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastdiff; print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    new = set(out.split())
    assert "fastdiff" in new
    assert not new & OPTIONAL


def test_a_run_brings_neither_triton_nor_an_optional_package():
    """torch itself imports some of them lazily, so only what is new beside a plain use of torch counts."""
    code = """
import sys, torch
torch.randn(2, 3).mul(2).cumsum(0); torch.ones(2, dtype=torch.float64).sqrt()
torch.nn.Linear(3, 3)(torch.zeros(2, 3)); before = set(sys.modules)
import fastdiff
fastdiff.sample(lambda x, t: x * 0.5, (1, 3, 4, 4), sampler="ddim", steps=2)
fastdiff.add_noise(torch.zeros(1, 3), 5, "cosine")
print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))
"""
    assert not set(python(code).split()) & OPTIONAL


@pytest.mark.slow
def test_works_without_the_extension():
    code = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "fastdiff._C":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Blocker())
import torch, fastdiff, hashlib
z = fastdiff.randn((1, 1 << 20))
assert hashlib.sha256(z.numpy().tobytes()).hexdigest().startswith("88d45108bb966e92")
assert fastdiff.sample(lambda x, t: x * 0.5, (1, 3), steps=2).isfinite().all()
try:
    fastdiff.randn((1, 3), backend="native")
except RuntimeError as error:
    print(error)
"""
    out = python(code)
    assert "backend='native' cannot serve cpu tensors" in out
    assert "blocked by the test" in out


# ---- what is installed


def test_import_where_a_folder_of_the_same_name_lies(tmp_path):
    """Python takes a clone, a folder without __init__.py, for the package where an install does not forestall it."""
    (tmp_path / "fastdiff").symlink_to(ROOT)
    code = "import fastdiff; print(callable(fastdiff.sample), fastdiff.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.startswith("True"), done.stderr


def test_info_warns_of_the_other_distribution_of_the_name(tmp_path, monkeypatch):
    other = tmp_path / "fastdiff-0.3.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: fastdiff\nVersion: 0.3.0\n")
    from fastdiff.info import report

    assert "text differ" not in report()
    monkeypatch.syspath_prepend(tmp_path)
    assert "the distribution fastdiff 0.3.0, a text differ, is installed too" in report()


def test_the_description_leads_nowhere_that_is_not_there():
    """Pictures and links into the repository are no use on an index's page."""
    description = metadata("fastdiff-torch").get_payload()
    assert "Fused kernels" in description
    assert re.findall(r"\]\((?!https?://)[^)]*\)", description) == []


def test_names_and_versions_agree():
    assert version("fastdiff-torch") == fastdiff.__version__


def test_relative_links_of_the_documents_exist():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ---- the choice of backend


def test_the_variable(monkeypatch):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    for value, chosen in (("reference", "reference"), ("native", "native"), ("", "native"), ("auto", "native")):
        monkeypatch.setenv("FASTDIFF_BACKEND", value)
        assert backends.choose("auto", "cpu") == chosen
    monkeypatch.setenv("FASTDIFF_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTDIFF_BACKEND is 'fast'"):
        fastdiff.sample(lambda x, t: x, (1, 3), steps=2)
    # A named backend does not ask the variable.
    assert fastdiff.randn((1, 3), backend="reference").shape == (1, 3)


def test_native_is_chosen_on_the_cpu(monkeypatch):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    monkeypatch.delenv("FASTDIFF_BACKEND", raising=False)
    assert backends.choose("auto", "cpu") == "native"


def test_a_named_backend_says_why_it_cannot(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._choose.cache_clear()
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve cpu tensors: [Tt]riton (has no|is not)"):
        fastdiff.randn((1, 3), backend="triton")
    with pytest.raises(ValueError, match="backend is 'cpu'; it must be auto, native, triton, reference"):
        fastdiff.randn((1, 3), backend="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend='native' cannot serve mps"):
            backends.choose("native", "mps")


# ---- the extension


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_extension_needs_no_torch():
    extension = pytest.importorskip("fastdiff._C", reason="the extension is not built")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", extension.__file__], capture_output=True, text=True,
                             check=True).stdout  # fmt: skip
    assert "Py" in symbols  # nm read something
    found = [line for line in symbols.splitlines() if re.search(r"torch|c10|\bat\b|_ZN2at|ATen|GOMP|omp_", line)]
    assert found == []


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="no sources beside the tests")
def test_the_sources_include_no_torch():
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 10
    for file in files:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", file.read_text()), file


def test_the_public_names_exist():
    for name in fastdiff.__all__:
        assert hasattr(fastdiff, name), name

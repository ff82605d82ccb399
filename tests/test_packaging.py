"""What is built and installed: the wheel, the source distribution, the editable install.

kernels/ at the top is a directory without __init__.py, and dl_norm/kernels a symlink to it, so
that no package called `kernels`, which is the name of another project, is ever made.
"""

import email
import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dl_norm

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = {"pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE"} | {
    "CHANGELOG.md", "CITATION.cff", "kernels", "dl_norm", "bench", "tests", "ci",
}  # fmt: skip
# In an unpacked source distribution there is no link, and no kernels/ that it could lead to.
pytestmark = pytest.mark.skipif(
    not (ROOT / "kernels").is_dir(), reason="not the sources that the distributions are made from"
)
FOLDERS = sorted(
    {str(path.parent.relative_to(ROOT / "dl_norm")) for path in ROOT.glob("dl_norm/**/__init__.py")}
    | {"kernels"}
)
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def run(*command, cwd, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def run_python(code, *, first, cwd):
    """Runs code with `first` at the head of sys.path and without the repository on it.

    -S: .pth files of the environment, such as this package's own editable install, are not read.
    """
    rest = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    path = os.pathsep.join([str(first), *rest])
    return run(sys.executable, "-S", "-c", code, cwd=cwd, PYTHONPATH=path)


def pip_install(*arguments, cwd):
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-compile", "--no-index")
    run(sys.executable, "-m", "pip", "install", *flags, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, because building writes into them; symlinks stay symlinks."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in LAYOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, tree / name)
    return tree


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """(sdist, wheel made from the sdist, wheel made from the tree)"""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, folder / "both", tree, cwd=folder)
    run(*build, folder / "direct", "--wheel", tree, cwd=folder)
    (sdist,) = (folder / "both").glob("*.tar.gz")
    (wheel,) = (folder / "both").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return sdist, wheel, direct


IMPORTS = """
import pathlib, sys
import dl_norm, dl_norm.kernels.policy_loss as module
import dl_norm.integrations
for file in (dl_norm.__file__, module.__file__):
    print(pathlib.Path(file).resolve())
import torch
weights = dl_norm.sequence_weights(torch.tensor([1, 3]), max_length=4)
assert weights.tolist() == [0.1875, 0.0625], weights
from dl_norm._log_probs.launch import policy_loss_fwd
"""


def assert_imports_from(folder, *, first, cwd, code=IMPORTS):
    for file in run_python(code, first=first, cwd=cwd).split():
        assert Path(file).is_relative_to(folder.resolve()), file


def test_the_wheel_holds_the_package_and_nothing_else(built):
    for path in built[1:]:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            sources = {
                f"dl_norm/{file.relative_to(ROOT / 'dl_norm')}"
                for pattern in ("**/*.py", "kernels/*.py")
                for file in (ROOT / "dl_norm").glob(pattern)
                if file.parent.name != "examples"
            }
            package = {name for name in names if ".dist-info/" not in name}
            assert package == sources | {"dl_norm/py.typed"}
            for name in KERNELS:
                info = wheel.getinfo(f"dl_norm/kernels/{name}")
                assert (info.external_attr >> 16) & 0o170000 in (0, 0o100000), "a regular file"
                assert wheel.read(info) == (ROOT / "kernels" / name).read_bytes()


def test_the_sdist_builds_the_same_wheel_as_the_tree(built):
    _, from_sdist, from_tree = built
    with zipfile.ZipFile(from_sdist) as one, zipfile.ZipFile(from_tree) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            if not name.endswith("RECORD"):
                assert one.read(name) == other.read(name), name


def test_the_sdist_holds_the_sources(built):
    with tarfile.open(built[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers()}
    assert {"pyproject.toml", "README.md", "LICENSE", "dl_norm/py.typed"} <= names
    assert {f"dl_norm/kernels/{name}" for name in KERNELS} <= names
    assert not any(name.startswith(".venv") for name in names)
    # What the tests and documents are made of and read, whole: tests/conftest.py to bench/results.
    for folder in ("tests", "bench", "ci"):
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file()}
        files = {path for path in files if "__pycache__" not in path.parts}
        assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


def test_the_tests_run_in_an_unpacked_sdist(built, tmp_path):
    """All of them are collected, and some pass, with the package that lies beside them."""
    with tarfile.open(built[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    pytest_quietly = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    collected = run(*pytest_quietly, "--collect-only", "-rs", cwd=folder)
    modules = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    # "::" and a test, or ":", a line and why the whole module is skipped here
    missing = {name for name in modules if f"tests/{name}:" not in collected}
    assert not missing, missing
    (folder / "tests" / "test_where.py").write_text(
        "import dl_norm\n\ndef test_where():\n"
        f"    assert dl_norm.__file__ == {str(folder / 'dl_norm' / '__init__.py')!r}\n"
    )
    run(*pytest_quietly, "tests/test_where.py", "tests/test_weights.py", cwd=folder)


def test_metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
        files = wheel.namelist()
    assert metadata["Name"] == "dl-norm"
    assert metadata["Version"] == dl_norm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Author"] == "dl-norm maintainers"
    assert "Programming Language :: Python :: 3.10" in metadata.get_all("Classifier")
    assert {"trl", "bench", "test", "docs", "dev"} <= set(metadata.get_all("Provides-Extra"))
    required = {
        requirement.partition(";")[0].strip()
        for requirement in metadata.get_all("Requires-Dist")
        if "extra ==" not in requirement
    }
    # Nothing of the tests or benchmarks is needed to use the package.
    assert required == {"torch>=2.10", "triton>=3.6", "numpy"}
    # And the README says so.
    (requirements,) = re.findall(r"^## Install\n\n(.+)$", readme_of(metadata), re.M)
    for name, least in (("PyTorch", "2.10"), ("Triton", "3.6"), ("Python", "3.10")):
        assert f"{name} ≥ {least}" in requirements
    (trl,) = (one for one in metadata.get_all("Requires-Dist") if one.startswith("trl"))
    assert 'python_version >= "3.11"' in trl and "TRL 1.16: ≥ 3.11" in requirements
    assert readme_of(metadata).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_package_index_takes_them(built):
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *built[:2], cwd=ROOT)


def readme_of(metadata):
    return metadata.get_payload(decode=True).decode("utf-8")


def test_the_wheel_installs(built, tmp_path):
    pip_install("--target", tmp_path / "site", built[1], cwd=tmp_path)
    assert_imports_from(tmp_path / "site", first=tmp_path / "site", cwd=tmp_path)
    assert not (tmp_path / "site" / "kernels").exists()
    assert {path.name.partition("-")[0] for path in (tmp_path / "site").iterdir()} == {"dl_norm"}
    assert not (tmp_path / "site" / "dl_norm" / "kernels").is_symlink()


def test_the_sdist_installs(built, tmp_path):
    pip_install("--target", tmp_path / "site", built[0], cwd=tmp_path)
    assert_imports_from(tmp_path / "site", first=tmp_path / "site", cwd=tmp_path)


def test_the_editable_install_follows_the_sources(tree, tmp_path):
    pip_install("--prefix", tmp_path / "prefix", "--editable", tree, cwd=tmp_path)
    (pth,) = (tmp_path / "prefix").rglob("*.pth")
    site = f"import site; site.addsitedir({str(pth.parent)!r})\n"
    assert_imports_from(tree, first=tmp_path, cwd=tmp_path, code=site + IMPORTS)
    added = tree / "kernels" / "added_later.py"
    added.write_text("VALUE = 7\n")
    try:
        code = site + "from dl_norm.kernels.added_later import VALUE; print(VALUE)"
        assert run_python(code, first=tmp_path, cwd=tmp_path).strip() == "7"
        code = site + "import importlib.util; print(importlib.util.find_spec('kernels'))"
        assert run_python(code, first=tmp_path, cwd=tmp_path).strip() in ("None", _other_kernels())
    finally:
        added.unlink()


def _other_kernels():
    """What finds `kernels` where the project of that name is installed."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return "None"
    rest = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    return str(importlib.machinery.PathFinder.find_spec("kernels", rest))


def test_uninstalled_sources_import(tree, tmp_path):
    assert_imports_from(tree, first=tree, cwd=tmp_path)


def test_the_symlink_is_a_symlink(tree):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "dl_norm" / "kernels") == "../kernels"
    assert (tree / "dl_norm" / "kernels").is_symlink()
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = run("git", "ls-files", "--stage", "dl_norm/kernels", cwd=ROOT)
        assert listed.startswith("120000 "), "committed as a symlink, mode 120000"


def test_the_top_level_is_as_drawn():
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a git checkout")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    top = {name.partition("/")[0] for name in names.split()}
    assert {name for name in top if not name.startswith(".")} == LAYOUT


def test_modules_are_small():
    """450 lines at most."""
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("dl_norm", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(lines) > 80
    assert not {name: count for name, count in lines.items() if count > 450}


def test_lists_by_hand():
    """CONTRIBUTING says how many places name four or more tensors or options, and no place more."""
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("\n", " ")
    found = run(sys.executable, ROOT / "ci" / "lists.py", cwd=ROOT).splitlines()[-1]
    assert f"or options by hand, {found.split()[0]} of them;" in said


def test_every_module_of_kernels_imports_the_language_as_tl():
    for name in KERNELS:
        source = (ROOT / "kernels" / name).read_text()
        assert "import triton.language as tl" in source, name


def test_the_other_kernels_package_wins(tmp_path):
    """With the repository first on sys.path, `import kernels` still gets an installed package of
    that name: a directory without __init__.py gives way to it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    code = "import kernels; print(kernels.whose)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path).strip() == "theirs"


def test_hub_kernels_of_transformers_imports(tmp_path):
    pytest.importorskip("transformers")
    code = "import transformers.integrations.hub_kernels as m; print(m.__name__)"
    found = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert found.split()[-1] == "transformers.integrations.hub_kernels"

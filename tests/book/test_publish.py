"""How the pages get out: the public site's folders, the workflows, and the containers."""

import json
import re
import tomllib

import links
import pytest
import yaml
from links import ROOT
from publish import publish, versions

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def built(tmp_path):
    (tmp_path / "html" / "_static").mkdir(parents=True)
    (tmp_path / "html" / "index.html").write_text("new")
    (tmp_path / "site").mkdir()
    return tmp_path / "html", tmp_path / "site"


def test_main_becomes_latest_and_earlier_versions_stay(built):
    pages, site = built
    (site / "videos").mkdir()  # begins with v, and is no version
    for old in ("v0.9.0", "v0.10.0", "latest"):
        (site / old).mkdir()
        (site / old / "index.html").write_text(old)
    assert publish(pages, site, "main") == ["latest", "v0.10.0", "v0.9.0"]
    assert (site / "latest" / "index.html").read_text() == "new"
    assert (site / "v0.9.0" / "index.html").read_text() == "v0.9.0"
    assert "url=latest/index.html" in (site / "index.html").read_text()
    listed = re.findall('href="(.*?)/index.html"', (site / "versions.html").read_text())
    assert listed == versions(site)
    assert (site / ".nojekyll").exists()
    for_binder = yaml.safe_load((site / "environment.yml").read_text())
    assert for_binder["dependencies"][-1] == {"pip": [links.install_target("book")]}


def test_a_tag_gets_its_own_folder(built):
    pages, site = built
    name = f"v{links.version()}"
    assert publish(pages, site, name) == ["latest", name]
    assert (site / name / "index.html").read_text() == (site / "latest" / "index.html").read_text()


def test_pages_of_older_versions_lead_to_the_newest(built):
    pages, site = built
    for old in ("v0.0.1", "v0.0.2", "latest"):
        (site / old / "part").mkdir(parents=True)
        for page in ("index.html", "part/gone.html", "part/kept.html"):
            (site / old / page).write_text('<html><body class="x"><main>text</main></body></html>')
    (pages / "part").mkdir()
    (pages / "part" / "kept.html").write_text("<body>new</body>")
    name = f"v{links.version()}"
    for _ in range(2):  # the second time it changes nothing
        publish(pages, site, name)
        for page, target in [
            ("index.html", "index.html"),
            ("part/gone.html", "index.html"),
            ("part/kept.html", "part/kept.html"),
        ]:
            for old in ("v0.0.1", "v0.0.2"):
                text = (site / old / page).read_text()
                (href,) = re.findall(r'class="old-version".*?href="(.*?)"', text)
                assert (site / old / page).parent.joinpath(href).resolve() == site / name / target
                assert text.startswith('<html><body class="x">\n<p')
                assert text.endswith("<main>text</main></body></html>")
                assert f"This is version {old}" in text and f"The newest is {name}" in text
    for new in (name, "latest"):
        assert all("old-version" not in path.read_text() for path in (site / new).rglob("*.html"))


def test_a_wrong_tag_or_no_pages_raise(built):
    pages, site = built
    for wrong in ("v99.0", f"v{links.version()}rc1", "other"):
        with pytest.raises(ValueError, match=f"name: got '{wrong}', wanted 'v"):
            publish(pages, site, wrong)
    with pytest.raises(ValueError, match=r"pages: got .* wanted built pages"):
        publish(site, site, "main")
    assert list(site.iterdir()) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem
    assert workflow[True]  # YAML 1.1 reads the key `on` as true
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            command = step.get("run", "")
            assert "uses" in step or command
            assert set(re.findall(r"\bmake ([a-z]+)$", command, re.MULTILINE)) <= targets
            for file in re.findall(r"(?:^|\s)((?:book/tools|\.ci)/[\w.]+)", command):
                assert (ROOT / file).exists(), file
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4"))
    assert workflow["permissions"]["contents"] == ("write" if path.stem == "pages" else "read")


def test_the_pages_are_published_as_tested():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())["jobs"].values()
    commands = [step.get("run", "") for step in job["steps"]]
    order = [
        next(k for k, run in enumerate(commands) if word in run) for word in ("make book", "make test", "publish.py")
    ]
    assert order == sorted(order)
    assert all("continue-on-error" not in step for step in job["steps"])


def test_containers_install_the_project():
    made = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    target = made["postCreateCommand"].removeprefix("make ")
    assert f"INSTALLED := {target}" in (ROOT / "Makefile").read_text()
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "-e .[book]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert f">={python.removeprefix('python=')}" == project["requires-python"]


def test_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == links.version()
    assert f"## {links.version()} " in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    plain = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert plain - pinned == {project["name"]}  # an extra that takes others along

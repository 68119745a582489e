import re
from pathlib import Path

from pipelines import config
from pipelines.sources import detect

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_every_make_target_that_the_readme_names_exists():
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)\b(?= |`|\n|\))", README)) - {"copies"}
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert {"demo", "test", "ui"} <= named
    assert named <= targets


def test_ci_calls_the_readmes_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert all(f"\nmake {target}\n" in script for target in ("check", "demo", "test"))


def test_every_file_of_the_readmes_tree_is_there_and_every_module_is_in_the_tree():
    tree = README.split("## What is where")[1].split("```")[1]
    folders, named = [], set()
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"(?<![\w-])[\w./]+(?:/|\.py|\.yaml)(?=[ :,]|$)", line.split("  " * 3)[0]) or []:
            path = "".join(folders[:depth]) + name
            assert (ROOT / path).exists(), path
            named.add(path)
            if name.endswith("/"):
                folders[depth:] = [name]
    assert len(named) > 30


def test_the_readme_and_the_code_speak_of_the_project_alone():
    named = (
        "README.md",
        "CONTEXT.md",
        "LOG.md",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        "dagster.yaml",
        ".ci/run",
    )
    code = [f for part in ("pipelines", "trainers", "assets", "benchmarks") for f in ROOT.glob(f"{part}/**/*.py")]
    for file in [*(ROOT / n for n in named), *code]:
        text = file.read_text()
        assert "/work/" not in text, file
        assert "pypi.org" not in text, file
        assert "@@" not in text, file
        assert not re.search(r"\bissue #?\d|\bin this session\b", text), file


def test_the_readmes_configuration_is_one_and_names_every_layout(tmp_path):
    text, *others = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "polyphony.toml").write_text(text)
    loaded = config.load(tmp_path / "polyphony.toml")
    assert [s.name for s in loaded.sources] == ["pickapic", "hpd"]
    assert len(loaded.scorers) == 5
    for other in others:
        (tmp_path / "polyphony.toml").write_text(text + other)
        assert len(config.load(tmp_path / "polyphony.toml").scorers) > 5
    assert (loaded.backbone.family, loaded.images.storage, loaded.suite().column) == ("sd15", "auto", "Prompt")
    assert all(f"| `{layout}` |" in README for layout in detect.LAYOUTS)


def test_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path

"""The site, as far as nbdev alone builds it: every page is processed, and Quarto can read what comes out."""
import json
import re
import shutil
import subprocess

import house
import pytest
import yaml

DOCS = yaml.safe_load((house.ROOT / ".github/workflows/docs.yaml").read_text(encoding="utf-8"))


class Strict(yaml.SafeLoader):
    "Two values for one key are an error, as they are for Quarto."
    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"one key twice: {keys}"
        return super().construct_mapping(node, deep)


def options(cell) -> str:
    "The lines of a code cell that Quarto reads."
    lines = []
    for line in "".join(cell["source"]).splitlines():
        if not line.startswith("#|"): break
        lines.append(line[2:].strip())
    return "\n".join(line for line in lines if re.match(r"[\w-]+:( |$)", line))


def test_two_values_of_one_option_are_seen():
    assert yaml.load("code-fold: true\neval: false", Strict) == {"code-fold": True, "eval": False}
    with pytest.raises(AssertionError, match="twice"):
        yaml.load("code-fold: show\ncode-fold: true", Strict)


def test_the_workflow_lets_nbdev_find_our_processors():
    step = next(step for step in DOCS["jobs"]["build"]["steps"] if step.get("run") == "nbdev-docs")
    assert step["env"] == {"PYTHONPATH": "."}


@pytest.mark.slow
def test_every_page_is_processed(tmp_path):
    "In a copy of the tree, by the command that nbdev-docs begins with."
    copy = tmp_path / "copy"
    for name in ("nbs", "tests", "vae_nb", "benchmarks"):
        left_out = shutil.ignore_patterns("node_modules", "__pycache__", "runs")
        shutil.copytree(house.ROOT / name, copy / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md", "_quarto.yml"):
        shutil.copy(house.ROOT / name, copy)
    done = subprocess.run(["nbdev-proc-nbs", "--n-workers", "2"], cwd=copy, capture_output=True, text=True,
                          env=house.plain_environment(PYTHONPATH="."))
    assert done.returncode == 0, done.stderr[-2000:]
    pages = sorted((copy / "_proc").rglob("*.ipynb"))
    assert len(pages) == len(list((copy / "nbs").rglob("*.ipynb")))
    for page in pages:
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code": continue
            yaml.load(options(cell), Strict)
            text = json.dumps(cell["outputs"])
            assert "__main__." not in text, f"{page.name}: {re.search(r'.{60}__main__.{60}', text)[0]}"

"What the package says of its types, checked by mypy; the configuration is in pyproject.toml."
import subprocess
import sys

import house
import pytest

pytest.importorskip("mypy", reason="mypy is not installed")


def mypy(*arguments):
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=house.ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_types_agree():
    done = mypy()
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_who_uses_the_package_is_checked_against_it(tmp_path):
    "With py.typed, a wrong argument is found in a program that imports the package."
    program = tmp_path / "program.py"
    program.write_text("from vae_nb.plots import slim\nkind, content = slim(3)\n")
    done = mypy("--config-file", "", "--ignore-missing-imports", "--follow-imports", "silent", str(program))
    assert done.returncode == 1 and 'expected "bytes"' in done.stdout, done.stdout + done.stderr

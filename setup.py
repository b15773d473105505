"All that pyproject.toml calls `dynamic`, read from settings.ini (the version comes from vae_nb/__init__.py)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read_string(Path(__file__).with_name("settings.ini").read_text(encoding="utf-8"))
cfg = ini["DEFAULT"]
lines = lambda key: [line for line in cfg[key].splitlines() if line.strip()]
setup(
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "docs", "hub", "onnx", "prior")},
    keywords=cfg["keywords"].split(),
    classifiers=lines("classifiers"),
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["vae_nb = vae_nb._modidx:d"]},
)

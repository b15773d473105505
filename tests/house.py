"""Keep what is generated equal to its source.

python tests/house.py check       say what differs from the notebooks, and change nothing
python tests/house.py readme      write README.md from nbs/index.ipynb
python tests/house.py notebooks   run every notebook, but for cells that need a file which is not at hand
python tests/house.py colab       let every notebook begin with the cell that installs the package where it is missing
python tests/house.py llms        write nbs/llms.txt from the titles and summaries of the pages
python tests/house.py links _docs let the pages for machines on the built site lead to each other, not to notebooks
python tests/house.py card        draw the picture that a link to the site shows, and the site's icon, by the model that is ready
"""
import ast
import contextlib
import difflib
import functools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README_NOTE = "<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook. -->\n\n"


def notebooks(root=ROOT):
    "All notebooks nbdev sees, in order of their path."
    paths = sorted((root / "nbs").rglob("*.ipynb"))
    return [p for p in paths if not any(part[0] in "._" for part in p.relative_to(root).parts)]


def generated(root):
    "Every file that export and clean write, by its path from `root`."
    found = [*(root / "vae_nb").rglob("*.py"), *notebooks(root)]
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in found}


@contextlib.contextmanager
def inside(folder):
    "Work in `folder`, outside of any notebook test."
    before, in_test = Path.cwd(), os.environ.pop("IN_TEST", None)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        if in_test is not None:
            os.environ["IN_TEST"] = in_test


def regenerate(folder, root=ROOT):
    "Copy the notebooks of `root` to `folder`, and clean and export them there, from nothing but the packages' __init__.py."
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    for path in [root / "pyproject.toml", *(root / "vae_nb").rglob("__init__.py"), *notebooks(root)]:
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    with inside(folder):
        nbdev_clean()
        nbdev_export()
    return generated(folder)


def drift(root=ROOT):
    "What differs between the tree and what its notebooks say; an empty list when nothing does."
    with tempfile.TemporaryDirectory() as folder:
        want, have = regenerate(Path(folder).resolve(), root), generated(root)
    if not any(name.endswith(".ipynb") for name in want):
        return [f"{root}: found no notebooks under nbs"]
    return [complaint(name, have.get(name), want.get(name)) for name in sorted(want | have)
            if have.get(name) != want.get(name)]


def complaint(name, have, want):
    "One difference, and the command that mends it."
    if want is None:
        return f"{name}: no notebook exports it; delete it or export it from one"
    if name.endswith(".ipynb"):
        return f"{name}: carries noise; run: nbdev-clean --fname {name}"
    lines = difflib.unified_diff((have or "").splitlines(), want.splitlines(), name, "exported", lineterm="", n=1)
    return "\n".join([f"{name}: is not what the notebooks export; run: nbdev-export", *list(lines)[:12]])


def without_directives(source):
    "Split `#| name: value` lines off the top of a cell: a dictionary of them, and the rest."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    pairs = [line[2:].strip().partition(":") for line in lines[:n]]
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}, "\n".join(lines[n:]).strip("\n")


def from_root(target):
    "A link of nbs/index.ipynb as seen from README.md beside the folder."
    if re.match(r"[a-z][a-z0-9+.-]*:|#|/", target):
        return target
    return posixpath.normpath(posixpath.join("nbs", target))


def for_readme(text):
    "The site's markdown as plain markdown: no Quarto attributes or fences, links from the root. Code stays as it is."
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        part = re.sub(r"^:{3,}.*\n?", "", parts[i], flags=re.M)
        part = re.sub(r"(?<=[)$])[ ]?\{[^{}\n]*\}", "", part)
        part = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + from_root(m[2]), part)
        parts[i] = re.sub(r"\b((?:src|href)=\")([^\"]+)", lambda m: m[1] + from_root(m[2]), part)
    return "".join(parts)


def readme(root=ROOT):
    "README.md as nbs/index.ipynb says it."
    import nbformat
    from nbconvert import MarkdownExporter

    book = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    cells = []
    for cell in book.cells:
        directives, cell.source = without_directives(cell.source)
        if cell.cell_type == "raw" or "hide" in directives:
            continue
        if cell.cell_type == "markdown":
            cell.source = for_readme(cell.source)
        elif directives.get("echo") == "false":
            cell.metadata["tags"] = ["outputs-only"]
        cells.append(cell)
    book.cells, book.metadata["language_info"] = cells, {"name": "python"}
    hide_input = {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["outputs-only"]}}
    body, resources = MarkdownExporter(config=hide_input).from_notebook_node(book)
    if resources.get("outputs"):
        raise ValueError("nbs/index.ipynb: expected pictures as files, ![alt](images/x.png); got one in an output")
    lines = [line.rstrip() for line in body.strip().splitlines()]
    return README_NOTE + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


@functools.cache
def at_hand():
    "Name of each file from outside -> its path, or None where it is not at hand; nothing is downloaded."
    sys.path.insert(0, str(ROOT))
    from vae_nb.data.downloads import FILES, find

    found = dict.fromkeys(FILES)
    for name in FILES:
        with contextlib.suppress(OSError):
            found[name] = find(name, download=False)
    return found


def skipped_cells(root=ROOT):
    "A line for each notebook with cells that begin with the name of a file which is not at hand."
    missing, lines = {name for name, path in at_hand().items() if path is None}, []
    for path in notebooks(root):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        needs = {c["id"]: missing & set(without_directives("".join(c["source"]))[0]) for c in cells}
        if ids := [id for id, names in needs.items() if names]:
            names = sorted(set().union(*needs.values()))
            lines.append(f"{path.relative_to(root).as_posix()}: {', '.join(ids)} (needs {', '.join(names)})")
    return lines


INSTALL = '''#| hide
#| eval: false
# On Colab: install the package this page belongs to. Where it is installed, nothing happens.
import importlib.util

if importlib.util.find_spec("vae_nb") is None:
    %pip install --quiet "vae_nb[hub,onnx,prior] @ git+https://github.com/vae-nb/vae_nb"'''


def installs(cell):
    "Is this the cell that installs the package where it is missing?"
    return "".join(cell["source"]) == INSTALL


def runs(cell):
    "Does a run of the tests include this code cell? `tst_flags` of pyproject.toml name what is left out."
    flags = set(re.search(r'^tst_flags = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1].split())
    said = without_directives("".join(cell["source"]))[0]
    here = {name for name, path in at_hand().items() if path}
    return not (flags - here) & set(said) and said.get("eval") != "false"


def let_colab_install(root=ROOT):
    "Put the cell that installs right after the title of every notebook, and drop a last one that only nbdev could run."
    import nbformat
    for path in notebooks(root):
        book = nbformat.read(path, as_version=4)
        cells = [c for c in book.cells if c.get("id") != "c01ab000" and "nbdev_export()" not in c.source]
        cells.insert(1, nbformat.v4.new_code_cell(INSTALL, id="c01ab000", metadata={}))
        if cells == book.cells: continue
        book.cells = cells
        nbformat.write(book, path)


class Opening:
    """For nbdev, which calls it on every page (`doc_procs` of pyproject.toml): under the title a link to Colab, and then what
    the title's cell goes on to say; nbdev keeps of that cell only the title and the summary."""
    def __init__(self, nb):
        self.nb = nb

    def begin(self):
        from fastcore.nbio import mk_cell
        from nbdev.config import get_config
        from nbdev.doclinks import NbdevLookup
        about, path = get_config(), Path(self.nb.path_).resolve()
        page = path.relative_to(about.config_path.resolve()).as_posix()
        address = f"https://colab.research.google.com/github/{about.user}/{about.repo}/blob/{about.branch}/{page}"
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        rest = re.sub(r"\A# .*\n*(?:> .*\n*)?", "", first)
        words = [f"[Open in Colab]({address}){{.colab}}", NbdevLookup().linkify(rest)]
        self.nb.cells[1:1] = [mk_cell(text, "markdown") for text in words if text]


class SourceUnderItsName:
    """For nbdev, too. Above source that is shown stand the names it defines, in order, each with its sentence: what their
    signatures would say, the source says; methods get the anchors that links to them use. `__main__` is not named. And a
    cell's times go: Quarto boxes a cell that carries data of its own, and leaves headings in boxes out of a page's contents."""
    def __init__(self, nb):
        self.nb = nb

    def begin(self):
        cells = self.nb.cells
        for cell in cells:
            cell.get("metadata", {}).pop("execution", None)
            if documents(cell):   # a class of the page is that of the module
                for output in cell.outputs:
                    for kind, text in output["data"].items():
                        output["data"][kind] = "".join(text).replace("__main__.", "")
        for source in [cell for cell in cells if re.search(r"^#\| *exports", cell.source, re.M)]:
            defined = {node.name: node for node in ast.parse(source.source).body if hasattr(node, "name")}
            docs = {documents(cell): cell for cell in cells if documents(cell) in defined}
            for name, cell in docs.items():
                cells.remove(cell)
                amend(cell, defined[name], folded="code-fold: true" in source.source)
            at = cells.index(source)
            cells[at:at] = [docs[name] for name in defined if name in docs]


class Asserted:
    "For nbdev, too: after a cell whose `# checks:` names equations of its page, links to them."
    def __init__(self, nb):
        self.nb = nb

    def begin(self):
        from fastcore.nbio import mk_cell
        cells = self.nb.cells
        here = set(re.findall(r"\{#(eq-[\w-]+)", "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")))
        for at in reversed(range(len(cells))):
            names = re.search(r"^# checks: (.+)", cells[at].source, re.M) if cells[at].cell_type == "code" else None
            links = [f"([-@{name}])" for name in re.findall(r"eq-[\w-]+", names[1]) if name in here] if names else []
            if links:
                cells.insert(at + 1, mk_cell(f"[this asserts {', '.join(links)}]{{.asserted}}", "markdown"))


def documents(cell):
    "The name of the function, class or method that a cell documents, or None."
    found = re.search(r"^show_doc\((?:\w+\.)*(\w+)\)", cell.source, re.M)
    return found and found[1]


def amend(cell, node, folded):
    "Leave of a documented name its heading and sentence, unless its source is folded; add anchors of its methods."
    methods = [step.name for step in node.body if isinstance(step, ast.FunctionDef) and step.name[0] != "_"]
    anchors = "".join(f"[]{{#{node.name}.{name}}}".lower() for name in methods if isinstance(node, ast.ClassDef))
    for output in cell.outputs:
        text = output["data"]["text/markdown"]
        if not folded:
            text = re.sub(r"```python\n.*?```\n*", "", text, count=1, flags=re.S)
        output["data"]["text/markdown"] = f"{text}\n\n{anchors}".strip()


def pages_of(contents):
    "The notebooks of a sidebar, section by section: (section or None, path)."
    for item in contents:
        if isinstance(item, dict):
            yield from ((item["section"], page) for _, page in pages_of(item["contents"]))
        else:
            yield None, item


def llms(root=ROOT):
    "nbs/llms.txt: what the site is, and a line for each page, in the order of the sidebar (llmstxt.org)."
    import yaml
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    said = {key: re.search(rf'^{key} = "(.*)"', project, re.M)[1] for key in ("name", "description", "Documentation")}
    lines, last = [f"# {said['name']}", "", f"> {said['description']}"], ""
    for section, page in pages_of(site["website"]["sidebar"]["contents"]):
        if section != last:
            lines += ["", f"## {section or 'Start here'}", ""]
            last = section
        opening = json.loads((root / "nbs" / page).read_text(encoding="utf-8"))["cells"][0]["source"]
        found = re.match(r"# (.+?)\n+> (.+)", "".join(opening))
        if not found:
            raise ValueError(f"{page}: expected a title and one line of summary, # Title, > summary; got {opening[:2]}")
        title, summary = found.groups()
        lines.append(f"- [{title}]({said['Documentation']}/{for_machines(page)}): {summary}")
    return "\n".join(lines) + "\n"


def for_machines(page):
    "The address of a notebook's page in Markdown: nbdev drops the number."
    return re.sub(r"(^|/)\d+[a-zA-Z0-9]*_", r"\1", page).replace(".ipynb", ".html.md")


def link_machines(site):
    "In every page for machines of a built site, links to notebooks become links to their pages for machines."
    for path in Path(site).rglob("*.html.md"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(?<=\]\()(?!\w+:)[^)\s]+\.ipynb(?=[)#])", lambda link: for_machines(link[0]), text)
        path.write_text(text, encoding="utf-8")


def card(root=ROOT):
    "Draw nbs/images/card.jpg and icon.png: what the ready model makes of scenes it has never seen."
    import torch
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont

    from vae_nb.analysis.generate import decode_all, encode_all
    from vae_nb.data.dataset import to_float
    from vae_nb.data.scenes import scenes
    from vae_nb.export import load_pretrained
    from vae_nb.plots import grid
    model = load_pretrained("scenes")
    with torch.no_grad():
        x_hat = decode_all(model, encode_all(model, to_float(scenes(40, size=model.size, seed=2024)[0])))
    wall = Image.new("RGB", (1280, 640))
    wall.paste(grid(x_hat, columns=10, pad=0).resize((1280, 512), Image.Resampling.LANCZOS))
    pen = ImageDraw.Draw(wall)
    pen.rectangle((0, 512, 1280, 640), fill=(12, 18, 24))
    for text, size, y in (("vae_nb", 52, 516), ("A variational autoencoder you can read", 32, 580)):
        pen.text((48, y), text, "white", ImageFont.truetype(findfont("DejaVu Sans:bold"), size))
    wall.save(root / "nbs/images/card.jpg", quality=88)
    grid(x_hat[:1], pad=0).resize((64, 64), Image.Resampling.LANCZOS).save(root / "nbs/images/icon.png")


def plain_environment(**more):
    "This process's environment without what a surrounding make put there; this tree's package comes first."
    drop = {"VENV", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHONPATH"}
    return {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONPATH": str(ROOT)} | more


def build(kind, folder, root=ROOT):
    "Build a \"wheel\" or an \"sdist\" of the package into `folder`, without a network; its path."
    with tempfile.TemporaryDirectory() as source:
        for name in ["settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]:
            shutil.copy(root / name, source)
        shutil.copytree(root / "vae_nb", Path(source) / "vae_nb", ignore=shutil.ignore_patterns("__pycache__"))
        return build_from(source, kind, folder)


def build_from(source, kind, folder):
    "The same, from a tree that is already alone."
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    return Path(folder) / done.stdout.split()[-1]


def run_notebooks():
    "Run every notebook, two at a time, with the cells whose files are at hand."
    from nbdev.test import nbdev_test

    for line in skipped_cells():
        print(f"skipped: {line}")
    with inside(ROOT):
        nbdev_test(flags=" ".join(name for name, path in at_hand().items() if path), n_workers=2, timing=True)


def check():
    "Print every difference; the exit status is 1 when there is one."
    found = drift()
    if not (ROOT / "nbs/index.ipynb").exists():
        found.append("nbs/index.ipynb: README.md is made from it, and it is not there")
    elif (ROOT / "README.md").read_text(encoding="utf-8") != readme():
        found.append("README.md: is not what nbs/index.ipynb says; run: make readme")
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    command = sys.argv[1:]
    if command == ["check"]:
        sys.exit(check())
    if command == ["notebooks"]:
        sys.exit(run_notebooks())
    if command == ["colab"]:
        sys.exit(let_colab_install())
    if command == ["card"]:
        sys.exit(card())
    if command[:1] == ["links"] and len(command) == 2:
        sys.exit(link_machines(command[1]))
    if command == ["llms"]:
        sys.exit((ROOT / "nbs/llms.txt").write_text(llms(), encoding="utf-8") and None)
    if command != ["readme"]:
        sys.exit(__doc__)
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")

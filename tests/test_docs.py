"""Every public name says what it does, and of each parameter what it is: a shape where it is a tensor.

Public are the functions and classes in a module's `__all__`. A parameter that is one of our own classes is described there.
"""
import importlib
import inspect
import pkgutil
import re

from fastcore.docments import docments
from torch import Tensor

import vae_nb

SHAPE = re.compile(r"\(.*\)|same shape|scalar")


def public():
    "(module.name, object) of every function and class that the package offers."
    for module in pkgutil.walk_packages(vae_nb.__path__, "vae_nb."):
        offered = importlib.import_module(module.name)
        for name in getattr(offered, "__all__", []):
            thing = inspect.unwrap(getattr(offered, name))
            if inspect.isfunction(thing) or inspect.isclass(thing):
                yield f"{module.name}.{name}", thing


def missing(thing):
    "What it does not say."
    if not inspect.getdoc(thing):
        yield "a docstring"
    for name, method in inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else ():
        if name in vars(thing) and name[0] != "_" and name != "forward" and not inspect.getdoc(method):
            yield f"a docstring of {name}"
    if inspect.isclass(thing) and "__init__" not in vars(thing) and not hasattr(thing, "__dataclass_fields__"):
        return
    said = docments(thing, full=True)
    for name, parameter in inspect.signature(thing).parameters.items():
        kind, text = str(parameter.annotation), (said.get(name) or {}).get("docment")
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if "Tensor" in kind and not (text and SHAPE.search(text)):
            yield f"the shape of {name}"
        elif not text and "vae_nb." not in kind:
            yield f"what {name} is"
    if inspect.isfunction(thing):
        given = said.get("return") or {}
        if "Tensor" in str(given.get("anno")) and not SHAPE.search(given.get("docment") or ""):
            yield "the shape of what it returns"


def short():
    "module.name and what is missing there, for every public name that does not say all."
    return {name: lacks for name, thing in public() if (lacks := list(missing(thing)))}


def test_public_names_say_what_they_are():
    assert "\n".join(f"{name} lacks {', '.join(lacks)}" for name, lacks in short().items()) == ""


def test_the_rule_finds_what_is_missing():
    def half(x: Tensor,    # an image
             y: Tensor,    # (B,D)
             seed: int):
        "Does something."
    assert list(missing(half)) == ["the shape of x", "what seed is"]
    def whole(x: Tensor,        # (B,D)
              ) -> Tensor:      # nats
        "Does something."
    assert list(missing(whole)) == ["the shape of what it returns"]
    class Holder:
        "Holds."
        def get(self): return 1
    assert list(missing(Holder)) == ["a docstring of get"]
    assert len(dict(public())) > 200


def test_signatures_on_the_site_show_no_addresses():
    "A default that prints its place in memory would change with every build."
    from nbdev.showdoc import show_doc
    shown = [show_doc(thing)._repr_markdown_() for _, thing in public()]
    assert len(shown) > 200 and not [text for text in shown if " at 0x" in text or "__main__" in text]

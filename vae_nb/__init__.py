__version__ = "0.1.0"


def __getattr__(name):
    "What a script needs first, imported when it is asked for: the class VAE, the function load_images, the package train."
    from importlib import import_module
    if name == "VAE":
        return import_module("vae_nb.model.vae").VAE
    if name == "load_images":
        return import_module("vae_nb.data.dataset").load
    if name == "train":
        return import_module("vae_nb.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Images in: what a text need not show. Killed and concurrent builds, hostile files, odd depths, named sets, full disks."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae_nb.data import cache
from vae_nb.data import downloads as named_sets
from vae_nb.data import images as pictures
from vae_nb.data.dataset import ImageStore, batches, epoch_order_and_flips, load, read_images, split, to_float

def quiet(text): pass


def picture(seed, size=24, mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode)


def encoded(seed, format="PNG", **kwargs):
    file = io.BytesIO()
    picture(seed, **kwargs).save(file, format)
    return file.getvalue()


def folder_of(root, count, **kwargs):
    root.mkdir(parents=True)
    for i in range(count):
        (root / f"{i:04d}.png").write_bytes(encoded(i, **kwargs))
    return root


def zip_of(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def partials(root): return [p.name for p in root.glob("*.vae_nb-partial")]


def start(code, **kwargs):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=Path(__file__).parents[1], **kwargs)


SLOW = """
import time
from vae_nb.data import dataset as data
fast = data.decode
data.decode = lambda *args: (time.sleep(0.02), fast(*args))[1]
store = data.load({source!r}, size=32, cache={root!r})
print(len(store), int(store.images.sum()))
"""


# --- the cache ---------------------------------------------------------------------------------------------------

def test_a_killed_build_leaves_nothing_behind(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 400), tmp_path / "cache"
    child = start(SLOW.format(source=str(source), root=str(root)))
    deadline = time.time() + 30
    while not any(p.stat().st_size > 20_000 for p in root.glob("*.vae_nb-partial/images.u8")):
        assert child.poll() is None and time.time() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(partials(root)) == 1
    store = load(source, size=32, cache=root, progress=quiet)
    assert len(store) == 400 and partials(root) == []
    assert torch.equal(store.images[7], torch.tensor(pictures.decode(picture(7), 32)))


def test_two_processes_build_one_cache(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 100), tmp_path / "cache"
    children = [start(SLOW.format(source=str(source), root=str(root))) for _ in range(2)]
    results = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert results[0][0] == results[1][0] and results[0][0].startswith("100 ")
    assert partials(root) == [] and len([p for p in root.iterdir() if not p.name.startswith(".")]) == 1


def test_threads_build_one_cache(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 60), tmp_path / "cache"
    stores, said = [], []
    threads = [threading.Thread(target=lambda: stores.append(load(source, 32, cache=root, progress=said.append)))
               for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(stores) == 4 and all(torch.equal(stores[0].images, s.images) for s in stores)
    assert partials(root) == []


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    source, root = folder_of(tmp_path / "pictures", 5), tmp_path / "cache"
    monkeypatch.setattr("vae_nb.data.dataset.json.dumps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(source, size=8, cache=root, progress=quiet)
    assert [p for p in root.iterdir() if not p.name.startswith(".")] == []


def caches(root): return {p.name for p in root.iterdir() if not p.name.startswith(".")}


def test_whatever_changes_the_pixels_makes_a_new_cache_and_nothing_else_does(tmp_path, monkeypatch):
    source, root = folder_of(tmp_path / "pictures", 4), tmp_path / "cache"
    def build(folder=source, **kwargs): return load(folder, **{"size": 8, "cache": root, "progress": quiet, **kwargs})
    first = build()
    monkeypatch.setattr("vae_nb.data.dataset.decode", lambda *_: pytest.fail("decoded again"))
    assert build().path == first.path and build(seed=7).path == first.path and build(n=4).path == first.path
    source = source.rename(tmp_path / "moved")
    with pytest.raises(BaseException, match="decoded again"):
        build(source)  # the label is another, as people look for it; the key is the same
    monkeypatch.undo()
    moved = build(source)
    assert moved.path.name.rpartition("-")[2] == first.path.name.rpartition("-")[2] and moved.digest == first.digest
    seen = {moved.path}
    def is_new(store): return store.path not in seen and not seen.add(store.path)
    times = os.stat(source / "0001.png").st_mtime_ns
    longer = encoded(99) + b"\0" * 100
    (source / "0001.png").write_bytes(longer)
    os.utime(source / "0001.png", ns=(times, times))
    changed = build(source)
    assert is_new(changed) and not torch.equal(changed.images[1], moved.images[1]) and changed.digest != moved.digest
    (source / "0001.png").write_bytes(encoded(98) + b"\0" * (len(longer) - len(encoded(98))))
    os.utime(source / "0001.png", ns=(times, times + 10**9))
    again = build(source)
    assert is_new(again) and not torch.equal(again.images[1], changed.images[1])
    (source / "0000.png").rename(source / "9999.png")
    assert is_new(build(source)) and build(source).names[-1] == "9999.png"
    (source / "zzzz.png").write_bytes(encoded(5))
    assert is_new(build(source)) and is_new(build(source, size=9))
    two = build(source, n=2)
    assert is_new(two) and is_new(build(source, n=3)) and is_new(build(source, n=2, seed=1))
    assert build(source, n=2).path == two.path
    monkeypatch.setattr("vae_nb.data.images.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    assert is_new(build(source))
    monkeypatch.setattr("vae_nb.data.images._formats", lambda: ["PNG"])
    assert is_new(build(source))


def test_scenes_are_known_by_their_version(tmp_path, monkeypatch):
    def path(**kwargs): return load("scenes", **{"size": 8, "n": 3, "cache": tmp_path, "progress": quiet, **kwargs}).path
    first = path()
    monkeypatch.setattr("vae_nb.data.scenes.__file__", str(tmp_path / "scenes_with_a_comment.py"))
    (tmp_path / "scenes_with_a_comment.py").write_text("# a comment")
    assert path() == first and len({first, path(seed=1), path(n=2), path(size=9)}) == 4
    monkeypatch.setattr("vae_nb.data.scenes.SCENES_VERSION", 2)
    assert path() != first


def test_a_damaged_cache_is_built_again(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 3), tmp_path / "cache"
    store = load(source, size=8, cache=root, progress=quiet)
    expected = store.images.clone()
    for damage in (lambda p: os.truncate(p / "images.u8", 100), lambda p: (p / "meta.json").write_text("{"),
                   lambda p: (p / "meta.json").unlink()):
        damage(store.path)
        assert torch.equal(load(source, size=8, cache=root, progress=quiet).images, expected)


def test_the_cache_is_mapped_read_only(tmp_path):
    source = folder_of(tmp_path / "pictures", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = load(source, size=8, cache=tmp_path / "cache", progress=quiet)
    assert store.images.sum() > 0
    if Path("/proc/self/maps").exists():  # a writable private mapping needs memory for all of it
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(store.path) in line]
        assert lines and all(line.split()[1].startswith("r-") for line in lines)


def test_a_home_is_a_home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    folder_of(home / "pictures", 2)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("VAE_NB_CACHE", "~/cache")
    monkeypatch.chdir(tmp_path)
    store = load("~/pictures", size=8, progress=quiet)
    assert store.path.parent == home / "cache" and store.source == "pictures" and not list(tmp_path.glob("~*"))
    assert load("~/pictures", size=8, cache="~/other", progress=quiet).path.parent == home / "other"
    (home / "files").mkdir()
    (home / "files" / "mnist.npz").write_bytes(b"digits")
    monkeypatch.setenv("VAE_NB_FILES", "~/files")
    assert named_sets.find("mnist") == named_sets.find("mnist", "~/files/mnist.npz") == home / "files" / "mnist.npz"


def test_where_the_cache_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("VAE_NB_CACHE", raising=False)
    assert cache.cache_root() == tmp_path / "x" / "vae_nb"
    monkeypatch.setenv("VAE_NB_CACHE", str(tmp_path / "v"))
    assert cache.cache_root() == tmp_path / "v" and cache.cache_root("here") == Path("here")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("VAE_NB_CACHE")
    assert cache.cache_root() == Path.home() / ".cache" / "vae_nb"


def test_an_unwritable_cache_names_the_folder_and_the_remedy(tmp_path):
    source = folder_of(tmp_path / "pictures", 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".locks").write_text("")
    for root in (tmp_path / "file" / "cache", tmp_path / "root"):
        with pytest.raises(OSError, match=r"cannot write the image cache in .*(file/cache|root) .*VAE_NB_CACHE") as caught:
            load(source, size=8, cache=root, progress=quiet)
        assert str(caught.value).count("cannot write") == 1


def test_a_source_that_cannot_be_read_is_no_fault_of_the_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file.*gone"), cache.explain_write_errors(tmp_path / "cache"):
        open(tmp_path / "gone")


def test_too_little_room_is_seen_before_the_work(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "pictures", 2)
    monkeypatch.setattr("vae_nb.data.dataset.shutil.disk_usage", lambda _: type("U", (), dict(free=100)))
    with pytest.raises(OSError, match=r"cannot write the image cache in .*needs 0.00 GB.*VAE_NB_CACHE"):
        load(source, size=8, cache=tmp_path / "cache", progress=quiet)


def test_a_disk_that_fills_up_names_the_folder_and_leaves_nothing(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 40), tmp_path / "cache"
    code = f"""
import resource
from vae_nb.data.dataset import load
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try: load({str(source)!r}, size=32, cache={str(root)!r})
except OSError as error: print(error)
"""
    out, err = start(code).communicate(timeout=60)
    assert f"cannot write the image cache in {root}" in out and "VAE_NB_CACHE" in out, (out, err)
    assert [p for p in root.iterdir() if not p.name.startswith(".")] == []


def test_memory_does_not_grow_with_the_set_and_imports_stay_light(tmp_path, outside):
    code = f"""
import resource, sys
from vae_nb.data.dataset import load
heavy = {{"pyarrow", "huggingface_hub", "nbdev", "wandb", "lpips", "matplotlib", "IPython"}} & set(sys.modules)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = load({str(outside('emoji'))!r}, cache={str(tmp_path)!r})
print(len(store), len(heavy), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    out, err = start(code).communicate(timeout=60)
    images, heavy, grown = map(int, out.split())
    assert (images, heavy) == (3583, 0), err
    assert grown < 90, f"{grown} MB more for a set of 176 MB"  # MB; about 30 are measured, for threads and Pillow


# --- damaged and hostile files -----------------------------------------------------------------------------------

def test_damaged_archives_and_arrays_raise_nothing_but_value_errors(tmp_path):
    rng = np.random.default_rng(1)
    zip_of(tmp_path / "a.zip", {f"{i}.png": encoded(i) for i in range(3)})
    np.savez_compressed(tmp_path / "b.npz", images=rng.integers(0, 256, (4, 8, 8), dtype=np.uint8))
    np.save(tmp_path / "c.npy", rng.integers(0, 256, (4, 8, 8), dtype=np.uint8))
    outcomes = {"read": 0, "refused": 0}
    for name in ("a.zip", "b.npz", "c.npy"):
        data = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for trial in range(60):
            broken = data.copy()
            if trial % 3 == 0:
                broken = broken[:rng.integers(0, len(data))]
            else:
                at = rng.integers(0, len(data) if trial % 3 == 1 else min(len(data), 100), 4)
                broken[at] ^= rng.integers(1, 256, 4).astype(np.uint8)
            path = tmp_path / f"broken-{trial}{Path(name).suffix}"
            path.write_bytes(broken.tobytes())
            try:
                load(path, size=8, cache=tmp_path / "cache", progress=quiet)
                outcomes["read"] += 1
            except ValueError as error:
                assert path.name in str(error)
                outcomes["refused"] += 1
    assert outcomes["read"] > 5 and outcomes["refused"] > 60, outcomes
    assert partials(tmp_path / "cache") == []


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 10_000)
    monkeypatch.setattr(pictures, "_MAX_PIXELS", 1000)
    files = {"big.png": b"\0" * 20_000, "many.png": encoded(0, size=40), "good.png": encoded(1, size=10)}
    store = load(zip_of(tmp_path / "a.zip", files), size=8, cache=tmp_path / "cache", progress=quiet)
    assert store.names == ["good.png"]
    assert [(n, "bomb" in why) for n, why in store.skipped] == [("big.png", True), ("many.png", True)]


def test_links_pipes_hidden_files_and_other_files(tmp_path):
    root = folder_of(tmp_path / "pictures", 2)
    folder_of(root / "sub" / "deeper", 1)
    folder_of(root / ".hidden", 1)
    folder_of(root / "__MACOSX", 1)
    (root / "._0000.png").write_bytes(b"resource fork")
    (root / "sub" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "broken.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / "notes.TXT").write_text("x")
    (root / "labels.csv").write_text("x")
    (root / "README").write_text("x")
    store = load(root, size=8, cache=tmp_path / "cache", progress=quiet)
    assert store.names == ["0000.png", "0001.png", "sub/deeper/0000.png"]
    reasons = dict(store.skipped)
    assert reasons["pipe.png"] == "not a regular file" and "No such file" in reasons["broken.png"]
    assert set(reasons) == {"pipe.png", "broken.png"}
    assert store.other == {".txt": 1, ".csv": 1, "no suffix": 2}  # README, and the link to itself
    assert "4 other files ignored" in str(store) and "\n" not in str(store)


def test_names_that_are_no_text(tmp_path):
    root = folder_of(tmp_path / "pictures", 1)
    with open(os.fsencode(root) + b"/\xff\xfe.png", "wb") as file:
        file.write(encoded(5))
    (root / "zero\n.png").write_bytes(b"")
    store = load(root, size=8, cache=tmp_path / "cache", progress=quiet)
    again = load(root, size=8, cache=tmp_path / "cache", progress=quiet)
    assert len(store) == 2 and store.names == again.names and str(store).encode()
    assert len(split(store.names)[1]) == 1


def test_a_source_without_a_readable_image_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable image in empty: it is empty"):
        load(tmp_path / "empty", cache=tmp_path / "cache", progress=quiet)
    (tmp_path / "empty" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "empty" / "b.csv").write_bytes(b"1,2")
    with pytest.raises(ValueError, match=r"1 skipped: a.png \(not an image .*1 other file ignored \(.csv x1\)"):
        load(tmp_path / "empty", cache=tmp_path / "cache", progress=quiet)
    assert [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")] == []


def test_sources_that_are_none_and_settings_that_make_no_sense(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x")
    for source, text in ((tmp_path / "nowhere", "no such file or folder"), (tmp_path / "a.tar", r"a \.tar")):
        with pytest.raises(ValueError, match=rf"{text}; expected a folder, a \.zip.* or one of scenes, emoji, fluent, afhq"):
            load(source, cache=tmp_path)
    for wrong in (dict(size=0), dict(size=8.5), dict(n=0), dict(n=-3)):
        with pytest.raises(ValueError, match="expected a whole number above 0"):
            load(tmp_path, cache=tmp_path, **wrong)


def test_a_choice_is_spread_over_the_set_and_says_of_how_many(tmp_path):
    for kind in "ab":
        folder_of(tmp_path / "pictures" / kind, 5)
    source, root = tmp_path / "pictures", tmp_path / "cache"
    def some(n, **kwargs): return load(source, size=8, n=n, cache=root, progress=quiet, **kwargs)
    five = some(5)
    assert {name[0] for name in five.names} == {"a", "b"} and five.names == sorted(five.names) and five.total == 10
    assert str(five).startswith("5 of 10 images of 8x8 from pictures; cached")
    assert set(some(3).names) < set(five.names) and some(5, seed=1).names != five.names
    assert five.names == ["a/0001.png", "a/0002.png", "b/0000.png", "b/0001.png", "b/0004.png"]
    everything = some(1000)
    assert len(everything) == 10 and str(everything).startswith("10 images of 8x8")
    for name, image in zip(five.names, five.images):
        assert torch.equal(image, everything.images[everything.names.index(name)])


def test_a_few_images_need_no_cache_and_no_other_is_read(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "pictures", 30)
    whole = load(source, size=8, cache=tmp_path / "cache", progress=quiet).images
    monkeypatch.setenv("VAE_NB_CACHE", str(tmp_path / "none"))
    read, inner = [], pictures.open_image
    monkeypatch.setattr(pictures, "open_image", lambda file: read.append(Path(file).name) or inner(file))
    few = read_images([source, source / "0007.png"], 8, n=3, progress=quiet)
    assert few.dtype == torch.uint8 and len(read) == 3 and not (tmp_path / "none").exists()
    assert torch.equal(few, torch.stack([whole[0], whole[15], whole[7]]))
    from vae_nb.data import scenes
    rendered = []
    monkeypatch.setattr(scenes, "render", lambda f, *args: rendered.append(len(f)) or torch.zeros(len(f), 3, 8, 8).byte())
    assert len(read_images(["scenes"], 8, n=4, progress=quiet)) == 4 and rendered == [4]
    (source / "0003.png").write_bytes(b"")
    said = []
    assert len(read_images([source], 8, progress=said.append)) == 29 and "0003.png (empty file)" in said[0]
    with pytest.raises(ValueError, match="no readable image in 0003.png"):
        read_images([source / "0001.png", source / "0003.png"], 8)
    for wrong in (dict(n=0), dict(size=0)):
        with pytest.raises(ValueError, match="whole number above 0"):
            read_images([source], **{"size": 8, **wrong})


def test_what_was_skipped_is_said_once_by_name(tmp_path):
    source, said = folder_of(tmp_path / "pictures", 3), []
    (source / "0002.png").write_bytes(b"")
    store = load(source, size=8, cache=tmp_path / "cache", progress=said.append)
    assert said == ["pictures: 1 skipped: 0002.png (empty file)"] and "0002" not in str(store) and "1 skipped" in str(store)


# --- depth -------------------------------------------------------------------------------------------------------

def masks(kind):
    x = np.zeros((3, 8, 8), kind)
    x[:, 2:6, 2:6] = 1
    return x


@pytest.mark.parametrize("kind", [np.uint8, np.bool_])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_array_of_ones_is_black_and_white(tmp_path, kind, suffix):
    path, said = tmp_path / f"masks.{suffix}", []
    np.save(path, masks(kind)) if suffix == "npy" else np.savez_compressed(path, images=masks(kind))
    store = load(path, size=8, cache=tmp_path / "cache", progress=said.append)
    assert torch.equal(store.images[:, 0], torch.from_numpy(masks(np.uint8) * 255)) and "largest value is 1" in said[0]
    again = []
    load(path, size=8, cache=tmp_path / "cache", progress=again.append)
    assert again == said  # from the cache, too
    x = masks(np.uint8)
    x[2, 3, 3] = 7  # the last picture says that these are no masks
    np.savez(path, x) if suffix == "npz" else np.save(path, x)
    assert load(path, size=8, cache=tmp_path / "cache", progress=said.append).images.max() == 7
    assert "largest pixel value is 7 of 255, nearly black" in said[-1]


def test_other_tiny_ranges_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 8, 8), 1 / 255))  # divided by 255 twice
    said = []
    load(tmp_path / "a.npy", size=8, cache=tmp_path / "cache", progress=said.append)
    assert "largest pixel value is 1 of 255" in said[0]
    said.clear()
    np.save(tmp_path / "a.npy", np.full((2, 8, 8), 0.5))
    load(tmp_path / "a.npy", size=8, cache=tmp_path / "cache", progress=said.append)
    assert said == []


def grey_folder(root, kind, *values, format="png"):
    root.mkdir()
    for i, value in enumerate(values):
        Image.fromarray(np.full((8, 8), value, kind)).save(root / f"{i}.{format}")
    return root


@pytest.mark.parametrize("values, expected, said", [
    ((4095, 1024), (255, 64), "reach 4,095: 4,095"), ((1023, 512, 0), (255, 128, 0), "reach 1,023"),
    ((255, 128), (255, 128), "reach 255"), ((65535, 257), (255, 1), None), ((32768, 100), (128, 0), None)])
@pytest.mark.parametrize("format", ["png", "tif"])
def test_sixteen_bits_are_scaled_for_the_set_as_a_whole(tmp_path, values, expected, said, format):
    lines = []
    source = grey_folder(tmp_path / "grey", np.uint16, *values, format=format)
    store = load(source, size=8, cache=tmp_path / "cache", progress=lines.append)
    assert [int(x.max()) for x in store.images] == list(expected)
    assert said in lines[0] if said else lines == []
    assert torch.equal(read_images([source], 8, progress=quiet), store.images)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_every_mode_of_sixteen_bits(mode):
    image = Image.frombytes("I;16", (2, 2), np.full(4, 2048, "<u2").tobytes())
    if mode == "I;16B":
        image = Image.frombytes(mode, (2, 2), np.full(4, 2048, ">u2").tobytes())
    elif mode == "I":
        image = Image.fromarray(np.full((2, 2), 2048, np.int32))
    assert pictures.high_bit_depth_max(image) == ("I", 2048)
    assert pictures._to_rgb(image, 4095).getpixel((0, 0)) == (128,) * 3
    assert pictures._to_rgb(image, 65535).getpixel((0, 0)) == (8,) * 3


def test_floats_are_scaled_for_the_set_as_a_whole(tmp_path):
    source = grey_folder(tmp_path / "grey", np.float32, 200, 1, 0.5, format="tif")
    assert [int(x.max()) for x in load(source, 8, cache=tmp_path / "cache", progress=quiet).images] == [200, 1, 0]
    source = grey_folder(tmp_path / "ones", np.float32, 1, 0.5, format="tif")
    assert [int(x.max()) for x in load(source, 8, cache=tmp_path / "cache", progress=quiet).images] == [255, 128]


# --- decoders ----------------------------------------------------------------------------------------------------

def test_heic_names_what_it_needs_and_is_tried_again_when_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    pictures._register_plugins.cache_clear()
    source, root = folder_of(tmp_path / "pictures", 1), tmp_path / "cache"
    (source / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"pretended" * 9)
    (source / "photo.jxl").write_bytes(b"\xff\x0a" + b"pretended" * 9)
    store = load(source, size=8, cache=root, progress=quiet)
    assert dict(store.skipped) == {"photo.heic": "needs the package pillow-heif",
                                   "photo.jxl": "needs the package pillow-jxl-plugin"}

    class Heif:
        @staticmethod
        def register_heif_opener():
            def accept(head): return head[4:12] == b"ftypheic"
            def open_(file, name): return Image.new("RGB", (8, 8), "red")
            Image.register_open("HEIF", open_, accept)
            Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", Heif)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    for registry in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, registry, dict(getattr(Image, registry)))
    pictures._register_plugins.cache_clear()
    try:
        store = load(source, size=8, cache=root, progress=quiet)
        assert store.names == ["0000.png", "photo.heic"] and store.images[1, :, 0, 0].tolist() == [255, 0, 0]
    finally:
        pictures._register_plugins.cache_clear()


def test_truncated_images_are_tried_again_when_they_may_be(tmp_path, monkeypatch):
    source, root = folder_of(tmp_path / "pictures", 1), tmp_path / "cache"
    data = encoded(3, "JPEG", size=64)
    (source / "cut.jpg").write_bytes(data[:len(data) // 2])
    assert load(source, size=8, cache=root, progress=quiet).names == ["0000.png"]
    monkeypatch.setattr(pictures.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert load(source, size=8, cache=root, progress=quiet).names == ["0000.png", "cut.jpg"]


# --- shape -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(60, 20), (20, 60), (61, 20), (20, 21)])
def test_the_crop_is_the_middle(size):
    w, h = size
    x = np.zeros((h, w, 3), np.uint8)
    x[..., 0], x[..., 1] = np.arange(w), np.arange(h)[:, None]
    side = min(w, h)
    left, top = (w - side) // 2, (h - side) // 2
    got = pictures.decode(Image.fromarray(x), side)
    assert np.array_equal(got, x[top:top + side, left:left + side].transpose(2, 0, 1))


@pytest.mark.parametrize("side", [100, 200, 380, 400, 800])
def test_a_jpeg_is_shrunk_while_decoding_only_where_three_pixels_are_left_for_one(side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    image, plain = Image.open(file), Image.open(file)
    got = pictures.decode(image, 32)
    expected = np.asarray(pictures._square(plain.convert("RGB"), 32)).transpose(2, 0, 1)
    kept = max(-(-side // k) for k in (1, 2, 4, 8) if k == 1 or side // k >= 96)
    assert image.size[0] == min(-(-side // k) for k in (1, 2, 4, 8) if k == 1 or side // k >= 96) <= kept
    assert abs(got.astype(int) - expected).mean() < 1.2


# --- arrays ------------------------------------------------------------------------------------------------------

def test_array_layouts_agree(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    def read(array, **kwargs):
        np.save(tmp_path / "a.npy", array)
        return load(tmp_path / "a.npy", size=12, cache=tmp_path / "cache", progress=quiet, **kwargs).images
    expected = torch.from_numpy(x).permute(0, 3, 1, 2)
    assert torch.equal(read(x), expected)
    assert torch.equal(read(x.transpose(0, 3, 1, 2)), expected)
    for dtype in ("f2", "f4", "f8", ">f4"):
        assert torch.equal(read((x / 255).astype(dtype)), expected)
    grey = expected[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(read(x[..., 0]), grey) and torch.equal(read(x[..., :1]), grey)
    opaque = np.concatenate([x, np.full_like(x[..., :1], 255)], -1)
    assert torch.equal(read(opaque), expected) and (read(opaque * 0) == 255).all()
    assert torch.equal(read(x[:1, ..., 0]), grey[:1])  # one picture
    assert torch.equal(read(x, n=2), expected[[int(name[-6:]) for name in load(
        tmp_path / "a.npy", 12, 2, cache=tmp_path / "cache", progress=quiet).names]])


@pytest.mark.parametrize("array, text", [
    (np.zeros((1965, 560), "u1"), r"reshape\(1965, H, W\) with H\*W = 560"),
    (np.zeros((1, 1965, 560), "u1"), r"reshape\(1965, H, W\)"),
    (np.zeros((512, 500), "u1"), r"one picture\? Then save x\[None\]"),
    (np.zeros((5, 8, 8), "i8"), "dtype int64"),
    (np.full((5, 8, 8), -1.0), r"floats from -1 to -1, expected \[0,1\]"),
    (np.full((5, 8, 8), np.nan), "floats from nan"),
    (np.zeros((5, 8, 8, 2), "u1"), r"expected \(M,H,W\)"),
    (np.zeros((0, 8, 8), "u1"), "holds no image"),
    (np.array([{}, 1], dtype=object), "pickle"),
    (np.asfortranarray(np.zeros((5, 8, 9), "u1")), "Fortran order"),
])
def test_arrays_that_are_no_images(tmp_path, array, text):
    for path, save in ((tmp_path / "a.npy", np.save), (tmp_path / "a.npz", lambda p, x: np.savez(p, x=x))):
        save(path, array)
        with pytest.raises(ValueError, match=text) as caught:
            load(path, size=8, cache=tmp_path / "cache", progress=quiet)
        assert path.name in str(caught.value)


def test_which_array_of_several(tmp_path):
    path, images = tmp_path / "a.npz", np.zeros((3, 8, 8), "u1")
    def source(**arrays):
        np.savez(path, **arrays)
        return load(path, size=8, cache=tmp_path / "cache", progress=quiet).source
    assert "[train_images," in source(labels=np.zeros(3), x=images, train_images=images)
    assert "[pictures, read as (M,H,W)]" in source(labels=np.zeros(3), pictures=images)
    with pytest.raises(ValueError, match=r"no array is clearly the images; found: a \(3, 8, 8\), b"):
        source(a=images, b=images)


def test_mnist_and_frey_faces(tmp_path, outside):
    digits, faces = outside("mnist"), outside("freyfaces")
    store = load(digits, size=28, n=500, cache=tmp_path, progress=quiet)
    chosen = [int(name[-6:]) for name in store.names]
    assert len(chosen) == 500 and store.total == 60_000 and chosen == sorted(chosen) and chosen[-1] > 50_000
    expected = torch.from_numpy(np.load(digits)["train_images"][chosen])
    assert torch.equal(store.images, expected[:, None].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="1965 flat images of 560 values"):
        load(faces, cache=tmp_path, progress=quiet)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "Nothing lies outside, unless a test says so"
    monkeypatch.delenv("VAE_NB_FILES", raising=False)


# --- named sets --------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    "A folder that $VAE_NB_FILES names"
    (tmp_path / "some files").mkdir()
    monkeypatch.setenv("VAE_NB_FILES", str(tmp_path / "some files"))
    return tmp_path / "some files"


@pytest.fixture
def small(monkeypatch):
    "The set `emoji`, cut to three pictures of our own"
    files = {f"emoji_{i}.png": encoded(i) for i in range(3)}
    cut = dataclasses.replace(named_sets.NAMED["emoji"], count=3, digest=named_sets._digest_of(files))
    monkeypatch.setitem(named_sets.NAMED, "emoji", cut)
    return files


@pytest.mark.parametrize("name, count, what", [("emoji", 3583, "noto-emoji@b3e3051"), ("fluent", 3390, "fluentui-emoji@62ecdc0")])
def test_a_set_at_hand_is_the_pinned_one(tmp_path, files, outside, name, count, what):
    path = outside(name)
    (files / path.name).symlink_to(path)
    source = named_sets.NAMED[name].open(tmp_path / "cache")
    assert len(source.names) == count and what in source.title and not (tmp_path / "cache").exists()
    assert named_sets.find(name) == files / path.name
    assert pictures.decode(next(source.images([count - 1]))(), 8).shape == (3, 8, 8)


def served(monkeypatch, data):
    "Let the web answer with these bytes; how often it was asked"
    asked = []
    def fetch(url, path, *args, **kwargs):
        asked.append(url)
        if data is None:
            raise OSError("no route to host")
        Path(path).write_bytes(data)
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    return asked


def test_of_a_downloaded_archive_only_the_pictures_are_kept(tmp_path, small, monkeypatch):
    top = "noto-emoji-b3e3051a088047d19fd4d49b1c3ac42fb8c3aaf8/"
    others = {top + "png/512/emoji_0.png": b"x", top + "README.md": b"x", top + "third_party/png/128x/e.png": b"x"}
    data = zip_of(tmp_path / "all.zip", {top + "png/128/" + k: v for k, v in small.items()} | others).read_bytes()
    asked = served(monkeypatch, data)
    store = load("emoji", size=8, cache=tmp_path / "cache", progress=quiet)
    assert store.names == list(small) and partials(tmp_path / "cache") == [] and asked == [named_sets.NAMED["emoji"].url]
    kept = [p.name for p in next((tmp_path / "cache").glob("emoji-*/emoji.zip")).parent.iterdir()]
    assert kept == ["emoji.zip"]
    assert load("emoji", size=8, cache=tmp_path / "cache", progress=quiet).path == store.path and len(asked) == 1


def test_fluent_from_the_web_is_known_by_its_commit(tmp_path, monkeypatch):
    fluent = named_sets.NAMED["fluent"]
    assets = "fluentui-emoji-62ecdc0/assets/"
    path = zip_of(tmp_path / "all.zip", {assets + f"{a}/3D/{a}_3d.png": encoded(i) for i, a in enumerate("ab")}
                  | {assets + "a/Flat/a_flat.png": encoded(5)})
    for comment, fine in ((b"", False), (b"0" * 40, False), (fluent.revision.encode(), True)):
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
        served(monkeypatch, path.read_bytes())
        if fine:
            assert load("fluent", size=8, cache=tmp_path / "cache", progress=quiet).names == ["a_3d.png", "b_3d.png"]
        else:
            with pytest.raises(ValueError, match="does not hold the set 'fluent'"):
                load("fluent", size=8, cache=tmp_path / "cache", progress=quiet)


def test_a_file_at_hand_that_holds_something_else(tmp_path, files, small):
    path = files / "noto-emoji-128.zip"
    for data, text in ((b"<html>not found</html>", "not a readable zip archive"),
                       ({"emoji_0.png": b"x"}, "expected 3 pictures with digest .* found 1"),
                       (small | {"emoji_2.png": encoded(7)}, "expected 3 pictures .* found 3")):
        zip_of(path, data) if isinstance(data, dict) else path.write_bytes(data)
        with pytest.raises(ValueError, match=text) as caught:
            load("emoji", size=8, cache=tmp_path / "cache", progress=quiet)
        assert path.name in str(caught.value) and not list((tmp_path / "cache").glob("emoji*"))


@pytest.mark.parametrize("data", [None, b"PK but no more"])
def test_a_download_that_fails_names_the_url_the_cause_and_the_ways_out(tmp_path, monkeypatch, data):
    served(monkeypatch, data)
    words = "does not hold", "readable zip"
    if data is None:
        words = named_sets.NAMED["emoji"].url, "no route to host", "VAE_NB_FILES", "noto-emoji-128.zip", "folder", "'scenes'"
    with pytest.raises((OSError, ValueError)) as caught:
        load("emoji", cache=tmp_path, progress=quiet)
    assert any(word in str(caught.value) for word in words) if data else all(word in str(caught.value) for word in words)
    assert not list(tmp_path.glob("emoji*"))


def test_offline_hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError) as caught:
        load("afhq", cache=tmp_path, progress=quiet)
    for word in ("https://huggingface.co/datasets/zzsi/afhq512_16k", "VAE_NB_FILES", "afhq/*.parquet", "'scenes'"):
        assert word in str(caught.value)


def write_shard(path, rows, column="image", **kwargs):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    labels = [0] * len(rows)
    pq.write_table(pa.table({column: rows, "label": labels}), path, **kwargs)


def test_afhq_from_parquet_shards(tmp_path, files, monkeypatch):
    monkeypatch.setitem(named_sets.NAMED, "afhq", dataclasses.replace(named_sets.NAMED["afhq"], count=70))
    data = [encoded(i, "JPEG" if i % 2 else "PNG") for i in range(70)]
    data[5] = b"damaged"
    rows = [dict(bytes=d, path=None) for d in data]
    write_shard(files / "afhq" / "train-00000-of-00002.parquet", rows[:40], row_group_size=16)
    write_shard(files / "afhq" / "train-00001-of-00002.parquet", rows[40:])
    store = load("afhq", size=16, cache=tmp_path / "cache", progress=quiet)
    assert len(store) == 69 and store.skipped == [("000005", "not an image Pillow can read")]
    assert store.names[0] == "000000" and store.names[-1] == "000069" and "afhq" in store.source
    assert torch.equal(store.images[-2], torch.tensor(pictures.decode(picture(68), 16)))
    few = load("afhq", size=16, n=9, cache=tmp_path / "cache", progress=quiet)
    for name, image in zip(few.names, few.images):
        assert torch.equal(image, store.images[store.names.index(name)])


def test_afhq_that_is_not_afhq(tmp_path, files):
    shard = files / "afhq" / "train-00000-of-00001.parquet"
    rows = [dict(bytes=encoded(0), path="a.png")]
    write_shard(shard, rows)
    with pytest.raises(ValueError, match="expected 14,630 images, found 1 in 1 parquet files"):
        load("afhq", cache=tmp_path / "cache", progress=quiet)
    write_shard(shard, rows, column="picture")
    with pytest.raises(ValueError, match="expected a column 'image', found picture, label"):
        load("afhq", cache=tmp_path / "cache", progress=quiet)
    shard.write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="train-00000-of-00001.parquet: not a readable parquet file"):
        load("afhq", cache=tmp_path / "cache", progress=quiet)


def test_afhq_through_the_hub_library(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(named_sets.NAMED, "afhq", dataclasses.replace(named_sets.NAMED["afhq"], count=3))
    snapshot = tmp_path / "snapshots" / "0123456789abcdef"
    calls = []
    def snapshot_download(repo, **kwargs):
        calls.append((repo, kwargs["repo_type"], kwargs["allow_patterns"], kwargs.get("local_files_only", False)))
        if not kwargs.get("local_files_only"):  # an earlier download had stopped half way
            write_shard(snapshot / "data" / "train-00001-of-00002.parquet", [dict(bytes=encoded(2), path=None)])
        return str(snapshot)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    snapshot.mkdir(parents=True)
    write_shard(snapshot / "data" / "train-00000-of-00002.parquet", [dict(bytes=encoded(i), path=None) for i in (0, 1)])
    write_shard(snapshot / "data" / "val-00000-of-00001.parquet", [dict(bytes=encoded(9), path=None)])
    store = load("afhq", size=8, cache=tmp_path / "cache", progress=quiet)
    assert len(store) == 3 and "zzsi/afhq512_16k@0123456789ab" in store.source
    assert [c[3] for c in calls] == [True, False] and calls[0][:3] == ("zzsi/afhq512_16k", "dataset", "data/train-*.parquet")
    load("afhq", size=8, cache=tmp_path / "cache", progress=quiet)
    assert [c[3] for c in calls] == [True, False, True]


@pytest.mark.parametrize("module", ["pyarrow.parquet", "huggingface_hub"])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "vae_nb\[hub\]"'):
        load("afhq", cache=tmp_path, progress=quiet)


# --- batches -----------------------------------------------------------------------------------------------------

def test_an_interrupted_epoch_goes_on_exactly():
    images = torch.randint(0, 256, (53, 3, 8, 8), dtype=torch.uint8)
    index = torch.randperm(53)[:47]
    for drop_last in (False, True):
        whole = list(batches(images, index, 6, epoch=3, seed=5, drop_last=drop_last))
        assert len(whole) == (7 if drop_last else 8)
        for begin in range(len(whole) + 1):
            rest = list(batches(images, index, 6, epoch=3, seed=5, start=begin, drop_last=drop_last))
            assert len(rest) == len(whole) - begin and all(map(torch.equal, rest, whole[begin:]))


def test_an_epoch_shows_every_image_once_and_epochs_and_seeds_differ():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    def seen(**kwargs): return torch.cat([x[:, 0, 0, 0] for x in batches(images, torch.arange(40), 7, **kwargs)])
    runs = [seen(epoch=e, seed=s) for e in range(3) for s in range(3)]
    assert all(torch.equal(r.sort().values, to_float(torch.arange(40, dtype=torch.uint8))) for r in runs)
    assert all((a != b).sum() > 20 for i, a in enumerate(runs) for b in runs[:i])  # no two orders are alike
    assert torch.equal(seen(epoch=1, seed=2), seen(epoch=1, seed=2))


def test_orders_and_splits_are_what_they_were():
    "A resumed run, and a score on held-out images, rely on these numbers."
    perm, flips = epoch_order_and_flips(8, epoch=2, seed=3)
    assert (perm.tolist(), flips.int().tolist()) == ([6, 4, 2, 0, 1, 5, 3, 7], [1, 1, 0, 0, 0, 1, 0, 1])
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog", "é") for i in range(40)]
    assert split(names)[1].tolist() == [0, 15, 32, 37, 58] and split(names, 0.5)[1].tolist()[:8] == [0, 1, 3, 4, 6, 8, 9, 12]
    assert [part.tolist() for part in split(["a", "b", "c"])] == [[1, 2], [0]]


@pytest.mark.parametrize("share", [(0, 1), (0, 2), (1, 2)])
def test_a_flip_mirrors_left_and_right_and_is_drawn_anew(share):
    one = torch.zeros(3, 4, 4, dtype=torch.uint8)
    one[0, 1, 0] = one[1, 2, 1] = 200  # no symmetry of any kind
    mirrored = torch.tensor(np.asarray(one)[:, :, ::-1].copy())
    images, patterns = one.expand(48, 3, 4, 4), []
    for epoch in range(3):
        for x in batches(images, torch.arange(48), 16, epoch=epoch, share=share):
            same = [torch.equal(y, to_float(one)) for y in x]
            assert all(a != torch.equal(y, to_float(mirrored)) for a, y in zip(same, x))
            patterns.append(tuple(same))
    assert len(set(patterns)) == 9 and 0.3 < np.mean(patterns) < 0.7
    assert all(torch.equal(x, to_float(images[:len(x)])) for x in batches(images, torch.arange(48), 16, flip=False, share=share))


def test_batches_reject_what_makes_no_sense():
    images, index = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10)
    for wrong in (dict(batch_size=0), dict(batch_size=4, start=4), dict(batch_size=4, start=-1),
                  dict(batch_size=11, drop_last=True)):
        with pytest.raises(ValueError, match="batch_size|start"):
            batches(images, index, **wrong)
    with pytest.raises(ValueError, match="expected uint8"):
        next(batches(images.float(), index, 4))


def test_a_store_describes_itself_in_one_line():
    store = ImageStore(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], [(f"{i}.png", "empty file") for i in range(9)])
    assert "2 images of 8x8" in str(store) and "9 skipped" in str(store)
    assert repr(store).startswith("ImageStore(2 images") and len(store) == 2

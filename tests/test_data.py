"""Images in: what a text need not show. Killed and concurrent builds, damaged and hostile files, mirrors, full disks."""

import dataclasses
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae_nb.data import cache
from vae_nb.data import downloads as named_sets
from vae_nb.data import images as pictures
from vae_nb.data import images as sources
from vae_nb.data.dataset import ImageStore, batches, load, split, to_float

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


def partials(root): return [p.name for p in root.glob("*.vae_nb-partial-*")]


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
    while not any(p.stat().st_size > 20_000 for p in root.glob("*.vae_nb-partial-*/images.u8")):
        assert child.poll() is None and time.time() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(partials(root)) == 1
    store = load(source, size=32, cache=root, progress=quiet)
    assert len(store) == 400 and partials(root) == []
    assert torch.equal(store.images[7], torch.tensor(pictures.decode(picture(7), 32)))


def test_another_build_sweeps_what_a_killed_one_left_and_spares_a_live_one(tmp_path):
    root = tmp_path / "cache"
    (root / "dead-1.vae_nb-partial-1-1").mkdir(parents=True)
    (root / "live-1.vae_nb-partial-1-1").mkdir()
    (root / "somebody's.partial-1").mkdir()
    with cache._lock(root / ".locks" / "live-1") as held:
        assert held
        load(folder_of(tmp_path / "pictures", 2), size=8, cache=root, progress=quiet)
    assert partials(root) == ["live-1.vae_nb-partial-1-1"] and (root / "somebody's.partial-1").exists()


def test_two_processes_build_one_cache(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 100), tmp_path / "cache"
    children = [start(SLOW.format(source=str(source), root=str(root))) for _ in range(2)]
    results = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert results[0][0] == results[1][0] and results[0][0].startswith("100 ")
    assert partials(root) == [] and len([p for p in root.iterdir() if not p.name.startswith(".")]) == 1


@pytest.mark.parametrize("locks", [True, False])
def test_threads_build_one_cache_with_and_without_locks(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(cache, "fcntl", None)
    source, root = folder_of(tmp_path / "pictures", 60), tmp_path / "cache"
    stores, said = [], []
    threads = [threading.Thread(target=lambda: stores.append(load(source, 32, cache=root, progress=said.append)))
               for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(stores) == 4 and all(torch.equal(stores[0].images, s.images) for s in stores)
    assert partials(root) == []


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    source, root = folder_of(tmp_path / "pictures", 5), tmp_path / "cache"
    monkeypatch.setattr("vae_nb.data.dataset.json.dumps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(source, size=8, cache=root, progress=quiet)
    assert [p for p in root.iterdir() if not p.name.startswith(".")] == []


def test_a_changed_picture_is_seen_at_once_and_a_touched_one_is_not_decoded_again(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 3), tmp_path / "cache"
    def caches(): return sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    def build(): return load(source, size=8, cache=root, progress=quiet)
    first = build()
    data = bytearray((source / "0001.png").read_bytes())
    times = os.stat(source / "0001.png")
    other = encoded(99)
    (source / "0001.png").write_bytes(other + b"\0" * max(0, len(data) - len(other)))
    os.utime(source / "0001.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    second = build()
    assert not torch.equal(first.images[1], second.images[1]) and len(caches()) == 2
    for path in source.iterdir():
        os.utime(path, (1e9, 1e9))
    build()
    assert len(caches()) == 2
    (source / "0000.png").rename(source / "9999.png")
    assert build().names[-1] == "9999.png" and len(caches()) == 3


def test_digests_of_settled_files_are_remembered(tmp_path, monkeypatch):
    source, root = folder_of(tmp_path / "pictures", 3), tmp_path / "cache"
    monkeypatch.setattr(cache.time, "time_ns", lambda: 2**62)
    first = load(source, size=8, cache=root, progress=quiet)
    monkeypatch.setattr(cache, "_file_digest", lambda path: pytest.fail("read again"))
    assert torch.equal(load(source, size=8, cache=root, progress=quiet).images, first.images)


def test_a_damaged_cache_is_built_again(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 3), tmp_path / "cache"
    store = load(source, size=8, cache=root, progress=quiet)
    expected = store.images.clone()
    for damage in (lambda p: os.truncate(p / "images.u8", 100), lambda p: (p / "meta.json").write_text("{"),
                   lambda p: (p / "meta.json").unlink()):
        damage(store.path)
        assert torch.equal(load(source, size=8, cache=root, progress=quiet).images, expected)


def test_writing_to_the_tensor_does_not_reach_the_cache(tmp_path, recwarn):
    source, root = folder_of(tmp_path / "pictures", 2), tmp_path / "cache"
    load(source, size=8, cache=root, progress=quiet).images.zero_()
    assert load(source, size=8, cache=root, progress=quiet).images.any() and not recwarn.list


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

def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0")


def _chunk(kind, data):
    import zlib
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bad_files(rng, count=200):
    "Truncated, bit-flipped, empty, mislabelled and huge; name -> bytes"
    kinds = [("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("WEBP", "webp"), ("TIFF", "tif"), ("BMP", "bmp")]
    for i in range(count):
        format, suffix = kinds[i % len(kinds)]
        data = encoded(i, format)
        match i // len(kinds) % 5:
            case 0: data = data[:rng.integers(1, len(data) // 2)]
            case 1:
                flipped = np.frombuffer(data, np.uint8).copy()
                at = rng.integers(0, min(len(data), 60), 12)
                flipped[at] ^= rng.integers(1, 256, 12).astype(np.uint8)
                data = flipped.tobytes()
            case 2: data = b""
            case 3: data = rng.integers(0, 256, 500, dtype=np.uint8).tobytes()
            case 4: data = png_header(int(rng.integers(20_000, 2**31 - 1)), 60_000) + _chunk(b"IDAT", b"x")
        yield f"bad_{i:03d}.{suffix}", data


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_bad_files_are_reported_and_their_neighbours_kept(tmp_path, kind):
    bad = dict(bad_files(np.random.default_rng(0)))
    good = {f"{c}.png": encoded(1000 + i) for i, c in enumerate("abcxyz")}
    if kind == "zip":
        source = zip_of(tmp_path / "pictures.zip", bad | good)
    else:
        (source := tmp_path / "pictures").mkdir()
        for name, data in (bad | good).items():
            (source / name).write_bytes(data)
    said = []
    store = load(source, size=16, cache=tmp_path / "cache", progress=said.append)
    skipped = dict(store.skipped)
    assert set(store.names) | set(skipped) == set(bad | good) and set(good) <= set(store.names)
    survivors = set(store.names) - set(good)  # a flipped bit may leave a picture that decodes
    assert all(int(name[4:7]) // 6 % 5 == 1 for name in survivors) and len(skipped) >= 160
    assert all(reason and "0x" not in reason and "\n" not in reason for reason in skipped.values())
    assert skipped["bad_012.png"] == "empty file" and "bomb" in skipped["bad_024.png"]
    assert any("skipped: bad_" in line for line in said) and "skipped: bad_" in str(store)
    for name, image in zip(store.names, store.images):
        if name in good:
            expected = pictures.decode(picture(1000 + "abcxyz".index(name[0])), 16)
            assert torch.equal(image, torch.tensor(expected))


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
    monkeypatch.setattr(sources, "MAX_BYTES", 10_000)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
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
        with pytest.raises(ValueError, match=rf"{text}; expected a folder, a \.zip.* or one of scenes, emoji, afhq"):
            load(source, cache=tmp_path)
    for wrong in (dict(size=0), dict(size=8.5), dict(n=0), dict(n=-3)):
        with pytest.raises(ValueError, match="expected a whole number above 0"):
            load(tmp_path, cache=tmp_path, **wrong)


def test_the_first_n_by_name(tmp_path):
    source, root = folder_of(tmp_path / "pictures", 30), tmp_path / "cache"
    (source / "0002.png").write_bytes(b"")
    five = load(source, size=8, n=5, cache=root, progress=quiet)
    assert five.names == [f"{i:04d}.png" for i in (0, 1, 3, 4, 5)] and five.skipped == [("0002.png", "empty file")]
    everything = load(source, size=8, n=1000, cache=root, progress=quiet)
    assert len(everything) == 29 and everything.path == load(source, size=8, cache=root, progress=quiet).path
    one = load(source / "0007.png", size=8, cache=root, progress=quiet)
    assert one.names == ["0007.png"] and torch.equal(one.images[0], everything.images[6])


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
    assert torch.equal(read(x, n=2), expected[:2])


@pytest.mark.parametrize("array, text", [
    (np.zeros((1965, 560), "u1"), r"reshape\(1965, H, W\) with H\*W = 560"),
    (np.zeros((1, 1965, 560), "u1"), r"reshape\(1965, H, W\)"),
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
    expected = torch.from_numpy(np.load(digits)["train_images"][:500])
    assert torch.equal(store.images, expected[:, None].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="1965 flat images of 560 values"):
        load(faces, cache=tmp_path, progress=quiet)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "Nothing lies outside, unless a test says so"
    monkeypatch.delenv("VAE_NB_FILES", raising=False)


# --- named sets --------------------------------------------------------------------------------------------------

@pytest.fixture
def mirrored(tmp_path, monkeypatch):
    (tmp_path / "a mirror").mkdir()
    monkeypatch.setenv("VAE_NB_MIRROR", str(tmp_path / "a mirror"))
    return tmp_path / "a mirror"


@pytest.fixture
def small(monkeypatch):
    "The set `emoji`, cut to three pictures of our own"
    files = {f"emoji_{i}.png": encoded(i) for i in range(3)}
    cut = dataclasses.replace(named_sets.NAMED["emoji"], count=3, digest=named_sets.digest_of(files))
    monkeypatch.setitem(named_sets.NAMED, "emoji", cut)
    return files


def test_emoji_from_a_mirror_is_the_pinned_set(tmp_path, mirrored, monkeypatch, outside):
    (mirrored / "emoji.zip").symlink_to(outside("emoji"))
    store = load("emoji", size=32, cache=tmp_path / "cache", progress=quiet)
    assert len(store) == 3583 and "b3e3051" in store.source
    monkeypatch.delenv("VAE_NB_MIRROR")
    monkeypatch.setattr(named_sets.urllib.request, "urlopen", lambda *_, **__: pytest.fail("downloaded again"))
    assert load("emoji", size=32, cache=tmp_path / "cache", progress=quiet).path == store.path


def test_emoji_from_the_whole_archive_keeps_only_the_pictures(tmp_path, mirrored, small, monkeypatch):
    top = "noto-emoji-b3e3051a088047d19fd4d49b1c3ac42fb8c3aaf8/"
    others = {top + "png/512/emoji_0.png": b"x", top + "README.md": b"x", top + "third_party/png/128x/e.png": b"x"}
    zip_of(mirrored / "emoji.zip", {top + "png/128/" + k: v for k, v in small.items()} | others)
    monkeypatch.setenv("VAE_NB_MIRROR", mirrored.as_uri())
    store = load("emoji", size=8, cache=tmp_path / "cache", progress=quiet)
    assert store.names == list(small) and partials(tmp_path / "cache") == []
    kept = [p.name for p in next((tmp_path / "cache").glob("emoji-*/emoji.zip")).parent.iterdir()]
    assert kept == ["emoji.zip"]


def test_a_mirror_that_holds_something_else(tmp_path, mirrored, small):
    for data, text in ((None, "could not fetch"), (b"<html>not found</html>", "not a readable zip archive"),
                       ({"emoji_0.png": b"x"}, "expected 3 pictures with digest .* found 1"),
                       (small | {"emoji_2.png": encoded(7)}, "expected 3 pictures .* found 3")):
        if isinstance(data, dict):
            zip_of(mirrored / "emoji.zip", data)
        elif data:
            (mirrored / "emoji.zip").write_bytes(data)
        with pytest.raises((ValueError, OSError), match=text) as caught:
            load("emoji", size=8, cache=tmp_path / "cache", progress=quiet)
        assert "emoji.zip" in str(caught.value)
        assert not list((tmp_path / "cache").glob("emoji*"))


@pytest.mark.parametrize("cut", [0, 100])
def test_emoji_over_http(tmp_path, small, monkeypatch, cut):
    data = zip_of(tmp_path / "all.zip", small).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/sets/emoji.zip" else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:len(data) - cut])

        def log_message(self, *args): pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("VAE_NB_MIRROR", f"http://127.0.0.1:{server.server_port}/sets/")
        if cut:
            with pytest.raises(OSError, match="could not fetch"):
                load("emoji", size=8, cache=tmp_path / "cache", progress=quiet)
            assert not list((tmp_path / "cache").glob("emoji*"))
        else:
            assert len(load("emoji", size=8, cache=tmp_path / "cache", progress=quiet)) == 3
        server.shutdown()


def test_offline_the_error_names_the_url_the_cause_and_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.delenv("VAE_NB_MIRROR", raising=False)
    def offline(*_, **__): raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(named_sets.urllib.request, "urlopen", offline)
    with pytest.raises(OSError) as caught:
        load("emoji", cache=tmp_path, progress=quiet)
    for word in (named_sets.NAMED["emoji"].url, "no route to host", "VAE_NB_MIRROR", "emoji.zip", "folder", "'scenes'"):
        assert word in str(caught.value)
    assert not list(tmp_path.glob("emoji*"))


def test_offline_hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("pyarrow")
    monkeypatch.delenv("VAE_NB_MIRROR", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError) as caught:
        load("afhq", cache=tmp_path, progress=quiet)
    for word in ("https://huggingface.co/datasets/zzsi/afhq512_16k", "VAE_NB_MIRROR", "afhq/*.parquet", "'scenes'"):
        assert word in str(caught.value)


def write_shard(path, rows, column="image", **kwargs):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    labels = [0] * len(rows)
    pq.write_table(pa.table({column: rows, "label": labels}), path, **kwargs)


def test_afhq_from_parquet_shards(tmp_path, mirrored, monkeypatch):
    monkeypatch.setitem(named_sets.NAMED, "afhq", dataclasses.replace(named_sets.NAMED["afhq"], count=70))
    data = [encoded(i, "JPEG" if i % 2 else "PNG") for i in range(70)]
    data[5] = b"damaged"
    rows = [dict(bytes=d, path=None) for d in data]
    write_shard(mirrored / "afhq" / "train-00000-of-00002.parquet", rows[:40], row_group_size=16)
    write_shard(mirrored / "afhq" / "train-00001-of-00002.parquet", rows[40:])
    store = load("afhq", size=16, cache=tmp_path / "cache", progress=quiet)
    assert len(store) == 69 and store.skipped == [("000005", "not an image Pillow can read")]
    assert store.names[0] == "000000" and store.names[-1] == "000069" and "afhq" in store.source
    assert torch.equal(store.images[-2], torch.tensor(pictures.decode(picture(68), 16)))


def test_afhq_that_is_not_afhq(tmp_path, mirrored, monkeypatch):
    shard = mirrored / "afhq" / "train-00000-of-00001.parquet"
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
    monkeypatch.setenv("VAE_NB_MIRROR", "http://localhost:9")
    with pytest.raises(ValueError, match="HF_ENDPOINT"):
        load("afhq", cache=tmp_path / "cache", progress=quiet)


def test_afhq_through_the_hub_library(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("VAE_NB_MIRROR", raising=False)
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
    monkeypatch.delenv("VAE_NB_MIRROR", raising=False)
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
    assert len({tuple(r.tolist()) for r in runs}) == 9 and torch.equal(seen(epoch=1, seed=2), seen(epoch=1, seed=2))


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
    assert "2 images of 8x8" in str(store) and "9 skipped: 0.png (empty file)" in str(store)
    assert "and 4 more" in str(store) and repr(store).startswith("ImageStore(2 images") and len(store) == 2

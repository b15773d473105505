"""Bad input in bulk: nothing crashes or hangs, every skipped file is named, every good neighbour is kept."""
import io
import os
import signal
import socket
import struct
import zipfile
import zlib
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, features

from vae_nb.data import images
from vae_nb.data.dataset import load
from vae_nb.data.images import decode

FORMATS = dict(png="PNG", jpg="JPEG", gif="GIF", tif="TIFF", bmp="BMP", ppm="PPM",
               **({"webp": "WEBP"} if features.check("webp") else {}),
               **({"jp2": "JPEG2000"} if features.check("jpg_2000") else {}))
DEEP = {"I": np.int32, "I;16": np.uint16, "F": np.float32}
ODD = ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", *DEEP]


@cache
def picture(seed, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    if mode in DEEP: return Image.fromarray((noise[..., 0].astype(np.float64) * 300).astype(DEEP[mode]))
    if mode in ("PA", "LAB", "HSV"): return Image.new(mode, (10, 12))
    return Image.fromarray(noise).convert(mode)


@cache
def encoded(seed, suffix):
    file = io.BytesIO()
    picture(seed).save(file, FORMATS[suffix])
    return file.getvalue()


def cut(rng, data): return data[:rng.integers(1, len(data))]
def empty(rng, data): return b""
def noise(rng, data): return rng.bytes(int(rng.integers(1, 400)))
def text(rng, data): return b"<html><body>404 not found</body></html>"
def doubled(rng, data): return data[:len(data) // 2] + data


def flipped(rng, data):
    data = np.frombuffer(data, np.uint8).copy()
    at = rng.integers(0, len(data), rng.integers(1, 12))
    data[at] ^= (1 << rng.integers(0, 8, len(at))).astype(np.uint8)
    return data.tobytes()


def head_flipped(rng, data): return flipped(rng, data[:40]) + data[40:]


def huge(rng, data):
    "Headers that promise more pixels than there is memory."
    w, h = (int(n) for n in rng.integers(30_000, 2**31 - 1, 2))
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return [b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"x"),
            b"P6 %d %d 255\n" % (w, h), b"P5 %d %d 65535\n\0" % (w, h),
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, w % 2**31, h % 2**31, 1, 24, 0, 0, 1, 1, 0, 0),
            b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b",",
            ][rng.integers(5)]


def other_mode(rng, data):
    "Modes that pictures rarely have, and values that no picture should have."
    mode = ODD[rng.integers(len(ODD))]
    x = picture(int(rng.integers(20)), mode)
    if mode == "F": x = Image.fromarray(np.float32([[np.nan, -1e30, np.inf, 7]]) * np.ones((4, 1), np.float32))
    file = io.BytesIO()
    for format in ("PNG", "TIFF", "JPEG"):
        try:
            x.save(file, format)
            return file.getvalue()
        except (OSError, ValueError): file = io.BytesIO()
    return b""


HARM = [cut, flipped, head_flipped, noise, text, empty, huge, other_mode, doubled]


def bad_files(count, seed=0):
    "(name, bytes): each kind of harm in each format, in turn; every ninth round under the name of another format"
    rng, suffixes = np.random.default_rng(seed), list(FORMATS)
    for i in range(count):
        suffix = suffixes[i // len(HARM) % len(suffixes)]
        name = suffixes[i % len(suffixes)] if i % 9 == 8 else suffix
        yield f"bad_{i:04d}.{name}", HARM[i % len(HARM)](rng, encoded(int(rng.integers(20)), suffix))


GOOD = {f"good_{i}.{suffix}": encoded(100 + i, suffix) for i, suffix in enumerate(FORMATS)}
DISGUISED = {"good_a.png": encoded(7, "jpg"), "good_b.jpg": encoded(8, "png"), "good_c.gif": encoded(9, "bmp")}


@contextmanager
def deadline(seconds):
    "A hang is a failure, too."
    def late(*_): raise TimeoutError(f"not done after {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(store, names, good):
    "Every file is kept or named with a reason; the good ones are kept as they are."
    skipped = dict(store.skipped)
    assert len(skipped) == len(store.skipped) and not skipped.keys() & set(store.names)
    assert skipped.keys() | set(store.names) == set(names)
    assert all(why and "\n" not in why and " at 0x" not in why for why in skipped.values())
    for name, data in good.items():
        expected = torch.tensor(decode(Image.open(io.BytesIO(data)), 8))
        assert torch.equal(store.images[store.names.index(name)], expected), name
    str(store).encode()
    return skipped


@pytest.mark.parametrize("kind, count", [
    ("folder", 200), ("zip", 100), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("folder", 2000), ("zip", 500)))])
def test_bad_files_in_bulk(tmp_path, kind, count):
    files = {**dict(bad_files(count, seed=count)), **GOOD, **DISGUISED}
    if kind == "zip":
        source = tmp_path / "pictures.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        (source := tmp_path / "pictures").mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
    with deadline(300):
        store = load(source, size=8, cache=tmp_path / "cache", progress=lambda text: None)
    skipped = check(store, files, {**GOOD, **DISGUISED})
    harm = {name: HARM[int(name[4:8]) % len(HARM)].__name__ for name in files if name.startswith("bad_")}
    kept = {kind: sum(name not in skipped for name in harm if harm[name] == kind) for kind in set(harm.values())}
    assert len(harm) == count and all(kept[kind] == 0 for kind in ("noise", "text", "empty", "huge")), kept
    assert 0 < kept["flipped"] and 0 < kept["other_mode"] <= count / len(HARM), kept  # a flipped bit may leave a picture


def test_a_folder_that_is_a_trap(tmp_path, monkeypatch):
    "Links in circles, links to nowhere, pipes, sockets, folders called .png, names that are no text, files that may not be read."
    source = os.fsencode(tmp_path / "trap")
    os.makedirs(os.path.join(source, b"sub", b"folder.png"))
    path = lambda *parts: os.path.join(source, *parts)
    names = [b"caf\xe9.png", b"\xff\xfe.png", b"new\nline.png", b"tab\t.png", "日本.png".encode(), b"a" * 251 + b".png",
             b"sub/deep.png"]
    for name in names:
        with open(path(name), "wb") as file:
            file.write(encoded(3, "png"))
    links = {b"itself.png": b"itself.png", b"there.png": b"back.png", b"back.png": b"there.png", b"nowhere.png": b"/no/such/file",
             b"device.png": b"/dev/zero", b"sub/loop": b"..", b"sub/again": b"../sub", b"sub/more": b"/proc/self/cwd/nothing"}
    for name, target in links.items():
        os.symlink(target, path(name))
    os.mkfifo(path(b"pipe.png"))
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(source)                 # a socket's path must be short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
    with open(path(b"locked.png"), "wb") as file:
        file.write(encoded(3, "png"))
    os.chmod(path(b"locked.png"), 0)
    if os.geteuid() == 0:                # root may read everything: pretend
        inner = images.open_image
        def locked(name):
            if "locked" in str(name): raise PermissionError(13, "Permission denied")
            return inner(name)
        monkeypatch.setattr(images, "open_image", locked)
    with deadline(300):
        store = load(tmp_path / "trap", size=8, cache=tmp_path / "cache", progress=lambda text: None)
    good = {os.fsdecode(name): encoded(3, "png") for name in names}
    bad = [os.fsdecode(name) for name in links if name.endswith(b".png")] + ["pipe.png", "socket.png", "locked.png"]
    skipped = check(store, [*good, *bad], good)
    assert skipped["locked.png"] == "Permission denied" and "symbolic links" in skipped["itself.png"]
    assert skipped["pipe.png"] == skipped["device.png"] == "not a regular file"
    assert skipped["nowhere.png"] == "No such file or directory"
    again = load(tmp_path / "trap", size=8, cache=tmp_path / "cache", progress=lambda text: None)
    assert again.names == store.names and again.skipped == store.skipped

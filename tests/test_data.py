"""Images are read as they are meant, no case is in two parts, and the cache cannot be stale."""
import json
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import program, texture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.app import Fail, safe_name
from ldm.data import (PROPORTIONS, Cache, Patch, describe_split, list_images, load_rgb,
                      make_split, note_equal_images, read_dataset, read_split, resize_crop, save_image,
                      split_patches, to_images, to_tensor)
from train import describe

GREY = np.add.outer(np.arange(20), np.arange(30)).astype(np.uint16)

def pixels(path):
    return np.asarray(load_rgb(path))

# ---- images ------------------------------------------------------------------------------------------------

def test_an_exif_rotation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112] = 6                                    # turned by a quarter
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_rgb(tmp_path / "x.jpg").size == (20, 40)

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_and_what_is_opaque_is_itself(mode, tmp_path):
    image = Image.new("RGBA", (20, 20), (10, 10, 10, 255))
    image.paste((10, 10, 10, 0), (0, 0, 10, 20))
    if mode == "P":
        image = Image.new("P", (20, 20), 1)
        image.putpalette([0, 0, 0, 10, 10, 10])
        image.paste(0, (0, 0, 10, 20))
        image.info["transparency"] = 0
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x.png")
    x = pixels(tmp_path / "x.png")
    assert (x[:, :10] == 255).all() and (x[:, 10:] == 10).all()

@pytest.mark.parametrize("write, expected", [
    (lambda p: Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(p, "PNG"), 127),        # half transparent
    (lambda p: Image.fromarray((GREY * 5).astype(np.uint8)).save(p, "PNG"), (GREY * 5)[..., None]),
    (lambda p: Image.fromarray(GREY * 1337).save(p, "PNG"), (GREY * 1337 / 257).round()[..., None]),
    (lambda p: Image.fromarray(GREY * 1337).save(p, "TIFF"), (GREY * 1337 / 257).round()[..., None]),
    (lambda p: Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(p, "TIFF"), [255, 0, 0])])
def test_other_modes_are_converted_exactly(write, expected, tmp_path):
    write(tmp_path / "x.tif")
    assert (pixels(tmp_path / "x.tif") == expected).all()

def write_tiff(path, x, photometric, planar=1, extra=None, compression=1):
    """x (h, w, n), little-endian -> an uncompressed TIFF, whatever `compression` it claims."""
    h, w, n = x.shape
    data, strips = (x.transpose(2, 0, 1) if planar == 2 else x).tobytes(), n if planar == 2 else 1
    tags = {256: w, 257: h, 258: [8 * x.itemsize] * n, 259: compression, 262: photometric, 273: [0] * strips,
            277: n, 278: h, 279: [len(data) // strips] * strips, 284: planar}
    tags |= {} if extra is None else {338: extra}
    values = {tag: v if isinstance(v, list) else [v] for tag, v in tags.items()}
    start = 8 + 2 + 12 * len(tags) + 4
    at = start + sum(4 * len(v) for v in values.values() if len(v) > 1)
    values[273] = [at + i * len(data) // strips for i in range(strips)]
    rows, more = b"", b""
    for tag, v in values.items():
        packed = struct.pack(f"<{len(v)}I", *v)
        rows += struct.pack("<HHI", tag, 4, len(v)) + (packed if len(v) == 1
                                                       else struct.pack("<I", start + len(more)))
        more += packed if len(v) > 1 else b""
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + rows + bytes(4) + more + data)

def write_png(path, x):
    """x (h, w, n) big-endian, 16 bits -> a PNG; n: 2 LA, 3 RGB, 4 RGBA."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, {2: 4, 3: 2, 4: 6}[x.shape[2]], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in (
        (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))))

TISSUE = np.asarray(texture(3, 24))
DEEP, GREYS = TISSUE.astype("<u2") * 257, TISSUE[..., :1]
CLEAR = np.zeros((24, 24, 1), np.uint8)

@pytest.mark.parametrize("write, expected", [
    (lambda p: write_tiff(p, DEEP, 2), TISSUE), (lambda p: write_tiff(p, TISSUE, 2, planar=2), TISSUE),
    (lambda p: write_tiff(p, 255 - GREYS, 0), GREYS),
    (lambda p: write_tiff(p, 65535 - GREYS.astype("<u2") * 257, 0), GREYS),        # white is zero
    (lambda p: write_tiff(p, np.dstack([TISSUE, CLEAR]), 2, extra=2), TISSUE),     # alpha is 0 everywhere
    (lambda p: write_png(p, np.dstack([DEEP, CLEAR])), TISSUE),
    (lambda p: Image.fromarray(np.dstack([TISSUE, CLEAR + np.uint8(1)])).save(p, "PNG"), TISSUE),
    (lambda p: Image.fromarray(np.dstack([TISSUE, CLEAR])).save(p, "PNG"), TISSUE),
    (lambda p: Image.fromarray(np.dstack([CLEAR] * 4)).save(p, "PNG"), [255]),     # nothing is below it
    (lambda p: write_png(p, np.dstack([GREYS.astype(int) * 257, CLEAR + np.uint16(65535)])), GREYS),
    (lambda p: Image.fromarray(TISSUE).save(p, "PNG", icc_profile=np.random.bytes(2 ** 21)), TISSUE),
    (lambda p: Image.fromarray(TISSUE).save(p, "TIFF", save_all=True, append_images=[
        Image.fromarray(TISSUE[::2, ::2])]), TISSUE),                              # a page and its thumbnail
    (lambda p: Image.fromarray(TISSUE[::2, ::2]).save(p, "TIFF", save_all=True, append_images=[
        Image.fromarray(TISSUE)]), TISSUE),
    (lambda p: Image.fromarray(TISSUE).save(p, "MPO", save_all=True, quality=100, subsampling=0,
                                            append_images=[texture(4, 24)]), TISSUE)])
def test_pixels_are_what_the_file_means(write, expected, tmp_path):
    write(tmp_path / "x.tif")
    assert abs(pixels(tmp_path / "x.tif").astype(int) - expected).mean() < 1

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def bomb(path):
    """A PNG of some 60 bytes whose header claims 100,000 x 100,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))

def truncated(path):
    texture(1).save(path)
    path.write_bytes(path.read_bytes()[:-500])

def half(path):
    """What an interrupted copy leaves in a file of the full size."""
    texture(1).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] + bytes(len(data) - len(data) // 2))

def animated(path):
    texture(1).save(path, format="GIF" if path.suffix == ".png" else "TIFF", save_all=True,
                    append_images=[texture(2)])

@pytest.mark.parametrize("name, write, words", [
    ("x.png", bomb, "100000 x 100000"), ("x.png", truncated, "cannot be read"),
    ("x.jpg", truncated, "cannot be read"),
    ("x.png", animated, "2 frames"), ("x.tif", animated, "2 frames"),
    ("x.png", lambda p: p.write_text("no image"), "cannot identify image"),
    ("x.png", lambda p: Image.new("RGB", (1, 1)).save(p), "1 x 1"),
    ("x.png", lambda p: p.write_bytes(b""), "is empty"), ("x.png", os.mkfifo, "no regular file"),
    ("x.png", os.mkdir, "no regular file"), ("x.png", lambda p: p.symlink_to(p), "symbolic links"),
    ("x.jpg", lambda p: p.write_text("\n<!DOCTYPE html><title>404</title>"), "web page"),
    ("x.jpg", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    ("x.png", half, "ends in zeros"), ("x.jpg", half, "ends in zeros"), ("x.bmp", half, "ends in zeros"),
    ("x.tif", half, "ends in zeros"), ("x.webp", half, "ends in zeros"),
    ("x.tif", lambda p: write_tiff(p, DEEP, 2, planar=2), "separate planes"),
    ("x.tif", lambda p: write_tiff(p, DEEP // 16, 2), "12 or 14 bits"),
    ("x.tif", lambda p: write_tiff(p, DEEP[..., :1] // 257, 1), "12 or 14 bits"),
    ("x.png", lambda p: write_png(p, DEEP // 257), "12 or 14 bits"),
    ("x.png", lambda p: write_png(p, np.dstack([DEEP[..., 0] // 16, CLEAR + np.uint16(65535)])),
     "12 or 14 bits"),
    ("x.tif", lambda p: write_tiff(p, np.dstack([TISSUE, CLEAR]), 2, extra=1), "alpha channel"),
    ("x.tif", lambda p: write_tiff(p, TISSUE, 2, compression=33003), "JPEG 2000"),
    ("x.tif", lambda p: write_tiff(p, np.dstack([TISSUE] * 2)[..., :5], 5, extra=2), "beside CMYK"),
    ("x.tif", lambda p: Image.fromarray(np.ones((20, 20), np.float32)).save(p), "floating-point"),
    ("x.png", lambda p: None, "not exist")])
def test_what_is_no_single_readable_patch_is_refused_by_name(name, write, words, tmp_path):
    write(tmp_path / name)
    with pytest.raises(Fail) as problem:
        load_rgb(tmp_path / name)
    text = str(problem.value)
    assert words in text and str(tmp_path / name) in text and "\n" not in text

@pytest.mark.parametrize("size", [(64, 64), (100, 100), (331, 250), (250, 331), (37, 61), (500, 111)])
@pytest.mark.parametrize("filter", ["BILINEAR", "LANCZOS"])
def test_fit_is_torchvisions_resize_and_centre_crop(size, filter):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = Compose([Resize(64, InterpolationMode[filter]), CenterCrop(64)])(image)
    assert (np.asarray(resize_crop(image, 64, Image.Resampling[filter])) == np.asarray(expected)).all()

def test_bytes_survive_the_way_through_a_tensor():
    image = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))
    x = to_tensor([image], 16)
    assert x.min() == -1 and x.max() == 1 and (np.asarray(to_images(x)[0]) == np.asarray(image)).all()
    assert (np.asarray(to_images(torch.tensor([[[[-9.0]], [[9.0]], [[0.0]]]]))[0]) == [0, 255, 128]).all()

def test_images_are_listed_at_any_depth_in_any_case_sorted_and_without_hidden_ones(tmp_path):
    touch(tmp_path, "b.PNG", "a/z.JpEg", "a/.hidden.png", ".git/x.png", "a/text.txt", "a.tif")
    assert list_images(tmp_path) == [tmp_path / name for name in ("a.tif", "a/z.JpEg", "b.PNG")]

# ---- datasets ----------------------------------------------------------------------------------------------

def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

def test_the_chaoyang_format_gives_class_case_and_part(dataset):
    patches = read_dataset(dataset)
    assert len(patches) == 36 and len({p.case for p in patches}) == 12
    assert Patch("test/5011_1-IMG033x011-3.JPG", "adenoma", "5011", "test") in patches

def test_annotators_decide_by_majority_where_there_is_no_label(tmp_path, capsys):
    votes = [(1, 1, 2), (0, 2, 2), (0, 1, 2), (0, 0, 0)]
    rows = [{"name": f"train/{i}-IMG001x001-0.JPG"} | {f"label_{x}": v for x, v in zip("ABC", vote)}
            for i, vote in enumerate(votes)]
    rows[3]["label"] = 3
    touch(tmp_path, *(row["name"] for row in rows))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert {p.case: p.label for p in read_dataset(tmp_path)} == {"0": "serrated", "1": "adenocarcinoma",
                                                                 "3": "adenoma"}
    assert "1 patches" in capsys.readouterr().out

@pytest.mark.parametrize("names, expected", [
    (["x.png", "y.png"], [("all", "x.png"), ("all", "y.png")]),
    (["k/x.png", "l/y.png"], [("k", "k/x.png"), ("l", "l/y.png")]),
    (["k/c1/x.png", "k/c2/x.png", "k/c3/x.png", "l/c3/a/x.png", "l/c4/b/x.png", "l/c5/x.png"],
     [("k", "c1"), ("k", "c2"), ("k", "c3"), ("l", "c3"), ("l", "c4"), ("l", "c5")]),
    (["k/353042_4-IMG005x014-1.JPG", "l/353042-7-IMG001x001-0.JPG"], [("k", "353042"), ("l", "353042")]),
    # TCGA; BreakHis as unpacked; IDC (patient/class); EBHI-Seg (class/image and class/label)
    (["MSI/blk-A-TCGA-AA-3877-01Z-00-DX1.png", "TCGA-AA-3812-01/MSS/x.png"],
     [("MSI", "TCGA-AA-3877"), ("MSS", "TCGA-AA-3812")]),
    (["benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png",
      "malignant/SOB_M_DC-14-2523-40-001.png"], [("benign", "14-22549AB"), ("malignant", "14-2523")]),
    (["8863/0/8863_idx5_x1_y2_class0.png", "8863/1/8863_idx5_x3_y2_class1.png"],
     [("0", "8863"), ("1", "8863")]),
    (["Normal/image/1.png", "Normal/label/1.png", "Polyp/image/1.png", "Polyp/2_mask.png", "masks/3.png",
      "Polyp/thumbnails/4.png", "preview.jpg", "Polyp/image/.5.png"],
     [("Normal", "Normal/image/1.png"), ("Polyp", "Polyp/image/1.png")]),
    # masks of QuPath, GlaS, TNBC and VOC, and a disk station's previews; two classes named for labels
    (["tumor/1.png", "tumor/1 [x=0,y=0]-labelled.png", "tumor/2_anno.bmp", "GT_01/1.png",
      "SegmentationClass/1.png", "tumor/@eaDir/1.png/T.jpg", "labels_tumor/3.png", "no_label/4.png"],
     [("labels_tumor", "labels_tumor/3.png"), ("no_label", "no_label/4.png"), ("tumor", "tumor/1.png")]),
    (["test_x/1.png", "valve/2.png"],                                      # begin like a part's name
     [("test_x", "test_x/1.png"), ("valve", "valve/2.png")]),
    (["Gru\u0308n/x.png", "Gr\u00fcn/y.png"], [("Gr\u00fcn", "Gru\u0308n/x.png"),
                                            ("Gr\u00fcn", "Gr\u00fcn/y.png")])])      # one class
def test_folders_give_class_and_case(names, expected, tmp_path):
    touch(tmp_path, *names)
    assert [(p.label, p.case) for p in read_dataset(tmp_path)] == expected

@pytest.mark.parametrize("names, words", [
    (["train/normal/x.png", "Test/normal/y.png"], "a folder per part"),
    (["train/a/x.png", "val/a/x.png", "preview.jpg"], "a folder per part"),
    (["trainset/x.png", "testset/x.png"], "a folder per part"),
    (["dev/x.png", "tst/x.png"], "a folder per part"),
    (["Train_images/x.png", "test-set/x.png"], "a folder per part"),
    (["1.training/x.png", "2.validation/x.png", "3.testing/x.png"], "a folder per part"),
    (["x10/a.png", "x20/b.png", "x40/c.png"], "part or magnification"),
    (["train_40/x.png", "val_40/x.png"], "a folder per part"),
    (["40X/benign/x.png", "100X/benign/x.png"], "part or magnification"),       # BreakHis, LC25000, NCT
    ([f"{c}/{m}X/{i}.png" for c in "ab" for m in (40, 100, 200) for i in "12"], "such as a/100X are taken"),
    ([f"{o}_image_sets/{o}_{t}/1.png" for o in ("colon", "lung") for t in ("aca", "n")], "2 in colon_image"),
    ([f"{r}/{c}/x.tif" for r in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K") for c in ("ADI", "TUM", "NORM")],
     "such as CRC-VAL-HE-7K/ADI are taken"),
    ([f"set/{c}{i}/x.png" for c in "abcd" for i in "12"], "such as set/a1 are taken"),
    ([f"{p}/{c}/x.png" for p in range(8) for c in ("0", "1", "2")], "3 names, 3 of them in several classes")])
def test_folders_whose_levels_are_no_class_and_case_are_refused(names, words, tmp_path):
    touch(tmp_path, *names)
    with pytest.raises(Fail, match=words):
        read_dataset(tmp_path)
    if "100X" not in words and "part" not in words:        # the remedies that the message names
        assert {p.case for p in read_dataset(tmp_path, "/([^/]+)/")} == {n.split("/")[1] for n in names}
        assert {p.label for p in read_dataset(tmp_path, "^([^/]+)/")} == {n.split("/")[1] for n in names}
        assert {p.case for p in read_dataset(tmp_path, say=None)} == {n.split("/")[1] for n in names}

def test_a_pattern_finds_the_case_or_names_what_it_misses(tmp_path):
    touch(tmp_path, "a/p01-1.png", "a/p01-2.png", "b/p02-1.png")
    assert [p.case for p in read_dataset(tmp_path, r"p(\d+)-")] == ["01", "01", "02"]
    for pattern, words in ((r"p(0[1])-", "finds nothing in b/p02-1.png"), ("(", "no regular expression")):
        with pytest.raises(Fail, match=words):
            read_dataset(tmp_path, pattern)

def test_a_folder_in_a_listed_name_is_a_case_and_masks_need_no_match(tmp_path):
    touch(tmp_path, "train/p1/x.png", "train/p1/y.png")
    rows = [{"name": f"train/p1/{n}.png", "label": 0} for n in "xy"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert {p.case for p in read_dataset(tmp_path)} == {"p1"}
    touch(tmp_path, "train/images/z.png")           # a container is none
    (tmp_path / "train.json").write_text('[{"name": "train/images/z.png", "label": 0}]')
    assert [p.case for p in read_dataset(tmp_path)] == ["train/images/z.png"]
    touch(tmp_path, *(f"tiles/slide{k}/{n}.png" for k in "AB" for n in "xy"))        # nor is it the class
    os.symlink("train", tmp_path / "link")
    names = [*(f"tiles/slide{k}/{n}.png" for k in "AB" for n in "xy"), "train/p1/x.png", "link/p1/y.png"]
    (tmp_path / "train.json").write_text(json.dumps([{"name": name, "label": 0} for name in names]))
    cases = {p.name: p.case for p in read_dataset(tmp_path)}
    assert [cases[name] for name in names] == ["slideA", "slideA", "slideB", "slideB", "p1", "p1"]
    touch(tmp_path / "b", "k/p7.png", "k/masks/3.png")
    assert [p.case for p in read_dataset(tmp_path / "b", r"p(\d)")] == ["7"]

def test_what_is_left_out_is_said(tmp_path, capsys):
    touch(tmp_path, "a/x.png", "a/x_mask.png", "b/y.png", "b/notes.csv", "b/.z.png", "thumb.jpg", "c.jpg",
          "Thumbs.db")
    assert len(read_dataset(tmp_path)) == 2
    out = capsys.readouterr().out
    for words in ("of 2 patches the case is unknown", "2 masks", "1 images in no list",
                  "1 .csv files", "1 .db files", "1 hidden files"):
        assert words in out
    read_dataset(tmp_path, say=None)
    assert capsys.readouterr().out == ""
    touch(tmp_path / "some", *(f"a/p{i}/{n}.png" for i in range(10) for n in "12"), "b/1.png", "b/2.png")
    read_dataset(tmp_path / "some", case="")
    assert "of 2 patches the case is unknown" in capsys.readouterr().out
    touch(tmp_path / "sizes", *(f"a/SOB_B_A_14-22549{k}/{m}X/SOB_B_A-14-22549{k}-{m}-001.png"
                                for k in "AB" for m in (40, 100)))
    read_dataset(tmp_path / "sizes")
    assert "magnifications are mixed (100x, 40x)" in capsys.readouterr().out

def test_what_this_program_made_is_no_data(tmp_path, capsys):
    """Runs, samples and adapters below a dataset are left out; a dataset in a run or around it is refused."""
    touch(tmp_path, "a/x.png", "b/y.png", "runs/x/real/a/x.png", "out/cfg1.3/x.png", "c/z.png",
          "c/adapter-best.safetensors")
    (tmp_path / "runs/x/config.json").write_text('{"args": {}}')
    (tmp_path / "out/samples.json").write_text('{"adapter_sha256": "x"}')
    save_image(tmp_path / "a/copied.png", texture(1), reference="x", seed=1, cfg=1.3)
    assert [p.name for p in read_dataset(tmp_path)] == ["a/x.png", "b/y.png"]
    assert "4 generated images" in capsys.readouterr().out
    for name in ("runs/x", "runs/x/real", "out/cfg1.3"):
        with pytest.raises(Fail, match="train.py or sample.py made"):
            read_dataset(tmp_path / name)
    refused = program("train.py", "--data", ".", "--run", "runs/y", "--sd15", "no", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "--run runs/y is inside the dataset" in refused.stderr

def test_linked_folders_are_followed_and_circles_end(tmp_path):
    touch(tmp_path, "a/x.png", "elsewhere/y.png")
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/circle").symlink_to(tmp_path / "a")
    assert list_images(tmp_path / "a") == [tmp_path / "a/link/y.png", tmp_path / "a/x.png"]

def test_a_name_that_is_not_utf8_is_named(tmp_path, capsys):
    (tmp_path / "\udcff.png").touch()
    with pytest.raises(Fail, match="no images"):
        read_dataset(tmp_path)
    assert "1 files whose names are not valid UTF-8" in capsys.readouterr().out
    (tmp_path / "train.json").write_text('[{"name": "\\ud800.JPG", "label": 0}]')
    with pytest.raises(Fail, match=r"ud800.JPG' is not there"):
        read_dataset(tmp_path)

def test_a_safe_name_fits_every_file_system():
    for text in ("ü" * 300, "漢" * 300, "../../x", "a b"):
        name = safe_name(text)
        assert len(name.encode()) <= 150 and "/" not in name and " " not in name and not name.startswith(".")
    assert [safe_name(label) for label in ("HER2+", "HER2++", "+", "++")] == ["HER2+", "HER2++", "+", "++"]

WRONG_LISTS = [
    ('[{"name": "../y.png", "label": 0}]', "not there"), ('[{"name": "no.png", "label": 0}]', "not there"),
    ('[{"name": "loop.png", "label": 0}]', "loop"), ('[{"name": "/etc/passwd", "label": 0}]', "not there"),
    ('[{"name": "x.png", "label": 7}]', "label 7"), ('[{"name": "x.png", "label": NaN}]', "label nan"),
    ('[{"name": "x.png", "label": true}]', "label True"), ('{"name": 1}', "is no list of"),
    ("[", "is no list of"), ('[{"label": 0}]', "is no list of"), ("[" * 100_000, "is no list of"),
    ('[{"name": "x.png", "label": 0}, {"name": "x.png", "label": 0}]', "listed twice"), ("[]", "no images")]
WRONG_TABLES = [
    ("", "no table"), ("name,label\nx.png,a", "needs file and label, each column once; has name,label"),
    ("file,label,label\nx.png,a,b", "each column once"), ("file,label,case,case\nx.png,a,1,2", "column once"),
    ("file,label\nx.png,", "line 2 needs"), ("file,label,part\nx.png,a,fold1", "part is train, val or test"),
    ("file,label\n../y.png,a", "y.png. is not there"), ("file,label\nno.png,a", "not there"),
    ("file,label\nx.png,a/b", "a label without /"), ("file,label\nx.png,a\nx.png,b", "listed twice"),
    ("file,label\nx,y.png,a", "not there"),
    ("file,label\nx.png,<10%\nz.png,>10%", "'<10%' and '>10%' would share a folder")]

@pytest.mark.parametrize("name, text, words", [
    *(("train.json", *row) for row in WRONG_LISTS), *(("patches.csv", *row) for row in WRONG_TABLES)])
def test_a_wrong_list_is_refused_by_entry_and_a_wrong_table_by_line(name, text, words, tmp_path):
    touch(tmp_path, "data/x.png", "data/z.png", "y.png")
    os.symlink("loop.png", tmp_path / "data/loop.png")
    (tmp_path / "data" / name).write_text(text)
    with pytest.raises(Fail, match=words):
        read_dataset(tmp_path / "data")

def write_list(root, change=lambda row: row, encoding="utf-8", part="train"):
    names = [f"{part}/{i}-IMG001x001-3.JPG" for i in range(3)]
    touch(root, *names)
    rows = [change({"name": name, "label": 3}) for name in names]
    (root / f"{part}.json").write_text(json.dumps(rows), encoding=encoding)

@pytest.mark.parametrize("change", [
    dict(encoding="utf-8-sig"), dict(encoding="utf-16"),
    *(dict(change=lambda row, f=f: row | f(row)) for f in (
        lambda row: {"name": row["name"].replace("/", "\\")}, lambda row: {"label": "3"},
        lambda row: {"label": 3.0}, lambda row: {"label": "3.0 "},
        lambda row: {"name": "./" + row["name"].replace("JPG", "jpg")}))])
def test_lists_from_windows_and_spreadsheets_are_read(change, tmp_path):
    write_list(tmp_path, **change)
    assert read_dataset(tmp_path) == [Patch(f"train/{i}-IMG001x001-3.JPG", "adenoma", str(i), "train")
                                      for i in range(3)]

def test_linked_lists_and_the_other_normal_form_are_read_and_val_is_a_part(tmp_path):
    root, other = tmp_path / "data", tmp_path / "disk"
    for part in ("train", "val", "test"):
        write_list(other, part=part)
    root.mkdir()
    for path in other.iterdir():
        (root / path.name).symlink_to(path)
    patches = read_dataset(root)
    assert make_split(patches, "official") == {part: [p.name for p in patches if p.part == part]
                                               for part in ("train", "val", "test")}
    touch(root, "train/Pra\u0308.JPG")
    (root / "train.json").unlink()
    (root / "train.json").write_text(json.dumps([{"name": "train/Pr\u00e4.JPG", "label": 0}]))
    assert "train/Pra\u0308.JPG" in [p.name for p in read_dataset(root)]
    touch(root, "train/x.jpg", "train/X.jpg")                       # both would fit
    (root / "train.json").write_text('[{"name": "train/x.JPG", "label": 0}]')
    with pytest.raises(Fail, match="'train/x.JPG' is not there"):
        read_dataset(root)

@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_of_patches_gives_class_case_and_part(delimiter, encoding, tmp_path):
    touch(tmp_path, "a/1.png", "a/2.png", "b/3.tif", "TCGA-AA-0001.png", "a/unlisted.png")
    rows = [("File", "label", "case", "PART"), ("a/1.png", "low grade", "p1", "Train"),
            ("a\\2.png", "low grade", "", "test"), ("b/3.tif", "Gru\u0308n", "p1", ""),
            ("TCGA-AA-0001.png", "0", "", "valid")]
    (tmp_path / "patches.csv").write_text("\r\n".join(map(delimiter.join, rows)), encoding=encoding)
    assert read_dataset(tmp_path) == [
        Patch("TCGA-AA-0001.png", "0", "TCGA-AA-0001", "val"), Patch("a/1.png", "low grade", "p1", "train"),
        Patch("a/2.png", "low grade", "a/2.png", "test"), Patch("b/3.tif", "Gr\u00fcn", "p1", None)]

# ---- the split ---------------------------------------------------------------------------------------------

def check_cases(split, patches):
    """No case is in two parts."""
    case = {p.name: p.case for p in patches}
    found = [name for names in split.values() for name in {case[n] for n in names}]
    assert len(found) == len({*found}) > 0

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abcd")), min_size=1, max_size=80))
def test_a_split_keeps_cases_whole_and_loses_nothing(rows):
    patches = [Patch(f"{i:03d}.png", label, str(case)) for i, (case, label) in enumerate(rows)]
    if len({p.case for p in patches}) < 3:
        with pytest.raises(Fail, match="cannot be split"):
            split_patches(patches)
        return
    split = split_patches(patches)
    check_cases(split, patches)
    assert all(split.values()) and sorted(sum(split.values(), [])) == [p.name for p in patches]
    assert split_patches(patches[::-1]) == split

def test_real_tissue_is_split_in_the_papers_proportions_within_two_patches_of_every_class(shared):
    patches = read_dataset(shared("data/ebhi-colon"))
    split, label = make_split(patches, "paper"), {p.name: p.label for p in patches}
    assert len(patches) == 1565 and len({p.case for p in patches}) == 243
    for part in ("val", "test"):
        for name in set(label.values()):
            target = sum(p.label == name for p in patches) * PROPORTIONS[part] / sum(PROPORTIONS.values())
            assert abs(sum(label[n] == name for n in split[part]) - target) < 2
    check_cases(split, patches)

def test_the_official_test_part_can_be_kept(dataset):
    patches = read_dataset(dataset)
    split = make_split(patches, "official")
    assert split["test"] == [p.name for p in patches if p.part == "test"]
    assert sorted(split["train"] + split["val"]) == [p.name for p in patches
                                                     if p.part == "train"] and split["val"]

def test_what_a_split_lacks_and_what_is_in_it_twice_is_said(capsys):
    patches = [Patch(f"{label}/{i}.png", label, f"{label}{i}") for label, n in (("a", 9), ("b", 2))
               for i in range(n)]
    describe(patches, make_split(patches, "paper"))
    assert "    b: 2 | 0 | 0, such as b/0.png of case b0" in capsys.readouterr().out
    parts = ("train", "val", "train", "val", "test")
    shared = [Patch(f"{i}.png", "a", "ABBCC"[i], part) for i, part in enumerate(parts)]
    describe_split(make_split(shared, "official"), shared)
    assert "note: 2 cases are in several parts" in capsys.readouterr().out
    describe_split({"train": ["0.png"], "val": ["1.png"], "test": []}, shared)
    assert "note: 3 patches are in no part" in capsys.readouterr().out
    make_split([replace(p, case=p.name) for p in shared], "paper")
    assert "own parts are pooled, as in the paper; --split official keeps" in capsys.readouterr().out
    names = {"train": ["a/0.png", "a/1.png"], "val": ["a/2.png"], "test": ["b/0.png"]}
    note_equal_images(names, {"train": "xy", "val": "z", "test": "z"}, patches)
    out = capsys.readouterr().out
    assert "1 images are in several parts or classes" in out and "such as a/2.png and b/0.png" in out
    note_equal_images(names, {"train": "xx", "val": "z", "test": "v"}, patches)
    assert capsys.readouterr().out == ""

def test_a_split_file_can_be_read_again_and_refuses_strangers_and_repeats(dataset, tmp_path):
    patches, path = read_dataset(dataset), tmp_path / "split.json"
    split = make_split(patches, "paper")
    path.write_text(describe_split(split, patches))
    assert read_split(path, patches) == split == make_split(patches, str(path))
    for change, words in (({"val": ["stranger.png"]}, "stranger.png"), ({"val": split["train"][:1]}, "twice"),
                          ({"val": []}, "empty")):
        path.write_text(json.dumps(split | change))
        with pytest.raises(Fail, match=words):
            read_split(path, patches)

# ---- the cache ---------------------------------------------------------------------------------------------

class Encoders:
    """Known answers: the mean is x itself at a quarter of the size, the embedding three corner pixels; counts
    the images."""

    def __init__(self, fail_after=None):
        self.images, self.fail_after = 0, fail_after

    def __call__(self):
        return self.encode, self.embed

    def encode(self, x):
        return x[:, :, ::4, ::4], -x[:, :, ::4, ::4]

    def embed(self, images):
        self.images += len(images)
        if self.fail_after is not None and self.images > self.fail_after:
            raise KeyboardInterrupt
        return torch.tensor([np.asarray(image)[0, 0].tolist() for image in images], dtype=torch.float32)

@pytest.fixture
def forty(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        texture(i, 16).save(tmp_path / f"images/{i:02d}.png")
    return sorted((tmp_path / "images").iterdir())

def test_the_cache_holds_what_the_encoders_say_of_an_image_and_of_its_mirror_image(forty, tmp_path):
    cache = Cache(tmp_path / "cache", "vae", "encoder", 16)
    hashes = cache.fill(forty, Encoders())
    mean, logvar, e = Cache(tmp_path / "cache", "vae", "encoder",
                            16).batch(hashes, [i % 2 for i in range(40)])
    for i, path in enumerate(forty):
        x = to_tensor([load_rgb(path)], 16)[0]
        x = x.flip(-1) if i % 2 else x
        assert torch.equal(mean[i], x[:, ::4, ::4]) and torch.equal(logvar[i], -mean[i])
        assert e[i].tolist() == np.asarray(load_rgb(path))[0, 0].tolist()

def test_nothing_is_computed_twice_and_nothing_stale_is_used(forty, tmp_path):
    first, second, third = Encoders(), Encoders(), Encoders()
    Cache(tmp_path / "cache", "vae", "encoder", 16).fill(forty, first)
    texture(99, 16).save(forty[3])
    Cache(tmp_path / "cache", "vae", "encoder", 16).fill([*forty, forty[3]], second)
    Cache(tmp_path / "cache", "vae", "encoder", 16).fill(forty, third)
    assert (first.images, second.images, third.images) == (40, 4, 0)        # four: the batch of the new one
    for key in (("other", "encoder", 16), ("vae", "other", 16), ("vae", "encoder", 8)):
        again = Encoders()
        Cache(tmp_path / "cache", *key).fill(forty, again)
        assert again.images == 40

def test_images_that_are_enlarged_over_twice_are_named(forty, tmp_path, capsys):
    for size, words in ((32, ""), (36, f"note: images such as {forty[0]} are enlarged")):
        Cache(tmp_path / "cache", "vae", "encoder", size).fill(forty, Encoders())
        out = capsys.readouterr().out
        assert out.startswith(words) if words else not out

def test_an_interrupted_cache_keeps_what_it_has_and_goes_on(forty, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "cache", "vae", "encoder", 16).fill(forty, Encoders(fail_after=36))
    files = list((tmp_path / "cache").rglob("*.*"))
    assert len(files) == 36 and not any(file.name.startswith(".") for file in files)
    # what SIGKILL leaves behind
    (files[0].parent / ".0123-killed.safetensors").write_bytes(files[0].read_bytes()[:50])
    files[1].unlink()               # of a batch that was being written: all of it is computed, as it was
    rest = Encoders()
    Cache(tmp_path / "cache", "vae", "encoder", 16).fill(forty, rest)
    assert rest.images == 4 + 4

@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:8],
                                    lambda data: data.replace(b"logvar", b"logvax"),
                                    lambda data: data[:len(data) // 2] + bytes(len(data) - len(data) // 2)])
def test_a_damaged_file_of_the_cache_is_named(damage, forty, tmp_path):
    cache = Cache(tmp_path / "cache", "vae", "encoder", 16)
    hashes = cache.fill(forty[:2], Encoders())
    path = cache.folder / f"{hashes[1]}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Fail, match=f"{hashes[1]}.* remove it"):
        cache.batch(hashes, [False, True])

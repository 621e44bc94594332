"""Images are read as they are meant, no case is in two parts, and the cache cannot be stale."""
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import texture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.app import Fail, safe_name
from ldm.data import (PROPORTIONS, Cache, Patch, describe_split, list_images, load_rgb, make_split,
                      read_dataset, read_split, resize_crop, split_patches, to_images, to_tensor)

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

def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(tmp_path / "x.png")
    assert (pixels(tmp_path / "x.png") == 127).all()

def test_greyscale_becomes_three_equal_channels(tmp_path):
    Image.fromarray((GREY * 5).astype(np.uint8)).save(tmp_path / "x.png")
    assert (pixels(tmp_path / "x.png") == (GREY * 5).astype(np.uint8)[..., None]).all()

@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(suffix, tmp_path):
    Image.fromarray(GREY * 1337).save(tmp_path / f"x.{suffix}")
    assert (pixels(tmp_path / f"x.{suffix}") == (GREY * 1337 / 257).round()[..., None]).all()

def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "x.tif")
    assert (pixels(tmp_path / "x.tif") == [255, 0, 0]).all()

def test_a_name_in_another_alphabet_is_read(tmp_path):
    texture(0).save(tmp_path / "препарат 切片.png")
    assert load_rgb(tmp_path / "препарат 切片.png").size == (72, 72)

def bomb(path):
    """A PNG of some 60 bytes whose header claims 100,000 x 100,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR",
                                                  struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))

def truncated(path):
    texture(1).save(path)
    path.write_bytes(path.read_bytes()[:-500])

def animated(path):
    texture(1).save(path, format="GIF" if path.suffix == ".png" else "TIFF", save_all=True,
                    append_images=[texture(2)])

@pytest.mark.parametrize("name, write, words", [
    ("x.png", bomb, "100000 x 100000"), ("x.png", truncated, "cannot be read"),
    ("x.jpg", truncated, "cannot be read"),
    ("x.png", animated, "2 frames"), ("x.tif", animated, "2 frames"),
    ("x.png", lambda p: p.write_text("no image"), "cannot identify image"),
    ("x.png", lambda p: Image.new("RGB", (1, 1)).save(p), "1 x 1"),
    ("x.png", lambda p: p.write_bytes(b""), "cannot identify image"),
    ("x.tif", lambda p: Image.fromarray(np.zeros((20, 20), np.float32)).save(p), "floating-point"),
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
    for name in ("b.PNG", "a/z.JpEg", "a/.hidden.png", ".git/x.png", "a/text.txt", "a.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix()
            for p in list_images(tmp_path)] == ["a.tif", "a/z.JpEg", "b.PNG"]

# ---- datasets ----------------------------------------------------------------------------------------------

def write_json(root, rows, part="train"):
    (root / part).mkdir(exist_ok=True)
    for row in rows:
        (root / row["name"]).touch()
    (root / f"{part}.json").write_text(json.dumps(rows))

def test_the_chaoyang_format_gives_class_case_and_part(dataset):
    patches = read_dataset(dataset)
    assert len(patches) == 36 and len({p.case for p in patches}) == 12
    assert Patch("test/5011_1-IMG033x011-3.JPG", "adenoma", "5011", "test") in patches

def test_annotators_decide_by_majority_where_there_is_no_label(tmp_path, capsys):
    votes = [(1, 1, 2), (0, 2, 2), (0, 1, 2)]
    write_json(tmp_path, [{"name": f"train/{i}-IMG001x001-0.JPG"}
                          | {f"label_{x}": v for x, v in zip("ABC", vote)}
                          for i, vote in enumerate(votes)]
                          + [{"name": "train/9-IMG001x001-0.JPG", "label": 3, "label_A": 0,
                                                               "label_B": 0, "label_C": 0}])
    assert {p.case: p.label for p in read_dataset(tmp_path)} == {"0": "serrated", "1": "adenocarcinoma",
                                                                 "9": "adenoma"}
    assert "1 patches" in capsys.readouterr().out

@pytest.mark.parametrize("names, expected", [
    (["x.png", "y.png"], [("all", "x.png"), ("all", "y.png")]),
    (["k/x.png", "l/y.png"], [("k", "k/x.png"), ("l", "l/y.png")]),
    (["k/c1/x.png", "l/c1/y.png"], [("k", "c1"), ("l", "c1")]),
    (["k/353042_4-IMG005x014-1.JPG", "l/353042-7-IMG001x001-0.JPG"], [("k", "353042"), ("l", "353042")])])
def test_folders_give_class_and_case(names, expected, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [(p.label, p.case) for p in read_dataset(tmp_path)] == expected

def test_folders_of_parts_are_not_taken_for_classes(tmp_path):
    for name in ("train/normal/x.png", "Test/normal/y.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(Fail, match="a folder per part"):
        read_dataset(tmp_path)

def test_linked_folders_are_followed_and_circles_end(tmp_path):
    for name in ("a/x.png", "elsewhere/y.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/circle").symlink_to(tmp_path / "a")
    assert [p.relative_to(tmp_path).as_posix()
            for p in list_images(tmp_path / "a")] == ["a/link/y.png", "a/x.png"]

def test_a_name_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "\udcff.png").touch()
    with pytest.raises(Fail, match="not valid UTF-8"):
        read_dataset(tmp_path)
    (tmp_path / "train.json").write_text('[{"name": "\\ud800.JPG", "label": 0}]')
    with pytest.raises(Fail, match="not valid UTF-8"):
        read_dataset(tmp_path)

def test_a_safe_name_fits_every_file_system():
    for text in ("ü" * 300, "漢" * 300, "../../x", "a b"):
        name = safe_name(text)
        assert len(name.encode()) <= 150 and "/" not in name and " " not in name and not name.startswith(".")

@pytest.mark.parametrize("text, words", [
    ('[{"name": "../x.JPG", "label": 0}]', "outside"), ('[{"name": "/etc/passwd", "label": 0}]', "outside"),
    ('[{"name": "link/x.JPG", "label": 0}]', "outside"),
    ('[{"name": "train/no.JPG", "label": 0}]', "not there"),
    ('[{"name": "train/a.JPG", "label": 7}]', "label 7"),
    ('[{"name": "train/a.JPG", "label": NaN}]', "label nan"),
    ('[{"name": "train/a.JPG", "label": true}]', "label True"), ('{"name": 1}', "must contain a list"),
    ("[", "not valid JSON"),
    ('[{"label": 0}]', "entry 0"),
    ('[{"name": "train/a.JPG", "label": 0}, {"name": "train/a.JPG", "label": 0}]', "listed twice"),
    ("[]", "no images"), ("[" * 100_000, "not valid JSON")])
def test_a_wrong_list_is_refused_by_entry(text, words, tmp_path):
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    (root / "train/a.JPG").touch()
    (tmp_path / "x.JPG").touch()
    (root / "link").symlink_to(tmp_path)
    (root / "train.json").write_text(text)
    with pytest.raises(Fail, match=words):
        read_dataset(root)

# ---- the split ---------------------------------------------------------------------------------------------

def cases_of(split, patches):
    case = {p.name: p.case for p in patches}
    return {part: {case[n] for n in names} for part, names in split.items()}

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abcd")), min_size=1, max_size=80))
def test_a_split_keeps_cases_whole_and_loses_nothing(rows):
    patches = [Patch(f"{i:03d}.png", label, str(case)) for i, (case, label) in enumerate(rows)]
    if len({p.case for p in patches}) < 3:
        with pytest.raises(Fail, match="cannot be split"):
            split_patches(patches)
        return
    split, cases = split_patches(patches), None
    cases = cases_of(split, patches)
    assert all(split.values()) and sorted(sum(split.values(), [])) == [p.name for p in patches]
    assert not (cases["train"] & cases["val"] or cases["train"] & cases["test"]
                or cases["val"] & cases["test"])
    assert split_patches(patches[::-1]) == split

def test_real_tissue_is_split_in_the_papers_proportions_within_two_patches_of_every_class(shared):
    patches = read_dataset(shared("data/ebhi-colon"))
    split, label = make_split(patches, "paper"), {p.name: p.label for p in patches}
    assert len(patches) == 1565 and len({p.case for p in patches}) == 243
    for part in ("val", "test"):
        for name in set(label.values()):
            target = sum(p.label == name for p in patches) * PROPORTIONS[part] / sum(PROPORTIONS.values())
            assert abs(sum(label[n] == name for n in split[part]) - target) < 2
    cases = cases_of(split, patches)
    assert not (cases["train"] & cases["val"] or cases["train"] & cases["test"]
                or cases["val"] & cases["test"])

def test_the_official_test_part_can_be_kept(dataset):
    patches = read_dataset(dataset)
    split = make_split(patches, "official")
    assert split["test"] == [p.name for p in patches if p.part == "test"]
    assert sorted(split["train"] + split["val"]) == [p.name for p in patches
                                                     if p.part == "train"] and split["val"]

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
    the images.
    """

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
    assert (first.images, second.images, third.images) == (40, 1, 0)
    for key in (("other", "encoder", 16), ("vae", "other", 16), ("vae", "encoder", 8)):
        again = Encoders()
        Cache(tmp_path / "cache", *key).fill(forty, again)
        assert again.images == 40

def test_an_interrupted_cache_keeps_what_it_has_and_goes_on(forty, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "cache", "vae", "encoder", 16).fill(forty, Encoders(fail_after=36))
    files = list((tmp_path / "cache").rglob("*.*"))
    assert len(files) == 1 and not files[0].name.startswith(".")
    # what SIGKILL leaves behind
    (files[0].parent / ".0123-killed.safetensors").write_bytes(files[0].read_bytes()[:50])
    rest = Encoders()
    Cache(tmp_path / "cache", "vae", "encoder", 16).fill(forty, rest)
    assert rest.images == 8

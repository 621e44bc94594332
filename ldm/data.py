"""Images, datasets, the split by case, and the cache of what the frozen encoders say of each image."""
import hashlib
import json
import os
import re
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .app import (atomic_write, Fail, WORLD, barrier, broadcast, first_line, progress, safe_name,
                  save_tensors, shard)
from .weights import TensorFile, file_sha256

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
MAX_PIXELS, MIN_SIDE, MAX_ASPECT = 8192 * 8192, 16, 16
Image.MAX_IMAGE_PIXELS = None           # load_rgb checks the size itself, and before it reads the pixels


# ---- images --------------------------------------------------------------------------------------------------------

def load_rgb(path):
    """An image file -> PIL image in RGB, upright by its EXIF tag, transparency on white, 16 bits scaled to 8.

    The one reader of train.py, sample.py and fid.py. Fails with the file's name on what is no single readable image of
    16 pixels to 8192 x 8192, or is a strip.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS or min(image.size) < MIN_SIDE:
                raise Fail(f"{path} has {image.width} x {image.height} pixels; a patch has a side of {MIN_SIDE} at least and "
                           f"{MAX_PIXELS // 10 ** 6} megapixels at most: remove it, or cut patches from it")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise Fail(f"{path} is a strip of {image.width} x {image.height} pixels; cut patches from it")
            if getattr(image, "n_frames", 1) > 1:
                raise Fail(f"{path} has {image.n_frames} frames; save the one you mean as a single image")
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except FileNotFoundError:
        raise Fail(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise Fail(f"{path} is not an image, whatever its name says: leave it out") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error) as problem:  # Pillow's
        raise Fail(f"{path} cannot be read ({first_line(problem)}): restore or remove it") from None


def _to_rgb(image, path):
    if image.mode.startswith("I"):      # 16 bits; Pillow's own conversion would clip all above 255 to white
        pixels = np.asarray(image).astype(np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise Fail(f"{path} has more than 16 bits per channel; save it as 8 or 16 bits")
        return Image.fromarray((pixels / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Fail(f"{path} holds floating-point pixels of unknown range; save it as 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_crop(image, size, filter=Image.Resampling.LANCZOS):
    """Resize the shorter side to `size` with antialiasing, then crop the centre: torchvision's Resize and CenterCrop."""
    short = min(image.size)
    w, h = (int(size * side / short) for side in image.size)
    if (w, h) != image.size:
        image = image.resize((w, h), filter)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image if w == h else image.crop((left, top, left + size, top + size))


def to_tensor(images, size):
    """PIL images -> x (B, 3, size, size) in [-1, 1]."""
    x = np.stack([np.asarray(resize_crop(image, size)) for image in images])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x):
    """x (B, 3, H, W) in about [-1, 1] -> PIL images: x/2 + 1/2, clamped, times 255, rounded."""
    x = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]


def contact_sheet(groups, columns=8, gap=4):
    """Groups of PIL images of one size (a reference and its samples) -> one image; a group is never broken over two rows.

    Each is brought to a side of 128 to 256 pixels, so that a person sees something.
    """
    per_row = max(1, columns // max(map(len, groups)))
    rows = [sum(groups[i:i + per_row], []) for i in range(0, len(groups), per_row)]
    side = min(256, max(128, groups[0][0].width))
    sheet = Image.new("RGB", (max(map(len, rows)) * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (j * (side + gap), i * (side + gap)))
    return sheet


def save_image(path, image, **text):
    """Write a PNG atomically, with the text chunks {key: value}."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with atomic_write(path) as temporary:
        image.save(temporary, pnginfo=info)


def list_images(folder):
    """The image files under a folder, at any depth and in any case of suffix, sorted; hidden ones left out.

    Links to folders are followed, each folder once. Fails (OSError) on a folder that cannot be read.
    """
    def stop(problem):
        raise problem

    found, seen = [], {os.path.realpath(folder)}
    for base, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        here, folders[:] = sorted(folders), []
        for name in here:
            real = os.path.realpath(os.path.join(base, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                folders.append(name)
        found += [Path(base, name) for name in names if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def prefetch(pool, work, batches):
    """[work(item) of each item], batch by batch; the pool makes the next batch while one is in use."""
    coming = []
    for batch in [*batches, []]:
        made, coming = coming, [pool.submit(work, item) for item in batch]
        if made:
            yield [future.result() for future in made]


# ---- datasets ------------------------------------------------------------------------------------------------------

CLASSES = ("normal", "serrated", "adenocarcinoma", "adenoma")       # labels 0 to 3 of the Chaoyang format
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
CASE = re.compile(r"(?P<case>\d+)\S*?-IMG\d+x\d+")                   # <case>-<slide>-IMG<row>x<col>-<label>.JPG


@dataclass(frozen=True)
class Patch:
    """name: path within the dataset, with slashes. case: what must stay together. part: of the official split, or None."""
    name: str
    label: str
    case: str
    part: str | None = None

    @property
    def title(self):
        """CLASS/rest of the name, without slashes and suffix: what images made of this patch are called."""
        return f"{self.label}/{safe_name(str(Path(self.name.removeprefix(self.label + '/')).with_suffix('')))}"


def read_dataset(root):
    """A folder -> [Patch], sorted by name.

    Three layouts: train.json and test.json as Chaoyang has them; one subfolder per class; or a flat folder (one class,
    "all"). The case is the leading number of a name such as 353042_4-IMG005x014-1.JPG, else the name of the folder below
    the class (class/case/patch.png; the same name below two classes is one case), else every patch is its own case.
    """
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise Fail(f"{root}: no such folder of patches")
    lists = [root / f"{part}.json" for part in ("train", "test") if (root / f"{part}.json").is_file()]
    if lists:
        patches = [patch for path in lists for patch in _read_json(path, root)]
    else:
        names = [_text(path.relative_to(root).as_posix(), root) for path in list_images(root)]
        if names and all("/" in n and n.split("/")[0].lower() in PARTS for n in names):
            raise Fail(f"{root} has a folder per part ({names[0].split('/')[0]}/...), not one per class: pass one of these "
                       "folders, or put the classes on top; --split FILE keeps a split of yours")
        patches = [Patch(name, _folder_class(name), _case(name)) for name in names]
    repeated = [name for name, n in Counter(p.name for p in patches).items() if n > 1]
    if repeated:
        raise Fail(f"{root}: {len(repeated)} images are listed twice, such as {repeated[0]}")
    if not patches:
        raise Fail(f"{root} holds no images; expected train.json and test.json, one folder per class, or images")
    return sorted(patches, key=lambda p: p.name)


def _text(name, source):
    """The name, if every system and JSON can write it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Fail(f"{source}: the name {name!r} is not valid UTF-8; rename the file") from None
    return name


def _folder_class(name):
    return name.split("/")[0] if "/" in name else "all"


def _case(name):
    *folders, base = name.split("/")
    if m := CASE.match(base):
        return m["case"]
    return folders[1] if len(folders) > 1 else name


def _read_json(path, root):
    if path.stat().st_size > 2 ** 28:
        raise Fail(f"{path} is larger than 256 MiB; a list of patches is not")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise Fail(f"{path} is not valid JSON ({first_line(problem)})") from None
    if not isinstance(rows, list):
        raise Fail(f'{path} must hold a list of {{"name": ..., "label": ...}}')
    inside, undecided = root.resolve(), 0
    for i, row in enumerate(rows):
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or "\0" in name:
            raise Fail(f'{path}: entry {i} has no "name"')
        file = root / _text(name, path)
        real = Path(os.path.realpath(file))         # Path.resolve fails on a link to itself
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or not real.is_relative_to(inside):
            raise Fail(f"{path}: entry {i} names a file outside the folder: {name!r}")
        if not file.is_file():
            raise Fail(f"{path}: entry {i} names {name!r}, which is not there")
        votes = [row[f"label_{x}"] for x in "ABC" if f"label_{x}" in row]
        if "label" not in row and not votes:
            raise Fail(f'{path}: entry {i} has neither "label" nor "label_A", "label_B" and "label_C"')
        label = row["label"] if "label" in row else _majority(votes)
        if label is None:
            undecided += 1
            continue
        if type(label) is not int or not 0 <= label < len(CLASSES):
            raise Fail(f"{path}: entry {i} has the label {label!r}; it must be 0 to {len(CLASSES) - 1} ({', '.join(CLASSES)})")
        yield Patch(Path(name).as_posix(), CLASSES[label], _case(name), path.stem)
    if undecided:
        print(f"{path}: {undecided} patches on whose class the annotators do not agree are left out")


def _majority(votes):
    """The label that two of three annotators gave, or None."""
    label, n = Counter(map(repr, votes)).most_common(1)[0]
    return next(v for v in votes if repr(v) == label) if n >= 2 else None


# ---- the split -----------------------------------------------------------------------------------------------------

PROPORTIONS = dict(train=5398, val=387, test=375)       # the paper's counts; its split itself is not published


def split_patches(patches, parts=PROPORTIONS):
    """[Patch] -> {part: [names]}, with every case whole in one part and each class near its proportion in all.

    Deterministic: cases from the largest down (ties by hash) go where they bring the counts n of part and class nearest
    to their targets m, by the increase of Σ (n - m)²/m. Each part gets one case at least.
    """
    cases = {}
    for p in patches:
        cases.setdefault(p.case, []).append(p)
    if len(cases) < len(parts):
        raise Fail(f"{len(patches)} patches of {len(cases)} cases cannot be split into {', '.join(parts)} without a case in "
                   "two of them; add cases, or pass a split file with --split")
    total = Counter(p.label for p in patches)
    target = {(part, c): n * share / sum(parts.values()) for part, share in parts.items() for c, n in total.items()}
    count, chosen = Counter(), {part: [] for part in parts}
    order = sorted(cases, key=lambda case: (-len(cases[case]), hashlib.sha256(case.encode()).hexdigest()))
    for left, case in zip(range(len(order), 0, -1), order):
        add = Counter(p.label for p in cases[case])
        empty = [part for part in parts if not chosen[part]]
        cost = {part: sum(n * (2 * (count[part, c] - target[part, c]) + n) / target[part, c] for c, n in add.items())
                for part in (empty if len(empty) == left else parts)}
        part = min(cost, key=cost.get)
        chosen[part] += cases[case]
        count.update({(part, c): n for c, n in add.items()})
    return {part: sorted(p.name for p in chosen[part]) for part in parts}


def make_split(patches, how):
    """how: "paper" (pooled, the paper's proportions), "official" (test.json kept, a validation part taken from train.json)
    or the path of a split file -> {"train": [names], "val": [...], "test": [...]}.
    """
    if how == "paper":
        return split_patches(patches)
    if how == "official":
        test = [p for p in patches if p.part == "test"]
        rest = [p for p in patches if p.part == "train"]
        if not test or not rest:
            raise Fail("--split official needs a dataset with train.json and test.json")
        shared = {p.case for p in test} & {p.case for p in rest}
        if shared:
            print(f"note: {len(shared)} cases are in both train.json and test.json: scores on this test part are too good")
        return split_patches(rest, {part: PROPORTIONS[part] for part in ("train", "val")}) | {"test": [p.name for p in test]}
    return read_split(how, patches)


def read_split(path, patches):
    """Read and check a split file against the dataset."""
    try:
        split = json.loads(Path(path).read_text(encoding="utf-8"))
        split = {part: split[part] for part in PROPORTIONS}
        if not all(isinstance(part, list) for part in split.values()):
            raise ValueError("one of these is no list")
        names = [name for part in split.values() for name in part]
        strangers = set(names) - {p.name for p in patches}
    except FileNotFoundError:
        raise Fail(f"--split {path}: no such file; pass paper, official, or a split.json") from None
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise Fail(f"{path} is not a split file with lists of names under train, val and test ({first_line(problem)})") from None
    if strangers or len(set(names)) < len(names):
        raise Fail(f"{path}: {f'{min(map(str, strangers))} is not in the dataset' if strangers else 'a name stands in it twice'}")
    if not split["train"] or not split["val"]:
        raise Fail(f"{path}: train and val must not be empty")
    return split


def describe_split(split, patches):
    """The split as the text of its file: counts by part and class first, so that a person can review it, then the names."""
    by_name = {p.name: p for p in patches}
    counts = {part: dict(sorted(Counter(by_name[n].label for n in names).items())) for part, names in split.items()}
    cases = {part: {by_name[n].case for n in names} for part, names in split.items()}
    shared = sum(n > 1 for n in Counter(case for part in cases.values() for case in part).values())
    numbers = {part: len(found) for part, found in cases.items()}
    text = {"patches": counts, "cases": numbers, "cases_in_several_parts": shared, **split}
    return json.dumps(text, indent=1, ensure_ascii=False) + "\n"


def subsample(items, n):
    """At most n of the items, spread evenly over them; all where n is None."""
    n = len(items) if n is None else min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


# ---- the cache -----------------------------------------------------------------------------------------------------

class Cache:
    """What the frozen encoders say of images: posterior mean and log-variance of each image and of its mirror image, and
    the embedding of the image as it is.

    One folder per (VAE, encoder, size), named by the hash of their contents; in it shards of up to 32 images, each image
    known by the hash of its file. Nothing in it can be stale; a shard is there whole or not at all, so that an interrupted
    run goes on where it was and two runs may share a folder.
    """
    SHARD = 32

    def __init__(self, folder, vae_sha256, encoder_sha256, size):
        key = f"1 {vae_sha256} {encoder_sha256} {size}"
        self.folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.rows = {}                              # image hash -> (mean, logvar (2, 4, h, w), embedding (d_e,)), mapped
        self._read_all()

    @property
    def width(self):
        """d_e, the width of the embeddings."""
        return len(next(iter(self.rows.values()))[2])

    def _read_all(self):
        for path in sorted(self.folder.glob("[!.]*.safetensors")):      # hidden ones are not whole yet
            self._read(path)

    def _read(self, path):
        try:
            file = TensorFile(path)
            shard = [file.get(name) for name in ("mean", "logvar", "embedding")]
            self.rows |= {image: [tensor[i] for tensor in shard] for i, image in enumerate(json.loads(file.header["images"]))}
        except (Fail, KeyError, ValueError, TypeError, IndexError, RecursionError):
            raise Fail(f"{path} is no whole shard of the cache; remove it, it will be made again") from None

    def fill(self, paths, encoders, size):
        """Add the images that are missing. encoders() -> (encode, embed): called only then, and let go of at the end.

        encode: x (B, 3, size, size) -> mean, logvar; embed: PIL images -> e. Returns the hash of each path's file. Several
        processes share the work, and read what the others wrote.
        """
        with ThreadPoolExecutor() as pool:
            hashes = list(progress(pool.map(file_sha256, paths), "reading images", len(paths), leave=False))
            todo = broadcast(list({h: path for h, path in zip(hashes, paths) if h not in self.rows}.items()))
            shards = shard([todo[i:i + self.SHARD] for i in range(0, len(todo), self.SHARD)])
            if shards:
                encode, embed = encoders()
                with progress(total=sum(map(len, shards)), desc="caching", unit="image") as bar:
                    for part, images in zip(shards, prefetch(pool, load_rgb, [[p for _, p in part] for part in shards])):
                        self._write(part, images, encode, embed, size, bar)
            if todo and WORLD > 1:
                barrier()
                self._read_all()
        if lost := [path for h, path in zip(hashes, paths) if h not in self.rows]:
            raise Fail(f"{lost[0]} is not in the cache {self.folder} of this process; all must see the same images and cache")
        return hashes

    def _write(self, part, images, encode, embed, size, bar):
        rows = []
        for i in range(0, len(images), 4):          # in fours: small enough for 12 GB at 512 px
            x = to_tensor(images[i:i + 4], size)
            mean, logvar = encode(torch.cat([x, x.flip(-1)]))
            rows.append([t.unflatten(0, (2, -1)).transpose(0, 1) for t in (mean, logvar)] + [embed(images[i:i + 4])])
            bar.update(len(x))
        tensors = dict(zip(("mean", "logvar", "embedding"), (torch.cat(column) for column in zip(*rows))))
        names = json.dumps([h for h, _ in part])
        path = self.folder / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.safetensors"
        save_tensors(path, tensors, {"images": names})
        self._read(path)

    def batch(self, hashes, mirrored):
        """Image hashes and a flag for each -> mean, logvar (B, 4, h, w) and embeddings (B, d_e)."""
        rows = [self.rows[h] for h in hashes]
        mean, logvar = (torch.stack([row[k][int(m)] for row, m in zip(rows, mirrored)]) for k in (0, 1))
        return mean, logvar, torch.stack([row[2] for row in rows])

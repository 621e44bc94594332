"""Images, datasets, the split by case, and the cache of the frozen encoders' outputs."""
import hashlib
import io
import json
import math
import os
import re
import tomllib
import unicodedata
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, pairwise, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError
from safetensors.torch import load_file

from .app import (Fail, atomic_write, barrier, broadcast, check_same, csv_reader, file_sha256, foreign_file,
                  progress, safe_name, save_tensors, shard)
from .weights import BUILT_IN

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
TOY_SIDE = 64           # pixels of a patch of toy tissue
MAX_PIXELS, MIN_SIDE, MAX_ASPECT = 8192 * 8192, 16, 16
Image.MAX_IMAGE_PIXELS = None           # load_rgb checks the size itself, before it reads the pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28     # scanners' profiles exceed 1 MB
warnings.filterwarnings("ignore", module="PIL")         # they name no file
ENDS = b"\xff\xd9", b"IEND\xaeB`\x82"         # of JPEG and PNG; zeros may follow
LAYOUTS = tomllib.loads(Path(__file__).with_name("layouts.toml").read_text(encoding="utf-8"))
CLASSES, CASES, PARTS, FOREIGN = (LAYOUTS[key] for key in ("chaoyang", "cases", "parts", "foreign"))
NO_PATCH, CONTAINER, MAGNIFICATION = (re.compile(LAYOUTS[key], re.I | re.X)
                                      for key in ("no_patch", "container", "magnification"))
GENERATED, NOT_UTF8 = UNUSED = "generated images", "files whose names are not valid UTF-8"

# ---- images ------------------------------------------------------------------------------------------------
def load_rgb(path):
    """An image file -> PIL image in RGB: upright by its EXIF tag, transparency on white, 16 bits scaled to 8.
    The one reader of all programs. Fails with the file's name unless it is a single readable image from 16
    pixels a side to 8192 x 8192. Previews beside it and an alpha channel that is 0 everywhere are ignored."""
    with foreign_file(path, "cannot be read", "restore it, save it as 8-bit RGB, or remove it"):
        image = _open_image(path)
        short, long = sorted(image.size)
        if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT * short:
            raise ValueError(f"{image.width} x {image.height} pixels: cut patches, {MIN_SIDE} to 8192 a side")
        tags, raw = getattr(image, "tag_v2", {}), str([tile[3] for tile in image.tile])
        grey16 = image.mode.startswith("I;16")
        deep = grey16 or (";16" in raw and image.format in ("PNG", "TIFF"))
        planes = tags.get(284) == 2 and max(tags.get(258, [8])) > 8 and not deep    # Pillow would read noise
        if planes or image.mode in ("I", "F"):
            raise ValueError("it has 16 bits in separate planes, 32 bits, or floating-point pixels")
        image = ImageOps.exif_transpose(image)
        if grey16:                      # Pillow's own conversion would clip all above 255 to white
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if deep and np.max(image.convert("RGB").getextrema()) < 64:
            raise ValueError("its 16 bits are below a quarter of their range, as 8, 12 or 14 bits are")
        if deep and tags.get(262) == 0:         # white is 0, which Pillow inverts of 8 bits and less
            image = ImageOps.invert(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            unused = image.getchannel("A").getextrema()[1] < 2     # or 0 and 1
            if unused and "RGBa" in raw:
                raise ValueError("its alpha channel is 0 everywhere")
            if not unused or all(low == high for low, high in image.getextrema()):  # an empty one is white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

def _open_image(path):
    """Open an image at its full page. Raises what the file is instead, where Pillow does not recognise it."""
    if os.path.exists(path) and not os.path.isfile(path):       # opening a pipe would wait for ever
        raise ValueError("it is no regular file")
    with open(path, "rb") as f:
        data = f.read(2 ** 30)          # MAX_PIXELS of 16 bits take half of that
    body, plain = data.rstrip(b"\0"), data[:2] in (b"II", b"MM", b"BM")
    if len(data) - len(body) > (0.45 * len(data) if plain else 128) and not body.endswith(ENDS):
        raise ValueError("it ends in zeros, as an interrupted copy does")       # decoded as black or grey
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        found = [what for start, what in FOREIGN.items() if re.match(start.encode(), data, re.I | re.S)]
        raise ValueError(*found or ["cannot identify image format"]) from None
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format == "TIFF":
        sizes = [math.prod(page.size) for page in ImageSequence.Iterator(image)]
        image.seek(sizes.index(max(sizes)))
        pages = sum(2 * size > max(sizes) for size in sizes)        # the others are previews
    if pages > 1 and image.format != "MPO":                         # a phone's further frames
        raise ValueError(f"it has {pages} frames; only one can be meant")
    return image

def resize_crop(image, size, filter=Image.Resampling.LANCZOS, shorter=None):
    """Resize the shorter side (to `size` if not given), antialiased; center-crop, as torchvision does."""
    w, h = (int((shorter or size) * side / min(image.size)) for side in image.size)
    if (w, h) != image.size:
        image = image.resize((w, h), filter)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image if w == h == size else image.crop((left, top, left + size, top + size))

def to_tensor(images, size):
    """PIL images -> x (B, 3, size, size) in [-1, 1]."""
    x = np.stack([np.asarray(resize_crop(image, size)) for image in images])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1

def to_images(x):
    """x (B, 3, H, W) in about [-1, 1] -> PIL images: x/2 + 1/2, clamped, times 255, rounded."""
    x = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]

def save_sheet(path, groups, texts, columns=8):
    """Write groups of equally many image files as one; a row breaks no group. texts: above each image."""
    files = list(chain(*groups))
    columns = min(len(files), len(groups[0]) * max(1, columns // len(groups[0])))
    sheet = Image.new("RGB", (columns * 260, math.ceil(len(files) / columns) * 276), "white")
    for i, (file, text) in enumerate(zip(files, texts)):
        x, y = i % columns * 260, i // columns * 276
        ImageDraw.Draw(sheet).text((x, y + 2), text, fill="black")
        sheet.paste(load_rgb(file).resize((256, 256), Image.Resampling.LANCZOS), (x, y + 16))
    save_image(path, sheet)

def save_image(path, image, **text):
    """Write a PNG atomically, with text chunks {key: value}; one of an `adapter` is marked as generated."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    if "adapter" in text:               # in IPTC's term for what a model made
        info.add_itxt("XML:com.adobe.xmp", Path(__file__).with_name("generated.xmp").read_text("utf-8"))
    with atomic_write(path, sync=False) as temporary:
        image.save(temporary, pnginfo=info)

def list_files(folder):
    """The files under a folder, at any depth -> {name: kind}, sorted: "images", or why it is none.
    Links to folders are followed, each folder once. Fails (OSError) on a folder that cannot be read."""
    def stop(problem):
        raise problem
    kinds, seen = {}, {}
    for base, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        if seen.setdefault(os.path.realpath(base), base) != base:
            folders.clear()
            continue
        hidden = {name for name in folders if name.startswith(".")}
        folders[:] = sorted({*folders} - hidden)
        for path in (Path(base, name) for name in {*names} | hidden):
            name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
            kinds[name] = (NOT_UTF8 if re.search("[\ud800-\udfff]", name) else
                           "hidden files" if path.name.startswith(".") else
                           f"{suffix or 'other'} files" if suffix not in SUFFIXES else
                           "masks, annotations or previews" if NO_PATCH.fullmatch(name) else "images")
    return dict(sorted(kinds.items()))

def list_images(folder):
    """The image files under a folder, sorted by name. Prints what is left out, as masks and previews."""
    kinds = list_files(folder)
    if left := ", ".join(f"{n} {kind}" for kind, n in Counter(kinds.values()).items() if kind != "images"):
        print(f"note: not counted in {folder}: {left}")
    return [Path(folder, name) for name, kind in kinds.items() if kind == "images"]

def is_generated(path):
    """Whether an image file is marked as made by a model: by our text chunks, or by any program's XMP."""
    with open(path if os.path.isfile(path) else os.devnull, "rb") as f:         # a pipe would block
        return bool(re.search(rb"tEXtseed\0|rainedAlgorithmicMedia", f.read(2 ** 14)))

def is_output(folder):
    """Whether a folder is a run of train.py, or an --out of sample.py."""
    marks = {Path(folder, "config.json"): b'"args"', Path(folder, "samples.json"): b'"adapter_sha256"'}
    return any(path.is_file() and mark in path.read_bytes() for path, mark in marks.items())

def prefetch(work, batches):
    """[work(item) of each item], batch by batch; threads prepare the next batch while one is in use."""
    with ThreadPoolExecutor() as pool:
        pending = ([pool.submit(work, item) for item in batch] for batch in [*batches, []])
        for ready, _ in pairwise(pending):
            yield [future.result() for future in ready]

def subsample(items, n):
    """At most n of the items, spread evenly over them; all where n is None."""
    n = len(items) if n is None else min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]

# ---- datasets ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Patch:
    """One image of a dataset."""
    name: str                   # its path within the dataset, with slashes
    label: str                  # without slashes, as samples are filed under it
    case: str                   # patches of a case stay in one part
    part: str | None = None     # of the dataset's official split

    @property
    def title(self):
        """CLASS/rest of the name, without slashes and suffix: the name of images made from this patch."""
        rest = Path(self.name.removeprefix(self.label + "/")).with_suffix("")
        return f"{self.label}/{safe_name(str(rest))}"

def read_dataset(root, case=None, say=print):
    """A folder of patches -> [Patch], sorted by name.
    It has patches.csv, or train.json, val.json and test.json as in Chaoyang, or a folder per class, or only
    images (class "all"). The case is what the pattern `case` finds in a name (group 1, or all of it), or one
    of CASES, or the folder below the class; else every patch is its own. say: takes a line on what is left
    out or doubtful; None: a run exists, the layout is not doubted."""
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise Fail(f"{root} is no folder; pass one of patches")
    if above := next(filter(is_output, (root.resolve(), *root.resolve().parents)), None):
        raise Fail(f"{root} is in {above}, which train.py or sample.py made; pass a folder of real patches")
    with foreign_file(f"--case {case}", "is no regular expression", "see Python's module re"):
        re.compile(case or "")
    kinds, made = list_files(root), cache(lambda f: is_output(f) or any(f.glob("adapter*.safetensors")))
    for name in [name for name, kind in kinds.items() if kind == "images"]:
        if is_generated(root / name) or any(made(root / f) for f in Path(name).parents if f.name):
            kinds[name] = GENERATED
    lists = [name for stem in PARTS if (root / (name := f"{stem}.json")).is_file()]
    if (root / "patches.csv").is_file():
        lists, rows = ["patches.csv"], _table_rows(root / "patches.csv")
    elif lists:
        rows = chain(*(_list_rows(root / name, kinds) for name in lists))
    else:
        rows = _folder_rows(root, kinds, case, say)
    patches = [p for p in _find_files(root, rows, kinds, case) if kinds.get(p.name) not in UNUSED]
    left, used = defaultdict(list), {p.name for p in patches}.union(lists)
    for name, kind in kinds.items():
        if name not in used:
            left["images in no list or class folder" if kind == "images" else kind].append(name)
    for kind, found in left.items() if say else ():
        say(f"{root}: {len(found)} {kind} are left out, such as {found[0]!r}")
    if not patches:
        raise Fail(f"{root} contains no images; pass a folder with some, in one of the README's four layouts")
    if say and (n := sum(p.case == p.name for p in patches)):
        say(f"{root}: of {n} patches the case is unknown, so one may be in two parts; see --case")
    scales = {f.lower() for p in patches for f in p.name.split("/")[:-1] if MAGNIFICATION.fullmatch(f)}
    if say and len(scales) > 1:
        say(f"{root}: magnifications are mixed ({', '.join(sorted(scales))}): nuclei have several sizes")
    if repeated := [name for name, n in Counter(p.name for p in patches).items() if n > 1]:
        raise Fail(f"{root}: {len(repeated)} images are listed twice, such as {repeated[0]}")
    return sorted(patches, key=lambda p: p.name)

def _find_files(root, rows, on_disk, case):
    """(name, label, case, part) -> Patch, of each row; a name may be spelled otherwise than `on_disk`."""
    def folded(name):           # lists from Windows and macOS
        return unicodedata.normalize("NFC", name).casefold()
    similar, classes = defaultdict(set), {}
    for name in on_disk:
        similar[folded(name)].add(name)
    for name, label, own, part in rows:
        name = Path(name.replace("\\", "/")).as_posix()
        inside = {"", ".."}.isdisjoint(name.split("/"))         # of links and hidden folders too
        found = {name} if inside and (root / name).is_file() else similar[folded(name)]
        if len(found) != 1 or not (root / min(found)).is_file():
            raise Fail(f"{root}: {name!r} is not there (relative to it), no file, or has a \\; restore it")
        if (other := classes.setdefault(safe_name(label), label)) != label:
            raise Fail(f"{root}: classes {other!r} and {label!r} would share a folder of samples; rename one")
        own = own or _read_name(name, case, listed=True)[0]
        yield Patch(min(found), unicodedata.normalize("NFC", label), own, part)

def _read_name(name, case, listed=False):
    """A patch's name -> its case; whether a pattern finds it; the other folders. listed: the first of them is
    no class or container to be left out."""
    folders, found = name.split("/")[:-1], None
    for pattern in [case] if case else CASES.values():
        if (m := re.search(pattern, name)) and (found := m[group := min(1, m.re.groups)]):
            depth = name[:m.start(group)].count("/")
            del folders[depth:depth + 1]
            break
    if case and not found:
        raise Fail(f"--case {case} finds nothing in {name}")
    folders = folders[:listed] + [folder for folder in folders[listed:] if not CONTAINER.fullmatch(folder)]
    return found or (folders[1:] or [name])[0], bool(found), folders

def _folder_rows(root, kinds, case, say):
    """One subfolder per class, with folders of cases in it or not; or a flat folder (one class, "all").
    Fails where the names of either look like anything but classes and cases."""
    rows, cases = [], defaultdict(set)              # class -> names of folders that are taken for cases
    names = [name for name, kind in kinds.items() if kind == "images"]
    for name in [name for name in names if "/" in name] or names:
        own, found, folders = _read_name(name, case)
        label, *below = folders or ["all"]
        if below and not found:
            cases[label].add(own)
        rows.append((name, label, own, None))
    labels = {label.lower() for _, label, *_ in rows}
    words = {word for label in labels for word in re.split(r"[\W_]+", label)[:2]}
    parts = {word for word in words if word in PARTS or MAGNIFICATION.fullmatch(word)}
    if len(parts) > 1 or parts & labels:        # test_x alone is a class
        raise Fail(f"{root} has a folder per part or magnification ({min(parts)}/...), not one per class: "
                   "pass one of them, put the classes on top, or write patches.csv")
    if say and cases:
        few, found = min(cases, key=lambda label: len(cases[label])), Counter(chain(*cases.values()))
        n, shared = len(cases[few]), sum(k > 1 for k in found.values())
        mixed = 2 * shared > len(found)
        text = (f"{root}: folders such as {few}/{min(cases[few])} are taken for cases: {len(found)} names, "
                f"{shared} of them in several classes, {n} in {few}")
        if (len(labels) == 1 or n < len(PROPORTIONS) or not re.search(r"\d", "".join(found))
                or any(map(MAGNIFICATION.fullmatch, found)) or (mixed and len(found) < 10)):
            raise Fail(f"{text}. If they are cases, pass --case '/([^/]+)/'; if classes below cases, "
                       "--case '^([^/]+)/'; else another folder, another --case, or patches.csv")
        if mixed or n < 10:
            say(f"{text}; see --case")
    return rows

def _table_rows(path):
    """patches.csv, with , ; or tabs -> (file, label, case, part or None) of each row."""
    with foreign_file(path, "is no table in UTF-8", "write it again"):
        table = csv_reader(path.read_bytes())
        names = table.fieldnames = [name.strip().lower() for name in table.fieldnames]
        if [*map(names.count, ("file", "label"))] != [1, 1] or max(map(names.count, ("case", "part"))) > 1:
            raise Fail(f"{path}: line 1 needs file and label, each column once; has {','.join(names)[:80]}")
        for row in table:
            file, label, case, part = ((row.get(k) or "").strip() for k in ("file", "label", "case", "part"))
            if not file or not label or "/" in label or part.lower() not in {"", *PARTS}:
                line = f"{path}: line {table.line_num}"
                raise Fail(f"{line} needs a file and a label without /; part is train, val or test")
            yield file, label, case, PARTS.get(part.lower())

def _list_rows(path, kinds):
    """A list as Chaoyang's -> (name, label, None, part) of each entry; kinds: takes those without a label."""
    with foreign_file(path, 'is no list of {"name": ..., "label": ...}', "write it again"):
        for i, row in enumerate(json.loads(path.read_bytes())):
            name = str(row["name"])
            votes = [row["label"]] * 2 if "label" in row else [row.get(f"label_{x}") for x in "ABC"]
            label = max(votes, key=votes.count)
            if votes.count(label) < 2:
                kinds[name] = "patches without a majority among the annotators"
            elif re.fullmatch(r"[0-3](\.0*)?", str(label).strip()):
                yield name, CLASSES[int(float(label))], None, PARTS[path.stem]
            else:
                raise ValueError(f"entry {i} has the label {label!r}, not 0 to 3: {', '.join(CLASSES)}")

# ---- the split ---------------------------------------------------------------------------------------------
PROPORTIONS = dict(train=5398, val=387, test=375)     # the paper's counts; its split itself is not published

def split_patches(patches, parts=PROPORTIONS):
    """[Patch] -> {part: [names]}, with every case in one part and each class near its proportion in all.
    Deterministic and greedy: from the largest case down (ties by hash), each goes where the counts n of part
    and class come nearest to their targets m, by the increase of Σ (n - m)²/m. No part stays empty."""
    cases = {}
    for p in patches:
        cases.setdefault(p.case, []).append(p)
    if len(cases) < len(parts):
        raise Fail(f"{len(cases)} cases cannot be split into {len(parts)}; add cases, or pass --split FILE")
    total, whole = Counter(p.label for p in patches), sum(parts.values())
    target = {(part, label): n * size / whole for part, size in parts.items() for label, n in total.items()}
    count, chosen = Counter(), {part: [] for part in parts}
    order = sorted(cases, key=lambda case: (-len(cases[case]), hashlib.sha256(case.encode()).hexdigest()))
    for left, case in zip(range(len(order), 0, -1), order):
        added = Counter(p.label for p in cases[case])
        empty = [part for part in parts if not chosen[part]]
        part = min(empty if len(empty) == left else parts, key=lambda part: sum(
            n * (2 * (count[part, label] - target[part, label]) + n) / target[part, label]
            for label, n in added.items()))
        chosen[part] += cases[case]
        count.update({(part, label): n for label, n in added.items()})
    return {part: sorted(p.name for p in chosen[part]) for part in parts}

def make_split(patches, how):
    """-> {"train": [names], "val": [...], "test": [...]}.
    how: "paper" (pooled, the paper's proportions), "official" (validation taken from train.json where there
    is no val.json) or the path of a split file."""
    if how == "paper":
        if any(p.part for p in patches):
            print("note: the dataset's own parts are pooled, as in the paper; --split official keeps them")
        return split_patches(patches)
    if how != "official":
        return read_split(how, patches)
    own = {part: [p for p in patches if p.part == part] for part in PROPORTIONS}
    if not own["test"] or not own["train"] or sum(map(len, own.values())) < len(patches):
        raise Fail("--split official needs a dataset whose patches all have a part: train.json and test.json")
    split = {part: sorted(p.name for p in found) for part, found in own.items()}
    if not own["val"]:
        split |= split_patches(own["train"], {part: PROPORTIONS[part] for part in ("train", "val")})
    return split

def read_split(path, patches):
    """Read and check a split file against the dataset."""
    with foreign_file(path, "is no split of these patches", "pass their --data, or another --run or --split"):
        split = json.loads(Path(path).read_bytes())
        split = {part: [*split[part]] for part in PROPORTIONS}
        names = [name for part in split.values() for name in part]
        if strangers := set(names) - {p.name for p in patches}:
            raise ValueError(f"{min(map(str, strangers))} is not in the dataset")
        if len(set(names)) < len(names) or not split["train"] or not split["val"]:
            raise ValueError("a name is in it twice, or train or val is empty")
    return split

def describe_split(split, patches):
    """The split as the text of its file: counts first, for review, then names. Says if parts share cases."""
    by_name, classes, cases = {p.name: p for p in patches}, {}, {}
    for part, names in split.items():
        classes[part] = Counter(sorted(by_name[name].label for name in names))
        cases[part] = {by_name[name].case for name in names}
    facts = dict(patches=classes, cases={part: len(found) for part, found in cases.items()})
    facts["cases_in_several_parts"] = n = sum(k > 1 for k in Counter(chain(*cases.values())).values())
    if n:
        print(f"note: {n} cases are in several parts (split.json): the FID of val and test will be too good")
    if unused := len(patches) - sum(map(len, split.values())):
        print(f"note: {unused} patches are in no part of the split (split.json) and not used")
    return json.dumps(facts | split, indent=1, ensure_ascii=False) + "\n"

def note_equal_images(names, hashes, patches):
    """Print how many files of equal content are in several parts or classes. names, hashes: {part: [...]}."""
    label, places = {p.name: p.label for p in patches}, defaultdict(dict)
    for part, found in hashes.items():
        for name, digest in zip(names[part], found):
            places[digest].setdefault((part, label[name]), name)
    if several := [[*place.values()] for place in places.values() if len(place) > 1]:
        print(f"note: {len(several)} images are in several parts or classes with equal content, such as "
              f"{several[0][0]} and {several[0][1]}")

def write_toy_tissue(folder):
    """Cut ldm/toy/CLASS.jpg, a slide in each row, into the missing folder/CLASS/SLIDE/PATCH.png -> folder."""
    for sheet in sorted(BUILT_IN["toy"].glob("*.jpg")):
        image = load_rgb(sheet)
        for y, x in product(range(0, image.height, TOY_SIDE), range(0, image.width, TOY_SIDE)):
            path = folder / sheet.stem / f"{sheet.stem}-{y // TOY_SIDE:03d}" / f"{x // TOY_SIDE:02d}.png"
            if not path.exists():
                save_image(path, image.crop((x, y, x + TOY_SIDE, y + TOY_SIDE)))
    return folder

# ---- the cache of the frozen networks' outputs -------------------------------------------------------------
def hash_files(paths):
    """The SHA-256 of each file."""
    with ThreadPoolExecutor() as pool:
        return list(progress(pool.map(file_sha256, paths), "reading images", len(paths), leave=False))

class Cache:
    """Posterior mean and log-variance of an image and of its mirror image, and its embedding. A folder per
    (VAE, encoder, size), a file per image, named by hashes: never stale, shared by runs, interruptible."""
    BATCH, COLUMNS = 4, ("mean", "logvar", "embedding")     # four: small enough for 12 GB at 512 px

    def __init__(self, folder, vae_sha256, encoder_sha256, size):
        key = f"2 {vae_sha256} {encoder_sha256} {size}"
        self.folder, self.size = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16], size
        self._open = lru_cache(8192)(self._load)        # mapped; Linux allows a process 65,530 mappings

    def _load(self, image):
        with foreign_file(self._file(image), "is damaged", "remove it, and cache the images again"):
            file = load_file(self._file(image))
            if not all(file[name].any() for name in self.COLUMNS):
                raise ValueError("a column is 0 everywhere")
            return [file[name] for name in self.COLUMNS]

    def _file(self, image):
        return self.folder / f"{image}.safetensors"

    def fill(self, paths, encoders):
        """Add the images that are missing -> the hash of each path's file.
        encoders() -> (encode, embed), called only where images are missing. encode: x (B, 3, size, size) ->
        mean, logvar; embed: PIL images -> e. Several processes share the work."""
        hashes = hash_files(paths)
        check_same("images", hashes)
        files, images = dict(zip(hashes, paths)), [*dict.fromkeys(hashes)]
        batches = [images[i:i + self.BATCH] for i in range(0, len(images), self.BATCH)]
        # whole batches, as another one may round differently
        batches = shard(broadcast([b for b in batches if not all(self._file(image).exists() for image in b)]))
        if batches:
            (encode, embed), small = encoders(), []
            loaded = prefetch(lambda image: load_rgb(files[image]), batches)
            loaded = progress(loaded, "caching", len(batches), unit="image", unit_scale=self.BATCH)
            for batch, found in zip(batches, loaded):
                small += [files[name] for name, image in zip(batch, found) if 2 * min(image.size) < self.size]
                x = to_tensor(found, self.size)
                latents = encode(torch.cat([x, x.flip(-1)]))
                mean, logvar = (t.unflatten(0, (2, -1)).transpose(0, 1) for t in latents)
                for image, *row in zip(batch, mean, logvar, embed(found)):
                    if not self._file(image).exists():
                        save_tensors(self._file(image), dict(zip(self.COLUMNS, row)), {})
            if small:
                print(f"note: images such as {small[0]} are enlarged over twice (--size {self.size})")
        barrier()
        if lost := [image for image in files if not self._file(image).exists()]:
            raise Fail(f"{files[lost[0]]} is not in the cache; all processes must see the same files")
        return hashes

    def batch(self, hashes, mirrored):
        """Image hashes and a flag for each -> mean, logvar (B, 4, h, w) and embeddings (B, d_e)."""
        mean, logvar, e = map(torch.stack, zip(*map(self._open, hashes)))
        row = torch.arange(len(e)), torch.as_tensor(mirrored).long()
        return mean[row], logvar[row], e

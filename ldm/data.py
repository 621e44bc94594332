"""Images, datasets, the split by case, and the cache of the frozen encoders' outputs."""
import csv
import hashlib
import io
import json
import math
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain, product, zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError

from .app import (Fail, atomic_write, barrier, broadcast, file_sha256, foreign_file, progress, safe_name,
                  save_tensors, shard)
from .weights import BUILT_IN, TensorFile

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
TOY_SIDE = 64           # pixels of a patch of toy tissue
MAX_PIXELS, MIN_SIDE, MAX_ASPECT = 8192 * 8192, 16, 16
Image.MAX_IMAGE_PIXELS = None           # load_rgb checks the size itself, before it reads the pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28     # scanners' profiles exceed 1 MB
warnings.filterwarnings("ignore", module="PIL")         # they name no file
ENDS = b"\xff\xd9", b"IEND\xaeB`\x82"         # of JPEG and PNG; zeros may follow
# First bytes (regular expressions) of what Pillow cannot open -> what it is.
FOREIGN = {
    rb"$": "it is empty", rb"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
    rb"\s*<": "it is a web page or XML, not an image", rb".{4}ftyp(hei|mif|msf|hev)": "HEIC is not supported",
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "a TIFF of a kind that Pillow cannot read, such as JPEG 2000, alpha "
    "beside CMYK, floating point or 32 bits; save it as 8-bit RGB"}

# ---- images ------------------------------------------------------------------------------------------------

def load_rgb(path):
    """An image file -> PIL image in RGB: upright by its EXIF tag, transparency on white, 16 bits scaled to 8.

    The one reader of train.py, sample.py and fid.py. Fails with the file's name unless it is a single
    readable image from 16 pixels a side to 8192 x 8192. Smaller previews beside it in the file are ignored,
    and so is an alpha channel that is 0 everywhere.
    """
    with foreign_file(path, "cannot be read"), _open_image(path) as image:
        short, long = sorted(image.size)
        if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT * short:
            raise Fail(f"{path} has {image.width} x {image.height} pixels; remove it, or cut patches of it: "
                       f"from {MIN_SIDE} a side to {MAX_PIXELS // 10 ** 6} megapixels, no strips")
        tags, raw = getattr(image, "tag_v2", {}), str([tile[3] for tile in image.tile])
        deep = image.mode[0] in "IF" or (";16" in raw and image.format in ("PNG", "TIFF"))
        if tags.get(284) == 2 and max(tags.get(258, [8])) > 8 and not deep:     # Pillow would read noise
            raise Fail(f"{path} is a 16-bit TIFF with separate planes; save it as 8 bits, or interleaved")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":       # Pillow's own conversion would clip all above 255 to white
            pixels = np.asarray(image).astype(np.float64)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise Fail(f"{path} has floating-point pixels or more than 16 bits; save it as 8 or 16 bits")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
        if deep and max(image.getchannel(band).getextrema()[1] for band in {*image.getbands()} - {"A"}) < 64:
            raise Fail(f"{path} has 16 bits a channel, all below a quarter of their range: its 8, 12 or 14 "
                       "bits would come out black; save it as 8 bits")
        if deep and tags.get(262) == 0:         # white is 0, which Pillow inverts of 8 bits and less
            image = ImageOps.invert(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            unused = image.getchannel("A").getextrema() == (0, 0)
            if unused and "RGBa" in raw:
                raise Fail(f"{path} has an alpha channel that is 0 everywhere; save it without")
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
        found = [what for start, what in FOREIGN.items() if re.match(start, data[:64], re.I | re.S)]
        raise ValueError(*found or ["cannot identify image format"]) from None
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format == "TIFF":
        sizes = []
        for page in range(pages):
            image.seek(page)
            sizes.append(math.prod(image.size))
        image.seek(sizes.index(max(sizes)))
        pages = sum(2 * size > max(sizes) for size in sizes)        # the others are previews
    if pages > 1 and image.format != "MPO":                         # a phone's further frames
        raise Fail(f"{path} has {pages} frames; save the one you mean as a single image")
    return image

def resize_crop(image, size, filter=Image.Resampling.LANCZOS, shorter=None):
    """Resize the shorter side (to `size` if not given), antialiased; center-crop, as torchvision does."""
    short = min(image.size)
    w, h = (int((shorter or size) * side / short) for side in image.size)
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

def contact_sheet(groups, columns=8, texts=()):
    """Groups, equally many PIL images each -> one image, tiles 128 to 256 wide; no group is broken over rows.

    texts: a line above each image, in their order.
    """
    images = [image for group in groups for image in group]
    columns = min(len(images), len(groups[0]) * max(1, columns // len(groups[0])))
    side, head = (256, 16) if texts else (min(256, max(128, images[0].width)), 0)
    width, height, rows = side + 4, side + head + 4, -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width - 4, rows * height - 4), "white")
    for i, (image, text) in enumerate(zip_longest(images, texts, fillvalue="")):
        x, y = i % columns * width, i // columns * height
        ImageDraw.Draw(sheet).text((x, y + 2), text, fill="black")
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y + head))
    return sheet

# IPTC's term for what a model made, in XMP with the sha256 of our adapter
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{}" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="adapter {}"/>
</rdf:RDF></x:xmpmeta>"""

def save_image(path, image, made_by=None, **text):
    """Write a PNG atomically, with the text chunks {key: value}; made_by: of a generated one, its adapter."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text | ({"adapter": made_by} if made_by else {})).items():
        info.add_text(key, str(value))
    if made_by:
        info.add_itxt("XML:com.adobe.xmp", XMP.format(GENERATED, made_by))
    with atomic_write(path, sync=False) as temporary:
        image.save(temporary, pnginfo=info)

def list_images(folder, left=None):
    """The image files under a folder, at any depth, sorted; hidden ones are omitted.

    left: a defaultdict(list) that receives the other files by their kind. Links to folders are followed, each
    folder once. Fails (OSError) on a folder that cannot be read.
    """
    def stop(problem):
        raise problem

    found, seen, left = defaultdict(list), set(), defaultdict(list) if left is None else left
    for base, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        left["hidden files"] += [Path(base, name) for name in folders + names if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            suffix = path.suffix.lower()
            (found["images"] if suffix in SUFFIXES else left[f"{suffix or 'other'} files"]).append(path)
    return sorted(found["images"], key=Path.as_posix)

def is_generated(path):
    """Whether an image file is marked as made by a model: by our text chunks, or by any program's XMP."""
    with open(path if os.path.isfile(path) else os.devnull, "rb") as f:         # a pipe would block
        return bool(re.search(rb"tEXtseed\0|rainedAlgorithmicMedia", f.read(2 ** 14)))

def is_output(folder):
    """Whether a folder is a run of train.py, or an --out of sample.py."""
    marks = {Path(folder, "config.json"): b'"args"', Path(folder, "samples.json"): b'"adapter_sha256"'}
    return any(path.is_file() and mark in path.read_bytes() for path, mark in marks.items())

def prefetch(pool, work, batches):
    """[work(item) of each item], batch by batch; the pool prepares the next batch while one is in use."""
    pending = []
    for batch in [*batches, []]:
        ready, pending = pending, [pool.submit(work, item) for item in batch]
        if ready:
            yield [future.result() for future in ready]

def subsample(items, n):
    """At most n of the items, spread evenly over them; all where n is None."""
    n = len(items) if n is None else min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]

# ---- datasets ----------------------------------------------------------------------------------------------

CLASSES = ("normal", "serrated", "adenocarcinoma", "adenoma")       # labels 0 to 3 of the Chaoyang format
PARTS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test",
             testing="test")
# What names a case in a path (group 1): TCGA, Chaoyang (<case>-<slide>-IMG<row>x<col>-<label>), BreakHis, IDC
CASES = (r"(TCGA-\w\w-\w{4})", r"(?:^|/)(\d+)[^/\s]*?-IMG\d+x\d+[^/]*$", r"SOB_[^/]*?[-_](\d+-\w+)",
         r"^(\d+)/\d/\1_idx")
MAGNIFICATION = re.compile(r"\d+ ?x", re.I)
CONTAINER = re.compile(r"images?|imgs?|patch(es)?|tiles?|originals?|raw", re.I)      # neither class nor case
NO_PATCH = re.compile(      # folders Tumor_masks/, files x-mask.png
    r"(.*/)?((.*[_ .-])?({0})([_ -][^/]*)?|labels?|gt)/.*|(.*/)?(.*[_ .-])?({0}|labels?|gt)\.\w+".format(
        "masks?|annotations?|segmentations?|overlays?|thumb(?:nail)?s?|previews?|ground.?truth"), re.I)

@dataclass(frozen=True)
class Patch:
    """name: path within the dataset, with slashes. label: one path component, as samples are filed under it.

    case: patches of a case stay in one part. part: of the dataset's official split, or None.
    """
    name: str
    label: str
    case: str
    part: str | None = None

    def __post_init__(self):
        text, steps = self.name + self.label, self.name.split("/")
        if text != text.encode(errors="replace").decode():
            raise Fail(f"the name {self.name!r} is not valid UTF-8; rename the file")
        if not steps[0] or ".." in steps or set(self.name) & set("\\\0"):
            raise Fail(f"{self.name!r} names a file outside the folder; use paths within it, with slashes")
        if not self.label.strip(".") or set(self.label) & set("/\\\0"):
            raise Fail(f"{self.name!r} has the label {self.label!r}, which cannot name a folder; use another")

    @property
    def title(self):
        """CLASS/rest of the name, without slashes and suffix: the name of images made from this patch."""
        rest = Path(self.name.removeprefix(self.label + "/")).with_suffix("")
        return f"{self.label}/{safe_name(str(rest))}"

def read_dataset(root, case=None, say=print):
    """A folder of patches -> [Patch], sorted by name.

    It has patches.csv (file,label[,case][,part]), or train.json, val.json and test.json as Chaoyang has them,
    or a folder per class, or only images (class "all"). The case is what the regular expression `case` finds
    in a name (group 1, or all of it), or one of CASES, or the folder below the class (one name below two
    classes is one case); else every patch is its own. Images that this program made are left out.
    say: takes a line on what is left out or doubtful; None: a run exists, so the layout is not doubted.
    """
    root, names, left, made = Path(os.path.expanduser(root)), [], defaultdict(list), set()
    if not root.is_dir():
        raise Fail(f"{root}: no such folder of patches")
    if above := next(filter(is_output, (root.resolve(), *root.resolve().parents)), None):
        raise Fail(f"{root} is in {above}, which train.py or sample.py made; pass a folder of real patches")
    with foreign_file(f"--case {case}", "is no regular expression", "see Python's module re"):
        re.compile(case or "")

    @cache
    def ours(folder):
        return folder != root and (is_output(folder) or any(folder.glob("adapter*.safetensors"))
                                   or ours(folder.parent))

    for path in list_images(root, left):
        generated = ours(path.parent) or (path.suffix.lower() == ".png" and is_generated(path))
        (made.add if generated else names.append)(path.relative_to(root).as_posix())
    left["images that this program made"] = sorted(made)
    lists = {root / f"{stem}.json": part for stem, part in PARTS.items() if (root / f"{stem}.json").is_file()}
    if (table := root / "patches.csv").is_file():
        rows, lists = _table_rows(table), [table]
    elif lists:
        rows = [row for path, part in lists.items() for row in _list_rows(path, part)]
    else:
        rows = _folder_rows(root, names, case, left, say)
    patches = _find_files(root, rows, names, case, left)
    if lists:
        listed = {patch.name for patch in patches}.union(*left.values())
        left["images that are not listed"] = [name for name in names if name not in listed]
    patches = sorted((patch for patch in patches if patch.name not in made), key=lambda p: p.name)
    for kind, found in left.items():
        if (found := [str(file) for file in found if file not in lists]) and say:
            say(f"{root}: {len(found)} {kind} are left out, such as {found[0]}")
    if say and patches and all(p.case == p.name for p in patches):
        say(f"{root}: which patches share a case is unknown, so one may be in two parts; see --case")
    if not patches:
        raise Fail(f"{root} contains no images; pass train.json and test.json, a folder per class, or images")
    if repeated := [name for name, n in Counter(p.name for p in patches).items() if n > 1]:
        raise Fail(f"{root}: {len(repeated)} images are listed twice, such as {repeated[0]}")
    return patches

def _find_files(root, rows, names, case, left):
    """[(where, name, label, case, part)] -> [Patch]. names: of files on disk, one of which may be meant where
    backslashes, Unicode's normal form or the case of letters differ.
    """
    def folded(name):
        return unicodedata.normalize("NFC", name).casefold()

    patches, on_disk = [], defaultdict(set)
    for name in names:
        on_disk[folded(name)].add(name)
    for where, name, label, own, part in rows:
        try:
            name = Path(name.replace("\\", "/")).as_posix()
            own = own or _find_case(name, case)[0] or (name.split("/")[1:-1] or [name])[0]
            patch = Patch(name, unicodedata.normalize("NFC", label or "?"), own, part)
            if not (root / name).is_file():
                near = on_disk[folded(name)] - {name}
                if len(near) != 1:
                    raise Fail(f"{name!r} is not there, or no file; restore it, or omit it")
                patch = replace(patch, name=min(near))
        except Fail as problem:
            raise Fail(f"{where}: {problem}") from None
        if label is None:
            left["patches without a majority among the annotators"].append(name)
        else:
            patches.append(patch)
    return patches

def _find_case(name, case):
    """-> the case in a patch's name and which part of the path holds it, or (None, None)."""
    for pattern in [case] if case else CASES:
        if (m := re.search(pattern, name)) and (found := m[group := min(1, m.re.groups)]):
            return found, name[:m.start(group)].count("/")
    if case:
        raise Fail(f"--case {case} finds nothing in {name}")
    return None, None

def _folder_rows(root, names, case, left, say):
    """One subfolder per class, with folders of cases in it or not; or a flat folder (one class, "all")."""
    rows, guessed = [], defaultdict(set)            # class -> names of folders that are taken for cases
    for name in names:
        if NO_PATCH.fullmatch(name):
            left["masks, annotations or thumbnails"].append(name)
            continue
        found, depth = _find_case(name, case)
        levels = [n for i, n in enumerate(name.split("/")[:-1]) if i != depth and not CONTAINER.fullmatch(n)]
        top = re.split(r"[\W_]", levels[0].lower())[0] if levels else ""        # train of Train_images
        if top in PARTS or MAGNIFICATION.fullmatch(top):
            raise Fail(f"{root} has a folder per part or magnification ({levels[0]}/...), not one per class: "
                       "pass one of them, or put the classes on top; --split FILE keeps a split of yours")
        label = levels[0] if levels else "all"
        if levels[1:] and not found:
            guessed[label].add(found := levels[1])
        rows.append((root, name, label, found or name, None))
    if nested := [row for row in rows if "/" in row[1]]:
        left["images beside the folders of classes"] = [row[1] for row in rows if "/" not in row[1]]
    rows = nested or rows
    if say and guessed:
        _doubt_cases(root, guessed, len({row[2] for row in rows}), say)
    return rows

def _doubt_cases(root, cases, classes, say):
    """Fail where the folders below the classes, {class: {name}}, look like anything but cases."""
    few, names = min(cases, key=lambda label: len(cases[label])), Counter(chain(*cases.values()))
    n, same = len(cases[few]), 2 * sum(k > 1 for k in names.values()) > len(names)
    why = (f"{few} is the only class" if classes == 1 else f"{few} has {n}" if n < len(PROPORTIONS) else
           "none has a number" if not re.search(r"\d", "".join(names)) else
           "they are magnifications" if any(map(MAGNIFICATION.fullmatch, names)) else
           "most are in several classes" if same and len(names) < 10 else "")
    text = f"{root}: folders such as {few}/{min(cases[few])} are taken for cases"
    if why:
        raise Fail(f"{text}, but {why}. If they are cases, pass --case '/([^/]+)/'; if classes below cases, "
                   "--case '^([^/]+)/'; else another folder, another --case, or patches.csv")
    if same or n < 10:
        say(f"{text}, {n} in {few}{', most of them in several classes' if same else ''}; see --case")

def _table_rows(path):
    """patches.csv, with , ; or tabs -> [(where, file, label, case, part or None)]."""
    with foreign_file(path, "is no table in UTF-8", "write it again"):
        data, rows = path.read_bytes(), []
        lines = data.decode(json.detect_encoding(data)).splitlines()
        table = csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count))
        table.fieldnames = [name.strip().lower() for name in table.fieldnames]
        for row in table:
            file, label, case, part = ((row.get(k) or "").strip() for k in ("file", "label", "case", "part"))
            if not (file and label) or (part and part.lower() not in PARTS):
                raise Fail(f"{path}: line {table.line_num} needs file and label; part is train, val or test")
            rows.append((f"{path}: line {table.line_num}", file, label, case, PARTS.get(part.lower())))
    return rows

def _list_rows(path, part):
    """A list as Chaoyang's -> [(where, name, label (None: annotators disagree), None, part)]."""
    with foreign_file(path, "is not valid JSON", "write it again"):
        rows, found = json.loads(path.read_bytes()), []
    if not isinstance(rows, list):
        raise Fail(f'{path} must contain a list of {{"name": ..., "label": ...}}')
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise Fail(f'{path}: entry {i} has no "name"')
        votes = [row["label"]] * 2 if "label" in row else [row.get(f"label_{x}") for x in "ABC"]
        label = max(votes, key=votes.count)
        if (decided := votes.count(label) > 1) and not re.fullmatch(r"[0-3](\.0*)?", str(label).strip()):
            raise Fail(f"{path}: entry {i} has the label {label!r}; it must be 0 to {len(CLASSES) - 1} "
                       f"({', '.join(CLASSES)}), or be decided by label_A, label_B and label_C")
        label = CLASSES[int(float(label))] if decided else None
        found.append((f"{path}: entry {i}", row["name"], label, None, part))
    return found

# ---- the split ---------------------------------------------------------------------------------------------

PROPORTIONS = dict(train=5398, val=387, test=375)     # the paper's counts; its split itself is not published

def split_patches(patches, parts=PROPORTIONS):
    """[Patch] -> {part: [names]}, with every case in one part and each class near its proportion in all.

    Deterministic and greedy: from the largest case down (ties by hash), each goes where the counts n of part
    and class come nearest to their targets m, by the increase of Σ (n - m)²/m. No part stays empty.
    """
    cases = {}
    for p in patches:
        cases.setdefault(p.case, []).append(p)
    if len(cases) < len(parts):
        raise Fail(f"{len(patches)} patches of {len(cases)} cases cannot be split into {', '.join(parts)} by "
                   "case; add cases, or pass a split file with --split")
    total, whole = Counter(p.label for p in patches), sum(parts.values())
    target = {(part, label): n * size / whole for part, size in parts.items() for label, n in total.items()}
    count, chosen = Counter(), {part: [] for part in parts}

    def cost(part):
        return sum(n * (2 * (count[part, label] - target[part, label]) + n) / target[part, label]
                   for label, n in added.items())

    order = sorted(cases, key=lambda case: (-len(cases[case]), hashlib.sha256(case.encode()).hexdigest()))
    for left, case in zip(range(len(order), 0, -1), order):
        added = Counter(p.label for p in cases[case])
        empty = [part for part in parts if not chosen[part]]
        part = min(empty if len(empty) == left else parts, key=cost)
        chosen[part] += cases[case]
        count.update({(part, label): n for label, n in added.items()})
    return {part: sorted(p.name for p in chosen[part]) for part in parts}

def make_split(patches, how):
    """-> {"train": [names], "val": [...], "test": [...]}.

    how: "paper" (pooled, the paper's proportions), "official" (test.json and val.json kept; validation taken
    from train.json where there is none) or the path of a split file. Prints which class a part lacks.
    """
    if how == "paper":
        split, label = split_patches(patches), {p.name: p.label for p in patches}
        for name in sorted(set(label.values())):
            cases = {p.case for p in patches if p.label == name}
            if lacks := [part for part, names in split.items() if name not in map(label.get, names)]:
                print(f"note: class {name} has no patch in {', '.join(lacks)}; it has {len(cases)} cases")
        return split
    if how != "official":
        return read_split(how, patches)
    own = {part: [p for p in patches if p.part == part] for part in PROPORTIONS}
    if not own["test"] or not own["train"] or sum(map(len, own.values())) < len(patches):
        raise Fail("--split official needs a dataset whose patches all have a part: train.json and test.json")
    if shared := {p.case for p in own["test"]} & {p.case for p in own["train"] + own["val"]}:
        print(f"note: {len(shared)} cases are in both train.json and test.json: test scores will be too good")
    split = {part: sorted(p.name for p in found) for part, found in own.items()}
    if not own["val"]:
        split |= split_patches(own["train"], {part: PROPORTIONS[part] for part in ("train", "val")})
    return split

def read_split(path, patches):
    """Read and check a split file against the dataset."""
    if not Path(path).exists():
        raise Fail(f"--split {path}: no such file; pass paper, official, or a split.json")
    with foreign_file(path, "is no split of these patches", "list names under train, val and test"):
        split = json.loads(Path(path).read_bytes())
        split = {part: split[part] for part in PROPORTIONS}
        names = [name for part in split.values() for name in part]
        if not all(isinstance(part, list) for part in split.values()):
            raise ValueError("one of these is no list")
        if strangers := set(names) - {p.name for p in patches}:
            raise ValueError(f"{min(map(str, strangers))} is not in the dataset")
        if len(set(names)) < len(names):
            raise ValueError("a name is in it twice")
        if not split["train"] or not split["val"]:
            raise ValueError("train or val is empty")
    return split

def describe_split(split, patches):
    """The split as the text of its file: counts by part and class first, for review, then the names."""
    by_name = {p.name: p for p in patches}
    labels = {part: Counter(by_name[n].label for n in names) for part, names in split.items()}
    counts = {part: dict(sorted(count.items())) for part, count in labels.items()}
    cases = {part: {by_name[n].case for n in names} for part, names in split.items()}
    shared = sum(n > 1 for n in Counter(case for part in cases.values() for case in part).values())
    numbers = {part: len(found) for part, found in cases.items()}
    text = {"patches": counts, "cases": numbers, "cases_in_several_parts": shared, **split}
    return json.dumps(text, indent=1, ensure_ascii=False) + "\n"

def note_equal_images(names, hashes, patches):
    """Print how many files of equal content are in several parts or classes. names, hashes: {part: [...]}."""
    label, places = {p.name: p.label for p in patches}, defaultdict(list)
    for part, found in hashes.items():
        for name, digest in zip(names[part], found):
            places[digest].append((part, label[name], name))
    for k, what in enumerate(("parts", "classes")):
        if several := [rows for rows in places.values() if len({row[k] for row in rows}) > 1]:
            print(f"note: {len(several)} images are in several {what} with equal content, such as "
                  f"{several[0][0][2]} and {several[0][-1][2]}")

def write_toy_tissue(folder):
    """Cut the sheets ldm/toy/CLASS.jpg, a slide in each row, into folder/CLASS/SLIDE/PATCH.png -> the folder.

    Existing patches are kept.
    """
    for sheet in sorted(BUILT_IN["toy"].glob("*.jpg")):
        pixels = np.asarray(load_rgb(sheet))
        rows, columns = (n // TOY_SIDE for n in pixels.shape[:2])
        for row, column in product(range(rows), range(columns)):
            path = folder / sheet.stem / f"{sheet.stem}-{row:03d}" / f"{column:02d}.png"
            if not path.exists():
                y, x = row * TOY_SIDE, column * TOY_SIDE
                save_image(path, Image.fromarray(pixels[y:y + TOY_SIDE, x:x + TOY_SIDE]))
    return folder

# ---- the cache of the frozen networks' outputs -------------------------------------------------------------

def hash_files(paths):
    """The SHA-256 of each file."""
    with ThreadPoolExecutor() as pool:
        return list(progress(pool.map(file_sha256, paths), "reading images", len(paths), leave=False))

class Cache:
    """Outputs of the frozen encoders: posterior mean and log-variance of each image and of its mirror image,
    and the embedding of the image itself.

    One folder per (VAE, encoder, size), named by the hash of their fingerprints; in it shards of up to 32
    images, each image under the hash of its file. So nothing in it can be stale. Shards are written
    atomically: an interrupted run resumes, and two runs may share a folder.
    """
    SHARD, OPEN, COLUMNS = 32, 512, ("mean", "logvar", "embedding")     # OPEN: shards mapped at a time

    def __init__(self, folder, vae_sha256, encoder_sha256, size):
        key = f"1 {vae_sha256} {encoder_sha256} {size}"
        self.folder, self.size = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16], size
        self.rows = {}          # image hash -> (its shard, its index there)
        self._tensors = lru_cache(self.OPEN)(self._open)
        self._read()

    def _open(self, path):
        """mean, logvar (n, 2, 4, h, w) and embedding (n, d_e) of a shard, mapped."""
        return [TensorFile(path).get(name) for name in self.COLUMNS]

    def _read(self):
        for path in sorted(self.folder.glob("[!.]*.safetensors")):      # hidden ones are still being written
            try:
                file = TensorFile(path)
                images = json.loads(file.header["images"])
                if {file.shapes[name][0] for name in self.COLUMNS} != {len(images)}:
                    raise ValueError
                self.rows |= {image: (path, i) for i, image in enumerate(images)}
            except Exception:       # Fail among them: restoring or downloading is not the remedy here
                raise Fail(f"{path} is no complete shard of the cache; remove it") from None

    def fill(self, paths, encoders):
        """Add the images that are missing -> the hash of each path's file.

        encoders() -> (encode, embed), called only where images are missing. encode: x (B, 3, size, size) ->
        mean, logvar; embed: PIL images -> e. Several processes share the work, and read each other's shards.
        """
        hashes = hash_files(paths)
        with ThreadPoolExecutor() as pool:
            missing = {h: path for h, path in zip(hashes, paths) if h not in self.rows}
            todo = broadcast(list(missing.items()))
            shards = shard([todo[i:i + self.SHARD] for i in range(0, len(todo), self.SHARD)])
            if shards:
                encode, embed = encoders()
                batches = prefetch(pool, load_rgb, [[path for _, path in part] for part in shards])
                bar = progress(batches, "caching", len(shards), unit="image", unit_scale=self.SHARD)
                for part, images in zip(shards, bar):
                    self._write([h for h, _ in part], images, encode, embed)
        if todo:
            barrier()
            self._read()
        if lost := [path for h, path in zip(hashes, paths) if h not in self.rows]:
            raise Fail(f"{lost[0]} is not in the cache {self.folder} of this process; all must see the same "
                       "images and cache")
        return hashes

    def _write(self, hashes, images, encode, embed):
        rows = []
        for i in range(0, len(images), 4):          # in fours: small enough for 12 GB at 512 px
            x = to_tensor(images[i:i + 4], self.size)
            latents = encode(torch.cat([x, x.flip(-1)]))
            mean, logvar = (t.unflatten(0, (2, -1)).transpose(0, 1) for t in latents)
            rows.append((mean, logvar, embed(images[i:i + 4])))
        tensors = dict(zip(self.COLUMNS, map(torch.cat, zip(*rows))))
        names = json.dumps(hashes)
        shard_name = hashlib.sha256(names.encode()).hexdigest()[:16]
        save_tensors(self.folder / f"{shard_name}.safetensors", tensors, {"images": names})

    def batch(self, hashes, mirrored):
        """Image hashes and a flag for each -> mean, logvar (B, 4, h, w) and embeddings (B, d_e)."""
        found = [(self._tensors(path), i) for path, i in (self.rows[h] for h in hashes)]
        mean, logvar = (torch.stack([tensors[k][i, int(m)] for (tensors, i), m in zip(found, mirrored)])
                        for k in (0, 1))
        return mean, logvar, torch.stack([tensors[2][i] for tensors, i in found])

"""Images, datasets, the split by case, and the cache of the frozen encoders' outputs."""
import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from .app import (Fail, atomic_write, barrier, broadcast, file_sha256, foreign_file, progress, safe_name,
                  save_tensors, shard)
from .weights import BUILT_IN, TensorFile

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
TOY_SIDE = 64           # pixels of a patch of toy tissue
MAX_PIXELS, MIN_SIDE, MAX_ASPECT = 8192 * 8192, 16, 16
Image.MAX_IMAGE_PIXELS = None           # load_rgb checks the size itself, before it reads the pixels

# ---- images ------------------------------------------------------------------------------------------------

def load_rgb(path):
    """An image file -> PIL image in RGB: upright by its EXIF tag, transparency on white, 16 bits scaled to 8.

    The one reader of train.py, sample.py and fid.py. Fails with the file's name unless it is a single
    readable image from 16 pixels a side to 8192 x 8192.
    """
    with foreign_file(path, "cannot be read"), Image.open(path) as image:
        short, long = sorted(image.size)
        if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT * short:
            raise Fail(f"{path} has {image.width} x {image.height} pixels; remove it, or cut patches of it: "
                       f"from {MIN_SIDE} a side to {MAX_PIXELS // 10 ** 6} megapixels, no strips")
        if getattr(image, "n_frames", 1) > 1:
            raise Fail(f"{path} has {image.n_frames} frames; save the one you mean as a single image")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":       # 16 bits; Pillow's own conversion would clip all above 255 to white
            pixels = np.asarray(image).astype(np.float64)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise Fail(f"{path} has floating-point pixels or more than 16 bits; save it as 8 or 16 bits")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")

def resize_crop(image, size, filter=Image.Resampling.LANCZOS):
    """Resize the shorter side to `size`, antialiased, then center-crop, as torchvision does."""
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
    info = PngInfo()
    for key, value in (text | ({"adapter": made_by} if made_by else {})).items():
        info.add_text(key, str(value))
    if made_by:
        info.add_itxt("XML:com.adobe.xmp", XMP.format(GENERATED, made_by))
    with atomic_write(path, sync=False) as temporary:
        image.save(temporary, pnginfo=info)

def is_generated(path):
    """Whether an image file is marked as made by a model: by our text chunks, or by any program's XMP."""
    try:
        with Image.open(path if os.path.isfile(path) else os.devnull) as image:     # a pipe would block
            marks = image.info
    except Exception:       # of decoders; load_rgb gives the reason
        return False
    return {"reference", "seed", "cfg"} <= marks.keys() or "rainedAlgorithmicMedia" in str(
        marks.get("xmp", marks.get("XML:com.adobe.xmp")))

def list_images(folder):
    """The image files under a folder, at any depth, sorted; hidden ones are omitted.

    Links to folders are followed, each folder once. Fails (OSError) on a folder that cannot be read.
    """
    def stop(problem):
        raise problem

    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(base, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found, key=Path.as_posix)

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
PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
CASE = re.compile(r"(?P<case>\d+)\S*?-IMG\d+x\d+")         # <case>-<slide>-IMG<row>x<col>-<label>.JPG

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

def read_dataset(root):
    """A folder in one of the LAYOUTS -> [Patch], sorted by name.

    The case is the leading number of a name such as 353042_4-IMG005x014-1.JPG, else the folder below the
    class (class/case/patch.png; one name below two classes is one case), else every patch is its own case.
    """
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise Fail(f"{root}: no such folder of patches")
    patches = next(found for read in LAYOUTS if (found := read(root)) is not None)
    if not patches:
        raise Fail(f"{root} contains no images; pass train.json and test.json, a folder per class, or images")
    repeated = [name for name, n in Counter(p.name for p in patches).items() if n > 1]
    if repeated:
        raise Fail(f"{root}: {len(repeated)} images are listed twice, such as {repeated[0]}")
    return sorted(patches, key=lambda p: p.name)

def _read_lists(root):
    """train.json and test.json as Chaoyang has them; None where there is neither."""
    lists = [root / f"{part}.json" for part in ("train", "test") if (root / f"{part}.json").is_file()]
    return [patch for path in lists for patch in _read_list(path)] if lists else None

def _read_folders(root):
    """One subfolder per class, with folders of cases in it or not; or a flat folder (one class, "all")."""
    names = [path.relative_to(root).as_posix() for path in list_images(root)]
    if names and all("/" in n and n.split("/")[0].lower() in PART_NAMES for n in names):
        part = names[0].split("/")[0]
        raise Fail(f"{root} has a folder per part ({part}/...), not one per class: pass one of them, or "
                   "put the classes on top; --split FILE keeps a split of yours")
    return [Patch(name, name.split("/")[0] if "/" in name else "all", _case_of(name)) for name in names]

LAYOUTS = (_read_lists, _read_folders)      # root -> [Patch], or None where the folder has another layout

def _case_of(name):
    *folders, base = name.split("/")
    if m := CASE.match(base):
        return m["case"]
    return folders[1] if len(folders) > 1 else name

def _read_list(path):
    with foreign_file(path, "is not valid JSON", "write it again"):
        rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise Fail(f'{path} must contain a list of {{"name": ..., "label": ...}}')
    patches = []
    for i, row in enumerate(rows):
        try:
            if (label := _label_of(row)) is None:
                continue
            patch = Patch(Path(row["name"]).as_posix(), CLASSES[label], _case_of(row["name"]), path.stem)
            real = Path(os.path.realpath(path.parent / patch.name))     # resolve() fails on a link to itself
            if not (real.is_relative_to(path.parent.resolve()) and real.is_file()):
                raise Fail(f"{patch.name!r} is not there, or outside the folder; restore it, or omit it")
        except Fail as problem:
            raise Fail(f"{path}: entry {i}: {problem}") from None
        patches.append(patch)
    if undecided := len(rows) - len(patches):
        print(f"{path}: {undecided} patches without a majority among the annotators are omitted")
    return patches

def _label_of(row):
    """A row's label, or that of two of three annotators; None where they disagree."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise Fail('it has no "name"')
    votes = [row[f"label_{x}"] for x in "ABC" if f"label_{x}" in row]
    if "label" not in row and not votes:
        raise Fail('it has neither "label" nor "label_A", "label_B" and "label_C"')
    label = row["label"] if "label" in row else max(votes, key=votes.count)
    if "label" not in row and votes.count(label) < 2:
        return None
    if type(label) is not int or not 0 <= label < len(CLASSES):
        raise Fail(f"it has the label {label!r}; it must be 0 to {len(CLASSES) - 1} ({', '.join(CLASSES)})")
    return label

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

    how: "paper" (pooled, the paper's proportions), "official" (test.json kept, validation taken from
    train.json) or the path of a split file.
    """
    if how == "paper":
        return split_patches(patches)
    if how != "official":
        return read_split(how, patches)
    test, rest = ([p for p in patches if p.part == part] for part in ("test", "train"))
    if not test or not rest:
        raise Fail("--split official needs a dataset with train.json and test.json")
    if shared := {p.case for p in test} & {p.case for p in rest}:
        print(f"note: {len(shared)} cases are in both train.json and test.json: test scores will be too good")
    split = split_patches(rest, {part: PROPORTIONS[part] for part in ("train", "val")})
    return split | {"test": [p.name for p in test]}

def read_split(path, patches):
    """Read and check a split file against the dataset."""
    if not Path(path).exists():
        raise Fail(f"--split {path}: no such file; pass paper, official, or a split.json")
    with foreign_file(path, "is no split of these patches", "list names under train, val and test"):
        split = json.loads(Path(path).read_text(encoding="utf-8"))
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

class Cache:
    """Outputs of the frozen encoders: posterior mean and log-variance of each image and of its mirror image,
    and the embedding of the image itself.

    One folder per (VAE, encoder, size), named by the hash of their fingerprints; in it shards of up to 32
    images, each image under the hash of its file. So nothing in it can be stale. Shards are written
    atomically: an interrupted run resumes, and two runs may share a folder.
    """
    SHARD, COLUMNS = 32, ("mean", "logvar", "embedding")

    def __init__(self, folder, vae_sha256, encoder_sha256, size):
        key = f"1 {vae_sha256} {encoder_sha256} {size}"
        self.folder, self.size = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16], size
        self.rows = {}          # image hash -> (mean, logvar (2, 4, h, w), embedding (d_e,)), mapped
        self._read()

    def _read(self):
        for path in sorted(self.folder.glob("[!.]*.safetensors")):      # hidden ones are still being written
            try:
                file = TensorFile(path)
                images, tensors = json.loads(file.header["images"]), [file.get(name) for name in self.COLUMNS]
                self.rows |= {image: [tensor[i] for tensor in tensors] for i, image in enumerate(images)}
            except Exception:       # Fail among them: restoring or downloading is not the remedy here
                raise Fail(f"{path} is no complete shard of the cache; remove it") from None

    def fill(self, paths, encoders):
        """Add the images that are missing -> the hash of each path's file.

        encoders() -> (encode, embed), called only where images are missing. encode: x (B, 3, size, size) ->
        mean, logvar; embed: PIL images -> e. Several processes share the work, and read each other's shards.
        """
        with ThreadPoolExecutor() as pool:
            hashes = list(progress(pool.map(file_sha256, paths), "reading images", len(paths), leave=False))
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
        rows = [self.rows[h] for h in hashes]
        mean, logvar = (torch.stack([row[k][int(m)] for row, m in zip(rows, mirrored)]) for k in (0, 1))
        return mean, logvar, torch.stack([row[2] for row in rows])

"""The paper's evaluation of a finished run, and what it wished for: tables (CSV), pictures and report.md in RUN/report/.

    python -m ldm.report runs/x                         # everything
    python -m ldm.report runs/x --only sweep            # Table 5

Samples are made by sample.py and kept, so that it goes on where it was interrupted. FID and KID are Inception's where its
weights are at hand (--inception, or torch.hub's cache), and the encoder's in any case; they are comparable with nothing else.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fid import Extractor, frechet_distance_of_features, inception_available, kid
from projector import open_encoder
from sample import folder_name, name_references, save_image

from . import metrics
from .app import (
    Fail,
    Parser,
    atomic_write,
    call,
    number,
    pick_device,
    read_csv,
    run_program,
    save_csv,
    save_text,
)
from .data import contact_sheet, list_images, load_rgb, resize_crop, subsample, to_images, to_tensor
from .runs import base_of, model_card, patches_of, settings_of
from .vae import SCALE
from .weights import file_sha256, load_vae, open_sd15

SWEEP = [f"{1 + k / 10:.1f}" for k in range(11)]        # Table 5
PARTS = ("train", "val", "test")


class Run:
    """A finished run with its images, features and samples, each made when it is first asked for and then kept."""

    def __init__(self, folder, cfg, limit, inception, device):
        settings = settings_of(folder)
        if settings is None or not (folder / "adapter-best.safetensors").is_file():
            raise Fail(f"{folder} is no run of train.py with an adapter; pass one")
        self.folder, self.out, self.cfg, self.device, self.size = folder, folder / "report", f"{cfg:g}", device, settings["size"]
        self.settings, self.limit = settings, limit
        self.samples = self.out / "samples" / file_sha256(folder / "adapter-best.safetensors")[:8]
        self.patches = {}           # part -> [(label, name, path)], named as sample.py does
        for part in PARTS:
            found = patches_of(part, settings, folder)
            names = name_references([(patch.title, path) for patch, path in found], {})[0]
            self.patches[part] = [(patch.label, *item) for (patch, _), item in zip(found, names.items())]
        if few := [part for part in PARTS if len(self.patches[part]) < 2]:
            raise Fail(f"{folder}: the {few[0]} part of its split holds fewer than two images; a report needs all three")
        self.spaces = [Extractor("encoder", open_encoder(settings["uni2h"]), device)]
        if inception_available(inception):
            self.spaces.insert(0, Extractor("inception", inception, device))
        self.encoder, self.first, self.kept = self.spaces[-1], self.spaces[0], {}

    def labels(self, part, n=None):
        return np.array([label for label, _, _ in subsample(self.patches[part], n)])

    def real(self, part, n=None):
        """The files of a part's images at the model's size."""
        paths = []
        for _, name, source in subsample(self.patches[part], n):
            paths.append(self.out / "real" / part / f"{name}.png")
            if not paths[-1].exists():
                save_image(paths[-1], resize_crop(load_rgb(source), self.size))
        return paths

    def fake(self, part, cfg=None, n=None):
        """One sample for each image of a part -> files in the order of `real`."""
        cfg, names = cfg or self.cfg, [name for _, name, _ in subsample(self.patches[part], n)]
        folder = self.samples / part / folder_name(float(cfg))
        seed = re.compile(rf"_seed\d+_{re.escape(folder.name)}$")
        for attempt in range(2):
            found = list_images(folder) if folder.is_dir() else []
            made = {seed.sub("", path.relative_to(folder).with_suffix("").as_posix()): path for path in found}
            if attempt or set(names) <= set(made):
                return [made[name] for name in names]
            self.sample(part, [cfg], n)

    def sample(self, part, cfgs, n=None):
        """Call sample.py, which makes what is missing."""
        code = call("sample.py", "--quiet", "--run", self.folder, "--split", part, "--cfg", *cfgs, "--out", self.samples / part,
                    "--device", self.device, *(["--limit", n] if n else []))
        if code:
            sys.exit(code)              # sample.py has said why

    def reconstructed(self, part):
        """The images of a part through the VAE and back -> PIL images."""
        vae, images = load_vae(open_sd15(self.settings["sd15"], base_of(self.folder))[1], self.device), []
        paths = self.real(part)
        with torch.no_grad():
            for i in range(0, len(paths), 4):
                x = to_tensor([load_rgb(path) for path in paths[i:i + 4]], self.size).to(self.device)
                images += to_images(vae.decode(vae.encode(x)[0] * SCALE))
        return images

    def features(self, space, what, *args):
        """Features of real, fake or reconstructed images in a space -> (n, d)."""
        key = (space.kind, what, *args)
        if key not in self.kept:
            self.kept[key] = space(getattr(self, what)(*args))
        return self.kept[key]

    def write(self, name, rows):
        if rows:
            save_csv(self.out / f"{name}.csv", rows)
        return rows


# ---- the paper's tables and its figure 5 -------------------------------------------------------------------------------

def epochs(run):
    """Table 4: validation FID at the end of every epoch"""
    log = read_csv(run.folder / "log.csv")
    rows = [{k: row[k] for k in row if k in ("epoch", "train_loss", "val_loss") or k.startswith("fid")} for row in log]
    plot(run.out / "table4.png", rows, "epoch", [k for k in rows[0] if k.startswith("fid")])
    return run.write("table4", rows)


def sweep(run):
    """Table 5: validation FID at guidance 1.0 to 2.0 of the best adapter"""
    run.sample("val", SWEEP)
    real, rows = run.features(run.first, "real", "val"), []
    for w in SWEEP:
        fake = run.features(run.first, "fake", "val", w)
        rows.append(dict(guidance=w, n=len(fake), features=run.first.kind, fid=frechet_distance_of_features(real, fake)))
    plot(run.out / "table5.png", rows, "guidance", ["fid"])
    shown = subsample(list(zip(run.real("val"), *(run.fake("val", w) for w in SWEEP))), 6)
    save_image(run.out / "sweep.png", contact_sheet([[load_rgb(path) for path in row] for row in shown], len(SWEEP) + 1))
    return run.write("table5", rows)


def test(run):
    """Table 7: FID of validation and test part, with a 95 % interval and two floors: real images of the training part at the
    same n, and the part's own images through the VAE"""
    rows = []
    for space in run.spaces:
        for part in ("val", "test"):
            real, fake = run.features(space, "real", part), run.features(space, "fake", part)
            low, high = metrics.bootstrap_interval(frechet_distance_of_features, real, fake)
            rows.append(dict(
                part=part, features=space.kind, n=len(real), fid=frechet_distance_of_features(real, fake), low=low, high=high,
                floor_real=frechet_distance_of_features(real, run.features(space, "real", "train", len(real))),
                floor_vae=frechet_distance_of_features(real, run.features(space, "reconstructed", part))))
    return run.write("table7", rows)


def classes(run):
    """Table 8: KID x 1000 of each class of the test part"""
    rows, labels = [], run.labels("test")
    for space in run.spaces:
        real, fake = run.features(space, "real", "test"), run.features(space, "fake", "test")
        for name in np.unique(labels):
            mine = labels == name
            if mine.sum() > 1:
                mean, std, subset = kid(real[mine], fake[mine])
                rows.append({"class": name, "features": space.kind, "n": int(mine.sum()), "kid_x1000": 1000 * mean,
                             "std_x1000": 1000 * std, "subset": subset})
    return run.write("table8", rows)


def figure5(run):
    """Figure 5: real | synthetic of each class, from the test part"""
    labels, real, fake, tiles = run.labels("test"), run.real("test"), run.fake("test"), []
    for name in np.unique(labels):
        i = np.flatnonzero(labels == name)[0]
        tiles += [(f"{name}: real", load_rgb(real[i])), (f"{name}: synthetic", load_rgb(fake[i]))]
    save_image(run.out / "figure5.png", labelled(4, tiles))
    return []


# ---- what the paper wished for -----------------------------------------------------------------------------------------

def fidelity(run):
    """Fidelity: cosine of a test sample's embedding with its reference's and with other references'; the share whose nearest
    class centroid (of real training images) is the reference's class, beside the share of the real images themselves"""
    e, labels, train_labels = run.encoder, run.labels("test"), run.labels("train")
    real, fake, train = run.features(e, "real", "test"), run.features(e, "fake", "test"), run.features(e, "real", "train")
    own, others = metrics.fidelity(fake, real)
    ours, theirs = (float((metrics.nearest_centroid(train, train_labels, x) == labels).mean()) for x in (fake, real))
    return run.write("fidelity", [dict(n=len(fake), cosine_own=own, cosine_others=others, consistency=ours,
                                       consistency_real=theirs)])


def memorisation(run):
    """Memorisation: distance from a sample to the nearest training image, in embedding and in pixels; real validation images are
    the yardstick. `closer` is the share of samples nearer than 99 % of these"""
    n, rows = run.limit, []
    sets = {"real val": ("real", "val"), "samples of val": ("fake", "val"), "samples of train": ("fake", "train", None, n)}
    for space in (run.encoder, Pixels()):
        train, limit = run.features(space, "real", "train"), None
        for name, what in sets.items():
            index, distance = metrics.nearest(run.features(space, *what), train)
            limit = np.quantile(distance, 0.01) if limit is None else limit
            rows.append({"space": space.kind, "images": name, "n": len(distance), "median": float(np.median(distance)),
                         "lowest": float(distance.min()), "closer": float((distance < limit).mean())})
            if (space.kind, name) == ("encoder", "samples of train"):
                paths, nearest = run.fake("train", None, n), run.real("train")
                closest = [(paths[i], nearest[index[i]]) for i in distance.argsort()[:10]]
                save_image(run.out / "closest.png", contact_sheet([[load_rgb(path) for path in pair] for pair in closest], 4))
    return run.write("memorisation", rows)


def usefulness(run):
    """Usefulness: a linear classifier on embeddings of real training images, of samples made from them, and of both; balanced
    accuracy and recall on the real test images"""
    n, e = run.limit, run.encoder
    real, fake = run.features(e, "real", "train", n), run.features(e, "fake", "train", None, n)
    labels, test, truth = run.labels("train", n), run.features(e, "real", "test"), run.labels("test")
    rows = []
    for name, x, y in (("real", real, labels), ("synthetic", fake, labels),
                       ("both", np.concatenate([real, fake]), np.tile(labels, 2)),
                       ("all real", run.features(e, "real", "train"), run.labels("train"))):
        recall = metrics.recalls(truth, metrics.fit_linear(x, y)(test))
        rows.append(dict(train=name, n=len(x), test_n=len(test), balanced_accuracy=float(np.mean(list(recall.values()))),
                         **{f"recall_{name}": share for name, share in recall.items()}))
    return run.write("usefulness", rows)


class Pixels:
    """The feature space of the pixels themselves, at 32 x 32."""
    kind = "pixels"

    def __call__(self, images):
        return np.stack([np.asarray(resize_crop(load_rgb(path), 32), dtype=np.float64).ravel() / 255 for path in images])


# ---- pictures and the program ------------------------------------------------------------------------------------------

def labelled(columns, tiles):
    """[(text, PIL image)] -> one picture of `columns` tiles a row, 256 wide, each under its text."""
    side, head, gap = 256, 16, 4
    out = Image.new("RGB", (columns * (side + gap) - gap, -(-len(tiles) // columns) * (side + head + gap) - gap), "white")
    for i, (text, image) in enumerate(tiles):
        x, y = i % columns * (side + gap), i // columns * (side + head + gap)
        ImageDraw.Draw(out).text((x, y + 2), text, fill="black")
        out.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y + head))
    return out


def plot(path, rows, x, columns):
    """A line for each column over column x, where matplotlib is installed; rows without a value are left out."""
    lines = {column: [(float(row[x]), float(row[column])) for row in rows if row[column]] for column in columns}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for column, points in lines.items():
        axes.plot(*np.array(points).reshape(-1, 2).T, marker="o", label=column)
    axes.set_xlabel(x)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def as_markdown(rows):
    def cell(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (
        list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)))


SECTIONS = {f.__name__: f for f in (epochs, sweep, test, classes, figure5, fidelity, memorisation, usefulness)}
PICTURES = dict(epochs=["table4.png"], sweep=["table5.png", "sweep.png"], figure5=["figure5.png"], memorisation=["closest.png"])


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts of the report (default: all)")
    parser.add_argument("--cfg", type=number(float, 0), default=1.3, help="guidance of all but the sweep")
    parser.add_argument("--limit", type=number(int, 8), default=400, metavar="N",
                        help="training images that are sampled from, for usefulness")
    parser.add_argument("--inception", metavar="FILE", help="pytorch-fid's weights (default: torch.hub's cache)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    finished, text = Run(args.run, args.cfg, args.limit, args.inception, pick_device(args.device)), f"# {args.run.name}\n"
    for name in args.only:
        rows = SECTIONS[name](finished)
        part = "\n## " + " ".join(SECTIONS[name].__doc__.split()) + "\n\n" + (as_markdown(rows) + "\n" if rows else "")
        pictures = [picture for picture in PICTURES.get(name, ()) if (finished.out / picture).exists()]
        text += part + "".join(f"\n![{name}]({picture})\n" for picture in pictures)
        print(part, flush=True)
        save_text(finished.out / ("report.md" if args.only == list(SECTIONS) else f"report-{'-'.join(args.only)}.md"), text)
    save_text(args.run / "README.md", model_card(args.run))         # which includes the whole report


if __name__ == "__main__":
    run_program(main)

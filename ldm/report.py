"""The paper's evaluation of a run, and more: tables (CSV), pictures and report.md in RUN/report/.

And its ablation study (Tables 3 and 6): twelve runs of train.py that differ in one factor.

    python -m ldm.report runs/x                                 # everything
    python -m ldm.report runs/x --only sweep                    # Table 5
    python -m ldm.report --ablation OUT --data chaoyang/        # trains all twelve; all else goes to train.py
    python -m ldm.report --ablation OUT --row 3 --data ...      # only this one, for an array job of a cluster

Samples are made by sample.py and kept: an interrupted report resumes, as an ablation does. FID and KID are
Inception's where its weights are available (--inception, or torch.hub's cache), and the encoder's in any
case, comparable with nothing else.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch

import fid
from fid import ImageSet
from sample import Sampling

from .data import contact_sheet, load_rgb, resize_crop, save_image, subsample, to_images, to_tensor
from .app import (Fail, Parser, call, file_sha256, number, pick_device, read_csv, run_program, save_csv,
                  save_text)
from .runs import best_epoch, model_card, name_references, patches_of, read_settings
from .weights import TensorFile, load_vae, open_sd15

SWEEP = [f"{1 + k / 10:.1f}" for k in range(11)]        # Table 5

class Evaluation:
    """A finished run with its images, samples and features; each is made on first use and kept."""

    def __init__(self, folder, cfg, limit, inception, device):
        settings = read_settings(folder)
        if settings is None or not (folder / "adapter-best.safetensors").is_file():
            raise Fail(f"{folder} is no run of train.py with an adapter; pass one")
        self.folder, self.out, self.cfg, self.device = folder, folder / "report", f"{cfg:g}", device
        self.settings, self.size, self.limit = settings, settings.size, limit
        self.samples = self.out / "samples" / file_sha256(folder / "adapter-best.safetensors")[:8]
        self.patches = {}           # part -> [(label, name, path, seed)], names and seeds as in sample.py
        for part in ("train", "val", "test"):
            found = patches_of(part, settings, folder)
            names = name_references([(patch.title, path) for patch, path in found], {})[0]
            self.patches[part] = [(patch.label, name, path, seed)
                                  for seed, ((patch, path), name) in enumerate(zip(found, names))]
            if len(found) < 2:
                raise Fail(f"{folder}: the {part} part of its split needs two images or more for a report")
        self.spaces = fid.available_spaces(inception, settings)
        self.encoder = self.spaces[-1]
        self._features = {}

    def labels(self, part, n=None):
        return np.array([label for label, *_ in subsample(self.patches[part], n)])

    def real(self, part, n=None):
        """The files of a part's images at the model's size."""
        paths = []
        for _, name, source, _ in subsample(self.patches[part], n):
            paths.append(self.out / "real" / part / f"{name}.png")
            if not paths[-1].exists():
                save_image(paths[-1], resize_crop(load_rgb(source), self.size))
        return paths

    def fake(self, part, n=None, cfg=None):
        """One sample for each image of a part -> files in the order of `real`."""
        cfg = cfg or self.cfg
        how = Sampling(cfg=float(cfg)).name
        paths = [self.samples / part / how / f"{name}_seed{seed}_{how}.png"
                 for _, name, _, seed in subsample(self.patches[part], n)]
        if not all(path.exists() for path in paths):
            self.sample(part, [cfg], n)
        return paths

    def sample(self, part, cfgs, n=None):
        """Call sample.py, which makes what is missing."""
        code = call("sample.py", "--run", self.folder, "--split", part, "--cfg", *cfgs,
                    "--out", self.samples / part, "--device", self.device, *(["--limit", n] if n else []))
        if code:
            sys.exit(code)              # sample.py has printed the reason

    def reconstructed(self, part):
        """The images of a part through the VAE and back -> PIL images."""
        vae, images = load_vae(open_sd15(self.settings.sd15, self.settings.vae)[1], self.device), []
        for path in self.real(part):
            x = to_tensor([load_rgb(path)], self.size).to(self.device)
            with torch.no_grad():
                images += to_images(vae.reconstruct(x))
        return images

    def features(self, space, kind, part, *args):
        """Features of the real, fake or reconstructed images of a part in a feature space -> (n, d)."""
        key = (space.kind, kind, part, *args)
        if key not in self._features:
            self._features[key] = space.extract(getattr(self, kind)(part, *args), self.device)
        return self._features[key]

    def image_sets(self, space, part, cfg=None):
        """The real and the fake images of a part -> two ImageSets, for `fid.compare`."""
        names = [f"{label}/" for label in self.labels(part)]
        return [ImageSet.of_features(self.features(space, *args), names)
                for args in (("real", part), ("fake", part, None, cfg))]

# ---- the paper's tables and its figure 5; each section gives the rows of its table -------------------------

def table4(ev):
    """Table 4: validation FID at the end of every epoch"""
    log = read_csv(ev.folder / "log.csv")
    keys = [k for k in log[0] if k in ("epoch", "train_loss", "val_loss") or k.startswith("fid")]
    return [{k: row[k] for k in keys} for row in log]

def table5(ev):
    """Table 5: validation FID at guidance 1.0 to 2.0 of the best adapter"""
    ev.sample("val", SWEEP)
    space, rows = ev.spaces[0], []
    for w in SWEEP:
        rows.append(dict(guidance=w, features=space.kind) | fid.compare(*ev.image_sets(space, "val", w)))
    return rows

def table7(ev):
    """Table 7: FID of validation and test part, with a 95 % interval and two floors: real images of the
    training part at the same n, and the part's own images through the VAE"""
    rows, distance = [], fid.frechet_distance_of_features
    for space in ev.spaces:
        for part in ("val", "test"):
            sets = ev.image_sets(space, part)
            real, fake = (images.features for images in sets)
            low, high = fid.bootstrap_interval(distance, real, fake)
            floor_real = distance(real, ev.features(space, "real", "train", len(real)))
            floor_vae = distance(real, ev.features(space, "reconstructed", part))
            rows.append(dict(part=part, features=space.kind) | fid.compare(*sets) | dict(
                fid_low=low, fid_high=high, floor_real=floor_real, floor_vae=floor_vae))
    return rows

def table8(ev):
    """Table 8: KID of each class of the test part (the paper gives it x 1000)"""
    return [{"class": name, "features": space.kind} | row for space in ev.spaces
            for name, row in fid.compare_classes(*ev.image_sets(space, "test")).items()]

def figure5(ev):
    """Figure 5: real | synthetic of each class, from the test part"""
    labels, real, fake = ev.labels("test"), ev.real("test"), ev.fake("test")
    names, first = np.unique(labels, return_index=True)
    texts = [f"{name}: {kind}" for name in names for kind in ("real", "synthetic")]
    save_sheet(ev.out / "figure5.png", [(real[i], fake[i]) for i in first], 4, texts)

# ---- beyond the paper --------------------------------------------------------------------------------------

def fidelity_table(ev):
    """Fidelity: cosine of a test sample's embedding with its reference's and with other references'; the
    share whose nearest class centroid (of real training images) is the reference's class, beside the share of
    the real images"""
    sets = ("real", "test"), ("fake", "test"), ("real", "train")
    real, fake, train = (ev.features(ev.encoder, *args) for args in sets)
    own, others = fid.fidelity(fake, real)
    row, labels = dict(n=len(fake), cosine_own=own, cosine_others=others), ev.labels("train")
    for name, x in (("consistency", fake), ("consistency_real", real)):
        row[name] = (fid.nearest_centroid(train, labels, x) == ev.labels("test")).mean()
    return [row]

def memorisation_table(ev):
    """Memorisation: distance from a sample to the nearest training image, in embedding and in pixels; real
    validation images are the yardstick. `closer` is the share of samples nearer than 99 % of these"""
    n, rows = ev.limit, []
    sets = {"real val": ("real", "val"), "samples of val": ("fake", "val"),
            "samples of train": ("fake", "train", n)}
    for space in (ev.encoder, Pixels()):
        train, limit = ev.features(space, "real", "train"), None
        for name, images in sets.items():
            index, distance = fid.nearest(ev.features(space, *images), train)
            limit = np.quantile(distance, 0.01) if limit is None else limit
            rows.append(dict(space=space.kind, images=name, n=len(distance), median=np.median(distance),
                             lowest=distance.min(), closer=(distance < limit).mean()))
            if (space.kind, name) == ("encoder", "samples of train"):
                paths, nearest = ev.fake("train", n), ev.real("train")
                pairs = [(paths[i], nearest[index[i]]) for i in distance.argsort()[:10]]
                save_sheet(ev.out / "memorisation.png", pairs, 4)
    return rows

def usefulness_table(ev):
    """Usefulness: a linear classifier on embeddings of real training images, of samples made from them, and
    of both; balanced accuracy and recall on the real test images"""
    n, e = ev.limit, ev.encoder
    real, fake = ev.features(e, "real", "train", n), ev.features(e, "fake", "train", n)
    labels, test, truth = ev.labels("train", n), ev.features(e, "real", "test"), ev.labels("test")
    rows = []
    for name, x, y in (("real", real, labels), ("synthetic", fake, labels),
                       ("both", np.concatenate([real, fake]), np.tile(labels, 2)),
                       ("all real", ev.features(e, "real", "train"), ev.labels("train"))):
        recall = fid.recalls(truth, fid.fit_linear(x, y)(test))
        accuracy = float(np.mean(list(recall.values())))
        rows.append(dict(train=name, n=len(x), test_n=len(test), balanced_accuracy=accuracy)
                    | {f"recall_{label}": share for label, share in recall.items()})
    return rows

class Pixels:
    """The feature space of the pixels themselves, at 32 x 32."""
    kind = "pixels"

    def extract(self, images, device):
        small = [np.asarray(resize_crop(load_rgb(path), 32), dtype=np.float64) for path in images]
        return np.stack([x.ravel() / 255 for x in small])

# ---- the ablation study ------------------------------------------------------------------------------------

FACTORS = ("rank", "tokens", "depth", "hidden", "lr_ratio")
# The first row is the baseline, each other changes one factor (Table 3). Then the paper's result (Table 6).
ROWS = [
    #  factors             best epoch, FID
    ((8, 4, 2, 1024, 10), 8, 79.74),
    ((4, 4, 2, 1024, 10), 12, 77.59),
    ((16, 4, 2, 1024, 10), 6, 82.98),
    ((8, 1, 2, 1024, 10), 6, 85.09),
    ((8, 2, 2, 1024, 10), 5, 83.69),
    ((8, 8, 2, 1024, 10), 12, 80.87),
    ((8, 4, 3, 1024, 10), 8, 83.66),
    ((8, 4, 2, 512, 10), 6, 84.61),
    ((8, 4, 2, 2048, 10), 5, 83.57),
    ((8, 4, 2, 1024, 1), 11, 90.72),
    ((8, 4, 2, 1024, 5), 6, 79.94),
    ((8, 4, 2, 1024, 20), 5, 80.64),
]

def row_folder(out, factors):
    return out / "r{}-t{}-d{}-w{}-x{}".format(*factors)

def table6(out):
    """The finished rows -> [{column of Table 6: value}], sorted by FID. Fails if they are not comparable."""
    table, first, column = [], None, None
    for factors, paper_epoch, paper_fid in ROWS:
        folder = row_folder(out, factors)
        log, settings = read_csv(folder / "log.csv"), read_settings(folder)
        if not log or settings is None:
            continue
        if int(log[-1]["epoch"]) < settings.epochs and int(log[-1]["step"]) != settings.max_steps:
            continue
        first = first or settings
        for name in set(settings.differing(first)) - {*FACTORS, "alpha"}:
            raise Fail(f"{folder} was trained with {name} {getattr(settings, name)}, other rows with "
                       f"{getattr(first, name)}: they are not comparable; remove it, and train the row again")
        column, best = best_epoch(log)
        shapes = TensorFile(folder / "adapter.safetensors").shapes.values()
        table.append(dict(zip(FACTORS, factors)) | {
            "best_epoch": int(best["epoch"]), column: round(float(best[column]), 4),
            "parameters": sum(map(math.prod, shapes)), "minutes": log[-1]["minutes"],
            "paper_epoch": paper_epoch, "paper_fid": paper_fid})
    return sorted(table, key=lambda row: row[column])

def ablation():
    """Tables 3 and 6: train the rows that are not finished, and tabulate those that are."""
    parser = Parser(__doc__)
    parser.add_argument("--ablation", type=Path, metavar="OUT", help="holds a run per row, and table6.csv")
    parser.add_argument("--row", type=number(int, 1, len(ROWS)), metavar="N",
                        help="only this row of ROWS in ldm/report.py, 1 (the baseline) to 12")
    args, rest = parser.parse_known_args()
    rest += ["--val-cfg", 1.3]
    for factors, *_ in ROWS[args.row - 1:args.row] if args.row else ROWS:   # α: train.py's default, the rank
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in zip(FACTORS, factors)]
        if code := call("train.py", *rest, *flags, "--run", row_folder(args.ablation, factors)):
            sys.exit(code)              # train.py has printed why; it returns at once where a run is complete
    table = table6(args.ablation)
    if not table:
        raise Fail(f"{args.ablation} contains no finished run of the ablation study")
    save_csv(args.ablation / "table6.csv", table)
    print(as_markdown(table))
    print(f"{len(table)} of {len(ROWS)} rows; the paper's FIDs are of Chaoyang, 512 px, SD1.5 and UNI2-h")

# ---- pictures and the program ------------------------------------------------------------------------------

def save_sheet(path, groups, columns, texts=()):
    """A contact sheet of groups of image files."""
    images = [[load_rgb(file) for file in group] for group in groups]
    save_image(path, contact_sheet(images, columns, texts))

def as_markdown(rows):
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

# name in --only: a section, whose docstring is its heading, and which may write a picture of that name
SECTIONS = dict(epochs=table4, sweep=table5, test=table7, classes=table8, figure5=figure5,
                fidelity=fidelity_table, memorisation=memorisation_table, usefulness=usefulness_table)

def main():
    if any(argument.split("=")[0] == "--ablation" for argument in sys.argv):
        return ablation()
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS),
                        help="parts of the report (default: all)")
    parser.add_argument("--cfg", type=number(float, 0), default=1.3, help="guidance of all but the sweep")
    parser.add_argument("--limit", type=number(int, 8), default=400, metavar="N",
                        help="training images that are sampled from, for usefulness")
    parser.add_argument("--inception", metavar="FILE",
                        help="pytorch-fid's weights (default: torch.hub's cache)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    evaluation = Evaluation(args.run, args.cfg, args.limit, args.inception, pick_device(args.device))
    text = f"# {args.run.name}\n"
    for name in args.only:
        section, picture = SECTIONS[name], evaluation.out / f"{name}.png"
        part = "\n## " + " ".join(section.__doc__.split()) + "\n\n"
        if rows := section(evaluation):
            save_csv(evaluation.out / f"{section.__name__.removesuffix('_table')}.csv", rows)
            part += as_markdown(rows) + "\n"
        print(part, flush=True)
        text += part + (f"\n![{name}]({picture.name})\n" if picture.exists() else "")
    if args.only == list(SECTIONS):
        save_text(evaluation.out / "report.md", text)
        save_text(args.run / "README.md", model_card(args.run))         # which includes the report

if __name__ == "__main__":
    run_program(main)

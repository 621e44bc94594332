"""The paper's evaluation of a run, and more: tables (CSV), pictures, report.md and .html in RUN/report/.

    python -m ldm.report runs/x                                 # everything; --only sweep: Table 5
    python -m ldm.report runs/x runs/y runs/z                   # Table 6: several runs, beside each other
    python -m ldm.report runs/x --score a.csv b.csv             # answers that two readers gave to reader.html

Samples are made by sample.py and kept: an interrupted report resumes. Numbers are in Inception's features,
where available, and in those of --judge; "encoder" marks those of the encoder that conditioned samples."""
import base64
import html
import io
import json
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial.distance import cdist
from scipy.stats import binomtest

import fid
import sample
from fid import frechet_distance as distance

from .data import load_rgb, save_image, save_sheet, subsample, to_images, to_tensor
from .app import (Fail, Parser, file_sha256, foreign_file, number, pick_device, read_csv, run_program,
                  save_csv, save_text)
from .encoder import Inception, cached_inception, open_encoder
from .runs import THIS_CALL, best_epoch, model_card, name_references, patches_of, read_settings, unfinished
from .weights import load_vae, open_sd15

SWEEP = [f"{1 + k / 10:.1f}" for k in range(11)]        # Table 5
COPIES = 5              # for usefulness: samples of a reference, flips of an image

class Evaluation:
    """A finished run with its images, samples and features; each is made on first use and kept."""
    def __init__(self, run, args):
        self.folder, self.out, self.settings = run, run / "report", read_settings(run)
        self.device, self.cfg, self.limit = pick_device(args.device), f"{args.cfg:g}", args.limit
        best = run / "adapter-best.safetensors"
        if self.settings is None or not best.is_file():
            raise Fail(f"{run} is no run of train.py with an adapter; pass one")
        self.samples = self.out / "samples" / file_sha256(best)[:8]
        self.patches = {}           # part -> [(label, name, path, i)], names and order as in sample.py
        for part, found in patches_of(self.settings, run).items():
            if len(found) < 2:
                raise Fail(f"{run}: the {part} part of its split needs two images or more for a report")
            names = name_references([(patch.title, path) for patch, path in found], {})[0]
            rows = enumerate(zip(found, names))
            self.patches[part] = [(patch.label, name, path, i) for i, ((patch, path), name) in rows]
        self.spaces = [Inception(args.inception)] if args.inception or cached_inception().is_file() else []
        for name in args.judge:
            self.spaces.append(open_encoder(name=name))
            self.spaces[-1].kind = Path(name).name
        self.spaces.append(open_encoder(self.settings.uni2h, self.settings.encoder))    # made the embeddings
        self._features = {}

    def labels(self, part, n=None):
        return np.array([label for label, *_ in subsample(self.patches[part], n)])

    def real(self, part, n=None):
        """The files of a part's images at the model's size."""
        sources = {name: source for _, name, source, _ in subsample(self.patches[part], n)}
        return list(sample.write_real(self.out / "real" / part, sources, self.settings.size).values())

    def fake(self, part, n=None, cfg=None, each=1):
        """Files of samples, `each` of every image of a part, in the order of `real`; sample.py makes them.
        cfg: one of SWEEP, for all of which the model is then loaded once."""
        how = sample.Sampling(cfg=float(cfg or self.cfg)).name
        paths = [self.samples / part / how / f"{name}_seed{i * each + k}_{how}.png"
                 for _, name, _, i in subsample(self.patches[part], n) for k in range(each)]
        if not all(path.exists() for path in paths):
            args = ["--run", self.folder, "--split", part, "--n", each, "--out", self.samples / part,
                    "--device", self.device, "--cfg", *(SWEEP if cfg else [self.cfg])]
            sample.main([str(arg) for arg in [*args, *(["--limit", n] if n else [])]])
        return paths

    def flipped(self, part, n):
        """COPIES flips and turns of each of n images of a part -> PIL images, in the order of `fake`."""
        return [image.transpose(turn) for image in map(load_rgb, self.real(part, n))
                for turn in list(Image.Transpose)[:COPIES]]

    def decoded(self, part):
        """The images of a part through the VAE and back -> PIL images."""
        vae = load_vae(open_sd15(self.settings.sd15, self.settings.vae)[1], self.device)
        inputs = (to_tensor([load_rgb(path)], self.settings.size) for path in self.real(part))
        return [image for x in inputs for image in to_images(vae.reconstruct(x.to(self.device)))]

    def features(self, space, kind, part, *args):
        """Features (n, d) of the images that a method above gives of a part, in a feature space."""
        key = (space.kind, kind, part, *args)
        if key not in self._features:
            self._features[key] = space.extract(getattr(self, kind)(part, *args), self.device)
        return self._features[key]

    def pair(self, space, part, *args):
        """Features of the real images of a part, and of their samples."""
        return [self.features(space, kind, part, *args) for kind in ("real", "fake")]

# ---- the paper's tables and its figure 5; each section yields the rows of its table ------------------------
def table4(ev):
    """Table 4: validation loss (val_loss_0: at t < 100, and so on) and FID after every epoch. Picture:
    these losses, a column for each epoch; blue: below that of the first epoch, red: above it"""
    rows = [{k: x and float(x) for k, x in row.items() if k.startswith(("epoch", "train_", "val_", "fid"))}
            for row in read_csv(ev.folder / "log.csv")]
    losses = np.array([[x or 1 for k, x in row.items() if k.startswith("val_loss")] for row in rows]).T
    change = losses / losses[:, :1] - 1
    change /= np.abs(change).max() or 1
    colours = np.stack([1 + change.clip(max=0), 1 - np.abs(change), 1 - change.clip(0)], -1)
    blocks = np.kron(255 * colours, np.ones((32, 48, 1))).astype(np.uint8)
    picture = Image.fromarray(np.pad(blocks, ((0, 0), (80, 0), (0, 0)), constant_values=255))
    for i, name in enumerate(k for k in rows[0] if k.startswith("val_loss")):
        ImageDraw.Draw(picture).text((4, 32 * i + 10), name, fill="black")
    save_image(ev.out / "epochs.png", picture)
    return rows

def table5(ev):
    """Table 5: validation FID at guidance 1.0 to 2.0 of the best adapter"""
    space = ev.spaces[0]
    real = ev.features(space, "real", "val")
    for w in SWEEP:
        yield dict(guidance=w, features=space.kind, n=len(real),
                   fid=distance(real, ev.features(space, "fake", "val", None, w)))

def table7(ev):
    """Table 7: FID of validation and test part with a 95 % interval, beside floors: that of other real images
    at the same n, and of the same images through the VAE; and of samples of training references, at the n of
    the validation part: it is much lower than that part's where the adapter overfits"""
    for space in ev.spaces:
        for part, *of in (("train", ev.limit), ("val",), ("test",)):
            real, fake = ev.pair(space, part, *of)
            if of:
                real, fake = (np.array(subsample(x, len(ev.patches["val"]))) for x in (real, fake))
                floors = None, None
            else:
                others = ev.features(space, "real", "train", len(real)), ev.features(space, "decoded", part)
                floors = [distance(real, x) for x in others]
            low, high = fid.bootstrap_interval(distance, real, fake)
            yield dict(part=part, features=space.kind, n=len(real), fid=distance(real, fake), fid_low=low,
                       fid_high=high, floor_real=floors[0], floor_vae=floors[1], **fid.kid(real, fake))

def table8(ev):
    """Table 8: KID of each class of the test part (the paper gives it x 1000); "-" below 20 images"""
    labels = ev.labels("test")
    for space in ev.spaces:
        real, fake = ev.pair(space, "test")
        for name in np.unique(labels):
            x, y = real[labels == name], fake[labels == name]
            yield {"class": name, "features": space.kind, "n": len(x)} | fid.kid(x, y)

def figure5(ev):
    """Figure 5: real | synthetic of each class, from the test part"""
    labels, real, fake = ev.labels("test"), ev.real("test"), ev.fake("test")
    names, first = np.unique(labels, return_index=True)
    texts = [f"{name}: {kind}" for name in names for kind in ("real", f"synthetic, w = {ev.cfg}")]
    save_sheet(ev.out / "figure5.png", [(real[i], fake[i]) for i in first], texts, 4)

# ---- beyond the paper --------------------------------------------------------------------------------------
def fidelity_table(ev):
    """Fidelity: cosine of a test sample's features with its reference's and with other references', and the
    95 % interval of the difference; the share whose nearest class centroid (of real training images) is the
    reference's class, and that of real images. The encoder's are circular: it conditioned the samples"""
    for space in ev.spaces:
        (real, fake), train = ev.pair(space, "test"), ev.features(space, "real", "train")
        own, others = fid.fidelity(fake, real)
        low, high = fid.bootstrap_interval(lambda x, y: np.subtract(*fid.fidelity(x, y)), fake, real)
        row = dict(features=space.kind, n=len(fake), cosine_own=own, cosine_others=others,
                   difference_low=low, difference_high=high)
        for name, x in (("consistency", fake), ("consistency_real", real)):
            row[name] = (fid.nearest_centroid(train, ev.labels("train"), x) == ev.labels("test")).mean()
        yield row

def memorisation_table(ev):
    """Memorisation: distance from a sample's embedding to the nearest training image's. `closer`: the share
    nearer than 99 % of real validation images are, 0.01 if nothing is copied. Picture: the nearest"""
    sets = {"real val": ("real", "val"), "samples of val": ("fake", "val"),
            "samples of train": ("fake", "train", ev.limit)}
    train, limit = ev.features(ev.spaces[-1], "real", "train"), None
    for name, images in sets.items():
        distances = cdist(ev.features(ev.spaces[-1], *images), train)
        index, d = distances.argmin(1), distances.min(1)
        limit = np.quantile(d, 0.01) if limit is None else limit
        yield dict(images=name, n=len(d), median=np.median(d), lowest=d.min(), closer=(d < limit).mean())
    fake, real, order = ev.fake("train", ev.limit), ev.real("train"), d.argsort()[:10]
    texts = [text for i in order for text in ("sample", f"training image, {d[i]:.3g} from it")]
    save_sheet(ev.out / "memorisation.png", [(fake[i], real[index[i]]) for i in order], texts, 4)

def usefulness_table(ev):
    """Usefulness: a linear classifier of a few real training images of each class, and of these with k times
    as many samples of them, or as many flips and turns of them, which samples must beat: mean and deviation
    over three choices of the few, on the real test images"""
    space, n = ev.spaces[0], max(4, ev.limit // COPIES)
    labels, real = ev.labels("train", n), ev.features(space, "real", "train", n)
    extra = {"synthetic": ev.features(space, "fake", "train", n, None, COPIES),
             "flips": ev.features(space, "flipped", "train", n)}
    cap = max(2, n // (2 * len(np.unique(labels))))
    for kind, k in [("flips", 0), *((kind, k) for kind in extra for k in (1, 2, COPIES))]:
        copies, scores = extra[kind].reshape(n, COPIES, -1)[:, :k], []
        for order in (np.random.default_rng(seed).permutation(n) for seed in range(3)):
            few = np.concatenate([order[labels[order] == name][:cap] for name in np.unique(labels)])
            x = np.concatenate([real[few], copies[few].reshape(-1, real.shape[1])])
            guess = fid.fit_linear(x, np.r_[labels[few], labels[few].repeat(k)])
            scores.append(fid.balanced_accuracy(ev.labels("test"), guess(ev.features(space, "real", "test"))))
        yield dict(train=f"real + {k} x {kind}" if k else "real", features=space.kind, n=len(x),
                   balanced_accuracy=np.mean(scores), accuracy_std=np.std(scores))

def table6(runs):
    """Table 6: the finished ones of several runs by FID, with the settings in which they differ"""
    found = [(run, read_settings(run), read_csv(run / "log.csv")) for run in runs if not unfinished(run)]
    found = [(run, settings, log, *best_epoch(log)) for run, settings, log in found if settings and log]
    if not found:
        raise Fail("none of these is a finished run of train.py")
    names = [name for name in vars(found[0][1]) if name not in THIS_CALL | {"run", "micro_batch"}
             and len({getattr(settings, name) for _, settings, *_ in found}) > 1]
    for run, settings, log, column, best in sorted(found, key=lambda row: (row[3], float(row[4][row[3]]))):
        values = {name: getattr(settings, name) for name in names}
        score = {"best_epoch": best["epoch"], "score": column, "lowest": float(best[column])}
        yield {"run": run.name} | values | score | {"minutes": log[-1]["minutes"]}

# ---- the reader study --------------------------------------------------------------------------------------
READ = 100              # patches that a reader sees
KINDS = "real", "synthetic"
BUTTON = '<button name="{0}" value="{1}" accesskey="{2}" onclick="choose(this)">{1} [{2}]</button>\n'

def reader(ev):
    """Reader study: reader.html shows validation patches in random order, half of them real and half sampled,
    and asks which is which; reader-key.csv has the solution, by which --score judges a reader's answers"""
    labels, files = ev.labels("val", READ), list(zip(ev.real("val", READ), ev.fake("val", READ)))
    study = f"{ev.samples.name}-w{ev.cfg}"
    order = np.random.RandomState([*study.encode()]).permutation(len(files))    # the same in every NumPy
    key = [dict(item=f"{study}-{n}", file=files[i][i % 2], truth=KINDS[i % 2], label=labels[i],
                reference=files[i][0]) for n, i in enumerate(order, 1)]
    classes, questions = map(html.escape, np.unique(labels)), ""
    for column, keys, answers in (("answer", "rs", KINDS), ("confidence", "12345", "12345"),
                                  ("class", "abcdefghijklmnopqtuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", classes)):
        buttons = (BUTTON.format(column, answer, keys[i:i + 1]) for i, answer in enumerate(answers))
        questions += f"<p>{column} {''.join(buttons)}</p>"
    images = {row["item"]: data_uri(row["file"]) for row in key}
    page = Path(__file__).with_name("reader.html").read_text(encoding="utf-8")
    page = page.replace("STUDY", json.dumps(dict(study=study, images=images)))
    save_text(ev.out / "reader.html", page.replace("QUESTIONS", questions))
    save_csv(ev.out / "reader-key.csv", key)

def score_readers(out, files):
    """Print and write the scores of answers that reader.html saved, a file for each reader: share of right
    ones, with Wilson's 95 % interval, and of the classes named those that are right; of all patches, the real
    or synthetic ones (specificity, sensitivity), these by class; and Cohen's kappa of each two readers."""
    key, rows, given = {row["item"]: row for row in read_csv(out / "reader-key.csv")}, [], {}
    for file in files:
        with foreign_file(file, f"has no answers to {out}/reader.html", "it needs reader, item, answer"):
            found = [key[row["item"]] | row for row in read_csv(Path(file).resolve(strict=True))]
            readers, answers = {row["reader"] for row in found}, {row["item"]: row["answer"] for row in found}
            if (len(readers) != 1 or readers & {"", *given} or len(answers) < len(found)
                    or not {*answers.values()} <= {*KINDS}):
                raise ValueError("not one new reader's name, a patch twice, or an answer of another kind")
        [reader], groups = readers, defaultdict(list)
        given[reader] = answers
        for row in found:
            for group in ("all", row["truth"], f"{row['truth']} {row['label']}"):
                groups[group].append(row)
        for group, judged in sorted(groups.items()):
            right, n = sum(row["answer"] == row["truth"] for row in judged), len(judged)
            low, high = binomtest(right, n).proportion_ci(method="wilson")
            named = [row["class"] == row["label"] for row in judged if row.get("class")]
            rows.append(dict(reader=reader, patches=group, n=n, right=right / n, low=low, high=high,
                             class_right=np.mean(named) if named else None))
    pairs = [dict(reader=a, other=b, kappa=fid.cohen_kappa(given[a], given[b]))
             for a, b in combinations(given, 2)]
    for name, table in ("reader-scores", rows), ("reader-agreement", pairs):
        if table:
            save_csv(out / f"{name}.csv", table)
            print(as_markdown(table), end="\n\n")

# ---- pictures and the program ------------------------------------------------------------------------------
def data_uri(path):
    """The pixels of an image file, and nothing else of it, as a PNG in a data: URI."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(load_rgb(path))).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

def as_markdown(rows):
    def cell(x):
        return f"{x:.4g}" if isinstance(x, float) else "-" if x in (None, "") else str(x).replace("|", r"\|")
    lines = [list(rows[0]), *([*map(cell, row.values())] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]       # three dashes at least
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)

# name in --only: a section, whose docstring is its heading, and which may write a picture of that name
SECTIONS = dict(epochs=table4, sweep=table5, test=table7, classes=table8, figure5=figure5, reader=reader,
                fidelity=fidelity_table, memorisation=memorisation_table, usefulness=usefulness_table)

def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run; or several, for Table 6")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    parser.add_argument("--cfg", type=number(float, 0), default=1.3, help="guidance (default: 1.3)")
    parser.add_argument("--limit", type=number(int, 8), default=400, help="samples of training images (400)")
    parser.add_argument("--judge", nargs="+", default=[], metavar="NAME", help="encoders to measure with too")
    parser.add_argument("--inception", metavar="FILE", help="its weights (default: torch.hub's cache)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--score", nargs="+", metavar="FILE", help="judge answers saved by RUN's reader.html")
    args = parser.parse_args()
    if args.score:
        return score_readers(args.runs[0] / "report", args.runs[1:] + args.score)     # of one study
    if args.runs[1:]:
        return print(as_markdown(list(table6(args.runs))))
    [run], text = args.runs, f"# {args.runs[0].name}\n"
    ev = Evaluation(run, args)
    for name in args.only:
        section, picture = SECTIONS[name], ev.out / f"{name}.png"
        part = "\n## " + " ".join(section.__doc__.split()).replace(": ", "\n\n", 1) + "\n\n"
        if rows := list(section(ev) or ()):
            save_csv(ev.out / f"{section.__name__.removesuffix('_table')}.csv", rows)
            part += as_markdown(rows) + "\n"
        print(part, flush=True)
        text += part + (f"\n![{name}]({picture.name})\n" if picture.exists() else "")
    if args.only == list(SECTIONS):
        save_text(ev.out / "report.md", text)
        page = re.sub(r"!\[.*\((.*)\)", lambda m: f'<img src="{data_uri(ev.out / m[1])}">', html.escape(text))
        page = re.sub(r"^#+ (.*)", r"<h2>\1</h2>", page, flags=re.M)
        page = re.sub(r"((?:^\|.*\n)+)", r'<pre style="overflow: auto">\1</pre>', page, flags=re.M)
        save_text(ev.out / "report.html", '<meta charset="utf-8"><body style="font: 16px sans-serif">' + page)
        save_text(run / "README.md", model_card(run))           # which includes the report

if __name__ == "__main__":
    run_program(main)

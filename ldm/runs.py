"""A run of train.py: its settings, its folder, the names of its patches and samples, and its model card."""
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .app import (RANK0, WORLD, Fail, Parser, add_options, file_sha256, from_saved, option, read_csv,
                  read_json, safe_name, save_json)
from .data import make_split, read_dataset, read_split, subsample
from .weights import BUILT_IN, SD15, TensorFile

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

TOY_DATA = "toy-tissue"     # what --data is called where it is drawn, beside the run
DATA, MODEL, TRAINING, VALIDATION, RUN = "data and weights", "model", "training", "validation", "run"

@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are the paper's; `toy` is the default where the base is "toy".

    on_resume: whether a resumed run may have another value: "same" (the default), "free", or "this call" (not
    taken from the run). A setting that an older config.json lacks has its default.
    """
    data: str | None = option(DATA, None, "train.json and test.json as in Chaoyang, a folder per class, or "
                              "images (default: toy tissue)", kind=str, metavar="DIR", on_resume="free")
    split: str = option(DATA, "paper", "paper (pooled, by case, 5398:387:375), official, or a file",
                        metavar="HOW")
    sd15: str = option(DATA, SD15, "Diffusers folder, CompVis file, hub repository, or toy", metavar="PATH",
                       on_resume="free", toy="toy")
    uni2h: str = option(DATA, "MahmoodLab/UNI2-h", "folder or file of the weights, hub repository, or toy",
                        metavar="PATH", on_resume="free", toy="toy")
    size: int = option(DATA, 512, "side of the images in pixels", low=8, high=8192, toy=64)
    limit: int | None = option(DATA, None, "use at most N images of each part", kind=int, low=1, metavar="N")
    rank: int = option(MODEL, 8, "r of LoRA", low=1, high=4096)
    alpha: float | None = option(MODEL, None, "α of LoRA (default: the rank)", kind=float, low=1e-6)
    tokens: int = option(MODEL, 4, "condition tokens n_c", low=1, high=4096)
    hidden: int = option(MODEL, 1024, "width d_h of the projector", low=1, high=65536, toy=256)
    depth: int = option(MODEL, 2, "linear layers of the projector, 2 or 3", low=2, high=3)
    token_norm: bool = option(MODEL, False, "LayerNorm on the tokens (another reading of Table 2)")
    lr: float = option(TRAINING, 5e-5, "learning rate of LoRA", toy=5e-3)
    lr_ratio: float = option(TRAINING, 10.0, "projector's learning rate over LoRA's", toy=1.0)
    cfg_drop: float = option(TRAINING, 0.1, "p of the null embedding, per image", high=1)
    epochs: int = option(TRAINING, 12, "passes over the training images", low=1, toy=24)
    batch: int = option(TRAINING, 16, "images per step", low=1)
    max_steps: int | None = option(TRAINING, None, "stop after N steps, the schedule shortened to them",
                                   kind=int, low=1, high=10 ** 9, metavar="N")
    seed: int = option(TRAINING, 0, "of everything random except the split", high=2 ** 63)
    val_samples: int | None = option(VALIDATION, None, "validation images to sample for FID and grid "
                                     "(default: all)", kind=int, metavar="N")
    # Of the toy's few validation images a FID every epoch is noise: sampled in the middle and at the end.
    val_every: int = option(VALIDATION, 1, "sample every Kth epoch, and the last", low=1, metavar="K", toy=12)
    val_cfg: float = option(VALIDATION, 1.5, "their guidance", metavar="W")
    val_steps: int = option(VALIDATION, 30, "their denoising steps", low=1, high=999, metavar="N")
    features: str | None = option(VALIDATION, None, "of the FID (default: inception, or encoder where "
                                  "Inception's weights are not available)", kind=str,
                                  choices=("inception", "encoder"))
    inception: str | None = option(VALIDATION, None, "pytorch-fid's weights (default: torch.hub's cache)",
                                   kind=str, metavar="FILE", on_resume="free")
    run: str | None = option(RUN, None, "folder of the run (default: under runs/, named by its settings)",
                             kind=str, metavar="DIR", on_resume="free")
    device: str = option(RUN, "auto", "cuda, mps or cpu", on_resume="this call")
    no_compile: bool = option(RUN, False, "do not torch.compile the U-Net (it is compiled on CUDA only)",
                              on_resume="this call")
    quiet: bool = option(RUN, False, "print failures only", on_resume="this call")

    def differing(self, other):
        """Names of the settings that differ and must not, in comparable runs or a run and its resumption."""
        same = [f.name for f in fields(self) if f.metadata.get("on_resume", "same") == "same"]
        return [name for name in same if getattr(self, name) != getattr(other, name)]

def parse_settings(description):
    """The command line of train.py -> (Settings, whether --resume was given, whether --parameters was)."""
    parser = Parser(description)
    add_options(parser, Settings)
    call = parser.add_argument_group("this call")
    call.add_argument("--resume", metavar="DIR", help="resume this run, with its own settings")
    call.add_argument("--parameters", action="store_true", help="print parameter counts (Table 2) and exit")
    given = vars(parser.parse_args())
    resume, parameters = given.pop("resume"), given.pop("parameters")
    if resume:
        settings = _resumed(resume, given)
    elif given.get("sd15") == "toy" or not (parameters or {"sd15", "data"} & given.keys()):
        defaults = {f.name: f.metadata["toy"] for f in fields(Settings) if "toy" in f.metadata}
        settings = Settings(**defaults | given)
    else:
        settings = Settings(**given)
    if settings.data is None and not parameters:
        if settings.sd15 != "toy":
            raise Fail("pass --data with a folder of patches; only the toy base (--sd15 toy) has its own")
        if settings.split != "paper":
            raise Fail("--split needs a dataset of yours: pass it with --data")
    drawn = settings.data is None or (resume and settings.data == TOY_DATA)
    return _resolve(settings, drawn), resume, parameters

def _resumed(folder, given):
    if "run" in given:
        raise Fail("pass --resume with the run to resume, or --run for a new one, not both")
    saved = read_settings(folder)
    if saved is None:
        raise Fail(f"--resume {folder}: it is not a run of train.py")
    call = {f.name: f.default for f in fields(Settings) if f.metadata.get("on_resume") == "this call"}
    return replace(saved, **call | given, run=folder)

def _resolve(settings, drawn):
    """Fill in α and the run's folder, make paths absolute. drawn: the data is toy tissue, beside the run."""
    changes = {"data": TOY_DATA} if drawn else {}
    for name in ("data", "sd15", "uni2h", "split", "inception"):
        value = getattr(settings, name)
        path = Path(os.path.expanduser(value or "-"))
        built_in = name in ("sd15", "uni2h") and value in BUILT_IN
        folder = name in ("data", "sd15", "uni2h") and path.is_dir()
        if name not in changes and not built_in and (path.is_file() or folder):
            changes[name] = str(path.resolve())
    if settings.alpha is None:
        changes["alpha"] = float(settings.rank)
    settings = replace(settings, **changes)
    if settings.run is None and settings.data is not None:
        name = f"{safe_name(Path(settings.data).name)}-{settings.size}px-r{settings.rank}-t{settings.tokens}"
        settings = replace(settings, run=f"runs/{name}")
    return settings

# ---- a run's folder ----------------------------------------------------------------------------------

class Lock:
    """Keeps a folder from other processes while this object lives; fails where another process holds it.

    There is no lock on Windows, which lacks flock, nor on a file system that refuses it.
    """

    def __init__(self, folder):
        self.handle = None          # where it cannot be opened
        if fcntl is None:
            return
        self.handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fail(f"another process is using {folder}; wait for it, or pass another --run") from None
        except OSError:
            pass

    def __del__(self):
        if self.handle is not None:
            os.close(self.handle)

def read_settings(folder):
    """The Settings of the run in a folder, or None where there is no run of train.py."""
    path = Path(folder) / "config.json"
    values = read_json(path).get("args")
    if not isinstance(values, dict):
        return None
    older = "parameters"                    # which older versions saved
    try:
        return from_saved(Settings, {name: value for name, value in values.items() if name != older})
    except ValueError as problem:
        raise Fail(f"{path} is damaged or of another version ({problem}); restore it, or pass another "
                   "--run") from None

def check_or_create(folder, settings, sha256):
    """Check that the run in this folder has these settings and hashes, or make the folder a run of these.

    Until a run has saved an adapter its config.json is replaced: its settings may be why it stopped.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise Fail(f"--run {folder} is a file; pass a folder")
    saved = read_settings(folder)
    if path.exists() and saved is None:
        raise Fail(f"{path} is not of a run of train.py; pass another --run")
    others = (p for p in folder.glob("*") if p.name != "split.json" and not p.name.startswith("."))
    if not path.exists() and any(others):
        raise Fail(f"{folder} holds other files and no run of train.py; pass another --run")
    if not RANK0:
        return
    if not any(folder.glob("[!.]*.safetensors")):
        config = dict(args=asdict(settings), sha256=sha256, command=sys.argv, environment=environment())
        save_json(path, config)
        return
    config = read_json(path)
    kinds = dict(sha256=dict, command=list, environment=dict)
    if not all(isinstance(config.get(key), kind) for key, kind in kinds.items()):
        raise Fail(f"{path} is damaged; restore it, or pass another --run")
    differing = [(name, getattr(saved, name), getattr(settings, name)) for name in settings.differing(saved)]
    differing += [(name, config["sha256"].get(name), value) for name, value in sha256.items()
                  if config["sha256"].get(name) != value]
    for name, was, now in differing[:1]:
        was, now = ("none" if value is None else value for value in (was, now))
        raise Fail(f"{folder} is a run with {name.replace('_', '-')} {was}, not {now}; pass another --run")

def environment():
    """The versions that made a run: {name: version}; git: the commit, "-dirty" where tracked files differ."""
    found = dict(python=platform.python_version(), platform=platform.platform(), processes=WORLD)
    for name in ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    try:
        command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40",
                   "--exclude", "*"]
        found["git"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git"] = None
    return found

def split_of_run(folder, patches, how, started):
    """The split of a run: its split.json, with which a run that is not started must agree; or a new one."""
    path = folder / "split.json"
    split = make_split(patches, how) if not started else None
    if path.exists():
        saved = read_split(path, patches)
        if not started and saved != split:
            raise Fail(f"{path} exists and is not the split that --split {how} asks for; to use it, pass "
                       f"--split {path}, else remove it")
        return saved
    if split is None:
        raise Fail(f"{path} of this run is missing; restore it, or pass another --run")
    return split

# ---- finding runs, patches and samples ---------------------------------------------------------------

def newest_run():
    """The folder under runs/ whose adapter was written last, or None."""
    found = sorted(Path("runs").glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None

def find(paths, run=None):
    """The paths; or, where none exists and the run (default: the newest) has all, those, announced."""
    paths = [Path(os.path.expanduser(path)) for path in paths]
    run = run or newest_run()
    if run and not any(path.exists() or path.is_absolute() for path in paths):
        inside = [Path(run) / path for path in paths]
        if all(path.exists() for path in inside):
            if RANK0:
                print(f"using {', '.join(map(str, inside))}", file=sys.stderr)
            return inside
        if any(path.exists() for path in inside):
            missing = next(path for path, there in zip(paths, inside) if not there.exists())
            raise Fail(f"{missing} is neither here nor in {run}")
    return paths

def patches_of(part, settings, folder):
    """A part of a run's split -> [(Patch, path)] sorted by title; train and val within the run's --limit."""
    if settings is None or not settings.data or not (folder / "split.json").is_file():
        raise Fail(f"{folder} contains no split.json; pass --ref")
    data = folder.parent / TOY_DATA if settings.data == TOY_DATA else Path(settings.data)
    patches = {p.name: p for p in read_dataset(data)}
    names = read_split(folder / "split.json", list(patches.values()))[part]
    names = names if part == "test" else subsample(names, settings.limit)
    return sorted(((patches[n], data / n) for n in names), key=lambda pair: pair[0].title)

def name_references(found, known):
    """[(name, path)] -> {unique name: path}, and `known` extended by them: {name: sha256 of the file}.

    Two images never share a name, here or with an earlier call that left `known`: the second one gets "-2".
    """
    references, known = {}, dict(known)
    for name, path in found:
        digest = file_sha256(path)
        name = unique = "/".join(map(safe_name, name.split("/")))
        n = 2
        while unique in references or known.setdefault(unique, digest) != digest:
            unique, n = f"{name}-{n}", n + 1
        references[unique] = path
    return references, known

def public_name(source):
    """A source as an adapter's header and the model card name it: of an absolute path the last part.

    The same for an argument --name=source. A folder with the name of a built-in source does not pass for it.
    """
    flag, equals, value = source.partition("=") if source.startswith("--") else ("", "", source)
    name = (Path(value).name or value) if os.path.isabs(value) or value.startswith("~") else value
    return flag + equals + (f"./{name}" if name in BUILT_IN and name != value else name)

# ---- Table 2 and the model card ------------------------------------------------------------------------

def parameter_table(unet, projector):
    """The trainable parameters in the form of Table 2. unet: with LoRA, and nothing else trainable."""
    lora = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in unet.parameters()) - lora
    null = projector.null.numel()
    mlp = sum(p.numel() for p in projector.parameters()) - null
    total = lora + mlp + null
    parts = {"LoRA adapters": lora, "Projector MLP": mlp, "Null embedding": null, "Total trainable": total}
    rows = [("Component", "Parameters", "Share")]
    for name, n in parts.items():
        rows.append((name, f"{n:,}", f"{n / total:.1%}" if n / total >= 0.001 else "<0.1%"))
    rows += [("Stable Diffusion backbone (frozen)", f"{frozen:,}", "")]
    rows += [("Trainable/backbone", "", f"{total / frozen:.2%}")]
    return "\n".join(f"{name:<36}{n:>14}{share:>9}" for name, n, share in rows)

CARD = """---
base_model: {base}
{terms}
pipeline_tag: image-to-image
tags: [lora, stable-diffusion, histopathology, synthetic-data]
---
# {name}

Patches with the morphology of a reference patch: embeddings of the pathology encoder `{encoder}` replace the
text condition of `{base}`, through a projector and LoRA (Kuzmin and Berezsky 2026,
https://doi.org/10.15587/2706-5448.2026.355663).

- `adapter.safetensors`: LoRA of rank {rank} (α {alpha:g}) on Q, K, V and O, projector to {tokens} tokens,
  null embedding{best}.

## Use

    python sample.py --run THIS_FOLDER --ref patch.png --cfg 1.3        # in the program's folder

Research only: synthetic images must not be used for diagnosis. An adapter can reproduce its training patches;
check `python -m ldm.report` (memorisation) before you share it.

## Data

`{data}`, {size} px; {how}; {shared}.{limit}

| part | cases | patches | classes |
|---|---|---|---|
{counts}

## Training

{step} steps, to epoch {epoch} of {epochs}, batch {batch}, seed {seed},
learning rates {lr:g} (LoRA) and {lr_projector:g} (projector); {minutes} minutes.
Command: `{command}`
Environment: {environment}
Hashes (sha256) of the weights' tensors and of all image files: {sha256}

## Licence

{licence}
"""
BEST = """; the last.
- `adapter-best.safetensors`: the same with the lowest {what}
  on {n} validation patches: **{value:.4g}**, epoch {epoch} of {epochs} ({tried} were measured)"""

def model_card(folder):
    """The text of README.md for a run that has finished an epoch."""
    folder = Path(folder)
    settings, config = read_settings(folder), read_json(folder / "config.json")
    split, log = read_json(folder / "split.json"), read_csv(folder / "log.csv")
    base, encoder = public_name(settings.sd15), public_name(settings.uni2h)
    header = TensorFile(folder / "adapter.safetensors").header
    terms = dict(sd15="openrail-m", uni2h=header.get("encoder_licence", "cc-by-nc-nd-4.0"))
    terms = "-and-".join(name for key, name in terms.items() if getattr(settings, key) not in BUILT_IN)
    text = CARD.format(**asdict(settings) | dict(
        name=folder.name, base=base, encoder=encoder, data=Path(settings.data).name,
        terms=f"license: other\nlicense_name: {terms}" if terms else "license: mit",
        best=_describe_best(folder, settings, split, log), **_describe_split(settings, split),
        lr_projector=settings.lr * settings.lr_ratio, licence=header["licence"],
        **{key: log[-1][key] for key in ("step", "epoch", "minutes")},
        command=shlex.join(["python", *map(public_name, config["command"])]),
        environment=", ".join(f"{k} {v}" for k, v in config["environment"].items() if v),
        sha256=", ".join(f"{k} {v[:16]}" for k, v in config["sha256"].items())))
    report = folder / "report" / "report.md"
    if report.is_file():
        text += "\n" + report.read_text(encoding="utf-8").replace("\n#", "\n##").replace("](", "](report/")
    return text

def best_epoch(log):
    """The rows of a log.csv -> (the column that chooses the best adapter, the row with its lowest value)."""
    distances = [name for name in log[0] if name.startswith("fid") and any(row[name] for row in log)]
    column = distances[0] if distances else "val_loss"
    return column, min((row for row in log if row[column]), key=lambda row: float(row[column]))

def _describe_best(folder, settings, split, log):
    if not (folder / "adapter-best.safetensors").exists():      # before the first samples
        return ""
    column, best = best_epoch(log)
    sampling = f"guidance {settings.val_cfg:g}, {settings.val_steps} steps"
    what = {"val_loss": "noise prediction loss", "fid": f"FID (Inception, resize pytorch-fid, {sampling})",
            "fid_encoder": f"Fréchet distance of the encoder's features (no FID, not comparable; {sampling})"}
    n = len(subsample(split["val"], settings.limit))
    if column != "val_loss" and settings.val_samples is not None:
        n = min(n, settings.val_samples)
    tried = sum(bool(row[column]) for row in log)
    return BEST.format(what=what[column], n=n, value=float(best[column]), epoch=best["epoch"],
                       epochs=settings.epochs, tried=tried)

def _describe_split(settings, split):
    patches = {part: sum(classes.values()) for part, classes in split["patches"].items()}
    classes = {part: ", ".join(f"{k} {v}" for k, v in of.items()) for part, of in split["patches"].items()}
    rows = ((part, split["cases"][part], n, classes[part]) for part, n in patches.items())
    counts = "\n".join("| {} | {} | {} | {} |".format(*row) for row in rows)
    how = {"paper": "pooled, then split by case",
           "official": "the dataset's own test part, the validation part taken from the rest by case"}
    shared = f"cases in more than one part: {split.get('cases_in_several_parts', 'not counted')}"
    if sum(split["cases"].values()) == sum(patches.values()):
        shared = "which patches share a case is unknown"
    limit = f" At most {settings.limit} patches of train and of val are used." if settings.limit else ""
    return dict(counts=counts, shared=shared, limit=limit,
                how=how.get(settings.split, f"split as in `{Path(settings.split).name}`"))

"""A run of train.py: its settings, its folder, the names of its patches and samples, and its model card."""
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path

from .app import (DTYPES, MAX_SEED, RANK0, WORLD, Fail, Parser, add_options, announce, file_sha256,
                  foreign_file, option, read_csv, read_json, safe_name, save_json)
from .data import read_dataset, read_split, subsample
from .weights import BUILT_IN, SD15, TensorFile

TOY_DATA = "toy-tissue"     # the --data that is drawn, in a folder of this name beside the run
# The defaults of a run on the toy base. Of its few validation images a FID every epoch is noise.
TOY = dict(data=TOY_DATA, sd15="toy", uni2h="toy", size=64, hidden=256, lr=5e-3, lr_ratio=1.0, epochs=12,
           val_every=6)
# Settings that may differ on resume (of files the hashes must agree), and those not taken over from the run
MAY_DIFFER = {"data", "sd15", "vae", "encoder", "uni2h", "micro_batch", "inception", "run", "dtype"}
THIS_CALL = {"device", "no_compile", "quiet"}
DATA, MODEL, TRAINING, VALIDATION, RUN = "data and weights", "model", "training", "validation", "run"

@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are the paper's; what an old config.json lacks has its default."""
    data: str | None = option(DATA, None, "folder of patches, as the README has it (default: toy tissue)")
    case: str | None = option(DATA, None, "regular expression, the case in a name (default: see the README)")
    split: str = option(DATA, "paper", "paper (pooled, by case, 5398:387:375), official, or a file")
    sd15: str = option(DATA, SD15, "Diffusers folder, CompVis file, hub repository, or toy")
    vae: str | None = option(DATA, None, "another VAE: folder, file, repository (default: the base's)")
    encoder: str | None = option(DATA, None, "uni2-h, h-optimus-0/-1, virchow2, prov-gigapath, timm's")
    uni2h: str | None = option(DATA, None, "the encoder's weights, or toy (default: its hub repository)")
    size: int = option(DATA, 512, "side of the images in pixels", low=8, high=8192)
    limit: int | None = option(DATA, None, "use at most N images of train and val", low=1)
    rank: int = option(MODEL, 8, "r of LoRA", low=1, high=4096)
    alpha: float | None = option(MODEL, None, "α of LoRA (default: the rank)", low=1e-6)
    tokens: int = option(MODEL, 4, "condition tokens n_c", low=1, high=4096)
    hidden: int = option(MODEL, 1024, "width d_h of the projector", low=1, high=65536)
    depth: int = option(MODEL, 2, "linear layers of the projector, 2 or 3", low=2, high=3)
    token_norm: bool = option(MODEL, False, "LayerNorm on the tokens (another reading of Table 2)")
    lr: float = option(TRAINING, 5e-5, "learning rate of LoRA")
    lr_ratio: float = option(TRAINING, 10.0, "projector's learning rate over LoRA's")
    cfg_drop: float = option(TRAINING, 0.1, "p of the null embedding, per image", high=1)
    epochs: int = option(TRAINING, 12, "passes over the training images", low=1)
    batch: int = option(TRAINING, 16, "images per step", low=1)
    micro_batch: int | None = option(TRAINING, None, "images per pass (default: on CUDA what fits)", low=1)
    max_steps: int | None = option(TRAINING, None, "stop then, on a schedule of this length", low=1)
    seed: int = option(TRAINING, 0, "of all that is random in training", high=MAX_SEED)
    val_samples: int | None = option(VALIDATION, None, "images to sample for FID (default: all)")
    val_every: int = option(VALIDATION, 1, "sample every Nth epoch, and the last", low=1)
    val_cfg: float = option(VALIDATION, 1.5, "their guidance")
    val_steps: int = option(VALIDATION, 30, "their denoising steps", low=1, high=999)
    features: str | None = option(VALIDATION, None, "default: as available", choices=("inception", "encoder"))
    inception: str | None = option(VALIDATION, None, "pytorch-fid's weights (default: torch.hub's cache)")
    run: str | None = option(RUN, None, "its folder (default: under runs/)")
    device: str = option(RUN, "auto", "cuda, mps or cpu")
    dtype: str = option(RUN, "auto", "of the U-Net; auto: the device's fastest", choices=DTYPES)
    no_compile: bool = option(RUN, False, "do not torch.compile (done on CUDA only)")
    quiet: bool = option(RUN, False, "print failures only")

def parse_settings(description):
    """The command line of train.py -> (Settings, whether --resume was given).
    Paths become absolute; α and the run's folder, which depend on other settings, are filled in."""
    parser = Parser(description)
    add_options(parser, Settings)
    parser.add_argument("--resume", metavar="RUN", help="resume this run, with its own settings")
    given = vars(parser.parse_args())
    resume, values = given.pop("resume"), {}
    for name in {"data", "sd15", "vae", "encoder", "uni2h", "split", "inception"} & given.keys():
        path = os.path.abspath(os.path.expanduser(given[name]))
        if name == "data" or (os.path.exists(path) and given[name] not in {*BUILT_IN, "paper", "official"}):
            given[name] = path
    if resume:
        saved = read_settings(resume)
        if saved is None or "run" in given:
            raise Fail(f"--resume {resume} is no run of train.py, or --run is given too; pass a run alone")
        values = {name: x for name, x in vars(saved).items() if name not in THIS_CALL} | {"run": resume}
    elif given.get("sd15") == "toy" or not {"sd15", "data"} & given.keys():
        values = {name: x for name, x in TOY.items() if name != "uni2h" or "encoder" not in given}
    s = Settings(**values | ({"features": "inception"} if "inception" in given else {}) | given)
    if s.data is None or (s.data == TOY_DATA and s.split != "paper"):
        raise Fail("pass --data with a folder of patches; only the toy base has its own, and their split")
    run = f"runs/{safe_name(Path(s.data).name)}-{s.size}px-r{s.rank}-t{s.tokens}"
    return replace(s, alpha=s.alpha or float(s.rank), run=s.run or run), bool(resume)

# ---- a run's folder ----------------------------------------------------------------------------------
class Lock:
    """Keeps a folder from other processes while this object lives; fails where another process holds it.
    There is no lock on Windows, which lacks flock, nor on a file system that refuses it."""
    handle = None

    def __init__(self, folder):
        try:
            import fcntl
            self.handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fail(f"another process is using {folder}; wait for it, or pass another folder") from None
        except (ImportError, OSError):
            pass

    def __del__(self):
        if self.handle is not None:
            os.close(self.handle)

def read_settings(folder):
    """The Settings of the run in a folder, or None where there is no run of train.py."""
    path, parser = Path(folder) / "config.json", Parser("")
    values = read_json(path).get("args")
    if not isinstance(values, dict):
        return None
    values.pop("init", None)                # which older versions had
    add_options(parser, Settings)           # as arguments they are checked as those are
    arguments = [f"--{name.replace('_', '-')}" + f"={value}" * (value is not True)
                 for name, value in values.items() if value != getattr(Settings, name, None)
                 and (value or hasattr(Settings, name))]        # what older versions had, and did not use
    try:
        settings = Settings(**vars(parser.parse_args(arguments)))
        if any(getattr(settings, name, value) != value for name, value in values.items()):
            raise Fail("a setting is of another type")
    except Fail as problem:
        raise Fail(f"{path} is damaged or of another version ({problem}); pass another --run") from None
    return settings

def check_or_create(folder, settings, sha256):
    """Check that the run in this folder has these settings and hashes, or make the folder a run of these.
    Until a run has saved an adapter its config.json is replaced: its settings may be why it stopped."""
    path, saved = folder / "config.json", read_settings(folder)
    if folder.is_file() or (saved is None and any(p.name != "split.json" for p in folder.glob("[!.]*"))):
        raise Fail(f"{folder} is a file, or holds other files and no run of train.py; pass another --run")
    if not RANK0:
        return
    if not any(folder.glob("[!.]*.safetensors")):
        versions = {name: version(name) for name in ("torch", "timm", "safetensors", "numpy", "pillow")}
        versions |= dict(python=platform.python_version(), platform=platform.platform(), processes=WORLD)
        config = dict(args=asdict(settings), sha256=sha256, command=sys.argv, environment=versions)
        return save_json(path, config)
    config, kinds = read_json(path), dict(sha256=dict, command=list, environment=dict)
    if not all(isinstance(config.get(key), kind) for key, kind in kinds.items()):
        raise Fail(f"{path} is damaged; restore it, or pass another --run")
    pairs = [(name, was, getattr(settings, name)) for name, was in vars(saved).items()
             if name not in MAY_DIFFER | THIS_CALL]
    pairs += [(name, config["sha256"].get(name), value) for name, value in sha256.items()]
    for name, was, now in pairs:
        if was != now:
            what = f"images of {saved.data}" if name == "images" else name.replace("_", "-")
            end = ", where its learning rate ends at 0" * (name in ("epochs", "max_steps"))
            raise Fail(f"{folder} is a run with {what} {was}{end}, and not {now}; pass another --run")

# ---- finding runs, patches and samples ---------------------------------------------------------------
def unfinished(folder):
    """"epoch 3 of 12" for a run that is training or was interrupted, else ""."""
    settings, path = read_settings(folder), folder / "log.csv"
    with foreign_file(path):
        last = (read_csv(path) or [dict(epoch=0, step=0)])[-1]
        epoch, step, total = int(last["epoch"]), int(last["step"]), settings.epochs if settings else 0
        return f"epoch {epoch} of {total}" if epoch < total and step != settings.max_steps else ""

def newest_run():
    """The folder under runs/ whose adapter was written last, preferably a finished one, or None."""
    found = sorted(Path("runs").glob("*/adapter.safetensors"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        if not (left := unfinished(path.parent)):
            return path.parent
        announce(f"note: {path.parent} is not finished ({left})")
    return found[0].parent if found else None

def find(paths, run=None):
    """The paths; or, where none exists and the run (default: the newest) has one, those in it, announced."""
    paths = [Path(os.path.expanduser(path)) for path in paths]
    if not any(path.exists() or path.is_absolute() for path in paths) and (run := run or newest_run()):
        inside = [Path(run) / path for path in paths]
        if any(path.exists() for path in inside):
            announce(f"using {', '.join(map(str, inside))}")
            return inside
    return paths

def patches_of(settings, folder):
    """A run's split -> {part: [(Patch, path)] sorted by title}; train and val within the run's --limit."""
    if settings is None or not settings.data or not (folder / "split.json").is_file():
        raise Fail(f"{folder} contains no split.json; pass --ref")
    data = folder.parent / TOY_DATA if settings.data == TOY_DATA else Path(settings.data)
    patches = {p.name: p for p in read_dataset(data, settings.case, say=None)}
    split = read_split(folder / "split.json", list(patches.values()))
    split |= {part: subsample(split[part], settings.limit) for part in ("train", "val")}
    found = {part: [(patches[name], data / name) for name in names] for part, names in split.items()}
    return {part: sorted(pairs, key=lambda pair: pair[0].title) for part, pairs in found.items()}

def name_references(found, known, digest=file_sha256):
    """[(name, path)] -> {unique name: path}, and `known` extended by them: {name: digest(path)}.
    Two images never share a name, here or with an earlier call that left `known`: the second gets "-2"."""
    references, known = {}, dict(known)
    for name, path in found:
        name, sha256 = "/".join(map(safe_name, name.split("/"))), digest(path)
        candidates = chain([name], (f"{name}-{n}" for n in count(2)))
        unique = next(c for c in candidates if c not in references and known.setdefault(c, sha256) == sha256)
        references[unique] = path
    return references, known

def public_name(source):
    """A source as an adapter's header and the model card name it: of an absolute path the last part.
    The same for an argument --name=source. A folder named as a built-in source does not pass for it."""
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
    shares = ((name, n, f"{n / total:.1%}" if n / total >= 0.001 else "<0.1%") for name, n in parts.items())
    rows = [("Component", "Parameters", "Share"), *((name, f"{n:,}", share) for name, n, share in shares),
            ("U-Net backbone (frozen)", f"{frozen:,}", ""),
            ("Trainable/backbone", "", f"{total / frozen:.2%}")]
    return "\n".join(f"{name:<36}{n:>14}{share:>9}" for name, n, share in rows)

def model_card(folder):
    """The text of README.md for a run that has finished an epoch, by the template card.md."""
    settings, config = read_settings(folder), read_json(folder / "config.json")
    split, log = read_json(folder / "split.json"), read_csv(folder / "log.csv")
    header = TensorFile(folder / "adapter.safetensors").header
    terms = dict(sd15="openrail-m", uni2h=header.get("encoder_licence", "cc-by-nc-nd-4.0"))
    terms = "-and-".join(name for key, name in terms.items() if getattr(settings, key) not in BUILT_IN)
    rows = [(part, split["cases"][part], sum(of.values()), ", ".join(f"{k} {n}" for k, n in of.items()))
            for part, of in split["patches"].items()]
    shared = f"cases in more than one part: {split.get('cases_in_several_parts', 'not counted')}"
    if all(cases == patches for _, cases, patches, _ in rows):
        shared = "which patches share a case is unknown"
    text = Path(__file__).with_name("card.md").read_text("utf-8").format(**asdict(settings) | log[-1] | dict(
        name=folder.name, base=public_name(settings.sd15), encoder=header["encoder"],
        terms=f"license: other\nlicense_name: {terms}" if terms else "license: mit",
        best=_describe_best(folder, settings, split, log), data=Path(settings.data).name, shared=shared,
        how=Path(settings.split).name, counts="\n".join("| {} | {} | {} | {} |".format(*row) for row in rows),
        command=shlex.join(["python", *map(public_name, config["command"])]), licence=header["licence"],
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
    path, (column, _) = folder / "adapter-best.safetensors", best_epoch(log)
    step = path.exists() and TensorFile(path).header["step"]
    if not (row := next((row for row in log if row["step"] == step), None)):   # or it is of a later state
        return "not yet; it follows the first samples."
    sampled = settings.val_samples if column != "val_loss" else None
    n = min(n for n in (len(split["val"]), settings.limit, sampled) if n is not None)
    what = {"val_loss": "noise prediction loss", "fid": "FID (Inception, resize pytorch-fid)",
            "fid_encoder": "Fréchet distance of the encoder's features (no FID, not comparable)"}
    return (f"the same after epoch {row['epoch']} of {settings.epochs}; {what[column]} on\n  {n} validation "
            f"patches, guidance {settings.val_cfg:g}: **{float(row[column]):.4g}**.")

"""The folder of a run: whose it is, what it was made of, its patches, and its model card."""
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import toy
from .app import RANK0, WORLD, Fail, read_csv, read_json, save_text
from .data import make_split, read_dataset, read_split, subsample
from .weights import BUILT_IN, TensorFile

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None


# Of a run's arguments, those that are read without train.py's parser, by their types.
KINDS = {str: ("data", "sd15", "uni2h", "split"), int: ("size", "rank", "tokens", "epochs", "batch", "seed"),
         (int, float): ("alpha", "lr", "lr_ratio", "val_cfg"), (int, type(None)): ("limit", "max_steps", "val_samples")}


def settings_of(folder):
    """The arguments of the run of train.py in a folder, or None where there is none."""
    settings = read_json(Path(folder) / "config.json").get("args")
    if not isinstance(settings, dict):
        return None
    return settings if all(isinstance(settings.get(key, ()), kind) for kind, keys in KINDS.items() for key in keys) else None


def newest_run():
    """The folder under runs/ whose adapter was written last, or None."""
    found = sorted(Path("runs").glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def find(paths, run=None):
    """The paths; or, where none of them exists and the run (the newest by default) has all of them, those, and say so."""
    paths = [Path(os.path.expanduser(path)) for path in paths]
    run = run or newest_run()
    if run and not any(path.exists() or path.is_absolute() for path in paths):
        inside = [Path(run) / path for path in paths]
        if all(path.exists() for path in inside):
            if RANK0:
                print(f"using {', '.join(map(str, inside))}", file=sys.stderr)
            return inside
        if any(path.exists() for path in inside):
            raise Fail(f"{next(path for path, there in zip(paths, inside) if not there.exists())} is neither here nor in {run}")
    return paths


def split_of_run(folder, patches, how, started):
    """The split of a run: that of its split.json, or a new one by `make_split`, with which a split.json there must agree."""
    path = folder / "split.json"
    split = make_split(patches, how) if not started else None
    if path.exists():
        there = read_split(path, patches)
        if not started and there != split:
            raise Fail(f"{path} is there and is not the split that --split {how} asks for; to use it, pass --split {path}, else "
                       "remove it")
        return there
    if split is None:
        raise Fail(f"{path} of this run is gone; restore it, or pass another --run")
    return split


def patches_of(part, config, run_folder):
    """A part of a run's split -> [(Patch, path)] sorted by title; of train and val no more than the run's --limit has left."""
    if not (run_folder / "split.json").is_file() or not config.get("data"):
        raise Fail(f"{run_folder} holds no split.json; pass --ref")
    data = run_folder.parent / toy.DATA if config["data"] == toy.DATA else Path(config["data"])
    patches = {p.name: p for p in read_dataset(data)}
    names = read_split(run_folder / "split.json", list(patches.values()))[part]
    names = names if part == "test" else subsample(names, config.get("limit"))
    return sorted(((patches[n], data / n) for n in names), key=lambda pair: pair[0].title)


def public_name(source):
    """What an adapter's header and the model card say of a source: of an absolute path only its last part, all else as it is.

    The same of an argument --name=source. A folder that has the name of a built-in one does not pass for it.
    """
    flag, equals, value = source.partition("=") if source.startswith("--") else ("", "", source)
    name = (Path(value).name or value) if os.path.isabs(value) or value.startswith("~") else value
    return flag + equals + (f"./{name}" if name in BUILT_IN and name != value else name)


VALIDATION_STEPS = 30       # the paper's denoising steps

# Arguments that may be others when a run goes on.
MAY_CHANGE = {"run", "data", "sd15", "uni2h", "device", "no_compile", "inception", "parameters", "quiet"}


class Lock:
    """Keeps a folder from other processes while this object lives; fails where one of them has it.

    Windows has no flock, and so no lock.
    """

    def __init__(self, folder):
        self.handle = None          # where it cannot be opened
        self.handle = os.open(folder, os.O_RDONLY) if fcntl else None
        try:
            if fcntl:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fail(f"another process is at work in {folder}; wait for it, or pass another --run") from None
        except OSError:         # a file system without locks
            pass

    def __del__(self):
        if self.handle is not None:
            os.close(self.handle)


def check_or_create(folder, args, sha256):
    """Make sure that the run in this folder has the same settings, networks and images, or make it one of these.

    A run that has not saved an adapter yet gives way: its settings may have been the reason.
    """
    settings = {k: v for k, v in vars(args).items() if k != "resume"}
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise Fail(f"--run {folder} is a file; pass a folder")
    if path.exists() and settings_of(folder) is None:
        raise Fail(f"{path} is not of a run of train.py; pass another --run")
    if not path.exists() and any(p.name != "split.json" and not p.name.startswith(".") for p in folder.glob("*")):
        raise Fail(f"{folder} holds other files and no run of train.py; pass another --run")
    if not RANK0:
        return
    if not any(folder.glob("[!.]*.safetensors")):
        config = dict(args=settings, sha256=sha256, command=sys.argv, environment=environment())
        save_text(path, json.dumps(config, indent=1) + "\n")
        return
    there = read_json(path)
    if not all(isinstance(there.get(key), kind) for key, kind in dict(sha256=dict, command=list, environment=dict).items()):
        raise Fail(f"{path} is damaged; restore it, or pass another --run")
    same = [key for key in settings if key not in MAY_CHANGE]
    for was, now, keys in ((there["args"], settings, same), (there["sha256"], sha256, sha256)):
        for key in keys:
            if was.get(key) != now[key]:    # of the images nothing is known before they are cached
                a, b = ("none" if x is None else x for x in (was.get(key), now[key]))
                raise Fail(f"{folder} is a run with {key.replace('_', '-')} {a}, not {b}; pass another --run for a new one")


def environment():
    """What a run was made with: {name: version}; git: the program's commit, with a + where files of it are changed."""
    def git(*command):
        command = ["git", "-C", Path(__file__).parent, *command]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    found = dict(python=platform.python_version(), platform=platform.platform(), processes=WORLD)
    for name in ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    try:
        found["git"] = git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        found["git"] = None
    return found


def best_epoch(log):
    """The rows of a log.csv -> (the column by which the best adapter is chosen, the row with its lowest value)."""
    column = next((name for name in log[0] if name.startswith("fid") and any(row[name] for row in log)), "val_loss")
    return column, min((row for row in log if row[column]), key=lambda row: float(row[column]))


def model_card(folder):
    """The text for a run of train.py that has finished an epoch."""
    folder = Path(folder)
    config, split, log = read_json(folder / "config.json"), read_json(folder / "split.json"), read_csv(folder / "log.csv")
    args, environment = config["args"], config["environment"]
    column, best = best_epoch(log)
    sampling = f"guidance {args['val_cfg']:g}, {VALIDATION_STEPS} steps"
    what = {"val_loss": "noise prediction loss", "fid": f"FID (Inception, resize pytorch-fid, {sampling})",
            "fid_encoder": f"Fréchet distance of the encoder's features (no FID, comparable with nothing else; {sampling})"}
    n = len(subsample(subsample(split["val"], args["limit"]), None if column == "val_loss" else args["val_samples"]))
    adapters = (f"`adapter.safetensors`: LoRA of rank {args['rank']} (α {args['alpha']:g}) on Q, K, V and O, projector to "
                f"{args['tokens']} tokens, null embedding")
    tried = sum(bool(row[column]) for row in log)
    if (folder / "adapter-best.safetensors").exists():      # none before the first samples
        adapters += f"""; the last.
- `adapter-best.safetensors`: the same with the lowest {what[column]}
  on {n} validation patches: **{float(best[column]):.4g}**, epoch {best['epoch']} of {args['epochs']} ({tried} were measured)"""
    names = dict(base=public_name(args["sd15"]), encoder=public_name(args["uni2h"]))
    header = TensorFile(folder / "adapter.safetensors").header
    terms = dict(sd15="openrail-m", uni2h=header.get("encoder_licence", "cc-by-nc-nd-4.0"))
    terms = "-and-".join(name for key, name in terms.items() if args[key] not in BUILT_IN)
    terms = f"license: other\nlicense_name: {terms}" if terms else "license: mit"
    number = {part: sum(classes.values()) for part, classes in split["patches"].items()}
    of_class = {part: ", ".join(f"{k} {v}" for k, v in classes.items()) for part, classes in split["patches"].items()}
    counts = "\n".join(f"| {part} | {split['cases'][part]} | {number[part]} | {of_class[part]} |" for part in number)
    how = {"paper": "pooled, then split by case",
           "official": "the dataset's own test part, the validation part taken from the rest by case"}.get(
        args["split"], f"split as in `{Path(args['split']).name}`")
    limit = f" No more than {args['limit']} patches of train and of val are used." if args["limit"] else ""
    shared = f"cases in more than one part: {split.get('cases_in_several_parts', 'not counted')}"
    if sum(split["cases"].values()) == sum(number.values()):
        shared = "nothing tells which patches are of one case"
    rates = f"{args['lr']:g} (LoRA) and {args['lr'] * args['lr_ratio']:g} (projector)"
    report = folder / "report" / "report.md"
    return f"""---
base_model: {names['base']}
{terms}
pipeline_tag: image-to-image
tags: [lora, stable-diffusion, histopathology, synthetic-data]
---
# {folder.name}

Patches with the morphology of a reference patch: embeddings of the pathology encoder `{names['encoder']}` take the place
of the text condition of `{names['base']}`, through a projector and LoRA (Kuzmin and Berezsky 2026,
https://doi.org/10.15587/2706-5448.2026.355663).

- {adapters}.

## Use

    python sample.py --run THIS_FOLDER --ref patch.png --cfg 1.3        # in the program's folder

Research only: no diagnosis may rest on an image that was made up. An adapter can reproduce its training patches; look at
`python -m ldm.report` (memorisation) before you pass it on.

## Data

`{Path(args['data']).name}`, {args['size']} px; {how}; {shared}.{limit}

| part | cases | patches | classes |
|---|---|---|---|
{counts}

## Training

{log[-1]['step']} steps, to epoch {log[-1]['epoch']} of {args['epochs']}, batch {args['batch']}, seed {args['seed']},
learning rates {rates}; {log[-1]['minutes']} minutes.
Command: `{shlex.join(['python', *map(public_name, config['command'])])}`
Environment: {', '.join(f'{k} {v}' for k, v in environment.items() if v)}
Hashes (sha256) of the weights' tensors and of all image files: {', '.join(f'{k} {v[:16]}' for k, v in config['sha256'].items())}

## Licence

{header["licence"]}
""" + (f"\n{report.read_text(encoding='utf-8')}".replace("\n#", "\n##").replace("](", "](report/") if report.is_file() else "")

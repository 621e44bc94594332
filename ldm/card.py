"""The model card of a run, RUN/README.md: what it was made of, how good it is, on whose terms it may be used, and how.

Only what the run's own files say; the front matter is what the Hugging Face hub reads.
"""
import shlex
from pathlib import Path

from .files import read_csv, read_json
from .weights import BUILT_IN


def model_card(folder):
    """The text for a run of train.py that has finished an epoch."""
    folder = Path(folder)
    config, split, log = read_json(folder / "config.json"), read_json(folder / "split.json"), read_csv(folder / "log.csv")
    args, environment = config["args"], config["environment"]
    toy = args["sd15"] in BUILT_IN
    column = next((name for name in log[0] if name.startswith("fid") and any(row[name] for row in log)), "val_loss")
    best = min((row for row in log if row[column]), key=lambda row: float(row[column]))
    what = {"fid": f"FID (Inception, resize pytorch-fid, guidance {args['val_cfg']:g}, 30 steps)", "val_loss": "noise prediction loss",
            "fid_encoder": f"Fréchet distance of the encoder's features (no FID: comparable with nothing else; guidance {args['val_cfg']:g}, 30 steps)"}[column]
    n = min(len(split["val"]), *(args[key] for key in ("limit", "val_samples") if args[key] is not None and column != "val_loss"), 10 ** 9)
    counts = "\n".join(f"| {part} | {split['cases'][part]} | {sum(classes.values())} | {', '.join(f'{k} {v}' for k, v in classes.items())} |"
                       for part, classes in split["patches"].items())
    names = dict(base=args["sd15"] if not Path(args["sd15"]).exists() else Path(args["sd15"]).name,
                 encoder=args["uni2h"] if not Path(args["uni2h"]).exists() else Path(args["uni2h"]).name)
    report = folder / "report" / "report.md"
    return f"""---
base_model: {names['base']}
license: other
license_name: openrail-m-and-cc-by-nc-nd-4.0
pipeline_tag: image-to-image
tags: [lora, stable-diffusion, histopathology, synthetic-data]
---
# {folder.name}

Patches with the morphology of a reference patch: embeddings of the pathology encoder `{names['encoder']}` take the place of the text
condition of `{names['base']}`, through a projector and LoRA (Kuzmin and Berezsky 2026, https://doi.org/10.15587/2706-5448.2026.355663).

- `adapter-best.safetensors`: LoRA of rank {args['rank']} (α {args['alpha']:g}) on Q, K, V and O, projector to {args['tokens']} tokens, null embedding;
  the lowest {what} on {n} validation patches: **{float(best[column]):.4g}**, epoch {best['epoch']} of {args['epochs']}.
- `adapter.safetensors`: the last.

## Use

    python sample.py --adapter adapter-best.safetensors --ref patch.png --cfg 1.3

Research only: no diagnosis may rest on an image that was made up. An adapter can reproduce its training patches; look at
`python -m ldm.report` (memorisation) before you pass it on.

## Data

`{Path(args['data']).name}`, {args['size']} px, split by case:

| part | cases | patches | classes |
|---|---|---|---|
{counts}

## Training

{args['epochs']} epochs, batch {args['batch']}, learning rates {args['lr']:g} (LoRA) and {args['lr'] * args['lr_ratio']:g} (projector), seed {args['seed']}; {log[-1]['minutes']} minutes.
Command: `{shlex.join(['python', Path(config['command'][0]).name, *config['command'][1:]])}`
Environment: {', '.join(f'{k} {v}' for k, v in environment.items() if v)}
Weights (sha256 of the tensors): {', '.join(f'{k} {v[:16]}' for k, v in config['sha256'].items())}

## Licence

{"The toy base is part of the program (MIT)." if toy else "Stable Diffusion 1.5 is under CreativeML Open RAIL-M, whose use restrictions carry over to this file. UNI2-h is CC BY-NC-ND 4.0 and gated: non-commercial research only, under its terms."}
The terms of the training images apply as well.
""" + (f"\n{report.read_text(encoding='utf-8')}".replace("\n#", "\n##").replace("](", "](report/") if report.is_file() else "")

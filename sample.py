#!/usr/bin/env python3
"""New patches with the morphology of a reference (Algorithm 2).

    python sample.py --ref patch.png --cfg 1.3
    python sample.py --split val --cfg 1.0 1.3 1.5       # one sample per validation patch, three guidances
    python sample.py --split train --label adenoma --n 8  # eight per training patch of a rare class

Writes OUT/real/*.png (the references at the model's size), OUT/cfg1.3/*.png (the samples, named by reference,
seed and guidance) and OUT/sheet-cfg1.3.png. `python fid.py OUT/real OUT/cfg1.3` compares them.
"""
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.app import (RANK0, Fail, Parser, add_options, barrier, check_same, file_sha256, frozen_dtype,
                     join_processes, number, option, pick_device, progress, rank0_first, read_json,
                     run_program, save_json, shard)
from ldm.data import contact_sheet, list_images, load_rgb, resize_crop, save_image, subsample, to_images
from ldm.encoder import open_encoder
from ldm.runs import find, name_references, newest_run, patches_of, read_settings
from ldm.schedule import ddpm_step, timesteps
from ldm.weights import load_unet, load_vae, open_sd15
from lora import fold, load_adapter, open_adapter

COMPILE_FROM = 100          # images; compiling for fewer takes longer than it saves

@dataclass(frozen=True)
class Sampling:
    """How images are sampled. A new option is a field here and its use in `sample`.

    The rest follows: its argument, the PNG's text, the check that an --out holds samples of one kind.
    """
    cfg: float = option("how to sample", 1.3, "guidance scales w", metavar="W", nargs="+")
    steps: int = option("how to sample", 30, "denoising steps", low=1, high=999)

    @property
    def name(self):
        """The name of a folder of such samples: the guidance. An --out has one value of all else."""
        return f"cfg{repr(self.cfg).removesuffix('.0')}"

    def others(self):
        """{name: value} of what is not in the name."""
        return {name: value for name, value in asdict(self).items() if name != "cfg"}

# ---- Algorithm 2 -------------------------------------------------------------------------------------

def guide(eps_null, eps_c, w):
    """ε̃ = ε_θ(z_t, t, c_∅) + w (ε_θ(z_t, t, c) - ε_θ(z_t, t, c_∅))   (eq. 5)."""
    return eps_null + w * (eps_c - eps_null)

@torch.no_grad()
def sample(e, projector, unet, how, seeds, latent):
    """Algorithm 2: embeddings e (B, d_e), Sampling, a seed per image, latent (4, h, w) -> z_0 (B, 4, h, w).

    Each image has its own generator, on the CPU, for z_T and then the noise of every step: an image's noise
    does not depend on its batch (its rounding may). The state z is float32, whatever the U-Net is.
    """
    device = projector.null.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise():
        return torch.stack([torch.randn(latent, generator=g) for g in generators]).to(device)

    c = projector(e.to(device))                                                 # 2: project both, once
    c_null = projector(projector.null).expand_as(c)
    both = torch.cat([c_null, c])
    z = noise()                                                                 # 3: z_T
    ts = timesteps(how.steps)
    for t, previous in zip(ts, ts[1:] + [None]):                                # 4
        t_batch = torch.full((len(z),), t, device=device)
        if how.cfg == 1:                                                        # 5, without its null branch
            eps = unet(z, t_batch, c)
        else:
            eps_null, eps_c = unet(z.repeat(2, 1, 1, 1), t_batch.repeat(2), both).chunk(2)
            eps = guide(eps_null, eps_c, how.cfg)                               # 5
        z = ddpm_step(z, eps, noise(), t, previous)                             # 6
    return z                                                                    # 7: see `decode`

@torch.no_grad()
def decode(vae, z0):
    """z_0 (B, 4, h, w) -> PIL images; four at a time, to limit memory at 512 px."""
    device = next(vae.parameters()).device
    return [image for part in z0.split(4) for image in to_images(vae.decode(part.to(device)))]

def latent_shape(unet, vae, size):
    """(4, h, w) of images with this side in pixels."""
    multiple = vae.factor * 2 ** (len(unet.down_blocks) - 1)
    if size < multiple or size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise Fail(f"a size of {size} px must be a multiple of {multiple} for this base; the nearest is "
                   f"{nearest}")
    return unet.latent, size // vae.factor, size // vae.factor

# ---- images ------------------------------------------------------------------------------------------

class Model(NamedTuple):
    """What images are made with. full_batches: fill up the last batch, for a compiled U-Net."""
    unet: nn.Module
    projector: nn.Module
    vae: nn.Module
    latent: tuple
    batch: int
    full_batches: bool

class Job(NamedTuple):
    """An image to make: its file, the name of its reference, its seed and how to sample it."""
    path: Path
    reference: str
    seed: int
    how: Sampling

def make_images(model, jobs, e):
    """Sample and write an image for each of the jobs; e[reference]: embedding (d_e,) of a reference.

    A batch has one Sampling. Several processes share whole batches: in another batch an image may round
    differently. PNGs are written while the next batch is computed.
    """
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.how)]
    parts = shard([group[i:i + model.batch] for group in groups for i in range(0, len(group), model.batch)])
    written, total = [], sum(map(len, parts))
    with (progress(total=total, desc="sampling", unit="image", leave=False) as bar,
          ThreadPoolExecutor(1) as writer):
        for part in parts:
            batch = (part * model.batch)[:model.batch] if model.full_batches else part
            z0 = sample(torch.stack([e[job.reference] for job in batch]), model.projector, model.unet,
                        part[0].how, [job.seed for job in batch], model.latent)
            images = decode(model.vae, z0[:len(part)])
            for future in written:
                future.result()         # raises what went wrong
            written = [writer.submit(save_image, job.path, image, reference=job.reference, seed=job.seed,
                                     **asdict(job.how)) for job, image in zip(part, images)]
            bar.update(len(part))
        for future in written:
            future.result()
    barrier()

class ValidationSamples:
    """One sample of each validation image, image i with seed i: real/, fake/ and grids/ of a run of train.py.

    real/ holds the images at the model's size, fake/ the best adapter's samples: fid.py gives their logged
    distance.
    """
    GRID = 8            # pairs of reference and sample in the picture of an epoch

    def __init__(self, folder, references, size, how, rewrite):
        """references: {title: path}. rewrite: write the images of real/ although they exist."""
        self.folder, self.how = folder, how
        self.real, self.fake, self.made = ({title: folder / part / f"{title}.png" for title in references}
                                           for part in ("real", "fake", ".fake"))
        if RANK0:
            for title, path in references.items():
                if rewrite or not self.real[title].exists():
                    save_image(self.real[title], resize_crop(load_rgb(path), size), reference=title)
            if references:
                save_image(folder / "patch.png", load_rgb(next(iter(self.real.values()))))
        barrier()

    def make(self, model, embeddings, epoch):
        """Sample all from embeddings (n, d_e) of the images, write the epoch's grid -> their files."""
        jobs = [Job(path, title, i, self.how) for i, (title, path) in enumerate(self.made.items())]
        make_images(model, jobs, dict(zip(self.made, embeddings)))
        if RANK0:
            pairs = subsample(list(zip(self.real.values(), self.made.values())), self.GRID)
            grid = contact_sheet([[load_rgb(path) for path in pair] for pair in pairs])
            save_image(self.folder / "grids" / f"epoch{epoch:02d}.png", grid)
        return list(self.made.values())

    def finish(self, best):
        """Make the newest samples those of fake/ if they are the best; else remove them."""
        if RANK0:
            for made, path in zip(self.made.values(), self.fake.values()) if best else ():
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(made, path)
            shutil.rmtree(self.folder / ".fake", ignore_errors=True)

# ---- the program -------------------------------------------------------------------------------------

def parse_args():
    """-> (arguments, a Sampling for each guidance)."""
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to sample")
    what.add_argument("--ref", nargs="+", metavar="PATH",
                      help="reference patches: images, or folders of images; also searched for in the run")
    what.add_argument("--split", choices=("train", "val", "test"), help="or every patch of this part")
    what.add_argument("--label", nargs="+", metavar="CLASS", help="of --split, only patches of these classes")
    what.add_argument("--limit", type=number(int, 1), metavar="N", help="of --split, N patches at most")
    what.add_argument("--n", type=number(int, 1), default=1, help="samples per reference")
    what.add_argument("--seed", type=number(int, 0, 2 ** 62), default=0,
                      help="image i uses seed + i, in the order of references; of --split, of the whole part")
    add_options(parser, Sampling)
    model = parser.add_argument_group("with which model")
    model.add_argument("--run", metavar="DIR", help="a run, its best adapter (default: the newest in runs/)")
    model.add_argument("--adapter", metavar="FILE", help="or an adapter file")
    model.add_argument("--sd15", metavar="PATH", help="Stable Diffusion 1.5 (default: the one trained with)")
    model.add_argument("--uni2h", metavar="PATH", help="UNI2-h (default: the one trained with)")
    model.add_argument("--other-base", action="store_true", help="accept another base than the adapter's")
    run = parser.add_argument_group("run")
    run.add_argument("--batch", type=number(int, 1), default=16, help="images at a time (changes rounding)")
    run.add_argument("--out", metavar="DIR",
                     help="default: samples/stepN[-SPLIT] beside the adapter, which was trained for N steps")
    run.add_argument("--no-compile", action="store_true",
                     help=f"do not torch.compile the U-Net (compiled on CUDA, from {COMPILE_FROM} images on)")
    run.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    if bool(args.ref) == bool(args.split):
        raise Fail("pass either --ref with images or folders, or --split with a part of the run's split")
    if args.ref and (args.label or args.limit):
        raise Fail("--label and --limit choose among the patches of --split; with --ref, name the images")
    given = {f.name: getattr(args, f.name) for f in fields(Sampling) if hasattr(args, f.name)}
    return args, [Sampling(**given | {"cfg": w}) for w in dict.fromkeys(given.get("cfg", [Sampling.cfg]))]

def main():
    args, hows = parse_args()
    device = pick_device(args.device)
    join_processes(device)
    adapter = find_adapter(args.run, args.adapter)
    folder = adapter.path.parent
    settings, size = read_settings(folder), int(adapter.header["resolution"])
    found, chosen = find_references(args, settings, folder)
    unet_file, vae_file, encoder = open_files(args, settings, adapter)
    part = f"-{args.split}" if args.split else ""
    out = Path(args.out) if args.out else folder / "samples" / f"step{int(adapter.header['step']):06d}{part}"
    guard = dict(adapter_sha256=file_sha256(adapter.path), base_sha256=unet_file.fingerprint(),
                 vae_sha256=vae_file.fingerprint(), resolution=size, **hows[0].others())
    saved = read_json(out / "samples.json")
    before = Sampling().others() | saved                    # an option that it lacks had its default
    if saved and (other := [key for key, value in guard.items() if before.get(key) != value]):
        raise Fail(f"{out} holds samples with another {other[0].removesuffix('_sha256')}; pass another --out")
    names, known = name_references(found, saved.get("references", {}))
    check_same("weights or references", [guard, known])
    references = {name: path for i, (name, path) in enumerate(names.items()) if i in chosen}
    jobs = [Job(out / how.name / f"{name}_seed{seed}_{how.name}.png", name, seed, how)
            for how in hows for i, name in enumerate(names) if i in chosen
            for seed in range(args.seed + i * args.n, args.seed + (i + 1) * args.n)]
    todo = [job for job in jobs if not job.path.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} images exist already")
    if todo:
        # all references are read before anything is written, so that an unreadable one is found first
        paths = {job.reference: references[job.reference] for job in todo}
        e = torch.from_numpy(encoder.extract(list(paths.values()), device, args.batch)).float()
        compiled = device.type == "cuda" and len(todo) >= COMPILE_FROM and not args.no_compile
        model = load_model(unet_file, vae_file, adapter, device, args.batch, compiled)
        if RANK0:
            save_json(out / "samples.json", guard | {"references": known})
        make_images(model, todo, dict(zip(paths, e)))
    if RANK0:
        write_sheets(out, references, jobs, hows, size)
        print(summary(out, references, jobs, hows))

def find_adapter(run, path):
    """--run and --adapter -> the open adapter: the one named, or the best (else the last) of the run."""
    if path is None:
        run = run or newest_run()
        if run is None:
            raise Fail("there is no run under runs/; train one with `python train.py`, or pass --adapter")
        names = [Path(run) / name for name in ("adapter-best.safetensors", "adapter.safetensors")]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            raise Fail(f"--run {run} contains no adapter.safetensors; pass a folder that train.py made")
    return open_adapter(path)

def find_references(args, settings, folder):
    """--ref or --split -> [(name of the reference, path)], and the indices of those to sample."""
    if args.split:
        found = patches_of(args.split, settings, folder)
        labels = {patch.label for patch, _ in found}
        if unknown := set(args.label or ()) - labels:
            classes = ", ".join(sorted(labels)) or "none"
            raise Fail(f"--label {min(unknown)}: the classes of this part are {classes}")
        wanted = [i for i, (patch, _) in enumerate(found) if patch.label in (args.label or labels)]
        if not wanted:
            raise Fail(f"--split {args.split}: that part of {folder / 'split.json'} is empty")
        return [(patch.title, path) for patch, path in found], set(subsample(wanted, args.limit))
    found = []
    for path in find(args.ref, folder):
        if not path.exists():
            raise Fail(f"--ref {path}: no such file or folder")
        below = list_images(path) if path.is_dir() else [path]
        if not below:
            raise Fail(f"--ref {path}: the folder contains no images")
        base = path if path.is_dir() else path.parent
        found += [(p.relative_to(base).with_suffix("").as_posix(), p) for p in below]
    return found, set(range(len(found)))

def open_files(args, settings, adapter):
    """-> U-Net and VAE (TensorFiles) and the Encoder. Fails if the adapter was trained with others."""
    header = adapter.header
    with rank0_first():             # it downloads what is missing
        unet_file, vae_file = open_sd15(args.sd15 or (settings.sd15 if settings else header["base"]))
        encoder = open_encoder(args.uni2h or (settings.uni2h if settings else header["encoder"]))
    for file, key in ((unet_file, "base_sha256"), (vae_file, "vae_sha256")):
        if not args.other_base and file.fingerprint() != header[key]:
            raise Fail(f"{file.path} is of another base than the one {adapter.path} was trained on "
                       f"({header['base']}); pass that one with --sd15, or --other-base to use this one")
    if encoder.fingerprint() != header["encoder_sha256"]:
        raise Fail(f"{encoder.file.path} is not the encoder that the adapter was trained with "
                   f"({header['encoder']}); pass that one with --uni2h")
    return unet_file, vae_file, encoder

def load_model(unet_file, vae_file, adapter, device, batch, compiled):
    """-> Model. The LoRA is merged in float32, then the U-Net is cast; the projector is float32."""
    unet, vae = load_unet(unet_file, device), load_vae(vae_file, device)
    latent = latent_shape(unet, vae, int(adapter.header["resolution"]))
    projector = load_adapter(adapter, unet)
    unet = fold(unet).to(frozen_dtype(device))
    if compiled:
        unet = torch.compile(unet, dynamic=False)
    return Model(unet, projector, vae, latent, batch, full_batches=compiled)

def write_sheets(out, references, jobs, hows, size):
    """Write real/, and a contact sheet per guidance: up to 32 references, each with up to seven samples."""
    real = {name: out / "real" / f"{name}.png" for name in references}
    for name, path in real.items():
        if not path.exists():
            save_image(path, resize_crop(load_rgb(references[name]), size))
    for how in hows:
        rows = [(real[name], *[job.path for job in jobs if (job.reference, job.how) == (name, how)][:7])
                for name in list(references)[::max(1, len(references) // 32)][:32]]
        sheet = contact_sheet([[load_rgb(path) for path in row] for row in rows])
        save_image(out / f"sheet-{how.name}.png", sheet)

def summary(out, references, jobs, hows):
    """What was made and the command that compares it; a note for each folder that holds other images too."""
    lines = []
    for name, n in [("real", len(references))] + [(how.name, len(jobs) // len(hows)) for how in hows]:
        if others := len(list_images(out / name)) - n:
            lines.append(f"note: {out / name} holds {others} more images, of earlier calls")
    images, name = "image" if len(jobs) == 1 else "images", hows[0].name
    lines.append(f"{len(jobs)} {images} in {out}; contact sheet {out}/sheet-{name}.png.")
    if len(references) > 1:
        lines[-1] += f" To compare: python fid.py {out}/real {out}/{name} --per-class"
    return "\n".join(lines)

if __name__ == "__main__":
    run_program(main)

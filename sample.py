#!/usr/bin/env python3
"""New patches with the morphology of a reference (Algorithm 2).

    python sample.py --ref patch.png --cfg 1.3
    python sample.py --split val --cfg 1.0 1.3 1.5        # one sample for every validation patch, at three guidances
    python sample.py --split train --label adenoma --n 8  # eight for every training patch of a rare class

Writes OUT/real/*.png (the references at the model's size), OUT/cfg1.3/*.png (the samples, named by reference, seed and
guidance) and OUT/sheet-cfg1.3.png. `python fid.py OUT/real OUT/cfg1.3` compares them.
"""
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.app import (
    RANK0,
    Fail,
    Parser,
    atomic_write,
    barrier,
    check_same,
    frozen_dtype,
    join_processes,
    number,
    pick_device,
    progress,
    rank0_first,
    read_json,
    run_program,
    safe_name,
    save_text,
    shard,
)
from ldm.data import contact_sheet, list_images, load_rgb, resize_crop, subsample, to_images
from ldm.encoder import open_encoder
from ldm.runs import find, newest_run, patches_of, settings_of
from ldm.schedule import ddpm_step, timesteps
from ldm.weights import file_sha256, load_unet, load_vae, open_sd15
from lora import fold, load_adapter, open_adapter

COMPILE_FROM = 100          # images, below which to compile takes longer than it saves


@torch.no_grad()
def sample(e, projector, unet, w, steps, seeds, latent):
    """Algorithm 2: embeddings e (B, d_e), guidance w, one seed per image, latent shape (4, h, w) -> z_0 (B, 4, h, w).

    Each image has a generator of its own, on the CPU, which draws z_T and then the noise of every step: the image does not
    depend on the batch that it is made in. The state is float32, whatever the U-Net is.
    """
    device = projector.null.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise():
        return torch.stack([torch.randn(latent, generator=g) for g in generators]).to(device)

    c = projector(e.to(device))                                                 # 2: project both embeddings once
    c_null = projector(projector.null).expand_as(c)
    both = torch.cat([c_null, c])
    z = noise()                                                                 # 3: z_T
    ts = timesteps(steps)
    for t, previous in zip(ts, ts[1:] + [None]):                                # 4
        t_batch = torch.full((len(z),), t, device=device)
        if w == 1:
            eps = unet(z, t_batch, c)
        else:
            eps_null, eps_c = unet(z.repeat(2, 1, 1, 1), t_batch.repeat(2), both).chunk(2)
            eps = guide(eps_null, eps_c, w)                                     # 5
        z = ddpm_step(z, eps, noise(), t, previous)                             # 6
    return z                                                                    # 7: `decode` turns z_0 into images


def latent_shape(unet, vae, size):
    """(4, h, w) of images with this side in pixels."""
    multiple = vae.factor * 2 ** (len(unet.down_blocks) - 1)
    if size < multiple or size % multiple:
        raise Fail(f"a size of {size} px must be a multiple of {multiple} for this base; the nearest is "
                   f"{max(1, round(size / multiple)) * multiple}")
    return unet.latent, size // vae.factor, size // vae.factor


def guide(eps_null, eps_c, w):
    """ε̃ = ε_θ(z_t, t, c_∅) + w (ε_θ(z_t, t, c) - ε_θ(z_t, t, c_∅))   (eq. 5)."""
    return eps_null + w * (eps_c - eps_null)


@torch.no_grad()
def decode(vae, z0):
    """z_0 (B, 4, h, w) -> PIL images; four at a time, to stay small at 512 px."""
    device = next(vae.parameters()).device
    return [image for part in z0.split(4) for image in to_images(vae.decode(part.to(device)))]


class Job(NamedTuple):
    """An image to make: its file, the name of its reference, guidance and seed."""
    path: Path
    reference: str
    w: float
    seed: int


def make_images(jobs, e, unet, projector, vae, steps, latent, batch, fill=False):
    """Sample and write an image for each of the jobs; e[reference]: embedding (d_e,) of a reference.

    Batches have one guidance each; where fill, as many images each, for a compiled U-Net. Several processes share the batches
    as they are: in another one an image may round differently. PNGs are written while the next batch is made.
    """
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.w)]
    parts = shard([group[i:i + batch] for group in groups for i in range(0, len(group), batch)])
    with progress(total=sum(map(len, parts)), desc="sampling", unit="image", leave=False) as bar, ThreadPoolExecutor(1) as writer:
        written = []
        for part in parts:
            filled = (part * batch)[:batch] if fill else part
            z0 = sample(torch.stack([e[job.reference] for job in filled]), projector, unet, part[0].w, steps,
                        [job.seed for job in filled], latent)
            images = decode(vae, z0[:len(part)])
            for future in written:
                future.result()         # raises what went wrong
            written = [writer.submit(save_image, job.path, image, reference=job.reference, cfg=job.w, seed=job.seed, steps=steps)
                       for job, image in zip(part, images)]
            bar.update(len(part))
        for future in written:
            future.result()
    barrier()


def is_sample_of(path, reference):
    """Whether a file is a PNG that `save_image` wrote for this reference."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.text.get("reference") == reference
    except Exception:       # whatever Pillow makes of a damaged file
        return False


def save_image(path, image, **text):
    """Write a PNG, whole or not at all, with what made it as text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with atomic_write(path) as temporary:
        image.save(temporary, pnginfo=info)


# ---- the program ---------------------------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__, prints_results=False)
    what = parser.add_argument_group("what to sample")
    what.add_argument("--ref", nargs="+", metavar="PATH",
                      help="reference patches: images, or folders of images; also looked for in the run")
    what.add_argument("--split", choices=("train", "val", "test"), help="or every patch of this part of the run's split")
    what.add_argument("--label", nargs="+", metavar="CLASS", help="of --split, only patches of these classes")
    what.add_argument("--limit", type=number(int, 1), metavar="N", help="of --split, at most N patches, spread evenly over them")
    what.add_argument("--cfg", nargs="+", type=number(float, 0), default=[1.3], metavar="W",
                      help="guidance scales (default: 1.3)")
    what.add_argument("--n", type=number(int, 1), default=1, help="samples per reference")
    what.add_argument("--steps", type=number(int, 1, 999), default=30, help="denoising steps")
    what.add_argument("--seed", type=number(int, 0, 2 ** 62), default=0,
                      help="image i uses seed + i, in the order of references; of --split, of the whole part")
    model = parser.add_argument_group("with which model")
    model.add_argument("--run", metavar="DIR",
                       help="a run of train.py (default: the newest under runs/); its best adapter is used")
    model.add_argument("--adapter", metavar="FILE", help="or an adapter file")
    model.add_argument("--sd15", metavar="PATH", help="Stable Diffusion 1.5 (default: the one trained with)")
    model.add_argument("--uni2h", metavar="PATH", help="UNI2-h (default: the one trained with)")
    model.add_argument("--other-base", action="store_true", help="accept a base other than the adapter's, say a float16 copy")
    how = parser.add_argument_group("how")
    how.add_argument("--batch", type=number(int, 1), default=16, help="images at a time; changes them by rounding at most")
    how.add_argument("--out", metavar="DIR",
                     help="default: samples/stepN[-SPLIT] beside the adapter, N the step it was trained to")
    how.add_argument("--no-compile", action="store_true",
                     help=f"do not torch.compile the U-Net (it is done on CUDA, from {COMPILE_FROM} images on)")
    how.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args()
    if bool(args.ref) == bool(args.split):
        raise Fail("pass either --ref with images or folders, or --split with a part of the run's split")
    if args.ref and (args.label or args.limit):
        raise Fail("--label and --limit choose among the patches of --split; with --ref, name the images themselves")
    device = pick_device(args.device)
    join_processes(device)
    adapter = find_adapter(args.run, args.adapter)
    header, config = adapter.header, settings_of(adapter.path.parent) or {}
    size = int(header["resolution"])
    found, chosen = find_references(args, config, adapter.path.parent)
    with rank0_first():          # which downloads what is missing
        unet_file, vae_file = open_sd15(args.sd15 or config.get("sd15") or header["base"])
        encoder = open_encoder(args.uni2h or config.get("uni2h") or header["encoder"])
    base = refuse_others(adapter, unet_file, vae_file, encoder, args.other_base)
    part = f"-{args.split}" if args.split else ""
    out = Path(args.out) if args.out else adapter.path.parent / "samples" / f"step{int(header['step']):06d}{part}"
    settings = {"adapter_sha256": file_sha256(adapter.path), **base, "steps": args.steps, "resolution": size}
    there = read_json(out / "samples.json")
    if there and {key: there.get(key) for key in settings} != settings:
        raise Fail(f"{out} holds samples of another adapter, base, size or number of steps; pass another --out")
    references, known = name_references(found, there.get("references", {}))
    check_same("weights or references", [settings, known])
    place = {r: i for i, r in enumerate(references) if i in chosen}
    references = {r: references[r] for r in place}
    folder_of = {w: out / folder_name(w) for w in args.cfg}
    jobs = [Job(folder / f"{r}_seed{seed}_{folder.name}.png", r, w, seed) for w, folder in folder_of.items()
            for r, i in place.items() for seed in range(args.seed + i * args.n, args.seed + (i + 1) * args.n)]
    real = {r: out / "real" / f"{r}.png" for r in references}
    todo = [job for job in jobs if not job.path.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} images are there already")
    if todo:
        # all references are read before anything is written, so that a bad one is found first
        paths = {job.reference: references[job.reference] for job in todo}
        e = torch.from_numpy(encoder.extract(list(paths.values()), device, args.batch)).float()
        e = dict(zip(paths, e))
        unet, projector = load_model(unet_file, adapter, device)
        vae = load_vae(vae_file, device)
        latent = latent_shape(unet, vae, size)
        if RANK0:
            save_text(out / "samples.json", json.dumps(settings | {"references": known}, indent=1, ensure_ascii=False) + "\n")
        worth = device.type == "cuda" and len(todo) >= COMPILE_FROM and not args.no_compile
        network = torch.compile(unet, dynamic=False) if worth else unet
        make_images(todo, e, network, projector, vae, args.steps, latent, args.batch, fill=worth)
    if not RANK0:
        return
    for r in references:
        if not real[r].exists():
            save_image(real[r], resize_crop(load_rgb(references[r]), size))
    for w, folder in folder_of.items():
        shown = list(references)[::max(1, len(references) // 32)][:32]      # and of each reference seven samples at most
        rows = [(real[r], *[job.path for job in jobs if (job.reference, job.w) == (r, w)][:7]) for r in shown]
        sheet = contact_sheet([[load_rgb(path) for path in row] for row in rows])
        save_image(out / f"sheet-{folder.name}.png", sheet)
    first = folder_of[args.cfg[0]]
    for folder, n in ((out / "real", len(references)), *((folder, len(references) * args.n) for folder in folder_of.values())):
        if others := len(list_images(folder)) - n:
            print(f"note: {folder} holds {others} more images, of earlier calls")
    compare = f" To compare: python fid.py {out / 'real'} {first} --per-class" if len(references) > 1 else ""
    print(f"{len(jobs)} image{'s' * (len(jobs) > 1)} in {out}; contact sheet {out / f'sheet-{first.name}.png'}.{compare}")


def folder_name(w):
    """The folder, below OUT, of the samples at a guidance."""
    return f"cfg{repr(w).removesuffix('.0')}"


def find_adapter(run_folder, path):
    """--run and --adapter -> the open adapter: the one named, or the best (else the last) of the run, or of the newest run."""
    if path is None:
        if run_folder is None:
            run_folder = newest_run()
            if run_folder is None:
                raise Fail("there is no run under runs/; train one first with `python train.py`, or pass --adapter")
        names = [Path(run_folder) / name for name in ("adapter-best.safetensors", "adapter.safetensors")]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            raise Fail(f"--run {run_folder} holds no adapter.safetensors; pass a folder that train.py made")
    return open_adapter(path)


def find_references(args, config, run_folder):
    """--ref or --split -> [(name of the reference, with its class's folder, path)], and the places of those to sample."""
    if args.split:
        found = patches_of(args.split, config, run_folder)
        labels = {patch.label for patch, _ in found}
        if unknown := set(args.label or ()) - labels:
            raise Fail(f"--label {min(unknown)}: the classes of this part are {', '.join(sorted(labels)) or 'none'}")
        chosen = subsample([i for i, (patch, _) in enumerate(found) if patch.label in (args.label or labels)], args.limit)
        if not chosen:
            raise Fail(f"--split {args.split}: that part of {run_folder / 'split.json'} is empty")
        return [(patch.title, path) for patch, path in found], set(chosen)
    found = []
    for path in find(args.ref, run_folder):
        below = list_images(path) if path.is_dir() else [path]
        if not below:
            raise Fail(f"--ref {path}: the folder holds no images")
        if not path.exists():
            raise Fail(f"--ref {path}: no such file or folder")
        found += [((p.relative_to(path) if path.is_dir() else Path(p.name)).with_suffix("").as_posix(), p) for p in below]
    return found, set(range(len(found)))


def name_references(found, known):
    """[(name, path)] -> {unique name: path}, and `known` with them: {name: sha256 of the file}.

    A name is never given to two images, here or in an earlier call that left `known` behind: the second one gets "-2".
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


def refuse_others(adapter, unet_file, vae_file, encoder, other_base):
    """Fail if these are not the base (unless other_base) and the encoder that the adapter was trained with.

    Returns the hashes of U-Net and VAE, under the names that they have in the header.
    """
    header = adapter.header
    base = {"base_sha256": unet_file.fingerprint(), "vae_sha256": vae_file.fingerprint()}
    for file, key in zip((unet_file, vae_file), base):
        if not other_base and base[key] != header[key]:
            raise Fail(f"{file.path} is of another base than the one {adapter.path} was trained on ({header['base']}); "
                       "pass that one with --sd15, or --other-base to use this one all the same")
    if encoder.fingerprint() != header["encoder_sha256"]:
        raise Fail(f"{encoder.path} is not the encoder that the adapter was trained with ({header['encoder']}); "
                   "pass that one with --uni2h")
    return base


def load_model(unet_file, adapter, device):
    """-> (U-Net with the LoRA merged in float32 and then cast, projector in float32), on the device."""
    unet = load_unet(unet_file, device)
    projector = load_adapter(adapter, unet)
    fold(unet)
    return unet.to(frozen_dtype(device)), projector


if __name__ == "__main__":
    run_program(main)

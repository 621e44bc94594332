"""New patches with the morphology of a reference (Algorithm 2).

    python sample.py --ref patch.png --cfg 1.3
    python sample.py --split val --cfg 1.0 1.3 1.5       # one sample per validation patch, three guidances

Writes OUT/real/*.png (the references at the model's size), OUT/cfg1.3/*.png (the samples), OUT/labels.csv (a
row for each) and OUT/sheet-cfg1.3.png. `python fid.py OUT/real OUT/cfg1.3` compares them."""
import hashlib
import itertools
import re
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ldm.app import (DTYPES, MAX_SEED, RANK0, Fail, Parser, add_options, barrier, check_same, command_line,
                     file_sha256, foreign_file, frozen_dtype, join_processes, layout, number, option,
                     pick_device, progress, rank0_first, read_json, run_program, safe_name, save_csv,
                     save_json, shard)
from ldm.data import (is_output, list_images, load_rgb, resize_crop, save_image, save_sheet, subsample,
                      to_images)
from ldm.encoder import open_encoder
from ldm.runs import Lock, find, name_references, newest_run, patches_of, read_settings
from ldm.schedule import ddpm_step, timesteps
from ldm.weights import TensorFile, load_unet, load_vae, open_sd15
from lora import fold, load_adapter, load_projector, open_adapter

COMPILE_FROM = 100          # images; compiling for fewer takes longer than it saves
STORED = ".npy, .npz, .pt, .pth, .bin or .safetensors"

@dataclass(frozen=True)
class Sampling:
    """How images are sampled; also the program's arguments, the PNG's text, and the kind of an --out."""
    cfg: float = option("how to sample", 1.3, "guidance scales w", metavar="W", nargs="+")
    steps: int = option("how to sample", 30, "denoising steps (334-375, 501-750 begin late)", low=1, high=999)

    @property
    def name(self):
        """The name of a folder of such samples: the guidance. An --out has one value of all else."""
        return f"cfg{repr(self.cfg).removesuffix('.0')}"

# ---- Algorithm 2 -------------------------------------------------------------------------------------
def guide(eps_null, eps_c, w):
    """ε̃ = ε_θ(z_t, t, c_∅) + w (ε_θ(z_t, t, c) - ε_θ(z_t, t, c_∅))   (eq. 5)."""
    return eps_null + w * (eps_c - eps_null)

@torch.no_grad()
def sample(e, projector, unet, sampling, seeds, z_shape):
    """Algorithm 2: embeddings e (B, d_e) of references (line 1), Sampling, seeds, z_shape (4, h, w) -> z_0.
    An image's noise does not depend on its batch (its rounding may). z is float32, whatever the U-Net is."""
    device = projector.null.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.stack([torch.randn(z_shape, generator=g) for g in generators])
                         for _ in range(sampling.steps + 1)])
    noise = noise.pin_memory() if device.type == "cuda" else noise
    c = projector(e.to(device))                                                 # 2: project both, once
    c_null = projector(projector.null).expand_as(c)
    both = torch.cat([c_null, c])
    z = noise[0].to(device)                                                     # 3: z_T
    ts = timesteps(sampling.steps)
    for t, previous, noise_t in zip(ts, ts[1:] + [None], noise[1:]):            # 4
        t_batch = torch.full((len(z),), t, device=device)
        if sampling.cfg == 1:                                                   # 5, without its null branch
            eps = unet(z, t_batch, c)
        else:
            eps_null, eps_c = unet(z.repeat(2, 1, 1, 1), t_batch.repeat(2), both).chunk(2)
            eps = guide(eps_null, eps_c, sampling.cfg)                          # 5
        z = ddpm_step(z, eps, noise_t.to(device, non_blocking=True), t, previous)       # 6
    return z                                                                    # 7: by VAE.decode

def latent_shape(unet, vae, size):
    """(4, h, w) of images with this side in pixels."""
    multiple = vae.factor * 2 ** (len(unet.down_blocks) - 1)
    if size % multiple:
        raise Fail(f"a size of {size} px must be a multiple of {multiple} for this base; pass another")
    return unet.latent, size // vae.factor, size // vae.factor

# ---- images ------------------------------------------------------------------------------------------
# What images are made with, `batch` at a time. full_batches: fill up the last one, for a compiled U-Net.
# adapter: its sha256, for provenance.
Model = namedtuple("Model", "unet projector vae z_shape batch full_batches adapter")
# An image to make: its file, the name of its reference, its seed and its Sampling.
Job = namedtuple("Job", "path reference seed sampling")

def make_images(model, jobs, e):
    """Sample and write an image for each of the jobs; e[reference]: embedding (d_e,) of a reference.
    Several processes share whole batches, each of one Sampling: in another batch an image may round
    differently. PNGs are written while the next batch is computed. Fails where an image is not finite."""
    def write(job, image):
        save_image(job.path, image, reference=job.reference, seed=job.seed, **asdict(job.sampling),
                   adapter=model.adapter)
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.sampling)]
    parts = shard([group[i:i + model.batch] for group in groups for i in range(0, len(group), model.batch)])
    written, total = (), sum(map(len, parts))
    with (progress(total=total, desc="sampling", unit="image", leave=False) as bar,
          ThreadPoolExecutor(1) as writer):
        for part in parts:
            batch = (part * model.batch)[:model.batch] if model.full_batches else part
            z0 = sample(torch.stack([e[job.reference] for job in batch]), model.projector, model.unet,
                        part[0].sampling, [job.seed for job in batch], model.z_shape)
            x = model.vae.decode(z0[:len(part)])
            list(written)               # raises what went wrong
            if not x.isfinite().all():
                raise Fail(f"{part[0].path} or one of its batch is not finite; check adapter and weights")
            written = writer.map(write, part, to_images(x))
            bar.update(len(part))
        list(written)
    barrier()

def write_real(folder, sources, size):
    """Write {name: source}, the references that are missing, at the model's size -> {name: file}."""
    files = {name: folder / f"{name}.png" for name in sources}
    for name, path in files.items() if RANK0 else ():
        if not path.exists():
            save_image(path, resize_crop(load_rgb(sources[name]), size), reference=name)
    return files

# ---- the program -------------------------------------------------------------------------------------
def parse_args(arguments=None):
    """The command line -> (arguments, a Sampling for each guidance)."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to sample")
    source, add = add.add_mutually_exclusive_group(required=True).add_argument, add.add_argument
    source("--ref", nargs="+", metavar="PATH", help="images or folders of them; also looked for in the run")
    source("--split", choices=("train", "val", "test"), help="or every patch of this part of the run's split")
    source("--embedding", type=Path, metavar="FILE", help=f"or embeddings (n, d) of its encoder: {STORED}")
    add("--label", nargs="+", metavar="CLASS", help="of --split, only patches of these classes")
    add("--limit", type=number(int, 1), metavar="N", help="of --split, N patches at most")
    add("--n", type=number(int, 1), default=1, help="samples per reference (default: 1)")
    add("--balance", action="store_true", help="of --split train: fill each class up to the largest")
    add("--seed", type=number(int, 0, MAX_SEED), default=0, help="image i of all has SEED + i (default: 0)")
    add_options(parser, Sampling)
    add = parser.add_argument_group("with which model")
    model, add = add.add_mutually_exclusive_group().add_argument, add.add_argument
    model("--run", metavar="DIR", help="a run, its best adapter (default: the newest in runs/)")
    model("--adapter", metavar="FILE", help="or an adapter file")
    add("--sd15", metavar="PATH", help="Stable Diffusion 1.5 (default: the one trained with)")
    add("--vae", metavar="PATH", help="another VAE (default: the one trained with)")
    add("--uni2h", metavar="PATH", help="the encoder's weights (default: those trained with)")
    add("--other-base", action="store_true", help="accept another base than the adapter's")
    add = parser.add_argument_group("run").add_argument
    add("--batch", type=number(int, 1), default=16, help="images at a time (default: 16; changes rounding)")
    add("--out", type=Path, metavar="DIR", help="default: samples/stepN[-KIND] beside the adapter")
    add("--dtype", choices=DTYPES, default="auto", help="of the U-Net (changes rounding)")
    add("--no-compile", action="store_true", help=f"no torch.compile (on CUDA from {COMPILE_FROM} images)")
    add("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args(arguments)
    if not args.split and (args.label or args.limit or args.balance):
        raise Fail("--label, --limit and --balance choose among the patches of --split, not of --ref")
    if args.balance and (args.split != "train" or args.n > 1 or args.limit):
        raise Fail("--balance fills up the classes of --split train, without --n or --limit")
    given = {f.name: getattr(args, f.name) for f in fields(Sampling) if hasattr(args, f.name)}
    return args, [Sampling(**given | {"cfg": w}) for w in dict.fromkeys(given.get("cfg", [Sampling.cfg]))]

def main(arguments=None):
    args, samplings = parse_args(arguments)
    device = pick_device(args.device)
    join_processes(device)
    adapter = find_adapter(args.run, args.adapter)
    settings = read_settings(adapter.path.parent)
    found = find_references(args, settings, adapter)
    unet_file, vae_file, encoder = open_files(args, settings, adapter)
    how, kinds = samplings[0], [args.split, args.embedding and "embedding", args.balance and "balance"]
    name = "-".join([f"step{int(adapter.header['step']):06d}", *filter(None, kinds)])
    out, size = args.out or adapter.path.parent / "samples" / name, int(adapter.header["resolution"])
    guard = dict(adapter_sha256=file_sha256(adapter.path), base_sha256=unet_file.fingerprint(),
                 vae_sha256=vae_file.fingerprint(), resolution=size, **asdict(how))
    del guard["cfg"]                                        # which is in the names
    before = read_samples(out, guard, [*(args.ref or ()), settings and settings.data])
    digest = file_sha256 if encoder else lambda row: hashlib.sha256(row.numpy()).hexdigest()
    names, known = name_references([(name, source) for name, _, source in found], before, digest)
    check_same("weights or references", [guard, known])
    chosen = choose(args, dict(zip(names, (label for _, label, _ in found))))
    references = {name: names[name] for name in chosen}
    jobs = [Job(out / s.name / f"{name}_seed{seed}_{s.name}.png", name, seed, s)
            for s in samplings for name, seeds in chosen.items() for seed in seeds]
    todo = [job for job in jobs if not job.path.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} images exist already")
    if todo:        # all references are read before anything is written: an unreadable one is found first
        needed = {job.reference: references[job.reference] for job in todo}
        e = list(needed.values())
        e = torch.from_numpy(encoder.extract(e, device, args.batch)).float() if encoder else torch.stack(e)
        compiled = device.type == "cuda" and len(todo) >= COMPILE_FROM and not args.no_compile
        model = load_model(args, unet_file, vae_file, adapter, guard["adapter_sha256"], device, compiled)
        if file_sha256(adapter.path) != guard["adapter_sha256"]:
            raise Fail(f"{adapter.path} was replaced meanwhile, as by a run that trains; repeat the command")
        if RANK0:
            out.mkdir(parents=True, exist_ok=True)
            lock = Lock(out)            # noqa: F841  until the program ends
            if read_samples(out, guard, ()) != before:
                raise Fail(f"--out {out}: another call added samples meanwhile; repeat the command")
            save_json(out / "samples.json", guard | {"references": known})
        make_images(model, todo, dict(zip(needed, e)))
    if RANK0:
        real = write_real(out / "real", references if encoder else {}, size)
        write_labels(out, {safe_name(k): k for _, k, _ in found if k}, guard["adapter_sha256"])
        for s in samplings:
            write_sheet(out / f"sheet-{s.name}.png", real, [job for job in jobs if job.sampling == s])
        print(f"{len(jobs)} image{'s' * (len(jobs) > 1)} in {out}; contact sheet {out}/sheet-{how.name}.png.")
        if len(real) > 1:
            print("To compare:", command_line("fid.py", out / "real", out / how.name, "--per-class"))

def find_adapter(run, path):
    """--run and --adapter -> the open adapter: the one named, or the best (else the last) of the run."""
    if not (path or (run := run or newest_run())):
        raise Fail("there is no run under runs/; train one with `python train.py`, or pass --adapter")
    paths = [Path(path)] if path else [Path(run, f"adapter{kind}.safetensors") for kind in ("-best", "")]
    return open_adapter(next(filter(Path.is_file, paths), paths[-1]))

def find_references(args, settings, adapter):
    """--ref, --split or --embedding -> [(name, label, source)]: a file or an embedding (d_e,)."""
    if args.embedding:
        rows = read_embeddings(args.embedding, load_projector(adapter).shape["embedding"])
        print(f"{args.embedding}: {len(rows)} rows, taken for embeddings of {adapter.header['encoder']}")
        return [(f"{args.embedding.stem}-{i:04d}", "", row) for i, row in enumerate(rows)]
    if args.split:
        if not (found := patches_of(settings, adapter.path.parent)[args.split]):
            raise Fail(f"--split {args.split}: that part of the run's split.json is empty; pass another")
        return [(patch.title, patch.label, path) for patch, path in found]
    found = []
    for path in find(args.ref, adapter.path.parent):
        base, below = (path, list_images(path)) if path.is_dir() else (path.parent, [path] * path.is_file())
        if not below or (path.is_dir() and is_output(path)):
            raise Fail(f"--ref {path}: no image, nor a folder of references (a run's are in real/); pass one")
        found += [(p.relative_to(base).with_suffix("").as_posix(), "", p) for p in below]
    return found

def read_embeddings(path, width):
    """The one array (n, width) or (width,) of finite floating-point numbers in a file -> (n, width)."""
    if not path.is_file() or path.suffix.lower() not in re.split(",? ", STORED):     # no pipe: it blocks
        raise Fail(f"--embedding {path}: no such file, or of another kind; pass {STORED}")
    with foreign_file(path, "holds no embeddings", f"pass {STORED}"):
        if path.suffix.lower() in (".npy", ".npz"):
            found = np.load(path, mmap_mode="r")        # a false shape takes no memory
            arrays = dict(found) if hasattr(found, "keys") else {"array": found}
        else:
            file = TensorFile(path)
            arrays = {name: t.float().numpy() for name, t in file.read(file.names) if t.is_floating_point()}
        fit = [a for a in arrays.values() if a.dtype.kind == "f" and a.shape[-1:] == (width,) and a.ndim < 3]
        if len(fit) != 1 or not fit[0].size:
            shapes = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items())
            raise Fail(f"{path} holds {shapes[:200]}; the adapter needs one array (n, {width}) of floats")
        rows = torch.from_numpy(fit[0].reshape(-1, width).astype(np.float64)).float()
        if not (good := rows.isfinite().all(1) & rows.any(1)).all():
            raise Fail(f"{path}: embedding {good.long().argmin()} is zero, or not finite; omit it")
        return rows

def choose(args, labels):
    """{reference: label} -> {reference: seeds of its samples}, for those to sample."""
    size, nth, first, chosen = Counter(labels.values()), Counter(), args.seed, {}
    if unknown := set(args.label or ()) - size.keys():
        raise Fail(f"--label {min(unknown)}: the classes of this part are {', '.join(sorted(size))}")
    for name, label in labels.items():
        n, i, lacks = args.n, nth[label], max(size.values()) - size[label]
        if args.balance:        # the reference's share of what its class lacks
            n = (i + 1) * lacks // size[label] - i * lacks // size[label]
        if n and label in (args.label or size):
            chosen[name] = range(first, first + n)
        first, nth[label] = first + n, i + 1
    if not chosen:
        raise Fail("these classes are as large as the largest; omit --balance, or pass another --label")
    return dict(subsample(list(chosen.items()), args.limit))

def read_samples(out, guard, folders):
    """The references of the samples in --out {name: sha256}; {} where it is new or empty.
    Fails where it holds other files, samples of another kind, or is inside one of the folders of patches."""
    saved = read_json(out / "samples.json")
    before = asdict(Sampling()) | saved                     # an option that it lacks had its default
    problems = [f"is inside {folder}, where its images would be taken for patches" for folder in folders
                if folder and out.resolve().is_relative_to(Path(folder).resolve())]
    problems += [f"holds samples with another {key.removesuffix('_sha256')}"
                 for key in guard if saved and before.get(key) != guard[key]]
    problems += ["holds other files and no samples.json"] * (not saved and any(out.glob("[!.]*")))
    if problems:
        raise Fail(f"--out {out} {problems[0]}; pass another --out")
    return saved.get("references", {})

def open_files(args, settings, adapter):
    """-> U-Net and VAE (TensorFiles), Encoder (None with --embedding). Fails if trained with others."""
    header = adapter.header
    was = dict(sd15=header["base"], vae=header.get("vae"), uni2h=header["encoder"],
               encoder=header.get("encoder_recipe")) if settings is None else vars(settings)
    with rank0_first():             # it downloads what is missing
        unet_file, vae_file = open_sd15(args.sd15 or was["sd15"], args.vae or was["vae"] or None)
        encoder = None if args.embedding else open_encoder(args.uni2h or was["uni2h"], was["encoder"])
    files = {"base": (unet_file, "--sd15"), "vae": (vae_file, "--vae"), "encoder": (encoder, "--uni2h")}
    for part, (file, flag) in files.items():
        accepted = not file or (args.other_base and part != "encoder")
        if not accepted and file.fingerprint() != header[f"{part}_sha256"]:
            source, other = header.get(part) or header["base"], ", or --other-base" * (part != "encoder")
            raise Fail(f"{adapter.path} was trained with another {part} ({source}); pass it: {flag}{other}")
    return unet_file, vae_file, encoder

def load_model(args, unet_file, vae_file, adapter, sha256, device, compiled):
    """-> Model. The LoRA is merged in float32, then the U-Net is cast; the projector is float32."""
    unet, vae = load_unet(unet_file, device), load_vae(vae_file, device)
    z_shape = latent_shape(unet, vae, int(adapter.header["resolution"]))
    projector = load_adapter(adapter, unet)
    dtype = frozen_dtype(device, args.dtype, unet.conv_in.out_channels)
    unet = fold(unet).to(dtype, memory_format=layout(device, dtype))
    unet = torch.compile(unet, dynamic=False, fullgraph=True) if compiled else unet
    return Model(unet, projector, vae, z_shape, args.batch, compiled, sha256)

def write_labels(out, labels, adapter_sha256):
    """labels.csv: a row for each sample in OUT, of any call, by its path. labels: {folder: class}."""
    rows = []
    for path in sorted(out.glob("cfg*/**/[!.]*.png")):
        file = path.relative_to(out).as_posix()
        if m := re.fullmatch(r"cfg[^/]+/((?:([^/]+)/)?.+)_seed(\d+)_cfg(.+)\.png", file):
            rows.append(dict(file=file, label=labels.get(m[2], m[2]), reference=m[1], seed=m[3],
                             guidance=m[4], adapter=adapter_sha256))
    save_csv(out / "labels.csv", rows)

def write_sheet(path, real, jobs):
    """A contact sheet of 32 references, equally many of each class, and up to eight samples of each."""
    classes = defaultdict(dict)         # {class: {reference: its samples}}
    for job in jobs:
        classes[job.reference.rpartition("/")[0]].setdefault(job.reference, []).append(job.path)
    n = max(1, 32 // len(classes))
    shown = [row for rows in classes.values() for row in subsample(list(rows.items()), n)]
    n = min(8, *(len(paths) for _, paths in shown))
    groups = [[*([real[name]] if name in real else []), *paths[:n]] for name, paths in shown]
    save_sheet(path, groups, [p.stem[-40:] for group in groups for p in group])

if __name__ == "__main__":
    run_program(main)

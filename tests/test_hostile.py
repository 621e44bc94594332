"""Files from strangers, mutated: each is read or refused in one clear line, whatever was done to it.

Hypothesis changes bytes, cuts files, and edits safetensors headers and JSON. MORPH_EXAMPLES sets how many it
tries of each kind; with -s the counts are printed."""
import io
import json
import os
import shutil
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HEADER, program, texture, timm_folder, trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features
from safetensors import safe_open
from safetensors.torch import save, save_file

import fid
from ldm.app import Fail
from ldm.data import load_rgb, read_dataset, read_split
from ldm.encoder import open_encoder
from ldm.unet import UNet
from ldm.weights import open_sd15
from lora import inject, load_adapter, open_adapter, save_adapter
from projector import Projector
from sample import read_embeddings

few = settings(max_examples=max(8, int(os.environ.get("MORPH_EXAMPLES", 0)) // 30), deadline=None,
               suppress_health_check=list(HealthCheck))
many = settings(max_examples=int(os.environ.get("MORPH_EXAMPLES", 60)), deadline=None,
                suppress_health_check=list(HealthCheck))
ended = Counter()

@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\n" + "\n".join(f"{kind}: {n} {how}" for (kind, how), n in sorted(ended.items())))

def attempt(kind, read):
    """read() may succeed or raise Fail, with a line that says something; nothing else."""
    try:
        read()
        ended[kind, "read"] += 1
    except Fail as problem:
        assert 20 < len(str(problem)) < 2000
        ended[kind, "refused"] += 1

def mutate(data, changes, cut):
    data = bytearray(data)
    for place, value in changes:
        data[place % len(data)] = value
    return bytes(data[:max(0, len(data) - cut)])

mutations = dict(changes=st.lists(st.tuples(st.integers(0, 2 ** 31), st.integers(0, 255)), max_size=12),
                 cut=st.one_of(st.just(0), st.integers(0, 5000)))
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=3)
                           | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)

# ---- adapters and states -----------------------------------------------------------------------------------

CHANNELS = (32, 32)

@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_adapter(path, inject(UNet(CHANNELS, context=8), 2), Projector(d_e=6, d_h=8, n_c=2, d_c=8), HEADER)
    return path

def read_as_adapter(path):
    file = open_adapter(path)
    assert int(file.header["resolution"]) >= 0 <= int(file.header["step"])
    assert HEADER.keys() - {"seed", "licence"} <= file.header.keys()
    with torch.device("meta"):
        unet = UNet(CHANNELS, context=8)
    load_adapter(file, unet)

def edit_header(data, edit):
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n:]

@many
@given(st.data())
def test_an_adapter_with_an_edited_header(adapter, tmp_path_factory, data):
    """Absurd sizes, overlapping or backward offsets, other dtypes and shapes, and any JSON in the place of a
    value of ours."""
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(edit_header(adapter.read_bytes(), lambda header: edit_anything(header, data)))
    attempt("adapter, header", lambda: read_as_adapter(path))

def edit_anything(header, data):
    name = data.draw(st.sampled_from(sorted(header)) | st.just("__metadata__"))
    if name == "__metadata__":
        key = data.draw(st.sampled_from(sorted(header[name])))
        value = data.draw(st.none() | st.text(max_size=8) | st.integers(-10 ** 15, 10 ** 15).map(str))
        header[name] = {k: v for k, v in (header[name] | {key: value}).items() if v is not None}
    else:
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        value = data.draw(dict(dtype=st.sampled_from(["F64", "F32", "I8", "BOOL", "BF16", "F8_E4M3", "X"]),
                               shape=st.lists(st.integers(0, 2 ** 62), max_size=4),
                               data_offsets=st.lists(st.integers(0, 2 ** 62), min_size=2,
                                                     max_size=2)).get(key, json_values))
        header[name] = value if key is None else header[name] | {key: value}

def edit_or_mutate(text, data):
    if data.draw(st.booleans()):
        return edit_header(text, lambda header: edit_anything(header, data))
    return mutate(text, data.draw(mutations["changes"]), data.draw(mutations["cut"]))

@few
@given(st.data())
def test_sample_py_with_an_adapter_of_anything(trained, dataset, tmp_path_factory, data):
    """The whole program, as a user calls it: an image, or one line and the exit code 2."""
    folder = tmp_path_factory.mktemp("program")
    text = (trained / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(edit_or_mutate(text, data))
    config = json.loads((trained / "config.json").read_text())
    result = program("sample.py", "--adapter", folder / "adapter.safetensors", "--ref",
                     sorted((dataset / "test").iterdir())[0], "--steps", 1,
                     "--sd15", config["args"]["sd15"], "--uni2h", config["args"]["uni2h"], cwd=folder,
                     check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("sample.py: ")]
    made = list(folder.rglob("samples.json"))           # a refused call leaves nothing
    assert (result.returncode, len(made), len(lines)) in ((0, 1, 0), (2, 0, 1))
    ended["sample.py, adapter", "refused" if lines else "read"] += 1

@few
@given(st.data())
def test_the_state_of_a_run_with_anything_in_it(state, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    path.write_bytes(edit_or_mutate(state[1], data))
    attempt("state", lambda: state[0].restore(path))

@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A Trainer after two steps, with a row in its log, and the bytes of its state."""
    folder, t = tmp_path_factory.mktemp("state"), trainer(n=6)
    t.train_step(), t.train_step()
    t.history, t.losses = [{"epoch": 1, "step": 2, "val_loss": 0.5, "minutes": 0.1}], []
    t.save(folder, HEADER)
    return t, (folder / "state.safetensors").read_bytes()

@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's count of memory")
@pytest.mark.parametrize("key, value", [("hidden", "1000000000"), ("tokens", "10000000000"),
                                        ("depth", "1000000000"), ("embedding", "-5"),
                                        ("tensors", "1000000000")])
def test_absurd_sizes_in_a_header_take_no_memory(key, value, adapter, tmp_path):
    """Under a limit of 1 GB more than the process has: what would allocate dies of it."""
    path = tmp_path / "absurd.safetensors"
    if key == "tensors":            # of no bytes, and so allowed in a file of any length
        with safe_open(adapter, "pt") as f:
            tensors, header = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
        shapes = dict(lora_A=(int(value), 0), lora_B=(0, int(value)))
        save_file({n: torch.empty(shapes[n.split(".")[-2]]) if n.startswith("unet.") else t
                   for n, t in tensors.items()}, path, header)
    else:
        path.write_bytes(edit_header(adapter.read_bytes(),
                                     lambda header: header["__metadata__"].update({key: value})))
    resource = pytest.importorskip("resource")
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 10 ** 9, before[1]))
    try:
        with pytest.raises(Fail):
            read_as_adapter(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

# ---- configs beside weights --------------------------------------------------------------------------------

SCHEDULE = dict(_class_name="PNDMScheduler", beta_schedule="scaled_linear", beta_start=0.00085,
                beta_end=0.012, num_train_timesteps=1000, steps_offset=1, trained_betas=None,
                prediction_type="epsilon")
INSTEAD = st.sampled_from([      # what others declare, and JSON
    1, 2, 4, 16, 0.5, 1e-6, 0.13025, "gelu", "identity", "timestep", "text_time", "scale_shift", "fourier",
    "gated", "layer_norm", "linear", "v_prediction", "DDPMScheduler", "UNetMidBlock2D", [4] * 4, [0.1] * 4,
    [True, False, False, False], ["DownBlock2D"] * 4, ["AttnDownEncoderBlock2D"] * 4]) | json_values

@pytest.fixture(scope="module")
def configured(base, tmp_path_factory):
    """A base with its three configs -> its folder, {name: config}."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("configured") / "base", copy_function=os.link)
    names = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
    configs = {name: json.loads((folder / name).read_text()) for name in names[:2]} | {names[2]: SCHEDULE}
    for name in names:
        (folder / name).unlink(missing_ok=True)     # a link to that of the fixture
        (folder / name).parent.mkdir(exist_ok=True)
    return folder, configs

def write_configs(configured, changed, text):
    """The three as they are, but for one."""
    folder, configs = configured
    for name, config in configs.items():
        (folder / name).write_bytes(text if name == changed else json.dumps(config).encode())

@many
@given(data=st.data(), **mutations)
def test_a_base_with_anything_in_its_configs(configured, data, changes, cut):
    name = data.draw(st.sampled_from(sorted(configured[1])))
    config = configured[1][name]
    key = data.draw(st.sampled_from(sorted(config)))
    kinds = dict(bytes=mutate(json.dumps(config).encode(), changes, cut % 200),
                 value=json.dumps(config | {key: data.draw(INSTEAD)}).encode(),
                 all=json.dumps(data.draw(INSTEAD)).encode())
    text = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    write_configs(configured, name, text)
    attempt(f"base, {name}", lambda: open_sd15(str(configured[0])))

@pytest.fixture(scope="module")
def outputs(configured):
    """What Diffusers computes with the configs as they are."""
    write_configs(configured, None, None)
    return {name: diffusers_outputs(configured[0], name) for name in configured[1]}

def diffusers_outputs(folder, name):
    """What Diffusers computes with the file `name`; None where it cannot follow it with these tensors."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    part, g = name.split("/")[0], torch.Generator().manual_seed(0)
    kind = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, scheduler=DDPMScheduler)[part]
    try:
        if part == "scheduler":
            made = kind.from_pretrained(folder, subfolder=part)
            return [made.alphas_cumprod, torch.tensor(made.config.prediction_type == "epsilon")]
        network, loaded = kind.from_pretrained(folder, subfolder=part, output_loading_info=True)
        assert not any(loaded.values())
        with torch.no_grad():
            z = torch.randn(1, 4, 16, 16, generator=g)
            if part == "unet":
                return [network(z, torch.tensor([501]), torch.randn(1, 4, 768, generator=g)).sample]
            return [network.encode(z[:, :3]).latent_dist.parameters, network.decode(z[..., :4, :4]).sample,
                    torch.tensor([network.config.scaling_factor, network.config.shift_factor or 0.0])]
    except Exception:
        return None

@few
@given(data=st.data())
def test_a_base_that_is_opened_is_what_diffusers_makes_of_its_configs(configured, outputs, data):
    """Our networks know no configs: an opened base is the one of the configs as they were."""
    name = data.draw(st.sampled_from(sorted(outputs)))
    key = data.draw(st.sampled_from(sorted(configured[1][name])))
    value = data.draw(INSTEAD)
    write_configs(configured, name, json.dumps(configured[1][name] | {key: value}).encode())
    try:
        open_sd15(str(configured[0]))
    except Fail:
        return
    theirs = diffusers_outputs(configured[0], name)
    ended["opened base", "computed by Diffusers" if theirs else "not computed by Diffusers"] += 1
    for a, b in zip(theirs or (), outputs[name]):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (name, key, value)

@pytest.fixture(scope="module")
def timm_encoder(tmp_path_factory):
    """A small model of timm -> its folder, its config.json."""
    folder = tmp_path_factory.mktemp("timm")
    timm_folder(folder, "vit_tiny_patch16_224", {}, img_size=64, depth=1)
    return folder, json.loads((folder / "config.json").read_text())

@many
@given(data=st.data(), **mutations)
def test_an_encoder_with_anything_in_its_config(timm_encoder, data, changes, cut):
    folder, config = timm_encoder
    part = data.draw(st.sampled_from([None, "pretrained_cfg", "model_args"]))
    inner = config[part] if part else config
    inner = inner | {data.draw(st.sampled_from(sorted(inner))): data.draw(json_values)}
    edited = json.dumps(config | {part: inner} if part else inner).encode()
    text = edited if data.draw(st.booleans()) else mutate(json.dumps(config).encode(), changes, cut % 200)
    (folder / "config.json").write_bytes(text)
    for name in (None, "timm"):
        attempt("encoder, config.json", lambda: open_encoder(folder, name))

THREE = st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3)
FOLLOWED = dict(input_size=st.sampled_from([[3, 64, 64], [3, 64, 96], [3, 32, 32], [1, 64, 64]]),
                mean=THREE | json_values, std=THREE | json_values,
                interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos", "hamming", "box", "random"]),
                crop_pct=st.floats(0.5, 1) | json_values,
                crop_mode=st.sampled_from(["center", "squash", "border"]),
                classifier=st.sampled_from(["head", ["head", "fc"], "fc"]),
                test_crop_pct=json_values, pool_size=json_values)

@few
@given(data=st.data())
def test_an_encoder_that_is_opened_is_what_timm_makes_of_its_config(timm_encoder, data):
    import timm
    from timm.data import create_transform, resolve_data_config
    folder, config = timm_encoder
    key = data.draw(st.sampled_from(sorted(FOLLOWED)))
    how = config["pretrained_cfg"] | {key: data.draw(FOLLOWED[key])}
    pool = data.draw(st.sampled_from(["token", "avg", "max", "avgmax", ""]))
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": how, "global_pool": pool}))
    try:
        encoder = open_encoder(folder, "timm")
        ours = encoder.embed(encoder.load(), [texture(0, 90)])
    except Fail:
        return
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    x = create_transform(**resolve_data_config({}, model=theirs))(texture(0, 90))
    with torch.no_grad():
        assert torch.allclose(ours, theirs(x[None]), rtol=1e-4, atol=1e-5), (how, pool)
    ended["opened encoder", "computed by timm"] += 1

# ---- lists of patches and splits ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A dataset in the Chaoyang format -> (folder, its rows)."""
    root = tmp_path_factory.mktemp("listed")
    rows = [{"name": f"{c}_1-IMG001x00{k}-{c % 4}.png", "label": c % 4} for c in range(6) for k in range(2)]
    for row in rows:
        texture(row["label"], 32).save(root / row["name"])
    (root.parent / "outside.png").write_bytes((root / rows[0]["name"]).read_bytes())
    os.symlink(root.parent / "outside.png", root / "link.png")
    return root, rows

@many
@given(st.data())
def test_a_list_of_patches_with_anything_in_it(listed, data):
    root, rows = listed
    rows = [dict(row) for row in rows]
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["name", "label", "row", "more"]))
        i = data.draw(st.integers(0, len(rows) - 1))
        if kind == "name" and isinstance(rows[i], dict):
            rows[i]["name"] = data.draw(st.sampled_from(["../outside.png", "/etc/passwd", "link.png", "a\0b",
                                                         "C:\\x.png", "", ".", "no.png"]) | json_values)
        elif kind == "label" and isinstance(rows[i], dict):
            rows[i]["label"] = data.draw(json_values
                                         | st.sampled_from([float("nan"), -1, 4, True, "0", 1e300]))
        elif kind == "row":
            rows[i] = data.draw(json_values)
        elif kind == "more":
            rows.append(data.draw(st.sampled_from(rows)))
    text = json.dumps(rows).encode()
    if data.draw(st.booleans()):
        text = mutate(text, data.draw(mutations["changes"]), data.draw(mutations["cut"]))
    (root / "train.json").write_bytes(text)

    def read():
        for patch in read_dataset(root, say=None):
            assert os.path.normpath(root / patch.name).startswith(f"{root}/")
    attempt("train.json", read)

@many
@given(value=json_values, **mutations)
def test_a_split_file_with_anything_in_it(listed, tmp_path_factory, value, changes, cut):
    root, rows = listed
    (root / "train.json").write_text(json.dumps(rows))
    patches = read_dataset(root, say=None)
    names = [p.name for p in patches]
    path = tmp_path_factory.getbasetemp() / "split.json"
    good = {"train": names[:4], "val": names[4:8], "test": names[8:]}

    def read():
        split = read_split(path, patches)
        assert list(split) == ["train", "val", "test"] and {*map(type, sum(split.values(), []))} == {str}
    for text in (json.dumps(value).encode(), json.dumps(good | {"val": value}).encode(),
                 mutate(json.dumps(good).encode(), changes, cut)):
        path.write_bytes(text)
        attempt("split.json", read)

# ---- images and statistics ---------------------------------------------------------------------------------

def encoded(form, **options):
    out = io.BytesIO()
    texture(1, 48).save(out, form, **options)
    return out.getvalue()

def tiled(image):
    """A TIFF of three rows of three tiles, 16 pixels a side."""
    x = np.asarray(image).reshape(3, 16, 3, 16, 3).transpose(0, 2, 1, 3, 4)
    values = {256: [48], 257: [48], 258: [8] * 3, 259: [1], 262: [2], 277: [3], 322: [16], 323: [16],
              324: range(300, 300 + x.size, 768), 325: [768] * 9}
    rows, more = b"", b""
    for tag, v in values.items():
        packed = struct.pack(f"<{len(v)}I", *v)
        rows += struct.pack("<HHI", tag, 4, len(v)) + (packed if len(v) == 1
                                                       else struct.pack("<I", 134 + len(more)))
        more += packed if len(v) > 1 else b""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + rows + bytes(4)
    return (head + more).ljust(300, b"\0") + x.tobytes()

def test_the_tiled_and_the_turned_picture_are_read_as_they_are(tmp_path):
    expected = np.asarray(texture(1, 48)).astype(int)
    for form, turns in (("TIFF, tiles", 0), ("JPEG, EXIF", 3)):
        (tmp_path / "x").write_bytes(IMAGES[form])
        assert abs(np.rot90(expected, turns) - np.asarray(load_rgb(tmp_path / "x"))).mean() < 8

IMAGES = {form: encoded(form) for form in ("PNG", "JPEG", "TIFF", "BMP", "WEBP")}
IMAGES |= {"AVIF": encoded("AVIF")} if features.check("avif") else {}
IMAGES["TIFF, tiles"] = tiled(texture(1, 48))
IMAGES["JPEG, EXIF"] = encoded("JPEG", exif=b"Exif\0\0II*\0" + struct.pack(
    "<I H HHIHH HHII I ii", 8, 2, 0x112, 3, 1, 6, 0, 0x11a, 5, 1, 38, 0, 300, 1))

FEATURES = fid.ImageSet(np.random.default_rng(0).normal(size=(5, 4)), [f"a/{i}" for i in range(5)],
                        ("inception", "pytorch-fid", "w"))

@many
@given(st.data())
def test_statistics_with_anything_in_them(tmp_path_factory, data):
    """What is read can be compared, by class as well."""
    path = tmp_path_factory.getbasetemp() / "edited.npz"
    fid.save_set(path, FEATURES)
    with np.load(path) as f:
        arrays = dict(f)
    numbers = st.lists(st.floats() | st.integers(-5, 2 ** 62),
                       max_size=6).map(np.array) | st.integers(-3, 2 ** 62).map(np.array)
    for key in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=2)):
        arrays[key] = data.draw(numbers | st.text(max_size=5).map(np.array) | st.just(arrays[key][..., None])
                                | st.just(arrays[key][:1] if arrays[key].ndim else arrays[key]))
    np.savez(path, **arrays)

    def read():
        other = fid.load_set(path)
        assert np.isfinite(fid.compare(FEATURES, replace(other, space=None))["fid"])
        fid.compare_classes(FEATURES, other)
    attempt("statistics, edited", read)

def stored(form):
    """The bytes of a file of embeddings (3, 6)."""
    out, x = io.BytesIO(), np.ones((3, 6), np.float32)
    dict(npy=lambda: np.save(out, x), npz=lambda: np.savez(out, e=x),
         csv=lambda: np.savetxt(out, x, delimiter=","), pt=lambda: torch.save(torch.from_numpy(x), out),
         safetensors=lambda: out.write(save({"e": torch.from_numpy(x)})))[form]()
    return out.getvalue()

def read_rows(path):
    rows = read_embeddings(path, 6)
    assert rows.dtype == torch.float32 and rows.isfinite().all() and rows.shape[1] == 6

def read_image(path):
    image = load_rgb(path)
    assert image.mode == "RGB" and image.width * image.height <= 8192 ** 2

@pytest.fixture(scope="module")
def originals(adapter, tmp_path_factory):
    """{kind: {suffix: bytes}} of files as they should be."""
    path = tmp_path_factory.mktemp("originals") / "x.npz"
    fid.save_set(path, FEATURES)
    return {"image": IMAGES, "adapter": {"safetensors": adapter.read_bytes()},
            "statistics": {"npz": path.read_bytes()},
            "embeddings": {form: stored(form) for form in ("npy", "npz", "csv", "pt", "safetensors")}}

@pytest.mark.parametrize("kind, readers", [
    ("image", [read_image]), ("adapter", [read_as_adapter, open_encoder]), ("statistics", [fid.load_set]),
    ("embeddings", [read_rows])])
@many
@given(data=st.data(), **mutations)
def test_a_file_with_changed_bytes(kind, readers, originals, tmp_path_factory, data, changes, cut):
    form = data.draw(st.sampled_from(sorted(originals[kind])))
    path, original = tmp_path_factory.getbasetemp() / f"mutated.{form.lower()}", originals[kind][form]
    path.write_bytes(mutate(original, changes, cut % len(original)))
    for read in readers:
        attempt(f"{kind}, {form}", lambda: read(path))

def test_a_name_in_another_alphabet_is_read(tmp_path):
    for name in ("образец.png", "試料.png", "naïve ☂.png"):
        texture(2, 32).save(tmp_path / name)
    assert len(read_dataset(tmp_path)) == 3 and all(load_rgb(tmp_path / p.name).size == (32, 32)
                                                    for p in read_dataset(tmp_path))

def test_a_png_with_more_pixels_than_a_patch_has_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")         # 110 kB, 2.7 GB as RGB
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load",
                        lambda image: pytest.fail("its pixels were read"))
    with pytest.raises(Fail, match="30000 x 30000"):
        load_rgb(tmp_path / "bomb.png")

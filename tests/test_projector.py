"""The projector is eqs. (3)-(4); UNI2-h is timm's, with MahmoodLab's preprocessing."""
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import mahmoodlab_transform, program, timm_folder, uni2h_of_timm
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.layers import SwiGLUPacked

from ldm.app import Fail
from ldm.data import load_rgb
from ldm.encoder import TOY, UNI2H, Encoder, open_encoder, preprocess
from ldm.runs import parameter_table
from ldm.unet import UNet
from lora import inject, open_adapter
from projector import Projector

def test_tokens_are_eqs_3_and_4_written_out():
    torch.manual_seed(0)
    f = Projector(d_e=6, d_h=5, n_c=2, d_c=3).double().requires_grad_(False)
    with torch.no_grad():
        f.norm[0].weight.normal_(), f.norm[0].bias.normal_()
    e = torch.randn(4, 6, dtype=torch.float64)
    h = e @ f.linear[0].weight.T + f.linear[0].bias
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h * f.norm[0].weight + f.norm[0].bias
    h = h / (1 + torch.exp(-h))
    c = (h @ f.out.weight.T + f.out.bias).reshape(4, 2, 3)
    assert (f(e) - c).abs().max() < 1e-12

@pytest.mark.parametrize("options, expected", [
    # Table 2's 4,726,272 with the null embedding inside; its total counts it twice
    ({}, 4_724_736 + 1536),
    (dict(token_norm=True), 4_726_272 + 1536),                                   # the other reading
    (dict(depth=3), 4_724_736 + 1024 * 1024 + 3 * 1024 + 1536)])
def test_parameters_count_as_table_2_says(options, expected):
    with torch.device("meta"):
        projector = Projector(**options)
    assert sum(p.numel() for p in projector.parameters()) == expected

@pytest.mark.parametrize("rank, lora, total, share", [(8, "1,594,368", "6,320,640", "0.74%"),
                                                      (4, "797,184", "5,523,456", "0.64%")])
def test_the_printed_table_has_the_numbers_of_table_2(rank, lora, total, share):
    """At rank 8 the paper's Table 2, whose total counts the null embedding twice; at rank 4 the 0.64 % of its
    abstract."""
    with torch.device("meta"):
        table = parameter_table(inject(UNet().requires_grad_(False), rank), Projector())
    for row in (["LoRA", "adapters", lora], ["Projector", "MLP", "4,724,736"], ["Null", "embedding", "1,536"],
                ["Total", "trainable", total], ["backbone", "(frozen)", "859,520,964"],
                ["Trainable/backbone", share]):
        assert any(" ".join(row) in " ".join(line.split()) for line in table.splitlines()), row

def test_the_null_embedding_starts_at_a_hundredth():
    torch.manual_seed(0)
    null = Projector().null
    assert null.shape == (1, 1536) and null.requires_grad
    assert null.std().item() == pytest.approx(0.01, rel=0.05) and abs(null.mean().item()) < 0.001

def test_dropout_takes_hidden_units_away_and_scales_the_rest():
    torch.manual_seed(0)
    f = Projector(d_e=6, d_h=8, n_c=1, d_c=3, depth=3)
    e, keep = torch.randn(2, 6), torch.ones(2, 2, 8)
    assert torch.equal(f(e, keep), f(e))
    keep[:, 1] = 0
    assert torch.allclose(f(e, keep), f.out.bias.view(1, 1, 3).expand(2, 1, 3))

def test_the_token_norm_normalises_each_token():
    c = Projector(d_e=6, d_h=8, n_c=2, d_c=64, token_norm=True)(torch.randn(3, 6))
    assert c.mean(-1).abs().max() < 1e-6 and (c.var(-1, unbiased=False) - 1).abs().max() < 1e-2

@pytest.mark.parametrize("size", [(512, 512), (220, 220), (224, 224), (97, 97), (331, 250), (250, 331),
                                  (1000, 300)])
def test_preprocessing_equals_timms_pipeline(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert (preprocess([image])[0] - mahmoodlab_transform()(image)).abs().max() < 1e-6

def test_embeddings_equal_timms_own(uni2h, dataset):
    theirs = uni2h_of_timm(192, 2)
    theirs.load_state_dict(torch.load(uni2h / "pytorch_model.bin", weights_only=True), strict=True)
    images = [load_rgb(path) for path in sorted((dataset / "train").iterdir())[:3]]
    encoder = open_encoder(uni2h)
    ours = encoder.embed(encoder.load(), images)
    with torch.no_grad():
        expected = theirs(torch.stack([mahmoodlab_transform()(image) for image in images]))
    assert ours.shape == (3, 192) and ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()

def test_a_folder_a_pickle_and_a_safetensors_file_hold_the_same_encoder(uni2h, tmp_path):
    save_file(torch.load(uni2h / "pytorch_model.bin", weights_only=True), tmp_path / "model.safetensors")
    fingerprints = {open_encoder(path).fingerprint() for path in (
        uni2h, uni2h / "pytorch_model.bin", tmp_path, tmp_path / "model.safetensors")}
    assert len(fingerprints) == 1

@pytest.mark.parametrize("change", [
    dict(mean=(0.5, 0.5, 0.5)), dict(interpolation="BICUBIC"), dict(resize=256),
    dict(arguments=UNI2H.arguments | {"act_layer": "gelu"}),
    dict(arguments=UNI2H.arguments | {"global_pool": ""}, joined=True)])
def test_the_same_weights_under_another_recipe_are_another_encoder(change, uni2h, monkeypatch):
    """Cache and adapter are keyed by the fingerprint. UNI2-h's is that of the weights alone, as in adapters
    of earlier versions: not if the recipe itself is edited."""
    file, edited = open_encoder(uni2h).file, replace(UNI2H, **change)
    changed = Encoder(file, edited).fingerprint()
    assert open_encoder(uni2h).fingerprint() == Encoder(file, TOY).fingerprint() == file.fingerprint()
    assert changed != file.fingerprint()
    assert changed == Encoder(file, replace(edited, terms="other terms")).fingerprint()
    monkeypatch.setattr("ldm.encoder.UNI2H", edited)
    assert changed == Encoder(file, edited).fingerprint()

# The publishers' calls of timm, narrow and two blocks deep, and their transforms.
OPTIMUS = ("vit_giant_patch14_reg4_dinov2", dict(img_size=224, init_values=1e-5),
           dict(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517)))
ROWS = {
    "H-optimus-0": OPTIMUS, "h-optimus-1": OPTIMUS,
    "virchow2": ("vit_huge_patch14_224", dict(
        img_size=224, init_values=1e-5, reg_tokens=4, mlp_ratio=5.3375, global_pool="", dynamic_img_size=True,
        mlp_layer=SwiGLUPacked, act_layer="silu"), {}),
    "prov-gigapath": ("vit_giant_patch14_dinov2", dict(
        img_size=224, patch_size=16, init_values=1e-5, mlp_ratio=5.33334), dict(crop_pct=0.875))}

@pytest.mark.parametrize("name", ROWS)
def test_each_named_encoder_equals_timms_pipeline(name, tmp_path):
    model, arguments, how = ROWS[name]
    torch.manual_seed(0)
    width = 160 if name == "virchow2" else 128
    theirs = timm.create_model(model, num_classes=0, embed_dim=width, depth=2, num_heads=2, **arguments)
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    how = dict(interpolation="bicubic", mean=UNI2H.mean, std=UNI2H.std, crop_pct=1.0) | how
    transform, rng = create_transform(224, **how), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((300, 301, 3), (97, 64, 3))]
    encoder = open_encoder(tmp_path, name)
    ours = encoder.embed(encoder.load(), images)
    with torch.no_grad():
        expected = theirs(torch.stack([transform(image) for image in images]))
    if name == "virchow2":          # the class token, four registers, 256 patches
        expected = torch.cat([expected[:, 0], expected[:, 5:].mean(1)], dim=-1)
    assert ours.shape == (2, encoder.width) and (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert encoder.recipe.licence == "other"        # a narrow twin is not the published network
    with pytest.raises(Fail, match="does not fit MahmoodLab/UNI2-h"):
        open_encoder(tmp_path)

def test_any_model_with_timms_config_is_an_encoder(tmp_path):
    model = timm_folder(tmp_path, "vit_tiny_patch16_224", {}, img_size=64, depth=2)
    encoder = open_encoder(name=str(tmp_path))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 111, 3), np.uint8))
    x = create_transform(64, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
                         crop_pct=0.9)(image)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x[None]), pre_logits=True)
    assert torch.allclose(encoder.embed(encoder.load(), [image]), expected, atol=1e-5)
    assert encoder.width == 192
    assert encoder.fingerprint() == open_encoder(tmp_path, "timm").fingerprint() != encoder.file.fingerprint()

@pytest.mark.parametrize("config", [
    dict(crop_mode="squash"), dict(input_size=[3, 64, 96]), dict(interpolation="random"), dict(mean=None),
    dict(mean=[0.5] * 4), dict(mean="abc"), dict(mean=[float("nan")] * 3), dict(std=[0, 1, 1]),
    dict(std=["0.5"] * 3), dict(crop_pct=-1), dict(crop_pct=float("inf")), dict(crop_pct=0)])
def test_a_timm_config_that_cannot_be_followed_is_refused(config, tmp_path):
    timm_folder(tmp_path, "vit_tiny_patch16_224", config, img_size=64, depth=1)
    with pytest.raises(Fail, match="config.json is no config of timm that can be used"):
        open_encoder(tmp_path, "timm")

@pytest.mark.parametrize("key, value", [
    ("mean", [0.5, 0.5, 0.5]), ("std", [0.2, 0.2, 0.2]), ("input_size", [3, 448, 448]),
    ("architecture", "vit_large_patch16_224"), ("interpolation", "bicubic")])
def test_a_config_that_contradicts_the_recipe_is_refused(key, value, uni2h, tmp_path):
    (tmp_path / "pytorch_model.bin").symlink_to(uni2h / "pytorch_model.bin")

    def write(config):
        top = {"architecture": config["architecture"], "pretrained_cfg": config}
        (tmp_path / "config.json").write_text(json.dumps(top))
    same = dict(architecture="vit_giant_patch14_224", input_size=[3, 224, 224], interpolation="bilinear",
                mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    write(same)
    open_encoder(tmp_path)
    write(same | {key: value})
    with pytest.raises(Fail, match=f"{key} .*computes with"):
        open_encoder(tmp_path)

def test_names_of_encoders_and_files_that_are_none(tmp_path):
    with pytest.raises(Fail, match="virchow3 is none of uni2-h"):
        open_encoder(name="virchow3")
    with pytest.raises(Fail, match="does not fit paige-ai/Virchow2"):
        open_encoder("toy", "virchow2")

def test_an_adapter_of_another_encoder_finds_its_recipe_again(small, tmp_path):
    """Also apart from its run: the header names the recipe, the terms and where the weights were."""
    (tmp_path / "gigapath").mkdir()
    torch.manual_seed(0)
    model, arguments, _ = ROWS["prov-gigapath"]
    twin = timm.create_model(model, num_classes=0, embed_dim=128, depth=1, num_heads=2, **arguments)
    torch.save(twin.state_dict(), tmp_path / "gigapath/pytorch_model.bin")
    at = small.index("--uni2h")
    args = [*small[:at], "--uni2h", "gigapath", "--encoder", "Prov-GigaPath", *small[at + 2 :]]
    args += ["--max-steps", 1, "--val-samples", 2, "--val-steps", 2, "--run", "runs/x"]
    args += ["--vae", small[3] / "vae"]
    program("train.py", *args, cwd=tmp_path)
    (tmp_path / "runs/x/adapter.safetensors").rename(tmp_path / "moved.safetensors")
    header = open_adapter(tmp_path / "moved.safetensors").header
    assert header["encoder_recipe"] == "prov-gigapath" and header["embedding"] == "128"
    assert header["encoder_licence"] == "other" and "NC-ND" not in header["licence"]
    assert (header["encoder"], header["vae"]) == ("gigapath", "vae")
    how = ["--sd15", small[3], "--uni2h", tmp_path / "gigapath", "--vae", small[3] / "vae", "--steps", 2]
    program("sample.py", "--adapter", "moved.safetensors", "--ref", "runs/x/patch.png", *how, cwd=tmp_path)

"""LoRA equals PEFT's, counts as the paper counts, and survives the way through its file."""
import ast
import copy
import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from conftest import HEADER, ROOT, program
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.app import Fail
from ldm.data import load_rgb
from ldm.encoder import TOY, UNI2H
from ldm.unet import UNet
from ldm.weights import licence
from lora import fold, inject, load_adapter, lora_layers, lora_parameters, open_adapter, save_adapter
from projector import Projector

CHANNELS = (32, 64, 128, 128)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

@pytest.fixture
def unet(diffusers_networks):
    unet = UNet(CHANNELS)
    unet.load_state_dict(diffusers_networks[0].float().state_dict())
    return unet.eval().requires_grad_(False)

@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 16, 16, generator=g), torch.tensor([4, 801]), torch.randn(2, 4, 768, generator=g)

def randomise(unet, scale=0.05):
    """B starts at zero; give it values, so that the adapter does something."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(unet).values():
            layer.B.copy_(scale * torch.randn(layer.B.shape, generator=g))
    return unet

@cache
def count_lora(rank):
    """The parameters of LoRA in the full-size U-Net."""
    with torch.device("meta"):
        unet = inject(UNet(), rank)
    assert len(lora_layers(unet)) == 128
    return sum(p.numel() for p in lora_parameters(unet).values())

@pytest.mark.parametrize("rank, expected", [(4, 797_184), (8, 1_594_368), (16, 3_188_736), (1, 199_296)])
def test_the_full_size_network_has_the_papers_number_of_lora_parameters(rank, expected):
    assert count_lora(rank) == expected

# rank, tokens, depth, hidden of Table 3's twelve runs, four of which differ by learning rates only; by hand:
# 199,296 r + 1536 h + h + 2h + (depth 3: h² + h + 2h) + 768 n (h + 1) + 1536
@pytest.mark.parametrize("rank, tokens, depth, hidden, expected", [
    (8, 4, 2, 1024, 6_320_640), (4, 4, 2, 1024, 5_523_456), (16, 4, 2, 1024, 7_915_008),
    (8, 1, 2, 1024, 3_959_040), (8, 2, 2, 1024, 4_746_240), (8, 8, 2, 1024, 9_469_440),
    (8, 4, 3, 1024, 7_372_288), (8, 4, 2, 512, 3_959_808), (8, 4, 2, 2048, 11_042_304)])
def test_all_twelve_configurations_count_as_their_equations_say(rank, tokens, depth, hidden, expected):
    formula = (199_296 * rank + 1536 * hidden + 3 * hidden + (depth - 2) * (hidden ** 2 + 3 * hidden)
               + 768 * tokens * (hidden + 1) + 1536)
    with torch.device("meta"):
        projector = Projector(d_h=hidden, n_c=tokens, depth=depth)
    assert count_lora(rank) + sum(p.numel() for p in projector.parameters()) == formula == expected

def test_the_adapted_network_equals_the_frozen_one_bit_for_bit_at_the_start(unet, inputs):
    with torch.no_grad():
        frozen = unet(*inputs)
        assert torch.equal(inject(unet, 4)(*inputs), frozen)

@pytest.mark.parametrize("rank, alpha", [(4, 4), (8, 2)])
def test_forward_and_gradients_equal_peft(rank, alpha, unet, inputs, diffusers_networks):
    ours = randomise(inject(unet, rank, alpha))
    theirs = copy.deepcopy(diffusers_networks[0]).float()
    theirs.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False))
    parameters = {n.replace(".default.weight", "").replace("lora_", ""): p for n,
                  p in theirs.named_parameters() if "lora_" in n}
    assert parameters.keys() == lora_parameters(ours).keys()
    with torch.no_grad():
        for name, p in lora_parameters(ours).items():
            parameters[name].copy_(p)
    z, t, c = inputs
    ours.double(), theirs.double()
    z, c = z.double(), c.double()
    expected = theirs(z, t, c).sample
    assert (ours(z, t, c) - expected).abs().max() < 1e-10 * expected.abs().max()
    ours(z, t, c).square().mean().backward()
    expected.square().mean().backward()
    for name, p in lora_parameters(ours).items():
        assert (p.grad - parameters[name].grad).norm() < 1e-9 * parameters[name].grad.norm(), name
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in lora_parameters(ours))

def test_folding_leaves_a_plain_network_with_the_merged_weights(unet, inputs):
    names = list(unet.state_dict())
    randomise(inject(unet, 4))
    with torch.no_grad():
        apart = unet(*inputs)
        name, layer = next(iter(lora_layers(unet).items()))
        fold(unet)
        assert sorted(unet.state_dict()) == sorted(names) and not lora_layers(unet)
        assert torch.allclose(unet.get_submodule(name).weight, layer.weight + layer.B @ layer.A, atol=1e-6)
        assert (unet(*inputs) - apart).abs().max() < 2e-5 * apart.abs().max()

def test_the_update_of_a_bfloat16_network_is_summed_in_float32(unet):
    name, layer = next(iter(lora_layers(randomise(inject(unet.bfloat16(), 4))).items()))
    exact = layer.weight.double() + layer.scale * layer.B.double() @ layer.A.double()
    linear = fold(unet).get_submodule(name)
    assert linear.weight.dtype == torch.bfloat16 and layer.A.dtype == torch.float32
    assert torch.equal(linear.weight, exact.float().bfloat16())

@pytest.fixture
def adapter(unet, tmp_path):
    torch.manual_seed(2)
    projector = Projector(d_e=24, d_h=32, n_c=2, depth=3, token_norm=True)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, randomise(inject(unet, 4, alpha=2)), projector, HEADER)
    return path, projector

def test_an_adapter_survives_the_way_through_its_file(adapter, unet, inputs, diffusers_networks):
    path, projector = adapter
    fresh = UNet(CHANNELS)
    fresh.load_state_dict(diffusers_networks[0].float().state_dict())
    file = open_adapter(path)
    loaded = load_adapter(file, fresh)
    assert file.header["rank"] == "4" and float(file.header["alpha"]) == 2 and file.header["step"] == "7"
    assert "CC BY-NC-ND" in file.header["licence"]
    e = torch.randn(2, 24)
    assert torch.equal(loaded(e), projector(e)) and torch.equal(loaded.null, projector.null)
    with torch.no_grad():
        assert torch.equal(fresh(*inputs), unet(*inputs))

def test_diffusers_loads_the_adapter_file_as_it_is(adapter, unet, inputs, diffusers_networks):
    path, _ = adapter
    # refuses files with a name that lacks "lora"
    state, _ = StableDiffusionPipeline.lora_state_dict(str(path))
    assert len([name for name in state if name.startswith("unet.")]) == 256
    theirs = copy.deepcopy(diffusers_networks[0]).float()
    # without it Diffusers takes α = r for granted
    theirs.load_lora_adapter(str(path), prefix="unet", use_safetensors=True)
    z, t, c = inputs
    with torch.no_grad():
        expected = unet(z, t, c)
        assert (theirs(z, t, c).sample - expected).abs().max() < 1e-5 * expected.abs().max()

def test_an_adapter_for_another_width_names_its_base(adapter):
    with pytest.raises(Fail, match="pass its own, --sd15 x"):
        load_adapter(open_adapter(adapter[0]), UNet((64, 64, 128, 128)))

def test_peft_names_and_configuration_are_in_the_file(adapter):
    with safe_open(adapter[0], "pt") as f:
        names, header = set(f.keys()), f.metadata()
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in names
    assert json.loads(header["lora_adapter_metadata"]) == {"unet.r": 4, "unet.lora_alpha": 2,
                                                           "unet.target_modules": TARGETS}

def test_the_file_holds_every_trainable_tensor_and_no_other(adapter, unet):
    _, projector = adapter
    trainable = len(lora_parameters(unet)) + len(list(projector.parameters()))
    assert len(open_adapter(adapter[0]).names) == trainable

# ---- damaged files, and other programs' --------------------------------------------------------------------

MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_"

@pytest.mark.parametrize("words, tensors, header", [
    ("not finite", lambda t: t | {"lora_projector.out.bias": t["lora_projector.out.bias"] * torch.nan}, {}),
    ("not finite", lambda t: t | {f"{MIDDLE}B.weight": t[f"{MIDDLE}B.weight"] / 0}, {}),
    ("an A is 0", lambda t: t | {f"{MIDDLE}A.weight": 0 * t[f"{MIDDLE}A.weight"]}, {}),
    ("matrix of the projector is 0",
     lambda t: t | {"lora_projector.out.weight": 0 * t["lora_projector.out.weight"]}, {}),
    ("does not fit this base", lambda t: {n: x for n, x in t.items() if n != f"{MIDDLE}B.weight"}, {}),
    ("does not fit this base", lambda t: {n: x for n, x in t.items() if MIDDLE not in n}, {}),
    ("text_encoder", lambda t: t | {"text_encoder.layers.0.lora_A.weight": torch.zeros(2, 8)}, {}),
    *(("", dict, {key: value}) for key, value in (
        ("hidden", "1" + 19 * "0"), ("tokens", "1" + 20 * "0"), ("step", "9" * 5000), ("alpha", "inf"),
        ("alpha", "0"), ("alpha", "-2"), ("rank", "0"), ("rank", "5"), ("rank", "1" + 400 * "0")))])
def test_a_damaged_adapter_or_one_of_another_kind_is_refused(words, tensors, header, adapter, tmp_path):
    """With a number that is none its images would be black; without a tensor the LoRA would be another."""
    file = open_adapter(adapter[0])
    load_adapter(file, UNet(CHANNELS))
    save_file(tensors(dict(file.read(file.names))), tmp_path / "x.safetensors", file.header | header)
    with pytest.raises(Fail, match=words or None):
        load_adapter(open_adapter(tmp_path / "x.safetensors"), UNet(CHANNELS))

@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_an_exported_lora_is_the_same_in_the_program_it_is_for(form, adapter, unet, inputs,
                                                               diffusers_networks, tmp_path):
    """Diffusers reads its own names and, through its converter, kohya's, which are also ComfyUI's and
    A1111's; PEFT reads its folder."""
    out = tmp_path / ("adapter-peft/adapter_model" if form == "peft" else f"adapter-{form}")
    out = out.with_suffix(".safetensors")
    result = program("lora.py", adapter[0], "--export", form, cwd=tmp_path)
    assert str(out) in result.stdout
    z, t, c = inputs
    with torch.no_grad():
        expected = unet(z, t, c)
        theirs = copy.deepcopy(diffusers_networks[0]).float()
        if form == "peft":
            theirs = PeftModel.from_pretrained(theirs, str(out.parent))
        elif form == "diffusers":
            theirs.load_lora_adapter(str(out), prefix="unet", use_safetensors=True)
        else:
            state, alphas = StableDiffusionPipeline.lora_state_dict(str(out), unet_config=theirs.config)
            StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
        frozen = diffusers_networks[0].float()(z, t, c).sample
        got = theirs(z, t, c).sample
    assert (expected - frozen).abs().max() > 1e-2 * frozen.abs().max()          # the LoRA does something
    print(f"{form}: relative deviation {((got - expected).abs().max() / expected.abs().max()).item():.1e}")
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()

def test_the_readmes_diffusers_pipeline_makes_our_image(trained, base, uni2h, dataset, tmp_path, monkeypatch):
    """The block of the README as it stands, but for the names of the checkpoints and the size of the image.
    """
    unet, vae = (kind.from_pretrained(base, subfolder=part) for kind,
                 part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")))
    unet.register_to_config(sample_size=8)          # 64 px; SD1.5's says 64 for 512 px
    # as SD1.5's file
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              skip_prk_steps=True, steps_offset=1)
    StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(tmp_path / "sd15")
    patch = sorted(dataset.rglob("*.JPG"))[0]
    shutil.copy(trained / "adapter.safetensors", tmp_path / "adapter.safetensors")
    load_rgb(patch).save(tmp_path / "patch.png")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- tested -->\n```python\n")[1].split("```")[0]
    assert len(ast.parse(block).body) <= 11 and max(map(len, block.splitlines())) <= 120
    block = block.replace("stable-diffusion-v1-5/stable-diffusion-v1-5",
                          str(tmp_path / "sd15")).replace("open_encoder()", f"open_encoder({str(uni2h)!r})")
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.no_grad():
        exec(block, names)
    program("sample.py", "--adapter", "adapter.safetensors", "--sd15", base, "--uni2h", uni2h, "--ref",
            "patch.png", "--cfg", 1.3, "--out", "ours", cwd=tmp_path)
    ours = np.asarray(Image.open(next((tmp_path / "ours/cfg1.3").glob("*.png"))), dtype=int)
    theirs = np.asarray(names["image"], dtype=int)
    assert ours.shape == theirs.shape == (64, 64, 3) and ours.std() > 5
    share = (ours != theirs).mean()
    print(f"largest difference of a pixel: {abs(ours - theirs).max()} of 255, of {share:.1%} of them")
    assert abs(ours - theirs).max() <= 1

def test_an_adapters_terms_are_those_of_its_parents():
    toy = licence("toy", TOY.terms)
    assert "MIT" in toy and "RAIL" not in toy and "NC" not in toy
    assert "NC-ND" in licence("toy", UNI2H.terms) and "RAIL" in licence("other", TOY.terms)

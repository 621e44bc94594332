"""What only a GPU can show: `python -m pytest tests/test_cuda.py`, alone, since other tests hide the GPUs;
`-k "not compiled"` leaves out two that compile for minutes. Skipped where there is none. The first test has
passed on an H200, the others have not run on a GPU yet."""
from dataclasses import replace

import pytest
import torch
from conftest import HEADER, SETTINGS, Memory, texture, trainer
from peers import random_inception

from fid import frechet_distance
from ldm.encoder import Inception
from ldm.unet import UNet
from lora import inject
from projector import Projector
from train import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to be run alone")
DEVICE = torch.device("cuda:0")

WIDTHS = (32, 64, 64, 64)       # with the depth of SD1.5

def on_cpu():
    return trainer(widths=WIDTHS, layers=2)

def on_gpu(dtype=torch.float32, size=16, **changes):
    """The trainer of `on_cpu` on the GPU: the same weights and images."""
    torch.manual_seed(0)
    unet = inject(UNet(WIDTHS).requires_grad_(False), 2)
    projector = Projector(d_e=12, d_h=16, n_c=2)
    for p in unet.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)
    unet, projector = unet.to(DEVICE, memory_format=torch.channels_last), projector.to(DEVICE)
    images = [(f"{i}.png", f"h{i}") for i in range(8)]
    return Trainer(replace(SETTINGS, **changes), unet, projector, Memory(8, 12), images, (4, size, size),
                   DEVICE)

def gradient(t):
    t.train_step()
    return torch.cat([p.grad.flatten() for p in t.parameters]).cpu()

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.06, torch.float16: 0.02}     # with TF32 in convolutions

def assert_gradient_of_the_cpu(dtype, compiled):
    a, b = gradient(on_cpu()), gradient(on_gpu(dtype, no_compile=not compiled))
    assert (a - b).norm() < TOLERANCE[dtype] * a.norm()

@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_step_is_that_of_the_cpu(dtype):
    assert_gradient_of_the_cpu(dtype, compiled=False)

def test_a_compiled_step_is_that_of_the_cpu():
    assert_gradient_of_the_cpu(torch.bfloat16, compiled=True)

def test_passes_of_one_image_give_the_step():
    a, b = gradient(on_gpu()), gradient(on_gpu(micro_batch=1))
    assert (a - b).norm() < 1e-3 * a.norm()

def test_python_waits_for_the_gpu_once_in_a_step():
    t = on_gpu()
    t.train_step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchroniz") as found:
            t.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchroniz" in str(w.message)]) == 1

def test_a_resumed_run_is_near_the_one_that_was_not_stopped(tmp_path):
    whole, t, again = on_gpu(), on_gpu(), on_gpu()
    t.train_step()
    t.save(tmp_path, HEADER)
    again.restore(tmp_path / "state.safetensors")
    again.train_step()
    for _ in range(2):
        whole.train_step()
    for a, b in zip(whole.parameters, again.parameters):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)

def test_the_distance_is_that_of_the_cpu(tmp_path):
    weights = random_inception(tmp_path / "inception.safetensors")
    images = [texture(i, 96 + 8 * (i % 3)) for i in range(24)]
    cpu, gpu = (frechet_distance(x[:12], x[12:]) for x in (
        Inception(weights).extract(images, device) for device in ("cpu", DEVICE)))
    assert gpu == pytest.approx(cpu, rel=1e-3)

@pytest.mark.parametrize("compiled", [pytest.param(False, id="eager"), pytest.param(True, id="compiled")])
def test_a_full_size_step_at_batch_16_fits_12_gb(compiled):
    """Stable Diffusion 1.5's widths at 512 px, and the fixed noise of a validation."""
    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]
    total, before = torch.cuda.get_device_properties(DEVICE).total_memory, graphs()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 12e9 / total), DEVICE)
    try:
        with torch.device("meta"):
            unet = UNet()
        unet = inject(unet.to_empty(device=DEVICE).bfloat16().requires_grad_(False), 4)
        with torch.no_grad():
            for p in unet.parameters():
                p.normal_(std=0.01)
        rows = Memory(16, 1536)
        rows.rows = {h: (torch.randn(2, 4, 64, 64), torch.full((2, 4, 64, 64), -9.0), e)
                     for h, (_, _, e) in rows.rows.items()}
        t = Trainer(replace(SETTINGS, batch=16, no_compile=not compiled),
                    unet.to(memory_format=torch.channels_last), Projector().to(DEVICE), rows,
                    [(h, h) for h in rows.rows], (4, 64, 64), DEVICE)
        assert t.micro_batch == 16 or total < 14e9
        t.train_step()
        t.validation_loss(list(rows.rows)[:3])
        first = graphs()
        t.train_step()
        t.validation_loss(list(rows.rows)[:2])
        assert graphs() == first and (not compiled or first - before == 2)
        print(f"peak {torch.cuda.max_memory_allocated(DEVICE) / 1e9:.2f} GB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)

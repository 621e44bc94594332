"""FID and KID equal the tools whose numbers they claim, with random weights everywhere and with the real ones
here."""
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import program, texture
from peers import as_released, random_inception
from PIL import Image
from safetensors.torch import load_file

import fid
from ldm.encoder import RESIZERS, Inception
from ldm.app import Fail
from ldm.data import list_images, save_image

CPU = torch.device("cpu")

@pytest.fixture(scope="module", params=["random", pytest.param("real", marks=pytest.mark.slow)])
def kind(request):
    """Whether weights and images are random or real; these tests hold for any."""
    return request.param

@pytest.fixture(scope="module")
def weights(kind, tmp_path_factory, request):
    if kind == "real":
        return request.getfixturevalue("shared")("weights/inception-2015-12-05.safetensors")
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.safetensors")

@pytest.fixture(scope="module")
def pth(weights, tmp_path_factory):
    """The same weights as pytorch-fid's release file has them."""
    path = tmp_path_factory.mktemp("pth") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(as_released(load_file(weights)), path)
    return path

@pytest.fixture(scope="module")
def folders(kind, tmp_path_factory, request):
    """Two folders of patches: of 20 and 22 real, or of 4 and 5 random ones."""
    root = tmp_path_factory.mktemp("patches")
    (root / "a").mkdir()
    (root / "b").mkdir()
    if kind == "real":
        images = sorted(request.getfixturevalue("shared")("data/ebhi-colon/train").iterdir())
        for name, chosen in (("a", images[::50][:20]), ("b", images[7::50][:22])):
            for image in chosen:
                shutil.copy(image, root / name)
    else:
        for i in range(9):
            texture(i, 220).save(root / "ab"[i >= 4] / f"{i:02d}.JPG", quality=95)
    return root / "a", root / "b"

def ours(folders, weights, resize):
    network = Inception(weights, resize)
    return [fid.read_set(f, list_images(f), network, CPU, 8) for f in folders]

def exact(x, y):
    """The Fréchet distance by eigenvalues of the Gram matrix: tr (Σ₁Σ₂)^½ = Σ √λ(X₁X₂ᵀ X₂X₁ᵀ), another way
    than fid.py's."""
    a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = a @ b.T
    root = np.sqrt(np.linalg.eigvalsh(cross @ cross.T).clip(0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * root

def test_fid_equals_pytorch_fids_on_the_same_folders(kind, folders, pth, weights, monkeypatch, tmp_path):
    import pytorch_fid.inception
    from pytorch_fid.fid_score import calculate_frechet_distance, get_activations
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(pth))
    theirs = pytorch_fid.inception.InceptionV3([3])
    features = [get_activations(sorted(map(str, f.iterdir())), theirs, 4, num_workers=0) for f in folders]
    sets, read_set = [], fid.read_set
    monkeypatch.setattr(fid, "read_set", lambda *args: sets.append(read_set(*args)) or sets[-1])
    result = program("fid.py", *folders, "--inception", weights, "--json", "out.json", cwd=tmp_path)
    for mine, reference in zip(sets, features, strict=True):
        assert np.abs(mine.features - reference).max() < 1e-4
    if kind == "random":        # in coordinates of their span: the same distance without a root of 2048²
        basis = np.linalg.svd(np.concatenate(features), full_matrices=False)[2]
        features = [f @ basis.T for f in features]
    theirs = calculate_frechet_distance(*(s for f in features for s in (f.mean(0), np.cov(f, rowvar=False))))
    [row] = json.loads((tmp_path / "out.json").read_text())
    print(f"pytorch-fid {theirs:.6f}, ours {row['fid']:.6f}, difference {abs(row['fid'] - theirs):.1e}")
    assert abs(row["fid"] - theirs) < 1e-3
    assert float(result.stdout.split("FID ")[1].split()[0]) == pytest.approx(theirs, abs=1e-3)
    assert (row["n_real"], row["n_fake"]) == tuple(len(list(f.iterdir())) for f in folders)
    assert row["resize"] == "pytorch-fid" and row["weights"] in result.stdout

def test_fid_equals_clean_fids(folders, weights):
    from cleanfid import fid as clean
    network = Inception(weights).load()
    theirs = [clean.get_folder_features(str(f), lambda x: network((x - 128) / 128), num_workers=0,
                                        batch_size=8, device=CPU, mode="clean")
              for f in folders]
    value = fid.compare(*ours(folders, weights, "clean"))["fid"]
    # clean-fid's own sqrtm fails with the SciPy of today
    expected = exact(*(np.float64(f) for f in theirs))
    print(f"clean-fid {expected:.6f}, difference {abs(value - expected):.1e}")
    assert abs(value - expected) < 1e-3

def test_fid_and_kid_equal_torch_fidelitys(folders, weights, pth, monkeypatch):
    import torch_fidelity
    monkeypatch.setattr(fid, "MIN_KID", 4)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, kid=True, kid_subset_size=3, cuda=False,
        verbose=False, feature_extractor_weights_path=str(pth), batch_size=8, samples_find_ext="jpg,JPG",
        save_cpu_ram=True, cache=False)
    mine = fid.compare(*ours(folders, weights, "tf1"), subset=3)
    print(f"torch-fidelity {theirs['frechet_inception_distance']:.6f}, "
          f"difference {abs(mine['fid'] - theirs['frechet_inception_distance']):.1e}")
    assert abs(mine["fid"] - theirs["frechet_inception_distance"]) < 1e-3
    # features in float32
    assert mine["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)

@pytest.mark.parametrize("n, m, subset", [(40, 50, 20), (30, 30, 29), (25, 25, 25), (60, 33, 33)])
def test_kid_equals_torch_fidelitys_on_equal_features_and_subsets(n, m, subset):
    from torch_fidelity.metric_kid import kid_features_to_metric
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(k, 64, generator=g, dtype=torch.float64) for k in (n, m))
    y = 1.1 * y
    theirs = kid_features_to_metric(x, y, kid_subsets=100, kid_subset_size=subset, rng_seed=2020,
                                    verbose=False)
    mean, std, size = fid.kid(x.numpy(), y.numpy(), subset).values()
    assert size == subset and mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    if subset == n == m:
        assert std == 0 and theirs["kernel_inception_distance_std"] < 1e-12
    else:
        assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)

def test_kid_takes_no_larger_subset_than_there_are_images():
    x, y = np.random.default_rng(0).random((33, 8)), np.random.default_rng(1).random((40, 8))
    assert fid.kid(x, y)["kid_subset"] == 33

def test_the_distance_of_gaussians_with_diagonal_covariances_is_known():
    mu1, mu2, s1, s2 = np.array([[1.0, 2, 3], [0, 2, 5], [1, 4, 9], [4, 4, 1]])
    expected = 1 + 4 + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    sets = moments_only(mu1, np.diag(s1)), moments_only(mu2, np.diag(s2))
    assert fid.compare(*sets)["fid"] == pytest.approx(expected, abs=1e-9)

@pytest.mark.parametrize("n, m, d", [(300, 200, 12), (30, 20, 64), (5, 9, 64)])
def test_the_small_sample_form_is_the_definition(n, m, d):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(1, 2, size=(m, d))
    definition = exact(x, y)
    if n > d:       # there sqrtm is exact, and the Gram matrix is the singular one
        s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        definition = (np.square(x.mean(0) - y.mean(0)).sum()
                      + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2)).real)
        sets = [moments_only(f.mean(0), s) for f, s in ((x, s1), (y, s2))]
        assert fid.compare(*sets)["fid"] == pytest.approx(definition, rel=1e-9)
    assert fid.frechet_distance(x, y) == pytest.approx(definition, rel=1e-9)
    assert fid.frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * (x ** 2).sum())

def test_the_squared_mmd_of_two_pairs_by_hand():
    # d = 1: k(x, y) = (xy + 1)³; x = {0, 1}: k(0, 1) = 1; y = {1, 2}: k(1, 2) = 27; across: 1, 1, 8, 27
    assert fid.squared_mmd(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])) == 1 + 27 - 2 * 37 / 4

@pytest.mark.parametrize("size", [(64, 64), (220, 220), (299, 299), (301, 450)])
def test_resizers_equal_the_tools_own(size):
    from cleanfid.resize import build_resizer
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    clean = torch.from_numpy(build_resizer("clean")(np.array(image)))
    expected = {"pytorch-fid": 2 * F.interpolate(x / 255, (299, 299), mode="bilinear",
                                                 align_corners=False) - 1,
                "clean": (clean.permute(2, 0, 1)[None] - 128) / 128,
                "tf1": (tf1(x, size=(299, 299), align_corners=False) - 128) / 128}
    for name, reference in expected.items():
        assert (RESIZERS[name](image) - reference[0]).abs().max() < 1e-6, name

def test_pytorch_fids_file_and_the_safetensors_hold_the_same_network(weights, pth):
    assert Inception(weights).fingerprint() == Inception(pth).fingerprint()

def random_set(seed=0, n=6, d=256, space=("clean", "abc")):
    features = np.random.default_rng(seed).random((n, d)).astype(np.float32).astype(np.float64)
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(n)]
    return fid.ImageSet(features, names, ("inception", *space))

def test_saved_statistics_give_the_same_numbers_and_are_pytorch_fids(tmp_path):
    real, fake, path = random_set(0), random_set(1), tmp_path / "real.npz"
    fid.save_set(path, real)
    again = fid.load_set(path)
    assert fid.compare(again, fake) == fid.compare(real, fake)
    assert fid.compare_classes(again, fake) == fid.compare_classes(real, fake)
    with np.load(path) as f:                    # the two names that pytorch-fid asks for
        assert np.array_equal(f["mu"], real.features.mean(0))
        assert np.abs(f["sigma"] - np.cov(real.features, rowvar=False)).max() < 1e-12

def test_features_of_different_networks_are_not_compared():
    with pytest.raises(Fail, match="16 features .* 8 of"):
        fid.compare(random_set(d=16), random_set(d=8))

def test_statistics_of_another_resizer_or_network_are_refused(tmp_path):
    fid.save_set(tmp_path / "x.npz", random_set())
    for space in (("tf1", "abc"), ("clean", "xyz")):
        with pytest.raises(Fail, match="make one as the other"):
            fid.compare(fid.load_set(tmp_path / "x.npz"), random_set(space=space))

X = np.random.default_rng(0).normal(size=(30, 12))
MU, SIGMA = X.mean(0), np.cov(X, rowvar=False)

@pytest.mark.parametrize("content", [
    dict(mu=MU, sigma=SIGMA), dict(mean=MU, cov=SIGMA), dict(feats=X),
    dict(arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=MU, sigma=SIGMA, mu_s=MU[:7], sigma_s=np.eye(7)),
    dict(mu=MU.astype(np.float32), sigma=SIGMA.astype(np.float32))])
def test_statistics_of_other_programs_are_read_without_weights_and_named_unknown(content, tmp_path):
    np.savez(tmp_path / "x.npz", **content)
    np.savez(tmp_path / "y.npz", mu=MU + 2, sigma=4 * SIGMA)        # 12 · 2² + tr (1 - 2)² Σ
    out = program("fid.py", "x.npz", "y.npz", cwd=tmp_path).stdout
    assert float(out.split()[1]) == pytest.approx(48 + np.trace(SIGMA), abs=1e-3)
    assert "resizer and network of x.npz, y.npz unknown" in out

@pytest.mark.parametrize("content, reason", [
    (dict(mu=np.zeros(3), sigma=np.eye(4)), "mismatch"), (dict(sigma=np.eye(3)), "mu is not"),
    (dict(mu=np.array([{}], dtype=object), sigma=np.eye(3)), "allow_pickle"),
    (dict(mu=np.array(["a", "b"]), sigma=np.eye(2)), "could not convert"),
    (dict(mu=np.full(2, np.nan), sigma=np.eye(2)), "not finite"),
    (dict(mu=MU, sigma=-SIGMA), "semidefinite"),
    (dict(mu=MU, sigma=SIGMA - np.eye(12)), "semidefinite"),
    (dict(mu=MU, sigma=SIGMA + np.triu(SIGMA, 1)), "symmetric"), (dict(feats=X[0]), "shape"),
    (dict(arr_0=np.zeros((4, 8, 8, 3), np.uint8)), "mu is not")])
def test_foreign_archives_that_hold_no_statistics_are_refused(content, reason, tmp_path):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(Fail, match=f"no statistics.*{reason}"):
        fid.load_set(tmp_path / "x.npz")

def moments_only(mu, sigma):
    return fid.ImageSet(fid.with_moments(mu, sigma))

def test_stand_ins_have_the_moments():
    x = fid.with_moments(MU, SIGMA)
    assert np.allclose(x.mean(0), MU) and np.allclose(np.cov(x, rowvar=False), SIGMA)

def test_names_without_features_are_no_classes(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.eye(2), n=3, names=np.array(["a/1", "a/2", "a/3"]))
    images = fid.load_set(tmp_path / "x.npz")
    assert images.n is None and fid.compare_classes(images, images) == {}

def test_a_damaged_archive_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(8), sigma=np.eye(8))
    whole = (tmp_path / "x.npz").read_bytes()
    np.save(tmp_path / "array", np.zeros(8))
    for content in (whole[:len(whole) // 2], whole[:200] + bytes(100) + whole[300:], b"",
                    (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(Fail, match="no statistics"):
            fid.load_set(tmp_path / "x.npz")

def test_mixed_sizes_upper_case_and_subfolders_are_read_and_classes_counted(tmp_path, weights):
    for i in range(4):
        for name in ("real", "fake"):
            folder = tmp_path / name / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            texture(i + 50 * (name == "fake"), 40 + i).save(folder / f"{i}.PNG")
    result = program("fid.py", "real", "fake", "--per-class", "--inception", weights, "--json", "out.json",
                     cwd=tmp_path)
    [row] = json.loads((tmp_path / "out.json").read_text())
    assert {name: (c["n_real"], c["n_fake"]) for name,
            c in row["classes"].items()} == {"a": (2, 2), "b": (2, 2)}
    assert "2 | 2" in result.stdout and row["kid_subset"] == 4
    assert row["kid"] is None and result.stdout.count("too few images") == 3

@pytest.mark.parametrize("other", ["one", "missing"])
def test_a_folder_without_two_images_is_refused(tmp_path, monkeypatch, other):
    for name in ("two/0.png", "two/1.png", "one/0.png"):
        save_image(tmp_path / name, texture(0))
    monkeypatch.setattr(sys, "argv", ["fid.py", str(tmp_path / "two"), str(tmp_path / other)])
    with pytest.raises(Fail, match=f"{other}: no .npz .* nor folder of two images"):
        fid.main()
    (tmp_path / "one/samples.json").write_text('{"adapter_sha256": "x"}')         # an --out, no cfg1.3/ in it
    if other == "one":
        with pytest.raises(Fail, match="one holds real and sampled images; pass its"):
            fid.main()

def test_what_is_not_counted_or_not_compared_is_said(tmp_path, monkeypatch):
    space = SimpleNamespace(kind="inception", resize="pytorch-fid", fingerprint=lambda: "0",
                            extract=lambda files, *_: np.eye(len(files)))
    monkeypatch.setattr(fid, "Inception", lambda path, resize: space)
    for name, classes in (("real", "ab"), ("fake", "ac")):
        for i, label in enumerate(classes * 2):
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
            texture(i, 40).save(tmp_path / name / label / f"{i}.png")
    for name in ("x.gif", "x.ppm", "masks/x.png", ".hidden.png"):
        (tmp_path / "fake" / name).parent.mkdir(exist_ok=True)
        texture(0, 40).save(tmp_path / "fake" / name)
    save_image(tmp_path / "real/a/0.png", texture(0, 40), adapter="x", seed=1)
    out = program("fid.py", "real", "fake", "--per-class", cwd=tmp_path).stdout
    [line] = [line for line in out.splitlines() if "not counted in fake" in line]
    assert all(f"1 {kind}" in line for kind in (".gif files", ".ppm files", "hidden files", "masks"))
    assert "1 images of real are generated" in out and "n 4 | 4" in out
    assert all(line in " ".join(out.split()) for line in ("a 2 | 2", "b 2 | 0", "c 0 | 2"))

def test_a_negative_kid_is_explained():
    halves = np.random.default_rng(0).random((2, 40, 16))
    x, y = (fid.ImageSet(half, [""] * 40) for half in halves)
    row = fid.compare(x, y) | dict(real="x", fake="y", features=None, unknown="x")
    assert row["kid"] < 0 and "below 0 by chance" in list(fid.result_lines(row))[-1]
    # and features of a kind that fid.py does not make
    row |= dict(features="uni", weights="ab", unknown="")
    assert next(fid.result_lines(row)).endswith("features of uni, ab")

@pytest.mark.parametrize("arguments, reason", [
    ((), "REAL"), (("a",), "FAKE"), (("a", "b", "--features", "encoder", "--resize", "clean"), "--resize")])
def test_arguments_that_do_nothing_or_are_missing_are_named(arguments, reason, tmp_path):
    result = program("fid.py", *arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2 and reason in result.stderr

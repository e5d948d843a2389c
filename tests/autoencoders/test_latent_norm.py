"""Between raw and normalised latents."""

import json

import pytest
import torch
from safetensors.torch import save_file

from repalign.autoencoders.latent_norm import ScaleShift, Statistics, require_norm, statistics_from_file
from repalign.autoencoders.small_kl import SmallKLAutoencoder
from repalign.errors import UserError
from repalign.state import Streams


@pytest.fixture
def raw():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@pytest.mark.parametrize(
    "norm",
    [
        ScaleShift(0.18215),
        ScaleShift(1.5305, 0.0609),
        ScaleShift([1.0, 2.0, -3.0, 4.0], [0.0, 1.0, 2.0, 3.0]),
        Statistics([0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]),
    ],
    ids=["sd", "sd3", "per channel", "statistics"],
)
def test_denormalize_inverts_normalize(norm, raw):
    torch.testing.assert_close(norm.denormalize(norm.normalize(raw)), raw)


def test_formula_of_scale_and_bias(raw):
    torch.testing.assert_close(ScaleShift(1.5305, 0.0609).normalize(raw), (raw - 0.0609) * 1.5305)


def test_statistics_whiten_what_they_were_measured_on(raw):
    norm = Statistics(raw.mean((0, 2, 3)).tolist(), raw.std((0, 2, 3)).tolist())
    latent = norm.normalize(raw)
    torch.testing.assert_close(latent.mean((0, 2, 3)), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(latent.std((0, 2, 3)), torch.ones(4))


def test_every_stream_is_normalised(raw):
    streams = Streams(latent=raw, other=2 * raw)
    normed = ScaleShift(0.5).normalize(streams)
    torch.testing.assert_close(normed["other"], raw)


def test_half_precision_latents_are_normalised_in_single_precision(raw):
    assert ScaleShift(0.18215).normalize(raw.half()).dtype == torch.float32


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_statistics_from_a_file(tmp_path, ending, raw):
    held = {"mean": torch.arange(4.0).reshape(1, 4, 1, 1), "std": torch.tensor([1.0, 2.0, 4.0, 8.0])}
    path = tmp_path / f"statistics.{ending}"
    save_file(held, path) if ending == "safetensors" else torch.save(held, path)
    expected = (raw - torch.arange(4.0).reshape(4, 1, 1)) / torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1)
    torch.testing.assert_close(statistics_from_file(path).normalize(raw), expected)


def test_statistics_of_other_codes(tmp_path, raw):
    mean, std = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 4.0, 8.0]
    expected = Statistics(mean, std).normalize(raw)
    scale = {"latents_scale": 1 / torch.tensor(std), "latents_bias": torch.tensor(mean)}
    torch.save({name: value.reshape(1, 4, 1, 1) for name, value in scale.items()}, tmp_path / "repa_e.pt")
    config = {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.18215, "shift_factor": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "repa_e.pt", tmp_path / "config.json", tmp_path):
        torch.testing.assert_close(statistics_from_file(path).normalize(raw), expected)


@pytest.mark.parametrize(("shift", "bias"), [(None, 0.0), (0.0609, 0.0609)])
def test_factor_and_shift_of_a_diffusers_configuration(tmp_path, raw, shift, bias):
    config = {"latents_mean": None, "latents_std": None, "scaling_factor": 1.5305, "shift_factor": shift}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(statistics_from_file(tmp_path).normalize(raw), (raw - bias) * 1.5305)


def test_without_statistics_the_line_says_how_to_compute_them():
    assert statistics_from_file(None) is None
    with pytest.raises(UserError, match=r"autoencoder\.norm: SmallKLAutoencoder has no latent stat.*task=precompute"):
        require_norm(SmallKLAutoencoder(weights="random", width=16))
    norm = ScaleShift(2.0)
    assert require_norm(SmallKLAutoencoder(weights="random", width=16, norm=norm)) is norm


def test_errors_name_the_key(tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.norm\.scale: .* found 0"):
        ScaleShift(0.0)
    with pytest.raises(UserError, match="4 scales but 3 biases"):
        ScaleShift([1.0] * 4, [0.0] * 3)
    with pytest.raises(UserError, match="2 means but 1 standard"):
        Statistics([0.0, 1.0], [1.0])
    with pytest.raises(UserError, match="positive"):
        Statistics([0.0], [-1.0])
    with pytest.raises(UserError, match=r"autoencoder\.norm\.path: no file"):
        statistics_from_file(tmp_path / "none.pt")
    save_file({"mean": torch.zeros(1)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="has no 'std'"):
        statistics_from_file(tmp_path / "half.safetensors")
    for name in ("torn.safetensors", "torn.pt", "torn.json"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 torn")
        with pytest.raises(UserError, match=r"autoencoder\.norm\.path: '.*torn.*' cannot be read"):
            statistics_from_file(tmp_path / name)

"""The two forms in which latents are stored, against the official codes' draws."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.posterior import from_log_variance, from_std

CASE = Path(__file__).parents[1] / "golden" / "data" / "repa_data_ops"


@pytest.mark.golden
@pytest.mark.parametrize(("form", "posterior"), [("std", from_std), ("logvar", from_log_variance)])
def test_draws_from_stored_moments(form, posterior):
    case = json.loads((CASE / "case.json").read_text())
    held = load_file(CASE / "tensors.safetensors")
    drawn = posterior(held[f"inputs/moments_{form}"]).sample(held["inputs/n"])
    latent = ScaleShift(case["config"]["scale"]).normalize(drawn)
    torch.testing.assert_close(latent, held[f"outputs/z_{form}"], rtol=case["rtol"], atol=case["atol"])

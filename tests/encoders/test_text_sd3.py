"""The text encoders of Stable Diffusion 3 and how they are joined, against diffusers' pipeline on small networks."""

from __future__ import annotations

import pytest
import torch

from repalign.conditioners.text import JoinedTextConditioner, TextConditioner
from repalign.encoders.text import TextEncoder
from repalign.encoders.text_sd3 import AbsentTextEncoder, CLIPTextEncoder, RandomTextEncoder, T5TextEncoder
from repalign.errors import UserError
from repalign.random import SampleRandom
from tests.encoders.small_text import LENGTH, write_three

CAPTIONS = ["a red apple", "a car on the road", "", "melon " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_three(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def encoders(folder):
    return {
        "clip_l": CLIPTextEncoder(folder, LENGTH, "text_encoder", "tokenizer"),
        "clip_g": CLIPTextEncoder(folder, LENGTH, "text_encoder_2", "tokenizer_2"),
        "t5": T5TextEncoder(folder, 7, "text_encoder_3", "tokenizer_3"),
    }


def test_clip_gives_the_state_before_the_last_layer_and_the_projected_end_token(encoders):
    encoder, kept = encoders["clip_g"], {}

    def note(module, inputs, output):
        kept.update(into=inputs[0], out=output[0] if isinstance(output, tuple) else output)

    handle = encoder.network.text_model.encoder.layers[-1].register_forward_hook(note)
    found = encoder(CAPTIONS)
    handle.remove()
    torch.testing.assert_close(found.data, kept["into"])
    normed = encoder.network.text_model.final_layer_norm(kept["out"])
    ends = found.mask.sum(1) - 1
    expected = normed[torch.arange(4), ends] @ encoder.network.text_projection.weight.T
    torch.testing.assert_close(found.pooled, expected)
    assert found.data.shape == (4, LENGTH, 20) and found.pooled.shape == (4, 16) == (4, encoder.pooled_dim)
    assert not found.data.requires_grad


def test_t5_sees_its_padding(encoders, folder):
    hidden = TextEncoder(folder, 7, network="text_encoder_3", tokenizer="tokenizer_3")
    visible = encoders["t5"]
    assert visible(["a red apple"]).mask.tolist() == [[True] * 4 + [False] * 3]
    assert not torch.allclose(hidden(["a red apple"]).data[:, :4], visible(["a red apple"]).data[:, :4], atol=1e-3)
    assert visible.pooled_dim is None and visible(["a"]).pooled is None


@pytest.mark.slow
def test_joined_as_diffusers_does(folder, encoders):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import AutoTokenizer

    parts = {f"text_encoder{s}": encoders[n].network for s, n in (("", "clip_l"), ("_2", "clip_g"), ("_3", "t5"))}
    parts |= {f"tokenizer{s}": AutoTokenizer.from_pretrained(folder / f"tokenizer{s}") for s in ("", "_2", "_3")}
    pipeline = StableDiffusion3Pipeline(
        transformer=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
    )
    conditioner = JoinedTextConditioner(encoders)
    with torch.no_grad():
        context, empty, pooled, empty_pooled = pipeline.encode_prompt(
            CAPTIONS, None, None, device=torch.device("cpu"), max_sequence_length=7
        )
    cond, null = conditioner({"caption": CAPTIONS}), conditioner.null(4, torch.device("cpu"))
    for ours, theirs in ((cond.text.data, context), (cond.pooled, pooled)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in ((null.text.data, empty), (null.pooled, empty_pooled)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert conditioner.context_dim == 40 and conditioner.pooled_dim == 28


def test_each_encoder_is_dropped_on_its_own(encoders):
    conditioner = JoinedTextConditioner(encoders, drop=0.464)
    drop = conditioner.draw_drop(SampleRandom(0, range(20000)))
    rates = {name: float(lost.float().mean()) for name, lost in drop.items()}
    assert all(abs(rate - 0.464) < 0.012 for rate in rates.values()), rates
    all_lost = torch.stack(list(drop.values())).all(0).float().mean()
    assert abs(float(all_lost) - 0.464**3) < 0.008
    whole = conditioner({"caption": CAPTIONS})
    lost = {
        "text/clip_l": torch.tensor([True, False, False, False]),
        "text/t5": torch.tensor([False, True, False, False]),
    }
    cond = conditioner({"caption": CAPTIONS}, lost)
    assert not cond.text.data[0, :LENGTH, :12].any() and not cond.pooled[0, :12].any()
    assert torch.equal(cond.text.data[0, :LENGTH, 12:], whole.text.data[0, :LENGTH, 12:])
    assert torch.equal(cond.text.data[0, LENGTH:], whole.text.data[0, LENGTH:])
    assert not cond.text.data[1, LENGTH:].any() and torch.equal(cond.pooled[1], whole.pooled[1])
    assert torch.equal(cond.text.data[2:], whole.text.data[2:])


@pytest.mark.parametrize("left_out", ["clip_l", "clip_g", "t5"])
def test_any_subset_is_that_encoder_dropped(encoders, left_out):
    own = encoders[left_out]
    absent = AbsentTextEncoder(own.spec.dim, own.length, own.pooled_dim)
    cond = JoinedTextConditioner({**encoders, left_out: absent})({"caption": CAPTIONS})
    lost = {f"text/{left_out}": torch.ones(4, dtype=torch.bool)}
    expected = JoinedTextConditioner(encoders)({"caption": CAPTIONS}, lost)
    assert torch.equal(cond.text.data, expected.text.data) and torch.equal(cond.pooled, expected.pooled)


def test_states_from_a_store_are_the_same(encoders):
    conditioner = JoinedTextConditioner(encoders)
    batch = {}
    for name, encoder in encoders.items():
        found = encoder(CAPTIONS)
        batch |= {f"text/{name}": found.data, f"text_mask/{name}": found.mask}
        batch |= {} if found.pooled is None else {f"text_pooled/{name}": found.pooled}
    stored, direct = conditioner(batch), conditioner({"caption": CAPTIONS})
    assert torch.equal(stored.text.data, direct.text.data) and torch.equal(stored.pooled, direct.pooled)


def test_one_encoder_with_its_mask_and_the_empty_prompt_for_dropped_captions(encoders):
    conditioner = TextConditioner(encoders, "clip_l", pooled=True, drop=0.5)
    cond = conditioner({"caption": CAPTIONS}, {"text": torch.tensor([False, True, False, False])})
    null = conditioner.null(4, torch.device("cpu"))
    assert torch.equal(cond.text.data[1], null.text.data[1]) and torch.equal(cond.pooled[1], null.pooled[1])
    assert torch.equal(cond.text_mask[1], null.text_mask[0]) and null.text_mask[0].sum() == 2
    assert torch.equal(cond.text.data[0], encoders["clip_l"](CAPTIONS).data[0])
    assert TextConditioner(encoders, "t5")({"caption": CAPTIONS}).pooled is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda e: TextConditioner({}, "main"), r"text_encoders: none, and the conditioner reads 'main'"),
        (lambda e: TextConditioner(e, "clip_1"), r"conditioner: unknown text encoder 'clip_1'. Did you mean 'clip_l'"),
        (lambda e: TextConditioner(e, "t5", pooled=True), r"conditioner.pooled: text_encoders.t5 gives no pooled"),
        (lambda e: TextConditioner(e, "t5", drop=2), r"conditioner.drop"),
        (lambda e: JoinedTextConditioner(e, ["clip_l"], "clip_g"), None),
        (lambda e: JoinedTextConditioner(e, ["t5"], "t5"), r"conditioner.side_by_side: text_encoders.t5 gives no"),
        (lambda e: JoinedTextConditioner(e, ["clip_l", "clip_g"], "clip_g"), r"12 \+ 20 channels .* at most the 20"),
        (lambda e: TextConditioner(e, "t5")({"label": torch.zeros(2)}), r"conditioner: reads captions, and these data"),
        (lambda e: CLIPTextEncoder(None), r"text_encoders.folder: has no value"),
        (lambda e: CLIPTextEncoder("/no/such"), r"text_encoders.folder: no config.json in '/no/such'"),
        (lambda e: T5TextEncoder("x", precision="float8"), r"text_encoders.precision: unknown choice 'float8'"),
    ],
)
def test_what_does_not_fit_is_one_line(encoders, make, match):
    if match is None:
        assert make(encoders).pooled_dim == 12
        return
    with pytest.raises(UserError, match=match):
        make(encoders)


def test_a_random_encoder_tells_captions_apart():
    encoder = RandomTextEncoder(6, length=5, pooled=4)
    found = encoder(["ab", "", "abcdefgh"])
    assert found.mask.sum(1).tolist() == [2, 0, 5] and found.pooled.shape == (3, 4)
    assert torch.equal(found.data[0, :2], found.data[2, :2]) and not torch.equal(found.pooled[0], found.pooled[1])
    assert (
        encoder.fingerprint == RandomTextEncoder(6, length=5, pooled=4).fingerprint != RandomTextEncoder(6).fingerprint
    )

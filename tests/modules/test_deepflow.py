"""DeepFlow's contract, and that the method trains."""

import pytest

from repalign.errors import UserError
from tasks.build import assemble
from tasks.launch import compose


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=denoising", "~objective.weights", "time_sampler=uniform"], "DeepFlow: needs deep supervision"),
        (["objective.weights=[0.2,0.2,1.0]"], "2 branch.*weights has 3"),
        (["clock=reversed"], "1 branch.*clock=native"),
        (["parametrization=noise"], "parametrization=velocity"),
    ],
)
def test_the_contract_names_what_is_missing(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))
    with pytest.raises(UserError, match=message):
        assemble(compose(["experiment=deepflow_sit_b", "debug=tiny", f"paths.runs={tmp_path}", *words]))


def test_a_tiny_recipe_is_as_deep_as_the_real_one_and_narrow(tmp_path):
    module = assemble(compose(["experiment=repa_deepflow_sit_xl", "debug=tiny", f"paths.runs={tmp_path}"])).module
    assert module.backbone.ends == [8, 16, 24] and module.backbone.io.patchify.out_channels == 16
    assert [a.tap for a in module.aligners.values()] == ["vera.1", "vera.2"]
    assert sum(a.weight for a in module.aligners.values()) == 0.5

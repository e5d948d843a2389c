import pytest

from tests.docs.names import NAMESPACES, described, undescribed


def test_the_page_describes_names_of_every_namespace():
    patterns = [pattern.pattern for pattern in described()]
    assert {pattern.partition("/")[0] for pattern in patterns} == set(NAMESPACES)
    assert len(patterns) == len(set(patterns)) > 50


@pytest.mark.parametrize("name", ["train/los", "loss", "metric/fid", "train/align", "samples/raw", "eval/cost/hours"])
def test_a_name_that_is_not_described_is_found(name):
    assert undescribed([name, "train/loss", "eval/fd_lite0_ci95", "train/align/repa"]) == [name]

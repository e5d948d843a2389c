"""task=curate as it is typed: the list is written, read again by training, and what cannot work is refused at once."""

import pytest

from datamodules.curated import read_decisions
from repalign.errors import UserError
from tasks import curate
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.launch import compose
from tests.curation.made import write_folder


def composed(tmp_path, *words):
    cfg = compose(["task=curate", *words, f"paths.runs={tmp_path}", f"paths.cache={tmp_path}/cache", "run_name=run"])
    check_composition(cfg)
    return cfg


def test_the_list_is_written_and_read(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures")
    words = ["data=image_text_folder", f"data.root={folder}", "data.image_size=16", "task.order=[size,quality]"]
    curate.run(composed(tmp_path, *words, f"task.output={tmp_path}/kept"))
    decisions = read_decisions(tmp_path / "kept")
    kept = sum(one.step is None for one in decisions)
    assert 0 < kept and (tmp_path / "kept" / "report.html").stat().st_size > 1000
    said = capsys.readouterr().out
    assert f"{len(decisions)} pictures" in said and f"data.keep={tmp_path}/kept" in said
    data = build(composed(tmp_path, *words, f"data.keep={tmp_path}/kept").data, "data")
    assert len(data.dataset) == kept


def test_pictures_without_names_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="have no names, so they cannot be curated"):
        curate.run(composed(tmp_path, "data=synthetic", "data.size=8"))


@pytest.mark.parametrize(("order", "line"), [("[sise]", "Did you mean 'size'"), ("[size,size]", "different steps")])
def test_the_order_is_checked(order, line, tmp_path):
    with pytest.raises(UserError, match=line):
        curate.run(composed(tmp_path, "data=synthetic", f"task.order={order}"))

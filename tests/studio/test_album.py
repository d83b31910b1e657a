"""The pictures of a visit and what is removed of the uploads."""

import pytest

from unclip_pl.studio.album import Album
from unclip_pl.studio.engine import Engine
from unclip_pl.studio.requests import Create


def test_pictures_of_a_visit_outlive_old_uploads(models, tmp_path):
    pytest.importorskip("gradio", reason='needs the extra "web"')
    from gradio.route_utils import delete_files_created_by_app

    from unclip_pl.studio.page import page

    engine, album = Engine(models), Album()
    ticket = engine.submit(Create(captions=("fox",), steps=1, prior="none"))
    assert ticket.wait(60)
    (drawn,) = album.add("ann", ticket)
    upload = tmp_path / "upload.png"
    upload.touch()
    blocks = page(engine, album)
    blocks.temp_file_sets.append({str(drawn.path), str(upload)})  # both were shown in the page
    delete_files_created_by_app(blocks, None)
    assert drawn.path.exists() and not upload.exists()
    engine.close()
    album.close()

"""What somebody could try who wants more from the studio than drawings."""

import asyncio
import base64
import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason='needs the extra "web"')

import gradio as gr
from starlette.testclient import TestClient

from unclip_pl.studio import album as albums
from unclip_pl.studio.album import Album
from unclip_pl.studio.drawing import Drawn
from unclip_pl.studio.engine import Engine, Ticket
from unclip_pl.studio.forms import Form
from unclip_pl.studio.inputs import PaintedPicture, Picture
from unclip_pl.studio.page import page
from unclip_pl.studio.requests import Create, Inpaint, Vary
from unclip_pl.studio.server import build
from unclip_pl.utils.errors import UserError

WAYS_IN = [
    "/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a",
    "/gradio_api/file=/etc/passwd", "/gradio_api/heartbeat/a", "/api/docs", "/api/openapi.json",
    "/api/studio", "/api/jobs/a", "/api/static/swagger-ui.css", "/static/img/logo.svg",
]  # fmt: skip


def test_every_way_in_asks_for_the_password(models):
    with TestClient(build(Engine(models), users={"ann": "secret"})) as client:
        for path in WAYS_IN:
            assert client.get(path).status_code == 401, path
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/api/create", "/login"):
            assert client.post(path).status_code == 401, path
        assert client.delete("/api/jobs/a").status_code == 401


PATHS = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd",
    "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd", "/gradio_api/file=//etc/passwd",
    "/api/static/../../../../etc/passwd", "/api/static/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/static/..%2f..%2f..%2f..%2fetc/passwd", "/assets/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/proxy=https://example.com/",
    "/gradio_api/component_server", "/monitoring",
]  # fmt: skip


@pytest.fixture(scope="module")
def client(models):
    with TestClient(build(Engine(models)), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_out_of_the_studio(client, path):
    answer = client.get(path)
    assert answer.status_code >= 400 and "root:" not in answer.text


def test_an_upload_that_is_too_large_is_refused(client):
    files = {"files": ("a.png", b"\0" * (9 * 2**20), "image/png")}
    assert client.post("/gradio_api/upload", files=files).status_code == 413


def test_uploads_cannot_be_put_elsewhere(client):
    files = {"files": ("../../../../evil.png", b"x", "image/png")}
    (path,) = client.post("/gradio_api/upload", files=files).json()
    assert "unclip-studio-" in path and ".." not in path


def test_no_component_fetches_an_address(models):
    engine = Engine(models)
    album = Album()
    blocks = page(engine, album)
    takes = {part for event in blocks.fns.values() for part in event.inputs}
    files = [part for part in takes if isinstance(part, gr.Image | gr.File | gr.ImageEditor)]
    assert len(files) >= 8
    for part in files:
        with pytest.raises(UserError, match="not fetched"):  # before it connects
            asyncio.run(part.async_move_resource_to_block_cache("http://192.0.2.1/a.png"))
    engine.close()
    album.close()


def saved(folder, name, image):
    path = folder / name
    image.save(path)
    return SimpleNamespace(path=str(path))


def test_a_picture_that_is_too_large_is_a_sentence_in_the_page(models, tmp_path):
    large = saved(tmp_path, "large.png", Image.new("1", (20_000, 2_000)))
    small = saved(tmp_path, "small.png", Image.new("RGB", (20, 20)))
    form = Form(Inpaint, models)
    with gr.Blocks():
        editor, field = PaintedPicture.named("Picture"), Picture.named("Picture")
    form.fields = {"painted": editor}
    for background, layer in ((large, small), (small, large)):
        value = editor.preprocess(SimpleNamespace(background=background, layers=[layer]))
        with pytest.raises(UserError, match="megapixels|too large"):
            form.request([value])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    layers = [SimpleNamespace(path=str(broken))]
    value = editor.preprocess(SimpleNamespace(background=small, layers=layers))
    with pytest.raises(UserError, match="mask cannot be read"):
        form.request([value])
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(b"\0" * (9 * 2**20))
    form = Form(Vary, models)
    form.fields = {"image": field}
    with pytest.raises(UserError, match="8 MB"):
        form.request([field.preprocess(SimpleNamespace(path=str(heavy)))])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP", "WEBP"])
def test_bombs_are_refused_by_their_header(client, kind):
    file = io.BytesIO()
    side = 16_000 if kind == "WEBP" else 9_000
    Image.new("1", (side, side // 4)).save(file, kind)
    data = {"image": base64.b64encode(file.getvalue()).decode()}
    answer = client.post("/api/vary", json=data)
    assert answer.status_code == 400 and "mega" in answer.json()["detail"].lower()


def test_formats_that_run_programs_are_not_opened(client):
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"%PDF-1.4"):
        image = base64.b64encode(data).decode()
        answer = client.post("/api/vary", json={"image": image})
        assert answer.status_code == 400 and "no picture" in answer.json()["detail"]


def test_deep_json_leaves_the_server_up(client):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/create", content=b"[" * 200_000, headers=headers)
    assert 400 <= answer.status_code < 500
    assert client.get("/api/studio").status_code == 200


def test_the_album_is_bounded_and_the_pictures_of_who_drew_last_stay(monkeypatch):
    monkeypatch.setattr(albums, "MOST_OF_ALL", 4)
    album = Album()
    try:
        for person in ("a", "b", "a", "c", "d"):
            ticket = Ticket(Create(captions=(person,)))
            ticket.pictures = [Drawn(torch.zeros(3, 2, 2, dtype=torch.uint8), person, 0)]
            album.add(person, ticket)
        assert [len(album.of(person)) for person in "abcd"] == [2, 0, 1, 1]
        assert len(list(album.folder.glob("*/*.png"))) == 4
        assert not {one.path for one in album.of("a")} & {one.path for one in album.of("c")}
    finally:
        album.close()
    assert not album.folder.exists()

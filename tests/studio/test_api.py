"""The studio for programs: jobs, pictures, limits, passwords and sentences over HTTP."""

import base64
import io
import json

import pytest
import torch
from PIL import Image

from tests.studio.conftest import mask, picture

pytest.importorskip("fastapi_offline", reason='needs the extra "web"')

from starlette.testclient import TestClient

from unclip_pl.studio import guard
from unclip_pl.studio.engine import Engine, State, Ticket
from unclip_pl.studio.jobs import Jobs, NoSuchJob
from unclip_pl.studio.picture_files import settings_in
from unclip_pl.studio.requests import Create
from unclip_pl.studio.server import build
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

QUICK = {"prior_steps": 2, "steps": 2}


@pytest.fixture(scope="module")
def client(models):
    with TestClient(build(Engine(models, limit=2))) as client:
        yield client


def finished(client, kind, **request):
    answer = client.post(f"/api/{kind}", json=request)
    assert answer.status_code == 202, answer.text
    job = client.get(f"/api/jobs/{answer.json()['id']}", params={"wait": 30}).json()
    assert job["state"] == "done", job
    return job


def pixels(data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size, 3)


def test_a_caption_becomes_pictures_with_their_settings(client, models):
    job = finished(client, "create", captions=["red heart", "fox"], seed=7, num_images=2, **QUICK)
    assert [(p["label"], p["seed"]) for p in job["pictures"]] == [
        ("red heart", 7), ("red heart", 8), ("fox", 7), ("fox", 8),
    ]  # fmt: skip
    data = client.get(job["pictures"][1]["url"]).content
    settings = {"kind": "create", "captions": ["red heart"], "seed": 8, "num_images": 1, **QUICK}
    assert settings_in(data) == job["pictures"][1]["settings"] == settings
    request = Create(**{k: v for k, v in settings.items() if k != "kind"})
    drawn = models.with_prior["diffusion"].generate(
        ["red heart"], [8], size=16, prior_sampling=models.prior_sampling(request),
        sampling=models.sampling(request),
    )  # fmt: skip
    expected = to_uint8(drawn[0]).permute(1, 2, 0).int()
    assert (pixels(data).int() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("vary", {"image": picture(), "num_images": 1, "steps": 2}),
        ("interpolate", {"image": picture(), "other": picture(seed=1), "frames": 2, "steps": 2}),
        ("edit", {"image": picture(), "target": "fox", "theta": [0.5], "steps": 2}),
        ("inpaint", {"image": picture(), "mask": mask(), "num_images": 1, "steps": 2}),
        ("upsample", {"image": "data:image/png;base64," + picture(20)}),
    ],
)
def test_every_manipulation_has_a_route(client, kind, request_):
    for shown in finished(client, kind, **request_)["pictures"]:
        assert client.get(shown["url"]).content.startswith(b"\x89PNG")


def test_a_job_is_followed_and_cancelled(client):
    many = {"captions": ["a"], "num_images": 16, "steps": 1000, "prior_steps": 2}
    job = client.post("/api/create", json=many).json()
    behind = client.post("/api/create", json=many | {"steps": 999}).json()
    while not job["preview"]:
        job = client.get(f"/api/jobs/{job['id']}").json()
    assert job["state"] == "drawing" and behind["place"] == 1
    assert pixels(client.get(job["preview"]).content).shape == (16 * 16, 16, 3)
    waiting = client.get("/api/studio").json()
    assert (waiting["waiting"], waiting["drawing"], waiting["limit"]) == (1, 1, 2)
    last = client.post("/api/create", json=many).json()
    full = client.post("/api/create", json=many)
    assert full.status_code == 429 and full.headers["retry-after"]
    assert "2 requests are waiting" in full.json()["detail"]
    for name in (job["id"], behind["id"], last["id"]):
        assert client.delete(f"/api/jobs/{name}").status_code == 204
        assert client.get(f"/api/jobs/{name}").json()["state"] == "cancelled"
    assert client.get(f"/api/jobs/{job['id']}/preview").status_code == 404


BAD = [
    ("create", {"captions": [" "]}, 400, "The caption is empty"),
    ("create", {}, 422, "captions: Field required"),
    ("create", {"captions": ["a"], "step": 3}, 422, "step: Unexpected keyword argument"),
    ("create", {"captions": ["a"], "sampler": "best"}, 422, "sampler: Input should be 'ddpm'"),
    ("vary", {"image": "AAAA"}, 400, "The picture is no picture that can be read"),
    ("vary", {"image": picture()[: len(picture()) // 2]}, 400, "damaged"),
]


@pytest.mark.parametrize(("kind", "request_", "code", "words"), BAD)
def test_bad_requests_are_told_in_a_sentence(client, kind, request_, code, words):
    answer = client.post(f"/api/{kind}", json=request_)
    assert answer.status_code == code
    assert words in answer.json()["detail"] and answer.json()["detail"].endswith(".")


def test_pictures_of_too_many_pixels_are_not_decoded(client):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    assert "megapixels" in client.post("/api/vary", json={"image": image}).json()["detail"]


def test_what_is_not_there_is_said_so(client):
    assert "no such job" in client.get("/api/jobs/nobody").json()["detail"]
    job = finished(client, "create", captions=["a"], **QUICK)
    url = f"/api/jobs/{job['id']}/pictures"
    assert client.get(f"{url}/1").status_code == 404
    assert client.get(f"{url}/..%2F..%2Fsetup.py").status_code in (404, 422)


def test_the_openapi_page_is_whole_and_loads_nothing_from_outside(client):
    page = client.get("/api/docs")
    assert (
        page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    )
    assert "https://" not in page.text.replace("https://fastapi", "")
    for part in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"/api/static/{part}" in page.text
        assert client.get(f"/api/static/{part}").status_code == 200
    routes = client.get("/api/openapi.json").json()
    assert {"/create", "/vary", "/inpaint", "/jobs/{name}"} <= set(routes["paths"])
    assert "steps" in json.dumps(routes["components"]["schemas"]["Create"])


def test_too_large_requests_end_before_they_are_read(client, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BYTES", 1000)
    told = client.post("/api/create", json={"captions": ["a" * 2000]})
    assert told.status_code == 413 and told.text.endswith("send less.")
    parts = (b"a" * 300 for _ in range(10))  # of unknown length
    assert client.post("/api/create", content=parts).status_code == 413


def test_only_users_come_in(models):
    with TestClient(build(Engine(models), users={"ann": "secret", "björn": "pass"})) as client:
        for way in (None, ("ann", "wrong"), ("eve", ""), ("eve", "secret")):
            answer = client.get("/api/studio", auth=way)
            assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
        assert client.get("/", headers={"Authorization": "Basic ?"}).status_code == 401
        assert client.get("/api/studio", auth=("ann", "secret")).status_code == 200
        assert client.get("/api/studio", auth=("björn", "pass")).status_code == 200


def test_users_are_read_from_a_file(tmp_path):
    path = tmp_path / "users"
    path.write_text("ann:a:b\n\nbob:c\n")
    assert guard.read_users(path) == {"ann": "a:b", "bob": "c"}
    path.write_text("ann\n")
    with pytest.raises(UserError, match="Line 1 of"):
        guard.read_users(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="has no users"):
        guard.read_users(path)
    with pytest.raises(UserError, match="cannot be read"):
        guard.read_users(tmp_path / "none")


def test_jobs_are_forgotten_after_their_time_and_when_they_fill_the_room(models):
    jobs, names = Jobs(seconds=60, room=1000), []
    for _ in range(3):
        ticket = Ticket(Create(captions=("a",)))
        names.append(jobs.add(ticket))
        ticket.end(State.DONE)
        ticket.pictures = [type("Drawn", (), {"image": torch.zeros(400)})()]
    assert jobs.get(names[2]) and len(jobs) == 2
    with pytest.raises(NoSuchJob):
        jobs.get(names[0])
    jobs.seconds = -1
    with pytest.raises(NoSuchJob):
        jobs.get(names[2])
    assert len(jobs) == 0

"""The page in a real browser: captions become drawings, drawings are pulled at, nothing leaves."""

import base64
import io
import re
import socket

import pytest
import torch
from PIL import Image

from tests.studio.browser import chromium, served
from tests.studio.conftest import picture, principal

pytest.importorskip("gradio", reason='needs the extra "web"')

from unclip_pl.studio.picture_files import png_file
from unclip_pl.studio.requests import Create, Vary
from unclip_pl.utils.images import to_uint8

pytestmark = pytest.mark.slow
SECONDS = 120_000
"""Until something must have come, in thousandths."""


@pytest.fixture(scope="module")
def outside():
    """The addresses that this process connected to, other than its own."""
    found, real = set(), socket.socket.connect

    def connect(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1")):
            found.add(address)
        return real(self, address)

    socket.socket.connect = connect
    yield found
    socket.socket.connect = real


@pytest.fixture(scope="module")
def studio(models, outside):
    with served(models) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, studio, outside):
    """A person at the page, who finds out if anything is loaded from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context, studio[0])
    yield page
    context.close()
    assert not outside
    assert not asked_elsewhere(page, studio[0])


def opened(context, address):
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.get_by_label("Captions, one per line").wait_for()
    return page


def asked_elsewhere(page, address):
    """What a page asked for that is not of the studio itself."""
    return [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]


def draw(page, captions, number=1, steps=2):
    page.get_by_label("Captions, one per line").fill(captions)
    set_number(page, "Pictures per caption", number)
    more = page.get_by_role("button", name="More settings")
    prior_steps = page.get_by_label("Steps of the diffusion prior").first
    if not prior_steps.is_visible():
        more.locator("visible=true").click()
    page.get_by_label("Decoder steps").locator("visible=true").fill(str(steps))
    prior_steps.fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()


def set_number(page, label, value):
    box = page.get_by_label(f"number input for {label}").locator("visible=true")
    box.fill(str(value))
    box.press("Tab")


def live(page, part=""):
    return page.locator(f".live {part}").locator("visible=true")


def pixels(page, image):
    """The file behind an <img>, uint8 (3, H, W)."""
    url = image.evaluate("image => image.src")
    data = page.request.get(url).body()
    shown = Image.open(io.BytesIO(data)).convert("RGB")
    flat = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
    return flat.view(shown.height, shown.width, 3).permute(2, 0, 1)


def first_in_gallery(page):
    page.locator("#gallery .grid-container button").first.click()
    page.locator(".facts").get_by_text("made in").wait_for()


def send(page, where):
    page.get_by_label("Send the picture to").click()
    page.get_by_role("option", name=where, exact=True).click()
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text(f"Sent to {where}.").wait_for()


def test_a_caption_becomes_the_drawing_that_the_command_makes(page, models):
    draw(page, "red heart")
    image = live(page, ".done img")
    image.wait_for()
    assert image.get_attribute("alt") == "red heart, seed 0"
    request = Create(captions=("red heart",), steps=2, prior_steps=2)
    drawn = models.with_prior["diffusion"].generate(
        ["red heart"], [0], size=16, prior_sampling=models.prior_sampling(request),
        sampling=models.sampling(request),
    )  # fmt: skip
    difference = pixels(page, image).int() - to_uint8(drawn[0]).int()
    assert difference.abs().max() <= 1
    assert image.evaluate("image => image.naturalWidth") == 16


def test_a_drawing_is_varied_and_an_interpolation_scrubbed_without_asking_the_server(page):
    draw(page, "red heart")
    live(page, ".done img").wait_for()
    first_in_gallery(page)
    send(page, "Vary")
    page.get_by_role("button", name="Vary", exact=True).click()
    live(page, ".done img").first.wait_for()
    assert live(page, ".done img").count() == 4

    send(page, "Interpolate, from")
    page.locator("#gallery .grid-container button").nth(1).click()
    send(page, "Interpolate, to")
    set_number(page, "Frames", 3)
    page.get_by_role("button", name="Interpolate", exact=True).click()
    slider = page.get_by_role("slider", name="Between the pictures")
    slider.wait_for()
    shown = live(page, ".frames figure")
    assert shown.count() == 1 and shown.inner_text() == "0% of the way"
    page.wait_for_timeout(500)
    before = len(page.asked)
    slider.press("ArrowRight")
    assert shown.inner_text() == "50% of the way"
    slider.press("End")
    assert shown.count() == 1 and shown.inner_text() == "100% of the way"
    assert slider.get_attribute("aria-valuetext") == "100% of the way"
    assert len(page.asked) == before


def test_pictures_are_seen_while_they_are_drawn_and_stopped_at_once(page, studio):
    draw(page, "red heart\nfox", number=16, steps=1000)
    preview = live(page, ".drawing img").first
    preview.wait_for()
    assert preview.get_attribute("src").startswith("data:image/png")
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    page.get_by_text("Stopped.").wait_for(timeout=5000)
    assert live(page, "img").count() == 0
    draw(page, "fox")
    live(page, ".done img").wait_for()


def test_a_broken_file_is_told_in_a_sentence_and_the_page_lives_on(page):
    choose_tab(page, "Vary")
    page.get_by_role("button", name="Vary", exact=True).click()
    page.get_by_role("alert").get_by_text("There is no picture").wait_for()
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG broken"}
    inputs = page.locator("input[type=file]")
    inputs.first.set_input_files(broken)
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Vary", exact=True).click()
    page.get_by_role("alert").get_by_text("no picture that can be read").wait_for()
    choose_tab(page, "Create")
    draw(page, "red heart")
    live(page, ".done img").wait_for()


def test_a_dropped_png_gives_its_settings_back(page):
    draw(page, "red heart", number=2, steps=3)
    live(page, ".done img").nth(1).wait_for()
    source = live(page, ".done img").nth(1).evaluate("image => image.src")
    data = page.request.get(source).body()
    page.reload()
    drop(page, data)
    page.get_by_text("The settings are in Create.").wait_for()
    assert page.get_by_label("Captions, one per line").input_value() == "red heart"
    assert page.get_by_label("Seed").locator("visible=true").input_value() == "1"
    drop(page, base64.b64decode(picture()))
    page.get_by_role("alert").get_by_text("This picture has no settings").wait_for()


def test_a_dropped_png_opens_the_tab_that_made_it(page):
    request = Vary(image=picture(), num_images=2, eta=0.25, steps=3, seed=5)
    drop(page, png_file(torch.zeros(3, 8, 8, dtype=torch.uint8), request, "seed 5", 5))
    page.get_by_text("The settings are in Vary.").wait_for()
    eta = page.get_by_label("number input for eta").locator("visible=true")
    eta.wait_for()
    assert eta.input_value() == "0.25"
    assert page.get_by_label("Seed").locator("visible=true").input_value() == "5"
    upload(page)
    page.get_by_role("button", name="Vary", exact=True).click()
    live(page, ".done img").first.wait_for()
    assert live(page, ".done img").count() == 2


def drop(page, data):
    """Give a PNG to the field that takes settings."""
    field = page.locator("input[type=file][accept='.png']")
    field.set_input_files({"name": "dropped.png", "mimeType": "image/png", "buffer": data})


def test_two_people_at_once_see_their_own(browser, studio, page):
    with_friend = browser.new_context()
    friend = opened(with_friend, studio[0])
    draw(page, "red heart", number=2)
    draw(friend, "fox")
    for person, alts in (
        (page, ["red heart, seed 0", "red heart, seed 1"]),
        (friend, ["fox, seed 0"]),
    ):
        images = live(person, ".done img")
        images.first.wait_for()
        assert [image.get_attribute("alt") for image in images.all()] == alts
        kept = person.locator("#gallery .grid-container button")
        kept.nth(len(alts) - 1).wait_for()
        assert kept.count() == len(alts)
    with_friend.close()


def test_every_control_has_a_name_and_the_page_fits_a_phone(browser, studio):
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = opened(context, studio[0])
    for name in ("Create", "Vary", "Interpolate", "Edit", "Inpaint", "Upsample"):
        choose_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
        assert not page.evaluate(NAMELESS), name
    context.close()


def choose_tab(page, name):
    """Open a tab; on a narrow page it may be in a menu."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).first.click()
    page.get_by_role("button", name="Stop").locator("visible=true").wait_for()
    page.wait_for_timeout(300)


NAMELESS = """
() => [...document.querySelectorAll('input, textarea, button, [role=slider]')]
  .filter(e => e.checkVisibility() && e.type != 'file')
  .filter(e => !(e.getAttribute('aria-label') || e.title || e.innerText?.trim()
    || e.labels?.length || e.getAttribute('aria-labelledby') || e.placeholder))
  .map(e => e.outerHTML.slice(0, 200))
"""


def test_no_file_of_the_machine_can_be_read(page, studio, tmp_path):
    address, _ = studio
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    for path in (secret, "/etc/passwd", __file__):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            assert page.request.get(f"{address}/{route}{path}").status >= 400
    # nor be passed off as an upload
    config = page.request.get(f"{address}/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    vary = next(
        d for d in config["dependencies"] if [kinds[k] for k in d["inputs"]][:1] == ["image"]
    )
    upload = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    data = [upload, *[None] * (len(vary["inputs"]) - 1)]
    body = {"data": data, "fn_index": vary["id"], "session_hash": "thief"}
    told = page.request.post(f"{address}/gradio_api/queue/join", data=body)
    answer = page.request.get(f"{address}/gradio_api/queue/data?session_hash=thief").text()
    assert told.status >= 400 or '"success":false' in answer.replace(" ", "")
    assert "a secret" not in answer


def few_steps(page):
    """Let the decoder of the open tab take two."""
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.get_by_label("Decoder steps").locator("visible=true").fill("2")


def picture_file(side=40):
    data = base64.b64decode(picture(side))
    return {"name": "picture.png", "mimeType": "image/png", "buffer": data}


def test_a_brush_says_where_to_paint(page):
    choose_tab(page, "Inpaint")
    page.get_by_role("button", name="Inpaint", exact=True).click()
    page.get_by_role("alert").get_by_text("There is no picture").wait_for()
    page.locator("input[type=file][accept*=image]").locator("nth=0").set_input_files(picture_file())
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Inpaint", exact=True).click()
    page.get_by_role("alert").get_by_text("mask must have white").wait_for()
    few_steps(page)
    page.get_by_label("Brush").or_(page.get_by_title("Brush")).locator("visible=true").first.click()
    box = page.locator("canvas").locator("visible=true").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.4, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Inpaint", exact=True).click()
    live(page, ".done img").first.wait_for()
    assert live(page, ".done img").count() == 4


def test_a_picture_is_edited_enlarged_and_attacked(page):
    choose_tab(page, "Edit")
    upload(page)
    page.get_by_label("To: what it should show").fill("red heart")
    few_steps(page)
    page.get_by_role("button", name="Edit", exact=True).click()
    slider = page.get_by_role("slider", name="How far to go")
    slider.wait_for()
    slider.press("End")
    assert live(page, ".frames figure").inner_text() == "theta 0.5"

    choose_tab(page, "Upsample")
    upload(page, side=20)
    page.get_by_role("button", name="Enlarge", exact=True).click()
    live(page, ".done img").wait_for()
    assert live(page, ".done figcaption").inner_text() == "80 x 80 pixels"

    choose_tab(page, "Typography")
    upload(page)
    page.get_by_label("Labels to paste on it, one per line").press_sequentially("iPod")
    live(page, ".drawing img").wait_for()  # seen while it is typed
    page.get_by_label("What the picture shows", exact=True).fill("red apple")
    page.get_by_role("button", name="Attack", exact=True).click()
    live(page, ".done img").first.wait_for()
    assert live(page, ".done img").count() == 6
    assert re.match(r"no label: CLIP sees red apple [0-9.]+%", live(page, "li").first.inner_text())


def test_the_components_are_scrubbed(page, models, monkeypatch):
    monkeypatch.setitem(models.__dict__, "components", principal())
    choose_tab(page, "Components")
    upload(page)
    page.get_by_label("Numbers of principal components").fill("1, some")
    page.get_by_role("button", name="Probe", exact=True).click()
    page.get_by_role("alert").get_by_text("are no numbers of components").wait_for()
    page.get_by_label("Numbers of principal components").fill("1, 256")
    page.get_by_role("button", name="Probe", exact=True).click()
    slider = page.get_by_role("slider", name="Principal components")
    slider.wait_for()
    slider.press("End")
    assert live(page, ".frames figure").inner_text() == "256 components"
    assert "100.0% of the variance" in live(page, "li").last.inner_text()


def upload(page, side=40):
    """Choose a picture in the open tab, and wait until it is there."""
    tab = page.get_by_role("tabpanel").locator("visible=true")
    tab.locator("input[type=file]").first.set_input_files(picture_file(side))
    tab.locator("button img, .image-frame img").first.wait_for()
